"""What other libraries do to a model's layers: every learned part is called as a module, so that they can."""
from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

import timm_spot  # noqa: F401  registers the models

NAMES = ['spot_vit_pico_patch8_64', 'dht_vit_pico_patch8_64', 'relevance_spot_vit_pico_patch8_64']


@pytest.fixture(params=NAMES)
def model(request):
    torch.manual_seed(0)
    return timm.create_model(request.param, num_classes=10, n_tokens=9).eval()


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def learned_layers(model):
    """Names of all layers with weights that a forward pass in eval mode must go through."""
    return {name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}


def test_forward_hooks_see_every_layer(model, images):
    called = set()
    for name, layer in model.named_modules():
        layer.register_forward_hook(lambda layer, inputs, output, name=name: called.add(name))
    model(images)
    assert learned_layers(model) <= called


def test_pruned_weights_take_effect(model, images):
    expected = model(images)
    for layer in (model.patch_embed.proj, model.patch_embed.pos_proj):
        prune.l1_unstructured(layer, 'weight', amount=0.5)
    assert (model(images) - expected).abs().max() > 1e-4


def test_offloaded_weights_are_fetched(model, images, tmp_path):
    from accelerate import cpu_offload, disk_offload

    expected = model(images)
    for offload in (cpu_offload, lambda m, **kwargs: disk_offload(m, tmp_path, **kwargs)):
        torch.testing.assert_close(offload(model, execution_device=torch.device('cpu'))(images), expected)
        from accelerate.hooks import remove_hook_from_submodules
        remove_hook_from_submodules(model)


@pytest.mark.filterwarnings('ignore:torch.ao.quantization is deprecated', 'ignore::DeprecationWarning')
@pytest.mark.filterwarnings('ignore:.*quantize_per_tensor.*', 'ignore:.*TypedStorage.*')
def test_dynamic_int8_runs(model, images):
    expected = model(images)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    answer = quantized(images)
    assert answer.shape == expected.shape and answer.isfinite().all()
    assert not torch.equal(answer, expected)


@pytest.mark.filterwarnings('ignore')  # of transformers and peft, at import
def test_adapters_of_peft_learn(model, images):
    from peft import LoraConfig, get_peft_model

    expected = model(images)
    adapted = get_peft_model(model, LoraConfig(target_modules=['patch_embed.proj', 'patch_embed.pos_proj'], r=4))
    torch.testing.assert_close(adapted.eval()(images), expected)
    adapted(images).square().sum().backward()
    gradients = {n: p.grad.abs().max() for n, p in adapted.named_parameters() if 'lora_B' in n}
    assert len(gradients) == 2 and all(g > 0 for g in gradients.values())


@pytest.mark.filterwarnings('ignore')  # of torchao, at import
def test_torchao_int8_weights_run(model, images):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    expected = model(images)
    quantize_(model, Int8WeightOnlyConfig())
    answer = model(images)
    assert answer.isfinite().all() and not torch.equal(answer, expected)
    torch.testing.assert_close(answer, expected, rtol=0, atol=0.2 * expected.abs().max().item())
