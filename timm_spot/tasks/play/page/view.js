// The canvas: a picture, its windows, and what is drawn over them. Positions are (y, x) in fractions of the picture.

const TOKEN = '#e69f00', CHOSEN = '#56b4e9', DARK = 'rgb(0 0 0 / 65%)';

export class View {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext('2d');
    this.image = null;
  }

  // Geometry of the windows, as the server describes it.
  setModel({size, window, offset}) {
    this.size = size;
    this.window = window;
    this.offset = offset;
    this.canvas.style.aspectRatio = `${size[1]} / ${size[0]}`;
    this.resize();
  }

  resize() {
    if (!this.size) return;
    const width = this.canvas.clientWidth || 512, ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(width * this.size[0] / this.size[1] * ratio);
    this.scale = this.canvas.width / this.size[1];
  }

  // The window of a position, in pixels of the canvas.
  box([y, x]) {
    const [h, w] = this.window.map(side => side * this.scale);
    const cy = (y * this.size[0] + this.offset) * this.scale, cx = (x * this.size[1] + this.offset) * this.scale;
    return {x: cx - w / 2, y: cy - h / 2, w, h, cx, cy};
  }

  // The position under a pointer.
  position(event) {
    const frame = this.canvas.getBoundingClientRect();
    const pixel = (at, start, length, side) => ((at - start) / length * side - this.offset) / side;
    return [
      pixel(event.clientY, frame.top, frame.height, this.size[0]),
      pixel(event.clientX, frame.left, frame.width, this.size[1])];
  }

  // The token under a pointer: of those in reach the one whose centre is nearest, or -1.
  hit(event, positions) {
    const frame = this.canvas.getBoundingClientRect(), css = this.canvas.width / frame.width;
    const px = (event.clientX - frame.left) * css, py = (event.clientY - frame.top) * css;
    const reach = (event.pointerType === 'mouse' ? 12 : 22) * css;
    let best = -1, nearest = Infinity;
    positions.forEach((position, i) => {
      const box = this.box(position), dx = Math.abs(px - box.cx), dy = Math.abs(py - box.cy);
      const distance = Math.hypot(dx, dy);
      const inside = (dx <= box.w / 2 && dy <= box.h / 2) || distance <= reach;
      if (inside && distance < nearest) [best, nearest] = [i, distance];
    });
    return best;
  }

  draw({positions, chosen, view, worth, kept, stages, density, paths, band}) {
    const {context, canvas} = this;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!this.image) return;
    context.imageSmoothingEnabled = this.scale < 4;
    context.drawImage(this.image, 0, 0, canvas.width, canvas.height);
    const boxes = positions.map(position => this.box(position));
    if (view === 'seen') this.hideUnread(boxes);
    if (view === 'density' && density) this.drawDensity(density);
    if (paths) this.drawPaths(paths);
    boxes.forEach((box, i) => this.drawToken(box, i, {
      chosen: chosen.has(i), plain: view === 'seen', fell: kept && kept[i] < stages.length ? kept[i] + 1 : 0}));
    if (view === 'worth' && worth) this.drawWorth(boxes, worth);
    if (band) {
      context.setLineDash([6, 4]);
      this.stroke(band.x, band.y, band.w, band.h, CHOSEN, 1.5);
      context.setLineDash([]);
    }
  }

  // Share of the picture's pixels that lie in a window.
  share(positions) {
    const [H, W] = this.size, read = new Uint8Array(H * W);
    for (const [y, x] of positions) {
      const [top, left] = [y * H + this.offset - this.window[0] / 2, x * W + this.offset - this.window[1] / 2];
      for (let i = Math.max(0, Math.ceil(top - 0.5)); i < Math.min(H, top + this.window[0] - 0.5); i++) {
        for (let j = Math.max(0, Math.ceil(left - 0.5)); j < Math.min(W, left + this.window[1] - 0.5); j++) {
          read[i * W + j] = 1;
        }
      }
    }
    return read.reduce((sum, one) => sum + one, 0) / read.length;
  }

  hideUnread(boxes) {
    const {context, canvas} = this;
    const path = new Path2D();
    for (const box of boxes) path.rect(box.x, box.y, box.w, box.h);
    const cover = new OffscreenCanvas(canvas.width, canvas.height), pen = cover.getContext('2d');
    pen.fillStyle = '#8a8a8a';
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.globalCompositeOperation = 'destination-out';
    pen.fill(path);
    context.drawImage(cover, 0, 0);
  }

  drawDensity(density) {
    const h = density.length, w = density[0].length;
    const map = new OffscreenCanvas(w, h), pen = map.getContext('2d'), pixels = pen.createImageData(w, h);
    density.flat().forEach((value, i) => pixels.data.set([255, 140 + 80 * value, 20, 215 * Math.sqrt(value)], 4 * i));
    pen.putImageData(pixels, 0, 0);
    this.context.imageSmoothingEnabled = true;
    this.context.drawImage(map, 0, 0, this.canvas.width, this.canvas.height);
  }

  // Where each token has been on the way of a search.
  drawPaths(paths) {
    const {context} = this;
    for (let i = 0; i < paths[0].length; i++) {
      context.beginPath();
      paths.forEach((positions, step) => {
        const {cx, cy} = this.box(positions[i]);
        step ? context.lineTo(cx, cy) : context.moveTo(cx, cy);
      });
      for (const [color, width] of [[DARK, 4], [CHOSEN, 2]]) {
        context.strokeStyle = color;
        context.lineWidth = width * this.line;
        context.stroke();
      }
    }
  }

  get line() { return window.devicePixelRatio || 1; }

  stroke(x, y, w, h, color, width) {
    this.context.strokeStyle = color;
    this.context.lineWidth = width * this.line;
    this.context.strokeRect(x, y, w, h);
  }

  drawToken(box, index, {chosen, plain, fell}) {
    const {context} = this;
    if (fell) {
      context.fillStyle = DARK;
      context.fillRect(box.x, box.y, box.w, box.h);
      context.fillStyle = '#fff';
      context.font = `${11 * this.line}px system-ui`;
      context.textAlign = 'center';
      context.textBaseline = 'middle';
      context.fillText(String(fell), box.cx, box.cy);
      this.stroke(box.x, box.y, box.w, box.h, chosen ? CHOSEN : '#999', chosen ? 2.5 : 0.8);
      return;
    }
    if (!plain || chosen) {
      this.stroke(box.x, box.y, box.w, box.h, DARK, chosen ? 4.5 : 3);
      this.stroke(box.x, box.y, box.w, box.h, chosen ? CHOSEN : TOKEN, chosen ? 2.5 : 1.3);
      context.fillStyle = chosen ? CHOSEN : '#fff';
      context.strokeStyle = DARK;
      context.lineWidth = this.line;
      context.beginPath();
      context.arc(box.cx, box.cy, 2.4 * this.line, 0, 7);
      context.fill();
      context.stroke();
    }
  }

  // Full discs speak for the first class, rings against it; the larger, the more.
  drawWorth(boxes, worth) {
    const {context} = this, most = Math.max(...worth.map(Math.abs), 1e-6);
    boxes.forEach((box, i) => {
      const radius = Math.sqrt(Math.abs(worth[i]) / most) * 0.5 * Math.min(box.w, box.h);
      context.beginPath();
      context.arc(box.cx, box.cy, Math.max(radius, 1), 0, 7);
      context.lineWidth = 2.5 * this.line;
      if (worth[i] >= 0) {
        context.fillStyle = 'rgb(230 159 0 / 75%)';
        context.fill();
      } else {
        context.strokeStyle = CHOSEN;
        context.stroke();
      }
    });
  }
}
