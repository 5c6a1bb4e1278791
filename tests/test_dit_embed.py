"""Gaussian diffusion on embeddings: noise levels, times, self-likelihood, bounds, losses and the
network of dit_embed.py and lab/dit_variants.py, against Bayes' rule, quadrature and by hand. Every
expected number is made in gauss_tables.py or here."""
import copy
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import dit_embed
import gauss_tables
from gauss_tables import (CIRCLE, COIN, JOINT, LINE, THREE, TOKENS, Oracle, alpha_sigma,
                          chain_distribution, conditioning, entropy, evenly, gap, hermite,
                          marginals, parts, steps_bound)
from lab import dit_variants
from tables import all_rows, generator, mean_and_se

SCHEDULES = ("logsnr", "logistic", "linear", "cosine", "sqrt")
BOTH = pytest.mark.parametrize("script", [dit_embed, dit_variants], ids=lambda s: s.__name__)


def config(*args, script=dit_variants, **changes):
    return gauss_tables.config(script.Config, *args, **changes)


def network(seed=0, script=dit_variants, **changes):
    torch.manual_seed(seed)
    return script.Model(config(script=script, **changes))


def shaken(model, seed=1, size=0.3):
    """Weights far from their initial zeros, so that every path is alive."""
    g = generator(seed)
    for p in model.parameters():
        p.data += size * torch.randn(p.shape, generator=g)
    return model


def close(draws, truth, width=4):
    """Is the mean of draws (n,), or a pair (mean, its standard error), the truth?"""
    mean, se = draws if isinstance(draws, tuple) else (draws.mean(), draws.std() / len(draws) ** .5)
    return abs(mean - truth) < width * se + 1e-6


def weighted(draws, joint, times):
    """Mean over a distribution of rows, of so many draws for every row in turn, and its SE."""
    draws = draws.view(len(joint), times).double()
    return (joint * draws.mean(1)).sum().item(), \
        (joint.square() * draws.var(1) / times).sum().sqrt().item()


def every_row(joint, V, T, times):
    return all_rows(V, T).repeat_interleave(times, 0)


def loss_of(model, x0, cfg, g):
    model.cfg = cfg
    return dit_variants.loss_fn(model, x0, *dit_variants.corrupt(x0, cfg, g))


# ---- schedules (E1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_falls_from_end_to_end_with_its_stated_slope(name):
    """(E1) lam is between the ends, never rises, and its slope is the derivative: by finite
    differences in float64; 0 exactly where the range cuts it off."""
    for high, low in ((4.0, -5.0), (6.0, -6.0), (12.0, -12.0)):
        cfg, t = config(high, low, schedule=name), torch.linspace(0, 1, 4001, dtype=torch.float64)
        lam, slope = dit_variants.logsnr(t, cfg)
        assert lam.dtype == slope.dtype == t.dtype and lam.isfinite().all()
        assert lam[0] <= high + 1e-9 and lam[-1] >= low - 1e-9 and (lam.diff() <= 0).all()
        if high == 4:  # a range that all of them cover
            assert lam[[0, -1]].tolist() == pytest.approx([4, -5], abs=1e-5)
        cut = (lam >= high - 1e-9) | (lam <= low + 1e-9)
        inside = ~cut[:-2] & ~cut[2:] & (t[1:-1] > 0.02) & (t[1:-1] < 0.98)
        steep = -(lam[2:] - lam[:-2]) / (t[2:] - t[:-2])
        assert inside.sum() > 400 and (slope >= 0).all() and slope.isfinite().all()
        assert torch.allclose(slope[1:-1][inside], steep[inside], rtol=2e-3)
        assert name in ("logsnr", "logistic") or (slope[cut] == 0).all()


def test_the_range_lies_around_the_place_where_a_token_is_lost():
    """ln(2 ln V / r^2), r the norm or sqrt(d) for free embeddings; gamma_shift lowers the range
    and all schedules."""
    for norm, r2 in ((1.0, 1), (2.0, 4), (0.0, 16)):
        cfg = dit_variants.Config(vocab_size=2048, emb_norm=norm)
        center = math.log(2 * math.log(2048) / r2)
        assert dit_variants.logsnr_range(cfg) == pytest.approx((center + 3, center - 8))
        moved = dataclasses.replace(cfg, gamma_shift=0.7)
        assert dit_variants.logsnr_range(moved) == pytest.approx((center + 2.3, center - 8.7))
    assert dit_embed.logsnr_range(cfg) == pytest.approx((center + math.log(16) + 3,
                                                         center + math.log(16) - 8))
    t = torch.linspace(0.1, 0.9, 9)
    for name in SCHEDULES:
        cfg = config(30, -30, schedule=name)
        lam, slope = dit_variants.logsnr(t, cfg)
        low, same = dit_variants.logsnr(t, dataclasses.replace(cfg, gamma_shift=1.3))
        assert torch.allclose(low, lam - 1.3, atol=1e-5) and torch.allclose(slope, same)


def test_the_named_schedules_are_their_papers():
    """(E1) alpha-bar: exp(-(0.1 t + 19.9 t^2 / 2)), the limit of prod (1 - beta) of Ho et al. at
    1000 steps, cos^2(pi / 2 (t + .008) / 1.008) and 1 - sqrt(t + 1e-4); logistic: the share of
    time above lam is that of a logistic distribution around the center, between the ends."""
    t = torch.linspace(0.02, 0.97, 96, dtype=torch.float64)
    bar = {"linear": (-0.1 * t - 0.5 * 19.9 * t ** 2).exp(),
           "cosine": ((t + 0.008) / 1.008 * math.pi / 2).cos().square(),
           "sqrt": 1 - (t + 1e-4).sqrt()}
    for name, want in bar.items():
        lam, _ = dit_variants.logsnr(t, config(20, -20, schedule=name))
        assert torch.allclose(alpha_sigma(lam)[0].square(), want, rtol=1e-9)
    lam, _ = dit_variants.logsnr(torch.arange(1, 1001).double() / 1000,
                                 config(20, -20, schedule="linear"))
    product = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).log().cumsum(0)
    assert torch.allclose(alpha_sigma(lam)[0].square().log(), product, rtol=0.02, atol=3e-3)
    center = math.log(2 * math.log(4))
    lam, slope = dit_variants.logsnr(t, config(4, -5, schedule="logistic"))
    share, top, bottom = (1 / (1 + (torch.as_tensor(y) - center).exp()) for y in (lam, 4.0, -5.0))
    assert torch.allclose((share - top) / (bottom - top), t, atol=1e-6)
    assert (lam[slope.argmin()] - center).abs() < 0.1


