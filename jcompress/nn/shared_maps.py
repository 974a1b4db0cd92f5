"""Several features from one filter: by sign, by bias, by translation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jcompress.nn.kernels import Padding, Strides, array, biased, convolved, lecun_normal, param, share, sizes, zeros


def crelu(x: jax.Array) -> jax.Array:
    """Both signs of each feature: ``[relu(x), relu(-x)]`` (CReLU; Shang et al. 2016, arXiv:1603.05201).

    Args:
      x: features (..., channels).

    Returns:
      Features (..., 2 channels); the first half less the second is ``x``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.crelu(jnp.array([2.0, -3.0])).tolist()
      [2.0, 0.0, 0.0, 3.0]
    """
    return jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1)


class CReLUConv(nnx.Module):
    """Half the filters, and both signs of what they give: :func:`crelu` (Shang et al. 2016, arXiv:1603.05201).

    ``k k in out / 2`` numbers, and as many multiply-adds a position.

    Args:
      in_features: channels that come.
      out_features: channels after both signs were taken.
      kernel_size: of the window.
      strides: of the window.
      padding: as ``jax.lax`` takes it.
      use_bias: whether the filters have one.
      kernel_init: of the kernel (k, k, in_features, out_features / 2).
      param_dtype: of the parameters.
      rngs: with a stream ``params``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> jc.nn.CReLUConv(3, 8, (3, 3), rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 3))).shape
      (2, 8, 8, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        strides: Strides = 1,
        padding: Padding = "SAME",
        use_bias: bool = True,
        kernel_init: Callable[..., Any] = lecun_normal,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        filters = share("CReLUConv", "out_features", out_features, 2)
        self.kernel = param(rngs, kernel_init, (*sizes(kernel_size), in_features, filters), param_dtype)
        self.bias = zeros(use_bias, filters, param_dtype)
        self.strides, self.padding = strides, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features of both signs."""
        y = convolved("CReLUConv", x, array(self.kernel), self.strides, self.padding)
        return crelu(biased(y, array(self.bias)))


def multi_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Each feature past several thresholds: ``relu(x + d_k)`` (multi-bias; Li et al. 2016, arXiv:1604.00676).

    Args:
      x: features (..., channels), without a bias.
      bias: (copies, channels); with one copy it is a bias and a ReLU.

    Returns:
      Features (..., copies * channels), one copy behind the other.

    Raises:
      ValueError: for other channels.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.multi_bias(jnp.array([1.0]), jnp.array([[-2.0], [0.0], [2.0]])).tolist()
      [0.0, 1.0, 3.0]
    """
    if bias.ndim != 2 or x.shape[-1] != bias.shape[-1]:
        raise ValueError(f"multi_bias: found x {x.shape} and biases {bias.shape}, expected (copies, {x.shape[-1]})")
    return jnp.concatenate([jax.nn.relu(biased(x, bias[k])) for k in range(len(bias))], axis=-1)


class MultiBias(nnx.Module):
    """Biases and ReLU of several copies of each feature: :func:`multi_bias` (Li et al. 2016, arXiv:1604.00676).

    ``copies * in_features`` numbers; the convolution before it needs a filter for each of ``in_features`` only.

    Args:
      in_features: channels that come.
      copies: of each.
      bias_init: of the biases (copies, in_features); spread, so that copies differ.
      param_dtype: of the parameters.
      rngs: with a stream ``params``.

    Raises:
      ValueError: for fewer than one copy.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> jc.nn.MultiBias(4, 3, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 4))).shape
      (2, 8, 8, 12)
    """

    def __init__(
        self,
        in_features: int,
        copies: int,
        *,
        bias_init: Callable[..., Any] = nnx.initializers.normal(1.0),
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if copies < 1:
            raise ValueError(f"MultiBias: found {copies} copies, expected one at least")
        self.bias = param(rngs, bias_init, (copies, in_features), param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Copies of the features."""
        return multi_bias(x, array(self.bias))


def doubly_convolution(
    x: jax.Array,
    kernel: jax.Array,
    window: int = 3,
    bias: jax.Array | None = None,
    pool: int = 1,
    strides: Strides = 1,
    padding: Padding = "SAME",
) -> jax.Array:
    """Convolve with all translations of a smaller window within meta filters (Zhai et al. 2016, arXiv:1610.09716).

    A meta filter ``z x z`` holds ``(z - k + 1)**2`` filters ``k x k`` that overlap. Its ``z z in`` numbers give as many
    features, or the maximum over ``pool x pool`` translations of them.

    Args:
      x: features (..., height, width, inputs).
      kernel: meta filters (z, z, inputs, filters).
      window: ``k`` above.
      bias: (filters * (z - k + 1)**2 / pool**2,), added after pooling.
      pool: side of the squares of translations of which the largest is taken.
      strides: of the window.
      padding: as ``jax.lax`` takes it.

    Returns:
      Features (..., height, width, translations * filters), the filters last.

    Raises:
      ValueError: for a window larger than the meta filter, or a pool that does not divide the translations.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.doubly_convolution(jnp.ones((1, 8, 8, 2)), jnp.ones((4, 4, 2, 5)), window=3).shape
      (1, 8, 8, 20)
    """
    moves = kernel.shape[0] - window + 1
    if kernel.shape[0] != kernel.shape[1] or moves < 1 or window < 1:
        raise ValueError(f"doubly_convolution: found meta filters {kernel.shape} for a window of {window}")
    parts = share("doubly_convolution", "translations along a side", moves, pool)
    places = [(i, j) for i in range(moves) for j in range(moves)]
    filters = [kernel[i : i + window, j : j + window] for i, j in places]
    y = convolved("doubly_convolution", x, jnp.concatenate(filters, axis=-1), strides, padding)
    if pool > 1:
        y = y.reshape(*y.shape[:-1], parts, pool, parts, pool, -1).max((-4, -2))
        y = y.reshape(*y.shape[:-3], -1)
    return biased(y, bias)


class DoublyConv(nnx.Module):
    """Filters that are windows of larger ones: :func:`doubly_convolution` (Zhai et al. 2016, arXiv:1610.09716).

    ``z z in f`` numbers for ``f (z - k + 1)**2 / pool**2`` features, where a dense layer keeps ``k k in`` a feature;
    the multiply-adds are those of the dense layer, before pooling.

    Args:
      in_features: channels that come.
      out_features: channels that go; ``(meta_size - kernel_size + 1)**2 / pool**2`` must divide them.
      kernel_size: side of the window.
      meta_size: side ``z`` of the meta filters.
      pool: side of the squares of translations of which the largest is taken.
      strides: of the window.
      padding: as ``jax.lax`` takes it.
      use_bias: whether each feature has one.
      kernel_init: of the kernel (z, z, in_features, filters).
      param_dtype: of the parameters.
      rngs: with a stream ``params``.

    Raises:
      ValueError: for sizes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> jc.nn.DoublyConv(3, 8, 3, meta_size=4, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 3))).shape
      (2, 8, 8, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 3,
        *,
        meta_size: int = 4,
        pool: int = 1,
        strides: Strides = 1,
        padding: Padding = "SAME",
        use_bias: bool = True,
        kernel_init: Callable[..., Any] = lecun_normal,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if meta_size < kernel_size:
            raise ValueError(f"DoublyConv: found meta_size {meta_size} for a window of {kernel_size}, expected no less")
        moves = share("DoublyConv", "translations along a side", meta_size - kernel_size + 1, pool)
        filters = share("DoublyConv", "out_features", out_features, moves**2)
        self.kernel = param(rngs, kernel_init, (meta_size, meta_size, in_features, filters), param_dtype)
        self.bias = zeros(use_bias, out_features, param_dtype)
        self.window, self.pool, self.strides, self.padding = kernel_size, pool, strides, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features of all translations."""
        kernel, bias = array(self.kernel), array(self.bias)
        return doubly_convolution(x, kernel, self.window, bias, self.pool, self.strides, self.padding)
