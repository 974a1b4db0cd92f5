"""Leaves that are alike are treated by one program: what is compiled does not grow with their number."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_conformance import collectives

import jcompress as jc
from jcompress import rules
from jcompress.numeric import alike
from jcompress.prune import dynamic

HALF = jc.prune.Magnitude(sparsity=0.5)


def network(layers, shape=(8, 8)):
    keys = jax.random.split(jax.random.key(0), layers)
    return {f"layer{i}": {"kernel": jax.random.normal(key, shape)} for i, key in enumerate(keys)}


def kernels(plan_method, params):
    return jc.plan(params, [(".*kernel", plan_method)])


def stepper(tx):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def chained(params, method):
    return optax.chain(optax.sgd(0.1), jc.project(kernels(method, params), every=2))


def wrapped(params, method):
    return jc.project(kernels(method, params), every=2, inner=optax.sgd(0.1))


def sparse(rule):
    def transform(params, method):
        return dynamic.sparse(optax.sgd(0.1), rule, kernels(method, params), every=2, key=jax.random.key(1))

    return transform


TRANSFORMS = {
    "project": chained,
    "project inner": wrapped,
    **{
        type(rule).__name__: sparse(rule)
        for rule in (
            dynamic.SET(),
            dynamic.RigL(stop=100),
            dynamic.SparseMomentum(),
            dynamic.DSR(threshold=0.1),
            dynamic.NeST(turn=1),
        )
    },
}


def equations(jaxpr):
    """How many equations a program has, those of its inner programs included."""
    found = jax.tree.leaves([eqn.params for eqn in jaxpr.eqns], is_leaf=lambda x: hasattr(x, "eqns"))
    inner = [getattr(x, "jaxpr", x) for x in found if hasattr(getattr(x, "jaxpr", x), "eqns")]
    return len(jaxpr.eqns) + sum(map(equations, inner))


def loops(hlo):
    return len(re.findall(r" while\(", hlo))


# What is compiled.


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_step_has_as_many_loops_for_many_leaves_as_for_few(name):
    """Every search for a threshold is a loop or two, and takes most of the time that it takes to compile a step."""
    found = []
    for layers in (3, 12):
        params = network(layers)
        tx = TRANSFORMS[name](params, HALF)
        state = jax.eval_shape(tx.init, params)
        found.append(loops(stepper(tx).lower(params, state).as_text("hlo")))
    assert found[0] == found[1] > 0


def test_compress_has_as_many_loops_for_many_leaves_as_for_few():
    found = []
    for layers in (3, 12):
        plan = kernels(HALF, network(layers))
        found.append(loops(jax.jit(lambda p, plan=plan: jc.compress(p, plan)).lower(network(layers)).as_text("hlo")))
    assert found[0] == found[1] > 0


def test_each_further_leaf_adds_little_to_a_step():
    """A leaf adds some equations that are elementwise, and no search, which has hundreds."""
    sizes = []
    for layers in (4, 5, 32):
        params = network(layers)
        tx = chained(params, HALF)
        sizes.append(equations(jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params), params).jaxpr))
    assert sizes[1] - sizes[0] < 40
    assert sizes[2] < 2 * sizes[0]


def test_cheap_methods_are_not_put_into_loops():
    """The copies would cost more than they save: quantization is simulated in every step."""
    params = network(8)
    plan = kernels(jc.quantize.Int(bits=8), params)
    assert not loops(jax.jit(lambda p: jc.simulate(p, plan)).lower(params).as_text("hlo"))


# What comes out.


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_loop_gives_what_each_leaf_alone_would_get(name, monkeypatch):
    params, found = network(5), []
    for looped in (True, False):
        if not looped:
            monkeypatch.setattr(alike, "_looped", lambda call, items: [call(item) for item in items])
        tx = TRANSFORMS[name](params, HALF)
        step, (new, state) = stepper(tx), (params, tx.init(params))
        for _ in range(4):
            new, state = step(new, state)
        found.append(jax.tree.map(np.asarray, (new, jc.nodes(new, state))))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(
    "method",
    [HALF, jc.prune.Random(sparsity=0.5), jc.share.KMeans(clusters=4), jc.prune.Magnitude(pattern=jc.prune.NM(2, 4))],
    ids=str,
)
def test_compress_under_jit_is_that_outside(method):
    params, key = network(5), jax.random.key(2)
    plan = kernels(method, params)
    small = jax.jit(lambda p: jc.compress(p, plan, key=key))(params)
    jax.tree.map(np.testing.assert_array_equal, small, jc.compress(params, plan, key=key))


def test_items_are_put_together_by_kind_structure_and_type():
    types = [(2, "float32"), (2, "float32"), (3, "float32"), (2, "float16")]
    items = [jnp.full(n, i, dtype) for i, (n, dtype) in enumerate(types)]
    seen = []

    def call(i, item):
        seen.append(i)
        return jnp.sin(item) + i, {"twice": 2 * item}

    def all_of(items, kinds):
        seen.clear()
        return jax.jit(lambda items: alike.each(call, items, kinds, long=1))(items)

    alone = [call(i, item) for i, item in enumerate(items)]
    found = all_of(items, list("abcd"))
    jax.tree.map(np.testing.assert_array_equal, found, alone)
    assert set(seen) == {0, 1, 2, 3}
    found = all_of(items, "aaaa")
    assert set(seen) == {0, 2, 3}  # in a loop the number is that of the first
    np.testing.assert_array_equal(found[1][0], alone[1][0] - 1)
    seen.clear()
    assert alike.each(call, items, "aaaa", long=1)[1][0][0] == alone[1][0][0]
    assert set(seen) == {0, 1, 2, 3}  # values that are known are looked at one by one


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2"])
def test_integers_below_a_byte_stay_alone(dtype):
    items = [jnp.ones((4, 4), dtype)] * 3
    found = jax.jit(lambda items: alike.each(lambda _, x: x.astype(jnp.int8) + 1, items, "aaa", long=1))(items)
    assert all((x == 2).all() for x in found)


def test_what_is_stacked_is_bounded():
    """An eighth of many large leaves at a time: a loop more, and no copy of all of them."""
    shapes = [jax.ShapeDtypeStruct((1024, 1024), jnp.float32)] * 32
    program = jax.make_jaxpr(lambda items: alike.each(lambda _, x: jnp.sin(x), items, "a" * 32, long=1))(shapes)
    scans = [eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "scan"]
    assert [eqn.params["length"] for eqn in scans] == [4] * 8


# Where the arrays are.


def test_leaves_that_are_known_to_be_sharded_otherwise_are_not_stacked():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    specs = [P(None, "model"), P("model", None)] * 3
    params = {
        f"layer{i}": {"kernel": jax.device_put(x["kernel"], NamedSharding(mesh, spec))}
        for i, (x, spec) in enumerate(zip(network(6, (16, 16)).values(), specs, strict=True))
    }
    tx = chained(params, HALF)
    step, state = stepper(tx), jax.jit(tx.init)(params)
    assert max(size for _, size in collectives(step.lower(params, state).compile().as_text())) <= 8
    new, state = step(params, state)
    for path, x in rules.leaves(params).items():
        assert rules.leaves(new)[path].sharding.is_equivalent_to(x.sharding, 2)
        assert state[1].held[path].mask.sharding.is_equivalent_to(x.sharding, 2)


@pytest.mark.parametrize("spec", [P(None, "model"), P("model", None)], ids=str)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_stacked_leaves_stay_sharded(axis_type, spec):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(axis_type,))
    params = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), network(4, (16, 16)))
    plan = kernels(HALF, params)
    compress = jax.jit(lambda p: jc.compress(p, plan))
    compiled = compress.lower(params).compile()
    assert max(size for _, size in collectives(compiled.as_text())) <= 8
    small, alone = compress(params), jc.compress(network(4, (16, 16)), plan)
    for path, node in rules.leaves(small).items():
        np.testing.assert_array_equal(node.mask, rules.leaves(alone)[path].mask)
        assert node.mask.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


def test_the_kind_of_a_path_is_all_of_it_but_numbers():
    assert rules.kind("block/3/query2") == rules.kind("block/11/query7") != rules.kind("block/3/key2")
