from __future__ import annotations

import sys

import numpy as np
import pytest
import timm
from commands import run
from PIL import Image

from timm_spot.tasks.drawing import kinds


@pytest.mark.parametrize('kind', ['placement', 'seen', 'priors', 'trajectory', 'pruning'])
def test_draw(pictures, saved, tmp_path, kind):
    result = run(
        'draw', pictures / 'a.png', '--out', tmp_path / 'out.png', '--kind', kind, '--model', saved, '--n-tokens', 9,
        '--saliency', 'spectral', '--steps', 2)
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / 'out.png') as drawn:
        assert drawn.format == 'PNG' and len(drawn.convert('RGB').getcolors(10 ** 6)) > 50


def test_draw_film(pictures, saved, tmp_path):
    film = tmp_path / 'out.gif'
    result = run('draw', pictures / 'a.png', '--out', film, '--kind', 'film', '--model', saved, '--steps', 2)
    assert result.exit_code == 0, result.output
    with Image.open(film) as frames:
        assert frames.n_frames == 3


def test_draw_says_what_is_wrong(pictures, saved, tmp_path):
    for arguments, says in (
            (['no.png', '--out', tmp_path / 'out.png'], 'no.png'),
            ([pictures / 'a.png', '--out', tmp_path / 'out.xyz'], 'xyz'),
            ([pictures / 'a.png', '--out', tmp_path / 'out.png', '--kind', 'film'], 'must end in .gif or .mp4')):
        result = run('draw', *arguments, '--model', saved)
        assert result.exit_code == 1 and says in result.stderr and 'Traceback' not in result.output


@pytest.mark.parametrize('kind', ['regions', 'means', 'hierarchy'])
def test_draw_of_regions(dht, tmp_path, kind):
    result = run('draw', dht / 'noise.png', '--model', f'local-dir:{dht}/model', '--kind', kind,
                 '--out', tmp_path / 'out.png')
    assert result.exit_code == 0, result.output
    assert (tmp_path / 'out.png').stat().st_size > 1000


@pytest.mark.parametrize('options, says', [
    (('--kind', 'seen'), 'of which can be drawn: regions, means, hierarchy'),
    (('--sampler', 'sobol'), 'leave out --sampler'),
    (('--saliency', 'spectral'), 'leave out --saliency'),
])
def test_what_does_not_suit_is_refused(dht, tmp_path, options, says):
    result = run(
        'draw', dht / 'noise.png', '--model', f'local-dir:{dht}/model', *options, '--out', tmp_path / 'x.png')
    assert result.exit_code == 1 and says in result.stderr
    assert not list(tmp_path.iterdir())


def test_regions_of_a_model_without_any_are_refused_before_its_weights_load(dht, tmp_path, no_weights):
    result = run(
        'draw', dht / 'noise.png', '--kind', 'hierarchy', '--model', 'spot_vit_pico_patch8_64', '--out',
        tmp_path / 'x.png')
    assert result.exit_code == 1 and '--kind hierarchy does not suit spot_vit_pico_patch8_64' in result.stderr


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('weights were looked for')

    monkeypatch.setattr(timm.models._builder, 'load_pretrained', refuse)


@pytest.fixture
def figures(monkeypatch):
    """Figures that are to be saved."""
    saved = []

    def save(figure, path):
        saved.append(figure)
        path.touch()

    monkeypatch.setattr(kinds, 'save_figure', save)
    return saved


@pytest.mark.parametrize('model', [(), ('--model', 'spot_vit_tiny_patch16_in21k', '--n-tokens', 25)])
def test_placements_need_no_weights(pictures, tmp_path, no_weights, figures, model):
    result = run('draw', pictures / 'a.png', '--out', tmp_path / 'out.png', *model)
    assert result.exit_code == 0, result.output
    ax, = figures[0].axes
    # 25 windows of 16 px, none of them over another, on 224 x 224 px.
    assert ax.get_title() == f'25 tokens cover {25 * 16 ** 2 / 224 ** 2:.0%}'
    assert ax.images[0].get_array().shape[:2] == (224, 224)
    bounds = sorted(tuple(p.get_extents().bounds) for p in ax.collections[0].get_paths())
    np.testing.assert_allclose(bounds[0], (0.1 * 224 - 8.5, 0.1 * 224 - 8.5, 16, 16), rtol=1e-5)


