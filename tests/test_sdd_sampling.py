"""The samplers of sdd.py against exact laws: steps of evidence, chains by quadrature, joint laws of
two and three tokens, what is given, temperature, guidance, clocks, the trace, the original's
sampler."""
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import sdd
from sdd_tables import Oracle, believed, chain_law, dirichlet, marginals, path, settings
from tables import all_rows, chi_square, generator, row_counts

SURE = sdd.SURE
JOINT, THREE = dirichlet(4, 2, 3), dirichlet(3, 3, 2)
TWO = torch.tensor([0.5, 0.12, 0.06, 0.32]).double()  # V = 2, T = 2
SAMPLERS = pytest.mark.parametrize("sampler", ["token", "ancestral", "deterministic"])


def config(V=4, T=2, **changes):
    return sdd.Config(**settings(V, T, **changes))


def three(tilt=0.0):
    return Oracle(THREE, 3, 3, tilt)


def fixed_clocks(monkeypatch, tau):
    monkeypatch.setattr(sdd, "clocks", lambda shape, *_: torch.tensor(tau).expand(shape).clone())


def normal(x, mean, variance, width=4.5):
    """Do numbers (n, ...) have this mean and variance, within so many standard errors?"""
    x, n = x.double(), len(x)
    mean, variance = (torch.as_tensor(y).double() for y in (mean, variance))
    return ((x.mean(0) - mean).abs() < width * (variance / n).sqrt() + 1e-5).all() and \
        ((x.var(0) - variance).abs() < width * variance * (2 / n) ** 0.5 + 1e-5).all()


# ---- a step of evidence


def several(s, V=3, n=30_000, seed=1):
    """Evidence of precision s about token 1: (n, V)."""
    eps = torch.randn(n, V, generator=generator(seed))
    return s * F.one_hot(torch.tensor(1), V) + s ** 0.5 * eps


def moved(z, s, then, goal, sampler="token", seed=2):
    xi = torch.randn(z.shape, generator=generator(seed))
    s, then = (torch.full((len(z),), float(y)) for y in (s, then))
    return sdd.move(z, s, then, goal, xi, sampler)


@pytest.mark.parametrize("sampler", ["token", "ancestral"])
@pytest.mark.parametrize("s,half,then", [(0.0, 1.0, 4.0), (2.0, 2.5, 9.0), (5.0, 120.0, 200.0)])
def test_a_step_up_has_the_law_of_more_evidence(sampler, s, half, then):
    """(E1) (E7) towards e_x: Normal(s' e_x, s'), the increment independent of what was; two steps
    have the law of one; towards any g the mean moves by (s' - s) g."""
    e = F.one_hot(torch.tensor(1), 3).float().expand(30_000, 3)
    z = several(s)
    once = moved(z, s, then, e, sampler)
    twice = moved(moved(z, s, half, e, sampler), half, then, e, sampler, 3)
    for after in (once, twice):
        assert normal(after, then * e[0], then) and normal(after - z, (then - s) * e[0], then - s)
        both = ((after - z - (then - s) * e[0]) * (z - s * e[0])).double().mean(0)
        assert (both.abs() < 4.5 * ((then - s) * s / len(z)) ** 0.5 + 1e-5).all()
    goal = torch.tensor([0.2, 0.7, 0.1])
    assert normal(moved(z, s, then, goal.expand_as(z), sampler) - z, (then - s) * goal, then - s)


@SAMPLERS
@pytest.mark.parametrize("s,then", [(9.0, 4.0), (200.0, 3.0), (50.0, 49.0), (7.0, 0.0)])
def test_a_step_down_is_what_a_shorter_measurement_would_have_shown(sampler, s, then):
    """(E9) Normal(s' e_x, s'), covariance with what was s': as for two times of one Brownian
    motion, of which z(s) - z(s') is independent; the goal is of no matter; nothing is nothing."""
    z = several(s)
    after = moved(z, s, then, torch.full_like(z, 7.0), sampler)
    e = torch.tensor([0.0, 1.0, 0.0])
    assert normal(after, then * e, then)
    low, high = (after - then * e).double(), (z - s * e).double()
    wide = 4.5 * (s * then * 2 / len(z)) ** 0.5 + 1e-5
    assert ((low * high).mean(0) - then).abs().max() < wide
    assert normal(z - after, (s - then) * e, s - then)
    wide = 4.5 * (then * (s - then) / len(z)) ** 0.5 + 1e-5
    assert (low * (high - low)).mean(0).abs().max() < wide
    assert then > 0 or (after == 0).all()
    assert torch.equal(moved(z, s, s, 0 * z, "token"), z)  # no step


