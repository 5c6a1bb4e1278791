"""Bit diffusion: noise flips the bits of each token's code, learn to predict the token.

Method: the binomial diffusion of Sohl-Dickstein et al. 2015 (arXiv 1503.03585) on the bits of token
ids, a case of D3PM (Austin et al. 2021, arXiv 2107.03006). Analog Bits (Chen et al. 2022) has the
same codes, but Gaussian noise. lab/bit_variants.py: bit head with BCE, mixtures, codes, guidance.

    python bit_diffusion.py     4 to 10 minutes, 2 CPU cores: val <= 1.60 nats/token (entropy 0.91)
    python bit_diffusion.py sample --prompt "Once upon a time" --num-samples 3 --trace
    python bit_diffusion.py sample --infill "Once upon a ___ there was ___"
    python bit_diffusion.py eval    the bound on 500 test rows, samples
    python lab/bit_variants.py --head bit       predict clean bits, BCE: K outputs, not V

Equations. Row U_v of U (V, K) is token v's code of K = ceil(log2 V) bits, each 1 or -1.
    (E1)  forward process: each bit of b_i (position i) is right, as in b_0,i = U_x, x = x_0,i, with
          probability (1 + a_i) / 2 (agreement a_i), of log-odds lam_i = ln((1 + a_i) / (1 - a_i))
    (E2)  own time of a position t_i = clamp((t - tau_i) / w, 0, 1), tau_i in [0, 1 - w], and a_i =
          a(t_i) falls from 1 to 0; w = 1: the usual process; w -> 0: one token after another
    (E3)  self-likelihood: log q(b_i | v) = 1/2 lam_i b_i.U_v + const, the same for all v
    (E4)  p_i = softmax(net_i(b) + log q(b_i | .)), net_i like a log prior
    (E5)  log-odds of bit k to be +1: l_k = ln sum_{v: U_vk = 1} p_v - ln sum_{v: U_vk = -1} p_v
    (E6)  -log p(x_0) <= NELBO = sum_i int_0^inf d lam_i / (2 sinh lam_i) E_b sum_k [R_hat - R
          + R ln(R / R_hat)], any tau: SEDD's score entropy (Lou et al. 2024) for this flip rate.
          For one bit b, R = exp(-lam b b_0) = q(-b | b_0) / q(b | b_0), and R_hat, its mean under
          (E5), is sigmoid(l b) exp(-lam) + sigmoid(-l b) exp(lam); no end terms: a(0) = 1, a(1) = 0
    (E7)  s < t: q(b_s != b_t | b_t, b_0) = (1 - r) (1 - a_s y) / (2 (1 + a_t y)), y = b_t b_0,
          r = a_t / a_s
    (E8)  reverse step: a token v ~ p_i, then each bit from (E7) with U_v in place of b_0,i

Shapes: B rows, T tokens, V vocabulary, K bits, C width, H heads, D = C / H. Units: nats.
Every position of a row is scored, also EOS padding. g seeds all noise. Loss: -log p_i(x_0,i).

Differs from D3PM: own times (E2); (E8) draws a token: a mean code in (E7) would use b_t twice.
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
    out: str = "out/bit_diffusion"  # run folder
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
    schedule: Literal["quadratic", "cosine", "linear"] = "quadratic"  # of a(t), see SCHEDULES
    noise_window: float = 0.1  # w (E2), share of the time in which one position gets its noise
    # sampling; the bound is of: --order random --temperature 1 --no-length-first, many --num-steps
    num_samples: int = 4  # of sample and eval; training draws 64 and prints two
    prompt: str = ""  # text that every sample begins with
    infill: str = ""  # "A ___ and ___3.": fill one token and three; ___ at the end: the rest
    trace: bool = False  # print the trajectory of the first sample
    num_steps: int = 64  # denoising steps; the length costs one evaluation more; 0: one a position
    order: Literal["random", "l2r", "maxprob"] = "maxprob"  # which position is denoised first
    length_first: bool = True  # rows docs: draw the length first, then tokens without EOS
    temperature: float = 0.3  # below 1: safer, less varied; 0: most likely by context
    top_k: int = 0  # keep the k most likely tokens; 0 = all
    top_p: float = 1.0  # keep the most likely tokens that hold this much probability
    # set by the data
    eos: int = 0  # end of document

    def problems(self):
        ok = 0.001 <= self.noise_window <= 1  # less: few draws of the bound fall inside
        return [] if ok else ["--noise-window must be in [0.001, 1]"]


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

    def forward(self, x, positions, is_target=None):
        x = self.convolve(x)
        x = x + self.attn(self.norm1(x), positions)
        x = x if is_target is None else x[is_target]
        return x + self.mlp(self.norm2(x))


def token_codes(V):
    """Codes U (V, K) of +-1, K = ceil(log2 V): the binary digits of each id, highest first."""
    K = max(1, (V - 1).bit_length())
    return 2.0 * (torch.arange(V)[:, None] >> torch.arange(K - 1, -1, -1) & 1) - 1


def bits_to_int(bits, V):
    """+-1 (..., K) -> ids (...), V for codes of no token."""
    K = bits.shape[-1]
    number = ((bits > 0).long() << torch.arange(K - 1, -1, -1, device=bits.device)).sum(-1)
    return number.clamp(max=V)


CLEAN = 40.0  # lam of a clean position: a bit of it is wrong with probability below 2^-53


class Model(nn.Module):
    """Bidirectional transformer: noisy bits (B, T, K) of +-1 and their log-odds lam (B, T) to be
    right -> logits (B, T, V) of (E4), or (n, V) at the n positions `is_target`, boolean or indices.
    It has no time embedding: it sees lam through the self-likelihood (E3)."""

    def __init__(self, cfg):
        super().__init__()
        self.register_buffer("codes", token_codes(cfg.vocab_size))
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.seq_len, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size)
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "head.weight", "bias")):  # so the first bound is ln V
                nn.init.zeros_(p)
            elif p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def self_likelihood(self, bits, lam):
        """log q(bits | v) + const for each token v: (..., K), (...) -> (..., V). In float32 also
        under autocast: it may be in the hundreds, and its differences count."""
        with torch.autocast(bits.device.type, enabled=False):
            return 0.5 * lam[..., None] * bits @ self.codes.T  # (E3)

    def embed(self, bits, lam):
        """What the network sees of each position, (B, T, C): the mean of wte under softmax of the
        self-likelihood; zero for pure noise, one token's embedding where the bits are clean."""
        x = torch.zeros(*lam.shape, self.wte.embedding_dim, device=bits.device)
        at_clean = (lam >= CLEAN).nonzero(as_tuple=True)
        at_noisy = ((lam > 0) & (lam < CLEAN)).nonzero(as_tuple=True)
        p = self.self_likelihood(bits[at_noisy], lam[at_noisy]).softmax(1)
        x[at_noisy] = (p @ self.wte.weight).to(x.dtype)
        x[at_clean] = self.wte(bits_to_int(bits[at_clean], len(self.codes)))
        return x

    def forward(self, bits, lam, is_target=None):
        x = self.embed(bits, lam) + self.wpe.weight[:lam.shape[1]]
        positions = torch.arange(x.shape[1], device=x.device)
        for block in self.blocks[:-1]:
            x = block(x, positions)
        x = self.norm(self.blocks[-1](x, positions, is_target))
        if is_target is not None:
            bits, lam = bits[is_target], lam[is_target]
        return self.head(x).float() + self.self_likelihood(bits, lam)  # (E4)


