"""Copies of modules that share their weights."""
from __future__ import annotations

from typing import TypeVar

from torch import nn

Module = TypeVar('Module', bound=nn.Module)


def shallow_copy(module: Module, **children: nn.Module) -> Module:
    """A copy with settings of its own and the very weights, children and hooks of `module`, which stays as it is.

    Args:
        module: Any module.
        **children: Instead of its own of these names.
    """
    copied = object.__new__(type(module))
    # A program compiled of the module itself would run the module.
    copied.__dict__.update({name: value for name, value in module.__dict__.items() if name != '_compiled_call_impl'})
    copied.__dict__['_modules'] = {**module._modules, **children}
    return copied
