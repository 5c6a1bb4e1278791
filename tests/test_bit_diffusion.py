"""Bit diffusion: codes, times, noise, posterior, heads, bounds, losses and the network, against
Bayes' rule and enumeration; the script, and what lab/bit_variants.py adds to it."""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import bit_diffusion
from bit_tables import (LOST, Oracle, chain, chain_bound, channel, dirichlet, entropy, independent,
                        level, numbers, odds_of, path, path_bound, posterior, right, settings,
                        width, words)
from lab import bit_variants
from tables import all_rows, generator, mean_and_se

CLEAN, SCHEDULES = bit_diffusion.CLEAN, ("quadratic", "cosine", "linear")
JOINT, THREE = dirichlet(4, 2, 3), dirichlet(3, 2, 5, 0.7)
each_head = pytest.mark.parametrize("head", ["token", "bit"])


def config(V=4, T=2, **changes):
    return bit_variants.Config(**settings(V, T, **changes))


def network(seed=0, order=None, shake=0.0, **changes):
    """lab's Model, by default that of the script; shaken: weights far from their initial zeros."""
    torch.manual_seed(seed)
    model, g = bit_variants.Model(config(**changes)), generator(1)
    if order is not None:
        model.codes[order] = bit_diffusion.token_codes(len(order))
    for p in model.parameters():
        p.data += shake * torch.randn(p.shape, generator=g)
    return model


def loss_of(model, x0, cfg, g):
    return bit_variants.loss_fn(model, x0, *bit_variants.corrupt(x0, cfg, g))


def close(draws, truth, width=4.5):
    """Is the mean of independent draws (n,) the truth, within so many standard errors?"""
    se = draws.double().std() / len(draws) ** 0.5
    return abs(draws.double().mean().item() - truth) < width * se.item() + 1e-6


def row_by_row(draws, truth, times, width=4.5):
    """Are the means of `times` draws for each row in turn their truths, and is the mean of all?"""
    draws = draws.view(len(truth), times).double()
    off, se = draws.mean(1) - truth, draws.std(1) / times ** 0.5
    return (off.abs() < (width + 1) * se + 1e-6).all() and \
        off.sum().abs() < width * se.square().sum().sqrt() + 1e-6


# ---- lab and script


def test_by_default_lab_is_the_script():
    """Weights, loss, bound, samples and the frames of their trajectories are the same numbers."""
    models, outcomes = [], []
    for module in (bit_diffusion, bit_variants):
        cfg = module.Config(**settings(11, 6, n_layer=2, noise_window=0.3))
        torch.manual_seed(0)
        models.append(getattr(module, "new_model", module.Model)(cfg))
        for p in models[-1].parameters():
            p.data += 0.3 * torch.randn(p.shape)
        x0 = torch.randint(11, (9, 6), generator=generator(1))
        values = [module.loss_fn(models[-1], x0, *module.corrupt(x0, cfg, generator(2))),
                  module.nelbo(models[-1], x0, cfg, generator(3), 8, x0 < 3)]
        for order, steps in (("random", 0), ("l2r", 9), ("maxprob", 30)):
            some = module.Config(**vars(cfg) | dict(order=order, num_steps=steps, top_k=5,
                                                    temperature=0.7))
            x, nfe = module.sample(models[-1], x0.masked_fill(x0 > 5, 11), some, generator(4),
                                   on_step=lambda nfe, x: values.append(x))
            values += [x, torch.tensor(nfe)]
        outcomes.append(values)
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    assert len(outcomes[0]) == len(outcomes[1]) > 30
    assert all(torch.equal(a, b) for a, b in zip(*outcomes))


@pytest.mark.parametrize("bad", [
    dict(noise_window=0.0), dict(noise_window=1.1), dict(head="bit", top_k=2), dict(num_mixture=2),
    dict(head="bit", top_p=0.9), dict(head="bit", num_mixture=3)], ids=str)
def test_what_cannot_work_is_refused_in_one_sentence(bad):
    sentence, = config(**bad).problems()
    assert sentence.startswith("--") and "\n" not in sentence and len(sentence) < 120
    assert not config(head="bit", num_mixture=4).problems() and not config(top_k=2).problems()


# ---- codes


