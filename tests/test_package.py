"""The package as a whole: what importing it does and costs."""
from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import json, sys, warnings
warnings.simplefilter('error')
import timm
before = set(sys.modules), set(timm.list_models())
import timm_spot
modules = sorted(m for m in set(sys.modules) - before[0] if not m.startswith('timm_spot'))
names = sorted(set(timm.list_models()) - before[1])
print(json.dumps(dict(modules=modules, names=names)))
"""


def test_import_registers_models_and_loads_nothing_else():
    result = subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True, check=True, timeout=300)
    answer = json.loads(result.stdout)
    assert answer['modules'] == []
    assert answer['names'] and all(name.startswith(('spot_', 'dht_', 'relevance_')) for name in answer['names'])
