"""The samplers of bit_diffusion.py and lab/bit_variants.py against exact distributions: chains as
products of matrices over all bit strings, joint distributions of two and three tokens, codes of no
token, what is given, guidance, orders, the trajectory."""
import pytest
import torch
import torch.nn.functional as F

import bit_diffusion
from bit_tables import Oracle, chain, independent, path, settings
from lab import bit_variants
from oracles import chi_square, dirichlet, generator, row_counts

CLEAN = bit_diffusion.CLEAN
JOINT, PAIRS, THREE = dirichlet(4, 2, 3), dirichlet(3, 2, 5, 0.7), dirichlet(3, 3, 2)
KINDS = [("token", "token"), ("token", "bit"), ("bit", "token"), ("mix", "token"), ("mix", "bit")]
each_kind = pytest.mark.parametrize("head,sampler", KINDS, ids=str)


def config(model, **changes):
    return bit_variants.Config(**settings(model.V, model.T, head=model.cfg.head,
                                          num_mixture=model.cfg.num_mixture) | changes)


def kind_of(head, sampler):
    """What a step of this sampler is, as the tables name it."""
    return "token" if sampler == "token" and head != "bit" else "bit"


def three(head="token", tilt=0.0):
    return Oracle(THREE, 3, 3, head, tilt)


def draw(model, n, seed=1, given=(), on_step=lambda nfe, x: None, **changes):
    """n rows that begin with `given`, NFE, the raw invalid rate and the Config; by the script if it
    has such a sampler."""
    cfg = config(model, **changes)
    canvas = torch.full((n, model.T), model.V)
    canvas[:, :len(given)] = torch.tensor(given)
    if cfg.head == cfg.sampler == "token" and not cfg.guidance:
        return *bit_diffusion.sample(model, canvas, cfg, generator(seed), on_step), 0.0, cfg
    return *bit_variants.sample_and_count(model, canvas, cfg, generator(seed), on_step), cfg


# ---- the distribution of every sampler


@each_kind
@pytest.mark.parametrize("invalid", ["project", "modulo"])
def test_a_sampler_has_the_distribution_of_its_chain(head, sampler, invalid):
    """(E7) (E8) (V4) 10 000 rows of a network that errs, in 3 steps, with a code of no token (V = 3
    of 4), against the product of exact transition matrices; the raw invalid rate against its exact
    probability, 5 standard errors. In lab, codes count up in the order 1, 2, 0."""
    order = None if head == sampler == "token" else [1, 2, 0]  # None: the script's own
    model, n = Oracle(PAIRS, 3, 2, head, 0.9, order), 10_000
    p, lost = chain(model, path(3, 2), kind_of(head, sampler), invalid)
    x, nfe, rate, _ = draw(model, n, sampler=sampler, invalid=invalid, num_steps=3)
    assert x.shape == (n, 2) and x.max() < 3 and nfe == 3
    assert chi_square(row_counts(x, 3), p) > 1e-3
    assert abs(rate - lost) <= 5 * (lost * (1 - lost) / n) ** 0.5
    assert (rate == 0) == (head == sampler == "token")


@each_kind
def test_positions_step_at_their_own_times(head, sampler, monkeypatch):
    """(E2) tau fixed at 0.1 and 0.4, w = 0.5, 6 steps, all codes in use: each position has its own
    levels, one is clean before the other."""
    for module in (bit_diffusion, bit_variants):
        monkeypatch.setattr(module, "position_times", lambda shape, *_: torch.tensor(
            [0.1, 0.4]).expand(shape).clone())
    model = Oracle(JOINT, 4, 2, head, 0.7)
    p, _ = chain(model, path(6, 2, [0.1, 0.4], 0.5, "cosine"), kind_of(head, sampler))
    x, nfe, rate, _ = draw(model, 10_000, 2, sampler=sampler, noise_window=0.5, num_steps=6,
                           schedule="cosine")
    assert chi_square(row_counts(x, 4), p) > 1e-3 and nfe == 6 and rate == 0


# ---- codes of no token


def test_the_raw_rate_counts_only_what_was_to_be_drawn(capsys):
    """A share of the positions that are not given, each counted once, at its end; it is printed."""
    model = three("bit")
    model.answer = lambda bits, lam: torch.full((*bits.shape[:2], 2), 30.0).double()  # always 3
    for steps, window in ((1, 1.0), (60, 1.0), (20, 0.4)):
        x, _, rate, cfg = draw(model, 50, given=[1], num_steps=steps, noise_window=window)
        assert rate == 1 and x.max() < 3 and (x[:, 0] == 1).all()
    x, nfe, rate, _ = draw(model, 5, given=[1, 0, 2])
    assert (nfe, rate) == (0, 0.0) and (x == torch.tensor([1, 0, 2])).all()
    bit_variants.sample(model, torch.full((2, 3), 3), cfg, generator(1))
    assert capsys.readouterr().out == \
        "codes of no token: 100.00% of the positions, --invalid project\n"


