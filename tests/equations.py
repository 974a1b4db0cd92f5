"""One equation of every primitive that the table names, as small as it can be."""

import functools

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

W, X = jnp.ones((4, 6)), jnp.ones((6, 4))
IMAGE, KERNEL = jnp.ones((2, 5, 5, 4)), jnp.ones((3, 3, 4, 6))
SQUARE, KEY = jnp.eye(4), jax.random.key(0)
NUMBERS = ("NHWC", "HWIO", "NHWC")
ONE_ROW = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,))
ROWS_AT = lax.ScatterDimensionNumbers(
    update_window_dims=(1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,)
)
INDEX = jnp.array([[0], [2]])


def _unary(*names):
    return {name: (getattr(lax, name), W) for name in names}


def _binary(*names):
    return {name: (getattr(lax, name), W, W) for name in names}


def _integers(*names):
    return {name: (getattr(lax, at), jnp.ones((4, 6), jnp.int32), jnp.ones((4, 6), jnp.int32)) for name, at in names}


def _window(name, start):
    return {name: (functools.partial(lax.reduce_window, init_value=start[0], computation=start[1],
        window_dimensions=(1, 2), window_strides=(1, 1), padding="VALID"), W)}  # fmt: skip


def _scatter(name, fn):
    return {name: (lambda w, u: fn(w, INDEX, u, ROWS_AT), W, jnp.ones((2, 6)))}


def _on_devices(body, out=P("d")):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    return lambda w: jax.shard_map(body, mesh=mesh, in_specs=P("d"), out_specs=out, check_vma=False)(w)


def _placed():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    return jax.sharding.NamedSharding(mesh, P())


@jax.custom_jvp
def _with_jvp(x):
    return jnp.sin(x)


_with_jvp.defjvp(lambda x, t: (jnp.sin(x[0]), t[0]))


@jax.custom_vjp
def _with_vjp(x):
    return jnp.sin(x)


_with_vjp.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g,))


@jax.custom_batching.custom_vmap
def _with_vmap(x):
    return jnp.sin(x)


@_with_vmap.def_vmap
def _batched(axis_size, in_batched, x):
    return jnp.sin(x), in_batched[0]


