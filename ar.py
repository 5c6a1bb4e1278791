"""Autoregressive language model: predict each token from the ones before it. The exact baseline.

Method: Bengio et al. 2003 (section 2); the trunk is a GPT (Radford et al. 2019) with today's parts.

    python ar.py                    5 minutes, 2 CPU cores: = 0.95 nats/token (entropy 0.91)
    python ar.py sample --prompt "Once upon a time" --n 3 --temperature 0.8
    python ar.py eval               test likelihood and graded samples of the checkpoint

Equations
    (E1)  log p(x) = sum_i log p(x_i | x_<i)                   chain rule: exact, nothing is bounded
    (E2)  p(. | x_<i) = softmax(logits_i),  logits = Model([BOS, x_1 ... x_{T-1}])
    (E3)  loss = - sum_i log p(x_i | x_<i) / number of charged tokens
    (E4)  sample x_i ~ p(. | x_<i) from left to right, keys and values of the past kept
    (E5)  p(x_i | all others) = p(x with x_i) / sum_v p(x with v at i)      infilling by Bayes' rule

Shapes: B batch, T tokens, V vocabulary, C width, H heads, D = C / H head width.
Units: nats. A document is charged for its tokens and its EOS; BOS is an input, never charged. With
rows = docs the EOS-filled tail of a row costs nothing: after the first EOS the next one is certain.

Differs from GPT-2: RMSNorm, rotary positions, normalised queries and keys, no biases, residual
outputs and head start at zero (so the first loss is exactly ln V), Muon for the hidden matrices.
What to compare: `diff ar.py mdlm.py` shows masked diffusion and nothing else.
"""
import copy
import dataclasses
import functools
import math
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import UserError
from data.prepare import load_tokenizer, open_split, prepare, verify

NAME, BOUND = "ar", "exact"

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
    repetition_penalty: float = 1.0  # divides the logits of tokens already in the row
    # filled in from the data
    eos: int = -1  # end of document; also BOS where the tokenizer has no other
    bos: int = -1  # first input
    data_dir: str = ""  # where the prepared data are


PRESETS = dict(tiny={}, small=dict(n_layer=8, n_head=8, n_embd=512, seq_len=256, lr=2e-3),
               medium=dict(n_layer=12, n_head=12, n_embd=768, seq_len=512, lr=1e-3))
SHAPE = ("vocab_size", "seq_len", "n_layer", "n_head", "n_embd", "rows")  # fixed by a checkpoint

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

    def forward(self, x, rope, causal, past=None):
        x = x + self.attn(self.norm1(x), rope, causal, past)
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Causal transformer: ids (B, T) -> logits (B, T, V), or (len(where), V) for `where`, a boolean
    (B, T) that names the positions whose logits are wanted (the head is the largest matrix)."""

    def __init__(self, cfg):
        super().__init__()
        self.head_width = cfg.n_embd // cfg.n_head
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        init_weights(self)

    def forward(self, idx, where=None, past=None):
        """past: None, or a list of n_layer lists for generation (empty at first): see Attention."""
        start = past[0][0].shape[2] if past and past[0] else 0
        rope = rotary(torch.arange(start, start + idx.shape[1], device=idx.device), self.head_width)
        x = self.wte(idx)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, True, past[i] if past is not None else None)
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
# Nothing is corrupted here: the inputs are the clean tokens, shifted by one.


def charged(x0, cfg):
    """Which positions cost something: up to and including the first EOS of a document row (the
    tail is certain), every position of a window.  # (B, T) bool"""
    if cfg.rows != "docs":
        return torch.ones_like(x0, dtype=torch.bool)
    is_eos = x0 == cfg.eos
    return is_eos.cumsum(1) - is_eos.long() == 0


def token_nll(model, x0, cfg):
    """-log p(x_i | x_<i) at the charged positions, zero elsewhere: (B, T) nats, exact."""
    # 1. shift: BOS first, the last token is never an input
    inputs = torch.cat((torch.full_like(x0[:, :1], cfg.bos), x0[:, :-1]), 1)  # (B, T)
    # 2. predict, at the charged positions only
    where = charged(x0, cfg)
    logits = model(inputs, where).float()  # (number charged, V)  (E2)
    # 3. charge
    nll = torch.zeros(x0.shape, device=x0.device)
    nll[where] = F.cross_entropy(logits, x0[where], reduction="none")
    return nll  # (B, T)  (E1)


def loss_fn(model, x0, cfg, g, rows=slice(None)):
    """Mean nats per charged token of the batch x0 (B, T), a scalar to differentiate, and info. Only
    `rows` of the batch are worked on, weighted so that the mean over equal shares is its loss."""
    n, share = charged(x0, cfg).sum(), x0[rows]
    # 1. short and long rows apart, each half without the tail that is certain
    length = charged(share, cfg).sum(1)
    groups = length.argsort().chunk(2)
    # 2. predict and charge; 3. average
    total = sum(token_nll(model, share[i, :length[i].max()], cfg).sum() for i in groups)
    loss = total / n * (len(x0) / len(share))  # (E3)
    return loss, dict(loss=loss.detach())


