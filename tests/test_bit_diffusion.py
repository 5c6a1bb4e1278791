"""Diffusion by flipping bits: codes, schedules, clocks, channel, bridge, heads, bounds, losses, the
network, against Bayes' rule and enumeration. Expected figures are made in bit_tables.py or here."""
import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy import stats

import bit_diffusion
from bit_tables import (CLEAN, LOST, Oracle, bridge, chain_bound, chain_law, channel, cost,
                        dirichlet, entropy, level, marginals, numbers, odds_of, path, path_bound,
                        right, settings, width, words)
from tables import all_rows, generator, mean_and_se

SURE = bit_diffusion.SURE
SCHEDULES = ("quadratic", "cosine", "linear")
JOINT, THREE = dirichlet(4, 2, 3), dirichlet(3, 2, 5, 0.7)
HEADS = pytest.mark.parametrize("head", ["token", "bit"])


def config(V=4, T=2, **changes):
    return bit_diffusion.Config(**settings(V, T, **changes))


def network(seed=0, order=None, **changes):
    torch.manual_seed(seed)
    return bit_diffusion.Model(config(**changes), order)


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


def row_by_row(draws, truth, times, width=4.5):
    """Are the means of `times` draws for every row in turn their truths, and is the mean of all?"""
    draws = draws.view(len(truth), times).double()
    off, se = draws.mean(1) - truth, draws.std(1) / times ** 0.5
    return (off.abs() < (width + 1) * se + 1e-6).all() and \
        off.sum().abs() < width * se.square().sum().sqrt() + 1e-6


# ---- codes


