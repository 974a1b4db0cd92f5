"""What the filters share: one convolution that names what does not fit, and parameters to begin with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Padding = str | Sequence[tuple[int, int]]
Strides = int | Sequence[int]
Weights = tuple[jax.Array, jax.Array | None]

lecun_normal = nnx.initializers.lecun_normal()


def convolved(
    name: str, x: jax.Array, kernel: jax.Array, strides: Strides = 1, padding: Padding = "SAME", groups: int = 1
) -> jax.Array:
    """A convolution of (..., positions..., channels) with a kernel (window..., inputs, outputs), any axes in front.

    Raises:
      ValueError: for shapes that do not fit.
    """
    n = kernel.ndim - 2
    if x.ndim < n + 1 or x.shape[-1] != groups * kernel.shape[-2]:
        raise ValueError(
            f"{name}: found x {x.shape} and a kernel {kernel.shape}, expected x (..., {n} axes of positions, "
            f"{groups * kernel.shape[-2]} channels)"
        )
    front, kind = x.shape[: -n - 1], jnp.result_type(x, kernel)
    flat = x if len(front) == 1 else x.reshape(-1, *x.shape[-n - 1 :])
    image, window = (0, n + 1, *range(1, n + 1)), (n + 1, n, *range(n))
    y = jax.lax.conv_general_dilated(
        flat.astype(kind),
        kernel.astype(kind),
        sizes(strides, n),
        padding if isinstance(padding, str) else tuple(padding),
        dimension_numbers=jax.lax.ConvDimensionNumbers(image, window, image),
        feature_group_count=groups,
    )
    return y if len(front) == 1 else y.reshape(*front, *y.shape[1:])


def sizes(value: int | Sequence[int], n: int = 2) -> tuple[int, ...]:
    """One number for each axis."""
    return (value,) * n if isinstance(value, int) else tuple(value)


def biased(y: jax.Array, bias: Any) -> jax.Array:
    """With a bias of the last axis, where there is one."""
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,)).astype(y.dtype)


def share(name: str, what: str, number: int, parts: int) -> int:
    """A whole part of a number.

    Raises:
      ValueError: if it does not divide.
    """
    if parts < 1 or number < 1 or number % parts:
        near = [n for n in range(1, max(number, 1) + 1) if number % n == 0]
        raise ValueError(f"{name}: found {what} {number}, which {parts} does not divide; {number} has parts {near}")
    return number // parts


def param(rngs: nnx.Rngs, init: Callable[..., Any], shape: Sequence[int], dtype: Any) -> nnx.Param:
    """A parameter to begin with."""
    return nnx.Param(init(rngs.params(), tuple(shape), dtype))


def zeros(use: bool, features: int, dtype: Any) -> nnx.Param | None:
    """A bias to begin with, or none."""
    return nnx.Param(jnp.zeros(features, dtype)) if use else None


def array(parameter: Any) -> Any:
    """The array of a parameter, or None."""
    return None if parameter is None else parameter[...]


def weights(layer: Any) -> Weights:
    """Kernel and bias of a layer of Flax."""
    return array(layer.kernel), array(layer.bias)


def listed(modules: Sequence[Any]) -> Any:
    """Modules as a list that Flax takes: of its own kind, where it has one."""
    made = getattr(nnx, "List", list)
    return made(modules)


def one_by_one(fn: Callable[..., Any], *args: Any) -> Any:
    """A function of batches run on one example after the other, so that what it leaves out takes no time."""
    if jax.tree.leaves(args)[0].shape[0] == 1:
        return fn(*args)
    return jax.lax.map(lambda rows: jax.tree.map(lambda y: y[0], fn(*jax.tree.map(lambda x: x[None], rows))), args)