# ---- 4. corrupt and loss -----------------------------------------------------------------------
SCHEDULES = {  # name: 1 - a(t), from 0 to 1, and its derivative
    "linear": (lambda t: t, torch.ones_like),
    "cosine": (lambda t: (math.pi / 2 * t).sin() ** 2, lambda t: math.pi / 2 * (math.pi * t).sin()),
    "quadratic": (lambda t: t ** 2, lambda t: 2 * t),
}


def position_times(shape, cfg, g, is_given=None):
    """tau (B, T) of (E2), the time at which a position's noise begins to grow: evenly spread over
    [0, 1 - w), in random order; infinite for a given position (boolean, (B, T))."""
    score, N = torch.rand(shape, generator=g), torch.full(shape[:1], shape[1])
    if is_given is not None:
        score, N = score.masked_fill(is_given, 2.0), (~is_given).sum(1).clamp(min=1)
    rank = score.argsort(1).argsort(1)
    tau = (1 - cfg.noise_window) * (rank + torch.rand(shape[0], 1, generator=g)) / N[:, None]
    return tau if is_given is None else tau.masked_fill(is_given, torch.inf)


def wide(x):  # float64, which Apple's GPUs do not have: there on the CPU
    return (x.cpu() if x.device.type == "mps" else x).double()


def noise_levels(t, tau, cfg):
    """Times t (B, 1) or a number, tau (B, T) -> log-odds lam, CLEAN for a clean position and 0 for
    pure noise, and -d lam / dt, 0 for these two: (B, T) each."""
    own = wide(((t - tau) / cfg.noise_window).clamp(0, 1))  # (E2)
    lost, fall = (f(own) for f in SCHEDULES[cfg.schedule])  # 1 - a and its derivative
    lam = (2 / lost - 1).log().clamp(0, CLEAN)  # (E1)
    slope = torch.where((lam > 0) & (lam < CLEAN), 2 * fall / (lost * (2 - lost)), 0.0)
    return lam.float().to(tau.device), slope / cfg.noise_window


