"""One stored copy, many uses: references between leaves, and what every verb makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jcompress as jc
from jcompress import core

Reference, KMeans = jc.formats.Reference, jc.share.KMeans


def language_model(params, tokens):
    x = params["embed"]["embedding"][tokens]
    return jnp.tanh(x @ params["mix"]["kernel"]) @ params["head"]["kernel"]


@pytest.fixture
def params(rng):
    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {"embed": {"embedding": draw(12, 4)}, "mix": {"kernel": draw(4, 4)}, "head": {"kernel": draw(4, 12)}}


@pytest.fixture
def tied(params):
    return jc.tie(params, {"head/kernel": "embed/embedding"}, transpose=("head/kernel",))


TOKENS = jnp.array([[0, 3, 5], [7, 3, 11]])


def test_the_first_stands_for_the_second(params, tied):
    dense = jc.materialize(tied)
    np.testing.assert_array_equal(dense["head"]["kernel"], params["embed"]["embedding"].T)
    np.testing.assert_array_equal(dense["embed"]["embedding"], params["embed"]["embedding"])
    assert jc.nbits(tied) == 32 * (48 + 16)
    assert tied["head"]["kernel"] == Reference("embed/embedding", (-1, -2), (4, 12))
    assert [path for path, _ in jc.paths(tied)] == [path for path, _ in jc.paths(params)]


def test_the_gradient_is_the_sum_of_all_uses(params, tied):
    def loss(tree):
        return (language_model(jc.materialize(tree), TOKENS) ** 2).sum()

    both = jax.grad(loss)(jc.untie(tied))
    one = jax.jit(jax.grad(loss))(tied)
    total = both["embed"]["embedding"] + both["head"]["kernel"].T
    np.testing.assert_allclose(one["embed"]["embedding"], total, rtol=1e-5)
    assert len(jax.tree.leaves(one)) == 2


def test_an_optimizer_keeps_one_state_and_split_and_merge_are_inverse(tied):
    train, held = jc.split(jc.compress(tied, jc.plan(tied, [("embed.*", jc.quantize.Int(bits=8)), (".*", None)])))
    tx = optax.adam(1e-4)
    state = tx.init(train)
    assert len(jax.tree.leaves(state)) == 1 + 2 * len(jax.tree.leaves(train)) == 5

    def loss(train):
        return (language_model(jc.materialize(jc.merge(train, held)), TOKENS) ** 2).mean()

    before = loss(train)
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(train), state, train)
        train = optax.apply_updates(train, updates)
    assert loss(train) < before
    dense = jc.materialize(jc.merge(train, held))
    np.testing.assert_array_equal(dense["head"]["kernel"], dense["embed"]["embedding"].T)


def test_plans_and_reports_leave_a_reference_to_its_owner(params, tied):
    plan = jc.plan(tied, [(".*", jc.quantize.Int(bits=4))])
    assert plan["head/kernel"] is None and "head/kernel: stands for embed/embedding" in str(plan)
    small = jc.compress(tied, plan)
    assert isinstance(small["head"]["kernel"], Reference)
    np.testing.assert_array_equal(jc.materialize(small)["head"]["kernel"], small["embed"]["embedding"].materialize().T)
    table = jc.report(jc.materialize(tied), small)
    rows = {row.path: row for row in table.rows}
    assert rows["head/kernel"].stored_bytes == 0 and rows["head/kernel"].dense_bytes == 4 * 48
    assert rows["head/kernel"].method == "Reference(embed/embedding)"
    assert rows["head/kernel"].relative_error == pytest.approx(rows["embed/embedding"].relative_error)
    assert 8 * table.total.stored_bytes == jc.nbits(small)
    assert 8 * jc.report(tied, small).total.dense_bytes == jc.nbits(tied)


def test_the_file_stores_one_copy(tmp_path, params, tied):
    one, two = jc.save(tmp_path / "tied", tied), jc.save(tmp_path / "both", params)
    assert two - one > 4 * 48 - 100
    for like in (None, tied, jc.materialize(tied)):
        loaded = jc.load(tmp_path / "tied", like=like)
        assert loaded["head"]["kernel"] == tied["head"]["kernel"]
        np.testing.assert_array_equal(jc.materialize(loaded)["head"]["kernel"], params["embed"]["embedding"].T)
    with pytest.raises(jc.io.StorageError, match=r"head/kernel: found .*embed/embedding.*expected float32\[4,13\]"):
        jc.load(tmp_path / "tied", like=jc.materialize(tied) | {"head": {"kernel": jnp.ones((4, 13))}})


def test_training_holds_the_owner_on_the_set_and_simulation_passes_the_sum(tied):
    plan = jc.plan(tied, [("embed.*", jc.prune.Magnitude(sparsity=0.5)), (".*", None)])
    tx = optax.chain(optax.sgd(0.1), jc.project(plan))
    state, tree = tx.init(tied), tied

    def loss(tree):
        return (language_model(jc.materialize(tree), TOKENS) ** 2).mean()

    for _ in range(2):
        updates, state = tx.update(jax.grad(loss)(tree), state, tree)
        tree = optax.apply_updates(tree, updates)
    small = jc.nodes(tree, state)
    assert float((jc.materialize(small)["head"]["kernel"] == 0).mean()) == 0.5
    assert isinstance(small["head"]["kernel"], Reference)
    seen = jc.simulate(tied, plan)
    np.testing.assert_array_equal(seen["head"]["kernel"], seen["embed"]["embedding"].T)
    gradient = jax.grad(lambda tree: sum(x.sum() for x in jax.tree.leaves(jc.simulate(tree, plan))))(tied)
    np.testing.assert_array_equal(gradient["embed"]["embedding"], 2.0)


def test_readings_of_a_function_see_one_parameter_with_two_uses(params, tied):
    dense = jc.materialize(tied)

    def shared(params, tokens):
        both = {**params, "head": {"kernel": params["embed"]["embedding"].T}}
        return language_model(both, tokens)

    alone = {name: dense[name] for name in ("embed", "mix")}
    for read in (jc.trace.coupling, jc.trace.layout):
        assert str(read(language_model, tied, TOKENS)) == str(read(shared, alone, TOKENS))
    stats = jc.calibrate(language_model, tied, [TOKENS])
    assert set(stats) == {"embed/embedding", "mix/kernel"}
    plan = jc.plan(tied, [("embed.*", jc.prune.Fisher(sparsity=0.5)), (".*", None)])
    found = jc.calibrate(language_model, tied, [TOKENS], plan, loss=lambda p, x: language_model(p, x).sum())
    assert float(jnp.abs(jc.compress(tied, plan, stats=found)["embed"]["embedding"].materialize()).sum()) > 0
    cost = jc.trace.cost(language_model, tied, TOKENS)
    assert cost.total.multiply_adds == jc.trace.cost(language_model, dense, TOKENS).total.multiply_adds
    assert jc.report(dense, tied, cost=cost).total.multiply_adds > 0


def test_accelerate_multiplies_by_the_owner(tied):
    small = jc.compress(tied, jc.plan(tied, [("embed.*", jc.quantize.Int(bits=8, axis=-2)), (".*", None)]))
    fast = jc.accelerate(language_model)
    expected = language_model(jc.materialize(small), TOKENS)
    np.testing.assert_allclose(fast(small, TOKENS), expected, rtol=1e-5, atol=1e-5)
    assert "scaled after the product" in str(fast.report(small, TOKENS))


def test_a_tied_model_is_cut_with_its_owner(tied):
    groups = jc.trace.coupling(language_model, tied, TOKENS)
    name = next(name for name, group in groups.prunable.items() if ("embed/embedding", 1) in group.members)
    keep = {name: np.arange(groups[name].size) != 1}
    masked = jc.trace.mask(tied, groups, keep)
    small_fn, small = jc.shrink(language_model, tied, keep, TOKENS)
    assert small["embed"]["embedding"].shape == (12, 3)
    expected = language_model(jc.materialize(masked), TOKENS)
    np.testing.assert_allclose(small_fn(small, TOKENS), expected, rtol=1e-5, atol=1e-6)
    assert jc.materialize(small)["head"]["kernel"].shape == (3, 12)


def test_layers_are_shared_by_a_pattern(rng):
    draw = {f"layer/{i}": {"up": jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)} for i in range(3)}
    tree = {"layer": {str(i): draw[f"layer/{i}"] for i in range(3)}}
    tied = jc.tie(tree, {r"layer/[0-9]+/(.*)": r"layer/0/\1"})
    assert jc.nbits(tied) == 32 * 32
    for i in range(3):
        np.testing.assert_array_equal(jc.materialize(tied)["layer"][str(i)]["up"], tree["layer"]["0"]["up"])


def test_states_of_flax_are_tied_alike():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed, self.head = nnx.Embed(6, 3, rngs=rngs), nnx.Linear(3, 6, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.head(self.embed(x))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    tied = jc.tie(state, {"head/kernel": "embed/embedding"}, transpose=("head/kernel",))
    out = nnx.merge(graph, jc.materialize(tied))(jnp.arange(6))
    table = jc.materialize(tied)["embed"]["embedding"]
    table = getattr(table, "get_value", lambda: table)() if hasattr(table, "get_value") else table.value
    np.testing.assert_allclose(out, table @ table.T, rtol=1e-5)
    assert len(jax.tree.leaves(tied)) == 1
    gradient = jax.grad(lambda t: (nnx.merge(graph, jc.materialize(t))(jnp.arange(6)) ** 2).sum())(tied)
    assert jax.tree.structure(gradient) == jax.tree.structure(tied)

    model = linen.Embed(6, 3)
    variables = model.init(jax.random.key(0), jnp.arange(6))["params"]
    both = jc.tie({"a": variables, "b": variables}, {"b/embedding": "a/embedding"})
    assert jc.nbits(both) == 32 * 18


def test_axes_in_any_order_and_stacked_layers_inside_scan(rng):
    w = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    tree = {"q": w, "o": jnp.zeros((3, 4, 2))}
    tied = jc.tie(tree, {"o": "q"}, transpose={"o": (1, 2, 0)})
    np.testing.assert_array_equal(jc.materialize(tied)["o"], w.transpose(1, 2, 0))
    stacked = jc.tie({"a": w, "b": w}, {"b": "a"}, transpose=("b",)) if w.shape[1] == w.shape[2] else None
    assert stacked is None
    square = jnp.asarray(rng.normal(size=(2, 3, 3)), jnp.float32)
    layers = jc.tie({"a": square, "b": square}, {"b": "a"}, transpose=("b",))
    _, found = jax.lax.scan(lambda carry, layer: (carry, jc.materialize(layer)["b"]), 0, layers)
    np.testing.assert_array_equal(found, square.swapaxes(1, 2))
    same = jax.vmap(lambda tree: jc.materialize(tree)["b"])(layers)
    np.testing.assert_array_equal(same, found)


def test_all_uses_of_a_node_that_samples_see_one_sample():
    node = jc.prune.HardConcrete()(jnp.ones((8, 8)))
    tree = {"a": node, "b": Reference("a", (-1, -2))}
    dense = jc.materialize(tree, key=jax.random.key(1))
    np.testing.assert_array_equal(dense["a"], dense["b"].T)


def test_a_global_codebook_is_one_leaf(rng, tmp_path):
    params = {k: jnp.asarray(rng.normal(size=(16, n)), jnp.float32) for k, n in (("a", 8), ("b", 4), ("c", 2))}
    plan = jc.plan(params, [(".*", jc.chain(jc.prune.Magnitude(sparsity=0.5), KMeans(clusters=8, scope="global")))])
    small = jc.compress(params, plan)
    assert small["b"].values.codebook == Reference("a/values/codebook", sizes=(8,))
    train, held = jc.split(small)
    assert [x.shape for x in jax.tree.leaves(train)] == [(8,)]
    # The gradient of a shared value is the sum over its entries in all leaves.
    gradient = jax.grad(lambda t: sum(x.sum() for x in jax.tree.leaves(jc.materialize(jc.merge(t, held)))))(train)
    counts = sum(np.bincount(np.asarray(n.values.indices)[np.asarray(n.mask)], minlength=8) for n in small.values())
    np.testing.assert_array_equal(gradient["a"].values.codebook, counts)
    jc.save(tmp_path / "model", small)
    jax.tree.map(np.testing.assert_array_equal, jc.materialize(jc.load(tmp_path / "model")), jc.materialize(small))
    # Stored forms share it still, also where they lead to it by other names: out-first codes are wrapped until then.
    method = jc.residual(KMeans(clusters=8, scope="global"), jc.quantize.training.DSQ(bits=3))
    layout = dict.fromkeys(params, jc.Layout(inputs=(-1,), outputs=(-2,)))
    scored = jc.chain(jc.prune.dynamic.Movement(sparsity=0.5), KMeans(clusters=8, scope="global"))
    for plan in (jc.plan(params, [(".*", method)], layout=layout), jc.plan(params, [(".*", scored)])):
        small = jc.compress(params, plan, key=jax.random.key(0))
        final = jc.finalize(small)
        jax.tree.map(np.testing.assert_array_equal, jc.materialize(final), jc.materialize(small))
        assert sum(x.size == 8 for x in jax.tree.leaves(final)) == 1


def values_of(tree):
    return np.unique(np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]))


@pytest.mark.parametrize("method", [KMeans(clusters=3, scope="global")])
def test_training_with_a_global_codebook_keeps_one(rng, method):
    params = {k: jnp.asarray(rng.normal(size=(8, n)), jnp.float32) for k, n in (("a", 8), ("b", 4))}
    plan = jc.plan(params, [(".*", method)])
    tx = optax.chain(optax.adam(0.1), jc.project(plan, every=3))
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
    small = jc.nodes(params, state)
    assert len(jax.tree.leaves(jc.split(small)[0])) == 1
    assert len(values_of(jc.materialize(small))) <= 3
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), jc.materialize(small), params)
    # Projected, a shared value is the mean of its entries in all leaves.
    other = {k: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for k, x in params.items()}
    found = core.projected(small, other)["a"].codebook
    flat = [(np.ravel(other[k]), np.ravel(small[k].indices)) for k in other]
    total = sum(np.bincount(i, x, minlength=3) for x, i in flat)
    np.testing.assert_allclose(found, total / sum(np.bincount(i, minlength=3) for _, i in flat), rtol=1e-5)


@pytest.mark.parametrize(
    ("shared", "options", "message"),
    [
        ({"head/kernl": "embed/embedding"}, {}, r"'head/kernl' matches no leaf.*'head/kernel'"),
        ({"head/kernel": "embed"}, {}, r"head/kernel: its owner 'embed' is not in the tree.*'embed/.\*'"),
        ({"head/kernel": "embed/embedding"}, {}, r"head/kernel: found .*4, 12.*embed/embedding is .*12, 4.*transpose="),
        ({"mix/kernel": "embed/embedding"}, {}, r"mix/kernel: found .*its owner embed/embedding.*alike"),
        (
            {"mix/kernel": "head/kernel", "head/kernel": "mix/kernel"},
            {},
            r"mix/kernel: its owner head/kernel is to stand",
        ),
        (
            {"head/kernel": "embed/embedding", ".*kernel": "mix/kernel"},
            {},
            r"head/kernel: found two owners, embed",
        ),
        ({"head/kernel": "embed/embedding"}, {"transpose": ("mix/kernel",)}, r"transpose 'mix/kernel' matches no leaf"),
        (
            {"head/kernel": "embed/embedding"},
            {"transpose": {"head/kernel": (0, 0)}},
            r"expected an order of its last",
        ),
    ],
)
def test_ties_that_cannot_be_name_both_ends(params, shared, options, message):
    with pytest.raises(ValueError, match=message):
        jc.tie(params, shared, **options)


def test_a_leaf_has_one_owner(tied):
    with pytest.raises(ValueError, match=r"head/kernel: stands for embed/embedding already.*jc.untie"):
        jc.tie(tied, {"head/kernel": "mix/kernel"})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"b": Reference("a")}, r"b: refers to a, which is not in the tree"),
        ({"a": Reference("b"), "b": Reference("a")}, r"refers to \w, which refers back to"),
        ({"a": Reference("a")}, r"a: refers to a, which refers back to a"),
        ({"a": jnp.ones((3, 2)), "b": Reference("a", (), (2, 2))}, r"b: refers to a .*\(2, 2\), and found \(3, 2\)"),
        ({"a": jnp.ones(3), "b": Reference("a/codebook")}, r"b: refers to a/codebook, and a is .*no 'codebook'"),
    ],
)
def test_references_that_lead_nowhere_name_both_ends(tree, message):
    with pytest.raises(ValueError, match=message):
        jc.materialize(tree)


def test_a_reference_alone_says_what_to_do(tied):
    with pytest.raises(ValueError, match=r"refers to embed/embedding, which is not in the tree.*jc.untie"):
        jc.materialize({"head": tied["head"]})
    with pytest.raises(ValueError, match=r"reference to embed/embedding has no value by itself.*jc.untie"):
        tied["head"]["kernel"].materialize()
    with pytest.raises(ValueError, match=r"head/kernel: stands for embed/embedding"):
        jc.compress(tied, jc.plan(tied, []).replace({"head/kernel": jc.quantize.Int(bits=4)}))
