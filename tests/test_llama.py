"""The decoder: against NumPy in float64, stacked and not, with caches of arrays and of nodes, and under readings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from experiments.models import llama

CONFIG = llama.Config(vocab=50, width=24, layers=2, heads=6, kv_heads=2, head_dim=4, hidden=40, theta=500.0)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 11)))


@functools.cache
def params(tied=True):
    """Random leaves everywhere, the scales of norms too."""
    config = CONFIG if tied else llama.dataclasses.replace(CONFIG, tied=False)
    found = llama.init(jax.random.key(0), config)
    leaves, tree = jax.tree.flatten(found)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def reference(tree, ids):
    """One sequence, head by head, with complex numbers for the rotation."""
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    n, d = len(ids), CONFIG.head_dim
    turn = np.exp(1j * np.arange(n)[:, None] * CONFIG.theta ** (-np.arange(d // 2) / (d // 2)))

    def norm(scale, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.eps) * scale["scale"]

    def rotate(x):
        pairs = (x[:, : d // 2] + 1j * x[:, d // 2 :]) * turn
        return np.concatenate([pairs.real, pairs.imag], -1)

    x = w["embed"]["embedding"][ids]
    for layer in w["layers"]:
        a, y = layer["attention"], norm(layer["attention_norm"], x)
        q, k, v = (np.split(y @ a[name]["kernel"], a[name]["kernel"].shape[1] // d, -1) for name in "qkv")
        heads = []
        for h in range(CONFIG.heads):
            logits = rotate(q[h]) @ rotate(k[h // 3]).T / np.sqrt(d)
            logits[np.triu_indices(n, 1)] = -np.inf
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[h // 3])
        x = x + np.concatenate(heads, -1) @ a["out"]["kernel"]
        m, y = layer["mlp"], norm(layer["mlp_norm"], x)
        gate = y @ m["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ m["up"]["kernel"])) @ m["down"]["kernel"]
    head = w["head"]["kernel"] if "head" in w else w["embed"]["embedding"].T
    return norm(w["norm"], x) @ head


@functools.partial(jax.jit, static_argnames=("store", "config", "remat"))
def run(tree, tokens, cache=None, store=None, config=CONFIG, remat=False):
    return llama.apply(tree, tokens, config, cache=cache, store=store, remat=remat)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_formulas(tied):
    tree = params(tied)
    found = run(tree, TOKENS, config=llama.dataclasses.replace(CONFIG, tied=tied))
    np.testing.assert_allclose(found, [reference(tree, np.asarray(x)) for x in TOKENS], rtol=2e-4, atol=2e-4)
    log = jax.nn.log_softmax(found)[:, :-1]
    by_hand = -np.mean([log[b, i, TOKENS[b, i + 1]] for b in range(2) for i in range(10)])
    np.testing.assert_allclose(jnp.mean(llama.losses(found, TOKENS)), by_hand, rtol=1e-5)


def test_stacked_layers_give_the_same_with_gradients():
    tree, stacked = params(), llama.stack(params())
    assert jax.tree.all(jax.tree.map(jnp.array_equal, llama.unstack(stacked), tree))
    np.testing.assert_allclose(run(stacked, TOKENS, remat=True), run(tree, TOKENS), rtol=1e-4, atol=1e-4)
    plain = jax.jit(jax.grad(lambda p: llama.loss(p, TOKENS, CONFIG)))(tree)
    scanned = jax.jit(jax.grad(lambda p: llama.loss(p, TOKENS, CONFIG, remat=True)))(stacked)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), llama.stack(plain), scanned)


def test_random_parameters_are_the_same_stacked():
    stacked = llama.init(jax.random.key(3), CONFIG, stacked=True, dtype=jnp.bfloat16)
    unrolled = llama.init(jax.random.key(3), CONFIG, dtype=jnp.bfloat16)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, stacked, llama.stack(unrolled)))
    assert {x.dtype for x in jax.tree.leaves(stacked)} == {jnp.dtype(jnp.bfloat16)}
    assert "layers/attention/q/kernel" in dict(jc.paths(stacked))
    assert "layers/1/attention/q/kernel" in dict(jc.paths(unrolled))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("store", [None, jc.quantize.Int(bits=8, axis=(0, 1, 2))])
def test_prefill_and_decoding_give_what_one_pass_gives(stacked, store):
    tree = llama.stack(params()) if stacked else params()
    expected, tolerance = run(params(), TOKENS), 2e-4 if store is None else 0.3
    cache = llama.init_cache(CONFIG, 2, 16, stacked, store=store)
    prefilled, cache = run(tree, TOKENS[:, :8], cache, store)
    found = [prefilled]
    for i in range(8, 11):
        logits, cache = run(tree, TOKENS[:, i : i + 1], cache, store)
        found.append(logits)
    assert int(cache["length"]) == 11
    error = jnp.abs(jnp.concatenate(found, 1) - expected).max()
    assert error < tolerance
    assert store is None or error > 1e-3  # codes are kept, not what they were made from


def test_half_precision_keeps_logits_in_float32():
    found = llama.apply(params(), TOKENS, CONFIG, dtype=jnp.bfloat16)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, run(params(), TOKENS), atol=0.5)


def test_heads_and_channels_are_cut_with_what_they_serve():
    fn = functools.partial(llama.apply, config=CONFIG)
    groups = jc.trace.coupling(fn, params(), TOKENS).values()
    together = [{path for path, _ in group.members} for group in groups]
    attention, mlp = "layers/0/attention/", "layers/1/mlp/"
    assert {f"{attention}v/kernel", f"{attention}out/kernel"} in together
    assert {f"{attention}q/kernel", f"{attention}k/kernel"} in together  # a pair of channels that turn
    assert {f"{mlp}{x}/kernel" for x in ("gate", "up", "down")} in together


def test_a_config_that_no_attention_serves_is_refused():
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        llama.dataclasses.replace(CONFIG, kv_heads=4)
    with pytest.raises(ValueError, match="odd"):
        llama.dataclasses.replace(CONFIG, head_dim=5)
