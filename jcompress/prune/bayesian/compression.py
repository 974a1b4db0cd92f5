"""Bayesian compression: weights of a group share a scale, and groups whose scale is noise or near zero go."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import formats
from jcompress.core import Context, Method
from jcompress.prune.bayesian.methods import check_axes


@dataclasses.dataclass(frozen=True)
class BayesianCompression(Method):
    """Bayesian compression with a group horseshoe prior (Louizos et al. 2017, arXiv:1705.08665).

    Weights of a group share a log-normal scale under a horseshoe prior. Train on samples with
    ``jc.prune.bayesian.penalty(tree) / examples`` added to the mean loss of an example; then ``jc.finalize`` prunes
    whole groups, those with ``-log mode(scale) >= threshold``, and :func:`jcompress.prune.bayesian.bit_widths` reads
    from the posterior how many bits the rest deserves.

    Attributes:
      axes: negative axes along which a scale is shared. The default ``(-1,)`` gives one to every row, an input of an
        (in, out) kernel; ``(-4, -3, -2)`` one to every filter of a convolution (height, width, in, out).
      tau: the scale of the half-Cauchy prior of the whole array; smaller prunes more.
      start: the log of all variances at the start, where every scale is 1 and its prior is as near as that allows.
      threshold: of the negative log of the mode of a scale. In the paper it is chosen by eye, from a histogram.

    Raises:
      ValueError: for axes that the array does not have, or a ``tau`` that is not positive.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.prune.BayesianCompression()(jnp.ones((4, 2)))
      >>> node.log_mode().shape, jc.finalize(node)
      ((4, 1), Masked(values=float32[4,2], mask=bool[4,1]))
    """

    axes: tuple[int, ...] = (-1,)
    tau: float = 1e-5
    start: float = -9.0
    threshold: float = 3.0

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError(f"BayesianCompression: tau={self.tau} must be positive")

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise for axes that the array does not have."""
        check_axes(self, path, shape)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> formats.Horseshoe:
        """The node for one array."""
        self.check(context.path, w.shape, w.dtype)
        empty = formats.Horseshoe(
            None, None, None, None, None, None, tuple(self.axes), w.ndim, self.tau, self.start, self.threshold
        )
        return empty.project(w)


@dataclasses.dataclass(frozen=True)
class NormalJeffreys(Method):
    """Bayesian compression with a group normal-Jeffreys prior (Louizos et al. 2017, arXiv:1705.08665).

    Weights of a group share a Gaussian scale ``z`` under the prior ``1 / |z|``, which has no hyperparameters. Train on
    samples with ``jc.prune.bayesian.penalty(tree) / examples`` added to the mean loss of an example; then
    ``jc.finalize`` prunes the groups whose scale has a **high** dropout rate ``alpha = variance / mean**2``, ``log
    alpha >= threshold``, and :func:`jcompress.prune.bayesian.bit_widths` reads from the posterior how many bits the
    rest deserves.

    Attributes:
      axes: negative axes along which a scale is shared. The default ``(-1,)`` gives one to every row, an input of an
        (in, out) kernel; ``(-4, -3, -2)`` one to every filter of a convolution (height, width, in, out).
      start: the log of all variances at the start, where scales have the mean 1.
      threshold: of log alpha. In the paper it is chosen by eye, from a histogram: trained
        scales that matter lie far below it, near ``start``, and the others rise slowly.

    Raises:
      ValueError: for axes that the array does not have, or if groups would start at or above the threshold.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.prune.NormalJeffreys()(jnp.ones((4, 2)))
      >>> node.log_alpha().shape, jc.finalize(node)
      ((4, 1), Masked(values=float32[4,2], mask=bool[4,1]))
    """

    axes: tuple[int, ...] = (-1,)
    start: float = -9.0
    threshold: float = -3.0

    def __post_init__(self) -> None:
        if not self.start < self.threshold:
            raise ValueError(
                f"NormalJeffreys: start={self.start} is not below threshold={self.threshold}, so that all groups would "
                "be pruned at once; choose a smaller start"
            )

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise for axes that the array does not have."""
        check_axes(self, path, shape)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> formats.Jeffreys:
        """The node for one array."""
        self.check(context.path, w.shape, w.dtype)
        empty = formats.Jeffreys(None, None, None, None, tuple(self.axes), self.start, self.threshold)
        return empty.project(jnp.copy(w))
