"""A placement network of one's own, ten lines, through everything that a model can go through."""
from __future__ import annotations

import json

import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from timm.utils import ModelEmaV3

import timm_spot
from timm_spot.cli import main
from timm_spot.models import SpotPretrainedCfg

PICO = 'spot_vit_pico_patch8_64'


@timm_spot.register_placer('toy')
class Toy(timm_spot.Placer):
    """The even lattice, shifted by what a linear layer makes of the mean colour."""

    def __init__(self, train_prior, eval_prior):
        super().__init__(train_prior, eval_prior)
        self.shift = torch.nn.Linear(3, 2)

    def forward(self, images):
        shift = 0.2 * self.shift(images.mean(dim=(2, 3))).tanh()
        n = self.budget(images.shape[-2:])
        lattice = timm_spot.sample_positions('isotropic', n, images.shape[-2:]).to(images.device)
        return (lattice + shift[:, None]).clamp(0, 1)


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return timm.create_model(PICO, placer='toy', n_tokens=9).eval()


def test_positions_follow_the_image_and_not_its_neighbours(toy):
    images = torch.rand(3, 3, 64, 64)
    images[1] += 1
    positions = toy.place(images)
    assert positions.shape == (3, 9, 2) and positions.dtype == torch.float32
    assert (positions[0] - positions[1]).abs().max() > 1e-3
    for i in range(3):
        torch.testing.assert_close(toy.place(images[i:i + 1])[0], positions[i], rtol=0, atol=1e-6)  # other shapes
        torch.testing.assert_close(toy(images[i:i + 1])[0], toy(images)[i], rtol=1e-4, atol=1e-5)
    assert not torch.equal(toy(images), toy(images, positions=timm_spot.sample_positions('isotropic', 9, (64, 64))[0]))


def built_ways(tmp_path):
    """The same choice through every way in which it can be made."""
    cfg = dict(input_size=(3, 64, 64), num_classes=10, placer='toy', n_tokens=4)
    yield 'keyword', timm.create_model(PICO, placer='toy', n_tokens=4)
    yield 'dict', timm.create_model(PICO, pretrained_cfg=cfg)
    yield 'dataclass', timm.create_model(PICO, pretrained_cfg=SpotPretrainedCfg(**cfg))
    yield 'overlay', timm.create_model(PICO, pretrained_cfg_overlay=dict(placer='toy', n_tokens=4))
    yield 'retrofit', timm_spot.retrofit(
        'vit_tiny_patch16_224', img_size=64, depth=1, num_classes=10, placer='toy', n_tokens=4)
    timm.models.save_for_hf(timm.create_model(PICO, placer='toy', n_tokens=4), tmp_path / 'saved')
    yield 'local-dir', timm.create_model(f'local-dir:{tmp_path}/saved', pretrained=True)
    config = json.loads((tmp_path / 'saved' / 'config.json').read_text())
    for name in ('placer', 'n_tokens'):
        del config['model_args'][name]
    config['pretrained_cfg'].update(placer='toy', n_tokens=4)
    (tmp_path / 'saved' / 'config.json').write_text(json.dumps(config))
    yield 'config.json', timm.create_model(f'local-dir:{tmp_path}/saved', pretrained=True)


def test_chosen_as_a_sampler_is(tmp_path):
    for way, model in built_ways(tmp_path):
        assert isinstance(model.placer, Toy), way
        assert model.eval().place(torch.rand(2, 3, 64, 64)).shape == (2, 4, 2), way


def test_weights_lie_in_the_same_state_dict(toy, tmp_path):
    assert 'placer.shift.weight' in toy.state_dict()
    with torch.no_grad():
        toy.placer.shift.weight.fill_(0.5)
    timm.models.save_for_hf(toy, tmp_path)
    reloaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(reloaded.place(images), toy.place(images))
    assert torch.equal(reloaded(images), toy(images))


def test_asked_for_it_starts_fresh_on_weights_that_have_none():
    model = timm.create_model(PICO, pretrained=True, placer='toy')
    digits = timm.create_model(PICO, pretrained=True)
    assert torch.equal(model.patch_embed.proj.weight, digits.patch_embed.proj.weight)


def test_weights_saved_with_it_must_have_it(toy, tmp_path):
    timm.models.save_for_hf(toy, tmp_path)
    others = {k: v for k, v in toy.state_dict().items() if not k.startswith('placer.')}
    save_file(others, tmp_path / 'model.safetensors')
    with pytest.raises((RuntimeError, ValueError), match=r'placer\.shift'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)


