"""From a causal GPT to a diffusion language model that decides its own length.

Method: DiffuGPT (Gong et al. 2024, arXiv 2410.17891): masked diffusion from the weights of a GPT-2.
lab: pretrained.py (weights of GPT-2, DiffuGPT), varlen_eval.py (length reports), benchmarks.py

    python diffugpt_varlen.py   3 to 8 minutes, 2 CPU cores: val <= 1.87 nats/token (entropy 0.91)
    python diffugpt_varlen.py sample --prompt "Once upon a time" --num-samples 3 --trace
    python diffugpt_varlen.py sample --length-mode truncate
    python diffugpt_varlen.py eval      the bound on 500 test rows, samples

Equations. A canvas is text, EOS, PAD, PAD ...; L is the position of EOS (T: none), M the mask.
    (E1)  NELBO = sum_{n=1..T} 1/n E_{n masks} sum_masked -log p(x_i | x_t) >= -log p(x_0)
    (E2)  shift: p(x_i | x_t) = softmax(W h_{i-1}), as in the causal parent; h_{-1} is that of BOS
    (E3)  annealing: position i attends to j > i with probability r, which grows from 0 to 1
    (E4)  p_i = p(x_i | prompt, rest masked). Exact: p_i(EOS) = P(L = i), p_i(PAD) = P(L < i). Any
          network gives P(L) by its hazards P(L = i | L >= i) = p_i(EOS) / (1 - p_i(PAD))
    (E5)  training crops canvases to T / 3 .. T, whatever the text, so p(x_i | visible) does not
          depend on the size: sampling may begin with a short canvas and extend it
    (E6)  truncation: what follows the first visible EOS or PAD is PAD and need not be computed

Shapes: B rows, T tokens, V vocabulary (PAD is V, M is V + 1), C width, H heads, D = C / H. Units:
nats. Every position of a row is scored, PAD too: the model is not told the length. g draws noise.

Differs from the paper: the loss is the bound per position (theirs is twice that for large batches:
they divide by the number of masks, half of the positions); a row's number of masks is drawn, so no
1 / t needs a cut-off; M and PAD are new rows of the embedding, M is never predicted; prompts and
crops in training, for lengths. Differs from ar.py: GPT-2 blocks, named as in `transformers`.
"""
import contextlib
import copy
import dataclasses
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
    out: str = "out/diffugpt_varlen"  # run folder
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
    steps: int = 1100  # optimizer steps of the adaptation
    batch_size: int = 16  # rows per micro-batch, over all processes
    grad_accum: int = 1  # micro-batches per step
    lr: float = 6e-3  # peak learning rate
    warmup: int = 50  # steps of linear warm-up; then linearly to zero
    ema: float = 0.99  # decay of the averaged weights, which are evaluated and saved; 0 = off
    eval_every: int = 200  # steps between evaluations and checkpoints
    # method
    pipeline: Literal["diffusion", "arm"] = "diffusion"  # arm: autoregressive, as the parent is
    init_from: str = "parent"  # parent (trained first, in <out>_parent), scratch, a run folder
    parent_steps: int = 500  # optimizer steps of the parent
    attn_annealing_steps: int = 100  # steps in which r of (E3) grows from 0 to 1; 1: r is 1
    p_prompt: float = 0.2  # share of rows with a prompt; half of them mask everything behind it
    p_crop: float = 0.25  # share of batches cropped at a random length (E5)
    # sampling; as in the bound: --order random --num-steps 0 --temperature 1 --length-mode fixed
    num_samples: int = 4  # of sample and eval; training draws 64 and prints two
    prompt: str = ""  # text that every sample begins with
    infill: str = ""  # "A ___ and ___3.": fill one token and three; ___ at the end: the rest
    trace: bool = False  # print the trajectory of the first sample
    num_steps: int = 80  # a step unmasks ceil((T - prompt) / num_steps) tokens; 0 = one
    order: Literal["random", "l2r", "maxprob", "margin", "entropy"] = "maxprob"  # unmasked first
    # how much of the row is computed, and when its length is decided: see sample()
    length_mode: Literal["fixed", "truncate", "quantile", "blockwise", "presampled"] = "presampled"
    length_quantile: float = 0.9  # quantile: the canvas is long enough with this probability
    block_size: int = 32  # quantile, blockwise: tokens an extension adds; below T / 3 untrained
    temperature: float = 0.5  # below 1: safer, less varied; 0: the most likely token
    top_k: int = 0  # keep the k most likely tokens; 0 = all
    top_p: float = 1.0  # keep the most likely tokens that hold this much probability
    # set by the data
    eos: int = 0  # end of document
    bos: int = 0  # stands before the first token (E2)

    checkpoint_keys = ("pipeline",)  # what a checkpoint fixes

    def problems(self):
        rules = {
            "--p-prompt and --p-crop must be at most 1": max(self.p_prompt, self.p_crop) <= 1,
            "--length-quantile must be in (0, 1)": 0 < self.length_quantile < 1,
            "--pipeline arm is the parent itself: add --init-from scratch, or a run folder":
                (self.pipeline, self.init_from) != ("arm", "parent"),
            "--infill needs --pipeline diffusion: a causal model sees nothing behind a hole":
                self.pipeline != "arm" or not self.infill}
        return [sentence for sentence, holds in rules.items() if not holds]


