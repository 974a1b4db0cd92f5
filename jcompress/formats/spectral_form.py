"""Kernels written by the eigenvalues and eigenvectors of the transfer between two layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed
from jcompress.numeric import scaling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Spectral(Compressed):
    """A kernel by eigenvalues of its nodes, ``w[j, i] = (inputs[j] - outputs[i]) * vectors[j, i]``.

    The transfer of a layer from its n inputs to its m outputs is the lower block of ``Phi diag(inputs, outputs)
    Phi^-1`` with ``Phi = [[I, 0], [vectors', I]]``, whose inverse is ``2 I - Phi``; so these are eigenvalues, one a
    node, and the columns of Phi eigenvectors (Buffoni et al. 2021, arXiv:2108.00940). All three train. It is a form to
    train in, not a smaller one: prune the nodes of small eigenvalues, materialize, and cut.

    Attributes:
      inputs: float array (..., in): the eigenvalues of the nodes that are read; for a convolution (window..., in).
      outputs: float array (..., out): those of the nodes that are written. Leading axes are stacked layers.
      vectors: float array (..., in, out): the eigenvectors. Each of the three may be a node that stands for the array.
      window: how many axes of a convolution's window stand before its inputs.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.formats.Spectral(jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0, 2.0]), jnp.ones((2, 3)))
      >>> node.materialize().tolist()
      [[1.0, 0.0, -1.0], [2.0, 1.0, 0.0]]
    """

    inputs: Any
    outputs: Any
    vectors: Any
    window: int = dataclasses.field(default=0, metadata={"static": True})

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        inputs, outputs, vectors = (core.dense(x, key=key) for x in (self.inputs, self.outputs, self.vectors))
        middle = (1,) * (vectors.ndim - outputs.ndim)
        along = outputs.reshape(*outputs.shape[:-1], *middle, outputs.shape[-1])
        return (inputs[..., None] - along) * vectors

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Spectral:
        """The node whose output eigenvalues are the norms of the columns, and whose input eigenvalues are zero.

        Many eigenvalues and vectors give the same kernel; this choice makes the size of an eigenvalue that of all
        weights that write its node. ``where`` is not used, as the kernel is met exactly.
        """
        stack = w.ndim - 2 - self.window
        axes = tuple(range(stack, w.ndim - 1))
        unit = scaling.of(jnp.max(jnp.abs(w), axes, keepdims=True, initial=0))
        norms = unit.saturated(jnp.sqrt(jnp.sum(jnp.square(unit.divide(w)), axes, keepdims=True)))
        outputs = jnp.where(norms > 0, norms, 1).astype(w.dtype)
        vectors = -(unit.divide(w) / unit.divide(outputs)).astype(w.dtype)
        return Spectral(
            core.refitted(self.inputs, jnp.zeros(w.shape[:-1], w.dtype)),
            core.refitted(self.outputs, jnp.where(norms > 0, outputs, 0).reshape(*w.shape[:stack], w.shape[-1])),
            core.refitted(self.vectors, vectors),
            self.window,
        )
