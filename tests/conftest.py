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


# Rows of the conformance list, and models of the zoo, for which a sibling stands in the short run.
SIBLINGS = [
    "magnitude-vector",
    "magnitude-none",
    "magnitude-all",
    "magnitude-columns",
    "sampled-reweighted",
    "taylor",
    "fisher",
    "obd",
    "sparsegpt-2:4",
    "random-2:4",
    "hard-concrete-columns",
    "bayesian-compression-filters",
    "stacked-hard-concrete",
    "stacked-bayesian",
    "stacked-annealed",
    "multi-prize",
    "movement-soft",
    "stacked-popup",
    "int8-tensor",
    "int4-affine",
    "int3-affine-mse",
    "int1-affine",
    "float16",
    "svd-convolution",
    "spectrum-convolution",
    "kmeans-256",
    "magnitude-bfloat16",
    "int4-scales-bf16",
    "stacked-global",
    "stacked-svd",
    "stacked-spectrum",
    "stacked-kmeans",
    "stacked-random",
    "stacked-ttq",
    "binary-connect-drawn",
]
TWICE = [
    "mlp",
    "lenet",
    "vgg",
    "resnet",
    "densenet",
    "mobilenet",
    "unet",
    "grouped",
    "encoder",
    "decoder",
    "scan",
    "lstm",
    "mixer",
]


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also what siblings stand for in the short run")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all", False):
        return
    short, rest = [], []
    for item in items:
        name = item.name.rpartition("[")[2].rstrip("]")
        sibling = "test_conformance" in item.nodeid and name in SIBLINGS
        sibling |= "test_gradients_are_those" in item.name and name in {f"{family}-plain" for family in TWICE}
        (rest if sibling else short).append(item)
    config.hook.pytest_deselected(items=rest)
    items[:] = short


# Here many models are compiled, each to be run once or twice; nothing is compared to the last bit.
COMPILED_QUICKLY = (
    "test_zoo",
    "test_shrink",
    "test_cost",
    "test_dynamic_training",
    "test_bayesian",
    "test_scores",
    "test_gptq",
    "test_post_training",
    "test_quantized_training",
    "test_quantize_",
)


@pytest.fixture(autouse=True)
def compile_quickly(request):
    """Fewer optimizations, where compiling takes longer than running."""
    quick = request.node.nodeid.split("/")[-1].startswith(COMPILED_QUICKLY)
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
