"""Masked diffusion language model: hide tokens, learn to say what was hidden, sample by unhiding.

Method: MDLM (Sahoo et al. 2024, arXiv 2406.07524), MD4 (Shi et al. 2024), LLaDA (Nie et al. 2025).

    python mdlm.py                  6 minutes, 2 CPU cores: <= 1.52 nats/token (entropy 0.91)
    python mdlm.py sample --prompt "Once upon a time" --n 3 --trace          32 calls, see FAST
    python mdlm.py sample --infill "Once upon a ___ there was ___"
    python mdlm.py eval             bound, masked accuracy, infilling, samples of few steps

Equations. gamma(t) is the mask rate, rising from gamma(0) = 0 to gamma(1) = 1; M the mask state.
    (E1)  q(x_t,i = M | x_0) = gamma(t), independently for every position i; else x_t,i = x_0,i
    (E2)  c_i = -log p(x_0,i | x_t) for masked i: the network predicts V real tokens, never M
    (E3)  NELBO = int_0^1 gamma'(t)/gamma(t) E sum_masked c_i dt >= -log p(x_0)
    (E4)        = sum_{n=1..T} (1/n) E_{|A|=n} sum_{i in A} c_i      n masks, every n alike
    (E5)  NELBO_N = sum_{k=1..N} (gamma_k - gamma_{k-1})/gamma_k E sum_masked c_i
    (E6)  a step t -> s reveals each masked token with probability (gamma_t - gamma_s)/gamma_t
    (E7)  a revealed token is drawn from p(. | x_t) and never changes again
    (E8)  guidance by given text c: log p ~ (1 + w) log p(. | x_t) - w log p(. | x_t without c)
    (E9)  ReMDM: written tokens are hidden again with probability sigma; (E6) then reveals with
          (gamma_t - gamma_s + sigma (1 - gamma_t)) / gamma_t, and P(masked at s) is gamma_s still

Shapes: B batch, T tokens, V vocabulary, C width, H heads, D = C / H head width.
Units: nats. Every position of a row is charged, the EOS-filled tail too: nobody is told the length.

Differs from the paper: no time cut-off epsilon anywhere; bounds by systematic counts of masks (E4)
instead of random t, which spread less; the trunk of ar.py and its optimizers.
Differs from ar.py: attention looks both ways; the input has one more embedding, M, learned
positions, without which masks alone look the same from everywhere, and a convolution over three
neighbours on each side, which learns faster; the loss covers masked positions; the likelihood is a
bound; tokens are written in any order, several at a time.
"""
import copy
import dataclasses
import functools
import math
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import UserError
from data.prepare import load_tokenizer, open_split, prepare, verify

NAME, BOUND = "mdlm", "upper"
NOTE = "log-linear is 1 - (1 - t)^2 here; what SEDD and MDLM call loglinear is linear here"

# ----------------------------------------------------------------------------------------------
# 1. config
# ----------------------------------------------------------------------------------------------


@dataclass
class Config:
    data: str = "tales"  # tales, tinystories, wikitext2, openwebtext, fineweb, or a file or folder
    tokenizer: str = "bpe"  # bpe (trained on the data), gpt2, byte, hf:NAME
    vocab_size: int = 0  # tokens to predict; 0 = the tokenizer's own size (bpe: 2048)
    docs: int = 0  # use at most this many documents; 0 = all
    rows: str = "auto"  # docs: a document a row, EOS-filled; stream: windows; auto: docs for tales
    preset: str = "tiny"  # tiny 4x192, small 8x512, medium 12x768
    seed: int = 1337  # weights, batches and noise
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # auto, float32, bfloat16 (autocast)
    steps: int = 1600  # optimizer steps
    batch_size: int = 16  # rows per micro-batch, over all processes
    seq_len: int = 160  # tokens per row
    n_layer: int = 4  # blocks
    n_head: int = 4  # heads
    n_embd: int = 192  # width
    lr: float = 6e-3  # peak learning rate
    warmup: int = 50  # steps of linear warm-up; then cosine to zero
    grad_clip: float = 1.0  # largest gradient norm; 0 = off
    grad_accum: int = 1  # micro-batches per step
    ema: float = 0.99  # averaging of the weights that are evaluated; 0 = off
    eval_every: int = 200  # steps between evaluations
    save_every: int = 500  # steps between checkpoints
    out: str = ""  # run folder; empty = out/<script>
    resume: bool = False  # continue the run in the run folder
    compile: bool = False  # torch.compile: half a minute first, then faster
    log: str = ""  # tensorboard, wandb or both (comma)
    # sampling
    n: int = 4  # samples
    prompt: str = ""  # text that every sample begins with
    temperature: float = 1.0  # below 1: safer, less diverse; 0: the likeliest token
    top_k: int = 0  # keep the k likeliest tokens; 0 = all
    top_p: float = 1.0  # keep the likeliest tokens that hold this much probability
    trace: bool = False  # show the sampling trajectory
    # method
    schedule: str = "linear"  # mask rate: linear, cosine, log-linear, maskgit, powerK (power2 ...)
    loss: Literal["ce_seq", "ce_batch", "nelbo"] = "ce_seq"  # how masked tokens are averaged
    t_sampler: Literal["iid", "stratified", "systematic", "antithetic"] = "systematic"  # draws of t
    exact_count: bool = True  # mask exactly n tokens instead of each with probability gamma
    cond: Literal["none", "add", "table", "adaln"] = "none"  # how the network is told the mask rate
    order: Literal["random", "l2r", "maxprob", "margin", "entropy", "sampled"] = "random"  # see 5.
    quota: Literal["even", "grid", "binomial", "one", "threshold"] = "even"  # how many in a step
    sampling_steps: int = 0  # steps of quotas even, grid (along --grid), binomial; 0 = quota one
    grid: str = "linear"  # mask rates of the steps of quotas grid and binomial, see --schedule
    threshold: float = 0.9  # quota threshold: reveal every position whose best token is this sure
    guidance: float = 0.0  # classifier-free guidance by the given text (E8); 0 = off
    block: int = 0  # write so many tokens at a time, block by block from the left; 0 = all
    cache: Literal["none", "prefix", "dual"] = "none"  # keep keys and values within a block
    remask: Literal["none", "cap", "rescale", "conf"] = "none"  # hide written tokens again (E9)
    remask_eta: float = 0.1  # probability of that: at most (cap, conf), share of most (rescale)
    eos_fill: bool = False  # after the first EOS of a row everything is EOS, without a call
    eos_last: bool = False  # orders by certainty: positions that look like EOS after all others
    length: int = 0  # tokens to write, 0 = one row; beyond seq_len in blocks
    infill: str = ""  # "Once ___ a ___3 who": holes of one and three tokens, then the end
    judge: str = "out/ar"  # eval: the run of ar.py that judges samples
    eval_orders: str = "random,maxprob,margin,entropy"  # eval: orders to compare
    eval_seeds: int = 1  # eval: repetitions of every sampling setting
    # filled in from the data
    eos: int = -1  # end of document; also BOS where the tokenizer has no other
    bos: int = -1  # first input
    data_dir: str = ""  # where the prepared data are

    def __post_init__(self):
        for name in (self.schedule, self.grid):  # what cannot work stops here, before any training
            get_schedule(name)
        orders = ("random", "l2r", "maxprob", "margin", "entropy", "sampled")
        for name in self.eval_orders.split(","):
            if name not in orders:
                raise ValueError(f"--eval-orders knows {', '.join(orders)}, not '{name}'")
        if self.cache != "none" and self.guidance:
            raise ValueError("--cache keeps no keys for the second network call of --guidance: "
                             "choose one of the two")
        if self.remask != "none" and self.quota == "threshold":
            raise ValueError("--remask follows a plan of mask rates, --quota threshold has none: "
                             "add --remask none, or choose another quota")


