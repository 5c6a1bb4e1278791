"""Gaussian diffusion on embeddings: noise levels, times, self-likelihood, bounds, losses and the
network of dit_embed.py and lab/dit_variants.py, against Bayes' rule, quadrature and by hand. Every
expected number is made in gauss_tables.py or here."""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import dit_embed
import gauss_tables
from gauss_tables import (CIRCLE, COIN, JOINT, LINE, THREE, TOKENS, Oracle, alpha_sigma,
                          chain_distribution, evenly, gap, parts, steps_bound)
from lab import dit_variants
from oracles import all_rows, entropy, generator, hermite, mean_and_se, row_by_row

SCHEDULES = ("logsnr", "logistic", "linear", "cosine", "sqrt")


def config(*args, script=dit_variants, **changes):
    return gauss_tables.config(script.Config, *args, **changes)


def network(seed=0, script=dit_variants, **changes):
    torch.manual_seed(seed)
    return script.Model(config(script=script, **changes))


def shaken(model, seed=1, size=0.3):
    """Weights far from their initial zeros, so that every path is alive."""
    g = generator(seed)
    for p in model.parameters():
        p.data += size * torch.randn(p.shape, generator=g)
    return model


def weighted(draws, joint, times):
    """Mean over a distribution of rows, of so many draws for every row in turn, and its SE."""
    draws = draws.view(len(joint), times).double()
    return (joint * draws.mean(1)).sum().item(), \
        (joint.square() * draws.var(1) / times).sum().sqrt().item()


def every_row(joint, V, T, times):
    return all_rows(V, T).repeat_interleave(times, 0)


def loss_of(model, x0, cfg, g):
    model.cfg = cfg
    return dit_variants.loss_fn(model, x0, *dit_variants.corrupt(x0, cfg, g))


# ---- schedules (E1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_falls_from_end_to_end_with_its_stated_slope(name):
    """(E1) lam is between the ends, never rises, and its slope is the derivative: by finite
    differences in float64; 0 exactly where the range cuts it off."""
    for high, low in ((4.0, -5.0), (12.0, -12.0)):
        cfg, t = config(high, low, schedule=name), torch.linspace(0, 1, 4001, dtype=torch.float64)
        lam, slope = dit_variants.logsnr(t, cfg)
        assert lam.dtype == slope.dtype == t.dtype and lam.isfinite().all()
        assert lam[0] <= high + 1e-9 and lam[-1] >= low - 1e-9 and (lam.diff() <= 0).all()
        if high == 4:  # a range that all of them cover
            assert lam[[0, -1]].tolist() == pytest.approx([4, -5], abs=1e-5)
        cut = (lam >= high - 1e-9) | (lam <= low + 1e-9)
        inside = ~cut[:-2] & ~cut[2:] & (t[1:-1] > 0.02) & (t[1:-1] < 0.98)
        steep = -(lam[2:] - lam[:-2]) / (t[2:] - t[:-2])
        assert inside.sum() > 400 and torch.allclose(slope[1:-1][inside], steep[inside], rtol=2e-3)
        assert name in ("logsnr", "logistic") or (slope[cut] == 0).all()


