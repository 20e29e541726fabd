"""A network that looks at a thumbnail once and places any number of tokens.

It gives a density over the image, and the even lattice of the budget is carried through the inverse distribution
function of that, see `timm_spot.ops.density`. One set of weights serves every budget and every size of image.
"""
from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.density import place_by_density
from ..ops.sizes import cell_spacing
from .placement import Placer, fixed_placement, register_placer
from .prior import ImageSize, Prior

THUMBNAIL = 128  # the network sees at most this many pixels squared
STRIDE = 8
WIDTH = 32
GAIN = 10.  # of the logits: at the learning rate that suits a ViT, Adam's steps would move densities ten times less
FLOOR = 0.02  # share of the density that is spread evenly: no part of the image is out of reach, of gradients too


class _Block(nn.Module):
    """Neighbours and the whole thumbnail, mixed in each cell: x + pointwise(gelu(depthwise(x) + linear(mean(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.near = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.whole = nn.Linear(width, width)
        self.mix = nn.Conv2d(width, width, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = self.whole(x.mean(dim=(2, 3)))[:, :, None, None]
        return x + self.mix(F.gelu(self.near(x) + whole))


@register_placer('density')
class DensityPlacer(Placer):
    """Places tokens by a density that a small network finds in a thumbnail.

    An 8 x 8 convolution of stride 8 that is told where its cells lie, two residual blocks and four logits for each
    cell: 11,300 weights, 0.6 million multiply-adds for an image of 64 x 64 pixels and 2.3 million for any of 128 x 128
    or more. Its last layer starts at zero, which is the isotropic lattice. With a `coverage`, windows follow the local
    stretch of the lattice.

    Images of another number of channels than three are seen in grey. The sampler of the priors is of no use to it.
    """

    def __init__(self, train_prior: Prior, eval_prior: Prior) -> None:
        super().__init__(train_prior, eval_prior)
        self.stem = nn.Conv2d(3, WIDTH, kernel_size=STRIDE, stride=STRIDE)
        self.where = nn.Conv2d(4, WIDTH, kernel_size=1, bias=False)
        self.blocks = nn.Sequential(_Block(WIDTH), _Block(WIDTH))
        self.head = nn.Conv2d(WIDTH, 4, kernel_size=1)
        self.init_weights()

    def init_weights(self) -> None:
        """Start as the isotropic lattice; timm calls it as a part of the model's `init_weights`."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.reset_parameters()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def density(self, images: torch.Tensor) -> torch.Tensor:
        """The density of images (B, C, H, W): (B, h, w), float32, each summing to one, of one cell for 4 x 4 pixels.

        Raises:
            TypeError: The images are not normalised floats.
        """
        if not images.is_floating_point():
            raise TypeError(f'images must be normalised floats, got {images.dtype}: the model normalises uint8 images.')
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        return self.thumbnail_density(_thumbnail(in_colour(images)))

    def thumbnail_density(self, thumbnails: torch.Tensor) -> torch.Tensor:
        """The density of images by their thumbnails (B, 3, h, w), see `thumbnail_weights`."""
        # The meta device knows no autocast.
        with nullcontext() if thumbnails.is_meta else torch.autocast(thumbnails.device.type, enabled=False):
            x = self.stem(thumbnails)
            x = self.blocks(x + self.where(_places(x)))
            logits = GAIN * F.pixel_shuffle(self.head(x), 2)[:, 0]
            h, w = logits.shape[-2:]
            density = logits.flatten(1).softmax(dim=-1).unflatten(1, (h, w))
        return (1. - FLOOR) * density + FLOOR / (h * w)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        size: ImageSize = (images.shape[-2], images.shape[-1])
        lattice = start_lattice(self.budget(size), size, images.device, self.coverage() > 0.)
        return self.carry(lattice, self.density(images), size)

    def carry(self, lattice: torch.Tensor, density: torch.Tensor, image_size: ImageSize) -> torch.Tensor:
        """The placement (B, N, 2), or (B, N, 4) with a coverage, of a `start_lattice` under densities (B, h, w)."""
        if lattice.shape[-1] == 2:
            return place_by_density(lattice, density)
        positions, cells = place_by_density(lattice, density).split(2, dim=-1)
        return torch.cat([positions, cell_spacing(cells, image_size, self.prior.window, self.coverage())], dim=-1)


def start_lattice(n_tokens: int, image_size: ImageSize, device: torch.device, cells: bool) -> torch.Tensor:
    """The even lattice that a density carries: (N, 2), or (N, 4) with the height and width of cells, as fractions."""
    # A window of one sample that covers its cell has the cell's size in pixels.
    lattice = fixed_placement('isotropic', n_tokens, image_size, 1, device, coverage=1.)[0]
    if not cells:
        return lattice[:, :2]
    return torch.cat([lattice[:, :2], lattice[:, 2:] / lattice.new_tensor(image_size)], dim=-1)


def _places(x: torch.Tensor) -> torch.Tensor:
    """Where the cells of a map (B, C, h, w) lie: (y, x) from -1 to 1 and their squares, (1, 4, h, w)."""
    axes = [(2. * torch.arange(n, device=x.device, dtype=x.dtype) + 1.) / n - 1. for n in x.shape[-2:]]
    places = torch.stack(torch.meshgrid(*axes, indexing='ij'))
    return torch.cat([places, places.square()])[None]


def in_colour(images: torch.Tensor) -> torch.Tensor:
    """Images of any number of channels as three: grey, unless they are three already."""
    return images if images.shape[1] == 3 else images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)


def _thumbnail(images: torch.Tensor) -> torch.Tensor:
    """A copy of images (B, C, H, W): of the same aspect, at most 128 x 128 pixels, whole strides a side."""
    H, W = images.shape[-2:]
    (h, w), pool = _thumbnail_size(H, W)
    if (h, w) == (H, W):
        return images
    # No pixel is skipped, and unlike with antialias=True an exported model does the same.
    return F.avg_pool2d(F.interpolate(images, (pool * h, pool * w), mode='bilinear'), pool)


def _thumbnail_size(height: int, width: int) -> tuple[ImageSize, int]:
    """Pixels of an image's thumbnail, and by how much larger the image is resized before it is pooled to that."""
    scale = min(1., THUMBNAIL / math.sqrt(height * width)) / STRIDE
    h, w = max(1, round(scale * height)) * STRIDE, max(1, round(scale * width)) * STRIDE
    return (h, w), math.ceil(max(1., height / h, width / w))


def thumbnail_weights(image_size: ImageSize) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices (h, H) and (W, w) between which images (..., H, W) are their thumbnails, up to rounding.

    Example:
        >>> rows, columns = thumbnail_weights((256, 128))
        >>> rows.shape, columns.shape
        (torch.Size([184, 256]), torch.Size([128, 88]))
    """
    sides, pool = _thumbnail_size(*image_size)

    def weights(length: int, side: int) -> torch.Tensor:
        pixels = torch.eye(length)[None]
        return F.avg_pool1d(F.interpolate(pixels, pool * side, mode='linear'), pool)[0].T.contiguous()

    return weights(image_size[0], sides[0]), weights(image_size[1], sides[1]).T.contiguous()
