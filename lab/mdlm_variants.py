"""Other ways to train mdlm.py: noise schedules, losses, draws of t, independent masks, time
conditioning.

    python lab/mdlm_variants.py --schedule cosine --loss nelbo --out out/cosine
    python lab/mdlm_variants.py --cond adaln --no-exact-count --t-sampler iid --out out/adaln
    python lab/mdlm_variants.py sample --out out/adaln
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python lab/mdlm_variants.py`
import common
import mdlm


@dataclass
class Config(mdlm.Config):
    schedule: str = "power0.5"  # of training: power0.5 (mdlm.py below 4000 steps), linear (the
    # bound; mdlm.py from there on), powerK, cosine, log-linear, mdlm-loglinear, maskgit
    loss: Literal["mean_per_sequence", "mean_per_batch", "nelbo"] = "mean_per_sequence"
    t_sampler: Literal["iid", "stratified", "low_discrepancy", "antithetic"] = "low_discrepancy"
    exact_count: bool = True  # mask exactly n tokens, or each with probability gamma (E1)
    cond: Literal["none", "add", "table", "adaln"] = "none"  # how the network is told the mask rate

    def problems(self):
        return [] if is_schedule(self.schedule) else [no_schedule(self.schedule)]


# ---- noise schedules -----------------------------------------------------------------------------
SCHEDULES = {  # name: mask rate gamma(t), its derivative, its inverse
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


def is_schedule(name):
    """Is it in SCHEDULES, or powerK with a number K > 0?"""
    power = name[5:].replace(".", "", 1)
    return name in SCHEDULES or name[:5] == "power" and power.isdigit() and float(name[5:]) > 0


def no_schedule(name):
    """The sentence about a name that is no schedule."""
    if name in ("loglinear", "log_linear"):
        return (f"schedule '{name}' is ambiguous: in SEDD and MDLM it is the mask rate (1 - eps) t "
                "(mdlm-loglinear; without eps: linear), elsewhere 1 - (1 - t)^2 (log-linear)")
    return (f"unknown schedule '{name}': choose {', '.join(SCHEDULES)} or powerK; MD4's cosine is "
            "maskgit here, its polynomials are powerK")


def get_schedule(name):
    """Name -> (gamma, its derivative, its inverse), functions of tensors in [0, 1]; powerK: t^K."""
    if not is_schedule(name):
        raise common.UserError(no_schedule(name))
    if name in SCHEDULES:
        return SCHEDULES[name]
    k = float(name[5:])
    return lambda t: t ** k, lambda t: k * t ** (k - 1), lambda y: y ** (1 / k)


# ---- corrupt -------------------------------------------------------------------------------------
DRAWS = {  # how B times are drawn, each uniform; all but iid spread them evenly over the batch
    "iid": lambda B, g: torch.rand(B, generator=g),
    "stratified": lambda B, g: (torch.arange(B) + torch.rand(B, generator=g)) / B,
    "low_discrepancy": lambda B, g: (torch.arange(B) / B + torch.rand(1, generator=g)) % 1,
    "antithetic": lambda B, g: torch.cat([u := torch.rand((B + 1) // 2, generator=g),
                                          1 - u])[:B].clamp(max=1 - 2 ** -24),
}


def mask_independently(x0, gamma, cfg, g):
    """(E1): mask each token of x0 (B, T) with probability gamma (B,)."""
    is_mask = (torch.rand(x0.shape, generator=g) < gamma[:, None]).to(x0.device)
    return x0.masked_fill(is_mask, cfg.vocab_size)


def corrupt(x0, cfg, g):
    """As mdlm.corrupt, for every schedule, loss and draw of t: xt and the weight of each token in
    the loss, both (B, T). mean_per_sequence averages each row over its masked tokens, then the rows
    (the bound only if the schedule is linear); mean_per_batch averages all masked tokens (no
    bound); nelbo has the weight of (E3), the bound for every schedule that reaches 1."""
    B, T = x0.shape
    gamma_of, rate_of, inverse = get_schedule(cfg.schedule)
    t = DRAWS[cfg.t_sampler](B, g)
    gamma = gamma_of(t)
    if cfg.exact_count:
        n = (1 + (T * gamma).floor().long()).clamp(max=T)
        xt = mdlm.mask_tokens(x0, n, cfg, g)
        p = inverse(n / T).clamp(max=1) - inverse((n - 1) / T)  # of n; linear: 1 / T
        weight = 1 / (T * p)
    else:
        xt = mask_independently(x0, gamma, cfg, g)
        n = (xt != x0).sum(1).cpu()
        weight = (rate_of(t) / gamma).nan_to_num(0, 0) * n / T  # t may be 0
    row = {"mean_per_sequence": 1 / n.clamp(min=1) / (n > 0).sum().clamp(min=1),
           "mean_per_batch": 1 / n.sum().clamp(min=1).expand(B),
           "nelbo": weight / n.clamp(min=1) / B}[cfg.loss]
    return xt, (xt != x0) * row[:, None].to(x0.device)


# ---- time conditioning ---------------------------------------------------------------------------
class AdaBlock(mdlm.Block):
    """adaLN (Peebles & Xie 2023). Its gates start at one, not at zero: the residual outputs are
    zero already, and both together would never learn."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.ada_head = nn.Linear(cfg.n_embd, 6 * cfg.n_embd)
        nn.init.zeros_(self.ada_head.weight)
        nn.init.zeros_(self.ada_head.bias)

    def forward(self, x, positions, noise):
        a1, b1, c1, a2, b2, c2 = self.ada_head(noise).chunk(6, -1)
        x = self.convolve(x)
        x = x + (1 + c1) * self.attn(self.norm1(x) * (1 + a1) + b1, positions)
        return x + (1 + c2) * self.mlp(self.norm2(x) * (1 + a2) + b2)


