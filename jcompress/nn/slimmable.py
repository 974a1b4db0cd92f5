"""One network at several widths: the first channels of each layer, and statistics for each width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jcompress.nn.kernels import Padding, Strides, array, biased, convolved, lecun_normal, listed, param, sizes, zeros


def slim_channels(features: int, width: float) -> int:
    """The channels of a width: ``round(width * features)``, at least 1 (slimmable; Yu et al. 2018, 1812.08928).

    Args:
      features: of the whole layer.
      width: a share in (0, 1].

    Returns:
      Their number.

    Raises:
      ValueError: for another width.

    Example:
      >>> import jcompress as jc
      >>> jc.nn.slim_channels(16, 0.25)
      4
    """
    if not 0 < width <= 1:
        raise ValueError(f"slim_channels: found width {width}, expected a share in (0, 1]")
    return max(round(width * features), 1)


def slim_convolution(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    width: float = 1.0,
    strides: Strides = 1,
    padding: Padding = "SAME",
) -> jax.Array:
    """A convolution by the first filters, of as many inputs as come (slimmable networks; Yu et al. 2018, 1812.08928).

    Args:
      x: features (..., positions..., inputs), at most those of the kernel.
      kernel: (window..., inputs, outputs) of the whole width.
      bias: (outputs,).
      width: share of the outputs.
      strides: of the window.
      padding: as ``jax.lax`` takes it.

    Returns:
      Features (..., positions..., ``slim_channels(outputs, width)``).

    Raises:
      ValueError: for more inputs than the kernel has, or another width.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.slim_convolution(jnp.ones((1, 8, 8, 2)), jnp.ones((3, 3, 4, 8)), width=0.5).shape
      (1, 8, 8, 4)
    """
    kernel, bias = _slim("slim_convolution", x, kernel, bias, width)
    return biased(convolved("slim_convolution", x, kernel, strides, padding), bias)


def _slim(name: str, x: Any, kernel: Any, bias: Any, width: float) -> tuple[Any, Any]:
    if x.shape[-1] > kernel.shape[-2]:
        raise ValueError(f"{name}: found x {x.shape} and a kernel {kernel.shape}, expected at most its inputs")
    outputs = slim_channels(kernel.shape[-1], width)
    return kernel[..., : x.shape[-1], :outputs], None if bias is None else bias[:outputs]


class SlimmableConv(nnx.Module):
    """A convolution at any width: :func:`slim_convolution` (Yu et al. 2018, arXiv:1812.08928).

    A window of ``()`` is a dense layer. At width ``w`` between layers of width ``w`` it costs ``w**2`` of the whole.

    Args:
      in_features: channels of the whole width that come; as many as come are read.
      out_features: channels of the whole width that go.
      kernel_size: of the window.
      strides: of the window.
      padding: as ``jax.lax`` takes it.
      use_bias: whether the outputs have one.
      kernel_init: of the kernel (window..., in_features, out_features).
      param_dtype: of the parameters.
      rngs: with a stream ``params``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> jc.nn.SlimmableConv(3, 8, (3, 3), rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 3)), width=0.5).shape
      (2, 8, 8, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] = (3, 3),
        *,
        strides: Strides = 1,
        padding: Padding = "SAME",
        use_bias: bool = True,
        kernel_init: Callable[..., Any] = lecun_normal,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = param(rngs, kernel_init, (*sizes(kernel_size), in_features, out_features), param_dtype)
        self.bias = zeros(use_bias, out_features, param_dtype)
        self.strides, self.padding = strides, padding

    def __call__(self, x: jax.Array, width: float = 1.0) -> jax.Array:
        """Features of a width."""
        kernel, bias = array(self.kernel), array(self.bias)
        if kernel.ndim == 2:
            kernel, bias = _slim("SlimmableConv", x, kernel, bias, width)
            return biased(x @ kernel, bias)
        return slim_convolution(x, kernel, bias, width, self.strides, self.padding)


class SlimmableBatchNorm(nnx.Module):
    """Batch norms, one for each width, with statistics and scales of its own (Yu et al. 2018, arXiv:1812.08928).

    Means and variances of features differ from width to width; one norm for all of them is right for none.

    Args:
      features: channels of the whole width.
      widths: shares in (0, 1] that the network runs at.
      options: of ``nnx.BatchNorm``, such as ``use_running_average``.
      rngs: with a stream ``params``.

    Raises:
      ValueError: for no width, or one that it was not made for.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> norm = jc.nn.SlimmableBatchNorm(8, widths=(0.5, 1.0), rngs=nnx.Rngs(0))
      >>> norm(jnp.ones((2, 4)), width=0.5).shape
      (2, 4)
    """

    def __init__(self, features: int, widths: Sequence[float], *, rngs: nnx.Rngs, **options: Any) -> None:
        if not len(widths):
            raise ValueError("SlimmableBatchNorm: found no width, expected one at least")
        self.widths = tuple(map(float, widths))
        self.norms = listed([nnx.BatchNorm(slim_channels(features, w), rngs=rngs, **options) for w in widths])

    def __call__(self, x: jax.Array, width: float = 1.0, **options: Any) -> jax.Array:
        """Normed features of a width; ``use_running_average`` and other options as ``nnx.BatchNorm`` takes them."""
        if float(width) not in self.widths:
            raise ValueError(f"SlimmableBatchNorm: found width {width}, it has statistics of {self.widths}")
        return self.norms[self.widths.index(float(width))](x, **options)