EQUATIONS = {
    **_unary("abs", "ceil", "floor", "round", "sign", "neg", "square", "is_finite", "exp", "exp2", "expm1", "log"),
    **_unary("log1p", "sin", "cos", "tan", "tanh", "sinh", "cosh", "asin", "acos", "atan", "asinh", "acosh", "atanh"),
    **_unary("sqrt", "rsqrt", "cbrt", "logistic", "erf", "erfc", "erf_inv", "lgamma", "digamma", "bessel_i0e"),
    **_unary("bessel_i1e"),
    **_binary("add", "sub", "mul", "div", "rem", "max", "min", "pow", "atan2", "nextafter", "eq", "ne", "lt", "le"),
    **_binary("gt", "ge", "complex", "igamma", "igammac"),
    **_integers(("and", "bitwise_and"), ("or", "bitwise_or"), ("xor", "bitwise_xor"), ("shift_left", "shift_left")),
    **_integers(("shift_right_arithmetic",) * 2, ("shift_right_logical",) * 2),
    "not": (lax.bitwise_not, W > 0),
    "clz": (lax.clz, jnp.ones((4, 6), jnp.int32)),
    "population_count": (lax.population_count, jnp.ones((4, 6), jnp.int32)),
    "clamp": (lambda w: lax.clamp(0.0, w, 1.0), W),
    "reduce_precision": (lambda w: lax.reduce_precision(w, 5, 10), W),
    "select_n": (lambda w: lax.select_n(w > 0, w, w), W),
    **{name: (getattr(lax, name), W + 0j) for name in ("real", "imag", "conj")},
    "integer_pow": (lambda w: lax.integer_pow(w, 3), W),
    "convert_element_type": (lambda w: lax.convert_element_type(w, jnp.bfloat16), W),
    "copy": (jnp.copy, W),
    "stop_gradient": (lax.stop_gradient, W),
    "optimization_barrier": (lax.optimization_barrier, W),
    "device_put": (jax.device_put, W),
    "name": (lambda w: checkpoint_name(w, "w"), W),
    "transpose": (lambda w: lax.transpose(w, (1, 0)), W),
    "reshape": (lambda w: lax.reshape(w, (8, 3), dimensions=(1, 0)), W),
    "squeeze": (lambda w: lax.squeeze(w, (1,)), jnp.ones((4, 1))),
    "broadcast_in_dim": (lambda w: lax.broadcast_in_dim(w, (2, 4, 6), (1, 2)), W),
    "slice": (lambda w: lax.slice(w, (0, 1), (4, 5), (1, 2)), W),
    "split": (lambda w: lax.split(w, (2, 4), axis=1), W),
    "concatenate": (lambda w: lax.concatenate([w, w], 1), W),
    "pad": (lambda w: lax.pad(w, 0.0, ((0, 0, 0), (1, 1, 1))), W),
    "tile": (lambda w: jnp.tile(w, (1, 2)), W),
    "rev": (lambda w: lax.rev(w, (1,)), W),
    "iota": (lambda w: w + lax.broadcasted_iota(jnp.float32, (4, 6), 1), W),
    "bitcast_convert_type": (lambda w: lax.bitcast_convert_type(w, jnp.int32), W),
    "dot_general": (lambda w, x: lax.dot_general(w, x, (((1,), (0,)), ((), ()))), W, X),
    "conv_general_dilated": (
        lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NUMBERS), KERNEL, IMAGE),
    "ragged_dot_general": (lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 4])), jnp.ones((2, 4, 3)), X),
    **{f"reduce_{name}": (lambda w, name=name: getattr(lax, f"reduce_{name}")(w, (1,)), W)
        for name in ("sum", "max", "min", "prod")},
    **{f"reduce_{name}": (lambda w, name=name: getattr(lax, f"reduce_{name}")(w > 0, (1,)), W)
        for name in ("and", "or", "xor")},
    **{name: (lambda w, name=name: getattr(lax, name)(w, 1, jnp.int32), W) for name in ("argmax", "argmin")},
    **{name: (lambda w, name=name: getattr(lax, name)(w, 1), W)
        for name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")},
    "sort": (lambda w: lax.sort(w, dimension=1), W),
    "top_k": (lambda w: lax.top_k(w, 2), W),
    "approx_top_k": (lambda w: lax.approx_max_k(w, 2), W),
    "fft": (lambda w: lax.fft(w + 0j, "FFT", (6,)), W),
    **_window("reduce_window_max", (-jnp.inf, lax.max)),
    **_window("reduce_window_min", (jnp.inf, lax.min)),
    **_window("reduce_window_sum", (0.0, lax.add)),
    **_window("reduce_window", (1.0, lax.mul)),
    "gather": (lambda w: lax.gather(w, INDEX, ONE_ROW, (1, 6)), W),
    "dynamic_slice": (lambda w, i: lax.dynamic_slice(w, (i, 0), (2, 6)), W, 1),
    "dynamic_update_slice": (lambda w, u: lax.dynamic_update_slice(w, u, (1, 0)), W, jnp.ones((2, 6))),
    **_scatter("scatter", lax.scatter),
    **_scatter("scatter-add", lax.scatter_add),
    **_scatter("scatter-mul", lax.scatter_mul),
    **_scatter("scatter-max", lax.scatter_max),
    **_scatter("scatter-min", lax.scatter_min),
    "random_bits": (lambda w, k: w * jax.random.bits(k, (4, 6), jnp.uint32), W, KEY),
    "random_split": (lambda w, k: jax.random.split(k, 3), W, KEY),
    "random_wrap": (lambda w, k: jax.random.wrap_key_data(k), W, jax.random.key_data(KEY)),
    "random_unwrap": (lambda w, k: jax.random.key_data(k), W, KEY),
    "random_fold_in": (lambda w, k: jax.random.fold_in(k, 1), W, KEY),
    "random_seed": (lambda w, i: jax.random.key(i), W, 1),
    "random_gamma": (lambda w, k: jax.random.gamma(k, w), W, KEY),
    "cholesky": (lax.linalg.cholesky, SQUARE),
    "eigh": (lax.linalg.eigh, SQUARE),
    "lu": (lax.linalg.lu, SQUARE),
    "qr": (lax.linalg.qr, SQUARE),
    "svd": (lax.linalg.svd, SQUARE),
    "triangular_solve": (lambda w, x: lax.linalg.triangular_solve(w, x, left_side=True), SQUARE, jnp.ones((4, 2))),
    "eig": (lax.linalg.eig, SQUARE),
    "hessenberg": (lax.linalg.hessenberg, SQUARE),
    "householder_product": (lambda w: lax.linalg.householder_product(w, jnp.ones(4)), SQUARE),
    "schur": (lax.linalg.schur, SQUARE),
    "tridiagonal": (lax.linalg.tridiagonal, SQUARE),
    "tridiagonal_solve": (lambda w, x: lax.linalg.tridiagonal_solve(w[0], w[1], w[2], x), SQUARE, jnp.ones((4, 2))),
    "lu_pivots_to_permutation": (lambda w, i: lax.linalg.lu_pivots_to_permutation(i, 4), W, jnp.arange(4)),
    "custom_linear_solve": (lambda w, x: jnp.linalg.solve(w, x), SQUARE, jnp.ones((4, 2))),
    "debug_callback": (lambda w: (jax.debug.callback(lambda x: None, w), w)[1], W),
    "pure_callback": (lambda w: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((4, 6), jnp.float32), w), W),
    "psum": (_on_devices(lambda w: lax.psum(w, "d")), W),
    "pmax": (_on_devices(lambda w: lax.pmax(w, "d")), W),
    "pmin": (_on_devices(lambda w: lax.pmin(w, "d")), W),
    "ppermute": (_on_devices(lambda w: lax.ppermute(w, "d", [(0, 0)])), W),
    "all_gather": (_on_devices(lambda w: lax.all_gather(w, "d")), W),
    "all_to_all": (_on_devices(lambda w: lax.all_to_all(w[None], "d", 0, 1)), W),
    "reduce_scatter": (_on_devices(lambda w: lax.psum_scatter(w, "d", tiled=True)), W),
    "axis_index": (_on_devices(lambda w: w + lax.axis_index("d")), W),
    "shard_map": (_on_devices(jnp.sin), W),
    "reshard": (lambda w: jax.sharding.reshard(w, _placed()), W),
    "sharding_constraint": (lambda w: lax.with_sharding_constraint(w, _placed()), W),
    "io_callback": (lambda w: (jax.experimental.io_callback(lambda x: None, None, w), w)[1], W),
    "rng_bit_generator": (lambda w, k: lax.rng_bit_generator(k, (4, 6)), W, jnp.zeros(4, jnp.uint32)),
    "rng_uniform": (lambda w: w + lax.rng_uniform(0.0, 1.0, (4, 6)), W),
    "polygamma": (lambda w: lax.polygamma(w, w), W),
    "zeta": (lambda w: lax.zeta(w, w), W),
    "regularized_incomplete_beta": (lambda w: lax.betainc(w, w, w), W),
    "igamma_grad_a": (lambda w: lax.igamma_grad_a(w, w), W),
    "composite": (lax.composite(jnp.sin, "own.sin"), W),
    "add_any": (jax.grad(lambda w: (jnp.sin(w) * jnp.cos(w)).sum()), W),
    "jit": (jax.jit(jnp.sin), W),
    "remat2": (jax.checkpoint(jnp.sin), W),
    "custom_jvp_call": (_with_jvp, W),
    "custom_vjp_call": (_with_vjp, W),
    "custom_vmap_call": (_with_vmap, W),
    "scan": (lambda w: lax.scan(lambda c, x: (c, x), 0, w), W),
    "while": (lambda w: lax.while_loop(lambda c: c.sum() < 0, lambda c: c * 2, w), W),
    "cond": (lambda w, i: lax.cond(i, jnp.sin, jnp.cos, w), W, True),
}  # fmt: skip
