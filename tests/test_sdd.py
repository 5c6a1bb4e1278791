"""Sparse distribution diffusion: evidence, states, schedules, clocks, bounds, losses, the original
process, the network, against Bayes' rule, enumeration and quadrature. Expected figures are made in
sdd_tables.py or here."""
import copy
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy import stats

import sdd
from sdd_tables import (LEVEL, TIME, Oracle, believed, chain_bound, dirichlet, entropy, grid,
                        legendre, marginals, path, path_bound, settings, unit)
from tables import all_rows, generator, mean_and_se

SURE = sdd.SURE
SCHEDULES = ("exponential", "rational")
JOINT = dirichlet(4, 2, 3)
NEAR = (0.2 * torch.eye(4) + 0.0125).flatten().double()  # V = 4, T = 2: mostly the same token
TWO = torch.tensor([0.5, 0.12, 0.06, 0.32]).double()  # V = 2, T = 2
LINKED = torch.tensor([0.3, 0.02, 0.05, 0.2, 0.04, 0.16, 0.2, 0.03]).double()  # V = 2, T = 3


def config(V=4, T=2, **changes):
    return sdd.Config(**settings(V, T, **changes))


def network(seed=0, **changes):
    torch.manual_seed(seed)
    return sdd.Model(config(**changes))


def shaken(model, seed=1, size=0.3):
    """Weights far from their initial zeros, so that every path is alive."""
    g = generator(seed)
    for p in model.parameters():
        p.data += size * torch.randn(p.shape, generator=g)
    return model


def close(draws, truth, width=4.5):
    """Is the mean of independent draws (n,) the truth, within so many standard errors?"""
    se = draws.double().std() / len(draws) ** 0.5
    return abs(draws.double().mean().item() - truth) < width * se.item() + 1e-6


def row_by_row(draws, truth, times, slack=0.0, width=4.5):
    """Are the means of `times` draws for every row in turn their truths, and is the mean of all?"""
    draws = draws.view(len(truth), times).double()
    off, se = draws.mean(1) - truth, draws.std(1) / times ** 0.5
    return (off.abs() < (width + 1) * se + slack + 1e-6).all() and \
        off.mean().abs() < width * se.square().sum().sqrt() / len(truth) + slack + 1e-6


def fixed_clocks(monkeypatch, tau):
    monkeypatch.setattr(sdd, "clocks", lambda shape, *_: torch.tensor(tau).expand(shape).clone())


# ---- evidence and candidates


@pytest.mark.parametrize("V", [2, 5, 40])
def test_the_softmax_of_evidence_is_bayes_rule(V):
    """(E1) (E2) against Gaussian densities of all tokens in float64, every precision; what
    sparse() calls log p is that posterior."""
    g = generator(V)
    for s in (1e-4, 0.5, 3.0, 20.0, 150.0, 200.0):
        x, s = torch.randint(V, (60,), generator=g), torch.full((60,), s).double()
        z = sdd.evidence(x, s, torch.randn(60, V, generator=g).double())
        mean = s[:, None, None] * torch.eye(V).double()  # of z given v, (60, v, V)
        log = -(z[:, None] - mean).square().sum(2) / (2 * s[:, None])
        want = log.log_softmax(1)
        assert torch.allclose(z.log_softmax(1), want, atol=1e-6)
        ids, logp = sdd.sparse(z, V)
        assert torch.allclose(logp[:, :-1].double(), want.gather(1, ids), atol=1e-4)
        assert (logp[:, -1] == -torch.inf).all()  # nothing is left


