"""What dit_embed.py, bit_diffusion.py, sdd.py and their variants in lab/ have in common: times,
windows, bounds of fresh networks and of what is not given, the view of the network, and what any
sampler must do with exact posteriors. Their formulas are tested in files of their own."""
import copy
import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import bit_diffusion
import bit_tables
import dit_embed
import gauss_tables
import mdlm
import sdd
import sdd_tables
from lab import bit_variants, dit_variants, mdlm_variants, sdd_variants
from oracles import (all_rows, chi_square, close, conditional, dirichlet, generator,
                     independent_rows, row_by_row, row_counts)

HIGH, LOW = 5.0, -6.0  # of dit_embed's levels here
THREE = dirichlet(3, 3, seed=2)  # of rows of three tokens, V = 3
LOST = {"linear": lambda t: t, "quadratic": lambda t: t * t,
        "cosine": lambda t: (math.pi / 2 * t).sin() ** 2}  # 1 - agreement of bits
DIT = SimpleNamespace(
    script=dit_embed, lab=dit_variants, clean=HIGH, nothing=LOW,
    oracle=lambda joint, T, tilt=0.0: gauss_tables.Oracle(joint, gauss_tables.CIRCLE, T, tilt),
    config=lambda V, T, **changes: gauss_tables.config(
        dit_variants.Config, HIGH, LOW, V, T, **dict(d=2, emb_norm=1.0) | changes),
    level=lambda own, schedule: HIGH + (LOW - HIGH) * own,
    calls=lambda model: [(lam, target) for _, lam, target, _ in model.calls])
BIT = SimpleNamespace(
    script=bit_diffusion, lab=bit_variants, clean=bit_diffusion.CLEAN, nothing=0.0,
    oracle=lambda joint, T, tilt=0.0: bit_tables.Oracle(joint, 3, T, tilt=tilt),
    config=lambda V, T, **changes: bit_variants.Config(**bit_tables.settings(V, T, **changes)),
    level=lambda own, schedule: (2 / LOST[schedule](own) - 1).log(),
    calls=lambda model: [(lam, target) for _, lam, target in model.calls])
SDD = SimpleNamespace(
    script=sdd, lab=sdd_variants, clean=2, nothing=0,
    oracle=lambda joint, T, tilt=0.0: sdd_tables.Oracle(joint, 3, T, tilt),
    config=lambda V, T, **changes: sdd_variants.Config(**sdd_tables.settings(V, T, **changes)),
    level=lambda own, schedule: 2 * math.log(300) * (
        -own.log() if schedule == "exponential" else 1 / own - 1),
    calls=lambda model: [(1 + (logp[..., 0] == 0).int() - (logp[..., -1] == 0).int(), target)
                         for _, logp, target in model.calls])  # 0 nothing known, 1 noisy, 2 clean
MDLM = SimpleNamespace(
    script=mdlm, config=lambda V, T, **changes: mdlm_variants.Config(**dict(
        vocab_size=V, seq_len=T, n_head=2, n_embd=16) | changes),
    lab=SimpleNamespace(Model=mdlm_variants.Model, corrupt=mdlm_variants.corrupt,
                        loss_fn=mdlm.loss_fn, nelbo=mdlm.nelbo))  # where it is like the others
METHODS = {"dit_embed": DIT, "bit_diffusion": BIT, "sdd": SDD}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def network(method, V=11, T=6, seed=0, shake=0.3, **changes):
    """A model of the lab, and its Config; shaken: weights far from their initial zeros."""
    torch.manual_seed(seed)
    cfg, g = method.config(V, T, **changes), generator(1)
    model = method.lab.Model(cfg)
    model.cfg = cfg
    for p in model.parameters():
        p.data += shake * torch.randn(p.shape, generator=g)
    return model, cfg


def loss_of(method, model, x0, g):
    return method.lab.loss_fn(model, x0, *method.lab.corrupt(x0, model.cfg, g))


def draw(method, model, cfg, x, seed=1, sample=None):
    """Samples, NFE and frames from the canvas x (n, T), or so many empty rows."""
    x = torch.full((x, cfg.seq_len), cfg.vocab_size) if isinstance(x, int) else x
    before, frames = x.clone(), []
    out, nfe = (sample or method.script.sample)(
        model, x, cfg, generator(seed), on_step=lambda k, x: frames.append((k, x.clone())))
    assert torch.equal(x, before) and 0 <= out.min() and out.max() < cfg.vocab_size
    assert torch.equal(out[x < cfg.vocab_size], x[x < cfg.vocab_size])
    assert not frames or frames[-1][0] == nfe and torch.equal(frames[-1][1], out)
    return out, nfe, frames


