"""Gaussian diffusion on token embeddings: add noise to each token's vector, predict the token.

Method: Diffusion-LM (Li et al. 2022, arXiv 2205.14217), CDCD (Dieleman et al. 2022), Plaid
(Gulrajani and Hashimoto 2023), DiT (Peebles and Xie 2023); bound: VDM (Kingma et al. 2021).
lab/dit_variants.py: eps / x0 / v prediction, beta schedules, DDIM, self-conditioning, rounding, CFG

    python dit_embed.py         5 to 11 minutes, 2 CPU cores: val <= 1.55 nats/token (entropy 0.91)
    python dit_embed.py sample --prompt "Once upon a time" --num-samples 3 --trace
    python dit_embed.py sample --infill "Once upon a ___ there was ___"
    python dit_embed.py eval    the bound on 500 test rows, samples

Equations. E (V, d): row E_v of norm 1 is token v's vector; snr = alpha^2 / sigma^2, lam = log snr.
    (E1)  forward process: z_i = alpha_i E_x + sigma_i eps, x = x_0,i, alpha^2 = sigmoid(lam_i) and
          sigma^2 = 1 - alpha^2
    (E2)  own time of a position t_i = clamp((t - tau_i) / w, 0, 1), tau_i in [0, 1 - w], and lam_i
          linear in t_i; w = 1: the usual process; w -> 0: one token after another, any order
    (E3)  self-likelihood (Plaid: output prior) log q(z_i | v) = sqrt(snr (1 + snr)) z_i.E_v + const
    (E4)  p_i = softmax(net_i(z) + log q(z_i | .)), net_i like a log prior; x0_hat_i = p_i E
    (E5)  -log p(x_0) <= NELBO = PRIOR + DIFFUSION + RECONSTRUCTION, any tau; < >: mean over eps.
          PRIOR = sum_i KL(q(z_i | x_0) || N(0, I)) at t = 1; RECONSTRUCTION = at t = 0,
          sum_i <-log p_i(x_0,i)>; DIFFUSION = 1/2 sum_i int <|E_x - x0_hat_i|^2> d snr_i
    (E6)  for s < t, i left out: q(z_s | z_t, x_0) = N(a z_t + b E_x, sigma_q^2 I), c = 1 - snr_t /
          snr_s, a = (1 - c) alpha_s / alpha_t, b = alpha_s c, sigma_q^2 = sigma_s^2 c
    (E7)  reverse step: v ~ p_i, z_s from (E6) with E_v for E_x; at t = 0, the token v ~ p_i

Shapes: B rows, T tokens, V vocabulary, C width, H heads, D = C / H, d embedding width. Units: nats.
Every position of a row is scored, also EOS padding. g seeds all noise. Loss: -log p_i(x_0,i).

Differs from the papers: own times (E2). From ar.py: noisy vectors in, adaLN, no causal mask.
"""
import copy
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import fast
from data.prepare import load_data
from data.units import likelihood, report


