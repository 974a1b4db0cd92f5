"""Soft weight sharing: weights under a mixture of Gaussians that learns to be few spikes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core, rules
from jcompress.core import Context, Method, PyTree
from jcompress.formats import Codebook
from jcompress.numeric.pieces import totals


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no hash, and methods should
class Mixture:
    """Gaussians over all weights, trained with them: ``p(w) = sum_j pi_j N(w; mean_j, deviation_j**2)``.

    Nowlan & Hinton (1992); for compression Ullrich et al. 2017, arXiv:1702.04008, where the first component stays at
    zero with a fixed share of 0.99 or so and prunes, and the loss is ``task + 0.005 * mixture.loss(params)``. A mixture
    is a pytree of its three arrays: differentiate by it and give it an optimizer. When training ends, ``merged`` puts
    components together that say the same, and :class:`ByMixture` stores each weight as the mean of the component that
    most likely made it.

    Attributes:
      means: float32 (components,); the first is not used, it stands for 0.
      log_deviations: float32 (components,).
      logits: float32 (components,), of the shares; the first is not used.
      zero: the share of the first component.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([0.0, 0.01, 1.0, 1.01])}
      >>> mixture = jc.share.Mixture.spread(params, components=3, zero=0.5)
      >>> slope = jax.grad(lambda m, p: m.loss(p))(mixture, params)
      >>> slope.means.shape, mixture.share().round(2).tolist()
      ((3,), [0.5, 0.25, 0.25])
    """

    means: Any
    log_deviations: Any
    logits: Any
    zero: float = dataclasses.field(default=0.99, metadata={"static": True})

    @classmethod
    def spread(cls, params: PyTree, components: int = 17, zero: float = 0.99, match: str = ".*") -> Mixture:
        """A mixture to begin with: means evenly from the least weight to the largest, as far apart as they are wide.

        Args:
          params: a pytree of arrays.
          components: how many, that at zero among them; 2 or more.
          zero: the share of the one at zero.
          match: a regular expression for the whole paths of the weights.

        Raises:
          ValueError: for fewer than 2 components, a share outside (0, 1), or a pattern that matches nothing.
        """
        if components < 2 or not 0 < zero < 1:
            raise ValueError(
                f"Mixture: components={components}, zero={zero}; expected 2 or more, and a share in (0, 1)"
            )
        arrays = rules.matching(params, match, "Mixture: match").values()
        low = jnp.stack([jnp.min(x).astype(jnp.float32) for x in arrays]).min()
        high = jnp.stack([jnp.max(x).astype(jnp.float32) for x in arrays]).max()
        spots = jnp.linspace(low, high, components - 1, dtype=jnp.float32)
        wide = jnp.maximum((high - low) / max(components - 2, 1), 1e-6)
        means = jnp.concatenate([jnp.zeros(1, jnp.float32), spots])
        log_deviations, logits = jnp.full(components, jnp.log(wide / 2), jnp.float32), jnp.zeros_like(means)
        return cls(means, log_deviations, logits, zero)

    def centers(self) -> jax.Array:
        """The means, float32 (components,), the first one zero."""
        return jnp.asarray(self.means).at[0].set(0.0)

    def share(self) -> jax.Array:
        """The share of each component, float32 (components,)."""
        others = jax.nn.softmax(self.logits[1:]) * (1 - self.zero)
        return jnp.concatenate([jnp.full(1, self.zero, jnp.float32), others])

    def log_densities(self, w: jax.Array) -> jax.Array:
        """``log pi_j N(w; ...)`` of each weight and component, float32 (..., components)."""
        far = (w.astype(jnp.float32)[..., None] - self.centers()) * jnp.exp(-self.log_deviations)
        return jnp.log(self.share()) - 0.5 * jnp.square(far) - self.log_deviations - 0.5 * jnp.log(2 * jnp.pi)

    def loss(self, params: PyTree, match: str = ".*") -> jax.Array:
        """``-sum log p(w)`` over the weights, float32 ().

        Args:
          params: a pytree of arrays.
          match: a regular expression for the whole paths of the weights.
        """
        found = rules.matching(params, match, "Mixture: match").values()
        parts = [jnp.sum(jax.nn.logsumexp(self.log_densities(x), axis=-1)) for x in found]
        return -jnp.sum(jnp.stack(parts))

    def merged(self, divergence: float = 1e-2) -> Mixture:
        """The mixture with components put together while that changes it little; outside ``jit`` only.

        What two become has their share, mean and variance: ``s**2 = sum_j pi_j (s_j**2 + mean_j**2) / pi - mean**2``.
        With the one at zero it stays at zero, and its variance is taken about zero. Of all pairs that one is merged
        whose bound on the Kullback-Leibler divergence from the mixture before, ``pi log s - sum_j pi_j log s_j``, is
        least (Runnalls 2007).

        Args:
          divergence: the most that this bound may be, in nats a weight, at each merge.
        """
        share, mean = (np.asarray(x, np.float64) for x in (self.share(), self.centers()))
        variance = np.exp(2 * np.asarray(self.log_deviations, np.float64))
        while len(mean) > 1:
            total, center, spread = _joined(share, mean, variance)
            logs = share * np.log(variance)
            cost = 0.5 * (total * np.log(spread) - logs[:, None] - logs)
            cost[np.tril_indices(len(cost))] = np.inf
            i, j = np.unravel_index(np.argmin(cost), cost.shape)
            if not cost[i, j] <= divergence:
                break
            share[i], mean[i], variance[i] = total[i, j], center[i, j], spread[i, j]
            share, mean, variance = (np.delete(x, j) for x in (share, mean, variance))
        logits = np.log(np.maximum(share, 1e-30))
        fields = (jnp.asarray(x, jnp.float32) for x in (mean, 0.5 * np.log(variance), logits))
        means, deviations, scores = fields
        return Mixture(means, deviations, scores, zero=float(min(share[0], 1.0)))


def _joined(share: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share, mean and variance of what each two components become; the first one's mean stays."""
    total = share[:, None] + share
    center = (share * mean + (share * mean)[:, None]) / total
    center[0], center[:, 0] = mean[0], mean[0]
    parts = share * (variance + mean**2)
    # Where the mean stays, the second moment is taken about it.
    first = (share * mean + (share * mean)[:, None]) / total
    spread = (parts + parts[:, None]) / total - 2 * center * first + center**2
    return total, center, np.maximum(spread, 1e-30)


