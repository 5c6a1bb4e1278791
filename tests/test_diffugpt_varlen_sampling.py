"""How diffugpt_varlen.py samples: length modes, orders, truncation and growth, given text, the
causal parent; against the enumerated distribution of a network that is never wrong."""
import dataclasses
import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import diffugpt_varlen as dv
from tables import all_rows, chi_square, generator
from varlen_tables import EOS, MASK, PAD, Oracle, Script, all_states, conditionals, documents

T, V, ORACLE = 6, 3, Oracle()
MODES = ("fixed", "truncate", "quantile", "blockwise", "presampled")
ORDERS = ("random", "l2r", "maxprob", "entropy")
every_mode = pytest.mark.parametrize("mode", MODES)
every_order = pytest.mark.parametrize("order", ORDERS)


def config(**changes):
    return dv.Config(**(dict(
        vocab_size=V, eos=2, bos=2, seq_len=T, rows="docs", length_mode="fixed", num_steps=0,
        temperature=1.0, length_quantile=0.6, block_size=2, n_layer=2, n_head=2, n_embd=16)
        | changes))


def draw(model, cfg, x, seed=1, sample=dv.sample):
    """Samples, NFE and what on_step saw, from canvases x (n, T) or of so many empty ones."""
    x, frames = torch.full((x, T), V) if isinstance(x, int) else x, []
    before = x.clone()
    out, nfe = sample(model, x, cfg, generator(seed),
                      on_step=lambda k, x: frames.append((k, x.clone())))
    assert torch.equal(x, before) and out.shape == x.shape and 0 <= out.min() and out.max() < V
    steps = [k for k, _ in frames]
    assert not steps or steps == list(range(nfe + 1 - len(steps), nfe + 1))
    return out, nfe, [frame for _, frame in frames]


def fresh():
    """The oracle, asked nothing yet."""
    ORACLE.strange = 0
    ORACLE.asked.clear()
    return ORACLE


def says(row, sure=60.0):
    """A network that says row (T,) whatever it sees."""
    logits = sure * F.one_hot(torch.tensor(row), 4).float()
    return Script(lambda idx, live: logits[:idx.shape[1]].expand(len(idx), -1, -1))


def wild(seed=0, scale=1.5):
    """A network whose answers contradict each other: noise that depends on what it sees."""
    table = scale * torch.randn(997, T, 4, generator=generator(seed))
    place = torch.tensor([3, 19, 101, 7, 53, 29])
    return Script(lambda idx, live: table[((idx + 1) * place[:idx.shape[1]]).sum(1) % 997,
                                          :idx.shape[1]])


def always(*logits):
    """A network of independent positions that are all alike."""
    return Script(lambda idx, live: torch.tensor(logits).expand(*idx.shape, len(logits)))


def only_text():
    return always(0.0, 0.0, -60.0, -60.0)


def shaken(**changes):
    """A real network: (model, its Config)."""
    cfg = config(**changes)
    model, g = dv.Model(cfg).requires_grad_(False), generator(3)
    for p in model.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=g)
    return model, cfg


def length(x):
    """Tokens before the first EOS of rows x (n, T): (n,)."""
    return (x != EOS).cumprod(1).sum(1)


def fits(x, p):
    """Do samples x have the distribution p over the oracle's documents? A p-value."""
    return chi_square(ORACLE.counts(x), p)


# ---- the distribution of the samples


@pytest.mark.parametrize("w", range(1, T))
def test_what_is_known_does_not_depend_on_the_crop(w):
    """(E5) p(x_i | visible) among documents cut at w is that among documents cut at T > w which
    show the same, whatever is shown; a crop that looks at the document changes it."""
    states = all_states(w)
    q, total = conditionals(*documents(w), states)
    number = ORACLE.code(states[total > 0])
    assert len(number) and ORACLE.possible[number].all()
    assert torch.allclose(q[total > 0], ORACLE.q[number][:, :w], atol=1e-12)
    short = ORACLE.length < w  # rows cut behind their ends
    other, seen = conditionals(ORACLE.rows[short, :w], ORACLE.p[short], states[total > 0])
    assert (other - q[total > 0])[seen > 0].abs().max() > 0.1


