"""Table models, whose every probability can be enumerated, and the exact laws of what samplers do
with them. Everything here is float64 and shares no code with the scripts it checks.

A masked sequence is a "state": T tokens in 0..V, where V is the mask. States are numbered in
lexicographic order, so the unmasked ones come in the order of `all_rows`.
"""
import itertools

import numpy as np
import torch
import torch.nn as nn
from scipy import stats


def all_rows(V, T):
    """Every row of T tokens: (V^T, T)."""
    return torch.tensor(list(itertools.product(range(V), repeat=T)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class MaskTable(nn.Module):
    """mdlm's model as a table: logits (states, T, V). `tilt` adds gamma times a second table."""

    def __init__(self, V=3, T=3, seed=0, scale=1.0, tilt=0.0):
        super().__init__()
        shape = ((V + 1) ** T, T, V)
        self.V, self.T, self.states = V, T, all_rows(V + 1, T)
        self.logits = nn.Parameter(
            scale * torch.randn(shape, generator=generator(seed), dtype=torch.float64))
        self.tilted = tilt * torch.randn(shape, generator=generator(seed + 1), dtype=torch.float64)
        self.place = (V + 1) ** torch.arange(T - 1, -1, -1)

    def forward(self, xt, gamma, where=None):
        code = (xt * self.place).sum(1)
        logits = self.logits[code] + gamma.double()[:, None, None] * self.tilted[code]
        return logits if where is None else logits[where]

    def p(self, gamma=0.0):
        """(states, T, V)"""
        return (self.logits.detach() + gamma * self.tilted).softmax(-1)


class CausalTable(nn.Module):
    """ar's model as a table: the logits at position j are looked up by the ids up to j. Its
    one "layer" caches the ids that it has read."""
    blocks = (None,)

    def __init__(self, V=3, T=3, seed=0, scale=1.0):
        super().__init__()
        self.V, self.T, g = V, T, generator(seed)
        self.logits = nn.ParameterList(scale * torch.randn(V ** (j + 1), V, generator=g,
                                                           dtype=torch.float64) for j in range(T))

    def forward(self, idx, is_target=None, kv_cache=None):
        code, columns, new = torch.zeros(len(idx), dtype=torch.long), [], idx.shape[1]
        if kv_cache:
            kv_cache[0][:] = [idx := torch.cat((*kv_cache[0], idx), 1)]
        for j in range(idx.shape[1]):
            code = code * self.V + idx[:, j]
            columns.append(self.logits[j][code])
        logits = torch.stack(columns[-new:], 1)
        return logits if is_target is None else logits[is_target]

    def p(self, bos):
        """Probability of every row of T tokens, BOS first: (V^T,)."""
        joint, code = torch.ones(1, dtype=torch.float64), torch.tensor([bos])
        for j in range(self.T):
            joint = (joint[:, None] * self.logits[j].detach()[code].softmax(1)).flatten()
            code = (code[:, None] * self.V + torch.arange(self.V)).flatten()
        return joint


def markov(V, T, seed=0, stick=0.0):
    """Probabilities of all rows under a Markov chain: (V^T,)."""
    g = generator(seed)
    first = torch.rand(V, generator=g, dtype=torch.float64) + 0.1
    step = torch.rand(V, V, generator=g, dtype=torch.float64) + 0.1 + stick * torch.eye(V)
    first, step, rows = first / first.sum(), step / step.sum(1, keepdim=True), all_rows(V, T)
    return first[rows[:, 0]] * step[rows[:, :-1], rows[:, 1:]].prod(1)


def oracle(joint, V, T):
    """The MaskTable that knows p(x_i | visible tokens) of a joint law (V^T,) exactly."""
    model, rows = MaskTable(V, T), all_rows(V, T)
    agree = ((model.states[:, None] == rows) | (model.states[:, None] == V)).all(2)
    weight = agree * joint  # (states, V^T)
    one_hot = nn.functional.one_hot(rows, V).double().flatten(1)
    p = (weight @ one_hot).view(-1, T, V) / weight.sum(1)[:, None, None]
    model.logits.data = p.clamp(min=1e-300).log()
    return model


def told(model):
    """The tilted table without its tilt: each state's own mask rate is written into its logits."""
    plain, rate = MaskTable(model.V, model.T), (model.states == model.V).double().mean(1)
    plain.logits.data = model.logits.detach() + rate[:, None, None] * model.tilted
    return plain


def guided(model, given, w):
    """The table of p(. | x)^(1+w) / p(. | x without the positions `given`)^w, renormalised."""
    plain = told(model)
    p = plain.p()
    bare = p[(model.states.masked_fill(given, model.V) * model.place).sum(1)]
    plain.logits.data = (p ** (1 + w) / bare ** w).log()
    return plain


# ---- laws of samplers: products of transition matrices over the states


def transition(model, chosen, hidden=0.0):
    """Reveal masked position i of state a with probability chosen[a, i], independently; mask
    unmasked position i with probability hidden, a number or (T,)."""
    masked, chosen = model.states == model.V, chosen.double()[..., None]
    keep = nn.functional.one_hot(model.states, model.V + 1).double()
    write = torch.cat((model.p(), torch.zeros(*model.states.shape, 1)), 2)
    mask = torch.zeros_like(keep).index_fill_(2, torch.tensor([model.V]), 1.0)
    hidden = torch.as_tensor(hidden).double().expand(model.T)[:, None]
    factor = torch.where(masked[..., None], chosen * write + (1 - chosen) * keep,
                         (1 - hidden) * keep + hidden * mask)
    return torch.stack([factor[:, i, model.states[:, i]] for i in range(model.T)]).prod(0)


def certainty(model, order):
    """How early a position's turn is: (states, T)."""
    top = model.p().sort(dim=2, descending=True).values
    return {"maxprob": top[..., 0], "margin": top[..., 0] - top[..., 1],
            "entropy": -torch.special.entr(top).sum(2),
            "l2r": -torch.arange(model.T).double().expand(top.shape[:2])}[order]


def first(model, score, count=1):
    """The `count` masked positions of highest score: boolean (states, T)."""
    masked = model.states == model.V
    score = score.masked_fill(~masked, -torch.inf)
    rank = torch.stack([(score > score[:, i:i + 1]).sum(1) for i in range(model.T)], 1)
    return masked & (rank < count)


def reveal_count(model, count, order="random"):
    """Reveal exactly `count` masked positions: a random subset, or the first by their order."""
    if order != "random":
        return transition(model, first(model, certainty(model, order), count))
    masked = model.states == model.V
    count = masked.sum(1).clamp(max=count)
    subsets = all_rows(2, model.T).bool()
    fits = (~(subsets[:, None] & ~masked)).all(2) & (subsets.sum(1)[:, None] == count)
    share = fits.double() / fits.sum(0)  # (subsets, states)
    return sum(w[:, None] * transition(model, s.expand_as(masked)) for s, w in zip(subsets, share))


def reveal_sampled(model):
    """Reveal the masked position whose drawn token is the likeliest, by going through all draws."""
    rows, masked, p = all_rows(model.V, model.T), model.states == model.V, model.p()
    drawn = p[:, torch.arange(model.T), rows]  # (states, V^T, T)
    weight = torch.where(masked[:, None], drawn, 1 / model.V).prod(2)
    pick = drawn.masked_fill(~masked[:, None], -1).argmax(2)[..., None]  # (states, V^T, 1)
    rows, states = rows.expand(len(p), -1, -1), model.states[:, None].expand(drawn.shape)
    after = torch.where(masked.any(1)[:, None, None],
                        states.scatter(2, pick, rows.gather(2, pick)), states)
    matrix = torch.zeros(len(p), len(p), dtype=torch.float64)
    return matrix.scatter_add(1, (after * model.place).sum(2), weight)


def chain(model, order):
    """Probability of every row when the positions are written in this order: (V^T,)."""
    now = torch.eye(model.T).expand(len(model.states), -1, -1)
    return law(model, [transition(model, now[:, i]) for i in order])


def law(model, matrices, start=None):
    """Probability of every finished row (V^T,) after these transitions from `start`: (T,) ids."""
    start = torch.full((model.T,), model.V) if start is None else start
    state = (model.states == start).all(1).double()
    for matrix in matrices:
        state = state @ matrix
    return state[(model.states < model.V).all(1)]


def ancestral(model, grid):
    """The ancestral sampler over the mask rates 0 = grid[0] < ... < grid[N] = 1."""
    masked = torch.ones(model.states.shape)
    return [transition(model, masked * (t - s) / t) for s, t in zip(grid[-2::-1], grid[:0:-1])]


def remasking(model, grid, sigma_of, given=0):
    """ReMDM over the same mask rates: hide a written token with probability sigma_of(t, s), but
    none of the first `given`; reveal a masked one so that the mask rate at s is s."""
    masked, ours = torch.ones(model.states.shape), torch.arange(model.T) >= given
    steps = [(t, s, sigma_of(t, s)) for s, t in zip(grid[-2::-1], grid[:0:-1])]
    return [transition(model, masked * ((t - s + (1 - t) * sigma) / t), sigma * ours)
            for t, s, sigma in steps]


def one_by_one(model):
    """Probability of every row when single positions are revealed in random order, by going
    through all T! orders."""
    rows, p, total = all_rows(model.V, model.T), model.p(), 0
    orders = list(itertools.permutations(range(model.T)))
    for order in orders:
        state, q = torch.full_like(rows, model.V), torch.ones(len(rows), dtype=torch.float64)
        for i in order:
            q = q * p[(state * model.place).sum(1), i, rows[:, i]]
            state[:, i] = rows[:, i]
        total = total + q / len(orders)
    return total


# ---- bounds, from the costs of all mask patterns


def pattern_costs(model, gamma=0.0):
    """Summed -log p of the masked tokens of every row under every mask pattern, (2^T, V^T), and
    the number masked (2^T,)."""
    rows, costs, p = all_rows(model.V, model.T), [], model.p(gamma)
    patterns = all_rows(2, model.T).bool()
    for pattern in patterns:
        code = (rows.masked_fill(pattern, model.V) * model.place).sum(1)
        c = -p[code].gather(2, rows[..., None])[..., 0].log()
        costs.append((c * pattern).sum(1))
    return torch.stack(costs), patterns.sum(1)


def expected_cost(model, gamma):
    """E sum_masked c_i when every position is masked with probability gamma: (V^T,)."""
    costs, n = pattern_costs(model, gamma)
    n = n.double()
    return (gamma ** n * (1 - gamma) ** (model.T - n)) @ costs


def quadrature(model, gamma_of, rate_of, nodes=60):
    """The integral over t of rate / gamma * E sum_masked c_i by Gauss-Legendre: (V^T,)."""
    t, w = np.polynomial.legendre.leggauss(nodes)
    t, w = torch.from_numpy((t + 1) / 2), torch.from_numpy(w / 2)
    return sum(w[i] * rate_of(t[i]) / gamma_of(t[i]) * expected_cost(model, gamma_of(t[i]))
               for i in range(nodes))


# ---- statistics


def chi_square(counts, law):
    """p-value of counts under a law; rare outcomes are put together."""
    counts, law = np.asarray(counts, float), np.asarray(law, float)
    assert abs(law.sum() - 1) < 1e-6
    expected = law / law.sum() * counts.sum()
    assert counts[expected < 1e-9].sum() == 0, "an impossible outcome was drawn"
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 1e-9
    return stats.chisquare(counts[keep], expected[keep] * (counts.sum() / expected.sum())).pvalue


def row_counts(x, V):
    """How often each row of `all_rows` occurs in samples x (n, T): (V^T,)."""
    place = V ** torch.arange(x.shape[1] - 1, -1, -1)
    return (x * place).sum(1).bincount(minlength=V ** x.shape[1])


def mean_and_se(draw, times):
    """Mean of draw(generator) over seeds, and its standard error."""
    values = np.array([draw(generator(seed)).item() for seed in range(times)])
    return values.mean(), values.std(ddof=1) / np.sqrt(times)
