"""Diffusion by flipping bits: noise flips the bits of every token's code, learn to flip them back.

Method: the binary symmetric channel on the bits of token ids, the binomial diffusion of
Sohl-Dickstein et al. 2015 (arXiv 1503.03585) and a case of D3PM (Austin et al. 2021, arXiv
2107.03006); a bit head needs K = log2 V outputs. Bounds and steps are derived in notebook 04.

    python bit_diffusion.py              6 minutes, 2 CPU cores: <= 1.60 nats/token (entropy 0.91)
    python bit_diffusion.py sample --prompt "Once upon a time" --n 3 --trace      64 calls, see FAST
    python bit_diffusion.py --tokenizer gpt2 --head bit --parts 32 --input byte     544 outputs for
                                         the 50257 tokens of GPT-2
    python bit_diffusion.py eval         bounds, where bits are lost, infilling, few-step samples

Equations. C (V, K) holds a code of +-1 for every token, K = ceil(log2 V).
    (E1)  b_i = C[x_0,i] times independent flips, P(no flip) = (1 + a_i) / 2; a is the agreement,
          lam = ln((1 + a) / (1 - a)) the log-odds that one noisy bit tells
    (E2)  every position has its own time, t_i = clamp((t - tau_i) / w, 0, 1), a_i = a(t_i), which
          falls from 1 to 0; w = 1: all alike, the classic process; w -> 0: token after token
    (E3)  log q(b_i | v) = 1/2 lam_i b_i.C_v + const
    (E4)  token head: p(v | b) = softmax_v(net + 1/2 lam b.C_v); bit head: log-odds of bit k being
          +1, l_k = net_k + lam b_k: own evidence exactly, context from the network; or a mixture
          of R such products (--parts R), whose weights w_r evidence multiplies by what each
          expects of it: prod_k cosh(l_rk / 2) / cosh(net_rk / 2)
    (E5)  from tokens to bits: l_k = ln sum_{v: C_vk = 1} p_v - ln sum_{v: C_vk = -1} p_v; from bits
          to tokens, codes of no token ruled out: p(v) = softmax_v(1/2 C_v.l)
    (E6)  bridge, t -> s: P(b_s != b_t | b_t, b_0) = (1 - r) (1 - a_s y) / (2 (1 + a_t y)) = f(y),
          y = b_t b_0, r = a_t / a_s
    (E7)  a step of sampler bit: every bit flips by itself, f^ = m f(1) + (1 - m) f(-1),
          m = p(b_0 = b_t | b) = sigmoid(b_t l); sampler token: a token v ~ p, flips f(b_t C_v)
    (E8)  -log p(x_0) <= 1/2 sum_i int d lam_i / sinh(lam_i) E sum_k [s^ - s + s ln(s / s^)],
          s = exp(-lam b_t b_0), s^ = m exp(-lam) + (1 - m) exp(lam), for any path blind to x_0;
          nothing to add: at lam = 0 nothing is known, at infinity everything
    (E9)  N steps, bit: sum E KL(f || f^); token: E log q(b_s | b_t, x_0) - log sum_v p_v q(b_s |
          b_t, C_v); where s is clean, cross-entropy of the token
    (E10) guidance by given text c: out + w (out - out without c)

Shapes: B batch, T tokens, V vocabulary, K bits, C width, H heads, D = C / H.
Units: nats. Every position of a row is charged, the EOS-filled tail too: nobody is told the length.

Differs from the papers: a step mixes bridges (E7); putting the expected bit into Bayes' formula
instead counts the noisy bit twice (notebook 04). Noise levels differ between positions (E2).
Differs from ar.py: the input is a noisy code, not a token; attention looks both ways; the
likelihood is a bound; tokens settle bit by bit all over the row.
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

import common_v1 as common
from common_v1 import UserError
from data.prepare import load_tokenizer, open_split, prepare, verify

NAME, BOUND = "bit_diffusion", "upper"

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
    head: Literal["token", "bit"] = "token"  # what the network says: V logits, or K (E4)
    parts: int = 1  # bit head: products that are mixed, a power of 2; costs parts (K + 1) outputs
    code: Literal["id", "random", "frequency", "semantic"] = "id"  # order in which codes count up
    schedule: Literal["quadratic", "cosine", "linear"] = "quadratic"  # agreement and time
    window: float = 0.1  # share of the path that a position needs from noise to token (E2)
    loss: Literal["ce", "elbo"] = "ce"  # cross-entropy of tokens or bits; the bound (E8)
    skip: bool = True  # add own evidence to the logits (E4)
    input: Literal["token", "byte", "bit", "raw"] = "token"  # embeddings of what; raw: noisy bits
    cond: Literal["none", "add"] = "none"  # whether the network is told the noise level
    prefix: float = 0.0  # share of rows whose beginning, of random length, is clean in training
    sampler: Literal["auto", "token", "bit"] = "auto"  # a step (E7); auto: that of the head
    invalid: Literal["project", "modulo"] = "project"  # codes of no token: draw again among tokens
    clock: Literal["random", "l2r", "maxprob"] = "random"  # which position begins next
    sampling_steps: int = 0  # steps; 0 = one for every token of a row
    guidance: float = 0.0  # classifier-free guidance by the given text (E10); 0 = off
    infill: str = ""  # "Once ___ a ___3 who": holes of one and three tokens, then the end
    judge: str = "out/ar"  # eval: the run of ar.py that judges samples
    eval_samplers: str = "token,bit"  # eval: samplers to compare
    eval_seeds: int = 1  # eval: repetitions of every sampling setting
    # filled in from the data
    eos: int = -1  # end of document; also BOS where the tokenizer has no other
    bos: int = -1  # first input
    data_dir: str = ""  # where the prepared data are

    def __post_init__(self):  # what cannot work stops here, before any training
        for name in self.eval_samplers.split(","):
            if name not in ("token", "bit"):
                raise ValueError(f"--eval-samplers knows token and bit, not '{name}'")
        if self.head == "bit" and (self.top_k or self.top_p < 1):
            raise ValueError("--top-k and --top-p cut tokens, --head bit draws bits: use "
                             "--temperature")
        if self.parts < 1 or self.parts & self.parts - 1:
            raise ValueError(f"--parts is {self.parts}, it must be a power of 2")
        if self.parts > 1 and self.head == "token":
            raise ValueError("--parts mixes products of bits and --head token has none: add "
                             "--head bit")
        if not 0 < self.window <= 1:
            raise ValueError(f"--window is {self.window}, it must be more than 0 and at most 1")


PRESETS = dict(tiny={}, small=dict(n_layer=8, n_head=8, n_embd=512, seq_len=256, lr=2e-3),
               medium=dict(n_layer=12, n_head=12, n_embd=768, seq_len=512, lr=1e-3))
SHAPE = ("vocab_size", "seq_len", "n_layer", "n_head", "n_embd", "rows")  # fixed by a checkpoint
METHOD = ("head", "parts", "code", "skip", "input", "cond")  # so are these
FAST = dict(clock="maxprob", sampling_steps=64, temperature=0.3)
# FAST is how samples are drawn unless told otherwise: most valid tales in 64 calls, see LOG.md.
# The defaults above are the law that the likelihoods are about.


def fast(cfg):
    """cfg with FAST wherever it has the defaults: how samples are drawn unless told otherwise."""
    return dataclasses.replace(cfg, **{
        k: v for k, v in FAST.items() if getattr(cfg, k) == getattr(Config, k)})

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


def order_tokens(cfg):
    """The tokens in the order in which their codes count up, (V,): by id; at random; by frequency;
    semantic, so that tokens with like neighbours in 4000 training rows share their leading bits:
    all tokens are cut in two along the direction in which they differ most, then each part."""
    V = cfg.vocab_size
    if cfg.code == "id":
        return torch.arange(V)
    if cfg.code == "random":
        return torch.randperm(V, generator=torch.Generator().manual_seed(cfg.seed))
    many = dataclasses.replace(cfg, batch_size=4000, grad_accum=1)
    rows = get_batch("train", many, torch.Generator().manual_seed(0))
    order = rows.flatten().bincount(minlength=V).argsort(descending=True, stable=True)
    if cfg.code == "frequency":
        return order
    rank, top = order.argsort(), min(V, 512)  # neighbours that count: the commonest 512
    near = torch.zeros(V, 2, top)
    for side, own, other in ((0, rows[:, 1:], rows[:, :-1]), (1, rows[:, :-1], rows[:, 1:])):
        keep = rank[other] < top
        seen = own[keep], torch.full_like(own[keep], side), rank[other[keep]]
        near.index_put_(seen, torch.ones(()), accumulate=True)
    points = nn.functional.normalize(near.log1p().flatten(1), dim=1)
    points -= points.mean(0)
    axes = torch.linalg.eigh((points.T @ points).double())[1][:, -32:]
    points = points.double() @ axes  # (V, 32)
    parts, size = [torch.arange(V)], 1 << (V - 1).bit_length()
    while size > 1:
        size //= 2  # tokens that a part can hold
        halves = []
        for part in parts:
            x = points[part] - points[part].mean(0)
            part = part[(x @ torch.linalg.eigh(x.T @ x)[1][:, -1]).argsort(stable=True)]
            halves += [part[:size], part[size:]]
        parts = [part for part in halves if len(part)]
    return torch.cat(parts)


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

    def forward(self, x, rope, causal, past=None):
        x = x + self.attn(self.norm1(x), rope, causal, past)
        return x + self.mlp(self.norm2(x))


def code_book(V, order=None):
    """Codes C (V, K) of +-1, K = ceil(log2 V): the n-th token of `order` (V,), by default token n,
    gets the binary digits of n, the highest first."""
    K = max(1, (V - 1).bit_length())
    order = torch.arange(V) if order is None else order
    digits = torch.arange(V)[:, None] >> torch.arange(K - 1, -1, -1) & 1
    return torch.empty(V, K).index_copy(0, order.cpu(), 2.0 * digits - 1)


def number(bits):
    """What codes count: +-1 (..., K) -> 0 ... 2^K - 1."""
    K = bits.shape[-1]
    return ((bits > 0).long() << torch.arange(K - 1, -1, -1, device=bits.device)).sum(-1)


def ids_of(bits, code):
    """Codes back to tokens: +-1 (..., K) -> ids (...), V for codes of no token."""
    V = len(code)
    return F.pad(number(code).argsort(), (0, 1), value=V)[number(bits).clamp(max=V)]


def update(model, out, bits, lam):
    """Bayes' rule: what noisy bits (..., K) with log-odds lam (...) add to a network's answer about
    them, (..., V), (..., K) or (..., R, K + 1), float32; -lam takes it away again. In float32 even
    under autocast: it may be in the hundreds, and its differences count."""
    own, out = lam[..., None] * bits, out.float()
    if model.head_kind == "token":
        with torch.autocast(bits.device.type, enabled=False):
            return out + 0.5 * own @ model.code.T  # (E3) (E4)
    if model.parts == 1:
        return out + own  # (E4)
    odds, weight = out[..., :-1], out[..., -1]
    more = odds + own[..., None, :]
    gain = (F.softplus(more) - F.softplus(odds) - own[..., None, :] / 2).sum(-1)
    return torch.cat((more, (weight + gain)[..., None]), -1)  # (E4)


SURE = 40.0  # lam of a clean position: the odds that one of its bits is wrong are below 2^-53


class Model(nn.Module):
    """Bidirectional transformer over noisy codes: bits (B, T, K) of +-1, log-odds lam (B, T) that
    they are right -> logits (B, T, V) of the token head, log-odds (B, T, K) of the bit head, or
    (B, T, R, K + 1), those of R products and, last, their log-weights; for a boolean `where` (B, T)
    only those of the n positions it names. `order` of the codes: see code_book."""

    def __init__(self, cfg, order=None):
        super().__init__()
        self.n_head, self.head_width = cfg.n_head, cfg.n_embd // cfg.n_head
        self.head_kind, self.skip, self.input, self.cond = cfg.head, cfg.skip, cfg.input, cfg.cond
        self.register_buffer("code", code_book(cfg.vocab_size, order))
        V, K = self.code.shape
        if cfg.input == "token":
            self.wte = nn.Embedding(V, cfg.n_embd)
        elif cfg.input == "byte":
            self.wte = nn.ModuleList(nn.Embedding(2 ** min(8, K - k), cfg.n_embd)
                                     for k in range(0, K, 8))
        else:
            self.bits_in = nn.Linear(K, cfg.n_embd, bias=False)
        self.wpe = nn.Embedding(cfg.seq_len, cfg.n_embd)
        self.near = nn.Conv1d(cfg.n_embd, cfg.n_embd, 7, padding=3, groups=cfg.n_embd, bias=False)
        if cfg.cond == "add":
            self.noise_in = nn.Linear(2 * 64, cfg.n_embd)
            self.noise_head = nn.Linear(cfg.n_embd, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd)
        self.parts = R = cfg.parts if cfg.head == "bit" else 1
        wide = V if cfg.head == "token" else K if R == 1 else R * (K + 1)
        self.head = nn.Linear(cfg.n_embd, wide)
        init_weights(self)
        if R > 1:  # parts that begin alike stay alike: each leans to its own leading bits; the
            lean = code_book(R)[:, :K]  # mixture of them all is uniform still
            self.head.bias.data.view(R, K + 1)[:, :lean.shape[1]] = lean

    def expected(self, wte, code, bits, lam):
        """Expected embedding given noisy bits alone: table wte of the codes (U, k), bits (n, k),
        lam (n,) -> (n, C). A clean code has its own."""
        x = torch.zeros(len(lam), wte.embedding_dim, device=bits.device)
        clean = lam >= SURE
        x[clean] = wte(ids_of(bits[clean], code)).to(x.dtype)
        with torch.autocast(bits.device.type, enabled=False):
            p = (0.5 * lam[~clean][:, None] * bits[~clean] @ code.T).softmax(1)  # (E3)
        x[~clean] = (p @ wte.weight).to(x.dtype)
        return x

    def embed(self, bits, lam):
        """Input (B, T, C) of noisy bits (B, T, K), lam (B, T); zero where nothing is known."""
        if self.input in ("bit", "raw"):
            return self.bits_in(bits if self.input == "raw" else (lam / 2).tanh()[..., None] * bits)
        known = lam > 0
        x = torch.zeros(*lam.shape, self.head_width * self.n_head, device=lam.device)
        bits, lam = bits[known], lam[known]
        if self.input == "token":
            x[known] = self.expected(self.wte, self.code, bits, lam)
        else:  # a table for every eight bits: no matrix has V rows
            for wte, byte in zip(self.wte, bits.split(8, 1)):
                codes = code_book(len(wte.weight)).to(bits)
                x[known] += self.expected(wte, codes, byte, lam)
        return x

    def forward(self, bits, lam, where=None):
        x = self.embed(bits, lam)
        if self.cond == "add":
            freq = 10000 ** (-torch.arange(64, device=lam.device) / 64)
            angle = 1000 * (lam / 2).tanh()[..., None] * freq
            noise = F.silu(self.noise_in(torch.cat((angle.cos(), angle.sin()), -1)))
            x = x + 0.1 * self.noise_head(noise)  # 0.1: AdamW moves these weights fast
        x = x + self.wpe.weight[:x.shape[1]]
        x = x + self.near(x.transpose(1, 2)).transpose(1, 2)  # three neighbours on each side
        rope = rotary(torch.arange(x.shape[1], device=x.device), self.head_width)
        for block in self.blocks:
            x = block(x, rope, False)
        x = self.norm(x)
        out = self.head(x if where is None else x[where])
        out = out if self.parts == 1 else out.unflatten(-1, (self.parts, -1))
        if self.skip:  # what a position knows of itself enters exactly, context adds to it
            bits, lam = (bits, lam) if where is None else (bits[where], lam[where])
            out = update(self, out, bits, lam)  # (E4)
        return out


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

SCHEDULES = {  # name: 1 - a(t), from 0 to 1, and its derivative
    "linear": (lambda t: t, torch.ones_like),
    "cosine": (lambda t: (math.pi / 2 * t).sin() ** 2, lambda t: math.pi / 2 * (math.pi * t).sin()),
    "quadratic": (lambda t: t ** 2, lambda t: 2 * t),
}


def clocks(shape, cfg, g, frozen=None):
    """tau (B, T) of (E2): when each position is clean, counted from the clean end. Evenly spread
    over the row, in random order; `frozen` positions are clean all the time."""
    score, N = torch.rand(shape, generator=g), torch.full(shape[:1], shape[1])
    if frozen is not None:
        score, N = score.masked_fill(frozen, 2.0), (~frozen).sum(1).clamp(min=1)
    rank = score.argsort(1).argsort(1)
    tau = (1 - cfg.window) * (rank + torch.rand(shape[0], 1, generator=g)) / N[:, None]
    return tau if frozen is None else tau.masked_fill(frozen, torch.inf)


def levels(t, tau, cfg, schedule=None):
    """Times t (B, 1), clocks tau (B, T) -> each position's log-odds lam, SURE for a clean one, 0
    for pure noise, and -d lam / dt, 0 for these two: (B, T) each."""
    own = ((t - tau) / cfg.window).clamp(0, 1).double()  # (E2)
    lost, slope = (curve(own) for curve in SCHEDULES[schedule or cfg.schedule])  # 1 - a
    lam = (2 / lost - 1).log().clamp(0, SURE)  # (E1)
    slope = torch.where((lam > 0) & (lam < SURE), 2 * slope / (lost * (2 - lost)), 0.0)
    return lam.float(), slope / cfg.window


def noised(clean, lam, g):
    """Codes (..., K) of +-1, log-odds (...) -> codes with each bit right with these odds."""
    u = torch.rand(clean.shape, generator=g, dtype=torch.float64).to(clean.device)
    return torch.where(u < lam.double().sigmoid()[..., None], clean, -clean)  # (E1)


def mixture(out):
    """A bit head's answer as products that are mixed: log-odds (n, R, K), log-weights (n, R)."""
    if out.dim() == 2:
        return out[:, None], torch.zeros_like(out[:, :1])
    return out[..., :-1], out[..., -1].log_softmax(1)


