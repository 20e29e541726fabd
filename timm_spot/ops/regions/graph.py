"""Regions of images as a graph: neighbours, choices, connected components, numbering, statistics.

Paper: `Differentiable Hierarchical Visual Tokenization` (dHT) - https://arxiv.org/abs/2511.02652

All images of a batch are one graph without edges between images. Vertices are numbered 0, 1, 2 ... through the batch,
always by their smallest member, so that those of an image are contiguous and ordered by their first pixel. Values of
vertices lie channels first, (C, n): sums over regions are then several times faster than over rows.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

_ID_BITS = 47  # a choice packs 16 bits of potential above the id of the other end
_OMEGA_MIN = 1e-12


def quantize(potential: torch.Tensor) -> torch.Tensor:
    """Potentials as integers 0..65535, the precision in which they are compared."""
    return (65535. * potential.detach().float().clamp(0., 1.)).long()


def sum_channels(values: torch.Tensor) -> torch.Tensor:
    """Sum over the first axis, always in the same order.

    torch.sum rounds differently at different places in memory, so that an image's regions would depend on its place in
    the batch.
    """
    total = values[0]
    for channel in values[1:]:
        total = total + channel
    return total


def number_groups(group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number groups by their smallest member.

    Args:
        group: (n,) of any value below n that the members of a group share.

    Returns:
        The number 0 .. k - 1 of each member's group, (n,), and the smallest member of each group, (k,).

    Example:
        >>> import torch
        >>> number_groups(torch.tensor([3, 0, 3, 0]))
        (tensor([0, 1, 0, 1]), tensor([0, 1]))
    """
    ids = torch.arange(len(group), device=group.device)
    smallest = torch.full_like(group, len(group)).scatter_reduce_(0, group, ids, 'amin').index_select(0, group)
    is_first = smallest == ids
    return (is_first.cumsum(0) - 1).index_select(0, smallest), is_first.nonzero()[:, 0]


def choice_components(choice: torch.Tensor) -> torch.Tensor:
    """A root for each vertex of the graph that joins every vertex to its choice.

    Args:
        choice: (n,) vertex that each vertex points to; no cycle is longer than two.

    Returns:
        (n,), the same member of its component for all vertices of a component.
    """
    ids = torch.arange(len(choice), device=choice.device)
    mutual = choice.index_select(0, choice) == ids
    root = torch.where(mutual & (ids < choice), ids, choice)
    while True:
        further = root.index_select(0, root)
        if torch.equal(further, root):
            return root
        root = further


def connected_components(n: int, edges: torch.Tensor) -> torch.Tensor:
    """A label below n for each of n vertices, equal where edges (2, E) connect them."""
    if edges.device.type == 'cpu':
        return _components_scipy(n, edges)
    return _components_torch(n, edges)


def _components_scipy(n: int, edges: torch.Tensor) -> torch.Tensor:
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components as components

    u, v = edges.numpy()
    graph = coo_array((np.ones(len(u), np.int8), (u, v)), shape=(n, n))
    return torch.from_numpy(components(graph, directed=False)[1]).long()


def _components_torch(n: int, edges: torch.Tensor) -> torch.Tensor:
    """Hook the larger root below the smaller one, then shorten all paths, until no edge joins two roots."""
    root = torch.arange(n, device=edges.device)
    u, v = edges
    while True:
        root_u, root_v = root.index_select(0, u), root.index_select(0, v)
        if torch.equal(root_u, root_v):
            return root
        low, high = torch.minimum(root_u, root_v), torch.maximum(root_u, root_v)
        root = root.scatter_reduce(0, high, low, 'amin')
        while not torch.equal(root, root[root]):
            root = root[root]


def _sorted(key: torch.Tensor) -> torch.Tensor:
    """Sort integers; numpy's vectorised sort takes a seventh of the time of torch's on a CPU."""
    if key.device.type != 'cpu':
        return key.sort().values
    import numpy as np

    return torch.from_numpy(np.sort(key.numpy()))


