"""Bit diffusion of tiny joint distributions, where Bayes' rule is written out: exact posteriors,
samplers as products of transition matrices over all bit states, bounds by enumeration and
quadrature. Everything is float64 inside and shares no code with bit_diffusion.py.

A word is one of the 2^K strings of K bits of +-1, numbered as binary digits, the highest first; a
state is a word for each position, numbered in the order of oracles.all_rows. Noise levels are the
log-odds `lam` that a noisy bit is right, (T,) where positions differ; CLEAN and above is no noise.
`joint` (V^T,) holds the probabilities of all rows of tokens.
"""
import itertools
import math
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from oracles import all_rows, generator, legendre

CLEAN = 40.0
LOST = {"linear": lambda t: t, "cosine": lambda t: 1 - math.cos(math.pi * t / 2) ** 2,
        "quadratic": lambda t: t * t}  # 1 - agreement


def words(K):
    """All strings of K bits: (2^K, K) of +-1."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=K)), dtype=torch.float64)


def numbers(V, order=None):
    """The word of each token: the n-th token of `order` has word n."""
    return torch.arange(V) if order is None else torch.as_tensor(order).argsort()


def width(V):
    return next(K for K in range(1, 99) if 2 ** K >= V)


def settings(V=4, T=2, **changes):
    """Fields of a Config: a tiny network, the usual process, the sampler of the bound."""
    return dict(vocab_size=V, seq_len=T, rows="stream", n_layer=1, n_head=2, n_embd=16,
                noise_window=1.0, order="random", num_steps=0, temperature=1.0) | changes


class Oracle(nn.Module):
    """The model for a joint distribution: the exact log p(x_i = v | all bits, all levels), or for
    head bit the exact log-odds of each bit. `tilt` adds a smooth function of all bits: a worse
    network. Head mix is a bit head whose context is such a function alone, two products mixed, and
    whose own bits enter by Bayes' rule. It keeps its inputs: calls (bits, lam, is_target)."""

    def __init__(self, joint, V, T, head="token", tilt=0.0, order=None):
        super().__init__()
        self.V, self.T, self.K, self.head, self.tilt, self.calls = V, T, width(V), head, tilt, []
        self.cfg = SimpleNamespace(head="token" if head == "token" else "bit", loss="ce",
                                   num_mixture=1 + (head == "mix"))
        self.joint, self.rows, self.number = joint, all_rows(V, T), numbers(V, order)
        self.exact = words(self.K)[self.number]
        self.register_buffer("codes", self.exact.float())
        self.one_hot = F.one_hot(self.rows, V).double().flatten(1)
        g, shape = generator(7), {"token": (V,), "bit": (self.K,), "mix": (2, self.K + 1)}[head]
        self.wave = torch.randn(T * self.K, T, *shape, generator=g, dtype=torch.float64)
        self.phase = 6 * torch.rand(T, *shape, generator=g, dtype=torch.float64)

    def likelihood(self, bits, lam):
        """log q(bits | v): (..., V). A bit b is right, b = C, with log-odds lam."""
        odds = lam.double()[..., None, None] * bits.double()[..., None, :] * self.exact
        return F.logsigmoid(odds).sum(-1)

    def self_likelihood(self, bits, lam):
        return self.likelihood(bits, lam).float()

    def answer(self, bits, lam, temperature=1.0):
        """The outputs, float64; a temperature is for all but the self-likelihood."""
        wave = torch.tensordot(bits.double().flatten(1), self.wave, 1) + self.phase
        if self.head == "mix":
            odds, weight = (2 * wave.cos() / temperature).split((self.K, 1), 3)
            own = lam.double()[..., None, None] * bits.double()[:, :, None]
            seen = F.logsigmoid(odds) + F.logsigmoid(own), F.logsigmoid(-odds) + F.logsigmoid(-own)
            seen = torch.logaddexp(*seen).sum(3, True)  # log p(own bits | product)
            return torch.cat((odds + own, weight + seen), 3)
        log = self.likelihood(bits, lam)[:, torch.arange(self.T), self.rows].sum(2)
        each = (log + self.joint.clamp(min=1e-300).log()).softmax(1) @ self.one_hot
        each = each.view(*bits.shape[:2], self.V).clamp(min=1e-300)
        out, own = each.log(), self.likelihood(bits, lam)
        if self.head == "bit":
            out, own = odds_of(each, self.exact), lam.double()[..., None] * bits.double()
        return (out + self.tilt * wave.cos() - own) / temperature + own

    def odds(self, bits, lam, temperature=1.0):
        """(B, T, K) log-odds of bits"""
        out = self.answer(bits, lam, temperature)
        if self.head == "bit":
            return out
        if self.head == "token":
            return odds_of(out.softmax(2), self.exact)
        weight, p = self.predictions(bits, lam, temperature)
        return odds_of((weight[..., None] * p).sum(2), words(self.K))

    def predictions(self, bits, lam, temperature=1.0, single=False):
        """Distributions of words (B, T, R, 2^K) and their weights (B, T, R): of whole tokens, or
        products; `single`: of bits drawn one by one."""
        out, n = self.answer(bits, lam, temperature), 2 ** self.K
        if single:
            p = independent(self.odds(bits, lam, temperature))
        elif self.head == "mix":
            return out[..., -1].softmax(2), independent(out[..., :-1])
        elif self.head == "token":
            p = out.softmax(2) @ F.one_hot(self.number, n).double()
        else:
            p = independent(out)
        return torch.ones(*p.shape[:2], 1).double(), p[:, :, None]

    def forward(self, bits, lam, is_target=None):
        self.calls.append((bits.clone(), lam.clone(), is_target))
        out = self.answer(bits, lam).float()
        return out if is_target is None else out[is_target]


