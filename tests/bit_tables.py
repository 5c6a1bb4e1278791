"""Bit-flip diffusion on tiny joint laws, where Bayes' rule can be written out: exact posteriors,
exact laws of samplers as products of transition matrices over all bit states, bounds by enumeration
and quadrature. Everything is float64 inside and shares no code with bit_diffusion.py.

A word is one of the 2^K strings of K bits of +-1, numbered as binary digits, the highest first; a
state is a word for every position, numbered in the order of tables.all_rows. A level is the
log-odds `lam` that a noisy bit is right, (T,) where positions differ; CLEAN and above is no noise.
`joint` (V^T,) holds the probabilities of all rows of tokens.
"""
import itertools
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from tables import all_rows, generator

CLEAN = 40.0
LOST = {"linear": lambda t: t, "cosine": lambda t: 1 - math.cos(math.pi * t / 2) ** 2,
        "quadratic": lambda t: t * t}  # 1 - agreement


def words(K):
    """All strings of K bits: (2^K, K) of +-1."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=K)), dtype=torch.float64)


def numbers(V, order=None):
    """The word of every token: the n-th token of `order` has word n."""
    at = torch.empty(V, dtype=torch.long)
    for n, v in enumerate(range(V) if order is None else order):
        at[v] = n
    return at


def width(V):
    return next(K for K in range(1, 99) if 2 ** K >= V)


def dirichlet(V, T, seed=0, share=0.4):
    """A random joint law of rows: (V^T,)."""
    return torch.from_numpy(np.random.RandomState(seed).dirichlet(np.full(V ** T, share)))


def entropy(law):
    return torch.special.entr(law).sum().item()


def settings(V=4, T=2, **changes):
    """Every field of a Config that these tests depend on."""
    return dict(vocab_size=V, seq_len=T, rows="stream", eos=0, bos=0, seed=1, n_layer=1, n_head=2,
                n_embd=16, lr=6e-3, warmup=50, steps=1600, head="token", parts=1, code="id",
                schedule="quadratic", window=1.0, loss="ce", skip=True, input="token",
                cond="none", prefix=0.0, sampler="auto", invalid="project", clock="random",
                sampling_steps=0, guidance=0.0, temperature=1.0, top_k=0, top_p=1.0) | changes


class Oracle(nn.Module):
    """bit_diffusion's model for a joint law: the exact log p(x_i = v | all bits, all levels), or
    for head bit the exact log-odds of every bit. `tilt` adds a smooth function of all bits: a worse
    network. Head mix is a bit head whose context is such a function alone, two products mixed, and
    whose own bits enter by Bayes' rule. It keeps what it was asked: calls (bits, lam, where)."""

    def __init__(self, joint, V, T, head="token", tilt=0.0, order=None):
        super().__init__()
        self.V, self.T, self.K, self.head, self.tilt = V, T, width(V), head, tilt
        self.head_kind, self.parts = "token" if head == "token" else "bit", 1 + (head == "mix")
        self.joint, self.rows, self.number = joint, all_rows(V, T), numbers(V, order)
        self.exact = words(self.K)[self.number]
        self.register_buffer("code", self.exact.float())
        self.one_hot = F.one_hot(self.rows, V).double().flatten(1)
        g, shape = generator(7), {"token": (V,), "bit": (self.K,), "mix": (2, self.K + 1)}[head]
        self.wave = torch.randn(T * self.K, T, *shape, generator=g, dtype=torch.float64)
        self.phase = 6 * torch.rand(T, *shape, generator=g, dtype=torch.float64)
        self.calls = []

    def likelihood(self, bits, lam):
        """log q(bits | v): (B, T, V). A bit b is right, b = C, with log-odds lam."""
        odds = lam.double()[..., None, None] * bits.double()[..., None, :] * self.exact
        return F.logsigmoid(odds).sum(-1)

    def joint_posterior(self, bits, lam):
        """log p(x | bits) of all rows: (B, V^T)"""
        log = self.likelihood(bits, lam)[:, torch.arange(self.T), self.rows].sum(2)
        return (log + self.joint.clamp(min=1e-300).log()).log_softmax(1)

    def answer(self, bits, lam, temperature=1.0):
        """What the network says, float64; a temperature is for all but its own evidence."""
        wave = torch.tensordot(bits.double().flatten(1), self.wave, 1) + self.phase
        if self.head == "mix":
            odds, weight = (2 * wave.cos() / temperature).split((self.K, 1), 3)
            own = lam.double()[..., None, None] * bits.double()[:, :, None]
            seen = F.logsigmoid(odds) + F.logsigmoid(own), F.logsigmoid(-odds) + F.logsigmoid(-own)
            seen = torch.logaddexp(*seen).sum(3, True)  # log p(own bits | product)
            return torch.cat((odds + own, weight + seen), 3)
        each = (self.joint_posterior(bits, lam).exp() @ self.one_hot)
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
        weight, law = self.aims(bits, lam, temperature)
        return odds_of((weight[..., None] * law).sum(2), words(self.K))

    def aims(self, bits, lam, temperature=1.0, single=False):
        """Laws of words (B, T, R, 2^K) and their weights (B, T, R): of whole tokens, or products;
        `single`: of bits drawn apart."""
        out, n = self.answer(bits, lam, temperature), 2 ** self.K
        if single:
            law = apart(self.odds(bits, lam, temperature), self.K)
        elif self.head == "mix":
            return out[..., -1].softmax(2), apart(out[..., :-1], self.K)
        elif self.head == "token":
            law = out.softmax(2) @ F.one_hot(self.number, n).double()
        else:
            law = apart(out, self.K)
        return torch.ones(*law.shape[:2], 1).double(), law[:, :, None]

    def forward(self, bits, lam, where=None):
        self.calls.append((bits.clone(), lam.clone(), where))
        out = self.answer(bits, lam).float()
        return out if where is None else out[where]


