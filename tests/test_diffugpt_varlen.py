"""From GPT to diffusion: network, attention, corruption, bound, loss, lengths and the two stages of
a run, against enumeration and Bayes' rule."""
import dataclasses
import math
import re
import signal
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import common
import diffugpt_varlen as script
from harness import small_text
from tables import all_rows, chi_square, generator, row_counts
from varlen_tables import EOS, MASK, PAD, Oracle, Script

T, V = 6, 3
ROWS = {"text, EOS, PAD": [0, 1, 1, 2, 2], "no EOS": [0, 1, 1, 0, 1], "nothing": [2, 2, 2, 2, 2]}
ORACLE = Oracle()


def config(**changes):
    """Tokens 0 and 1, EOS 2, PAD 3, M 4, documents, rows of six; the loss is the bound."""
    return script.Config(**(dict(vocab_size=V, eos=2, bos=2, seq_len=T, n_layer=2, n_head=2,
                                 n_embd=16, rows="docs", lr=4e-3, warmup=10, p_prompt=0.0,
                                 p_crop=0.0, attn_annealing_steps=1) | changes))


def network(cfg, seed=0, shake=0.3):
    """Weights far from their initial zeros, so that every path is alive."""
    torch.manual_seed(seed)
    model, g = script.Model(cfg), generator(seed)
    for p in model.parameters():
        p.data += shake * torch.randn(p.shape, generator=g)
    return model.requires_grad_(False)


def uniform(outputs):
    return Script(lambda idx, live: torch.zeros(*idx.shape, outputs))


def documents(cfg, *sizes, seed=0):
    """EOS-filled rows of random text of these lengths; seq_len or more: no EOS."""
    x0 = torch.randint(cfg.eos, (len(sizes), cfg.seq_len), generator=generator(seed))
    return torch.where(torch.arange(cfg.seq_len) < torch.tensor(sizes)[:, None], x0, cfg.eos)


def share_is(hits, p, n, width=5):
    """Is a count of n independent trials what the probability p says, within so many sigma?"""
    return abs(float(hits) - n * p) <= width * math.sqrt(n * p * (1 - p)) + 1e-9


def near(values, truth, width=5):
    """Is the mean of independent draws (n,) the truth, within so many standard errors?"""
    values = values.double()
    return abs(values.mean().item() - truth) < width * values.std().item() / len(values) ** 0.5 + \
        1e-6


