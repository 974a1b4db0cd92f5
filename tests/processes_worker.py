"""What one of several processes runs: ``processes_worker.py CASE FOLDER PORT PROCESSES PROCESS``.

Each has four devices. A case returns or raises; what it asserts is of arrays that no process holds whole.
"""

import os
import sys

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    os.environ["JAX_PLATFORMS"] = "cpu"

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jcompress as jc
from jcompress.numeric import processes

Q, M = jc.quantize, jc.prune.Magnitude
SIZES = {"up": (32, 64), "bias": (64,), "down": (64, 32)}
SPECS = {"up": P("data", "model"), "bias": P("model"), "down": P("model", "data")}


def make_mesh():
    """Axes of which each goes over both processes, where there are two."""
    devices = np.array(jax.devices()).reshape(-1, 4).T.reshape(2, -1)
    return jax.sharding.Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def spread(mesh, x, spec):
    return processes.placed(np.asarray(x), NamedSharding(mesh, spec))


def host_params():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SIZES.items()}


def stored_tree():
    """A tree on one device with whatever a file has to place: codes of odd widths, and all codes of masks."""
    rng = np.random.default_rng(1)
    w, stack = (rng.normal(size=shape).astype(np.float32) for shape in ((48, 40), (3, 16, 24)))
    rows = np.broadcast_to(np.arange(48)[:, None] % 3 == 0, w.shape)
    pairs = np.argsort(np.argsort(rng.random((12, 4, 40)), axis=1), axis=1).reshape(48, 40) < 2
    scale, odd = np.ones((3, 40), np.float32), np.abs(stack) > 1
    kept, thirds = rng.integers(-16, 16, stack.shape, np.int8) * odd, rng.integers(-4, 4, w.shape, np.int8)
    w, stack = jnp.asarray(w), jnp.asarray(stack)
    nest = jc.formats.Quantized(jnp.asarray(kept), stack[:, :1], bits=5)

    def masked(mask, values=w):
        return jc.formats.Masked(jnp.where(mask, values, 0), jnp.asarray(mask))

    return {
        "bits": masked(rng.random(w.shape) < 0.5),
        "gaps": masked(rng.random(w.shape) < 0.03),
        "groups": masked(pairs),
        "rows": masked(rows, w.astype(jnp.bfloat16)),
        "thirds": jc.formats.Quantized(jnp.asarray(thirds), jnp.asarray(scale), bits=3, group_size=16),
        "nest": jc.formats.Masked(nest, jnp.asarray(odd)),
        "whole": stack,
        "flags": stack > 0,
        "narrow": w.astype(jnp.float8_e4m3fn),
        "codes": jnp.asarray(rng.integers(-8, 8, (16, 24)), jnp.int4),
        "complex": jax.lax.complex(w, w[::-1]),
        "keys": jax.random.split(jax.random.key(0), 8),
        "empty": jnp.zeros((0, 8)),
        "host": np.arange(5, dtype=np.float64),
        "epoch": 3,
    }


def spec_of(shape, turn=0):
    """Some axes that two and four parts divide."""
    names = ["data", "model"] if turn % 2 else ["model", "data"]
    sizes = {"data": 2, "model": 4}
    spec = []
    for n in shape:
        fits = next((name for name in names if n and n % sizes[name] == 0), None)
        spec.append(fits)
        names = [name for name in names if name != fits]
    return P(*spec)


def spread_all(mesh, tree):
    """The same tree, its arrays of JAX over all processes in various ways."""
    leaves, structure = jax.tree.flatten(tree)

    def one(i, x):
        if not isinstance(x, jax.Array):
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(spread(mesh, jax.random.key_data(x), P("model")))
        return spread(mesh, x, spec_of(x.shape, i))

    return jax.tree.unflatten(structure, [one(i, x) for i, x in enumerate(leaves)])


def assert_same(found, expected, like=None):
    """What this process holds of ``found`` is what ``expected`` has there, and lies as ``like`` does."""
    leaves = jax.tree.leaves(found), jax.tree.leaves(expected), jax.tree.leaves(found if like is None else like)
    for x, y, z in zip(*leaves, strict=True):
        if not isinstance(x, jax.Array):
            np.testing.assert_array_equal(x, y)
            continue
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y, z = (jax.random.key_data(t) for t in (x, y, z))
        if processes.spans(z):
            assert x.sharding.is_equivalent_to(z.sharding, x.ndim), (x.sharding, z.sharding)
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(y)[shard.index])


