"""Gradients of a loss, their squares, and the diagonal of its Hessian, for some of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core, rules
from jcompress.core import PyTree

Sums = dict[str, dict[str, jax.Array]]
Names = Mapping[str, tuple[str, ...]]


def check(names: Names, loss: Any, key: Any) -> None:
    """Raise if something is asked for that needs a loss or a key which is not there."""
    for path, found in names.items():
        if found and loss is None:
            raise ValueError(f"{path}: {found[0]!r} needs a loss; pass loss=, called as loss(params, *batch)")
        if "hessian_diagonal" in found and key is None:
            raise ValueError(f"{path}: 'hessian_diagonal' draws random numbers; pass key=jax.random.key(...)")


def gather(
    loss: Callable[..., Any], params: PyTree, batch: tuple, names: Names, per_example: bool, probes: int, key: Any
) -> Sums:
    """Sums of ``{name: {path: array}}`` for one batch, with the number of terms under ``"terms"``."""
    leaves = rules.paths(params)

    def of(part: dict[str, jax.Array], *batch: Any) -> Any:
        return loss(core.untie(rules.rebuild(params, part)), *batch)

    def chosen(name: str) -> dict[str, jax.Array]:
        return {path: x for path, x in leaves if name in names.get(path, ()) and core.is_trainable(x)}

    sums: Sums = {"terms": {"grad": jnp.ones(()), "grad_square": jnp.ones(()), "hessian_diagonal": jnp.ones(())}}
    if part := chosen("grad") | ({} if per_example else chosen("grad_square")):
        grads = jax.tree.map(_wide, jax.grad(of)(part, *batch))
        sums["grad"] = {path: grads[path] for path in chosen("grad")}
        if not per_example:
            sums["grad_square"] = {path: _squared(grads[path]) for path in chosen("grad_square")}
    if per_example and (part := chosen("grad_square")):
        sums["grad_square"] = _example_squares(of, part, batch)
        sums["terms"]["grad_square"] = jnp.float32(jax.tree.leaves(batch)[0].shape[0])
    if part := chosen("hessian_diagonal"):
        if found := [path for path, x in part.items() if jnp.iscomplexobj(x)]:
            raise ValueError(
                f"{found[0]}: 'hessian_diagonal' is that of real parameters, found {part[found[0]].dtype}; leave it "
                "out, or calibrate by 'grad_square'"
            )
        sums["hessian_diagonal"] = _hutchinson(of, part, batch, probes, key)
    return sums


def _wide(g: jax.Array) -> jax.Array:
    return g.astype(jnp.complex64 if jnp.iscomplexobj(g) else jnp.float32)


def _squared(g: jax.Array) -> jax.Array:
    return jnp.square(jnp.abs(g)) if jnp.iscomplexobj(g) else jnp.square(g)


def _example_squares(of: Callable[..., Any], part: dict[str, jax.Array], batch: tuple) -> dict[str, jax.Array]:
    """Summed squares of the gradients of single examples, one at a time, so that one gradient is in memory."""

    def add(total: dict[str, jax.Array], example: tuple) -> tuple[dict[str, jax.Array], None]:
        grads = jax.grad(of)(part, *jax.tree.map(lambda x: x[None], example))
        return {path: total[path] + _squared(_wide(g)) for path, g in grads.items()}, None

    zeros = {path: jnp.zeros(x.shape, jnp.float32) for path, x in part.items()}
    return jax.lax.scan(add, zeros, batch)[0]


def _hutchinson(
    of: Callable[..., Any], part: dict[str, jax.Array], batch: tuple, probes: int, key: jax.Array
) -> dict[str, jax.Array]:
    """The mean of ``v * Hv`` over random signs ``v`` (Hutchinson 1990), whose expectation is the diagonal of H."""

    def one(total: dict[str, jax.Array], key: jax.Array) -> tuple[dict[str, jax.Array], None]:
        keys = dict(zip(part, jax.random.split(key, len(part)), strict=True))
        signs = {path: jax.random.rademacher(keys[path], x.shape, x.dtype) for path, x in part.items()}
        products = jax.jvp(jax.grad(lambda p: of(p, *batch)), (part,), (signs,))[1]
        return {path: t + (signs[path] * products[path]).astype(jnp.float32) for path, t in total.items()}, None

    zeros = {path: jnp.zeros(x.shape, jnp.float32) for path, x in part.items()}
    total = jax.lax.scan(one, zeros, jax.random.split(key, probes))[0]
    return {path: t / probes for path, t in total.items()}


def means(sums: Sums) -> dict[str, dict[str, jax.Array]]:
    """``{path: {name: mean}}``."""
    found: dict[str, dict[str, jax.Array]] = {}
    for name, by_path in sums.items():
        for path, total in by_path.items() if name != "terms" else ():
            found.setdefault(path, {})[name] = total / sums["terms"][name]
    return found
