"""Scores: how much each weight matters, by different lights.

A score is any callable ``(w, context) -> array of w's shape`` where the larger value is kept. What it reads beside
the weight it names in an attribute ``needs``, as methods do: ``"key"``, ``"grad"``, ``"stats.hessian_diagonal"``.
The same score serves masks (:class:`jcompress.prune.ByScore`) and whole groups
(:func:`jcompress.prune.structured.importance`), so a new score is one function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp

from jcompress import rules
from jcompress.core import Context, PyTree
from jcompress.numeric.damping import filled

Score = Callable[[jax.Array, Context], jax.Array]
"""A score: (w, context) -> an array of the shape of w; the larger value is kept."""
_Score = TypeVar("_Score", bound=Callable[..., Any])


def reads(*needs: str) -> Callable[[_Score], _Score]:
    """Say what a score reads from its context.

    Args:
      *needs: names of the context: ``"grad"``, ``"key"``, ``"stats.gram"``.

    Returns:
      A decorator that marks a score.

    Example:
      >>> from jcompress.prune import scores
      >>> @scores.reads("grad")
      ... def steepest(w, context):
      ...     return abs(context.grad)
      >>> scores.needs(steepest)
      ('grad',)
    """

    def mark(score: _Score) -> _Score:
        vars(score)["needs"] = needs
        return score

    return mark


def needs(score: Score) -> tuple[str, ...]:
    """What a score reads from its context.

    Args:
      score: any score.

    Returns:
      Names of the context, such as ``("grad",)``; empty if it reads the array alone.

    Example:
      >>> from jcompress.prune import scores
      >>> scores.needs(scores.taylor), scores.needs(scores.magnitude)
      (('grad',), ())
    """
    return tuple(getattr(score, "needs", ()))


def evaluate(score: Score, w: jax.Array, context: Context) -> jax.Array:
    """The scores of one array, once what the score reads is known to be there.

    Args:
      score: any score.
      w: the array.
      context: what is known about it.

    Returns:
      The scores, in the shape of ``w``.

    Raises:
      ValueError: if something is missing; the message names the path.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.prune.scores.evaluate(jc.prune.scores.magnitude, jnp.array([1.0, -2.0]), jc.Context()).tolist()
      [1.0, 2.0]
    """
    for need in needs(score):
        found: Any = context
        for name in need.split("."):
            found = getattr(found, name, None)
        if found is None:
            named = getattr(score, "__name__", type(score).__name__)
            raise ValueError(
                f"{context.path}: the score {named!r} needs {need!r}, which is missing; {_HINTS[need.split('.')[0]]}"
            )
    return score(w, context)


_HINTS = {
    "key": "pass key=jax.random.key(...)",
    "grad": "pass grads=, the gradients of the loss",
    "stats": "pass stats=jc.calibrate(fn, params, batches), with all that the score needs",
}


def magnitude(w: jax.Array, context: Context = Context()) -> jax.Array:
    """``|w|`` (Han et al. 2015, arXiv:1506.02626).

    Args:
      w: the array.
      context: not read.

    Returns:
      The scores, in the shape of ``w``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import scores
      >>> scores.magnitude(jnp.array([1.0, -2.0])).tolist()
      [1.0, 2.0]
    """
    return jnp.abs(w)


def squared(w: jax.Array, context: Context = Context()) -> jax.Array:
    """``w**2``: ranks single weights as the magnitude does, but adds up to energies over a group.

    Args:
      w: the array.
      context: not read.

    Returns:
      The scores, in the shape of ``w``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.prune.scores.squared(jnp.array([1.0, -2.0])).tolist()
      [1.0, 4.0]
    """
    return jnp.square(w)


@reads("key")
def random(w: jax.Array, context: Context) -> jax.Array:
    """Uniform in [0, 1), sharded as ``w`` is.

    Args:
      w: the array.
      context: with ``key``.

    Returns:
      float32 scores, in the shape of ``w``.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> drawn = jc.prune.scores.random(jnp.ones(1000), jc.Context(key=jax.random.key(0)))
      >>> drawn.shape, bool(0.4 < drawn.mean() < 0.6)
      ((1000,), True)
    """
    return jnp.zeros_like(w, jnp.float32) + jax.random.uniform(context.key, w.shape, jnp.float32)


@reads("grad")
def taylor(w: jax.Array, context: Context) -> jax.Array:
    """``|g w|``: the change of the loss, to first order, if the weight were zero (Molchanov et al. 2017, 1611.06440).

    Args:
      w: the array.
      context: with ``grad``.

    Returns:
      The scores, in the shape of ``w``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import scores
      >>> scores.taylor(jnp.array([1.0, -2.0]), jc.Context(grad=jnp.array([3.0, 0.5]))).tolist()
      [3.0, 1.0]
    """
    return jnp.abs(context.grad * w)


@reads("grad")
def signed_taylor(w: jax.Array, context: Context) -> jax.Array:
    """``g w``, with its sign: over a group these add up before a square or magnitude is taken.

    For single weights use :func:`taylor`; of these the negative ones would be cut first.

    Args:
      w: the array.
      context: with ``grad``.

    Returns:
      The scores, in the shape of ``w``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.prune.scores.signed_taylor(jnp.array([1.0, -2.0]), jc.Context(grad=jnp.array([3.0, 0.5]))).tolist()
      [3.0, -1.0]
    """
    return context.grad * w


@reads("stats.grad_square")
def fisher(w: jax.Array, context: Context) -> jax.Array:
    """``g**2 w**2 / 2``, where ``g**2`` is the mean squared gradient, the diagonal of the empirical Fisher matrix.

    It stands for the Hessian in the change of the loss to second order (Theis et al. 2018, arXiv:1801.05787). An input
    (axis -2) to whose weights no gradient ever came counts as the mean of the others: there magnitude decides.

    Args:
      w: the array.
      context: with ``stats.grad_square``.

    Returns:
      The scores, in the shape of ``w``.

    Example:
      >>> import types, jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import scores
      >>> stats = types.SimpleNamespace(grad_square=jnp.array([2.0, 4.0]))
      >>> scores.fisher(jnp.array([3.0, -1.0]), jc.Context(stats=stats)).tolist()
      [9.0, 2.0]
    """
    return 0.5 * _met(context.stats.grad_square) * jnp.square(w)


@reads("stats.hessian_diagonal")
def hessian(w: jax.Array, context: Context) -> jax.Array:
    """``h w**2 / 2``, the saliency of optimal brain damage (LeCun et al. 1990).

    An input (axis -2) of whose weights no curvature is known, all 0, counts as the mean of the others.

    Args:
      w: the array.
      context: with ``stats.hessian_diagonal``.

    Returns:
      The scores, in the shape of ``w``.

    Example:
      >>> import types, jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import scores
      >>> stats = types.SimpleNamespace(hessian_diagonal=jnp.array([2.0, 4.0]))
      >>> scores.hessian(jnp.array([3.0, -1.0]), jc.Context(stats=stats)).tolist()
      [9.0, 2.0]
    """
    return 0.5 * _met(context.stats.hessian_diagonal) * jnp.square(w)


def _met(curvature: jax.Array) -> jax.Array:
    """Where no gradient ever came to the weights of an input, the mean of those of the others."""
    if jnp.ndim(curvature) < 2:
        return curvature
    rows = jnp.mean(jnp.abs(curvature), axis=-1)
    return jnp.where((rows > 0)[..., None], curvature, filled(rows)[..., None])


@reads("grad")
def movement(w: jax.Array, context: Context) -> jax.Array:
    """``-g w``: positive where a step along the gradient moves the weight away from zero.

    Summed over training steps by :func:`jcompress.prune.accumulate` it is the score of movement pruning (Sanh et al.
    2020, arXiv:2005.07683), up to the learning rate. Its running mean with decay 0.8, summed over a unit's weights,
    is the relevance of skeletonization, ``-dL/da`` for a gate ``a`` on the unit (Mozer & Smolensky 1989).

    Args:
      w: the array.
      context: with ``grad``.

    Returns:
      The scores, in the shape of ``w``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.prune.scores.movement(jnp.array([1.0, -2.0]), jc.Context(grad=jnp.array([3.0, 0.5]))).tolist()
      [-3.0, 1.0]
    """
    return -context.grad * w


def layer_adaptive(w: jax.Array, context: Context = Context()) -> jax.Array:
    """``w**2`` over the sum of ``v**2`` of all weights ``v`` of the leaf that are no smaller (Lee et al. 2021).

    Layer-adaptive magnitude, arXiv:2010.07611: with ``scope="global"`` each leaf gets its own sparsity, and no leaf is
    emptied before all are down to one weight. It sorts the leaf, which gathers it where it is sharded;
    :func:`jcompress.budget.lamp` finds the sparsities once.

    Args:
      w: the array.
      context: not read.

    Returns:
      float32 scores in [0, 1], in the shape of ``w``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import scores
      >>> scores.layer_adaptive(jnp.array([0.0, -2.0, 2.0])).tolist()
      [0.0, 0.5, 1.0]
    """
    squares = jnp.square(w.astype(jnp.float32)).ravel()
    order = jnp.argsort(squares, stable=True)
    rising = squares[order]
    remaining = jnp.cumsum(rising[::-1])[::-1]
    share = rising / jnp.where(remaining > 0, remaining, 1)
    return jnp.zeros_like(squares).at[order].set(share).reshape(w.shape)


def lookup(table: Mapping[str, Any]) -> Score:
    """The score that is read from a table, ``{path: array}``, computed for the whole model beforehand.

    Args:
      table: ``{path: array}``, of the shapes of the parameters.

    Returns:
      A score.

    Raises:
      ValueError: when it is asked for a path that the table lacks, or an array of another shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.ones(4)}
      >>> table = {"w": jnp.array([3.0, 1.0, 4.0, 1.0])}
      >>> method = jc.prune.ByScore(sparsity=0.5, score=jc.prune.scores.lookup(table))
      >>> jc.compress(params, jc.plan(params, [("w", method)]))["w"].mask.tolist()
      [True, False, True, False]
    """

    def looked_up(w: jax.Array, context: Context) -> jax.Array:
        found = table.get(context.path)
        if found is None or jnp.shape(found) != w.shape:
            shown = "no such path" if found is None else f"shape {jnp.shape(found)}"
            raise ValueError(
                f"{context.path}: looked for scores of shape {w.shape} and found {shown}; compute them for these "
                "parameters"
            )
        return jnp.asarray(found, jnp.promote_types(jnp.result_type(found), jnp.bfloat16))

    return looked_up


Change = Literal["magnitude_increase", "movement", "large_init_large_final"]


def since(initial: PyTree, change: Change = "magnitude_increase", alpha: float | jax.Array = 1.0) -> Score:
    """What training made of a weight, from its value before: criteria for lottery tickets (Zhou et al. 2019).

    With the weight ``w_i`` before and ``w_f`` now: ``"magnitude_increase"`` is ``alpha |w_f| - |w_i|``, at least as
    good as ``|w_f|`` in the paper, ``"movement"`` ``|w_f - w_i|``, and ``"large_init_large_final"``
    ``min(alpha |w_f|, |w_i|)`` (arXiv:1905.01067). A score of the negative value is the paper's control.

    Args:
      initial: the parameters before training, or ``{path: array}``.
      change: which one.
      alpha: how much the trained weight counts.

    Returns:
      A score.

    Raises:
      ValueError: for an unknown criterion; when it is asked for a path that ``initial`` lacks, or another shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> first, trained = {"w": jnp.array([2.0, -0.5, 0.1])}, {"w": jnp.array([1.5, -0.4, 0.3])}
      >>> method = jc.prune.ByScore(sparsity=0.7, score=jc.prune.scores.since(first))
      >>> jc.compress(trained, jc.plan(trained, [("w", method)]))["w"].mask.tolist()
      [False, False, True]
    """
    if change not in _CHANGES:
        raise ValueError(f"since: change={change!r} is unknown; use one of {', '.join(_CHANGES)}")
    before = lookup(dict(rules.paths(initial)))

    def changed(w: jax.Array, context: Context) -> jax.Array:
        return _CHANGES[change](before(w, context), w, alpha)

    return changed


_CHANGES: dict[str, Callable[[jax.Array, jax.Array, Any], jax.Array]] = {
    "magnitude_increase": lambda first, last, alpha: alpha * jnp.abs(last) - jnp.abs(first),
    "movement": lambda first, last, alpha: jnp.abs(last - first),
    "large_init_large_final": lambda first, last, alpha: jnp.minimum(alpha * jnp.abs(last), jnp.abs(first)),
}
