"""Folders, model cards, and round trips through the real huggingface_hub client against a server on the loopback."""
from __future__ import annotations

import pytest
import timm
import torch
from hub_server import Client, HubServer, find_request
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import timm_spot
from timm_spot.tasks.publishing.hub import add_results, check_folder, model_card, push_folder, save_folder

COMPARE = """
weights = model.state_dict()
expected = timm.create_model('local-dir:' + FOLDER, pretrained=True).eval()
images = torch.randn(1, 3, 64, 64)
result = dict(
    equal=all(torch.equal(weights[k], v) for k, v in expected.state_dict().items()),
    placed=torch.equal(model.eval().place(images), expected.place(images)),
    n_tokens=model.place(images).shape[1])
"""


@pytest.fixture(scope='module')
def server():
    server = HubServer()
    yield server
    server.close()


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    return tmp_path_factory.mktemp('hf_home')


@pytest.fixture(scope='module')
def client(server, home):
    client = Client(server, home)
    yield client
    client.close()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A pico model with a placement of its own, saved."""
    torch.manual_seed(0)
    model = timm.create_model('spot_vit_pico_patch8_64', n_tokens=9, sampler='sobol', seed=5)
    folder = tmp_path_factory.mktemp('pico')
    save_folder(model, folder, source='random numbers')
    return folder


@pytest.fixture
def repo(server, folder, request):
    """The folder as a repository, whose name is the test's."""
    name = f'lab/{request.node.name}'
    server.repos[name] = dict(main={p.name: p.read_bytes() for p in folder.iterdir()})
    yield name
    server.drops.clear()
    server.damaged.clear()


def load(client, repo, folder, **values):
    return client("model = timm.create_model('hf-hub:' + REPO, pretrained=True)" + COMPARE,
                  REPO=repo, FOLDER=str(folder), **values)


SAME = dict(result=dict(equal=True, placed=True, n_tokens=9))