def odds_of(p, codes):
    """Log-odds that a bit is +1 under probabilities of tokens: (..., V), (V, K) -> (..., K)."""
    ones = (codes > 0).double()
    return (p @ ones).log() - (p @ (1 - ones)).log()


def independent(odds):
    """Distribution of words whose bits are independent: (..., K) -> (..., 2^K)."""
    return F.logsigmoid(odds[..., None, :] * words(odds.shape[-1])).sum(-1).exp()


# ---- the forward process and its posterior, by Bayes' rule


def right(lam):
    """Probability that a bit is right."""
    return 1.0 if lam >= CLEAN else 1 / (1 + math.exp(-float(lam)))


def posterior(lam_t, lam_s):
    """q(b_s | b_t, b_0) as a table [b_t, b_0, b_s], each 0 or 1: Bayes' rule, where b_t is b_s with
    its own flips, as many as bring the agreement from that of s to that of t."""
    a_t, a_s = 2 * right(lam_t) - 1, 2 * right(lam_s) - 1
    table = torch.zeros(2, 2, 2, dtype=torch.float64)
    for b_t, b_0, b_s in itertools.product((0, 1), repeat=3):
        to_s = (1 + a_s) / 2 if b_s == b_0 else (1 - a_s) / 2
        to_t = (1 + a_t / a_s) / 2 if b_t == b_s else (1 - a_t / a_s) / 2
        table[b_t, b_0, b_s] = to_s * to_t
    return table / table.sum(2, keepdim=True)


def word_posterior(K, lam_t, lam_s):
    """q(word at s | word at t, clean word): (2^K, 2^K, 2^K)."""
    table, bit = posterior(lam_t, lam_s), (words(K) > 0).long()
    return table[bit[:, None, None], bit[:, None], bit].prod(3)


def channel(K, lam):
    """q(word | clean word): (2^K clean, 2^K)."""
    same = words(K)[:, None] == words(K)
    return torch.where(same, right(lam), 1 - right(lam)).double().prod(2)


def rows_channel(model, lam):
    """q(state | row) at the levels lam (T,): (R, S)."""
    here, goal = all_rows(2 ** model.K, model.T), model.number[model.rows]
    return torch.stack([channel(model.K, lam[i])[goal[:, i]][:, here[:, i]]
                        for i in range(model.T)]).prod(0)


def level(lost):
    """Log-odds of a bit at 1 - agreement."""
    return CLEAN if lost <= 0 else max(0.0, math.log((2 - lost) / lost))


def levels(t, tau, window, schedule):
    """The levels of positions with times tau, (T,), at time t."""
    own = [min(1.0, max(0.0, (t - c) / window)) for c in tau]
    return torch.tensor([level(LOST[schedule](u)) for u in own], dtype=torch.float64)


def path(steps, T, tau=None, window=1.0, schedule="quadratic"):
    """The levels of a chain, from noise to clean: steps + 1 tensors (T,)."""
    return [levels(k / steps, tau or [0.0] * T, window, schedule) for k in range(steps, -1, -1)]


# ---- chains over all bit states


def tokens_only(p, V, invalid):
    """What becomes of the words of no token in a distribution of words (..., 2^K); none: they
    stay."""
    n = p.shape[-1]
    if invalid == "project":
        p = p * (torch.arange(n) < V)
        return p / p.sum(-1, keepdim=True)
    return p if invalid == "none" else p @ F.one_hot(torch.arange(n) % V, n).double()


