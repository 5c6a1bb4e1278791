"""sdd.py and lab/sdd_variants.py: candidates, precision, times, bounds, losses, original process,
network, against Bayes' rule, enumeration and quadrature. Expected figures are made in
sdd_tables.py or here."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import common
import sdd
from lab import sdd_variants as lab
from oracles import all_rows, dirichlet, generator, mean_and_se, row_by_row
from sdd_tables import Oracle, chain_bound, path, path_bound, settings

CLEAN = sdd.CLEAN
TWO = torch.tensor([0.5, 0.12, 0.06, 0.32]).double()  # V = 2, T = 2


def config(V=4, T=2, **changes):
    return lab.Config(**settings(V, T, **changes))


def network(seed=0, shake=0.0, **changes):
    """The lab's model, which is the script's by default; shaken: weights far from initial zeros."""
    torch.manual_seed(seed)
    model, g = lab.Model(config(**changes)), generator(1)
    for p in model.parameters():
        p.data += shake * torch.randn(p.shape, generator=g)
    return model


def loss_of(model, x0, cfg, g):
    return lab.loss_fn(model, x0, *lab.corrupt(x0, cfg, g))


def noisy(x0, prec, V):
    """z (n, V) of the tokens x0 (n,) at precisions prec (n,)."""
    return sdd.q_sample(x0, prec, torch.randn(len(x0), V, generator=generator(2)))


# ---- z and candidates


@pytest.mark.parametrize("V", [2, 40])
def test_the_softmax_of_z_is_bayes_rule(V):
    """(E1) (E2) (E5) against Gaussian densities of all tokens in float64, at every precision; with
    all tokens as candidates the state says the same, and softmax(net + own) has any prior."""
    g = generator(V)
    for level in (1e-4, 0.5, 3.0, 20.0, 150.0):
        x, prec = torch.randint(V, (60,), generator=g), torch.full((60,), level).double()
        z = sdd.q_sample(x, prec, torch.randn(60, V, generator=g).double())
        log = -(z[:, None] - level * torch.eye(V).double()).square().sum(2) / (2 * level)
        ids, logp = sdd.top_k_state(z, V)
        assert torch.allclose(logp[:, :-1].double(), log.log_softmax(1).gather(1, ids), atol=1e-4)
        assert (logp[:, -1] == -torch.inf).all()  # nothing is left
        net = 3 * torch.randn(60, V, generator=g)
        for how in ("exact", "state") if level < 50 else ("exact",):  # the state's odds end at e^80
            own = lab.self_likelihood(ids, logp, z.float(), how)
            want = (net.double() + log).softmax(1)
            assert torch.allclose((net + own).double().softmax(1), want, atol=1e-5)


@pytest.mark.parametrize("V, k", [(6, 1), (6, 4), (6, 6), (6, 9), (300, 8)])
def test_a_state_holds_the_top_of_the_posterior_and_the_other_mass(V, k):
    """(E3) ids and log p as a float64 sort has them, falling; the other mass to 1e-4 even where it
    is e^-190 and 1 - sum p knows nothing of it; all sum to 1; K = min(k, V)."""
    prec, K = torch.tensor([0.01, 1.0, 8.0, 30.0, 199.0]).repeat(40), min(k, V)
    z = noisy(torch.randint(V, (200,), generator=generator(k)), prec, V)
    ids, logp = sdd.top_k_state(z, k)
    assert ids.shape == (200, K) and logp.shape == (200, K + 1)
    value, order = z.double().log_softmax(1).sort(1, descending=True)
    assert torch.equal(ids, order[:, :K])
    assert torch.allclose(logp[:, :K].double(), value[:, :K], atol=1e-4)
    assert torch.allclose(logp.double().logsumexp(1), torch.zeros(200).double(), atol=1e-5)
    rest = value[:, K:].logsumexp(1)
    if K == V:
        assert (logp[:, -1] == -torch.inf).all()
    else:
        assert torch.allclose(logp[:, -1].double(), rest, atol=1e-4) and rest.min() < -100
        assert logp.isfinite().all()
    for a, b in zip(lab.top_k_state(z, k), (ids, logp)):
        assert torch.equal(a, b)  # without ties


def test_the_input_tells_clean_unknown_and_noisy_positions_apart():
    """(E3) clean: log p 0 at its token; unknown: all others have it; in between: the state of its
    own z, in the order of positions."""
    V, k, g, nothing = 9, 3, generator(1), -torch.inf
    prec = torch.tensor([[0.0, 1e-3, CLEAN, 5.0], [CLEAN, 199.99, 0.0, CLEAN]])
    x, z = torch.randint(V, prec.shape, generator=g), torch.randn(3, V, generator=g)
    ids, logp = sdd.input_state(x.masked_fill(prec == 0, V), prec, z, k)
    assert ids.shape == (2, 4, 3) and logp.shape == (2, 4, 4) and 0 <= ids.min() and ids.max() < V
    clean, unknown = prec == CLEAN, prec == 0
    assert torch.equal(ids[clean][:, 0], x[clean])
    assert logp[clean].tolist() == 3 * [[0, nothing, nothing, nothing]]
    assert logp[unknown].tolist() == 2 * [[nothing, nothing, nothing, 0]]
    for got, want in zip((ids, logp), sdd.top_k_state(z, k)):
        assert torch.equal(got[sdd.between(prec)], want)


# ---- self-likelihood and candidates that suit the context


@pytest.mark.parametrize("V, k", [(7, 3), (7, 1), (40, 8)])
def test_what_candidates_do_not_tell_is_spread_evenly(V, k):
    """(E5) add_likelihood state: softmax(own) has the candidates' own p, and every other token the
    same share of the other mass; exact: z whatever k is; none: nothing."""
    x, prec = torch.randint(V, (50,), generator=generator(3)), torch.linspace(0.01, 40, 50)
    z = noisy(x, prec, V)
    ids, logp = sdd.top_k_state(z, k)
    own = lab.self_likelihood(ids, logp, z, "state")
    p, top = z.double().softmax(1), torch.zeros(50, V).bool().scatter(1, ids, True)
    rest = p.masked_fill(top, 0).sum(1, keepdim=True) / (V - k)
    assert (own[~top] == 0).all()
    assert torch.allclose(own.double().log_softmax(1), torch.where(top, p, rest).log(), atol=1e-3)
    assert torch.equal(lab.self_likelihood(ids, logp, z, "exact"), z)
    assert (lab.self_likelihood(ids, logp, z, "none") == 0).all()
    sure = torch.zeros(1, V).index_fill_(1, torch.tensor([2]), 150.0)  # e^-150 counts as e^-80
    own = lab.self_likelihood(*sdd.top_k_state(sure, k), sure, "state").double().log_softmax(1)[0]
    assert own[2] == 0 and own[torch.arange(V) != 2].max() < -75


@pytest.mark.parametrize("how", ["exact", "state", "none"])
def test_the_self_likelihood_is_added_where_it_was_observed(how):
    """(E5) net + own of each target, in order; an unknown position adds exactly nothing;
    `is_hidden` takes positions from the network's view, not from the sum."""
    V, k, g = 5, 3, generator(1)
    cfg = config(V, 4, k=k, add_likelihood=how)
    model = Oracle(dirichlet(V, 4, 1, 1.0), V, 4, 0.5, k)
    prec = torch.tensor([[0.0, 2.0, CLEAN, 5.0], [7.0, CLEAN, 0.0, 0.0], [3.0, 1.0, 0.5, 9.0]])
    x, is_noisy = torch.randint(V, prec.shape, generator=g), sdd.between(prec)
    z = lab.draw_z(x, prec, V, g)
    target = torch.tensor([[1, 0, 0, 1], [1, 0, 1, 1], [0, 1, 0, 1]]).bool()
    logits, own = lab.predict(model, x, prec, z, target, cfg)
    ids, logp, asked = model.calls[0]
    assert torch.equal(asked, target) and torch.equal(logits, model(ids, logp, target) + own)
    assert all(torch.equal(a, b) for a, b in zip((ids, logp), sdd.input_state(x, prec, z, k)))
    full = torch.zeros(3, 4, V)
    full[is_noisy] = lab.self_likelihood(ids[is_noisy], logp[is_noisy], z, how)
    assert torch.equal(own, full[target]) and (own[[0, 3, 4]] == 0).all()
    hide = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]).bool()
    bare, same = lab.predict(model, x, prec, z, target, cfg, hide)
    shown = model.calls[-1][1]
    assert torch.equal(same, own) and torch.equal(shown[~hide], logp[~hide])
    assert (shown[hide][:, -1] == 0).all() and (bare - logits).abs().max() > 1e-3


