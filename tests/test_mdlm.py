"""Masked diffusion: schedules, corruption, bounds and losses against enumeration."""
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import mdlm
from tables import (MaskTable, all_rows, ancestral, expected_cost, generator, law, markov,
                    mean_and_se, one_by_one, oracle, pattern_costs, quadrature, reveal_count, told)

SCHEDULES = ("linear", "cosine", "log-linear", "maskgit", "power2")
ROWS = all_rows(3, 3)


def config(**changes):
    return mdlm.Config(**(dict(vocab_size=3, seq_len=3) | changes))


def exact_bounds(model, rows=ROWS):
    """mdlm.exact for every row: bounds (R,), -log p (R,)."""
    pairs = [mdlm.exact(model, x0, config(seq_len=model.T)) for x0 in rows]
    return torch.stack([b for b, _ in pairs]), torch.stack([q for _, q in pairs])


def close(mean, se, truth, width=5):
    return abs(mean - truth) < width * se + 1e-6


# ---- schedules


@pytest.mark.parametrize("name", SCHEDULES + ("power0.5",))
def test_a_schedule_rises_from_0_to_1_with_its_stated_rate_and_inverse(name):
    """(E1) gamma(0) = 0, gamma(1) = 1; the second function is the derivative of the first."""
    gamma_of, rate_of, inverse = mdlm.get_schedule(name)
    ends = gamma_of(torch.tensor([0, 1], dtype=torch.float64))
    assert torch.allclose(ends, torch.tensor([0, 1], dtype=torch.float64), atol=1e-15)
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    gamma = gamma_of(t)
    assert (gamma.diff() > 0).all()
    rate, = torch.autograd.grad(gamma.sum(), t)
    assert torch.allclose(rate_of(t), rate, atol=1e-12)
    assert torch.allclose(inverse(gamma), t, atol=1e-12)
    assert inverse(ends).tolist() == pytest.approx([0, 1], abs=1e-12)


def test_the_cosine_schedule_keeps_its_digits_at_small_t():
    t = torch.tensor([1e-4, 1e-3, 1e-2])
    true = 1 - torch.cos(math.pi / 2 * t.double())
    error = (mdlm.get_schedule("cosine")[0](t).double() / true - 1).abs()
    naive = ((1 - torch.cos(math.pi / 2 * t)).double() / true - 1).abs()
    assert error.max() < 1e-6 and naive[1] > 5e-3


@pytest.mark.parametrize("name", ["Linear", "power", "power0", "power-1", "powerx"])
def test_an_unknown_schedule_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="linear, cosine.*MD4's cosine is maskgit here"):
        mdlm.get_schedule(name)


@pytest.mark.parametrize("name", ["loglinear", "log_linear"])
def test_an_ambiguous_schedule_is_refused_with_the_naming_clash_explained(name):
    with pytest.raises(ValueError, match="ambiguous.*SEDD and MDLM.*mdlm-loglinear.*elsewhere"):
        mdlm.get_schedule(name)


def test_mdlms_own_schedule_stops_short_of_masking_everything():
    """(E1) (1 - eps) t with eps = 0.001: its weight is 1 / t all the same, its integral is cut."""
    gamma_of, rate_of, inverse = mdlm.get_schedule("mdlm-loglinear")
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    assert torch.allclose(gamma_of(t), 0.999 * t) and torch.allclose(inverse(gamma_of(t)), t)
    assert torch.allclose(rate_of(t) / gamma_of(t), 1 / t)


# ---- draws of t


