"""How mdlm.py decodes: blocks, windows, caches, guidance, remasking, ends of documents, holes."""
import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from scipy import stats

import common
import mdlm
from tables import (MaskTable, all_rows, ancestral, certainty, chain, chi_square, first, generator,
                    guided, law, remasking, reveal_count, row_counts, told, transition)

M = 3  # the mask id of the three-token tables
ORDERS = ("random", "l2r", "maxprob", "margin", "entropy", "sampled")
QUOTAS = ("even", "grid", "binomial", "one", "threshold")


def config(**changes):
    return mdlm.Config(**(dict(vocab_size=3, seq_len=4) | changes))


class Spy(MaskTable):
    """A table that remembers what it was asked."""

    def forward(self, xt, gamma, where=None):
        self.seen = getattr(self, "seen", []) + [(xt.clone(), gamma.clone())]
        return super().forward(xt, gamma, where)


class Toy(nn.Module):
    """A network for rows of any length: logits (n, T, V) as a function of xt (n, T)."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.seen, self.nothing = logits, [], nn.Parameter(torch.zeros(1))

    def forward(self, xt, gamma, where=None):
        self.seen.append((xt.clone(), gamma.clone()))
        logits = self.logits(xt)
        return logits if where is None else logits[where]


def blank(V):
    """A network that knows nothing."""
    return Toy(lambda xt: torch.zeros(*xt.shape, V))


def counting(V):
    """A network that continues its left neighbour by one, and knows nothing beside a mask."""
    def logits(xt):
        left = torch.cat((torch.full_like(xt[:, :1], V), xt[:, :-1]), 1)
        return 50.0 * (nn.functional.one_hot((left + 1) % V, V) * (left < V)[..., None])
    return Toy(logits)


class SpyNet(mdlm.Model):
    """A real network, shaken, that remembers what it was asked and said, and how many columns went
    through the blocks. `local`: every first key depends on its own token alone."""

    def __init__(self, seed=0, local=False, **changes):
        cfg = dict(vocab_size=7, seq_len=8, n_layer=3, n_head=2, n_embd=16) | changes
        super().__init__(mdlm.Config(**cfg))
        self.seen, g = [], generator(seed)
        for p in self.parameters():
            p.data = 0.3 * torch.randn(p.shape, generator=g)
        self.near.weight.data *= not local
        self.requires_grad_(False)
        self.blocks[0].register_forward_pre_hook(lambda _, x: setattr(self, "width", x[0].shape[1]))

    def forward(self, idx, gamma, where=None, past=None, at=None):
        logits = super().forward(idx, gamma, where, past, at)
        self.seen.append(SimpleNamespace(idx=idx.clone(), gamma=gamma.clone(), where=where.clone(),
                                         at=at, logits=logits.clone(), width=self.width))
        return logits


def frames(model, cfg, n=50, seed=1, **given):
    """All states of a run of the sampler, (calls + 1, n, T), and info."""
    trace = []
    x, info = mdlm.sample(model, cfg, n, generator(seed), trace=trace, **given)
    assert torch.equal(trace[-1][1], x) and 0 <= x.min() and x.max() < cfg.vocab_size
    return torch.stack([frame for _, frame in trace]), info


def draw(model, cfg, n=20_000, seed=1, **given):
    """How often each row occurs in samples, and info."""
    x, info = mdlm.sample(model, cfg, n, generator(seed), **given)
    assert 0 <= x.min() and x.max() < cfg.vocab_size
    return row_counts(x, cfg.vocab_size), info


# ---- blocks


@pytest.mark.parametrize("quota", QUOTAS)
@pytest.mark.parametrize("order", ["random", "maxprob", "sampled"])
def test_one_block_for_the_whole_row_is_no_block(quota, order):
    """(E7) the same tokens from the same generator, also for a block longer than the row."""
    model, cfg = MaskTable(T=4, seed=1), config(quota=quota, order=order, sampling_steps=3)
    want = frames(model, cfg)[0]
    for block in (4, 9):
        assert torch.equal(frames(model, dataclasses.replace(cfg, block=block))[0], want)


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_one_token_are_left_to_right(order):
    """(E7) the law of order l2r, one per step, whatever the order; the same tokens at temperature
    0; the network is told the mask rate of the whole row."""
    model = Spy(T=4, seed=2, tilt=1.0)
    counts, info = draw(model, config(order=order, block=1))
    assert chi_square(counts, chain(told(model), range(4))) > 1e-3 and info["nfe"] == 4
    greedy = config(order="l2r", temperature=0)
    want = frames(model, greedy)[0]
    assert torch.equal(frames(model, dataclasses.replace(greedy, order=order, block=1))[0], want)
    for xt, gamma in model.seen:
        assert torch.allclose(gamma, (xt == M).float().mean(1))


def test_blocks_of_two_tokens_have_the_law_of_the_orders_they_allow():
    """(E7) one random position at a time: the mean over the four orders of two blocks of two."""
    model = MaskTable(T=4, seed=3, tilt=1.0)
    orders = [a + b for a in ((0, 1), (1, 0)) for b in ((2, 3), (3, 2))]
    want = sum(chain(told(model), order) for order in orders) / 4
    assert chi_square(draw(model, config(block=2))[0], want) > 1e-3
    assert chi_square(draw(model, config())[0], want) < 1e-6


@pytest.mark.parametrize("quota", QUOTAS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block", [2, 3])
def test_a_block_begins_when_the_one_before_is_full(block, order, quota):
    """(E7) no token is written while a mask is left in an earlier block; all steps are used."""
    model = MaskTable(T=4, seed=4)
    x, info = frames(model, config(block=block, order=order, quota=quota, sampling_steps=3,
                                   threshold=0.6))
    home = torch.arange(4) // block
    for now, after in zip(x, x[1:]):
        todo = torch.where(now == M, home, 9).amin(1, keepdim=True)  # each row's first open block
        wrote = now != after
        assert not (wrote & (now != M)).any() and not (wrote & (home > todo)).any()
    assert (x[0] == M).all()
    if quota == "even":  # three steps over two blocks are one and two
        masks = (x == M).sum(2)
        assert (masks == masks[:, :1]).all() and info["nfe"] == (3 if block == 2 else 2)
        assert masks[:, 0].tolist() == ([4, 2, 1, 0] if block == 2 else [4, 1, 0])


def test_steps_are_shared_out_to_the_blocks_that_have_holes():
    """Fewer steps than blocks are one each; a block that is given whole is passed over."""
    model = blank(5)
    for blocks, steps, want in ((4, 2, [12, 9, 6, 3, 0]), (2, 5, [12, 9, 6, 4, 2, 0]),
                                (4, 8, [12, 10, 9, 7, 6, 4, 3, 1, 0]), (1, 3, [12, 8, 4, 0])):
        cfg = config(vocab_size=5, seq_len=12, block=12 // blocks, sampling_steps=steps)
        x, info = frames(model, cfg)
        assert (x == 5).sum(2)[:, 0].tolist() == want and info["nfe"] == len(want) - 1
    start = torch.full((6, 12), 5)
    start[:, 3:9] = 1
    cfg = config(vocab_size=5, seq_len=12, block=3, sampling_steps=4)
    x, info = frames(model, cfg, 6, start=start)
    assert (x == 5).sum(2)[:, 0].tolist() == [6, 4, 3, 1, 0] and (x[:, :, 3:9] == 1).all()


# ---- longer than the context


@pytest.mark.parametrize("block", [0, 1, 2, 5])
@pytest.mark.parametrize("length", [7, 13, 24])
def test_a_row_longer_than_the_context_is_written_through_windows(length, block):
    """The network sees at most seq_len columns, its window of what is written, at their mask rate;
    one that only counts on from its left neighbour counts on across all windows."""
    model, V, T = counting(50), 50, 6
    cfg = config(vocab_size=V, seq_len=T, length=length, block=block, order="l2r")
    x, info = frames(model, cfg, 3, prompt=torch.tensor([7, 8]))
    assert x.shape[2] == length and info["nfe"] == length - 2 == len(model.seen)
    assert torch.equal(x[-1], torch.arange(7, 7 + length).expand(3, -1))
    size = block or T // 2
    for now, (xt, gamma) in zip(x, model.seen):
        end = min(length, ((now[0] < V).sum().item() // size + 1) * size)  # of the block
        left = max(0, end - T)
        assert torch.equal(xt, now[:, left:left + min(T, length)])
        assert torch.allclose(gamma, (xt == V).float().mean(1))


def test_given_tokens_stay_where_they_are_in_a_long_row():
    """Also in windows that hold nothing else; every hole is filled; all orders and quotas."""
    model, V = blank(5), 5
    start = torch.randint(5, (9, 17), generator=generator(1))
    hole = torch.rand(9, 17, generator=generator(2)) < 0.6
    hole[:, 6:10] = False
    start = start.masked_fill(hole, V)
    for order, quota, block in itertools.product(ORDERS, QUOTAS, (0, 1, 4)):
        cfg = config(vocab_size=V, seq_len=6, order=order, quota=quota, block=block,
                     sampling_steps=4, guidance=1.0)
        x, _ = frames(model, cfg, 9, start=start)
        assert (x == start)[:, ~hole].all() and max(xt.shape[1] for xt, _ in model.seen) == 6
        model.seen.clear()


def test_a_row_shorter_than_the_context_is_just_shorter():
    model = blank(5)
    x, info = frames(model, config(vocab_size=5, seq_len=9, length=4), 3)
    assert x.shape == (5, 3, 4) and info["nfe"] == 4
    assert [gamma[0].item() for _, gamma in model.seen] == [1.0, 0.75, 0.5, 0.25]


def test_a_block_longer_than_the_context_leaves_no_masks():
    cfg = config(vocab_size=5, seq_len=4, length=12, block=6)
    assert mdlm.sample(blank(5), cfg, 2, generator(1))[0].max() < 5


def test_a_prompt_longer_than_the_text_is_refused():
    with pytest.raises((ValueError, common.UserError)):
        mdlm.sample(blank(9), config(vocab_size=9, seq_len=8, length=4), 2, generator(1),
                    prompt=torch.arange(5))


# ---- caches


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("order", ["random", "maxprob", "sampled"])
def test_caches_change_nothing_when_each_block_is_one_step(cache, order):
    """The same tokens and the same logits, bit for bit."""
    plain, cached = SpyNet(), SpyNet()
    cfg = config(vocab_size=7, seq_len=8, block=2, order=order, sampling_steps=4)
    want, _ = frames(plain, cfg)
    got, _ = frames(cached, dataclasses.replace(cfg, cache=cache))
    assert torch.equal(got, want) and len(plain.seen) == len(cached.seen) == 4
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(plain.seen, cached.seen))


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("order", ["random", "maxprob"])
def test_a_block_begins_with_a_full_call_and_goes_on_with_its_span(cache, order):
    """Every first call of a block is a full one, bit for bit what the network says without cache;
    later ones are of the block (dual) or of all from it on (prefix), told the whole row's rate."""
    model, plain = SpyNet(cond="add"), SpyNet(cond="add")
    x, info = frames(model, config(vocab_size=7, seq_len=8, block=4, cache=cache, order=order), 9)
    assert info["nfe"] == len(model.seen) == 8
    for k, call in enumerate(model.seen):
        begin = k // 4 * 4
        span = slice(begin, begin + 4 if cache == "dual" else 8)
        assert torch.allclose(call.gamma, (x[k] == 7).float().mean(1))
        assert torch.equal(call.idx, x[k])
        if k % 4 == 0:
            assert call.at is None and call.width == 8
            assert torch.equal(call.logits, plain(x[k], call.gamma, call.where))
        else:
            assert torch.equal(call.at, torch.arange(8)[span]) and call.width == len(call.at)
            wrote = (x[k] != x[k + 1])[:, span] if order == "random" else \
                (x[k][:, span] == 7) & (call.at < begin + 4)
            assert torch.equal(call.where, wrote)


