"""The samplers of sdd.py and lab/sdd_variants.py against exact distributions: steps of z, chains by
quadrature, joint distributions of two and three tokens, what is given, temperature, guidance,
orders, remasking, the candidates on the way, the original's sampler."""
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import sdd
from lab import sdd_variants as lab
from sdd_tables import Oracle, believed, chain_distribution, dirichlet, marginals, path, settings
from tables import all_rows, chi_square, generator, row_counts

CLEAN = sdd.CLEAN
JOINT, THREE = dirichlet(4, 2, 3), dirichlet(3, 3, 2)
TWO = torch.tensor([0.5, 0.12, 0.06, 0.32]).double()  # V = 2, T = 2
SAMPLERS = pytest.mark.parametrize("sampler", ["token", "ancestral", "deterministic"])
REMASK = dict(order="maxprob", remask="conf")


def config(V=4, T=2, **changes):
    return lab.Config(**settings(V, T, **changes))


def three(tilt=0.0, k=0):
    return Oracle(THREE, 3, 3, tilt, k)


def draw(model, cfg, x=20_000, seed=1, sample=sdd.sample):
    """Samples and NFE, from the canvas x (n, T), or so many rows of nothing."""
    if isinstance(x, int):
        x = torch.full((x, cfg.seq_len), cfg.vocab_size)
    before, frames = x.clone(), []
    out, nfe = sample(model, x, cfg, generator(seed), on_step=lambda k, x: frames.append((k, x)))
    assert torch.equal(x, before) and 0 <= out.min() and out.max() < cfg.vocab_size
    assert torch.equal(out[x < cfg.vocab_size], x[x < cfg.vocab_size])
    assert not frames or frames[-1][0] == nfe and torch.equal(frames[-1][1], out)
    return out, nfe


def film(model, cfg, x, seed=1):
    """Samples, and the frames' NFE, precision (N, n, T), ids and logp (N, n, T, K)."""
    x = torch.full((x, cfg.seq_len), cfg.vocab_size) if isinstance(x, int) else x
    x, frames = lab.candidate_trace(model, x, cfg, generator(seed))
    nfe, *rest = zip(*frames)
    return x, nfe, *map(torch.stack, rest)


def normal(x, mean, variance, width=4.5):
    """Do numbers (n, ...) have this mean and variance, within so many standard errors?"""
    x, n = x.double(), len(x)
    mean, variance = (torch.as_tensor(y).double() for y in (mean, variance))
    return ((x.mean(0) - mean).abs() < width * (variance / n).sqrt() + 1e-5).all() and \
        ((x.var(0) - variance).abs() < width * variance * (2 / n) ** 0.5 + 1e-5).all()


# ---- a step of z


def several(prec, V=3, n=30_000, seed=1):
    """z of precision prec of token 1: (n, V)."""
    eps = torch.randn(n, V, generator=generator(seed))
    return prec * F.one_hot(torch.tensor(1), V) + prec ** 0.5 * eps


def moved(z, t, s, h, sampler="token", seed=2):
    xi = torch.randn(z.shape, generator=generator(seed))
    t, s = (torch.full((len(z),), float(y)) for y in (t, s))
    return sdd.sampler_step(z, t, s, h, xi, sampler)


@pytest.mark.parametrize("sampler", ["token", "ancestral"])
@pytest.mark.parametrize("t, half, s", [(0.0, 1.0, 4.0), (2.0, 2.5, 9.0), (5.0, 120.0, 200.0)])
def test_a_step_up_has_the_distribution_of_more_observations(sampler, t, half, s):
    """(E1) (E7) towards e_x: Normal(s e_x, s), the increment independent of what was; two steps are
    distributed as one; towards any h the mean moves by (s - t) h."""
    e = F.one_hot(torch.tensor(1), 3).float().expand(30_000, 3)
    z = several(t)
    once = moved(z, t, s, e, sampler)
    twice = moved(moved(z, t, half, e, sampler), half, s, e, sampler, 3)
    for after in (once, twice):
        assert normal(after, s * e[0], s) and normal(after - z, (s - t) * e[0], s - t)
        both = ((after - z - (s - t) * e[0]) * (z - t * e[0])).double().mean(0)
        assert (both.abs() < 4.5 * ((s - t) * t / len(z)) ** 0.5 + 1e-5).all()
    h = torch.tensor([0.2, 0.7, 0.1])
    assert normal(moved(z, t, s, h.expand_as(z), sampler) - z, (s - t) * h, s - t)