@every_order
@every_mode
def test_every_mode_and_order_has_the_distribution_of_the_documents(mode, order):
    """(E4) (E5) (E6) One token a step from the network that is never wrong: the exact distribution
    of documents and lengths, also of those longer than the canvas; no text behind an end."""
    x, nfe, frames = draw(fresh(), config(length_mode=mode, order=order), 10_000)
    assert fits(x, ORACLE.p) > 1e-3
    assert chi_square(length(x).bincount(minlength=T + 1), ORACLE.length_dist()) > 1e-3
    assert ORACLE.strange == 0 and nfe == T + (mode in ("quantile", "presampled"))
    for frame in frames:
        behind = torch.arange(T) > length(frame)[:, None]
        assert (frame[behind] >= EOS).all()


@pytest.mark.parametrize("changes", [
    dict(block_size=1), dict(block_size=4), dict(block_size=9),
    dict(length_mode="quantile", length_quantile=0.05),
    dict(length_mode="quantile", length_quantile=0.95, block_size=1)])
def test_it_does_not_depend_on_where_a_canvas_begins(changes):
    """(E5) Other first canvases, other extensions, the same distribution."""
    cfg = config(**(dict(length_mode="blockwise", order="margin") | changes))
    assert fits(draw(fresh(), cfg, 8000)[0], ORACLE.p) > 1e-3
    assert ORACLE.strange == 0


@pytest.mark.parametrize("order", ["random", "margin"])
@every_mode
@pytest.mark.parametrize("shown, ends", itertools.product(("prompts", "holes"), (False, True)))
def test_what_is_given_is_kept_and_the_rest_is_drawn_given_it(mode, order, shown, ends):
    """(E5) (E6) Documents of which some positions are given, prompts or any, different ones in each
    row and with or without their end: completed they have the distribution of documents."""
    show = torch.tensor([[i < m for i in range(T)] for m in range(T)])
    show = show if shown == "prompts" else all_rows(2, T).bool()[:-1]
    tokens = torch.where(show[:, None], ORACLE.rows, MASK)  # (subsets, documents, T)
    no_pad = (tokens != PAD).all(2)
    usable = (tokens == EOS).any(2) | no_pad if ends else no_pad & (tokens != EOS).all(2)
    p = usable * ORACLE.p / len(show)  # whether a row is used depends on what it shows
    pick = torch.multinomial(p.flatten(), 8000, replacement=True, generator=generator(4))
    start = torch.where(tokens == MASK, V, tokens.masked_fill(tokens == PAD, EOS))
    start = start.flatten(0, 1)[pick]
    x, _, _ = draw(fresh(), config(length_mode=mode, order=order), start)
    assert torch.equal(x[start != V], start[start != V]) and ORACLE.strange == 0
    assert fits(x, p.sum(0) / p.sum()) > 1e-3


@pytest.mark.parametrize("order", ["random", "maxprob"])
@pytest.mark.parametrize("mode", ["truncate", "quantile"])
def test_forgetting_the_visible_pad_breaks_the_distribution(mode, order):
    """(E6) Negative control: a canvas cut before its first PAD does not show that the document has
    ended; documents become too long."""
    source, was, space = inspect.getsource(dv.sample), ".sum(1) + 1)  # (E6)", dict(vars(dv))
    assert source.count(was) == 1, "the script has changed: write this mutant anew"
    exec(source.replace(was, ".sum(1) + (is_stop & (x == cfg.eos)).any(1))"), space)
    x, _, _ = draw(fresh(), config(length_mode=mode, order=order), 5000, sample=space["sample"])
    assert fits(x, ORACLE.p) < 1e-9
    assert length(x).double().mean() > 0.3 + ORACLE.length_dist() @ torch.arange(T + 1).double()


