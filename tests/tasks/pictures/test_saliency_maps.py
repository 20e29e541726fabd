"""Saliency: spectral residual, class-token attention, the salient priors, maps on disk."""
from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import BAD
from PIL import ExifTags, Image
from scipy.stats import chisquare
from timm.data import create_transform

import timm_spot
from timm_spot.models.attention_saliency import attention_saliency
from timm_spot.models.placement import Placer
from timm_spot.ops import spectral_residual
from timm_spot.tasks.pictures.images import model_transform
from timm_spot.tasks.pictures.saliency_maps import choose_prior, load_saliency, saliency_source
from timm_spot.tasks.search.draws import draw_placements

PICO = 'spot_vit_pico_patch8_64'
PRIORS = ('salient', 'salient_sobol', 'salient_inverse')


def read_photo(name: str) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]."""
    with Image.open(Path(__file__).parents[3] / 'examples' / 'photos' / name) as photo:
        return torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255


def squares(height: int = 64, width: int = 64) -> torch.Tensor:
    """Map with weight 1 on rows 8-15 of columns 16-23, weight 3 on rows 40-47 of columns 0-7, zero elsewhere."""
    saliency = torch.zeros(1, height, width)
    saliency[:, 8:16, 16:24] = 1.
    saliency[:, 40:48, 0:8] = 3.
    return saliency


# ---------------------------------------------------------------------------------------------------------------------
# Spectral residual


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 4), st.integers(0, 2 ** 31))
def test_spectral_residual_is_a_distribution_at_any_size(height, width, channels, seed):
    images = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(seed))
    maps = spectral_residual(images)
    assert maps.shape == (2, height, width) and maps.dtype == torch.float32
    assert (maps >= 0).all()
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(2))


def test_spectral_residual_follows_the_formula():
    """Against NumPy, term by term, on an image that needs no resizing."""
    image = np.random.default_rng(0).random((20, 30)).astype(np.float32)
    x = np.pad(image.astype(np.float64) - image.mean(dtype=np.float64), ((0, 20), (0, 30)), mode='symmetric')
    spectrum = np.fft.fft2(x)
    amplitude = np.abs(spectrum) + 0.05 * np.abs(spectrum).mean()
    average = sum(np.roll(np.log(amplitude), (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9
    energy = np.abs(np.fft.ifft2(np.exp(np.log(amplitude) - average) * spectrum / amplitude))[:20, :30] ** 2
    expected = np.zeros((20, 30))
    for i in range(20):
        for j in range(30):
            weight = np.exp(-((np.arange(20)[:, None] - i) ** 2 + (np.arange(30) - j) ** 2) / (2 * 2.5 ** 2))
            expected[i, j] = (weight * energy).sum() / weight.sum()
    saliency = spectral_residual(torch.from_numpy(image)[None, None])[0]
    torch.testing.assert_close(saliency, torch.from_numpy(expected / expected.sum()).float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize('top, left, side', [(5, 40, 8), (50, 3, 5), (30, 30, 3)])
def test_spectral_residual_finds_the_odd_one_out(top, left, side):
    image = torch.zeros(1, 3, 64, 64)
    image[:, :, top:top + side, left:left + side] = 1.
    y, x = divmod(spectral_residual(image).argmax().item(), 64)
    assert top - 2 <= y < top + side + 2 and left - 2 <= x < left + side + 2


def test_spectral_residual_of_a_photograph_prefers_the_cyclist():
    saliency = spectral_residual(read_photo('cowbike.jpg'))[0]
    cyclist = saliency[160:480, 260:400].mean()
    assert cyclist > 2 * saliency.mean()


@pytest.mark.parametrize('value', [0., 0.3, -7e3])
def test_an_image_without_structure_is_salient_everywhere_alike(value):
    torch.testing.assert_close(spectral_residual(torch.full((1, 3, 40, 70), value)), torch.full((1, 40, 70), 1 / 2800))


def test_spectral_residual_ignores_normalisation_and_neighbours():
    photo, other = read_photo('cowbike.jpg'), read_photo('oldkitchen.jpg')
    saliency = spectral_residual(photo)
    tolerance = dict(rtol=1e-4, atol=1e-10)
    torch.testing.assert_close(spectral_residual((photo - 0.5) / 0.25), saliency, **tolerance)
    torch.testing.assert_close(spectral_residual(torch.cat([other, photo]))[1:], saliency, **tolerance)
    torch.testing.assert_close(spectral_residual((photo * 255).round().byte()), saliency, rtol=1e-3, atol=1e-8)


def test_spectral_residual_keeps_its_precision_under_autocast():
    photo = read_photo('cowbike.jpg')
    with torch.autocast('cpu', torch.bfloat16):
        saliency = spectral_residual(photo)
    assert saliency.dtype == torch.float32
    torch.testing.assert_close(saliency, spectral_residual(photo))


def test_spectral_residual_refuses_what_is_no_image():
    with pytest.raises(TypeError, match='images must be a tensor'):
        spectral_residual(np.zeros((1, 3, 8, 8)))
    with pytest.raises(ValueError, match=r'\(B, C, H, W\), got \(3, 8, 8\)'):
        spectral_residual(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match='NaN'):
        spectral_residual(torch.full((1, 1, 8, 8), math.nan))


# ---------------------------------------------------------------------------------------------------------------------
# The salient priors


@pytest.mark.parametrize('prior, weights', [
    ('salient', [[1., 2., 0.], [0., 4., 3.]]),
    ('salient_sobol', [[1., 2., 0.], [0., 4., 3.]]),
    ('salient_inverse', [[3., 2., 4.], [4., 0., 1.]]),  # the largest value, 4, minus the map
])
def test_20000_draws_follow_the_map(prior, weights):
    saliency = torch.tensor([[[1., 2., 0.], [0., 4., 3.]]])
    generator = torch.Generator().manual_seed(0)
    positions = timm_spot.sample_positions(prior, 20_000, (2, 3), saliency=saliency, generator=generator)[0]
    y, x = (positions * torch.tensor([2, 3])).floor().long().unbind(dim=-1)
    counts = torch.bincount(y * 3 + x, minlength=6)
    expected = torch.tensor(weights).double().flatten() / torch.tensor(weights).sum() * 20_000
    assert (counts[expected == 0] == 0).all()
    assert chisquare(counts[expected > 0].double(), expected[expected > 0]).pvalue > 0.01


def test_20000_draws_follow_the_map_of_a_photograph():
    saliency = spectral_residual(read_photo('cowbike.jpg'))
    generator = torch.Generator().manual_seed(0)
    positions = timm_spot.sample_positions('salient', 20_000, (512, 512), saliency=saliency, generator=generator)[0]
    block = (positions * 8).floor().long()
    counts = torch.bincount(block[:, 0] * 8 + block[:, 1], minlength=64).double()
    expected = saliency[0].double().unflatten(0, (8, 64)).unflatten(2, (8, 64)).sum(dim=(1, 3)).flatten()
    assert (expected * 20_000 > 5).all()
    assert chisquare(counts, expected / expected.sum() * 20_000).pvalue > 0.01


def test_draws_are_jittered_inside_their_pixel():
    saliency = torch.zeros(1, 4, 4)
    saliency[0, 2, 1] = 1.
    generator = torch.Generator().manual_seed(0)
    positions = timm_spot.sample_positions('salient', 20_000, (4, 4), saliency=saliency, generator=generator)[0]
    inside = positions * 4 - torch.tensor([2., 1.])
    assert (inside > 0).all() and (inside < 1).all()
    counts = torch.bincount((inside * 10).long()[:, 0] * 10 + (inside * 10).long()[:, 1], minlength=100)
    assert chisquare(counts.double()).pvalue > 0.01


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(PRIORS), st.integers(1, 300), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2 ** 31))
def test_any_budget_falls_on_positive_weight(prior, n_tokens, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.rand(2, height, width, generator=generator)
    saliency[torch.rand(2, height, width, generator=generator) < 0.8] = 0.
    saliency[:, -1, -1] += 1e-6  # no map is zero everywhere
    positions = timm_spot.sample_positions(
        prior, n_tokens, (height, width), batch_size=2, saliency=saliency, generator=generator)
    assert positions.shape == (2, n_tokens, 2)
    if prior == 'salient_inverse':
        saliency = saliency.amax(dim=(1, 2), keepdim=True) - saliency
        saliency[saliency.sum(dim=(1, 2)) == 0] = 1.
    pixel = (positions.double() * torch.tensor([height, width])).floor().long()
    assert (saliency[torch.arange(2)[:, None], pixel[..., 0], pixel[..., 1]] > 0).all()


@pytest.mark.parametrize('prior', PRIORS)
def test_a_constant_map_gives_uniform_coverage(prior):
    generator = torch.Generator().manual_seed(1)
    positions = timm_spot.sample_positions(
        prior, 20_000, (32, 48), saliency=torch.full((32, 48), 0.25), generator=generator)[0]
    counts = torch.bincount((positions * 8).long()[:, 0] * 8 + (positions * 8).long()[:, 1], minlength=64)
    assert chisquare(counts.double()).pvalue > 0.01


def test_low_discrepancy_draws_are_sobol_points_carried_to_the_map():
    size = (1000, 1000)
    positions, sobol = (
        timm_spot.sample_positions(
            name, 32, size, saliency=torch.ones(size), generator=torch.Generator().manual_seed(3))
        for name in ('salient_sobol', 'sobol'))
    torch.testing.assert_close(positions, sobol, rtol=0, atol=1e-5)


def test_low_discrepancy_draws_crowd_less():
    """64 tokens on two squares of weight 1 : 3 are 16 and 48, to within one; independent draws vary."""
    def count_upper(prior: str, seed: int) -> int:
        generator = torch.Generator().manual_seed(seed)
        positions = timm_spot.sample_positions(prior, 64, (64, 64), saliency=squares(), generator=generator)
        return (positions[0, :, 0] < 0.5).sum().item()

    assert all(abs(count_upper('salient_sobol', seed) - 16) <= 1 for seed in range(20))
    assert any(abs(count_upper('salient', seed) - 16) > 1 for seed in range(20))


def test_options_are_the_names():
    for name, options in (('salient_sobol', dict(spread=True)), ('salient_inverse', dict(inverse=True))):
        by_name, by_option = (
            timm_spot.sample_positions(
                sampler, 25, (64, 64), saliency=squares(), generator=torch.Generator().manual_seed(0), **keywords)
            for sampler, keywords in ((name, {}), ('salient', options)))
        assert torch.equal(by_name, by_option)
    with pytest.raises(TypeError, match='inverse'):
        timm_spot.sample_positions('uniform', 25, (64, 64), inverse=True)


@pytest.mark.parametrize('saliency, error, match', [
    (None, ValueError, 'needs a saliency map'),
    (np.ones((64, 64)), TypeError, 'must be a tensor'),
    (torch.zeros(64, 64), ValueError, 'zero everywhere in map 0'),
    (-torch.ones(64, 64), ValueError, 'must not be negative, its smallest value is -1'),
    (torch.full((64, 64), math.nan), ValueError, 'NaN'),
    (torch.ones(32, 64), ValueError, r'\(1, 32, 64\) does not cover images of \(64, 64\)'),
])
@pytest.mark.parametrize('prior', PRIORS)
def test_a_wrong_map_is_refused_with_its_reason(prior, saliency, error, match):
    with pytest.raises(error, match=match):
        timm_spot.sample_positions(prior, 9, (64, 64), saliency=saliency)


# ---------------------------------------------------------------------------------------------------------------------
# In a model


def test_a_model_places_its_tokens_by_saliency():
    model = timm.create_model(PICO, n_tokens=25, sampler='salient', saliency='spectral_residual').eval()
    images = torch.zeros(2, 3, 64, 64)
    images[0, :, 8:16, 8:16] = 1.
    images[1, :, 40:48, 44:52] = 1.
    first, second = model.place(images)
    centre = torch.tensor([[12., 12.], [44., 48.]]) / 64
    assert (first - centre[0]).norm(dim=1).median() < 0.15
    assert (second - centre[1]).norm(dim=1).median() < 0.15
    torch.testing.assert_close(model.place(images[1:])[0], second)  # whatever the neighbours
    assert model(images).shape == (2, 10)


@pytest.mark.parametrize('prior', PRIORS)
def test_the_seed_reaches_the_salient_priors_in_eval_mode(prior):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    placements = []
    for seed in (0, 1, 0):
        model = timm.create_model(PICO, n_tokens=9, sampler=prior, saliency='spectral_residual', seed=seed).eval()
        placements.append(model.place(images))
    assert torch.equal(placements[0], placements[2]) and not (placements[0] == placements[1]).any()


@pytest.mark.parametrize('prior', PRIORS)
def test_the_seed_reaches_the_salient_priors_of_an_evaluation(prior):
    """Each image draws by the seed and its own number in the data set."""
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    model, maps = timm.create_model(PICO).eval(), squares().expand(2, -1, -1)
    drawn = {
        (seed, first): draw_placements(model, images, prior, 9, maps, torch.tensor([first, first + 1]), seed)
        for seed in (0, 1) for first in (0, 5)}
    distinct = torch.cat(list(drawn.values()))
    assert len(distinct.flatten(1).unique(dim=0)) == 8
    again = draw_placements(model, images, prior, 9, maps, torch.tensor([1, 6]), 1)
    torch.testing.assert_close(again, torch.stack([drawn[1, 0][1], drawn[1, 5][1]]))


def test_a_saved_model_keeps_the_name_of_its_saliency(tmp_path):
    model = timm.create_model(PICO, n_tokens=9, num_classes=10).eval()
    model.set_placement(sampler='salient_sobol', saliency='spectral_residual')
    timm.models.save_for_hf(model, tmp_path)
    saved = json.loads((tmp_path / 'config.json').read_text())['model_args']
    assert saved['saliency'] == 'spectral_residual' and saved['sampler'] == 'salient_sobol'
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(again.place(images), model.place(images))


def test_a_salient_model_needs_a_map():
    with pytest.raises(ValueError, match="saliency='spectral_residual'"):
        timm.create_model(PICO, sampler='salient')
    model = timm.create_model(PICO)
    with pytest.raises(ValueError, match='needs a saliency map'):
        model.set_placement(sampler='salient_inverse')
    with pytest.raises(ValueError, match="'attention' is unknown, the names are spectral_residual"):
        model.set_placement(saliency='attention')
    with pytest.raises(TypeError, match='got 3'):
        model.set_placement(saliency=3)


# ---------------------------------------------------------------------------------------------------------------------
# Class-token attention


def tiny_vit(**keywords):
    torch.manual_seed(0)
    model = timm.create_model(
        'vit_tiny_patch16_224', **{**dict(img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=3), **keywords})
    for p in model.parameters():  # fresh weights attend to everything alike
        torch.nn.init.normal_(p, std=0.4)
    return model


def test_attention_by_hand():
    vit = tiny_vit().eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        x = vit.blocks[1].norm1(vit.blocks[0](x))
        q, k, _ = vit.blocks[1].attn.qkv(x).view(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / 4).softmax(dim=-1)[:, :, 0, 1:].mean(dim=1).view(2, 4, 4)
    maps = attention_saliency(vit, images)
    assert attention.std() > 0.01
    expected = F.interpolate(attention[:, None], (64, 64), mode='bilinear')[:, 0]
    torch.testing.assert_close(maps, expected / expected.sum(dim=(1, 2), keepdim=True), rtol=1e-4, atol=0)


@pytest.mark.parametrize('keywords', [
    dict(), dict(global_pool='avg'), dict(reg_tokens=4), dict(reg_tokens=4, no_embed_class=True),
    dict(dynamic_img_size=True), dict(qk_norm=True), dict(init_values=1e-3)])
def test_fused_and_unfused_attention_give_the_same_map(keywords):
    vit, images = tiny_vit(**keywords), torch.randn(2, 3, 96, 80)
    maps = []
    for fused in (True, False):
        for block in vit.blocks:
            block.attn.fused_attn = fused
        maps.append(attention_saliency(vit, images))
    assert maps[0].shape == (2, 96, 80) and (maps[0] >= 0).all()
    torch.testing.assert_close(maps[0].sum(dim=(1, 2)), torch.ones(2))
    scale = maps[0].amax()
    torch.testing.assert_close(maps[0] / scale, maps[1] / scale, rtol=0, atol=1e-5)


def test_attention_saliency_leaves_the_vit_unchanged():
    vit = tiny_vit(drop_rate=0.5, drop_path_rate=0.5)
    vit.blocks[0].eval()  # modes may be mixed
    before = copy.deepcopy(vit)
    attention_saliency(vit, torch.randn(1, 3, 64, 64))
    assert [(n, m.training, getattr(m, 'fused_attn', None), len(m._forward_pre_hooks)) for n, m in vit.named_modules()
            ] == [(n, m.training, getattr(m, 'fused_attn', None), 0) for n, m in before.named_modules()]
    for a, b in zip(vit.state_dict().values(), before.state_dict().values()):
        assert torch.equal(a, b)
    assert all(p.grad is None for p in vit.parameters())


def test_attention_saliency_restores_the_vit_after_an_error():
    vit = tiny_vit()
    fused = vit.blocks[-1].attn.fused_attn
    with pytest.raises(RuntimeError):
        attention_saliency(vit, torch.randn(1, 5, 64, 64))
    assert vit.training and vit.blocks[-1].attn.fused_attn == fused
    assert not vit.blocks[-1].attn.attn_drop._forward_pre_hooks


def test_blocks_differ():
    vit, images = tiny_vit(), torch.randn(1, 3, 64, 64)
    first, last = attention_saliency(vit, images, block=0), attention_saliency(vit, images)
    assert not torch.allclose(first, last, rtol=1e-2)
    assert torch.equal(last, attention_saliency(vit, images, block=1))
    with pytest.raises(ValueError, match='block=2 does not exist, vit has 2 blocks'):
        attention_saliency(vit, images, block=2)


def test_attention_of_a_subpixel_vit_on_a_lattice():
    model = timm.create_model(PICO, n_tokens=12).eval()
    assert attention_saliency(model, torch.randn(1, 3, 96, 128)).shape == (1, 96, 128)
    model.set_placement(sampler='sobol')
    with pytest.raises(ValueError, match='no lattice'):
        attention_saliency(model, torch.randn(1, 3, 96, 128))


def test_attention_saliency_says_what_it_cannot_read():
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match='no class token'):
        attention_saliency(tiny_vit(class_token=False, global_pool='avg'), images)
    with pytest.raises(TypeError, match="got Linear without 'patch_embed'"):
        attention_saliency(torch.nn.Linear(2, 2), images)
    with pytest.raises(TypeError, match='attention of its own'):
        attention_saliency(timm.create_model('cait_xxs24_224', img_size=64, depth=1), images)
    with pytest.raises(ValueError, match=r'got \(3, 64, 64\)'):
        attention_saliency(tiny_vit(), images[0])


# ---------------------------------------------------------------------------------------------------------------------
# Maps on disk


def write_image(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture
def photos(tmp_path):
    """Two photographs of 80 x 60 pixels and their maps: one spot at rows 30-39 of columns 60-69."""
    for name in ('a', 'b'):
        write_image(tmp_path / 'photos' / f'{name}.png', np.zeros((60, 80, 3), np.uint8))
    spot = np.zeros((60, 80), np.uint8)
    spot[30:40, 60:70] = 200
    write_image(tmp_path / 'maps' / 'a.png', spot)
    np.save(tmp_path / 'maps' / 'b.npy', spot[::-1].astype(np.float32))  # upside down
    return [tmp_path / 'photos' / 'a.png', tmp_path / 'photos' / 'b.png']


@pytest.mark.parametrize('crop_mode, row, column', [
    # Where the middle of the spot, row 35 and column 65 of 60 x 80, comes to lie in 48 x 48 pixels.
    ('squash', 35 / 60, 65 / 80),
    ('center', 35 / 60, (65 - 10) / 60),
    ('border', (35 + 10) / 80, 65 / 80),
])
def test_maps_go_through_the_geometry_of_their_images(photos, crop_mode, row, column):
    transform = create_transform((3, 48, 48), crop_pct=1., crop_mode=crop_mode, mean=(.5, .5, .5), std=(.5, .5, .5))
    maps = load_saliency(photos[0].parent.parent / 'maps', photos, transform)
    assert maps.shape == (2, 48, 48) and maps.dtype == torch.float32 and (maps >= 0).all()
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(2))
    pixel = (torch.arange(48) + 0.5) / 48
    torch.testing.assert_close((maps[0].sum(dim=1) * pixel).sum(), torch.tensor(row), rtol=0, atol=0.01)
    torch.testing.assert_close((maps[0].sum(dim=0) * pixel).sum(), torch.tensor(column), rtol=0, atol=0.01)
    torch.testing.assert_close(maps[1], maps[0].flip(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float32, bool])
def test_maps_of_any_depth_and_resolution(photos, dtype):
    spot = np.zeros((15, 20), dtype)
    spot[8:10, 15:17] = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    suffix = '.tiff' if dtype == np.float32 else '.png'
    (photos[0].parent.parent / 'maps' / 'a.png').unlink()
    write_image(photos[0].parent.parent / 'maps' / f'a{suffix}', spot)
    saliency = load_saliency(photos[0].parent.parent / 'maps', photos[:1], create_transform((3, 60, 60), crop_pct=1.))
    y, x = divmod(saliency.argmax().item(), 60)
    assert 32 <= y < 40 and 50 <= x < 58


def test_missing_maps_are_listed(photos):
    more = [*photos, photos[0].with_name('c.jpg'), photos[0].with_name('d.jpg')]
    with pytest.raises(FileNotFoundError, match=r'no saliency map for 2 of 4 images: c\.jpg, d\.jpg\.'):
        load_saliency(photos[0].parent.parent / 'maps', more, create_transform((3, 48, 48)))
    with pytest.raises(FileNotFoundError, match='is no folder of saliency maps'):
        load_saliency(photos[0].parent / 'nowhere', photos, create_transform((3, 48, 48)))


@pytest.mark.parametrize('values, match', [
    (np.zeros((60, 80), np.float32), 'zero wherever the model looks'),
    (np.full((60, 80), -1, np.float32), 'must not be negative'),
    (np.full((60, 80), np.nan, np.float32), 'NaN'),
    (np.ones((60, 80, 3), np.float32), r'shape \(60, 80, 3\), expected \(height, width\)'),
])
def test_a_wrong_map_on_disk_is_named(photos, values, match):
    np.save(photos[0].parent.parent / 'maps' / 'b.npy', values)
    with pytest.raises(ValueError, match=f'b.npy.*{match}'):
        load_saliency(photos[0].parent.parent / 'maps', photos, create_transform((3, 48, 48)))


def test_maps_of_a_turned_photograph_lie_upright(photos):
    """The map belongs to the picture as it is seen: 60 wide and 80 high, its spot where the map has it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new('RGB', (80, 60)).save(photos[0], exif=exif)
    spot = np.zeros((80, 60), np.uint8)
    spot[60:70, 10:20] = 200
    write_image(photos[0].parent.parent / 'maps' / 'a.png', spot)
    transform = create_transform((3, 48, 48), crop_pct=1., crop_mode='center', mean=(.5,) * 3, std=(.5,) * 3)
    saliency, = load_saliency(photos[0].parent.parent / 'maps', photos[:1], transform)
    pixel = (torch.arange(48) + 0.5) / 48
    # Of 60 x 60 pixels in the middle, the spot's centre is at row 65 - 10 and column 15.
    torch.testing.assert_close((saliency.sum(dim=1) * pixel).sum(), torch.tensor(55 / 60), rtol=0, atol=0.02)
    torch.testing.assert_close((saliency.sum(dim=0) * pixel).sum(), torch.tensor(15 / 60), rtol=0, atol=0.02)


