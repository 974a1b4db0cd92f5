"""All that is public, by its full name."""

from __future__ import annotations

import importlib
import types


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
