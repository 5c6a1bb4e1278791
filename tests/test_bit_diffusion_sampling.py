"""The samplers of bit_diffusion.py against exact laws: chains as products of matrices over all bit
strings, joint laws of two and three tokens, codes of no token, what is given, guidance, clocks, the
trace."""
import dataclasses
import itertools
import math

import pytest
import torch

import bit_diffusion
from bit_tables import (Oracle, chain_law, dirichlet, marginals, path, settings, words)
from tables import all_rows, chi_square, generator, row_counts

SURE = bit_diffusion.SURE
JOINT, PAIRS, THREE = dirichlet(4, 2, 3), dirichlet(3, 2, 5, 0.7), dirichlet(3, 3, 2)
KINDS = [("token", "auto"), ("token", "bit"), ("bit", "auto"), ("bit", "token"), ("mix", "token"),
         ("mix", "auto")]
each_kind = pytest.mark.parametrize("head,sampler", KINDS, ids=str)


def config(V=4, T=2, **changes):
    return bit_diffusion.Config(**settings(V, T, **changes))


def how(head, sampler):
    """What a step of this sampler is, as the tables name it."""
    return "token" if sampler == "token" or head == "token" and sampler == "auto" else "bit"


def three(head="token", tilt=0.0):
    return Oracle(THREE, 3, 3, head, tilt)


def fixed_clocks(monkeypatch, tau):
    monkeypatch.setattr(bit_diffusion, "clocks",
                        lambda shape, *_: torch.tensor(tau).expand(shape).clone())


# ---- the law of every sampler


@each_kind
@pytest.mark.parametrize("invalid", ["project", "modulo"])
def test_a_sampler_has_the_law_of_its_chain(head, sampler, invalid):
    """(E6) (E7) 10 000 rows of a network that errs, in 3 steps, with a code of no token (V = 3 of
    4), against the product of exact transition matrices: chi-square; and the share of positions
    that came out as no token against its exact probability, 5 standard errors."""
    model, n = Oracle(PAIRS, 3, 2, head, 0.9, order=[1, 2, 0]), 10_000
    cfg = config(3, 2, head=model.head_kind, sampler=sampler, invalid=invalid, sampling_steps=3)
    law, lost = chain_law(model, path(3, 2), how(head, sampler), invalid)
    if invalid == "modulo":  # codes count on from the first: word 3 is token order[0] = 1
        assert chain_law(model, path(3, 2), how(head, sampler), "project")[0].sub(law).abs().max() \
            > 0.005 or lost == 0
    x, info = bit_diffusion.sample(model, cfg, n, generator(1))
    assert x.shape == (n, 2) and x.max() < 3 and info["nfe"] == 3
    assert chi_square(row_counts(x, 3), law) > 1e-3
    assert abs(info["invalid"] - lost) <= 5 * (lost * (1 - lost) / n) ** 0.5
    assert (info["invalid"] == 0) == (head == "token" and sampler == "auto")


@each_kind
def test_positions_step_by_their_own_clocks(head, sampler, monkeypatch):
    """(E2) (E7) clocks fixed at 0.1 and 0.4, w = 0.5, 6 steps, all codes in use: each position has
    its own levels, one settles before the other."""
    fixed_clocks(monkeypatch, [0.1, 0.4])
    model = Oracle(JOINT, 4, 2, head, 0.7)
    cfg = config(4, 2, head=model.head_kind, sampler=sampler, window=0.5, sampling_steps=6,
                 schedule="cosine")
    law, _ = chain_law(model, path(6, 2, [0.1, 0.4], 0.5, "cosine"), how(head, sampler))
    x, info = bit_diffusion.sample(model, cfg, 10_000, generator(2))
    assert chi_square(row_counts(x, 4), law) > 1e-3 and info["nfe"] == 6
    assert info["invalid"] == 0


def test_the_chains_of_different_samplers_differ():
    """The tests above can tell them apart, and the plug-in from both."""
    laws = [chain_law(Oracle(PAIRS, 3, 2, head, 0.9), path(3, 2), kind, invalid)[0]
            for head, kind, invalid in (("token", "token", "project"), ("token", "bit", "project"),
                                        ("token", "plug-in", "project"), ("bit", "bit", "project"),
                                        ("bit", "bit", "modulo"), ("bit", "plug-in", "project"))]
    for p, q in itertools.combinations(laws, 2):
        assert 10_000 * ((p - q).square() / q).sum() > 30


