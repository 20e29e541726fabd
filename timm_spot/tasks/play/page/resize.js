// A picture as the model takes it: resized and cropped as Pillow (13, to the last bit) and torchvision do it, by which models
// are evaluated. Browsers scale in ways of their own.

const cubic = x => {  // a = -0.5
  x = Math.abs(x);
  return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
};
const FILTERS = {bicubic: [cubic, 2], bilinear: [x => Math.max(0, 1 - Math.abs(x)), 1]};
const ONE = 2 ** 22;  // weights are whole numbers of this unit

// For each pixel of a resized axis the first pixel read and its weights.
function taps(from, to, name) {
  const [filter, reach] = FILTERS[name], scale = from / to, stretch = Math.max(scale, 1), support = reach * stretch;
  return Array.from({length: to}, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5)), last = Math.min(from, Math.trunc(centre + support + 0.5));
    const weights = Array.from({length: last - first}, (_, j) => filter((j + first - centre + 0.5) / stretch));
    const sum = weights.reduce((a, w) => a + w, 0);
    return {first, weights: weights.map(w => w / sum * ONE).map(w => Math.trunc(w + (w < 0 ? -0.5 : 0.5)))};
  });
}

// One axis of RGBA pixels: `step` between neighbours on it, `count` lines beside each other, `next` apart.
function resample(pixels, out, table, {step, count, next, outStep, outNext}) {
  for (let line = 0; line < count; line++) {
    for (let i = 0; i < table.length; i++) {
      const {first, weights} = table[i];
      let r = ONE / 2, g = ONE / 2, b = ONE / 2, at = line * next + first * step;
      for (let j = 0; j < weights.length; j++, at += step) {
        r += pixels[at] * weights[j];
        g += pixels[at + 1] * weights[j];
        b += pixels[at + 2] * weights[j];
      }
      const to = line * outNext + i * outStep;
      out[to] = Math.floor(r / ONE);  // clamped to 0 ... 255 by its type
      out[to + 1] = Math.floor(g / ONE);
      out[to + 2] = Math.floor(b / ONE);
      out[to + 3] = 255;
    }
  }
}

function acrossRows(pixels, [h, w], W, name) {
  const out = new Uint8ClampedArray(4 * h * W);
  resample(pixels, out, taps(w, W, name), {step: 4, count: h, next: 4 * w, outStep: 4, outNext: 4 * W});
  return out;
}

function downColumns(pixels, [h, w], H, name) {
  const out = new Uint8ClampedArray(4 * H * w);
  resample(pixels, out, taps(h, H, name), {step: 4 * w, count: w, next: 4, outStep: 4 * w, outNext: 4});
  return out;
}

// RGBA pixels (h, w) at (H, W). Pillow begins with the axis that shrinks more.
export function resize(pixels, [h, w], [H, W], name) {
  if (H * w < W * h) {
    pixels = downColumns(pixels, [h, w], H, name);
    return w === W ? pixels : acrossRows(pixels, [H, w], W, name);
  }
  if (w !== W) pixels = acrossRows(pixels, [h, w], W, name);
  return h === H ? pixels : downColumns(pixels, [h, W], H, name);
}

const halfEven = x => Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x);

// RGBA pixels (H, W) of an ImageBitmap.
export function modelInput(picture, [H, W], {crop_mode, crop_pct, interpolation}) {
  const {width: w, height: h} = picture;
  const canvas = new OffscreenCanvas(w, h), pen = canvas.getContext('2d');
  pen.drawImage(picture, 0, 0);
  const pixels = pen.getImageData(0, 0, w, h).data, scaled = [H, W].map(side => Math.floor(side / crop_pct));
  let size = scaled;
  if (crop_mode !== 'squash') {  // the shorter side
    size = h <= w ? [scaled[0], Math.trunc(scaled[0] * w / h)] : [Math.trunc(scaled[0] * h / w), scaled[0]];
  }
  const resized = resize(pixels, [h, w], size, interpolation);
  const [top, left] = [halfEven((size[0] - H) / 2), halfEven((size[1] - W) / 2)];
  const out = new Uint8ClampedArray(4 * H * W);
  for (let y = 0; y < H; y++) {
    out.set(resized.subarray(4 * ((top + y) * size[1] + left), 4 * ((top + y) * size[1] + left + W)), 4 * y * W);
  }
  return out;
}
