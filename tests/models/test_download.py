"""Downloads by the real client of the Hub from a server on the loopback: checked on every way, and failures named."""
from __future__ import annotations

import functools
import http.server
import io
import threading
import time
import zlib

import pytest
import timm
import torch
from conftest import random_vit
from hub_server import Client, HubServer
from safetensors.torch import save, save_file
from timm.models import PretrainedCfg, save_for_hf

from timm_spot.models import download
from timm_spot.models.download import check_source, find_in_folder

TINY = dict(depth=4, img_size=64, num_classes=3)


@pytest.fixture(scope='module')
def server():
    server = HubServer()
    yield server
    server.close()


@pytest.fixture(scope='module')
def client(server, tmp_path_factory):
    client = Client(server, tmp_path_factory.mktemp('hf_home'))
    yield client
    client.close()


@pytest.fixture(scope='module')
def vit_files(tmp_path_factory):
    """config.json of a small timm ViT, and its weights as a dict."""
    folder = tmp_path_factory.mktemp('vit')
    vit = random_vit('vit_tiny_patch16_224', **TINY)
    save_for_hf(vit, str(folder), safe_serialization=True)
    return (folder / 'config.json').read_bytes(), vit.state_dict()


@pytest.fixture
def repo(server, vit_files, request):
    """A repository with the ViT, whose name and bytes are the test's own: the cache would share an equal file."""
    number = zlib.crc32(request.node.name.encode())
    name = f'lab/vit_{number}'
    config, weights = vit_files
    weights = dict(weights, cls_token=weights['cls_token'] + number % 10_007 / 10_007)
    server.repos[name] = dict(main={'config.json': config, 'model.safetensors': save(weights)})
    yield name
    server.damaged.clear()
    server.drops.clear()
    server.failing.clear()


def to_pickle(server, repo, name='pytorch_model.bin'):
    """Keep the weights of a repository as a file of torch.save only."""
    from safetensors.torch import load

    files = server.repos[repo]['main']
    buffer = io.BytesIO()
    torch.save(load(files.pop('model.safetensors')), buffer)
    files[name] = buffer.getvalue()


# Every way in which a repository with a ViT of timm's own is used.
WAYS = {
    'retrofit': "model = timm_spot.retrofit('hf-hub:' + REPO, pretrained=True)",
    'sparsify': "model = timm_spot.sparsify('hf-hub:' + REPO, pretrained=True)",
    'backbone': "model = timm.create_model('spot_retrofit', backbone='hf-hub:' + REPO, pretrained=True)",
    'pruned backbone': (
        "model = timm.create_model('relevance_vit', backbone='hf-hub:' + REPO, pretrained=True, scorer='norm')"),
    'commands': "from timm_spot.cli.common import create_any_model\nmodel = create_any_model('hf-hub:' + REPO)",
    'saliency': (
        "from timm_spot.tasks.pictures.saliency_maps import saliency_source\n"
        "model = timm.create_model('spot_vit_pico_patch8_64', depth=1)\n"
        "saliency_source('attention:hf-hub:' + REPO, model, None)"),
    'convert': "import tempfile\nconvert(REPO, tempfile.mkdtemp())\nmodel = timm_spot.retrofit('vit_tiny_patch16_224')",
}


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('file', ['model.safetensors', 'pytorch_model.bin'])
def test_altered_weights_are_refused_by_every_way(client, server, repo, way, file):
    if file == 'pytorch_model.bin':
        to_pickle(server, repo)
    server.damaged.add(file)
    reply = client(WAYS[way], REPO=repo)
    assert reply.get('error') == 'OSError', reply
    assert f'{file} of {repo} arrived damaged: its checksum is ' in reply['message']
    server.damaged.clear()
    # It was thrown away, so it comes anew.
    assert client(f'{WAYS[way]}\nresult = type(model).__name__', REPO=repo).get('result')


@pytest.mark.parametrize('way', ['retrofit', 'commands', 'convert'])
def test_an_altered_config_is_refused(client, server, repo, way):
    server.damaged.add('config.json')
    reply = client(WAYS[way], REPO=repo)
    assert reply.get('error') == 'OSError' and f'config.json of {repo} arrived damaged' in reply['message']


