from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import SMALL

import timm_spot
from timm_spot.tasks.drawing import kinds
from timm_spot.tasks.drawing.kinds import KINDS, Settings, Subject

pytestmark = pytest.mark.usefixtures('default_style')


@pytest.fixture
def figures(monkeypatch):
    """Figures that are to be saved."""
    saved = []
    monkeypatch.setattr(kinds, 'save_figure', lambda figure, path: saved.append(figure))
    return saved


@pytest.fixture(params=['patch', 'spot'])
def subject(request):
    """An image of 64 x 96 pixels and a small model that gives it four tokens, not symmetrically."""
    torch.manual_seed(0)
    model = timm.create_model(
        'spot_vit_pico_patch8_64', convention=request.param, sampler='uniform', seed=3, n_tokens=4, **SMALL).eval()
    return Subject(model, torch.randn(1, 3, 64, 96))


def centres(subject: Subject, positions: torch.Tensor) -> np.ndarray:
    """(x, y) of positions in the pixel coordinates of imshow, by the convention of the model."""
    offset = dict(patch=0.5, spot=0.)[subject.model.patch_embed.convention]
    return (positions * torch.tensor([64, 96]) - offset).flip(-1).numpy()


def sides(subject: Subject) -> tuple[float, float]:
    """Width and height of the model's windows of 8 pixels."""
    return dict(patch=(8., 8.), spot=(8 * 2 * 96 / 160, 8 * 2 * 64 / 160))[subject.model.patch_embed.convention]


def test_the_image_is_drawn_as_a_person_sees_it(subject):
    model = subject.model
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    picture = torch.rand(3, 64, 96)
    seen = Subject(model, ((picture - mean) / std)[None]).picture
    torch.testing.assert_close(seen, picture, atol=1e-6, rtol=0)


def test_placement_is_that_of_the_model_with_its_windows(subject, figures):
    KINDS['placement'].write(subject, Settings(), Path('out.png'))
    windows, dots = figures[0].axes[0].collections
    np.testing.assert_allclose(dots.get_offsets(), centres(subject, subject.model.place(subject.images)[0]), rtol=1e-5)
    extents = [path.get_extents() for path in windows.get_paths()]
    np.testing.assert_allclose([(e.width, e.height) for e in extents], [sides(subject)] * 4, rtol=1e-5)


def test_seen_is_what_those_windows_cover(subject, figures):
    KINDS['seen'].write(subject, Settings(), Path('out.png'))
    shown = np.asarray(figures[0].axes[0].images[0].get_array())[..., 3] == 1
    expected = np.zeros((64, 96), bool)
    width, height = sides(subject)
    for x, y in centres(subject, subject.model.place(subject.images)[0]):
        expected |= (abs(np.arange(64) - y) < height / 2)[:, None] & (abs(np.arange(96) - x) < width / 2)
    assert (shown == expected).all()


def test_priors_are_of_the_budget_asked_for_with_the_window_of_the_model(subject, figures):
    KINDS['priors'].write(subject, Settings(), Path('out.png'))
    KINDS['priors'].write(subject, Settings(n_tokens=6), Path('out.png'))
    for figure, n_tokens in zip(figures, (25, 6)):
        extents = [path.get_extents() for path in figure.axes[0].collections[0].get_paths()]
        assert len(extents) == n_tokens
        np.testing.assert_allclose([(e.width, e.height) for e in extents], [(8, 8)] * n_tokens, rtol=1e-5)


def test_a_search_begins_at_the_model_s_placement(subject, figures, monkeypatch):
    searched = {}

    def search(model, images, **options):
        searched.update(options)
        return timm_spot.optimize_positions(model, images, **options)

    monkeypatch.setattr(kinds, 'optimize_positions', search)
    KINDS['trajectory'].write(subject, Settings(steps=2, lr=0.5), Path('out.png'))
    image, loss = figures[0].axes
    start, end = (c.get_offsets() for c in image.collections)
    np.testing.assert_allclose(start, centres(subject, subject.model.place(subject.images)[0]), rtol=1e-4, atol=1e-4)
    assert np.abs(end - start).max() > 1
    assert len(loss.lines[0].get_xdata()) == 3
    assert searched['objective'] == 'entropy' and searched['bounds'] == 'clamp'
    assert (searched['steps'], searched['lr']) == (2, 0.5)


