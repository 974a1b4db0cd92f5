"""Files that others read: GGUF and the naming of compressed-tensors, checked by their own packages where these are."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from jcompress import cli
from jcompress.io import StorageError, blocks, export_compressed_tensors, export_gguf, read_gguf, read_safetensors

W = jax.random.normal(jax.random.key(0), (16, 64))
OUT_IN = jc.Layout(inputs=1, outputs=0)
Q, P = jc.quantize, jc.prune
NAME = "layers.0.up.weight"

GRIDS = {
    "int4": (Q.Int(bits=4, group_size=32), "Q4_0"),
    "int3": (Q.Int(bits=3, group_size=64), "Q4_0"),
    "binary": (Q.Int(bits=1, group_size=32), "Q4_0"),
    "affine4": (Q.Int(bits=4, group_size=32, symmetric=False), "Q4_1"),
    "affine2": (Q.Int(bits=2, symmetric=False), "Q4_1"),
    "int5": (Q.Int(bits=5, group_size=32), "Q5_0"),
    "affine5": (Q.Int(bits=5, group_size=32, symmetric=False), "Q5_1"),
    "int8": (Q.Int(bits=8), "Q8_0"),
    "tensor": (Q.Int(bits=6, axis=None), "Q8_0"),
    "masked": (jc.chain(P.Magnitude(pattern=P.NM(2, 4)), Q.Int(bits=4, group_size=32)), "Q4_0"),
    "masked affine": (jc.chain(P.Magnitude(sparsity=0.5), Q.Int(bits=4, group_size=32, symmetric=False)), "Q4_1"),
}


def node_of(method, layout=OUT_IN, w=W):
    params = {NAME: w if layout == OUT_IN else w.T}
    return jc.compress(params, jc.plan(params, [(".*", method)], {".*": layout}))[NAME]


@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_written_as_they_are(tmp_path, name):
    method, kind = GRIDS[name]
    node = node_of(method)
    export_gguf(tmp_path / "a", {"layers": {"0": {"up": {"weight": node}}}, "norm": W[0]})
    found, dense = read_gguf(tmp_path / "a"), np.asarray(jc.materialize(node))
    assert found.kinds == {NAME: kind, "norm": "F32"}
    # Scales are rounded to float16, and nothing else is.
    np.testing.assert_allclose(found[NAME], dense, rtol=2e-3, atol=2e-3 * np.abs(dense).max())
    if "masked" in name and kind == "Q4_0":
        assert (found[NAME] == 0).sum() >= dense.size / 2


def test_the_layout_of_a_leaf_is_no_matter(tmp_path):
    export_gguf(tmp_path / "a", {NAME: node_of(GRIDS["int4"][0])})
    export_gguf(tmp_path / "b", {NAME: node_of(GRIDS["int4"][0], jc.Layout())}, layout=jc.Layout())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    export_gguf(tmp_path / "c", {NAME: W.T}, layout=jc.Layout())
    np.testing.assert_array_equal(read_gguf(tmp_path / "c")[NAME], W)


def test_a_narrower_float_is_an_array(tmp_path):
    node = node_of(Q.Float())
    export_gguf(tmp_path / "a", {NAME: node})
    found = read_gguf(tmp_path / "a")
    assert found.kinds == {NAME: "BF16"}
    np.testing.assert_array_equal(found[NAME].astype(np.float32), jc.materialize(node))


@pytest.mark.parametrize("kind", blocks.ENCODED)
def test_arrays_are_rounded_to_blocks(tmp_path, kind):
    w = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    w[0, :64] = 0
    export_gguf(tmp_path / "a", {"w": w, "bias": w[0]}, kinds={"w": kind})
    found = read_gguf(tmp_path / "a")
    assert found.kinds == {"w": kind, "bias": "F32"}
    assert (found["w"][0, :32] == 0).all()
    most = np.abs(w).reshape(-1, 32).max(-1, keepdims=True) * (0.012 if kind == "Q8_0" else 0.2)
    assert (np.abs(found["w"] - w).reshape(-1, 32) <= most).all()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_rounding_is_that_of_the_package(kind):
    gguf = pytest.importorskip("gguf")
    w = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    theirs = gguf.quants.quantize(w, getattr(gguf.GGMLQuantizationType, kind))
    np.testing.assert_allclose(blocks.decode(blocks.encode(w, kind), kind), blocks.decode(theirs.reshape(-1), kind))


def test_the_package_reads_nodes(tmp_path):
    gguf = pytest.importorskip("gguf")
    for name, (method, _) in GRIDS.items():
        export_gguf(tmp_path / name, {NAME: node_of(method)}, metadata={"general.architecture": "llama"})
        (tensor,) = gguf.GGUFReader(str(tmp_path / name)).tensors
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(read_gguf(tmp_path / name)[NAME], theirs.reshape(W.shape))


OTHERS = {
    "affine8": Q.Int(bits=8, symmetric=False),
    "groups of 16": Q.Int(bits=4, group_size=16),
    "table": Q.NF4(),
    "factors": jc.factorize.SVD(rank=2),
    "mask": P.Magnitude(sparsity=0.5),
    "float8": Q.Float8(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_gguf_cannot_hold(tmp_path, name):
    with pytest.raises(StorageError, match=rf"^{NAME}: .*GGUF (holds|has)"):
        export_gguf(tmp_path / "a", {NAME: node_of(OTHERS[name])})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kinds", [{"w": "Q9"}, {"w": "Q4_K"}, {"w": "IQ2_XS"}])
def test_kinds_that_do_not_fit(tmp_path, kinds):
    with pytest.raises(StorageError, match=r"^w: found"):
        export_gguf(tmp_path / "a", {"w": W}, kinds=kinds)


TENSORS = {
    "int8": (Q.Int(bits=8), "int-quantized"),
    "affine8": (Q.Int(bits=8, symmetric=False, group_size=32), "int-quantized"),
    "int4": (Q.Int(bits=4, group_size=32), "pack-quantized"),
    "channels": (Q.Int(bits=4), "pack-quantized"),
    "int3": (Q.Int(bits=3, group_size=16), "pack-quantized"),
    "affine4": (Q.Int(bits=4, group_size=32, symmetric=False), "pack-quantized"),
    "tensor": (Q.Int(bits=8, axis=None), "int-quantized"),
    "float8": (Q.Float8(), "float-quantized"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_compressed_tensors_reads_codes(tmp_path, name):
    method, form = TENSORS[name]
    node = node_of(method)
    export_compressed_tensors(tmp_path, {NAME: node, "norm.weight": W[0]}, config={"model_type": "llama"})
    config = json.loads((tmp_path / "config.json").read_text())
    about = config["quantization_config"]
    assert (config["model_type"], about["format"]) == ("llama", form)
    assert about["config_groups"]["group_0"]["targets"] == ["layers.0.up"]
    found = read_safetensors(tmp_path)
    local = {key.removeprefix("layers.0.up."): x for key, x in found.items() if key.startswith("layers")}
    assert found["norm.weight"].tolist() == W[0].tolist()
    if name == "int4":  # by hand: eight codes a word, the first one lowest, counted from -8
        words = local["weight_packed"].view(np.uint32)
        codes = np.stack([(words >> (4 * i)) & 15 for i in range(8)], -1).reshape(16, 64).astype(int) - 8
        np.testing.assert_array_equal(codes, node.codes)
    package = pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(**about["config_groups"]["group_0"])
    state = {key: _torch(torch, x) for key, x in local.items()}
    dense = BaseCompressor.get_value_from_registry(form).decompress(state, scheme)["weight"]
    np.testing.assert_allclose(dense.float().numpy(), np.asarray(jc.materialize(node)), rtol=1e-5, atol=1e-6)
    assert package.__name__


def _torch(torch, x):
    if x.dtype == jnp.float8_e4m3fn:
        return torch.from_numpy(x.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(np.array(x))


def test_two_of_four(tmp_path):
    node = node_of(P.Magnitude(pattern=P.NM(2, 4)))
    export_compressed_tensors(tmp_path, {NAME: node})
    about = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert about["sparsity_config"]["targets"] == ["layers.0.up"]
    found = {key.removeprefix("layers.0.up."): x for key, x in read_safetensors(tmp_path).items()}
    mask = np.unpackbits(found["bitmask"], axis=-1, bitorder="little").astype(bool)
    dense = np.zeros(found["shape"].reshape(-1), np.float32)
    dense[mask] = found["compressed"].reshape(-1)
    np.testing.assert_array_equal(dense, jc.materialize(node))
    old = pytest.importorskip("compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask")
    import torch

    parts = {key: torch.from_numpy(np.array(x)) for key, x in found.items()}
    theirs = old.Sparse24BitMaskTensor.from_compressed_data(**parts).decompress().numpy()
    np.testing.assert_array_equal(theirs, jc.materialize(node))


def test_two_schemes_in_one_file(tmp_path):
    tree = {"a.weight": node_of(Q.Int(bits=4)), "b.weight": node_of(Q.Int(bits=8)), "c.weight": W}
    export_compressed_tensors(tmp_path, tree)
    about = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert about["format"] == "mixed-precision"
    assert {x["format"]: x["targets"] for x in about["config_groups"].values()} == {
        "pack-quantized": ["a"],
        "int-quantized": ["b"],
    }
    assert about["ignore"] == ["c"]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (NAME, Q.NF4()),
        (NAME, P.Magnitude(sparsity=0.5)),
        (NAME, jc.factorize.SVD(rank=2)),
        (NAME, Q.Float8("e5m2")),
        ("kernel", Q.Int(bits=4)),
    ],
)
def test_what_compressed_tensors_cannot_hold(tmp_path, name, method):
    with pytest.raises(StorageError, match=f"^{name}: (found|expected)"):
        export_compressed_tensors(tmp_path / "a", {name: node_of(method)})
    assert os.listdir(tmp_path) == []


def test_the_command_exports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkdir("model")
    jc.io.write_safetensors("model/model.safetensors", {NAME: np.asarray(W)}, metadata={"format": "pt"})
    for name, text in {"config.json": '{"model_type": "llama"}', "tokenizer.json": "{}"}.items():
        (tmp_path / "model" / name).write_text(text)
    rule = {"match": ".*", "method": "quantize.Int", "bits": 4, "group_size": 32}
    (tmp_path / "p.json").write_text(json.dumps({"rules": [rule]}))
    assert cli.main(["compress", "model", "-p", "p.json", "-o", "a.jc", "-q"]) == 0
    assert cli.main(["export", "a.jc", "--to", "compressed-tensors", "-o", "out", "--like", "model"]) == 0
    assert sorted(os.listdir("out")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert cli.main(["export", "a.jc", "--to", "gguf", "-o", "a.gguf"]) == 0
    assert cli.main(["export", "a.jc", "--to", "safetensors", "-o", "a.safetensors"]) == 0
    assert cli.main(["export", "model", "--to", "gguf", "--kind", "Q8_0", "-o", "b.gguf"]) == 0
    assert read_gguf("b.gguf").kinds == {NAME: "Q8_0"}
    assert cli.main(["diff", "a.jc", "a.safetensors"]) == 0
    assert cli.main(["diff", "a.jc", "a.gguf", "--tolerance", "0.001"]) == 0
    assert cli.main(["export", "model", "--to", "safetensors", "--kind", "Q8_0", "-o", "c"]) == 2
    assert "expected gguf" in capsys.readouterr().err


def test_a_program_of_nodes_for_three_platforms(tmp_path):
    pytest.importorskip("flatbuffers")
    w = jax.random.normal(jax.random.key(1), (256, 256))
    small = jc.compress({"w": w}, jc.plan({"w": w}, [("w", Q.Int(bits=4, group_size=32))]))

    def fn(params, x):
        return jnp.tanh(x @ jc.materialize(params)["w"])

    size = jc.io.export_stablehlo(tmp_path / "fn", fn, small, W @ jnp.ones((64, 256)))
    assert size == os.path.getsize(tmp_path / "fn") < 20_000  # no weight is in it
    again = jc.io.load_stablehlo(tmp_path / "fn")
    x = jax.random.normal(jax.random.key(2), (16, 256))
    np.testing.assert_allclose(again(small, x), jax.jit(fn)(small, x), rtol=1e-6, atol=1e-6)
    (tmp_path / "noise").write_bytes(b"noise")
    with pytest.raises(StorageError, match="noise: found no program"):
        jc.io.load_stablehlo(tmp_path / "noise")


def test_onnx_runs_elsewhere(tmp_path):
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    small = {"w": Q.Int(bits=8)(W)}

    def fn(params, x):
        return jnp.tanh(x @ jc.materialize(params)["w"])

    x = jax.random.normal(jax.random.key(2), (3, 16))
    jc.io.export_onnx(tmp_path / "fn.onnx", fn, small, x)
    session = runtime.InferenceSession(str(tmp_path / "fn.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: np.asarray(x)})
    np.testing.assert_allclose(found, fn(small, x), rtol=1e-5, atol=1e-5)