def stale(model, old, new, span, gamma):
    """Logits at `span` of the row `new` where all other positions are still, in every layer, what
    they were for the row `old`: (n, len(span), V)."""
    at = torch.arange(old.shape[1])
    rope = mdlm.rotary(at, model.head_width)
    outside = torch.ones(len(at), dtype=torch.bool)
    outside[span] = False
    a, b = (model.wte(x) + model.wpe(at) for x in (old, new))
    a, b = (x + model.near(x.transpose(1, 2)).transpose(1, 2) for x in (a, b))
    for block in model.blocks:
        b[:, outside] = a[:, outside]
        a, b = (block(x, rope, False) for x in (a, b))
    return model.head(model.norm(b))[:, span]


def cached_logits(cache, span, rows=slice(None), **changes):
    """Logits at `span` of predict's second call in the block 2..5, after position 3 was written,
    those of a full call, and those from stale keys: (n * len(span), V)."""
    model = SpyNet(**changes).double()
    cfg = config(vocab_size=7, seq_len=8, cache=cache, block=4)
    old = torch.randint(7, (6, 8), generator=generator(1))
    old[:, 2:] = 7
    new, kept, all_of_it = old.clone(), {}, torch.ones(6, 8, dtype=torch.bool)
    new[:, 3] = torch.arange(6)
    where = torch.zeros(6, 8, dtype=torch.bool)
    where[:, span] = True
    before = mdlm.predict(model, old, all_of_it, cfg, kept=kept, rows=torch.arange(6), span=span)
    assert torch.equal(before, model(old, torch.ones(6), all_of_it))
    some = torch.arange(6)[rows]
    got = mdlm.predict(model, new[rows], where[rows], cfg, kept=kept, rows=some, span=span)
    true = model(new[rows], torch.ones(len(some)), where[rows])
    old_keys = stale(model, old[rows], new[rows], span, torch.ones(len(some))).flatten(0, 1)
    return got, true, old_keys