def test_noise_has_the_stated_scale():
    """(E1) alpha^2 + sigma^2 = 1 and alpha^2 / sigma^2 = exp(lam)."""
    lam = torch.linspace(-9, 9, 37)
    one, none = torch.ones(37, 1), torch.zeros(37, 1)
    alpha, sigma = dit_embed.q_sample(one, lam, none), dit_embed.q_sample(none, lam, one)
    assert torch.allclose(alpha ** 2 + sigma ** 2, one, atol=1e-6)
    assert torch.allclose((alpha / sigma)[:, 0] ** 2, lam.exp(), rtol=1e-5)
    assert torch.allclose(dit_embed.q_sample(2 * one, lam, 3 * one), 2 * alpha + 3 * sigma)


# ---- times (E2)


@BOTH
@pytest.mark.parametrize("window", [0.05, 0.2, 0.5, 1.0])
def test_every_position_goes_from_noise_to_token_in_its_window(window, script):
    """(E2) own time (t - tau) / w, clamped; lam and slope of it; pure noise at t = 1, clean at
    t = 0; at most w / (1 - w) of the positions, and one, on the way; all alike for w = 1."""
    cfg = config(5, -6, T=24, noise_window=window, script=script, emb_norm=1.0)
    tau = dit_embed.position_times((50, 24), cfg, generator(1))
    assert tau.shape == (50, 24) and tau.min() >= 0 and tau.max() <= 1 - window + 1e-6
    before, begun = torch.full((50, 24), 5.0), torch.zeros(50, 24)
    for t in torch.linspace(0, 1, 41):
        own, lam, slope = script.noise_levels(t.expand(50, 1), tau, cfg)
        assert torch.allclose(own, ((t - tau) / window).clamp(0, 1), atol=1e-6)
        assert torch.allclose(lam, 5 - 11 * own, atol=1e-5) and (lam <= before + 1e-6).all()
        on_the_way = (own > 0) & (own < 1)
        assert torch.allclose(slope, 11 / window * on_the_way, rtol=1e-5)
        assert on_the_way.sum(1).max() <= (24 if window == 1 else
                                           min(24, 24 * window / (1 - window) + 1))
        assert window < 1 or (lam == lam[:, :1]).all()
        before, begun = lam, begun + on_the_way
    assert (own == 1).all() and (script.noise_levels(0.0, tau, cfg)[0] == 0).all()
    assert (begun > 0).all() or window == 0.05


def test_times_are_evenly_spread_in_random_order():
    """(E2) sorted, they are (1 - w) (rank + u) / T with one u per row; every position has every
    rank equally often, all orders are as likely, and u is uniform."""
    cfg = config(T=5, noise_window=0.3)
    tau = dit_embed.position_times((8000, 5), cfg, generator(2)) / 0.7 * 5
    offset = tau.sort(1).values - torch.arange(5)
    assert (offset - offset[:, :1]).abs().max() < 1e-5 and 0 <= offset.min() and offset.max() < 1
    assert stats.kstest(offset[:, 0].numpy(), "uniform").pvalue > 1e-3
    rank = tau.argsort(1).argsort(1)
    for i in range(5):
        assert stats.chisquare(rank[:, i].bincount(minlength=5).numpy()).pvalue > 1e-3
    orders = (rank[:, :4] * 5 ** torch.arange(4)).sum(1).unique(return_counts=True)[1]
    assert len(orders) == 120 and stats.chisquare(orders.numpy()).pvalue > 1e-3


def test_given_positions_are_always_clean_and_the_others_share_the_times():
    """(E2) the times of a row are spread over its other positions alone."""
    cfg = config(5, -6, T=9, noise_window=0.25, script=dit_embed)
    is_given = torch.rand(400, 9, generator=generator(4)) < 0.4
    is_given[0] = True
    tau = dit_embed.position_times((400, 9), cfg, generator(5), is_given)
    assert (tau[is_given] == torch.inf).all()
    for t in (0.0, 0.3, 0.9, 1.0):
        own, lam, slope = dit_embed.noise_levels(t, tau, cfg)
        assert (own[is_given] == 0).all() and (lam[is_given] - 5).abs().max() < 1e-5
        assert (slope[is_given] == 0).all() and t < 1 or (own[~is_given] == 1).all()
    for row, keep in zip(tau, ~is_given):
        N = int(keep.sum())
        offset = row[keep].sort().values / 0.75 * max(N, 1) - torch.arange(N)
        assert N == 0 or 0 <= offset.min() and offset.max() < 1
        assert N == 0 or offset.max() - offset.min() < 1e-5


def test_times_are_reassigned_highest_score_first():
    """(E2) the waiting positions keep their times as a set; the best begins next, at the latest."""
    g = generator(6)
    tau, is_waiting = torch.rand(300, 8, generator=g), torch.rand(300, 8, generator=g) < 0.6
    score = torch.rand(300, 8, generator=g)
    new = dit_embed.reassign_times(tau, is_waiting, score)
    assert torch.equal(new[~is_waiting], tau[~is_waiting])
    assert torch.equal(new.sort(1).values, tau.sort(1).values)
    for row, old, mask, value in zip(new, tau, is_waiting, score):
        by_score = row[mask][value[mask].argsort(descending=True)]
        assert torch.equal(by_score, old[mask].sort(descending=True).values)


# ---- self-likelihood (E3), prediction (E4) (V1), steps (E6)


@pytest.mark.parametrize("script, norm", [(dit_embed, 1.0), (dit_variants, 0.0),
                                          (dit_variants, 2.5)])
def test_the_self_likelihood_is_the_log_density_but_for_a_constant(script, norm):
    """(E3) against torch.distributions in float64."""
    model = network(V=9, d=3, emb_norm=norm, script=script)
    z, lam = torch.randn(40, 5, 3, generator=generator(1)), torch.linspace(-7, 7, 200).view(40, 5)
    (alpha, sigma), E = alpha_sigma(lam), model.embeddings().detach().double()
    density = torch.distributions.Normal(alpha[..., None, None] * E, sigma[..., None, None])
    want = density.log_prob(z.double()[:, :, None]).sum(-1)
    got = model.self_likelihood(z, lam).double()
    difference = (got - want) - (got - want).mean(-1, keepdim=True)
    assert (difference.abs() / (1 + want.abs().amax(-1, True))).max() < 1e-5


