"""Gaussian diffusion on embeddings: levels, clocks, evidence, bounds, losses, the network, against
Bayes' rule, quadrature and by hand. Every expected figure is made in gauss_tables.py or here."""
import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import dit_embed
from gauss_tables import (LINE, PLANE, Oracle, alpha_sigma, chain_law, conditioning, dirichlet,
                          entropy, gap, hermite, marginals, one_bound, one_continuous, settings)
from tables import all_rows, generator, mean_and_se

SCHEDULES = ("logsnr", "logistic", "linear", "cosine", "sqrt")
JOINT, WORDS = dirichlet(4, 2), torch.tensor([0.5, 0.2, 0.05, 0.25], dtype=torch.float64)
ROWS = all_rows(4, 2)


def config(high=6.0, low=-6.0, V=4, T=2, d=1, **changes):
    return dit_embed.Config(**settings(high, low, V, T, d, **changes))


def network(seed=0, **changes):
    torch.manual_seed(seed)
    return dit_embed.Model(config(**changes))


def shaken(model, seed=1, size=0.3):
    """Weights far from their initial zeros, so that every path is alive."""
    g = generator(seed)
    for p in model.parameters():
        p.data += size * torch.randn(p.shape, generator=g)
    return model


def close(mean, se, truth, width=4):
    return abs(mean - truth) < width * se + 1e-6


def weighed(draws, joint, times):
    """Mean over a law of rows and its standard error, from `times` draws for every row in turn."""
    draws = draws.view(len(joint), times).double()
    return (joint * draws.mean(1)).sum().item(), \
        (joint.square() * draws.var(1) / times).sum().sqrt().item()


def every_row(joint, V, T, times):
    return all_rows(V, T).repeat_interleave(times, 0)


# ---- schedules (E1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_falls_from_end_to_end_with_its_stated_slope(name):
    """(E1) lam is between the ends, never rises, and its slope is the derivative: checked by finite
    differences in float64; 0 exactly where the range cuts it off."""
    for high, low in ((3.0, -4.0), (6.0, -6.0), (12.0, -12.0)):
        cfg = config(high, low, schedule=name)
        t = torch.linspace(0, 1, 4001, dtype=torch.float64)
        lam, slope = dit_embed.log_snr(t, cfg)
        assert lam.dtype == slope.dtype == t.dtype and lam.isfinite().all()
        assert lam[0] <= high + 1e-9 and lam[-1] >= low - 1e-9 and (lam.diff() <= 0).all()
        assert (slope >= 0).all() and slope.isfinite().all()
        cut = (lam >= high - 1e-9) | (lam <= low + 1e-9)
        inside = ~cut[:-2] & ~cut[2:] & (t[1:-1] > 0.02) & (t[1:-1] < 0.98)
        steep = -(lam[2:] - lam[:-2]) / (t[2:] - t[:-2])
        assert inside.sum() > 400
        assert torch.allclose(slope[1:-1][inside], steep[inside], rtol=2e-3)
        if name == "logistic":
            continue  # its slope at the ends is steep, not cut off
        assert name == "logsnr" or (slope[cut] == 0).all()
        area = (0.5 * (slope[1:] + slope[:-1]) * t.diff())[~cut[:-1] & ~cut[1:]].sum()
        assert area == pytest.approx((lam[~cut].max() - lam[~cut].min()).item(), rel=0.03)


def test_a_range_that_every_schedule_covers_begins_and_ends_at_its_ends():
    for name in SCHEDULES:
        lam, _ = dit_embed.log_snr(torch.tensor([0.0, 1.0]), config(4, -5, schedule=name))
        assert lam.tolist() == pytest.approx([4, -5], abs=1e-5)
    lam, slope = dit_embed.log_snr(torch.tensor([0.0, 0.25, 1.0]), config(4, -6))
    assert lam.tolist() == pytest.approx([4, 1.5, -6]) and slope.tolist() == pytest.approx(3 * [10])


def test_the_ends_lie_around_the_place_where_a_token_is_lost():
    """ln(2 ln V / r^2), r the norm or sqrt(d) for free embeddings; lower by gamma_shift."""
    for norm, d, r2 in ((1.0, 16, 1), (2.0, 16, 4), (0.0, 16, 16)):
        cfg = dit_embed.Config(vocab_size=2048, emb_dim=d, emb_norm=norm, lam_above=3.0,
                               lam_below=8.0, gamma_shift=0.0)
        center = math.log(2 * math.log(2048) / r2)
        assert dit_embed.ends(cfg) == pytest.approx((center + 3, center - 8))
        moved = dataclasses.replace(cfg, gamma_shift=0.7)
        assert dit_embed.ends(moved) == pytest.approx((center + 2.3, center - 8.7))


def test_the_named_schedules_are_their_papers():
    """(E1) alpha-bar: exp(-(0.1 t + 19.9 t^2 / 2)), cos^2(pi / 2 (t + .008) / 1.008) and
    1 - sqrt(t + 1e-4); linear is the limit of prod (1 - beta) of Ho et al. at 1000 steps."""
    t = torch.linspace(0.02, 0.97, 96, dtype=torch.float64)
    bar = {"linear": (-0.1 * t - 0.5 * 19.9 * t ** 2).exp(),
           "cosine": ((t + 0.008) / 1.008 * math.pi / 2).cos().square(),
           "sqrt": 1 - (t + 1e-4).sqrt()}
    for name, want in bar.items():
        lam, _ = dit_embed.log_snr(t, config(20, -20, schedule=name))
        assert torch.allclose(alpha_sigma(lam)[0].square(), want, rtol=1e-9)
    lam, _ = dit_embed.log_snr(torch.arange(1, 1001).double() / 1000,
                               config(20, -20, schedule="linear"))
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    product = (1 - beta).log().cumsum(0)
    assert torch.allclose(alpha_sigma(lam)[0].square().log(), product, rtol=0.02, atol=3e-3)


def test_the_logistic_schedule_lingers_where_tokens_are_lost():
    """(E1) the share of time spent above lam is that of a logistic distribution around the center,
    between the ends."""
    cfg = config(4, -5, schedule="logistic")
    center = math.log(2 * math.log(4))
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    lam, slope = dit_embed.log_snr(t, cfg)
    share = [1 / (1 + (y - center).exp()) for y in (lam, lam[:1] * 0 + 4, lam[:1] * 0 - 5)]
    assert torch.allclose((share[0] - share[1]) / (share[2] - share[1]), t, atol=1e-9)
    assert (lam[slope.argmin()] - center).abs() < 0.1


def test_a_shift_lowers_every_schedule():
    """gamma_shift subtracts from lam of all schedules, range included."""
    t = torch.linspace(0.1, 0.9, 9)
    for name in SCHEDULES:
        lam, slope = dit_embed.log_snr(t, config(30, -30, schedule=name))
        low, same = dit_embed.log_snr(t, dataclasses.replace(config(30, -30, schedule=name),
                                                             gamma_shift=1.3))
        assert torch.allclose(low, lam - 1.3, atol=1e-5) and torch.allclose(slope, same)


def test_noise_has_the_stated_scale():
    """(E1) alpha^2 + sigma^2 = 1 and alpha^2 / sigma^2 = exp(lam)."""
    lam = torch.linspace(-9, 9, 37)
    one, none = torch.ones(37, 1), torch.zeros(37, 1)
    alpha, sigma = dit_embed.noised(one, lam, none), dit_embed.noised(none, lam, one)
    assert torch.allclose(alpha ** 2 + sigma ** 2, one, atol=1e-6)
    assert torch.allclose((alpha / sigma)[:, 0] ** 2, lam.exp(), rtol=1e-5)
    assert torch.allclose(dit_embed.noised(2 * one, lam, 3 * one), 2 * alpha + 3 * sigma)


# ---- clocks (E2)


