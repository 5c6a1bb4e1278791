"""Gaussian diffusion on the embeddings of tiny joint distributions, where Bayes' rule can be
written out: exact denoisers, exact distributions of samplers on a grid, bounds by quadrature.
Everything is float64 inside and shares no code with dit_embed.py or lab/dit_variants.py.

A noise level is a log-SNR lam: z = alpha e + sigma eps, alpha^2 = 1 / (1 + exp(-lam)). `E` (V, d)
holds the embeddings, `joint` (V^T,) the probabilities of all rows in the order of oracles.all_rows.
"""
import math

import torch
import torch.nn as nn

from oracles import all_rows, dirichlet, generator, legendre

LINE = torch.tensor([[-1.5], [-0.5], [0.5], [1.5]])  # four tokens on a line
COIN = torch.tensor([[-1.0], [1.0]])  # the only two of norm 1 there
CIRCLE = torch.tensor([[1.0, 0.0], [-0.6, 0.8], [-0.28, -0.96]])  # three in the plane, of norm 1
JOINT = dirichlet(4, 2)  # of rows of two tokens
THREE = dirichlet(3, 3, seed=2)  # of rows of three, for CIRCLE
TOKENS = torch.tensor([0.5, 0.2, 0.05, 0.25], dtype=torch.float64)  # of rows of one


def alpha_sigma(lam):
    lam = torch.as_tensor(lam, dtype=torch.float64)
    return (1 / (1 + (-lam).exp())).sqrt(), (1 / (1 + lam.exp())).sqrt()


def config(Config, high=6.0, low=-6.0, V=4, T=2, d=1, **changes):
    """A Config whose levels go from `high` down to `low`; by default all positions at once, and the
    sampling that the bound is about. dit_embed.Config leaves out what it does not have."""
    known, fields = Config.__dataclass_fields__, dict(emb_norm=0.0, gamma_shift=0.0) | changes
    norm = fields["emb_norm"] if "emb_norm" in known else 1
    center = math.log(2 * math.log(V) / (norm ** 2 or d)) - fields["gamma_shift"]
    fields = dict(vocab_size=V, seq_len=T, emb_dim=d, logsnr_above=high - center,
                  logsnr_below=center - low, noise_window=1.0, order="random", num_steps=0,
                  temperature=1.0, n_layer=1, n_head=2, n_embd=16) | fields
    return Config(**{k: v for k, v in fields.items() if k in known or "emb_norm" in known})


class Oracle(nn.Module):
    """The model for a joint distribution: the exact log p(x_i = v | all z, all levels), or the
    exact mean embedding in the coordinates of `prediction_type`. `tilt` adds a smooth function of
    z_i: a worse network. It keeps its inputs: calls (z, lam, is_target, guess), reads (z, lam) of
    the self-likelihood."""

    def __init__(self, joint, E, T, tilt=0.0, prediction_type="logits"):
        super().__init__()
        self.E, self.V, self.T, self.tilt, self.kind = E.double(), len(E), T, tilt, prediction_type
        self.joint, self.rows = joint, all_rows(len(E), T)
        self.one_hot = nn.functional.one_hot(self.rows, self.V).double().flatten(1)
        g = generator(7)
        self.wave = torch.randn(E.shape[1], self.V, generator=g, dtype=torch.float64)
        self.phase = 6 * torch.rand(self.V, generator=g, dtype=torch.float64)
        self.calls, self.reads = [], []

    def embeddings(self):
        return self.E.float()

    def x0_hat(self, logits):
        return logits.softmax(-1) @ self.E.float()

    def likelihood(self, z, lam):
        """log N(z; alpha E_v, sigma^2) but for a constant in v: (..., V)"""
        alpha, sigma = alpha_sigma(lam)
        far = (z.double()[..., None, :] - alpha[..., None, None] * self.E).square().sum(-1)
        return -0.5 * far / sigma.square()[..., None]

    def self_likelihood(self, z, lam):
        self.reads.append((z, lam))
        log = self.likelihood(z, lam)
        return (log - log.amax(-1, True)).float()

    def joint_posterior(self, z, lam):
        """log p(x | z) of all rows: (B, V^T)"""
        log = self.likelihood(z, lam)[:, torch.arange(self.T), self.rows].sum(2)
        return (log + self.joint.log()).log_softmax(1)

    def logits(self, z, lam):
        """(B, T, V) float64"""
        p = (self.joint_posterior(z, lam).exp() @ self.one_hot).view(*z.shape[:2], self.V)
        return p.clamp(min=1e-300).log() + self.tilt * (z.double() @ self.wave + self.phase).cos()

    def forward(self, z, lam, is_target=None, guess=None):
        self.calls.append((z, lam, is_target, guess))
        out = self.logits(z, lam)
        if self.kind != "logits":
            alpha, sigma = (y[..., None] for y in alpha_sigma(lam))
            out = out.softmax(2) @ self.E
            out = {"x0": out, "eps": (z - alpha * out) / sigma,
                   "v": (alpha * z - out) / sigma}[self.kind]
        out = out.float()
        return out if is_target is None else out[is_target]

    def one(self, z, lam):
        """For a single position: z (n,) on the line, a number lam -> logits (n, V)."""
        return self.logits(z[:, None, None], torch.full((len(z), 1), float(lam)))[:, 0]


