from __future__ import annotations

import io
import json
import re
import threading

import pytest
import timm
from PIL import Image
from starlette.testclient import TestClient

from timm_spot.tasks.play import server
from timm_spot.tasks.play.stage import SHIPPED, Stage


@pytest.fixture(scope='module')
def stage():
    return Stage(timm.create_model('spot_vit_pico_patch8_64.digits_placed', pretrained=True).eval(), 'digits')


@pytest.fixture(scope='module')
def client(stage):
    return TestClient(server.create_app(stage), base_url='http://127.0.0.1')


@pytest.fixture
def key(client):
    return client.get('/api/example/0').json()['id']


def test_the_page_and_all_that_it_names_is_served(client):
    page = client.get('/')
    assert page.status_code == 200 and 'id="canvas"' in page.text
    named = re.findall(r'(?:src|href)="([^"#:]+)"', page.text)
    assert sorted(named) == ['icon.svg', 'play.css', 'play.js']
    for file in named:
        assert client.get(f'/{file}').status_code == 200
    script = client.get('/play.js').text
    for file in re.findall(r"from '\./([^']+)'", script):
        assert client.get(f'/{file}').status_code == 200


def test_the_page_fetches_nothing_from_elsewhere():
    for file in server.PAGE.iterdir():
        if file.suffix in ('.html', '.css', '.js'):
            urls = re.findall(r'https?://[^\s"\')]+', file.read_text('utf-8'))
            assert urls == [], file.name


def test_every_id_that_the_script_asks_for_is_on_the_page():
    page, script = ((server.PAGE / name).read_text('utf-8') for name in ('index.html', 'play.js'))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r"\$\('([^']+)'\)", script)) <= set(ids)
    assert set(re.findall(r'\b(?:for|aria-describedby)="([^"]+)"', page)) <= set(ids)
    for tag in re.findall(r'<(?:select|input type="(?:range|number|file)"|textarea)[^>]*>', page):  # all have a name
        name = re.search(r'\bid="([^"]+)"', tag)[1]
        assert f'for="{name}"' in page or 'aria-label=' in tag, tag


def test_answers_are_the_stage_s(client, stage, key):
    assert client.get('/api/state').json() == json.loads(json.dumps(stage.describe()))
    placed = client.post('/api/place', json=dict(picture=key, prior='density', n_tokens=9, seed=0)).json()
    assert placed == stage.place(key, 'density', 9)
    answer = client.post('/api/answer', json=dict(picture=key, positions=placed, worth=True, keep_rate=1)).json()
    assert answer == stage.answer(key, placed, worth=True)
    assert client.post('/api/density', json=dict(picture=key)).json() == stage.density(key)
    response = client.get('/api/state')
    assert response.headers['cache-control'] == 'no-store'


def test_a_search_gives_a_line_for_each_step(client, key):
    body = dict(picture=key, positions=[[0.4, 0.4], [0.6, 0.6]], objective='label', label=4, steps=2)
    lines = client.post('/api/search', json=body).text.splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step['step'] for step in steps] == [0, 1, 2]
    assert len(steps[2]['positions']) == 2 and len(steps[2]['scores']) == 10


def test_a_search_that_fails_on_the_way_says_so_in_its_last_line(client, key, monkeypatch):
    def steps(*args, **kwargs):
        yield dict(step=0)
        raise ValueError('a loss is not finite')

    monkeypatch.setattr(server, 'search_steps', steps)
    lines = client.post('/api/search', json=dict(picture=key, positions=[[0.5, 0.5]])).text.splitlines()
    assert [json.loads(line) for line in lines] == [dict(step=0), dict(error='a loss is not finite')]


def test_a_picture_of_one_s_own(client):
    body = (SHIPPED / '01_7.png').read_bytes()
    mine = client.post('/api/picture?name=mine.png', content=body).json()
    assert mine['name'] == 'mine.png' and mine['id'] == client.get('/api/example/1').json()['id']


def test_fifty_megapixels_are_read(client):
    buffer = io.BytesIO()
    Image.new('RGB', (8000, 6250), 'teal').save(buffer, 'JPEG')
    response = client.post('/api/picture?name=large.jpg', content=buffer.getvalue())
    assert response.status_code == 200 and response.json()['pixels'] == [8000, 6250]


@pytest.mark.parametrize('ask, status, says', [
    (lambda client, key: client.post('/api/picture?name=a.png', content=b'\x89PNG\r\n\x1a\nno'), 422, 'a.png is '),
    (lambda client, key: client.post('/api/picture', content=b''), 422, 'the picture is no picture'),
    (lambda client, key: client.get('/api/example/99'), 400, 'example=99'),
    (lambda client, key: client.post('/api/answer', json=dict(picture='x', positions=[[0, 0]])), 404, 'not here'),
    (lambda client, key: client.post('/api/answer', json=dict(picture=key)), 400, 'lacks positions'),
    (lambda client, key: client.post('/api/answer', content=b'{'), 400, 'no JSON'),
    (lambda client, key: client.post('/api/answer', json=[1]), 400, 'JSON object'),
    (lambda client, key: client.post('/api/answer', json=dict(picture=key, positions='a')), 400, "positions='a'"),
    (lambda client, key: client.post(
        '/api/answer', json=dict(picture=key, positions=[[0, 0]], worth=1)), 400, 'worth=1'),
    (lambda client, key: client.post(
        '/api/answer', json=dict(picture=key, positions=[[0, 0]], keep_rate=True)), 400, 'keep_rate=True'),
    (lambda client, key: client.post(
        '/api/place', json=dict(picture=key, prior='isotropic', n_tokens=True)), 400, 'n_tokens=True'),
    (lambda client, key: client.post(
        '/api/search', json=dict(picture=key, positions=[[0, 0]], objective='label')), 400, 'label=None'),
    (lambda client, key: client.post('/api/answer', json=dict(picture=key, positions=[], model='x')), 400, "model='x'"),
])
def test_mistakes_are_answered_in_words(client, key, ask, status, says):
    response = ask(client, key)
    assert response.status_code == status, response.text
    assert says in response.json()['error']


def test_too_large_a_body_is_refused(client, monkeypatch):
    monkeypatch.setattr(server, 'MAX_BYTES', 1000)
    assert client.post('/api/picture', content=bytes(1001)).status_code == 413


def test_other_names_of_the_machine_are_refused(stage):
    client = TestClient(server.create_app(stage), base_url='http://evil.example')
    assert client.get('/api/state').status_code == 400


def test_two_clients_are_answered_as_one_is(client, key, stage):
    positions = stage.place(key, 'sobol', 9)
    expected = stage.answer(key, positions)
    answers = []
    threads = [threading.Thread(target=lambda: answers.extend(
        client.post('/api/answer', json=dict(picture=key, positions=positions)).json() for _ in range(5)))
        for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == 15 * [expected]


def test_only_this_machine_is_listened_to():
    with server.listen(0) as opened:
        host, port = opened.getsockname()
        assert host == '127.0.0.1'
        with pytest.raises(OSError, match=f'port={port} cannot be used .*: choose another'):
            server.listen(port)
