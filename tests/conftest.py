"""Shared by all tests."""
from __future__ import annotations

import os
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import settings
from safetensors.torch import load_file

import timm_spot  # noqa: F401  registers the models

# CI draws the same examples each time, so that it fails for a change and not for a draw; locally they vary.
settings.register_profile('ci', derandomize=True)
if os.environ.get('CI'):
    settings.load_profile('ci')

collect_ignore = ['toy_placer.py', 'typed_user.py']  # register placers, which can be done once

DATA = Path(__file__).parent / 'data'
# Numbers computed once with the authors' code on random weights: name, architecture of the same pooling, image size.
# Another processor or count of threads rounds otherwise: they are matched within tolerances that leave room for it.
GOLDEN = {
    'avg_pool_224': 'spot_vit_base_patch16_mae',
    'token_pool_160x224': 'spot_vit_base_patch16_in21k',
}
SMALL = dict(embed_dim=64, depth=2, num_heads=4)


def tiny_vit(**keywords):
    torch.manual_seed(0)
    model = timm.create_model(
        'vit_tiny_patch16_224', **{**dict(img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=3), **keywords})
    for p in model.parameters():  # fresh weights attend to everything alike
        torch.nn.init.normal_(p, std=0.4)
    return model


def random_vit(name, **kwargs):
    """A timm ViT none of whose parameters is at its initial value, with a smooth position table."""
    torch.manual_seed(0)
    vit = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return vit


@pytest.fixture(params=sorted(GOLDEN))
def golden(request):
    """One golden file: its tensors, and under 'arch' and 'authors' the architecture and the authors' state dict."""
    tensors = load_file(DATA / f'{request.param}.safetensors')
    authors = {k.removeprefix('model.'): v for k, v in tensors.items() if k.startswith('model.')}
    return dict(tensors, arch=GOLDEN[request.param], authors=authors)


@pytest.fixture
def pico():
    """The smallest registered model, random weights from a fixed seed, in eval mode."""
    torch.manual_seed(0)
    return timm.create_model('spot_vit_pico_patch8_64').eval()


@pytest.fixture
def default_style():
    """matplotlib as it comes, without windows; figures are closed afterwards."""
    import matplotlib.pyplot as plt

    plt.switch_backend('Agg')
    with plt.style.context('default'):
        yield
    plt.close('all')