def test_posterior_candidates_are_the_top_of_what_the_network_said():
    """(E3) the k largest of softmax(net + z), net of a first evaluation that saw the candidates of
    z alone, or of an earlier one; all else stays; nobody learns through the first evaluation."""
    V, k, T, g = 11, 3, 5, generator(1)
    some = dict(V=V, T=T, k=k, candidates="posterior")
    cfg, model, seen = config(**some), network(shake=0.3, **some), []
    model.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    prec = torch.tensor([[0.0, 2.0, CLEAN, 5.0, 1.0], [7.0, CLEAN, 0.0, 3.0, 0.0]])
    x, is_noisy = torch.randint(V, prec.shape, generator=g), sdd.between(prec)
    z, prev = lab.draw_z(x, prec, V, g), 3 * torch.randn(5, V, generator=g)
    target, plain = prec < 4, sdd.input_state(x, prec, z, k)
    logits, own = lab.predict(model, x, prec, z, target, cfg)
    lab.predict(model, x, prec, z, target, cfg, None, prev)
    ((_, _, asked), first), ((*now, wanted), net), ((*later, _), _) = seen
    assert torch.equal(asked, is_noisy) and torch.equal(wanted, target)
    assert not first.requires_grad and torch.equal(logits, net + own)
    for shown, said in ((now, first), (later, prev)):
        assert not torch.equal(shown[0], plain[0])  # the context has a say
        for got, want, other in zip(shown, sdd.top_k_state(said + z, k), plain):
            assert torch.equal(got[is_noisy], want)
            assert torch.equal(got[~is_noisy], other[~is_noisy])