# ---- 1. config ---------------------------------------------------------------------------------
@dataclass
class Config:
    data: str = "tales"  # tales, tinystories, wikitext2, openwebtext, fineweb, or a file or folder
    tokenizer: str = "bpe"  # bpe (trained on the data), gpt2, char, byte, hf:NAME
    vocab_size: int = 0  # tokens to predict; 0 = the tokenizer's own size (bpe: 2048)
    max_docs: int = 0  # use at most this many documents; 0 = all
    split: Literal["auto", "lines"] = "auto"  # lines: each line of a text file is a document
    rows: Literal["auto", "docs", "stream"] = "auto"  # auto: docs (one a row) if tales, else stream
    out: str = "out/dit_embed"  # run folder
    resume: bool = False  # continue the run in the run folder
    log: Literal["", "tensorboard", "wandb", "tensorboard,wandb"] = ""  # besides log.jsonl
    preset: Literal["tiny", "small", "medium"] = "tiny"  # 4x192, 8x512, 12x768; also lr and seq_len
    seed: int = 1337  # of weights, batches and noise
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # bfloat16 is autocast
    compile: Literal["no", "yes", "auto"] = "no"  # torch.compile; auto: from 5000 steps on
    # model
    seq_len: int = 160  # tokens per row
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 192
    # training
    steps: int = 1600  # optimizer steps
    batch_size: int = 16  # rows per micro-batch, over all processes
    grad_accum: int = 1  # micro-batches per step
    lr: float = 1e-2  # peak learning rate
    warmup: int = 50  # steps of linear warm-up; then linearly to zero
    ema: float = 0.99  # decay of the averaged weights, which are evaluated and saved; 0 = off
    eval_every: int = 200  # steps between evaluations and checkpoints
    # method
    emb_dim: int = 16  # d, width of the embeddings that get the noise
    logsnr_above: float = 3.0  # largest lam, above log(2 ln V), where z_i alone loses the token
    logsnr_below: float = 8.0  # smallest lam, below log(2 ln V)
    noise_window: float = 0.1  # w (E2), share of the time in which one position gets its noise
    # sampling; the bound is of: --order random --temperature 1 --no-length-first, many --num-steps
    num_samples: int = 4  # of sample and eval; training draws 64 and prints two
    prompt: str = ""  # text that every sample begins with
    infill: str = ""  # "A ___ and ___3.": fill one token and three; ___ at the end: the rest
    trace: bool = False  # print the trajectory of the first sample
    num_steps: int = 64  # one NFE each, one for the end, one for the length; 0 = one a position
    order: Literal["random", "l2r", "maxprob"] = "maxprob"  # which position is denoised first
    length_first: bool = True  # rows docs: draw the length first, then tokens without EOS
    temperature: float = 0.5  # below 1: safer, less varied; 0: most likely by context
    top_k: int = 0  # keep the k most likely tokens; 0 = all
    top_p: float = 1.0  # keep the most likely tokens that hold this much probability
    # set by the data
    eos: int = 0  # end of document

    checkpoint_keys = ("emb_dim", "logsnr_above", "logsnr_below")  # what a checkpoint fixes

    def problems(self):
        span = self.logsnr_above + self.logsnr_below
        rules = {"--noise-window must be in [0.001, 1]": 0.001 <= self.noise_window <= 1,
                 f"--logsnr-above + --logsnr-below must be in (0, 40], not {span}": 0 < span <= 40}
        return [text for text, holds in rules.items() if not holds]


PRESETS = dict(tiny={}, small=dict(n_layer=8, n_head=8, n_embd=512, seq_len=256, lr=2e-3),
               medium=dict(n_layer=12, n_head=12, n_embd=768, seq_len=512, lr=1e-3))


# ---- 2. data -----------------------------------------------------------------------------------
# load_data(cfg) sets vocab_size, rows, eos; a split is (ids, document offsets, log p or None)
def get_rows(split, cfg, index):
    """Documents `index`, filled with EOS or cut, or windows from the tokens `index` on: (B, T)."""
    ids, offsets, _ = split
    start = offsets[index] if cfg.rows == "docs" else index
    end = offsets[index + 1] if cfg.rows == "docs" else index + cfg.seq_len
    column = start[:, None] + np.arange(cfg.seq_len)
    rows = ids[np.minimum(column, len(ids) - 1)].astype(np.int64)
    return torch.from_numpy(np.where(column < end[:, None], rows, cfg.eos))


def get_batch(split, cfg, g):
    """The rows of one optimizer step, drawn at random: (grad_accum * batch_size, T)."""
    ids, offsets, _ = split
    num_rows = len(offsets) - 1 if cfg.rows == "docs" else len(ids) - cfg.seq_len + 1
    index = torch.randint(num_rows, (cfg.grad_accum * cfg.batch_size,), generator=g)
    return get_rows(split, cfg, index.numpy())


