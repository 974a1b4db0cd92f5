"""Dynamic networks: what each example costs, and that leaving work out changes nothing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compact import normal
from flax import nnx

import jcompress as jc

KEY = jax.random.key(0)
X = normal(0, 6, 4)


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


def flat(x):
    return x.reshape(len(x), -1)


def exits(rngs):
    stages, heads = ([nnx.Linear(4, m, rngs=rngs) for _ in range(3)] for m in (4, 3))
    return jc.nn.EarlyExit([lambda x: x, *stages[1:]], heads, [0.7, 0.9])


def blocks(rngs):
    return jc.nn.GatedBlocks([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)], 4, rngs=rngs)


class Slim(nnx.Module):
    def __init__(self, *, rngs):
        self.first = jc.nn.SlimmableConv(4, 8, (), rngs=rngs)
        self.norm = jc.nn.SlimmableBatchNorm(8, (0.5, 1.0), use_running_average=True, rngs=rngs)
        self.head = jc.nn.SlimmableConv(8, 3, (), rngs=rngs)

    def __call__(self, x, width=0.5):
        return self.head(nnx.relu(self.norm(self.first(x, width), width)))


def capacity(rngs):
    coarse = nnx.Conv(1, 3, (2, 2), strides=2, padding="VALID", rngs=rngs)
    fine, top = (nnx.Sequential(flat, nnx.Linear(n, m, rngs=rngs)) for n, m in ((4, 3), (12, 3)))
    net = jc.nn.DynamicCapacity(coarse, fine, top, k=2)
    return nnx.Sequential(lambda x: jnp.concatenate([x] * 4, -1).reshape(-1, 4, 4, 1), net)


NETWORKS = {
    "EarlyExit": exits,
    "GatedBlocks": blocks,
    "SparseExperts": lambda r: jc.nn.SparseExperts(4, 3, 5, experts=3, k=2, rngs=r),
    "AdaptiveSteps": lambda r: jc.nn.AdaptiveSteps(nnx.Linear(4, 4, rngs=r), 4, steps=3, rngs=r),
    "StochasticDepth": lambda r: jc.nn.StochasticDepth(nnx.Linear(4, 4, rngs=r), 0.8),
    "Slimmable": lambda r: Slim(rngs=r),
    "DynamicCapacity": capacity,
}
EACH = pytest.mark.parametrize("name", ["EarlyExit", "GatedBlocks", "AdaptiveSteps"])


def built(name):
    graph, state = nnx.split(NETWORKS[name](nnx.Rngs(0)))
    drawn = [normal(i + 10, *x.shape) for i, x in enumerate(jax.tree.leaves(state))]
    drawn = [jnp.abs(x) if path.endswith("var") else x for (path, _), x in zip(jc.paths(state), drawn, strict=True)]
    return graph, jax.tree.structure(state).unflatten(drawn)


@EACH
def test_examples_one_by_one_are_as_the_masked_batch(name):
    graph, state = built(name)
    run = jax.jit(lambda state, x, each: nnx.merge(graph, state)(x, each=each), static_argnums=2)
    for a, b in zip(run(state, X, True), run(state, X, False), strict=True):
        close(a, b)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_verb(name, tmp_path):
    """Statistics, coupling with shrinking, codes on the fly, costs and files."""
    graph, state = built(name)

    def fn(state, x):
        return jax.tree.leaves(nnx.merge(graph, state)(x))[0]

    cost = jc.trace.cost(fn, state, X)
    kernels = [path for path, x in jc.paths(state) if x.ndim > 1]
    assert cost.total.multiply_adds > 0 and not cost.notes
    _, stats = jc.trace.observe(fn, state, X)
    told = {**stats.notes, **stats.unread}
    assert all(path in stats or told.get(path) for path in kernels), told
    groups = jc.trace.coupling(fn, state, X)
    assert not groups.unread and all(group.reason for name, group in groups.items() if name not in groups.prunable)
    keep = {name: jnp.arange(group.size) != 1 for name, group in groups.prunable.items()}
    if keep:
        small, params = jc.shrink(fn, state, keep, X)
        close(jax.jit(small)(params, X), jax.jit(fn)(jc.trace.mask(state, groups, keep), X))
    plan = jc.plan(state, [*((path, jc.quantize.Int(bits=8)) for path in kernels), (".*", None)])
    nodes = jc.compress(state, plan)
    dense = jc.materialize(nodes)
    close(jax.jit(jc.accelerate(fn))(nodes, X), jax.jit(fn)(dense, X), 1e-4)
    jc.save(tmp_path / "net.jc", nodes)
    model = NETWORKS[name](nnx.Rngs(1))
    nnx.update(model, jc.materialize(jc.load(tmp_path / "net.jc")))
    close(jax.tree.leaves(model(X))[0], jax.jit(fn)(dense, X), 1e-4)


def test_thresholds_at_their_ends():
    model = exits(nnx.Rngs(0))
    logits = model.all_logits(X)
    for limits, exit in (([0.0, 0.0], 2), ([jnp.inf, 0.0], 0), ([0.0, jnp.inf], 1)):
        found, taken = jc.nn.early_exit(list(model.stages), list(model.heads), X, limits)
        assert taken.tolist() == [exit] * 6
        close(found, logits[exit])


def test_entropy_and_the_joint_loss():
    logits, labels = normal(1, 5, 4), jnp.array([0, 1, 2, 3, 0])
    p = jax.nn.softmax(logits)
    close(jc.nn.exit_entropy(logits), -(p * jnp.log(p)).sum(-1))
    assert float(jc.nn.exit_entropy(jnp.array([jnp.inf, 0.0]).clip(max=1e30))) == 0
    each = [-float(jnp.log(p)[jnp.arange(5), labels].mean())] * 2
    close(jc.nn.exit_loss([logits, logits], labels, (1.0, 0.3)), 1.3 * each[0])


def sample():
    """Heads of rising accuracy, and labels."""
    labels = np.random.default_rng(0).integers(0, 5, 400)
    right = np.asarray(jax.nn.one_hot(labels, 5)) * 4
    return jnp.stack(
        [jnp.asarray(right) + normal(e, 400, 5) * noise for e, noise in enumerate((2.5, 1.8, 0.8))]
    ), labels


def test_calibrated_thresholds_keep_their_aim():
    logits, labels = sample()
    costs = (1.0, 2.0, 4.0)
    whole = jc.nn.exits_at(logits, labels, costs, (0.0, 0.0))
    assert whole.shares == (0.0, 0.0, 1.0) and whole.cost == 4.0
    for aim in (2.0, 3.0):
        found = jc.nn.calibrate_exits(logits, labels, costs, cost=aim)
        assert found.cost <= aim
        assert found == jc.nn.exits_at(logits, labels, costs, found.thresholds)
        assert found.cost == pytest.approx(np.dot(found.shares, costs))
        # As good as the best of a grid of thresholds, but for a percent.
        grid = [jc.nn.exits_at(logits, labels, costs, t) for t in itertools.product(np.linspace(0, 1.7, 12), repeat=2)]
        assert found.accuracy >= max(p.accuracy for p in grid if p.cost <= aim) - 0.01
    found = jc.nn.calibrate_exits(logits, labels, costs, accuracy=whole.accuracy - 0.02)
    assert found.accuracy >= whole.accuracy - 0.02 and found.cost < 3


def test_rates_of_survival_and_the_mean():
    assert jc.nn.survival_rates(4, 0.5) == (0.875, 0.75, 0.625, 0.5)
    x, branch = normal(1, 20000, 1), normal(2, 20000, 1)
    y = jc.nn.stochastic_depth(x, branch, 0.3, key=KEY)
    stays = np.isclose(y, x + branch)
    assert np.all(stays | np.isclose(y, x)) and abs(stays.mean() - 0.3) < 0.02
    close(jc.nn.stochastic_depth(x, branch, 0.3), x + 0.3 * branch)


def test_old_and_new_channels_survive_apart():
    x, branch = normal(1, 20000, 1), normal(2, 20000, 3)
    y = jc.nn.separated_stochastic_depth(x, branch, 0.3, key=KEY)
    old, new = np.isclose(y[:, 0], x[:, 0] + branch[:, 0]), np.isclose(y[:, 1:], branch[:, 1:]).all(-1)
    assert np.all(old | np.isclose(y[:, 0], x[:, 0])) and np.all(new | (y[:, 1:] == 0).all(-1))
    np.testing.assert_allclose([old.mean(), new.mean(), (old & new).mean()], [0.3, 0.3, 0.09], atol=0.02)
    close(jc.nn.separated_stochastic_depth(x, branch, 0.3), jnp.pad(x, ((0, 0), (0, 2))) + 0.3 * branch)
    close(jc.nn.separated_stochastic_depth(x, branch[:, :1], 0.3), jc.nn.stochastic_depth(x, branch[:, :1], 0.3))


def test_reinforce_is_unbiased():
    """Summed over all gates with their probabilities, its gradient is that of the expected reward."""
    z, reward = normal(3, 3), normal(4, 8)
    every = jnp.array(list(itertools.product([0.0, 1.0], repeat=3)))

    def probabilities(z):
        p = jax.nn.sigmoid(z)
        return jnp.prod(jnp.where(every > 0, p, 1 - p), -1)

    expected = jax.grad(lambda z: -(probabilities(z) * reward).sum())(z)
    slopes = jax.vmap(
        lambda g, r, b: jax.grad(lambda z: jc.nn.reinforce_loss(z[None], g[None], r[None], b))(z), (0, 0, None)
    )
    for baseline in (0.0, 5.0):
        close((probabilities(z)[:, None] * slopes(every, reward, baseline)).sum(0), expected)


def test_gumbel_gates_open_as_often_as_they_should():
    z = jnp.array([-1.0, 0.0, 2.0])
    gates = jc.nn.gumbel_gates(jnp.broadcast_to(z, (20000, 3)), key=KEY)
    assert set(np.unique(gates).round(6)) == {0.0, 1.0}
    close(gates.mean(0), jax.nn.sigmoid(z), 0.02)
    soft = jax.grad(lambda z: jc.nn.gumbel_gates(z, KEY, hard=False).sum())(z)
    close(jax.grad(lambda z: jc.nn.gumbel_gates(z, KEY).sum())(z), soft)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_experts_sorted_are_experts_masked(k):
    x, logits = normal(1, 7, 3), normal(2, 7, 4)
    up, down = normal(3, 4, 3, 5), normal(4, 4, 5, 2)
    gates, load = jc.nn.noisy_top_k(logits, k)
    assert (np.asarray(gates > 0).sum(-1) == k).all() and float(load.sum()) == 7 * k
    close(gates.sum(-1), jnp.ones(7))
    want = sum(gates[:, e, None] * (jax.nn.relu(x @ up[e]) @ down[e]) for e in range(4))
    close(jc.nn.sparse_experts(x, gates, up, down, k), want, 1e-4)
    close(jc.nn.sparse_experts(x, gates, up, down, k, dense=True), want, 1e-4)
    cost = jc.trace.cost(lambda p, x, g: jc.nn.sparse_experts(x, g, p["u"], p["d"], k), {"u": up, "d": down}, x, gates)
    assert cost.total.multiply_adds == 7 * k * (3 * 5 + 5 * 2)


def test_load_is_the_expected_number_of_examples():
    """Against draws of one example's own noise, the other experts' held as they are."""
    logits, noise = normal(1, 1, 4), normal(2, 1, 4)
    drawn = logits + jax.nn.softplus(noise) * jax.random.normal(KEY, logits.shape)
    _, load = jc.nn.noisy_top_k(logits, 2, noise, KEY)
    again = jax.random.normal(jax.random.key(1), (20000, 4))
    for i in range(4):
        others = jnp.delete(drawn[0], i)
        limit = jnp.sort(others)[-2]
        mine = logits[0, i] + jax.nn.softplus(noise[0, i]) * again[:, i]
        close(load[i], (mine > limit).mean(), 0.015)
    assert float(jc.nn.balance_loss(jnp.full(4, 3.0))) == 0


def test_halting_mass_sums_to_one():
    p = jax.nn.sigmoid(normal(5, 6, 1))

    def halt(state):
        return jnp.clip(p[:, 0] * state[:, 0], 0, 1)

    mean, ponder, weights = jc.nn.adaptive_steps(lambda s: s + 0.4, halt, jnp.zeros((6, 2)), steps=5)
    close(weights.sum(-1), jnp.ones(6))
    states = 0.4 * jnp.arange(1, 6)
    close(mean[:, 0], weights @ states)
    h = np.clip(np.asarray(p) * np.asarray(states), 0, 1)
    for i in range(6):
        n = next((n for n in range(5) if h[i, : n + 1].sum() >= 0.99), 4)
        close(ponder[i], n + 1 + 1 - h[i, :n].sum())


def test_widths_are_the_first_channels_with_their_own_statistics():
    x, kernel, bias = normal(0, 2, 5, 5, 3), normal(1, 3, 3, 4, 8), normal(2, 8)
    y = jc.nn.slim_convolution(x, kernel, bias, width=0.5)
    conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    conv.kernel[...], conv.bias[...] = kernel[:, :, :3, :4], bias[:4]
    close(y, conv(x))
    norm = jc.nn.SlimmableBatchNorm(4, (0.5, 1.0), momentum=0.0, rngs=nnx.Rngs(0))
    half, whole = normal(1, 50, 2), 3 * normal(2, 50, 4) + 1
    norm(half, 0.5), norm(whole, 1.0)
    for part, seen in zip(norm.norms, (half, whole), strict=True):
        close(part.mean[...], seen.mean(0))
        close(part.var[...], seen.var(0), 1e-4)


def test_a_fine_network_on_all_patches_is_the_fine_network():
    x, w = normal(0, 2, 6, 6, 1), normal(1, 4, 3)
    top = lambda c: flat(c) @ normal(2, 27, 5)  # noqa: E731
    fine = lambda p: jax.nn.relu(flat(p) @ w)  # noqa: E731
    coarse = lambda x: jnp.zeros((2, 3, 3, 3))  # noqa: E731
    patches = x.reshape(2, 3, 2, 3, 2, 1).swapaxes(2, 3).reshape(18, 2, 2, 1)
    logits, chosen = jc.nn.dynamic_capacity(x, coarse, fine, top, k=9)
    close(logits, top(fine(patches).reshape(2, 3, 3, 3)))
    c = normal(3, 2, 3, 3, 3)
    saliency = jc.nn.entropy_saliency(top, c)
    slope = jax.grad(lambda c: jc.nn.exit_entropy(top(c)).sum())(c)
    close(saliency, jnp.linalg.norm(slope, axis=-1))
    _, chosen = jc.nn.dynamic_capacity(x, lambda x: c, fine, top, k=2)
    assert (chosen == jax.lax.top_k(saliency.reshape(2, -1), 2)[1]).all()


LOGITS = jnp.zeros((2, 4, 3))
WRONG = {
    "2 stages, 1 heads": lambda: jc.nn.early_exit([flat] * 2, [flat], X, [0.1]),
    "3 stages": lambda: jc.nn.EarlyExit([flat] * 3, [flat] * 3, [0.1]),
    "expected one of them": lambda: jc.nn.calibrate_exits(LOGITS, jnp.zeros(4, int), (1, 2)),
    "a cost for each exit": lambda: jc.nn.calibrate_exits(LOGITS, jnp.zeros(4, int), (1,), cost=1.0),
    "no thresholds reach cost 0.5": lambda: jc.nn.calibrate_exits(LOGITS, jnp.zeros(4, int), (1, 2), cost=0.5),
    "exit 0 never fires": lambda: jc.nn.calibrate_exits(
        jnp.array([[[0.0, 1.0]], [[1.0, 0.0]]]), jnp.array([0]), (1, 2), accuracy=1.0
    ),
    "2 weights": lambda: jc.nn.exit_loss([LOGITS[0]], jnp.zeros(4, int), (1.0, 2.0)),
    "1 thresholds, expected": lambda: jc.nn.first_exit(jnp.zeros((4, 2)), [0.5]),
    "survival 0": lambda: jc.nn.StochasticDepth(flat, 0),
    "a branch \\(6, 3\\)": lambda: jc.nn.stochastic_depth(X, X[:, 1:], 0.5),
    "branch \\(6, 2\\), expected equal shapes but": lambda: jc.nn.separated_stochastic_depth(X, X[:, :2], 0.5),
    "last 1.5": lambda: jc.nn.survival_rates(3, 1.5),
    "temperature 0": lambda: jc.nn.gumbel_gates(X, temperature=0),
    "gates \\(6, 4\\), expected \\(6, 1\\)": lambda: jc.nn.gated_blocks(X, [flat], X),
    "no block": lambda: jc.nn.GatedBlocks([], 4, rngs=nnx.Rngs(0)),
    "k 5 of 4": lambda: jc.nn.noisy_top_k(X, 5),
    "no noise": lambda: jc.nn.noisy_top_k(X, 2, key=KEY),
    "0 steps": lambda: jc.nn.adaptive_steps(flat, flat, X, 0),
    "width 0.3": lambda: jc.nn.SlimmableBatchNorm(4, (0.5, 1.0), rngs=nnx.Rngs(0))(X, 0.3),
    "width 2": lambda: jc.nn.slim_channels(4, 2),
    "at most its inputs": lambda: jc.nn.slim_convolution(X[:, None], jnp.ones((1, 3, 2))),
    "k 5 of 4 patches": lambda: jc.nn.dynamic_capacity(
        jnp.ones((1, 4, 4, 1)), lambda x: x[:, ::2, ::2], flat, flat, k=5
    ),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_does_not_fit_is_told(words):
    with pytest.raises(ValueError, match=words):
        WRONG[words]()
