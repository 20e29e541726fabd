"""What mkdocstrings is told of our docstrings: the section `Example:` holds doctests, as `Examples:` does."""
from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """Reads every `Example:` as `Examples:`, which the site shows as code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r'^Example:$', 'Examples:', obj.docstring.value, flags=re.MULTILINE)