def get_eval_rows(split, cfg, n):
    """n documents and their true -log p (or None), or n evenly spaced windows: (n, T), (n,)."""
    ids, offsets, logp = split
    if cfg.rows == "stream":
        last = len(ids) - cfg.seq_len
        return get_rows(split, cfg, np.linspace(0, last, min(n, last + 1)).astype(int)), None
    n = min(n, len(offsets) - 1)
    known = logp is not None and np.diff(offsets[:n + 1]).max() <= cfg.seq_len
    return get_rows(split, cfg, np.arange(n)), -torch.tensor(logp[:n]) if known else None


# ---- 3. model ----------------------------------------------------------------------------------
def rotate(x, positions):
    """Rotary positions (Su et al. 2021): rotate the pairs (x_2j, x_2j+1) of x (..., T, D)."""
    D = x.shape[-1]
    angle = positions[:, None] * 10000 ** (-torch.arange(0, D, 2, device=x.device) / D)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turned = pairs * torch.polar(torch.ones_like(angle), angle)  # (..., T, D / 2)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.qkv = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x, positions):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        qk, v = qkv.split((2, 1))
        (q, k), v = rotate(F.layer_norm(qk, qk.shape[4:]), positions), v.squeeze(0)  # (B, H, T, D)
        if x.device.type == "cpu":  # written out: the fused kernel is slow there, see LOG.md
            y = (q * q.shape[3] ** -0.5 @ k.mT).softmax(-1).to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)  # every position sees every other
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=False)
        self.proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x)))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.conv = nn.Conv2d(cfg.n_embd, cfg.n_embd, (1, 7), padding=(0, 3), groups=cfg.n_embd,
                              bias=False)
        self.norm1, self.attn = nn.RMSNorm(cfg.n_embd), Attention(cfg)
        self.norm2, self.mlp = nn.RMSNorm(cfg.n_embd), MLP(cfg)

    def convolve(self, x):
        """Add a depthwise convolution over 3 tokens on each side (Canon layer, Allen-Zhu 2025)."""
        with torch.autocast(x.device.type, enabled=False):  # float32 is faster here on CPUs
            return x + self.conv(x.mT[:, :, None])[:, :, 0].mT  # 2d: faster than 1d

    def forward(self, x, positions, ada, is_target=None):
        """ada: scale, shift, gate, (B, T, C) each, twice: adaLN (Peebles and Xie 2023). Here
        the residual outputs start at zero and gates at one; both at zero have no gradient."""
        x = self.convolve(x)
        scale1, shift1, gate1, scale2, shift2, gate2 = ada
        x = x + (1 + gate1) * self.attn(self.norm1(x) * (1 + scale1) + shift1, positions)
        if is_target is not None:
            x, scale2, shift2, gate2 = (y[is_target] for y in (x, scale2, shift2, gate2))
        return x + (1 + gate2) * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def logsnr_range(cfg):
    """Largest and smallest lam around snr = 2 ln V, where z_i alone stops telling the token."""
    center = math.log(2 * math.log(cfg.vocab_size))
    return center + cfg.logsnr_above, center - cfg.logsnr_below


