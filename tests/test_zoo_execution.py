"""Models of the zoo run on compressed parameters, and with integers for activations."""

import functools

import jax
import numpy as np
import pytest
from zoo import built

import jcompress as jc

MODELS = ["mlp-plain", "control-plain", "lenet-linen", "encoder-nnx", "scan-linen", "lstm-linen"]


@functools.cache
def compressed(name):
    model = built(name)
    args = model.args(2, jax.random.key(1))
    rules = [(path, jc.quantize.Int(bits=8)) for path, x in jc.paths(model.params) if x.ndim > 1]
    return model, args, jc.compress(model.params, jc.plan(model.params, rules))


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * float(np.max(np.abs(y)) + 1e-30))


@pytest.mark.parametrize("name", MODELS)
def test_accelerate_equals_the_dense_function(name):
    model, args, tree = compressed(name)
    fast = jc.accelerate(model.fn)
    close(jax.jit(fast)(tree, *args), jax.jit(model.fn)(jc.materialize(tree), *args))
    assert sum("levels" in row.how for row in fast.report(tree, *args).rows) >= 2


@pytest.mark.parametrize("name", MODELS)
def test_integers_equal_their_simulation(name):
    model, args, tree = compressed(name)
    integer, simulated = (jc.quantize.activations(model.fn, tree, *args, mode=m) for m in ("integer", "simulate"))
    found = jax.jit(integer)(tree, *args)
    close(found, jax.jit(simulated)(tree, *args), 1e-6)
    rows = integer.report().rows
    assert rows and all("int8 x int8 -> int32" in row.how for row in rows), str(integer.report())
    dense = jax.jit(model.fn)(model.params, *args)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(dense), strict=True))
    close(found, dense, 0.1)
