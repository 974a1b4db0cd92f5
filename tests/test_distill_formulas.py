"""Each loss of distillation against its formula in NumPy, or what its paper says of it."""

import itertools
import math

import jax
import jax.numpy as jnp
import losses
import numpy as np
import optax
import pytest
from losses import normal

import jcompress as jc
from jcompress import distill


def f64(x):
    return np.asarray(x, np.float64)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def unit(x, axis=-1):
    return x / np.linalg.norm(x, axis=axis, keepdims=True)


def flat(x):
    return x.reshape(len(x), -1)


# Each takes float64 arrays of the student and the teacher.


def _activation_boundaries(s, t):
    return sum(
        (max(0, 1 - a) if b > 0 else max(0, 1 + a)) ** 2 for a, b in zip(s.ravel(), t.ravel(), strict=True)
    ) / len(s)


def _variational(s, t):
    variance = 1e-5 + np.log1p(np.exp(f64(losses.SCALE)))
    return (np.log(np.sqrt(variance)) + (t - s) ** 2 / (2 * variance)).sum() / len(s)


def _selectivity(s, t):
    total = 0
    for a, b in zip(s, t, strict=True):
        a, b = (unit(x.reshape(-1, x.shape[-1]).T) for x in (a, b))
        total += ((b @ b.T) ** 2).mean() + ((a @ a.T) ** 2).mean() - 2 * ((b @ a.T) ** 2).mean()
    return total / len(s)


def _darkrank(s, t):
    total = 0
    for i in range(len(s)):
        others = [j for j in range(len(s)) if j != i]
        ours, theirs = (-3 * np.linalg.norm(unit(flat(x)) - unit(flat(x))[i], axis=1) ** 3 for x in (s, t))
        order = sorted(others, key=lambda j: -theirs[j])
        total -= sum(ours[j] - np.log(np.exp(ours[order[n:]]).sum()) for n, j in enumerate(order))
    return total / len(s)


def _attention(s, t):
    maps = [unit(flat((x**2).sum(-1))) for x in (s, t)]
    return ((maps[0] - maps[1]) ** 2).sum(-1).mean()


def _flow(s, t):
    def flow(x):
        f = x.reshape(len(x), -1, x.shape[-1])
        return np.stack([a.T @ a[:, :2] / f.shape[1] for a in f])

    return ((flow(s) - flow(t)) ** 2).sum((1, 2)).mean()


def _similar(s, t):
    g = [unit(flat(x) @ flat(x).T) for x in (s, t)]
    return ((g[0] - g[1]) ** 2).sum() / len(s) ** 2


def huber(a, b):
    return 0.5 * (a - b) ** 2 if abs(a - b) <= 1 else abs(a - b) - 0.5


def _distance(s, t):
    pairs = list(itertools.permutations(range(len(s)), 2))
    d = [np.array([np.linalg.norm(flat(x)[i] - flat(x)[j]) for i, j in pairs]) for x in (s, t)]
    return np.mean([huber(a, b) for a, b in zip(d[1] / d[1].mean(), d[0] / d[0].mean(), strict=True)])


def _angle(s, t):
    def angles(x):
        x = flat(x)
        return [unit(x[i] - x[j]) @ unit(x[k] - x[j]) for i, j, k in itertools.permutations(range(len(x)), 3)]

    return np.mean([huber(a, b) for a, b in zip(angles(t), angles(s), strict=True)])


def _correlation(s, t):
    def taylor(x):
        c = unit(flat(x)) @ unit(flat(x)).T
        return math.exp(-0.8) * (1 + 0.8 * c + 0.32 * c**2)

    return ((taylor(s) - taylor(t)) ** 2).sum() / len(s) ** 2


def _contrastive(s, t):
    s, t, n = unit(s), unit(t), len(s)
    ratio = (n - 1) / n
    h = np.exp(s @ t.T / 0.07) / (np.exp(s @ t.T / 0.07) + ratio)
    return -np.mean([np.log(h[i, i]) + sum(np.log(1 - h[i, j]) for j in range(n) if j != i) for i in range(n)])


def _values(s, t):
    def relations(x):
        return softmax(x @ np.swapaxes(x, -1, -2) / math.sqrt(x.shape[-1]))

    return kl(relations(t), relations(s)).mean()