def test_train_only_and_gradients_to_the_placer():
    model = timm.create_model(PICO, placer='toy', n_tokens=9, train_only='placer').train()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        'placer.shift.weight', 'placer.shift.bias'}
    model(torch.rand(2, 3, 64, 64)).square().sum().backward()
    assert model.placer.shift.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="train_only='placer' leaves nothing to train"):
        timm.create_model(PICO, train_only='placer')


def test_random_budgets_reach_it():
    model = timm.create_model(PICO, placer='toy', n_tokens=(4, 16), seed=3).train()
    counts = [model.place(torch.rand(1, 3, 64, 64)).shape[1] for _ in range(20)]
    assert len(set(counts)) > 5 and 4 <= min(counts) <= max(counts) <= 16
    assert model.eval().place(torch.rand(1, 3, 64, 64)).shape[1] == 16


def test_exponential_moving_average_follows_it(toy):
    ema = ModelEmaV3(toy, decay=0.5)
    before = ema.module.placer.shift.weight.clone()
    with torch.no_grad():
        toy.placer.shift.weight.add_(1)
    ema.update(toy)
    torch.testing.assert_close(ema.module.placer.shift.weight, before + 0.5)


def test_precision_of_the_model_leaves_coordinates_exact(toy):
    images = torch.rand(2, 3, 64, 64)
    exact = toy.place(images)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(toy.place(images), exact)
    low = toy.bfloat16().place(images.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0, atol=2e-3)  # images in 8 bits of mantissa


def test_uint8_images_reach_it_normalised(toy):
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(toy.place(images), toy.place(toy.normalization(images)))


@pytest.mark.parametrize('backend', ['eager', 'inductor'])
def test_compiled(toy, backend):
    images = torch.rand(2, 3, 64, 64)
    compiled = torch.compile(toy, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), toy(images), rtol=1e-4, atol=1e-5)


def test_exported(toy):
    images = torch.rand(3, 3, 64, 64)
    program = torch.export.export(toy, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images[:2]), toy(images[:2]), rtol=1e-4, atol=1e-5)


def test_a_count_that_is_not_the_budget_is_refused():
    @timm_spot.register_placer('one_token_short')
    class OneTokenShort(timm_spot.Placer):
        def forward(self, images):
            return torch.full((len(images), self.budget(images.shape[-2:]) - 1, 2), 0.5)

    model = timm.create_model(PICO, placer='one_token_short', n_tokens=9)
    with pytest.raises(ValueError, match=r"placer 'one_token_short' gave positions of shape \(2, 8, 2\).*\(B, 9, 2\)"):
        model(torch.rand(2, 3, 64, 64))


def test_distributed_training_reaches_it(toy, tmp_path):
    """Every parameter has a gradient at each step, at random budgets too: no find_unused_parameters is needed."""
    toy.set_placement(n_tokens=(4, 16))
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(toy.train())
        for _ in range(3):
            model.zero_grad()
            model(torch.rand(2, 3, 64, 64)).square().sum().backward()
            assert all(p.grad is not None for p in toy.parameters())
            assert toy.placer.shift.weight.grad.abs().max() > 0
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def saved(toy, tmp_path):
    """A folder with a model that a toy places, and two pictures in folders of their classes."""
    timm.models.save_for_hf(toy, tmp_path / 'saved')
    for label in range(10):
        (tmp_path / 'data' / str(label)).mkdir(parents=True)
        Image.effect_noise((64, 64), 40).save(tmp_path / 'data' / str(label) / 'a.png')
    return str(tmp_path / 'saved')


@pytest.mark.parametrize('command, says', [
    (['predict', 'data/3/a.png', '--n-tokens', '4', '--save-placement', 'seen.png'], 'data/3/a.png  '),
    (['draw', 'data/3/a.png', '--out', 'drawn.png', '--n-tokens', '4'], 'drawn.png  placement'),
    (['evaluate', 'data', '--samplers', 'isotropic', '--budgets', '4,9', '--out', 'rows'], '| toy |'),
    (['oracle', 'data', '--placer', 'toy', '--steps', '1', '--out', 'o.safetensors'], '10 images, 9 tokens, 1 steps'),
    (['export', 'MODEL', 'model.pt2'], 'largest difference to the model'),
    (['convert', 'MODEL', 'converted'], 'verified'),
])
def test_commands_use_it(saved, tmp_path, monkeypatch, command, says):
    monkeypatch.chdir(tmp_path)
    command = [saved if part == 'MODEL' else part for part in command]
    if command[0] not in ('export', 'convert'):
        command += ['--model', saved]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert says in result.output
    if command[0] == 'convert':
        assert isinstance(timm.create_model(f'local-dir:{tmp_path}/converted', pretrained=True).placer, Toy)
