"""The samplers of sdd.py and lab/sdd_variants.py against exact distributions: steps of z, chains by
quadrature, joint distributions of two and three tokens, what is given, temperature, guidance,
orders, remasking, the candidates on the way, the original's sampler."""
import dataclasses
import math

import pytest
import torch
from scipy import stats

import sdd
from lab import sdd_variants as lab
from oracles import all_rows, chi_square, dirichlet, generator, row_counts
from sdd_tables import Oracle, believed, chain_distribution, path, settings

CLEAN = sdd.CLEAN
JOINT, THREE = dirichlet(4, 2, 3, 0.5), dirichlet(3, 3, 2, 0.5)
TWO = torch.tensor([0.5, 0.12, 0.06, 0.32]).double()  # V = 2, T = 2
SAMPLERS = pytest.mark.parametrize("sampler", ["token", "ancestral", "deterministic"])
REMASK = dict(order="maxprob", remask="conf")


def config(V=4, T=2, **changes):
    return lab.Config(**settings(V, T, **changes))


def three(tilt=0.0, k=0):
    return Oracle(THREE, 3, 3, tilt, k)


def draw(model, cfg, x=20_000, seed=1, sample=sdd.sample):
    """Samples and NFE, from the canvas x (n, T), or so many rows of nothing."""
    x = torch.full((x, cfg.seq_len), cfg.vocab_size) if isinstance(x, int) else x
    return sample(model, x, cfg, generator(seed))


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


@SAMPLERS
@pytest.mark.parametrize("t, s", [(9.0, 4.0), (200.0, 3.0), (7.0, 0.0)])
def test_a_step_down_is_what_fewer_observations_would_have_shown(sampler, t, s):
    """(E8) Normal(s e_x, s), and z_t - z_s is independent of it, as of two times of one Brownian
    motion; h is of no matter; nothing is nothing."""
    n, e = 30_000, torch.tensor([0.0, 1.0, 0.0])
    eps, xi = torch.randn(2, n, 3, generator=generator(1))
    z, level = t * e + t ** 0.5 * eps, torch.ones(n)
    after = sdd.sampler_step(z, t * level, s * level, torch.full_like(z, 7.0), xi, sampler)
    assert normal(after, s * e, s) and normal(z - after, (t - s) * e, t - s)
    low, high = (after - s * e).double(), (z - t * e).double()
    wide = 4.5 * (s * (t - s) / n) ** 0.5 + 1e-5
    assert (low * (high - low)).mean(0).abs().max() < wide and (s > 0 or (after == 0).all())


def test_the_deterministic_step_is_the_flow_of_one_prediction():
    """(E7) dz/ds = (p + z / s) / 2 with a fixed p, by many small Euler steps; from nothing s p +
    sqrt(s) xi."""
    p, z = torch.tensor([[0.2, 0.7, 0.1]]).double(), torch.tensor([[1.0, -2.0, 3.0]]).double()
    t, s, n, y = torch.tensor([1.5]).double(), torch.tensor([7.0]).double(), 5000, z
    for k in range(n):
        y = y + (p + y / (t + (s - t) * (k + 0.5) / n)) / 2 * (s - t) / n
    xi = torch.randn(1, 3, generator=generator(2)).double()
    got = sdd.sampler_step(z, t, s, p, xi, "deterministic")
    assert torch.allclose(got, y, atol=3e-3)
    begun = sdd.sampler_step(0 * z, 0 * t, s, p, xi, "deterministic")
    assert torch.allclose(begun, s * p + s ** 0.5 * xi)


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


@pytest.mark.parametrize("sampler", ["ancestral", "deterministic"])
def test_other_samplers_draw_nearly_the_joint_distribution(sampler):
    """(E7) many steps: every row within 0.03 of its share."""
    x, _ = draw(Oracle(JOINT, 4, 2), config(sampler=sampler, num_steps=100), 3000, 5)
    assert (row_counts(x, 4) / 3000 - JOINT).abs().max() < 0.03


