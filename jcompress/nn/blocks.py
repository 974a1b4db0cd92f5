"""Compact blocks: Fire, squeeze and excitation, inverted residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jcompress.nn.kernels import Padding, Strides, Weights, biased, convolved, share, sizes, weights


def fire(x: jax.Array, squeeze: Weights, narrow: Weights, wide: Weights) -> jax.Array:
    """Squeeze the channels, then expand them by 1x1 and larger windows (SqueezeNet; Iandola et al. 2016, 1602.07360).

    With ``s`` squeezed features, half of the outputs by 1x1 and half by ``k k`` windows: ``in s + s out (1 + k k) / 2``
    numbers without biases, and as many multiply-adds a position.

    Args:
      x: features (..., positions..., inputs).
      squeeze: kernel (1..., inputs, s) and bias (s,), or None for no bias.
      narrow: kernel (1..., s, outputs of 1x1 windows) and bias.
      wide: kernel (window..., s, outputs of larger windows) and bias.

    Returns:
      Features (..., positions..., outputs), those of the narrow windows first.

    Raises:
      ValueError: for shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> s, n, w = (jnp.ones(shape) for shape in ((1, 1, 8, 2), (1, 1, 2, 4), (3, 3, 2, 4)))
      >>> jc.nn.fire(jnp.ones((1, 8, 8, 8)), (s, None), (n, None), (w, None)).shape
      (1, 8, 8, 8)
    """
    y = jax.nn.relu(_affine("fire", x, squeeze))
    return jax.nn.relu(jnp.concatenate([_affine("fire", y, narrow), _affine("fire", y, wide)], axis=-1))


def _affine(name: str, x: jax.Array, of: Weights, **options: Any) -> jax.Array:
    kernel, bias = of
    return biased(convolved(name, x, kernel, **options), bias)


class Fire(nnx.Module):
    """Squeeze, then expand: :func:`fire` (Iandola et al. 2016, arXiv:1602.07360).

    Args:
      in_features: channels that come.
      out_features: channels that go, half of them by 1x1 windows.
      squeeze_features: between, fewer than either.
      kernel_size: of the larger windows.
      use_bias: whether the three layers have biases.
      param_dtype: of the parameters.
      rngs: with a stream ``params``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> jc.nn.Fire(8, 8, 2, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 8))).shape
      (2, 8, 8, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        squeeze_features: int,
        kernel_size: int | Sequence[int] = (3, 3),
        *,
        use_bias: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        half, window = share("Fire", "out_features", out_features, 2), sizes(kernel_size)
        options: dict[str, Any] = {"use_bias": use_bias, "param_dtype": param_dtype, "rngs": rngs}
        one = (1,) * len(window)
        self.squeeze = nnx.Conv(in_features, squeeze_features, one, **options)
        self.narrow = nnx.Conv(squeeze_features, half, one, **options)
        self.wide = nnx.Conv(squeeze_features, half, window, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features of both windows."""
        return fire(x, *map(weights, (self.squeeze, self.narrow, self.wide)))


def squeeze_excite(x: jax.Array, squeeze: Weights, excite: Weights) -> jax.Array:
    """Channels scaled by what their means say: ``x sigmoid(W_2 relu(W_1 mean x))`` (Hu et al. 2018, arXiv:1709.01507).

    ``2 c s`` numbers without biases, and as many multiply-adds an example, not a position.

    Args:
      x: features (batch, positions..., channels).
      squeeze: kernel (channels, s) and bias (s,), or None for no bias.
      excite: kernel (s, channels) and bias.

    Returns:
      Features of the shape of ``x``.

    Raises:
      ValueError: for features without positions, or other channels.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> squeeze, excite = (jnp.zeros((4, 2)), None), (jnp.zeros((2, 4)), None)
      >>> jc.nn.squeeze_excite(jnp.ones((1, 8, 8, 4)), squeeze, excite)[0, 0, 0].tolist()
      [0.5, 0.5, 0.5, 0.5]
    """
    if x.ndim < 3 or x.shape[-1] != squeeze[0].shape[0] or x.shape[-1] != excite[0].shape[-1]:
        expected = f"(batch, positions..., {squeeze[0].shape[0]})"
        raise ValueError(f"squeeze_excite: found x {x.shape}, excited {excite[0].shape}, expected x {expected}")
    mean = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))
    y = biased(jax.nn.relu(biased(mean @ squeeze[0], squeeze[1])) @ excite[0], excite[1])
    return x * jax.nn.sigmoid(y).reshape(x.shape[0], *(1 for _ in x.shape[1:-1]), -1)


class SqueezeExcite(nnx.Module):
    """Attention over channels: :func:`squeeze_excite` (Hu et al. 2018, arXiv:1709.01507).

    Args:
      in_features: channels, which stay as many.
      squeeze_features: between.
      use_bias: whether both layers have biases.
      param_dtype: of the parameters.
      rngs: with a stream ``params``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> jc.nn.SqueezeExcite(8, 2, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 8))).shape
      (2, 8, 8, 8)
    """

    def __init__(
        self,
        in_features: int,
        squeeze_features: int,
        *,
        use_bias: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {"use_bias": use_bias, "param_dtype": param_dtype, "rngs": rngs}
        self.squeeze = nnx.Linear(in_features, squeeze_features, **options)
        self.excite = nnx.Linear(squeeze_features, in_features, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Scaled features."""
        return squeeze_excite(x, weights(self.squeeze), weights(self.excite))


