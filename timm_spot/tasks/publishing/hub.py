"""Model folders that timm loads (`local-dir:`, `hf-hub:`), their model cards, and publishing them on the Hub."""
from __future__ import annotations

import csv
import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import validate_repo_id
from timm.models import get_model_args, parse_model_name, save_for_hf
from torch import nn

from ...models._timm import update_model_args
from ...models.checkpoint_file import read_checkpoint
from ...models.loading import read_config, resolve_checked
from ...models.placement import SampledPlacer
from ...models.spot_config import PROJECT_PAGE
from ...models.spot_vit import SubpixelVisionTransformer

FILES = ('model.safetensors', 'config.json', 'README.md')
RESULTS = 'results.csv'
REPO_PLACEHOLDER = 'ORG/NAME'
_ACCURACY = '## Accuracy\n'

# What timm's tags say about training data.
_DATA = {
    'in1k': 'ImageNet-1k',
    'in12k': 'ImageNet-12k',
    'in21k': 'ImageNet-21k',
    'in22k': 'ImageNet-22k',
    'mae': 'ImageNet-1k (without labels)',
    'dino': 'ImageNet-1k (without labels)',
    'lvd142m': 'LVD-142M (without labels)',
    'laion2b': 'LAION-2B (image and text pairs)',
    'webli': 'WebLI (image and text pairs)',
    'openai': "OpenAI's WIT (image and text pairs)",
    'digits': "scikit-learn's digits (UCI, Optical Recognition of Handwritten Digits)",
}

_CITATION = """```bibtex
@article{hjelkremtan2025spot,
  title={{SPoT}: Subpixel Placement of Tokens in Vision Transformers},
  author={Hjelkrem-Tan, Martine and Aasan, Marius and Arteaga, Gabriel Y. and Ram{\\'i}rez Rivera, Ad{\\'i}n},
  journal={arXiv preprint arXiv:2507.01654},
  year={2025}
}
```
"""


def save_folder(
        model: SubpixelVisionTransformer,
        folder: Path,
        source: str,
        data: str | None = None,
        data_config: dict[str, Any] | None = None,
) -> None:
    """Write model.safetensors, config.json (timm's format) and README.md, the model card.

    Args:
        model: Built by `timm.create_model` or `timm_spot.retrofit`.
        folder: An existing folder.
        source: Where the weights come from, for the card.
        data: What they were trained on, for the card; by default what the tag in the model's config says.
        data_config: Preprocessing that goes with the weights, where it is not that of the model's config.
    """
    _check_model(model)
    backbone = get_model_args(model).get('backbone')
    if backbone and parse_model_name(backbone)[0]:
        # A folder must not need another repository to be rebuilt; the source's own arguments are recorded already.
        update_model_args(model, backbone=resolve_checked(backbone)['model_name'])
    save_for_hf(model, str(folder), safe_serialization=True, data_config=data_config)
    # safetensors makes its file readable by its owner only; a lab shares it.
    shutil.copymode(folder / 'config.json', folder / 'model.safetensors')
    (folder / 'README.md').write_text(model_card(model, source, data), encoding='utf-8')


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, SubpixelVisionTransformer):
        raise TypeError(
            f'model must be a subpixel ViT, got {type(model).__name__}: timm_spot.retrofit turns a timm ViT into one.')
    if not hasattr(model, 'pretrained_cfg'):
        raise ValueError('model was not built by timm.create_model, so no config says how to build it again.')


