from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest
import timm
import torch
from conftest import SMALL
from PIL import Image

import timm_spot
from timm_spot.tasks.play import stage as module
from timm_spot.tasks.play.stage import Stage, UnknownPicture


@pytest.fixture(scope='module')
def model():
    return timm.create_model('spot_vit_pico_patch8_64.digits_placed', pretrained=True).eval()


@pytest.fixture(scope='module')
def stage(model):
    return Stage(model, 'digits')


@pytest.fixture(scope='module')
def shown(stage):
    return stage.show_example(0)


def picture_file(*size):
    buffer = io.BytesIO()
    Image.effect_noise(size, 60).convert('RGB').save(buffer, 'PNG')
    buffer.seek(0)
    return buffer


def test_the_page_is_told_the_model(stage):
    about = stage.describe()
    assert about['size'] == [64, 64] and about['window'] == [8., 8.] and about['offset'] == 0.
    assert about['full_budget'] == 64 and about['max_tokens'] == 128 and about['n_tokens'] == 25
    assert about['classes'] == list('0123456789') and about['digits'] and about['density']
    names = [prior['name'] for prior in about['priors']]
    assert names[:2] == ['density', 'isotropic'] and len(set(names)) == len(names)
    assert {name.split('/')[0] for name in names[1:]} == set(timm_spot.list_samplers())
    assert {p['name'] for p in about['priors'] if p['drawn']} >= {'uniform', 'sobol', 'salient/energy'}


def test_windows_of_the_authors_convention_are_half_a_pixel_further():
    model = timm.create_model('spot_vit_pico_patch8_64', convention='spot', img_size=(32, 96), **SMALL).eval()
    about = Stage(model, 'x').describe()
    assert about['offset'] == 0.5
    assert about['window'] == [8 * 2 * 32 / 128, 8 * 2 * 96 / 128]  # stretched with the picture


def test_a_picture_is_shown_as_the_model_takes_it(stage, shown, model):
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown.about['picture'].partition(',')[2]))))
    saved = np.asarray(Image.open(module.SHIPPED / '00_4.png').convert('RGB'))
    assert (pixels == saved).all()
    assert shown.about['pixels'] == [64, 64] and not shown.about['foreign'] and shown.about['name'] == '00_4.png'
    positions = timm_spot.sample_positions('isotropic', 64, (64, 64))
    with torch.no_grad():
        expected = model(shown.images, positions=positions)[0].softmax(dim=0)
    assert [score['full'] for score in shown.about['full']] == pytest.approx(expected.tolist(), abs=1e-6)
    assert stage.show(picture_file(300, 200), 'noise.png').about['foreign']


def test_answers_are_the_model_s(stage, shown, model):
    positions = [[0.3, 0.4], [0.55, 0.5], [0.7123, 0.6]]
    scores = stage.answer(shown.about['id'], positions)['scores']
    with torch.no_grad():
        expected = model(shown.images, positions=torch.tensor(positions))[0].softmax(dim=0).tolist()
    assert [score['probability'] for score in scores] == pytest.approx(expected, abs=1e-6)
    assert [score['name'] for score in scores] == list('0123456789')


def test_placements_are_the_model_s_and_the_samplers(stage, shown, model):
    key = shown.about['id']
    with torch.no_grad():
        model.set_placement(n_tokens=9)
        expected = model.place(shown.images)[0]
        model.set_placement(n_tokens=None)
    assert stage.place(key, 'density', 9) == expected.tolist()
    assert stage.place(key, 'center', 9) == timm_spot.sample_positions('center', 9, (64, 64))[0].tolist()
    for prior in stage.priors():
        if not prior['name'].startswith('grid_'):
            assert len(stage.place(key, prior['name'], 7)) == 7
            assert (stage.place(key, prior['name'], 7, seed=1) != stage.place(key, prior['name'], 7)) is prior['drawn']


def test_worth_is_what_the_log_odds_lose(stage, shown, model):
    positions = torch.tensor([[0.3, 0.4], [0.55, 0.5], [0.7, 0.6]])
    worth = stage.answer(shown.about['id'], positions.tolist(), worth=True)['worth']

    def log_odds(positions):
        p = model(shown.images, positions=positions)[0].double().softmax(dim=0)
        return (p / (1 - p)).log()

    with torch.no_grad():
        whole = log_odds(positions)
        for i in range(3):
            rest = torch.cat([positions[:i], positions[i + 1:]])
            lost = whole - log_odds(rest)
            assert worth[i] == pytest.approx(lost[whole.argmax()].item(), abs=1e-4)
    assert stage.answer(shown.about['id'], [[0.5, 0.5]], worth=True)['worth'] == [0.]


def test_worth_in_passes_is_the_same(stage, shown, monkeypatch):
    positions = stage.place(shown.about['id'], 'sobol', 9)
    whole = stage.answer(shown.about['id'], positions, worth=True)['worth']
    monkeypatch.setattr(module, '_PASSES', 20)
    assert stage.answer(shown.about['id'], positions, worth=True)['worth'] == pytest.approx(whole, abs=1e-4)