@pytest.mark.parametrize("script, norm", [(dit_embed, 1.0), (dit_variants, 0.0)])
def test_the_self_likelihood_stays_float32_under_autocast(script, norm):
    """(E3) and so does the mean embedding (E4)."""
    model, cfg = network(V=50, d=4, emb_norm=norm, script=script), config()
    z, lam = torch.randn(20, 3, 4, generator=generator(1)), torch.linspace(-5, 7, 60).view(20, 3)
    plain, logits = model.self_likelihood(z, lam), torch.randn(20, 3, 50, generator=generator(2))
    mean = dit_variants.predict_x0_embedding(model, logits, z, lam, cfg)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.self_likelihood(z, lam), plain) and plain.dtype == torch.float32
        assert torch.equal(dit_variants.predict_x0_embedding(model, logits, z, lam, cfg), mean)
        assert plain.max() > 100  # where bfloat16 would have lost whole nats


def test_the_self_likelihood_enters_the_logits_exactly():
    """(E4) with a zero head softmax(logits) is Bayes' rule for one position; add_likelihood adds
    it and nothing more, and not to vectors."""
    z, lam = torch.randn(3, 6, 2, generator=generator(1)), torch.linspace(-4, 4, 18).view(3, 6)
    model = network(V=5, T=6, d=2, script=dit_embed)
    alpha, sigma = alpha_sigma(lam)
    far = (z.double()[..., None, :] - alpha[..., None, None] * model.embeddings().double()).square()
    bayes = (-0.5 * far.sum(-1) / sigma.square()[..., None]).softmax(2)
    assert torch.allclose(model(z, lam).softmax(2).double(), bayes, atol=1e-5)
    model = shaken(network(V=5, T=6, d=2, emb_norm=1.0))
    bare = network(V=5, T=6, d=2, emb_norm=1.0, add_likelihood=False)
    bare.load_state_dict(model.state_dict())
    assert torch.allclose(model(z, lam) - model.self_likelihood(z, lam), bare(z, lam), atol=1e-4)
    for kind in ("eps", "x0", "v"):
        assert (network(V=5, T=6, d=2, prediction_type=kind)(z, lam) == 0).all()


def test_every_prediction_means_an_embedding():
    """(E4) sum_v p(v) E_v, which sticks out of the hull of E in no direction; (V1) eps, v and x0
    undone; exp(lam) |e - e_hat|^2 = |eps - eps_hat|^2 = alpha^2 |v - v_hat|^2."""
    model, g = network(V=6, d=5, emb_norm=1.5), generator(1)
    lam = torch.linspace(-4, 4, 40).double()
    emb, hat, eps = torch.randn(3, 40, 5, generator=g).double()
    alpha, sigma = (y[:, None] for y in alpha_sigma(lam))
    z = dit_embed.q_sample(emb, lam, eps)
    eps_hat, v_hat = (z - alpha * hat) / sigma, (alpha * z - hat) / sigma
    v = alpha * eps - sigma * emb
    for kind, out, want in (("eps", eps_hat, hat), ("v", v_hat, hat), ("x0", hat, hat),
                            ("v", v, emb), ("eps", eps, emb)):
        got = dit_variants.predict_x0_embedding(None, out, z, lam, config(prediction_type=kind))
        assert torch.allclose(got, want, atol=1e-6)
    sides = [y.square().sum(1) for y in (emb - hat, eps - eps_hat, v - v_hat)]
    assert torch.allclose(lam.exp() * sides[0], sides[1])
    assert torch.allclose(sides[1], alpha[:, 0] ** 2 * sides[2])
    logits, E = 3 * torch.randn(500, 6, generator=g), model.embeddings()
    mean = dit_variants.predict_x0_embedding(model, logits, z, lam, config())
    assert torch.allclose(mean, sum(logits.softmax(1)[:, v, None] * E[v] for v in range(6)),
                          atol=1e-6)
    towards = torch.randn(5, 99, generator=g)
    assert ((mean @ towards) <= (E @ towards).amax(0) + 1e-5).all()


def test_a_step_is_the_gaussian_posterior_and_two_steps_are_a_step():
    """(E6) A, B and sigma_q by conditioning z_s on z_t; DDPM's coefficients in beta; z_t -> z_r ->
    z_s has the mean and the variance of z_t -> z_s."""
    for lam_t, lam_s in ((-5.0, -4.9), (-2.0, 1.0), (3.0, 3.5), (-6.0, 6.0)):
        t, r, s = (torch.tensor([y]).double() for y in (lam_t, 0.7 * lam_t + 0.3 * lam_s, lam_s))
        A, B, sd = dit_embed.posterior(t, s)
        assert A.shape == B.shape == sd.shape == (1, 1)
        want = [y.item() for y in conditioning(lam_t, lam_s)]
        assert (A.item(), B.item(), sd.item()) == pytest.approx(want, rel=1e-6)
        bar_t, bar_s = (alpha_sigma(y)[0].item() ** 2 for y in (lam_t, lam_s))
        beta = 1 - bar_t / bar_s
        assert B.item() == pytest.approx(math.sqrt(bar_s) * beta / (1 - bar_t), rel=1e-6)
        assert A.item() == pytest.approx(math.sqrt(1 - beta) * (1 - bar_s) / (1 - bar_t), rel=1e-6)
        assert sd.item() ** 2 == pytest.approx(beta * (1 - bar_s) / (1 - bar_t), rel=1e-6)
        (A1, B1, q1), (A2, B2, q2) = dit_embed.posterior(t, r), dit_embed.posterior(r, s)
        assert torch.allclose(A1 * A2, A) and torch.allclose(A2 * B1 + B2, B)
        assert torch.allclose((A2 * q1) ** 2 + q2 ** 2, sd ** 2)


# ---- the bound at the start (E5)


STARTS = [(dit_embed, dict(noise_window=1.0)), (dit_embed, dict(noise_window=0.1)),
          (dit_variants, dict(noise_window=0.2, emb_norm=2.0, schedule="cosine")),
          (dit_variants, dict(emb_norm=1.0, schedule="sqrt", gamma_shift=0.5)),
          (dit_variants, dict(noise_window=0.4, schedule="linear", V=30)),
          (dit_variants, dict(noise_window=0.3, emb_norm=1.0, emb_train=False, d=3))]


def centered(script=dit_variants, V=11, T=6, d=6, **changes):
    """A Config with the range of the script, 4 above and 8 below the place."""
    r2 = changes.get("emb_norm", 0 if script is dit_variants else 1) ** 2 or d
    center = math.log(2 * math.log(V) / r2) - changes.get("gamma_shift", 0)
    return config(center + 4, center - 8, V, T, d, n_embd=8, script=script, **changes)


