from __future__ import annotations

import csv

from commands import run
from PIL import Image


def test_evaluate_has_a_row_for_each_budget(dht, tmp_path):
    for label in range(10):
        (tmp_path / 'data' / str(label)).mkdir(parents=True)
        Image.effect_noise((64, 64), 20 + 9 * label).save(tmp_path / 'data' / str(label) / '0.png')
    given = ('evaluate', tmp_path / 'data', '--model', f'local-dir:{dht}/model', '--out', tmp_path / 'out')
    result = run(*given, '--budgets', '4,9', '--baselines', 'patch-drop', '--knn', tmp_path / 'data',
                 '--knn-k', 1)
    assert result.exit_code == 0, result.output
    with (tmp_path / 'out' / 'results.csv').open() as file:
        found = list(csv.DictReader(file))
    assert [(row['sampler'], row['n_tokens']) for row in found] == [('regions', '4'), ('regions', '9')]
    assert float(found[0]['gflops']) < float(found[1]['gflops']) and found[0]['nll'] != found[1]['nll']
    assert float(found[0]['knn_top1']) == 100.  # the bank holds the same pictures
