"""What the choices of sdd.py and lab/sdd_variants.py are worth: trains the default model at one
budget (400 steps of 16 rows) with each choice changed alone and measures the bound on the same
stories. ar.py and mdlm.py stand beside it.

    python lab/candidates.py           writes results/candidates.json and .png; goes on if stopped
    python lab/candidates.py draw      only the figure
"""
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python lab/candidates.py`
import ar
import common
import fast
import mdlm
import sdd
from data.prepare import load_data
from data.units import se
from lab import sdd_variants
from lab.methods import ENTROPY, keep, kept

BUDGET = dict(steps=400, eval_every=400, seed=1337, device="cpu")
CASES = {  # name: (script, what is changed); the first is the default
    "sdd.py": (sdd, {}),
    **{f"--noise-window {w:g}": (sdd, dict(noise_window=w)) for w in (0.05, 0.25, 0.5, 1.0)},
    **{f"--k {k}": (sdd, dict(k=k)) for k in (1, 2, 4, 16)},
    "--add-likelihood state --k 1": (sdd, dict(add_likelihood="state", k=1)),
    "--add-likelihood state": (sdd, dict(add_likelihood="state")),
    "--add-likelihood state --k 16": (sdd, dict(add_likelihood="state", k=16)),
    "--add-likelihood none": (sdd, dict(add_likelihood="none")),
    "--attention full": (sdd, dict(attention="full")),
    "--loss nelbo": (sdd, dict(loss="nelbo")),
    "--curriculum 1,2,4,8": (sdd, dict(curriculum="1,2,4,8")),
    "mdlm.py": (mdlm, {}),
    "ar.py": (ar, {}),
}
TARGET = ROOT / "results/candidates.json"


def run(name, script, changed, steps=BUDGET["steps"]):
    """Train one of them and measure it on 128 validation stories: a row for the file."""
    lab, settings = sdd_variants, dict(BUDGET, steps=steps, eval_every=steps, **changed)
    out = "out/candidates_" + "".join(c if c.isalnum() else "_" for c in name)
    cfg = (lab if script is sdd else script).Config(out=out, **settings)
    row, key, cfg.resume = kept(cfg, script.__name__, *["lab/sdd_variants"] * (script is sdd))
    if row:
        return row
    model = script.train(cfg, *lab.PARTS) if script is sdd else script.train(cfg)
    seconds = [row["seconds"] for row in common.read_log(out) if row["kind"] == "train"][-1]
    x0 = script.get_eval_rows(load_data(cfg).val, cfg, 128)[0]
    with common.Run(cfg).amp:
        nats = ar.nll(model, x0, cfg) if script is ar else (lab if script is sdd else mdlm).nelbo(
            model, x0, cfg, torch.Generator().manual_seed(0), 32)
    row = dict(name=name, changed=changed, steps=steps, seconds=seconds,
               bound="exact" if script is ar else "upper",
               nats_per_story=nats.mean().item(), se=se(nats))
    return keep(cfg, key, row)


def step_seconds(**changed):
    """Median seconds of a training step, without data, evaluation and optimizer."""
    cfg, g = sdd_variants.Config(device="cpu", **changed), torch.Generator().manual_seed(0)
    x0, took = sdd.get_batch(load_data(cfg).train, cfg, g), []
    model = sdd_variants.Model(cfg)
    with common.Run(cfg).amp:
        for _ in range(12):
            start = time.perf_counter()
            sdd_variants.loss_fn(model, x0, *sdd_variants.corrupt(x0, cfg, g)).backward()
            took.append(time.perf_counter() - start)
    return sorted(took)[len(took) // 2]


def draw(made):
    """Bound against the noise window and against k, a line for each self-likelihood."""
    rows = {row["name"]: row for row in made["rows"]}
    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)

    def line(axes, points, label):
        x, names = zip(*points)
        axes.errorbar(x, [rows[n]["nats_per_story"] for n in names],
                      [2 * rows[n]["se"] for n in names], marker="o", ms=4, capsize=2, label=label)
    windows, sizes, state = (0.05, 0.1, 0.25, 0.5, 1), (1, 2, 4, 8, 16), "--add-likelihood state"
    line(left, [(w, f"--noise-window {w:g}" if w != 0.1 else "sdd.py") for w in windows],
         "self-likelihood exact (default)")
    line(right, [(k, f"--k {k}" if k != 8 else "sdd.py") for k in sizes],
         "self-likelihood exact (default)")
    line(right, [(k, f"{state} --k {k}" if k != 8 else state) for k in (1, 8, 16)],
         "only that of the k candidates")
    for axes in (left, right):
        axes.axhline(rows["mdlm.py"]["nats_per_story"], color="tab:gray", ls=":", label="mdlm.py")
        axes.axhline(made["entropy"], label="entropy", **ENTROPY)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        axes.set_xscale("log")
        axes.minorticks_off()
    left.set(xlabel="noise window w", ylabel="bound, nats per story", title="400 steps, 2 SE")
    left.set_xticks(windows, list(map(str, windows)))
    right.set_xlabel("candidates k")
    right.set_xticks(sizes, list(map(str, sizes)))
    figure.savefig(TARGET.with_suffix(".png"))


def main(argv):
    common.show_help(argv, __doc__)
    if argv == ["draw"]:
        return draw(json.loads(TARGET.read_text()))
    if argv:
        raise common.UserError(f"unknown arguments {' '.join(argv)}: give none, or draw")
    # no samples, and no evaluations on the way
    common.show_samples = common.plot_loss = common.Run.validate = lambda *_: None
    rows, cfg = [run(name, *case) for name, case in CASES.items()], sdd_variants.Config(
        out="out/candidates_ratio", device="cpu")
    ratio, key, _ = kept(cfg, "sdd", "lab/sdd_variants")
    ratio = ratio or keep(cfg, key, step_seconds(attention="full") / step_seconds())
    steps = round(BUDGET["steps"] * ratio)  # as long as full attention takes
    rows.append(run(f"sdd.py, {steps} steps", sdd, {}, steps))
    cfg = sdd_variants.Config()
    true_nll = sdd.get_eval_rows(load_data(cfg).val, cfg, 128)[1]
    made = dict(command="python lab/candidates.py", **BUDGET, full_to_pooled_seconds=ratio,
                entropy=true_nll.mean().item(), config={
                    k: v for k, v in dataclasses.asdict(cfg).items()
                    if k not in ("steps", "eval_every", "device")},
                torch=torch.__version__, machine=fast.machine(torch.device("cpu")),
                threads=torch.get_num_threads(), rows=rows)
    TARGET.write_text(json.dumps(made) + "\n")
    draw(made)
    for row in rows:
        print(f"{row['name']:28} {row['nats_per_story']:7.1f} +- {row['se']:.1f}")


if __name__ == "__main__":
    common.run_main(main)
