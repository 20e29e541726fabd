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
dht = torch.hub.load(repository, 'dht_vit_base_16_in1k', source='local', depth=1, n_tokens=50)
ras2vec = torch.hub.load(repository, 'dht_ras2vec', source='local', pretrained=True)
help = torch.hub.help('owner/timm_spot', 'spot_vit_base_patch16_mae')
svg = ras2vec(torch.zeros(1, 3, 16, 16))[0]
print(json.dumps(dict(names=names, n_tokens=[model.n_tokens, dht.n_tokens], help=help, svg=svg)))
"""


def test_torch_hub_serves_every_name(tmp_path):
    # From another folder, so that only the repository that torch.hub is given can hold the package.
    result = subprocess.run(
        [sys.executable, '-c', CODE, str(REPOSITORY)], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    aliases = ['dht_ras2vec', 'dht_vit_base_16_in1k']
    assert sorted(answer['names']) == sorted(timm.list_models(['spot_*', 'dht_*', 'relevance_*']) + aliases)
    assert answer['n_tokens'] == [9, 50]
    assert answer['svg'].startswith('<svg ')
    assert 'masked autoencoder' in answer['help'] and 'n_tokens=' in answer['help']
