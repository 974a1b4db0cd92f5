"""The table of primitives: one row each, and all readings go by it.

A row says how a primitive ties dimensions and runs at other sizes (``rule``: coupling and shrinking), what its results
have to do with the parameters (``flow``: calibration and execution), and what it costs (``count``). To add a primitive,
add a row.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.extend import core as jax_core

from jcompress.trace.core import bodies, loops, places
from jcompress.trace.core.contraction import Convolution, Dot, Ragged
from jcompress.trace.core.kinds import Collective, Contraction, Flow, Linear, Lookup, Opaque
from jcompress.trace.core.layouts import (
    BROADCAST,
    RESHAPE,
    REVERSE,
    SAME,
    SLICE,
    SQUEEZE,
    TILE,
    Cast,
    Permutation,
    Pieces,
    SideBySide,
)
from jcompress.trace.costs import operations as ops
from jcompress.trace.coupled.frames import Rule
from jcompress.trace.coupled.rules import (
    calls,
    control,
    derivatives,
    joins,
    linear,
    lookups,
    moves,
    selections,
    sums,
)
from jcompress.trace.coupled.rules.elementwise import Elementwise, Equal, Identity, Zero
from jcompress.trace.recording import meetings


@dataclasses.dataclass(frozen=True)
class Row:
    """What a primitive means.

    Attributes:
      rule: for dimensions: what it ties, what of it can be cut, and how it runs at other sizes.
      flow: for parameters: what its results have to do with them, and so how it is executed on nodes.
      count: its operations, and its transcendental ones.
    """

    rule: Rule
    flow: Flow = Flow()
    count: ops.Count = ops.ONE


def row(eqn: jax_core.JaxprEqn) -> Row:
    """That of an equation; a primitive without one keeps whole what it meets, and its results are computed."""
    return ROWS.get(eqn.primitive.name, UNREAD)


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


CARRIED = _words(
    # numbers and their precision
    "accuracy algorithm bit_width dtype exponent_bits fft_type impl index_dtype input_dtype log_space mantissa_bits",
    "new_dtype out_dtype precision preferred_element_type rounding_method weak_type",
    # order along an axis that stays whole
    "aggregate_to_topk conjugate_a indices_are_sorted is_max_k is_stable k lower num_keys permutation_size",
    "perturb_singular recall_target reduction_input_size_override reverse transpose_a unique_indices unit_diagonal",
    # what linear algebra gives beside
    "compute_left_eigenvectors compute_right_eigenvectors compute_schur_vectors compute_uv enable_eigvec_derivs",
    "full_matrices implementation pivoting select_callable sort_eig_vals sort_eigenvalues subset_by_index use_magma",
    # devices
    "axis_size check_vma concrete_mesh context_mesh copy_semantics devices dst_sharding layout mesh out_sharding",
    "perm sharding srcs unconstrained_dims",
    # how and under which name it is compiled, and derivatives, which its rule takes whole
    "attributes bwd callback compiler_options_kvs ctx_mesh differentiated donated_invars effect fwd_jaxpr_thunk",
    "in_layouts in_shardings in_tree inline jvp_jaxpr_fun keep_unused name num_consts ordered out_layouts",
    "out_shardings out_tree out_trees partitioned policy prevent_cse result_avals rule unroll update_consts",
    "update_jaxpr version",
)
"""Parameters that move no entry and change no axis: they stay as they are when an equation runs anew."""

UNREAD = Row(Rule(), Opaque(), ops.UNKNOWN)

_plain = Elementwise()
_moved = Row(Identity(), SAME, ops.NONE)
_summed_over_devices = Row(Identity(), Collective(same=True))
_fixed = Row(Rule(), Opaque())
_unread = UNREAD.rule
_call, _scan, _while, _cond = bodies.Call(), loops.Scan(), loops.While(), loops.Cond()
_remat, _mesh, _custom = bodies.Remat(), bodies.ShardMap(), bodies.Custom()
_window = Row(moves.Window(), Opaque(places.resized), ops.window)
_observed = Row(calls.Observed(), Opaque(), ops.NONE)
_matrices = Row(linear.Matrices(), Opaque(), ops.UNKNOWN)
_extremum = Row(moves.Choice("axes", drops=True, holds_zero=False), Opaque(places.reduced), ops.extremum)
_drawn = Row(joins.Drawn(), Opaque())


def _all(names: str, row: Row) -> dict[str, Row]:
    """The same row for several primitives."""
    return dict.fromkeys(names.split(), row)


def _each(
    names: str, zero: Zero = "computed", count: ops.Count = ops.ONE, flow: Flow = Flow(places.entry_by_entry)
) -> dict[str, Row]:
    """Rows of primitives that compute entry by entry."""
    return _all(names, Row(Elementwise(zero), flow, count))


def _reduce(combine: sums.Combine, neutral: bool = False) -> Row:
    return Row(sums.Reduce(combine, neutral), Flow(places.reduced), ops.reduction)


def _along(axes: moves.Axes, holds_zero: bool = True, count: ops.Count = ops.ONE) -> Row:
    placed = places.along(axes, keeps=True) if isinstance(axes, str) else places.any_how
    return Row(moves.Along(axes, holds_zero=holds_zero), Opaque(placed), count)


def _choice(axis: str) -> Row:
    return Row(moves.Choice(axis), Opaque(places.along(axis, keeps=False)), ops.order)


def _scatters(names: str, by: lookups.By) -> dict[str, Row]:
    return _all(names, Row(lookups.Scatter(by), Flow(places.of_scatter), ops.updates))


def _product(rule: Rule, of: type[Dot] | type[Convolution], meeting: meetings.Meet) -> Row:
    return Row(rule, Contraction(of.of, meeting), lambda eqn: (2 * of.of(eqn).multiply_adds(padding=False), 0))


ROWS: dict[str, Row] = {
    # Entry by entry
    **_each("abs bessel_i0e bessel_i1e ceil clamp clz conj eq_to floor ge gt igamma igammac is_finite"),
    **_each("le le_to lt lt_to max min ne nextafter not or population_count reduce_precision rem round shift_left"),
    **_each("shift_right_arithmetic shift_right_logical sign square xor"),
    **_each("add add_any neg sub", flow=Linear()),
    **_each("and", zero="any"),
    **_each("mul", zero="any", flow=Linear()),
    **_each("div", zero="first", flow=Linear(slice(1))),
    **_each("select_n", zero="cases", flow=Linear(slice(1, None), together=True)),
    **_each("complex", count=ops.NONE),
    **_each("imag real"),
    **_each("integer_pow", count=ops.power),
    **_each("acos acosh asin asinh atan atan2 atanh cbrt cos cosh erf exp exp2 expm1 log", count=ops.TRANSCENDENTAL),
    **_each("log1p pow rsqrt sin sinh sqrt tan tanh", count=ops.TRANSCENDENTAL),
    **_each("logistic", count=ops.each(3, 1)),
    **_each("erf_inv", count=ops.each(37, 1)),
    **_each("lgamma", count=ops.each(52, 1)),
    **_each("erfc", count=ops.each(60, 1)),
    **_each("digamma", count=ops.each(73, 1)),
    **_each("igamma_grad_a mulhi polygamma random_gamma_grad regularized_incomplete_beta zeta"),
    "eq": Row(Equal()),
    "convert_element_type": Row(_plain, Cast(), ops.conversion),
    # What stays as it is, laid out anew
    **_all("copy copy_p device_put mesh_cast name optimization_barrier pcast pvary reshard", _moved),
    **_all("layout_constraint sharding_constraint stop_gradient with_memory_space_constraint", _moved),
    "transpose": Row(moves.Transpose(), Permutation(), ops.NONE),
    "reshape": Row(moves.Reshape(), RESHAPE, ops.NONE),
    "expand_dims": Row(_unread, RESHAPE, ops.NONE),
    "squeeze": Row(moves.Squeeze(), SQUEEZE, ops.NONE),
    "broadcast_in_dim": Row(moves.Broadcast(), BROADCAST, ops.NONE),
    "slice": Row(moves.Slice(), SLICE, ops.NONE),
    "split": Row(moves.Split(), Pieces(), ops.NONE),
    "concatenate": Row(joins.Concatenate(), SideBySide(), ops.NONE),
    "stack": Row(joins.Stack(), Flow(), ops.NONE),
    "pad": Row(joins.Pad(), Flow(places.padded), ops.NONE),
    "tile": Row(moves.Tile(), TILE, ops.NONE),
    "rev": Row(selections.Reverse(), REVERSE, ops.NONE),
    "iota": Row(joins.Iota(), Flow(), ops.NONE),
    "bitcast_convert_type": Row(moves.Trailing(), Opaque(), ops.NONE),
    "unstack": Row(moves.Unstack(), Opaque(), ops.NONE),
    **_all("broadcast empty", Row(_unread, Opaque(), ops.NONE)),
    # Products
    "dot_general": _product(sums.Dot(), Dot, meetings.of_dot),
    "conv_general_dilated": _product(sums.Convolution(), Convolution, meetings.of_convolution),
    "ragged_dot_general": _product(sums.RaggedDot(), Ragged, meetings.of_ragged),
    # Over an axis
    "reduce_sum": _reduce(lambda total, x, n: total + x * jnp.asarray(n, x.dtype), neutral=True),
    "reduce_max": _reduce(lambda total, x, n: jnp.maximum(total, x)),
    "reduce_min": _reduce(lambda total, x, n: jnp.minimum(total, x)),
    "reduce_prod": _reduce(lambda total, x, n: total * x**n),
    "reduce_and": _reduce(lambda total, x, n: total & x),
    "reduce_or": _reduce(lambda total, x, n: total | x),
    "reduce_xor": Row(_unread, Opaque(), ops.reduction),
    **_all(
        "argmax argmin", Row(moves.Choice("axes", drops=True, holds_zero=False), Opaque(places.reduced), ops.extremum)
    ),
    **_all("cumsum cumprod cummax cummin", _along("axis")),
    "cumlogsumexp": _along("axis", holds_zero=False),
    "sort": Row(moves.Along("dimension"), Flow(places.along("dimension", keeps=False)), ops.order),
    "top_k": _choice("axis"),
    "approx_top_k": _choice("reduction_dimension"),
    "fft": _along(lambda params: range(-len(params["fft_lengths"]), 0), count=ops.fourier),
    **_all("reduce_window_max reduce_window_min reduce_window_sum", _window),
    "reduce_window": Row(_unread, Opaque(), ops.window),
    # At places that are computed
    "gather": Row(lookups.Gather(), Lookup(counts=True), ops.NONE),
    "dynamic_slice": Row(lookups.DynamicSlice(), Lookup(), ops.NONE),
    "dynamic_update_slice": Row(lookups.DynamicUpdateSlice(), Flow(places.of_update), ops.NONE),
    "scatter": Row(lookups.Scatter("one"), Flow(places.of_scatter), ops.NONE),
    **_scatters("scatter-add scatter_add scatter-sub scatter_sub", "sum"),
    **_scatters("scatter-mul scatter_mul", "product"),
    **_scatters("scatter-max scatter_max scatter-min scatter_min", "extremum"),
    # Random numbers
    "random_bits": Row(joins.Drawn(), Flow(), ops.each(47)),
    **_all("random_split rng_bit_generator rng_uniform", _drawn),
    **_all("random_wrap random_unwrap", Row(moves.Trailing(), Opaque(), ops.NONE)),
    "random_fold_in": Row(_plain),
    **_all("random_gamma threefry2x32", Row(Rule())),
    "random_seed": _fixed,
    # Linear algebra, and what talks to the outside
    **_all("cholesky eig eigh hessenberg householder_product lu qr schur svd tridiagonal", _matrices),
    "lu_pivots_to_permutation": Row(linear.Matrices(trailing=1), Opaque()),
    "triangular_solve": Row(linear.Solve(), Opaque(), ops.UNKNOWN),
    "tridiagonal_solve": Row(linear.Solve(trailing=1), Opaque(), ops.UNKNOWN),
    "custom_linear_solve": Row(linear.LinearSolve(), Opaque(), ops.UNKNOWN),
    **_all("check debug_callback debug_print dce_sink inspect_sharding", _observed),
    "io_callback": Row(calls.Callback(), Opaque(), ops.NONE),
    "pure_callback": Row(Rule(), Opaque(), ops.UNKNOWN),
    "create_token": Row(Rule(), Opaque(), ops.NONE),
    # Between devices
    **_all("pmax pmin psum psum2 psum_invariant", _summed_over_devices),
    "ppermute": Row(Identity(), Collective()),
    "pbroadcast": Row(Identity(), Opaque()),
    **_all("all_gather all_gather_invariant", Row(_unread, Collective(same=True))),
    **_all("all_to_all pgather psum_scatter reduce_scatter", Row(_unread, Collective())),
    "axis_index": Row(Rule(), Collective(), ops.NONE),
    # What holds bodies of equations
    **_all("closed_call composite core_call custom_vmap_call jit pjit", Row(calls.Call(_call), _call)),
    **_all("checkpoint remat remat2", Row(calls.Remat(_remat), _remat)),
    "custom_jvp_call": Row(derivatives.CustomJVP(_custom), _custom),
    "custom_jvp_call_jaxpr": Row(calls.Call(_custom), _custom),
    **_all("custom_vjp_call custom_vjp_call_jaxpr", Row(derivatives.CustomVJP(_custom), _custom)),
    "scan": Row(control.Scan(_scan), _scan),
    "while": Row(control.While(_while), _while),
    "cond": Row(control.Cond(_cond), _cond),
    "shard_map": Row(control.ShardMap(_mesh), _mesh),
}
