"""Units for a share of the cost: what is promised is what the shrunk network costs, and nothing nearer exists."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

import jcompress as jc
from jcompress.prune import structured


def conv(x, kernel, stride=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=numbers)


def residual(params, x):
    """Three stages of two blocks, with shortcuts that are subsampled and padded by channels of zeros."""

    def norm(p, h):
        return (h - p["mean"]) * jax.lax.rsqrt(p["var"] + 1e-5) * p["scale"] + p["bias"]

    h = jax.nn.relu(norm(params["norm"], conv(x, params["stem"])))
    for i, block in enumerate(params["blocks"]):
        stride = 2 if i in (2, 4) else 1
        y = jax.nn.relu(norm(block["norm1"], conv(h, block["conv1"], stride)))
        y = norm(block["norm2"], conv(y, block["conv2"]))
        extra = y.shape[-1] - h.shape[-1]
        h = jnp.pad(h[:, ::stride, ::stride], ((0, 0),) * 3 + ((extra // 2, extra - extra // 2),))
        h = jax.nn.relu(h + y)
    return h.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


def residual_params(rng, widths=(4, 8, 16)):
    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)

    def norm(n):
        return {"scale": 1 + draw(n), "bias": draw(n), "mean": draw(n), "var": 1 + draw(n) ** 2}

    blocks, n = [], widths[0]
    for width in widths:
        for _ in range(2):
            convs = {"conv1": draw(3, 3, n, width), "conv2": draw(3, 3, width, width)}
            blocks.append({**convs, "norm1": norm(width), "norm2": norm(width)})
            n = width
    head = {"kernel": draw(n, 10), "bias": draw(10)}
    return {"stem": draw(3, 3, 3, widths[0]), "norm": norm(widths[0]), "blocks": blocks, "head": head}


def transformer(params, tokens):
    h = params["embed"][tokens]
    for block in params["blocks"]:
        n = h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6) * block["scale"]
        q, k, v = (jnp.einsum("bsd,dhk->bshk", n, block[name]) for name in ("q", "k", "v"))
        weights = jax.nn.softmax(jnp.einsum("bshk,bthk->bhst", q, k))
        h = h + jnp.einsum("bhst,bthk,hkd->bsd", weights, v, block["o"])
        h = h + jax.nn.gelu(h @ block["up"]) @ block["down"]
    return h @ params["head"]


def transformer_params(rng, blocks=2, d=12, heads=3, size=4, hidden=20, vocabulary=11):
    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)

    shapes = {"q": (d, heads, size), "k": (d, heads, size), "v": (d, heads, size), "o": (heads, size, d)}
    shapes |= {"up": (d, hidden), "down": (hidden, d)}
    made = [{"scale": 1 + draw(d), **{name: draw(*s) for name, s in shapes.items()}} for _ in range(blocks)]
    return {"embed": draw(vocabulary, d), "blocks": made, "head": draw(d, vocabulary)}


@pytest.fixture(params=["residual", "transformer"])
def network(request, rng):
    if request.param == "residual":
        params, x = residual_params(rng), jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32)
        return residual, params, x
    return transformer, transformer_params(rng), jnp.asarray(rng.integers(0, 11, size=(2, 5)))


def counted(fn, params, keep, *args):
    small, cut = jc.shrink(fn, params, keep, *args)
    return jc.trace.cost(small, cut, *args).total.multiply_adds, sum(x.nbytes for x in jax.tree.leaves(cut))


def after_one_more(groups, keep, of="multiply_adds"):
    """The most that one unit costs, more or less than what is kept."""
    sizes = {name: int(kept.sum()) for name, kept in keep.items()}
    now, count = getattr(groups, of)(sizes), getattr(groups, of)
    others = [count({**sizes, name: n}) for name in sizes for n in (sizes[name] - 1, sizes[name] + 1)]
    return max(abs(other - now) for other in others)


@pytest.mark.parametrize("cost", [0.8, 0.5, 0.25])
@pytest.mark.parametrize("scope", ["group", "global"])
@pytest.mark.parametrize("of", ["multiply_adds", "bytes"])
def test_the_shrunk_network_costs_what_was_promised(network, cost, scope, of):
    fn, params, x = network
    groups = jc.trace.coupling(fn, params, x)
    scores = structured.l2(params, groups, members="all")
    keep = structured.keep(scores, groups, cost=cost, of=of, scope=scope, normalize="mean")
    whole, now = counted(fn, params, {}, x), counted(fn, params, keep, x)
    assert (groups.multiply_adds({}), groups.bytes({})) == whole
    assert (groups.multiply_adds(keep), groups.bytes(keep)) == now
    which = ["multiply_adds", "bytes"].index(of)
    assert abs(now[which] - cost * whole[which]) <= after_one_more(groups, keep, of)
    assert all(int(kept.sum()) >= 1 for kept in keep.values())


@pytest.mark.parametrize("scope", ["group", "global"])
def test_nothing_nearer_exists_in_the_same_order(rng, scope):
    params = {"a": rng.normal(size=(3, 5)), "b": rng.normal(size=(5, 4)), "c": rng.normal(size=(4, 2))}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    fn, x = (lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]), jnp.ones((7, 3))
    groups = jc.trace.coupling(fn, params, x)
    scores = structured.l1(params, groups)
    names, sizes = list(scores), [groups[name].size for name in scores]
    if scope == "global":
        flat = [(-float(s), i, j) for i, name in enumerate(names) for j, s in enumerate(scores[name])]
    else:
        flat = [((rank + 0.5) / size, i, rank) for i, size in enumerate(sizes) for rank in range(size)]
    order = [i for _, i, _ in sorted(flat)]
    prefixes = [[max(order[:m].count(i), 1) for i in range(2)] for m in range(len(order) + 1)]
    costs = [7 * (3 * a + a * b + 2 * b) for a, b in prefixes]
    for share in np.linspace(0.15, 1.0, 40):
        keep = structured.keep(scores, groups, cost=share, scope=scope)
        found = groups.multiply_adds(keep)
        assert abs(found - share * costs[-1]) == min(abs(c - share * costs[-1]) for c in costs)
        assert [int(keep[name].sum()) for name in names] in prefixes
        for name in names:
            kept, gone = scores[name][keep[name]], scores[name][~keep[name]]
            assert gone.size == 0 or float(kept.min()) >= float(gone.max())


def test_floors_and_multiples_hold(network):
    fn, params, x = network
    groups = jc.trace.coupling(fn, params, x)
    keep = structured.keep(structured.l1(params, groups), groups, cost=0.7, multiple_of=4, at_least=3, scope="global")
    for name, kept in keep.items():
        n = int(kept.sum())
        assert n == groups[name].size or (n % 4 == 0 and n >= 3)
    assert counted(fn, params, keep, x)[0] == groups.multiply_adds(keep)


@pytest.mark.parametrize("scope", ["group", "global"])
def test_a_traced_cost_gives_the_same_and_compiles_once(network, scope):
    fn, params, x = network
    groups = jc.trace.coupling(fn, params, x)
    scores = structured.l1(params, groups)
    choose = jax.jit(lambda s, c: structured.keep(s, groups, cost=c, scope=scope))
    for cost in (0.35, 0.6, 1.0):
        exact = structured.keep(scores, groups, cost=cost, scope=scope)
        for name, kept in choose(scores, cost).items():
            np.testing.assert_array_equal(kept, exact[name])
    assert choose._cache_size() == 1


def test_any_function_of_the_sizes_is_a_cost(network):
    fn, params, x = network
    groups = jc.trace.coupling(fn, params, x)
    asked = []

    def latency(sizes):
        asked.append(sizes)
        return 1.0 + sum(sizes.values())

    scores = structured.l1(params, groups)
    keep = structured.keep(scores, groups, cost=0.5, of=latency)
    whole = 1 + sum(groups[name].size for name in scores)
    assert abs(1 + sum(int(k.sum()) for k in keep.values()) - whole / 2) <= 0.5
    assert len(asked) < 60
    assert all(isinstance(n, int) for sizes in asked for n in sizes.values())


def test_what_cannot_be_met_is_told(rng):
    params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
    groups = jc.trace.coupling(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((4, 3)))
    scores = structured.l1(params, groups)
    with pytest.raises(ValueError, match=r"found cost=0.2, expected 0.2500 at least"):
        structured.keep(scores, groups, cost=0.2, at_least=2)
    with pytest.raises(ValueError, match=r"cost=1.5 is outside"):
        structured.keep(scores, groups, cost=1.5)
    with pytest.raises(ValueError, match=r"found sparsity=None and cost=None, expected one of the two"):
        structured.keep(scores, groups)
    with pytest.raises(ValueError, match=r"of='latency' is unknown"):
        structured.keep(scores, groups, cost=0.5, of="latency")
    with pytest.raises(ValueError, match=r"these groups do not know the multiply-adds"):
        structured.keep(scores, dict(groups), cost=0.5)


@pytest.mark.parametrize("name", [entry.name for entry in zoo.ZOO])
def test_counts_are_those_of_the_shrunk_network(rng, name):
    model = zoo.built(name)
    args = model.args(2, jax.random.key(0))
    groups = jc.trace.coupling(model.fn, model.params, *args, free_outputs=model.free_outputs)
    assert groups.multiply_adds({}) == jc.trace.cost(model.fn, model.params, *args).total.multiply_adds
    for share in (0.5, 0.9):
        keep = {n: rng.permutation(g.size) < max(1, round(share * g.size)) for n, g in groups.prunable.items()}
        small, cut = jc.shrink(model.fn, model.params, keep, *args, free_outputs=model.free_outputs)
        assert groups.multiply_adds(keep) == jc.trace.cost(small, cut, *args).total.multiply_adds
        assert groups.bytes(keep) == sum(x.nbytes for x in jax.tree.leaves(cut))


def _alike(p, x):
    """Half where it is cut: a product over it computes that once more."""
    return jnp.einsum("bi,ci->bc", jax.nn.sigmoid(x @ p["a"]), jax.nn.sigmoid(x @ p["b"]))


def _alike_heads(p, x):
    q, k = (jax.nn.sigmoid(x @ p[n]).reshape(-1, 2, 3) for n in ("a", "b"))
    return jnp.einsum("bhi,chi->bc", q, k) + jnp.einsum("bhi,bhj->bij", q, k).sum()


def _alike_beside(p, x):
    q = jnp.concatenate([jax.nn.sigmoid(x @ p["a"]), x], 1)
    k = jnp.concatenate([jax.nn.sigmoid(x @ p["b"]), x + 1], 1)
    return jnp.einsum("bi,ci->bc", q, k)


def _alike_inside(p, x):
    def turn(h, _):
        return jax.lax.cond(h.sum() > 0, lambda h: _alike(p, h) @ h, lambda h: h + 1, h), None

    return jax.lax.scan(turn, x, None, length=3)[0]


def _alike_over_tokens(p, x):
    """A value for all channels that goes through a product over tokens before a norm sums it."""
    h = jax.nn.sigmoid(x @ p["a"]).T @ jnp.ones((4, 5)) + x.sum()
    h = h.T - h.mean()
    return jax.nn.softmax(h @ p["b"].T)


@pytest.mark.parametrize("fn", [_alike, _alike_heads, _alike_beside, _alike_inside, _alike_over_tokens])
def test_a_value_that_cut_units_share_counts_once_more(fn):
    params, x = {n: jnp.ones((4, 6)) for n in "ab"}, jnp.ones((4, 4))
    groups = jc.trace.coupling(fn, params, x)
    names = list(groups.prunable)
    traced = jax.jit(lambda sizes: groups.multiply_adds(sizes))
    for sizes in itertools.product(*((1, groups[n].size - 1, groups[n].size) for n in names)):
        keep = {n: np.arange(groups[n].size) < k for n, k in zip(names, sizes, strict=True)}
        expected = counted(fn, params, keep, x)[0]
        assert groups.multiply_adds(keep) == expected
        assert traced(dict(zip(names, sizes, strict=True))) == expected


def test_branches_count_as_the_dearest_and_loops_as_often_as_they_turn():
    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 4)), "c": jnp.ones((6, 6))}

    def fn(p, x):
        def turn(h, _):
            wide = jax.nn.relu(h @ p["a"])
            return jax.lax.cond(h.sum() > 0, lambda w: (w @ p["c"]) @ p["b"], lambda w: w @ p["b"], wide), None

        return jax.lax.scan(turn, x, None, length=3)[0]

    x = jnp.ones((2, 4))
    groups = jc.trace.coupling(fn, params, x)
    for kept, units in itertools.product((2, 6), list(groups.prunable)):
        keep = {units: np.arange(groups[units].size) < kept}
        assert groups.multiply_adds(keep) == counted(fn, params, keep, x)[0]
