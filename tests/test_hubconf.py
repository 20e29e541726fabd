from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import timm

REPOSITORY = Path(__file__).parent.parent
CODE = """
import json, sys, torch
repository = sys.argv[1]
torch.hub._get_cache_or_reload = lambda *_, **__: repository  # list and help take repositories on GitHub only
names = torch.hub.list('owner/timm_spot')
model = torch.hub.load(repository, 'spot_vit_pico_patch8_64', source='local', n_tokens=9, sampler='center')
help = torch.hub.help('owner/timm_spot', 'spot_vit_base_patch16_mae')
print(json.dumps(dict(names=names, n_tokens=model.n_tokens, help=help)))
"""


def test_torch_hub_serves_every_name(tmp_path):
    # From another folder, so that only the repository that torch.hub is given can hold the package.
    result = subprocess.run(
        [sys.executable, '-c', CODE, str(REPOSITORY)], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert sorted(answer['names']) == timm.list_models('spot_*')
    assert answer['n_tokens'] == 9
    assert 'masked autoencoder' in answer['help'] and 'n_tokens=' in answer['help']