@pytest.mark.parametrize("cache, end", [("prefix", 8), ("dual", 6)])
def test_a_cached_call_attends_to_keys_of_the_blocks_first_call(cache, end):
    """Equal to a trunk whose other positions are kept by hand, layer by layer; a real difference
    from the full call; rows that go on alone find their own keys."""
    span = torch.arange(2, end)
    got, true, want = cached_logits(cache, span)
    assert torch.allclose(got, want, atol=1e-10)
    delta = (got - true).abs().max().item()
    kl = (true.softmax(1) * (true.log_softmax(1) - got.log_softmax(1))).sum(1).max().item()
    print(f"{cache}: max |delta logits| {delta:.3f}, max KL {kl:.4f} nats")
    assert 0.01 < delta < math.inf and 1e-4 < kl < math.inf
    whole = got.view(6, len(span), 7)
    for rows in ([4], [1, 4, 5], [0, 2]):
        part, _, want = cached_logits(cache, span, rows)
        assert torch.allclose(part, want, atol=1e-10)
        assert torch.allclose(part.view(len(rows), len(span), 7), whole[rows], atol=1e-10)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cached_call_is_exact_where_no_kept_key_could_have_changed(cache):
    """A span that is the whole row keeps nothing; in one layer without the convolution a key
    depends on its own token alone."""
    got, true, _ = cached_logits(cache, torch.arange(8))
    assert torch.allclose(got, true, atol=1e-5)
    for end in (6, 8):
        got, true, _ = cached_logits(cache, torch.arange(2, end), n_layer=1, local=True)
        assert torch.allclose(got, true, atol=1e-5)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("quota", ["one", "even", "threshold"])
