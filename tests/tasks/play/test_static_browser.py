"""The page without a server in a real browser. onnxruntime-web comes from npm: only where TIMM_SPOT_NETWORK is set."""
from __future__ import annotations

import json
import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from PIL import Image

from timm_spot.tasks.pictures.images import model_transform, read_picture
from timm_spot.tasks.play.stage import SHIPPED, Stage
from timm_spot.tasks.play.static import write_static

playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason='no Chromium on this machine'),
    pytest.mark.skipif('TIMM_SPOT_NETWORK' not in os.environ, reason='needs npm: set TIMM_SPOT_NETWORK')]
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking']


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope='module')
def model():
    return timm.create_model('spot_vit_pico_patch8_64.digits_placed', pretrained=True).eval()


@pytest.fixture(scope='module')
def page(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('static') / 'page'
    write_static(Stage(model, 'digits'), folder)
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    errors, asked = [], []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = browser.new_page()
        opened.on('pageerror', lambda error: errors.append(str(error)))
        address = f'http://127.0.0.1:{server.server_port}/'
        opened.on('request', lambda request: asked.append(request.url))
        opened.goto(address)
        opened.wait_for_selector('body[data-ready]', timeout=60000)
        yield opened
        browser.close()
    server.shutdown()
    server.server_close()
    assert errors == [] and all(url.startswith((address, 'data:', 'blob:')) for url in asked)


def state(page):
    return json.loads(page.input_value('#text'))


def bars(page):
    return [float(bar.get_attribute('data-probability')) for bar in page.query_selector_all('#bars li')]


def settle(page, model, picture):
    """Wait until the bars show what Python says of the placement on the page, to 1e-4."""
    image = model_transform(model)(read_picture(picture))[None]
    with torch.no_grad():
        expected = model(image, positions=torch.tensor(state(page)['positions']))[0].softmax(dim=0).tolist()
    for _ in range(100):
        if bars(page) == pytest.approx(expected, abs=1e-4):
            return
        page.wait_for_timeout(50)
    assert bars(page) == pytest.approx(expected, abs=1e-4)


def test_answers_are_python_s(page, model):
    settle(page, model, SHIPPED / '00_4.png')
    page.click('#add')
    settle(page, model, SHIPPED / '00_4.png')
    page.select_option('#prior', 'center')
    page.locator('#budget').fill('9')
    page.wait_for_function("JSON.parse(document.querySelector('#text').value).positions.length == 9")
    settle(page, model, SHIPPED / '00_4.png')
    page.select_option('#prior', 'density')
    page.wait_for_function("JSON.parse(document.querySelector('#text').value).prior == 'density'")
    page.wait_for_timeout(500)
    model.set_placement(n_tokens=9)
    image = model_transform(model)(read_picture(SHIPPED / '00_4.png'))[None]
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(state(page)['positions']), model.place(image)[0], atol=1e-5, rtol=0)
    settle(page, model, SHIPPED / '00_4.png')


def test_views_work_and_what_needs_a_server_is_not_shown(page):
    for name in ('seen', 'worth', 'density', 'windows'):
        page.check(f'input[value={name}]')
        page.wait_for_timeout(200)
    assert page.is_hidden('#searching') and page.is_hidden('#pruning')


def test_a_picture_of_one_s_own_is_read_as_python_reads_it(page, model, tmp_path):
    Image.effect_noise((170, 90), 60).convert('RGB').save(tmp_path / 'mine.png')
    page.set_input_files('#file', tmp_path / 'mine.png')
    page.wait_for_function("JSON.parse(document.querySelector('#text').value).picture == 'mine.png'")
    page.wait_for_timeout(300)
    settle(page, model, tmp_path / 'mine.png')
    (tmp_path / 'damaged.png').write_bytes(b'\x89PNG\r\n\x1a\nno')
    page.set_input_files('#file', tmp_path / 'damaged.png')
    page.wait_for_selector('#banner:not([hidden])')
    assert 'damaged.png' in page.inner_text('#banner')
