"""Operations of one equation, counted as XLA's cost analysis counts them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jax.extend import core as jax_core

MOVES = {
    "reshape", "broadcast_in_dim", "transpose", "slice", "squeeze", "expand_dims", "concatenate", "stack", "split",
    "pad", "gather", "dynamic_slice", "dynamic_update_slice", "iota", "copy", "copy_p", "rev", "sharding_constraint",
    "device_put", "stop_gradient", "optimization_barrier", "bitcast_convert_type", "random_wrap", "random_unwrap",
    "mesh_cast", "reshard", "pvary", "pcast", "name", "scatter", "broadcast", "create_token", "axis_index", "real",
    "imag", "complex", "empty",
}  # fmt: skip
"""Primitives that only move data."""

TRANSCENDENTAL = {
    "exp", "exp2", "log", "log1p", "expm1", "tanh", "sqrt", "rsqrt", "cbrt", "erf", "sin", "cos", "tan", "asin",
    "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "pow", "atan2", "logistic", "erfc", "erf_inv",
    "lgamma", "digamma",
}  # fmt: skip
"""Primitives that XLA counts as transcendental, one an element."""

POLYNOMIALS = {"logistic": 3, "erfc": 60, "erf_inv": 37, "lgamma": 52, "digamma": 73, "random_bits": 47}
"""Operations an element of functions that XLA writes out."""


def _size(v: Any) -> int:
    return math.prod(v.aval.shape)


def _shape(v: Any) -> tuple[int, ...]:
    return v.aval.shape


def multiply_adds_of_dot(eqn: jax_core.JaxprEqn) -> int:
    """Multiply-adds of a ``dot_general``."""
    (contract, _), _ = eqn.params["dimension_numbers"]
    shape = _shape(eqn.invars[0])
    return _size(eqn.outvars[0]) * math.prod(shape[d] for d in contract)


def multiply_adds_of_convolution(eqn: jax_core.JaxprEqn, padding: bool) -> int:
    """Multiply-adds of a convolution, those with padding (and holes of a dilated input) included or not."""
    p = eqn.params
    numbers = p["dimension_numbers"]
    lhs, rhs, out = map(_shape, (*eqn.invars, eqn.outvars[0]))
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


def operations(eqn: jax_core.JaxprEqn) -> tuple[int, int]:
    """Floating-point or integer operations of an equation, and transcendental ones, which XLA counts apart."""
    name, n = eqn.primitive.name, sum(map(_size, eqn.outvars))
    read = _size(eqn.invars[0]) if eqn.invars else 0
    if name == "dot_general":
        return 2 * multiply_adds_of_dot(eqn), 0
    if name == "conv_general_dilated":
        return 2 * multiply_adds_of_convolution(eqn, padding=False), 0
    if name in MOVES:
        return 0, 0
    if name in TRANSCENDENTAL:
        return POLYNOMIALS.get(name, 0) * n, n
    if name in POLYNOMIALS:
        return POLYNOMIALS[name] * n, 0
    if name == "integer_pow":
        return _power(abs(eqn.params["y"]), eqn.params["y"] < 0) * n, 0
    if name.startswith("reduce_window"):
        window = math.prod(eqn.params["window_dimensions"])
        return (window - 1) * n, 0
    if name in ("argmax", "argmin"):
        return 9 * (read - n), 0
    if name.startswith("reduce_") and name != "reduce_precision":
        return max(read - n, 0), 0
    if name.startswith("cum"):
        return n, 0
    if name in ("sort", "top_k", "approx_top_k"):
        return read * max(math.ceil(math.log2(max(read, 1))), 1), 0
    if name.startswith("scatter"):
        return _size(eqn.invars[2]), 0
    return n, 0


def _power(y: int, inverted: bool) -> int:
    """Products of a power by repeated squaring, and a division."""
    return max(y.bit_length() - 1, 0) + max(y.bit_count() - 1, 0) + inverted