@every_order
def test_presampled_lengths_are_those_of_one_evaluation(order):
    """(E4) However much a network errs later: the lengths that it told at once, longer documents
    included, which the last position then says first."""
    model = wild(4, 1.0)
    cfg = config(length_mode="presampled", order=order, num_steps=3)
    x, nfe, frames = draw(model, cfg, 6000)
    p = dv.length_dist(model, x, torch.zeros(1).long(), cfg)[0].double().exp()
    assert p[-1] > 0.02 and p.max() < 0.9 and nfe == 1 + 3
    assert chi_square(length(x).bincount(minlength=T + 1), p / p.sum()) > 1e-3
    assert (frames[0][length(x) == T][:, -1] < EOS).all()


# ---- one canvas, step by step


@pytest.mark.parametrize("order", [*ORDERS, "margin"])
@every_mode
def test_a_canvas_is_written_once_and_cut_only_behind_its_end(mode, order):
    """(E6) k positions a step, each once; what is cut stands behind an EOS or PAD, never a masked
    position before it; a canvas grows only when it is full of text, by a block."""
    grown = cut = 0
    for seed in range(12):
        model, k = wild(seed, 1.0) if seed % 4 else only_text(), 2 if seed % 2 else 1
        cfg = config(length_mode=mode, order=order, block_size=3, num_steps=3 if k == 2 else 0)
        x, nfe, _ = draw(model, cfg, 1, seed)
        asked = [idx[0].tolist() for idx, _ in model.asked[mode in ("quantile", "presampled"):]]
        assert len(model.asked) == nfe and all(MASK in now and len(now) <= T for now in asked)
        for now, after in zip(asked, asked[1:]):
            left, wrote = now.count(MASK), sum(a == MASK != b for a, b in zip(now, after))
            assert all(a == b for a, b in zip(now, after) if a != MASK)  # written once
            ended = [i for i, b in enumerate(after) if b in (EOS, PAD)]
            assert mode == "fixed" or ended in ([], [len(after) - 1])
            if len(after) > len(now):
                grown += 1
                assert left == wrote <= k and not ended and len(after) == min(T, len(now) + 3)
                assert set(after[len(now):]) == {MASK}
            elif len(after) < len(now):
                cut += 1
                assert mode != "fixed" and ended and 0 < wrote <= k
            else:
                assert wrote == k < left
    assert (grown > 0) == (mode in ("quantile", "blockwise"))
    if order == "l2r" or mode in ("fixed", "presampled"):
        assert not cut
    else:
        assert cut or mode == "blockwise"


@every_order
@every_mode
def test_on_step_sees_masks_fill_up_once(mode, order):
    """V where masked, EOS where EOS or PAD stands; given tokens stand in every frame; the last one,
    cut at its first EOS, is the sample. The same generator repeats all of it."""
    start = torch.tensor([[1, 0, 3, 3, 3, 3], [3, 1, 3, 0, 3, 3], [0, 3, 3, 3, 2, 2]]).repeat(20, 1)
    for rows in (start, start[torch.arange(60) % 3 < 2]):
        cfg = config(length_mode=mode, order=order, num_steps=3)
        x, nfe, frames = draw(wild(1), cfg, rows)
        assert 0 < len(frames) <= nfe
        for now, after in zip([rows, *frames], frames):
            assert ((now == after) | (now == V))[now < EOS].all() and after.max() <= V
            assert torch.equal(after[(rows < EOS)], rows[rows < EOS])
        ends = torch.arange(T) >= length(frames[-1])[:, None]
        assert torch.equal(frames[-1].masked_fill(ends, EOS), x)
        again = draw(wild(1), cfg, rows)
        assert torch.equal(again[0], x) and all(map(torch.equal, again[2], frames))
        assert not torch.equal(draw(wild(1), cfg, rows, 2)[0], x)


