"""Image to tokens at continuous positions, in the place of timm's PatchEmbed.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

    token = W_rgb . window + W_pos . phi(position) + b
"""
# No postponed annotations in this file: TorchScript reads those of ignored methods as types, not as strings.
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Callable, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed, to_2tuple
from timm.models import register_notrace_module
from torch import nn

from ..ops.position_feature import position_feature
from ..ops.saliency import spectral_residual
from ..ops.samplers import check_budgets, check_n_tokens, get_sampler, lattice_shape, sample_positions
from ..ops.windows import check_convention, check_images, check_positions, gather_blocks, read_windows

Saliency = Union[str, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]
SALIENCY_NAMES = {'spectral_residual': spectral_residual}  # a saved model can keep a name, not a function


def compute_saliency(saliency: Optional[Saliency], images: torch.Tensor) -> Optional[torch.Tensor]:
    """Maps of images that a `saliency` keyword stands for: by name, by function, or as they are."""
    if isinstance(saliency, str):
        saliency = SALIENCY_NAMES[saliency]
    return saliency(images) if callable(saliency) else saliency


@lru_cache(maxsize=256)
def _fixed_placement(
        sampler: str,
        n_tokens: int,
        image_size: Tuple[int, int],
        window: int,
        seed: int,
        device: torch.device,
) -> torch.Tensor:
    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample_positions(sampler, n_tokens, image_size, generator=generator, window=window).to(device)

    # A thread of its own knows nothing of the caller's inference mode, default device or the fake tensors of
    # torch.export, any of which would make the kept placement unusable for the next caller.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(draw).result()


@torch.compiler.assume_constant_result
def fixed_placement(
        sampler: str,
        n_tokens: int,
        image_size: Tuple[int, int],
        window: int,
        seed: int,
        device: torch.device,
) -> torch.Tensor:
    """The one placement (1, N, 2) that all images of a size share: drawn once, a constant to `torch.compile`."""
    return _fixed_placement(sampler, n_tokens, image_size, window, seed, device)


@torch.compiler.assume_constant_result
def fixed_lattice_shape(
        sampler: str,
        n_tokens: int,
        image_size: Tuple[int, int],
        window: int,
        seed: int,
) -> Optional[Tuple[int, int]]:
    """Rows and columns of the fixed placement, None where it is no lattice."""
    return lattice_shape(_fixed_placement(sampler, n_tokens, image_size, window, seed, torch.device('cpu')))


