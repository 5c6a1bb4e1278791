"""The samplers of dit_embed.py against exact laws: chains on a grid, joint laws of two words, what
is given, guidance, clocks, self-conditioning, the trace."""
import dataclasses
import math

import pytest
import torch

import dit_embed
from gauss_tables import (LINE, PLANE, Oracle, alpha_sigma, chain_law, dirichlet, marginals,
                          settings)
from tables import all_rows, chi_square, generator, row_counts

JOINT, WORDS = dirichlet(4, 2), torch.tensor([0.5, 0.2, 0.05, 0.25], dtype=torch.float64)
THREE = dirichlet(3, 3, seed=2)


def config(high=6.0, low=-6.0, V=4, T=2, d=1, **changes):
    return dit_embed.Config(**settings(high, low, V, T, d, **changes))


def plane(window=1.0, **changes):
    return config(5, -6, V=3, T=3, d=2, window=window, **changes)


def three(**kind):
    return Oracle(THREE, PLANE, 3, **kind)


def evenly(high, low, steps):
    return [high + (low - high) * k / steps for k in range(steps + 1)]


# ---- one position: the law of every sampler


KINDS = [dict(sampler="token"), dict(sampler="auto"), dict(sampler="ancestral"),
         dict(sampler="ddim", eta=0.0), dict(sampler="ddim", eta=0.6),
         dict(sampler="ddim", eta=1.0), dict(sampler="ancestral", clamp=True),
         dict(sampler="ancestral", rounding="argmax"),
         dict(sampler="ancestral", rounding="nearest")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: " ".join(map(str, k.values())))
def test_a_sampler_has_the_law_of_its_chain(kind):
    """(E8) (E9) (E10) 12 000 words of a network that errs, in 4 steps, against the same chain on a
    grid: chi-square."""
    model, cfg = Oracle(WORDS, LINE, 1, 0.7), config(1, -5, T=1, sampling_steps=4, **kind)
    E = LINE.double().flatten()

    def decode(z):
        logits = model.one(z, 1.0)
        if cfg.rounding == "nearest":  # the likeliest word by own evidence alone
            logits = model.likelihood(z[:, None], torch.full((len(z),), 1.0))
        return logits.softmax(1) if cfg.rounding == "draw" else \
            torch.nn.functional.one_hot(logits.argmax(1), len(E)).double()

    how = "token" if cfg.sampler == "auto" else cfg.sampler
    law = chain_law(model.one, LINE, evenly(1.0, -5.0, 4), how, cfg.eta if how == "ddim" else 1.0,
                    cfg.clamp, decode, h=0.01 if kind.get("eta") == 0 else 0.04)
    x, info = dit_embed.sample(model, cfg, 12_000, generator(1))
    assert x.shape == (12_000, 1) and info["nfe"] == 5
    assert chi_square(row_counts(x, 4), law / law.sum()) > 1e-3


def test_the_chains_of_different_samplers_differ():
    """The test above can tell them apart."""
    model = Oracle(WORDS, LINE, 1, 0.7)
    laws = [chain_law(model.one, LINE, evenly(1.0, -5.0, 4), *how, h=0.04)
            for how in (("token",), ("ancestral",), ("ddim", 0.0), ("ddim", 0.6),
                        ("ancestral", 1.0, True))]
    for i, p in enumerate(laws):
        for q in laws[:i]:
            assert 12_000 * ((p - q).square() / q).sum() > 15