# ---- times


@each_method
def test_times_are_evenly_spread_in_random_order(method):
    """Sorted, they are (1 - w) (rank + u) / N with one uniform u per row, N the positions that are
    not given, all orders equally likely; what is given has no time."""
    cfg = method.config(3, 5, noise_window=0.3)
    tau = method.script.position_times((8000, 5), cfg, generator(2))
    assert stats.kstest(tau.amin(1).numpy() / 0.7 * 5, "uniform").pvalue > 1e-3
    orders = (tau.argsort(1)[:, :4] * 5 ** torch.arange(4)).sum(1).unique(return_counts=True)[1]
    assert len(orders) == 120 and stats.chisquare(orders.numpy()).pvalue > 1e-3
    is_given = torch.rand(300, 5, generator=generator(4)) < 0.4
    is_given[0] = True
    some = method.script.position_times((300, 5), cfg, generator(5), is_given)
    assert (some[is_given] == torch.inf).all()
    for row, free in zip(torch.cat((some, tau[:99])), torch.cat((~is_given, tau[:99] >= 0))):
        N = int(free.sum())
        offset = row[free].sort().values / 0.7 * max(N, 1) - torch.arange(N)
        assert N == 0 or 0 <= offset.min() and offset.max() < 1 and offset.std(0, False) < 1e-5


@each_method
def test_times_are_reassigned_by_score_among_those_that_wait(method):
    """They keep their times as a set; the best one has the latest, and is denoised first."""
    g = generator(6)
    tau, waits = torch.rand(300, 8, generator=g), torch.rand(300, 8, generator=g) < 0.6
    tau[~waits & (torch.rand(300, 8, generator=g) < 0.3)] = torch.inf  # some are given
    score = torch.rand(300, 8, generator=g)
    new = method.script.reassign_times(tau, waits, score)
    assert torch.equal(new[~waits], tau[~waits])
    for row, old, mask, value in zip(new, tau, waits, score):
        by_score = row[mask][value[mask].argsort(descending=True)]
        assert torch.equal(by_score, old[mask].sort(descending=True).values)


@pytest.mark.parametrize("method, schedule, window", [
    (DIT, "logsnr", 0.05), (DIT, "logsnr", 1.0), (BIT, "quadratic", 0.05), (BIT, "cosine", 0.5),
    (BIT, "linear", 1.0), (SDD, "exponential", 0.05), (SDD, "exponential", 1.0),
    (SDD, "rational", 0.5)], ids=lambda k: getattr(getattr(k, "script", k), "__name__", str(k)))
def test_every_position_goes_from_noise_to_token_in_its_window(method, schedule, window):
    """Own time (t - tau) / w, clamped; the stated level of it, and its derivative in t, 0 at both
    ends; clean at t = 0, nothing known at t = 1; what is given is clean at all times."""
    cfg, shape = method.config(300, 24, noise_window=window, schedule=schedule), (50, 24)
    module = sdd_variants if schedule == "rational" else method.script
    is_given = torch.rand(shape, generator=generator(4)) < 0.2
    tau = method.script.position_times(shape, cfg, generator(1), is_given)
    clean = HIGH if method is DIT else method.script.CLEAN
    for t in torch.linspace(0, 1, 81):
        *_, level, slope = module.noise_levels(t.expand(50, 1), tau, cfg)
        own = ((t - tau) / window).double().clamp(0, 1)
        want = method.level(own.clamp(min=1e-30), schedule).clamp(max=clean)
        assert torch.allclose(level.double(), want, rtol=1e-4, atol=3e-4)
        moves = (own > 1e-6) & (own < 1 - 1e-5) & (want < clean - 1e-3)
        h = 1e-4 * torch.minimum(own, 1 - own).clamp(min=1e-9)
        rate = (method.level(own - h, schedule) - method.level(own + h, schedule)) / (2 * h)
        assert torch.allclose(slope[moves].double() * window, rate[moves], rtol=2e-3)
        assert (slope[(own == 0) | (own == 1)] == 0).all()
        assert (level[is_given] - clean).abs().max() < 1e-5
    assert (level[~is_given] - method.nothing).abs().max() < 2e-4
    assert (module.noise_levels(torch.zeros(50, 1), tau, cfg)[-2] - clean).abs().max() < 1e-5


