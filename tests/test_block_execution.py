"""Masks of whole blocks under accelerate: only what is kept is multiplied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc

FNS = {
    "(in, out)": lambda p, x: jnp.tanh(x @ p["w"]),
    "(out, in)": lambda p, x: jnp.tanh(x @ p["w"].T),
    "einsum over outputs": lambda p, x: jnp.einsum("nk,ok->no", x, p["w"]),
    "weight first": lambda p, x: (p["w"] @ x.T).T,
    "batched": lambda p, x: x.reshape(2, -1, x.shape[-1]) @ p["w"],
}


def masked(rows, columns, size, keep, seed=0):
    w = jax.random.normal(jax.random.key(seed), (rows, columns))
    pattern = jc.prune.Block((size, size))
    return jc.prune.Magnitude(sparsity=1 - keep, pattern=pattern)(w)


@pytest.mark.parametrize("name", FNS)
@pytest.mark.parametrize(("rows", "size", "keep"), [(2, 16, 0.5), (40, 32, 0.25)])
def test_blocks_give_the_dense_product(name, rows, size, keep):
    fn, turned = FNS[name], name in ("(out, in)", "einsum over outputs", "weight first")
    tree = {"w": masked(128, 192, size, keep)}
    x = jax.random.normal(jax.random.key(1), (rows, 192 if turned else 128))
    fast = jc.accelerate(fn)
    want = fn(jc.materialize(tree), x)
    np.testing.assert_allclose(jax.jit(lambda x: fast(tree, x))(x), want, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(fast(tree, x), want, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(jax.jit(fast)(tree, x), want, rtol=2e-5, atol=2e-5)
    slope = jax.jit(jax.grad(lambda x: jnp.square(fast(tree, x)).sum()))(x)
    dense = jax.jit(jax.grad(lambda x: jnp.square(fn(jc.materialize(tree), x)).sum()))(x)
    np.testing.assert_allclose(slope, dense, rtol=1e-4, atol=1e-3)


def how(fn, tree, x):
    told = []

    def run(x):
        executed = jc.accelerate(fn)
        y, products = executed._run(tree, (x,))
        told.extend(row.how for row in products.rows)
        return y

    jax.eval_shape(run, x)
    return told


@pytest.mark.parametrize(
    ("rows", "size", "keep", "wanted"),
    [
        (2, 32, 0.5, "50% of its blocks of 32x32"),
        (2, 64, 0.25, "25% of its blocks of 64x64"),
        (64, 32, 0.5, "dense: Masked is made dense, 50% of its blocks are no less work"),
        (64, 32, 0.25, "25% of its blocks of 32x32"),
        (64, 16, 0.25, "dense: Masked is made dense, 25% of its blocks are no less work"),
    ],
)
def test_the_report_says_what_is_multiplied(rows, size, keep, wanted):
    tree = {"w": masked(128, 128, size, keep)}
    assert how(FNS["(in, out)"], tree, jnp.ones((rows, 128))) == [wanted]


def test_only_kept_blocks_are_multiplied():
    tree, x = {"w": masked(256, 256, 64, 0.25)}, jnp.ones((4, 256))
    cost = jax.jit(lambda x: jc.accelerate(FNS["(in, out)"])(tree, x)).lower(x).compile().cost_analysis()
    dense = jax.jit(lambda x: FNS["(in, out)"](jc.materialize(tree), x)).lower(x).compile().cost_analysis()
    most = int(np.asarray(tree["w"].mask).reshape(4, 64, 4, 64).any((1, 3)).sum(0).max())
    assert cost["flops"] <= dense["flops"] * most / 4 * 1.05


def test_masks_of_single_entries_and_of_layers_are_dense():
    w = jax.random.normal(jax.random.key(0), (64, 64))
    tree = {"w": jc.prune.Magnitude(sparsity=0.9)(w)}
    assert how(FNS["(in, out)"], tree, jnp.ones((2, 64))) == ["dense: Masked is made dense"]
    stack = {"w": jax.tree.map(lambda *x: jnp.stack(x), *(masked(64, 64, 16, 0.25, s) for s in range(3)))}

    def scanned(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    x = jnp.ones((2, 64))
    np.testing.assert_allclose(jc.accelerate(scanned)(stack, x), scanned(jc.materialize(stack), x), rtol=1e-5)

    def closed(p, x):
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"]), x)

    tree = {"w": masked(64, 64, 16, 0.25)}
    np.testing.assert_allclose(jc.accelerate(closed)(tree, x), closed(jc.materialize(tree), x), rtol=1e-5)


def test_a_column_without_blocks_gives_zeros():
    w = jnp.ones((64, 64)).at[:, 16:].set(0.0)
    node = jc.formats.Masked(w, w != 0)
    x = jnp.ones((2, 64))
    y = jc.accelerate(lambda p, x: x @ p["w"])({"w": node}, x)
    np.testing.assert_array_equal(y, x @ w)


def test_quantized_activations_see_masks_of_blocks_as_any_other():
    tree, x = {"w": masked(64, 64, 32, 0.5)}, jax.random.normal(jax.random.key(1), (2, 64))
    run = jc.quantize.activations(FNS["(in, out)"], jc.materialize(tree), x)
    dense = jc.materialize(tree)
    np.testing.assert_array_equal(run(tree, x), run(dense, x))