def causal(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


# ---- 1. the network


def test_attention_at_ratio_0_and_1():
    """(E2) (E3) At 0 another token j changes what is said of later tokens alone; at 1 of all."""
    assert torch.equal(script.random_attention(9, 0, "cpu"), causal(9))
    assert script.random_attention(9, 1, "cpu") is None
    cfg = config(vocab_size=20, eos=19, bos=19, seq_len=8)
    model, ids = network(cfg), torch.randint(19, (1, 8), generator=generator(1))
    for j in range(8):
        other = ids.clone()
        other[0, j] = (ids[0, j] + 1) % 19
        past, all_ = ((model(ids, None, mask) - model(other, None, mask))[0].abs().amax(1)
                      for mask in (causal(9), None))
        assert (past[:j + 1] == 0).all() and (past[j + 1:] > 1e-4).all() and (all_ > 1e-4).all()


def test_attention_opens_over_the_steps_and_is_open_in_bound_and_lengths():
    """(E3) corrupt's mask is (1 + T, 1 + T) of the cropped canvas, past positions are open, and a
    share (step + 1) / attn_annealing_steps of later ones, no place more often than another, then
    all; the arm pipeline stays causal; nelbo and length_dist look everywhere."""
    cfg = config(seq_len=40, attn_annealing_steps=100, p_crop=0.5)
    x0, g = documents(cfg, 3, 40, 0, 5), generator(0)
    for step, r in ((0, 0.01), (29, 0.3), (98, 0.99)):
        shares = []
        for _ in range(40):
            x, _, _, mask = script.corrupt(x0, cfg, g, step)
            n = x.shape[1] + 1
            assert mask.shape == (n, n) and mask[causal(n)].all()
            shares.append(mask[~causal(n)])
        assert len({len(s) for s in shares}) > 1
        assert share_is(torch.cat(shares).sum(), r, len(torch.cat(shares)))
        whole = torch.stack([s for s in shares if len(s) == 820]).float().mean(0)
        assert (whole - r).abs().max() < 0.1 + 5.5 * math.sqrt(r * (1 - r) / 15)
    assert all(script.corrupt(x0, cfg, g, step)[3] is None for step in (99, 100, 10 ** 6))
    for step in (0, 500):
        arm = dataclasses.replace(cfg, pipeline="arm")
        assert torch.equal(script.corrupt(x0, arm, g, step)[3], causal(41))
    masks, model = [], uniform(4)
    model.register_forward_pre_hook(lambda _, args: masks.extend(args[2:]))
    script.nelbo(model, x0, cfg, g)
    script.length_dist(model, x0, torch.zeros(4, dtype=torch.long), cfg)
    assert len(model.asked) == 9 and not [mask for mask in masks if mask is not None]


@pytest.mark.parametrize("rows", ["docs", "stream"])
def test_the_adaptation_starts_at_the_causal_model(rows):
    """(E2) (E3) Ratio 0, position i and all later ones masked: with the parent's weights, log
    p(x_i) without PAD is the parent's, difference 0."""
    arm = config(vocab_size=20, eos=19, bos=19, seq_len=8, pipeline="arm", rows=rows)
    parent, child = network(arm), script.Model(dataclasses.replace(arm, pipeline="diffusion"))
    child.load_state_dict(parent.state_dict())
    x0 = documents(arm, 0, 3, 7, 8)
    nats, x = script.nelbo_per_token(parent, x0, arm, None), script.to_canvas(x0, arm)
    for i in range(8):
        xt = x.masked_fill(torch.arange(8) >= i, 21)
        logp = child(xt, None, causal(9))[:, i, :20].log_softmax(1).double()
        is_token = x[:, i] < 20
        got = -logp.gather(1, x0[:, i, None])[:, 0]
        assert (got - nats[:, i])[is_token].abs().sum() <= 1e-5
        assert (nats[:, i][~is_token] == 0).all()
    scored = (nats > 0).sum(1).tolist()
    assert scored == ([1, 4, 8, 8] if rows == "docs" else 4 * [8])


def clock(cfg, text, first):
    """A network of no blocks that says the j-th token of `text` at its input first + j, BOS being
    input 0, and knows nothing elsewhere."""
    model = script.Model(dataclasses.replace(cfg, n_layer=0)).requires_grad_(False)
    wte, wpe = model.transformer.wte.weight.zero_(), model.transformer.wpe.weight.zero_()
    wte[:model.num_outputs, :model.num_outputs] = torch.eye(model.num_outputs)
    model.transformer.ln_f.weight.fill_(20.0)
    for j, token in enumerate(text[:len(wpe) - first]):
        wpe[first + j, token] = 1000.0
    return model


def test_a_shift_too_few_or_too_many():
    """(E2) A network that says token i right before it costs nothing; one place further costs more
    than a nat in the loss, the bound, the length and the causal likelihood alike."""
    cfg = config(vocab_size=8, eos=7, bos=7, seq_len=7)
    text = [0, 3, 1, 5, 2, 7]  # EOS at 5, then PAD
    x0, arm = torch.tensor([text + [7]]), dataclasses.replace(cfg, pipeline="arm")
    for first in range(3):
        model = clock(cfg, text + [8], first)
        loss = script.loss_fn(model, *script.corrupt(x0, cfg, generator(0), 0)).item()
        nats = script.nelbo(model, x0, cfg, generator(0), 7).item()
        p = script.length_dist(model, x0, torch.tensor([2]), cfg)[0].exp()
        chain = script.nelbo(clock(arm, text, first), x0, arm, None).item()
        assert loss < 0.01 and nats < 0.01 and chain < 0.01 and p[5] > 0.99 if first == 0 else \
            loss > 1 and nats > 7 and chain > 6 and p[5] < 0.99


# ---- 2. corruption


def test_what_follows_the_first_eos_is_pad():
    """Canvases are text, one EOS, PADs; windows of a stream stay and have no length."""
    cfg, stream = config(), config(rows="stream")
    x0 = torch.tensor([[2, 2, 2, 2, 2, 2], [0, 1, 2, 2, 2, 2], [0, 1, 0, 1, 0, 2], 6 * [1]])
    want = [[2, 3, 3, 3, 3, 3], [0, 1, 2, 3, 3, 3], [0, 1, 0, 1, 0, 2], 6 * [1]]
    before = x0.clone()
    assert script.to_canvas(x0, cfg).tolist() == want and torch.equal(x0, before)
    assert script.length_of(script.to_canvas(x0, cfg), cfg).tolist() == [0, 2, 5, 6]
    assert torch.equal(script.to_canvas(x0, stream), x0)
    assert script.length_of(x0, stream).tolist() == 4 * [6]


@pytest.mark.parametrize("row", ROWS)
def test_corruption_and_loss_are_the_bound_per_position(row):
    """(E1) Without prompts each set of n masks of T has probability 1 / (T C(T, n)), whatever the
    row, and weight T / n per position: the expectation over all sets is NELBO / T exactly."""
    cfg, B = config(seq_len=5), 20_000
    x0, patterns = torch.tensor([ROWS[row]]), all_rows(2, 5).bool()
    x, xt, weight, mask = script.corrupt(x0.expand(B, -1), cfg, generator(1), 0)
    is_mask, n = xt == MASK, (xt == MASK).sum(1)
    assert mask is None and torch.equal(x, script.to_canvas(x0, cfg).expand(B, -1))
    assert torch.equal(xt[~is_mask], x[~is_mask])
    assert torch.allclose(5 * B * weight, 5 * is_mask / n[:, None])
    assert (n.bincount(minlength=6)[1:] - B / 5).abs().max() <= 1  # low-discrepancy
    size = patterns.sum(1).tolist()
    p = torch.tensor([1 / (5 * math.comb(5, k)) if k else 0.0 for k in size])
    assert chi_square(row_counts(is_mask.long(), 2), p) > 1e-3
    model, x = network(cfg, shake=0.8), x[:1]
    weight = p[:, None] * patterns / patterns.sum(1, keepdim=True).clamp(min=1)  # all in one batch
    loss = script.loss_fn(model, x.expand(32, -1), torch.where(patterns, MASK, x), weight, None)
    assert loss.item() == pytest.approx(enumerated(model, x[0]).sum().item() / 5, abs=1e-5)


@pytest.mark.parametrize("L", [0, 1, 7, 11, 16])
def test_rows_with_a_prompt(L):
    """p_prompt of the rows have a prompt of 1 to T / 2 tokens, each number alike, that is never
    masked; in half of these all the rest is masked. A row that is shorter than its prompt is left
    out, so that a prompt holds no EOS. Weights are N / n over all that may be masked."""
    cfg, B, drawn = config(seq_len=16, p_prompt=0.6), 20_000, []
    honest, most = script.random_prompts, min(L, 8)
    x, xt, weight, _ = script.corrupt(documents(cfg, *[L] * B), cfg, generator(1), 0,
                                      lambda *args: drawn.extend(honest(*args)) or drawn)
    allowed, mask_all = drawn
    is_mask, N = xt == MASK, allowed.sum(1)
    n, m = is_mask.sum(1), 16 - N
    assert torch.equal(allowed, torch.arange(16) >= m[:, None]) and not (is_mask & ~allowed).any()
    assert share_is((m == 0).sum(), 0.4, B) and share_is((N == 0).sum(), 0.6 * (8 - most) / 8, B)
    if L > 1:
        counts = m[(m > 0) & (N > 0)].bincount(minlength=most + 1)
        assert chi_square(counts[1:], torch.ones(most) / most) > 1e-3
    assert share_is(mask_all.sum(), 0.3, B) and (n == N)[mask_all].all()
    assert not mask_all[m == 0].any()
    some = n[(m == 4) & ~mask_all]
    assert L < 4 or chi_square(some.bincount(minlength=13)[1:], torch.ones(12) / 12) > 1e-3
    want = is_mask * (N / n.clamp(min=1))[:, None] / N.sum()
    assert torch.allclose(weight, want) and weight.sum().item() == pytest.approx(1, abs=1e-4)


def test_a_crop_only_cuts_and_does_so_for_the_whole_batch():
    """(E5) p_crop of the batches keep their first n columns, n from T // 3 + 1 to T alike, whatever
    stands there; the others all."""
    cfg, widths, g = config(seq_len=12, p_crop=0.75), [], generator(0)
    x0 = documents(cfg, 3, 9, 12, 0)
    for _ in range(600):
        x, xt, weight, _ = script.corrupt(x0, cfg, g, 0)
        widths.append(x.shape[1])
        assert torch.equal(x, script.to_canvas(x0, cfg)[:, :widths[-1]])
        assert weight.shape == x.shape == xt.shape and ((xt == x) | (xt == MASK)).all()
    counts, p = torch.tensor(widths).bincount(minlength=13), torch.full((8,), 0.75 / 8)
    p[-1] += 0.25
    assert counts[:5].sum() == 0 and chi_square(counts[5:], p) > 1e-3


@pytest.mark.parametrize("crop", [0.0, 1.0])
def test_neither_prompts_nor_crops_tell_the_length(crop):
    """(E4) (E5) The loss is stationary at the true conditionals: behind every prompt, at every
    position, the weighted rows have the tokens, EOS and PAD that the oracle expects. Prompts of 1
    to min(L, T / 2) tokens would not: short documents would own the short prompts."""
    cfg, g = config(p_prompt=0.8, p_crop=crop), generator(3)
    sums = torch.zeros(2, 4, 7, T, 4, dtype=torch.float64)  # of residuals and their squares
    for _ in range(20 if crop else 5):
        pick = torch.multinomial(ORACLE.p, 8000, replacement=True, generator=g)
        x, xt, weight, _ = script.corrupt(ORACLE.filled()[pick], cfg, g, 0)
        w, q = x.shape[1], ORACLE(xt).double().softmax(2)
        residual = (F.one_hot(x, 4) - q) * (8000 * weight)[..., None]
        first = (xt != MASK).cumprod(1).sum(1).clamp(max=3)
        for k in range(4):
            part = residual[first == k]
            sums[:, k, w, :w] += torch.stack((part.sum(0), (part ** 2).sum(0)))
    z = sums[0] / sums[1].clamp(min=1e-9).sqrt()
    assert (sums[1] > 50).sum() > (80 if crop else 25) and z[sums[1] > 50].abs().max() < 5


def test_a_batch_of_which_nothing_can_be_masked_costs_nothing():
    """Two empty documents that should begin with a prompt: loss and gradient are finite."""
    cfg, g = config(p_prompt=1.0), generator(0)
    model = network(cfg).requires_grad_(True)
    for _ in range(10):
        loss = script.loss_fn(model, *script.corrupt(documents(cfg, 0, 0), cfg, g, 0))
        loss.backward()
        assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---- 3. bound


def enumerated(model, x, is_given=None):
    """(E1): the sum over n of 1 / n times the mean over sets of n, at each position: (T,)."""
    patterns = all_rows(2, len(x)).bool()
    logp = model(x.expand(len(patterns), -1).masked_fill(patterns, MASK)).double().log_softmax(2)
    ce = -logp.gather(2, x.expand(len(patterns), -1)[..., None])[..., 0] * patterns
    is_given = torch.zeros(len(x), dtype=torch.bool) if is_given is None else is_given
    allowed, size = ~(patterns & is_given).any(1), patterns.sum(1)
    return sum(ce[allowed & (size == n)].mean(0) / n for n in range(1, int((~is_given).sum()) + 1))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("is_given", [[0, 0, 0, 0, 0], [0, 1, 0, 1, 0], [1, 1, 1, 1, 0]])
def test_the_bound_is_the_sum_over_all_masks(row, is_given):
    """(E1) Mean of nelbo = the enumeration, at each position, for any K; of the rest given some
    tokens, which are never masked; exact with one token left; nothing wanted costs nothing."""
    cfg, is_given = config(seq_len=5), torch.tensor(is_given).bool()
    model, x0 = network(cfg, shake=0.8), torch.tensor([ROWS[row]])
    x = script.to_canvas(x0, cfg)[0]
    want = enumerated(model, x, is_given)
    for K in (2, 5):
        args = (model, x0.expand(2000, -1), cfg), K, is_given.expand(2000, -1)
        nats = script.nelbo_per_token(*args[0], generator(K), *args[1:])
        assert nats.shape == (2000, 5) and nats.dtype == torch.float64
        assert all(near(nats[:, i], want[i].item()) for i in range(5))
        assert torch.equal(script.nelbo(*args[0], generator(K), *args[1:]), nats.sum(1))
    assert is_given.sum() < 4 or torch.allclose(nats.sum(1), want.sum(), atol=1e-5)
    assert script.nelbo(model, x0, cfg, generator(1), 3, torch.ones(1, 5).bool()).item() == 0


def test_the_bound_of_the_oracle_is_the_likelihood():
    """(E1) All orders of the chain rule agree, so the bound is tight: -log p(x0)."""
    for k in (0, 5, 40, 90):
        nats = script.nelbo(ORACLE, ORACLE.filled()[k].expand(3000, -1), config(), generator(k), 6)
        assert near(nats, -ORACLE.p[k].log().item(), width=6)


def test_the_causal_likelihood_is_the_chain_rule():
    """(E2) -log p(x_i | x_<i) summed up to the first EOS; the probabilities of all documents sum to
    one; the loss is the mean over scored tokens."""
    cfg = config(pipeline="arm", seq_len=4)
    model, x0 = network(cfg, shake=0.8), all_rows(3, 4)
    x0 = x0[((x0 != EOS).cumprod(1).logical_not() == (x0 == EOS)).all(1)]  # EOS-filled
    nats = script.nelbo_per_token(model, x0, cfg, None)
    for i in range(4):  # the network sees the tokens before i alone
        logp = model(x0[:, :i + 1].index_fill(1, torch.tensor([i]), 0), None, causal(i + 2))[:, i]
        free = (x0[:, :i] == EOS).any(1)
        want = -logp.log_softmax(1).gather(1, x0[:, i, None])[:, 0].masked_fill(free, 0.0)
        assert torch.allclose(nats[:, i], want.double(), atol=1e-5)
    assert len(x0) == 31 and (-nats.sum(1)).exp().sum().item() == pytest.approx(1, abs=1e-5)
    x, xt, weight, mask = script.corrupt(x0, cfg, generator(0), 0)
    assert torch.equal(x, xt) and (x == script.to_canvas(x0, cfg)).all()
    loss = script.loss_fn(model, x, xt, weight, mask)
    assert loss.item() == pytest.approx((nats.sum() / (nats > 0).sum()).item(), rel=1e-5)


# ---- 4. lengths


def test_hazards_of_the_oracle_are_the_distribution_of_lengths():
    """(E4) All masked behind a prompt: p_i(EOS) = P(L = i), p_i(PAD) = P(L < i); length_dist is
    P(L | prompt), sums to one, in one evaluation, also for prompts of different lengths. Without
    dividing by 1 - p(PAD) it is something else."""
    prompts = [row for m in range(4) for row in all_rows(2, m).tolist()]
    x, m = torch.zeros(len(prompts), T, dtype=torch.long), torch.tensor([*map(len, prompts)])
    for row, prompt in zip(x, prompts):
        row[:len(prompt)] = torch.tensor(prompt)
    want = torch.stack([ORACLE.length_dist(prompt) for prompt in prompts])
    ORACLE.asked.clear()
    got = script.length_dist(ORACLE, x, m, config()).double().exp()
    assert len(ORACLE.asked) == 1 and torch.allclose(got, want, atol=1e-6)
    assert torch.allclose(got.sum(1), torch.ones(len(x)).double(), atol=1e-6)
    behind = torch.arange(T) >= m[:, None]
    q = ORACLE(x.masked_fill(behind, MASK)).double().softmax(2)
    assert torch.allclose(q[..., EOS][behind], want[:, :T][behind], atol=1e-6)
    assert torch.allclose(q[..., PAD][behind], (want.cumsum(1) - want)[:, :T][behind], atol=1e-6)
    raw = script.hazard_to_dist(q[..., EOS].log(), torch.log1p(-q[..., EOS]), m)
    assert ((raw.exp() - want).abs().amax(1) > 0.05)[m < 3].all()


def test_hazards_by_hand():
    """(E4) A loop over probabilities, for any hazards; a prompt holds no end; a hazard of one
    leaves nothing for longer rows; in a stream the hazard is p(EOS) itself."""
    h = torch.rand(40, T, generator=generator(0), dtype=torch.float64)
    for m in range(7):
        got = script.hazard_to_dist(h.log(), torch.log1p(-h), torch.full((40,), m)).exp()
        left = torch.ones(40, dtype=torch.float64)
        for i in range(T):
            assert torch.allclose(got[:, i], h[:, i] * left * (i >= m), atol=1e-12)
            left = left - got[:, i]
        assert torch.allclose(got[:, T], left, atol=1e-12)
    sure = Script(lambda idx, live: 99.0 * F.one_hot(torch.full_like(idx, EOS), 4))
    p = script.length_dist(sure, torch.zeros(1, T).long(), torch.tensor([2]), config()).exp()
    assert p[0, 2] > 0.999 and p.sum().item() == pytest.approx(1, abs=1e-5) and p[0, 6] < 1e-6
    p = script.length_dist(uniform(3), torch.zeros(1, T).long(), torch.tensor([1]),
                           config(rows="stream")).exp()[0]
    assert torch.allclose(p[1:6], torch.tensor([(2 / 3) ** i / 3 for i in range(5)]))


def test_a_network_learns_the_lengths():
    """(E3) (E4) (E5) With prompts, crops and annealing P(L | prompt) comes within 0.03 nats of the
    oracle's, while what ignores the first token is more than 0.05 away."""
    cfg, g = config(n_embd=32, lr=2e-2, steps=300, p_prompt=0.8, p_crop=0.25,
                    attn_annealing_steps=30), generator(1)
    torch.manual_seed(0)
    model = script.Model(cfg)
    optimizers = script.make_optimizers(model, cfg)
    for step in range(cfg.steps):
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = script.get_lr(step, cfg) * group["scale"]
        pick = torch.multinomial(ORACLE.p, 128, replacement=True, generator=g)
        script.loss_fn(model, *script.corrupt(ORACLE.filled()[pick], cfg, g, step)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for prompt in ((), (0,), (1,), (1, 1)):
        want, m = ORACLE.length_dist(prompt), len(prompt)
        x = torch.tensor([[*prompt] + [0] * (T - m)])
        logp = script.length_dist(model, x, torch.tensor([m]), cfg)[0].double()
        everyone = ORACLE.length_dist()[m:] / ORACLE.length_dist()[m:].sum()
        kl = [(want[m:] * (want[m:] / p).log()).nansum() for p in (logp[m:].exp(), everyone)]
        assert kl[0] < 0.03 and (m != 1 or kl[1] > 0.05), (prompt, kl)


# ---- 5. two stages


FLAGS = ("--tokenizer byte --rows docs --n-layer 1 --n-head 2 --n-embd 32 --seq-len 64 --steps 4 "
         "--batch-size 4 --warmup 2 --eval-every 2 --device cpu --dtype float32 --parent-steps 4"
         ).split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text, its cache and a run of both stages, `run` and `run_parent`."""
    home = tmp_path_factory.mktemp("home")
    small_text(home / "small.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXT_DIFFUSION_CACHE", str(home / "cache"))
        patch.setattr(common, "plot_loss", lambda *_: None)
        script.main(["--data", str(home / "small.txt"), *FLAGS, "--out", str(home / "run")])
        yield home


@pytest.fixture
def train(home, tmp_path, monkeypatch):
    """train(*flags) -> the folder of a run that has the parent of `home`, if `copied` is asked."""
    monkeypatch.setattr(common, "show_samples", lambda *_: None)

    def call(*flags, copied=True):
        out, parent = tmp_path / "run", tmp_path / "run_parent"
        if copied and not parent.exists():
            parent.mkdir()
            for file in (home / "run_parent").iterdir():
                (parent / file.name).write_bytes(file.read_bytes())
        script.main(["--data", str(home / "small.txt"), *FLAGS, "--out", str(out), *flags])
        return out
    return call


def log(out, kind):
    return [row for row in common.read_log(out) if row["kind"] == kind]


def test_the_default_run_trains_a_parent_and_adapts_it(home):
    """The parent's log and weights lie beside the run; both have documents as rows; the diffusion
    model draws samples, whose rows are given a likelihood in nats."""
    out, parent = home / "run", home / "run_parent"
    assert {p.name for p in parent.iterdir()} == {"log.jsonl", "model.safetensors", "state.pt"}
    assert {row["bound"] for row in log(parent, "val")} == {"exact"}
    assert {row["bound"] for row in log(out, "val")} == {"upper"} and log(out, "samples")
    configs = [log(folder, "config")[0]["config"] for folder in (parent, out)]
    assert [c["pipeline"] for c in configs] == ["arm", "diffusion"]
    assert [c["rows"] for c in configs] == ["docs", "docs"]
    val = [log(folder, "val") for folder in (parent, out)]
    assert all(rows[-1]["nats_per_token"] < rows[0]["nats_per_token"] - 0.1 for rows in val)


def test_every_length_mode_and_the_parent_sample_and_are_evaluated(home, capsys):
    """From the command line: the given text stays, NFE are those of the mode."""
    for mode in ("fixed", "truncate", "quantile", "blockwise", "presampled"):
        script.main(["sample", "--out", str(home / "run"), "--length-mode", mode, "--infill",
                     "the ___3 saw___", "--num-samples", "2", "--num-steps", "3"])
        said, texts = capsys.readouterr().out, (home / "run/samples.txt").read_bytes()
        assert all(t.startswith(b"the") and b" saw" in t for t in texts.split(b"<|endoftext|>\n"))
        assert 1 <= int(re.search(r"nfe (\d+)", said)[1]) <= (6 if mode == "blockwise" else 4)
    for folder, sign in (("run", "<="), ("run_parent", "=")):
        script.main(["eval", "--out", str(home / folder), "--prompt", "the cat"])
        said = capsys.readouterr().out
        assert re.search(rf"test: {sign} \d.* nats/token", said) and said.count("the cat") == 4


def test_a_model_begins_as_its_parent_with_pad_and_mask_as_the_mean(home):
    """Weights of an arm run, but for the rows of PAD and M; those of a diffusion run as they are;
    nothing is loaded for scratch and --resume."""
    cfg, device = common.load_config(script.Config, home / "run"), torch.device("cpu")
    data = script.load_data(cfg, quiet=True)
    for name in ("run_parent", "run"):
        stored = load_file(home / name / "model.safetensors")
        model = script.init_model(dataclasses.replace(cfg, init_from=str(home / name)),
                                  script.Model, data, device)
        table = stored["transformer.wte.weight"]
        if name == "run_parent":
            assert not torch.allclose(table[-1], table[:-2].mean(0))
            table[-2:] = table[:-2].mean(0)
        assert all(torch.equal(p, stored[key]) for key, p in model.state_dict().items())
    for changes in (dict(init_from="scratch"), dict(resume=True)):
        torch.manual_seed(5)
        model = script.init_model(dataclasses.replace(cfg, **changes), script.Model, data, device)
        torch.manual_seed(5)
        assert all(map(torch.equal, model.parameters(), script.Model(cfg).parameters()))


def test_a_parent_is_used_again_unless_its_settings_differ(home, train, tmp_path):
    """Settings of the adaptation and of sampling are not the parent's; the older run is moved
    aside, here the parent's too."""
    parent = tmp_path / "run_parent"
    out = train("--p-crop", "0.5", "--steps", "3", "--num-steps", "7", "--eval-every", "3")
    files = [folder / "model.safetensors" for folder in (home / "run_parent", parent)]
    assert files[0].read_bytes() == files[1].read_bytes() and len(log(out, "train")) == 3
    assert len(log(parent, "train")) == 4 and not (tmp_path / "run_parent.1").exists()
    out = train("--lr", "1e-3")
    assert (tmp_path / "run.1").exists() and (tmp_path / "run_parent.1").exists()
    assert log(parent, "config")[0]["config"]["lr"] == 1e-3 and len(log(parent, "train")) == 4
    train("--lr", "1e-3", "--parent-steps", "5")
    assert len(log(parent, "train")) == 5 and (tmp_path / "run_parent.2").exists()


def test_a_parent_that_was_stopped_is_gone_on_with(home, train, tmp_path, monkeypatch):
    honest = common.Run.log_step

    def log_step(self, step, *args, **kw):
        honest(self, step, *args, **kw)
        if step == 3:
            signal.raise_signal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="same command"):
        patch.setattr(common.Run, "log_step", log_step)
        train(copied=False)
    assert not (tmp_path / "run").exists()
    out = train(copied=False)
    for name in ("run", "run_parent"):
        files = [load_file(folder / name / "model.safetensors") for folder in (home, tmp_path)]
        assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    assert [row["step"] for row in log(f"{out}_parent", "train")] == [1, 2, 3, 4]


def test_a_stop_before_anything_was_saved_promises_nothing(home, train, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(common.Run, "begin", stop)
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(copied=False)
    assert not stopped.value.args


def test_init_from_a_folder(home, train, tmp_path, monkeypatch, capsys):
    """A run of this script begins another; whatever else it is ends in one sentence and no
    folder."""
    out = train("--init-from", str(home / "run"), copied=False)
    assert not (tmp_path / "run_parent").exists()
    assert log(out, "val")[0]["nats_per_token"] == log(home / "run", "val")[-1]["nats_per_token"]
    for flags, sentence in (
            (["--init-from", str(tmp_path)], f"{tmp_path / 'model.safetensors'} is missing"),
            (["--init-from", "gpt3"], "model.safetensors is missing, broken or of other settings"),
            (["--init-from", str(home / "run"), "--n-embd", "64"], "of other settings"),
            (["--init-from", str(home / "run"), "--tokenizer", "char"], "another tokenizer than"),
            (["--pipeline", "arm"], "arm is the parent itself: add --init-from scratch"),
            (["--p-prompt", "1.1"], "--p-prompt and --p-crop must be at most 1"),
            (["--length-quantile", "1"], "--length-quantile must be in (0, 1)"),
            (["--pipeline", "arm", "--init-from", "scratch", "--infill", "a ___ b"],
             "--infill needs --pipeline diffusion")):
        argv = ["--data", str(home / "small.txt"), *FLAGS, "--out", str(tmp_path / "no"), *flags]
        monkeypatch.setattr(sys, "argv", ["diffugpt_varlen.py", *argv])
        with pytest.raises(SystemExit) as stop:
            common.run_main(script.main)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and sentence in err and err.count("error: ") == 1, err
        assert not (tmp_path / "no").exists()