PRESETS = dict(tiny={}, small=dict(n_layer=8, n_head=8, n_embd=512, seq_len=256, lr=2e-3),
               medium=dict(n_layer=12, n_head=12, n_embd=768, seq_len=512, lr=1e-3))


# ---- 2. data -----------------------------------------------------------------------------------
# load_data(cfg) sets vocab_size, rows, eos, bos; a split is (ids, document offsets, log p or None)
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
class Conv1D(nn.Module):
    """GPT-2's linear layer: x W + b with W (in, out), transposed with respect to nn.Linear."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x):
        return F.linear(x, self.weight.t(), self.bias)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.c_attn = Conv1D(cfg.n_embd, 3 * cfg.n_embd)
        self.c_proj = Conv1D(cfg.n_embd, cfg.n_embd)

    def forward(self, x, attention_mask):
        B, T, C = x.shape  # T counts BOS here
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if x.device.type == "cpu":  # written out: the fused kernel is slow there, see LOG.md
            score = q @ k.transpose(2, 3) * q.shape[3] ** -0.5  # (B, H, T, T)
            if attention_mask is not None:
                score = score.masked_fill(~attention_mask, -torch.inf)
            y = score.softmax(-1).to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.c_fc = Conv1D(cfg.n_embd, 4 * cfg.n_embd)
        self.c_proj = Conv1D(4 * cfg.n_embd, cfg.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(cfg.n_embd), Attention(cfg)
        self.ln_2, self.mlp = nn.LayerNorm(cfg.n_embd), MLP(cfg)

    def forward(self, x, attention_mask):
        x = x + self.attn(self.ln_1(x), attention_mask)
        return x + self.mlp(self.ln_2(x))


class Model(nn.Module):
    """GPT-2: ids (B, T) in 0..V + 1 -> logits (B, T, outputs), or (n, outputs) at the n positions
    of a boolean `is_target` (B, T). BOS is put before and the outputs are shifted here and nowhere
    else: column i is about token i. Outputs: V tokens and, in documents of the diffusion pipeline,
    PAD; never M. The boolean `attention_mask`, True where attention is allowed, is about BOS and
    the T tokens: (1 + T, 1 + T), or (B, 1, 1, 1 + T); None allows all."""

    def __init__(self, cfg):
        super().__init__()
        V, self.bos = cfg.vocab_size, cfg.bos
        self.num_outputs = V + (cfg.rows == "docs" and cfg.pipeline == "diffusion")
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(V + 2, cfg.n_embd), wpe=nn.Embedding(cfg.seq_len + 1, cfg.n_embd),
            h=nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer)), ln_f=nn.LayerNorm(cfg.n_embd)))
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "bias")):
                nn.init.zeros_(p)
            elif p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    @property
    def blocks(self):
        return self.transformer.h

    def trunk(self, idx, attention_mask=None):
        """Hidden states of BOS and the tokens: (B, 1 + T, C)."""
        idx = torch.cat((torch.full_like(idx[:, :1], self.bos), idx), 1)
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[:idx.shape[1]]
        for block in self.blocks:
            x = block(x, attention_mask)
        return self.transformer.ln_f(x)

    def hidden_states(self, idx, attention_mask=None):
        """(B, T, C), shifted: the i-th predicts token i."""
        return self.trunk(idx, attention_mask)[:, :-1]  # (E2)

    def forward(self, idx, is_target=None, attention_mask=None):
        h = self.hidden_states(idx, attention_mask)
        h = h if is_target is None else h[is_target]
        return F.linear(h, self.transformer.wte.weight[:self.num_outputs])  # the tied embedding


# ---- 4. corrupt and loss -----------------------------------------------------------------------
def top_positions(score, allowed, count, g):
    """Boolean (B, T): the `count` (B,) positions of highest score (B, T) among the allowed ones.
    Ties are broken at random, so that a score of zeros gives a random subset."""
    shuffle = torch.rand(allowed.shape, generator=g).to(allowed.device).argsort(1)
    score = score.masked_fill(~allowed, -torch.inf).gather(1, shuffle)
    best_first = shuffle.gather(1, score.argsort(dim=1, descending=True, stable=True))
    return allowed & (best_first.argsort(1) < count.to(allowed.device)[:, None])  # rank < count


def to_canvas(x0, cfg):
    """EOS-filled rows (B, T) -> canvases: what follows the first EOS of a document becomes PAD."""
    is_eos = (x0 == cfg.eos) & (cfg.rows == "docs")
    return x0.masked_fill(is_eos.cumsum(1) > is_eos.long(), cfg.vocab_size)


def length_of(x, cfg):
    """L (B,), the position of the EOS of canvases x (B, T); T where there is none."""
    return (((x == cfg.eos) & (cfg.rows == "docs")).cumsum(1) == 0).sum(1)


def random_attention(S, r, device, g=None):
    """(S, S) boolean, S = 1 + T, or None for all: a position attends to itself, those before it and
    each later one with probability r; one draw for all rows, heads, layers (Gong et al., 3.2)."""
    if r >= 1:
        return None
    causal = torch.ones(S, S, dtype=torch.bool, device=device).tril()
    return causal | (torch.rand(S, S, generator=g) < r).to(device) if r > 0 else causal  # (E3)


def random_prompts(x, cfg, g):
    """Boolean (B, T): what may be masked in canvases x (B, T), and (B,): the rows in which all of
    that is masked. A prompt's length must not tell where its row ends: it is drawn from 1 to T / 2
    whatever the row, and a row that is shorter than its prompt is left out."""
    (B, T), (kind, u) = x.shape, torch.rand(2, len(x), 1, generator=g)
    m = torch.where(kind < cfg.p_prompt, (u * (T // 2)).ceil().long(), 0).to(x.device)  # (B, 1)
    allowed = (torch.arange(T, device=x.device) >= m) & (m <= length_of(x, cfg)[:, None])
    return allowed, (kind < cfg.p_prompt / 2)[:, 0].to(x.device)


def corrupt(x0, cfg, g, step=math.inf, random_prompts=random_prompts):
    """The forward process: canvases x, xt and each token's weight in the loss, (B, T), and the
    attention mask of this optimizer step. If n of a row's N maskable tokens are masked, each weighs
    N / n, divided by the sum of all N. arm masks nothing and predicts all tokens up to the EOS."""
    x, (B, T), V = to_canvas(x0, cfg), x0.shape, cfg.vocab_size
    if cfg.pipeline == "arm":
        return x, x, (x != V) / (x != V).sum(), random_attention(T + 1, 0, x.device)
    crop, size = torch.rand(2, generator=g)
    if crop < cfg.p_crop:
        x = x[:, :T // 3 + int(size * (T - T // 3)) + 1]  # T / 3 to T, whatever the text (E5)
    t = 1 - (torch.arange(B) / B + torch.rand(1, generator=g)) % 1  # (0, 1], low-discrepancy
    allowed, mask_all = random_prompts(x, cfg, g)
    N = allowed.sum(1)
    n = torch.where(mask_all, N, (t.to(x.device) * N).ceil().long())
    is_mask = top_positions(torch.zeros(x.shape, device=x.device), allowed, n, g)
    weight = is_mask * (N / n.clamp(min=1))[:, None] / allowed.sum().clamp(min=1)  # (E1)
    r = min(1, (step + 1) / cfg.attn_annealing_steps)
    attention_mask = random_attention(x.shape[1] + 1, r, x.device, g)
    return x, x.masked_fill(is_mask, V + 1), weight, attention_mask


def loss_fn(model, x, xt, weight, attention_mask):
    """Weighted cross-entropy in nats per position that may be masked; it is NELBO / T without
    prompts, crops and annealing. arm: nats per token. Micro-batches add up."""
    at_target = (weight > 0).nonzero(as_tuple=True)
    logits = model(xt, at_target, attention_mask).float()
    return (weight[at_target] * F.cross_entropy(logits, x[at_target], reduction="none")).sum()


def target_nats(model, x, xt, is_target, attention_mask=None):
    """-log p(x_i | xt) in nats at the targets, zero elsewhere: (B, T) float64."""
    nats = torch.zeros(x.shape, dtype=torch.float64)
    for i in torch.arange(len(x)).split(64):
        logits = model(xt[i], is_target[i], attention_mask).float()
        ce = F.cross_entropy(logits, x[i][is_target[i]], reduction="none")
        nats[i] = nats[i].masked_scatter(is_target[i].cpu(), ce.cpu().double())
    return nats


@torch.no_grad()
def nelbo_per_token(model, x0, cfg, g, draws=8, is_given=None):
    """The terms of `nelbo`, those of each position, in nats: (B, T) float64 on the CPU."""
    x, (B, T) = to_canvas(x0, cfg), x0.shape
    allowed = torch.ones_like(x, dtype=torch.bool) if is_given is None else ~is_given
    if cfg.pipeline == "arm":
        causal = random_attention(T + 1, 0, x.device)
        return target_nats(model, x, x, allowed & (x != cfg.vocab_size), causal)
    N, u, total = allowed.sum(1).cpu(), torch.rand(B, generator=g), 0
    for k in range(draws):
        n = torch.minimum(1 + ((k + u) / draws * N).floor().long(), N)
        is_mask = top_positions(torch.zeros(x.shape, device=x.device), allowed, n, g)
        nats = target_nats(model, x, x.masked_fill(is_mask, cfg.vocab_size + 1), is_mask)
        total += (N / draws / n.clamp(min=1))[:, None] * nats  # N times the mean over n (E1)
    return total


def nelbo(model, x0, cfg, g, draws=8, is_given=None):
    """Unbiased estimate of an upper bound on -log p(x0) in nats per row, (B,), from `draws` numbers
    n of masks for each row, stratified over 1..N. With a boolean `is_given` (B, T) it is a bound on
    -log p(the other N tokens | the given ones). arm: exact, and what is given must be a prompt."""
    return nelbo_per_token(model, x0, cfg, g, draws, is_given).sum(1)


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


def hazard_to_dist(log_hazard, log_stay, m):
    """log P(L = i | L >= m), i = 0 .. T - 1, and in column T that of a longer document: (B, T + 1),
    from log P(L = i | L >= i) and log P(L > i | L >= i), both (B, T), used from m (B,) on."""
    in_prompt = torch.arange(log_hazard.shape[1], device=m.device) < m[:, None]
    log_hazard = log_hazard.masked_fill(in_prompt, -torch.inf)
    log_survive = log_stay.masked_fill(in_prompt, 0.0).cumsum(1)  # log P(L > i)
    return F.pad(log_survive, (1, 0)) + F.pad(log_hazard, (0, 1))  # (E4)


@torch.no_grad()
def length_dist(model, x, m, cfg):
    """log P(L | L >= m), with all masked from m (B,) on in canvases x (B, T), from one evaluation
    of the network: (B, T + 1), column T is "longer than the canvas"."""
    is_wanted = torch.arange(x.shape[1], device=x.device) >= m[:, None]
    logits = model(x.masked_fill(is_wanted, cfg.vocab_size + 1)).float()
    log_hazard = logits[..., :cfg.vocab_size].log_softmax(2)[..., cfg.eos]  # PAD left out (E4)
    log_stay = torch.log1p(-log_hazard.exp().clamp(max=1 - 1e-7))
    return hazard_to_dist(log_hazard, log_stay, m)


def predict(model, x, is_target, end):
    """Logits (number of targets, outputs) of canvases x (B, T), of which the i-th has end[i]
    positions. Rows of similar length go together, cut to the longest of them: this saves time."""
    number = is_target.flatten().cumsum(0).view(is_target.shape) - 1  # a target's row in logits
    by_end, logits = is_target.any(1).nonzero()[:, 0], None
    by_end = by_end[end[by_end].argsort()]
    for rows in by_end.chunk(4 if end[by_end].unique().numel() > 1 else 1):
        width = int(end[rows].max())
        inside = torch.arange(-1, width, device=x.device) < end[rows, None]  # with BOS
        attention_mask = None if inside.all() else inside[:, None, None]
        part = model(x[rows, :width], is_target[rows, :width], attention_mask).float()
        logits = part.new_empty(int(is_target.sum()), part.shape[1]) if logits is None else logits
        logits[number[rows, :width][is_target[rows, :width]]] = part
    return logits


@torch.no_grad()
def sample_ar(model, x, cfg, g, on_step=lambda nfe, x: None):
    """The causal parent continues the canvas x (B, T), prompts of one length and then the id V,
    from left to right: x and NFE. ar.py does it faster, with a cache of keys and values."""
    x, first = x.clone(), int((x[0] != cfg.vocab_size).cumprod(0).sum())
    causal = random_attention(x.shape[1] + 1, 0, x.device)
    ended, i = torch.zeros_like(x[:, 0], dtype=torch.bool), first - 1  # a full row takes no step
    for i in range(first, x.shape[1]):
        is_target = torch.arange(i + 1, device=x.device).expand(len(x), -1) == i
        logits = model(x[:, :i + 1], is_target, causal[:i + 2, :i + 2]).float()
        x[:, i] = categorical(filter_logits(logits, cfg), g).masked_fill(ended, cfg.eos)
        ended |= (x[:, i] == cfg.eos) & (cfg.rows == "docs")
        on_step(i + 1 - first, x)
        if ended.all():
            break
    return x.masked_fill(x == cfg.vocab_size, cfg.eos), i + 1 - first


@torch.no_grad()
def sample(model, x, cfg, g, on_step=lambda nfe, x: None, length_dist=length_dist):
    """The reverse process: positions of x (B, T) with the id V become tokens, all else is given. V
    is the mask here and in on_step, as in mdlm.py; in canvases it is PAD. Returns x, EOS-filled,
    and NFE; on_step(nfe, x) sees x uncut. The length modes of an exact model have one distribution
    (E5) at temperature 1, a token a step: fixed computes all; truncate stops behind the first EOS
    or PAD; quantile begins with a canvas for the length_quantile of L, blockwise with one block,
    both grow; presampled draws L first, at temperature 1. With order maxprob and temperature 0.5
    fixed writes hardly anything, truncate and quantile little, blockwise worse texts (LOG.md)."""
    if cfg.pipeline == "arm":
        return sample_ar(model, x, cfg, g, on_step)
    (B, T), V, M, docs, nfe = x.shape, cfg.vocab_size, cfg.vocab_size + 1, cfg.rows == "docs", 0
    column, is_given = torch.arange(T, device=x.device), x != V
    x = to_canvas(x.masked_fill(~is_given, M), cfg)
    m = is_given.cumprod(1).sum(1)  # tokens of the prompt
    given_end = (is_given * (column + 1)).amax(1)  # one behind the last given token
    end_known = docs & (x == cfg.eos).any(1)  # nothing else may end the row
    is_longer = torch.zeros_like(end_known)  # presampled: no end within T
    # 1. the canvas: `end` positions of each row
    end = torch.full_like(m, T)
    if docs and cfg.length_mode in ("quantile", "presampled") and not end_known.any():
        logp, nfe = length_dist(model, x, given_end, cfg), 1
        if cfg.length_mode == "quantile":
            end = (logp.exp().cumsum(1) < cfg.length_quantile).sum(1) + 1
        else:
            L = categorical(logp, g)
            is_longer, end_known = L == T, torch.ones_like(end_known)
            x[~is_longer, L[~is_longer]] = cfg.eos
    elif cfg.length_mode == "blockwise":
        end = m + cfg.block_size
    if cfg.length_mode != "fixed":
        end = torch.where(end_known, length_of(x, cfg) + 1, end.maximum(given_end)).clamp(max=T)
    is_text = end_known[:, None] | (column < given_end[:, None])  # where EOS and PAD are impossible
    k = -(-int((T - m).max()) // cfg.num_steps) if cfg.num_steps else 1  # tokens per step
    while True:
        # 2. cut behind the first EOS or PAD; a row without masks and without an end grows
        is_stop = (column < end[:, None]) & ((x == cfg.eos) | (x == V)) & docs
        if cfg.length_mode != "fixed":
            end = torch.minimum(end, (is_stop.cumsum(1) == 0).sum(1) + 1)  # (E6)
        is_mask = (column < end[:, None]) & (x == M)
        grows = ~is_mask.any(1) & ~is_stop.any(1) & (end < T)
        if grows.any():
            end = torch.where(grows, end + cfg.block_size, end).clamp(max=T)
            continue
        if not is_mask.any():
            break
        # 3. predict
        logits = predict(model, x, is_mask, end)
        if docs:
            logits[:, [cfg.eos, V]] = logits[:, [cfg.eos, V]].masked_fill(
                is_text[is_mask][:, None], -torch.inf)
        # 4. choose positions to unmask, those of the highest score (--order) first
        score = torch.zeros(x.shape, device=x.device)
        score[is_mask] = ORDERS[cfg.order](logits.log_softmax(1), is_mask.nonzero()[:, 1])
        # text at its last position says that a row is longer than the canvas: it comes first
        score[is_longer[:, None] & (column == end[:, None] - 1)] = torch.inf
        unmask = top_positions(score, is_mask, torch.full_like(m, k), g)
        # 5. draw their tokens
        x[unmask] = categorical(filter_logits(logits[unmask[is_mask]], cfg), g)
        nfe += 1
        on_step(nfe, torch.where(x == M, V, x.masked_fill(x == V, cfg.eos)))
    return x.masked_fill(is_stop.cumsum(1) > 0, cfg.eos), nfe


# ---- 6. train ----------------------------------------------------------------------------------
def get_lr(step, cfg):
    """Learning rate of a step: linear warm-up, then linearly to zero."""
    done = max(0, step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * min(1, (step + 1) / cfg.warmup) * (1 - done)


def make_optimizers(model, cfg):
    """Muon for the matrices inside the blocks, AdamW for the rest. A group's rate is `scale` times
    the scheduled one: matrices and embeddings (wte is the head; LOG.md) have 1, all others 3."""
    hidden = [p for p in model.blocks.parameters() if p.dim() == 2]
    embed = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    rest = [p for p in model.parameters() if not any(p is other for other in hidden + embed)]
    return [fast.Muon([dict(params=hidden, scale=1.0)], cfg.lr, cfg.dtype),
            torch.optim.AdamW([dict(params=embed, scale=1.0), dict(params=rest, scale=3.0)],
                              cfg.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]


def evaluate(model, data, cfg, split="val", n=128, nelbo=nelbo):
    """The bound, or the parent's likelihood, for the rows of get_eval_rows: an entry of the log."""
    x0, true_nll = get_eval_rows(getattr(data, split), cfg, n)
    device = model.transformer.wte.weight.device
    nats = nelbo(model, x0.to(device), cfg, torch.Generator().manual_seed(0))
    bound = "exact" if cfg.pipeline == "arm" else "upper"
    return likelihood(nats, x0, true_nll, data.tokenizer, cfg, bound)