def odds_of(p, code):
    """Log-odds that a bit is +1 under a law of tokens: (..., V), (V, K) -> (..., K)."""
    ones = (code > 0).double()
    return (p @ ones).log() - (p @ (1 - ones)).log()


def marginals(joint, V, T):
    """p(x_i = v): (T, V)."""
    return (joint[:, None, None] * F.one_hot(all_rows(V, T), V).double()).sum(0)


# ---- the channel and its bridge, by Bayes' rule


def right(lam):
    """Probability that a bit is right."""
    lam = float(lam)
    return 1.0 if lam >= CLEAN else 1 / (1 + math.exp(-lam))


def bridge(lam_t, lam_s):
    """q(b_s | b_t, b_0) as a table [b_t, b_0, b_s], each 0 or 1: Bayes' rule, where b_t is b_s with
    its own flips, as many as bring the agreement from that of s to that of t."""
    a_t, a_s = 2 * right(lam_t) - 1, 2 * right(lam_s) - 1
    table = torch.zeros(2, 2, 2, dtype=torch.float64)
    for b_t, b_0, b_s in itertools.product((0, 1), repeat=3):
        to_s = (1 + a_s) / 2 if b_s == b_0 else (1 - a_s) / 2
        to_t = (1 + a_t / a_s) / 2 if b_t == b_s else (1 - a_t / a_s) / 2
        table[b_t, b_0, b_s] = to_s * to_t
    return table / table.sum(2, keepdim=True)


def word_bridge(K, lam_t, lam_s):
    """q(word at s | word at t, clean word): (2^K, 2^K, 2^K)."""
    table, bit = bridge(lam_t, lam_s), (words(K) > 0).long()
    return table[bit[:, None, None], bit[:, None], bit].prod(3)


def channel(K, lam):
    """q(word | clean word): (2^K clean, 2^K)."""
    same = words(K)[:, None] == words(K)
    return torch.where(same, right(lam), 1 - right(lam)).double().prod(2)


def level(lost):
    """Log-odds of a bit at 1 - agreement."""
    return CLEAN if lost <= 0 else max(0.0, math.log((2 - lost) / lost))


def path(steps, T, tau=None, window=1.0, schedule="quadratic"):
    """The levels of a chain, from noise to clean: steps + 1 tensors (T,)."""
    tau = [0.0] * T if tau is None else tau
    return [torch.tensor([level(LOST[schedule](min(1.0, max(0.0, (k / steps - c) / window))))
                          for c in tau], dtype=torch.float64) for k in range(steps, -1, -1)]


# ---- chains over all bit states


def tokens_only(law, V, invalid):
    """A law of words (..., 2^K), and what becomes of the words of no token; none: they stay."""
    n = law.shape[-1]
    if invalid == "project":
        law = law * (torch.arange(n) < V)
        return law / law.sum(-1, keepdim=True)
    return law if invalid == "none" else law @ F.one_hot(torch.arange(n) % V, n).double()


def apart(odds, K):
    """Law of words whose bits are drawn apart: (..., K) -> (..., 2^K)."""
    return F.logsigmoid(odds[..., None, :] * words(K)).sum(-1).exp()


