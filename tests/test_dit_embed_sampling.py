"""The samplers of dit_embed.py and lab/dit_variants.py against exact distributions: chains on a
grid, joint distributions of two and three tokens, what is given, guidance, orders,
self-conditioning, the trajectory."""
import dataclasses

import pytest
import torch

import dit_embed
import gauss_tables
from gauss_tables import (CIRCLE, COIN, JOINT, LINE, THREE, TOKENS, Oracle, alpha_sigma,
                          chain_distribution, evenly, marginals)
from lab import dit_variants
from tables import all_rows, chi_square, generator, row_counts

BOTH = pytest.mark.parametrize("script", [dit_embed, dit_variants], ids=lambda s: s.__name__)


def config(*args, script=dit_variants, **changes):
    return gauss_tables.config(script.Config, *args, **changes)


def circle(window=1.0, script=dit_variants, **changes):
    return config(5, -6, 3, 3, 2, noise_window=window, script=script, emb_norm=1.0, **changes)


def three(**changes):
    return Oracle(THREE, CIRCLE, 3, **changes)


def frames(model, cfg, x, seed=1, script=dit_variants):
    """The samples from the canvas x (n, T), or so many rows of masks, NFE, and all states that
    on_step saw, (steps, n, T)."""
    if isinstance(x, int):
        x = torch.full((x, cfg.seq_len), cfg.vocab_size)
    before, states, nfes = x.clone(), [], []
    out, nfe = script.sample(model, x, cfg, generator(seed),
                             on_step=lambda k, x: (nfes.append(k), states.append(x.clone())))
    assert torch.equal(x, before) and torch.equal(out, states[-1])
    assert (out[x < cfg.vocab_size] == x[x < cfg.vocab_size]).all()
    assert out.max() < cfg.vocab_size and nfes == sorted(nfes) and nfes[-1] == nfe
    return out, nfe, torch.stack(states)


def draw(model, cfg, x, seed=1, script=dit_variants):
    return frames(model, cfg, x, seed, script)[0]


def counts(model, cfg, x, seed=1, script=dit_variants):
    return row_counts(draw(model, cfg, x, seed, script), cfg.vocab_size)


def prompt(*ids, n=1, T=3, V=3):
    """n canvases that begin with these tokens."""
    return torch.tensor([[*ids, *(T - len(ids)) * [V]]]).repeat(n, 1)


# ---- one position: the distribution of every sampler


KINDS = [dict(sampler="token"), dict(sampler="ancestral"), dict(sampler="ddim", eta=0.0),
         dict(sampler="ddim", eta=0.6), dict(sampler="ddim", eta=1.0),
         dict(sampler="ancestral", clamp_to_embedding=True),
         dict(sampler="ancestral", rounding="argmax"),
         dict(sampler="ancestral", rounding="nearest")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: " ".join(map(str, k.values())))
def test_a_sampler_has_the_distribution_of_its_chain(kind):
    """(E6) (E7) (V2) (V4) 12 000 tokens of a network that errs, in 4 steps, against the same chain
    on a grid: chi-square."""
    model, cfg = Oracle(TOKENS, LINE, 1, 0.7), config(1, -5, T=1, num_steps=4, **kind)

    def decode(z):
        logits = model.one(z, 1.0)
        if cfg.rounding == "nearest":  # the most likely token by the self-likelihood alone
            logits = model.likelihood(z[:, None], torch.full((len(z),), 1.0))
        return logits.softmax(1) if cfg.rounding == "draw" else \
            torch.nn.functional.one_hot(logits.argmax(1), 4).double()

    p = chain_distribution(model.one, LINE, evenly(1.0, -5.0, 4), cfg.sampler,
                           cfg.eta if cfg.sampler == "ddim" else 1.0, cfg.clamp_to_embedding,
                           decode, h=0.01 if kind.get("eta") == 0 else 0.04)
    x, nfe, _ = frames(model, cfg, 12_000)
    assert x.shape == (12_000, 1) and nfe == 5
    assert chi_square(row_counts(x, 4), p / p.sum()) > 1e-3


def test_the_chains_of_different_samplers_differ():
    """The test above can tell them apart."""
    model = Oracle(TOKENS, LINE, 1, 0.7)
    every = [chain_distribution(model.one, LINE, evenly(1.0, -5.0, 4), *how)
             for how in (("token",), ("ancestral",), ("ddim", 0.0), ("ddim", 0.6),
                         ("ancestral", 1.0, True))]
    for i, p in enumerate(every):
        for q in every[:i]:
            assert 12_000 * ((p - q).square() / q).sum() > 15


