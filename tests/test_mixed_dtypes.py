"""Products of operands of different dtypes: execution gives what the equation's own promotion gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def far(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = (np.asarray(x).astype(np.complex128) for x in (a, b))
    return np.abs(a - b).max() / np.abs(b).max()


METHODS = [
    None,
    jc.quantize.Int(bits=8),
    jc.quantize.NF4(group_size=None),
    jc.factorize.SVD(rank=2),
    jc.prune.Magnitude(0.5),
    jc.residual(jc.quantize.Int(bits=4), jc.factorize.SVD(rank=1)),
]
PAIRS = [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32"), ("bfloat16", "bfloat16")]


@pytest.mark.parametrize("dtypes", PAIRS, ids="-".join)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_real(method, dtypes):
    params, x = {"w": normal(0, 16, 8, dtype=dtypes[1])}, normal(1, 4, 16, dtype=dtypes[0])
    tree = jc.compress(params, jc.plan(params, [("w", method)]))
    narrow = "float32" not in dtypes
    for fn in (lambda p, x: x @ p["w"], lambda p, x: jax.lax.dot_general(p["w"], x, (((0,), (1,)), ((), ())))):
        assert far(jc.accelerate(fn)(tree, x), fn(jc.materialize(tree), x)) < (2e-2 if narrow or method else 1e-6)


@pytest.mark.parametrize("method", [None, jc.quantize.Int(bits=8), jc.factorize.SVD(rank=2)], ids=repr)
def test_bfloat16_activations_meet_float32_weights_unrounded(method):
    params, x = {"w": normal(0, 64, 8)}, normal(1, 4, 64, dtype=jnp.bfloat16)
    tree = jc.compress(params, jc.plan(params, [("w", method)]))
    assert far(jc.accelerate(lambda p, x: x @ p["w"])(tree, x), x @ jc.materialize(tree)["w"]) < 1e-5


def lru_input(p, x):
    u = jnp.einsum("hd,btd->bth", p["re"] + 1j * p["im"], x)
    return (u.real + u.imag) @ p["out"]


def complex_activations(p, x):
    return jnp.abs(jnp.exp(1j * x) @ p["re"].T) @ p["out"]


def complex_leaf(p, x):
    return jnp.abs(x @ p["z"])


@pytest.mark.parametrize("fn", [lru_input, complex_activations, complex_leaf])
def test_complex(fn):
    params = {"re": normal(0, 8, 12), "im": normal(1, 8, 12), "out": normal(2, 8, 3), "z": normal(3, 12, 4) + 0j}
    x = normal(4, 2, 5, 12)
    tree = jc.compress(params, jc.plan(params, [("re|im", jc.quantize.Int(bits=8)), (".*", None)]))
    want = fn(jc.materialize(tree), x)
    assert far(jc.accelerate(fn)(tree, x), want) < 1e-5
    assert far(jc.quantize.activations(fn, params, x)(params, x), fn(params, x)) < 0.03


def test_64_bits_stay_64_bits():
    with jax.enable_x64(True):
        params, x = {"w": normal(0, 16, 8).astype(jnp.float64)}, normal(1, 4, 16).astype(jnp.float64)
        tree = jc.compress(params, jc.plan(params, [("w", jc.quantize.Int(bits=8))]))
        assert far(jc.accelerate(lambda p, x: x @ p["w"])(tree, x), x @ jc.materialize(tree)["w"]) < 1e-7