@pytest.mark.parametrize("sampler", ["token", "ancestral"])
def test_a_position_steps_within_its_window_alone(sampler, monkeypatch):
    """(E2) (E8) its clock fixed at 0.3, w = 0.4, 8 steps: four of them are its own."""
    monkeypatch.setattr(dit_embed, "clocks", lambda shape, *_: torch.full(shape, 0.3))
    model = Oracle(WORDS, LINE, 1, 0.7)
    cfg = config(1, -5, T=1, window=0.4, sampling_steps=8, sampler=sampler)
    lams = [1.0, *(1 - 6 * (t - 0.3) / 0.4 for t in (0.375, 0.5, 0.625)), -5.0]
    x, info = dit_embed.sample(model, cfg, 12_000, generator(1))
    assert chi_square(row_counts(x, 4), chain_law(model.one, LINE, lams, sampler, h=0.04)) > 1e-3
    assert info["nfe"] == 5


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.7])
def test_temperature_is_for_context_alone(temperature, monkeypatch):
    """(E4) softmax(net / temperature + evidence); at 0 the context's likeliest word."""
    model = three(tilt=0.7)
    z, lam = torch.randn(40, 3, 2, generator=generator(1)), torch.linspace(-3, 3, 120).view(40, 3)
    out, seen = model(z, lam).flatten(0, 1), []
    monkeypatch.setattr(dit_embed, "categorical", lambda logits, g: seen.append(logits) or
                        logits.argmax(1))
    z, lam = z.flatten(0, 1), lam.flatten()
    got = dit_embed.aim(model, out, z, lam, plane(temperature=temperature), generator(1))
    ev = model.evidence(z, lam)
    if temperature:
        want = ((out - ev) / temperature + ev).softmax(1)
        assert torch.allclose(seen[0].softmax(1), want, atol=1e-4)
    else:
        assert torch.equal(got, PLANE[(out - ev).argmax(1)])
    hat = dit_embed.aim(model, out, z, lam, plane(temperature=temperature, sampler="ddim"), None)
    if temperature:
        assert torch.allclose(hat, (want @ PLANE), atol=1e-4)


def test_words_without_context_do_not_feel_the_temperature():
    """(E4) a network that knows nothing beyond evidence: uniform samples at every temperature."""
    model = Oracle(torch.full((4,), 0.25).double(), LINE, 1)
    cfg = config(5, -6, T=1, sampling_steps=6, temperature=0.3)
    counts = row_counts(dit_embed.sample(model, cfg, 6000, generator(1))[0], 4)
    assert chi_square(counts, [0.25] * 4) > 1e-3


@pytest.mark.parametrize("param", ["eps", "x0", "v"])
def test_vectors_are_sampled_like_tokens(param):
    """(E5) the same chain whatever the network says; rounding is by own evidence."""
    cfg = config(6, -5, T=1, sampling_steps=5, sampler="ancestral")
    one, two = (dit_embed.sample(Oracle(WORDS, LINE, 1, 0.7, param=p),
                                 dataclasses.replace(cfg, param=p), 2000, generator(1))[0]
                for p in ("logits", param))
    assert (one == two).float().mean() > 0.99
    auto = dataclasses.replace(cfg, param=param, sampler="auto")
    assert torch.equal(two, dit_embed.sample(Oracle(WORDS, LINE, 1, 0.7, param=param), auto, 2000,
                                             generator(1))[0])


# ---- two positions and three


@pytest.mark.parametrize("sampler,steps", [("ancestral", 256), ("ddim", 512)])
def test_many_steps_of_an_exact_denoiser_draw_the_words(sampler, steps):
    """(E8) (E9) single positions within 0.015 of their frequencies, the start at t = 1 included."""
    model, cfg = Oracle(JOINT, LINE, 2), config(5, -7, sampler=sampler, sampling_steps=steps)
    n = 4000
    x, _ = dit_embed.sample(model, cfg, n, generator(2))
    want = marginals(JOINT, 4, 2)
    for i in range(2):
        share = x[:, i].bincount(minlength=4) / n
        assert (share - want[i]).abs().max() < 0.015
    assert (row_counts(x, 4) / n - JOINT).abs().max() < 0.02


@pytest.mark.parametrize("window,clock", [(0.1, "random"), (0.2, "l2r"), (0.3, "maxprob"),
                                          (1.0, "random")])
def test_the_token_sampler_draws_the_joint_law(window, clock):
    """(E2) (E10) an exact denoiser, all orders and windows: chi-square over all rows."""
    model = Oracle(JOINT, LINE, 2)
    cfg = config(5, -7, window=window, clock=clock, sampling_steps=64, sampler="token")
    x, _ = dit_embed.sample(model, cfg, 5000, generator(3))
    assert chi_square(row_counts(x, 4), JOINT) > 1e-3
    alone = marginals(JOINT, 4, 2)
    assert chi_square(row_counts(x, 4), (alone[0][:, None] * alone[1]).flatten()) < 1e-6


def test_one_step_draws_every_word_for_itself():
    """(E10) the product of the marginals: what few steps cost."""
    alone = marginals(JOINT, 4, 2)
    x, _ = dit_embed.sample(Oracle(JOINT, LINE, 2), config(8, -8, sampling_steps=1), 5000,
                            generator(4))
    assert chi_square(row_counts(x, 4), (alone[0][:, None] * alone[1]).flatten()) > 1e-3


