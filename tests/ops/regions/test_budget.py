from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_spot.ops.regions.budget import _choose_keepers, merge_to_budget
from timm_spot.ops.regions.graph import grid_edges, pixel_boxes, unique_edges


def pieces(batch_size, height, width, seed=0):
    """Every pixel a piece of its own."""
    n = batch_size * height * width
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(n).view(batch_size, height, width)
    return dict(
        colors=torch.rand(3, n, generator=generator), sizes=torch.ones(n, dtype=torch.long),
        boxes=pixel_boxes(batch_size, height, width), edges=unique_edges(grid_edges(ids)),
        image=torch.arange(batch_size).repeat_interleave(height * width))


def test_by_hand():
    # A row of four pixels; the first two stay, the last is most like the third, which is most like the second.
    colors = torch.tensor([[0., .5, .6, .8]]).expand(3, -1)
    tokens = merge_to_budget(**dict(pieces(1, 1, 4), colors=colors), target=2)
    assert tokens.parent.tolist() == [0, 1, 1, 1]
    assert tokens.sizes.tolist() == [1, 3]
    torch.testing.assert_close(tokens.colors[0], torch.tensor([0., 1.9 / 3]))
    assert tokens.boxes.T.tolist() == [[0, 0, 0, 0], [0, 1, 0, 3]]
    assert tokens.edges.tolist() == [[0], [1]]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 8), st.integers(1, 8), st.integers(1, 70), st.booleans(), st.integers(0, 99))
def test_strict_keeps_the_budget(batch_size, height, width, target, random, seed):
    parts = pieces(batch_size, height, width, seed)
    counts = {}
    for strict in (False, True):
        tokens = merge_to_budget(
            **parts, target=target, strict=strict, random=random, generator=torch.Generator().manual_seed(seed))
        counts[strict] = torch.bincount(tokens.image)
        assert (tokens.sizes.sum() == parts['sizes'].sum()) and (tokens.parent.max() + 1 == len(tokens.sizes))
    enough = min(height * width, target)
    assert (counts[False] >= enough).all()
    assert (counts[True] == enough).all()


def test_an_image_with_few_tokens_is_left_alone():
    parts = pieces(2, 2, 2)
    parts['image'] = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    parts['edges'] = torch.tensor([[0, 1, 2, 3, 4, 6], [1, 2, 3, 4, 5, 7]])
    tokens = merge_to_budget(**parts, target=2, strict=True)
    assert torch.bincount(tokens.image).tolist() == [2, 2]
    assert torch.equal(tokens.colors[:, -2:], parts['colors'][:, -2:])


def test_random_keepers_prefer_small_pieces():
    tokens = merge_to_budget(**pieces(1, 1, 2), target=9)
    tokens = tokens._replace(sizes=torch.tensor([1, 100]))
    generator = torch.Generator().manual_seed(0)
    first = sum(_choose_keepers(tokens, torch.tensor([2]), 1, True, generator)[0].item() for _ in range(2000))
    assert abs(first / 2000 - 10 / 11) < 0.02  # 1 / sqrt(1) against 1 / sqrt(100)
