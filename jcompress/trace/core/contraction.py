"""Products of an activation and a weight, whichever primitive makes them: what is summed, and how it is done again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jax_core

from jcompress.trace.core import walk

Numbers = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


class Product(Protocol):
    """A product of an activation and a weight inside a function, as a policy is told of it.

    A weight stands in it laid out as the function's equation takes it; axes are those of that layout, not negative.

    Attributes:
      eqn: the equation that it stands for, or whose precision and dtype it has.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> class Told:
      ...     def multiply(self, product, x, w, axes):
      ...         return product.apply(x, w.dense()), f"{product.terms(w.values.shape)} terms an entry"
      >>> told = jc.trace.Executed(lambda params, x: x @ params["w"], Told())
      >>> print(told.report({"w": jnp.ones((3, 2))}, jnp.ones((1, 3))))
      path  product      shape  how
      w     dot_general  3x2    3 terms an entry
    """

    eqn: jax_core.JaxprEqn

    @property
    def obstacle(self) -> str:
        """Why no codes can be multiplied, if they cannot."""
        ...

    @property
    def dtype(self) -> Any:
        """Of the result."""
        ...

    @property
    def contracted(self) -> tuple[int, ...]:
        """Axes of the weight that are summed over."""
        ...

    @property
    def summed(self) -> tuple[int, ...]:
        """Axes of the activation over which a scale must be shared."""
        ...

    def terms(self, shape: Sequence[int]) -> int:
        """How many terms an entry of the product sums, for a weight of this shape."""
        ...

    def multiply_adds(self, padding: bool = True) -> int:
        """How many there are, those with padding (and holes of a dilated input) included or not."""
        ...

    def outputs(self, dim: int) -> int | None:
        """The axis of the product along which axis ``dim`` of the weight gives outputs, or None if it gives none."""
        ...

    def with_matrix(self, x: jax.Array, axis: int, other: int) -> Product:
        """The product of ``x`` over one axis with a matrix over its axis ``other``, as precise as this one."""
        ...

    def apply(self, x: jax.Array, w: jax.Array, dtype: Any = None, precision: Any = None) -> jax.Array:
        """The product, in the precision and dtype of the equation unless they are given."""
        ...

    def of_weight(self, scale: jax.Array, ndim: int) -> jax.Array:
        """A scale of the weight's rank, 1 along what is summed, laid out to multiply it; ``x`` has ``ndim`` axes."""
        ...

    def of_activation(self, scale: jax.Array, ndim: int) -> jax.Array:
        """The same for a scale of the activation's rank; the weight has ``ndim`` axes."""
        ...

    def shared(self, range_: jax.Array, ndim: int) -> jax.Array:
        """A range of the weight's rank as one of the activation's: the largest of what one scale must hold for."""
        ...

    def padded(self, x: jax.Array, value: jax.Array) -> tuple[Product, jax.Array]:
        """The same product where ``x`` is padded already, by the value that stands for zero: (examples, 1, ...)."""
        ...


