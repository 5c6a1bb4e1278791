"""Other ways to train and sample dit_embed.py: networks that predict vectors, squared errors and
the bound as losses, noise schedules, free or fixed embeddings, inputs, blocks, self-conditioning;
DDPM's sampler and DDIM, rounding, guidance.

    python lab/dit_variants.py --schedule cosine --noise-window 1 --loss nelbo --out out/cosine
    python lab/dit_variants.py --prediction-type x0 --emb-norm 0 --sampler ancestral --order random
    python lab/dit_variants.py --prefix 0.5 --self-cond 0.5 --out out/self_cond
    python lab/dit_variants.py sample --sampler ddim --order random --temperature 1
    python lab/dit_variants.py sample --prompt "Once upon a time" --guidance 1

Equations, beside those of dit_embed.py, where E may have any norm now: (E3) then has the further
term -snr / 2 |E_v|^2, the prior of (E5) |E_x|^2.
    (V1)  networks that predict eps or v = alpha eps - sigma E_x:
          x0_hat = (z - sigma eps_hat) / alpha = alpha z - sigma v_hat
    (V2)  ancestral sampler: (E6) with x0_hat in place of E_x; of N such steps t -> s
          DIFFUSION is sum (snr_s - snr_t) / 2 E |E_x - x0_hat(z_t)|^2
    (V3)  of N steps of the token sampler (E7) it is sum E [u_x - log sum_v p_v exp(u_v)],
          u_v = B / sigma_q^2 r.E_v - B^2 / (2 sigma_q^2) |E_v|^2, r = z_s - A z_t
    (V4)  DDIM: z_s = alpha_s x0_hat + (sigma_s^2 - eta^2 sigma_q^2)^(1/2) eps_hat + eta sigma_q xi
    (V5)  guidance: out + w (out - out without the given text), logits or vectors
"""
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python lab/dit_variants.py`
import common
import dit_embed
from dit_embed import categorical, filter_logits, position_times, posterior, q_sample


@dataclass
class Config(dit_embed.Config):
    prediction_type: Literal["logits", "eps", "x0", "v"] = "logits"  # output; temperature: logits
    loss: Literal["auto", "ce", "mse", "nelbo"] = "auto"  # auto: ce for logits, else mse
    rounding_weight: float = 1.0  # weight of the rounding loss beside mse: keeps embeddings apart
    allow_collapse: bool = False  # let mse train embeddings without it
    add_likelihood: bool = True  # add the self-likelihood to the logits (E4)
    emb_norm: float = 1.0  # norm r of the embeddings; 0 = free, of norm sqrt(d) at first
    emb_train: bool = True  # learn them; else they stay random
    schedule: Literal["logsnr", "logistic", "cosine", "linear", "sqrt"] = "logsnr"  # lam(t)
    gamma_shift: float = 0.0  # lower lam of any schedule, and its range, by this
    input: Literal["likelihood", "raw", "both"] = "likelihood"  # what enters: Model.embed, z, both
    pos: Literal["both", "learned", "rotary"] = "both"  # positions at the input, in the attention
    norm: Literal["pre", "post"] = "pre"  # where the blocks normalise
    cond: Literal["adaln", "add", "none"] = "adaln"  # how the network is told the noise level
    self_cond: float = 0.0  # share of steps with an earlier x0_hat as input (Chen et al. 2022)
    prefix: float = 0.0  # share of rows whose beginning, of random length, is clean in training
    sampler: Literal["auto", "token", "ancestral", "ddim"] = "auto"  # token; no logits: ancestral
    order: Literal["auto", "random", "l2r", "maxprob"] = "auto"  # maxprob; without logits: random
    eta: float = 0.0  # noise of ddim: 0 none, 1 ancestral
    clamp_to_embedding: bool = False  # move x0_hat to the nearest embedding (Diffusion-LM; biased)
    rounding: Literal["draw", "argmax", "nearest"] = "draw"  # the last step, from vectors to tokens
    given: Literal["clean", "noisy"] = "clean"  # prompt and infill text: clean, or noisy like z
    guidance: float = 0.0  # classifier-free guidance by the given text (V5); 0 = off

    checkpoint_keys = dit_embed.Config.checkpoint_keys + (
        "prediction_type", "add_likelihood", "emb_norm", "emb_train", "gamma_shift", "input", "pos",
        "norm", "cond", "self_cond")

    def problems(self):
        out, vectors = super().problems(), self.prediction_type != "logits"
        if vectors and self.loss == "ce":
            out.append(f"--loss ce needs logits: with --prediction-type {self.prediction_type} use "
                       "--loss mse or nelbo")
        if vectors and (self.sampler == "token" or self.order == "maxprob"):
            out.append("--sampler token and --order maxprob need logits: with --prediction-type "
                       f"{self.prediction_type} use --sampler ancestral --order random")
        if (self.loss_type == "mse" and self.emb_train and not self.rounding_weight
                and not self.allow_collapse):
            out.append("a mean squared error alone is smallest when all embeddings are the same: "
                       "give --rounding-weight 1, or --no-emb-train, or, to see it happen, "
                       "--allow-collapse")
        if vectors and (self.top_k or self.top_p < 1):
            out.append(f"--top-k and --top-p cut token logits, --prediction-type "
                       f"{self.prediction_type} has none")
        if self.eta and self.sampler != "ddim":
            out.append("--eta is the noise of --sampler ddim: add that")
        if self.clamp_to_embedding and self.resolve().sampler == "token":
            out.append("--clamp-to-embedding moves vectors, --sampler token draws tokens: add "
                       "--sampler ancestral or ddim")
        for name in ("self_cond", "prefix", "eta"):
            if getattr(self, name) > 1:
                out.append(f"--{name.replace('_', '-')} is {getattr(self, name)}, more than 1")
        return out

    def resolve(self):
        """The same without `auto` in sampler and order."""
        auto = ("token", "maxprob") if self.prediction_type == "logits" else ("ancestral", "random")
        kept = dict(zip(("sampler", "order"), auto))
        return dataclasses.replace(self, **{k: v for k, v in kept.items()
                                            if getattr(self, k) == "auto"})

    @property
    def loss_type(self):
        auto = "ce" if self.prediction_type == "logits" else "mse"
        return auto if self.loss == "auto" else self.loss


# ---- noise schedules -----------------------------------------------------------------------------
SCHEDULES = {  # name: log-SNR lam(t) and -d lam / dt; alpha^2 = sigmoid(lam) is "alpha bar"
    "linear": (lambda t: -(0.1 * t + 9.95 * t * t).expm1().log(),  # of beta: Ho et al. 2020
               lambda t: (0.1 + 19.9 * t) / -(-0.1 * t - 9.95 * t * t).expm1()),
    "cosine": (lambda t: -2 * (math.pi / 2 * (t + 0.008) / 1.008).tan().log(),
               lambda t: 2 * math.pi / 1.008 / (math.pi * (t + 0.008) / 1.008).sin()),
    "sqrt": (lambda t: (1 / (t + 1e-4).sqrt() - 1).log(),  # Diffusion-LM
             lambda t: 0.5 / (t + 1e-4) / (1 - (t + 1e-4).sqrt())),
}


def logsnr_range(cfg):
    """Largest and smallest lam, around the place where a token is lost, snr = 2 ln V / r^2."""
    center = math.log(2 * math.log(cfg.vocab_size) / (cfg.emb_norm ** 2 or cfg.emb_dim))
    center -= cfg.gamma_shift
    return center + cfg.logsnr_above, center - cfg.logsnr_below


def logsnr(t, cfg):
    """Times in [0, 1] -> lam(t) and -d lam / dt, 0 where the range cuts it off. logsnr falls evenly
    through the range, logistic (a logistic distribution's quantiles) slowest where tokens are
    lost; the others have their papers' shapes within the range."""
    high, low = logsnr_range(cfg)
    if cfg.schedule == "logsnr":
        return high + (low - high) * t, torch.full_like(t, high - low)
    if cfg.schedule == "logistic":
        a, b = 1 / (1 + math.exp(cfg.logsnr_above)), 1 / (1 + math.exp(-cfg.logsnr_below))
        p = a + (b - a) * t.double()
        lam = high - cfg.logsnr_above + (1 / p - 1).log()
        return lam.clamp(low, high).to(t), ((b - a) / (p * (1 - p))).to(t)
    curve, slope = SCHEDULES[cfg.schedule]
    lam = (curve(t.double()) - cfg.gamma_shift).nan_to_num(low)
    slope = torch.where((lam > low) & (lam < high), slope(t.double()), 0.0)
    return lam.clamp(low, high).to(t), slope.to(t)


def noise_levels(t, tau, cfg):
    """As dit_embed.noise_levels, for every schedule."""
    own = ((t - tau) / cfg.noise_window).clamp(0, 1)  # (E2)
    lam, slope = logsnr(own, cfg)
    return own, lam, slope / cfg.noise_window * ((own > 0) & (own < 1))


# ---- model ---------------------------------------------------------------------------------------
class PostBlock(dit_embed.Block):
    """Normalises behind each residual sum."""

    def forward(self, x, positions, ada):
        a1, b1, c1, a2, b2, c2 = ada
        x = self.convolve(x)
        x = self.norm1(x + (1 + c1) * self.attn(x * (1 + a1) + b1, positions))
        return self.norm2(x + (1 + c2) * self.mlp(x * (1 + a2) + b2))


def gaussian_logits(y, weight, E):
    """y.E_v - weight / 2 |E_v|^2 for each token v: (..., d), (..., 1), (V, d) -> (..., V). In
    float32 also under autocast, as all that enters the bound."""
    with torch.autocast(y.device.type, enabled=False):
        return torch.cat((y, -0.5 * weight), -1) @ torch.cat((E, E.square().sum(1, True)), 1).T


class Model(dit_embed.Model):
    """dit_embed.Model with other parts. Returns logits or, as cfg.prediction_type says, vectors:
    (B, T, d), or (n, d). `guess` (B, T, d): an earlier x0_hat, for self-conditioning."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.cfg, (self.high, self.low) = cfg, logsnr_range(cfg)
        if cfg.norm == "post":
            blocks = nn.ModuleList(PostBlock(cfg) for _ in range(cfg.n_layer))
            blocks.load_state_dict(self.blocks.state_dict())
            self.blocks = blocks
        if cfg.input != "likelihood":
            self.raw_in = nn.Linear(cfg.emb_dim, cfg.n_embd, bias=False)
            nn.init.normal_(self.raw_in.weight, std=0.02)
        if cfg.self_cond:
            self.guess_in = nn.Linear(cfg.emb_dim, cfg.n_embd, bias=False)
            nn.init.zeros_(self.guess_in.weight)
        if cfg.prediction_type != "logits":
            self.head = nn.Linear(cfg.n_embd, cfg.emb_dim)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        unused = dict(wte=cfg.input == "raw", wpe=cfg.pos == "rotary", noise_in=cfg.cond == "none",
                      noise_head=cfg.cond == "none", ada_heads=cfg.cond != "adaln")
        for name in [name for name, is_unused in unused.items() if is_unused]:
            delattr(self, name)

    def embeddings(self):
        E = self.emb.weight if self.cfg.emb_train else self.emb.weight.detach()
        return self.cfg.emb_norm * F.normalize(E, dim=1) if self.cfg.emb_norm else E

    def self_likelihood(self, z, lam):
        if self.cfg.emb_norm:  # |E_v| is the same for each v
            return super().self_likelihood(z, lam)
        snr = lam.exp()[..., None]
        return gaussian_logits((snr * (1 + snr)).sqrt() * z, snr, self.embeddings())

    def embed(self, z, lam):
        x = 0.0 if self.cfg.input == "raw" else super().embed(z, lam)
        return x if self.cfg.input == "likelihood" else x + self.raw_in(z).float()

    def forward(self, z, lam, is_target=None, guess=None):
        cfg, x, ada = self.cfg, self.embed(z, lam), 6 * [0.0]
        if guess is not None:
            x = x + self.guess_in(guess)
        if cfg.cond != "none":
            levels, index = lam.unique(return_inverse=True)
            noise = self.embed_noise(levels)
            x = x + F.embedding(index, 0.1 * self.noise_head(noise).float())
        if cfg.pos != "rotary":
            x = x + self.wpe.weight[:x.shape[1]]
        positions = torch.arange(x.shape[1], device=z.device) * (cfg.pos != "learned")
        for k, block in enumerate(self.blocks):
            if cfg.cond == "adaln":
                ada = F.embedding(index, 0.1 * self.ada_heads[k](noise).float()).chunk(6, 2)
            x = block(x, positions, ada)
        x = self.norm(x)
        if is_target is not None:
            x, z, lam = x[is_target], z[is_target], lam[is_target]
        out = self.head(x).float()
        likelihood = cfg.add_likelihood and cfg.prediction_type == "logits"
        return out + self.self_likelihood(z, lam) if likelihood else out


# ---- what a prediction is worth ------------------------------------------------------------------
def alpha_sigma(lam):
    """(...) -> two (..., 1)."""
    return lam.sigmoid().sqrt()[..., None], (-lam).sigmoid().sqrt()[..., None]


def predict_x0_embedding(model, out, z, lam, cfg):
    """x0_hat (..., d) of the network's output (..., V) or (..., d), in float32."""
    alpha, sigma = alpha_sigma(lam)
    if cfg.prediction_type == "logits":
        return model.x0_hat(out.float())
    return {"eps": lambda: (z - sigma * out) / alpha,  # (V1)
            "v": lambda: alpha * z - sigma * out, "x0": lambda: out}[cfg.prediction_type]()


def predict(model, z, lam, is_target, cfg, guess=None):
    """The output at the n positions `is_target`. A self-conditioned network without a guess first
    makes its own: what it predicts is still a function of z and lam alone."""
    if not cfg.self_cond:
        return model(z, lam, is_target)
    if guess is None:
        guess = predict_x0_embedding(model, model(z, lam), z, lam, cfg)
    return model(z, lam, is_target, guess)


def squared_error(model, out, emb, z, lam, cfg):
    """|E_x - x0_hat|^2 of (n, ...) -> (n,)."""
    return (predict_x0_embedding(model, out, z, lam, cfg) - emb).square().sum(1)


def rounding_nll(model, x0, z, lam):
    """-log p(x_0,i | z_i) by the self-likelihood, all tokens as likely before: (B, T)."""
    return F.cross_entropy(model.self_likelihood(z, lam).transpose(1, 2), x0, reduction="none")


def reconstruction_nll(model, x0, z, lam, is_target, cfg):
    """-log p(x_0,i | z) at t = 0, by the network if it predicts tokens: (n,)."""
    if cfg.prediction_type != "logits":
        return rounding_nll(model, x0, z, lam)[is_target]
    out = predict(model, z, lam, is_target, cfg)
    return F.cross_entropy(out, x0[is_target], reduction="none")


def prior_kl(emb, cfg):
    """KL(q(z_i | x_0) || N(0, 1)) at t = 1 of emb (B, T, d), in nats: (B, T) float64."""
    low, emb = logsnr(torch.ones(1, device=emb.device), cfg)[0].double(), emb.double()
    spread = -low.sigmoid() - F.logsigmoid(-low)  # sigma^2 - 1 - ln sigma^2
    return 0.5 * (emb.shape[-1] * spread + low.sigmoid() * emb.square().sum(-1))  # (E5)


# ---- corrupt, loss and bounds --------------------------------------------------------------------
def corrupt(x0, cfg, g):
    """lam (B, T); eps (B, T, 2, d), for z and for z at t = 0; weight (B, T, 3), of the token in the
    loss, of its rounding loss, and 1 where this step uses self-conditioning."""
    (B, T), is_given = x0.shape, torch.zeros(x0.shape, dtype=torch.bool)
    u = ((torch.arange(B) + torch.rand(1, generator=g)) / B)[:, None]
    is_tilted = cfg.loss_type == "ce" and cfg.steps < 4000
    t = (0.1 + 0.9 * u) ** 0.75 if is_tilted else u
    if cfg.prefix:
        share = (torch.rand(B, 1, generator=g) < cfg.prefix) * torch.rand(B, 1, generator=g)
        is_given = torch.arange(T) < (T * share).floor()
    own, lam, slope = noise_levels(t, position_times(x0.shape, cfg, g, is_given), cfg)
    eps = torch.randn(B, T, cfg.emb_dim, generator=g)
    eps0 = torch.zeros_like(eps) if cfg.loss_type == "ce" else torch.randn(eps.shape, generator=g)
    weight, rounding = slope / (B * T), ~is_given / (B * T)  # of nelbo
    if cfg.loss_type != "nelbo":
        weight = (own > 0) / (own > 0).sum(1, keepdim=True).clamp(min=1) / B
        rounding = torch.full((B, T), cfg.rounding_weight / (B * T))
    twice = torch.rand(1, generator=g) < cfg.self_cond if cfg.self_cond else torch.zeros(1)
    weight = torch.stack((weight, rounding, twice.expand(B, T)), 2)
    return lam.to(x0.device), torch.stack((eps, eps0), 2).to(x0.device), weight.to(x0.device)


def loss_fn(model, x0, lam, eps, weight):
    """ce: cross-entropy of the noisy tokens, each row averaged first; mse: the squared error of
    what the network predicts, per number, and the rounding loss; nelbo: the bound (E5) per token,
    with rounding by the self-likelihood. A sum, so that the losses of micro-batches add up."""
    cfg, emb, guess = model.cfg, model.embeddings()[x0], None
    z, is_noisy = q_sample(emb, lam, eps[..., 0, :]), weight[..., 0] > 0
    if cfg.self_cond and weight[..., 2].any():
        with torch.no_grad():
            guess = predict_x0_embedding(model, model(z, lam), z, lam, cfg)
    out = model(z, lam, is_noisy, guess)
    if cfg.loss_type == "ce":
        cost = F.cross_entropy(out, x0[is_noisy], reduction="none")
    elif cfg.loss_type == "mse" and cfg.prediction_type in ("eps", "v"):
        alpha, sigma = alpha_sigma(lam)
        v = alpha * eps[..., 0, :] - sigma * emb
        goal = eps[..., 0, :] if cfg.prediction_type == "eps" else v
        cost = (out - goal[is_noisy]).square().mean(1)
    else:
        cost = squared_error(model, out, emb[is_noisy], z[is_noisy], lam[is_noisy], cfg)
        cost = cost / cfg.emb_dim if cfg.loss_type == "mse" else 0.5 * lam[is_noisy].exp() * cost
    loss = (cost * weight[..., 0][is_noisy]).sum()
    if cfg.loss_type == "ce" or cfg.loss_type == "mse" and not cfg.rounding_weight:
        return loss
    clean = logsnr(torch.zeros_like(lam), cfg)[0]
    end = rounding_nll(model, x0, q_sample(emb, clean, eps[..., 1, :]), clean)
    if cfg.loss_type == "nelbo":
        end = end + prior_kl(emb, cfg).float()
    return loss + (end * weight[..., 1]).sum()


@torch.no_grad()
def nelbo_parts(model, x0, cfg, g, draws=8, is_given=None):
    """The parts of the bound (E5) in nats per row, prior, diffusion and reconstruction, (B,) each;
    and what diffusion is made of: at each position and time that counted, log-SNR `logsnr` and
    nats per unit of it `integrand`. The draws are those of dit_embed.nelbo."""
    (B, T), device, emb = x0.shape, x0.device, model.embeddings()[x0]
    is_given = torch.zeros(B, T, dtype=torch.bool) if is_given is None else is_given.cpu()
    u, tau = torch.rand(B, 1, generator=g), position_times(x0.shape, cfg, g, is_given)
    first = tau.amin(1, keepdim=True).clamp(max=1)
    last = tau.masked_fill(is_given, -cfg.noise_window).amax(1, keepdim=True) + cfg.noise_window
    diffusion, points = torch.zeros(B).double(), []
    for k in range(draws + 1):
        t = first + (last - first) * (k + u) / draws if k < draws else torch.zeros(B, 1)
        _, lam, slope = noise_levels(t, tau, cfg)
        is_target = slope > 0 if k < draws else ~is_given
        eps, nats = torch.randn(B, T, cfg.emb_dim, generator=g), torch.zeros(B, T).double()
        for i in torch.arange(B).split(64):
            lam_i, target, e = lam[i].to(device), is_target[i].to(device), emb[i.to(device)]
            z = q_sample(e, lam_i, eps[i].to(device))
            if k == draws:
                cost = reconstruction_nll(model, x0[i.to(device)], z, lam_i, target, cfg)
            else:
                out, lam_i = predict(model, z, lam_i, target, cfg), lam_i[target]
                error = squared_error(model, out, e[target], z[target], lam_i, cfg)
                cost = 0.5 * lam_i.exp() * error
            nats[i] = nats[i].masked_scatter(is_target[i], cost.cpu().double())
        if k < draws:
            diffusion += (nats * ((last - first) / draws * slope)).sum(1)
            points.append(torch.stack((lam[is_target].double(), nats[is_target])))
    lam, integrand = torch.cat(points, 1)
    return dict(prior=(prior_kl(emb, cfg).cpu() * ~is_given).sum(1), diffusion=diffusion,
                reconstruction=nats.sum(1), logsnr=lam, integrand=integrand)


def nelbo(model, x0, cfg, g, draws=8, is_given=None):
    """As dit_embed.nelbo, for every option."""
    parts = nelbo_parts(model, x0, cfg, g, draws, is_given)
    return parts["prior"] + parts["diffusion"] + parts["reconstruction"]


@torch.no_grad()
def nelbo_steps(model, x0, cfg, g, steps):
    """Upper bound on -log p of the sampler `token` (V3) or `ancestral` (V2) with so many steps, in
    random order at temperature 1, unbiased: (B,) nats per row."""
    if len(x0) > 64:
        return torch.cat([nelbo_steps(model, rows, cfg, g, steps) for rows in x0.split(64)])
    cfg = cfg.resolve()
    emb, tau = model.embeddings()[x0], position_times(x0.shape, cfg, g).to(x0.device)
    total = prior_kl(emb, cfg).sum(1)
    for k in range(steps, -1, -1):
        lam = noise_levels(k / steps, tau, cfg)[1]
        lam_s = noise_levels(max(k - 1, 0) / steps, tau, cfg)[1]
        is_target = lam_s > lam if k else torch.ones_like(lam, dtype=torch.bool)
        if not is_target.any():
            continue
        eps, xi = torch.randn(2, *emb.shape, generator=g).to(x0.device)
        z, nats = q_sample(emb, lam, eps), torch.zeros_like(lam, dtype=torch.float64)
        if k == 0:
            cost = reconstruction_nll(model, x0, z, lam, is_target, cfg)
        else:
            out = predict(model, z, lam, is_target, cfg)
            e, lam, lam_s = emb[is_target], lam[is_target], lam_s[is_target]
            _, B, sigma_q = posterior(lam, lam_s)
            if cfg.sampler == "token":
                r = B * e + sigma_q * xi[is_target]
                u = gaussian_logits(B / sigma_q ** 2 * r, (B / sigma_q) ** 2, model.embeddings())
                cost = u.gather(1, x0[is_target][:, None])[:, 0]
                cost = cost - (out.log_softmax(1) + u).logsumexp(1)  # (V3)
            else:
                error = squared_error(model, out, e, z[is_target], lam, cfg)
                cost = 0.5 * (lam_s.exp() - lam.exp()) * error  # (V2)
        total += nats.masked_scatter(is_target, cost.double()).sum(1)
    return total.cpu()


# ---- sample --------------------------------------------------------------------------------------
def draw_x0(model, out, z, lam, cfg, g):
    """The embeddings (n, d) that a step aims at, from the network's output (n, V) or (n, d)."""
    if cfg.sampler == "token":
        return dit_embed.draw_x0(model, out, z, lam, cfg, g)
    if cfg.prediction_type == "logits":  # the temperature is for the context, as in dit_embed.py
        out = filter_logits(out + (cfg.temperature - 1) * model.self_likelihood(z, lam), cfg)
    x0_hat, E = predict_x0_embedding(model, out, z, lam, cfg), model.embeddings()
    if cfg.clamp_to_embedding:
        x0_hat = E[gaussian_logits(x0_hat, torch.ones_like(lam)[:, None], E).argmax(1)]
    return x0_hat


def reverse_step(x0_hat, z, lam, lam_s, xi, cfg):
    """z_t (n, d) at lam (n,) -> z_s at lam_s (n,); xi (n, d) is its noise."""
    A, B, sigma_q = posterior(lam, lam_s)
    if cfg.sampler != "ddim":
        return A * z + B * x0_hat + sigma_q * xi  # (E7) (V2)
    (alpha, sigma), (alpha_s, sigma_s) = alpha_sigma(lam), alpha_sigma(lam_s)
    eps_hat, rest = (z - alpha * x0_hat) / sigma, (sigma_s ** 2 - (cfg.eta * sigma_q) ** 2).sqrt()
    return alpha_s * x0_hat + rest * eps_hat + cfg.eta * sigma_q * xi  # (V4)


def round_to_tokens(model, out, z, lam, cfg, g):
    """Tokens (n,) at t = 0; nearest: by the self-likelihood, as always if vectors are predicted."""
    if cfg.prediction_type != "logits" or cfg.rounding == "nearest":
        out = model.self_likelihood(z, lam)
    return categorical(out, g) if cfg.rounding == "draw" else out.argmax(1)


@torch.no_grad()
def sample(model, x, cfg, g, on_step=lambda nfe, x: None):
    """As dit_embed.sample, for every option."""
    cfg = cfg.resolve()
    x, V, nfe, device = x.clone(), cfg.vocab_size, 0, x.device
    length_first = (cfg.length_first and cfg.rows == "docs" and cfg.prediction_type == "logits" and
                    cfg.given == "clean")
    if length_first and (x[:, -1] == V).any():
        x, nfe = dit_embed.draw_length(model, x, cfg, g), 1
        on_step(nfe, x)
    is_given = x != V
    emb = model.embeddings()[x.masked_fill(~is_given, 0)]
    z = eps = torch.randn(emb.shape, generator=g).to(device)
    guess = torch.zeros_like(z)
    clean = is_given if cfg.given == "clean" else torch.zeros_like(is_given)
    tau = position_times(x.shape, cfg, g, clean.cpu()).to(device)
    if cfg.order == "l2r":
        tau = dit_embed.reassign_times(tau, ~clean, -(~clean).cumsum(1).float())
    steps = cfg.num_steps or x.shape[1]
    for k in range(steps, -1, -1):
        own, lam, _ = noise_levels(k / steps, tau, cfg)
        lam_s = noise_levels(max(k - 1, 0) / steps, tau, cfg)[1]
        z = torch.where(is_given[..., None], q_sample(emb, lam, eps), z)
        # 1. predict; with self-conditioning at all positions
        rises = ~is_given & (lam_s > lam if k else own == 0)
        if not rises.any():
            continue
        choose = cfg.order == "maxprob" and k > 0
        is_target = ~is_given & (own > 0) if choose else rises
        wanted = torch.ones_like(is_target) if cfg.self_cond else is_target
        out = predict(model, z, lam, wanted, cfg, guess)
        nfe += 1
        if length_first:
            out[..., cfg.eos] = -torch.inf
        if cfg.guidance and is_given.any():  # noise in place of the given text
            low = torch.where(is_given, logsnr(torch.ones_like(lam), cfg)[0], lam)
            blank = is_given[..., None]
            uncond = predict(model, torch.where(blank, eps, z), low, wanted, cfg,
                             guess.masked_fill(blank, 0.0))
            out = out + cfg.guidance * (out - uncond)  # (V5)
            nfe += 1
        if cfg.self_cond:
            guess = predict_x0_embedding(model, out, z[wanted], lam[wanted], cfg).view_as(z)
            out = out[is_target[wanted]]
        # 2. choose positions: of those that are pure noise the most confident begin next
        if choose:
            confidence = torch.zeros(x.shape, device=device)
            confidence[is_target] = out.softmax(1).amax(1)
            tau = dit_embed.reassign_times(tau, is_target & (own == 1), confidence)
            lam_s = noise_levels((k - 1) / steps, tau, cfg)[1]
            out, is_target = out[(lam_s > lam)[is_target]], is_target & (lam_s > lam)
        # 3. draw: one reverse step, or at t = 0 the tokens
        z_t, lam_t = z[is_target], lam[is_target]
        if k == 0:
            x[is_target] = round_to_tokens(model, out, z_t, lam_t, cfg, g)
            on_step(nfe, x)
            break
        x0_hat = draw_x0(model, out, z_t, lam_t, cfg, g)
        xi = torch.randn(z.shape, generator=g).to(device)[is_target]
        z = z.masked_scatter(is_target[..., None], reverse_step(x0_hat, z_t, lam_t,
                                                                lam_s[is_target], xi, cfg))
        p, best = model.self_likelihood(z, lam_s).softmax(2).max(2)
        on_step(nfe, torch.where(is_given, x, best.masked_fill(p < 0.5, V)))
    return x, nfe


def main(argv):
    return dit_embed.main(argv, Config, Model, corrupt=corrupt, loss_fn=loss_fn, nelbo=nelbo,
                          sample=sample)


if __name__ == "__main__":
    common.run_main(main)