FORMULAS = {
    "soft_targets": lambda s, t: 9 * kl(softmax(t / 3), softmax(s / 3)).mean(),
    "logit_matching": lambda s, t: 0.5 * ((s - t) ** 2).sum(-1).mean(),
    "ensemble_targets": lambda s, t: kl(softmax(t), softmax(s)).mean(),
    "confidence_weighted": lambda s, t: (
        softmax(t).max(-1) @ -np.log(softmax(s))[range(6), np.asarray(losses.LABELS)] / softmax(t).max(-1).sum()
    ),
    "probability_errors": lambda s, t: ((softmax(s) - softmax(t)) ** 2).mean(),
    "mean_soft_targets": lambda s, t: kl(softmax(t), softmax(s)).mean(),
    "weighted_teachers": lambda s, t: kl(softmax(t), softmax(s)).mean(),
    "kdgan": lambda s, t: (
        0.5 * (softmax(s) * -np.log1p(np.exp(f64(normal(14, 6, 5))))).sum(-1).mean() + kl(softmax(t), softmax(s)).mean()
    ),
    "generator_errors": lambda s, t: ((s - t) ** 2).sum() / len(s),
    "layer_errors": lambda s, t: ((s - t) ** 2).mean(),
    "cosine_errors": lambda s, t: (1 - (unit(s) * unit(t)).sum(-1)).mean(),
    "patient": lambda s, t: ((unit(s) - unit(t)) ** 2).sum(-1).mean(),
    "hints": lambda s, t: 0.5 * ((s - t) ** 2).sum() / len(s),
    "factor_transfer": lambda s, t: np.abs(unit(flat(s)) - unit(flat(t))).sum(-1).mean(),
    "factor_transfer_2": lambda s, t: np.linalg.norm(unit(flat(s)) - unit(flat(t)), axis=-1).mean(),
    "activation_boundaries": _activation_boundaries,
    "variational_information": _variational,
    "neuron_selectivity": _selectivity,
    "attention_transfer": _attention,
    "attention_divergence": lambda s, t: kl(softmax(t), softmax(s)).mean(),
    "value_relations": _values,
    "fsp": _flow,
    "similarity_preserving": _similar,
    "relational_distance": _distance,
    "relational_angle": _angle,
    "correlation_congruence": _correlation,
    "darkrank": _darkrank,
    "contrastive": _contrastive,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_formula_of_the_paper(name):
    row = losses.ROWS[name]
    leaves = [jax.tree.leaves(x) for x in (row.student, row.teacher)]
    if name == "fsp":  # the flow from the features to their first two channels
        leaves = [x[:1] for x in leaves]
    want = sum(FORMULAS[name](f64(s), f64(t)) for s, t in zip(*leaves, strict=True))
    np.testing.assert_allclose(row.loss(row.student, row.teacher), want, rtol=2e-5)


def test_every_row_has_a_formula_or_a_test_of_its_own():
    assert set(losses.ROWS) - set(FORMULAS) == {"permuted_targets", "distilbert", "tinybert"}


def test_a_student_of_another_width_learns_the_order_of_its_teacher():
    teacher, student = normal(0, 5, 7), normal(1, 5, 2)
    tx = optax.adam(0.1)
    state = tx.init(student)

    def orders(x):
        return np.argsort(np.linalg.norm(unit(f64(x))[:, None] - unit(f64(x))[None], axis=-1), axis=1)

    assert (orders(student) == orders(teacher)).mean() < 0.7
    for _ in range(200):
        updates, state = tx.update(jax.grad(distill.darkrank)(student, teacher), state)
        student = optax.apply_updates(student, updates)
    assert (orders(student) == orders(teacher)).mean() > 0.9


# Logits


def test_at_high_temperature_the_gradient_is_that_of_logit_matching():
    s, t = (z - z.mean(-1, keepdims=True) for z in losses.LOGITS)
    gradient = jax.grad(lambda s: distill.soft_targets(s, t, temperature=1000.0))(s)
    np.testing.assert_allclose(gradient, (s - t) / s.shape[1] / s.shape[0], atol=2e-4)


def test_classes_that_are_masked_in_both_add_nothing():
    s, t = (z.at[:, 2].set(-jnp.inf) for z in losses.LOGITS)
    found, slopes = jax.value_and_grad(distill.soft_targets)(s, t)
    np.testing.assert_allclose(found, distill.soft_targets(*(jnp.delete(z, 2, axis=1) for z in (s, t))), rtol=1e-6)
    assert np.isfinite(slopes).all()


@pytest.mark.parametrize(
    "loss", [distill.soft_targets, distill.logit_matching, distill.layer_errors, distill.cosine_errors, distill.patient]
)
def test_positions_that_do_not_count_may_hold_anything(loss):
    s, t = normal(0, 2, 4, 3), normal(1, 2, 4, 3)
    where = jnp.array([[True] * 4, [True, False, True, False]])
    flat_where = np.flatnonzero(where)
    want = loss(*(x.reshape(8, 3)[flat_where] for x in (s, t)))
    np.testing.assert_allclose(loss(s, t, where=where), want, rtol=1e-6)
    broken = jnp.where(where[..., None], s, jnp.nan)
    found, slopes = jax.value_and_grad(lambda s: loss(s, t, where=where))(broken)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert np.isfinite(slopes).all()
    np.testing.assert_allclose(loss(s, t, where=jnp.ones((2, 4)) * 3), loss(s, t), rtol=1e-6)
    with pytest.raises(ValueError, match="where: found shape"):
        loss(s, t, where=jnp.ones(3))


def test_permuted_targets_keep_the_greatest_and_all_of_the_rest():
    """Against a uniform student the loss is the entropy's, whatever the permutation; its average over keys is even."""
    t = losses.LOGITS[1]
    flat_loss = [distill.permuted_targets(0 * t, t, key=jax.random.key(i)) for i in range(3)]
    np.testing.assert_allclose(flat_loss, [distill.soft_targets(0 * t, t)] * 3, rtol=1e-5)

    def targets(key):  # the slope in the logits of a uniform student is 1/C - p
        return 1 / 5 - 6 * jax.grad(lambda s: distill.permuted_targets(s, t, key=key))(0 * t)

    found = f64(jax.vmap(targets)(jax.random.split(jax.random.key(0), 2000)).mean(0))
    p = softmax(f64(t))
    best = p.argmax(-1)
    np.testing.assert_allclose(found[range(6), best], p.max(-1), rtol=1e-3)
    for i in range(6):
        np.testing.assert_allclose(np.delete(found[i], best[i]), (1 - p[i].max()) / 4, rtol=0.1)


def test_a_noisy_teacher_is_the_clean_one_on_average():
    s, t = losses.LOGITS
    keys = jax.random.split(jax.random.key(1), 4000)
    noisy = jax.vmap(lambda k: distill.noisy_logits(t, 0.5, key=k))(keys)
    ratio = f64(noisy / t - 1)
    disturbed = (abs(ratio) > 1e-5).any(-1)
    np.testing.assert_allclose(disturbed.mean(), 0.8, atol=0.01)
    np.testing.assert_allclose(ratio[disturbed].std(), 0.5, rtol=0.02)
    slopes = jax.vmap(lambda t: jax.grad(distill.logit_matching)(s, t))(noisy).mean(0)
    np.testing.assert_allclose(slopes, jax.grad(distill.logit_matching)(s, t), atol=0.02)


def test_an_ensemble_is_the_mean_of_distributions_and_weights_need_no_sum():
    s, a = losses.LOGITS
    b = normal(5, 6, 5)
    p = (softmax(f64(a) / 2) + 3 * softmax(f64(b) / 2)) / 4
    want = 4 * kl(p, softmax(f64(s) / 2)).mean()
    found = distill.ensemble_targets(s, jnp.stack([a, b]), jnp.array([2.0, 6.0]), temperature=2.0)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    alone = distill.ensemble_targets(s, jnp.stack([a, b]), jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(alone, distill.soft_targets(s, b), rtol=1e-5)


# Features


def test_regressors_are_the_identity_between_equal_shapes_and_bridge_others():
    x = normal(0, 3, 8, 8, 4)
    same = distill.regressors(x, x, key=jax.random.key(0))
    np.testing.assert_allclose(same(x), x, rtol=1e-6)
    student, teacher = [x, normal(1, 3, 5)], [normal(2, 3, 6, 7, 2), normal(3, 3, 9)]
    maps = distill.regressors(student, teacher, key=jax.random.key(0))
    assert maps[0].kernel.shape == (3, 2, 4, 2)
    want = sum(0.5 * ((f64(r(s)) - f64(t)) ** 2).sum() / 3 for r, s, t in zip(maps, student, teacher, strict=True))
    found, slopes = jax.value_and_grad(lambda maps: distill.hints(student, teacher, maps))(maps)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert all(x.any() for x in jax.tree.leaves(slopes))
    with pytest.raises(ValueError, match="pool the larger"):
        distill.regressors(teacher[0], student[0], key=jax.random.key(0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_regressors_take_features_of_another_width(dtype):
    with jax.enable_x64(True):
        student = [jnp.ones((2, 4, 4, 3), dtype)]
        (bridge,) = distill.regressors(student, [jnp.ones((2, 2, 2, 5), dtype)], key=jax.random.key(0))
        assert bridge(student[0]).shape == (2, 2, 2, 5)


def test_activation_boundaries_ignore_magnitudes_beyond_the_margin():
    s, t = losses.SPACE
    base = distill.activation_boundaries(s, t)
    np.testing.assert_allclose(distill.activation_boundaries(s, 100 * t), base, rtol=1e-6)
    assert distill.activation_boundaries(jnp.where(t > 0, 1.0, -1.0), t) == 0
    assert distill.activation_boundaries(jnp.where(t > 0, 0.9, -1.0), t) > 0


def test_the_best_variance_of_variational_information_is_that_of_the_residuals():
    s, t = losses.SPACE
    variance = jnp.mean(jnp.square(s - t), axis=(0, 1, 2))
    scale = jnp.log(jnp.expm1(variance - 1e-5))
    slope = jax.grad(lambda scale: distill.variational_information(s, t, scale))(scale)
    np.testing.assert_allclose(slope, 0, atol=1e-5)


def test_neuron_selectivity_does_not_depend_on_the_order_or_number_of_channels():
    s, t = losses.SPACE
    base = distill.neuron_selectivity(s, t)
    np.testing.assert_allclose(distill.neuron_selectivity(s[..., ::-1], t), base, rtol=1e-5)
    np.testing.assert_allclose(distill.neuron_selectivity(jnp.concatenate([s, s], -1), t), base, rtol=1e-5)
    linear = distill.neuron_selectivity(s, t, kernel=lambda c: c)
    means = [f64(unit(f64(x).reshape(6, 12, 5), axis=1).mean(-1)) for x in (s, t)]
    np.testing.assert_allclose(linear, ((means[0] - means[1]) ** 2).sum(-1).mean(), rtol=1e-4)


# Attention and relations


def test_attention_transfer_takes_any_number_of_channels_and_any_scale():
    s, t = losses.SPACE
    base = distill.attention_transfer(s, t)
    np.testing.assert_allclose(distill.attention_transfer(7 * jnp.concatenate([s, s], -1), t), base, rtol=1e-5)
    distill.attention_transfer(s, losses.WIDER)


def test_relations_take_other_widths_and_do_not_see_rotations():
    s, t = normal(0, 6, 4), normal(1, 6, 4)
    turn = jnp.linalg.qr(normal(2, 4, 4))[0]
    wide = jnp.concatenate([t @ turn, jnp.zeros((6, 3))], -1)
    for loss in (
        distill.similarity_preserving,
        distill.relational_distance,
        distill.relational_angle,
        distill.correlation_congruence,
    ):
        np.testing.assert_allclose(loss(wide, t), 0, atol=1e-6)
        np.testing.assert_allclose(loss(s, wide), loss(s, t), rtol=1e-4)
    for loss in (distill.relational_distance, distill.relational_angle):
        np.testing.assert_allclose(loss(3 * wide + 5, t), 0, atol=1e-6)


def test_the_expansion_of_the_kernel_ends_at_the_kernel():
    s, t = losses.LOGITS
    exact = distill.correlation_congruence(s, t, gamma=1.5, order=None)
    np.testing.assert_allclose(distill.correlation_congruence(s, t, gamma=1.5, order=20), exact, rtol=1e-4)
    k = [np.exp(-1.5 * ((unit(x)[:, None] - unit(x)[None]) ** 2).sum(-1)) for x in (f64(s), f64(t))]
    np.testing.assert_allclose(exact, ((k[0] - k[1]) ** 2).mean(), rtol=1e-4)


def test_relations_of_few_examples_are_numbers():
    x = normal(0, 2, 3)
    assert distill.relational_angle(x, -x[::-1]) == 0
    assert distill.relational_distance(x[:1], -x[:1]) == 0
    assert np.isfinite(distill.contrastive(x[:2], -x[:2]))


def test_the_critic_bounds_mutual_information_and_alignment_is_best():
    t = jnp.eye(5)
    aligned = distill.contrastive(t, t, temperature=1.0)
    for order in itertools.islice(itertools.permutations(range(5)), 1, 30):
        assert distill.contrastive(t[jnp.array(order)], t, temperature=1.0) > aligned
    apart = [distill.contrastive(t, t, negatives=t[jnp.array([i])], size=50) for i in range(5)]
    each = jnp.stack([t] * 5)
    together = distill.contrastive(t, t, negatives=each[:, :1], size=50)
    np.testing.assert_allclose(together, apart[0], rtol=1e-6)
    with pytest.raises(ValueError, match="expected"):
        distill.contrastive(t, t, negatives=each[:3])


def test_value_relations_take_other_widths_and_leave_padding_out():
    s, t = normal(0, 2, 3, 4, 6), normal(1, 2, 3, 4, 5)
    where = jnp.array([[True] * 4, [True, True, False, False]])
    parts = [distill.value_relations(s[:1], t[:1]), distill.value_relations(s[1:, :, :2], t[1:, :, :2])]
    want = (4 * parts[0] + 2 * parts[1]) / 6
    np.testing.assert_allclose(distill.value_relations(s, t, where=where), want, rtol=1e-5)
    broken = jnp.where(where[:, None, :, None], s, jnp.nan)
    np.testing.assert_allclose(distill.value_relations(broken, t, where=where), want, rtol=1e-5)


# Bundles


def test_layer_maps():
    assert distill.layer_map(4, 12) == (2, 5, 8, 11)
    assert distill.layer_map(6, 12) == (1, 3, 5, 7, 9, 11)
    assert distill.layer_map(3, 3) == (0, 1, 2)
    for n in range(1, 8):
        for m in range(1, n + 1):
            for kind in ("uniform", "last", "first"):
                found = distill.layer_map(m, n, kind)
                assert len(found) == m and list(found) == sorted(set(found)) and found[0] >= 0 and found[-1] < n
    with pytest.raises(ValueError, match="5 layers for a teacher of 4"):
        distill.layer_map(5, 4)
    with pytest.raises(ValueError, match="names layer 7"):
        distill.followed("abc", (0, 7))


def test_bundles_are_sums_of_their_parts():
    s, t = losses.BUNDLE
    want = distill.layer_errors([s["embeddings"], s["hidden"], s["attention"]], [t[k] for k in list(s)[:3]])
    np.testing.assert_allclose(distill.tinybert(s, t), want + distill.soft_targets(s["logits"], t["logits"]), rtol=1e-5)
    project = distill.Regressor(2 * jnp.eye(3), jnp.zeros(3))
    only = {"hidden": s["hidden"]}, {"hidden": [2 * x for x in s["hidden"]]}
    np.testing.assert_allclose(distill.tinybert(*only, projections={"hidden": project}), 0, atol=1e-9)
    with pytest.raises(ValueError, match="expected the same"):
        distill.tinybert(s, only[1])
    (a, b), (c, d) = ((x, x[:, :3]) for x in losses.LOGITS)
    want = 5 * distill.soft_targets(a, c, 2.0) + distill.cosine_errors(b, d)
    np.testing.assert_allclose(distill.distilbert((a, b), (c, d)), want, rtol=1e-6)


@pytest.mark.parametrize("loss", [jc.distill.soft_targets, jc.distill.contrastive, jc.distill.ensemble_targets])
@pytest.mark.parametrize("temperature", [0, -1.0])
def test_a_temperature_that_is_not_positive_is_told(loss, temperature):
    x = jnp.ones((2, 2, 3))[: None if loss is distill.ensemble_targets else 1]
    with pytest.raises(ValueError, match="temperature"):
        loss(x[0], x if loss is distill.ensemble_targets else x[0], temperature=temperature)
