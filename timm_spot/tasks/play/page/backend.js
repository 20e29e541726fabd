// What the page asks: here of the server that it came from.

export class Refused extends Error {}  // what was asked cannot be done; the message says why
export class Unknown extends Refused {}  // the picture is not there any more
export class Gone extends Error {}  // nobody answers

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw error.name === 'AbortError' ? error : new Gone('The server does not answer.');
  }
  if (response.ok) return response;
  let text = `The server says ${response.status}.`;
  try {
    text = (await response.json()).error ?? text;
  } catch { /* not in JSON: what its status says is all */ }
  throw response.status === 404 ? new Unknown(text) : new Refused(text);
}

const post = (path, body, signal) => ask(path, {
  method: 'POST', body: JSON.stringify(body), headers: {'Content-Type': 'application/json'}, signal});

export class Server {
  searches = true;
  prunes = true;

  async state() { return (await ask('api/state')).json(); }

  async example(number) { return (await ask(`api/example/${number}`)).json(); }

  async open(file, name) {
    return (await ask(`api/picture?name=${encodeURIComponent(name)}`, {method: 'POST', body: file})).json();
  }

  async place(request) { return (await post('api/place', request)).json(); }

  async answer(request) { return (await post('api/answer', request)).json(); }

  async density(picture) { return (await post('api/density', {picture})).json(); }

  // Steps as they come; the signal ends the search.
  async* search(request, signal) {
    const response = await post('api/search', request, signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = '';
    while (true) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        throw error.name === 'AbortError' ? error : new Gone('The server does not answer.');
      }
      if (part.done) return;
      const lines = (rest + part.value).split('\n');
      rest = lines.pop();
      for (const line of lines) {
        const step = JSON.parse(line);
        if (step.error) throw new Refused(step.error);
        yield step;
      }
    }
  }
}
