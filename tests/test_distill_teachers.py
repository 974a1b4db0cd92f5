"""Teachers that change, and what is learned through the student's training."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from losses import LOGITS, normal
from test_distill_formulas import f64, kl, softmax

import jcompress as jc
from jcompress import distill

# Peers


def test_mutual_learning_is_the_mean_divergence_from_the_others():
    peers = normal(0, 3, 6, 5)
    p = softmax(f64(peers) / 2)
    want = 4 * sum(kl(p[j], p[i]).mean() for i, j in itertools.permutations(range(3), 2)) / 2
    np.testing.assert_allclose(distill.mutual(peers, temperature=2.0), want, rtol=1e-5)
    slope = jax.grad(distill.mutual)(peers)
    alone = jax.grad(lambda s: distill.soft_targets(s, peers[1]) + distill.soft_targets(s, peers[2]))(peers[0])
    np.testing.assert_allclose(slope[0], alone / 2, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="two at least"):
        distill.mutual(peers[:1])


def test_peers_that_begin_alike_stay_alike():
    x, y = normal(1, 8, 3), jnp.arange(8) % 4
    params = jnp.stack([normal(2, 3, 4)] * 2)

    def loss(params):
        logits = x @ params
        hard = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.stack([y, y])).mean(1).sum()
        return hard + distill.mutual(logits)

    for _ in range(3):
        params -= jax.grad(loss)(params)
    np.testing.assert_allclose(params[0], params[1], atol=1e-6)


def test_gates_weigh_branches_and_the_ensemble_teaches_them():
    branches, gates = normal(0, 3, 6, 5), normal(1, 3, 6)
    g = np.exp(f64(gates)) / np.exp(f64(gates)).sum(0)
    ensemble = distill.gated_logits(branches, gates)
    np.testing.assert_allclose(ensemble, (g[..., None] * f64(branches)).sum(0), rtol=1e-5, atol=1e-6)
    want = np.mean([9 * kl(softmax(f64(ensemble) / 3), softmax(f64(b) / 3)).mean() for b in branches])
    np.testing.assert_allclose(distill.mean_soft_targets(branches, ensemble, 3.0), want, rtol=1e-4)
    with pytest.raises(ValueError, match="expected"):
        distill.gated_logits(branches, gates[0])


def test_replicas_follow_the_mean_of_the_others():
    z = normal(0, 4, 6, 5)
    found = jax.vmap(lambda z: distill.codistillation(z, "replica", 2.0), axis_name="replica")(z)
    p = softmax(f64(z) / 2)
    want = [4 * kl(np.delete(p, i, 0).mean(0), p[i]).mean() for i in range(4)]
    np.testing.assert_allclose(found, want, rtol=1e-5)

    def total(z):
        return jnp.sum(jax.vmap(lambda z: distill.codistillation(z, "replica"), axis_name="replica")(z))

    alone = jax.grad(lambda s: distill.ensemble_targets(s, z[1:]))(z[0])
    np.testing.assert_allclose(jax.grad(total)(z)[0], alone, rtol=1e-4, atol=1e-7)


def test_replicas_on_devices():
    z = normal(0, 4, 6, 5)
    mesh = jax.make_mesh((4,), ("replica",), devices=jax.devices()[:4])
    spec = jax.sharding.PartitionSpec("replica")

    z = jax.device_put(z, jax.sharding.NamedSharding(mesh, spec))

    def of_replica(z):
        return distill.codistillation(z[0], "replica")[None]

    found = jax.jit(jax.shard_map(of_replica, mesh=mesh, in_specs=spec, out_specs=spec))(z)
    want = jax.vmap(lambda z: distill.codistillation(z, "replica"), axis_name="replica")(normal(0, 4, 6, 5))
    np.testing.assert_allclose(np.asarray(found), np.asarray(want), rtol=1e-5)


# Memory


def test_a_memory_draws_others_only_and_moves_what_it_is_told():
    bank = distill.memory_bank(5, 3, key=jax.random.key(0))
    numbered = distill.MemoryBank(jnp.arange(5.0)[:, None])
    drawn = distill.draw(numbered, jnp.array([0, 3]), 4000, key=jax.random.key(1))[..., 0]
    for row, own in zip(np.asarray(drawn), (0, 3), strict=True):
        values, counts = np.unique(row, return_counts=True)
        assert list(values) == [i for i in range(5) if i != own]
        np.testing.assert_allclose(counts, 1000, rtol=0.15)
    new = normal(1, 2, 3)
    after = distill.remember(bank, jnp.array([4, 1]), new, momentum=0.25)
    mixed = 0.25 * f64(bank.embeddings[4]) + 0.75 * f64(new[0]) / np.linalg.norm(f64(new[0]))
    np.testing.assert_allclose(after.embeddings[4], mixed / np.linalg.norm(mixed), rtol=1e-5)
    np.testing.assert_array_equal(after.embeddings[jnp.array([0, 2, 3])], bank.embeddings[jnp.array([0, 2, 3])])


def test_a_student_learns_the_teachers_embeddings_from_the_memory():
    teacher = normal(0, 32, 64)
    student = normal(1, 32, 64)

    @jax.jit
    def step(student, bank, key):
        indices = jax.random.permutation(key, 32)[:8]
        negatives = distill.draw(bank, indices, 16, key=key)

        def loss(student):
            return distill.contrastive(student[indices], teacher[indices], negatives, temperature=0.1, size=32)

        student -= 4 * jax.grad(loss)(student)
        return student, distill.remember(bank, indices, teacher[indices])

    bank = distill.memory_bank(32, 64, key=jax.random.key(3))
    for key in jax.random.split(jax.random.key(2), 200):
        student, bank = step(student, bank, key)
    cosines = student @ teacher.T / jnp.linalg.norm(teacher, axis=-1)
    assert jnp.mean(jnp.argmax(cosines, -1) == jnp.arange(32)) > 0.9


# Averages and samples


def test_a_mean_teacher_has_no_bias_towards_its_beginning():
    a, tx = 0.9, distill.mean_teacher(0.9)
    params = {"w": normal(0, 3), "steps": jnp.array(7)}
    state, seen = tx.init(params), []
    update = jax.jit(tx.update)
    for i in range(5):
        updates = {"w": normal(i + 1, 3), "steps": jnp.array(1)}
        found, state = update(updates, state, params)
        assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), found, updates))
        params = optax.apply_updates(params, updates)
        seen.append(f64(params["w"]))
    weights = (1 - a) * a ** np.arange(5)[::-1] / (1 - a**5)
    np.testing.assert_allclose(weights.sum(), 1)
    got = distill.teacher_params(params, {"chain": (optax.EmptyState(), state)})
    np.testing.assert_allclose(got["w"], weights @ np.stack(seen), rtol=1e-5)
    assert got["steps"] == params["steps"]
    with pytest.raises(ValueError, match="found 0 states"):
        distill.teacher_params(params, optax.EmptyState())


def test_a_mean_teacher_of_sixteen_bits_does_not_stand_still():
    tx = distill.mean_teacher(0.999)
    params = jnp.ones(2, jnp.bfloat16)
    state = tx.init(params)
    for _ in range(200):
        _, state = tx.update(jnp.zeros(2, jnp.bfloat16), state, params)
    params = 1.5 * params
    for _ in range(300):
        _, state = tx.update(jnp.zeros(2, jnp.bfloat16), state, params)
    weights = 0.999 ** np.arange(500)[::-1]
    want = (weights[:200].sum() + 1.5 * weights[200:].sum()) / weights.sum()
    np.testing.assert_allclose(state.average, want, rtol=1e-3)
    assert distill.teacher_params(params, state).dtype == jnp.bfloat16


def test_a_decay_of_zeros_and_ones_gives_stale_copies():
    tx = distill.mean_teacher(lambda step: jnp.where(step % 3 == 0, 0.0, 1.0))
    params = jnp.array(0.0)
    state, found = tx.init(params), []
    for _ in range(7):
        _, state = tx.update(jnp.array(1.0), state, params)
        params += 1
        found.append(float(distill.teacher_params(params, state)))
    assert found == [1, 1, 1, 4, 4, 4, 7]


def test_bayesian_dark_knowledge_of_a_linear_gaussian_model():
    """The posterior predictive is known: its mean and variance are what samples and student must find."""
    x, noise, prior = normal(0, 20, 2), 0.5, 1.0
    y = x @ jnp.array([1.0, -2.0]) + noise**0.5 * normal(1, 20)
    cov = np.linalg.inv(f64(x).T @ f64(x) / noise + np.eye(2) / prior)
    mean = cov @ f64(x).T @ f64(y) / noise
    tx = distill.langevin(2e-3, key=jax.random.key(0))

    def energy(w):
        return jnp.sum(jnp.square(y - x @ w)) / (2 * noise) + jnp.sum(w**2) / (2 * prior)

    def step(carry, _):
        w, state = carry
        u, state = tx.update(jax.grad(energy)(w), state)
        return (w + u, state), w + u

    chains = jax.vmap(lambda key: distill.langevin(2e-3, key=key).init(None))(jax.random.split(jax.random.key(4), 16))
    start = jnp.zeros((16, 2))
    run = jax.jit(jax.vmap(lambda w, s: jax.lax.scan(step, (w, s), None, 3000)[1][500:]))
    samples = run(start, chains).reshape(-1, 2)
    np.testing.assert_allclose(samples.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(np.cov(f64(samples).T), cov, atol=0.004)
    at = normal(5, 6, 2)
    teachers = samples[::50] @ at.T
    want = f64(at) @ mean, noise + ((f64(at) @ cov) * f64(at)).sum(-1)
    student = (jnp.zeros(6), jnp.zeros(6))
    slope = jax.jit(jax.grad(lambda s: distill.normal_targets(s, teachers, noise)))
    for _ in range(400):
        student = jax.tree.map(lambda s, g: s - 3 * g, student, slope(student))
    np.testing.assert_allclose(student[0], want[0], atol=0.06)
    np.testing.assert_allclose(np.exp(student[1]), want[1], rtol=0.06)


def test_generations_are_taught_by_the_one_before():
    calls = []

    def train(student, teacher):
        calls.append((student, teacher))
        return student + teacher

    assert distill.generations(train, 1, [10, 20, 30]) == [11, 31, 61]
    assert calls == [(10, 1), (20, 11), (30, 31)]
    assert distill.generations(train, 1, []) == []


# Through training


def test_the_gradient_through_a_gradient():
    x, y = normal(0, 4, 3), normal(1, 4)
    real = normal(2, 8, 3), normal(3, 8)

    def loss(w, data):
        return jnp.mean(jnp.square(jnp.tanh(data[0] @ w) - data[1]))

    def after(synthetic, rates):
        return distill.dataset_distillation(loss, jnp.array([0.1, -0.2, 0.3]), synthetic, real, rates)

    rates = jnp.array([0.3, 0.2])
    slope, to_rates = jax.grad(after, argnums=(0, 1))((x, y), rates)
    for i in range(3):
        step = 1e-2 * jnp.eye(3)[i]
        numeric = (after((x.at[0].add(step), y), rates) - after((x.at[0].add(-step), y), rates)) / 2e-2
        np.testing.assert_allclose(slope[0][0, i], numeric, rtol=0.02, atol=1e-4)
    for i in range(2):
        step = 1e-2 * jnp.eye(2)[i]
        numeric = (after((x, y), rates + step) - after((x, y), rates - step)) / 2e-2
        np.testing.assert_allclose(to_rates[i], numeric, rtol=0.02, atol=1e-4)


def test_one_synthetic_example_trains_a_quadratic_in_one_step():
    """Closed form: a step of rate r moves p to p - 2 r (p - x), and the best x brings it to the mean."""
    real, p, r = normal(0, 20, 2), jnp.array([3.0, -1.0]), 0.2

    def loss(p, x):
        return jnp.mean(jnp.sum(jnp.square(p - x), -1))

    best = p + (real.mean(0) - p) / (2 * r)
    slope = jax.grad(lambda x: distill.dataset_distillation(loss, p, x, real, r))(best[None])
    np.testing.assert_allclose(slope, 0, atol=1e-5)
    np.testing.assert_allclose(distill.after_steps(loss, p, best[None], r), real.mean(0), rtol=1e-5)


def test_the_weight_of_a_useless_teacher_goes_to_zero():
    x, valid = normal(0, 64, 5), normal(1, 64, 5)
    w = normal(2, 5, 3)
    teachers = jnp.stack([2 * x @ w, 3 * normal(3, 64, 3), -2 * x @ w])
    labels = jnp.argmax(valid @ w, -1)

    def train(p, scores):
        return distill.weighted_teachers(x @ p, teachers, scores)

    def held_out(p):
        return optax.softmax_cross_entropy_with_integer_labels(valid @ p, labels).mean()

    @jax.jit
    def step(p, scores):
        scores -= 4 * jax.grad(lambda a: held_out(distill.after_steps(train, p, a, 1.0)))(scores)
        return distill.after_steps(train, p, scores, 1.0), scores

    p, scores = jnp.zeros((5, 3)), jnp.zeros(3)
    for _ in range(150):
        p, scores = step(p, scores)
    weights = jax.nn.softmax(scores)
    assert weights[0] > 0.9 and weights[1] < 0.07 and weights[2] < 0.01
    even = jnp.zeros((5, 3))
    for _ in range(150):
        even = distill.after_steps(train, even, jnp.zeros(3), 1.0)
    assert held_out(p) < held_out(even) / 2


# Labels of which some are wrong


def test_each_network_learns_from_what_its_peer_finds_easy():
    rng = np.random.default_rng(0)
    losses = jnp.asarray(rng.random((3, 10)), jnp.float32)
    weights = distill.co_teaching(losses, 0.4)
    assert weights.sum(-1).tolist() == [4.0] * 3
    for own, theirs in zip(weights, (losses[1], losses[2], losses[0]), strict=True):
        assert theirs[own == 1].max() < theirs[own == 0].min()
    assert distill.co_teaching(jnp.zeros((2, 10)), 0.01).sum(-1).tolist() == [1.0, 1.0]  # and ties keep the count
    assert not jax.grad(lambda x: distill.co_teaching(x, 0.5).sum())(losses).any()
    np.testing.assert_array_equal(jax.jit(distill.co_teaching)(losses, 0.4), weights)
    with pytest.raises(ValueError, match=r"losses \(1, 4\), expected \(networks, batch\) of two"):
        distill.co_teaching(jnp.ones((1, 4)), 0.5)
    with pytest.raises(ValueError, match=r"keep=0, expected a share in"):
        distill.co_teaching(jnp.ones((2, 4)), 0)


def test_wrong_labels_are_left_out():
    x, w = normal(0, 200, 20), normal(1, 20)
    right = (x @ w > 0).astype(jnp.float32)
    wrong = jnp.arange(200) < 60
    labels = jnp.where(wrong, 1 - right, right)

    def trained(keep):
        p, tx = normal(2, 2, 20, scale=0.1), optax.adam(0.1)
        state = tx.init(p)
        for number in range(60):

            def loss(p, share=max(keep, 1 - number / 30)):
                losses = jax.vmap(lambda p: optax.sigmoid_binary_cross_entropy(x @ p, labels))(p)
                weights = distill.co_teaching(losses, share)
                return jnp.sum(weights * losses) / jnp.sum(weights)

            updates, state = tx.update(jax.grad(loss)(p), state)
            p = optax.apply_updates(p, updates)
        return jnp.mean((x @ p.mean(0) > 0) == (right == 1))

    assert trained(0.7) > trained(1.0) + 0.03


# Adversarial


def test_the_discriminator_is_undecided_where_the_labels_are_drawn_as_the_networks_do():
    p = softmax(f64(LOGITS[0]))[:1]
    student = jnp.log(jnp.asarray(p, jnp.float32))
    labels = jnp.arange(5)

    def loss(scores):  # each label as often as the networks draw it
        each = jax.vmap(lambda y: distill.kdgan_discriminator(scores, student, student, y[None]))(labels)
        return jnp.sum(p[0] * each)

    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros((1, 5))), 0, atol=1e-6)
    slopes = jax.grad(distill.kdgan_discriminator, argnums=(1, 2))(jnp.ones((1, 5)), student, student, labels[:1])
    assert not any(x.any() for x in slopes)


def test_the_best_discriminator_in_closed_form():
    s, t = (z[:1] for z in LOGITS)
    truth = np.array([0.1, 0.2, 0.3, 0.25, 0.15])
    drawn = 0.3 * softmax(f64(s))[0] + 0.7 * softmax(f64(t))[0]
    best = jnp.asarray(np.log(truth / drawn), jnp.float32)[None]

    def loss(scores):
        each = jax.vmap(lambda y: distill.kdgan_discriminator(scores, s, t, y[None], 0.3))(jnp.arange(5))
        return jnp.sum(truth * each)

    np.testing.assert_allclose(jax.grad(loss)(best), 0, atol=1e-6)


def test_a_classifier_without_distillation_moves_to_what_the_discriminator_believes():
    scores = jnp.array([[-2.0, 3.0, 0.0, 0.0, 0.0]])
    s = jnp.zeros((1, 5))
    slope = jax.grad(lambda s: distill.kdgan(s, s, scores, distillation=0.0))(s)
    assert jnp.argmin(slope) == 1 and jnp.argmax(slope) == 0


def test_generators():
    s, t = normal(0, 4, 3, 2), normal(1, 4, 3, 2)
    scores = normal(2, 4)
    near = ((f64(s) - f64(t)) ** 2).sum((1, 2)).mean()
    want = 0.3 * np.log1p(np.exp(-f64(scores))).mean() + 0.7 * near
    np.testing.assert_allclose(distill.generator_errors(s, t, scores, 0.3), want, rtol=1e-5)


# Without data


def test_moments_and_their_errors():
    x = normal(0, 50, 3, 4, scale=2.0) + jnp.arange(4.0)
    stored = distill.moments_of({"a": x})
    np.testing.assert_allclose(stored["a"].mean, f64(x).mean((0, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stored["a"].variance, f64(x).var((0, 1)), rtol=1e-4)
    assert distill.moment_errors({"a": x[::-1]}, stored) < 1e-6
    moved = distill.moment_errors({"a": x + jnp.sqrt(stored["a"].variance)}, stored)
    np.testing.assert_allclose(moved, 1, rtol=1e-3)
    with pytest.raises(ValueError, match="moment_errors: found"):
        distill.moment_errors({"b": x}, stored)
    with pytest.raises(ValueError, match="moment_errors: found"):
        distill.moment_errors({"a": x[..., :2]}, stored)


def test_inputs_are_made_from_stored_moments_alone_and_teach_a_student():
    data = normal(0, 400, 6) @ normal(1, 6, 6) + 2
    w, u = normal(2, 6, 8), normal(3, 8, 4)

    def teacher(x):
        hidden = jax.nn.relu(x @ w - 1)
        return {"in": x, "hidden": hidden}, hidden @ u

    stored = distill.moments_of(teacher(data)[0])
    made, errors = distill.synthesize(
        lambda x: distill.moment_errors(teacher(x)[0], stored), normal(4, 200, 6), optax.adam(0.05), 300
    )
    assert errors.shape == (300,) and errors[-1] < 0.02 * errors[0]

    def fit(x):
        student = normal(5, 6, 4, scale=0.01)
        design = jnp.concatenate([x, jnp.ones((len(x), 1))], -1)
        student = jnp.linalg.lstsq(design, teacher(x)[1])[0]
        return distill.logit_matching(data @ student[:-1] + student[-1], teacher(data)[1])

    noise, best = fit(normal(6, 200, 6)), fit(data)
    assert best <= fit(made) < 0.5 * noise


def test_a_prior_of_inputs():
    sure = 20 * jnp.eye(4)
    np.testing.assert_allclose(distill.generator_prior(sure), -5 * np.log(4), rtol=1e-4)
    alike = jnp.tile(sure[:1], (4, 1))
    np.testing.assert_allclose(distill.generator_prior(alike), 0, atol=1e-5)
    f = normal(0, 4, 3)
    np.testing.assert_allclose(
        distill.generator_prior(sure, f) - distill.generator_prior(sure), -0.1 * np.abs(f64(f)).mean(), rtol=1e-3
    )


# Sequences

VOCABULARY, END = 4, 3


def _model(seed):
    """A model with a memory: what comes depends on the two tokens before."""
    table = normal(seed, VOCABULARY, VOCABULARY, VOCABULARY, scale=1.5)
    return table, lambda before, token: (table[before, token], token)


def _all(table, length):
    """Every sequence with its log probability, by enumeration."""
    log_p = np.log(softmax(f64(table)))
    found = {}
    for tokens in itertools.product(range(VOCABULARY), repeat=length):
        total, a, b, done = 0.0, 0, 0, False
        for i, token in enumerate(tokens):
            if done:
                break
            total += log_p[a, b, token]
            a, b = b, token
            if token == END:
                tokens, done = tokens[: i + 1] + (END,) * (length - i - 1), True
        found[tokens] = total
    return found


@pytest.mark.parametrize("seed", range(3))
def test_enough_beams_find_the_most_likely_sequences(seed):
    table, step = _model(seed)
    every = sorted(_all(table, 4).items(), key=lambda item: -item[1])
    found = distill.beam_search(step, jnp.array(0), 0, END, beams=4**3, length=4)
    for i in range(10):
        assert tuple(np.asarray(found.tokens[i])) == every[i][0]
        np.testing.assert_allclose(found.log_probs[i], every[i][1], rtol=1e-4)


def test_one_beam_is_greedy_and_more_beams_are_never_worse():
    table, step = _model(4)
    a, b, greedy = 0, 0, []
    for _ in range(5):
        token = END if greedy and greedy[-1] == END else int(jnp.argmax(table[a, b]))
        greedy.append(token)
        a, b = b, token
    one = distill.beam_search(step, jnp.array(0), 0, END, beams=1, length=5)
    assert one.tokens[0].tolist() == greedy
    best = [float(distill.beam_search(step, jnp.array(0), 0, END, n, 5).log_probs[0]) for n in (1, 4, 64)]
    assert best[0] <= best[2] and best[1] <= best[2] + 1e-5


def test_ranks_by_length_under_vmap_and_jit():
    table, step = _model(5)
    every = _all(table, 3)

    def rank(item):
        tokens, total = item
        n = tokens.index(END) + 1 if END in tokens else 3
        return total / n

    want = max(every.items(), key=rank)[0]
    search = jax.jit(jax.vmap(lambda s: distill.beam_search(step, s, 0, END, 64, 3, length_penalty=1.0)))
    found = search(jnp.array([0, 0]))
    assert tuple(np.asarray(found.tokens[1, 0])) == want
    with pytest.raises(ValueError, match="0 beams"):
        distill.beam_search(step, jnp.array(0), 0, END, 0, 3)


def test_a_student_trained_on_the_search_gives_its_sequence():
    _, step = _model(6)
    found = distill.beam_search(step, jnp.array(0), 0, END, 64, 4)
    target = found.tokens[:1]
    logits = jnp.zeros((1, 4, VOCABULARY))
    for _ in range(50):
        logits -= 2 * jax.grad(lambda z: distill.sequence_errors(z, target, end=END))(logits)
    n = [*target[0].tolist(), END].index(END) + 1
    assert jnp.argmax(logits, -1)[0, :n].tolist() == target[0, :n].tolist()
    np.testing.assert_array_equal(logits[0, n:], 0)


def test_the_error_of_a_sequence_counts_its_tokens():
    z, tokens = normal(0, 2, 3, 4), jnp.array([[1, 3, 0], [2, 2, 1]])
    log_p = np.log(softmax(f64(z)))
    terms = [log_p[0, 0, 1], log_p[0, 1, 3], log_p[1, 0, 2], log_p[1, 1, 2], log_p[1, 2, 1]]
    np.testing.assert_allclose(distill.sequence_errors(z, tokens, end=3), -np.mean(terms), rtol=1e-5)
    with pytest.raises(ValueError, match="found logits"):
        jc.distill.sequence_errors(z, tokens[:, :2])