def q_sample(clean, lam, g):
    """Codes (..., K) of +-1, log-odds (...) -> codes with each bit right with these odds."""
    p = wide(lam).sigmoid()[..., None]
    noise = g if p.device.type == "cpu" else torch.Generator(p.device).manual_seed(
        int(torch.randint(2 ** 62, (), generator=g)))  # much of it: drawn where it is used
    u = torch.rand(clean.shape, generator=noise, dtype=torch.float64, device=p.device)
    return torch.where((u < p).to(clean.device), clean, -clean)  # (E1)


def bit_logits(model, logits):
    """Log-odds of each bit to be +1: (n, V) -> (n, K), float64 for small probabilities."""
    p, ones = wide(logits).softmax(1), wide(model.codes > 0)
    return (p @ ones).log() - (p @ (1 - ones)).log()  # (E5)


def nelbo_integrand(l_k, bits, clean, lam):
    """The cost in nats per unit of lam, (n,) in float64, of the network's log-odds l_k of each bit,
    given the noisy bits and the clean ones, (n, K) each, and their lam (n,)."""
    bits, clean, lam = wide(bits), wide(clean), wide(lam)[:, None]
    log_R = -lam * bits * clean
    log_R_hat = torch.logaddexp(F.logsigmoid(bits * l_k) - lam, F.logsigmoid(-bits * l_k) + lam)
    cost = log_R_hat.exp() + log_R.exp() * (log_R - log_R_hat - 1)
    return (cost / (2 * lam.sinh())).sum(1)  # (E6)


def corrupt(x0, cfg, g):
    """The forward process: noisy bits (B, T, K), their log-odds lam and each token's weight in the
    loss, (B, T) each: the mean over the noisy tokens of a row, then over rows."""
    B, T = x0.shape
    u = ((torch.arange(B) + torch.rand(1, generator=g)) / B)[:, None]  # low-discrepancy
    t = u if cfg.steps >= 4000 else (0.1 + 0.9 * u) ** 0.75  # more noise: better in short runs
    lam, _ = noise_levels(t, position_times(x0.shape, cfg, g), cfg)
    is_noisy = lam < CLEAN
    weight = is_noisy / is_noisy.sum(1, keepdim=True).clamp(min=1) / B
    bits = q_sample(token_codes(cfg.vocab_size).to(x0.device)[x0], lam.to(x0.device), g)
    return bits, lam.to(x0.device), weight.to(x0.device)


def loss_fn(model, x0, bits, lam, weight):
    """Weighted cross-entropy of the noisy tokens. In sdd.py the NELBO as loss is worse (LOG.md)."""
    at_noisy = (weight > 0).nonzero(as_tuple=True)
    logits = model(bits, lam, at_noisy)
    return (F.cross_entropy(logits, x0[at_noisy], reduction="none") * weight[at_noisy]).sum()


@torch.no_grad()
def nelbo(model, x0, cfg, g, draws=8, is_given=None):
    """Unbiased estimate of an upper bound (E6) on -log p(x0) in nats per row, (B,), from stratified
    times, `draws` in number. With a boolean `is_given` (B, T) it is a bound on -log p(the other
    tokens | the given ones)."""
    (B, T), device = x0.shape, x0.device
    is_given = torch.zeros(B, T, dtype=torch.bool) if is_given is None else is_given.cpu()
    clean, u, total = model.codes[x0], torch.rand(B, 1, generator=g), 0
    tau = position_times(x0.shape, cfg, g, is_given)
    first = tau.amin(1, keepdim=True).clamp(max=1)  # lam changes between these times only
    last = tau.masked_fill(is_given, -cfg.noise_window).amax(1, keepdim=True) + cfg.noise_window
    for k in range(draws):
        lam, slope = noise_levels(first + (last - first) * (k + u) / draws, tau, cfg)
        bits, nats = q_sample(clean, lam.to(device), g), torch.zeros(B, T).double()
        for j in torch.arange(B).split(64):
            lam_j, target = lam[j].to(device), (slope[j] > 0).to(device)
            l_k = bit_logits(model, model(bits[j], lam_j, target))
            cost = nelbo_integrand(l_k, bits[j][target], clean[j][target], lam_j[target])
            nats[j] = nats[j].masked_scatter(slope[j] > 0, cost.cpu())
        total += ((last - first) / draws * slope * nats).sum(1)  # (E6)
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
    bits = q_sample(model.codes[x.masked_fill(~is_given, 0)], is_given * CLEAN, g)
    p_eos = model(bits, is_given * CLEAN).softmax(2)[..., cfg.eos]
    is_end = (~is_given).flip(1).cumprod(1).flip(1) > 0  # the wanted positions at the end of a row
    u = torch.rand(len(x), 1, generator=g).to(x.device)
    return x.masked_fill(is_end & (u < (p_eos * is_end).cummax(1).values), cfg.eos)


