import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jcompress as jc
from jcompress.io import Checkpoints, StorageError

WORKER = pathlib.Path(__file__).with_name("checkpoint_worker.py")


def run(what, folder, devices):
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, str(WORKER), what, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True):
        where = jax.tree_util.keystr(path)
        assert type(x) is type(y), where
        if hasattr(x, "dtype"):
            assert (x.dtype, x.shape) == (y.dtype, y.shape), where
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                x, y = jax.random.key_data(x), jax.random.key_data(y)
            x, y = (np.ascontiguousarray(np.asarray(z)).reshape(-1).view(np.uint8) for z in (x, y))
        np.testing.assert_array_equal(x, y, err_msg=where)


class State(NamedTuple):
    params: dict
    opt: tuple
    step: jax.Array
    key: jax.Array


def training(every):
    """A regression on random data, pruned along a ramp; each step draws its batch from the key."""
    params = {"a": {"kernel": jax.random.normal(jax.random.key(1), (8, 16)), "bias": jnp.zeros(16)}}
    params["b"] = {"kernel": jax.random.normal(jax.random.key(2), (16, 2))}
    ramp = optax.polynomial_schedule(0.0, 0.9, power=3, transition_steps=20)
    plan = jc.plan(params, [(".*/kernel", jc.prune.Magnitude(sparsity=ramp)), (".*", None)])
    tx = optax.chain(optax.adamw(1e-2), jc.project(plan, every=every, key=jax.random.key(3)))

    def loss(params, x):
        hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])
        return jnp.mean((hidden @ params["b"]["kernel"] - x[:, :2]) ** 2)

    @jax.jit
    def step(state):
        key, batch = jax.random.split(state.key)
        grads = jax.grad(loss)(state.params, jax.random.normal(batch, (32, 8)))
        updates, opt = tx.update(grads, state.opt, state.params)
        return State(optax.apply_updates(state.params, updates), opt, state.step + 1, key)

    def fresh(seed):
        moved = jax.tree.map(lambda w: w + seed, params)
        return State(moved, tx.init(moved), jnp.int32(0), jax.random.key(10 + seed))

    return plan, fresh, step


def test_training_goes_on_bit_for_bit_from_the_middle_of_the_ramp(tmp_path):
    plan, fresh, step = training(every=5)
    state = fresh(0)
    with Checkpoints(tmp_path, plan) as checkpoints:
        for i in range(24):
            if i == 13:  # neither a refit nor the end of the ramp
                checkpoints.save(i, state)
            state = step(state)
    assert np.mean(np.asarray(state.params["a"]["kernel"]) == 0) > 0.8
    with Checkpoints(tmp_path, plan) as checkpoints:
        again = checkpoints.restore(fresh(1))
    assert int(again.step) == checkpoints.latest_step() == 13
    for _ in range(11):
        again = step(again)
    assert_same(again, state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight")
    result = run("save", folder, 8)
    assert result.stdout == "8 ok\n", result.stderr
    return folder


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_restoring_on_another_device_count(saved, devices):
    result = run("restore", saved, devices)
    assert result.stdout == f"{devices} ok\n", result.stderr


def test_from_one_device_to_eight(tmp_path):
    result = run("save", tmp_path, 1)
    assert result.stdout == "1 ok\n", result.stderr
    result = run("restore", tmp_path, 8)
    assert result.stdout == "8 ok\n", result.stderr


def test_a_kill_while_saving_leaves_the_step_before(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    assert run("killed", folder, 8).returncode == -signal.SIGKILL
    assert any("2" in path.name for path in folder.iterdir()), "the save of step 2 had begun"
    result = run("restore", folder, 8)
    assert result.stdout == "8 ok\n", result.stderr


DTYPES = [
    *("bool", "int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32"),
    *("float4_e2m1fn", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "bfloat16", "float16", "float32"),
    "complex64",
]


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)

    def array(name):
        dtype = jnp.dtype(name)
        values = rng.integers(0, 256, 24 * dtype.itemsize, np.uint8)
        narrow = min(jc.core.dtype_bits(dtype), 8)
        return (values & ((1 << narrow) - 1)).view(dtype).reshape(8, 3)

    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    host = {name: array(name) for name in [*DTYPES, "float64", "int64"]}
    state = {
        "host": host,
        "device": {name: jnp.asarray(host[name]) for name in DTYPES},
        "spread": {name: jax.device_put(host[name], rows) for name in DTYPES},
    }
    fresh = jax.tree.map(
        lambda x: jnp.zeros_like(x, device=x.sharding) if isinstance(x, jax.Array) else np.zeros_like(x), state
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        again = checkpoints.restore(fresh)
    assert_same(again, state)
    assert all(x.sharding == rows for x in jax.tree.leaves(again["spread"]))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_scalars_empty_arrays_and_nodes(tmp_path, impl):
    def state(seed):
        key = jax.random.key(seed, impl=impl)
        w = jax.random.normal(jax.random.key(seed), (8, 4))
        return {
            "key": key,
            "keys": jax.random.split(key, 3),
            "numbers": [seed, seed / 3, bool(seed), None, ()],
            "empty": jnp.zeros((0, 3)),
            "small": jc.chain(jc.prune.Magnitude(pattern=jc.prune.NM(2, 4)), jc.quantize.Int(bits=4))(w),
            "nnx": nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(seed))),
        }

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state(1))
        assert_same(checkpoints.restore(state(0)), state(1))
        assert_same(checkpoints.restore(jax.eval_shape(lambda: state(0)) | {"numbers": state(0)["numbers"]}), state(1))


