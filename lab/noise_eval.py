"""The evaluation suite of dit_embed.py, bit_diffusion.py and sdd.py: the bound, bounds of few
steps, accuracy of noisy tokens, infilling, samples of each sampler: eval.jsonl, quality.png.

    python lab/noise_eval.py --script sdd --out out/sdd --judge out/ar
    python lab/noise_eval.py --script dit_embed --out out/dit_embed --samplers token ddim --seeds 3
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python lab/noise_eval.py`
import bit_diffusion
import common
import fast
import dit_embed
import sdd
from data.prepare import load_data
from data.units import report, se
from lab import bit_variants, dit_variants, figures, sdd_variants
from lab.mdlm_eval import infill_masks
from lab.methods import parse_options, results_folder
from lab.metrics import judge_of, measure

SCRIPTS = dict(dit_embed=(dit_embed, dit_variants, ("token", "ancestral", "ddim")),
               bit_diffusion=(bit_diffusion, bit_variants, ("token", "bit")),
               sdd=(sdd, sdd_variants, ("token", "ancestral", "deterministic")))


@dataclass
class Options:
    script: Literal["dit_embed", "bit_diffusion", "sdd"] = "sdd"
    out: str = ""  # run folder of the script or its lab/*_variants.py; empty = out/SCRIPT
    judge: str = "out/ar"  # the run of ar.py whose likelihood is the generative NLL
    samplers: tuple[str, ...] = ()  # to compare; none = all of the script
    steps: tuple[int, ...] = (4, 8, 16, 32, 64, 160)  # NFE of samples and of bounds of few steps
    seeds: int = 1  # repetitions of every sampling setting
    rows: int = 500  # test rows of the bound
    num_samples: int = 64  # of every setting
    temperature: float | None = None  # of samples; None: as the run has it


def predict_at(script, lab, model, x0, t, cfg, g):
    """Noise x0 (B, T) at time t in 0..1 -> logits (n, V) of the noisy positions, which are the
    boolean (B, T)."""
    tau = script.position_times(x0.shape, cfg, g)
    levels = getattr(lab, "noise_levels", script.noise_levels)(torch.full((1, 1), t), tau, cfg)
    if script is dit_embed:
        own, lam = levels[0].to(x0.device), levels[1].to(x0.device)
        eps = torch.randn(*x0.shape, cfg.emb_dim, generator=g).to(x0.device)
        return model(script.q_sample(model.embeddings()[x0], lam, eps), lam, own > 0), own > 0
    level = levels[0].to(x0.device)  # log-odds or precision
    is_noisy = level < script.CLEAN
    if script is bit_diffusion:
        return model(script.q_sample(model.codes[x0], level, g), level, is_noisy), is_noisy
    x, prec = x0[script.between(level)], level[script.between(level)]
    z = script.q_sample(x, prec, torch.randn(len(x), cfg.vocab_size, generator=g).to(x.device))
    return lab.predict(model, x0, level, z, is_noisy, cfg)[0], is_noisy


@torch.no_grad()
def evaluate_all(run, model, tokenizer, data, cfg, opt):
    """Write eval.jsonl and quality.png into the run folder."""
    (script, lab, samplers), log, n = SCRIPTS[opt.script], [], opt.num_samples
    judge = judge_of(run, opt.judge, data)
    if getattr(cfg, "prediction_type", "logits") != "logits":  # no probabilities of tokens
        samplers = samplers[1:]

    def say(kind, **row):
        log.append(dict(kind=kind, **row))
        run.say(f"{kind}: " + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
                                        for k, v in row.items() if v is not None))
    log.append(dict(kind="config", command=" ".join(sys.argv), seed=cfg.seed,
                    config=dataclasses.asdict(cfg), options=dataclasses.asdict(opt),
                    torch=torch.__version__, dtype=run.dtype,
                    machine=fast.machine(run.device), threads=torch.get_num_threads()))
    g, likely = torch.Generator().manual_seed(cfg.seed), getattr(cfg, "process", "") != "original"
    x0 = script.get_eval_rows(data.test, cfg, 4 * n)[0].to(run.device)
    say("baseline", uniform=math.log(cfg.vocab_size), unigram_entropy=data.unigram_entropy)
    if likely:
        # 1. bounds: of infinitely many steps, of few
        row = script.evaluate(model, data, cfg, "test", opt.rows, lab.nelbo)
        log.append(dict(kind="test", **row))
        run.say(f"test: {report(row)}")
        for sampler in sorted({"token", "bit", "ancestral"} & {*samplers}):
            for steps in opt.steps:
                own = dataclasses.replace(cfg, sampler=sampler)
                how = dict(sampler=sampler) if script is sdd else {}
                nats = lab.nelbo_steps(model, x0[:n], own, g, steps, **how)
                say("steps", num_steps=steps, sampler=sampler, bound="upper",
                    nats_per_row=nats.mean().item(), se=se(nats.cpu()))
        # 2. accuracy where this share of the path is still ahead, inside documents
        masks = infill_masks(x0, cfg, g)
        inside = masks.pop("document")
        commonest = x0[inside].bincount().argmax()
        for t in (0.15, 0.5, 0.85, 1.0):
            logits, is_noisy = predict_at(script, lab, model, x0, t, cfg, g)
            if logits.shape[-1] == cfg.vocab_size:  # not where bits or embeddings are predicted
                target = is_noisy & inside
                right = logits.argmax(1) == x0[is_noisy]
                say("accuracy", t=t, accuracy=right[inside[is_noisy]].float().mean().item(),
                    unigram=(x0[target] == commonest).float().mean().item())
        # 3. infilling, one token per step
        careful = dataclasses.replace(cfg, num_steps=0, temperature=0.5, length_first=False)
        for name, mask in masks.items():
            bound = lab.nelbo(model, x0, cfg, g, is_given=~mask)
            canvas = x0[:n].masked_fill(mask[:n], cfg.vocab_size)
            same = lab.sample(model, canvas, careful, g)[0] == x0[:n]
            say("infill", hole=name, exact=same.all(1).float().mean().item(),
                accuracy=same[mask[:n]].float().mean().item(), bound="upper",
                unigram=(x0[:n][mask[:n]] == commonest).float().mean().item(),
                nats_per_token=(bound.sum() / mask.sum().cpu()).item())
    # 4. samples
    real = measure(x0[:n], cfg, tokenizer, judge)  # as many: diversity depends on it
    say("real", num_samples=n, **real)
    rows = []
    samplers = opt.samplers or samplers
    for sampler in samplers if likely else samplers[:1]:  # the original process has only one
        for steps in sorted({min(steps, cfg.seq_len) for steps in opt.steps}):
            for seed in range(cfg.seed, cfg.seed + opt.seeds):
                some = dataclasses.replace(cfg, sampler=sampler, num_steps=steps)
                canvas = torch.full((n, cfg.seq_len), cfg.vocab_size, device=run.device)
                start = time.time()
                x, nfe = lab.sample(model, canvas, some, torch.Generator().manual_seed(seed))
                rows.append(dict(sampler=sampler, num_steps=steps, seed=seed, num_samples=n,
                                 nfe=nfe, seconds=time.time() - start, order=cfg.order,
                                 temperature=cfg.temperature,
                                 **measure(x, cfg, tokenizer, judge)))
                say("samples", **rows[-1])
    figures.plot_quality(run.out, rows, real, "sampler")
    common.replace(run.out / "eval.jsonl", lambda file: file.writelines(
        (json.dumps(row) + "\n").encode() for row in log))


def main(argv):
    opt = parse_options(Options, argv, __doc__)
    opt.out = opt.out or f"out/{opt.script}"
    _, lab, samplers = SCRIPTS[opt.script]
    for name in opt.samplers:
        if name not in samplers:
            raise common.UserError(f"--samplers of {opt.script} are {', '.join(samplers)}, "
                                   f"not '{name}'")
    cfg = common.load_config(lab.Config, opt.out, reads_data=True)
    if opt.temperature is not None:
        cfg.temperature = opt.temperature
    for name in opt.samplers:
        if bad := dataclasses.replace(cfg, sampler=name).problems():
            raise common.UserError(f"--samplers {name}: {'; '.join(bad)}")
    run, data = common.Run(cfg), load_data(cfg)
    run.out = results_folder(run)
    model, tokenizer = common.load_model(lab.Model, cfg, run.device, data)
    with run.amp:
        evaluate_all(run, model, tokenizer, data, cfg, opt)


if __name__ == "__main__":
    common.run_main(main)
