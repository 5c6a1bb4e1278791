"""Autoregressive language model: predict each token from the ones before it. Exact likelihood.

Method: Bengio et al. 2003 (section 2); the network is a GPT (Radford et al. 2019) with changes.

    python ar.py                3 to 10 minutes, 2 CPU cores: val = 0.93 nats/token (entropy 0.91)
    python ar.py sample --prompt "Once upon a time" --num-samples 3 --temperature 0.8
    python ar.py eval           the exact likelihood of 500 test rows; samples

Equations
    (E1)  log p(x) = sum_i log p(x_i | x_<i)                   chain rule: exact, not a bound
    (E2)  p(. | x_<i) = softmax(logits_i),  logits = Model([BOS, x_1 ... x_{T-1}])
    (E3)  loss = - sum_i log p(x_i | x_<i) / number of scored tokens
    (E4)  sampling: x_i ~ p(. | x_<i) from left to right; keys and values of the past are cached

Shapes: B rows, T tokens, V vocabulary, C width, H heads, D = C / H. Units: nats. g draws
batches and samples. A row is scored up to and including its first EOS, later ones are not.

Differs from GPT-2: RMSNorm, rotary positions, normalised queries and keys, a causal convolution in
front of each block, no biases, Muon for the matrices of the blocks; output projections and the head
start at zero, so the first loss is exactly ln V.
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
    out: str = "out/ar"  # run folder
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
    # sampling; the likelihood is without temperature, top_k and top_p
    num_samples: int = 4  # of sample and eval; training draws 64 and prints two
    prompt: str = ""  # text that every sample begins with
    trace: bool = False  # print the trajectory of the first sample
    temperature: float = 1.0  # below 1: safer, less varied; 0: the most likely token
    top_k: int = 0  # keep the k most likely tokens; 0 = all
    top_p: float = 1.0  # keep the most likely tokens that hold this much probability
    # set by the data
    eos: int = 0  # end of document
    bos: int = 0  # first input


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

    def forward(self, x, positions, kv_cache=None):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        qk, v = qkv.split((2, 1))
        (q, k), v = rotate(F.layer_norm(qk, qk.shape[4:]), positions), v.squeeze(0)  # (B, H, T, D)
        if kv_cache is not None:  # extended in place, by the prompt, then by one token a call
            k, v = (torch.cat(pair, 2) for pair in zip(kv_cache, (k, v))) if kv_cache else (k, v)
            kv_cache[:] = k, v  # (B, H, past and new, D)
        if x.device.type == "cpu":  # written out: the fused kernel is slow there, see LOG.md
            scores = q * q.shape[3] ** -0.5 @ k.mT  # (B, H, T, past and new tokens)
            future = scores.new_full(scores.shape[2:], -torch.inf).triu(1 + k.shape[2] - T)
            y = (scores + future).softmax(-1).to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # T > 1: no past
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=False)
        self.proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x)))


class Block(nn.Module):
    """A convolution over each token and the six before it (as Canon layers, Allen-Zhu 2025), then
    attention and MLP. kv_cache: [] or [keys, values, the last six inputs of the convolution]."""

    def __init__(self, cfg):
        super().__init__()
        self.conv = nn.Conv2d(cfg.n_embd, cfg.n_embd, (1, 7), groups=cfg.n_embd, bias=False)
        self.norm1, self.attn = nn.RMSNorm(cfg.n_embd), Attention(cfg)
        self.norm2, self.mlp = nn.RMSNorm(cfg.n_embd), MLP(cfg)

    def forward(self, x, positions, kv_cache=None):
        past = kv_cache.pop() if kv_cache else x.new_zeros(len(x), 6, x.shape[2])
        seen = torch.cat((past, x), 1)
        with torch.autocast(x.device.type, enabled=False):  # float32 is faster here on CPUs
            x = x + self.conv(seen.mT[:, :, None])[:, :, 0].mT  # (B, C, 1, 6 + T) -> (B, C, 1, T)
        x = x + self.attn(self.norm1(x), positions, kv_cache)
        if kv_cache is not None:
            kv_cache.append(seen[:, -6:])
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Causal transformer: ids (B, T) -> logits (B, T, V), or (n, V) at the n positions `is_target`,
    boolean (B, T) or indices. With `kv_cache`, at first a list of an empty list per layer, it is
    called again with only the next token of each row."""

    def __init__(self, cfg):
        super().__init__()
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "head.weight")):  # so the first loss is ln V
                nn.init.zeros_(p)
            elif p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, is_target=None, kv_cache=None):
        start = kv_cache[0][0].shape[2] if kv_cache and kv_cache[0] else 0
        positions = torch.arange(start, start + idx.shape[1], device=idx.device)
        x = self.wte(idx)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, positions, kv_cache[i] if kv_cache else None)
        x = self.norm(x)
        return self.head(x if is_target is None else x[is_target])


