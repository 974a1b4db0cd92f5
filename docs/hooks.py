"""The build writes the list of papers, and fails for a public name that no page shows."""

from __future__ import annotations

import pathlib
import re
import sys
from typing import Any

import mkdocs.exceptions

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import papers
from names import all_public_names


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """The page of the papers, with their list."""
    return markdown.replace("<!-- papers -->", papers.table()) if page.file.src_uri == "papers.md" else markdown


def on_post_build(config: Any, **kwargs: Any) -> None:
    """Compares the anchors of the built pages with the public face."""
    pages = pathlib.Path(config["site_dir"]).rglob("*.html")
    shown = {anchor for page in pages for anchor in re.findall(r'id="(jcompress[\w.]+)"', page.read_text())}
    missing = [name for name in all_public_names() if name not in shown]
    if missing:
        raise mkdocs.exceptions.PluginError(
            f"no page shows {', '.join(missing[:8])} ({len(missing)} in all); add the room to docs/api"
        )
