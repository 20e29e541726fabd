"""Train the predictors of a model that drops tokens, in the manner of timm's train.py.

    python recipes/train_relevance.py DATA --model deit_small_patch16_224 --keep-rate 0.7 --out output/relevance
    python recipes/train_relevance.py DATA --model deit_small_patch16_224 --keep-rate 0.5 --keep-rate 0.9 --freeze
    torchrun --nproc-per-node 8 recipes/train_relevance.py DATA --device cuda --amp ...

A script of its own because the loss compares all tokens with the dense model's and counts the masks, while timm's
train.py (1.0.31) chooses its task from a fixed list of those that see logits. All else is timm's: datasets, loaders,
optimisers, schedules, checkpoints, and the training task's base class. DATA is what timm's create_dataset opens;
OUT/last.pth.tar goes on with --resume. `timm.create_model('local-dir:OUT/model')` loads what is written at the end.
"""
from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Iterable, Optional, Tuple

import click
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import resume_checkpoint, save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, accuracy, init_distributed_device, is_primary, random_seed

import timm_spot


def over_processes(meter: AverageMeter, device: torch.device) -> float:
    """Mean of what the meters of all processes have seen."""
    total = torch.tensor([meter.sum, meter.count], dtype=torch.float32, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return (total[0] / total[1]).item()


@torch.inference_mode()
def validate(
        model: torch.nn.Module,
        batches: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        device: torch.device,
) -> float:
    """Top-1 accuracy in percent, with tokens dropped; several processes repeat a few images to have as many each."""
    model.eval()
    top1 = AverageMeter()
    for images, targets in batches:
        acc1, = accuracy(model(images.to(device)), targets.to(device))
        top1.update(acc1.item(), len(targets))
    return over_processes(top1, device)


@click.command(help=__doc__)
@click.argument('data')
@click.option('--dataset', 'kind', default='', help="timm's name of the dataset in DATA, such as torch/cifar10.")
@click.option('--train-split', default='train', show_default=True)
@click.option('--val-split', default='validation', show_default=True)
@click.option('--model', 'name', required=True, help='The dense model: any timm or subpixel VisionTransformer.')
@click.option('--weights', type=click.Path(exists=True), help="Its checkpoint; by default timm's pretrained weights.")
@click.option('--num-classes', type=int, help='Of --weights, where it differs from the model\'s own.')
@click.option('--keep-rate', 'keep_rates', type=float, multiple=True, default=(0.7,), show_default=True,
              help='Share that each stage keeps; given twice, drawn from that range at each step.')
@click.option('--stage', 'stages', type=int, multiple=True, help='Blocks in front of which tokens fall.')
@click.option('--read', type=click.Choice(['all', 'last']), default='last', show_default=True)
@click.option('--ratio-weight', default=2.0, show_default=True)
@click.option('--logit-weight', default=0.5, show_default=True)
@click.option('--token-weight', default=0.5, show_default=True)
@click.option('--freeze', is_flag=True, help='Train the predictors only.')
@click.option('--backbone-lr-scale', default=0.01, show_default=True, help="The backbone's share of the learning rate.")
@click.option('--epochs', default=30, show_default=True)
@click.option('--batch-size', '-b', default=128, show_default=True, help='Of each process.')
@click.option('--opt', default='adamw', show_default=True)
@click.option('--lr', default=1e-3, show_default=True)
@click.option('--weight-decay', default=0.05, show_default=True)
@click.option('--sched', default='cosine', show_default=True)
@click.option('--warmup-epochs', default=1, show_default=True)
@click.option('--clip-grad', default=1.0, show_default=True)
@click.option('--no-aug', is_flag=True, help='No random crops, flips and colours, as for digits.')
@click.option('--workers', '-j', default=4, show_default=True)
@click.option('--device', 'device_name', default='cpu', show_default=True)
@click.option('--amp', is_flag=True, help='Train under bfloat16 autocast.')
@click.option('--seed', default=42, show_default=True)
@click.option('--resume', type=click.Path(exists=True), help='Checkpoint to go on from.')
@click.option('--out', type=click.Path(path_type=Path), required=True, help='Folder for checkpoints and the model.')
def main(
        data: str,
        kind: str,
        train_split: str,
        val_split: str,
        name: str,
        weights: Optional[str],
        num_classes: Optional[int],
        keep_rates: Tuple[float, ...],
        stages: Tuple[int, ...],
        read: str,
        ratio_weight: float,
        logit_weight: float,
        token_weight: float,
        freeze: bool,
        backbone_lr_scale: float,
        epochs: int,
        batch_size: int,
        opt: str,
        lr: float,
        weight_decay: float,
        sched: str,
        warmup_epochs: int,
        clip_grad: float,
        no_aug: bool,
        workers: int,
        device_name: str,
        amp: bool,
        seed: int,
        resume: Optional[str],
        out: Path,
) -> None:
    process = SimpleNamespace(device=device_name)
    device, distributed = init_distributed_device(process), process.distributed
    random_seed(seed, process.rank)
    overlay = dict(file=weights, num_classes=num_classes) if weights else None
    dense = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes).to(device).eval()
    model = timm_spot.sparsify(dense, keep_rate=sum(keep_rates) / len(keep_rates), stages=stages or None, read=read)
    backbone = [p for name, p in model.named_parameters() if not name.startswith('predictors.')]
    for p in backbone:
        p.requires_grad_(not freeze)
    groups = [dict(params=list(model.predictors.parameters()))]
    if not freeze:
        groups.append(dict(params=backbone, lr=lr * backbone_lr_scale))
    optimizer = create_optimizer_v2(groups, opt, lr=lr, weight_decay=weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched, num_epochs=epochs, warmup_epochs=warmup_epochs, warmup_prefix=True)
    task = timm_spot.RelevanceTask(
        model, dense, keep_rate=keep_rates[0] if len(keep_rates) == 1 else keep_rates, ratio_weight=ratio_weight,
        logit_weight=logit_weight, token_weight=token_weight, device=device, verbose=is_primary(process))
    start = resume_checkpoint(model, resume, optimizer, log_info=is_primary(process)) if resume else 0
    scheduler.step(start)
    if distributed:
        task.prepare_distributed()

    config = resolve_data_config(model=dense)
    loaders = {
        split: create_loader(
            create_dataset(kind, root=data, split=split, is_training=training, batch_size=batch_size),
            input_size=config['input_size'], batch_size=batch_size, is_training=training, no_aug=no_aug,
            num_workers=workers, interpolation=config['interpolation'], mean=config['mean'], std=config['std'],
            crop_pct=config['crop_pct'], crop_mode=config['crop_mode'], distributed=distributed, use_prefetcher=False)
        for split, training in ((train_split, True), (val_split, False))}
    saver = None
    if is_primary(process):
        out.mkdir(parents=True, exist_ok=True)
        saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(out), max_history=3)
    autocast = torch.autocast(device.type, torch.bfloat16) if amp else nullcontext()
    before = validate(dense, loaders[val_split], device)
    if saver:
        click.echo(f'{name}: {before:.2f} % before')
    for epoch in range(start, epochs):
        if distributed:
            loaders[train_split].sampler.set_epoch(epoch)
        task.train()
        meters = {term: AverageMeter() for term in ('loss', 'task_loss', 'ratio_loss', 'logit_loss', 'token_loss')}
        for images, targets in loaders[train_split]:
            with autocast:
                result = task(images.to(device), targets.to(device))
            if not result['loss'].isfinite():
                raise click.ClickException(f'the loss is {result["loss"].item()} in epoch {epoch}: lower --lr.')
            result['loss'].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            for term, meter in meters.items():
                meter.update(result[term].item(), len(targets))
        scheduler.step(epoch + 1)
        top1 = validate(model, loaders[val_split], device)
        terms = {term: over_processes(meter, device) for term, meter in meters.items()}
        if saver:
            saver.save_checkpoint(epoch, metric=top1)
            click.echo(f'epoch {epoch}  top-1 {top1:.2f}  ' + '  '.join(f'{k} {v:.4f}' for k, v in terms.items()))
    if saver:
        save_for_hf(model, str(out / 'model'), safe_serialization=True)
    if distributed:
        torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main()