@pytest.mark.parametrize("window", [1.0, 0.4])
def test_the_script_draws_from_its_chain(window, monkeypatch):
    """(E2) (E7) two tokens of norm 1; a position steps within its window alone: with tau = 0.3 and
    w = 0.4 four of 8 steps are its own."""
    monkeypatch.setattr(dit_embed, "position_times",
                        lambda shape, *_: torch.full(shape, 0.3 if window < 1 else 0.0))
    model = Oracle(TOKENS[1:3] / 0.25, COIN, 1, 0.7)
    cfg = config(1, -5, 2, 1, noise_window=window, num_steps=4 if window == 1 else 8,
                 script=dit_embed)
    lams = evenly(1.0, -5.0, 4) if window == 1 else [
        1.0, *(1 - 6 * (t - 0.3) / 0.4 for t in (0.375, 0.5, 0.625)), -5.0]
    x, nfe, _ = frames(model, cfg, 12_000, script=dit_embed)
    p = chain_distribution(model.one, COIN, lams, "token")
    assert chi_square(row_counts(x, 2), p) > 1e-3 and nfe == 5


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.7])
def test_the_temperature_is_for_context_alone(temperature, monkeypatch):
    """(E7) softmax(net / temperature + self-likelihood); at 0 the context's most likely token; for
    x0_hat as well (V2)."""
    model, cfg = three(tilt=0.7), circle(temperature=temperature)
    z, lam = torch.randn(40, 3, 2, generator=generator(1)), torch.linspace(-3, 3, 120).view(40, 3)
    out, z, lam, drawn = model(z, lam).flatten(0, 1), z.flatten(0, 1), lam.flatten(), []
    monkeypatch.setattr(dit_embed, "categorical",
                        lambda logits, g: drawn.append(logits) or logits.argmax(1))
    got = dit_embed.predict_x0(model, out, z, lam, cfg, generator(1))
    own = model.self_likelihood(z, lam)
    if not temperature:
        assert torch.equal(got, CIRCLE[(out - own).argmax(1)])
        return
    want = ((out - own) / temperature + own).softmax(1)
    assert torch.allclose(drawn[0].softmax(1), want, atol=1e-4)
    hat = dit_variants.predict_x0(model, out, z, lam,
                                  dataclasses.replace(cfg, sampler="ancestral"), None)
    assert torch.allclose(hat, want @ CIRCLE, atol=1e-4)


@BOTH
def test_tokens_without_context_do_not_feel_the_temperature(script):
    """(E4) a network that knows nothing beyond z_i: uniform samples at every temperature."""
    model = Oracle(torch.full((2,), 0.5).double(), COIN, 1)
    cfg = config(5, -6, 2, 1, num_steps=6, temperature=0.3, script=script, emb_norm=1.0)
    assert chi_square(counts(model, cfg, 6000, script=script), [0.5, 0.5]) > 1e-3


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_vectors_are_sampled_like_tokens(kind):
    """(V1) the same chain whatever is predicted; rounding is by the self-likelihood."""
    cfg = config(6, -5, T=1, num_steps=5, sampler="ancestral")
    one, two = (draw(Oracle(TOKENS, LINE, 1, 0.7, p),
                     dataclasses.replace(cfg, prediction_type=p), 2000) for p in ("logits", kind))
    assert (one == two).float().mean() > 0.99


# ---- two positions and three


@pytest.mark.parametrize("sampler, steps", [("ancestral", 256), ("ddim", 512)])
def test_many_steps_of_an_exact_denoiser_draw_the_rows(sampler, steps):
    """(V2) (V4) within 0.02 of their probabilities, the start at t = 1 included."""
    cfg = config(5, -7, sampler=sampler, num_steps=steps)
    found = counts(Oracle(JOINT, LINE, 2), cfg, 4000, 2) / 4000
    assert (found - JOINT).abs().max() < 0.02
    assert (marginals(found, 4, 2) - marginals(JOINT, 4, 2)).abs().max() < 0.02


@BOTH
@pytest.mark.parametrize("window, order", [(0.1, "random"), (0.2, "l2r"), (0.3, "maxprob"),
                                           (1.0, "random")])