PRESETS = dict(tiny={}, small=dict(n_layer=8, n_head=8, n_embd=512, seq_len=256, lr=2e-3),
               medium=dict(n_layer=12, n_head=12, n_embd=768, seq_len=512, lr=1e-3))
SHAPE = ("vocab_size", "seq_len", "n_layer", "n_head", "n_embd", "rows")  # fixed by a checkpoint
FAST = dict(order="maxprob", sampling_steps=32, temperature=0.5, remask="conf", remask_eta=1.0)
# FAST is how samples are drawn unless told otherwise: most valid tales in 16 and in 32 calls, see
# LOG.md. The defaults above are the law that the likelihoods are about, one token a call.


def fast(cfg):
    """cfg with FAST wherever it has the defaults: how samples are drawn unless told otherwise."""
    return dataclasses.replace(cfg, **{
        k: v for k, v in FAST.items() if getattr(cfg, k) == getattr(Config, k)
        and not (k.startswith("remask") and cfg.quota == "threshold")})

# ----------------------------------------------------------------------------------------------
# 2. data
# ----------------------------------------------------------------------------------------------


@functools.lru_cache
def open_data(folder):
    """A prepared folder: .train .val .test = (ids memmap, offsets, log p or None), .tokenizer."""
    verify(folder)
    return SimpleNamespace(tokenizer=load_tokenizer(folder),
                           **{s: open_split(folder, s) for s in ("train", "val", "test")})


def fill_in(cfg, rank=0):
    """Prepare the data if needed and write what they fix (vocabulary, rows) into cfg."""
    cfg.data_dir = str(prepare(cfg.data, cfg.tokenizer, cfg.vocab_size, cfg.docs, quiet=rank > 0))
    tokenizer = open_data(cfg.data_dir).tokenizer
    cfg.vocab_size, cfg.eos, cfg.bos = tokenizer.vocab_size, tokenizer.eos, tokenizer.bos
    if cfg.rows == "auto":
        cfg.rows = "docs" if cfg.data == "tales" else "stream"
    ids = open_data(cfg.data_dir).train[0]
    if cfg.rows == "stream" and len(ids) <= cfg.seq_len:
        raise UserError(f"the training split has {len(ids)} tokens, fewer than --seq-len "
                        f"{cfg.seq_len}: use a smaller --seq-len or more text")
    return cfg


def take(split, cfg, index):
    """Rows `index` of a split: documents, EOS-filled and cut at seq_len, or windows.  # (B, T)"""
    ids, offsets, _ = getattr(open_data(cfg.data_dir), split)
    column = np.arange(cfg.seq_len)
    index = np.asarray(index)
    if cfg.rows == "stream":
        return torch.from_numpy(ids[index[:, None] + column].astype(np.int64))
    start, end = offsets[index], offsets[index + 1]
    where = start[:, None] + column
    rows = ids[np.minimum(where, len(ids) - 1)].astype(np.int64)
    return torch.from_numpy(np.where(where < end[:, None], rows, cfg.eos))


def get_batch(split, cfg, g):
    """The rows of one optimizer step, drawn at random: (grad_accum * batch_size, T) int64."""
    ids, offsets, _ = getattr(open_data(cfg.data_dir), split)
    many = len(offsets) - 1 if cfg.rows == "docs" else len(ids) - cfg.seq_len + 1
    return take(split, cfg, torch.randint(many, (cfg.grad_accum * cfg.batch_size,), generator=g))


def get_eval_rows(split, cfg, n):
    """The first n documents (or n evenly spaced windows) of a split and, where it is known, the
    true -log p of each document in nats: (n, T), (n,) or None."""
    ids, offsets, logp = getattr(open_data(cfg.data_dir), split)
    if cfg.rows == "stream":
        last = len(ids) - cfg.seq_len
        if last < 0:
            raise UserError(f"the {split} split has {len(ids)} tokens, fewer than --seq-len")
        return take(split, cfg, np.linspace(0, last, min(n, last + 1)).astype(int)), None
    n = min(n, len(offsets) - 1)
    whole = np.diff(offsets[:n + 1]).max() <= cfg.seq_len  # a cut document has no known floor
    floor = torch.from_numpy(-np.asarray(logp[:n])) if logp is not None and whole else None
    return take(split, cfg, np.arange(n)), floor


# ----------------------------------------------------------------------------------------------
# 3. model
# ----------------------------------------------------------------------------------------------