def test_priors_need_no_weights(pictures, tmp_path, no_weights, figures):
    assert run('draw', pictures / 'a.png', '--out', tmp_path / 'out.png', '--kind', 'priors').exit_code == 0
    panels = {ax.get_title(): ax for ax in figures[0].axes}
    assert len(panels['isotropic'].collections[0].get_paths()) == 25
    assert panels['isotropic'].images[0].get_array().shape[:2] == (224, 224)
    assert run('draw', pictures / 'a.png', '--out', tmp_path / 'few.png', '--kind', 'priors', '--n-tokens',
               4).exit_code == 0
    assert len(figures[1].axes[0].collections[0].get_paths()) == 4


def test_without_a_model_sampler_saliency_and_seed_are_heard(pictures, tmp_path, figures):
    for i, options in enumerate((['--sampler', 'uniform'], ['--sampler', 'uniform', '--seed', '1'],
                                 ['--saliency', 'spectral'], ['--n-tokens', '4'], [])):
        result = run('draw', pictures / 'a.png', '--out', tmp_path / f'{i}.png', *options)
        assert result.exit_code == 0, result.output
    drawn = [figure.axes[0].collections[1].get_offsets().tobytes() for figure in figures]
    assert len(set(drawn)) == 5


def test_regions_are_those_of_the_tokenizer_in_the_package(pictures, tmp_path, figures):
    for kind in ('regions', 'means'):
        result = run('draw', pictures / 'a.png', '--out', tmp_path / f'{kind}.png', '--kind', kind, '--n-tokens', 9)
        assert result.exit_code == 0, result.output
    assert figures[0].axes[0].get_title() == '9 regions'
    assert figures[0].axes[0].images[0].get_array().shape[:2] == (224, 224)
    assert figures[1].axes[0].get_title().startswith('9 means, PSNR ')


def test_what_is_there_is_not_overwritten_silently(pictures, tmp_path):
    given = ('draw', pictures / 'a.png', '--out', tmp_path / 'out.png')
    (tmp_path / 'out.png').write_text('mine')
    result = run(*given)
    assert result.exit_code == 1 and 'out.png is there already: give --overwrite' in result.stderr
    assert (tmp_path / 'out.png').read_text() == 'mine'
    result = run(*given, '--overwrite')
    assert result.exit_code == 0
    with Image.open(tmp_path / 'out.png') as drawn:
        assert drawn.format == 'PNG'
    size = (tmp_path / 'out.png').stat().st_size
    assert result.stdout == f'{tmp_path}/out.png  placement, {size / 1024:.0f} KiB\n'


def test_a_picture_appears_whole_or_not_at_all(pictures, tmp_path, monkeypatch):
    import matplotlib.figure

    def fail(self, path, **kwargs):
        path.write_bytes(b'half of it')
        raise OSError('disk full')

    monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', fail)
    result = run('draw', pictures / 'a.png', '--out', tmp_path / 'out.png')
    assert result.exit_code == 1 and result.stderr == 'Error: disk full\n'
    assert [p.name for p in tmp_path.iterdir()] == ['pictures']