@pytest.mark.parametrize("head", ["token", "bit"])
def test_bits_are_not_drawn_by_the_plug_in(head):
    """(E7) 16 steps with exact posteriors: the rows have the law of the mixture of bridges, and the
    law of the plug-in is out of the question."""
    model = Oracle(JOINT, 4, 2, head)
    cfg = config(head=head, sampler="bit", sampling_steps=16)
    x, _ = bit_diffusion.sample(model, cfg, 8000, generator(3))
    counts = row_counts(x, 4)
    assert chi_square(counts, chain_law(model, path(16, 2), "bit")[0]) > 1e-3
    assert chi_square(counts, chain_law(model, path(16, 2), "plug-in")[0]) < 1e-6


@pytest.mark.parametrize("window,clock,sampler", [(0.4, "random", "token"), (0.3, "l2r", "token"),
                                                  (0.3, "maxprob", "token"), (0.4, "random", "bit"),
                                                  (0.4, "l2r", "bit"), (0.4, "maxprob", "bit")])
def test_many_steps_of_exact_posteriors_draw_the_joint_law(window, clock, sampler):
    """(E2) (E7) all orders, and both samplers: chi-square over all rows, while the product of the
    marginals is out of the question. Which position begins may depend on the state."""
    head = "token" if sampler == "token" else "bit"
    model = Oracle(JOINT, 4, 2, head)
    cfg = config(head=head, window=window, clock=clock, sampler=sampler,
                 sampling_steps=40 if sampler == "token" else 100)
    x, _ = bit_diffusion.sample(model, cfg, 2500, generator(3))
    assert chi_square(row_counts(x, 4), JOINT) > 1e-3
    alone = marginals(JOINT, 4, 2)
    assert chi_square(row_counts(x, 4), (alone[0][:, None] * alone[1]).flatten()) < 1e-6


def test_one_step_draws_every_token_for_itself():
    """(E7) the product of the marginals: what few steps cost; of bits, too."""
    alone = marginals(JOINT, 4, 2)
    x, info = bit_diffusion.sample(Oracle(JOINT, 4, 2), config(sampling_steps=1), 5000,
                                   generator(4))
    assert chi_square(row_counts(x, 4), (alone[0][:, None] * alone[1]).flatten()) > 1e-3
    assert info == dict(nfe=1, invalid=0.0)
    model = Oracle(JOINT, 4, 2, "bit")
    x, _ = bit_diffusion.sample(model, config(head="bit", sampling_steps=1), 5000, generator(4))
    bits = (alone @ ((model.exact > 0).double()))
    law = [math.prod((bits[i, k] if b > 0 else 1 - bits[i, k]).item()
                     for i, v in enumerate(row) for k, b in enumerate(model.exact[v]))
           for row in model.rows]
    assert chi_square(row_counts(x, 4), law) > 1e-3


# ---- codes of no token


@pytest.mark.parametrize("V", [3, 5])
def test_project_draws_given_that_it_is_a_token_and_modulo_counts_on(V):
    """(E5) one position, one step, bits that are often no token's: project is the product law given
    that the code is valid; modulo moves code V + n to code n; ids < V; the raw rate is reported."""
    order = [2, 0, 1] if V == 3 else [4, 1, 0, 3, 2]
    model, n = Oracle(dirichlet(V, 1, 1, 1.0), V, 1, "bit", order=order), 8000
    odds = torch.tensor([0.6, -0.3, 0.4])[:model.K]
    model.answer = lambda bits, lam: odds.expand(*bits.shape).double()
    plus, law = odds.double().sigmoid(), torch.ones(2 ** model.K).double()
    for w, k in itertools.product(range(2 ** model.K), range(model.K)):
        law[w] *= plus[k] if words(model.K)[w, k] > 0 else 1 - plus[k]
    bad = law[V:].sum().item()
    for invalid in ("project", "modulo"):
        want = torch.zeros(V).double()
        for w in range(2 ** model.K):
            if w < V or invalid == "modulo":
                want[order[w % V]] += law[w]
        cfg = config(V, 1, head="bit", invalid=invalid, sampling_steps=1)
        x, info = bit_diffusion.sample(model, cfg, n, generator(5))
        assert chi_square(x.flatten().bincount(minlength=V), want / want.sum()) > 1e-3
        assert abs(info["invalid"] - bad) < 5 * (bad * (1 - bad) / n) ** 0.5 and bad > 0.1


