"""Scores that take the whole model and its loss: functions that give ``{path: scores}`` for ``scores.lookup``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core, rules
from jcompress.core import PyTree
from jcompress.prune.masks.patterns import Pattern

Scores = dict[str, jax.Array]
Loss = Callable[..., jax.Array]


def of_paths(fn: Callable[..., Any], params: PyTree) -> tuple[Callable[..., Any], Scores]:
    """The function of the trainable leaves alone, by their paths, and these leaves."""

    def of(part: Scores, *args: Any) -> Any:
        return fn(rules.rebuild(params, part), *args)

    return of, {path: x for path, x in rules.paths(params) if core.is_trainable(x)}


def grasp(loss: Loss, params: PyTree, *batch: Any) -> Scores:
    """Gradient signal preservation: ``w * (H g)``, to be kept where it is largest.

    Cutting weight ``q`` changes the squared gradient norm by ``-2 w_q (H g)_q`` to first order; what is kept is what
    the gradient flow lives on (Wang et al. 2020, arXiv:2002.07376, who write ``-w * H g`` and cut the largest). The
    Hessian-vector product is the ``jvp`` of ``grad``. To be used once, at initialization, with one threshold for all.

    Args:
      loss: ``loss(params, *batch)``, a scalar, twice differentiable.
      params: a pytree of arrays.
      *batch: as few as ten examples of each class, says the paper.

    Returns:
      ``{path: scores}`` of all float leaves, for :func:`jcompress.prune.scores.lookup`.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> table = jc.prune.grasp(lambda p: (jnp.array([1.0, 3.0]) * p["w"]**2).sum() / 2, params)
      >>> table["w"].tolist()
      [1.0, 36.0]
      >>> method = jc.prune.ByScore(sparsity=0.5, scope="global", score=jc.prune.scores.lookup(table))
    """
    of, part = of_paths(loss, params)

    def gradient(part: Scores) -> Scores:
        return jax.grad(of)(part, *batch)

    product = jax.jvp(gradient, (part,), (gradient(part),))[1]
    return {path: w * product[path] for path, w in part.items()}


def variance_nullity(loss: Loss, params: PyTree, *batch: Any, variance: Any) -> Scores:
    """How surely a weight matters: the probability that a variance below the null's would look smaller still.

    The sensitivity of a weight is ``dL/dw`` on one example, with variance ``s**2`` over ``N`` of them. Under the null
    hypothesis that the variance is ``sigma**2``, ``(N - 1) s**2 / sigma**2`` is chi-squared with ``N - 1`` degrees of
    freedom; the score is that distribution's value there. Cut the weights whose score is below a test level, 0.01
    say: their sensitivity varies significantly less than ``sigma`` (Engelbrecht 2001).

    Args:
      loss: ``loss(params, *batch)``, a scalar; called on batches of one example. Pass an output in place of the loss
        for the sensitivity of that output, as in the paper.
      params: a pytree of arrays.
      *batch: arrays of the same leading axis, of at least two examples. Gradients are taken one after the other.
      variance: ``sigma**2``, a scalar.

    Returns:
      ``{path: scores in [0, 1]}`` of all float leaves.

    Raises:
      ValueError: for fewer than two examples.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"used": jnp.array(2.0), "unused": jnp.array(2.0)}
      >>> def loss(p, x):
      ...     return p["used"] * x.sum()
      >>> found = jc.prune.variance_nullity(loss, params, jnp.linspace(-3, 3, 20), variance=0.01)
      >>> {path: round(float(x), 3) for path, x in found.items()}
      {'unused': 0.0, 'used': 1.0}
    """
    n = jax.tree.leaves(batch)[0].shape[0] if batch else 0
    if n < 2:
        raise ValueError(f"variance_nullity: found {n} examples, expected at least two to estimate a variance")
    of, part = of_paths(loss, params)

    def add(state: tuple[Scores, Scores, jax.Array], example: tuple) -> tuple[tuple, None]:
        mean, squares, count = state
        grads = jax.grad(of)(part, *jax.tree.map(lambda x: x[None], example))
        count = count + 1
        change = jax.tree.map(lambda g, m: g.astype(jnp.float32) - m, grads, mean)
        mean = jax.tree.map(lambda m, d: m + d / count, mean, change)
        squares = jax.tree.map(lambda s, d: s + d * d * (count - 1) / count, squares, change)
        return (mean, squares, count), None

    zeros = {path: jnp.zeros(x.shape, jnp.float32) for path, x in part.items()}
    (_, squares, _), _ = jax.lax.scan(add, (zeros, zeros, jnp.float32(0)), batch)
    return {path: jax.scipy.special.gammainc((n - 1) / 2, s / (2 * variance)) for path, s in squares.items()}


def fourier_variance(
    fn: Callable[[jax.Array], jax.Array],
    low: jax.Array,
    high: jax.Array,
    *,
    frequency: int | None = None,
    harmonics: int = 3,
) -> jax.Array:
    """How much of the output's variance each unit causes by itself, read off the spectrum (Lauret et al. 2006).

    All units swing at once, ``z_h(s) = (high + low) / 2 + (high - low) / 2 * sin(omega_h s)``, one of them fast and the
    others slowly. Its score is what the output has at the first harmonics of its frequency, ``sum_p (A_p**2 + B_p**2) /
    2`` with the Fourier coefficients ``A_p, B_p`` at ``p omega_h``, summed over all outputs: the variance of the mean
    output given ``z_h`` (Fourier amplitude sensitivity test; Saltelli et al. 1999). Interactions of units do not count.

    Args:
      fn: the outputs, of any shape, for the values (units,) of the units: the part of the network behind them.
      low: (units,), where each unit's range begins, such as its smallest activation on the data.
      high: (units,), where it ends.
      frequency: the fast one. The default, ``2 * harmonics * (units - 1) + 1``, leaves the slow ones room to differ. A
        smaller one is cheaper: there are ``2 * harmonics * frequency + 1`` evaluations for each unit.
      harmonics: how many count.

    Returns:
      ``(units,)`` in float32, the larger the more important; exact where the output is a sum of a function of each
      unit whose spectrum ends at the harmonics.

    Raises:
      ValueError: for ranges of different shapes, no harmonics, or a frequency that leaves no room for slow ones.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> score = jc.prune.fourier_variance(lambda z: z[0] + 2 * z[1], jnp.array([-1.0, -1.0, 0.0]), jnp.ones(3))
      >>> score.round(3).tolist()
      [0.5, 2.0, 0.0]
    """
    low, high = jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)
    if low.ndim != 1 or low.shape != high.shape:
        raise ValueError(f"fourier_variance: found low {low.shape} and high {high.shape}, expected (units,) for both")
    fast = 2 * harmonics * max(low.size - 1, 1) + 1 if frequency is None else frequency
    if harmonics < 1 or fast <= 2 * harmonics:
        raise ValueError(
            f"fourier_variance: found frequency={fast}, harmonics={harmonics}; expected harmonics of 1 or more and a "
            "frequency above twice their number"
        )
    samples, slowest = 2 * harmonics * fast + 1, (fast - 1) // (2 * harmonics)
    times, units = jnp.arange(samples), jnp.arange(low.size)
    turn = 2 * jnp.pi / samples
    # Angles from integers: a large one would lose its digits.
    angles = turn * (jnp.arange(1, harmonics + 1)[:, None] * fast * times % samples)
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])

    def score(unit: jax.Array) -> jax.Array:
        slow = (units - (units > unit)) % slowest + 1
        swing = jnp.sin(turn * (jnp.where(units == unit, fast, slow) * times[:, None] % samples))
        outputs = jax.vmap(fn)((high + low) / 2 + (high - low) / 2 * swing)
        outputs = outputs.reshape(samples, -1).astype(jnp.float32)
        found = 2 / samples * jnp.matmul(waves, outputs - outputs.mean(0), precision="highest")
        return 0.5 * jnp.sum(jnp.square(found))

    return jax.lax.map(score, units)


def unit_fisher(loss: Loss, params: PyTree, pattern: Pattern, *batch: Any) -> Scores:
    """Fisher pruning of feature maps: ``1/(2N) sum_n g_nk**2``, with ``g_nk`` the derivative of a gate on unit ``k``.

    On one example, ``g_nk`` is the sum of ``a dL/da`` over the positions of feature map ``a``, and that is the sum of
    ``w dL/dw`` over the weights that make the map, wherever these make it linearly, or followed by a ReLU
    (Theis et al. 2018, arXiv:1801.05787). Weights of a unit get the same score. To trade loss for computation as the
    paper does, subtract from it a multiple of what the unit costs.

    Args:
      loss: ``loss(params, *batch)``, a scalar; called on batches of one example.
      params: a pytree of the kernels to be ranked, of which others are closed over.
      pattern: which weights make a unit, such as ``Block((None, 1))`` for the columns of (in, out) kernels.
      *batch: arrays of the same leading axis. Gradients are taken one after the other.

    Returns:
      ``{path: scores}`` of all float leaves.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([[1.0, 2.0], [3.0, 0.0]])}
      >>> columns, x = jc.prune.Block((None, 1)), jnp.array([[1.0, 1.0], [1.0, -1.0]])
      >>> jc.prune.unit_fisher(lambda p, x: (x @ p["w"]).sum(), params, columns, x)["w"].tolist()
      [[5.0, 2.0], [5.0, 2.0]]
    """
    of, part = of_paths(loss, params)
    for path, w in part.items():
        pattern.check(path, w.shape)

    def add(total: Scores, example: tuple) -> tuple[Scores, None]:
        grads = jax.grad(of)(part, *jax.tree.map(lambda x: x[None], example))
        gates = {path: pattern.units(w * grads[path]) * pattern.unit(w.shape) for path, w in part.items()}
        return {path: total[path] + jnp.square(gate.astype(jnp.float32)) for path, gate in gates.items()}, None

    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32), {path: jax.eval_shape(pattern.units, w) for path, w in part.items()}
    )
    total, n = jax.lax.scan(add, zeros, batch)[0], jax.tree.leaves(batch)[0].shape[0]
    return {path: pattern.spread(total[path] / (2 * n), w.shape) for path, w in part.items()}