def gap(model, high, low, eps, weight):
    """What the bound of an exact denoiser is above the entropy: KL(q(z at low) || N(0, 1)) and
    sum_i H(x_i | z) - H(x | z) at high. eps (n, T, d) and weight (n,) stand for the noise."""
    kl = total = 0.0
    T = model.T
    for row, p in enumerate(model.joint):
        emb = model.E[model.rows[row]]
        for lam in (low, high):
            alpha, sigma = alpha_sigma(lam)
            z, lams = alpha * emb + sigma * eps, torch.full((len(eps), T), float(lam))
            if lam == high:
                log = model.joint_posterior(z, lams)
                each = (log.exp() @ model.one_hot).view(-1, T, model.V)
                own = each[:, torch.arange(T), model.rows[row]].clamp(min=1e-300).log().sum(1)
                total += p * (weight * (log[:, row] - own)).sum()
                continue
            log = model.likelihood(z, lams)[:, torch.arange(T), model.rows].sum(2)
            log = (log + model.joint.log()).logsumexp(1) - eps[0].numel() * sigma.log()
            kl += p * (weight * (log + 0.5 * z.square().sum((1, 2)))).sum()
    return kl.item(), total.item()


# ---- one position on the line: chains and their bounds. lams[0] is the clean end; `logits_of(z,
# lam)` maps points (n,) and a number to (n, V)


def evenly(high, low, steps):
    return [high + (low - high) * k / steps for k in range(steps + 1)]


def conditioning(lam_t, lam_s):
    """A, B and the deviation of z_s given z_t and the token, by Gaussian conditioning: z_t is z_s
    scaled, plus independent noise."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(lam_t), alpha_sigma(lam_s)
    scale = alpha_t / alpha_s
    extra = sigma_t ** 2 - scale ** 2 * sigma_s ** 2
    variance = 1 / (1 / sigma_s ** 2 + scale ** 2 / extra)
    return variance * scale / extra, variance * alpha_s / sigma_s ** 2, variance.sqrt()


def normal(x, mean, sd):
    return (-0.5 * ((x - mean) / sd).square()).exp() / (sd * math.sqrt(2 * math.pi))


def nearest(x, E):
    return E[(x[:, None] - E).abs().argmin(1)]


def chain_distribution(logits_of, E, lams, kind, eta=1.0, clamp=False, decode=None, reach=7.0,
                       h=0.04):
    """The token probabilities (V,) of a sampler that starts at N(0, 1) and takes a Gaussian step
    between neighbouring levels, on a grid; with eta = 0 its points move without noise instead."""
    E = E.double().flatten()
    z = torch.arange(-reach, reach + h / 2, h, dtype=torch.float64)
    grid, weight = z, normal(z, 0.0, torch.tensor(1.0).double()) * h
    for t, s in zip(lams[:0:-1], lams[-2::-1]):
        A, B, sd = conditioning(t, s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
        p = logits_of(z, t).softmax(1)
        x0_hat = nearest(p @ E, E) if clamp else p @ E
        if kind == "token":
            move = sum(p[:, v, None] * normal(grid, (A * z + B * E[v])[:, None], sd)
                       for v in range(len(E)))
        elif kind == "ancestral":
            move = normal(grid, (A * z + B * x0_hat)[:, None], sd)
        else:
            eps = (z - alpha_t * x0_hat) / sigma_t
            mean = alpha_s * x0_hat + (sigma_s ** 2 - (eta * sd) ** 2).sqrt() * eps
            if not eta:
                z = mean
                continue
            move = normal(grid, mean[:, None], eta * sd)
        weight = weight @ move * h
    p = (decode or (lambda z: logits_of(z, lams[0]).softmax(1)))(z)
    return weight @ p / weight.sum()


def ends(logits_of, E, high, low, points=161, reach=6.5):
    """Prior and reconstruction of every token of a single position, (V,) each, and nodes and
    weights of a standard normal expectation."""
    x = torch.linspace(-reach, reach, points, dtype=torch.float64)
    w = normal(x, 0.0, torch.tensor(1.0).double())
    w, (alpha, sigma) = w / w.sum(), alpha_sigma(low)
    prior = 0.5 * (sigma ** 2 - 1 - 2 * sigma.log() + alpha ** 2 * E ** 2)
    alpha, sigma = alpha_sigma(high)
    reconstruction = torch.stack([-w @ logits_of(alpha * e + sigma * x, high).log_softmax(1)[:, v]
                                  for v, e in enumerate(E)])
    return prior, reconstruction, x, w


def steps_bound(logits_of, E, lams, mixture):
    """The bound of a chain's steps for every token of a single position, by quadrature: (V,)."""
    E = E.double().flatten()
    prior, reconstruction, x, w = ends(logits_of, E, lams[0], lams[-1])
    total = prior + reconstruction
    for t, s in zip(lams[1:], lams[:-1]):
        (alpha, sigma), (_, B, sd) = alpha_sigma(t), conditioning(t, s)
        for v in range(len(E)):
            p = logits_of(alpha * E[v] + sigma * x, t).softmax(1)
            if not mixture:
                error = (E[v] - p @ E).square()
                total[v] += 0.5 * (math.exp(s) - math.exp(t)) * (w @ error)
                continue
            y = B * E[v] + sd * x  # z_s - A z_t, the same for all z_t
            ratio = (-0.5 * (((y[:, None] - B * E) / sd).square() - x[:, None].square())).exp()
            total[v] -= w @ (p @ ratio.T).log() @ w
    return total


def parts(logits_of, E, high, low, cells=80):
    """Prior, diffusion and reconstruction of every token of a single position, by quadrature, for
    infinitely many steps: (3, V)."""
    E = E.double().flatten()
    prior, reconstruction, x, w = ends(logits_of, E, high, low)
    diffusion = torch.zeros_like(E)
    for u, c in legendre(cells):
        lam = low + (high - low) * u
        a, s = alpha_sigma(lam)
        for v in range(len(E)):
            error = (E[v] - logits_of(a * E[v] + s * x, lam).softmax(1) @ E).square()
            diffusion[v] += 0.5 * (high - low) * c * math.exp(lam) * (w @ error)
    return torch.stack((prior, diffusion, reconstruction))