@pytest.mark.parametrize("window", [0.05, 0.2, 0.5, 1.0])
def test_every_position_goes_from_noise_to_token_in_its_window(window):
    """(E2) own time (t - tau) / w, clamped; lam and slope of it; undecided at t = 1, settled at
    t = 0; at most w / (1 - w) of the positions, and one, on the way."""
    cfg = config(5, -6, T=24, window=window)
    tau = dit_embed.clocks((50, 24), cfg, generator(1))
    assert tau.shape == (50, 24) and tau.min() >= 0 and tau.max() <= 1 - window + 1e-6
    before, begun = torch.full((50, 24), 5.0), torch.zeros(50, 24)
    for t in torch.linspace(0, 1, 41):
        own, lam, slope = dit_embed.levels(t.expand(50, 1), tau, cfg)
        assert torch.allclose(own, ((t - tau) / window).clamp(0, 1), atol=1e-6)
        assert torch.allclose(lam, 5 - 11 * own, atol=1e-5) and (lam <= before + 1e-6).all()
        on_the_way = (own > 0) & (own < 1)
        assert torch.allclose(slope, 11 / window * on_the_way, rtol=1e-5)
        if window < 1:
            assert on_the_way.sum(1).max() <= min(24, 24 * window / (1 - window) + 1)
        before, begun = lam, begun + on_the_way
    assert (own == 1).all() and (dit_embed.levels(0.0, tau, cfg)[0] == 0).all()
    assert (begun > 0).all() or window == 0.05


@pytest.mark.parametrize("name", ["cosine", "sqrt"])
def test_windows_hold_the_whole_schedule(name):
    """(E2) lam_i = lam((t - tau_i) / w) and its chain rule, for shapes that are not straight."""
    cfg = config(4, -5, T=6, window=0.3, schedule=name)
    tau = dit_embed.clocks((9, 6), cfg, generator(1))
    t, h = torch.full((9, 1), 0.45), 1e-3
    own, lam, slope = dit_embed.levels(t, tau, cfg)
    later, sooner = (dit_embed.levels(t + s, tau, cfg)[1] for s in (h, -h))
    smooth = (own > 0.05) & (own < 0.95) & (lam < 3.9) & (lam > -4.9)
    assert smooth.sum() > 5
    assert torch.allclose(slope[smooth], ((sooner - later) / (2 * h))[smooth], rtol=0.02)
    assert torch.equal(lam, dit_embed.log_snr(own, cfg)[0])


def test_clocks_are_a_comb_in_random_order():
    """(E2) sorted, they are (1 - w) (rank + u) / T with one u per row; every position has every
    rank equally often, and u is uniform."""
    cfg = config(T=5, window=0.3)
    tau = dit_embed.clocks((8000, 5), cfg, generator(2)) / 0.7 * 5
    comb = tau.sort(1).values - torch.arange(5)
    assert (comb - comb[:, :1]).abs().max() < 1e-5 and 0 <= comb.min() and comb.max() < 1
    assert stats.kstest(comb[:, 0].numpy(), "uniform").pvalue > 1e-3
    rank = tau.argsort(1).argsort(1)
    for i in range(5):
        assert stats.chisquare(rank[:, i].bincount(minlength=5).numpy()).pvalue > 1e-3
    orders = (rank[:, :4] * 5 ** torch.arange(4)).sum(1).unique(return_counts=True)[1]
    assert len(orders) == 120 and stats.chisquare(orders.numpy()).pvalue > 1e-3


def test_with_window_1_all_positions_are_alike():
    """(E2) the classic process."""
    cfg = config(T=7, window=1.0)
    tau = dit_embed.clocks((30, 7), cfg, generator(3))
    assert (tau == 0).all()
    own, lam, _ = dit_embed.levels(torch.rand(30, 1, generator=generator(4)), tau, cfg)
    assert torch.equal(lam, lam[:, :1].expand(30, 7)) and own.unique().numel() == 30


def test_frozen_positions_are_always_clean_and_the_others_share_the_comb():
    """(E2) the comb of a row is over its free positions alone."""
    cfg = config(5, -6, T=9, window=0.25)
    frozen = torch.rand(400, 9, generator=generator(4)) < 0.4
    frozen[0] = True
    tau = dit_embed.clocks((400, 9), cfg, generator(5), frozen)
    assert (tau[frozen] == torch.inf).all()
    for t in (0.0, 0.3, 0.9, 1.0):
        own, lam, slope = dit_embed.levels(t, tau, cfg)
        assert (own[frozen] == 0).all() and (lam[frozen] - 5).abs().max() < 1e-5
        assert (slope[frozen] == 0).all() and t < 1 or (own[~frozen] == 1).all()
    for row, keep in zip(tau, ~frozen):
        N = int(keep.sum())
        comb = row[keep].sort().values / 0.75 * max(N, 1) - torch.arange(N)
        assert N == 0 or 0 <= comb.min() and comb.max() < 1 and comb.max() - comb.min() < 1e-5


def test_deal_hands_out_the_same_clocks_highest_score_first():
    """The waiting positions keep their clocks as a set; the best begins next, at the latest tau."""
    g = generator(6)
    tau, waiting = torch.rand(300, 8, generator=g), torch.rand(300, 8, generator=g) < 0.6
    score = torch.rand(300, 8, generator=g)
    dealt = dit_embed.deal(tau, waiting, score)
    assert torch.equal(dealt[~waiting], tau[~waiting])
    assert torch.equal(dealt.sort(1).values, tau.sort(1).values)
    for row, old, mask, value in zip(dealt, tau, waiting, score):
        by_score = row[mask][value[mask].argsort(descending=True)]
        assert torch.equal(by_score, old[mask].sort(descending=True).values)


# ---- evidence (E3), posterior (E4), what networks say (E5)


@pytest.mark.parametrize("norm", [0.0, 1.0, 2.5])
def test_evidence_is_the_log_density_but_for_a_constant(norm):
    """(E3) against torch.distributions in float64."""
    model = network(V=9, d=3, emb_norm=norm)
    z, lam = torch.randn(40, 5, 3, generator=generator(1)), torch.linspace(-7, 7, 200).view(40, 5)
    alpha, sigma = alpha_sigma(lam)
    E = model.table().detach().double()
    density = torch.distributions.Normal(alpha[..., None, None] * E, sigma[..., None, None])
    want = density.log_prob(z.double()[:, :, None]).sum(-1)
    got = model.evidence(z, lam).double()
    differ = (got - want) - (got - want).mean(-1, keepdim=True)
    assert (differ.abs() / (1 + want.abs().amax(-1, True))).max() < 1e-5


def test_evidence_stays_float32_under_autocast():
    """(E3) and so does the mean embedding (E4)."""
    model = network(V=50, d=4, emb_norm=1.0)
    z, lam = torch.randn(20, 3, 4, generator=generator(1)), torch.linspace(-5, 7, 60).view(20, 3)
    plain, logits = model.evidence(z, lam), torch.randn(20, 3, 50, generator=generator(2))
    mean = model.mean(logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.evidence(z, lam), plain) and plain.dtype == torch.float32
        assert torch.equal(model.mean(logits), mean) and mean.dtype == torch.float32
        assert model.evidence(z, lam).max() > 100  # where bfloat16 would have lost whole nats


def test_the_mean_embedding_is_the_posterior_mean_within_the_hull():
    """(E4) sum_v p(v) E_v; never longer than the longest row."""
    model = network(V=6, d=2, emb_norm=1.5)
    logits = 3 * torch.randn(500, 6, generator=generator(1))
    mean, E = model.mean(logits), model.table()
    by_hand = sum(logits.softmax(1)[:, v, None] * E[v] for v in range(6))
    assert torch.allclose(mean, by_hand, atol=1e-6) and mean.norm(dim=1).max() <= 1.5
    towards = torch.randn(2, 99, generator=generator(2))  # no direction in which it sticks out
    assert ((mean @ towards) <= (E @ towards).amax(0) + 1e-5).all()


