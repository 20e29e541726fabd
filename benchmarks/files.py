"""From JPEG files on disk to logits at 25 tokens: where the time goes, with float and with uint8 images.

    python -m benchmarks files

Both paths read with timm's dataset, transforms and loader. The float path normalises as timm does
(`use_prefetcher=True`: the whole batch, after loading); the uint8 path hands the loader's bytes to the model.
"""
from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any, Dict, List

import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform, resolve_model_data_config

from .measure import Config, Section, alternate, milliseconds, now
from .references import BASE

PHOTOS = Path(__file__).parent.parent / 'examples' / 'photos'
N_TOKENS = 25
BATCH = 8
STAGES = ('decode', 'transform', 'tokenize', 'encode')


def run(config: Config) -> Section:
    section = Section()
    model = timm.create_model(BASE, n_tokens=N_TOKENS, **config.model_args).to(config.device).eval()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        write_photos(Path(folder), 2 * BATCH if config.quick else 16 * BATCH)
        _shares(section, config, model, folder)
        _loaders(section, config, model, folder)
    return section


def write_photos(folder: Path, count: int) -> None:
    """JPEGs of 500 x 375 px, the usual size of ImageNet's, cut from the photographs in examples/."""
    (folder / 'photos').mkdir()
    sources = [Image.open(path).convert('RGB') for path in sorted(PHOTOS.glob('*.jpg'))]
    for i in range(count):
        source = sources[i % len(sources)]
        width, height = source.size
        left, top = (7 * i) % (width // 8), (5 * i) % (height // 8)
        crop = source.crop((left, top, left + width * 7 // 8, top + height * 7 // 8))
        crop.resize((500, 375)).save(folder / 'photos' / f'{i:04d}.jpg', quality=90)


def _shares(section: Section, config: Config, model: torch.nn.Module, folder: str) -> None:
    rows = section.table(
        f'JPEG (500 x 375 px) to logits, {N_TOKENS} tokens, float32, batch {BATCH}, one process: ms a batch, share',
        'images', *STAGES, 'all')
    paths = sorted(Path(folder).glob('photos/*.jpg'))[:BATCH]
    data = resolve_model_data_config(model)
    transforms = {
        'float32': create_transform(**data, is_training=False),
        'uint8': create_transform(**data, is_training=False, normalize=False),
    }
    stages: Dict[str, Dict[str, List[float]]] = {kind: {s: [] for s in STAGES} for kind in transforms}

    def pipeline(kind: str) -> None:
        begin = now(config.device)
        pictures = [Image.open(path).convert('RGB') for path in paths]
        decoded = now(config.device)
        batch = torch.stack([transforms[kind](picture) for picture in pictures]).to(config.device)
        transformed = now(config.device)
        tokens = model.patch_embed(batch)
        tokenized = now(config.device)
        x = model.norm_pre(model.patch_drop(model._pos_embed(tokens)))
        model.forward_head(model.norm(model.blocks(x)))
        ends = (begin, decoded, transformed, tokenized, now(config.device))
        for stage, start, end in zip(STAGES, ends, ends[1:]):
            stages[kind][stage].append(end - start)

    totals = alternate({kind: lambda k=kind: pipeline(k) for kind in transforms}, config)
    for kind, times in stages.items():
        medians = [statistics.median(values[1:]) for values in times.values()]
        shares = [f'{milliseconds(m)} ({m / sum(medians):.0%})' for m in medians]
        rows.append([kind, *shares, milliseconds(totals[kind])])
    section.judge(
        'files to logits, 25 tokens, one process: speed of uint8 images over float32',
        totals['float32'] / totals['uint8'], at_least=1)


def _loaders(section: Section, config: Config, model: torch.nn.Module, folder: str) -> None:
    dataset = create_dataset('', folder)
    data: Dict[str, Any] = resolve_model_data_config(model)
    rows = section.table(
        f"timm's loader to logits, {N_TOKENS} tokens, float32, batch {BATCH}, {len(dataset)} JPEGs, images/s",
        'workers', 'float32 images', 'uint8 images', 'ratio')
    for workers in (1, 2):
        loader = create_loader(
            dataset, batch_size=BATCH, num_workers=workers, device=torch.device(config.device), **data)

        # Inside timm's prefetcher is the loader of the bytes that the prefetcher would normalise.
        kinds = {'float32': loader, 'uint8': loader.loader}

        def read_all(kind: str, kinds: Dict[str, Any] = kinds) -> None:
            for images, _ in kinds[kind]:
                model(images.to(config.device))

        t = alternate({kind: lambda k=kind: read_all(k) for kind in kinds}, config, rounds=5)
        ratio = t['float32'] / t['uint8']
        rows.append([
            str(workers), *(f'{len(dataset) / t[kind]:.1f}' for kind in kinds), f'{ratio:.2f}'])
        section.judge(f"the same through timm's loader, {workers} workers", ratio, at_least=1)
