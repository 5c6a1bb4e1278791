"""Masked diffusion language model: mask tokens, learn to denoise, sample by unmasking.

Method: MDLM (Sahoo et al. 2024, arXiv 2406.07524), MD4 (Shi et al. 2024), LLaDA (Nie et al. 2025);
remasking: ReMDM (Wang et al. 2025).

    python mdlm.py              4 to 8 minutes, 2 CPU cores: val <= 1.40 nats/token (entropy 0.91)
    python mdlm.py sample --prompt "Once upon a time" --num-samples 3 --trace
    python mdlm.py sample --infill "Once upon a ___ there was ___"
    python mdlm.py eval         the bound on 500 test rows, samples

Equations. M is the mask; the schedule gamma(t) = 1 - alpha(t) is the mask rate, 0 at t = 0 and 1 at
t = 1. The network sees x_t, not t. SUBS: it never predicts M, and unmasked tokens are carried over.
    (E1)  absorbing forward process: each x_t,i is M with probability gamma(t), else x_0,i
    (E2)  c_i = -log p(x_0,i | x_t) for masked i: a softmax over the V real tokens, never M
    (E3)  NELBO = int_0^1 gamma'(t)/gamma(t) E sum_masked c_i dt >= -log p(x_0)
    (E4)        = sum_{n=1..T} 1/n E_{n masks} sum_masked c_i: the same for every schedule gamma
    (E5)  reverse t -> s: a mask becomes a draw from p(. | x_t) with probability
          (gamma_t - gamma_s) / gamma_t
    (E6)  remasking: tokens become M again with probability sigma, and masks become tokens with
          (gamma_t - gamma_s + sigma (1 - gamma_t)) / gamma_t, so that P(x_s,i = M) is gamma_s still

Shapes: B rows, T tokens, V vocabulary, C width, H heads, D = C / H. Units: nats. Every position is
scored, also the EOS that fill a row (val: nats / tokens up to the first EOS). g draws all noise.

Differs from the paper: training draws the number of masks n and not t; runs of less than 4000 steps
draw n with P(n) nearly proportional to n; their loss is no bound (nelbo is). Sampling draws the
length, then fixed numbers of tokens at temperature 0.5 and remasks: the most confident masks become
tokens in the first half of the steps, all masks in the second. Differs from ar.py: not causal.
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
    out: str = "out/mdlm"  # run folder
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
    # sampling; the bound is of: order random, num_steps 0, temperature 1, no remask or length_first
    num_samples: int = 4  # of sample and eval; training draws 64 and prints two
    prompt: str = ""  # text that every sample begins with
    infill: str = ""  # "A ___ and ___3.": fill one token and three; ___ at the end: the rest
    trace: bool = False  # print the trajectory of the first sample
    num_steps: int = 32  # denoising steps, 0: as many as masks; the length costs one NFE more
    order: Literal["random", "l2r", "maxprob", "margin", "entropy"] = "maxprob"  # unmasked first
    remask: Literal["none", "random", "conf"] = "conf"  # (E6); conf: improbable ones more often
    length_first: bool = True  # rows docs: draw the length first, then tokens without EOS
    temperature: float = 0.5  # below 1: safer, less varied; 0: the most likely token
    top_k: int = 0  # keep the k most likely tokens; 0 = all
    top_p: float = 1.0  # keep the most likely tokens that hold this much probability
    # set by the data
    eos: int = 0  # end of document


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
    """Bidirectional transformer: ids (B, T) in 0..V, where V is the mask M -> logits (B, T, V), or
    (n, V) at the n positions `is_target`, boolean (B, T) or indices. Not conditioned on t."""

    def __init__(self, cfg):
        super().__init__()
        self.wte = nn.Embedding(cfg.vocab_size + 1, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.seq_len, cfg.n_embd)  # rotary alone: all masks look the same
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "head.weight")):  # so the first loss is ln V
                nn.init.zeros_(p)
            elif p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def embed(self, idx):
        return self.wte(idx) + self.wpe.weight[:idx.shape[1]]  # (B, T, C)

    def forward(self, idx, is_target=None):
        x = self.embed(idx)
        positions = torch.arange(idx.shape[1], device=idx.device)
        for block in self.blocks[:-1]:
            x = block(x, positions)
        return self.head(self.norm(self.blocks[-1](x, positions, is_target)))


# ---- 4. corrupt and loss -----------------------------------------------------------------------
def top_positions(score, allowed, count, g):
    """Boolean (B, T): the `count` (B,) positions of highest score (B, T) among the allowed ones.
    Ties are broken at random, so that a score of zeros gives a random subset."""
    shuffle = torch.rand(allowed.shape, generator=g).to(allowed.device).argsort(1)
    score = score.masked_fill(~allowed, -torch.inf).gather(1, shuffle)
    best_first = shuffle.gather(1, score.argsort(dim=1, descending=True, stable=True))
    return allowed & (best_first.argsort(1) < count.to(allowed.device)[:, None])  # rank < count


def mask_tokens(x0, n, cfg, g, is_given=None):
    """Mask n (B,) random tokens of each row of x0 (B, T), none of those that are given."""
    allowed = torch.ones_like(x0, dtype=torch.bool) if is_given is None else ~is_given
    is_mask = top_positions(torch.zeros(x0.shape, device=x0.device), allowed, n, g)
    return x0.masked_fill(is_mask, cfg.vocab_size)  # M = V


def corrupt(x0, cfg, g):
    """Forward process (E1) with n masks: xt and a mask's weight 1/(n B) in the loss, both (B, T).
    Binomial(n; T, gamma) / gamma has the integral 1/n over gamma: (E3) is (E4). n uniform on 1..T
    estimates NELBO / T; short runs draw P(n) = (2n - 1) / T^2: better there (LOG.md)."""
    B, T = x0.shape
    u = (torch.arange(B) / B + torch.rand(1, generator=g)) % 1  # low-discrepancy: one offset
    n = 1 + ((u.sqrt() if cfg.steps < 4000 else u) * T).floor().long().clamp(max=T - 1)  # 1..T
    xt = mask_tokens(x0, n, cfg, g)
    return xt, (xt != x0) / (n[:, None] * B).to(x0.device)  # 1/n, mean of rows


def masked_ce(model, x0, xt):
    """Cross-entropy c_i of the masked tokens in nats, zero elsewhere: (B, T)."""
    at_mask = (xt != x0).nonzero(as_tuple=True)  # x0 holds no M; indices, so a GPU waits once
    logits = model(xt, at_mask).float()  # (number masked, V)
    ce = F.cross_entropy(logits, x0[at_mask], reduction="none")  # (E2)
    return torch.zeros(x0.shape, device=x0.device).index_put(at_mask, ce)


def loss_fn(model, x0, xt, weight):
    """Mean over the batch's rows of the mean c_i of their masks, in nats; micro-batches add up."""
    return (weight * masked_ce(model, x0, xt)).sum()