# ---- 4. corrupt and loss -----------------------------------------------------------------------
def is_scored(x0, cfg):
    """Boolean (B, T): positions up to the first EOS of a document, every position of a window."""
    is_eos = x0 == cfg.eos
    return (is_eos.cumsum(1) - is_eos.long() == 0) | (cfg.rows != "docs")


def token_nll(model, x0, cfg):
    """-log p(x_i | x_<i) at the scored positions, zero elsewhere: (B, T) nats."""
    inputs = torch.cat((torch.full_like(x0[:, :1], cfg.bos), x0[:, :-1]), 1)  # shifted by one
    at_target = is_scored(x0, cfg).nonzero(as_tuple=True)
    logits = model(inputs, at_target).float()  # (number scored, V)  # (E2)
    ce = F.cross_entropy(logits, x0[at_target], reduction="none")
    return torch.zeros(x0.shape, device=x0.device).index_put(at_target, ce)


def loss_fn(model, x0, weight, cfg):
    """Nats per scored token: weight = 1 / their number in the batch; micro-batches add up."""
    length = is_scored(x0, cfg).sum(1)
    order = length.argsort()  # short rows apart from long ones, for speed
    ends = torch.stack([part[-1] for part in length[order].chunk(2)]).tolist()
    nats = sum(token_nll(model, x0[i, :end], cfg).sum() for i, end in zip(order.chunk(2), ends))
    return weight * nats  # (E3)


@torch.no_grad()
def nll(model, x0, cfg):
    """Exact -log p(x0) in nats per row: (B,) (E1)."""
    return torch.cat([token_nll(model, part, cfg).cpu().double().sum(1) for part in x0.split(64)])


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


@torch.no_grad()
def sample(model, x, cfg, g, on_step=lambda nfe, x: None):
    """Continue x (B, T), prompts of one length and then V (no token), from left to right: (B, T)
    and NFE, the network evaluations until the last row has ended. on_step(nfe, x) follows each."""
    x, nfe, kv_cache = x.clone(), 0, [[] for _ in model.blocks]
    first = int((x[0] != cfg.vocab_size).cumprod(0).sum())
    inputs = torch.cat((torch.full_like(x[:, :1], cfg.bos), x[:, :first]), 1)  # BOS and prompt
    ended = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for i in range(first, x.shape[1]):
        logits = model(inputs, kv_cache=kv_cache)[:, -1].float()  # (B, V)
        x[:, i] = categorical(filter_logits(logits, cfg), g).masked_fill(ended, cfg.eos)  # (E4)
        inputs, nfe = x[:, i:i + 1], nfe + 1
        ended |= (x[:, i] == cfg.eos) & (cfg.rows == "docs")
        on_step(nfe, x)
        if ended.all():
            break
    return x.masked_fill(x == cfg.vocab_size, cfg.eos), nfe


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


def evaluate(model, data, cfg, split="val", n=128):
    """The exact likelihood of the rows of get_eval_rows, as an entry of the log."""
    x0, true_nll = get_eval_rows(getattr(data, split), cfg, n)
    nats = nll(model, x0.to(model.head.weight.device), cfg)
    return likelihood(nats, x0, true_nll, data.tokenizer, cfg, "exact")


def train(cfg, sample=sample):
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
                run.validate(step, lambda: evaluate(ema, data, cfg))
            for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
                group["lr"] = get_lr(step, cfg) * group["scale"]
            # one batch, shared out to micro-batches and processes
            x0 = get_batch(data.train, cfg, g).to(run.device)
            weight = 1 / is_scored(x0, cfg).sum()
            total = torch.zeros((), device=run.device)
            micro_batches = torch.arange(len(x0)).tensor_split(cfg.grad_accum * run.world)
            for i in micro_batches[run.rank::run.world]:
                with run.amp:
                    loss = loss_fn(model, x0[i], weight, cfg)
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
        run.validate(step, lambda: evaluate(ema, data, cfg))
        if run.rank == 0:
            common.show_samples(run, sample, ema, data.tokenizer, cfg, step)
            common.plot_loss(run.out)
    return ema


# ---- 7. main -----------------------------------------------------------------------------------
def main(argv, Config=Config, sample=sample):
    """train (default), sample or eval. lab/ passes other functions."""
    command, cfg = common.parse(Config, PRESETS, argv)
    if command == "train":
        return train(cfg, sample)
    run = common.Run(cfg)
    data = load_data(cfg) if command == "eval" else None
    model, tokenizer = common.load_model(Model, cfg, run.device, data)
    if command == "eval":
        with run.amp:
            run.say(f"test: {report(evaluate(model, data, cfg, 'test', 500))}")
    common.show_samples(run, sample, model, tokenizer, cfg)


if __name__ == "__main__":
    common.run_main(main)
