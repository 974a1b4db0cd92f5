"""Spectral kernels: the algebra of the paper, and nodes ranked by their eigenvalues."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import jcompress as jc
from jcompress.prune import structured


def test_the_kernel_is_the_lower_block_of_the_transfer(rng):
    n, m = 4, 3
    vectors, inputs, outputs = rng.normal(size=(n, m)), rng.normal(size=n), rng.normal(size=m)
    phi = np.block([[np.eye(n), np.zeros((n, m))], [vectors.T, np.eye(m)]])
    np.testing.assert_allclose(np.linalg.inv(phi), 2 * np.eye(n + m) - phi, atol=1e-12)
    transfer = phi @ np.diag(np.concatenate([inputs, outputs])) @ np.linalg.inv(phi)
    node = jc.formats.Spectral(*(jnp.asarray(x, jnp.float32) for x in (inputs, outputs, vectors)))
    np.testing.assert_allclose(node.materialize(), transfer[n:, :n].T, atol=1e-5)
    np.testing.assert_allclose(np.sort(np.linalg.eigvals(transfer).real), np.sort([*inputs, *outputs]), atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 4), (3, 3, 2, 4)])
def test_eigenvalues_start_as_the_norms_of_what_writes_a_node(rng, shape):
    w = rng.normal(size=shape)
    w[..., 1] = 0
    node = jc.factorize.Spectrum()(jnp.asarray(w, jnp.float32))
    np.testing.assert_allclose(node.outputs, np.sqrt(np.square(w.reshape(-1, 4)).sum(0)), rtol=1e-5)
    np.testing.assert_allclose(node.materialize(), w, atol=1e-6)


def test_stacked_layers_have_eigenvalues_each(rng):
    w = jnp.asarray(rng.normal(size=(3, 5, 4)), jnp.float32)
    node = jc.stacked(jc.factorize.Spectrum())(w)
    np.testing.assert_allclose(node.outputs, np.linalg.norm(w, axis=1), rtol=1e-5)


def test_vectors_of_few_axes_are_refused():
    with pytest.raises(ValueError, match=r"bias: Spectrum needs a matrix, found shape \(3,\)"):
        jc.plan({"bias": jnp.ones(3)}, [("bias", jc.factorize.Spectrum())])


def mlp(p, x):
    return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]


def test_scores_need_a_spectral_node():
    params = {"up": jnp.ones((3, 4)), "bias": jnp.ones(4), "down": jnp.ones((4, 2))}
    groups = jc.trace.coupling(mlp, params, jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="Spectrum"):
        structured.spectral(params, groups)


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])
    return x[:1200], y[:1200], x[1200:], y[1200:]


HIDDEN = 100


def start(seed):
    up, down = jax.random.split(jax.random.key(seed))
    params = {
        "up": jax.random.normal(up, (64, HIDDEN)) / 8,
        "bias": jnp.zeros(HIDDEN),
        "down": jax.random.normal(down, (HIDDEN, 10)) / HIDDEN**0.5,
    }
    return jc.compress(params, jc.plan(params, [("up|down", jc.factorize.Spectrum())]))


def only_eigenvalues(_):
    """A label for each leaf: all but the vectors, the biases and what the hidden nodes read train."""
    up, down = jc.formats.Spectral("hold", "train", "hold"), jc.formats.Spectral("train", "train", "hold")
    return {"up": up, "bias": "hold", "down": down}


@partial(jax.jit, static_argnames="frozen")
def train(tree, x, y, frozen):
    """Full batch Adam with a penalty on the eigenvalues of the hidden nodes."""
    tx = optax.adam(0.03)
    if frozen:
        tx = optax.multi_transform({"train": tx, "hold": optax.set_to_zero()}, only_eigenvalues)

    def loss(tree):
        fit = optax.softmax_cross_entropy_with_integer_labels(mlp(jc.materialize(tree), x), y).mean()
        return fit + 3e-3 * jnp.abs(tree["up"].outputs).sum() + 3e-3 * jnp.abs(tree["up"].inputs).sum()

    def step(_, carry):
        updates, state = tx.update(jax.grad(loss)(carry[0]), carry[1])
        return optax.apply_updates(carry[0], updates), state

    return jax.lax.fori_loop(0, 150, step, (tree, tx.init(tree)))[0]


@pytest.mark.parametrize("frozen", [True, False], ids=["eigenvalues", "all"])
def test_at_equal_nodes_eigenvalues_choose_better_than_chance(digits, frozen):
    x, y, held_x, held_y = digits

    @jax.jit
    def accuracy(params):
        return jnp.mean(jnp.argmax(mlp(params, held_x), axis=-1) == held_y)

    ours, chance = [], []
    for seed in range(3):
        before = start(seed)
        tree = train(before, x, y, frozen)
        if frozen:
            np.testing.assert_array_equal(tree["up"].vectors, before["up"].vectors)
            np.testing.assert_array_equal(tree["down"].vectors, before["down"].vectors)
        dense = jc.materialize(tree)
        groups = jc.trace.coupling(mlp, dense, x[:2])
        assert accuracy(dense) > (0.6 if frozen else 0.9)
        keep = structured.keep(structured.spectral(tree, groups), groups, sparsity=0.8)
        assert int(keep["up[1]"].sum()) == 20
        ours.append(float(accuracy(jc.trace.mask(dense, groups, keep))))
        for draw in range(5):
            other = structured.keep(structured.random(groups, jax.random.key(100 + draw)), groups, sparsity=0.8)
            chance.append(float(accuracy(jc.trace.mask(dense, groups, other))))
    assert np.mean(ours) > np.mean(chance) + 0.2
    assert min(ours) > np.mean(chance)
