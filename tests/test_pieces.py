"""What the scripts have in common, tested in each: attention, filters, categorical draws,
micro-batches, learning, and that sections 3-5 run alone."""
import copy
import itertools
import math
import types
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import ar
import bit_diffusion
import diffugpt_varlen
import dit_embed
import fast
import mdlm
import sdd
from lab import bit_variants, dit_variants, mdlm_variants, sdd_variants
from tables import chi_square, generator

SCRIPTS = [ar, mdlm, dit_embed, bit_diffusion, sdd, diffugpt_varlen]
OURS = pytest.mark.parametrize("script", SCRIPTS[:-1], ids=lambda s: s.__name__)  # no GPT-2
ALL = pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)


# ---- one interface


def losses(script, model, x0, cfg, g, parts=(slice(None),)):
    """The losses of micro-batches with the noise of the whole batch; they add up to its loss."""
    if script.__name__ == "ar":
        weight = 1 / script.is_scored(x0, cfg).sum()
        return [script.loss_fn(model, x0[rows], weight, cfg) for rows in parts]
    if script.__name__ == "diffugpt_varlen":
        *noise, mask = script.corrupt(x0, cfg, g, 0)
        return [script.loss_fn(model, *(part[rows] for part in noise), mask) for rows in parts]
    loss_fn, noise = getattr(script, "loss_fn", mdlm.loss_fn), script.corrupt(x0, cfg, g)
    return [loss_fn(model, x0[rows], *(part[rows] for part in noise)) for rows in parts]


def nats(script, model, x0, cfg, g):
    """-log p of every row, or its bound: (B,)."""
    return (script.nll(model, x0, cfg) if script.__name__ == "ar" else
            script.nelbo(model, x0, cfg, g))


def draw(script, model, cfg, n, g):
    """n samples and NFE."""
    return script.sample(model, torch.full((n, cfg.seq_len), cfg.vocab_size), cfg, g)


def network_input(script, model, x):
    """What a network that is to be told the tokens x (B, T) is called with."""
    if script is dit_embed:  # clean embeddings, told so
        return model.embeddings()[x], torch.full(x.shape, 5.0)
    if script is bit_diffusion:
        return model.codes[x], torch.full(x.shape, bit_diffusion.CLEAN)
    if script is sdd:
        return sdd.input_state(x, torch.full(x.shape, sdd.CLEAN), torch.zeros(0, 11), 2)
    return (x,)


def config(script, **changes):
    """A small network; one token a step at random."""
    settings = dict(vocab_size=11, seq_len=8, n_layer=2, n_head=2, n_embd=16, rows="stream", eos=0,
                    bos=0, lr=4e-3, warmup=10, order="random", num_steps=0, temperature=1.0,
                    remask="none", sampler="token", attn_annealing_steps=1) | changes
    known = {*script.Config.__dataclass_fields__, *changes} - (
        set() if hasattr(script.Config, "bos") else {"bos"})
    return script.Config(**{k: v for k, v in settings.items() if k in known})


def network(script, cfg, shake=0.3, seed=0):
    torch.manual_seed(seed)
    model, g = script.Model(cfg), generator(seed)
    for p in model.parameters():
        p.data += shake * torch.randn(p.shape, generator=g)
    return model


def fit(script, model, cfg, batch, steps, g):
    """Train as the script does: its loss, its optimizers, its learning rate."""
    optimizers, cfg.steps = script.make_optimizers(model, cfg), steps
    for step in range(steps):
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = script.get_lr(step, cfg) * group["scale"]
        losses(script, model, batch(), cfg, g)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model


# ---- attention


@OURS
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_attention_is_softmax_attention(script, dtype, atol):
    """Against PyTorch's own, of normalised and turned queries and keys; causal in ar.py."""
    torch.manual_seed(0)
    attention, x = script.Attention(config(script)), torch.randn(3, 7, 16)
    positions = torch.arange(5, 12)
    q, k, v = attention.qkv(x).view(3, 7, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k = (script.rotate(F.layer_norm(y, (8,)), positions) for y in (q, k))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=script is ar)
    want = attention.proj(y.transpose(1, 2).reshape(3, 7, 16))
    got = attention.to(dtype)(x.to(dtype), positions)
    assert got.dtype == dtype and torch.allclose(got.float(), want, atol=atol)