def bit_logits(model, out):
    """Log-odds of every bit being +1 by the network's answer: (n, V), (n, K) or (n, R, K + 1) ->
    (n, K), float64, which keeps the small probabilities that a clean bit is wrong."""
    if model.head_kind == "token":
        p, ones = out.double().softmax(1), (model.code > 0).double()
        return (p @ ones).log() - (p @ (1 - ones)).log()  # (E5)
    if model.parts == 1:
        return out.double()
    odds, weight = mixture(out.double())
    yes, no = (F.logsigmoid(y * odds).add(weight[..., None]).logsumexp(1) for y in (1, -1))
    return yes - no  # (E5)


def cross_entropy(model, out, x0):
    """-log p of tokens x0 (n,), for a bit head of their codes: (n,)."""
    if model.head_kind == "token":
        return F.cross_entropy(out, x0, reduction="none")
    odds, weight = mixture(out)
    return -(weight + F.logsigmoid(odds * model.code[x0][:, None]).sum(2)).logsumexp(1)


def best_token(model, out):
    """The likeliest tokens by the network's answer and their probability: (n,) twice. Of a bit head
    the likeliest code of the likeliest product; V if that is no token's."""
    if model.head_kind == "token":
        p, ids = out.softmax(1).max(1)
        return ids, p
    odds, weight = mixture(out)
    p, part = (weight + F.logsigmoid(odds.abs()).sum(2)).max(1)
    return ids_of(odds[torch.arange(len(part)), part], model.code), p.exp()


