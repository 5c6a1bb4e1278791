"""How diffugpt_varlen.py samples: canvases, orders, shrinking and growing, filters, the parent."""
import dataclasses
import inspect
import itertools
import math

import pytest
import torch
from scipy import stats

import diffugpt_varlen as dv
from tables import all_rows, chi_square, generator
from varlen_tables import (EOS, MASK, PAD, Oracle, Script, all_states, conditionals, documents,
                           total_variation)

T, ORACLE = 6, Oracle()
CANVASES = ("full", "eos", "law", "block", "pin")
EXACT = ("random", "l2r", "maxprob", "margin", "entropy")  # orders that only look at laws
ORDERS = EXACT + ("sampled",)
SUBSETS = all_rows(2, T).bool()


def config(**changes):
    return dv.Config(**(dict(vocab_size=3, eos=2, bos=2, seq_len=T, rows="docs", canvas="full",
                             q=0.6, block=2) | changes))


def fresh():
    """The oracle, asked nothing yet."""
    ORACLE.strange, ORACLE.asked = 0, []
    return ORACLE


def fixed(row, sure=20.0):
    """A network that says the same whatever it sees: row (T,), id V where it knows nothing."""
    one_hot = torch.nn.functional.one_hot(torch.tensor(row), 5)[:, :4]
    logits = sure * one_hot.float()
    return Script(lambda idx: logits[:idx.shape[1]].expand(len(idx), -1, -1))


def wild(seed=0, scale=1.5, outputs=4):
    """A network whose answers contradict each other: noise that depends on what it sees."""
    table = scale * torch.randn(997, T, outputs, generator=generator(seed))
    place = torch.tensor([3, 19, 101, 7, 53, 29])

    def logits(idx):
        code = ((idx + 1) * place[:idx.shape[1]]).sum(1) % 997
        return table[code, :idx.shape[1]]
    return Script(logits, outputs)


def only_text():
    """A network that never ends a document, and cannot tell 0 from 1."""
    logits = torch.tensor([0.0, 0.0, -60.0, -60.0])
    return Script(lambda idx: logits.expand(*idx.shape, 4))


def tiny(**changes):
    """A real network, shaken: (model, its Config)."""
    cfg = config(n_layer=2, n_head=2, n_embd=16, **changes)
    model = dv.Model(cfg).requires_grad_(False)
    g = generator(3)
    for p in model.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=g)
    return model, cfg


def text_of(x):
    """Number of tokens before the first EOS of rows x (n, T).  # (n,)"""
    return ((x == EOS).cumsum(1) == 0).sum(1)


def check_law(x, p, floor=0.01):
    """Samples x have the law p over the oracle's documents."""
    counts = ORACLE.counts(x)
    tv, chance = total_variation(counts, p)
    assert tv < chance + floor
    assert chi_square(counts, p) > 1e-3


def mutant(was, now):
    """sample() with one expression replaced."""
    source, space = inspect.getsource(dv.sample), dict(vars(dv))
    assert source.count(was) == 1, "the script has changed: write this mutant anew"
    exec(source.replace(was, now), space)
    return space["sample"]


# ---- the oracle


@pytest.mark.parametrize("w", range(1, T))
def test_what_is_known_does_not_depend_on_the_cut(w):
    """(E6) p(x_i | visible) among documents cut at w is that among documents cut at T > w which
    show the same, whatever is shown; a cut that looks at the document changes it."""
    states = all_states(w)
    q, total = conditionals(*documents(w), states)
    can = total > 0
    number = ORACLE.code(states[can])
    assert can.any() and ORACLE.possible[number].all()
    assert torch.allclose(q[can], ORACLE.q[number][:, :w], atol=1e-12)
    rows, p = documents(T)
    short = ORACLE.length < w  # rows cut behind their ends
    other, total = conditionals(rows[short, :w], p[short] / p[short].sum(), states[can])
    assert (other - q[can])[total > 0].abs().max() > 0.1


