"""Masked diffusion: schedules, corruption, bounds and losses against enumeration."""
import itertools
import math

import pytest
import torch
from scipy import stats

import common
import mdlm
from lab import decoding, mdlm_variants
from lab.mdlm_eval import nelbo_steps
from lab.mdlm_variants import DRAWS, get_schedule
from oracles import all_rows, chi_square, close, generator, mean_and_se, row_counts
from tables import (MaskTable, ancestral, distribution, enumerate_nll, expected_cost, pattern_costs,
                    quadrature, unmask_count)

SCHEDULES = ("linear", "cosine", "log-linear", "maskgit", "power2")
LOSSES = ("mean_per_sequence", "mean_per_batch", "nelbo")
ROWS = all_rows(3, 3)
X0 = torch.tensor([2, 0, 1, 1])
LN3 = torch.tensor(3.0).log()


def config(**changes):
    return decoding.Config(**(dict(vocab_size=3, seq_len=3) | changes))


def loss_of(model, x0, cfg, g):
    """The training loss of mdlm.py, with the corruption of lab/mdlm_variants.py."""
    return mdlm.loss_fn(model, x0, *mdlm_variants.corrupt(x0, cfg, g))


# ---- schedules, times, masks


@pytest.mark.parametrize("name", SCHEDULES + ("power0.5", "mdlm-loglinear"))
def test_a_schedule_rises_from_0_to_1_with_its_stated_rate_and_inverse(name):
    """(E1) gamma(0) = 0, gamma(1) = 1, but for MDLM's cut-off; the second function is the
    derivative of the first; in float32 the digits are kept at small t."""
    gamma_of, rate_of, inverse = get_schedule(name)
    ends = torch.tensor([0, 0.999 if "mdlm" in name else 1], dtype=torch.float64)
    assert torch.allclose(gamma_of(torch.tensor([0, 1], dtype=torch.float64)), ends, atol=1e-15)
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    gamma = gamma_of(t)
    assert (gamma.diff() > 0).all()
    assert torch.allclose(rate_of(t), torch.autograd.grad(gamma.sum(), t)[0], atol=1e-12)
    assert torch.allclose(inverse(gamma), t, atol=1e-12)
    assert inverse(ends).tolist() == pytest.approx([0, 1], abs=1e-12)
    small = torch.tensor([1e-4, 1e-3, 1e-2])
    assert torch.allclose(gamma_of(small).double(), gamma_of(small.double()), rtol=1e-6)


@pytest.mark.parametrize("name", ["Linear", "power", "power0", "power-1", "powerx", "log_linear"])
def test_an_unknown_or_ambiguous_schedule_is_refused(name):
    with pytest.raises(common.UserError, match="ambiguous.*SEDD and MDLM.*mdlm-loglinear.*elsewhere"
                       if "log" in name else "linear, cosine.*MD4's cosine is maskgit here"):
        get_schedule(name)


@pytest.mark.parametrize("how", DRAWS)
def test_t_is_uniform_and_spread_evenly_as_promised(how):
    """low_discrepancy and stratified put one t in each of B cells, low_discrepancy with one
    offset; antithetic times come in pairs u, 1 - u; iid times do none of this."""
    g = generator(5)
    t = torch.stack([DRAWS[how](5, g) for _ in range(4000)])
    columns = [t.flatten()] if how == "stratified" else t.T  # row j of stratified has cell j
    assert all(stats.kstest(c.numpy(), "uniform").pvalue > 1e-3 for c in columns)
    t = DRAWS[how](13, g)
    assert t.shape == (13,) and 0 <= t.min() and t.max() < 1
    cells, gaps = sorted((t * 13).long().tolist()), t.sort().values.diff() - 1 / 13
    assert (cells == list(range(13))) == (how in ("stratified", "low_discrepancy"))
    assert (gaps.abs().max() < 1e-6) == (how == "low_discrepancy")
    assert torch.allclose(t[:6] + t[7:], torch.ones(6)) == (how == "antithetic")


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_independent_masks_have_the_rate_gamma(gamma):
    """(E1) M where masked, x_0 elsewhere; the number of masks is binomial(T, gamma): 5-sigma rates
    and a chi-square; nothing at rate 0, everything at 1."""
    n, x0 = 20_000, torch.randint(3, (20_000, 4), generator=generator(0))
    xt = mdlm_variants.mask_independently(x0, torch.full((n,), gamma), config(), generator(2))
    is_mask = xt == 3
    assert torch.equal(xt[~is_mask], x0[~is_mask])
    error = (is_mask.double().mean(0) - gamma).abs().max()
    assert error <= 5 * math.sqrt(gamma * (1 - gamma) / n)
    p = stats.binom(4, gamma).pmf(range(5))
    assert gamma in (0, 1) or chi_square(is_mask.sum(1).bincount(minlength=5), p) > 1e-3