def test_evidence_is_brownian_motion_towards_the_token():
    """(E1) mean s e_x, variance s, numbers of one token independent; each row its own precision."""
    n, V = 40_000, 3
    x, s = torch.randint(V, (n,), generator=generator(1)), torch.tensor([0.3, 2.0, 30.0, 0.0])
    s = s.repeat(n // 4)
    z = sdd.evidence(x, s, torch.randn(n, V, generator=generator(2)))
    assert (z[s == 0] == 0).all()
    x, z, s = x[s > 0], z[s > 0], s[s > 0]
    eps = ((z - s[:, None] * F.one_hot(x, V)) / s.sqrt()[:, None]).double()
    for level in (0.3, 2.0, 30.0):
        part = eps[s == level]
        assert (part.mean(0).abs() < 4.5 / len(part) ** 0.5).all()
        error = part.T @ part / len(part) - torch.eye(V)
        assert (error.abs() < 4.5 * (2 / len(part)) ** 0.5).all()


@pytest.mark.parametrize("V,k", [(6, 1), (6, 4), (6, 6), (6, 9), (300, 8)])
def test_a_state_holds_the_top_of_the_posterior_and_the_mass_of_the_rest(V, k):
    """(E3) ids and log p as a float64 sort has them, falling; the rest to 1e-4 even where it is
    e^-190 and 1 - sum p knows nothing of it; candidates and rest sum to 1; K = min(k, V)."""
    g = generator(k)
    s = torch.tensor([0.01, 1.0, 8.0, 30.0, 199.0]).repeat(40)
    x, K = torch.randint(V, (200,), generator=g), min(k, V)
    z = sdd.evidence(x, s, torch.randn(200, V, generator=g))
    before = z.clone()
    ids, logp = sdd.sparse(z, k, g)
    assert torch.equal(z, before) and ids.shape == (200, K) and logp.shape == (200, K + 1)
    value, order = z.double().log_softmax(1).sort(1, descending=True)
    assert torch.equal(ids, order[:, :K])
    assert torch.allclose(logp[:, :K].double(), value[:, :K], atol=1e-4)
    assert (logp[:, :K].diff(dim=1) <= 0).all()
    assert torch.allclose(logp.double().logsumexp(1), torch.zeros(200).double(), atol=1e-5)
    rest = value[:, K:].logsumexp(1)
    if K == V:
        assert (logp[:, -1] == -torch.inf).all()
    else:
        assert torch.allclose(logp[:, -1].double(), rest, atol=1e-4) and rest.min() < -100
        assert logp[:, -1].isfinite().all()
        less = logp[:, :K].double().exp().sum(1) < 1  # not renormalised
        assert less[rest > -10].all()


def test_candidates_of_nothing_are_random():
    """(E3) s = 0: log p = -ln V for k tokens, the rest has 1 - k / V; every slot is uniform over
    all tokens, none twice, rows differ, a seed fixes them; rows that are not flat stay as they are.
    """
    V, k, n = 12, 5, 6000
    z = torch.zeros(n + 1, V)
    z[-1, [3, 7, 2, 1, 0]] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    ids, logp = sdd.sparse(z, k, generator(1))
    assert ids[-1].tolist() == [3, 7, 2, 1, 0] and (z[:-1] == 0).all()
    ids = ids[:-1]
    assert torch.allclose(logp[:-1, :k], torch.tensor(-math.log(V)))
    assert torch.allclose(logp[:-1, -1], torch.tensor(math.log(1 - k / V)))
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    for slot in range(k):
        assert stats.chisquare(ids[:, slot].bincount(minlength=V).numpy()).pvalue > 1e-3
    pairs = (ids[:, 0] * V + ids[:, 1]).bincount(minlength=V * V).view(V, V)
    off = pairs[~torch.eye(V).bool()]
    assert stats.chisquare(off.numpy()).pvalue > 1e-3
    again, other = sdd.sparse(z, k, generator(1))[0], sdd.sparse(z, k, generator(2))[0]
    assert torch.equal(again[:-1], ids) and not torch.equal(other[:-1], ids)
    ids, logp = sdd.sparse(torch.full((4, 3), 7.5), 8, generator(1))
    assert ids.sort(1).values.tolist() == 4 * [[0, 1, 2]] and (logp[:, -1] == -torch.inf).all()


def test_states_tell_clean_unknown_and_open_positions_apart():
    """(E3) clean: log p 0 at its token; unknown: all mass in the rest; open: what sparse() says of
    its own evidence, in the order of the positions."""
    V, k, g = 9, 3, generator(1)
    s = torch.tensor([[0.0, 1e-3, SURE, 5.0], [SURE, 199.99, 0.0, SURE]])
    x = torch.randint(V, s.shape, generator=g)
    z = torch.randn(3, V, generator=g)
    ids, logp = sdd.states(x.masked_fill(s == 0, V), s, z, k, V)
    assert ids.shape == (2, 4, 3) and logp.shape == (2, 4, 4) and 0 <= ids.min() and ids.max() < V
    clean, unknown, open = s == SURE, s == 0, (s > 0) & (s < SURE)
    nothing = -torch.inf
    assert torch.equal(ids[clean][:, 0], x[clean])
    assert logp[clean].tolist() == 3 * [[0, nothing, nothing, nothing]]
    assert logp[unknown].tolist() == 2 * [[nothing, nothing, nothing, 0]]
    for got, want in zip((ids[open], logp[open]), sdd.sparse(z, k)):
        assert torch.equal(got, want)
    ids, logp = sdd.states(x, torch.where(open, 0.0, s), z[:0], 20, V)  # none is open; K = V
    assert ids.shape == (2, 4, V) and (logp.isfinite().sum(2) == 1).all()
    assert torch.equal(believed(ids, logp, V)[clean].argmax(1), x[clean])


def test_evidence_of_some_rows_is_that_of_the_whole_batch():
    """The noise is drawn for all rows; positions that are clean or unknown take none."""
    V, g = 5, generator(1)
    s = torch.randn(8, 6, generator=g).mul(60).clamp(0, SURE)
    s[3], s[4] = 0.0, SURE
    x0, many = torch.randint(V, s.shape, generator=g), ((s > 0) & (s < SURE)).sum(1)
    whole = sdd.observe(x0, s, V, generator(2))
    assert whole.shape == (int(many.sum()), V)
    for rows in (slice(0, 4), slice(4, 8), slice(2, 3), slice(3, 4)):
        a, b = many[:rows.start].sum(), many[:rows.stop].sum()
        assert torch.equal(sdd.observe(x0, s, V, generator(2), rows), whole[a:b])
    eps = torch.randn(len(whole), V, generator=generator(2))
    open = (s > 0) & (s < SURE)
    want = s[open][:, None] * F.one_hot(x0[open], V) + s[open].sqrt()[:, None] * eps
    assert torch.allclose(whole, want, atol=1e-3)


# ---- schedules and clocks


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("V", [3, 2048])
def test_a_schedule_falls_from_clean_to_nothing_with_its_stated_slope(name, V):
    """(E5) own time 0: SURE, 1: nothing; -ln t or 1 / t - 1 times 2 ln V, at least 8; monotone; the
    slope is the finite difference, 0 at both ends."""
    cfg = config(V, 1, schedule=name)
    t = torch.linspace(0, 1, 501, dtype=torch.float64)[:, None]
    s, slope = (y[:, 0] for y in sdd.levels(t, torch.zeros(501, 1), cfg))
    assert s.dtype == torch.float32 and slope.dtype == torch.float64
    assert s[0] == SURE and s[-1] == 0 and (s.diff() <= 0).all() and slope[0] == slope[-1] == 0
    want = [min(SURE, unit(V) * LEVEL[name](x)) for x in t[1:, 0].tolist()]
    assert torch.allclose(s[1:].double(), torch.tensor(want).double(), rtol=1e-6)
    way = (s > 0) & (s < SURE)
    assert way[-2] and (s[way].diff() < 0).all() and torch.equal(way, slope > 0)
    own, h = t[:, 0][way].tolist(), 1e-6
    rate = [unit(V) * (LEVEL[name](x * (1 - h)) - LEVEL[name](x * (1 + h))) / (2 * h * x)
            for x in own]
    assert torch.allclose(slope[way], torch.tensor(rate, dtype=torch.float64), rtol=1e-6)


@pytest.mark.parametrize("window", [0.05, 0.2, 0.5, 1.0])
def test_every_position_goes_from_nothing_to_token_in_its_window(window):
    """(E5) own time (t - tau) / w, clamped: unknown at t = 1, clean at t = 0, on its way during a
    share w of the path; the slope is in t, not in own time."""
    cfg, shape, one = config(3, 24, window=window), (50, 24), unit(3)
    tau = sdd.clocks(shape, cfg, generator(1))
    assert tau.shape == shape and tau.min() >= 0 and tau.max() <= 1 - window + 1e-6
    before, busy, many = torch.full(shape, SURE), torch.zeros(shape), 400
    for t in (torch.arange(many) + 0.5) / many:
        s, slope = sdd.levels(t.expand(50, 1), tau, cfg)
        own = ((t - tau) / window).double().clamp(0, 1)
        want = (one * (1 / own - 1)).clamp(0, SURE)
        assert torch.allclose(s.double(), want, rtol=1e-4, atol=1e-4)
        way = (s > 0) & (s < SURE)
        assert (s <= before).all() and torch.equal(way, slope > 0)
        assert torch.allclose(slope[way], (one / own ** 2 / window)[way], rtol=1e-4)
        if window < 1:
            assert way.sum(1).max() <= min(24, 24 * window / (1 - window) + 1)
        before, busy = s, busy + way.double() / many
    cut = 1 / (1 + SURE / one)  # own time at which a position counts as clean
    assert (busy - window * (1 - cut)).abs().max() <= 1.01 / many
    assert (sdd.levels(torch.zeros(50, 1), tau, cfg)[0] == SURE).all()
    assert sdd.levels(torch.ones(50, 1), tau, cfg)[0].max() < 1e-5


def test_clocks_are_a_comb_in_random_order():
    """(E5) sorted, they are (1 - w) (rank + u) / T with one uniform u per row; every order of the
    positions is equally likely; nothing but the shape is looked at."""
    cfg = config(T=5, window=0.3)
    tau = sdd.clocks((8000, 5), cfg, generator(2)) / 0.7 * 5
    comb = tau.sort(1).values - torch.arange(5)
    assert (comb - comb[:, :1]).abs().max() < 1e-5 and 0 <= comb.min() and comb.max() < 1
    assert stats.kstest(comb[:, 0].numpy(), "uniform").pvalue > 1e-3
    rank = tau.argsort(1).argsort(1)
    orders = (rank[:, :4] * 5 ** torch.arange(4)).sum(1).unique(return_counts=True)[1]
    assert len(orders) == 120 and stats.chisquare(orders.numpy()).pvalue > 1e-3
    assert (sdd.clocks((30, 5), config(T=5, window=1.0), generator(3)) == 0).all()


def test_frozen_positions_are_always_clean_and_the_others_share_the_comb():
    """(E5) the comb of a row is over its free positions alone."""
    cfg = config(T=9, window=0.25)
    frozen = torch.rand(300, 9, generator=generator(4)) < 0.4
    frozen[0] = True
    tau = sdd.clocks((300, 9), cfg, generator(5), frozen)
    assert (tau[frozen] == torch.inf).all()
    for t in (0.0, 0.3, 0.9, 1.0):
        s, slope = sdd.levels(torch.full((300, 1), t), tau, cfg)
        assert (s[frozen] == SURE).all() and (slope[frozen] == 0).all()
        assert t < 1 or s[~frozen].max() < 1e-5
    for row, keep in zip(tau, ~frozen):
        N = int(keep.sum())
        comb = row[keep].sort().values / 0.75 * max(N, 1) - torch.arange(N)
        assert N == 0 or 0 <= comb.min() and comb.max() < 1 and comb.max() - comb.min() < 1e-5


def test_deal_hands_out_the_same_clocks_highest_score_first():
    """Waiting positions keep their clocks as a set; the best begins next, at the latest tau."""
    g = generator(6)
    tau, waiting = torch.rand(300, 8, generator=g), torch.rand(300, 8, generator=g) < 0.6
    tau[~waiting & (torch.rand(300, 8, generator=g) < 0.3)] = torch.inf  # some are frozen
    score = torch.rand(300, 8, generator=g)
    dealt = sdd.deal(tau, waiting, score)
    assert torch.equal(dealt[~waiting], tau[~waiting])
    for row, old, mask, value in zip(dealt, tau, waiting, score):
        by_score = row[mask][value[mask].argsort(descending=True)]
        assert torch.equal(by_score, old[mask].sort(descending=True).values)


# ---- own evidence


@pytest.mark.parametrize("skip", ["evidence", "state"])
def test_own_evidence_is_bayes_rule(skip):
    """(E6) with all tokens as candidates: softmax(net + own) is prior times Gaussian likelihood,
    for any prior; exactly the same for either choice."""
    V, g = 6, generator(2)
    for s in (1e-4, 0.7, 4.0, 25.0):
        x, s = torch.randint(V, (50,), generator=g), torch.full((50,), s).double()
        z = sdd.evidence(x, s, torch.randn(50, V, generator=g).double())
        net = 3 * torch.randn(50, V, generator=g)
        far = (z[:, None] - s[:, None, None] * torch.eye(V)).square().sum(2)
        want = (net.double() - far / (2 * s[:, None])).softmax(1)
        own = sdd.own_evidence(*sdd.sparse(z, V), z.float(), V, skip)
        assert torch.allclose((net + own).double().softmax(1), want, atol=1e-5)


@pytest.mark.parametrize("V,k", [(7, 3), (7, 1), (40, 8)])
def test_what_candidates_do_not_tell_is_spread_evenly(V, k):
    """(E6) skip state, k < V: softmax(own) has the candidates' own p, and every other token the
    same share of the rest; skip evidence: the whole posterior whatever k is; none: nothing."""
    g = generator(3)
    x, s = torch.randint(V, (50,), generator=g), torch.linspace(0.01, 40, 50)
    z = sdd.evidence(x, s, torch.randn(50, V, generator=g))
    ids, logp = sdd.sparse(z, k)
    own = sdd.own_evidence(ids, logp, z, V, "state")
    p = z.double().softmax(1)
    top = torch.zeros(50, V).bool().scatter(1, ids, True)
    rest = p.masked_fill(top, 0).sum(1, keepdim=True) / (V - k)
    assert torch.allclose(own.double().softmax(1), torch.where(top, p, rest), atol=1e-6)
    assert torch.allclose(own[~top], torch.zeros(()), atol=0)
    assert torch.allclose(own.double().log_softmax(1), torch.where(top, p, rest).log(), atol=1e-3)
    assert torch.equal(sdd.own_evidence(ids, logp, z, V, "evidence"), z)
    assert (sdd.own_evidence(ids, logp, z, V, "none") == 0).all()
    sure = torch.zeros(1, V).index_fill_(1, torch.tensor([2]), 150.0)  # e^-150 counts as e^-80
    own = sdd.own_evidence(*sdd.sparse(sure, k), sure, V, "state").double().log_softmax(1)[0]
    assert own[2] == 0 and (own[torch.arange(V) != 2].max() < -75)


@pytest.mark.parametrize("skip", ["evidence", "state", "none"])
def test_evidence_is_added_where_it_was_measured(skip):
    """(E6) predict: net + own of each position that was asked for, in order; an unknown position
    adds exactly nothing; `hide` takes positions from the network's view, not from the answer."""
    V, k, g = 5, 3, generator(1)
    cfg, model = config(V, 4, k=k, skip=skip), Oracle(dirichlet(V, 4, 1, 1.0), V, 4, 0.5)
    s = torch.tensor([[0.0, 2.0, SURE, 5.0], [7.0, SURE, 0.0, 0.0], [3.0, 1.0, 0.5, 9.0]])
    x = torch.randint(V, s.shape, generator=g)
    open = (s > 0) & (s < SURE)
    z = sdd.evidence(x[open], s[open], torch.randn(int(open.sum()), V, generator=g))
    where = torch.tensor([[1, 0, 0, 1], [1, 0, 1, 1], [0, 1, 0, 1]]).bool()
    logits, own = sdd.predict(model, x, s, z, where, cfg)
    ids, logp, asked = model.calls[0]
    assert torch.equal(asked, where)
    assert all(torch.equal(a, b) for a, b in zip((ids, logp), sdd.states(x, s, z, k, V)))
    assert logits.dtype == torch.float32 and torch.equal(
        logits, model(ids, logp, where) + own)
    full = torch.zeros(3, 4, V)
    full[open] = sdd.own_evidence(ids[open], logp[open], z, V, skip)
    assert torch.equal(own, full[where]) and (own[[0, 3, 4]] == 0).all()
    assert skip == "none" or own[[1, 2, 5, 6]].abs().amax(1).min() > 0
    hide = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]).bool()
    bare, same = sdd.predict(model, x, s, z, where, cfg, hide)
    shown = model.calls[-1][1]
    assert torch.equal(same, own) and torch.equal(shown[~hide], logp[~hide])
    assert (shown[hide][:, -1] == 0).all() and (shown[hide][:, :-1] == -torch.inf).all()
    assert (bare - logits).abs().max() > 1e-3