@dataclasses.dataclass(frozen=True)
class Dot(Product):
    """A dot product whose operand ``side`` is the weight.

    Attributes:
      eqn: the equation, for its precision and the dtype of its result.
      side: 0 or 1.
      numbers: dimension numbers.
    """

    eqn: jax_core.JaxprEqn
    side: int
    numbers: Numbers

    @classmethod
    def of(cls, eqn: jax_core.JaxprEqn, side: int = 1) -> Dot:
        """That of an equation."""
        return cls(eqn, side, _numbers(eqn))

    @property
    def grouped(self) -> tuple[int, ...]:
        """Axes of the second operand that count groups of rows of the first."""
        return ()

    @property
    def obstacle(self) -> str:
        return "" if self.contracted else "no axis of it is summed over"

    @property
    def dtype(self) -> Any:
        return walk.aval(self.eqn.outvars[0]).dtype

    @property
    def contracted(self) -> tuple[int, ...]:
        return self.numbers[0][self.side]

    @property
    def summed(self) -> tuple[int, ...]:
        return self.numbers[0][1 - self.side]

    def terms(self, shape: Sequence[int]) -> int:
        return math.prod(shape[d] for d in self.contracted)

    def multiply_adds(self, padding: bool = True) -> int:
        return _size(self.eqn.outvars[0]) * self.terms(walk.aval(self.eqn.invars[self.side]).shape)

    def outputs(self, dim: int) -> int | None:
        mine, batch = (pair[self.side] for pair in self.numbers)
        ndim, others = (walk.aval(self.eqn.invars[side]).ndim for side in (self.side, 1 - self.side))
        free = [d for d in range(ndim) if d not in mine and d not in batch]
        before = others - len(mine) - len(batch) if self.side else 0
        return len(batch) + before + free.index(dim) if dim in free else None

    def with_matrix(self, x: jax.Array, axis: int, other: int) -> Dot:
        return dataclasses.replace(self, side=1, numbers=(((axis,), (other,)), ((), ())))

    def apply(self, x: jax.Array, w: jax.Array, dtype: Any = None, precision: Any = None) -> jax.Array:
        changed: dict[str, Any] = {"dimension_numbers": self.numbers}
        if dtype is not None:
            changed |= {"preferred_element_type": np.dtype(dtype), "precision": precision}
        if self.numbers != _numbers(self.eqn) and self.eqn.params.get("out_sharding") is not None:
            changed["out_sharding"] = None
        return walk.bind(self.eqn, (x, w) if self.side else (w, x), **changed)[0]

    def of_weight(self, scale: jax.Array, ndim: int) -> jax.Array:
        return self._placed(scale, self.side, ndim)

    def of_activation(self, scale: jax.Array, ndim: int) -> jax.Array:
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
        mine, other = self.numbers[1][self.side], self.numbers[1][1 - self.side]
        largest = range_.max([d for d in range(range_.ndim) if d not in mine])
        order = np.argsort(np.argsort(mine))
        largest = largest.transpose(*order)
        sizes = dict(zip(other, largest.shape, strict=True))
        moved = largest.transpose(*np.argsort(other))
        return moved.reshape([sizes.get(d, 1) for d in range(ndim)])

    def padded(self, x: jax.Array, value: jax.Array) -> tuple[Dot, jax.Array]:
        return self, x


@dataclasses.dataclass(frozen=True)
class Ragged(Dot):
    """A dot product whose rows are in groups, each with a weight of its own: tokens sorted by their experts."""

    @classmethod
    def of(cls, eqn: jax_core.JaxprEqn, side: int = 1) -> Ragged:
        """That of an equation."""
        return cls(eqn, side, _numbers(eqn))

    @property
    def obstacle(self) -> str:
        return "its rows are in groups, each with a weight of its own"

    @property
    def grouped(self) -> tuple[int, ...]:
        """Axes of the second operand that count groups; none where rows of a group are summed, as in a derivative."""
        return tuple(self.eqn.params["ragged_dot_dimension_numbers"].rhs_group_dimensions)

    def multiply_adds(self, padding: bool = True) -> int:
        # Each row meets one group only.
        groups = walk.aval(self.eqn.invars[2]).shape[-1] if not self.grouped else 1
        return super().multiply_adds(padding) // max(groups, 1)

    def outputs(self, dim: int) -> int | None:
        free = super().outputs(dim)
        if self.side == 0 or dim in self.grouped or free is None:
            return free if self.side == 0 else None
        return free - sum(d < dim for d in self.grouped)


