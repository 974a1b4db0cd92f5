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


# Here many models are compiled, each to be run once or twice; nothing is compared to the last bit.
COMPILED_QUICKLY = ("test_zoo", "test_shrink", "test_cost", "test_dynamic_training", "test_bayesian")


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
