"""Mistakes at the keyboard, and values that must not change in silence: one sentence with the path and the fix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jcompress as jc

W = jnp.arange(1.0, 17.0).reshape(4, 4)
HALF = jc.prune.Magnitude(0.5)
RAMP = optax.linear_schedule(0.0, 0.9, 100)


def compressed(params, rules, **options):
    return jc.compress(params, jc.plan(params, rules), **options)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: compressed({"w": W, "s": "x"}, [("w", HALF)]), r"^s: found a str, expected an array"),
        (lambda: compressed({"w": W, "s": b"x"}, [("w", HALF)]), r"^s: found a bytes, expected an array"),
        (lambda: compressed({"w": W, "s": np.array([None])}, [("w", HALF)]), r"^s: found dtype object.*cast it"),
        (lambda: compressed({"w": W, "s": np.array(["x"])}, [("w", HALF)]), r"^s: found dtype <U1"),
        (lambda: compressed({"w": np.ones((4, 4), np.longdouble)}, [("w", HALF)]), r"^w: found dtype (float|long)"),
        (lambda: compressed({"w": W, "f": len}, [("w", HALF)]), r"^f: found a builtin_function_or_method"),
        (lambda: jc.plan({"w": W}, {"w": HALF}), r"found a dict for rules.*list\(rules.items\(\)\)"),
        (lambda: jc.plan({"w": W}, "w"), r"found a str for rules"),
        (lambda: jc.plan({"w": W}, [HALF]), r"^rule 0: found Magnitude.*expected a pair"),
        (lambda: jc.plan({"w": W}, [(HALF, "w")]), r"^rule 0: found .*expected a pair"),
        (lambda: jc.plan({"w": W}, [("w", jc.prune.Magnitude)]), r"rule 0 'w': found the class.*Magnitude\(\.\.\.\)"),
        (
            lambda: jc.plan({"w": W}, [("w", "magnitude")]),
            r"rule 0 'w': found 'magnitude' of type str, expected a method",
        ),
        (lambda: jc.plan({"w": W}, [("w", HALF)]).replace({"w": "x"}), r"^w: found 'x' of type str"),
        (lambda: jc.plan({"w": W}, [("w", HALF)]).replace({"v": HALF}), r"^v: not in the plan"),
        (lambda: jc.plan({"a": {"kernel": W}}, [("kernel", HALF)]), r"'kernel' matches no.*use '\.\*/kernel'"),
        (lambda: jc.plan({"a": {"b": W}}, [("a", HALF)]), r"use 'a/\.\*'"),
        (lambda: jc.plan({"w": W}, [("(", HALF)]), r"is not a regular expression"),
        (lambda: jc.compress({"w": W}, HALF), r"^compress: found Magnitude.*expected a plan"),
        (lambda: jc.compress({"w": W}, {"w": HALF}), r"^compress: found \{.*expected a plan"),
        (lambda: jc.simulate({"w": W}, HALF), r"^simulate: found Magnitude.*expected a plan"),
        (lambda: jc.project(HALF), r"^project: found Magnitude.*expected a plan"),
        (
            lambda: compressed({"w": jax.ShapeDtypeStruct((4, 4), jnp.float32)}, [("w", HALF)]),
            r"^w: found the shape of an array.*eval_shape",
        ),
        (lambda: jc.merge({"w": W}, {"w": W}), r"^merge needs.*w: both halves hold a leaf"),
        (lambda: jc.merge({"w": W}, {"v": W}), r"^merge needs the two halves"),
        (lambda: jc.chain(), r"at least one method"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(call, said):
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert "\n" not in str(error.value) or "merge" in str(error.value)
    assert "Array(" not in str(error.value)


@pytest.mark.parametrize("verb", ["plan", "compress", "simulate", "project", "calibrate", "report"])
def test_two_leaves_of_one_path_are_refused_by_every_verb(verb):
    params = {"a": {"w": W}, "a/w": 100 * W}
    good = {"a": {"w": W}}
    plan = jc.plan(good, [(".*", HALF)])
    calls = {
        "plan": lambda: jc.plan(params, [(".*", HALF)]),
        "compress": lambda: jc.compress(params, plan),
        "simulate": lambda: jc.simulate(params, plan),
        "project": lambda: jc.project(plan).init(params),
        "calibrate": lambda: jc.calibrate(lambda p, x: x @ p["a"]["w"] @ p["a/w"], params, [jnp.ones((2, 4))]),
        "report": lambda: jc.report(params, params),
    }
    with pytest.raises(ValueError, match=r"^a/w: found two leaves of this path, \['a'\]\['w'\] and \['a/w'\]"):
        calls[verb]()


def test_what_no_rule_names_stays_what_it_is():
    params = {
        "w": W,
        "seen": np.int64(3_000_000_000),
        "ids": np.array([2**40 + 1, 5]),
        "one": np.array([1 + 1e-12]),
        "lr": 0.1,
        "n": 3,
        "on": True,
        "big": np.arange(3, dtype=">f8"),
        "key": jax.random.key(3),
    }
    out = compressed(params, [("w", HALF)])
    for name in ("seen", "ids", "one", "big"):
        assert type(out[name]) is type(params[name])
        assert out[name].dtype == params[name].dtype
        np.testing.assert_array_equal(out[name], params[name])
    assert out["ids"] is not params["ids"]
    assert [type(out[name]) for name in ("lr", "n", "on")] == [float, int, bool]
    assert (out["lr"], out["n"], out["on"]) == (0.1, 3, True)
    assert jax.random.key_data(out["key"]).tolist() == jax.random.key_data(params["key"]).tolist()
    nodes = {"w": compressed({"w": W}, [("w", HALF)])["w"], "n": np.int64(2**40)}
    assert jc.materialize(nodes)["n"] == 2**40
    assert jc.finalize(nodes)["n"] == 2**40


def test_arrays_of_another_byte_order_are_read_as_the_numbers_they_are():
    params = {"w": np.asarray(W).astype(">f4")}
    np.testing.assert_array_equal(jc.materialize(compressed(params, [("w", HALF)]))["w"], jnp.where(W > 8, W, 0))
    np.testing.assert_array_equal(jc.simulate(params, jc.plan(params, [("w", HALF)]))["w"], jnp.where(W > 8, W, 0))


@pytest.mark.parametrize(
    "method",
    [
        jc.prune.Magnitude(RAMP),
        jc.prune.Magnitude(RAMP, scope="global"),
        jc.chain(jc.prune.Magnitude(RAMP), jc.quantize.Int(bits=8)),
        jc.stacked(jc.prune.Magnitude(RAMP)),
        jc.residual(jc.quantize.Int(bits=2), jc.prune.Magnitude(RAMP)),
        jc.prune.dynamic.Movement(sparsity=RAMP),
        jc.quantize.training.Relaxed(bits=3, slack=RAMP),
    ],
    ids=str,
)
def test_a_schedule_needs_a_step(method):
    params = {"w": W}
    plan = jc.plan(params, [("w", method)])
    for verb in (jc.compress, jc.simulate):
        with pytest.raises(ValueError, match=r"w.*schedule.*no step is given.*pass step="):
            verb(params, plan)
        assert jnp.isfinite(jc.materialize(verb(params, plan, step=100))["w"]).all()
    jc.project(plan).init(params)


def test_equal_methods_given_in_one_replacement_decide_together():
    params = {"a": W, "b": 100 * W}
    plan = jc.plan(params, [("a", HALF), ("b", HALF)])
    both = plan.replace({name: jc.prune.Magnitude(0.5, scope="global") for name in params})
    tree = jc.compress(params, both)
    assert both.groups["a"] == both.groups["b"]
    assert (int(tree["a"].mask.sum()), int(tree["b"].mask.sum())) == (0, 16)
    alone = plan.replace({name: dataclasses.replace(HALF, sparsity=s) for name, s in (("a", 0.5), ("b", 0.25))})
    assert alone.groups["a"] != alone.groups["b"]
    traced = jax.jit(
        lambda s: jc.compress(params, plan.replace(dict.fromkeys(params, jc.prune.Magnitude(s, scope="global"))))
    )(0.5)
    np.testing.assert_array_equal(traced["b"].mask, True)


@pytest.mark.parametrize("method", [HALF, jc.quantize.Int(4), jc.factorize.SVD(2), jc.share.KMeans(4)], ids=str)
def test_a_node_has_the_face_of_its_array(method):
    node = compressed({"w": W}, [("w", method)])["w"]
    dense = node.materialize()
    assert (node.shape, node.dtype, node.ndim, node.size) == ((4, 4), jnp.float32, 2, 16)
    np.testing.assert_array_equal(np.asarray(node), dense)
    np.testing.assert_array_equal(jnp.asarray(node), dense)
    assert np.asarray(node, np.float64).dtype == np.float64
    shapes = jax.eval_shape(lambda: node)
    assert (shapes.shape, shapes.dtype) == ((4, 4), jnp.float32)
    half = jc.split(node)[1]
    with pytest.raises(AttributeError, match="stands for no array"):
        half.shape, half.dtype  # noqa: B018
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), node)
    assert jax.lax.scan(lambda c, n: (c, n.materialize()), 0, stack)[1].shape == (2, 4, 4)
