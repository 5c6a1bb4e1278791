"""The sampler of mdlm.py against the enumerated laws of what it claims to be."""
import itertools
import math

import pytest
import torch
from scipy import stats

import mdlm
from tables import (MaskTable, all_rows, ancestral, certainty, chain, chi_square, first, generator,
                    law, markov, one_by_one, oracle, reveal_count, reveal_sampled, row_counts, told,
                    transition)

M = 3  # the mask id of the three-token tables
BLIND = ("random", "maxprob", "margin", "entropy", "l2r")  # these choose before they draw
ORDERS = (*BLIND, "sampled")
QUOTAS = ("even", "grid", "binomial", "one", "threshold")
SEED = 18  # of a table for which no two orders have the same law


def config(**changes):
    return mdlm.Config(**(dict(vocab_size=3, seq_len=3) | changes))


def draw(model, cfg, n=60_000, seed=1, **given):
    """Samples that hold only real tokens, and how often each row occurs."""
    x, info = mdlm.sample(model, cfg, n, generator(seed), **given)
    assert x.shape == (n, cfg.seq_len) and 0 <= x.min() and x.max() < cfg.vocab_size
    return x, row_counts(x, cfg.vocab_size), info


# ---- the law of the samples


@pytest.mark.parametrize("steps", [1, 2, 4, 16])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_binomial_quotas_are_the_ancestral_sampler(name, steps):
    """(E6) chi-square of 60 000 rows against the product of N transition matrices."""
    model = MaskTable(seed=steps)
    grid = mdlm.get_schedule(name)[0](torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    cfg = config(quota="binomial", sampling_steps=steps, grid=name)
    _, counts, info = draw(model, cfg)
    assert chi_square(counts, law(model, ancestral(model, grid.tolist()))) > 1e-3
    assert info["nfe"] <= min(steps, 3)


def test_a_thousand_steps_cost_at_most_one_call_per_token():
    """(E6) the law of 1000 ancestral steps at 3 network calls for any number of rows."""
    model = MaskTable(seed=7)
    _, counts, info = draw(model, config(quota="binomial", sampling_steps=1000), 15_000)
    steps = ancestral(model, [k / 1000 for k in range(1001)])
    assert chi_square(counts, law(model, steps)) > 1e-3 and info["nfe"] == 3


def laws_of_one_by_one(model):
    """Of every order: the enumerated law of one token per step."""
    steps = {order: reveal_count(model, 1, order) for order in BLIND}
    return {order: law(model, model.T * [step]) for order, step in
            (steps | {"sampled": reveal_sampled(model)}).items()}


def test_one_token_per_step_in_random_order_is_the_likelihood_that_exact_computes():
    """(E7) the law of the sampler, the mean over T! orders and the recursion over subsets."""
    model = MaskTable(seed=8)
    random = laws_of_one_by_one(model)["random"]
    nll = torch.stack([mdlm.exact(model, x0, config())[1] for x0 in all_rows(3, 3)])
    assert torch.allclose(random, one_by_one(model), atol=1e-12)
    assert torch.allclose(random, (-nll).exp(), atol=1e-6)


@pytest.mark.parametrize("tilt", [0.0, 1.0])
@pytest.mark.parametrize("order", ORDERS)
def test_one_token_per_step_has_the_law_of_its_order(order, tilt):
    """(E7) chi-square against the enumerated law of this order, and of no other; also where the
    network is told the mask rate."""
    model = MaskTable(T=4, seed=SEED, tilt=tilt)
    laws = laws_of_one_by_one(told(model))
    cfg = config(seq_len=4, order=order, quota="one", sampling_steps=2)
    _, counts, info = draw(model, cfg, 20_000)
    assert chi_square(counts, laws.pop(order)) > 1e-3 and info["nfe"] == 4
    if tilt == 0:  # the laws differ, and the test can tell
        assert all(chi_square(counts, other) < 1e-6 for other in laws.values())


@pytest.mark.parametrize("order", BLIND)
def test_even_quotas_reveal_two_then_one(order):
    """(E7) three tokens in two steps: both tokens of the first step from the same p(. | x_t)."""
    model = MaskTable(seed=9)
    _, counts, info = draw(model, config(order=order, sampling_steps=2), 30_000)
    want = law(model, [reveal_count(model, 2, order), reveal_count(model, 1, order)])
    assert chi_square(counts, want) > 1e-3 and info["nfe"] == 2


def test_with_true_conditionals_one_token_per_step_is_exact_unless_tokens_choose_positions():
    """(E7) enumerated: a position chosen without looking at the drawn token does not change the
    law, in any order; order sampled is more than 0.3 nats away, on every chain."""
    for seed in range(4):
        joint = markov(3, 4, seed=seed, stick=1.0)
        laws = laws_of_one_by_one(oracle(joint, 3, 4))
        kl = {order: (p * (p / joint).log()).sum().item() for order, p in laws.items()}
        assert kl.pop("sampled") > 0.3
        assert all(abs(value) < 1e-12 for value in kl.values())


@pytest.mark.parametrize("order", ORDERS)
def test_the_sampler_with_true_conditionals_draws_the_data_one_token_per_step(order):
    """(E7) 20 000 rows, except in order sampled; two tokens at once ignore what they know of each
    other."""
    joint = markov(3, 4, seed=3, stick=1.0)
    model = oracle(joint, 3, 4)
    p = chi_square(draw(model, config(seq_len=4, order=order), 20_000)[1], joint)
    assert p < 1e-6 if order == "sampled" else p > 1e-3
    fast = draw(model, config(seq_len=4, order=order, sampling_steps=2), 20_000)[1]
    assert chi_square(fast, joint) < 1e-6


def test_at_temperature_zero_order_sampled_is_maxprob():
    """(E7) the likeliest token is the drawn one: how LLaDA is run."""
    model = MaskTable(T=4, seed=SEED)
    rows = [mdlm.sample(model, config(seq_len=4, order=order, temperature=0), 3, generator(1))[0]
            for order in ("sampled", "maxprob")]
    assert torch.equal(*rows)


@pytest.mark.parametrize("order", ["maxprob", "margin", "entropy"])
def test_chance_breaks_ties_between_equally_certain_positions(order):
    """Where the network knows nothing each position is as likely as any other to be the first."""
    model, trace = MaskTable(T=4, scale=0), []
    mdlm.sample(model, config(seq_len=4, order=order), 4000, generator(1), trace=trace)
    began = (trace[1][1] != M).sum(0)
    assert began.sum() == 4000 and stats.chisquare(began.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("order", ["random", "l2r", "maxprob"])
@pytest.mark.parametrize("tau", [0.5, 0.65])
def test_threshold_quotas_reveal_every_sure_position_and_at_least_one(order, tau):
    """(E7) chi-square: all positions with max p >= tau, and the first of the order, at once."""
    model = MaskTable(seed=14, scale=1.5)
    masked = model.states == M
    one = masked / masked.sum(1, keepdim=True).clamp(min=1).double() if order == "random" else \
        first(model, certainty(model, order)).double()
    sure = model.p().amax(2) >= tau
    assert sure[masked].double().mean() > 0.2
    steps = transition(model, sure) * (~masked).all(1, keepdim=True)
    for i in range(3):  # the one that is written in any case
        always = sure | (torch.arange(3) == i)
        steps += transition(model, always) * one[:, i:i + 1]
    cfg = config(order=order, quota="threshold", threshold=tau, sampling_steps=1)
    _, counts, info = draw(model, cfg, 20_000)
    assert chi_square(counts, law(model, 3 * [steps])) > 1e-3 and info["nfe"] <= 3


@pytest.mark.parametrize("order", ORDERS)
def test_a_threshold_of_zero_is_one_call_and_of_one_is_one_token_per_call(order):
    model = MaskTable(T=4, seed=SEED)
    for tau, calls in ((0.0, 1), (1.0, 4)):
        cfg, trace = config(seq_len=4, order=order, quota="threshold", threshold=tau), []
        assert mdlm.sample(model, cfg, 20, generator(1), trace=trace)[1]["nfe"] == calls
        assert all(((x == M).sum(1) == 4 - k * 4 // calls).all() for k, x in trace)
    model.logits.data[..., 1] += 999  # as sure as one can be
    assert mdlm.sample(model, cfg, 20, generator(1))[1]["nfe"] == 1


def test_temperature_zero_writes_the_likeliest_token():
    """(E7) at every call, at every position; top-k 1 is the same."""
    model, trace = MaskTable(seed=10), []
    x, _ = mdlm.sample(model, config(temperature=0), 50, generator(1), trace=trace)
    best = model.p().argmax(2)
    for (_, before), (_, after) in zip(trace, trace[1:]):
        wrote = before != after
        assert torch.equal(after[wrote], best[(before * model.place).sum(1)][wrote])
    assert torch.equal(x, mdlm.sample(model, config(top_k=1), 50, generator(1))[0])


def test_temperature_changes_the_law_as_it_says():
    """(E7) one step at temperature 0.5: independent draws from p^2, normalised."""
    model = MaskTable(seed=11)
    p = model.p()[-1] ** 2  # all masked
    p = p / p.sum(1, keepdim=True)
    want = torch.einsum("i,j,k->ijk", *p).flatten()
    counts = draw(model, config(sampling_steps=1, temperature=0.5))[1]
    assert chi_square(counts, want) > 1e-3


# ---- given tokens


@pytest.mark.parametrize("order", ["random", "maxprob"])
def test_a_prompt_is_kept_and_the_rest_drawn_given_it(order):
    """(E7) from the state [2, M, M]."""
    model, prompt = MaskTable(seed=12), torch.tensor([2])
    x, counts, info = draw(model, config(order=order), 30_000, prompt=prompt)
    want = law(model, 2 * [reveal_count(model, 1, order)], torch.tensor([2, M, M]))
    assert (x[:, 0] == 2).all() and info["nfe"] == 2
    assert chi_square(counts, want) > 1e-3


def test_a_single_hole_is_filled_from_the_network():
    """(E7) infilling one token draws from p_theta(. | both sides)."""
    model, given = MaskTable(seed=13), torch.tensor([1, M, 2])
    x, counts, info = draw(model, config(), 30_000, start=given.expand(30_000, 3))
    assert (x[:, [0, 2]] == given[[0, 2]]).all() and info["nfe"] == 1
    p = model.p()[(given * model.place).sum(), 1]
    assert chi_square(x[:, 1].bincount(minlength=3), p) > 1e-3


def test_rows_with_different_holes_keep_what_is_given():
    """Each row has its own pattern, from nothing given to everything given."""
    cfg = config(vocab_size=5, seq_len=9)
    torch.manual_seed(0)
    model = mdlm.Model(mdlm.Config(vocab_size=5, seq_len=9, n_layer=1, n_head=1, n_embd=8))
    start = torch.randint(5, (20, 9), generator=generator(1))
    hidden = torch.rand(20, 9, generator=generator(2)) < torch.linspace(0, 1.01, 20)[:, None]
    start = start.masked_fill(hidden, 5)
    assert not hidden[0].any() and hidden[-1].all()
    for quota in ("even", "binomial"):
        for order in ("random", "maxprob"):
            for steps in (0, 2, 30):
                cfg.quota, cfg.order, cfg.sampling_steps = quota, order, steps
                before = start.clone()
                x, info = mdlm.sample(model, cfg, 20, generator(3), start=start)
                assert torch.equal(x[~hidden], start[~hidden]) and x.max() < 5
                assert torch.equal(before, start) and info["nfe"] <= 9
    whole = mdlm.sample(model, cfg, 3, generator(3), start=torch.ones(3, 9, dtype=torch.long))
    assert torch.equal(whole[0], torch.ones(3, 9, dtype=torch.long)) and whole[1]["nfe"] == 0


def test_the_network_is_told_the_mask_rate_it_was_trained_on():
    """(E1) gamma = masked / T at every call, with a prompt and with holes too: the number that the
    losses and bounds pass for the same x_t."""
    class Spy(MaskTable):
        def forward(self, xt, gamma, where=None):
            seen.append((xt.clone(), gamma.clone()))
            return super().forward(xt, gamma, where)

    seen, model = [], Spy()
    mdlm.sample(model, config(), 8, generator(1))
    mdlm.sample(model, config(order="maxprob"), 8, generator(1), prompt=torch.tensor([1]))
    mdlm.sample(model, config(), 2, generator(1), start=torch.tensor([[0, M, 1], [M, M, 2]]))
    mdlm.nelbo(model, torch.zeros(9, 3, dtype=torch.long), config(), generator(1))
    mdlm.loss_fn(model, torch.zeros(9, 3, dtype=torch.long), config(), generator(1))
    mdlm.exact(model, torch.zeros(3, dtype=torch.long), config())
    for xt, gamma in seen:
        assert torch.allclose(gamma, (xt == M).float().mean(1))


# ---- the plan


def plan(todo, steps, seed=0, **changes):
    show, hide = mdlm.plan(todo, steps, config(**changes), generator(seed))
    assert show.shape == hide.shape and not hide.any()
    return show


@pytest.mark.parametrize("quota", QUOTAS)
def test_quotas_sum_to_the_tokens_and_skip_empty_steps(quota):
    """Rows sum to N, zeros come last, no column is all zero; also with more steps than tokens."""
    todo = torch.rand(50, 11, generator=generator(1)) < torch.linspace(0, 1.01, 50)[:, None]
    for steps in (1, 3, 11, 12, 500):
        counts = plan(todo, steps, quota=quota, grid="cosine")
        assert torch.equal(counts.sum(1), todo.sum(1)) and (counts >= 0).all()
        assert ((counts[:, 1:] == 0) | (counts[:, :-1] > 0)).all() and (counts > 0).any(0).all()
        one = quota in ("one", "threshold")
        assert counts.shape[1] <= (11 if one else min(steps, 11)) and (not one or counts.max() == 1)
    assert plan(todo[:1], 3, quota=quota).shape == (1, 0) and not todo[0].any()


@pytest.mark.parametrize("quota", ["even", "grid", "one", "threshold"])
def test_no_number_of_steps_means_one_token_per_step(quota):
    todo = torch.tensor([[True] * 5, [True, False, True, False, False]])
    want = [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert plan(todo, 0, quota=quota, grid="cosine").tolist() == want


@pytest.mark.parametrize("name", ["linear", "cosine", "log-linear", "power2"])
def test_grid_quotas_follow_the_mask_rates(name):
    """floor(N gamma) masks are left after each step, except where a step has nothing to do."""
    rates = {"linear": lambda t: t, "cosine": lambda t: 1 - math.cos(math.pi / 2 * t),
             "log-linear": lambda t: 1 - (1 - t) ** 2, "power2": lambda t: t * t}[name]
    for N, steps in ((64, 7), (10, 5), (5, 40)):
        left = [math.floor(N * rates(k / steps) + 1e-6) for k in range(steps, -1, -1)]
        want = [a - b for a, b in zip(left, left[1:]) if a > b]
        todo = torch.ones(2, N, dtype=torch.bool)
        assert plan(todo, steps, quota="grid", grid=name).tolist() == [want, want]
        if name == "linear":
            assert plan(todo, steps, quota="even", grid="cosine").tolist() == [want, want]


def test_even_quotas_differ_by_at_most_one():
    todo = torch.ones(1, 11, dtype=torch.bool)
    assert plan(todo, 4).tolist() == [[3, 3, 3, 2]]
    assert plan(todo, 11).tolist() == plan(todo, 99).tolist() == [[1] * 11]


@pytest.mark.parametrize("name", ["linear", "cosine", "log-linear"])
def test_binomial_quotas_have_the_law_of_the_skipped_ancestral_steps(name):
    """(E6) at every step each masked token is revealed with probability (gamma_t - gamma_s) /
    gamma_t: an own step-by-step simulation, then the empty steps dropped, by enumeration."""
    steps, want = 4, {}
    grid = mdlm.get_schedule(name)[0](torch.linspace(0, 1, steps + 1, dtype=torch.float64)).tolist()

    def walk(left, k, path, p):  # all ways to reveal the last tokens in steps k, k-1, ..., 1
        if k == 0:
            path = tuple(n for n in path if n)
            want[path] = want.get(path, 0) + p
            return
        r = (grid[k] - grid[k - 1]) / grid[k]
        for n in range(left + 1):
            walk(left - n, k - 1, path + (n,), p * stats.binom(left, r).pmf(n))

    walk(3, steps, (), 1.0)
    want = {path: p for path, p in want.items() if p > 1e-12}
    counts = plan(torch.ones(20_000, 3, dtype=torch.bool), steps, quota="binomial", grid=name)
    got = [tuple(n for n in row if n) for row in counts.tolist()]
    assert chi_square([got.count(path) for path in want], list(want.values())) > 1e-3
    assert set(got) <= set(want)


@pytest.mark.parametrize("steps, T", [(50, 128), (1000, 128), (20, 7)])
def test_the_expected_number_of_calls_has_a_closed_form(steps, T):
    """(E6) linear: N (1 - (1 - 1/N)^T), within 4 standard errors."""
    calls = (plan(torch.ones(2000, T, dtype=torch.bool), steps, quota="binomial") > 0).sum(1)
    want = steps * (1 - (1 - 1 / steps) ** T)
    assert abs(calls.double().mean() - want) < 4 * calls.double().std() / math.sqrt(2000)


@pytest.mark.parametrize("quota", QUOTAS)
@pytest.mark.parametrize("order", ORDERS)
def test_the_trace_shows_masks_disappear_and_tokens_stay(quota, order):
    """(E7) a written token never changes; every frame writes something; no mask is left; the same
    generator repeats all of it."""
    model, traces = MaskTable(T=4, seed=14), []
    cfg = config(seq_len=4, order=order, quota=quota, sampling_steps=3, threshold=0.6)
    for seed in (5, 5, 6):
        trace = []
        x, info = mdlm.sample(model, cfg, 200, generator(seed), trace=trace)
        assert sorted({k for k, _ in trace}) == list(range(info["nfe"] + 1))
        assert (trace[0][1] == M).all() and torch.equal(trace[-1][1], x) and not (x == M).any()
        for (a, before), (b, after) in zip(trace, trace[1:]):
            assert ((before == after) | (before == M)).all()
            assert b == a + (before != after).any()
        traces.append(torch.stack([frame for _, frame in trace]))
    assert torch.equal(*traces[:2]) and not torch.equal(traces[0][-1], traces[2][-1])


def test_the_trace_ends_with_the_last_call():
    """One frame per network call and one before them, also where fewer calls were needed than
    planned; a film of equal pictures shows nothing."""
    for changes in (dict(quota="threshold", threshold=0.0), dict(eos_fill=True, eos=0)):
        cfg, trace = config(seq_len=4, order="l2r", temperature=0, **changes), []
        model = MaskTable(T=4, seed=16)
        model.logits.data[..., 0] += 9  # EOS at once
        _, info = mdlm.sample(model, cfg, 5, generator(1), trace=trace)
        assert [k for k, _ in trace] == [0, 1] and info["nfe"] == 1


def test_binomial_quotas_without_a_number_of_steps_are_one_token_per_step():
    """--sampling-steps: 0 = quota one."""
    todo = torch.ones(50, 6, dtype=torch.bool)
    assert (plan(todo, 0, quota="binomial") == 1).all()


# ---- the likelihood of a fixed order


@pytest.mark.parametrize("tilt", [0.0, 1.0])
def test_chain_nll_is_the_likelihood_of_writing_in_a_fixed_order(tilt):
    """(E4) for every permutation the enumerated law, which sums to one; from left to right that of
    order l2r; the mean over all T! permutations is the bound."""
    model, rows = MaskTable(T=4, seed=15, tilt=tilt), all_rows(3, 4)
    cfg, plain, mean = config(seq_len=4), told(model), 0
    for order in itertools.permutations(range(4)):
        nll = mdlm.chain_nll(model, rows, cfg, order)
        assert nll.shape == (81,) and torch.allclose((-nll).exp(), chain(plain, order), atol=1e-6)
        assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-5)
        mean = mean + nll / 24
    bound = torch.stack([mdlm.exact(model, x0, cfg)[0] for x0 in rows])
    assert torch.allclose(mean, bound, atol=1e-5)
    l2r = mdlm.chain_nll(model, rows, cfg, torch.arange(4))
    assert torch.allclose((-l2r).exp(), laws_of_one_by_one(plain)["l2r"], atol=1e-6)
