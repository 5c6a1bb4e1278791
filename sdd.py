"""Sparse distribution diffusion: every position is k weighted candidates, and they settle.

Method: the state of A. Holmes' "Sparse Distribution Diffusion" (github.com/aaholmes/diffusion-llm),
[(0.6, cat), (0.3, dog), (0.1, pet)], on a new forward process: evidence arrives about every token
and the candidates are the top of the exact posterior. The original (--process original) leaves the
answer among the candidates in training, but not in sampling: see notebook 05. A relative, with
embeddings in place of one-hot vectors: Wu et al. 2026, arXiv 2605.12836.

    python sdd.py                6 minutes, 2 CPU cores: <= 1.63 nats/token (entropy 0.91)
    python sdd.py sample --prompt "Once upon a time" --n 3 --trace         32 calls, see FAST
    python sdd.py sample --infill "Once upon a ___ there was ___"
    python sdd.py eval           bounds, the truth among the candidates, infilling, few-step samples
    python sdd.py --process original --out out/original                the leak: no likelihood

Equations. s_i >= 0 is the precision of what is known about position i; e_v the one-hot vector of v.
    (E1)  z_i = s_i e_x + sqrt(s_i) eps, V numbers: Brownian motion of drift e_x, x = x_0,i
    (E2)  theta_i = softmax(z_i) = P(x_i | z_i), exactly, every token alike before; s drops out
    (E3)  state_i: the k largest of theta_i as (token, log p), and the log of the mass of the rest;
          s = 0: k random tokens of 1/V each. With --state belief the k largest of softmax(net_i +
          z_i), net_i of an earlier call: candidates that suit the context
    (E4)  -log p(x_0) <= 1/2 sum_i int E |e_x - p_i|^2 ds_i for any path s_i(t) from 0 to infinity
          that is blind to x_0 and any p_i made of z; nothing to add: at s = 0 nothing is known
    (E5)  every position has its own time, t_i = clamp((t - tau_i) / w, 0, 1), s_i = s(t_i) falls
          from infinity to 0; w = 1: all alike; w -> 0: masked diffusion in random order
    (E6)  p_i = softmax(net_i + z_i): own evidence exactly, context from the network, which sees
          states only; --skip state adds log theta~_i, the state with its rest spread evenly
    (E7)  a step by a = s' - s: z' = z + a g + sqrt(a) xi; sampler token: g = e_v, v ~ p;
          ancestral: g = p; deterministic: z' = s' p + sqrt(s' / s) (z - s p)
    (E8)  what N steps cost: ancestral a / 2 E |e_x - p|^2; token E[d_x - ln sum_v p_v exp(d_v)],
          d = z' - z; where s' is clean, cross-entropy
    (E9)  evidence taken back, s' < s: z' = (s' / s) z + sqrt(s' (s - s') / s) xi
    (E10) guidance by given text c: out + w (out - out without c)

Shapes: B batch, T tokens, V vocabulary, K candidates, C width, H heads, D = C / H.
Units: nats. Every position of a row is charged, the EOS-filled tail too: nobody is told the length.

Differs from the original: the forward process, the bound, evidence, clocks; undecided positions
can take back what they said. Differs from ar.py: the input is a state, not a token; attention looks
both ways; the likelihood is a bound.
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

NAME, BOUND = "sdd", "upper"

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
    process: Literal["evidence", "original"] = "evidence"  # forward process; original: diagnosis
    k: int = 8  # candidates of a position (E3)
    curriculum: str = ""  # "1,2,4,8": training takes these k, one after the other, instead of --k
    state: Literal["evidence", "belief"] = "evidence"  # whose top k are the candidates (E3)
    attention: Literal["pooled", "full"] = "pooled"  # over positions, or over all candidates
    window: float = 0.1  # share of the path that a position needs from noise to token (E5)
    schedule: Literal["exponential", "rational"] = "exponential"  # precision and time
    loss: Literal["ce", "elbo"] = "ce"  # cross-entropy of what is not settled; the bound (E4)
    skip: Literal["evidence", "state", "none"] = "evidence"  # what is added to logits (E6)
    prefix: float = 0.0  # share of rows whose beginning, of random length, is clean in training
    swap: float = 0.95  # original: probability that noise swaps a candidate at t = 1; 0 = never
    sampler: Literal["token", "ancestral", "deterministic"] = "token"  # a step (E7)
    clock: Literal["random", "l2r", "maxprob", "revise"] = "random"  # which position goes next
    sampling_steps: int = 0  # steps; 0 = one for every token of a row
    guidance: float = 0.0  # classifier-free guidance by the given text (E10); 0 = off
    infill: str = ""  # "Once ___ a ___3 who": holes of one and three tokens, then the end
    judge: str = "out/ar"  # eval: the run of ar.py that judges samples
    eval_samplers: str = "token,ancestral,deterministic"  # eval: samplers to compare
    eval_seeds: int = 1  # eval: repetitions of every sampling setting
    # filled in from the data
    eos: int = -1  # end of document; also BOS where the tokenizer has no other
    bos: int = -1  # first input
    data_dir: str = ""  # where the prepared data are

    def __post_init__(self):  # what cannot work stops here, before any training
        known = ("token", "ancestral", "deterministic")
        for name in self.eval_samplers.split(","):
            if name not in known:
                raise ValueError(f"--eval-samplers knows {', '.join(known)}, not '{name}'")
        for size in filter(None, self.curriculum.split(",")):
            if not size.isdigit() or int(size) < 1:
                raise ValueError(f"--curriculum is like 1,2,4,8: '{size}' candidates cannot be")
        if not 0 < self.window <= 1:
            raise ValueError(f"--window is {self.window}, it must be more than 0 and at most 1")
        if self.state == "belief" and self.skip == "state":
            raise ValueError("candidates of --state belief suit the context and are no evidence: "
                             "--skip state would count it twice, use --skip evidence")
        if self.process == "original" and (self.prompt or self.infill or self.guidance):
            raise ValueError("--process original is a diagnosis and takes no --prompt, --infill or "
                             "--guidance")


PRESETS = dict(tiny={}, small=dict(n_layer=8, n_head=8, n_embd=512, seq_len=256, lr=2e-3),
               medium=dict(n_layer=12, n_head=12, n_embd=768, seq_len=512, lr=1e-3))
SHAPE = ("vocab_size", "seq_len", "n_layer", "n_head", "n_embd", "rows")  # fixed by a checkpoint
METHOD = ("process", "state", "attention", "skip", "swap")  # so are these
FAST = dict(clock="revise", sampler="deterministic", sampling_steps=32, temperature=0.2)
# FAST is how samples are drawn unless told otherwise: most valid tales in 32 calls, see LOG.md.
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


def attend(q, k, v, causal, bias=None):
    """Softmax attention: (B, H, Tq, D), (B, H, Tk, D) twice -> (B, H, Tq, D). Written out on CPUs,
    where PyTorch's fused kernel is 4x slower in bfloat16 (backward pass, 2.13). bias (B, Tk): log
    probabilities of the keys."""
    Tq, Tk = q.shape[2], k.shape[2]
    if q.is_cuda and Tq == Tk:
        mask = None if bias is None else bias[:, None, None].to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5  # (B, H, Tq, Tk)
    if bias is not None:
        scores = scores + bias[:, None, None]
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

    def forward(self, x, rope, causal, past=None, bias=None):
        """past: None, or this layer's [k, v], which is extended in place by the new positions."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q = rotate(F.rms_norm(q, q.shape[-1:]), rope)  # (B, H, T, D)
        k = rotate(F.rms_norm(k, k.shape[-1:]), rope)
        if past is not None:
            past[:] = k, v = [torch.cat(pair, 2) for pair in zip(past, (k, v))] if past else [k, v]
        y = attend(q, k, v, causal, bias)
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

    def forward(self, x, rope, causal, past=None, bias=None):
        x = x + self.attn(self.norm1(x), rope, causal, past, bias)
        return x + self.mlp(self.norm2(x))


