"""Every prediction type of dit_embed.py on one budget: the same network, embeddings, noise, uniform
times and steps; what differs is what the network predicts (token logits, x0, v, eps), and so its
loss. The training loss stands beside the bound that it leads to.

    python lab/heads.py             writes results/heads.json and heads.png
    python lab/heads.py draw        only the figure
"""
import dataclasses
import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python lab/heads.py`
import common
import fast
import dit_embed
from data.prepare import load_data
from data.units import se
from lab import dit_variants

STEPS, TARGET = 400, ROOT / "results/heads.json"
USUAL = dict(noise_window=1.0, input="both")  # all see z itself, which v and eps are made of
RUNS = {  # name: settings; noise window 1 is the usual process
    "logits, window 0.1": dict(noise_window=0.1),
    **{name: USUAL | dict(prediction_type=name) for name in ("logits", "x0", "v", "eps")},
}
PARTS = ("prior", "diffusion", "reconstruction")


def corrupt(x0, cfg, g):
    """dit_variants.corrupt with uniform times for all, as in long trainings; in short ones only
    logits have more noise."""
    return dit_variants.corrupt(x0, dataclasses.replace(cfg, steps=4000), g)


def run(name, settings):
    """Train one of them and measure its bound in parts: a row for the file."""
    out = Path("out") / ("head_" + name.replace(", ", "_").replace(" ", "_"))
    cfg = dit_variants.Config(
        steps=STEPS, eval_every=100, warmup=50, device="cpu", out=str(out), order="random",
        num_steps=16, sampler="token" if "logits" in name else "ancestral", **settings)
    model = dit_embed.train(cfg, dit_variants.Model, corrupt, dit_variants.loss_fn,
                            dit_variants.nelbo, dit_variants.sample)
    x0, _ = dit_embed.get_eval_rows(load_data(cfg, quiet=True).val, cfg, 128)
    with common.Run(cfg).amp:
        parts = dit_variants.nelbo_parts(model, x0, cfg, torch.Generator().manual_seed(0), 16)
    bound, rows = sum(parts[key] for key in PARTS), common.read_log(out)
    loss = [row["loss"] for row in rows if row["kind"] == "train"]
    return dict(name=name, **settings, loss=[round(v, 5) for v in loss[::5]],
                val=[(row["step"], row["nats_per_doc"]) for row in rows if row["kind"] == "val"],
                nats_per_story=bound.mean().item(), se=se(bound),
                **{key: parts[key].mean().item() for key in PARTS})


def draw(rows):
    """Left: training losses relative to their first values; right: the bounds."""
    figure = Figure(figsize=(9, 3.8), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in rows:
        smooth = torch.tensor(row["loss"]).unfold(0, 4, 1).mean(1)
        left.plot([5 * k for k in range(len(smooth))], smooth / smooth[0], label=row["name"])
        right.plot(*zip(*row["val"]), marker="o", ms=4, label=row["name"])
    left.set(xlabel="step", ylabel="training loss / its value at first", ylim=(0, 1.1))
    right.set(xlabel="step", ylabel="bound, nats per story (entropy 90)", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(TARGET.with_suffix(".png"))


def main(argv):
    common.show_help(argv, __doc__)
    if argv not in ([], ["draw"]):
        raise common.UserError(f"unknown arguments {' '.join(argv)}: give none, or draw")
    if not argv:
        made = dict(command="python lab/heads.py", steps=STEPS, seed=dit_embed.Config.seed,
                    torch=torch.__version__, machine=fast.machine(torch.device("cpu")),
                    threads=torch.get_num_threads(), rows=[run(*pair) for pair in RUNS.items()])
        TARGET.write_text(json.dumps(made) + "\n")
    rows = json.loads(TARGET.read_text())["rows"]
    draw(rows)
    for row in rows:
        print(f"{row['name']:20} loss {row['loss'][-1]:.3f}  <= {row['nats_per_story']:.1f} +- "
              f"{row['se']:.1f} nats/story")


if __name__ == "__main__":
    common.run_main(main)