@pytest.mark.parametrize('options, says', [
    (['--sampler', 'isotopic'], "did you mean 'isotropic'"),
    (['--saliency', 'spectrum'], "saliency='spectrum' is none of"),
    (['--model', 'spot_vit_bse'], 'unknown model spot_vit_bse'),
    (['--model', 'resnet18'], 'no model of timm_spot'),
    (['--weights', 'no.pth'], 'no.pth does not exist'),
    (['--device', 'gpu'], "device='gpu' is no device"),
    (['--n-tokens', '1000000000000'], 'n_tokens=1000000000000 must be a whole number of at least 1 and at most'),
    (['--n-tokens', '0'], 'n_tokens=0'),
    (['--seed', '-1'], 'seed=-1 must be'),
    (['--kind', 'placements'], "kind='placements' is unknown, the kinds of drawing are placement, seen"),
    (['--kind', 'trajectory', '--steps', '-1'], 'steps=-1 must be'),
    (['--kind', 'trajectory', '--lr', 'nan'], 'lr=nan must be a number above 0'),
    (['--kind', 'pruning', '--keep-rate', '0'], 'keep_rate=0 must be a number above 0'),
    (['--kind', 'pruning', '--scorer', 'cls'], "scorer='cls' is unknown"),
    (['--out', 'no/such/folder/out.png'], 'there is no folder no/such/folder'),
    (['--out', 'out.xyz'], 'out.xyz'),
])
def test_mistakes_are_told_before_a_model_loads(pictures, tmp_path, monkeypatch, options, says):
    def refuse(*args, **kwargs):
        raise AssertionError('a model was made')

    monkeypatch.setattr(timm, 'create_model', refuse)
    result = run('draw', pictures / 'a.png', '--out', tmp_path / 'out.png', *options)
    assert result.exit_code == 1 and says in result.stderr
    assert result.stderr.startswith('Error: ') and result.stderr.count('\n') == 1
    assert [p.name for p in tmp_path.iterdir()] == ['pictures']


def test_trained_predictors_are_needed_for_their_scorer(pictures, saved, tmp_path):
    result = run('draw', pictures / 'a.png', '--out', tmp_path / 'out.png', '--kind', 'pruning', '--model', saved,
                 '--scorer', 'relevance')
    assert result.exit_code == 1 and "scorer='relevance' needs trained predictors" in result.stderr


def test_without_matplotlib_the_install_line(pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    result = run('draw', pictures / 'a.png', '--out', tmp_path / 'out.png')
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: this needs matplotlib: pip install 'timm-spot[viz]'")
    assert result.stderr.count('\n') == 1


def test_the_help_lists_every_kind():
    shown = run('draw', '--help').output
    for name, kind in kinds.KINDS.items():
        assert f'{name} ' in shown and kind.about.split(':')[0][:40] in ' '.join(shown.split())


def test_the_model_of_digits_warns_of_a_photograph_where_it_is_asked(pictures, tmp_path):
    Image.effect_noise((300, 200), 40).save(pictures / 'photo.png')
    given = ('draw', pictures / 'photo.png', '--steps', 0)
    assert 'warning' not in run(*given, '--out', tmp_path / 'a.png').output
    result = run(*given, '--kind', 'trajectory', '--out', tmp_path / 'b.png')
    assert result.exit_code == 0 and 'warning: this model reads digits' in result.stderr


@pytest.mark.parametrize('kind', ['placement', 'regions'])
def test_a_bad_picture_is_named(tmp_path, kind):
    (tmp_path / 'a.png').write_bytes(b'no picture')
    (tmp_path / 'folder.png').mkdir()
    for name in ('a.png', 'folder.png', 'missing.png'):
        result = run('draw', tmp_path / name, '--out', tmp_path / 'out.png', '--kind', kind)
        assert result.exit_code == 1 and name in result.stderr and result.stderr.count('\n') == 1
    assert not (tmp_path / 'out.png').exists()


@pytest.mark.parametrize('kind', ['placement', 'seen', 'trajectory', 'film', 'pruning'])
def test_windows_of_all_sizes_are_drawn(pictures, saved, tmp_path, kind):
    out = tmp_path / ('out.gif' if kind == 'film' else 'out.png')
    result = run('draw', pictures / 'a.png', '--out', out, '--kind', kind, '--model', saved, '--n-tokens', 9,
                 '--coverage', 0.7, '--steps', 2)
    assert result.exit_code == 0, result.output
    assert out.stat().st_size > 1000
