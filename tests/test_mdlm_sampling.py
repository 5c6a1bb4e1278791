"""The samplers of mdlm.py and lab/decoding.py against the enumerated distributions of what they
claim to be."""
import itertools
import math

import pytest
import torch
from scipy import stats

import mdlm
from lab import decoding
from lab.decoding import decode
from lab.mdlm_eval import fixed_order_nll
from lab.mdlm_variants import get_schedule
from tables import (MaskTable, all_rows, ancestral, chi_square, confidence, distribution,
                    enumerate_nll, first_positions, fixed_order, generator, one_by_one,
                    row_counts, transition, unmask_count)

M = 3  # the mask id of the three-token tables
SEED = 18  # of a table for which no two orders have the same distribution
ORDERS = ("random", "l2r", "maxprob", "margin", "entropy")
SAMPLERS = [*(dict(order=order) for order in ORDERS), dict(sampler="low_confidence")]
REMASKING = (dict(remask="random"), dict(remask="random", remask_rule="rescale"),
             dict(remask="conf"))
EVERY_SAMPLER = pytest.mark.parametrize("changes", SAMPLERS, ids=lambda c: [*c.values()][0])


def config(**changes):
    """One token a step at random: what the bound is about."""
    return decoding.Config(**(dict(vocab_size=3, seq_len=4, order="random", num_steps=0,
                                   temperature=1.0, remask="none") | changes))


def frames(model, cfg, x=50, seed=1, sample=decode):
    """All states of a run of a sampler, (NFE + 1, n, T), from the canvas x (n, T), or so many rows
    of masks."""
    if isinstance(x, int):
        x = torch.full((x, cfg.length or cfg.seq_len), cfg.vocab_size)
    before, states, ks = x.clone(), [x.clone()], [0]
    out, nfe = sample(model, x, cfg, generator(seed),
                      on_step=lambda k, x: (ks.append(k), states.append(x.clone())))
    assert torch.equal(x, before) and ks[-1] == nfe  # the caller's canvas is as it was
    assert ks == list(range(nfe + 1)) or cfg.guidance and ks == sorted(ks)
    assert torch.equal(states[-1], out) and 0 <= out.min() and out.max() < cfg.vocab_size
    return torch.stack(states)


def draw(model, cfg, x=20_000, seed=1, sample=decode):
    """How often each row occurs in samples, and NFE."""
    states = frames(model, cfg, x, seed, sample)
    return row_counts(states[-1], cfg.vocab_size), len(states) - 1


# ---- the distribution of the samples


@EVERY_SAMPLER
def test_one_token_a_step_has_the_distribution_of_its_order(changes):
    """(E5) chi-square against the enumerated distribution of this order, and of no other."""
    model = MaskTable(T=4, seed=SEED)
    want = one_by_one(model)
    counts, nfe = draw(model, config(**changes))
    assert chi_square(counts, want.pop([*changes.values()][0])) > 1e-3 and nfe == 4
    assert all(chi_square(counts, other) < 1e-6 for other in want.values())


@pytest.mark.parametrize("order", ORDERS)
def test_mdlm_samples_two_tokens_at_once(order):
    """(E5) in one step, both from the same p(. | x_t)."""
    model = MaskTable(T=4, seed=9)
    counts, nfe = draw(model, config(order=order, num_steps=2), sample=mdlm.sample)
    want = distribution(model, 2 * [unmask_count(model, 2, order)])
    assert chi_square(counts, want) > 1e-3 and nfe == 2


@pytest.mark.parametrize("name, steps, n", [("linear", 500, 3000), *itertools.product(
    ("linear", "cosine"), (1, 4, 16), (20_000,))])