@OURS
def test_rotary_scores_depend_on_relative_positions_only(script):
    """A shift of all positions changes no inner product and no length."""
    g = generator(0)
    q, k = torch.randn(2, 1, 1, 5, 16, generator=g)
    scores = []
    for start in (0, 3, 40):
        a, b = (script.rotate(x, torch.arange(start, start + 5)) for x in (q, k))
        scores.append(a @ b.transpose(2, 3))
        assert torch.allclose(a.norm(dim=3), q.norm(dim=3), atol=1e-5)
    assert torch.allclose(scores[0], scores[1], atol=1e-4)
    assert torch.allclose(scores[0], scores[2], atol=1e-4)
    moved = script.rotate(q, torch.arange(5) * 2)
    assert (moved @ b.transpose(2, 3) - scores[2]).abs().max() > 0.1
    assert torch.equal(script.rotate(q[:, :, :1], torch.zeros(1)), q[:, :, :1])  # 0 turns nothing


@ALL
def test_the_network_knows_the_order_of_its_input(script):
    """Exchanging two visible tokens changes the logits."""
    model, x = network(script, config(script)), torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    a, b = (model(*network_input(script, model, x[:, order]))[:, -1] for order in
            (list(range(8)), [1, 0, 2, 3, 4, 5, 6, 7]))
    assert (a - b).abs().max() > 1e-3


# ---- filters


def brute_force_filter(logits, temperature, top_k, top_p):
    """One row: the set of kept tokens and their probabilities, without sorting tricks."""
    z = [v / temperature for v in logits]
    keep = set(range(len(z)))
    if 0 < top_k < len(z):
        keep = {v for v in keep if sum(other > z[v] for other in z) < top_k}  # ties stay
    total = sum(math.exp(z[v]) for v in keep)
    if top_p < 1:
        mass, chosen = 0.0, set()
        for v in sorted(keep, key=lambda v: -z[v]):
            if mass >= top_p and chosen:
                break
            chosen.add(v)
            mass += math.exp(z[v]) / total
        keep = chosen
    total = sum(math.exp(z[v]) for v in keep)
    return [math.exp(z[v]) / total if v in keep else 0.0 for v in range(len(z))]


@ALL
def test_filters_equal_brute_force(script):
    """Temperature first, then top-k, then top-p over what is left."""
    logits = torch.randn(20, 9, generator=generator(0)) * 2
    for temperature, top_k, top_p in itertools.product(
            (1.0, 0.7, 2.0), (0, 1, 3, 9, 50), (1.0, 0.9, 0.5, 0.05, 0.0)):
        cfg = SimpleNamespace(temperature=temperature, top_k=top_k, top_p=top_p)
        got = script.filter_logits(logits, cfg).softmax(1)
        want = torch.tensor([brute_force_filter(row, temperature, top_k, top_p)
                             for row in logits.tolist()])
        assert torch.allclose(got, want, atol=1e-5), (temperature, top_k, top_p)


@ALL
def test_filters_at_their_edges(script):
    """Ties at the k-th place stay; top-p below the largest probability keeps one token and always
    the one that crosses it; temperature 0 is the argmax; the order of the three matters."""
    def kept(logits, temperature=1.0, top_k=0, top_p=1.0):
        cfg = SimpleNamespace(temperature=temperature, top_k=top_k, top_p=top_p)
        out = script.filter_logits(torch.tensor([logits]), cfg)
        assert out.dtype == torch.float32 and not out.isnan().any()
        return (out[0] > -torch.inf).nonzero()[:, 0].tolist()

    assert kept([1.0, 3.0, 1.0, 0.0, 1.0], top_k=2) == [0, 1, 2, 4]
    log_p = np.log([0.5, 0.25, 0.125, 0.125]).tolist()
    assert kept(log_p, top_p=0.4) == kept(log_p, top_p=0.499) == kept(log_p, top_p=0.0) == [0]
    assert kept(log_p, top_p=0.501) == kept(log_p, top_p=0.749) == [0, 1]
    assert kept(log_p, top_k=2, top_p=0.7) == [0, 1]  # 0.5 is 2/3 of what top-k left
    assert kept(log_p, top_k=2, top_p=0.6) == [0]
    assert kept(log_p, temperature=0.5, top_p=0.7) == [0]  # p^2: 0.5 becomes 0.73
    assert kept(log_p, temperature=4.0, top_p=0.5) == [0, 1]
    cfg = SimpleNamespace(temperature=0, top_k=0, top_p=1.0)
    one_hot = script.filter_logits(torch.tensor([[1.0, 5.0, 4.99, 2.0]]), cfg).softmax(1)
    assert one_hot.tolist() == [[0, 1, 0, 0]]


