from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_spot.ops.seeds import check_seed, derive_seed


def test_derived_seeds_are_the_same_everywhere():
    # What blake2b says of '0,1': the first 8 of its bytes, halved. Saved runs rely on these numbers.
    assert derive_seed(0, 1) == 1506311409109703068
    assert derive_seed(5) == 5019829476155378896
    code = 'from timm_spot.ops.seeds import derive_seed; print(derive_seed(2, 3, 4))'
    for hash_seed in ('0', '1'):
        environment = dict(os.environ, PYTHONHASHSEED=hash_seed)
        result = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, check=True)
        assert int(result.stdout) == 6977576423788688297


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=3).map(tuple), unique=True, min_size=2, max_size=20))
def test_derived_seeds_differ_and_suit_a_generator(numbers):
    seeds = [derive_seed(*n) for n in numbers]
    assert len(set(seeds)) == len(seeds)  # by chance once in 2**54 tries
    for seed in seeds:
        check_seed(seed)
        torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('numbers', [(), (0.5,), ('1',)])
def test_derived_seeds_take_whole_numbers(numbers):
    with pytest.raises(TypeError):
        derive_seed(*numbers)


def test_seeds_are_refused_where_a_generator_refuses_them():
    for seed in (-2 ** 63, 2 ** 64 - 1):
        check_seed(seed)
        torch.Generator().manual_seed(seed)
    for seed in (2 ** 70, 2 ** 64, -2 ** 63 - 1):
        with pytest.raises(ValueError, match=rf'seed={seed} is out of range'):
            check_seed(seed)
    for seed in (1.5, True, '3'):
        with pytest.raises(TypeError, match='seed must be an int'):
            check_seed(seed)