@torch.no_grad()
def nelbo(model, x0, cfg, g, draws=8, is_given=None):
    """Unbiased estimate of an upper bound on -log p(x0) in nats per row, (B,), from `draws` numbers
    n of masks for each row, stratified over 1..N. N is T, or with a boolean `is_given` (B, T) the
    number of the other tokens; then the bound is on -log p(those | the given ones)."""
    N = torch.full((len(x0),), x0.shape[1]) if is_given is None else (~is_given).sum(1).cpu()
    u, total = torch.rand(len(x0), generator=g), 0
    for k in range(draws):
        n = torch.minimum(1 + ((k + u) / draws * N).floor().long(), N)
        xt = mask_tokens(x0, n, cfg, g, is_given)
        ce = [masked_ce(model, *xs).cpu().double().sum(1) for xs in zip(x0.split(64), xt.split(64))]
        total += N / draws * torch.cat(ce) / n.clamp(min=1)  # N x mean over n (E4); n = 0: N = 0
    return total


# ---- 5. sample ---------------------------------------------------------------------------------
ORDERS = {  # log p (n, V) of the masked positions, their columns (n,) -> score; highest go first
    "random": lambda logp, column: torch.zeros(len(logp), device=logp.device),
    "l2r": lambda logp, column: -column.float(),
    "maxprob": lambda logp, column: logp.amax(1),  # the confidence
    "margin": lambda logp, column: -logp.topk(2).values.exp().diff(dim=1)[:, 0],  # p of 1st - 2nd
    "entropy": lambda logp, column: (logp.exp() * logp).nan_to_num(0).sum(1),  # minus the entropy
}


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


