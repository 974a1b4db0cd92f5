"""Lottery tickets: train, prune, rewind, repeat; and when a ticket can be drawn early."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jcompress import rules, transforms
from jcompress.core import PyTree
from jcompress.formats import Masked
from jcompress.numeric.threshold import keep_largest
from jcompress.prune.dynamic.held import Masks, lay
from jcompress.prune.masks.selection import Scope, kept

Train = Callable[[PyTree, dict[str, jax.Array]], PyTree]


class Ticket(NamedTuple):
    """A sparse network and where its training is to start.

    Attributes:
      params: the first or early parameters, bit for bit where the masks keep, exactly 0.0 elsewhere.
      masks: ``{path: mask}`` of the pruned leaves.
      trained: the parameters at the end of the training that chose the last masks.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> first, masks = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([True, False])}
      >>> ticket = jc.prune.dynamic.Ticket(first, masks, trained={"w": jnp.ones(2)})
      >>> jc.nodes(ticket.params, ticket)["w"].mask.tolist()
      [True, False]
    """

    params: PyTree
    masks: dict[str, jax.Array]
    trained: PyTree

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Masked]:
        """The parameters under the masks: ``jc.nodes(ticket.params, ticket)``, or of the ticket once it is trained."""
        return transforms.masked(params, self.masks)


def lottery_ticket(
    train: Train,
    params: PyTree,
    rounds: int,
    rate: float,
    *,
    rewind: PyTree = None,
    scope: Scope = "global",
    match: str = ".*",
    report: Callable[[int, Ticket], None] | None = None,
) -> Ticket:
    """Iterative magnitude pruning with rewinding: a loop on the host around the user's training.

    Each round trains the ticket, prunes the part ``rate`` of the remaining weights, those of smallest magnitude, and
    sets the others back (Frankle & Carbin 2019, arXiv:1803.03635), to the first parameters or to those of an early
    step (Frankle et al. 2020, arXiv:1912.05671). After ``r`` rounds ``round(n * (1 - rate)**r)`` of ``n`` weights are
    left, to within a half of one: rounding does not add up over rounds.

    The control, the same masks on newly drawn weights, is ``lay(new, ticket.masks)``.

    Args:
      train: ``train(params, masks) -> params``. To keep the masked weights at 0.0 let it use
        ``sparse(optimizer, Static(), masks)``. The first round is given masks that keep all.
      params: where the first training starts.
      rounds: how often to prune.
      rate: the part of the remaining weights that each round prunes, in (0, 1).
      rewind: the parameters of an early step, to go back to; ``params`` by default.
      scope: one threshold for all leaves, or one for each ``"leaf"``.
      match: a regular expression for the whole paths of the pruned leaves.
      report: called with the round, from 1, and its ticket.

    Returns:
      The last :class:`Ticket`, not yet trained.

    Raises:
      ValueError: for a rate outside (0, 1), no rounds, an unknown scope, or a ``match`` that matches nothing.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([1.0, 2.0, 3.0, 4.0])}
      >>> def train(params, masks):
      ...     return jax.tree.map(lambda w: -w, params)
      >>> ticket = jc.prune.dynamic.lottery_ticket(train, params, rounds=2, rate=0.5)
      >>> ticket.params["w"].tolist()
      [0.0, 0.0, 0.0, 4.0]
      >>> size = jc.save("ticket.jc", jc.nodes(train(ticket.params, ticket.masks), ticket))
    """
    _check(rounds, rate, scope)
    target = params if rewind is None else rewind
    found = rules.matching(params, match, "lottery_ticket: match")
    masks = {path: jnp.ones_like(x, jnp.bool_) for path, x in found.items()}
    start = params
    for number in range(1, rounds + 1):
        trained = train(start, masks)
        masks = _pruned(rules.leaves(trained), masks, 1 - (1 - rate) ** number, scope)
        start = lay(target, masks)
        ticket = Ticket(start, masks, trained)
        if report is not None:
            report(number, ticket)
    return ticket


def _check(rounds: int, rate: float, scope: Scope) -> None:
    if not 0 < rate < 1:
        raise ValueError(f"lottery_ticket: rate={rate} is outside (0, 1); it is the part pruned in each round")
    if rounds < 1:
        raise ValueError(f"lottery_ticket: rounds={rounds} must be positive")
    if scope not in ("leaf", "global"):
        raise ValueError(f"lottery_ticket: scope={scope!r} is unknown; use 'leaf' or 'global'")


def _pruned(trained: dict[str, jax.Array], masks: Masks, sparsity: float, scope: Scope) -> dict[str, jax.Array]:
    scores = {path: jnp.where(mask, jnp.abs(trained[path]), -jnp.inf) for path, mask in masks.items()}
    if scope == "global":
        chosen = keep_largest(list(scores.values()), kept(sum(x.size for x in scores.values()), sparsity))
    else:
        chosen = [keep_largest([x], kept(x.size, sparsity))[0] for x in scores.values()]
    return dict(zip(scores, chosen, strict=True))


def mask_distance(a: Masks, b: Masks) -> jax.Array:
    """The fraction of entries in which two sets of masks differ: their Hamming distance over their size.

    Args:
      a: ``{path: boolean array}``.
      b: of the same paths and shapes.

    Returns:
      A float32 scalar in [0, 1].

    Raises:
      ValueError: for other paths.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> a, b = {"w": jnp.array([True, True, False, False])}, {"w": jnp.array([True, False, True, False])}
      >>> float(jc.prune.dynamic.mask_distance(a, b))
      0.5
    """
    if set(a) != set(b):
        raise ValueError(f"mask_distance: found masks for {sorted(a)[:5]} and for {sorted(b)[:5]}; expected the same")
    differing = sum((jnp.sum(a[path] != b[path], dtype=jnp.float32) for path in a), jnp.zeros(()))
    return differing / max(sum(mask.size for mask in a.values()), 1)


class EarlyBird(NamedTuple):
    """Whether a ticket can be drawn: pure state, made by :func:`early_bird`.

    Attributes:
      masks: those of the last time.
      distances: the last distances between successive masks, the oldest first; infinite where there is none yet.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> state = jc.prune.dynamic.early_bird({"scale": jnp.array([True, False])}, window=1)
      >>> state.update({"scale": jnp.array([False, True])}).distances.tolist()
      [1.0]
    """

    masks: dict[str, jax.Array]
    distances: jax.Array

    def update(self, masks: Mapping[str, jax.Array]) -> EarlyBird:
        """The state after the masks of another epoch."""
        distance = mask_distance(self.masks, masks)
        return EarlyBird(dict(masks), jnp.append(self.distances[1:], distance))

    def stop(self, tolerance: float = 0.1) -> jax.Array:
        """Whether all distances remembered are below the tolerance."""
        return jnp.max(self.distances) < tolerance


def early_bird(masks: Mapping[str, jax.Array], window: int = 5) -> EarlyBird:
    """Watch the masks that training would draw, and stop once they no longer change (You et al. 2020, 1909.11957).

    Args:
      masks: the first masks, ``{path: boolean array}``: by the magnitude of batch-norm scales in the paper, by anything
        here.
      window: how many distances in a row must be small; one an epoch in the paper.

    Returns:
      An :class:`EarlyBird`.

    Raises:
      ValueError: if ``window`` is not positive.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> masks = {"scale": jnp.array([True, False])}
      >>> state = jc.prune.dynamic.early_bird(masks, window=2)
      >>> state = state.update(masks)
      >>> bool(state.stop()), bool(state.update(masks).stop())
      (False, True)
    """
    if window < 1:
        raise ValueError(f"early_bird: window={window} must be positive")
    return EarlyBird(dict(masks), jnp.full(window, jnp.inf, jnp.float32))
