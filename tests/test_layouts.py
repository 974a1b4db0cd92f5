"""Methods are right on every layout: compressing a leaf laid out anew gives what compressing it gave, laid out anew."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import METHODS

import jcompress as jc
from jcompress.layers import relaying

Layout = jc.Layout
RNG = np.random.default_rng(3)


@dataclasses.dataclass(frozen=True)
class Case:
    """A leaf of some layout, and the leaf as methods see it: ``shape`` with ``batch`` axes in front."""

    name: str
    shape: tuple
    layout: Layout

    @property
    def seen(self):
        return self.layout.seen(self.shape)

    @property
    def batch(self):
        return self.layout.lead(len(self.shape))

    @property
    def plain(self):
        """The layout of the leaf as methods see it."""
        lead, window, ndim = self.batch, len(self.layout.window), len(self.seen)
        return Layout(batch=range(lead), window=range(lead, lead + window), inputs=ndim - 2, outputs=ndim - 1)


CASES = [
    Case("(in, out)", (16, 8), Layout()),
    Case("(out, in)", (8, 16), Layout(inputs=1, outputs=0)),
    Case("HWIO", (3, 2, 16, 8), Layout(window=(0, 1), inputs=2, outputs=3)),
    Case("OIHW", (8, 16, 3, 2), Layout(outputs=0, inputs=1, window=(2, 3))),
    Case("OHWI", (8, 3, 2, 16), Layout(outputs=0, window=(1, 2), inputs=3)),
    Case("IOHW, transposed", (16, 8, 3, 2), Layout(inputs=0, outputs=1, window=(2, 3))),
    Case("(in, heads, dim)", (16, 2, 4), Layout(inputs=0, outputs=(1, 2))),
    Case("(heads, dim, out)", (2, 8, 8), Layout(inputs=(0, 1), outputs=2)),
    Case("(heads, in, dim)", (2, 16, 4), Layout(inputs=1, outputs=(0, 2))),
    Case("grouped HWIO", (3, 2, 16, 16), Layout(window=(0, 1), inputs=2, outputs=3, groups=2)),
    Case("grouped OIHW", (16, 16, 3, 2), Layout(outputs=0, inputs=1, window=(2, 3), groups=2)),
    Case("experts (e, out, in)", (3, 8, 16), Layout(batch=0, outputs=1, inputs=2)),
    Case("experts (in, e, out)", (16, 3, 8), Layout(inputs=0, batch=1, outputs=2)),
    Case("scan stack (n, out, in)", (3, 8, 16), Layout(inputs=-1, outputs=-2)),
]


def takes(row, case):
    """Whether the method takes a leaf of this shape."""
    try:
        jc.core.check(row.method, "w", case.seen[case.batch :], jnp.float32)
    except ValueError:
        return False
    # How many rows are tied is read from the values, and differs from layer to layer.
    is_one = not (case.batch and isinstance(row.method, jc.share.TiedRows))
    return len(row.shape) > 1 and "stacked" not in row.name and is_one


def compressed(row, w, layout, stats):
    plan = jc.plan({"w": w}, [("w", row.method)], layout={"w": layout})
    grads = {"w": jnp.sin(w)}
    return jc.compress({"w": w}, plan, step=3, key=jax.random.key(7), stats=stats and {"w": stats}, grads=grads)["w"]


@cache
def known(shape, layout):
    """An array of a plain layout, and its statistics."""
    axes, lead = tuple(range(-2 - len(layout.window), -1)), layout.lead(len(shape))
    x = RNG.normal(size=(*shape[:lead], 64, int(np.prod([shape[a] for a in axes])))).astype("f4")
    of_leaf = {name: RNG.uniform(0.5, 2, shape).astype("f4") for name in ("grad_square", "hessian_diagonal")}
    stats = jc.trace.Stats(
        gram=jnp.asarray(np.swapaxes(x, -1, -2) @ x), square=jnp.asarray((x**2).sum(-2)), axes=axes,
        counts=jnp.asarray(np.round((x**2).sum(-2))),
        **{name: jnp.asarray(value) for name, value in of_leaf.items()},
    )  # fmt: skip
    return jnp.asarray(RNG.normal(size=shape), jnp.float32), stats


@cache
def wanted(row, shape, layout):
    """What a method gives for an array of a plain layout, what that stands for, and its projection of the array."""
    seen, stats = known(shape, layout)
    node = compressed(row, seen, layout, stats)
    return node.nbits(), node.materialize(), node.project(seen).materialize()


def relaid(stats, case):
    """The statistics of the leaf, from those of the leaf as methods see it."""
    order = relaying._order((*case.layout.window, *case.layout.inputs), case.shape)
    back = slice(None) if order is None else np.argsort(order)
    of_leaf = {n: case.layout.restore(getattr(stats, n), case.shape) for n in ("grad_square", "hessian_diagonal")}
    return dataclasses.replace(
        stats, gram=stats.gram[..., back, :][..., back], square=stats.square[..., back], axes=case.layout.contracted,
        counts=stats.counts[..., back],
        **of_leaf,
    )  # fmt: skip


ROWS = [row for row in METHODS if row.name not in ("magnitude-vector", "int5-vector")]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_compressing_what_is_laid_out_anew(row, case):
    if not takes(row, case):
        pytest.skip("the method does not take this shape")
    check_case(row, case)


def check_case(row, case):
    """Raise unless compressing and laying out commute; ``docs/tables.py`` shows what this gives."""
    seen, stats = known(case.seen, case.plain)
    w = case.layout.restore(seen, case.shape)
    found = compressed(row, w, case.layout, relaid(stats, case))
    dense = found.materialize()
    assert dense.shape == w.shape and dense.dtype == w.dtype
    nbits, expected, nearer = wanted(row, case.seen, case.plain)
    np.testing.assert_allclose(case.layout.arrange(dense), expected, rtol=2e-5, atol=2e-6)
    assert abs(found.nbits() - nbits) <= 0.1 * nbits
    projected = case.layout.arrange(found.project(w).materialize())
    np.testing.assert_allclose(projected, nearer, rtol=2e-4, atol=2e-5)


W = jnp.asarray(RNG.normal(size=(64, 16)) * np.logspace(-2, 1, 16), jnp.float32)
OUT_IN = Layout(inputs=1, outputs=0)


def fitted(method, w, layout, **known):
    return jc.compress({"w": w}, jc.plan({"w": w}, [("w", method)], layout={"w": layout}), **known)["w"]


def test_scales_and_groups_lie_where_the_product_has_them():
    assert fitted(jc.quantize.Int(bits=4), W.T, OUT_IN).scale.shape == (16, 1)
    assert fitted(jc.quantize.Int(bits=4, group_size=16), W.T, OUT_IN).scale.shape == (16, 4)
    heads = fitted(jc.quantize.Int(bits=4), W.reshape(64, 4, 4), Layout(inputs=0, outputs=(1, 2)))
    assert heads.scale.shape == (1, 4, 4)
    back = fitted(jc.quantize.Int(bits=4, group_size=8), W.T.reshape(4, 16, 16), Layout(inputs=(0, 1), outputs=2))
    assert back.scale.shape == (4, 2, 16)
    conv = fitted(jc.quantize.Int(bits=8), jnp.ones((12, 8, 3, 3)), Layout(outputs=0, inputs=1, window=(2, 3)))
    assert conv.scale.shape == (12, 1, 1, 1)
    assert jc.quantize.Int(bits=4, axis=(-2, -1))(W.reshape(64, 4, 4)).scale.shape == (1, 4, 4)


def test_statistics_know_the_layout():
    """Gram matrices of an (out, in) kernel say that it is one: no plan need name it."""
    x = jnp.asarray(RNG.normal(size=(128, 64)), jnp.float32)
    plan = jc.plan({"w": W.T}, [("w", jc.quantize.GPTQ(bits=4, group_size=32))])
    stats = jc.calibrate(lambda p, x: x @ p["w"].T, {"w": W.T}, [x], plan=plan)
    node = jc.compress({"w": W.T}, plan, stats=stats)["w"]
    assert node.scale.shape == (16, 2)
    other = jc.plan({"w": W}, [("w", jc.quantize.GPTQ(bits=4, group_size=32))])
    stats = jc.calibrate(lambda p, x: x @ p["w"], {"w": W}, [x], plan=other)
    np.testing.assert_array_equal(node.materialize().T, jc.compress({"w": W}, other, stats=stats)["w"].materialize())


@pytest.mark.parametrize(
    "method",
    [jc.quantize.Int(bits=8), jc.quantize.HQQ(bits=8), jc.quantize.training.LSQ(bits=8), jc.quantize.Ternary()],
    ids=repr,
)
def test_stacked_layers_have_scales_of_their_own(method):
    w = jnp.asarray(RNG.normal(size=(3, 32, 16)), jnp.float32) * jnp.array([1.0, 0.3, 0.01])[:, None, None]
    node = fitted(method, w, Layout())
    alone = [method(x).materialize() for x in w]
    np.testing.assert_allclose(node.materialize(), jnp.stack(alone), rtol=1e-5, atol=1e-7)


def test_a_stack_that_nobody_named_is_told_of():
    w = jnp.ones((3, 8, 4)) * jnp.array([1.0, 0.3, 0.01])[:, None, None]
    plan = jc.plan({"w": w}, [("w", jc.quantize.Int(bits=8))])
    with pytest.warns(UserWarning, match=r"w: found magnitudes up to 0.01 and 1 along axis 0 .*jc.trace.layout"):
        jc.compress({"w": w}, plan)
    jc.compress({"w": jnp.ones((3, 8, 4))}, plan)  # a warning is an error here


def test_an_arranged_node_goes_through_the_whole_loop(tmp_path):
    """Trained, saved, loaded, sliced by scan, executed."""
    w = jnp.asarray(RNG.normal(size=(3, 8, 16)), jnp.float32)
    node = fitted(jc.chain(jc.factorize.SVD(rank=2), jc.quantize.Int(bits=8)), w, Layout(batch=0, inputs=2, outputs=1))
    assert isinstance(node, jc.formats.Arranged)
    train, held = jc.split({"w": node})
    grads = jax.grad(lambda t: jnp.square(jc.materialize(jc.merge(t, held))["w"] - w).sum())(train)
    assert jax.tree.structure(grads) == jax.tree.structure(train)
    jc.save(tmp_path / "w.jc", {"w": node})
    loaded = jc.load(tmp_path / "w.jc")["w"]
    assert repr(loaded) == repr(node)
    np.testing.assert_array_equal(loaded.materialize(), node.materialize())
    _, sliced = jax.lax.scan(lambda carry, layer: (carry, layer.materialize()), 0, loaded)
    np.testing.assert_allclose(sliced, node.materialize(), rtol=1e-5, atol=1e-6)
    x = jnp.ones((2, 16))
    one = jax.tree.map(lambda leaf: leaf[0], node)
    fn = jc.accelerate(lambda p, x: x @ p["w"].T)
    np.testing.assert_allclose(fn({"w": one}, x), x @ one.materialize().T, rtol=1e-4, atol=1e-4)
    assert all("factor" in row.how or "int8" in row.how for row in fn.report({"w": one}, x).rows)


def test_project_keeps_an_out_in_kernel_on_the_set():
    import optax

    params = {"w": W.T}
    plan = jc.plan(params, [("w", jc.prune.Magnitude(pattern=jc.prune.NM(2, 4)))], layout={"w": OUT_IN})
    tx = optax.chain(optax.adam(0.1), jc.project(plan, every=2))
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
    kept = (np.asarray(params["w"]).reshape(16, 16, 4) != 0).sum(-1)
    assert (kept == 2).all()
    assert (np.asarray(jc.simulate(params, plan)["w"]) == np.asarray(params["w"])).all()
    node = jc.nodes(params, state)["w"]
    np.testing.assert_array_equal(node.materialize(), params["w"])
    in_out = fitted(jc.prune.Magnitude(pattern=jc.prune.NM(2, 4)), params["w"].T, Layout())
    assert node.nbits() == in_out.nbits()


def test_mistakes_name_the_leaf_and_the_fix():
    params = {"w": jnp.ones((4, 6))}
    rules = [("w", jc.quantize.Int(bits=8))]
    with pytest.raises(ValueError, match=r"layout 'v' matches no parameter.*'w'"):
        jc.plan(params, rules, layout={"v": OUT_IN})
    with pytest.raises(ValueError, match=r"w: found shape .4, 6., and Layout.* names 3 axes"):
        jc.plan(params, rules, layout={"w": Layout(inputs=0, outputs=(1, 2))})
    with pytest.raises(ValueError, match="each once"):
        Layout(inputs=0, outputs=0)
    with pytest.raises(ValueError, match="expected a mapping of paths to layouts"):
        jc.plan(params, rules, layout=OUT_IN)
    with pytest.raises(ValueError, match="w: found 6 outputs for 4 groups"):
        jc.plan(params, rules, layout={"w": Layout(groups=4)})
    with pytest.raises(ValueError, match=r"the inputs lie along another axis say so: jc\.plan"):
        jc.plan(params, [("w", jc.quantize.Int(bits=4, group_size=3))])


def test_a_plan_prints_the_layouts_and_patterns_name_several():
    params = {"a": {"w": jnp.ones((4, 6))}, "b": {"w": jnp.ones((4, 6))}}
    plan = jc.plan(params, [(".*", jc.quantize.Int(bits=8))], layout={"a/w": Layout(), ".*/w": OUT_IN})
    assert plan.layouts == {"a/w": Layout(), "b/w": OUT_IN}
    assert str(plan).splitlines()[2].endswith("Layout(inputs=(-1,), outputs=(-2,))")
    assert plan.replace({"b/w": jc.prune.Magnitude(sparsity=0.5)}).layouts == plan.layouts
