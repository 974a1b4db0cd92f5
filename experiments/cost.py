"""Multiply-adds of a model, dense and compressed: a count on paper, not a speed."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

import jcompress as jc

PyTree = Any


def multiply_adds(model: nn.Module, params: PyTree, x: Any) -> tuple[float, dict[str, float]]:
    """Multiply-adds of one example: the total, and those of each kernel by its path.

    A kernel of a dense or convolutional layer takes part once at each output position, so it costs its size times
    the number of positions (zero padding counts as multiplied). The total is half the floating-point operations
    that XLA would count, elementwise ones and attention products included.

    Args:
      model: a linen module.
      params: its dense parameters.
      x: a batch; one example of it is counted.
    """
    found = jc.trace.cost(lambda params, x: model.apply({"params": params}, x), params, x[:1])
    kernels = {row.path: row.multiply_adds for row in found.rows if row.multiply_adds}
    return max(found.flops / 2, sum(kernels.values())), kernels


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
    return sum(part for part, _ in jc.trace.node_products(x))
