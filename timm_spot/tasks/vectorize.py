"""Raster to vector: one closed path of smooth curves for each region of an image, as SVG.

Paper: `Differentiable Hierarchical Visual Tokenization` (dHT) - https://arxiv.org/abs/2511.02652
"""
from __future__ import annotations

import math
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from ..models.dht_tokenizer import HierarchicalTokenizer, check_budget, check_region_images
from ..ops.normalization import Normalization
from ..ops.regions.features import region_means
from ..ops.regions.outlines import Outlines, fit_cubics, round_corners, simplify, split_edges, trace_outlines

IMAGENET = Normalization(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
CLOSE = dict(smoothing=1, stroke=0.5, longest_edge=4.)  # nearer to the picture than the authors' settings
WEIGHTS = Path(__file__).parent.parent / 'weights' / 'dht_ras2vec.r2v.safetensors'


@torch.inference_mode()
def vectorize(
        images: torch.Tensor,
        tokenizer: HierarchicalTokenizer,
        target: int | None = None,
        patch_size: int | None = 32,
        smoothing: int = 2,
        tolerance: float = 0.1,
        stroke: float = 1.,
        longest_edge: float | None = None,
) -> list[str]:
    """Draw images as SVG, each region a path filled with its mean colour.

    Paths stand in the order of the regions' first pixels, so that what lies inside a region's hole is painted over it.

    Args:
        images: (B, 3, H, W), normalised with ImageNet's mean and standard deviation.
        tokenizer: Finds the regions; in eval mode the same image always gives the same file.
        target: Regions of an image (usually a few more), round(sqrt(H * W)) by default.
        patch_size: Side of the squares of the background, which shows between the paths; None for no background.
        smoothing: How often the corners of an outline are rounded, 1 to 8 times.
        tolerance: Points whose triangle with both neighbours has at most half this area (in square pixels, 0 to 100)
            are left out after each rounding: more gives fewer curves and less detail.
        stroke: Width of the line, in the colour of the region, that closes the gaps between paths; 0 to 100 pixels.
        longest_edge: Split the edges of an outline into pieces no longer than this, at least 0.1 pixels, before each
            rounding and before the curves are fitted, so that these keep to long straight borders; None (or infinity)
            leaves edges whole, as the authors do. Below 4, or with more than one rounding, regions vanish unless
            `tolerance` is lowered as well.

    Returns:
        The text of one SVG file for each image, of the size of the image.

    Raises:
        ValueError: An option is out of its range, or the options together leave nothing of any region's outline. (The
            defaults may: of a picture all of whose regions are single pixels the authors' own leave the background.)
    """
    check_region_images(images)
    check_options(target, patch_size, smoothing, tolerance, stroke, longest_edge)
    H, W = images.shape[-2:]
    target = max(1, round((H * W) ** 0.5)) if target is None else target
    out = []
    for image in images.split(1):
        regions = tokenizer(image, target)
        picture = IMAGENET.undo(image)
        colors = _to_rgb(region_means(picture, regions.segmentation, regions.sizes).T)
        outlines = trace_outlines(regions.segmentation[0].cpu().numpy())
        ids, curves = fit_cubics(_smooth(outlines, smoothing, tolerance, longest_edge))
        if not len(ids) and (smoothing > 2 or tolerance > 0.1):
            raise ValueError(
                f'smoothing={smoothing} with tolerance={tolerance} leaves nothing of any outline in this picture of '
                f'{H} x {W} px: lower one of them.')
        lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{W}" height="{H}">']
        if patch_size is not None:
            lines += _background(_to_rgb(picture[0].permute(1, 2, 0)), patch_size)
        lines += _paths(ids, curves, colors, stroke)
        out.append('\n'.join([*lines, '</svg>']))
    return out


def check_options(
        target: int | None = None,
        patch_size: int | None = 32,
        smoothing: int = 2,
        tolerance: float = 0.1,
        stroke: float = 1.,
        longest_edge: float | None = None,
) -> None:
    """Raise ValueError unless the options of `vectorize` lie in their ranges."""
    if target is not None:
        check_budget('target', target)
    if patch_size is not None and not (isinstance(patch_size, Integral) and patch_size >= 1):
        raise ValueError(
            f'patch_size={patch_size} must be a whole number, at least 1, or None for no background.')
    if not (isinstance(smoothing, Integral) and 1 <= smoothing <= 8):
        raise ValueError(
            f'smoothing={smoothing} must be a whole number from 1 to 8: each rounding doubles the points, and after so '
            'many there is no corner left.')
    if not 0. <= tolerance <= 100.:
        raise ValueError(
            f'tolerance={tolerance} must lie in 0..100 square pixels: more leaves nothing but the largest regions.')
    if not 0. <= stroke <= 100.:
        raise ValueError(f'stroke={stroke} must lie in 0..100 pixels: wider lines cover the picture.')
    if longest_edge is None:
        return
    if not longest_edge >= 0.1:
        raise ValueError(
            f'longest_edge={longest_edge} must be at least 0.1 pixels, or None to leave edges whole: shorter pieces '
            'make large files that look the same.')
    if longest_edge ** 2 / 8. <= tolerance:  # twice the triangle at a right angle of two such edges, once rounded
        raise ValueError(
            f'longest_edge={longest_edge} with tolerance={tolerance} leaves nothing of any outline: tolerance must be '
            f'below longest_edge ** 2 / 8 = {longest_edge ** 2 / 8.:.2g}.')


def _smooth(outlines: Outlines, smoothing: int, tolerance: float, longest_edge: float | None) -> Outlines:
    """Round outlines, leave out what is then nearly straight, and keep edges short."""
    longest = math.inf if longest_edge is None else longest_edge
    outlines = split_edges(simplify(outlines, 0.), longest)
    for _ in range(smoothing):
        outlines = split_edges(simplify(round_corners(outlines), tolerance), longest)
    return outlines


def _to_rgb(colors: torch.Tensor) -> np.ndarray:
    return (255 * colors).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def _background(picture: np.ndarray, side: int) -> list[str]:
    """Squares in the colour of their top left pixel."""
    H, W, _ = picture.shape
    return [
        f'<rect x="{x}" y="{y}" width="{min(side, W - x)}" height="{min(side, H - y)}" '
        f'fill="rgb({",".join(map(str, picture[y, x]))})"/>'
        for y in range(0, H, side) for x in range(0, W, side)]


def _paths(ids: np.ndarray, curves: np.ndarray, colors: np.ndarray, stroke: float) -> list[str]:
    lines = []
    first = np.flatnonzero(np.diff(ids, prepend=-1))
    for part in np.split(np.arange(len(ids)), first[1:]) if len(ids) else []:
        start = '{:.3f},{:.3f}'.format(*curves[part[0], 0])
        bends = ''.join(
            ' C {:.3f},{:.3f} {:.3f},{:.3f} {:.3f},{:.3f}'.format(*curve[1:].ravel()) for curve in curves[part])
        rgb = f'rgb({",".join(map(str, colors[ids[part[0]]]))})'
        lines.append(f'<path d="M {start}{bends} Z" stroke="{rgb}" stroke-width="{stroke}" fill="{rgb}"/>')
    return lines


class RasterToVector(nn.Module):
    """`vectorize` with the released tokenizer: images (B, 3, H, W), normalised as ImageNet's, to a list of SVG texts.

    The weights (1,614 parameters) are in the package, under the authors' licence (MIT). It draws nearer to the picture
    than `vectorize` does by default; `timm-spot vectorize` draws in another way (`timm_spot.tasks.vectors`).

    Args:
        pretrained: Load the released weights.
        **options: Of `vectorize`; where not given those of `CLOSE`, else its defaults.

    Raises:
        ValueError: An option is out of its range, see `vectorize`.

    Example:
        >>> import torch, timm_spot
        >>> svg, = timm_spot.RasterToVector()(torch.zeros(1, 3, 32, 32))
        >>> svg.splitlines()[0]
        '<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32">'
    """

    def __init__(self, pretrained: bool = True, **options: Any) -> None:
        super().__init__()
        self.options = {**CLOSE, **options}
        check_options(**self.options)
        self.tokenizer = HierarchicalTokenizer(hid_ch=8, cmp=0.01, compute_grad=True)
        if pretrained:
            self.tokenizer.load_authors(load_file(WEIGHTS))
        self.eval()

    def forward(self, images: torch.Tensor) -> list[str]:
        return vectorize(images, self.tokenizer, **self.options)


def to_input(picture: Image.Image, max_side: int | None = None) -> torch.Tensor:
    """A picture as a normalised batch (1, 3, H, W), shrunk where its longer side exceeds `max_side`."""
    if max_side is not None and max(picture.size) > max_side:
        picture = picture.copy()
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return IMAGENET(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])


def read_picture(path: Path, max_side: int | None = None) -> torch.Tensor:
    """Read one picture, see `to_input`.

    Raises:
        ValueError: The file is no picture, or is damaged; names the file.
    """
    from .pictures.images import load_image

    return load_image(path, lambda picture: to_input(picture, max_side))