@pytest.mark.parametrize("m", [0, 1, 2, 3])
def test_the_length_law_is_that_of_the_documents(m):
    """(E3) (E4) EOS and PAD at a masked position are P(L = i) and P(L < i); the hazards give the
    law of L after every prompt, in one call, also when prompts differ in length."""
    prompts = all_rows(2, m) if m else torch.zeros(1, 0, dtype=torch.long)
    want = []
    for prompt in prompts:
        fits = (ORACLE.rows[:, :m] == prompt).all(1)
        law = torch.zeros(T + 1, dtype=torch.float64).index_add(
            0, ORACLE.length[fits], ORACLE.p[fits])
        want.append(law / law.sum())
    want = torch.stack(want)
    x = torch.full((len(prompts), T), MASK)
    x[:, :m] = prompts
    q = ORACLE(x).double().softmax(2)[:, m:]
    assert torch.allclose(q[..., EOS], want[:, m:T], atol=1e-6)
    assert torch.allclose(q[..., PAD], want.cumsum(1)[:, m:T] - want[:, m:T], atol=1e-6)
    x[:, m:] = 0  # is not used
    got = dv.length_law(fresh(), x, torch.full((len(x),), m), config()).double().exp()
    assert torch.allclose(got, want, atol=1e-5) and len(ORACLE.asked) == 1
    ragged = torch.cat((x, torch.zeros(1, T, dtype=torch.long)))
    got = dv.length_law(ORACLE, ragged, torch.tensor([m] * len(x) + [0]), config()).double().exp()
    assert torch.allclose(got, torch.cat((want, ORACLE.lengths_law()[None])), atol=1e-5)


# ---- every canvas has the law of the documents


@pytest.mark.parametrize("order", EXACT)
@pytest.mark.parametrize("canvas", CANVASES)
def test_every_canvas_and_order_has_the_law_of_the_documents(canvas, order):
    """(E6) (E7) one token a call from the network that is never wrong: the exact law, the exact
    lengths, also of documents longer than the canvas, and no contradiction."""
    x, info = dv.sample(fresh(), config(canvas=canvas, order=order), 10_000, generator(1))
    check_law(x, ORACLE.p)
    assert chi_square(text_of(x).bincount(minlength=T + 1), ORACLE.lengths_law()) > 1e-3
    assert info["contradictions"] == 0 and ORACLE.strange == 0
    assert info["nfe"] == T + (canvas in ("law", "pin"))


@pytest.mark.parametrize("changes", [
    dict(block=1), dict(block=4), dict(block=9), dict(canvas="law", q=0.05),
    dict(canvas="law", q=0.95, block=1)])
def test_the_law_does_not_depend_on_where_a_canvas_begins(changes):
    """(E6) other first canvases, other extensions, the same law."""
    cfg = config(**(dict(canvas="block", order="maxprob") | changes))
    check_law(dv.sample(fresh(), cfg, 8000, generator(2))[0], ORACLE.p)
    assert ORACLE.strange == 0


@pytest.mark.parametrize("order", ["random", "margin"])
@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("shown, ends", [("prompts", False), ("prompts", True), ("holes", False),
                                         ("holes", True)])
def test_what_is_given_is_kept_and_the_rest_has_its_law(canvas, order, shown, ends):
    """(E6) (E7) documents of which some positions are given, prompts or any, different ones in
    every row and with or without their end: the completed documents have the law of documents."""
    show = torch.tensor([[i < m for i in range(T)] for m in range(T)])
    show = show if shown == "prompts" else SUBSETS[:-1]
    tokens = torch.where(show[:, None], ORACLE.rows, MASK)  # (subsets, documents, T)
    no_pad = (tokens != PAD).all(2)
    usable = (tokens == EOS).any(2) | no_pad if ends else no_pad & (tokens != EOS).all(2)
    p = usable * ORACLE.p / len(show)  # whether a row is used depends on what it shows
    g = generator(4)
    pick = torch.multinomial(p.flatten(), 8000, replacement=True, generator=g)
    start = torch.where(tokens == MASK, 3, tokens.masked_fill(tokens == PAD, EOS)).flatten(0, 1)
    start = start[pick]
    x, info = dv.sample(fresh(), config(canvas=canvas, order=order), 8000, g, start=start)
    given = start != 3
    assert torch.equal(x[given], start[given])
    check_law(x, p.sum(0) / p.sum())
    assert ORACLE.strange == 0 and info["contradictions"] == 0


