"""Gaussian diffusion on token embeddings: blur every word's vector, learn to say which word it was.

Method: Diffusion-LM (Li et al. 2022, arXiv 2205.14217), CDCD (Dieleman et al. 2022), Plaid
(Gulrajani and Hashimoto 2023); the bound is that of VDM (Kingma et al. 2021, arXiv 2107.00630).

    python dit_embed.py             7 minutes, 2 CPU cores: <= 1.64 nats/token (entropy 0.91)
    python dit_embed.py sample --prompt "Once upon a time" --n 3 --trace          64 calls, see FAST
    python dit_embed.py sample --infill "Once upon a ___ there was ___"
    python dit_embed.py eval             bound and its parts, accuracy, infilling, few-step samples

Equations. E (V, d) holds a vector for every token; lam is the log of the signal-to-noise ratio snr.
    (E1)  z_i = alpha_i E[x_0,i] + sigma_i eps,  alpha^2 = sigmoid(lam_i), sigma^2 = 1 - alpha^2
    (E2)  every position has its own time, t_i = clamp((t - tau_i) / w, 0, 1), lam_i = lam(t_i);
          w = 1: all alike, the classic process; w -> 0: one token after the other, in random order
    (E3)  log q(z_i | v) = l_v + const,  l_v = alpha / sigma^2 z_i.E_v - snr / 2 |E_v|^2
    (E4)  p(v | z) = softmax_v(net_i(z) + l_v): own evidence exactly, context from the network;
          emb_hat = sum_v p(v | z) E_v
    (E5)  emb_hat = (z - sigma eps_hat) / alpha = alpha z - sigma v_hat, for networks that say those
    (E6)  -log p(x_0) <= PRIOR + DIFF + RECON
          PRIOR = sum_i KL(q(z_i | x_0) || N(0, 1)) at t = 1; RECON = -sum_i E log p(x_0,i | z) at 0
          DIFF = 1/2 sum_i int E |emb_i - emb_hat_i|^2 d snr_i, for any path that is blind to x_0
    (E7)  DIFF of N Gaussian steps t -> s: sum (snr_s - snr_t) / 2 E |emb - emb_hat(z_t)|^2
    (E8)  a step: z_s = A z_t + B emb_hat + sigma_q xi,  c = 1 - snr_t / snr_s,
          A = alpha_s / alpha_t (1 - c),  B = alpha_s c,  sigma_q^2 = sigma_s^2 c
    (E9)  DDIM: z_s = alpha_s emb_hat + (sigma_s^2 - eta^2 sigma_q^2)^(1/2) eps_hat + eta sigma_q xi
    (E10) token mixture: emb_hat in (E8) becomes E_v of a drawn token v ~ p(. | z_t); with
          r = z_s - A z_t a step costs u_x - log sum_v p_v exp(u_v),
          u_v = B / sigma_q^2 r.E_v - B^2 / (2 sigma_q^2) |E_v|^2
    (E11) guidance by given text c: out + w (out - out without c)

Shapes: B batch, T tokens, V vocabulary, C width, H heads, D = C / H, d embedding width.
Units: nats. Every position of a row is charged, the EOS-filled tail too: nobody is told the length.

Differs from the papers: the network answers with tokens and gets its own evidence for free; noise
levels differ between positions (E2); the noise range lies around the place where tokens are lost.
Differs from ar.py: the input is a noisy vector, not a token; blocks look both ways and are told the
noise level (adaLN-zero); the likelihood is a bound; words take shape all over the row.
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

NAME, BOUND = "dit_embed", "upper"

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
    emb_dim: int = 16  # d, width of the embeddings that are diffused
    emb_norm: float = 1.0  # their norm r; 0 = free, of norm sqrt(d) at first
    emb_train: bool = True  # learn them; else they stay random
    schedule: Literal["logsnr", "logistic", "cosine", "linear", "sqrt"] = "logsnr"  # SNR and time
    gamma_shift: float = 0.0  # lower the log-SNR of any schedule, and its range, by this
    lam_above: float = 3.0  # cleanest log-SNR, above the place where tokens are lost
    lam_below: float = 8.0  # noisiest log-SNR, below it
    window: float = 0.1  # share of the path that a position needs from noise to token (E2)
    param: Literal["logits", "eps", "x0", "v"] = "logits"  # what the network says (E4) (E5)
    loss: Literal["auto", "ce", "vlb", "mse"] = "auto"  # auto: ce for logits, else mse
    anchor: float = 1.0  # weight of the rounding loss beside mse: keeps embeddings apart
    allow_collapse: bool = False  # let mse train embeddings without it
    skip: bool = True  # add own evidence to the logits (E4)
    input: Literal["evidence", "raw", "both"] = "evidence"  # what enters: posterior mean, z, both
    pos: Literal["both", "learned", "rotary"] = "both"  # positions at the input, in the attention
    norm: Literal["pre", "post"] = "pre"  # where the blocks normalise
    cond: Literal["adaln", "add", "none"] = "adaln"  # how the network is told the noise level
    selfcond: float = 0.0  # share of steps trained with an earlier estimate as input; 0 = off
    prefix: float = 0.0  # share of rows whose beginning, of random length, is clean in training
    sampler: Literal["auto", "token", "ancestral", "ddim"] = "auto"  # auto: token for logits
    eta: float = 0.0  # noise of ddim: 0 none, 1 ancestral
    clamp: bool = False  # ancestral, ddim: move estimates to the nearest embedding (biased)
    rounding: Literal["draw", "argmax", "nearest"] = "draw"  # the last step, from vectors to tokens
    clock: Literal["random", "l2r", "maxprob"] = "random"  # which position begins next
    given: Literal["clean", "noisy"] = "clean"  # prompt and infill text: clean, or noised like z
    sampling_steps: int = 0  # steps; 0 = one for every token of a row
    guidance: float = 0.0  # classifier-free guidance by the given text (E11); 0 = off
    infill: str = ""  # "Once ___ a ___3 who": holes of one and three tokens, then the end
    judge: str = "out/ar"  # eval: the run of ar.py that judges samples
    eval_samplers: str = "token,ancestral,ddim"  # eval: samplers to compare
    eval_seeds: int = 1  # eval: repetitions of every sampling setting
    # filled in from the data
    eos: int = -1  # end of document; also BOS where the tokenizer has no other
    bos: int = -1  # first input
    data_dir: str = ""  # where the prepared data are

    def __post_init__(self):  # what cannot work stops here, before any training
        if self.param != "logits":
            if self.loss == "ce":
                raise ValueError("--loss ce needs a network that says tokens, --param "
                                 f"{self.param} does not: use --param logits, or --loss mse or vlb")
            if self.sampler == "token" or self.clock == "maxprob":
                raise ValueError("--sampler token and --clock maxprob need a network that says "
                                 f"tokens, --param {self.param} does not: use --param logits")
        mse = self.loss == "mse" or self.loss == "auto" and self.param != "logits"
        if mse and self.emb_train and not self.anchor and not self.allow_collapse:
            raise ValueError("a mean squared error alone is smallest when all embeddings are the "
                             "same: give --anchor 1, or --no-emb-train, or, to see it happen, "
                             "--allow-collapse")
        for name in self.eval_samplers.split(","):
            if name not in ("token", "ancestral", "ddim"):
                raise ValueError(f"--eval-samplers knows token, ancestral and ddim, not '{name}'")
        if not 0 < self.window <= 1:
            raise ValueError(f"--window is {self.window}, it must be more than 0 and at most 1")


PRESETS = dict(tiny={}, small=dict(n_layer=8, n_head=8, n_embd=512, seq_len=256, lr=2e-3),
               medium=dict(n_layer=12, n_head=12, n_embd=768, seq_len=512, lr=1e-3))
SHAPE = ("vocab_size", "seq_len", "n_layer", "n_head", "n_embd", "rows")  # fixed by a checkpoint
METHOD = ("emb_dim", "emb_norm", "emb_train", "gamma_shift", "lam_above", "lam_below", "param",
          "skip", "input", "pos", "norm", "cond")  # so are these
FAST = dict(clock="maxprob", sampling_steps=64, temperature=0.5)
# FAST is how samples are drawn unless told otherwise: most valid tales in 64 calls, see LOG.md.
# The defaults above are the law that the likelihoods are about.


def fast(cfg):
    """cfg with FAST wherever it has the defaults: how samples are drawn unless told otherwise."""
    return dataclasses.replace(cfg, **{
        k: v for k, v in FAST.items() if getattr(cfg, k) == getattr(Config, k)
        and (k != "clock" or cfg.param == "logits")})

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


def modulate(x, scale, shift):
    return x if scale is None else x * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.attn = nn.RMSNorm(cfg.n_embd), Attention(cfg)
        self.norm2, self.mlp = nn.RMSNorm(cfg.n_embd), MLP(cfg)
        self.post = cfg.norm == "post"

    def forward(self, x, rope, causal, past=None, ada=None, place=None):
        """ada: six (U, C), what the U noise levels in use scale and shift; place (B, T): the level
        of a position. adaLN-zero (Peebles & Xie 2023, section 3.2): a block starts as the identity
        because its residual outputs are zero; gates that start at zero too would never learn."""
        a1 = b1 = c1 = a2 = b2 = c2 = None
        if ada is not None:
            a1, b1, c1, a2, b2, c2 = (F.embedding(place, part) for part in ada)
        y = self.attn(modulate(x if self.post else self.norm1(x), a1, b1), rope, causal, past)
        x = x + modulate(y, c1, 0.0)
        x = self.norm1(x) if self.post else x
        y = self.mlp(modulate(x if self.post else self.norm2(x), a2, b2))
        x = x + modulate(y, c2, 0.0)
        return self.norm2(x) if self.post else x


def ends(cfg):
    """Cleanest and noisiest log-SNR. An isolated token is lost near snr = 2 ln V / r^2, r the norm
    of its embedding; the range lies around that place, wherever r and V put it."""
    r2 = cfg.emb_norm ** 2 or cfg.emb_dim
    center = math.log(2 * math.log(cfg.vocab_size) / r2) - cfg.gamma_shift
    return center + cfg.lam_above, center - cfg.lam_below


def match(y, weight, E):
    """y.E_v - weight / 2 |E_v|^2 for every token v: (..., d), (..., 1), (V, d) -> (..., V). In
    float32 even under autocast: it may be in the hundreds, and its differences count."""
    with torch.autocast(y.device.type, enabled=False):
        return torch.cat((y, -0.5 * weight), -1) @ torch.cat((E, E.square().sum(1, True)), 1).T


class Model(nn.Module):
    """Bidirectional transformer over noisy embeddings: z (B, T, d), log-SNR lam (B, T) -> logits
    (B, T, V), or what cfg.param says, (B, T, d); for a boolean `where` (B, T) only those of the n
    positions it names, (n, V) or (n, d). `guess` (B, T, d): an earlier estimate of the clean
    embeddings, for self-conditioning (Chen et al. 2022)."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.head_width = cfg.n_head, cfg.n_embd // cfg.n_head
        self.range = ends(cfg)
        self.emb_norm, self.emb_train = cfg.emb_norm, cfg.emb_train
        self.input, self.pos, self.cond = cfg.input, cfg.pos, cfg.cond
        self.skip = cfg.skip and cfg.param == "logits"
        self.code = nn.Embedding(cfg.vocab_size, cfg.emb_dim)  # what is diffused
        if cfg.input != "raw":
            self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)  # what the network sees of it
        if cfg.input != "evidence":
            self.raw_in = nn.Linear(cfg.emb_dim, cfg.n_embd, bias=False)
        if cfg.selfcond:
            self.guess_head = nn.Linear(cfg.emb_dim, cfg.n_embd, bias=False)
        if cfg.pos != "rotary":
            self.wpe = nn.Embedding(cfg.seq_len, cfg.n_embd)
        self.near = nn.Conv1d(cfg.n_embd, cfg.n_embd, 7, padding=3, groups=cfg.n_embd, bias=False)
        if cfg.cond != "none":
            self.noise_in = nn.Linear(2 * 64, cfg.n_embd)
            self.noise_head = nn.Linear(cfg.n_embd, cfg.n_embd)
        if cfg.cond == "adaln":  # outside of the blocks, where Muon would make it far too fast
            self.ada_heads = nn.ModuleList(nn.Linear(cfg.n_embd, 6 * cfg.n_embd)
                                           for _ in range(cfg.n_layer))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size if cfg.param == "logits" else cfg.emb_dim)
        init_weights(self)
        nn.init.normal_(self.code.weight)
        for head in self.ada_heads if cfg.cond == "adaln" else ():
            nn.init.zeros_(head.weight)

    def table(self):
        """The embeddings E (V, d), rows of norm cfg.emb_norm, or free if that is 0."""
        E = self.code.weight if self.emb_train else self.code.weight.detach()
        return self.emb_norm * F.normalize(E, dim=1) if self.emb_norm else E

    def evidence(self, z, lam):
        """log q(z | v) for every token v but for a constant: (..., d), (...) -> (..., V)."""
        snr = lam.exp()[..., None]
        return match((snr * (1 + snr)).sqrt() * z, snr, self.table())  # (E3), alpha / sigma^2 z

    def mean(self, logits):
        """Expected embedding under softmax(logits): (..., V) -> (..., d), in float32."""
        with torch.autocast(logits.device.type, enabled=False):
            return logits.float().softmax(-1) @ self.table()  # (E4)

    def embed_noise(self, lam):
        """Log-SNR (U,) -> (U, C): sinusoids (Vaswani et al. 2017, section 3.5), then a layer. The
        factor matters: sines of numbers below one are nearly linear in them."""
        high, low = self.range
        freq = 10000 ** (-torch.arange(64, device=lam.device) / 64)
        angle = 1000 * ((high - lam) / (high - low))[:, None] * freq
        return F.silu(self.noise_in(torch.cat((angle.cos(), angle.sin()), 1)))

    def forward(self, z, lam, where=None, guess=None):
        T = z.shape[1]
        x = torch.zeros(*lam.shape, self.head_width * self.n_head, device=z.device)
        if self.input != "raw":  # the posterior mean of the input, given the position's own z;
            high, low = self.range
            known = (lam > low + 1e-3) & (lam < high - 1e-3)  # zero at the noisy end
            p = self.evidence(z[known], lam[known]).softmax(1)  # (number known, V)
            x[known] = (p @ self.wte.weight).to(x.dtype)
            clean = lam >= high - 1e-3  # one token has all the weight: only that one, for speed
            x[clean] = self.wte(self.evidence(z[clean], lam[clean]).argmax(1))
        if self.input != "evidence":
            x = x + self.raw_in(z)
        if guess is not None:
            x = x + self.guess_head(guess)
        place, ada = None, [None] * len(self.blocks)
        if self.cond != "none":  # every level that occurs is embedded once
            levels, place = lam.unique(return_inverse=True)
            noise = self.embed_noise(levels)  # (U, C)
            x = x + F.embedding(place, 0.1 * self.noise_head(noise))  # 0.1: AdamW moves these
        if self.cond == "adaln":  # weights too fast for what hangs on them
            ada = [(0.1 * head(noise)).chunk(6, 1) for head in self.ada_heads]
        if self.pos != "rotary":
            x = x + self.wpe.weight[:T]
        x = x + self.near(x.transpose(1, 2)).transpose(1, 2)  # three neighbours on each side
        rope = rotary(torch.arange(T, device=z.device) * (self.pos != "learned"), self.head_width)
        for block, parts in zip(self.blocks, ada):
            x = block(x, rope, False, None, parts, place)
        x = self.norm(x)
        out = self.head(x if where is None else x[where])
        if self.skip:  # what a position knows of itself enters exactly, context adds to it
            z, lam = (z, lam) if where is None else (z[where], lam[where])
            out = out.float() + self.evidence(z, lam)  # (E4)
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