@pytest.mark.parametrize("script, changes", STARTS)
def test_a_network_that_predicts_nothing_costs_ln_v(script, changes):
    """(E4) (E5) a zero head and the self-likelihood are the Bayes denoiser of uniform tokens:
    PRIOR + DIFFUSION + RECONSTRUCTION = ln V a position, for any text; and with a bias, its
    cross-entropy. Catches every wrong constant, weight and sum at once."""
    cfg = centered(script, **changes)
    torch.manual_seed(0)
    model, V = script.Model(cfg), cfg.vocab_size
    x0 = torch.randint(V, (320, 6), generator=generator(1))
    x0[:64] = 3
    prior = dit_variants.nelbo_parts(model, x0, dit_variants.Config(
        **dataclasses.asdict(cfg)), generator(2))["prior"].mean()
    assert 0 < prior < 0.02
    nats = script.nelbo(model, x0, cfg, generator(2))
    assert close(nats, 6 * math.log(V) + prior / 2)
    unigram = torch.rand(V, generator=generator(3)).square() + 0.02
    unigram = (unigram / unigram.sum()).log()
    model.head.bias.data = unigram
    x0 = torch.multinomial(unigram.exp(), 320 * 6, True, generator=generator(4)).view(320, 6)
    assert close(script.nelbo(model, x0, cfg, generator(5)) + unigram[x0].sum(1), prior / 2)


@pytest.mark.parametrize("window, steps", [(1.0, 48), (0.25, 96)])
def test_a_network_that_predicts_nothing_costs_ln_v_in_steps_of_the_token_sampler(window, steps):
    """(V3) exact for independent tokens in any number of steps."""
    cfg = centered(noise_window=window, emb_norm=1.0)
    torch.manual_seed(0)
    model, x0 = dit_variants.Model(cfg), torch.randint(11, (640, 6), generator=generator(1))
    for count in (steps, 7):
        miss = dit_variants.nelbo_steps(model, x0, cfg, generator(2), count) - 6 * math.log(11)
        assert close(miss, 0.002) and miss.std() < 6


# ---- the bound of an exact denoiser (E5)


@pytest.mark.parametrize("window, schedule", [
    (0.05, "logsnr"), (0.2, "cosine"), (0.2, "logistic"), (1.0, "logsnr"), (1.0, "cosine")])
def test_the_bound_does_not_depend_on_the_path(window, schedule):
    """(E5) nelbo of an exact denoiser is H + KL(q(z at t = 1) || N(0, 1)) + (sum H(x_i | z) -
    H(x | z) at t = 0), for every window and schedule; within 4 standard errors."""
    model, cfg = Oracle(JOINT, LINE, 2), config(3, -4, noise_window=window, schedule=schedule)
    eps, weight = hermite(24, 2)
    want = entropy(JOINT) + sum(gap(model, 3, -4, eps.view(-1, 2, 1), weight))
    nats = dit_variants.nelbo(model, every_row(JOINT, 4, 2, 400), cfg, generator(3))
    mean, se = weighted(nats, JOINT, 400)
    assert close((mean, se), want) and se < 0.04 / window ** 0.75 and len(model.calls) == 9 * 100


@BOTH
@pytest.mark.parametrize("window", [0.2, 1.0])
def test_the_bound_of_three_tokens_in_the_plane(window, script):
    """(E5) d = 2, V = 3, T = 3: H plus the two ends, by Monte Carlo."""
    model = Oracle(THREE, CIRCLE, 3)
    noise = torch.randn(4000, 3, 2, generator=generator(1), dtype=torch.float64)
    want = entropy(THREE) + sum(gap(model, 5, -5, noise, torch.full((4000,), 1 / 4000).double()))
    cfg = config(5, -5, 3, 3, 2, noise_window=window, script=script, emb_norm=1.0)
    mean, se = weighted(script.nelbo(model, every_row(THREE, 3, 3, 150), cfg, generator(4)),
                        THREE, 150)
    assert close((mean, se), want) and se < 0.1


@pytest.mark.parametrize("tilt, window", [(0.0, 1.0), (0.7, 1.0), (0.7, 0.3)])
def test_the_bound_and_its_parts_by_quadrature_for_one_position(tilt, window):
    """(E5) every token's bound, also of a network that errs; the window of a lone position does
    not matter. The points of the figure have the area of DIFFUSION."""
    model, cfg = Oracle(TOKENS, LINE, 1, tilt), config(4, -5, T=1, noise_window=window)
    x0, want = all_rows(4, 1).repeat_interleave(1000, 0), parts(model.one, LINE, 4, -5)
    got = dit_variants.nelbo_parts(model, x0, cfg, generator(1))
    for name, truth in zip(("prior", "diffusion", "reconstruction"), want):
        for draws, v in zip(got[name].view(4, 1000), truth):
            assert close((draws.mean(), draws.std() / 1000 ** 0.5 + 5e-4), v)
    assert (TOKENS @ want.sum(0)) > entropy(TOKENS) + 0.01 * (tilt > 0)
    area = 9 * got["integrand"].mean().item()
    assert area == pytest.approx(got["diffusion"].mean().item(), rel=1e-4)
    assert -5 < got["logsnr"].min() and got["logsnr"].max() < 4 and len(got["logsnr"]) == 32000
    model, cfg = (Oracle(TOKENS[:2] / 0.7, COIN, 1, tilt),
                  config(4, -5, 2, 1, noise_window=window, script=dit_embed))
    want = parts(model.one, COIN, 4, -5).sum(0)
    nats = dit_embed.nelbo(model, all_rows(2, 1).repeat_interleave(1000, 0), cfg, generator(1))
    assert all(close(part, v) for part, v in zip(nats.view(2, 1000), want))


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_a_network_that_predicts_vectors_has_the_bound_of_its_x0_hat_and_of_rounding(kind):
    """(V1) (E5) the same DIFFUSION as with tokens; RECONSTRUCTION is the self-likelihood."""
    x0, models = every_row(JOINT, 4, 2, 40), [Oracle(JOINT, LINE, 2, prediction_type=p)
                                              for p in ("logits", kind)]
    token, vector = (dit_variants.nelbo_parts(model, x0, config(2, -5, prediction_type=model.kind),
                                              generator(3), 4) for model in models)
    assert torch.allclose(token["diffusion"], vector["diffusion"], rtol=1e-3, atol=1e-4)
    assert torch.equal(token["prior"], vector["prior"])
    z, lam = (torch.cat(y) for y in zip(*models[1].reads))
    log = models[1].likelihood(z, lam).log_softmax(2)
    want = -log.gather(2, x0[..., None]).sum((1, 2))
    assert torch.allclose(vector["reconstruction"], want, atol=1e-3) and want.mean() > 0.05
    assert (lam - 2).abs().max() < 1e-5