def rotary(positions, width):
    """cos and sin of rotary positions (Su et al. 2021, eq. 34): two (len(positions), width / 2)."""
    inverse = 10000 ** (-torch.arange(0, width, 2, device=positions.device) / width)
    angle = positions[:, None] * inverse
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Turn the pairs (x_j, x_{j + D/2}) by their position's angles.  # (B, H, T, D)"""
    cos, sin = (part.to(x.dtype) for part in rope)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def attend(q, k, v, causal):
    """Softmax attention: (B, H, Tq, D), (B, H, Tk, D) twice -> (B, H, Tq, D). Written out on CPUs,
    where PyTorch's fused kernel is 4x slower in bfloat16 (backward pass, 2.13)."""
    Tq, Tk = q.shape[2], k.shape[2]
    if q.is_cuda and Tq == Tk:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5  # (B, H, Tq, Tk)
    if causal and Tq > 1:  # the last query sees every key
        future = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).triu(Tk - Tq + 1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.qkv = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x, rope, causal, past=None):
        """past: None, or this layer's [k, v], which is extended in place by the new positions."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q = rotate(F.rms_norm(q, q.shape[-1:]), rope)  # (B, H, T, D)
        k = rotate(F.rms_norm(k, k.shape[-1:]), rope)
        if past is not None:
            past[:] = k, v = [torch.cat(pair, 2) for pair in zip(past, (k, v))] if past else [k, v]
        y = attend(q, k, v, causal)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=False)
        self.proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.attn = nn.RMSNorm(cfg.n_embd), Attention(cfg)
        self.norm2, self.mlp = nn.RMSNorm(cfg.n_embd), MLP(cfg)
        self.ada_head = nn.Linear(cfg.n_embd, 6 * cfg.n_embd) if cfg.cond == "adaln" else None

    def forward(self, x, rope, causal, past=None, noise=None):
        """noise (B, 1, C): adaLN (Peebles & Xie 2023, section 3.2). Its gates start at one, not at
        zero: the residual outputs are zero already, and both together would never learn."""
        if self.ada_head is None:
            x = x + self.attn(self.norm1(x), rope, causal, past)
            return x + self.mlp(self.norm2(x))
        a1, b1, c1, a2, b2, c2 = self.ada_head(noise).chunk(6, -1)
        x = x + (1 + c1) * self.attn(self.norm1(x) * (1 + a1) + b1, rope, causal, past)
        return x + (1 + c2) * self.mlp(self.norm2(x) * (1 + a2) + b2)


class Model(nn.Module):
    """Bidirectional transformer: ids (B, T) in 0..V, where V is the mask, and mask rates gamma (B,)
    -> logits (B, T, V), or (n, V) for a boolean `where` (B, T) that names the n positions whose
    logits are wanted (the head is the largest matrix). With `at`, a tensor of positions, only these
    go through the blocks, `where` is about them, and `past`, a list per layer of [k, v] of other
    positions, is attended to as well and extended in place."""

    def __init__(self, cfg):
        super().__init__()
        self.head_width, self.cond = cfg.n_embd // cfg.n_head, cfg.cond
        self.wte = nn.Embedding(cfg.vocab_size + 1, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.seq_len, cfg.n_embd)  # else masks alone have no positions
        self.near = nn.Conv1d(cfg.n_embd, cfg.n_embd, 7, padding=3, groups=cfg.n_embd, bias=False)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if cfg.cond in ("add", "adaln"):
            self.noise_in = nn.Linear(2 * 64, cfg.n_embd)
        if cfg.cond == "add":
            self.noise_head = nn.Linear(cfg.n_embd, cfg.n_embd)
        if cfg.cond == "table":
            self.noise_head = nn.Embedding(64, cfg.n_embd)
        init_weights(self)

    def embed_noise(self, gamma):
        """Mask rate (B,) -> (B, 1, C), zero at initialisation where it is added to the tokens."""
        if self.cond == "table":
            return self.noise_head((gamma * 64).long().clamp(0, 63))[:, None]
        angle = 1000 * gamma[:, None] * 10000 ** (-torch.arange(64, device=gamma.device) / 64)
        h = F.silu(self.noise_in(torch.cat((angle.cos(), angle.sin()), 1)))
        return (h if self.cond == "adaln" else self.noise_head(h))[:, None]

    def forward(self, idx, gamma, where=None, past=None, at=None):
        x = self.wte(idx) + self.wpe.weight[:idx.shape[1]]  # (B, T, C)
        x = x + self.near(x.transpose(1, 2)).transpose(1, 2)  # three neighbours on each side
        x = x if at is None else x[:, at]
        at = torch.arange(idx.shape[1], device=idx.device) if at is None else at
        rope, past = rotary(at, self.head_width), past or [None] * len(self.blocks)
        noise = self.embed_noise(gamma) if self.cond != "none" else None
        if self.cond in ("add", "table"):
            x = x + noise
        for block, kv in zip(self.blocks, past):
            x = block(x, rope, False, kv, noise)
        x = self.norm(x)
        return self.head(x if where is None else x[where])


def init_weights(model):
    """Normal(0, 0.02); residual outputs, head and biases zero, so the model starts uniform."""
    for name, p in model.named_parameters():
        if name.endswith(("proj.weight", "head.weight", "bias")):
            nn.init.zeros_(p)
        elif p.dim() > 1:
            nn.init.normal_(p, std=0.02)


# ----------------------------------------------------------------------------------------------
# 4. corrupt and loss
# ----------------------------------------------------------------------------------------------

SCHEDULES = {  # name: mask rate gamma(t), its derivative, its inverse; weights: (E3)
    "linear": (lambda t: t, torch.ones_like, lambda y: y),
    # 1 - cos(pi t / 2), written so that nothing cancels at small t
    "cosine": (lambda t: 2 * (math.pi / 4 * t).sin() ** 2,
               lambda t: math.pi / 2 * (math.pi / 2 * t).sin(),
               lambda y: 2 / math.pi * (1 - y).acos()),
    "log-linear": (lambda t: t * (2 - t), lambda t: 2 * (1 - t), lambda y: 1 - (1 - y).sqrt()),
    "mdlm-loglinear": (lambda t: 0.999 * t, lambda t: 0.999 * torch.ones_like(t),
                       lambda y: y / 0.999),  # with its cut-off: never quite everything is masked
    "maskgit": (lambda t: (math.pi / 2 * t).sin(), lambda t: math.pi / 2 * (math.pi / 2 * t).cos(),
                lambda y: 2 / math.pi * y.asin()),
}


def get_schedule(name):
    """Name -> (gamma, its derivative, its inverse), functions of tensors in [0, 1]. powerK: t^K."""
    if name.startswith("power") and name[5:].replace(".", "", 1).isdigit() and float(name[5:]) > 0:
        k = float(name[5:])
        return lambda t: t ** k, lambda t: k * t ** (k - 1), lambda y: y ** (1 / k)
    if name in ("loglinear", "log_linear"):
        raise ValueError(f"schedule '{name}' is ambiguous: in SEDD and MDLM it means mask rate "
                         "(1 - eps) t (mdlm-loglinear; without eps: linear), elsewhere "
                         "1 - (1 - t)^2 (log-linear)")
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule '{name}': choose {', '.join(SCHEDULES)} or powerK; "
                         "MD4's cosine is maskgit here, its polynomials are powerK")
    return SCHEDULES[name]


def draw_t(B, how, g):
    """B times in [0, 1), each uniform; all but iid spread them evenly over the batch.  # (B,)"""
    if how == "iid":
        return torch.rand(B, generator=g)
    if how == "stratified":  # one in each of B cells
        return (torch.arange(B) + torch.rand(B, generator=g)) / B
    if how == "systematic":  # a comb with one random offset
        return (torch.arange(B) / B + torch.rand(1, generator=g)) % 1
    u = torch.rand((B + 1) // 2, generator=g)  # antithetic: pairs u, 1 - u
    return torch.cat((u, 1 - u))[:B].clamp(max=1 - 2 ** -24)


def corrupt(x0, t, cfg, g, frozen=None):
    """Mask each position with probability gamma(t): x0 (B, T), t (B,) -> xt, is_mask (B, T). The
    boolean `frozen` (B, T) names positions that are never masked."""
    gamma = get_schedule(cfg.schedule)[0](t)[:, None]
    is_mask = (torch.rand(x0.shape, generator=g) < gamma).to(x0.device)  # (E1)
    if frozen is not None:
        is_mask &= ~frozen
    return x0.masked_fill(is_mask, cfg.vocab_size), is_mask


def corrupt_count(x0, n, cfg, g, frozen=None):
    """Mask exactly n (B,) positions of each row, all subsets alike: xt, is_mask (B, T)."""
    score = torch.rand(x0.shape, generator=g).to(x0.device)
    if frozen is not None:
        score = score.masked_fill(frozen, 2.0)
    is_mask = score.argsort(1).argsort(1) < n.to(x0.device)[:, None]
    return x0.masked_fill(is_mask, cfg.vocab_size), is_mask


def masked_ce(model, x0, xt, gamma, is_mask):
    """Cross-entropy c_i in nats at the masked positions, zero elsewhere.  # (B, T)"""
    logits = model(xt, gamma.to(x0.device), is_mask).float()  # (number masked, V)
    ce = torch.zeros(x0.shape, device=x0.device)
    ce[is_mask] = F.cross_entropy(logits, x0[is_mask], reduction="none")  # (E2)
    return ce


def loss_fn(model, x0, cfg, g, rows=slice(None)):
    """Training loss of the batch x0 (B, T), a scalar to differentiate, and info. The noise is drawn
    for the whole batch; then only `rows` of it are worked on, weighted so that the mean over equal
    shares is the batch's loss. cfg.loss: ce_seq, each row averaged over its masked tokens first
    (with the linear schedule the NELBO per token); ce_batch, all masked tokens alike (no bound);
    nelbo, the weight of (E3) or (E4) for any schedule."""
    B, T = x0.shape
    gamma_of, rate_of, inverse = get_schedule(cfg.schedule)
    # 1. draw t
    t = draw_t(B, cfg.t_sampler, g)
    gamma = gamma_of(t)
    # 2. corrupt
    if cfg.exact_count:
        n = (1 + (T * gamma).floor().long()).clamp(max=T)  # uniform on 1..T if gamma is
        xt, is_mask = corrupt_count(x0, n, cfg, g)
        gamma = n / T
        weight = 1 / (T * (inverse(gamma) - inverse((n - 1) / T)))  # 1 / (T P(n)); linear: 1
    else:
        xt, is_mask = corrupt(x0, t, cfg, g)
        weight = (rate_of(t) / gamma).nan_to_num(0, 0) * is_mask.sum(1).cpu() / T  # t may be 0
    # 3. predict
    ce = masked_ce(model, x0[rows], xt[rows], gamma[rows], is_mask[rows])  # (B', T)
    # 4. weigh
    n = is_mask.sum(1)
    row = ce.sum(1) / n[rows].clamp(min=1)  # (B',)
    if cfg.loss == "ce_batch":
        loss = ce.sum() / n.sum().clamp(min=1)
    elif cfg.loss == "ce_seq":
        loss = row.sum() / (n > 0).sum().clamp(min=1)
    else:
        loss = (weight[rows].to(row) * row).sum() / B  # (E3)
    return loss * (B / len(row)), dict(masked=n.float().mean().item())


@torch.no_grad()
def nelbo(model, x0, cfg, g, K=8, frozen=None):
    """Upper bound on -log p(x0) in nats per row, (B,), unbiased, and info: the counts n and the
    mean c_i of each, both (B, K). K forwards a row with n masks each, n on a comb over 1..T with
    one random offset per row: no cut-off, low variance. The boolean `frozen` (B, T) names tokens
    that are given: the bound is then on -log p(others | given)."""
    B, T = x0.shape
    N = torch.full((B,), T) if frozen is None else (~frozen).sum(1).cpu()
    u, counts, costs = torch.rand(B, generator=g), [], []
    for k in range(K):
        n = torch.minimum(1 + ((k + u) / K * N).floor().long(), N)
        xt, is_mask = corrupt_count(x0, n, cfg, g, frozen)
        ce = [masked_ce(model, x0[i], xt[i], (n / T)[i], is_mask[i]).cpu().double().sum(1)
              for i in torch.arange(B).split(64)]
        counts.append(n)
        costs.append(torch.cat(ce) / n.clamp(min=1))
    counts, costs = torch.stack(counts, 1), torch.stack(costs, 1)  # (B, K)
    return N * costs.mean(1), dict(forwards=K, n=counts, cost=costs)  # (E4)


@torch.no_grad()
def nelbo_steps(model, x0, cfg, g, steps):
    """Upper bound on -log p of the `steps`-step ancestral sampler, unbiased: (B,) nats per row."""
    gamma = get_schedule(cfg.grid)[0](torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    time_of = get_schedule(cfg.schedule)[2]
    total = torch.zeros(len(x0), dtype=torch.float64)
    for k in range(1, steps + 1):
        xt, is_mask = corrupt(x0, time_of(gamma[k]).expand(len(x0)), cfg, g)
        ce = masked_ce(model, x0, xt, gamma[k].float().expand(len(x0)), is_mask)
        total += (gamma[k] - gamma[k - 1]) / gamma[k] * ce.cpu().double().sum(1)  # (E5)
    return total


@torch.no_grad()
def chain_nll(model, x0, cfg, order):
    """Exact -log p(x0) of the sampler that writes one position after the other in the fixed `order`
    (T,): nats per row (B,), T forwards. One term of (E4)'s mean over all orders."""
    xt, total = torch.full_like(x0, cfg.vocab_size), torch.zeros(len(x0), dtype=torch.float64)
    for i in order:
        now = torch.zeros(x0.shape, dtype=torch.bool, device=x0.device)
        now[:, i] = True
        gamma = (xt == cfg.vocab_size).float().mean(1)
        total += masked_ce(model, x0, xt, gamma, now).cpu().double().sum(1)
        xt[:, i] = x0[:, i]
    return total


@torch.no_grad()
def exact(model, x0, cfg):
    """For one short row x0 (T,), T <= 12, by all 2^T mask patterns: the NELBO (E4) and the exact
    -log p of the sampler that reveals one random position at a time, in nats. With A the masked
    set, F({}) = 1, F(A) = 1/|A| sum_{i in A} p(x_i | rest) F(A - i), and p = F(all)."""
    T = len(x0)
    code = torch.arange(2 ** T)
    is_mask = (code[:, None] >> torch.arange(T) & 1).bool()  # (2^T, T)
    n = is_mask.sum(1)
    rows = x0.expand(2 ** T, T)
    ce = masked_ce(model, rows, rows.masked_fill(is_mask, cfg.vocab_size), n / T, is_mask).double()
    same = torch.bincount(n)[n]  # how many sets have this size
    bound = (ce.sum(1) / (n.clamp(min=1) * same)).sum()  # (E4)
    F_ = torch.ones(2 ** T, dtype=torch.float64)
    for size in range(1, T + 1):
        sets = code[n == size]
        less = sets[:, None] ^ (1 << torch.arange(T))  # A without i, where i is in A
        F_[sets] = (is_mask[sets] * (-ce[sets]).exp() * F_[less]).sum(1) / size
    return bound, -F_[-1].log()


# ----------------------------------------------------------------------------------------------
# 5. sample
# ----------------------------------------------------------------------------------------------


def filter_logits(logits, cfg):
    """Temperature, then top-k, then top-p: logits (n, V) -> float logits with -inf at what is cut.
    Top-k keeps ties; top-p keeps the smallest set that holds top_p, at least one token."""
    logits = logits.float()
    if cfg.temperature == 0:
        return torch.full_like(logits, -torch.inf).scatter(1, logits.argmax(1, True), 0.0)
    logits = logits / cfg.temperature
    if 0 < cfg.top_k < logits.shape[1]:
        least = logits.topk(cfg.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if cfg.top_p < 1:
        value, index = logits.sort(descending=True)
        p = value.softmax(1)
        cut = p.cumsum(1) - p >= cfg.top_p  # the mass before a token already suffices
        cut[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(1, index, cut), -torch.inf)
    return logits


def categorical(logits, g):
    """One draw per row of logits (n, V) -> (n,), by inverting the cumulative distribution in
    float64: float32 noise would cut off the tail (Zheng et al. 2024, section 5)."""
    p = (logits.cpu() if logits.device.type == "mps" else logits).double().softmax(1)
    u = torch.rand(len(p), 1, generator=g, dtype=torch.float64).to(p.device)
    cumulative = p.cumsum(1)
    u = u * cumulative[:, -1:]
    return (cumulative <= u).sum(1).clamp(max=p.shape[1] - 1).to(logits.device)


CERTAINTY = {  # order: how certain a position is, from its log p (n, V); the most certain go first
    "maxprob": lambda logp: logp.amax(1),
    "margin": lambda logp: -logp.topk(2).values.exp().diff(dim=1)[:, 0],
    "entropy": lambda logp: (logp.exp() * logp).nan_to_num(0).sum(1),  # 0 log 0 = 0
}


def binomial(count, p, g):
    """Draws of Binomial(count (n,), p), whole numbers (n,)."""
    if p == 0:
        return torch.zeros_like(count)
    return torch.binomial(count.double(), torch.full(count.shape, p).double(), generator=g).long()


def plan(todo, steps, cfg, g):
    """How many positions each call reveals and how many it hides again: two (B, calls). Every row
    reveals todo.sum(1) more than it hides. even: N / steps; grid: along the mask rates of cfg.grid;
    binomial: the ancestral law (E6), (E9). Steps in which nothing happens are left out, row by row
    and exactly: 1000 steps cost at most T calls."""
    N = todo.sum(1)
    one = cfg.quota in ("one", "threshold") or steps == 0
    steps = max(1, int(N.max())) if one else steps
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    grid = times if one or cfg.quota == "even" else get_schedule(cfg.grid)[0](times)
    left, show, hide = N, [], []
    for gamma_t, gamma_s in zip(grid.tolist(), grid[1:].tolist()):
        most = min(1.0, gamma_s / (1 - gamma_t)) if gamma_t < 1 else 0.0  # or gamma_s were exceeded
        sigma = {"none": 0.0, "rescale": cfg.remask_eta * most}.get(
            cfg.remask, min(cfg.remask_eta, most))
        if cfg.quota == "binomial" and not one:
            hide.append(binomial(N - left, sigma, g))
            rho = (gamma_t - gamma_s + sigma * (1 - gamma_t)) / gamma_t  # (E9); sigma = 0: (E6)
            show.append(binomial(left, min(rho, 1.0), g))
        else:
            goal = torch.minimum(left, (N * gamma_s + 1e-6).floor().long())  # masks left at s
            hide.append(torch.minimum((sigma * (N - left)).round().long(), goal))
            show.append(left - goal + hide[-1])
        left = left - show[-1] + hide[-1]
    show, hide = torch.stack(show, 1), torch.stack(hide, 1)
    idle = (show + hide == 0).long()
    first = idle.argsort(dim=1, stable=True)[:, :int((1 - idle).sum(1).max())]
    return show.gather(1, first), hide.gather(1, first)


def predict(model, xt, where, cfg, given=None, kept=None, rows=None, span=None):
    """Logits at the positions `where` of the rows xt (n, T): (count, V). `given`: what guidance
    hides in its second call, or None. `kept`: this block's cache, a dictionary that the first call
    fills with the keys and values outside of `span`, of all `rows`; later calls compute only span.
    The kept ones grow stale as the block fills: an approximation (Wu et al. 2025, section 3)."""
    gamma = (xt == cfg.vocab_size).float().mean(1)  # as in training, where given tokens count too
    if kept:
        mine = torch.searchsorted(kept["rows"], rows)
        past = [[kv[mine] for kv in layer] for layer in kept["past"]]
        return model(xt, gamma, where[:, span], past, span)
    if cfg.cache != "none":
        past = [[] for _ in model.blocks]
        logits = model(xt, gamma, where, past)
        rest = torch.ones(xt.shape[1], dtype=torch.bool, device=xt.device)
        rest[span] = False
        kept.update(rows=rows, past=[[kv[:, :, rest] for kv in layer] for layer in past])
        return logits
    logits = model(xt, gamma, where)
    if given is not None:
        bare = xt.masked_fill(given, cfg.vocab_size)
        bare = model(bare, (bare == cfg.vocab_size).float().mean(1), where).float().log_softmax(1)
        logits = (1 + cfg.guidance) * logits.float().log_softmax(1) - cfg.guidance * bare  # (E8)
    return logits


def best(score, among, count, g):
    """The count (n,) positions of highest score among the allowed, chance breaks ties: (n, T)."""
    mixed = torch.rand(score.shape, generator=g).to(score.device).argsort(1)
    score = score.masked_fill(~among, -torch.inf).gather(1, mixed)
    rank = mixed.gather(1, score.argsort(dim=1, descending=True, stable=True)).argsort(1)
    return among & (rank < count[:, None])


def reveal(model, xt, todo, count, cfg, g, **where):
    """One call: choose `count` (n,) of the positions `todo` of the rows xt (n, T) and draw their
    tokens: chosen (n, T), tokens and their log p, both (chosen.sum(),). Positions are chosen before
    any token is drawn; order "sampled" (Nie et al. 2025) looks at the tokens first, prefers likely
    ones, and so changes the law even of a perfect network. `where`: what predict needs besides."""
    # 1. score positions; blind orders do not need the network for it
    score = torch.zeros(todo.shape, device=xt.device)  # random: all alike
    blind = cfg.order in ("random", "l2r") and cfg.quota != "threshold"
    if cfg.order == "l2r":
        score = -torch.arange(xt.shape[1], device=xt.device).expand_as(todo).float()
    if not blind:
        logits = predict(model, xt, todo, cfg, **where)
        logp = logits.float().log_softmax(1)  # (number masked, V)
        tokens = categorical(filter_logits(logits, cfg), g) if cfg.order == "sampled" else None
        if cfg.order == "sampled":
            score[todo] = logp.gather(1, tokens[:, None])[:, 0]
        elif cfg.order in CERTAINTY:
            score[todo] = CERTAINTY[cfg.order](logp)
        if cfg.eos_last:
            score[todo] -= 100.0 * (logp.argmax(1) == cfg.eos)
    # 2. choose
    chosen = best(score, todo, count, g)
    if cfg.quota == "threshold":
        chosen[todo] |= logp.amax(1).exp() >= cfg.threshold
    # 3. draw
    logits = predict(model, xt, chosen, cfg, **where) if blind else logits[chosen[todo]]
    if cfg.order == "sampled":
        tokens = tokens[chosen[todo]]
    else:
        tokens = categorical(filter_logits(logits, cfg), g)  # (E7)
    return chosen, tokens, logits.float().log_softmax(1).gather(1, tokens[:, None])[:, 0]


def end_documents(x, cfg):
    """With cfg.eos_fill, masks after the first EOS of a row become EOS: nothing else can follow."""
    ended = (x == cfg.vocab_size) & ((x == cfg.eos).cumsum(1) > 0)
    return x.masked_fill(ended, cfg.eos) if cfg.eos_fill else x


@torch.no_grad()
def sample(model, cfg, n, g, prompt=None, trace=None, start=None):
    """n rows of T = seq_len (or cfg.length) ids, (n, T), and info (nfe = network calls). `prompt`
    (P,) ids begin every row; or `start` (n, T) holds the mask id V where tokens are wanted, and all
    else is kept. `trace`, a list, receives (call, ids) pairs."""
    device, M, nfe = next(model.parameters()).device, cfg.vocab_size, 0
    # 1. start from masks; what is given stays
    x = start
    if start is None:
        x = torch.full((n, cfg.length or cfg.seq_len), M, device=device)
    x = x.clone()
    if prompt is not None:
        if len(prompt) > x.shape[1]:
            raise ValueError(f"a prompt of {len(prompt)} ids in a row of {x.shape[1]}")
        x[:, :len(prompt)] = prompt
    x = end_documents(x, cfg)
    T, given, logp = x.shape[1], x != M, torch.zeros(x.shape, device=device)
    guided = cfg.guidance > 0 and bool(given.any())
    if trace is not None:
        trace.append((0, x.cpu().clone()))
    # 2. block by block (one, unless asked for); the network sees seq_len tokens, the block's among
    #    them: from the first on, or, beyond the context, up to the end of the block
    size = min(cfg.block or (T if T <= cfg.seq_len else cfg.seq_len // 2), cfg.seq_len)
    begins = [a for a in range(0, T, size) if not given[:, a:a + size].all()]
    for j, a in enumerate(begins):
        b = min(a + size, T)
        view = slice(max(0, b - cfg.seq_len), min(T, max(b, cfg.seq_len)))
        column = torch.arange(view.start, view.stop, device=device)
        here = (column >= a) & (column < b)  # (columns,)
        span = (here if cfg.cache == "dual" else column >= a).nonzero()[:, 0]
        kept = {}
        # 3. plan what every call reveals and hides
        steps = cfg.sampling_steps * (j + 1) // len(begins) - cfg.sampling_steps * j // len(begins)
        show, hide = plan((x[:, a:b] == M).cpu(), max(steps, cfg.sampling_steps > 0), cfg, g)
        for k in range(show.shape[1]):
            before = x.clone()
            masked = (x[:, view] == M) & here  # (n, columns)
            rows = (masked.any(1) & (show[:, k] > 0).to(device)).nonzero()[:, 0]
            if cfg.remask != "none":  # choose among what was written before this call
                score = torch.zeros(masked.shape, device=device)
                if cfg.remask == "conf":  # with probability ~ exp(-p): the Gumbel trick
                    noise = torch.rand(masked.shape, generator=g).to(device)
                    score = -(-noise.log()).log() - logp[:, view].exp()
                again = best(score, here & ~masked & ~given[:, view], hide[:, k].to(device), g)
            # 4. reveal
            if len(rows):
                xt, count = x[rows, view], show[:, k].to(device)[rows]
                chosen, tokens, sure = reveal(
                    model, xt, masked[rows], count, cfg, g, kept=kept, rows=rows, span=span,
                    given=given[rows, view] if guided else None)
                xt[chosen] = tokens
                x[rows, view] = xt
                logp[rows, view] = logp[rows, view].masked_scatter(chosen, sure)
                nfe += 1 + guided
            # 5. hide again
            if cfg.remask != "none":
                x[:, view] = x[:, view].masked_fill(again, M)  # (E9)
            x = end_documents(x, cfg)
            if trace is not None and not torch.equal(x, before):
                trace.append((nfe, x.cpu().clone()))
    return x, dict(nfe=nfe)


# ----------------------------------------------------------------------------------------------
# 6. train
# ----------------------------------------------------------------------------------------------


def get_lr(step, cfg):
    """Learning rate of a step: linear warm-up, then a cosine to zero."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    done = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizers(model, cfg):
    """Muon for the matrices inside the blocks, AdamW for the rest. A group's rate is `scale` times
    the scheduled one: embeddings want ten times as much, head and gains three (see LOG.md)."""
    hidden = [p for p in model.blocks.parameters() if p.dim() == 2]
    embed = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    apart = set(map(id, [*hidden, *embed]))
    rest = [p for p in model.parameters() if id(p) not in apart]
    return [torch.optim.Muon([dict(params=hidden, scale=1.0)], cfg.lr, weight_decay=0.05,
                             adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([dict(params=embed, scale=10.0),
                               dict(params=rest, scale=3.0)], cfg.lr, betas=(0.9, 0.98),
                              weight_decay=0.0)]


@torch.no_grad()
def evaluate(model, cfg, split="val", n=128):
    """Likelihood of the first n rows of a split: nats per document and per token, bits per byte,
    and the paired gap to the true entropy where that is known. Plain numbers for the log."""
    x0, floor = get_eval_rows(split, cfg, n)
    device = next(model.parameters()).device
    nats = nelbo(model, x0.to(device), cfg, torch.Generator().manual_seed(0))[0].cpu().double()
    tokens = common.tokens_of(x0, cfg)
    size = sum(len(open_data(cfg.data_dir).tokenizer.decode(t).encode()) for t in tokens)
    count = sum(map(len, tokens)) + (len(x0) if cfg.rows == "docs" else 0)  # EOS is a token too
    row = dict(bound=BOUND, rows=len(x0), nats_per_token=nats.sum().item() / count,
               nats_per_token_se=common.se(nats) * len(x0) / count,
               bits_per_byte=nats.sum().item() / math.log(2) / max(1, size))
    if cfg.rows == "docs":
        row |= dict(nats_per_doc=nats.mean().item(), se=common.se(nats))
    if floor is not None:
        row |= dict(floor_per_doc=floor.mean().item(), gap=(nats - floor).mean().item(),
                    gap_se=common.se(nats - floor))
    return row


def unigram_nll(cfg):
    """Nats per position of a unigram model (add-one counts of 4000 training rows) on validation
    rows: what a model that ignores all context pays."""
    many = dataclasses.replace(cfg, batch_size=4000, grad_accum=1)
    counts = get_batch("train", many, torch.Generator().manual_seed(0)).flatten().bincount(
        minlength=cfg.vocab_size) + 1.0
    return -(counts / counts.sum()).log()[get_eval_rows("val", cfg, 500)[0]].mean().item()


def grade(run, model, cfg, step, n=64):
    """Draw n samples from the model and let the run judge, log and show them."""
    cfg = fast(cfg)
    trace, clock = [], time.time()
    with run.amp:
        x, info = sample(model, cfg, n, torch.Generator().manual_seed(cfg.seed), trace=trace)
    common.show_samples(run, cfg, open_data(cfg.data_dir).tokenizer, step, x, trace, info,
                        time.time() - clock)


def holes(x0, cfg, g):
    """What to hide for infilling, name -> boolean (B, T): a single token, a span of five, or the
    middle third of each document, its first EOS included; and the document itself."""
    T, u = x0.shape[1], torch.rand(len(x0), 1, generator=g).to(x0.device)
    column, size = torch.arange(T, device=x0.device), torch.full_like(x0[:, :1], T)
    if cfg.rows == "docs":
        size = ((x0 == cfg.eos).cumsum(1) == 0).sum(1, keepdim=True).add(1).clamp(max=T)
    five = size.clamp(max=5)
    spans = {"token": ((u * size).long(), 1), "span of 5": ((u * (size - five + 1)).long(), five),
             "middle third": (size // 3, size - 2 * (size // 3)), "document": (0, size)}
    return {name: (column >= a) & (column < a + n) for name, (a, n) in spans.items()}


@torch.no_grad()
def evaluate_all(run, model, cfg, n=64):
    """The eval command: bound, masked accuracy, infilling, and samples of few steps in several
    orders, as rows of eval.jsonl and two figures. Greedy predictions and nats are of positions
    inside documents; `unigram` is the accuracy of always saying the commonest token."""
    run.begin_eval()
    tokenizer, g = open_data(cfg.data_dir).tokenizer, torch.Generator().manual_seed(cfg.seed)
    # 1. the bound
    row = evaluate(model, cfg, "test", 500)
    run.log("test", -1, **row)
    run.say(f"test, {row['rows']} rows: {common.report(row)}")
    x0 = get_eval_rows("test", cfg, 4 * n)[0].to(run.device)
    _, info = nelbo(model, x0, cfg, g, 32)
    common.plot_integrand(run.out / "integrand.png", info["n"] / cfg.seq_len, info["cost"], cfg)
    # 2. accuracy at fixed mask rates
    hidden = holes(x0, cfg, g)
    inside = hidden.pop("document")
    common_token = x0[inside].bincount().argmax()
    for rate in (0.15, 0.5, 0.85, 1.0):
        count = torch.full((len(x0),), round(rate * cfg.seq_len))
        xt, is_mask = corrupt_count(x0, count, cfg, g)
        right = [model(xt[i], (count / cfg.seq_len).to(x0.device)[i], is_mask[i]).argmax(1) ==
                 x0[i][is_mask[i]] for i in torch.arange(len(x0)).split(64)]
        keep = inside[is_mask]
        row = dict(rate=rate, accuracy=torch.cat(right)[keep].float().mean().item(),
                   unigram=(x0[is_mask][keep] == common_token).float().mean().item())
        run.log("accuracy", -1, **row)
        run.say("masked accuracy: " + common.figures(row))
    # 3. infilling, greedily, the surest position first
    greedy = dataclasses.replace(cfg, temperature=0.0, order="maxprob", quota="one", block=0,
                                 cache="none", remask="none", guidance=0.0, eos_fill=False)
    for name, hole in hidden.items():
        bound, _ = nelbo(model, x0, cfg, g, frozen=~hole)
        filled, _ = sample(model, greedy, n, g, start=x0[:n].masked_fill(hole[:n], cfg.vocab_size))
        same = filled == x0[:n]
        row = dict(hole=name, exact=same.all(1).float().mean().item(),
                   accuracy=same[hole[:n]].float().mean().item(),
                   unigram=(x0[:n][hole[:n]] == common_token).float().mean().item(),
                   nats_per_token=(bound.sum() / hole.sum().cpu()).item(), bound=BOUND)
        run.log("infill", -1, **row)
        run.say("infilling: " + common.figures(row))
    # 4. samples
    judge = common.load_judge(cfg.judge, tokenizer, run)
    real = common.measure(x0[:n], cfg, tokenizer, judge)  # as many: diversity depends on it
    run.log("real", -1, n=n, **real)
    run.say(f"test documents: {common.figures(real)}")
    rows = []
    for order in cfg.eval_orders.split(","):
        for steps in sorted({4, 8, 16, 32, 64, cfg.seq_len} & set(range(cfg.seq_len + 1))):
            for seed in range(cfg.eval_seeds):
                some = dataclasses.replace(cfg, order=order, sampling_steps=steps)
                clock = time.time()
                x, info = sample(model, some, n, torch.Generator().manual_seed(cfg.seed + seed))
                row = dict(order=order, sampling_steps=steps, seed=cfg.seed + seed, n=n, **info,
                           seconds=time.time() - clock, quota=cfg.quota,
                           temperature=cfg.temperature, top_p=cfg.top_p,
                           **common.measure(x, cfg, tokenizer, judge))
                run.log("samples", -1, **row)
                rows.append(row)
            shown = ("nfe", "valid", "known", "agree", "judge", "entropy", "seconds")
            run.say(f"{order:8} " + common.figures({k: row[k] for k in shown if k in row}))
    common.plot_quality(run.out / "quality.png", rows, real)


def train(cfg):
    """Train as the Config says; returns the averaged model. Everything it makes is in the run
    folder: config, log, checkpoint, samples, figures."""
    with common.Run(cfg, cfg.out or f"out/{NAME}") as run:
        fill_in(cfg, run.rank)
        torch.manual_seed(cfg.seed)
        model = Model(cfg).to(run.device)
        ema = copy.deepcopy(model).requires_grad_(False)  # what is evaluated and sampled from
        optimizers = make_optimizers(model, cfg)
        g = torch.Generator().manual_seed(cfg.seed)
        tokenizer, step = open_data(cfg.data_dir).tokenizer, 0
        if cfg.resume:
            stored = common.load_config(Config, run.out)
            common.check_same(cfg, stored, SHAPE, f"the run in {run.out}")
            step = run.resume(tokenizer, model, ema, optimizers, g)
        if cfg.compile:  # the blocks only: what is around them changes shape at every step
            for block in model.blocks:
                block.compile()
        size = sum(p.numel() for p in model.parameters())
        run.say(f"{NAME}.py: {size / 1e6:.2f}M parameters, vocabulary {cfg.vocab_size}, rows of "
                f"{cfg.seq_len} ({cfg.rows}), {run.describe()}")
        run.say(f"without a model: uniform {math.log(cfg.vocab_size):.3f}, unigram "
                f"{unigram_nll(cfg):.3f} nats per position of a row")
        share = cfg.batch_size // run.world  # rows of one process in one micro-batch
        run.begin()

        while step < cfg.steps and not run.stopping():
            if step % cfg.eval_every == 0:
                run.validate(step, lambda: evaluate(ema, cfg))
            for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
                group["lr"] = get_lr(step, cfg) * group["scale"]
            # one batch and one noise for the whole step, shared out to micro-batches and processes
            x0, noise, total = get_batch("train", cfg, g).to(run.device), g.get_state(), 0.0
            for i in range(run.rank, cfg.grad_accum * run.world, run.world):
                g.set_state(noise)
                with run.amp:
                    loss, info = loss_fn(model, x0, cfg, g, slice(i * share, (i + 1) * share))
                (loss / cfg.grad_accum).backward()
                total += loss.item() / cfg.grad_accum
            total = run.average(model, total)
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf).item()
            if not math.isfinite(total + norm):
                raise UserError(f"the loss is {total} and its gradient {norm} at step {step}: "
                                f"lower --lr; the last good checkpoint is kept in {run.out}")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            for p, q in zip(ema.parameters(), model.parameters()):  # warms up: early weights fade
                p.lerp_(q.detach(), 1 - min(cfg.ema, (1 + step) / (10 + step)))
            run.train_row(step, x0.numel(), loss=total, lr=get_lr(step - 1, cfg),
                          grad_norm=norm)
            if step % cfg.save_every == 0 or step == cfg.steps:
                run.save(step, tokenizer, model, ema, optimizers, g)

        if run.stop_signal:
            run.save(step, tokenizer, model, ema, optimizers, g)
            run.say(f"stopped at step {step}; go on with --resume")
            raise SystemExit(128 + run.stop_signal)
        run.validate(step, lambda: evaluate(ema, cfg))
        if run.rank == 0:
            grade(run, ema, cfg, step)
            common.plot_loss(run.out / "loss.png", run.read_log())
            run.say(f"{run.out}: {', '.join(sorted(p.name for p in run.out.iterdir()))}")
    return ema


# ----------------------------------------------------------------------------------------------
# 7. main
# ----------------------------------------------------------------------------------------------


def main(argv):
    """train (default), sample or eval."""
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "train"
    if command not in ("train", "sample", "eval"):
        raise UserError(f"unknown command '{command}': choose train, sample or eval")
    cfg = common.parse(Config, PRESETS, argv, __doc__)
    out = cfg.out or f"out/{NAME}"
    if command == "train" and not cfg.resume:
        if cfg.schedule == "log-linear":
            print(NOTE)
        return train(cfg) and None
    stored = common.load_config(Config, out)  # flags are laid over what the run was made with
    if command != "train":
        stored = fast(stored)
    cfg = common.parse(Config, PRESETS, argv, __doc__, default=stored)
    if command == "train":
        return train(cfg) and None
    common.check_same(cfg, stored, SHAPE, f"the checkpoint in {out}")
    with common.Run(cfg, out, False, "eval.jsonl" if command == "eval" else "log.jsonl") as run:
        model, tokenizer = Model(cfg).to(run.device), load_tokenizer(out)
        common.load_weights(model, out)
        if command == "eval":
            fill_in(cfg)
            common.check_tokenizer(out, open_data(cfg.data_dir).tokenizer)
            with run.amp:
                return evaluate_all(run, model, cfg)
        prompt = common.encode_prompt(tokenizer, cfg).to(run.device)
        start = common.encode_infill(tokenizer, cfg).to(run.device) if cfg.infill else None
        trace, g = [] if cfg.trace else None, torch.Generator().manual_seed(cfg.seed)
        with run.amp:
            x, info = sample(model, cfg, cfg.n, g, prompt, trace, start)
        common.show_samples(run, cfg, tokenizer, -1, x, trace, info)


if __name__ == "__main__":
    common.run_main(main)