def model_card(model: SubpixelVisionTransformer, source: str, data: str | None = None) -> str:
    """Model card in Markdown: what the model is, where its weights come from, how to use and cite it."""
    cfg, embed = model.pretrained_cfg, model.patch_embed
    name = cfg['architecture'] + (f".{cfg['tag']}" if cfg.get('tag') else '')
    backbone = get_model_args(model).get('backbone')
    parameters = sum(p.numel() for p in model.parameters())
    tag = cfg.get('tag') or ''
    data = data or ', then '.join(_DATA[part] for part in tag.split('_') if part in _DATA) or 'unknown'
    licence = cfg.get('license')
    task = 'image-classification' if model.num_classes else 'image-feature-extraction'
    retrofit = f'backbone={backbone!r}, ' if backbone else ''
    # Windows as large as the cells of their tokens, which together cover the picture.
    sized = '' if embed.convention == 'spot' else (
        f"model = timm.create_model('hf-hub:{REPO_PLACEHOLDER}', pretrained=True, n_tokens=25, coverage=1.).eval()\n")
    what = f'a subpixel Vision Transformer of {parameters / 1e6:.1f} M parameters'
    if backbone:
        what += f', {backbone} of timm retrofitted'
    return f"""---
library_name: timm
license: {licence or 'unknown'}
pipeline_tag: {task}
tags:
- timm
- timm_spot
- {task}
---
# {name}

This is {what}. It reads {embed.window} x {embed.window} px windows at continuous positions instead of the patches of a
grid ([SPoT]({PROJECT_PAGE})).

* **Weights**: {source}
* **Licence of the weights**: {licence or 'unknown, see their source'}
* **Training data**: {data}
* **Placement unless told otherwise**: {_describe_placement(model)}; convention `{embed.convention}`
* **Classes**: {model.num_classes or 'none, gives features'}

## Usage

```python
import timm, timm_spot  # pip install timm-spot

model = timm.create_model('hf-hub:{REPO_PLACEHOLDER}', pretrained=True).eval()
model = timm.create_model('hf-hub:{REPO_PLACEHOLDER}', pretrained=True, n_tokens=25, sampler='center').eval()
{sized}logits = model(images)                        # images (B, {model.in_chans}, H, W) of any size
logits = model(images, positions=positions)   # a placement of your own, (N, 2) or (B, N, 2) of (y, x) in [0, 1]
```

From a clone of timm_spot, without installing it:

```python
model = torch.hub.load(CLONE, '{cfg['architecture']}', source='local', {retrofit}pretrained=True,
                       pretrained_cfg_overlay=dict(hf_hub_id='{REPO_PLACEHOLDER}'))
```

## Citation

{_CITATION}"""


def _describe_placement(model: SubpixelVisionTransformer) -> str:
    prior = model.placer.eval_prior
    budget = f'{prior.n_tokens} tokens' if prior.n_tokens else 'as many tokens as the image has whole patches'
    budget += f', coverage {prior.coverage:g}' if prior.coverage else ''
    if isinstance(model.placer, SampledPlacer):
        return f'sampler `{prior.sampler}`, {budget}'
    return f'placer `{model.placer.name}`, a network that its makers register, {budget}'


def add_results(card: str, results: str) -> str:
    """Put a table of measured accuracy into a model card, in the place of an older one.

    Args:
        card: Markdown.
        results: CSV with the columns `sampler`, `n_tokens` and `top1` (percent); others are not shown.

    Returns:
        The card with a row for each sampler and a column for each budget.

    Raises:
        ValueError: The CSV lacks a column, or names a cell twice.
    """
    rows = list(csv.DictReader(io.StringIO(results)))
    missing = [name for name in ('sampler', 'n_tokens', 'top1') if not rows or name not in rows[0]]
    if missing:
        raise ValueError(f"{RESULTS} must have rows with the columns sampler, n_tokens, top1; it lacks {missing}.")
    cells: dict[str, dict[int, float]] = {}
    for row in rows:
        name = row['sampler'] + (f", coverage {row['coverage']}" if row.get('coverage') else '')
        if row.get('scorer'):
            name += f", {row['scorer']}"
            name += f" at keep rate {row['keep_rate']}" if row['keep_rate'] else ''
            name += f", r {row['r']}" if row.get('r') else ''
        budgets = cells.setdefault(name, {})
        if int(row['n_tokens']) in budgets:
            raise ValueError(f"{RESULTS} names {name} at {row['n_tokens']} tokens twice.")
        budgets[int(row['n_tokens'])] = float(row['top1'])
    budgets = sorted({n for row in cells.values() for n in row})
    lines = ['| sampler | ' + ' | '.join(f'{n} tokens' for n in budgets) + ' |', '|---' * (len(budgets) + 1) + '|']
    for sampler, row in cells.items():
        lines.append(f'| {sampler} | ' + ' | '.join(f'{row[n]:.1f}' if n in row else '' for n in budgets) + ' |')
    table = _ACCURACY + f'\nTop-1 in percent, from {RESULTS}.\n\n' + '\n'.join(lines) + '\n\n'
    before, found, after = card.partition(_ACCURACY)
    if found:
        _, heading, after = after.partition('## ')
    else:
        before, heading, after = card.partition('## Usage')
    return before + table + heading + after


