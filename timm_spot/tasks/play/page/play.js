// The page: what is placed and chosen, what was done before, and the controls. Drawing is view.js, asking backend.js.
import {Gone, Refused, Server, Unknown} from './backend.js';
import {View} from './view.js';
import {fromLink, fromText, toLink, toText} from './share.js';

const $ = id => document.getElementById(id);
const percent = p => `${(100 * p).toFixed(p > 0.9995 || p < 0.0005 ? 2 : 1)} %`;
const short = name => name.split(',')[0];  // of ImageNet's classes, which list synonyms
const PAUSE = 1500;  // milliseconds before a server that has gone is asked again

const backend = await (async () => {
  const source = document.documentElement.dataset.backend;
  return source ? new (await import(source)).Files() : new Server();
})();
const view = new View($('canvas'));
const state = {
  picture: null,  // as the server describes it
  file: null,  // what it was read from: the number of an example, or a file
  positions: [], chosen: new Set(), prior: '', seed: 0, view: 'windows', keep: 1,
  answer: null, density: null, trajectory: null, band: null};
let model = null, past = [], future = [], drag = null;

// ---------------------------------------------------------------------------------------------------------------------
// Asking: one request at a time, the newest wins; a server that has gone is waited for

let asking = false, again = false;

async function refresh() {
  showShare();
  draw();
  if (asking) { again = true; return; }
  asking = true;
  do {
    again = false;
    if (!state.picture || !state.positions.length) break;
    const began = performance.now(), positions = state.positions;
    const answer = await reach(() => backend.answer({
      picture: state.picture.id, positions, keep_rate: state.keep, worth: state.view === 'worth' && !drag}));  // that takes a pass for each token
    if (answer && positions.length === state.positions.length) {
      state.answer = answer;
      $('latency').textContent = `answered in ${Math.round(performance.now() - began)} ms`;
      showAnswer();
      draw();
    }
  } while (again);
  asking = false;
}

// What `work` gives, once there is someone to do it; undefined where it was refused, in words on the page.
async function reach(work) {
  while (true) {
    try {
      const result = await work();
      if (gone) hush();
      return result;
    } catch (error) {
      if (error.name === 'AbortError') return undefined;
      if (error instanceof Unknown && state.file !== null) {  // another server, or it has forgotten
        const shown = await showAgain();
        if (shown) continue;
        return undefined;
      }
      if (error instanceof Gone) {
        say('The server does not answer: start timm-spot play again, the page goes on by itself.');
        gone = true;
        await new Promise(resolve => setTimeout(resolve, PAUSE));
        continue;
      }
      if (!(error instanceof Refused)) throw error;
      say(error.message);
      return undefined;
    }
  }
}

async function showAgain() {
  try {
    const shown = await read(state.file);
    if (shown.id !== state.picture?.id) state.picture = shown;
    return true;
  } catch (error) {
    say(error.message);
    return error instanceof Gone;
  }
}

const read = file => typeof file === 'number' ? backend.example(file) : backend.open(file, file.name || 'the picture');

let gone = false;

function say(text) {
  $('banner').textContent = text;
  $('banner').hidden = false;
}

function hush() {
  $('banner').hidden = true;
  gone = false;
}

// ---------------------------------------------------------------------------------------------------------------------
// Pictures

let opened = 0;  // as `placed`

async function show(file, {place = true} = {}) {
  stopSearch();
  const mine = ++opened;
  const late = setTimeout(() => cover('Reading the picture'), 300);
  const picture = await reach(() => read(file));
  clearTimeout(late);
  cover('');
  if (!picture || mine !== opened) return false;
  hush();
  const image = new Image();
  image.src = picture.picture;
  await image.decode();
  Object.assign(state, {picture, file, density: null, answer: null});
  view.image = image;
  forget();
  $('foreign').hidden = !picture.foreign;
  $('foreign').textContent = 'This model reads digits on small canvases; this is no such picture, whatever it answers.';
  document.querySelectorAll('#examples button').forEach((button, i) => button.setAttribute('aria-pressed', i === file));
  const best = picture.full.reduce((a, b) => a.full > b.full ? a : b);
  $('full-budget').textContent = `${model.full_budget} even tokens: ${short(best.name)} ${percent(best.full)}`;
  if (place || !state.positions.length) await placeAnew(false);
  else refresh();
  if (state.view === 'density') await loadDensity();
  return true;
}

function cover(text) {
  $('drop').textContent = text;
  $('drop').hidden = !text;
}