SCHEDULES = {  # name: log-SNR lam(t) and -d lam / dt; alpha^2 = sigmoid(lam) is "alpha bar"
    "linear": (lambda t: -(0.1 * t + 9.95 * t * t).expm1().log(),  # of beta: Ho et al. 2020
               lambda t: (0.1 + 19.9 * t) / -(-0.1 * t - 9.95 * t * t).expm1()),
    "cosine": (lambda t: -2 * (math.pi / 2 * (t + 0.008) / 1.008).tan().log(),
               lambda t: 2 * math.pi / 1.008 / (math.pi * (t + 0.008) / 1.008).sin()),
    "sqrt": (lambda t: (1 / (t + 1e-4).sqrt() - 1).log(),
             lambda t: 0.5 / (t + 1e-4) / (1 - (t + 1e-4).sqrt())),
}


def log_snr(t, cfg):
    """Times in [0, 1] -> log-SNR lam(t), falling, and -d lam / dt, 0 where the range cuts it off.
    logsnr falls evenly through the range, logistic (a logistic distribution's quantiles) slowest
    where tokens are lost; the others have their papers' shapes within the range."""
    high, low = ends(cfg)
    if cfg.schedule == "logsnr":
        return high + (low - high) * t, torch.full_like(t, high - low)
    if cfg.schedule == "logistic":
        a, b = 1 / (1 + math.exp(cfg.lam_above)), 1 / (1 + math.exp(-cfg.lam_below))
        p = a + (b - a) * t.double()
        lam = high - cfg.lam_above + (1 / p - 1).log()
        return lam.clamp(low, high).to(t), ((b - a) / (p * (1 - p))).to(t)
    curve, slope = SCHEDULES[cfg.schedule]
    lam = (curve(t.double()) - cfg.gamma_shift).nan_to_num(low)
    slope = torch.where((lam > low) & (lam < high), slope(t.double()), 0.0)
    return lam.clamp(low, high).to(t), slope.to(t)


