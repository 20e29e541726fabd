"""Train the density of a subpixel ViT's placer to follow attention: no labels, no search, no pass back through the ViT.

    python recipes/train_placer.py DATA --model spot_vit_pico_patch8_64.digits --out output/placer
    python recipes/train_placer.py DATA --model MODEL --teacher attention:vit_small_patch16_224.dino --out output/placer
    torchrun --nproc-per-node 8 recipes/train_placer.py DATA --device cuda ...

The target is what the patches receive in the last block of the model itself, at its full budget; or the class token's
attention in another ViT, a folder of maps, or what else `timm-spot --saliency` takes. Pictures are seen as in
evaluation. OUT/last.pth.tar goes on with --resume. `timm.create_model('local-dir:OUT/model')` loads what is written at
the end: the model as it was, with its placer. Both can then be trained together by timm's train.py, see
docs/placers.md.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Iterator, List, Optional, Tuple

import click
import torch
from timm.models import resume_checkpoint, save_for_hf
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, init_distributed_device, is_primary, random_seed
from torch.utils.data import DataLoader

import timm_spot
from timm_spot.models.density_placer import DensityPlacer
from timm_spot.models.loading import create_checked
from timm_spot.ops.density import density_loss
from timm_spot.tasks.pictures.datasets import Pictures, Transformed
from timm_spot.tasks.pictures.images import model_transform
from timm_spot.tasks.pictures.saliency_maps import saliency_source


class DensityLoss(torch.nn.Module):
    """The loss as the `forward` of a module, which is what DistributedDataParallel can call."""

    def __init__(self, placer: DensityPlacer) -> None:
        super().__init__()
        self.placer = placer

    def forward(self, images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        return density_loss(self.placer.density(images), maps)


def read(
        pictures: Pictures,
        transform: Callable[..., torch.Tensor],
        order: torch.Tensor,
        batch_size: int,
        workers: int,
) -> Iterator[Tuple[torch.Tensor, List[str]]]:
    """Images (B, C, H, W) and the names of their pictures, without those that cannot be read."""
    dataset = Transformed(pictures, transform)
    for batch in DataLoader(dataset, batch_size, sampler=order.tolist(), num_workers=workers, collate_fn=list):
        for item in batch:
            if item.broken:
                click.echo(f'left out: {item.broken}', err=True)
        kept = [item for item in batch if item.image is not None]
        if kept:
            yield torch.stack([item.image for item in kept]), [pictures.name(item.index) for item in kept]


def over_processes(meter: AverageMeter, device: torch.device) -> float:
    """Mean of what the meters of all processes have seen."""
    total = torch.tensor([meter.sum, meter.count], dtype=torch.float32, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return (total[0] / total[1]).item()


@click.command(help=__doc__)
@click.argument('data')
@click.option('--train-split', default='train', show_default=True)
@click.option('--val-split', default='validation', show_default=True)
@click.option('--model', 'name', required=True, help='A subpixel ViT; one without a density gets it.')
@click.option('--weights', type=click.Path(exists=True), help='Its checkpoint.')
@click.option('--teacher', default='self', show_default=True, help='self, attention:NAME, FOLDER, spectral, energy.')
@click.option('--epochs', default=10, show_default=True)
@click.option('--batch-size', '-b', default=64, show_default=True, help='Of each process.')
@click.option('--lr', default=3e-3, show_default=True)
@click.option('--weight-decay', default=0.01, show_default=True)
@click.option('--workers', '-j', default=0, show_default=True)
@click.option('--device', 'device_name', default='cpu', show_default=True)
@click.option('--seed', default=0, show_default=True)
@click.option('--resume', type=click.Path(exists=True), help='Checkpoint to go on from.')
@click.option('--out', type=click.Path(path_type=Path), required=True, help='Folder for checkpoints and the model.')
def main(
        data: str,
        train_split: str,
        val_split: str,
        name: str,
        weights: Optional[str],
        teacher: str,
        epochs: int,
        batch_size: int,
        lr: float,
        weight_decay: float,
        workers: int,
        device_name: str,
        seed: int,
        resume: Optional[str],
        out: Path,
) -> None:
    process = SimpleNamespace(device=device_name)
    device, distributed = init_distributed_device(process), process.distributed
    random_seed(seed)  # the same weights in every process
    model = create_checked(name, pretrained=True, pretrained_cfg_overlay=dict(file=weights) if weights else None)
    if not isinstance(model.placer, DensityPlacer):
        timm_spot.add_placer(model)
    model = model.to(device).eval()  # nothing in the placer differs between the modes
    transform = model_transform(model)
    read_maps = saliency_source(teacher, model, transform)

    loss: torch.nn.Module = DensityLoss(model.placer)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=lr, weight_decay=weight_decay)
    scheduler, _ = create_scheduler_v2(optimizer, 'cosine', num_epochs=epochs)
    start = resume_checkpoint(model, resume, optimizer, log_info=is_primary(process)) if resume else 0
    scheduler.step(start)
    if distributed:
        loss = torch.nn.parallel.DistributedDataParallel(loss)
    pictures = {split: Pictures(data, split) for split in (train_split, val_split)}

    def losses(split: str, order: torch.Tensor) -> Iterator[Tuple[torch.Tensor, int]]:
        """Loss and size of each batch of this process."""
        own = order[process.rank::process.world_size]
        for images, names in read(pictures[split], transform, own, batch_size, workers):
            images = images.to(device)
            yield loss(images, read_maps(images, names).to(device)), len(images)

    saver = None
    if is_primary(process):
        out.mkdir(parents=True, exist_ok=True)
        saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(out), max_history=1, decreasing=True)
    for epoch in range(start, epochs):
        count = len(pictures[train_split])
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))
        train, validation = AverageMeter(), AverageMeter()
        for value, size in losses(train_split, order[:count - count % process.world_size]):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            train.update(value.item(), size)
        scheduler.step(epoch + 1)
        with torch.no_grad():
            for value, size in losses(val_split, torch.arange(len(pictures[val_split]))):
                validation.update(value.item(), size)
        terms = [over_processes(meter, device) for meter in (train, validation)]
        if saver:
            saver.save_checkpoint(epoch, metric=terms[1])
            click.echo('epoch {}  training {:.4f}  validation {:.4f}'.format(epoch, *terms))
    if saver:
        save_for_hf(model, str(out / 'model'), safe_serialization=True)
    if distributed:
        torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main()
