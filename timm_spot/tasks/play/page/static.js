// What the page asks, without a server: the exported model in the browser, and placements that were computed before.
import {Refused} from './backend.js';
import {modelInput} from './resize.js';

const ROWS = 4096;  // tokens in one pass, where many placements are tried

export class Files {
  searches = false;
  prunes = false;

  async state() {
    const ort = this.ort = await import('./ort/ort.wasm.min.mjs');
    ort.env.wasm.wasmPaths = new URL('./ort/', import.meta.url).href;
    ort.env.wasm.numThreads = 1;  // more need headers that a plain file server does not send
    const [about, table, model] = await Promise.all([
      fetch('about.json').then(r => r.json()), fetch('placements.bin').then(r => r.arrayBuffer()),
      ort.InferenceSession.create('model.onnx')]);
    Object.assign(this, {about, model, table: new Float32Array(table), inputs: new Map()});
    this.placer = about.density ? await ort.InferenceSession.create('placer.onnx') : null;
    return about;
  }

  async example(number) {
    const shown = this.about.pictures[number];
    if (!this.inputs.has(shown.id)) this.inputs.set(shown.id, this.normalize(await pixelsOf(await fetch(shown.picture))));
    return shown;
  }

  async open(file, name) {
    let picture;
    try {
      picture = await createImageBitmap(file, {colorSpaceConversion: 'none', premultiplyAlpha: 'none'});
    } catch {
      throw new Refused(`${name} is no picture that this browser reads.`);
    }
    const pixels = modelInput(picture, this.about.size, this.about.config);
    const id = `${name} ${file.size} ${Date.now()}`;
    this.inputs.set(id, this.normalize(pixels));
    const [H, W] = this.about.size;
    const canvas = new OffscreenCanvas(W, H);
    canvas.getContext('2d').putImageData(new ImageData(pixels, W, H), 0, 0);
    const url = URL.createObjectURL(await canvas.convertToBlob());
    const even = this.placed('isotropic', this.about.full_budget);
    const [full] = await this.probabilities(id, [even]);
    const {width, height} = picture;
    const foreign = this.about.digits && Math.max(width, height) > 128;
    this.full ??= new Map();
    this.full.set(id, full);
    return {id, name, picture: url, pixels: [width, height], foreign, full: this.scores(full, full)};
  }

  // RGBA pixels as the model's input, (3, H, W) in one array.
  normalize(pixels) {
    const {mean, std} = this.about.config, n = pixels.length / 4, input = new Float32Array(3 * n);
    for (let c = 0; c < 3; c++) {
      for (let i = 0; i < n; i++) input[c * n + i] = (pixels[4 * i + c] / 255 - mean[c]) / std[c];
    }
    return input;
  }

  // The placement of a sampler, as it was computed before.
  placed(prior, n) {
    const all = this.about.full_budget, start = this.about.samplers.indexOf(prior) * all * (all + 1) + n * (n - 1);
    return Array.from({length: n}, (_, i) => [this.table[start + 2 * i], this.table[start + 2 * i + 1]]);
  }

  async place({picture, prior, n_tokens}) {
    if (this.about.samplers.includes(prior)) return this.placed(prior, n_tokens);
    const {positions} = await this.runPlacer(picture, this.placed('isotropic', n_tokens));
    return pairs(positions.data);
  }

  async density(picture) {
    const {density} = await this.runPlacer(picture, this.placed('isotropic', 1));
    const [, h, w] = density.dims, most = Math.max(...density.data);
    return Array.from({length: h}, (_, i) => Array.from(density.data.slice(i * w, (i + 1) * w), value => value / most));
  }

  runPlacer(picture, lattice) {
    const {Tensor} = this.ort, [H, W] = this.about.size;
    return this.placer.run({
      images: new Tensor('float32', this.inputs.get(picture), [1, 3, H, W]),
      lattice: new Tensor('float32', Float32Array.from(lattice.flat()), [lattice.length, 2])});
  }

  async answer({picture, positions, worth}) {
    const [probabilities, logits] = (await this.run(picture, [positions]))[0];
    const answer = {scores: this.scores(probabilities, this.fullOf(picture))};
    if (worth) answer.worth = await this.worth(picture, positions, logits);
    return answer;
  }

  fullOf(picture) {
    const known = this.full?.get(picture);
    if (known) return known;
    const full = [];
    for (const score of this.about.pictures.find(p => p.id === picture).full) full[score.label] = score.full;
    return full;
  }

  // By how much the log-odds of the first class fall when a token is left out.
  async worth(picture, positions, logits) {
    const n = positions.length, label = logits.indexOf(Math.max(...logits));
    if (n === 1) return [0];
    const whole = logOdds(logits, label), worths = [], size = Math.max(1, Math.floor(ROWS / n / 4));
    for (let i = 0; i < n; i += size) {
      const part = Array.from({length: Math.min(size, n - i)}, (_, j) => positions.filter((_, k) => k !== i + j));
      worths.push(...(await this.run(picture, part)).map(([, l]) => whole - logOdds(l, label)));
    }
    return worths;
  }

  async probabilities(picture, placements) { return (await this.run(picture, placements)).map(([p]) => p); }

  // [probabilities, logits] of one picture through placements of equal length.
  async run(picture, placements) {
    const {Tensor} = this.ort, [H, W] = this.about.size, B = placements.length, input = this.inputs.get(picture);
    const images = new Float32Array(B * input.length);
    for (let b = 0; b < B; b++) images.set(input, b * input.length);
    const {logits} = await this.model.run({
      images: new Tensor('float32', images, [B, 3, H, W]),
      positions: new Tensor('float32', Float32Array.from(placements.flat(2)), [B, placements[0].length, 2])});
    const C = logits.dims[1];
    return placements.map((_, b) => {
      const row = Array.from(logits.data.slice(b * C, (b + 1) * C)), most = Math.max(...row);
      const exps = row.map(l => Math.exp(l - most)), sum = exps.reduce((a, e) => a + e, 0);
      return [exps.map(e => e / sum), row];
    });
  }

  // All classes if there are few, else the first ten and that of the full budget.
  scores(probabilities, full) {
    const names = this.about.classes;
    let labels = [...names.keys()];
    if (names.length > 12) {
      labels = labels.sort((a, b) => probabilities[b] - probabilities[a]).slice(0, 10);
      const best = full.reduce((b, value, i) => value > (full[b] ?? 0) ? i : b, 0);
      if (!labels.includes(best)) labels[9] = best;
    }
    return labels.map(i => ({label: i, name: names[i], probability: probabilities[i], full: full[i] ?? 0}));
  }
}

async function pixelsOf(response) {
  const picture = await createImageBitmap(await response.blob(), {colorSpaceConversion: 'none'});
  const canvas = new OffscreenCanvas(picture.width, picture.height), pen = canvas.getContext('2d');
  pen.drawImage(picture, 0, 0);
  return pen.getImageData(0, 0, picture.width, picture.height).data;
}

function logOdds(logits, label) {
  const others = logits.filter((_, i) => i !== label), most = Math.max(...others);
  return logits[label] - most - Math.log(others.reduce((sum, l) => sum + Math.exp(l - most), 0));
}

const pairs = data => Array.from({length: data.length / 2}, (_, i) => [data[2 * i], data[2 * i + 1]]);