def clocks(shape, cfg, g, frozen=None):
    """tau (B, T) of (E2): when each position is clean, counted from the clean end. Evenly spread
    over the row, in random order; `frozen` positions are clean all the time."""
    score, N = torch.rand(shape, generator=g), torch.full(shape[:1], shape[1])
    if frozen is not None:
        score, N = score.masked_fill(frozen, 2.0), (~frozen).sum(1).clamp(min=1)
    rank = score.argsort(1).argsort(1)
    tau = (1 - cfg.window) * (rank + torch.rand(shape[0], 1, generator=g)) / N[:, None]
    return tau if frozen is None else tau.masked_fill(frozen, torch.inf)


def levels(t, tau, cfg):
    """Times t (B, 1), clocks tau (B, T) -> each position's own time, its log-SNR, and how fast that
    falls with t: three (B, T). Own time 0 is a settled position, 1 an undecided one."""
    own = ((t - tau) / cfg.window).clamp(0, 1)  # (E2)
    lam, slope = log_snr(own, cfg)
    return own, lam, slope / cfg.window * ((own > 0) & (own < 1))


def noised(emb, lam, eps):
    """Clean embeddings (..., d), log-SNR (...), standard normal eps (..., d) -> z (..., d)."""
    alpha, sigma = lam.sigmoid().sqrt()[..., None], (-lam).sigmoid().sqrt()[..., None]
    return alpha * emb + sigma * eps  # (E1)


