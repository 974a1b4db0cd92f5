"""Codebooks whose words are blocks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jcompress as jc
from jcompress import core
from jcompress.numeric.blocks import blocked, unblocked

KMeans = jc.share.KMeans


def test_blocks_are_rows_and_come_back(rng):
    x = rng.normal(size=(3, 6, 8))
    rows = blocked(x, (2, 4))
    assert rows.shape == (3, 3, 2, 8)
    np.testing.assert_array_equal(rows[1, 2, 1], x[1, 4:6, 4:8].ravel())
    np.testing.assert_array_equal(unblocked(rows, (2, 4)), x)


@pytest.mark.parametrize("clusters", [12, 20])
def test_planted_words_are_recovered(rng, clusters):
    words = rng.normal(size=(12, 2, 4)).astype(np.float32)
    w = unblocked(jnp.asarray(words[rng.integers(0, 12, size=(20, 15))]).reshape(20, 15, 8), (2, 4))
    node = KMeans(clusters=clusters, block=(2, 4))(w)
    np.testing.assert_allclose(node.materialize(), w, atol=1e-5)


def test_every_block_has_the_nearest_word_and_every_word_is_a_mean(rng):
    w = jnp.asarray(rng.normal(size=(24, 32)), jnp.float32)
    node = KMeans(clusters=7, block=(2, 2))(w)
    rows, words = np.asarray(blocked(w, (2, 2))).reshape(-1, 4), np.asarray(node.codebook)
    nearest = ((rows[:, None] - words) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(nearest, np.asarray(node.indices).ravel())
    means = node.project(w).codebook
    for k in range(7):
        np.testing.assert_allclose(means[k], rows[nearest == k].mean(0), atol=1e-5)
    # What is stored: one index of 3 bits a block, and the words.
    assert node.nbits() == 3 * 12 * 16 + 32 * 7 * 4


def test_it_is_as_good_as_scikit_learn(rng):
    cluster = pytest.importorskip("sklearn.cluster")
    w = jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)
    rows = np.asarray(blocked(w, (4, 1))).reshape(-1, 4)
    best = cluster.KMeans(16, n_init=1, random_state=0).fit(rows).inertia_
    error = float(jnp.square(KMeans(clusters=16, block=(4, 1))(w).materialize() - w).sum())
    assert error < 1.03 * best


def test_hidden_entries_do_not_count_and_hidden_blocks_are_not_stored(rng):
    w = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32).at[:8].set(0)
    node = jc.chain(jc.prune.Nonzero(), KMeans(clusters=4, block=(2, 2)))(w)
    mask = jc.nbits(jc.prune.Nonzero()(w)) - 32 * 64
    assert node.nbits() == mask + 2 * 16 + 32 * 4 * 4  # the mask, indices of the lower half, words
    expected = KMeans(clusters=4, block=(2, 2))(w[8:])
    error, least = (float(jnp.square(n.materialize() - x).sum()) for n, x in ((node, w), (expected, w[8:])))
    assert error < 1.1 * least


def test_one_codebook_of_blocks_for_all_layers(rng, tmp_path):
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in (("a", (8, 8)), ("b", (16, 4)))}
    small = jc.compress(params, jc.plan(params, [(".*", KMeans(clusters=5, block=(4, 4), scope="global"))]))
    assert small["b"].codebook == jc.formats.Reference("a/codebook", sizes=(5, 16))
    assert jc.nbits(small) == 3 * (4 + 4) + 32 * 5 * 16
    other = {k: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for k, x in params.items()}
    found = core.projected(small, other)["a"].codebook
    rows = np.concatenate([np.asarray(blocked(other[k], (4, 4))).reshape(-1, 16) for k in "ab"])
    places = np.concatenate([np.ravel(small[k].indices) for k in "ab"])
    for k in np.unique(places):
        np.testing.assert_allclose(found[k], rows[places == k].mean(0), atol=1e-5)
    jc.save(tmp_path / "model", small)
    jax.tree.map(np.testing.assert_array_equal, jc.materialize(jc.load(tmp_path / "model")), jc.materialize(small))


def test_a_layout_says_where_inputs_and_outputs_are(rng):
    kernel = jnp.asarray(rng.normal(size=(3, 3, 4, 8)), jnp.float32)  # HWIO
    method, moved = KMeans(clusters=6, block=(4, 1)), kernel.transpose(3, 2, 0, 1)  # OIHW
    layout = {"w": jc.Layout(outputs=0, inputs=1, window=(2, 3))}
    plain = jc.compress({"w": kernel}, jc.plan({"w": kernel}, [("w", method)]))["w"]
    laid = jc.compress({"w": moved}, jc.plan({"w": moved}, [("w", method)], layout=layout))["w"]
    np.testing.assert_array_equal(laid.materialize(), plain.materialize().transpose(3, 2, 0, 1))


@pytest.mark.parametrize("method", [KMeans(4), KMeans(4, scope="global"), KMeans(4, block=(2, 2))], ids=repr)
def test_leaves_alike_and_unlike_are_planned_with_a_layout_and_with_statistics(rng, method):
    shapes = {"a": (8, 8), "b": (8, 8), "c": (8, 4), "d": (4, 6)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()} | {"e": jnp.ones(())}
    x = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)

    def fn(params, x):
        return params["e"] * (x @ params["a"] @ params["b"] @ params["c"] @ params["d"])

    rules = [("e", None), (".*", method)]
    plain, laid = jc.plan(params, rules), jc.plan(params, rules, layout=jc.trace.layout(fn, params, x))
    stats = jc.calibrate(fn, params, [(x,)], plan=jc.plan(params, [("e", None), (".*", jc.prune.Wanda(sparsity=0.5))]))
    expected = jc.compress(params, plain)
    for found in (jc.compress(params, laid), jc.compress(params, laid, stats=stats)):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_single_number_has_a_codebook_of_values_and_none_of_blocks():
    params = {"w": jnp.float32(3)}
    assert float(jc.materialize(jc.compress(params, jc.plan(params, [("w", KMeans(2))])))["w"]) == 3
    with pytest.raises(
        ValueError, match=r"w: KMeans found block=\(2,\), which does not tile the last axes of shape \(\)"
    ):
        jc.plan(params, [("w", KMeans(2, block=(2,)))])


RESIDUALS = [
    jc.residual(KMeans(4), KMeans(4), KMeans(4)),
    jc.residual(KMeans(5, block=(4, 1)), KMeans(4, block=(2, 2)), sweeps=2),
    jc.residual(KMeans(4, "global", block=(4, 1)), KMeans(4, "global")),
    jc.residual(KMeans(4, block=(2, 2)), jc.quantize.Int(bits=2)),
]


@pytest.mark.parametrize("method", RESIDUALS, ids=repr)
def test_all_words_of_a_sum_are_fitted_at_once(rng, method):
    arrays = [{k: jnp.asarray(rng.normal(size=(16, 8)), jnp.float32) for k in "ab"} for _ in range(2)]
    small = jc.compress(arrays[0], jc.plan(arrays[0], [(".*", method)]))
    train, held = jc.split(small)
    start = jax.tree.map(jnp.zeros_like, train)
    jacobian = jax.jacobian(lambda t: jnp.stack(list(jc.materialize(jc.merge(t, held)).values())))(start)
    matrix = np.concatenate([np.reshape(x, (256, -1)) for x in jax.tree.leaves(jacobian)], axis=1).astype(np.float64)
    for tree in (arrays[1], {k: 1e25 * x for k, x in arrays[1].items()}):
        w = np.stack(list(tree.values())).astype(np.float64).ravel()
        expected = matrix @ np.linalg.lstsq(matrix, w, rcond=None)[0]
        found = np.stack(list(jc.materialize(core.projected(held, tree)).values())).ravel()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(w).max())


IN_TURN = jc.residual(jc.share.KMeans(clusters=4), jc.chain(jc.prune.Magnitude(sparsity=0.5), jc.quantize.Int(4)))


@pytest.mark.parametrize("method", [*RESIDUALS[1:3], IN_TURN], ids=repr)
def test_training_on_a_sum_stays_there(rng, method):
    params = {k: jnp.asarray(rng.normal(size=(16, 8)), jnp.float32) for k in "ab"}
    tx = optax.chain(optax.adam(0.05), jc.project(jc.plan(params, [(".*", method)]), every=4))
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(6):
        updates, state = update(jax.tree.map(lambda x: x - 1, params), state, params)
        params = optax.apply_updates(params, updates)
    # Terms that are fitted in turn are fitted nearly.
    for path, x in jc.materialize(jc.nodes(params, state)).items():
        np.testing.assert_allclose(x, params[path], atol=0.05 if method == IN_TURN else 1e-5)


def test_sharded_only_sums_and_words_move(rng):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    w = jnp.asarray(rng.normal(size=(64, 512)), jnp.float32)
    method = KMeans(clusters=8, block=(4, 1))
    placed = jax.device_put(w, NamedSharding(mesh, P(None, "model")))
    program = jax.jit(method).lower(placed).compile()
    pattern = r"= \(?([^=]*?)\)? (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    moved = [
        int(np.prod([int(n) for n in dims.split(",") if n]))
        for shapes in re.findall(pattern, program.as_text())
        for dims in re.findall(r"\[([\d,]*)\]", shapes)
    ]
    assert max(moved) <= 8 * 4  # numbers of a codebook, of 32,768 weights
    np.testing.assert_allclose(program(placed).codebook, method(w).codebook, atol=1e-4)


@pytest.mark.parametrize(
    ("block", "message"),
    [((3, 1), r"w: KMeans found block=\(3, 1\), which does not tile.*\(8, 6\)"), ((2, 2, 2), r"w: .*does not tile")],
)
def test_blocks_that_do_not_tile_are_refused_by_name(block, message):
    params = {"w": jnp.ones((8, 6))}
    with pytest.raises(ValueError, match=message):
        jc.plan(params, [("w", KMeans(clusters=2, block=block))])


@pytest.mark.parametrize("options", [{"block": 4}, {"block": (0, 1)}, {"block": (2, 1), "exact": True}])
def test_bad_blocks(options):
    with pytest.raises(ValueError, match="KMeans"):
        KMeans(clusters=2, **options)
