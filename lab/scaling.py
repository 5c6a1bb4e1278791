"""What width and steps are worth: ar.py and mdlm.py at three widths, for 200 and for 800 steps, all
else as by default, measured on the same 128 validation stories.

    python lab/scaling.py           writes results/scaling.json and scaling.png; goes on if stopped
    python lab/scaling.py draw      only the figure
"""
import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python lab/scaling.py`
import ar
import common
import fast
import mdlm
from data.prepare import load_data
from lab.methods import ENTROPY, keep, kept

WIDTHS, STEPS = (64, 128, 256), (200, 800)
TARGET = ROOT / "results/scaling.json"


def run(script, width, steps):
    """Train one of them and measure it: a row for the file."""
    name = script.__name__
    cfg = script.Config(n_embd=width, steps=steps, eval_every=steps, device="cpu",
                        out=f"out/scaling_{name}_{width}_{steps}")
    row, key, cfg.resume = kept(cfg, name)
    if row:
        return row
    model = script.train(cfg)
    with common.Run(cfg).amp:
        row = script.evaluate(model, load_data(cfg), cfg)
    row = dict(name=name, n_embd=width, steps=steps, seed=cfg.seed, bound=row["bound"],
               tokens=steps * cfg.batch_size * cfg.seq_len,
               matrices=sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2),
               parameters=sum(p.numel() for p in model.parameters()),
               nats_per_story=row["nats_per_doc"], se=row["se"],
               entropy_per_doc=row["entropy_per_doc"])
    return keep(cfg, key, row)


def draw(rows):
    """Likelihood against width, a line for each number of steps."""
    figure = Figure(figsize=(7, 3.8), dpi=100, layout="constrained")
    axes = figure.subplots()
    for name, color in (("ar", "C0"), ("mdlm", "C1")):
        for steps, style in zip(STEPS, ("--", "-")):
            line = [row for row in rows if (row["name"], row["steps"]) == (name, steps)]
            axes.errorbar([r["n_embd"] for r in line], [r["nats_per_story"] for r in line],
                          [2 * r["se"] for r in line], ls=style, color=color, marker="o", ms=4,
                          capsize=2, label=f"{name}.py, {steps} steps")
    axes.axhline(rows[0]["entropy_per_doc"], label="entropy", **ENTROPY)
    axes.set(xlabel="width", ylabel="nats per story, 2 SE", xscale="log", yscale="log",
             title="Width and steps: exact for ar.py, a bound for mdlm.py")
    axes.set_xticks(WIDTHS, list(map(str, WIDTHS)))
    ticks = [t for t in (90, 120, 160, 220, 300, 400, 550) if axes.get_ylim()[0] < t]
    axes.set_yticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(TARGET.with_suffix(".png"))


def main(argv):
    common.show_help(argv, __doc__)
    if argv == ["draw"]:
        return draw(json.loads(TARGET.read_text())["rows"])
    if argv:
        raise common.UserError(f"unknown arguments {' '.join(argv)}: give none, or draw")
    rows = [run(script, width, steps) for steps in STEPS for width in WIDTHS
            for script in (ar, mdlm)]
    made = dict(command="python lab/scaling.py", seed=rows[0]["seed"],
                torch=torch.__version__, machine=fast.machine(torch.device("cpu")),
                threads=torch.get_num_threads(), rows=rows)
    TARGET.write_text(json.dumps(made) + "\n")
    draw(rows)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    common.run_main(main)