def estimate(model, out, z, lam, cfg):
    """The clean embeddings that the network's answer means: out (..., V) or (..., d), z (..., d),
    lam (...) -> (..., d), float32."""
    if cfg.param == "logits":
        return model.mean(out)  # (E4)
    alpha, sigma = lam.sigmoid().sqrt()[..., None], (-lam).sigmoid().sqrt()[..., None]
    out = out.float()
    if cfg.param == "eps":
        return (z - sigma * out) / alpha  # (E5)
    return alpha * z - sigma * out if cfg.param == "v" else out  # (E5)


def predict(model, z, lam, where, cfg, guess=None):
    """The network's answer at the n positions `where`: (n, V) or (n, d). A self-conditioned network
    without a guess first makes its own: the answer is still a function of z and lam alone."""
    if cfg.selfcond and guess is None:
        guess = estimate(model, model(z, lam), z, lam, cfg)
    return model(z, lam, where, guess)


def rounding_nll(model, x0, z, lam):
    """-log p(x_0,i | z_i) by the position's own evidence, every token alike before: (B, T)."""
    return F.cross_entropy(model.evidence(z, lam).transpose(1, 2), x0, reduction="none")


def prior_kl(emb, cfg):
    """KL(q(z_i | x_0) || N(0, 1)) at the noisy end in nats: (B, T, d) -> (B, T)."""
    lam = log_snr(torch.ones(1), cfg)[0].to(emb.device)
    spread = -lam.sigmoid() - F.logsigmoid(-lam)  # sigma^2 - 1 - ln sigma^2
    return 0.5 * (emb.shape[-1] * spread + lam.sigmoid() * emb.square().sum(-1))  # (E6)


