"""Other ways to sample from mdlm.py (or lab/mdlm_variants.py), as wrappers of its model and its
sampler: guidance, key-value caches, blocks, rows beyond the context, thresholds, sampling
schedules, the ancestral sampler, LLaDA's and ReMDM's remasking, rules for EOS.

    python lab/decoding.py sample --block 32 --cache prefix
    python lab/decoding.py sample --prompt "Once upon a time" --guidance 1
    python lab/decoding.py sample --sampler threshold --threshold 0.9 --remask none
    python lab/decoding.py sample --sampler low_confidence --remask none
    python lab/decoding.py sample --length 400 --block 40 --eos-fill
    python lab/decoding.py sample --order random --ancestral --sampling-schedule cosine
    python lab/decoding.py sample --remask random --remask-rule rescale --remask-eta 0.1
"""
import contextlib
import dataclasses
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python lab/decoding.py`
import common
import mdlm
from lab import mdlm_variants
from lab.mdlm_variants import get_schedule, is_schedule, no_schedule


@dataclass
class Config(mdlm_variants.Config):
    sampler: Literal["steps", "threshold", "low_confidence"] = "steps"  # see the functions below
    threshold: float = 0.9  # of sampler threshold: confidence
    sampling_schedule: str = "linear"  # mask rates of the steps, see --schedule
    ancestral: bool = False  # draw how many tokens each of --num-steps steps unmasks (E5)
    remask_eta: float = 1.0  # eta of --remask-rule
    remask_rule: Literal["cap", "rescale"] = "cap"  # sigma = min(eta, sigma_max); eta sigma_max
    guidance: float = 0.0  # classifier-free guidance by the given text
    block: int = 0  # denoise so many tokens at a time, from the left; 0 = all
    cache: Literal["none", "prefix", "dual"] = "none"  # keep keys and values within a block
    length: int = 0  # tokens to write, 0 = one row; beyond seq_len in blocks
    eos_fill: bool = False  # after the first EOS of a row every mask becomes EOS
    eos_last: bool = False  # unmask positions that look like EOS after all others

    def problems(self):
        out = super().problems()
        if not is_schedule(self.sampling_schedule):
            out.append(no_schedule(self.sampling_schedule))
        for name in ("threshold", "remask_eta"):
            if getattr(self, name) > 1:
                out.append(f"--{name.replace('_', '-')} is {getattr(self, name)}, more than 1")
        if self.cache != "none" and self.guidance:
            out.append("--cache keeps no keys for the second evaluation of --guidance: choose one")
        if self.cache != "none" and self.cond == "adaln":
            out.append("--cache does not know the blocks of --cond adaln")
        if self.sampler != "steps" and self.remask != "none":
            out.append(f"--sampler {self.sampler} does not remask: add --remask none")
        if self.sampler == "low_confidence" and self.eos_last:
            out.append("--sampler low_confidence has an order of its own: leave --eos-last out")
        return out


# ---- wrappers of the model -----------------------------------------------------------------------
class Guided:
    """log p ~ (1 + w) log p(. | x) - w log p(. | x without what is given): two evaluations."""

    def __init__(self, model, w, is_given, M):
        self.model, self.w, self.is_given, self.M = model, w, is_given, M

    def __call__(self, x, is_target):
        logp = self.model(x, is_target).float().log_softmax(1)
        uncond = self.model(x.masked_fill(self.is_given, self.M), is_target).float().log_softmax(1)
        return (1 + self.w) * logp - self.w * uncond


class Cached:
    """The first call computes all positions and keeps the keys and values of those outside of
    `block_positions`, and the inputs of each block, for the convolution; later calls compute these
    positions only. What is kept grows stale: an approximation (Wu et al. 2025, section 3)."""

    def __init__(self, model, block_positions):
        self.model, self.block_positions = model, block_positions
        self.kv_cache, self.inputs = [], []

    def __call__(self, x, is_target):
        model, first = self.model, not self.kv_cache
        every = torch.arange(x.shape[1], device=x.device)
        positions = every if first else self.block_positions
        outside = ~torch.isin(every, self.block_positions)
        h = model.embed(x)[:, positions]
        for i, block in enumerate(model.blocks):
            B, T, C = h.shape
            if first:
                self.inputs.append(h)
            self.inputs[i] = self.inputs[i].index_copy(1, positions, h)
            h = block.convolve(self.inputs[i])[:, positions]
            q, k, v = block.attn.qkv(block.norm1(h)).view(
                B, T, 3, block.attn.n_head, -1).permute(2, 0, 3, 1, 4)
            q, k = mdlm.rotate(F.layer_norm(torch.stack((q, k)), q.shape[3:]), positions)
            if first:
                self.kv_cache.append((k[:, :, outside], v[:, :, outside]))
            else:
                k, v = (torch.cat(pair, 2) for pair in zip(self.kv_cache[i], (k, v)))
            y = F.scaled_dot_product_attention(q, k, v)
            h = h + block.attn.proj(y.transpose(1, 2).reshape(B, T, C))
            h = h + block.mlp(block.norm2(h))
        return model.head(model.norm(h)[is_target[:, positions]])


# ---- samplers, in place of mdlm.step_counts and mdlm.sample --------------------------------------
def step_counts(num_masked, N, t, s, cfg, g):
    """As mdlm.step_counts, along the rates of --sampling-schedule, with --remask-eta, or drawn from
    the binomials of (E5) and (E6)."""
    gamma_of = get_schedule(cfg.sampling_schedule)[0]
    gamma_t, gamma_s = gamma_of(torch.tensor([t, s], dtype=torch.float64)).tolist()
    remasks = gamma_t < 1 and cfg.remask != "none"
    sigma_max = min(1.0, gamma_s / (1 - gamma_t)) if remasks else 0.0
    rescale, eta = cfg.remask_rule == "rescale", cfg.remask_eta
    sigma = eta * sigma_max if rescale else min(eta, sigma_max)
    if cfg.ancestral and cfg.num_steps:  # num_steps 0 is one token a step, drawn or not
        rho = min(1.0, (gamma_t - gamma_s + sigma * (1 - gamma_t)) / gamma_t)
        return tuple(torch.binomial(count.double(), torch.full(N.shape, p).double(), g).long()
                     for count, p in ((num_masked, rho), (N - num_masked, sigma)))
    left = torch.minimum(num_masked, (N.double() * gamma_s + 1e-6).floor().long())
    num_remask = torch.minimum((sigma * (N - num_masked)).round().long(), left)
    return num_masked - left + num_remask, num_remask


def sample_steps(*args, **kw):
    """mdlm.sample with the step_counts above."""
    return mdlm.sample(*args, **kw, step_counts=step_counts)


def sample_threshold(model, x, cfg, g, is_wanted, on_step):
    """Unmask the first position of the order and all whose confidence reaches --threshold, in as
    many steps as that takes."""
    x, M = x.clone(), cfg.vocab_size
    for nfe in itertools.count():
        is_mask = is_wanted & (x == M)
        if not is_mask.any():
            return x, nfe
        logits = model(x, is_mask).float()
        score = torch.zeros(x.shape, device=x.device)
        score[is_mask] = mdlm.ORDERS[cfg.order](logits.log_softmax(1), is_mask.nonzero()[:, 1])
        unmask = mdlm.top_positions(score, is_mask, torch.ones(len(x)), g)
        unmask[is_mask] |= logits.softmax(1).amax(1) >= cfg.threshold
        x[unmask] = mdlm.categorical(mdlm.filter_logits(logits[unmask[is_mask]], cfg), g)
        on_step(nfe + 1, x)


def sample_low_confidence(model, x, cfg, g, is_wanted, on_step):
    """LLaDA's low-confidence remasking (Nie et al. 2025): draw a token everywhere, keep those of
    highest probability. Looking at the tokens first changes the distribution, even that of a
    perfect network."""
    x, M, nfe, N = x.clone(), cfg.vocab_size, 0, is_wanted.sum(1).cpu()
    times = torch.linspace(1, 0, (cfg.num_steps or int(N.max())) + 1, dtype=torch.float64).tolist()
    for t, s in zip(times, times[1:]):
        is_mask = is_wanted & (x == M)
        num_unmask, _ = step_counts(is_mask.sum(1).cpu(), N, t, s, cfg, g)
        if not num_unmask.any():
            continue
        logits = model(x, is_mask).float()
        tokens = mdlm.categorical(mdlm.filter_logits(logits, cfg), g)
        score = torch.zeros(x.shape, device=x.device)
        score[is_mask] = logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
        unmask = mdlm.top_positions(score, is_mask, num_unmask, g)
        x[unmask], nfe = tokens[unmask[is_mask]], nfe + 1
        on_step(nfe, x)
    return x, nfe


SAMPLERS = dict(steps=sample_steps, threshold=sample_threshold,
                low_confidence=sample_low_confidence)


# ---- all together --------------------------------------------------------------------------------
def fill_eos(x, cfg):
    """Masks after the first EOS of a row become EOS, in place."""
    x[(x == cfg.vocab_size) & ((x == cfg.eos).cumsum(1) > 0)] = cfg.eos


@contextlib.contextmanager
def eos_last(cfg):
    """A Config whose order is that of cfg with positions that look like EOS after all others."""
    score = mdlm.ORDERS[cfg.order]
    lower = 100 + cfg.seq_len  # than the score of any other position, also of l2r
    mdlm.ORDERS["eos_last"] = lambda logp, i: score(logp, i) - lower * (logp.argmax(1) == cfg.eos)
    try:
        yield dataclasses.replace(cfg, order="eos_last", eos_last=False)
    finally:
        del mdlm.ORDERS["eos_last"]


def decode(model, x, cfg, g, on_step=lambda nfe, x: None):
    """Denoise the canvas x (n, T) block by block: (n, T or --length) and the NFE. The network sees
    seq_len tokens: from the first on or, beyond the context, up to the end of the block."""
    if cfg.eos_last:
        with eos_last(cfg) as cfg:
            return decode(model, x, cfg, g, on_step)
    if not cfg.num_steps:  # one token a step, which no other schedule takes
        cfg = dataclasses.replace(cfg, sampling_schedule="linear")
    M, nfe, more = cfg.vocab_size, 0, max(0, cfg.length - x.shape[1])
    x = torch.cat((x, torch.full((len(x), more), M, device=x.device)), 1)
    if cfg.length and ((x != M) & (x != cfg.eos))[:, cfg.length:].any():
        raise common.UserError(f"--length {cfg.length} is shorter than the given text: raise it")
    x = x[:, :cfg.length or None]
    if cfg.eos_fill:
        fill_eos(x, cfg)
    T, is_given = x.shape[1], x != M
    size = cfg.block or T
    if T > cfg.seq_len <= size:  # a block must see something on its left
        size = cfg.seq_len // 2
    if size < T or cfg.cache != "none" or cfg.eos_fill or cfg.order == "eos_last":
        cfg = dataclasses.replace(cfg, length_first=False)
    starts = [a for a in range(0, T, size) if not is_given[:, a:a + size].all()]
    for j, a in enumerate(starts):
        b = min(a + size, T)
        context = slice(max(0, b - cfg.seq_len), min(T, max(b, cfg.seq_len)))
        column = torch.arange(context.start, context.stop, device=x.device)
        in_block = (column >= a) & (column < b)
        net, evaluations = model, 1  # of the network in a step
        if cfg.guidance and is_given.any():
            net, evaluations = Guided(net, cfg.guidance, is_given[:, context], M), 2
        if cfg.cache != "none":
            net = Cached(net, (in_block if cfg.cache == "dual" else column >= a).nonzero()[:, 0])
        steps = cfg.num_steps * (j + 1) // len(starts) - cfg.num_steps * j // len(starts)  # its own
        share = dataclasses.replace(cfg, num_steps=max(steps, int(cfg.num_steps > 0)))

        def look(step, part):
            if cfg.eos_fill:
                fill_eos(part, cfg)
            x[:, context] = part
            on_step(nfe + evaluations * step, x)
        is_wanted = in_block & (x[:, context] == M)
        x[:, context], num_steps = SAMPLERS[cfg.sampler](
            net, x[:, context], share, g, is_wanted=is_wanted, on_step=look)
        nfe += evaluations * num_steps
    return x, nfe


def main(argv):
    return mdlm.main(argv, Config, mdlm_variants.Model, corrupt=mdlm_variants.corrupt,
                     sample=decode)


if __name__ == "__main__":
    common.run_main(main)