def test_t_is_spread_evenly_as_promised():
    """systematic and stratified put one t in each of B cells, systematic with one offset;
    antithetic times come in pairs u, 1 - u; iid times do none of this."""
    cells = {how: mdlm.draw_t(13, how, generator(3)) for how in
             ("iid", "stratified", "systematic", "antithetic")}
    assert all(t.shape == (13,) and 0 <= t.min() and t.max() < 1 for t in cells.values())
    for how in ("stratified", "systematic"):
        assert sorted((cells[how] * 13).long().tolist()) == list(range(13))
    gaps = cells["systematic"].sort().values.diff()
    assert torch.allclose(gaps, torch.full((12,), 1 / 13), atol=1e-6)
    assert cells["stratified"].diff().std() > 1e-3
    assert torch.allclose(cells["antithetic"][:6] + cells["antithetic"][7:], torch.ones(6))
    assert sorted((cells["iid"] * 13).long().tolist()) != list(range(13))


@pytest.mark.parametrize("how", ["iid", "stratified", "systematic", "antithetic"])
def test_t_is_uniform(how):
    g = generator(5)
    t = torch.stack([mdlm.draw_t(5, how, g) for _ in range(4000)])
    columns = [t.flatten()] if how == "stratified" else t.T  # row j of stratified has cell j
    assert all(stats.kstest(c.numpy(), "uniform").pvalue > 1e-3 for c in columns)


# ---- corruption


def test_corrupt_masks_and_changes_nothing_else():
    """(E1) M where is_mask, x_0 elsewhere; nothing at t = 0, everything at t = 1."""
    x0 = torch.randint(7, (40, 50), generator=generator(0))
    t = torch.linspace(0, 1, 40)
    for name in SCHEDULES:
        xt, is_mask = mdlm.corrupt(x0, t, config(vocab_size=7, schedule=name), generator(1))
        assert torch.equal(xt == 7, is_mask) and torch.equal(xt[~is_mask], x0[~is_mask])
        assert not is_mask[0].any() and is_mask[-1].all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_corrupt_masks_each_position_at_the_rate_gamma_independently(name):
    """(E1) the count of masks is binomial(T, gamma): 5-sigma rates and a chi-square."""
    t, n = 0.3, 20_000
    gamma = mdlm.get_schedule(name)[0](torch.tensor(t)).item()
    x0 = torch.zeros(n, 4, dtype=torch.long)
    _, is_mask = mdlm.corrupt(x0, torch.full((n,), t), config(schedule=name), generator(2))
    error = is_mask.double().mean(0) - gamma
    assert error.abs().max() < 5 * math.sqrt(gamma * (1 - gamma) / n)
    counts = is_mask.sum(1).bincount(minlength=5).numpy()
    assert stats.chisquare(counts, n * stats.binom(4, gamma).pmf(range(5))).pvalue > 1e-3


def test_corrupt_count_masks_exactly_n_positions_all_subsets_alike():
    """(E4) |A| = n, and each of the C(4, 2) pairs is as likely."""
    n = torch.arange(5).repeat(6000)
    x0 = torch.ones(len(n), 4, dtype=torch.long)
    xt, is_mask = mdlm.corrupt_count(x0, n, config(), generator(3))
    assert torch.equal(is_mask.sum(1), n) and torch.equal(xt == 3, is_mask)
    assert torch.equal(xt[~is_mask], x0[~is_mask])
    pairs = (is_mask[n == 2] * 2 ** torch.arange(4)).sum(1).bincount()
    assert stats.chisquare(pairs[pairs > 0].numpy()).pvalue > 1e-3 and (pairs > 0).sum() == 6


def test_frozen_positions_are_never_masked():
    frozen = torch.rand(200, 9, generator=generator(4)) < 0.4
    x0 = torch.zeros(200, 9, dtype=torch.long)
    _, is_mask = mdlm.corrupt(x0, torch.full((200,), 0.9), config(), generator(5), frozen)
    assert not (is_mask & frozen).any() and is_mask.any()
    _, is_mask = mdlm.corrupt(x0, torch.ones(200), config(), generator(5), frozen)
    assert torch.equal(is_mask, ~frozen)
    n = (~frozen).sum(1) // 2
    _, is_mask = mdlm.corrupt_count(x0, n, config(), generator(5), frozen)
    assert not (is_mask & frozen).any() and torch.equal(is_mask.sum(1), n)