# ---- the bound


def test_the_bound_of_any_network_stays_above_the_entropy():
    """(E6) posterior candidates are made of z alone, no truth leaks: a random network on tokens
    that are independent and uniform pays more than T ln V, in few steps too."""
    some = dict(V=5, T=4, k=2, candidates="posterior", noise_window=0.5)
    cfg, x0 = config(**some), torch.randint(5, (1200, 4), generator=generator(5))
    model = network(shake=0.3, **some)
    for nats in (lab.nelbo(model, x0, cfg, generator(6)),
                 lab.nelbo_steps(model, x0, cfg, generator(6), 8)):
        assert nats.mean() > 4 * math.log(5) + 4 * nats.std() / len(nats) ** 0.5


@pytest.mark.parametrize("window, schedule", [(1.0, "rational"), (0.3, "exponential"),
                                              (0.6, "exponential")])
def test_the_estimate_of_the_bound_is_unbiased(window, schedule):
    """(E2) (E4) (E6) nelbo() of a network that errs, for every row against quadrature that knows
    nothing of the script, for any K; stratified times spread less than as many independent ones."""
    model, cfg = Oracle(TWO, 2, 2, 0.7), config(2, noise_window=window, schedule=schedule)
    truth, times, spread = path_bound(model, window, schedule), 640, {}
    x0 = all_rows(2, 2).repeat_interleave(times, 0)
    assert (truth + TWO.log()).abs().max() > 0.02
    for K in (1, 16):
        nats = lab.nelbo(model, x0, cfg, generator(K), K)
        assert row_by_row(nats, truth, times, 2e-3)
        spread[K] = nats.view(4, times).std(1).mean()
    assert spread[16] < 0.9 * spread[1] / 4


@pytest.mark.parametrize("sampler", ["token", "ancestral"])
def test_the_bound_of_few_steps_is_unbiased(sampler, monkeypatch):
    """(E4) (E7) nelbo_steps of a network that errs, for every row against quadrature; one time for
    all and times of their own; one step is the cross-entropy of each position alone."""
    model, times = Oracle(TWO, 2, 2, 0.6), 2500
    x0 = all_rows(2, 2).repeat_interleave(times, 0)
    for steps, window, schedule, tau in ((1, 1.0, "rational", [0.0, 0.0]),
                                         (4, 1.0, "exponential", [0.0, 0.0]),
                                         (5, 0.4, "rational", [0.2, 0.5]),
                                         (7, 0.7, "exponential", [0.25, 0.1])):
        monkeypatch.setattr(sdd, "position_times",
                            lambda shape, *_: torch.tensor(tau).expand(shape).clone())
        truth = chain_bound(model, path(steps, 2, tau, window, schedule), sampler)
        cfg = config(2, noise_window=window, schedule=schedule)
        nats = lab.nelbo_steps(model, x0, cfg, generator(steps), steps, sampler)
        assert row_by_row(nats, truth, times, 1e-3)
        if steps == 1:
            alone = model.answer(torch.full((1, 2, 2), -math.log(2)).double()).log_softmax(2)[0]
            want = -alone[[0, 1], all_rows(2, 2)].sum(1)
            assert torch.allclose(nats.view(4, times), want[:, None], atol=1e-5)


