from __future__ import annotations

import threading

import pytest
import timm
import torch

import timm_spot
from timm_spot.tasks.play.search import search_steps
from timm_spot.tasks.play.stage import Stage, UnknownPicture


@pytest.fixture(scope='module')
def stage():
    return Stage(timm.create_model('spot_vit_pico_patch8_64', pretrained=True).eval(), 'digits')


@pytest.fixture(scope='module')
def key(stage):
    return stage.show_example(2).about['id']


@pytest.mark.parametrize('objective, label', [('entropy', None), ('label', 2), ('teacher', None)])
def test_steps_are_those_of_the_search(stage, key, objective, label):
    start = stage.place(key, 'isotropic', 9)
    steps = list(search_steps(stage, key, start, objective, label, steps=3))
    result = timm_spot.optimize_positions(
        stage.model, stage.shown(key).images, None if label is None else torch.tensor([label]), steps=3, lr=1e-2,
        init=torch.tensor(start), objective=objective, bounds='clamp')
    assert [step['step'] for step in steps] == [0, 1, 2, 3]
    assert [step['loss'] for step in steps] == pytest.approx(result.losses[0].tolist(), abs=1e-5)
    torch.testing.assert_close(torch.tensor(steps[-1]['positions']), result.positions[0])
    for step in (steps[0], steps[-1]):
        scores = stage.answer(key, step['positions'])['scores']
        assert [s['probability'] for s in step['scores']] == pytest.approx(
            [s['probability'] for s in scores], abs=1e-5)


def test_tokens_stay_in_the_picture(stage, key):
    steps = list(search_steps(stage, key, [[0., 0.], [1., 1.], [0., 1.]], 'label', 2, steps=8, lr=0.1))
    found = torch.tensor([step['positions'] for step in steps])
    assert found.min() == 0. and found.max() == 1. and not torch.equal(found[0], found[-1])


def test_others_ask_between_steps_and_a_search_that_is_left_ends(stage, key):
    before = threading.active_count()
    steps = search_steps(stage, key, stage.place(key, 'isotropic', 9), steps=500)
    next(steps)
    assert stage.answer(key, [[0.5, 0.5]])['scores']
    steps.close()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(timeout=30)
    assert threading.active_count() <= before
    assert not stage.lock.locked()


def test_what_goes_wrong_on_the_way_is_told(stage, key, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError('the loss is not finite')

    monkeypatch.setattr('timm_spot.tasks.play.search.optimize_positions', fail)
    with pytest.raises(ValueError, match='the loss is not finite'):
        list(search_steps(stage, key, [[0.5, 0.5]]))
    assert not stage.lock.locked()


@pytest.mark.parametrize('given, says', [
    (dict(objective='luck'), "objective='luck' is none of label, entropy, teacher, feature"),
    (dict(objective='label'), 'label=None must be a class, 0 to 9'),
    (dict(objective='label', label=10), 'label=10 must be a class'),
    (dict(steps=0), 'steps=0 must be at least 1 and at most 500'),
    (dict(lr=0.), 'lr=0.0 must be above 0'),
])
def test_mistakes_are_told_before_the_first_step(stage, key, given, says):
    with pytest.raises(ValueError, match=says):
        search_steps(stage, key, [[0.5, 0.5]], **given)
    with pytest.raises(UnknownPicture):
        search_steps(stage, 'none', [[0.5, 0.5]])