def test_own_evidence_enters_the_logits_exactly():
    """(E4) with a zero head p(v | z) is Bayes' rule for one position; skip adds evidence, no more.
    """
    z, lam = torch.randn(3, 6, 2, generator=generator(1)), torch.linspace(-4, 4, 18).view(3, 6)
    model = network(V=5, T=6, d=2, emb_norm=1.0)
    alpha, sigma = alpha_sigma(lam)
    far = (z.double()[..., None, :] - alpha[..., None, None] * model.table().double()).square()
    bayes = (-0.5 * far.sum(-1) / sigma.square()[..., None]).softmax(2)
    assert torch.allclose(model(z, lam).softmax(2).double(), bayes, atol=1e-5)
    shaken(model)
    bare = network(V=5, T=6, d=2, emb_norm=1.0, skip=False)
    bare.load_state_dict(model.state_dict())
    assert torch.allclose(model(z, lam) - model.evidence(z, lam), bare(z, lam), atol=1e-4)
    for param in ("eps", "x0", "v"):  # evidence is about tokens
        assert not network(V=5, T=6, d=2, param=param).skip


def test_what_a_network_says_means_the_same_embedding():
    """(E5) estimate undoes eps, v and x0; and exp(lam) |e - e_hat|^2 = |eps - eps_hat|^2 =
    alpha^2 |v - v_hat|^2: the same bound for all of them."""
    g = generator(1)
    lam = torch.linspace(-4, 4, 40).double()
    emb, hat, eps = torch.randn(3, 40, 5, generator=g).double()
    alpha, sigma = (y[:, None] for y in alpha_sigma(lam))
    z = dit_embed.noised(emb, lam, eps)
    eps_hat, v, v_hat = (z - alpha * hat) / sigma, alpha * eps - sigma * emb, None
    v_hat = (alpha * z - hat) / sigma
    for param, out in (("eps", eps_hat), ("v", v_hat), ("x0", hat)):
        got = dit_embed.estimate(None, out, z, lam, config(d=5, param=param))
        assert torch.allclose(got.double(), hat, atol=1e-4)
    sides = [y.square().sum(1) for y in (emb - hat, eps - eps_hat, v - v_hat)]
    assert torch.allclose(lam.exp() * sides[0], sides[1])
    assert torch.allclose(sides[1], alpha[:, 0] ** 2 * sides[2])
    assert torch.allclose(dit_embed.estimate(None, v, z, lam, config(d=5, param="v")).double(),
                          emb, atol=1e-4)


def test_the_nearest_row_to_a_mean_may_be_a_third_token():
    """Why rounding draws from a softmax (E4): half of one token and half of another lies nearest
    to neither."""
    E = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.1]])
    model = network(V=3, d=2)
    model.code.weight.data = E
    mean = model.mean(torch.tensor([[0.0, 0.0, -50.0]]))
    assert torch.cdist(mean, E).argmin(1).item() == 2


# ---- steps (E8)


def test_a_step_is_the_gaussian_posterior():
    """(E8) A, B and sigma_q from conditioning z_s on z_t; and the coefficients of DDPM in beta."""
    for lam_t, lam_s in ((-5.0, -4.9), (-2.0, 1.0), (3.0, 3.5), (-6.0, 6.0)):
        A, B, sd = dit_embed.bridge(torch.tensor([lam_t]).double(), torch.tensor([lam_s]).double())
        assert A.shape == B.shape == sd.shape == (1, 1)
        want = [y.item() for y in conditioning(lam_t, lam_s)]
        assert (A.item(), B.item(), sd.item()) == pytest.approx(want, rel=1e-6)
        bar_t, bar_s = (alpha_sigma(y)[0].item() ** 2 for y in (lam_t, lam_s))
        beta = 1 - bar_t / bar_s
        assert B.item() == pytest.approx(math.sqrt(bar_s) * beta / (1 - bar_t), rel=1e-6)
        assert A.item() == pytest.approx(math.sqrt(1 - beta) * (1 - bar_s) / (1 - bar_t), rel=1e-6)
        assert sd.item() ** 2 == pytest.approx(beta * (1 - bar_s) / (1 - bar_t), rel=1e-6)


def test_steps_put_together_are_a_step():
    """(E8) z_t -> z_r -> z_s has the mean and the variance of z_t -> z_s."""
    t, r, s = (torch.tensor([y]).double() for y in (-3.0, -0.5, 2.0))
    (A1, B1, q1), (A2, B2, q2), (A, B, q) = (dit_embed.bridge(*pair)
                                             for pair in ((t, r), (r, s), (t, s)))
    assert torch.allclose(A1 * A2, A) and torch.allclose(A2 * B1 + B2, B)
    assert torch.allclose((A2 * q1) ** 2 + q2 ** 2, q ** 2)


# ---- the bound at the start (E6)


STARTS = [dict(window=1.0, emb_norm=1.0), dict(window=0.1, emb_norm=1.0),
          dict(window=0.5, emb_norm=0.0), dict(window=0.2, emb_norm=2.0, schedule="cosine"),
          dict(window=1.0, emb_norm=1.0, schedule="sqrt", gamma_shift=0.5),
          dict(window=0.4, emb_norm=0.0, schedule="linear", V=30),
          dict(window=0.3, emb_norm=1.0, emb_train=False, d=3)]


@pytest.mark.parametrize("changes", STARTS, ids=lambda c: " ".join(map(str, c.values())))
def test_a_network_that_says_nothing_costs_ln_v(changes):
    """(E6) a zero head and own evidence are the Bayes denoiser of uniform tokens: PRIOR + DIFF +
    RECON = ln V a position, for any text; and with a bias, its cross-entropy. Catches every wrong
    constant, weight and sum at once."""
    changes = dict(V=11, d=6) | changes
    r2 = changes["emb_norm"] ** 2 or changes["d"]
    center = math.log(2 * math.log(changes["V"]) / r2) - changes.get("gamma_shift", 0)
    cfg = config(center + 4, center - 8, T=6, n_embd=8, **changes)
    torch.manual_seed(0)
    model = dit_embed.Model(cfg)
    V, x0 = changes["V"], torch.randint(changes["V"], (320, 6), generator=generator(1))
    x0[:64] = 3
    nats, info = dit_embed.nelbo(model, x0, cfg, generator(2), 8)
    ends = info["prior"].mean().item()
    assert 0 < ends < 0.02
    miss = nats - 6 * math.log(V)
    assert close(miss.mean(), miss.std() / 320 ** 0.5, ends / 2, 3.5)
    assert torch.allclose(nats, info["prior"] + info["diff"] + info["recon"])
    unigram = torch.rand(V, generator=generator(3)).square() + 0.02
    unigram = (unigram / unigram.sum()).log()
    model.head.bias.data = unigram
    x0 = torch.multinomial(unigram.exp(), 320 * 6, True, generator=generator(4)).view(320, 6)
    miss = dit_embed.nelbo(model, x0, cfg, generator(5), 8)[0] + unigram[x0].sum(1)
    assert close(miss.mean(), miss.std() / 320 ** 0.5, ends / 2, 3.5)


@pytest.mark.parametrize("window,steps", [(1.0, 48), (0.25, 96)])
def test_a_network_that_says_nothing_costs_ln_v_in_steps_of_the_mixture(window, steps):
    """(E10) exact for independent tokens in any number of steps."""
    center = math.log(2 * math.log(11))
    cfg = config(center + 4, center - 8, V=11, T=6, d=6, window=window, emb_norm=1.0, n_embd=8)
    torch.manual_seed(0)
    model, x0 = dit_embed.Model(cfg), torch.randint(11, (1200, 6), generator=generator(1))
    for count in (steps, 7):
        miss = dit_embed.nelbo_steps(model, x0, cfg, generator(2), count) - 6 * math.log(11)
        assert close(miss.mean(), miss.std() / 1200 ** 0.5, 0.002, 3.5) and miss.std() < 6


# ---- the bound of an exact denoiser (E6)


