"""What every method and every format must pass."""

import dataclasses
import inspect
import math
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rows import METHODS, statistics

import jcompress as jc
from jcompress import core, rules
from jcompress.io.export import from_bytes, to_bytes

KEY = jax.random.key(7)
every_row = pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)


def jitted(rows):
    return pytest.mark.parametrize("row", [r for r in rows if r.jit], ids=lambda row: row.name)


def array(row, dtype=jnp.float32, seed=0, shape=None):
    values = np.random.default_rng(seed).normal(size=shape or row.shape)
    return jnp.asarray(values, dtype)


def compress(method, w, **kwargs):
    params = {"layer": {"kernel": w}}
    plan = jc.plan(params, [(".*", method)])
    known = known_of(method, params, "layer/kernel", w)
    return jc.compress(params, plan, key=KEY, **known, **kwargs)["layer"]["kernel"]


def known_of(method, params, path, w):
    """What a method asks for beside the weights."""
    needs = {need.split(".")[0] for need in core.needs(method)}
    known = {"stats": {path: statistics(w.shape)}} if "stats" in needs else {}
    return known | ({"grads": jax.tree.map(jnp.cos, params)} if "grad" in needs else {})


@cache
def compiled(row):
    """One compilation serves all tests of a row."""
    return jax.jit(partial(compress, row.method)) if row.jit else partial(compress, row.method)


def fitted(row, w):
    return compiled(row)(w)


@cache
def node_of(row):
    return fitted(row, array(row))


def assert_same(a, b, exact=True, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    if not exact:
        a, b = jc.materialize(a), jc.materialize(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=0 if exact else tolerance)


def classes_in(x, counts=dataclasses.is_dataclass):
    """The classes of a nest of methods, or of the nodes in a nest of formats."""
    if counts(x):
        yield type(x)
        for field in dataclasses.fields(x):
            yield from classes_in(getattr(x, field.name), counts)
    elif isinstance(x, tuple):
        for y in x:
            yield from classes_in(y, counts)


def formats_in(x):
    return classes_in(x, core.is_node)


def nodes_in(node):
    yield node
    for _, x in rules.children(node):
        yield from (y for z in (x if isinstance(x, tuple) else (x,)) if core.is_node(z) for y in nodes_in(z))


def abstract(row):
    """The node, without computing it."""
    return jax.eval_shape(partial(compress, row.method), array(row))


@pytest.mark.parametrize("row", [r for r in METHODS if r.jit and core.methods.is_joint(r.method)], ids=lambda r: r.name)
def test_what_decides_for_several_leaves_does_so_under_jit(row):
    params = {name: array(row, seed=i) for i, name in enumerate("abc")}
    plan = jc.plan(params, [(".*", row.method)])
    stats = {name: statistics(row.shape) for name in params}
    make = partial(jc.compress, plan=plan, key=KEY, stats=stats, grads=jax.tree.map(jnp.cos, params))
    assert_same(jax.jit(make)(params), make(params), exact=False, tolerance=1e-4)


@every_row
def test_a_notebook_shows_its_formats(row):
    treescope = pytest.importorskip("treescope")
    shown = treescope.render_to_text(node_of(row))
    assert all(f"{found.__name__}(" in shown for found in formats_in(node_of(row)))


def test_every_public_method_and_format_has_its_row():
    listed = {method for row in METHODS for method in classes_in(row.method)}
    rooms = (jc.prune, jc.prune.dynamic, jc.quantize, jc.quantize.training, jc.factorize, jc.share)
    public = {x for room in rooms for x in map(room.__dict__.get, room.__all__) if isinstance(x, type)}
    called = {x for x in public if any("__call__" in vars(base) for base in x.__mro__)}
    methods = {x for x in called if "context" in inspect.signature(x.__call__).parameters}  # others: rules and views
    assert methods <= listed
    given = {f for row in METHODS for f in formats_in(abstract(row) if row.jit else compress(row.method, array(row)))}
    # Complex arrays, layouts, references between leaves and packed nodes have tests of their own.
    given |= {jc.formats.Cartesian, jc.formats.Arranged, jc.formats.Reference, jc.formats.Packed, jc.formats.Bits}
    assert given == set(map(jc.formats.__dict__.get, jc.formats.__all__))


@every_row
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_shape_and_dtype_are_kept(row, dtype):
    w = array(row, dtype)
    dense = jc.materialize(fitted(row, w))
    assert dense.shape == w.shape
    assert dense.dtype == w.dtype
    assert bool(jnp.isfinite(dense).all())


@jitted(METHODS)
def test_jit_equals_eager(row):
    w, node = array(row), node_of(row)
    assert_same(node, compress(row.method, w), row.exact)
    trained = jax.tree.map(lambda x: (x * 1.01).astype(x.dtype) if core.is_trainable(x) else x, node)
    assert_same(jax.jit(partial(jc.materialize, key=KEY))(trained), jc.materialize(trained, key=KEY), exact=False)


@jitted(METHODS)
def test_vmap_equals_a_loop(row):
    ws = jnp.stack([array(row, seed=seed) for seed in range(3)])
    together = jax.jit(jax.vmap(lambda w: jc.materialize(compress(row.method, w))))(ws)
    alone = jnp.stack([jc.materialize(fitted(row, w)) for w in ws])
    np.testing.assert_allclose(np.asarray(together), np.asarray(alone), atol=0 if row.exact else 1e-5)


UNSTACKED = [row for row in METHODS if not row.name.startswith("stacked")]


@jitted(UNSTACKED)
def test_a_slice_inside_scan_is_the_node_of_its_layer(row):
    ws = jnp.stack([array(row, seed=seed) for seed in range(3)])
    node = jax.jit(partial(compress, jc.stacked(row.method)))(ws)
    _, inside = jax.lax.scan(lambda carry, layer: (carry, layer.materialize()), 0, node)
    np.testing.assert_allclose(
        np.asarray(inside), np.asarray(node.materialize()), rtol=0, atol=0 if row.exact else 1e-5
    )
    if not getattr(row.method, "needs", ()):
        alone = jnp.stack([jc.materialize(fitted(row, w)) for w in ws])
        np.testing.assert_allclose(np.asarray(inside), np.asarray(alone), atol=0 if row.exact else 1e-5)


@jitted(METHODS)
def test_abstract_evaluation_gives_the_same_structure(row):
    w = array(row)
    abstract = jax.eval_shape(lambda w: compress(row.method, w), jax.ShapeDtypeStruct(w.shape, w.dtype))
    node = fitted(row, w)
    assert jax.tree.structure(abstract) == jax.tree.structure(node)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(node)
    ]