def unique_edges(edges: torch.Tensor) -> torch.Tensor:
    """Each undirected edge (2, E) once, as (u < v), without edges from a vertex to itself."""
    low, high = torch.minimum(edges[0], edges[1]), torch.maximum(edges[0], edges[1])
    key = _sorted(((low << 32) | high)[low != high])
    key = key[torch.cat([key.new_ones(1, dtype=torch.bool), key[1:] != key[:-1]])[:len(key)]]
    return torch.stack([key >> 32, key & 0xffffffff])


def grid_edges(segmentation: torch.Tensor) -> torch.Tensor:
    """Edges (2, E) between the regions of 4-neighbours in (B, H, W), with fewer repetitions than neighbours."""
    seg = segmentation
    down = torch.stack([seg[:, :-1], seg[:, 1:]])
    right = torch.stack([seg[:, :, :-1], seg[:, :, 1:]])
    # A border is many pixels long: drop a pair that repeats the one beside it.
    down_new = down[0] != down[1]
    down_new[:, :, 1:] &= (down[..., 1:] != down[..., :-1]).any(0)
    right_new = right[0] != right[1]
    right_new[:, 1:] &= (right[..., 1:, :] != right[..., :-1, :]).any(0)
    return torch.cat([down[:, down_new], right[:, right_new]], dim=1)


def sum_groups(values: torch.Tensor, group: torch.Tensor, n: int) -> torch.Tensor:
    """Sums (C, n) of values (C, m) over n groups."""
    return values.new_zeros(len(values), n).scatter_add(1, group.expand(len(values), -1), values)


def merge_boxes(boxes: torch.Tensor, group: torch.Tensor, n: int) -> torch.Tensor:
    """Unions (4, n) of boxes (4, m), each (ymin, xmin, ymax, xmax) inclusive, over n groups."""
    low = torch.full((2, n), torch.iinfo(boxes.dtype).max, dtype=boxes.dtype, device=boxes.device)
    high = torch.zeros_like(low)
    group = group.expand(2, -1)
    return torch.cat([
        low.scatter_reduce_(1, group, boxes[:2], 'amin'), high.scatter_reduce_(1, group, boxes[2:], 'amax')])


