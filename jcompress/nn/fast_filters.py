"""The same convolution with fewer products: by minimal filtering, and by Fourier transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jcompress.nn.kernels import Padding, array, biased, lecun_normal, param, sizes, zeros


def winograd_convolution(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, padding: Padding = "SAME"
) -> jax.Array:
    """A 3x3 convolution by minimal filtering, F(2x2, 3x3) (Lavin & Gray 2016, arXiv:1509.09308).

    ``Y = A^T [(G g G^T) * (B^T d B)] A`` of tiles 4x4 that overlap by two: 16 products where 36 would be, four outputs
    a tile, so ``4 in out`` multiply-adds a position instead of ``9 in out``. What is left is additions. It saves
    products, no storage, and time where they are what takes it.

    Args:
      x: features (..., height, width, inputs).
      kernel: (3, 3, inputs, outputs).
      bias: (outputs,).
      padding: as ``jax.lax`` takes it.

    Returns:
      Features (..., height, width, outputs), those of the dense convolution up to rounding.

    Raises:
      ValueError: for another window, or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.winograd_convolution(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)))[0, :, :, 0].tolist()[0]
      [4.0, 6.0, 6.0, 4.0]
    """
    if kernel.shape[:2] != (3, 3):
        raise ValueError(f"winograd_convolution: found a kernel {kernel.shape}, expected (3, 3, inputs, outputs)")
    front, padded, (h, w) = _padded("winograd_convolution", x, kernel, padding)
    rows, columns = -(-h // 2), -(-w // 2)
    padded = jnp.pad(padded, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
    d = [[padded[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2] for j in range(4)] for i in range(4)]
    u = jnp.stack([jnp.stack(row) for row in _both(_of_kernel, [[kernel[i, j] for j in range(3)] for i in range(3)])])
    v = jnp.stack([jnp.stack(row) for row in _both(_of_input, d)])
    m = jnp.einsum("ijnhwc,ijco->ijnhwo", v, u)
    y = jnp.stack([jnp.stack(row, 3) for row in _both(_of_output, [[m[i, j] for j in range(4)] for i in range(4)])], 2)
    y = y.reshape(y.shape[0], 2 * rows, 2 * columns, -1)[:, :h, :w]
    return biased(y.reshape(*front, *y.shape[1:]), bias)


def _both(of: Callable[[list[Any]], list[Any]], grid: list[list[Any]]) -> list[list[Any]]:
    """A transform along rows, then along columns."""
    along = [of(row) for row in grid]
    return [list(row) for row in zip(*(of(list(column)) for column in zip(*along, strict=True)), strict=True)]


def _of_kernel(g: list[Any]) -> list[Any]:
    return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _of_input(d: list[Any]) -> list[Any]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _of_output(m: list[Any]) -> list[Any]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def fft_convolution(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, padding: Padding = "SAME"
) -> jax.Array:
    """A convolution as a product of Fourier transforms (Mathieu et al. 2013, arXiv:1312.5851).

    ``y = F^-1 [sum_c F(x_c) conj F(k_c)]`` over the padded image: one complex product a frequency whatever the window,
    so it pays for large ones. It saves products, no storage.

    Args:
      x: features (..., height, width, inputs).
      kernel: (window, window, inputs, outputs).
      bias: (outputs,).
      padding: as ``jax.lax`` takes it.

    Returns:
      Features (..., height, width, outputs), those of the dense convolution up to rounding, in its dtype.

    Raises:
      ValueError: for shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> y = jc.nn.fft_convolution(jnp.ones((1, 8, 8, 1)), jnp.ones((5, 5, 1, 1)), padding="VALID")
      >>> y.shape, round(float(y[0, 0, 0, 0]), 3)
      ((1, 4, 4, 1), 25.0)
    """
    kind = jnp.result_type(x, kernel)
    front, padded, (h, w) = _padded("fft_convolution", x, kernel, padding)
    size, wide = padded.shape[1:3], jnp.promote_types(kind, jnp.float32)
    a = jnp.fft.rfft2(padded.astype(wide), axes=(1, 2))
    b = jnp.fft.rfft2(kernel.astype(wide), s=size, axes=(0, 1))
    y = jnp.fft.irfft2(jnp.einsum("nhwc,hwco->nhwo", a, jnp.conj(b)), s=size, axes=(1, 2))[:, :h, :w]
    return biased(y.reshape(*front, *y.shape[1:]).astype(kind), bias)


def _padded(name: str, x: jax.Array, kernel: jax.Array, padding: Padding) -> tuple[Any, jax.Array, tuple[int, int]]:
    """What stands before the image, the image with its padding, and the size of the outputs."""
    if kernel.ndim != 4 or x.ndim < 3 or x.shape[-1] != kernel.shape[-2]:
        expected = "(..., height, width, inputs) and (window, window, inputs, outputs)"
        raise ValueError(f"{name}: found x {x.shape} and a kernel {kernel.shape}, expected {expected}")
    image, window = x.shape[-3:-1], kernel.shape[:2]
    pads = jax.lax.padtype_to_pads(image, window, (1, 1), padding) if isinstance(padding, str) else list(padding)
    flat = x.reshape(-1, *x.shape[-3:])
    padded = jnp.pad(flat, ((0, 0), *pads, (0, 0)))
    h, w = (n - k + 1 for n, k in zip(padded.shape[1:3], window, strict=True))
    if h < 1 or w < 1:
        raise ValueError(f"{name}: found an image of {image} with padding {pads}, less than a window of {window}")
    return x.shape[:-3], padded, (h, w)


class WinogradConv(nnx.Module):
    """A 3x3 convolution by minimal filtering: :func:`winograd_convolution` (Lavin & Gray 2016, arXiv:1509.09308).

    Its parameters are those of ``nnx.Conv``, so the state of one fits the other.

    Args:
      in_features: channels that come.
      out_features: channels that go.
      kernel_size: (3, 3).
      padding: as ``jax.lax`` takes it.
      use_bias: whether the outputs have one.
      kernel_init: of the kernel (3, 3, in_features, out_features).
      param_dtype: of the parameters.
      rngs: with a stream ``params``.

    Raises:
      ValueError: for another window.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> jc.nn.WinogradConv(3, 8, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 3))).shape
      (2, 8, 8, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] = (3, 3),
        *,
        padding: Padding = "SAME",
        use_bias: bool = True,
        kernel_init: Callable[..., Any] = lecun_normal,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if sizes(kernel_size) != (3, 3):
            raise ValueError(f"WinogradConv: found a window {kernel_size}, expected (3, 3)")
        self.kernel = param(rngs, kernel_init, (3, 3, in_features, out_features), param_dtype)
        self.bias = zeros(use_bias, out_features, param_dtype)
        self.padding = padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """What the dense convolution gives."""
        return winograd_convolution(x, array(self.kernel), array(self.bias), self.padding)


class FFTConv(nnx.Module):
    """A convolution by Fourier transforms: :func:`fft_convolution` (Mathieu et al. 2013, arXiv:1312.5851).

    Its parameters are those of ``nnx.Conv``, so the state of one fits the other.

    Args:
      in_features: channels that come.
      out_features: channels that go.
      kernel_size: of the window.
      padding: as ``jax.lax`` takes it.
      use_bias: whether the outputs have one.
      kernel_init: of the kernel (window, window, in_features, out_features).
      param_dtype: of the parameters.
      rngs: with a stream ``params``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> jc.nn.FFTConv(3, 8, (7, 7), rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 3))).shape
      (2, 8, 8, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *,
        padding: Padding = "SAME",
        use_bias: bool = True,
        kernel_init: Callable[..., Any] = lecun_normal,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = param(rngs, kernel_init, (*sizes(kernel_size), in_features, out_features), param_dtype)
        self.bias = zeros(use_bias, out_features, param_dtype)
        self.padding = padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """What the dense convolution gives."""
        return fft_convolution(x, array(self.kernel), array(self.bias), self.padding)
