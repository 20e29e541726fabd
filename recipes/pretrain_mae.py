"""Pretrain a subpixel ViT by masked reconstruction (SPoT-MAE), with timm's loaders, optimisers and schedulers.

    python recipes/pretrain_mae.py --data-dir build/digits_folder --model spot_mae_vit_pico_patch8_64 --out build/mae
    torchrun --nproc-per-node 8 recipes/pretrain_mae.py --data-dir imagenet --model spot_mae_vit_base_patch16 \\
        --batch-size 512 --epochs 800 --warmup-epochs 40 --amp --out build/mae

Writes timm checkpoints (OUT/last.pth.tar goes on with --resume), OUT/log.csv, a picture of reconstructions
(OUT/reconstruction.png, wants matplotlib) and OUT/encoder.safetensors, which timm's train.py fine-tunes:
--model spot_vit_base_patch16_mae --pretrained --pretrained-path OUT/encoder.safetensors
"""
from __future__ import annotations

import argparse
import math
import time
from contextlib import nullcontext
from pathlib import Path

import click
import timm
import torch
from safetensors.torch import save_file
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ParseKwargs, init_distributed_device, is_primary, random_seed, reduce_tensor

import timm_spot


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True, help='Folder with a subfolder train/.')
    parser.add_argument('--out', type=Path, required=True, help='Folder of checkpoints, log and encoder.')
    parser.add_argument('--model', default='spot_mae_vit_base_patch16')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
    parser.add_argument('--epochs', type=int, default=800)
    parser.add_argument('--warmup-epochs', type=int, default=40)
    parser.add_argument('--batch-size', type=int, default=64, help='Of each process.')
    parser.add_argument('--opt', default='adamw')
    parser.add_argument('--lr', type=float, help='By default 1.5e-4 for each 256 images of the global batch.')
    parser.add_argument('--weight-decay', type=float, default=0.05)
    parser.add_argument('--scale', type=float, nargs=2, default=(0.2, 1.0), help='Of random crops; 1 1 for none.')
    parser.add_argument('--hflip', type=float, default=0.5)
    parser.add_argument('--workers', type=int, default=4)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--amp', action='store_true', help='bfloat16.')
    parser.add_argument('--resume', default='', help='Checkpoint to go on from.')
    parser.add_argument('--seed', type=int, default=42)
    return parser.parse_args()


@torch.inference_mode()
def draw(model: torch.nn.Module, images: torch.Tensor, path: Path) -> None:
    """Save a row for each image: the image, the windows seen of it, what the model made of the others."""
    from matplotlib.figure import Figure

    result = model.eval()(images)
    figure = Figure(figsize=(6, 2 * len(images)), layout='constrained')
    for i, axes in enumerate(figure.subplots(len(images), 3, squeeze=False)):
        timm_spot.draw_reconstruction(images[i], result, i, axes)
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse_args()
    if not (args.data_dir / 'train').is_dir():
        raise SystemExit(f'there is no folder {args.data_dir / "train"}.')
    device = init_distributed_device(args)
    random_seed(args.seed, args.rank)
    model = timm.create_model(args.model, **args.model_kwargs).to(device)
    data = resolve_data_config(vars(args), model=model)
    loader = create_loader(
        create_dataset('', root=args.data_dir, split='train', is_training=True),
        input_size=data['input_size'],
        batch_size=args.batch_size,
        is_training=True,
        use_prefetcher=device.type != 'cpu',
        scale=args.scale,
        ratio=(1., 1.) if args.scale[0] == 1. else None,
        hflip=args.hflip,
        color_jitter=None,
        interpolation=data['interpolation'],
        mean=data['mean'],
        std=data['std'],
        num_workers=args.workers,
        distributed=args.distributed,
        device=device,
    )
    lr = args.lr or 1.5e-4 * args.batch_size * args.world_size / 256
    optimizer = create_optimizer_v2(model, args.opt, lr=lr, weight_decay=args.weight_decay, betas=(0.9, 0.95))
    start = resume_checkpoint(model, args.resume, optimizer, log_info=is_primary(args)) if args.resume else 0
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=args.epochs, warmup_epochs=args.warmup_epochs, warmup_lr=0.,
        step_on_epochs=False, updates_per_epoch=len(loader))
    step = start * len(loader)
    scheduler.step_update(step)
    trained = model
    if args.distributed:
        trained = torch.nn.parallel.DistributedDataParallel(model)
    saver = None
    if is_primary(args):
        args.out.mkdir(parents=True, exist_ok=True)
        saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(args.out), decreasing=True, max_history=1)

    trained.train()
    for epoch in range(start, args.epochs):
        if args.distributed:
            loader.sampler.set_epoch(epoch)
        begin, total = time.time(), 0.
        for images, _ in loader:
            with torch.autocast(device.type, torch.bfloat16) if args.amp else nullcontext():
                loss = trained(images.to(device)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            scheduler.step_update(step)
            total += reduce_tensor(loss.detach(), args.world_size).item() if args.distributed else loss.item()
            if not math.isfinite(total):
                raise SystemExit(f'the loss is {loss.item()} in step {step}: lower --lr, or train without --amp.')
        mean = total / len(loader)
        if saver:
            click.echo(f'epoch {epoch:3d}  loss {mean:.4f}  {time.time() - begin:.0f} s')
            with open(args.out / 'log.csv', 'a') as log:
                log.write(f'{epoch},{mean:.5f}\n')
            saver.save_checkpoint(epoch, mean)
    if saver:
        save_file({k: v.contiguous() for k, v in model.encoder_state_dict().items()}, args.out / 'encoder.safetensors')
        draw(model, images[:3].to(device), args.out / 'reconstruction.png')
    if args.distributed:
        torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main()
