"""What a function costs as a polynomial in the sizes of its groups: exact at every choice of what stays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jcompress import core

Polynomial = Mapping[tuple[str, ...], int]
"""``{names of groups: coefficient}``: the sum of all coefficients times the sizes of their groups."""


@dataclasses.dataclass(frozen=True)
class Count:
    """A cost as a function of how many units of each group stay.

    ``sum_t c_t prod_{g in t} n_g``: a dense layer between two groups costs ``c n_in n_out``. Of the branches of a
    ``cond`` the dearest counts. Where the units that go share a value that counts, one of them is computed for all.

    Attributes:
      terms: ``{names of groups: coefficient}``.
      sizes: of all groups, when nothing is cut.
      choices: for each ``cond``, the counts of its branches.
      unit: what a one is counted in: 8 for bits counted in bytes.
      shared: for some groups, the terms that count besides where units of all of them go.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> groups = jc.trace.coupling(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((10, 3)))
      >>> groups.multiply_adds({}), groups.multiply_adds({"up[1]": 4})
      (400, 200)
      >>> groups.bytes({"up[1]": jnp.arange(8) < 4})
      80
    """

    terms: Polynomial
    sizes: Mapping[str, int]
    choices: tuple[tuple[Count, ...], ...] = ()
    unit: int = 1
    shared: Mapping[tuple[str, ...], Polynomial] = dataclasses.field(default_factory=dict)

    def __call__(self, keep: Mapping[str, Any]) -> Any:
        """The cost of what stays.

        Args:
          keep: ``{name: bool (size,)}``, or ``{name: number}``; groups that it does not name stay whole. Numbers may be
            traced, and then the result is float32; else it is an exact integer, rounded up.
        """
        found = {name: _number(x) for name, x in keep.items()}
        exact = all(isinstance(n, int) for n in found.values())
        sizes = {**self.sizes, **found}
        # Integers of 32 bits would overflow where two widths are multiplied.
        total = self._total(sizes if exact else {n: jnp.asarray(x, jnp.float32) for n, x in sizes.items()}, exact)
        return -(-total // self.unit) if exact else total / self.unit

    def _total(self, sizes: Mapping[str, Any], exact: bool) -> Any:
        parts = [
            (c if exact else np.float32(c)) * math.prod([sizes[name] for name in names] + [self._cut(sizes, cut)])
            for cut, terms in [((), self.terms), *self.shared.items()]
            for names, c in terms.items()
        ]
        for branches in self.choices:
            found = [branch._total(sizes, exact) for branch in branches]
            parts.append(max(found) if exact else _largest(found))
        return sum(parts)

    def _cut(self, sizes: Mapping[str, Any], cut: tuple[str, ...]) -> Any:
        """One where units of all these groups go, else zero."""
        return math.prod(1 * (sizes[name] < self.sizes[name]) for name in cut)


def _largest(found: list[Any]) -> Any:
    return jnp.max(jnp.stack([jnp.asarray(x, jnp.float32) for x in found]))


def _number(x: Any) -> Any:
    """How many stay: a number as it is, and of a mask its ones."""
    if np.ndim(x) == 0:
        return int(x) if core.is_concrete(x) else x
    return int(np.sum(np.asarray(x))) if core.is_concrete(x) else jnp.sum(x)