def density(odds, bits, clean, lam):
    """Integrand of the bound in nats per unit of lam, (n,), float64: the network's log-odds of
    every bit, the noisy bits and the clean ones, (n, K) each, and their lam (n,)."""
    lam = lam.double()[:, None]
    log_s = -lam * bits * clean
    log_s_hat = torch.logaddexp(F.logsigmoid(bits * odds) - lam, F.logsigmoid(-bits * odds) + lam)
    cost = log_s_hat.exp() + log_s.exp() * (log_s - log_s_hat - 1)
    return (cost / (2 * lam.sinh())).sum(1)  # (E8)


def loss_fn(model, x0, cfg, g, rows=slice(None)):
    """Training loss of the batch x0 (B, T), a scalar to differentiate, and info. The noise is drawn
    for the whole batch; then only `rows` of it are worked on, so that the mean over equal shares is
    the batch's loss. cfg.loss: ce, cross-entropy of the unsettled positions, each row averaged
    first; elbo, the bound (E8) per token."""
    (B, T), device = x0.shape, x0.device
    # 1. draw t evenly over the batch, clocks
    t = ((torch.arange(B) + torch.rand(1, generator=g)) / B)[:, None]
    begin = (torch.rand(B, 1, generator=g) < cfg.prefix) * torch.rand(B, 1, generator=g)
    frozen = torch.arange(T) < (T * begin).floor()  # (B, T)
    lam, slope = levels(t, clocks(x0.shape, cfg, g, frozen), cfg)
    # 2. corrupt
    clean = model.code[x0]  # (B, T, K)
    bits = noised(clean, lam.to(device), g)
    n = (lam < SURE).sum(1).to(device)  # unsettled positions of each row
    x0, clean, bits, lam, slope = (y[rows].to(device) for y in (x0, clean, bits, lam, slope))
    # 3. predict
    todo = lam < SURE if cfg.loss == "ce" else slope > 0
    out = model(bits, lam, todo).float()  # (number unsettled, V or K)
    # 4. weigh
    cost = torch.zeros(x0.shape, device=device)
    if cfg.loss == "ce":
        cost[todo] = cross_entropy(model, out, x0[todo])
        loss = (cost.sum(1) / n[rows].clamp(min=1)).sum() / (n > 0).sum().clamp(min=1)
    else:
        nats = density(bit_logits(model, out), bits[todo], clean[todo], lam[todo])
        cost[todo] = (slope[todo] * nats).float()  # (E8)
        loss = cost.sum() / (B * T)
    return loss * (B / len(x0)), dict(unsettled=n.float().mean().item())


