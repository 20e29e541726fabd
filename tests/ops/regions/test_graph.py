from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label

from timm_spot.ops.regions import graph as regions


def test_groups_are_numbered_by_smallest_member():
    number, first = regions.number_groups(torch.tensor([4, 2, 4, 2, 0]))
    assert number.tolist() == [0, 1, 0, 1, 2]
    assert first.tolist() == [0, 1, 4]


def test_choice_components():
    # 0 <-> 1 <- 2 <- 3, 4 on its own, 5 <-> 6
    root = regions.choice_components(torch.tensor([1, 0, 1, 2, 4, 6, 5]))
    assert regions.number_groups(root)[0].tolist() == [0, 0, 0, 0, 1, 2, 2]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 2 ** 30))
def test_components_agree_with_and_without_scipy(n, n_edges, seed):
    edges = torch.randint(n, (2, n_edges), generator=torch.Generator().manual_seed(seed))
    ours, scipys = (f(n, edges) for f in (regions._components_torch, regions._components_scipy))
    assert torch.equal(regions.number_groups(ours)[0], regions.number_groups(scipys)[0])


def test_edges():
    segmentation = torch.tensor([[[0, 0, 1], [2, 0, 1]]])
    edges = regions.unique_edges(regions.grid_edges(segmentation))
    assert edges.T.tolist() == [[0, 1], [0, 2]]
    assert regions.unique_edges(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2 ** 30))
def test_grid_edges_find_every_border(height, width, labels, seed):
    segmentation = torch.randint(labels, (1, height, width), generator=torch.Generator().manual_seed(seed))
    expected = set()
    for y in range(height):
        for x in range(width):
            for yy, xx in ((y + 1, x), (y, x + 1)):
                if yy < height and xx < width and segmentation[0, y, x] != segmentation[0, yy, xx]:
                    expected.add(tuple(sorted((segmentation[0, y, x].item(), segmentation[0, yy, xx].item()))))
    edges = regions.unique_edges(regions.grid_edges(segmentation))
    assert [tuple(e) for e in edges.T.tolist()] == sorted(expected)


def test_equal_neighbours_go_to_the_highest_id():
    choice, omega = regions.pixel_choice(torch.zeros(1, 1, 3, 3), cmp=0.1)
    assert choice.tolist() == [3, 4, 5, 6, 7, 8, 7, 8, 7]
    torch.testing.assert_close(omega, torch.full((9,), 0.9 + 0.1 * 8 / 9))


def test_pixel_choice_is_best_neighbour_on_the_grid():
    features = torch.rand(3, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(60).view(2, 5, 6)
    edges = regions.unique_edges(regions.grid_edges(ids))
    boxes, sizes = regions.pixel_boxes(2, 5, 6), torch.ones(60)
    potential = regions.edge_potential(features.flatten(1), edges, 0.2, sizes, boxes)
    choice, omega = regions.pixel_choice(features, 0.2)
    assert torch.equal(choice, regions.best_neighbours(edges, potential, torch.full((60,), -1.)))
    torch.testing.assert_close(omega, regions.best_potential(edges, potential, torch.zeros(60)))


def test_one_pixel_has_no_choice():
    choice, _ = regions.pixel_choice(torch.zeros(3, 2, 1, 1), cmp=0.1)
    assert choice.tolist() == [0, 1]


def test_compactness_of_boxes():
    boxes = torch.tensor([[0, 0], [0, 0], [1, 3], [1, 0]])  # 2 x 2 and 4 x 1
    assert regions.compactness(torch.tensor([4, 4]), boxes).tolist() == pytest.approx([1., 16 / 25])


def test_contract_gives_weighted_mean_and_variance():
    features, variances = torch.tensor([[1., 3., 7.]]), torch.tensor([[0., 1., 2.]])
    means, spread = regions.contract(
        features, variances, torch.tensor([3., 1., 1.]), torch.tensor([0, 0, 1]), 2)
    assert means.tolist() == [[1.5, 7.]]
    assert spread.tolist() == [[(3 * 0.25 + 1 * (1 + 2.25)) / 4, 2.]]


def test_boxes_unite():
    boxes = regions.pixel_boxes(1, 2, 3)
    assert regions.merge_boxes(boxes, torch.tensor([0, 0, 1, 1, 1, 1]), 2).T.tolist() == [[0, 0, 0, 1], [0, 0, 1, 2]]


def test_components_of_a_picture_are_those_of_scipy_ndimage():
    picture = torch.rand(1, 12, 13, generator=torch.Generator().manual_seed(1)) > 0.5
    ids = torch.arange(12 * 13).view(1, 12, 13)
    edges = regions.grid_edges(ids)
    same = picture.flatten()[edges[0]] == picture.flatten()[edges[1]]
    number = regions.number_groups(regions.connected_components(12 * 13, edges[:, same]))[0]
    assert number.max() + 1 == label(picture[0])[1] + label(~picture[0])[1]