def test_the_raw_rate_counts_only_what_was_to_be_drawn():
    """A share of the positions that are not given, each counted once, when it settles."""
    model = three("bit", 0.9)
    model.answer = lambda bits, lam: torch.full((*bits.shape[:2], 2), 30.0).double()  # always 3
    for steps, window in ((1, 1.0), (60, 1.0), (20, 0.4)):
        cfg = config(3, 3, head="bit", sampling_steps=steps, window=window)
        x, info = bit_diffusion.sample(model, cfg, 50, generator(1), torch.tensor([1]))
        assert info["invalid"] == 1 and x.max() < 3 and (x[:, 0] == 1).all()
    x, info = bit_diffusion.sample(model, cfg, 5, generator(1), torch.tensor([1, 0, 2]))
    assert info == dict(nfe=0, invalid=0.0) and (x == torch.tensor([1, 0, 2])).all()


# ---- temperature and filters


@each_kind
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_temperature_is_for_context_alone(head, sampler, temperature):
    """(E4) context / temperature + own evidence: the exact chain of two steps; in the first,
    without evidence, p^(1 / temperature)."""
    model = Oracle(PAIRS, 3, 2, head, 0.5)
    for steps in (1, 2):
        cfg = config(3, 2, head=model.head_kind, sampler=sampler, sampling_steps=steps,
                     temperature=temperature)
        law, _ = chain_law(model, path(steps, 2), how(head, sampler), temperature=temperature)
        x, _ = bit_diffusion.sample(model, cfg, 6000, generator(6))
        assert chi_square(row_counts(x, 3), law) > 1e-3
        other, _ = chain_law(model, path(steps, 2), how(head, sampler))
        assert chi_square(row_counts(x, 3), other) < 1e-3
    alone = Oracle(torch.tensor([0.5, 0.2, 0.05, 0.25]).double(), 4, 1)
    p = alone.joint ** (1 / temperature)
    assert torch.allclose(chain_law(alone, path(1, 1), "token", temperature=temperature)[0],
                          p / p.sum(), atol=1e-9)


@each_kind
def test_temperature_0_takes_what_context_favours(head, sampler):
    """(E4) (E7) the likeliest token, or sign of every bit, without own evidence; always the same.
    """
    model = three(head, 0.7)
    bits = torch.randn(40, 3, 2, generator=generator(1)).sign()
    lam = torch.linspace(0, 3, 120).view(40, 3)
    out = model(bits, lam).flatten(0, 1)
    cfg = config(3, 3, head=model.head_kind, sampler=sampler, temperature=0.0)
    got, _ = bit_diffusion.aim(model, out, bits.flatten(0, 1), lam.flatten(), cfg, generator(2))
    if head == "token":
        likeliest = (model.answer(bits, lam) - model.likelihood(bits, lam)).argmax(2).flatten()
        assert torch.equal(got, model.code[likeliest])
    elif head == "bit":
        net = model.answer(bits, lam) - lam[..., None] * bits
        assert torch.equal(got, net.flatten(0, 1).sign().float())
    else:
        net = model.answer(bits, lam)
        base = model.answer(bits, 0 * lam).flatten(0, 1)
        odds, part = base[..., :-1], base[..., -1].argmax(1)
        assert net.shape == (40, 3, 2, 3)
        assert torch.equal(got, odds[torch.arange(120), part].sign().float())


@pytest.mark.parametrize("sampler", ["auto", "bit"])
def test_top_k_and_top_p_cut_tokens(sampler):
    """One step of one position: the law by hand; bits of a token head are those of the tokens that
    are left."""
    p = torch.tensor([0.45, 0.3, 0.2, 0.05]).double()
    for change, keep in ((dict(top_k=2), [0, 1]), (dict(top_p=0.74), [0, 1]), (dict(top_k=9),
                         [0, 1, 2, 3]), (dict(top_p=0.76), [0, 1, 2]),
                         (dict(top_k=3, temperature=0.5), [0, 1, 2])):
        law = torch.zeros(4).double()
        law[keep] = p[keep] ** (1 / change.get("temperature", 1))
        law = law / law.sum()
        if sampler == "bit":
            high, low = law[2] + law[3], law[1] + law[3]
            law = torch.stack([(1 - high) * (1 - low), (1 - high) * low, high * (1 - low),
                               high * low])
        cfg = config(4, 1, sampler=sampler, sampling_steps=1, **change)
        x, _ = bit_diffusion.sample(Oracle(p, 4, 1), cfg, 4000, generator(7))
        assert chi_square(x.flatten().bincount(minlength=4), law) > 1e-3


