"""Generating: tokens as one pass over the whole text gives them, sampling with keys, and caches of a few bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from experiments import generate
from experiments.models import llama

CONFIG = llama.Config.tiny()
PROMPT = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], jnp.int32)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 3 * x, llama.init(jax.random.key(0), CONFIG))


@pytest.mark.parametrize("name", ["dense", "4 bits, packed", "4 bits, stacked packed"])
def test_tokens_are_those_of_the_whole_text(params, name):
    tree = generate.sides(params, CONFIG, [name])[name]
    made = generate.Generator(CONFIG, 12)(tree, PROMPT, 6, jax.random.key(0))
    text = jnp.concatenate([PROMPT, made], axis=1)
    logits = llama.apply(jc.materialize(tree), text, CONFIG)
    np.testing.assert_array_equal(made, jnp.argmax(logits, axis=-1)[:, 4:-1])


def test_sampling_is_by_keys_and_among_the_likeliest():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    sample = jax.jit(jax.vmap(generate.Sampling(1.0, top_k=2), in_axes=(None, 0)))
    found = sample(logits, jax.random.split(jax.random.key(0), 2000))
    assert set(np.unique(found)) == {0, 1}
    assert abs(float((found == 0).mean()) - 0.625) < 0.05
    cold = generate.Sampling(1e-3)(logits, jax.random.key(1))
    assert cold.tolist() == generate.Sampling()(logits, jax.random.key(2)).tolist() == [0]


def test_a_text_ends_and_what_does_not_fit_is_an_error(params):
    whole = generate.Generator(CONFIG, 12)(params, PROMPT[:1], 6, jax.random.key(0))
    stopped = generate.Generator(CONFIG, 12, stop=int(whole[0, 2]))(params, PROMPT[:1], 6, jax.random.key(0))
    assert stopped.shape[1] <= 6 and int(stopped[0, -1]) == int(whole[0, 2])
    with pytest.raises(ValueError, match="do not fit"):
        generate.Generator(CONFIG, 8)(params, PROMPT, 6, jax.random.key(0))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_cache_of_few_bits(params, bits):
    """Its bytes, an error of half a step, and token by token the same as all at once."""
    x, store = jax.random.normal(jax.random.key(1), (2, 6, 2, 8)), generate.cache_in(bits)
    node = store(x)
    step = jnp.abs(x).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    assert (jnp.abs(node.materialize() - x) <= step / 2 * (1 + 1e-5)).all()
    assert generate.nbytes(node) == x.size * bits // 8 + 4 * x.size // 8
    parts = [store(x[:, i : i + 1]) for i in range(6)]
    jax.tree.map(lambda a, *b: np.testing.assert_array_equal(a, jnp.concatenate(b, axis=1)), node, *parts)
    generator = generate.Generator(CONFIG, 8, stored=bits)
    tokens, run = PROMPT[:, :4], jax.jit(generator.step)
    _, at_once = run(params, tokens, generator.empty(params, 2))
    cache = generator.empty(params, 2)
    for i in range(4):
        logits, cache = run(params, tokens[:, i : i + 1], cache)
    dense = llama.apply(params, tokens, CONFIG)[:, -1]
    assert jnp.abs(logits[:, 0] - dense).max() < (0.02 if bits == 8 else 0.5) * jnp.abs(dense).max()
    first = [c["layers"][0]["k"].materialize() for c in (at_once, cache)]  # before any error of the cache
    np.testing.assert_allclose(*first, atol=1e-5)
