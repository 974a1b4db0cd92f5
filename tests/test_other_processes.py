"""From training to a process that knows the file alone: saved here, loaded and run in a fresh interpreter."""

import dataclasses
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export

import jcompress as jc

RULES = [(".*/kernel", jc.quantize.Int(bits=4)), (".*", None)]
X = jax.random.normal(jax.random.key(0), (4, 8))

LOADER = """
import os, sys, json, jax, jax.numpy as jnp, numpy as np, jcompress as jc
folder, test_folder = sys.argv[1:]
sys.path.insert(0, test_folder)
import test_other_processes as t
from flax import nnx
found = {}
for name, make in t.NETWORKS.items():
    model = make(nnx.Rngs(7))
    state = nnx.state(model, nnx.Param)
    for way in ({}, {"like": state}):
        nnx.update(model, jc.materialize(jc.load(os.path.join(folder, name), **way)))
        found[f"{name} {sorted(way)}"] = t.run(model)
boxed = t.linen_params(jax.random.key(9))
for way in ({}, {"like": boxed}):
    dense = jc.materialize(jc.load(os.path.join(folder, "linen"), **way))
    found[f"linen {sorted(way)}"] = t.linen.apply({"params": dense}, t.X)
for name, fn in t.FUNCTIONS.items():
    tree = jc.load(os.path.join(folder, name))
    found[name] = jax.jit(fn)(jc.materialize(tree), t.X)
    found[f"{name} executed"] = jc.accelerate(fn)(tree, t.X)
np.savez(os.path.join(folder, "found.npz"), **found)
"""


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(11)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


class Nested(nnx.Module):
    """Lists in lists and in dictionaries, a sequence, and a stack inside a stack."""

    def __init__(self, rngs):
        rows = [nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(n)]) for n in (1, 2)]
        self.rows, self.named = nnx.List(rows), nnx.Dict({"up": nnx.List([nnx.Linear(8, 8, rngs=rngs)])})
        self.sequence, self.stack = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.tanh), Stack(rngs)

    def __call__(self, x):
        for layer in [layer for row in self.rows for layer in row] + [self.named["up"][0]]:
            x = nnx.tanh(layer(x))
        return self.stack(self.sequence(x))


NETWORKS = {"stack": Stack, "nested": Nested}


@nnx.jit
def run(model):
    return model(X)