@pytest.mark.parametrize("order", ["random", "entropy"])
@pytest.mark.parametrize("canvas", CANVASES)
def test_a_limit_cuts_the_document_and_changes_nothing_else(canvas, order):
    """(E6) max_new_tokens: the law of the first tokens, without and with a prompt, in every
    canvas."""
    cfg, n = config(canvas=canvas, order=order, max_new_tokens=3), 8000
    for prompt in (None, torch.tensor([1]), torch.tensor([[0, 1], [1, 1]]).repeat(n // 2, 1)):
        x, _ = dv.sample(fresh(), cfg, n, generator(5), prompt)
        m = 0 if prompt is None else prompt.shape[-1]
        assert (x[:, m + 3:] == EOS).all() and ORACLE.strange == 0
        for r in range(2 if m == 2 else 1):
            rows, p = documents(m + 3)
            one = prompt[r] if m == 2 else prompt
            fits = (rows[:, :m] == one).all(1) if m else torch.ones(len(rows), dtype=torch.bool)
            rows, p = rows[fits].masked_fill(rows[fits] == PAD, EOS), p[fits] / p[fits].sum()
            part = x[r::2] if m == 2 else x
            if m:
                assert (part[:, :m] == one).all()
            counts = (part[:, None, :m + 3] == rows).all(2).sum(0)
            assert counts.sum() == len(part) and chi_square(counts, p) > 1e-3


@pytest.mark.parametrize("canvas", CANVASES)
def test_looking_at_drawn_tokens_breaks_the_law(canvas):
    """(E6) the order of Gong et al. and Nie et al. from the network that is never wrong: another
    law, and documents that end too early where their end is looked for from the start."""
    x, _ = dv.sample(fresh(), config(canvas=canvas, order="sampled"), 5000, generator(6))
    assert total_variation(ORACLE.counts(x), ORACLE.p)[0] > 0.2
    if canvas in ("full", "eos", "law"):
        want = (ORACLE.lengths_law() * torch.arange(T + 1)).sum()
        assert text_of(x).double().mean() < (0.8 if canvas == "law" else 0.6) * want


@pytest.mark.parametrize("order", ["random", "maxprob"])
@pytest.mark.parametrize("canvas", ["eos", "law"])
def test_forgetting_the_visible_pad_breaks_the_law(canvas, order):
    """(E7) a canvas cut before its first PAD says nothing about where the document ends: too
    long."""
    broken = mutant("first + 1", "first + (x == cfg.eos).any(1)")
    x, _ = broken(fresh(), config(canvas=canvas, order=order), 5000, generator(7))
    assert total_variation(ORACLE.counts(x), ORACLE.p)[0] > 0.1
    assert text_of(x).double().mean() > 0.3 + (ORACLE.lengths_law() * torch.arange(T + 1)).sum()


# ---- one canvas, call by call


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("order", ORDERS)
def test_a_canvas_is_written_once_and_cut_only_behind_its_end(canvas, order):
    """(E7) k positions a call, each once; what is cut stands behind an EOS or PAD, never an open
    position before it; a canvas grows only when it is full of text, by a block, to the limit."""
    grown = cut = 0
    for seed in range(12):
        model = wild(seed, 1.0) if seed % 4 else only_text()
        k, new = (2, 5) if seed % 2 else (1, 6)
        cfg = config(canvas=canvas, order=order, block=3, max_new_tokens=new,
                     sampling_steps=3 if k == 2 else 0)
        x, info = dv.sample(model, cfg, 1, generator(seed))
        asked = [idx[0].tolist() for idx, _, _ in model.asked[canvas in ("law", "pin"):]]
        assert len(model.asked) == info["nfe"] and 0 <= x.min() and text_of(x) <= new
        assert all(MASK in now and len(now) <= new for now in asked)
        for now, after in zip(asked, asked[1:]):
            left, wrote = now.count(MASK), sum(a == MASK != b for a, b in zip(now, after))
            assert all(a == b for a, b in zip(now, after) if a != MASK)  # written once
            ended = [i for i, b in enumerate(after) if b in (EOS, PAD)]
            assert canvas == "full" or ended in ([], [len(after) - 1])
            if len(after) > len(now):
                grown += 1
                assert left == wrote <= k and not ended
                assert len(after) == min(new, len(now) + 3)
                assert set(after[len(now):]) == {MASK}
            elif len(after) < len(now):
                cut += 1
                assert canvas != "full" and ended and 0 < wrote <= k
            else:
                assert wrote == k < left
    assert (grown > 0) == (canvas in ("law", "block"))
    if order == "l2r" or canvas in ("full", "pin"):  # nothing is open before or behind the end
        assert not cut
    else:
        assert cut or canvas == "block"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("canvas", CANVASES)
def test_frames_fill_up_and_end_in_the_samples(canvas, order):
    """Positions of a trace are -1 until they are written, once; given tokens stand in every frame;
    calls are counted; samples hold tokens only."""
    start = torch.tensor([[1, 0, 3, 3, 3, 3], [3, 1, 3, 0, 3, 3], [0, 3, 3, 3, 2, 2]])[:, :T]
    start = start.repeat(20, 1)
    for rows in (start, start[[i for i in range(60) if i % 3 < 2]]):
        trace, cfg = [], config(canvas=canvas, order=order, sampling_steps=3)
        x, info = dv.sample(wild(1), cfg, len(rows), generator(8), trace=trace, start=rows)
        calls, frames = zip(*trace)
        given = (rows != 3) & (rows != EOS)
        assert calls[-1] == info["nfe"] and list(calls) == sorted(set(calls))
        assert torch.equal(torch.where(text_of(x)[:, None] > torch.arange(T), frames[-1], EOS), x)
        for now, after in zip(frames, frames[1:]):
            text = (now == 0) | (now == 1)
            assert ((now == after) | (after == EOS))[text].all()
            assert not (after == -1)[text].any()
        assert -1 <= min(f.min() for f in frames) and max(f.max() for f in frames) <= EOS
        assert (frames[-1] >= 0).all() and 0 <= x.min() and x.max() <= EOS
        assert torch.equal(frames[0][given], rows[given])
        assert torch.equal(x[:, 0][given[:, 0]], rows[:, 0][given[:, 0]])


CALLS = [  # settings, network calls, tokens that went through it for one row
    (dict(canvas="full", order="l2r"), 6, 6 * 7),
    (dict(canvas="eos", order="l2r"), 4, 4 * 7),
    (dict(canvas="block", order="l2r"), 4, 3 + 3 + 5 + 5),
    (dict(canvas="block", order="l2r", block=3), 4, 4 + 4 + 4 + 7),
    (dict(canvas="block", order="l2r", block=4), 4, 4 * 5),
    (dict(canvas="law", order="l2r"), 1 + 4, 7 + 4 * 5),
    (dict(canvas="pin", order="l2r"), 1 + 3, 7 + 3 * 5),
    (dict(canvas="eos", order="maxprob"), 4, 7 + 3 * 5),
    (dict(canvas="eos", order="l2r", sampling_steps=3), 2, 2 * 7),
    (dict(canvas="eos", order="l2r", sampling_steps=1), 1, 7),
    (dict(canvas="pin", order="l2r", sampling_steps=1), 1 + 1, 7 + 5),
    (dict(canvas="eos", order="l2r", max_new_tokens=5), 4, 4 * 6),
    (dict(canvas="law", order="l2r", max_new_tokens=2), 1 + 2, 7 + 2 * 3),
]


@pytest.mark.parametrize("changes, calls, tokens", CALLS)
def test_calls_and_tokens_are_those_counted_by_hand(changes, calls, tokens):
    """(E7) a network that ends every document at position 3, and is surest of that: calls, and
    tokens that went through it, BOS and the call that asks for the length included."""
    rows = [[3.0, 0, -60, -60]] * 3 + [[-60.0, -60, 40, -60]] + [[0, 3.0, -60, -60]] * 2
    logits = torch.tensor(rows)
    model = Script(lambda idx: logits[:idx.shape[1]].expand(len(idx), -1, -1))
    for n in (1, 5):
        model.asked.clear()
        x, info = dv.sample(model, config(temperature=0.0, **changes), n, generator(0))
        assert (info["nfe"], info["forwarded"]) == (calls, n * tokens)
        assert sum(len(idx) * (idx.shape[1] + 1) for idx, _, _ in model.asked) == n * tokens
        want = [0, 0, 0, 2, 2, 2][:changes.get("max_new_tokens", T)]
        assert x.tolist() == [(want + [2] * T)[:T]] * n


def test_rows_of_similar_length_go_together():
    """(E7) rows with ends at 5, 0, 2, 4 and 4, given or open: at most four groups, each as wide as
    its longest row; rows that are complete do not go at all; counted by hand."""
    start = torch.tensor([[3, 3, 3, 3, 3, 2], [2] * 6, [3, 3, 2, 2, 2, 2], [3, 3, 3, 3, 2, 2],
                          [0, 3, 0, 3, 2, 2]])
    x, info = dv.sample(fixed([1] * 6), config(canvas="eos", order="l2r"), 5, generator(0),
                        start=start)
    assert info["nfe"] == 5  # open: 5, 0, 2, 4, 2 positions on canvases of 6, 1, 3, 5, 5
    # calls 1 and 2: four groups of one, 3, 5, 5, 6 wide; calls 3 and 4: 5 and 6; call 5: 6
    assert info["forwarded"] == 2 * (4 + 6 + 6 + 7) + 2 * (6 + 7) + 7
    assert x.tolist() == [[1, 1, 1, 1, 1, 2], [2] * 6, [1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 2, 2],
                          [0, 1, 0, 1, 2, 2]]
    end = torch.tensor([1, 3, 5, 6, 6])
    model = only_text()
    _, passed = dv.predict(model, torch.full((5, T), MASK), torch.arange(T) < end[:, None], end)
    assert passed == 2 * (3 + 1) + 2 * (6 + 1) + (6 + 1)


@pytest.mark.parametrize("shift", [True, False])
def test_rows_together_are_told_what_each_is_told_alone(shift):
    """(E2) (E6) a ragged batch through the real network, in every order of its rows and whatever
    stands outside the canvases: the logits of single rows on canvases of their own."""
    model, cfg = tiny(shift=shift)
    g = generator(1)
    end = torch.tensor([2, 6, 3, 5, 3])
    x = torch.randint(0, 5, (5, T), generator=g)
    where = (torch.rand(5, T, generator=g) < 0.6) & (torch.arange(T) < end[:, None])
    where[2] = False  # nothing is wanted of this one
    alone = [model(x[i:i + 1, :end[i]], where[i:i + 1, :end[i]]) for i in range(5)]
    assert where.sum() >= 8 and torch.cat(alone).std() > 0.5
    for turn in itertools.islice(itertools.permutations(range(5)), 0, 120, 5):
        turn = list(turn)
        noise = torch.randint(0, 5, (5, T), generator=g)
        rows = torch.where(torch.arange(T) < end[turn][:, None], x[turn], noise)
        got, passed = dv.predict(model, rows, where[turn], end[turn])
        want = torch.cat([alone[i] for i in turn])
        assert got.shape == want.shape and torch.allclose(got, want, atol=1e-4)
        assert passed < 5 * 7
    got, passed = dv.predict(model, x[:1], where[:1], end[:1])
    assert torch.allclose(got, alone[0], atol=1e-4) and passed == 3


# ---- how many tokens a call, and how many at all


@pytest.mark.parametrize("order", ["random", "entropy"])
@pytest.mark.parametrize("canvas", CANVASES)
def test_sampling_steps_share_the_tokens_and_nobody_writes_more_than_allowed(canvas, order):
    """ceil(room / steps) tokens a call, so that one step is one call on a full canvas; exactly
    max_new_tokens behind the prompt of a document that does not end."""
    for P, new, steps in ((0, 0, 1), (0, 0, 4), (2, 0, 3), (1, 3, 2), (1, 3, 3), (2, 0, 0)):
        model = only_text()
        cfg = config(canvas=canvas, order=order, max_new_tokens=new, sampling_steps=steps, block=3)
        prompt = torch.ones(P, dtype=torch.long) if P else None
        x, info = dv.sample(model, cfg, 7, generator(1), prompt)
        room = min(new or T, T - P)
        k = math.ceil(room / steps) if steps else 1
        part = 3 if canvas == "block" else room
        if canvas == "law":  # the whole canvas: the document is longer for certain
            part = room
        calls = sum(math.ceil(min(part, room - i) / k) for i in range(0, room, part))
        assert info["nfe"] == calls + (canvas in ("law", "pin")) and k * info["nfe"] >= room
        assert (text_of(x) == P + room).all() and x.shape == (7, T)
        assert (x[:, :P] == 1).all() and len(x[:, P:P + room].unique()) == 2


@pytest.mark.parametrize("canvas", CANVASES)
def test_streams_have_no_end(canvas):
    """Rows of a stream are prompt and max_new_tokens, EOS among them, whatever the canvas; one
    token a call has the law of independent positions."""
    logits = torch.tensor([0.0, 0.5, 1.0])
    model = Script(lambda idx: logits.expand(*idx.shape, 3), 3)
    cfg = config(rows="stream", canvas=canvas, max_new_tokens=3)
    prompt = torch.tensor([1, 2])
    x, info = dv.sample(model, cfg, 6000, generator(1), prompt)
    assert x.shape == (6000, 5) and (x[:, :2] == prompt).all() and info["contradictions"] == 0
    assert 3 <= info["nfe"] <= 3 + (canvas == "law")
    counts = (x[:, 2:] * torch.tensor([9, 3, 1])).sum(1).bincount(minlength=27)
    p = logits.double().softmax(0)
    assert chi_square(counts, torch.einsum("i,j,k->ijk", p, p, p).flatten()) > 1e-3
    x, _ = dv.sample(model, dataclasses.replace(cfg, max_new_tokens=0), 3, generator(1), prompt)
    assert x.shape == (3, T)


@pytest.mark.parametrize("order", ["random", "maxprob"])
@pytest.mark.parametrize("canvas", ["full", "eos", "pin"])
def test_ancestral_quota_reveals_by_chance(canvas, order):
    """Of n open positions Binomial(n, 1 / 4) are written first, then Binomial(rest, 1 / 3), and
    after sampling_steps calls none is left; one step writes all."""
    cfg, trace = config(canvas=canvas, order=order, quota="ancestral", sampling_steps=4), []
    x, info = dv.sample(only_text(), cfg, 4000, generator(1), trace=trace)
    assert info["nfe"] == 4 + (canvas == "pin") and (text_of(x) == T).all()
    left = [(frame == -1).sum(1) for _, frame in trace]
    assert (left[0] == T).all() and (left[-1] == 0).all() and len(trace) == 5
    one, two = left[0] - left[1], left[1] - left[2]
    want = [[stats.binom.pmf(a, T, 1 / 4) * stats.binom.pmf(b, T - a, 1 / 3)
             for b in range(T + 1)] for a in range(T + 1)]
    counts = (one * (T + 1) + two).bincount(minlength=(T + 1) ** 2)
    keep = torch.tensor(want).flatten() > 0
    assert chi_square(counts[keep], torch.tensor(want).flatten()[keep]) > 1e-3
    cfg = dataclasses.replace(cfg, sampling_steps=1)
    assert dv.sample(only_text(), cfg, 9, generator(1))[1]["nfe"] == 1 + (canvas == "pin")


def test_ancestral_quota_keeps_the_ends_of_documents():
    """Few steps of the ancestral quota from a real document law: prompts stay, every row is a
    document, and all steps are used at most."""
    prompt = torch.tensor([1, 0])
    for canvas in ("full", "eos", "pin"):
        cfg = config(canvas=canvas, quota="ancestral", sampling_steps=3)
        x, info = dv.sample(fresh(), cfg, 500, generator(1), prompt)
        assert info["nfe"] <= 3 + (canvas == "pin") and (x[:, :2] == prompt).all()
        assert ORACLE.counts(x).sum() == 500


# ---- the choice of tokens


def greedy(order):
    """The oracle's row when the surest position takes its likeliest token, by hand: (T,)."""
    x = torch.full((1, T), MASK)
    while (x == MASK).any():
        p = ORACLE(x)[0].double().softmax(1)
        top = p.topk(2).values
        sure = dict(maxprob=top[:, 0], margin=top[:, 0] - top[:, 1], l2r=-torch.arange(T).double(),
                    entropy=-torch.special.entr(p).sum(1))[order]
        i = sure.masked_fill(x[0] != MASK, -torch.inf).argmax()
        x[0, i] = p[i].argmax()
    return x[0].masked_fill(x[0] == PAD, EOS)


@pytest.mark.parametrize("order", ["l2r", "maxprob", "margin", "entropy"])
def test_temperature_zero_and_one_token_to_choose_from_are_the_argmax(order):
    """(E7) temperature 0, close to it, and top_k = 1 take the likeliest token of the surest
    position, with or without shrinking, from every generator."""
    want = greedy(order)
    for changes in (dict(temperature=0.0), dict(temperature=1e-3), dict(top_k=1)):
        for canvas in ("full", "eos"):
            cfg = config(canvas=canvas, order=order, **changes)
            for seed in (1, 2):
                x, _ = dv.sample(ORACLE, cfg, 3, generator(seed))
                assert torch.equal(x, want.expand(3, -1))


def test_filters_against_tables():
    """Temperature, then top_k with ties, then top_p, which keeps the token that crosses it."""
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.45, 0.05]])

    def kept(**changes):
        return dv.filter_logits(p.log(), config(**changes)).softmax(1)
    assert torch.allclose(kept(), p)
    assert torch.allclose(kept(top_p=0.6), torch.tensor([[0, 4, 0, 3], [5, 0, 9, 0.0]])
                          / torch.tensor([[7.0], [14]]))
    assert torch.allclose(kept(top_p=0.01), torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 0]]))
    assert torch.allclose(kept(top_k=2), torch.tensor([[0, 4, 0, 3], [5, 5, 9, 0.0]])
                          / torch.tensor([[7.0], [19]]))
    assert torch.allclose(kept(temperature=0.5), p ** 2 / (p ** 2).sum(1, keepdim=True))
    sharp = torch.tensor([[0.0, 16, 0, 9], [0, 0, 1, 0]]) / torch.tensor([[25.0], [1]])
    assert torch.allclose(kept(temperature=0.5, top_p=0.6), sharp)
    assert torch.allclose(kept(top_k=3, top_p=0.75), torch.tensor(
        [[0, 4, 0, 3], [5, 5, 9, 0.0]]) / torch.tensor([[7.0], [19]]))
    assert torch.equal(kept(temperature=0.0), torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 0]]))