def test_the_same_generator_state_gives_the_same_masks():
    x0, t = torch.zeros(5, 9, dtype=torch.long), torch.full((5,), 0.5)
    for draw in (lambda g: mdlm.corrupt(x0, t, config(), g)[1],
                 lambda g: mdlm.corrupt_count(x0, torch.full((5,), 4), config(), g)[1]):
        assert torch.equal(draw(generator(1)), draw(generator(1)))
        assert not torch.equal(draw(generator(1)), draw(generator(2)))


# ---- bounds


@pytest.mark.parametrize("tilt", [0.0, 1.0])
def test_the_bound_does_not_depend_on_the_schedule(tilt):
    """(E3) one integral for every schedule, also when the network is told the mask rate."""
    model = MaskTable(seed=1, tilt=tilt)
    bounds = [quadrature(model, *mdlm.get_schedule(name)[:2]) for name in SCHEDULES]
    for bound in bounds[1:]:
        assert torch.allclose(bound, bounds[0], rtol=0, atol=1e-9)


def test_the_integral_over_t_is_the_sum_over_counts():
    """(E3) = (E4): quadrature over t against mdlm.exact's sum over all subsets."""
    model = MaskTable(seed=1)
    bound = quadrature(model, *mdlm.get_schedule("cosine")[:2])
    assert torch.allclose(exact_bounds(model)[0], bound, atol=1e-5)


def test_exact_is_the_likelihood_of_the_one_by_one_sampler():
    """(E7) -log p by recursion over subsets = the mean over all T! orders; it sums to one."""
    for T in (2, 3, 4):
        model, rows = MaskTable(T=T, seed=T), all_rows(3, T)
        nll = exact_bounds(model, rows)[1]
        assert torch.allclose((-nll).exp(), one_by_one(model), atol=1e-6)
        assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_the_bound_is_above_the_truth_for_every_row():
    """(E3) NELBO >= -log p, with a real gap for an arbitrary table."""
    bound, nll = exact_bounds(MaskTable(seed=2))
    assert (bound >= nll).all() and (bound - nll).mean() > 0.05