def test_the_token_sampler_draws_the_joint_distribution(window, order, script):
    """(E2) (E7) an exact denoiser, all orders and windows: chi-square over all rows."""
    cfg = circle(window, script, order=order, num_steps=64)
    found, alone = counts(three(), cfg, 4000, 3, script), marginals(THREE, 3, 3)
    assert chi_square(found, THREE) > 1e-3
    assert chi_square(found, torch.einsum("i,j,k->ijk", *alone).flatten()) < 1e-6


def test_one_step_draws_each_token_for_itself():
    """(E7) the product of the marginals: what few steps cost."""
    found = counts(Oracle(JOINT, LINE, 2), config(8, -8, num_steps=1), 5000, 4)
    assert chi_square(found, torch.outer(*marginals(JOINT, 4, 2)).flatten()) > 1e-3


# ---- orders


@BOTH
@pytest.mark.parametrize("order", ["random", "l2r", "maxprob"])
def test_levels_only_rise_and_the_network_is_asked_where_a_step_is_made(order, script):
    """(E2) from the noisy to the clean end; noise moves no other position; l2r: from the left."""
    model, cfg = three(tilt=0.7), circle(0.3, script, order=order, num_steps=20)
    _, _, states = frames(model, cfg, 30, script=script)
    levels = torch.stack([lam for _, lam, *_ in model.calls])
    assert (levels.diff(dim=0) >= -1e-5).all() and (levels[-1] - 5).abs().max() < 1e-5
    for (z, lam, is_target, _), (after, later, *_) in zip(model.calls, model.calls[1:]):
        moved = later > lam + 1e-5
        assert not (moved & ~is_target).any() and torch.equal((after != z).any(2), moved)
        assert order == "maxprob" or torch.equal(moved, is_target)
    falls = (levels[..., :-1] >= levels[..., 1:] - 1e-5).all()
    first = (states != 3).int().argmax(0).float().mean(0)
    assert falls == (first.diff() > 2).all() == (order == "l2r")


@BOTH
def test_maxprob_begins_where_the_network_is_most_confident(script):
    """(E2) here the middle is certain, the first is one of three, the last one of two."""
    joint = torch.zeros(3, 3, 3).double()
    joint[:, 1, :2] = 1 / 6
    model = Oracle(joint.flatten(), CIRCLE, 3)
    draw(model, circle(0.2, script, order="maxprob", num_steps=20), 50, script=script)
    begun = torch.stack([lam > -6 + 1e-4 for _, lam, *_ in model.calls]).int().argmax(0)
    assert (begun[:, 1] < begun[:, 2]).all() and (begun[:, 2] < begun[:, 0]).all()


# ---- what is given


@BOTH
def test_given_tokens_stay_and_the_rest_is_drawn_given_them(script):
    """(E7) a prompt, and holes that differ from row to row; nothing to do costs nothing."""
    for ids in ([1], [0, 2], []):
        fits = (all_rows(3, 3)[:, :len(ids)] == torch.tensor(ids)).all(1)
        found = counts(three(), circle(0.3, script, num_steps=60), prompt(*ids, n=1500),
                       script=script)
        assert chi_square(found, THREE * fits / (THREE * fits).sum()) > 1e-3
    x = torch.tensor([[0, 3, 1], [3, 2, 3], [1, 0, 2], [3, 3, 3]]).repeat(400, 1)
    out = draw(three(), circle(0.3, script, num_steps=40), x, script=script)
    p = THREE.view(3, 3, 3)[0, :, 1]
    assert chi_square(out.view(400, 4, 3)[:, 0, 1].bincount(minlength=3), p / p.sum()) > 1e-3
    out, nfe = script.sample(three(), prompt(2, 1, 0), circle(script=script), generator(1))
    assert out.tolist() == [[2, 1, 0]] and nfe == 0


@pytest.mark.parametrize("given", ["clean", "noisy"])
def test_given_tokens_are_clean_or_noisy_as_in_training(given):
    """(E1) (E2) clean: at the clean end from the first step on; noisy: z = alpha e + sigma eps by
    their own times, with one eps."""
    model, cfg = three(), circle(0.5, num_steps=10, given=given)
    draw(model, cfg, prompt(1, n=60))
    noise = []
    for z, lam, is_target, _ in model.calls:
        alpha, sigma = alpha_sigma(lam[:, :1])
        noise.append((z[:, 0] - alpha * CIRCLE[1]) / sigma)
        assert not is_target[:, 0].any()
    assert all(torch.allclose(e, noise[0], atol=1e-3) for e in noise)
    assert abs(noise[0].mean()) < 0.4 and noise[0].std() == pytest.approx(1, abs=0.2)
    first, last = model.calls[0][1][:, 0], model.calls[-1][1][:, 0]
    assert (first - (5 if given == "clean" else -6)).abs().max() < 1e-5
    assert (last - 5).abs().max() < 1e-5


