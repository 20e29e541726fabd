"""Exported files of one small model, written once."""
from __future__ import annotations

import pytest
import timm
import torch

import timm_spot

TINY = dict(embed_dim=64, depth=1, num_heads=2, num_classes=3)


@pytest.fixture(scope='session')
def tiny():
    """A subpixel ViT whose attention tells tokens apart, with the names of its classes."""
    torch.manual_seed(0)
    model = timm.create_model('spot_vit_pico_patch8_64', **TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.pretrained_cfg = dict(model.pretrained_cfg, label_names=['ape', 'bee', 'cow'], num_classes=3)
    return model


@pytest.fixture(scope='session')
def float_file(tiny, tmp_path_factory):
    """Of any size and any budget."""
    path = tmp_path_factory.mktemp('float') / 'any.onnx'
    timm_spot.export_model(tiny, path)
    return path


@pytest.fixture(scope='session')
def fixed_file(tiny, tmp_path_factory):
    """Of nine tokens and 64 x 64 bytes."""
    path = tmp_path_factory.mktemp('fixed') / 'fixed.onnx'
    timm_spot.export_model(tiny, path, n_tokens=9, uint8=True)
    return path


@pytest.fixture(scope='session')
def int8_file(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp('int8') / 'int8.onnx'
    timm_spot.export_model(tiny, path, int8=True, uint8=True)
    return path