def test_filters_shape_the_law_of_samples():
    """top_p and temperature act on every position's own law: independent positions."""
    p = torch.tensor([0.45, 0.35, 0.2, 1e-12])
    model = Script(lambda idx: p.log().expand(*idx.shape, 4))
    x, _ = dv.sample(model, config(top_p=0.7, canvas="eos"), 4000, generator(1))
    assert (text_of(x) == T).all()
    assert abs((x == 0).double().mean() - 0.45 / 0.8) < 5 * (0.25 / x.numel()) ** 0.5
    x, _ = dv.sample(model, config(temperature=0.5, top_k=2, order="margin"), 4000, generator(1))
    want = 0.45 ** 2 / (0.45 ** 2 + 0.35 ** 2)
    assert abs((x == 0).double().mean() - want) < 5 * (0.25 / x.numel()) ** 0.5


def test_the_penalty_against_a_table():
    """Logits of tokens in the row are divided if positive and multiplied if negative; EOS and PAD,
    and tokens that are not in the row, stay."""
    logits = torch.tensor([[2.0, -2.0, 2.0, 2.0], [2.0, -2.0, -2.0, -2.0], [0.0, 3.0, 1.0, 1.0]])
    seen = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0]]).bool()
    want = torch.tensor([[1.6, -2.5, 2.0, 2.0], [2.0, -2.0, -2.0, -2.0], [0.0, 3.0, 1.0, 1.0]])
    assert torch.allclose(dv.penalize(logits, seen, config(repetition_penalty=1.25)), want)
    assert torch.equal(dv.penalize(logits, seen, config()), logits)
    assert seen.all(1).tolist() == [True, False, False]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("canvas", ["full", "eos", "block", "pin"])