def loss_fn(model, x0, cfg, g, rows=slice(None)):
    """Training loss of the batch x0 (B, T), a scalar to differentiate, and info. The noise is drawn
    for the whole batch; then only `rows` of it are worked on, so that the mean over equal shares is
    the batch's loss. cfg.loss: ce, cross-entropy of the unsettled positions, each row averaged
    first; mse, squared error of what cfg.param says, per number; vlb, the bound (E6) per token."""
    (B, T), device, what = x0.shape, x0.device, cfg.loss
    if what == "auto":
        what = "ce" if cfg.param == "logits" else "mse"
    # 1. draw t evenly over the batch, clocks, noise
    t = ((torch.arange(B) + torch.rand(1, generator=g)) / B)[:, None]
    begin = (torch.rand(B, 1, generator=g) < cfg.prefix) * torch.rand(B, 1, generator=g)
    frozen = torch.arange(T) < (T * begin).floor()  # (B, T)
    own, lam, slope = levels(t, clocks(x0.shape, cfg, g, frozen), cfg)
    eps, eps0 = torch.randn(2, B, T, cfg.emb_dim, generator=g).to(device)[:, rows]
    twice = cfg.selfcond > torch.rand(1, generator=g)
    n = (own > 0).sum(1).to(device)  # unsettled positions of each row
    x0, lam, slope, todo, charged = (y[rows].to(device) for y in (x0, lam, slope, own > 0, ~frozen))
    # 2. corrupt
    emb = model.table()[x0]  # (B', T, d)
    z = noised(emb, lam, eps)
    # 3. predict
    guess = None
    if twice:
        with torch.no_grad():
            guess = estimate(model, model(z, lam), z, lam, cfg)
    out = model(z, lam, todo, guess)  # (number unsettled, V or d)
    # 4. weigh
    cost = torch.zeros(x0.shape, device=device)
    if what == "ce":
        cost[todo] = F.cross_entropy(out.float(), x0[todo], reduction="none")
    elif what == "mse" and cfg.param in ("eps", "v"):
        alpha, sigma = noised(torch.ones_like(lam)[..., None], lam, 0.0), (-lam).sigmoid().sqrt()
        goal = eps if cfg.param == "eps" else alpha * eps - sigma[..., None] * emb
        cost[todo] = (out.float() - goal[todo]).square().mean(1)
    else:
        error = (estimate(model, out, z[todo], lam[todo], cfg) - emb[todo]).square()
        snr = 0.5 * (slope * lam.exp())[todo]
        cost[todo] = error.mean(1) if what == "mse" else snr * error.sum(1)  # (E6)
    if what == "vlb":
        loss = cost.sum() / (B * T)
    else:
        loss = (cost.sum(1) / n[rows].clamp(min=1)).sum() / (n > 0).sum().clamp(min=1)
    if what == "vlb" or what == "mse" and cfg.anchor:
        lam = log_snr(torch.zeros(x0.shape), cfg)[0].to(device)
        end = rounding_nll(model, x0, noised(emb, lam, eps0), lam)
        if what == "vlb":
            loss = loss + ((end + prior_kl(emb, cfg)) * charged).sum() / (B * T)
        else:
            loss = loss + cfg.anchor * end.sum() / (B * T)
    return loss * (B / len(x0)), dict(unsettled=n.float().mean().item())


