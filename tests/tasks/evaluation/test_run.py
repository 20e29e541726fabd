from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner
from conftest import SMALL
from PIL import Image

import timm_spot
from timm_spot.cli import main
from timm_spot.tasks.evaluation.plan import plan_rows
from timm_spot.tasks.evaluation.request import Knn, Request
from timm_spot.tasks.evaluation.rows import KEY
from timm_spot.tasks.evaluation.run import Run, open_folder
from timm_spot.tasks.evaluation.run import evaluate as compute
from timm_spot.tasks.pictures.datasets import Pictures
from timm_spot.tasks.pictures.images import model_transform
from timm_spot.tasks.processes import Processes
from timm_spot.tasks.publishing.hub import add_results

ROOT = Path(__file__).parents[3]
ARGUMENTS = ('--samplers', 'grid,uniform', '--budgets', '4,9', '--batch-size', '7')


@pytest.fixture
def folder(tmp_path):
    for label in range(10):
        (tmp_path / 'data' / str(label)).mkdir(parents=True)
        for i in range(3):
            Image.effect_noise((64, 64), 20 + 9 * label).save(tmp_path / 'data' / str(label) / f'{i}.png')
    return tmp_path / 'data'


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model('spot_vit_pico_patch8_64', **SMALL), tmp_path / 'saved')
    return f'local-dir:{tmp_path}/saved'


