// A placement as JSON and as a link. Both hold positions (y, x), so that Python reads them: positions=json['positions'].

export const toText = saved => JSON.stringify(
  {...saved, positions: saved.positions.map(p => p.map(v => Number(v.toFixed(7))))}, null, 1)
  .replace(/\[\s+(-?[\d.e-]+),\s+(-?[\d.e-]+)\s+\]/g, '[$1, $2]');

export function fromText(text) {
  let saved;
  try {
    saved = JSON.parse(text);
  } catch {
    throw new Error('That is no JSON.');
  }
  const positions = Array.isArray(saved) ? saved : saved?.positions;
  const isPair = pair => Array.isArray(pair) && pair.length === 2 && pair.every(Number.isFinite);
  if (!Array.isArray(positions) || !positions.length || !positions.every(isPair)) {
    throw new Error('That is no placement: positions must be a list of pairs [y, x].');
  }
  return Array.isArray(saved) ? {positions} : saved;
}

export function toLink(saved) {
  const {positions, ...rest} = saved;
  const numbers = positions.flat().map(v => v.toFixed(5)).join(' ');
  return '#' + new URLSearchParams(
    [...Object.entries(rest).filter(([, v]) => v !== null && v !== undefined), ['positions', numbers]]);
}

export function fromLink(hash) {
  const fields = new URLSearchParams(hash.slice(1)), numbers = (fields.get('positions') ?? '').split(' ').map(Number);
  if (numbers.length < 2 || numbers.length % 2 || !numbers.every(Number.isFinite)) {
    throw new Error('The link holds no placement.');
  }
  const positions = [];
  for (let i = 0; i < numbers.length; i += 2) positions.push(numbers.slice(i, i + 2));
  const number = name => fields.has(name) ? Number(fields.get(name)) : null;
  return {model: fields.get('model'), prior: fields.get('prior'), example: number('example'), seed: number('seed'), positions};
}