async function loadExamples() {
  for (const [i, name] of model.examples.entries()) {
    const button = document.createElement('button'), image = document.createElement('img');
    button.type = 'button';
    button.title = name;
    button.setAttribute('aria-label', `Picture ${name}`);
    button.setAttribute('aria-pressed', i === state.file);
    button.append(image);
    button.addEventListener('click', () => show(i));
    $('examples').append(button);
    image.alt = '';
    const shown = await reach(() => backend.example(i));
    if (shown) image.src = shown.picture;
    else button.remove();
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Placements, and what was done before

function remember() {
  past.push({positions: state.positions, prior: state.prior, seed: state.seed});
  if (past.length > 200) past.shift();
  future = [];
  showHistory();
}

function step(from, to) {
  if (!from.length) return;
  stopSearch();
  to.push({positions: state.positions, prior: state.prior, seed: state.seed});
  const {positions, prior, seed} = from.pop();
  Object.assign(state, {positions, prior, seed, chosen: new Set()});
  forget();
  showControls();
  showHistory();
  refresh();
}

function forget() {
  Object.assign(state, {trajectory: null});
  $('replay').hidden = true;
  $('found').textContent = '';
}

function showHistory() {
  $('undo').disabled = !past.length;
  $('redo').disabled = !future.length;
}

let placed = 0;  // counts what was asked for: an answer that another one has overtaken is of no use

async function placeAnew(keep = true) {
  stopSearch();
  const mine = ++placed;
  const positions = await reach(() => backend.place({
    picture: state.picture.id, prior: state.prior, n_tokens: Number($('budget').value), seed: state.seed}));
  if (mine !== placed) return;
  if (!positions) return showControls();
  if (keep) remember();
  state.chosen = new Set();
  set(positions);
}

// Every change of the placement comes by here.
function set(positions) {
  if (!gone) hush();
  state.positions = positions;
  forget();
  showControls();
  refresh();
}

const inside = ([y, x]) => [Math.min(1, Math.max(0, y)), Math.min(1, Math.max(0, x))];

function addToken(position) {
  if (state.positions.length >= model.max_tokens) return say(`There are ${model.max_tokens} tokens at most.`);
  stopSearch();
  remember();
  state.chosen = new Set([state.positions.length]);
  set([...state.positions, inside(position)]);
  tell();
}

function removeChosen() {
  const chosen = state.chosen.size ? state.chosen : new Set([state.positions.length - 1]);
  if (chosen.size >= state.positions.length) return say('One token has to stay.');
  stopSearch();
  remember();
  state.chosen = new Set();
  set(state.positions.filter((_, i) => !chosen.has(i)));
}

function move(dy, dx, origin = state.positions) {
  set(origin.map((position, i) => state.chosen.has(i) ? inside([position[0] + dy, position[1] + dx]) : position));
}

// ---------------------------------------------------------------------------------------------------------------------
// What is seen of it

function draw() {
  const {positions, chosen, answer, trajectory} = state;
  view.draw({
    positions, chosen, view: state.view, density: state.density, band: state.band,
    worth: answer?.worth?.length === positions.length ? answer.worth : null,
    kept: answer?.kept?.length === positions.length ? answer.kept : null, stages: answer?.stages ?? [],
    paths: trajectory && trajectory.steps.slice(0, trajectory.at + 1).map(s => s.positions)});
}

function showAnswer() {
  const {scores} = state.answer;
  const best = scores.reduce((a, b) => a.probability > b.probability ? a : b);
  const rows = model.classes.length <= 12 ? scores : [...scores].sort((a, b) => b.probability - a.probability);
  const list = $('bars');
  while (list.children.length > rows.length) list.lastChild.remove();
  rows.forEach((score, i) => {
    const row = list.children[i] ?? list.appendChild(newBar());
    row.classList.toggle('first', score.label === best.label);
    row.dataset.label = score.label;
    row.dataset.name = score.name;
    row.dataset.probability = score.probability;
    row.dataset.full = score.full;
    row.querySelector('.name').textContent = short(score.name);
    row.querySelector('.name').title = score.name;
    row.querySelector('.fill').style.transform = `scaleX(${score.probability})`;
    row.querySelector('.mark').style.left = `${100 * score.full}%`;
    row.querySelector('.share').textContent = percent(score.probability);
  });
  const headline = `${short(best.name)} · ${percent(best.probability)}`;
  if ($('headline').textContent !== headline) $('headline').textContent = headline;
  const points = 100 * (best.probability - best.full);
  $('difference').textContent = `${points >= 0 ? '+' : '−'}${Math.abs(points).toFixed(1)} points of ${short(best.name)} beside `
    + `the full budget, with ${state.positions.length} of ${model.full_budget} tokens`;
  $('stages').textContent = state.answer.stages
    ? `${[state.positions.length, ...state.answer.stages].join(' → ')} tokens; numbers say at which stage one falls` : '';
}

function newBar() {
  const row = document.createElement('li');
  for (const [tag, name, parent] of [['span', 'name'], ['span', 'track'], ['span', 'fill', '.track'],
    ['span', 'mark', '.track'], ['span', 'share']]) {
    const part = document.createElement(tag);
    part.className = name;
    (parent ? row.querySelector(parent) : row).append(part);
  }
  return row;
}

function showShare() {
  if (!model) return;
  $('seen-share').textContent =
    `${state.positions.length} tokens read ${Math.round(100 * view.share(state.positions))} % of the pixels`;
}

function showControls() {
  $('budget').value = String(state.positions.length);
  $('count').textContent = String(state.positions.length);
  $('prior').value = state.prior;
  $('again').textContent = model.priors.find(p => p.name === state.prior)?.drawn ? 'Draw anew' : 'Place';
  $('remove').disabled = state.positions.length < 2;
  if (document.activeElement !== $('text')) $('text').value = toText(snapshot());
}

const LEGENDS = {
  windows: '', seen: 'Grey is what no token reads.', density: 'Where the learned placer looks: the brighter, the closer tokens lie.',
  worth: 'What the log-odds of the first class lose without a token: discs speak for it, rings against it.'};

async function choose(name) {
  state.view = name;
  document.querySelector(`input[name="view"][value="${name}"]`).checked = true;
  $('legend').textContent = LEGENDS[name];
  if (name === 'density') await loadDensity();
  refresh();
}

async function loadDensity() {
  if (!state.density) state.density = await reach(() => backend.density(state.picture.id));
  draw();
}

// Say to a screen reader where the chosen token lies.
function tell() {
  const [i] = state.chosen;
  const text = i === undefined ? 'Picture with its tokens' : `Token ${i + 1} of ${state.positions.length}, row `
    + `${(state.positions[i][0] * view.size[0]).toFixed(2)}, column ${(state.positions[i][1] * view.size[1]).toFixed(2)}`;
  $('canvas').setAttribute('aria-label', text);
}

// ---------------------------------------------------------------------------------------------------------------------
// Pointer and keys

$('canvas').addEventListener('pointerdown', event => {
  if (event.button || !state.picture) return;
  const i = view.hit(event, state.positions);
  if (i < 0) {
    if (!event.shiftKey) state.chosen = new Set();
    if (event.pointerType === 'mouse') {
      drag = {band: true, from: event};
      $('canvas').setPointerCapture(event.pointerId);
    }
  } else {
    if (event.shiftKey) state.chosen.has(i) ? state.chosen.delete(i) : state.chosen.add(i);
    else if (!state.chosen.has(i)) state.chosen = new Set([i]);
    drag = {start: view.position(event), origin: state.positions, moved: false};
    $('canvas').setPointerCapture(event.pointerId);
  }
  tell();
  draw();
});

$('canvas').addEventListener('pointermove', event => {
  if (!drag) {
    $('canvas').style.cursor = view.size && view.hit(event, state.positions) >= 0 ? 'grab' : 'crosshair';
    return;
  }
  if (drag.band) {
    const frame = $('canvas').getBoundingClientRect(), css = $('canvas').width / frame.width;
    const xs = [drag.from.clientX, event.clientX].map(x => (x - frame.left) * css).sort((a, b) => a - b);
    const ys = [drag.from.clientY, event.clientY].map(y => (y - frame.top) * css).sort((a, b) => a - b);
    state.band = {x: xs[0], y: ys[0], w: xs[1] - xs[0], h: ys[1] - ys[0]};
    state.chosen = new Set(state.positions.flatMap((position, i) => {
      const {cx, cy} = view.box(position);
      return cx >= xs[0] && cx <= xs[1] && cy >= ys[0] && cy <= ys[1] ? [i] : [];
    }));
    return draw();
  }
  const [y, x] = view.position(event);
  const dy = y - drag.start[0], dx = x - drag.start[1];
  if (!drag.moved && (dy || dx)) {
    stopSearch();
    remember();
    drag.moved = true;
  }
  move(dy, dx, drag.origin);
});

for (const name of ['pointerup', 'pointercancel']) {
  $('canvas').addEventListener(name, () => {
    const moved = drag?.moved;
    drag = null;
    state.band = null;
    if (model) tell();
    if (moved && state.view === 'worth') refresh();
    else draw();
  });
}

// A finger on a token drags it, anywhere else it scrolls the page.
$('canvas').addEventListener('touchstart', event => {
  const touch = event.changedTouches[0];
  if (view.hit({clientX: touch.clientX, clientY: touch.clientY, pointerType: 'touch'}, state.positions) >= 0) {
    event.preventDefault();
  }
}, {passive: false});

$('canvas').addEventListener('dblclick', event => {
  if (view.hit({...point(event), pointerType: 'mouse'}, state.positions) < 0) addToken(view.position(event));
});
const point = ({clientX, clientY}) => ({clientX, clientY});

const ARROWS = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
let held = false;  // one step back undoes all that a key did while it was held

$('canvas').addEventListener('keydown', event => {
  const {key, shiftKey, ctrlKey, metaKey} = event, n = state.positions.length;
  if (ctrlKey || metaKey) {
    if (key === 'a') state.chosen = new Set(state.positions.keys());
    else return;
  } else if (key in ARROWS && state.chosen.size) {
    const [dy, dx] = ARROWS[key].map((d, axis) => d * (shiftKey ? 0.25 : 1) / view.size[axis]);
    stopSearch();
    if (!held) remember();
    held = true;
    move(dy, dx);
  } else if (key === 'n' || key === 'p') {
    const [i = key === 'n' ? -1 : 0] = state.chosen;
    state.chosen = new Set([(i + (key === 'n' ? 1 : n - 1)) % n]);
  } else if (key === 'a') addToken([0.5, 0.5]);
  else if (key === 'Delete' || key === 'Backspace') removeChosen();
  else if (key === 'Escape') state.chosen = new Set();
  else return;
  event.preventDefault();
  tell();
  draw();
});
$('canvas').addEventListener('keyup', () => { held = false; });

addEventListener('keydown', event => {
  if (!(event.ctrlKey || event.metaKey) || event.target.matches('textarea, input[type="number"]')) return;
  if (event.key === 'z' && !event.shiftKey) step(past, future);
  else if (event.key === 'y' || (event.key === 'z' && event.shiftKey) || event.key === 'Z') step(future, past);
  else return;
  event.preventDefault();
});

// ---------------------------------------------------------------------------------------------------------------------
// The search

let stopping = null;

function stopSearch() {
  stopping?.abort();
  stopping = null;
  $('search').textContent = 'Search';
}

async function search() {
  if (stopping) return stopSearch();
  const goal = $('goal').value, label = goal.startsWith('label:') ? Number(goal.slice(6)) : null;
  const signal = (stopping = new AbortController()).signal;
  $('search').textContent = 'Stop';
  remember();
  const steps = [];
  state.chosen = new Set();
  await reach(async () => {
    const request = {
      picture: state.picture.id, positions: state.positions, objective: label === null ? goal : 'label', label,
      steps: Number($('steps').value)};
    for await (const found of backend.search(request, signal)) {
      if (signal.aborted) return;
      steps.push(found);
      state.trajectory = {steps, at: steps.length - 1};
      showStep(found);
    }
  });
  if (signal.aborted) return;
  stopSearch();
  refresh();  // what the steps leave out: worth, pruning
}

function showStep({step: at, positions, loss, scores}) {
  Object.assign(state, {positions, answer: {scores}});
  const {steps} = state.trajectory;
  $('replay').hidden = false;
  $('step').max = String(steps.length - 1);
  $('step').value = $('at').textContent = String(at);
  $('found').textContent = `loss ${steps[0].loss.toFixed(3)} → ${loss.toFixed(3)}`;
  showControls();
  showShare();
  showAnswer();
  draw();
}

$('step').addEventListener('input', () => {
  const {trajectory} = state;
  trajectory.at = Number($('step').value);
  showStep(trajectory.steps[trajectory.at]);
  refresh();
});

// ---------------------------------------------------------------------------------------------------------------------
// Sharing

const snapshot = () => ({
  model: model.model, picture: state.picture?.name, example: typeof state.file === 'number' ? state.file : null,
  prior: state.prior, seed: state.seed, positions: state.positions});

async function restore(saved) {
  const example = saved.example;
  if (typeof example === 'number' && example !== state.file && example < model.examples.length) {
    if (!await show(example, {place: false})) return;
  }
  if (saved.positions.length > model.max_tokens) return say(`There are ${model.max_tokens} tokens at most.`);
  stopSearch();
  remember();
  state.chosen = new Set();
  Object.assign(state, {
    prior: model.priors.some(p => p.name === saved.prior) ? saved.prior : state.prior, seed: saved.seed ?? 0});
  set(saved.positions.map(inside));
  $('shared').textContent = saved.model && saved.model !== model.model ? `That was made with ${saved.model}.` : '';
}

function tryRestore(read) {
  try {
    return restore(read());
  } catch (error) {
    say(error.message);
  }
}

function save(blob, name) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

$('link').addEventListener('click', async () => {
  history.replaceState(null, '', toLink(snapshot()));
  const own = typeof state.file !== 'number';
  try {
    await navigator.clipboard.writeText(location.href);
    $('shared').textContent = 'The link is copied.';
  } catch {
    $('shared').textContent = 'The link is in the address bar.';
  }
  if (own) $('shared').textContent += ' Your own picture stays here: the link has the placement alone.';
});
$('json').addEventListener('click', () => save(
  new Blob([toText(snapshot())], {type: 'application/json'}), 'placement.json'));
$('png').addEventListener('click', () => $('canvas').toBlob(blob => save(blob, 'placement.png')));
$('apply').addEventListener('click', () => tryRestore(() => fromText($('text').value)));
$('open-json').addEventListener('change', async event => {
  const [file] = event.target.files;
  if (file) { const text = await file.text(); await tryRestore(() => fromText(text)); }
  event.target.value = '';
});
addEventListener('hashchange', () => { if (location.hash.length > 1) tryRestore(() => fromLink(location.hash)); });

// ---------------------------------------------------------------------------------------------------------------------
// The other controls

async function open(file) {
  if (file.name?.endsWith('.json')) { const text = await file.text(); return tryRestore(() => fromText(text)); }
  return show(file);
}

$('file').addEventListener('change', event => {
  const [file] = event.target.files;
  if (file) open(file);
  event.target.value = '';
});
addEventListener('paste', event => {
  const [file] = event.clipboardData.files;
  if (file) open(file);
});
for (const [name, shown] of [['dragover', true], ['dragleave', false], ['drop', false]]) {
  addEventListener(name, event => {
    event.preventDefault();
    cover(shown ? 'Drop a picture' : '');
    if (name === 'drop' && event.dataTransfer.files.length) open(event.dataTransfer.files[0]);
  });
}

let sliding = false, busy = false, more = false;
$('budget').addEventListener('input', async () => {
  $('count').textContent = $('budget').value;
  if (busy) { more = true; return; }  // the newest wins
  busy = true;
  if (!sliding) remember();
  sliding = true;  // one step back undoes all that the slider did while it was held
  do {
    more = false;
    await placeAnew(false);
  } while (more);
  busy = false;
});
$('budget').addEventListener('change', () => { sliding = false; });

$('prior').addEventListener('change', () => { state.prior = $('prior').value; state.seed = 0; placeAnew(); });
$('again').addEventListener('click', () => {
  if (model.priors.find(p => p.name === state.prior)?.drawn) state.seed += 1;
  placeAnew();
});
$('add').addEventListener('click', () => addToken([0.5, 0.5]));
$('remove').addEventListener('click', removeChosen);
$('undo').addEventListener('click', () => step(past, future));
$('redo').addEventListener('click', () => step(future, past));
$('search').addEventListener('click', search);
$('keep').addEventListener('input', () => {
  state.keep = Number($('keep').value);
  $('rate').textContent = $('keep').value;
  refresh();
});
$('views').addEventListener('change', event => choose(event.target.value));
$('theme').addEventListener('click', () => {
  const root = document.documentElement.dataset;
  const dark = (root.theme ?? (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')) === 'dark';
  root.theme = dark ? 'light' : 'dark';
});
new ResizeObserver(() => { view.resize(); draw(); }).observe($('canvas'));

// ---------------------------------------------------------------------------------------------------------------------

function fill(select, options) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
}

async function start() {
  model = await reach(() => backend.state());
  view.setModel(model);
  $('model').textContent = model.model;
  $('budget').max = String(model.max_tokens);
  $('budget').value = String(model.n_tokens);
  $('density-view').hidden = !model.density;
  $('searching').hidden = !backend.searches;
  $('pruning').hidden = !backend.prunes;
  fill($('prior'), model.priors.map(p => [
    p.name, p.about === 'learned placer' ? `${p.name} (learned)` : p.name.replace('/', ' by ').replaceAll('_', ' ')]));
  fill($('goal'), [
    ['entropy', 'a sure prediction, no label'], ['teacher', 'the prediction of the full budget, no label'],
    ...model.classes.map((name, i) => [`label:${i}`, `class ${short(name)}`])]);
  state.prior = model.priors.find(p => p.name === 'isotropic')?.name ?? model.priors[0].name;
  const linked = location.hash.length > 1 ? location.hash : null;
  await show(0);
  if (linked) await tryRestore(() => fromLink(linked));
  document.body.dataset.ready = 'true';
  await loadExamples();
}

start();