def test_up_and_down_again_is_one_law_for_each_row():
    """(E7) (E9) rows of different precisions in one call: some rise, some fall."""
    n = 30_000
    s, then = torch.tensor([2.0, 8.0, 0.0]).repeat(n), torch.tensor([6.0, 3.0, 1.0]).repeat(n)
    e = F.one_hot(torch.tensor(1), 3).float().expand(3 * n, 3)
    z = sdd.evidence(torch.ones(3 * n).long(), s, torch.randn(3 * n, 3, generator=generator(1)))
    after = sdd.move(z, s, then, e, torch.randn(3 * n, 3, generator=generator(2)), "token")
    for i, level in enumerate((6.0, 3.0, 1.0)):
        assert normal(after[i::3], level * e[0], level)
    back = sdd.move(after, then, s, e, torch.randn(3 * n, 3, generator=generator(3)), "ancestral")
    assert normal(back[::3], 2 * e[0], 2.0) and (back[2::3] == 0).all()


def test_the_deterministic_step_is_the_flow_of_one_answer():
    """(E7) dz/ds = (p + z / s) / 2 with a fixed p, by many small Euler steps; halves compose; from
    nothing s' p + sqrt(s') xi."""
    p, s, then = torch.tensor([[0.2, 0.7, 0.1]]).double(), 1.5, 7.0
    z = torch.tensor([[1.0, -2.0, 3.0]]).double()
    y, n = z.clone(), 20_000
    for k in range(n):
        y = y + (p + y / (s + (then - s) * (k + 0.5) / n)) / 2 * (then - s) / n
    got = moved(z, s, then, p, "deterministic")
    assert torch.allclose(got, y, atol=1e-3)
    assert torch.allclose(moved(moved(z, s, 4, p, "deterministic"), 4, then, p, "deterministic"),
                          got, atol=1e-5)
    xi = torch.randn(1, 3, generator=generator(2))
    nothing = moved(0 * z.float(), 0, then, p.float(), "deterministic")
    assert torch.allclose(nothing, then * p.float() + then ** 0.5 * xi)
    assert nothing.isfinite().all()


# ---- the law of every sampler


CHAINS = [(2, 1.0, "rational", [0.0, 0.0]), (2, 1.0, "exponential", [0.0, 0.0]),
          (2, 0.5, "rational", [0.1, 0.3]), (3, 0.4, "rational", [0.05, 0.55]),
          (1, 1.0, "rational", [0.0, 0.0])]


@SAMPLERS
@pytest.mark.parametrize("steps,window,schedule,tau", CHAINS, ids=str)
def test_a_sampler_has_the_law_of_its_chain(sampler, steps, window, schedule, tau, monkeypatch):
    """(E5) (E7) 20 000 rows of a network that errs, in few steps, each position by its own clock:
    chi-square against quadrature that knows nothing of the script."""
    fixed_clocks(monkeypatch, tau)
    model = Oracle(TWO, 2, 2, 0.9)
    law = chain_law(model, path(steps, 2, tau, window, schedule), sampler)
    cfg = config(2, sampler=sampler, sampling_steps=steps, window=window, schedule=schedule)
    x, info = sdd.sample(model, cfg, 20_000, generator(1))
    assert x.shape == (20_000, 2) and info["nfe"] == len(model.calls) <= steps
    if sampler == "deterministic" and steps == 1:
        assert (x == x[0]).all()
    else:
        assert chi_square(row_counts(x, 2), law) > 1e-3


@SAMPLERS
def test_three_steps_of_one_position(sampler):
    """(E7) evidence is carried from step to step: chi-square."""
    model = Oracle(torch.tensor([0.7, 0.3]).double(), 2, 1, 0.9)
    law = chain_law(model, path(3, 1, schedule="exponential"), sampler)
    cfg = config(2, 1, sampler=sampler, sampling_steps=3, schedule="exponential")
    x, _ = sdd.sample(model, cfg, 20_000, generator(2))
    assert chi_square(row_counts(x, 2), law) > 1e-3


def test_the_chains_of_different_samplers_differ():
    """The tests above can tell them apart."""
    model = Oracle(TWO, 2, 2, 0.9)
    laws = [chain_law(model, path(2, 2), sampler)
            for sampler in ("token", "ancestral", "deterministic")]
    for p, q in itertools.combinations(laws, 2):
        assert 20_000 * ((p - q).square() / q).sum() > 40
    one = Oracle(torch.tensor([0.7, 0.3]).double(), 2, 1, 0.9)
    assert (chain_law(one, path(3, 1), "token")[0] - 0.7).abs() > 0.02


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_tokens_of_one_position_are_exact_in_any_number_of_steps(steps):
    """(E7) sampler token: the mixture is the true transition, so the prior comes out; k = 2 of 5
    candidates are no loss as all evidence is added."""
    prior = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).double()
    for k, schedule in ((5, "rational"), (2, "exponential")):
        cfg = config(5, 1, k=k, sampling_steps=steps, schedule=schedule)
        x, info = sdd.sample(Oracle(prior, 5, 1), cfg, 10_000, generator(steps))
        assert chi_square(x.flatten().bincount(minlength=5), prior) > 1e-3 and info["nfe"] == steps


