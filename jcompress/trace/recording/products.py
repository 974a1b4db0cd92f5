"""What products with parameters give, by the parameters' names: features of any function, for distillation."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jcompress.core import PyTree
from jcompress.trace.core import flow, walk
from jcompress.trace.core.flow import Step
from jcompress.trace.core.views import View
from jcompress.trace.recording import record, tape


class _Kept(tape.Tape):
    """Keeps the products themselves."""

    def __init__(self, found: tape.Found) -> None:
        super().__init__(found)
        self.products: dict[str, list[jax.Array]] = {}

    def product(self, step: Step, view: View, side: int, values: Sequence[Any], y: Any) -> None:
        self.products.setdefault(view.path, []).append(y)


def features(fn: Callable[..., Any], params: PyTree, *args: Any, match: str = ".*") -> tuple[Any, dict[str, Any]]:
    """Run ``fn(params, *args)``, and give what each product with a parameter gives, before any bias.

    The features that a student's losses compare, for linen, NNX and plain functions alike: nothing is changed in the
    model, and the names are the paths of the parameters. Pure and differentiable, under ``jit`` too. Derivatives are
    those of the equations: a custom rule around a parameter is taken in, and lost.

    Args:
      fn: any JAX function.
      params: a pytree of arrays.
      *args: the other arguments of ``fn``.
      match: a regular expression for the whole path of the parameters whose products are wanted.

    Returns:
      ``(outputs, {path: product})``; of a parameter used several times a tuple of products, in the order of use.

    Raises:
      ValueError: if nothing matches, or what matches is in no product outside loops. Give the features of layers that
        are scanned back from the loop.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.ones((2, 3)), "down": jnp.ones((3, 1))}
      >>> outputs, found = jc.trace.features(fn, params, jnp.ones((1, 2)), match="up")
      >>> found["up"].tolist()
      [[2.0, 2.0, 2.0]]
    """
    program = walk.program(fn, params, *args)
    chosen = [path for path in program.paths if re.fullmatch(match, path)]
    if not chosen:
        raise ValueError(f"features: {match!r} matches none of the parameters; there are {', '.join(program.paths)}")
    kept = _Kept(tape.Found(dict.fromkeys(chosen, frozenset())))
    body = flow.of_program(program, set(chosen), None)
    outs = record.evaluate(body, jax.tree.leaves((params, *args)), kept)
    products = {path: kept.products[path] for path in chosen if path in kept.products}
    if not products:
        raise ValueError(f"features: {', '.join(chosen)}: in no product outside loops; give the features back from fn")
    each = {path: found[0] if len(found) == 1 else tuple(found) for path, found in products.items()}
    return jax.tree.unflatten(program.out_tree, outs), each
