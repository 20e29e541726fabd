"""The reference numbers of the hierarchical tokenizer, from `tests/data/dht`."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, Tuple

import timm
import torch
from safetensors import safe_open
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import timm_spot
from timm_spot.models.dht_checkpoint import checkpoint_filter_fn

DATA = Path(__file__).parent / 'data' / 'dht'
MAIN = ('released_64x64', 'released_96x128', 'released_50x67', 'random_64x64')
_MEAN, _STD = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))


def load(name: str) -> Tuple[Dict[str, torch.Tensor], Dict[str, Any]]:
    """Tensors and settings of one file, its images normalised."""
    with safe_open(DATA / f'{name}.safetensors', 'pt') as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        config = json.loads(file.metadata()['config'])
    return {k: (v / 255 - _MEAN) / _STD if k.endswith('image') and v.dtype == torch.uint8 else v
            for k, v in tensors.items()}, config


def tokenizer_settings(config: Dict[str, Any]) -> Dict[str, Any]:
    names = ('hid_ch', 'cmp', 'iota', 'criterion', 'center', 'min_avg_region', 'compute_grad')
    return {name: config[name] for name in names}


def make_tokenizer(name: str) -> timm_spot.HierarchicalTokenizer:
    """The tokenizer of one file, in eval mode."""
    tensors, config = load(name)
    weights = {k.removeprefix('weights.').removeprefix('model.'): v for k, v in tensors.items()
               if k.startswith(('weights.', 'model.'))}
    return timm_spot.HierarchicalTokenizer(**tokenizer_settings(config)).load_authors(weights).eval()


def make_model(
        tensors: Dict[str, torch.Tensor],
        config: Dict[str, Any],
        prefix: str = 'weights.',
        **kwargs: Any,
) -> timm_spot.models.DhtVisionTransformer:
    """A small dHT ViT with the weights of one golden file as far as it has them."""
    keys = {'pos_size': 'pos_patch_size', 'pos_scale': 'pos_patch_scale'}
    model = timm.create_model(
        'dht_vit_pico_patch8_64', embed_dim=config['embed_dim'], n_tokens=config['target'], strict=False,
        tokenizer=tokenizer_settings(config), **{k: config[v] for k, v in keys.items() if v in config}, **kwargs).eval()
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    missing = model.load_state_dict(checkpoint_filter_fn(weights, model), strict=False)
    assert missing.unexpected_keys == []
    assert not [k for k in missing.missing_keys if k.startswith(('patch_embed', 'norm_pre', 'cls_token'))]
    return model


def same_partition(a: torch.Tensor, b: torch.Tensor) -> bool:
    pairs = torch.stack([a.flatten().long(), b.flatten().long()]).unique(dim=1).shape[1]
    return len(a.unique()) == len(b.unique()) == pairs
