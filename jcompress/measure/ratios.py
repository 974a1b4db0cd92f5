"""Ratios that papers name differently, each under one name and with one formula."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jcompress import core, rules
from jcompress.core import PyTree


def compression_ratio(original: float, compressed: float) -> float:
    """``original / compressed``: how many times smaller (Cheng et al. 2017, arXiv:1710.09282).

    Args:
      original: bytes, or any other size, before.
      compressed: the same size after. Where it is 0 the ratio is infinite, and 1 if both are.

    Returns:
      The ratio, above 1 where something was won.

    Raises:
      ValueError: for a negative size.

    Example:
      >>> from jcompress import measure
      >>> measure.compression_ratio(100, 25)
      4.0
    """
    if original < 0 or compressed < 0:
        raise ValueError(f"sizes must not be negative, found {original} and {compressed}")
    if compressed == 0:
        return 1.0 if original == 0 else float("inf")
    return original / compressed


def space_saving(original: float, compressed: float) -> float:
    """``1 - compressed / original``: the part that is gone, 0 where nothing was won, negative where it grew.

    Args:
      original: bytes, or any other size, before.
      compressed: the same size after.

    Returns:
      A fraction of the original size.

    Raises:
      ValueError: for a negative size, or one that grew from nothing.

    Example:
      >>> from jcompress import measure
      >>> measure.space_saving(100, 25)
      0.75
    """
    if original < 0 or compressed < 0 or (original == 0 and compressed > 0):
        raise ValueError(f"space saving needs sizes >= 0, and 0 after if it was 0, found {original} and {compressed}")
    return 1 - compressed / original if original else 0.0


def sparsity(tree: PyTree) -> float:
    """The fraction of zeros among all entries of the dense arrays, biases and all: ``1 - nonzeros / size``.

    Args:
      tree: any pytree of arrays and nodes. Integers and booleans count too. A tree without entries has sparsity 0.

    Returns:
      A fraction in [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress import measure
      >>> measure.sparsity({"kernel": jnp.array([[1.0, 0.0]]), "bias": jnp.zeros(2)})
      0.75
    """
    arrays = [core.dense(x) for _, x in rules.paths(tree)]
    size = sum(int(np.size(x)) for x in arrays)
    nonzeros = sum(int(jnp.count_nonzero(x)) for x in arrays)
    return 1 - nonzeros / size if size else 0.0
