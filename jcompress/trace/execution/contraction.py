"""Products of an activation and a weight, whichever of the two primitives makes them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jax_core

from jcompress.trace.core import walk

Numbers = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Dot:
    """A ``dot_general`` whose operand ``side`` is the weight.

    Attributes:
      eqn: the equation, for its precision and the dtype of its result.
      side: 0 or 1.
      numbers: dimension numbers.
    """

    eqn: jax_core.JaxprEqn
    side: int
    numbers: Numbers

    @property
    def dtype(self) -> Any:
        """Of the result."""
        return walk.aval(self.eqn.outvars[0]).dtype

    @property
    def contracted(self) -> tuple[int, ...]:
        """Axes of the weight that are summed over."""
        return self.numbers[0][self.side]

    @property
    def summed(self) -> tuple[int, ...]:
        """Axes of the activation over which a scale must be shared."""
        return self.numbers[0][1 - self.side]

    def apply(self, x: jax.Array, w: jax.Array, dtype: Any = None, precision: Any = None) -> jax.Array:
        """The product, in the precision and dtype of the equation unless they are given."""
        changed: dict[str, Any] = {"dimension_numbers": self.numbers}
        if dtype is not None:
            changed |= {"preferred_element_type": np.dtype(dtype), "precision": precision}
        if self.numbers != _numbers(self.eqn) and self.eqn.params.get("out_sharding") is not None:
            changed["out_sharding"] = None
        return walk.bind(self.eqn, (x, w) if self.side else (w, x), **changed)[0]

    def of_weight(self, scale: jax.Array, ndim: int) -> jax.Array:
        """A scale of the weight's rank, 1 along what is summed, laid out to multiply the product."""
        return self._placed(scale, self.side, ndim)

    def of_activation(self, scale: jax.Array, ndim: int) -> jax.Array:
        """The same for a scale of the activation's rank."""
        return self._placed(scale, 1 - self.side, ndim)

    def _placed(self, scale: jax.Array, side: int, ndim: int) -> jax.Array:
        """``ndim`` is the rank of the other operand."""
        contract, batch = (list(pair[side]) for pair in self.numbers)
        free = [d for d in range(scale.ndim) if d not in contract and d not in batch]
        sizes, others = scale.shape, [1] * (ndim - len(contract) - len(batch))
        kept = [sizes[d] for d in free]
        shape = [*(sizes[d] for d in batch), *(kept + others if side == 0 else others + kept)]
        return scale.transpose(*batch, *free, *contract).reshape(shape)

    def shared(self, range_: jax.Array, ndim: int) -> jax.Array:
        """A range of the weight's rank as one of the activation's: for each index of the batch axes, the largest."""
        mine, other = self.numbers[1][self.side], self.numbers[1][1 - self.side]
        largest = range_.max([d for d in range(range_.ndim) if d not in mine])
        order = np.argsort(np.argsort(mine))
        largest = largest.transpose(*order)
        sizes = dict(zip(other, largest.shape, strict=True))
        moved = largest.transpose(*np.argsort(other))
        return moved.reshape([sizes.get(d, 1) for d in range(ndim)])

    def padded(self, x: jax.Array, value: jax.Array) -> tuple[Dot, jax.Array]:
        """The product without padding, of which there is none."""
        return self, x


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A ``conv_general_dilated`` whose kernel is the weight; one scale for each output channel and each example.

    Attributes:
      eqn: the equation.
      changed: parameters of it that are others.
    """

    eqn: jax_core.JaxprEqn
    changed: tuple[tuple[str, Any], ...] = ()

    @property
    def params(self) -> dict[str, Any]:
        """Of the equation."""
        return {**self.eqn.params, **dict(self.changed)}

    @property
    def dtype(self) -> Any:
        """Of the result."""
        return walk.aval(self.eqn.outvars[0]).dtype

    @property
    def contracted(self) -> tuple[int, ...]:
        """Axes of the kernel that are summed over."""
        return self.params["dimension_numbers"].rhs_spec[1:]

    @property
    def summed(self) -> tuple[int, ...]:
        """Axes of the activation over which a scale must be shared."""
        return self.params["dimension_numbers"].lhs_spec[1:]

    def apply(self, x: jax.Array, w: jax.Array, dtype: Any = None, precision: Any = None) -> jax.Array:
        """The product, in the precision and dtype of the equation unless they are given."""
        changed = dict(self.changed)
        if dtype is not None:
            changed |= {"preferred_element_type": np.dtype(dtype), "precision": precision}
        return walk.bind(self.eqn, (x, w), **changed)[0]

    def of_weight(self, scale: jax.Array, ndim: int) -> jax.Array:
        """A scale of the kernel's rank, 1 along what is summed, laid out to multiply the product."""
        return scale.reshape([-1 if d == self.params["dimension_numbers"].out_spec[1] else 1 for d in range(ndim)])

    def of_activation(self, scale: jax.Array, ndim: int) -> jax.Array:
        """The same for a scale of the activation's rank."""
        return scale.reshape([-1 if d == self.params["dimension_numbers"].out_spec[0] else 1 for d in range(ndim)])

    def shared(self, range_: jax.Array, ndim: int) -> jax.Array:
        """A range of the kernel's rank as one of the activation's: the largest."""
        return range_.max().reshape([1] * ndim)

    def padded(self, x: jax.Array, value: jax.Array) -> tuple[Convolution, jax.Array]:
        """The same product where ``x`` is padded already, by the value that stands for zero: (examples, 1, ...)."""
        p = self.params
        spec = p["dimension_numbers"].lhs_spec
        spread = [(0, 0, 0)] * x.ndim
        for d, (low, high), dilation in zip(spec[2:], p["padding"], p["lhs_dilation"], strict=True):
            spread[d] = (low, high, dilation - 1)
        real = lax.pad(jnp.ones(x.shape, jnp.bool_), np.False_, spread)
        wide = lax.pad(x, jnp.zeros((), x.dtype), spread)
        none = tuple((0, 0) for _ in spec[2:])
        changed = {**dict(self.changed), "padding": none, "lhs_dilation": (1,) * len(none)}
        return dataclasses.replace(self, changed=tuple(changed.items())), jnp.where(real, wide, value)


