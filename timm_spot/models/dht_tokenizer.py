"""Image to regions that follow it, end to end differentiable.

Paper: `Differentiable Hierarchical Visual Tokenization` (dHT) - https://arxiv.org/abs/2511.02652
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import nn
from torch.autograd import forward_ad

from ..ops.bilinear import transformed
from ..ops.regions.budget import Tokens, merge_to_budget
from ..ops.regions.criteria import check_criterion
from ..ops.regions.features import inject_means, scharr_gradient
from ..ops.regions.graph import sum_groups
from ..ops.regions.hierarchy import Hierarchy, Pieces, build_hierarchy
from ..ops.regions.vertices import vertices_for_budget
from ..ops.regions.ward import merge_by_ward
from .checkpoint_file import find_tensors
from .dht_checkpoint import BY_WARD
from .dht_layers import GradientActivation, PixelFeatures, RowwiseLinear

_GRADIENT_KERNEL = 'gradient.kernel'  # a constant among the released keys
_MERGES = ('keepers', 'ward')
NOT_CAPTURED = (
    'a model whose tokens are regions cannot be traced or exported (torch.jit, torch.export, torch.fx, ONNX), nor '
    'compiled to one graph: how many regions an image has depends on its pixels. Run it in Python; torch.compile works '
    'without fullgraph=True.')
# Variance of a normalised pixel, rounded to 8 bits: no two regions are known to be nearer than that.
_ROUNDING = 3 * (1 / 255 / 0.226) ** 2 / 12


@dataclass
class Regions:
    """Regions of B images, N in all; ids run across the batch, those of an image are contiguous.

    Attributes:
        pieces: What merges to the budget, best regions or with merge='ward' vertices of a level, (B, H, W) int64 ids.
        segmentation: Tokens, (B, H, W) int64 ids 0..N - 1, by their first pixel.
        injected: Images with each region's mean replaced by its predicted colour, (B, H, W, 3).
        boxes: (4, N): ymin, xmin, ymax, xmax, inclusive.
        counts: Tokens of each image, (B,).
        colors: Predicted colours (normalised), (N, 3).
        sizes: Pixels of each token, (N,).
        image: Index of each token's image, (N,).
        gradient: Image gradient (B, 2, H, W) along y and x, or None.
    """
    pieces: torch.Tensor
    segmentation: torch.Tensor
    injected: torch.Tensor
    boxes: torch.Tensor
    counts: torch.Tensor
    colors: torch.Tensor
    sizes: torch.Tensor
    image: torch.Tensor
    gradient: torch.Tensor | None
    hierarchy: Hierarchy = field(repr=False)

    @property
    def levels(self) -> list[torch.Tensor]:
        """The partition (B, H, W) of each level, the first contraction of the pixels first; computed when asked for."""
        B, H, W = self.segmentation.shape
        return self.hierarchy.segmentations((B, H, W))


class HierarchicalTokenizer(nn.Module):
    """Differentiable hierarchical tokenizer: images (B, 3, H, W) of any size to `Regions`.

    Deterministic in eval mode, where an image's regions do not depend on its batch. In train mode batch norm sees the
    batch, and with merge='keepers' the pieces kept apart by the budget are drawn at random, from torch's global
    generator. Runs in float32 (or float64) whatever the autocast.

    Args:
        hid_ch: Channels of the pixel features.
        cmp: Weight of a pair's compactness against its similarity, in [0, 1].
        iota: Keeps the logarithm of a flat region's variance finite.
        criterion: Information criterion that selects levels: 'aicc', 'aic', 'bic' or 'cic'.
        center: Similarity of a vertex to itself where `use_varproj` is off.
        min_avg_region: Stop merging at so many regions; 0 merges on for as long as there are levels.
        compute_grad: Return the image gradient as well.
        use_varproj: Predict a vertex's similarity to itself from its variances.
        inference_target_coeff: Default budget in eval mode is round(sqrt(H * W) / inference_target_coeff).
        in_chans: Image channels, 3.
        merge: How regions merge to a budget. 'ward': those whose union loses least, from small ones, to exactly the
            budget. 'keepers', the authors': the smallest of the best regions stay, others join the neighbour most like
            them. By default what the weights were made with, 'keepers' where they do not tell.

    Raises:
        ValueError: Unknown criterion or rule, a setting out of its range.
    """

    def __init__(
            self,
            hid_ch: int = 3,
            cmp: float = 0.1,
            iota: float = 5.,
            criterion: str = 'aicc',
            center: float = 0.,
            min_avg_region: int = 6,
            compute_grad: bool = False,
            use_varproj: bool = True,
            inference_target_coeff: float = 0.56,
            in_chans: int = 3,
            merge: str | None = None,
            device: torch.device | None = None,
    ) -> None:
        super().__init__()
        check_criterion(criterion)
        if merge not in (None, *_MERGES):
            raise ValueError(f"merge={merge!r} is unknown, use one of {', '.join(map(repr, _MERGES))}.")
        for name, value, suits, rule in (
                ('hid_ch', hid_ch, hid_ch >= 1, 'be at least 1'),
                ('cmp', cmp, 0. <= cmp <= 1., 'lie in [0, 1]'),
                ('iota', iota, 0. < iota < math.inf, 'be positive and finite'),
                ('center', center, 0. <= center <= 1., 'lie in [0, 1]'),
                ('min_avg_region', min_avg_region, min_avg_region >= 0, 'not be negative'),
                ('inference_target_coeff', inference_target_coeff, 0. < inference_target_coeff < math.inf,
                 'be positive and finite'),
                ('in_chans', in_chans, in_chans == 3, 'be 3: repeat a grey channel three times')):
            if not suits:
                raise ValueError(f'{name}={value} must {rule}.')
        self.cmp = cmp
        self.iota = iota
        self.criterion = criterion
        self.center = center
        self.min_avg_region = min_avg_region
        self.inference_target_coeff = inference_target_coeff
        self.conv = PixelFeatures(in_chans, hid_ch, device)
        self.linear = RowwiseLinear(hid_ch, in_chans, device=device)
        self.varproj = RowwiseLinear(hid_ch, 1, device=device) if use_varproj else None
        self.gradact = GradientActivation(device) if compute_grad else None
        self._merge_is_open = merge is None
        self._set_merge(merge or 'keepers')
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let vertices begin with hardly any similarity to themselves."""
        if self.varproj is not None:
            nn.init.normal_(self.varproj.weight, std=1e-4)
            nn.init.constant_(self.varproj.bias, -2. * math.pi)
        if self.gradact is not None:
            nn.init.zeros_(self.gradact.lmbda)

    def _set_merge(self, merge: str) -> None:
        self.merge = merge
        if merge == 'ward':  # so that weights tell what they were made with; those of earlier versions have no such key
            self.register_buffer(BY_WARD, torch.ones((), device=self.linear.weight.device))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Let weights decide on the rule of merging where none was given."""
        key = f'{prefix}{BY_WARD}'
        if key in state_dict and self._merge_is_open and self.merge != 'ward':
            self._set_merge('ward')
        if self.merge == 'ward':
            state_dict.setdefault(key, torch.ones(()))
        else:
            state_dict.pop(key, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Keep the weights in float32 where the model around them is cast to half precision."""
        def cast(t: torch.Tensor) -> torch.Tensor:
            out = fn(t)
            return t.to(out.device) if t.is_floating_point() and out.dtype.itemsize < 4 else out

        return super()._apply(cast, recurse)

    def load_authors(self, state_dict: dict[str, torch.Tensor]) -> HierarchicalTokenizer:
        """Load released weights: keys of the tokenizer, with or without `tokenizer.` before them; returns self.

        Raises:
            ValueError: The weights do not suit this tokenizer; names what does not.
        """
        state_dict = find_tensors(state_dict, 'state_dict')[0]
        prefix = 'tokenizer.'
        if any(k.startswith(prefix) for k in state_dict):
            state_dict = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        # Nothing but the gradient map depends on these.
        dropped = (_GRADIENT_KERNEL,) if self.gradact is not None else (_GRADIENT_KERNEL, 'gradact.lmbda')
        state_dict = {k: v for k, v in state_dict.items() if k not in dropped}
        try:
            self.load_state_dict(state_dict)
        except RuntimeError as e:
            raise ValueError(
                f'these weights do not suit a tokenizer of hid_ch={self.linear.in_features}, '
                f'compute_grad={self.gradact is not None}: {e}') from e
        return self

    @property
    def _dtype(self) -> torch.dtype:
        """float32, or float64 where the weights are."""
        # Of any tensor: a wrapper or a quantisation may have put another module in the place of each layer.
        dtypes = {t.dtype for t in chain(self.parameters(), self.buffers())}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks for first."""
        raise RuntimeError(NOT_CAPTURED)

    def default_target(self, height: int, width: int) -> int:
        """Budget of an image unless given."""
        return max(1, round(math.sqrt(height * width) / (1. if self.training else self.inference_target_coeff)))

    def self_similarity(self, variances: torch.Tensor) -> torch.Tensor:
        """Similarity (n,) of vertices with variances (C, n) to themselves."""
        if self.varproj is None:
            return variances.new_full(variances.shape[1:], self.center)
        return torch.sigmoid(self.varproj(variances.T)[:, 0])

    def build(self, features: torch.Tensor, max_levels: int | None = None) -> Hierarchy:
        """The hierarchy over given pixel features (B, C, H, W)."""
        return build_hierarchy(
            features, self.self_similarity, self.cmp, self.iota, self.criterion, self.min_avg_region, max_levels)

    def forward(
            self,
            images: torch.Tensor,
            target: int | None = None,
            strict: bool = False,
            boost: float = 1.,
            max_levels: int | None = None,
            generator: torch.Generator | None = None,
    ) -> Regions:
        """Find the regions of images.

        Args:
            images: (B, 3, H, W), normalised with ImageNet's mean and standard deviation.
            target: Tokens of an image, by default round(sqrt(H * W) / 0.56), in train mode round(sqrt(H * W)). An
                image with fewer pieces (pixels, with merge='ward') keeps those.
            strict: Exactly `target`, as merge='ward' always does; otherwise usually a few more.
            boost: With merge='keepers' the factor on the potential between a piece that is kept and one that is not; 1
                in the released weights.
            max_levels: Most levels, by default ceil(log2(sqrt(H * W))).
            generator: For the random choice in train mode.

        Raises:
            TypeError, ValueError: `images` is no such tensor, or another argument is out of its range.
            RuntimeError: The model is being traced or exported.
        """
        check_region_images(images)
        if target is None:
            target = self.default_target(*images.shape[-2:])
        check_budget('target', target)
        if max_levels is not None and max_levels < 0:
            raise ValueError(f'max_levels={max_levels} must not be negative.')
        if not 0. <= boost < math.inf:
            raise ValueError(f'boost={boost} must be finite and not negative.')
        with torch.autocast(images.device.type, enabled=False):
            images = images.to(self._dtype)
            features = self.conv(images)
            hierarchy = self.build(features, max_levels)
            by_ward = self.merge == 'ward'
            pieces = vertices_for_budget(hierarchy, features, target) if by_ward else hierarchy.pieces
            colors = self.linear(pieces.features.T).T
            if by_ward:
                tokens = self._merge_by_ward(images, pieces, colors, target)
            else:
                tokens = merge_to_budget(
                    colors, pieces.sizes, pieces.boxes, pieces.image, pieces.edges, target, strict, boost,
                    random=self.training, generator=generator)
            segmentation = tokens.parent.index_select(0, pieces.segmentation.flatten()).view_as(pieces.segmentation)
            gradient = None if self.gradact is None else self.gradact(scharr_gradient(images))
            return Regions(
                pieces=pieces.segmentation,
                segmentation=segmentation,
                injected=inject_means(images, segmentation, tokens.sizes, tokens.colors),
                boxes=tokens.boxes,
                counts=torch.bincount(tokens.image, minlength=len(images)),
                colors=tokens.colors.T,
                sizes=tokens.sizes,
                image=tokens.image,
                gradient=gradient,
                hierarchy=hierarchy,
            )


    @staticmethod
    def _merge_by_ward(images: torch.Tensor, pieces: Pieces, colors: torch.Tensor, target: int) -> Tokens:
        n = len(pieces.sizes)
        tokens = Tokens(
            torch.arange(n, device=images.device), colors, pieces.sizes, pieces.boxes, pieces.image, pieces.edges)
        pixels = images.detach().transpose(0, 1).flatten(1).double()
        return merge_by_ward(tokens, sum_groups(pixels, pieces.segmentation.flatten(), n), target, _ROUNDING)


def check_budget(name: str, n_tokens: Any) -> None:
    """Raise ValueError unless a budget is a whole number of at least 1."""
    if not isinstance(n_tokens, Integral) or n_tokens < 1:
        raise ValueError(f'{name}={n_tokens} must be a whole number, at least 1.')


def check_region_images(images: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless `images` is (B, 3, H, W), floating point, B >= 1.

    Raises:
        RuntimeError: There are no pixels to look at, as the model is being traced or exported.
    """
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(msg=NOT_CAPTURED)  # a reason, where graphs may not break
    if transformed() or forward_ad._current_level >= 0:
        raise RuntimeError(
            'transforms of torch.func (grad, vmap, jvp ...) and forward mode do not reach a model whose tokens are '
            'regions: they hide the pixels from which regions follow. Take gradients by torch.autograd.grad or '
            'backward(); write a loop over images or models in the place of vmap.')
    is_exporting = getattr(torch.compiler, 'is_exporting', bool)  # torch 2.6 has none
    if torch.jit.is_tracing() or is_exporting() or isinstance(images, torch.fx.Proxy):
        raise RuntimeError(NOT_CAPTURED)
    if not isinstance(images, torch.Tensor):
        raise TypeError(f'images must be a tensor of shape (B, 3, H, W), got {type(images).__name__}.')
    if images.is_meta:
        raise RuntimeError('images on the meta device have no pixels, from which regions follow: give real ones.')
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(
            f'images must have shape (B, 3, H, W) with at least one image and one pixel, got {tuple(images.shape)}; '
            'repeat a grey channel three times.')
    if not images.is_floating_point():
        raise TypeError(f'images must be floating point, normalised with the mean and std of ImageNet, got '
                        f'{images.dtype}.')
