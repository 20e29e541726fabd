from __future__ import annotations

import json
import subprocess
import sys

import timm
from conftest import SMALL

SCRIPT = """
import sys, timm, helper
from timm.models import resolve_model_input_args
arguments = resolve_model_input_args(sys.argv[1], {}, n_tokens=int(sys.argv[2]) if len(sys.argv) > 2 else None)
model = timm.create_model(**arguments)
print(__name__, helper.VALUE, model.n_tokens, model.placer.prior.sampler)
"""


def run(*arguments):
    return subprocess.run(
        [sys.executable, '-m', 'timm_spot', *map(str, arguments)], capture_output=True, text=True, timeout=300)


def test_scripts_know_our_models_and_read_placements_in_a_config(tmp_path):
    (tmp_path / 'helper.py').write_text('VALUE = 7')
    (tmp_path / 'script.py').write_text(SCRIPT)
    timm.models.save_for_hf(timm.create_model('spot_vit_pico_patch8_64', **SMALL), tmp_path / 'saved')
    config = json.loads((tmp_path / 'saved/config.json').read_text())
    config['pretrained_cfg'].update(n_tokens=9, sampler='sobol')
    (tmp_path / 'saved/config.json').write_text(json.dumps(config))

    result = run(tmp_path / 'script.py', f'local-dir:{tmp_path}/saved')
    assert result.stdout.split() == ['__main__', '7', '9', 'sobol'], result.stderr
    result = run(tmp_path / 'script.py', f'local-dir:{tmp_path}/saved', 25)
    assert result.stdout.split() == ['__main__', '7', '25', 'sobol'], result.stderr


def test_without_a_script():
    result = run()
    assert result.returncode == 1 and 'python -m timm_spot SCRIPT' in result.stderr
    result = run('--help')
    assert result.returncode == 0 and 'python -m timm_spot SCRIPT' in result.stdout
    result = run('no_such_script.py')
    assert result.returncode == 1 and 'there is no script no_such_script.py' in result.stderr


def test_missing_data_folder_is_named(tmp_path):
    (tmp_path / 'script.py').write_text('print("ran")')
    result = run(tmp_path / 'script.py', '--data-dir', tmp_path / 'nowhere', '--model', 'any')
    assert result.returncode == 1 and f'--data-dir {tmp_path}/nowhere does not exist' in result.stderr
    assert run(tmp_path / 'script.py', '--data-dir', tmp_path, '--epochs', '1').stdout == 'ran\n'
    assert run(tmp_path / 'script.py', '--data-dir', tmp_path / 'cache', '--dataset', 'hfds/any').stdout == 'ran\n'