@torch.no_grad()
def nelbo(model, x0, cfg, g, draws=8, frozen=None):
    """Upper bound (E8) on -log p(x0) in nats per row, (B,), unbiased, and info: what it is made of,
    log-odds lam and nats per unit of it, one of each for every position and time that counted.
    `draws` times on a comb with one random offset per row. When all positions share one time the
    bound is the same for every schedule, and is estimated with the quadratic one, which visits the
    clean end, where flips are rare and dear, often enough. The boolean `frozen` (B, T) names tokens
    that are given: the bound is then on -log p(others | given)."""
    (B, T), device = x0.shape, x0.device
    frozen = torch.zeros(B, T, dtype=torch.bool) if frozen is None else frozen.cpu()
    clean, u = model.code[x0], torch.rand(B, 1, generator=g)
    tau, schedule = clocks(x0.shape, cfg, g, frozen), cfg.schedule
    if cfg.window == 1:
        schedule = "quadratic"
    first = tau.amin(1, keepdim=True).clamp(max=1)  # outside of first..last nothing happens
    last = tau.masked_fill(frozen, -cfg.window).amax(1, keepdim=True) + cfg.window
    total, where, cost = torch.zeros(B).double(), [], []
    for k in range(draws):
        t = first + (last - first) * (k + u) / draws
        lam, slope = levels(t, tau, cfg, schedule)
        bits = noised(clean, lam.to(device), g)
        for i in torch.arange(B).split(64):
            lam_, todo = lam[i].to(device), (slope[i] > 0).to(device)
            out = model(bits[i], lam_, todo).float()
            nats = torch.zeros(todo.shape, dtype=torch.float64, device=device)
            nats[todo] = density(bit_logits(model, out), bits[i][todo], clean[i][todo], lam_[todo])
            total[i] += ((last - first)[i] / draws * slope[i] * nats.cpu()).sum(1)  # (E8)
            where.append(lam_[todo].cpu())
            cost.append(nats[todo].cpu())
    return total, dict(forwards=draws, lam=torch.cat(where), cost=torch.cat(cost))