class Model(nn.Module):
    """Bidirectional transformer: noisy z (B, T, d) and log-SNR lam (B, T) -> logits (B, T, V) of
    (E4), or (n, V) at the n positions `is_target`, boolean (B, T) or indices."""

    def __init__(self, cfg):
        super().__init__()
        self.high, self.low = logsnr_range(cfg)
        self.emb = nn.Embedding(cfg.vocab_size, cfg.emb_dim)  # what gets the noise
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)  # what the network sees of it
        self.wpe = nn.Embedding(cfg.seq_len, cfg.n_embd)
        self.noise_in = nn.Linear(2 * 64, cfg.n_embd)
        self.noise_head = nn.Linear(cfg.n_embd, cfg.n_embd)
        self.ada_heads = nn.ModuleList(nn.Linear(cfg.n_embd, 6 * cfg.n_embd)
                                       for _ in range(cfg.n_layer))  # not in blocks: no Muon
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size)
        for name, p in self.named_parameters():
            if name.startswith("ada") or name.endswith(("proj.weight", "head.weight", "bias")):
                nn.init.zeros_(p)  # net = 0: (E4) with a uniform prior, a bound near ln V
            elif p.dim() > 1:
                nn.init.normal_(p, std=0.02)
        nn.init.normal_(self.emb.weight)

    def embeddings(self):
        """E (V, d): cross-entropy keeps rows apart, norm 1 keeps them from outgrowing the noise."""
        return F.normalize(self.emb.weight, dim=1)

    def self_likelihood(self, z, lam):
        """log q(z | v) + const for each token v: (..., d), (...) -> (..., V). It may be in the
        hundreds and its differences count: float32 also under autocast, as x0_hat."""
        snr = lam.exp()[..., None]
        with torch.autocast(z.device.type, enabled=False):
            return (snr * (1 + snr)).sqrt() * z @ self.embeddings().T  # (E3)

    def x0_hat(self, logits):  # (..., V) -> (..., d)
        with torch.autocast(logits.device.type, enabled=False):
            return logits.softmax(-1) @ self.embeddings()  # (E4)

    def embed(self, z, lam):
        """What the network sees of each position, (B, T, C): the mean of wte under softmax of the
        self-likelihood; zero for pure noise, one token's embedding where z is clean."""
        x = torch.zeros(*lam.shape, self.wte.embedding_dim, device=z.device)
        is_clean = lam >= self.high - 1e-3
        at_noisy = ((lam > self.low + 1e-3) & ~is_clean).nonzero(as_tuple=True)
        at_clean = is_clean.nonzero(as_tuple=True)
        p = self.self_likelihood(z[at_noisy], lam[at_noisy]).softmax(1)
        x[at_noisy] = (p @ self.wte.weight).to(x.dtype)
        x[at_clean] = self.wte(self.self_likelihood(z[at_clean], lam[at_clean]).argmax(1))
        return x

    def embed_noise(self, lam):
        """Log-SNR (n,) -> (n, C): sinusoids of 1000 t_i, a linear layer, SiLU."""
        freq = 10000 ** (-torch.arange(64, device=lam.device) / 64)
        angle = 1000 * ((self.high - lam) / (self.high - self.low))[:, None] * freq
        return F.silu(self.noise_in(torch.cat((angle.cos(), angle.sin()), 1)))

    def forward(self, z, lam, is_target=None):
        levels, index = lam.unique(return_inverse=True)  # each level is embedded once
        noise = self.embed_noise(levels)  # (levels, C); 0.1: small AdamW steps; float32: exact sums
        x = self.embed(z, lam) + F.embedding(index, 0.1 * self.noise_head(noise).float())
        x = x + self.wpe.weight[:x.shape[1]]
        positions = torch.arange(x.shape[1], device=z.device)
        for k, (block, head) in enumerate(zip(self.blocks, self.ada_heads), 1):
            ada = F.embedding(index, 0.1 * head(noise).float()).chunk(6, 2)
            x = block(x, positions, ada, is_target if k == len(self.blocks) else None)
        x = self.norm(x)
        if is_target is not None:
            z, lam = z[is_target], lam[is_target]
        return self.head(x).float() + self.self_likelihood(z, lam)  # (E4)


# ---- 4. corrupt and loss -----------------------------------------------------------------------
def position_times(shape, cfg, g, is_given=None):
    """tau (B, T) of (E2), the time at which a position's noise begins to grow: evenly spread over
    [0, 1 - w), in random order; infinite for a given position (boolean, (B, T))."""
    score, N = torch.rand(shape, generator=g), torch.full(shape[:1], shape[1])
    if is_given is not None:
        score, N = score.masked_fill(is_given, 2.0), (~is_given).sum(1).clamp(min=1)
    rank = score.argsort(1).argsort(1)
    tau = (1 - cfg.noise_window) * (rank + torch.rand(shape[0], 1, generator=g)) / N[:, None]
    return tau if is_given is None else tau.masked_fill(is_given, torch.inf)