@torch.no_grad()
def nelbo(model, x0, cfg, g, K=8, frozen=None):
    """Upper bound (E6) on -log p(x0) in nats per row, (B,), unbiased, and info: its parts prior,
    diff, recon, (B,) each, and what diff is made of, log-SNR and nats per unit of it, one of each
    for every position and time that counted. K times on a comb with one random offset per row. The
    boolean `frozen` (B, T) names tokens that are given: the bound is then on -log p(others |
    given)."""
    (B, T), device = x0.shape, x0.device
    frozen = torch.zeros(B, T, dtype=torch.bool) if frozen is None else frozen.cpu()
    free = ~frozen
    emb, u = model.table()[x0], torch.rand(B, 1, generator=g)
    tau = clocks(x0.shape, cfg, g, frozen)
    first = tau.amin(1, keepdim=True).clamp(max=1)  # outside of first..last nothing happens
    last = tau.masked_fill(frozen, -cfg.window).amax(1, keepdim=True) + cfg.window
    diff, recon, where, cost = torch.zeros(B).double(), torch.zeros(B).double(), [], []
    for k in range(K + 1):  # the last one is the clean end
        t = first + (last - first) * (k + u) / K if k < K else torch.zeros(B, 1)
        own, lam, slope = levels(t, tau, cfg)
        todo = slope > 0 if k < K else free
        eps = torch.randn(B, T, cfg.emb_dim, generator=g)
        for i in torch.arange(B).split(64):
            lam_, todo_ = lam[i].to(device), todo[i].to(device)
            z = noised(emb[i.to(device)], lam_, eps[i].to(device))
            if k == K and cfg.param != "logits":
                recon[i] = (rounding_nll(model, x0[i], z, lam_) * todo_).double().sum(1).cpu()
                continue
            out = predict(model, z, lam_, todo_, cfg).float()
            nats = torch.zeros(todo_.shape, dtype=torch.float64, device=device)
            if k == K:
                nats[todo_] = F.cross_entropy(out, x0[i][todo_], reduction="none").double()
                recon[i] = nats.sum(1).cpu()
                continue
            error = estimate(model, out, z[todo_], lam_[todo_], cfg) - emb[i][todo_]
            nats[todo_] = 0.5 * lam_[todo_].exp().double() * error.double().square().sum(1)
            diff[i] += ((last - first)[i] / K * slope[i] * nats.cpu()).sum(1)  # (E6)
            where.append(lam_[todo_].cpu())
            cost.append(nats[todo_].cpu())
    prior = (prior_kl(emb, cfg).cpu().double() * free).sum(1)
    return prior + diff + recon, dict(forwards=K + 1, prior=prior, diff=diff, recon=recon,
                                      lam=torch.cat(where), cost=torch.cat(cost))


def bridge(lam_t, lam_s):
    """q(z_s | z_t, emb) = N(A z_t + B emb, sigma_q^2) from log-SNR lam_t up to lam_s, both (...):
    A, B and sigma_q, (..., 1) each."""
    c = -(lam_t - lam_s).expm1()
    ratio = (F.logsigmoid(lam_s) - F.logsigmoid(lam_t)).div(2).exp()  # alpha_s / alpha_t
    B, sigma_q = lam_s.sigmoid().sqrt() * c, ((-lam_s).sigmoid() * c).sqrt()  # (E8)
    return (ratio * (1 - c))[..., None], B[..., None], sigma_q[..., None]


@torch.no_grad()
def nelbo_steps(model, x0, cfg, g, steps, mixture=True):
    """Upper bound on -log p of a sampler of `steps` steps, unbiased: (B,) nats per row. mixture:
    sampler token (E10), for a network that says tokens; else ancestral (E7)."""
    if mixture and cfg.param != "logits":
        raise ValueError(f"a mixture needs probabilities of tokens, param {cfg.param} has none")
    device, E = x0.device, model.table()
    emb, tau = E[x0], clocks(x0.shape, cfg, g).to(device)
    total = prior_kl(emb, cfg).double().sum(1)
    for k in range(steps, -1, -1):
        own, lam, _ = levels(k / steps, tau, cfg)
        lam_s = levels(max(k - 1, 0) / steps, tau, cfg)[1]
        todo = lam_s > lam if k else torch.ones_like(own, dtype=torch.bool)
        if not todo.any():
            continue
        eps, xi = torch.randn(2, *emb.shape, generator=g).to(device)
        z, cost = noised(emb, lam, eps), torch.zeros(x0.shape, dtype=torch.float64, device=device)
        out = predict(model, z, lam, todo, cfg).float()
        lam, lam_s, e = lam[todo], lam_s[todo], emb[todo]
        if not k:
            logits = out if cfg.param == "logits" else model.evidence(z[todo], lam)
            nats = F.cross_entropy(logits, x0[todo], reduction="none")
        elif mixture:
            _, B, sigma_q = bridge(lam, lam_s)
            r = B * e + sigma_q * xi[todo]  # z_s - A z_t
            u = match(B / sigma_q ** 2 * r, (B / sigma_q) ** 2, E)
            right = u.gather(1, x0[todo][:, None])[:, 0]
            nats = right - (out.log_softmax(1) + u).logsumexp(1)  # (E10)
        else:
            error = (estimate(model, out, z[todo], lam, cfg) - e).square().sum(1)
            nats = 0.5 * (lam_s.exp() - lam.exp()) * error  # (E7)
        cost[todo] = nats.double()
        total += cost.sum(1)
    return total.cpu()


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


