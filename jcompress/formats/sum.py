"""Sums of nodes."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed
from jcompress.formats.masked import Masked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Sum(Compressed):
    """A sum of terms, such as quantized + low rank, or sparse + low rank.

    Attributes:
      terms: a tuple of nodes that stand for arrays of one shape.
    """

    terms: tuple[Any, ...]
    elementwise: ClassVar[tuple[str, ...]] = ("terms",)

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        first, *rest = (core.dense(term, key=key) for term in self.terms)
        for term in rest:
            first = first + term
        return first

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Sum:
        """Exact where at most one term is not a plain mask; else each term in turn is fitted to what the others leave.

        Where a mask lets a term take any value, the other terms need not fit, so they are fitted elsewhere first.
        """
        free = [t for t in self.terms if _is_free(t)]
        others = [t for t in self.terms if not _is_free(t)]
        outside = where
        for term in free:
            outside = ~term.mask if outside is None else outside & ~term.mask
        fitted = _in_turn(others, w, outside)
        for term in others:
            w = w - fitted[id(term)].materialize()
        for term in free:
            fitted[id(term)] = term.project(w, where)
            w = w - fitted[id(term)].materialize()
        return Sum(tuple(fitted[id(term)] for term in self.terms))


def _is_free(term: Any) -> bool:
    return isinstance(term, Masked) and not core.is_node(term.values)


def _in_turn(terms: list[Any], w: jax.Array, where: jax.Array | None, sweeps: int = 4) -> dict[int, Any]:
    """Block coordinate descent; one sweep is exact for one term."""
    fitted: dict[int, Any] = {}
    for _ in range(sweeps if len(terms) > 1 else 1):
        for term in terms:
            rest = w
            for other in terms:
                if other is not term and id(other) in fitted:
                    rest = rest - fitted[id(other)].materialize()
            fitted[id(term)] = term.project(rest.astype(jnp.result_type(w)), where)
    return fitted