def test_the_bound_is_tight_for_a_network_that_knows_the_true_conditionals():
    """(E4) with the conditionals of a Markov chain: NELBO = -log p = the chain's own -log p."""
    joint = markov(3, 4, seed=1)
    bound, nll = exact_bounds(oracle(joint, 3, 4), all_rows(3, 4))
    assert torch.allclose(bound, -joint.log(), atol=1e-5)
    assert torch.allclose(nll, -joint.log(), atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 16])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_bound_of_n_steps_is_above_the_n_step_sampler_and_tight_for_one(name, steps):
    """(E5) sum over the steps of (gamma_k - gamma_{k-1}) / gamma_k E sum_masked c_i, unbiased."""
    model = MaskTable(seed=3)
    grid = mdlm.get_schedule(name)[0](torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    grid = grid.tolist()
    truth = sum((t - s) / t * expected_cost(model, t) for s, t in zip(grid, grid[1:]))
    p = law(model, ancestral(model, grid))
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    assert (truth >= -p.log() - 1e-12).all()
    row, cfg = 5, config(grid=name)
    draws = mdlm.nelbo_steps(model, ROWS[row].expand(4000, 3), cfg, generator(steps), steps)
    if steps == 1:
        assert torch.allclose(truth, -p.log(), atol=1e-12)
        assert torch.allclose(draws, truth[row].expand(4000), atol=1e-6)
    assert close(draws.mean(), draws.std() / 4000 ** 0.5, truth[row])


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_many_steps_approach_the_continuous_bound_and_law(name):
    """(E5) -> (E3) and the N-step law -> the one-by-one law, about as 1 / N."""
    model, gamma_of = MaskTable(seed=3), mdlm.get_schedule(name)[0]
    far = []
    for steps in (16, 64, 256):
        grid = gamma_of(torch.linspace(0, 1, steps + 1, dtype=torch.float64)).tolist()
        p = law(model, ancestral(model, grid))
        far.append((p - (-exact_bounds(model)[1]).exp()).abs().sum().item() / 2)
    assert far[1] < far[0] / 3 and far[2] < far[1] / 3 and far[2] < 2e-3


def test_nelbo_is_unbiased_and_spreads_less_than_random_t():
    """(E4) K = 8 counts on a comb: mean within 4 standard errors of the enumerated bound, and less
    variance than 8 iid counts, or 8 iid times with Bernoulli masks and weight 1 / t."""
    T, many = 6, 4000
    model = oracle(markov(3, T, seed=2, stick=1.0), 3, T)
    model.requires_grad_(False)
    x0, cfg = torch.zeros(T, dtype=torch.long), config(seq_len=T)
    truth = mdlm.exact(model, x0, cfg)[0].item()
    ours = mdlm.nelbo(model, x0.expand(many, T), cfg, generator(1), K=8)[0]
    g, iid = generator(2), dict(count=0, time=0)
    for how in 8 * ["count", "time"]:
        u = torch.rand(many, generator=g)
        n = 1 + (u * T).long()
        score, edge = torch.rand(many, T, generator=g), u[:, None]
        if how == "count":
            score, edge = score.argsort(1).argsort(1), n[:, None]
        is_mask = score < edge
        logits = model(x0.expand(many, T).masked_fill(is_mask, 3), u)
        c = F.cross_entropy(logits.transpose(1, 2), x0.expand(many, T), reduction="none")
        weight = 1 / u if how == "time" else T / n
        iid[how] = iid[how] + torch.where(is_mask, c, 0).sum(1) * weight / 8
    for draws in (ours, *iid.values()):
        assert close(draws.mean(), draws.std() / many ** 0.5, truth, 4)
    assert ours.var() < 0.6 * iid["count"].var() < 0.6 * iid["time"].var()


@pytest.mark.parametrize("K", [1, 3, 16])
def test_nelbo_visits_every_count_equally_often(K):
    """(E4) also when K does not divide T: unbiased, and more forwards spread less."""
    model, x0 = MaskTable(T=4, seed=4), torch.tensor([2, 0, 1, 1])
    truth = mdlm.exact(model, x0, config(seq_len=4))[0].item()
    draws, info = mdlm.nelbo(model, x0.expand(6000, 4), config(seq_len=4), generator(K), K)
    assert close(draws.mean(), draws.std() / 6000 ** 0.5, truth) and info["forwards"] == K


@pytest.mark.parametrize("tilt", [0.0, 1.0])
def test_the_bound_of_holes_is_the_sum_over_their_subsets(tilt):
    """(E4) given the other tokens, over the subsets of the holes alone, the network told masked /
    T; rows of a batch have different holes; above -log p of filling them one by one."""
    T, many, K = 4, 1500, 3
    model, x0 = MaskTable(T=T, seed=16, tilt=tilt), torch.tensor([2, 0, 1, 1])
    plain = told(model)
    code, patterns = (all_rows(3, T) == x0).all(1).nonzero().item(), all_rows(2, T).bool()
    costs = pattern_costs(plain)[0][:, code]
    holes = patterns[1:]
    draws, info = mdlm.nelbo(model, x0.expand(15 * many, T), config(seq_len=T), generator(K), K,
                             frozen=~holes.repeat_interleave(many, 0))
    assert info["forwards"] == K and (info["n"].view(15, -1).amax(1) == holes.sum(1)).all()
    one = reveal_count(plain, 1)
    for hole, row in zip(holes, draws.view(15, many)):
        N, inside = int(hole.sum()), ~(patterns & ~hole).any(1)
        truth = sum(costs[inside & (patterns.sum(1) == n)].mean().item() / n
                    for n in range(1, N + 1))
        assert close(row.mean(), row.std() / many ** 0.5, truth)
        p = law(plain, N * [one], x0.masked_fill(hole, 3))[code].item()
        assert truth >= -math.log(p) - 1e-12


def test_the_bound_of_holes_is_tight_for_a_network_that_knows_the_true_conditionals():
    """(E4) a Markov chain: -log p(holes | given), to rounding when every count is visited."""
    joint, x0 = markov(3, 4, seed=1), torch.tensor([0, 2, 2, 1])
    model, rows = oracle(joint, 3, 4), all_rows(3, 4)
    for holes in ([False, True, True, False], [True, False, False, False], [False] + [True] * 3):
        hole = torch.tensor(holes)
        given = joint[(rows == x0)[:, ~hole].all(1)].sum()
        want = (given / joint[(rows == x0).all(1)]).log().item()
        draws = mdlm.nelbo(model, x0.expand(4000, 4), config(seq_len=4), generator(1), 6,
                           (~hole).expand(4000, 4))[0]
        assert close(draws.mean(), draws.std() / 4000 ** 0.5, want)


def test_a_row_without_holes_costs_nothing():
    """(E4) -log p(nothing | everything) = 0, beside a row that has a hole."""
    model, x0 = MaskTable(seed=4), torch.zeros(2, 3, dtype=torch.long)
    frozen = torch.tensor([[True, True, True], [True, False, True]])
    nats, _ = mdlm.nelbo(model, x0, config(), generator(1), 4, frozen)
    assert nats[0] == 0 and nats[1] > 0 and not nats.isnan().any()


def test_a_bound_with_nothing_given_is_the_bound():
    """(E4) the same numbers from the same generator."""
    model, x0 = MaskTable(T=4, seed=4), torch.randint(3, (50, 4), generator=generator(1))
    plain, _ = mdlm.nelbo(model, x0, config(seq_len=4), generator(2))
    frozen = torch.zeros(50, 4, dtype=torch.bool)
    assert torch.equal(plain, mdlm.nelbo(model, x0, config(seq_len=4), generator(2), 8, frozen)[0])


# ---- uniform logits


def test_uniform_logits_cost_ln_v_per_token_in_every_likelihood():
    """(E2) (E3) (E4) (E5) the cheapest test of all weights and normalisations."""
    model, T = MaskTable(scale=0), 3
    x0 = torch.randint(3, (4000, T), generator=generator(0))
    want = T * math.log(3)
    assert mdlm.exact(model, x0[0], config()) == pytest.approx((want, want), abs=1e-5)
    nelbo = mdlm.nelbo(model, x0, config(), generator(1))[0]
    assert torch.allclose(nelbo, torch.full_like(nelbo, want), atol=1e-5)
    for name in SCHEDULES:
        bound = mdlm.nelbo_steps(model, x0, config(grid=name), generator(2), 5)
        assert close(bound.mean(), bound.std() / 4000 ** 0.5, want)


@pytest.mark.parametrize("t_sampler", ["iid", "stratified", "systematic", "antithetic"])
@pytest.mark.parametrize("exact_count", [True, False])
def test_uniform_logits_make_every_training_loss_ln_v(exact_count, t_sampler):
    """(E2) ce_seq and ce_batch exactly, nelbo on average, whatever the schedule."""
    model, x0 = MaskTable(scale=0), torch.randint(3, (4096, 3), generator=generator(0))
    for name in SCHEDULES:
        for loss in ("ce_seq", "ce_batch", "nelbo"):
            cfg = config(loss=loss, schedule=name, exact_count=exact_count, t_sampler=t_sampler)
            if loss == "nelbo" and not (exact_count and name == "linear"):
                assert close(*mean_and_se(lambda g: mdlm.loss_fn(model, x0, cfg, g)[0], 8),
                             math.log(3), 6)
            else:
                value = mdlm.loss_fn(model, x0, cfg, generator(1))[0].item()
                assert value == pytest.approx(math.log(3), abs=1e-5)


# ---- training losses


def average_loss(model, x0, cfg, times=30, rows=4000):
    """Mean and standard error of the loss of one row over the noise."""
    batch = x0.expand(rows, len(x0))
    with torch.no_grad():
        return mean_and_se(lambda g: mdlm.loss_fn(model, batch, cfg, g)[0], times)


@pytest.mark.parametrize("exact_count", [True, False])
def test_with_the_linear_schedule_the_plain_mean_per_row_is_the_bound_per_token(exact_count):
    """(E4) ce_seq + linear = NELBO / T without any weight; ce_batch is something else."""
    model, x0 = MaskTable(T=4, seed=5), torch.tensor([0, 2, 1, 2])
    bound = mdlm.exact(model, x0, config(seq_len=4))[0].item() / 4
    mean, se = average_loss(model, x0, config(seq_len=4, exact_count=exact_count))
    assert close(mean, se, bound) and se < 4e-3
    for change in (dict(loss="ce_batch"), dict(schedule="log-linear")):
        cfg = config(seq_len=4, exact_count=exact_count, **change)
        mean, se = average_loss(model, x0, cfg)
        assert abs(mean - bound) > 1e-3 + 5 * se


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("exact_count", [True, False])
def test_the_weighted_loss_is_the_bound_per_token_for_every_schedule(name, exact_count):
    """(E3) Bernoulli masks with weight gamma' / gamma, (E4) exact counts with weight 1 / (T P)."""
    model, x0 = MaskTable(T=4, seed=5), torch.tensor([0, 2, 1, 2])
    bound = mdlm.exact(model, x0, config(seq_len=4))[0].item() / 4
    cfg = config(seq_len=4, loss="nelbo", schedule=name, exact_count=exact_count)
    mean, se = average_loss(model, x0, cfg)
    assert close(mean, se, bound) and se < 1e-2


def test_the_weighted_loss_equals_the_published_formula():
    """(E3) MDLM's: log-probabilities that exclude M and carry visible tokens over, total noise
    sigma = -log(1 - t), weight sigma' / (exp(sigma) - 1); same times and masks."""
    B, T, model = 64, 4, MaskTable(T=4, seed=6)
    x0 = torch.randint(3, (B, T), generator=generator(1))
    cfg = config(seq_len=T, loss="nelbo", exact_count=False, t_sampler="iid")
    loss, _ = mdlm.loss_fn(model, x0, cfg, generator(2))
    g = generator(2)
    t = torch.rand(B, generator=g)
    xt = torch.where(torch.rand(B, T, generator=g) < t[:, None], 3, x0)
    logits = torch.cat((model(xt, t), torch.full((B, T, 1), -torch.inf)), 2)  # never predict M
    logp = logits - logits.logsumexp(2, keepdim=True)
    carry = torch.full_like(logp, -torch.inf).scatter(2, xt[..., None], 0.0)
    logp = torch.where((xt != 3)[..., None], carry, logp)
    sigma, dsigma = -torch.log1p(-t.double()), 1 / (1 - t.double())
    nll = -logp.gather(2, x0[..., None])[..., 0] * (dsigma / torch.expm1(sigma))[:, None]
    assert loss.item() == pytest.approx(nll.mean().item(), rel=2e-6)


@pytest.mark.parametrize("loss", ["ce_seq", "ce_batch", "nelbo"])
@pytest.mark.parametrize("exact_count", [True, False])
def test_no_gradient_reaches_logits_of_visible_positions(loss, exact_count):
    """(E2) only masked positions are predicted; carry-over costs nothing."""
    model, x0 = MaskTable(seed=7), torch.randint(3, (400, 3), generator=generator(1))
    mdlm.loss_fn(model, x0, config(loss=loss, exact_count=exact_count), generator(2))[0].backward()
    masked = model.states == 3
    touched = (model.logits.grad != 0).any(2)
    assert not touched[~masked].any() and touched[masked].float().mean() > 0.9
    assert model.logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["ce_seq", "ce_batch", "nelbo"])
