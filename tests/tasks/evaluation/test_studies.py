from __future__ import annotations

import copy

import pytest
import timm
import torch
from conftest import SMALL
from PIL import Image

import timm_spot
from timm_spot.tasks.evaluation import studies
from timm_spot.tasks.evaluation.comparisons import format_study
from timm_spot.tasks.evaluation.studies import STUDIES, register_study, run_study
from timm_spot.tasks.evaluation.study_pictures import open_study_pictures

SEARCH = dict(steps=1, lr=1e-2, record=False)


@pytest.fixture(scope='module')
def models():
    """Two small models with random weights."""
    made = {}
    for seed in range(2):
        torch.manual_seed(seed)
        made[f'seed {seed}'] = timm.create_model('spot_vit_pico_patch8_64', **SMALL).eval()
    return made


@pytest.fixture(scope='module')
def canvases():
    return open_study_pictures('digits', 12)


@pytest.fixture
def folder(tmp_path):
    for label in range(10):
        (tmp_path / 'data' / str(label)).mkdir(parents=True)
        for i in range(2):
            Image.effect_noise((80, 70), 20 + 9 * label).save(tmp_path / 'data' / str(label) / f'{i}.png')
    return tmp_path / 'data'


def test_percentile_under_a_token():
    percentiles = torch.tensor([[[10., 20.], [30., 40.]]])
    positions = torch.tensor([[[0.25, 0.75], [0.75, 0.25], [1.2, 0.9]]])  # the last one has left the image
    assert studies._under(percentiles, positions).item() == pytest.approx((20 + 30 + 40) / 300)


@pytest.mark.parametrize('name, count', [('grids', 4), ('priors', 4), ('saliency', 1), ('transfer', 2)])
def test_every_study_compares_each_model_at_each_budget(models, canvases, tmp_path, name, count):
    found = run_study(name, models, canvases, (4, 9), tmp_path, SEARCH)
    assert len(found) == count * 2 * 2
    assert {(c.model, c.n_tokens) for c in found} == {(m, n) for m in models for n in (4, 9)}
    assert all(c.interval >= 0 for c in found)
    assert len(format_study(found).splitlines()) == len(found) + 2


@pytest.mark.parametrize('name, count', [('grids', 4), ('priors', 4), ('saliency', 1), ('transfer', 2)])
def test_every_study_keeps_the_sizes_of_windows(canvases, tmp_path, name, count):
    seen, models = [], {}
    for title in ('one', 'other'):
        model = models[title] = timm.create_model('spot_vit_pico_patch8_64', coverage=0.5, **SMALL).eval()
        model.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    assert len(run_study(name, models, canvases, (4,), tmp_path, SEARCH)) == count * 2
    assert seen and all(positions.shape[-1] == 4 and positions[..., 2:].amax() > 1 for positions in seen)


def test_placers_are_compared_with_what_looks_without_weights(canvases, tmp_path):
    plain = timm.create_model('spot_vit_pico_patch8_64', pretrained=True).eval()
    placed = timm_spot.add_placer(timm.create_model('spot_vit_pico_patch8_64', pretrained=True)).eval()
    found = run_study('placers', dict(plain=plain, placed=placed), canvases, (9,), tmp_path, SEARCH)
    lattices = ['residual lattice - isotropic', 'energy lattice - isotropic']
    assert [c.what for c in found if c.model == 'plain'] == [
        *lattices, 'oracle - energy lattice', 'full budget - energy lattice']
    assert [c.what for c in found if c.model == 'placed'] == [
        *lattices, 'placer - isotropic', 'placer - energy lattice', 'oracle - placer', 'full budget - placer']
    by_what = {c.what: c.difference for c in found if c.model == 'placed'}
    assert by_what['placer - isotropic'] == 0.  # a fresh one is the even lattice
    assert by_what['energy lattice - isotropic'] == -by_what['placer - energy lattice'] > 0


def test_what_another_model_found_covers_the_same_parts_of_the_picture(folder, tmp_path):
    pictures = open_study_pictures(str(folder), 4)
    large = timm.create_model(
        'spot_vit_pico_patch8_64', img_size=128, patch_size=16, coverage=1.,
        pretrained_cfg_overlay=dict(input_size=(3, 128, 128)), **SMALL).eval()
    small = timm.create_model('spot_vit_pico_patch8_64', patch_size=4, coverage=1., **SMALL).eval()
    trials = [studies.Trial(name, model, pictures, (4,), tmp_path, SEARCH)
              for name, model in (('large', large), ('small', small))]
    found, taken = trials[0].searched(4).positions, trials[1].taken_over(trials[0], 4)
    assert trials[0].images.shape[-1] == 128 and trials[1].images.shape[-1] == 64
    torch.testing.assert_close(16 * found[..., 2:] / 128, 4 * taken[..., 2:] / 64)
    assert torch.equal(found[..., :2], taken[..., :2])