# ---- temperature


@pytest.mark.parametrize("temperature, how", [
    (0.5, "exact"), (1.7, "state"), (1.7, "none"), (0.0, "exact")])
def test_temperature_is_for_the_context_alone(temperature, how, monkeypatch):
    """(E5) (E7) net / temperature + own, at every step; without self-likelihood for all; at 0 the
    most likely token by net."""
    cfg = config(3, 3, k=2, add_likelihood=how, temperature=temperature, num_steps=6,
                 noise_window=0.5)
    said, kept, cut = [], [], sdd.filter_logits
    monkeypatch.setattr(sdd, "filter_logits",
                        lambda y, cfg: kept.append(cut(y, cfg)) or kept[-1])

    def predict(*args):
        said.append(lab.predict(*args, cfg))
        return said[-1]
    sdd.sample(three(0.5, 2), torch.tensor([[2, 3, 3]]).repeat(30, 1), cfg, generator(1),
               predict=predict)
    assert len(said) == len(kept) > 3
    for (out, own), logits in zip(said, kept):
        if temperature:
            assert torch.allclose(logits, (out - own) / temperature + own, atol=1e-4)
        else:
            assert torch.equal(logits.argmax(1), (out - own).argmax(1))
        assert how != "none" or (own == 0).all()
    assert how == "none" or max(own.abs().max() for _, own in said[1:]) > 1


# ---- what is given, guidance


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


# ---- remasking


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
    """(E8) what is noisy comes first, by its largest probability to the last digit; what is clean
    by that of its token less a Gumbel variable: the weight of becoming noisy again is exp(-p)."""
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
        assert (score[level == 0] - p[0]).abs().max() < 1e-6  # nothing is added that would tie them
        noise.append(p[tokens[clean]] - score[clean] - 10)
    noise = torch.cat(noise).double()
    assert len(noise) > 3000 and stats.kstest(noise.numpy(), "gumbel_r").pvalue > 1e-3


# ---- NFE, candidates on the way, settings


def test_the_frames_show_likely_tokens():
    """Before the end on_step sees V where no token has probability 1/2; the film shows what the
    network saw."""
    seen, cfg, model = [], config(3, 3, num_steps=12), three()
    sdd.sample(three(), torch.full((60, 3), 3), cfg, generator(1), lambda k, x: seen.append(x))
    _, _, _, ids, logp = film(model, cfg, 60)
    for x, now, told in zip(seen, ids[1:], logp[1:]):
        assert torch.equal(x, torch.where(told[..., 0] >= math.log(0.5), now[..., 0], 3))
    for (shown, says, _), now, told in zip(model.calls, ids, logp):
        assert torch.equal(shown, now) and torch.equal(says, told)
    assert 0 < (torch.stack(seen) == 3).double().mean() < 1


def test_the_truth_is_always_among_all_candidates():
    """candidate_recall: with k = V, in training and in sampling; with k = 1 rarely where little is
    known, nearly always where much is."""
    x0 = all_rows(3, 3)[torch.multinomial(THREE, 500, True, generator=generator(1))]
    for k in (1, 3):
        cfg = config(3, 3, k=k, noise_window=0.7, num_steps=20)
        rows = lab.candidate_recall(three(k=k), x0, cfg, generator(2))
        assert [row["prec_high"] for row in rows[:-1]] == [row["prec_low"] for row in rows[1:]]
        for name in ("training", "sampling"):
            shares = [row[name] for row in rows if row[f"{name}_n"]]
            assert k == 1 or shares == len(shares) * [1]
            assert k == 3 or 0.4 < shares[0] < 0.85 and shares[-1] > 0.95


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


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_original_sampler_feeds_back_the_most_likely_tokens(temperature):
    """Every state is the top k of the prediction before, tempered, never noised again."""
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