COUNTS = [  # settings, network evaluations, tokens that went through the network for one row
    (dict(length_mode="fixed"), 6, 6 * 7),
    (dict(length_mode="truncate"), 4, 4 * 7),
    (dict(length_mode="blockwise"), 4, 3 + 3 + 5 + 5),
    (dict(length_mode="blockwise", block_size=3), 4, 4 + 4 + 4 + 7),
    (dict(length_mode="blockwise", block_size=4), 4, 4 * 5),
    (dict(length_mode="quantile"), 1 + 4, 7 + 4 * 5),
    (dict(length_mode="presampled"), 1 + 3, 7 + 3 * 5),
    (dict(length_mode="truncate", order="maxprob"), 4, 7 + 3 * 5),
    (dict(length_mode="truncate", num_steps=3), 2, 2 * 7),
    (dict(length_mode="truncate", num_steps=1), 1, 7),
    (dict(length_mode="fixed", num_steps=1), 1, 7),
    (dict(length_mode="presampled", num_steps=1), 1 + 1, 7 + 5)]


@pytest.mark.parametrize("changes, nfe, tokens", COUNTS)
def test_evaluations_and_tokens_are_those_counted_by_hand(changes, nfe, tokens):
    """(E6) A network that ends every document at position 3, and is surest of that; BOS and the
    evaluation that asks for the length are counted; truncation never costs more than fixed."""
    rows = [[3.0, 0, -60, -60]] * 3 + [[-60.0, -60, 40, -60]] + [[0, 3.0, -60, -60]] * 2
    model = Script(lambda idx, live: torch.tensor(rows)[:idx.shape[1]].expand(len(idx), -1, -1))
    for n in (1, 5):
        model.asked.clear()
        x, got, _ = draw(model, config(**(dict(temperature=0.0, order="l2r") | changes)), n)
        assert (got, len(model.asked), model.tokens()) == (nfe, nfe, n * tokens)
        assert x.tolist() == [[0, 0, 0, 2, 2, 2]] * n


def test_rows_of_similar_length_go_together():
    """(E6) Given ends at 5, 0, 2, 4 and 4: at most four groups, each as wide as its longest row;
    complete rows do not go at all; counted by hand."""
    start = torch.tensor([[3, 3, 3, 3, 3, 2], [2] * 6, [3, 3, 2, 2, 2, 2], [3, 3, 3, 3, 2, 2],
                          [0, 3, 0, 3, 2, 2]])
    model = says([1] * 6)
    x, nfe, _ = draw(model, config(length_mode="truncate", order="l2r"), start)
    # masked: 5, 0, 2, 4, 2 positions on canvases of 6, 1, 3, 5, 5. Steps 1 and 2: four groups of
    # one, 3, 5, 5, 6 wide; steps 3 and 4: 5 and 6; step 5: 6
    assert nfe == 5 and model.tokens() == 2 * (4 + 6 + 6 + 7) + 2 * (6 + 7) + 7
    assert torch.equal(x, start.masked_fill(start == V, 1))
    model, end = only_text(), torch.tensor([6, 1, 5, 3, 6])
    dv.predict(model, torch.full((5, T), MASK), torch.arange(T) < end[:, None], end)
    assert model.tokens() == 2 * (3 + 1) + 2 * (6 + 1) + (6 + 1)  # ends 1, 3; 5, 6; 6


