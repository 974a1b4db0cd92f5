"""Dense latent weights behind a sparse view: what is masked goes on learning and may return."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from jcompress import core, rules, transforms
from jcompress.core import PyTree
from jcompress.formats import Masked
from jcompress.numeric.alike import each
from jcompress.numeric.threshold import keep_largest
from jcompress.prune.dynamic.held import lay
from jcompress.prune.masks import selection
from jcompress.rules import kind


@runtime_checkable
class LatentView(Protocol):
    """How the masks follow the latent weights, as in network surgery (Guo et al. 2016, arXiv:1608.04493).

    ``__call__(w, mask, step)`` gives two masks: of the weights that the network sees, and of those that learn, or None
    for all. ``pull(w, seen, learning)`` gives what is added to the gradient.

    Example:
      >>> import jcompress as jc
      >>> isinstance(jc.prune.dynamic.Surgery(low=0.5, high=0.75), jc.prune.dynamic.LatentView)
      True
    """

    def __call__(self, w: jax.Array, mask: jax.Array, step: Any, /) -> tuple[jax.Array, jax.Array | None]:
        """The masks of what is seen and of what learns."""
        ...

    def pull(self, w: jax.Array, seen: jax.Array, learning: jax.Array | None, /) -> jax.Array | float:
        """What is added to the gradient."""
        ...


@dataclasses.dataclass(frozen=True)
class Surgery:
    """Dynamic network surgery: a mask with hysteresis, so that a weight cut in error is spliced (Guo et al. 2016).

    A weight whose magnitude is below ``low`` is masked, one of at least ``high`` is kept, one in between stays as it
    is (arXiv:1608.04493). All weights go on learning, each by the gradient at the masked network.

    Attributes:
      low: a number or an optax schedule.
      high: a number or an optax schedule, above ``low``.
      relative: whether ``low`` and ``high`` count in means of ``|w|`` over the leaf.

    Raises:
      ValueError: unless ``0 <= low <= high``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jcompress.prune import dynamic
      >>> tx = dynamic.latent(optax.sgd(0.1), dynamic.Surgery(low=0.5, high=1.0))
      >>> tx.init({"w": jnp.array([0.1, 2.0])}).masks["w"].tolist()
      [False, True]
    """

    low: Any
    high: Any
    relative: bool = False

    def __post_init__(self) -> None:
        known = [x for x in (self.low, self.high) if not callable(x) and core.is_concrete(x)]
        if len(known) == 2 and not 0 <= float(known[0]) <= float(known[1]):
            raise ValueError(f"Surgery: found low={self.low}, high={self.high}; expected 0 <= low <= high")

    def __call__(self, w: jax.Array, mask: jax.Array, step: Any, /) -> tuple[jax.Array, None]:
        """The masks of what is seen and of what learns."""
        size = jnp.abs(w)
        unit = jnp.mean(size, dtype=jnp.float32) if self.relative else 1.0
        low, high = core.value_at(self.low, step) * unit, core.value_at(self.high, step) * unit
        return (size >= high) | (mask & (size >= low)), None

    def pull(self, w: jax.Array, seen: jax.Array, learning: jax.Array | None, /) -> float:
        """Nothing."""
        return 0.0


@dataclasses.dataclass(frozen=True)
class TopKAST:
    """Top-KAST: forward the largest weights, backward some more (Jayakumar et al. 2020, arXiv:2106.03517).

    In each leaf the network sees the part ``1 - forward`` of largest magnitude, A. The part ``1 - backward`` of largest
    magnitude, B, learns; the rest stays where it is. ``decay`` adds the gradient of the exploration penalty: ``w`` on A
    and ``w / D`` on B outside A, where D is the density of A.

    Attributes:
      forward: the fraction of zeros the network sees, a number or an optax schedule.
      backward: the fraction of weights that do not learn, at most ``forward``.
      decay: the strength of the penalty.

    Raises:
      ValueError: for sparsities outside [0, 1], or in the wrong order.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jcompress.prune import dynamic
      >>> tx = dynamic.latent(optax.sgd(0.1), dynamic.TopKAST(0.5, 0.5))
      >>> tx.init({"w": jnp.array([0.1, 2.0])}).masks["w"].tolist()
      [False, True]
    """

    forward: Any
    backward: Any
    decay: float = 0.0

    def __post_init__(self) -> None:
        known = [x for x in (self.backward, self.forward) if not callable(x) and core.is_concrete(x)]
        for x in known:
            selection.check_sparsity("TopKAST", x)
        if len(known) == 2 and float(known[0]) > float(known[1]):
            raise ValueError(
                f"TopKAST: found backward={self.backward} above forward={self.forward}; at least the weights that are "
                "seen must learn"
            )

    def __call__(self, w: jax.Array, mask: jax.Array, step: Any, /) -> tuple[jax.Array, jax.Array]:
        """The masks of what is seen and of what learns."""
        size = jnp.abs(w)
        sparsities = [core.value_at(x, step) for x in (self.forward, self.backward)]
        seen, learning = (keep_largest([size], selection.kept(w.size, x))[0] for x in sparsities)
        return seen, learning

    def pull(self, w: jax.Array, seen: jax.Array, learning: jax.Array | None, /) -> jax.Array:
        """The gradient of the penalty."""
        density = jnp.mean(seen, dtype=jnp.float32).astype(w.dtype)
        return self.decay * jnp.where(seen, w, w / jnp.maximum(density, jnp.finfo(w.dtype).tiny))


class LatentState(NamedTuple):
    """State of :func:`latent`: steps, latent weights, what the network sees, what learns, the optimizer's state."""

    steps: jax.Array
    weights: dict[str, jax.Array]
    masks: dict[str, jax.Array]
    learning: dict[str, jax.Array | None]
    inner: PyTree

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Masked]:
        """What the network sees."""
        return transforms.masked(params, self.masks)


