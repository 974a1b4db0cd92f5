"""What crosses devices, read from the compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_conformance import collectives

import jcompress as jc
from jcompress.numeric.threshold import keep_largest, keep_random

SPECS = [P("data", None), P(None, "model"), P("data", "model"), P(("data", "model"), None)]


def placed(mesh, spec):
    rng = np.random.default_rng(0)
    shapes = {"a": (256, 128), "b": (128, 64), "c": (64, 64)}
    return {
        k: jax.device_put(rng.normal(size=s).astype(np.float32), NamedSharding(mesh, spec)) for k, s in shapes.items()
    }


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_global_threshold_moves_scalars_only(spec, axis_type):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    params = placed(mesh, spec)
    plan = jc.plan(params, [(".*", jc.prune.Magnitude(sparsity=0.7, scope="global"))])
    compress = jax.jit(lambda p: jc.compress(p, plan))
    hlo = compress.lower(params).compile().as_text()
    found = list(collectives(hlo))
    assert found, "a global decision must communicate"
    assert max(size for _, size in found) <= 8, found  # one scalar from each of 8 devices
    small = compress(params)
    total = sum(x.size for x in params.values())
    assert sum(int((~node.mask).sum()) for node in small.values()) == round(0.7 * total)
    alone = jc.compress(jax.device_get(params), plan)
    for name, node in small.items():
        np.testing.assert_array_equal(node.mask, alone[name].mask)
        assert node.mask.sharding.is_equivalent_to(params[name].sharding, 2)
        assert node.values.sharding.is_equivalent_to(params[name].sharding, 2)


def test_ties_are_broken_alike_under_any_sharding():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    w = np.ones((64, 16), np.float32)
    want = jc.prune.Magnitude(sparsity=0.3)(jnp.asarray(w)).mask
    for spec in SPECS:
        got = jax.jit(lambda w: jc.prune.Magnitude(sparsity=0.3)(w).mask)(jax.device_put(w, NamedSharding(mesh, spec)))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
def test_one_codebook_for_sharded_leaves_moves_codebooks_and_counts_only(spec):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = placed(mesh, spec)
    plan = jc.plan(params, [(".*", jc.share.KMeans(clusters=16, scope="global", iterations=5))])
    compress = jax.jit(lambda p: jc.compress(p, plan))
    found = list(collectives(compress.lower(params).compile().as_text()))
    # A histogram of 4,096 bins whatever the size of the leaves is, as a sum, and codebooks.
    assert max(size for name, size in found if name == "all-reduce") == 4096
    assert all(size <= 8 * 16 for name, size in found if name != "all-reduce"), found
    small, alone = compress(params), jc.compress(jax.device_get(params), plan)
    np.testing.assert_allclose(small["a"].codebook, alone["a"].codebook, atol=2e-3)


def test_the_transform_keeps_shardings_and_moves_no_parameters():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = placed(mesh, P("data", "model"))
    ramp = optax.linear_schedule(0.0, 0.8, 10)
    plan = jc.plan(params, [(".*", jc.prune.Magnitude(sparsity=ramp, scope="global"))])
    tx = optax.chain(optax.adam(1e-2), jc.project(plan, every=2))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    assert max(size for _, size in collectives(step.lower(params, state).compile().as_text())) <= 8
    sharding = params["a"].sharding
    for _ in range(3):
        params, state = step(params, state)
    assert params["a"].sharding.is_equivalent_to(sharding, 2)
    assert state[1].held["a"].mask.sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("spec", [P(None, "model"), P("model", None)], ids=str)
@pytest.mark.parametrize("choice", ["magnitude", "among", "random"])
def test_a_choice_among_many_weights_moves_scalars_only(choice, spec, axis_type):
    """Large enough for the search to look at a sample of the weights first."""
    choose = {
        "magnitude": lambda w, m: jc.prune.Magnitude(sparsity=0.9)(w).mask,
        "among": lambda w, m: keep_largest([w], 1000, among=[m], by=jnp.abs)[0],
        "random": lambda w, m: keep_random(m, 1000, jax.random.key(0)),
    }[choice]
    w = jax.random.normal(jax.random.key(0), (256, 512))
    mask = jax.random.uniform(jax.random.key(1), w.shape) < 0.3
    mesh = jax.make_mesh((8,), ("model",), axis_types=(axis_type,))
    given = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (w, mask)]
    compiled = jax.jit(choose).lower(*given).compile()
    found = compiled(*given)
    assert max(size for _, size in collectives(compiled.as_text())) <= 64
    np.testing.assert_array_equal(np.asarray(found), np.asarray(jax.jit(choose)(w, mask)))
    assert found.sharding.is_equivalent_to(given[0].sharding, 2)


@pytest.mark.parametrize("spec", [*SPECS, P(None, ("data", "model"))], ids=str)
def test_the_sketch_of_a_decomposition_moves_thin_matrices_and_the_exact_one_all_of_it_once(spec):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    w = jax.device_put(np.random.default_rng(0).normal(size=(128, 64)).astype(np.float32), NamedSharding(mesh, spec))
    moved = {}
    for randomized in (True, False):
        method = jc.factorize.SVD(rank=4, randomized=randomized)
        factors = jax.jit(lambda w, method=method: method(w, jc.Context(key=jax.random.key(0))))
        found = collectives(factors.lower(w).compile().as_text())
        moved[randomized] = [size for _, size in found if size > 1]
    assert max(moved[True]) <= 128 * (4 + 8) and len(moved[True]) <= 20
    assert sum(size >= w.size for size in moved[False]) == 1
    assert len(moved[False]) == sum(axis is not None for axis in spec)


@pytest.mark.parametrize("spec", [P("model", None), P(None, "model")], ids=str)
def test_rounding_input_by_input_moves_a_matrix_there_and_back(spec):
    """Known is the mesh inside ``jax.set_mesh``, and outside ``jit``."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    alone, x = (rng.normal(size=shape).astype(np.float32) for shape in ((64, 64), (128, 64)))
    params = {"w": jax.device_put(alone, NamedSharding(mesh, spec))}
    plan = jc.plan(params, [("w", jc.quantize.GPTQ(bits=4, group_size=16, block_size=16))])
    stats = jc.calibrate(lambda p, x: x @ p["w"], {"w": alone}, [x], plan=plan)
    expected = jc.compress({"w": alone}, plan, stats=stats)["w"]
    found = jc.compress(params, plan, stats=stats)["w"]
    assert found.codes.sharding.is_equivalent_to(params["w"].sharding, 2)
    assert np.mean(np.asarray(found.codes) != np.asarray(expected.codes)) < 0.01
    with jax.set_mesh(mesh):
        program = jax.jit(lambda p: jc.compress(p, plan, stats=stats)).lower(params).compile()
    gathers = [size for name, size in collectives(program.as_text()) if name == "all-gather"]
    assert max(gathers, default=0) < alone.size / 4