def push_to_hub(
        model: SubpixelVisionTransformer,
        repo_id: str,
        private: bool = False,
        revision: str | None = None,
        results: str | Path | None = None,
) -> str:
    """Publish a model on the Hugging Face Hub: safetensors, config and model card, no pickles.

    Args:
        model: Built by `timm.create_model` or `timm_spot.retrofit`.
        repo_id: 'ORG/NAME'; made if there is none.
        private: Make a new repository private.
        revision: Branch; made if there is none.
        results: CSV of measured accuracy for the card, see `add_results`.

    Returns:
        Address of the repository.
    """
    _check_model(model)
    origin = model.pretrained_cfg.get('hf_hub_id') or model.pretrained_cfg.get('origin_url')
    with tempfile.TemporaryDirectory() as folder:
        save_folder(model, Path(folder), source=f'from {origin}' if origin else 'not recorded')
        if results is not None:
            (Path(folder) / RESULTS).write_text(Path(results).read_text(encoding='utf-8'), encoding='utf-8')
        return push_folder(Path(folder), repo_id, private, revision)


def check_folder(folder: str | Path, repo_id: str) -> list[str]:
    """Check that a folder holds a model that can be published under a name.

    Returns:
        Names of the files in it that are not part of the model, and stay behind.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The weights are damaged or not finite, the config is damaged or names no registered model, or
            `repo_id` is not 'ORG/NAME'.
    """
    folder = Path(folder)
    if repo_id.count('/') != 1:
        raise ValueError(f"repo_id={repo_id!r} must be 'ORG/NAME'.")
    validate_repo_id(repo_id)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: 'timm-spot convert' writes such a folder.")
    read_checkpoint(folder / 'model.safetensors')
    read_config(folder / 'config.json')
    return sorted(p.name for p in folder.iterdir() if p.name not in (*FILES, RESULTS))


def push_folder(
        folder: str | Path,
        repo_id: str,
        private: bool = False,
        revision: str | None = None,
) -> str:
    """Publish a folder that `convert` wrote; with a `results.csv` in it the card shows it, see `add_results`.

    Args:
        folder: With model.safetensors, config.json and README.md; nothing else is uploaded.
        repo_id: 'ORG/NAME'; made if there is none.
        private: Make a new repository private.
        revision: Branch; made if there is none.

    Returns:
        Address of the repository.

    Raises:
        FileNotFoundError, ValueError: The folder holds no such model, see `check_folder`.
    """
    from ... import __version__

    folder = Path(folder)
    check_folder(folder, repo_id)
    card = folder.joinpath('README.md').read_text(encoding='utf-8').replace(REPO_PLACEHOLDER, repo_id)
    if (folder / RESULTS).is_file():
        card = add_results(card, (folder / RESULTS).read_text(encoding='utf-8'))
    operations = [CommitOperationAdd(name, str(folder / name)) for name in FILES if name != 'README.md']
    operations.append(CommitOperationAdd('README.md', card.encode()))

    api = HfApi(library_name='timm_spot', library_version=__version__)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    api.create_commit(repo_id, operations, commit_message='Add model with timm_spot', revision=revision)
    return str(url)
