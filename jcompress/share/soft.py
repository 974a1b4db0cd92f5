"""Soft k-means, trained through."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jcompress.core import Context, Method
from jcompress.formats import SoftCodebook
from jcompress.numeric.soft_clusters import Gradient
from jcompress.share.vectors import check_block


@dataclasses.dataclass(frozen=True)
class SoftKMeans(Method):
    """Train weights that are soft assignments to a few shared values, which harden (DKM; Cho et al. 2021).

    With ``a = softmax_j(-||w_i - c_j|| / temperature)`` a round of soft k-means moves the words to ``c_j = sum_i a_ij
    w_i / sum_i a_ij``; at its fixed point the network sees ``sum_j a_ij c_j``, and the loss moves the weights through
    both. ``gradient`` says how:

    - ``"unrolled"``: through every round, as published (arXiv:2108.12659); memory grows with the rounds.
    - ``"implicit"``: by the implicit function theorem, IDKM (Jaffe et al. 2023, arXiv:2312.07759); memory does not.
    - ``"jacobian_free"``: with the identity for the inverse Jacobian, IDKM-JFB; time does not grow either.
    - ``"trained"``: words are parameters of their own, without soft k-means: soft-to-hard vector quantization
      (Agustsson et al. 2017, arXiv:1704.00648); ``jc.quantize.training.assignment_entropy`` is its penalty.

    Train ``jc.materialize(tree, key=key)``, with the step told by :func:`jcompress.prune.bayesian.at_step` where the
    temperature falls; ``jc.finalize`` then gives a ``Codebook`` of the nearest words. All assignments are held at once,
    so the memory is that of the weights times the clusters. What is sharded is gathered.

    Attributes:
      clusters: the number of words, at most 65,536.
      block: the lengths of a block along the last axes; () for single values.
      gradient: as above.
      iterations: rounds of soft k-means.
      temperatures: the first and the last, in standard deviations of the weights.
      steps: the training steps from the first to the last.

    Raises:
      ValueError: for a number outside its range, an unknown gradient, or a block that does not tile the array.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> w = {"w": jax.random.normal(jax.random.key(0), (8, 8))}
      >>> tree = jc.compress(w, jc.plan(w, [("w", jc.share.SoftKMeans(clusters=4))]))
      >>> train, held = jc.split(tree)
      >>> def loss(train):
      ...     return jc.materialize(jc.merge(train, held), key=jax.random.key(0))["w"].sum()
      >>> jax.grad(loss)(train)["w"].values.shape, jc.finalize(tree)["w"].clusters
      ((8, 8), 4)
    """

    clusters: int = 16
    block: tuple[int, ...] = ()
    gradient: Gradient = "implicit"
    iterations: int = 30
    temperatures: tuple[float, float] = (0.1, 0.01)
    steps: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.clusters <= 65_536 or self.iterations < 1 or self.steps < 1 or min(self.temperatures) <= 0:
            raise ValueError(
                f"SoftKMeans: found clusters={self.clusters}, iterations={self.iterations}, steps={self.steps}, "
                f"temperatures={self.temperatures}; expected positive ones, and at most 65536 clusters"
            )
        if self.gradient not in ("unrolled", "implicit", "jacobian_free", "trained"):
            raise ValueError(
                f"SoftKMeans: gradient={self.gradient!r} is unknown; use 'unrolled', 'implicit', 'jacobian_free' or "
                "'trained'"
            )

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the blocks do not tile the array."""
        check_block(path, self.block, shape, type(self).__name__)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> SoftCodebook:
        """The node for one array."""
        self.check(context.path, w.shape, w.dtype)
        step = jnp.asarray(0 if context.step is None else context.step, jnp.int32)
        empty = SoftCodebook(
            None, None, step, clusters=self.clusters, ndim=w.ndim, block=tuple(self.block), gradient=self.gradient,
            iterations=self.iterations, temperatures=self.temperatures, steps=self.steps,
        )  # fmt: skip
        return empty.project(jnp.copy(w), context.where)  # the input may be donated