@every_row
def test_project_is_stationary_and_idempotent(row):
    node, target = node_of(row), array(row, seed=1)
    projected = node.project(target)
    assert jax.tree.structure(projected) == jax.tree.structure(node)
    held = [jc.split(x)[1] for x in (node, projected)]
    for x, y in zip(*map(jax.tree.leaves, held), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    if not row.stationary:
        return
    train, rest = jc.split(projected)
    gradient = jax.grad(lambda t: ((target - jc.merge(t, rest).materialize()) ** 2).sum())(train)
    narrow = any(x.dtype.itemsize < 4 for x in jax.tree.leaves(train))
    for x in jax.tree.leaves(gradient):
        np.testing.assert_allclose(np.asarray(x, np.float32), 0, atol=0.1 if narrow else 2e-3)
    again = projected.project(projected.materialize())
    np.testing.assert_allclose(np.asarray(again.materialize()), np.asarray(projected.materialize()), atol=1e-5)


@jitted(METHODS)
def test_project_needs_no_trainable_leaves(row):
    node, target = node_of(row), array(row, seed=1)
    if not core_is_linear(node):
        pytest.skip("projected at refits only")
    found, wanted = jc.split(node)[1].project(target), node.project(target)
    assert_same(jax.tree.map(lambda x, y: x.astype(y.dtype), found, wanted), wanted)  # a scale knows its own width


def core_is_linear(node):
    return all(f.linear for f in formats_in(node))


@jitted(METHODS)
def test_a_traced_step_does_not_recompile(row):
    at_step = jax.jit(lambda w, step: compress(row.method, w, step=step))
    for step in range(3):
        at_step(array(row), step)
    assert at_step._cache_size() == 1


@jitted(METHODS)
def test_the_optimizer_transform_holds_the_parameters_on_the_set(row):
    params = {"kernel": array(row), "bias": jnp.ones(4)}
    plan = jc.plan(params, [("kernel", row.method)])
    tx = optax.chain(optax.adam(0.1), jc.project(plan, every=2, key=KEY, stats={"kernel": statistics(row.shape)}))
    assert jax.tree.structure(jax.eval_shape(tx.init, params)) == jax.tree.structure(tx.init(params))

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(jnp.sin, params)
        updates, state = tx.update(grads, state, params, grads=grads)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert step._cache_size() == 1
    node = state[1].held["kernel"]
    if core_is_linear(node):
        again = node.project(params["kernel"]).materialize()
        np.testing.assert_allclose(
            np.asarray(again), np.asarray(params["kernel"]), atol=1e-2 if "16" in row.name else 2e-5
        )


@jitted(METHODS)
def test_simulate_sees_the_value_and_passes_the_gradient(row):
    params = {"kernel": array(row)}
    plan, known = jc.plan(params, [("kernel", row.method)]), known_of(row.method, params, "kernel", params["kernel"])
    value, pull = jax.vjp(lambda p: jc.simulate(p, plan, key=KEY, **known), params)
    node = jc.compress(params, plan, key=KEY, **known)
    expected = jc.materialize(node, key=KEY)["kernel"]
    np.testing.assert_allclose(np.asarray(value["kernel"]), np.asarray(expected), atol=0 if row.exact else 1e-5)
    np.testing.assert_array_equal(np.asarray(pull(value)[0]["kernel"]), np.asarray(value["kernel"]))


@every_row
def test_split_and_merge_are_inverse_and_only_floats_train(row):
    node = node_of(row)
    train, held = jc.split(node)
    assert_same(jc.merge(train, held), node)
    assert all(jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 2 for x in jax.tree.leaves(train))
    assert not any(jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 2 for x in jax.tree.leaves(held))
    gradient = jax.grad(lambda t: (jc.merge(t, held).materialize() ** 2).sum())(train)
    dense = node.materialize()
    if bool((dense != 0).any()) and jax.tree.leaves(train):
        assert any(bool((g != 0).any()) for g in jax.tree.leaves(gradient))


@every_row
def test_each_leaf_that_trains_may_be_a_node(row):
    node, (leaves, tree) = node_of(row), jax.tree.flatten(node_of(row))
    for i, x in enumerate(leaves):
        if core.is_trainable(x):
            held = jax.tree.unflatten(tree, [*leaves[:i], jc.formats.Frozen.of(x), *leaves[i + 1 :]])
            moved = held.project(node.materialize(key=KEY))
            assert jax.tree.structure(moved) == jax.tree.structure(held)
            for other in (held, jc.finalize(held)):
                assert_same(jc.materialize(other), jc.materialize(node), exact=False)
            train, rest = jc.split(held)
            gradient = jax.grad(lambda t, rest=rest: jc.merge(t, rest).materialize().sum())(train)
            assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


@every_row
def test_finalize_keeps_the_value(row):
    node = node_of(row)
    assert_same(jc.materialize(jc.finalize({"w": node})), jc.materialize({"w": node}))


@every_row
def test_saved_bytes_are_what_nbits_says_and_load_is_exact(row, tmp_path):
    tree = {"layer": {"kernel": node_of(row)}, "bias": jnp.arange(3.0)}
    jc.save(tmp_path / "model", tree)
    payload = jc.io.inspect(tmp_path / "model")
    size = (tmp_path / "model").stat().st_size
    head = (tmp_path / "model").read_bytes().split(b"\n", 1)[0]
    manifest_bytes = int(head.split()[2])
    assert payload
    assert size - len(head) - 1 - manifest_bytes == math.ceil(jc.nbits(tree) / 8)
    loaded = jc.load(tmp_path / "model")
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    assert_same(jc.materialize(loaded), jc.materialize(tree))
    assert jc.nbits(loaded) == jc.nbits(tree)
    jc.save(tmp_path / "coded", tree, coded=True)
    assert_same(jc.load(tmp_path / "coded"), loaded)
    assert 8 * jc.io.inspect(tmp_path / "coded")["payload_bytes"] == jc.nbits(tree, coded=True)


@every_row
def test_static_fields_survive_an_export(row):
    for node in nodes_in(node_of(row)):
        cls, values = jax.tree.structure(node).node_data()
        assert from_bytes(cls, to_bytes(cls, values)) == values


@every_row
def test_the_report_adds_up_to_nbits(row):
    before = {"layer": {"kernel": array(row)}, "bias": jnp.arange(3.0)}
    after = {"layer": {"kernel": node_of(row)}, "bias": jnp.arange(3.0)}
    table = jc.report(before, after)
    assert 8 * table.total.stored_bytes == jc.nbits(after)


@every_row
@pytest.mark.parametrize("value", [0.0, -2.5])
def test_constant_arrays(row, value):
    w = jnp.full(row.shape, value)
    dense = jc.materialize(fitted(row, w))
    if row.adjusts:
        assert bool((dense != 0).any()) == (value != 0)
        return
    kept = np.asarray(dense)[np.asarray(dense) != 0]
    np.testing.assert_allclose(kept, value, rtol=5e-3 if "bf16" in row.name or "bfloat16" in row.name else 1e-4)
    if value == 0:
        assert not bool((dense != 0).any())


@jitted(METHODS)
def test_empty_arrays(row):
    shape = (*row.shape[:-1], 0)
    if not row.empty:
        with pytest.raises(
            ValueError, match=r"layer/kernel: .*(above the limit 0|found ranks|expected at most 0|no entries)"
        ):
            fitted(row, jnp.zeros(shape))
        return
    node = fitted(row, jnp.zeros(shape))
    assert node.materialize().shape == shape
    assert node.nbits() >= 0


@every_row
def test_values_that_are_not_finite_are_refused_by_name(row):
    for bad in (np.nan, np.inf, -np.inf):
        w = np.asarray(array(row)).copy()
        w.flat[0] = bad
        with pytest.raises(ValueError, match=r"layer/kernel: found 1 NaN or infinite"):
            compress(row.method, jnp.asarray(w))


@jitted(METHODS)
def test_the_input_may_be_donated(row):
    w, bias = array(row), jnp.ones(3)
    tree = {"kernel": w, "bias": bias}
    known = known_of(row.method, tree, "kernel", w)
    small = jc.compress(tree, jc.plan(tree, [("kernel", row.method)]), key=KEY, **known)
    w.delete()
    bias.delete()
    assert bool(jnp.isfinite(jc.materialize(small)["kernel"]).all())
    assert small["bias"].tolist() == [1, 1, 1]


@every_row
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=lambda x: jnp.dtype(x).name)
def test_wide_types_give_the_same_node(row, dtype):
    """With 64-bit types switched on, weights of 32 bits give what they give without, those of 64 keep theirs."""
    w = array(row)
    with jax.enable_x64(True):
        wide = jnp.asarray(w, dtype)
        node = fitted(row, wide)
        assert core.dense(node).dtype == wide.dtype
        again = jax.tree.map(lambda x: x.dtype, node.project(wide))
        found = jax.device_get(node)
    assert again == jax.tree.map(lambda x: x.dtype, found)
    if dtype == jnp.float32:
        expected = node_of(row)
        assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, expected)
        tolerance = 1e-4 if row.stationary else 1e-3
        assert_same(found, expected, row.exact and not row.sums, tolerance)