# ---- lab and script, prefixes


@each_method
def test_by_default_the_lab_is_the_script(method):
    """Weights, loss, gradient, bound, samples and frames are the same numbers."""
    outcomes = []
    for module in (method.script, method.lab):
        cfg, values = method.config(11, 6, noise_window=0.3, n_layer=2), []
        torch.manual_seed(0)
        model = module.Model(cfg)
        for p in model.parameters():
            p.data += 0.3 * torch.randn(p.shape)
        x0 = torch.randint(11, (9, 6), generator=generator(1))
        loss = module.loss_fn(model, x0, *module.corrupt(x0, cfg, generator(2)))
        loss.backward()
        values = [loss.detach(), model.head.weight.grad,
                  module.nelbo(model, x0, cfg, generator(3), 8, x0 < 3).float()]
        for order, steps, rows in (("random", 0, "stream"), ("l2r", 9, "docs"),
                                   ("maxprob", 30, "docs")):
            some = dataclasses.replace(cfg, order=order, num_steps=steps, top_k=5, temperature=0.7,
                                       rows=rows)
            x, nfe, frames = draw(method, model, some, x0.masked_fill(x0 > 5, 11), 4,
                                  module.sample)
            values += [x, torch.tensor(nfe), *(frame for _, frame in frames)]
        outcomes.append(values)
    assert len(outcomes[0]) == len(outcomes[1]) > 20
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*outcomes))


@each_method
def test_a_prefix_is_as_long_and_as_frequent_as_stated(method):
    """floor(T u) first positions, clean and without a cost, in a share `prefix` of the rows; never
    the whole row."""
    cfg = method.config(3, 5, prefix=0.6)
    noise = method.lab.corrupt(torch.zeros(4000, 5).long(), cfg, generator(2))
    level, clean = noise[1 if method is BIT else 0], HIGH if method is DIT else method.script.CLEAN
    is_given = level >= clean - 1e-5
    assert torch.equal(noise[2].view(4000, 5, -1)[..., 0] == 0, is_given)
    size = is_given.sum(1)
    assert torch.equal(is_given, torch.arange(5) < size[:, None]) and size.max() < 5
    want = [4000 * p for p in (0.4 + 0.6 / 5, *4 * [0.6 / 5])]
    assert stats.chisquare(size.bincount(minlength=5).numpy(), want).pvalue > 1e-3


# ---- bounds


WIDE = dict(d=6, logsnr_above=4.0, logsnr_below=8.0)  # the range of the script
FRESH = [
    (DIT, dict(V=11, noise_window=0.1, **WIDE)),
    (DIT, dict(V=11, noise_window=0.2, **WIDE | dict(emb_norm=2.0, schedule="cosine"))),
    (DIT, dict(V=11, schedule="sqrt", gamma_shift=0.5, **WIDE)),
    (DIT, dict(V=30, noise_window=0.4, schedule="linear", emb_norm=0.0, **WIDE)),
    (DIT, dict(V=11, noise_window=0.3, emb_train=False, **WIDE)),
    (BIT, dict(V=2)), (BIT, dict(V=28, noise_window=0.05, input="raw", cond="add")),
    (BIT, dict(V=1000, noise_window=0.3, input="byte")), (BIT, dict(V=4, schedule="linear")),
    (BIT, dict(V=5, noise_window=0.3, schedule="cosine")),
    (SDD, dict(V=2)), (SDD, dict(V=4, noise_window=0.2, schedule="rational")),
    (SDD, dict(V=28, k=1)), (SDD, dict(V=28, k=5, noise_window=0.1, attention="full")),
    (SDD, dict(V=28, k=28, add_likelihood="state")), (SDD, dict(V=500, k=8, noise_window=0.3)),
    (SDD, dict(V=28, k=3, candidates="posterior"))]


@pytest.mark.parametrize("method, kind", FRESH, ids=lambda k: " ".join(
    map(str, k.values())) if isinstance(k, dict) else k.script.__name__)
