"""Recipes that make data and tables, run on a few pictures."""
from __future__ import annotations

import csv
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from timm.utils import CheckpointSaver

import timm_spot
from timm_spot.tasks.pictures.digits import draw_canvases, load_digits

RECIPES = Path(__file__).parent.parent / 'recipes'


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f'recipe_{name}', RECIPES / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def objects(tmp_path):
    """Red pictures of 30 x 20 px in two classes, grey streets."""
    for name in ('a/1.png', 'a/2.png', 'b/1.jpg'):
        (tmp_path / 'objects' / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (30, 20), (255, 0, 0)).save(tmp_path / 'objects' / name)
    (tmp_path / 'streets').mkdir()
    for i in range(3):
        Image.new('RGB', (120, 90), (100 + i, 100, 100)).save(tmp_path / 'streets' / f'{i}.png')
    return tmp_path


def make_scenes(folder: Path, out: str, *options: str) -> list[dict[str, str]]:
    arguments = [str(folder / 'objects'), str(folder / 'streets'), str(folder / out), '--size', '60', *options]
    result = CliRunner().invoke(recipe('scenes').main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    with open(folder / out / 'places.csv', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def test_scenes_have_the_object_at_the_place_that_is_written(objects):
    places = make_scenes(objects, 'out')
    assert [p['file'] for p in places] == ['a/1.png.jpg', 'a/2.png.jpg', 'b/1.jpg']
    assert len({(p['y'], p['x']) for p in places}) == 3
    for place in places:
        scene = np.asarray(Image.open(objects / 'out' / place['file'])).astype(int)
        y, x, h, w = (round(60 * float(place[key])) for key in 'yxhw')
        assert scene.shape == (60, 60, 3) and (h, w) == (13, 20)
        assert scene[y, x, 0] > 240 and scene[y, x, 1] < 20
        red = scene[..., 0] - scene[..., 1] > 60
        assert 0.6 * h * w < red.sum() < h * w


def test_a_scene_depends_on_its_name_and_the_seed_alone(objects):
    first = {p['file']: p for p in make_scenes(objects, 'first')}
    Image.new('RGB', (30, 20)).save(objects / 'objects' / 'a' / '0.png')  # shifts the others in the list
    again = {p['file']: p for p in make_scenes(objects, 'again')}
    assert all(again[file] == place for file, place in first.items())
    assert (objects / 'first/a/1.png.jpg').read_bytes() == (objects / 'again/a/1.png.jpg').read_bytes()
    other = {p['file']: p for p in make_scenes(objects, 'other', '--seed', '1')}
    assert all(other[file] != place for file, place in first.items())


def test_a_folder_without_pictures_is_named(objects):
    (objects / 'empty').mkdir()
    result = CliRunner().invoke(
        recipe('scenes').main, [str(objects / 'empty'), str(objects / 'streets'), str(objects / 'out')])
    assert result.exit_code == 1 and 'empty holds no pictures' in result.output


def test_table_of_photographs_pairs_by_picture(tmp_path):
    """Two of four right against one of four: the difference is that of each picture, its error too."""
    photographs = recipe('photographs')
    (tmp_path / 'right').mkdir()
    for name, placement, answers in (
            ('low-res 25', '', [1, 0, 0, 0]),
            ('low-res 25, longer', '', [1, 1, 1, 0]),
            ('covering', 'isotropic, 1', [1, 1, 0, 0]),
            ('fine', 'center, 0', [0] * 4)):
        np.save(tmp_path / 'right' / f'{name}; {placement}; 25; 0.npy', np.array(answers, dtype=bool))
    rows = {row['training']: row for row in photographs.table(tmp_path)}
    assert (rows['covering']['top1'], rows['covering']['gap']) == (50., 25.)
    assert rows['covering']['gap_se'] == 25.  # of 0, 100, 0, 0: deviation 50, over the root of 4
    assert rows['low-res 25, longer']['gap'] == 50.
    assert rows['fine']['gap'] == -25. and 'gap' not in rows['low-res 25']
    text = photographs.markdown(list(rows.values()))
    assert '| covering | isotropic, 1 |  | 50.0 ± 28.9 (+25.0 ± 25.0) |' in text
    assert '| low-res |  |  | 25.0 ± 25.0 |' in text
    assert '| low-res, longer |  |  | 75.0 ± 25.0 (+50.0 ± 28.9) |' in text


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The recipe of photographs with timm's smallest ViT of 100 patches; two classes; what makes a checkpoint."""
    module = recipe('photographs')
    for name, value in dict(BACKBONE='test_vit', WINDOW=16, IMAGE=160).items():
        monkeypatch.setattr(module, name, value)
    for name in ('a', 'b'):
        (tmp_path / 'data' / 'train' / name).mkdir(parents=True)
    runs = module.Runs(tmp_path / 'data', 'hub', Path('train.py'), tmp_path / 'out', 1)

    def train(name: str, out: Path) -> timm.models.VisionTransformer:
        row = module.ROWS[name]
        if row.kwargs is None:
            model = timm.create_model('test_vit', img_size=row.img_size, num_classes=2)
        else:
            model = timm.create_model('spot_retrofit', backbone='test_vit', num_classes=2, **row.kwargs)
        file = out / 'train' / module.file_name(name, 0) / 'last.pth.tar'
        file.parent.mkdir(parents=True)
        torch.save({'state_dict': {}, 'state_dict_ema': model.state_dict()}, file)
        return model.eval()

    return module, runs, train


def test_a_row_of_photographs_starts_from_the_weights_it_is_given(small):
    module, runs, _ = small
    options = module.source('low-res 25', 0, runs)
    assert options == ['--model', 'test_vit', '--pretrained', '--model-kwargs', 'img_size=80']
    options = module.source('all sizes', 0, module.Runs(runs.data, 'vit.pth', runs.script, runs.out, 1))
    assert options[:4] == ['--model', 'spot_retrofit', '--pretrained', '--pretrained-path']
    assert options[4:6] == ['vit.pth', '--model-kwargs'] and 'n_tokens=(16, 100)' in options


def test_a_distilled_row_of_photographs_goes_on_from_its_teacher_at_the_largest_budget(small):
    module, runs, train = small
    first = train('all sizes', runs.out)
    options = module.source('distilled', 0, runs)
    assert '--model-kwargs' not in options
    student, teacher = (timm.create_model(options[options.index(key) + 1], pretrained=True, num_classes=2).eval()
                        for key in ('--model', '--kd-model-name'))
    images = torch.randn(1, 3, 160, 160)
    assert teacher.place(images).shape == (1, 100, 4)
    first.set_placement(eval_n_tokens=100, eval_coverage=1.)
    torch.testing.assert_close(teacher(images), first(images))
    student.train()
    assert len({student.place(images).shape[1] for _ in range(8)}) > 1  # random budgets, unlike the teacher's
    assert torch.equal(student.head.weight, first.head.weight)


def test_scenes_go_on_from_photographs_whether_or_not_a_row_has_a_placer(small, tmp_path):
    module, runs, train = small
    photographs = tmp_path / 'photographs'
    first, vit = train('distilled', photographs), train('low-res 25', photographs)
    runs = module.Runs(runs.data, str(photographs), runs.script, runs.out, 1)
    for name, start in (('placer at 25', first), ('looking at 25', first), ('low-res 25', vit)):
        options = module.source(name, 0, runs)
        model = timm.create_model(options[1], pretrained=True, num_classes=2)
        assert torch.equal(model.head.weight, start.head.weight)
        assert (getattr(model, 'placer', None) is not None) == (name != 'low-res 25')
    assert model.patch_embed.img_size == (80, 80)


def test_the_table_of_photographs_comes_from_what_is_trained(small, tmp_path):
    """No row is trained again; what is judged can be had from OUT/models with the names of the classes."""
    module, runs, train = small
    for i, name in enumerate('aabb'):
        file = runs.data / 'validation' / name / f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (200, 160), (60 * i, 90, 20)).save(file)
    models = {name: train(name, runs.out) for name in ('low-res 25', 'fine at 25')}
    for name in models:
        (runs.checkpoint(name, 0).parent / 'done').touch()
    for _ in range(2):  # a folder that was lost is written anew, though all figures are there
        shutil.rmtree(runs.out / 'models', ignore_errors=True)
        result = CliRunner().invoke(module.main, [
            str(runs.data), 'hub', '--train-script', __file__, '--out', str(runs.out), '--seed', '0', '--row',
            'low-res 25', '--row', 'fine at 25'], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert '| fine at 25 | isotropic, 0 |' in result.output
    for name, model in models.items():
        kept = timm.create_model(f"local-dir:{runs.out}/models/{module.file_name(name, 0)}", pretrained=True)
        assert kept.pretrained_cfg['label_names'] == ['a', 'b']
        assert kept.pretrained_cfg['input_size'] == ((3, 80, 80) if name == 'low-res 25' else (3, 160, 160))
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in kept.state_dict().items())


def test_weights_of_another_shape_are_refused(small):
    module, runs, train = small
    train('low-res 25', runs.out)
    with pytest.raises(module.click.ClickException, match='does not fit'):
        module.create(module.ROWS['all sizes'], 2, runs.checkpoint('low-res 25', 0))


def test_train_digits_places_with_sizes():
    digits = recipe('train_digits')
    generator = torch.Generator().manual_seed(0)
    assert digits.place('uniform', 9, 2, generator).shape == (2, 9, 2)
    assert digits.place('sobol', 9, 2, generator, coverage=0.5).shape == (2, 9, 4)
    embed = digits.timm.create_model(digits.NAME, depth=1).patch_embed
    digits.start_from_sines(embed)
    assert embed.pos_proj.weight.abs().mean() > 0.05


def train_placer(folder: Path, out: str, *options: str) -> dict[str, torch.Tensor]:
    """The weights after training on a folder of canvases by the recipe."""
    module, data = recipe('train_placer'), folder / 'data'
    if not data.exists():
        digits, _ = load_digits('train')
        canvases = draw_canvases(digits[:12], torch.Generator().manual_seed(0))
        for i, canvas in enumerate(canvases):
            file = data / ('train' if i < 8 else 'validation') / 'digit' / f'{i}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(canvas.numpy()).save(file)
    arguments = [
        str(data), '--model', 'spot_vit_pico_patch8_64.digits', '--epochs', '2', '-b', '4', '--out', str(folder / out)]
    result = CliRunner().invoke(module.main, [*arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return load_file(folder / out / 'model' / 'model.safetensors')


def test_a_placer_follows_the_attention_of_its_model(tmp_path):
    trained = train_placer(tmp_path, 'out')
    digits = timm.create_model('spot_vit_pico_patch8_64.digits', pretrained=True).state_dict()
    assert all(torch.equal(trained[name], value) for name, value in digits.items())  # nothing else has changed
    model = timm.create_model(f'local-dir:{tmp_path}/out/model', pretrained=True, n_tokens=9).eval()
    assert model.placer.name == 'density' and model.placer.head.weight.abs().max() > 0
    images = torch.rand(2, 3, 64, 64)
    assert (model.place(images) - timm_spot.sample_positions('isotropic', 9, (64, 64))).abs().max() > 1e-4


def test_training_of_a_placer_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    whole = train_placer(tmp_path, 'whole')

    class Stopped(Exception):
        pass

    def save_and_stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise Stopped

    with monkeypatch.context() as patch:
        save = CheckpointSaver.save_checkpoint
        patch.setattr(CheckpointSaver, 'save_checkpoint', save_and_stop)
        with pytest.raises(Stopped):
            train_placer(tmp_path, 'half')
    resumed = train_placer(tmp_path, 'half', '--resume', str(tmp_path / 'half' / 'last.pth.tar'))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_placer_learns_from_a_folder_of_maps(tmp_path):
    train_placer(tmp_path, 'own')
    for file in tmp_path.glob('data/*/digit/*.png'):
        (tmp_path / 'maps').mkdir(exist_ok=True)
        spot = np.zeros((64, 64), np.uint8)
        spot[48:, 48:] = 255
        Image.fromarray(spot).save(tmp_path / 'maps' / file.name)
    options = ('--teacher', str(tmp_path / 'maps'), '--lr', '0.02', '--epochs', '10')
    train_placer(tmp_path, 'out', *options)
    model = timm.create_model(f'local-dir:{tmp_path}/out/model', pretrained=True, n_tokens=9).eval()
    density = model.placer.density(torch.zeros(1, 3, 64, 64))[0]
    assert density[12:, 12:].sum() > 3 * density[:4, :4].sum()
