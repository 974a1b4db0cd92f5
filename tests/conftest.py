"""Eight simulated devices, and a compilation cache that outlives the run."""

import collections
import itertools
import os
import pathlib
import tempfile
import zlib

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
# test in six. Which ones hangs on the test's own name and the case's place in its list, so a new test moves no other.
ONE_IN = {"test_conformance": 32} | dict.fromkeys(
    (
        "test_contributing",
        "test_docs",
        "test_notebooks",
        "test_packing",
        "test_project_files",
        "test_public_names",
        "test_rules",
    ),
    1,
)
ONE_IN_OTHERS = 16
OF_METHODS = (
    "test_bayesian",
    "test_budget",
    "test_calibrate",
    "test_distill",
    "test_dynamic",
    "test_factorize",
    "test_families",
    "test_gptq",
    "test_integer",
    "test_llama",
    "test_llm",
    "test_minilm",
    "test_networks",
    "test_nn",
    "test_noise",
    "test_patterns",
    "test_post_training",
    "test_proximal",
    "test_quantize_",
    "test_quantized_",
    "test_scores",
    "test_search",
    "test_share",
    "test_sparsegpt",
    "test_structured",
    "test_zoo",
    "jcompress/nn/",
    "jcompress/prune/",
    "jcompress/quantize/",
)
# Benchmarks and claims are left out as well, which nothing else runs the code of, and what has a job of its own in CI.
LONG = (
    "test_command_stopped_by_a_signal",
    "test_notebook_runs[compact]",
    "test_notebook_runs[sharing]",
    "test_notebook_runs[distill]",
    "test_notebook_runs[factorize]",
    "test_notebook_runs[llm]",
    "test_notebook_runs[pipelines]",
    "test_notebook_runs[scale]",
    "test_notebook_runs[pruning]",
    "test_notebook_runs[quantization]",
    "test_notebook_runs[structured]",
    "test_the_site_builds",
    "test_losses_are_compared_with_plain_training_and_the_command_continues",
    "test_each_way_is_stored_scored_and_continued",
    "test_a_teacher_of_stages_teaches_its_cut_self_and_another_network",
    "test_each_study_has_its_control[mean teacher]",
    "test_each_study_has_its_control[no data]",
    "test_ten_images_are_learned_with_their_rates",
    "test_two_processes",
    "test_the_process_takes_a_few_arrays",
    "test_a_users_whole_loop_on_an_explicit_mesh",
    "test_benchmarks",
    "benchmark_writes",
    "test_integer_benchmark",
    "test_a_resnet_is_trained_in_four_bits",
    "test_another_mesh_goes_on_from_the_same_state",
    "test_two_workers_of_a_dask_cluster",
    "test_jobs_of_submitit",
    "test_a_run_killed_at_random_points",
    "test_a_search_killed_at_random_points",
    "test_two_processes_train_one_model",
    "test_quantized_training_experiment",
)


CASES, METHODS, BENCHMARKS = (
    "cases of long lists",
    "tests of single methods",
    "benchmarks, notebooks and others that take long",
)
LEFT_OUT = pytest.StashKey()


def _number(name):
    return zlib.crc32(name.encode())


def _left_out(items):
    """``(test, why)`` for all that the short run leaves out."""
    cases = collections.Counter()
    for item in items:
        part = ONE_IN.get(item.path.stem, ONE_IN_OTHERS)
        if any(x in item.nodeid for x in LONG):
            yield item, BENCHMARKS
            continue
        if part > 1 and hasattr(item, "callspec"):
            test = f"{item.path.stem}::{item.originalname}"
            cases[test] += 1
            if (_number(test) + cases[test]) % part:
                yield item, CASES
                continue
        if any(x in str(item.path) for x in OF_METHODS) and _number(item.nodeid) % 6:
            yield item, METHODS


def _in_shard(items, shard):
    """One part of ``n`` of the list: a row of the conformance list, or else a file, is run as a whole."""
    part, of = map(int, shard.split("/"))
    groups = {}
    for item in items:
        row = getattr(item, "callspec", None) and item.callspec.params.get("row")
        groups.setdefault((item.path, getattr(row, "name", "")), []).append(item)
    sizes, chosen = [0] * of, set()
    for group in sorted(groups.values(), key=len, reverse=True):
        lightest = sizes.index(min(sizes))
        sizes[lightest] += len(group)
        if lightest == part - 1:
            chosen.update(group)
    return chosen


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also what the short run leaves out")
    parser.addoption("--zoo", action="store_true", help="models of other packages, and nothing else")
    parser.addoption("--shard", help="i/n: the i-th of n parts of the list, counted from 1")


def pytest_configure(config):
    config.addinivalue_line("markers", "zoo: reads models of other packages; --zoo runs these alone")


def pytest_collection_modifyitems(config, items):
    others = [item for item in items if bool(item.get_closest_marker("zoo")) != config.getoption("--zoo")]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]
    if config.getoption("--zoo"):
        return
    rest = {} if config.getoption("--all") else dict(_left_out(items))
    config.stash[LEFT_OUT] = collections.Counter(rest.values())
    if config.getoption("--shard"):
        shard = _in_shard(items, config.getoption("--shard"))
        rest |= dict.fromkeys((item for item in items if item not in shard), "other shards")
    config.hook.pytest_deselected(items=[item for item in items if item in rest])
    items[:] = [item for item in items if item not in rest]


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(session.config.stash.get(LEFT_OUT, {}))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_terminal_summary(terminalreporter, config):
    left_out = config.stash.get(LEFT_OUT, {})
    if left_out:
        rows = ", ".join(f"{count} {why}" for why, count in sorted(left_out.items()))
        terminalreporter.write_line(f"The short run left out {sum(left_out.values())} tests: {rows}. --all runs them.")


# Linux gives a process 65,530 memory maps, and a compiled program takes several: after some 2,800 tests none is left.
MAPS = pathlib.Path("/proc/self/maps")
MANY_MAPS = 20_000
_TURNS = itertools.count()


@pytest.fixture(autouse=True)
def few_memory_maps():
    """Drops compiled programs when there are many; they come back from the compilation cache."""
    yield
    if next(_TURNS) % 25 == 0 and MAPS.exists() and MAPS.read_text().count("\n") > MANY_MAPS:
        jax.clear_caches()


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
