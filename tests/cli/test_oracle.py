from __future__ import annotations

from commands import run


def test_models_that_place_no_tokens_are_refused(dht, tmp_path):
    result = run('oracle', dht, '--model', f'local-dir:{dht}/model', '--out', tmp_path / 'x.safetensors')
    assert result.exit_code == 1 and 'tokens are regions that it finds itself' in result.output
