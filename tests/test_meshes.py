"""Meshes with explicit axes, as ``jax.make_mesh`` makes them: a user's steps, compared with one device."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jcompress as jc
from jcompress.numeric import meshes

pytestmark = pytest.mark.skipif(not hasattr(jax.sharding, "use_abstract_mesh"), reason="explicit axes are no default")
Q, M = jc.quantize, jc.prune.Magnitude
SPECS = {"up": P(None, "model"), "bias": P("model"), "down": P("model", None)}


def make_mesh(kind=AxisType.Explicit):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def put(mesh, x, *spec):
    return jax.device_put(jnp.asarray(x, jnp.float32), NamedSharding(mesh, P(*spec)))


def mlp(params, x, act=jax.nn.relu):
    hidden = act(x @ params["up"] + params["bias"])
    return jnp.matmul(hidden, params["down"], out_sharding=_rows(x))


def scope(mesh):
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _rows(x):
    """Where the product of a user's own function goes, which explicit axes ask for."""
    mesh = meshes.mesh_of(x)
    return None if mesh is None else NamedSharding(mesh, P("data", None))


@pytest.fixture
def alone(rng):
    sizes = {"up": (8, 16), "bias": (16,), "down": (16, 8)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in sizes.items()}


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)


def spread(mesh, params):
    return {name: put(mesh, w, *SPECS[name]) for name, w in params.items()}


def assert_close(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=2e-4, atol=2e-4)


def assert_spread(params, like):
    for name, w in params.items():
        assert w.sharding.is_equivalent_to(like[name].sharding, w.ndim), (name, w.sharding)


CASES = {
    (8, 16): P("data", "model"),
    (1, 16): P(None, "model"),
    (8, 3): P("data", None),
    (3, 16): P(None, "model"),
    (5,): P(None),
    (16,): P("model"),
    (): P(),
    (2, 8, 16): P(None, "data", "model"),
    (16, 8): P("model", "data"),
    (16, 1, 3): P("model", None, None),
    (32, 4): P("data", "model"),
}


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_what_results_are_sharded_like(shape):
    w = put(make_mesh(), np.ones((8, 16)), "data", "model")
    found = jax.jit(meshes.on_any_mesh(lambda w: jnp.zeros(shape) + w.sum()))(w)
    assert found.sharding.spec == CASES[shape]


def sorted_rows(w):
    return jnp.sort(w.reshape(4, -1)).reshape(w.shape)[::-1]


@pytest.mark.parametrize("scoped", [True, False], ids=["in the mesh", "outside"])
@pytest.mark.parametrize("way", ["eager", "jit", "vmap", "scan", "cond", "while", "grad"])
def test_functions_run_wherever_arrays_are(way, scoped, rng):
    mesh = make_mesh()
    call = meshes.on_any_mesh(sorted_rows)
    ways = {
        "eager": lambda f: f,
        "jit": jax.jit,
        "vmap": lambda f: jax.jit(lambda w: jax.vmap(f)(jnp.stack([w, 2 * w]))[1]),
        "scan": lambda f: jax.jit(lambda w: jax.lax.scan(lambda c, _: (f(c), None), w, None, length=2)[0]),
        "cond": lambda f: jax.jit(lambda w: jax.lax.cond(w.sum() > -1e9, lambda: f(w), lambda: w)),
        "while": lambda f: jax.jit(lambda w: jax.lax.fori_loop(0, 2, lambda _, c: f(c), w)),
        "grad": lambda f: jax.jit(jax.grad(lambda w: (f(w) * w).sum())),
    }
    host = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)
    w = put(mesh, host, "data", "model")
    expected = ways[way](sorted_rows)(host)
    with scope(mesh if scoped else None):
        found = ways[way](call)(w)
    assert_close(found, expected)
    assert found.sharding.is_equivalent_to(w.sharding, 2)


def test_hyperparameters_may_be_arrays_of_the_mesh(alone):
    params = spread(make_mesh(), alone)

    def zeros(params, sparsity):
        plan = jc.plan(params, [("up|down", M(sparsity=sparsity)), (".*", None)])
        return jc.materialize(jc.compress(params, plan))["up"]

    with jax.set_mesh(make_mesh()):
        found = jax.jit(zeros)(params, jnp.float32(0.75))
    assert int((found == 0).sum()) == 96