def test_the_named_schedules_are_their_papers():
    """(E1) alpha-bar: exp(-(0.1 t + 19.9 t^2 / 2)), the limit of prod (1 - beta) of Ho et al. at
    1000 steps, cos^2(pi / 2 (t + .008) / 1.008) and 1 - sqrt(t + 1e-4); logistic: the share of
    time above lam is that of a logistic distribution around the center, between the ends."""
    t = torch.linspace(0.02, 0.97, 96, dtype=torch.float64)
    bar = {"linear": (-0.1 * t - 0.5 * 19.9 * t ** 2).exp(),
           "cosine": ((t + 0.008) / 1.008 * math.pi / 2).cos().square(),
           "sqrt": 1 - (t + 1e-4).sqrt()}
    for name, want in bar.items():
        lam, _ = dit_variants.logsnr(t, config(20, -20, schedule=name))
        assert torch.allclose(alpha_sigma(lam)[0].square(), want, rtol=1e-9)
    lam, _ = dit_variants.logsnr(torch.arange(1, 1001).double() / 1000,
                                 config(20, -20, schedule="linear"))
    product = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).log().cumsum(0)
    assert torch.allclose(alpha_sigma(lam)[0].square().log(), product, rtol=0.02, atol=3e-3)
    center = math.log(2 * math.log(4))
    lam, slope = dit_variants.logsnr(t, config(4, -5, schedule="logistic"))
    share, top, bottom = (1 / (1 + (torch.as_tensor(y) - center).exp()) for y in (lam, 4.0, -5.0))
    assert torch.allclose((share - top) / (bottom - top), t, atol=1e-6)
    assert (lam[slope.argmin()] - center).abs() < 0.1


def test_noise_has_the_stated_scale():
    """(E1) alpha^2 + sigma^2 = 1 and alpha^2 / sigma^2 = exp(lam)."""
    lam = torch.linspace(-9, 9, 37)
    emb, eps = torch.randn(2, 37, 3, generator=generator(1)).double()
    alpha, sigma = (y[:, None] for y in alpha_sigma(lam))
    assert torch.allclose(dit_embed.q_sample(emb, lam.double(), eps), alpha * emb + sigma * eps)


# ---- self-likelihood (E3), prediction (E4) (V1), steps (E6)


def test_the_self_likelihood_enters_the_logits_exactly():
    """(E4) with a zero head softmax(logits) is Bayes' rule for one position; add_likelihood adds
    it and nothing more, and not to vectors."""
    z, lam = torch.randn(3, 6, 2, generator=generator(1)), torch.linspace(-4, 4, 18).view(3, 6)
    model = network(V=5, T=6, d=2, script=dit_embed)
    alpha, sigma = alpha_sigma(lam)
    far = (z.double()[..., None, :] - alpha[..., None, None] * model.embeddings().double()).square()
    bayes = (-0.5 * far.sum(-1) / sigma.square()[..., None]).softmax(2)
    assert torch.allclose(model(z, lam).softmax(2).double(), bayes, atol=1e-5)
    model = shaken(network(V=5, T=6, d=2, emb_norm=1.0))
    bare = network(V=5, T=6, d=2, emb_norm=1.0, add_likelihood=False)
    bare.load_state_dict(model.state_dict())
    assert torch.allclose(model(z, lam) - model.self_likelihood(z, lam), bare(z, lam), atol=1e-4)
    for kind in ("eps", "x0", "v"):
        assert (network(V=5, T=6, d=2, prediction_type=kind)(z, lam) == 0).all()


def test_every_prediction_means_an_embedding():
    """(E4) sum_v p(v) E_v, which sticks out of the hull of E in no direction; (V1) eps, v and x0
    undone; exp(lam) |e - e_hat|^2 = |eps - eps_hat|^2 = alpha^2 |v - v_hat|^2."""
    model, g = network(V=6, d=5, emb_norm=1.5), generator(1)
    lam = torch.linspace(-4, 4, 40).double()
    emb, hat, eps = torch.randn(3, 40, 5, generator=g).double()
    alpha, sigma = (y[:, None] for y in alpha_sigma(lam))
    z = dit_embed.q_sample(emb, lam, eps)
    eps_hat, v_hat = (z - alpha * hat) / sigma, (alpha * z - hat) / sigma
    v = alpha * eps - sigma * emb
    for kind, out, want in (("eps", eps_hat, hat), ("v", v_hat, hat), ("x0", hat, hat),
                            ("v", v, emb), ("eps", eps, emb)):
        got = dit_variants.predict_x0_embedding(None, out, z, lam, config(prediction_type=kind))
        assert torch.allclose(got, want, atol=1e-6)
    sides = [y.square().sum(1) for y in (emb - hat, eps - eps_hat, v - v_hat)]
    assert torch.allclose(lam.exp() * sides[0], sides[1])
    assert torch.allclose(sides[1], alpha[:, 0] ** 2 * sides[2])
    logits, E = 3 * torch.randn(500, 6, generator=g), model.embeddings()
    mean = dit_variants.predict_x0_embedding(model, logits, z, lam, config())
    assert torch.allclose(mean, sum(logits.softmax(1)[:, v, None] * E[v] for v in range(6)),
                          atol=1e-6)
    towards = torch.randn(5, 99, generator=g)
    assert ((mean @ towards) <= (E @ towards).amax(0) + 1e-5).all()


