"""Two layers with nothing between as one."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def merge_dense(
    first: tuple[jax.Array, jax.Array | None], second: tuple[jax.Array, jax.Array | None]
) -> tuple[jax.Array, jax.Array | None]:
    """One dense layer that equals two with nothing between: ``W = W1 W2`` and ``b = b1 W2 + b2``.

    Args:
      first: ``(kernel, bias)``: (in, mid), and (mid,) or None.
      second: ``(kernel, bias)``: (mid, out), and (out,) or None.

    Returns:
      ``(kernel, bias)``; the bias is None if both are.

    Raises:
      ValueError: if the widths between differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress import rewrite
      >>> w, b = rewrite.merge_dense((jnp.array([[2.0]]), jnp.array([1.0])), (jnp.array([[3.0]]), None))
      >>> w.tolist(), b.tolist()
      ([[6.0]], [3.0])
    """
    (w1, b1), (w2, b2) = first, second
    _check_widths("merge_dense", w1, w2)
    kernel = jnp.matmul(w1, w2, precision="highest")
    carried = None if b1 is None else jnp.matmul(b1, w2, precision="highest")
    return kernel, _added(carried, b2)


def merge_convolutions(
    first: tuple[jax.Array, jax.Array | None],
    second: tuple[jax.Array, jax.Array | None],
    strides: int | Sequence[int] = 1,
) -> tuple[jax.Array, jax.Array | None]:
    """One convolution that equals two with nothing between.

    As cross-correlations, ``K[u] = sum_{s + t * stride = u} K1[s] K2[t]`` over window positions: the window grows to
    ``k1 + stride (k2 - 1)``. The strides of the merged layer are the products of both. Exact for ``VALID`` padding in
    both; for any padding of the first if the second has a 1x1 window, and, where the first has a 1x1 window and no
    bias, for any padding of the second. Else borders differ. A wide window after a narrow middle may cost more than the
    two layers did.

    Args:
      first: ``(kernel, bias)``: (window..., in, mid), and (mid,) or None.
      second: ``(kernel, bias)``: (window..., mid, out), and (out,) or None.
      strides: of the first layer.

    Returns:
      ``(kernel, bias)``; the bias is None if both are.

    Raises:
      ValueError: if the numbers of window axes, the widths between, or the strides do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress import rewrite
      >>> kernel = jnp.array([1.0, 2.0]).reshape(2, 1, 1)
      >>> rewrite.merge_convolutions((kernel, None), (kernel, None))[0].ravel().tolist()
      [1.0, 4.0, 4.0]
    """
    (k1, b1), (k2, b2) = first, second
    _check_widths("merge_convolutions", k1, k2)
    n = k1.ndim - 2
    steps = (strides,) * n if isinstance(strides, int) else tuple(strides)
    if k2.ndim != k1.ndim or len(steps) != n or not 1 <= n <= 3:
        raise ValueError(
            f"merge_convolutions: found kernels of shapes {k1.shape} and {k2.shape} and strides {steps}, expected as "
            "many window axes, 1 to 3, of both, and a stride for each"
        )
    places = "DHW"[-n:]
    # A full convolution of the first kernel, as images of which the inputs are the batch, by the second spread out.
    merged = jax.lax.conv_general_dilated(
        jnp.moveaxis(k1, -2, 0),
        jnp.flip(k2, tuple(range(n))),
        (1,) * n,
        [(step * (size - 1),) * 2 for step, size in zip(steps, k2.shape[:n], strict=True)],
        rhs_dilation=steps,
        dimension_numbers=(f"N{places}C", f"{places}IO", f"N{places}C"),
        precision="highest",
    )
    carried = None if b1 is None else jnp.einsum("m,...mo->o", b1, k2, precision="highest")
    return jnp.moveaxis(merged, 0, -2), _added(carried, b2)


def _check_widths(name: str, first: jax.Array, second: jax.Array) -> None:
    if first.ndim < 2 or second.ndim < 2 or first.shape[-1] != second.shape[-2]:
        raise ValueError(
            f"{name}: found kernels of shapes {first.shape} and {second.shape}, expected the last axis of the first to "
            "be the one before the last of the second"
        )


def _added(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