def reverse(model, lam_t, lam_s, kind, invalid="project", temperature=1.0):
    """p(word at s | state at t) of each position: (S, T, 2^K), and the number of positions that
    become the word of no token (S,). kind: token, a token drawn, or one product of a mixture; bit,
    bits drawn one by one."""
    n, T, K = 2 ** model.K, model.T, model.K
    here = all_rows(n, T)
    state, lam = words(K)[here], lam_t.expand(len(here), T)
    weight, each = model.predictions(state, lam, temperature, kind != "token")
    p = (weight[..., None] * each).sum(2)
    last = (weight[..., None] * tokens_only(each, model.V, invalid)).sum(2)
    out, lost = F.one_hot(here, n).double(), torch.zeros(len(here), dtype=torch.float64)
    for i in range(T):
        if lam_s[i] <= lam_t[i]:
            continue
        if lam_s[i] >= CLEAN:
            lost += p[:, i, model.V:].sum(1)
            out[:, i] = last[:, i]
        else:
            out[:, i] = torch.einsum("sc,scd->sd", p[:, i],
                                     word_posterior(K, lam_t[i], lam_s[i])[here[:, i]])
    return out, lost


def chain(model, levels, kind, invalid="project", temperature=1.0):
    """Probability of each row after these steps from uniform bits, (V^T,), and the expected share
    of positions that came out as the word of no token."""
    here = all_rows(2 ** model.K, model.T)
    p, lost = torch.full((len(here),), 1 / len(here), dtype=torch.float64), 0.0
    for lam_t, lam_s in zip(levels, levels[1:]):
        out, bad = reverse(model, lam_t, lam_s, kind, invalid, temperature)
        lost += (p @ bad).item() / model.T
        p = p @ torch.stack([out[:, i][:, here[:, i]] for i in range(model.T)]).prod(0)
    place = (2 ** model.K) ** torch.arange(model.T - 1, -1, -1)
    return p[(model.number[model.rows] * place).sum(1)], lost


def chain_bound(model, levels, kind, invalid="project"):
    """The bound of these steps for each row, by going through all states: (V^T,)."""
    n, K = 2 ** model.K, model.K
    here, goal = all_rows(n, model.T), model.number[model.rows]  # (S, T), (R, T)
    total = torch.zeros(len(goal), dtype=torch.float64)
    for lam_t, lam_s in zip(levels, levels[1:]):
        out, _ = reverse(model, lam_t, lam_s, kind, invalid)
        for i in range(model.T):
            if lam_s[i] <= lam_t[i]:
                continue
            true = torch.eye(n).double().expand(n, n, n) if lam_s[i] >= CLEAN else \
                word_posterior(K, lam_t[i], lam_s[i])
            true, ours = true[here[:, i]][:, goal[:, i]], out[:, i][:, None]  # (S, R, n)
            kl = (torch.special.xlogy(true, true) - torch.special.xlogy(true, ours)).sum(2)
            total += (rows_channel(model, lam_t) * kl.T).sum(1)
    return total


def path_bound(model, window=1.0, schedule="quadratic", nodes=24):
    """The bound of infinitely many steps for each row, (V^T,), when the times of the T positions
    are (1 - window) / T apart, in random order: written in the agreement a, by quadrature."""
    K, T, state = model.K, model.T, words(model.K)[all_rows(2 ** model.K, model.T)]
    clean = words(K)[model.number[model.rows]]
    orders, total = list(itertools.permutations(range(T))), torch.zeros(len(clean)).double()
    for order in orders if window < 1 else orders[:1]:
        tau = [(1 - window) * rank / T for rank in order]
        cuts = sorted({c for x in tau for c in (x, x + window)})
        for (low, high), (x, w) in itertools.product(zip(cuts, cuts[1:]), legendre(nodes)):
            w = 2 * x * w  # denser where a window begins: t = x^2
            t = low + (high - low) * x * x
            lam = levels(t, tau, window, schedule)
            q = rows_channel(model, lam)
            plus = model.odds(state, lam.expand(len(state), T)).sigmoid()
            for i, u in enumerate((t - c) / window for c in tau):
                if not 0 < u < 1:
                    continue
                a, h = 1 - LOST[schedule](u), 1e-6 * min(u, 1 - u)
                rate = (LOST[schedule](u + h) - LOST[schedule](u - h)) / (2 * h) / window
                b = state[:, i]
                stays = torch.where(b > 0, plus[:, i], 1 - plus[:, i])
                guess = stays * (1 - a) / (1 + a) + (1 - stays) * (1 + a) / (1 - a)
                y = a * b * clean[:, None, i]
                true = (1 - y) / (1 + y)  # (R, S, K)
                nats = (guess - true + true * (true / guess).log()).sum(2)
                total += (q * nats).sum(1) * rate / (2 * a) * w * (high - low)
    return total / (len(orders) if window < 1 else 1)