def test_rows_that_finish_early_leave_the_others_their_own_keys(cache, quota):
    """Rows with different holes, drawn together, are what each is when it is drawn alone."""
    model, V = SpyNet(), 7
    start = torch.randint(V, (7, 8), generator=generator(1))
    share = torch.tensor([0.4, 1.0, 0.0, 0.7, 0.2, 0.9, 0.6])[:, None]
    start[torch.rand(7, 8, generator=generator(2)) < share] = V
    for order in ("l2r", "maxprob"):
        cfg = config(vocab_size=V, seq_len=8, cache=cache, block=4, order=order, quota=quota,
                     temperature=0, threshold=0.5)
        x, _ = frames(model, cfg, 7, start=start)
        alone = [mdlm.sample(model, cfg, 1, generator(1), start=row[None])[0] for row in start]
        assert torch.equal(x[-1], torch.cat(alone))
        assert (x == start)[:, start < V].all()
    widths = {call.width for call in model.seen}
    assert widths == {8, 4} and len({len(call.idx) for call in model.seen}) > 3


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_caches_work_in_the_windows_of_a_long_row(cache):
    """Spans are counted within the window: one layer, so the cache is exact, writes the same."""
    model, V = SpyNet(n_layer=1, local=True), 7
    cfg = config(vocab_size=V, seq_len=8, length=21, block=3, order="maxprob", temperature=0)
    want, info = frames(model, cfg, 5, prompt=torch.tensor([1, 2, 3, 4]))
    got, _ = frames(model, dataclasses.replace(cfg, cache=cache), 5,
                    prompt=torch.tensor([1, 2, 3, 4]))
    assert torch.equal(got, want) and info["nfe"] == 17  # every cached call is exact
    assert {call.width for call in model.seen[17:]} >= {8, 3}


@pytest.mark.parametrize("changes, message", [
    (dict(cache="dual", guidance=1.0), "--cache keeps no keys.*--guidance"),
    (dict(remask="cap", quota="threshold"), "--remask follows a plan.*--quota threshold")])
def test_settings_that_exclude_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


# ---- guidance


def test_guidance_is_the_published_combination_of_two_calls():
    """(E8) on random logits: p^(1+w) / bare^w, renormalised, from two calls, the second with the
    given tokens masked and told its own mask rate."""
    model = Spy(T=4, seed=5, scale=2.0, tilt=1.0)
    xt = torch.randint(4, (40, 4), generator=generator(1))
    given = (xt != M) & (torch.rand(40, 4, generator=generator(2)) < 0.5)
    where = (xt == M) & (torch.rand(40, 4, generator=generator(3)) < 0.8)
    for w in (0.5, 1.0, 3.0):
        model.seen = []
        got = mdlm.predict(model, xt, where, config(guidance=w), given=given).softmax(1)
        bare = xt.clone()
        bare[given] = M
        p, q = (MaskTable.forward(model, x, (x == M).float().mean(1)).softmax(2)[where]
                for x in (xt, bare))
        want = p ** (1 + w) / q ** w
        assert torch.allclose(got.double(), want / want.sum(1, keepdim=True), atol=1e-6)
        (first_xt, first_gamma), (second_xt, second_gamma) = model.seen
        assert torch.equal(first_xt, xt) and torch.equal(second_xt, bare)
        assert torch.allclose(first_gamma, (xt == M).float().mean(1))
        assert torch.allclose(second_gamma, (bare == M).float().mean(1))


@pytest.mark.parametrize("order", ["random", "maxprob", "l2r"])
@pytest.mark.parametrize("w", [0.0, 1.5])
def test_guided_samples_have_the_law_of_the_guided_table(order, w):
    """(E8) from the state [2, M, M, 0], where tokens written on the way are not given ones; nfe
    counts both calls; without weight there is no second one."""
    model, start = Spy(T=4, seed=6, tilt=1.0), torch.tensor([2, M, M, 0])
    table = guided(model, start != M, w)
    want = law(table, 2 * [reveal_count(table, 1, order)], start)
    counts, info = draw(model, config(order=order, guidance=w), start=start.expand(20_000, 4))
    assert chi_square(counts, want) > 1e-3
    assert info["nfe"] == len(model.seen) == (4 if w else 2)
    for xt, _ in model.seen[1::2] if w else []:
        assert (xt[:, [0, 3]] == M).all()
    assert w == 0 or (model.seen[3][0][:, 1:3] != M).any(1).all()


