"""Values shared by a hash of the index."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Gathered


@dataclasses.dataclass(frozen=True)
class Hashed(Method):
    """Entries that a hash of their index sends to one bucket share a value (Chen et al. 2015, arXiv:1504.04788).

    ``w[i, j] = sign(i, j) * values[bucket(i, j)]`` with both functions of ``(seed, i, j)`` alone, the same on every
    platform, and so not stored. A value is fitted by the signed mean of its entries, the optimum of least squares;
    ``jc.split`` trains the values. Which weights share is chance: a hash keeps about the share ``ratio`` of the squared
    norm of trained weights, so train it, or train it from the start. With ``scope="global"`` one bank of values serves
    leaves of one dtype and any shapes, as in parameter allocation search (Plummer et al. 2022, arXiv:2006.10598): the
    first one's node owns it, the others refer to it, and each has a hash of its own.

    Attributes:
      ratio: how many values there are for each entry, in (0, 1].
      seed: of the hash, from 0 to 2**32 - 1; with a bank for all, of the first leaf, and one more for each after it.
      scope: ``"leaf"``, values for each leaf, or ``"global"``, one bank for all leaves of the rule.

    Raises:
      ValueError: for a ratio, a seed or a scope outside these.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.share.Hashed(ratio=0.125)(jnp.ones((64, 32)))
      >>> node.shape, node.nbits()
      ((64, 32), 8192)
      >>> params = {"a": jnp.ones((64, 32)), "b": jnp.ones((32, 10))}
      >>> small = jc.compress(params, jc.plan(params, [(".*", jc.share.Hashed(ratio=0.125, scope="global"))]))
      >>> jc.nbits(small) // 32 == round(0.125 * (64 * 32 + 32 * 10))
      True
    """

    ratio: float = 0.125
    seed: int = 0
    scope: Literal["leaf", "global"] = "leaf"

    def __post_init__(self) -> None:
        check_hash("Hashed", self.ratio, self.seed)
        if self.scope not in ("leaf", "global"):
            raise ValueError(f"Hashed: scope={self.scope!r} is unknown; use 'leaf' or 'global'")

    @property
    def joint(self) -> bool:
        """Whether one bank serves all leaves of the rule."""
        return self.scope == "global"

    def fit(self, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Gathered]:
        """One node for each array of the rule."""
        if not self.joint or len(arrays) == 1:
            return super().fit(arrays, contexts)
        slots = max(round(self.ratio * sum(w.size for w in arrays)), 1)

        def node(i: int, w: jax.Array) -> Gathered:
            bank = core.Common(None, (w.dtype.name,), (slots,))
            return Gathered(bank, w.shape, "hash", (slots,), (self.seed + i) % 2**32)

        nodes = [node(i, w) for i, w in enumerate(arrays)]
        fitted = Gathered.project_together(nodes, arrays, [context.where for context in contexts])
        return [
            dataclasses.replace(x, values=core.Common(x.values.value.astype(w.dtype), x.values.group))
            for x, w in zip(fitted, arrays, strict=True)
        ]

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Gathered:
        """The node for one array."""
        slots = max(round(self.ratio * w.size), 1)
        return Gathered(None, w.shape, "hash", (slots,), self.seed).project(w, context.where)


@dataclasses.dataclass(frozen=True)
class HashedFrequencies(Method):
    """A hash of a convolution's window in frequencies, FreshNets (Chen et al. 2015, arXiv:1506.04449).

    Smooth filters lose less so. Coefficients of the cosine transform of one band, those whose frequencies have one sum,
    share values among themselves, and low bands have more: their number is that of the coefficients divided by
    ``(1 + band) ** decay``, in proportion.

    The window is gathered where it is sharded, and totals of frequencies move between devices.

    Attributes:
      ratio: how many values there are for each entry, in (0, 1]; a band has one at least.
      seed: of the hash, from 0 to 2**32 - 1.
      decay: how fast the share of a band falls; 0 gives all bands the same one.

    Raises:
      ValueError: for hyperparameters outside these, or an array without a window.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.share.HashedFrequencies(ratio=0.25)(jnp.ones((3, 3, 16, 8)))
      >>> node.slots, node.nbits()
      ((78, 78, 78, 39, 16), 9248)
    """

    ratio: float = 0.125
    seed: int = 0
    decay: float = 1.0

    def __post_init__(self) -> None:
        check_hash("HashedFrequencies", self.ratio, self.seed)
        if not 0 <= self.decay < math.inf:
            raise ValueError(f"HashedFrequencies: decay={self.decay} must be a number from 0 on")

    def check(self, path: str, shape: tuple[int, ...], dtype: object) -> None:
        """Raise for an array without a window."""
        if len(shape) < 3:
            raise ValueError(
                f"{path}: HashedFrequencies found shape {shape}, expected a convolution kernel, (window..., in, out); "
                "use Hashed for a matrix"
            )

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Gathered:
        """The node for one array."""
        self.check(context.path, w.shape, w.dtype)
        node = Gathered(None, w.shape, "frequency", self._slots(w.shape), self.seed)
        return node.project(w, context.where)

    def _slots(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The values of each band: in proportion to its weight, and no more than it has coefficients."""
        window = np.indices(shape[:-2]).sum(0).ravel()
        entries = np.bincount(window) * math.prod(shape[-2:])
        weight = entries / (1 + np.arange(len(entries))) ** self.decay
        wanted, slots, free = self.ratio * entries.sum(), np.zeros(len(entries)), np.ones(len(entries), bool)
        for _ in entries:  # what a full band cannot take goes to the others
            rest = max(wanted - entries[~free].sum(), 0)
            slots = np.where(free, rest * weight / max(weight[free].sum(), 1e-30), entries)
            full = free & (slots >= entries)
            if not full.any():
                break
            free &= ~full
        return tuple(int(n) for n in np.maximum(np.minimum(np.round(slots), entries), 1))


def check_hash(name: str, ratio: float, seed: int) -> None:
    """Raise for a ratio or a seed that is none."""
    if not 0 < ratio <= 1:
        raise ValueError(f"{name}: ratio={ratio} must be in (0, 1]: how many values there are for each entry")
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ValueError(f"{name}: seed={seed!r} must be an integer from 0 to {2**32 - 1}")