def test_samples_feel_the_penalty_of_what_is_in_their_row(canvas, order):
    """Greedy rows of a network that prefers 0: the penalty makes it say 1 where the row, prompt
    included, has a 0 and no 1; with both it says 0 again."""
    logits = torch.tensor([2.0, 1.5, -60.0, -60.0])
    model = Script(lambda idx: logits.expand(*idx.shape, 4))
    cfg = config(canvas=canvas, order=order, temperature=0.0, block=6, repetition_penalty=2.0)
    for prompt, ones in ((None, 1), (torch.tensor([0]), 1), (torch.tensor([1]), 1),
                         (torch.tensor([1, 0]), 1), (torch.tensor([0, 0]), 1)):
        x, _ = dv.sample(model, cfg, 9, generator(1), prompt)
        assert ((x == 1).sum(1) == ones).all() and (text_of(x) == T).all()
        plain, _ = dv.sample(model, dataclasses.replace(cfg, repetition_penalty=1.0), 9,
                             generator(1), prompt)
        P = 0 if prompt is None else len(prompt)
        assert (plain[:, P:] == 0).all()


@pytest.mark.parametrize("canvas", CANVASES)
def test_samples_depend_on_the_generator_alone(canvas):
    """The same generator draws the same rows, another one others, in every order and quota."""
    for order in ORDERS:
        cfg = config(canvas=canvas, order=order)
        one, two, other = (dv.sample(ORACLE, cfg, 50, generator(s))[0] for s in (1, 1, 2))
        assert torch.equal(one, two) and not torch.equal(one, other)