def test_an_altered_file_named_by_the_config_is_refused(client, server, repo):
    to_pickle(server, repo, 'open_clip_pytorch_model.bin')
    code = ("from timm_spot.models.loading import create_checked\n"
            "model = create_checked('hf-hub:' + REPO, pretrained=True,"
            " pretrained_cfg_overlay=dict(hf_hub_filename='open_clip_pytorch_model.bin'))\n"
            "result = model.pretrained_cfg['hf_hub_id']")
    server.damaged.add('open_clip_pytorch_model.bin')
    reply = client(code, REPO=repo)
    assert reply.get('error') == 'OSError' and 'open_clip_pytorch_model.bin of' in reply['message']
    server.damaged.clear()
    assert client(code, REPO=repo) == dict(result=repo)


def test_copies_in_the_cache_are_compared_too(server, repo, tmp_path):
    client = Client(server, tmp_path, HF_HUB_DISABLE_SYMLINKS='1')
    try:
        server.damaged.add('model.safetensors')
        reply = client(WAYS['retrofit'], REPO=repo)
        assert reply.get('error') == 'OSError' and 'arrived damaged' in reply['message']
        server.damaged.clear()
        assert client(WAYS['retrofit'] + "\nresult = model.pretrained_cfg['hf_hub_id']", REPO=repo) == dict(result=repo)
    finally:
        client.close()


def test_weights_that_are_damaged_before_they_were_uploaded_are_named_with_their_repository(client, server, repo):
    server.repos[repo]['main']['model.safetensors'] = b'\0' * 100 + repo.encode()
    reply = client(WAYS['retrofit'], REPO=repo)
    assert reply['error'] == 'ValueError'
    assert f'model.safetensors of {repo} on the Hugging Face Hub cannot be used: ' in reply['message']
    assert 'no intact safetensors file' in reply['message']


def test_a_pickle_with_foreign_code_is_not_run(client, server, repo, tmp_path):
    to_pickle(server, repo)
    command = f'touch {tmp_path}/exploded'.encode()
    server.repos[repo]['main']['pytorch_model.bin'] = (
        b'\x80\x02cposix\nsystem\nX' + len(command).to_bytes(4, 'little') + command + b'\x85R.')
    reply = client(WAYS['retrofit'], REPO=repo)
    assert reply['error'] == 'ValueError' and 'posix.system' in reply['message']
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('way', ['retrofit', 'backbone', 'commands', 'convert'])
def test_what_is_not_there_is_named_with_the_remedy(client, server, repo, way):
    del server.repos[repo]['main']['model.safetensors']
    reply = client(WAYS[way], REPO=repo)
    assert reply['error'] == 'FileNotFoundError'
    assert f'{repo} on the Hugging Face Hub has no model.safetensors or pytorch_model.bin' in reply['message']
    assert '--weights FILE' in reply['message']
    reply = client(WAYS[way], REPO='lab/nothing')
    assert reply['error'] == 'FileNotFoundError' and 'config.json of lab/nothing' in reply['message']
    assert 'no such repository, or it is private or gated' in reply['message']
    reply = client(WAYS[way], REPO=f'{repo}@v9')
    assert reply['error'] == 'FileNotFoundError' and 'no such revision' in reply['message']


def test_a_hub_in_trouble_is_named(client, server, repo):
    server.failing.add('model.safetensors')
    # The client's pauses between its tries add nothing to this test.
    client('import time; sleep, time.sleep = time.sleep, lambda s: None')
    reply = client(WAYS['retrofit'], REPO=repo)
    client('time.sleep = sleep')
    assert reply['error'] == 'OSError' and f'model.safetensors of {repo}: the download' in reply['message']