def vlb(model, cfg, nodes=24, cells=64):
    """PRIOR + DIFF + RECON of a two-position oracle, all alike (w = 1), by quadrature over time
    and noise, with the script's own pieces."""
    eps, weight = hermite(nodes, 2)
    eps = eps.view(-1, 2, 1)
    node, share = (torch.from_numpy(y) for y in np.polynomial.legendre.leggauss(cells))
    total = 0.0
    for row, p in zip(model.rows, model.joint):
        emb = model.table().detach()[row].expand(len(eps), 2, 1)
        at = [0.0] + [(u.item() + 1) / 2 for u in node]
        for t, c in zip(at, [None, *(share / 2)]):
            lam, slope = dit_embed.levels(torch.full((len(eps), 1), t), torch.zeros(1, 2), cfg)[1:]
            z = dit_embed.noised(emb, lam, eps.float())
            out = model(z, lam)
            if t == 0:
                nats = -out.double().log_softmax(2).gather(2, row.expand(len(eps), 2)[..., None])
                total += p * (weight @ nats.sum((1, 2)))
                total += p * dit_embed.prior_kl(emb[:1], cfg).sum()
                continue
            error = dit_embed.estimate(model, out, z, lam, cfg).double() - emb
            nats = 0.5 * slope * lam.exp() * error.square().sum(2)
            total += c * p * (weight @ nats.sum(1))
    return total.item()


@pytest.mark.parametrize("high,low", [(6.0, -6.0), (4.0, -4.0), (3.0, -3.0)])
def test_the_bound_of_an_exact_denoiser_is_the_entropy_and_its_ends(high, low):
    """(E6) VLB - H = KL(q(z at t = 1) || N(0, 1)) + (sum H(x_i | z) - H(x | z) at t = 0), to 1e-3:
    by quadrature."""
    model = Oracle(JOINT, LINE, 2)
    eps, weight = hermite(24, 2)
    kl, total = gap(model, high, low, eps.view(-1, 2, 1), weight)
    got = vlb(model, config(high, low))
    assert got - entropy(JOINT) == pytest.approx(kl + total, abs=1e-3)
    assert high > 3 or kl > 5e-3 and total > 1e-4  # the ends are felt


@pytest.mark.parametrize("window,schedule", [
    (0.05, "logsnr"), (0.2, "cosine"), (0.2, "logistic"), (0.6, "logsnr"), (1.0, "logsnr"),
    (1.0, "cosine"), (1.0, "logistic")])
def test_the_bound_does_not_depend_on_the_path(window, schedule):
    """(E6) nelbo of an exact denoiser is H + KL + TC for every window and shape of schedule, when
    the denoiser is told all levels; within 4 standard errors."""
    model, cfg = Oracle(JOINT, LINE, 2), config(3, -4, window=window, schedule=schedule)
    eps, weight = hermite(24, 2)
    want = entropy(JOINT) + sum(gap(model, 3, -4, eps.view(-1, 2, 1), weight))
    nats, info = dit_embed.nelbo(model, every_row(JOINT, 4, 2, 400), cfg, generator(3), 8)
    mean, se = weighed(nats, JOINT, 400)
    assert close(mean, se, want) and se < 0.04 / window ** 0.75 and info["forwards"] == 9


def test_the_bound_of_three_words_in_the_plane():
    """(E6) d = 2, V = 3, T = 3: H plus the two ends, by Monte Carlo."""
    joint = dirichlet(3, 3, seed=2)
    model = Oracle(joint, PLANE, 3)
    noise = torch.randn(4000, 3, 2, generator=generator(1), dtype=torch.float64)
    want = entropy(joint) + sum(gap(model, 5, -5, noise, torch.full((4000,), 1 / 4000).double()))
    for window in (0.2, 1.0):
        cfg = config(5, -5, V=3, T=3, d=2, window=window)
        nats, _ = dit_embed.nelbo(model, every_row(joint, 3, 3, 150), cfg, generator(4), 8)
        mean, se = weighed(nats, joint, 150)
        assert close(mean, se, want) and se < 0.1


@pytest.mark.parametrize("tilt,window", [(0.0, 1.0), (0.7, 1.0), (0.7, 0.3)])
def test_the_bound_and_its_parts_by_quadrature_for_one_position(tilt, window):
    """(E6) every token's bound, also of a network that errs; the window of a lone position does not
    matter."""
    model, cfg = Oracle(WORDS, LINE, 1, tilt), config(4, -5, T=1, window=window)
    want = one_continuous(model.one, LINE, 4, -5)
    nats, info = dit_embed.nelbo(model, all_rows(4, 1).repeat_interleave(1000, 0), cfg,
                                 generator(1), 8)
    for v, part in enumerate(nats.view(4, 1000)):
        assert close(part.mean(), part.std() / 1000 ** 0.5, want[v])
    assert (WORDS @ want) > entropy(WORDS) + 0.01 * (tilt > 0)
    alpha, sigma = alpha_sigma(-5.0)
    prior = 0.5 * (sigma ** 2 - 1 - 2 * sigma.log() + alpha ** 2 * LINE.double()[:, 0] ** 2)
    assert torch.allclose(info["prior"].view(4, 1000)[:, 0], prior, rtol=1e-4)
    area = info["cost"].mean() * 9  # nats per unit of log-SNR, over the range
    assert area == pytest.approx(info["diff"].mean().item(), rel=1e-4)
    assert info["lam"].min() > -5 and info["lam"].max() < 4
    assert len(info["lam"]) == len(info["cost"]) == 4000 * 8


@pytest.mark.parametrize("param", ["eps", "x0", "v"])
def test_a_network_that_says_vectors_has_the_bound_of_its_estimate_and_of_rounding(param):
    """(E5) (E6) the same DIFF as with tokens; RECON is own evidence, whatever the network says."""
    x0 = every_row(JOINT, 4, 2, 40)
    token, vector = (dit_embed.nelbo(Oracle(JOINT, LINE, 2, param=p), x0,
                                     config(2, -5, param=p), generator(3), 4)[1]
                     for p in ("logits", param))
    assert torch.allclose(token["diff"], vector["diff"], rtol=1e-3, atol=1e-4)
    assert torch.equal(token["prior"], vector["prior"])
    model = Oracle(JOINT, LINE, 2)
    z = dit_embed.noised(LINE[x0[:1]], torch.full((1, 2), 2.0), torch.ones(1, 2, 1))
    by_hand = -model.likelihood(z, torch.full((1, 2), 2.0)).log_softmax(2)[0, [0, 1], x0[0]]
    got = dit_embed.rounding_nll(model, x0[:1], z, torch.full((1, 2), 2.0))[0]
    assert torch.allclose(got.double(), by_hand, atol=1e-4)
    log = [model.likelihood(z, lam).log_softmax(2) for z, lam in [recon_read(x0, param)]][0]
    recon = -log.gather(2, x0[..., None]).sum((1, 2))
    assert torch.allclose(vector["recon"], recon, atol=1e-3) and recon.mean() > 0.05


def recon_read(x0, param):
    """The z and levels that nelbo rounds."""
    model = Oracle(JOINT, LINE, 2, param=param)
    dit_embed.nelbo(model, x0, config(2, -5, param=param), generator(3), 4)
    return torch.cat([z for z, _ in model.reads]), torch.cat([lam for _, lam in model.reads])


