"""The sampler of mdlm.py against the enumerated laws of what it claims to be."""
import math

import pytest
import torch
from scipy import stats

import mdlm
from tables import (MaskTable, all_rows, ancestral, chi_square, generator, law, markov, one_by_one,
                    oracle, reveal_count, row_counts)

M = 3  # the mask id of the three-token tables


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


@pytest.mark.parametrize("order", ["random", "maxprob"])
def test_one_token_per_step_has_the_law_of_its_order(order):
    """(E7) random: the likelihood that `exact` computes; maxprob: its own enumerated law."""
    model = MaskTable(seed=8)
    laws = {how: law(model, 3 * [reveal_count(model, 1, how)]) for how in ("random", "maxprob")}
    assert torch.allclose(laws["random"], one_by_one(model), atol=1e-12)
    nll = torch.stack([mdlm.exact(model, x0, config())[1] for x0 in all_rows(3, 3)])
    assert torch.allclose(laws["random"], (-nll).exp(), atol=1e-6)
    _, counts, info = draw(model, config(order=order))
    assert chi_square(counts, laws[order]) > 1e-3 and info["nfe"] == 3
    other = laws["maxprob" if order == "random" else "random"]
    assert chi_square(counts, other) < 1e-6  # the two differ, and the test can tell


@pytest.mark.parametrize("order", ["random", "maxprob"])
def test_even_quotas_reveal_two_then_one(order):
    """(E7) three tokens in two steps: both tokens of the first step from the same p(. | x_t)."""
    model = MaskTable(seed=9)
    _, counts, info = draw(model, config(order=order, sampling_steps=2))
    want = law(model, [reveal_count(model, 2, order), reveal_count(model, 1, order)])
    assert chi_square(counts, want) > 1e-3 and info["nfe"] == 2


@pytest.mark.parametrize("order", ["random", "maxprob"])
def test_with_true_conditionals_one_token_per_step_is_exact_in_any_order(order):
    """(E7) a position chosen without looking at the drawn token does not change the law; two
    tokens at once ignore what they know of each other."""
    joint = markov(3, 4, seed=3, stick=1.0)
    model = oracle(joint, 3, 4)
    assert chi_square(draw(model, config(seq_len=4, order=order))[1], joint) > 1e-3
    fast = draw(model, config(seq_len=4, order=order, sampling_steps=2))[1]
    assert chi_square(fast, joint) < 1e-6


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


@pytest.mark.parametrize("quota", ["even", "binomial"])
def test_quotas_sum_to_the_tokens_and_skip_empty_steps(quota):
    """Rows sum to N, zeros come last, no column is all zero; also with more steps than tokens."""
    todo = torch.rand(50, 11, generator=generator(1)) < torch.linspace(0, 1.01, 50)[:, None]
    for steps in (1, 3, 11, 12, 500):
        counts = plan(todo, steps, quota=quota)
        assert torch.equal(counts.sum(1), todo.sum(1)) and (counts >= 0).all()
        assert ((counts[:, 1:] == 0) | (counts[:, :-1] > 0)).all()
        assert (counts > 0).any(0).all() and counts.shape[1] <= min(steps, 11)


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


@pytest.mark.parametrize("quota", ["even", "binomial"])
@pytest.mark.parametrize("order", ["random", "maxprob"])
def test_the_trace_shows_masks_disappear_and_tokens_stay(quota, order):
    """(E7) a written token never changes; every frame writes something; no mask is left."""
    model, trace = MaskTable(T=4, seed=14), []
    cfg = config(seq_len=4, order=order, quota=quota, sampling_steps=3)
    x, info = mdlm.sample(model, cfg, 200, generator(5), trace=trace)
    assert [k for k, _ in trace] == list(range(info["nfe"] + 1))
    assert (trace[0][1] == M).all() and torch.equal(trace[-1][1], x) and not (x == M).any()
    for (_, before), (_, after) in zip(trace, trace[1:]):
        assert ((before == after) | (before == M)).all() and (before != after).any()


def test_sampling_repeats_with_the_same_generator():
    model = MaskTable()
    for changes in (dict(), dict(quota="binomial"), dict(order="maxprob", top_p=0.9)):
        cfg = config(**changes)
        rows = [mdlm.sample(model, cfg, 50, generator(seed))[0] for seed in (1, 1, 2)]
        assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
