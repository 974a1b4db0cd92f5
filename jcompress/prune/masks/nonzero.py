"""Masks of what is not zero already."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context
from jcompress.formats import Masked


@dataclasses.dataclass(frozen=True)
class Nonzero(core.Method):
    """Keep what is not zero: a mask of the zeros that an array has, however it came by them.

    ``mask = (w != 0)``, and the values as they are: nothing is pruned. So parameters of any origin, pruned by another
    library (such as JaxPruner; Lee et al. 2023, arXiv:2304.14082) or rounded to zero, are stored by what is left of
    them, and ``chain(Nonzero(), Int(bits=8))`` quantizes what is left. -0.0 is a zero; NaN is not.

    Where a node was fitted before, as under :func:`jcompress.project`, its zeros stay: fine-tuning keeps the mask of
    the start, and weights that become exactly 0.0 join it.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([0.0, -4.0, 0.0, 3.0])}
      >>> small = jc.compress(params, jc.plan(params, [("w", jc.prune.Nonzero())]))
      >>> small["w"].mask.tolist(), bool((jc.materialize(small)["w"] == params["w"]).all())
      ([False, True, False, True], True)
      >>> size = jc.save("weights.jc", small)
    """

    whole: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = True

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Masked:
        """The node for one array."""
        mask: Any = w != 0
        if isinstance(context.previous, Masked):
            mask = mask & context.previous.mask
        return Masked(jnp.copy(w), mask)