def test_scaled_embeddings_are_a_shifted_schedule():
    """(E3) c E with lam lower by 2 ln c: the same evidence logits, network answers, DIFF and RECON;
    emb_norm moves the range by itself, gamma_shift by hand."""
    c, x0 = 1.7, torch.randint(9, (64, 5), generator=generator(1))
    auto = dict(V=9, T=5, d=4, cond="none", window=0.4)
    small = shaken(network(high=5, low=-5, emb_norm=1.0, **auto), size=0.1)
    plain = config(5, -5, emb_norm=1.0, **auto)
    for cfg in (config(5 - 2 * math.log(c), -5 - 2 * math.log(c), emb_norm=c, **auto),
                dataclasses.replace(plain, emb_norm=0.0, gamma_shift=math.log(c * c / 4))):
        torch.manual_seed(0)
        large = dit_embed.Model(cfg)
        large.load_state_dict(small.state_dict())
        if not cfg.emb_norm:
            large.code.weight.data = c * small.table().detach()
        assert torch.allclose(large.table(), c * small.table(), atol=1e-6)
        assert dit_embed.ends(cfg) == pytest.approx([e - 2 * math.log(c) for e in (5, -5)])
        eps, lam = torch.randn(64, 5, 4, generator=generator(2)), torch.linspace(-4, 4, 5)
        lam = lam.expand(64, 5)
        pair = [model.evidence(dit_embed.noised(model.table()[x0], lam - shift, eps), lam - shift)
                for model, shift in ((small, 0.0), (large, 2 * math.log(c)))]
        pair = [y - y.mean(-1, keepdim=True) for y in pair]
        assert torch.allclose(*pair, rtol=1e-3, atol=1e-3)
        one, two = (dit_embed.nelbo(model, x0, some, generator(3), 4)[1]
                    for model, some in ((small, plain), (large, cfg)))
        for part in ("diff", "recon"):
            assert torch.allclose(one[part], two[part], rtol=2e-3, atol=2e-3)
        assert (one["prior"] - two["prior"]).abs().max() < 1e-2


# ---- what is given (E6)


@pytest.mark.parametrize("window", [0.1, 1.0])
def test_the_bound_of_holes_is_the_conditional_entropy(window):
    """(E6) -log p(others | given) of an exact denoiser: row by row, and H(others | given)."""
    joint = dirichlet(3, 3, seed=2)
    model, rows = Oracle(joint, PLANE, 3), all_rows(3, 3)
    cfg = config(7, -6, V=3, T=3, d=2, window=window)
    for given in ([0], [1, 2]):
        frozen = torch.zeros(27, 3, dtype=torch.bool)
        frozen[:, given] = True
        same = (rows[:, None, given] == rows[None, :, given]).all(2).double()
        want = -(joint / (same @ joint)).log()
        nats, info = dit_embed.nelbo(model, rows.repeat_interleave(200, 0), cfg, generator(1), 8,
                                     frozen.repeat_interleave(200, 0))
        mean, se = weighed(nats, joint, 200)
        assert close(mean, se, (joint @ want).item() + 0.004) and se < 0.09
        free = 3 - len(given)
        alpha, _ = alpha_sigma(-6.0)
        assert info["prior"].max() < 1.1 * free * 0.5 * alpha ** 2 * PLANE.square().sum(1).max()
        assert window < 1 or len(info["lam"]) == 27 * 200 * 8 * free
        levels = torch.cat([lam[:, given].flatten() for _, lam, _, _ in model.calls])
        assert (levels - 7).abs().max() < 1e-5  # the given words are as clean as can be
        assert not any(where[:, given].any() for _, _, where, _ in model.calls)
        model.calls.clear()


def test_a_single_hole_in_a_small_window_is_unbiased():
    """(E6) times are spread over the stretch in which something happens, and weighed with it."""
    model, cfg = Oracle(JOINT, LINE, 2), config(6, -6, window=0.02)
    frozen = torch.tensor([[True, False]]).expand(3000, 2)
    for row in (0, 6):
        x0 = ROWS[row].expand(3000, 2)
        want = -math.log(JOINT[row] / JOINT.view(4, 4)[x0[0, 0]].sum())
        nats, info = dit_embed.nelbo(model, x0, cfg, generator(row), 4, frozen)
        mean, se = nats.mean().item(), nats.std().item() / 3000 ** 0.5
        assert close(mean, se + 0.0005, want, 4) and len(info["lam"]) == 12000


def test_nothing_given_is_the_bound_and_all_given_is_free():
    model, cfg = Oracle(JOINT, LINE, 2), config(window=0.3)
    x0, none = ROWS[[3, 9]], torch.zeros(2, 2, dtype=torch.bool)
    plain = dit_embed.nelbo(model, x0, cfg, generator(1))[0]
    assert torch.equal(plain, dit_embed.nelbo(model, x0, cfg, generator(1), 8, none)[0])
    none[0] = True
    nats = dit_embed.nelbo(model, x0, cfg, generator(1), 8, none)[0]
    assert nats[0] == 0 and nats[1] > 0 and nats.isfinite().all()


# ---- bounds of few steps (E7) (E10)


def evenly(high, low, steps):
    return [high + (low - high) * k / steps for k in range(steps + 1)]


@pytest.mark.parametrize("tilt", [0.0, 0.7])
@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_the_entropy_is_below_the_chain_and_the_chain_below_its_bound(steps, mixture, tilt):
    """(E7) (E8) (E10) one position: H <= exact -E log p of the chain, on a grid <= its bound, by
    quadrature = nelbo_steps of every token within 4 standard errors; also of a network that errs.
    """
    model, cfg = Oracle(WORDS, LINE, 1, tilt), config(4, -5, T=1)
    lams = evenly(4.0, -5.0, steps)
    want = one_bound(model.one, LINE, lams, mixture)
    p = chain_law(model.one, LINE, lams, "token" if mixture else "ancestral", h=0.04)
    exact = -(WORDS * p.log()).sum().item()
    assert p.sum().item() == pytest.approx(1, abs=1e-9)
    assert entropy(WORDS) <= exact + 1e-6 and exact <= (WORDS @ want).item() + 1e-6
    assert (-p.log() <= want + 1e-6).all()
    nats = dit_embed.nelbo_steps(model, all_rows(4, 1).repeat_interleave(3000, 0), cfg,
                                 generator(steps), steps, mixture).view(4, 3000)
    for v in range(4):
        assert close(nats[v].mean(), nats[v].std() / 3000 ** 0.5, want[v])
    assert (nats.mean(1) >= -p.log() - 4 * nats.std(1) / 3000 ** 0.5).all()


@pytest.mark.parametrize("mixture", [False, True])
def test_windows_only_move_the_steps_of_a_position(mixture, monkeypatch):
    """(E2) (E7) (E10) one position with its own clock: steps where it is on its way, no others."""
    monkeypatch.setattr(dit_embed, "clocks", lambda shape, *_: torch.full(shape, 0.3))
    model, cfg = Oracle(WORDS, LINE, 1, 0.7), config(4, -5, T=1, window=0.4)
    lams = [4.0, *(4 - 9 * (t - 0.3) / 0.4 for t in (0.375, 0.5, 0.625)), -5.0]
    want = one_bound(model.one, LINE, lams, mixture)
    nats = dit_embed.nelbo_steps(model, all_rows(4, 1).repeat_interleave(3000, 0), cfg,
                                 generator(1), 8, mixture).view(4, 3000)
    for v in range(4):
        assert close(nats[v].mean(), nats[v].std() / 3000 ** 0.5, want[v])


@pytest.mark.parametrize("window", [0.4, 1.0])
def test_more_steps_are_better_and_the_mixture_is_better_at_few(window):
    """(E7) falls with the steps and stays above H; (E10) is far tighter at few; both approach the
    continuous bound (E6)."""
    model, cfg = Oracle(JOINT, LINE, 2), config(5, -6, window=window)
    x0, H = every_row(JOINT, 4, 2, 60), entropy(JOINT)
    many = [8, 32, 128] if window == 1 else [16, 64, 256]
    gauss, mixed = ([weighed(dit_embed.nelbo_steps(model, x0, cfg, generator(s), s, m), JOINT, 60)
                     for s in many] for m in (False, True))
    assert gauss[0][0] > gauss[1][0] + 0.1 > gauss[2][0] + 0.2 and gauss[2][0] > H
    assert all(mean > H - 4 * se for mean, se in mixed)
    assert mixed[0][0] - H < 0.2 * (gauss[0][0] - H)
    eps, weight = hermite(24, 2)
    limit = H + sum(gap(model, 5, -6, eps.view(-1, 2, 1), weight))
    assert gauss[2][0] - limit < 0.45 * (gauss[1][0] - limit)
    assert abs(mixed[2][0] - limit) < 4 * mixed[2][1] + 0.02