def test_maps_for_a_grey_model_are_no_colours(photos):
    model = timm.create_model(PICO, in_chans=1)
    values = np.load(photos[1].parent.parent / 'maps' / 'b.npy')
    np.save(photos[1].parent.parent / 'maps' / 'b.npy', values / 1000)  # at most 0.2, which in bytes would be 0
    saliency = load_saliency(photos[0].parent.parent / 'maps', photos, model_transform(model))
    torch.testing.assert_close(saliency[0], saliency[1].flip(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize('make, says', [
    (lambda path: path.write_bytes(b''), 'a.npy is no array'),
    (lambda path: os.mkfifo(path), 'a.npy is no array'),
    (lambda path: path.write_bytes(b'\x93NUMPY\x01\x00v\x00{'), 'a.npy is no array'),
    (lambda path: path.write_bytes(b'PK\x03\x04'), 'a.npy is no array'),  # as np.savez begins
    (lambda path: np.save(path, np.array([['a', 'b']])), 'expected numbers'),
])
def test_a_damaged_array_of_saliency_is_named(photos, make, says):
    maps = photos[0].parent.parent / 'maps'
    (maps / 'a.png').unlink()
    make(maps / 'a.npy')
    with pytest.raises(ValueError, match=says):
        load_saliency(maps, photos[:1], create_transform((3, 48, 48)))


@pytest.mark.parametrize('make', list(BAD), ids=lambda make: make.__name__)
def test_a_bad_picture_of_saliency_is_named(photos, make):
    maps = photos[0].parent.parent / 'maps'
    (maps / 'a.png').unlink()
    make(maps / 'a.png')
    if make.__name__ == 'signed':  # as a map it may have any range
        assert load_saliency(maps, photos[:1], create_transform((3, 48, 48))).shape == (1, 48, 48)
        return
    with pytest.raises(ValueError, match=rf'a\.png .*({BAD[make]})'):
        load_saliency(maps, photos[:1], create_transform((3, 48, 48)))


def test_two_maps_of_one_image_are_refused(photos):
    np.save(photos[0].parent.parent / 'maps' / 'a.npy', np.ones((60, 80)))
    with pytest.raises(ValueError, match=r'a\.png has several saliency maps: .*a\.npy, .*a\.png'):
        load_saliency(photos[0].parent.parent / 'maps', photos, create_transform((3, 48, 48)))


def test_sources_of_the_command_line(photos, tmp_path):
    model = timm.create_model(PICO, num_classes=10).eval()
    transform = create_transform((3, 64, 64), crop_pct=1., mean=(.5, .5, .5), std=(.5, .5, .5))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(saliency_source('spectral', model, transform)(images, photos), spectral_residual(images))

    maps = photos[0].parent.parent / 'maps'
    assert torch.equal(
        saliency_source(str(maps), model, transform)(images, photos), load_saliency(maps, photos, transform))

    vit = tiny_vit().eval()
    timm.models.save_for_hf(vit, tmp_path / 'vit', model_args=dict(img_size=64, embed_dim=32, depth=2, num_heads=2))
    attend = saliency_source(f"attention:local-dir:{tmp_path / 'vit'}", model, transform)
    cfg = model.pretrained_cfg  # the ViT's mean and standard deviation are 0.5
    expected = attention_saliency(vit, (images * cfg['std'][0] + cfg['mean'][0] - 0.5) / 0.5)
    torch.testing.assert_close(attend(images, photos), expected, rtol=1e-3, atol=1e-7)

    with pytest.raises(FileNotFoundError, match="'spectral', 'attention:NAME', a folder"):
        saliency_source('spectrum', model, transform)


def test_prior_of_the_command_line(photos):
    transform = create_transform((3, 64, 64), crop_pct=1., crop_mode='squash', mean=(.5, .5, .5), std=(.5, .5, .5))
    images = torch.rand(2, 3, 64, 64)

    def place(sampler, saliency, keywords=None):
        model = timm.create_model(PICO, num_classes=10, n_tokens=9, **(keywords or {})).eval()
        choose_prior(model, sampler, saliency, transform)(images, photos)
        return model.placer.prior.sampler, model.place(images)

    own = dict(sampler='salient', saliency='spectral_residual')
    spectral = timm.create_model(PICO, num_classes=10, n_tokens=9, **own).eval().place(images)
    assert place(None, None)[0] == 'isotropic' and place('sobol', None)[0] == 'sobol'
    for sampler, saliency, keywords in (
            (None, 'spectral', {}), ('salient', None, {}), (None, None, own), ('salient', 'spectral', own)):
        name, positions = place(sampler, saliency, keywords)
        assert name == 'salient'
        torch.testing.assert_close(positions, spectral, rtol=0, atol=1e-6)  # maps of one or of two passes

    name, (first, second) = place('salient_sobol', str(photos[0].parent.parent / 'maps'))
    assert name == 'salient_sobol'
    assert ((first - torch.tensor([35 / 60, 65 / 80])).abs() < 0.15).all()
    assert ((second - torch.tensor([25 / 60, 65 / 80])).abs() < 0.15).all()
    with pytest.raises(ValueError, match="saliency='spectral' is of no use to sampler='sobol'"):
        place('sobol', 'spectral')
    with pytest.raises(ValueError, match="'sobel' is unknown"):
        place('sobel', None)


def test_a_placer_that_looks_for_itself_takes_no_prior(photos, monkeypatch):
    model = timm.create_model(PICO, n_tokens=4).eval()
    positions = torch.rand(1, 4, 2)

    class Corner(Placer):
        name = 'corner'

        def forward(self, images):
            return positions.expand(len(images), -1, -1)

    model.placer = Corner(model.placer.train_prior, model.placer.eval_prior).eval()
    images = torch.rand(2, 3, 64, 64)
    choose_prior(model, None, None, None)(images, photos)
    assert torch.equal(model.place(images)[0], positions[0])
    for asked in (dict(sampler='sobol', saliency=None), dict(sampler=None, saliency='spectral')):
        with pytest.raises(ValueError, match="are of no use: placer 'corner' places tokens"):
            choose_prior(model, transform=None, **asked)
