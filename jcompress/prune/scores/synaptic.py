"""Pruning at initialization without data, by synaptic flow."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jcompress import core
from jcompress.core import PyTree
from jcompress.numeric.counting import Count, pick
from jcompress.numeric.threshold import keep_largest
from jcompress.prune.masks import selection
from jcompress.prune.scores import network
from jcompress.prune.scores.network import Scores

_FAR = 40
"""Powers of two that the flow may be away from one before it is rescaled."""
_WHOLE = 1e-4
"""How near to an integer a degree must be."""
_UNKNOWN = -1.0
"""A flow that nobody has computed yet."""
_WRITTEN = 2.0**100
"""Flows up to this, and down to its inverse, are given as they are."""


class _Scale(NamedTuple):
    """Powers of two on the inputs and on the cotangent, between which the flow is scored."""

    inputs: jax.Array
    outputs: jax.Array


class _Range(NamedTuple):
    """How the flow is kept inside the range of floats: by a power of two on every leaf, if it is a product of them.

    Attributes:
      homogeneous: whether every path of the network takes each leaf as often: then scaling a leaf scales all scores.
      degree: how often, the mean over leaves.
      total: the powers of two shared out among the leaves, beside what makes their sums alike.
      scale: of a network that is not homogeneous.
    """

    homogeneous: jax.Array
    degree: jax.Array
    total: jax.Array
    scale: _Scale


def _flow(fn: Callable[..., Any], params: PyTree, args: tuple) -> tuple[Callable[..., jax.Array], Scores]:
    """The flow as a function of magnitudes by path and of a scale, and the magnitudes."""
    of, part = network.of_paths(fn, params)
    magnitudes = {path: jnp.abs(w) for path, w in part.items()}

    def ones(x: Any, scale: jax.Array) -> Any:
        return jnp.full(jnp.shape(x), scale, x.dtype) if core.is_trainable(x) else x

    def flow(weights: Scores, scale: _Scale) -> jax.Array:
        inputs = jax.tree.map(lambda x: ones(x, _power(scale.inputs)), args)
        outputs = [y for y in jax.tree.leaves(of({**magnitudes, **weights}, *inputs)) if core.is_trainable(y)]
        wide = [y.astype(jnp.promote_types(y.dtype, jnp.float32)) for y in outputs]
        return sum((jnp.sum(y * _power(scale.outputs).astype(y.dtype)) for y in wide), jnp.float32(0))

    return flow, magnitudes


def _power(exponent: jax.Array) -> jax.Array:
    return jnp.ldexp(jnp.ones((), jnp.result_type(float)), exponent)


def _alike(weights: Scores, total: jax.Array) -> Scores:
    """The leaves times powers of two: each as if its matrix kept the size of what it is applied to, then ``total``."""
    found = {}
    for i, (path, w) in enumerate(weights.items()):
        mean = jnp.sum(w.astype(jnp.float32) * (1 / max(w.size, 1)))
        size = jnp.log2(jnp.where(mean > 0, mean, 1.0)) + 0.5 * math.log2(max(w.size, 1))
        share = (i + 1) * total // len(weights) - i * total // len(weights)
        exponent = jnp.clip(share - jnp.round(size).astype(jnp.int32), -126, 126)
        found[path] = w * _power(exponent).astype(w.dtype)
    return found


def _in_range(flow: Callable[..., jax.Array], weights: Scores) -> _Range:
    """Where the flow of the whole network is a number, and not zero if it can be helped."""
    none, many = _Scale(jnp.int32(0), jnp.int32(0)), jnp.int32(64 * len(weights))

    def outside(state: tuple) -> jax.Array:
        low, high, _, value, _ = state
        return ~(jnp.isfinite(value) & (value > 0)) & (high - low > 1)

    def halve(state: tuple) -> tuple:
        low, high, total, value, _ = state
        low, high = jnp.where(value == 0, total, low), jnp.where((value == 0) | (value == _UNKNOWN), high, total)
        total = (low + high) // 2
        scaled = _alike(weights, total)
        value, grads = jax.value_and_grad(flow)(scaled, none)
        parts = [jnp.sum((w * grads[path]) / jnp.where(value > 0, value, 1)) for path, w in scaled.items()]
        return low, high, total, value.astype(jnp.float32), jnp.stack(parts).astype(jnp.float32)

    start = (-many, many, jnp.int32(0), jnp.float32(_UNKNOWN), jnp.zeros(len(weights), jnp.float32))
    _, _, total, value, degrees = lax.while_loop(outside, halve, start)
    whole = jnp.all(jnp.abs(degrees - jnp.round(degrees)) <= _WHOLE * jnp.maximum(degrees, 1))
    homogeneous = whole & (value > 0) & jnp.isfinite(value)
    found = _Range(homogeneous, jnp.mean(degrees), total, _settled(flow, weights, homogeneous))
    return _moved(found, value)


def _laid(found: _Range, weights: Scores) -> tuple[Scores, _Scale]:
    """The leaves and the scale at which the flow is scored."""
    alike = _alike(weights, found.total)
    scaled = {path: jnp.where(found.homogeneous, alike[path], w) for path, w in weights.items()}
    return scaled, jax.tree.map(lambda x: jnp.where(found.homogeneous, 0, x), found.scale)


def _moved(found: _Range, value: jax.Array) -> _Range:
    """Leaves scaled so that the flow, which was ``value``, comes to about one."""
    positive = jnp.isfinite(value) & (value > 0) & found.homogeneous
    steps = jnp.log2(jnp.where(positive, value, 1)) / jnp.where(positive, found.degree, 1)
    return found._replace(total=found.total - jnp.round(steps).astype(jnp.int32))


def _settled(flow: Callable[..., jax.Array], weights: Scores, homogeneous: jax.Array) -> _Scale:
    """A scale of inputs and cotangent; where the network is homogeneous, none is looked for."""

    def outside(state: tuple) -> jax.Array:
        turn, _, value = state
        return ~(jnp.isfinite(value) & (value > 0)) & (turn < 7) & ~homogeneous

    def move(state: tuple) -> tuple:
        turn, scale, value = state
        step = jnp.where(value == _UNKNOWN, 0, jnp.where(value == 0, 20, -20))
        scale = scale._replace(inputs=scale.inputs + step)
        return turn + 1, scale, flow(weights, scale)

    none = _Scale(jnp.int32(0), jnp.int32(0))
    start = (jnp.int32(0), none, jnp.full((), _UNKNOWN, jax.eval_shape(flow, weights, none).dtype))
    _, scale, value = lax.while_loop(outside, move, start)
    return _balanced(scale, value)


def _balanced(scale: _Scale, value: jax.Array) -> _Scale:
    """Scales that bring the flow back to where it is not far, by the cotangent: inputs weigh less than biases else."""
    exponent = jnp.round(jnp.log2(jnp.where(value > 0, value, 1))).astype(jnp.int32)
    beyond = exponent - jnp.clip(exponent, -_FAR, _FAR)
    most = 120 if value.dtype.itemsize <= 4 else 960
    outputs = jnp.clip(scale.outputs - beyond, -most, most)
    return scale._replace(outputs=jnp.where(jnp.isfinite(value), outputs, scale.outputs))


def synflow_scores(fn: Callable[..., Any], params: PyTree, *args: Any) -> Scores:
    """Synaptic flow of each weight: ``|w| dR/d|w|``, where ``R`` is the sum of outputs for inputs of ones.

    All parameters enter by their magnitudes. In a network of linear layers and ReLU without biases the scores of each
    layer sum to ``R``, and those into a hidden unit to those out of it (Tanaka et al. 2020, arXiv:2006.05467).

    Args:
      fn: as for :func:`synflow`.
      params: a pytree of arrays.
      *args: as for :func:`synflow`.

    Returns:
      ``{path: float32 array}`` of all float leaves, up to one common power of two where ``R`` leaves the range of
      float32.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0], [1.0]])}
      >>> found = jc.prune.synflow_scores(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 1)))
      >>> found["a"].tolist(), found["b"].tolist()
      ([[3.0, 2.0]], [[3.0], [2.0]])
    """
    flow, magnitudes = _flow(fn, params, args)
    found, value = _in_range(flow, magnitudes), flow(magnitudes, _Scale(jnp.int32(0), jnp.int32(0)))
    near = (value < _WRITTEN) & (value > 1 / _WRITTEN)
    if _is_too_narrow(found.homogeneous | (found.scale.inputs == 0)):
        with _doubles():
            wide, inputs = jax.tree.map(_doubled, (params, args))
            return synflow_scores(fn, wide, *inputs)
    weights, scale = _laid(found._replace(homogeneous=found.homogeneous & ~near), magnitudes)
    grads = jax.grad(flow)(weights, scale)
    return {path: (w * grads[path]).astype(jnp.float32) for path, w in weights.items()}


def synflow(
    fn: Callable[..., Any], params: PyTree, sparsity: Any, *args: Any, rounds: int = 100, match: str | None = None
) -> Scores:
    """Masks by iterative synaptic flow: no data, and no layer is cut through while a path remains.

    For ``k = 1, ..., rounds`` the weights of largest synaptic flow are kept among those left, ``(1 - sparsity)**(k /
    rounds)`` of all, with one threshold for all leaves. One ``fori_loop``, compiled once. The flow is a product over
    layers and soon leaves the range of floats. Where every path takes each leaf as often, as in plain networks without
    biases, the leaves are scaled by powers of two, layer by layer, at any depth; that changes no score's rank. Else
    cotangents are, and outside ``jit`` a flow that float32 does not hold is computed in float64, which serves up to
    about ``2**1000``. Under ``jit`` inputs are scaled then, which is as good without biases, and serves up to about
    ``2**240``; with them, paths from the inputs count for less.

    Args:
      fn: called as ``fn(params, *args)``. Linear layers, ReLU and residual connections; leave out normalization, or
        run it with fixed statistics, and anything that saturates.
      params: a pytree of arrays.
      sparsity: the fraction of zeros among the leaves that are pruned; a number or a traced scalar.
      *args: example arguments. Float arrays are replaced by ones: a batch of one is enough.
      rounds: a single round brings layer collapse back.
      match: ``re.fullmatch`` of the paths to prune; float leaves of two axes or more by default.

    Returns:
      ``{path: mask}`` for the leaves that are pruned. As nodes:
      ``jc.prune.ByScore(sparsity=s, scope="global", score=jc.prune.scores.lookup(masks))``, with the same sparsity.

    Raises:
      ValueError: for a sparsity outside [0, 1], no leaf to prune, fewer than one round, or, outside ``jit``, a flow
        that is not finite.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> keys = jax.random.split(jax.random.key(0))
      >>> params = {"a": jax.random.normal(keys[0], (4, 8)), "b": jax.random.normal(keys[1], (8, 2))}
      >>> masks = jc.prune.synflow(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, 0.75, jnp.ones((1, 4)))
      >>> sum(int(mask.sum()) for mask in masks.values())
      12

    Reference: Tanaka, Kunin, Yamins & Ganguli 2020, arXiv:2006.05467.
    """
    if rounds < 1:
        raise ValueError(f"synflow: rounds={rounds} must be positive")
    if core.is_concrete(sparsity):
        selection.check_sparsity("synflow", sparsity)
    flow, magnitudes = _flow(fn, params, args)
    weights = {
        path: w for path, w in magnitudes.items() if (w.ndim > 1 if match is None else re.fullmatch(match, path))
    }
    if not weights:
        raise ValueError(f"synflow: match={match!r} finds no float leaf among {list(magnitudes)[:3]}")
    counts = _counts(sum(w.size for w in weights.values()), sparsity, rounds)
    masks, finite, exact = _rounds(flow, weights, counts)
    if _is_too_narrow(exact):
        with _doubles():
            wide, inputs = jax.tree.map(_doubled, (params, args))
            return synflow(fn, wide, sparsity, *inputs, rounds=rounds, match=match)
    if core.is_concrete(finite) and not bool(finite):
        raise ValueError(
            "synflow: the sum of outputs for inputs of ones is not finite at any scale. Either something divides or "
            "saturates, such as softmax and normalization: leave it out of fn. Or paths take unlike numbers of "
            "layers (residual connections, biases), so that no layer can be scaled by itself, and the flow leaves the "
            "range of float64: scale the layers down"
        )
    return masks


def _is_too_narrow(exact: jax.Array) -> bool:
    """Whether float32 does not hold the flow with its inputs as they are."""
    return core.is_concrete(exact) and not bool(exact) and jnp.result_type(float) != jnp.float64


def _doubles() -> Any:
    """A context in which there are floats of 64 bits."""
    found: Any = jax if hasattr(jax, "enable_x64") else jax.experimental  # where it is before jax 0.8
    return found.enable_x64(True)


def _doubled(x: Any) -> Any:
    return jnp.asarray(x, jnp.float64) if core.is_trainable(x) else x


def _counts(size: int, sparsity: Any, rounds: int) -> Count:
    """How many weights stay after each round; after the last exactly those of the sparsity."""
    density = 1 - jnp.asarray(sparsity, jnp.float32)
    levels = density ** (jnp.arange(1, rounds + 1) / rounds)
    counts, last = Count.near(jnp.round(levels * float(size))), selection.kept(size, sparsity)
    last = last if isinstance(last, Count) else Count.of(last)
    counts = pick(counts.reaches(last), counts, last)
    return pick(jnp.arange(rounds) == rounds - 1, last, counts)


def _rounds(flow: Callable[..., jax.Array], weights: Scores, counts: Count) -> tuple[Scores, jax.Array, jax.Array]:
    """Masks, whether the flow was finite, and whether it was so with the inputs as they are, or scores scale alike."""

    def prune(k: jax.Array, state: tuple) -> tuple:
        masks, found, finite = state
        left, scale = _laid(found, {path: jnp.where(masks[path], w, 0) for path, w in weights.items()})
        value, grads = jax.value_and_grad(flow)(left, scale)
        # What is cut already comes after all that is left, of which no score is negative.
        scores = [jnp.where(masks[path], _narrow(w * grads[path], value), -1) for path, w in left.items()]
        kept = dict(zip(weights, keep_largest(scores, jax.tree.map(lambda x: x[k], counts)), strict=True))
        found = _moved(found._replace(scale=_balanced(found.scale, value)), value)
        return kept, found, finite & jnp.isfinite(value)

    everything = {path: jnp.ones(w.shape, jnp.bool_) for path, w in weights.items()}
    start = (everything, _in_range(flow, weights), jnp.array(True))
    masks, found, finite = lax.fori_loop(0, len(counts.low), prune, start)
    return masks, finite, finite & (found.homogeneous | (found.scale.inputs == 0))


def _narrow(scores: jax.Array, value: jax.Array) -> jax.Array:
    """Scores of more than 32 bits as parts of the flow, in float32."""
    return scores if scores.dtype.itemsize <= 4 else (scores / jnp.where(value > 0, value, 1)).astype(jnp.float32)