def refused(call, *said):
    try:
        call()
    except (ValueError, OSError) as error:
        assert all(text in str(error) for text in said), error
        return
    raise AssertionError(f"nothing was raised, expected {said}")


def storage(folder):
    """Saved together, a tree gives the file of one process; loaded, each process takes its own shards."""
    mesh, alone = make_mesh(), stored_tree()
    tree = spread_all(mesh, alone)
    assert processes.spans(tree["whole"]) and processes.spans(tree["bits"].mask)
    assert jc.nbits(tree) == jc.nbits(alone)
    for coded in (False, True):
        size = jc.save(folder / f"together {coded}", tree, metadata="x", coded=coded)
        assert size == (folder / f"together {coded}").stat().st_size
        assert_same(jc.load(folder / f"together {coded}", like=tree), alone, tree)
    assert_same(jc.load(folder / "together False"), alone)
    placed = jc.load(folder / "together False", sharding=lambda path, x: NamedSharding(mesh, spec_of(x.shape, 1)))
    assert_same(placed, alone)
    assert processes.spans(placed["nest"].values.codes) and processes.spans(placed["gaps"].mask)
    like = jax.ShapeDtypeStruct((48, 40), np.float32, sharding=NamedSharding(mesh, P("data", "model")))
    jc.save(folder / "node", {"w": tree["thirds"]})
    node = jc.load(folder / "node", like={"w": like})["w"]
    assert node.codes.sharding == like.sharding and processes.spans(node.scale)
    assert_same(node, alone["thirds"])
    refuse_storage(folder, mesh, tree)


def names_in(folder):
    """What is there while no process writes."""
    multihost_utils.sync_global_devices("before it is listed")
    found = sorted(x.name for x in folder.iterdir())
    multihost_utils.sync_global_devices("after it was listed")
    return found


def refuse_storage(folder, mesh, tree):
    here, before = jax.process_index(), names_in(folder)
    refused(lambda: jc.save(folder / f"mine {here}", tree), "give all processes one path" if here else "process 1")
    refused(lambda: jc.save(folder / "no" / "folder", tree), "there is no directory")
    codes = np.zeros((48, 40), np.int8)
    codes[-1, -1] = 5  # beyond 3 bits, on one process alone
    wrong = jc.formats.Quantized(spread(mesh, codes, P("data", "model")), spread(mesh, np.ones((1, 40)), P()), bits=3)
    refused(lambda: jc.save(folder / "wrong", {"w": wrong}), "w/codes: found values from 0 to 5")
    rule = NamedSharding(mesh, P(None, None, ("data", "model")))
    refused(lambda: jc.load(folder / "together False", sharding=lambda p, x: rule if p == "gaps" else None), "gaps")
    uneven = jax.ShapeDtypeStruct((3, 16, 24), np.float32, sharding=NamedSharding(mesh, P("data")))
    refused(lambda: jc.load(folder / "together False", like={"whole": uneven}), "whole", "divides")
    assert names_in(folder) == before


def mlp(params, x):
    return jax.nn.relu(x @ params["up"] + params["bias"]) @ params["down"]


METHODS = {
    "magnitude": M(sparsity=0.7, scope="global"),
    "int": Q.Int(bits=4, group_size=8),
    "kmeans": jc.share.KMeans(clusters=4, scope="global", iterations=2),
    "svd": jc.factorize.SVD(rank=4),
    "gptq": Q.GPTQ(bits=4, group_size=8),
    "sparsegpt": jc.prune.SparseGPT(sparsity=0.5),
    "wanda": jc.prune.Wanda(sparsity=0.5),
}


def whole_tree(tree):
    return jax.tree.map(processes.whole, tree)


