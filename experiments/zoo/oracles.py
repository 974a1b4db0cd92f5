"""What the readings are compared with: the products of a jaxpr, found by a walk that knows nothing of the library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jcompress as jc

PyTree = Any
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
HIGHEST = jax.lax.Precision.HIGHEST


def multiply_adds(fn: Callable[..., Any], params: PyTree, *args: Any) -> float | None:
    """All of them, in products and convolutions; None where there is a Fourier transform."""
    try:
        return float(_multiply_adds(jax.make_jaxpr(fn)(params, *args).jaxpr))
    except NotImplementedError:
        return None


def _multiply_adds(jaxpr: Any) -> int:
    total, needed = 0, set(map(id, jaxpr.outvars))
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or needed & set(map(id, eqn.outvars)):  # what nothing needs is never run
            total, needed = total + _of_equation(eqn), needed | set(map(id, eqn.invars))
    return total


def _of_equation(eqn: Any) -> int:
    name = eqn.primitive.name
    if name == "fft":
        raise NotImplementedError
    out = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return out * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
        return out * math.prod(kernel) // kernel[spec[0]]
    inner = [_multiply_adds(body) for body in _bodies(eqn)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (eqn.params["length"] if name == "scan" else 1)


def _bodies(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            x = getattr(x, "jaxpr", x)
            if hasattr(x, "eqns"):
                yield x


class Uses:
    """Of the parameters that stand in one product only, as they are, cast or transposed: what it contracts.

    Attributes:
      axes: ``{path: (contracted axes, rising, and how many axes there are)}``.
      grams: ``{path: sum of x x^T}``, when called.
    """

    def __init__(self, fn: Callable[..., Any], params: PyTree, *args: Any) -> None:
        self._program = jax.make_jaxpr(fn)(params, *args)
        self._paths = [path for path, _ in jc.paths(params)]
        self._values = jax.tree.leaves((params, *args))
        self.met: dict[str, list[tuple[int, ...] | None]] = {}
        jax.eval_shape(self._grams, self._values)
        shapes = dict(zip(self._paths, map(jnp.shape, self._values), strict=False))
        self.axes = {p: (axes[0], len(shapes[p])) for p, axes in self.met.items() if len(axes) == 1 and axes[0]}

    def grams(self) -> dict[str, jax.Array]:
        found = jax.jit(self._grams)(self._values)
        return {path: found[path] for path in self.axes}

    def _grams(self, values: list[Any]) -> dict[str, jax.Array]:
        self.met.clear()
        found: dict[str, jax.Array] = {}
        tags = [(p, tuple(range(x.ndim))) for p, x in zip(self._paths, values, strict=False)]
        tags += [None] * (len(values) - len(tags))

        def met(path: str, axes: tuple[int, ...] | None = None, gram: jax.Array | None = None) -> None:
            self.met.setdefault(path, []).append(axes)
            if gram is not None:
                found[path] = gram

        _run(self._program.jaxpr, self._program.consts, values, tags, met)
        return found


def _run(jaxpr: Any, consts: list, values: list, tags: list, met: Callable[..., None]) -> tuple[list, list]:
    """Evaluate; a tag says of a value which parameter it is, and which axis of it each of its axes is."""
    env = dict(zip(jaxpr.constvars, ((x, None) for x in consts), strict=True))
    env |= dict(zip(jaxpr.invars, zip(values, tags, strict=True), strict=True))

    def read(atom: Any) -> tuple[Any, Any]:
        return (atom.val, None) if hasattr(atom, "val") else env[atom]

    for eqn in jaxpr.eqns:
        found = [read(x) for x in eqn.invars]
        outs = _equation(eqn, [x for x, _ in found], [t for _, t in found], met)
        env |= dict(zip(eqn.outvars, zip(*outs, strict=True), strict=True))
    outs = [read(x) for x in jaxpr.outvars]
    return [x for x, _ in outs], [t for _, t in outs]


def _equation(eqn: Any, values: list, tags: list, met: Callable[..., None]) -> tuple[list, list]:
    name = eqn.primitive.name
    if name in CALLS:
        body = next(x for x in (eqn.params.get(k) for k in ("jaxpr", "call_jaxpr", "fun_jaxpr")) if x is not None)
        return _run(getattr(body, "jaxpr", body), getattr(body, "consts", []), values, tags, met)
    out = eqn.primitive.bind(*values, **eqn.params)
    outs = out if eqn.primitive.multiple_results else [out]
    if name == "transpose" and tags[0]:
        path, axes = tags[0]
        return outs, [(path, tuple(axes[i] for i in eqn.params["permutation"]))]
    if name in ("convert_element_type", "copy", "copy_p") and tags[0]:
        return outs, [tags[0]]
    use = {"dot_general": _dot, "conv_general_dilated": _convolution}.get(name, lambda *_: None)(eqn, values, tags)
    if use is not None:
        met(*use)
    elif name in ("scan", "while", "cond", "conv_general_dilated"):  # not followed: compared with nothing
        for tag in filter(None, tags):
            met(tag[0])
    return outs, [None] * len(outs)


def _dot(eqn: Any, values: list, tags: list) -> tuple[str, tuple[int, ...], jax.Array] | None:
    if (tags[0] is None) == (tags[1] is None):
        return None
    side = 0 if tags[0] else 1
    path, axes = tags[side]
    contracted, batch = (d[side] for d in eqn.params["dimension_numbers"])
    others = [d[1 - side] for d in eqn.params["dimension_numbers"]]
    inputs = [i for _, i in sorted((axes[j], i) for j, i in zip(contracted, others[0], strict=True))]
    lead = [i for _, i in sorted((axes[j], i) for j, i in zip(batch, others[1], strict=True))]
    x = jnp.asarray(values[1 - side], jnp.float32)
    rest = [i for i in range(x.ndim) if i not in (*inputs, *lead)]
    x = x.transpose(*lead, *rest, *inputs)
    x = x.reshape(*x.shape[: len(lead)], math.prod(x.shape[len(lead) : len(lead) + len(rest)]), -1)
    contracted = tuple(sorted(axes[i] for i in contracted))
    return path, contracted, jnp.einsum("...ni,...nj->...ij", x, x, precision=HIGHEST)


def _convolution(eqn: Any, values: list, tags: list) -> tuple[str, tuple[int, ...], jax.Array] | None:
    options = eqn.params
    if tags[1] is None or options["feature_group_count"] > 1 or options["batch_group_count"] > 1:
        return None
    path, axes = tags[1]
    numbers = options["dimension_numbers"]
    window = tuple(values[1].shape[i] for i in numbers.rhs_spec[2:])
    patches = jax.lax.conv_general_dilated_patches(
        jnp.asarray(values[0], jnp.float32),
        window,
        options["window_strides"],
        options["padding"],
        lhs_dilation=options["lhs_dilation"],
        rhs_dilation=options["rhs_dilation"],
        dimension_numbers=numbers,
        precision=HIGHEST,
    )
    x = jnp.moveaxis(patches, numbers.out_spec[1], -1).reshape(-1, values[1].shape[numbers.rhs_spec[1]], *window)
    order = [i for _, i in sorted((axes[j], i) for i, j in enumerate(numbers.rhs_spec[1:], 1))]
    x = x.transpose(0, *order).reshape(x.shape[0], -1)
    contracted = tuple(sorted(axes[i] for i in numbers.rhs_spec[1:]))
    return path, contracted, jnp.einsum("ni,nj->ij", x, x, precision=HIGHEST)