# ---- ends that are given, and documents that contradict themselves


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("canvas", CANVASES)
def test_a_given_end_is_kept_and_nothing_ends_before_it(canvas, order):
    """(E7) holes before an EOS in `start` are filled with text, by a network that would end the
    document everywhere; nothing is written behind it."""
    model = wild(2, 0.5)
    eager = Script(lambda idx: model.logits(idx) + torch.tensor([0.0, 0.0, 2.0, 2.0]))
    start = torch.tensor([[3, 3, 3, 3, 2, 2], [0, 3, 3, 3, 3, 2], [3, 2, 3, 3, 3, 3],
                          [3, 1, 3, 2, 3, 3]]).repeat(25, 1)
    for steps in (0, 2):
        x, info = dv.sample(eager, config(canvas=canvas, order=order, sampling_steps=steps), 100,
                            generator(1), start=start)
        assert torch.equal(text_of(x), torch.tensor([4, 5, 1, 3]).repeat(25))
        given = (start != 3) & (torch.arange(T) <= text_of(start)[:, None])
        assert torch.equal(x[given], start[given]) and info["contradictions"] == 0
        width = max(idx.shape[1] for idx, _, _ in eager.asked)
        assert width == 6
        eager.asked.clear()


@pytest.mark.parametrize("order", ORDERS)
def test_a_pinned_length_has_the_length_law_even_of_a_network_that_errs(order):
    """(E4) (E7) canvas pin: lengths have the law that the network told at once, longer documents
    included, however much its later answers differ."""
    model, n = wild(4, 1.0), 6000
    for new in (0, 4):
        cfg = config(canvas="pin", order=order, sampling_steps=0 if new else 3, max_new_tokens=new)
        x, info = dv.sample(model, cfg, n, generator(3))
        m = torch.zeros(1, dtype=torch.long)
        p = dv.length_law(model, torch.zeros(1, T, dtype=torch.long), m, cfg)[0].double().exp()
        if new:
            p = torch.cat((p[:new], p[new:].sum(0, keepdim=True)))
        assert p[-1] > 0.02 and p.max() < 0.9
        assert chi_square(text_of(x).bincount(minlength=len(p)), p / p.sum()) > 1e-3
        assert info["contradictions"] == 0


