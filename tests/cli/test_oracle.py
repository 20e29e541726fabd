from __future__ import annotations

import timm
from commands import run
from conftest import SMALL

import timm_spot
from timm_spot.models import placement
from timm_spot.tasks.search.result import OracleResult


def test_models_that_place_no_tokens_are_refused(dht, tmp_path):
    result = run('oracle', dht, '--model', f'local-dir:{dht}/model', '--out', tmp_path / 'x.safetensors')
    assert result.exit_code == 1 and 'tokens are regions that it finds itself' in result.output


def test_older_spellings_mean_the_same(pictures, saved, tmp_path):
    results = []
    for i, spelled in enumerate((('--sampler', 'uniform', '--amp', 'bfloat16'),
                                 ('--init', 'uniform', '--amp-dtype', 'bfloat16'))):
        out = tmp_path / f'{i}.safetensors'
        result = run('oracle', pictures, '--model', saved.removeprefix('local-dir:'), '--objective', 'entropy',
                     '--steps', 1, '--n-tokens', 4, '--out', out, *spelled)
        assert result.exit_code == 0, result.output
        results.append(out.read_bytes())
    assert results[0] == results[1]
    shown = run('oracle', '--help').output
    assert '--init' not in shown and '--amp-dtype' not in shown


def test_a_placer_of_ones_own_is_the_start(pictures, tmp_path, monkeypatch):
    class Corner(timm_spot.Placer):
        name = 'corner'

        def forward(self, images):
            return images.new_full((len(images), self.budget(images.shape[-2:]), 2), 0.25)

    monkeypatch.setitem(placement._PLACERS, 'corner', Corner)
    timm.models.save_for_hf(timm.create_model('spot_vit_pico_patch8_64', **SMALL), tmp_path / 'saved')
    out = tmp_path / 'r.safetensors'
    result = run('oracle', pictures, '--model', tmp_path / 'saved', '--placer', 'corner', '--objective', 'entropy',
                 '--steps', 1, '--n-tokens', 3, '--out', out)
    assert result.exit_code == 0, result.output
    trajectory = OracleResult.from_safetensors(out).trajectory
    assert trajectory.shape == (2, 2, 3, 2) and (trajectory[:, 0] == 0.25).all()


def test_sizes_are_searched_and_a_run_with_others_is_another(pictures, saved, tmp_path):
    def search(*arguments):
        return run('oracle', pictures, '--model', saved, '--objective', 'entropy', '--steps', 1, '--n-tokens', 4,
                   '--out', tmp_path / 'r.safetensors', *arguments)

    result = search('--coverage', 0.5, '--optimize', 'position,size')
    assert result.exit_code == 0, result.output
    trajectory = OracleResult.from_safetensors(tmp_path / 'r.safetensors').trajectory
    assert trajectory.shape == (2, 2, 4, 4) and (trajectory[:, 0, :, 2:] == 2.).all()  # cells of 4 windows
    assert (trajectory[:, 1, :, 2:] != 2.).any() and (trajectory[:, 1, :, :2] != trajectory[:, 0, :, :2]).any()
    assert search('--coverage', 0.5, '--optimize', 'position,size').exit_code == 0
    for arguments, differing in (
            (('--coverage', 1, '--optimize', 'position,size'), 'coverage'), (('--coverage', 0.5), 'search'),
            (('--coverage', 0, '--optimize', 'position,size'), 'coverage')):
        result = search(*arguments)
        assert result.exit_code == 1 and f'was made with other settings ({differing})' in result.output
    result = search('--optimize', 'shape')
    assert result.exit_code != 0 and 'shape' in result.output


def test_a_result_whose_name_is_no_utf8_is_refused_before_the_search(pictures, tmp_path):
    result = run('oracle', pictures, '--out', tmp_path / 'caf\udce9.safetensors')
    assert result.exit_code == 1 and 'caf\\xe9.safetensors lies under a name that is no UTF-8' in result.stderr
    assert not any(tmp_path.glob('caf*'))
