"""Rows predicted from others: kernel ridge regression, and where the rows that are stored lie."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jcompress as jc
from jcompress.factorize.predicted import chosen
from jcompress.formats.interpolated import points

Predicted = jc.factorize.Predicted


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def smooth(grid, outputs, width=3.0):
    """Weights drawn from the Gaussian process that the method takes them to be."""
    places = points(grid).astype(np.float64)
    apart = ((places[:, None] - places[None]) ** 2).sum(-1)
    root = np.linalg.cholesky(np.exp(-apart / (2 * width**2)) + 1e-6 * np.eye(len(places)))
    return jnp.asarray(root @ np.random.default_rng(0).normal(size=(len(places), outputs)), jnp.float32)


def test_it_predicts_as_kernel_ridge_regression_does():
    ridge = pytest.importorskip("sklearn.kernel_ridge")
    node = Predicted(anchors=9, grid=(6, 6), width=2.5, ridge=0.01)(normal(0, 36, 4))
    places = points((6, 6))
    model = ridge.KernelRidge(alpha=0.01, kernel="rbf", gamma=1 / (2 * 2.5**2))
    model.fit(places[node.anchors], np.asarray(node.values)[:, 0])
    np.testing.assert_allclose(node.materialize(), model.predict(places), rtol=1e-4, atol=1e-4)


def test_rows_that_are_stored_are_met_as_the_ridge_vanishes():
    node = Predicted(anchors=6, grid=(12,), width=1.5, ridge=1e-6)(normal(0, 12, 3))
    np.testing.assert_allclose(node.materialize()[node.anchors], node.values[:, 0], atol=1e-3)


def test_the_values_are_those_of_least_squares():
    w = normal(0, 36, 4)
    node = Predicted(anchors=9, grid=(6, 6))(w)
    slope = jax.grad(lambda values: jnp.sum((jc.formats.Interpolated.materialize(_with(node, values)) - w) ** 2))
    np.testing.assert_allclose(slope(node.values), 0, atol=1e-4)


def _with(node, values):
    train, held = jc.split(node)
    return jc.merge(jax.tree.map(lambda _: values, train), held)


def test_only_what_a_mask_shows_is_fitted():
    w, shown = normal(0, 36, 4), jnp.asarray(np.random.default_rng(1).random((36, 4)) < 0.7)
    shown = shown.at[:, 3].set(False)
    node = Predicted(anchors=9, grid=(6, 6))(jnp.where(shown, w, 99.0), jc.Context(where=shown))
    basis = np.asarray(node._basis(), np.float64)
    for i in range(3):
        rows = np.asarray(shown[:, i])
        want = np.linalg.lstsq(basis[rows], np.asarray(w, np.float64)[rows, i], rcond=None)[0]
        np.testing.assert_allclose(node.values[:, 0, i], want, atol=2e-3)
    assert not node.values[:, 0, 3].any()  # nothing is shown of it


@pytest.mark.parametrize("other", [jc.prune.Magnitude(0.9), jc.prune.Magnitude(0.5)], ids=repr)
def test_beside_a_sparse_term_it_stays_on_the_set_through_training(other):
    params = {"w": normal(0, 36, 8)}
    plan = jc.plan(params, [("w", jc.residual(Predicted(0.4, grid=(6, 6)), other))])
    tx = optax.chain(optax.adam(0.05), jc.project(plan, every=3))
    state, p = tx.init(params), params
    step = jax.jit(tx.update)
    for _ in range(8):
        updates, state = step(jax.tree.map(jnp.sin, p), state, p)
        p = optax.apply_updates(p, updates)
    np.testing.assert_allclose(jc.materialize(jc.nodes(p, state))["w"], p["w"], atol=1e-4)


def test_each_row_is_where_the_rows_before_say_least():
    places, width, found = points((5, 4)), 1.5, []
    kernel = np.exp(-((places[:, None] - places[None]) ** 2).sum(-1) / (2 * width**2))
    for _ in range(6):
        known = kernel[:, found] @ np.linalg.inv(kernel[np.ix_(found, found)]) @ kernel[found] if found else 0 * kernel
        left = np.diag(kernel - known).copy()
        left[found] = -1
        found.append(int(np.argmax(np.round(left, 9))))
    assert chosen(places, 6, width).tolist() == sorted(found)
    assert len(set(chosen(places, 20, 8.0).tolist())) == 20  # all rows, though nothing is left to say


def test_smooth_weights_take_fewer_numbers_than_a_low_rank():
    w = smooth((12, 12), 32)
    predicted = Predicted(anchors=0.15, grid=(12, 12), width=3.0)(w)
    low = jc.factorize.SVD(rank=predicted.values.size // (144 + 32))(w)
    errors = [jnp.linalg.norm(node.materialize() - w) / jnp.linalg.norm(w) for node in (predicted, low)]
    assert low.nbits() <= predicted.nbits()
    assert errors[0] < 0.1 and errors[0] < 0.3 * errors[1]
    rough = normal(1, 144, 32)  # where neighbours are no more alike than others nothing is gained
    error = jnp.linalg.norm(Predicted(0.15, (12, 12), 3.0)(rough).materialize() - rough) / jnp.linalg.norm(rough)
    assert error > 0.85


def test_channels_and_windows_and_stacked_layers():
    w = smooth((6, 6), 15).reshape(6, 6, 3, 5)
    flat = Predicted(anchors=12, grid=(6, 6))(w.reshape(108, 5))
    window = Predicted(anchors=12)(w)
    assert flat.values.shape == window.values.shape == (12, 3, 5)
    np.testing.assert_array_equal(flat.materialize().reshape(w.shape), window.materialize())
    stacked = jc.stacked(Predicted(anchors=12))(jnp.stack([w, 2 * w]))
    np.testing.assert_allclose(stacked.materialize()[1], 2 * window.materialize(), rtol=1e-5, atol=1e-5)


def test_it_trains_and_is_stored(tmp_path):
    w = smooth((6, 6), 8)
    x = normal(1, 50, 36)
    start = {"w": 0 * w + 0.1}
    tree = jc.compress(start, jc.plan(start, [("w", Predicted(anchors=0.5, grid=(6, 6), width=3.0))]))
    train, held = jc.split(tree)

    def loss(train):
        return jnp.mean((x @ jc.materialize(jc.merge(train, held))["w"] - x @ w) ** 2)

    before, step, tx = loss(train), jax.jit(jax.grad(loss)), optax.adam(0.05)
    state = tx.init(train)
    for _ in range(200):
        updates, state = tx.update(step(train), state)
        train = optax.apply_updates(train, updates)
    assert loss(train) < 0.02 * before
    small = jc.merge(train, held)
    jc.save(tmp_path / "x.jc", small)
    np.testing.assert_array_equal(jc.load(tmp_path / "x.jc")["w"].materialize(), jc.materialize(small)["w"])
    assert jc.nbits(small) == 32 * (18 * 8 + 18)


@pytest.mark.parametrize(
    ("method", "shape", "told"),
    [
        (Predicted(), (8, 4), r"w: Predicted found shape \(8, 4\) and no grid; say which"),
        (Predicted(grid=(3, 3)), (8, 4), r"w: Predicted found 8 inputs, expected a multiple of grid=\(3, 3\), 9"),
        (Predicted(anchors=9, grid=(8,)), (8, 4), r"w: Predicted found anchors=9, expected at most 8 of grid=\(8,\)"),
        (
            Predicted(0.5, grid=(100, 100)),
            (10_000, 2),
            r"w: Predicted found 5000 anchors of grid=\(100, 100\), expected",
        ),
    ],
)
def test_what_does_not_fit_is_said(method, shape, told):
    with pytest.raises(ValueError, match=told):
        jc.plan({"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, [("w", method)])


def test_hyperparameters_out_of_range():
    for options in ({"anchors": 0}, {"anchors": 1.5}, {"width": 0.0}, {"ridge": 0.0}):
        with pytest.raises(ValueError, match="Predicted: "):
            Predicted(**options)