def init_model(cfg, Model, data, device):
    """The model a run begins with: random weights, or those of the run that --init-from names. A
    causal parent knows neither PAD nor M: they begin as the mean of all tokens."""
    folder = f"{cfg.out}_parent" if cfg.init_from == "parent" else cfg.init_from
    if folder == "scratch" or cfg.resume:
        return Model(cfg).to(device)
    parent = common.load_config(type(cfg), folder)
    model, _ = common.load_model(Model, dataclasses.replace(cfg, out=folder), device, data)
    if parent.pipeline == "arm":
        table = model.transformer.wte.weight.data
        table[cfg.vocab_size:] = table[:cfg.vocab_size].mean(0)
    return model


def train(cfg, Model=Model, corrupt=corrupt, loss_fn=loss_fn, nelbo=nelbo, sample=sample,
          init_model=init_model, make_optimizers=make_optimizers):
    """Train as cfg says, write log, checkpoints and samples to the run folder, return the EMA."""
    with common.Run(cfg) as run:
        data = load_data(cfg, quiet=run.rank > 0)
        torch.manual_seed(cfg.seed)
        model = init_model(cfg, Model, data, run.device)
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
            x, xt, weight, attention_mask = corrupt(x0, cfg, g, step)
            total = torch.zeros((), device=run.device)
            micro_batches = torch.arange(len(x0)).tensor_split(cfg.grad_accum * run.world)
            for i in micro_batches[run.rank::run.world]:
                with run.amp:
                    loss = loss_fn(model, x[i], xt[i], weight[i], attention_mask)
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
            run.log_step(step, x.numel(), total, grad_norm=norm, lr=get_lr(step - 1, cfg))
            if step % cfg.eval_every == 0 or step == cfg.steps:
                run.save(step, *state)
        if step < cfg.steps:
            run.save(step, *state)
            raise KeyboardInterrupt(f"stopped at step {step}; go on with --resume")
        run.validate(step, lambda: evaluate(ema, data, cfg, nelbo=nelbo))
        if run.rank == 0:
            if cfg.pipeline == "diffusion":
                common.show_samples(run, sample, ema, data.tokenizer, cfg, step)
            common.plot_loss(run.out)
    return ema