def test_a_fresh_network_pays_ln_v_and_a_biased_one_its_cross_entropy(method, kind):
    """A zero head and the self-likelihood are the exact posterior of uniform tokens: T ln V nats,
    whatever the text; with log p as its bias that of independent tokens. Every constant, weight
    and sum of the bound is in this figure."""
    model, cfg = network(method, T=6, shake=0.0, **kind)
    V, g, prior = kind["V"], generator(1), 0.0
    x0 = torch.randint(V, (300, 6), generator=g)
    x0[:60] = 1
    if method is DIT:
        prior = dit_variants.nelbo_parts(model, x0[:9], cfg, g)["prior"].mean().item()
        assert 0 < prior < 0.02
    nats = method.lab.nelbo(model, x0, cfg, generator(2))
    assert nats.shape == (300,) and close(nats, 6 * math.log(V) + prior / 2)
    p = torch.rand(V, generator=g).square() + 0.02
    p = p / p.sum()
    cap = getattr(model, "CAP", 1e6)  # sdd: no logit exceeds it
    model.head.bias.data = (cap * (p.log().double() / cap).atanh()).float()
    x0 = torch.multinomial(p, 300 * 6, True, generator=g).view(300, 6)
    nats = method.lab.nelbo(model, x0, cfg, generator(5))
    assert close(nats + p.log()[x0].sum(1), prior / 2)


@each_method
@pytest.mark.parametrize("window", [0.1, 1.0])
def test_a_bound_given_some_tokens_is_that_of_the_others(method, window):
    """-log p(others | given) of an exact posterior, for every row; nothing given: -log p; what is
    given is shown clean and never asked for; all given costs nothing."""
    model, rows, times = method.oracle(THREE, 3), all_rows(3, 3), 200
    cfg, x0 = method.config(3, 3, noise_window=window), rows.repeat_interleave(times, 0)
    if method is DIT:
        cfg = gauss_tables.config(dit_variants.Config, 7, -6, 3, 3, 2, noise_window=window,
                                  emb_norm=1.0)
    for given in ([], [0], [1, 2]):
        is_given = torch.zeros(len(x0), 3, dtype=torch.bool)
        is_given[:, given] = True
        model.calls.clear()
        nats = method.script.nelbo(model, x0, cfg, generator(4), 4, is_given)
        truth = -conditional(THREE, 3, 3, given).log()
        assert row_by_row(nats, truth, times, 0.01 if method is DIT else 2e-3)
        for level, target in method.calls(model):
            assert target is None or not target[:, given].any()
            assert (level[:, given] >= method.clean - 1e-5).all()
    assert (method.script.nelbo(model, rows, cfg, generator(4), 4, torch.ones(27, 3).bool())
            == 0).all()


# ---- losses


@each_method
@pytest.mark.parametrize("window, steps", [(1.0, 1600), (1.0, 4000), (0.2, 1600)])
def test_the_loss_is_a_mean_of_means(method, window, steps, monkeypatch):
    """Cross-entropy of what is not clean, averaged in each row, then over rows; a row's time is
    (0.1 + 0.9 u)^0.75 for one u in every 200th, in long runs u; the noise has its distribution."""
    model, cfg = network(method, V=300, noise_window=window, steps=steps)
    seen, predict = [], sdd.predict  # (what is shown, logits)
    monkeypatch.setattr(sdd, "predict",
                        lambda *args: seen.append((args[3], predict(*args)[0])) or (seen[-1][1], 0))
    if method is not SDD:
        model.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    x0 = torch.randint(300, (200, 6), generator=generator(1))
    noise = method.script.corrupt(x0, cfg, generator(2))
    loss = method.script.loss_fn(model, x0, *noise)
    level = noise[1 if method is BIT else 0]
    is_noisy = level < (HIGH if method is DIT else method.script.CLEAN) - 1e-5
    (shown, logits), cost = seen[0], torch.zeros(200, 6)
    cost[is_noisy] = F.cross_entropy(logits.detach(), x0[is_noisy], reduction="none")
    rows = [row[noisy].mean() for row, noisy in zip(cost, is_noisy) if noisy.any()]
    assert loss.item() == pytest.approx((sum(rows) / 200).item(), rel=1e-4)
    if window == 1:
        u = (torch.arange(201) / 200).double()
        edges = (0.1 + 0.9 * u) ** 0.75 if steps < 4000 else u
        edges = method.level(edges, cfg.schedule)
        assert (level[:, 0] <= edges[:-1] + 1e-3).all() and (level[:, 0] >= edges[1:] - 1e-3).all()
    if method is BIT:
        p = 1 / (1 + level[is_noisy].double().exp())[:, None].expand(-1, 9)
        wrong = (shown * model.codes[x0] < 0)[is_noisy].double()
        assert abs((wrong - p).sum()) < 4.5 * (p * (1 - p)).sum().sqrt()
        return
    if method is DIT:
        alpha, sigma = (y[..., None] for y in gauss_tables.alpha_sigma(level))
        shown = (shown - alpha * model.embeddings()[x0]) / sigma
    else:
        way = sdd.between(level)
        shown = (shown - level[way][:, None] * F.one_hot(x0[way], 300)) / level[way][:, None].sqrt()
    draws = shown.detach().flatten()[:20_000].numpy()
    assert stats.kstest(draws, "norm").pvalue > 1e-3


