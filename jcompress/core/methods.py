"""What a method is: hyperparameters, called with an array and what is known about it, that give a node."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core.axes import Layout
from jcompress.core.compressed import is_concrete


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What may be known about a leaf when a method is fitted to it.

    Attributes:
      step: the training step, for hyperparameters that are schedules. None if nobody said.
      key: a PRNG key of this leaf's own.
      stats: what ``calibrate`` gathered for this leaf.
      grad: the gradient of this leaf.
      previous: the node that was fitted last time.
      where: entries of the array that matter, when a mask stands around it.
      path: the path of the leaf, for error messages.
      batch: how many leading axes of the array are stacked layers, experts or groups, each with a product of its own.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> score = jc.prune.scores.taylor
      >>> score(jnp.array([1.0, -2.0]), jc.Context(grad=jnp.array([3.0, 0.5]))).tolist()
      [3.0, 1.0]
    """

    step: Any = None
    key: Any = None
    stats: Any = None
    grad: Any = None
    previous: Any = None
    where: Any = None
    path: str = dataclasses.field(default="array", metadata={"static": True})
    batch: int = dataclasses.field(default=0, metadata={"static": True})


class CalibrationWarning(UserWarning):
    """What calibration gathered is too little for a method: it says of which leaf, and what was done instead.

    Inputs that no data reached, or a Gram matrix that is singular with the damping that was asked for.

    Example:
      >>> import warnings, jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.ones((2, 2))}
      >>> plan = jc.plan(params, [("w", jc.prune.Wanda(sparsity=0.5))])
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], params, [jnp.array([[1.0, 0.0]])], plan=plan)
      >>> with warnings.catch_warnings(record=True) as told:
      ...     warnings.simplefilter("always")
      ...     small = jc.compress(params, plan, stats=stats)
      >>> str(told[0].message).partition(";")[0]
      'w: calibration never saw 0.5 of the inputs'
    """


class Method:
    """A frozen dataclass of hyperparameters, called with an array and its context, that gives a node.

    A subclass writes ``__call__``; all else has a default. Any callable with the same attributes will do as well.

    What it reads beside the array it names in ``reads``. A method that decides for all leaves of a rule at once sets
    ``joint`` and writes ``fit`` in place of ``__call__``. A method made of others names the fields that hold them in
    ``wraps``: their needs, checks and decisions are then its own. A sparsity, a scope and a pattern, where a method has
    them, are fields of these names.

    Raises:
      TypeError: when it is called, for a subclass that writes neither ``__call__`` nor ``fit``.

    Example:
      >>> import dataclasses, jax.numpy as jnp, jcompress as jc
      >>> @dataclasses.dataclass(frozen=True)
      ... class Above(jc.Method):
      ...     threshold: float
      ...
      ...     def __call__(self, w, context=jc.Context(), /):
      ...         return jc.formats.Masked(w, jnp.abs(w) > self.threshold)
      >>> Above(1.0)(jnp.array([0.5, -2.0])).materialize().tolist()
      [0.0, -2.0]
      >>> Above(1.0)
      Above(threshold=1.0)
    """

    reads: ClassVar[tuple[str, ...]] = ()
    """What it reads in the context itself: ``"key"``, ``"grad"``, ``"stats.gram"``."""
    wraps: ClassVar[tuple[str, ...]] = ()
    """Fields that hold a method, a tuple of them, or None."""
    whole: ClassVar[bool] = False
    """Whether it takes stacked layers, experts and groups as one array, ``context.batch`` of its axes in front. By
    default it is mapped over them, and sees one at a time."""

    takes_complex: ClassVar[bool] = False
    """Whether it has a meaning for complex arrays. One made of others has it where they all have."""

    def __init_subclass__(cls) -> None:
        cls.__repr__ = cls.__repr__  # type: ignore[method-assign]  # its own, or the decorator writes another one

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be in the context: what the method reads, and the methods that it is made of."""
        return tuple(dict.fromkeys((*self.reads, *needs(*wrapped(self)))))

    @property
    def joint(self) -> bool:
        """Whether it decides for all leaves of a rule at once, by ``fit``."""
        return any(map(is_joint, wrapped(self)))

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise, when the plan is made, for a leaf that the method cannot take."""
        for method in wrapped(self):
            check(method, path, shape, dtype)

    def unit(self, shape: tuple[int, ...]) -> int:
        """How many weights the sparsity of a leaf of this shape can change by, at least."""
        return max((unit(method, shape) for method in wrapped(self)), default=1)

    def fit(self, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Any]:
        """One node for each array of a rule."""
        return [self(w, context) for w, context in zip(arrays, contexts, strict=True)]

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Any:
        """The node for one array."""
        if type(self).fit is Method.fit:
            raise TypeError(f"{type(self).__name__} is no method yet: write __call__(w, context), or fit")
        return self.fit([w], [context])[0]

    def __repr__(self) -> str:
        return method_repr(self)


