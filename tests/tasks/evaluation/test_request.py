from __future__ import annotations

import dataclasses

import pytest

from timm_spot.tasks.evaluation.request import Knn, Request
from timm_spot.tasks.pictures.datasets import Pictures


def test_the_key_of_neighbours_says_all_that_determines_them():
    bank = Pictures('digits', 'train')
    base = Knn(bank)
    assert base.key == f'digits {bank.digest()} k=20 T=0.07'
    others = [Knn(bank, k=5), Knn(bank, temperature=1.), Knn(Pictures('digits'))]
    assert len({knn.key for knn in (base, *others)}) == 4


def test_a_request_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request().amp = 'bfloat16'
