"""Convolutions in parts: depthwise and pointwise, in groups of channels, in recurrent splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jcompress.nn.kernels import Padding, Strides, array, biased, convolved, lecun_normal, param, share, sizes, zeros


def depthwise_separable(
    x: jax.Array,
    depthwise: jax.Array,
    pointwise: jax.Array,
    bias: jax.Array | None = None,
    strides: Strides = 1,
    padding: Padding = "SAME",
    between: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """A window of each channel alone, then a 1x1 product of all (MobileNet; Howard et al. 2017, arXiv:1704.04861).

    ``k k in m + in m out`` numbers, and as many multiply-adds a position: ``1 / out + 1 / (k k)`` of the dense layer
    for ``m = 1``. Without ``between`` it is a dense convolution whose kernels of each input are of rank ``m``.

    Args:
      x: features (..., positions..., inputs).
      depthwise: (window..., 1, inputs * m): ``m`` windows of each input, one input behind the other.
      pointwise: (1..., inputs * m, outputs).
      bias: (outputs,).
      strides: of the depthwise window.
      padding: as ``jax.lax`` takes it.
      between: acts on what the depthwise part gives, such as a ReLU.

    Returns:
      Features (..., positions..., outputs).

    Raises:
      ValueError: for shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> x, depthwise, pointwise = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 1, 4)), jnp.ones((1, 1, 4, 6))
      >>> jc.nn.depthwise_separable(x, depthwise, pointwise).shape
      (1, 8, 8, 6)
    """
    share("depthwise_separable", "depthwise features", depthwise.shape[-1], x.shape[-1])
    y = convolved("depthwise_separable", x, depthwise, strides, padding, x.shape[-1])
    y = y if between is None else between(y)
    return biased(convolved("depthwise_separable", y, pointwise), bias)


def depthwise_kernels(kernel: jax.Array, multiplier: int = 1) -> tuple[jax.Array, jax.Array]:
    """A dense kernel as the nearest depthwise and pointwise ones, in least squares.

    Of each input, the (window, outputs) matrix of its filters is cut to rank ``multiplier`` by its singular values
    (Eckart & Young 1936), each side with a root of them. With ``multiplier = min(window, outputs)`` nothing is lost.

    Args:
      kernel: (window..., inputs, outputs).
      multiplier: windows of each input.

    Returns:
      ``(depthwise, pointwise)`` for :func:`depthwise_separable`: (window..., 1, inputs * multiplier) and
      (1..., inputs * multiplier, outputs), of the kernel's dtype.

    Raises:
      ValueError: for a multiplier above the number of singular values, or below 1.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 6))
      >>> x = jax.random.normal(jax.random.key(1), (1, 8, 8, 4))
      >>> y = jc.nn.depthwise_separable(x, *jc.nn.depthwise_kernels(kernel, multiplier=6))
      >>> dense = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
      >>> bool(jnp.allclose(y, dense, atol=1e-4))
      True
    """
    *window, inputs, outputs = kernel.shape
    of_input = jnp.moveaxis(kernel.reshape(-1, inputs, outputs), 1, 0)
    wide = of_input.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    most = min(of_input.shape[1:])
    if not 1 <= multiplier <= most:
        raise ValueError(
            f"depthwise_kernels: found multiplier {multiplier} for a kernel {kernel.shape}; from 1 to {most}"
        )
    u, s, v = jnp.linalg.svd(wide, full_matrices=False)
    root = jnp.sqrt(s[:, :multiplier])
    depthwise = jnp.moveaxis(u[..., :multiplier] * root[:, None], 1, 0).reshape(*window, 1, -1)
    pointwise = (root[..., None] * v[:, :multiplier]).reshape(*(1 for _ in window), -1, outputs)
    return depthwise.astype(kernel.dtype), pointwise.astype(kernel.dtype)


class DepthwiseSeparable(nnx.Module):
    """A depthwise, then a pointwise convolution: :func:`depthwise_separable` (Howard et al. 2017, arXiv:1704.04861).

    Args:
      in_features: channels that come.
      out_features: channels that go.
      kernel_size: of the depthwise window.
      multiplier: depthwise windows of each input.
      strides: of the depthwise window.
      padding: as ``jax.lax`` takes it.
      between: acts on what the depthwise part gives, such as ``nnx.relu``.
      use_bias: whether the outputs have one.
      kernel_init: of ``depthwise`` (window..., 1, in_features * multiplier) and ``pointwise``.
      param_dtype: of the parameters.
      rngs: with a stream ``params``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> jc.nn.DepthwiseSeparable(3, 8, (3, 3), rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 3))).shape
      (2, 8, 8, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] = (3, 3),
        *,
        multiplier: int = 1,
        strides: Strides = 1,
        padding: Padding = "SAME",
        between: Callable[[jax.Array], jax.Array] | None = None,
        use_bias: bool = True,
        kernel_init: Callable[..., Any] = lecun_normal,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        window, width = sizes(kernel_size), in_features * multiplier
        ones = (1,) * len(window)
        self.depthwise = param(rngs, kernel_init, (*window, 1, width), param_dtype)
        self.pointwise = param(rngs, kernel_init, (*ones, width, out_features), param_dtype)
        self.bias = zeros(use_bias, out_features, param_dtype)
        self.strides, self.padding, self.between = strides, padding, between

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features of all inputs."""
        kernels = array(self.depthwise), array(self.pointwise), array(self.bias)
        return depthwise_separable(x, *kernels, self.strides, self.padding, self.between)


def channel_shuffle(x: jax.Array, groups: int) -> jax.Array:
    """Channels in an order that mixes groups: channel ``g n + i`` goes to ``i groups + g``.

    ShuffleNet (Zhang et al. 2018, arXiv:1707.01083). The inverse is ``channel_shuffle(x, channels // groups)``.

    Args:
      x: features (..., channels).
      groups: that divide the channels.

    Returns:
      The same features in another order.

    Raises:
      ValueError: if the groups do not divide the channels.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.channel_shuffle(jnp.arange(6), groups=2).tolist()
      [0, 3, 1, 4, 2, 5]
    """
    size = share("channel_shuffle", "channels", x.shape[-1], groups)
    return jnp.swapaxes(x.reshape(*x.shape[:-1], groups, size), -1, -2).reshape(x.shape)


def grouped_convolution(
    x: jax.Array,
    kernel: jax.Array,
    groups: int,
    bias: jax.Array | None = None,
    shuffle: bool = True,
    strides: Strides = 1,
    padding: Padding = "SAME",
) -> jax.Array:
    """A convolution within groups of channels, and the channels shuffled (ShuffleNet; Zhang et al. 2018, 1707.01083).

    ``k k in out / groups`` numbers, and as many multiply-adds a position. One group is a dense convolution.

    Args:
      x: features (..., positions..., inputs).
      kernel: (window..., inputs / groups, outputs).
      groups: that divide inputs and outputs.
      bias: (outputs,), before the shuffle.
      shuffle: whether :func:`channel_shuffle` follows, so that the next layer's groups read all of these.
      strides: of the window.
      padding: as ``jax.lax`` takes it.

    Returns:
      Features (..., positions..., outputs).

    Raises:
      ValueError: for groups that do not divide, or channels that do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.grouped_convolution(jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 2, 6)), groups=2).shape
      (1, 8, 8, 6)
    """
    share("grouped_convolution", "outputs", kernel.shape[-1], groups)
    y = biased(convolved("grouped_convolution", x, kernel, strides, padding, groups), bias)
    return channel_shuffle(y, groups) if shuffle else y


def grouped_kernel(kernel: jax.Array, groups: int) -> jax.Array:
    """The blocks on the diagonal of a dense kernel: what is left under a block mask.

    :func:`grouped_convolution` of it without a shuffle is the dense convolution with zeros where an input and an
    output are of different groups. Channels of a trained network are in no order: order them, or train on.

    Args:
      kernel: (window..., inputs, outputs).
      groups: that divide inputs and outputs.

    Returns:
      (window..., inputs / groups, outputs).

    Raises:
      ValueError: for groups that do not divide.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.grouped_kernel(jnp.arange(8.0).reshape(1, 1, 2, 4), groups=2)[0, 0].tolist()
      [[0.0, 1.0, 6.0, 7.0]]
    """
    inputs = share("grouped_kernel", "inputs", kernel.shape[-2], groups)
    outputs = share("grouped_kernel", "outputs", kernel.shape[-1], groups)
    blocks = [kernel[..., g * inputs : (g + 1) * inputs, g * outputs : (g + 1) * outputs] for g in range(groups)]
    return jnp.concatenate(blocks, axis=-1)


class GroupedConv(nnx.Module):
    """A convolution in groups of channels, then a shuffle: :func:`grouped_convolution` (Zhang et al. 2018, 1707.01083).

    Args:
      in_features: channels that come.
      out_features: channels that go.
      kernel_size: of the window.
      groups: that divide both.
      shuffle: whether the channels are shuffled.
      strides: of the window.
      padding: as ``jax.lax`` takes it.
      use_bias: whether the outputs have one.
      kernel_init: of the kernel (window..., in_features / groups, out_features).
      param_dtype: of the parameters.
      rngs: with a stream ``params``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> jc.nn.GroupedConv(4, 8, (3, 3), groups=2, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 4))).shape
      (2, 8, 8, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] = (3, 3),
        *,
        groups: int,
        shuffle: bool = True,
        strides: Strides = 1,
        padding: Padding = "SAME",
        use_bias: bool = True,
        kernel_init: Callable[..., Any] = lecun_normal,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        inputs = share("GroupedConv", "in_features", in_features, groups)
        share("GroupedConv", "out_features", out_features, groups)
        self.kernel = param(rngs, kernel_init, (*sizes(kernel_size), inputs, out_features), param_dtype)
        self.bias = zeros(use_bias, out_features, param_dtype)
        self.groups, self.shuffle, self.strides, self.padding = groups, shuffle, strides, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features of all groups."""
        kernel, bias = array(self.kernel), array(self.bias)
        return grouped_convolution(x, kernel, self.groups, bias, self.shuffle, self.strides, self.padding)


def split_recurrent(
    x: jax.Array,
    kernel: jax.Array,
    recurrent: jax.Array,
    splits: int,
    bias: jax.Array | None = None,
    gain: float | jax.Array = 0.5,
    decay: float | jax.Array = 0.5,
    strides: Strides = 1,
    padding: Padding = "SAME",
) -> jax.Array:
    """Channels in ``T`` splits, read one after the other by one small recurrent layer (CSR-Conv; Wu et al. 2023, WACV).

    ``y_1 = U x_1``, then with ``h_t = V y_{t-1}``: ``y_t = gain relu(U x_t + h_t) + (1 - decay) h_t``; what goes is
    ``[y_1, ..., y_T]``. ``k k (in + out) out / T**2`` numbers; a position takes ``k k in out / T`` multiply-adds with
    ``U`` and ``(T - 1) k k (out / T)**2`` with ``V``.

    Args:
      x: features (..., positions..., inputs).
      kernel: ``U`` (window..., inputs / T, outputs / T).
      recurrent: ``V`` (window..., outputs / T, outputs / T), of odd windows.
      splits: ``T`` above; with one it is a convolution.
      bias: (outputs / T,), added to ``U x_t``.
      gain: a number that may train.
      decay: a number that may train.
      strides: of ``U``.
      padding: of ``U``, as ``jax.lax`` takes it.

    Returns:
      Features (..., positions..., outputs).

    Raises:
      ValueError: for splits that do not divide, or channels that do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> x, kernel, recurrent = jnp.ones((1, 8, 8, 6)), jnp.ones((3, 3, 2, 4)), jnp.ones((3, 3, 4, 4))
      >>> jc.nn.split_recurrent(x, kernel, recurrent, splits=3).shape
      (1, 8, 8, 12)
    """
    size = share("split_recurrent", "channels", x.shape[-1], splits)
    parts = jnp.stack([x[..., t * size : (t + 1) * size] for t in range(splits)])
    read = biased(convolved("split_recurrent", parts, kernel, strides, padding), bias)
    found = [read[0]]
    for t in range(1, splits):
        h = convolved("split_recurrent", found[-1], recurrent)
        found.append(gain * jax.nn.relu(read[t] + h) + (1 - decay) * h)
    return jnp.concatenate(found, axis=-1)


class SplitRecurrentConv(nnx.Module):
    """A convolution of channels in splits with shared weights: :func:`split_recurrent` (CSR-Conv; Wu et al. 2023).

    Args:
      in_features: channels that come.
      out_features: channels that go.
      kernel_size: of the window, odd.
      splits: that divide both.
      strides: of the window.
      padding: as ``jax.lax`` takes it.
      use_bias: whether a split's outputs have one, the same for all splits.
      kernel_init: of ``kernel`` and ``recurrent``.
      param_dtype: of the parameters.
      rngs: with a stream ``params``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> jc.nn.SplitRecurrentConv(6, 9, (3, 3), splits=3, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 6))).shape
      (2, 8, 8, 9)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] = (3, 3),
        *,
        splits: int,
        strides: Strides = 1,
        padding: Padding = "SAME",
        use_bias: bool = True,
        kernel_init: Callable[..., Any] = lecun_normal,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        inputs = share("SplitRecurrentConv", "in_features", in_features, splits)
        outputs, window = share("SplitRecurrentConv", "out_features", out_features, splits), sizes(kernel_size)
        self.kernel = param(rngs, kernel_init, (*window, inputs, outputs), param_dtype)
        self.recurrent = param(rngs, kernel_init, (*window, outputs, outputs), param_dtype)
        self.bias = zeros(use_bias, outputs, param_dtype)
        self.gain, self.decay = (nnx.Param(jnp.asarray(0.5, param_dtype)) for _ in range(2))
        self.splits, self.strides, self.padding = splits, strides, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features of all splits."""
        kernels, bias = (array(self.kernel), array(self.recurrent)), array(self.bias)
        gains = array(self.gain), array(self.decay)
        return split_recurrent(x, *kernels, self.splits, bias, *gains, self.strides, self.padding)