class Model(mdlm.Model):
    """mdlm.Model that is told the mask rate, the share of masks in its own input: as a sinusoidal
    embedding that is added, a learned table of 64 rates, or by adaLN. Zero at initialisation."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.cond, self.mask = cfg.cond, cfg.vocab_size
        if cfg.cond == "table":
            self.noise_head = nn.Embedding(64, cfg.n_embd)
            nn.init.zeros_(self.noise_head.weight)
        if cfg.cond in ("add", "adaln"):
            self.noise_in = nn.Linear(2 * 64, cfg.n_embd)
            nn.init.normal_(self.noise_in.weight, std=0.02)
            nn.init.zeros_(self.noise_in.bias)
        if cfg.cond == "add":
            self.noise_head = nn.Linear(cfg.n_embd, cfg.n_embd)
            nn.init.zeros_(self.noise_head.weight)
            nn.init.zeros_(self.noise_head.bias)
        if cfg.cond == "adaln":
            blocks = nn.ModuleList(AdaBlock(cfg) for _ in range(cfg.n_layer))
            blocks.load_state_dict(self.blocks.state_dict(), strict=False)
            self.blocks = blocks

    def embed_noise(self, idx):
        """ids (B, T) -> (B, 1, C)."""
        gamma = (idx == self.mask).float().mean(1)
        if self.cond == "table":
            return self.noise_head((gamma * 64).long().clamp(0, 63))[:, None]
        angle = 1000 * gamma[:, None] * 10000 ** (-torch.arange(64, device=gamma.device) / 64)
        h = F.silu(self.noise_in(torch.cat((angle.cos(), angle.sin()), 1)))[:, None]
        return self.noise_head(h) if self.cond == "add" else h

    def embed(self, idx):
        x = super().embed(idx)
        return x + self.embed_noise(idx) if self.cond in ("add", "table") else x

    def forward(self, idx, is_target=None):
        if self.cond != "adaln":
            return super().forward(idx, is_target)
        x, noise = self.embed(idx), self.embed_noise(idx)
        positions = torch.arange(idx.shape[1], device=idx.device)
        for block in self.blocks:
            x = block(x, positions, noise)
        x = self.norm(x)
        return self.head(x if is_target is None else x[is_target])


def main(argv):
    return mdlm.main(argv, Config, Model, corrupt=corrupt)


if __name__ == "__main__":
    common.run_main(main)