@pytest.mark.parametrize("canvas", ["full", "eos"])
def test_text_behind_an_end_is_a_contradiction(canvas):
    """(E7) the share of rows in which text was written behind an end, at once or one by one; a
    canvas that stops there in time has none."""
    model = fixed([0, 2, 1, 1, 1, 1], 60.0)
    cfg = config(canvas=canvas, order="l2r", sampling_steps=2)
    x, info = dv.sample(model, cfg, 20, generator(1))
    assert info["contradictions"] == 1 and (text_of(x) == 1).all()
    assert info["nfe"] == (2 if canvas == "full" else 1)
    info = dv.sample(model, dataclasses.replace(cfg, sampling_steps=0), 20, generator(1))[1]
    assert info["contradictions"] == (1 if canvas == "full" else 0)
    # rows that begin with a 1 do not end
    end, on = (fixed(row, 60.0).logits for row in ([0, 2, 1, 1, 1, 1], [1] * 6))
    model = Script(lambda idx: torch.where(idx[:, :1, None] == 1, on(idx), end(idx)))
    prompt = torch.tensor([[0], [1], [1], [1]]).repeat(5, 1)
    x, info = dv.sample(model, cfg, 20, generator(1), prompt)
    assert info["contradictions"] == 0.25
    # a PAD behind the end is none
    info = dv.sample(fixed([0, 2, 3, 3, 3, 3], 60.0), cfg, 20, generator(1))[1]
    assert info["contradictions"] == 0