@SAMPLERS
@pytest.mark.parametrize("t, s", [(9.0, 4.0), (200.0, 3.0), (50.0, 49.0), (7.0, 0.0)])
def test_a_step_down_is_what_fewer_observations_would_have_shown(sampler, t, s):
    """(E8) Normal(s e_x, s), covariance with what was s, as of two times of one Brownian motion, of
    which z_t - z_s is independent; h is of no matter; nothing is nothing."""
    z, e = several(t), torch.tensor([0.0, 1.0, 0.0])
    after = moved(z, t, s, torch.full_like(z, 7.0), sampler)
    assert normal(after, s * e, s) and normal(z - after, (t - s) * e, t - s)
    low, high = (after - s * e).double(), (z - t * e).double()
    assert ((low * high).mean(0) - s).abs().max() < 4.5 * (t * s * 2 / len(z)) ** 0.5 + 1e-5
    wide = 4.5 * (s * (t - s) / len(z)) ** 0.5 + 1e-5
    assert (low * (high - low)).mean(0).abs().max() < wide and (s > 0 or (after == 0).all())


def test_rows_of_one_step_go_up_and_down():
    """(E7) (E8) rows of different precisions at once: some rise, some fall."""
    n = 30_000
    t, s = torch.tensor([2.0, 8.0, 0.0]).repeat(n), torch.tensor([6.0, 3.0, 1.0]).repeat(n)
    e = F.one_hot(torch.tensor(1), 3).float().expand(3 * n, 3)
    z = sdd.q_sample(torch.ones(3 * n).long(), t, torch.randn(3 * n, 3, generator=generator(1)))
    xi = torch.randn(3 * n, 3, generator=generator(2))
    after = sdd.sampler_step(z, t, s, e, xi, "token")
    for i, level in enumerate((6.0, 3.0, 1.0)):
        assert normal(after[i::3], level * e[0], level)


def test_the_deterministic_step_is_the_flow_of_one_prediction():
    """(E7) dz/ds = (p + z / s) / 2 with a fixed p, by many small Euler steps; halves compose; from
    nothing s p + sqrt(s) xi."""
    p, t, s, n = torch.tensor([[0.2, 0.7, 0.1]]).double(), 1.5, 7.0, 20_000
    z = torch.tensor([[1.0, -2.0, 3.0]]).double()
    y = z.clone()
    for k in range(n):
        y = y + (p + y / (t + (s - t) * (k + 0.5) / n)) / 2 * (s - t) / n
    got = moved(z, t, s, p, "deterministic")
    assert torch.allclose(got, y, atol=1e-3)
    halves = moved(moved(z, t, 4, p, "deterministic"), 4, s, p, "deterministic")
    assert torch.allclose(halves, got, atol=1e-5)
    xi = torch.randn(1, 3, generator=generator(2))
    nothing = moved(0 * z.float(), 0, s, p.float(), "deterministic")
    assert torch.allclose(nothing, s * p.float() + s ** 0.5 * xi)


# ---- the distribution of every sampler


CHAINS = [(2, 1.0, "rational", [0.0, 0.0]), (2, 1.0, "exponential", [0.0, 0.0]),
          (2, 0.5, "exponential", [0.1, 0.3]), (3, 0.4, "rational", [0.05, 0.55]),
          (1, 1.0, "exponential", [0.0, 0.0])]


