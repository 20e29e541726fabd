"""What MkDocs is told besides mkdocs.yml: what the site has to have, and what becomes of links out of docs/."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import timm
from mkdocs.exceptions import PluginError

import timm_spot
from timm_spot.tasks.evaluation.families import name_patterns

DOCS = Path(__file__).parent


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Leave the names of files outside of docs/, which the site does not have."""
    return re.sub(r'\[([^\]]+)\]\((?:\.\./)+([^)]+)\)', lambda link: link[0] if (DOCS / link[2]).exists() else
                  f'{link[1]} (`{link[2]}`)', markdown)


def on_config(config: Any) -> None:
    """Stop unless every page is in the navigation, every public name in the API, every model in the table."""
    nav = str(config['nav'])
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob('*.md')]
    _complain('mkdocs.yml lacks in `nav`', [page for page in pages if f"'{page}'" not in nav])
    api = ''.join(page.read_text('utf-8') for page in (DOCS / 'api').glob('*.md'))
    public = [
        name for name in dir(timm_spot) if not name.startswith('_')
        and getattr(getattr(timm_spot, name), '__module__', '').startswith('timm_spot')]
    _complain('docs/api lacks', [name for name in public if not re.search(rf'^::: \S+\.{name}$', api, re.M)])
    zoo = (DOCS / 'zoo.md').read_text('utf-8')
    models = [
        tagged for name in timm.list_models(name_patterns())
        for tagged in timm.list_models(f'{name}.*', include_tags=True) or [name]]
    _complain('docs/zoo.md lacks (run recipes/zoo_table.py)', [name for name in models if f'`{name}`' not in zoo])


def _complain(what: str, missing: list[str]) -> None:
    if missing:
        raise PluginError(f'{what}: {", ".join(sorted(missing))}.')