def reverse(model, lam_t, lam_s, kind, invalid="project", temperature=1.0):
    """p(word at s | state at t) of every position: (S, T, 2^K), and the number of positions that
    settle on the word of no token (S,). kind: token, a token drawn, or one product of a mixture,
    and its bridges; bit, bits drawn apart; plug-in, the expected bit put into the normalised Bayes
    formula."""
    n, T, K = 2 ** model.K, model.T, model.K
    here = all_rows(n, T)
    state, level = words(K)[here], lam_t.expand(len(here), T)
    weight, laws = model.aims(state, level, temperature, kind != "token")
    aim = (weight[..., None] * laws).sum(2)
    settled = (weight[..., None] * tokens_only(laws, model.V, invalid)).sum(2)
    odds = model.odds(state, level, temperature)
    out, lost = F.one_hot(here, n).double(), torch.zeros(len(here), dtype=torch.float64)
    for i in range(T):
        if lam_s[i] <= lam_t[i]:
            continue
        if lam_s[i] >= CLEAN:
            lost += aim[:, i, model.V:].sum(1)
            out[:, i] = settled[:, i]
        elif kind == "plug-in":
            a_t, a_s = 2 * right(lam_t[i]) - 1, 2 * right(lam_s[i]) - 1
            mean, b = (odds[:, i] / 2).tanh(), state[:, i]
            up = 0.5 * (1 + (a_t / a_s * b + a_s * mean) / (1 + a_t * b * mean))
            out[:, i] = torch.where(words(K) > 0, up[:, None], 1 - up[:, None]).prod(2)
        else:
            out[:, i] = torch.einsum("sc,scd->sd", aim[:, i],
                                     word_bridge(K, lam_t[i], lam_s[i])[here[:, i]])
    return out, lost


def chain_law(model, levels, kind, invalid="project", temperature=1.0):
    """Probability of every row after these steps from uniform bits, (V^T,), and the expected share
    of positions that came out as the word of no token."""
    here = all_rows(2 ** model.K, model.T)
    law, lost = torch.full((len(here),), 1 / len(here), dtype=torch.float64), 0.0
    for lam_t, lam_s in zip(levels, levels[1:]):
        out, bad = reverse(model, lam_t, lam_s, kind, invalid, temperature)
        lost += (law @ bad).item() / model.T
        law = law @ torch.stack([out[:, i][:, here[:, i]] for i in range(model.T)]).prod(0)
    place = (2 ** model.K) ** torch.arange(model.T - 1, -1, -1)
    return law[(model.number[model.rows] * place).sum(1)], lost


def cost(joint, law):
    """-E log p of rows, in nats a row."""
    return -torch.special.xlogy(joint, law).sum().item()


def chain_bound(model, levels, kind, invalid="project"):
    """The bound of these steps for every row, by going through all states: (V^T,)."""
    n, K = 2 ** model.K, model.K
    here, goal = all_rows(n, model.T), model.number[model.rows]  # (S, T), (R, T)
    total = torch.zeros(len(goal), dtype=torch.float64)
    for lam_t, lam_s in zip(levels, levels[1:]):
        out, _ = reverse(model, lam_t, lam_s, kind, invalid)
        q = torch.stack([channel(K, lam_t[i])[goal[:, i]][:, here[:, i]]
                         for i in range(model.T)]).prod(0)  # (R, S)
        for i in range(model.T):
            if lam_s[i] <= lam_t[i]:
                continue
            true = torch.eye(n).double().expand(n, n, n) if lam_s[i] >= CLEAN else \
                word_bridge(K, lam_t[i], lam_s[i])
            true, ours = true[here[:, i]][:, goal[:, i]], out[:, i][:, None]  # (S, R, n)
            kl = (torch.special.xlogy(true, true) - torch.special.xlogy(true, ours)).sum(2)
            total += (q * kl.T).sum(1)
    return total


def path_bound(model, window=1.0, schedule="quadratic", nodes=24):
    """The bound of infinitely many steps for every row, (V^T,), when the clocks of the T positions
    are (1 - window) / T apart, in random order: written in the agreement a, by quadrature."""
    K, T = model.K, model.T
    here, goal = all_rows(2 ** K, T), model.number[model.rows]
    state, clean = words(K)[here], words(K)[goal]
    orders, total = list(itertools.permutations(range(T))), torch.zeros(len(goal)).double()
    node, share = np.polynomial.legendre.leggauss(nodes)
    for order in orders if window < 1 else orders[:1]:
        tau = [(1 - window) * rank / T for rank in order]
        cuts = sorted({c for x in tau for c in (x, x + window)})
        for low, high in zip(cuts, cuts[1:]):
            for x, w in zip(node, share):
                x, w = (x + 1) / 2, w / 2 * (x + 1)  # denser where a window begins: t = x^2
                t = low + (high - low) * x * x
                own = [min(1.0, max(0.0, (t - c) / window)) for c in tau]
                lam = torch.tensor([level(LOST[schedule](u)) for u in own], dtype=torch.float64)
                q = torch.stack([channel(K, lam[i])[goal[:, i]][:, here[:, i]]
                                 for i in range(T)]).prod(0)
                plus = model.odds(state, lam.expand(len(here), T)).sigmoid()
                for i, u in enumerate(own):
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