@dataclasses.dataclass(frozen=True)
class ByMixture(Method):
    """Store each weight as the mean of the component of a mixture that most likely made it (Ullrich et al. 2017).

    All leaves of a rule share one codebook, the centers of the mixture. ``jc.project`` and ``Codebook.project`` then
    take the means of the weights; in a chain before ``jc.prune.Nonzero`` the zeros become a mask.

    Attributes:
      mixture: trained, and merged.
      refit: whether the centers become the means of their weights, all but the one at zero.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> mixture = jc.share.Mixture(jnp.array([0.0, 1.0]), jnp.log(jnp.array([0.1, 0.1])), jnp.zeros(2), zero=0.5)
      >>> jc.share.ByMixture(mixture)(jnp.array([0.1, 0.9, 1.3])).materialize().round(2).tolist()
      [0.0, 1.100000023841858, 1.100000023841858]

    Reference: arXiv:1702.04008.
    """

    mixture: Mixture
    refit: bool = True

    whole: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    def fit(self, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Codebook]:
        """One node for each array of the rule."""
        centers, components = self.mixture.centers(), int(np.size(self.mixture.means))
        dtype = jnp.uint8 if components <= 256 else jnp.uint16
        places = [jnp.argmax(self.mixture.log_densities(w), axis=-1).astype(dtype) for w in arrays]
        if self.refit:
            found = [_sums(w, at, components, c) for w, at, c in zip(arrays, places, contexts, strict=True)]
            total, count = (sum(column) for column in zip(*found, strict=True))
            centers = jnp.where((count > 0) & (jnp.arange(components) > 0), total / jnp.maximum(count, 1), centers)
        many = len(arrays) > 1
        return [
            Codebook(place, core.Common(book, (book.dtype.name,)) if many else book, components, w.ndim)
            for place, w in zip(places, arrays, strict=True)
            for book in (centers.astype(w.dtype),)
        ]


def _sums(w: jax.Array, place: jax.Array, components: int, context: Context) -> tuple[jax.Array, jax.Array]:
    shown = [] if context.where is None else [jnp.broadcast_to(context.where, w.shape)]

    def piece(x: jax.Array, at: jax.Array, *where: jax.Array) -> tuple[jax.Array, jax.Array]:
        weight = where[0].astype(jnp.float32) if where else jnp.ones(x.shape, jnp.float32)
        zeros = jnp.zeros(components, jnp.float32)
        return zeros.at[at].add(x.astype(jnp.float32) * weight), zeros.at[at].add(weight)

    return totals(piece, w, place, *shown)
