"""Eight simulated devices, and a compilation cache that outlives the run."""

import os
import pathlib
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import numpy as np
import pytest

_CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "jcompress-test-cache"))
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# What the short run leaves out. Of the conformance list, every row meets a quarter of the checks, and every check a
# quarter of the rows; of the zoo, models written in flax stand for their plain siblings; the benchmarks, whose code
# nothing else runs.
PARTS = 4
SIBLINGS = ("test_gradients_are_those", "-plain")
LONG = ("test_benchmarks", "benchmark_writes", "test_integer_benchmark")


def _left_out(items):
    checks, rows = {}, {}
    for item in items:
        if "test_conformance" in item.nodeid and "row" in getattr(item, "fixturenames", ()):
            row = item.callspec.params["row"].name
            check, place = checks.setdefault(item.originalname, len(checks)), rows.setdefault(row, len(rows))
            if (check + place) % PARTS:
                yield item
        elif all(x in item.name for x in SIBLINGS) or any(x in item.nodeid for x in LONG):
            yield item


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also what the short run leaves out")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all", False):
        return
    rest = set(_left_out(items))
    config.hook.pytest_deselected(items=[item for item in items if item in rest])
    items[:] = [item for item in items if item not in rest]


# Most tests run what they compile once or twice. These compare to the last bit, or read what users would compile.
EXACT = (
    "test_apply",
    "test_calibrate",
    "test_checkpoint",
    "test_combine",
    "test_conformance",
    "test_dynamic",
    "test_experiments",
    "test_integer",
    "test_notebooks",
    "test_prune",
    "test_quantize.py",
    "test_sharding",
    "test_storage",
)


@pytest.fixture(autouse=True)
def compile_quickly(request):
    """Fewer optimizations, where compiling takes longer than running."""
    quick = not request.node.nodeid.split("/")[-1].startswith(EXACT)
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
