from __future__ import annotations

import pytest
import timm
import torch

import timm_spot
from timm_spot import sample_positions
from timm_spot.models.placement import _PLACERS
from timm_spot.tasks.search.draws import (
    check_budget,
    check_draw_seed,
    check_start,
    draw_placements,
    image_generator,
    starting_positions,
)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return timm.create_model('spot_vit_pico_patch8_64', num_classes=3, embed_dim=32, depth=1, n_tokens=6).eval()


IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_an_images_draw_is_that_of_the_version_before():
    """1,000,003 times the seed plus the number of the image, for torch's generator."""
    for seed, index in ((0, 0), (3, 5), (-2, 7)):
        expected = torch.rand(4, generator=torch.Generator().manual_seed(1_000_003 * seed + index))
        assert torch.equal(torch.rand(4, generator=image_generator(seed, index)), expected)


@pytest.mark.parametrize('sampler', ['uniform', 'sobol', 'gaussian'])
def test_a_draw_goes_by_seed_and_number_alone(tiny, sampler):
    numbers = torch.tensor([4, 9, 2])
    drawn = draw_placements(tiny, IMAGES, sampler, 5, None, numbers, seed=1)
    for row, i in enumerate(numbers.tolist()):
        alone = sample_positions(sampler, 5, (64, 64), generator=image_generator(1, i))
        assert torch.equal(drawn[row], alone[0])
    assert torch.equal(draw_placements(tiny, IMAGES.flip(0), sampler, 5, None, numbers.flip(0), seed=1), drawn.flip(0))
    assert not (draw_placements(tiny, IMAGES, sampler, 5, None, numbers, seed=2) == drawn).all(dim=2).any()


def test_a_draw_from_a_map_goes_by_that_map(tiny):
    maps = torch.zeros(3, 64, 64)
    for i in range(3):
        maps[i, 20 * i, 7] = 1.
    drawn = draw_placements(tiny, IMAGES, 'salient', None, maps, torch.arange(3), seed=0)
    assert drawn.shape == (3, 6, 2)
    assert torch.equal((drawn * 64).floor(), torch.tensor([[[20. * i, 7.]] * 6 for i in range(3)]))


@pytest.fixture
def brightest():
    """A placer of one's own: all tokens on the brightest row."""
    @timm_spot.register_placer('brightest')
    class Brightest(timm_spot.Placer):
        def forward(self, images):
            row = (images.mean(dim=(1, 3)).argmax(dim=1) + 0.5) / images.shape[2]
            return row[:, None, None].expand(-1, self.budget(images.shape[-2:]), 2)

    yield
    _PLACERS.pop('brightest')


def test_the_models_own_placer_is_a_start(brightest):
    model = timm.create_model(
        'spot_vit_pico_patch8_64', num_classes=3, embed_dim=32, depth=1, n_tokens=6, placer='brightest').eval()
    images = IMAGES.clone()
    for i, row in enumerate((3, 30, 60)):
        images[i, :, row] = 2.
    expected = (torch.tensor([3., 30., 60.]) + 0.5)[:, None, None] / 64
    placed = starting_positions(model, images, 'brightest')
    assert torch.equal(placed, expected.expand(3, 6, 2)) and torch.equal(placed, model.place(images))
    assert torch.equal(starting_positions(model, images, 'brightest', 2), expected.expand(3, 2, 2))
    drawn = draw_placements(model, images, 'brightest', 2, None, torch.arange(3), seed=0)
    assert torch.equal(drawn, expected.expand(3, 2, 2))
    assert model.n_tokens == 6 and model.place(images).shape == (3, 6, 2), 'the model is as it was'
    placed.zero_()
    assert torch.equal(model.place(images), expected.expand(3, 6, 2)), 'a copy'
    with pytest.raises(ValueError, match=r"init='sampled' is a placer, but the model's is 'brightest'"):
        starting_positions(model, images, 'sampled')


def test_a_saliency_that_is_not_needed_is_not_computed(tiny):
    def fail(images):
        raise AssertionError('called')

    tiny.set_placement(saliency=fail)
    assert starting_positions(tiny, IMAGES, 'center').shape == (3, 6, 2)
    with pytest.raises(AssertionError, match='called'):
        starting_positions(tiny, IMAGES, 'salient')


def test_positions_in_pixels_are_refused():
    pixels = 224 * torch.rand(3, 9, 2, generator=torch.Generator().manual_seed(0))
    for wrong in (pixels, -pixels):
        with pytest.raises(ValueError, match=r'divide pixels by \(64, 64\)'):
            check_start(wrong, IMAGES)
    near = torch.full((3, 9, 2), 3.5)  # near enough for windows, but nowhere near for a start
    with pytest.raises(ValueError, match=r'shape \(3, 9, 2\) lies mostly outside .*value is 3\.5: .*by \(64, 64\)'):
        check_start(near, IMAGES)
    with pytest.raises(ValueError, match='NaN or infinity'):
        check_start(torch.full((3, 9, 2), torch.nan), IMAGES)
    # What a search itself may reach: somewhat outside, or a few of the tokens far away.
    check_start(torch.rand(3, 9, 2) * 3 - 1, IMAGES)
    few = torch.rand(3, 9, 2)
    few[:, :4] = 4.
    check_start(few, IMAGES)


@pytest.mark.parametrize('n_tokens, error, message', [
    (4097, ValueError, 'n_tokens=4097 is more than the 4096 pixels of an image of 64 x 64'),
    (10 ** 12, ValueError, 'n_tokens=1000000000000'), (0, ValueError, 'n_tokens=0'), (-3, ValueError, 'n_tokens=-3'),
    (2.5, TypeError, 'n_tokens must be an int'), (True, TypeError, 'n_tokens must be an int')])
def test_impossible_budgets_are_refused(tiny, n_tokens, error, message):
    with pytest.raises(error, match=message):
        check_budget(tiny, n_tokens, (64, 64))


def test_a_budget_is_the_models_own_unless_given(tiny):
    assert check_budget(tiny, None, (64, 64)) == 6 and check_budget(tiny, 4096, (64, 64)) == 4096


@pytest.mark.parametrize('seed', [2 ** 70, -2 ** 33, 2 ** 32 + 1])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ValueError, match=rf'seed={seed} is out of range'):
        check_draw_seed(seed)


def test_seeds_in_range_give_generators():
    for seed in (0, 2 ** 32, -2 ** 32):
        check_draw_seed(seed)
        image_generator(seed, 10 ** 9)
    for seed in (1.5, True, '3'):
        with pytest.raises(TypeError, match='seed must be an int'):
            check_draw_seed(seed)
