"""From file to file, array by array: the same file as in memory, in bounded memory, and again after an interruption."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from jcompress.io import StorageError, Tensors, read_tensors, write_gguf, write_safetensors

RNG = np.random.default_rng(0)
MODEL = {
    "a/b/kernel": RNG.normal(size=(33, 7)).astype(np.float32),
    "a/b/bias": RNG.normal(size=(7,)).astype(np.float32),
    "a/ids": np.arange(5, dtype=np.int64),
    "c/kernel": RNG.normal(size=(7, 5)).astype(np.float32),
    "c/mask": RNG.random((3, 3)) > 0.5,
    "half": jnp.asarray(RNG.normal(size=(3, 3)), jnp.bfloat16),
    "none": np.zeros((0, 3), np.float32),
}
METHODS = {
    "int3": jc.quantize.Int(bits=3),
    "masks": jc.chain(jc.prune.Magnitude(sparsity=0.7), jc.quantize.Int(bits=3, symmetric=False)),
    "global": jc.prune.Magnitude(sparsity=0.8, scope="global"),
    "random": jc.quantize.Stochastic(jc.quantize.Int(bits=4)),
    "factors": jc.factorize.SVD(rank=2),
}


@pytest.fixture
def source(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", MODEL)
    return read_tensors(tmp_path / "model.safetensors")


def in_memory(source, plan, path, coded=False, **options):
    tree = jax.tree.map(lambda x: x, source.tree)
    for name in source:
        *above, last = name.split("/")
        at = tree
        for key in above:
            at = at[key]
        at[last] = source[name]
    return jc.save(path, jc.compress(tree, plan, **options), plan=plan, metadata="m", coded=coded)


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_file_is_that_of_the_whole_model(source, tmp_path, name, coded):
    if coded:
        pytest.importorskip("constriction")
    plan = jc.plan(source.tree, [(".*/kernel", METHODS[name])])
    key = jax.random.key(3)
    size = jc.compress_file(source, plan, tmp_path / "a", key=key, metadata="m", coded=coded)
    in_memory(source, plan, tmp_path / "b", coded, key=key)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert size == os.path.getsize(tmp_path / "a")
    assert not os.path.exists(tmp_path / "a.parts")
    found = jc.load(tmp_path / "a")
    assert np.asarray(found["a"]["ids"]).dtype == np.int64
    assert dict(jc.paths(found)).keys() == MODEL.keys()


def test_it_goes_on_where_it_was_stopped(source, tmp_path):
    plan = jc.plan(source.tree, [(".*/kernel", METHODS["int3"])])
    seen = []

    def stop(name, done, total):
        seen.append((name, done, total))
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jc.compress_file(source, plan, tmp_path / "a", metadata="m", progress=stop)
    assert not os.path.exists(tmp_path / "a")
    read = []
    counted = Tensors(
        source.shapes,
        lambda *where: read.append(where[0]) or source.rows(*where),
        kinds=source.kinds,
        stamp=source.stamp,
    )
    jc.compress_file(counted, plan, tmp_path / "a", metadata="m")
    assert len(read) == len(MODEL) - 4
    assert [done for _, done, _ in seen] == [1, 2, 3, 4]
    in_memory(source, plan, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("what", ["plan", "source", "coded"])
def test_parts_of_another_job_are_refused(source, tmp_path, what):
    plan = jc.plan(source.tree, [(".*/kernel", METHODS["int3"])])

    def stop(name, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jc.compress_file(source, plan, tmp_path / "a", progress=stop)
    options = {}
    if what == "plan":
        plan = jc.plan(source.tree, [(".*/kernel", jc.quantize.Int(bits=4))])
    elif what == "source":
        write_safetensors(tmp_path / "model.safetensors", MODEL | {"half": MODEL["half"] + 1})
        source = read_tensors(tmp_path / "model.safetensors")
    else:
        options = {"coded": True}
    with pytest.raises(StorageError, match=r"a\.parts: holds parts of another job, of other (plan|stamp|coded)"):
        jc.compress_file(source, plan, tmp_path / "a", **options)


def test_two_processes_do_not_share_a_folder(source, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    plan = jc.plan(source.tree, [(".*/kernel", METHODS["int3"])])
    os.makedirs(tmp_path / "a.parts")
    with open(tmp_path / "a.parts" / "lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="another process works here"):
            jc.compress_file(source, plan, tmp_path / "a")


def test_memory_holds_a_few_arrays(tmp_path):
    rows = RNG.normal(size=(512, 512)).astype(np.float32)
    shapes = {f"w{i}": jax.ShapeDtypeStruct(rows.shape, rows.dtype) for i in range(24)}
    write_safetensors(tmp_path / "m", Tensors(shapes, lambda name, start, stop: rows[start:stop]))
    source = read_tensors(tmp_path / "m")
    plan = jc.plan(source.tree, [(".*", jc.quantize.Int(bits=8))])
    tracemalloc.start()
    jc.compress_file(source, plan, tmp_path / "a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * rows.nbytes
    assert len(jc.load(tmp_path / "a")) == 24


BOUNDED = """
import pathlib, sys
import numpy as np
import jcompress as jc