def noise_levels(t, tau, cfg):
    """Times t (B, 1) or a number, tau (B, T) -> own time, 0 at least noise and 1 at pure noise, the
    log-SNR lam, and -d lam / dt: three (B, T)."""
    high, low = logsnr_range(cfg)
    own = ((t - tau) / cfg.noise_window).clamp(0, 1)  # (E2)
    slope = (high - low) / cfg.noise_window * ((own > 0) & (own < 1))
    return own, high + (low - high) * own, slope


def q_sample(emb, lam, eps):
    """Clean embeddings (..., d), log-SNR (...), standard normal eps (..., d) -> z (..., d)."""
    alpha, sigma = lam.sigmoid().sqrt()[..., None], (-lam).sigmoid().sqrt()[..., None]
    return alpha * emb + sigma * eps  # (E1)


def corrupt(x0, cfg, g):
    """lam (B, T) and noise eps (B, T, d) of (E1), and each token's weight in the loss (B, T): the
    mean over the noisy positions of a row, then over rows."""
    B, T = x0.shape
    u = ((torch.arange(B) + torch.rand(1, generator=g)) / B)[:, None]  # low-discrepancy
    t = u if cfg.steps >= 4000 else (0.1 + 0.9 * u) ** 0.75  # more noise: better in short runs
    own, lam, _ = noise_levels(t, position_times(x0.shape, cfg, g), cfg)
    noise = g if x0.device.type == "cpu" else torch.Generator(x0.device).manual_seed(
        int(torch.randint(2 ** 62, (), generator=g)))  # much of it: drawn where it is used
    eps = torch.randn(B, T, cfg.emb_dim, generator=noise, device=x0.device)
    is_noisy = own > 0
    weight = is_noisy / is_noisy.sum(1, keepdim=True).clamp(min=1) / B
    return lam.to(x0.device), eps, weight.to(x0.device)


def loss_fn(model, x0, lam, eps, weight):
    """Weighted cross-entropy of the noisy tokens. In sdd.py the NELBO as loss is worse (LOG.md)."""
    at_noisy = (weight > 0).nonzero(as_tuple=True)
    logits = model(q_sample(model.embeddings()[x0], lam, eps), lam, at_noisy)
    return (F.cross_entropy(logits, x0[at_noisy], reduction="none") * weight[at_noisy]).sum()


@torch.no_grad()
def nelbo(model, x0, cfg, g, draws=8, is_given=None):
    """Unbiased estimate of an upper bound (E5) on -log p(x0) in nats per row, (B,), from stratified
    times, `draws` in number, and t = 0. With a boolean `is_given` (B, T) it is a bound on -log
    p(the other tokens | the given ones)."""
    (B, T), device, E = x0.shape, x0.device, model.embeddings()
    is_given = torch.zeros(B, T, dtype=torch.bool) if is_given is None else is_given.cpu()
    u, tau = torch.rand(B, 1, generator=g), position_times(x0.shape, cfg, g, is_given)
    first = tau.amin(1, keepdim=True).clamp(max=1)  # the snr changes between these times only
    last = tau.masked_fill(is_given, -cfg.noise_window).amax(1, keepdim=True) + cfg.noise_window
    low = torch.tensor(logsnr_range(cfg)[1]).double()
    prior = 0.5 * (cfg.emb_dim * (-low.sigmoid() - F.logsigmoid(-low)) + low.sigmoid())
    total = prior * (~is_given).sum(1)  # (E5)
    for k in range(draws + 1):
        t = first + (last - first) * (k + u) / draws if k < draws else torch.zeros(B, 1)
        _, lam, slope = noise_levels(t, tau, cfg)
        is_target = slope > 0 if k < draws else ~is_given
        eps, nats = torch.randn(B, T, cfg.emb_dim, generator=g), torch.zeros(B, T).double()
        for j in torch.arange(B).split(64):
            x, lam_j, target = x0[j.to(device)], lam[j].to(device), is_target[j].to(device)
            logits = model(q_sample(E[x], lam_j, eps[j].to(device)), lam_j, target)
            if k == draws:  # reconstruction
                cost = F.cross_entropy(logits, x[target], reduction="none")
            else:  # diffusion: d snr = snr d lam
                error = (model.x0_hat(logits) - E[x[target]]).square().sum(1)
                cost = 0.5 * lam_j[target].exp() * error
            nats[j] = nats[j].masked_scatter(is_target[j], cost.cpu().double())
        total += (nats * ((last - first) / draws * slope if k < draws else 1)).sum(1)  # (E5)
    return total