def latent(
    inner: optax.GradientTransformation, view: LatentView, every: int = 1, *, match: str = ".*"
) -> optax.GradientTransformationExtraArgs:
    """Train dense weights of which the network sees a masked view.

    The parameters are the view, exactly 0.0 where masked; the latent weights are held in the state. The optimizer
    moves the latent weights by the gradient at the view; the masks follow on steps 0, ``every``, ``2 * every``, ...

    Args:
      inner: any optax optimizer.
      view: :class:`Surgery`, :class:`TopKAST`, or another :class:`LatentView`.
      every: the steps between two changes of the masks.
      match: a regular expression for the whole paths of the masked leaves.

    Returns:
      A ``GradientTransformationExtraArgs``; ``update`` must be given ``params``.

    Raises:
      ValueError: if ``every`` is not positive, ``match`` matches nothing, or ``update`` is called without ``params``.

    Example:
      >>> import jax.numpy as jnp, optax, jcompress as jc
      >>> params = {"w": jnp.array([1.0, 0.25])}
      >>> tx = jc.prune.dynamic.latent(optax.sgd(0.5), jc.prune.dynamic.Surgery(low=0.5, high=0.75))
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update({"w": jnp.array([0.0, -0.5])}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["w"].tolist(), state.weights["w"].tolist())
      [1.0, 0.0] [1.0, 0.5]
      [1.0, 0.75] [1.0, 0.75]
      >>> size = jc.save("weights.jc", jc.nodes(params, state))  # what the network sees, without the latent weights
    """
    transforms.check_every("latent", every)
    tx = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> LatentState:
        weights = {path: jnp.copy(x) for path, x in rules.matching(params, match, "latent: match").items()}
        whole = {path: jnp.ones_like(w, jnp.bool_) for path, w in weights.items()}
        steps = transforms.steps()
        seen, learning = _views(view, weights, whole, steps)
        return LatentState(steps, weights, seen, learning, tx.init(params))

    def update(
        updates: PyTree, state: LatentState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, LatentState]:
        transforms.need("latent", params)
        dense = rules.rebuild(params, state.weights)
        updates, inner = tx.update(_pulled(view, state, updates, params), state.inner, dense, **extra)
        weights = _learned(state, params, updates)
        due = transforms.is_due(state.steps, every)
        seen, learning = jax.lax.cond(
            due, lambda: _views(view, weights, state.masks, state.steps), lambda: (state.masks, state.learning)
        )
        views, old = lay(weights, seen), rules.leaves(params)
        change = {path: jnp.where(seen[path], views[path] - old[path], -old[path]) for path in views}
        steps = optax.safe_increment(state.steps)
        return rules.rebuild(updates, change, like=params), LatentState(steps, weights, seen, learning, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _views(
    view: LatentView, weights: dict[str, jax.Array], masks: dict[str, jax.Array], step: Any
) -> tuple[dict[str, jax.Array], dict[str, jax.Array | None]]:
    items: list[Any] = [(w, masks[p]) for p, w in weights.items()]
    found = each(lambda _, item: view(item[0], item[1], step), items, list(map(kind, weights)))
    both = dict(zip(weights, found, strict=True))
    return {path: x[0] for path, x in both.items()}, {path: x[1] for path, x in both.items()}


def _pulled(view: LatentView, state: LatentState, grads: PyTree, params: PyTree) -> PyTree:
    """The gradients that the optimizer meets: those of the weights that learn."""
    found = rules.beside(params, grads)
    pulled = {}
    for path, w in state.weights.items():
        learning = state.learning[path]
        g = (found[path] + view.pull(w, state.masks[path], learning)).astype(found[path].dtype)
        pulled[path] = g if learning is None else jnp.where(learning, g, jnp.zeros_like(g))
    return rules.rebuild(grads, pulled, like=params)


def _learned(state: LatentState, params: PyTree, updates: PyTree) -> dict[str, jax.Array]:
    change = rules.beside(params, updates)
    new = {}
    for path, w in state.weights.items():
        learning, moving = state.learning[path], optax.apply_updates(w, change[path])
        new[path] = moving if learning is None else jnp.where(learning, moving, w)
    return new
