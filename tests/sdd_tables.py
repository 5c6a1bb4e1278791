"""Sparse distribution diffusion on tiny joint distributions, where Bayes' rule can be written out:
exact posteriors for any state, bounds and distributions of samplers by quadrature. Everything is
float64 inside and shares no code with sdd.py.

`joint` (V^T,) holds the probabilities of all rows of tokens; log theta (..., T, V) what z says of
every position. A precision is a number, 0 for an unknown position, inf for a clean one. The
quadratures are for V = 2, where z is one number a position, d = z_0 - z_1: of token 0 it is
Normal(prec, 2 prec), of token 1 Normal(-prec, 2 prec), theta = (1 / (1 + e^-d), 1 / (1 + e^d)).
"""
import itertools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from oracles import all_rows, generator, hermite, legendre

LEVEL = {"exponential": lambda t: -math.log(t), "rational": lambda t: 1 / t - 1}
TIME = {"exponential": lambda s: math.exp(-s), "rational": lambda s: 1 / (1 + s)}  # their inverses
FAR = 600.0  # d of a clean position


def unit(V):
    """A schedule's unit of precision."""
    return max(8.0, 2 * math.log(V))


def settings(V=4, T=2, **changes):
    """Settings of the tests: a small network, all tokens are candidates, one step a token."""
    return dict(vocab_size=V, seq_len=T, rows="stream", eos=0, n_layer=1, n_head=2, n_embd=16, k=V,
                noise_window=1.0, sampler="token", order="random", remask="none", num_steps=0,
                temperature=1.0) | changes


def believed(ids, logp, V):
    """log theta (B, T, V) of states ids (B, T, K), logp (B, T, K + 1): candidates have what is
    written, all others share the rest, nobody knows anything of an unknown position."""
    K, p = ids.shape[2], logp.double().exp()
    spread = p[..., -1:] / max(1, V - K)
    theta = torch.zeros(*ids.shape[:2], V, dtype=torch.float64)
    named = torch.zeros_like(theta).scatter(2, ids, 1.0) > 0
    theta = theta.scatter_add(2, ids, p[..., :-1]) + spread * ~named
    theta = torch.where(logp[..., -1:] == 0, 1 / V, theta)
    return theta.clamp(min=1e-300).log()


class Oracle(nn.Module):
    """sdd's model for a joint distribution: what the other positions say of x_i, exactly. `tilt`
    adds a smooth function of all positions: a worse network. It keeps what it was shown: calls
    (ids, logp, is_target)."""

    def __init__(self, joint, V, T, tilt=0.0, k=0):
        super().__init__()
        self.joint, self.V, self.T, self.tilt, self.k = joint, V, T, tilt, k or V
        self.rows, g = all_rows(V, T), generator(7)
        self.one_hot = F.one_hot(self.rows, V).double().flatten(1)  # (V^T, T V)
        self.wave = 1.5 * torch.randn(T * V, T, V, generator=g, dtype=torch.float64)
        self.phase = 6 * torch.rand(T, V, generator=g, dtype=torch.float64)
        self.place = nn.Parameter(torch.zeros(()))  # a device
        self.calls = []

    def context(self, theta):
        """log theta (B, T, V) -> the network's logits, (B, T, V)."""
        each = theta.flatten(1) @ self.one_hot.T + self.joint.clamp(min=1e-300).log()  # (B, V^T)
        each = (each - each.amax(1, keepdim=True)).exp() @ self.one_hot
        net = each.clamp(min=1e-290).log().view(theta.shape) - theta
        if self.tilt:
            net = net + self.tilt * (torch.tensordot(theta.exp().flatten(1), self.wave, 1)
                                     + self.phase).cos()
        return net

    def answer(self, theta):
        """Logits of the whole distribution of every token: (B, T, V)."""
        return self.context(theta) + theta

    def forward(self, ids, logp, is_target):
        self.calls.append((ids.clone(), logp.clone(), is_target))
        return self.context(believed(ids, logp, self.V)).float()[is_target]


# ---- quadrature for two tokens


def log_theta(d):
    """(..., T) -> (..., T, 2)"""
    return torch.stack((F.logsigmoid(d), F.logsigmoid(-d)), -1)


def noisy_rows(model, s, n):
    """d (R, n^T, T) of every row when positions have precisions s (T,), and weights (n^T,)."""
    xi, weight = hermite(n, model.T)
    sign = 1.0 - 2 * model.rows  # (R, T)
    finite = torch.tensor([x if x < math.inf else 0.0 for x in s], dtype=torch.float64)
    d = (sign * finite)[:, None] + (2 * finite).sqrt() * xi
    clean = torch.tensor([x == math.inf for x in s])
    return torch.where(clean, FAR * sign[:, None], d), weight


def nats(model, s, n=36):
    """1/2 E |e_x - p_i|^2 of all rows and positions at precisions s (T,): (R, T)."""
    d, weight = noisy_rows(model, s, n)
    p = model.answer(log_theta(d.flatten(0, 1))).softmax(-1).view(*d.shape, 2)
    wrong = p.gather(-1, (1 - model.rows)[:, None, :, None].expand(*d.shape, 1))[..., 0]
    return (weight[:, None] * wrong.square()).sum(1)  # of two tokens |e - p|^2 = 2 wrong^2