def test_one_step_of_the_mixture_is_the_cross_entropy_of_single_positions():
    """(E10) T = 1: PRIOR + the marginal entropies (nothing is known of the others yet) + RECON."""
    model, cfg = Oracle(JOINT, LINE, 2), config(8, -8)
    nats = dit_embed.nelbo_steps(model, every_row(JOINT, 4, 2, 500), cfg, generator(1), 1)
    mean, se = weighed(nats, JOINT, 500)
    want = torch.special.entr(marginals(JOINT, 4, 2)).sum().item()
    assert close(mean, se, want, 4) or abs(mean - want) < 2e-3
    assert se < 0.01 and want > entropy(JOINT) + 0.2
    gauss = dit_embed.nelbo_steps(model, every_row(JOINT, 4, 2, 50), cfg, generator(1), 1, False)
    assert weighed(gauss, JOINT, 50)[0] > 100 * mean


def test_bounds_of_steps_do_not_change_under_autocast():
    """(E10) u_v is in the hundreds: bfloat16 products would be wrong by whole nats."""
    model, x0 = network(V=40, T=6, d=8, emb_norm=1.0, n_embd=8), None
    cfg = config(V=40, T=6, d=8, emb_norm=1.0, n_embd=8)
    x0 = torch.randint(40, (64, 6), generator=generator(1))
    for mixture in (True, False):
        plain = dit_embed.nelbo_steps(model, x0, cfg, generator(2), 5, mixture)
        with torch.autocast("cpu", torch.bfloat16):
            cast = dit_embed.nelbo_steps(model, x0, cfg, generator(2), 5, mixture)
        assert torch.allclose(cast, plain, rtol=1e-3, atol=0.02)


def test_the_bound_does_not_change_under_autocast():
    """(E6) with a zero head all that counts is evidence, in float32."""
    model, cfg = network(V=40, T=6, d=8, emb_norm=1.0), config(V=40, T=6, d=8, emb_norm=1.0)
    x0 = torch.randint(40, (64, 6), generator=generator(1))
    plain = dit_embed.nelbo(model, x0, cfg, generator(2), 3)[0]
    with torch.autocast("cpu", torch.bfloat16):
        cast = dit_embed.nelbo(model, x0, cfg, generator(2), 3)[0]
    assert torch.allclose(cast, plain, rtol=1e-4)


# ---- training losses


def asked(model, x0, cfg, seed=1):
    """The loss and what the model was asked for it, last: z, lam, where, out."""
    model.calls.clear(), model.reads.clear()
    loss, info = dit_embed.loss_fn(model, x0, cfg, generator(seed))
    z, lam, where, _ = model.calls[-1]
    return loss.item(), info, z, lam, where, model(z, lam)


@pytest.mark.parametrize("window,prefix", [(1.0, 0.0), (0.4, 0.0), (0.4, 0.7)])
def test_ce_is_the_cross_entropy_of_unsettled_positions_rows_first(window, prefix):
    """(E4) by hand, from what the network was asked; settled and given positions cost nothing."""
    model, x0 = Oracle(dirichlet(3, 3), PLANE, 3), all_rows(3, 3)
    cfg = config(4, -5, V=3, T=3, d=2, window=window, prefix=prefix, loss="ce")
    loss, info, z, lam, where, out = asked(model, x0, cfg)
    assert torch.equal(where, lam < 4 - 1e-5)
    nats = F.cross_entropy(out.transpose(1, 2), x0, reduction="none") * where
    rows = [(n.sum() / w.sum()).item() for n, w in zip(nats, where) if w.any()]
    assert loss == pytest.approx(sum(rows) / len(rows), rel=1e-5)
    assert info["unsettled"] == pytest.approx(where.sum().item() / 27)
    auto, *_ = asked(model, x0, dataclasses.replace(cfg, loss="auto"))
    assert auto == loss


def test_times_are_spread_evenly_over_the_batch():
    """One t in each of B cells, with one offset: the loss spreads less."""
    model, x0 = Oracle(JOINT, LINE, 2), ROWS
    _, _, _, lam, _, _ = asked(model, x0, config(4, -5, loss="ce"))
    t = (4 - lam[:, 0]) / 9 * 16 - torch.arange(16)
    assert (t - t[0]).abs().max() < 1e-4 and 0 < t[0] < 1


def test_a_prefix_is_a_random_beginning_of_some_rows():
    """prefix = share of rows whose first floor(T u) positions are clean."""
    joint, T = dirichlet(3, 3), 3
    model, x0 = Oracle(joint, PLANE, 3), torch.zeros(9000, 3, dtype=torch.long)
    cfg = config(4, -5, V=3, T=3, d=2, window=1.0, prefix=0.6, loss="ce")
    _, _, _, lam, where, _ = asked(model, x0, cfg)
    assert (where[:, :-1] <= where[:, 1:]).all() and torch.equal(where, lam < 4 - 1e-5)
    length = (T - where.sum(1)).bincount(minlength=4) / 9000
    assert length.tolist() == pytest.approx([1 - 0.6 * 2 / 3, 0.2, 0.2, 0], abs=0.02)
    _, _, _, _, where, _ = asked(model, x0[:50], dataclasses.replace(cfg, prefix=0.0))
    assert where.all()


@pytest.mark.parametrize("param", ["logits", "eps", "x0", "v"])
def test_mse_is_the_squared_error_of_what_the_network_says(param):
    """(E5) per number; for logits of emb_hat (E4); with its anchor, the rounding loss of z at the
    clean end."""
    model = Oracle(dirichlet(3, 3), PLANE, 3, tilt=0.7, param=param)
    x0, wide = all_rows(3, 3), dict(V=3, T=3, d=2, window=0.5, param=param)
    cfg = config(2, -4, loss="mse", anchor=0.0, allow_collapse=True, **wide)
    loss, _, z, lam, where, out = asked(model, x0, cfg)
    assert not model.reads
    emb = PLANE.double()[x0]
    alpha, sigma = (y[..., None] for y in alpha_sigma(lam))
    eps = (z - alpha * emb) / sigma
    goal = {"eps": eps, "v": alpha * eps - sigma * emb}.get(param, emb)
    out = out.double().softmax(2) @ PLANE.double() if param == "logits" else out
    error = (out - goal).square().mean(2) * where
    rows = [(e.sum() / w.sum()).item() for e, w in zip(error, where) if w.any()]
    assert loss == pytest.approx(sum(rows) / len(rows), rel=1e-4)
    for weight in (0.5, 2.0):
        anchored, *_ = asked(model, x0, dataclasses.replace(cfg, anchor=weight))
        (z0, lam0), = model.reads
        assert (lam0 - 2).abs().max() < 1e-5
        noise = (z0 - alpha_sigma(2.0)[0] * emb) / alpha_sigma(2.0)[1]
        assert abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.2
        end = -model.likelihood(z0, lam0).log_softmax(2).gather(2, x0[..., None]).mean().item()
        assert anchored == pytest.approx(loss + weight * end, rel=1e-4) and end > 0.05


@pytest.mark.parametrize("param", ["logits", "eps", "v"])
@pytest.mark.parametrize("window", [0.3, 1.0])
def test_the_vlb_loss_is_the_bound_per_token_with_rounding_by_own_evidence(window, param):
    """(E6) unbiased for (PRIOR + DIFF + rounding) / T: against nelbo of a network that says
    vectors, whose RECON is that."""
    model, x0 = Oracle(JOINT, LINE, 2, 0.7, param=param), ROWS.repeat(64, 1)
    cfg = config(2.5, -1, window=window, loss="vlb", param=param)
    with torch.no_grad():
        mean, se = mean_and_se(lambda g: dit_embed.loss_fn(model, x0, cfg, g)[0], 30)
    parts = dit_embed.nelbo(Oracle(JOINT, LINE, 2, 0.7, param="eps"), x0.repeat(2, 1),
                            dataclasses.replace(cfg, param="eps"), generator(99), 8)[0] / 2
    far = parts.view(-1, 16).mean(1)
    assert close(mean, math.hypot(se, far.std().item() / len(far) ** 0.5), parts.mean().item())
    assert se < 0.05


