"""Dynamic capacity: a coarse network looks everywhere, a fine one where it matters (Almahairi et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jcompress.nn.exits import exit_entropy
from jcompress.nn.kernels import share

Layers = Callable[[jax.Array], jax.Array]


def entropy_saliency(top: Layers, features: jax.Array) -> jax.Array:
    """How much each position moves the entropy of the answer (Almahairi et al. 2016, arXiv:1511.07838).

    ``M_ij = || d H(softmax(top(c))) / d c_ij ||``.

    Args:
      top: from features to logits (batch, classes).
      features: ``c`` above, (batch, height, width, channels).

    Returns:
      (batch, height, width), not negative.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> top = lambda c: c[:, 0, 0]
      >>> found = jc.nn.entropy_saliency(top, jnp.ones((1, 2, 2, 3)).at[..., 0].set(3.0))[0]
      >>> round(float(found[0, 0]), 2), float(found[1, 1])
      (0.41, 0.0)
    """
    slope = jax.grad(lambda c: exit_entropy(top(c)).sum())(features)
    return jnp.sqrt(jnp.sum(jnp.square(slope.astype(jnp.float32)), axis=-1))


def dynamic_capacity(x: jax.Array, coarse: Layers, fine: Layers, top: Layers, k: int) -> tuple[jax.Array, jax.Array]:
    """Fine features where the coarse answer depends on them most (Almahairi et al. 2016, arXiv:1511.07838).

    ``coarse`` gives features of all patches, :func:`entropy_saliency` says which ``k`` matter, ``fine`` gives those of
    these patches, and ``top`` reads both. With all patches it is the fine network. The paper adds the squared
    distance of the two networks' features at the chosen patches to the loss.

    Args:
      x: images (batch, height * p, width * p, channels).
      coarse: to features (batch, height, width, c).
      fine: from patches (n, p, p, channels) to features (n, c).
      top: from features (batch, height, width, c) to logits.
      k: patches of each image that the fine network sees.

    Returns:
      ``(logits, chosen)``: (batch, classes) and integers (batch, k), the patches row by row.

    Raises:
      ValueError: for more patches than there are, or images that patches do not divide.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> mean, top = lambda x: x.reshape(-1, 2, 4, 2, 4, 1).mean((2, 4)), lambda c: c.reshape(-1, 4)
      >>> logits, chosen = jc.nn.dynamic_capacity(jnp.ones((1, 8, 8, 1)), mean, lambda p: p[:, 0, 0], top, k=3)
      >>> logits.shape, chosen.shape
      ((1, 4), (1, 3))
    """
    features = coarse(x)
    batch, height, width, channels = features.shape
    if not 1 <= k <= height * width:
        raise ValueError(f"dynamic_capacity: found k {k} of {height * width} patches, expected 1 to {height * width}")
    rows = share("dynamic_capacity", "pixels", x.shape[1], height)
    columns = share("dynamic_capacity", "pixels", x.shape[2], width)
    saliency = jax.lax.stop_gradient(entropy_saliency(top, features)).reshape(batch, -1)
    chosen = jax.lax.top_k(saliency, k)[1]
    patches = jnp.swapaxes(x.reshape(batch, height, rows, width, columns, -1), 2, 3)
    at = jnp.arange(batch)[:, None]
    seen = patches.reshape(batch, height * width, rows, columns, -1)[at, chosen]
    better = fine(seen.reshape(batch * k, *seen.shape[2:])).reshape(batch, k, channels)
    joined = features.reshape(batch, -1, channels).at[at, chosen].set(better.astype(features.dtype))
    return top(joined.reshape(features.shape)), chosen


class DynamicCapacity(nnx.Module):
    """A coarse and a fine network under one top: :func:`dynamic_capacity` (Almahairi et al. 2016, arXiv:1511.07838).

    Args:
      coarse: a module or function from images to features (batch, height, width, c).
      fine: from patches (n, p, p, channels) to features (n, c).
      top: from features to logits.
      k: patches of each image that the fine network sees.
      rngs: not used.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> coarse = nnx.Conv(1, 3, (4, 4), strides=4, padding="VALID", rngs=rngs)
      >>> flat = lambda x: x.reshape(len(x), -1)
      >>> fine, top = (nnx.Sequential(flat, nnx.Linear(n, m, rngs=rngs)) for n, m in ((16, 3), (12, 5)))
      >>> net = jc.nn.DynamicCapacity(coarse, fine, top, k=2)
      >>> net(jnp.ones((2, 8, 8, 1)))[0].shape
      (2, 5)
    """

    def __init__(self, coarse: Layers, fine: Layers, top: Layers, k: int, *, rngs: nnx.Rngs | None = None) -> None:
        self.coarse, self.fine, self.top, self.k = coarse, fine, top, k

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``(logits, chosen patches)``."""
        return dynamic_capacity(x, self.coarse, self.fine, self.top, self.k)
