"""Methods that put stochastic gates, or a posterior, in the place of an array. They are trained, then finalized."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jcompress import formats
from jcompress.core import Context, Method


class Sharing(Protocol):
    """A method whose gates or scales are shared along axes."""

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes, negative."""


def check_axes(method: Sharing, path: str, shape: tuple[int, ...]) -> None:
    """Raise for axes that the array does not have."""
    wrong = [axis for axis in method.axes if not -len(shape) <= axis < 0]
    if wrong:
        raise ValueError(
            f"{path}: {type(method).__name__} needs negative axes of an array of shape {shape}, found {wrong}; "
            f"choose axes among {tuple(range(-len(shape), 0))}"
        )


@dataclasses.dataclass(frozen=True)
class HardConcrete(Method):
    """Gates for l0 regularization (Louizos et al. 2018, arXiv:1712.01312).

    The values stand behind hard concrete gates, which are zero with positive probability. Train on samples,
    ``jc.materialize(tree, key=key)``, with ``strength * jc.prune.bayesian.penalty(tree)``, the expected number of
    weights that are not zero, in the loss; then ``jc.finalize`` gives masks.

    Attributes:
      axes: negative axes along which a gate is shared: ``(-2,)`` gives one to every column of an (in, out) kernel.
        Empty, the default, for one a weight.
      keep: where gates start, in (0, 1): their ``log_alpha`` is ``log(keep / (1 - keep))``. The first value of every
        weight is that of the array.
      temperature: of the samples, in (0, 1].
      stretch: ``(gamma, zeta)``, with ``gamma < 0`` and ``zeta > 1``.

    Raises:
      ValueError: for a value outside its range, or axes that the array does not have.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.ones((4, 4))}
      >>> tree = jc.compress(params, jc.plan(params, [("w", jc.prune.HardConcrete(keep=0.5))]))
      >>> jc.materialize(tree, key=jax.random.key(0))["w"].shape, round(float(jc.prune.bayesian.penalty(tree)), 2)
      ((4, 4), 13.31)
    """

    axes: tuple[int, ...] = ()
    keep: float = 0.9
    temperature: float = 2 / 3
    stretch: tuple[float, float] = (-0.1, 1.1)

    def __post_init__(self) -> None:
        low, high = self.stretch
        if not (low < 0 and high > 1 and 0 < self.temperature <= 1):
            raise ValueError(
                f"HardConcrete: found stretch={self.stretch}, temperature={self.temperature}; expected a stretch from "
                "below 0 to above 1 and a temperature in (0, 1]"
            )
        if not -low / (high - low) < self.keep < 1:
            raise ValueError(
                f"HardConcrete: found keep={self.keep}, expected it in ({-low / (high - low):.3g}, 1), so that gates "
                "start above zero"
            )

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise for axes that the array does not have."""
        check_axes(self, path, shape)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> formats.Gated:
        """The node for one array."""
        self.check(context.path, w.shape, w.dtype)
        node = formats.Gated(None, None, tuple(self.axes), self.keep, self.temperature, self.stretch)
        return node.project(w)


@dataclasses.dataclass(frozen=True)
class VariationalDropout(Method):
    """Sparse variational dropout: a Gaussian posterior for every weight (Molchanov et al. 2017, arXiv:1701.05369).

    ``w ~ N(mean, variance)``, under a log-uniform prior. Train on samples with
    ``jc.prune.bayesian.penalty(tree) / examples`` added to the mean loss of an example; then ``jc.finalize`` prunes the
    weights whose dropout rate ``alpha = variance / mean**2`` is **high**, ``log alpha >= threshold``.

    Attributes:
      start: log alpha at the start. It is relative to each weight, so no weight starts out pruned.
      threshold: of log alpha; 3 is a dropout probability of 0.95.

    Raises:
      ValueError: if gates would start at or above the threshold.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.prune.VariationalDropout()(jnp.ones((4, 2)))
      Gaussian(mean=float32[4,2], log_variance=float32[4,2])
    """

    start: float = -6.0
    threshold: float = 3.0

    def __post_init__(self) -> None:
        if not self.start < self.threshold:
            raise ValueError(
                f"VariationalDropout: start={self.start} is not below threshold={self.threshold}, so that all weights "
                "would be pruned at once; choose a smaller start"
            )

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> formats.Gaussian:
        """The node for one array."""
        return formats.Gaussian(None, None, self.start, self.threshold).project(jnp.copy(w))


@dataclasses.dataclass(frozen=True)
class InformationBottleneck(Method):
    """Variational information bottleneck: noisy gates for channels (VIBNet; Dai et al. 2018, arXiv:1802.10399).

    The channels of an array are multiplied by ``z ~ N(mean, variance)``. Train on samples with
    ``strength * jc.prune.bayesian.penalty(tree)`` in the loss, ``sum log(1 + mean**2 / variance) / 2``; then
    ``jc.finalize`` prunes the channels with ``log(variance / mean**2) >= threshold``. One sample serves a whole batch;
    the paper draws one for every example.

    Attributes:
      axes: negative axes along which a gate is shared. The default ``(-2,)`` gives one to every column, an output of an
        (in, out) kernel; ``(-4, -3, -2)`` one to every filter of a convolution (height, width, in, out).
      start: the log of the variance at the start, where the mean is 1.
      threshold: of the log of the ratio of noise to signal.

    Raises:
      ValueError: for axes that the array does not have, or if gates would start at or above the threshold.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.prune.InformationBottleneck()(jnp.ones((4, 2)))
      Bottleneck(values=float32[4,2], mean=float32[1,2], log_variance=float32[1,2])
    """

    axes: tuple[int, ...] = (-2,)
    start: float = -9.0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not self.start < self.threshold:
            raise ValueError(
                f"InformationBottleneck: start={self.start} is not below threshold={self.threshold}, so that all "
                "channels would be pruned at once; choose a smaller start"
            )

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise for axes that the array does not have."""
        check_axes(self, path, shape)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> formats.Bottleneck:
        """The node for one array."""
        self.check(context.path, w.shape, w.dtype)
        return formats.Bottleneck(None, None, None, tuple(self.axes), self.start, self.threshold).project(jnp.copy(w))