@SAMPLERS
@pytest.mark.parametrize("steps, window, schedule, tau", CHAINS, ids=str)
def test_a_sampler_has_the_distribution_of_its_chain(sampler, steps, window, schedule, tau,
                                                     monkeypatch):
    """(E4) (E7) 20 000 rows of a network that errs, in few steps, each position at its own time:
    chi-square against quadrature that knows nothing of the script."""
    monkeypatch.setattr(sdd, "position_times",
                        lambda shape, *_: torch.tensor(tau).expand(shape).clone())
    model = Oracle(TWO, 2, 2, 0.9)
    want = chain_distribution(model, path(steps, 2, tau, window, schedule), sampler)
    cfg = config(2, sampler=sampler, num_steps=steps, noise_window=window, schedule=schedule)
    x, nfe = draw(model, cfg, sample=sdd.sample if schedule == "exponential" else lab.sample)
    assert nfe == len(model.calls) <= steps
    if sampler == "deterministic" and steps == 1:
        assert (x == x[0]).all()
    else:
        assert chi_square(row_counts(x, 2), want) > 1e-3


@SAMPLERS
def test_three_steps_of_one_position(sampler):
    """(E7) z is carried from step to step: chi-square."""
    model = Oracle(torch.tensor([0.7, 0.3]).double(), 2, 1, 0.9)
    want = chain_distribution(model, path(3, 1, schedule="exponential"), sampler)
    x, _ = draw(model, config(2, 1, sampler=sampler, num_steps=3), seed=2)
    assert chi_square(row_counts(x, 2), want) > 1e-3


def test_the_chains_of_different_samplers_differ():
    """The tests above can tell them apart."""
    model = Oracle(TWO, 2, 2, 0.9)
    every = [chain_distribution(model, path(2, 2), sampler)
             for sampler in ("token", "ancestral", "deterministic")]
    for p, q in itertools.combinations(every, 2):
        assert 20_000 * ((p - q).square() / q).sum() > 40
    one = Oracle(torch.tensor([0.7, 0.3]).double(), 2, 1, 0.9)
    assert (chain_distribution(one, path(3, 1), "token")[0] - 0.7).abs() > 0.02


@pytest.mark.parametrize("steps, k", [(1, 5), (2, 2), (5, 5), (12, 2)])
def test_tokens_of_one_position_are_exact_in_any_number_of_steps(steps, k):
    """(E5) (E7) sampler token: the mixture is the true transition, so the prior comes out; k = 2 of
    5 candidates are no loss as the self-likelihood is exact."""
    prior = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).double()
    x, nfe = draw(Oracle(prior, 5, 1, k=k), config(5, 1, num_steps=steps), 10_000, steps)
    assert chi_square(x.flatten().bincount(minlength=5), prior) > 1e-3 and nfe == steps


def test_the_deterministic_flow_keeps_the_distribution_of_z():
    """(E7) one position, exact predictions, many steps: tokens have the prior's distribution, and z
    on the way that of Normal(prec e_v, prec) mixed by the prior, as the shown posterior says."""
    prior, n = torch.tensor([0.6, 0.3, 0.1]).double(), 5000
    cfg = config(3, 1, sampler="deterministic", num_steps=100)
    x, _, prec, ids, logp = film(Oracle(prior, 3, 1), cfg, n, 4)
    assert chi_square(x.flatten().bincount(minlength=3), prior) > 1e-3
    for at in (30, 60, 85):
        got = believed(ids[at], logp[at], 3)[:, 0]
        v = torch.multinomial(prior, n, True, generator=generator(at))
        z = sdd.q_sample(v, prec[at][:, 0], torch.randn(n, 3, generator=generator(at + 1)))
        want = z.double().log_softmax(1)
        for a, b in ((0, 1), (1, 2)):
            assert stats.ks_2samp(got[:, a] - got[:, b], want[:, a] - want[:, b]).pvalue > 1e-3


@pytest.mark.parametrize("order", ["random", "l2r", "maxprob"])
@pytest.mark.parametrize("window, steps", [(0.2, 60), (1.0, 40)])
def test_many_steps_of_exact_posteriors_draw_the_joint_distribution(order, window, steps):
    """(E4) (E6) (E7) sampler token, k = V: chi-square over all rows, while the product of the
    marginals is out of the question. Which position begins may depend on the state. One step draws
    every token for itself."""
    cfg, alone = config(noise_window=window, order=order, num_steps=steps), marginals(JOINT, 4, 2)
    product = (alone[0][:, None] * alone[1]).flatten()
    x, _ = draw(Oracle(JOINT, 4, 2), cfg, 4000, 4)
    assert chi_square(row_counts(x, 4), JOINT) > 1e-3
    assert chi_square(row_counts(x, 4), product) < 1e-6
    x, nfe = draw(Oracle(JOINT, 4, 2), dataclasses.replace(cfg, num_steps=1), 4000, 4)
    assert chi_square(row_counts(x, 4), product) > 1e-3 and nfe == 1