# ---- the network


DIT_KINDS = [dict(cond=c, norm=n, pos=p, input=i) for c, n, p, i in (
    ("adaln", "post", "rotary", "both"), ("add", "pre", "learned", "raw"),
    ("none", "pre", "rotary", "likelihood"), ("none", "post", "both", "raw"))]
BIT_KINDS = [dict(input=i, cond=c, head="bit" if R else "token", num_mixture=max(R, 1))
             for R, i, c in ((0, "byte", "add"), (1, "token", "add"), (4, "bit", "none"),
                             (0, "raw", "none"))]
SDD_KINDS = [dict(k=4, attention="full"), dict(k=4, candidates="posterior"),
             dict(k=4, add_likelihood="state", attention="full")]
NETWORKS = [(DIT, kind) for kind in ({}, *DIT_KINDS)] + [(BIT, kind) for kind in (
    {}, *BIT_KINDS)] + [(SDD, kind) for kind in (dict(k=4), *SDD_KINDS)]
each_network = pytest.mark.parametrize("method, kind", NETWORKS, ids=lambda k: " ".join(
    map(str, k.values())) if isinstance(k, dict) else k.script.__name__)


def noisy_input(method, model, x0):
    """What the network sees of tokens x0 (B, T) at levels of all kinds."""
    g = generator(9)
    if method is DIT:
        return torch.randn(*x0.shape, 2, generator=g), torch.linspace(-5, 5, 18).view(3, 6)
    if method is BIT:
        return model.codes[x0], torch.linspace(0.3, 5, 18).view(3, 6)
    prec = torch.tensor([[3.0, 3, 3, 3, 0, sdd.CLEAN], [3.0, 0, sdd.CLEAN, 3, 3, 3],
                         [0.0, 0, sdd.CLEAN, 0, 0, sdd.CLEAN]])
    return sdd.input_state(x0, prec, sdd_variants.draw_z(x0, prec, 11, g), 4)


@each_network
def test_every_position_sees_every_other_of_its_row_and_no_other_row(method, kind):
    """Tokens and levels, on both sides; is_target selects positions of the output."""
    model, _ = network(method, n_layer=2, **kind)
    x0 = torch.randint(11, (3, 6), generator=generator(9))
    what, level = noisy_input(method, model, x0)
    out = model(what, level).flatten(2)
    for i, j, changed in itertools.product((0, 1), (0, 5), ("what", "level")):
        other = [what.clone(), level.clone()]
        part, row = other[changed == "level"], (i, j)
        if method is SDD and changed == "level":
            part[row] = torch.where(part[row] > -1e9, part[row] - 0.5, part[row])
        else:
            part[row] = -part[row] if changed == "what" and method is BIT else (
                (part[row] + 1) % 11 if method is SDD else part[row] + 0.7)
        change = (model(*other).flatten(2) - out).abs().amax(2)
        assert change[torch.arange(3) != i].max() < 1e-5
        if changed == "what" and (method is not SDD or level[i, j, -1] < 0) or (
                changed == "level" and method is not SDD and (
                    kind.get("cond") != "none" or kind["input"] not in ("raw",))):
            assert (change[i] > 1e-6).all()
    target = torch.rand(3, 6, generator=generator(1)) < 0.4
    assert torch.allclose(model(what, level, target).flatten(1), out[target], atol=1e-5)


LEARNERS = NETWORKS + [(DIT, dict(prediction_type="eps", self_cond=1.0, loss="nelbo",
                                  order="random", sampler="ancestral")), (BIT, dict(loss="nelbo")),
                       (SDD, dict(k=4, loss="nelbo")),
                       (SDD, dict(k=4, process="original", attention="full")),
                       *((MDLM, dict(cond=cond)) for cond in ("none", "add", "table", "adaln"))]


