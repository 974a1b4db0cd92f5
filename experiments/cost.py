"""Multiply-adds of a model, dense and compressed: a count on paper, not a speed."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import jcompress as jc
from jcompress.formats import LowRank, Masked, Sum

PyTree = Any


def multiply_adds(model: nn.Module, params: PyTree, x: Any) -> tuple[float, dict[str, float]]:
    """Multiply-adds of one example: the total, and those of each kernel by its path.

    A kernel of a dense or convolutional layer takes part once at each output position, so it costs its size times
    the number of positions (zero padding counts as multiplied). The total is half the floating-point operations
    that XLA counts in the compiled forward pass, elementwise ones and attention products included.

    Args:
      model: a linen module.
      params: its dense parameters.
      x: a batch; one example of it is counted.
    """
    found: dict[str, float] = {}

    def record(call: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        out = call(*args, **kwargs)
        if isinstance(context.module, (nn.Dense, nn.Conv)) and context.method_name == "__call__":
            kernel = context.module.variables["params"]["kernel"]
            positions = math.prod(out.shape) // kernel.shape[-1]
            found["/".join((*context.module.path, "kernel"))] = float(kernel.size * positions)
        return out

    with nn.intercept_methods(record):
        jax.eval_shape(lambda p, x: model.apply({"params": p}, x), params, x[:1])
    cost = jax.jit(lambda p, x: model.apply({"params": p}, x)).lower(params, x[:1]).cost_analysis()
    return max((cost or {}).get("flops", 0.0) / 2, sum(found.values())), found


def compressed_multiply_adds(tree: PyTree, dense: tuple[float, dict[str, float]]) -> float:
    """Multiply-adds in theory, if zeros were skipped and factors applied one after the other.

    A masked kernel counts its density, a low-rank one ``rank * (in + out) / (in * out)``, a sum the sum of its
    terms; codes and codebooks count as dense. No code here runs that fast: it is what a kernel for the format
    could save.

    Args:
      tree: compressed parameters.
      dense: what :func:`multiply_adds` gave.
    """
    total, kernels = dense
    nodes = dict(jc.paths(tree))
    return total - sum(cost * (1 - part_multiplied(nodes[path])) for path, cost in kernels.items())


def part_multiplied(x: Any) -> float:
    """The multiply-adds of a node as a part of its dense array's."""
    if isinstance(x, Masked):
        return float(np.broadcast_to(np.asarray(x.mask), x.materialize().shape).mean())
    if isinstance(x, LowRank):
        u, v = (jc.materialize({"": factor})[""] for factor in (x.u, x.v))
        dense = u.size // u.shape[-1] * v.shape[-1]
        return (part_multiplied(x.u) * u.size + part_multiplied(x.v) * v.size) / dense
    if isinstance(x, Sum):
        return sum(map(part_multiplied, x.terms))
    return 1.0