def flip(lam_t, lam_s, y):
    """Probability that a bit changes on the way up from lam_t to lam_s > lam_t, both (...), if it
    is right at first, y = 1, or wrong, y = -1; float64. Without differences of numbers near one:
    1 + a y = 2 sigmoid(y lam), 1 - a_t / a_s = sinh((lam_s - lam_t) / 2) / ..."""
    t, s = lam_t.double(), lam_s.double()
    lost = ((s - t) / 2).sinh() / ((s / 2).sinh() * (t / 2).cosh())  # 1 - r
    return (lost * (-y * s).sigmoid() / (2 * (y * t).sigmoid())).clamp(max=1)  # (E6)


@torch.no_grad()
def nelbo_steps(model, x0, cfg, g, steps, joint=True):
    """Upper bound (E9) on -log p of a sampler of `steps` steps, unbiased: (B,) nats per row. joint:
    sampler token; else sampler bit. That codes of no token are drawn again among the tokens is
    counted for sampler bit; for token with a bit head it is not, the bound is a little larger."""
    clean, tau = model.code[x0], clocks(x0.shape, cfg, g)
    total = torch.zeros(len(x0)).double()
    for k in range(steps, 0, -1):
        lam, lam_s = (levels(t / steps, tau, cfg)[0].to(x0.device) for t in (k, k - 1))
        bits, todo = noised(clean, lam, g), lam_s > lam
        if not todo.any():
            continue
        out, goal, now = model(bits, lam, todo).float(), clean[todo], bits[todo]
        odds, last = bit_logits(model, out), lam_s[todo] >= SURE
        true = x0[todo][last]
        if joint:
            end = cross_entropy(model, out[last].double(), true)
        else:
            end = F.cross_entropy(0.5 * odds[last] @ model.code.double().T, true, reduction="none")
        right, wrong = (flip(lam[todo], lam_s[todo], y)[:, None] for y in (1, -1))
        f = torch.where(now == goal, right, wrong)
        if joint:
            stay = torch.rand(f.shape, generator=g, dtype=torch.float64).to(f.device) >= f
            up = torch.where(stay, 1 - right, right).log()  # log q(b_s | b_t, b_0) if b_t is right
            down = torch.where(stay, 1 - wrong, wrong).log()  # and if it is wrong
            own = torch.where(now == goal, up, down).sum(1)
            if model.head_kind == "token":
                u = 0.5 * (now * (up - down)) @ model.code.double().T
                u = u + 0.5 * (up + down).sum(1, True)
                step = own - (out.double().log_softmax(1) + u).logsumexp(1)  # (E9)
            else:
                odds, weight = mixture(out.double())
                m, up, down = now[:, None] * odds, up[:, None], down[:, None]
                u = torch.logaddexp(F.logsigmoid(m) + up, F.logsigmoid(-m) + down).sum(2)
                step = own - (weight + u).logsumexp(1)  # (E9)
        else:
            f_hat = right * (now * odds).sigmoid() + wrong * (-now * odds).sigmoid()  # (E7)
            step = (f * (f / f_hat).log() + (1 - f) * ((1 - f) / (1 - f_hat)).log()).sum(1)  # (E9)
        cost = torch.zeros(x0.shape, dtype=torch.float64, device=x0.device)
        step[last] = end
        cost[todo] = step
        total += cost.sum(1).cpu()
    return total


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