def test_a_batch_without_any_mask_costs_zero_not_nan(loss, monkeypatch):
    model, x0 = MaskTable(), torch.zeros(2, 3, dtype=torch.long)
    for name in SCHEDULES + ("power0.5",):
        monkeypatch.setattr(mdlm, "draw_t", lambda B, how, g: torch.zeros(B))
        cfg = config(loss=loss, schedule=name, exact_count=False)
        value, _ = mdlm.loss_fn(model, x0, cfg, generator(0))
        value.backward()
        assert value.item() == 0 and (model.logits.grad == 0).all()


# ---- the network


def tiny(cond, seed=0):
    torch.manual_seed(seed)
    return mdlm.Model(mdlm.Config(vocab_size=7, seq_len=6, n_layer=2, n_head=2, n_embd=16,
                                  cond=cond))


def shaken(model, seed=1):
    """Weights far from their initial zeros, so that every path is alive."""
    g = generator(seed)
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    return model


CONDITIONS = ("none", "add", "table", "adaln")
XT = torch.randint(8, (5, 6), generator=generator(9))


@pytest.mark.parametrize("cond", CONDITIONS)
def test_conditioning_starts_as_no_conditioning_and_comes_alive(cond):
    """The trunk of an unconditioned model gives the same logits under every cond and mask rate
    while the noise parameters are untouched; afterwards the mask rate matters."""
    plain, model = shaken(tiny("none")), tiny(cond)
    model.load_state_dict(plain.state_dict(), strict=False)
    want = plain(XT, torch.full((5,), 0.5))
    for gamma in (0.02, 0.5, 1.0):
        assert torch.allclose(model(XT, torch.full((5,), gamma)), want, atol=1e-6)
    shaken(model)
    low, high = model(XT, torch.full((5,), 0.1)), model(XT, torch.full((5,), 0.9))
    assert torch.equal(low, high) == (cond == "none")


