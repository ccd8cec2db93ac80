"""A hook of the site: figures of studies, which lie beside docs/, come into the site with the pages that show them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parent
_FIGURE = re.compile(r"\]\(\.\./(studies/[\w./-]+\.png)\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Adds every figure that a page shows from studies/."""
    pages = [page for page in files if page.is_documentation_page()]
    for name in sorted({name for page in pages for name in _FIGURE.findall(page.content_string)}):
        files.append(File(name, str(_ROOT), config.site_dir, use_directory_urls=False))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns a page whose figures are where they are in the site."""
    return _FIGURE.sub(r"](\1)", markdown)
