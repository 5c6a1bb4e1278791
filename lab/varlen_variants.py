"""Other ways to train and sample diffugpt_varlen.py: no shift, PADs shown in training, rows that
show their EOS, length heads; a repetition penalty, shorter continuations, LLaDA's order.

    python lab/varlen_variants.py --no-shift --out out/no_shift
    python lab/varlen_variants.py --pad-masked-perc 0.05 --pad-annealing-steps 500 --out out/pad
    python lab/varlen_variants.py --tail-share 0.4 --eos-share 0.4 --head hazard --out out/hazard
    python lab/varlen_variants.py sample --repetition-penalty 1.2 --max-new-tokens 40
    python lab/varlen_variants.py sample --low-confidence

    (V1)  pointer head: P(L = i) is a softmax over the positions behind the prompt and "longer"
    (V2)  low confidence (Gong et al. 2024, Nie et al. 2025): draw a token for every mask, keep the
          most probable ones. It prefers EOS: a wrong distribution, even of a perfect network
"""
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python lab/varlen_variants.py`
import common
import diffugpt_varlen as script
from diffugpt_varlen import categorical, filter_logits, hazard_to_dist, length_of, top_positions


@dataclass
class Config(script.Config):
    shift: bool = True  # the hidden state before a position predicts it (E2)
    pad_masked_perc: float = 1.0  # share of PAD among the masks, other PADs are shown; 1 = natural
    pad_annealing_steps: int = 0  # optimizer steps in which that share grows from 0
    pad_weight: float = 1.0  # of PAD in the loss; 1 = the bound
    tail_share: float = 0.5  # of the rows with a prompt: everything behind it is masked
    tail_annealing_steps: int = 0  # optimizer steps in which that share grows from 0
    eos_share: float = 0.0  # of the rows with a prompt: all but the EOS is masked behind it
    head: Literal["marginal", "hazard", "pointer"] = "marginal"  # what predicts the length
    freeze: bool = False  # train that head only
    repetition_penalty: float = 1.0  # divides the logits of tokens that the row has already
    max_new_tokens: int = 0  # longest continuation; 0 = to the end of the row
    low_confidence: bool = False  # (V2), on a fixed canvas

    checkpoint_keys = (*script.Config.checkpoint_keys, "shift", "head")

    def problems(self):
        rules = {
            "--pad-masked-perc must be in (0, 1]": 0 < self.pad_masked_perc <= 1,
            "--tail-share and --eos-share are shares: together at most 1":
                self.tail_share + self.eos_share <= 1,
            "--freeze trains the length head alone: add --head hazard or pointer":
                not self.freeze or self.head != "marginal",
            "--repetition-penalty must be more than 0": self.repetition_penalty > 0,
            "--max-new-tokens continues a --prompt: leave --infill out":
                not (self.max_new_tokens and self.infill)}
        return super().problems() + [text for text, holds in rules.items() if not holds]


# ---- model ---------------------------------------------------------------------------------------
class Model(script.Model):
    """The script's, perhaps without the shift, perhaps with a length head."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.cfg = cfg
        if cfg.head != "marginal" and cfg.pipeline == "diffusion":
            self.length_head = nn.Linear(cfg.n_embd, 1)
            self.longer_than_canvas = nn.Parameter(torch.zeros(1))  # of the pointer head
            nn.init.zeros_(self.length_head.weight)
            nn.init.zeros_(self.length_head.bias)

    def hidden_states(self, idx, attention_mask=None):
        if self.cfg.shift or self.cfg.pipeline == "arm":
            return super().hidden_states(idx, attention_mask)
        return self.trunk(idx, attention_mask)[:, 1:]


def init_model(cfg, Model, data, device):
    """As diffugpt_varlen.init_model; a length head is new."""
    model = script.init_model(dataclasses.replace(cfg, head="marginal"), Model, data, device)
    if cfg.head == "marginal":
        return model
    with_head = Model(cfg).to(device)
    with_head.load_state_dict(with_head.state_dict() | model.state_dict())
    return with_head


def length_head_dist(model, h, m, cfg):
    """log P(L) that the length head predicts from hidden states h (B, T, C) behind prompts of m
    (B,) tokens: (B, T + 1), column T is "longer than the canvas"."""
    score = model.length_head(h).float()[..., 0]  # (B, T)
    if cfg.head == "hazard":
        return hazard_to_dist(F.logsigmoid(score), F.logsigmoid(-score), m)
    in_prompt = torch.arange(score.shape[1], device=score.device) < m[:, None]
    longer = model.longer_than_canvas.float().expand(len(score), 1)
    return torch.cat((score.masked_fill(in_prompt, -torch.inf), longer), 1).log_softmax(1)  # (V1)


@torch.no_grad()
def length_dist(model, x, m, cfg):
    """As diffugpt_varlen.length_dist, by the length head if there is one."""
    if getattr(cfg, "head", "marginal") == "marginal":
        return script.length_dist(model, x, m, cfg)
    is_wanted = torch.arange(x.shape[1], device=x.device) >= m[:, None]
    h = model.hidden_states(x.masked_fill(is_wanted, cfg.vocab_size + 1))
    return length_head_dist(model, h, m, cfg)


# ---- corrupt and loss ----------------------------------------------------------------------------
def at_step(cfg, step):
    """The Config of an optimizer step: shares that grow depend on the step and on nothing else."""
    grows = dict(pad_masked_perc=cfg.pad_annealing_steps, tail_share=cfg.tail_annealing_steps)
    return dataclasses.replace(cfg, **{
        name: getattr(cfg, name) * min(1.0, (step + 1) / steps)
        for name, steps in grows.items() if steps})


def random_prompts(x, cfg, g):
    """As diffugpt_varlen.random_prompts: what may be masked in canvases x (B, T), and the rows in
    which all of it is; here the EOS of some rows may not be masked, and most PADs are shown."""
    (B, T), (kind, u) = x.shape, torch.rand(2, len(x), 1, generator=g).to(x.device)
    m = torch.where(kind < cfg.p_prompt, (u * (T // 2)).ceil().long(), 0)  # (B, 1)
    allowed = (torch.arange(T, device=x.device) >= m) & (m <= length_of(x, cfg)[:, None])
    allowed &= ~((kind < cfg.p_prompt * cfg.eos_share) & (x == cfg.eos))
    if cfg.pad_masked_perc < 1 and cfg.rows == "docs":
        is_pad = allowed & (x == cfg.vocab_size)
        n_pad, n_text = is_pad.sum(1, keepdim=True), (allowed & ~is_pad).sum(1, keepdim=True)
        keep = cfg.pad_masked_perc / (1 - cfg.pad_masked_perc) * n_text / n_pad.clamp(min=1)
        allowed &= ~is_pad | (torch.rand(B, T, generator=g).to(x.device) < keep)
    return allowed, (kind < cfg.p_prompt * (cfg.eos_share + cfg.tail_share))[:, 0]


def corrupt(x0, cfg, g, step):
    """As diffugpt_varlen.corrupt. With a --pad-weight other than 1 the loss is not the bound."""
    x, xt, weight, mask = script.corrupt(x0, at_step(cfg, step), g, step, random_prompts)
    return x, xt, weight * torch.where(x == cfg.vocab_size, cfg.pad_weight, 1.0), mask


def loss_fn(model, x, xt, weight, attention_mask):
    """As diffugpt_varlen.loss_fn; rows that mask everything behind their prompt also teach the
    length head: -log P(L), mean over the batch."""
    cfg = model.cfg
    if cfg.head == "marginal" or cfg.pipeline == "arm":
        return script.loss_fn(model, x, xt, weight, attention_mask)
    h = model.hidden_states(xt, attention_mask)
    h = h.detach() if cfg.freeze else h
    is_mask, L = xt != x, length_of(x, cfg)
    m = (~is_mask).cumprod(1).sum(1)
    whole = (m + is_mask.sum(1) == x.shape[1]) & (m <= L)
    logp = length_head_dist(model, h[whole], m[whole], cfg).gather(1, L[whole, None])
    loss = -logp.sum() / (cfg.batch_size * cfg.grad_accum)
    if cfg.freeze:
        return loss
    is_target = weight > 0
    logits = F.linear(h[is_target], model.transformer.wte.weight[:model.num_outputs]).float()
    ce = F.cross_entropy(logits, x[is_target], reduction="none")
    return loss + (weight[is_target] * ce).sum()


# ---- sample --------------------------------------------------------------------------------------
class Penalized:
    """A model whose predictions obey a repetition penalty (Keskar et al. 2019, section 4.1): logits
    of tokens that the row shows are divided by it, or multiplied if negative. Not EOS and PAD:
    each has to come once."""

    def __init__(self, model, cfg):
        self.model, self.cfg = model, cfg

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, idx, is_target=None, attention_mask=None):
        logits = self.model(idx, is_target, attention_mask).float()
        if is_target is None:  # the length distribution
            return logits
        V, penalty = self.cfg.vocab_size, self.cfg.repetition_penalty
        used = torch.zeros(len(idx), V + 2, device=idx.device).scatter(1, idx, 1.0).bool()
        used[:, self.cfg.eos] = used[:, V:] = False
        used = used[is_target.nonzero()[:, 0], :logits.shape[1]]
        return torch.where(used, torch.where(logits > 0, logits / penalty, logits * penalty),
                           logits)


@torch.no_grad()
def sample_low_confidence(model, x, cfg, g, on_step=lambda nfe, x: None):
    """(V2) on the canvas x (n, T), all of it computed: x and NFE, as diffugpt_varlen.sample."""
    V, nfe = cfg.vocab_size, 0
    x = script.to_canvas(x.masked_fill(x == V, V + 1), cfg)
    k = -(-int((x == V + 1).sum(1).max()) // cfg.num_steps) if cfg.num_steps else 1
    while (is_mask := x == V + 1).any():
        logits = model(x, is_mask).float()
        tokens, score = x.clone(), torch.zeros(x.shape, device=x.device)
        tokens[is_mask] = drawn = categorical(filter_logits(logits, cfg), g)
        score[is_mask] = logits.log_softmax(1).gather(1, drawn[:, None])[:, 0]
        count = torch.full((len(x),), k)
        x = torch.where(top_positions(score, is_mask, count, g), tokens, x)
        nfe += 1
        on_step(nfe, torch.where(x == V + 1, V, x.masked_fill(x == V, cfg.eos)))
    is_stop = ((x == cfg.eos) | (x == V)) & (cfg.rows == "docs")
    return x.masked_fill(is_stop.cumsum(1) > 0, cfg.eos), nfe


@torch.no_grad()
def sample(model, x, cfg, g, on_step=lambda nfe, x: None):
    """As diffugpt_varlen.sample, with the options of this file."""
    if cfg.repetition_penalty != 1:
        model = Penalized(model, cfg)
    T, prompt = x.shape[1], int((x[0] != cfg.vocab_size).cumprod(0).sum())
    if cfg.max_new_tokens:
        x = x[:, :prompt + cfg.max_new_tokens]  # (E5)
    if cfg.low_confidence and cfg.pipeline == "diffusion":
        x, nfe = sample_low_confidence(model, x, cfg, g, on_step)
    else:
        x, nfe = script.sample(model, x, cfg, g, on_step, length_dist)
    return (F.pad(x, (0, T - x.shape[1]), value=cfg.eos) if cfg.rows == "docs" else x), nfe


def main(argv):
    script.main(argv, Config, Model, corrupt=corrupt, loss_fn=loss_fn, sample=sample,
                init_model=init_model)


if __name__ == "__main__":
    common.run_main(main)