@pytest.mark.parametrize("skip", ["evidence", "none"])
def test_a_belief_holds_the_top_of_what_the_network_said(skip):
    """(E3) state belief: the candidates of open positions are the top of softmax(net + z), net of a
    first call that saw the evidence's candidates, or of an earlier one, `past`; all else stays, own
    evidence too; nobody learns through the first call."""
    V, k, T, g = 11, 3, 5, generator(1)
    cfg = config(V, T, k=k, state="belief", skip=skip)
    model, seen = shaken(network(V=V, T=T, k=k)), []
    model.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    s = torch.tensor([[0.0, 2.0, SURE, 5.0, 1.0], [7.0, SURE, 0.0, 3.0, 0.0]])
    x, open = torch.randint(V, s.shape, generator=g), (s > 0) & (s < SURE)
    z = sdd.observe(x, s, V, g)
    where = torch.tensor([[1, 0, 0, 1, 1], [1, 0, 1, 0, 1]]).bool()
    logits, own = sdd.predict(model, x, s, z, where, cfg)
    ((ids, logp, asked), first), ((now, told, wanted), net) = seen
    plain = sdd.states(x, s, z, k, V)
    assert torch.equal(asked, open) and torch.equal(wanted, where)
    assert not torch.equal(now, plain[0])  # the context has a say
    want = [sdd.sparse(first + z, k), sdd.sparse(z, k)]
    for got, (a, b) in zip(((now, told), (plain[0], plain[1])), want):
        assert torch.equal(got[0][open], a) and torch.equal(got[1][open], b)
        assert torch.equal(got[0][~open], plain[0][~open])
        assert torch.equal(got[1][~open], plain[1][~open])
    assert not first.requires_grad and logits.requires_grad and torch.equal(logits, net + own)
    full = torch.zeros(2, T, V)
    full[open] = z if skip == "evidence" else 0 * z
    assert torch.equal(own, full[where])
    seen.clear()
    past = 3 * torch.randn(z.shape, generator=g)
    sdd.predict(model, x, s, z, where, cfg, None, past)
    ((now, told, _), _), = seen
    assert all(torch.equal(a[open], b) for a, b in zip((now, told), sdd.sparse(past + z, k)))
    seen.clear()
    sdd.predict(model, x, torch.where(open, SURE, s), z[:0], where, cfg)
    assert len(seen) == 1  # nothing is open


# ---- the bound of a fresh network (init identity)


FRESH = [dict(V=2, window=1.0), dict(V=4, window=0.2), dict(V=28, k=1, window=1.0),
         dict(V=28, k=5, window=0.1, schedule="exponential", attention="full"),
         dict(V=28, k=28, window=1.0, schedule="exponential", skip="state"),
         dict(V=3, k=99, window=0.3, skip="state", attention="full"),
         dict(V=500, k=8, window=0.3, schedule="exponential"),
         dict(V=28, k=3, window=0.5, state="belief")]


@pytest.mark.parametrize("kind", FRESH, ids=lambda k: " ".join(map(str, k.values())))
def test_a_fresh_network_pays_ln_v(kind):
    """(E4) zero head: T ln V, whatever the tokens, within 4 standard errors; every weight and
    factor of the bound is in this figure. For any k with all the evidence, for k = V with what the
    candidates tell."""
    T, V = 6, kind["V"]
    cfg, model = config(T=T, **kind), network(T=T, **kind)
    x0 = torch.randint(V, (320, T), generator=generator(1))
    nats, info = sdd.nelbo(model, x0, cfg, generator(2), 8)
    assert nats.shape == (320,) and nats.dtype == torch.float64
    assert close(nats, T * math.log(V), 4) and nats.std() < 1.5 * T * math.log(V)
    assert info["forwards"] == 8 and info["s"].shape == info["cost"].shape
    assert (info["cost"] >= 0).all() and (info["cost"] <= 1).all()
    assert (info["s"] > 0).all() and (info["s"] < SURE).all()


@pytest.mark.parametrize("V,k", [(28, 3), (100, 8)])
def test_few_candidates_cost_a_little(V, k):
    """(E4) (E6) skip state: the same draws cost more with k < V than with k = V, by 1/2 int
    E |theta - theta~|^2 ds, as computed here from Gaussians; less than 0.1 nats a token."""
    T, wide = 4, dict(V=V, T=4, schedule="exponential", skip="state")
    x0 = torch.randint(V, (384, T), generator=generator(1))
    few, all_ = (sdd.nelbo(network(**wide, k=n), x0, config(**wide, k=n), generator(2), 8)[0] / T
                 for n in (k, V))
    s = torch.linspace(0, 60, 61).double()
    z = sdd.evidence(torch.zeros(400).long().repeat(61), s.repeat_interleave(400),
                     torch.randn(61 * 400, V, generator=generator(3)).double())
    theta = z.softmax(1).sort(1, descending=True).values[:, k:]
    lost = (theta - theta.mean(1, keepdim=True)).square().sum(1).view(61, 400)
    excess = torch.trapezoid(0.5 * lost.mean(1), s).item()
    assert 0.003 < excess < 0.1
    assert close(few - all_, excess, 4.5) and (few - all_).mean() > 0