def test_guidance_without_anything_given_is_one_call_and_no_change():
    """(E8) both terms are the same."""
    model = Spy(T=4, seed=7)
    for prompt in (None, torch.tensor([], dtype=torch.long)):
        model.seen = []
        x, info = frames(model, config(guidance=2.0), prompt=prompt)
        assert info["nfe"] == len(model.seen) == 4
        assert torch.equal(x, frames(model, config())[0])


def test_guidance_is_filtered_after_it_is_combined():
    """(E8) temperature 0 takes the likeliest token of the guided law, here not the network's."""
    model, start = MaskTable(T=4, seed=21, scale=2.0), torch.tensor([2, M, 1, 0])
    table = guided(model, start != M, 2.0)
    x, _ = mdlm.sample(model, config(guidance=2.0, temperature=0), 1, generator(1),
                       start=start[None])
    code = (start * model.place).sum()
    assert x[0, 1] == table.p()[code, 1].argmax() != model.p()[code, 1].argmax()


# ---- remasking


def most(t, s):
    return min(1.0, s / (1 - t)) if t < 1 else 0.0


@pytest.mark.parametrize("remask", ["cap", "rescale", "conf"])
def test_remasking_keeps_the_mask_rate_of_every_step(remask):
    """(E9) simulated: at s each position is masked with probability gamma_s; a written token was
    hidden with probability sigma, a masked one revealed with (gamma_t - gamma_s + sigma (1 -
    gamma_t)) / gamma_t: 4.5 standard errors."""
    eta, steps, T, n = 0.4, 6, 40, 500
    cfg = config(seq_len=T, quota="binomial", grid="cosine", sampling_steps=steps, remask=remask,
                 remask_eta=eta)
    masked = frames(blank(3), cfg, n)[0] == M
    grid = [1 - math.cos(math.pi / 2 * k / steps) for k in range(steps, -1, -1)]
    assert masked.shape == (steps + 1, n, T)

    def rate(events, p):
        se = max(math.sqrt(p * (1 - p) / max(1, events.numel())), 1e-9)
        return abs(events.double().mean().item() - p) < 4.5 * se

    for k, (t, s) in enumerate(zip(grid, grid[1:])):
        sigma = eta * most(t, s) if remask == "rescale" else min(eta, most(t, s))
        now, after = masked[k], masked[k + 1]
        assert rate(after, s) and all(rate(after[:, i], s) for i in range(T))
        assert rate(~after[now], (t - s + sigma * (1 - t)) / t)
        assert k == 0 or rate(after[~now], sigma)


@pytest.mark.parametrize("remask", ["cap", "rescale"])
@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_remasking_samplers_have_the_law_of_their_transition_matrices(remask, given, eta):
    """(E9) chi-square of 20 000 rows, told the mask rate or not, with a prompt or not; eta 0 is
    the ancestral sampler (E6)."""
    model = MaskTable(T=3, seed=9, tilt=1.0)
    table, start = told(model), torch.tensor([2, M, M] if given else [M, M, M])
    grid = [k * k / 25 for k in range(6)]
    matrices = remasking(table, grid, lambda t, s: eta * most(t, s) if remask == "rescale" else
                         min(eta, most(t, s)), given)
    cfg = config(seq_len=3, quota="binomial", grid="power2", sampling_steps=5, remask=remask,
                 remask_eta=eta)
    want, plain = law(table, matrices, start), law(table, ancestral(table, grid), start)
    counts, _ = draw(model, cfg, start=start.expand(20_000, 3))
    assert want.sum().item() == pytest.approx(1, abs=1e-12) and chi_square(counts, want) > 1e-3
    if eta:
        assert chi_square(counts, plain) < 1e-6
    else:
        assert torch.allclose(want, plain, atol=1e-12)


@pytest.mark.parametrize("remask", ["cap", "rescale", "conf"])
def test_unsure_tokens_are_hidden_again_first(remask):
    """(E9) conf: of two written tokens one is hidden with probability ~ exp(-p), p the network's
    own, without filters; else by a fair coin. Four tokens, evenly, one of two in the third call."""
    sure = torch.tensor([0.9, 0.3, 0.6, 0.45])
    table = torch.stack((sure, *3 * [(1 - sure) / 3]), 1).log()
    model = Toy(lambda xt: table.expand(len(xt), 4, 4))
    cfg = config(vocab_size=4, quota="even", sampling_steps=4, remask=remask, top_k=1,
                 remask_eta=0.99 if remask == "rescale" else 0.5)
    masked = frames(model, cfg, 20_000)[0] == 4
    assert (masked.sum(2) == torch.tensor([4, 3, 2, 1, 0])[:, None]).all()
    before, after = ~masked[2], masked[3]
    lost = before & after
    assert (lost.sum(1) == 1).all()
    weight = (-table.exp().amax(1)).exp() if remask == "conf" else torch.ones(4)
    for i, j in itertools.combinations(range(4), 2):
        pair = before[:, i] & before[:, j]
        p = (weight[i] / (weight[i] + weight[j])).item()
        assert abs(lost[pair, i].double().mean() - p) < 4.5 * math.sqrt(p * (1 - p) / pair.sum())