def aim(model, out, z, lam, cfg, g):
    """The clean embeddings that a step goes for, from the network's answer: (n, V) or (n, d), z
    (n, d), lam (n,) -> (n, d)."""
    E = model.table()
    if cfg.param == "logits":  # the temperature is for the context: evidence is a measurement
        ev = model.evidence(z, lam)
        logits = filter_logits(out - ev + cfg.temperature * ev, cfg)
        if cfg.sampler in ("auto", "token"):
            return E[categorical(logits, g)]  # (E10)
        emb_hat = model.mean(logits)
    else:
        emb_hat = estimate(model, out, z, lam, cfg)
    return E[match(emb_hat, torch.ones_like(lam)[:, None], E).argmax(1)] if cfg.clamp else emb_hat


@torch.no_grad()
def sample(model, cfg, n, g, prompt=None, trace=None, start=None):
    """n rows of T = seq_len ids, (n, T), and info (nfe = network calls). `prompt` (P,) ids begin
    every row; or `start` (n, T) holds id V where tokens are wanted, and all else is kept. `trace`,
    a list, receives (call, ids) pairs, V where no token has half of the probability yet."""
    device, V, nfe = next(model.parameters()).device, cfg.vocab_size, 0
    # 1. what is given
    x = torch.full((n, cfg.seq_len), V, device=device) if start is None else start.clone()
    if prompt is not None:
        if len(prompt) > x.shape[1]:
            raise ValueError(f"a prompt of {len(prompt)} ids in a row of {x.shape[1]}")
        x[:, :len(prompt)] = prompt
    given = x != V
    emb = model.table()[x.masked_fill(~given, 0)]
    # 2. noise and clocks: a given text is clean from the beginning, or noised as in training
    eps = torch.randn(emb.shape, generator=g).to(device)
    z, guess = eps, torch.zeros_like(eps) if cfg.selfcond else None
    tau = clocks(x.shape, cfg, g, given.cpu() if cfg.given == "clean" else None).to(device)
    if cfg.clock == "l2r":
        column = torch.arange(x.shape[1], device=device, dtype=torch.float)
        tau = deal(tau, tau < torch.inf, -column.expand_as(tau))
    steps = cfg.sampling_steps or x.shape[1]
    for k in range(steps, -1, -1):
        own, lam, _ = levels(k / steps, tau, cfg)
        lam_s = levels(max(k - 1, 0) / steps, tau, cfg)[1]
        z = torch.where(given[..., None], noised(emb, lam, eps), z)
        # 3. ask the network, where its answer is needed
        ahead = cfg.clock == "maxprob" and k > 0
        todo = ~given & ((own > 0) if ahead else (lam_s > lam) if k else (own == 0))
        if not todo.any():
            continue
        ask = torch.ones_like(given) if cfg.selfcond else todo
        out = model(z, lam, ask, guess).float()
        nfe += 1
        if cfg.guidance and given.any():
            low = log_snr(torch.ones_like(lam), cfg)[0]
            blind = torch.where(given[..., None], eps, z)
            unseen = None if guess is None else guess.masked_fill(given[..., None], 0.0)
            bare = model(blind, torch.where(given, low, lam), ask, unseen)
            out = out + cfg.guidance * (out - bare.float())  # (E11)
            nfe += 1
        if cfg.selfcond:
            guess = estimate(model, out, z[ask], lam[ask], cfg).view_as(z)
            out = out[todo[ask]]
        # 4. the surest of the waiting positions begin next
        if ahead:
            sure = torch.zeros(x.shape, device=device)
            sure[todo] = out.softmax(1).amax(1)
            tau = deal(tau, todo & (own == 1), sure)
            lam_s = levels((k - 1) / steps, tau, cfg)[1]
            out, todo = out[(lam_s > lam)[todo]], todo & (lam_s > lam)
        # 5. one step up, or at the clean end the tokens
        if k == 0:
            logits = out if cfg.param == "logits" and cfg.rounding != "nearest" else \
                model.evidence(z[todo], lam[todo])
            x[todo] = categorical(logits, g) if cfg.rounding == "draw" else logits.argmax(1)
        else:
            now, lam_s = lam[todo], lam_s[todo]
            emb_hat = aim(model, out, z[todo], now, cfg, g)
            A, B, sigma_q = bridge(now, lam_s)
            xi = torch.randn(z.shape, generator=g).to(device)[todo]
            if cfg.sampler == "ddim":
                alpha, sigma = (y.sigmoid().sqrt()[:, None] for y in (now, -now))
                eps_hat = (z[todo] - alpha * emb_hat) / sigma
                rest = ((-lam_s).sigmoid()[:, None] - (cfg.eta * sigma_q) ** 2).sqrt()
                step = noised(emb_hat, lam_s, 0.0) + rest * eps_hat + cfg.eta * sigma_q * xi  # (E9)
            else:
                step = A * z[todo] + B * emb_hat + sigma_q * xi  # (E8)
            z = z.masked_scatter(todo[..., None], step)
        if trace is not None:
            now = levels(max(k - 1, 0) / steps, tau, cfg)[1]
            p, best = model.evidence(z, now).softmax(2).max(2)
            seen = torch.where(given, x, best.masked_fill(p < 0.5, V)) if k else x
            trace.append((nfe, seen.cpu().clone()))
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


