"""The page in a real browser: skipped where there is no Chromium or no playwright (`pip install playwright`)."""
from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import timm
import torch
from PIL import Image

from timm_spot.tasks.pictures.images import model_transform, read_picture
from timm_spot.tasks.play.stage import SHIPPED

playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='no Chromium on this machine')
FLAGS = [
    '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync']
MODEL = 'spot_vit_pico_patch8_64.digits_placed'


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as opened:
        return opened.getsockname()[1]


@contextmanager
def running(port):
    process = subprocess.Popen(
        [sys.executable, '-m', 'timm_spot.cli', 'play', '--port', str(port), '--no-browser'],
        stdout=subprocess.PIPE, text=True, env=dict(os.environ, PYTHONUNBUFFERED='1'))
    try:
        assert process.stdout.readline().startswith('http://127.0.0.1:')
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
        process.stdout.close()


@pytest.fixture(scope='module')
def address():
    port = free_port()
    with running(port):
        yield f'http://127.0.0.1:{port}/'


@pytest.fixture(scope='module')
def chromium():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, address):
    """Opens the page; in the end nothing may have gone wrong on it."""
    errors, pages = [], []

    def open_it(url=address, **settings):
        page = chromium.new_page(**settings)
        page.on('pageerror', lambda error: errors.append(str(error)))
        page.goto(url)
        page.wait_for_selector('body[data-ready]')
        pages.append(page)
        return page

    yield open_it
    for page in pages:
        page.close()
    assert errors == []


@pytest.fixture(scope='module')
def model():
    return timm.create_model(MODEL, pretrained=True).eval()


def positions(page):
    return json.loads(page.input_value('#text'))['positions']


def bars(page):
    return [float(bar.get_attribute('data-probability')) for bar in page.query_selector_all('#bars li')]


def settle(page, expected, tries=60):
    """Wait until the bars show these probabilities, to 1e-4."""
    for _ in range(tries):
        if bars(page) == pytest.approx(expected, abs=1e-4):
            return
        page.wait_for_timeout(50)
    assert bars(page) == pytest.approx(expected, abs=1e-4)


def predicted(model, placement, name='00_4.png'):
    image = model_transform(model)(read_picture(SHIPPED / name))[None]
    with torch.no_grad():
        return model(image, positions=torch.tensor(placement))[0].softmax(dim=0).tolist()


def drag(page, start, end):
    """From one position (y, x) to another."""
    box = page.locator('#canvas').bounding_box()
    (y, x), (v, u) = start, end
    page.mouse.move(box['x'] + x * box['width'], box['y'] + y * box['height'])
    page.mouse.down()
    page.mouse.move(box['x'] + u * box['width'], box['y'] + v * box['height'], steps=8)
    page.mouse.up()


def test_a_token_that_is_dragged_moves_the_bars_to_what_python_says(open_page, model):
    page = open_page()
    before = positions(page)
    settle(page, predicted(model, before))
    drag(page, before[7], (0.62, 0.47))
    after = positions(page)
    assert after[7] == pytest.approx([0.62, 0.47], abs=0.01)
    assert after[:7] + after[8:] == before[:7] + before[8:]
    settle(page, predicted(model, after))
    page.click('#undo')
    assert positions(page) == before
    settle(page, predicted(model, before))


def test_many_are_dragged_added_removed_and_moved_by_keys(open_page, model):
    page = open_page()
    before = positions(page)
    drag(page, (0.01, 0.01), (0.35, 0.35))  # a band over four
    drag(page, before[0], (before[0][0] + 0.1, before[0][1] + 0.1))
    after = positions(page)
    moved = [i for i in range(25) if after[i] != before[i]]
    assert moved == [0, 1, 5, 6]
    page.focus('#canvas')
    page.keyboard.press('Escape')
    page.keyboard.press('n')
    page.keyboard.press('ArrowRight')
    assert positions(page)[0] == pytest.approx([after[0][0], after[0][1] + 1 / 64], abs=1e-5)
    assert 'Token 1 of 25, row' in page.get_attribute('#canvas', 'aria-label')
    page.keyboard.press('Delete')
    assert len(positions(page)) == 24
    page.click('#add')
    assert positions(page)[-1] == [0.5, 0.5]
    settle(page, predicted(model, positions(page)))


def test_budget_prior_search_and_views(open_page, model):
    page = open_page()
    page.select_option('#prior', 'density')
    page.locator('#budget').fill('9')
    page.wait_for_function("JSON.parse(document.querySelector('#text').value).positions.length == 9")
    model.set_placement(n_tokens=9)
    image = model_transform(model)(read_picture(SHIPPED / '00_4.png'))[None]
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(positions(page)), model.place(image)[0], atol=1e-6, rtol=0)
    for name in ('seen', 'worth', 'density', 'windows'):
        page.check(f'input[value={name}]')
    page.select_option('#goal', 'label:4')
    page.fill('#steps', '8')
    page.click('#search')
    page.wait_for_function("document.querySelector('#at').value == '8'")
    settle(page, predicted(model, positions(page)))
    end = positions(page)
    page.locator('#step').fill('0')
    assert positions(page) != end
    page.locator('#keep').fill('0.5')
    page.wait_for_function("document.querySelector('#stages').textContent.startsWith('9 → 5 → 2 → 1')")