def test_scaled_embeddings_are_a_shifted_schedule():
    """(E3) r E with lam lower by 2 ln r: the same likelihoods, logits, DIFFUSION and
    RECONSTRUCTION; emb_norm moves the range by itself, gamma_shift by hand."""
    r, x0 = 1.7, torch.randint(9, (64, 5), generator=generator(1))
    fixed = dict(V=9, T=5, d=4, cond="none", noise_window=0.4)
    small = shaken(network(high=5, low=-5, emb_norm=1.0, **fixed), size=0.1)
    plain = config(5, -5, emb_norm=1.0, **fixed)
    for cfg in (config(5 - 2 * math.log(r), -5 - 2 * math.log(r), emb_norm=r, **fixed),
                dataclasses.replace(plain, emb_norm=0.0, gamma_shift=math.log(r * r / 4))):
        large = dit_variants.Model(cfg)
        large.load_state_dict(small.state_dict())
        if not cfg.emb_norm:
            large.emb.weight.data = r * small.embeddings().detach()
        assert torch.allclose(large.embeddings(), r * small.embeddings(), atol=1e-6)
        ends = [e - 2 * math.log(r) for e in (5, -5)]
        assert dit_variants.logsnr_range(cfg) == pytest.approx(ends)
        one, two = (dit_variants.nelbo_parts(model, x0, some, generator(3), 4)
                    for model, some in ((small, plain), (large, cfg)))
        for part in ("diffusion", "reconstruction"):
            assert torch.allclose(one[part], two[part], rtol=2e-3, atol=2e-3)
        assert (one["prior"] - two["prior"]).abs().max() < 1e-2


@BOTH
@pytest.mark.parametrize("window", [0.1, 1.0])
def test_the_bound_given_some_tokens_is_the_conditional_entropy(window, script):
    """(E5) -log p(the others | given) of an exact denoiser; given tokens are as clean as can be,
    and never asked for."""
    model, rows = Oracle(THREE, CIRCLE, 3), all_rows(3, 3)
    cfg = config(7, -6, 3, 3, 2, noise_window=window, script=script, emb_norm=1.0)
    for given in ([0], [1, 2]):
        is_given = torch.zeros(27, 3, dtype=torch.bool)
        is_given[:, given] = True
        same = (rows[:, None, given] == rows[None, :, given]).all(2).double()
        want = -(THREE / (same @ THREE)).log()
        nats = script.nelbo(model, rows.repeat_interleave(200, 0), cfg, generator(1), 8,
                            is_given.repeat_interleave(200, 0))
        mean, se = weighted(nats, THREE, 200)
        assert close((mean, se), (THREE @ want).item() + 0.004) and se < 0.09
        levels = torch.cat([lam[:, given].flatten() for _, lam, *_ in model.calls])
        assert (levels - 7).abs().max() < 1e-5
        assert not any(is_target[:, given].any() for _, _, is_target, _ in model.calls)
        model.calls.clear()


@BOTH
def test_the_bound_of_one_token_in_a_small_window_is_unbiased(script):
    """(E5) times are spread over the stretch in which something happens, and weighted with it.
    Nothing given: the same numbers as without; everything given costs nothing."""
    joint = JOINT.view(4, 4)[:2, :2].flatten() / JOINT.view(4, 4)[:2, :2].sum()
    model = Oracle(joint, COIN, 2)
    cfg = config(6, -6, 2, noise_window=0.02, script=script, emb_norm=1.0)
    is_given = torch.tensor([[True, False]]).expand(3000, 2)
    for row, x0 in enumerate(all_rows(2, 2)):
        want = -math.log(joint[row] / joint.view(2, 2)[x0[0]].sum())
        nats = script.nelbo(model, x0.expand(3000, 2), cfg, generator(row), 4, is_given)
        assert close((nats.mean(), nats.std() / 3000 ** 0.5 + 0.0005), want)
    x0, none = all_rows(2, 2)[[1, 2]], torch.zeros(2, 2, dtype=torch.bool)
    plain = script.nelbo(model, x0, cfg, generator(1))
    assert torch.equal(plain, script.nelbo(model, x0, cfg, generator(1), 8, none))
    none[0] = True
    nats = script.nelbo(model, x0, cfg, generator(1), 8, none)
    assert nats[0] == 0 and nats[1] > 0 and nats.isfinite().all()


# ---- bounds of few steps (V2) (V3)


@pytest.mark.parametrize("tilt", [0.0, 0.7])
@pytest.mark.parametrize("sampler", ["ancestral", "token"])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_the_entropy_is_below_the_chain_and_the_chain_below_its_bound(steps, sampler, tilt):
    """(E6) (E7) (V2) (V3) one position: H <= exact -E log p of the chain, on a grid <= its bound,
    by quadrature = nelbo_steps of every token; also of a network that errs."""
    model, cfg = Oracle(TOKENS, LINE, 1, tilt), config(4, -5, T=1, sampler=sampler)
    lams = evenly(4.0, -5.0, steps)
    want = steps_bound(model.one, LINE, lams, sampler == "token")
    p = chain_distribution(model.one, LINE, lams, sampler)
    assert p.sum().item() == pytest.approx(1, abs=1e-9)
    assert entropy(TOKENS) <= -(TOKENS @ p.log()).item() + 1e-6 and (-p.log() <= want + 1e-6).all()
    nats = dit_variants.nelbo_steps(model, all_rows(4, 1).repeat_interleave(2000, 0), cfg,
                                    generator(steps), steps).view(4, 2000)
    assert all(close(nats[v], want[v]) for v in range(4))


@pytest.mark.parametrize("sampler", ["ancestral", "token"])
def test_windows_only_move_the_steps_of_a_position(sampler, monkeypatch):
    """(E2) (V2) (V3) one position with its own time: steps where it is on its way, no others."""
    monkeypatch.setattr(dit_variants, "position_times", lambda shape, *_: torch.full(shape, 0.3))
    model = Oracle(TOKENS, LINE, 1, 0.7)
    cfg = config(4, -5, T=1, noise_window=0.4, sampler=sampler)
    lams = [4.0, *(4 - 9 * (t - 0.3) / 0.4 for t in (0.375, 0.5, 0.625)), -5.0]
    want = steps_bound(model.one, LINE, lams, sampler == "token")
    nats = dit_variants.nelbo_steps(model, all_rows(4, 1).repeat_interleave(2000, 0), cfg,
                                    generator(1), 8).view(4, 2000)
    assert all(close(nats[v], want[v]) for v in range(4))


