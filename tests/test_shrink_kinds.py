"""What equations mean for coupling, one small function a kind: the groups that are listed and no others can be cut,
and the shrunk function is the masked one on random leaves, gradients included."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jcompress as jc


@dataclasses.dataclass(frozen=True)
class Kind:
    """A function, its parameters and arguments, and one member of each group that can be cut."""

    name: str
    fn: Callable[..., Any]
    params: dict[str, Any]
    args: tuple
    members: tuple[tuple[str, int], ...]
    grads: bool = True


def draw(*shape, seed=[0]):  # noqa: B006 - each call draws other numbers
    seed[0] += 1
    return jnp.asarray(np.random.default_rng(seed[0]).normal(size=shape) * 0.5, jnp.float32)


def between(middle, *extra, width=8, rows=6, out=None, **params):
    """``middle`` applied to the hidden layer of two products, with one group between them."""

    def fn(p, x):
        return middle(p, x @ p["up"]) @ p["down"]

    params = {"up": draw(5, width), "down": draw(out or width, 3), **params}
    return fn, params, (draw(rows, 5),), (("up", 1), *extra)


KEY = jax.random.key(3)
SHUFFLE = np.array([3, 1, 4, 0, 7, 5, 2, 6])
IDS = jnp.array([0, 0, 1, 2, 2, 2])


def dropout(p, h):
    return jnp.where(jax.random.bernoulli(KEY, 0.7, h.shape), jax.nn.relu(h) / 0.7, 0)


def raw_keys(p, h):
    keys = jax.random.split(jax.random.PRNGKey(1), h.shape[0])
    return h * jax.vmap(lambda k: jax.random.uniform(k, h.shape[1:]))(keys)


def rng_bits(p, h):
    _, bits = lax.rng_bit_generator(jnp.arange(4, dtype=jnp.uint32), h.shape, jnp.uint32)
    return h * (bits >> 31)


def filtered(p, h):
    n = 2 * h.shape[0]
    y = jnp.fft.irfft(jnp.fft.rfft(h, n=n, axis=0) * jnp.fft.rfft(p["filter"], n=n, axis=0), n=n, axis=0)
    return y[: h.shape[0]]


def fourier(p, x):
    h = x @ p["lift"]
    f = jnp.einsum("bmi,mio->bmo", jnp.fft.rfft(h, axis=1)[:, :4], p["w"])
    f = jnp.fft.irfft(jnp.pad(f, ((0, 0), (0, 1), (0, 0))), n=8, axis=1)
    return jax.nn.gelu(f + h @ p["skip"]) @ p["proj"]


def picked(p, x):
    """Each head looks up its own row: batching dimensions of a gather."""
    h = jax.nn.relu(jnp.einsum("bw,whr->bhr", x, p["up"]))
    rows = jnp.argmax(lax.stop_gradient(h), -1)
    return jnp.take_along_axis(h, rows[..., None], -1)[..., 0] @ p["down"]


def put(p, x):
    """Each head adds at a place of its own: batching dimensions of a scatter."""
    h = jnp.einsum("bw,whr->hbr", x, p["up"])
    places = jnp.argmax(lax.stop_gradient(h), -1)
    found = jax.vmap(lambda a, i: jnp.zeros_like(a).at[jnp.arange(a.shape[0]), i].add(a[:, 0]))(h, places)
    return jnp.einsum("hbr,hro->bo", found, p["down"])


def bits_of_floats(p, h):
    bits = lax.bitcast_convert_type(h, jnp.int32) & -256
    return lax.bitcast_convert_type(bits, jnp.float32)


def filled(p, h):
    return jnp.take(h, jnp.array([0, 9, 3]), axis=0, mode="fill", fill_value=2.0)


def alibi(p, x):
    slopes = 2.0 ** -jnp.arange(1, 5)
    bias = -slopes[:, None, None] * jnp.abs(jnp.arange(3)[:, None] - jnp.arange(3))

    def attention(p, x):
        q, k, v = (jnp.einsum("btw,whd->bthd", x, p[n]) for n in "qkv")
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias)
        return jnp.einsum("bhqk,bkhd,hdw->bqw", a, v, p["o"])

    return jax.jit(attention)(p["1"], attention(p["0"], x))


def heads():
    return {**{n: draw(5, 4, 2) for n in "qkv"}, "o": draw(4, 2, 5)}


LAYERS = {"0": heads(), "1": heads()}
HEADS = (("0/o", 2), *((f"{i}/{n}", a) for i in "01" for n, a in (("k", 1), ("k", 2), ("v", 2))))
OPERATOR = {"lift": draw(2, 6), "w": draw(4, 6, 7) + 1j * draw(4, 6, 7), "skip": draw(6, 7), "proj": draw(7, 2)}


def experts(p, x):
    e = jnp.argmax(x @ p["router"], -1)
    order, sizes = jnp.argsort(e), jnp.bincount(e, length=4).astype(jnp.int32)
    h = jax.nn.gelu(lax.ragged_dot(x[order], p["up"], sizes))
    return jnp.zeros_like(x).at[order].set(lax.ragged_dot(h, p["down"], sizes))


def two_experts(p, x):
    """The best two of four experts, weighed, each token's rows sorted by expert."""
    w, e = lax.top_k(jax.nn.softmax(x @ p["router"] + p["bias"]), 2)
    order = jnp.argsort(e.reshape(-1))
    sizes = jnp.sum(e.reshape(-1, 1) == jnp.arange(4), 0, dtype=jnp.int32)
    h = lax.ragged_dot(jax.nn.gelu(lax.ragged_dot(x[order // 2], p["up"], sizes)), p["down"], sizes)
    return (h[jnp.argsort(order)].reshape(*e.shape, -1) * w[..., None]).sum(1)


def every_expert(p, x):
    h = jax.nn.relu(jnp.einsum("bw,ewh->beh", x, p["up"]))
    return jnp.einsum("beh,eho->beo", h, p["down"])


def dense_experts(p, x):
    return jnp.einsum("beo,be->bo", every_expert(p, x), jax.nn.softmax(x @ p["router"]))


def switch(p, x):
    """The best expert, by its probability."""
    scores = jax.nn.softmax(x @ p["router"])
    e = jnp.argmax(scores, -1)
    gate = jnp.take_along_axis(scores, e[:, None], -1)
    return gate * jnp.einsum("beo,be->bo", every_expert(p, x), jax.nn.one_hot(e, 4))


def best_two(p, x):
    w, e = lax.top_k(jax.nn.sigmoid(x @ p["router"]), 2)
    combine = jnp.einsum("bk,bke->be", w / w.sum(-1, keepdims=True), jax.nn.one_hot(e, 4))
    return jnp.einsum("beo,be->bo", every_expert(p, x), combine)


def gated(p, x):
    """A choice that weighs its own scores."""
    scores = jax.nn.softmax(x @ p["router"])
    chosen = jax.nn.one_hot(jnp.argmax(scores, -1), 4)
    return jnp.einsum("beo,be->bo", every_expert(p, x), chosen * scores)


def spread(p, x):
    """The weights of the best two written beside zeros."""
    w, e = lax.top_k(x @ p["router"], 2)
    combine = jnp.zeros((x.shape[0], 4)).at[jnp.arange(x.shape[0])[:, None], e].set(jax.nn.softmax(w))
    return jnp.einsum("beo,be->bo", every_expert(p, x), combine)


EXPERTS = {"router": draw(5, 4), "up": draw(4, 5, 6), "down": draw(4, 6, 5)}
ROUTED = (("router", 1), ("up", 2))


@jax.custom_batching.custom_vmap
def doubled(x):
    return 2 * x


doubled.def_vmap(lambda size, batched, x: (2 * x, batched[0]))


def solved(p, h):
    a = jnp.eye(6) * 3 + jnp.outer(jnp.arange(6.0), jnp.ones(6)) / 9
    return jnp.linalg.solve(a, h)


def least_squares(p, x):
    """Ridge regression of the hidden layer on the input."""
    h = jnp.tanh(x @ p["up"])
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(x.T @ x + jnp.eye(5)), x.T @ h) @ p["down"]


def stacked_solves(p, x):
    """One small system a head."""
    q = jnp.einsum("bw,whd->hbd", x, p["q"])
    gram = jnp.einsum("hbd,hbe->hde", q, q) + jnp.eye(2)
    return jnp.einsum("hbd,hdo->bo", jnp.linalg.solve(gram[:, None], q[..., None])[..., 0], p["o"])


def printed(p, h):
    jax.debug.callback(lambda v: None, h)
    jax.experimental.io_callback(lambda v: None, None, h.sum(-1))
    return h


def ensemble(p, x):
    def conv(x, k):
        return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    return jax.vmap(lambda p: jnp.mean(jax.nn.relu(conv(x, p["kernel"])), (1, 2)) @ p["head"])(p)


def turned(p, x):
    return lax.reshape(x @ p["up"], (8, 6), dimensions=(1, 0)).T @ p["down"]


def mixed(p, x):
    """A layer that splits its units in halves after they were put in another order, as flows do."""
    h = (x @ p["up"])[:, ::-1]
    a, b = jnp.split(h, 2, axis=-1)
    return jnp.concatenate([a, b * jnp.tanh(a @ p["mid"])], -1) @ p["down"]


def shuffled(p, x):
    """Channels of two groups shuffled by an index, then a grouped product."""
    h = (x @ p["up"])[:, jnp.arange(8).reshape(2, 4).T.reshape(-1)].reshape(-1, 4, 2)
    return jnp.einsum("bcg,cgo->bo", jax.nn.relu(h), p["down"])


def carried(p, x):
    """One constant in every turn of a loop and outside of it."""
    table = jnp.cos(jnp.arange(8.0))
    h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w) * table, None), x @ p["up"], p["w"])
    return (h + table * 0) @ p["down"]


