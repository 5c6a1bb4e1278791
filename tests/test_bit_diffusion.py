"""Bit diffusion: codes, times, noise, posterior, heads, bounds, losses and the network, against
Bayes' rule and enumeration; the script, and what lab/bit_variants.py adds to it."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import bit_diffusion
from bit_tables import (Oracle, chain, chain_bound, channel, independent, numbers, odds_of, path,
                        path_bound, posterior, right, settings, width, words)
from lab import bit_variants
from oracles import all_rows, close, dirichlet, entropy, generator, mean_and_se, row_by_row

CLEAN = bit_diffusion.CLEAN
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


@pytest.mark.parametrize("R, V, input", [(1, 28, "bit"), (2, 28, "raw"), (4, 3, "byte"),
                                         (2, 1000, "byte")])
def test_a_fresh_bit_head_costs_k_ln_2_and_its_products_differ(R, V, input):
    """(E6) (V2) T K ln 2 nats whatever the tokens; the products, uniform together, lean to leading
    bits of their own, so that they learn apart."""
    wide = dict(V=V, T=6, noise_window=0.3, input=input) | head_of(R)
    model, x0, K = network(**wide), torch.randint(V, (256, 6), generator=generator(1)), width(V)
    nats = bit_variants.nelbo(model, x0, config(**wide), generator(2), 8)
    assert nats.dtype == torch.float64 and close(nats, 6 * K * math.log(2), 4)
    out = model(words(K).float()[None, :2], torch.zeros(1, 2)).flatten(0, 1)
    p = code_distribution(out, K)
    assert torch.allclose(p, torch.full_like(p, 2.0 ** -K), atol=1e-6)
    if R > 1:
        assert len({tuple(row.tolist()) for row in out[0, :, :-1].sign()}) == R
        loss_of(model, x0, model.cfg, generator(2)).backward()
        grad = model.head.weight.grad.view(R, K + 1, -1)
        assert all((p - q).abs().max() > 1e-4 for p, q in itertools.combinations(grad, 2))


def test_the_self_likelihood_is_float32_and_all_levels_are_finite_under_autocast():
    """(E3) where bfloat16 would lose whole nats; logits are float32, and finite, from lam = 0 to
    CLEAN, and so are the gradients."""
    for R in (0, 1, 2):
        model = network(V=1000, shake=0.1, **head_of(R))
        bits = torch.randn(20, 10, generator=generator(1)).sign()
        lam = torch.cat((torch.tensor([0.0, 1e-6, CLEAN - 1e-3, CLEAN]), torch.linspace(0, 39, 16)))
        zero = outputs(1000, R, 20, 0.0, generator(1))
        plain = bit_variants.bayes_update(model, zero, bits, lam)
        with torch.autocast("cpu", torch.bfloat16):
            low = bit_variants.bayes_update(model, zero.bfloat16(), bits, lam)
            assert low.dtype == torch.float32 and torch.equal(low, plain) and plain.max() > 30
            out = model(bits.view(10, 2, 10), lam.view(10, 2))
        assert out.dtype == torch.float32 and out.isfinite().all()
        out.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


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
        want = -p[torch.arange(50), number[x0] if R else x0].log()
        ce = bit_variants.cross_entropy(model, out, x0)
        assert torch.allclose(ce.double(), want, atol=1e-5)
        if R < 2:
            assert torch.allclose(bit_variants.confidence(model, out).double(), p.amax(1))
    out = torch.tensor([[[9.0, -9.0, 0.0], [-1.0, 1.0, 0.5]]])  # the second is likelier, yet vague
    p = bit_variants.confidence(network(**head_of(2)), out).item()
    assert p == pytest.approx(1 / (1 + math.exp(0.5)) / (1 + math.exp(-9)) ** 2, rel=1e-5)
    out = torch.tensor([[0.0, 0, -2, -5]]) + math.log(1e-12) * torch.tensor([0, 1, 1, 1])
    z = out[0].double().exp()
    want = torch.stack([(z[0] + z[1]) / (z[2] + z[3]), (z[0] + z[2]) / (z[1] + z[3])]).log()
    assert torch.allclose(-bit_variants.bit_logits(network(), out)[0], want, atol=1e-9)


# ---- bounds


def test_the_integrand_is_finite_and_0_where_the_clean_bits_are_certain():
    """(E6) also at both ends; its formula is in the bounds below."""
    g = generator(1)
    lam, clean = 6 * torch.rand(200, generator=g).double(), torch.randn(200, 3, generator=g).sign()
    bits = torch.randn(200, 3, generator=g).sign()
    certain = bit_diffusion.nelbo_integrand(60 * clean.double(), bits, clean, lam)
    assert certain.abs().max() < 1e-6
    for value, odd in itertools.product((1e-6, CLEAN - 1e-3), (-CLEAN, 0.0, CLEAN)):
        ends = bit_diffusion.nelbo_integrand(torch.full((8, 1), odd).double(), words(3)[:, :1],
                                             words(3)[:, 1:2], torch.full((8,), value))
        assert ends.isfinite().all() and (ends > -1e-6).all()


@pytest.mark.parametrize("head", ["token", "bit", "mix"])
@pytest.mark.parametrize("window,schedule", [(1.0, "linear"), (0.3, "quadratic"),
                                             (0.6, "cosine")])
def test_the_estimate_of_the_bound_is_unbiased(head, window, schedule):
    """(E2) (E6) a network that errs, against quadrature for each row; an exact one: -log p."""
    module, times = bit_diffusion if head == "token" else bit_variants, 800
    cfg = config(3, 2, noise_window=window, schedule=schedule)
    x0, model = all_rows(3, 2).repeat_interleave(times, 0), Oracle(THREE, 3, 2, head, 0.7)
    truth = path_bound(model, window, schedule)
    assert (truth > -THREE.log() + 0.005).any()
    for K in (1, 4):
        assert row_by_row(module.nelbo(model, x0, cfg, generator(K), K), truth, times)
    if head == "bit":
        nats = module.nelbo(Oracle(THREE, 3, 2, head), x0, cfg, generator(3), 4)
        assert row_by_row(nats, -THREE.log(), times)


@pytest.mark.parametrize("head,sampler", [("token", "token"), ("token", "bit"), ("bit", "token"),
                                          ("mix", "token"), ("mix", "bit")])
def test_the_bound_of_few_steps_is_unbiased_and_above_the_sampler(head, sampler, monkeypatch):
    """(E8) (V4) (V5) a network that errs, against enumeration of all bit strings for each row; H <=
    -E log p of the chain, exact by products of matrices, <= its bound. Products of a mixture are
    not credited with the redrawing of codes of no token."""
    kind = "token" if sampler == "token" and head != "bit" else "bit"
    smooth, times = 0.8 * JOINT + 0.2 / 16, 500
    invalid = "none" if head == "mix" and kind == "token" else "project"
    for joint, V, steps, window, schedule in (
            (THREE, 3, 1, 1.0, "quadratic"), (THREE, 3, 5, 0.4, "quadratic"),
            (THREE, 3, 7, 0.7, "cosine"), (smooth, 4, 4, 1.0, "linear")):
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


# ---- training


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
