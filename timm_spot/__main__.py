"""Run any of timm's scripts with timm_spot's models registered.

    python -m timm_spot SCRIPT [ARGUMENTS OF THE SCRIPT]
    python -m timm_spot validate.py --model spot_vit_pico_patch8_64 --pretrained --model-kwargs n_tokens=25 ...
    torchrun --nproc-per-node 2 -m timm_spot train.py --model spot_vit_base_patch16_mae ...
"""
from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from .models import SpotPretrainedCfg
from .models._timm import let_scripts_read


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if sys.argv[1] in ('-h', '--help'):
        print(__doc__)
        return
    script = Path(sys.argv[1])
    if not script.is_file():
        sys.exit(f'python -m timm_spot: there is no script {script}')
    data = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    data.add_argument('--data-dir')
    data.add_argument('--dataset')
    given, _ = data.parse_known_args(sys.argv[2:])
    # timm's own answer to a missing folder is an AssertionError without a word.
    if given.data_dir and not given.dataset and not Path(given.data_dir).exists():
        sys.exit(f'python -m timm_spot: --data-dir {given.data_dir} does not exist')
    # Scripts build the config of a hf-hub: or local-dir: model before our entrypoint can; this lets them read
    # n_tokens, sampler and the like in it. Fields that are unset never show.
    let_scripts_read(SpotPretrainedCfg)
    del sys.argv[0]
    sys.path[0] = str(script.parent.resolve())
    runpy.run_path(str(script), run_name='__main__')


if __name__ == '__main__':
    main()
