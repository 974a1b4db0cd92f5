"""Values that no file may change, and what a file system may do while one is written."""

import hashlib
import json
import os
import pathlib
import resource
import signal
import stat
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jcompress as jc
from jcompress import cli
from jcompress.io import StorageError
from jcompress.io.restore import check_paths

W = jnp.arange(1.0, 33.0).reshape(8, 4)


def run(code, *arguments, check=True):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=check)


# Values.


@pytest.mark.parametrize("dtype", ["i2", "i4", "i8", "u2", "u4", "f2", "f4", "f8", "c8", "c16"])
@pytest.mark.parametrize("order", "<>")
def test_arrays_of_another_byte_order(tmp_path, dtype, order):
    x = (np.arange(-3, 9) + (0.5 if dtype[0] in "fc" else 0)).astype(dtype).reshape(3, 4)
    tree = {"odd": np.ones(3, bool), "x": x.astype(order + dtype), "turned": x.astype(order + dtype).T}
    jc.save(tmp_path / "x", tree)
    for again in (jc.load(tmp_path / "x"), jc.load(tmp_path / "x", like=tree)):
        assert again["x"].dtype == x.dtype
        np.testing.assert_array_equal(again["x"], x)
        np.testing.assert_array_equal(again["turned"], x.T)


def test_nodes_of_another_byte_order(tmp_path):
    mask = np.asarray(W) % 3 == 0
    jc.save(tmp_path / "x", {"w": jc.formats.Masked(values=np.asarray(W).astype(">f4"), mask=mask)})
    np.testing.assert_array_equal(jc.load(tmp_path / "x")["w"].materialize(), np.where(mask, W, 0))


def test_leaves_keep_type_and_value(tmp_path):
    tree = {
        "seen": np.int64(3_000_000_000),
        "ids": np.array([2**40 + 1, 5]),
        "one": np.array([1 + 1e-12]),
        "double": np.float64(1 + 1e-12),
        "pair": np.complex128(1e-300 + 2j),
        "flag": np.bool_(True),
        "numbers": [0.1, 3, True, "text", 10**3000, -0.0],
        "\ud800 a lone half": "\udfff",
    }
    jc.save(tmp_path / "x", tree)
    for again in (jc.load(tmp_path / "x"), jc.load(tmp_path / "x", like=tree)):
        for name in ("seen", "ids", "one", "double", "pair", "flag"):
            assert (again[name].dtype, again[name].shape) == (tree[name].dtype, tree[name].shape), name
            np.testing.assert_array_equal(again[name], tree[name])
        assert again["numbers"] == tree["numbers"]
        assert list(map(type, again["numbers"])) == [float, int, bool, str, int, float]
        assert again["\ud800 a lone half"] == "\udfff"


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones(2, np.longdouble), "a/x: found dtype float(128|96|64), expected numbers of at most 64 bits"),
        (np.ones(2, np.clongdouble), "a/x: found dtype complex"),
        (np.array([object()]), "a/x: found dtype object"),
        (np.array(["x"]), "a/x: found dtype <U1"),
        (np.array([b"x"]), r"a/x: found dtype \|S1"),
        (np.zeros(2, "V8"), r"a/x: found dtype \|V8"),
        (np.zeros(2, [("a", "f4")]), r"a/x: found dtype \[\('a', '<f4'\)\]"),
        (np.array(["2020-01-01"], "datetime64[D]"), "a/x: found dtype datetime64"),
        (np.ma.array([1.0, 2.0], mask=[0, 1]), "a/x: found a masked array of NumPy"),
        pytest.param(10**5000, "a/x: found an integer of 16610 bits, expected at most 4000 digits", id="digits"),
        (np.str_("x"), "a/x: found dtype <U1"),
        (jc.formats.Masked(np.ones((2, 2), np.longdouble), np.ones((2, 2), bool)), "a/x/values: found dtype"),
        (jc.formats.Masked(jax.ShapeDtypeStruct((2,), "float32"), jnp.ones(2, bool)), "a/x/values: found ShapeDtype"),
        (jc.formats.Masked("text", jnp.ones(2, bool)), "a/x/values: found str, expected an array"),
    ],
)
def test_leaves_that_cannot_be_saved_are_named(tmp_path, x, message):
    with pytest.raises(StorageError, match=message):
        jc.save(tmp_path / "x", {"a": {"x": x}})
    assert list(tmp_path.iterdir()) == []