# ---- categorical draws


def zipf(V):
    p = 1 / torch.arange(1, V + 1, dtype=torch.float64)
    return p / p.sum()


def tail_bins(draws, p, edges=(0, 1, 3, 10, 30, 100, 300, 1000, 1500, 2000, 2700, 3500, 4200)):
    """Counts and probabilities of groups of ranks, most of them far out in the tail."""
    edge = torch.tensor(edges[1:])
    group = torch.bucketize(torch.arange(len(p)), edge, right=True)
    return (group[draws].bincount(minlength=len(edges)),
            torch.zeros(len(edges), dtype=torch.float64).index_add(0, group, p))


def one_stage(p, r, trials, g, bits=24):
    """Museum piece: one argmax of q / E over the tokens, q = r p, and the mask, q = 1 - r, with
    E = -log U and U on the grid of float32's torch.rand, 2^-24. Returns the tokens that won. Only
    E below 16 q is drawn: larger ones beat the mask with probability e^-16."""
    near = int(16 * r * p.max() * 2 ** bits) + 1
    hits = int(np.random.default_rng(0).binomial(trials * len(p), near / 2 ** bits))
    trial, token = (torch.randint(many, (hits,), generator=g) for many in (trials, len(p)))
    U = 1 - torch.randint(1, near + 1, (hits,), generator=g) / 2 ** bits
    assert U.dtype == torch.float32
    score = (r * p).float()[token] / -torch.log(U)
    mask = (1 - r) / -torch.log1p(-torch.rand(trials, generator=g))
    best = mask.scatter_reduce(0, trial, score, "amax")
    return token[score == best[trial]]


@ALL
def test_categorical_draws_the_tail_as_often_as_it_should(script):
    """Chi-square over a Zipf distribution of 5000 ids. The probability of unmasking never enters:
    it is two stages."""
    p, g = zipf(5000), generator(1)
    draws = torch.cat([script.categorical(p.log().float().expand(500, 5000), g) for _ in range(16)])
    assert chi_square(*tail_bins(draws, p)) > 1e-3
    p = torch.tensor([0.5, 0.5 - 6e-5, 2e-5, 2e-5, 2e-5])
    draws = torch.cat([script.categorical(p.log().expand(200_000, 5), g) for _ in range(8)])
    assert chi_square(draws.bincount(minlength=5), p) > 1e-3


def test_the_float32_one_stage_sampler_loses_the_tail():
    """The same check refuses it where 1/1000 are unmasked, as in 1000 steps; it draws
    p kappa(p), kappa = c / (e^c - 1), c = 1 / (p r 2^24)."""
    p, r = zipf(5000), 1e-3
    counts, want = tail_bins(one_stage(p, r, 1_500_000, generator(1)), p)
    assert counts.sum() > 1000 and chi_square(counts, want) < 1e-6
    c = 1 / (p * r * 2 ** 24)
    kappa = c / torch.expm1(c)
    _, want = tail_bins(counts, p * kappa / (p * kappa).sum())
    assert chi_square(counts, want) > 1e-3