def test_precision_runs_from_nothing_to_sure():
    """(E4) a network that always says 1 / V, without own evidence, pays 1/2 (1 - 1 / V) for every
    unit of precision, and there are SURE of them."""
    for window in (0.2, 1.0):
        wide = dict(V=3, T=3, skip="none", window=window)
        x0 = torch.randint(3, (192, 3), generator=generator(1))
        nats, _ = sdd.nelbo(network(**wide), x0, config(**wide), generator(2), 16)
        assert close(nats, 3 * SURE * 0.5 * (1 - 1 / 3), 4) and nats.std() < nats.mean()


@pytest.mark.parametrize("k,state", [(2, "evidence"), (5, "evidence"), (2, "belief")])
def test_a_fresh_network_biased_to_frequencies_pays_their_cross_entropy(k, state):
    """(E4) (E8) net = log p: -log p(x0) for every row of tokens, as the exact posterior of
    independent tokens; window, schedule, k and number of steps do not matter."""
    p = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    x0 = torch.multinomial(p, 512 * 6, True, generator=generator(1)).view(512, 6)
    for window, schedule in ((1.0, "rational"), (0.3, "rational"), (0.5, "exponential")):
        wide = dict(V=5, T=6, k=k, state=state, window=window, schedule=schedule)
        cfg, model = config(**wide), network(**wide)
        model.head.bias.data = sdd.CAP * (p.log() / sdd.CAP).atanh()
        truth = -p.log()[x0].sum(1).double()
        if schedule == "rational":
            assert close(sdd.nelbo(model, x0, cfg, generator(2))[0] - truth, 0, 4)
        for steps in (1, 5):
            nats = sdd.nelbo_steps(model, x0, cfg, generator(3), steps)
            assert close(nats - truth, 0, 4) and (steps > 1 or (nats - truth).abs().max() < 1e-4)


@pytest.mark.parametrize("attention", ["pooled", "full"])
def test_where_nothing_is_known_a_fresh_network_is_uniform(attention):
    """CE of unknown positions is ln V, and so is the mean CE before training."""
    V = 11
    model, cfg = network(V=V, T=5, k=4, attention=attention), config(V, 5, k=4)
    x0 = torch.randint(V, (9, 5), generator=generator(1))
    todo = torch.ones(9, 5).bool()
    logits, own = sdd.predict(model, x0, torch.zeros(9, 5), torch.zeros(0, V), todo, cfg)
    assert torch.equal(logits, torch.zeros(45, V)) and torch.equal(own, logits)
    assert F.cross_entropy(logits, x0.flatten()).item() == pytest.approx(math.log(V))


# ---- the bound of exact and of perturbed posteriors


def quadrature(model, cfg, nodes=24, n=36):
    """(E4) of every row, (4,), for two tokens and positions, with the script's own levels, states,
    answers and distances: Gauss-Legendre over the root of one position's precision, Gauss-Hermite
    over the noise of both, all orders of the clocks. No other position may begin or end meanwhile.
    """
    w, rows, total = cfg.window, all_rows(2, 2), torch.zeros(4).double()
    xi, weight = grid(2, n)
    eps = torch.stack((xi, -xi), 2).div(math.sqrt(2)).float().repeat(4, 1, 1)  # (4 n^2, T, V)
    x0 = rows.repeat_interleave(len(xi), 0)
    for order, i in itertools.product(((0, 1), (1, 0)) if w < 1 else ((0, 1),), (0, 1)):
        tau = (1 - w) / 2 * torch.tensor(order).double()
        for x, share in legendre(nodes):
            now = 90 * x * x
            own = TIME[cfg.schedule](now / unit(2))
            s, slope = (y.expand(x0.shape) for y in sdd.levels(
                (tau[i] + w * own).view(1, 1), tau[None], cfg))
            assert s[0, i].item() == pytest.approx(now, rel=1e-3)
            open, todo = (s > 0) & (s < SURE), torch.arange(2).expand(s.shape) == i
            z = sdd.evidence(x0[open], s[open], eps[open])
            logits, _ = sdd.predict(model, x0, s, z, todo, cfg)
            cost = 0.5 * slope[:, i] * sdd.distance(logits, x0[:, i])
            dt = w * own ** (1 if cfg.schedule == "exponential" else 2) / unit(2) * 180 * x * share
            total += (cost.view(4, -1) @ weight) * dt / (2 if w < 1 else 1)
    return total


