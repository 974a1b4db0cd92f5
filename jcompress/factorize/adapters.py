"""A small trained matrix beside a large one that is held."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.factorize.svd import chosen_rank
from jcompress.formats import Frozen, LowRank, Sum


def adapter(base: Any, rank: int | float, key: jax.Array, dtype: Any = jnp.float32) -> Sum:
    """A parameter that stays as it is, plus a product ``u @ v`` that trains: low-rank adaptation (LoRA).

    ``v`` begins at zero, so the sum begins as the parameter itself (Hu et al. 2021, arXiv:2106.09685); over a base of
    4 bits this is QLoRA (Dettmers et al. 2023, arXiv:2305.14314). The floats of the base are kept as bits, which
    :func:`jcompress.split` leaves among what is held, so no optimizer moves them. Under :func:`jcompress.accelerate`
    both are multiplied apart.

    Args:
      base: an array (..., in, out), or a node, such as ``jc.quantize.Int(bits=4, group_size=64)`` gives.
      rank: of the adapter, or its share of the numbers, in (0, 1).
      key: PRNG key, for ``u``.
      dtype: of ``u`` and ``v``; the sum has that of the base.

    Returns:
      A ``Sum`` of the base and a ``LowRank``.

    Raises:
      ValueError: for a rank above the limit, or a base with fewer than two axes.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> base = jc.quantize.Int(bits=4)(jnp.ones((16, 8)))
      >>> node = jc.factorize.adapter(base, 2, jax.random.key(0))
      >>> train, held = jc.split({"w": node})
      >>> [x.shape for x in jax.tree.leaves(train)], bool((node.materialize() == base.materialize()).all())
      ([(16, 2), (2, 8)], True)
    """
    shape = tuple(base.shape)
    r = chosen_rank("adapter", "adapter", rank, shape)
    fan_in = max(base.size // max(shape[-1], 1), 1)
    u = jax.random.normal(key, (*shape[:-1], r), dtype) / fan_in**0.5
    held = jax.tree.map(lambda x: Frozen.of(x) if core.is_trainable(x) else x, base)
    return Sum((held, LowRank(u.astype(dtype), jnp.zeros((r, shape[-1]), dtype))))