@ALL
def test_categorical_never_draws_what_a_filter_has_cut(script):
    logits = torch.full((1000, 6), -torch.inf)
    logits[:, [1, 4]] = torch.tensor([0.0, 1.0])
    draws = script.categorical(logits, generator(0))
    assert draws.shape == (1000,) and set(draws.tolist()) == {1, 4}
    assert chi_square(draws.bincount(minlength=6), torch.tensor([0, 1, 0, 0, math.e, 0])
                      / (1 + math.e)) > 1e-3
    assert torch.equal(draws, script.categorical(logits, generator(0)))


# ---- micro-batches


MDLM_LOSSES = ("mean_per_sequence", "mean_per_batch", "nelbo")


@pytest.mark.parametrize("script, changes", [
    (ar, dict(rows="docs")), (ar, dict(rows="stream")),
    (mdlm, {}), *((mdlm_variants, dict(loss=loss, exact_count=exact, schedule=schedule, cond=cond))
                  for loss, exact, schedule, cond in itertools.product(
                      MDLM_LOSSES, (True, False), ("linear", "cosine"), ("none", "add"))),
    *((script, dict(noise_window=window))
      for script, window in itertools.product((dit_embed, bit_diffusion, sdd), (0.3, 1.0))),
    *((dit_variants, dict(loss=loss, prediction_type=what, self_cond=0.5, prefix=0.5))
      for loss, what in itertools.product(("auto", "mse", "nelbo"), ("logits", "eps", "v"))),
    *((bit_variants, dict(loss=loss, head=head, num_mixture=mixture, prefix=0.5))
      for loss, (head, mixture) in itertools.product(
          ("ce", "nelbo"), (("token", 1), ("bit", 1), ("bit", 4)))),
    *((sdd_variants, dict(loss=loss, attention=attention, prefix=0.5, k=3))
      for loss, attention in itertools.product(("ce", "nelbo"), ("pooled", "full"))),
    (sdd_variants, dict(process="original", k=3)),
    *((diffugpt_varlen, dict(rows=rows, attn_annealing_steps=2, p_prompt=0.6, p_crop=1.0))
      for rows in ("docs", "stream")), (diffugpt_varlen, dict(rows="docs", pipeline="arm"))])
def test_micro_batches_add_up(script, changes):
    """The loss and gradient of a batch; its noise is drawn, and its weights count, as a whole."""
    cfg = config(script, **changes)
    model, x0 = network(script, cfg), torch.randint(11, (12, 8), generator=generator(3))
    x0[::3, 2:] = 0  # rows of different lengths

    def run(size):
        model.zero_grad()
        parts = [slice(i, i + size) for i in range(0, 12, size)]
        values = losses(script, model, x0, cfg, generator(4), parts)
        for loss in values:
            loss.backward()
        return sum(values).item(), [p.grad.clone() for p in model.parameters()
                                    if p.grad is not None]

    whole, gradients = run(12)
    for size in (6, 4, 1):
        total, parts = run(size)
        assert total == pytest.approx(whole, rel=1e-5)
        for a, b in zip(gradients, parts):
            assert torch.allclose(a, b, atol=1e-5 * max(1.0, a.abs().max().item()))


@pytest.mark.parametrize("script, changes", [
    (ar, dict(rows="docs")), (ar, {}), (mdlm, {}),
    *((mdlm_variants, dict(loss=loss, exact_count=False)) for loss in MDLM_LOSSES),
    (dit_embed, {}), *((dit_variants, dict(loss=loss)) for loss in ("mse", "nelbo")),
    (bit_diffusion, {}), *((bit_variants, changes) for changes in (
        dict(loss="nelbo"), dict(head="bit", num_mixture=4))),
    (sdd, {}), *((sdd_variants, changes) for changes in (
        dict(loss="nelbo"), dict(attention="full", k=3), dict(process="original", k=3))),
    *((diffugpt_varlen, changes) for changes in (
        {}, dict(rows="docs", p_prompt=1.0), dict(rows="docs", pipeline="arm")))])
def test_rows_with_everything_or_nothing_masked_give_finite_gradients(script, changes):
    """Also a document that is empty, and in bfloat16."""
    x0, cfg = torch.randint(11, (6, 8), generator=generator(1)), config(script, **changes)
    x0[0], model = 0, network(script, cfg)
    for seed in range(8):  # with independent masks and eight tokens, some rows are untouched
        with torch.autocast("cpu", torch.bfloat16, enabled=seed % 2 == 1):
            loss, = losses(script, model, x0, cfg, generator(seed))
        loss.backward()
        assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@ALL