def path_bound(model, window=1.0, schedule="rational", nodes=20, n=36):
    """(E6) for every row, (2^T,), when the times of the T positions are (1 - window) / T apart, in
    random order: integrals over the precision of one position after the other."""
    T, one = model.T, unit(2)
    total = torch.zeros(2 ** T, dtype=torch.float64)
    orders = list(itertools.permutations(range(T))) if window < 1 else [tuple(range(T))]
    for order, i in itertools.product(orders, range(T)):
        tau = [(1 - window) * rank / T for rank in order]

        def own(s, j):
            """Precision of position j when that of i is s."""
            t = (tau[i] - tau[j]) / window + TIME[schedule](s / one)
            return math.inf if t <= 1e-12 else one * LEVEL[schedule](min(1.0, t))
        cuts = {0.0, 100.0}  # where another position begins or ends
        for j, edge in itertools.product(range(T), (0.0, 1.0)):
            t = (tau[j] - tau[i]) / window + edge
            if 0 < t < 1:
                cuts.add(min(100.0, one * LEVEL[schedule](t)))
        cuts = sorted(cuts)
        for low, high in zip(cuts, cuts[1:]):
            low, high = low ** 0.5, high ** 0.5
            for x, w in legendre(nodes):
                root = low + (high - low) * x
                s = [root * root if j == i else own(root * root, j) for j in range(T)]
                total += nats(model, s, n)[:, i] * 2 * root * (high - low) * w / len(orders)
    return total


def path(steps, T, tau=None, window=1.0, schedule="rational"):
    """The precisions of a chain, from nothing to clean: steps + 1 lists of T."""
    own = [[min(1.0, max(0.0, (k / steps - c) / window)) for c in tau or [0.0] * T]
           for k in range(steps, -1, -1)]
    return [[unit(2) * LEVEL[schedule](t) if t > 0 else math.inf for t in row]
            for row in own]


def chain_bound(model, levels, sampler, n=36):
    """The bound of a sampler of these steps for every row: (2^T,)."""
    node, share = hermite(n)
    node = node[:, 0]
    total = torch.zeros(2 ** model.T, dtype=torch.float64)
    for s, then in zip(levels, levels[1:]):
        d, weight = noisy_rows(model, s, n)
        p = model.answer(log_theta(d.flatten(0, 1))).softmax(-1).view(*d.shape, 2)
        right = p.gather(-1, model.rows[:, None, :, None].expand(*d.shape, 1))[..., 0]
        for i in range(model.T):
            a = then[i] - s[i] if s[i] < math.inf else 0.0
            q = right[..., i]
            if a == math.inf:
                cost = -q.log()
            elif a > 0 and sampler == "token":  # exp(d) of the other token over the true one
                other = (-a + math.sqrt(2 * a) * node).exp()
                cost = -((q[..., None] + (1 - q[..., None]) * other).log() * share).sum(-1)
            else:
                cost = a * (1 - q).square()
            total += (cost * weight).sum(1)
    return total


def chain_distribution(model, levels, sampler, n=40):
    """Distribution of the rows that a sampler draws by these steps: (2^T,). Particles d (P, T) of
    weights (P,) branch at every step, so few steps and positions are possible."""
    T = model.T
    d, weight = torch.zeros(1, T).double(), torch.ones(1).double()
    for s, then in zip(levels, levels[1:]):
        p = model.answer(log_theta(d)).softmax(-1)  # (P, T, 2)
        for i in range(T):
            if then[i] <= s[i]:
                continue
            a, now, chance, moved = then[i] - s[i], d[:, i], p[:, i], None
            if a == math.inf:
                if sampler == "deterministic":
                    chance = F.one_hot(chance.argmax(1), 2).double()
                step, share = torch.tensor([FAR, -FAR]).double().expand(len(d), 2), chance
            elif sampler == "deterministic":
                gap = chance[:, 0] - chance[:, 1]
                if s[i] == 0:
                    u = (torch.arange(900).double() + 0.5) / 900
                    xi = math.sqrt(2) * torch.special.erfinv(2 * u - 1)
                    step = then[i] * gap[:, None] + math.sqrt(2 * then[i]) * xi
                    share = torch.full_like(step, 1 / 900)
                else:
                    step = (then[i] * gap + math.sqrt(then[i] / s[i]) * (now - s[i] * gap))[:, None]
                    share = torch.ones_like(step)
            else:
                xi, w = hermite(n)
                spread = now[:, None] + math.sqrt(2 * a) * xi[:, 0]
                if sampler == "ancestral":
                    step, share = spread + a * (chance[:, :1] - chance[:, 1:]), w.expand_as(spread)
                else:
                    step = torch.cat((spread + a, spread - a), 1)
                    share = torch.cat((chance[:, :1] * w, chance[:, 1:] * w), 1)
            many = step.shape[1]
            d, weight, p = (y.repeat_interleave(many, 0) for y in (d, weight, p))
            moved = step.flatten()
            d[:, i], weight = moved, weight * share.flatten()
    place = 2 ** torch.arange(T - 1, -1, -1)
    code = ((d < 0).long() * place).sum(1)
    return torch.zeros(2 ** T).double().index_add(0, code, weight)