def test_rows_together_are_told_what_each_is_told_alone():
    """(E2) (E5) predict: a ragged batch through the real network, in every order of its rows and
    whatever stands outside the canvases, has the logits of single rows on their own canvases."""
    model, _ = shaken()
    g, end = generator(1), torch.tensor([2, 6, 3, 5, 3])
    x = torch.randint(0, 5, (5, T), generator=g)
    where = (torch.rand(5, T, generator=g) < 0.6) & (torch.arange(T) < end[:, None])
    where[2] = False  # nothing is wanted of this one
    alone = [model(x[i:i + 1, :end[i]], where[i:i + 1, :end[i]]) for i in range(5)]
    assert where.sum() >= 8 and torch.cat(alone).std() > 0.5
    for turn in itertools.islice(itertools.permutations(range(5)), 0, 120, 5):
        turn = list(turn)
        noise = torch.randint(0, 5, (5, T), generator=g)
        rows = torch.where(torch.arange(T) < end[turn][:, None], x[turn], noise)
        got = dv.predict(model, rows, where[turn], end[turn])
        assert torch.allclose(got, torch.cat([alone[i] for i in turn]), atol=1e-4)


@pytest.mark.parametrize("order", ["random", "entropy"])
@every_mode
def test_num_steps_share_the_tokens(mode, order):
    """ceil((T - prompt) / num_steps) tokens a step, so that one step is one evaluation for a row;
    a document that does not end fills the row."""
    for P, steps in itertools.product((0, 1, 2), (0, 1, 2, 3, 4)):
        x = torch.full((7, T), V)
        x[:, :P] = 1
        out, nfe, _ = draw(only_text(), config(length_mode=mode, order=order, num_steps=steps,
                                               block_size=3), x)
        room = T - P
        k, part = math.ceil(room / steps) if steps else 1, 3 if mode == "blockwise" else room
        want = sum(math.ceil(min(part, room - i) / k) for i in range(0, room, part))
        assert nfe == want + (mode in ("quantile", "presampled"))
        assert (length(out) == T).all() and (out[:, :P] == 1).all()
        assert set(out[:, P:].unique().tolist()) == {0, 1}


@every_mode
def test_streams_have_no_end(mode):
    """EOS is a token like others there, and nothing is asked about lengths: one token a step from
    independent positions."""
    logits, x = [0.0, 0.5, 1.0], torch.full((6000, T), V)
    x[:, :3] = torch.tensor([1, 2, 0])
    out, nfe, _ = draw(always(*logits), config(rows="stream", length_mode=mode), x)
    p = torch.tensor(logits).double().softmax(0)
    counts = (out[:, 3:] * torch.tensor([9, 3, 1])).sum(1).bincount(minlength=27)
    assert nfe == 3 and (out[:, :3] == x[:, :3]).all()
    assert chi_square(counts, torch.einsum("i,j,k->ijk", p, p, p).flatten()) > 1e-3


# ---- tokens, ends and contradictions


@pytest.mark.parametrize("order", ["l2r", "maxprob", "margin", "entropy"])
def test_temperature_zero_and_one_token_to_choose_from_are_the_argmax(order):
    """The likeliest token of the surest position, by hand, from every generator."""
    x = torch.full((1, T), MASK)
    while (x == MASK).any():
        p = ORACLE(x)[0].double().softmax(1)
        top = p.topk(2).values
        sure = dict(maxprob=top[:, 0], margin=top[:, 0] - top[:, 1], l2r=-torch.arange(T).double(),
                    entropy=-torch.special.entr(p).sum(1))[order]
        i = sure.masked_fill(x[0] != MASK, -torch.inf).argmax()
        x[0, i] = p[i].argmax()
    for changes, mode, seed in itertools.product(
            (dict(temperature=0.0), dict(temperature=1e-3), dict(top_k=1)), MODES[:2], (1, 2)):
        out, _, _ = draw(ORACLE, config(length_mode=mode, order=order, **changes), 3, seed)
        assert torch.equal(out, x.masked_fill(x == PAD, EOS).expand(3, -1))