Product = Dot | Convolution


def read(eqn: jax_core.JaxprEqn, side: int) -> Product | None:
    """The product of an equation whose operand ``side`` is a weight, or None if it is none that sums over it."""
    if eqn.primitive.name == "conv_general_dilated":
        return Convolution(eqn) if side == 1 and eqn.params["batch_group_count"] == 1 else None
    product = Dot(eqn, side, _numbers(eqn))
    return product if product.contracted else None


def _numbers(eqn: jax_core.JaxprEqn) -> Numbers:
    contract, batch = eqn.params["dimension_numbers"]
    return (tuple(contract[0]), tuple(contract[1])), (tuple(batch[0]), tuple(batch[1]))


def length(product: Product, w: jax.Array) -> int:
    """How many terms an entry of the product sums."""
    return math.prod(w.shape[d] for d in product.contracted)


def pair(eqn: jax_core.JaxprEqn, x: jax.Array, axis: int, other: int) -> Dot:
    """The product of ``x`` over one axis with a matrix over its axis ``other``, as precise as an equation.

    An equation that is a convolution has no dimension numbers of this kind, so another is made.
    """
    numbers = (((axis,), (other,)), ((), ()))
    if eqn.primitive.name == "dot_general":
        return Dot(eqn, 1, numbers)
    shape = [1, 1]
    shape[other] = x.shape[axis]
    matrix = jax.ShapeDtypeStruct(shape, x.dtype)
    precision, dtype = eqn.params["precision"], walk.aval(eqn.outvars[0]).dtype
    made = jax.make_jaxpr(
        lambda x, w: lax.dot_general(x, w, numbers, precision=precision, preferred_element_type=dtype)
    )(jax.ShapeDtypeStruct(x.shape, x.dtype), matrix)
    return Dot(made.jaxpr.eqns[0], 1, numbers)