def test_mask_tokens_masks_exactly_n_positions_all_subsets_alike():
    """(E4) each of the C(4, 2) pairs is as likely; given positions are never masked."""
    n = torch.arange(5).repeat(6000)
    x0 = torch.ones(len(n), 4, dtype=torch.long)
    xt = mdlm.mask_tokens(x0, n, config(), generator(3))
    assert torch.equal((xt == 3).sum(1), n) and torch.equal(xt[xt != 3], x0[xt != 3])
    pairs = row_counts(xt[n == 2] // 3, 2)
    assert stats.chisquare(pairs[pairs > 0].numpy()).pvalue > 1e-3 and (pairs > 0).sum() == 6
    is_given = torch.rand(len(n), 4, generator=generator(4)) < 0.4
    is_mask = mdlm.mask_tokens(x0, n, config(), generator(5), is_given) == 3
    assert not (is_mask & is_given).any()
    assert torch.equal(is_mask.sum(1), torch.minimum(n, (~is_given).sum(1)))


def test_uniform_n_is_the_textbook_forward_process_and_short_runs_draw_n_in_proportion_to_n():
    """corrupt draws each set of n masks with probability (2 n - 1) / T^2 / C(T, n) in short runs,
    1 / T / C(T, n) in long ones, and the weight 1 / n. (E4) With the latter the expected loss over
    all of them is (E3), the integral over t of gamma' / gamma times the cost under (E1), for every
    row and schedule."""
    T, B, model, rows = 4, 24_000, MaskTable(T=4, seed=1), all_rows(3, 4)
    patterns = all_rows(2, T).bool()
    n = patterns.sum(1).double()
    p = torch.tensor([0.0] + [1 / (T * math.comb(T, k)) for k in patterns.sum(1)[1:].tolist()])
    for steps, times in (3999, (2 * n - 1).clamp(min=0) / T), (4000, torch.ones(2 ** T)):
        xt, weight = mdlm.corrupt(torch.ones(B, T, dtype=torch.long), config(steps=steps),
                                  generator(1))
        is_mask = xt == 3
        assert chi_square(row_counts(is_mask.long(), 2), p * times) > 1e-3
        want = torch.zeros(T + 1).double().index_add(0, n.long(), (B * p * times).double())
        assert (is_mask.sum(1).bincount() - want).abs().max() <= 1
        assert torch.allclose(B * weight, is_mask / is_mask.sum(1, keepdim=True))
    with torch.no_grad():
        loss = torch.stack([sum(p[k] * mdlm.loss_fn(model, x0, x0.masked_fill(m, 3), m / n[k])
                                for k, m in enumerate(patterns) if k) for x0 in rows[:, None]])
    for name in SCHEDULES:
        textbook = quadrature(model, *get_schedule(name)[:2]) / T
        assert torch.allclose(loss.double(), textbook, atol=1e-5)


@pytest.mark.parametrize("steps, schedule", [(1600, "power0.5"), (10000, "linear")])
def test_lab_corrupts_as_mdlm_does(steps, schedule):
    """The same masks and weights from the same generator state."""
    x0 = torch.randint(3, (50, 9), generator=generator(1))
    cfg = config(steps=steps, schedule=schedule)
    for a, b in zip(mdlm.corrupt(x0, cfg, generator(2)),
                    mdlm_variants.corrupt(x0, cfg, generator(2))):
        assert torch.allclose(a.float(), b.float(), rtol=1e-4)


# ---- bounds


@pytest.mark.parametrize("name, steps", [("linear", 1), ("cosine", 4), ("linear", 16)])
def test_the_bound_of_n_steps_is_above_the_n_step_sampler_and_tight_for_one(name, steps):
    """(E5) sum over the steps of (gamma_k - gamma_{k-1}) / gamma_k E sum_masked c_i, unbiased, and
    above -log p of the sampler, by its transition matrices."""
    model = MaskTable(seed=3)
    gamma = get_schedule(name)[0](torch.linspace(0, 1, steps + 1, dtype=torch.float64)).tolist()
    truth = sum((t - s) / t * expected_cost(model, t) for s, t in zip(gamma, gamma[1:]))
    p = distribution(model, ancestral(model, gamma))
    assert p.sum().item() == pytest.approx(1, abs=1e-12) and (truth >= -p.log() - 1e-12).all()
    cfg, x0 = config(sampling_schedule=name), ROWS[5].expand(4000, 3)
    assert close(nelbo_steps(model, x0, cfg, generator(steps), steps), truth[5])
    assert steps > 1 or torch.allclose(truth, -p.log(), atol=1e-12)


def test_nelbo_is_unbiased_and_spreads_less_than_random_t():
    """(E4) stratified n: mean within 4 standard errors of the enumerated bound, for any K, and for
    K = 8 less variance than 8 iid t with independent masks and weight 1 / t."""
    T, B, model = 4, 4000, MaskTable(T=4, seed=2)
    x0, g, iid = torch.zeros(B, T, dtype=torch.long), generator(2), 0
    truth = enumerate_nll(model, x0[:1], config())[0].item()
    for _ in range(8):
        t = torch.rand(B, generator=g)
        xt = mdlm_variants.mask_independently(x0, t, config(), g)
        iid = iid + mdlm.masked_ce(model, x0, xt).sum(1).detach() / t / 8
    ours = [mdlm.nelbo(model, x0, config(), generator(K), K) for K in (8, 1, 5)]
    assert all(close(draws, truth, 4) for draws in (iid, *ours))
    assert ours[0].var() < 0.5 * iid.var()


def test_the_bound_given_some_tokens_is_the_sum_over_sets_of_the_others():
    """(E4) rows of a batch have different given tokens; above -log p of unmasking the others one by
    one. With nothing given the same numbers as without; nothing wanted costs nothing."""
    B, model = 1500, MaskTable(T=4, seed=16)
    costs, patterns = pattern_costs(model, X0[None], 3)
    costs, step = costs[:, 0].sum(1), unmask_count(model, 1)
    x0, is_given = X0.expand(16 * B, 4), ~patterns.repeat_interleave(B, 0)
    draws = mdlm.nelbo(model, x0, config(), generator(3), 3, is_given).view(16, B)
    assert (draws[0] == 0).all()
    for wanted, row in zip(patterns[1:], draws[1:]):
        N, inside = int(wanted.sum()), ~(patterns & ~wanted).any(1)
        truth = sum(costs[inside & (patterns.sum(1) == n)].mean().item() / n
                    for n in range(1, N + 1))
        assert close(row, truth)
        p = distribution(model, N * [step], X0.masked_fill(wanted, 3))[row_counts(X0[None], 3) > 0]
        assert truth >= -math.log(p) - 1e-12
    nothing = torch.zeros(50, 4, dtype=torch.bool)
    assert torch.equal(mdlm.nelbo(model, x0[:50], config(), generator(2), 8, nothing),
                       mdlm.nelbo(model, x0[:50], config(), generator(2)))


# ---- training losses


@pytest.mark.parametrize("t_sampler", DRAWS)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_uniform_logits_cost_ln_v_per_token(name, t_sampler):
    """(E2) (E3) (E4) (E5) the cheapest test of all weights and normalisations: nelbo and the means
    exactly, the rest on average."""
    model, x0 = MaskTable(scale=0), torch.randint(3, (4096, 3), generator=generator(0))
    assert torch.allclose(mdlm.nelbo(model, x0, config(), generator(1)).float() / 3, LN3)
    assert close(nelbo_steps(model, x0, config(sampling_schedule=name), generator(2), 5) / 3, LN3)
    for loss, exact_count in itertools.product(LOSSES, (True, False)):
        cfg = config(loss=loss, schedule=name, exact_count=exact_count, t_sampler=t_sampler)
        if loss == "nelbo" and not (exact_count and name == "linear"):
            mean, se = mean_and_se(lambda g: loss_of(model, x0, cfg, g), 8)
            assert abs(mean - LN3) < 6 * se + 1e-6
        else:
            assert torch.allclose(loss_of(model, x0, cfg, generator(1)), LN3)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("exact_count", [True, False])
def test_the_weighted_loss_is_the_bound_per_token_for_every_schedule(name, exact_count):
    """(E3) independent masks with weight gamma' / gamma, (E4) exactly n with weight 1 / (T P(n)).
    With the linear schedule the mean per row needs no weight; without weights another schedule, or
    the mean over the batch, is something else."""
    model, x0 = MaskTable(T=4, seed=5), torch.tensor([0, 2, 1, 2])
    bound, batch = enumerate_nll(model, x0[None], config())[0].item() / 4, x0.expand(4000, 4)
    for loss in LOSSES:
        cfg = config(loss=loss, schedule=name, exact_count=exact_count)
        with torch.no_grad():
            mean, se = mean_and_se(lambda g: loss_of(model, batch, cfg, g), 20)
        if loss == "nelbo" or loss == "mean_per_sequence" and name == "linear":
            assert abs(mean - bound) < 5 * se < 5e-2
        elif name in ("linear", "log-linear"):
            assert abs(mean - bound) > 1e-3 + 5 * se


@pytest.mark.parametrize("name", SCHEDULES + ("power0.5", "mdlm-loglinear"))
def test_the_weight_of_n_masks_is_one_over_t_times_its_probability(name):
    """(E4) by a million times on a grid; of mdlm-loglinear also that of all T masks."""
    T, gamma_of = 10, get_schedule(name)[0]
    n = 1 + (T * gamma_of((torch.arange(10 ** 6, dtype=torch.float64) + 0.5) / 10 ** 6)).floor()
    p = n.long().clamp(max=T).bincount(minlength=T + 1) / 1e6
    cfg = config(seq_len=T, loss="nelbo", schedule=name, steps=10)
    xt, weight = mdlm_variants.corrupt(torch.zeros(3000, T).long(), cfg, generator(0))
    n = (xt != 0).sum(1)
    assert set(n.tolist()) == set(range(1, T + 1))
    assert torch.allclose(weight.sum(1).double() * 3000 * T * p[n], torch.ones(3000).double(),
                          atol=1e-3)


# ---- the network


def tiny(cond="none", shake=0.0):
    """lab's Model, which is mdlm's for cond none; shaken: weights far from their initial zeros."""
    torch.manual_seed(0)
    cfg = config(vocab_size=7, seq_len=6, n_layer=2, n_head=2, n_embd=16, cond=cond, lr=1e-3)
    model, g = mdlm_variants.Model(cfg), generator(1)
    for p in model.parameters():
        p.data += shake * torch.randn(p.shape, generator=g)
    return model, cfg


CONDITIONS = ("none", "add", "table", "adaln")
XT = torch.randint(8, (5, 6), generator=generator(9))


@pytest.mark.parametrize("cond", CONDITIONS)
def test_conditioning_starts_as_no_conditioning_and_comes_alive(cond):
    """The weights of mdlm.Model give the same logits under every cond while the noise parameters
    are untouched; afterwards they differ. The share of masks is what it is told."""
    plain, (model, cfg) = tiny(shake=0.3)[0], tiny(cond)
    real = mdlm.Model(cfg)
    assert (real(XT) == 0).all() and (model(XT) == 0).all()  # (E2) the first loss is ln V
    real.load_state_dict(plain.state_dict())
    assert torch.equal(real(XT), plain(XT))
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.allclose(model(XT), plain(XT), atol=1e-6)
    for name, p in model.named_parameters():
        p.data += 0.3 * torch.randn(p.shape) * ("noise" in name or "ada" in name)
    assert torch.equal(model(XT), plain(XT)) == (cond == "none")
    if cond != "none":
        few, many, moved = torch.tensor([[7, 1, 1, 1], [7, 7, 7, 1], [2, 0, 3, 7]])
        told = [model.embed_noise(idx[None]) for idx in (few, many, moved)]
        assert torch.equal(told[0], told[2]) and not torch.allclose(told[0], told[1])


def test_masked_logits_look_right_as_well_as_left():
    """(E2) p(. | x_t) at a mask depends on tokens on both sides; `is_target` only selects."""
    model, xt = tiny(shake=0.3)[0], torch.tensor([[1, 2, 7, 3, 7, 5]])
    logits = model(xt)
    for j in (0, 5):
        other = xt.clone()
        other[0, j] = 6
        assert (model(other)[0, 2] - logits[0, 2]).abs().max() > 1e-3
    assert torch.allclose(model(xt, xt == 7), logits[xt == 7], atol=1e-6)