# ---- guidance


@pytest.mark.parametrize("w, given", [(1.5, "clean"), (0.4, "clean"), (1.5, "noisy")])
def test_guidance_adds_what_the_given_text_predicts(w, given, monkeypatch):
    """(V5) out + w (out - out without c): against two evaluations by hand, where c is pure noise
    and the other positions stay as they are."""
    outs, aim = [], dit_variants.predict_x0
    monkeypatch.setattr(dit_variants, "predict_x0",
                        lambda model, out, *rest: outs.append(out) or aim(model, out, *rest))
    model, cfg = three(tilt=0.7), circle(0.5, num_steps=6, guidance=w, given=given)
    _, nfe, _ = frames(model, cfg, prompt(1, n=25))
    calls = list(zip(model.calls[::2], model.calls[1::2]))
    assert nfe == len(model.calls) == 2 * len(calls) and len(outs) == len(calls) - 1
    for ((z, lam, target, _), (blank, low, same, _)), out in zip(calls, outs):
        assert torch.equal(target, same) and torch.equal(z[:, 1:], blank[:, 1:])
        assert torch.equal(lam[:, 1:], low[:, 1:]) and (low[:, 0] + 6).abs().max() < 1e-5
        alpha, sigma = alpha_sigma(lam[:, :1])
        assert (blank[:, 0] - (z[:, 0] - alpha * CIRCLE[1]) / sigma).abs().max() < 1e-3
        full, bare = model(z, lam)[target], model(blank, low)[target]
        assert torch.allclose(out, full + w * (full - bare), atol=1e-3)


def test_guidance_tilts_the_distribution_towards_what_the_prompt_favours():
    """(V5) p(x_2 | x_1) p(x_1 | x_2)^w, renormalised; nothing given or w = 0: one evaluation."""
    for w in (0.0, 1.0, 3.0):
        cfg = config(6, -6, num_steps=32, guidance=w)
        x, nfe, _ = frames(Oracle(JOINT, LINE, 2), cfg, prompt(1, T=2, V=4, n=4000))
        row = JOINT.view(4, 4)[1]
        tilted = row * (row / JOINT.view(4, 4).sum(0)) ** w
        share = x[:, 1].bincount(minlength=4) / 4000
        assert (share - tilted / tilted.sum()).abs().max() < 0.04 and nfe == (66 if w else 33)
        assert frames(Oracle(JOINT, LINE, 2), cfg, 5)[1] == 33


# ---- steps, trajectory


@BOTH
def test_num_steps_counts_evaluations_and_0_is_one_for_each_token(script):
    """(E7) steps + 1 with w = 1; with windows only those in which something moves."""
    for steps, nfe in ((1, 2), (5, 6), (0, 4)):
        assert frames(three(), circle(script=script, num_steps=steps), 3, script=script)[1] == nfe
    model = three()
    nfe = frames(model, circle(0.1, script, num_steps=50), torch.tensor([[0, 1, 3]]),
                 script=script)[1]
    assert nfe == len(model.calls) <= 8


@BOTH
@pytest.mark.parametrize("order", ["random", "maxprob"])
def test_the_trajectory_shows_likely_tokens_and_ends_with_the_sample(order, script):
    """(E3) one frame an evaluation: given tokens, tokens with half of the probability by the
    self-likelihood, else the mask."""
    model, cfg = three(), circle(0.4, script, order=order, num_steps=12)
    x, nfe, states = frames(model, cfg, prompt(2, n=8), script=script)
    assert states.shape == (nfe, 8, 3) and (states[:, :, 0] == 2).all()
    assert (states[0][:, 1:] == 3).float().mean() > 0.5 and (states[-1] < 3).all()
    for (z, lam, *_), frame in zip(model.calls[1:], states):
        p, best = model.likelihood(z, lam).softmax(2).max(2)
        clear, want = (p - 0.5).abs() > 1e-3, torch.where(p < 0.5, 3, best)
        want[:, 0] = 2
        assert torch.equal(frame[clear], want[clear])


