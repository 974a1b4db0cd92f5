"""What CONTRIBUTING.md and docs/extend.md say is enough is enough: toys, added in the documented way, behave."""

import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jcompress as jc

ROOT = pathlib.Path(__file__).parent.parent
W = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)


@pytest.fixture(scope="module")
def toys():
    """The names that the page defines, as a module of a user's would."""
    namespace = {"__name__": "toys"}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/extend.md").read_text(), re.S):
        exec(compile(block, "extend.md", "exec"), namespace)
    return namespace


def conforms(method, **known):
    """The checks of the conformance list that any method must pass."""
    tree = {"kernel": W}
    plan = jc.plan(tree, [("kernel", method)])

    def fit(w):
        return jc.compress({"kernel": w}, plan, **known)["kernel"]

    node = fit(W)
    dense = node.materialize()
    assert (dense.shape, dense.dtype) == (W.shape, W.dtype)
    np.testing.assert_array_equal(jax.jit(fit)(W).materialize(), dense)
    assert jax.tree.structure(jax.eval_shape(fit, W)) == jax.tree.structure(node)
    again = node.project(dense)
    np.testing.assert_allclose(again.materialize(), dense, atol=1e-6)
    whole = jc.merge(*jc.split({"kernel": node}))
    np.testing.assert_array_equal(jc.materialize(whole)["kernel"], dense)
    assert 0 < jc.nbits(node) < 32 * W.size + 64
    return node


def saved(node, path):
    jc.save(path, {"kernel": node})
    loaded = jc.load(path)
    assert jc.nbits(loaded) == jc.nbits(node)
    np.testing.assert_array_equal(jc.materialize(loaded)["kernel"], node.materialize())


def test_a_method(toys, tmp_path):
    saved(conforms(toys["Above"](0.5)), tmp_path / "toy.jc")


def test_a_score_serves_masks_and_units(toys, tmp_path):
    grads = {"kernel": jnp.cos(W)}
    node = conforms(jc.prune.ByScore(sparsity=0.5, score=toys["slope"]), grads=grads)
    assert int(node.mask.sum()) == W.size // 2
    assert bool(jnp.abs(grads["kernel"])[node.mask].min() >= jnp.abs(grads["kernel"])[~node.mask].max())
    saved(node, tmp_path / "toy.jc")
    tree = {"kernel": W, "out": W.T}
    groups = jc.trace.coupling(lambda p, x: jnp.tanh(x @ p["kernel"]) @ p["out"], tree, W.T)
    units = jc.prune.structured.importance(tree, groups, toys["slope"], grads={"kernel": grads["kernel"], "out": W.T})
    assert [len(scores) for scores in units.values()] == [8]


def test_a_grid(toys, tmp_path):
    node = conforms(toys["thirds"])
    levels = jnp.abs(W).max(0) * jnp.array([-1.0, -1 / 3, 1 / 3, 1.0])[:, None, None]
    nearest = jnp.abs(levels - W).min(0)
    np.testing.assert_allclose(jnp.abs(node.materialize() - W), nearest, atol=1e-6)
    saved(node, tmp_path / "toy.jc")


def test_a_format(toys):
    node = toys["Scaled"](jnp.sign(W).astype(jnp.int8), jnp.float32(1.0))
    train, held = jc.split({"kernel": node})
    assert [x.shape for x in jax.tree.leaves(train)] == [()]
    assert [x.dtype for x in jax.tree.leaves(held)] == [jnp.int8]
    best = node.project(W)
    slope = jax.grad(lambda t: ((jc.materialize(jc.merge(t, held))["kernel"] - W) ** 2).sum())
    at_best = slope(jc.split({"kernel": best})[0])
    assert abs(float(jax.tree.leaves(at_best)[0])) < 1e-3
    assert node.nbits() == 8 * W.size + 32
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), node)
    _, inside = jax.lax.scan(lambda carry, layer: (carry, layer.materialize()), 0, stack)
    np.testing.assert_array_equal(inside[0], node.materialize())


def test_a_transform(toys):
    params = {"kernel": W}
    tx = toys["rarely"](jc.plan(params, [("kernel", jc.prune.Magnitude(sparsity=0.5))]), every=2)
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(4):
        updates, state = step(jax.tree.map(jnp.cos, params), state, params)
        params = optax.apply_updates(params, updates)
        assert int((params["kernel"] == 0).sum()) == W.size // 2
    assert step._cache_size() == 1


PRIMITIVE = """
import jax, jax.numpy as jnp
from jax.extend import core
from jax.interpreters import mlir
import jcompress as jc

toy = core.Primitive("toy")
toy.def_impl(lambda x: x * x)
toy.def_abstract_eval(lambda x: x)
mlir.register_lowering(toy, mlir.lower_fun(lambda x: x * x, multiple_results=False))

keys = jax.random.split(jax.random.key(0), 3)
params = {"a": jax.random.normal(keys[0], (4, 6)), "b": jax.random.normal(keys[1], (6, 3))}
x = jax.random.normal(keys[2], (5, 4))

def fn(params, x):
    return toy.bind(x @ params["a"]) @ params["b"]

groups = jc.trace.coupling(fn, params, x)
free = {name: group for name, group in groups.items() if group.prunable}
assert [group.size for group in free.values()] == [6], str(groups)
keep = {name: jnp.arange(group.size) % 2 == 0 for name, group in free.items()}
small_fn, small = jc.shrink(fn, params, keep, x)
assert small["a"].shape == (4, 3)
assert jnp.allclose(small_fn(small, x), fn(jc.trace.mask(params, groups, keep), x), atol=1e-5)
"""


def test_a_primitive_is_one_row(tmp_path):
    shutil.copytree(ROOT / "jcompress", tmp_path / "jcompress", ignore=shutil.ignore_patterns("__pycache__"))
    table = tmp_path / "jcompress/trace/primitives.py"
    text = table.read_text()
    start, row = "ROWS: dict[str, Row] = {", "Row(Elementwise())"
    assert text.count(start) == 1

    def outcome():
        command = [sys.executable, "-c", textwrap.dedent(PRIMITIVE)]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )

    assert "AssertionError" in outcome().stderr  # pinned: it has no row yet
    table.write_text(text.replace(start, f'{start}\n    "toy": {row},'))
    assert not (done := outcome()).returncode, done.stderr