def test_the_deterministic_flow_keeps_the_law_of_the_evidence():
    """(E7) one position, exact answers, many steps: tokens have the prior's law, and on the way the
    evidence that of Normal(s e_v, s) mixed by the prior, as the shown posterior says."""
    prior, n = torch.tensor([0.6, 0.3, 0.1]).double(), 5000
    model, trace = Oracle(prior, 3, 1), []
    cfg = config(3, 1, sampler="deterministic", sampling_steps=100, schedule="exponential")
    x, _ = sdd.sample(model, cfg, n, generator(4), trace=trace)
    assert chi_square(x.flatten().bincount(minlength=3), prior) > 1e-3
    for at in (30, 60, 85):
        _, _, s, ids, logp = trace[at]
        got = believed(ids, logp, 3)[:, 0]
        v = torch.multinomial(prior, n, True, generator=generator(at))
        z = sdd.evidence(v, s[:, 0], torch.randn(n, 3, generator=generator(at + 1)))
        want = z.double().log_softmax(1)
        for a, b in ((0, 1), (1, 2)):
            assert stats.ks_2samp(got[:, a] - got[:, b], want[:, a] - want[:, b]).pvalue > 1e-3


@pytest.mark.parametrize("clock", ["random", "l2r", "maxprob"])
@pytest.mark.parametrize("window,steps", [(0.2, 60), (1.0, 40)])
def test_many_steps_of_exact_posteriors_draw_the_joint_law(clock, window, steps):
    """(E4) (E5) (E7) sampler token, k = V: chi-square over all rows, while the product of the
    marginals is out of the question. Which position begins may depend on the state."""
    n = 4000
    cfg = config(window=window, clock=clock, sampling_steps=steps, schedule="exponential")
    x, _ = sdd.sample(Oracle(JOINT, 4, 2), cfg, n, generator(4))
    assert chi_square(row_counts(x, 4), JOINT) > 1e-3
    alone = marginals(JOINT, 4, 2)
    assert chi_square(row_counts(x, 4), (alone[0][:, None] * alone[1]).flatten()) < 1e-6


@pytest.mark.parametrize("sampler", ["ancestral", "deterministic"])
def test_other_samplers_draw_nearly_the_joint_law(sampler):
    """(E7) many steps: every row within 0.03 of its share."""
    cfg = config(sampler=sampler, sampling_steps=100, schedule="exponential")
    x, _ = sdd.sample(Oracle(JOINT, 4, 2), cfg, 3000, generator(5))
    assert (row_counts(x, 4) / 3000 - JOINT).abs().max() < 0.03


def test_one_step_draws_every_token_for_itself():
    """(E7) the product of the marginals: what few steps cost."""
    alone = marginals(JOINT, 4, 2)
    x, info = sdd.sample(Oracle(JOINT, 4, 2), config(sampling_steps=1), 5000, generator(4))
    assert chi_square(row_counts(x, 4), (alone[0][:, None] * alone[1]).flatten()) > 1e-3
    assert info == dict(nfe=1)


# ---- temperature and filters


def answers(monkeypatch):
    """What filter_logits gets and returns, and what predict returns."""
    seen, cut, predict = [], sdd.filter_logits, sdd.predict
    def filtered(logits, cfg):
        out = cut(logits, cfg)
        seen.append(("cut", logits, out))
        return out
    def predicted(*args):
        out = predict(*args)
        seen.append(("predict", *out))
        return out
    monkeypatch.setattr(sdd, "filter_logits", filtered)
    monkeypatch.setattr(sdd, "predict", predicted)
    return seen