def inverted_residual(
    x: jax.Array,
    expand: Weights,
    depthwise: Weights,
    contract: Weights,
    strides: Strides = 1,
    padding: Padding = "SAME",
) -> jax.Array:
    """Expand, a depthwise window, contract without a nonlinearity (MobileNetV2; Sandler et al. 2018, 1801.04381).

    With ``e`` features between: ``in e + k k e + e out`` numbers without biases, and as many multiply-adds a position
    where strides are 1. What comes is added where its shape is that of what goes. Batch norms of the paper are folded
    into kernels and biases (``jc.rewrite.fold_batch_norms``).

    Args:
      x: features (..., positions..., inputs).
      expand: kernel (1..., inputs, e) and bias (e,), or None for no bias.
      depthwise: kernel (window..., 1, e) and bias.
      contract: kernel (1..., e, outputs) and bias.
      strides: of the depthwise window.
      padding: of the depthwise window, as ``jax.lax`` takes it.

    Returns:
      Features (..., positions..., outputs).

    Raises:
      ValueError: for shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> e, d, c = (jnp.zeros(shape) for shape in ((1, 1, 4, 24), (3, 3, 1, 24), (1, 1, 24, 4)))
      >>> float(jc.nn.inverted_residual(jnp.ones((1, 8, 8, 4)), (e, None), (d, None), (c, None)).mean())
      1.0
    """
    y = jax.nn.relu6(_affine("inverted_residual", x, expand))
    options = {"strides": strides, "padding": padding, "groups": y.shape[-1]}
    y = jax.nn.relu6(_affine("inverted_residual", y, depthwise, **options))
    y = _affine("inverted_residual", y, contract)
    return x + y if x.shape == y.shape else y


class InvertedResidual(nnx.Module):
    """The block of MobileNetV2: :func:`inverted_residual` (Sandler et al. 2018, arXiv:1801.04381).

    Args:
      in_features: channels that come.
      out_features: channels that go.
      expansion: features between, as a multiple of ``in_features``.
      kernel_size: of the depthwise window.
      strides: of the depthwise window.
      padding: as ``jax.lax`` takes it.
      use_bias: whether the three layers have biases.
      param_dtype: of the parameters.
      rngs: with a stream ``params``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> jc.nn.InvertedResidual(4, 8, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 4))).shape
      (2, 8, 8, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        expansion: int = 6,
        kernel_size: int | Sequence[int] = (3, 3),
        *,
        strides: Strides = 1,
        padding: Padding = "SAME",
        use_bias: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        window, width = sizes(kernel_size), expansion * in_features
        options: dict[str, Any] = {"use_bias": use_bias, "param_dtype": param_dtype, "rngs": rngs}
        one = (1,) * len(window)
        self.expand = nnx.Conv(in_features, width, one, **options)
        self.depthwise = nnx.Conv(width, width, window, feature_group_count=width, **options)
        self.contract = nnx.Conv(width, out_features, one, **options)
        self.strides, self.padding = strides, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features, with what came where it fits."""
        expand, depthwise, contract = map(weights, (self.expand, self.depthwise, self.contract))
        return inverted_residual(x, expand, depthwise, contract, self.strides, self.padding)
