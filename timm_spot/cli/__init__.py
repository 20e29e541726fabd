"""The `timm-spot` command: one thin sub-command for each task."""
from __future__ import annotations

from . import draw, evaluate, oracle, play, predict, vectorize, weights
from .common import main

__all__ = ['draw', 'evaluate', 'main', 'oracle', 'play', 'predict', 'vectorize', 'weights']