# ---- training


@pytest.mark.parametrize("window, schedule", [(1.0, "rational"), (0.6, "exponential")])
def test_the_nelbo_loss_is_the_bound_per_token(window, schedule):
    """(E6) its mean over seeds is the quadrature, divided by T."""
    model, x0 = Oracle(TWO, 2, 2, 0.7), all_rows(2, 2).repeat(40, 1)
    model.cfg = config(2, loss="nelbo", noise_window=window, schedule=schedule)
    truth = path_bound(model, window, schedule).mean().item() / 2
    mean, se = mean_and_se(lambda g: loss_of(model, x0, model.cfg, g), 100)
    assert abs(mean - truth) < 4.5 * se + 1e-3 and se < 0.03 * truth


def test_k_follows_the_curriculum():
    """Every k in turn, equally long, to the last step, whatever the micro-batches; the count of
    steps is part of a checkpoint; evaluation has --k."""
    cfg = config(V=9, T=4, k=5, curriculum="1,2,4,8", steps=100, grad_accum=2)
    assert [lab.curriculum_k(cfg, step) for step in range(101)] == \
        25 * [1] + 25 * [2] + 25 * [4] + 26 * [8]
    short = config(curriculum="3,1", steps=5)
    assert [lab.curriculum_k(short, step) for step in range(5)] == [3, 3, 3, 1, 1]
    torch.manual_seed(0)
    model, seen, x0 = lab.Model(cfg), [], torch.zeros(4, 4).long()
    model.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[2]))
    lab.nelbo(model, x0, cfg, generator(1), 1)
    for calls in (0, 1, 2, 99, 100, 199):
        model.calls.fill_(calls)
        loss_of(model, x0, cfg, generator(1))
    assert seen == [5, 1, 1, 1, 2, 4, 8] and model.state_dict()["calls"] == 200


# ---- the original process


@pytest.mark.parametrize("swap", [0.95, 0.0])
def test_the_original_state_holds_the_answer(swap):
    """The truth first with 1 - 0.01 (k - 1), k - 1 random tokens of 0.01, all flattened towards
    1 / V; a candidate is swapped with probability swap t; noise of embeddings has t / 10."""
    V, k, T, n = 7, 5, 40, 150
    cfg = config(V, T, k=k, process="original", swap=swap)
    x0 = torch.randint(V, (n, T), generator=generator(1))
    for t in (0.0, 0.4, 1.0):
        ids, logp, noise = lab.original_state(x0, torch.full((n, 1), t), cfg, generator(2))
        p = torch.tensor([1 - 0.01 * (k - 1)] + (k - 1) * [0.01]) * (1 - t) + t / V
        p = torch.cat((p, (1 - p.sum(0, True)).clamp(min=1e-9)))
        assert torch.allclose(logp.exp(), p.expand(n, T, k + 1), atol=1e-6)
        hit, copied = (ids == x0[..., None]).double().mean((0, 1)), 1 - swap * t * (1 - 1 / V)
        assert abs(hit[0] - copied) <= 4.5 * (copied * (1 - copied) / x0.numel()) ** 0.5
        assert ((hit[1:] - 1 / V).abs() < 4.5 * (1 / V / x0.numel()) ** 0.5).all()
        assert noise.shape == (n, T, k, cfg.n_embd) and (t > 0 or (noise == 0).all())
        assert t == 0 or abs(noise.std() / (0.1 * t) - 1) < 4.5 / (2 * noise.numel()) ** 0.5