F = jc.factorize
KERNEL, MATRIX = (3, 3, 64, 32), (128, 64)
# Of an array of the shape, sharded along each of its axes: whether all of it is gathered.
MOVED = {
    "tucker": (F.Tucker(ranks=(4, 4), sweeps=1), KERNEL, {2: True, 3: False}),
    "tucker of a matrix": (F.Tucker(ranks=(4, 4), sweeps=1), MATRIX, {0: False, 1: True}),
    "cp": (F.CP(rank=4, sweeps=2), KERNEL, {2: False, 3: True}),
    "cp of a matrix": (F.CP(rank=4, sweeps=2), MATRIX, {0: False, 1: False}),
    "block terms": (F.BlockTerm(terms=1, ranks=(4, 4), sweeps=1), KERNEL, {2: True, 3: False}),
    "train": (F.TensorTrain(rank=4), KERNEL, {2: False, 3: False}),
    "train of modes": (F.TensorTrain(rank=4, shape=((8, 16), (8, 8))), MATRIX, {0: True}),
    "ring": (F.TensorRing(rank=2, sweeps=1), KERNEL, {2: False, 3: False}),
    "parts": (F.NMF(rank=4, sweeps=2), MATRIX, {0: False, 1: False}),
    "blocks": (F.Monarch(blocks=8), MATRIX, {0: False, 1: True}),
}


@pytest.mark.parametrize(("name", "axis"), [(name, axis) for name, row in MOVED.items() for axis in row[2]])
def test_tensor_networks_move_small_matrices_and_the_array_once_at_most(name, axis):
    method, shape, gathered = MOVED[name]
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))
    spec = P(*("model" if i == axis else None for i in range(len(shape))))
    w = jax.device_put(np.random.default_rng(0).normal(size=shape).astype(np.float32), NamedSharding(mesh, spec))
    program = jax.jit(lambda w: jc.compress({"w": w}, jc.plan({"w": w}, [("w", method)]))["w"]).lower(w).compile()
    sizes = [size for _, size in collectives(program.as_text())]
    assert sum(size >= w.size for size in sizes) == gathered[axis]
    # Others are Gram matrices, thin products, and what the first cores of a chain leave.
    assert max((size for size in sizes if size < w.size), default=0) <= w.size / 2
    dense = jax.jit(lambda node: node.materialize())
    node = program(w)
    assert dense(node).sharding.is_equivalent_to(w.sharding, w.ndim)
    moved = [size for _, size in collectives(dense.lower(node).compile().as_text())]
    assert max(moved, default=0) <= max(x.size for x in jax.tree.leaves(node))