def test_ddim_with_full_noise_is_ancestral():
    """(E9) eta = 1: the same rows from the same noise, z after z."""
    one, two = three(tilt=0.7), three(tilt=0.7)
    wide = dict(window=0.5, sampling_steps=7)
    x = dit_embed.sample(one, plane(sampler="ancestral", **wide), 50, generator(1))[0]
    y = dit_embed.sample(two, plane(sampler="ddim", eta=1.0, **wide), 50, generator(1))[0]
    assert torch.equal(x, y)
    for (z, lam, *_), (z2, lam2, *_) in zip(one.calls, two.calls):
        assert torch.allclose(z, z2, atol=1e-4) and torch.equal(lam, lam2)
    zero = dit_embed.sample(two, plane(sampler="ddim", eta=0.0, **wide), 50, generator(1))[0]
    assert not torch.equal(x, zero)


def test_clamped_estimates_lie_on_the_table():
    """Diffusion-LM's trick: every aim is a row of E."""
    model = three()
    z, lam = torch.randn(60, 2, generator=generator(1)), torch.full((60,), -1.0)
    out = model(z.view(20, 3, 2), lam.view(20, 3)).flatten(0, 1)
    free, fixed = (dit_embed.aim(model, out, z, lam, plane(sampler="ancestral", clamp=c), None)
                   for c in (False, True))
    assert torch.cdist(fixed, PLANE).amin(1).max() < 1e-6
    assert torch.equal(fixed, PLANE[torch.cdist(free, PLANE).argmin(1)])
    assert torch.cdist(free, PLANE).amin(1).mean() > 0.1


def test_a_seed_fixes_the_samples():
    for sampler in ("token", "ancestral", "ddim"):
        cfg = plane(0.4, sampler=sampler, sampling_steps=5)
        x, y, z = (dit_embed.sample(three(), cfg, 20, generator(s))[0] for s in (1, 1, 2))
        assert torch.equal(x, y) and not torch.equal(x, z)


# ---- clocks


@pytest.mark.parametrize("clock", ["random", "l2r", "maxprob"])
def test_levels_only_rise_and_every_step_is_asked_for_where_it_is_made(clock):
    """(E2) from the noisy to the clean end; the network is asked for positions on their way."""
    model, cfg = three(tilt=0.7), plane(0.3, clock=clock, sampling_steps=20)
    dit_embed.sample(model, cfg, 30, generator(1))
    levels = torch.stack([lam for _, lam, _, _ in model.calls])
    assert (levels.diff(dim=0) >= -1e-5).all() and (levels[-1] - 5).abs().max() < 1e-5
    for (z, lam, where, _), (after, later, _, _) in zip(model.calls, model.calls[1:]):
        moved = (later > lam + 1e-5)
        assert not (moved & ~where).any()  # no step without an answer
        assert torch.equal((after != z).any(2), moved)  # and noise moves no other position
        if clock != "maxprob":
            assert torch.equal(moved, where)


def test_left_to_right_settles_the_left_first():
    """(E2) l2r: in the levels and in the trace; random clocks do not."""
    for clock in ("l2r", "random"):
        model, trace = three(), []
        cfg = plane(0.25, clock=clock, sampling_steps=24)
        x, _ = dit_embed.sample(model, cfg, 40, generator(1), trace=trace)
        falls = all((lam[:, :-1] >= lam[:, 1:] - 1e-5).all() for _, lam, _, _ in model.calls)
        assert falls == (clock == "l2r")
        frames = torch.stack([ids for _, ids in trace])
        first = ((frames != 3).int().argmax(0)).float().mean(0)
        assert (first.diff() > 2).all() == (clock == "l2r")


def test_maxprob_begins_where_the_network_is_sure():
    """(E2) of words that wait, the surest begins: here the middle is known, the first is a toss of
    three, the last of two."""
    joint = torch.zeros(3, 3, 3).double()
    joint[:, 1, :2] = 1 / 6
    model = Oracle(joint.flatten(), PLANE, 3)
    cfg = plane(0.2, clock="maxprob", sampling_steps=20)
    dit_embed.sample(model, cfg, 50, generator(1))
    begun = torch.stack([lam > -6 + 1e-4 for _, lam, _, _ in model.calls]).int().argmax(0)
    assert (begun[:, 1] < begun[:, 2]).all() and (begun[:, 2] < begun[:, 0]).all()


# ---- what is given


