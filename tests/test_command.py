"""The command: what it prints, writes and returns, and one sentence for everything that goes wrong."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import jcompress as jc
from jcompress import cli
from jcompress.io import read_tensors, write_gguf, write_safetensors

RNG = np.random.default_rng(0)
MODEL = {f"layers.{i}.proj.weight": RNG.normal(size=(16, 64)).astype(np.float32) for i in range(2)}
MODEL |= {"norm.weight": np.ones(64, np.float32)}
PLAN = """
rules:
  - {match: "norm.*", method: null}
  - match: ".*weight"
    method: chain
    of:
      - {method: prune.Magnitude, pattern: {method: prune.NM, n: 2, m: 4}}
      - {method: quantize.Int, bits: 4, group_size: 32}
"""
RULES = [
    ("norm.*", None),
    (".*weight", jc.chain(jc.prune.Magnitude(pattern=jc.prune.NM(2, 4)), jc.quantize.Int(bits=4, group_size=32))),
]
OUT_IN = {"layers.*": jc.Layout(inputs=1, outputs=0)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_safetensors("m.safetensors", MODEL, metadata={"format": "pt"})
    write_gguf("m.gguf", MODEL, metadata={"general.architecture": "llama", "tokens": ["a"] * 100})
    (tmp_path / "plan.yaml").write_text(PLAN)
    return tmp_path


def run(capsys, *arguments, status=0):
    assert cli.main([*map(str, arguments)]) == status
    return capsys.readouterr()


@pytest.mark.parametrize("name", ["m.safetensors", "m.gguf"])
def test_inspect_shows_a_table(folder, capsys, name):
    out = run(capsys, "inspect", name).out
    assert "3 arrays of 2112 numbers, 8.4 kB" in out
    assert "layers.0.proj.weight  16x64  F32   4.1 kB" in out
    about = json.loads(run(capsys, "inspect", "--json", name).out)
    assert about["arrays"]["norm.weight"] == {"shape": [64], "kind": "F32", "bytes": 256}
    assert about["metadata"] == ({"format": "pt"} if "safe" in name else about["metadata"])


def test_inspect_shows_checkpoints_item_by_item(folder, capsys):
    with jc.io.Checkpoints("states") as checkpoints:
        checkpoints.save(3, {"w": np.ones((4, 2), np.float32)})
    out = run(capsys, "inspect", "states").out
    assert "states/3/state: orbax, 1 arrays of 8 numbers" in out


def test_compress_writes_what_the_library_does(folder, capsys):
    out = run(capsys, "compress", "m.safetensors", "-p", "plan.yaml", "-o", "a.jc").out
    assert out.startswith("a.jc: ")
    source = read_tensors("m.safetensors")
    plan = jc.plan(source.tree, RULES, OUT_IN)
    jc.save("b.jc", jc.compress(dict(source), plan), plan=plan)
    assert (folder / "a.jc").read_bytes() == (folder / "b.jc").read_bytes()
    assert "plan: chain(Magnitude(pattern=NM" in run(capsys, "inspect", "a.jc").out


def test_layouts_are_told_by_the_file_or_by_hand(folder, capsys):
    (folder / "p.json").write_text(json.dumps({"rules": [{"match": "lay.*", "method": "quantize.Int", "bits": 8}]}))
    shapes = {}
    for name, options in {"a": [], "b": ["--layout", "in-out"]}.items():
        run(capsys, "compress", "m.gguf", "-p", "p.json", "-o", name, "-q", *options)
        shapes[name] = jc.load(name)["layers.0.proj.weight"].scale.shape
    assert shapes == {"a": (16, 1), "b": (1, 64)}
    said = {"rules": [{"match": "lay.*", "method": "quantize.Int"}], "layout": {"lay.*": {"inputs": 0, "outputs": 1}}}
    (folder / "p.json").write_text(json.dumps(said))
    run(capsys, "compress", "m.gguf", "-p", "p.json", "-o", "c", "-q")
    assert jc.load("c")["layers.0.proj.weight"].scale.shape == (1, 64)


def test_plan_shows_sizes_and_writes_nothing(folder, capsys):
    before = sorted(os.listdir())
    out = run(capsys, "plan", "m.safetensors", "-p", "plan.yaml").out
    assert sorted(os.listdir()) == before
    run(capsys, "compress", "m.safetensors", "-p", "plan.yaml", "-o", "a.jc")
    total = jc.report(MODEL, jc.load("a.jc")).total
    assert f"{total.bits_per_weight:.2f}" in out.splitlines()[-1]
    assert "multiply-adds" not in out


PYTHON = """
import jax, jax.numpy as jnp, jcompress as jc
rules = [("layers.*", jc.quantize.Int(bits=4))]
layout = "out-in"
fn = lambda params, x: x @ params["layers.0.proj.weight"].T @ params["layers.1.proj.weight"]
args = (jax.ShapeDtypeStruct((5, 64), jnp.float32),)
"""


def test_a_python_plan_counts_multiply_adds(folder, capsys):
    (folder / "plan.py").write_text(PYTHON)
    head, first, *_ = run(capsys, "plan", "m.safetensors", "-p", "plan.py").out.splitlines()
    assert "multiply-adds" in head
    assert "5.12k" in first


def test_diff_tells_errors_and_returns_one(folder, capsys):
    run(capsys, "compress", "m.gguf", "-p", "plan.yaml", "-o", "a.jc", "-q")
    assert run(capsys, "diff", "m.gguf", "m.safetensors").out.count("     0        0") == 3
    out = run(capsys, "diff", "m.gguf", "a.jc", status=1).out
    w, v = MODEL["layers.0.proj.weight"], np.asarray(jc.load("a.jc")["layers.0.proj.weight"].materialize())
    assert f"{np.linalg.norm(w - v) / np.linalg.norm(w):.3g}" in out
    run(capsys, "diff", "m.gguf", "a.jc", "--tolerance", 0.9)
    write_safetensors("other", {"norm.weight": np.ones(3, np.float32), "more": np.ones(1, np.float32)})
    out = run(capsys, "diff", "m.gguf", "other", status=1).out
    assert "only in the first" in out
    assert "only in the second" in out
    assert "of other shapes" in out


def test_diff_of_what_is_not_finite(folder, capsys):
    write_safetensors("a", {"w": np.array([np.nan, np.inf, 1], np.float32)})
    write_safetensors("b", {"w": np.array([np.nan, np.inf, 2], np.float32)})
    run(capsys, "diff", "a", "a")
    run(capsys, "diff", "a", "b", status=1)


def test_report_is_that_of_the_library(folder, capsys):
    run(capsys, "compress", "m.gguf", "-p", "plan.yaml", "-o", "a.jc", "-q")
    assert run(capsys, "report", "m.gguf", "a.jc").out == f"{jc.report(MODEL, jc.load('a.jc'))}\n"


WRONG = {
    "no such source": (["plan", "none", "-p", "plan.yaml"], "none: there is no such file"),
    "no such plan": (["plan", "m.gguf", "-p", "none.yaml"], "none.yaml: there is no such file"),
    "no model": (["inspect", "plan.yaml"], "plan.yaml: found no file of jcompress"),
    "a folder to write": (["compress", "m.gguf", "-p", "plan.yaml", "-o", "."], ""),
    "no folder to write to": (["compress", "m.gguf", "-p", "plan.yaml", "-o", "x/y.jc"], ""),
}
PLANS = {
    "yaml": ("rules: [", "is no YAML"),
    "tag": ("rules: !!python/object/apply:os.system ['true']", "is no YAML"),
    "empty": ("", "no list 'rules'"),
    "text": ("rules: all", "no list 'rules'"),
    "other fields": ("rules: []\nrule: 1", "found rule, expected"),
    "no match": ("rules: [{method: quantize.Int}]", "rule 0: found"),
    "unknown method": ("rules: [{match: '.*', method: quantize.Imt}]", "quantize.Int"),
    "a verb": ("rules: [{match: '.*', method: save, path: x}]", "'save' is no method"),
    "private": ("rules: [{match: '.*', method: quantize.gptq.jax.devices}]", "is no method"),
    "a room": ("rules: [{match: '.*', method: quantize.ranges}]", "is no method"),
    "a function": ("rules: [{match: '.*', method: quantize.moments}]", "found the function"),
    "unknown field": ("rules: [{match: '.*', method: quantize.Int, bit: 4}]", "it takes bits"),
    "a bad value": ("rules: [{match: '.*', method: quantize.Int, bits: 99}]", "99"),
    "no match in the file": ("rules: [{match: 'x', method: quantize.Int}]", "matches no parameter"),
    "a bad pattern": ("rules: [{match: '(', method: quantize.Int}]", "regular expression"),
    "needs data": ("rules: [{match: 'lay.*', method: quantize.GPTQ}]", "the command has no data"),
    "needs a key": ("rules: [{match: 'lay.*', method: prune.Random, sparsity: 0.5}]", "key"),
    "layout": ("rules: []\nlayout: [1]", "found layout"),
    "layout axes": ("rules: []\nlayout: {'.*': {inputs: 1, outputs: 1}}", "layout"),
}


def is_one_sentence(found, folder):
    assert found.out == ""
    assert found.err.count("\n") == 1
    assert "Traceback" not in found.err
    assert {name for name in os.listdir(folder) if not name.endswith(".parts")} <= {
        "m.safetensors",
        "m.gguf",
        "plan.yaml",
        "bad.yaml",
    }


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_one_sentence(folder, capsys, name):
    arguments, said = WRONG[name]
    found = run(capsys, *arguments, status=2)
    assert said in found.err
    is_one_sentence(found, folder)


@pytest.mark.parametrize("name", PLANS)
def test_bad_plans_are_told_in_one_sentence(folder, capsys, name):
    text, said = PLANS[name]
    (folder / "bad.yaml").write_text(text)
    found = run(capsys, "compress", "m.gguf", "-p", "bad.yaml", "-o", "a.jc", status=2)
    assert said in found.err
    is_one_sentence(found, folder)


@pytest.mark.parametrize("text", ["rules = 1 / 0", "x = 1", "rules = ", "import no_such_module"])
def test_bad_python_plans(folder, capsys, text):
    (folder / "bad.py").write_text(text)
    found = run(capsys, "plan", "m.gguf", "-p", "bad.py", status=2)
    assert found.err.startswith("bad.py: ")
    assert found.err.count("\n") == 1


def test_names_are_printed_without_what_a_terminal_obeys(folder, capsys):
    write_safetensors("odd", {"\x1b[2J": np.ones(1, np.float32)}, metadata={"a\nb": "\x1b[31m"})
    assert "\x1b" not in run(capsys, "inspect", "odd").out


def test_usage(capsys):
    for arguments, status in (["--help"], 0), (["compress", "--help"], 0), ([], 2), (["squeeze"], 2):
        with pytest.raises(SystemExit) as error:
            cli.main(arguments)
        assert error.value.code == status
    found = capsys.readouterr()
    assert "register-python-argcomplete" in found.out
    assert all(name in found.out for name in ("inspect", "plan", "compress", "diff", "report", "export"))


STOPS = """
import dataclasses, os, jcompress as jc

@dataclasses.dataclass(frozen=True)
class Stops(jc.Method):
    def __call__(self, w, context=jc.Context(), /):
        if context.path == "layers.1.proj.weight" and not os.path.exists("go"):
            raise KeyboardInterrupt
        return jc.quantize.Int(bits=4)(w, context)

rules = [("layers.*", Stops())]
"""


def test_an_interrupted_command_goes_on(folder, capsys):
    (folder / "plan.py").write_text(STOPS)
    arguments = ["compress", "m.gguf", "-p", "plan.py", "-o", "a.jc"]
    assert "the same command goes on" in run(capsys, *arguments, status=130).err
    assert not os.path.exists("a.jc")
    assert "0.jc" in os.listdir("a.jc.parts")
    (folder / "go").write_text("")
    run(capsys, *arguments)
    assert not os.path.exists("a.jc.parts")
    assert len(jc.load("a.jc")) == 3


def test_help_and_wrong_arguments_need_no_jax():
    code = "import sys, jcompress_command as c; c.parser().format_help(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
