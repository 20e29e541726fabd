from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_spot.tasks.evaluation.metrics import estimate_calibration, estimate_mean, score_logits


def test_scores_by_hand():
    logits = torch.tensor([[0., math.log(3.), -100., -100., -100., -100.], [5., 4., 3., 2., 1., 0.]])
    scores = score_logits(logits, torch.tensor([0, 5]))
    assert scores['top1'].tolist() == [0., 0.]
    assert scores['top5'].tolist() == [1., 0.]
    assert scores['nll'][0].item() == pytest.approx(math.log(4.))
    assert scores['confidence'][0].item() == pytest.approx(0.75)


def test_top5_of_fewer_classes_is_certain():
    assert score_logits(torch.tensor([[0., 1.]]), torch.tensor([0]))['top5'].tolist() == [1.]


def test_standard_error_over_images_by_hand():
    estimate = estimate_mean(torch.tensor([[0., 0., 1., 1.]]).double())
    assert estimate.value == 0.5
    assert estimate.se == pytest.approx(math.sqrt(1 / 3) / 2)
    assert estimate.se_seeds is None


def test_standard_error_over_seeds_by_hand():
    estimate = estimate_mean(torch.tensor([[0., 0.], [1., 1.]]).double())
    assert estimate == (0.5, 0., pytest.approx(math.sqrt(0.5) / math.sqrt(2)))


@given(st.integers(2, 30), st.integers(1, 4))
def test_copies_of_a_picture_do_not_make_it_more_certain(pictures, copies):
    values = torch.rand(1, pictures, dtype=torch.float64)
    groups = torch.arange(pictures).repeat(copies)
    assert estimate_mean(values.repeat(1, copies), groups).se == pytest.approx(estimate_mean(values).se)


def test_calibration_error_by_hand():
    # Two bins: confidence 0.9 where half are right, 0.55 where all are: (2 * 0.4 + 2 * 0.45) / 4.
    confidence = torch.tensor([[0.9, 0.9, 0.55, 0.55]]).double()
    estimate = estimate_calibration(confidence, torch.tensor([[1., 0., 1., 1.]]).double())
    assert estimate.value == pytest.approx(0.425)
    assert estimate.se > 0


def test_calibration_error_of_certain_and_right_is_zero():
    ones = torch.ones(2, 5, dtype=torch.float64)
    assert estimate_calibration(ones, ones) == (0., 0., 0.)


def test_a_label_that_is_no_class():
    with pytest.raises(ValueError, match='labels reach from 0 to 3, the model has 3 classes'):
        score_logits(torch.zeros(2, 3), torch.tensor([0, 3]))
