"""Table models, whose every probability can be enumerated, and the exact distributions of what
samplers do with them. Everything here is float64 and shares no code with the scripts it checks.

A masked sequence is a "state": T tokens in 0..V, where V is the mask. States are numbered in
lexicographic order, so the unmasked ones come in the order of `all_rows`.
"""
import numpy as np
import torch
import torch.nn as nn

from oracles import all_rows, chi_square, generator, mean_and_se, row_counts  # noqa: F401


class MaskTable(nn.Module):
    """mdlm's model as a table: logits (states, T, V)."""

    def __init__(self, V=3, T=3, seed=0, scale=1.0):
        super().__init__()
        self.V, self.T, self.states = V, T, all_rows(V + 1, T)
        self.logits = nn.Parameter(scale * torch.randn((V + 1) ** T, T, V, dtype=torch.float64,
                                                       generator=generator(seed)))
        self.place = (V + 1) ** torch.arange(T - 1, -1, -1)

    def forward(self, idx, is_target=None):
        logits = self.logits[(idx * self.place).sum(1)]
        return logits if is_target is None else logits[is_target]

    def p(self):
        """(states, T, V)"""
        return self.logits.detach().softmax(-1)


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


def guided(model, is_given, w):
    """The table of p(. | x)^(1+w) / p(. | x without what is given)^w, renormalised."""
    table, p = MaskTable(model.V, model.T), model.p()
    uncond = p[(model.states.masked_fill(is_given, model.V) * model.place).sum(1)]
    table.logits.data = (p ** (1 + w) / uncond ** w).log()
    return table


# ---- distributions of samplers: products of transition matrices over the states


def transition(model, unmask, remask=0.0):
    """Unmask position i of state a with probability unmask[a, i], independently; remask an
    unmasked one with probability remask, a number or (T,)."""
    is_mask, unmask = model.states == model.V, unmask.double()[..., None]
    keep = nn.functional.one_hot(model.states, model.V + 1).double()
    write = torch.cat((model.p(), torch.zeros(*model.states.shape, 1)), 2)
    mask = torch.zeros_like(keep).index_fill_(2, torch.tensor([model.V]), 1.0)
    remask = torch.as_tensor(remask).double().expand(model.T)[:, None]
    factor = torch.where(is_mask[..., None], unmask * write + (1 - unmask) * keep,
                         (1 - remask) * keep + remask * mask)
    return torch.stack([factor[:, i, model.states[:, i]] for i in range(model.T)]).prod(0)


def confidence(model, order):
    """The score of every position in an order, the highest first: (states, T)."""
    top = model.p().sort(dim=2, descending=True).values
    return {"maxprob": top[..., 0], "margin": top[..., 0] - top[..., 1],
            "entropy": -torch.special.entr(top).sum(2),
            "l2r": -torch.arange(model.T).double().expand(top.shape[:2])}[order]


def first_positions(model, score, count=1):
    """The `count` masked positions of highest score: boolean (states, T)."""
    is_mask = model.states == model.V
    score = score.masked_fill(~is_mask, -torch.inf)
    rank = torch.stack([(score > score[:, i:i + 1]).sum(1) for i in range(model.T)], 1)
    return is_mask & (rank < count)


def unmask_count(model, count, order="random"):
    """Unmask exactly `count` positions: a random subset, or the first of an order."""
    if order != "random":
        return transition(model, first_positions(model, confidence(model, order), count))
    is_mask = model.states == model.V
    count = is_mask.sum(1).clamp(max=count)
    subsets = all_rows(2, model.T).bool()
    fits = (~(subsets[:, None] & ~is_mask)).all(2) & (subsets.sum(1)[:, None] == count)
    share = fits.double() / fits.sum(0)  # (subsets, states)
    return sum(w[:, None] * transition(model, s.expand_as(is_mask)) for s, w in zip(subsets, share))


def unmask_low_confidence(model):
    """Unmask the position whose drawn token is the most likely, by going through all draws."""
    rows, is_mask, p = all_rows(model.V, model.T), model.states == model.V, model.p()
    drawn = p[:, torch.arange(model.T), rows]  # (states, V^T, T)
    weight = torch.where(is_mask[:, None], drawn, 1 / model.V).prod(2)
    pick = drawn.masked_fill(~is_mask[:, None], -1).argmax(2)[..., None]  # (states, V^T, 1)
    rows, states = rows.expand(len(p), -1, -1), model.states[:, None].expand(drawn.shape)
    after = torch.where(is_mask.any(1)[:, None, None],
                        states.scatter(2, pick, rows.gather(2, pick)), states)
    matrix = torch.zeros(len(p), len(p), dtype=torch.float64)
    return matrix.scatter_add(1, (after * model.place).sum(2), weight)