@pytest.mark.parametrize("cond", CONDITIONS)
def test_every_parameter_learns_within_a_few_steps(cond):
    """No gate is closed behind another: all weights have moved after six optimizer steps."""
    model = tiny(cond)
    cfg = config(vocab_size=7, seq_len=6, lr=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers, g = mdlm.make_optimizers(model, cfg), generator(1)
    x0 = torch.arange(6).expand(16, 6) % 7
    gradients = {}
    for step in range(6):
        mdlm.loss_fn(model, x0, cfg, g)[0].backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        for optimizer in optimizers:
            optimizer.step()
            if step < 5:
                optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert gradients[name] is not None and gradients[name].abs().max() > 0, name
        assert not torch.equal(p, before[name]), name


def test_the_model_starts_uniform():
    """(E2) the head is zero at first: every first loss is ln V."""
    for cond in CONDITIONS:
        assert (tiny(cond)(XT, torch.rand(5)) == 0).all()


def test_masked_logits_look_right_as_well_as_left():
    """(E2) p(. | x_t) at a mask depends on tokens on both sides; `where` only selects."""
    model = shaken(tiny("none"))
    xt, gamma = torch.tensor([[1, 2, 7, 3, 7, 5]]), torch.ones(1)
    logits = model(xt, gamma)
    assert logits.shape == (1, 6, 7)
    for j in (0, 5):
        other = xt.clone()
        other[0, j] = 6
        assert (model(other, gamma)[0, 2] - logits[0, 2]).abs().max() > 1e-3
    assert torch.allclose(model(xt, gamma, xt == 7), logits[xt == 7], atol=1e-6)