class Linen(nn.Module):
    """Parameters in boxes: logical axes, mesh axes, and one that is in none."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        x = nn.Dense(8, kernel_init=nn.with_logical_partitioning(init, ("embed", "mlp")))(x)
        x = nn.Dense(8, kernel_init=nn.with_partitioning(init, (None, "model")))(nn.relu(x))
        return nn.Dense(3)(x)


linen = Linen()


def linen_params(key):
    return linen.init(key, X)["params"]


def product(params, x):
    return x @ params["w"].astype(jnp.promote_types(x.dtype, jnp.result_type(params["w"])))


def fourier(params, x):
    """A layer in frequencies, with one complex kernel for each."""
    modes = jnp.fft.rfft(x, axis=0)
    return jnp.fft.irfft(jnp.einsum("mi,mio->mo", modes, params["w"]), n=len(x), axis=0)


W = jax.random.normal(jax.random.key(5), (8, 6))
COMPLEX = jax.lax.complex(*jax.random.normal(jax.random.key(6), (2, 3, 8, 6)))
KINDS = {
    "int16": (W, jc.quantize.GPTQ(bits=16, symmetric=False)),
    "int9": (W, jc.quantize.Int(bits=9, group_size=4)),
    "float8 blocks": (W, jc.quantize.Float8("e4m3", block=(5, 4))),
    "float8 checkpoint": (W.astype(jnp.float8_e4m3fn), jc.factorize.SVD(rank=3)),
    "complex": (COMPLEX, jc.stacked(jc.chain(jc.factorize.SVD(rank=4), jc.cartesian(jc.quantize.Int(bits=12))))),
    "complex sparse": (COMPLEX, jc.prune.Magnitude(sparsity=0.5)),
}
FUNCTIONS = {name: fourier if "complex" in name else product for name in KINDS}


def compressed(params):
    return jc.compress(params, jc.plan(params, RULES))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """What a fresh process computes from the files, and what this one does."""
    folder, wanted = tmp_path_factory.mktemp("files"), {}
    for name, make in NETWORKS.items():
        model = make(nnx.Rngs(0))
        small = compressed(nnx.state(model, nnx.Param))
        jc.save(folder / name, small)
        nnx.update(model, jc.materialize(small))
        wanted[name] = run(model)
    small = compressed(linen_params(jax.random.key(1)))
    jc.save(folder / "linen", small)
    wanted["linen"] = linen.apply({"params": jc.materialize(small)}, X)
    for name, (w, method) in KINDS.items():
        params = {"w": w}
        stats = {"w": jc.trace.Stats(gram=X.T @ X, axes=(-2,))} if "gram" in str(jc.core.needs(method)) else None
        small = jc.compress(params, jc.plan(params, [("w", method)]), stats=stats)
        jc.save(folder / name, small)
        wanted[name] = jax.jit(FUNCTIONS[name])(jc.materialize(small), X)
    here = os.path.dirname(__file__)
    subprocess.run([sys.executable, "-c", LOADER, str(folder), here], check=True)
    return wanted, np.load(folder / "found.npz")


@pytest.mark.parametrize("name", [*NETWORKS, "linen"])
@pytest.mark.parametrize("way", ["[]", "['like']"])
def test_a_network_runs_in_a_fresh_process(elsewhere, name, way):
    wanted, found = elsewhere
    np.testing.assert_array_equal(found[f"{name} {way}"], wanted[name])


@pytest.mark.parametrize("name", KINDS)
def test_arrays_of_every_kind_run_in_a_fresh_process(elsewhere, name):
    wanted, found = elsewhere
    np.testing.assert_array_equal(found[name], wanted[name])
    tolerance = 0.05 if "float8 checkpoint" in name else 1e-4
    np.testing.assert_allclose(found[f"{name} executed"], wanted[name], atol=tolerance)


def test_keys_of_lists_come_back_as_integers(tmp_path):
    state = nnx.state(Nested(nnx.Rngs(0)), nnx.Param)
    jc.save(tmp_path / "x", state)
    tree = jc.load(tmp_path / "x")
    assert list(tree["stack"]["layers"]) == list(range(11)) and set(tree["rows"][1]) == {0, 1}
    assert jax.tree.structure(tree) == jax.tree.structure(nnx.to_pure_dict(state))
    assert [path for path, _ in jc.paths(tree)] == [path for path, _ in jc.paths(state)]


def test_rules_and_readings_do_not_see_boxes(tmp_path):
    params = linen_params(jax.random.key(1))
    plain = nn.unbox(params)
    assert [path for path, _ in jc.paths(params)] == [path for path, _ in jc.paths(plain)]
    small = compressed(params)
    assert isinstance(small["Dense_0"]["kernel"], nn.LogicallyPartitioned)
    assert small["Dense_0"]["kernel"].names == ("embed", "mlp")
    assert str(jc.report(params, small)) == str(jc.report(plain, compressed(plain)))
    assert jc.save(tmp_path / "boxed", small) == jc.save(tmp_path / "plain", compressed(plain))
    assert jax.tree.structure(jc.load(tmp_path / "boxed")) == jax.tree.structure(compressed(plain))
    again = jc.load(tmp_path / "boxed", like=jax.eval_shape(lambda: small))
    assert jax.tree.structure(again) == jax.tree.structure(small)


def test_boxed_parameters_train_on_the_set_and_are_calibrated():
    params = linen_params(jax.random.key(1))
    plan = jc.plan(params, [(".*_[01]/kernel", jc.prune.Magnitude(sparsity=0.75)), (".*", None)])
    tx = optax.chain(optax.adam(0.1), jc.project(plan))
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    params = optax.apply_updates(params, updates)
    assert float((params["Dense_1"]["kernel"].value == 0).mean()) == 0.75
    assert isinstance(jc.nodes(params, state)["Dense_1"]["kernel"].value, jc.formats.Masked)
    stats = jc.calibrate(lambda p, x: linen.apply({"params": p}, x), params, [X])
    np.testing.assert_allclose(stats["Dense_0/kernel"].gram, X.T @ X, rtol=1e-4, atol=1e-4)
    groups = jc.trace.coupling(lambda p, x: linen.apply({"params": p}, x), params, X)
    assert groups["Dense_0/kernel[1]"].members[-1] == ("Dense_1/kernel", 0)


EXPORTED = {
    "int4": jc.quantize.Int(bits=4, group_size=4),
    "sparse": jc.chain(jc.prune.Magnitude(pattern=jc.prune.NM(2, 4)), jc.quantize.NF4(group_size=8)),
    "low rank": jc.residual(jc.quantize.Float8(), jc.factorize.SVD(rank=2)),
    "codebook": jc.share.KMeans(clusters=4),
}

CALLER = """
import sys, numpy as np, jax, jcompress as jc
from jax import export
folder = sys.argv[1]
again = export.deserialize(open(folder + "/function", "rb").read())
tree = jc.load(folder + "/tree")
np.save(folder + "/found.npy", again.call(tree, jax.numpy.ones((3, 8)))["y"])
"""


def test_an_exported_function_of_nodes_runs_in_a_fresh_process(tmp_path):
    pytest.importorskip("flatbuffers")
    params = {name: jax.random.normal(jax.random.key(i), (8, 8)) for i, name in enumerate(EXPORTED)}
    small = jc.compress(params, jc.plan(params, list(EXPORTED.items())))

    @jax.jit
    def fn(tree, x):
        for w in jax.tree.leaves(jc.materialize(tree)):
            x = jnp.tanh(x @ w)
        return {"y": x, "nodes": tree}

    x = jnp.ones((3, 8))
    rows = export.symbolic_shape("rows, 8")
    abstract = jax.ShapeDtypeStruct(rows, jnp.float32)
    (tmp_path / "function").write_bytes(export.export(fn)(small, abstract).serialize())
    jc.save(tmp_path / "tree", small)
    subprocess.run([sys.executable, "-c", CALLER, str(tmp_path)], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), fn(small, x)["y"], rtol=1e-5, atol=1e-6)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Doubled(jc.Compressed):
    half: jax.Array
    times: int = dataclasses.field(default=2, metadata={"static": True})

    def materialize(self, *, key=None):
        return self.times * self.half


def test_a_format_of_your_own_is_named_once():
    pytest.importorskip("flatbuffers")
    exported = export.export(jax.jit(lambda node: node.materialize()))(Doubled(jnp.ones(3), times=5))
    with pytest.raises(ValueError, match="unregistered type"):
        exported.serialize()
    jc.io.register_export(Doubled)
    jc.io.register_export(Doubled, jc.formats.Masked)
    again = export.deserialize(exported.serialize())
    assert again.call(Doubled(jnp.ones(3), times=5)).tolist() == [5, 5, 5]
    with pytest.raises(ValueError, match="expected a format"):
        jc.io.register_export(dict)