folder, method = pathlib.Path(sys.argv[1]), {"int": jc.quantize.Int(bits=8), "mask": jc.prune.Magnitude(sparsity=0.7)}


def status(name):
    return next(int(x.split()[1]) << 10 for x in open("/proc/self/status") if x.startswith(name))


source = jc.io.read_tensors(folder / "one")
plan = jc.plan(source.tree, [(".*", method[sys.argv[2]])])
jc.compress_file(source, plan, folder / "warm")  # compiled
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = status("VmRSS")
source = jc.io.read_tensors(folder / "many")
jc.compress_file(source, jc.plan(source.tree, [(".*", method[sys.argv[2]])]), folder / "small")
print((status("VmHWM") - before) / source.sizes["w0"])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peaks are read from Linux")
@pytest.mark.parametrize("method", ["int", "mask"])
def test_the_process_takes_a_few_arrays(tmp_path, method):
    rows = RNG.normal(size=(2048, 2048)).astype(np.float32)
    for name, count in (("one", 1), ("many", 8)):
        shapes = {f"w{i}": jax.ShapeDtypeStruct(rows.shape, rows.dtype) for i in range(count)}
        write_safetensors(tmp_path / name, Tensors(shapes, lambda name, start, stop: rows[start:stop]))
    command = [sys.executable, "-c", BOUNDED, str(tmp_path), method]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed is given back at once
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert float(found.stdout) <= 3.5


KILLED = """
import os, signal, sys, jcompress as jc
source = jc.io.read_tensors(sys.argv[1])
plan = jc.plan(source.tree, [(".*/kernel", jc.quantize.Int(bits=3))])
kill = lambda name, done, total: done == 3 and os.kill(os.getpid(), signal.SIGKILL)
jc.compress_file(source, plan, sys.argv[2], metadata="m", progress=kill)
"""


def test_it_goes_on_after_it_was_killed(source, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "model.safetensors"), str(tmp_path / "a")]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    done = [name for name in os.listdir(tmp_path / "a.parts") if name.endswith(".jc")]
    assert len(done) == 3 and not os.path.exists(tmp_path / "a")
    plan = jc.plan(source.tree, [(".*/kernel", METHODS["int3"])])
    jc.compress_file(source, plan, tmp_path / "a", metadata="m")
    in_memory(source, plan, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def calibrated(tmp_path):
    """A model of two layers, stacked and not, a plan that needs Gram matrices, and its statistics."""
    params = {"w": RNG.normal(size=(3, 8, 8)).astype(np.float32), "out": RNG.normal(size=(8, 4)).astype(np.float32)}
    write_safetensors(tmp_path / "model.safetensors", params)

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0] @ p["out"]

    plan = jc.plan(params, [(".*", jc.quantize.GPTQ(bits=4))])
    return params, plan, jc.calibrate(fn, params, [RNG.normal(size=(32, 8)).astype(np.float32)])


