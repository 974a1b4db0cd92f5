"""Docstrings name other objects by role, as in ``:func:`jcompress.plan` ``: links to what is public, else code."""

from __future__ import annotations

import pathlib
import re
import sys
from typing import Any

import griffe

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from names import all_public_names

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|obj):`~?([\w.]+)`")

EXAMPLE = re.compile(r"^Example:$", re.M)
PUBLIC = set(all_public_names())


class Roles(griffe.Extension):
    """Rewrites roles as Markdown."""

    def on_object(self, *, obj: griffe.Object, loader: Any = None, **kwargs: Any) -> None:
        """Before a page is written from a docstring."""
        if obj.docstring:
            text = EXAMPLE.sub("Examples:", obj.docstring.value)
            obj.docstring.value = ROLE.sub(lambda found: _shown(found[1]), text)


def _shown(target: str) -> str:
    """Code, and a link where the public face has the object."""
    name = f"`{target.replace('jcompress.', 'jc.', 1)}`"
    return f"[{name}][{target}]" if target in PUBLIC else name