# ---- 5. sample ---------------------------------------------------------------------------------
def filter_logits(logits, cfg):
    """Logits (n, V) at a temperature, -inf at what top-k (which keeps ties) or top-p removes."""
    if cfg.temperature == 0:
        return torch.full_like(logits, -torch.inf).scatter(1, logits.argmax(1, True), 0.0)
    logits = logits / cfg.temperature
    if 0 < cfg.top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(cfg.top_k).values[:, -1:], -torch.inf)
    if cfg.top_p < 1:
        value, index = logits.sort(descending=True)
        p = value.softmax(1)
        cut = p.cumsum(1) - p >= max(cfg.top_p, 1e-6)  # likelier tokens hold top_p
        logits = logits.masked_fill(cut.gather(1, index.argsort(1)), -torch.inf)
    return logits


def categorical(logits, g):
    """One draw per row of logits (n, V) -> (n,), by inverting the cumulative distribution in
    float64: float32 noise would cut off the tail (Zheng et al. 2024, section 5)."""
    cdf = (logits.cpu() if logits.device.type == "mps" else logits).double().softmax(1).cumsum(1)
    u = torch.rand(len(cdf), 1, generator=g, dtype=torch.float64).to(cdf.device) * cdf[:, -1:]
    return (cdf <= u).sum(1).clamp(max=cdf.shape[1] - 1).to(logits.device)


def draw_length(model, x, cfg, g):
    """Rows x (B, T) with EOS from a drawn length on. A perfect model has P(EOS at i) = P(length <=
    i), which rises with i (cummax makes it). Unfiltered logits; a row may stay without EOS."""
    is_given = x != cfg.vocab_size
    lam, emb = torch.where(is_given, model.high, model.low), model.embeddings()[x * is_given]
    eps = torch.randn(emb.shape, generator=g).to(x.device)
    z = torch.where(is_given[..., None], q_sample(emb, lam, eps), eps)
    p_eos = model(z, lam).softmax(2)[..., cfg.eos]
    is_end = (~is_given).flip(1).cumprod(1).flip(1) > 0  # the wanted positions at the end of a row
    u = torch.rand(len(x), 1, generator=g).to(x.device)
    return x.masked_fill(is_end & (u < (p_eos * is_end).cummax(1).values), cfg.eos)


def reassign_times(tau, is_waiting, score):
    """tau (B, T), permuted where is_waiting: the highest score gets the largest, denoised first."""
    late = tau.masked_fill(~is_waiting, -torch.inf).sort(1, descending=True).values
    best = score.masked_fill(~is_waiting, -torch.inf).argsort(1, descending=True)
    return torch.where(is_waiting, tau.scatter(1, best, late), tau)


def posterior(lam_t, lam_s):
    """a, b and sigma_q of q(z_s | z_t, x_0), (..., 1) each, from lam_t up to lam_s, both (...)."""
    c = -(lam_t - lam_s).expm1()
    ratio = (F.logsigmoid(lam_s) - F.logsigmoid(lam_t)).div(2).exp()  # alpha_s / alpha_t
    b, sigma_q = lam_s.sigmoid().sqrt() * c, ((-lam_s).sigmoid() * c).sqrt()
    return (ratio * (1 - c))[..., None], b[..., None], sigma_q[..., None]  # (E6)


def draw_x0(model, logits, z, lam, cfg, g):
    """Embeddings (n, d) of tokens drawn from logits (n, V). The temperature divides net_i alone:
    the self-likelihood is evidence, not a prediction. Top-k and top-p cut the sum of the two."""
    logits = logits + (cfg.temperature - 1) * model.self_likelihood(z, lam)
    return model.embeddings()[categorical(filter_logits(logits, cfg), g)]  # (E7)


