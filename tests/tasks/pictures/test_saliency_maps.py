"""Saliency of a model, and maps on disk."""
from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import tiny_vit
from picture_files import BAD
from PIL import ExifTags, Image
from timm.data import create_transform

import timm_spot
from timm_spot.models.attention_saliency import attention_saliency
from timm_spot.models.placement import Placer
from timm_spot.ops import energy, spectral_residual
from timm_spot.tasks.pictures.images import model_transform
from timm_spot.tasks.pictures.saliency_maps import choose_prior, load_saliency, saliency_source
from timm_spot.tasks.search.draws import draw_placements

PICO = 'spot_vit_pico_patch8_64'
PRIORS = ('salient', 'salient_sobol', 'salient_inverse')


def squares(height: int = 64, width: int = 64) -> torch.Tensor:
    """Map with weight 1 on rows 8-15 of columns 16-23, weight 3 on rows 40-47 of columns 0-7, zero elsewhere."""
    saliency = torch.zeros(1, height, width)
    saliency[:, 8:16, 16:24] = 1.
    saliency[:, 40:48, 0:8] = 3.
    return saliency


@pytest.mark.parametrize('saliency', ['spectral_residual', 'energy'])
@pytest.mark.parametrize('sampler', ['salient', 'salient_lattice'])
def test_a_model_places_its_tokens_by_saliency(sampler, saliency):
    model = timm.create_model(PICO, n_tokens=25, sampler=sampler, saliency=saliency).eval()
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
    assert torch.equal(saliency_source('energy', model, transform)(images, photos), energy(images))

    maps = photos[0].parent.parent / 'maps'
    assert torch.equal(
        saliency_source(str(maps), model, transform)(images, photos), load_saliency(maps, photos, transform))

    vit = tiny_vit().eval()
    timm.models.save_for_hf(vit, tmp_path / 'vit', model_args=dict(img_size=64, embed_dim=32, depth=2, num_heads=2))
    attend = saliency_source(f"attention:local-dir:{tmp_path / 'vit'}", model, transform)
    cfg = model.pretrained_cfg  # the ViT's mean and standard deviation are 0.5
    expected = attention_saliency(vit, (images * cfg['std'][0] + cfg['mean'][0] - 0.5) / 0.5)
    torch.testing.assert_close(attend(images, photos), expected, rtol=1e-3, atol=1e-7)

    placed = timm_spot.add_placer(timm.create_model(PICO, pretrained=True, n_tokens=9)).eval()
    own = saliency_source('self', placed, transform)(images, photos)
    full = timm.create_model(PICO, pretrained=True).eval()
    torch.testing.assert_close(own, attention_saliency(full, images, queries='patches'))
    assert placed.place(images).shape == (2, 9, 2)  # which is as it was

    with pytest.raises(FileNotFoundError, match="'spectral', 'energy', 'self', 'attention:NAME', a folder"):
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
