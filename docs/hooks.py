"""The build fails for a public name that no page shows."""

from __future__ import annotations

import importlib
import pathlib
import re
import types
from typing import Any

import mkdocs.exceptions


def all_public_names() -> list[str]:
    """The full name of all that is public."""
    return public_names(importlib.import_module("jcompress"), "jcompress")


def public_names(module: types.ModuleType, path: str) -> list[str]:
    """The full names of all that a room and the rooms in it export."""
    names = []
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        inner = isinstance(value, types.ModuleType)
        names += public_names(value, f"{path}.{name}") if inner else [f"{path}.{name}"]
    return [name for name in names if not name.split(".")[-1].startswith("__")]


def on_post_build(config: Any, **kwargs: Any) -> None:
    """Compares the anchors of the built pages with the public face."""
    pages = pathlib.Path(config["site_dir"]).rglob("*.html")
    shown = {anchor for page in pages for anchor in re.findall(r'id="(jcompress[\w.]+)"', page.read_text())}
    missing = [name for name in all_public_names() if name not in shown]
    if missing:
        raise mkdocs.exceptions.PluginError(
            f"no page shows {', '.join(missing[:8])} ({len(missing)} in all); add the room to docs/api"
        )