@register_notrace_module
class SubpixelEmbed(nn.Module):
    """Windows around continuous positions to tokens.

    Shapes: images (B, C, H, W) of any size of at least one window, positions (B, N, 2), tokens (B, N, embed_dim).
    Images are normalised floats, or uint8, see `set_normalization`.

    Args:
        img_size: Nominal image size, from which only the default budget that timm reads is derived.
        patch_size: Side k of the (square) window.
        in_chans: Image channels.
        embed_dim: Token width.
        norm_layer: Normalisation of the projected window, before the position is added.
        bias: Whether the projection has one.
        dynamic_img_pad: Part of timm's call; windows need no padding.
        n_tokens: Budget; None takes the count of whole patches in each image, as a ViT would. (low, high) draws one for
            each batch in train mode, log-uniformly: small budgets are as common as large ones.
        sampler: Spatial prior that places the tokens, see `timm_spot.list_samplers`.
        convention: 'patch' or 'spot', see `timm_spot.sample_windows`.
        seed: Seed of the placement that a model in eval mode gives every image, and of the random budgets.
        saliency: 'spectral_residual', a function from images to maps, or a map (H, W) or (B, H, W), for samplers
            that need one.
        pos_nodes: Nodes per axis of the position feature, 16 by default; fixed to k under `spot`.
        eval_n_tokens: Budget in eval mode where it differs; by default the larger one.
        eval_sampler: Prior in eval mode where it differs.
    """

    __jit_unused_properties__ = ['patch_size', 'grid_size', 'num_patches']

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
            patch_size: Union[int, Tuple[int, int]] = 16,
            in_chans: int = 3,
            embed_dim: int = 768,
            norm_layer: Optional[Callable[..., nn.Module]] = None,
            bias: bool = True,
            dynamic_img_pad: bool = False,
            n_tokens: Optional[Union[int, Sequence[int]]] = None,
            sampler: str = 'isotropic',
            convention: str = 'patch',
            seed: int = 0,
            saliency: Optional[Saliency] = None,
            pos_nodes: Optional[int] = None,
            eval_n_tokens: Optional[int] = None,
            eval_sampler: Optional[str] = None,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.window = _square_window(patch_size)
        check_convention(convention, self.window)
        if convention == 'spot' and pos_nodes not in (None, self.window):
            raise ValueError(f"pos_nodes={pos_nodes} must equal the window ({self.window}) under convention='spot'.")
        nodes = self.window if convention == 'spot' else 16 if pos_nodes is None else pos_nodes
        if nodes < 2:
            raise ValueError(f'pos_nodes={nodes} is too small, the position feature needs at least 2 nodes an axis.')
        self.convention = convention
        self.pos_nodes = nodes
        self.n_tokens: Optional[int] = None
        self.train_n_tokens: Optional[Tuple[int, int]] = None
        self.sampler = ''
        self.train_sampler = ''
        self.seed = seed
        self.saliency: Optional[Saliency] = None
        self.batches = 0  # trained on at a random budget
        self.set_placement(
            n_tokens=n_tokens, sampler=sampler, saliency=saliency, eval_n_tokens=eval_n_tokens,
            eval_sampler=eval_sampler)
        self.img_size = to_2tuple(img_size)
        self.mean, self.std = None, None  # see `set_normalization`

        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.window, stride=self.window, bias=bias, **dd)
        self.norm = norm_layer(embed_dim, **dd) if norm_layer else nn.Identity()
        self.pos_proj = nn.Linear(nodes * nodes, embed_dim, bias=False, **dd)
        self.register_buffer('n_sigma', torch.empty((), **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give the position columns the scale of a ViT's position table."""
        nn.init.trunc_normal_(self.pos_proj.weight, std=.02)
        nn.init.ones_(self.n_sigma)

    @property
    def patch_size(self) -> Tuple[int, int]:
        return self.window, self.window

    @property
    def grid_size(self) -> Tuple[int, int]:
        """Whole patches in an image of the nominal size."""
        return self.img_size[0] // self.window, self.img_size[1] // self.window

    @property
    def num_patches(self) -> int:
        """Tokens of an image of the nominal size."""
        return self.budget(self.img_size)

    @torch.jit.ignore
    def budget(self, image_size: Tuple[int, int]) -> int:
        """Tokens of an image of (H, W) pixels."""
        return _budget(self.n_tokens, self.window, image_size)

    @torch.jit.ignore
    def set_placement(
            self,
            n_tokens: Optional[Union[int, Sequence[int]]] = None,
            sampler: Optional[str] = None,
            seed: Optional[int] = None,
            saliency: Optional[Saliency] = None,
            eval_n_tokens: Optional[int] = None,
            eval_sampler: Optional[str] = None,
    ) -> None:
        """Change what is given; raises as `timm_spot.sample_positions` does."""
        if n_tokens is not None:
            self.train_n_tokens = check_budgets(n_tokens)
            self.n_tokens = self.train_n_tokens[1]
        if eval_n_tokens is not None:
            check_n_tokens(eval_n_tokens)
            self.n_tokens = eval_n_tokens
        if saliency is not None:
            if isinstance(saliency, str) and saliency not in SALIENCY_NAMES:
                raise ValueError(f"saliency={saliency!r} is unknown, the names are {', '.join(SALIENCY_NAMES)}.")
            if not (callable(saliency) or isinstance(saliency, (str, torch.Tensor))):
                raise TypeError(
                    "saliency must be 'spectral_residual', a function from images to maps or a map of shape (B, H, W), "
                    f'got {saliency!r}.')
            self.__dict__['saliency'] = saliency  # a network that gives maps is no part of this one
        for name in (sampler, eval_sampler):
            if name is not None and 'saliency' in get_sampler(name).keywords and self.saliency is None:
                raise ValueError(
                    f"sampler={name!r} needs a saliency map: pass saliency='spectral_residual', a function from "
                    'images to maps, or a map of shape (B, H, W).')
        if sampler is not None:
            self.sampler = self.train_sampler = sampler
        if eval_sampler is not None:
            self.sampler = eval_sampler
        if seed is not None:
            self.seed = seed

    @torch.jit.ignore
    def set_input_size(
            self,
            img_size: Optional[Union[int, Tuple[int, int]]] = None,
            patch_size: Optional[Union[int, Tuple[int, int]]] = None,
    ) -> None:
        """Change the nominal image size, or the window by resampling the projection."""
        if img_size is not None:
            self.img_size = to_2tuple(img_size)
        if patch_size is None or _square_window(patch_size) == self.window:
            return
        window = _square_window(patch_size)
        if self.convention == 'spot':
            raise ValueError(
                f"patch_size={patch_size} differs from the window ({self.window}): under convention='spot' the "
                "position feature is tied to it.")
        old = self.proj
        self.proj = nn.Conv2d(
            old.in_channels, old.out_channels, kernel_size=window, stride=window, bias=old.bias is not None,
            device=old.weight.device, dtype=old.weight.dtype)
        with torch.no_grad():
            self.proj.weight.copy_(resample_patch_embed(old.weight, [window, window]))
            if old.bias is not None:
                self.proj.bias.copy_(old.bias)
        for new_p, old_p in zip(self.proj.parameters(), old.parameters()):
            new_p.requires_grad_(old_p.requires_grad)
        self.proj.train(old.training)
        self.window = window

    def feat_ratio(self, as_scalar: bool = True) -> Union[Tuple[int, int], int]:
        """Pixels per patch, which timm states as the reduction of feature maps."""
        return self.window if as_scalar else self.patch_size

    @torch.jit.ignore
    def dynamic_feat_size(self, img_size: Tuple[int, int]) -> Tuple[int, int]:
        """Rows and columns of the lattice on which the sampler places the tokens of an image of (H, W) pixels.

        Raises:
            ValueError: The placement is no lattice.
        """
        name, n_tokens = self.sampler, self.n_tokens
        if self.training:
            name, (low, n_tokens) = self.train_sampler, self.train_n_tokens or (None, None)
            if low != n_tokens:
                raise ValueError(
                    f"n_tokens=({low}, {n_tokens}) draws a budget for each training batch, no feature map is known "
                    "before: use output_fmt='NLC'.")
        n_tokens = _budget(n_tokens, self.window, (img_size[0], img_size[1]))
        shape = None
        if get_sampler(name).deterministic:
            shape = fixed_lattice_shape(name, n_tokens, (img_size[0], img_size[1]), self.window, self.seed)
        if shape is None:
            raise ValueError(
                f"sampler {name!r} places {n_tokens} tokens on no lattice of an image of "
                f"{img_size[0]} x {img_size[1]} px, so they form no feature map: use output_fmt='NLC'.")
        return shape

    @torch.jit.ignore
    def place(self, images: torch.Tensor) -> torch.Tensor:
        """Placement (B, N, 2) that the sampler gives these images.

        In train mode the budget is drawn anew for each call where it is random, and stochastic samplers draw anew for
        each image, from torch's global generator; in eval
        mode they draw once for `seed`, budget and image size, so that an image's placement never depends on its
        neighbours or on how often the model was called.
        """
        # Functions, not methods: a scripted module cannot call the one ignored method from the other.
        if not self.training:
            return _place(self, images, self.sampler, self.n_tokens)
        low, high = self.train_n_tokens or (None, None)
        if low == high:
            return _place(self, images, self.train_sampler, high)
        return _place_at_random_budget(self, images, low, high)

    def forward(self, x: torch.Tensor, positions: Optional[torch.Tensor] = None) -> torch.Tensor:
        if not torch.jit.is_scripting():
            check_images(x, self.window)
        if positions is None:
            positions = self.place(x)
        else:
            if not torch.jit.is_scripting():
                check_positions(positions, x)
            positions = positions.expand(x.shape[0], -1, -1)
        weight = self.proj.weight
        if x.dtype == torch.uint8:
            windows = self._read_bytes(x, positions).flatten(2)
        else:
            windows = read_windows(x, positions, self.window, self.convention).flatten(2)
        tokens = self.norm(F.linear(windows.to(weight.dtype), weight.flatten(1), self.proj.bias))
        if positions.stride(0) == 0 and not positions.requires_grad:
            positions = positions[:1]  # all images share it: one position feature
        return tokens + self.pos_proj(self.position_feature(positions, x.shape[-2], x.shape[-1]).to(weight.dtype))

    @torch.jit.ignore
    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """What uint8 images are normalised with, of images in [0, 1]: one value a channel, else their average."""
        channels = self.proj.in_channels
        self.mean, self.std = (
            tuple(v) if len(v) == channels else (sum(v) / len(v),) * channels for v in (mean, std))

    @torch.jit.ignore
    def _read_bytes(self, images: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Windows of uint8 images, normalised before they are interpolated: beyond the border they fade to 0."""
        B, C, H, W = images.shape
        N, side = positions.shape[1], self.window + 2
        # Gathering a pixel costs about six times as much as converting it.
        if self.convention == 'spot' or side > min(H, W) or 6 * N * side ** 2 > H * W:
            return read_windows(normalize_bytes(images, self.mean, self.std), positions, self.window, self.convention)
        blocks, inside = gather_blocks(images, positions, self.window)
        blocks = normalize_bytes(blocks, self.mean, self.std)
        return read_windows(blocks, inside, self.window, self.convention).view(B, N, C, self.window, self.window)

    def position_feature(self, positions: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """phi of (B, N, 2) positions in images of height x width pixels, (B, N, pos_nodes ** 2)."""
        if self.convention == 'spot':
            sigma = self.n_sigma.float() * self.window / (height + width)
            return position_feature(positions, self.pos_nodes, sigma, scaled=True)
        return position_feature(positions, self.pos_nodes, patch_sigma(self.n_sigma.float(), self.pos_nodes))


def _budget(n_tokens: Optional[int], window: int, image_size: Tuple[int, int]) -> int:
    return (image_size[0] // window) * (image_size[1] // window) if n_tokens is None else n_tokens


def _place(embed: SubpixelEmbed, images: torch.Tensor, name: str, n_tokens: Optional[int]) -> torch.Tensor:
    B = images.shape[0]
    size = int(images.shape[-2]), int(images.shape[-1])  # tensors under torch.jit.trace
    sampler = get_sampler(name)
    n_tokens, device = _budget(n_tokens, embed.window, size), images.device
    if 'saliency' in sampler.keywords:
        maps = compute_saliency(embed.saliency, normalize_bytes(images, embed.mean, embed.std))
        generator = None if embed.training else torch.Generator().manual_seed(embed.seed)
        # One draw for a batch of maps shares its random numbers: each placement then depends on its map alone.
        positions = sample_positions(
            name, n_tokens, size, B if embed.training else 1, maps, generator, embed.window).to(device)
    elif embed.training and not sampler.deterministic:
        positions = sample_positions(name, n_tokens, size, B, window=embed.window).to(device)
    else:
        positions = fixed_placement(name, n_tokens, size, embed.window, embed.seed, device)
    if positions.shape[0] not in (1, B):
        raise ValueError(f'saliency of shape {tuple(maps.shape)} does not match a batch of {B} images.')
    return positions.expand(B, -1, -1)


# Compiled code then sees positions of a dynamic length, instead of one program for each budget.
@torch.compiler.disable
def _place_at_random_budget(embed: SubpixelEmbed, images: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Placement at the next budget of a sequence that `seed` determines, so that all processes draw the same ones."""
    generator = torch.Generator().manual_seed(hash((embed.seed, embed.batches)) % 2 ** 63)
    embed.batches += 1
    share = torch.rand((), generator=generator, dtype=torch.float64).item()
    n_tokens = min(high, int(low * ((high + 1) / low) ** share))
    return _place(embed, images, embed.train_sampler, n_tokens)


def normalize_bytes(
        images: torch.Tensor,
        mean: Optional[Tuple[float, ...]],
        std: Optional[Tuple[float, ...]],
) -> torch.Tensor:
    """uint8 images (B, C, H, W) as a model takes them, in float32; others as they are."""
    if images.dtype != torch.uint8:
        return images
    if mean is None or std is None:
        raise TypeError(
            'images are uint8, and this model was built without a pretrained_cfg that says how to normalise them: '
            'call patch_embed.set_normalization(mean, std), or give normalised float32 images.')
    mean, std = (torch.tensor(v, device=images.device, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))
    return torch.addcmul(-mean / std, images, 1 / (255 * std))


def patch_sigma(n_sigma: torch.Tensor, pos_nodes: int) -> torch.Tensor:
    """Sigma under convention `patch`, for any image size; equals that of `spot` at 16 nodes, k = 16 and 224 px."""
    return n_sigma * (15. / 28.) / (pos_nodes - 1)


def _square_window(patch_size: Union[int, Tuple[int, int]]) -> int:
    height, width = to_2tuple(patch_size)
    if height != width or height < 1:
        raise ValueError(f'patch_size={patch_size} is no window: windows are square, of at least 1 pixel.')
    return height