def test_top_p_of_nothing_keeps_the_likeliest_token():
    got = bit_diffusion.filter_logits(torch.tensor([[0.1, 0.4, 0.2]]), config(3, top_p=0.0))
    assert got.softmax(1).tolist() == [[0, 1, 0]]


def test_bits_of_the_tokens_that_are_left_may_be_certain():
    """(E5) tokens 2 and 4 of 5 are left: their last bit is 0 for sure, and the code 6 that their
    others may make is drawn again among tokens."""
    p = torch.tensor([0.1, 0.1, 0.3, 0.1, 0.4]).double()
    cfg = config(5, 1, sampler="bit", sampling_steps=1, top_k=2)
    x, info = bit_diffusion.sample(Oracle(p, 5, 1), cfg, 6000, generator(8))
    high, middle = 4 / 7, 3 / 7
    law = torch.tensor([(1 - high) * (1 - middle), 0, (1 - high) * middle, 0, high * (1 - middle)])
    assert chi_square(x.flatten().bincount(minlength=5), law / law.sum()) > 1e-3
    assert abs(info["invalid"] - high * middle) < 5 * (0.25 / 6000) ** 0.5


def test_categorical_draws_the_softmax():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    draws = bit_diffusion.categorical(logits.expand(20_000, 4), generator(1))
    assert chi_square(draws.bincount(minlength=4), [0.4, 0.3, 0.2, 0.1]) > 1e-3


# ---- what is given


@each_kind
@pytest.mark.parametrize("prompt", [[1], [0, 2], []])
def test_a_prompt_never_changes_and_the_rest_has_its_law(head, sampler, prompt):
    """(E2) rows begin with the prompt; with exact posteriors, the others have the law given it."""
    model = three(head, 0.5 * (head == "mix"))
    cfg = config(3, 3, head=model.head_kind, window=0.3, sampler=sampler, sampling_steps=60)
    x, _ = bit_diffusion.sample(model, cfg, 1200, generator(1), torch.tensor(prompt).long())
    assert (x[:, :len(prompt)] == torch.tensor(prompt)).all() and x.max() < 3
    for bits, lam, where in model.calls:
        assert (lam[:, :len(prompt)] == SURE).all() and not where[:, :len(prompt)].any()
        assert torch.equal(bits[:, :len(prompt)],
                           model.code[torch.tensor(prompt).long()].expand(1200, -1, -1))
    if head == "token" or head == "bit" and len(prompt) == 2:
        fits = (all_rows(3, 3)[:, :len(prompt)] == torch.tensor(prompt)).all(1)
        law = (THREE * fits) / (THREE * fits).sum()
        if how(head, sampler) == "token" and head == "token":
            assert chi_square(row_counts(x, 3), law) > 1e-3
        else:  # bits apart need more steps: within 0.06 of every row's share
            assert (row_counts(x, 3) / 1200 - law).abs().max() < 0.06


@pytest.mark.parametrize("clock", ["random", "l2r", "maxprob"])
def test_infilling_keeps_what_is_there(clock):
    """`start` with different holes in every row; the law of a hole is that given its sides."""
    start = torch.tensor([[0, 3, 1], [3, 2, 3], [1, 0, 2], [3, 3, 3]]).repeat(300, 1)
    cfg = config(3, 3, window=0.3, sampling_steps=40, clock=clock)
    x, _ = bit_diffusion.sample(three(), cfg, 1200, generator(1), start=start)
    given = start != 3
    assert torch.equal(x[given], start[given]) and x.max() < 3
    assert (start == 3).sum() == 300 * 6  # the start itself is left alone
    rows, cube = x.view(300, 4, 3), THREE.view(3, 3, 3)
    law = cube[0, :, 1] / cube[0, :, 1].sum()
    assert chi_square(rows[:, 0, 1].bincount(minlength=3), law) > 1e-3
    law = cube[:, 2] / cube[:, 2].sum()
    assert chi_square(row_counts(rows[:, 1, ::2], 3), law.flatten()) > 1e-3