def wrapped(method: Any) -> tuple[Any, ...]:
    """The methods that a method is made of."""
    found = [getattr(method, name) for name in getattr(method, "wraps", ())]
    return tuple(y for x in found if x is not None for y in (x if isinstance(x, tuple) else (x,)))


def needs(*methods: Any) -> tuple[str, ...]:
    """All that the methods need in the context."""
    return tuple(dict.fromkeys(need for method in methods for need in getattr(method, "needs", ())))


def is_joint(method: Any) -> bool:
    """Whether ``method`` decides for all leaves of a rule at once."""
    return bool(getattr(method, "joint", False))


def is_whole(method: Any) -> bool:
    """Whether ``method`` takes stacked layers as one array: by itself, or a method in it does."""
    return bool(getattr(method, "whole", False)) or any(map(is_whole, wrapped(method)))


def check_real(method: Any, path: str, dtype: Any) -> None:
    """Raise for a complex array, if the method knows real ones only."""
    if jnp.issubdtype(dtype, jnp.complexfloating) and not takes_complex(method):
        raise ValueError(
            f"{path}: found dtype {dtype}, and {method!r} is defined for real arrays; use jc.cartesian({method!r}), "
            "which compresses real and imaginary parts each, or keep it dense"
        )


def takes_complex(method: Any) -> bool:
    """Whether ``method`` has a meaning for complex arrays."""
    inner = wrapped(method)
    return bool(getattr(method, "takes_complex", False)) or bool(inner and all(map(takes_complex, inner)))


def check(method: Any, path: str, shape: tuple[int, ...], dtype: Any) -> None:
    """Raise if ``method`` cannot take an array of this shape and dtype."""
    if hasattr(method, "check"):
        method.check(path, shape, dtype)


def check_laid_out(method: Any, path: str, layout: Layout, shape: tuple[int, ...], dtype: Any) -> None:
    """Raise if ``method`` cannot take an array whose axes are these: a layer of it, unless it wants the whole."""
    layers = 0 if is_whole(method) else layout.lead(len(shape))
    check(method, path, layout.seen(shape)[layers:], dtype)


def unit(method: Any, shape: tuple[int, ...]) -> int:
    """How many weights the sparsity of a leaf of this shape can change by, at least."""
    return method.unit(shape) if hasattr(method, "unit") else 1


def fit(method: Any, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Any]:
    """Apply a method to the leaves of one rule: together if it decides for all at once, else one by one."""
    for w, context in zip(arrays, contexts, strict=True):
        check_real(method, context.path, w.dtype)
        for need in needs(method):
            _require(method, need, context)
    try:
        if is_whole(method) or not any(context.batch for context in contexts):
            return _fitted(method, arrays, contexts)
        if is_joint(method):
            return over_layers(method, arrays, contexts)
        return [
            over_layers(method, [w], [c])[0] if c.batch else method(w, c) for w, c in zip(arrays, contexts, strict=True)
        ]
    except StepMissingError as error:
        raise ValueError(f"{contexts[0].path}: {method!r}: {error}") from None


def _fitted(method: Any, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Any]:
    if is_joint(method):
        return method.fit(arrays, contexts)
    return [method(w, context) for w, context in zip(arrays, contexts, strict=True)]


def over_layers(method: Any, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Any]:
    """Apply a method to each index of the leading axis, the leaves of what it gives stacked alike.

    Raises:
      ValueError: if leaves that share a decision have different numbers of layers.
    """
    layers = {w.shape[0] for w in arrays}
    if len(layers) > 1:
        raise ValueError(
            f"{contexts[0].path}: leaves that share a decision need the same number of layers, "
            f"found {sorted(layers)}; give them rules of their own"
        )
    (count,) = layers

    def one(ws: list[jax.Array], varying: list[dict[str, Any]]) -> list[Any]:
        inner = [dataclasses.replace(c, batch=max(c.batch - 1, 0), **v) for c, v in zip(contexts, varying, strict=True)]
        return fit(method, ws, inner)

    return jax.vmap(one)(list(arrays), [_varying(c, w, count) for c, w in zip(contexts, arrays, strict=True)])