# ---- the bound of an exact denoiser (E5)


@pytest.mark.parametrize("window, schedule", [
    (0.05, "logsnr"), (0.2, "cosine"), (0.2, "logistic"), (1.0, "logsnr")])
def test_the_bound_does_not_depend_on_the_path(window, schedule):
    """(E5) nelbo of an exact denoiser is H + KL(q(z at t = 1) || N(0, 1)) + (sum H(x_i | z) -
    H(x | z) at t = 0), for every window and schedule; within 4 standard errors."""
    model, cfg = Oracle(JOINT, LINE, 2), config(3, -4, noise_window=window, schedule=schedule)
    eps, weight = hermite(24, 2)
    want = entropy(JOINT) + sum(gap(model, 3, -4, eps.view(-1, 2, 1), weight))
    nats = dit_variants.nelbo(model, every_row(JOINT, 4, 2, 400), cfg, generator(3))
    mean, se = weighted(nats, JOINT, 400)
    assert abs(mean - want) < 4 * se < 0.16 / window ** 0.75 and len(model.calls) == 9 * 100


@pytest.mark.parametrize("tilt, window", [(0.0, 1.0), (0.7, 0.3)])
def test_the_bound_and_its_parts_by_quadrature_for_one_position(tilt, window):
    """(E5) every token's bound, also of a network that errs; the window of a lone position does
    not matter. The points of the figure have the area of DIFFUSION."""
    model, cfg = Oracle(TOKENS, LINE, 1, tilt), config(4, -5, T=1, noise_window=window)
    x0, want = all_rows(4, 1).repeat_interleave(1000, 0), parts(model.one, LINE, 4, -5)
    got = dit_variants.nelbo_parts(model, x0, cfg, generator(1))
    for name, truth in zip(("prior", "diffusion", "reconstruction"), want):
        assert row_by_row(got[name], truth, 1000, 2e-3)
    area = 9 * got["integrand"].mean().item()
    assert area == pytest.approx(got["diffusion"].mean().item(), rel=1e-4)
    assert -5 < got["logsnr"].min() and got["logsnr"].max() < 4 and len(got["logsnr"]) == 32000
    model, cfg = (Oracle(TOKENS[:2] / 0.7, COIN, 1, tilt),
                  config(4, -5, 2, 1, noise_window=window, script=dit_embed))
    want = parts(model.one, COIN, 4, -5).sum(0)
    nats = dit_embed.nelbo(model, all_rows(2, 1).repeat_interleave(1000, 0), cfg, generator(1))
    assert row_by_row(nats, want, 1000)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_a_network_that_predicts_vectors_has_the_bound_of_its_x0_hat_and_of_rounding(kind):
    """(V1) (E5) the same DIFFUSION as with tokens; RECONSTRUCTION is the self-likelihood."""
    x0, models = every_row(JOINT, 4, 2, 40), [Oracle(JOINT, LINE, 2, prediction_type=p)
                                              for p in ("logits", kind)]
    token, vector = (dit_variants.nelbo_parts(model, x0, config(2, -5, prediction_type=model.kind),
                                              generator(3), 4) for model in models)
    assert torch.allclose(token["diffusion"], vector["diffusion"], rtol=1e-3, atol=1e-4)
    z, lam = (torch.cat(y) for y in zip(*models[1].reads))
    log = models[1].likelihood(z, lam).log_softmax(2)
    want = -log.gather(2, x0[..., None]).sum((1, 2))
    assert torch.allclose(vector["reconstruction"], want, atol=1e-3) and want.mean() > 0.05
    assert (lam - 2).abs().max() < 1e-5