@pytest.mark.parametrize("skip", ["evidence", "state", "none"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_temperature_is_for_context_alone(skip, temperature, monkeypatch):
    """(E6) net / temperature + own evidence, at every step; without own evidence for all."""
    seen = answers(monkeypatch)
    cfg = config(3, 3, k=2, skip=skip, temperature=temperature, sampling_steps=6, window=0.5)
    sdd.sample(three(0.5), cfg, 30, generator(1), torch.tensor([2]))
    assert len(seen) >= 8
    for (_, out, own), (_, _, logits) in zip(seen[::2], seen[1::2]):
        assert torch.allclose(logits, (out - own) / temperature + own, atol=1e-4)
        assert skip != "none" or (own == 0).all()
    assert skip == "none" or max(own.abs().max() for _, _, own in seen[2::2]) > 1


def test_temperature_of_one_step_is_a_power_of_the_law():
    """(E6) p^(1 / temperature) where nothing is known; 0 is the likeliest token, always."""
    p = torch.tensor([0.5, 0.2, 0.05, 0.25]).double()
    for temperature in (0.5, 2.0):
        law = p ** (1 / temperature)
        cfg = config(4, 1, sampling_steps=1, temperature=temperature)
        x, _ = sdd.sample(Oracle(p, 4, 1), cfg, 5000, generator(6))
        assert chi_square(x.flatten().bincount(minlength=4), law / law.sum()) > 1e-3
    for steps in (1, 7):
        cfg = config(4, 1, sampling_steps=steps, temperature=0.0)
        assert (sdd.sample(Oracle(p, 4, 1), cfg, 50, generator(6))[0] == 0).all()


@SAMPLERS
def test_temperature_0_takes_what_context_favours(sampler, monkeypatch):
    """(E6) (E7) the argmax of net, without own evidence."""
    seen = answers(monkeypatch)
    cfg = config(3, 3, sampler=sampler, temperature=0.0, sampling_steps=5)
    sdd.sample(three(0.7), cfg, 40, generator(1))
    for (_, out, own), (_, _, logits) in zip(seen[::2], seen[1::2]):
        assert torch.equal(logits.argmax(1), (out - own).argmax(1))
        assert (logits.isfinite().sum(1) == 1).all()
    own = torch.cat([own.argmax(1) for _, _, own in seen[2::2]])
    assert (own != torch.cat([(o - w).argmax(1) for _, o, w in seen[2::2]])).any()


def test_top_k_and_top_p_cut_tokens():
    """One step of one position: the law by hand."""
    p = torch.tensor([0.45, 0.3, 0.2, 0.05]).double()
    for change, keep in ((dict(top_k=2), [0, 1]), (dict(top_p=0.74), [0, 1]),
                         (dict(top_k=9), [0, 1, 2, 3]), (dict(top_p=0.76), [0, 1, 2]),
                         (dict(top_k=3, temperature=0.5), [0, 1, 2])):
        law = torch.zeros(4).double()
        law[keep] = p[keep] ** (1 / change.get("temperature", 1))
        cfg = config(4, 1, sampling_steps=1, **change)
        x, _ = sdd.sample(Oracle(p, 4, 1), cfg, 4000, generator(7))
        assert chi_square(x.flatten().bincount(minlength=4), law / law.sum()) > 1e-3
    got = sdd.filter_logits(torch.tensor([[0.1, 0.4, 0.2]]), config(3, top_p=0.0))
    assert got.softmax(1).tolist() == [[0, 1, 0]]


def test_categorical_draws_the_softmax():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    draws = sdd.categorical(logits.expand(20_000, 4), generator(1))
    assert chi_square(draws.bincount(minlength=4), [0.4, 0.3, 0.2, 0.1]) > 1e-3


# ---- what is given


@pytest.mark.parametrize("prompt", [[1], [0, 2], []])
def test_a_prompt_never_changes_and_the_rest_has_its_law(prompt):
    """(E4) rows begin with the prompt, shown clean; the others have the law given it."""
    n, model, prompt = 1500, three(), torch.tensor(prompt).long()
    cfg = config(3, 3, window=0.3, sampling_steps=50, schedule="exponential")
    x, _ = sdd.sample(model, cfg, n, generator(1), prompt)
    P = len(prompt)
    assert (x[:, :P] == prompt).all() and x.max() < 3
    for ids, logp, where in model.calls:
        assert (logp[:, :P, 0] == 0).all() and not where[:, :P].any()
        assert (ids[:, :P, 0] == prompt).all()
    law = THREE * (all_rows(3, 3)[:, :P] == prompt).all(1)
    assert chi_square(row_counts(x, 3), law / law.sum()) > 1e-3


@pytest.mark.parametrize("clock", ["random", "l2r", "maxprob"])
def test_infilling_keeps_what_is_there(clock):
    """`start` with different holes in every row; the law of a hole is that given its sides."""
    start = torch.tensor([[0, 3, 1], [3, 2, 3], [1, 0, 2], [3, 3, 3]]).repeat(400, 1)
    before = start.clone()
    cfg = config(3, 3, window=0.3, sampling_steps=40, clock=clock, schedule="exponential")
    x, _ = sdd.sample(three(), cfg, 1600, generator(1), start=start)
    given = start != 3
    assert torch.equal(x[given], start[given]) and x.max() < 3 and torch.equal(start, before)
    rows, cube = x.view(400, 4, 3), THREE.view(3, 3, 3)
    law = cube[0, :, 1] / cube[0, :, 1].sum()
    assert chi_square(rows[:, 0, 1].bincount(minlength=3), law) > 1e-3
    law = cube[:, 2] / cube[:, 2].sum()
    assert chi_square(row_counts(rows[:, 1, ::2], 3), law.flatten()) > 1e-3
    assert chi_square(row_counts(rows[:, 3], 3), THREE) > 1e-3


@pytest.mark.parametrize("clock", ["random", "l2r", "maxprob", "revise"])
def test_what_is_all_given_needs_no_network(clock):
    model, start = three(), torch.tensor([[0, 1, 2], [2, 2, 1]])
    x, info = sdd.sample(model, config(3, 3, clock=clock), 2, generator(1), start=start)
    assert torch.equal(x, start) and info == dict(nfe=0) and not model.calls


def test_a_prompt_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="a prompt of 4 ids in a row of 3"):
        sdd.sample(three(), config(3, 3), 2, generator(1), torch.tensor([0, 1, 2, 0]))


# ---- guidance


@pytest.mark.parametrize("w", [1.5, 0.4])
@pytest.mark.parametrize("skip", ["evidence", "state"])
def test_guidance_adds_what_the_given_text_says(w, skip, monkeypatch):
    """(E10) out + w (out - out without c): net by two calls, where c is unknown and all else stays;
    own evidence enters once."""
    seen, model = answers(monkeypatch), three(0.7)
    cfg = config(3, 3, window=0.5, sampling_steps=6, guidance=w, skip=skip, k=2)
    x, info = sdd.sample(model, cfg, 25, generator(1), torch.tensor([1]))
    assert info["nfe"] == len(model.calls) and len(model.calls) % 2 == 0 and (x[:, 0] == 1).all()
    cuts = [logits for name, logits, _ in seen if name == "cut"]
    owns = [own for name, _, own in seen if name == "predict"][::2]
    calls = list(zip(model.calls[::2], model.calls[1::2]))
    assert len(calls) == len(cuts) == len(owns) > 3
    for ((ids, logp, where), (same, less, there)), logits, own in zip(calls, cuts, owns):
        assert torch.equal(where, there) and torch.equal(logp[:, 1:], less[:, 1:])
        assert torch.equal(ids[:, 1:], same[:, 1:])
        assert (logp[:, 0, 0] == 0).all() and (less[:, 0, -1] == 0).all()
        assert (less[:, 0, :-1] == -torch.inf).all()
        full, bare = (model.context(believed(*state, 3))[where]
                      for state in ((ids, logp), (same, less)))
        want = full + w * (full - bare) + own
        assert torch.allclose(logits.double(), want, atol=1e-3) and (full - bare).abs().max() > 0.1


def test_guidance_moves_the_law_towards_what_the_prompt_favours():
    """(E10) of one token after a prompt, in one step: p(. | c)^(1 + w) / p(.)^w but for a constant.
    """
    pair = THREE.view(3, 3, 3).sum(2)
    given, alone = pair[1] / pair[1].sum(), pair.sum(0)
    model = Oracle(pair.flatten(), 3, 2)
    for w in (0.0, 1.0, 3.0):
        cfg = config(3, 2, sampling_steps=1, guidance=w)
        x, _ = sdd.sample(model, cfg, 4000, generator(1), torch.tensor([1]))
        law = given ** (1 + w) / alone ** w
        assert chi_square(x[:, 1].bincount(minlength=3), law / law.sum()) > 1e-3
    assert 4000 * (law / law.sum() - given).square().sum() > 40


def test_no_second_call_without_guidance_or_without_given_text():
    """(E10) guidance 0 is off, draw by draw; nothing given: one call a step."""
    for prompt, w, calls in ((None, 0.0, 6), (None, 2.0, 6), (torch.tensor([1]), 0.0, 6),
                             (torch.tensor([1]), 2.0, 12)):
        model, cfg = three(), config(3, 3, sampling_steps=6, guidance=w)
        x, info = sdd.sample(model, cfg, 40, generator(1), prompt)
        assert info["nfe"] == calls and len(model.calls) == calls
        cfg = dataclasses.replace(cfg, guidance=0.0)
        plain, _ = sdd.sample(three(), cfg, 40, generator(1), prompt)
        assert torch.equal(x, plain) == (calls == 6)


# ---- clocks


def precisions(trace):
    return torch.stack([s for _, _, s, _, _ in trace])


@pytest.mark.parametrize("clock", ["random", "l2r", "maxprob"])
def test_precision_only_rises_and_what_is_clean_stays(clock):
    """(E5) from nothing to clean; the network is asked for positions that move, or for all that are
    not clean; what does not move keeps its state; what is clean shows its token."""
    model, trace = three(2.0), []
    cfg = config(3, 3, window=0.3, clock=clock, sampling_steps=20)
    x, _ = sdd.sample(model, cfg, 90, generator(1), trace=trace)
    s = precisions(trace)
    assert (s.diff(dim=0) >= 0).all() and s[0].max() < 1e-5 and (s[-1] == SURE).all()
    assert ((s > 0) & (s < SURE)).any()
    states = model.calls + [(*trace[-1][3:], None)]
    for i, ((ids, logp, where), (after, later, _)) in enumerate(zip(states, states[1:])):
        up = s[i + 1] > s[i]
        assert not (up & ~where).any()
        assert torch.equal(where, s[i] < SURE if clock == "maxprob" else up)
        clean = s[i + 1] == SURE
        assert torch.equal(after[..., 0][clean], x[clean]) and (later[..., 0][clean] == 0).all()
        still = ~up & ~clean & (s[i] > 0)
        assert torch.equal(after[still], ids[still])


def test_left_to_right_settles_the_left_first():
    """(E5) l2r: in precision and in the trace, what is given left out; random clocks do not."""
    for clock in ("l2r", "random"):
        trace = []
        cfg = config(3, 3, window=0.25, clock=clock, sampling_steps=24)
        sdd.sample(three(), cfg, 40, generator(1), trace=trace)
        s = precisions(trace)
        assert (s[:, :, :-1] >= s[:, :, 1:]).all() == (clock == "l2r")
        first = (s == SURE).int().argmax(0).float().mean(0)
        assert (first.diff() > 2).all() == (clock == "l2r")
    trace = []
    sdd.sample(three(), config(3, 3, window=0.25, clock="l2r", sampling_steps=24), 9, generator(1),
               trace=trace, start=torch.tensor([[3, 1, 3]]).repeat(9, 1))
    s = precisions(trace)
    assert (s[..., 0] >= s[..., 2]).all() and (s[..., 1] == SURE).all()


@pytest.mark.parametrize("clock", ["maxprob", "revise"])
def test_the_surest_position_begins(clock):
    """(E5) here the middle is known, the first is a toss of three, the last of two."""
    joint, trace = torch.zeros(3, 3, 3).double(), []
    joint[:, 1, :2] = 1 / 6
    cfg = config(3, 3, window=0.2, clock=clock, sampling_steps=20)
    sdd.sample(Oracle(joint.flatten(), 3, 3), cfg, 50, generator(1), trace=trace)
    s = precisions(trace)
    begun = (s > 1e-4).int().argmax(0)
    assert (begun[:, 1] < begun[:, 0]).all() and (begun[:, 1] < begun[:, 2]).all()
    assert clock == "revise" or (begun[:, 2] < begun[:, 0]).all()


@pytest.mark.parametrize("window,steps", [(0.3, 30), (0.1, 16)])
def test_settled_positions_give_way_to_surer_ones(window, steps):
    """(E9) revise: ends with every position settled and what is given kept; precision falls at
    times, to nothing with few steps, and settled tokens change at times; evidence that is taken
    back in part is that of the settled token, seen for a shorter time."""
    V, T, n, trace = 2, 6, 180, []
    cfg = config(V, T, window=window, clock="revise", sampling_steps=steps, schedule="exponential")
    start = torch.full((n, T), V)
    start[1::2, 1] = 1
    model = Oracle(dirichlet(V, T, 4), V, T, 2.0)
    x, info = sdd.sample(model, cfg, n, generator(1), None, trace, start)
    s, seen = precisions(trace), torch.stack([ids for _, ids, *_ in trace])
    assert x.min() >= 0 and x.max() < V and (s[-1] == SURE).all() and len(trace) == info["nfe"] + 1
    assert (x[1::2, 1] == 1).all() and (s[:, 1::2, 1] == SURE).all() and torch.equal(seen[-1], x)
    off, changed, gone = [], 0, 0
    for token, before, after, (*_, ids, logp) in zip(seen, s, s[1:], trace[1:]):
        back = (before == SURE) & (after < SURE)
        changed += (x != token)[back].sum()
        gone += (after[back] == 0).sum()
        part = back & (after > 0)
        theta, level, token = believed(ids, logp, V)[part], after[part], token[part][:, None]
        gap = (theta.gather(1, token) - theta.gather(1, 1 - token))[:, 0]
        off.append((gap - level) / (2 * level).sqrt())
    off = torch.cat(off)
    if steps == 30:
        assert changed > 3 and len(off) > 250
        assert off.mean().abs() < 4.5 / len(off) ** 0.5 and 0.8 < off.std() < 1.2
    else:
        assert gone > 3


def test_chance_keeps_settled_positions_by_how_sure_they_were(monkeypatch):
    """revise: what is not settled comes first, by the largest probability; what is settled by that
    of its token less a Gumbel variable, so that exp(-p) says how likely it is started over."""
    p, seen, deal = torch.tensor([0.7, 0.2, 0.1]), [], sdd.deal
    monkeypatch.setattr(sdd, "deal", lambda tau, waiting, score: seen.append(
        (waiting, score.clone())) or deal(tau, waiting, score))
    cfg = config(3, 20, window=0.01, clock="revise", sampling_steps=10)
    model, trace = sdd.Model(cfg), []
    model.head.bias.data = sdd.CAP * (p.log() / sdd.CAP).atanh()
    x, _ = sdd.sample(model, cfg, 60, generator(1), torch.tensor([2]), trace)
    noise = []
    for (waiting, score), (_, ids, s, *_) in zip(seen, trace):
        settled = (s == SURE) & waiting
        assert not waiting[:, 0].any() and waiting[:, 1:].all()
        assert torch.allclose(score[s == 0], 1000 + p[0])  # of a network that says the same of all
        noise.append(p[ids[settled]] - score[settled])
    noise = torch.cat(noise).double()
    assert len(noise) > 3000 and stats.kstest(noise.numpy(), "gumbel_r").pvalue > 1e-3


def test_revision_of_even_chances_stays_even():
    """(E9) where all tokens are alike by symmetry, every token is as likely at the end, whatever is
    revised; a law that is the same for every shift of the tokens keeps its even marginals."""
    n, V = 3000, 3
    shift = torch.tensor([0.8, 0.15, 0.05]).double()  # of the second token to the first
    joint = torch.stack([torch.stack([shift[(b - a) % V] for b in range(V)]) for a in range(V)]) / V
    for law in (torch.full((V * V,), 1 / V ** 2).double(), joint.flatten()):
        trace = []
        cfg = config(V, 2, window=0.5, clock="revise", sampling_steps=20, schedule="exponential")
        x, _ = sdd.sample(Oracle(law, V, 2), cfg, n, generator(2), trace=trace)
        assert (precisions(trace).diff(dim=0) < 0).any()
        for i in range(2):
            assert stats.chisquare(x[:, i].bincount(minlength=V)).pvalue > 1e-3
    assert ((x[:, 1] - x[:, 0]) % V == 0).double().mean() > 0.7


@pytest.mark.parametrize("clock", ["maxprob", "revise"])
def test_one_step_is_enough_for_any_clock(clock):
    """Few steps settle every position, too."""
    for steps in (1, 2, 3):
        trace = []
        cfg = config(3, 3, window=0.3, clock=clock, sampling_steps=steps)
        x, info = sdd.sample(three(), cfg, 50, generator(1), trace=trace)
        assert (trace[-1][2] == SURE).all() and x.max() < 3 and info["nfe"] <= steps


# ---- calls, trace, seeds, settings


def test_sampling_steps_count_calls_and_0_is_one_for_every_token():
    """One call a step with w = 1; with windows only those in which something moves."""
    for steps, calls in ((1, 1), (5, 5), (0, 3)):
        assert sdd.sample(three(), config(3, 3, sampling_steps=steps), 3, generator(1))[1] == dict(
            nfe=calls)
    model, start = three(), torch.tensor([[0, 1, 3]])
    info = sdd.sample(model, config(3, 3, window=0.1, sampling_steps=50), 1, generator(1),
                      start=start)[1]
    assert info["nfe"] == len(model.calls) <= 7


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_trace_shows_what_the_network_sees_and_ends_with_the_sample(k):
    """A frame for every call: calls so far, precision, candidates and log p as shown, random ones
    of 1 / V where nothing is known; ids where one token has half of the probability, else V."""
    for w in (0.0, 1.0):
        model, trace, each = three(), [], 2 if w else 1
        cfg = config(3, 3, k=k, window=0.4, sampling_steps=12, guidance=w)
        x, info = sdd.sample(model, cfg, 60, generator(1), torch.tensor([2]), trace)
        assert [t[0] for t in trace] == [*range(each, info["nfe"] + 1, each), info["nfe"]]
        for (_, seen, s, ids, logp), (shown, told, _) in zip(trace, model.calls[::each]):
            assert ids.shape == (60, 3, k) and logp.shape == (60, 3, k + 1)
            known = s > 0
            assert torch.equal(ids[known], shown[known]) and torch.equal(logp[known], told[known])
            assert (told[~known][:, -1] == 0).all()
            assert torch.allclose(logp[~known][:, :k], torch.tensor(-math.log(3)))
            sure = logp[..., 0] >= math.log(0.5)
            assert torch.equal(seen, torch.where(sure, ids[..., 0], 3))
        blank = trace[0][3][:, 1:].flatten(0, 1)
        assert (blank.sort(1).values.diff(dim=1) > 0).all() and len(blank.unique()) == 3
        _, seen, s, ids, logp = trace[-1]
        assert torch.equal(seen, x) and (s == SURE).all() and torch.equal(ids[..., 0], x)
        assert (logp[..., 0] == 0).all() and (trace[0][1][:, 1:] == 3).all()
        assert (x[:, 0] == 2).all()


def test_a_belief_is_made_of_the_answer_before():
    """(E3) state belief: one call a step; candidates are the top of z + net, net what the network
    last said of the position; guidance and temperature are of what they were."""
    seen, trace, predict = [], [], sdd.predict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdd, "predict", lambda *args: seen.append((args, predict(*args)))
                      or seen[-1][1])
        cfg = config(3, 3, k=2, state="belief", window=0.7, sampling_steps=12)
        model = three(0.5)
        x, info = sdd.sample(model, cfg, 30, generator(1), trace=trace)
    assert info["nfe"] == len(seen) == len(model.calls) == 12
    last = torch.zeros(30, 3, 3)
    for (args, (out, own)), (ids, logp, where), frame in zip(seen, model.calls, trace):
        _, _, s, z, todo, _, hide, past = args
        open = (s > 0) & (s < SURE)
        assert hide is None and torch.equal(past, last[open])
        want = sdd.sparse(z + past, 2)
        assert all(torch.equal(a[open], b) for a, b in zip((ids, logp), want))
        assert all(torch.equal(a[open], b) for a, b in zip(frame[3:], want))
        last[todo] = out - own
    assert last.abs().min() > 0 and x.max() < 3