# ---- temperature and filters


@each_kind
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_temperature_acts_on_what_the_context_says(head, sampler, temperature):
    """(E4) (V1) (V2) context / temperature + self-likelihood: the exact chain of two steps."""
    model = Oracle(PAIRS, 3, 2, head, 0.5)
    for steps in (1, 2):
        p, _ = chain(model, path(steps, 2), kind_of(head, sampler), temperature=temperature)
        x = draw(model, 6000, 6, sampler=sampler, num_steps=steps, temperature=temperature)[0]
        assert chi_square(row_counts(x, 3), p) > 1e-3
        other, _ = chain(model, path(steps, 2), kind_of(head, sampler))
        assert chi_square(row_counts(x, 3), other) < 1e-3


@each_kind
def test_temperature_0_takes_what_the_context_favours(head, sampler):
    """(E4) (E8) (V4) the most likely token, or sign of each bit, without the self-likelihood, which
    is told apart whether or not the network adds it."""
    model, bits = three(head, 0.7), torch.randn(40, 3, 2, generator=generator(1)).sign()
    lam = torch.linspace(0, 3, 120).view(40, 3)
    cfg = config(model, sampler=sampler, temperature=0.0)
    out = model(bits, lam).flatten(0, 1)
    got, _ = bit_variants.draw_x0(model, out, bits.flatten(0, 1), lam.flatten(), cfg,
                                     generator(2))
    if head == "token":
        best = (model.answer(bits, lam) - model.likelihood(bits, lam)).argmax(2).flatten()
        want = model.codes[best]
    elif head == "bit":
        want = (model.answer(bits, lam) - lam[..., None] * bits).flatten(0, 1).sign()
    else:
        base = model.answer(bits, 0 * lam).flatten(0, 1)
        want = base[torch.arange(120), base[..., -1].argmax(1), :-1].sign()
    assert torch.equal(got, want.float())


@pytest.mark.parametrize("sampler", ["token", "bit"])
def test_top_k_and_top_p_cut_tokens(sampler):
    """(E5) one step of one position; bits of a token head are those of the tokens that are left:
    some may be certain, and codes of no token are drawn again among tokens."""
    for p, change, keep in (
            ([0.45, 0.3, 0.2, 0.05], dict(top_k=2), [0, 1]),
            ([0.45, 0.3, 0.2, 0.05], dict(top_p=0.76), [0, 1, 2]),
            ([0.45, 0.3, 0.2, 0.05], dict(top_k=3, temperature=0.5), [0, 1, 2]),
            ([0.1, 0.1, 0.3, 0.1, 0.4], dict(top_k=2), [2, 4])):
        p = torch.tensor(p).double()
        model, want = Oracle(p, len(p), 1), torch.zeros(len(p)).double()
        want[keep] = p[keep] ** (1 / change.get("temperature", 1))
        want = want / want.sum()
        if sampler == "bit":
            ones = want @ (model.exact > 0).double()
            want = independent(ones.logit(1e-12))[:len(p)]
        x = draw(model, 4000, 7, sampler=sampler, num_steps=1, **change)[0]
        assert chi_square(x.flatten().bincount(minlength=len(p)), want / want.sum()) > 1e-3


# ---- guidance


# ---- orders, steps, the trajectory


def test_frames_show_what_is_more_likely_right_than_not_and_end_with_the_sample():
    """One a step: given tokens, and what codes stand for as soon as they have no wrong bit with at
    least half of the probability; else V, also for the code of no token."""
    for order, w in (("random", 0.0), ("maxprob", 0.0), ("random", 1.0)):
        model, frames = three(), []
        x, nfe, _, _ = draw(model, 8, given=[2], on_step=lambda *frame: frames.append(frame),
                            noise_window=0.4, order=order, num_steps=12, guidance=w)
        calls, each = zip(*frames)
        step = 2 if w else 1
        assert calls == tuple(range(step, nfe + 1, step))
        each = torch.stack(each)
        assert each.shape == (len(calls), 8, 3) and (each[:, :, 0] == 2).all()
        assert torch.equal(each[-1], x) and (each[0][:, 1:] == 3).double().mean() > 0.5
        for (bits, lam, _), frame in zip(model.calls[step::step], each):
            ids = (bits > 0).long() @ torch.tensor([2, 1])  # word 3 is no token, and V is 3
            p = (1 / (1 + (-lam.double()).exp())) ** 2
            clear = (p - 0.5).abs() > 1e-3
            assert torch.equal(frame[clear], torch.where(p < 0.5, 3, ids)[clear])