@pytest.mark.parametrize("window", [0.2, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bound_of_exact_posteriors_is_the_entropy(window, schedule):
    """(E2) (E4) (E5) (E6) two tokens, two positions, no chance: -log p of every row, and the
    entropy, to 1e-3; a network that errs pays more."""
    cfg = config(2, window=window, schedule=schedule)
    exact = quadrature(Oracle(TWO, 2, 2), cfg)
    assert (exact + TWO.log()).abs().max() < 2e-3
    assert (TWO * exact).sum().item() == pytest.approx(entropy(TWO), abs=3e-4)
    tilted = quadrature(Oracle(TWO, 2, 2, 0.3), cfg, 12, 20)
    assert (TWO * (tilted - exact)).sum() > 0.01


@pytest.mark.parametrize("window,schedule", [(0.2, "rational"), (1.0, "rational"),
                                             (0.2, "exponential"), (1.0, "exponential")])
def test_the_estimate_of_an_exact_posterior_is_minus_log_p(window, schedule):
    """(E4) (E5) nelbo() with four tokens and k = V, every one of 16 rows, within 4.5 standard
    errors; the entropy, too. The same draws cost more when the network sees one candidate a
    position, and when it errs."""
    cfg, times = config(window=window, schedule=schedule), 240
    x0 = all_rows(4, 2).repeat_interleave(times, 0)
    exact, few, tilted = (
        sdd.nelbo(Oracle(NEAR, 4, 2, tilt), x0, dataclasses.replace(cfg, k=k), generator(3), 6)[0]
        for tilt, k in ((0, 4), (0, 1), (1.2, 4)))
    assert row_by_row(exact, -NEAR.log(), times)
    mean = (NEAR * exact.view(16, times).mean(1)).sum().item()
    se = (NEAR * exact.view(16, times).std(1) / times ** 0.5).square().sum().sqrt().item()
    assert abs(mean - entropy(NEAR)) < 4 * se and se < 0.08
    for worse in (few, tilted):
        gap = (worse - exact).view(16, times)
        se = (NEAR * gap.std(1) / times ** 0.5).square().sum().sqrt()
        gap = (NEAR * gap.mean(1)).sum()
        if worse is few and window < 0.5:  # one position at a time, all others clean or unknown
            assert gap.abs() < 1e-3
        else:
            assert gap > 4 * se and gap > 0.01


@pytest.mark.parametrize("window,schedule", [(1.0, "rational"), (0.3, "rational"),
                                             (0.6, "rational"), (0.6, "exponential")])
def test_the_estimate_of_the_bound_is_unbiased(window, schedule):
    """(E4) (E5) nelbo() of a network that errs, for every row against quadrature that knows nothing
    of the script, 4.5 standard errors; several draws and a single one."""
    model, cfg = Oracle(TWO, 2, 2, 0.7), config(2, window=window, schedule=schedule)
    truth, times = path_bound(model, window, schedule), 640
    x0 = all_rows(2, 2).repeat_interleave(times, 0)
    assert (truth + TWO.log()).abs().max() > 0.02
    for seed, draws in ((1, 1), (2, 4)):
        nats, info = sdd.nelbo(model, x0, cfg, generator(seed), draws)
        assert row_by_row(nats, truth, times, 2e-3) and info["forwards"] == draws


def test_a_comb_of_times_is_less_noisy_than_single_times():
    """(E4) one offset a row, evenly spaced: less spread than as many independent times."""
    model, cfg = network(V=28, T=3), config(28, 3)
    x0 = torch.randint(28, (400, 3), generator=generator(1))
    one, many = (sdd.nelbo(model, x0, cfg, generator(2), n)[0] for n in (1, 16))
    assert many.std() < 0.9 * one.std() / 4


def test_the_bound_says_what_it_is_made_of():
    """(E4) info: precision and cost of every position and time that counted."""
    cfg, model = config(4, 3, window=0.4), Oracle(dirichlet(4, 3), 4, 3)
    x0 = torch.randint(4, (70, 3), generator=generator(1))
    _, info = sdd.nelbo(model, x0, cfg, generator(2), 5)
    asked = torch.cat([w.flatten() for _, _, w in model.calls])
    assert len(info["s"]) == len(info["cost"]) == int(asked.sum()) < 70 * 3 * 5
    late, early = info["cost"][info["s"] > 15].mean(), info["cost"][info["s"] < 3].mean()
    assert late < 0.1 * early


@pytest.mark.parametrize("window", [0.4, 1.0])
def test_a_bound_given_some_tokens_is_that_of_the_others(window):
    """(E4) `frozen`: -log p(others | given) for every row; what is all given costs nothing and is
    shown clean."""
    model, x0, times = Oracle(LINKED, 2, 3), all_rows(2, 3), 320
    cfg, cube = config(2, 3, window=window), LINKED.view(2, 2, 2)
    rows = x0.repeat_interleave(times, 0)
    for frozen, given in (([True, False, False], cube.sum((1, 2))[x0[:, 0]]),
                          ([False, True, True], cube.sum(0)[x0[:, 1], x0[:, 2]])):
        frozen = torch.tensor(frozen).expand(len(rows), 3)
        nats, _ = sdd.nelbo(model, rows, cfg, generator(4), 4, frozen)
        assert row_by_row(nats, (given / LINKED).log(), times)
        ids, logp, where = model.calls[-1]
        assert not where[frozen[:64]].any() and (logp[..., 0][frozen[:64]] == 0).all()
        assert torch.equal(ids[..., 0][frozen[:64]], rows[-64:][frozen[:64]])
    none, _ = sdd.nelbo(model, x0, cfg, generator(4), 4, torch.ones(8, 3).bool())
    assert (none == 0).all()


# ---- the bounds of finitely many steps


@pytest.mark.parametrize("mixture", [True, False])
def test_the_bound_of_a_step_is_unbiased(mixture, monkeypatch):
    """(E5) (E7) (E8) nelbo_steps of a network that errs, for every row against quadrature; one time
    for all and clocks of their own, few steps and more."""
    model, times = Oracle(TWO, 2, 2, 0.6), 2500
    x0 = all_rows(2, 2).repeat_interleave(times, 0)
    for steps, window, schedule, tau in ((1, 1.0, "rational", [0.0, 0.0]),
                                         (2, 1.0, "exponential", [0.0, 0.0]),
                                         (4, 1.0, "rational", [0.0, 0.0]),
                                         (5, 0.4, "rational", [0.2, 0.5]),
                                         (7, 0.7, "exponential", [0.25, 0.1])):
        fixed_clocks(monkeypatch, tau)
        truth = chain_bound(model, path(steps, 2, tau, window, schedule), mixture)
        nats = sdd.nelbo_steps(model, x0, config(2, window=window, schedule=schedule),
                               generator(steps), steps, mixture)
        assert row_by_row(nats, truth, times, 1e-3)
        if steps == 1:
            alone = model.answer(torch.full((1, 2, 2), -math.log(2)).double()).log_softmax(2)[0]
            want = -alone[[0, 1], all_rows(2, 2)].sum(1)
            assert torch.allclose(nats.view(4, times), want[:, None], atol=1e-5)


def test_the_entropy_the_mixture_and_the_ancestral_bound_are_in_this_order():
    """(E8) exact posteriors: H <= mixture, which begins at the sum of the marginal entropies and
    falls, <= ancestral; both end at H. By quadrature, to which the test above ties nelbo_steps."""
    model, H, last = Oracle(TWO, 2, 2), entropy(TWO), None
    for steps in (1, 2, 4, 16, 64):
        A, C = ((TWO * chain_bound(model, path(steps, 2, schedule="exponential"), kind)).sum()
                for kind in (False, True))
        if steps == 1:
            first = torch.special.entr(marginals(TWO, 2, 2)).sum().item()
            assert A.item() == pytest.approx(first) and C.item() == pytest.approx(first)
        else:
            assert H < C < A - 0.005 and C < last
        last = C
    assert C < H + 0.01 and A < H + 0.06


@pytest.mark.parametrize("window", [0.2, 1.0])
def test_bounds_of_many_steps_are_near_the_entropy(window):
    """(E8) the same from draws, four tokens, k = V; -log p of the same rows is taken away."""
    model, cfg = Oracle(JOINT, 4, 2), config(window=window, schedule="exponential")
    g, n, first = generator(5), 3000, 0.0
    x0 = all_rows(4, 2)[torch.multinomial(JOINT, n, True, generator=g)]
    floor = -JOINT.log()[(x0 * torch.tensor([4, 1])).sum(1)]
    alone = -marginals(JOINT, 4, 2).log()[[0, 1], x0].sum(1)
    for steps in (1, 8, 120):
        mixture, ancestral = (sdd.nelbo_steps(model, x0, cfg, g, steps, kind) - floor
                              for kind in (True, False))
        wide = 4 * mixture.std() / n ** 0.5
        assert mixture.mean() > -wide and (steps == 1 or mixture.mean() < 0.06 + wide)
        if steps == 1:
            assert torch.allclose(mixture, alone - floor, atol=1e-4)
            assert torch.equal(ancestral, mixture) and mixture.mean() > 0.1
        if steps == 8:
            first = ancestral.mean()
            assert first > 0.3 and first > mixture.mean() + wide
        if steps == 120:
            assert 0 < ancestral.mean() < 0.15 * first


# ---- training


@pytest.mark.parametrize("window,prefix,skip", [(1.0, 0.0, "evidence"), (0.2, 0.0, "state"),
                                                (0.4, 0.7, "none")])
def test_the_ce_loss_is_a_mean_of_means(window, prefix, skip, monkeypatch):
    """Cross-entropy where s < SURE, what is unknown included, averaged in each row, then over rows
    that have any; evidence has the law of its precision; a row's time is one in every 200th."""
    V, wide, seen, predict = 11, dict(V=11, T=9, k=4, window=window, skip=skip), [], sdd.predict
    monkeypatch.setattr(sdd, "predict",
                        lambda *args: seen.append((*args, predict(*args))) or seen[-1][-1])
    model, cfg = shaken(network(**wide)), config(loss="ce", prefix=prefix, **wide)
    x0 = torch.randint(V, (200, 9), generator=generator(1))
    loss, info = sdd.loss_fn(model, x0, cfg, generator(2))
    (_, x, s, z, where, _, (out, _)), = seen
    assert torch.equal(x, x0) and torch.equal(where, s < SURE)
    cost = torch.zeros(200, 9)
    cost[where] = -out.log_softmax(1)[torch.arange(len(out)), x0[where]]
    rows = [row[w].mean() for row, w in zip(cost, where) if w.any()]
    assert loss.item() == pytest.approx((sum(rows) / len(rows)).item(), rel=1e-4)
    assert info["unsettled"] == pytest.approx(where.sum(1).float().mean().item())
    open = (s > 0) & (s < SURE)
    level = s[open][:, None]
    eps = ((z - level * F.one_hot(x0[open], V)) / level.sqrt()).double().flatten()
    assert abs(eps.mean()) < 4.5 / len(eps) ** 0.5
    assert abs(eps.square().mean() - 1) < 4.5 * (2 / len(eps)) ** 0.5
    if window == 1:
        t = 1 / (1 + s[:, 0].double() / unit(V))
        t = t[s[:, 0] < SURE] * 200
        assert (t - torch.arange(200 - len(t), 200) - 0.5).abs().max() < 0.51
    if prefix:
        assert (s == SURE).int().cumprod(1).sum(1).clamp(max=1).double().mean() > 0.45


def test_a_prefix_is_as_long_and_as_frequent_as_stated(monkeypatch):
    """floor(T u) first positions, in a share `prefix` of the rows; never the whole row."""
    seen, clocks = [], sdd.clocks
    monkeypatch.setattr(sdd, "clocks", lambda shape, cfg, g, frozen=None:
                        seen.append(frozen) or clocks(shape, cfg, g, frozen))
    x0 = torch.randint(4, (4000, 5), generator=generator(1))
    sdd.loss_fn(network(T=5), x0, config(T=5, prefix=0.6), generator(2))
    frozen = seen[0].expand(4000, 5)
    size = frozen.sum(1)
    assert torch.equal(frozen, torch.arange(5) < size[:, None])
    want = [4000 * p for p in (0.4 + 0.6 / 5, *4 * [0.6 / 5])]
    assert stats.chisquare(size.bincount(minlength=6)[:5].numpy(), want).pvalue > 1e-3
    assert size.max() < 5
    sdd.loss_fn(network(T=5), x0, config(T=5, prefix=0.0), generator(2))
    assert not seen[1].any()


@pytest.mark.parametrize("window,schedule", [(1.0, "rational"), (0.6, "exponential")])
def test_the_elbo_loss_is_the_bound_per_token(window, schedule):
    """(E4) its mean over seeds is the quadrature, divided by T."""
    model, x0 = Oracle(TWO, 2, 2, 0.7), all_rows(2, 2).repeat(40, 1)
    cfg = config(2, loss="elbo", window=window, schedule=schedule)
    truth = path_bound(model, window, schedule).mean().item() / 2
    mean, se = mean_and_se(lambda g: sdd.loss_fn(model, x0, cfg, g)[0], 100)
    assert abs(mean - truth) < 4.5 * se + 1e-3 and se < 0.03 * truth


@pytest.mark.parametrize("kind", [dict(loss="ce"), dict(loss="elbo", window=0.4),
                                  dict(loss="ce", prefix=0.6, window=0.3, attention="full"),
                                  dict(state="belief"), dict(process="original")], ids=str)
def test_shares_of_a_batch_average_to_its_loss(kind):
    """The same noise for the whole batch, whoever works on which rows; gradients as well."""
    wide = dict(V=7, T=5, k=3, schedule="exponential") | kind
    model, cfg = shaken(network(**wide), size=0.1), config(**wide)
    x0 = torch.randint(7, (12, 5), generator=generator(1))
    whole, info = sdd.loss_fn(model, x0, cfg, generator(2))
    parts = [sdd.loss_fn(model, x0, cfg, generator(2), slice(i, i + 4)) for i in (0, 4, 8)]
    assert sum(p[0] for p in parts).item() / 3 == pytest.approx(whole.item(), rel=1e-5)
    assert all(p[1] == info for p in parts) and len({p[0].item() for p in parts}) == 3
    grads = [torch.autograd.grad(y, model.head.weight)[0]
             for y in (whole, sum(p[0] for p in parts) / 3)]
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-5) and grads[0].abs().max() > 0


def test_k_follows_the_curriculum():
    """at_step: every k in turn, equally long, to the last step; without one, --k all the time."""
    cfg = config(k=5, curriculum="1,2,4,8", steps=100)
    assert [sdd.at_step(cfg, step).k for step in range(100)] == \
        25 * [1] + 25 * [2] + 25 * [4] + 25 * [8]
    assert cfg.k == 5 and dataclasses.replace(sdd.at_step(cfg, 99), k=5) == cfg
    short = config(curriculum="3,1", steps=5)
    assert [sdd.at_step(short, step).k for step in range(5)] == [3, 3, 3, 1, 1]
    assert sdd.at_step(config(k=5), 7).k == 5
    seen = []
    model = network(V=9, T=4, k=5)
    model.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[2]))
    for step in (0, 50, 99):
        x0 = torch.zeros(4, 4).long()
        sdd.loss_fn(model, x0, sdd.at_step(config(9, 4, curriculum="1,2,4,8", steps=100), step),
                    generator(1))
    assert seen == [1, 4, 8]