def test_the_ancestral_sampler_is_a_product_of_transition_matrices(name, steps, n):
    """(E5) chi-square; a row alone costs at most one evaluation a token."""
    model = MaskTable(seed=steps)
    gamma = get_schedule(name)[0](torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    cfg = config(seq_len=3, ancestral=True, num_steps=steps, sampling_schedule=name)
    want = distribution(model, ancestral(model, gamma.tolist()))
    assert chi_square(draw(model, cfg, n)[0], want) > 1e-3
    assert all(1 <= draw(model, cfg, 1, seed)[1] <= min(steps, 3) for seed in range(10))


@pytest.mark.parametrize("order", ["maxprob", "margin", "entropy"])
def test_chance_breaks_ties_between_equally_confident_positions(order):
    """Where the network knows nothing each position is as likely as any other to be the first."""
    began = (frames(MaskTable(T=4, scale=0), config(order=order), 4000)[1] != M).sum(0)
    assert began.sum() == 4000 and stats.chisquare(began.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("order", ["random", "l2r", "maxprob"])
@pytest.mark.parametrize("tau", [0.5, 0.65])
def test_a_threshold_unmasks_every_confident_position_and_at_least_one(order, tau):
    """Chi-square: all positions with max p >= tau, and the first of the order, at once."""
    model = MaskTable(seed=14, scale=1.5)
    is_mask, confident = model.states == M, model.p().amax(2) >= tau
    one = is_mask / is_mask.sum(1, keepdim=True).clamp(min=1).double() if order == "random" else \
        first_positions(model, confidence(model, order)).double()
    assert confident[is_mask].double().mean() > 0.2
    step = transition(model, confident) * (~is_mask).all(1, keepdim=True)
    for i in range(3):  # the one that is unmasked in any case
        step += transition(model, confident | (torch.arange(3) == i)) * one[:, i:i + 1]
    cfg = config(seq_len=3, order=order, sampler="threshold", threshold=tau, num_steps=1)
    counts, nfe = draw(model, cfg)
    assert chi_square(counts, distribution(model, 3 * [step])) > 1e-3 and nfe <= 3


def test_temperature_changes_the_distribution_as_it_says():
    """One step at temperature 0.5: independent draws from p^2, normalised. At 0 the most likely
    token at every position; top-k 1 is the same; LLaDA's remasking is then maxprob."""
    model = MaskTable(T=4, seed=SEED)
    p = model.p()[-1] ** 2  # all masked
    want = torch.einsum("i,j,k,l->ijkl", *p / p.sum(1, keepdim=True)).flatten()
    cfg = config(num_steps=1, temperature=0.5)
    assert chi_square(draw(model, cfg, sample=mdlm.sample)[0], want) > 1e-3
    best, x = model.p().argmax(2), frames(model, config(temperature=0))
    for before, after in zip(x, x[1:]):
        new = before != after
        assert torch.equal(after[new], best[(before * model.place).sum(1)][new])
    assert torch.equal(x, frames(model, config(top_k=1)))
    assert torch.equal(frames(model, config(temperature=0, order="maxprob"))[-1],
                       frames(model, config(temperature=0, sampler="low_confidence"))[-1])


@pytest.mark.parametrize("order", ["random", "maxprob"])
@pytest.mark.parametrize("row", [[2, M, M], [1, M, 2], [M, 0, M]])
def test_given_tokens_stay_and_the_rest_is_drawn_given_them(row, order):
    """(E5) a prompt, a single masked token and one in the middle."""
    model, row = MaskTable(seed=12), torch.tensor(row)
    N = int((row == M).sum())
    counts, nfe = draw(model, config(seq_len=3, order=order), row.expand(20_000, 3))
    want = distribution(model, N * [unmask_count(model, 1, order)], row)
    assert chi_square(counts, want) > 1e-3 and nfe == N
    assert (counts[(all_rows(3, 3) != row)[:, row != M].any(1)] == 0).all()


@pytest.mark.parametrize("changes", [
    dict(num_steps=0), dict(num_steps=2), dict(num_steps=30), dict(num_steps=30, ancestral=True),
    dict(num_steps=3, order="maxprob"), dict(sampler="threshold"), dict(sampler="low_confidence"),
    dict(num_steps=9, remask="conf"), dict(num_steps=9, remask="random", ancestral=True),
    dict(block=2), dict(guidance=1.0), dict(eos_fill=True, eos=1), dict(eos_last=True, eos=1)])
def test_every_pattern_of_masks_keeps_what_is_given(changes):
    """All 256 rows of tokens and masks at once; a canvas without masks costs nothing."""
    model, x = MaskTable(T=4, seed=14), all_rows(4, 4)
    assert (frames(model, config(**changes), x) == x)[:, x != M].all()
    assert len(frames(model, config(**changes), all_rows(3, 4))) == 1


def test_only_wanted_masks_become_tokens_and_what_on_step_fills_in_costs_no_step():
    model, wanted = MaskTable(T=4), torch.tensor([True, True, True, False])
    x = torch.tensor([[M, M, 0, M], [1, M, M, M]])
    out, nfe = mdlm.sample(model, x, config(), generator(1), wanted.expand(2, 4))
    assert torch.equal(out == M, (x == M) & ~wanted) and nfe == 2
    assert torch.equal(out[x != M], x[x != M])
    fill = lambda k, x: x[:, 2:].fill_(1)  # noqa: E731
    out, nfe = mdlm.sample(model, x[1:], config(order="l2r"), generator(1), on_step=fill)
    assert nfe == 1 and out[0, 2:].tolist() == [1, 1] and out[0, 1] < M


# ---- steps


def plan(N, steps, step_counts=mdlm.step_counts, **changes):
    """What each of so many steps unmasks and remasks of N (B,) tokens: (2, steps, B)."""
    left, g, plan = N.clone(), generator(0), []
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, s in zip(times, times[1:]):
        plan.append(torch.stack(step_counts(left, N, t, s, config(**changes), g)))
        left = left - plan[-1][0] + plan[-1][1]
    assert not left.any()
    return torch.stack(plan, 1)


def sigma_of(eta, how):
    """(E6) the probability of remasking, by ReMDM's two rules."""
    def sigma(t, s):
        most = min(1.0, s / (1 - t)) if t < 1 and how.get("remask", "none") != "none" else 0.0
        return eta * most if how.get("remask_rule") == "rescale" else min(eta, most)
    return sigma


@pytest.mark.parametrize("how", [dict(), *REMASKING], ids=("none", "cap", "rescale", "conf"))
@pytest.mark.parametrize("name", ["linear", "cosine", "log-linear", "power2"])
def test_floor_n_gamma_masks_are_left_after_each_step(name, how):
    """(E5) and sigma of the unmasked tokens are remasked (E6), in mdlm.py as many as can be."""
    rates = {"linear": lambda t: t, "cosine": lambda t: 1 - math.cos(math.pi / 2 * t),
             "log-linear": lambda t: 1 - (1 - t) ** 2, "power2": lambda t: t * t}[name]
    sizes = ((64, 7), (41, 41), (111, 111), (5, 40), (11, 4), (0, 2))
    for (N, steps), eta in itertools.product(sizes, (0.37, 1)):
        gamma = [rates(k / steps) for k in range(steps, -1, -1)]
        left = [math.floor(N * rate + 1e-6) for rate in gamma]
        remask = [min(round(sigma_of(eta, how)(t, s) * (N - a)), b)
                  for t, s, a, b in zip(gamma, gamma[1:], left, left[1:])]
        want = [[a - b + r for a, b, r in zip(left, left[1:], remask)], remask]
        both = eta == 1 and name == "linear"
        for step_counts in (decoding.step_counts, mdlm.step_counts)[:1 + both]:
            got = plan(torch.tensor([N, N]), steps, step_counts, sampling_schedule=name,
                       remask_eta=eta, **how)
            assert (got == torch.tensor(want)[..., None]).all()


@EVERY_SAMPLER
def test_masks_disappear_and_tokens_stay(changes):
    """A token never changes; every step unmasks something; the same generator repeats all of it;
    without options lab's decode is mdlm.sample."""
    model, cfg = MaskTable(T=4, seed=14), config(num_steps=3, **changes)
    x = frames(model, cfg, 200, 5)
    assert ((x[:-1] == x[1:]) | (x[:-1] == M)).all() and (x[:-1] != x[1:]).flatten(1).any(1).all()
    assert torch.equal(x, frames(model, cfg, 200, 5))
    assert not torch.equal(x[-1], frames(model, cfg, 200, 6)[-1])
    for remask in ("none", "conf") if "order" in changes else ():
        cfg = config(num_steps=3, remask=remask, top_p=0.9, **changes)
        assert torch.equal(frames(model, cfg, 200), frames(model, cfg, 200, sample=mdlm.sample))


def test_fixed_order_nll_is_the_likelihood_of_unmasking_in_a_fixed_order():
    """(E4) for every permutation; the mean over all T! of them is the bound."""
    model, rows, mean = MaskTable(T=4, seed=15), all_rows(3, 4), 0
    for order in itertools.permutations(range(4)):
        nll = fixed_order_nll(model, rows, config(), order)
        assert torch.allclose((-nll).exp(), fixed_order(model, order), atol=1e-6)
        mean = mean + nll / 24
    assert torch.allclose(mean, enumerate_nll(model, rows, config())[0], atol=1e-5)