def sharded(row):
    """The row's shape with an axis that eight devices divide, for each of its axes; as it is, if it must be."""
    for axis in range(len(row.shape)):
        longer = tuple(64 if i == axis else n for i, n in enumerate(row.shape))
        try:
            core.check(row.method, row.name, longer, jnp.float32)
        except ValueError:
            longer = row.shape
        yield axis, longer


@pytest.mark.parametrize(
    ("row", "axis", "shape", "axis_type"),
    [
        (row, *at, axis_type)
        for row in METHODS
        for at in sharded(row)
        for axis_type in (AxisType.Auto, AxisType.Explicit)
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_sharding_is_kept_and_no_parameters_are_moved(row, axis, shape, axis_type):
    """Collectives may carry scalars, scales and codebooks, never anything that grows with the parameters."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, P(*("model" if i == axis else None for i in range(len(shape)))))
    w = array(row, shape=shape)
    placed = jax.device_put(w, sharding)
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh):
        program = compiled(row).lower(placed).compile() if row.jit else compiled(row)
        node = program(placed)
        dense = jax.jit(lambda n: n.materialize())(node)
    # Where singular values are close together, rounding turns what is kept of them.
    tolerance = 1e-4 if row.stationary else 1e-3
    assert_same(jax.device_get(node), alone(row, shape), row.exact and not row.sums, tolerance)
    along = axis in range(len(shape))[:-1] if row.gathers == "inputs" else row.gathers
    # Of few shared values no axis says how the array was sharded; then, or where parameters move, the compiler chooses.
    told = any(x.ndim >= min(len(shape), 2) and shape[axis] in x.shape for x in jax.tree.leaves(node))
    if told and (axis_type == AxisType.Explicit or not along):
        assert dense.sharding.is_equivalent_to(sharding, w.ndim)
    if axis_type == AxisType.Explicit:
        assert all(x.sharding.is_equivalent_to(sharding, w.ndim) for x in jax.tree.leaves(node) if x.shape == shape)
    if along:
        return
    smaller = [x.size for x in jax.tree.leaves(node) if x.size < w.size]
    # Codebooks of single values are found on a histogram of fixed size, by their number, one a layer.
    bins = 1 << (13 if "clusters=256" in repr(row.method) else 12)
    counts = bins * math.prod(shape[:-2]) if "KMeans" in repr(row.method) else 0
    for name, size in collectives(program.as_text()):
        assert size <= max(8 * 8, 2 * w.size // 8, *smaller, counts), f"{name} moves {size} elements"


@cache
def alone(row, shape):
    """What one device gives."""
    return jax.device_get(fitted(row, array(row, shape=shape)))


@pytest.mark.parametrize("row", [r for r in METHODS if r.gathers], ids=lambda row: row.name)
def test_what_moves_parameters_between_devices_says_so(row):
    assert any(re.search("[Gg]ather|between devices", cls.__doc__) for cls in classes_in(row.method))


def collectives(hlo):
    """Name and number of elements of every collective in compiled HLO."""
    pattern = r"= \(?([^=]*?)\)? (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    for shapes, name in re.findall(pattern, hlo):
        sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\[([\d,]*)\]", shapes)]
        yield name, max(sizes)
