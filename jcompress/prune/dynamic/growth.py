"""Grow and prune: connections come by their gradient and go by their magnitude, and their number changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.prune.dynamic import leaves
from jcompress.prune.dynamic.leaves import Leaf


@dataclasses.dataclass(frozen=True)
class NeST(leaves.Exchange):
    """Grow a sparse seed by gradient, then prune it by magnitude (NeST; Dai et al. 2017, arXiv:1711.02017).

    A rule for :func:`sparse`. Unlike the others it does not keep the number of active weights. At each change before
    step ``turn`` it activates in each leaf ``floor(growth * d)`` of the ``d`` dormant weights, those of largest
    ``|dL/dw|``; at each from ``turn`` on, before ``stop``, it drops ``floor(pruning * k)`` of the ``k`` active ones,
    those of smallest magnitude. So ``r`` prunings leave about ``k (1 - pruning)**r``. From ``stop`` on masks stay.
    Without ``turn`` every change drops first and then grows, as much as the two fractions, or their schedules, say.

    A weight that is activated at 0.0 becomes ``-eta * dL/dw`` with the next step of plain descent, the value that the
    paper gives it. A weight between two units of which the one has no active inputs and the other no active outputs
    has a gradient of zero: the seed must connect every unit that is to be used. The paper also adds and removes whole
    units; here they are the rows and columns of masks.

    Attributes:
      turn: the step where growing ends and pruning begins, or None.
      stop: the step from which masks stay; None for never.
      growth: the part of the dormant weights activated at each change, in [0, 1], or an optax schedule of it.
      pruning: the part of the active weights dropped at each change, in [0, 1], or an optax schedule of it.
      decay: None to grow by the gradient of the step at hand, or the rate at which gradients are averaged for it, as
        :class:`SparseMomentum` does; the paper takes their mean over all batches.

    Raises:
      ValueError: for a fraction or a decay outside its range, or a ``stop`` before ``turn``.

    Example:
      >>> import jax.numpy as jnp, optax, jcompress as jc
      >>> params, seed = {"w": jnp.array([2.0, 1.0, 0.0, 0.0])}, {"w": jnp.array([True, True, False, False])}
      >>> rule = jc.prune.dynamic.NeST(turn=2, growth=0.5, pruning=0.7)
      >>> tx = jc.prune.dynamic.sparse(optax.sgd(1.0), rule, seed, every=1)
      >>> state = tx.init(params)
      >>> for step in range(3):  # the first grows, at 0.0, the second has no more to grow, the third prunes
      ...     updates, state = tx.update({"w": jnp.array([0.0, 0.0, 0.1, -3.0])}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["w"].tolist(), jc.nodes(params, state)["w"].mask.tolist())
      [2.0, 1.0, 0.0, 0.0] [True, True, False, True]
      [2.0, 1.0, 0.0, 3.0] [True, True, False, True]
      [0.0, 0.0, 0.0, 6.0] [False, False, False, True]
    """

    turn: Any = None
    stop: Any = None
    growth: Any = 0.1
    pruning: Any = 0.1
    decay: float | None = None

    def __post_init__(self) -> None:
        for name in ("growth", "pruning"):
            value = getattr(self, name)
            if not callable(value) and core.is_concrete(value) and not 0 <= float(value) <= 1:
                raise ValueError(f"NeST: {name}={value} is outside [0, 1]; it is a part of the weights of a leaf")
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"NeST: decay={self.decay} is outside [0, 1); use None for the gradient of the step")
        ends = [x for x in (self.turn, self.stop) if x is not None and core.is_concrete(x)]
        if len(ends) == 2 and ends[1] < ends[0]:
            raise ValueError(f"NeST: found turn={self.turn}, stop={self.stop}; masks can stop only once they turned")

    def exchange(self, found: Sequence[Leaf], memory: Any = ()) -> tuple[list[jax.Array], list[jax.Array], Any]:
        """The new masks, what of the old ones was not dropped, and the memory."""
        moved = leaves.each(self._moved, found)
        return [masks for masks, _ in moved], [survivors for _, survivors in moved], memory

    def _moved(self, leaf: Leaf) -> tuple[jax.Array, jax.Array]:
        growth, pruning = (core.value_at(x, leaf.step) for x in (self.growth, self.pruning))
        if self.turn is not None:
            growth, pruning = jnp.where(leaf.step < self.turn, growth, 0), jnp.where(leaf.step < self.turn, 0, pruning)
        if self.stop is not None:
            growth, pruning = (jnp.where(leaf.step < self.stop, x, 0) for x in (growth, pruning))
        grown, dropped = leaves.part(~leaf.mask, growth), leaves.part(leaf.mask, pruning)
        slopes = leaf.grad if leaf.momentum is None else leaf.momentum
        survivors = leaves.drop_smallest(leaf, dropped)
        return leaves.grow_largest(survivors, slopes, grown), survivors