def test_the_truth_is_always_among_all_candidates():
    """candidates(): with k = V, in training and in sampling; with k = 1 rarely where little is
    known, nearly always where much is."""
    for k in (1, 3):
        cfg = config(3, 3, k=k, window=0.7, sampling_steps=20)
        x0 = all_rows(3, 3)[torch.multinomial(THREE, 500, True, generator=generator(1))]
        rows = sdd.candidates(three(), cfg, x0, generator(2))
        assert rows[0]["s_low"] == 0 and rows[-1]["s_high"] == SURE
        for row, after in zip(rows, rows[1:]):
            assert row["s_high"] == after["s_low"]
        for row in rows:
            for name in ("training", "sampling"):
                many, share = row[f"{name}_n"], row[name]
                assert many > 0 or share is None
                if k == 3 and many:
                    assert share == 1
        if k == 1:
            for name in ("training", "sampling"):
                assert 0.4 < rows[0][name] < 0.85 and rows[-1][name] > 0.95


def test_a_seed_fixes_the_samples():
    for change in (dict(), dict(sampler="ancestral"), dict(sampler="deterministic"),
                   dict(clock="revise"), dict(clock="maxprob")):
        cfg = config(3, 3, window=0.4, sampling_steps=5, **change)
        x, y, z = (sdd.sample(three(0.5), cfg, 40, generator(s))[0] for s in (1, 1, 2))
        assert torch.equal(x, y) and not torch.equal(x, z)