@pytest.fixture
def saved_vit(tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model(
        'vit_tiny_patch16_224', img_size=64, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=10,
        pretrained_cfg_overlay=dict(input_size=(3, 64, 64), num_classes=10))
    timm.models.save_for_hf(vit, tmp_path / 'vit', model_args=dict(
        img_size=64, patch_size=8, embed_dim=64, depth=4, num_heads=4))
    return f'local-dir:{tmp_path}/vit'


def evaluate(data, model, out, *arguments):
    return CliRunner().invoke(
        main, ['evaluate', str(data), '--model', model, '--out', str(out), *map(str, arguments)])


def rows(out):
    with (out / 'results.csv').open() as file:
        return list(csv.DictReader(file))


def test_rows_agree_with_a_count_of_our_own(folder, saved, tmp_path):
    result = evaluate(folder, saved, tmp_path / 'out', *ARGUMENTS)
    assert result.exit_code == 0, result.output
    found = {(row['sampler'], row['n_tokens']): row for row in rows(tmp_path / 'out')}
    assert list(found) == [('grid', '4'), ('grid', '9'), ('uniform', '4'), ('uniform', '9')]
    model = timm.create_model(saved, pretrained=True, n_tokens=9, sampler='grid').eval()
    transform = model_transform(model)
    images = torch.stack([
        transform(Image.open(folder / str(i // 3) / f'{i % 3}.png').convert('RGB')) for i in range(30)])
    labels = torch.arange(30) // 3
    with torch.inference_mode():
        logits = model(images)
        top1 = (logits.argmax(dim=1) == labels).float().mean().item()
        assert float(found['grid', '9']['top1']) == pytest.approx(100 * top1, abs=1e-3)
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        assert float(found['grid', '9']['nll']) == pytest.approx(loss, abs=1e-3)
        # What an image's random tokens are depends on its number alone.
        positions = torch.cat([
            timm_spot.sample_positions('uniform', 4, (64, 64), generator=torch.Generator().manual_seed(i))
            for i in range(30)])
        loss = torch.nn.functional.cross_entropy(model(images, positions), labels).item()
        assert float(found['uniform', '4']['nll']) == pytest.approx(loss, abs=1e-3)


def test_a_rerun_computes_what_is_missing(folder, saved, tmp_path):
    evaluate(folder, saved, tmp_path / 'out', *ARGUMENTS)
    before = (tmp_path / 'out' / 'results.csv').read_text()
    result = evaluate(folder, saved, tmp_path / 'out', *ARGUMENTS)
    assert '0 rows computed, 4 found' in result.output
    assert (tmp_path / 'out' / 'results.csv').read_text() == before
    result = evaluate(folder, saved, tmp_path / 'out', *ARGUMENTS, '--seeds', '0,1')
    assert '2 rows computed, 2 found' in result.output
    row = rows(tmp_path / 'out')[-1]
    assert (row['seeds'], row['images']) == ('0 1', '30')
    assert row['nll_se_seeds'] and row['nll_se']


def test_a_line_cut_off_by_a_kill_is_computed_again(folder, saved, tmp_path):
    evaluate(folder, saved, tmp_path / 'out', *ARGUMENTS)
    file = tmp_path / 'out' / 'results.csv'
    whole = file.read_text()
    file.write_text(whole[:-30])
    evaluate(folder, saved, tmp_path / 'out', *ARGUMENTS)
    assert file.read_text() == whole
    assert (tmp_path / 'out' / 'speed.csv').read_text().count('\n') == 6  # the last one twice: the later one counts


KNN = 5


def start(data, model, out, *launcher):
    arguments = ['evaluate', data, '--model', model, '--out', out, *ARGUMENTS, '--knn', data, '--knn-k', KNN]
    return subprocess.Popen(
        [sys.executable, *launcher, '-m', 'timm_spot.cli', *map(str, arguments)], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(torch.get_num_threads())))


def test_killed_and_restarted_gives_the_same_file(folder, saved, tmp_path):
    evaluate(folder, saved, tmp_path / 'whole', *ARGUMENTS, '--knn', folder, '--knn-k', KNN)
    process = start(folder, saved, tmp_path / 'killed')
    results = tmp_path / 'killed' / 'results.csv'
    while not results.exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() < 0 and len(rows(results.parent)) < 4
    evaluate(folder, saved, tmp_path / 'killed', *ARGUMENTS, '--knn', folder, '--knn-k', KNN)
    assert results.read_bytes() == (tmp_path / 'whole' / 'results.csv').read_bytes()


def test_two_processes_give_the_file_of_one(folder, saved, tmp_path):
    evaluate(folder, saved, tmp_path / 'one', *ARGUMENTS, '--knn', folder, '--knn-k', KNN)
    process = start(
        folder, saved, tmp_path / 'two', '-m', 'accelerate.commands.launch', '--cpu', '--num_processes', '2',
        '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no')
    try:
        assert process.wait(timeout=300) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
    assert (tmp_path / 'two' / 'results.csv').read_bytes() == (tmp_path / 'one' / 'results.csv').read_bytes()


def test_baselines_oracle_and_another_model(folder, saved, saved_vit, tmp_path):
    result = evaluate(
        folder, saved, tmp_path / 'out', '--model', saved_vit, '--samplers', 'salient,grid', '--budgets', '64',
        '--baselines', 'patch-drop,low-res,top-k', '--oracle', 'isotropic', '--seeds', '0,1')
    assert result.exit_code == 0, result.output
    found = {(row['model'] == saved, row['sampler']): row for row in rows(tmp_path / 'out')}
    everything = {found[False, name]['nll'] for name in ('as it is', 'patch-drop', 'low-res', 'top-k')}
    assert len({round(float(nll), 3) for nll in everything}) == 1  # at the full budget they are the ViT
    assert float(found[True, 'patch-drop']['nll']) == pytest.approx(float(found[True, 'grid']['nll']), abs=1e-3)
    assert float(found[True, 'oracle isotropic']['nll']) < float(found[True, 'grid']['nll'])
    assert (found[True, 'salient']['saliency'], found[True, 'salient']['seeds']) == ('spectral', '0 1')
    report = (tmp_path / 'out' / 'report.html').read_text()
    assert report.count('<svg') == 4 and 'src="data:image/png;base64,' in report
    assert not re.search(r'(src|href)="(?!data:|#)|url\((?!#)|@import|<link|<script', report)  # nothing to fetch


def test_scorers_and_keep_rates_agree_with_a_count_of_our_own(folder, saved_vit, tmp_path):
    vit = timm.create_model(saved_vit, pretrained=True).eval()
    torch.manual_seed(1)
    sparse = timm_spot.sparsify(vit, keep_rate=0.6, stages=(1, 3))
    timm.models.save_for_hf(sparse, tmp_path / 'sparse')
    names = (f"local-dir:{tmp_path / 'sparse'}", saved_vit)
    arguments = (
        '--model', saved_vit, '--scorers', 'relevance,cls-attention,random', '--keep-rates', '1,0.5', '--seeds', '0,1')
    result = evaluate(folder, names[0], tmp_path / 'out', *arguments)
    assert result.exit_code == 0, result.output
    found = {(row['model'] == names[0], row['scorer'], row['keep_rate']): row for row in rows(tmp_path / 'out')}
    assert list(found) == [
        *((True, scorer, rate) for scorer in ('relevance', 'cls-attention', 'random') for rate in ('1.0', '0.5')),
        *((False, scorer, rate) for scorer in ('cls-attention', 'random') for rate in ('1.0', '0.5'))]
    assert {row['nll'] for key, row in found.items() if key[2] == '1.0'} == {found[True, 'relevance', '1.0']['nll']}

    transform = model_transform(vit)
    images = torch.stack([
        transform(Image.open(folder / str(i // 3) / f'{i % 3}.png').convert('RGB')) for i in range(30)])

    def nll(model):
        with torch.inference_mode():
            return torch.nn.functional.cross_entropy(model.eval()(images), torch.arange(30) // 3).item()

    sparse.set_keep_rate(0.5)
    assert float(found[True, 'relevance', '0.5']['nll']) == pytest.approx(nll(sparse), abs=1e-3)
    for ours, stages in ((True, (1, 3)), (False, (1, 2, 3))):
        own = found[ours, 'cls-attention', '0.5']
        model = timm_spot.sparsify(vit, 0.5, stages, 'cls-attention')
        assert float(own['nll']) == pytest.approx(nll(model), abs=1e-3)
        assert (own['stages'], own['seeds'], own['n_tokens']) == (' '.join(map(str, stages)), '', '64')
        drawn = [nll(timm_spot.sparsify(vit, 0.5, stages, 'random', scorer_seed=seed)) for seed in (0, 1)]
        assert float(found[ours, 'random', '0.5']['nll']) == pytest.approx(sum(drawn) / 2, abs=1e-3)
        assert float(own['gflops']) < 0.8 * float(found[ours, 'cls-attention', '1.0']['gflops'])

    assert '0 rows computed, 10 found' in evaluate(folder, names[0], tmp_path / 'out', *arguments).output
    assert '1 rows computed, 0 found' in evaluate(folder, names[0], tmp_path / 'own').output
    row, = rows(tmp_path / 'own')
    assert (row['scorer'], row['keep_rate'], row['stages']) == ('relevance', '0.6', '1 3')
    table = (tmp_path / 'out' / 'results.md').read_text()
    assert '| scorer | keep 1.0: top-1 | keep 0.5: top-1 |' in table and '| relevance, 64 as it is |' in table


def test_a_model_that_merges_has_a_row_of_its_own_and_one_for_each_keep_rate(folder, saved_vit, tmp_path):
    model = timm_spot.sparsify(timm.create_model(saved_vit, pretrained=True).eval(), scorer='merge', r=5)
    timm.models.save_for_hf(model, tmp_path / 'merging')
    name = f"local-dir:{tmp_path / 'merging'}"
    for arguments in ((), ('--scorers', 'merge', '--keep-rates', '0.7'), ('--scorers', 'merge,norm', '--flops', '0.8')):
        result = evaluate(folder, name, tmp_path / 'out', *arguments)
        assert result.exit_code == 0, result.output
    own, rate, merged, dropped = rows(tmp_path / 'out')
    assert (merged['share'], merged['keep_rate'], dropped['share'], dropped['r']) == ('0.8', '', '0.8', '')
    assert float(merged['gflops']) == pytest.approx(float(dropped['gflops']), rel=0.05)
    assert (own['scorer'], own['keep_rate'], own['r']) == ('merge', '', '5')
    assert (rate['scorer'], rate['keep_rate'], rate['r']) == ('merge', '0.7', '')
    assert float(own['gflops']) != float(rate['gflops'])
    table = (tmp_path / 'out' / 'results.md').read_text()
    assert '| scorer | keep 0.7: top-1 | merged: top-1 |' in table and '| merge, r 5, 64 as it is |' in table
    assert '| scorer | 0.8 of the multiply-adds: top-1 |' in table and '| merge, 64 as it is |' in table


def test_a_model_that_merges_what_is_alike_has_a_row(folder, saved_vit, tmp_path):
    model = timm_spot.sparsify(timm.create_model(saved_vit, pretrained=True).eval(), scorer='merge', similarity=0.8)
    timm.models.save_for_hf(model, tmp_path / 'merging')
    result = evaluate(folder, f"local-dir:{tmp_path / 'merging'}", tmp_path / 'out')
    assert result.exit_code == 0, result.output
    row, = rows(tmp_path / 'out')
    assert (row['scorer'], row['keep_rate'], row['r'], row['similarity']) == ('merge', '', '', '0.8')
    assert 'merge, similarity 0.8' in (tmp_path / 'out' / 'results.md').read_text()


def test_placed_tokens_are_dropped(folder, saved, tmp_path):
    scorers = ('--scorers', 'received-attention', '--keep-rates', '1,0.5')
    result = evaluate(folder, saved, tmp_path / 'out', *ARGUMENTS, *scorers)
    assert result.exit_code == 0, result.output
    found = {(row['sampler'], row['n_tokens'], row['keep_rate']): row for row in rows(tmp_path / 'out')}
    assert len(found) == 8
    evaluate(folder, saved, tmp_path / 'out', *ARGUMENTS)
    for row in rows(tmp_path / 'out')[8:]:
        assert row['nll'] == found[row['sampler'], row['n_tokens'], '1.0']['nll']
        assert row['nll'] != found[row['sampler'], row['n_tokens'], '0.5']['nll']
    report = (tmp_path / 'out' / 'report.html').read_text()
    assert report.count('<svg') == 4 and 'received-attention, 9 uniform, keep 0.5' in report
    card = add_results('# a\n\n## Usage\n', (tmp_path / 'out' / 'results.csv').read_text())
    assert '| uniform, received-attention at keep rate 0.5 | ' in card


def test_a_model_that_cannot_drop_tokens_is_refused(folder, tmp_path):
    resnet = timm.create_model('test_resnet', num_classes=10)
    timm.models.save_for_hf(resnet, tmp_path / 'resnet')
    result = evaluate(folder, f'local-dir:{tmp_path}/resnet', tmp_path / 'out', '--scorers', 'norm')
    assert result.exit_code == 1 and 'it is a ResNet, not a timm VisionTransformer' in result.output


def test_a_folder_of_another_version_is_left_alone(folder, saved, tmp_path):
    (tmp_path / 'results.csv').write_text('data,sampler,top1\ndigits,grid,50.0\n')
    result = evaluate(folder, saved, tmp_path, *ARGUMENTS)
    assert result.exit_code == 1 and 'results.csv has other columns' in result.output


def test_the_card_of_the_model_shows_the_results(folder, saved, tmp_path):
    evaluate(folder, saved, tmp_path / 'out', *ARGUMENTS, '--seeds', '0,1,2')
    card = add_results('# a\n\n## Usage\n', (tmp_path / 'out' / 'results.csv').read_text())
    assert '| sampler | 4 tokens | 9 tokens |' in card and '| uniform | ' in card


def test_skipped_pictures_are_counted_and_listed(folder, saved, tmp_path):
    (folder / '5' / '1.png').write_text('no picture')
    result = evaluate(folder, saved, tmp_path / 'out', *ARGUMENTS)
    assert result.exit_code == 1 and '5/1.png is no picture' in result.output
    result = evaluate(folder, saved, tmp_path / 'out', *ARGUMENTS, '--skip-broken')
    assert result.exit_code == 0 and 'skipped: ' in result.output
    assert {(row['images'], row['skipped']) for row in rows(tmp_path / 'out')} == {('29', '1')}


def test_a_model_without_classifier_has_neighbours_only(folder, tmp_path):
    torch.manual_seed(0)
    timm.models.save_for_hf(
        timm.create_model('spot_vit_pico_patch8_64', num_classes=0, **SMALL), tmp_path / 'features')
    name = f"local-dir:{tmp_path / 'features'}"
    result = evaluate(folder, name, tmp_path / 'out', *ARGUMENTS)
    assert result.exit_code == 1 and 'has no classifier: give --knn' in result.output
    result = evaluate(folder, name, tmp_path / 'out', *ARGUMENTS, '--knn', folder, '--knn-k', 1)
    assert result.exit_code == 0, result.output
    assert {(row['top1'], row['knn_top1']) for row in rows(tmp_path / 'out') if row['sampler'] == 'grid'} == {
        ('', '100.0000')}


def test_the_key_says_it_all(folder, saved, tmp_path):
    evaluate(folder, saved, tmp_path / 'out', '--samplers', 'grid', '--budgets', '4')
    row, = rows(tmp_path / 'out')
    assert list(row)[:len(KEY)] == list(KEY)
    result = evaluate(folder, saved, tmp_path / 'out', '--samplers', 'grid', '--budgets', '4', '--amp', 'bfloat16')
    assert '1 rows computed, 0 found' in result.output


ONE = ('--samplers', 'grid', '--budgets', '4')
ALONE = Processes(0, 1, torch.device('cpu'))


def test_a_second_run_into_a_folder_is_refused_and_told_who_holds_it(folder, saved, tmp_path):
    with open_folder(tmp_path / 'out', ALONE):
        (tmp_path / 'out' / 'decoded').mkdir()
        result = evaluate(folder, saved, tmp_path / 'out', *ONE)
        assert result.exit_code == 1 and 'another run writes to' in result.output
        assert f'process {os.getpid()} on' in result.output
        assert (tmp_path / 'out' / 'decoded').exists() and not (tmp_path / 'out' / 'results.csv').exists()
    assert evaluate(folder, saved, tmp_path / 'out', *ONE).exit_code == 0


def test_what_killed_runs_left_goes_at_the_next_run(folder, saved, tmp_path):
    out = tmp_path / 'out'
    evaluate(folder, saved, out, *ONE)
    files = sorted(path.name for path in out.iterdir())
    (out / 'decoded' / '0123').mkdir(parents=True)
    (out / '.results.99.tmp.md').write_text('half of a')
    result = evaluate(folder, saved, out, *ONE)
    assert '0 rows computed, 1 found' in result.output
    assert sorted(path.name for path in out.iterdir()) == files
    assert files == ['report.html', 'results.csv', 'results.md', 'speed.csv']


def test_a_run_that_fails_keeps_what_it_decoded(folder, saved, tmp_path):
    (folder / '9' / '2.png').write_text('no picture')
    result = evaluate(folder, saved, tmp_path / 'out', *ONE, '--batch-size', '7')
    assert result.exit_code == 1 and '9/2.png' in result.output
    assert list((tmp_path / 'out' / 'decoded').rglob('*.safetensors'))


def test_a_torn_speed_is_named_and_its_row_still_reported(folder, saved, tmp_path):
    out = tmp_path / 'out'
    evaluate(folder, saved, out, *ARGUMENTS)
    lines = (out / 'speed.csv').read_text().splitlines(keepends=True)
    (out / 'speed.csv').write_text(''.join(lines[:2]) + lines[2][:20])
    result = evaluate(folder, saved, out, *ARGUMENTS)
    assert result.exit_code == 0 and '0 rows computed, 4 found' in result.output, result.output
    assert 'speed.csv, line 3, was left unfinished' in result.output
    assert 'speed.csv lacks 3 of 4 rows' in result.output
    assert len((out / 'speed.csv').read_text().splitlines()) == 2


def test_results_of_version_0_1_are_continued(folder, saved, tmp_path):
    out = tmp_path / 'out'
    evaluate(folder, saved, out, *ARGUMENTS)
    for name in ('results.csv', 'speed.csv'):  # as version 0.1 wrote them
        found = list(csv.DictReader((out / name).read_text().splitlines()))
        old = [{k: v for k, v in row.items() if k not in ('kind', 'settings')} for row in found]
        with (out / name).open('w', newline='') as file:
            writer = csv.DictWriter(file, old[0], lineterminator='\n')
            writer.writeheader()
            writer.writerows(old)
    result = evaluate(folder, saved, out, *ARGUMENTS, '--samplers', 'grid,center')
    assert '2 rows computed, 2 found' in result.output, result.output
    assert [row['kind'] for row in rows(out)] == ['sampler'] * 6
    assert [bool(row['settings']) for row in rows(out)] == [False] * 4 + [True] * 2


def test_the_head_runs_once_for_each_picture(folder, tmp_path, pico):
    train = Pictures(str(folder))
    planned = plan_rows({'pico': pico}, train, Request(
        samplers=('grid',), budgets=(4,), knn=Knn(train, k=1)))
    seen = []
    pico.head.register_forward_hook(lambda module, given, logits: seen.append(len(logits)))
    with open_folder(tmp_path / 'out', ALONE):
        compute(planned, train, Run(tmp_path / 'out', ALONE, Knn(train, k=1), batch_size=10))
    assert sorted(seen) == [1, 10, 10, 10]  # the one by which operations are counted; none for the bank


def test_shared_models_stay_as_they_are(folder, tmp_path, pico):
    sparse = timm_spot.sparsify(pico, 0.6, scorer='norm').eval()
    torch.manual_seed(0)
    dht = timm.create_model('dht_vit_pico_patch8_64', embed_dim=32, depth=1, n_tokens=7).eval()
    data = Pictures(str(folder))
    planned = plan_rows({'sparse': sparse, 'dht': dht}, data, Request(
        samplers=('grid',), budgets=(4, 9)))
    with open_folder(tmp_path / 'out', ALONE):
        compute(planned, data, Run(tmp_path / 'out', ALONE))
    assert (sparse.keep_rate, sparse.scorer, dht.n_tokens) == (0.6, 'norm', 7)
    scored = plan_rows({'sparse': sparse}, data, Request(
        samplers=('grid',), budgets=(9,), scorers=('random',), keep_rates=(0.5,), seeds=(3, 4)))
    one, two = (scored[0].model_at(seed) for seed in (3, 4))
    assert (one.plan.scorer_seed, two.plan.scorer_seed, one.keep_rate) == (3, 4, 0.5)
    assert one.head.weight is two.head.weight


def test_no_picture_that_can_be_read(folder, saved, tmp_path):
    for file in folder.rglob('*.png'):
        file.write_text('no picture')
    result = evaluate(folder, saved, tmp_path / 'out', *ONE, '--skip-broken')
    assert result.exit_code == 1 and 'can be read' in result.output and 'Traceback' not in result.output