def deal(tau, waiting, score):
    """The clocks tau (n, T) of the positions that still wait, handed out anew among them: the one
    of the highest score begins next."""
    late = tau.masked_fill(~waiting, -torch.inf).sort(1, descending=True).values
    order = score.masked_fill(~waiting, -torch.inf).argsort(1, descending=True)
    return torch.where(waiting, tau.scatter(1, order, late), tau)


def aim(model, out, bits, lam, cfg, g):
    """The codes that a step goes for, (n, K), drawn by the network's answer at noisy bits (n, K),
    lam (n,), and the log-odds they were drawn with, None for tokens. Sampler token draws tokens, or
    the bits of one product of a mixture; bit draws every bit apart. The temperature is for the
    context: evidence is a measurement."""
    whole = cfg.sampler == "token" or cfg.sampler == "auto" and model.head_kind == "token"
    if model.head_kind == "token":
        out = filter_logits(update(model, out, bits, (cfg.temperature - 1) * lam), cfg)
        if whole:
            return model.code[categorical(out, g)], None  # (E7)
        odds = bit_logits(model, out).clamp(-SURE, SURE)
    else:
        out = update(model, out, bits, -lam) / max(cfg.temperature, 1e-6)
        out = update(model, out, bits, lam)
        odds = bit_logits(model, out)
        if whole:
            odds, weight = mixture(out.double())
            odds = odds[torch.arange(len(odds)), categorical(weight, g)]
    u = torch.rand(odds.shape, generator=g, dtype=torch.float64).to(odds.device)
    return torch.where(u < odds.sigmoid(), 1.0, -1.0), odds  # (E7)


