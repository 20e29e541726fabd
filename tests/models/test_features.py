from __future__ import annotations

import timm
import torch
from conftest import SMALL

import timm_spot  # noqa: F401  registers the models
from timm_spot.models._features import format_intermediates, tokens_to_map


def test_map_of_a_lattice_is_row_by_row():
    tokens = torch.arange(6.).view(1, 6, 1).expand(1, 6, 2)
    assert tokens_to_map(tokens, (2, 3))[0, 0].tolist() == [[0., 1., 2.], [3., 4., 5.]]


def test_results_are_those_of_timm_s_own_vit():
    """For each combination of arguments, on the tokens of a timm ViT."""
    torch.manual_seed(0)
    vit = timm.create_model('vit_tiny_patch16_224', img_size=32, reg_tokens=1, **SMALL).eval()
    images = torch.randn(2, 3, 32, 32)
    taken = []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, inputs, output: taken.append(output))
    last = vit.forward_features(images)
    blocks = taken[:2]
    for prefix in (False, True):
        for dictionary in (False, True):
            theirs = vit.forward_intermediates(
                images, return_prefix_tokens=prefix, output_fmt='NLC', output_dict=dictionary)
            ours = format_intermediates(blocks, last, 2, prefix, dictionary)
            for a, b in zip(flatten(ours), flatten(theirs), strict=True):
                torch.testing.assert_close(a, b)


def flatten(result):
    if isinstance(result, dict):
        return [x for key in sorted(result) for x in flatten(result[key])]
    return [x for part in result for x in flatten(part)] if isinstance(result, (list, tuple)) else [result]


def test_intermediates_with_prefix_norm_and_dictionary():
    model = timm.create_model('spot_vit_pico_patch8_64', reg_tokens=2, **SMALL).eval()
    images = torch.randn(2, 3, 64, 64)
    result = model.forward_intermediates(
        images, indices=[1], return_prefix_tokens=True, norm=True, output_dict=True, stop_early=True)
    assert result['image_intermediates'][0].shape == (2, 64, 8, 8)
    assert result['image_intermediates_prefix'][0].shape == (2, 3, 64)
    features = model.forward_features(images)
    torch.testing.assert_close(result['image_features'], features)
    torch.testing.assert_close(result['image_intermediates_prefix'][0], features[:, :3])
    pairs = model.forward_intermediates(images, indices=[1], return_prefix_tokens=True, intermediates_only=True)
    assert len(pairs[0]) == 2
