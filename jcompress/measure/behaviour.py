"""What a compressed network does beside the dense one: how often both agree, and what disturbed inputs cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np


def agreement(
    outputs: jax.Array, dense: jax.Array, how: Literal["argmax", "strict", "epsilon"] = "argmax", epsilon: float = 0.0
) -> jax.Array:
    """The part of positions at which two networks give the same.

    ``"argmax"``: the same class; ``"strict"``: the same numbers, to the bit, NaN included; ``"epsilon"``: every number
    within ``epsilon``. Accuracy alone does not tell how many answers changed, for better and for worse (Dutta et al.
    2024, arXiv:2407.09141).

    Args:
      outputs: (..., classes), of the compressed network.
      dense: likewise, of the dense one.
      how: see above.
      epsilon: a distance, for ``"epsilon"``.

    Returns:
      A float32 scalar in [0, 1]; 1 of no positions.

    Raises:
      ValueError: for shapes that differ, another ``how``, or a negative ``epsilon``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress import measure
      >>> a, b = jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.array([[1.0, 2.0], [3.0, 0.1]])
      >>> [float(measure.agreement(a, b, how, 0.2)) for how in ("argmax", "strict", "epsilon")]
      [1.0, 0.5, 1.0]
    """
    if jnp.shape(outputs) != jnp.shape(dense) or jnp.ndim(outputs) < 1:
        raise ValueError(f"agreement: found shapes {jnp.shape(outputs)} and {jnp.shape(dense)}, expected two alike")
    if how not in ("argmax", "strict", "epsilon") or epsilon < 0:
        raise ValueError(f"agreement: found how={how!r}, epsilon={epsilon}; use 'argmax', 'strict' or 'epsilon', >= 0")
    if how == "argmax":
        same = jnp.argmax(outputs, -1) == jnp.argmax(dense, -1)
    elif how == "strict":
        same = jnp.all((outputs == dense) | (jnp.isnan(outputs) & jnp.isnan(dense)), -1)
    else:
        same = jnp.all(jnp.abs(outputs - dense) <= epsilon, -1)
    return jnp.where(same.size > 0, jnp.sum(same) / max(same.size, 1), 1.0)


def robustness(
    score: Callable[[Any], float],
    inputs: Any,
    disturb: Callable[[Any, float, jax.Array], Any],
    strengths: Sequence[float],
    *,
    key: jax.Array,
    repeats: int = 1,
) -> np.ndarray:
    """Scores on disturbed inputs, for each strength: the curve that a compressed network is compared on.

    Args:
      score: ``score(inputs) -> float``, of one network.
      inputs: any pytree of arrays.
      disturb: ``disturb(inputs, strength, key)``: :func:`add_noise`, :func:`shift`, or any other.
      strengths: what to try, in the unit of ``disturb``.
      key: every network that is given the same key meets the same disturbances.
      repeats: draws for each strength.

    Returns:
      float64, (strengths, repeats).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress import measure
      >>> x = jnp.ones((100, 4))
      >>> curve = measure.robustness(lambda x: float((x > 0).mean()), x, measure.add_noise, [0.0, 2.0],
      ...                            key=jax.random.key(0))
      >>> float(curve[0, 0]), bool(curve[1, 0] < 0.8)
      (1.0, True)
    """
    keys = jax.random.split(key, (len(strengths), repeats))
    rows = [[float(score(disturb(inputs, x, k))) for k in row] for x, row in zip(strengths, keys, strict=True)]
    return np.array(rows, np.float64).reshape(len(strengths), repeats)


def add_noise(inputs: Any, strength: float, key: jax.Array) -> Any:
    """Inputs with Gaussian noise of this deviation; integers stay as they are.

    Args:
      inputs: any pytree of arrays.
      strength: the standard deviation, in the unit of the inputs.
      key: for the noise.

    Returns:
      A pytree like ``inputs``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress import measure
      >>> measure.add_noise(jnp.zeros((2, 2)), 0.5, jax.random.key(0)).shape
      (2, 2)
    """
    leaves, structure = jax.tree.flatten(inputs)
    keys = jax.random.split(key, max(len(leaves), 1))
    moved = [
        x + jnp.asarray(strength, x.dtype) * jax.random.normal(k, x.shape, x.dtype)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else x
        for x, k in zip(leaves, keys, strict=False)
    ]
    return jax.tree.unflatten(structure, moved)


def shift(images: jax.Array, strength: float, key: jax.Array) -> jax.Array:
    """Images moved by up to so many pixels along both axes, all by the same; zeros come in.

    Args:
      images: (..., height, width, channels).
      strength: the most pixels, rounded.
      key: draws the two distances, uniformly.

    Returns:
      An array like ``images``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress import measure
      >>> x = jnp.ones((1, 4, 4, 1))
      >>> float(measure.shift(x, 0, jax.random.key(0)).sum()), measure.shift(x, 3, jax.random.key(0)).shape
      (16.0, (1, 4, 4, 1))
    """
    most = round(strength)
    moves = jax.random.randint(key, (2,), -most, most + 1)
    for axis, by in zip((-3, -2), moves, strict=True):
        places = jnp.arange(images.shape[axis]) - by
        inside = (places >= 0) & (places < images.shape[axis])
        images = jnp.take(images, jnp.clip(places, 0, images.shape[axis] - 1), axis)
        images = jnp.where(inside.reshape(-1, *[1] * (-axis - 1)), images, jnp.zeros((), images.dtype))
    return images
