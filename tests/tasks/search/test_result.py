from __future__ import annotations

import json

import pytest
import torch
from conftest import DATA
from safetensors import safe_open
from safetensors.torch import save_file

from timm_spot import OracleResult
from timm_spot.tasks.search import result as module


def make(n_tokens=4, targets=True, rows=2):
    correct = torch.arange(rows) % 2 == 0 if targets else None
    return OracleResult(
        positions=torch.rand(rows, n_tokens, 2), losses=torch.rand(rows, 3), logits_before=torch.rand(rows, 10),
        logits_after=torch.rand(rows, 10), trajectory=torch.rand(rows, 3, n_tokens, 2), correct_before=correct,
        correct_after=None if correct is None else ~correct)


@pytest.mark.parametrize('targets', [True, False])
def test_saved_result_comes_back(tmp_path, targets):
    file, result = tmp_path / 'result.safetensors', make(targets=targets)
    result.to_safetensors(file, metadata=dict(made='here'))
    again = OracleResult.from_safetensors(file)
    for name, value in vars(result).items():
        assert getattr(again, name) is value is None or torch.equal(getattr(again, name), value)
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_a_result_of_the_version_before_loads():
    """Written by 0.1: five images, 4 tokens, 2 steps."""
    result = OracleResult.from_safetensors(DATA / 'oracle_0.1.safetensors')
    assert result.positions.shape == (5, 4, 2) and result.trajectory.shape == (5, 3, 4, 2)
    torch.testing.assert_close(result.losses[0], torch.tensor([1.1155, 1.0902, 1.0751]), rtol=0, atol=1e-4)
    assert torch.equal(result.trajectory[:, -1], result.positions)
    with safe_open(DATA / 'oracle_0.1.safetensors', 'pt') as file:
        assert json.loads(file.metadata()['timm_spot'])['images'][0] == 'class0/000.png'


def test_a_result_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    """Whatever is written is written under another name, and a failure leaves what was there."""
    file = tmp_path / 'result.safetensors'
    make().to_safetensors(file)
    before = file.read_bytes()

    def die_halfway(tensors, path, metadata=None):
        assert str(path) != str(file)
        with open(path, 'wb') as half:
            half.write(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(module, 'save_file', die_halfway)
    with pytest.raises(KeyboardInterrupt):
        make(n_tokens=5).to_safetensors(file)
    assert file.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == [file.name]


def test_files_that_are_no_result_are_named(tmp_path):
    file = tmp_path / 'result.safetensors'
    with pytest.raises(FileNotFoundError):
        OracleResult.from_safetensors(file)
    make().to_safetensors(file)
    whole = file.read_bytes()
    for torn in (b'', whole[:5], whole[:100], whole[:-1], b'no safetensors at all, but text'):
        file.write_bytes(torn)
        with pytest.raises(ValueError, match=r'result\.safetensors is no whole safetensors file'):
            OracleResult.from_safetensors(file)
    save_file(dict(positions=torch.zeros(1, 1, 2)), file)
    with pytest.raises(ValueError, match=r"no oracle result: it lacks \['losses'"):
        OracleResult.from_safetensors(file)
    tensors = {k: v for k, v in vars(make()).items()}
    save_file(dict(tensors, losses=torch.rand(3, 3)), file)
    with pytest.raises(ValueError, match=r"a row for each image: its shapes are .*'losses': \(3, 3\)"):
        OracleResult.from_safetensors(file)


def test_concat_refuses_what_does_not_fit():
    a, b = make(), make(n_tokens=5)
    assert OracleResult.concat([a, a]).positions.shape == (4, 4, 2)
    for other in (b, make(targets=False)):
        with pytest.raises(ValueError, match='results differ'):
            OracleResult.concat([a, other])
    with pytest.raises(ValueError, match='results is empty'):
        OracleResult.concat([])


def test_snap_finds_the_nearest_patch_centre():
    result = make(rows=1)
    result.positions = torch.tensor([[[0.1, 0.9], [0.26, 0.5], [-0.3, 1.4], [1., 0.]]])
    expected = torch.tensor([[[0.125, 5 / 6], [0.375, 0.5], [0.125, 5 / 6], [0.875, 1 / 6]]])
    torch.testing.assert_close(result.snap((4, 3)), expected)
    torch.testing.assert_close(result.snap(1), torch.full((1, 4, 2), 0.5))
    with pytest.raises(ValueError, match='at least one row'):
        result.snap(0)


def test_snap_leaves_sizes():
    result = make(rows=1)
    result.positions = torch.tensor([[[0.1, 0.9, 2., 3.]]])
    torch.testing.assert_close(result.snap(2), torch.tensor([[[0.25, 0.75, 2., 3.]]]))


def test_a_name_that_is_no_utf8_is_not_taken_for_damage(tmp_path):
    path = tmp_path / 'caf\udce9.safetensors'
    with pytest.raises(ValueError, match='lies under a name that is no UTF-8'):
        make().to_safetensors(path)
    path.write_bytes(b'whatever')
    with pytest.raises(ValueError, match='lies under a name that is no UTF-8'):
        OracleResult.from_safetensors(path)
