"""What is read of compiled programs, and the tables made of it."""

import shutil

import jax
import pytest

from experiments.scale import large, programs, streaming, verbs
from experiments.workdir import Rows

HLO = """
%body (p: s32[]) -> s32[] {
  %g = f32[80]{0} all-gather(%q), replica_groups=[2,4]<=[8], dimensions={0}
  %h = bf16[8]{0} all-reduce(%q), replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %w = (s32[], f32[2]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %x.1 = (f32[1,64]{1,0}, /*index=1*/f32[1,64]{1,0}) all-to-all(%a, %b), replica_groups=mesh['a'=2,'b'=4] {'b'}
}
"""


def test_collectives_are_counted_with_their_loops_and_groups():
    found = programs.traffic(HLO)
    assert found.by_kind == {"all-gather": 5 * 80 * 4 * 3 / 4, "all-reduce": 5 * 2 * 16 / 2, "all-to-all": 512 * 3 / 4}
    assert found.nbytes == sum(found.by_kind.values()) and found.largest == 80 and not found.loops
    unknown = programs.traffic(HLO.replace("known_trip_count", "other"))
    assert unknown.loops and unknown.by_kind["all-gather"] == 240


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="there meshes are told otherwise")
def test_a_verb_is_measured():
    found = {(verb, method): make for verb, method, make in verbs.verbs("both", "automatic")}
    row = verbs.measure("compress", "Magnitude, 2:4", "both", "automatic", found["compress", "Magnitude, 2:4"])
    assert row["kept"] and row["bytes_per_parameter"] < 0.01 and row["gathered"] == 0


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="there meshes are told otherwise")
def test_ties_lie_as_the_weights_where_axes_are_explicit():
    found = {(verb, method): make for verb, method, make in verbs.verbs("both", "explicit")}
    row = verbs.measure("sparse training", "RigL", "both", "explicit", found["sparse training", "RigL"])
    assert row["kept"] and row["temporary_over_shard"] < 1  # of the whole array it would be 8


KEYS = {verbs: verbs.KEYS, large: ("model", "job", "what"), streaming: ("method", "dtype")}


@pytest.mark.parametrize("module", KEYS, ids=["verbs", "large", "streaming"])
def test_tables_are_those_of_their_rows(module, tmp_path):
    name, keys = module.__name__.rsplit(".", 1)[-1], KEYS[module]
    shutil.copy(verbs.RESULTS / f"{name}.jsonl", tmp_path)
    text = module.finish(list(Rows(tmp_path / f"{name}.jsonl", keys)), tmp_path / f"{name}.md")
    assert text == (verbs.RESULTS / f"{name}.md").read_text()


def test_memory_of_a_file_is_measured(tmp_path):
    assert streaming.measure("8 bits", "float32", tmp_path, side=256, count=2) > 0
