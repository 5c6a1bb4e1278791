"""The evaluation suite of mdlm.py: the bound, bounds of few steps, accuracy of masked tokens,
infilling, and samples of several orders and numbers of steps: rows of eval.jsonl, two figures.

    python lab/mdlm_eval.py --out out/mdlm --judge out/ar
    python lab/mdlm_eval.py --orders random --temperature 1 --remask none --seeds 3
"""
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python lab/mdlm_eval.py`
import common
import fast
import mdlm
from data.prepare import load_data
from data.units import report, se
from lab import figures
from lab.decoding import Config, decode
from lab.mdlm_variants import Model, get_schedule, mask_independently
from lab.methods import parse_options, results_folder
from lab.metrics import judge_of, measure


@dataclass
class Options:
    out: str = "out/mdlm"  # run folder of mdlm.py or lab/mdlm_variants.py
    judge: str = "out/ar"  # the run of ar.py whose likelihood is the generative NLL
    orders: tuple[Literal["random", "l2r", "maxprob", "margin", "entropy"], ...] = (
        "random", "maxprob", "margin", "entropy")
    steps: tuple[int, ...] = (4, 8, 16, 32, 64, 160)  # NFE of samples and of bounds of few steps
    seeds: int = 1  # repetitions of every sampling setting
    rows: int = 500  # test rows of the bound
    num_samples: int = 64  # of every setting
    temperature: float | None = None  # of samples; None: as the run has it, so for the next three
    remask: Literal["none", "random", "conf"] | None = None
    length_first: bool | None = None
    top_p: float | None = None


@torch.no_grad()
def nelbo_steps(model, x0, cfg, g, steps):
    """Upper bound on -log p of the ancestral sampler of so many steps along the sampling schedule,
    unbiased: sum_k (gamma_k - gamma_{k-1}) / gamma_k E sum_masked c_i, (B,) nats per row."""
    gamma = get_schedule(cfg.sampling_schedule)[0](
        torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    total = torch.zeros(len(x0), dtype=torch.float64)
    for k in range(1, steps + 1):
        xt = mask_independently(x0, gamma[k].expand(len(x0)), cfg, g)
        ce = mdlm.masked_ce(model, x0, xt).cpu().double().sum(1)
        total += (gamma[k] - gamma[k - 1]) / gamma[k] * ce
    return total


@torch.no_grad()
def fixed_order_nll(model, x0, cfg, order):
    """Exact -log p(x0) of the sampler that unmasks one position after the other in the fixed
    `order` (T,): nats per row (B,), T evaluations. (E4) is its mean over all orders."""
    xt, total = torch.full_like(x0, cfg.vocab_size), torch.zeros(len(x0), dtype=torch.float64)
    for i in order:
        is_next = torch.zeros(x0.shape, dtype=torch.bool, device=x0.device)
        is_next[:, i] = True
        logp = model(xt, is_next).float().log_softmax(1)
        total -= logp.gather(1, x0[:, i, None])[:, 0].cpu().double()
        xt[:, i] = x0[:, i]
    return total


def infill_masks(x0, cfg, g):
    """What to mask for infilling, name -> boolean (B, T): a single token, a span of five, or the
    middle third of each document, its first EOS included; and the document itself."""
    T, u = x0.shape[1], torch.rand(len(x0), 1, generator=g).to(x0.device)
    column, size = torch.arange(T, device=x0.device), torch.full_like(x0[:, :1], T)
    if cfg.rows == "docs":
        size = ((x0 == cfg.eos).cumsum(1) == 0).sum(1, keepdim=True).add(1).clamp(max=T)
    five = size.clamp(max=5)
    spans = {"token": ((u * size).long(), 1), "span of 5": ((u * (size - five + 1)).long(), five),
             "middle third": (size // 3, size - 2 * (size // 3)), "document": (0, size)}
    return {name: (column >= a) & (column < a + n) for name, (a, n) in spans.items()}


@torch.no_grad()
def evaluate_all(run, model, tokenizer, data, cfg, opt):
    """Write eval.jsonl, integrand.png and quality.png into the run folder."""
    log, n = [], opt.num_samples
    judge = judge_of(run, opt.judge, data)

    def say(kind, **row):
        log.append(dict(kind=kind, **row))
        run.say(f"{kind}: " + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
                                        for k, v in row.items() if v is not None))
    log.append(dict(kind="config", command=" ".join(sys.argv), seed=cfg.seed,
                    config=dataclasses.asdict(cfg), options=dataclasses.asdict(opt),
                    torch=torch.__version__, dtype=run.dtype,
                    machine=fast.machine(run.device), threads=torch.get_num_threads()))
    g = torch.Generator().manual_seed(cfg.seed)
    # 1. without a model, nats per token
    say("baseline", uniform=math.log(cfg.vocab_size), unigram_entropy=data.unigram_entropy)
    # 2. bounds
    row = mdlm.evaluate(model, data, cfg, "test", opt.rows)
    log.append(dict(kind="test", **row))
    run.say(f"test: {report(row)}")
    x0 = mdlm.get_eval_rows(data.test, cfg, 4 * n)[0].to(run.device)
    for steps in opt.steps:
        nats = nelbo_steps(model, x0[:n], cfg, g, steps)
        say("steps", num_steps=steps, bound="upper", nats_per_row=nats.mean().item(), se=se(nats))
    figures.plot_integrand(run.out, model, x0, cfg, g)
    # 3. accuracy at fixed mask rates, inside documents
    masks = infill_masks(x0, cfg, g)
    inside = masks.pop("document")
    commonest = x0[inside].bincount().argmax()
    for rate in (0.15, 0.5, 0.85, 1.0):
        xt = mdlm.mask_tokens(x0, torch.full((len(x0),), round(rate * cfg.seq_len)), cfg, g)
        target = (xt != x0) & inside
        said = torch.cat([model(a, b).argmax(1) for a, b in zip(xt.split(64), target.split(64))])
        say("accuracy", rate=rate, accuracy=(said == x0[target]).float().mean().item(),
            unigram=(x0[target] == commonest).float().mean().item())
    # 4. infilling: greedy, the most confident position first
    greedy = dataclasses.replace(cfg, temperature=0.0, order="maxprob", num_steps=0, remask="none",
                                 length_first=False)
    for name, mask in masks.items():
        bound = mdlm.nelbo(model, x0, cfg, g, is_given=~mask)
        canvas = x0[:n].masked_fill(mask[:n], cfg.vocab_size)
        same = mdlm.sample(model, canvas, greedy, g)[0] == x0[:n]
        say("infill", hole=name, exact=same.all(1).float().mean().item(),
            accuracy=same[mask[:n]].float().mean().item(), bound="upper",
            unigram=(x0[:n][mask[:n]] == commonest).float().mean().item(),
            nats_per_token=(bound.sum() / mask.sum().cpu()).item())
    # 5. samples
    real = measure(x0[:n], cfg, tokenizer, judge)  # as many: diversity depends on it
    say("real", num_samples=n, **real)
    rows = []
    for order in opt.orders:
        for steps in sorted({min(steps, cfg.seq_len) for steps in opt.steps}):
            for seed in range(cfg.seed, cfg.seed + opt.seeds):
                some = dataclasses.replace(cfg, order=order, num_steps=steps)
                canvas = torch.full((n, cfg.seq_len), cfg.vocab_size, device=run.device)
                start = time.time()
                x, nfe = decode(model, canvas, some, torch.Generator().manual_seed(seed))
                rows.append(dict(order=order, num_steps=steps, seed=seed, num_samples=n, nfe=nfe,
                                 seconds=time.time() - start, temperature=cfg.temperature,
                                 remask=cfg.remask, length_first=cfg.length_first,
                                 **measure(x, cfg, tokenizer, judge)))
                say("samples", **rows[-1])
    figures.plot_quality(run.out, rows, real)
    common.replace(run.out / "eval.jsonl", lambda file: file.writelines(
        (json.dumps(row) + "\n").encode() for row in log))


def main(argv):
    opt = parse_options(Options, argv, __doc__)
    cfg = common.load_config(Config, opt.out, reads_data=True)
    for name in ("temperature", "remask", "length_first", "top_p"):
        if getattr(opt, name) is not None:
            setattr(cfg, name, getattr(opt, name))
    run, data = common.Run(cfg), load_data(cfg)
    run.out = results_folder(run)
    model, tokenizer = common.load_model(Model, cfg, run.device, data)
    with run.amp:
        evaluate_all(run, model, tokenizer, data, cfg, opt)


if __name__ == "__main__":
    common.run_main(main)
