"""What a method is about to read of calibration: that it is finite, and how much of it was never seen."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import CalibrationWarning, Context
from jcompress.numeric.damping import cholesky, damped
from jcompress.numeric.processes import whole


def check(path: str, method: Any, context: Context) -> None:
    """Warn of inputs that calibration never saw, and of a damping that has to be raised; nothing where it is traced.

    Raises:
      ValueError: for statistics that are not finite.
    """
    with jax.ensure_compile_time_eval():  # statistics that are known stay so where the leaf is traced
        _check(path, method, context)


def _check(path: str, method: Any, context: Context) -> None:
    read = {need.removeprefix("stats.") for need in core.needs(method) if need.startswith("stats.")}
    read = {name for name in read if getattr(context.stats, name, None) is not None}
    found = {name: whole(energy) for name in read if (energy := _energy(name, context)) is not None}
    for name, energy in found.items():
        if not np.isfinite(energy).all():
            raise ValueError(
                f"{path}: found {int((~np.isfinite(energy)).sum())} NaN or infinite entries in the statistic {name!r}, "
                "expected finite ones; calibrate on inputs that are finite, and whose squares are inside float32"
            )
    unseen = max(found.values(), key=lambda x: float((x == 0).mean()) if x.size else 0.0, default=np.ones(1))
    if unseen.size and (unseen == 0).any():
        _warn_unseen(path, unseen == 0)
    if "gram" in found and found["gram"].size:
        for damping in dict.fromkeys(_dampings(method)):
            _warn_raised(path, context.stats.gram, found["gram"], damping)


def _energy(name: str, context: Context) -> Any:
    """Of each input, (..., k): the diagonal of the Gram matrix, norms, or the greatest of what is known by weight."""
    x = getattr(context.stats, name)
    if not core.is_concrete(x):
        return None
    if name == "gram":
        return jnp.diagonal(x, axis1=-2, axis2=-1).real  # of complex inputs too
    if name in ("norm", "square"):
        return x
    by_weight = name in ("grad_square", "hessian_diagonal") and jnp.ndim(x) > 1
    return jnp.max(jnp.abs(x), axis=-1) if by_weight else None


def _warn_unseen(path: str, unseen: np.ndarray) -> None:
    layers = unseen.reshape(-1, unseen.shape[-1]).all(axis=1)
    whole = f", {layers.sum()} of {layers.size} layers or experts wholly" if layers.size > 1 and layers.any() else ""
    warnings.warn(
        f"{path}: calibration never saw {unseen.mean():.3g} of the inputs{whole}; there the weights alone decide. "
        "Calibrate on data that reaches them, or leave it so",
        CalibrationWarning,
        stacklevel=2,
    )


def _dampings(method: Any) -> list[float]:
    """What the method and those that it is made of add to the diagonal, as far as it is known."""
    # Roots of eigenvectors take any Gram matrix as damped as was asked.
    own: Any = None if getattr(method, "roots", "cholesky") == "eigenvectors" else getattr(method, "damping", None)
    known = own is not None and core.is_concrete(own) and np.ndim(own) == 0
    inner = [damping for part in core.wrapped(method) for damping in _dampings(part)]
    return [float(own), *inner] if known else inner


def _warn_raised(path: str, gram: Any, energy: np.ndarray, damping: float) -> None:
    """Warn if a Gram matrix cannot be factorized as damped as was asked. Most are seen to hold by their diagonal."""
    k = energy.shape[-1]
    largest, mean = energy.max(axis=-1), energy.mean(axis=-1, dtype=np.float64)
    if (damping * mean >= 16 * np.finfo(np.float32).eps * k**0.5 * largest).all():
        return
    raised = float(_raised(jnp.real(gram).astype(jnp.float32).reshape(-1, k, k), damping))
    if raised > 0:
        warnings.warn(
            f"{path}: its Gram matrix is singular with damping={damping:.3g}, and {damping + raised:.3g} was used; "
            "calibrate on more data, or ask for as much",
            CalibrationWarning,
            stacklevel=2,
        )


@jax.jit
def _raised(gram: jax.Array, damping: Any) -> jax.Array:
    return jnp.max(jax.lax.map(lambda g: cholesky(damped(g, damping)[::-1, ::-1])[1], gram))