@pytest.mark.parametrize("sampler", ["ancestral", "deterministic"])
def test_other_samplers_draw_nearly_the_joint_distribution(sampler):
    """(E7) many steps: every row within 0.03 of its share."""
    x, _ = draw(Oracle(JOINT, 4, 2), config(sampler=sampler, num_steps=100), 3000, 5)
    assert (row_counts(x, 4) / 3000 - JOINT).abs().max() < 0.03


# ---- temperature


def predictions(monkeypatch, cfg, x, model):
    """What filter_logits gets and returns, and what predict returned before, at every step."""
    seen, cut = [], sdd.filter_logits

    def filtered(logits, cfg):
        seen.append((logits, cut(logits, cfg)))
        return seen[-1][1]

    def predict(*args):
        pairs.append(lab.predict(*args, cfg))
        return pairs[-1]
    pairs = []
    monkeypatch.setattr(sdd, "filter_logits", filtered)
    sdd.sample(model, x, cfg, generator(1), predict=predict)
    assert len(seen) == len(pairs) > 3
    return [(*pair, *some) for pair, some in zip(pairs, seen)]


@pytest.mark.parametrize("how", ["exact", "state", "none"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_temperature_is_for_the_context_alone(how, temperature, monkeypatch):
    """(E5) net / temperature + own, at every step; without self-likelihood for all."""
    cfg = config(3, 3, k=2, add_likelihood=how, temperature=temperature, num_steps=6,
                 noise_window=0.5)
    steps = predictions(monkeypatch, cfg, torch.tensor([[2, 3, 3]]).repeat(30, 1), three(0.5, 2))
    for out, own, _, logits in steps:
        assert torch.allclose(logits, (out - own) / temperature + own, atol=1e-4)
        assert how != "none" or (own == 0).all()
    assert how == "none" or max(own.abs().max() for _, own, *_ in steps[1:]) > 1


def test_temperature_of_one_step_is_a_power_of_the_distribution():
    """(E5) p^(1 / temperature) where nothing is known; 0 is the most likely token, always."""
    p = torch.tensor([0.5, 0.2, 0.05, 0.25]).double()
    for temperature in (0.5, 2.0):
        want = p ** (1 / temperature)
        cfg = config(4, 1, num_steps=1, temperature=temperature)
        x, _ = draw(Oracle(p, 4, 1), cfg, 5000, 6)
        assert chi_square(x.flatten().bincount(minlength=4), want / want.sum()) > 1e-3
    for steps in (1, 7):
        cfg = config(4, 1, num_steps=steps, temperature=0.0)
        assert (draw(Oracle(p, 4, 1), cfg, 50)[0] == 0).all()


@SAMPLERS
def test_temperature_0_takes_what_the_context_favours(sampler, monkeypatch):
    """(E5) (E7) the argmax of net, without the self-likelihood."""
    cfg = config(3, 3, sampler=sampler, temperature=0.0, num_steps=5)
    steps = predictions(monkeypatch, cfg, torch.full((40, 3), 3), three(0.7))
    for out, own, _, logits in steps:
        assert torch.equal(logits.argmax(1), (out - own).argmax(1))
        assert (logits.isfinite().sum(1) == 1).all()
    assert any((own.argmax(1) != (out - own).argmax(1)).any() for out, own, *_ in steps[1:])


# ---- what is given, guidance


@pytest.mark.parametrize("order", ["random", "l2r", "maxprob"])
def test_given_tokens_stay_and_the_rest_is_drawn_given_them(order):
    """(E6) a prompt, different holes in every row, nothing given; what is given is shown clean."""
    rows = torch.tensor([[0, 3, 1], [3, 2, 3], [3, 3, 3], [0, 2, 3], [1, 0, 2]])
    cfg, model = config(3, 3, noise_window=0.3, num_steps=40, order=order), three()
    x, _ = draw(model, cfg, rows.repeat(800, 1))
    for i, row in enumerate(rows[:4]):
        want = THREE * ((all_rows(3, 3) == row) | (row == 3)).all(1)
        assert chi_square(row_counts(x[i::5], 3), want / want.sum()) > 1e-3
    is_given = (rows != 3).repeat(800, 1)
    for ids, logp, target in model.calls:
        assert (logp[is_given][:, 0] == 0).all() and not target[is_given].any()
    model = three()
    for how in (dict(order=order), REMASK):
        assert draw(model, config(3, 3, **how), torch.tensor([[0, 1, 2]]))[1] == 0


@pytest.mark.parametrize("w", [1.5, 0.4])
@pytest.mark.parametrize("how", ["exact", "state"])
def test_guidance_adds_what_the_given_text_says(w, how, monkeypatch):
    """logits + w (logits - those without the given text): net by two evaluations a step, in the
    second of which that is unknown and all else stays; the self-likelihood enters once."""
    cut, cuts, model = sdd.filter_logits, [], three(0.7, 2)
    monkeypatch.setattr(sdd, "filter_logits", lambda y, cfg: cuts.append(y) or cut(y, cfg))
    cfg = config(3, 3, noise_window=0.5, num_steps=6, guidance=w, add_likelihood=how, k=2)
    _, nfe = draw(model, cfg, torch.tensor([[1, 3, 3]]).repeat(25, 1), sample=lab.sample)
    calls = list(zip(model.calls[::2], model.calls[1::2]))
    assert nfe == 2 * len(calls) and len(calls) == len(cuts) > 3
    for ((ids, logp, target), (same, less, there)), logits in zip(calls, cuts):
        assert torch.equal(target, there) and torch.equal(logp[:, 1:], less[:, 1:])
        assert (logp[:, 0, 0] == 0).all() and (less[:, 0, -1] == 0).all()
        full, bare = (model.context(believed(*state, 3))[target]
                      for state in ((ids, logp), (same, less)))
        own = logits.double() - full - w * (full - bare)
        if how == "state":  # what the candidates say, up to a constant
            want = believed(ids, logp, 3)[target]
            assert torch.allclose(own.log_softmax(1), want.log_softmax(1), atol=1e-3)
        assert (full - bare).abs().max() > 0.1


def test_guidance_moves_the_distribution_towards_what_the_prompt_favours():
    """Of one token after a prompt, in one step: p(. | c)^(1 + w) / p(.)^w but for a constant. No
    second evaluation without guidance or without given text."""
    pair = THREE.view(3, 3, 3).sum(2)
    given, alone = pair[1] / pair[1].sum(), pair.sum(0)
    for w in (0.0, 1.0, 3.0):
        cfg, model = config(3, 2, num_steps=1, guidance=w), Oracle(pair.flatten(), 3, 2)
        x, nfe = draw(model, cfg, torch.tensor([[1, 3]]).repeat(4000, 1), sample=lab.sample)
        want = given ** (1 + w) / alone ** w
        assert chi_square(x[:, 1].bincount(minlength=3), want / want.sum()) > 1e-3
        assert nfe == 1 + (w > 0) and draw(model, cfg, 5, sample=lab.sample)[1] == 1
    assert 4000 * (want / want.sum() - given).square().sum() > 40


# ---- orders and remasking


@pytest.mark.parametrize("order", ["random", "l2r", "maxprob"])
def test_precision_only_rises_and_what_is_clean_stays(order):
    """(E4) from nothing to clean; predicted are positions that move, or all that are not clean;
    what does not move keeps its state; what is clean shows its token."""
    model, cfg = three(2.0), config(3, 3, noise_window=0.3, order=order, num_steps=20)
    x, nfe, prec, ids, logp = film(model, cfg, 90)
    assert (prec.diff(dim=0) >= 0).all() and prec[0].max() < 1e-5 and (prec[-1] == CLEAN).all()
    assert nfe == (*range(1, len(model.calls) + 1), len(model.calls))
    for i, (shown, told, target) in enumerate(model.calls):
        assert torch.equal(shown, ids[i]) and torch.equal(told, logp[i])  # the film is true
        up, clean = prec[i + 1] > prec[i], prec[i + 1] == CLEAN
        assert torch.equal(target, prec[i] < CLEAN if order == "maxprob" else up)
        assert torch.equal(ids[i + 1][..., 0][clean], x[clean])
        still = ~up & sdd.between(prec[i])
        assert torch.equal(ids[i + 1][still], ids[i][still])
    first = (prec == CLEAN).int().argmax(0).float().mean(0)
    assert (first.diff() > 2).all() == (order == "l2r")
    assert (prec[..., :-1] >= prec[..., 1:]).all() == (order == "l2r")


@pytest.mark.parametrize("remask", ["none", "conf"])
def test_the_most_confident_position_begins(remask):
    """(E4) here the middle is certain, the first is a toss of three, the last of two; few steps are
    enough to make all of them clean."""
    joint = torch.zeros(3, 3, 3).double()
    joint[:, 1, :2] = 1 / 6
    cfg = config(3, 3, noise_window=0.2, order="maxprob", remask=remask, num_steps=20)
    prec = film(Oracle(joint.flatten(), 3, 3), cfg, 50)[2]
    began = (prec > 1e-4).int().argmax(0)
    assert (began[:, 1] < began[:, 0]).all() and (began[:, 1] < began[:, 2]).all()
    assert remask == "conf" or (began[:, 2] < began[:, 0]).all()
    for steps in (1, 2, 3):
        some = dataclasses.replace(cfg, num_steps=steps)
        assert (film(three(), some, 50)[2][-1] == CLEAN).all() and draw(three(), some)[1] <= steps


@pytest.mark.parametrize("window, steps", [(0.3, 30), (0.1, 16)])
def test_clean_positions_become_noisy_again(window, steps):
    """(E8) ends with every position clean and what is given kept; precision falls at times, to
    nothing with few steps, and clean tokens change at times; z that falls in part is that of the
    clean token, observed for a shorter time."""
    V, T, n = 2, 6, 180
    cfg = config(V, T, noise_window=window, num_steps=steps, **REMASK)
    x = torch.full((n, T), V)
    x[1::2, 1] = 1
    x, _, prec, ids, logp = film(Oracle(dirichlet(V, T, 4), V, T, 2.0), cfg, x)
    assert x.max() < V and (prec[-1] == CLEAN).all() and (prec[:, 1::2, 1] == CLEAN).all()
    off, changed, gone = [], 0, 0
    for before, after, token, now, told in zip(prec, prec[1:], ids[..., 0], ids[1:], logp[1:]):
        back = (before == CLEAN) & (after < CLEAN)
        changed += (x != token)[back].sum()
        gone += (after[back] == 0).sum()
        part = back & (after > 0)
        theta, level, token = believed(now, told, V)[part], after[part], token[part][:, None]
        gap = (theta.gather(1, token) - theta.gather(1, 1 - token))[:, 0]
        off.append((gap - level) / (2 * level).sqrt())
    off = torch.cat(off)
    if steps == 30:
        assert changed > 3 and len(off) > 250
        assert off.mean().abs() < 4.5 / len(off) ** 0.5 and 0.8 < off.std() < 1.2
    else:
        assert gone > 3


def test_chance_keeps_clean_positions_by_their_confidence(monkeypatch):
    """(E8) what is noisy comes first, by its largest probability; what is clean by that of its
    token less a Gumbel variable, so that the weight of becoming noisy again is exp(-p)."""
    p, seen, reassign = torch.tensor([0.7, 0.2, 0.1]), [], sdd.reassign_times
    monkeypatch.setattr(sdd, "reassign_times", lambda tau, waits, score: seen.append(
        (waits, score.clone())) or reassign(tau, waits, score))
    cfg = config(3, 20, noise_window=0.01, num_steps=10, **REMASK)
    model, x = lab.Model(cfg), torch.full((60, 20), 3)
    model.head.bias.data, x[:, 0] = sdd.Model.CAP * (p.log() / sdd.Model.CAP).atanh(), 2
    _, _, prec, ids, _ = film(model, cfg, x)
    noise = []
    for (waits, score), level, tokens in zip(seen, prec, ids[..., 0]):
        clean = (level == CLEAN) & waits
        assert not waits[:, 0].any() and waits[:, 1:].all()
        assert torch.allclose(score[level == 0], 1000 + p[0])  # the network says the same of all
        noise.append(p[tokens[clean]] - score[clean])
    noise = torch.cat(noise).double()
    assert len(noise) > 3000 and stats.kstest(noise.numpy(), "gumbel_r").pvalue > 1e-3


def test_remasking_keeps_even_chances_even():
    """(E8) where all tokens are alike by symmetry, every token is as likely at the end; a joint
    distribution that is the same for every shift of the tokens keeps its even marginals."""
    n, V = 3000, 3
    shift = torch.tensor([0.8, 0.15, 0.05]).double()  # of the second token to the first
    joint = torch.stack([torch.stack([shift[(b - a) % V] for b in range(V)]) for a in range(V)]) / V
    cfg = config(V, 2, noise_window=0.5, num_steps=20, **REMASK)
    for p in (torch.full((V * V,), 1 / V ** 2).double(), joint.flatten()):
        x, _, prec, *_ = film(Oracle(p, V, 2), cfg, n, 2)
        assert (prec.diff(dim=0) < 0).any()
        for i in range(2):
            assert stats.chisquare(x[:, i].bincount(minlength=V)).pvalue > 1e-3
    assert ((x[:, 1] - x[:, 0]) % V == 0).double().mean() > 0.7


# ---- NFE, candidates on the way, settings


def test_num_steps_is_nfe_and_0_is_one_step_a_token():
    """One evaluation a step with w = 1; with smaller windows only steps in which something moves.
    Before the end on_step sees V where no token has probability 1/2."""
    for steps, nfe in ((1, 1), (5, 5), (0, 3)):
        assert draw(three(), config(3, 3, num_steps=steps), 3)[1] == nfe
    cfg = config(3, 3, noise_window=0.1, num_steps=50)
    assert draw(three(), cfg, torch.tensor([[0, 1, 3]]))[1] <= 7
    seen, cfg = [], config(3, 3, num_steps=12)
    sdd.sample(three(), torch.full((60, 3), 3), cfg, generator(1), lambda k, x: seen.append(x))
    _, _, _, ids, logp = film(three(), cfg, 60)
    for x, now, told in zip(seen, ids[1:], logp[1:]):
        assert torch.equal(x, torch.where(told[..., 0] >= math.log(0.5), now[..., 0], 3))
    assert 0 < (torch.stack(seen) == 3).double().mean() < 1


def test_posterior_candidates_are_made_of_the_prediction_before():
    """(E3) one evaluation a step; candidates are the top of z + net, net what the network last said
    of the position."""
    seen, predict = [], lab.predict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab, "predict", lambda *args: seen.append((args, predict(*args)))
                      or seen[-1][1])
        cfg, model = config(3, 3, candidates="posterior", noise_window=0.7, num_steps=12), three(
            0.5, 2)
        _, nfe, _, ids, logp = film(model, cfg, 30)
    last = torch.zeros(30, 3, 3)
    assert len(seen) == len(model.calls) == nfe[-1] == 12
    for (args, (out, own)), call, *frame in zip(seen, model.calls, ids, logp):
        _, _, prec, z, target, _, _, prev = args
        is_noisy = sdd.between(prec)
        assert torch.allclose(prev, last[is_noisy])
        for got, shown, want in zip(call, frame, sdd.top_k_state(z + prev, 2)):
            assert torch.equal(got[is_noisy], want) and torch.equal(shown[is_noisy], want)
        last[target] = out - own
    assert last.abs().min() > 0


def test_the_truth_is_always_among_all_candidates():
    """candidate_recall: with k = V, in training and in sampling; with k = 1 rarely where little is
    known, nearly always where much is."""
    x0 = all_rows(3, 3)[torch.multinomial(THREE, 500, True, generator=generator(1))]
    for k in (1, 3):
        cfg = config(3, 3, k=k, noise_window=0.7, num_steps=20)
        rows = lab.candidate_recall(three(k=k), x0, cfg, generator(2))
        assert rows[0]["prec_low"] == 0 and rows[-1]["prec_high"] == CLEAN
        for row, after in zip(rows, rows[1:]):
            assert row["prec_high"] == after["prec_low"]
        for row, name in itertools.product(rows, ("training", "sampling")):
            many, share = row[f"{name}_n"], row[name]
            assert many > 0 or share is None
            assert k == 1 or not many or share == 1
        for name in ("training", "sampling") if k == 1 else ():
            assert 0.4 < rows[0][name] < 0.85 and rows[-1][name] > 0.95


@pytest.mark.parametrize("change", [
    dict(), REMASK | dict(temperature=0.5), dict(order="maxprob"),
    dict(attention="full", guidance=0.7, **REMASK), dict(sampler="deterministic", noise_window=1.0),
    dict(attention="full", sampler="ancestral"), dict(sampler="deterministic", **REMASK),
    dict(k=1, add_likelihood="state", order="l2r"), dict(k=99, add_likelihood="none"),
    dict(k=99, temperature=0), dict(candidates="posterior", guidance=0.5, **REMASK),
    dict(top_k=2, top_p=0.9)], ids=str)
def test_a_network_of_the_script_samples_with_every_setting(change):
    """Ids within the vocabulary, the prompt kept, under autocast too; a seed fixes the samples."""
    torch.manual_seed(0)
    cfg = config(11, 6, **dict(k=3, noise_window=0.4, num_steps=6) | change)
    model, x = lab.Model(cfg), torch.full((3, 6), 11)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    x[:, :2] = torch.tensor([6, 5])
    one, again, other = (draw(model, cfg, x, seed, lab.sample)[0] for seed in (1, 1, 2))
    assert torch.equal(one, again) and (cfg.temperature == 0 or not torch.equal(one, other))
    with torch.autocast("cpu", torch.bfloat16):
        draw(model, cfg, x, 1, lab.sample)


# ---- the original's sampler


def original(V=50, T=40, k=5, **changes):
    torch.manual_seed(0)
    cfg = config(V, T, k=k, process="original", **changes)
    return lab.Model(cfg), cfg


def test_the_original_sampler_starts_without_the_answer():
    """k random candidates of 1 / V each, of which one is the truth of any text with probability
    about k / V; one evaluation a step, 25 by default."""
    (model, cfg), n = original(num_steps=3), 250
    x, nfe, _, ids, logp = film(model, cfg, n)
    assert nfe == (0, 1, 2, 3) and ids.shape == (4, n, 40, 5)
    assert torch.allclose(logp[0, ..., :-1], torch.tensor(-math.log(50)))
    assert torch.allclose(logp[0, ..., -1], torch.tensor(math.log(0.9)))
    assert stats.chisquare(ids[0].flatten().bincount(minlength=50)).pvalue > 1e-3
    text = torch.randint(50, (n, 40), generator=generator(2))
    among, want = (ids[0] == text[..., None]).any(2).double().mean(), 1 - (1 - 1 / 50) ** 5
    assert abs(among - want) < 4.5 * (want * (1 - want) / text.numel()) ** 0.5
    assert draw(model, dataclasses.replace(cfg, num_steps=0), 2, sample=lab.sample)[1] == 25


def test_the_original_sampler_feeds_back_the_most_likely_tokens():
    """Every state is the top k of the prediction before, tempered, never noised again."""
    for temperature in (1.0, 0.5):
        (model, cfg), seen = original(num_steps=4, temperature=temperature), []
        for p in model.parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=generator(1))
        model.register_forward_hook(lambda m, args, out: seen.append((args, out)))
        x, _, _, ids, logp = film(model, cfg, 3)
        for i, ((shown, told), out) in enumerate(seen):
            assert torch.equal(shown, ids[i]) and torch.equal(told, logp[i])
            best = (out / temperature).log_softmax(2).sort(2, descending=True)
            after = ids[i + 1] if i < 3 else x[..., None]
            assert torch.equal(best.indices[..., :after.shape[2]], after)
            assert i == 3 or torch.allclose(best.values[..., :5], logp[i + 1, ..., :-1], atol=1e-5)