def test_the_learning_rate_warms_up_and_falls_to_zero():
    cfg = config(lr=0.1, warmup=10, steps=110)
    rates = [sdd.get_lr(step, cfg) for step in range(111)]
    assert rates[:10] == pytest.approx([0.01 * (k + 1) for k in range(10)])
    assert rates[10] == pytest.approx(0.1) and rates[60] == pytest.approx(0.05)
    assert rates[110] == pytest.approx(0, abs=1e-12) and rates[10:] == sorted(rates[10:])[::-1]


# ---- the original process


@pytest.mark.parametrize("swap", [0.95, 0.0])
def test_the_original_state_holds_the_answer(swap):
    """The truth first with 1 - 0.01 (k - 1), k - 1 random tokens of 0.01, all flattened towards
    1 / V: at t = 1 all have 1 / V; a candidate is swapped with probability swap t; blur has a
    standard deviation of t / 10."""
    V, k, T, n = 7, 5, 40, 150
    cfg = config(V, T, k=k, process="original", swap=swap)
    x0 = torch.randint(V, (n, T), generator=generator(1))
    for t in (0.0, 0.4, 1.0):
        ids, logp, blur = sdd.original(x0, torch.full((n, 1), t), cfg, generator(2))
        assert ids.shape == (n, T, k) and logp.shape == (n, T, k + 1)
        p = torch.tensor([1 - 0.01 * (k - 1)] + (k - 1) * [0.01]) * (1 - t) + t / V
        assert torch.allclose(logp[..., :-1].exp(), p.expand(n, T, k), atol=1e-6)
        rest = max(1e-9, 1 - p.double().sum().item())
        assert torch.allclose(logp[..., -1].exp(), torch.tensor(rest), atol=1e-6)
        assert logp.isfinite().all()
        hit, copy = (ids == x0[..., None]).double().mean((0, 1)), 1 - swap * t * (1 - 1 / V)
        assert abs(hit[0] - copy) <= 4.5 * (copy * (1 - copy) / x0.numel()) ** 0.5
        assert ((hit[1:] - 1 / V).abs() < 4.5 * (1 / V / x0.numel()) ** 0.5).all()
        for slot in range(1, k):
            assert stats.chisquare(ids[..., slot].flatten().bincount(minlength=V)).pvalue > 1e-4
        assert blur.shape == (n, T, k, cfg.n_embd) and (t > 0 or (blur == 0).all())
        assert t == 0 or abs(blur.std() / (0.1 * t) - 1) < 4.5 / (2 * blur.numel()) ** 0.5
        rows = sdd.original(x0, torch.full((n, 1), t), cfg, generator(2), slice(3, 9))
        assert all(torch.equal(a, b[3:9]) for a, b in zip(rows, (ids, logp, blur)))
    t = torch.tensor([[0.0], [1.0]]).repeat(n // 2, 1)  # each row its own time
    _, logp, blur = sdd.original(x0, t, cfg, generator(3))
    assert (blur[::2] == 0).all() and (logp[::2, :, 0] > -0.1).all()
    assert torch.allclose(logp[1::2, :, :-1], torch.tensor(-math.log(V)))


@pytest.mark.parametrize("swap,k", [(0.95, 8), (0.95, 1), (0.0, 8)])
def test_a_copy_of_the_first_candidate_scores_as_theory_says(swap, k, monkeypatch):
    """leak(): 1 - swap E[t] (1 - 1 / V) within 1 %; among the candidates 1 - swap E[t]
    (1 - 1 / V)^k; without swaps exactly 1; by times, falling; a fresh network knows nothing."""
    V, T = 50, 64
    x0 = torch.randint(V, (300, T), generator=generator(1))
    monkeypatch.setattr(sdd, "get_eval_rows", lambda split, cfg, n: (x0[:n], None))
    wide = dict(V=V, T=T, k=k, process="original", swap=swap)
    got = sdd.leak(network(**wide), config(**wide), "val", 300, 8)
    copy, among = 1 - swap / 2 * (1 - 1 / V), 1 - swap / 2 * (1 - 1 / V) ** k
    assert got["copy"] == pytest.approx(copy, rel=0.01)
    assert got["among"] == pytest.approx(among, rel=0.01)
    assert swap > 0 or got["copy"] == got["among"] == 1
    assert got["accuracy"] == pytest.approx(1 / V, abs=0.01) and got["bound"] == "none"
    for i, value in enumerate(got["copy_at"]):
        t = (i + 0.5) / 8
        assert value == pytest.approx(1 - swap * t * (1 - 1 / V), abs=0.02)
    assert len(got["copy_at"]) == len(got["accuracy_at"]) == len(got["among_at"]) == 8


def test_the_loss_of_the_original_process_is_cross_entropy_everywhere():
    """Of all positions, at evenly drawn times, blurred by t / 10 of the embeddings' spread."""
    wide = dict(V=7, T=5, k=3, process="original")
    model, cfg, seen = shaken(network(**wide)), config(**wide), []
    model.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    x0 = torch.randint(7, (100, 5), generator=generator(1))
    loss, _ = sdd.loss_fn(model, x0, cfg, generator(2))
    ((ids, logp, where, blur), out), = seen
    assert where is None and loss.item() == pytest.approx(
        F.cross_entropy(out.flatten(0, 1), x0.flatten()).item())
    t = (logp[:, 0, 1].exp() - 0.01) / (1 / 7 - 0.01) * 100
    assert (t - torch.arange(100) - 0.5).abs().max() < 0.52
    spread = blur.flatten(1).std(1) / (0.001 * t)
    assert torch.allclose(spread[10:], model.wte.weight.std(), rtol=0.25)
    assert not blur.requires_grad


def test_the_original_process_has_no_likelihood():
    cfg = config(process="original")
    with pytest.raises(ValueError, match="no likelihood"):
        sdd.nelbo(network(process="original"), torch.zeros(2, 2).long(), cfg, generator(1))


# ---- refusals


@pytest.mark.parametrize("bad", [
    dict(curriculum="1,x"), dict(curriculum="2,0"), dict(curriculum="4,-1"), dict(window=0.0),
    dict(window=1.1), dict(window=-0.1), dict(eval_samplers="token,euler"),
    dict(process="original", prompt="Once"), dict(process="original", infill="a ___"),
    dict(process="original", guidance=1.0), dict(state="belief", skip="state")], ids=str)
def test_what_cannot_work_is_refused_in_one_sentence(bad):
    with pytest.raises(ValueError) as error:
        config(**bad)
    text = str(error.value)
    assert "--" in text and "\n" not in text and ". " not in text and len(text) < 160


@pytest.mark.parametrize("good", [
    dict(window=1.0), dict(k=99), dict(curriculum="8"), dict(curriculum="1,2,4,8"),
    dict(swap=0.0), dict(swap=1.0), dict(eval_samplers="deterministic"),
    dict(process="original", k=4), dict(prompt="a", guidance=1.0), dict(state="belief"),
    dict(state="belief", skip="none"), dict(skip="state")], ids=str)
def test_what_can_work_is_not_refused(good):
    config(**good)


# ---- the network


def some_states(V=11, T=6, k=4, B=3, seed=9, open=None):
    """States of every kind, ids (B, T, K), logp (B, T, K + 1); open: how many of a row are."""
    g = generator(seed)
    s = torch.tensor([0.0, 4.0, SURE, 2.0, 7.0, 1.0])[:T].expand(B, T)
    s = torch.stack([row[torch.randperm(T, generator=g)] for row in s])
    if open is not None:
        for row, many in zip(s, open):
            row[:] = torch.tensor(([0.0, SURE] * T)[:T])
            row[:many] = 3.0
    x = torch.randint(V, (B, T), generator=g)
    return sdd.states(x, s, sdd.observe(x, s, V, g), k, V)


ATTENTION = pytest.mark.parametrize("attention", ["pooled", "full"])
SHAPES = dict(V=11, T=6, k=4, n_layer=2)


def reference(model, ids, logp, full):
    """The answer for one row, ids (T, K), logp (T, K + 1), slot after slot, by hand: a settled or
    unknown position is one slot, an open one its mean (pooled) or all its candidates and the rest
    (full), which attend with log p and are put together by softmax(read + log p)."""
    T, C = len(ids), model.wpe.embedding_dim
    slots, mean = [], torch.zeros(T, C)
    for i in range(T):
        p = logp[i].exp()
        if logp[i, 0] == 0:
            mean[i] = model.wte.weight[ids[i, 0]]
        elif logp[i, -1] < 0:
            emb = torch.cat((model.wte.weight[ids[i]], torch.zeros(1, C)))
            hidden = F.gelu(logp[i].clamp(min=-20)[:, None] / 10 @ model.logp_in.weight.T
                            + model.logp_in.bias)
            emb = emb + hidden @ model.logp_head.weight.T
            mean[i] = p @ emb
            slots += [(i, j, emb[j]) for j in range(len(emb))] if full else []
    for i in range(T):
        if all(i != own for own, _, _ in slots):
            slots.append((i, -1, mean[i]))
    own = torch.tensor([i for i, _, _ in slots])
    bias = torch.stack([logp[i, j] if j >= 0 else torch.tensor(0.0) for i, j, _ in slots])
    seen, near = F.pad(mean + model.wpe.weight[:T], (0, 0, 3, 3)), torch.zeros(T, C)
    for shift in range(7):
        near += seen[shift:shift + T] * model.near.weight[:, 0, shift]
    x = torch.stack([v for _, _, v in slots]) + (model.wpe.weight[:T] + near)[own]
    H, D = model.n_head, C // model.n_head
    angle = own[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
    turn = torch.polar(torch.ones_like(angle), angle)
    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).view(-1, 3, H, D).unbind(1)
        q, k = (y / (y.square().mean(2, keepdim=True) + 1e-12).sqrt() for y in (q, k))
        q, k = (torch.complex(*y.chunk(2, 2)) * turn[:, None] for y in (q, k))
        score = torch.einsum("qhd,khd->hqk", q, k.conj()).real / D ** 0.5 + bias
        y = torch.einsum("hqk,khd->qhd", score.softmax(2), v).flatten(1)
        x = x + y @ block.attn.proj.weight.T
        x = x + block.mlp(block.norm2(x))
    out = torch.zeros(T, C)
    for i in range(T):
        h = x[own == i]
        weight = (h @ model.read.weight[0] + bias[own == i]).softmax(0) if len(h) > 1 else \
            torch.ones(1)
        out[i] = weight @ h
    return 10 * ((model.norm(out) @ model.head.weight.T + model.head.bias) / 10).tanh()


@ATTENTION
def test_the_network_is_what_its_description_says(attention):
    """Against a version that goes through the slots of one row after the other."""
    model, (ids, logp) = shaken(network(attention=attention, **SHAPES)), some_states()
    with torch.no_grad():
        got = model(ids, logp)
        want = torch.stack([reference(model, *row, attention == "full") for row in zip(ids, logp)])
    assert got.shape == (3, 6, 11) and got.dtype == torch.float32 and got.std() > 0.3
    assert torch.allclose(got, want, atol=2e-4)
    model.head.weight.data *= 100
    assert sdd.CAP == 10 and 9.9 < model(ids, logp).abs().max() <= 10


def test_pooled_and_full_agree_where_nothing_is_open():
    """The same weights give the same logits when every position is settled or unknown; else not."""
    pooled, full = (shaken(network(attention=a, **SHAPES)) for a in ("pooled", "full"))
    assert full.load_state_dict(pooled.state_dict(), strict=False).missing_keys == ["read.weight"]
    for open, same in (([0, 0, 0], True), ([0, 2, 0], False)):
        ids, logp = some_states(open=open)
        one, two = pooled(ids, logp), full(ids, logp)
        assert all(torch.allclose(one[i], two[i], atol=1e-5) for i in (0, 2))
        assert torch.allclose(one, two, atol=1e-5) == same


@ATTENTION
@pytest.mark.parametrize("nothing", [-math.inf, -100.0])
def test_a_candidate_of_no_probability_has_no_influence(attention, nothing):
    """Whatever token it is, on any output; so K may grow without a change."""
    model, (ids, logp) = shaken(network(attention=attention, **SHAPES)), some_states()
    open = (logp[..., 0] < 0) & (logp[..., -1] < 0)
    rest = logp[..., -2:].logsumexp(2)
    logp = torch.cat((logp[..., :-2], torch.full((3, 6, 1), nothing),
                      torch.where(open, rest, logp[..., -1])[..., None]), 2)
    out, other = model(ids, logp), ids.clone()
    other[..., -1] = (other[..., -1] + 3) % 11
    assert torch.allclose(model(other, logp), out, atol=1e-5)
    less = model(ids[..., :-1], torch.cat((logp[..., :-2], logp[..., -1:]), 2))
    assert torch.allclose(less, out, atol=1e-5)
    more = torch.cat((logp[..., :-1], torch.full((3, 6, 5), nothing), logp[..., -1:]), 2)
    assert torch.allclose(model(F.pad(ids, (0, 5), value=2), more), out, atol=1e-5)
    logp[..., 0][open] -= 0.5  # but one that has some, has some
    assert (model(ids, logp) - out).abs().amax(2).min() > 1e-4


@ATTENTION
def test_the_order_of_candidates_does_not_matter(attention):
    model, (ids, logp) = shaken(network(attention=attention, **SHAPES)), some_states()
    out, order = model(ids, logp), torch.tensor([2, 0, 3, 1])
    open = ((logp[..., 0] < 0) & (logp[..., -1] < 0))[..., None]
    turned = torch.where(open, ids[..., order], ids)
    moved = torch.where(open, torch.cat((logp[..., order], logp[..., -1:]), 2), logp)
    assert torch.allclose(model(turned, moved), out, atol=1e-5)
    assert (model(turned, logp) - out).abs().max() > 1e-2


@ATTENTION
def test_what_is_not_shown_is_not_seen(attention):
    """Ids of unknown positions and those after the first of settled ones."""
    model, (ids, logp) = shaken(network(attention=attention, **SHAPES)), some_states()
    out, other = model(ids, logp), ids.clone()
    other[logp[..., -1] == 0] = 7
    settled = logp[..., 0] == 0
    other[..., 1:][settled] = 5
    assert settled.any() and not torch.equal(other, ids) and torch.equal(model(other, logp), out)
    other[..., 0][settled] = (other[..., 0][settled] + 1) % 11
    assert (model(other, logp) - out).abs().amax((1, 2)).min() > 1e-3


@ATTENTION
def test_every_position_sees_every_other_of_its_row_and_no_other_row(attention):
    """Rows have 4, 0, 1 and 6 open positions, and no padding of one leaks into another."""
    model = shaken(network(attention=attention, **SHAPES))
    ids, logp = some_states(B=4, open=[4, 0, 1, 6])
    out = model(ids, logp)
    for i in range(4):
        assert torch.allclose(model(ids[i:i + 1], logp[i:i + 1]), out[i:i + 1], atol=1e-5)
    turned = model(ids[[2, 0, 3, 1]], logp[[2, 0, 3, 1]])
    assert torch.allclose(turned, out[[2, 0, 3, 1]], atol=1e-5)
    for row, i in ((0, 0), (0, 5), (3, 2)):  # open, clean, open
        other = ids.clone()
        other[row, i, 0] = next(v for v in range(11) if v not in other[row, i])
        change = (model(other, logp) - out).abs().amax(2)
        rest = torch.arange(4) != row
        assert (change[row] > 1e-5).all() and change[rest].max() < 1e-5
    other = logp.clone()
    other[0, 1] = other[0, 3] = torch.tensor([-0.5, -2.0, -2.5, -4.0, -3.0])
    change = (model(ids, other) - out).abs().amax(2)
    assert (change[0] > 1e-5).all() and change[1:].max() < 1e-5


@ATTENTION
def test_where_selects_positions_of_the_answer(attention):
    model, (ids, logp) = shaken(network(attention=attention, **SHAPES)), some_states()
    where = torch.rand(3, 6, generator=generator(1)) < 0.4
    assert torch.allclose(model(ids, logp, where), model(ids, logp)[where], atol=1e-5)
    assert model(ids, logp, torch.zeros(3, 6).bool()).shape == (0, 11)


@ATTENTION
def test_blur_is_added_to_the_candidates_embeddings(attention):
    """As if every candidate were a token of another embedding; nothing else is blurred."""
    model, (ids, logp) = shaken(network(attention=attention, **SHAPES)), some_states()
    blur = 0.5 * torch.randn(*ids.shape, 16, generator=generator(2))
    out = model(ids, logp, None, blur)
    assert (out - model(ids, logp)).abs().amax(2).min() > 1e-4
    assert torch.allclose(model(ids, logp, None, 0 * blur), model(ids, logp), atol=1e-6)
    ids, logp = ids[:1, :, :2], logp[:1, :, [0, 1, 4]]
    open = (logp[..., 0] < 0) & (logp[..., -1] < 0)
    many, wide = int(open.sum()), network(attention=attention, **SHAPES | dict(V=11 + 12))
    state = model.state_dict()
    table = model.wte.weight[ids[open]] + blur[:1, :, :2][open]  # (many, 2, C)
    state["wte.weight"] = torch.cat((state["wte.weight"], table.flatten(0, 1),
                                     torch.zeros(12 - 2 * many, 16)))
    for name in ("head.weight", "head.bias"):
        state[name] = torch.cat((state[name], torch.zeros(12, *state[name].shape[1:])))
    wide.load_state_dict(state)
    other = ids.clone()
    other[open] = 11 + torch.arange(2 * many).view(many, 2)
    assert torch.allclose(wide(other, logp)[..., :11], model(ids, logp, None, blur[:1, :, :2]),
                          atol=1e-5)


@ATTENTION
def test_all_precisions_are_finite_forward_and_backward(attention):
    """s = 0, tiny, ordinary, just below SURE, SURE, in float32 and under bfloat16 autocast; both
    losses, the bounds, every gradient; log p to the network and the answer stay float32."""
    s = torch.tensor([[0.0, 1e-6, 2.0, 40.0, SURE - 1e-3, SURE]]).expand(3, 6)
    x0 = torch.arange(18).view(3, 6) % 11
    for cast in (False, True):
        model, total = shaken(network(attention=attention, **SHAPES)), 0.0
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            for skip, state in (("evidence", "evidence"), ("state", "evidence"),
                                ("none", "evidence"), ("evidence", "belief")):
                cfg = config(**SHAPES, window=0.5, skip=skip, state=state)
                z = sdd.observe(x0, s, 11, generator(1))
                out, own = sdd.predict(model, x0, s, z, s < SURE, cfg)
                assert out.dtype == own.dtype == torch.float32
                assert out.isfinite().all() and own.isfinite().all()
                total = total + F.cross_entropy(out, x0[s < SURE])
                for loss in ("ce", "elbo"):
                    some = dataclasses.replace(cfg, loss=loss)
                    total = total + sdd.loss_fn(model, x0, some, generator(1))[0]
                for mixture in (True, False):
                    assert sdd.nelbo_steps(model, x0, cfg, generator(1), 4,
                                           mixture).isfinite().all()
                assert sdd.nelbo(model, x0, cfg, generator(1))[0].isfinite().all()
        total.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name


def test_own_evidence_stays_exact_under_autocast():
    """(E6) where bfloat16 would lose whole nats."""
    V = 300
    model, cfg = network(V=V, T=4), config(V, 4, k=5, skip="state")
    x = torch.arange(12).view(3, 4)
    s = torch.linspace(1, 60, 12).view(3, 4)
    z = sdd.observe(x, s, V, generator(1))
    plain = sdd.predict(model, x, s, z, s > 0, cfg)
    with torch.autocast("cpu", torch.bfloat16):
        got = sdd.predict(model, x, s, z, s > 0, cfg)
    assert torch.equal(got[1], plain[1]) and torch.allclose(got[0], plain[0], atol=1e-3)
    assert plain[1].max() > 30


@pytest.mark.parametrize("kind", [dict(), dict(attention="full", loss="elbo"),
                                  dict(process="original", attention="full")], ids=str)
def test_every_parameter_learns_within_a_few_steps(kind):
    """No gate is closed behind another; every weight has exactly one optimizer."""
    wide = SHAPES | dict(window=0.5) | kind
    model, cfg = network(**wide), config(**wide, lr=1e-3)
    before = copy.deepcopy(model.state_dict())
    optimizers, g = sdd.make_optimizers(model, cfg), generator(1)
    x0 = torch.arange(6).expand(16, 6) % 11
    for _ in range(6):
        sdd.loss_fn(model, x0, cfg, g)[0].backward()
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name
    owned = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("kind", [dict(state="belief"), dict(attention="full", curriculum="1,3"),
                                  dict(loss="elbo", skip="state")], ids=str)
def test_a_batch_can_be_learned_by_heart(kind):
    """Three rows: the loss falls far, the bound to near ln 3, never far below, and samples are
    those rows."""
    x0 = torch.tensor([[1, 2, 3, 4], [6, 5, 4, 3], [9, 0, 10, 0]])
    wide = dict(V=11, T=4, k=3, window=0.3, n_embd=32, schedule="exponential", lr=1e-2, warmup=10,
                steps=130, sampling_steps=20) | kind
    model, cfg = network(**wide), config(**wide)
    optimizers, g, losses = sdd.make_optimizers(model, cfg), generator(1), []
    for step in range(cfg.steps):
        for group in [group for o in optimizers for group in o.param_groups]:
            group["lr"] = sdd.get_lr(step, cfg) * group["scale"]
        loss, _ = sdd.loss_fn(model, x0.repeat(12, 1), sdd.at_step(cfg, step), g)
        loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
    nats = sdd.nelbo(model, x0.repeat(60, 1), cfg, generator(2))[0]
    x, _ = sdd.sample(model, cfg, 60, generator(3))
    same = (x[:, None] == x0).all(2)
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert math.log(3) - 0.2 < nats.mean() < math.log(3) + 1.6  # of 9.6 at first
    assert same.any(1).float().mean() > 0.5 and same.any(0).all()  # by chance: 2e-4