@torch.no_grad()
def sample(model, x, cfg, g, on_step=lambda nfe, x: None, draw_x0=draw_x0):
    """The reverse process: positions of x (B, T) with the mask id V become tokens, all else is
    given. Returns x and NFE. on_step(nfe, x) sees x, V where softmax of (E3) is below 1/2."""
    x, V, nfe, device = x.clone(), cfg.vocab_size, 0, x.device
    length_first = cfg.length_first and cfg.rows == "docs"
    if length_first and (x[:, -1] == V).any():
        x, nfe = draw_length(model, x, cfg, g), 1
        on_step(nfe, x)
    is_given = x != V
    emb = model.embeddings()[x.masked_fill(~is_given, 0)]
    eps = torch.randn(emb.shape, generator=g).to(device)
    tau = position_times(x.shape, cfg, g, is_given.cpu()).to(device)
    if cfg.order == "l2r":
        tau = reassign_times(tau, ~is_given, -(~is_given).cumsum(1).float())
    z = torch.where(is_given[..., None], q_sample(emb, noise_levels(1, tau, cfg)[1], eps), eps)
    steps = cfg.num_steps or x.shape[1]
    for k in range(steps, -1, -1):
        own, lam, _ = noise_levels(k / steps, tau, cfg)
        lam_s = noise_levels(max(k - 1, 0) / steps, tau, cfg)[1]
        # 1. predict, if lam rises anywhere; with maxprob at all noisy positions, to choose
        rises = lam_s > lam if k else ~is_given
        if not rises.any():
            continue
        choose = cfg.order == "maxprob" and k > 0
        is_target = own > 0 if choose else rises
        logits = model(z, lam, is_target)
        nfe += 1
        if length_first:
            logits[:, cfg.eos] = -torch.inf
        # 2. choose positions: of those that are pure noise the most confident begin next
        if choose:
            confidence = z.new_zeros(x.shape).masked_scatter(is_target, logits.softmax(1).amax(1))
            tau = reassign_times(tau, is_target & (own == 1), confidence)
            lam_s = noise_levels((k - 1) / steps, tau, cfg)[1]
            logits, is_target = logits[(lam_s > lam)[is_target]], lam_s > lam
        # 3. draw: one reverse step, or at t = 0 the tokens
        if k == 0:  # no temperature: the self-likelihood decides
            x[is_target] = categorical(logits, g)
            on_step(nfe, x)
            break
        z_t, lam_t = z[is_target], lam[is_target]
        E_v = draw_x0(model, logits, z_t, lam_t, cfg, g)
        a, b, sigma_q = posterior(lam_t, lam_s[is_target])
        xi = torch.randn(z.shape, generator=g).to(device)[is_target]
        z = z.masked_scatter(is_target[..., None], a * z_t + b * E_v + sigma_q * xi)  # (E7)
        p, best = model.self_likelihood(z, lam_s).softmax(2).max(2)
        on_step(nfe, torch.where(is_given, x, best.masked_fill(p < 0.5, V)))
    return x, nfe