def test_a_given_beginning_is_not_charged_by_the_vlb():
    """(E6) with a prefix in every row the loss is lower by what given positions would pay."""
    model, x0 = Oracle(JOINT, LINE, 2), ROWS.repeat(64, 1)
    cfg = config(0.5, -1, loss="vlb", prefix=1.0)
    with torch.no_grad():
        mean, se = mean_and_se(lambda g: dit_embed.loss_fn(model, x0, cfg, g)[0], 30)
    half = torch.rand(1024, 1, generator=generator(3)) < 0.5  # floor(2 u) is 0 or 1
    frozen = torch.cat((half, torch.zeros_like(half)), 1)
    eps = Oracle(JOINT, LINE, 2, param="eps")
    nats = dit_embed.nelbo(eps, x0, dataclasses.replace(cfg, param="eps"), generator(5), 8,
                           frozen)[0] / 2
    assert close(mean, math.hypot(se, nats.std().item() / 32), nats.mean().item())


KINDS = [dict(param=p, loss=q) for p in ("logits", "eps", "x0", "v")
         for q in ("ce", "vlb", "mse") if (p, q) not in itertools.product(("eps", "x0", "v"),
                                                                          ("ce",))]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: " ".join(k.values()))
def test_shares_of_a_batch_average_to_its_loss(kind):
    """The same noise for the whole batch, whoever works on which rows; gradients as well."""
    for more in (dict(), dict(prefix=0.6, window=0.3), dict(selfcond=1.0, window=0.6)):
        wide = dict(V=7, T=5, d=3, emb_norm=1.0) | kind | more
        model, cfg = shaken(network(**wide), size=0.1), config(**wide)
        x0 = torch.randint(7, (12, 5), generator=generator(1))
        whole, info = dit_embed.loss_fn(model, x0, cfg, generator(2))
        parts = [dit_embed.loss_fn(model, x0, cfg, generator(2), slice(i, i + 4))
                 for i in (0, 4, 8)]
        assert sum(p[0] for p in parts).item() / 3 == pytest.approx(whole.item(), rel=1e-5)
        assert all(p[1] == info for p in parts)
        grads = [torch.autograd.grad(y, model.code.weight, allow_unused=True)[0]
                 for y in (whole, sum(p[0] for p in parts) / 3)]
        assert torch.allclose(*grads, rtol=1e-3, atol=1e-5) and grads[0].abs().max() > 0


def test_the_bound_trains_the_embeddings_unless_they_are_fixed():
    """(E6) its gradient reaches E; with fixed embeddings it does not."""
    x0 = torch.randint(7, (12, 5), generator=generator(1))
    for loss in ("vlb", "ce"):
        for train in (True, False):
            wide = dict(V=7, T=5, d=3, emb_norm=0.0, emb_train=train)
            model = shaken(network(**wide), size=0.1)
            dit_embed.loss_fn(model, x0, config(loss=loss, **wide), generator(2))[0].backward()
            grad = model.code.weight.grad
            assert (grad is not None and grad.abs().max() > 1e-4) == train
            assert model.head.weight.grad.abs().max() > 0


def test_the_gradient_of_the_vlb_is_that_of_the_bound():
    """(E6) with respect to the embeddings too: finite differences under the same noise."""
    wide = dict(V=5, T=4, d=3, emb_norm=0.0)
    model, cfg = shaken(network(**wide), size=0.1), config(3, -4, loss="vlb", **wide)
    x0, g = torch.randint(5, (8, 4), generator=generator(1)), generator
    loss = lambda: dit_embed.loss_fn(model, x0, cfg, g(2))[0]  # noqa: E731
    grad, = torch.autograd.grad(loss(), model.code.weight)
    step = torch.randn(5, 3, generator=g(3)) * 3e-3
    with torch.no_grad():
        model.code.weight += step
        up = loss()
        model.code.weight -= 2 * step
        down = loss()
    assert (grad * step).sum().item() == pytest.approx((up - down).item() / 2, rel=0.05)


# ---- collapse


@pytest.mark.parametrize("bad", [dict(param="x0"), dict(param="eps", loss="mse"),
                                 dict(param="logits", loss="mse")])
def test_a_squared_error_that_would_make_all_words_alike_is_refused(bad):
    with pytest.raises(ValueError, match="--anchor 1.*--no-emb-train.*--allow-collapse"):
        config(anchor=0.0, **bad)
    for good in (dict(anchor=1.0), dict(anchor=0.0, emb_train=False),
                 dict(anchor=0.0, allow_collapse=True)):
        config(**bad, **good)
    config(anchor=0.0, param="logits", loss="ce"), config(anchor=0.0, param="x0", loss="vlb")


@pytest.mark.parametrize("bad", [dict(param="eps", loss="ce"), dict(param="v", sampler="token"),
                                 dict(param="x0", clock="maxprob"), dict(window=0.0),
                                 dict(window=1.1), dict(eval_samplers="token,euler")])
def test_what_cannot_work_is_refused(bad):
    with pytest.raises(ValueError, match="--"):
        config(**bad)


def test_a_bare_squared_error_shrinks_the_embeddings_and_an_anchor_keeps_them_apart():
    x0, apart = torch.randint(6, (16, 4), generator=generator(1)), {}
    for anchor in (0.0, 1.0):
        wide = dict(V=6, T=4, d=4, emb_norm=0.0, param="x0", loss="mse", anchor=anchor,
                    allow_collapse=True, lr=2e-3)
        model, cfg = network(**wide), config(4, -6, **wide)
        before = torch.pdist(model.table().detach()).mean().item()
        optimizers, g = dit_embed.make_optimizers(model, cfg), generator(2)
        for _ in range(150):
            dit_embed.loss_fn(model, x0, cfg, g)[0].backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = cfg.lr * group["scale"]
                optimizer.step(), optimizer.zero_grad()
        apart[anchor] = torch.pdist(model.table().detach()).mean().item() / before
    assert apart[0.0] < 0.3 and apart[1.0] > 0.45 and apart[1.0] > 2 * apart[0.0]


# ---- the network


LAM, SOME = torch.linspace(-5, 5, 18).view(3, 6), torch.randn(3, 6, 4, generator=generator(9))
SHAPES = dict(V=7, T=6, d=4, emb_norm=1.0, n_layer=2)
KINDS_OF_NETWORK = [dict(cond=c, norm=n, pos=p, input=i) for c, n, p, i in
                    (("adaln", "pre", "both", "evidence"), ("adaln", "post", "rotary", "both"),
                     ("add", "pre", "learned", "raw"), ("add", "post", "both", "both"),
                     ("none", "pre", "rotary", "evidence"), ("none", "post", "learned", "raw"))]
each_network = pytest.mark.parametrize("kind", KINDS_OF_NETWORK,
                                       ids=lambda k: " ".join(k.values()))


@each_network
def test_every_position_sees_every_other_of_its_row_and_no_other_row(kind):
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
        if kind["cond"] != "none" or kind["input"] != "raw":
            assert (change[1] > 1e-6).all()
    turned = model(SOME[[2, 0, 1]], LAM[[2, 0, 1]])
    assert torch.allclose(turned, out[[2, 0, 1]], atol=1e-5)
    assert torch.allclose(model(SOME[1:2], LAM[1:2]), out[1:2], atol=1e-5)


@each_network
def test_where_selects_positions_of_the_answer(kind):
    where = torch.rand(3, 6, generator=generator(1)) < 0.4
    for param in ("logits", "eps"):
        model = shaken(network(**SHAPES, **kind, param=param))
        got = model(SOME, LAM, where)
        assert got.shape == (int(where.sum()), 7 if param == "logits" else 4)
        assert torch.allclose(got, model(SOME, LAM)[where], atol=1e-5)


