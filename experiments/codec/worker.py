"""NNCodec (ISO/IEC 15938-17) on arrays from a file, run by the Python of an environment that has it.

    python experiments/codec/worker.py arrays.npz out.npz "[-38, -34]"

Coding is NNCodec's own. What it imports for training and for models of PyTorch, and does not use here, is stood in for.
"""

import json
import sys
import time
import types

import numpy as np


def stand_in() -> None:
    """Empty modules for what coding does not use."""
    for name in ("torch", "h5py", "pandas", "nncodec.framework.applications.utils.sparsification"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torch"].Tensor = type("Tensor", (), {})  # type: ignore[attr-defined]
    framework = types.ModuleType("nncodec.framework")
    for name in ("tensorflow_model", "pytorch_model", "use_case_init"):
        setattr(framework, name, types.ModuleType(name))
    sys.modules["nncodec.framework"] = framework
    models = framework.pytorch_model, framework.tensorflow_model  # type: ignore[attr-defined]
    for module, name in zip(models, ("is_pyt_model", "is_tef_model"), strict=True):
        setattr(module, name, lambda model: False)
    package = types.ModuleType("nncodec")  # its own first lines import everything
    import importlib.util

    found = importlib.util.find_spec("nncodec")
    assert found is not None
    package.__path__ = list(found.submodule_search_locations or [])
    sys.modules["nncodec"] = package


def main(source: str, target: str, steps: str) -> None:
    stand_in()
    from nncodec import nnc

    with np.load(source) as file:
        arrays = {name: np.ascontiguousarray(file[name], np.float32) for name in file.files}
    made = {}
    for qp in json.loads(steps):
        start = time.process_time()
        stream = nnc.compress(
            dict(arrays), qp=qp, row_skipping=True, return_bitstream=True, verbose=False, bitstream_path="/dev/null"
        )
        middle = time.process_time()
        found = nnc.decompress(stream)
        made[f"{qp}/seconds"] = np.array([middle - start, time.process_time() - middle])
        made[f"{qp}/bytes"] = np.array(len(stream))
        for name, x in arrays.items():
            made[f"{qp}/arrays/{name}"] = np.asarray(found[name], np.float32).reshape(x.shape)
    np.savez(target, **made)


if __name__ == "__main__":
    main(*sys.argv[1:])
