"""What layers share: templates, ALBERT's layers, attention maps, an equilibrium, LegoNet's blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jcompress as jc
from jcompress.numeric.blocks import unblocked

Templates = jc.share.Templates


def drawn(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def layers(rng, count=4, *shape):
    return {str(i): {"kernel": drawn(rng, *(shape or (6, 5)))} for i in range(count)}


def compressed(params, method):
    return jc.compress(params, jc.plan(params, [(".*", method)]))


def test_as_many_templates_as_layers_are_exact_and_fewer_the_best(rng):
    params = layers(rng)
    x = np.stack([np.asarray(params[str(i)]["kernel"], np.float64).ravel() for i in range(4)])
    values = np.linalg.svd(x, compute_uv=False)
    for count in (1, 2, 4):
        dense = jc.materialize(compressed(params, Templates(count)))
        error = sum(float(jnp.square(dense[k]["kernel"] - params[k]["kernel"]).sum()) for k in params)
        np.testing.assert_allclose(error, (values[count:] ** 2).sum(), rtol=1e-4, atol=1e-6)


def test_templates_are_stored_and_trained_once(rng, tmp_path):
    params = layers(rng)
    small = compressed(params, Templates(2))
    assert jc.nbits(small) == 32 * (2 * 30 + 4 * 2)
    jc.save(tmp_path / "small.jc", small)
    loaded = jc.load(tmp_path / "small.jc")
    for a, b in zip(*(jax.tree.leaves(jc.materialize(t)) for t in (small, loaded)), strict=True):
        np.testing.assert_array_equal(a, b)
    train, held = jc.split(small)
    weight = layers(rng)

    def loss(dense):
        return sum(jnp.sum(weight[k]["kernel"] * dense[k]["kernel"]) for k in dense)

    slope = jax.grad(lambda t: loss(jc.materialize(jc.merge(t, held))))(train)
    owner = next(x["kernel"] for x in slope.values() if isinstance(x["kernel"].templates, jax.Array))
    shares = {k: small[k]["kernel"].weights for k in small}
    expected = sum(shares[k][:, None, None] * weight[k]["kernel"] for k in small)
    np.testing.assert_allclose(owner.templates, expected, rtol=1e-4, atol=1e-5)


def test_training_keeps_layers_on_their_templates(rng):
    params = layers(rng)
    tx = optax.chain(optax.sgd(0.1), jc.project(jc.plan(params, [(".*", Templates(2))]), every=1))
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
    x = np.stack([np.asarray(params[k]["kernel"]).ravel() for k in params])
    assert np.linalg.svd(x, compute_uv=False)[2] < 1e-4
    nodes = jc.nodes(params, state)
    assert jc.nbits(nodes) == 32 * (2 * 30 + 4 * 2)


def test_stacked_layers_have_templates_of_their_own(rng):
    params = layers(rng, 3, 2, 6, 5)
    small = compressed(params, jc.stacked(Templates(2)))
    for i in range(2):
        alone = compressed({k: {"kernel": v["kernel"][i]} for k, v in params.items()}, Templates(2))
        for k in params:
            np.testing.assert_allclose(
                jc.materialize(small)[k]["kernel"][i], jc.materialize(alone)[k]["kernel"], atol=1e-5
            )


@pytest.mark.parametrize(
    ("shapes", "count", "message"),
    [
        ([(3, 4), (4, 3)], 1, "1/kernel: found float32"),
        ([(3, 4), (3, 4)], 3, "0/kernel: Templates found count=3 for 2 leaves"),
    ],
)
def test_templates_that_do_not_fit_are_refused_by_name(rng, shapes, count, message):
    params = {str(i): {"kernel": drawn(rng, *shape)} for i, shape in enumerate(shapes)}
    with pytest.raises(ValueError, match=message):
        compressed(params, Templates(count))


def test_albert_has_one_layer_whatever_its_depth_and_a_factorized_embedding(rng):
    vocabulary, width, rank = 40, 12, 3

    def model(params, tokens):
        x = params["embed"]["embedding"][tokens]
        for name in sorted(params["layer"]):
            x = x + jnp.tanh(x @ params["layer"][name]["kernel"])
        return x @ params["head"]["kernel"]

    def build(depth):
        params = {
            "embed": {"embedding": drawn(rng, vocabulary, width)},
            "layer": layers(rng, depth, width, width),
            "head": {"kernel": drawn(rng, width, vocabulary)},
        }
        tied = jc.tie(params, {"head/kernel": "embed/embedding"}, transpose=("head/kernel",))
        tied = jc.tie(tied, {r"layer/[0-9]+/(.*)": r"layer/0/\1"})
        return jc.compress(tied, jc.plan(tied, [("embed/.*", jc.factorize.SVD(rank=rank)), (".*", None)]))

    small, deep = build(2), build(5)
    numbers = vocabulary * rank + rank * width + width * width
    assert jc.nbits(small) == jc.nbits(deep) == 32 * numbers
    assert vocabulary * rank + rank * width < vocabulary * width
    tokens = jnp.asarray(rng.integers(0, vocabulary, size=(3, 4)))
    train, held = jc.split(deep)
    slope = jax.grad(lambda t: jnp.sum(jnp.sin(model(jc.materialize(jc.merge(t, held)), tokens))))(train)
    dense = jax.grad(lambda p: jnp.sum(jnp.sin(model(p, tokens))))(jc.materialize(deep))
    total = sum(dense["layer"][str(i)]["kernel"] for i in range(5))
    np.testing.assert_allclose(slope["layer"]["0"]["kernel"], total, rtol=1e-3, atol=1e-4)


def test_legonet_is_exact_on_its_own_blocks_and_loses_most_of_others(rng):
    """32 blocks of 4x4 are 64 times smaller, and leave two thirds of the energy of weights without a pattern."""
    method = jc.share.KMeans(clusters=32, block=(4, 4), scope="global")
    bricks = rng.normal(size=(32, 16)).astype(np.float32)
    planted = {
        name: jnp.asarray(unblocked(bricks[rng.integers(0, 32, size=shape)], (4, 4)))
        for name, shape in (("a", (12, 16)), ("b", (20, 10)))
    }
    small = compressed(planted, method)
    for name, w in planted.items():
        np.testing.assert_allclose(jc.materialize(small)[name], w, atol=1e-4)
    assert jc.nbits(small) == 5 * (12 * 16 + 20 * 10) + 32 * 32 * 16
    plain = {"a": drawn(rng, 128, 128), "b": drawn(rng, 64, 128)}
    dense = jc.materialize(compressed(plain, method))
    error = sum(float(jnp.square(dense[k] - plain[k]).sum()) for k in plain)
    share = error / sum(float(jnp.square(w).sum()) for w in plain.values())
    assert 2 ** (-2 * 5 / 16) < share < 0.75  # the bound of any code of 5 bits for 16 numbers


def layer(params, x, z):
    return jnp.tanh(z @ params["w"] + x @ params["u"] + params["b"])


def problem(rng):
    w = rng.normal(size=(8, 8))
    params = {"w": jnp.asarray(0.7 * w / np.linalg.norm(w, 2), jnp.float32), "u": drawn(rng, 3, 8), "b": drawn(rng, 8)}
    return params, drawn(rng, 4, 3), jnp.zeros((4, 8))


@pytest.mark.parametrize("memory", [1, 5])
def test_an_equilibrium_stands_still_and_its_gradient_is_that_of_unrolling(rng, memory):
    params, x, start = problem(rng)

    def implicit(params, x):
        z = jc.nn.equilibrium(layer, params, x, start, iterations=100, tolerance=1e-6, memory=memory)
        return jnp.sum(jnp.sin(z)), z

    def unrolled(params, x):
        z = start
        for _ in range(80):
            z = layer(params, x, z)
        return jnp.sum(jnp.sin(z)), z

    (slopes, z), (expected, other) = (
        jax.grad(f, argnums=(0, 1), has_aux=True)(params, x) for f in (implicit, unrolled)
    )
    np.testing.assert_allclose(layer(params, x, z), z, atol=1e-5)
    np.testing.assert_allclose(z, other, atol=1e-5)
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_acceleration_takes_fewer_steps(rng):
    params, x, start = problem(rng)
    params = params | {"w": params["w"] * 1.3}

    def left(memory):
        z = jc.nn.equilibrium(layer, params, x, start, iterations=12, tolerance=0.0, memory=memory)
        return float(jnp.abs(layer(params, x, z) - z).max())

    assert left(6) < 0.3 * left(1)


def test_memory_of_an_equilibrium_does_not_grow(rng):
    params, x, start = problem(rng)

    def memory(iterations):
        loss = lambda p: jnp.sum(jc.nn.equilibrium(layer, p, x, start, iterations=iterations))  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert memory(200) <= 1.01 * memory(5)


def test_an_equilibrium_of_a_tree_trains_on_nodes(rng):
    """State and parameters may be trees; the parameters may be compressed ones."""
    params, x, _ = problem(rng)
    small = jc.compress(params, jc.plan(params, [("w", jc.quantize.Int(bits=8)), (".*", None)]))
    train, held = jc.split(small)
    start = {"a": jnp.zeros((4, 8)), "b": jnp.zeros((4, 8))}

    def both(params, x, z):
        return {"a": layer(params, x, z["b"]), "b": 0.5 * z["a"]}

    def loss(train):
        dense = jc.materialize(jc.merge(train, held))
        return jnp.sum(jc.nn.equilibrium(both, dense, x, start)["a"])

    slope = jax.jit(jax.grad(loss))(train)
    assert bool(jnp.isfinite(slope["w"].scale).all()) and bool((slope["w"].scale != 0).any())


def test_maps_that_are_alike_are_shared_by_neighbours(rng):
    p = jax.nn.softmax(drawn(rng, 2, 4, 4))
    q = jax.nn.softmax(drawn(rng, 2, 4, 4))
    divergence = jc.nn.map_divergence
    assert float(divergence(p, p)) == 0
    np.testing.assert_allclose(divergence(p, q), divergence(q, p), rtol=1e-6)
    assert 0 < float(divergence(p, q)) < np.log(2)
    np.testing.assert_allclose(divergence(jnp.eye(3), jnp.eye(3)[::-1]), np.log(2) * 2 / 3, rtol=1e-6)
    near = 0.99 * p + 0.01 * q
    assert jc.nn.attention_owners([p, near, q, q, p], 0.01) == (0, 0, 2, 2, 4)
    assert jc.nn.attention_owners([p, near], 0.0) == (0, 1)


def test_a_shared_map_of_equal_layers_changes_nothing(rng):
    nnx = pytest.importorskip("flax.nnx")
    first, second = (jc.nn.SharedAttention(8, 2, rngs=nnx.Rngs(0)) for _ in range(2))
    follower = jc.nn.SharedAttention(8, 2, shares=True, rngs=nnx.Rngs(1))
    follower.value, follower.out = second.value, second.out
    x = drawn(rng, 3, 5, 8)
    _, attention = first(x)
    np.testing.assert_allclose(follower(x, attention)[0], second(x)[0], rtol=1e-6)
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    causal = jnp.tril(jnp.ones((5, 5), bool))
    assert not bool(jnp.triu(first(x, mask=causal)[1], 1).any())
    sizes = [sum(x.size for x in jax.tree.leaves(nnx.state(m, nnx.Param))) for m in (second, follower)]
    assert sizes == [4 * 64, 2 * 64]
    with pytest.raises(ValueError, match="expects the map of another layer"):
        follower(x)
