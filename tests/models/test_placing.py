from __future__ import annotations

import pytest
import timm
import torch

from timm_spot.models.placement import Placer, SampledPlacer
from timm_spot.models.placing import at_budget, place_drawn, place_images
from timm_spot.models.prior import Prior
from timm_spot.models.subpixel_embed import SubpixelEmbed
from timm_spot.ops.placements import sample_placement


class Corner(Placer):
    """All tokens in a corner, each of its own; sizes where it is told to."""

    columns = 2

    def forward(self, images):
        n = self.budget(images.shape[-2:])
        place = torch.linspace(0., 0.3, n)[:, None].expand(n, 2)
        return torch.cat([place, torch.full((n, self.columns - 2), 2.)], dim=-1).expand(len(images), -1, -1)


def corner(**fields):
    prior = Prior(n_tokens=5, window=8, **fields)
    return Corner(prior, prior).eval()


@pytest.fixture
def embed():
    return SubpixelEmbed(img_size=64, patch_size=8, embed_dim=8)


def test_positions_of_a_placer_get_sizes_by_the_coverage(embed):
    images = torch.rand(2, 3, 64, 64)
    assert place_images(corner(), embed, images).shape == (2, 5, 2)
    placement = place_images(corner(coverage=1.), embed, images)
    assert placement.shape == (2, 5, 4)
    # Five in a row of equal steps: cells of equal size, with the area of the image together.
    torch.testing.assert_close(placement[..., 2:], torch.full((2, 5, 2), (64 ** 2 / 5) ** 0.5 / 8), rtol=0.5, atol=0)
    assert (8 * placement[0, :, 2:]).prod(dim=-1).sum().item() == pytest.approx(64 ** 2, rel=1e-4)


def test_a_placer_may_size_its_windows_itself(embed, monkeypatch):
    monkeypatch.setattr(Corner, 'columns', 4)
    assert place_images(corner(coverage=1.), embed, torch.rand(2, 3, 64, 64))[..., 2:].unique().tolist() == [2.]
    monkeypatch.setattr(Corner, 'columns', 5)
    with pytest.raises(ValueError, match=r'shape \(2, 5, 5\), its budget asks for \(B, 5, 2\), or 4 columns'):
        place_images(corner(), embed, torch.rand(2, 3, 64, 64))


def test_sampled_placements_are_those_of_sample_placement(embed):
    for fields in (dict(coverage=1.), dict(coverage=0.4, sampler='center'), dict(sampler='coarse+center', n_coarse=4)):
        prior = Prior(n_tokens=9, window=8, **fields)
        found = place_images(SampledPlacer(prior, prior).eval(), embed, torch.rand(1, 3, 48, 64))
        expected = sample_placement(
            prior.sampler, 9, (48, 64), window=8, coverage=fields.get('coverage', 0.), n_coarse=prior.n_coarse)
        assert torch.equal(found, expected)


def test_coverage_is_drawn_for_each_batch_evenly_and_alike_in_all_processes(embed):
    prior = Prior(n_tokens=4, window=8, coverage=(0.2, 0.8), seed=3)
    placers = [SampledPlacer(prior, prior) for _ in range(2)]
    drawn = []
    for _ in range(300):
        one, other = (placer.coverage() for placer in placers)
        assert one == other and 0.2 <= one <= 0.8
        drawn.append(one)
        for placer in placers:
            place_drawn(placer, embed, torch.rand(1, 3, 16, 16))
    assert placers[0].batches == 300
    assert sum(drawn) / 300 == pytest.approx(0.5, abs=0.03)
    assert sum(c < 0.35 for c in drawn) / 300 == pytest.approx(0.25, abs=0.08)
    assert placers[0].eval().coverage() == 0.8  # the largest, where nobody says


def test_budget_and_coverage_are_drawn_independently(embed):
    prior = Prior(n_tokens=(4, 64), window=8, coverage=(0., 1.))
    placer = SampledPlacer(prior, prior)
    pairs = []
    for _ in range(200):
        pairs.append((float(placer.budget((64, 64))), placer.coverage()))
        placer.batches += 1
    table = torch.tensor(pairs)
    assert torch.corrcoef(table.T)[0, 1].abs() < 0.2


def test_another_budget_shares_the_weights_and_leaves_the_model():
    model = timm.create_model('spot_vit_pico_patch8_64', depth=1, coverage=1.).eval()
    images = torch.rand(2, 3, 64, 64)
    other = at_budget(model, 9, 0.)
    assert other.place(images).shape == (2, 9, 2) and model.place(images).shape == (2, 64, 4)
    assert other.head.weight is model.head.weight
    assert at_budget(model, 9).place(images).shape == (2, 9, 4)
