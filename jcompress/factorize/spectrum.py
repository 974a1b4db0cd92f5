"""Kernels in their spectral form."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jcompress.core import Context, Method
from jcompress.formats import Spectral


@dataclasses.dataclass(frozen=True)
class Spectrum(Method):
    """Write a kernel by the eigenvalues of its nodes and the eigenvectors between them, to train it in that form.

    ``w[j, i] = (inputs[j] - outputs[i]) * vectors[j, i]``, at first with ``inputs`` zero and ``outputs`` the norms of
    the weights that write each node, which is the kernel as it was (Buffoni et al. 2021, arXiv:2108.00940). Either
    train the eigenvalues alone, on frozen random vectors in all layers and with biases held (``optax.multi_transform``
    holds them; hold ``inputs`` at zero in the layers whose outputs are to be ranked), prune, and train what is left; or
    train all and prune then. A small penalty on the eigenvalues, ``sum |outputs|``, parts those that are used from the
    others. The nodes of the smallest go: :func:`jcompress.prune.structured.spectral`. Until then no byte is won. A
    convolution kernel counts as the (window and input) x output matrix.

    Raises:
      ValueError: for an array of fewer than two axes.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jnp.array([[3.0, 0.0], [4.0, 2.0]])
      >>> node = jc.factorize.Spectrum()(w)
      >>> node.outputs.tolist(), bool(jnp.allclose(node.materialize(), w))
      ([5.0, 2.0], True)
    """

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the array is no matrix."""
        if len(shape) < 2:
            raise ValueError(f"{path}: Spectrum needs a matrix, found shape {shape}; keep it dense")

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Spectral:
        """The node for one array."""
        self.check(context.path, w.shape, w.dtype)
        return Spectral(None, None, None, window=w.ndim - 2).project(w)
