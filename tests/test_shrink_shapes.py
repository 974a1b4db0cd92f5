"""Coupling and shrinking where shapes are all that is known, where lengths differ, and where arguments are cut."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import jcompress as jc


def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape) * 0.3, jnp.float32)


def some(groups):
    return {name: np.arange(g.size) % 2 == 0 for name, g in groups.prunable.items()}


def mlp(p, x):
    return jax.nn.relu(x.reshape(-1, x.shape[-1]) @ p["up"] + p["bias"]).reshape(*x.shape[:-1], -1) @ p["down"]


def attention(p, x):
    b, t, _ = x.shape
    q, k, v = ((x @ p[n]).reshape(b, t, 4, 2) for n in "qkv")
    a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + jnp.where(jnp.tril(jnp.ones((t, t))), 0, -1e9))
    return x + jnp.einsum("bhqk,bkhd->bqhd", a, v).reshape(b, t, 8) @ p["o"]


def positions(p, tokens):
    h = p["embed"][tokens] + p["positions"][:, : tokens.shape[1]]
    return jax.nn.relu(h @ p["up"]) @ p["down"]


MLP = {"up": draw(6, 8), "bias": draw(8), "down": draw(8, 3)}
ATTENTION = {**{n: draw(6, 8) for n in "qkv"}, "o": draw(8, 6)}
POSITIONS = {"embed": draw(11, 6), "positions": draw(1, 16, 6), "up": draw(6, 8), "down": draw(8, 3)}
TOKENS = jnp.arange(14).reshape(2, 7) % 11


@pytest.mark.parametrize(
    ("fn", "params", "x", "spec"),
    [
        (mlp, MLP, draw(3, 4, 6), "b, t, 6"),
        (attention, ATTENTION, draw(3, 4, 6), "b, t, 6"),
        (positions, POSITIONS, TOKENS, "b, 7"),
        (positions, POSITIONS, TOKENS, "b, t"),
    ],
)
def test_symbols_serve_for_lengths(fn, params, x, spec):
    shape = export.symbolic_shape(spec, constraints=["t <= 16"] if "t" in spec else ())
    symbols = jax.ShapeDtypeStruct(shape, x.dtype)
    groups = jc.trace.coupling(fn, params, symbols)
    assert set(groups.prunable) == set(jc.trace.coupling(fn, params, x).prunable)
    assert groups.bytes(groups.bytes.sizes) == sum(p.nbytes for p in params.values())
    keep = some(groups)
    expected = fn(jc.trace.mask(params, groups, keep), x)
    small, shapes = jc.shrink(fn, walk_shapes(params), keep, symbols)
    cut = small.cut(params)
    assert walk_shapes(cut) == shapes
    np.testing.assert_allclose(small(cut, x), expected, atol=1e-6)
    exported = export.export(jax.jit(small))(shapes, symbols)
    for batch in (1, 2):
        np.testing.assert_allclose(exported.call(cut, x[:batch]), expected[:batch], atol=1e-6)


def walk_shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_another_process_has_the_code_and_a_file_only(tmp_path):
    groups = jc.trace.coupling(positions, POSITIONS, TOKENS)
    small, cut = jc.shrink(positions, POSITIONS, some(groups), TOKENS)
    jc.save(tmp_path / "small.jc", {"params": cut, "keep": small.keep, "kept": small.kept})
    np.save(tmp_path / "right.npy", small(cut, TOKENS))
    code = f"""
import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import jax, jcompress as jc, numpy as np
from test_shrink_shapes import POSITIONS, TOKENS, positions, walk_shapes
saved, shapes = jc.load({str(tmp_path / "small.jc")!r}), walk_shapes(POSITIONS)
for keep, params in (("keep", shapes), ("kept", shapes), ("kept", saved["params"])):
    small, _ = jc.shrink(positions, params, saved[keep], walk_shapes(TOKENS))
    assert (np.load({str(tmp_path / "right.npy")!r}) == small(saved["params"], TOKENS)).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_example_does_not_read_stays():
    groups = jc.trace.coupling(positions, POSITIONS, TOKENS)
    assert set(groups.prunable) == {"up[1]", "positions[2]"}
    assert "nothing reads it" in groups["positions[1].1"].reason
    small, cut = jc.shrink(positions, POSITIONS, some(groups), TOKENS)
    masked = jc.trace.mask(POSITIONS, groups, some(groups))
    for length in (4, 12, 16):
        tokens = jnp.ones((2, length), jnp.int32)
        np.testing.assert_allclose(small(cut, tokens), positions(masked, tokens), atol=1e-6)