def verbs(folder):
    """Compression, calibrated or not, and what is read of it, as on one device."""
    mesh, alone = make_mesh(), host_params()
    batch = np.random.default_rng(2).normal(size=(128, 32)).astype(np.float32)
    params = {name: spread(mesh, x, SPECS[name]) for name, x in alone.items()}
    x = spread(mesh, batch, P("data", None))
    for name, method in METHODS.items():
        print(name, flush=True)
        plan = jc.plan(params, [("up|down", method), (".*", None)], layout=jc.trace.layout(mlp, params, x))
        stats = jc.calibrate(mlp, params, [x], plan=plan) if method.needs else None
        small = jc.compress(params, plan, stats=stats)
        dense = jc.materialize(jc.merge(*jc.split(small)))
        for path, w in dense.items():
            assert w.sharding.is_equivalent_to(params[path].sharding, w.ndim), (name, path, w.sharding)
        known = jc.calibrate(mlp, alone, [batch], plan=plan) if method.needs else None
        expected = jc.compress(alone, plan, stats=known)
        for path, w in whole_tree(dense).items():
            assert np.mean(np.abs(w - jc.materialize(expected)[path]) > 1e-3) < 0.01, (name, path)
        assert abs(jc.nbits(small) / jc.nbits(expected) - 1) < 0.01
        assert str(jc.report(params, small).total.size) == str(jc.report(alone, expected).total.size)
        jc.save(folder / name, small)
        assert_same(jc.load(folder / name, like=small), whole_tree(small), small)
    train(params, alone, x, batch)


def train(params, alone, x, batch):
    """Steps of projection and of simulation, as on one device."""
    plan = jc.plan(params, [("up|down", METHODS["magnitude"]), (".*", None)])
    grid = jc.plan(params, [("up|down", METHODS["int"]), (".*", None)])
    tx = optax.chain(optax.adam(1e-2), jc.project(plan, every=2))

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(lambda p: (mlp(jc.simulate(p, grid), x) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    found = []
    for start, data in ((params, x), (alone, batch)):
        state = jax.jit(tx.init)(start)
        for _ in range(2):
            start, state = step(start, state, data)
        found.append(jc.nodes(start, state))
    for a, b in zip(jax.tree.leaves(whole_tree(found[0])), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=2e-3)
    for name in ("up", "down"):
        assert found[0][name].mask.sharding.is_equivalent_to(params[name].sharding, 2)


def checkpoints(folder):
    """A state that two processes share, and one of another plan."""
    mesh, alone = make_mesh(), host_params()
    params = {name: spread(mesh, x, SPECS[name]) for name, x in alone.items()}
    plan = jc.plan(params, [("up|down", M(sparsity=0.7)), (".*", None)])
    state = {"params": params, "node": jc.formats.Masked(params["up"], params["up"] > 0)}
    with jc.io.Checkpoints(folder / "steps", plan=plan) as steps:
        steps.save(1, state)
        assert_same(steps.restore(jax.tree.map(jnp.zeros_like, state)), whole_tree(state), state)
    other = jc.plan(params, [("up|down", Q.Int(bits=4)), (".*", None)])
    with jc.io.Checkpoints(folder / "steps", plan=other) as steps:
        refused(lambda: steps.restore(state), "down: found Magnitude", "in the plan")


def on_hosts(folder):
    """Methods that compute on the host refuse what no process holds whole, and take what all do."""
    mesh, alone = make_mesh(), host_params()
    params = {name: spread(mesh, x, SPECS[name]) for name, x in alone.items()}
    for method in (jc.factorize.TernarySVD(tolerance=0.5), jc.factorize.LCC(stages=1)):
        plan = jc.plan(params, [("up", method), (".*", None)])
        refused(lambda plan=plan: jc.compress(params, plan), f"up: {type(method).__name__}", "computes on the host")
        whole = {name: spread(mesh, x, P()) for name, x in alone.items()}
        assert_same(jc.compress(whole, plan), jc.compress(alone, plan))


CASES = {
    "on_hosts": on_hosts,
    "storage": storage,
    "checkpoints": checkpoints,
    "verbs": verbs,
}


def main(case, folder, port, count, number):
    jax.config.update("jax_compilation_cache_dir", None)
    jax.distributed.initialize(f"localhost:{port}", int(count), int(number), initialization_timeout=60)
    CASES[case](pathlib.Path(folder))
    print("passed")


if __name__ == "__main__":
    main(*sys.argv[1:])
