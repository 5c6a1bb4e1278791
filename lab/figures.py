"""Figures for the folder of a run, beside loss.png.

    python lab/figures.py --out out/mdlm     trajectory.png, of a new sample of mdlm.py
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python lab/figures.py`
import common
import mdlm
from lab.decoding import Config, decode
from lab.mdlm_variants import Model
from lab.methods import ENTROPY, parse_options, results_folder


def save(figure, path, *panels):
    """Write the figure with a grid and a legend in each panel."""
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    common.replace(Path(path), lambda file: figure.savefig(file, dpi=100))


@torch.no_grad()
def plot_integrand(out, model, x0, cfg, g, points=32):
    """integrand.png: mean nats of a masked token against the mask rate, 2 SE over rows; the area
    under it is the bound per position (E3)."""
    B, T = x0.shape
    rates, means, errors = [(k + 0.5) / points for k in range(points)], [], []
    for rate in rates:
        n = torch.full((B,), 1 + int(rate * T)).clamp(max=T)
        ce = mdlm.masked_ce(model, x0, mdlm.mask_tokens(x0, n, cfg, g)).sum(1).cpu() / n
        means.append(ce.mean().item())
        errors.append(2 * ce.std().item() / B ** 0.5)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(rates, means, errors, marker="o", ms=4, capsize=2,
                  label="cross-entropy of a masked token, 2 SE")
    axes.fill_between(rates, means, alpha=0.2,
                      label=f"area = bound <= {sum(means) / points:.3f} nats per position")
    axes.set(xlabel="mask rate", ylabel="nats per masked token", xlim=(0, 1), ylim=(0, None),
             title=f"{out.name}: the bound is the area ({cfg.rows} rows of {cfg.seq_len})")
    save(figure, out / "integrand.png", axes)


def plot_quality(out, rows, real, key="order", cost="nfe", label="NFE, network evaluations"):
    """quality.png: quality and diversity of samples against their cost, a line for each `key`, mean
    and range over seeds; dashed: real text. rows, real: rows of eval.jsonl."""
    names = {"valid_stories": "valid-story rate", "valid_sentences": "valid-sentence rate",
             "gen_nll": "generative NLL, nats/token", "entropy": "entropy of tokens, nats"}
    names = {name: label for name, label in names.items() if rows[0].get(name) is not None}
    figure = Figure(figsize=(7, 2.3 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    ticks = []
    for at in sorted(row[cost] for row in rows):
        ticks += [at] if not ticks or at > 1.4 * ticks[-1] else []
    for axes, (name, title) in zip(panels, names.items()):
        axes.set_prop_cycle(color=["tab:blue", "tab:orange", "tab:red", "tab:purple", "tab:brown"])
        for value in dict.fromkeys(row[key] for row in rows):
            points = {}
            for row in (row for row in rows if row[key] == value):
                points.setdefault(row["num_steps"], []).append((row[cost], row[name]))
            x = [sum(c for c, _ in pairs) / len(pairs) for pairs in points.values()]
            y = [[v for _, v in pairs] for pairs in points.values()]
            line, = axes.plot(x, [sum(v) / len(v) for v in y], marker="o", ms=4, label=value)
            axes.fill_between(x, [*map(min, y)], [*map(max, y)], alpha=0.2, lw=0,
                              color=line.get_color())
        top = max(row[name] for row in rows)
        axes.axhline(real[name], label="real text", **ENTROPY)
        if real[name] > 4 * top:  # the curves would lie on the axis
            axes.set_ylim(-0.1 * top - 0.01, 1.2 * top + 0.05)
        axes.set(ylabel=title, xscale="log")
        axes.set_xticks(ticks, [f"{n:.0f}" for n in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    name = out.name.removesuffix("_weights")
    panels[0].set_title(f"{name}: quality of samples and what they cost", fontsize=11)
    panels[-1].set_xlabel(label)
    save(figure, out / "quality.png", panels[0])


def plot_trajectory(out, frames, tokenizer, cfg):
    """trajectory.png: at which NFE each position of a sample got its last token, and which.
    frames: (nfe, ids (T,)) after each step."""
    last = frames[-1][1]
    written = [max((nfe for nfe, ids in frames if ids[i] != token), default=0) + 1
               for i, token in enumerate(last)]
    text = [i for i, token in enumerate(last) if token != cfg.eos]
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.scatter(range(len(last)), written, s=9, color="lightgray", label="end of document")
    axes.scatter(text, [written[i] for i in text], s=12, color="tab:blue", label="text")
    for i in text[::max(1, len(text) // 45)]:
        axes.annotate(tokenizer.decode([last[i]]).strip(), (i, written[i]), fontsize=6.5,
                      rotation=45, xytext=(1, 2), textcoords="offset points", parse_math=False)
    axes.set(xlabel="position in the row", ylabel="NFE at which it got its last token",
             title="one sample: every position when it was written")
    axes.margins(x=0.02, y=0.12)
    save(figure, out / "trajectory.png", axes)


@dataclass
class Options:
    out: str = "out/mdlm"  # run folder of mdlm.py or lab/mdlm_variants.py
    seed: int = 1337  # of the sample


def main(argv):
    opt = parse_options(Options, argv, __doc__)
    cfg = common.load_config(Config, opt.out)
    run, frames = common.Run(cfg), []
    run.out = results_folder(run)
    model, tokenizer = common.load_model(Model, cfg, run.device)
    with run.amp:
        decode(model, common.encode_canvas(tokenizer, cfg, 1).to(run.device), cfg,
               torch.Generator().manual_seed(opt.seed),
               on_step=lambda nfe, x: frames.append((nfe, x[0].tolist())))
    plot_trajectory(run.out, frames, tokenizer, cfg)
    run.say(str(run.out / "trajectory.png"))


if __name__ == "__main__":
    common.run_main(main)