@pytest.mark.parametrize("remask", ["cap", "rescale", "conf"])
@pytest.mark.parametrize("quota", ["even", "grid", "binomial", "one"])
@pytest.mark.parametrize("order", ["random", "maxprob", "sampled"])
def test_remasking_ends_without_masks_and_leaves_given_tokens_alone(remask, quota, order):
    """(E9) rows with different holes, with and without blocks, also more steps than tokens; tokens
    are hidden again, in the open block only, and never in the call that wrote them."""
    model, again = MaskTable(T=4, seed=10), 0
    start = all_rows(4, 4)[1:]
    for steps, block in ((2, 0), (3, 0), (50, 0), (12, 2)):
        cfg = config(order=order, quota=quota, grid="cosine", sampling_steps=steps, block=block,
                     remask=remask, remask_eta=0.6)
        x, _ = frames(model, cfg, len(start), start=start)
        assert (x == start)[:, start != M].all()
        hidden = (x[:-1] != M) & (x[1:] == M)
        assert ((x[:-1] == x[1:]) | (x[:-1] == M) | hidden).all()  # nothing is overwritten
        again += hidden.sum()
        if block:  # once the second block is begun the first one is left alone
            begun = (x[:-1, :, 2:] != start[:, 2:]).flatten(1).any(1)
            assert begun.any() and not hidden[begun][:, :, :2].any()
    assert again > 50


@pytest.mark.parametrize("remask", ["cap", "rescale", "conf"])
@pytest.mark.parametrize("quota, name", [("even", "linear"), ("grid", "cosine")])
def test_remasking_follows_the_planned_number_of_masks(remask, quota, name):
    """(E9) floor(N gamma) masks after every step, as without; sigma of the written are hidden."""
    N, eta = 24, 0.3
    for steps in (6, 24):
        cfg = config(seq_len=N, quota=quota, grid=name, sampling_steps=steps, remask=remask,
                     remask_eta=eta)
        masked = frames(blank(3), cfg, 20)[0] == M
        gamma = [k / steps if name == "linear" else 1 - math.cos(math.pi / 2 * k / steps)
                 for k in range(steps, -1, -1)]
        left = [math.floor(N * s + 1e-6) for s in gamma]
        hide = [0] + [min(round((eta * most(t, s) if remask == "rescale" else
                                 min(eta, most(t, s))) * (N - a)), b)
                      for t, s, a, b in zip(gamma[1:], gamma[2:], left[1:], left[2:])]
        keep = [True] + [a > b or h for a, b, h in zip(left, left[1:], hide)]
        assert (masked.sum(2) == torch.tensor([m for m, k in zip(left, keep) if k])[:, None]).all()
        lost = (~masked[:-1] & masked[1:]).sum(2)
        assert (lost == torch.tensor([h for h, k in zip(hide, keep[1:]) if k])[:, None]).all()
        assert lost.sum() > 0


def test_a_call_is_of_the_rows_that_it_writes():
    """(E9) rows that only hide in a step, or do nothing, are not sent through the network."""
    model = Spy(T=4, seed=10)
    cfg = config(quota="binomial", sampling_steps=9, remask="cap", remask_eta=0.6)
    x, info = frames(model, cfg, 4)
    wrote = ((x[:-1] == M) & (x[1:] != M)).any(2).sum(1)
    assert [len(xt) for xt, _ in model.seen] == wrote[wrote > 0].tolist()
    assert info["nfe"] == len(model.seen) and wrote.min() < 4


def test_no_remasking_hides_nothing():
    for quota in QUOTAS:
        todo = torch.rand(50, 9, generator=generator(1)) < 0.7
        assert not mdlm.plan(todo, 5, config(quota=quota, remask_eta=1.0), generator(2))[1].any()


# ---- the end of a document


def test_after_the_first_eos_everything_is_eos_without_a_call():
    """eos_fill, from left to right: the law of l2r with all that follows an EOS replaced by it; a
    row that has ended costs no call."""
    model, EOS = MaskTable(T=4, seed=11), 1
    rows, want = all_rows(3, 4), torch.zeros(81, dtype=torch.float64)
    ended = torch.where((rows == EOS).cumsum(1) > 0, EOS, rows)
    place = 3 ** torch.arange(3, -1, -1)
    want.index_add_(0, (ended * place).sum(1), chain(model, range(4)))
    counts, info = draw(model, config(order="l2r", eos_fill=True, eos=EOS))
    assert chi_square(counts, want) > 1e-3 and info["nfe"] == 4
    spy = Spy(T=4, seed=11)
    x, _ = frames(spy, config(order="l2r", eos_fill=True, eos=EOS), 300)
    for now, (xt, _) in zip(x, spy.seen):
        assert len(xt) == (now == M).any(1).sum()