def test_a_prompt_never_changes_and_the_rest_follows_it():
    """Rows begin with the prompt; the others have the law given it, for both kinds of noise."""
    for given in ("clean", "noisy"):
        for prompt in ([1], [0, 2], []):
            cfg = plane(0.3, sampling_steps=60, given=given)
            x, _ = dit_embed.sample(three(), cfg, 1500, generator(1), torch.tensor(prompt).long())
            assert (x[:, :len(prompt)] == torch.tensor(prompt)).all() and x.max() < 3
            fits = (all_rows(3, 3)[:, :len(prompt)] == torch.tensor(prompt)).all(1)
            law = (THREE * fits) / (THREE * fits).sum()
            if given == "clean":
                assert chi_square(row_counts(x, 3), law) > 1e-3
    assert (dit_embed.sample(three(), cfg, 3, generator(1), torch.tensor([2, 1, 0]))[0] ==
            torch.tensor([2, 1, 0])).all()


def test_infilling_keeps_what_is_there():
    """`start` with different holes in every row; the law of a hole is that given its sides."""
    start = torch.tensor([[0, 3, 1], [3, 2, 3], [1, 0, 2], [3, 3, 3]]).repeat(400, 1)
    x, _ = dit_embed.sample(three(), plane(0.3, sampling_steps=40), 1600, generator(1), start=start)
    given = start != 3
    assert torch.equal(x[given], start[given]) and x.max() < 3
    assert (start == 3).sum() == 400 * 6  # the start itself is left alone
    middle = x.view(400, 4, 3)[:, 0, 1].bincount(minlength=3)
    law = THREE.view(3, 3, 3)[0, :, 1]
    assert chi_square(middle, law / law.sum()) > 1e-3


@pytest.mark.parametrize("given", ["clean", "noisy"])
def test_given_words_are_clean_or_noised_as_in_training(given):
    """(E1) (E2) clean: at the clean end from the first call on; noisy: z = alpha e + sigma eps by
    their own clock, with one eps."""
    model, cfg = three(), plane(0.5, sampling_steps=10, given=given)
    dit_embed.sample(model, cfg, 60, generator(1), torch.tensor([1]))
    noise = []
    for z, lam, where, _ in model.calls:
        alpha, sigma = alpha_sigma(lam[:, :1])
        noise.append((z[:, 0] - alpha * PLANE[1]) / sigma)
        assert not where[:, 0].any()
    assert all(torch.allclose(e, noise[0], atol=1e-3) for e in noise)
    assert abs(noise[0].mean()) < 0.4 and noise[0].std() == pytest.approx(1, abs=0.2)
    first = model.calls[0][1][:, 0]
    assert (first - (5 if given == "clean" else -6)).abs().max() < 1e-5
    assert (model.calls[-1][1][:, 0] - 5).abs().max() < 1e-5


def test_a_prompt_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="a prompt of 4 ids in a row of 3"):
        dit_embed.sample(three(), plane(), 2, generator(1), torch.tensor([0, 1, 2, 0]))


# ---- guidance


def test_guidance_adds_what_the_given_text_says(monkeypatch):
    """(E11) out + w (out - out without c): against two calls by hand, where c is replaced by noise
    at the noisy end and the other positions stay as they are."""
    seen, aim = [], dit_embed.aim
    monkeypatch.setattr(dit_embed, "aim",
                        lambda m, out, *rest: seen.append(out) or aim(m, out, *rest))
    for w, given in ((1.5, "clean"), (0.4, "clean"), (1.5, "noisy")):
        model, cfg = three(tilt=0.7), plane(0.5, sampling_steps=6, guidance=w, given=given)
        seen.clear()
        x, info = dit_embed.sample(model, cfg, 25, generator(1), torch.tensor([1]))
        assert info["nfe"] == len(model.calls) and len(model.calls) % 2 == 0
        calls = list(zip(model.calls[::2], model.calls[1::2]))
        for ((z, lam, where, _), (blind, low, there, _)), out in zip(calls, seen):
            assert torch.equal(where, there) and torch.equal(z[:, 1:], blind[:, 1:])
            assert torch.equal(lam[:, 1:], low[:, 1:]) and (low[:, 0] + 6).abs().max() < 1e-5
            alpha, sigma = alpha_sigma(lam[:, :1])
            assert (blind[:, 0] - (z[:, 0] - alpha * PLANE[1]) / sigma).abs().max() < 1e-3
            full, bare = model(z, lam)[where], model(blind, low)[where]
            assert torch.allclose(out, full + w * (full - bare), atol=1e-3)
        assert len(seen) == len(calls) - 1  # the last call rounds
        assert (x[:, 0] == 1).all()


