"""Importance of units, and the choice of those that stay."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jcompress as jc
from jcompress.prune import scores, structured


def random_params(rng, shapes):
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def cnn(p, x):
    """Convolution, batch norm, convolution, flatten, dense: (n, 6, 6, 2) to (n, 3)."""
    x = convolve(x, p["one/kernel"]) + p["one/bias"]
    x = jax.nn.relu((x - p["norm/mean"]) / jnp.sqrt(p["norm/var"] + 1e-5) * p["norm/scale"] + p["norm/bias"])
    x = jax.nn.relu(convolve(x, p["two/kernel"]) + p["two/bias"])
    return x.reshape(x.shape[0], -1) @ p["out/kernel"] + p["out/bias"]


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


CNN = {
    "one/kernel": (3, 3, 2, 5), "one/bias": (5,), "norm/mean": (5,), "norm/var": (5,), "norm/scale": (5,),
    "norm/bias": (5,), "two/kernel": (3, 3, 5, 4), "two/bias": (4,), "out/kernel": (16, 3), "out/bias": (3,),
}  # fmt: skip


@pytest.fixture
def model(rng):
    params = random_params(rng, CNN)
    params["norm/var"] = jnp.abs(params["norm/var"])
    x = jnp.asarray(rng.normal(size=(7, 6, 6, 2)), jnp.float32)
    return params, x, jc.trace.coupling(cnn, params, x)


def group_of(groups, path, axis):
    return next(name for name, group in groups.items() if (path, axis) in group.members)


def by_hand(params, group, picked, reduce):
    """The reduction over a list of all entries of each unit."""
    entries = [[] for _ in range(group.size)]
    for path, axis in picked:
        w = np.moveaxis(np.asarray(params[path], np.float64), axis, 0)
        for row, unit in zip(w, group.maps[path, axis], strict=True):
            if unit >= 0:
                entries[unit].extend(np.ravel(row))
    return [reduce(np.asarray(e)) for e in entries]


REDUCTIONS = {
    "sum": lambda e: np.abs(e).sum(),
    "mean": lambda e: np.abs(e).mean(),
    "max": lambda e: np.abs(e).max(),
    "norm": lambda e: np.sqrt((e**2).sum()),
}


@pytest.mark.parametrize("members", ["all", "producers", "consumers", "kernels"])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_importance_equals_a_loop_over_entries(model, reduce, members):
    params, _, groups = model
    found = structured.importance(params, groups, scores.magnitude, reduce, members=members)
    assert set(found) == {name for name, group in groups.items() if group.prunable}
    for name, value in found.items():
        group = groups[name]
        picked = {"all": group.members, "consumers": group.consumers}.get(members, group.producers)
        if members == "kernels":
            picked = [m for m in picked if m[0].endswith("kernel")]
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, by_hand(params, group, picked, REDUCTIONS[reduce]), rtol=1e-5)


def test_entries_of_other_groups_do_not_count():
    group = jc.trace.Group(size=2, consumers=(("w", 0),), maps={("w", 0): np.array([-1, 1, 0, 1, -1])})
    params = {"w": jnp.array([[100.0], [1.0], [2.0], [4.0], [100.0]])}
    for reduce, expected in {"sum": [2, 5], "mean": [2, 2.5], "max": [2, 4]}.items():
        assert structured.importance(params, {"g": group}, reduce=reduce)["g"].tolist() == expected


def test_channels_of_heads_count_by_their_kernels_beside_biases(rng):
    """Queries and keys meet in a product, so that of both only biases make the channels that are summed over."""
    p = random_params(rng, {f"{n}/{kind}": (6, 6)[i:] for n in "qkv" for i, kind in enumerate(("kernel", "bias"))})
    p["o/kernel"] = random_params(rng, {"o": (6, 5)})["o"]

    def attend(p, x):
        q, k, v = ((x @ p[f"{n}/kernel"] + p[f"{n}/bias"]).reshape(-1, 2, 3) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k))
        return jnp.einsum("hqk,khd->qhd", weights, v).reshape(-1, 6) @ p["o/kernel"]

    groups = jc.trace.coupling(attend, p, jnp.ones((4, 6)))
    (name,) = (name for name, g in groups.items() if {path for path, _ in g.producers} == {"q/bias", "k/bias"})
    expected = (np.abs(p["q/kernel"]) + np.abs(p["k/kernel"])).reshape(6, 2, 3).sum((0, 1))
    np.testing.assert_allclose(structured.l1(p, groups)[name], expected, rtol=1e-5)


def test_signed_scores_add_up_before_their_magnitude():
    params, grads = {"w": jnp.array([[1.0, 1.0], [1.0, 1.0]])}, {"w": jnp.array([[2.0, -3.0], [-2.0, -1.0]])}
    groups = {"g": jc.trace.Group(size=2, producers=(("w", 1),))}
    assert structured.importance(params, groups, scores.signed_taylor, "signed", grads=grads)["g"].tolist() == [0, 4]
    assert structured.taylor(params, groups, grads, members="producers")["g"].tolist() == [0, 16]
    assert structured.taylor(params, groups, grads, members="producers", signed=False)["g"].tolist() == [4, 4]
    stats = {"w": types.SimpleNamespace(grad=grads["w"])}
    assert structured.importance(params, groups, scores.taylor, stats=stats)["g"].tolist() == [4, 4]


def test_filter_norms_equal_their_definition(model):
    """Li et al.: the sum of magnitudes of a filter, without its bias and its norm."""
    params, _, groups = model
    first, second = group_of(groups, "one/kernel", 3), group_of(groups, "two/kernel", 3)
    l1, l2 = structured.l1(params, groups), structured.l2(params, groups)
    np.testing.assert_allclose(l1[first], np.abs(params["one/kernel"]).sum((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(l2[second], np.sqrt((params["two/kernel"] ** 2).sum((0, 1, 2))), rtol=1e-5)


def test_taylor_is_the_squared_derivative_by_a_gate(model):
    params, x, groups = model

    def gated(gate):
        p = params | {"two/kernel": params["two/kernel"] * gate[:, None]}
        return jnp.sum(cnn(p, x) ** 2)

    grads = jax.grad(lambda p: jnp.sum(cnn(p, x) ** 2))(params)
    found = structured.taylor(params, groups, grads)[group_of(groups, "one/kernel", 3)]
    np.testing.assert_allclose(found, jax.grad(gated)(jnp.ones(5)) ** 2, rtol=1e-3)


def test_hessian_scores_add_up_over_a_unit(model, rng):
    params, _, groups = model
    stats = {path: types.SimpleNamespace(hessian_diagonal=jnp.abs(w) + 1) for path, w in params.items()}
    found = structured.hessian(params, groups, stats)[group_of(groups, "one/kernel", 3)]
    w = params["one/kernel"]
    np.testing.assert_allclose(found, jnp.sum((jnp.abs(w) + 1) * w**2 / 2, (0, 1, 2)), rtol=1e-5)


def test_slimming_ranks_by_the_scales_of_norms(model):
    params, _, groups = model
    name = group_of(groups, "one/kernel", 3)
    found = structured.slimming(params, {name: groups[name]}, match="norm/scale")
    np.testing.assert_allclose(found[name], np.abs(params["norm/scale"]), rtol=1e-6)


def test_removing_filters_equals_masking_them(model):
    """Surgery: outputs of the cut network equal those of the masked one, and the sizes follow."""
    params, x, groups = model
    keep = structured.keep(structured.l1(params, groups), groups, sparsity=0.4)
    masked = cnn(jc.trace.mask(params, groups, keep), x)
    small_fn, small = jc.shrink(cnn, params, keep, x)
    np.testing.assert_allclose(small_fn(small, x), masked, atol=2e-5 * float(jnp.abs(masked).max()))
    assert small["one/kernel"].shape == (3, 3, 2, 3)
    assert small["two/kernel"].shape == (3, 3, 3, 2)
    assert small["out/kernel"].shape == (8, 3)


def test_random_scores_depend_on_key_and_name_only():
    groups = {name: jc.trace.Group(size=5) for name in "ab"}
    one, two = (structured.random(groups, jax.random.key(i)) for i in (0, 1))
    assert one["a"].tolist() != one["b"].tolist()
    assert one["a"].tolist() != two["a"].tolist()
    assert structured.random({"b": groups["b"]}, jax.random.key(0))["b"].tolist() == one["b"].tolist()


def test_nodes_count_as_what_they_stand_for():
    params = {"w": jnp.array([[1.0, -2.0, 3.0], [0.1, 4.0, -5.0]])}
    groups = {"g": jc.trace.Group(size=3, producers=(("w", 1),))}
    nodes = jc.compress(params, jc.plan(params, [("w", jc.prune.Magnitude(sparsity=0.5))]))
    dense = structured.l1(jc.materialize(nodes), groups)["g"]
    assert structured.l1(nodes, groups)["g"].tolist() == dense.tolist()


def test_a_subtree_sees_its_own_members():
    group = jc.trace.Group(
        size=2,
        producers=(("params/a", 1), ("stats/m", 0)),
        consumers=(("params/b", 0),),
        maps={("params/b", 0): [1, 0]},
    )
    seen = jc.trace.Groups({"g": group, "h": jc.trace.Group(size=1)}).within("params")
    assert list(seen) == ["g"]
    assert seen["g"].producers == (("a", 1),)
    assert seen["g"].maps["b", 0].tolist() == [1, 0]


def test_bad_choices_of_members_are_explained(model):
    params, _, groups = model
    with pytest.raises(ValueError, match=r"reduce='median' is unknown"):
        structured.importance(params, groups, reduce="median")
    with pytest.raises(ValueError, match=r"members='outputs' is unknown"):
        structured.importance(params, groups, members="outputs")
    with pytest.raises(ValueError, match=r"none of its \d members .* match='nothing'"):
        structured.l1(params, groups, match="nothing")
    group = jc.trace.Group(size=2, producers=(("one/kernels", 1),))
    with pytest.raises(ValueError, match=r"one/kernels: the group 'g' names it, .* 'one/kernel'"):
        structured.importance(params, {"g": group})


# The choice.


def two_groups():
    return {"a": jc.trace.Group(size=4), "b": jc.trace.Group(size=6)}


SCORES = {"a": jnp.array([4.0, 1.0, 3.0, 2.0]), "b": jnp.array([10.0, 60.0, 20.0, 50.0, 40.0, 30.0])}


def test_each_group_keeps_its_highest():
    kept = structured.keep(SCORES, two_groups(), sparsity=0.5)
    assert kept["a"].tolist() == [True, False, True, False]
    assert kept["b"].tolist() == [False, True, False, True, True, False]
    kept = structured.keep(SCORES, two_groups(), sparsity={"a": 0.25, "b": 1.0})
    assert [int(k.sum()) for k in kept.values()] == [3, 1]


def test_a_global_threshold_compares_groups():
    kept = structured.keep(SCORES, two_groups(), sparsity=0.5, scope="global")
    assert kept["a"].tolist() == [True, False, False, False], "one stays, whatever its score"
    assert [int(k.sum()) for k in kept.values()] == [1, 4]
    kept = structured.keep(SCORES, two_groups(), sparsity=0.5, scope="global", at_least=0)
    assert [int(k.sum()) for k in kept.values()] == [0, 5]
    for normalize in ("mean", "max", "norm"):
        kept = structured.keep(SCORES, two_groups(), sparsity=0.5, scope="global", normalize=normalize)
        by = {"mean": np.mean, "max": np.max, "norm": np.linalg.norm}[normalize]
        flat = np.concatenate([np.asarray(x) / by(x) for x in SCORES.values()])
        expected = np.zeros(10, bool)
        expected[np.argsort(-flat, kind="stable")[:5]] = True
        assert np.concatenate([*kept.values()]).tolist() == expected.tolist()


def test_sizes_are_rounded_up_to_multiples():
    groups = {"a": jc.trace.Group(size=20), "b": jc.trace.Group(size=6)}
    found = {name: jnp.arange(group.size, dtype=jnp.float32) for name, group in groups.items()}
    for scope in ("group", "global"):
        kept = structured.keep(found, groups, sparsity=0.5, scope=scope, multiple_of=8)
        assert [int(k.sum()) for k in kept.values()] == [16, 6], "no more than there are"
        assert kept["a"].tolist() == [False] * 4 + [True] * 16


def test_ties_go_to_the_lower_index_and_zero_scores_are_no_reason_to_fail():
    kept = structured.keep({"a": jnp.zeros(4)}, two_groups(), sparsity=0.5, normalize="mean")
    assert kept["a"].tolist() == [True, True, False, False]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=10, max_size=10), st.floats(0, 1), st.integers(0, 3))
def test_global_counts_are_exact(values, sparsity, at_least):
    found = {"a": jnp.array(values[:4]), "b": jnp.array(values[4:])}
    kept = structured.keep(found, two_groups(), sparsity, scope="global", at_least=at_least)
    counts = [int(k.sum()) for k in kept.values()]
    assert min(counts) >= at_least
    assert sum(counts) == max(10 - round(sparsity * 10), 2 * at_least)


@pytest.mark.parametrize("scope", ["group", "global"])
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_a_traced_sparsity_gives_the_same_and_compiles_once(scope, multiple_of):
    def choose(found, s):
        return structured.keep(found, two_groups(), s, scope=scope, multiple_of=multiple_of)

    jitted = jax.jit(choose)
    for s in (0.0, 0.3, 0.5, 0.9, 1.0):
        for name, mask in jitted(SCORES, s).items():
            assert mask.tolist() == choose(SCORES, s)[name].tolist()
    assert jitted._cache_size() == 1
    curve = jax.vmap(lambda s: choose(SCORES, s))(jnp.array([0.0, 0.5]))
    assert curve["b"].shape == (2, 6)


def test_bad_choices_are_explained():
    groups = two_groups() | {"fixed": jc.trace.Group(size=2, reason="an output")}
    keep = structured.keep
    with pytest.raises(ValueError, match=r"aa: there is no such group; there are 3, such as 'a'"):
        keep({"aa": jnp.ones(4)}, groups, 0.5)
    with pytest.raises(ValueError, match=r"fixed: found a group that cannot be cut \(an output"):
        keep({"fixed": jnp.ones(2)}, groups, 0.5)
    with pytest.raises(ValueError, match=r"a: found scores of shape \(3,\), expected \(4,\)"):
        keep({"a": jnp.ones(3)}, groups, 0.5)
    with pytest.raises(ValueError, match=r"a: keep: sparsity=1.5 is outside"):
        keep({"a": jnp.ones(4)}, groups, 1.5)
    with pytest.raises(ValueError, match=r"scope='leaf' is unknown"):
        keep({"a": jnp.ones(4)}, groups, 0.5, scope="leaf")
    with pytest.raises(ValueError, match=r"normalize='sum' is unknown"):
        keep({"a": jnp.ones(4)}, groups, 0.5, normalize="sum")
    with pytest.raises(ValueError, match=r"multiple_of=0 must be positive"):
        keep({"a": jnp.ones(4)}, groups, 0.5, multiple_of=0)
    with pytest.raises(ValueError, match=r"found a sparsity for \['b'\], expected one for each of \['a'\]"):
        keep({"a": jnp.ones(4)}, groups, {"b": 0.5})
    with pytest.raises(ValueError, match=r"goes with scope='group'"):
        keep({"a": jnp.ones(4)}, groups, {"a": 0.5}, scope="global")


def test_a_group_that_the_model_fixes_says_why(model):
    groups = model[2]
    name = group_of(groups, "out/kernel", 1)
    with pytest.raises(ValueError, match=r"cannot be cut \(it is an axis of an output\)"):
        structured.keep({name: jnp.ones(3)}, groups, 0.5)


def test_schedules_of_optax_are_numbers_here():
    ramp = optax.polynomial_schedule(0.0, 0.5, power=3, transition_steps=10)
    assert int(structured.keep({"a": SCORES["a"]}, two_groups(), ramp(10))["a"].sum()) == 2


def test_channels_of_heads_are_scored_by_queries_and_keys(rng):
    params = {name: jnp.asarray(rng.normal(size=(8, 8)), jnp.float32) for name in ("q", "k", "v", "out")}

    def attention(p, x):
        q, k, v = ((x @ p[name]).reshape(*x.shape[:2], 2, 4) for name in ("q", "k", "v"))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape) @ p["out"]

    groups = jc.trace.coupling(attention, params, jnp.ones((2, 3, 8)))
    scores = structured.l1(params, groups)
    (name,) = (name for name, group in groups.items() if {"q", "k"} == set(dict(group.members)))
    np.testing.assert_allclose(
        scores[name], sum(jnp.abs(params[x]).reshape(8, 2, 4).sum((0, 1)) for x in "qk"), rtol=1e-6
    )