@pytest.mark.parametrize("method, kind", LEARNERS, ids=lambda k: " ".join(
    map(str, k.values())) if isinstance(k, dict) else k.script.__name__)
def test_every_parameter_learns_within_a_few_steps_and_all_is_finite(method, kind):
    """No gate is closed behind another; every weight has exactly one optimizer; losses, gradients
    and bounds are finite at both ends and under autocast, where bounds hardly change."""
    kind = dict(n_layer=2, **kind) | (dict(noise_window=0.5) if method is not MDLM else {})
    model, cfg = network(method, shake=0.0, lr=1e-3, **kind)
    before, x0 = copy.deepcopy(model.state_dict()), torch.arange(6).expand(16, 6) % 11
    optimizers, g = method.script.make_optimizers(model, cfg), generator(1)
    for _ in range(6):
        loss_of(method, model, x0, g).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, p in model.named_parameters():
        idle = name.startswith("guess") and not cfg.self_cond
        assert idle or not torch.equal(p, before[name]), name
    owned = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(map(id, model.parameters()))
    model, _ = network(method, **kind)
    bounds = []
    for cast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss = loss_of(method, model, x0, generator(1))
            if kind.get("process") != "original":
                bounds.append(method.lab.nelbo(model, x0, cfg, generator(1)))
        model.zero_grad()
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters()
                                       if p.grad is not None)
    assert all(bound.isfinite().all() for bound in bounds)
    assert not bounds or torch.allclose(*bounds, rtol=0.1)


# ---- samplers


@each_method
@pytest.mark.parametrize("window, order", [(0.1, "random"), (0.2, "l2r"), (0.3, "maxprob"),
                                           (1.0, "random")])
def test_many_steps_of_exact_posteriors_draw_the_joint_distribution(method, window, order):
    """Chi-square over all rows, while the product of the marginals is out of the question. Which
    position begins may depend on the state. One step draws every token for itself."""
    cfg, product = method.config(3, 3, noise_window=window, order=order, num_steps=64), \
        independent_rows(THREE, 3, 3)
    counts = row_counts(draw(method, method.oracle(THREE, 3), cfg, 3000, 3)[0], 3)
    assert chi_square(counts, THREE) > 1e-3
    assert chi_square(counts, product) < 1e-6
    if window == 1:
        cfg.num_steps = 1
        counts = row_counts(draw(method, method.oracle(THREE, 3), cfg, 3000, 4)[0], 3)
        assert chi_square(counts, product) > 1e-3


@each_method
@pytest.mark.parametrize("order", ["random", "l2r", "maxprob"])
def test_given_tokens_stay_and_the_rest_is_drawn_given_them(method, order):
    """A prompt, different holes in every row, nothing given; what is given is shown clean and never
    asked for; nothing to do costs nothing."""
    rows = torch.tensor([[0, 3, 1], [3, 2, 3], [3, 3, 3], [0, 2, 3], [1, 0, 2]])
    cfg = method.config(3, 3, noise_window=0.3, num_steps=40, order=order)
    model, canvas = method.oracle(THREE, 3), rows.repeat(600, 1)
    x = draw(method, model, cfg, canvas)[0]
    for i, row in enumerate(rows[:4]):
        want = THREE * ((all_rows(3, 3) == row) | (row == 3)).all(1)
        assert chi_square(row_counts(x[i::5], 3), want / want.sum()) > 1e-3
    for level, target in method.calls(model):
        assert (level[canvas < 3] >= method.clean - 1e-5).all()
        assert target is None or not target[canvas < 3].any()
    assert draw(method, model, cfg, rows[4:])[1] == 0


@each_method
@pytest.mark.parametrize("order", ["random", "l2r", "maxprob"])
def test_levels_only_rise_and_the_network_is_asked_where_a_step_is_made(method, order):
    """From noise to clean, l2r from the left; the network is asked of positions that move, with
    maxprob of all that are not clean; what is on show appears from the left, too."""
    model, cfg = method.oracle(THREE, 3, 0.7), method.config(3, 3, noise_window=0.3, order=order,
                                                             num_steps=20)
    x, nfe, frames = draw(method, model, cfg, 60)
    levels, targets = zip(*method.calls(model))
    levels = torch.stack(levels)
    assert nfe == len(levels) <= 21 and (levels.diff(dim=0) >= -1e-5).all()
    assert levels[0].max() <= method.nothing + 1e-4
    for level, after, target in zip(levels, levels[1:], targets):
        moved = after > level + 1e-5
        assert not (moved & ~target).any()
        assert order != "maxprob" or target[level < method.clean - 1e-5].all()
        assert order == "maxprob" or method is SDD or torch.equal(moved, target)
    shown = torch.stack([frame for _, frame in frames]) != 3
    first = shown.int().argmax(0).float().mean(0)
    assert (levels[..., :-1] >= levels[..., 1:] - 1e-5).all() == (order == "l2r")
    assert (first.diff() > 2).all() == (order == "l2r")