def train_parent(cfg, run, *parts):
    """Stage 1: the causal parent. One of the same settings goes on, any other is moved aside."""
    parent = dataclasses.replace(cfg, pipeline="arm", init_from="scratch", steps=cfg.parent_steps,
                                 out=f"{cfg.out}_parent")
    free = {"out", "resume", "log", "device", "compile", "eval_every"}  # do not shape a parent
    keys = [f.name for f in dataclasses.fields(cfg) if f.name not in free]  # before parent_steps do
    load_data(parent, quiet=run.rank > 0)  # fixes vocab_size and rows
    with contextlib.suppress(common.UserError):  # no parent yet
        stored = common.load_config(type(cfg), parent.out)
        parent.resume = all(vars(stored)[k] == vars(parent)[k]
                            for k in keys[:keys.index("parent_steps")])
    try:
        train(parent, *parts)
    except KeyboardInterrupt as stop:
        if not stop.args:  # nothing was saved
            raise
        raise KeyboardInterrupt("the parent is kept; the same command goes on with it") from None


# ---- 7. main -----------------------------------------------------------------------------------
def main(argv, Config=Config, Model=Model, corrupt=corrupt, loss_fn=loss_fn, nelbo=nelbo,
         sample=sample, init_model=init_model, make_optimizers=make_optimizers):
    """train (default), sample or eval. lab/ passes other functions."""
    command, cfg = common.parse(Config, PRESETS, argv)
    run = common.Run(cfg)
    parts = Model, corrupt, loss_fn, nelbo, sample, init_model, make_optimizers
    if command == "train":
        if cfg.init_from == "parent" and not cfg.resume:  # stage 1 resumes by itself
            run.say(f"stage 1 of 2: a causal parent, {cfg.parent_steps} steps")
            train_parent(cfg, run, *parts)
            run.say(f"\nstage 2 of 2: the parent becomes a diffusion model, {cfg.steps} steps")
        return train(cfg, *parts)
    data = load_data(cfg) if command == "eval" else None
    model, tokenizer = common.load_model(Model, cfg, run.device, data)
    if command == "eval":
        with run.amp:
            run.say(f"test: {report(evaluate(model, data, cfg, 'test', 500, nelbo))}")
    common.show_samples(run, sample, model, tokenizer, cfg)


if __name__ == "__main__":
    common.run_main(main)
