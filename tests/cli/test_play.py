from __future__ import annotations

import socket
import sys

import pytest
from commands import run

from timm_spot.cli import play as module


@pytest.fixture
def served(monkeypatch):
    """What would be served, and which pages would be opened."""
    calls = dict(pages=[])

    def serve(stage, opened):
        calls.update(stage=stage, address=opened.getsockname())
        opened.close()

    monkeypatch.setattr(module, 'serve', serve)
    monkeypatch.setattr(module.webbrowser, 'open', calls['pages'].append)
    return calls


def test_the_page_is_served_and_opened(served):
    result = run('play', '--port', 0)
    host, port = served['address']
    assert result.exit_code == 0 and host == '127.0.0.1'
    assert result.output.startswith(f'http://127.0.0.1:{port}/  spot_vit_pico_patch8_64.digits_placed')
    assert served['pages'] == [f'http://127.0.0.1:{port}/']
    assert len(served['stage'].examples) == 10


def test_pictures_and_a_model_of_one_s_own(served, pictures, saved):
    result = run('play', pictures, '--model', saved, '--port', 0, '--no-browser')
    assert result.exit_code == 0 and served['pages'] == []
    assert served['stage'].describe()['examples'] == ['a.png', 'b.png'] and served['stage'].name == saved


@pytest.mark.parametrize('arguments, says', [
    (['no.png'], 'no.png is no file'),
    (['--model', 'dht_vit_pico_patch8_64'], 'this command is for subpixel ViTs'),
    (['--model', 'resnet18'], 'is no model of timm_spot'),
    (['--port', '70000'], 'port=70000 must be a whole number of at least 0 and at most 65,535'),
])
def test_mistakes_are_told_in_one_line(served, arguments, says):
    result = run('play', '--port', 0, *arguments)
    assert result.exit_code == 1 and says in result.stderr and 'Traceback' not in result.output
    assert 'stage' not in served


def test_a_port_that_is_taken_is_told(served):
    with socket.create_server(('127.0.0.1', 0)) as other:
        port = other.getsockname()[1]
        result = run('play', '--port', port)
    assert result.exit_code == 1 and f'port={port} cannot be used' in result.stderr


def test_without_the_extra_its_name_is_told(served, monkeypatch):
    monkeypatch.setitem(sys.modules, 'starlette', None)
    result = run('play', '--port', 0)
    assert result.exit_code == 1 and "pip install 'timm-spot[play]'" in result.stderr


def test_a_folder_instead_of_a_server(served, saved, tmp_path, monkeypatch):
    def write(stage, folder):
        folder.mkdir()
        (folder / 'index.html').write_bytes(bytes(2_000_000))
        return [folder / 'index.html']

    monkeypatch.setattr(module, 'write_static', write)
    result = run('play', '--model', saved, '--static', tmp_path / 'page')
    assert result.exit_code == 0 and 'stage' not in served
    assert result.output == f'{tmp_path}/page  1 files, 2 MB; python -m http.server -d {tmp_path}/page\n'
