"""lab/decoding.py: blocks, windows, caches, guidance, remasking, ends of documents; infilling."""
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn as nn
from scipy import stats

import common
from lab.decoding import Cached, Guided, decode
from lab.mdlm_eval import infill_masks
from lab.mdlm_variants import Model
from tables import (MaskTable, all_rows, ancestral, chi_square, confidence, distribution,
                    first_positions, fixed_order, generator, guided, transition, unmask_count)
from test_mdlm_sampling import (EVERY_SAMPLER, REMASKING, SAMPLERS, M, config, draw, frames,
                                sigma_of)


class Spy:
    """A model that remembers what it was asked."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __call__(self, idx, is_target):
        self.seen.append(idx.clone())
        return self.model(idx, is_target)


def blank(V):
    """A network for rows of any length that knows nothing."""
    return Spy(lambda idx, is_target: torch.zeros(int(is_target.sum()), V))


def counting(V):
    """A network that continues its left neighbour by one, and knows nothing beside a mask."""
    def logits(idx, is_target):
        left = torch.cat((torch.full_like(idx[:, :1], V), idx[:, :-1]), 1)[is_target]
        return 50.0 * (nn.functional.one_hot((left + 1) % V, V) * (left < V)[:, None])
    return Spy(logits)


class Net(Model):
    """A real network with large weights, that remembers how many columns went through its blocks.
    `local`: every first key depends on its own token alone."""

    def __init__(self, seed=0, local=False, **changes):
        super().__init__(config(**(dict(vocab_size=7, seq_len=8, n_layer=3, n_head=2, n_embd=16)
                                   | changes)))
        self.widths, g = [], generator(seed)
        for p in self.parameters():
            p.data = 0.3 * torch.randn(p.shape, generator=g)
        for block in self.blocks:
            block.conv.weight.data *= not local
        self.requires_grad_(False)
        self.blocks[0].norm1.register_forward_pre_hook(
            lambda _, x: self.widths.append(x[0].shape[1]))


# ---- blocks


@EVERY_SAMPLER
def test_a_block_of_the_whole_row_is_no_block_and_blocks_of_one_token_are_left_to_right(changes):
    """Whatever the order; the same tokens from the same generator."""
    model = MaskTable(T=4, seed=2)
    want = frames(model, config(num_steps=3, **changes))
    for block in (4, 9):
        assert torch.equal(frames(model, config(num_steps=3, block=block, **changes)), want)
    counts, nfe = draw(model, config(block=1, **changes))
    assert chi_square(counts, fixed_order(model, range(4))) > 1e-3 and nfe == 4
    assert torch.equal(frames(model, config(block=1, temperature=0, **changes)),
                       frames(model, config(order="l2r", temperature=0)))


def test_blocks_of_two_tokens_have_the_distribution_of_the_orders_they_allow():
    """One random position at a time: the mean over the four orders of two blocks of two."""
    model = MaskTable(T=4, seed=3)
    orders = [a + b for a in ((0, 1), (1, 0)) for b in ((2, 3), (3, 2))]
    want = sum(fixed_order(model, order) for order in orders) / 4
    assert chi_square(draw(model, config(block=2))[0], want) > 1e-3
    assert chi_square(draw(model, config())[0], want) < 1e-6


@pytest.mark.parametrize("block", [2, 3])
@pytest.mark.parametrize("changes", [*SAMPLERS, dict(sampler="threshold", threshold=0.6),
                                     dict(ancestral=True), dict(sampling_schedule="cosine")])
def test_a_block_begins_when_the_one_before_is_full(block, changes):
    """No token is written while a mask is left in an earlier block; all steps are used."""
    x = frames(MaskTable(T=4, seed=4), config(block=block, num_steps=3, **changes))
    block_of = torch.arange(4) // block
    for now, after in zip(x, x[1:]):
        current = torch.where(now == M, block_of, 9).amin(1, keepdim=True)  # of each row
        wrote = now != after
        assert not (wrote & (now != M)).any() and not (wrote & (block_of > current)).any()
    if changes in SAMPLERS:  # three steps over two blocks are one and two
        left = torch.tensor([4, 2, 1, 0] if block == 2 else [4, 1, 0])
        assert ((x == M).sum(2) == left[:, None]).all()


@pytest.mark.parametrize("block", [0, 1, 2, 5])
@pytest.mark.parametrize("length", [7, 13, 24])
def test_a_row_longer_than_the_context_is_written_through_windows(length, block):
    """The network sees at most seq_len columns, its window of what is written; one that only
    counts on from its left neighbour counts on across all windows."""
    model, V, T = counting(50), 50, 6
    cfg = config(vocab_size=V, seq_len=T, length=length, block=block, order="l2r")
    given = torch.full((3, length), V)
    given[:, :2] = torch.tensor([7, 8])
    x = frames(model, cfg, given)
    assert torch.equal(x[-1], torch.arange(7, 7 + length).expand(3, -1)) and len(x) == length - 1
    for now, idx in zip(x, model.seen):
        size = block or T // 2
        end = min(length, ((now[0] < V).sum().item() // size + 1) * size)  # of the block
        left = max(0, end - T)
        assert torch.equal(idx, now[:, left:left + min(T, length)])
    short, nfe = decode(model, given[:, :T], cfg, generator(1))  # it adds the columns itself
    assert torch.equal(short, x[-1]) and nfe == length - 2
    for length, block in ((4, 0), (12, 7)):  # shorter; blocks longer than the context
        cfg = config(vocab_size=V, seq_len=T, length=length, block=block)
        assert decode(model, given, cfg, generator(1))[0].shape == (3, length)


def test_a_length_shorter_than_the_prompt_is_refused():
    cfg = config(vocab_size=9, seq_len=8, length=4)
    with pytest.raises(common.UserError):
        decode(blank(9), torch.tensor([[0, 1, 2, 3, 4, 9, 9, 9]]), cfg, generator(1))


# ---- caches


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@EVERY_SAMPLER
def test_a_block_begins_with_a_full_evaluation_and_goes_on_with_its_positions(cache, changes):
    """Of the block alone (dual), or of all positions from it on (prefix); when each block is one
    step caches change nothing."""
    model, cfg = Net(), config(vocab_size=7, seq_len=8, block=2, num_steps=4, **changes)
    want = frames(model, cfg)
    assert torch.equal(frames(model, dataclasses.replace(cfg, cache=cache)), want)
    assert model.widths == 8 * [8]
    frames(model, dataclasses.replace(cfg, cache=cache, block=4, num_steps=8))
    assert model.widths[8:] == [8] + 3 * [4 if cache == "dual" else 8] + [8] + 3 * [4]


def stale(model, old, new, block_positions):
    """Logits at `block_positions` of the rows `new` where all other positions are still, in every
    layer, what they were for the rows `old`: (n * positions, V)."""
    positions, (a, b) = torch.arange(old.shape[1]), map(model.embed, (old, new))
    outside = ~torch.isin(positions, block_positions)
    for block in model.blocks:
        b[:, outside] = a[:, outside]
        a, b = (block.convolve(x) for x in (a, b))
        b[:, outside] = a[:, outside]
        a, b = (x + block.attn(block.norm1(x), positions) for x in (a, b))
        a, b = (x + block.mlp(block.norm2(x)) for x in (a, b))
    return model.head(model.norm(b))[:, block_positions].flatten(0, 1)


LOCAL = dict(n_layer=1, local=True)


@pytest.mark.parametrize("positions, changes, exact", [
    ((2, 6), {}, False), ((2, 8), {}, False), ((2, 6), dict(cond="add"), False),
    ((0, 8), {}, True), ((2, 6), LOCAL, True), ((2, 8), LOCAL, True)])
def test_a_cached_evaluation_attends_to_keys_of_the_first_one(positions, changes, exact):
    """The second evaluation of a block, after position 3 was written, is equal to a trunk whose
    other positions are kept by hand, layer by layer. That differs from the full evaluation, but
    where no kept key could have changed: when the block is the whole row, and in one layer without
    the convolution, where a key depends on its own token alone."""
    model, block_positions = Net(**changes), torch.arange(*positions)
    is_target = torch.zeros(6, 8, dtype=torch.bool)
    is_target[:, block_positions] = True
    old = torch.randint(7, (6, 8), generator=generator(1))
    old[:, 2:] = 7
    new, cached = old.clone(), Cached(model, block_positions)
    new[:, 3] = torch.arange(6)
    assert torch.allclose(cached(old, is_target), model(old, is_target), atol=1e-4)
    got, full = cached(new, is_target), model(new, is_target)
    assert torch.allclose(got, stale(model, old, new, block_positions), atol=1e-4)
    kl = (full.softmax(1) * (full.log_softmax(1) - got.log_softmax(1))).sum(1).max().item()
    assert abs(kl) < 1e-6 if exact else 1e-4 < kl < math.inf


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("changes", [dict(order="l2r"), dict(
    order="maxprob", sampler="threshold", threshold=0.5)])
def test_rows_drawn_together_have_their_own_keys(cache, changes):
    """Rows with different masks are what each is when it is drawn alone."""
    model, V = Net(), 7
    given = torch.randint(V, (7, 8), generator=generator(1))
    share = torch.tensor([0.4, 1.0, 0.0, 0.7, 0.2, 0.9, 0.6])[:, None]
    given[torch.rand(7, 8, generator=generator(2)) < share] = V
    cfg = config(vocab_size=V, seq_len=8, cache=cache, block=4, temperature=0, **changes)
    x = frames(model, cfg, given)
    assert torch.equal(x[-1], torch.cat([frames(model, cfg, row[None])[-1] for row in given]))
    assert (x == given)[:, given < V].all() and set(model.widths) == {8, 4}


# ---- guidance


@pytest.mark.parametrize("w", [0.5, 1.0, 3.0])
def test_guidance_is_the_published_combination_of_two_evaluations(w):
    """On random logits: p^(1+w) / p_uncond^w, renormalised, the second without what is given."""
    model = Spy(MaskTable(T=4, seed=5, scale=2.0))
    x = torch.randint(4, (40, 4), generator=generator(1))
    is_given = (x != M) & (torch.rand(40, 4, generator=generator(2)) < 0.5)
    is_target = (x == M) & (torch.rand(40, 4, generator=generator(3)) < 0.8)
    got, uncond = Guided(model, w, is_given, M)(x, is_target), x.masked_fill(is_given, M)
    assert torch.equal(model.seen[0], x) and torch.equal(model.seen[1], uncond)
    want = model(x, is_target).softmax(1) ** (1 + w) / model(uncond, is_target).softmax(1) ** w
    assert torch.allclose(got.softmax(1).double(), want / want.sum(1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("order", ["random", "maxprob", "l2r"])
@pytest.mark.parametrize("w", [0.0, 1.5])
def test_guided_samples_have_the_distribution_of_the_guided_table(order, w):
    """From the state [2, M, M, 0], where tokens written on the way are not given ones; without
    weight, or anything given, there is no second evaluation."""
    model, row = Spy(MaskTable(T=4, seed=6)), torch.tensor([2, M, M, 0])
    table = guided(model.model, row != M, w)
    want = distribution(table, 2 * [unmask_count(table, 1, order)], row)
    cfg = config(order=order, guidance=w, block=2 * (order == "l2r"))
    counts, _ = draw(model, cfg, row.expand(20_000, 4))
    assert chi_square(counts, want) > 1e-3 and len(model.seen) == (4 if w else 2)
    for idx in model.seen[1::2] if w else []:
        assert (idx[:, [0, 3]] == M).all()
    assert w == 0 or (model.seen[3][:, 1:3] != M).any(1).all()
    model.seen.clear()
    assert torch.equal(frames(model, config(guidance=w)), frames(model, config()))
    assert len(model.seen) == 8


# ---- remasking


EVERY_REMASKING = pytest.mark.parametrize("how", REMASKING, ids=("cap", "rescale", "conf"))


@EVERY_REMASKING
def test_remasking_keeps_the_mask_rate_of_every_step(how):
    """(E6) simulated: at s each position is masked with probability gamma_s; an unmasked token was
    remasked with probability sigma, a masked one unmasked with (gamma_t - gamma_s + sigma (1 -
    gamma_t)) / gamma_t: 4.5 standard errors."""
    eta, steps, T = 0.4, 6, 40
    cfg = config(seq_len=T, ancestral=True, sampling_schedule="cosine", num_steps=steps,
                 remask_eta=eta, **how)
    is_mask = frames(blank(3), cfg, 500) == M
    gamma = [1 - math.cos(math.pi / 2 * k / steps) for k in range(steps, -1, -1)]
    assert is_mask.shape == (steps + 1, 500, T)
    for k, (t, s) in enumerate(zip(gamma, gamma[1:])):
        sigma, now, after = sigma_of(eta, how)(t, s), is_mask[k], is_mask[k + 1]
        for events, p in ((after, s), (~after[now], (t - s + sigma * (1 - t)) / t),
                          *[(after[~now], sigma)][:k], *((column, s) for column in after.T)):
            se = math.sqrt(p * (1 - p) / events.numel())
            assert abs(events.double().mean().item() - p) < 4.5 * se + 1e-9


@pytest.mark.parametrize("rule", ["cap", "rescale"])
@pytest.mark.parametrize("num_given", [0, 1])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_remasking_has_the_distribution_of_its_transition_matrices(rule, num_given, eta):
    """(E6) chi-square of 20 000 rows, with a prompt or not; eta 0 is the ancestral sampler (E5)."""
    model, row = MaskTable(T=3, seed=9), torch.tensor([2 if num_given else M, M, M])
    gamma, how = [k * k / 25 for k in range(6)], dict(remask="random", remask_rule=rule)
    want = distribution(model, ancestral(model, gamma, sigma_of(eta, how), num_given), row)
    plain = distribution(model, ancestral(model, gamma), row)
    cfg = config(seq_len=3, ancestral=True, sampling_schedule="power2", num_steps=5,
                 remask_eta=eta, **how)
    counts, _ = draw(model, cfg, row.expand(20_000, 3))
    assert want.sum().item() == pytest.approx(1, abs=1e-12) and chi_square(counts, want) > 1e-3
    assert chi_square(counts, plain) < 1e-6 if eta else torch.allclose(want, plain, atol=1e-12)


@EVERY_REMASKING
def test_less_confident_tokens_are_remasked_first(how):
    """(E6) conf: of two tokens one is remasked with probability ~ exp(-p), p the network's own,
    without filters; else by a fair coin. Four tokens, one of two in the third step."""
    p = torch.tensor([0.9, 0.3, 0.6, 0.45])
    table = torch.stack((p, *3 * [(1 - p) / 3]), 1).log()
    cfg = config(vocab_size=4, num_steps=4, top_k=1,
                 remask_eta=0.99 if "remask_rule" in how else 0.5, **how)
    x = frames(lambda idx, is_target: table.expand(len(idx), 4, 4)[is_target], cfg, 20_000)
    is_mask = x == 4
    assert (is_mask.sum(2) == torch.tensor([4, 3, 2, 1, 0])[:, None]).all()
    before, remasked = ~is_mask[2], ~is_mask[2] & is_mask[3]
    assert (remasked.sum(1) == 1).all()
    weight = (-table.exp().amax(1)).exp() if how["remask"] == "conf" else torch.ones(4)
    for i, j in itertools.combinations(range(4), 2):
        pair = before[:, i] & before[:, j]
        share = (weight[i] / (weight[i] + weight[j])).item()
        se = math.sqrt(share * (1 - share) / pair.sum())
        assert abs(remasked[pair, i].double().mean() - share) < 4.5 * se


@EVERY_REMASKING
@pytest.mark.parametrize("changes", [dict(ancestral=True), dict(order="maxprob")])
def test_remasking_ends_without_masks_and_leaves_given_tokens_alone(how, changes):
    """(E6) rows with different masks, with and without blocks, also more steps than tokens; tokens
    are remasked, in the current block only, and never in the step that wrote them."""
    model, given, total = MaskTable(T=4, seed=10), all_rows(4, 4)[1:], 0
    for steps, block in ((3, 0), (50, 0), (12, 2)):
        cfg = config(num_steps=steps, block=block, sampling_schedule="cosine", remask_eta=0.6,
                     **how, **changes)
        x = frames(model, cfg, given)
        assert (x == given)[:, given != M].all()
        remasked = (x[:-1] != M) & (x[1:] == M)
        assert ((x[:-1] == x[1:]) | (x[:-1] == M) | remasked).all()  # nothing is overwritten
        total += remasked.sum()
        if block:  # once the second block is begun the first one is left alone
            begun = (x[:-1, :, 2:] != given[:, 2:]).flatten(1).any(1)
            assert begun.any() and not remasked[begun][:, :, :2].any()
    assert total > 50


# ---- the end of a document


def test_after_the_first_eos_everything_is_eos():
    """eos_fill, from left to right: the distribution of l2r with all that follows an EOS replaced
    by it; when all rows have ended no evaluation is left."""
    model, EOS = MaskTable(T=4, seed=11), 1
    rows, want = all_rows(3, 4), torch.zeros(81, dtype=torch.float64)
    ended = torch.where((rows == EOS).cumsum(1) > 0, EOS, rows)
    want.index_add_(0, (ended * 3 ** torch.arange(3, -1, -1)).sum(1), fixed_order(model, range(4)))
    counts, nfe = draw(model, config(order="l2r", eos_fill=True, eos=EOS))
    assert chi_square(counts, want) > 1e-3 and nfe == 4
    given = torch.tensor([[0, 1, M, M], [M, 1, 0, M]])
    x = frames(model, config(order="l2r", eos_fill=True, eos=EOS), given)
    assert len(x) == 2 and x[1, 0].tolist() == [0, 1, 1, 1] and x[1, 1, 1:].tolist() == [1, 0, 1]


def test_positions_that_look_like_the_end_are_unmasked_last():
    """eos_last under maxprob: the distribution of the order in which they come after all others,
    their tokens drawn from the same p; without it they come when they are confident."""
    model, EOS = MaskTable(T=4, seed=13), 1
    score, last = confidence(model, "maxprob"), model.p().argmax(2) == EOS
    want = [distribution(model, 4 * [transition(model, first_positions(model, score - c * last))])
            for c in (0, 10)]
    for flag in (False, True):
        counts = draw(model, config(order="maxprob", eos_last=flag, eos=EOS))[0]
        assert chi_square(counts, want[flag]) > 1e-3 and chi_square(counts, want[not flag]) < 1e-6


def test_the_end_is_last_also_from_left_to_right():
    """At column 0 of 160, all tokens but it are unmasked before."""
    seen, cfg = [], config(seq_len=160, order="l2r", eos_last=True, eos=1, num_steps=0)

    def model(x, is_target):
        at = is_target.nonzero()[:, 1]
        return torch.nn.functional.one_hot((at == 0).long(), 3) * 20.0
    decode(model, torch.full((1, 160), 3), cfg, generator(0),
                    lambda nfe, x: seen.append((x != 3)[0].nonzero()[:, 0].tolist()))
    assert seen[0] == [1] and seen[-2] == [*range(1, 160)] and seen[-1] == [*range(160)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "maskgit", "mdlm-loglinear"])
def test_no_number_of_steps_is_one_token_a_step(schedule):
    left, cfg = [160], config(seq_len=160, num_steps=0, sampling_schedule=schedule)
    _, nfe = decode(lambda x, is_target: torch.zeros(int(is_target.sum()), 3),
                    torch.full((1, 160), 3), cfg, generator(0),
                    lambda nfe, x: left.append((x == 3).sum().item()))
    assert left == [*range(160, -1, -1)] and nfe == 160


# ---- infilling


def test_what_is_masked_for_infilling_lies_in_the_document():
    """One token, five or the whole short document, the middle third; the first EOS counts; a row
    of a stream is whole."""
    T, length = 12, torch.arange(6500) % 13
    x0 = torch.where(torch.arange(T) < length[:, None], 5, 0)
    cfg = config(eos=0, seq_len=T, rows="docs")
    got, size = infill_masks(x0, cfg, generator(1)), (length + 1).clamp(max=T)
    inside = torch.arange(T) < size[:, None]
    assert torch.equal(got["document"], inside)
    want = {"token": torch.ones_like(size), "span of 5": size.clamp(max=5),
            "middle third": size - 2 * (size // 3)}
    for name, num in want.items():
        is_mask = got[name]
        assert torch.equal(is_mask.sum(1), num) and not (is_mask & ~inside).any()
        assert ((is_mask[:, 1:] & ~is_mask[:, :-1]).sum(1) + is_mask[:, 0] == 1).all()  # one piece
    assert torch.equal(got["middle third"].int().argmax(1), size // 3)
    stream = infill_masks(x0, dataclasses.replace(cfg, rows="stream"), generator(1))
    assert stream["document"].all()
    for name, num in (("token", 12), ("span of 5", 8)):  # every place in a full row, equally often
        start = got[name][size == T].int().argmax(1).bincount(minlength=num)
        assert len(start) == num and stats.chisquare(start.numpy()).pvalue > 1e-3
