"""The samplers of dit_embed.py and lab/dit_variants.py against exact distributions: chains on a
grid, joint distributions of two and three tokens, what is given, guidance, orders,
self-conditioning, the trajectory."""
import dataclasses

import pytest
import torch

import dit_embed
import gauss_tables
from gauss_tables import (CIRCLE, COIN, JOINT, LINE, THREE, TOKENS, Oracle, alpha_sigma,
                          chain_distribution, evenly)
from lab import dit_variants
from oracles import all_rows, chi_square, generator, marginals, row_counts


def config(*args, script=dit_variants, **changes):
    return gauss_tables.config(script.Config, *args, **changes)


def circle(window=1.0, script=dit_variants, **changes):
    return config(5, -6, 3, 3, 2, noise_window=window, script=script, emb_norm=1.0, **changes)


def three(**changes):
    return Oracle(THREE, CIRCLE, 3, **changes)


def prompt(*ids, n=1, T=3, V=3):
    """n canvases that begin with these tokens."""
    return torch.tensor([[*ids, *(T - len(ids)) * [V]]]).repeat(n, 1)


def frames(model, cfg, x, seed=1, script=dit_variants):
    """The samples from the canvas x (n, T), or so many rows of masks, NFE, and all states that
    on_step saw, (steps, n, T)."""
    x, states = prompt(n=x, T=cfg.seq_len, V=cfg.vocab_size) if isinstance(x, int) else x, []
    out, nfe = script.sample(model, x, cfg, generator(seed),
                             on_step=lambda k, x: states.append(x.clone()))
    return out, nfe, torch.stack(states)


def draw(model, cfg, x, seed=1):
    return frames(model, cfg, x, seed)[0]


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
    got = dit_embed.draw_x0(model, out, z, lam, cfg, generator(1))
    own = model.self_likelihood(z, lam)
    if not temperature:
        assert torch.equal(got, CIRCLE[(out - own).argmax(1)])
        return
    want = ((out - own) / temperature + own).softmax(1)
    assert torch.allclose(drawn[0].softmax(1), want, atol=1e-4)
    hat = dit_variants.draw_x0(model, out, z, lam,
                                  dataclasses.replace(cfg, sampler="ancestral"), None)
    assert torch.allclose(hat, want @ CIRCLE, atol=1e-4)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_vectors_are_sampled_like_tokens(kind):
    """(V1) the same chain whatever is predicted; rounding is by the self-likelihood."""
    cfg = config(6, -5, T=1, num_steps=5, sampler="ancestral")
    one, two = (draw(Oracle(TOKENS, LINE, 1, 0.7, p),
                     dataclasses.replace(cfg, prediction_type=p), 2000) for p in ("logits", kind))
    assert (one == two).float().mean() > 0.99


# ---- two positions and three


@pytest.mark.parametrize("sampler, steps", [("ancestral", 160), ("ddim", 256)])
def test_many_steps_of_an_exact_denoiser_draw_the_rows(sampler, steps):
    """(V2) (V4) within 0.02 of their probabilities, the start at t = 1 included."""
    cfg = config(5, -7, sampler=sampler, num_steps=steps)
    found = row_counts(draw(Oracle(JOINT, LINE, 2), cfg, 4000, 2), 4) / 4000
    assert (found - JOINT).abs().max() < 0.02
    assert (marginals(found, 4, 2) - marginals(JOINT, 4, 2)).abs().max() < 0.02


# ---- what is given


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
    outs, aim = [], dit_variants.draw_x0
    monkeypatch.setattr(dit_variants, "draw_x0",
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


# ---- steps, trajectory


@pytest.mark.parametrize("order", ["random", "maxprob"])
def test_the_trajectory_shows_likely_tokens_and_ends_with_the_sample(order):
    """(E3) one frame an evaluation: given tokens, tokens with half of the probability by the
    self-likelihood, else the mask."""
    model, cfg = three(), circle(0.4, dit_embed, order=order, num_steps=12)
    x, nfe, states = frames(model, cfg, prompt(2, n=8), script=dit_embed)
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