@dataclasses.dataclass(frozen=True)
class AnnealedChannels(Method):
    """Channel gates that harden as training goes on (ACoSP; Ditschuneit & Otterbach 2022, arXiv:2201.11103).

    A channel is multiplied by ``sigmoid((logit - quantile) / temperature)``, with standardised logits and a temperature
    that falls from 1 to 0.001. Train on ``jc.materialize(tree, key=key)``, with the step told by
    :func:`jcompress.prune.bayesian.at_step`; then ``jc.finalize`` keeps the channels of the largest logits.

    The paper draws the first logits from a normal distribution. Here they are the norms of the channels, so that the
    mask makes sense from the start.

    Attributes:
      sparsity: the fraction of channels that go, in [0, 1].
      steps: the steps in which the temperature falls.
      axis: the negative axis of channels.
      at_least: how many channels are kept in any case.
      temperatures: the first and the last.

    Raises:
      ValueError: for a value outside its range, or an axis that the array does not have.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.prune.AnnealedChannels(sparsity=0.5, steps=100, at_least=1)(jnp.ones((3, 4)))
      Annealed(values=float32[3,4], logits=float32[1,4], step=int32[], kept=2, steps=100)
    """

    sparsity: float
    steps: int
    axis: int = -1
    at_least: int = 8
    temperatures: tuple[float, float] = (1.0, 1e-3)

    def __post_init__(self) -> None:
        if not (0 <= self.sparsity <= 1 and self.steps > 0 and min(self.temperatures) > 0):
            raise ValueError(
                f"AnnealedChannels: found sparsity={self.sparsity}, steps={self.steps}, "
                f"temperatures={self.temperatures}; expected a sparsity in [0, 1] and positive steps and temperatures"
            )

    @property
    def axes(self) -> tuple[int, ...]:
        """The axis of channels."""
        return (self.axis,)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise for an axis that the array does not have."""
        check_axes(self, path, shape)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> formats.Annealed:
        """The node for one array."""
        self.check(context.path, w.shape, w.dtype)
        channels = w.shape[self.axis]
        kept = min(channels, max(self.at_least, channels - round(self.sparsity * channels)))
        step = jnp.asarray(0 if context.step is None else context.step, jnp.int32)
        empty = formats.Annealed(
            None,
            None,
            step,
            kept=kept,
            axis=self.axis,
            ndim=w.ndim,
            temperatures=self.temperatures,
            steps=self.steps,
        )
        return empty.project(jnp.copy(w))