def test_a_search_is_kept_by_what_determines_it(models, canvases, tmp_path):
    one = {'one': models['seed 0']}
    run_study('saliency', one, canvases, (4,), tmp_path, SEARCH)
    kept, = tmp_path.iterdir()
    before = kept.stat().st_mtime_ns
    run_study('saliency', one, canvases, (4,), tmp_path, SEARCH)
    assert kept.stat().st_mtime_ns == before and len(list(tmp_path.iterdir())) == 1
    run_study('saliency', one, canvases, (4,), tmp_path, dict(SEARCH, lr=1e-3))
    run_study('saliency', one, open_study_pictures('digits', 11), (4,), tmp_path, SEARCH)
    run_study('saliency', {'other': models['seed 1']}, canvases, (4,), tmp_path, SEARCH)
    assert len(list(tmp_path.iterdir())) == 4
    covering = copy.deepcopy(models['seed 0'])
    covering.set_placement(coverage=1.)
    run_study('saliency', {'covering': covering}, canvases, (4,), tmp_path, SEARCH)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_model_transfers_to_itself(models, canvases, tmp_path):
    one = models['seed 0']
    found = run_study('transfer', {'one': one, 'twin': one}, canvases, (4,), tmp_path, SEARCH)
    assert {c.difference for c in found if c.what == "own oracle - other's oracle"} == {0.}


def test_a_folder_of_pictures(models, folder, tmp_path):
    pictures = open_study_pictures(str(folder), 10)
    assert pictures.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]  # spread over the folder, not its first ones
    assert pictures.images(models['seed 0']).shape == (10, 3, 64, 64)
    found = run_study('grids', {'one': models['seed 0']}, pictures, (4,), tmp_path / 'out', SEARCH)
    assert len(found) == 4 and all(-100 <= c.difference <= 100 for c in found)


def test_a_study_of_ones_own_is_one_function(models, canvases, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, 'STUDIES', dict(STUDIES))

    @register_study('spread')
    def study_spread(trials):
        return [
            trial.compare('isotropic - center', n, {
                name: trial.correct(trial.placed(name, n)) for name in ('isotropic', 'center')})
            for trial in trials for n in trial.budgets]

    one, = run_study('spread', {'one': models['seed 0']}, canvases, (9,), tmp_path)
    images, model = canvases.images(models['seed 0']), models['seed 0']
    rights = []
    for sampler in ('isotropic', 'center'):
        model.set_placement(n_tokens=9, sampler=sampler)
        with torch.inference_mode():
            rights.append((model(images).argmax(dim=1) == canvases.labels).double())
    assert one.difference == pytest.approx(100 * (rights[0] - rights[1]).mean().item())
    with pytest.raises(ValueError, match="name='spread' is already a study"):
        register_study('spread')


@pytest.mark.parametrize('name, budgets, says', [
    ('transfer', (4,), 'needs a second, independently trained model'),
    ('grid', (4,), "name='grid' is no study \\(did you mean 'grids'\\?\\): grids, priors, placers, saliency, transfer"),
    ('grids', (65,), 'n_tokens=65 exceeds the 8 x 8 patches'),
    ('grids', (0,), 'n_tokens=0'),
])
def test_errors(models, canvases, tmp_path, name, budgets, says):
    with pytest.raises(ValueError, match=says):
        run_study(name, {'one': models['seed 0']}, canvases, budgets, tmp_path / 'out', SEARCH)


def test_a_model_with_other_classes_is_refused(canvases, folder, tmp_path):
    model = timm.create_model('spot_vit_pico_patch8_64', num_classes=3, **SMALL).eval()
    with pytest.raises(ValueError, match='labels reach up to 9, three has 3 classes'):
        run_study('priors', {'three': model}, canvases, (4,), tmp_path / 'out', SEARCH)
    with pytest.raises(ValueError, match='has 10 classes, the model 3'):
        run_study('priors', {'three': model}, open_study_pictures(str(folder), 10), (4,), tmp_path / 'out', SEARCH)
