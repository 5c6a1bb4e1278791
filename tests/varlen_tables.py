"""A toy language with documents of any length whose every probability can be enumerated, and the
network that knows it: for the canvases of diffugpt_varlen. It shares no code with the script.

Tokens 0 and 1, EOS 2, PAD 3, mask 4. A canvas of T positions holds a document cut at T: text, EOS,
PAD. A document may be longer than the canvas, its tokens depend on each other, and its first
tokens decide how long it tends to be.
"""
import itertools

import torch
import torch.nn as nn

EOS, PAD, MASK = 2, 3, 4


def end_after(text):
    """P(the document ends here | it begins with this text)."""
    if not text:
        return 0.07
    if text[0] == 0:  # short
        return 0.5 if text[-1] == 0 else 0.2
    return 0.06 if sum(text) % 2 else 0.25


def one_after(text):
    """P(the next token is 1 | the text goes on)."""
    if not text:
        return 0.6
    if text[-1] == 1:
        return 0.75 if text[0] else 0.3
    return 0.15 if len(text) % 2 else 0.55


def documents(T):
    """Every canvas of T positions (n, T), and its probability (n,)."""
    rows, p = [], []
    for length in range(T + 1):
        for text in itertools.product((0, 1), repeat=length):
            chance = 1.0
            for i, token in enumerate(text):
                one = one_after(text[:i])
                chance *= (1 - end_after(text[:i])) * (one if token else 1 - one)
            if length < T:
                chance *= end_after(text)
            rows.append((list(text) + [EOS] + [PAD] * T)[:T])
            p.append(chance)
    return torch.tensor(rows), torch.tensor(p, dtype=torch.float64)


def conditionals(rows, p, states):
    """p(x_i | what a state shows) for states (S, T), in which MASK is hidden, under probabilities p
    of rows: (S, T, 4), and P(what it shows) (S,)."""
    shown, out = states != MASK, []
    for state, show in zip(states.split(4096), shown.split(4096)):
        agree = ((state[:, None] == rows) | ~show[:, None]).all(2).double() * p
        total = agree.sum(1)
        one_hot = nn.functional.one_hot(rows, 4).double().flatten(1)
        q = (agree @ one_hot).view(len(state), -1, 4) / total.clamp(min=1e-300)[:, None, None]
        out.append((q, total))
    return torch.cat([q for q, _ in out]), torch.cat([t for _, t in out])


def all_states(T):
    """Every canvas of T positions, possible or not, in lexicographic order: (5^T, T)."""
    return torch.tensor(list(itertools.product(range(5), repeat=T)))


class Script(nn.Module):
    """A network with the interface of diffugpt_varlen.Model whose logits (B, w, outputs) are a
    function of ids and of what is live in a ragged batch, both (B, w). It keeps what it was
    asked."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.asked = logits, []

    def forward(self, idx, is_target=None, attention_mask=None):
        live = torch.ones_like(idx, dtype=torch.bool)
        if attention_mask is not None and attention_mask.dim() == 4:
            live &= attention_mask[:, 0, 0, 1:]
        self.asked.append((idx.clone(), live))
        logits = self.logits(idx, live)
        return logits if is_target is None else logits[is_target]

    def tokens(self):
        """How many went through it, BOS included."""
        return sum(idx.numel() + len(idx) for idx, _ in self.asked)


class Oracle(Script):
    """The network that is never wrong about `documents(T)`. What is outside a canvas, and what is
    not live, is unknown to it. `strange` counts questions about canvases that cannot be."""

    def __init__(self, T=6):
        super().__init__(self.lookup)
        self.T, self.strange = T, 0
        self.rows, self.p = documents(T)
        self.length = (self.rows < EOS).sum(1)
        self.q, total = conditionals(self.rows, self.p, all_states(T))
        self.possible = total > 0
        self.place = 5 ** torch.arange(T - 1, -1, -1)

    def code(self, idx):
        """The number of the state that canvases idx (B, w <= T) show."""
        whole = idx.new_full((len(idx), self.T), MASK)
        whole[:, :idx.shape[1]] = idx
        return (whole * self.place).sum(1)

    def lookup(self, idx, live):
        code = self.code(idx.masked_fill(~live, MASK))
        self.strange += int((~self.possible[code]).sum())
        return self.q[code][:, :idx.shape[1]].clamp(min=1e-30).log().float()

    def filled(self):
        """Its documents as the sampler returns them, EOS-filled: (n, T)."""
        return self.rows.masked_fill(self.rows == PAD, EOS)

    def counts(self, x):
        """How often each document occurs in samples x (n, T), EOS-filled."""
        place = 3 ** torch.arange(self.T - 1, -1, -1)
        number = torch.full((3 ** self.T,), -1)
        number[(self.filled() * place).sum(1)] = torch.arange(len(self.rows))
        found = number[(x * place).sum(1)]
        assert (found >= 0).all(), "no document"
        return found.bincount(minlength=len(self.rows))

    def length_dist(self, prompt=()):
        """P(L = i | the document begins with `prompt`); column T: it is longer. (T + 1,)"""
        p = self.p * (self.rows[:, :len(prompt)] == torch.tensor(prompt)).all(1)
        return torch.zeros(self.T + 1, dtype=torch.float64).index_add(0, self.length, p) / p.sum()