@pytest.mark.parametrize("V", [2, 3, 28, 1000, 2049, 50257])
def test_codes_and_ids_are_each_others_inverse(V):
    """K = ceil(log2 V) bits of +-1, all codes distinct, whatever the order of the tokens; the n-th
    token of it has the digits of n, the highest first; codes of no token give V."""
    for seed, order in enumerate([None, torch.randperm(V, generator=generator(1)),
                                  torch.arange(V).flip(0)]):
        code = bit_diffusion.code_book(V, order)
        K = code.shape[1]
        assert code.shape[0] == V and 2 ** (K - 1) < V <= 2 ** K and (code.abs() == 1).all()
        assert torch.equal(bit_diffusion.ids_of(code, code), torch.arange(V))
        count = ((code > 0).long() * 2 ** torch.arange(K - 1, -1, -1)).sum(1)
        assert torch.equal(bit_diffusion.number(code), count)
        assert torch.equal(count[torch.arange(V) if order is None else order], torch.arange(V))
        for some in {V - 1, 1, V // 2}:
            v = some if order is None else int(order[some])
            digits = "".join("01"[int(b > 0)] for b in code[v])
            assert digits == format(some, f"0{K}b")
        unused = torch.arange(V, 2 ** K)
        bits = 2.0 * (unused[:, None] >> torch.arange(K - 1, -1, -1) & 1) - 1
        assert (bit_diffusion.ids_of(bits, code) == V).all()
        shape = code[torch.tensor([[0, 1], [1, V - 1]])]
        assert bit_diffusion.ids_of(shape, code).tolist() == [[0, 1], [1, V - 1]]


def toy_batch(split, cfg, g):
    """Rows of 24 that go round A B C D, where two tokens stand for each: neighbours tell which of
    the 8 tokens are alike. A's first token is the commonest, and so on."""
    assert split == "train"
    pairs = torch.tensor([[3, 6], [0, 5], [7, 1], [4, 2]])
    start = torch.randint(4, (cfg.batch_size, 1), generator=g)
    pick = (torch.rand(cfg.batch_size, 24, generator=g) < 0.3).long()
    return pairs[(start + torch.arange(24)) % 4, pick]


@pytest.mark.parametrize("kind", ["id", "random", "frequency", "semantic"])
def test_orders_are_permutations_that_a_seed_fixes(kind, monkeypatch):
    monkeypatch.setattr(bit_diffusion, "get_batch", toy_batch)
    for V in (8, 11):  # with 11, three tokens never occur
        one, two = (bit_diffusion.order_tokens(config(V, 24, code=kind)) for _ in range(2))
        assert torch.equal(one, two)
        assert one.sort().values.tolist() == list(range(V))
        other = bit_diffusion.order_tokens(config(V, 24, code=kind, seed=2))
        assert torch.equal(one, other) == (kind != "random")
        assert torch.equal(one, torch.arange(V)) == (kind == "id")
    model = network(V=11, T=24, code=kind, order=one)
    assert torch.equal(model.code, bit_diffusion.code_book(11, one))


def test_frequent_tokens_come_first(monkeypatch):
    """frequency: counts never rise along the order."""
    monkeypatch.setattr(bit_diffusion, "get_batch", toy_batch)
    order = bit_diffusion.order_tokens(config(11, 24, code="frequency"))
    rows = toy_batch("train", config(batch_size=4000), generator(0))
    count = rows.flatten().bincount(minlength=11)
    assert (count[order].diff() <= 0).all() and count[order[-3:]].sum() == 0
    assert set(order[:4].tolist()) == {3, 0, 7, 4} and order[-3:].tolist() == [8, 9, 10]


def test_tokens_with_like_neighbours_share_their_leading_bits(monkeypatch):
    """semantic: the two tokens of each class differ in the last bit alone."""
    monkeypatch.setattr(bit_diffusion, "get_batch", toy_batch)
    order = bit_diffusion.order_tokens(config(8, 24, code="semantic"))
    assert {frozenset(pair.tolist()) for pair in order.view(4, 2)} == \
        {frozenset(pair) for pair in ((3, 6), (0, 5), (7, 1), (4, 2))}


def test_both_neighbours_count_for_what_is_alike(monkeypatch):
    """semantic: rows are made of X A Y and X B X. A and B come after the same, and
    only what follows tells them apart."""
    def rows(split, cfg, g):
        pairs = torch.tensor([[3, 6], [0, 5], [7, 1], [4, 2]])  # X, A, B, Y
        three = torch.tensor([[0, 1, 3], [0, 2, 0]])
        kind = three[torch.randint(2, (cfg.batch_size, 8), generator=g)].flatten(1)
        return pairs[kind, (torch.rand(kind.shape, generator=g) < 0.2).long()]
    monkeypatch.setattr(bit_diffusion, "get_batch", rows)
    order = bit_diffusion.order_tokens(config(8, 24, code="semantic"))
    assert {frozenset(pair.tolist()) for pair in order.view(4, 2)} == \
        {frozenset(pair) for pair in ((3, 6), (0, 5), (7, 1), (4, 2))}


# ---- schedules and clocks


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_falls_from_sure_to_nothing_with_its_stated_slope(name):
    """(E1) 1 - a rises from 0 to 1 and lam falls from SURE to 0; lam = ln((1 + a) / (1 - a)); the
    stated derivatives are those of autograd."""
    t = torch.linspace(0, 1, 401, dtype=torch.float64).requires_grad_()
    lost, slope = (f(t) for f in bit_diffusion.SCHEDULES[name])
    assert lost[0] == 0 and lost[-1] == 1 and (lost.diff() > 0).all()
    grad, = torch.autograd.grad(lost.sum(), t)
    assert torch.allclose(slope + 0 * t, grad, atol=1e-12)
    want = torch.tensor([LOST[name](x) for x in t.tolist()]).double()
    assert torch.allclose(lost, want, atol=1e-12)
    tau, cfg = torch.zeros(401, 1), config(T=1, schedule=name)
    lam, fall = (y[:, 0] for y in bit_diffusion.levels(t.detach().float()[:, None], tau, cfg))
    assert lam[0] == SURE and lam[-1] == 0 and (lam.diff() < 0).all()
    own = t.detach().float().double()[1:-1]
    a = 1 - torch.tensor([LOST[name](x) for x in own.tolist()], dtype=torch.float64)
    assert torch.allclose(lam[1:-1].double(), ((1 + a) / (1 - a)).log(), rtol=1e-6)
    own.requires_grad_()
    log_odds = (2 / bit_diffusion.SCHEDULES[name][0](own) - 1).log()
    grad, = torch.autograd.grad(log_odds.sum(), own)
    assert torch.allclose(fall[1:-1], -grad, rtol=1e-9)
    assert fall[0] == 0 and fall[-1] == 0 and fall.isfinite().all()
    other = bit_diffusion.levels(torch.tensor([[0.3]]), tau[:1], config(T=1, schedule="linear"),
                                 name)[0]
    assert other.item() == pytest.approx(level(LOST[name](0.3)), rel=1e-5)


@pytest.mark.parametrize("window", [0.05, 0.2, 0.5, 1.0])
def test_every_position_goes_from_noise_to_token_in_its_window(window):
    """(E2) own time (t - tau) / w, clamped: lam 0 at t = 1, SURE at t = 0, on the way during a
    share w of the path; the slope is that of lam in t."""
    cfg = config(T=24, window=window)
    tau = bit_diffusion.clocks((50, 24), cfg, generator(1))
    assert tau.shape == (50, 24) and tau.min() >= 0 and tau.max() <= 1 - window + 1e-6
    before, busy, many = torch.full((50, 24), SURE), torch.zeros(50, 24), 400
    for t in (torch.arange(many) + 0.5) / many:
        lam, slope = bit_diffusion.levels(t.expand(50, 1), tau, cfg)
        own = ((t - tau) / window).double().clamp(0, 1)
        assert torch.allclose(lam.double(), (2 / own ** 2 - 1).log().clamp(0, SURE), atol=1e-4)
        way = (lam > 0) & (lam < SURE)
        assert (lam <= before).all() and torch.equal(way, slope > 0)
        want = 4 / (own * (2 - own ** 2)) / window
        assert torch.allclose(slope[way], want[way], rtol=1e-3)
        if window < 1:
            assert way.sum(1).max() <= min(24, 24 * window / (1 - window) + 1)
        before, busy = lam, busy + way.double() / many
    assert (busy - window).abs().max() <= 1.01 / many
    assert (bit_diffusion.levels(0.0, tau, cfg)[0] == SURE).all()
    assert bit_diffusion.levels(1.0, tau, cfg)[0].max() < 1e-5


def test_clocks_are_a_comb_in_random_order():
    """(E2) sorted, they are (1 - w) (rank + u) / T with one uniform u per row; every order of the
    positions is equally likely."""
    cfg = config(T=5, window=0.3)
    tau = bit_diffusion.clocks((8000, 5), cfg, generator(2)) / 0.7 * 5
    comb = tau.sort(1).values - torch.arange(5)
    assert (comb - comb[:, :1]).abs().max() < 1e-5 and 0 <= comb.min() and comb.max() < 1
    assert stats.kstest(comb[:, 0].numpy(), "uniform").pvalue > 1e-3
    rank = tau.argsort(1).argsort(1)
    orders = (rank[:, :4] * 5 ** torch.arange(4)).sum(1).unique(return_counts=True)[1]
    assert len(orders) == 120 and stats.chisquare(orders.numpy()).pvalue > 1e-3
    assert (bit_diffusion.clocks((30, 5), config(T=5, window=1.0), generator(3)) == 0).all()


def test_frozen_positions_are_always_clean_and_the_others_share_the_comb():
    """(E2) the comb of a row is over its free positions alone."""
    cfg = config(T=9, window=0.25)
    frozen = torch.rand(400, 9, generator=generator(4)) < 0.4
    frozen[0] = True
    tau = bit_diffusion.clocks((400, 9), cfg, generator(5), frozen)
    assert (tau[frozen] == torch.inf).all()
    for t in (0.0, 0.3, 0.9, 1.0):
        lam, slope = bit_diffusion.levels(t, tau, cfg)
        assert (lam[frozen] == SURE).all() and (slope[frozen] == 0).all()
        assert t < 1 or lam[~frozen].max() < 1e-5
    for row, keep in zip(tau, ~frozen):
        N = int(keep.sum())
        comb = row[keep].sort().values / 0.75 * max(N, 1) - torch.arange(N)
        assert N == 0 or 0 <= comb.min() and comb.max() < 1 and comb.max() - comb.min() < 1e-5


def test_deal_hands_out_the_same_clocks_highest_score_first():
    """The waiting positions keep their clocks as a set; the best begins next, at the latest tau."""
    g = generator(6)
    tau, waiting = torch.rand(300, 8, generator=g), torch.rand(300, 8, generator=g) < 0.6
    tau[~waiting & (torch.rand(300, 8, generator=g) < 0.3)] = torch.inf  # some are frozen
    score = torch.rand(300, 8, generator=g)
    dealt = bit_diffusion.deal(tau, waiting, score)
    assert torch.equal(dealt[~waiting], tau[~waiting])
    for row, old, mask, value in zip(dealt, tau, waiting, score):
        by_score = row[mask][value[mask].argsort(descending=True)]
        assert torch.equal(by_score, old[mask].sort(descending=True).values)


# ---- the channel and its bridge


def test_noise_flips_bits_as_often_as_stated():
    """(E1) P(flip) = (1 - a) / 2 = 1 / (1 + e^lam), within 4.5 standard errors for both signs of a
    bit; half of them at lam = 0; none at all at SURE; bits flip independently."""
    n = 40_000
    clean = torch.tensor([1.0, -1.0, 1.0, -1.0]).expand(n, 4)
    for lam in (0.0, 0.3, 1.0, 2.5, 6.0, SURE):
        noisy = bit_diffusion.noised(clean, torch.full((n,), lam), generator(int(10 * lam)))
        assert (noisy.abs() == 1).all()
        flips, p = (noisy != clean).double(), 1 / (1 + math.exp(lam))
        assert ((flips.mean(0) - p).abs() <= 4.5 * (p * (1 - p) / n) ** 0.5).all()
        assert lam < SURE or flips.sum() == 0
        both = (flips[:, 0] * flips[:, 1]).mean()
        assert abs(both - p * p) <= 4.5 * (p * p * (1 - p * p) / n) ** 0.5
    lam = torch.tensor([0.0, SURE, 3.0]).expand(n, 3)  # each position its own level
    flips = (bit_diffusion.noised(clean[:, :3, None], lam, generator(1)) != clean[:, :3, None])
    rates = flips.double().mean(0)[:, 0]
    assert abs(rates[0] - 0.5) < 0.0125 and rates[1] == 0
    assert abs(rates[2] - 1 / (1 + math.exp(3))) < 0.005


LEVELS = (0.0, 1e-6, 0.01, 0.5, 1.0, 2.7, 6.0, 12.0, 20.0, SURE)


def test_a_bridge_is_bayes_rule():
    """(E6) flip() against enumerated Bayes for all pairs of levels, in both directions of a bit;
    finite, a probability, exact at both ends: at SURE the bit becomes clean."""
    for lam_t, lam_s in itertools.combinations(LEVELS, 2):
        table = bridge(lam_t, lam_s)
        t, s = torch.tensor(lam_t), torch.tensor(lam_s)
        for y, b_t, b_0 in ((1, 0, 0), (1, 1, 1), (-1, 0, 1), (-1, 1, 0)):
            f = bit_diffusion.flip(t, s, y)
            assert f.dtype == torch.float64 and f.isfinite() and 0 <= f <= 1
            # 1 - a_t holds few digits at large lam_t: its error is 1e-16 / (1 - a_t)
            close = 1e-9 + 1e-15 * math.exp(lam_t)
            assert f.item() == pytest.approx(table[b_t, b_0, 1 - b_t].item(), rel=1e-5, abs=close)
            if lam_s == SURE:
                assert f.item() == pytest.approx(float(y < 0), abs=1e-8)
    y = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    many = bit_diffusion.flip(torch.tensor([[0.5], [1.0]]), torch.tensor([[2.0], [SURE]]), y)
    assert many[0].tolist() == pytest.approx([bridge(0.5, 2)[1, b, 0].item() for b in (1, 0)])
    assert many[1].tolist() == pytest.approx([1, 0], abs=1e-9)


def test_a_bridge_composes_with_the_channel():
    """(E6) noise to s, then its bridge backwards, is noise to s: sum over b_t of q(b_t | b_0)
    q(b_s | b_t, b_0) = q(b_s | b_0); and two bridges make one; a_(t|s) a_s = a_t."""
    for lam_t, lam_u, lam_s in itertools.combinations((0.0, 0.4, 1.5, 4.0, 8.0), 3):
        t, u, s = (torch.tensor(x, dtype=torch.float64) for x in (lam_t, lam_u, lam_s))
        up = {y: bit_diffusion.flip(t, s, y).item() for y in (1, -1)}
        wrong = (1 - right(lam_t)) * (1 - up[-1]) + right(lam_t) * up[1]
        assert wrong == pytest.approx(1 - right(lam_s), abs=1e-12)
        for y in (1, -1):
            first = bit_diffusion.flip(t, u, y).item()
            stay, turn = (bit_diffusion.flip(u, s, z).item() for z in (y, -y))
            assert (1 - first) * stay + first * (1 - turn) == pytest.approx(up[y], abs=1e-9)
            r = math.tanh(lam_t / 2) / math.tanh(lam_s / 2)
        both = right(lam_t) * (1 - up[1])  # b_s and b_t both right: q(b_t | b_s) keeps (1 + r) / 2
        assert both / right(lam_s) == pytest.approx((1 + r) / 2, abs=1e-9)


# ---- evidence and heads


def law_of(out, K, V=None):
    """The law of words (n, 2^K) that an answer (n, K) or (n, R, K + 1) of a bit head stands for."""
    if out.dim() == 2:
        out = torch.cat((out, 0 * out[:, :1]), 1)[:, None]
    out, law = out.double(), torch.zeros(len(out), 2 ** K).double()
    for r, n in itertools.product(range(out.shape[1]), range(2 ** K)):
        p = out[..., -1].softmax(1)[:, r].clone()
        for k in range(K):
            p *= (out[:, r, k] * (1 if n >> (K - 1 - k) & 1 else -1)).sigmoid()
        law[:, n] += p
    return law


@pytest.mark.parametrize("V", [3, 8, 11])
def test_own_bits_are_added_by_bayes_rule(V):
    """(E3) (E4) update() of a uniform answer is the enumerated posterior of a token; of any answer,
    tokens, bits or mixed products, it is law times likelihood; -lam takes it back."""
    order = torch.randperm(V, generator=generator(2))
    K, number = width(V), numbers(V, order.tolist())
    bits, n = words(K), 2 ** K
    for lam in (0.0, 1e-6, 0.3, 2.0, 7.0, 20.0):
        lams, q = torch.full((n,), lam), channel(K, lam)  # [clean, noisy]
        for scale in (0.0, 2.0):
            prior = scale * torch.randn(n, V, generator=generator(3))
            model = network(V=V, order=order)
            got = bit_diffusion.update(model, prior, bits.float(), lams)
            want = prior.double().softmax(1) * q[number].T
            assert torch.allclose(got.double().softmax(1), want / want.sum(1, keepdim=True),
                                  atol=1e-5)
            back = bit_diffusion.update(model, got, bits.float(), -lams)
            assert torch.allclose(back, prior, atol=1e-4)
            for parts in (1, 2, 4):
                prior = scale * torch.randn(n, *(K,) if parts == 1 else (parts, K + 1),
                                            generator=generator(4))
                model = network(V=V, order=order, head="bit", parts=parts)
                got = bit_diffusion.update(model, prior, bits.float(), lams)
                want = law_of(prior, K) * q.T
                assert torch.allclose(law_of(got, K), want / want.sum(1, keepdim=True), atol=1e-5)
                back = bit_diffusion.update(model, got, bits.float(), -lams)
                assert torch.allclose(back, prior, atol=1e-4)


@pytest.mark.parametrize("head,parts", [("token", 1), ("bit", 1), ("bit", 4)])
def test_own_evidence_enters_the_logits_exactly(head, parts):
    """(E4) with a zero head the answer is Bayes' rule for one position; skip adds evidence, no
    more."""
    bits = torch.randn(5, 6, 3, generator=generator(1)).sign()
    lam = torch.linspace(0, 9, 30).view(5, 6)
    wide = dict(V=7, T=6, head=head, parts=parts)
    model = network(**wide)
    seen = ((bits > 0).long() * torch.tensor([4, 2, 1])).sum(2).flatten()
    q = torch.stack([channel(3, x)[:, n] for x, n in zip(lam.flatten(), seen)])  # (30, clean word)
    out = model(bits, lam).flatten(0, 1)
    if head == "token":
        q = q[:, :7]
        got = out.double().softmax(1)
    else:
        got = law_of(out, 3)
    assert torch.allclose(got, q / q.sum(1, keepdim=True), atol=1e-5)
    shaken(model)
    bare = network(skip=False, **wide)
    bare.load_state_dict(model.state_dict())
    out, plain = model(bits, lam), bare(bits, lam)
    assert plain.std() > 0.1
    if parts == 1:
        own = lam[..., None] * bits if head == "bit" else \
            0.5 * lam[..., None] * bits @ model.code.T
        assert torch.allclose(out - plain, own, atol=1e-4)
    else:
        assert torch.allclose((out - plain)[..., :-1], (lam[..., None] * bits)[:, :, None],
                              atol=1e-4)


@pytest.mark.parametrize("parts", [2, 4])
def test_the_products_of_a_fresh_bit_head_differ_and_mix_to_nothing(parts):
    """(E4) every one leans to leading bits of its own, so that they learn apart; the mixture of
    all is uniform."""
    model = network(V=8, head="bit", parts=parts)
    out = model(words(3).float()[None, :2], torch.zeros(1, 2)).flatten(0, 1)
    assert torch.allclose(law_of(out, 3), torch.full((2, 8), 1 / 8).double(), atol=1e-6)
    lean = out[0, :, :-1].detach()
    assert len({tuple(row.tolist()) for row in lean.sign()}) == parts
    assert (lean.abs().amax(1) > 0.5).all()
    x0, cfg = torch.randint(8, (9, 2), generator=generator(1)), config(V=8, head="bit", parts=parts)
    bit_diffusion.loss_fn(model, x0, cfg, generator(2))[0].backward()
    grad = model.head.weight.grad.view(parts, 4, -1)
    assert all((p - q).abs().max() > 1e-4 for p, q in itertools.combinations(grad, 2))


def test_evidence_stays_float32_under_autocast():
    """(E3) where bfloat16 would lose whole nats."""
    for head, parts in (("token", 1), ("bit", 1), ("bit", 2)):
        model = network(V=1000, head=head, parts=parts)
        bits = torch.randn(20, 2, 10, generator=generator(1)).sign()
        lam = torch.linspace(0, 39, 40).view(20, 2)
        zero = torch.zeros(20, 2, *((1000,) if head == "token" else (10,) if parts == 1
                                    else (2, 11)))
        plain = bit_diffusion.update(model, zero, bits, lam)
        with torch.autocast("cpu", torch.bfloat16):
            got = bit_diffusion.update(model, zero, bits, lam)
            assert torch.equal(got, plain) and plain.dtype == torch.float32
            low = bit_diffusion.update(model, zero.bfloat16(), bits, lam)
            assert low.dtype == torch.float32 and torch.equal(low, plain)
            assert model(bits, lam).dtype == torch.float32
        assert plain.max() > 30


def test_log_odds_of_bits_are_sums_even_when_errors_are_rare():
    """(E5) the token head's bits, and those of mixed products, against enumerated marginals; a
    wrong bit of probability 1e-12 keeps its digits; of a bit head they are the answer itself."""
    for V in (3, 11):
        order = torch.randperm(V, generator=generator(3))
        model, code = network(V=V, order=order), words(width(V))[numbers(V, order.tolist())]
        out = 4 * torch.randn(50, V, generator=generator(4))
        got = bit_diffusion.bit_logits(model, out)
        assert got.dtype == torch.float64
        assert torch.allclose(got, odds_of(out.double().softmax(1), code), rtol=1e-9)
        K, out = width(V), 3 * torch.randn(50, 4, width(V) + 1, generator=generator(5))
        got = bit_diffusion.bit_logits(network(V=V, head="bit", parts=4), out)
        assert got.dtype == torch.float64
        assert torch.allclose(got, odds_of(law_of(out, K), words(K)), rtol=1e-9)
    tiny = math.log(1e-12)
    out = torch.tensor([[0.0, tiny, tiny - 2, tiny - 5]])
    got = bit_diffusion.bit_logits(network(V=4), out)
    z = out[0].double().exp()
    want = torch.stack([(z[0] + z[1]) / (z[2] + z[3]), (z[0] + z[2]) / (z[1] + z[3])]).log()
    assert torch.allclose(-got[0], want, atol=1e-9)
    out = torch.tensor([[[28.0, 1.0, 0.5], [27.0, -1.0, -0.5]]])
    got = bit_diffusion.bit_logits(network(V=4, head="bit", parts=2), out)
    w = torch.tensor([0.5, -0.5]).double().softmax(0)
    low = (w * (-torch.tensor([28.0, 27.0]).double()).sigmoid()).sum()
    assert got[0, 0].item() == pytest.approx(-(low / (1 - low)).log().item(), abs=1e-9)
    bits = torch.randn(9, 2, generator=generator(5))
    same = bit_diffusion.bit_logits(network(V=4, head="bit"), bits)
    assert torch.equal(same, bits.double())


def test_cross_entropy_is_that_of_tokens_or_of_their_codes():
    """-log p of a token, of all bits of its code together, of the code under mixed products."""
    g = generator(8)
    order = torch.randperm(11, generator=g)
    number = numbers(11, order.tolist())
    x0, tokens = torch.randint(11, (30,), generator=g), torch.randn(30, 11, generator=g)
    got = bit_diffusion.cross_entropy(network(V=11), tokens, x0)
    assert torch.allclose(got, -tokens.log_softmax(1)[torch.arange(30), x0], atol=1e-6)
    for parts in (1, 2, 4):
        out = 2 * torch.randn(30, *(4,) if parts == 1 else (parts, 5), generator=g)
        model = network(V=11, head="bit", parts=parts, order=order)
        want = -law_of(out, 4)[torch.arange(30), number[x0]].log()
        assert torch.allclose(bit_diffusion.cross_entropy(model, out, x0).double(), want, atol=1e-5)
        odds, weight = bit_diffusion.mixture(out)
        assert odds.shape == (30, parts, 4) and torch.allclose(weight.exp().sum(1), torch.ones(30))


def test_the_likeliest_token_and_its_probability():
    """Of a token head; of a bit head the signs of the likeliest product's bits; V for no token."""
    order = torch.tensor([2, 0, 1])
    model, number = network(V=3, order=order), numbers(3, order.tolist())
    out = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    ids, p = bit_diffusion.best_token(model, out)
    assert ids.tolist() == [1, 0] and torch.allclose(p, out.softmax(1).amax(1))
    out = 2 * torch.randn(60, 2, generator=generator(1))
    ids, p = bit_diffusion.best_token(network(V=3, head="bit", order=order), out)
    law = law_of(out, 2)
    assert torch.allclose(p.double(), law.amax(1), atol=1e-6)
    back = torch.tensor([*number.argsort().tolist(), 3])
    assert torch.equal(ids, back[law.argmax(1)]) and (ids == 3).any()
    out = torch.tensor([[[9.0, -9.0, 0.0], [-1.0, 1.0, 0.5]]])  # the second is likelier, yet vague
    ids, p = bit_diffusion.best_token(network(V=3, head="bit", parts=2, order=order), out)
    assert ids.item() == 1  # word 2 of the first product
    assert p.item() == pytest.approx(1 / (1 + math.exp(0.5)) / (1 + math.exp(-9)) ** 2, rel=1e-5)


# ---- the bound of a fresh network (init identity)


FRESH = [dict(V=2, window=1.0), dict(V=3, window=0.3), dict(V=28, window=1.0, input="bit"),
         dict(V=28, window=0.05, input="raw", cond="add"),
         dict(V=1000, window=0.3, input="byte", cond="add"),
         dict(V=4, window=1.0, schedule="linear"),
         dict(V=5, window=0.3, schedule="cosine")]


@pytest.mark.parametrize("head,parts", [("token", 1), ("bit", 1), ("bit", 2)])
@pytest.mark.parametrize("kind", FRESH, ids=lambda k: " ".join(map(str, k.values())))
def test_a_fresh_network_pays_ln_v_or_k_ln_2(kind, head, parts):
    """(E8) zero head: T ln V, or T K ln 2 for a bit head, whatever the tokens; every constant,
    weight, and factor of the bound is in this figure."""
    T, V, wide = 12, kind["V"], dict(head=head, parts=parts) | kind
    cfg, model = config(T=T, **wide), network(T=T, **wide)
    x0 = torch.randint(V, (256, T), generator=generator(1))
    nats, info = bit_diffusion.nelbo(model, x0, cfg, generator(2), 8)
    truth = T * (math.log(V) if head == "token" else width(V) * math.log(2))
    assert nats.shape == (256,) and nats.dtype == torch.float64 and close(nats, truth, 4)
    assert nats.std() < (2.5 if kind.get("schedule") != "linear" else 9) * truth / T ** 0.5
    assert info["forwards"] == 8 and info["lam"].shape == info["cost"].shape
    assert (info["cost"] >= -1e-9).all() and (info["lam"] > 0).all()


@pytest.mark.parametrize("V", [3, 4, 28])
def test_steps_of_a_fresh_network_pay_the_same(V):
    """(E9) exact posteriors of independent uniform tokens, or codes: T ln V for whole tokens, T K
    ln 2 for a mixture's products; bits apart: T K ln 2 less what redrawing codes of no token gains
    at the end, in a single step all of it."""
    T, K = 6, width(V)
    x0 = torch.randint(V, (256, T), generator=generator(1))
    for head, parts, joint in (("token", 1, True), ("bit", 1, True), ("bit", 4, True),
                               ("bit", 1, False), ("bit", 2, False), ("token", 1, False)):
        for window, steps in ((1.0, 4), (0.3, 7), (1.0, 1)):
            cfg, model = (f(V=V, T=T, head=head, parts=parts, window=window)
                          for f in (config, network))
            nats = bit_diffusion.nelbo_steps(model, x0, cfg, generator(2), steps, joint)
            if joint or V == 4:
                truth = T * (math.log(V) if head == "token" else K * math.log(2))
                assert close(nats, truth, 4)
            elif head == "bit":
                assert nats.mean() < T * K * math.log(2) - 0.05
                if steps == 1:
                    assert torch.allclose(nats, torch.full_like(nats, T * math.log(V)), atol=1e-4)


def test_a_fresh_network_biased_to_frequencies_pays_their_cross_entropy():
    """(E8) (E9) head bias log p: -log p(x0) for every row of tokens, as the exact posterior of
    independent tokens; window and schedule do not matter."""
    p = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    x0 = torch.multinomial(p, 512 * 6, True, generator=generator(1)).view(512, 6)
    for window, schedule in ((1.0, "linear"), (0.3, "quadratic"), (0.5, "cosine")):
        cfg = config(V=5, T=6, window=window, schedule=schedule)
        model = network(V=5, T=6, window=window)
        model.head.bias.data = p.log()
        truth = -p.log()[x0].sum(1).double()
        assert close(bit_diffusion.nelbo(model, x0, cfg, generator(2))[0] - truth, 0, 4)
        steps = bit_diffusion.nelbo_steps(model, x0, cfg, generator(3), 5)
        assert close(steps - truth, 0, 4)


# ---- the bound of exact and of perturbed posteriors


PROBLEMS = [(4, 2), (3, 2), (5, 2), (3, 3), (2, 3)]


@HEADS
@pytest.mark.parametrize("V,T", PROBLEMS, ids=str)
def test_the_bound_of_exact_posteriors_is_the_entropy(V, T, head):
    """(E8) the script's density by Gauss-Legendre quadrature over all bit strings: -log p(x0) for
    every row to 1e-5, with a code of no token (V = 3, 5) too; and more with the plug-in's error,
    the posterior taken for what others say."""
    joint, nodes = 0.7 * dirichlet(V, T, V + T, 1.0) + 0.3 / V ** T, 60
    model = Oracle(joint, V, T, head)
    state = words(T * model.K).view(-1, T, model.K)
    clean = words(model.K)[model.rows]  # (R, T, K)
    R, S, total, worse = len(clean), len(state), 0.0, 0.0
    node, weight = map(torch.from_numpy, np.polynomial.legendre.leggauss(nodes))
    flat = [y.expand(R, S, T, model.K).reshape(-1, model.K) for y in (state, clean[:, None])]
    for u, w in zip((node + 1) / 2, weight / 2):
        lam = level(u * u)
        q = F.logsigmoid(lam * (state * clean[:, None])).sum((2, 3)).exp()  # (R, S)
        out = model.answer(state, torch.full((S, T), lam).double()).flatten(0, 1)
        odds = bit_diffusion.bit_logits(model, out).view(S, T, -1)
        for wrong in (False, True):
            some = odds + wrong * lam * state
            some = some.expand(R, S, T, model.K).reshape(-1, model.K)
            nats = bit_diffusion.density(some, *flat, torch.full((R * S * T,), lam))
            nats = (q * nats.view(R, S, T).sum(2)).sum(1) * 4 / (u * (2 - u * u)) * w
            total, worse = total + nats * (not wrong), worse + nats * wrong
    assert (total + joint.log()).abs().max() < 1e-5
    assert (joint * total).sum().item() == pytest.approx(entropy(joint), abs=1e-6)
    assert (joint * worse).sum() > entropy(joint) + 0.05


def test_the_density_is_the_divergence_of_two_flip_rates():
    """(E8) against its formula in ordinary arithmetic, and 0 only where both agree; finite at both
    ends of lam and for sure answers."""
    g = generator(1)
    lam, odds = 6 * torch.rand(200, generator=g).double(), 3 * torch.randn(200, 3, generator=g)
    bits, clean = (torch.randn(200, 3, generator=g).sign() for _ in range(2))
    want = torch.zeros(200).double()
    for k in range(3):
        m = (bits[:, k] * odds[:, k].double()).sigmoid()
        s, s_hat = (-lam * bits[:, k] * clean[:, k]).exp(), m * (-lam).exp() + (1 - m) * lam.exp()
        want += (s_hat - s + s * (s / s_hat).log()) / (2 * lam.sinh())
    got = bit_diffusion.density(odds.double(), bits, clean, lam)
    assert torch.allclose(got, want, rtol=1e-8, atol=1e-12) and (got >= 0).all()
    sure = bit_diffusion.density(60 * clean.double(), bits, clean, lam)
    assert sure.abs().max() < 1e-6  # the network knows the clean bits: nothing to pay
    for value in (1e-6, SURE - 1e-3):
        for odd in (-SURE, 0.0, SURE):
            ends = bit_diffusion.density(torch.full((8, 1), odd).double(),
                                         words(3)[:, :1], words(3)[:, 1:2], torch.full((8,), value))
            assert ends.isfinite().all() and (ends > -1e-6).all()


TILTED = [(head, window, schedule) for head in ("token", "bit", "mix") for window, schedule in
          ((1.0, "quadratic"), (1.0, "linear"), (0.3, "quadratic"), (0.6, "cosine"))]


@pytest.mark.parametrize("head,window,schedule", TILTED, ids=str)
def test_the_estimate_of_the_bound_is_unbiased(head, window, schedule):
    """(E2) (E8) nelbo() of a network that errs, against quadrature for every row, within 4.5
    standard errors; more than one draw and a single one."""
    model, cfg = Oracle(THREE, 3, 2, head, 0.7), config(3, 2, window=window, schedule=schedule)
    truth, times = path_bound(model, window, schedule), 800
    x0 = all_rows(3, 2).repeat_interleave(times, 0)
    assert (truth > -THREE.log() + 0.005).any()
    for seed, draws in ((1, 1), (2, 4)):
        nats, info = bit_diffusion.nelbo(model, x0, cfg, generator(seed), draws)
        assert row_by_row(nats, truth, times)
        assert nats.std() > 0


@HEADS
def test_the_estimate_of_an_exact_posterior_is_the_entropy(head):
    """(E2) (E8) for every window and schedule, as the path does not matter: -log p of every row;
    the comb of draws is less noisy than single draws."""
    x0 = all_rows(3, 2).repeat_interleave(400, 0)
    for window, schedule in itertools.product((1.0, 0.3), SCHEDULES):
        model, cfg = Oracle(THREE, 3, 2, head), config(3, 2, window=window, schedule=schedule)
        nats, _ = bit_diffusion.nelbo(model, x0, cfg, generator(3), 4)
        assert row_by_row(nats, -THREE.log(), 400)


@pytest.mark.parametrize("window", [1.0, 0.4])
def test_with_one_time_for_all_the_schedule_of_the_bound_is_quadratic(window):
    """(E8) w = 1: the same estimate for every schedule, draw by draw; else the schedule is that of
    the Config."""
    x0, model = all_rows(4, 2), Oracle(JOINT, 4, 2, tilt=0.7)
    one, two = (bit_diffusion.nelbo(model, x0, config(window=window, schedule=s), generator(1))[0]
                for s in ("quadratic", "linear"))
    assert torch.equal(one, two) == (window == 1)
    model = Oracle(THREE, 3, 2, tilt=0.7)
    assert (path_bound(model, 1.0, "linear") - path_bound(model)).abs().max() < 1e-3


@HEADS
def test_a_bound_given_some_tokens_is_that_of_the_others(head):
    """(E2) (E8) `frozen`: -log p(others | given); a row that is all given costs nothing."""
    model, x0 = Oracle(THREE, 3, 2, head), all_rows(3, 2)
    given = THREE.view(3, 3).sum(1)[x0[:, 0]]
    for window in (1.0, 0.4):
        cfg, times = config(3, 2, window=window), 600
        rows = x0.repeat_interleave(times, 0)
        frozen = torch.tensor([True, False]).expand(len(rows), 2)
        nats, _ = bit_diffusion.nelbo(model, rows, cfg, generator(4), 4, frozen)
        assert row_by_row(nats, (given / THREE).log(), times)
        none, _ = bit_diffusion.nelbo(model, x0, cfg, generator(4), 4, torch.ones(9, 2).bool())
        assert (none == 0).all()
    assert all(torch.equal(b[:, 0], model.code[r[:, 0]]) for b, r in
               zip([c[0] for c in model.calls[:1]], [rows[:64]]))


# ---- the bounds of finitely many steps


STEPS = [("token", True), ("token", False), ("bit", False), ("bit", True), ("mix", True),
         ("mix", False)]


@pytest.mark.parametrize("head,joint", STEPS, ids=str)
def test_the_bound_of_a_step_is_unbiased(head, joint, monkeypatch):
    """(E9) nelbo_steps of a network that errs against enumeration of all bit strings, for every
    row: synchronous and with clocks, few steps and more, V = 3 of 4 codes and all of them. Products
    of a mixture are charged for codes of no token, whose redrawing only adds to p(x0)."""
    kind, invalid = ("token", "none") if joint else ("bit", "project")
    smooth, times = 0.8 * JOINT + 0.2 / 16, 500
    for law, V, steps, window, schedule in (
            (THREE, 3, 1, 1.0, "quadratic"), (THREE, 3, 3, 1.0, "linear"),
            (THREE, 3, 5, 0.4, "quadratic"), (THREE, 3, 7, 0.7, "cosine"),
            (smooth, 4, 4, 1.0, "quadratic")):
        tau = [(1 - window) * x for x in (0.35, 0.85)]
        monkeypatch.setattr(bit_diffusion, "clocks", lambda shape, *_: torch.tensor(tau).expand(
            shape))
        model = Oracle(law, V, 2, head, 0.6)
        truth = chain_bound(model, path(steps, 2, tau, window, schedule), kind, invalid)
        nats = bit_diffusion.nelbo_steps(
            model, all_rows(V, 2).repeat_interleave(times, 0),
            config(V, 2, window=window, schedule=schedule), generator(steps), steps, joint)
        assert row_by_row(nats, truth, times)


def test_bounds_of_more_steps_are_tighter_and_end_at_the_entropy():
    """(E9) exact posteriors: bits drawn apart cost the same from either head (A = B), at least as
    much as whole tokens (C); all fall with the steps, towards H, never below. Their exact means are
    those that the test above ties nelbo_steps to."""
    token, bit, H = Oracle(JOINT, 4, 2), Oracle(JOINT, 4, 2, "bit"), entropy(JOINT)
    last = [math.inf] * 2
    for steps in (1, 2, 4, 16, 64):
        lams = path(steps, 2, schedule="linear")
        A, B, C = ((JOINT * chain_bound(m, lams, kind)).sum().item()
                   for m, kind in ((bit, "bit"), (token, "bit"), (token, "token")))
        assert A == pytest.approx(B, abs=1e-9) and H < C < A
        assert A < last[0] and C < last[1]
        last = [A, C]
        if steps == 1:
            p = marginals(JOINT, 4, 2)
            assert C == pytest.approx(torch.special.entr(p).sum().item(), abs=1e-9)
            odds = odds_of(p, bit.exact).sigmoid()
            each = torch.special.entr(odds).sum() + torch.special.entr(1 - odds).sum()
            assert A == pytest.approx(each.item(), abs=1e-9)
    assert last[0] < H + 0.02


def test_both_heads_pay_the_same_for_the_same_bits():
    """(E9) A = B draw by draw: nelbo_steps of the token head, its bits drawn apart, and of a bit
    head with the same marginals, under the same noise."""
    x0 = all_rows(4, 2).repeat_interleave(20, 0)
    for window in (1.0, 0.4):
        one, two = (bit_diffusion.nelbo_steps(Oracle(JOINT, 4, 2, head), x0, config(window=window),
                                              generator(1), 6, False) for head in ("token", "bit"))
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind,head", [("token", "token"), ("bit", "bit"), ("bit", "token"),
                                       ("token", "mix"), ("bit", "mix")])
