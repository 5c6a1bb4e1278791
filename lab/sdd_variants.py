"""Other kinds of sdd.py: the original's forward process, attention over all candidates, candidates
that suit the context, curricula of k, another schedule, loss and self-likelihood, given beginnings,
guidance; bounds of few steps; what the candidates of a run are.

    python lab/sdd_variants.py --attention full --curriculum 1,2,4,8 --out out/full
    python lab/sdd_variants.py --candidates posterior --loss nelbo --out out/posterior
    python lab/sdd_variants.py sample --out out/sdd --prompt "Once upon a time" --guidance 1
    python lab/sdd_variants.py --process original --out out/original      no likelihood, see below
"""
import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python lab/sdd_variants.py`
import common
import sdd
from sdd import CLEAN, between


@dataclass
class Config(sdd.Config):
    process: Literal["bayes", "original"] = "bayes"  # forward process; original: no likelihood
    swap: float = 0.95  # original: probability that noise swaps a candidate at t = 1; 0 = never
    attention: Literal["pooled", "full"] = "pooled"  # over positions, or over all candidates
    candidates: Literal["likelihood", "posterior"] = "likelihood"  # posterior: suit the context
    add_likelihood: Literal["exact", "state", "none"] = "exact"  # to the network's logits (E5)
    curriculum: str = ""  # "1,2,4,8": training takes these k, one after the other, instead of --k
    schedule: Literal["exponential", "rational"] = "exponential"  # precision and own time (E4)
    loss: Literal["ce", "nelbo"] = "ce"  # cross-entropy of the noisy tokens; the bound (E6)
    prefix: float = 0.0  # share of rows whose beginning, of random length, is clean in training
    guidance: float = 0.0  # classifier-free guidance by the given text; 0 = off
    checkpoint_keys = ("process", "swap", "attention", "add_likelihood")

    def problems(self):
        bad = super().problems()
        if not all(k.isdigit() and int(k) for k in self.curriculum.split(",") if self.curriculum):
            bad.append(f"--curriculum is like 1,2,4,8, not '{self.curriculum}'")
        for name in ("swap", "prefix"):
            if getattr(self, name) > 1:
                bad.append(f"--{name} is {getattr(self, name)}, more than 1")
        if self.candidates == "posterior" and self.add_likelihood == "state":
            bad.append("--candidates posterior hold the context already, which --add-likelihood "
                       "state would count twice: use exact")
        if self.process == "original" and (self.prompt or self.infill or self.guidance):
            bad.append("--process original takes no --prompt, --infill or --guidance")
        if self.process == "original" and (self.top_k or self.top_p < 1):
            bad.append("--process original draws from all k candidates: leave --top-k and --top-p "
                       "out")
        return bad


# ---- model ---------------------------------------------------------------------------------------
class FullAttention(sdd.Attention):
    """Attention over slots; `positions` are those of slots, (B, S, 1), their log p (B, S), which is
    added to the scores, and T."""

    def forward(self, x, positions):
        (B, S, C), (positions, logp, _) = x.shape, positions
        q, k, v = self.qkv(x).view(B, S, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, k = (sdd.rotate(F.layer_norm(y, y.shape[3:]), positions) for y in (q, k))  # (B, H, S, D)
        score = q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + logp[:, None, None]
        return self.proj((score.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(B, S, C))


class FullBlock(sdd.Block):
    """All slots of a position get what the convolution sees beside it: clean tokens and other
    masses, which are the first T slots."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.attn = FullAttention(cfg)

    def forward(self, x, positions):
        at, _, T = positions
        near = self.convolve(x[:, :T]) - x[:, :T]
        x = x + near.gather(1, at.expand(x.shape))
        x = x + self.attn(self.norm1(x), positions)
        return x + self.mlp(self.norm2(x))


class Model(sdd.Model):
    """sdd.Model; with --attention full the K + 1 slots of a noisy position, its candidates and the
    other mass, take part in attention, and their mean under learned weights times p is read.
    `noise` (B, T, K, C) is added to the candidates' embeddings."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.cfg = cfg
        if cfg.curriculum:  # calls of loss_fn; a buffer, so that --resume goes on where it was
            self.register_buffer("calls", torch.tensor(0))
        if cfg.attention == "full":
            blocks = nn.ModuleList(FullBlock(cfg) for _ in range(cfg.n_layer))
            blocks.load_state_dict(self.blocks.state_dict())
            self.blocks = blocks
            self.slot_score = nn.Linear(cfg.n_embd, 1, bias=False)
            nn.init.normal_(self.slot_score.weight, std=0.02)

    def embed_slots(self, ids, logp, noise):
        """Candidates (n, K), logp (n, K + 1), noise (n, K, C) -> (n, K + 1, C)."""
        x = F.pad(self.wte(ids) + noise, (0, 0, 0, 1))
        return x + self.logp_head(F.gelu(self.logp_in(logp.clamp(min=-20)[..., None] / 10)))

    def forward(self, ids, logp, is_target=None, noise=None):
        is_full = self.cfg.attention == "full"
        if not is_full and noise is None:
            return super().forward(ids, logp, is_target)
        x, is_noisy = self.embed(ids, logp), (logp[..., 0] < 0) & (logp[..., -1] < 0)
        if noise is not None:
            mean = (logp[..., :-1].exp()[..., None] * noise).sum(2)
            x = torch.where(is_noisy[..., None], x + mean, x)
        place = self.wpe.weight[:ids.shape[1]].expand_as(x)
        x, positions = x + place, torch.arange(ids.shape[1], device=ids.device)
        if is_full:
            slots = self.embed_slots(ids[is_noisy], logp[is_noisy],
                                     0.0 if noise is None else noise[is_noisy])
            x, positions, index = self.gather_slots(x, place, slots, logp, is_noisy)
        for block in self.blocks:
            x = block(x, positions)
        if is_full:
            x = self.scatter_slots(x, logp, is_noisy, index)
        x = self.norm(x)
        net = self.head(x if is_target is None else x[is_target]).float()
        return self.CAP * (net / self.CAP).tanh()

    def gather_slots(self, x, place, slots, logp, is_noisy):
        """One sequence of all slots (B, T + M K, C): T positions, of which noisy ones hold their
        other mass, then the K candidates of up to M noisy positions of each row; what FullAttention
        takes; and which of the M places each noisy position has, (n,)."""
        (B, T, C), K = x.shape, slots.shape[1] - 1
        index, row = (is_noisy.cumsum(1) - 1)[is_noisy], is_noisy.nonzero()[:, 0]
        M = int(is_noisy.sum(1).max())
        x = x.masked_scatter(is_noisy[..., None], (slots[:, -1] + place[is_noisy]).to(x.dtype))
        more = x.new_zeros(B, M, K, C).index_put((row, index), (
            slots[:, :-1] + place[is_noisy][:, None]).to(x.dtype))
        rest = torch.where(is_noisy, logp[..., -1], 0.0)
        logp = rest.new_full((B, M, K), -torch.inf).index_put((row, index), logp[is_noisy][:, :-1])
        at = index.new_zeros(B, M).index_put((row, index), is_noisy.nonzero()[:, 1])
        at = torch.cat((torch.arange(T, device=at.device).expand(B, T),
                        at.repeat_interleave(K, 1)), 1)[..., None]  # (B, T + M K, 1)
        return (torch.cat((x, more.flatten(1, 2)), 1),
                (at, torch.cat((rest, logp.flatten(1)), 1), T), index)

    def scatter_slots(self, x, logp, is_noisy, index):
        """Back to positions (B, T, C): a noisy one is the mean of its slots."""
        T, K = is_noisy.shape[1], logp.shape[2] - 1
        x, more = x[:, :T], x[:, T:].unflatten(1, (-1, K))
        slots = torch.cat((more[is_noisy.nonzero()[:, 0], index], x[is_noisy][:, None]), 1)
        p = (self.slot_score(slots)[..., 0].float() + logp[is_noisy]).softmax(1)
        return x.masked_scatter(is_noisy[..., None], (p[:, None] @ slots)[:, 0].to(x.dtype))


# ---- candidates and self-likelihood --------------------------------------------------------------
def noise_levels(t, tau, cfg):
    """sdd.noise_levels; --schedule rational: precision 1 / t - 1 instead of -ln t, times the same
    unit, which is the other one at own time exp(1 - 1 / t)."""
    if cfg.schedule == "exponential":
        return sdd.noise_levels(t, tau, cfg)
    own = ((t - tau) / cfg.noise_window).clamp(1e-9, 1).double()
    other = (1 - 1 / own).exp()
    prec, slope = sdd.noise_levels(other * cfg.noise_window, torch.zeros_like(other), cfg)
    return prec, slope * other / own ** 2


def draw_z(x0, prec, V, g):
    """z (n, V) of the n positions of x0 (B, T) that are in between at precision prec (B, T)."""
    x0, prec = x0[between(prec)], prec[between(prec)]
    return sdd.q_sample(x0, prec, torch.randn(len(x0), V, generator=g).to(x0.device))


def top_k_state(z, k, g=None):
    """sdd.top_k_state; ties of all tokens, precision 0, give k random candidates of 1 / V each."""
    ids, logp = sdd.top_k_state(z, k)
    is_tied = z.amax(1) == z.amin(1)
    score = torch.rand(int(is_tied.sum()), z.shape[1], generator=g).to(z.device)
    ids[is_tied] = score.topk(ids.shape[1]).indices
    return ids, logp


def candidate_state(model, x, prec, z, cfg, prev=None):
    """sdd.input_state; --candidates posterior: the k largest of softmax(net + z), where net (n, V)
    is what an earlier evaluation said of these n positions, `prev`. Without it there is one more
    evaluation: the network learns to use its first prediction, but not through it."""
    ids, logp = sdd.input_state(x, prec, z, model.k)
    if cfg.candidates == "posterior" and len(z):
        if prev is None:
            with torch.no_grad():
                prev = model(ids, logp, between(prec))
        ids[between(prec)], logp[between(prec)] = sdd.top_k_state(prev + z, model.k)
    return ids, logp


def self_likelihood(ids, logp, z, add_likelihood):
    """What is added to the network's logits, (n, V): z itself; with `state` only what the
    candidates ids (n, K), logp (n, K + 1) tell, their other mass spread evenly; or nothing."""
    if add_likelihood == "exact":
        return z
    own = torch.zeros_like(z)
    if add_likelihood == "state":
        logp = logp.clamp(min=-80)
        other = logp[:, -1:] - math.log(max(1, z.shape[1] - ids.shape[1]))
        own.scatter_(1, ids, logp[:, :-1] - other)
    return own


def predict(model, x, prec, z, is_target, cfg, is_hidden=None, prev=None):
    """sdd.predict for all settings. The positions `is_hidden` (B, T) are shown to the network as if
    nothing were known; prev: see candidate_state."""
    ids, logp = candidate_state(model, x, prec, z, cfg, prev)
    shown, is_noisy = logp, between(prec)
    if is_hidden is not None:
        nothing = torch.full_like(logp, -torch.inf)
        nothing[..., -1] = 0.0
        shown = torch.where(is_hidden[..., None], nothing, logp)
    net, both = model(ids, shown, is_target), is_target & is_noisy
    own = torch.zeros_like(net)
    own[is_noisy[is_target]] = self_likelihood(ids[both], logp[both], z[is_target[is_noisy]],
                                               cfg.add_likelihood)
    return net + own, own


# ---- corrupt, loss, bounds -----------------------------------------------------------------------
def original_state(x0, t, cfg, g):
    """The original's training state of tokens x0 (B, T) at times t (B, 1): ids (B, T, K), logp
    (B, T, K + 1) and noise of a tenth of t for the embeddings, (B, T, K, C). The truth comes first,
    then k - 1 random tokens of 0.01 each; probabilities are flattened towards 1 / V; a candidate is
    replaced by a random one with probability swap t (an earlier version: 0.95 t; the last: never).
    """
    (B, T), k, V = x0.shape, cfg.k, cfg.vocab_size
    ids = torch.cat((x0[..., None].cpu(), torch.randint(V, (B, T, k - 1), generator=g)), 2)
    other = torch.randint(V, (B, T, k), generator=g)
    ids = torch.where(torch.rand(B, T, k, generator=g) < cfg.swap * t[..., None], other, ids)
    p = torch.full((k,), 0.01).index_fill(0, torch.tensor(0), 1 - 0.01 * (k - 1))
    p = (1 - t)[..., None] * p + t[..., None] / V  # (B, 1, K)
    rest = (1 - p.sum(2, keepdim=True)).clamp(min=1e-9)
    logp = torch.cat((p, rest), 2).log().expand(B, T, k + 1)
    noise = 0.1 * t[..., None, None] * torch.randn(B, T, k, cfg.n_embd, generator=g)
    return [y.to(x0.device) for y in (ids, logp, noise)]


def corrupt(x0, cfg, g):
    """sdd.corrupt. With loss nelbo the weight is d prec / 2 of (E6), per token. The original
    process: candidates, their logp and, last, the weight of each token, noise of embeddings."""
    B, T = x0.shape
    if cfg.process == "original":
        t = ((torch.arange(B) + torch.rand(1, generator=g)) / B)[:, None]
        ids, logp, noise = original_state(x0, t, cfg, g)
        return ids, torch.cat((logp, torch.full_like(logp[..., :1], 1 / (B * T))), 2), noise

    drawn = []

    def levels(t, tau, cfg):
        if cfg.prefix:
            size = (torch.rand(B, 1, generator=g) < cfg.prefix) * torch.rand(B, 1, generator=g)
            is_given = torch.arange(T) < (T * size).floor()
            tau = sdd.position_times(x0.shape, cfg, g, is_given)
        u = (t ** (1 / 0.75) - 0.1) / 0.9 if cfg.steps < 4000 else t  # evenly spread
        drawn[:] = noise_levels(u if cfg.loss == "nelbo" else t, tau, cfg)
        return drawn
    prec, eps, weight = sdd.corrupt(x0, cfg, g, levels)
    if cfg.loss == "nelbo":
        weight = (0.5 * drawn[1] / (B * T)).float().to(x0.device)
    return prec, eps, weight


def curriculum_k(cfg, step):
    """k of a training step: the values of --curriculum in turn, each for as many steps."""
    sizes = cfg.curriculum.split(",")
    return int(sizes[min(step, cfg.steps - 1) * len(sizes) // cfg.steps])


def loss_fn(model, x0, prec, eps, weight):
    """sdd.loss_fn for every loss; of the original process cross-entropy of all positions."""
    cfg = model.cfg
    if cfg.curriculum:
        model.k = curriculum_k(cfg, int(model.calls) // cfg.grad_accum)
        model.calls += 1
    if cfg.process == "original":
        ids, (logp, weight), noise = prec, eps.split((eps.shape[2] - 1, 1), 2), weight
        logits = model(ids, logp, None, noise * model.wte.weight.detach().std())
        ce = F.cross_entropy(logits.transpose(1, 2), x0, reduction="none")
        return (ce * weight[..., 0]).sum()
    is_target, count = weight > 0, between(prec).sum(1)
    eps = eps[torch.arange(eps.shape[1], device=eps.device) < count[:, None]]  # (n, V)
    z = sdd.q_sample(x0[between(prec)], prec[between(prec)], eps)
    (logits, _), x0 = predict(model, x0, prec, z, is_target, cfg), x0[is_target]
    cost = (F.cross_entropy(logits, x0, reduction="none") if cfg.loss == "ce" else
            sdd.squared_error(logits, x0).float())
    return (cost * weight[is_target]).sum()


def nelbo(model, x0, cfg, g, draws=8, is_given=None):
    """sdd.nelbo."""
    if cfg.process == "original":
        raise common.UserError("the original process has no likelihood: its states hold the answer")
    return sdd.nelbo(model, x0, cfg, g, draws, is_given, functools.partial(predict, cfg=cfg),
                     noise_levels)


@torch.no_grad()
def nelbo_steps(model, x0, cfg, g, steps, sampler="token"):
    """Upper bound on -log p of a sampler of so many steps in random order, token or ancestral,
    without bias: nats per row, (B,). A step by a = prec_s - prec_t costs E[d_x - ln sum_v p_v
    exp(d_v)], d = z_s - z_t, or a / 2 E |e_x - p|^2; where a position becomes clean,
    cross-entropy."""
    tau = sdd.position_times(x0.shape, cfg, g).to(x0.device)
    total = torch.zeros(len(x0)).double()
    for k in range(steps, 0, -1):
        prec, prec_s = (noise_levels(t / steps, tau, cfg)[0] for t in (k, k - 1))
        is_target = prec_s > prec
        if not is_target.any():
            continue
        z = draw_z(x0, prec, cfg.vocab_size, g)
        logits = predict(model, x0, prec, z, is_target, cfg)[0].double()
        x, a = x0[is_target], (prec_s - prec)[is_target]
        ce = F.cross_entropy(logits, x, reduction="none")
        if sampler == "token":
            d = sdd.q_sample(x, a, torch.randn(logits.shape, generator=g).to(a)).double()
            cost = d.gather(1, x[:, None])[:, 0] - (logits.log_softmax(1) + d).logsumexp(1)
        else:
            cost = 0.5 * a * sdd.squared_error(logits, x)
        cost = torch.where(prec_s[is_target] >= CLEAN, ce, cost)
        total += torch.zeros_like(prec).double().masked_scatter(is_target, cost).sum(1).cpu()
    return total


# ---- sample --------------------------------------------------------------------------------------
@torch.no_grad()
def sample(model, x, cfg, g, on_step=lambda nfe, x: None, frames=None):
    """sdd.sample. Candidates of --candidates posterior suit what the network said in the step
    before. --guidance w: logits + w (logits - those without the given text), two evaluations a
    step. The list `frames` receives (NFE, prec (B, T), ids, logp): what the network is shown."""
    if cfg.process == "original":
        return sample_original(model, x, cfg, g, on_step, frames)
    is_given, nfe, kept = x != cfg.vocab_size, 0, None  # kept: what the network last said
    if cfg.candidates == "posterior":
        kept = torch.zeros(*x.shape, cfg.vocab_size, device=x.device)

    def predict_step(model, x, prec, z, is_target):
        nonlocal nfe
        prev = None if kept is None else kept[between(prec)]
        logits, own = predict(model, x, prec, z, is_target, cfg, None, prev)
        if kept is not None:
            kept[is_target] = logits - own
        nfe += 1
        if cfg.guidance and is_given.any():
            bare, _ = predict(model, x, prec, z, is_target, cfg, is_given, prev)
            logits = logits + cfg.guidance * (logits - bare)
            nfe += 1
        if frames is not None:
            frames.append((nfe, prec, *candidate_state(model, x, prec, z, cfg, prev)))
        return logits, own
    x, _ = sdd.sample(model, x, cfg, g, lambda _, x: on_step(nfe, x), predict_step, noise_levels)
    return x, nfe


@torch.no_grad()
def sample_original(model, x, cfg, g, on_step=lambda nfe, x: None, frames=None):
    """The original's sampler: k random candidates of 1 / V each; in every step the network's k most
    likely tokens become the state, and nothing is noised again. The first candidates are the text;
    25 steps for --num-steps 0."""
    V, steps = cfg.vocab_size, cfg.num_steps or 25
    ids = torch.randint(V, (*x.shape, cfg.k), generator=g).to(x.device)
    logp = torch.full((*x.shape, cfg.k + 1), -math.log(V), device=x.device)
    logp[..., -1] = math.log1p(-cfg.k / V)
    for k in range(1, steps + 1):
        if frames is not None:
            frames.append((k - 1, torch.full(x.shape, (k - 1) / steps), ids, logp))
        logits = model(ids, logp).flatten(0, 1) / max(cfg.temperature, 1e-6)
        ids, logp = (y.view(*x.shape, -1) for y in top_k_state(logits, cfg.k, g))
        on_step(k, ids[..., 0].masked_fill(logp[..., 0] < math.log(0.5), V) if k < steps else
                ids[..., 0])
    return ids[..., 0], steps


def candidate_trace(model, x, cfg, g):
    """sample(), filmed: x and the frames of all steps; the last one holds what came out."""
    frames = []
    x, nfe = sample(model, x, cfg, g, frames=frames)
    clean = torch.full(x.shape, CLEAN, device=x.device)
    z = torch.zeros(0, cfg.vocab_size, device=x.device)
    return x, frames + [(nfe, clean, *sdd.input_state(x, clean, z, model.k))]


# ---- what the candidates are worth ---------------------------------------------------------------
@torch.no_grad()
def candidate_recall(model, x0, cfg, g):
    """Share of the positions in between whose truth is among their candidates, by precision: rows
    of a log. In training the truth is that of x0 (B, T), in sampling what the position becomes."""
    rows, trained = [], []
    for t in (0.3, 0.5, 0.7):
        prec = noise_levels(t, sdd.position_times(x0.shape, cfg, g).to(x0.device), cfg)[0]
        z = draw_z(x0, prec, cfg.vocab_size, g)
        ids, _ = candidate_state(model, x0, prec, z, cfg)
        trained.append(((ids == x0[..., None]).any(2).cpu(), prec.cpu()))
    x, frames = candidate_trace(model, torch.full_like(x0, cfg.vocab_size), cfg, g)
    sampled = [((ids == x[..., None]).any(2).cpu(), prec.cpu()) for _, prec, ids, _ in frames]
    for low, high in ((0, 2), (2, 4), (4, 6), (6, 8), (8, 12), (12, 16), (16, 24), (24, CLEAN)):
        row = dict(prec_low=low, prec_high=high)
        for name, parts in (("training", trained), ("sampling", sampled)):
            hits = torch.cat([hit[(prec > low) & (prec <= high) & (prec < CLEAN)]
                              for hit, prec in parts])
            row |= {name: hits.double().mean().item() if len(hits) else None,
                    f"{name}_n": len(hits)}
        rows.append(row)
    return rows


@torch.no_grad()
def copy_baseline(model, data, cfg, split="val", n=128, nelbo=None, times=8):
    """sdd.evaluate for the original process, and why its figures mean nothing: accuracy over all
    positions and noise, that of a copy of the first candidate, and the share of positions whose
    truth is among the candidates; the same by time."""
    x0, g = sdd.get_eval_rows(getattr(data, split), cfg, n)[0], torch.Generator().manual_seed(0)
    device, rates = model.head.weight.device, []
    for k in range(times):
        t = torch.full((len(x0), 1), (k + 0.5) / times)
        ids, logp, noise = original_state(x0.to(device), t, cfg, g)
        best = model(ids, logp, None, noise * model.wte.weight.std()).argmax(2)
        hit = ids.cpu() == x0[..., None]
        rates.append([(best.cpu() == x0).double().mean(), hit[..., 0].double().mean(),
                      hit.any(2).double().mean()])
    rates, names = torch.tensor(rates), ("accuracy", "copy", "among")
    return dict(bound="none", rows=len(x0), **dict(zip(names, rates.mean(0).tolist())),
                **{f"{name}_at": rates[:, i].tolist() for i, name in enumerate(names)})


def report(row):
    """A row of copy_baseline as one line."""
    return (f"no likelihood: accuracy {row['accuracy']:.3f}, copy baseline {row['copy']:.3f}, "
            f"truth among the candidates {row['among']:.3f}")


PARTS = Model, corrupt, loss_fn, nelbo, sample  # of sdd.train


def main(argv):
    if common.parse(Config, sdd.PRESETS, argv)[1].process == "bayes":
        return sdd.main(argv, Config, *PARTS)
    with mock.patch.multiple(sdd, evaluate=copy_baseline, report=report), mock.patch.multiple(
            common, report=report, plot_loss=lambda out: None):  # which are about likelihoods
        return sdd.main(argv, Config, *PARTS)


if __name__ == "__main__":
    common.run_main(main)