def test_two_leaves_of_one_path(tmp_path):
    tree = {"a": {"w": W}, "a/w": 100 * W}
    jc.save(tmp_path / "x", tree)
    again = jc.load(tmp_path / "x")
    np.testing.assert_array_equal(again["a"]["w"], W)
    np.testing.assert_array_equal(again["a/w"], 100 * W)
    with pytest.raises(StorageError, match=r"a/w: found two leaves of this path, \['a'\]\['w'\] and \['a/w'\]"):
        jc.load(tmp_path / "x", like=tree)
    jc.save(tmp_path / "y", {"b": flax.core.freeze(tree)})
    assert jax.tree.structure(jc.load(tmp_path / "y")) == jax.tree.structure({"b": tree})


@pytest.mark.parametrize("metadata", [{1: 2, "1": 3}, {"x": float("inf")}, {(1,): 2}, {"x": {1, 2}}])
def test_metadata_that_would_come_back_as_something_else(tmp_path, metadata):
    with pytest.raises(StorageError, match="metadata: JSON cannot hold it"):
        jc.save(tmp_path / "x", {}, metadata=metadata)


# Depth and number.


def nested(levels, wrap, inner):
    for _ in range(levels):
        inner = wrap(inner)
    return inner


@pytest.mark.parametrize(
    "wrap", [lambda x: {"a": x}, lambda x: [x], lambda x: (x,), lambda x: flax.core.freeze({"a": x})]
)
@pytest.mark.parametrize("levels", [20, 150, 256, 257, 400, 950, 5000])
def test_deep_trees_come_back_or_the_limit_is_told(tmp_path, wrap, levels):
    tree = nested(levels, wrap, 3)
    try:
        jc.save(tmp_path / "x", tree)
        again = jc.load(tmp_path / "x")
    except StorageError as error:
        assert levels > 150
        assert "expected at most 256" in str(error)
        return
    for _ in range(levels):
        (again,) = again.values() if isinstance(again, dict) else again
    assert again == 3


def test_deep_metadata_and_nodes_are_refused_with_the_limit(tmp_path):
    with pytest.raises(StorageError, match="expected at most 256"):
        jc.save(tmp_path / "x", {}, metadata=nested(5000, lambda x: [x], 3))
    mask = jnp.ones((2, 2), bool)
    node = nested(40, lambda x: jc.formats.Masked(x, mask), jnp.ones((2, 2)))
    with pytest.raises(StorageError, match="found nodes in nodes, 33 levels, expected at most 32"):
        jc.save(tmp_path / "x", {"w": node})


def test_comparing_paths_reads_each_a_few_times():
    reads = 0

    class Counted(str):
        def __hash__(self):
            nonlocal reads
            reads += 1
            return str.__hash__(self)

    paths = [Counted(f"layer{i}") for i in range(2000)]
    check_paths(dict.fromkeys(paths, 0), dict.fromkeys(paths, 0))
    assert reads <= 10 * len(paths)


# Another structure.


def test_a_dense_tree_gives_the_structure(tmp_path):
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    dense = nnx.state(model)
    small = jc.compress(dense, jc.plan(dense, [("kernel", jc.quantize.Int(bits=4))]))
    jc.save(tmp_path / "x", small)
    fresh = nnx.state(nnx.Linear(8, 4, rngs=nnx.Rngs(1)))
    for like in (fresh, jax.eval_shape(lambda: fresh), small):
        again = jc.load(tmp_path / "x", like=like)
        assert jax.tree.structure(again) == jax.tree.structure(small)
        jax.tree.map(np.testing.assert_array_equal, jc.materialize(again), jc.materialize(small))
    nnx.update(model, jc.materialize(again))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": jnp.ones((4, 8))}, r"w: found Quantized\(.*\) for float32\[8,4\], expected float32\[4,8\]"),
        ({"w": jnp.ones((8, 4), jnp.bfloat16)}, r"expected bfloat16\[8,4\]"),
        ({"w": 3.0}, "w: found Quantized.*, expected float; give"),
        ({"v": W}, r"stored but not expected \['w'\], expected but not stored \['v'\]"),
        (W, r"expected but not stored \[''\]"),
        (None, r"stored but not expected \['w'\]"),
    ],
)
def test_another_tree_is_told_by_path_without_contents(tmp_path, like, message):
    jc.save(tmp_path / "x", {"w": jc.quantize.Int(bits=4)(W)})
    jc.load(tmp_path / "x", like={"w": W})
    if like is None:
        like = {}
    with pytest.raises(StorageError, match=message) as caught:
        jc.load(tmp_path / "x", like=like)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


