"""What the parts of diffugpt_varlen.py's recipe are worth: a parent trains 300 steps and is adapted
(300 steps of 16 rows) with each part changed alone, three seeds; bound and length distribution are
measured on the same stories.

    python lab/adaptation.py        writes results/adaptation.json, four figures; goes on if stopped
    python lab/adaptation.py draw   only the figures: start and shift, annealing, masked tails, PADs
"""
import dataclasses
import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python lab/adaptation.py`
import common
import fast
import diffugpt_varlen as script
from data.prepare import load_data
from data.units import se
from lab import varlen_variants as lab
from lab.methods import ENTROPY, keep, kept
from lab.varlen_eval import length_report, nelbo_parts

PARENT, STEPS, EVERY, SEEDS = 300, 300, 50, (1337, 1, 2)
CASES = {  # name: what is changed
    "default": {},
    "scratch": dict(init_from="scratch"),
    "scratch, 600 steps": dict(init_from="scratch", steps=PARENT + STEPS),
    "no shift": dict(shift=False),
    "no annealing": dict(attn_annealing_steps=1),
    "no tail rows": dict(tail_share=0.0, p_prompt=0.1),
    "5 % of masks are PAD": dict(pad_masked_perc=0.05),
}
TARGET = ROOT / "results/adaptation.json"


CODE = ("diffugpt_varlen", "lab/varlen_variants")


def train(cfg):
    """Train as cfg says: (model, data, log)."""
    model = script.train(cfg, lab.Model, lab.corrupt, lab.loss_fn, sample=lab.sample,
                         init_model=lab.init_model)
    return model, load_data(cfg), common.read_log(cfg.out)


def run(name, changed, seed):
    """Train one of them, with its parent: a row for the file."""
    shared = dict(seed=seed, device="cpu", eval_every=EVERY)
    parent = lab.Config(**shared, pipeline="arm", init_from="scratch", steps=PARENT,
                        out=f"out/adaptation_parent_{seed}")
    out = f"out/adaptation_{''.join(c if c.isalnum() else '_' for c in name)}_{seed}"
    cfg = lab.Config(**{**shared, "steps": STEPS, "init_from": parent.out, "out": out, **changed})
    row, key, cfg.resume = kept(cfg, *CODE)
    if row:
        return row
    is_trained, parent_key, parent.resume = kept(parent, *CODE)
    if not is_trained:
        train(parent)
        keep(parent, parent_key, True)
    model, data, log = train(cfg)
    x0 = script.get_eval_rows(data.val, cfg, 128)[0]
    with common.Run(cfg).amp:
        parts = nelbo_parts(model, x0, cfg, torch.Generator().manual_seed(0), 16)
        rows = length_report(model, data, cfg)
    nats, lengths = parts.sum(1), {row["of"]: row for kind, row in rows if kind == "length"}
    row = dict(name=name, seed=seed, changed=changed, bound="upper",
               curve=[(row["step"], row["nats_per_doc"]) for row in log if row["kind"] == "val"],
               nats_per_story=nats.mean().item(), se=se(nats),
               parts=dict(zip(("text", "eos", "pad"), parts.mean(0).tolist())),
               length=lengths["model"], training_length=lengths["training"],
               eos=[row for kind, row in rows if kind == "eos"])
    return keep(cfg, key, row)


def figure_of(made, names, title):
    """Bound against steps: a line a case, its three seeds thin."""
    figure = Figure(figsize=(7, 3.8), dpi=100, layout="constrained")
    axes = figure.subplots()
    for color, name in enumerate(names):
        curves = [dict(map(tuple, row["curve"])) for row in made["rows"] if row["name"] == name]
        steps = [step for step in curves[0] if step]
        for curve in curves:
            axes.plot(steps, [curve[s] for s in steps], lw=0.6, alpha=0.6, color=f"C{color}")
        axes.plot(steps, [sum(c[s] for c in curves) / len(curves) for s in steps], marker="o", ms=3,
                  color=f"C{color}", label=name)
    axes.axhline(made["entropy"], label="entropy", **ENTROPY)
    axes.set(xlabel="step of the adaptation", ylabel="bound, nats per story", title=title,
             yscale="log")
    axes.set_yticks((100, 150, 200, 300, 400, 600), ("100", "150", "200", "300", "400", "600"))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def bars(made, names, panels, title):
    """A panel for each quantity, a bar for each case (mean of the seeds, each seed a dot)."""
    figure = Figure(figsize=(2.6 * len(panels), 3.6), dpi=100, layout="constrained")
    for axes, (label, value) in zip(figure.subplots(1, len(panels)), panels.items()):
        for at, name in enumerate(names):
            values = [value(row) for row in made["rows"] if row["name"] == name]
            axes.bar(at, sum(values) / len(values), color=f"C{at}", alpha=0.5)
            axes.scatter([at] * len(values), values, color="black", s=8, zorder=3)
        axes.set_xticks(range(len(names)), [name.replace(" of ", "\nof ") for name in names],
                        fontsize=7)
        axes.set_title(label, fontsize=9)
        axes.margins(y=0.08)
        axes.grid(alpha=0.3, axis="y")
    figure.suptitle(title)
    return figure


def draw(made):
    """One figure for each question."""
    tail = {"length, nats": lambda r: r["length"]["nats"],
            "by training lengths alone, nats": lambda r: r["training_length"]["nats"],
            "bound, nats per story": lambda r: r["nats_per_story"]}
    pad = {"PAD recall, first evaluation": lambda r: r["length"]["pad_recall"],
           "length, nats": lambda r: r["length"]["nats"],
           "text, nats per story": lambda r: r["parts"]["text"],
           "EOS and PAD, nats per story": lambda r: r["parts"]["eos"] + r["parts"]["pad"]}
    figures = dict(
        start=figure_of(made, ("default", "scratch, 600 steps", "scratch", "no shift"),
                        "parent with shift, scratch, parent without shift"),
        annealing=figure_of(made, ("default", "no annealing"),
                            "attention opened in 100 steps, or at once"),
        tail=bars(made, ("default", "no tail rows"), tail, "rows with a masked tail"),
        pad=bars(made, ("default", "5 % of masks are PAD"), pad, "PADs visible in training"))
    for name, figure in figures.items():
        figure.savefig(TARGET.with_name(f"adaptation_{name}.png"))


def main(argv):
    common.show_help(argv, __doc__)
    if argv not in ([], ["draw"]):
        raise common.UserError("usage: python lab/adaptation.py [draw]")
    if argv:
        if not TARGET.exists():
            raise common.UserError(f"no {TARGET}: run `python lab/adaptation.py`")
        return draw(json.loads(TARGET.read_text()))
    common.show_samples = common.plot_loss = lambda *_: None  # not needed here
    rows = [run(name, changed, seed) for seed in SEEDS for name, changed in CASES.items()]
    cfg = lab.Config()
    true_nll = script.get_eval_rows(load_data(cfg).val, cfg, 128)[1]
    made = dict(command="python lab/adaptation.py", seed=SEEDS[0], seeds=SEEDS, steps=STEPS,
                parent_steps=PARENT, entropy=true_nll.mean().item(), torch=torch.__version__,
                config={k: v for k, v in dataclasses.asdict(cfg).items()
                        if k not in ("steps", "parent_steps", "eval_every")},
                machine=fast.machine(torch.device("cpu")), threads=torch.get_num_threads(),
                rows=rows)
    TARGET.write_text(json.dumps(made) + "\n")
    draw(made)
    for row in rows:
        print(f"{row['name']:22} seed {row['seed']:4}  <= {row['nats_per_story']:.1f} +- "
              f"{row['se']:.1f}  length {row['length']['nats']:.2f} "
              f"({row['training_length']['nats']:.2f})")


if __name__ == "__main__":
    common.run_main(main)
