"""Coupling and shrink on the zoo: the groups are those that the author of each model lists, and the shrunk function
is the masked one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo

import jcompress as jc

NAMES = [entry.name for entry in zoo.ZOO]


@functools.cache
def coupled(name):
    built = zoo.built(name)
    args = built.args(2, jax.random.key(0))
    return built, jc.trace.coupling(built.fn, built.params, *args, free_outputs=built.free_outputs)


def named(built, groups):
    """The group of each width that the model lists."""
    fits = {
        width: [n for n, g in groups.items() if member in g.members and g.size == built.sizes[width]]
        for width, member in built.widths.items()
    }
    found = {}
    for width in sorted(fits, key=lambda w: len(fits[w])):  # two factors of an axis may be equally long
        hits = [n for n in fits[width] if n not in found.values()]
        assert hits, f"{width} at {built.widths[width]} is no group"
        found[width] = hits[0]
    return found


def some(groups, seed=0):
    """A cut of every group: about 60 percent stay."""
    rng, keep = np.random.default_rng(seed), {}
    for name, group in groups.prunable.items():
        stays = rng.random(group.size) < 0.6
        cut, kept = rng.permutation(group.size)[:2]
        stays[cut], stays[kept] = False, True
        keep[name] = stays
    return keep


@functools.cache
def shrunk(name):
    built, groups = coupled(name)
    keep = some(groups)
    small, params = jc.shrink(
        built.fn, built.params, keep, *built.args(2, jax.random.key(0)), free_outputs=built.free_outputs
    )
    return built, groups, keep, small, params, jc.trace.mask(built.params, groups, keep)


@pytest.mark.parametrize("name", NAMES)
def test_the_groups_are_those_the_model_lists(name):
    built, groups = coupled(name)
    found = named(built, groups)
    assert not groups.unread
    pinned = {width for width, group in found.items() if not groups[group].prunable}
    assert pinned <= set(built.optional)
    assert set(groups.prunable) == {group for width, group in found.items() if width not in pinned}
    for group in groups.values():
        for (path, axis), index in group.maps.items():
            shape = dict(jc.paths(built.params))[path].shape
            assert index.shape == (shape[axis],)
            assert set(index) - {-1} == set(range(group.size))
    assert "cut together" in str(groups)


def weighed(fn, args):
    """A scalar of the outputs with a gradient everywhere, and the outputs."""

    def value(params):
        outs = jax.tree.leaves(fn(params, *args))
        return jnp.sum(jnp.sin(outs[0]) * jnp.linspace(0.5, 1.5, outs[0].size).reshape(outs[0].shape)), outs

    return value


def assert_equal_outputs(built, expected, found):
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape:  # a statistic that the step returns, cut
            assert built.free_outputs
            continue
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-5 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("name", NAMES)
def test_the_shrunk_function_is_the_masked_one(name):
    built, _, _, small, params, masked = shrunk(name)
    for batch in (2,) if built.reverse else (2, 3):  # the other batch size is tested with the gradients
        args = built.args(batch, jax.random.key(batch))
        expected, found = jax.jit(weighed(built.fn, args))(masked), jax.jit(weighed(small, args))(params)
        assert_equal_outputs(built, expected[1], found[1])


@pytest.mark.parametrize("name", [n for n in NAMES if zoo.built(n).reverse])
def test_gradients_are_those_of_the_masked_function_and_training_continues(name):
    built, _, _, small, params, masked = shrunk(name)
    args = built.args(3, jax.random.key(7))
    full, cut = (jax.jit(jax.value_and_grad(weighed(fn, args), has_aux=True)) for fn in (built.fn, small))
    (_, expected), full_grads = full(masked)
    (before, found), grads = cut(params)
    assert_equal_outputs(built, expected, found)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(full_grads))
    for a, b in zip(jax.tree.leaves(small.cut(full_grads)), jax.tree.leaves(grads), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(b, a, rtol=2e-4, atol=2e-5 * largest)
    norm = sum(float(jnp.vdot(x, x)) for x in jax.tree.leaves(grads)) ** 0.5
    step = jax.tree.map(lambda p, g: p - 1e-3 * g / norm, params, grads)  # short enough to go downhill
    assert cut(step)[0][0] < before


@pytest.mark.parametrize("name", NAMES)
def test_sizes(name):
    built, groups, keep, small, params, masked = shrunk(name)
    sizes = dict(built.sizes)
    for width, group in named(built, groups).items():
        sizes[width] = int(keep[group].sum()) if group in keep else sizes[width]
    total = sum(x.size for x in jax.tree.leaves(params))
    assert total == built.count(**sizes)
    assert total == sum(int(np.count_nonzero(x)) for x in jax.tree.leaves(masked))
    assert small.widths == {name: int(stays.sum()) for name, stays in keep.items()}
    for path, axes in small.indices.items():
        full, cut = dict(jc.paths(built.params))[path], dict(jc.paths(params))[path]
        for axis, index in axes.items():
            full = jnp.take(full, index, axis=axis)
        assert (full == cut).all()


def mlp(params, x):
    return jax.nn.relu(x @ params["up"] + params["bias"]) @ params["down"]


PARAMS = {
    "up": jax.random.normal(jax.random.key(0), (3, 8)),
    "bias": jnp.ones(8),
    "down": jax.random.normal(jax.random.key(1), (8, 2)),
}
X = jax.random.normal(jax.random.key(2), (4, 3))
HALF = jnp.arange(8) < 4


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        ({"up[1]": jnp.zeros(8, bool)}, "nothing would stay.*up axis 1"),
        ({"down[1]": jnp.array([True, False])}, "axis of an output.*down axis 1"),
        ({"up[0]": jnp.array([True, False, True])}, "axis of an argument"),
        ({"up[1]": jnp.ones(7, bool)}, r"expected bool of shape \(8,\).*down axis 0"),
        ({"up[1]": jnp.ones(8, int)}, "found int32"),
        ({"down[0]": HALF}, "no such group; on that axis lies\nup\\[1\\].*bias axis 0"),
        ({"middle": HALF}, "no such group; those that can be cut are up\\[1\\]"),
    ],
)
def test_bad_cuts_show_the_group(keep, told):
    with pytest.raises(ValueError, match=f"(?s){told}"):
        jc.shrink(mlp, PARAMS, keep, X)
    with pytest.raises(ValueError, match=f"(?s){told}"):
        jc.trace.mask(PARAMS, jc.trace.coupling(mlp, PARAMS, X), keep)


def test_a_mask_that_cuts_a_group_unevenly():
    uneven = {**PARAMS, "up": PARAMS["up"].at[:, 2].set(0)}
    with pytest.raises(ValueError, match=r"(?s)up\[1\]: indices \[2\].*bias axis 0\n  down axis 0.*change together"):
        jc.shrink(mlp, uneven, None, X)


@pytest.mark.parametrize(("path", "told"), [("up", "bias axis 0\n  down axis 0"), ("down", "bias axis 0\n  up axis 1")])
def test_masks_that_disagree_are_refused_whichever_member_they_cut(path, told):
    masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool), PARAMS)
    masks[path] = masks[path].at[(slice(None), 2) if path == "up" else 2].set(False)
    with pytest.raises(ValueError, match=rf"up\[1\]: indices \[2\] are zero in some of the members.*\n  {told}"):
        jc.shrink(mlp, PARAMS, masks, X)


def test_what_is_zero_is_cut_without_being_named():
    groups = jc.trace.coupling(mlp, PARAMS, X)
    masked = jc.trace.mask(PARAMS, groups, {"up[1]": HALF})
    small, params = jc.shrink(mlp, masked, None, X)
    assert params["up"].shape == (3, 4)
    np.testing.assert_allclose(small(params, X), mlp(masked, X), rtol=1e-5)
    same, whole = jc.shrink(mlp, PARAMS, None, X)
    assert whole["up"].shape == (3, 8)
    np.testing.assert_allclose(same(whole, X), mlp(PARAMS, X), rtol=1e-6)


def test_masks_and_scores_say_what_stays():
    masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool), PARAMS)
    masks = {"up": masks["up"].at[:, 4:].set(False), "bias": HALF, "down": masks["down"].at[4:].set(False)}
    small, _ = jc.shrink(mlp, PARAMS, masks, X)
    assert small.keep["up[1]"].tolist() == HALF.tolist()
    small, _ = jc.shrink(mlp, PARAMS, {"up[1]": jnp.array([1.0, 5, 2, 2, 0, 9, 2, 2])}, X, sparsity=0.5)
    assert small.indices["bias"][0].tolist() == [1, 2, 3, 5]
    with pytest.raises(ValueError, match=r"up\[1\]: found scores; say with sparsity="):
        jc.shrink(mlp, PARAMS, {"up[1]": jnp.ones(8)}, X)


def test_sizes_are_rounded_up_to_a_multiple_by_keeping_the_largest():
    params = {**PARAMS, "up": PARAMS["up"].at[:, 6].mul(100)}
    small, cut = jc.shrink(mlp, params, {"up[1]": jnp.arange(8) < 3}, X, multiple_of=4)
    assert small.widths == {"up[1]": 4}
    assert small.indices["up"][1].tolist() == [0, 1, 2, 6]
    assert cut["down"].shape == (4, 2)


def test_parameters_of_another_shape_are_refused():
    small, _ = jc.shrink(mlp, PARAMS, {"up[1]": HALF}, X)
    with pytest.raises(ValueError, match=r"bias: found shape \(8,\), expected \(4,\)"):
        small(PARAMS, X)
    with pytest.raises(ValueError, match="another structure"):
        small({"up": PARAMS["up"]}, X)


def test_optimizer_state_is_cut_and_training_goes_on_bit_for_bit():
    tx = optax.adamw(1e-2)
    keep = {"up[1]": HALF}
    small, cut = jc.shrink(mlp, PARAMS, keep, X)
    grads = jax.grad(lambda p: mlp(p, X).sum())(PARAMS)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    state = small.cut(state)
    assert state[0].mu["up"].shape == (3, 4)
    assert state[0].count.shape == ()
    updates, _ = tx.update(jax.grad(lambda p: small(p, X).sum())(cut), state, cut)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, cut)


def test_from_shapes_alone():
    keep = {"up[1]": np.arange(8) % 3 > 0}
    small, cut = jc.shrink(mlp, PARAMS, keep, X)
    again, shapes = jc.shrink(mlp, jax.eval_shape(lambda: PARAMS), keep, X)
    assert shapes == jax.eval_shape(lambda: cut)
    np.testing.assert_array_equal(again(cut, X), small(cut, X))
    for keep in (None, jax.eval_shape(lambda: PARAMS)):
        with pytest.raises(ValueError, match="bias: found a shape, expected values"):
            jc.shrink(mlp, jax.eval_shape(lambda: PARAMS), keep, X)
    with pytest.raises(ValueError, match=r"\w+: found a shape, expected values"):
        jc.shrink(mlp, jax.eval_shape(lambda: PARAMS), {"up[1]": np.arange(8) < 3}, X, multiple_of=2)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_kept_gives_the_function_again(name):
    built, groups = coupled(name)
    args = built.args(2, jax.random.key(0))
    small, cut = jc.shrink(built.fn, built.params, some(groups), *args, free_outputs=built.free_outputs)
    again, same = jc.shrink(built.fn, cut, small.kept, *args, free_outputs=built.free_outputs)
    assert {n: k.tolist() for n, k in again.keep.items()} == {n: k.tolist() for n, k in small.keep.items()}
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, same, cut))
    _, cut_again = jc.shrink(built.fn, built.params, small.kept, *args, free_outputs=built.free_outputs)
    jax.tree.map(np.testing.assert_array_equal, cut_again, cut)


def test_what_was_kept_of_other_parameters_is_refused():
    small, cut = jc.shrink(mlp, PARAMS, {"up[1]": np.arange(8) < 3}, X)
    with pytest.raises(ValueError, match=r"up: found shape .*, expected length 8 or 3 on axis 1"):
        jc.shrink(mlp, {**cut, "up": cut["up"][:, :2]}, small.kept, X)
    with pytest.raises(ValueError, match="more: cut, but not among the parameters"):
        jc.shrink(mlp, cut, {**small.kept, "more": {0: np.ones(3, bool)}}, X)


def test_nodes_are_refused():
    small = jc.compress(PARAMS, jc.plan(PARAMS, [("up", jc.quantize.Int(bits=8))]))
    with pytest.raises(ValueError, match="up: found a Quantized node"):
        jc.trace.coupling(mlp, small, X)


def test_a_primitive_without_a_rule_keeps_what_it_touches_and_says_so():
    def fn(params, x):
        h = x @ params["up"]
        h = jax.lax.reduce_window(h, 0.0, lambda a, b: a + b * b, (1, 1), (1, 1), "SAME")
        return h @ params["down"]

    groups = jc.trace.coupling(fn, PARAMS, X)
    assert groups.unread == {"reduce_window": 1}
    assert "reduce_window" in groups["up[1]"].reason
    assert "reduce_window: met 1 times and not read" in str(groups)


def test_a_sum_that_would_miss_values_pins():
    def fn(params, x):
        return (jax.nn.sigmoid(x @ params["up"]) * jnp.arange(8.0)).sum(1, keepdims=True) @ params["down"][:1]

    assert "slices differ" in jc.trace.coupling(fn, PARAMS, X)["up[1]"].reason


def test_mask_is_traceable():
    groups = jc.trace.coupling(mlp, PARAMS, X)
    masked = jax.jit(jax.vmap(lambda k: jc.trace.mask(PARAMS, groups, {"up[1]": k})))(jnp.stack([HALF, ~HALF]))
    assert (masked["up"][0, :, 4:] == 0).all() and (masked["up"][1, :, :4] == 0).all()
    assert (masked["down"][0, :4] == PARAMS["down"][:4]).all()


def test_remat_scan_and_custom_rules_stay():
    _, _, _, small, params, _ = shrunk("scan-linen")
    text = str(jax.make_jaxpr(small)(params, *zoo.built("scan-linen").args(2, jax.random.key(0))))
    assert "scan[" in text and ("remat" in text or "checkpoint" in text)
    _, _, _, small, params, _ = shrunk("straight-through-plain")
    text = str(jax.make_jaxpr(small)(params, *zoo.built("straight-through-plain").args(2, jax.random.key(0))))
    assert "custom_vjp_call" in text and "custom_jvp_call" in text


def test_shard_map_stays_and_what_it_divides_is_pinned():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def body(params, x):
        out = jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"]
        return out, jax.lax.pmean(out.mean(), "data")

    fn = jax.shard_map(body, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=(spec("data"), spec()))
    groups = jc.trace.coupling(fn, PARAMS, X)
    assert list(groups.prunable) == ["up[1]"]
    small, cut = jc.shrink(fn, PARAMS, {"up[1]": HALF}, X)
    expected = fn(jc.trace.mask(PARAMS, groups, {"up[1]": HALF}), X)
    for a, b in zip(expected, jax.jit(small)(cut, X), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)

    # The derivative of relu is not read here, so it stays whole, and says so.
    whole = jax.shard_map(mlp, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec("data"))
    assert "derivative that cannot be read" in jc.trace.coupling(whole, PARAMS, X)["up[1]"].reason

    divided = jax.shard_map(
        lambda params, x: jax.lax.psum(mlp(params, x), "data"),
        mesh=mesh,
        in_specs=({"up": spec(None, "data"), "bias": spec("data"), "down": spec("data")}, spec()),
        out_specs=spec(),
    )
    assert jc.trace.coupling(divided, PARAMS, X)["up[1]"].reason == "shard_map divides it"


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_parameters(kind):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model", None))
    params = {"up": jnp.tile(PARAMS["up"], (1, 4)), "bias": jnp.ones(32)}
    params["down"] = jax.device_put(jnp.tile(PARAMS["down"], (4, 1)), sharding)
    small, cut = jc.shrink(mlp, params, {"up[1]": jnp.arange(32) % 2 == 0}, X)
    assert cut["down"].shape == (16, 2)
    masked = jax.jit(lambda p: jc.trace.mask(p, small.groups, small.keep))(params)
    assert masked["down"].sharding.is_equivalent_to(sharding, 2)
    if kind == "Auto":  # an explicit mesh wants the function to say where its own product goes
        np.testing.assert_allclose(jax.jit(small)(cut, X), mlp(masked, X), rtol=1e-5, atol=1e-5)