@pytest.mark.parametrize(
    "read",
    [
        lambda p: p["table"].astype(jnp.float32)[2:5],
        lambda p: (p["table"] * 0.02).T[:, 2:5].T,
        lambda p: jnp.split(p["table"], [2, 5])[1],
        lambda p: jax.jit(lambda t: t[2:5])(p["table"]),
        lambda p: jnp.take(p["table"], jnp.arange(2, 5), axis=0),
        lambda p: lax.dynamic_slice_in_dim(p["table"], 2, 3),
        lambda p: jnp.concatenate([p["table"], p["table"]])[2:5],
        lambda p: jnp.flip(p["table"], 0)[2:5],
    ],
)
def test_whichever_way_it_is_not_read(read):
    params = {"table": draw(8, 6), "out": draw(6, 2), "other": draw(5, 4)}
    groups = jc.trace.coupling(lambda p, x: (x * read(p)) @ p["out"], params, draw(3, 1))
    assert set(groups.prunable) == {"table[1]"}
    assert "nothing reads it" in groups["other[0]"].reason


HEADS, DIM = 4, 2


def step(p, token, cache, position):
    """A step of decoding, whose keys and values are an argument and an output."""
    h = p["embed"][token]
    q, k, v = ((h @ p[n]).reshape(-1, HEADS, DIM) for n in "qkv")
    new = {"k": k[:, None], "v": v[:, None]}
    cache = {n: lax.dynamic_update_slice(cache[n], new[n], (0, position, 0, 0)) for n in "kv"}
    scores = jnp.einsum("bhd,blhd->bhl", q, cache["k"])
    scores = jnp.where(jnp.arange(cache["k"].shape[1]) <= position, scores, -1e9)
    h = h + jnp.einsum("bhl,blhd->bhd", jax.nn.softmax(scores), cache["v"]).reshape(-1, HEADS * DIM) @ p["o"]
    return h @ p["head"], cache


DECODER = {"embed": draw(11, 6), **{n: draw(6, 8) for n in "qkv"}, "o": draw(8, 6), "head": draw(6, 11)}
FREE = {"free_outputs": "1/.*", "free_args": "1/.*"}


def test_a_cache_is_cut_with_the_heads():
    cache = {"k": draw(3, 9, HEADS, DIM), "v": draw(3, 9, HEADS, DIM)}  # whatever it holds where it is cut
    args = (jnp.arange(3), cache, jnp.int32(2))
    groups = jc.trace.coupling(step, DECODER, *args, **FREE)
    assert groups["k[1].0"].arguments == (("1/k", 2), ("1/v", 2))
    assert "args/1/k[2]" in str(groups)
    assert not any(g.arguments for g in jc.trace.coupling(step, DECODER, *args).values())
    keep = some(groups)
    assert sorted(g.size for g in groups.prunable.values()) == [2, 2, 4, 6]
    small, params = jc.shrink(step, DECODER, keep, *args, **FREE)
    masked = jc.trace.mask(DECODER, groups, keep)
    full, cut = cache, small.cut_args(*args)[1]
    assert cut["k"].shape == (3, 9, 2, 1)
    token, run = jnp.arange(3), jax.jit(small)
    for position in range(2, 5):
        expected, full = step(masked, token, full, position)
        found, cut = run(params, token, cut, position)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        token = expected.argmax(-1)
    _, kept, _ = small.cut_args(token, full, position)
    np.testing.assert_allclose(cut["v"], kept["v"], atol=1e-6)
    longer = {n: jnp.zeros((5, 12, 2, 1)) for n in "kv"}
    assert small(params, jnp.arange(5), longer, 0)[1]["v"].shape == (5, 12, 2, 1)
    with pytest.raises(
        ValueError, match=r"argument 1/k: found shape \(3, 9, 4, 2\), expected length 2 on axis 2.*cut_args"
    ):
        small(params, *args)


def test_a_state_whose_slices_are_summed_over_stays():
    """What an argument holds where it is cut is not known, so a norm over it cannot be cut."""

    def norm(p, x, state):
        state = state + x @ p["in"]
        return (state / jnp.sqrt((state**2).mean(-1, keepdims=True) + 1e-6)) @ p["out"], state

    params, free = {"in": draw(5, 8), "out": draw(8, 2)}, {"free_args": "1", "free_outputs": "1"}
    groups = jc.trace.coupling(norm, params, draw(3, 5), draw(3, 8), **free)
    assert "slices differ" in groups["in[1]"].reason