# ---- the parent


def parent(**changes):
    return tiny(pipeline="arm", init_from="scratch", seq_len=5, **changes)


@pytest.mark.parametrize("rows", ["docs", "stream"])
@pytest.mark.parametrize("changes", [dict(temperature=0.0), dict(), dict(repetition_penalty=1.7),
                                     dict(top_k=2, temperature=0.7), dict(max_new_tokens=2)])
def test_the_parents_cache_changes_nothing(rows, changes):
    """(E2) keys and values of the past, or the whole causal network again for every token: the
    same tokens from the same generator, with and without a prompt."""
    model, cfg = parent(rows=rows, **changes)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    for prompt in (None, torch.tensor([1, 0]), torch.tensor([[0], [1], [1]]).repeat(10, 1)):
        got, info = dv.sample(model, cfg, 30, generator(5), prompt)
        P = 0 if prompt is None else prompt.shape[-1]
        g, x = generator(5), torch.full((30, 5), EOS)
        if P:
            x[:, :P] = prompt
        ended, calls = torch.zeros(30, dtype=torch.bool), 0
        for i in range(P, min(5, P + (cfg.max_new_tokens or 5))):
            logits = model(x, seen=causal)[:, i]
            used = torch.stack([(x[:, :i] == v).any(1) for v in range(3)], 1)
            x[:, i] = dv.categorical(dv.filter_logits(dv.penalize(logits, used, cfg), cfg), g)
            x[ended, i] = EOS
            ended |= (x[:, i] == EOS) & (rows == "docs")
            calls += 1
            if ended.all():
                break
        assert torch.equal(got[:, :P + calls], x[:, :P + calls])
        assert (info["nfe"], info["forwarded"]) == (calls, 30 * (P + calls))
        assert (got[:, P + calls:] == EOS).all() and (not P or (got[:, :P] == prompt).all())


def test_the_parents_samples_have_the_law_of_its_likelihood():
    """(E2) the law of all documents by token_nll, of documents behind a prompt, and of windows."""
    for rows, prompt in (("docs", None), ("docs", torch.tensor([1])), ("stream", None)):
        model, cfg = parent(rows=rows)
        every = all_rows(3, 5)
        if rows == "docs":
            every = every[((every != EOS) | (every.roll(-1, 1) == EOS))[:, :-1].all(1)]
        p = (-dv.token_nll(model, every, cfg).double().sum(1)).exp()
        if prompt is not None:
            p *= every[:, 0] == prompt
            p /= p.sum()
        assert abs(p.sum() - 1) < 1e-5 and p.max() < 0.9
        x, _ = dv.sample(model, cfg, 6000, generator(2), prompt)
        counts = (x[:, None] == every).all(2).sum(0)
        assert counts.sum() == 6000 and chi_square(counts, p) > 1e-3


def test_the_parents_frames():
    """Frames of the parent show what is written, -1 behind it, EOS behind an end."""
    model, cfg = parent()
    trace = []
    x, info = dv.sample(model, cfg, 20, generator(1), torch.tensor([1]), trace)
    assert [calls for calls, _ in trace] == list(range(2, 2 + info["nfe"]))
    for i, frame in trace:
        assert torch.equal(frame[:, :i], x[:, :i])
        ended = (x[:, :i] == EOS).any(1)
        assert (frame[ended] == x[ended]).all() and (frame[~ended, i:] == -1).all()