@each_network
def test_both_ends_are_finite_forward_and_backward(kind):
    """At 1e-6 from the ends and beyond, in float32 and bfloat16; an answer in tokens stays float32.
    """
    cfg = config(**SHAPES, **kind)
    t = torch.tensor([[0.0, 1e-6, 0.3, 0.7, 1 - 1e-6, 1.0]]).expand(3, 6)
    for cast in (False, True):
        model = shaken(network(**SHAPES, **kind))
        lam = dit_embed.log_snr(t, cfg)[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = model(SOME, lam)
            assert out.isfinite().all() and out.dtype == torch.float32
            loss, _ = dit_embed.loss_fn(model, torch.arange(18).view(3, 6) % 7, cfg, generator(1))
        (loss + out.square().mean()).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize("cond", ["adaln", "add", "none"])
def test_conditioning_starts_as_none_and_comes_alive(cond):
    """The trunk of an unconditioned network answers the same under every cond at first, as its
    noise layers are zero; afterwards the level matters beyond its evidence."""
    plain = shaken(network(**SHAPES, cond="none", input="raw", skip=False))
    model = network(**SHAPES, cond=cond, input="raw", skip=False)
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.allclose(model(SOME, LAM), plain(SOME, LAM), atol=1e-5)
    shaken(model)
    assert torch.allclose(model(SOME, LAM), model(SOME, LAM + 1), atol=1e-6) == (cond == "none")


def test_neighbouring_levels_look_different_to_the_network():
    """The sinusoids are of 1000 times the share of the range: a hundredth of it turns them."""
    model = network(**SHAPES)
    lam = torch.tensor([0.0, 0.12])
    model.noise_in.weight.data = torch.eye(128)[:16]
    cos = model.embed_noise(lam)
    assert (cos[0] - cos[1]).abs().max() > 0.5
    share = (6 - 0.12) / 12  # of the way from the cleanest to the noisiest level
    want = F.silu((1000 * share * 10000 ** (-torch.arange(16) / 64)).cos())
    assert torch.allclose(cos[1], want, atol=1e-2)


def test_positions_are_told_as_pos_says():
    """Without neighbours mixed, learned positions at zero know no order; rotary ones do."""
    turn = torch.tensor([3, 1, 4, 0, 5, 2])
    for pos in ("learned", "rotary", "both"):
        model = shaken(network(**SHAPES, pos=pos))
        model.near.weight.data.zero_()
        if pos != "rotary":
            model.wpe.weight.data.zero_()
        else:
            assert not hasattr(model, "wpe")
        same = torch.allclose(model(SOME[:, turn], LAM[:, turn]), model(SOME, LAM)[:, turn],
                              atol=1e-5)
        assert same == (pos == "learned")
    model = shaken(network(**SHAPES, pos="learned"))
    before = model(SOME, LAM)
    model.wpe.weight.data[3] += 1
    assert not torch.allclose(model(SOME, LAM), before, atol=1e-3)


@pytest.mark.parametrize("kind", ["evidence", "raw", "both"])
def test_the_input_is_what_input_says(kind):
    """evidence: nothing of z but its softmax (a direction that no word has does not matter); raw:
    the words themselves do not matter without the skip."""
    wide = SHAPES | dict(d=4, emb_norm=0.0)
    model = shaken(network(**wide, input=kind, skip=False, cond="none"))
    model.code.weight.data[:, 3] = 0.0
    aside = SOME + torch.tensor([0.0, 0, 0, 1.0])
    same = torch.allclose(model(SOME, LAM), model(aside, LAM), atol=1e-5)
    assert same == (kind == "evidence")
    before = model(SOME, LAM)
    model.code.weight.data *= 1.5
    assert torch.allclose(model(SOME, LAM), before, atol=1e-6) == (kind == "raw")


def test_at_the_noisy_end_the_input_says_nothing_and_just_above_it_does():
    model = shaken(network(**SHAPES, skip=False, cond="none"))
    for lam, same in ((-6.0, True), (-5.95, False), (0.0, False)):
        lam = torch.full((3, 6), lam)
        assert torch.allclose(model(SOME, lam), model(SOME + 1, lam), atol=1e-6) == same


def test_no_guess_is_a_guess_of_zeros():
    """Self-conditioning off = exact zeros; on, it matters."""
    model = shaken(network(**SHAPES, selfcond=0.5))
    zeros = torch.zeros_like(SOME)
    assert torch.equal(model(SOME, LAM), model(SOME, LAM, None, zeros))
    assert not torch.allclose(model(SOME, LAM), model(SOME, LAM, None, zeros + 1), atol=1e-3)


def test_rows_of_the_table_keep_their_norm_while_they_learn():
    """emb_norm r: |E_v| = r after every step, though the weights below move; 0: free."""
    x0 = torch.randint(7, (8, 6), generator=generator(1))
    for norm in (1.0, 2.5, 0.0):
        wide = SHAPES | dict(emb_norm=norm)
        model, cfg = network(**wide), config(**wide, loss="vlb", lr=1e-2)
        before = model.code.weight.detach().clone()
        optimizers, g = dit_embed.make_optimizers(model, cfg), generator(2)
        assert before.std() == pytest.approx(1, abs=0.3)
        for _ in range(8):
            dit_embed.loss_fn(model, x0, cfg, g)[0].backward()
            for optimizer in optimizers:
                optimizer.step(), optimizer.zero_grad()
        assert (model.code.weight - before).abs().min() > 0
        norms = model.table().norm(dim=1)
        assert (norm == 0) == (norms.std() > 0.01)
        assert norm == 0 or torch.allclose(norms, torch.full((7,), norm), atol=1e-5)


@each_network
def test_every_parameter_learns_within_a_few_steps(kind):
    """No gate is closed behind another; every weight has exactly one optimizer."""
    wide = SHAPES | kind | dict(selfcond=1.0)
    model, cfg = network(**wide), config(**wide, lr=1e-3)
    before = copy.deepcopy(model.state_dict())
    optimizers, g = dit_embed.make_optimizers(model, cfg), generator(1)
    x0 = torch.arange(6).expand(16, 6) % 7
    for _ in range(6):
        dit_embed.loss_fn(model, x0, cfg, g)[0].backward()
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name
    owned = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(map(id, model.parameters()))


def test_the_learning_rate_warms_up_and_falls_to_zero():
    cfg = config(lr=0.1, warmup=10, steps=110)
    rates = [dit_embed.get_lr(step, cfg) for step in range(111)]
    assert rates[:10] == pytest.approx([0.01 * (k + 1) for k in range(10)])
    assert rates[10] == pytest.approx(0.1) and rates[60] == pytest.approx(0.05)
    assert rates[110] == pytest.approx(0, abs=1e-12) and rates[10:] == sorted(rates[10:])[::-1]


def test_a_batch_can_be_learned_by_heart():
    """Three strings: CE falls, the bound falls to a few hundredths of a nat above ln 3, and samples
    are those strings."""
    x0 = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1], [9, 0, 9, 0, 11, 10, 1,
                                                                            1]])
    wide = dict(V=12, T=8, d=6, emb_norm=1.0, n_embd=32, n_layer=2, window=0.3, loss="ce",
                lr=5e-3, warmup=10, steps=220, sampler="token", sampling_steps=60)
    center = math.log(2 * math.log(12))
    model, cfg = network(**wide), config(center + 3, center - 6, **wide)
    optimizers, g, losses = dit_embed.make_optimizers(model, cfg), generator(1), []
    for step in range(cfg.steps):
        for group in [group for o in optimizers for group in o.param_groups]:
            group["lr"] = dit_embed.get_lr(step, cfg) * group["scale"]
        loss, _ = dit_embed.loss_fn(model, x0.repeat(10, 1), cfg, g)
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
    assert losses[0] > 1 and sum(losses[-20:]) / 20 < 0.35
    nats = dit_embed.nelbo(model, x0.repeat(40, 1), cfg, generator(2))[0]
    assert nats.mean() < math.log(3) + 0.6 and nats.mean() > math.log(3) - 0.2
    x, _ = dit_embed.sample(model, cfg, 60, generator(3))
    same = (x[:, None] == x0).all(2)
    assert same.any(1).float().mean() > 0.75 and same.any(0).all()