def test_pruning_says_when_each_token_falls(stage, shown):
    positions = stage.place(shown.about['id'], 'isotropic', 16)
    answer = stage.answer(shown.about['id'], positions, keep_rate=0.5)
    assert answer['stages'] == [8, 4, 2]
    assert [sum(k > s for k in answer['kept']) for s in range(3)] == [8, 4, 2]
    assert 'kept' not in stage.answer(shown.about['id'], positions)


def test_a_pruning_model_starts_whole_and_keeps_its_predictors():
    model = timm.create_model('relevance_spot_vit_pico_patch8_64', pretrained=True).eval()
    stage = Stage(model, 'x')
    shown = stage.show_example(1)
    positions = stage.place(shown.about['id'], 'isotropic', 16)
    whole, pruned = (stage.answer(shown.about['id'], positions, keep_rate=rate)['scores'] for rate in (1., 0.5))
    with torch.no_grad():
        for rate, scores in ((1., whole), (0.5, pruned)):
            logits = model.pruned(rate)(shown.images, positions=torch.tensor(positions))
            expected = logits[0].softmax(dim=0).tolist()
            assert [score['probability'] for score in scores] == pytest.approx(expected, abs=1e-6)


def test_density_is_the_placer_s(stage, shown, model):
    density = torch.tensor(stage.density(shown.about['id']))
    with torch.no_grad():
        expected = model.placer.density(shown.images)[0]
    torch.testing.assert_close(density / density.sum(), expected, atol=1e-6, rtol=1e-4)
    assert density.max() == 1.


def test_of_many_classes_the_first_are_shown_and_that_of_the_full_budget():
    torch.manual_seed(0)
    stage = Stage(timm.create_model('spot_vit_pico_patch8_64', num_classes=40, **SMALL).eval(), 'x')
    p, full = torch.arange(40.) / 780, torch.zeros(40)
    full[3] = 1.
    labels = [score['label'] for score in stage.scores(p, full)]
    assert labels == [*range(39, 30, -1), 3]
    assert stage.describe()['examples'] == ['cowbike.jpg', 'oldkitchen.jpg']  # no digits for a model of other classes
    full[39] = 2.
    assert [score['label'] for score in stage.scores(p, full)] == [*range(39, 29, -1)]


def test_pictures_are_forgotten_one_by_one(model, monkeypatch):
    monkeypatch.setattr(module, 'KEPT', 2)
    stage = Stage(model, 'x')
    first, second = stage.show_example(0), stage.show_example(1)
    stage.shown(first.about['id'])  # used last: the other one goes
    stage.show_example(2)
    assert stage.shown(first.about['id']) is first
    with pytest.raises(UnknownPicture):
        stage.answer(second.about['id'], [[0.5, 0.5]])


@pytest.mark.parametrize('ask, says', [
    (lambda stage, key: stage.place(key, 'nowhere', 9), "prior='nowhere' is none of density, isotropic"),
    (lambda stage, key: stage.place(key, 'isotropic', 0), 'n_tokens=0 must be at least 1 and at most 128'),
    (lambda stage, key: stage.place(key, 'isotropic', 129), 'n_tokens=129 must be at least 1'),
    (lambda stage, key: stage.answer(key, []), r'positions of shape \(0,\) must be N pairs'),
    (lambda stage, key: stage.answer(key, [[0.5]]), r'positions of shape \(1, 1\) must be N pairs'),
    (lambda stage, key: stage.answer(key, [[0.5, math.nan]]), 'finite numbers'),
    (lambda stage, key: stage.answer(key, [['a', 'b']]), 'positions must be a list of pairs'),
    (lambda stage, key: stage.answer(key, [[0.5, 0.5], [0.5]]), 'positions must be a list of pairs'),
    (lambda stage, key: stage.answer(key, [[0.5, 0.5]], keep_rate=0.), 'keep_rate=0.0'),
    (lambda stage, key: stage.show_example(10), 'example=10 is none of the 10 pictures'),
    (lambda stage, key: stage.show(io.BytesIO(b'no picture'), 'x.png'), 'x.png is no picture'),
])
def test_mistakes_are_told(stage, shown, ask, says):
    with pytest.raises((ValueError, IndexError), match=says):
        ask(stage, shown.about['id'])


def test_models_that_do_not_suit_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match='is no subpixel ViT'):
        Stage(timm.create_model('dht_vit_pico_patch8_64'), 'dht')
    with pytest.raises(ValueError, match='has 0 classes'):
        Stage(timm.create_model('spot_vit_pico_patch8_64', num_classes=0, **SMALL), 'x')
    with pytest.raises(ValueError, match='holds no picture'):
        Stage(model, 'x', [str(tmp_path)])
    plain = Stage(timm.create_model('spot_vit_pico_patch8_64', **SMALL).eval(), 'x')
    assert not plain.describe()['density'] and plain.priors()[0]['name'] == 'isotropic'
    with pytest.raises(ValueError, match='has no density'):
        plain.density(plain.show_example(0).about['id'])