def test_after_a_given_eos_everything_is_eos_without_a_call():
    start = torch.tensor([[0, 1, M, M], [M, 1, 0, M]])
    cfg = config(order="l2r", eos_fill=True, eos=1, temperature=0)
    x, info = mdlm.sample(MaskTable(T=4, seed=11), cfg, 2, generator(1), start=start)
    assert info["nfe"] == 1 and x[0].tolist() == [0, 1, 1, 1] and x[1, 1:].tolist() == [1, 0, 1]


@pytest.mark.parametrize("changes", [
    dict(), dict(order="maxprob"), dict(block=3), dict(quota="binomial", sampling_steps=4),
    dict(sampling_steps=2), dict(order="l2r", sampling_steps=2), dict(remask="cap")])
def test_given_and_written_tokens_after_the_end_stay(changes):
    """eos_fill: only masks become EOS, in every order, also where fewer are left than the plan
    would reveal; off unless asked for."""
    model, EOS, open_ends = MaskTable(T=5, seed=12), 1, []
    start = torch.tensor([M, M, M, M, 0]).expand(400, 5)
    for flag in (True, False):
        x, _ = frames(model, config(seq_len=5, eos_fill=flag, eos=EOS, **changes), 400, start=start)
        stays = (x[:-1] == x[1:]) | (x[:-1] == M)
        assert stays.all() or "remask" in changes and (x[1:][~stays] == M).all()
        assert (x[..., 4] == 0).all() and (x[-1, :, :4] == EOS).any()
        early = ((x == EOS).flip(2).cumsum(2).flip(2) > 0) & (x == M)  # masks before an EOS
        assert early.any() == ("l2r" not in changes.values())
        open_ends.append((((x == EOS).cumsum(2) > 0) & (x == M))[1:].any().item())
    assert open_ends == [False, True]


def test_positions_that_look_like_the_end_are_written_last():
    """eos_last under maxprob: the law of the order in which they come after all others, their
    tokens drawn from the same p; without it they come when they are sure."""
    model, EOS = MaskTable(T=4, seed=13), 1
    sure, last = certainty(model, "maxprob"), model.p().argmax(2) == EOS
    laws = [law(model, 4 * [transition(model, first(model, sure - c * last))]) for c in (0, 10)]
    for flag in (False, True):
        counts, _ = draw(model, config(order="maxprob", eos_last=flag, eos=EOS))
        assert chi_square(counts, laws[flag]) > 1e-3 and chi_square(counts, laws[not flag]) < 1e-6
    x, _ = frames(model, config(order="maxprob", eos_last=True, eos=EOS, temperature=0), 1)
    for now, after in zip(x[:, 0], x[1:, 0]):
        code, wrote = (now * model.place).sum(), (now != after).nonzero().item()
        assert not last[code, wrote] or last[code][now == M].all()


# ---- holes


@pytest.mark.parametrize("changes", [dict(block=2), dict(remask="conf", quota="binomial"),
                                     dict(guidance=1.0), dict(eos_fill=True, eos=1),
                                     dict(order="entropy", eos_last=True, eos=1),
                                     dict(quota="threshold", threshold=0.6)])
def test_every_pattern_of_holes_keeps_what_is_given(changes):
    """(E7) all 256 rows of tokens and holes at once; each hole is filled."""
    model, start = MaskTable(T=4, seed=14), all_rows(4, 4)
    for steps in (0, 2, 9):
        before = start.clone()
        x, _ = frames(model, config(sampling_steps=steps, **changes), 256, start=start)
        assert (x == start)[:, start != M].all() and torch.equal(before, start)