def test_upload_then_download(client, server, folder):
    reply = client('result = push_folder(FOLDER, REPO, private=True)', FOLDER=str(folder), REPO='lab/pico')
    assert reply == dict(result=f'{server.url}/lab/pico')
    files = server.repos['lab/pico']['main']
    assert sorted(files) == ['README.md', 'config.json', 'model.safetensors']
    assert files['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
    assert "'hf-hub:lab/pico'" in files['README.md'].decode() and 'ORG/NAME' not in files['README.md'].decode()
    assert 'lab/pico' in server.private
    assert find_request(server, 'POST /lab/pico.git/info/lfs/objects/batch') and find_request(server, 'PUT /lfs/')
    assert load(client, 'lab/pico', folder) == SAME


def test_push_a_model_with_its_results(client, server, folder, tmp_path):
    (tmp_path / 'results.csv').write_text('sampler,n_tokens,top1\ncenter,9,71.25\ncenter,25,80\nuniform,9,60.04\n')
    reply = client(
        "model = timm.create_model('local-dir:' + FOLDER, pretrained=True)\n"
        "result = timm_spot.push_to_hub(model, 'lab/pushed', results=RESULTS)",
        FOLDER=str(folder), RESULTS=str(tmp_path / 'results.csv'))
    assert reply == dict(result=f'{server.url}/lab/pushed')
    files = server.repos['lab/pushed']['main']
    assert sorted(files) == ['README.md', 'config.json', 'model.safetensors']
    assert '| uniform | 60.0 |  |' in files['README.md'].decode()
    assert load(client, 'lab/pushed', folder) == SAME


def test_revision(client, server, folder, tmp_path):
    other = timm.create_model('spot_vit_pico_patch8_64', n_tokens=16, sampler='center')
    save_folder(other, tmp_path, source='random numbers')
    for where, revision in ((folder, None), (tmp_path, 'v2')):
        reply = client('result = push_folder(FOLDER, REPO, revision=REVISION)', FOLDER=str(where), REPO='lab/revised',
                       REVISION=revision)
        assert 'error' not in reply
    assert load(client, 'lab/revised', folder) == SAME
    assert load(client, 'lab/revised@v2', tmp_path) == dict(result=dict(equal=True, placed=True, n_tokens=16))
    assert load(client, 'lab/revised@v3', folder)['error'] == 'RevisionNotFoundError'


def test_missing_file_and_missing_repository(client, server, repo, folder):
    del server.repos[repo]['main']['model.safetensors']
    reply = load(client, repo, folder)
    assert reply['error'] == 'FileNotFoundError'
    assert f'{repo} on the Hugging Face Hub has no model.safetensors or pytorch_model.bin' in reply['message']
    del server.repos[repo]['main']['config.json']
    assert load(client, repo, folder)['error'] == 'RemoteEntryNotFoundError'
    reply = load(client, 'lab/nothing', folder)
    assert reply['error'] == 'RepositoryNotFoundError' and 'lab/nothing' in reply['message']


def test_connection_that_drops_once_is_resumed(client, server, repo, folder):
    server.drops.add('model.safetensors')
    assert load(client, repo, folder) == SAME
    assert not server.drops


def test_connection_that_keeps_dropping_ends_in_an_error(client, server, repo, folder):
    server.drops.add('model.safetensors!')
    # The client's five pauses of a second add nothing to this test.
    reply = client(
        "import time; sleep, time.sleep = time.sleep, lambda s: None\n"
        "try:\n    timm.create_model('hf-hub:' + REPO, pretrained=True)\nfinally:\n    time.sleep = sleep", REPO=repo)
    assert reply['error'] == 'OSError'
    for part in (f'model.safetensors of {repo}', 'the download from the Hugging Face Hub failed', '--weights FILE'):
        assert part in reply['message']
    server.drops.clear()
    assert load(client, repo, folder) == SAME


def test_wrong_checksum_is_an_error_and_the_file_is_thrown_away(client, server, repo, folder):
    # Other bytes than any other test's, since the cache would share an equal file.
    weights = {k: v + 1 for k, v in load_file(folder / 'model.safetensors').items()}
    save_file(weights, folder.parent / 'other.safetensors')
    server.repos[repo]['main']['model.safetensors'] = (folder.parent / 'other.safetensors').read_bytes()
    server.damaged.add('model.safetensors')
    reply = client("timm.create_model('hf-hub:' + REPO, pretrained=True)", REPO=repo)
    assert reply['error'] == 'OSError' and f'model.safetensors of {repo} arrived damaged' in reply['message']
    server.damaged.clear()
    reply = client(
        "result = timm.create_model('hf-hub:' + REPO, pretrained=True).cls_token.sum().item()", REPO=repo)
    assert reply['result'] == pytest.approx(weights['cls_token'].sum().item())


def test_offline_loads_what_is_cached_and_nothing_else(client, server, home, repo, folder):
    assert load(client, repo, folder) == SAME
    offline = Client(server, home, HF_HUB_OFFLINE='1')
    asked = len(server.requests)
    try:
        assert load(offline, repo, folder) == SAME
        reply = load(offline, 'lab/never_seen', folder)
        assert reply['error'] == 'LocalEntryNotFoundError'
    finally:
        offline.close()
    assert len(server.requests) == asked


def test_authors_tags_load_from_an_organisation_named_in_the_environment(client, server, tmp_path):
    small = dict(embed_dim=64, depth=1, num_heads=4)
    torch.manual_seed(0)
    model = timm.create_model('spot_vit_base_patch16_mae.spot_in1k', **small)
    save_folder(model, tmp_path, source='random numbers')
    server.repos['lab/spot_vit_base_patch16_mae.spot_in1k'] = dict(
        main={p.name: p.read_bytes() for p in tmp_path.iterdir()})
    code = "model = timm.create_model('spot_vit_base_patch16_mae.spot_in1k', pretrained=True, **SMALL)"
    reply = client(code, SMALL=small)
    assert reply['error'] == 'RuntimeError' and 'TIMM_SPOT_HUB_ORG=ORG' in reply['message']
    # Read when the model is made, so it may be set at any time.
    reply = client(f"import os; os.environ['TIMM_SPOT_HUB_ORG'] = 'lab'\n{code}\n"
                   "del os.environ['TIMM_SPOT_HUB_ORG']" + COMPARE, SMALL=small, FOLDER=str(tmp_path))
    assert reply['result']['equal']


def test_backbone_from_the_hub(client, server, tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model('vit_tiny_patch16_224', depth=1, img_size=64, num_classes=3)
    save_for_hf(vit, str(tmp_path), safe_serialization=True)
    server.repos['lab/vit'] = dict(main={p.name: p.read_bytes() for p in tmp_path.iterdir()})
    reply = client("""
model = timm.create_model('spot_retrofit', backbone='hf-hub:lab/vit', pretrained=True, sampler='grid').eval()
images = torch.randn(2, 3, 64, 64)
expected = timm.create_model('hf-hub:lab/vit', pretrained=True).eval()(images)
conversion = convert('lab/vit', FOLDER)
again = timm.create_model('local-dir:' + FOLDER, pretrained=True).eval()
result = [((m(images) - expected).abs().max() / expected.abs().max()).item() for m in (model, again)]
result.append(json.load(open(FOLDER + '/config.json'))['model_args']['backbone'])
""", FOLDER=str(tmp_path / 'converted'))
    assert max(reply['result'][:2]) < 2e-4
    assert reply['result'][2] == 'vit_tiny_patch16_224'  # needs no other repository to be built again


def test_card_tells_what_the_model_is(pico):
    pico.set_placement(n_tokens=25, sampler='center')
    card = model_card(pico, source='random numbers')
    header, _, body = card.removeprefix('---\n').partition('\n---\n')
    assert 'library_name: timm' in header and 'license: apache-2.0' in header
    for part in ('1.1 M parameters', 'random numbers', '`center`, 25 tokens', 'UCI', 'hf-hub:ORG/NAME', '2507.01654',
                 "torch.hub.load(CLONE, 'spot_vit_pico_patch8_64'", 'n_tokens=25, coverage=1.)'):
        assert part in body
    pico.set_placement(coverage=0.5)
    assert '`center`, 25 tokens, coverage 0.5; convention' in model_card(pico, source='random numbers')
    one_size = timm.create_model('spot_vit_pico_patch8_64', convention='spot', depth=1)
    assert 'coverage' not in model_card(one_size, source='random numbers')


def test_results_replace_older_ones_and_wrong_ones_are_refused():
    card = '# name\n\n## Usage\n\nuse it\n'
    first = add_results(card, 'sampler,n_tokens,top1\ncenter,9,10\n')
    again = add_results(first, 'sampler,n_tokens,top1\ncenter,9,20.26\n')
    assert '| center | 10.0 |' in first and '| center | 20.3 |' in again and '10.0' not in again
    assert again.endswith('## Usage\n\nuse it\n') and again.count('## Accuracy') == 1
    with pytest.raises(ValueError, match=r"lacks \['top1'\]"):
        add_results(card, 'sampler,n_tokens\ncenter,9\n')
    with pytest.raises(ValueError, match='center at 9 tokens twice'):
        add_results(card, 'sampler,n_tokens,top1\ncenter,9,10\ncenter,9,11\n')


def test_only_whole_model_folders_are_pushed(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'lacks model.safetensors, config.json, README.md'):
        push_folder(tmp_path, 'lab/name')
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / 'pytorch_model.bin').write_bytes(b'')
    assert check_folder(tmp_path, 'lab/name') == ['pytorch_model.bin']
    (tmp_path / 'config.json').write_text('{"architecture": "resnet0"}')
    with pytest.raises(ValueError, match="architecture 'resnet0', which timm does not know"):
        push_folder(tmp_path, 'lab/name')
    (tmp_path / 'model.safetensors').write_bytes(b'short')
    with pytest.raises(ValueError, match='no intact safetensors file'):
        push_folder(tmp_path, 'lab/name')


def test_repository_needs_an_organisation(folder):
    for name in ('name', 'a/b/c', 'lab/na me', 'lab/'):
        with pytest.raises(ValueError, match=r'[Rr]epo'):
            push_folder(folder, name)


def test_only_subpixel_models_of_timm_are_pushed():
    with pytest.raises(TypeError, match='got Linear'):
        timm_spot.push_to_hub(torch.nn.Linear(1, 1), 'lab/name')
    model = timm_spot.models.SubpixelVisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r'not built by timm.create_model'):
        timm_spot.push_to_hub(model, 'lab/name')