def test_more_steps_are_better_and_the_token_sampler_is_better_at_few():
    """(V2) falls with the steps and stays above H; (V3) is far tighter at few, and for one step the
    marginal entropies; both approach the bound (E5)."""
    model, x0, H = Oracle(JOINT, LINE, 2), every_row(JOINT, 4, 2, 60), entropy(JOINT)
    gauss, mixed = ([weighted(dit_variants.nelbo_steps(
        model, x0, config(5, -6, sampler=sampler), generator(s), s), JOINT, 60)
        for s in (8, 32, 128)] for sampler in ("ancestral", "token"))
    assert gauss[0][0] > gauss[1][0] + 0.1 > gauss[2][0] + 0.2 and gauss[2][0] > H
    assert all(mean > H - 4 * se for mean, se in mixed)
    assert mixed[0][0] - H < 0.2 * (gauss[0][0] - H)
    eps, weight = hermite(24, 2)
    limit = H + sum(gap(model, 5, -6, eps.view(-1, 2, 1), weight))
    assert gauss[2][0] - limit < 0.45 * (gauss[1][0] - limit)
    assert abs(mixed[2][0] - limit) < 4 * mixed[2][1] + 0.02
    one = dit_variants.nelbo_steps(model, x0, config(8, -8), generator(1), 1)
    want = torch.special.entr(marginals(JOINT, 4, 2)).sum().item()
    assert weighted(one, JOINT, 60)[0] == pytest.approx(want, abs=0.01) and want > H + 0.2


def test_bounds_do_not_change_under_autocast():
    """(E5) (V2) (V3) exponents are in the hundreds: bfloat16 products would be wrong by nats."""
    wide = dict(V=40, T=6, d=8, emb_norm=1.0, n_embd=8)
    model, x0 = network(**wide), torch.randint(40, (64, 6), generator=generator(1))
    for bound in (lambda: dit_variants.nelbo(model, x0, config(**wide), generator(2), 3),
                  *(lambda how=how: dit_variants.nelbo_steps(
                      model, x0, config(sampler=how, **wide), generator(2), 5)
                    for how in ("token", "ancestral"))):
        plain = bound()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(bound(), plain, rtol=1e-3, atol=0.02)


# ---- training losses


@pytest.mark.parametrize("window", [1.0, 0.4])
def test_the_loss_is_the_cross_entropy_of_noisy_positions_rows_first(window):
    """(E1) (E4) by hand, from what the network saw; one time in each of B cells with one offset;
    clean positions cost nothing."""
    model, x0 = Oracle(THREE, CIRCLE, 3), all_rows(3, 3)
    cfg = config(4, -5, 3, 3, 2, noise_window=window, script=dit_embed)
    lam, eps, weight = dit_embed.corrupt(x0, cfg, generator(1))
    loss = dit_embed.loss_fn(model, x0, lam, eps, weight).item()
    (z, levels, is_target, _), = model.calls
    assert torch.equal(is_target, lam < 4 - 1e-5) and torch.equal(levels, lam)
    alpha, sigma = (y[..., None] for y in alpha_sigma(lam))
    assert torch.allclose(z.double(), alpha * CIRCLE[x0] + sigma * eps, atol=1e-5)
    nats = F.cross_entropy(model(z, lam).transpose(1, 2), x0, reduction="none") * is_target
    rows = [(n.sum() / w.sum()).item() for n, w in zip(nats, is_target) if w.any()]
    assert loss == pytest.approx(sum(rows) / 27, rel=1e-5)
    if window == 1:
        t = (4 - lam[:, 0]) / 9 * 27 - torch.arange(27)
        assert (t - t[0]).abs().max() < 1e-4 and 0 < t[0] < 1
    eps = dit_embed.corrupt(torch.zeros(4000, 3, dtype=torch.long), cfg, generator(2))[1]
    assert stats.kstest(eps.flatten().numpy(), "norm").pvalue > 1e-3


def test_without_options_the_lab_is_the_script():
    """The same weights, noise, loss, bound and samples from the same generator states."""
    for more in (dict(order="maxprob", num_steps=9, temperature=0.5), dict(),
                 dict(order="l2r", noise_window=0.3, top_p=0.9)):
        wide = dict(V=30, T=9, d=6, emb_norm=1.0, noise_window=0.1) | more
        x0, draws = torch.randint(30, (8, 9), generator=generator(1)), []
        canvas = x0.masked_fill(torch.rand(8, 9, generator=generator(2)) < 0.7, 30)
        for script in (dit_embed, dit_variants):
            model, cfg = shaken(network(script=script, **wide)), config(script=script, **wide)
            frames = []
            loss = script.loss_fn(model, x0, *script.corrupt(x0, cfg, generator(3)))
            x, nfe = script.sample(model, canvas, cfg, generator(5),
                                   on_step=lambda nfe, x: frames.append(x))
            draws.append((loss, script.nelbo(model, x0, cfg, generator(4)).float(), x,
                          torch.tensor(nfe), torch.stack(frames)))
        for a, b in zip(*draws):
            assert torch.allclose(a, b, rtol=1e-5)


def test_a_prefix_is_a_random_beginning_of_some_rows():
    """prefix = share of rows whose first floor(T u) positions are clean, and cost nothing."""
    cfg = config(4, -5, 3, 3, 2, prefix=0.6)
    lam, _, weight = dit_variants.corrupt(torch.zeros(9000, 3, dtype=torch.long), cfg, generator(1))
    is_noisy = lam < 4 - 1e-5
    assert (is_noisy[:, :-1] <= is_noisy[:, 1:]).all()
    assert torch.equal(weight[..., 0] > 0, is_noisy)
    length = (3 - is_noisy.sum(1)).bincount(minlength=4) / 9000
    assert length.tolist() == pytest.approx([1 - 0.6 * 2 / 3, 0.2, 0.2, 0], abs=0.02)


