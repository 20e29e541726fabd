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
        # The meta device knows no autocast.
        with nullcontext() if images.is_meta else torch.autocast(images.device.type, enabled=False):
            x = self.stem(_thumbnail(images))
            x = self.blocks(x + self.where(_places(x)))
            logits = GAIN * F.pixel_shuffle(self.head(x), 2)[:, 0]
            h, w = logits.shape[-2:]
            density = logits.flatten(1).softmax(dim=-1).unflatten(1, (h, w))
        return (1. - FLOOR) * density + FLOOR / (h * w)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        size: ImageSize = (images.shape[-2], images.shape[-1])
        coverage = self.coverage()
        # A window of one sample that covers its cell has the cell's size in pixels.
        lattice = fixed_placement('isotropic', self.budget(size), size, 1, images.device, coverage=1.)[0]
        if coverage == 0.:
            return place_by_density(lattice[:, :2], self.density(images))
        lattice = torch.cat([lattice[:, :2], lattice[:, 2:] / lattice.new_tensor(size)], dim=-1)
        positions, cells = place_by_density(lattice, self.density(images)).split(2, dim=-1)
        return torch.cat([positions, cell_spacing(cells, size, self.prior.window, coverage)], dim=-1)


def _places(x: torch.Tensor) -> torch.Tensor:
    """Where the cells of a map (B, C, h, w) lie: (y, x) from -1 to 1 and their squares, (1, 4, h, w)."""
    axes = [(2. * torch.arange(n, device=x.device, dtype=x.dtype) + 1.) / n - 1. for n in x.shape[-2:]]
    places = torch.stack(torch.meshgrid(*axes, indexing='ij'))
    return torch.cat([places, places.square()])[None]


def _thumbnail(images: torch.Tensor) -> torch.Tensor:
    """A copy of images (B, C, H, W) in colour: of the same aspect, at most 128 x 128 pixels, whole strides a side."""
    C, H, W = images.shape[1:]
    if C != 3:
        images = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    scale = min(1., THUMBNAIL / math.sqrt(H * W)) / STRIDE
    rows, columns = max(1, round(scale * H)), max(1, round(scale * W))
    h, w = rows * STRIDE, columns * STRIDE
    if (h, w) == (H, W):
        return images
    # No pixel is skipped, and unlike with antialias=True an exported model does the same.
    pool = math.ceil(max(1., H / h, W / w))
    return F.avg_pool2d(F.interpolate(images, (pool * h, pool * w), mode='bilinear'), pool)