@pytest.mark.parametrize("change", [
    dict(), dict(guidance=1.0), dict(clock="revise", temperature=0.5), dict(clock="maxprob"),
    dict(attention="full", clock="revise", guidance=0.7), dict(sampler="deterministic", window=1.0),
    dict(attention="full", sampler="ancestral"), dict(sampler="deterministic", clock="revise"),
    dict(k=1, skip="state", clock="l2r"), dict(k=99, skip="none", temperature=0.0),
    dict(state="belief", clock="revise", guidance=0.5),
    dict(attention="full", k=1, clock="revise"), dict(top_k=2, top_p=0.9)], ids=str)
def test_a_network_of_the_script_samples_with_every_setting(change):
    """Ids within the vocabulary, the prompt kept, under autocast too."""
    torch.manual_seed(0)
    some = dict(k=3, window=0.4, sampling_steps=6, schedule="exponential")
    cfg = config(11, 6, **some | change)
    model = sdd.Model(cfg)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    for cast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            x, _ = sdd.sample(model, cfg, 3, generator(1), torch.tensor([6, 5]))
        assert x.shape == (3, 6) and (x[:, :2] == torch.tensor([6, 5])).all()
        assert 0 <= x.min() and x.max() < 11


# ---- the original's sampler


def original(V=50, T=40, k=5, **changes):
    torch.manual_seed(0)
    cfg = config(V, T, k=k, process="original", **changes)
    return sdd.Model(cfg), cfg


