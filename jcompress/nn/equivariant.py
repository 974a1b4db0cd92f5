"""Group-equivariant convolutions: one kernel in all rotations, and reflections, of the plane (Cohen & Welling 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jcompress.nn.kernels import Padding, Strides, array, biased, convolved, lecun_normal, param, sizes, zeros

PlaneGroup = Literal["p4", "p4m"]
ELEMENTS = {"p4": 4, "p4m": 8}


def transform_plane(x: jax.Array, element: int, elements: int = 1) -> jax.Array:
    """An image, or features of a group, turned by an element of p4 or p4m.

    Element ``4 m + r`` reflects the columns if ``m``, then turns by ``r`` right angles. Features of a group turn and
    change places: ``(L_g f)(x, h) = f(g^-1 x, g^-1 h)``.

    Args:
      x: an image (..., height, width, channels), or features (..., height, width, elements, channels).
      element: from 0 to 3 for p4, to 7 for p4m; 0 changes nothing.
      elements: 4 or 8 for features of a group, 1 for an image.

    Returns:
      What came, turned; height and width change places at odd turns.

    Raises:
      ValueError: for an element that the group does not have, or another number of elements.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.transform_plane(jnp.arange(4.0).reshape(2, 2, 1), 1)[..., 0].tolist()
      [[1.0, 3.0], [0.0, 2.0]]
    """
    if not 0 <= element < (elements if elements > 1 else 8) or (elements > 1 and x.shape[-2] != elements):
        raise ValueError(f"transform_plane: found element {element} and shape {x.shape} for {elements} elements")
    if elements == 1:
        return _turned(x, element, -3)
    order = [_product(_inverse(element), h) for h in range(elements)]
    turned = _turned(x, element, -4)
    return jnp.stack([turned[..., i, :] for i in order], axis=-2)


def _turned(x: jax.Array, element: int, rows: int) -> jax.Array:
    reflect, turns = divmod(element, 4)
    rows += x.ndim
    return jnp.rot90(jnp.flip(x, rows + 1) if reflect else x, turns, (rows, rows + 1))


def _product(a: int, b: int) -> int:
    """The element that acts as ``b``, then ``a``."""
    (m, r), (n, s) = divmod(a, 4), divmod(b, 4)
    return 4 * ((m + n) % 2) + (r - s if m else r + s) % 4


def _inverse(a: int) -> int:
    return a if a >= 4 else -a % 4


def lift_convolution(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    group: PlaneGroup = "p4",
    strides: Strides = 1,
    padding: Padding = "SAME",
) -> jax.Array:
    """Convolve an image with a kernel in every element of a group (G-CNN; Cohen & Welling 2016, arXiv:1602.07576).

    ``y(x, g) = sum_z f(z) psi(g^-1 (z - x))``. Turn the image and the outputs turn with it:
    ``lift(transform_plane(x, g)) == transform_plane(lift(x), g, elements)``. Of ``k x k`` windows it keeps
    ``k k in out`` numbers and takes ``elements`` times as many multiply-adds a position.

    Args:
      x: images (..., height, width, inputs).
      kernel: (k, k, inputs, outputs), square.
      bias: (outputs,), the same for all elements.
      group: ``"p4"``, turns by right angles; ``"p4m"``, reflections too.
      strides: of the window.
      padding: as ``jax.lax`` takes it.

    Returns:
      Features (..., height, width, elements, outputs).

    Raises:
      ValueError: for a window that is not square, or strides and padding that see other pixels of a turned image.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.lift_convolution(jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 6)), group="p4m").shape
      (1, 5, 5, 8, 6)
    """
    elements = _elements("lift_convolution", x.shape[-3:-1], kernel, group, strides, padding)
    turned = jnp.stack([_turned(kernel, g, -4) for g in range(elements)], axis=-2)
    return _over(x, turned.reshape(*kernel.shape[:-1], -1), bias, elements, strides, padding, "lift_convolution")


def group_convolution(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    strides: Strides = 1,
    padding: Padding = "SAME",
) -> jax.Array:
    """Convolve features of a group with a kernel of the group (G-CNN; Cohen & Welling 2016, arXiv:1602.07576).

    ``y(x, g) = sum_{z, h} f(z, h) psi(g^-1 (z - x), g^-1 h)``: what the kernel turns by, its elements change places by.
    Of ``k x k`` windows it keeps ``elements k k in out`` numbers and takes ``elements`` times as many multiply-adds a
    position; a dense layer of as many features keeps ``elements`` times as many numbers. The maximum or the mean over
    axis -2 of what comes out turns with the image as a plain image does.

    Args:
      x: features (..., height, width, elements, inputs), 4 elements (p4) or 8 (p4m).
      kernel: (k, k, elements, inputs, outputs), square.
      bias: (outputs,), the same for all elements.
      strides: of the window.
      padding: as ``jax.lax`` takes it.

    Returns:
      Features (..., height, width, elements, outputs).

    Raises:
      ValueError: for a window that is not square, elements that differ, or strides and padding that see other pixels of
        a turned image.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> x = jnp.ones((1, 5, 5, 4, 6))
      >>> jc.nn.group_convolution(x, jnp.ones((3, 3, 4, 6, 2))).shape
      (1, 5, 5, 4, 2)
    """
    elements = kernel.shape[-3]
    if x.ndim < 4 or x.shape[-2:] != kernel.shape[-3:-1] or elements not in ELEMENTS.values():
        raise ValueError(
            f"group_convolution: found x {x.shape} and a kernel {kernel.shape}, expected (..., height, width, "
            "elements, inputs) and (k, k, elements, inputs, outputs) of 4 or 8 elements"
        )
    _elements("group_convolution", x.shape[-4:-2], kernel, "p4" if elements == 4 else "p4m", strides, padding)
    flat = x.reshape(*x.shape[:-2], -1)
    turned = []
    for g in range(elements):
        order = [_product(_inverse(g), h) for h in range(elements)]
        whole = _turned(kernel, g, -5)
        turned.append(
            jnp.stack([whole[..., h, :, :] for h in order], axis=-3).reshape(*kernel.shape[:2], -1, kernel.shape[-1])
        )
    joined = jnp.stack(turned, axis=-2).reshape(*kernel.shape[:2], flat.shape[-1], -1)
    return _over(flat, joined, bias, elements, strides, padding, "group_convolution")


def _over(x: Any, kernel: Any, bias: Any, elements: int, strides: Any, padding: Any, name: str) -> jax.Array:
    y = convolved(name, x, kernel, strides, padding)
    return biased(y.reshape(*y.shape[:-1], elements, -1), bias)


def _elements(name: str, image: Any, kernel: Any, group: str, strides: Strides, padding: Padding) -> int:
    """The number of elements, once turning the image is known to turn what the window sees."""
    if group not in ELEMENTS:
        raise ValueError(f"{name}: found group {group!r}, expected 'p4' or 'p4m'")
    window, steps = kernel.shape[:2], sizes(strides)
    if window[0] != window[1] or steps[0] != steps[1]:
        raise ValueError(f"{name}: found a window {window} with strides {steps}; a turned window must be square")
    pads = jax.lax.padtype_to_pads(image, window, steps, padding) if isinstance(padding, str) else padding
    for n, (low, high), k, s in zip(image, pads, window, steps, strict=True):
        if low != high or (n + low + high - k) % s:
            raise ValueError(
                f"{name}: a window of {k} with strides {s} and padding {(low, high)} does not see the same pixels of "
                f"{n} when they are turned; take an odd window with strides 1, or sizes for which nothing is left over"
            )
    return ELEMENTS[group]


class LiftConv(nnx.Module):
    """The first layer of a group-equivariant network: :func:`lift_convolution` (Cohen & Welling 2016, 1602.07576).

    Args:
      in_features: channels of the image.
      out_features: channels of each element of the group.
      kernel_size: of the square window.
      group: ``"p4"`` or ``"p4m"``.
      strides: of the window.
      padding: as ``jax.lax`` takes it.
      use_bias: whether there is a bias, the same for all elements.
      kernel_init: of the kernel (k, k, in_features, out_features).
      param_dtype: of the parameters.
      rngs: with a stream ``params``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> jc.nn.LiftConv(3, 6, (3, 3), rngs=nnx.Rngs(0))(jnp.ones((1, 8, 8, 3))).shape
      (1, 8, 8, 4, 6)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        group: PlaneGroup = "p4",
        strides: Strides = 1,
        padding: Padding = "SAME",
        use_bias: bool = True,
        kernel_init: Callable[..., Any] = lecun_normal,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = param(rngs, kernel_init, (*sizes(kernel_size), in_features, out_features), param_dtype)
        self.bias = zeros(use_bias, out_features, param_dtype)
        self.group, self.strides, self.padding = group, strides, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features of the group."""
        return lift_convolution(x, array(self.kernel), array(self.bias), self.group, self.strides, self.padding)


class GroupConv(nnx.Module):
    """A later layer of a group-equivariant network: :func:`group_convolution` (Cohen & Welling 2016, 1602.07576).

    Between layers take what acts on each number alone, or norms of the last axis, which all elements share.

    Args:
      in_features: channels of each element of the group.
      out_features: channels of each element of the group.
      kernel_size: of the square window.
      group: ``"p4"`` or ``"p4m"``.
      strides: of the window.
      padding: as ``jax.lax`` takes it.
      use_bias: whether there is a bias, the same for all elements.
      kernel_init: of the kernel (k, k, elements, in_features, out_features).
      param_dtype: of the parameters.
      rngs: with a stream ``params``.

    Raises:
      ValueError: for another group.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> jc.nn.GroupConv(6, 5, (3, 3), rngs=nnx.Rngs(0))(jnp.ones((1, 8, 8, 4, 6))).shape
      (1, 8, 8, 4, 5)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        group: PlaneGroup = "p4",
        strides: Strides = 1,
        padding: Padding = "SAME",
        use_bias: bool = True,
        kernel_init: Callable[..., Any] = lecun_normal,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if group not in ELEMENTS:
            raise ValueError(f"GroupConv: found group {group!r}, expected 'p4' or 'p4m'")
        shape = (*sizes(kernel_size), ELEMENTS[group], in_features, out_features)
        self.kernel = param(rngs, kernel_init, shape, param_dtype)
        self.bias = zeros(use_bias, out_features, param_dtype)
        self.strides, self.padding = strides, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features of the group."""
        return group_convolution(x, array(self.kernel), array(self.bias), self.strides, self.padding)
