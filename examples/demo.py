"""The main job, offline: read held-out digits at three budgets, draw placements, time a base model on a photograph."""
from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import timm
import torch

import timm_spot
from timm_spot.tasks.pictures.files import find_images
from timm_spot.tasks.pictures.images import denormalize, load_image, model_transform

plt.switch_backend('Agg')
HERE = Path(__file__).parent
PICTURE = HERE / 'placements.png'
ROWS = (('digits', 9), ('digits_placed', 9), ('digits', 25), ('digits_placed', 25), ('digits', 64))
REPEATS = 7


def read_digits() -> None:
    files = find_images([str(HERE / 'digits')])
    labels = torch.tensor([int(f.stem.split('_')[1]) for f in files])
    models = {
        tag: timm.create_model(f'spot_vit_pico_patch8_64.{tag}', pretrained=True).eval() for tag, _ in ROWS}
    transform = model_transform(models['digits'])
    images = torch.stack([load_image(f, transform) for f in files])
    print(f'{len(files)} canvases of handwritten digits never seen in training, spot_vit_pico_patch8_64:')
    figure, axes = plt.subplots(len(ROWS), 6, figsize=(9, 7.6), layout='constrained')
    for (tag, n_tokens), row in zip(ROWS, axes):
        model = models[tag]
        model.set_placement(n_tokens=n_tokens)
        with torch.inference_mode():
            answers = model(images).argmax(dim=1)
        placed = 'on an even lattice' if tag == 'digits' else 'placed by the network that looks first'
        print(f'  {n_tokens:3d} tokens {placed}: {(answers == labels).sum()} of {len(files)} right')
        for image, positions, answer, label, ax in zip(images, model.place(images), answers, labels, row):
            timm_spot.draw_placement(denormalize(model, image), positions, model.patch_embed.window, ax=ax)
            ax.set_title(f'{answer}', color='black' if answer == label else 'red', fontsize=9)
        row[0].set_ylabel(f'{n_tokens} {"even" if tag == "digits" else "placed"}')
    figure.savefig(PICTURE, dpi=120)
    print(f'  placements and answers drawn in {PICTURE}')


def time_base_models() -> None:
    spot = timm.create_model('spot_vit_base_patch16_mae').eval()
    vit = timm.create_model('vit_base_patch16_224', global_pool='avg', class_token=True).eval()
    image = load_image(HERE / 'photos' / 'cowbike.jpg', model_transform(spot))[None]
    runs = {
        'timm vit_base_patch16_224, 196 patches': lambda: vit(image),
        'spot_vit_base_patch16_mae, 196 tokens': lambda: spot(image, positions[196]),
        'spot_vit_base_patch16_mae,  25 tokens': lambda: spot(image, positions[25]),
    }
    positions = {n: timm_spot.sample_positions('isotropic', n, (224, 224)) for n in (25, 196)}
    seconds = {name: [] for name in runs}
    with torch.inference_mode():
        for _ in range(REPEATS):  # taking turns, so that a busy moment of the machine hits them all
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begin)
    print(f'\nOne photograph, batch 1, {torch.get_num_threads()} CPU threads, float32, median of {REPEATS}:')
    for name, times in seconds.items():
        print(f'  {name}: {1 / median(times):5.1f} images/s')
    print('  (random weights: what a base model answers means nothing before its weights are downloaded)')


if __name__ == '__main__':
    read_digits()
    time_base_models()
