"""What a search has measured, in a folder: one file an evaluation, whole or not there, for one search at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jcompress import core, rules
from jcompress.core import PyTree
from jcompress.io.files import replace

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Ledger:
    """Scores by what was measured, kept in memory and, where there is a folder, there too.

    Args:
      folder: where to keep them; None for nowhere.
      about: what the search is, told apart by its JSON.

    Raises:
      ValueError: for a folder that holds another search.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, about: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else pathlib.Path(folder)
        self._known: dict[str, float] = {}
        if self._folder is not None:
            (self._folder / "evaluations").mkdir(parents=True, exist_ok=True)
            self._claim(json.loads(json.dumps(dict(about))))
            for path in sorted((self._folder / "evaluations").glob("*.json")):
                row = json.loads(path.read_text())
                self._known[row["key"]] = float(row["score"])

    def _claim(self, about: dict[str, Any]) -> None:
        """Write down what the search is, or compare."""
        assert self._folder is not None
        path = self._folder / "search.json"
        if not path.exists():
            replace(path, lambda file: file.write(json.dumps(about, indent=1).encode()))
            return
        found = json.loads(path.read_text())
        if different := sorted(name for name in {*found, *about} if found.get(name) != about.get(name)):
            raise ValueError(
                f"{self._folder}: holds another search, of other {', '.join(different)}; give another workdir, or "
                "remove it"
            )

    def get(self, key: str) -> float | None:
        """The score that was measured, if it was."""
        return self._known.get(key)

    def put(self, key: str, score: float, row: Mapping[str, Any]) -> None:
        """Keep a score; on disk when this returns."""
        self._known[key] = score
        if self._folder is not None:
            name = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
            text = json.dumps({"key": key, "score": score, **row})
            replace(self._folder / "evaluations" / f"{name}.json", lambda file: file.write(text.encode()))


@contextlib.contextmanager
def alone(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Hold a folder for this process.

    Raises:
      ValueError: where another process holds it.
    """
    if folder is None or fcntl is None:
        yield
        return
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    with open(pathlib.Path(folder) / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{folder}: another search runs in it; wait for it, or give another workdir") from None
        yield


def fingerprint(params: PyTree) -> str:
    """What tells one set of parameters from another: their paths, shapes, dtypes and bits."""
    digest = hashlib.blake2b(digest_size=12)
    for path, x in rules.leaves(params).items():
        digest.update(f"{path} {x if core.is_node(x) else ''}\n".encode())
        for y in map(np.asarray, jax.tree.leaves(x)):
            digest.update(f"{y.shape} {y.dtype}\n".encode())
            digest.update(np.ascontiguousarray(y).tobytes())
    return digest.hexdigest()