@pytest.mark.parametrize("swap, k", [(0.95, 8), (0.0, 8)])
def test_a_copy_of_the_first_candidate_scores_as_theory_says(swap, k, monkeypatch):
    """copy_baseline: 1 - swap E[t] (1 - 1 / V) within 1 %; among the candidates 1 - swap E[t]
    (1 - 1 / V)^k; by time, falling; a fresh network knows nothing; there is no likelihood."""
    wide = dict(V=50, T=64, k=k, process="original", swap=swap)
    x0, model = torch.randint(50, (150, 64), generator=generator(1)), network(**wide)
    monkeypatch.setattr(sdd, "get_eval_rows", lambda split, cfg, n: (x0[:n], None))
    got = lab.copy_baseline(model, SimpleNamespace(val=None), config(**wide), "val", 150)
    copied, among = 1 - swap / 2 * (1 - 1 / 50), 1 - swap / 2 * (1 - 1 / 50) ** k
    assert got["copy"] == pytest.approx(copied, rel=0.01)
    assert got["among"] == pytest.approx(among, rel=0.01)
    assert got["accuracy"] == pytest.approx(1 / 50, abs=0.01) and got["bound"] == "none"
    for i, value in enumerate(got["copy_at"]):
        assert value == pytest.approx(1 - swap * (i + 0.5) / 8 * (1 - 1 / 50), abs=0.02)
    with pytest.raises(common.UserError, match="no likelihood"):
        lab.nelbo(model, x0, config(**wide), generator(1))


def test_the_loss_of_the_original_process_is_cross_entropy_everywhere():
    """Of all positions, at evenly spread times, with noise of t / 10 of the embeddings' spread."""
    wide, seen = dict(V=7, T=5, k=3, process="original"), []
    model, cfg = network(shake=0.3, **wide), config(**wide)
    model.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    x0 = torch.randint(7, (100, 5), generator=generator(1))
    loss = loss_of(model, x0, cfg, generator(2))
    ((ids, logp, target, noise), out), = seen
    assert target is None and loss.item() == pytest.approx(
        F.cross_entropy(out.flatten(0, 1), x0.flatten()).item())
    t = (logp[:, 0, 1].exp() - 0.01) / (1 / 7 - 0.01) * 100
    assert (t - torch.arange(100) - 0.5).abs().max() < 0.52
    spread = noise.flatten(1).std(1) / (0.001 * t)
    assert torch.allclose(spread[10:], model.wte.weight.std(), rtol=0.25)
    assert not noise.requires_grad


# ---- the network


def some_states(V=11, T=6, k=4, B=3, seed=9):
    """States of every kind, ids (B, T, K), logp (B, T, K + 1)."""
    g = generator(seed)
    prec = torch.tensor([0.0, 4.0, CLEAN, 2.0, 7.0, 1.0])[:T].expand(B, T)
    prec = torch.stack([row[torch.randperm(T, generator=g)] for row in prec])
    x = torch.randint(V, (B, T), generator=g)
    return sdd.input_state(x, prec, lab.draw_z(x, prec, V, g), k)


ATTENTION = pytest.mark.parametrize("attention", ["pooled", "full"])
SHAPES = dict(V=11, T=6, k=4, n_layer=2)


