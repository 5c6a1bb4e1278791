"""Variants of bit_diffusion.py: heads that predict bits, mixtures, orders of codes, inputs, losses,
samplers, guidance, and the bound of few steps. By default all is as in the script.

    python lab/bit_variants.py --head bit --out out/bit_head    predict the clean bits, BCE (V1)
    python lab/bit_variants.py --head bit --num-mixture 32 --out out/bit_mixture
    python lab/bit_variants.py --head bit --code semantic --loss nelbo --out out/bit_semantic
    python lab/bit_variants.py --head bit --num-mixture 32 --input byte --tokenizer gpt2
    python lab/bit_variants.py sample --out out/bit_head --prompt "Once upon a time" --guidance 1

Equations; l_k is the log-odds of bit k to be +1, and (E1) to (E8) are in bit_diffusion.py.
    (V1)  bit head: l_k = net_k + lam b_k, loss -sum_k ln sigmoid(b_0,k l_k): binary cross-entropy
    (V2)  a mixture of M such products: Bayes' rule multiplies the weight of product j by
          prod_k cosh(l_jk / 2) / cosh(net_jk / 2)
    (V3)  from bits to tokens, codes of no token ruled out: p(v) = softmax_v(1/2 U_v.l)
    (V4)  a step of sampler bit: each bit by itself, f^ = m f(1) + (1 - m) f(-1), f of (E7),
          m = p(b_0 = b_t | b) = sigmoid(b_t l); sampler token: (E8), or bits of one product
    (V5)  N steps, bit: sum E KL(f || f^); token: E log q(b_s | b_t, x_0) - log sum_v p_v q(b_s |
          b_t, U_v); where s is clean, the cross-entropy of the token
    (V6)  guidance by given text c: out + w (out - out without c)
"""
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python lab/bit_variants.py`
import bit_diffusion
import common
from bit_diffusion import (CLEAN, bits_to_int, categorical, filter_logits, flip_probability,
                           get_batch, nelbo_integrand, noise_levels, position_times, q_sample,
                           reassign_times, token_codes)
from data.prepare import load_data


@dataclass
class Config(bit_diffusion.Config):
    head: Literal["token", "bit"] = "token"  # V logits, or the log-odds of K bits (V1)
    num_mixture: int = 1  # M products of bits that are mixed (V2), a power of 2: M (K + 1) outputs
    code: Literal["id", "random", "frequency", "semantic"] = "id"  # order in which codes count up
    loss: Literal["ce", "nelbo"] = "ce"  # cross-entropy of tokens or bits, or the bound (E6)
    add_likelihood: bool = True  # add the self-likelihood to the outputs (E4)
    input: Literal["token", "byte", "bit", "raw"] = "token"  # embeddings of what; raw: noisy bits
    cond: Literal["none", "add"] = "none"  # whether the network is told the noise level
    prefix: float = 0.0  # share of rows whose beginning, of random length, is clean in training
    sampler: Literal["token", "bit"] = "token"  # a step draws tokens (E8) or bits (V4)
    invalid: Literal["project", "modulo"] = "project"  # codes of no token: draw a token (V3)
    guidance: float = 0.0  # classifier-free guidance by the given text (V6)
    checkpoint_keys = ("head", "num_mixture", "code", "add_likelihood", "input", "cond")

    def problems(self):
        out, M = super().problems(), self.num_mixture
        if self.head == "bit" and (self.top_k or self.top_p < 1):
            out.append("--top-k and --top-p cut tokens, --head bit draws bits: use --temperature")
        if self.prefix > 1:
            out.append(f"--prefix is {self.prefix}, more than 1")
        if M < 1 or M & M - 1:
            out.append(f"--num-mixture is {M}, it must be a power of 2")
        if M > 1 and self.head == "token":
            out.append("--num-mixture mixes products of bits: add --head bit")
        return out


# ---- codes ---------------------------------------------------------------------------------------
def ids_of(bits, codes):
    """Codes back to tokens: +-1 (..., K) -> ids (...), V for codes of no token."""
    V = len(codes)
    return F.pad(bits_to_int(codes, V).argsort(), (0, 1), value=V)[bits_to_int(bits, V)]


def semantic_order(rows, frequent):
    """The V tokens in an order (V,) in which those with like neighbours in the rows (N, T) share
    their leading bits: all tokens are cut in two along the direction in which they differ most,
    then each half. The neighbours that count are the first 512 tokens of `frequent` (V,)."""
    V, rank, top = len(frequent), frequent.argsort(), min(len(frequent), 512)
    counts = torch.zeros(V, 2, top)
    for side, own, other in ((0, rows[:, 1:], rows[:, :-1]), (1, rows[:, :-1], rows[:, 1:])):
        keep = rank[other] < top
        index = own[keep], torch.full_like(own[keep], side), rank[other[keep]]
        counts.index_put_(index, torch.ones(()), accumulate=True)
    points = F.normalize(counts.log1p().flatten(1), dim=1)
    points -= points.mean(0)
    points = points.double() @ torch.linalg.eigh((points.T @ points).double())[1][:, -32:]
    groups, size = [torch.arange(V)], 1 << (V - 1).bit_length()
    while size > 1:
        size //= 2  # tokens that half a group can hold
        halves = []
        for group in groups:
            x = points[group] - points[group].mean(0)
            group = group[(x @ torch.linalg.eigh(x.T @ x)[1][:, -1]).argsort(stable=True)]
            halves += [group[:size], group[size:]]
        groups = [group for group in halves if len(group)]
    return torch.cat(groups)


def order_tokens(cfg):
    """The tokens in the order in which their codes count up, (V,): by id, at random, or by counts
    of 4000 training rows."""
    if cfg.code == "id":
        return torch.arange(cfg.vocab_size)
    if cfg.code == "random":
        return torch.randperm(cfg.vocab_size, generator=torch.Generator().manual_seed(cfg.seed))
    rows = get_batch(load_data(cfg).train, dataclasses.replace(cfg, batch_size=4000, grad_accum=1),
                     torch.Generator().manual_seed(0))
    counts = rows.flatten().bincount(minlength=cfg.vocab_size)
    frequent = counts.argsort(descending=True, stable=True)
    return frequent if cfg.code == "frequency" else semantic_order(rows, frequent)


# ---- model ---------------------------------------------------------------------------------------
class Model(bit_diffusion.Model):
    """bit_diffusion.Model with every head and input. Outputs for n positions: logits (n, V), log-
    odds of bits (n, K), or of M products and, last, their log-weights (n, M, K + 1). Its buffer
    `codes` counts up by id until new_model or a checkpoint says otherwise."""

    def __init__(self, cfg):
        super().__init__(cfg)
        (V, K), C, M, self.cfg = self.codes.shape, cfg.n_embd, cfg.num_mixture, cfg
        if cfg.input == "byte":  # a table for every eight bits: no matrix has V rows
            self.wte = nn.ModuleList(nn.Embedding(2 ** min(8, K - k), C) for k in range(0, K, 8))
        if cfg.input in ("bit", "raw"):
            self.wte = nn.Linear(K, C, bias=False)
        if cfg.head == "bit":
            self.head = nn.Linear(C, K if M == 1 else M * (K + 1))
        if cfg.cond == "add":
            self.noise_in, self.noise_head = nn.Linear(2 * 64, C), nn.Linear(C, C)
        for name, p in self.named_parameters():
            if name.startswith(("noise_head.weight", "head", "noise_in.bias", "noise_head.bias")):
                nn.init.zeros_(p)
            elif name.startswith("noise_in") or name.startswith("wte") and cfg.input != "token":
                nn.init.normal_(p, std=0.02)
        if M > 1:  # products that begin alike stay alike: each leans to its own leading bits; the
            lean = token_codes(M)[:, :K]  # mixture of them all is uniform still
            self.head.bias.data.view(M, K + 1)[:, :lean.shape[1]] = lean

    def expected(self, wte, codes, bits, lam):
        """Expected embedding given the noisy bits alone: table wte of codes (U, k), bits (n, k),
        lam (n,) -> (n, C). A clean code has its own embedding."""
        x, is_clean = torch.zeros(len(lam), self.cfg.n_embd, device=bits.device), lam >= CLEAN
        x[is_clean] = wte(ids_of(bits[is_clean], codes)).to(x.dtype)
        with torch.autocast(bits.device.type, enabled=False):
            p = (0.5 * lam[~is_clean][:, None] * bits[~is_clean] @ codes.T).softmax(1)  # (E3)
        x[~is_clean] = (p @ wte.weight).to(x.dtype)
        return x

    def embed(self, bits, lam):
        if self.cfg.input in ("bit", "raw"):
            x = self.wte(bits if self.cfg.input == "raw" else (lam / 2).tanh()[..., None] * bits)
        else:
            x, is_seen = torch.zeros(*lam.shape, self.cfg.n_embd, device=lam.device), lam > 0
            tables = [(self.wte, self.codes)] if self.cfg.input == "token" else [
                (wte, token_codes(len(wte.weight)).to(bits)) for wte in self.wte]
            for (wte, codes), part in zip(tables, bits[is_seen].split(
                    8 if self.cfg.input == "byte" else bits.shape[2], 1)):
                x[is_seen] += self.expected(wte, codes, part, lam[is_seen])
        if self.cfg.cond == "add":
            freq = 10000 ** (-torch.arange(64, device=lam.device) / 64)
            angle = 1000 * (lam / 2).tanh()[..., None] * freq
            noise = F.silu(self.noise_in(torch.cat((angle.cos(), angle.sin()), -1)))
            x = x + 0.1 * self.noise_head(noise)  # 0.1: AdamW moves these weights fast
        return x

    def forward(self, bits, lam, is_target=None):
        x = self.embed(bits, lam) + self.wpe.weight[:lam.shape[1]]
        positions = torch.arange(x.shape[1], device=x.device)
        for block in self.blocks:
            x = block(x, positions)
        x = self.norm(x)
        if is_target is not None:
            x, bits, lam = x[is_target], bits[is_target], lam[is_target]
        out = self.head(x).float()
        out = out if self.cfg.num_mixture == 1 else out.unflatten(-1, (self.cfg.num_mixture, -1))
        return bayes_update(self, out, bits, lam) if self.cfg.add_likelihood else out


def new_model(cfg):
    """The Model that training begins with: its codes count up in the order of --code."""
    model = Model(cfg)
    model.codes[order_tokens(cfg)] = token_codes(cfg.vocab_size)
    return model


# ---- what the outputs of each head mean ----------------------------------------------------------
def bayes_update(model, out, bits, lam):
    """Bayes' rule: add to the outputs `out` what the position's own noisy bits (..., K) say, right
    with log-odds lam (...). -lam takes it away again. In float32, also under autocast."""
    out = out.float()
    if model.cfg.head == "token":
        return out + model.self_likelihood(bits, lam)  # (E3) (E4)
    own = lam[..., None] * bits
    if model.cfg.num_mixture == 1:
        return out + own  # (V1)
    net, weight, own = out[..., :-1], out[..., -1], own[..., None, :]
    gain = (F.softplus(net + own) - F.softplus(net) - own / 2).sum(-1)  # of ln cosh
    return torch.cat((net + own, (weight + gain)[..., None]), -1)  # (V2)


def products(out):
    """Outputs of a bit head as products that are mixed: log-odds (n, M, K), log-weights (n, M)."""
    if out.dim() == 2:
        return out[:, None], torch.zeros_like(out[:, :1])
    return out[..., :-1], out[..., -1].log_softmax(1)


def bit_logits(model, out):
    """Log-odds of each bit to be +1: outputs -> (n, K), float64."""
    if model.cfg.head == "token":
        return bit_diffusion.bit_logits(model, out)  # (E5)
    if model.cfg.num_mixture == 1:
        return out.double()
    l_k, weight = products(out.double())
    yes, no = (F.logsigmoid(y * l_k).add(weight[..., None]).logsumexp(1) for y in (1, -1))
    return yes - no


def cross_entropy(model, out, x0):
    """-log p of the tokens x0 (n,), or of their codes: (n,)."""
    if model.cfg.head == "token":
        return F.cross_entropy(out, x0, reduction="none")
    if model.cfg.num_mixture == 1:  # predict the clean bits
        is_one = (model.codes[x0] > 0).to(out.dtype)
        return F.binary_cross_entropy_with_logits(out, is_one, reduction="none").sum(1)  # (V1)
    l_k, weight = products(out)
    return -(weight + F.logsigmoid(l_k * model.codes[x0][:, None]).sum(2)).logsumexp(1)  # (V2)


def confidence(model, out):
    """Probability of the most likely token, or code of the most likely product: (n,)."""
    if model.cfg.head == "token":
        return out.softmax(1).amax(1)
    l_k, weight = products(out)
    return (weight + F.logsigmoid(l_k.abs()).sum(2)).amax(1).exp()


# ---- corrupt, loss, bounds -----------------------------------------------------------------------
def corrupt(x0, cfg, g):
    """As bit_diffusion.corrupt, but flips (B, T, K) of +-1 in place of noisy bits, since the model
    has the codes. --loss nelbo: each token's weight is -d lam / dt, over B T."""
    (B, T), K = x0.shape, max(1, (cfg.vocab_size - 1).bit_length())
    u = ((torch.arange(B) + torch.rand(1, generator=g)) / B)[:, None]  # low-discrepancy
    is_tilted = cfg.loss != "nelbo" and cfg.steps < 4000
    t = (0.1 + 0.9 * u) ** 0.75 if is_tilted else u
    is_given = None
    if cfg.prefix:
        share = (torch.rand(B, 1, generator=g) < cfg.prefix) * torch.rand(B, 1, generator=g)
        is_given = torch.arange(T) < (T * share).floor()
    lam, slope = noise_levels(t, position_times(x0.shape, cfg, g, is_given), cfg)
    is_noisy = lam < CLEAN
    weight = is_noisy / is_noisy.sum(1, keepdim=True).clamp(min=1) / B
    if cfg.loss == "nelbo":
        weight = (slope / (B * T)).float()
    flips = q_sample(torch.ones(B, T, K, device=x0.device), lam.to(x0.device), g)
    return flips, lam.to(x0.device), weight.to(x0.device)


def loss_fn(model, x0, flips, lam, weight):
    """--loss ce: cross-entropy of the noisy tokens, or BCE of their bits; nelbo: (E6) per token."""
    is_target, clean = weight > 0, model.codes[x0]
    bits = clean * flips
    out = model(bits, lam, is_target)
    if model.cfg.loss == "ce":
        cost = cross_entropy(model, out, x0[is_target])
    else:
        cost = nelbo_integrand(bit_logits(model, out), bits[is_target], clean[is_target],
                               lam[is_target]).float()
    return (cost * weight[is_target]).sum()


@torch.no_grad()
def nelbo(model, x0, cfg, g, draws=8, is_given=None):
    """bit_diffusion.nelbo for every head."""
    is_given = torch.zeros(x0.shape, dtype=torch.bool) if is_given is None else is_given.cpu()
    clean, u = model.codes[x0], torch.rand(len(x0), 1, generator=g)
    tau = position_times(x0.shape, cfg, g, is_given)
    first = tau.amin(1, keepdim=True).clamp(max=1)
    last = tau.masked_fill(is_given, -cfg.noise_window).amax(1, keepdim=True) + cfg.noise_window
    total = torch.zeros(len(x0)).double()
    for k in range(draws):
        lam, slope = noise_levels(first + (last - first) * (k + u) / draws, tau, cfg)
        bits, nats = q_sample(clean, lam.to(x0.device), g), torch.zeros(x0.shape).double()
        for i in torch.arange(len(x0)).split(64):
            lam_i, target = lam[i].to(x0.device), (slope[i] > 0).to(x0.device)
            l_k = bit_logits(model, model(bits[i], lam_i, target))
            cost = nelbo_integrand(l_k, bits[i][target], clean[i][target], lam_i[target])
            nats[i] = nats[i].masked_scatter(slope[i] > 0, cost.cpu())
        total += ((last - first) / draws * slope * nats).sum(1)  # (E6)
    return total


@torch.no_grad()
def nelbo_steps(model, x0, cfg, g, steps):
    """Upper bound (V5) on -log p of the sampler of so many steps in random order, unbiased: (B,)
    nats per row. For sampler bit it counts that codes of no token are drawn again (V3); for the
    products of a mixture it does not, and is a little larger."""
    clean, tau = model.codes[x0], position_times(x0.shape, cfg, g)
    is_one, total = (model.codes > 0).double(), torch.zeros(len(x0)).double()
    for k in range(steps, 0, -1):
        lam, lam_s = (noise_levels(t / steps, tau, cfg)[0].to(x0.device) for t in (k, k - 1))
        bits, target = q_sample(clean, lam, g), lam_s > lam
        if not target.any():
            continue
        out, is_last = model(bits, lam, target).float(), lam_s[target] >= CLEAN
        b_0, b_t, x0_last = clean[target], bits[target], x0[target][is_last]
        right, wrong = (flip_probability(lam[target], lam_s[target], y)[:, None] for y in (1, -1))
        f = torch.where(b_t == b_0, right, wrong)
        if cfg.sampler == "bit" or cfg.head == "bit" and cfg.num_mixture == 1:
            l_k = bit_logits(model, out)
            f_hat = right * (b_t * l_k).sigmoid() + wrong * (-b_t * l_k).sigmoid()  # (V4)
            nats = (f * (f / f_hat).log() + (1 - f) * ((1 - f) / (1 - f_hat)).log()).sum(1)  # (V5)
            end = F.cross_entropy(0.5 * l_k[is_last] @ model.codes.double().T, x0_last,
                                  reduction="none")  # (V3)
        else:
            flips = torch.rand(f.shape, generator=g, dtype=torch.float64).to(f.device) < f
            # log q(b_s | b_t, b_0) of the b_s just drawn, for b_0 = +1 and b_0 = -1: (n, K) each
            plus, minus = (torch.where(flips, p, 1 - p).log() for p in (
                torch.where(b_t == y, right, wrong) for y in (1, -1)))
            if cfg.head == "token":
                log_q = out.double().log_softmax(1) + plus @ is_one.T + minus @ (1 - is_one).T
            else:
                l_k, weight = products(out.double())
                log_q = weight + torch.logaddexp(F.logsigmoid(l_k) + plus[:, None],
                                                 F.logsigmoid(-l_k) + minus[:, None]).sum(2)
            nats = torch.where(b_0 > 0, plus, minus).sum(1) - log_q.logsumexp(1)  # (V5)
            end = cross_entropy(model, out[is_last].double(), x0_last)
        nats[is_last] = end
        total += torch.zeros(x0.shape).double().masked_scatter(target.cpu(), nats.cpu()).sum(1)
    return total


# ---- sample --------------------------------------------------------------------------------------
def guided(model, bits, lam, is_target, is_given, w, g):
    """Outputs moved away from those without the given text, in whose place is noise (V6)."""
    noise = torch.where(is_given[..., None], q_sample(bits, 0 * lam, g), bits)
    own = bits[is_target], lam[is_target]
    out, uncond = (bayes_update(model, y, own[0], -own[1]) for y in (
        model(bits, lam, is_target), model(noise, lam.masked_fill(is_given, 0.0), is_target)))
    return bayes_update(model, out + w * (out - uncond), *own)


def draw_x0(model, out, bits, lam, cfg, g):
    """Codes (n, K) that a step goes for, and the log-odds they were drawn with, None for tokens.
    Sampler token draws tokens, or the bits of one product; bit draws each bit by itself. The
    temperature acts on what the context says; the self-likelihood is an observation."""
    if cfg.head == "token":
        if cfg.sampler == "token":
            return bit_diffusion.draw_x0(model, out, bits, lam, cfg, g), None  # (E8)
        logits = filter_logits(bayes_update(model, out, bits, (cfg.temperature - 1) * lam), cfg)
        l_k = bit_logits(model, logits).clamp(-CLEAN, CLEAN)
    else:
        out = bayes_update(model, out, bits, -lam) / max(cfg.temperature, 1e-6)
        out = bayes_update(model, out, bits, lam)
        l_k = bit_logits(model, out)
        if cfg.sampler == "token":
            l_k, weight = products(out.double())
            l_k = l_k[torch.arange(len(l_k)), categorical(weight, g)]
    u = torch.rand(l_k.shape, generator=g, dtype=torch.float64).to(l_k.device)
    return torch.where(u < l_k.sigmoid(), 1.0, -1.0), l_k  # (V4)


@torch.no_grad()
def sample_and_count(model, x, cfg, g, on_step=lambda nfe, x: None):
    """As bit_diffusion.sample, also the raw invalid rate: the share of wanted positions that came
    out as the code of no token. --invalid makes tokens of them: project draws again among the
    tokens, modulo counts on from the first code."""
    x, V, nfe, num_invalid, device = x.clone(), cfg.vocab_size, 0, 0, x.device
    length_first = cfg.length_first and cfg.rows == "docs" and cfg.head == "token"
    if length_first and (x[:, -1] == V).any():
        x, nfe = bit_diffusion.draw_length(model, x, cfg, g), 1
        on_step(nfe, x)
    is_given, codes = x != V, model.codes
    is_guided = cfg.guidance > 0 and is_given.any().item()
    bits = q_sample(codes[x.masked_fill(~is_given, 0)], is_given * CLEAN, g)
    tau = position_times(x.shape, cfg, g, is_given.cpu()).to(device)
    if cfg.order == "l2r":
        tau = reassign_times(tau, ~is_given, -(~is_given).cumsum(1).float())
    steps = cfg.num_steps or x.shape[1]
    for k in range(steps, 0, -1):
        lam, lam_s = (noise_levels(t / steps, tau, cfg)[0] for t in (k, k - 1))
        if not (lam_s > lam).any():
            continue
        is_target = lam < CLEAN if cfg.order == "maxprob" else lam_s > lam
        out = guided(model, bits, lam, is_target, is_given, cfg.guidance, g) if is_guided else \
            model(bits, lam, is_target)
        nfe += 1 + is_guided
        if length_first:
            out[:, cfg.eos] = -torch.inf
        if cfg.order == "maxprob":
            score = torch.zeros(x.shape, device=device)
            score[is_target] = confidence(model, out)
            tau = reassign_times(tau, is_target & (lam == 0), score)
            lam_s = noise_levels((k - 1) / steps, tau, cfg)[0]
            out, is_target = out[(lam_s > lam)[is_target]], lam_s > lam
        bits_t, is_last = bits[is_target], lam_s[is_target] >= CLEAN
        U_v, l_k = draw_x0(model, out, bits_t, lam[is_target], cfg, g)
        ids = ids_of(U_v, codes)
        bad = is_last & (ids == V)
        num_invalid += bad.sum().item()
        if bad.any() and cfg.invalid == "project":
            ids[bad] = categorical(0.5 * l_k[bad] @ codes.double().T, g)  # (V3)
        elif bad.any():
            ids[bad] = bits_to_int(codes, V).argsort()[bits_to_int(U_v[bad], 2 * V) % V]
        f = flip_probability(lam[is_target][:, None], lam_s[is_target][:, None], bits_t * U_v)
        u = torch.rand(f.shape, generator=g, dtype=torch.float64).to(device)
        bits_s = torch.where(u < f, -bits_t, bits_t)  # (E8) (V4)
        bits[is_target] = torch.where(is_last[:, None], codes[ids.clamp(max=V - 1)], bits_s)
        x[is_target] = torch.where(is_last, ids, V)
        all_right = lam_s.sigmoid() ** bits.shape[2]
        on_step(nfe, ids_of(bits, codes).masked_fill(all_right < 0.5, V))
    return x, nfe, num_invalid / max(1, (~is_given).sum().item())


def sample(model, x, cfg, g, on_step=lambda nfe, x: None):
    """sample_and_count, which prints the raw invalid rate if there are codes of no token."""
    x, nfe, rate = sample_and_count(model, x, cfg, g, on_step)
    if (cfg.head == "bit" or cfg.sampler == "bit") and 2 ** model.codes.shape[1] > cfg.vocab_size:
        print(f"codes of no token: {rate:.2%} of the positions, --invalid {cfg.invalid}")
    return x, nfe


def main(argv):
    stored = argv[:1] in (["sample"], ["eval"])  # a checkpoint holds its codes
    return bit_diffusion.main(argv, Config, Model if stored else new_model, corrupt=corrupt,
                              loss_fn=loss_fn, nelbo=nelbo, sample=sample)


if __name__ == "__main__":
    common.run_main(main)