def test_the_original_sampler_starts_without_the_answer():
    """k random candidates of 1 / V each, of which one is the truth of any text with probability
    about k / V; a fresh network moves to other random ones; one call a step."""
    (model, cfg), trace, n = original(sampling_steps=3), [], 250
    x, info = sdd.sample(model, cfg, n, generator(1), trace=trace)
    assert info == dict(nfe=3) and [t[0] for t in trace] == [0, 1, 2, 3]
    _, seen, _, ids, logp = trace[0]
    assert ids.shape == (n, 40, 5) and (seen == 50).all()
    assert torch.allclose(logp[..., :-1], torch.tensor(-math.log(50)))
    assert torch.allclose(logp[..., -1], torch.tensor(math.log(0.9)))
    assert stats.chisquare(ids.flatten().bincount(minlength=50)).pvalue > 1e-3
    text = torch.randint(50, (n, 40), generator=generator(2))
    among, want = (ids == text[..., None]).any(2).double().mean(), 1 - (1 - 1 / 50) ** 5
    assert abs(among - want) < 4.5 * (want * (1 - want) / text.numel()) ** 0.5
    assert abs(want - 5 / 50) < 0.005
    assert torch.equal(trace[-1][1], x) and x.max() < 50


def test_the_original_sampler_feeds_back_the_likeliest_tokens():
    """Every state is the top k of the answer to the one before, tempered, never noised again."""
    for temperature in (1.0, 0.5):
        (model, cfg), trace, seen = original(sampling_steps=4, temperature=temperature), [], []
        for p in model.parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=generator(1))
        model.register_forward_hook(lambda m, args, out: seen.append((args, out)))
        x, _ = sdd.sample(model, cfg, 3, generator(1), trace=trace)
        for ((ids, logp), out), (_, _, _, after, told) in zip(seen, trace[1:]):
            law = (out / temperature).log_softmax(2)
            best = law.sort(2, descending=True)
            assert torch.equal(best.indices[..., :5], after)
            assert torch.allclose(best.values[..., :5], told[..., :-1], atol=1e-5)
        assert torch.equal(x, after[..., 0])
        for (args, _), frame in zip(seen, trace):
            assert all(torch.equal(a, b) for a, b in zip(args, frame[3:]))
        again, _ = sdd.sample(model, cfg, 3, generator(1))
        assert torch.equal(again, x)
