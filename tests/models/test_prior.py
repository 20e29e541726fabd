from __future__ import annotations

import pytest

from timm_spot.models.prior import Prior


def test_whether_placements_have_sizes():
    assert not Prior().has_sizes and not Prior(coverage=(0., 0.)).has_sizes
    assert Prior(coverage=0.2).has_sizes and Prior(coverage=(0., 1.)).has_sizes
    assert Prior(sampler='coarse+center').has_sizes


def test_what_is_drawn_for_each_batch():
    assert Prior(n_tokens=(4, 9)).draws_budget and not Prior(n_tokens=(4, 4)).draws_budget
    assert Prior(coverage=(0., 1.)).draws_coverage and not Prior(coverage=(1., 1.)).draws_coverage
    assert not Prior(coverage=0.5).draws_coverage


@pytest.mark.parametrize('fields, error, says', [
    (dict(coverage=2.), ValueError, r'coverage=2.0 lies outside \[0, 1\]'),
    (dict(coverage=None), TypeError, 'coverage=None'),
    (dict(coverage=(1., 0.)), ValueError, 'out of order'),
    (dict(n_coarse=0), ValueError, 'n_coarse=0 must be at least 1'),
    (dict(n_coarse=2.5), TypeError, 'n_coarse must be an int'),
    (dict(sampler='coarse+salient'), ValueError, "sampler='coarse\\+salient' needs a saliency map"),
])
def test_sizes_that_are_none(fields, error, says):
    with pytest.raises(error, match=says):
        Prior(**fields)