def draw_length(model, x, is_wanted, cfg, g):
    """Rows x (B, T) with EOS from a drawn length on. A perfect model has P(EOS at i) = P(length <=
    i), which rises with i (cummax makes it). Unfiltered logits; a row may stay without EOS."""
    p_eos = torch.zeros(x.shape, device=x.device)
    p_eos[is_wanted] = model(x, is_wanted).float().softmax(1)[:, cfg.eos]
    is_end = is_wanted.flip(1).cumprod(1).flip(1) > 0  # the wanted positions at the end of a row
    u = torch.rand(len(x), 1, generator=g).to(x.device)
    return x.masked_fill(is_end & (u < (p_eos * is_end).cummax(1).values), cfg.eos)


def step_counts(num_masked, N, t, s, cfg, g):
    """How many tokens the step t -> s unmasks and remasks, two (B,). num_masked of N are masked.
    They are the means of (E5) and (E6) for gamma_t = t, rounded, with the largest sigma (ReMDM's
    eta = 1). lab/decoding.py has other schedules and eta, and draws numbers with g."""
    left = torch.minimum(num_masked, (N.double() * s + 1e-6).floor().long())  # 1e-6: float error
    sigma = min(1.0, s / (1 - t)) if t < 1 and cfg.remask != "none" else 0.0  # more: (E6) > 1
    num_remask = torch.minimum((sigma * (N - num_masked)).round().long(), left)  # (E6)
    return num_masked - left + num_remask, num_remask  # (E5), (E6)


@torch.no_grad()
def sample(model, x, cfg, g, is_wanted=None, on_step=lambda nfe, x: None, step_counts=step_counts):
    """The reverse process: the masks of x (B, T), or only those at the boolean `is_wanted`, become
    tokens, all else is carried over. Returns x and NFE. on_step(nfe, x) may see and change x."""
    x, M, nfe = x.clone(), cfg.vocab_size, 0
    is_wanted = x == M if is_wanted is None else is_wanted & (x == M)
    length_first = cfg.length_first and cfg.rows == "docs"
    if length_first and is_wanted[:, -1].any():
        x, nfe = draw_length(model, x, is_wanted, cfg, g), 1
        on_step(nfe, x)
        is_wanted &= x == M
    drawn_logp = torch.zeros(x.shape, device=x.device)  # of each token when it was drawn
    N = is_wanted.sum(1).cpu()
    times = torch.linspace(1, 0, (cfg.num_steps or int(N.max())) + 1, dtype=torch.float64).tolist()
    for t, s in zip(times, times[1:]):
        is_mask = is_wanted & (x == M)
        num_unmask, num_remask = step_counts(is_mask.sum(1).cpu(), N, t, s, cfg, g)
        if not (num_unmask + num_remask).any():  # more steps than tokens
            continue
        # 1. predict
        logits = model(x, is_mask).float()  # (number masked, V)
        if length_first:
            logits[:, cfg.eos] = -torch.inf
        # 2. choose positions to unmask, those of the highest score (--order) first
        score = torch.zeros(x.shape, device=x.device)
        score[is_mask] = ORDERS[cfg.order](logits.log_softmax(1), is_mask.nonzero()[:, 1])
        unmask = top_positions(score, is_mask, num_unmask, g)
        # 3. draw their tokens
        logits = logits[unmask[is_mask]]
        x[unmask] = tokens = categorical(filter_logits(logits, cfg), g)
        drawn_logp[unmask] = logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
        # 4. remask tokens that were unmasked before this step
        if cfg.remask != "none":
            score = torch.zeros(x.shape, device=x.device)
            if cfg.remask == "conf":  # Gumbel noise + log weight: a draw by the weights exp(-p)
                noise = torch.rand(x.shape, generator=g).to(x.device)
                score = -(-noise.log()).log() - drawn_logp.exp()
            x[top_positions(score, is_wanted & ~is_mask, num_remask, g)] = M
        nfe += 1
        on_step(nfe, x)
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
            xt, weight = corrupt(x0, cfg, g)
            total = torch.zeros((), device=run.device)
            micro_batches = torch.arange(len(x0)).tensor_split(cfg.grad_accum * run.world)
            for i in micro_batches[run.rank::run.world]:
                with run.amp:
                    loss = loss_fn(model, x0[i], xt[i], weight[i])
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