def best_token(model, out, z, lam, cfg):
    """The likeliest tokens by the network's answer (n, V) or (n, d): (n,)."""
    if cfg.param != "logits":
        out = match(estimate(model, out, z, lam, cfg), torch.ones_like(lam)[:, None], model.table())
    return out.argmax(1)


@torch.no_grad()
def evaluate_all(run, model, cfg, n=64):
    """The eval command: the bound and its parts, the bound of few steps, where tokens are lost,
    accuracy, infilling, and samples of few steps of several samplers, as rows of eval.jsonl and
    three figures. Accuracies and nats of holes are of positions inside documents; `unigram` is the
    accuracy of always saying the commonest token."""
    run.begin_eval()
    tokenizer, g = open_data(cfg.data_dir).tokenizer, torch.Generator().manual_seed(cfg.seed)
    # 1. the bound and its parts
    row = evaluate(model, cfg, "test", 500)
    run.log("test", -1, **row)
    run.say(f"test, {row['rows']} rows: {common.report(row)}")
    x0 = get_eval_rows("test", cfg, 4 * n)[0].to(run.device)
    bound, info = nelbo(model, x0, cfg, g, 32)
    parts = {f"{key}{end}": value for key in ("prior", "diff", "recon") for end, value in
             (("", info[key].mean().item()), ("_se", common.se(info[key])))}
    run.log("parts", -1, rows=len(x0), bound=bound.mean().item(), se=common.se(bound), **parts)
    run.say("nats per row: " + common.figures(parts))
    for steps in (4, 8, 16, 32, 64, cfg.seq_len):
        for mixture in (True, False)[cfg.param != "logits":]:
            bound = nelbo_steps(model, x0[:n], cfg, g, steps, mixture)
            row = dict(steps=steps, sampler="token" if mixture else "ancestral", bound=BOUND,
                       nats_per_row=bound.mean().item(), se=common.se(bound))
            run.log("steps", -1, **row)
            run.say("bound of a sampler: " + common.figures(row))
    # 2. where tokens are lost: what an isolated position still says, and what context adds
    high, low = ends(cfg)
    lam = torch.linspace(low, high, 41, device=run.device).repeat_interleave(4 * n)
    some = torch.randint(cfg.vocab_size, lam.shape, generator=g).to(run.device)
    z = noised(model.table()[some], lam, torch.randn(*lam.shape, cfg.emb_dim, generator=g).to(lam))
    alone = rounding_nll(model, some[:, None], z[:, None], lam[:, None]).view(41, -1).mean(1)
    t = torch.linspace(0, 1, 201)
    curves = {name: log_snr(t, dataclasses.replace(cfg, schedule=name))[0].tolist()
              for name in ("logsnr", "logistic", *SCHEDULES)}
    common.plot_noise(run.out / "noise.png", lam.view(41, -1)[:, 0].tolist(), alone.tolist(),
                      info, curves, cfg)
    # 3. accuracy where this share of the path is still ahead
    hidden = holes(x0, cfg, g)
    inside = hidden.pop("document")
    common_token = x0[inside].bincount().argmax()
    for t in (0.15, 0.5, 0.85, 1.0):
        own, lam, _ = (y.to(run.device) for y in levels(t, clocks(x0.shape, cfg, g), cfg))
        eps, todo = torch.randn(*x0.shape, cfg.emb_dim, generator=g), (own > 0) & inside
        z, right = noised(model.table()[x0], lam, eps.to(run.device)), []
        for i in torch.arange(len(x0)).split(64):
            k = todo[i]
            out = predict(model, z[i], lam[i], k, cfg).float()
            right.append(best_token(model, out, z[i][k], lam[i][k], cfg) == x0[i][k])
        row = dict(t=t, accuracy=torch.cat(right).float().mean().item(),
                   unigram=(x0[todo] == common_token).float().mean().item())
        run.log("accuracy", -1, **row)
        run.say("accuracy of unsettled positions: " + common.figures(row))
    # 4. infilling, the surest position first
    greedy = dataclasses.replace(cfg, sampling_steps=0, guidance=0.0, temperature=0.5,
                                 clock="maxprob" if cfg.param == "logits" else "random")
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
            shown = ("nfe", "valid", "known", "agree", "judge", "entropy", "seconds")
            run.say(f"{sampler:9} " + common.figures({k: row[k] for k in shown if k in row}))
    common.plot_quality(run.out / "quality.png", rows, real, "sampler")


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