def reference(model, ids, logp, noise=None):
    """The logits of one row, ids (T, K), logp (T, K + 1), slot after slot, by hand: a clean or
    unknown position is one slot, a noisy one its mean (pooled) or all its candidates and the other
    mass (full), which attend with log p and are put together by softmax(score + log p)."""
    T, C, full = len(ids), model.wpe.embedding_dim, hasattr(model, "slot_score")
    slots, mean, H = [], torch.zeros(T, C), model.blocks[0].attn.n_head
    for i in range(T):
        p = logp[i].exp()
        if logp[i, 0] == 0:
            mean[i] = model.wte.weight[ids[i, 0]]
        elif logp[i, -1] < 0:
            emb = model.wte.weight[ids[i]] + (0 if noise is None else noise[i])
            emb = torch.cat((emb, torch.zeros(1, C)))
            hidden = F.gelu(logp[i].clamp(min=-20)[:, None] / 10 @ model.logp_in.weight.T
                            + model.logp_in.bias)
            emb = emb + hidden @ model.logp_head.weight.T
            mean[i] = p @ emb
            slots += [(i, j, emb[j]) for j in range(len(emb))] if full else []
    for i in range(T):
        if all(i != own for own, _, _ in slots):
            slots.append((i, -1, mean[i]))
    own = torch.tensor([i for i, _, _ in slots])
    bias = torch.stack([logp[i, j] if j >= 0 else torch.tensor(0.0) for i, j, _ in slots])
    x, D = torch.stack([v for _, _, v in slots]) + model.wpe.weight[:T][own], C // H
    last = [max(s for s, slot in enumerate(slots) if slot[0] == i) for i in range(T)]
    angle = own[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
    turn = torch.polar(torch.ones_like(angle), angle)
    for block in model.blocks:
        seen, near = F.pad(x[last], (0, 0, 3, 3)), torch.zeros(T, C)
        for shift in range(7):
            near += seen[shift:shift + T] * block.conv.weight[:, 0, 0, shift]
        x = x + near[own]
        q, k, v = block.attn.qkv(block.norm1(x)).view(-1, 3, H, D).unbind(1)
        q, k = (y - y.mean(2, keepdim=True) for y in (q, k))
        q, k = (y / (y.square().mean(2, keepdim=True) + 1e-5).sqrt() for y in (q, k))
        q, k = (torch.complex(y[..., ::2], y[..., 1::2]) * turn[:, None] for y in (q, k))
        score = torch.einsum("qhd,khd->hqk", q, k.conj()).real / D ** 0.5 + bias
        y = torch.einsum("hqk,khd->qhd", score.softmax(2), v).flatten(1)
        x = x + y @ block.attn.proj.weight.T
        x = x + block.mlp(block.norm2(x))
    out = torch.zeros(T, C)
    for i in range(T):
        h = x[own == i]
        weight = (h @ model.slot_score.weight[0] + bias[own == i]).softmax(0) if len(h) > 1 else \
            torch.ones(1)
        out[i] = weight @ h
    return 10 * ((model.norm(out) @ model.head.weight.T + model.head.bias) / 10).tanh()


@ATTENTION
def test_the_network_is_what_its_description_says(attention):
    """(E5) against a version that goes through the slots of one row after the other, with and
    without noise of embeddings; `is_target` selects; no logit exceeds the cap."""
    model = network(shake=0.3, attention=attention, **SHAPES)
    ids, logp = some_states()
    noise = 0.5 * torch.randn(*ids.shape, 16, generator=generator(2))
    with torch.no_grad():
        for args in ((), (None, noise)):
            got = model(ids, logp, *args)
            want = torch.stack([reference(model, *row) for row in zip(ids, logp, *args[1:])])
            assert got.shape == (3, 6, 11) and got.dtype == torch.float32 and got.std() > 0.3
            assert torch.allclose(got, want, atol=2e-4)
        target = torch.rand(3, 6, generator=generator(1)) < 0.4
        assert torch.allclose(model(ids, logp, target), model(ids, logp)[target], atol=1e-5)
        assert model(ids, logp, torch.zeros(3, 6).bool()).shape == (0, 11)
        model.head.weight.data *= 100
        assert 9.9 < model(ids, logp).abs().max() <= 10


@ATTENTION
def test_all_precisions_are_finite_forward_and_backward(attention):
    """0, tiny, ordinary, just below CLEAN, CLEAN, in float32 and under bfloat16 autocast; every
    gradient; logits stay float32 and the self-likelihood exact, where bfloat16 would lose whole
    nats."""
    prec = torch.tensor([[0.0, 1e-6, 2.0, 40.0, CLEAN - 1e-3, CLEAN]]).expand(3, 6)
    x0, target = torch.arange(18).view(3, 6) % 11, prec < CLEAN
    z = lab.draw_z(x0, prec, 11, generator(1))
    for cast, how in itertools.product((False, True), ("exact", "state", "none")):
        some = dict(SHAPES, add_likelihood=how, attention=attention)
        model, cfg = network(shake=0.3, **some), config(**some)
        plain = lab.predict(model, x0, prec, z, target, cfg)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out, own = lab.predict(model, x0, prec, z, target, cfg)
            assert out.dtype == own.dtype == torch.float32 and out.isfinite().all()
            assert torch.equal(own, plain[1])
            assert own.max() > 100 - 30 * (how == "state") or how == "none"
            loss = F.cross_entropy(out, x0[target])
            assert lab.nelbo_steps(model, x0, cfg, generator(1), 4).isfinite().all()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