def test_own_pictures_good_damaged_and_large(open_page, tmp_path):
    page = open_page()
    Image.effect_noise((300, 200), 80).save(tmp_path / 'noise.png')
    (tmp_path / 'damaged.png').write_bytes((tmp_path / 'noise.png').read_bytes()[:3000])
    Image.new('RGB', (8000, 6250), 'teal').save(tmp_path / 'large.jpg')
    page.set_input_files('#file', tmp_path / 'damaged.png')
    page.wait_for_selector('#banner:not([hidden])')
    assert 'damaged.png' in page.inner_text('#banner')
    page.set_input_files('#file', tmp_path / 'noise.png')
    page.wait_for_selector('#foreign:not([hidden])')
    assert page.is_hidden('#banner')
    page.set_input_files('#file', tmp_path / 'large.jpg')
    page.wait_for_function("JSON.parse(document.querySelector('#text').value).picture == 'large.jpg'", timeout=30000)


def test_a_link_restores_the_placement_for_a_second_client(open_page, address, model):
    page = open_page()
    page.click('#examples button >> nth=2')
    page.wait_for_function("JSON.parse(document.querySelector('#text').value).picture == '02_2.png'")
    drag(page, positions(page)[12], (0.31, 0.72))
    page.click('#link')
    other = open_page(page.url)
    expected = torch.tensor(positions(page))
    torch.testing.assert_close(torch.tensor(positions(other)), expected, atol=1e-5, rtol=0)
    settle(other, predicted(model, positions(other), '02_2.png'))


def test_a_server_that_goes_away_is_waited_for(chromium, model):
    port = free_port()
    with running(port):
        page = chromium.new_page()
        page.goto(f'http://127.0.0.1:{port}/')
        page.wait_for_selector('#examples button >> nth=9')
        page.wait_for_timeout(300)
    drag(page, positions(page)[3], (0.5, 0.5))
    page.wait_for_selector('#banner:not([hidden])')
    assert 'does not answer' in page.inner_text('#banner')
    time.sleep(0.5)
    with running(port):  # it has never seen the picture
        page.wait_for_selector('#banner', state='hidden', timeout=20000)
        settle(page, predicted(model, positions(page)))
        page.close()


@pytest.mark.parametrize('width', [360, 1280])
def test_nothing_is_wider_than_the_page(open_page, width):
    page = open_page(viewport=dict(width=width, height=740), has_touch=True)
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    for button in page.query_selector_all('button:visible, select:visible'):
        assert button.bounding_box()['height'] >= 32


def test_a_finger_drags(open_page, model):
    page = open_page(viewport=dict(width=390, height=844), has_touch=True, is_mobile=True)
    box, before = page.locator('#canvas').bounding_box(), positions(page)

    def touch(kind, y, x):
        points = [] if kind == 'touchEnd' else [dict(x=box['x'] + x * box['width'], y=box['y'] + y * box['height'])]
        session.send('Input.dispatchTouchEvent', dict(type=kind, touchPoints=points))

    session = page.context.new_cdp_session(page)
    touch('touchStart', *before[12])
    for share in (0.25, 0.5, 0.75, 1.):
        touch('touchMove', before[12][0] + 0.15 * share, before[12][1])
    touch('touchEnd', 0, 0)
    assert positions(page)[12] == pytest.approx([before[12][0] + 0.15, before[12][1]], abs=0.02)
    settle(page, predicted(model, positions(page)))


def test_pictures_are_dropped_and_pasted(open_page):
    page = open_page()
    data = list((SHIPPED / '05_5.png').read_bytes())
    for kind, name in (('drop', 'dropped.png'), ('paste', 'pasted.png')):
        page.evaluate("""([kind, name, data]) => {
            const carried = new DataTransfer();
            carried.items.add(new File([new Uint8Array(data)], name, {type: 'image/png'}));
            dispatchEvent(kind === 'drop' ? new DragEvent('drop', {dataTransfer: carried, cancelable: true})
                : new ClipboardEvent('paste', {clipboardData: carried}));
        }""", [kind, name, data])
        page.wait_for_function(f"JSON.parse(document.querySelector('#text').value).picture == '{name}'")
    assert page.is_hidden('#foreign')


def test_what_is_saved_can_be_opened_again(open_page, tmp_path):
    page = open_page()
    drag(page, positions(page)[12], (0.21, 0.77))
    with page.expect_download() as saved:
        page.click('#json')
    saved.value.save_as(tmp_path / 'placement.json')
    kept = json.loads((tmp_path / 'placement.json').read_text())
    assert kept['model'] == MODEL and kept['positions'] == positions(page)
    with page.expect_download() as saved:
        page.click('#png')
    saved.value.save_as(tmp_path / 'placement.png')
    with Image.open(tmp_path / 'placement.png') as picture:
        assert picture.width == picture.height >= 300 and len(picture.getcolors(1 << 24)) > 50
    page.click('#undo')
    assert positions(page) != kept['positions']
    page.set_input_files('#open-json', tmp_path / 'placement.json')
    first = kept['positions'][12][0]
    page.wait_for_function(f"JSON.parse(document.querySelector('#text').value).positions[12][0] == {first}")
    assert positions(page) == kept['positions']
    (tmp_path / 'wrong.json').write_text('{"positions": [[1]]}')
    page.set_input_files('#open-json', tmp_path / 'wrong.json')
    page.wait_for_selector('#banner:not([hidden])')
    assert 'pairs [y, x]' in page.inner_text('#banner') and positions(page) == kept['positions']


def test_the_placement_is_edited_as_text(open_page, model):
    page = open_page()
    page.click('summary >> text=The placement as text')
    page.fill('#text', '[[0.25, 0.5], [0.6, 0.4]]')
    page.click('#apply')
    page.wait_for_function("document.querySelector('#count').textContent == '2'")
    settle(page, predicted(model, [[0.25, 0.5], [0.6, 0.4]]))
    page.click('#theme')
    assert page.evaluate('document.documentElement.dataset.theme') == 'dark'