def test_gradients_in_bfloat16_are_those_of_float32(script):
    """Of as many positions as in training: sums over all of them must not stop to grow."""
    cfg, found = config(script, seq_len=160), []
    model, x0 = network(script, cfg), torch.randint(11, (16, 160), generator=generator(1))
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, = losses(script, model, x0, cfg, generator(2))
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()
                      if p.grad is not None})
    for name, grad in found[0].items():
        assert (found[1][name] - grad).norm() < 0.1 * grad.norm() + 1e-6, name


@ALL
def test_bfloat16_autocast_stays_close_to_float32(script):
    """Loss, likelihood and logits; the loss itself is float32."""
    cfg = config(script)
    model, x0 = network(script, cfg), torch.randint(11, (64, 8), generator=generator(1))
    values = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, = losses(script, model, x0, cfg, generator(2))
            nll = nats(script, model, x0, cfg, generator(3))
        assert loss.dtype == torch.float32 and nll.dtype == torch.float64
        values.append((loss.item(), nll.mean().item()))
    assert values[1] == pytest.approx(values[0], rel=1e-2) and values[0] != values[1]


# ---- learning


def sticky_rows(n, T, g, stay=0.9):
    """Two states; each token repeats the one two places before it with probability 0.9, so that
    only attention can find it; and the entropy of a row in nats."""
    change = torch.rand(n, T, generator=g) < 1 - stay
    change[:, :2] = torch.rand(n, 2, generator=g) < 0.5
    entropy = 2 * math.log(2) - (T - 2) * (stay * math.log(stay) + (1 - stay) * math.log(1 - stay))
    return change.view(n, T // 2, 2).cumsum(1).view(n, T) % 2, entropy


PLAIN = {script: {} for script in SCRIPTS} | {  # all rows alike, and a block that learns slower
    diffugpt_varlen: dict(p_prompt=0.0, p_crop=0.0, lr=1e-2)}


@ALL
def test_it_learns_a_two_state_language_to_its_entropy(script):
    """Within 0.05 nats per token of the entropy, and not below it."""
    g, T = generator(1), 8
    cfg = config(script, vocab_size=3, bos=2, n_embd=32, **PLAIN[script])
    torch.manual_seed(0)
    model = script.Model(cfg)
    n, steps = (128, 250) if script is diffugpt_varlen else (64, 150)
    fit(script, model, cfg, lambda: sticky_rows(n, T, g)[0], steps, g)
    x0, entropy = sticky_rows(4000, T, generator(2))
    nll = nats(script, model, x0, cfg, generator(3))
    gap, se = (nll.mean().item() - entropy) / T, nll.std().item() / T / 4000 ** 0.5
    assert -4 * se < gap < 0.05
    x, _ = draw(script, model, cfg, 4000, generator(4))  # samples break the rule as often
    assert (x[:, 2:] != x[:, :-2]).float().mean().item() == pytest.approx(0.1, abs=0.08)


@ALL
def test_the_same_seeds_train_to_the_same_bits(script):
    def train(seed):
        cfg = config(script)
        torch.manual_seed(seed)
        model, g = script.Model(cfg), generator(seed)
        batch = lambda: torch.randint(11, (16, 8), generator=g)  # noqa: E731
        return torch.cat([p.detach().flatten() for p in fit(script, model, cfg, batch, 4, g)
                         .parameters()])

    assert torch.equal(train(1), train(1)) and not torch.equal(train(1), train(2))


# ---- the optimizer


@pytest.mark.parametrize("dtype, low, high", [(torch.float32, 0.66, 1.33),
                                              (torch.bfloat16, 0.6, 1.4)])
def test_newton_schulz_makes_singular_values_about_one_and_keeps_their_vectors(dtype, low, high):
    g = generator(0)
    u, v = (torch.linalg.qr(torch.randn(3, n, 12, generator=g)).Q for n in (12, 30))
    s = torch.logspace(0, math.log10(0.004), 12)  # the norm is 1.3
    got = fast.orthogonalize((u * s @ v.mT).to(dtype))
    assert got.dtype == dtype
    inside = u.mT @ got.float() @ v
    values = inside.diagonal(dim1=1, dim2=2)
    assert low < values.min() and values.max() < high
    assert (inside - torch.diag_embed(values)).abs().max() < (1e-3 if dtype == torch.float32 else 1)
    assert fast.orthogonalize(torch.zeros(1, 3, 4)).abs().max() == 0


def test_the_faster_norm_is_rms_norm():
    """Values and gradients; a copy of a model that was sped up has gains of its own."""
    x = torch.randn(2, 3, 6, generator=generator(0)).double()
    norm = nn.RMSNorm(6, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    model = nn.Sequential(copy.deepcopy(norm))
    fast.speed_up(model, SimpleNamespace(compile="no", steps=1), torch.device("cpu"))
    copied = copy.deepcopy(model)
    assert torch.allclose(model(x), norm(x), atol=1e-14)
    assert torch.autograd.gradcheck(lambda x, w: fast.NormFunction.apply(x, w, 1e-8),
                                    (x.requires_grad_(), norm.weight))
    nn.init.zeros_(copied[0].weight)
    assert copied(x).abs().max() == 0 and torch.allclose(model(x), norm(x), atol=1e-14)


def test_muon_is_the_muon_of_torch():
    """Three steps of both on matrices of several shapes: the same size and direction of update."""
    g, moved = generator(1), []
    start = [torch.randn(shape, generator=g) for shape in ((16, 64), (64, 16), (16, 16), (16, 64))]
    grads = [[torch.randn(p.shape, generator=g) for p in start] for _ in range(3)]
    for make in (lambda ps: fast.Muon(ps, 0.02, weight_decay=0.05), lambda ps: torch.optim.Muon(
            ps, 0.02, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")):
        params = [nn.Parameter(p.clone()) for p in start] + [nn.Parameter(torch.ones(2, 2))]
        optimizer = make(params)
        for step in grads:
            for p, grad in zip(params, step):  # the last has none
                p.grad = grad
            optimizer.step()
        assert torch.equal(params[-1], torch.ones(2, 2))
        moved.append([(p - q).detach().flatten() for p, q in zip(params, start)])
    for ours, theirs in zip(*moved):
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.97
        assert ours.norm() / theirs.norm() == pytest.approx(1, abs=0.2)


# ---- the length first


def with_eos(model, p_eos):
    """A network that predicts EOS, token 0 of 13, with probability p_eos (T,) wherever it looks."""
    def forward(*args):
        logits = torch.zeros(*args[0].shape[:2], 13)
        logits[..., 0] = (p_eos / (1 - p_eos)).log() + math.log(12)
        return logits[args[-1]] if args[-1].dtype == torch.bool else logits
    model.forward = forward
    return model


LENGTH_FIRST = pytest.mark.parametrize("script", SCRIPTS[1:-1], ids=lambda s: s.__name__)


@LENGTH_FIRST
def test_a_length_is_drawn_from_what_is_predicted(script):
    """P(length <= i) is the largest P(EOS) up to i among the positions wanted up to the end."""
    p_eos, cfg = torch.tensor([0.1, 0.3, 0.2, 0.6, 0.5, 0.9]), Settings()
    model = with_eos(network(script, cfg), p_eos)
    for given, want in ((), (0.1, 0.2, 0, 0.3, 0, 0.3, 0.1)), ((2,), (0, 0, 0, 0.6, 0, 0.3, 0.1)), (
            (1, 5), (0, 0, 0, 0, 0, 0, 1)):
        x = torch.full((20000, 6), 13)
        x[:, list(given)] = 7
        more = dict(is_wanted=x == 13) if script is mdlm else {}
        more |= dict(predict=sdd.predict) if script is sdd else {}
        out = script.draw_length(model, x, cfg=cfg, g=generator(0), **more)
        length = (out != cfg.eos).sum(1)
        assert torch.equal(out == cfg.eos, torch.arange(6) >= length[:, None])
        assert torch.equal(out.masked_fill(out == cfg.eos, 13), torch.where(
            out == cfg.eos, 13, x))
        share = torch.bincount(length, minlength=7) / 20000
        assert torch.allclose(share, torch.tensor(want).float(), atol=0.015)


@LENGTH_FIRST
@pytest.mark.parametrize("order", ["random", "maxprob"])
def test_documents_end_where_their_length_was_drawn_and_windows_nowhere(script, order):
    """A network that predicts EOS at i with probability i / T wherever it looks: no EOS comes
    before the length, all behind it; without the rule and in running text EOS are anywhere."""
    T = 12
    cfg = Settings(seq_len=T, order=order, num_steps=4, noise_window=0.3)
    place = torch.arange(T) / T
    model = with_eos(network(script, cfg), place)
    for first, rows, ordered in ((True, "docs", True), (False, "docs", False),
                                 (True, "stream", False)):
        cfg.length_first, cfg.rows = first, rows
        x, nfe = draw(script, model, cfg, 500, generator(0))
        is_eos = (x == cfg.eos).long()
        assert (is_eos.diff(dim=1) >= 0).all() == ordered
        assert nfe == 4 + ordered + (script is dit_embed)
        if ordered:
            share = (is_eos.sum(0) / 500).tolist()
            assert share == pytest.approx(place.tolist(), abs=0.08)


# ---- made to be copied


@dataclass
class Settings:
    """All that sections 3 to 5 read."""
    vocab_size: int = 13
    seq_len: int = 6
    n_layer: int = 1
    n_head: int = 2
    n_embd: int = 16
    num_steps: int = 0
    order: str = "random"
    remask: str = "none"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    rows: str = "stream"  # with eos and bos only in ar.py
    eos: int = 0
    bos: int = 0
    noise_window: float = 0.1  # the three scripts with own times
    emb_dim: int = 8  # dit_embed.py
    logsnr_above: float = 3.0
    logsnr_below: float = 8.0
    schedule: str = "quadratic"  # bit_diffusion.py
    k: int = 4  # sdd.py
    pipeline: str = "diffusion"  # diffugpt_varlen.py
    attn_annealing_steps: int = 1
    p_prompt: float = 0.2
    p_crop: float = 0.25
    length_mode: str = "presampled"
    sampler: str = "token"
    length_first: bool = True
    steps: int = 1600


@ALL
def test_sections_3_to_5_run_alone_with_nothing_but_torch(script):
    """Cut out by their banners and executed in an empty namespace, they train and sample."""
    lines = Path(script.__file__).read_text().splitlines()
    first, last = (next(i for i, line in enumerate(lines) if line.startswith(f"# ---- {title}"))
                   for title in ("3. model", "6. train"))
    code, alone = "\n".join(lines[first:last - 1]), types.ModuleType(script.__name__)
    assert "4. corrupt and loss" in code and "5. sample" in code and "import" not in code
    vars(alone).update(math=math, torch=torch, nn=nn, F=F)
    cfg = Settings()
    exec(compile(code, "sections 3-5", "exec"), vars(alone))
    torch.manual_seed(0)
    model, g = alone.Model(cfg), generator(0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    x0, log = torch.randint(13, (8, 6), generator=g), []
    for _ in range(40):
        loss, = losses(alone, model, x0, cfg, g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append(loss.item())
    if script in (dit_embed, bit_diffusion, sdd):  # the self-likelihood counts from the start
        assert 0 < log[0] < math.log(13)
    else:  # a tied head starts near zero, the others at zero
        near = 0.1 if script is diffugpt_varlen else 1e-5
        assert log[0] == pytest.approx(math.log(13), abs=near)
    assert sum(log[-5:]) / 5 < log[0] - 0.2
    assert nats(alone, model, x0, cfg, g).shape == (8,)
    x, nfe = draw(alone, model, cfg, 5, g)
    assert x.shape == (5, 6) and x.max() < 13 and nfe == 6 + (script is dit_embed)
