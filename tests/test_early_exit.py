"""Early exits of a small random network, with a network before the trunk and without."""

import json

import pytest

from experiments import early_exit


@pytest.mark.parametrize("first", ["", "resnet20"])
def test_exits_are_calibrated_and_written(first, tmp_path):
    assert early_exit.main(["--smoke", f"--first={first}", f"--workdir={tmp_path}"]) == 0
    found = json.loads((tmp_path / ("cascade.json" if first else "early_exit.json")).read_text())
    first_told = " --first=resnet20" if first else ""
    assert found["command"] == f"python -m experiments.early_exit{first_told} --smoke"
    assert len(found["errors"]) == len(found["costs"]) == (4 if first else 3)
    assert found["costs"] == sorted(found["costs"]) and found["images"] == 10
