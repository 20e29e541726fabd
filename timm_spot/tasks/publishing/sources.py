"""What `convert` takes: files, folders and repositories, each as a model that holds its weights."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.models import VisionTransformer, split_model_name_tag
from timm.models.vision_transformer import checkpoint_filter_fn as timm_filter_fn

from ...models.checkpoint_file import Checkpoint, StateDict, read_checkpoint, shorten
from ...models.loading import check_fit, create_checked
from ...models.spot_checkpoint import checkpoint_filter_fn, is_authors
from ...models.spot_config import PROJECT_PAGE
from ...models.spot_retrofit import check_patch_grid
from ...models.spot_vit import SubpixelVisionTransformer
from ...models.spot_zoo import default_cfgs
from ...models.subpixel_embed import SIZE_WEIGHT
from . import run_arguments

_SUFFIXES = ('.pth', '.tar', '.pt', '.bin', '.ckpt', '.safetensors')
# Of a config, what is true of certain weights only; a name without a tag brings those of its default weights.
_OF_WEIGHTS = (
    'tag', 'license', 'description', 'origin_url', 'paper_ids', 'paper_name', 'notes', 'label_names',
    'label_descriptions', 'url', 'file', 'hf_hub_id', 'hf_hub_filename', 'source')


@dataclass
class Source:
    """A model to convert.

    Attributes:
        model: Filled, in eval mode.
        tensors: What the source itself holds, under its own names.
        origin: Where it comes from, for the model card.
        entry: Of the file, under which the weights stood.
        ignored: What else the file holds.
        data: What the weights were trained on, if the file says so.
        data_config: Preprocessing that goes with them, if the file says so.
    """

    model: VisionTransformer
    tensors: StateDict
    origin: str
    entry: str = ''
    ignored: tuple[str, ...] = ()
    data: str | None = None
    data_config: dict[str, Any] | None = None


def load_source(source: str | Path, model: str | None = None) -> Source:
    """Load what `convert` is to convert, see there for the arguments and the errors."""
    name = timm_name(source)
    if name:
        built = create_checked(name, pretrained=True).eval()
        if not isinstance(built, SubpixelVisionTransformer):
            check_patch_grid(built)
        # Prefix tokens are changed in place by a retrofit.
        tensors = {k: v.clone() if k in ('cls_token', 'reg_token') else v for k, v in built.state_dict().items()}
        return Source(built, tensors, name)
    path = Path(source)
    if not path.is_file() and not path.is_dir():
        raise FileNotFoundError(f'{path} is no file.')
    return _load_file(path, read_checkpoint(path), model)


def timm_name(source: str | Path) -> str | None:
    """The source as `timm.create_model` names it, if it is a model folder or a repository; None for a file."""
    if str(source).startswith(('hf-hub:', 'local-dir:')):
        return str(source)
    path = Path(source)
    if path.is_dir():
        return f'local-dir:{path}'
    if not path.exists() and str(source).count('/') == 1 and path.suffix not in _SUFFIXES:
        return f'hf-hub:{source}'
    return None


def _load_file(path: Path, checkpoint: Checkpoint, model: str | None) -> Source:
    tensors, args, where = checkpoint.tensors, checkpoint.args, str(path)
    name = model or run_arguments.model_name(args, where) or recognise(tensors, path)
    if is_authors(tensors):
        name = _with_authors_tag(name)
    keywords, left_out = run_arguments.model_keywords(args, where)
    built = _fill(name, tensors, keywords, where)
    settings = run_arguments.preprocessing(args, where)
    data_config = resolve_data_config(settings, model=built) if settings else None
    origin = f'the file {path.name}, weights of {name}'
    if is_authors(tensors):
        origin += f', as released by its authors at {PROJECT_PAGE}'
    if not split_model_name_tag(name)[1]:
        built.pretrained_cfg = {k: v for k, v in built.pretrained_cfg.items() if k not in _OF_WEIGHTS}
        built.default_cfg = built.pretrained_cfg
    return Source(
        built, tensors, origin, checkpoint.entry, (*checkpoint.ignored, *left_out), run_arguments.dataset_name(args),
        data_config)


def recognise(tensors: StateDict, source: str | Path) -> str:
    """Name of the model whose weights these are; only the authors' tell it themselves."""
    if is_authors(tensors):
        base = tensors['embedder.emb.weight'].shape == (768, 1024) and 'blocks.11.norm1.weight' in tensors
        if base and 'fc_norm.weight' in tensors:
            return 'spot_vit_base_patch16_mae.spot_in1k'
        if base:
            raise ValueError(
                f"{source} fits two models: say whether it is model='spot_vit_base_patch16_in21k.spot_in21k_ft_in1k' "
                "or model='spot_vit_base_patch16_in1k.spot_in1k' (--model).")
    raise ValueError(
        f'{source} does not say whose weights it holds: give the name that timm has for them as model= (--model). '
        f'Its first keys are {shorten(list(tensors))}.')


def _with_authors_tag(name: str) -> str:
    """The tag of the authors' weights brings the preprocessing that goes with them."""
    known = default_cfgs.get(name)  # of names without a tag
    tags = [tag for tag, cfg in known.cfgs.items() if cfg.convention == 'spot'] if known else []
    return f'{name}.{tags[0]}' if tags else name


def _fill(name: str, tensors: StateDict, keywords: dict[str, Any], where: str) -> VisionTransformer:
    """Build the named model with these keywords, and fill it."""
    head = tensors.get('head.weight')
    keywords = dict(keywords, num_classes=0 if head is None else head.shape[0])
    if SIZE_WEIGHT in tensors:
        keywords.setdefault('size_embed', True)
    _check_size(create_checked(name, device='meta', **keywords), tensors, name, where)
    model = create_checked(name, **keywords).eval()
    if model.pretrained_cfg['num_classes'] != model.num_classes:
        names = ('label_names', 'label_descriptions')
        model.pretrained_cfg = {k: v for k, v in model.pretrained_cfg.items() if k not in names}
        model.pretrained_cfg['num_classes'] = model.num_classes
        model.default_cfg = model.pretrained_cfg
    if isinstance(model, SubpixelVisionTransformer):
        tensors = checkpoint_filter_fn(tensors, model)
    else:
        tensors = timm_filter_fn(tensors, model, adapt_layer_scale=True)
    check_fit(tensors, model, where, name)
    model.load_state_dict(tensors)
    return model


def _check_size(model: torch.nn.Module, tensors: StateDict, name: str, where: str) -> None:
    """Raise ValueError unless a model, built without memory, is one that the weights can fill and that can be run."""
    if not isinstance(model, SubpixelVisionTransformer):
        check_patch_grid(model)
    size, given = (sum(v.numel() for v in values) for values in (model.state_dict().values(), tensors.values()))
    if size > 2 * given + 10_000_000:
        raise ValueError(
            f'the weights in {where} are not those of {name}: {given:,} numbers for a model of {size:,}. Give the '
            'model and the keywords that they were made with.')
    tokens = max(model.patch_embed.num_patches, getattr(model, 'n_tokens', 0))
    if tokens > run_arguments.MAX_TOKENS:
        raise ValueError(f'{name} would have {tokens:,} tokens, as {where} says; at most {run_arguments.MAX_TOKENS:,}.')