@torch.no_grad()
def sample(model, cfg, n, g, prompt=None, trace=None, start=None):
    """n rows of T = seq_len ids, (n, T), and info: nfe, network calls, and invalid, the share of
    positions that came out as the code of no token. cfg.invalid makes tokens of these: project
    draws again, among the tokens only; modulo counts on from the first code. `prompt` (P,) ids
    begin every row; or `start` (n, T) holds id V where tokens are wanted, and all else is kept.
    `trace`, a list, receives (call, ids) pairs, V where a bit is likelier wrong than none."""
    device, V, nfe, lost = model.code.device, cfg.vocab_size, 0, 0
    # 1. what is given
    x = torch.full((n, cfg.seq_len), V, device=device) if start is None else start.clone()
    if prompt is not None:
        if len(prompt) > x.shape[1]:
            raise ValueError(f"a prompt of {len(prompt)} ids in a row of {x.shape[1]}")
        x[:, :len(prompt)] = prompt
    given = x != V
    # 2. noise, and clocks by which what is given is clean from the beginning
    bits = noised(model.code[x.masked_fill(~given, 0)], given * SURE, g)
    tau = clocks(x.shape, cfg, g, given.cpu()).to(device)
    if cfg.clock == "l2r":
        column = torch.arange(x.shape[1], device=device, dtype=torch.float)
        tau = deal(tau, tau < torch.inf, -column.expand_as(tau))
    steps = cfg.sampling_steps or x.shape[1]
    for k in range(steps, 0, -1):
        lam, lam_s = (levels(t / steps, tau, cfg)[0] for t in (k, k - 1))
        # 3. ask the network, where its answer is needed
        todo = lam < SURE if cfg.clock == "maxprob" else lam_s > lam
        if not todo.any():
            continue
        out = model(bits, lam, todo).float()
        nfe += 1
        if cfg.guidance and given.any():
            blind = torch.where(given[..., None], noised(bits, 0 * lam, g), bits)
            bare = model(blind, lam.masked_fill(given, 0.0), todo)
            out, bare = (update(model, y, bits[todo], -lam[todo]) for y in (out, bare))
            out = update(model, out + cfg.guidance * (out - bare), bits[todo], lam[todo])  # (E10)
            nfe += 1
        # 4. the surest of the waiting positions begin next
        if cfg.clock == "maxprob":
            sure = torch.zeros(x.shape, device=device)
            sure[todo] = best_token(model, out)[1]
            tau = deal(tau, todo & (lam == 0), sure)
            lam_s = levels((k - 1) / steps, tau, cfg)[0]
            out, todo = out[(lam_s > lam)[todo]], lam_s > lam
        # 5. one step up: bits flip towards what is aimed for; clean codes become tokens
        now, last = bits[todo], lam_s[todo] >= SURE
        goal, odds = aim(model, out, now, lam[todo], cfg, g)
        ids = ids_of(goal, model.code)
        bad = last & (ids == V)
        lost += bad.sum().item()
        if bad.any() and cfg.invalid == "project":
            ids[bad] = categorical(0.5 * odds[bad] @ model.code.double().T, g)  # (E5)
        elif bad.any():
            ids[bad] = number(model.code).argsort()[number(goal[bad]) % V]
        f = flip(lam[todo][:, None], lam_s[todo][:, None], now * goal)
        u = torch.rand(f.shape, generator=g, dtype=torch.float64).to(device)
        then = torch.where(u < f, -now, now)
        bits[todo] = torch.where(last[:, None], model.code[ids.clamp(max=V - 1)], then)
        x[todo] = torch.where(last, ids, V)
        if trace is not None:
            right = lam_s.sigmoid() ** bits.shape[2]  # that no bit is wrong
            trace.append((nfe, ids_of(bits, model.code).masked_fill(right < 0.5, V).cpu()))
    return x, dict(nfe=nfe, invalid=lost / max(1, (~given).sum().item()))


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
    """The eval command: the bound, the bounds of few steps, where bits are lost, accuracy,
    infilling, and samples of few steps of both samplers, as rows of eval.jsonl and three figures.
    Accuracies and nats of holes are of positions inside documents; `unigram` is the accuracy of
    always saying the commonest token."""
    run.begin_eval()
    tokenizer, g = open_data(cfg.data_dir).tokenizer, torch.Generator().manual_seed(cfg.seed)
    # 1. the bound, and those of few steps
    row = evaluate(model, cfg, "test", 500)
    run.log("test", -1, **row)
    run.say(f"test, {row['rows']} rows: {common.report(row)}")
    x0 = get_eval_rows("test", cfg, 4 * n)[0].to(run.device)
    bound, info = nelbo(model, x0, cfg, g, 32)
    row = dict(rows=len(x0), draws=32, nats_per_row=bound.mean().item(), se=common.se(bound))
    run.log("draws", -1, bound=BOUND, **row)
    run.say("with more draws: " + common.figures(row))
    for steps in (4, 8, 16, 32, 64, cfg.seq_len):
        for joint in (True, False):
            bound = nelbo_steps(model, x0[:n], cfg, g, steps, joint)
            row = dict(steps=steps, sampler="token" if joint else "bit", bound=BOUND,
                       nats_per_row=bound.mean().item(), se=common.se(bound))
            run.log("steps", -1, **row)
            run.say("bound of a sampler: " + common.figures(row))
    # 2. where bits are lost: what an isolated position still says, and what context adds
    lam = torch.linspace(0, 12, 41, device=run.device).repeat_interleave(n)
    some = torch.randint(cfg.vocab_size, lam.shape, generator=g).to(run.device)
    own = 0.5 * lam[:, None] * noised(model.code[some], lam, g) @ model.code.T
    alone = nn.functional.cross_entropy(own, some, reduction="none").view(41, -1).mean(1)
    t = torch.linspace(0, 1, 201)[:, None]
    one = dataclasses.replace(cfg, window=1.0)
    curves = {name: levels(t, torch.zeros(1), one, name)[0][:, 0].clamp(max=12).tolist()
              for name in SCHEDULES}
    common.plot_noise(run.out / "noise.png", lam.view(41, -1)[:, 0].tolist(), alone.tolist(),
                      info, curves, cfg, "bits", "log-odds that a bit of a position is right")
    # 3. accuracy where this share of the path is still ahead
    hidden = holes(x0, cfg, g)
    inside = hidden.pop("document")
    common_token = x0[inside].bincount().argmax()
    for t in (0.15, 0.5, 0.85, 1.0):
        lam = levels(t, clocks(x0.shape, cfg, g), cfg)[0].to(run.device)
        bits, todo, right = noised(model.code[x0], lam, g), (lam < SURE) & inside, []
        for i in torch.arange(len(x0)).split(64):
            k = todo[i]
            best, _ = best_token(model, model(bits[i], lam[i], k).float())
            right.append(best == x0[i][k])
        row = dict(t=t, accuracy=torch.cat(right).float().mean().item(),
                   unigram=(x0[todo] == common_token).float().mean().item())
        run.log("accuracy", -1, **row)
        run.say("accuracy of unsettled positions: " + common.figures(row))
    # 4. infilling, the surest position first
    greedy = dataclasses.replace(cfg, sampling_steps=0, guidance=0.0, temperature=0.5,
                                 clock="maxprob")
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
    # 5. samples
    judge = common.load_judge(cfg.judge, tokenizer, run)
    real = common.measure(x0[:n], cfg, tokenizer, judge)  # as many: diversity depends on it
    run.log("real", -1, n=n, **real)
    run.say(f"test documents: {common.figures(real)}")
    rows = []
    for sampler in cfg.eval_samplers.split(","):
        for steps in sorted({4, 8, 16, 32, 64, cfg.seq_len} & set(range(cfg.seq_len + 1))):
            for seed in range(cfg.eval_seeds):
                some = dataclasses.replace(cfg, sampler=sampler, sampling_steps=steps)
                clock = time.time()
                x, info = sample(model, some, n, torch.Generator().manual_seed(cfg.seed + seed))
                row = dict(sampler=sampler, sampling_steps=steps, seed=cfg.seed + seed, n=n, **info,
                           seconds=time.time() - clock, clock=cfg.clock,
                           temperature=cfg.temperature, top_p=cfg.top_p,
                           **common.measure(x, cfg, tokenizer, judge))
                run.log("samples", -1, **row)
                rows.append(row)
            shown = ("nfe", "invalid", "valid", "known", "agree", "judge", "entropy", "seconds")
            run.say(f"{sampler:9} " + common.figures({k: row[k] for k in shown if k in row}))
    common.plot_quality(run.out / "quality.png", rows, real, "sampler")


def train(cfg):
    """Train as the Config says; returns the averaged model. Everything it makes is in the run
    folder: config, log, checkpoint, samples, figures."""
    with common.Run(cfg, cfg.out or f"out/{NAME}") as run:
        fill_in(cfg, run.rank)
        torch.manual_seed(cfg.seed)
        model = Model(cfg, order_tokens(cfg)).to(run.device)
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
        return train(cfg) and None
    stored = common.load_config(Config, out)  # flags are laid over what the run was made with
    if command != "train":
        stored = fast(stored)
    cfg = common.parse(Config, PRESETS, argv, __doc__, default=stored)
    if command == "train":
        return train(cfg) and None
    common.check_same(cfg, stored, SHAPE + METHOD, f"the checkpoint in {out}")
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