def _varying(context: Context, w: jax.Array, layers: int) -> dict[str, Any]:
    """The parts of a context that differ from layer to layer."""
    found = {name: x for name in ("stats", "grad", "previous") if (x := getattr(context, name)) is not None}
    if any(x.shape[:1] != (layers,) for x in jax.tree.leaves(context.previous)):
        del found["previous"]  # what a method behind it in a chain gave is of all layers: each starts anew
    for name, x in found.items():
        if odd := [y.shape for y in jax.tree.leaves(x) if y.shape[:1] != (layers,)]:
            raise ValueError(
                f"{context.path}: its leading axis is taken for {layers} stacked layers, and {name} has an array of "
                f"shape {odd[0]}; calibrate the function that has these layers, or leave out jc.stacked"
            )
    if context.where is not None:
        found["where"] = jnp.broadcast_to(context.where, w.shape)
    if context.key is not None:
        found["key"] = jax.random.split(context.key, layers)
    return found


class StepMissingError(ValueError):
    """A schedule was to be read and nobody said at which step."""


def value_at(hyperparameter: Any, step: Any) -> Any:
    """A hyperparameter's value: schedules are called with the step, everything else is returned.

    Raises:
      ValueError: for a schedule without a step.
    """
    if not callable(hyperparameter):
        return hyperparameter
    if step is None:
        raise StepMissingError(
            "a hyperparameter is a schedule and no step is given to read it at; pass step=, the steps trained"
        )
    return hyperparameter(step)


@dataclasses.dataclass(frozen=True)
class _Label:
    """A path for error messages. All are equal, so leaves of one shape are traced once."""

    path: str = dataclasses.field(compare=False)


def compiled(call: Callable[[Any, jax.Array, Context], Any]) -> Callable[..., Any]:
    """A method's ``__call__`` under ``jit``: compiled once for all leaves of one shape, the method a constant of it.

    A method with a hyperparameter that has no hash, an array for one, is called as it is.
    """

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def traced(method: Any, label: _Label, w: jax.Array, context: Context) -> Any:
        return call(method, w, dataclasses.replace(context, path=label.path))

    @functools.wraps(call)
    def method_call(self: Any, w: jax.Array, context: Context = Context(), /) -> Any:
        try:
            hash(self)
        except TypeError:
            return call(self, w, context)
        return traced(self, _Label(context.path), w, dataclasses.replace(context, path=""))

    return method_call


_HINTS = {
    "key": "pass key=jax.random.key(...)",
    "grad": "pass grads= to the optimizer's update",
    "stats": "pass stats=jc.calibrate(fn, params, batches, plan=plan)",
}


def _require(method: Any, need: str, context: Context) -> None:
    first, *rest = need.split(".")
    found = getattr(context, first)
    for name in rest:
        found = None if found is None else getattr(found, name, None)
    if found is None:
        raise ValueError(f"{context.path}: {type(method).__name__} needs {need!r}, which is missing; {_HINTS[first]}")


def same(a: Any, b: Any) -> bool:
    """Whether two methods are equal: of one class, with the same values for hyperparameters, arrays included."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "shape"):
        return is_concrete(a) and is_concrete(b) and np.array_equal(a, b)
    return bool(a == b)


def method_repr(method: Any) -> str:
    """The name of a method, its first hyperparameter, and the others that differ from the defaults."""
    fields = [f for f in dataclasses.fields(method) if f.repr]
    shown = [f for i, f in enumerate(fields) if _differs(getattr(method, f.name), None if i == 0 else f.default)]
    return f"{type(method).__name__}({', '.join(f'{f.name}={_shown(getattr(method, f.name))}' for f in shown)})"


def _differs(value: Any, default: Any) -> bool:
    return value is not default and (not is_concrete(value) or np.ndim(value) > 0 or value != default)


def _shown(hyperparameter: Any) -> str:
    if callable(hyperparameter) and not dataclasses.is_dataclass(hyperparameter):
        return "<schedule>"
    return repr(hyperparameter)