@pytest.mark.parametrize("state", [3, {"step": 1}, {}, {"x": jnp.zeros((0,))}, jnp.ones(2)], ids=str)
def test_the_smallest_states(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        assert_same(checkpoints.restore(state), state)


def small(bits=4):
    return jc.quantize.Int(bits=bits)(jnp.arange(32.0).reshape(8, 4))


STATE = {"params": {"w": jnp.full(3, 300.0), "n": small()}, "key": jax.random.key(0), "step": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": {"w": jnp.zeros(3, jnp.int8), "n": small()}}, r"params/w: found float32\[3\], expected int8\[3\]"),
        (
            {"params": {"w": jnp.zeros(4), "n": small()}},
            r"params/w: found float32\[3\], expected float32\[4\]",
        ),
        ({"params": {"w": jnp.zeros(3)}}, "wrong structure: stored but not expected .*params/n/codes"),
        ({"more": jnp.zeros(3)}, r"expected but not stored \['more'\]"),
        ({"params": {"w": jnp.zeros(3), "n": small(bits=3)}}, "params/n: found .*'bits': 4.*, expected .*'bits': 3"),
        (
            {"params": {"w": jnp.zeros(3), "n": dataclasses.replace(small(), dtype=np.dtype("float16"))}},
            "params/n: found .*, expected .*float16",
        ),
        ({"key": jax.random.key(0, impl="rbg")}, r"key: found key<fry>\[\], expected key<rbg>\[\]"),
        ({"key": jax.random.key_data(jax.random.key(0))}, r"key: found key<fry>\[\], expected uint32\[2\]"),
        ({"step": 1.0}, "step: found int, expected float"),
    ],
)
def test_a_state_that_differs_is_refused_before_anything_is_cast(tmp_path, change, message):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, STATE)
        with pytest.raises(StorageError, match=message):
            checkpoints.restore({**STATE, **change})
        assert_same(checkpoints.restore(STATE), STATE)


def test_another_plan_is_refused(tmp_path):
    params = {"w": jnp.ones((8, 4)), "b": jnp.ones(3)}
    plan = jc.plan(params, [("w", jc.prune.Magnitude(sparsity=0.5))])
    with Checkpoints(tmp_path, plan) as checkpoints:
        checkpoints.save(0, params)
    other = jc.plan(params, [("w", jc.prune.Magnitude(sparsity=0.6))])
    with (
        Checkpoints(tmp_path, other) as checkpoints,
        pytest.raises(StorageError, match=r"w: found Magnitude\(sparsity=0.5\) in the plan, expected Magnitude\(.*0.6"),
    ):
        checkpoints.restore(params)
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(params), params)


def test_steps(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(StorageError, match=r"found the steps \[\], expected a checkpoint; save one first"):
            checkpoints.restore({"x": jnp.zeros(1)})
        for step in (1, 2, 3):
            assert checkpoints.save(step, {"x": jnp.full(1, step)})
        assert checkpoints.restore({"x": jnp.zeros(1, int)}, step=2)["x"].tolist() == [2]
        assert checkpoints.restore({"x": jnp.zeros(1, int)})["x"].tolist() == [3]
        assert checkpoints.all_steps() == [2, 3]
        with pytest.raises(StorageError, match=r"found the steps \[2, 3\], expected step 1"):
            checkpoints.restore({"x": jnp.zeros(1, int)}, step=1)


def test_a_state_that_cannot_be_saved_leaves_the_step_before(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(1)})
        with pytest.raises(StorageError, match="x/y: found object, expected an array or a Python scalar"):
            checkpoints.save(2, {"x": {"y": object()}})
        with pytest.raises(StorageError, match="x/y: found two leaves of this path"):
            checkpoints.save(2, {"x": {"y": jnp.ones(1)}, "x/y": jnp.ones(1)})
        assert checkpoints.latest_step() == 1
        assert checkpoints.restore({"x": jnp.zeros(1)})["x"].tolist() == [1.0]