def test_the_entropy_the_likelihood_and_the_bound_are_in_this_order(kind, head):
    """(E9) H <= -E log p of the chain, exact by products of matrices, <= its bound, for exact and
    perturbed posteriors; codes of no token are redrawn in both."""
    for law, V in ((JOINT, 4), (THREE, 3)):
        H = entropy(law)
        for tilt, steps in itertools.product((0.0, 0.6), (1, 4, 16)):
            model, lams = Oracle(law, V, 2, head, tilt), path(steps, 2)
            rows, _ = chain_law(model, lams, kind)
            assert rows.sum().item() == pytest.approx(1)
            bound = chain_bound(model, lams, kind, "none" if head == "mix" else "project")
            exact, bound = cost(law, rows), (law * bound).sum().item()
            assert H - 1e-9 <= exact <= bound + 1e-9
            assert steps == 1 or bound > exact + 1e-4


def test_the_expected_bit_in_bayes_formula_never_gets_there():
    """(E7) the popular plug-in counts a noisy bit twice: with exact posteriors its chain stays away
    from the data law however many steps it takes, while the mixture of bridges arrives."""
    model, H = Oracle(JOINT, 4, 2, "bit"), entropy(JOINT)
    gap = {}
    for kind, steps in itertools.product(("bit", "plug-in"), (1, 16, 64, 128)):
        gap[kind, steps] = cost(JOINT, chain_law(model, path(steps, 2), kind)[0]) - H
    assert gap["bit", 1] == pytest.approx(gap["plug-in", 1])
    assert gap["bit", 64] < 0.01 and gap["bit", 128] < 0.5 * gap["bit", 64]
    assert min(gap["plug-in", n] for n in (16, 64, 128)) > 0.05
    assert gap["plug-in", 128] > 0.9 * gap["plug-in", 64]