CAP = 10.0  # largest logit of the network, either sign: context alone gives odds up to e^20


class Model(nn.Module):
    """Bidirectional transformer over sparse states: candidates ids (B, T, K), logp (B, T, K + 1),
    their log-probabilities and, last, that of all other tokens -> net (B, T, V), what context says
    of each position, see (E6); for a boolean `where` (B, T) only of the n positions it names,
    (n, V). A settled position has logp 0 at its first candidate, one of which nothing is known at
    the rest: the k random candidates that (E3) gives it weigh k / V together and are not shown. K
    may change at any time. `blur` (B, T, K, C) is added to the candidates' embeddings."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.head_width = cfg.n_head, cfg.n_embd // cfg.n_head
        self.vocab_size, self.full = cfg.vocab_size, cfg.attention == "full"
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.logp_in = nn.Linear(1, 64)
        self.logp_head = nn.Linear(64, cfg.n_embd, bias=False)
        self.wpe = nn.Embedding(cfg.seq_len, cfg.n_embd)
        self.near = nn.Conv1d(cfg.n_embd, cfg.n_embd, 7, padding=3, groups=cfg.n_embd, bias=False)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        if self.full:
            self.read = nn.Linear(cfg.n_embd, 1, bias=False)
        self.norm = nn.RMSNorm(cfg.n_embd)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size)
        init_weights(self)

    def embed(self, ids, logp, open, blur):
        """One vector a position, (B, T, C), and the slots of the n `open` ones, (n, K + 1, C):
        every candidate's embedding and a function of its log p; last the rest, which has no
        embedding. A position's vector is the mean of its slots under p."""
        settled = logp[..., 0] == 0
        x = torch.zeros(*settled.shape, self.wpe.embedding_dim, device=ids.device)
        x[settled] = self.wte(ids[settled][:, 0])
        logp = logp[open]  # (n, K + 1)
        emb = self.wte(ids[open]) + (0.0 if blur is None else blur[open])
        slots = F.pad(emb, (0, 0, 0, 1))
        slots = slots + self.logp_head(F.gelu(self.logp_in(logp.clamp(min=-20)[..., None] / 10)))
        x[open] = (logp.exp()[:, None] @ slots)[:, 0].to(x.dtype)  # sum_j p_j e_j
        return x, slots

    def forward(self, ids, logp, where=None, blur=None):
        open = (logp[..., 0] < 0) & (logp[..., -1] < 0)  # neither settled nor unknown
        x, slots = self.embed(ids, logp, open, blur)
        place = self.wpe.weight[:x.shape[1]]
        near = self.near((x + place).transpose(1, 2)).transpose(1, 2)  # 3 neighbours on each side
        place = place + near  # (B, T, C)
        rope, bias = rotary(torch.arange(x.shape[1], device=x.device), self.head_width), None
        x = x + place
        if self.full:
            x, rope, bias, mine = self.unfold(x, place, slots, logp, open, rope)
        for block in self.blocks:
            x = block(x, rope, False, None, bias)
        if self.full:
            x = self.fold(x, logp, open, mine)
        x = self.norm(x)
        out = self.head(x if where is None else x[where]).float()
        out = CAP * (out / CAP).tanh()  # no context outweighs what is measured for certain
        return out

    def unfold(self, x, place, slots, logp, open, rope):
        """The sequence of all slots: T positions, those that are open hold their rest, then the K
        candidates of up to A open positions of each row, (B, T + A K, C); rope, key bias log p and,
        (n,), which of the A places each open position has."""
        (B, T, C), K = x.shape, slots.shape[1] - 1
        mine, row = (open.cumsum(1) - 1)[open], open.nonzero()[:, 0]
        A = int(open.sum(1).max())
        bias = torch.where(open, logp[..., -1], 0.0)
        x = x.masked_scatter(open[..., None], (slots[:, -1] + place[open]).to(x.dtype))
        cand = x.new_zeros(B, A, K, C).index_put((row, mine), (
            slots[:, :-1] + place[open][:, None]).to(x.dtype))
        weight = bias.new_full((B, A, K), -torch.inf).index_put((row, mine), logp[open][:, :-1])
        at = mine.new_zeros(B, A).index_put((row, mine), open.nonzero()[:, 1])
        at = torch.cat((torch.arange(T, device=at.device).expand(B, T),
                        at.repeat_interleave(K, 1)), 1)  # (B, T + A K)
        rope = [part[at][:, None] for part in rope]  # (B, 1, T + A K, D / 2)
        return (torch.cat((x, cand.flatten(1, 2)), 1), rope,
                torch.cat((bias, weight.flatten(1)), 1), mine)

    def fold(self, x, logp, open, mine):
        """Back to positions: an open one is the mean of its slots under learned weights times p."""
        B, T = open.shape
        h, cand = x[:, :T], x[:, T:].unflatten(1, (-1, logp.shape[2] - 1))
        h_open = torch.cat((cand[open.nonzero()[:, 0], mine], h[open][:, None]), 1)  # (n, K + 1, C)
        p = (self.read(h_open)[..., 0].float() + logp[open]).softmax(1)
        return h.masked_scatter(open[..., None], (p[:, None] @ h_open)[:, 0].to(h.dtype))


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