def test_guidance_moves_the_law_towards_what_the_prompt_favours():
    """(E11) more weight, more of the word that the prompt makes likelier than it is elsewhere."""
    lift = (THREE.view(3, 9)[1] / THREE.view(3, 9)[1].sum()).view(3, 3).sum(1) / \
        THREE.view(3, 3, 3).sum((0, 2))
    best, shares = lift.argmax(), []
    for w in (0.0, 1.0, 3.0):
        cfg = plane(0.2, clock="l2r", sampling_steps=24, guidance=w)
        x, _ = dit_embed.sample(three(), cfg, 600, generator(1), torch.tensor([1]))
        shares.append((x[:, 1] == best).float().mean().item())
    assert shares[0] + 0.02 < shares[1] < shares[2] + 0.02


def test_no_second_call_without_guidance_or_without_given_text():
    """(E11) guidance 0, or nothing given: the same samples at one call a step."""
    for prompt, w, calls in ((None, 0.0, 7), (None, 2.0, 7), (torch.tensor([1]), 0.0, 7),
                             (torch.tensor([1]), 2.0, 14)):
        model, cfg = three(), plane(sampling_steps=6, guidance=w)
        _, info = dit_embed.sample(model, cfg, 4, generator(1), prompt)
        assert info == dict(nfe=calls) and len(model.calls) == calls


# ---- calls, steps, trace


def test_sampling_steps_count_calls_and_0_is_one_for_every_token():
    """steps + 1 calls with w = 1; with windows only those in which something moves."""
    for steps, calls in ((1, 2), (5, 6), (0, 4)):
        assert dit_embed.sample(three(), plane(sampling_steps=steps), 3, generator(1))[1] == \
            dict(nfe=calls)
    model = three()
    start = torch.tensor([[0, 1, 3]])
    info = dit_embed.sample(model, plane(0.1, sampling_steps=50), 1, generator(1), start=start)[1]
    assert info["nfe"] == len(model.calls) <= 8


def test_the_trace_shows_what_is_sure_and_ends_with_the_sample():
    """One frame a call: given words, words with half of the probability by own evidence, else V."""
    for clock in ("random", "maxprob"):
        model, trace = three(), []
        cfg = plane(0.4, clock=clock, sampling_steps=12)
        x, info = dit_embed.sample(model, cfg, 8, generator(1), torch.tensor([2]), trace)
        calls, frames = zip(*trace)
        assert calls == tuple(range(1, info["nfe"] + 1))
        frames = torch.stack(frames)
        assert frames.shape == (info["nfe"], 8, 3) and (frames[:, :, 0] == 2).all()
        assert (frames[-1] == x).float().mean() > 0.95
        assert (frames[0][:, 1:] == 3).float().mean() > 0.5 and (frames[-1] < 3).all()
        for (z, lam, _, _), frame in zip(model.calls[1:], frames):
            p, best = model.likelihood(z, lam).softmax(2).max(2)
            clear = (p - 0.5).abs() > 1e-3
            want = torch.where(p < 0.5, 3, best)
            want[:, 0] = 2
            assert torch.equal(frame[clear], want[clear])


# ---- self-conditioning


class Guessing(Oracle):
    """Its answer depends on the guess."""

    def forward(self, z, lam, where=None, guess=None):
        out = super().forward(z, lam, None, guess)
        self.calls[-1] = (z, lam, where, guess)
        if guess is not None:
            out = out + 0.3 * guess @ torch.ones(guess.shape[2], out.shape[2]).cumsum(1)
        return out if where is None else out[where]


def test_the_bound_of_a_self_conditioned_network_is_that_of_two_passes():
    """The answer is a function of z and lam: the second pass sees what the first said."""
    model, x0 = Guessing(THREE, PLANE, 3), all_rows(3, 3)
    for cfg in (plane(0.4, selfcond=0.5), plane(0.4, selfcond=0.0)):
        for bound in (lambda: dit_embed.nelbo(model, x0, cfg, generator(1), 3),
                      lambda: dit_embed.nelbo_steps(model, x0, cfg, generator(1), 5)):
            model.calls.clear()
            bound()
            calls = list(model.calls)
            if not cfg.selfcond:
                assert all(guess is None for *_, guess in calls)
                continue
            assert len(calls) % 2 == 0
            for (z, lam, where, none), (z2, lam2, _, guess) in zip(calls[::2], calls[1::2]):
                assert where is None and none is None
                assert torch.equal(z, z2) and torch.equal(lam, lam2)
                assert torch.allclose(guess, model.mean(model(z, lam)), atol=1e-5)
            z, lam, where, guess = calls[1]
            assert torch.equal(dit_embed.predict(model, z, lam, where, cfg),
                               model(z, lam, where, guess))