# ---- bounds of few steps (V2) (V3)


@pytest.mark.parametrize("sampler", ["ancestral", "token"])
@pytest.mark.parametrize("steps, window", [(1, 1.0), (3, 1.0), (8, 1.0), (8, 0.4)])
def test_the_entropy_is_below_the_chain_and_the_chain_below_its_bound(steps, window, sampler,
                                                                      monkeypatch):
    """(E2) (E6) (E7) (V2) (V3) one position and a network that errs: H <= exact -E log p of the
    chain, on a grid <= its bound, by quadrature = nelbo_steps of every token; with tau = 0.3 and
    w = 0.4 only four of 8 steps are its own."""
    model = Oracle(TOKENS, LINE, 1, 0.7)
    cfg = config(4, -5, T=1, sampler=sampler, noise_window=window)
    lams = evenly(4.0, -5.0, steps)
    if window < 1:
        monkeypatch.setattr(dit_variants, "position_times",
                            lambda shape, *_: torch.full(shape, 0.3))
        lams = [4.0, *(4 - 9 * (t - 0.3) / 0.4 for t in (0.375, 0.5, 0.625)), -5.0]
    want = steps_bound(model.one, LINE, lams, sampler == "token")
    p = chain_distribution(model.one, LINE, lams, sampler)
    assert p.sum().item() == pytest.approx(1, abs=1e-9)
    assert entropy(TOKENS) <= -(TOKENS @ p.log()).item() + 1e-6 and (-p.log() <= want + 1e-6).all()
    nats = dit_variants.nelbo_steps(model, all_rows(4, 1).repeat_interleave(2000, 0), cfg,
                                    generator(steps), steps)
    assert row_by_row(nats, want, 2000)


def test_bounds_do_not_change_under_autocast():
    """(E5) (V2) (V3) exponents are in the hundreds: bfloat16 products would be wrong by nats."""
    wide = dict(V=40, T=6, d=8, emb_norm=1.0, n_embd=8)
    model, x0 = network(**wide), torch.randint(40, (64, 6), generator=generator(1))
    for bound in (lambda: dit_variants.nelbo(model, x0, config(**wide), generator(2), 3),
                  *(lambda how=how: dit_variants.nelbo_steps(
                      model, x0, config(sampler=how, **wide), generator(2), 5)
                    for how in ("token", "ancestral"))):
        plain = bound()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(bound(), plain, rtol=1e-3, atol=0.02)


# ---- training losses


@pytest.mark.parametrize("kind", ["logits", "eps", "x0", "v"])
def test_mse_is_the_squared_error_of_what_the_network_predicts(kind):
    """(V1) per number; for logits of x0_hat (E4); with its weight, the rounding loss of z at the
    clean end."""
    model, x0 = Oracle(THREE, CIRCLE, 3, 0.7, kind), all_rows(3, 3)
    cfg = config(2, -4, 3, 3, 2, noise_window=0.5, prediction_type=kind, loss="mse",
                 rounding_weight=0.0)
    loss = loss_of(model, x0, cfg, generator(1)).item()
    (z, lam, is_target, _), = model.calls
    emb = CIRCLE.double()[x0]
    alpha, sigma = (y[..., None] for y in alpha_sigma(lam))
    eps, out = (z - alpha * emb) / sigma, model(z, lam)
    goal = {"eps": eps, "v": alpha * eps - sigma * emb}.get(kind, emb)
    out = out.double().softmax(2) @ CIRCLE.double() if kind == "logits" else out
    error = (out - goal).square().mean(2) * is_target
    rows = [(e.sum() / w.sum()).item() for e, w in zip(error, is_target) if w.any()]
    assert not model.reads and loss == pytest.approx(sum(rows) / 27, rel=1e-4)
    for weight in (0.5, 2.0):
        model.reads.clear()
        more = loss_of(model, x0, dataclasses.replace(cfg, rounding_weight=weight), generator(1))
        (z0, lam0), = model.reads
        noise = (z0 - alpha_sigma(2.0)[0] * emb) / alpha_sigma(2.0)[1]
        assert abs(noise.mean()) < 0.3 and abs(noise.std() - 1) < 0.2
        end = -model.likelihood(z0, lam0).log_softmax(2).gather(2, x0[..., None]).mean().item()
        assert more.item() == pytest.approx(loss + weight * end, rel=1e-4) and end > 0.03
        assert (lam0 - 2).abs().max() < 1e-5