def test_a_prompt_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="a prompt of 4 ids in a row of 3"):
        bit_diffusion.sample(three(), config(3, 3), 2, generator(1), torch.tensor([0, 1, 2, 0]))


# ---- guidance


@each_kind
def test_guidance_adds_what_the_given_text_says(head, sampler, monkeypatch):
    """(E10) out + w (out - out without c) of the context, own bits entering once: against two calls
    by hand, where c is at lam = 0 and all else stays as it is."""
    seen, aim = [], bit_diffusion.aim
    monkeypatch.setattr(bit_diffusion, "aim",
                        lambda m, out, *rest: seen.append(out) or aim(m, out, *rest))
    for w in (1.5, 0.4):
        model = three(head, 0.7)
        cfg = config(3, 3, head=model.head_kind, sampler=sampler, window=0.5, sampling_steps=6,
                     guidance=w)
        seen.clear()
        x, info = bit_diffusion.sample(model, cfg, 25, generator(1), torch.tensor([1]))
        assert info["nfe"] == len(model.calls) and len(model.calls) % 2 == 0
        calls = list(zip(model.calls[::2], model.calls[1::2]))
        assert len(seen) == len(calls)
        for ((bits, lam, where), (same, low, there)), out in zip(calls, seen):
            assert torch.equal(where, there) and torch.equal(bits[:, 1:], same[:, 1:])
            assert torch.equal(lam[:, 1:], low[:, 1:])
            assert (low[:, 0] == 0).all() and (lam[:, 0] == SURE).all()
            full, bare = model.answer(bits, lam)[where], model.answer(same, low)[where]
            want = full + w * (full - bare)
            if head == "mix":  # weights hold evidence of their own: taken away, and put back
                odds, own = want[..., :-1], (lam[..., None] * bits)[where].double()[:, None]
                weight = 0
                for y, sign in ((full, 1 + w), (bare, -w)):
                    weight = weight + sign * (y[..., -1] - gain(y[..., :-1] - own, own))
                weight = weight + gain(odds - own, own)
                assert torch.allclose(out[..., -1].double().softmax(1), weight.softmax(1),
                                      atol=1e-4)
                out, want = out[..., :-1], odds
            assert torch.allclose((out - want).double(), (out - want).mean(1, True).double(),
                                  atol=2e-3) if head == "token" else \
                torch.allclose(out.double(), want, atol=2e-3)
        assert (x[:, 0] == 1).all()


def gain(odds, own):
    """log p(own bits | a product) with log-odds of the bits, and of their being +1 by themselves.
    """
    sides = [torch.nn.functional.logsigmoid(y * odds) + torch.nn.functional.logsigmoid(y * own)
             for y in (1, -1)]
    return torch.logaddexp(*sides).sum(-1)


def test_guidance_moves_the_law_towards_what_the_prompt_favours():
    """(E10) of one token after a prompt, p(. | c)^(1 + w) / p(.)^w but for a constant; over many
    steps only nearly, because guided noisy bits are not those of the guided law."""
    cube = THREE.view(3, 3, 3)
    given, alone = (cube[1] / cube[1].sum()).sum(1), cube.sum((0, 2))
    best, shares = (given / alone).argmax(), []
    for w in (0.0, 1.0, 3.0):
        cfg = config(3, 3, window=0.2, clock="l2r", sampling_steps=24, guidance=w)
        x, _ = bit_diffusion.sample(three(), cfg, 4000, generator(1), torch.tensor([1]))
        law = given ** (1 + w) / alone ** w
        shares.append((x[:, 1] == best).float().mean().item())
        assert shares[-1] == pytest.approx((law[best] / law.sum()).item(), abs=0.025)
    assert shares[2] > shares[0] + 0.012


def test_no_second_call_without_guidance_or_without_given_text():
    """(E10) guidance 0, or nothing given: one call a step."""
    for prompt, w, calls in ((None, 0.0, 6), (None, 2.0, 6), (torch.tensor([1]), 0.0, 6),
                             (torch.tensor([1]), 2.0, 12)):
        model, cfg = three(), config(3, 3, sampling_steps=6, guidance=w)
        _, info = bit_diffusion.sample(model, cfg, 4, generator(1), prompt)
        assert info["nfe"] == calls and len(model.calls) == calls