@pytest.mark.parametrize("V", [2, 3, 28, 1000, 2049, 50257])
def test_codes_and_ids_are_each_others_inverse(V):
    """K = ceil(log2 V) bits of +-1; the n-th token of an order has the digits of n, the highest
    first; codes of no token give V."""
    codes, K = bit_diffusion.token_codes(V), width(V)
    assert codes.shape == (V, K) and (codes.abs() == 1).all()
    for n in {V - 1, 1, V // 2}:
        assert "".join("01"[int(b > 0)] for b in codes[n]) == format(n, f"0{K}b")
    unused = 2.0 * (torch.arange(V, 2 ** K)[:, None] >> torch.arange(K - 1, -1, -1) & 1) - 1
    order = torch.randperm(V, generator=generator(1))
    mixed = torch.empty_like(codes)
    mixed[order] = codes
    assert torch.equal(bit_diffusion.bits_to_int(codes, V), torch.arange(V))
    assert torch.equal(bit_variants.ids_of(mixed, mixed), torch.arange(V))
    assert torch.equal(bit_variants.ids_of(codes, mixed), order)
    assert (bit_diffusion.bits_to_int(unused, V) == V).all()
    assert (bit_variants.ids_of(unused, mixed) == V).all()


PAIRS_OF = torch.tensor([[3, 6], [0, 5], [7, 1], [4, 2]])  # classes A B C D, two tokens each


def toy_rows(split, cfg, g):
    """Rows of 24 that go round A B C D: neighbours tell which of the 8 tokens are alike."""
    start = torch.randint(4, (cfg.batch_size, 1), generator=g)
    pick = (torch.rand(cfg.batch_size, 24, generator=g) < 0.3).long()
    return PAIRS_OF[(start + torch.arange(24)) % 4, pick]


def two_sided_rows(split, cfg, g):
    """Rows of A B D and A C A: only what follows tells B and C apart."""
    kind = torch.tensor([[0, 1, 3], [0, 2, 0]])[torch.randint(2, (cfg.batch_size, 8), generator=g)]
    kind = kind.flatten(1)
    return PAIRS_OF[kind, (torch.rand(kind.shape, generator=g) < 0.2).long()]


def test_codes_count_up_in_the_order_of_code(monkeypatch):
    """Permutations that the seed fixes. frequency: counts never rise. semantic: tokens with like
    neighbours, on either side, differ in the last bit alone. A new model has these codes."""
    monkeypatch.setattr(bit_variants, "load_data", lambda cfg: SimpleNamespace(train=None))
    for rows, V in ((toy_rows, 8), (toy_rows, 11), (two_sided_rows, 8)):  # of 11, 3 never occur
        monkeypatch.setattr(bit_variants, "get_batch", rows)
        for kind in ("id", "random", "frequency", "semantic"):
            cfg, other = (config(V, 24, code=kind, seed=seed) for seed in (1, 2))
            order = bit_variants.order_tokens(cfg)
            assert order.sort().values.tolist() == list(range(V))
            assert torch.equal(order, torch.arange(V)) == (kind == "id")
            assert torch.equal(order, bit_variants.order_tokens(other)) == (kind != "random")
            model = bit_variants.new_model(cfg)
            assert torch.equal(model.codes[order], bit_diffusion.token_codes(V))
            if kind == "frequency":
                count = rows(None, config(batch_size=4000), generator(0)).flatten().bincount(
                    minlength=V)
                assert (count[order].diff() <= 0).all()
            if kind == "semantic" and V == 8:
                assert {frozenset(pair.tolist()) for pair in order.view(4, 2)} == \
                    {frozenset(pair.tolist()) for pair in PAIRS_OF}


# ---- schedules and times


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_falls_from_clean_to_noise_with_its_stated_slope(name):
    """(E1) 1 - a rises from 0 to 1 and lam = ln((1 + a) / (1 - a)) falls from CLEAN to 0; the
    stated derivatives are those of autograd."""
    t = torch.linspace(0, 1, 401, dtype=torch.float64).requires_grad_()
    lost, slope = (f(t) for f in bit_diffusion.SCHEDULES[name])
    assert lost[0] == 0 and lost[-1] == 1 and (lost.diff() > 0).all()
    assert torch.allclose(slope + 0 * t, torch.autograd.grad(lost.sum(), t)[0], atol=1e-12)
    assert torch.allclose(lost, torch.tensor([LOST[name](x) for x in t.tolist()]).double())
    own = t.detach().float().double().requires_grad_()
    lam, fall = (y[:, 0] for y in bit_diffusion.noise_levels(
        own.detach()[:, None], torch.zeros(401, 1), config(T=1, schedule=name)))
    assert lam[0] == CLEAN and lam[-1] == 0 and (lam.diff() < 0).all()
    a = 1 - bit_diffusion.SCHEDULES[name][0](own)
    log_odds = ((1 + a) / (1 - a)).log()
    assert torch.allclose(lam[1:-1].double(), log_odds[1:-1], rtol=1e-6)
    grad, = torch.autograd.grad(log_odds[1:-1].sum(), own)
    assert torch.allclose(fall[1:-1], -grad[1:-1], rtol=1e-9)
    assert fall[0] == 0 and fall[-1] == 0


@pytest.mark.parametrize("window", [0.05, 0.2, 0.5, 1.0])
def test_each_position_goes_from_clean_to_noise_in_its_window(window):
    """(E2) own time (t - tau) / w, clamped: CLEAN at t = 0, 0 at t = 1, in between during a share w
    of the path; sorted, the tau are (1 - w) (rank + u) / T with one u per row."""
    cfg = config(T=24, noise_window=window)
    tau = bit_diffusion.position_times((50, 24), cfg, generator(1))
    even = tau.sort(1).values * 24 - (1 - window) * torch.arange(24)
    assert (even - even[:, :1]).abs().max() < 1e-4 and 0 <= even.min() <= even.max() <= 1
    before, busy, n = torch.full((50, 24), CLEAN), torch.zeros(50, 24), 400
    for t in (torch.arange(n) + 0.5) / n:
        lam, slope = bit_diffusion.noise_levels(t.expand(50, 1), tau, cfg)
        own = ((t - tau) / window).double().clamp(0, 1)
        assert torch.allclose(lam.double(), (2 / own ** 2 - 1).log().clamp(0, CLEAN), atol=1e-4)
        is_moving = (lam > 0) & (lam < CLEAN)
        assert (lam <= before).all() and torch.equal(is_moving, slope > 0)
        want = 4 / (own * (2 - own ** 2)) / window
        assert torch.allclose(slope[is_moving], want[is_moving], rtol=1e-3)
        before, busy = lam, busy + is_moving.double() / n
    assert (busy - window).abs().max() <= 1.01 / n
    assert (bit_diffusion.noise_levels(0.0, tau, cfg)[0] == CLEAN).all()
    assert bit_diffusion.noise_levels(1.0, tau, cfg)[0].max() < 1e-5


def test_times_come_in_random_order_and_given_positions_stay_clean():
    """(E2) all orders are equally likely, u is uniform; the free positions of a row share the even
    times among them."""
    cfg = config(T=5, noise_window=0.3)
    tau = bit_diffusion.position_times((8000, 5), cfg, generator(2)) / 0.7 * 5
    first = tau.min(1).values
    assert stats.kstest(first.numpy(), "uniform").pvalue > 1e-3
    orders = (tau.argsort(1)[:, :4] * 5 ** torch.arange(4)).sum(1).unique(return_counts=True)[1]
    assert len(orders) == 120 and stats.chisquare(orders.numpy()).pvalue > 1e-3
    is_given = torch.rand(400, 5, generator=generator(4)) < 0.4
    is_given[0] = True
    tau = bit_diffusion.position_times((400, 5), cfg, generator(5), is_given)
    for t in (0.0, 0.3, 1.0):
        lam, slope = bit_diffusion.noise_levels(t, tau, cfg)
        assert (lam[is_given] == CLEAN).all() and (slope[is_given] == 0).all()
        assert t < 1 or lam[~is_given].max() < 1e-5
    for row, is_free in zip(tau[1:], ~is_given[1:]):
        even = row[is_free].sort().values / 0.7 * is_free.sum() - torch.arange(is_free.sum())
        assert not is_free.any() or 0 <= even.min() and even.max() < min(1, even.min() + 1e-5)


def test_reassigned_times_are_the_same_times_highest_score_first():
    """(E2) the waiting positions keep their times as a set; the best is denoised first."""
    g = generator(6)
    tau, is_waiting = torch.rand(300, 8, generator=g), torch.rand(300, 8, generator=g) < 0.6
    tau[~is_waiting & (torch.rand(300, 8, generator=g) < 0.3)] = torch.inf  # some are given
    score = torch.rand(300, 8, generator=g)
    new = bit_diffusion.reassign_times(tau, is_waiting, score)
    assert torch.equal(new[~is_waiting], tau[~is_waiting])
    for row, old, waits, value in zip(new, tau, is_waiting, score):
        by_score = row[waits][value[waits].argsort(descending=True)]
        assert torch.equal(by_score, old[waits].sort(descending=True).values)


# ---- noise and its posterior


def test_noise_flips_bits_as_often_as_stated():
    """(E1) P(flip) = (1 - a) / 2 = 1 / (1 + e^lam), within 4.5 standard errors for both signs of a
    bit; independently; none at all at CLEAN."""
    n = 40_000
    clean = torch.tensor([1.0, -1.0, 1.0, -1.0]).expand(n, 4)
    for lam in (0.0, 0.3, 1.0, 2.5, 6.0, CLEAN):
        noisy = bit_diffusion.q_sample(clean, torch.full((n,), lam), generator(int(10 * lam)))
        flips, p = (noisy != clean).double(), 1 / (1 + math.exp(lam))
        assert (noisy.abs() == 1).all() and (lam < CLEAN or flips.sum() == 0)
        assert ((flips.mean(0) - p).abs() <= 4.5 * (p * (1 - p) / n) ** 0.5).all()
        both = (flips[:, 0] * flips[:, 1]).mean()
        assert abs(both - p * p) <= 4.5 * (p * p * (1 - p * p) / n) ** 0.5


def test_the_posterior_is_bayes_rule():
    """(E7) against enumeration for all pairs of levels; finite, a probability; at CLEAN the bit
    becomes clean."""
    levels = (0.0, 1e-6, 0.01, 0.5, 1.0, 2.7, 6.0, 12.0, 20.0, CLEAN)
    for lam_t, lam_s in itertools.combinations(levels, 2):
        table = posterior(lam_t, lam_s)
        for y, b_t, b_0 in ((1, 0, 0), (1, 1, 1), (-1, 0, 1), (-1, 1, 0)):
            f = bit_diffusion.flip_probability(torch.tensor(lam_t), torch.tensor(lam_s), y)
            assert f.dtype == torch.float64 and 0 <= f <= 1
            # 1 - a_t holds few digits at large lam_t: its error is 1e-16 / (1 - a_t)
            close = 1e-9 + 1e-15 * math.exp(lam_t)
            assert f.item() == pytest.approx(table[b_t, b_0, 1 - b_t].item(), rel=1e-5, abs=close)
            assert lam_s < CLEAN or f.item() == pytest.approx(float(y < 0), abs=1e-8)


def test_the_posterior_composes_with_the_forward_process():
    """(E7) noise to t, then back to s, is noise to s; two steps make one."""
    for levels in itertools.combinations((0.0, 0.4, 1.5, 4.0, 8.0), 3):
        t, u, s = (torch.tensor(x, dtype=torch.float64) for x in levels)
        up = {y: bit_diffusion.flip_probability(t, s, y).item() for y in (1, -1)}
        wrong = (1 - right(t)) * (1 - up[-1]) + right(t) * up[1]
        assert wrong == pytest.approx(1 - right(s), abs=1e-12)
        for y in (1, -1):
            first = bit_diffusion.flip_probability(t, u, y).item()
            stay, turn = (bit_diffusion.flip_probability(u, s, z).item() for z in (y, -y))
            assert (1 - first) * stay + first * (1 - turn) == pytest.approx(up[y], abs=1e-9)


# ---- heads


def code_distribution(out, K):
    """Probabilities of words (n, 2^K) by the outputs (n, K) or (n, R, K + 1) of a bit head."""
    out = torch.cat((out, 0 * out[:, :1]), 1)[:, None] if out.dim() == 2 else out
    p = independent(out[..., :-1].double())
    return (out[..., -1].double().softmax(1)[..., None] * p).sum(1)


def outputs(V, R, n, scale, g):
    """Random outputs of n positions: of a token head, R = 0, or of R products."""
    K = width(V)
    return scale * torch.randn(n, *(V,) if not R else (K,) if R == 1 else (R, K + 1), generator=g)


def head_of(R):
    return dict(head="bit", num_mixture=R) if R else {}


@pytest.mark.parametrize("V", [3, 8, 11])
def test_own_bits_are_added_by_bayes_rule(V):
    """(E3) (E4) (V1) (V2) outputs, updated, are their distribution times the enumerated likelihood;
    -lam takes it back; a fresh network does this to nothing, and no more is added."""
    order = torch.randperm(V, generator=generator(2))
    K, number, n = width(V), numbers(V, order), 2 ** width(V)
    bits = words(K).float()
    for lam, R, scale in itertools.product((0.0, 1e-6, 0.3, 2.0, 7.0, 20.0), (0, 1, 4), (0.0, 2.0)):
        lams, q = torch.full((n,), lam), channel(K, lam)  # [clean, noisy]
        before = outputs(V, R, n, scale, generator(3))
        model = network(V=V, order=order, **head_of(R))
        after = bit_variants.bayes_update(model, before, bits, lams)
        if R:
            prior, got, q = code_distribution(before, K), code_distribution(after, K), q.T
        else:
            prior, got, q = before.double().softmax(1), after.double().softmax(1), q[number].T
        want = prior * q
        assert torch.allclose(got, want / want.sum(1, keepdim=True), atol=1e-5)
        back = bit_variants.bayes_update(model, after, bits, -lams)
        assert torch.allclose(back, before, atol=1e-4)
        if scale == 0 and R < 2:
            fresh = model(bits[None, :2], lams[None, :2])[0]
            assert torch.allclose(fresh, after[:2], atol=1e-5)
    for R in (0, 1, 4):
        model, bare = (network(V=V, T=n, shake=0.3, add_likelihood=add, **head_of(R))
                       for add in (True, False))
        lams = torch.linspace(0, 9, n)[None]
        added = bit_variants.bayes_update(bare, bare(bits[None], lams), bits[None], lams)
        assert torch.allclose(model(bits[None], lams), added, atol=1e-5)


@pytest.mark.parametrize("R", [2, 4])
def test_the_products_of_a_fresh_mixture_differ_and_are_uniform_together(R):
    """(V2) each leans to leading bits of its own, so that they learn apart."""
    model = network(V=8, **head_of(R))
    out = model(words(3).float()[None, :2], torch.zeros(1, 2)).flatten(0, 1)
    assert torch.allclose(code_distribution(out, 3), torch.full((2, 8), 1 / 8).double(), atol=1e-6)
    assert len({tuple(row.tolist()) for row in out[0, :, :-1].sign()}) == R
    x0 = torch.randint(8, (9, 2), generator=generator(1))
    loss_of(model, x0, model.cfg, generator(2)).backward()
    grad = model.head.weight.grad.view(R, 4, -1)
    assert all((p - q).abs().max() > 1e-4 for p, q in itertools.combinations(grad, 2))


def test_the_self_likelihood_stays_float32_under_autocast():
    """(E3) where bfloat16 would lose whole nats."""
    for R in (0, 1, 2):
        model = network(V=1000, **head_of(R))
        bits = torch.randn(20, 10, generator=generator(1)).sign()
        lam, zero = torch.linspace(0, 39, 20), outputs(1000, R, 20, 0.0, generator(1))
        plain = bit_variants.bayes_update(model, zero, bits, lam)
        with torch.autocast("cpu", torch.bfloat16):
            low = bit_variants.bayes_update(model, zero.bfloat16(), bits, lam)
            assert low.dtype == torch.float32 and torch.equal(low, plain) and plain.max() > 30
            assert model(bits.view(10, 2, 10), lam.view(10, 2)).dtype == torch.float32


def test_what_outputs_say_of_bits_and_tokens():
    """(E5) (V1) (V2) log-odds of bits, -log p of a code and the most likely code against
    enumeration; a wrong bit of probability 1e-12 keeps its digits; one product: BCE."""
    g = generator(8)
    for V, R in itertools.product((3, 11), (0, 1, 4)):
        order, K = torch.randperm(V, generator=g), width(V)
        number, model = numbers(V, order), network(V=V, order=order, **head_of(R))
        out, x0 = outputs(V, R, 50, 3.0, g), torch.randint(V, (50,), generator=g)
        p = code_distribution(out, K) if R else out.double().softmax(1)
        codes = words(K) if R else words(K)[number]
        got = bit_variants.bit_logits(model, out)
        assert got.dtype == torch.float64 and torch.allclose(got, odds_of(p, codes), rtol=1e-8)
        ce = bit_variants.cross_entropy(model, out, x0)
        want = -p[torch.arange(50), number[x0] if R else x0].log()
        assert torch.allclose(ce.double(), want, atol=1e-5)
        if R == 1:
            bce = F.binary_cross_entropy_with_logits(out, (model.codes[x0] > 0).float(),
                                                     reduction="none").sum(1)
            assert torch.allclose(ce, bce)
        if R < 2:
            assert torch.allclose(bit_variants.confidence(model, out).double(), p.amax(1))
    out = torch.tensor([[[9.0, -9.0, 0.0], [-1.0, 1.0, 0.5]]])  # the second is likelier, yet vague
    p = bit_variants.confidence(network(**head_of(2)), out).item()
    assert p == pytest.approx(1 / (1 + math.exp(0.5)) / (1 + math.exp(-9)) ** 2, rel=1e-5)
    tiny = math.log(1e-12)
    out = torch.tensor([[0.0, tiny, tiny - 2, tiny - 5]])
    z = out[0].double().exp()
    want = torch.stack([(z[0] + z[1]) / (z[2] + z[3]), (z[0] + z[2]) / (z[1] + z[3])]).log()
    assert torch.allclose(-bit_variants.bit_logits(network(), out)[0], want, atol=1e-9)


# ---- the bound of a fresh network


FRESH = [dict(V=2, noise_window=1.0), dict(V=3, noise_window=0.3), dict(V=28, input="bit"),
         dict(V=28, noise_window=0.05, input="raw", cond="add"),
         dict(V=1000, noise_window=0.3, input="byte", cond="add"),
         dict(V=4, schedule="linear"), dict(V=5, noise_window=0.3, schedule="cosine")]


@pytest.mark.parametrize("R", [0, 1, 2])
@pytest.mark.parametrize("kind", FRESH, ids=lambda k: " ".join(map(str, k.values())))
def test_a_fresh_network_costs_ln_v_or_k_ln_2(kind, R):
    """(E6) zero head: T ln V, or T K ln 2 for a bit head, whatever the tokens: the cheapest test of
    all constants and weights."""
    T, V, wide = 12, kind["V"], head_of(R) | kind
    x0 = torch.randint(V, (256, T), generator=generator(1))
    nats = bit_variants.nelbo(network(T=T, **wide), x0, config(T=T, **wide), generator(2), 8)
    truth = T * (width(V) * math.log(2) if R else math.log(V))
    assert nats.shape == (256,) and nats.dtype == torch.float64 and close(nats, truth, 4)


@pytest.mark.parametrize("V", [3, 4, 28])
def test_steps_of_a_fresh_network_cost_the_same(V):
    """(V5) T ln V for whole tokens, T K ln 2 for a mixture's products; bits one by one: less by
    what redrawing codes of no token gains at the end, in a single step all of it."""
    T, K = 6, width(V)
    x0 = torch.randint(V, (256, T), generator=generator(1))
    for (R, sampler), (window, steps) in itertools.product(
            ((0, "token"), (4, "token"), (1, "token"), (2, "bit"), (0, "bit")),
            ((1.0, 4), (0.3, 7), (1.0, 1))):
        wide = dict(V=V, T=T, noise_window=window, sampler=sampler) | head_of(R)
        nats = bit_variants.nelbo_steps(network(**wide), x0, config(**wide), generator(2), steps)
        if sampler == "token" and R != 1 or V == 4:
            assert close(nats, T * (K * math.log(2) if R else math.log(V)), 4)
        elif R and steps == 1:
            assert torch.allclose(nats, torch.full_like(nats, T * math.log(V)), atol=1e-4)
        elif R:
            assert nats.mean() < T * K * math.log(2) - 0.05


def test_a_fresh_network_biased_to_frequencies_costs_their_cross_entropy():
    """(E6) (V5) head bias log p: -log p(x0) for every row, for all windows and schedules."""
    p = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    x0 = torch.multinomial(p, 512 * 6, True, generator=generator(1)).view(512, 6)
    truth = -p.log()[x0].sum(1).double()
    for window, schedule in ((1.0, "linear"), (0.3, "quadratic"), (0.5, "cosine")):
        cfg, model = config(5, 6, noise_window=window, schedule=schedule), network(V=5, T=6)
        model.head.bias.data = p.log()
        assert close(bit_diffusion.nelbo(model, x0, cfg, generator(2)) - truth, 0, 4)
        assert close(bit_variants.nelbo_steps(model, x0, cfg, generator(3), 5) - truth, 0, 4)


# ---- the bound of exact and of perturbed posteriors


@each_head
@pytest.mark.parametrize("V,T", [(4, 2), (3, 2), (5, 2), (3, 3), (2, 3)], ids=str)
def test_the_bound_of_exact_posteriors_is_the_entropy(V, T, head):
    """(E5) (E6) nelbo_integrand by quadrature over all bit strings: -log p(x0) for every row to
    1e-5, with codes of no token too; more if a position's own bits are counted twice."""
    joint = 0.7 * dirichlet(V, T, V + T, 1.0) + 0.3 / V ** T
    model = Oracle(joint, V, T, head)
    state, clean = words(T * model.K).view(-1, T, model.K), words(model.K)[model.rows]
    R, S, total, worse = len(clean), len(state), 0.0, 0.0
    node, weight = map(torch.from_numpy, np.polynomial.legendre.leggauss(60))
    flat = [y.expand(R, S, T, model.K).reshape(-1, model.K) for y in (state, clean[:, None])]
    for u, w in zip((node + 1) / 2, weight / 2):
        lam = level(u * u)
        q = F.logsigmoid(lam * (state * clean[:, None])).sum((2, 3)).exp()  # (R, S)
        out = model.answer(state, torch.full((S, T), lam).double()).flatten(0, 1)
        odds = bit_variants.bit_logits(model, out).view(S, T, -1)
        for twice in (False, True):
            some = (odds + twice * lam * state).expand(R, S, T, model.K).reshape(-1, model.K)
            nats = bit_diffusion.nelbo_integrand(some, *flat, torch.full((R * S * T,), lam))
            nats = (q * nats.view(R, S, T).sum(2)).sum(1) * 4 / (u * (2 - u * u)) * w
            total, worse = total + nats * (not twice), worse + nats * twice
    assert (total + joint.log()).abs().max() < 1e-5
    assert (joint * worse).sum() > entropy(joint) + 0.05


def test_the_integrand_is_the_divergence_of_two_flip_rates():
    """(E6) against its formula in ordinary arithmetic; 0 where the clean bits are certain; finite
    at both ends."""
    g = generator(1)
    lam, odds = 6 * torch.rand(200, generator=g).double(), 3 * torch.randn(200, 3, generator=g)
    bits, clean = (torch.randn(200, 3, generator=g).sign() for _ in range(2))
    m = (bits * odds.double()).sigmoid()
    s, at = (-lam[:, None] * bits * clean).exp(), lam[:, None]
    s_hat = m * (-at).exp() + (1 - m) * at.exp()
    want = ((s_hat - s + s * (s / s_hat).log()) / (2 * at.sinh())).sum(1)
    got = bit_diffusion.nelbo_integrand(odds.double(), bits, clean, lam)
    assert torch.allclose(got, want, rtol=1e-8, atol=1e-12) and (got >= 0).all()
    certain = bit_diffusion.nelbo_integrand(60 * clean.double(), bits, clean, lam)
    assert certain.abs().max() < 1e-6
    for value, odd in itertools.product((1e-6, CLEAN - 1e-3), (-CLEAN, 0.0, CLEAN)):
        ends = bit_diffusion.nelbo_integrand(torch.full((8, 1), odd).double(), words(3)[:, :1],
                                             words(3)[:, 1:2], torch.full((8,), value))
        assert ends.isfinite().all() and (ends > -1e-6).all()


@pytest.mark.parametrize("head", ["token", "bit", "mix"])
@pytest.mark.parametrize("window,schedule", [(1.0, "quadratic"), (1.0, "linear"),
                                             (0.3, "quadratic"), (0.6, "cosine")])
def test_the_estimate_of_the_bound_is_unbiased(head, window, schedule):
    """(E2) (E6) a network that errs, against quadrature for each row; an exact one: -log p."""
    module, times = bit_diffusion if head == "token" else bit_variants, 800
    cfg = config(3, 2, noise_window=window, schedule=schedule)
    x0, model = all_rows(3, 2).repeat_interleave(times, 0), Oracle(THREE, 3, 2, head, 0.7)
    truth = path_bound(model, window, schedule)
    assert (truth > -THREE.log() + 0.005).any()
    for K in (1, 4):
        assert row_by_row(module.nelbo(model, x0, cfg, generator(K), K), truth, times)
    if head != "mix":
        nats = module.nelbo(Oracle(THREE, 3, 2, head), x0, cfg, generator(3), 4)
        assert row_by_row(nats, -THREE.log(), times)


@each_head
def test_a_bound_given_some_tokens_is_that_of_the_others(head):
    """(E6) -log p(others | given); a row that is all given costs nothing."""
    model, x0, times = Oracle(THREE, 3, 2, head), all_rows(3, 2), 600
    module = bit_diffusion if head == "token" else bit_variants
    p_given, rows = THREE.view(3, 3).sum(1)[x0[:, 0]], x0.repeat_interleave(times, 0)
    for window in (1.0, 0.4):
        cfg, is_given = config(3, 2, noise_window=window), torch.tensor([[True, False]])
        nats = module.nelbo(model, rows, cfg, generator(4), 4, is_given.expand(len(rows), 2))
        assert row_by_row(nats, (p_given / THREE).log(), times)
        nats = module.nelbo(model, x0, cfg, generator(4), 4, torch.ones(9, 2).bool())
        assert (nats == 0).all()


# ---- the bounds of few steps


@pytest.mark.parametrize("head,sampler", [("token", "token"), ("token", "bit"), ("bit", "token"),
                                          ("mix", "token"), ("mix", "bit")])
def test_the_bound_of_few_steps_is_unbiased_and_above_the_sampler(head, sampler, monkeypatch):
    """(E8) (V4) (V5) a network that errs, against enumeration of all bit strings for each row; H <=
    -E log p of the chain, exact by products of matrices, <= its bound. Products of a mixture are
    not credited with the redrawing of codes of no token."""
    kind = "token" if sampler == "token" and head != "bit" else "bit"
    smooth, times, last = 0.8 * JOINT + 0.2 / 16, 500, math.inf
    invalid = "none" if head == "mix" and kind == "token" else "project"
    for joint, V, steps, window, schedule in (
            (THREE, 3, 1, 1.0, "quadratic"), (THREE, 3, 3, 1.0, "linear"),
            (THREE, 3, 5, 0.4, "quadratic"), (THREE, 3, 7, 0.7, "cosine"),
            (smooth, 4, 4, 1.0, "quadratic")):
        tau = [(1 - window) * x for x in (0.35, 0.85)]
        monkeypatch.setattr(bit_variants, "position_times",
                            lambda shape, *_: torch.tensor(tau).expand(shape))
        model, levels = Oracle(joint, V, 2, head, 0.6), path(steps, 2, tau, window, schedule)
        truth = chain_bound(model, levels, kind, invalid)
        cfg = config(V, 2, noise_window=window, schedule=schedule, sampler=sampler, **dict(
            head=model.cfg.head, num_mixture=model.cfg.num_mixture))
        nats = bit_variants.nelbo_steps(model, all_rows(V, 2).repeat_interleave(times, 0), cfg,
                                        generator(steps), steps)
        assert row_by_row(nats, truth, times)
        rows, _ = chain(model, levels, kind)
        exact = -torch.special.xlogy(joint, rows).sum()
        assert rows.sum().item() == pytest.approx(1)
        assert entropy(joint) - 1e-9 <= exact <= (joint * truth).sum() + 1e-9
    for steps in (1, 4, 16):  # exact posteriors: towards the entropy
        bound = (JOINT * chain_bound(Oracle(JOINT, 4, 2), path(steps, 2), kind)).sum()
        assert entropy(JOINT) < bound < last
        last = bound


# ---- training


@pytest.mark.parametrize("R", [0, 1])
@pytest.mark.parametrize("window,prefix", [(1.0, 0.0), (0.2, 0.0), (0.4, 0.7)])
def test_the_ce_loss_is_a_mean_of_means(R, window, prefix):
    """(E1) cross-entropy, or BCE, where lam < CLEAN, averaged in each row, then over rows; times
    are even over the batch; clean positions and prefixes are seen clean."""
    wide = dict(V=11, T=9, noise_window=window, prefix=prefix) | head_of(R)
    model, x0 = network(shake=0.3, **wide), torch.randint(11, (200, 9), generator=generator(1))
    noise = flips, lam, _ = bit_variants.corrupt(x0, model.cfg, generator(2))
    loss, is_noisy = bit_variants.loss_fn(model, x0, *noise), lam < CLEAN
    out, cost = model(model.codes[x0] * flips, lam), torch.zeros(200, 9)
    assert (flips[~is_noisy] == 1).all()
    if R:
        cost = F.binary_cross_entropy_with_logits(out, (model.codes[x0] > 0).float(),
                                                  reduction="none").sum(2)
    else:
        cost = F.cross_entropy(out.transpose(1, 2), x0, reduction="none")
    rows = [row[noisy].mean() for row, noisy in zip(cost, is_noisy) if noisy.any()]
    assert loss.item() == pytest.approx((sum(rows) / 200).item(), rel=1e-4)
    p = 1 / (1 + lam[is_noisy].double().exp())[:, None].expand(-1, 4)
    assert abs(((flips[is_noisy] < 0).double() - p).sum()) < 4.5 * (p * (1 - p)).sum().sqrt()
    if window == 1:  # one time in every 200th
        t = (2 / (lam[:, 0].double().exp() + 1)).sqrt()
        assert (t * 200 - torch.arange(200) - 0.5).abs().max() < 0.51


def test_a_prefix_is_as_long_and_as_frequent_as_stated(monkeypatch):
    """floor(T u) first positions, in a share `prefix` of the rows; never the whole row."""
    seen, times = [], bit_variants.position_times
    monkeypatch.setattr(bit_variants, "position_times", lambda shape, cfg, g, is_given:
                        seen.append(is_given) or times(shape, cfg, g, is_given))
    bit_variants.corrupt(torch.zeros(4000, 5).long(), config(T=5, prefix=0.6), generator(2))
    size = seen[0].sum(1)
    assert torch.equal(seen[0], torch.arange(5) < size[:, None]) and size.max() < 5
    want = 4000 * torch.tensor([0.4 + 0.6 / 5, *4 * [0.6 / 5]])
    assert stats.chisquare(size.bincount(minlength=5).numpy(), want.numpy()).pvalue > 1e-3


@each_head
@pytest.mark.parametrize("window", [1.0, 0.6])
def test_the_nelbo_loss_is_the_bound_per_token(head, window):
    """(E6) its mean over seeds is the quadrature over all bit strings, divided by T."""
    model, x0 = Oracle(THREE, 3, 2, head, 0.7), all_rows(3, 2).repeat(8, 1)
    cfg, model.cfg.loss = config(3, 2, loss="nelbo", noise_window=window), "nelbo"
    truth = path_bound(model, window).mean().item() / 2
    mean, se = mean_and_se(lambda g: loss_of(model, x0, cfg, g), 300)
    assert abs(mean - truth) < 4.5 * se and se < 0.03 * truth


# ---- the network


BITS = bit_diffusion.token_codes(11)[torch.randint(11, (3, 6), generator=generator(9))]
LAM = torch.linspace(0.3, 5, 18).view(3, 6)
NETWORKS = [dict(input=i, cond=c) | head_of(R) for R, i, c in (
    (0, "token", "none"), (0, "byte", "add"), (1, "token", "add"), (4, "bit", "none"),
    (1, "raw", "add"), (0, "raw", "none"))]
each_network = pytest.mark.parametrize("kind", NETWORKS,
                                       ids=lambda k: " ".join(map(str, k.values())))


@each_network
def test_each_position_sees_all_of_its_row_and_no_other_row(kind):
    """(E4) bits and noise levels of both sides; is_target selects positions of the output."""
    model = network(V=11, T=6, n_layer=2, shake=0.3, **kind)
    out = model(BITS, LAM).flatten(2)
    for j, what in itertools.product((0, 5), ("bits", "lam")):
        bits, lam = BITS.clone(), LAM.clone()
        if what == "bits":
            bits[1, j] *= -1
        else:
            lam[1, j] += 1.5
        change = (model(bits, lam).flatten(2) - out).abs().amax(2)
        blind = what == "lam" and kind["input"] == "raw" and kind["cond"] == "none"
        others = torch.arange(6) != j
        assert change[1, j] > 1e-5 and change[[0, 2]].max() < 1e-5
        assert (change[1][others] > 1e-6).all() != blind
    is_target = torch.rand(3, 6, generator=generator(1)) < 0.4
    assert torch.allclose(model(BITS, LAM, is_target).flatten(1), out[is_target], atol=1e-5)


@each_network
def test_both_ends_are_finite_and_every_parameter_learns(kind):
    """At lam 0, 1e-6, just below CLEAN and CLEAN, in float32 and under autocast; both losses and
    all bounds; no weight stays where it was; each has one optimizer."""
    lam = torch.tensor([[0.0, 1e-6, 2.0, CLEAN - 1e-3, CLEAN, CLEAN]]).expand(3, 6)
    x0, wide = torch.arange(18).view(3, 6) % 11, dict(V=11, T=6, n_layer=2, lr=1e-3) | kind
    for cast in (False, True):
        model = network(shake=0.3, **wide)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = model(BITS, lam)
            assert out.isfinite().all() and out.dtype == torch.float32
            total = out.square().mean()
            for loss in ("ce", "nelbo"):
                model.cfg = cfg = config(**wide, loss=loss, noise_window=0.5)
                total = total + loss_of(model, x0, cfg, generator(1))
            assert bit_variants.nelbo(model, x0, cfg, generator(1)).isfinite().all()
            assert bit_variants.nelbo_steps(model, x0, cfg, generator(1), 5).isfinite().all()
        total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model = network(**wide)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = bit_diffusion.make_optimizers(model, model.cfg)
    for step in range(6):
        loss_of(model, x0[:1].expand(16, 6), model.cfg, generator(step)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    owned = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(map(id, model.parameters()))


def test_the_input_is_what_input_says():
    """(E3) token: the expected embedding by own bits alone, that of the token when clean, zeros for
    pure noise; byte: the same for every eight bits; bit: a linear map of a_i b_i; raw: of b_i."""
    K, wide, lam = 9, dict(V=300, T=6), torch.tensor([[0.0, 0.7, 2.0, 6.0, CLEAN, CLEAN]])
    order = torch.randperm(300, generator=generator(1))
    model = network(order=order, **wide)
    bits = torch.randn(1, 6, K, generator=generator(2)).sign()
    bits[0, 4:] = model.codes[[270, 2]]

    def expected(table, codes, i, cut=slice(0, K)):
        same = (bits[0, i, cut] == codes).sum(1).double()
        p = right(lam[0, i]) ** same * (1 - right(lam[0, i])) ** (codes.shape[1] - same)
        return (p / p.sum()).float() @ table.weight
    got = model.embed(bits, lam)[0]
    assert (got[0] == 0).all() and torch.equal(got[4:], model.wte.weight[[270, 2]])
    for i in (1, 2, 3):
        assert torch.allclose(got[i], expected(model.wte, model.codes, i), atol=1e-6)
    model = network(order=order, input="byte", **wide)
    got = model.embed(bits, lam)[0]
    assert [w.weight.shape[0] for w in model.wte] == [256, 2] and (got[0] == 0).all()
    for i in range(1, 6):
        want = expected(model.wte[0], words(8).float(), i, slice(0, 8)) + \
            expected(model.wte[1], words(1).float(), i, slice(8, 9))
        assert torch.allclose(got[i], want, atol=1e-6)
    a = torch.tensor([2 * right(x) - 1 for x in lam[0]])[:, None]
    for kind, seen in (("bit", a * bits[0]), ("raw", bits[0])):
        model = network(input=kind, **wide)
        assert torch.allclose(model.embed(bits, lam)[0], seen @ model.wte.weight.T, atol=1e-6)


def test_the_noise_level_is_told_as_cond_says():
    """add: sinusoids of 1000 a at 64 frequencies; none, no self-likelihood: no level is felt."""
    for cond in ("none", "add"):
        model = network(V=11, T=6, input="raw", add_likelihood=False, cond=cond, shake=0.3)
        same = torch.allclose(model(BITS, LAM), model(BITS, LAM + 0.5), atol=1e-6)
        assert same == (cond == "none")
    seen = []
    model.noise_in.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model(BITS, LAM)
    angle = 1000 * (LAM.double() / 2).tanh()[..., None] * 10000 ** (-torch.arange(64) / 64).double()
    assert (seen[0] - torch.cat((angle.cos(), angle.sin()), -1)).abs().max() < 2e-3


@pytest.mark.parametrize("R,loss", [(0, "ce"), (1, "ce"), (4, "nelbo")])
def test_a_batch_can_be_learned_by_heart(R, loss):
    """(E6) (E8) three strings: the bound falls to near ln 3, never far below; samples are those."""
    x0 = torch.tensor([[1, 2, 3, 4], [6, 5, 4, 3], [9, 0, 10, 0]])
    wide = dict(V=11, T=4, loss=loss, noise_window=0.3, n_embd=32, lr=1e-2, warmup=10, steps=130,
                num_steps=40) | head_of(R)
    model, cfg, g = network(**wide), config(**wide), generator(1)
    optimizers = bit_diffusion.make_optimizers(model, cfg)
    for step in range(cfg.steps):
        for group in [group for o in optimizers for group in o.param_groups]:
            group["lr"] = bit_diffusion.get_lr(step, cfg) * group["scale"]
        loss_of(model, x0.repeat(12, 1), cfg, g).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    nats = bit_variants.nelbo(model, x0.repeat(60, 1), cfg, generator(2))
    assert math.log(3) - 0.2 < nats.mean() < math.log(3) + 1.6  # of 9.6 at first
    x, _ = bit_variants.sample(model, torch.full((60, 4), 11), cfg, generator(3))
    same = (x[:, None] == x0).all(2)
    assert same.any(1).float().mean() > 0.4 and same.any(0).all()  # by chance: 2e-4