# What stands where the file should be.


def test_what_is_no_file(tmp_path):
    pipe, loop, link = tmp_path / "pipe", tmp_path / "loop", tmp_path / "link"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    link.symlink_to(tmp_path)
    for act in (jc.load, jc.io.inspect, lambda path: jc.save(path, {})):
        for path, told in {
            tmp_path: "found a directory, expected a file",
            link: "found a directory, expected a file",
            pipe: "found a device or a pipe, expected a file",
            pathlib.Path("/dev/full"): "found a device or a pipe, expected a file",
            loop: "Too many levels of symbolic links",
            tmp_path / "no" / "x": "there is no",
            tmp_path / ("x" * 300): "File name too long",
        }.items():
            with pytest.raises(StorageError, match=told) as caught:
                act(path)
            assert str(path) in str(caught.value)
            assert isinstance(caught.value, OSError)
        with pytest.raises(StorageError, match="found a zero in the name"):
            act("a\0b")
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("name", ["model", "é 模型", "a" * 250, ".x", "x.tmp", b"bytes"])
def test_names_and_relative_paths(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        jc.save(name, {"w": W})
        assert [os.fsencode(path.name) for path in tmp_path.iterdir()] == [os.fsencode(name)]
    np.testing.assert_array_equal(jc.load(name)["w"], W)


def test_a_link_to_what_is_not_there_yet(tmp_path):
    (tmp_path / "link").symlink_to("real")
    jc.save(tmp_path / "link", {"w": W})
    assert (tmp_path / "real").is_file()
    assert (tmp_path / "link").is_symlink()


def test_permissions_are_kept(tmp_path):
    jc.save(tmp_path / "x", {"w": W})
    (tmp_path / "x").chmod(0o600)
    jc.save(tmp_path / "x", {"w": 2 * W})
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600


def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path):
    path, limits = tmp_path / "x", resource.getrlimit(resource.RLIMIT_FSIZE)
    jc.save(path, {"w": W})
    old = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(StorageError, match="x: writing failed: File too large") as caught:
            jc.save(path, {"w": np.ones(1 << 19, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(caught.value, OSError)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


# Temporary files.

KILLED = """
import sys, os, signal, threading, numpy as np, jcompress as jc
folder = os.path.dirname(sys.argv[1])
def watch():
    while not any(name.endswith(".tmp") for name in os.listdir(folder)):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
jc.save(sys.argv[1], {"w": np.ones(1 << 25, np.float32)})
"""

SLOW = """
import sys, jcompress as jc
from jcompress.io import files
def write(file):
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.readline()
files.replace(sys.argv[1], write)
"""


def test_what_a_killed_save_left_goes_with_the_next_save_and_nothing_else(tmp_path):
    path = tmp_path / "x"
    others = [tmp_path / name for name in (".x.tmp", ".xy.0123abcd.tmp", "x.0123abcd.tmp", ".x.0123abcd.tmp.jc")]
    for other in others:
        other.write_bytes(b"mine")
    (tmp_path / ".x.0123abcd.tmp").write_bytes(b"stale, of an earlier version")
    command = [sys.executable, "-c", SLOW, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living:
        assert living.stdout.readline() == "writing\n"
        (temporary,) = tmp_path.glob(".x.????????.tmp")
        jc.save(path, {"w": W})
        assert temporary.exists()
        living.communicate("go on\n", timeout=60)
    assert path.read_bytes() == b"half"
    assert not temporary.exists()
    for other in others:
        other.unlink()
    assert run(KILLED, path, check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    jc.save(path, {"w": W})
    assert list(tmp_path.iterdir()) == [path]
    np.testing.assert_array_equal(jc.load(path)["w"], W)


# Memory.

MEMORY = """
import sys, tracemalloc, jax, jax.numpy as jnp, numpy as np, jcompress as jc
rng, shape = np.random.default_rng(0), (1024, 2048)
def masked(mask):
    return jc.formats.Masked(jnp.ones(shape), jnp.asarray(mask))
tree = {"shifts all that follows by one bit": np.ones(1, bool), "big endian": np.ones(shape, ">f4")}
tree |= {f"dense{i}": jnp.ones(shape) for i in range(16)}
tree |= {f"half{i}": masked(rng.random(shape) < 0.5) for i in range(2)}
tree |= {f"tenth{i}": masked(rng.random(shape) < 0.1) for i in range(2)}
tree |= {f"two of four{i}": masked(np.tile([[1], [0], [1], [0]], (256, 2048)).astype(bool)) for i in range(2)}
assert sum(x.nbytes for x in jax.tree.leaves(tree)) > 200e6
tracemalloc.start()
jc.save(sys.argv[1], tree)
print(tracemalloc.get_traced_memory()[1] / (5 * 1024 * 2048))
"""


def test_saving_takes_at_most_twice_the_largest_leaf(tmp_path):
    assert float(run(MEMORY, tmp_path / "x").stdout) < 2


# Another process.

REBUILD = """
import sys, jax, jax.numpy as jnp, numpy as np, jcompress as jc
def fn(params, x):
    return jax.nn.relu(x @ params["up"] + params["bias"]) @ params["down"]
saved = jc.load(sys.argv[1])
x = jnp.linspace(-1, 1, 12).reshape(4, 3)
small_fn, small = jc.shrink(fn, jc.materialize(saved["params"]), saved["kept"], x)
print(small["up"].shape, np.asarray(small_fn(small, x)).tobytes().hex())
"""


def test_a_shrunk_model_is_rebuilt_from_its_file_alone(tmp_path):
    def fn(params, x):
        return jax.nn.relu(x @ params["up"] + params["bias"]) @ params["down"]

    k1, k2 = jax.random.split(jax.random.key(0))
    params = {"up": jax.random.normal(k1, (3, 8)), "bias": jnp.ones(8), "down": jax.random.normal(k2, (8, 2))}
    x = jnp.linspace(-1, 1, 12).reshape(4, 3)
    small_fn, small = jc.shrink(fn, params, {"up[1]": jnp.arange(8) % 3 > 0}, x)
    jc.save(tmp_path / "x", {"params": small, "kept": small_fn.kept})
    shape, values = run(REBUILD, tmp_path / "x").stdout.rsplit(" ", 1)
    assert shape == "(3, 5)"
    again = np.frombuffer(bytes.fromhex(values.strip()), np.float32).reshape(4, 2)
    np.testing.assert_allclose(again, small_fn(small, x), rtol=1e-5)  # compiled with other options there


# The command.


def test_the_command_ends_in_a_sentence(tmp_path, capsys):
    (tmp_path / "damaged").write_bytes(b"jcompress 1 2 3")
    jc.save(tmp_path / "deep", nested(200, lambda x: {"a": x}, 3))
    jc.save(tmp_path / "odd", {"\ud800\x1b[2J": W}, metadata={"x": "\x1b"})
    for name, told in {"": "no Orbax checkpoint", "missing": "there is no such file", "damaged": "damaged"}.items():
        assert cli.main(["inspect", str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert told in err
        assert str(tmp_path) in err
    assert cli.main(["inspect", str(tmp_path / "deep")]) in (0, 2)
    assert cli.main(["inspect", str(tmp_path / "odd")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\ud800\x1b[2J" in out


def test_the_command_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "jcompress", "inspect", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert (
        result.stderr
        == f"{tmp_path}: found no safetensors file and no Orbax checkpoint in this folder; name the file\n"
    )


def test_a_manifest_of_an_earlier_version_is_read(tmp_path):
    """The bytes that 0.1.0 before this wrote, by hand."""
    node = {"$": "Masked", "values": "float32[4,1]", "mask": "bool[4,1] choice 2:4"}
    text = json.dumps({"jcompress": "0.1.0", "jax": "0.10.2", "tree": {"w": node}}).encode() + b"\n"
    payload = int.from_bytes(np.array([1.5, -2.0], "<f4").tobytes(), "little") << 3 | 4
    data = payload.to_bytes(9, "little")
    digest = [hashlib.blake2b(x, digest_size=8).hexdigest() for x in (text, data)]
    header = f"jcompress 1 {len(text)} {digest[0]} {len(data)} {digest[1]}\n".encode()
    (tmp_path / "x").write_bytes(header + text + data)
    np.testing.assert_array_equal(jc.load(tmp_path / "x")["w"].materialize()[:, 0], [0, 1.5, 0, -2.0])