@pytest.mark.parametrize("kind", ["token", "byte", "bit", "raw"])
def test_the_call_without_the_given_text_does_not_see_it(kind):
    """(E10) in every second call the bits of the prompt say nothing: with others in their place the
    answer is the same, or they have been replaced by noise already."""
    torch.manual_seed(0)
    cfg = config(11, 6, input=kind, sampling_steps=4, guidance=1.0, window=0.5)
    model, calls = bit_diffusion.Model(cfg), []
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape)
    model.register_forward_hook(lambda m, args, out: calls.append(
        (args[0].clone(), *args[1:], out)))
    bit_diffusion.sample(model, cfg, 12, generator(1), torch.tensor([6, 5]))
    for bits, lam, where, out in list(calls)[1::2]:
        noise = (bits[:, :2] != model.code[[6, 5]]).double().mean() > 0.3
        other = torch.cat((-bits[:, :2], bits[:, 2:]), 1)
        assert noise or torch.allclose(model(other, lam, where), out, atol=1e-5)


# ---- clocks


@pytest.mark.parametrize("head", ["token", "bit"])
@pytest.mark.parametrize("clock", ["random", "l2r", "maxprob"])
def test_levels_only_rise_and_every_step_is_asked_for_where_it_is_made(clock, head):
    """(E2) from noise to clean; the network is asked for positions on their way, bits change
    nowhere else; what is clean stays, and is the code of its token, redrawn or not."""
    model = three(head, 2.0)
    cfg = config(3, 3, head=head, window=0.3, clock=clock, sampling_steps=20)
    x, info = bit_diffusion.sample(model, cfg, 90, generator(1))
    assert (info["invalid"] > 0) == (head == "bit")
    levels = torch.stack([lam for _, lam, _ in model.calls])
    assert (levels.diff(dim=0) >= 0).all() and levels[0].max() < 1e-5
    for (bits, lam, where), (after, later, _) in zip(model.calls, model.calls[1:]):
        assert not ((later > lam) & ~where).any()  # no step without an answer
        assert not ((after != bits).any(2) & ~(later > lam)).any()
        assert torch.equal(after[later == SURE], model.code[x][later == SURE])
        if clock != "maxprob":
            assert torch.equal(later > lam, where)
        else:
            assert torch.equal(where, lam < SURE)


def test_left_to_right_settles_the_left_first():
    """(E2) l2r: in the levels and in the trace, what is given left out; random clocks do not."""
    for clock in ("l2r", "random"):
        model, trace = three(), []
        cfg = config(3, 3, window=0.25, clock=clock, sampling_steps=24)
        bit_diffusion.sample(model, cfg, 40, generator(1), trace=trace)
        falls = all((lam[:, :-1] >= lam[:, 1:]).all() for _, lam, _ in model.calls)
        assert falls == (clock == "l2r")
        frames = torch.stack([ids for _, ids in trace])
        first = ((frames != 3).int().argmax(0)).float().mean(0)
        assert (first.diff() > 2).all() == (clock == "l2r")
    model = three()
    bit_diffusion.sample(model, config(3, 3, window=0.25, clock="l2r", sampling_steps=24), 9,
                         generator(1), start=torch.tensor([[3, 1, 3]]).repeat(9, 1))
    assert all((lam[:, 0] >= lam[:, 2]).all() for _, lam, _ in model.calls)


def test_maxprob_begins_where_the_network_is_sure():
    """(E2) of positions that wait, the surest begins: here the middle is known, the first is a toss
    of three, the last of two; and an undecided position outranks none that is on its way."""
    joint = torch.zeros(3, 3, 3).double()
    joint[:, 1, :2] = 1 / 6
    for head in ("token", "bit"):
        model = Oracle(joint.flatten(), 3, 3, head)
        cfg = config(3, 3, head=head, window=0.2, clock="maxprob", sampling_steps=20)
        bit_diffusion.sample(model, cfg, 50, generator(1))
        begun = torch.stack([lam > 1e-4 for _, lam, _ in model.calls]).int().argmax(0)
        assert (begun[:, 1] < begun[:, 2]).all() and (begun[:, 2] < begun[:, 0]).all()


# ---- calls, trace, seeds, settings