def test_the_state_may_be_donated_at_once(tmp_path):
    state = {"x": jnp.arange(1000.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        jax.jit(lambda s: {"x": s["x"] * 0}, donate_argnums=0)(state)
        assert checkpoints.restore({"x": jnp.zeros(1000)})["x"].tolist() == list(range(1000))


def test_a_checkpoint_of_another_library_is_refused(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave({"x": jnp.ones(1)}))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(StorageError, match="no manifest of jcompress"):
        checkpoints.restore({"x": jnp.zeros(1)})


def ramp(params, schedule):
    return jc.plan(params, [("w", jc.chain(jc.prune.Magnitude(sparsity=schedule), jc.quantize.Int(bits=4)))])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            optax.linear_schedule(0.0, 0.9, 10),
            r"w: found .*sparsity = 0\.05 at step 1 in the plan, expected 0\.09",
        ),
        (optax.linear_schedule(0.0, 0.5, 1000), "at step 1 in the plan"),
        (optax.linear_schedule(0.0, 0.5, 10, transition_begin=5), "at step 1 in the plan"),
        (optax.polynomial_schedule(0.0, 0.5, 3, 10), "at step 1 in the plan"),
        (optax.join_schedules([optax.linear_schedule(0.0, 0.5, 10), lambda step: 0.9], [2000]), "at step 2584"),
        (0.5, "w: found chain.*<schedule>.* in the plan, expected chain.*0.5"),
    ],
)
def test_another_ramp_is_refused(tmp_path, other, message):
    params = {"w": jnp.ones((8, 4)), "b": jnp.ones(3)}
    with Checkpoints(tmp_path, ramp(params, optax.linear_schedule(0.0, 0.5, 10))) as checkpoints:
        checkpoints.save(0, params)
    with Checkpoints(tmp_path, ramp(params, other)) as checkpoints, pytest.raises(StorageError, match=message):
        checkpoints.restore(params)
    with Checkpoints(tmp_path, ramp(params, optax.linear_schedule(0.0, 0.5, 10))) as checkpoints:
        assert_same(checkpoints.restore(params), params)


@dataclasses.dataclass(frozen=True)
class Weighted(jc.prune.Magnitude):
    weights: object = None
    rank_by: object = None


def test_arrays_and_functions_of_plans_are_told_apart(tmp_path):
    params = {"w": jnp.ones((8, 4))}

    def plan(weights, rank_by=jnp.abs):
        return {"w": Weighted(sparsity=0.5, weights=weights, rank_by=rank_by)}

    with Checkpoints(tmp_path, plan(np.arange(2000.0))) as checkpoints:
        checkpoints.save(0, params)
    with Checkpoints(tmp_path, plan(np.arange(2000.0))) as checkpoints:
        checkpoints.restore(params)
    changed = plan(np.arange(2000.0) + (np.arange(2000) == 1000))
    for other, message in ((changed, "weights = float64"), (plan(np.arange(2000.0), jnp.square), "rank_by")):
        with Checkpoints(tmp_path, other) as checkpoints, pytest.raises(StorageError, match=f"w: found {message}"):
            checkpoints.restore(params)


def test_other_byte_orders_scalars_of_numpy_and_many_leaves(tmp_path):
    state = {f"x{i}": np.float64(i + 1e-12) for i in range(100)}
    state |= {"big": np.arange(3, dtype=">i4"), "one": np.int64(2**40), "wide": np.array(1e-300), "a.b": np.ones(1)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        again = checkpoints.restore({**state, "big": np.zeros(3, ">i4")})
        assert_same(again, {**state, "big": np.arange(3, dtype=np.int32)})


@pytest.mark.parametrize("x", [np.ones(2, np.longdouble), np.array(["x"]), np.ma.array([1.0], mask=[1])])
def test_arrays_that_cannot_be_saved_are_named(tmp_path, x):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(StorageError, match="a/x: found "):
        checkpoints.save(0, {"a": {"x": x}})


def test_a_deep_state_is_saved_or_refused_in_a_sentence(tmp_path):
    state = {"x": jnp.ones(1)}
    for _ in range(5000):
        state = {"a": state}
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(StorageError, match="expected at most 256"):
        checkpoints.save(0, state)


def test_damage_and_a_file_for_a_directory_are_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="found a file, expected a directory"):
        Checkpoints(tmp_path / "file")
    folder = tmp_path / "folder"
    for what, damage in {"manifest": "{}", "state": ""}.items():
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(0, {"x": jnp.arange(1000.0)}, force=True)
        for path in (folder / "0" / what).rglob("*"):
            if path.is_file() and (what == "state" or path.name == "metadata"):
                path.write_text(damage)
        with Checkpoints(folder) as checkpoints, pytest.raises(StorageError, match=r"step 0 .*damaged"):
            checkpoints.restore({"x": jnp.zeros(1000)})
        shutil.rmtree(folder)
