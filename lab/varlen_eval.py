"""The evaluation suite of diffugpt_varlen.py: the bound of text, EOS and PAD apart, how well the
first network evaluation predicts the length, and samples of every length mode: rows of eval.jsonl,
length.png, quality.png.

    python lab/varlen_eval.py --out out/diffugpt_varlen --judge out/ar
    python lab/varlen_eval.py --order random --temperature 1 --seeds 3 --tokens-per-step 2 4

An end at L is the most likely token there only if P(L) exceeds every other probability: rarely,
even for a perfect network. So the length is judged by its distribution: nats, coverage, looseness.
"""
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python lab/varlen_eval.py`
import common
import fast
import diffugpt_varlen as script
from data.prepare import load_data
from data.units import report, se, tokens_of
from lab import figures
from lab.methods import parse_options, results_folder
from lab.metrics import judge_of, measure
from lab.varlen_variants import Config, Model, length_dist, sample

MODES = ("fixed", "truncate", "quantile", "blockwise", "presampled")


@dataclass
class Options:
    out: str = "out/diffugpt_varlen"  # run folder of the script or of lab/varlen_variants.py
    judge: str = "out/ar"  # the run of ar.py whose likelihood is the generative NLL
    modes: tuple[Literal["fixed", "truncate", "quantile", "blockwise", "presampled"], ...] = MODES
    tokens_per_step: tuple[int, ...] = (1, 2, 4, 8)
    seeds: int = 1  # repetitions of every sampling setting
    rows: int = 500  # test rows of the bound
    num_samples: int = 64  # of every setting
    prompt_tokens: int = 32  # of the documents whose length is predicted
    order: Literal["random", "l2r", "maxprob", "margin", "entropy"] | None = None  # as the run
    temperature: float | None = None


# ---- lengths -------------------------------------------------------------------------------------
def nelbo_parts(model, x0, cfg, g, draws=8):
    """The bound of text, of the EOS and of PAD apart: (B, 3) nats per row."""
    x, nats = script.to_canvas(x0, cfg).cpu(), script.nelbo_per_token(model, x0, cfg, g, draws)
    is_eos, is_pad = (x == cfg.eos) & (cfg.rows == "docs"), x == cfg.vocab_size
    return torch.stack([(nats * part).sum(1) for part in (~is_eos & ~is_pad, is_eos, is_pad)], 1)


def prompts(split, cfg, n, prompt_tokens):
    """The first n documents of a split as canvases x (n, T), the length m (n,) of their prompts
    (prompt_tokens, or all but the EOS of shorter documents), and L (n,), T where they are cut."""
    x = script.to_canvas(script.get_eval_rows(split, cfg, n)[0], cfg)
    L = script.length_of(x, cfg)
    return x, L.clamp(max=prompt_tokens), L


def training_length_dist(split, cfg, m):
    """What the lengths of the training documents alone say, given L >= m (n,): log P(L) as
    length_dist returns it, (n, T + 1), from their counts and one more."""
    T = cfg.seq_len
    length = torch.from_numpy(np.diff(split[1])).long() - 1  # without EOS
    counts = length.clamp(max=T).bincount(minlength=T + 1)[:T + 1] + 1.0
    in_prompt = torch.arange(T + 1) < m[:, None]
    return counts.log().expand(len(m), -1).masked_fill(in_prompt, -torch.inf).log_softmax(1)


def length_metrics(logp, L, quantile):
    """What a length distribution logp (n, T + 1) is worth where L (n,) came: nats; of the shortest
    canvas that holds L with probability `quantile` by it, how often it does (coverage) and how
    many tokens it is too long (looseness); the mean distance of its median."""
    T, p = logp.shape[1] - 1, logp.double().exp().cumsum(1)
    canvas, median = ((p < q - 1e-9).sum(1).clamp(max=T) for q in (quantile, 0.5))
    nats = -logp.double().gather(1, L[:, None])[:, 0]
    return dict(nats=nats.mean().item(), nats_se=se(nats),
                coverage=(L <= canvas).double().mean().item(),
                looseness=(canvas - L).double().mean().item(),
                distance=(median - L).double().abs().mean().item())


@torch.no_grad()
def first_pass(model, xt, cfg):
    """One evaluation of canvases xt (n, T): log p(EOS), log p(PAD) and the most likely id of each
    position, all (n, T)."""
    parts = []
    for part in xt.split(32):
        logits = model(part).float()  # (32, T, V + 1)
        ends = logits[..., [cfg.eos, cfg.vocab_size]] - logits.logsumexp(2, keepdim=True)
        parts.append((ends[..., 0].cpu(), ends[..., 1].cpu(), logits.argmax(2).cpu()))
    return [torch.cat(part) for part in zip(*parts)]


@torch.no_grad()
def length_report(model, data, cfg, split="val", n=128, quantiles=(0.9,), prompt_tokens=32):
    """How well the first evaluation predicts the length of the first n documents, (kind, row) of
    the log. length: of the `model` and of the `training` lengths alone, a row for each quantile.
    eos: how often the EOS is found by the share of text revealed, without and with the PADs:
    `position` it is more likely at L than elsewhere, `token` it is the most likely token at L."""
    device, g = model.transformer.wte.weight.device, torch.Generator().manual_seed(0)
    x, m, L = prompts(getattr(data, split), cfg, n, prompt_tokens)
    logp = torch.cat([length_dist(model, x[i].to(device), m[i].to(device), cfg).cpu()
                      for i in torch.arange(len(x)).split(32)])
    dists = dict(model=logp, training=training_length_dist(data.train, cfg, m))
    rows = [("length", dict(of=name, quantile=q, rows=len(x), **length_metrics(dist, L, q)))
            for q in quantiles for name, dist in dists.items()]
    V, column, is_whole = cfg.vocab_size, torch.arange(x.shape[1]), L < x.shape[1]
    x, m, L = x[is_whole], m[is_whole], L[is_whole]
    for pads in (False, True) if len(x) else ():
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            shown = torch.rand(x.shape, generator=g) < share
            shown &= (x != cfg.eos) & ((x != V) | pads)
            is_mask = (column >= m[:, None]) & ~shown
            eos, pad, top = first_pass(model, x.masked_fill(is_mask, V + 1).to(device), cfg)
            found = eos.masked_fill(~is_mask, -torch.inf).argmax(1) == L
            token = top.gather(1, L[:, None]) == cfg.eos
            rows.append(("eos", dict(revealed=share, pads=pads, token=token.double().mean().item(),
                                     position=found.double().mean().item())))
            if share == 0 and not pads:  # (E4): p(PAD) grows by what p(EOS) was
                jump = pad.exp()[:, 1:] - pad.exp()[:, :-1] - eos.exp()[:, :-1]
                recall = ((top == V) & (x == V)).sum() / (x == V).sum().clamp(min=1)
                rows[0][1].update(pad_recall=recall.item(), coherence_gap=jump[
                    (column >= m[:, None])[:, 1:]].abs().mean().item())
    return rows


def plot_lengths(out, rows):
    """length.png. Top: how much too long a canvas is against how often it holds the document.
    Bottom: how often the EOS is found by the share of text revealed. rows: of length_report."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    for name, label in dict(model="model, first evaluation", training="training lengths").items():
        part = [row for kind, row in rows if kind == "length" and row["of"] == name]
        top.plot([row["coverage"] for row in part], [row["looseness"] for row in part],
                 marker="o", ms=4, label=label)
    top.set(xlabel="share of documents that fit their canvas", ylabel="tokens too long, mean")
    for pads in (False, True):
        part = [row for kind, row in rows if kind == "eos" and row["pads"] == pads]
        bottom.plot([row["revealed"] for row in part], [row["position"] for row in part],
                    marker="o", ms=4, ls="--" if pads else "-",
                    label="PADs visible too: a leak" if pads else "only text visible")
    bottom.set(xlabel="share revealed", ylabel="share whose EOS is found", ylim=(-0.02, 1.02))
    figures.save(figure, out / "length.png", top, bottom)


# ---- samples -------------------------------------------------------------------------------------
@torch.no_grad()
def sample_and_count(model, cfg, n, seed, device):
    """n samples: rows x (n, T), and what they cost: NFE, seconds, tokens processed by the network
    per sample (BOS too), contradictions, the share of rows with text behind an EOS."""
    processed, wrong = [], torch.zeros(n, dtype=torch.bool)

    def on_step(nfe, x):
        is_text = (x != cfg.eos) & (x != cfg.vocab_size)
        wrong.logical_or_((is_text & ((x == cfg.eos).cumsum(1) > 0)).any(1).cpu())
    name = "hidden_states" if hasattr(model, "hidden_states") else "forward"
    compute = getattr(model, name)  # hidden_states are all that a length head needs

    def counted(idx, *args, **kw):
        processed.append(idx.numel() + len(idx))
        return compute(idx, *args, **kw)
    setattr(model, name, counted)
    canvas, start = torch.full((n, cfg.seq_len), cfg.vocab_size, device=device), time.time()
    x, nfe = sample(model, canvas, cfg, torch.Generator().manual_seed(seed), on_step)
    seconds, num_tokens = time.time() - start, sum(map(len, tokens_of(x, cfg)))
    delattr(model, name)
    return x, dict(nfe=nfe, tokens_processed=sum(processed),
                   processed_per_sample=sum(processed) / n, seconds=seconds,
                   tok_s=num_tokens / seconds, contradictions=wrong.float().mean().item())


@torch.no_grad()
def evaluate_all(run, model, tokenizer, data, cfg, opt):
    """Write eval.jsonl, length.png and quality.png into the run folder."""
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
    # 1. the bound
    row = script.evaluate(model, data, cfg, "test", opt.rows)
    log.append(dict(kind="test", **row))
    run.say(f"test: {report(row)}")
    x0 = script.get_eval_rows(data.test, cfg, n)[0].to(run.device)
    if cfg.rows == "docs":
        parts = nelbo_parts(model, x0, cfg, torch.Generator().manual_seed(cfg.seed)).mean(0)
        say("parts", **dict(zip(("text", "eos", "pad"), parts.tolist())))
        # 2. lengths
        rows = length_report(model, data, cfg, "test", 4 * n,
                             sorted({0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, cfg.length_quantile}),
                             opt.prompt_tokens)
        for kind, row in rows:
            say(kind, **row)
        plot_lengths(run.out, rows)
    # 3. samples
    real = measure(x0, cfg, tokenizer, judge)  # as many: diversity depends on it
    say("real", num_samples=n, **real)
    rows = []
    for mode in opt.modes if cfg.rows == "docs" else ("fixed",):
        for k in opt.tokens_per_step:
            for seed in range(cfg.seed, cfg.seed + opt.seeds):
                some = dataclasses.replace(cfg, length_mode=mode, num_steps=-(-cfg.seq_len // k))
                x, cost = sample_and_count(model, some, n, seed, run.device)
                rows.append(dict(length_mode=mode, num_steps=some.num_steps,
                                 tokens_per_step=-(-cfg.seq_len // some.num_steps),
                                 seed=seed, num_samples=n, order=cfg.order,
                                 temperature=cfg.temperature, **cost,
                                 **measure(x, cfg, tokenizer, judge)))
                say("samples", **rows[-1])
    figures.plot_quality(run.out, rows, real, "length_mode", "processed_per_sample",
                         "tokens processed per sample")
    common.replace(run.out / "eval.jsonl", lambda file: file.writelines(
        (json.dumps(row) + "\n").encode() for row in log))


def main(argv):
    opt = parse_options(Options, argv, __doc__)
    cfg = common.load_config(Config, opt.out, reads_data=True)
    if cfg.pipeline == "arm":
        raise common.UserError(f"{opt.out} holds a causal parent: evaluate it with "
                               f"`python diffugpt_varlen.py eval --out {opt.out}`")
    for name in ("order", "temperature"):
        if getattr(opt, name) is not None:
            setattr(cfg, name, getattr(opt, name))
    run, data = common.Run(cfg), load_data(cfg)
    run.out = results_folder(run)
    model, tokenizer = common.load_model(Model, cfg, run.device, data)
    with run.amp:
        evaluate_all(run, model, tokenizer, data, cfg, opt)


if __name__ == "__main__":
    common.run_main(main)
