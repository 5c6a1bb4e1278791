"""What the parts of diffugpt_varlen.py's recipe are worth: a parent trains 300 steps and is adapted
(300 steps of 16 rows) with each part changed alone, three seeds; bound and length law are measured
on the same stories.

    python lab/adaptation.py        writes results/adaptation.json, four figures; goes on if stopped
    python lab/adaptation.py draw   only the figures: start and shift, annealing, tails, PADs
"""
import dataclasses
import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python lab/adaptation.py`
import common_v1 as common
import diffugpt_varlen as script

PARENT, STEPS, EVERY, SEEDS = 300, 300, 50, (1337, 1, 2)
CASES = {  # name: what is changed
    "default": {},
    "scratch": dict(init_from="scratch"),
    "scratch, 600 steps": dict(init_from="scratch", steps=PARENT + STEPS),
    "no shift": dict(shift=False),
    "no annealing": dict(attn_annealing_steps=0),
    "no tail rows": dict(p_tail=0.0),
    "5 % of masks are PAD": dict(pad_masked_perc=0.05),
}
TARGET = ROOT / "results/adaptation.json"


def run(name, changed, seed):
    """Train one of them, with its parent: a row for the file."""
    out = Path("out") / f"adaptation_{''.join(c if c.isalnum() else '_' for c in name)}_{seed}"
    if (out / "row.json").exists():
        return json.loads((out / "row.json").read_text())
    parent = Path("out") / f"adaptation_parent_{seed}"
    shared = dict(seed=seed, device="cpu", eval_every=EVERY)
    if not (parent / "row.json").exists():
        model = script.train(script.Config(**shared, pipeline="arm", init_from="scratch",
                                           steps=PARENT, out=str(parent)))
        (parent / "row.json").write_text("{}")
    cfg = script.Config(**{**shared, "steps": STEPS, "parent": str(parent), "out": str(out),
                           **changed})
    model = script.train(cfg)
    log = [json.loads(line) for line in open(out / "log.jsonl")]
    curve = [(row["step"], row["nats_per_doc"]) for row in log if row["kind"] == "val"]
    x0 = script.get_eval_rows("val", cfg, 128)[0]
    with common.precision(torch.device("cpu"), cfg.dtype)[0]:
        nats, info = script.nelbo(model, x0, cfg, torch.Generator().manual_seed(0), 16)
        rows = script.length_report(model, cfg)
    lengths = {row["of"]: row for kind, row in rows if kind == "length"}
    row = dict(name=name, seed=seed, changed=changed, bound="upper", curve=curve,
               nats_per_story=nats.mean().item(), se=common.se(nats),
               parts=dict(zip(("text", "eos", "pad"), info["parts"].mean(0).tolist())),
               length=lengths["law"], known=lengths["known"],
               eos=[row for kind, row in rows if kind == "eos"])
    (out / "row.json").write_text(json.dumps(row))
    return row


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
    axes.axhline(made["floor"], ls="--", color="tab:green", label="entropy")
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
        axes.grid(alpha=0.3, axis="y")
    figure.suptitle(title)
    return figure


def draw(made):
    """One figure for each question."""
    law = {"length, nats (lower is better)": lambda r: r["length"]["nats"],
           "what training lengths alone say": lambda r: r["known"]["nats"],
           "bound, nats per story": lambda r: r["nats_per_story"]}
    pad = {"PADs said at the first call": lambda r: r["length"]["pad_recall"],
           "length, nats": lambda r: r["length"]["nats"],
           "text, nats": lambda r: r["parts"]["text"],
           "EOS and PAD, nats": lambda r: r["parts"]["eos"] + r["parts"]["pad"]}
    figures = dict(
        start=figure_of(made, ("default", "scratch, 600 steps", "scratch", "no shift"),
                        "parent with shift, scratch, parent without shift"),
        annealing=figure_of(made, ("default", "no annealing"), "attention opened in 100 steps"),
        tail=bars(made, ("default", "no tail rows"), law, "rows whose whole tail is hidden"),
        pad=bars(made, ("default", "5 % of masks are PAD"), pad, "PADs shown in training"))
    for name, figure in figures.items():
        figure.savefig(TARGET.with_name(f"adaptation_{name}.png"))


def main(argv):
    if argv == ["draw"]:
        return draw(json.loads(TARGET.read_text()))
    if argv:
        raise common.UserError(f"unknown arguments {' '.join(argv)}: give none, or draw")
    script.grade = common.plot_loss = lambda *a, **k: None  # not needed here
    evaluate = script.evaluate
    script.evaluate = lambda model, cfg: evaluate(model, cfg, n=64)
    rows = [run(name, changed, seed) for seed in SEEDS for name, changed in CASES.items()]
    cfg = script.fill_in(script.Config())
    floor = script.get_eval_rows("val", cfg, 128)[1].double().mean().item()
    made = dict(command="python lab/adaptation.py", seed=SEEDS[0], seeds=SEEDS, steps=STEPS,
                parent_steps=PARENT, floor=floor, torch=torch.__version__,
                config={k: v for k, v in dataclasses.asdict(cfg).items()
                        if k not in ("data_dir", "steps", "parent_steps", "eval_every")},
                machine=common.machine(torch.device("cpu")), threads=torch.get_num_threads(),
                rows=rows)
    TARGET.write_text(json.dumps(made) + "\n")
    draw(made)
    for row in rows:
        print(f"{row['name']:22} seed {row['seed']:4}  <= {row['nats_per_story']:.1f} +- "
              f"{row['se']:.1f}  length {row['length']['nats']:.2f} ({row['known']['nats']:.2f})")


if __name__ == "__main__":
    common.run_main(main)
