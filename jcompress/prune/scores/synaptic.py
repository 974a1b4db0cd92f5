"""Pruning at initialization without data, by synaptic flow."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jcompress import core
from jcompress.core import PyTree
from jcompress.numeric.threshold import keep_largest
from jcompress.prune.masks import selection
from jcompress.prune.scores import network
from jcompress.prune.scores.network import Scores

_FAR = 40
"""Powers of two that the flow may be away from one before it is rescaled."""


class _Scale(NamedTuple):
    """Powers of two on the inputs and on the cotangent, between which the flow is scored."""

    inputs: jax.Array
    outputs: jax.Array


def _flow(fn: Callable[..., Any], params: PyTree, args: tuple) -> tuple[Callable[..., jax.Array], Scores]:
    """The flow as a function of magnitudes by path and of a scale, and the magnitudes."""
    of, part = network.of_paths(fn, params)
    magnitudes = {path: jnp.abs(w) for path, w in part.items()}

    def ones(x: Any, scale: jax.Array) -> Any:
        return jnp.full(jnp.shape(x), scale, x.dtype) if core.is_trainable(x) else x

    def flow(weights: Scores, scale: _Scale) -> jax.Array:
        inputs = jax.tree.map(lambda x: ones(x, jnp.ldexp(jnp.float32(1), scale.inputs)), args)
        outputs = [y for y in jax.tree.leaves(of({**magnitudes, **weights}, *inputs)) if core.is_trainable(y)]
        unit = jnp.ldexp(jnp.float32(1), scale.outputs)
        return sum((jnp.sum(y.astype(jnp.float32) * unit) for y in outputs), jnp.float32(0))

    return flow, magnitudes


def _settled(flow: Callable[..., jax.Array], weights: Scores) -> _Scale:
    """A scale at which the flow of the whole network is a number, and not zero if it can be helped."""

    def moved(scale: _Scale, by: int) -> _Scale:
        return scale._replace(inputs=scale.inputs + by)

    def overflows(scale: _Scale) -> jax.Array:
        return ~jnp.isfinite(flow(weights, scale)) & (scale.inputs > -120)

    def vanishes(scale: _Scale) -> jax.Array:
        return (flow(weights, scale) == 0) & (scale.inputs < 120)

    start = _Scale(jnp.int32(0), jnp.int32(0))
    start = lax.while_loop(overflows, lambda scale: moved(scale, -20), start)
    start = lax.while_loop(vanishes, lambda scale: moved(scale, 20), start)
    return _balanced(start, flow(weights, start))


def _balanced(scale: _Scale, value: jax.Array) -> _Scale:
    """Scales that bring the flow to about one, half on either side, if it has gone far from there."""
    exponent = jnp.round(jnp.log2(jnp.where(value > 0, value, 1))).astype(jnp.int32)
    total = scale.inputs + scale.outputs - exponent
    inputs = jnp.clip(total // 2, -120, 120)
    far = (jnp.abs(exponent) > _FAR) & jnp.isfinite(value)
    outputs = jnp.clip(total - inputs, -120, 120)
    return _Scale(jnp.where(far, inputs, scale.inputs), jnp.where(far, outputs, scale.outputs))


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
    flow, weights = _flow(fn, params, args)
    grads = jax.grad(flow)(weights, _settled(flow, weights))
    return {path: (w * grads[path]).astype(jnp.float32) for path, w in weights.items()}


def synflow(
    fn: Callable[..., Any], params: PyTree, sparsity: Any, *args: Any, rounds: int = 100, match: str | None = None
) -> Scores:
    """Masks by iterative synaptic flow: no data, and no layer is cut through while a path remains.

    For ``k = 1, ..., rounds`` the weights of largest synaptic flow are kept among those left, ``(1 - sparsity)**(k /
    rounds)`` of all, with one threshold for all leaves. One ``fori_loop``, compiled once. The flow is a product over
    layers: where it would leave the range of float32, inputs and cotangents are scaled by powers of two, which changes
    no score's rank in a network without biases.

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
    masks, finite = _rounds(flow, weights, _counts(sum(w.size for w in weights.values()), sparsity, rounds))
    if core.is_concrete(finite) and not bool(finite):
        raise ValueError(
            "synflow: the sum of outputs for inputs of ones is not finite at any scale; leave out what saturates or "
            "divides, such as softmax and normalization, or scale the parameters down"
        )
    return masks


def _counts(size: int, sparsity: Any, rounds: int) -> jax.Array:
    """How many weights stay after each round; after the last exactly those of the sparsity."""
    density = 1 - jnp.asarray(sparsity, jnp.float32)
    levels = density ** (jnp.arange(1, rounds + 1) / rounds)
    counts = jnp.round(levels * size).astype(jnp.uint32)
    return jnp.maximum(counts, selection.kept(size, sparsity)).at[-1].set(selection.kept(size, sparsity))


def _rounds(flow: Callable[..., jax.Array], weights: Scores, counts: jax.Array) -> tuple[Scores, jax.Array]:
    def prune(k: jax.Array, state: tuple) -> tuple:
        masks, scale, finite = state
        left = {path: jnp.where(masks[path], w, 0) for path, w in weights.items()}
        value, grads = jax.value_and_grad(flow)(left, scale)
        # What is cut already comes after all that is left, of which no score is negative.
        scores = [jnp.where(masks[path], w * grads[path], -1) for path, w in left.items()]
        kept = dict(zip(weights, keep_largest(scores, counts[k]), strict=True))
        return kept, _balanced(scale, value), finite & jnp.isfinite(value)

    everything = {path: jnp.ones(w.shape, jnp.bool_) for path, w in weights.items()}
    start = (everything, _settled(flow, weights), jnp.array(True))
    masks, _, finite = lax.fori_loop(0, len(counts), prune, start)
    return masks, finite