def trained(tx, params, x):
    """Three steps of adamw under ``jit`` and the state of the optimizer."""

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(lambda p: (mlp(p, x) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for _ in range(3):
        params, state = step(params, state, x)
    return params, state


METHODS = [M(sparsity=0.5, scope="global"), Q.NF4(group_size=4), jc.share.KMeans(4), jc.factorize.SVD(rank=4),
           Q.Rotation(Q.Int(4)), jc.chain(M(sparsity=0.5), Q.Int(4))]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_sparse_training_on_an_explicit_mesh(method, alone, x, tmp_path):
    plan = jc.plan(alone, [("up|down", method), (".*", None)])
    tx = optax.chain(optax.adamw(1e-2), jc.project(plan, every=2))
    expected, _ = trained(tx, alone, x)
    mesh = make_mesh()
    params = spread(mesh, alone)
    with jax.set_mesh(mesh):
        found, state = trained(tx, params, put(mesh, x, "data", None))
        nodes = jc.nodes(found, state)
        jc.save(tmp_path / "nodes", nodes)
        dense = jc.materialize(nodes)
    assert_close(found, expected)
    assert_spread(found, params)
    assert_spread(dense, params)
    assert_close(jc.materialize(jc.load(tmp_path / "nodes")), dense)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_simulating_passes_gradients_on_an_explicit_mesh(method, alone, x):
    plan = jc.plan(alone, [("up|down", method), (".*", None)])
    slope = jax.jit(lambda params, x: jax.grad(lambda p: (mlp(jc.simulate(p, plan), x) ** 2).sum())(params))
    mesh = make_mesh()
    params = spread(mesh, alone)
    with jax.set_mesh(mesh):
        found = slope(params, put(mesh, x, "data", None))
    assert_close(found, slope(alone, x))
    assert_spread(found, params)


@pytest.mark.parametrize(
    "method", [Q.GPTQ(bits=4, group_size=4), jc.prune.SparseGPT(sparsity=0.5), Q.LQER(rank=2)], ids=str
)
def test_calibrated_methods_on_an_explicit_mesh(method, alone, x):
    def compressed(params, x):
        plan = jc.plan(params, [("up|down", method), (".*", None)])
        return jc.compress(params, plan, stats=jc.calibrate(mlp, params, [x], plan=plan))

    mesh = make_mesh()
    params, batch = spread(mesh, alone), put(mesh, x, "data", None)
    with jax.set_mesh(mesh):
        found = compressed(params, batch)
        dense = jc.materialize(found)
        outputs = jax.jit(jc.accelerate(mlp))(found, batch)
    expected = compressed(alone, x)
    assert_close(dense, jc.materialize(expected))
    assert_spread(dense, params)
    assert_close(outputs, mlp(jc.materialize(expected), x))


@pytest.mark.parametrize("rule", [jc.prune.dynamic.SET(), jc.prune.dynamic.RigL(stop=100)], ids=repr)
def test_masks_that_move_on_an_explicit_mesh(rule, alone, x, tmp_path):
    plan = jc.plan(alone, [("up|down", M(sparsity=0.75)), (".*", None)])
    tx = jc.prune.dynamic.sparse(optax.adamw(1e-2), rule, plan, every=2, key=jax.random.key(0))
    mesh = make_mesh()
    params = spread(mesh, alone)
    with jax.set_mesh(mesh):
        found, state = trained(tx, params, put(mesh, x, "data", None))
        nodes = jc.nodes(found, state)
    expected, _ = trained(tx, alone, x)
    assert_close(found, expected)
    assert_spread(found, params)
    assert_spread({name: nodes[name].mask for name in ("up", "down")}, params)
    jc.save(tmp_path / "nodes", nodes)
    assert_close(jc.materialize(jc.load(tmp_path / "nodes")), expected)


def whole_loop(params, x, path):
    """From parameters to a file, as a user writes it: plan, prune while training, simulate, calibrate, round, store."""
    plan = jc.plan(params, [("up|down", M(sparsity=0.5)), (".*", None)], layout=jc.trace.layout(mlp, params, x))
    tx = optax.chain(optax.adamw(1e-2), jc.project(plan, every=2))
    params, state = trained(tx, params, x)
    sparse = jc.nodes(params, state)
    grid = jc.plan(params, [("up|down", Q.Int(bits=8)), (".*", None)])
    slopes = jax.jit(jax.grad(lambda p: (mlp(jc.simulate(p, grid), x) ** 2).mean()))(params)
    rounding = jc.chain(jc.prune.Nonzero(), Q.Int(bits=4))
    steps = {"up": jc.prune.SparseGPT(sparsity=0.5, quantizer=Q.Int(bits=4)), "down": Q.GPTQ(bits=4), "bias": rounding}
    last = jc.plan(params, list(steps.items()))
    small = jc.compress(params, last, stats=jc.calibrate(mlp, params, [x], plan=last))
    train, held = jc.split(small)
    tuned = jax.jit(jax.grad(lambda t: (mlp(jc.materialize(jc.merge(t, held)), x) ** 2).mean()))(train)
    jc.save(path, small)
    table = jc.report(params, small)
    dense = {"trained": params, "nodes": jc.materialize(sparse), "slopes": slopes, "small": jc.materialize(small)}
    others = {"small": small, "loaded": jc.load(path), "tuned": tuned, "outputs": jc.accelerate(mlp)(small, x)}
    return dense, others, table


def test_a_users_whole_loop_on_an_explicit_mesh(alone, x, tmp_path):
    mesh = make_mesh()
    params = spread(mesh, alone)
    with jax.set_mesh(mesh):
        dense, others, table = whole_loop(params, put(mesh, x, "data", None), tmp_path / "on a mesh")
    expected, others_alone, table_alone = whole_loop(alone, x, tmp_path / "alone")
    for name, tree in dense.items():
        assert_close(tree, expected[name])
        assert_spread(tree, params)
    assert_close(others, others_alone)
    assert str(table) == str(table_alone)
    assert (tmp_path / "on a mesh").stat().st_size == (tmp_path / "alone").stat().st_size


@jax.custom_vjp
def clipped(h):
    return jnp.maximum(h, 0)


clipped.defvjp(lambda h: (clipped(h), h), lambda h, g: (jnp.where(h > 0, g, 0),))


@pytest.mark.parametrize("scoped", [True, False], ids=["in the mesh", "outside"])
@pytest.mark.parametrize("act", [jax.nn.relu, jax.nn.gelu, clipped], ids=["relu", "gelu", "custom_vjp"])
@pytest.mark.parametrize("kept", [8, 5])
def test_shrinking_keeps_shardings(kept, act, scoped, alone, x):
    def fn(params, x):
        return mlp(params, x, act)

    mesh, keep = make_mesh(), {"up[1]": np.arange(16) < kept}
    params, batch = spread(mesh, alone), put(mesh, x, "data", None)
    with scope(mesh if scoped else None):
        small, cut = jc.shrink(fn, params, keep, batch)
        masked = jax.jit(lambda p: jc.trace.mask(p, small.groups, small.keep))(params)
        found = jax.jit(small)(cut, batch)
        slopes = jax.jit(jax.grad(lambda p, x: (small(p, x) ** 2).sum()))(cut, batch)
    small_alone, cut_alone = jc.shrink(fn, alone, keep, x)
    assert_close(cut, cut_alone)
    assert_close(found, small_alone(cut_alone, x))
    assert_close(slopes, jax.grad(lambda p: (small_alone(p, x) ** 2).sum())(cut_alone))
    assert_spread(masked, params)
    assert found.sharding.spec == P("data", None)
    if kept == 8:
        assert_spread(cut, params)
    else:  # five do not divide by two
        assert cut["up"].sharding.is_fully_replicated


def test_shrinking_keeps_shardings_with_automatic_axes(alone, x):
    params = spread(make_mesh(AxisType.Auto), alone)
    _, cut = jc.shrink(mlp, params, {"up[1]": np.arange(16) < 8}, x)
    assert_spread(cut, params)


HEADS = {"q": P(None, None, "model", None), "o": P(None, "model", None, None), "up": P(None, None, "model")}
HEADS |= {"k": HEADS["q"], "v": HEADS["q"], "down": P(None, "model", None)}


def attention(params, x):
    mesh = meshes.mesh_of(x)
    out = {} if mesh is None else {"out_sharding": NamedSharding(mesh, P("data", None, None))}

    @jax.checkpoint
    def layer(x, p):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
        shares = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
        x = x + jnp.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", shares, v), p["o"], **out)
        return x + jnp.einsum("btf,fd->btd", jax.nn.gelu(x @ p["up"]), p["down"], **out), None

    return jax.lax.scan(layer, x, params)[0]


def attention_params(rng):
    shapes = {"q": (2, 8, 4, 4), "k": (2, 8, 4, 4), "v": (2, 8, 4, 4), "o": (2, 4, 4, 8), "up": (2, 8, 16)}
    shapes["down"] = (2, 16, 8)
    return {name: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32) for name, shape in shapes.items()}


def test_heads_are_read_and_cut_where_they_are_sharded(rng):
    alone, x, mesh = attention_params(rng), jnp.asarray(rng.normal(size=(8, 6, 8)), jnp.float32), make_mesh()
    params = {name: put(mesh, w, *HEADS[name]) for name, w in alone.items()}
    keep = {"k[2]": np.arange(4) % 2 == 0, "up[2]": np.arange(16) < 6}
    small_alone, cut_alone = jc.shrink(attention, alone, keep, x)
    with jax.set_mesh(mesh):
        batch = put(mesh, x, "data", None, None)
        small, cut = jc.shrink(attention, params, keep, batch)
        found = jax.jit(small)(cut, batch)
    assert_close(cut, cut_alone)
    assert_close(found, small_alone(cut_alone, x))
    assert_spread(cut, params)


@pytest.mark.parametrize("method", [Q.GPTQ(bits=4), jc.factorize.SVD(rank=2), Q.Rotation(Q.Int(4))], ids=str)
def test_heads_stay_sharded_whatever_the_order_of_axes(method, rng):
    def compressed(params, x):
        plan = jc.plan(params, [(".*", method)], layout=jc.trace.layout(attention, params, x))
        stats = jc.calibrate(attention, params, [x], plan=plan) if method.needs else None
        return jc.compress(params, plan, stats=stats)

    alone, x, mesh = attention_params(rng), jnp.asarray(rng.normal(size=(8, 6, 8)), jnp.float32), make_mesh()
    params = {name: put(mesh, w, *HEADS[name]) for name, w in alone.items()}
    with jax.set_mesh(mesh):
        found = jc.materialize(compressed(params, put(mesh, x, "data", None, None)))
    assert_close(found, jc.materialize(compressed(alone, x)))
    assert_spread(found, params)