def test_what_is_hidden_for_infilling_lies_in_the_document():
    """One token, five or the whole short document, the middle third; the first EOS counts; a row
    of a stream is whole."""
    EOS, T = 0, 12
    x0 = torch.full((6500, T), EOS)
    length = torch.arange(6500) % 13
    x0[torch.arange(T) < length[:, None]] = 5
    cfg = config(eos=EOS, seq_len=T, rows="docs")
    got = mdlm.holes(x0, cfg, generator(1))
    size = (length + 1).clamp(max=T)
    inside = torch.arange(T) < size[:, None]
    assert torch.equal(got["document"], inside)
    want = {"token": torch.ones_like(size), "span of 5": size.clamp(max=5),
            "middle third": size - 2 * (size // 3)}
    for name, many in want.items():
        hole = got[name]
        assert torch.equal(hole.sum(1), many) and not (hole & ~inside).any()
        edges = (hole[:, 1:] & ~hole[:, :-1]).sum(1) + hole[:, 0]
        assert (edges == 1).all()  # one piece
    stream = mdlm.holes(x0, dataclasses.replace(cfg, rows="stream"), generator(1))
    assert stream["document"].all() and (stream["middle third"].sum(1) == 4).all()
    begin = got["middle third"].int().argmax(1)
    assert torch.equal(begin, size // 3)
    for name, many in (("token", 12), ("span of 5", 8)):  # every place in a full row, equally often
        where = got[name][size == T].int().argmax(1).bincount(minlength=many)
        assert len(where) == many and stats.chisquare(where.numpy()).pvalue > 1e-3


class Letters:
    """A tokenizer whose tokens are letters: 'a' is 0, 'z' 25, ' ' 26."""
    text = "abcdefghijklmnopqrstuvwxyz "

    def encode(self, text):
        return [self.text.index(c) for c in text]


HOLE, END = 30, 29


def infill(text, **changes):
    cfg = config(vocab_size=HOLE, seq_len=14, eos=END, rows="docs", n=2, infill=text)
    rows = common.encode_infill(Letters(), dataclasses.replace(cfg, **changes))
    assert rows.dtype == torch.long and torch.equal(rows[0], rows[-1])
    names = Letters.text + "??.#"
    return "".join("#" if i == HOLE else "." if i == END else names[i] for i in rows[0].tolist())


@pytest.mark.parametrize("text, want", [
    ("a ___ c", "a# c.........."), ("a ___3 c", "a### c........"), ("___ c", "# c..........."),
    ("a___b", "a#b..........."), ("a  ___b ___2c", "a#b##c........"), ("ab ___", "ab############"),
    ("ab ___2", "ab##.........."), ("___", "##############"), ("___13", "#############."),
    ("a ___12 c ", None), ("a ___10 c", "a########## c."), ("a___b ___", "a#b###########")])
def test_a_text_with_holes_becomes_ids(text, want):
    """A hole takes the spaces before it; a number is its size; text that ends in ___ is open, all
    else ends in EOS and has room for one."""
    if want is None:
        with pytest.raises(common.UserError, match="--infill has 16 tokens but a row has room "
                                                   "for 13: shorten it"):
            infill(text)
    else:
        assert infill(text) == want


def test_a_text_with_holes_in_a_stream_has_no_end():
    assert infill("a ___3 c", rows="stream") == "a### c"
    assert infill("a ___", rows="stream") == "a" + 13 * "#"
    cfg = config(vocab_size=HOLE, seq_len=14, eos=END, rows="docs", n=5, infill="a ___ b")
    assert common.encode_infill(Letters(), cfg).shape == (5, 14)


@pytest.mark.parametrize("changes, message", [
    (dict(infill="no hole"), "--infill has no hole: write ___ where one token is wanted"),
    (dict(infill="a _ b"), "--infill has no hole"),
    (dict(infill="abcdefg ___7"), "--infill has 14 tokens but a row has room for 13"),
    (dict(prompt="a"), "--prompt and --infill exclude each other")])
def test_a_text_that_cannot_be_filled_in_is_refused(changes, message):
    with pytest.raises(common.UserError, match=message):
        infill(changes.pop("infill", "a ___ b"), **changes)


@pytest.mark.parametrize("open_end", [True, False])
def test_a_text_with_holes_is_filled_and_kept(open_end):
    """(E7) from --infill to samples: the text stays where it was put."""
    cfg = config(vocab_size=HOLE, seq_len=14, eos=END, rows="docs", n=6,
                 infill="a ___2 bc ___" + ("" if open_end else "3 d"))
    start = common.encode_infill(Letters(), cfg)
    x, info = frames(blank(HOLE), cfg, 6, start=start)
    assert (x == start)[:, start != HOLE].all()
    assert info["nfe"] == (start[0] == HOLE).sum() == (10 if open_end else 5)


@pytest.mark.parametrize("order", ["random", "l2r", "maxprob", "margin", "entropy", "sampled"])
def test_every_sampler_runs_under_bfloat16_autocast(order):
    """Certainties stay float32 there: a matrix product would round them to eight bits."""
    model = SpyNet()
    for changes in (dict(remask="conf"), dict(cache="dual", block=4), dict(guidance=1.0)):
        cfg = config(vocab_size=7, seq_len=8, order=order, sampling_steps=4, **changes)
        with torch.autocast("cpu", torch.bfloat16):
            x, _ = mdlm.sample(model.float(), cfg, 3, generator(1), prompt=torch.tensor([1]))
        assert x.max() < 7 and (x[:, 0] == 1).all()
    logp = torch.randn(50, 7, generator=generator(2)).log_softmax(1)
    if order in mdlm.CERTAINTY:
        with torch.autocast("cpu", torch.bfloat16):
            assert mdlm.CERTAINTY[order](logp).dtype == torch.float32