def reassign_times(tau, is_waiting, score):
    """tau (B, T), permuted where is_waiting: the highest score gets the largest, denoised first."""
    late = tau.masked_fill(~is_waiting, -torch.inf).sort(1, descending=True).values
    best = score.masked_fill(~is_waiting, -torch.inf).argsort(1, descending=True)
    return torch.where(is_waiting, tau.scatter(1, best, late), tau)


def flip_probability(lam_t, lam_s, y):
    """The probability (n, K), float64, that bits flip from lam_t up to lam_s, (n, 1) each. y (n, K)
    is 1 where a bit is right at t, else -1. No differences near one; below, t = lam_t, s = lam_s:
    1 + a y = 2 sigmoid(y lam), 1 - r = sinh((s - t) / 2) / (sinh(s / 2) cosh(t / 2))."""
    t, s = wide(lam_t), wide(lam_s)
    jump = ((s - t) / 2).sinh() / ((s / 2).sinh() * (t / 2).cosh())  # 1 - r
    return (jump * (-y * s).sigmoid() / (2 * (y * t).sigmoid())).clamp(max=1)  # (E7)


def draw_x0(model, logits, bits, lam, cfg, g):
    """Codes (n, K) of tokens drawn from logits (n, V). The temperature divides net_i alone: the
    self-likelihood is evidence, not a prediction. Top-k and top-p cut the sum of the two."""
    logits = logits + (cfg.temperature - 1) * model.self_likelihood(bits, lam)
    return model.codes[categorical(filter_logits(logits, cfg), g)]  # (E8)


@torch.no_grad()
def sample(model, x, cfg, g, on_step=lambda nfe, x: None, draw_x0=draw_x0):
    """The reverse process: positions of x (B, T) with the mask id V become tokens, all else is
    given. Returns x and NFE. on_step(nfe, ids): V where P(all bits right) < 1/2, or no token."""
    x, V, nfe, device = x.clone(), cfg.vocab_size, 0, x.device
    length_first = cfg.length_first and cfg.rows == "docs"
    if length_first and (x[:, -1] == V).any():
        x, nfe = draw_length(model, x, cfg, g), 1
        on_step(nfe, x)
    is_given = x != V
    bits = q_sample(model.codes[x.masked_fill(~is_given, 0)], is_given * CLEAN, g)
    tau = position_times(x.shape, cfg, g, is_given.cpu()).to(device)
    if cfg.order == "l2r":
        tau = reassign_times(tau, ~is_given, -(~is_given).cumsum(1).float())
    steps = cfg.num_steps or x.shape[1]
    for k in range(steps, 0, -1):
        lam, lam_s = (noise_levels(t / steps, tau, cfg)[0] for t in (k, k - 1))
        # 1. predict, if lam rises anywhere; with maxprob at all noisy positions, to choose
        if not (lam_s > lam).any():
            continue
        is_target = lam < CLEAN if cfg.order == "maxprob" else lam_s > lam
        logits = model(bits, lam, is_target)
        nfe += 1
        if length_first:
            logits[:, cfg.eos] = -torch.inf
        # 2. choose positions: of those that are pure noise the most confident begin next
        if cfg.order == "maxprob":
            confidence = torch.zeros(x.shape, device=device)
            confidence[is_target] = logits.softmax(1).amax(1)
            tau = reassign_times(tau, is_target & (lam == 0), confidence)
            lam_s = noise_levels((k - 1) / steps, tau, cfg)[0]
            logits, is_target = logits[(lam_s > lam)[is_target]], lam_s > lam
        # 3. draw: one reverse step; where lam_s is clean the codes become tokens
        bits_t, is_last = bits[is_target], lam_s[is_target] >= CLEAN
        U_v = draw_x0(model, logits, bits_t, lam[is_target], cfg, g)
        y = wide(bits_t * U_v)
        f = flip_probability(lam[is_target][:, None], lam_s[is_target][:, None], y)  # (E8)
        flips = (torch.rand(f.shape, generator=g, dtype=torch.float64).to(f.device) < f).to(device)
        bits[is_target] = torch.where(is_last[:, None], U_v, torch.where(flips, -bits_t, bits_t))
        x[is_target] = torch.where(is_last, bits_to_int(U_v, V), V)
        on_step(nfe, bits_to_int(bits, V).masked_fill(lam_s.sigmoid() ** bits.shape[2] < 0.5, V))
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
            bits, lam, weight = corrupt(x0, cfg, g)
            total = torch.zeros((), device=run.device)
            micro_batches = torch.arange(len(x0)).tensor_split(cfg.grad_accum * run.world)
            for i in micro_batches[run.rank::run.world]:
                with run.amp:
                    loss = loss_fn(model, x0[i], bits[i], lam[i], weight[i])
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
