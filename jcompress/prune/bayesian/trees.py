"""What training with stochastic nodes needs beside them: penalties, steps, bits, and layers with less noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core, formats, rules
from jcompress.core import Compressed, PyTree


def _nodes(x: Any) -> Iterator[Compressed]:
    for y in jax.tree.leaves(x, is_leaf=core.is_node):
        if core.is_node(y):
            yield y
            for field in dataclasses.fields(y):
                if not field.metadata.get("static"):
                    yield from _nodes(getattr(y, field.name))


def penalty(tree: PyTree) -> jax.Array:
    """The sum over all nodes of what their posteriors or gates cost; differentiable.

    A hard concrete node costs the expected number of its weights that are not zero, the others the divergence of their
    posterior from their prior, in nats: for a loss that is the mean over examples, divide it by their number.

    Args:
      tree: any pytree; arrays and nodes without a penalty cost nothing.

    Returns:
      A float32 scalar.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
      >>> gated = jc.compress(params, jc.plan(params, [("w", jc.prune.HardConcrete(keep=0.999))]))
      >>> round(float(jc.prune.bayesian.penalty(gated)), 2)
      16.0
    """
    total = jnp.zeros((), jnp.float32)
    for node in _nodes(tree):
        if hasattr(node, "penalty"):
            total = total + node.penalty()
    return total


def at_step(tree: PyTree, step: Any) -> PyTree:
    """The tree with its annealed nodes told the training step; works under ``jit``.

    Args:
      tree: any pytree of arrays and nodes.
      step: an integer, traced or not.

    Returns:
      The tree; other nodes stay as they are.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.prune.AnnealedChannels(sparsity=0.5, steps=10)(jnp.ones((4, 16)))
      >>> int(jc.prune.bayesian.at_step({"w": node}, 7)["w"].step)
      7
    """

    def told(x: Any) -> Any:
        if not isinstance(x, (formats.Annealed, formats.SoftCodebook)):
            return x
        return dataclasses.replace(x, step=jnp.broadcast_to(jnp.asarray(step, jnp.int32), jnp.shape(x.step)))

    return jax.tree.map(told, tree, is_leaf=core.is_node)


def bit_widths(tree: PyTree) -> dict[str, int]:
    """How many bits the posterior leaves a weight: rounding need not be finer than the posterior is wide.

    ``bits = ceil(log2(1 + (max - min) / step))`` with ``step = 2 * sqrt(mean variance)`` over what is kept, so
    that the largest rounding error is one standard deviation of the posterior. Louizos et al. 2017,
    arXiv:1705.08665, choose the unit round-off of a float format by the same mean variance; this is the rule for the
    uniform grid of ``jc.quantize.Int``. Reads values, so it works outside ``jit`` only.

    Args:
      tree: a pytree with nodes of :class:`VariationalDropout`, :class:`BayesianCompression` or
        :class:`NormalJeffreys`, before ``finalize``.

    Returns:
      ``{path: bits}`` for these nodes, from 1 up; 1 where nothing is kept.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.formats.Gaussian(mean=jnp.linspace(-1, 1, 9), log_variance=jnp.full(9, 2 * jnp.log(0.05)))
      >>> jc.prune.bayesian.bit_widths({"w": node})
      {'w': 5}
    """
    widths = {}
    for path, node in rules.paths(tree):
        if isinstance(node, (formats.Gaussian, formats.Horseshoe, formats.Jeffreys)):
            mean, variance = (np.asarray(x, np.float64) for x in node.moments())
            kept = np.broadcast_to(np.asarray(core.finalize(node).mask), mean.shape)
            widths[path] = _bits(mean[kept], variance[kept])
    return widths


def _bits(mean: np.ndarray, variance: np.ndarray) -> int:
    if not mean.size or not variance.any():
        return 1 if not mean.size else 32
    levels = 1 + (mean.max() - mean.min()) / (2 * math.sqrt(variance.mean()))
    return max(1, math.ceil(math.log2(levels)))


def local_reparametrization(
    node: formats.Gaussian,
    x: jax.Array,
    key: jax.Array,
    product: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul,
) -> jax.Array:
    """A sample of ``x @ w`` drawn at the output: less noise in gradients than a sample of the weights.

    ``x @ w ~ N(x @ mean, x**2 @ variance)``, independent for each example (Kingma et al. 2015, arXiv:1506.02557).

    Args:
      node: weights with independent Gaussian posteriors.
      x: (..., in).
      key: for the noise.
      product: a bilinear function of input and kernel, such as a convolution, of which every output reads a weight once
        at most; the matrix product by default.

    Returns:
      What ``product(x, w)`` would give.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> node = jc.prune.VariationalDropout()(jnp.ones((4, 2)))
      >>> jc.prune.bayesian.local_reparametrization(node, jnp.ones((3, 4)), jax.random.key(0)).shape
      (3, 2)
    """
    mean, variance = node.moments()
    centre, spread = product(x, mean), product(jnp.square(x), variance)
    # The root has no derivative at zero, where an input is all zeros.
    deviation = jnp.sqrt(jnp.maximum(spread, jnp.finfo(spread.dtype).tiny))
    return centre + deviation * jax.random.normal(key, centre.shape, centre.dtype)