def test_training_guesses_as_often_as_asked_and_without_a_gradient():
    """selfcond = share of batches whose second pass sees the first."""
    model, x0, count = Guessing(THREE, PLANE, 3), all_rows(3, 3), 0
    for seed in range(60):
        model.calls.clear()
        dit_embed.loss_fn(model, x0, plane(selfcond=0.3), generator(seed))
        *_, guess = model.calls[-1]
        assert len(model.calls) == 1 + (guess is not None)
        if guess is not None:
            count += 1
            z, lam, _, none = model.calls[0]
            assert none is None and not guess.requires_grad
            assert torch.equal(z, model.calls[1][0])
            assert torch.allclose(guess, model.mean(model(z, lam)), atol=1e-5)
    assert 8 <= count <= 28


@pytest.mark.parametrize("param", ["logits", "eps"])
@pytest.mark.parametrize("prompt", [None, torch.tensor([1])])
def test_a_sampler_hands_its_estimate_to_the_next_call(param, prompt):
    """Zeros first, then emb_hat of the call before, at every position."""
    model = Guessing(THREE, PLANE, 3, param=param)
    cfg = plane(0.5, sampling_steps=6, selfcond=0.5, param=param)
    x, info = dit_embed.sample(model, cfg, 10, generator(1), prompt)
    calls = list(model.calls)
    assert info["nfe"] == len(calls) and (calls[0][3] == 0).all()
    for (z, lam, _, guess), (*_, after) in zip(calls, calls[1:]):
        out = model(z, lam, None, guess)
        assert torch.allclose(after, dit_embed.estimate(model, out, z, lam, cfg), atol=1e-4)
    assert x.max() < 3 and (prompt is None or (x[:, 0] == 1).all())


def test_a_self_conditioned_sampler_takes_the_steps_of_its_second_passes():
    """With an exact network that ignores guesses, self-conditioning changes nothing at all."""
    for clock in ("random", "maxprob"):
        one, two = (dit_embed.sample(three(), plane(0.5, sampling_steps=9, selfcond=s, clock=clock),
                                     40, generator(1))[0] for s in (0.0, 0.5))
        assert torch.equal(one, two)


# ---- the choice of tokens


def test_categorical_draws_the_softmax_and_filters_cut_it():
    """Chi-square; top-k, top-p and temperature on a law by hand."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    draws = dit_embed.categorical(logits.expand(20_000, 4), generator(1))
    assert chi_square(draws.bincount(minlength=4), [0.4, 0.3, 0.2, 0.1]) > 1e-3
    for change, want in ((dict(top_k=2), [4 / 7, 3 / 7, 0, 0]),
                         (dict(top_p=0.65), [4 / 7, 3 / 7, 0, 0]),
                         (dict(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
                         (dict(temperature=0.0), [1, 0, 0, 0])):
        got = dit_embed.filter_logits(logits[None], plane(**change)).softmax(1)[0]
        assert got.tolist() == pytest.approx(want, abs=1e-6)


def test_a_network_of_the_script_samples_with_every_setting():
    """Real ids within the vocabulary, under autocast too."""
    torch.manual_seed(0)
    for change in (dict(), dict(selfcond=0.5, guidance=1.0), dict(clock="maxprob"),
                   dict(param="v", sampler="ddim"), dict(param="x0", clamp=True),
                   dict(given="noisy", clock="l2r"), dict(top_k=2, top_p=0.9, temperature=0.0)):
        cfg = config(V=7, T=6, d=4, emb_norm=1.0, window=0.4, sampling_steps=5, **change)
        model = dit_embed.Model(cfg)
        for p in model.parameters():
            p.data += 0.2 * torch.randn(p.shape)
        for cast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                x, _ = dit_embed.sample(model, cfg, 3, generator(1), torch.tensor([6, 5]))
            assert x.shape == (3, 6) and (x[:, :2] == torch.tensor([6, 5])).all()
            assert 0 <= x.min() and x.max() < 7
    assert math.isfinite(sum(p.sum().item() for p in model.parameters()))