@pytest.mark.parametrize("kind, window, prefix", [("logits", 0.3, 0.0), ("eps", 1.0, 0.0),
                                                  ("logits", 1.0, 1.0)])
def test_the_nelbo_loss_is_the_bound_per_token_with_rounding_by_the_self_likelihood(kind, window,
                                                                                  prefix):
    """(E5) unbiased for the bound of a network that predicts vectors, whose RECONSTRUCTION is that;
    a given beginning costs nothing."""
    x0 = all_rows(4, 2).repeat(64, 1)
    model, eps = (Oracle(JOINT, LINE, 2, 0.7, kind) for kind in (kind, "eps"))
    cfg = config(1.5, -1, noise_window=window, loss="nelbo", prediction_type=kind, prefix=prefix)
    with torch.no_grad():
        mean, se = mean_and_se(lambda g: loss_of(model, x0, cfg, g), 30)
    half = torch.rand(1024, 1, generator=generator(3)) < 0.5 * prefix  # floor(2 u) is 0 or 1
    nats = dit_variants.nelbo(eps, x0, dataclasses.replace(cfg, prediction_type="eps"),
                              generator(5), 16, torch.cat((half, torch.zeros_like(half)), 1)) / 2
    se = math.hypot(se, nats.view(64, 16).mean(1).std().item() / 8)
    assert abs(mean - nats.mean().item()) < 4 * se < 0.2


def test_the_gradient_of_the_nelbo_reaches_the_embeddings():
    """(E5) against finite differences under the same noise."""
    x0, g, values = torch.randint(5, (8, 4), generator=generator(1)), generator, []
    wide = dict(V=5, T=4, d=3, loss="nelbo")
    model, cfg = shaken(network(**wide), size=0.1), config(3, -4, **wide)
    loss_of(model, x0, cfg, g(2)).backward()
    step = torch.randn(5, 3, generator=g(3)) * 3e-3
    slope = (model.emb.weight.grad * step).sum().item()
    for size in (1, -2):
        model.emb.weight.data += size * step
        values.append(loss_of(model, x0, cfg, g(2)).item())
    assert slope == pytest.approx((values[0] - values[1]) / 2, rel=0.05)


# ---- what cannot work, collapse


def test_a_squared_error_that_would_make_all_embeddings_alike_is_refused():
    """It is said in one sentence how to go on; each way is accepted."""
    bad = dict(order="random", sampler="ancestral", rounding_weight=0.0, loss="mse")
    said, = dit_variants.Config(**bad).problems()
    assert all(flag in said for flag in ("--rounding-weight 1", "--no-emb-train",
                                         "--allow-collapse"))
    for good in (dict(rounding_weight=1.0), dict(emb_train=False), dict(allow_collapse=True),
                 dict(loss="nelbo")):
        assert not dit_variants.Config(**bad | good).problems()


def train(model, cfg, x0, steps):
    """Steps at a constant learning rate."""
    optimizers, g = dit_embed.make_optimizers(model, cfg), generator(2)
    for step in range(steps):
        loss_of(model, x0, cfg, g).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * group["scale"]
            optimizer.step(), optimizer.zero_grad()
    return optimizers