def test_a_film_is_of_the_model_s_windows(subject, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(kinds, 'animate', lambda picture, result, **options: given.update(options))
    KINDS['film'].write(subject, Settings(steps=1), tmp_path / 'film.gif')
    assert given == dict(window=8, convention=subject.model.patch_embed.convention, path=tmp_path / 'film.gif')
    with pytest.raises(ValueError, match=r'must end in \.gif or \.mp4'):
        KINDS['film'].check(tmp_path / 'film.png')


def test_pruning_is_that_of_the_model(subject, figures):
    KINDS['pruning'].write(subject, Settings(keep_rate=0.5, scorer='norm'), Path('out.png'))
    model = timm_spot.sparsify(subject.model, 0.5, scorer='norm')
    with torch.no_grad():
        kept = [index[0] for index in model.kept_tokens(subject.images, positions=subject.model.place(subject.images))]
    ax = figures[0].axes[0]
    assert ax.get_title() == ' → '.join(map(str, [4, *map(len, kept)])) + ' tokens'
    outlined = [(p.get_x() + p.get_width() / 2, p.get_y() + p.get_height() / 2, p.get_width(), p.get_height())
                for p in ax.patches if not p.get_fill()]
    last = centres(subject, subject.model.place(subject.images)[0][kept[-1]])
    np.testing.assert_allclose(outlined, [(x, y, *sides(subject)) for x, y in last], rtol=1e-5)
    with pytest.raises(ValueError, match='needs trained predictors'):
        KINDS['pruning'].write(subject, Settings(scorer='relevance'), Path('out.png'))


def test_regions_are_those_of_the_model(figures):
    torch.manual_seed(0)
    model = timm.create_model('dht_vit_pico_patch8_64', n_tokens=5).eval()
    subject = Subject(model, torch.randn(1, 3, 32, 48))
    for kind in ('regions', 'means', 'hierarchy'):
        KINDS[kind].write(subject, Settings(), Path('out.png'))
    found = model.segment(subject.images)
    regions, means, levels = (figure.axes for figure in figures)
    assert regions[0].get_title() == f'{found.segmentation.max() + 1} regions' == '5 regions'
    assert means[0].get_title().startswith('5 means, PSNR ')
    assert [ax.get_title() for ax in levels[:len(found.levels)]] == [
        f'{len(level.unique())} regions' for level in found.levels]


def test_a_kind_of_ones_own(subject, tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, 'size', kinds.Kind(
        lambda subject, settings, path: path.write_text(f'{tuple(subject.picture.shape)}'), 'the size, in words'))
    KINDS['size'].write(subject, Settings(), tmp_path / 'size.txt')
    assert (tmp_path / 'size.txt').read_text() == '(3, 64, 96)'


def test_placements_of_a_placer_of_ones_own(figures, monkeypatch):
    from timm_spot.models import placement

    class Corner(timm_spot.Placer):
        def forward(self, images):
            return images.new_full((len(images), self.budget(images.shape[-2:]), 2), 0.25)

    monkeypatch.setitem(placement._PLACERS, 'corner', Corner)
    model = timm.create_model('spot_vit_pico_patch8_64', placer='corner', n_tokens=3, **SMALL).eval()
    subject = Subject(model, torch.zeros(1, 3, 64, 64))
    for kind in ('placement', 'seen', 'priors', 'trajectory', 'pruning'):
        KINDS[kind].write(subject, Settings(steps=1), Path('out.png'))
    np.testing.assert_allclose(figures[0].axes[0].collections[1].get_offsets(), [[15.5, 15.5]] * 3)