def distribution(model, matrices, start=None):
    """Probability of every finished row (V^T,) after these transitions from `start`: (T,) ids."""
    start = torch.full((model.T,), model.V) if start is None else start
    state = (model.states == start).all(1).double()
    for matrix in matrices:
        state = state @ matrix
    return state[(model.states < model.V).all(1)]


def fixed_order(model, order):
    """Probability of every row when the positions are unmasked in this order: (V^T,)."""
    now = torch.eye(model.T).expand(len(model.states), -1, -1)
    return distribution(model, [transition(model, now[:, i]) for i in order])


def one_by_one(model):
    """Of every order, and of LLaDA's remasking: the distribution of one token a step."""
    steps = {order: unmask_count(model, 1, order) for order in
             ("random", "l2r", "maxprob", "margin", "entropy")}
    steps["low_confidence"] = unmask_low_confidence(model)
    return {order: distribution(model, model.T * [step]) for order, step in steps.items()}


def ancestral(model, rates, sigma_of=lambda t, s: 0.0, num_given=0):
    """The ancestral sampler over the mask rates 0 = rates[0] < ... < rates[N] = 1: unmask so that
    the mask rate at s is s; remask with probability sigma_of(t, s), but none of the first
    `num_given` (ReMDM)."""
    every, wanted = torch.ones(model.states.shape), torch.arange(model.T) >= num_given
    steps = [(t, s, sigma_of(t, s)) for s, t in zip(rates[-2::-1], rates[:0:-1])]
    return [transition(model, every * ((t - s + (1 - t) * sigma) / t), sigma * wanted)
            for t, s, sigma in steps]


# ---- bounds, from the costs of all mask patterns


def pattern_costs(model, x0, V):
    """-log p of the masked tokens of the rows x0 (B, T) under every mask pattern, (2^T, B, T), and
    the patterns, boolean (2^T, T)."""
    patterns = all_rows(2, x0.shape[1]).bool()
    logp = torch.stack([model(x0.masked_fill(m, V)).detach().double().log_softmax(2)
                        .gather(2, x0[..., None])[..., 0] for m in patterns])
    return -logp * patterns[:, None], patterns


def enumerate_nll(model, x0, cfg):
    """By all 2^T mask patterns of the rows x0 (B, T), T <= 12: the NELBO (E4) and the exact -log p
    of the sampler that unmasks one random position at a time, in nats, (B,) each. With A the masked
    set, F({}) = 1, F(A) = 1/|A| sum_{i in A} p(x_i | rest) F(A - i), and p = F(all)."""
    costs, patterns = pattern_costs(model, x0, cfg.vocab_size)
    n, F = patterns.sum(1), torch.ones(costs.shape[:2], dtype=torch.float64)
    weight = 1 / (n.clamp(min=1) * n.bincount()[n]).double()  # 1/n, and the mean over sets of n
    for A in range(1, len(F)):
        F[A] = sum((-costs[A, :, i]).exp() * F[A - 2 ** (x0.shape[1] - 1 - i)]
                   for i in patterns[A].nonzero()[:, 0].tolist()) / n[A]
    return torch.einsum("a,abi->b", weight, costs), -F[-1].log()


def expected_cost(model, gamma):
    """E sum_masked c_i when every position is masked with probability gamma: (V^T,)."""
    costs, patterns = pattern_costs(model, all_rows(model.V, model.T), model.V)
    n = patterns.sum(1).double()
    return (gamma ** n * (1 - gamma) ** (model.T - n)) @ costs.sum(2)


def quadrature(model, gamma_of, rate_of, nodes=60):
    """(E3), the integral over t of rate / gamma * E sum_masked c_i, by Gauss-Legendre: (V^T,)."""
    t, w = map(torch.from_numpy, np.polynomial.legendre.leggauss(nodes))
    t = (t + 1) / 2
    return sum(w[i] / 2 * rate_of(t[i]) / gamma_of(t[i]) * expected_cost(model, gamma_of(t[i]))
               for i in range(nodes))
