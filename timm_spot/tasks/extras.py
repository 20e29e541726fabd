"""What is installed with which extra of the package, for those who lack it."""
from __future__ import annotations

import importlib

_EXTRAS = {
    'accelerate': 'evaluate',
    'fastapi': 'serve',
    'matplotlib': 'viz',
    'onnx': 'export',
    'onnxruntime': 'export',
    'onnxscript': 'export',
    'openvino': 'openvino',
    'sklearn': 'train',
    'starlette': 'play',
    'uvicorn': 'play',
}
_OTHERS = {'datasets': 'datasets', 'tensorflow_datasets': 'tensorflow-datasets', 'webdataset': 'webdataset'}  # of timm


def install_hint(error: ModuleNotFoundError) -> str | None:
    """What is missing and how it is installed; None where the module is of no extra.

    Example:
        >>> install_hint(ModuleNotFoundError(name='matplotlib.pyplot'))
        "this needs matplotlib: pip install 'timm-spot[viz]' (in a clone: pip install '.[viz]')."
    """
    if 'pip install' in str(error):
        return str(error)
    name = (error.name or '').partition('.')[0]
    if name in _EXTRAS:
        extra = _EXTRAS[name]
        return f"this needs {name}: pip install 'timm-spot[{extra}]' (in a clone: pip install '.[{extra}]')."
    if name in _OTHERS:
        return f'this needs {name}: pip install {_OTHERS[name]}'
    return None


def need(module: str) -> None:
    """Raise ModuleNotFoundError that says how to install it, unless a module of an extra is there."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(install_hint(e), name=e.name) from e
