"""Plans: which rule wins, what a plan shows, and what it refuses."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import jcompress as jc

MAGNITUDE = jc.prune.Magnitude(sparsity=0.5)
PARAMS = {
    "encoder": {"0": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}, "1": {"kernel": jnp.ones((4, 4))}},
    "head": {"kernel": jnp.ones((4, 2))},
}


def test_the_first_match_wins_and_the_rest_stays_dense():
    other = jc.quantize.Int(bits=8)
    plan = jc.plan(PARAMS, [("encoder/0/.*", None), ("encoder/.*", MAGNITUDE), (".*/kernel", other)])
    assert dict(plan) == {
        "encoder/0/bias": None,
        "encoder/0/kernel": None,
        "encoder/1/kernel": MAGNITUDE,
        "head/kernel": other,
    }


def test_patterns_match_whole_paths():
    with pytest.raises(ValueError, match="rule 0 'kernel' matches no parameter"):
        jc.plan(PARAMS, [("kernel", MAGNITUDE)])


def test_a_rule_that_matches_nothing_names_the_nearest_paths():
    with pytest.raises(ValueError, match=r"'encodr/0/kernel' matches no parameter; .*'encoder/0/kernel'"):
        jc.plan(PARAMS, [("encodr/0/kernel", MAGNITUDE)])


def test_a_rule_whose_leaves_are_taken_is_shown():
    plan = jc.plan(PARAMS, [(".*", None), ("head/.*", MAGNITUDE)])
    assert "rule 1 'head/.*': earlier rules took all of its leaves" in str(plan)


def test_a_broken_pattern_says_so():
    with pytest.raises(ValueError, match="is not a regular expression"):
        jc.plan(PARAMS, [("(", MAGNITUDE)])


def test_plan_prints_paths_shapes_and_methods():
    text = str(jc.plan(PARAMS, [(".*/kernel", MAGNITUDE)]))
    assert "encoder/0/kernel  8x4    Magnitude(sparsity=0.5)" in text
    assert "encoder/0/bias    4      dense" in text
    assert repr(jc.plan(PARAMS, [(".*/kernel", MAGNITUDE)])) == "Plan(3 of 4 leaves compressed)"


def test_replace_changes_entries_and_refuses_unknown_paths():
    plan = jc.plan(PARAMS, [(".*/kernel", MAGNITUDE)]).replace({"head/kernel": None})
    assert plan["head/kernel"] is None
    assert plan["encoder/0/kernel"] is MAGNITUDE
    with pytest.raises(ValueError, match="head/kernl: not in the plan"):
        plan.replace({"head/kernl": None})
    with pytest.raises(ValueError, match="head/kernel: rank 3 is above the limit 2"):
        plan.replace({"head/kernel": jc.factorize.SVD(rank=3)})


def test_replaced_leaves_form_a_group_of_their_own():
    params = {name: scale * jnp.arange(1.0, 11.0) for name, scale in (("a", 1.0), ("b", 100.0), ("c", 1e4))}
    method = jc.prune.Magnitude(sparsity=0.5, scope="global")
    plan = jc.plan(params, [(".*", method)])
    assert [int(n.mask.sum()) for n in jc.compress(params, plan).values()] == [0, 5, 10]
    apart = plan.replace({"c": jc.prune.Magnitude(sparsity=0.5, scope="global")})
    assert [int(n.mask.sum()) for n in jc.compress(params, apart).values()] == [0, 10, 5]


def test_rules_with_one_method_object_are_still_two_groups():
    params = {"a": jnp.arange(1.0, 11.0), "b": 100 * jnp.arange(1.0, 11.0)}
    method = jc.prune.Magnitude(sparsity=0.5, scope="global")
    small = jc.compress(params, jc.plan(params, [("a", method), ("b", method)]))
    assert [int(small[k].mask.sum()) for k in "ab"] == [5, 5]


def test_a_node_where_an_array_was_expected_is_named():
    plan = jc.plan(PARAMS, [("head/kernel", MAGNITUDE)])
    small = jc.compress(PARAMS, plan)
    with pytest.raises(ValueError, match=r"head/kernel: found a Masked node .*jc.chain"):
        jc.plan(small, [("head/kernel", MAGNITUDE)])
    with pytest.raises(ValueError, match="head/kernel: found a Masked node"):
        jc.compress(small, plan)


def test_a_plan_for_other_parameters_is_refused():
    plan = jc.plan(PARAMS, [(".*/kernel", MAGNITUDE)])
    with pytest.raises(ValueError, match=r"made for other parameters: not in the plan \['tail'\]"):
        jc.compress({**PARAMS, "tail": jnp.ones(3)}, plan)


def test_integer_leaves_are_refused_by_path():
    with pytest.raises(ValueError, match=r"steps: found dtype int32, expected a float array"):
        jc.plan({"steps": jnp.zeros(3, jnp.int32)}, [(".*", MAGNITUDE)])


class Pair(NamedTuple):
    left: Any
    value: Any


def test_paths_of_every_container():
    tree = {"a": [jnp.ones(2), None, (jnp.ones(3),)], "b": Pair(jnp.ones(1), jnp.ones(4))}
    assert [path for path, _ in jc.paths(tree)] == ["a/0", "a/2/0", "b/left", "b/value"]
    small = jc.compress(tree, jc.plan(tree, [("a/.*|b/value", MAGNITUDE)]))
    assert isinstance(small["b"], Pair)
    assert isinstance(small["b"].value, jc.formats.Masked)
    assert jax.tree.structure(jc.materialize(small)) == jax.tree.structure(tree)


def test_nnx_paths_hide_the_variable():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.block = getattr(nnx, "List", list)([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])

        def __call__(self, x):
            return self.block[1](nnx.relu(self.block[0](x)))

    model = Model(nnx.Rngs(0))
    graph, state = nnx.split(model, nnx.Param)
    plan = jc.plan(state, [("block/./kernel", MAGNITUDE)])
    assert list(plan) == ["block/0/bias", "block/0/kernel", "block/1/bias", "block/1/kernel"]
    small = jc.compress(state, plan)
    pruned = nnx.merge(graph, jc.materialize(small))
    assert int((pruned.block[0].kernel[...] == 0).sum()) == 6
    assert pruned(jnp.ones((1, 3))).shape == (1, 2)


def test_linen_parameters():
    nn = pytest.importorskip("flax.linen")
    params = nn.Dense(4).init(jax.random.key(0), jnp.ones((1, 8)))
    small = jc.compress(params, jc.plan(params, [("params/kernel", MAGNITUDE)]))
    assert int(small["params"]["kernel"].mask.sum()) == 16
    assert nn.Dense(4).apply(jc.materialize(small), jnp.ones((1, 8))).shape == (1, 4)


def test_a_single_array_is_a_tree():
    w = jnp.arange(4.0)
    assert jc.materialize(jc.compress(w, jc.plan(w, [("", MAGNITUDE)]))).tolist() == [0, 0, 2, 3]