@jax.custom_jvp
def scaled(x, k):
    return x * k


scaled.defjvp(lambda primals, tangents: (scaled(*primals), tangents[0] * primals[1]))


@jax.custom_jvp
def noised(x, key):
    return x * jax.random.normal(key, x.shape)


noised.defjvp(lambda primals, tangents: (noised(*primals), noised(tangents[0], primals[1])))


@jax.custom_vjp
def stepped(h, t):
    return h * t


def _forward(h, t):
    if t.perturbed:
        raise RuntimeError("t cannot be differentiated")
    return stepped(h.value, t.value), t.value


stepped.defvjp(_forward, lambda t, g: (g * t, None), symbolic_zeros=True)


@jax.custom_vjp
def counted(h, n):
    return h * n, n + 1


counted.defvjp(lambda h, n: (counted(h, n), n), lambda n, g: (g[0] * n, None))


def with_constant(wrap):
    inner = wrap(lambda h: (jnp.sin(h), jnp.arange(h.shape[-1]) * 0.5 + 1, jnp.ones(h.shape)))

    def fn(p, h):
        h, order, ones = inner(h)
        return h * (order + 1) * ones + order * jnp.tanh(h) * (2 * ones - 1)

    return fn


KINDS = [
    Kind("dropout", *between(dropout)),
    Kind("noise", *between(lambda p, h: h + jax.random.normal(KEY, h.shape))),
    Kind("keys of every example", *between(raw_keys)),
    Kind("bits of a generator", *between(rng_bits)),
    Kind("gumbel", *between(lambda p, h: jax.nn.sigmoid(h + jax.random.gumbel(KEY, h.shape)))),
    Kind(
        "bits of a float",
        *between(bits_of_floats),
        grads=False,
    ),
    Kind("fft", *between(filtered, filter=draw(4, 8))),
    Kind("fft of examples", *between(lambda p, h: jnp.fft.fft(h, axis=0).real)),
    Kind(
        "fourier operator",
        fourier,
        {"lift": draw(2, 6), "w": draw(4, 6, 7) + 1j * draw(4, 6, 7), "skip": draw(6, 7), "proj": draw(7, 2)},
        (draw(3, 8, 2),),
        (("lift", 1), ("skip", 1)),
    ),
    Kind("segment max", *between(lambda p, h: jax.ops.segment_max(h, IDS, 3))),
    Kind("segment min", *between(lambda p, h: jax.ops.segment_min(h, IDS, 3))),
    Kind("scatter mul", *between(lambda p, h: jnp.ones_like(h).at[IDS].mul(h, unique_indices=False)), grads=False),
    Kind("scatter sub", *between(lambda p, h: h.at[IDS].subtract(jnp.ones_like(h)))),
    Kind("scatter add of ones", *between(lambda p, h: h * jnp.ones(h.shape).at[IDS].add(1.0).sum(0))),
    Kind("gather of heads", picked, {"up": draw(5, 4, 3), "down": draw(4, 2)}, (draw(6, 5),), (("up", 1),)),
    Kind("scatter of heads", put, {"up": draw(5, 4, 3), "down": draw(4, 3, 2)}, (draw(6, 5),), (("up", 1),)),
    Kind("fill value", *between(filled)),
    Kind(
        "alibi",
        alibi,
        {"0": heads(), "1": heads()},
        (draw(2, 3, 5),),
        (*tuple((f"{i}/{n}", a) for i in "01" for n, a in (("k", 1), ("k", 2), ("v", 2))), ("0/o", 2)),
    ),
    Kind(
        "constant in a loop",
        carried,
        {"up": draw(5, 8), "w": draw(3, 8, 8), "down": draw(8, 2)},
        (draw(4, 5),),
        (("up", 1),),
    ),
    Kind("reverse", *between(lambda p, h: h[:, ::-1] * p["scale"], scale=draw(8))),
    Kind(
        "reverse and split",
        mixed,
        {"up": draw(5, 8), "mid": draw(4, 4), "down": draw(8, 2)},
        (draw(4, 5),),
        (("mid", 0), ("mid", 1)),
    ),
    Kind("a call that gives a constant", *between(with_constant(jax.jit))),
    Kind("a call in a call that gives a constant", *between(with_constant(lambda fn: jax.jit(jax.checkpoint(fn))))),
    Kind("a constant that is counted", *between(lambda p, h: jax.nn.softmax(h + with_constant(jax.jit)(p, h)))),
    Kind("order", *between(lambda p, h: jax.nn.relu(h[:, SHUFFLE]) * p["scale"], scale=draw(8))),
    Kind("order twice", *between(lambda p, h: jnp.take(h[:, SHUFFLE], np.argsort(SHUFFLE), axis=-1) + h)),
    Kind("order of constants on the device", *between(lambda p, h: jnp.take(h, jnp.asarray(SHUFFLE), axis=1))),
    Kind("shuffle", shuffled, {"up": draw(5, 8), "down": draw(4, 2, 3)}, (draw(4, 5),), (("up", 1), ("down", 0))),
    Kind("written in another order", *between(lambda p, h: jnp.zeros_like(h).at[:, SHUFFLE].set(jnp.tanh(h)))),
    Kind("tile", *between(lambda p, h: jnp.tile(h, (1, 2)), out=16)),
    Kind("copies by an index", *between(lambda p, h: h[:, np.arange(16) // 2], ("down", 0), out=16)),
    Kind("roll", *between(lambda p, h: jnp.roll(h, 1, axis=0))),
    Kind("experts", experts, EXPERTS, (draw(9, 5),), ROUTED),
    Kind("two experts", two_experts, {**EXPERTS, "bias": draw(4)}, (draw(9, 5),), ROUTED),
    Kind("dense experts", dense_experts, EXPERTS, (draw(9, 5),), ROUTED),
    Kind("switch", switch, EXPERTS, (draw(9, 5),), ROUTED),
    Kind("gated experts", gated, EXPERTS, (draw(9, 5),), ROUTED),
    Kind("weights written to experts", spread, EXPERTS, (draw(9, 5),), ROUTED),
    Kind("best two experts", best_two, EXPERTS, (draw(9, 5),), ROUTED),
    Kind("custom vmap", *between(lambda p, h: jax.vmap(doubled)(doubled(h))), grads=False),
    Kind("linear solve", *between(solved)),
    Kind("cholesky solve", least_squares, {"up": draw(5, 8), "down": draw(8, 3)}, (draw(6, 5),), (("up", 1),)),
    Kind("solves of heads", stacked_solves, {"q": draw(5, 4, 2), "o": draw(4, 2, 3)}, (draw(6, 5),), (("q", 1),)),
    Kind("approximate top k", *between(lambda p, h: lax.approx_max_k(h.T, 3)[0].T)),
    Kind("callbacks", *between(printed), grads=False),
    Kind("reshape in another order", turned, {"up": draw(5, 8), "down": draw(8, 3)}, (draw(6, 5),), (("up", 1),)),
    Kind(
        "ensemble",
        ensemble,
        {"kernel": draw(3, 3, 3, 2, 8), "head": draw(3, 8, 2)},
        (draw(2, 6, 6, 2),),
        (("kernel", 4),),
    ),
    Kind("custom jvp of an integer", *between(lambda p, h: scaled(h, jnp.arange(1, 9)))),
    Kind("custom jvp of a key", *between(lambda p, h: noised(h, KEY))),
    Kind("custom vjp that refuses", *between(lambda p, h: stepped(h, jnp.linspace(0.5, 1.0, 8)))),
    Kind("custom vjp of an integer", *between(lambda p, h: counted(h, jnp.arange(1, 9))[0])),
]


def some(groups, seed=0):
    rng, keep = np.random.default_rng(seed), {}
    for name, group in groups.prunable.items():
        keep[name] = rng.random(group.size) < 0.6
        cut, kept = rng.permutation(group.size)[:2]
        keep[name][cut], keep[name][kept] = False, True
    return keep


def both(fn, args):
    """The outputs, and a scalar of them with a gradient everywhere."""

    def value(params):
        out = fn(params, *args)
        return jnp.sum(jnp.sin(out) * jnp.linspace(0.5, 1.5, out.size).reshape(out.shape)), out

    return value


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_shrunk_function_is_the_masked_one(kind):
    groups = jc.trace.coupling(kind.fn, kind.params, *kind.args)
    found = {min(n for n, g in groups.prunable.items() if m in g.members) for m in kind.members}
    assert not groups.unread
    assert set(groups.prunable) == found and len(found) == len(kind.members), str(groups)
    keep = some(groups)
    masked = jc.trace.mask(kind.params, groups, keep)
    small, params = jc.shrink(kind.fn, kind.params, keep, *kind.args)
    assert sum(x.size for x in jax.tree.leaves(params)) < sum(x.size for x in jax.tree.leaves(masked))
    assert jc.trace.cost(small, params, *kind.args).total.multiply_adds == groups.multiply_adds(keep)
    if not kind.grads:
        expected, found = kind.fn(masked, *kind.args), small(params, *kind.args)
        np.testing.assert_allclose(found, expected, atol=2e-5 * float(jnp.abs(expected).max()))
        return
    (_, expected), full = jax.jit(jax.value_and_grad(both(kind.fn, kind.args), has_aux=True))(masked)
    (_, found), grads = jax.jit(jax.value_and_grad(both(small, kind.args), has_aux=True))(params)
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(jnp.abs(expected).max()))
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(full))
    for a, b in zip(jax.tree.leaves(small.cut(full)), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-4, atol=2e-5 * largest)


def test_a_choice_of_classes_or_tokens_stays():
    """What is chosen by no experts of its own is a class or a token, whoever reads it."""
    params = {"embed": draw(11, 6), "up": draw(6, 8), "head": draw(8, 11)}

    def best(p, tokens):
        return jnp.argmax(jax.nn.relu(p["embed"][tokens] @ p["up"]) @ p["head"], -1)

    def twice(p, tokens):
        return jnp.take(p["embed"], best(p, tokens), axis=0) @ p["up"]

    for fn in (best, twice):
        groups = jc.trace.coupling(fn, params, jnp.arange(3))
        assert {n for n, g in groups.items() if ("head", 1) in g.members}.isdisjoint(groups.prunable)
        assert not any(("embed", 0) in g.members for g in groups.prunable.values())


def test_a_rule_that_is_told_what_needs_a_derivative_was_read_for_parameters():
    _, params, (x,), _ = between(lambda p, h: stepped(h, jnp.linspace(0.5, 1.0, 8)))
    small, cut = jc.shrink(lambda p, x, t: stepped(x @ p["up"], t) @ p["down"], params, {}, x, jnp.ones(8))
    with pytest.raises(ValueError, match="derivative with respect to operand 1"):
        jax.grad(lambda t: small(cut, x, t).sum())(jnp.ones(8))


def test_rules_that_cannot_be_traced_pin_with_what_they_raise():
    @jax.custom_vjp
    def closed(h):
        return h * 2

    def forward(h):
        raise RuntimeError("only for inference")

    closed.defvjp(forward, lambda _, g: (g,))
    fn, params, args, _ = between(lambda p, h: closed(h))
    groups = jc.trace.coupling(fn, params, *args)
    assert "cannot be read here: RuntimeError: only for inference" in groups["up[1]"].reason
    small, cut = jc.shrink(fn, params, {}, *args)
    np.testing.assert_allclose(small(cut, *args), fn(params, *args))


def test_an_effect_sees_what_stays():
    seen = []
    fn, params, args, _ = between(lambda p, h: (jax.debug.callback(lambda v: seen.append(v.shape), h), h)[1])
    small, cut = jc.shrink(fn, params, {"up[1]": jnp.arange(8) < 5}, *args)
    jax.block_until_ready(jax.jit(small)(cut, *args))
    jax.effects_barrier()
    assert seen == [(6, 5)]


def test_what_a_callback_gives_was_made_for_the_full_size():
    fn, params, args, _ = between(lambda p, h: jax.pure_callback(np.sin, h, h))
    assert "pure_callback" in jc.trace.coupling(fn, params, *args)["up[1]"].reason


def test_units_of_complex_weights_are_ranked_by_magnitude():
    params = {"w": draw(3, 8) + 1j * draw(3, 8), "out": draw(8, 2)}
    fn = lambda p, x: (x @ p["w"]).real @ p["out"]  # noqa: E731
    groups = jc.trace.coupling(fn, params, draw(4, 3))
    scores = jc.prune.structured.importance(params, groups)["w[1]"]
    np.testing.assert_allclose(scores, jnp.abs(params["w"]).sum(0) + jnp.abs(params["out"]).sum(1), rtol=1e-5)
    small, _ = jc.shrink(fn, params, {"w[1]": np.arange(8) < 3}, draw(4, 3), multiple_of=4)
    energy = (jnp.abs(params["w"]) ** 2).sum(0) + (params["out"] ** 2).sum(1)
    assert small.keep["w[1]"].tolist() == [*[True] * 3, *(np.arange(3, 8) == 3 + int(energy[3:].argmax()))]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def shifted(order, x):
    """Its rule calls the function itself, with another constant, and so on for ever."""
    return jnp.sin(x + 0.3 * order)


@shifted.defjvp
def _(order, primals, tangents):
    (x,), (t,) = primals, tangents
    return shifted(order, x), (2 + order) * shifted(order + 1, x) * t  # not the true derivative, so that it shows


def test_a_rule_that_calls_its_function_with_other_constants():
    fn, params, args, _ = between(lambda p, x: shifted(0, x))
    groups = jc.trace.coupling(fn, params, *args)
    (name,) = groups.prunable
    keep = {name: np.arange(groups[name].size) % 3 > 0}
    small_fn, small = jc.shrink(fn, params, keep, *args)
    masked, ones = (jc.trace.mask(tree, groups, keep) for tree in (params, jax.tree.map(jnp.ones_like, params)))

    def along(fn, params, direction):
        return lambda s: fn(jax.tree.map(lambda w, d: w + s * d, params, direction), *args)

    found, right = along(small_fn, small, small_fn.cut(ones)), along(fn, masked, ones)
    for order in range(4):
        if order:
            found, right = jax.jacfwd(found), jax.jacfwd(right)
        np.testing.assert_allclose(found(0.0), right(0.0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="order 4"):
        jax.jacfwd(found)(0.0)