# ---- training


class Recorder(nn.Module):
    """Wraps a model and keeps what it was asked and what it said."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, []
        self.code, self.head_kind, self.parts = model.code, model.head_kind, model.parts

    def forward(self, bits, lam, where=None):
        out = self.model(bits, lam, where)
        self.calls.append((bits, lam, where, out))
        return out


@HEADS
@pytest.mark.parametrize("window,prefix", [(1.0, 0.0), (0.2, 0.0), (0.4, 0.7)])
def test_the_ce_loss_is_a_mean_of_means(head, window, prefix):
    """Cross-entropy where lam < SURE, averaged in each row, then over rows that have any; the noise
    is that of the levels; clean positions and prefixes are seen clean."""
    wide = dict(V=11, T=9, head=head, window=window, prefix=prefix)
    model, cfg = Recorder(shaken(network(**wide))), config(loss="ce", **wide)
    x0 = torch.randint(11, (200, 9), generator=generator(1))
    loss, info = bit_diffusion.loss_fn(model, x0, cfg, generator(2))
    (bits, lam, where, out), = model.calls
    assert torch.equal(where, lam < SURE) and torch.equal(bits[~where], model.code[x0][~where])
    cost = torch.zeros(200, 9)
    if head == "token":
        cost[where] = F.cross_entropy(out, x0[where], reduction="none")
    else:
        goal = (model.code[x0[where]] > 0).float()
        cost[where] = F.binary_cross_entropy_with_logits(out, goal, reduction="none").sum(1)
    rows = [row[w].mean() for row, w in zip(cost, where) if w.any()]
    assert loss.item() == pytest.approx((sum(rows) / len(rows)).item(), rel=1e-4)
    assert info["unsettled"] == pytest.approx(where.sum(1).float().mean().item())
    flips = (bits != model.code[x0])[where].double()
    p = 1 / (1 + lam[where].double().exp())[:, None].expand_as(flips)
    assert abs((flips - p).sum()) < 4.5 * (p * (1 - p)).sum().sqrt()
    if window == 1 and not prefix:  # evenly drawn times: one row in every 200th
        t = (2 / (lam[:, 0].double().exp() + 1)).sqrt()
        assert (t * 200 - torch.arange(200) - 0.5).abs().max() < 0.51
    clean = (lam == SURE).int().cumprod(1).sum(1)
    if prefix:  # a share of rows begin clean, by a uniform length
        whole = (clean > 0).double().mean()
        assert 0.45 < whole and (lam[:, -1] < SURE).double().mean() > 0.5


def test_a_prefix_is_as_long_and_as_frequent_as_stated(monkeypatch):
    """floor(T u) first positions, in a share `prefix` of the rows; never the whole row."""
    seen, clocks = [], bit_diffusion.clocks
    monkeypatch.setattr(bit_diffusion, "clocks", lambda shape, cfg, g, frozen:
                        seen.append(frozen) or clocks(shape, cfg, g, frozen))
    x0 = torch.randint(4, (4000, 5), generator=generator(1))
    model = Oracle(dirichlet(4, 5), 4, 5)
    monkeypatch.setattr(model, "answer", lambda bits, lam: torch.zeros(*lam.shape, 4))
    bit_diffusion.loss_fn(model, x0, config(T=5, prefix=0.6), generator(2))
    frozen, = seen
    frozen = frozen.expand(4000, 5)
    size = frozen.sum(1)
    assert torch.equal(frozen, torch.arange(5) < size[:, None])
    want = [0.4 + 0.6 / 5, *4 * [0.6 / 5], 0]
    assert stats.chisquare(size.bincount(minlength=6)[:5].numpy(),
                           [4000 * p for p in want[:5]]).pvalue > 1e-3 and size.max() < 5
    bit_diffusion.loss_fn(model, x0, config(T=5, prefix=0.0), generator(2))
    assert not seen[1].any()


@HEADS
@pytest.mark.parametrize("window", [1.0, 0.6])
def test_the_elbo_loss_is_the_bound_per_token(head, window):
    """(E8) its mean over seeds is the quadrature over all bit strings, divided by T."""
    model, x0 = Oracle(THREE, 3, 2, head, 0.7), all_rows(3, 2).repeat(8, 1)
    cfg = config(3, 2, loss="elbo", window=window, schedule="quadratic")
    truth = path_bound(model, window).mean().item() / 2
    mean, se = mean_and_se(lambda g: bit_diffusion.loss_fn(model, x0, cfg, g)[0], 300)
    assert abs(mean - truth) < 4.5 * se and se < 0.02 * truth


@HEADS
@pytest.mark.parametrize("loss", ["ce", "elbo"])
def test_shares_of_a_batch_average_to_its_loss(loss, head):
    """The same noise for the whole batch, whoever works on which rows; gradients as well."""
    for more in (dict(), dict(prefix=0.6, window=0.3)):
        wide = dict(V=7, T=5, head=head, loss=loss) | more
        model, cfg = shaken(network(**wide), size=0.1), config(**wide)
        x0 = torch.randint(7, (12, 5), generator=generator(1))
        whole, info = bit_diffusion.loss_fn(model, x0, cfg, generator(2))
        parts = [bit_diffusion.loss_fn(model, x0, cfg, generator(2), slice(i, i + 4))
                 for i in (0, 4, 8)]
        assert sum(p[0] for p in parts).item() / 3 == pytest.approx(whole.item(), rel=1e-5)
        assert all(p[1] == info for p in parts)
        grads = [torch.autograd.grad(y, model.head.weight)[0]
                 for y in (whole, sum(p[0] for p in parts) / 3)]
        assert torch.allclose(*grads, rtol=1e-3, atol=1e-5) and grads[0].abs().max() > 0


# ---- refusals


@pytest.mark.parametrize("bad", [
    dict(window=0.0), dict(window=1.1), dict(eval_samplers="token,euler"),
    dict(head="bit", top_k=2), dict(head="bit", top_p=0.9),
    dict(head="bit", sampler="token", top_k=2), dict(head="bit", parts=3), dict(parts=2),
    dict(head="bit", parts=0)], ids=str)
def test_what_cannot_work_is_refused_in_one_sentence(bad):
    with pytest.raises(ValueError, match="^--") as error:
        config(**bad)
    assert "\n" not in str(error.value) and len(str(error.value)) < 120


@pytest.mark.parametrize("good", [
    dict(window=1.0), dict(head="bit", sampler="token", parts=4), dict(top_k=2, top_p=0.5),
    dict(sampler="bit", top_k=2), dict(eval_samplers="bit")], ids=str)
def test_what_can_work_is_not_refused(good):
    config(**good)


# ---- the network


SHAPES = dict(V=11, T=6, n_layer=2)
BITS = torch.randn(3, 6, 4, generator=generator(9)).sign()
BITS = torch.where((BITS > 0).all(2, keepdim=True), -BITS, BITS)  # no code beyond the 11th
BITS[..., 0] = torch.where(BITS[..., 1] > 0, -1.0, BITS[..., 0])
LAM = torch.linspace(0.3, 5, 18).view(3, 6)
NETWORKS = [dict(head=h, parts=p, input=i, cond=c) for h, p, i, c in (
    ("token", 1, "token", "none"), ("token", 1, "byte", "add"), ("bit", 1, "token", "add"),
    ("bit", 4, "bit", "none"), ("bit", 1, "raw", "add"), ("token", 1, "raw", "none"))]
each_network = pytest.mark.parametrize("kind", NETWORKS,
                                       ids=lambda k: " ".join(map(str, k.values())))


@each_network
def test_every_position_sees_every_other_of_its_row_and_no_other_row(kind):
    model = shaken(network(**SHAPES, **kind))
    out = model(BITS, LAM)
    wide = (11,) if kind["head"] == "token" else (4,) if kind["parts"] == 1 else (4, 5)
    assert out.shape == (3, 6, *wide)
    answer, model = model, lambda bits, lam: answer(bits, lam).flatten(2)
    out = out.flatten(2)
    for j in (0, 5):
        other, lam = BITS.clone(), LAM.clone()
        other[1, j] *= -1
        change = (model(other, LAM) - out).abs().amax(2)
        assert (change[1] > 1e-5).all() and change[[0, 2]].max() < 1e-5
        lam[1, j] += 1.5
        change = (model(BITS, lam) - out).abs().amax(2)
        assert change[1, j] > 1e-5 and change[[0, 2]].max() < 1e-5
        others = torch.arange(6) != j
        blind = kind["input"] == "raw" and kind["cond"] == "none"
        assert (change[1][others] > 1e-6).all() != blind
    turned = model(BITS[[2, 0, 1]], LAM[[2, 0, 1]])
    assert torch.allclose(turned, out[[2, 0, 1]], atol=1e-5)
    assert torch.allclose(model(BITS[1:2], LAM[1:2]), out[1:2], atol=1e-5)


@each_network
def test_where_selects_positions_of_the_answer(kind):
    where = torch.rand(3, 6, generator=generator(1)) < 0.4
    model = shaken(network(**SHAPES, **kind))
    got = model(BITS, LAM, where)
    assert len(got) == int(where.sum())
    assert torch.allclose(got, model(BITS, LAM)[where], atol=1e-5)


@each_network
def test_both_ends_are_finite_forward_and_backward(kind):
    """At lam 0, 1e-6, 1e-3 below SURE and SURE, in float32 and under bfloat16 autocast; both
    losses, the bounds, and every gradient."""
    lam = torch.tensor([[0.0, 1e-6, 2.0, SURE - 1e-3, SURE, SURE]]).expand(3, 6)
    bits = BITS.clone()
    bits[lam == SURE] = bit_diffusion.code_book(11)[torch.arange(6)]
    x0 = torch.arange(18).view(3, 6) % 11
    for cast in (False, True):
        model = shaken(network(**SHAPES, **kind))
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = model(bits, lam)
            assert out.isfinite().all() and out.dtype == torch.float32
            total = out.square().mean()
            for loss in ("ce", "elbo"):
                cfg = config(**SHAPES, **kind, loss=loss, window=0.5)
                total = total + bit_diffusion.loss_fn(model, x0, cfg, generator(1))[0]
                assert bit_diffusion.nelbo(model, x0, cfg, generator(1))[0].isfinite().all()
                for joint in (True, False):
                    assert bit_diffusion.nelbo_steps(model, x0, cfg, generator(1), 5,
                                                     joint).isfinite().all()
        total.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name


def test_the_input_is_what_input_says():
    """token: the expected embedding by own bits alone, that of the token when clean, zeros when
    nothing is known; byte: the same for every eight bits of the code; bit: a linear map of
    a_i b_i; raw: of b_i."""
    V, K, wide = 300, 9, dict(V=300, T=6)
    lam = torch.tensor([[0.0, 0.7, 2.0, 6.0, SURE, SURE]])
    order = torch.randperm(V, generator=generator(1))
    code = bit_diffusion.code_book(V, order)
    bits = torch.randn(1, 6, K, generator=generator(2)).sign()
    bits[0, 4:] = code[[270, 2]]
    model = network(order=order, **wide)
    got = model.embed(bits, lam)
    assert (got[0, 0] == 0).all() and torch.equal(got[0, 4:], model.wte.weight[[270, 2]])
    for i in (1, 2, 3):
        same = (bits[0, i] == code).sum(1).double()
        p = right(lam[0, i]) ** same * (1 - right(lam[0, i])) ** (K - same)
        want = (p / p.sum()).float() @ model.wte.weight
        assert torch.allclose(got[0, i], want, atol=1e-6)
    model = network(order=order, input="byte", **wide)
    got, one, two = model.embed(bits, lam), words(8).float(), words(1).float()
    assert [w.weight.shape[0] for w in model.wte] == [256, 2] and (got[0, 0] == 0).all()
    for i in range(1, 6):
        want = 0
        for table, cut, codes in zip(model.wte, (slice(0, 8), slice(8, 9)), (one, two)):
            same = (bits[0, i, cut] == codes).sum(1).double()
            p = right(lam[0, i]) ** same * (1 - right(lam[0, i])) ** (codes.shape[1] - same)
            want = want + (p / p.sum()).float() @ table.weight
        assert torch.allclose(got[0, i], want, atol=1e-6)
    model = network(input="bit", **wide)
    a = torch.tensor([2 * right(x) - 1 for x in lam[0]])[:, None]
    assert torch.allclose(model.embed(bits, lam)[0], (a * bits[0]) @ model.bits_in.weight.T,
                          atol=1e-6)
    model = network(input="raw", **wide)
    assert torch.allclose(model.embed(bits, lam)[0], bits[0] @ model.bits_in.weight.T, atol=1e-6)


def test_the_noise_level_is_told_as_cond_says():
    """add: sinusoids of 1000 a at 64 frequencies; none: without evidence, no level is felt."""
    for cond in ("none", "add"):
        model = shaken(network(**SHAPES, input="raw", skip=False, cond=cond))
        same = torch.allclose(model(BITS, LAM), model(BITS, LAM + 0.5), atol=1e-6)
        assert same == (cond == "none") and hasattr(model, "noise_in") == (cond == "add")
    seen = []
    model.noise_in.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model(BITS, LAM)
    angle = 1000 * (LAM.double() / 2).tanh()[..., None] * 10000 ** (-torch.arange(64) / 64).double()
    want = torch.cat((angle.cos(), angle.sin()), -1)
    assert seen[0].shape == (3, 6, 128) and (seen[0] - want).abs().max() < 2e-3


@each_network
def test_every_parameter_learns_within_a_few_steps(kind):
    """No gate is closed behind another; every weight has exactly one optimizer."""
    wide = SHAPES | kind
    model, cfg = network(**wide), config(**wide, lr=1e-3)
    before = copy.deepcopy(model.state_dict())
    optimizers, g = bit_diffusion.make_optimizers(model, cfg), generator(1)
    x0 = torch.arange(6).expand(16, 6) % 11
    for _ in range(6):
        bit_diffusion.loss_fn(model, x0, cfg, g)[0].backward()
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name
    owned = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(map(id, model.parameters()))
    assert torch.equal(model.code, before["code"])


def test_the_learning_rate_warms_up_and_falls_to_zero():
    cfg = config(lr=0.1, warmup=10, steps=110)
    rates = [bit_diffusion.get_lr(step, cfg) for step in range(111)]
    assert rates[:10] == pytest.approx([0.01 * (k + 1) for k in range(10)])
    assert rates[10] == pytest.approx(0.1) and rates[60] == pytest.approx(0.05)
    assert rates[110] == pytest.approx(0, abs=1e-12) and rates[10:] == sorted(rates[10:])[::-1]


@pytest.mark.parametrize("head,parts,loss", [("token", 1, "ce"), ("bit", 1, "ce"),
                                             ("bit", 4, "elbo")])
def test_a_batch_can_be_learned_by_heart(head, parts, loss):
    """Three strings: the bound falls to near ln 3, never far below, and samples are those strings.
    """
    x0 = torch.tensor([[1, 2, 3, 4], [6, 5, 4, 3], [9, 0, 10, 0]])
    wide = dict(V=11, T=4, head=head, parts=parts, loss=loss, window=0.3, n_embd=32, n_layer=1,
                lr=1e-2, warmup=10, steps=130, sampling_steps=40)
    model, cfg = network(**wide), config(**wide)
    optimizers, g = bit_diffusion.make_optimizers(model, cfg), generator(1)
    for step in range(cfg.steps):
        for group in [group for o in optimizers for group in o.param_groups]:
            group["lr"] = bit_diffusion.get_lr(step, cfg) * group["scale"]
        bit_diffusion.loss_fn(model, x0.repeat(12, 1), cfg, g)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
    nats = bit_diffusion.nelbo(model, x0.repeat(60, 1), cfg, generator(2))[0]
    assert math.log(3) - 0.2 < nats.mean() < math.log(3) + 1.6  # of 9.6 at first
    x, _ = bit_diffusion.sample(model, cfg, 60, generator(3))
    same = (x[:, None] == x0).all(2)
    assert same.any(1).float().mean() > 0.4 and same.any(0).all()  # by chance: 2e-4


def test_clean_is_the_same_level_in_the_tables():
    """The tables' idea of no noise is the script's."""
    assert CLEAN == SURE