@pytest.mark.parametrize("kind", ["logits", "eps", "x0", "v"])
def test_mse_is_the_squared_error_of_what_the_network_predicts(kind):
    """(V1) per number; for logits of x0_hat (E4); with its weight, the rounding loss of z at the
    clean end."""
    model, x0 = Oracle(THREE, CIRCLE, 3, 0.7, kind), all_rows(3, 3)
    cfg = config(2, -4, 3, 3, 2, noise_window=0.5, prediction_type=kind, loss="mse",
                 rounding_weight=0.0)
    loss = loss_of(model, x0, cfg, generator(1)).item()
    (z, lam, is_target, _), = model.calls
    emb = CIRCLE.double()[x0]
    alpha, sigma = (y[..., None] for y in alpha_sigma(lam))
    eps, out = (z - alpha * emb) / sigma, model(z, lam)
    goal = {"eps": eps, "v": alpha * eps - sigma * emb}.get(kind, emb)
    out = out.double().softmax(2) @ CIRCLE.double() if kind == "logits" else out
    error = (out - goal).square().mean(2) * is_target
    rows = [(e.sum() / w.sum()).item() for e, w in zip(error, is_target) if w.any()]
    assert not model.reads and loss == pytest.approx(sum(rows) / 27, rel=1e-4)
    for weight in (0.5, 2.0):
        model.reads.clear()
        more = loss_of(model, x0, dataclasses.replace(cfg, rounding_weight=weight), generator(1))
        (z0, lam0), = model.reads
        noise = (z0 - alpha_sigma(2.0)[0] * emb) / alpha_sigma(2.0)[1]
        assert abs(noise.mean()) < 0.3 and abs(noise.std() - 1) < 0.2
        end = -model.likelihood(z0, lam0).log_softmax(2).gather(2, x0[..., None]).mean().item()
        assert more.item() == pytest.approx(loss + weight * end, rel=1e-4) and end > 0.03
        assert (lam0 - 2).abs().max() < 1e-5


@pytest.mark.parametrize("kind, window, prefix", [("logits", 0.3, 0.0), ("eps", 1.0, 0.0),
                                                  ("v", 0.3, 0.0), ("logits", 1.0, 1.0)])
def test_the_vlb_loss_is_the_bound_per_token_with_rounding_by_the_self_likelihood(kind, window,
                                                                                  prefix):
    """(E5) unbiased for the bound of a network that predicts vectors, whose RECONSTRUCTION is that;
    a given beginning costs nothing."""
    x0 = all_rows(4, 2).repeat(64, 1)
    model, eps = (Oracle(JOINT, LINE, 2, 0.7, kind) for kind in (kind, "eps"))
    cfg = config(1.5, -1, noise_window=window, loss="vlb", prediction_type=kind, prefix=prefix)
    with torch.no_grad():
        mean, se = mean_and_se(lambda g: loss_of(model, x0, cfg, g), 30)
    half = torch.rand(1024, 1, generator=generator(3)) < 0.5 * prefix  # floor(2 u) is 0 or 1
    nats = dit_variants.nelbo(eps, x0, dataclasses.replace(cfg, prediction_type="eps"),
                              generator(5), 16, torch.cat((half, torch.zeros_like(half)), 1)) / 2
    row_se = nats.view(64, 16).mean(1).std().item() / 8
    assert close((mean, math.hypot(se, row_se)), nats.mean().item()) and se < 0.05


def test_the_gradient_of_the_vlb_reaches_the_embeddings_unless_they_are_fixed():
    """(E5) finite differences under the same noise; with fixed embeddings there is none."""
    x0, g = torch.randint(5, (8, 4), generator=generator(1)), generator
    for train, loss in itertools.product((True, False), ("vlb", "ce")):
        wide = dict(V=5, T=4, d=3, emb_train=train, loss=loss)
        model, cfg = shaken(network(**wide), size=0.1), config(3, -4, **wide)
        loss_of(model, x0, cfg, g(2)).backward()
        grad = model.emb.weight.grad
        assert (grad is not None) == train and model.head.weight.grad.abs().max() > 0
        if train and loss == "vlb":
            step, values = torch.randn(5, 3, generator=g(3)) * 3e-3, []
            for size in (1, -2):
                model.emb.weight.data += size * step
                values.append(loss_of(model, x0, cfg, g(2)).item())
            assert (grad * step).sum().item() == pytest.approx((values[0] - values[1]) / 2, rel=.05)


# ---- what cannot work, collapse


@pytest.mark.parametrize("bad", [dict(prediction_type="x0"),
                                 dict(prediction_type="eps", loss="mse"), dict(loss="mse")])
def test_a_squared_error_that_would_make_all_embeddings_alike_is_refused(bad):
    bad |= dict(order="random", sampler="ancestral")
    said, = dit_variants.Config(rounding_weight=0.0, **bad).problems()
    assert all(flag in said for flag in ("--rounding-weight 1", "--no-emb-train",
                                         "--allow-collapse"))
    for good in (dict(rounding_weight=1.0), dict(rounding_weight=0.0, emb_train=False),
                 dict(rounding_weight=0.0, allow_collapse=True), dict(loss="vlb")):
        assert not dit_variants.Config(**bad | good).problems()


@pytest.mark.parametrize("bad", [dict(loss="ce"), dict(sampler="token"), dict(order="maxprob"),
                                 dict(noise_window=0.0), dict(noise_window=1.1), dict(eta=1.5)])
def test_what_cannot_work_is_refused(bad):
    good = dict(prediction_type="eps", sampler="ancestral", order="random")
    assert not dit_variants.Config(**good).problems()
    assert len(dit_variants.Config(**good | bad).problems()) == 1
    assert bool(dit_embed.Config(noise_window=0.0).problems())


def train(model, cfg, x0, steps):
    """Steps at a constant learning rate."""
    optimizers, g = dit_embed.make_optimizers(model, cfg), generator(2)
    for step in range(steps):
        loss_of(model, x0, cfg, g).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * group["scale"]
            optimizer.step(), optimizer.zero_grad()
    return optimizers


def test_a_bare_squared_error_shrinks_the_embeddings_and_the_rounding_loss_keeps_them_apart():
    x0, apart = torch.randint(6, (16, 4), generator=generator(1)), {}
    for weight in (0.0, 1.0):
        wide = dict(V=6, T=4, d=4, prediction_type="x0", rounding_weight=weight, lr=2e-3)
        model = network(**wide)
        before = torch.pdist(model.embeddings().detach()).mean().item()
        train(model, config(4, -6, **wide), x0, 150)
        apart[weight] = torch.pdist(model.embeddings().detach()).mean().item() / before
    assert apart[0.0] < 0.3 and apart[1.0] > 0.35 and apart[1.0] > 2 * apart[0.0]


# ---- the network