# ---- 6. train ----------------------------------------------------------------------------------
def get_lr(step, cfg):
    """Learning rate of a step: linear warm-up, then linearly to zero."""
    done = max(0, step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * min(1, (step + 1) / cfg.warmup) * (1 - done)


def make_optimizers(model, cfg):
    """Muon for the matrices inside the blocks, AdamW for the rest. A group's rate is `scale` times
    the scheduled one: embeddings want ten times as much, the others three (see LOG.md)."""
    hidden = [p for p in model.blocks.parameters() if p.dim() == 2]
    embed = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    rest = [p for p in model.parameters() if not any(p is other for other in hidden + embed)]
    return [fast.Muon([dict(params=hidden, scale=1.0)], cfg.lr, cfg.dtype),
            torch.optim.AdamW([dict(params=embed, scale=10.0), dict(params=rest, scale=3.0)],
                              cfg.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]


def evaluate(model, data, cfg, split="val", n=128, nelbo=nelbo):
    """The bound for the rows of get_eval_rows, as an entry of the log."""
    x0, true_nll = get_eval_rows(getattr(data, split), cfg, n)
    nats = nelbo(model, x0.to(model.head.weight.device), cfg, torch.Generator().manual_seed(0))
    return likelihood(nats, x0, true_nll, data.tokenizer, cfg, "upper")


def train(cfg, Model=Model, corrupt=corrupt, loss_fn=loss_fn, nelbo=nelbo, sample=sample):
    """Train as cfg says, write log, checkpoints and samples to the run folder, return the EMA."""
    with common.Run(cfg) as run:
        data = load_data(cfg, quiet=run.rank > 0)
        torch.manual_seed(cfg.seed)
        model = Model(cfg).to(run.device)
        ema = copy.deepcopy(model).requires_grad_(False)  # what is evaluated and sampled from
        optimizers = make_optimizers(model, cfg)
        g = torch.Generator().manual_seed(cfg.seed)
        state = data.tokenizer, model, ema, optimizers, g  # all that a checkpoint holds
        step = run.resume(*state) if cfg.resume else 0
        fast.speed_up(model, cfg, run.device)
        run.begin(step, model, data)
        while step < cfg.steps and not run.stopping():
            if step % cfg.eval_every == 0:
                run.validate(step, lambda: evaluate(ema, data, cfg, nelbo=nelbo))
            for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
                group["lr"] = get_lr(step, cfg) * group["scale"]
            # one batch and its noise, shared out to micro-batches and processes
            x0 = get_batch(data.train, cfg, g).to(run.device)
            lam, eps, weight = corrupt(x0, cfg, g)
            total = torch.zeros((), device=run.device)
            micro_batches = torch.arange(len(x0)).tensor_split(cfg.grad_accum * run.world)
            for i in micro_batches[run.rank::run.world]:
                with run.amp:
                    loss = loss_fn(model, x0[i], lam[i], eps[i], weight[i])
                loss.backward()
                total += loss.detach()
            run.all_reduce([total] + [p.grad for p in model.parameters() if p.grad is not None])
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            total, norm = torch.stack((total, norm)).tolist()  # waits for the GPU
            if not math.isfinite(total + norm):
                raise common.UserError(f"loss {total}, gradient {norm} at step {step}: lower --lr")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            beta = min(cfg.ema, (1 + step) / (10 + step))  # smaller at first: early weights fade
            params = [p.detach() for p in model.parameters()]
            torch._foreach_lerp_([*ema.parameters()], params, 1 - beta)
            run.log_step(step, x0.numel(), total, grad_norm=norm, lr=get_lr(step - 1, cfg))
            if step % cfg.eval_every == 0 or step == cfg.steps:
                run.save(step, *state)
        if step < cfg.steps:
            run.save(step, *state)
            raise KeyboardInterrupt(f"stopped at step {step}; go on with --resume")
        run.validate(step, lambda: evaluate(ema, data, cfg, nelbo=nelbo))
        if run.rank == 0:
            common.show_samples(run, sample, ema, data.tokenizer, cfg, step)
            common.plot_loss(run.out)
    return ema


# ---- 7. main -----------------------------------------------------------------------------------
def main(argv, Config=Config, Model=Model, corrupt=corrupt, loss_fn=loss_fn, nelbo=nelbo,
         sample=sample):
    """train (default), sample or eval. lab/ passes other functions."""
    command, cfg = common.parse(Config, PRESETS, argv)
    if command == "train":
        return train(cfg, Model, corrupt, loss_fn, nelbo, sample)
    run = common.Run(cfg)
    data = load_data(cfg) if command == "eval" else None
    model, tokenizer = common.load_model(Model, cfg, run.device, data)
    if command == "eval":
        with run.amp:
            run.say(f"test: {report(evaluate(model, data, cfg, 'test', 500, nelbo))}")
    common.show_samples(run, sample, model, tokenizer, cfg)


if __name__ == "__main__":
    common.run_main(main)