def pixel_boxes(batch_size: int, height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Box (4, B * H * W) of every pixel."""
    y = torch.arange(height, device=device)[:, None].expand(batch_size, height, width).reshape(-1)
    x = torch.arange(width, device=device).expand(batch_size, height, width).reshape(-1)
    return torch.stack([y, x, y, x])


def compactness(sizes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """4 m / (h + w)^2 of regions with m pixels in h x w boxes, at most 1."""
    return 4. * sizes / (boxes[2] - boxes[0] + boxes[3] - boxes[1] + 2).square()


def pixel_choice(features: torch.Tensor, cmp: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Best neighbour of every pixel on the grid of 4-neighbours.

    Potential of an edge: (1 - cmp) * exp(-||f_u - f_v||^2) + cmp * compactness of the pair. The largest wins, of equal
    ones (in 16 bits) that of the highest id.

    Args:
        features: (C, B, H, W).
        cmp: Weight of the compactness, lambda in the paper.

    Returns:
        Choice (B * H * W,) and weight omega (B * H * W,) of the chosen edge, with gradient to the features.
    """
    _, B, H, W = features.shape
    constant = cmp * 8. / 9.
    right = (1. - cmp) * (-sum_channels((features[..., 1:] - features[..., :-1]).square())).exp() + constant
    down = (1. - cmp) * (-sum_channels((features[:, :, 1:] - features[:, :, :-1]).square())).exp() + constant
    # Each pixel's edges up, left, right and down: the ids of their other ends ascend.
    up, left = F.pad(down, (0, 0, 1, 0)), F.pad(right, (1, 0))
    right, down = F.pad(right, (0, 1)), F.pad(down, (0, 0, 0, 1))
    with torch.no_grad():
        # The lowest bits say which edge: the last of the equal ones is the largest.
        code = [quantize(p).int().mul_(4).add_(i) for i, p in enumerate((up, left, right, down))]
        code[0][:, 0] = code[1][:, :, 0] = code[2][:, :, -1] = code[3][:, -1] = -1
        best = torch.maximum(torch.maximum(code[0], code[1]), torch.maximum(code[2], code[3])).flatten()
        step = torch.tensor([-W, -1, 1, W], device=best.device).index_select(0, best & 3)
        ids = torch.arange(B * H * W, device=best.device)
        choice = torch.where(best < 0, ids, ids + step)
    omega = torch.maximum(torch.maximum(up, left), torch.maximum(right, down))
    return choice, omega.flatten().clamp_min(_OMEGA_MIN)


def edge_potential(
        values: torch.Tensor,
        edges: torch.Tensor,
        cmp: float = 0.,
        sizes: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Potential (E,) of edges: (1 - cmp) * exp(-||f_u - f_v||^2) + cmp * compactness of both ends together.

    Args:
        values: Features (C, n).
        edges: (2, E).
        cmp: Weight of the compactness, lambda in the paper; without it sizes and boxes are not needed.
        sizes: Pixels of each vertex, (n,).
        boxes: Its box, (4, n).
    """
    u, v = edges
    similarity = (-sum_channels((values.index_select(1, u) - values.index_select(1, v)).square())).exp()
    if not cmp:
        return similarity
    assert sizes is not None and boxes is not None
    box_u, box_v = boxes.index_select(1, u), boxes.index_select(1, v)
    union = torch.cat([torch.minimum(box_u[:2], box_v[:2]), torch.maximum(box_u[2:], box_v[2:])])
    pair = sizes.index_select(0, u) + sizes.index_select(0, v)
    return (1. - cmp) * similarity + cmp * compactness(pair, union).to(similarity.dtype)


def best_neighbours(edges: torch.Tensor, potential: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The other end of each vertex's edge with the largest (potential in 16 bits, id of the other end).

    Args:
        edges: (2, E).
        potential: (E,) in [0, 1].
        own: (n,) potential of the edge from a vertex to itself; negative where it has none.
    """
    ids = torch.arange(len(own), device=own.device)
    best = torch.where(own < 0, ids - (1 << _ID_BITS), (quantize(own) << _ID_BITS) + ids)
    q = quantize(potential) << _ID_BITS
    u, v = edges
    best = best.scatter_reduce_(0, u, q + v, 'amax').scatter_reduce_(0, v, q + u, 'amax')
    return best & ((1 << _ID_BITS) - 1)


def best_potential(edges: torch.Tensor, potential: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Weight omega (n,): the largest potential among each vertex's edges and its own, with gradient to the winner."""
    u, v = edges
    best = own.scatter_reduce(0, u, potential, 'amax').scatter_reduce(0, v, potential, 'amax')
    return best.clamp_min(_OMEGA_MIN)


def contract(
        features: torch.Tensor,
        variances: torch.Tensor | None,
        weight: torch.Tensor,
        group: torch.Tensor,
        n: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted means and variances over n groups of vertices.

    Args:
        features: (C, m).
        variances: (C, m); None stands for zeros.
        weight: (m,), positive.
        group: (m,) in 0..n - 1.
        n: Number of groups.

    Returns:
        Means (C, n) and variances (C, n), both with gradient.
    """
    total = sum_groups(weight[None], group, n)
    means = sum_groups(weight * features, group, n) / total
    # A second pass: the difference of mean square and squared mean would lose the digits of a small variance.
    spread = (features - means.index_select(1, group)).square()
    if variances is not None:
        spread = spread + variances
    return means, sum_groups(weight * spread, group, n) / total
