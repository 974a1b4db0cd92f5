"""Adapters: the base is held to the bit, whatever it is and whatever the optimizer; the small product alone moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jcompress as jc

BASES = {
    "dense": lambda w: w,
    "4 bits in groups": jc.quantize.Int(bits=4, group_size=16),
    "scales in 16 bits": jc.chain(jc.quantize.Int(bits=4, group_size=16), jc.quantize.Float("float16")),
    "4 bits, affine": jc.quantize.Int(bits=4, symmetric=False),
    "masked codes": jc.chain(jc.prune.Magnitude(sparsity=0.5), jc.quantize.Int(bits=8)),
}


@pytest.mark.parametrize("name", BASES)
def test_only_the_adapter_moves(name):
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, 24), (40, 64)))
    y = x @ (w + jnp.asarray(rng.normal(size=(64, 2)) @ rng.normal(size=(2, 24)), jnp.float32))
    base = BASES[name](w)
    params = {"w": jc.factorize.adapter(base, 2, jax.random.key(0))}
    before = jc.core.dense(base)
    np.testing.assert_array_equal(params["w"].materialize(), before)
    train, held = jc.split(params)
    assert [leaf.shape for leaf in jax.tree.leaves(train)] == [(64, 2), (2, 24)]

    def loss(train):
        return jnp.square(x @ jc.materialize(jc.merge(train, held))["w"] - y).mean()

    tx = optax.adamw(0.02, weight_decay=0.1)
    state = tx.init(train)

    @jax.jit
    def step(train, state):
        updates, state = tx.update(jax.grad(loss)(train), state, train)
        return optax.apply_updates(train, updates), state

    first = loss(train)
    for _ in range(150):
        train, state = step(train, state)
    node = jc.merge(train, held)["w"]
    np.testing.assert_array_equal(node.terms[0].materialize(), before)
    assert loss(train) < 0.3 * first


def test_it_is_stored_loaded_and_run_apart(tmp_path):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(160, 112)), jnp.float32)
    node = jc.factorize.adapter(jc.quantize.Int(bits=4, group_size=32)(w), 4, jax.random.key(0))
    node = jc.formats.Sum((node.terms[0], jc.formats.LowRank(node.terms[1].u, jnp.ones((4, 112)))))
    jc.save(tmp_path / "x.jc", {"w": node})
    loaded = jc.load(tmp_path / "x.jc")
    np.testing.assert_array_equal(loaded["w"].materialize(), node.materialize())
    assert jc.nbits(node) == 4 * w.size + 32 * 5 * 112 + 32 * 4 * (160 + 112)
    fast, x = jc.accelerate(lambda p, x: x @ p["w"]), jnp.ones((2, 160))
    np.testing.assert_allclose(fast(loaded, x), x @ node.materialize(), rtol=1e-4, atol=1e-3)
    assert next(row.how.split(",")[0] for row in fast.report(loaded, x).rows) == "codes in groups"