@pytest.mark.parametrize('kind', ['offline', 'no connection'])
def test_without_a_connection_the_cache_serves_and_nothing_is_waited_for(server, vit_files, tmp_path, kind):
    config, weights = vit_files
    server.repos['lab/cached'] = dict(main={'config.json': config, 'model.safetensors': save(weights)})
    server.repos['lab/pickled'] = dict(main={'config.json': config, 'model.safetensors': save(weights)})
    to_pickle(server, 'lab/pickled')
    code = WAYS['retrofit'] + "\nresult = model.pretrained_cfg['hf_hub_id']"
    client = Client(server, tmp_path)
    for repo in ('lab/cached', 'lab/pickled'):
        assert client(code, REPO=repo) == dict(result=repo)
    client.close()

    gone = HubServer()
    gone.close()  # nobody listens at its address any more
    client = Client(gone, tmp_path, **(dict(HF_HUB_OFFLINE='1') if kind == 'offline' else {}))
    try:
        for repo in ('lab/cached', 'lab/pickled'):
            assert client(code, REPO=repo) == dict(result=repo)
        begin = time.monotonic()
        reply = client(code, REPO='lab/never_seen')
        assert reply['error'] == 'ConnectionError'
        says = 'HF_HUB_OFFLINE is set' if kind == 'offline' else 'there is no connection to the Hugging Face Hub'
        for part in ('config.json of lab/never_seen', says, '--weights FILE'):
            assert part in reply['message']
        reply = client("timm.create_model('spot_vit_base_patch16_mae', pretrained=True, depth=1)")
        assert reply['error'] == 'ConnectionError'
        assert 'model.safetensors of timm/vit_base_patch16_224.mae' in reply['message']
        assert time.monotonic() - begin < 20  # one try each; the client alone would wait for 23 s, twice
    finally:
        client.close()


def test_a_file_in_the_cache_that_was_altered_is_found_without_a_connection(server, repo, tmp_path):
    client = Client(server, tmp_path)
    assert client(WAYS['retrofit'] + '\nresult = 1', REPO=repo) == dict(result=1)
    client.close()
    blob = next(p.resolve() for p in tmp_path.rglob('model.safetensors'))
    blob.write_bytes(blob.read_bytes()[:-1] + b'\x01')
    client = Client(server, tmp_path, HF_HUB_OFFLINE='1')
    try:
        reply = client(WAYS['retrofit'], REPO=repo)
        assert reply['error'] == 'OSError' and f'model.safetensors of {repo} arrived damaged' in reply['message']
        assert not blob.exists()
    finally:
        client.close()


@pytest.fixture
def web(tmp_path):
    """A folder, and the address under which plain HTTP serves it."""
    folder = tmp_path / 'web'
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.func.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_address_with_a_checksum_in_its_name_is_compared(web, tmp_path):
    import hashlib

    folder, address = web
    torch.save({'a': torch.ones(3)}, folder / 'x.pth')
    content = (folder / 'x.pth').read_bytes()
    name = f'vit-{hashlib.sha256(content).hexdigest()[:8]}.pth'
    (folder / name).write_bytes(content)
    cfg = PretrainedCfg(url=f'{address}/{name}')
    checked = check_source(cfg, tmp_path / 'cache')
    assert checked.keys == ('a',) and checked.cfg.file == str(tmp_path / 'cache' / name)
    (tmp_path / 'cache' / name).write_bytes(content[:-1] + b'\x01')  # altered in the cache: it comes anew
    assert check_source(cfg, tmp_path / 'cache').keys == ('a',)
    assert (tmp_path / 'cache' / name).read_bytes() == content
    (folder / name).write_bytes(content[:-1] + b'\x01')
    with pytest.raises(OSError, match=rf'{name}: the download failed .*--weights FILE'):
        check_source(cfg, tmp_path / 'other')
    with pytest.raises(OSError, match=r'none\.pth: the download failed .*404'):
        check_source(PretrainedCfg(url=f'{address}/none.pth'), tmp_path / 'other')


def test_weights_in_a_folder_are_chosen_as_timm_chooses(tmp_path):
    with pytest.raises(FileNotFoundError, match='is no folder'):
        find_in_folder(tmp_path / 'no')
    for name in ('b.bin', 'a.bin', 'z.pth', 'z.safetensors', 'pytorch_model.bin', 'model.safetensors'):
        save_file({'a': torch.ones(1)}, tmp_path / name)
        expected = 'a.bin' if name == 'a.bin' else name
        assert find_in_folder(tmp_path).name == expected


def test_configs_without_weights_pass():
    cfg = PretrainedCfg()
    assert check_source(cfg).cfg is cfg
    assert timm.get_pretrained_cfg('vit_tiny_patch16_224').hf_hub_id  # which is why no test asks for its weights


def test_the_cache_is_asked_for_the_revision(monkeypatch):
    asked = []
    monkeypatch.setattr(download, 'try_to_load_from_cache', lambda *names, **given: asked.append((names, given)))
    assert download._find_cached('lab/pico', 'v1', ['a', 'b'], None) is None
    assert asked == [(('lab/pico', name), dict(cache_dir=None, revision='v1')) for name in 'ab']
