"""Sparse distribution diffusion: each position is k weighted candidate tokens, denoised together.

Method: the state [(0.6, cat), (0.3, dog), (0.1, pet)] of A. Holmes' "Sparse Distribution Diffusion"
(github.com/aaholmes/diffusion-llm), with a forward process that has a likelihood: candidates are
the top k of an exact posterior. The original (lab/sdd_variants.py, notebook 05) collapses to one
text: in sampling the candidates are what the network predicted just before, which confirms itself.

    python sdd.py               4 to 9 minutes, 2 CPU cores: val <= 1.55 nats/token (entropy 0.91)
    python sdd.py sample --prompt "Once upon a time" --num-samples 3 --trace
    python sdd.py sample --infill "Once upon a ___ there was ___"
    python sdd.py eval          the bound on 500 test rows, samples

Equations. prec_i >= 0: precision of position i, the SNR of z_i; e_v: the one-hot vector of token v.
    (E1)  forward process: z_i = prec_i e_x + sqrt(prec_i) eps, V numbers, x = x_0,i: observations
          of x add up as precision grows, Brownian motion with drift e_x
    (E2)  self-likelihood: log q(z_i | v) = z_i,v + const, the same for all v, so softmax(z_i) =
          p(x_0,i | z_i) under a uniform prior over tokens
    (E3)  state_i: the k largest of softmax(z_i) as (token, log p), and log p of all other tokens
    (E4)  own time of a position t_i = clamp((t - tau_i) / w, 0, 1), tau_i in [0, 1 - w], and prec_i
          = -max(8, 2 ln V) ln t_i; w = 1: the same for all; w -> 0: one token after another
    (E5)  p_i = softmax(net_i(states) + z_i), net_i like a log prior
    (E6)  -log p(x_0) <= NELBO = 1/2 sum_i int E |e_x - p_i|^2 d prec_i, for any tau; there is no
          other term: at prec = 0 nothing is known, at infinity everything
    (E7)  reverse step to s < t, a = prec_s - prec_t: z_s = z_t + a h + sqrt(a) xi; sampler token:
          h = e_v, v ~ p; ancestral: h = p; deterministic (DDIM): z_s = prec_s p + sqrt(prec_s /
          prec_t) (z_t - prec_t p), from prec_t = 0: prec_s p + sqrt(prec_s) xi; xi ~ N(0, I)
    (E8)  remasking, prec_s < prec_t: z_s = r z_t + sqrt(prec_t r (1 - r)) xi, r = prec_s / prec_t

Shapes: B rows, T tokens, V vocabulary, K candidates, C width, H heads, D = C / H. Units: nats.
Every position of a row is scored, also EOS padding. g seeds all noise. Loss: -log p_i(x_0,i).

Differs from the original: forward process, bound, self-likelihood, own times, remasking.
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
    out: str = "out/sdd"  # run folder
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
    k: int = 8  # candidates of a position (E3)
    noise_window: float = 0.1  # w (E4), share of the time in which one position gets its noise
    # sampling; the bound is of: --sampler token --order random --temperature 1 --remask none
    # --no-length-first, many --num-steps
    num_samples: int = 4  # of sample and eval; training draws 64 and prints two
    prompt: str = ""  # text that every sample begins with
    infill: str = ""  # "A ___ and ___3.": fill one token and three; ___ at the end: the rest
    trace: bool = False  # print the trajectory of the first sample
    num_steps: int = 32  # denoising steps; the length costs one evaluation more; 0: one a position
    sampler: Literal["token", "ancestral", "deterministic"] = "deterministic"  # reverse step (E7)
    order: Literal["random", "l2r", "maxprob"] = "maxprob"  # which position is denoised first
    remask: Literal["none", "conf"] = "conf"  # redraw clean tokens, improbable ones more often
    length_first: bool = True  # rows docs: draw the length first, then tokens without EOS
    temperature: float = 0.2  # below 1: safer, less varied; 0: most likely by context
    top_k: int = 0  # keep the k most likely tokens; 0 = all
    top_p: float = 1.0  # keep the most likely tokens that hold this much probability
    # set by the data
    eos: int = 0  # end of document

    def problems(self):
        ok = 0.001 <= self.noise_window <= 1  # less: few draws of the bound fall inside
        bad = [] if ok else ["--noise-window must be in [0.001, 1]"]
        if self.remask == "conf" and self.order != "maxprob":
            bad.append("--remask conf needs --order maxprob: add --remask none")
        return bad


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


class Model(nn.Module):
    """Bidirectional transformer over states: candidates ids (B, T, K) and logp (B, T, K + 1), their
    log-probabilities and, last, that of all other tokens -> the context's logits net (B, T, V) of
    (E5), or (n, V) at the n positions `is_target`, boolean (B, T) or indices. The first candidate
    of a clean position has logp 0 (also if p rounds to 1), the last entry if nothing is known."""
    CAP = 10.0  # largest logit of the network, either sign: context alone gives odds up to e^20

    def __init__(self, cfg):
        super().__init__()
        self.k = cfg.k
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.logp_in = nn.Linear(1, 64)
        self.logp_head = nn.Linear(64, cfg.n_embd, bias=False)
        self.wpe = nn.Embedding(cfg.seq_len, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size)
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "head.weight", "bias")):  # so the first bound is ln V
                nn.init.zeros_(p)
            elif p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def embed(self, ids, logp):
        """A state as one vector, (B, T, C): wte of the first candidate if clean or p rounds to 1,
        0 if unknown, else sum_j p_j (wte_j + f(log p_j)); j: candidates, other mass (wte 0)."""
        at_clean = (logp[..., 0] == 0).nonzero(as_tuple=True)
        at_between = ((logp[..., 0] < 0) & (logp[..., -1] < 0)).nonzero(as_tuple=True)
        x = torch.zeros(*ids.shape[:2], self.wpe.embedding_dim, device=ids.device)
        x[at_clean] = self.wte(ids[at_clean][:, 0])
        logp = logp[at_between]  # (n, K + 1)
        slots = F.pad(self.wte(ids[at_between]), (0, 0, 0, 1))
        slots = slots + self.logp_head(F.gelu(self.logp_in(logp.clamp(min=-20)[..., None] / 10)))
        x[at_between] = (logp.exp()[:, None] @ slots)[:, 0].to(x.dtype)
        return x

    def forward(self, ids, logp, is_target=None):
        x = self.embed(ids, logp) + self.wpe.weight[:ids.shape[1]]
        positions = torch.arange(x.shape[1], device=x.device)
        for block in self.blocks[:-1]:
            x = block(x, positions)
        x = self.blocks[-1](x, positions, is_target)
        net = self.head(self.norm(x)).float()
        return self.CAP * (net / self.CAP).tanh()  # context cannot outweigh a certain z_i


# ---- 4. corrupt and loss -----------------------------------------------------------------------
CLEAN = 200.0  # precision of a clean position: z is largest elsewhere with probability < 1e-18


def between(prec):
    """Positions with a noisy z, neither clean nor unknown: boolean (B, T)."""
    return (prec > 0) & (prec < CLEAN)


def position_times(shape, cfg, g, is_given=None):
    """tau (B, T) of (E4), the time at which a position's noise begins to grow: evenly spread over
    [0, 1 - w), in random order; infinite for a given position (boolean, (B, T))."""
    score, N = torch.rand(shape, generator=g), torch.full(shape[:1], shape[1])
    if is_given is not None:
        score, N = score.masked_fill(is_given, 2.0), (~is_given).sum(1).clamp(min=1)
    rank = score.argsort(1).argsort(1)
    tau = (1 - cfg.noise_window) * (rank + torch.rand(shape[0], 1, generator=g)) / N[:, None]
    return tau if is_given is None else tau.masked_fill(is_given, torch.inf)


def noise_levels(t, tau, cfg):
    """Times t (B, 1) or a number, tau (B, T) -> precision, CLEAN for a clean position and 0 where
    nothing is known, and -d prec / dt, 0 for these two: (B, T) each."""
    own = ((t - tau) / cfg.noise_window).clamp(0, 1)  # (E4)
    own = (own.cpu() if own.device.type == "mps" else own).double()  # Apple's GPUs have none
    unit = max(8.0, 2 * math.log(cfg.vocab_size))  # around this prec z_i alone loses the token
    prec = (unit * -own.log()).clamp(0, CLEAN)
    slope = torch.where((prec > 0) & (prec < CLEAN), unit / own, 0.0)
    return prec.float().to(tau.device), slope / cfg.noise_window


def q_sample(x0, prec, eps):
    """Tokens x0 (n,), precision (n,), standard normal eps (n, V) -> z (n, V)."""
    return (prec.sqrt()[:, None] * eps).scatter_add(1, x0[:, None], prec[:, None])  # (E1)


def top_k_state(z, k):
    """z (n, V) -> candidates ids (n, K), K = min(k, V), and logp (n, K + 1): theirs, falling, and
    that of all other tokens."""
    logp = z.float().log_softmax(1)  # (E2)
    ids = z.topk(min(k, z.shape[1])).indices
    rest = logp.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return ids, torch.cat((logp.gather(1, ids), rest), 1)  # (E3)


def input_state(x, prec, z, k):
    """The network's input: tokens x (B, T), which count where prec (B, T) is clean, and z (n, V) of
    the n positions in between -> ids (B, T, K), logp (B, T, K + 1)."""
    K = min(k, z.shape[1])
    ids = F.pad(x.masked_fill(prec < CLEAN, 0)[..., None], (0, K - 1))
    logp = torch.full((*prec.shape, K + 1), -torch.inf, device=prec.device)
    logp[..., 0].masked_fill_(prec >= CLEAN, 0.0)
    logp[..., -1].masked_fill_(prec == 0, 0.0)
    if len(z):
        at_between = between(prec).nonzero(as_tuple=True)
        ids[at_between], logp[at_between] = top_k_state(z, k)
    return ids, logp


def predict(model, x, prec, z, is_target):
    """Logits (m, V) of (E5) at the m positions `is_target`, and z_i there; inputs: input_state."""
    net = model(*input_state(x, prec, z, model.k), is_target)
    is_between = between(prec)
    if len(z) == 0:
        return net, torch.zeros_like(net)
    index = is_between.flatten().cumsum(0).view(prec.shape) - 1  # of each position in z
    z_i = torch.where(is_between[is_target][:, None], z[index[is_target].clamp(min=0)], 0.0)
    return net + z_i, z_i  # (E5)


def squared_error(logits, x0):
    """|e_x - p|^2 of p = softmax(logits) (n, V) and tokens x0 (n,): (n,), float64."""
    p = (logits.cpu() if logits.device.type == "mps" else logits).double().softmax(1)
    return p.scatter_add(1, x0[:, None].to(p.device), -torch.ones_like(p[:, :1])).square().sum(1)


def corrupt(x0, cfg, g, noise_levels=noise_levels):
    """The noise of the forward process: precision (B, T), eps (B, M, V) for the at most M positions
    of a row that are in between, in their order, and each token's weight in the loss (B, T): the
    mean over the noisy tokens of a row, then over rows."""
    B, T = x0.shape
    u = ((torch.arange(B) + torch.rand(1, generator=g)) / B)[:, None]  # low-discrepancy
    t = u if cfg.steps >= 4000 else (0.1 + 0.9 * u) ** 0.75  # more noise: better in short runs
    prec, _ = noise_levels(t, position_times(x0.shape, cfg, g), cfg)
    is_noisy, count = prec < CLEAN, between(prec).sum(1)
    is_used = torch.arange(int(count.max())) < count[:, None]  # (B, M)
    noise = g if x0.device.type == "cpu" else torch.Generator(x0.device).manual_seed(
        int(torch.randint(2 ** 62, (), generator=g)))  # much of it: drawn where it is used
    eps = torch.zeros(*is_used.shape, cfg.vocab_size, device=x0.device)
    eps[is_used.nonzero(as_tuple=True)] = torch.randn(
        int(count.sum()), cfg.vocab_size, generator=noise, device=x0.device)
    weight = is_noisy / is_noisy.sum(1, keepdim=True).clamp(min=1) / B
    return prec.to(x0.device), eps, weight.to(x0.device)


def loss_fn(model, x0, prec, eps, weight):
    """Weighted cross-entropy of noisy tokens. The NELBO as loss is worse at this lr (LOG.md)."""
    at_noisy, count = (weight > 0).nonzero(as_tuple=True), between(prec).sum(1)
    eps = eps[torch.arange(eps.shape[1], device=eps.device) < count[:, None]]  # (n, V)
    at_between = between(prec).nonzero(as_tuple=True)
    z = q_sample(x0[at_between], prec[at_between], eps)
    logits, _ = predict(model, x0, prec, z, at_noisy)
    return (F.cross_entropy(logits, x0[at_noisy], reduction="none") * weight[at_noisy]).sum()


@torch.no_grad()
def nelbo(model, x0, cfg, g, draws=8, is_given=None, predict=predict, noise_levels=noise_levels):
    """Unbiased estimate of an upper bound (E6) on -log p(x0) in nats per row, (B,), from stratified
    times, `draws` in number. With a boolean `is_given` (B, T) it is a bound on -log p(the other
    tokens | the given ones)."""
    (B, T), device, total = x0.shape, x0.device, 0
    is_given = torch.zeros(B, T, dtype=torch.bool) if is_given is None else is_given.cpu()
    tau, u = position_times(x0.shape, cfg, g, is_given), torch.rand(B, 1, generator=g)
    first = tau.amin(1, keepdim=True).clamp(max=1)  # precision changes between these times only
    last = tau.masked_fill(is_given, -cfg.noise_window).amax(1, keepdim=True) + cfg.noise_window
    for k in range(draws):
        prec, slope = noise_levels(first + (last - first) * (k + u) / draws, tau, cfg)
        nats = torch.zeros(B, T).double()
        for j in torch.arange(B).split(64):
            x, prec_j, target = x0[j.to(device)], prec[j].to(device), (slope[j] > 0).to(device)
            x_z, prec_z = x[between(prec_j)], prec_j[between(prec_j)]
            z = q_sample(x_z, prec_z, torch.randn(len(x_z), cfg.vocab_size, generator=g).to(device))
            logits, _ = predict(model, x, prec_j, z, target)
            cost = 0.5 * squared_error(logits, x[target])
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


def draw_length(model, x, cfg, g, predict):
    """Rows x (B, T) with EOS from a drawn length on. A perfect model has P(EOS at i) = P(length <=
    i), which rises with i (cummax makes it). Unfiltered logits; a row may stay without EOS."""
    is_given, p_eos = x != cfg.vocab_size, torch.zeros(x.shape, device=x.device)
    prec, no_z = torch.where(is_given, CLEAN, 0.0), torch.zeros(0, cfg.vocab_size, device=x.device)
    p_eos[~is_given] = predict(model, x, prec, no_z, ~is_given)[0].softmax(1)[:, cfg.eos]
    is_end = (~is_given).flip(1).cumprod(1).flip(1) > 0  # the wanted positions at the end of a row
    u = torch.rand(len(x), 1, generator=g).to(x.device)
    return x.masked_fill(is_end & (u < (p_eos * is_end).cummax(1).values), cfg.eos)


def reassign_times(tau, is_waiting, score):
    """tau (B, T), permuted where is_waiting: the highest score gets the largest, denoised first."""
    late = tau.masked_fill(~is_waiting, -torch.inf).sort(1, descending=True).values
    best = score.masked_fill(~is_waiting, -torch.inf).argsort(1, descending=True)
    return torch.where(is_waiting, tau.scatter(1, best, late), tau)


def sampler_step(z, prec_t, prec_s, h, xi, sampler):
    """z (n, V) from precision prec_t (n,) to prec_s (n,): up, towards h (n, V), or down, to what
    fewer observations would have shown. xi (n, V): standard normal."""
    t, s = prec_t[:, None], prec_s[:, None]  # precisions, not times
    if sampler == "deterministic":  # from nothing known: one noise for the whole path
        up = s * h + torch.where(t > 0, (s / t).sqrt() * (z - t * h), s.sqrt() * xi)  # (E7)
    else:
        up = z + (s - t) * h + (s - t).clamp(min=0).sqrt() * xi  # (E7)
    down = s / t * z + (s / t * (t - s)).clamp(min=0).sqrt() * xi  # (E8)
    return torch.where(s >= t, up, down)


@torch.no_grad()
def sample(model, x, cfg, g, on_step=lambda *_: None, predict=predict, noise_levels=noise_levels):
    """The reverse process: positions of x (B, T) with the mask id V become tokens, all else is
    given. Returns x and NFE. on_step(nfe, x) may see x, V where no token has probability 1/2."""
    x, V, nfe, device = x.clone(), cfg.vocab_size, 0, x.device
    length_first = cfg.length_first and cfg.rows == "docs"
    if length_first and (x[:, -1] == V).any():
        x, nfe = draw_length(model, x, cfg, g, predict), 1
        on_step(nfe, x)
    is_given = x != V
    z, conf = torch.zeros(*x.shape, V, device=device), torch.zeros(x.shape, device=device)
    tau = position_times(x.shape, cfg, g, is_given.cpu()).to(device)
    prec = torch.where(is_given, CLEAN, 0.0)
    if cfg.order == "l2r":
        tau = reassign_times(tau, ~is_given, -(~is_given).cumsum(1).float())
    steps = cfg.num_steps or x.shape[1]
    for step in range(steps, 0, -1):
        prec_s = noise_levels((step - 1) / steps, tau, cfg)[0]
        # 1. predict, where precision grows; with maxprob at all noisy positions, to choose
        is_target = prec < CLEAN if cfg.order == "maxprob" else prec_s > prec
        may_swap = cfg.remask == "conf" and is_target.any() and (prec > 0)[~is_given].any()
        if not (prec_s > prec).any() and not may_swap:
            continue  # no position moves
        logits, z_i = predict(model, x, prec, z[between(prec)], is_target)
        nfe += 1
        if length_first:
            logits[:, cfg.eos] = -torch.inf
        # 2. choose positions, the most confident first. remask conf: all get new times, noisy ones
        #    the largest, denoised first; a clean one with a small time becomes noisy, to be redrawn
        if cfg.order == "maxprob":
            conf[is_target] = (logits.amax(1) - logits.logsumexp(1)).exp()
            score, is_waiting = conf, prec == 0
            if cfg.remask == "conf":  # clean ones: a draw by the weights exp(-p), below all noisy
                gumbel = -(-torch.rand(x.shape, generator=g).to(device).log()).log()
                score, is_waiting = torch.where(prec < CLEAN, conf, conf - gumbel - 10), ~is_given
            tau = reassign_times(tau, is_waiting, score)
            prec_s = noise_levels((step - 1) / steps, tau, cfg)[0]
            keep, is_target = (prec_s > prec)[is_target], prec_s > prec
            logits, z_i = logits[keep], z_i[keep]
        # 3. draw: temperature divides net only, z_i is evidence; top-k and top-p cut the sum
        kept = filter_logits(logits + (cfg.temperature - 1) * z_i, cfg)
        tokens = kept.argmax(1) if cfg.sampler == "deterministic" else categorical(kept, g)
        h = F.one_hot(tokens, V).to(z)
        if cfg.sampler != "token":  # where prec_s is clean z becomes a token
            h = torch.where((prec_s[is_target] >= CLEAN)[:, None], h, kept.softmax(1))
        conf[is_target] = logits.softmax(1).gather(1, tokens[:, None])[:, 0]
        x[is_target] = tokens
        # 4. steps up, and down where a position has to wait again
        for part, towards in ((is_target, h), (prec_s < prec, 0.0)):
            if part.any():
                xi = torch.randn(int(part.sum()), V, generator=g).to(device)
                z[part] = sampler_step(z[part], prec[part], prec_s[part], towards, xi, cfg.sampler)
        prec = prec_s
        ids, logp = input_state(x, prec, z[between(prec)], model.k)
        on_step(nfe, ids[..., 0].masked_fill(logp[..., 0] < math.log(0.5), V))
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
            prec, eps, weight = corrupt(x0, cfg, g)
            total = torch.zeros((), device=run.device)
            micro_batches = torch.arange(len(x0)).tensor_split(cfg.grad_accum * run.world)
            for i in micro_batches[run.rank::run.world]:
                with run.amp:
                    loss = loss_fn(model, x0[i], prec[i], eps[i], weight[i])
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