def test_stored_statistics_serve_from_file_to_file(tmp_path):
    params, plan, stats = calibrated(tmp_path)
    jc.save_stats(tmp_path / "stats", stats)
    again = jc.load_stats(tmp_path / "stats")
    assert list(again) == list(stats) and again.levels == stats.levels
    for path in stats:
        assert jax.tree.structure(again[path]) == jax.tree.structure(stats[path])
        for a, b in zip(jax.tree.leaves(again[path]), jax.tree.leaves(stats[path]), strict=True):
            np.testing.assert_array_equal(a, b)
    source = read_tensors(tmp_path / "model.safetensors")
    jc.compress_file(source, plan, tmp_path / "a", stats=again)
    jc.save(tmp_path / "b", jc.compress(params, plan, stats=stats), plan=plan)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_statistics_that_are_none(tmp_path):
    params, plan, stats = calibrated(tmp_path)
    with pytest.raises(StorageError, match="no such file"):
        jc.load_stats(tmp_path / "stats")
    jc.save_stats(tmp_path / "stats", stats)
    again = jc.load_stats(tmp_path / "stats")
    os.truncate(tmp_path / "stats" / "0.jc", 100)
    with pytest.raises(StorageError, match=r"0\.jc"):
        jc.compress(params, plan, stats=again)
    jc.save(tmp_path / "stats" / "0.jc", {"gram": np.ones(2), "other": 3})
    with pytest.raises(StorageError, match="other fields than those of Stats"):
        again[next(iter(stats))]
    jc.save(tmp_path / "stats" / "index.jc", {"w": np.ones(2)})
    with pytest.raises(StorageError, match="no statistics"):
        jc.load_stats(tmp_path / "stats")


FULL = """
import resource, sys, jax, jcompress as jc
source = jc.io.read_tensors(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    jc.compress_file(source, jc.plan(source.tree, [(".*", jc.quantize.Int(bits=8))]), sys.argv[2])
except jc.io.StorageError as error:
    print(error, isinstance(error, OSError))
"""


def test_a_full_disk_leaves_no_file(tmp_path):
    write_safetensors(tmp_path / "m", {f"w{i}": RNG.normal(size=(100, 100)).astype(np.float32) for i in range(4)})
    code = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + FULL
    command = [sys.executable, "-c", code, str(tmp_path / "m"), str(tmp_path / "a")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "writing failed: File too large True" in found.stdout
    assert not os.path.exists(tmp_path / "a")
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    with contextlib.suppress(FileNotFoundError):
        assert not [name for name in os.listdir(tmp_path / "a.parts") if name.endswith(".tmp")]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    jc.compress_file(
        source := read_tensors(tmp_path / "m"),
        jc.plan(source.tree, [(".*", jc.quantize.Int(bits=8))]),
        tmp_path / "a",
    )
    assert len(jc.load(tmp_path / "a")) == 4


def test_readers_are_told_apart_by_what_files_hold(tmp_path):
    arrays = {"a/w": RNG.normal(size=(4, 3)).astype(np.float32), "b": np.arange(3, dtype=np.int32)}
    tree = {"a": {"w": arrays["a/w"]}, "b": arrays["b"]}
    write_safetensors(tmp_path / "1", arrays)
    write_gguf(tmp_path / "2", arrays)
    jc.save(tmp_path / "3", tree)
    with jc.io.Checkpoints(tmp_path / "4") as checkpoints:
        checkpoints.save(1, tree)
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "5", {**tree, "list": [np.ones(2, np.float32), np.zeros(1, np.float32)]})
    for name in "12345":
        found = read_tensors(tmp_path / name)
        for path, x in arrays.items():
            assert found[path].dtype == x.dtype
            np.testing.assert_array_equal(found[path], x)
    assert found["list/0"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "no safetensors file and no Orbax"),
        (lambda path: path.write_bytes(b"hello, world, this is no model"), "no file of jcompress, safetensors or GGUF"),
        (lambda path: path.write_bytes(b""), "no file of jcompress"),
        (lambda path: None, "there is no such file"),
        (lambda path: (path.mkdir(), (path / "_METADATA").write_text("{")), "Orbax cannot read"),
    ],
)
def test_what_is_no_model(tmp_path, make, said):
    make(tmp_path / "x")
    with pytest.raises(StorageError, match=said):
        read_tensors(tmp_path / "x")