@every_order
@every_mode
def test_nothing_ends_before_what_is_given(mode, order):
    """(E6) A network that would end the document everywhere: holes before a given EOS, or before
    given text, become text; behind an EOS nothing is written; open rows may end behind."""
    model = wild(2, 0.5)
    eager = Script(lambda idx, live: model.logits(idx, live) + torch.tensor([0.0, 0.0, 2.0, 2.0]))
    closed = torch.tensor([[3, 3, 3, 3, 2, 2], [0, 3, 3, 3, 3, 2], [3, 2, 3, 3, 3, 3],
                           [3, 1, 3, 2, 3, 3]]).repeat(25, 1)
    opened = torch.tensor([[3, 3, 1, 3, 3, 3], [0, 3, 3, 1, 3, 3]]).repeat(50, 1)
    for steps in (0, 2):
        cfg = config(length_mode=mode, order=order, num_steps=steps)
        x, _, frames = draw(eager, cfg, closed)
        assert length(x).tolist() == [4, 5, 1, 3] * 25
        given = (closed != V) & (torch.arange(T) <= length(closed)[:, None])
        assert torch.equal(x[given], closed[given]) and (length(frames[-1]) == length(x)).all()
        x, _, _ = draw(eager, cfg, opened)
        assert torch.equal(x[opened != V], opened[opened != V]) and (length(x) < T).any()
        assert (length(x) >= torch.tensor([3, 4]).repeat(50)).all()


def test_text_behind_an_end_is_cut():
    """(E6) on_step sees text that was written behind an EOS, in one step or because the canvas is
    fixed; the samples end at their first EOS or PAD."""
    for row in ([0, 2, 1, 1, 1, 1], [0, 3, 1, 1, 1, 1]):
        for mode, steps, nfe, text in (("fixed", 2, 2, 5), ("truncate", 2, 1, 2),
                                       ("fixed", 0, 6, 5), ("truncate", 0, 2, 1)):
            x, got, frames = draw(says(row), config(length_mode=mode, order="l2r",
                                                    num_steps=steps), 20)
            assert got == nfe and x.tolist() == [[0, 2, 2, 2, 2, 2]] * 20
            assert ((frames[-1] < EOS).sum(1) == text).all()


# ---- the parent


@pytest.mark.parametrize("rows, prompt", [("docs", []), ("docs", [1]), ("stream", []),
                                          ("stream", [0, 1])])
def test_the_parents_samples_have_the_distribution_of_the_chain_rule(rows, prompt):
    """(E2) That of nelbo, which is exact for it, given the prompt; on_step sees V until a token is
    written; one evaluation a token, until all rows have ended."""
    model, cfg = shaken(pipeline="arm", rows=rows)
    every, first = all_rows(3, T), len(prompt)
    if rows == "docs":
        every = every[((every != EOS).cumprod(1).logical_not() == (every == EOS)).all(1)]
    every = every[(every[:, :first] == torch.tensor(prompt)).all(1)]
    p = (-dv.nelbo(model, every, cfg, None)).exp()
    assert prompt or abs(p.sum() - 1) < 1e-5
    start = torch.full((6000, T), V)
    start[:, :first] = torch.tensor(prompt)
    x, nfe, frames = draw(model, cfg, start)
    place = 3 ** torch.arange(T)
    counts = ((x * place).sum(1)[:, None] == (every * place).sum(1)).sum(0)
    assert counts.sum() == 6000 and chi_square(counts, p / p.sum()) > 1e-3 and nfe == T - first
    for i, frame in enumerate(frames, first + 1):
        assert torch.equal(frame[:, :i], x[:, :i]) and (frame[:, i:] == V).all()
    cold, nfe, _ = draw(model, dataclasses.replace(cfg, temperature=0.0), start[:2])
    assert torch.equal(cold[0], cold[1]) and nfe <= T - first
    i = int(length(cold)[0]) if rows == "docs" else T
    causal = torch.ones(T + 1, T + 1, dtype=torch.bool).tril()
    best = model(cold[:1], None, causal)[0].argmax(1)[first:i + 1]
    assert torch.equal(cold[0, first:i + 1], best) and nfe == len(best)