def nll(model, x0, cfg, g=None):
    """Exact negative log-likelihood in nats per row of x0 (B, T): ((B,), info)."""
    with torch.no_grad():
        parts = [token_nll(model, part, cfg).cpu().double().sum(1) for part in x0.split(64)]
    return torch.cat(parts), dict(forwards=1)


nelbo = nll  # the name the diffusion scripts give their bound; here it is tight

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


@torch.no_grad()
def sample(model, cfg, n, g, prompt=None, trace=None, cached=True):
    """n rows of T = seq_len ids, left to right, (n, T), and info (nfe = network calls). `prompt`
    (P,) or (n, P) ids begin every row. `trace`, a list, receives (step, ids); unwritten = -1."""
    device = next(model.parameters()).device
    # 1. start from BOS and the prompt
    x = torch.full((n, cfg.seq_len), cfg.eos, device=device)
    P = 0
    if prompt is not None and prompt.numel():
        P = prompt.shape[-1]
        if P >= cfg.seq_len:
            raise ValueError(f"the prompt has {P} tokens, a row has room for {cfg.seq_len - 1}")
        x[:, :P] = prompt
    inputs = torch.cat((torch.full_like(x[:, :1], cfg.bos), x), 1)  # (n, 1 + T)
    past = [[] for _ in model.blocks] if cached else None
    ended = torch.zeros(n, dtype=torch.bool, device=device)
    for i in range(P, cfg.seq_len):
        # 2. predict from the new tokens (cached) or from all of them
        new = inputs[:, i if cached and i > P else 0:i + 1]
        logits = model(new, past=past)[:, -1]  # (n, V)
        # 3. draw the next token; a row that has ended only repeats EOS
        if cfg.repetition_penalty != 1:
            seen = torch.zeros_like(logits).scatter(1, x[:, :i], 1.0).bool()
            penal = torch.where(logits > 0, logits / cfg.repetition_penalty,
                                logits * cfg.repetition_penalty)
            logits = torch.where(seen, penal, logits)
        x[:, i] = categorical(filter_logits(logits, cfg), g).masked_fill(ended, cfg.eos)  # (E4)
        inputs[:, i + 1] = x[:, i]
        ended |= (x[:, i] == cfg.eos) & (cfg.rows == "docs")
        if trace is not None:
            shown = x.clone()
            shown[~ended, i + 1:] = -1
            trace.append((i + 1, shown.cpu()))
        if ended.all():
            break
    return x, dict(nfe=i + 1 - P)


@torch.no_grad()
def infill_left(model, x0, i, cfg):
    """log p(x_i | x_<i) over the vocabulary: what a left-to-right model knows of a gap at position
    i of x0 (B, T) without looking right.  # (B, V)"""
    inputs = torch.cat((torch.full_like(x0[:, :1], cfg.bos), x0[:, :i]), 1)
    return model(inputs)[:, -1].float().log_softmax(1)


@torch.no_grad()
def infill_exact(model, x0, i, cfg, chunk=256):
    """log p(x_i | all other tokens) of one row x0 (T,) by Bayes' rule over the V fillings of
    position i: the fair one-token infilling of a left-to-right model, at V forwards.  # (V,)"""
    V = cfg.vocab_size
    rows = x0.repeat(V, 1)
    rows[:, i] = torch.arange(V, device=x0.device)
    cost = [token_nll(model, part, cfg).cpu().double().sum(1) for part in rows.split(chunk)]
    logp = -torch.cat(cost)
    after_end = (~charged(rows, cfg) & (rows != cfg.eos)).any(1).cpu()  # words after EOS: never
    return logp.masked_fill(after_end, -torch.inf).log_softmax(0)  # (E5)


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
    trace, clock = [], time.time()
    with run.amp:
        x, info = sample(model, cfg, n, torch.Generator().manual_seed(cfg.seed), trace=trace)
    common.show_samples(run, cfg, open_data(cfg.data_dir).tokenizer, step, x, trace, info,
                        time.time() - clock)


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
    cfg = common.parse(Config, PRESETS, argv, __doc__, default=stored)
    if command == "train":
        return train(cfg) and None
    common.check_same(cfg, stored, SHAPE, f"the checkpoint in {out}")
    with common.Run(cfg, out, training=False) as run:
        model, tokenizer = Model(cfg).to(run.device), load_tokenizer(out)
        common.load_weights(model, out)
        if command == "eval":
            fill_in(cfg)
            common.check_tokenizer(out, open_data(cfg.data_dir).tokenizer)
            with run.amp:
                row = evaluate(model, cfg, "test", 500)
            run.log("test", -1, **row)
            run.say(f"test, {row['rows']} rows: {common.report(row)}")
            return grade(run, model, cfg, -1)
        prompt = common.encode_prompt(tokenizer, cfg).to(run.device)
        trace, g = [] if cfg.trace else None, torch.Generator().manual_seed(cfg.seed)
        with run.amp:
            x, info = sample(model, cfg, cfg.n, g, prompt, trace)
        common.show_samples(run, cfg, tokenizer, -1, x, trace, info)


if __name__ == "__main__":
    common.run_main(main)
