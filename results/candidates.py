"""What the choices of sdd.py are worth: `python results/candidates.py` trains the default model at
one budget (400 steps of 16 rows) with each choice changed alone, measures the bound on the same
stories, and writes results/candidates.json and candidates.png. ar.py and mdlm.py stand beside it.

An interrupted comparison goes on where it stopped; `python results/candidates.py draw` only draws.
"""
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import ar
import common
import common_v1
import compare
import mdlm
import sdd
from data.prepare import load_data
from data.units import se

BUDGET = dict(steps=400, eval_every=400, seed=1337, device="cpu")
CASES = {  # name: (script, what is changed); the first is the default
    "sdd.py": (sdd, {}),
    "--window 0.05": (sdd, dict(window=0.05)),
    "--window 0.25": (sdd, dict(window=0.25)),
    "--window 0.5": (sdd, dict(window=0.5)),
    "--window 1": (sdd, dict(window=1.0)),
    "--k 1": (sdd, dict(k=1)),
    "--k 2": (sdd, dict(k=2)),
    "--k 4": (sdd, dict(k=4)),
    "--k 16": (sdd, dict(k=16)),
    "--skip state --k 1": (sdd, dict(skip="state", k=1)),
    "--skip state": (sdd, dict(skip="state")),
    "--skip state --k 16": (sdd, dict(skip="state", k=16)),
    "--skip none": (sdd, dict(skip="none")),
    "--attention full": (sdd, dict(attention="full")),
    "--loss elbo": (sdd, dict(loss="elbo")),
    "--curriculum 1,2,4,8": (sdd, dict(curriculum="1,2,4,8")),
    "mdlm.py": (mdlm, {}),
    "ar.py": (ar, {}),
}
TARGET = Path(__file__).with_suffix(".json")


def run(name, script, changed, steps=BUDGET["steps"]):
    """Train one of them and measure it on 128 validation stories: a row for the file."""
    out = Path("out") / ("candidates_" + "".join(c if c.isalnum() else "_" for c in name))
    if (out / "row.json").exists():
        return json.loads((out / "row.json").read_text())
    settings = dict(BUDGET, steps=steps, eval_every=steps, **changed)
    cfg = script.Config(out=str(out), **settings)
    model = script.train(cfg)
    trained = [json.loads(line) for line in open(out / "log.jsonl")]
    seconds = [row["seconds"] for row in trained if row["kind"] == "train"][-1]
    data = load_data(cfg) if script is not sdd else None
    x0, g = compare.eval_rows(script, cfg, data, "val", 128)[0], torch.Generator().manual_seed(0)
    with compare.amp(model, cfg):
        if script is ar:
            nats = ar.nll(model, x0, cfg)
        elif script is mdlm:
            nats = mdlm.nelbo(model, x0, cfg, g, 32)
        else:
            nats = sdd.nelbo(model, x0, cfg, g, 32)[0]
    row = dict(name=name, changed=changed, steps=steps, seconds=seconds,
               bound="exact" if script is ar else "upper",
               nats_per_story=nats.double().mean().item(), se=se(nats.double()))
    (out / "row.json").write_text(json.dumps(row))
    return row


def step_seconds(changed):
    """Median seconds of a training step, without data, evaluation and optimizer."""
    cfg = sdd.fill_in(sdd.Config(**changed))
    g = torch.Generator().manual_seed(0)
    model, x0 = sdd.Model(cfg), sdd.get_batch("train", cfg, g)
    took = []
    with compare.amp(model, cfg):
        for _ in range(12):
            start = time.perf_counter()
            sdd.loss_fn(model, x0, cfg, g)[0].backward()
            took.append(time.perf_counter() - start)
    return sorted(took)[len(took) // 2]


def draw(made):
    """Bound against window and against k, a line for each skip."""
    rows = {row["name"]: row for row in made["rows"]}
    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)

    def line(axes, points, label):
        x, names = zip(*points)
        axes.errorbar(x, [rows[n]["nats_per_story"] for n in names],
                      [2 * rows[n]["se"] for n in names], marker="o", ms=4, capsize=2, label=label)

    line(left, [(w, f"--window {w:g}" if w != 0.1 else "sdd.py")
                for w in (0.05, 0.1, 0.25, 0.5, 1)], "all evidence added (default)")
    sizes = (1, 2, 4, 8, 16)
    line(right, [(k, f"--k {k}" if k != 8 else "sdd.py") for k in sizes],
         "all evidence added (default)")
    line(right, [(k, f"--skip state --k {k}" if k != 8 else "--skip state") for k in (1, 8, 16)],
         "only that of the k candidates")
    for axes in (left, right):
        axes.axhline(rows["mdlm.py"]["nats_per_story"], color="tab:gray", ls=":", label="mdlm.py")
        axes.axhline(made["floor"], color="tab:green", ls="--", label="entropy")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        axes.set_xscale("log")
        axes.minorticks_off()
    left.set(xlabel="window w", ylabel="bound, nats per story", title="400 steps, 2 SE")
    left.set_xticks((0.05, 0.1, 0.25, 0.5, 1), ("0.05", "0.1", "0.25", "0.5", "1"))
    right.set_xlabel("candidates k")
    right.set_xticks(sizes, list(map(str, sizes)))
    figure.savefig(TARGET.with_suffix(".png"))


def main():
    if sys.argv[1:] == ["draw"]:
        return draw(json.loads(TARGET.read_text()))
    sdd.grade = common.show_samples = lambda *a, **k: None  # samples, evaluations on the way
    for plumbing in (common, common_v1):
        plumbing.Run.validate = plumbing.plot_loss = lambda *a, **k: None
    rows, kept = [run(name, *case) for name, case in CASES.items()], Path("out/ratio.json")
    if not kept.exists():
        kept.write_text(str(step_seconds(dict(attention="full")) / step_seconds({})))
    ratio = float(kept.read_text())
    steps = round(BUDGET["steps"] * ratio)  # as long as full attention takes
    rows.append(run(f"pooled, {steps} steps", sdd, {}, steps))
    cfg = sdd.fill_in(sdd.Config())
    floor = sdd.get_eval_rows("val", cfg, 128)[1].double().mean().item()
    made = dict(command="python results/candidates.py", **BUDGET, full_to_pooled_seconds=ratio,
                floor=floor, config={k: v for k, v in dataclasses.asdict(cfg).items()
                                     if k not in ("data_dir", "steps", "eval_every", "device")},
                torch=torch.__version__, machine=common.machine(torch.device("cpu")),
                threads=torch.get_num_threads(), rows=rows)
    TARGET.write_text(json.dumps(made) + "\n")
    draw(made)
    for row in rows:
        print(f"{row['name']:24} {row['nats_per_story']:7.1f} +- {row['se']:.1f}")


if __name__ == "__main__":
    main()