# ---- self-conditioning


class Guessing(Oracle):
    """What it predicts depends on the guess."""

    def forward(self, z, lam, is_target=None, guess=None):
        out = super().forward(z, lam, None, guess)
        self.calls[-1] = (z, lam, is_target, guess)
        if guess is not None:
            out = out + 0.3 * guess @ torch.ones(guess.shape[2], out.shape[2]).cumsum(1)
        return out if is_target is None else out[is_target]


@pytest.mark.parametrize("bound", [dit_variants.nelbo, dit_variants.nelbo_steps])
def test_the_bound_of_a_self_conditioned_network_is_that_of_two_passes(bound):
    """(E5) a function of z and lam: the second pass sees what the first predicts."""
    model, x0 = Guessing(THREE, CIRCLE, 3), all_rows(3, 3)
    bound(model, x0, circle(0.4), generator(1), 3)
    assert all(guess is None for *_, guess in model.calls)
    model.calls.clear()
    bound(model, x0, circle(0.4, self_cond=0.5), generator(1), 3)
    calls = list(model.calls)
    for (z, lam, target, none), (z2, lam2, _, guess) in zip(calls[::2], calls[1::2], strict=True):
        assert target is None and none is None and torch.equal(z, z2) and torch.equal(lam, lam2)
        assert torch.allclose(guess, model(z, lam).softmax(2) @ CIRCLE, atol=1e-5)


def test_training_guesses_as_often_as_asked_and_without_a_gradient():
    """self_cond = share of batches whose second pass sees the first."""
    model, x0, count = Guessing(THREE, CIRCLE, 3), all_rows(3, 3), 0
    model.cfg = circle(self_cond=0.3)
    for seed in range(60):
        model.calls.clear()
        dit_variants.loss_fn(model, x0, *dit_variants.corrupt(x0, model.cfg, generator(seed)))
        *first, (z, lam, _, guess) = model.calls
        assert len(first) == (guess is not None)
        if guess is not None:
            count += 1
            assert first[0][3] is None and torch.equal(z, first[0][0])
            assert torch.allclose(guess, model(z, lam).softmax(2) @ CIRCLE, atol=1e-5)
    assert 8 <= count <= 28


@pytest.mark.parametrize("kind", ["logits", "eps"])
@pytest.mark.parametrize("x", [10, prompt(1, n=10)])
def test_a_sampler_hands_its_x0_hat_to_the_next_evaluation(kind, x):
    """Zeros first, then x0_hat of the evaluation before, at every position."""
    model = Guessing(THREE, CIRCLE, 3, prediction_type=kind)
    cfg = circle(0.5, num_steps=6, self_cond=0.5, prediction_type=kind,
                 sampler="token" if kind == "logits" else "ancestral")
    _, nfe, _ = frames(model, cfg, x)
    calls = list(model.calls)
    assert nfe == len(calls) and (calls[0][3] == 0).all()
    for (z, lam, _, guess), (*_, after) in zip(calls, calls[1:]):
        out = model(z, lam, None, guess)
        want = dit_variants.predict_x0_embedding(model, out, z, lam, cfg)
        assert torch.allclose(after, want, atol=1e-4)


@pytest.mark.parametrize("order", ["random", "maxprob"])
def test_a_network_that_ignores_guesses_samples_the_same_with_them(order):
    one, two = (draw(three(), circle(0.5, num_steps=9, self_cond=share, order=order), 40)
                for share in (0.0, 0.5))
    assert torch.equal(one, two)


@pytest.mark.parametrize("changes", [
    dict(), dict(self_cond=0.5, guidance=1.0), dict(order="maxprob"),
    dict(prediction_type="v", sampler="ddim"),
    dict(prediction_type="x0", sampler="ancestral", clamp_to_embedding=True),
    dict(given="noisy", order="l2r"), dict(top_k=2, top_p=0.9, temperature=0.0)])
def test_a_network_samples_with_every_option(changes):
    """Under autocast, too."""
    cfg = config(V=7, T=6, d=4, emb_norm=1.0, noise_window=0.4, num_steps=5, **changes)
    torch.manual_seed(0)
    model = dit_variants.Model(cfg)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    for cast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            frames(model, cfg, prompt(6, 5, n=3, T=6, V=7))
