from __future__ import annotations

import sys

import torch

from timm_spot.tasks.processes import Processes, start_processes


def test_one_process_works_without_accelerate(monkeypatch):
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    alone = start_processes('cpu')
    assert alone == Processes(0, 1, torch.device('cpu')) and alone.is_main
    assert alone.gather([1, 2]) == [1, 2]
