"""How much each position of an activation matters to a loss, parameter by parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jcompress.core import PyTree
from jcompress.trace.core import flow, walk
from jcompress.trace.recording import record, tape
from jcompress.trace.recording.sites import Sites


def position_weights(loss: Callable[..., Any], params: PyTree, *args: Any) -> dict[str, list[jax.Array]]:
    """How much each position of what meets a parameter matters: the squared gradient of a loss at the product.

    For ``y = x W`` the weight of position ``t`` is the mean over outputs of ``(dL / dy_t)**2``, divided by its mean
    over positions. Gram matrices weighed so are those of the loss and no longer of the outputs: to second order a
    change ``dW`` raises the loss by ``tr(dW^T gram dW)``, outputs taken as alike. What all others attend to, such as
    the first token of a text, counts in its value for as much as it is read, and elsewhere for next to nothing.
    Guided quantization goes by it (Kim et al. 2025, arXiv:2505.07004), and rotate-scale-quantize by a like measure
    (Sung et al. 2025, arXiv:2503.01820). Costs one gradient of the loss.

    Args:
      loss: ``loss(params, *args)``, a scalar. A function of arrays becomes one by the sum of its outputs times random
        signs.
      params: a pytree of arrays.
      *args: the other arguments.

    Returns:
      ``{path: [weights of its first product, of its second, ...]}``, what ``where=`` of :func:`jcompress.calibrate` and
      :func:`observe` takes: float32, in front the turns of loops around, then the axes of the product, outputs of size
      1. For a function whose products are those of the loss, or for a part of it with the paths that the part has.

    Raises:
      ValueError: if the loss is no scalar.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> loss = lambda params, x: jnp.sum(x[:, :1] * (x @ params["w"]))
      >>> x = jnp.array([[0.0, 1.0], [2.0, 4.0]])
      >>> weights = jc.trace.position_weights(loss, {"w": jnp.ones((2, 3))}, x)
      >>> weights["w"][0].tolist()
      [[0.0], [2.0]]
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3))}, [x], where=weights)
      >>> stats["w"].gram.tolist()
      [[8.0, 16.0], [16.0, 32.0]]
    """
    program = walk.program(loss, params, *args)
    shapes = [walk.aval(v).shape for v in program.closed.jaxpr.outvars]
    if shapes != [()]:
        raise ValueError(
            f"position_weights: found a loss of shapes {shapes}, expected one scalar; sum it, or take its mean"
        )
    body = flow.of_program(program, set(program.paths), None)
    values = jax.tree.leaves((params, *args))

    def run(sites: Sites) -> Any:
        return record.evaluate(body, values, tape.Tape(tape.Found({}, sites=sites)))[0]

    asked = Sites(mark=_marked)
    jax.eval_shape(lambda: run(asked))
    marks = {path: [jnp.zeros(shape, jnp.float32) for shape in shapes] for path, shapes in asked.shapes.items()}
    found = jax.grad(lambda marks: run(Sites(marks, _marked)))(marks)
    return {
        path: [_relative(w, loops) for w, loops in zip(found[path], asked.loops[path], strict=True)] for path in found
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _marked(axes: tuple[int, ...], y: Any, mark: Any) -> Any:
    """``y``, and as derivative by the mark the mean of the squared derivative by ``y`` over some axes."""
    return y


def _forward(axes: tuple[int, ...], y: Any, mark: Any) -> tuple[Any, None]:
    return y, None


def _backward(axes: tuple[int, ...], kept: None, g: Any) -> tuple[Any, Any]:
    return g, jnp.mean(jnp.square(jnp.abs(g).astype(jnp.float32)), axes, keepdims=True)


_marked.defvjp(_forward, _backward)


def _relative(weights: jax.Array, loops: int) -> jax.Array:
    """To a mean of 1 over positions, for each turn of the loops around; 1 where nothing matters."""
    mean = weights.mean(tuple(range(loops, weights.ndim)), keepdims=True)
    return jnp.where(mean > 0, weights / jnp.where(mean > 0, mean, 1), 1)