LAM, SOME = torch.linspace(-5, 5, 18).view(3, 6), torch.randn(3, 6, 4, generator=generator(9))
SHAPES = dict(V=7, T=6, d=4, emb_norm=1.0, n_layer=2)
each_network = pytest.mark.parametrize("kind", [
    dict(script=dit_embed),
    *(dict(cond=c, norm=n, pos=p, input=i) for c, n, p, i in (
        ("adaln", "post", "rotary", "both"), ("add", "pre", "learned", "raw"),
        ("add", "post", "both", "both"), ("none", "pre", "rotary", "likelihood"),
        ("none", "post", "learned", "raw")))], ids=lambda k: " ".join(map(str, k.values())))


@each_network
def test_every_position_sees_every_other_of_its_row_and_no_other_row(kind):
    """(E4) of z and of lam; `is_target` only selects."""
    model = shaken(network(**SHAPES, **kind))
    out = model(SOME, LAM)
    assert out.shape == (3, 6, 7) and torch.equal(out, model(SOME, LAM))
    for j in (0, 5):
        other, level = SOME.clone(), LAM.clone()
        other[1, j] += 0.5
        change = (model(other, LAM) - out).abs().amax(2)
        assert (change[1] > 1e-5).all() and change[[0, 2]].max() < 1e-5
        level[1, j] += 1.5
        change = (model(SOME, level) - out).abs().amax(2)
        assert change[1, j] > 1e-5 and change[[0, 2]].max() < 1e-5
        if kind.get("cond") != "none" or kind["input"] != "raw":
            assert (change[1] > 1e-6).all()
    is_target = torch.rand(3, 6, generator=generator(1)) < 0.4
    assert torch.allclose(model(SOME, LAM, is_target), out[is_target], atol=1e-5)
    if "cond" in kind:
        model = shaken(network(**SHAPES, **kind, prediction_type="eps"))
        assert torch.allclose(model(SOME, LAM, is_target), model(SOME, LAM)[is_target], atol=1e-5)
        assert model(SOME, LAM).shape == (3, 6, 4)


@each_network
def test_both_ends_are_finite_forward_and_backward(kind):
    """At 1e-6 from the ends and beyond, in float32 and bfloat16; logits stay float32."""
    script, cfg = kind.get("script", dit_variants), config(**SHAPES, **kind)
    t = torch.tensor([[0.0, 1e-6, 0.3, 0.7, 1 - 1e-6, 1.0]]).expand(3, 6)
    for cast in (False, True):
        model, x0 = shaken(network(**SHAPES, **kind)), torch.arange(18).view(3, 6) % 7
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = model(SOME, 6 - 12 * t)
            assert out.isfinite().all() and out.dtype == torch.float32
            loss = script.loss_fn(model, x0, *script.corrupt(x0, cfg, generator(1)))
        (loss + out.square().mean()).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize("cond", ["adaln", "add", "none"])
def test_conditioning_starts_as_none_and_comes_alive(cond):
    """With the same weights the network predicts the same under every cond at first, as its noise
    layers are zero; afterwards the level matters beyond the self-likelihood."""
    bare = dict(SHAPES, input="raw", add_likelihood=False)
    plain, model = shaken(network(cond="none", **bare)), network(cond=cond, **bare)
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.allclose(model(SOME, LAM), plain(SOME, LAM), atol=1e-5)
    shaken(model)
    assert torch.allclose(model(SOME, LAM), model(SOME, LAM + 1), atol=1e-6) == (cond == "none")


def test_neighbouring_levels_look_different_to_the_network():
    """The sinusoids are of 1000 times the share of the range: a hundredth of it turns them."""
    model = network(script=dit_embed, **SHAPES)
    model.noise_in.weight.data = torch.eye(128)[:16]
    cos = model.embed_noise(torch.tensor([0.0, 0.12]))
    assert (cos[0] - cos[1]).abs().max() > 0.5
    share = (6 - 0.12) / 12  # of the way from the largest to the smallest lam
    want = F.silu((1000 * share * 10000 ** (-torch.arange(16) / 64)).cos())
    assert torch.allclose(cos[1], want, atol=1e-2)


def test_positions_are_told_as_pos_says():
    """Without neighbours mixed, learned positions at zero know no order; rotary ones do."""
    turn = torch.tensor([3, 1, 4, 0, 5, 2])
    for pos in ("learned", "rotary", "both"):
        model = shaken(network(**SHAPES, pos=pos))
        before = model(SOME, LAM)
        model.conv.weight.data.zero_()
        assert hasattr(model, "wpe") == (pos != "rotary")
        if pos != "rotary":
            model.wpe.weight.data.zero_()
            assert not torch.allclose(model(SOME, LAM), before, atol=1e-3)
        same = torch.allclose(model(SOME[:, turn], LAM[:, turn]), model(SOME, LAM)[:, turn],
                              atol=1e-5)
        assert same == (pos == "learned")


@pytest.mark.parametrize("kind", ["likelihood", "raw", "both"])
def test_the_input_is_what_input_says(kind):
    """likelihood: nothing of z but its softmax (a direction that no token has does not matter),
    and nothing at all of pure noise; raw: the embeddings do not matter."""
    wide = dict(SHAPES, emb_norm=0.0, input=kind, add_likelihood=False, cond="none")
    model = shaken(network(**wide))
    for lam, same in ((-6.0, True), (-5.95, False), (0.0, False)):
        lam = torch.full((3, 6), lam)
        equal = torch.allclose(model(SOME, lam), model(SOME + 1, lam), atol=1e-6)
        assert equal == (same and kind == "likelihood")
    model.emb.weight.data[:, 3] = 0.0
    aside = SOME + torch.tensor([0.0, 0, 0, 1.0])
    same = torch.allclose(model(SOME, LAM), model(aside, LAM), atol=1e-5)
    assert same == (kind == "likelihood")
    before = model(SOME, LAM)
    model.emb.weight.data *= 1.5
    assert torch.allclose(model(SOME, LAM), before, atol=1e-6) == (kind == "raw")


def test_no_guess_is_a_guess_of_zeros():
    model, zeros = shaken(network(**SHAPES, self_cond=0.5)), torch.zeros_like(SOME)
    assert torch.equal(model(SOME, LAM), model(SOME, LAM, None, zeros))
    assert not torch.allclose(model(SOME, LAM), model(SOME, LAM, None, zeros + 1), atol=1e-3)


@each_network
def test_every_parameter_learns_within_a_few_steps(kind):
    """No gate is closed behind another; every weight has exactly one optimizer."""
    wide = SHAPES | {k: v for k, v in kind.items() if k != "script"} | dict(self_cond=1.0, lr=1e-3)
    model = network(**wide)
    before = copy.deepcopy(model.state_dict())
    optimizers = train(model, config(**wide), torch.arange(6).expand(16, 6) % 7, 6)
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name
    owned = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(map(id, model.parameters()))
