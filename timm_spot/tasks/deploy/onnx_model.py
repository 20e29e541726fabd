"""A classifier in an exported ONNX file: numpy in, numpy out, no torch between."""
from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_transform

from ...ops.samplers import check_n_tokens
from ..extras import need
from .onnx_graph import IMAGES, LOGITS, POSITIONS, placement_inputs
from .onnx_info import EACH, INSIDE, KEY, LATTICE, OnnxInfo

_KEPT = 64  # placements, of pairs of image size and budget


class OnnxModel:
    """What `timm-spot export MODEL FILE.onnx` wrote, run by ONNX Runtime.

    Args:
        path: The file.
        threads: Of one call; by default as many as there are cores.
        providers: Of ONNX Runtime, such as `('CUDAExecutionProvider', 'CPUExecutionProvider')`; by default the CPU.

    Attributes:
        info: What the file says of itself: classes, transform, placement.
        class_names: Of the classes, in their order.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, no ONNX file, or one of another program.
        ModuleNotFoundError: ONNX Runtime is missing.

    Example:
        >>> import tempfile, numpy, timm, timm_spot
        >>> model = timm.create_model('spot_vit_pico_patch8_64', depth=1).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     difference = timm_spot.export_model(model, f'{folder}/model.onnx')
        ...     read = timm_spot.OnnxModel(f'{folder}/model.onnx')
        >>> read(numpy.zeros((2, 3, 64, 96), numpy.uint8), n_tokens=9).shape
        (2, 10)
    """

    def __init__(
            self,
            path: str | Path,
            threads: int | None = None,
            providers: Sequence[str] = ('CPUExecutionProvider',),
    ) -> None:
        need('onnxruntime')
        self.path = Path(path)
        self.session = _open_session(self.path, threads, providers)
        said = self.session.get_modelmeta().custom_metadata_map.get(KEY)
        if said is None:
            raise ValueError(f'{path} was not written by `timm-spot export`: it does not say how its model is used.')
        self.info = OnnxInfo.from_json(said, str(path))
        self._placements: dict[tuple[int, tuple[int, int]], dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()
        self._transform: Any = None

    @property
    def class_names(self) -> list[str]:
        return self.info.class_names

    def budget(self, image_size: tuple[int, int] | None = None) -> int:
        """Tokens of images of (H, W) pixels, by default of the model's own size, where none are asked for."""
        return self.info.budget(image_size or self.info.image_size)

    def prepare(self, picture: Image.Image) -> np.ndarray:
        """A picture, in RGB, resized and cropped as the model was trained: (C, H, W), uint8."""
        if self._transform is None:
            self._transform = create_transform(**self.info.config, is_training=False, use_prefetcher=True)
        image = np.asarray(self._transform(picture if self.info.channels == 3 else picture.convert('L').convert('RGB')))
        return image[:self.info.channels]

    def __call__(
            self,
            images: np.ndarray,
            n_tokens: int | None = None,
            positions: np.ndarray | None = None,
    ) -> np.ndarray:
        """Logits (B, classes), float32.

        Args:
            images: (B, C, H, W), uint8, or float32 and normalised.
            n_tokens: Budget, where the file takes one; by default the model's own.
            positions: Placement instead of the model's own, (N, 2), with sizes (N, 4); where the file takes one for
                each image also with B in front.

        Raises:
            TypeError: The images are no array of uint8 or float32, or not of what the file takes.
            ValueError: They have another shape or size, or the budget or placement is none that the file takes.
        """
        return self.session.run([LOGITS], self.feed(images, n_tokens, positions))[0]

    def feed(
            self,
            images: np.ndarray,
            n_tokens: int | None = None,
            positions: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """The inputs of ONNX Runtime for a call with these arguments."""
        self._check_images(images)
        size = (images.shape[2], images.shape[3])
        if positions is not None:
            placement = self._given(images, n_tokens, positions)
        else:
            placement = self._placed(n_tokens, size)
            if self.info.placement == EACH:
                placement = {POSITIONS: np.repeat(placement[POSITIONS], len(images), axis=0)}
        return {IMAGES: self._to_input(images), **placement}

    def _check_images(self, images: np.ndarray) -> None:
        info = self.info
        if not isinstance(images, np.ndarray):
            raise TypeError(f'images must be a numpy array (B, {info.channels}, H, W), got {type(images).__name__}.')
        taken = (np.uint8,) if info.images == 'uint8' else (np.uint8, np.float32)
        if images.dtype not in taken:
            names = ' or '.join(dtype.__name__ for dtype in taken)
            raise TypeError(f'images are of {images.dtype}, {self.path.name} takes {names}.')
        if images.ndim != 4 or images.shape[1] != info.channels or not len(images):
            raise ValueError(f'images must have shape (B, {info.channels}, H, W), got {images.shape}.')
        size = images.shape[2:]
        if not info.any_size and size != info.image_size:
            height, width = info.image_size
            raise ValueError(
                f'images are of {size[0]} x {size[1]} px, {self.path.name} takes {height} x {width} px alone'
                f'{self._how_to_export_any()}.')
        if min(size) < info.window:
            raise ValueError(
                f'images of {size[0]} x {size[1]} px are smaller than one window of {info.window} x {info.window}.')

    def _how_to_export_any(self) -> str:
        return '' if self.info.columns == 4 or not self.info.budgets_by_sampler else ': export it without --n-tokens'

    def _to_input(self, images: np.ndarray) -> np.ndarray:
        if self.info.images == 'uint8' or images.dtype == np.float32:
            return images
        mean, std = (self._per_channel(name) for name in ('mean', 'std'))
        normalized = images.astype(np.float32)  # by the operations of timm's transform, to the last bit
        normalized /= 255
        normalized -= mean
        normalized /= std
        return normalized

    def _per_channel(self, name: str) -> np.ndarray:
        values = np.array(self.info.config[name], np.float32)
        if len(values) != self.info.channels:
            values = np.full(self.info.channels, values.mean())
        return values[:, None, None]

    def _placed(self, n_tokens: int | None, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """The model's own placement; kept, so that drawing it costs nothing from the second call on."""
        info = self.info
        if info.placement == INSIDE:
            if n_tokens not in (None, info.n_tokens):
                raise ValueError(
                    f'n_tokens={n_tokens}: {self.path.name} has {info.n_tokens} tokens alone'
                    f'{self._how_to_export_any()}.')
            return {}
        if not info.takes_budgets:
            raise ValueError(
                f'{self.path.name} was exported without what places its tokens: give positions, '
                f'(B, N, {info.columns}).')
        n_tokens = self.budget(size) if n_tokens is None else n_tokens
        check_n_tokens(n_tokens)
        if n_tokens > size[0] * size[1]:
            raise ValueError(f'n_tokens={n_tokens} exceeds the pixels of an image of {size[0]} x {size[1]}.')
        key = (n_tokens, size)
        with self._lock:
            if key not in self._placements:
                if len(self._placements) == _KEPT:
                    self._placements.pop(next(iter(self._placements)))
                placed = placement_inputs(info, n_tokens, size)
                self._placements[key] = {name: value.contiguous().numpy() for name, value in placed.items()}
            return self._placements[key]

    def _given(self, images: np.ndarray, n_tokens: int | None, positions: np.ndarray) -> dict[str, np.ndarray]:
        info = self.info
        if info.placement in (INSIDE, LATTICE):
            raise ValueError(f'{self.path.name} takes no positions: export it with --positions-as-input.')
        if n_tokens is not None:
            raise ValueError(f'n_tokens={n_tokens} beside positions of shape {np.shape(positions)}: leave it out.')
        positions = np.asarray(positions, np.float32)
        if info.placement == EACH and positions.ndim == 2:
            positions = np.repeat(positions[None], len(images), axis=0)
        wanted = f'(N, {info.columns})' if info.placement != EACH else f'({len(images)}, N, {info.columns})'
        lead = (len(images),) if info.placement == EACH else ()
        if positions.shape[:-2] != lead or positions.shape[-1:] != (info.columns,) or not positions.shape[-2]:
            hint = '' if info.placement == EACH else ': one placement for all images; --positions-as-input takes others'
            raise ValueError(f'positions must have shape {wanted}, got {positions.shape}{hint}.')
        if not np.isfinite(positions).all():
            raise ValueError(f'positions of shape {positions.shape} hold NaN or infinity.')
        return {POSITIONS: positions}


def _open_session(path: Path, threads: int | None, providers: Sequence[str]) -> Any:
    import onnxruntime

    if not path.is_file():
        raise FileNotFoundError(f'{path} is no file.')
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # that inputs have defaults is no news
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(path, options, providers=list(providers))
    except Exception as e:  # of ONNX Runtime's own classes, which have no public name
        reason = str(e).partition('\n')[0].rpartition('] : ')[2] or type(e).__name__
        raise ValueError(f'{path} is damaged, or no ONNX file that can be run: {reason.rstrip(".")}.') from None