SURE = 200.0  # s of a clean position: that the largest z is another token's has odds of 1e-18
SCHEDULES = {  # name: s / (2 ln V) at own time t, from infinity to 0, and -d/dt of it; a token by
    "exponential": (lambda t: -t.log(), lambda t: 1 / t),  # itself is lost near s = 2 ln V
    "rational": (lambda t: 1 / t - 1, lambda t: 1 / t ** 2),
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


def levels(t, tau, cfg):
    """Times t (B, 1), clocks tau (B, T) -> each position's precision s, SURE for a clean one, 0
    where nothing is known, and -ds / dt, 0 for these two: (B, T) each."""
    own = ((t - tau) / cfg.window).clamp(0, 1).double()  # (E5)
    curve, slope = SCHEDULES[cfg.schedule]
    unit = max(8.0, 2 * math.log(cfg.vocab_size))  # errors fade like exp(-s / 4), slopes must not
    s = (unit * curve(own)).clamp(0, SURE)
    slope = torch.where((s > 0) & (s < SURE), unit * slope(own), 0.0)
    return s.float(), slope / cfg.window


def evidence(x0, s, eps):
    """What is measured of tokens x0 (n,) with precision s (n,): z (n, V), eps (n, V) its noise."""
    z = s.sqrt()[:, None] * eps
    return z.scatter_add(1, x0[:, None], s[:, None])  # (E1)


def sparse(z, k, g=None):
    """Evidence z (n, V) -> candidates ids (n, K), K = min(k, V), and logp (n, K + 1): theirs,
    falling, and that of all other tokens. Rows of nothing but ties, s = 0, get random candidates;
    topk would always return the same ones."""
    logp = z.float().log_softmax(1)  # (E2)
    flat = z.amax(1) == z.amin(1)
    if flat.any():
        z = z.clone()
        z[flat] = torch.rand(int(flat.sum()), z.shape[1], generator=g).to(z)
    ids = z.topk(min(k, z.shape[1])).indices
    rest = logp.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return ids, torch.cat((logp.gather(1, ids), rest), 1)  # (E3)


def own_evidence(ids, logp, z, V, skip):
    """What is added to the network's answer, (n, V), from the candidates ids (n, K), logp
    (n, K + 1) and the evidence z (n, V) of its positions: all evidence, z itself; or only what the
    candidates tell, their rest spread evenly, -80 for what is ruled out."""
    if skip == "evidence":
        return z
    own = torch.zeros_like(z)
    if skip == "state":
        logp = logp.clamp(min=-80)
        other = logp[:, -1:] - math.log(max(1, V - ids.shape[1]))
        own.scatter_(1, ids, logp[:, :-1] - other)
    return own


def states(x, s, z, k, V):
    """The network's input: tokens x (B, T), which count where s (B, T) is clean, and evidence z
    (n, V) of the n positions in between -> ids (B, T, K), logp (B, T, K + 1)."""
    K, clean, between = min(k, V), s >= SURE, (s > 0) & (s < SURE)
    ids = F.pad(x.masked_fill(~clean, 0)[..., None], (0, K - 1))
    logp = torch.full((*s.shape, K + 1), -torch.inf, device=s.device)
    logp[..., 0].masked_fill_(clean, 0.0)
    logp[..., -1].masked_fill_(s == 0, 0.0)
    if between.any():
        ids[between], logp[between] = sparse(z, k)
    return ids, logp


def observe(x0, s, V, g, rows=slice(None)):
    """Evidence z (n, V) of the n positions of `rows` of x0 (B, T) whose precision s (B, T) is
    between 0 and SURE; the noise is drawn for all rows."""
    between, mine = (s > 0) & (s < SURE), torch.zeros(s.shape, dtype=torch.bool)
    mine[rows] = True
    eps = torch.randn(int(between.sum()), V, generator=g)[mine[between]].to(x0.device)
    between = (between & mine).to(x0.device)
    return evidence(x0[between], s.to(x0.device)[between], eps)


def predict(model, x, s, z, where, cfg, hide=None, past=None):
    """What the model believes: x and s (B, T), z (n, V) as in states -> logits (m, V) of the m
    unsettled positions `where` (B, T), and the part of them that is own evidence, (m, V). The
    boolean `hide` (B, T) names positions that are shown as unknown. `past` (n, V): what the network
    said of the same n positions in an earlier call, for --state belief, which else makes one: it
    learns to use its first answer without being trained through it."""
    V, between = cfg.vocab_size, (s > 0) & (s < SURE)
    ids, logp = states(x, s, z, cfg.k, V)
    if cfg.state == "belief" and between.any():
        if past is None:
            with torch.no_grad():
                past = model(ids, logp, between)
        ids[between], logp[between] = sparse(past + z, cfg.k)  # (E3)
    shown = logp
    if hide is not None:
        nothing = torch.full_like(logp, -torch.inf)
        nothing[..., -1] = 0.0
        shown = torch.where(hide[..., None], nothing, logp)
    net = model(ids, shown, where)
    own = torch.zeros_like(net)
    both = where & between
    own[between[where]] = own_evidence(ids[both], logp[both], z[where[between]], V, cfg.skip)
    return net + own, own  # (E6)


def distance(logits, x0):
    """|e_x - p|^2 of p = softmax(logits) (n, V) and tokens x0 (n,): (n,), float64."""
    p = logits.double().softmax(1)
    return p.scatter_add(1, x0[:, None], -torch.ones_like(p[:, :1])).square().sum(1)


def original(x0, t, cfg, g, rows=slice(None)):
    """The original's training state of tokens x0 (B, T) at times t (B, 1): ids, logp and blur, see
    Model. The truth comes first, then k - 1 random tokens of 0.01 each; probabilities are flattened
    towards 1 / V; cfg.swap is the probability, times t, that a candidate is replaced by a random
    one (an earlier version: 0.95 t; the last: never); embeddings get noise of a tenth of t."""
    (B, T), k, V = x0.shape, cfg.k, cfg.vocab_size
    ids = torch.cat((x0[..., None].cpu(), torch.randint(V, (B, T, k - 1), generator=g)), 2)
    other = torch.randint(V, (B, T, k), generator=g)
    ids = torch.where(torch.rand(B, T, k, generator=g) < cfg.swap * t[..., None], other, ids)
    p = torch.full((k,), 0.01).index_fill(0, torch.tensor(0), 1 - 0.01 * (k - 1))
    p = (1 - t)[..., None] * p + t[..., None] / V  # (B, 1, K)
    rest = (1 - p.sum(2, keepdim=True)).clamp(min=1e-9)
    logp = torch.cat((p, rest), 2).log().expand(B, T, k + 1)
    blur = 0.1 * t[..., None, None] * torch.randn(B, T, k, cfg.n_embd, generator=g)
    return [y[rows].to(x0.device) for y in (ids, logp, blur)]


def loss_fn(model, x0, cfg, g, rows=slice(None)):
    """Training loss of the batch x0 (B, T), a scalar to differentiate, and info. The noise is drawn
    for the whole batch; then only `rows` of it are worked on, so that the mean over equal shares is
    the batch's loss. cfg.loss: ce, cross-entropy of the unsettled positions, each row averaged
    first; elbo, the bound (E4) per token. The original process: cross-entropy of all positions."""
    (B, T), device = x0.shape, x0.device
    # 1. draw t evenly over the batch, clocks
    t = ((torch.arange(B) + torch.rand(1, generator=g)) / B)[:, None]
    if cfg.process == "original":
        ids, logp, blur = original(x0, t, cfg, g, rows)
        logits = model(ids, logp, None, blur * model.wte.weight.detach().std())
        return F.cross_entropy(logits.transpose(1, 2), x0[rows]), {}
    begin = (torch.rand(B, 1, generator=g) < cfg.prefix) * torch.rand(B, 1, generator=g)
    frozen = torch.arange(T) < (T * begin).floor()  # (B, T)
    s, slope = levels(t, clocks(x0.shape, cfg, g, frozen), cfg)
    # 2. corrupt
    z = observe(x0, s, cfg.vocab_size, g, rows)  # (number between, V)
    n = (s < SURE).sum(1).to(device)  # unsettled positions of each row
    x0, s, slope = (y[rows].to(device) for y in (x0, s, slope))
    # 3. predict
    todo = s < SURE if cfg.loss == "ce" else slope > 0
    logits, _ = predict(model, x0, s, z, todo, cfg)  # (number unsettled, V)
    # 4. weigh
    cost = torch.zeros(x0.shape, device=device)
    if cfg.loss == "ce":
        cost[todo] = F.cross_entropy(logits, x0[todo], reduction="none")
        loss = (cost.sum(1) / n[rows].clamp(min=1)).sum() / (n > 0).sum().clamp(min=1)
    else:
        cost[todo] = (0.5 * slope[todo] * distance(logits, x0[todo])).float()  # (E4)
        loss = cost.sum() / (B * T)
    return loss * (B / len(x0)), dict(unsettled=n.float().mean().item())


@torch.no_grad()
def nelbo(model, x0, cfg, g, draws=8, frozen=None):
    """Upper bound (E4) on -log p(x0) in nats per row, (B,), unbiased, and info: what it is made of,
    precision s and nats per unit of it, one of each for every position and time that counted.
    `draws` times on a comb with one random offset per row. The boolean `frozen` (B, T) names tokens
    that are given: the bound is then on -log p(others | given)."""
    if cfg.process == "original":
        raise ValueError("the original process has no likelihood: its states hold the answer")
    (B, T), device = x0.shape, x0.device
    frozen = torch.zeros(B, T, dtype=torch.bool) if frozen is None else frozen.cpu()
    tau, u = clocks(x0.shape, cfg, g, frozen), torch.rand(B, 1, generator=g)
    first = tau.amin(1, keepdim=True).clamp(max=1)  # outside of first..last nothing happens
    last = tau.masked_fill(frozen, -cfg.window).amax(1, keepdim=True) + cfg.window
    total, where, cost = torch.zeros(B).double(), [], []
    for k in range(draws):
        s, slope = levels(first + (last - first) * (k + u) / draws, tau, cfg)
        for i in torch.arange(B).split(64):
            todo = (slope[i] > 0).to(device)
            z = observe(x0[i], s[i], cfg.vocab_size, g)
            logits, _ = predict(model, x0[i], s[i].to(device), z, todo, cfg)
            nats = torch.zeros(todo.shape, dtype=torch.float64, device=device)
            nats[todo] = 0.5 * distance(logits, x0[i][todo])
            total[i] += ((last - first)[i] / draws * slope[i] * nats.cpu()).sum(1)  # (E4)
            where.append(s[i][todo.cpu()])
            cost.append(nats[todo].cpu())
    return total, dict(forwards=draws, s=torch.cat(where), cost=torch.cat(cost))


@torch.no_grad()
def nelbo_steps(model, x0, cfg, g, steps, mixture=True):
    """Upper bound (E8) on -log p of a sampler of `steps` steps, unbiased: (B,) nats per row.
    mixture: sampler token; else ancestral."""
    tau = clocks(x0.shape, cfg, g)
    total = torch.zeros(len(x0)).double()
    for k in range(steps, 0, -1):
        s, then = (levels(torch.full((1, 1), t / steps), tau, cfg)[0] for t in (k, k - 1))
        todo, last = then > s, then >= SURE
        if not todo.any():
            continue
        z = observe(x0, s, cfg.vocab_size, g)
        s, then, todo = (y.to(x0.device) for y in (s, then, todo))
        logits, _ = predict(model, x0, s, z, todo, cfg)
        true, a, last = x0[todo], (then - s)[todo], last[todo.to(last.device)].to(x0.device)
        nats = F.cross_entropy(logits.double(), true, reduction="none")
        if mixture:
            d = evidence(true, a, torch.randn(logits.shape, generator=g).to(a)).double()
            right = d.gather(1, true[:, None])[:, 0]
            step = right - (logits.double().log_softmax(1) + d).logsumexp(1)  # (E8)
        else:
            step = 0.5 * a * distance(logits, true)  # (E8)
        cost = torch.zeros(x0.shape, dtype=torch.float64, device=x0.device)
        cost[todo] = torch.where(last, nats, step)
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


def move(z, s, then, goal, xi, sampler):
    """Evidence z (n, V) of precision s (n,) brought to precision `then` (n,): up, towards `goal`
    (n, V), or down, back to what a shorter measurement would have shown. xi (n, V): noise."""
    a = (then - s)[:, None]
    s, then = s[:, None], then[:, None]
    if sampler == "deterministic":  # from nothing, as far as one noise carries
        spread = torch.where(s > 0, (then / s).sqrt() * (z - s * goal), then.sqrt() * xi)
        up = then * goal + spread  # (E7)
    else:
        up = z + a * goal + a.clamp(min=0).sqrt() * xi  # (E7)
    back = then / s
    down = back * z + (back * (s - then)).clamp(min=0).sqrt() * xi  # (E9)
    return torch.where(a >= 0, up, down)


@torch.no_grad()
def sample(model, cfg, n, g, prompt=None, trace=None, start=None):
    """n rows of T = seq_len ids, (n, T), and info (nfe = network calls). `prompt` (P,) ids begin
    every row; or `start` (n, T) holds id V where tokens are wanted, and all else is kept. `trace`,
    a list, receives (call, ids, s, candidates, logp): ids are V where no token has half of the
    probability; the others are what the network was shown."""
    if cfg.process == "original":
        return sample_original(model, cfg, n, g, trace)
    device, V, nfe = next(model.parameters()).device, cfg.vocab_size, 0
    # 1. what is given
    x = torch.full((n, cfg.seq_len), V, device=device) if start is None else start.clone()
    if prompt is not None:
        if len(prompt) > x.shape[1]:
            raise ValueError(f"a prompt of {len(prompt)} ids in a row of {x.shape[1]}")
        x[:, :len(prompt)] = prompt
    given = x != V
    # 2. no evidence yet; clocks by which what is given is clean from the beginning
    z, conf = torch.zeros(*x.shape, V, device=device), torch.zeros(x.shape, device=device)
    net = torch.zeros_like(z) if cfg.state == "belief" else None  # the last call's
    tau = clocks(x.shape, cfg, g, given.cpu()).to(device)
    s = torch.where(given, SURE, 0.0)
    if cfg.clock == "l2r":
        column = torch.arange(x.shape[1], device=device, dtype=torch.float)
        tau = deal(tau, ~given, -column.expand_as(tau))
    steps = cfg.sampling_steps or x.shape[1]
    for k in range(steps, 0, -1):
        then = levels(torch.full((1, 1), (k - 1) / steps, device=device), tau, cfg)[0]
        # 3. ask the network, where its answer is needed
        todo = s < SURE if cfg.clock in ("maxprob", "revise") else then > s
        if not todo.any():
            continue
        between = (s > 0) & (s < SURE)
        now, past = z[between], None if net is None else net[between]
        out, own = predict(model, x, s, now, todo, cfg, None, past)
        nfe += 1
        if net is not None:
            net[todo] = out - own
        if cfg.guidance and given.any():
            bare, _ = predict(model, x, s, now, todo, cfg, given, past)
            out = out + cfg.guidance * (out - bare)  # (E10)
            nfe += 1
        if trace is not None:
            trace.append(frame(nfe, x, s, now if past is None else now + past, cfg))
        # 4. the surest positions go on; clocks are dealt to those that wait, or to all anew: first
        #    what is not settled, then chance keeps settled ones, by exp(-p) of being started over
        if cfg.clock in ("maxprob", "revise"):
            conf[todo] = (out.amax(1) - out.logsumexp(1)).exp()
            score = conf
            if cfg.clock == "revise":
                gumbel = -(-torch.rand(x.shape, generator=g).to(device).log()).log()
                score = torch.where(s < SURE, 1000 + conf, conf - gumbel)
            tau = deal(tau, ~given if cfg.clock == "revise" else s == 0, score)
            then = levels(torch.full((1, 1), (k - 1) / steps, device=device), tau, cfg)[0]
            on = (then > s)[todo]
            out, own, todo = out[on], own[on], then > s
        # 5. one step up; what is clean becomes a token; what has to wait again gives evidence back
        logits = filter_logits(out + (cfg.temperature - 1) * own, cfg)  # for context alone
        last = then[todo] >= SURE
        tokens = logits.argmax(1) if cfg.sampler == "deterministic" else categorical(logits, g)
        goal = F.one_hot(tokens, V).to(z)
        if cfg.sampler != "token":
            goal = torch.where(last[:, None], goal, logits.softmax(1))
        conf[todo] = out.softmax(1).gather(1, tokens[:, None])[:, 0]
        x[todo] = tokens
        for part, aim in ((todo, goal), (then < s, 0.0)):
            if part.any():
                xi = torch.randn(int(part.sum()), V, generator=g).to(device)
                z[part] = move(z[part], s[part], then[part], aim, xi, cfg.sampler)
        s = then
    if trace is not None:
        trace.append(frame(nfe, x, s, z[:0, 0], cfg))
    return x, dict(nfe=nfe)


def frame(nfe, x, s, z, cfg):
    """What `trace` receives, see sample: x and s (n, T), z as in states."""
    ids, logp = states(x, s, z, cfg.k, cfg.vocab_size)
    unknown = s == 0
    if unknown.any():  # shown with the random candidates that (E3) gives it
        blank = torch.zeros(int(unknown.sum()), cfg.vocab_size, device=s.device)
        ids[unknown], logp[unknown] = sparse(blank, cfg.k, torch.Generator().manual_seed(0))
    seen = ids[..., 0].masked_fill(logp[..., 0] < math.log(0.5), cfg.vocab_size)
    return nfe, seen.cpu(), s.cpu(), ids.cpu(), logp.cpu()


def sample_original(model, cfg, n, g, trace=None):
    """The original's sampler, 25 steps unless told otherwise: k random candidates of 1 / V each; in
    every step the network's k likeliest tokens and their probabilities become the state, and
    nothing is noised again. The likeliest candidates are the text."""
    device, V, steps = next(model.parameters()).device, cfg.vocab_size, cfg.sampling_steps or 25
    ids = torch.randint(V, (n, cfg.seq_len, cfg.k), generator=g).to(device)
    logp = torch.full((n, cfg.seq_len, cfg.k + 1), -math.log(V), device=device)
    logp[..., -1] = math.log1p(-cfg.k / V)
    for k in range(steps + 1):
        if trace is not None:
            seen = ids[..., 0] if k == steps else ids[..., 0].masked_fill(
                logp[..., 0] < math.log(0.5), V)
            s = torch.full(ids.shape[:2], k / steps)
            trace.append((k, seen.cpu(), s, ids.cpu(), logp.cpu()))
        if k < steps:
            logits = model(ids, logp).flatten(0, 1) / max(cfg.temperature, 1e-6)
            ids, logp = (y.view(n, cfg.seq_len, -1) for y in sparse(logits, cfg.k))
    return ids[..., 0], dict(nfe=steps)


# ----------------------------------------------------------------------------------------------
# 6. train
# ----------------------------------------------------------------------------------------------


def get_lr(step, cfg):
    """Learning rate of a step: linear warm-up, then a cosine to zero."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    done = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * done))


def at_step(cfg, step):
    """The Config of a training step: with --curriculum, k takes its values one after the other,
    each for as many steps."""
    if not cfg.curriculum:
        return cfg
    sizes = cfg.curriculum.split(",")
    return dataclasses.replace(cfg, k=int(sizes[step * len(sizes) // cfg.steps]))


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
    if cfg.process == "original":
        return leak(model, cfg, split, n)
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


@torch.no_grad()
def leak(model, cfg, split="val", n=128, times=8):
    """What the original process reports, and why it means nothing: the accuracy of the network over
    all positions and noise levels, that of a copy baseline which returns the first candidate, and
    the share of positions whose truth is among the candidates. Plain numbers for the log."""
    x0, g = get_eval_rows(split, cfg, n)[0], torch.Generator().manual_seed(0)
    device, marks = next(model.parameters()).device, []
    for k in range(times):
        t = torch.full((len(x0), 1), (k + 0.5) / times)
        ids, logp, blur = original(x0.to(device), t, cfg, g)
        best = model(ids, logp, None, blur * model.wte.weight.std()).argmax(2)
        right = ids.cpu() == x0[..., None]
        marks.append([(best.cpu() == x0).double().mean(), right[..., 0].double().mean(),
                      right.any(2).double().mean()])
    marks = torch.tensor(marks)
    names = ("accuracy", "copy", "among")
    return dict(bound="none", rows=len(x0), **dict(zip(names, marks.mean(0).tolist())),
                **{f"{name}_at": marks[:, i].tolist() for i, name in enumerate(names)})


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
def candidates(model, cfg, x0, g, seeds=1):
    """Share of undecided positions whose truth is among their candidates, by precision s: rows of a
    log. In training the truth is that of x0 (B, T); in sampling it is what the position becomes."""
    rows = []
    seen, trace, V = [], [], cfg.vocab_size
    for t in (0.3, 0.5, 0.7):
        s, _ = levels(torch.full((1, 1), t), clocks(x0.shape, cfg, g), cfg)
        z = observe(x0, s, V, g)
        seen.append((states(x0, s.to(x0.device), z, cfg.k, V)[0].cpu(), s, x0.cpu()))
    x, _ = sample(model, cfg, len(x0), g, trace=trace)
    drawn = [(ids, s, x.cpu()) for _, _, s, ids, _ in trace[:-1]]
    for low, high in ((0, 2), (2, 4), (4, 6), (6, 8), (8, 12), (12, 16), (16, 24), (24, SURE)):
        row = dict(s_low=low, s_high=high)
        for name, frames in (("training", seen), ("sampling", drawn)):
            hits = torch.cat([(ids == x[..., None]).any(2)[(s > low) & (s <= high) & (s < SURE)]
                              for ids, s, x in frames])
            row |= {name: hits.double().mean().item() if len(hits) else None,
                    f"{name}_n": len(hits)}
        rows.append(row)
    return rows


@torch.no_grad()
def evaluate_all(run, model, cfg, n=64):
    """The eval command: the bound, the bounds of few steps, where tokens are lost, the truth among
    the candidates, accuracy, infilling, and samples of few steps, as rows of eval.jsonl and two
    figures. Accuracies and nats of holes are of positions inside documents; `unigram` is the
    accuracy of always saying the commonest token. Of the original process the leak and samples."""
    run.begin_eval()
    tokenizer, g = open_data(cfg.data_dir).tokenizer, torch.Generator().manual_seed(cfg.seed)
    # 1. the bound, and those of few steps
    row = evaluate(model, cfg, "test", 500)
    run.log("test", -1, **row)
    run.say(f"test, {row['rows']} rows: {common.report(row)}")
    x0 = get_eval_rows("test", cfg, 4 * n)[0].to(run.device)
    samplers = ["original"]
    if cfg.process == "evidence":
        samplers = cfg.eval_samplers.split(",")
        measure_bounds(run, model, cfg, x0, n, g)
    # 2. samples
    judge = common.load_judge(cfg.judge, tokenizer, run)
    real = common.measure(x0[:n], cfg, tokenizer, judge)  # as many: diversity depends on it
    run.log("real", -1, n=n, **real)
    run.say(f"test documents: {common.figures(real)}")
    rows = []
    for sampler in samplers:
        for steps in sorted({4, 8, 16, 32, 64, cfg.seq_len} & set(range(cfg.seq_len + 1))):
            for seed in range(cfg.eval_seeds):
                some = dataclasses.replace(cfg, sampling_steps=steps)
                if sampler != "original":
                    some.sampler = sampler
                clock = time.time()
                x, info = sample(model, some, n, torch.Generator().manual_seed(cfg.seed + seed))
                row = dict(sampler=sampler, sampling_steps=steps, seed=cfg.seed + seed, n=n, **info,
                           seconds=time.time() - clock, clock=cfg.clock,
                           temperature=cfg.temperature, top_p=cfg.top_p,
                           **common.measure(x, cfg, tokenizer, judge))
                run.log("samples", -1, **row)
                rows.append(row)
            shown = ("nfe", "valid", "known", "agree", "judge", "entropy", "seconds")
            run.say(f"{sampler:13} " + common.figures({k: row[k] for k in shown if k in row}))
    common.plot_quality(run.out / "quality.png", rows, real, "sampler")


def measure_bounds(run, model, cfg, x0, n, g):
    """The part of evaluate_all that only a method with a likelihood has."""
    # 1. bounds: more draws, and those of few steps
    bound, info = nelbo(model, x0, cfg, g, 32)
    row = dict(rows=len(x0), draws=32, nats_per_row=bound.mean().item(), se=common.se(bound))
    run.log("draws", -1, bound=BOUND, **row)
    run.say("with more draws: " + common.figures(row))
    for steps in (4, 8, 16, 32, 64, cfg.seq_len):
        for mixture in (True, False):
            bound = nelbo_steps(model, x0[:n], cfg, g, steps, mixture)
            row = dict(steps=steps, sampler="token" if mixture else "ancestral", bound=BOUND,
                       nats_per_row=bound.mean().item(), se=common.se(bound))
            run.log("steps", -1, **row)
            run.say("bound of a sampler: " + common.figures(row))
    # 2. where tokens are lost, and whether the truth is among the candidates there
    s = torch.linspace(0, 60, 41, device=run.device).repeat_interleave(n)
    some = torch.randint(cfg.vocab_size, s.shape, generator=g).to(run.device)
    z = evidence(some, s, torch.randn(len(s), cfg.vocab_size, generator=g).to(run.device))
    alone = F.cross_entropy(z, some, reduction="none").view(41, -1).mean(1)
    t = torch.linspace(0, 1, 201)[:, None]
    one = dataclasses.replace(cfg, window=1.0)
    curves = {name: levels(t, torch.zeros(1), dataclasses.replace(one, schedule=name))[0][:, 0]
              .clamp(max=60).tolist() for name in SCHEDULES}
    common.plot_noise(run.out / "noise.png", s.view(41, -1)[:, 0].tolist(), alone.tolist(),
                      dict(lam=info["s"], cost=info["cost"]), curves, cfg,
                      axis="precision s of a position")
    for row in candidates(model, dataclasses.replace(cfg, guidance=0.0), x0[:n], g):
        run.log("among", -1, **row)
        run.say("truth among the candidates: " + common.figures(row))
    # 3. accuracy where this share of the path is still ahead
    hidden = holes(x0, cfg, g)
    inside = hidden.pop("document")
    common_token = x0[inside].bincount().argmax()
    for t in (0.15, 0.5, 0.85, 1.0):
        s = levels(torch.full((1, 1), t), clocks(x0.shape, cfg, g), cfg)[0]
        s = s.to(run.device)
        todo, right = (s < SURE) & inside, []
        for i in torch.arange(len(x0)).split(64):
            z = observe(x0[i], s[i].cpu(), cfg.vocab_size, g)
            logits, _ = predict(model, x0[i], s[i], z, todo[i], cfg)
            right.append(logits.argmax(1) == x0[i][todo[i]])
        row = dict(t=t, accuracy=torch.cat(right).float().mean().item(),
                   unigram=(x0[todo] == common_token).float().mean().item())
        run.log("accuracy", -1, **row)
        run.say("accuracy of unsettled positions: " + common.figures(row))
    # 4. infilling, the surest position first
    greedy = dataclasses.replace(cfg, sampling_steps=0, guidance=0.0, temperature=0.5,
                                 clock="maxprob", sampler="token")
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
                    rows = slice(i * share, (i + 1) * share)
                    loss, info = loss_fn(model, x0, at_step(cfg, step), g, rows)
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