@each_method
def test_maxprob_begins_where_the_network_is_most_confident(method):
    """Here the middle is certain, the first is one of three, the last one of two."""
    joint = torch.zeros(3, 3, 3).double()
    joint[:, 1, :2] = 1 / 6
    model = method.oracle(joint.flatten(), 3)
    draw(method, model, method.config(3, 3, noise_window=0.2, order="maxprob", num_steps=20), 50)
    begun = torch.stack([level > method.nothing + 1e-4 for level, _ in method.calls(model)])
    begun = begun.int().argmax(0)
    assert (begun[:, 1] < begun[:, 2]).all() and (begun[:, 2] < begun[:, 0]).all()


@each_method
def test_num_steps_are_evaluations_and_0_is_one_for_each_token(method):
    """One evaluation a step with w = 1, and in dit_embed one at the end; with smaller windows only
    in steps in which something moves: for one gap those of its window, maxprob or not."""
    more = int(method is DIT)
    for steps, nfe in ((1, 1), (5, 5), (0, 3)):
        cfg = method.config(3, 3, num_steps=steps)
        assert draw(method, method.oracle(THREE, 3), cfg, 3)[1] == nfe + more
    for order in [dict(order="random"), dict(order="maxprob")] + [REMASK] * (method is SDD):
        cfg = method.config(3, 3, noise_window=0.1, num_steps=50, **order)
        model = method.oracle(THREE, 3)
        nfe = draw(method, model, cfg, torch.tensor([[0, 1, 3]]))[1] - more
        assert nfe + more == len(model.calls) and nfe in (5, 6)


REMASK = dict(order="maxprob", remask="conf")
SETTINGS = [
    *((DIT, change) for change in (
        dict(self_cond=0.5, guidance=1.0), dict(order="maxprob"),
        dict(prediction_type="v", sampler="ddim"),
        dict(prediction_type="x0", sampler="ancestral", clamp_to_embedding=True),
        dict(given="noisy", order="l2r"), dict(top_k=2, top_p=0.9, temperature=0.0))),
    *((BIT, change) for change in (
        dict(guidance=1.0), dict(order="maxprob", sampler="bit"), dict(head="bit", guidance=0.7),
        dict(head="bit", num_mixture=2, invalid="modulo", temperature=0.0),
        dict(head="bit", num_mixture=4, input="byte", guidance=1.0, sampler="bit"),
        dict(input="bit", add_likelihood=False, order="l2r"),
        dict(input="raw", cond="add", top_k=2, top_p=0.9, temperature=0.0))),
    *((SDD, change) for change in (
        REMASK | dict(temperature=0.5), dict(attention="full", guidance=0.7, **REMASK),
        dict(sampler="deterministic", noise_window=1.0), dict(sampler="deterministic", **REMASK),
        dict(attention="full", sampler="ancestral"), dict(k=1, add_likelihood="state", order="l2r"),
        dict(k=99, add_likelihood="none", temperature=0.0), dict(top_k=2, top_p=0.9),
        dict(candidates="posterior", guidance=0.5, **REMASK)))]


@pytest.mark.parametrize("method, change", SETTINGS, ids=lambda k: " ".join(
    map(str, k.values())) if isinstance(k, dict) else k.script.__name__)
def test_a_network_samples_with_every_setting(method, change):
    """Ids within the vocabulary, the prompt kept; under autocast, too; a seed fixes the samples."""
    model, cfg = network(method, shake=0.2, **dict(noise_window=0.4, num_steps=5) | change)
    x = torch.tensor([[6, 5, 11, 11, 11, 11]] * 3)
    for cast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            one, again = (draw(method, model, cfg, x, 1, method.lab.sample)[0] for _ in range(2))
        assert torch.equal(one, again)