def test_sampling_steps_count_calls_and_0_is_one_for_every_token():
    """One call a step with w = 1; with windows only those in which something moves."""
    for steps, calls in ((1, 1), (5, 5), (0, 3)):
        info = bit_diffusion.sample(three(), config(3, 3, sampling_steps=steps), 3, generator(1))[1]
        assert info["nfe"] == calls
    model, start = three(), torch.tensor([[0, 1, 3]])
    info = bit_diffusion.sample(model, config(3, 3, window=0.1, sampling_steps=50), 1, generator(1),
                                start=start)[1]
    assert info["nfe"] == len(model.calls) <= 7


def test_the_trace_shows_what_is_sure_and_ends_with_the_sample():
    """One frame a step: given tokens, and what codes stand for as soon as they have no wrong bit
    with at least half of the probability; else V, also for the code of no token."""
    for clock, w in (("random", 0.0), ("maxprob", 0.0), ("random", 1.0)):
        model, trace = three(), []
        cfg = config(3, 3, window=0.4, clock=clock, sampling_steps=12, guidance=w)
        x, info = bit_diffusion.sample(model, cfg, 8, generator(1), torch.tensor([2]), trace)
        calls, frames = zip(*trace)
        each = 2 if w else 1
        assert calls == tuple(range(each, info["nfe"] + 1, each))
        frames = torch.stack(frames)
        assert frames.shape == (len(calls), 8, 3) and (frames[:, :, 0] == 2).all()
        assert torch.equal(frames[-1], x) and (frames[0][:, 1:] == 3).double().mean() > 0.5
        for (bits, lam, _), frame in zip(model.calls[each::each], frames):
            ids = (bits > 0).long() @ torch.tensor([2, 1])  # word 3 is no token, and V is 3
            p = (1 / (1 + (-lam.double()).exp())) ** 2
            clear = (p - 0.5).abs() > 1e-3
            assert torch.equal(frame[clear], torch.where(p < 0.5, 3, ids)[clear])


def test_a_seed_fixes_the_samples():
    for head, sampler in KINDS:
        model = three(head, 0.5)
        cfg = config(3, 3, head=model.head_kind, window=0.4, sampler=sampler, sampling_steps=5)
        x, y, z = (bit_diffusion.sample(model, cfg, 20, generator(s))[0] for s in (1, 1, 2))
        assert torch.equal(x, y) and not torch.equal(x, z)


def test_a_network_of_the_script_samples_with_every_setting():
    """Ids within the vocabulary, the prompt kept, under autocast too."""
    torch.manual_seed(0)
    for change in (dict(), dict(guidance=1.0), dict(clock="maxprob"), dict(sampler="bit"),
                   dict(head="bit", invalid="modulo"), dict(head="bit", guidance=0.7, window=1.0),
                   dict(head="bit", parts=2, sampler="token", clock="maxprob", temperature=0.0),
                   dict(head="bit", parts=4, input="byte", guidance=1.0, temperature=0.5),
                   dict(input="bit", skip=False, clock="l2r"), dict(sampler="bit", temperature=0.0),
                   dict(top_k=2, top_p=0.9, temperature=0.0), dict(input="raw", cond="add")):
        cfg = config(11, 6, **(dict(window=0.4, sampling_steps=5) | change))
        model = bit_diffusion.Model(cfg)
        for p in model.parameters():
            p.data += 0.2 * torch.randn(p.shape)
        for cast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                x, _ = bit_diffusion.sample(model, cfg, 3, generator(1), torch.tensor([6, 5]))
            assert x.shape == (3, 6) and (x[:, :2] == torch.tensor([6, 5])).all()
            assert 0 <= x.min() and x.max() < 11


def test_a_temperature_needs_no_skip():
    """(E4) own evidence is told apart from the answer whether or not the network adds it: the same
    answer, the same aims."""
    model = three("token", 0.5)
    bits, lam = torch.randn(50, 3, 2, generator=generator(1)).sign(), torch.full((50, 3), 1.5)
    out, cfg = model(bits, lam).flatten(0, 1), config(3, 3, temperature=0.6)
    one, two = (bit_diffusion.aim(model, out, bits.flatten(0, 1), lam.flatten(),
                                  dataclasses.replace(cfg, skip=skip), generator(2))[0]
                for skip in (True, False))
    assert torch.equal(one, two)