def test_a_bare_squared_error_shrinks_the_embeddings_and_the_rounding_loss_keeps_them_apart():
    x0, apart = torch.randint(6, (16, 4), generator=generator(1)), {}
    for weight in (0.0, 1.0):
        wide = dict(V=6, T=4, d=4, prediction_type="x0", rounding_weight=weight, lr=2e-3)
        model = network(**wide)
        before = torch.pdist(model.embeddings().detach()).mean().item()
        train(model, config(4, -6, **wide), x0, 150)
        apart[weight] = torch.pdist(model.embeddings().detach()).mean().item() / before
    assert apart[0.0] < 0.3 and apart[1.0] > 0.35 and apart[1.0] > 2 * apart[0.0]


# ---- the network


LAM, SOME = torch.linspace(-5, 5, 18).view(3, 6), torch.randn(3, 6, 4, generator=generator(9))
SHAPES = dict(V=7, T=6, d=4, emb_norm=1.0, n_layer=2)


@pytest.mark.parametrize("cond", ["adaln", "add", "none"])
def test_conditioning_starts_as_none_and_comes_alive(cond):
    """With the same weights the network predicts the same under every cond at first, as its noise
    layers are zero; afterwards the level matters beyond the self-likelihood."""
    bare = dict(SHAPES, input="raw", add_likelihood=False)
    plain, model = shaken(network(cond="none", **bare)), network(cond=cond, **bare)
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.allclose(model(SOME, LAM), plain(SOME, LAM), atol=1e-5)
    shaken(model)
    assert torch.allclose(model(SOME, LAM), model(SOME, LAM + 1), atol=1e-6) == (cond == "none")


def test_neighbouring_levels_look_different_to_the_network():
    """The sinusoids are of 1000 times the share of the range: a hundredth of it turns them."""
    model = network(script=dit_embed, **SHAPES)
    model.noise_in.weight.data = torch.eye(128)[:16]
    cos = model.embed_noise(torch.tensor([0.0, 0.12]))
    assert (cos[0] - cos[1]).abs().max() > 0.5
    share = (6 - 0.12) / 12  # of the way from the largest to the smallest lam
    want = F.silu((1000 * share * 10000 ** (-torch.arange(16) / 64)).cos())
    assert torch.allclose(cos[1], want, atol=1e-2)


def test_positions_are_told_as_pos_says():
    """Without neighbours mixed, learned positions at zero know no order; rotary ones do."""
    turn = torch.tensor([3, 1, 4, 0, 5, 2])
    for pos in ("learned", "rotary", "both"):
        model = shaken(network(**SHAPES, pos=pos))
        for block in model.blocks:
            block.conv.weight.data.zero_()
        assert hasattr(model, "wpe") == (pos != "rotary")
        if pos != "rotary":
            model.wpe.weight.data.zero_()
        same = torch.allclose(model(SOME[:, turn], LAM[:, turn]), model(SOME, LAM)[:, turn],
                              atol=1e-5)
        assert same == (pos == "learned")


@pytest.mark.parametrize("kind", ["likelihood", "raw", "both"])
def test_the_input_is_what_input_says(kind):
    """likelihood: nothing of z but its softmax (a direction that no token has does not matter),
    and nothing at all of pure noise; raw: the embeddings do not matter."""
    wide = dict(SHAPES, emb_norm=0.0, input=kind, add_likelihood=False, cond="none")
    model = shaken(network(**wide))
    for lam, same in ((-6.0, True), (-5.95, False), (0.0, False)):
        lam = torch.full((3, 6), lam)
        equal = torch.allclose(model(SOME, lam), model(SOME + 1, lam), atol=1e-6)
        assert equal == (same and kind == "likelihood")
    model.emb.weight.data[:, 3] = 0.0
    aside = SOME + torch.tensor([0.0, 0, 0, 1.0])
    same = torch.allclose(model(SOME, LAM), model(aside, LAM), atol=1e-5)
    assert same == (kind == "likelihood")
    before = model(SOME, LAM)
    model.emb.weight.data *= 1.5
    assert torch.allclose(model(SOME, LAM), before, atol=1e-6) == (kind == "raw")
