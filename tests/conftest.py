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


# Of a test with many cases the short run takes one in so many, beginning elsewhere for each test: on the conformance
# list every row still meets some checks, and every check some rows. Of what belongs to single methods it takes one
# test in three.
ONE_IN = {"test_conformance": 12} | dict.fromkeys(
    ("test_notebooks", "test_packing", "test_project_files", "test_public_names", "test_rules"), 1
)
ONE_IN_OTHERS = 4
OF_METHODS = (
    "test_bayesian",
    "test_budget",
    "test_calibrate",
    "test_dynamic",
    "test_gptq",
    "test_integer",
    "test_minilm",
    "test_noise",
    "test_patterns",
    "test_post_training",
    "test_proximal",
    "test_quantize_",
    "test_quantized_training",
    "test_scores",
    "test_search",
    "test_sparsegpt",
    "test_structured",
    "test_zoo",
    "jcompress/prune/",
    "jcompress/quantize/",
)
# Benchmarks and claims are left out as well: nothing else runs their code.
LONG = ("test_benchmarks", "benchmark_writes", "test_integer_benchmark", "test_quantized_training_experiment")


def _left_out(items):
    tests, cases, seen = {}, {}, 0
    for item in items:
        part = ONE_IN.get(item.path.stem, ONE_IN_OTHERS)
        if part > 1 and hasattr(item, "callspec"):
            test = tests.setdefault(f"{item.path}::{item.originalname}", len(tests))
            cases[test] = cases.get(test, -1) + 1
            if (test + cases[test]) % part:
                yield item
                continue
        elif any(x in item.nodeid for x in LONG):
            yield item
            continue
        if any(x in item.nodeid for x in OF_METHODS):
            seen += 1
            if seen % 3:
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