@dataclasses.dataclass(frozen=True)
class Convolution(Product):
    """A convolution whose kernel is the weight; one scale for each output channel and each example.

    Attributes:
      eqn: the equation.
      side: 1, or 0 where what the kernel slides over is taken for the weight.
      changed: parameters of it that are others.
    """

    eqn: jax_core.JaxprEqn
    side: int = 1
    changed: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, eqn: jax_core.JaxprEqn, side: int = 1) -> Convolution:
        """That of an equation."""
        return cls(eqn, side)

    @property
    def obstacle(self) -> str:
        if self.side == 0:
            return "it is what a convolution slides over"
        return "its convolution groups the batch" if self.params["batch_group_count"] > 1 else ""

    @property
    def params(self) -> dict[str, Any]:
        """Of the equation."""
        return {**self.eqn.params, **dict(self.changed)}

    @property
    def dtype(self) -> Any:
        return walk.aval(self.eqn.outvars[0]).dtype

    @property
    def contracted(self) -> tuple[int, ...]:
        return self.params["dimension_numbers"].rhs_spec[1:]

    @property
    def summed(self) -> tuple[int, ...]:
        return self.params["dimension_numbers"].lhs_spec[1:]

    def terms(self, shape: Sequence[int]) -> int:
        return math.prod(shape[d] for d in self.contracted)

    def multiply_adds(self, padding: bool = True) -> int:
        p, numbers = self.params, self.params["dimension_numbers"]
        lhs, rhs, out = (walk.aval(v).shape for v in (*self.eqn.invars, self.eqn.outvars[0]))
        each = rhs[numbers.rhs_spec[1]] * out[numbers.out_spec[1]] * out[numbers.out_spec[0]]
        for i, (low, _) in enumerate(p["padding"]):
            n, window, places = lhs[numbers.lhs_spec[2 + i]], rhs[numbers.rhs_spec[2 + i]], out[numbers.out_spec[2 + i]]
            if padding:
                each *= window * places
                continue
            hole = p["lhs_dilation"][i]
            taps = np.arange(window) * p["rhs_dilation"][i]
            at = np.arange(places)[:, None] * p["window_strides"][i] + taps - low
            each *= int(((at >= 0) & (at <= (n - 1) * hole) & (at % hole == 0)).sum())
        return each

    def outputs(self, dim: int) -> int | None:
        numbers = self.params["dimension_numbers"]
        return numbers.out_spec[1] if dim == numbers.rhs_spec[0] and self.params["feature_group_count"] == 1 else None

    def with_matrix(self, x: jax.Array, axis: int, other: int) -> Dot:
        numbers = (((axis,), (other,)), ((), ()))
        shape = [1, 1]
        shape[other] = x.shape[axis]
        matrix = jax.ShapeDtypeStruct(shape, x.dtype)
        made = jax.make_jaxpr(
            lambda x, w: lax.dot_general(
                x, w, numbers, precision=self.params["precision"], preferred_element_type=self.dtype
            )
        )(jax.ShapeDtypeStruct(x.shape, x.dtype), matrix)
        return Dot.of(made.jaxpr.eqns[0])

    def apply(self, x: jax.Array, w: jax.Array, dtype: Any = None, precision: Any = None) -> jax.Array:
        changed = dict(self.changed)
        if dtype is not None:
            changed |= {"preferred_element_type": np.dtype(dtype), "precision": precision}
        return walk.bind(self.eqn, (x, w), **changed)[0]

    def of_weight(self, scale: jax.Array, ndim: int) -> jax.Array:
        return scale.reshape([-1 if d == self.params["dimension_numbers"].out_spec[1] else 1 for d in range(ndim)])

    def of_activation(self, scale: jax.Array, ndim: int) -> jax.Array:
        return scale.reshape([-1 if d == self.params["dimension_numbers"].out_spec[0] else 1 for d in range(ndim)])

    def shared(self, range_: jax.Array, ndim: int) -> jax.Array:
        return range_.max().reshape([1] * ndim)

    def padded(self, x: jax.Array, value: jax.Array) -> tuple[Convolution, jax.Array]:
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


def _size(v: Any) -> int:
    return math.prod(v.aval.shape)


def _numbers(eqn: jax_core.JaxprEqn) -> Numbers:
    ragged = eqn.params.get("ragged_dot_dimension_numbers")
    contract, batch = eqn.params["dimension_numbers"] if ragged is None else ragged.dot_dimension_numbers
    return (tuple(contract[0]), tuple(contract[1])), (tuple(batch[0]), tuple(batch[1]))
