"""Every head of dit_embed.py on one budget: `python results/heads.py` writes results/heads.json and
heads.png.

The same network, embeddings, noise and steps; what differs is what the network says (token logits,
x0, v, eps) and so its loss. The training loss stands beside the bound it leads to.
"""
import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import common_v1 as common
import dit_embed

STEPS = 400
RUNS = {  # name: settings; window 1 is the classic process
    "logits, window 0.1": dict(window=0.1),
    "logits": dict(window=1.0),
    "x0": dict(window=1.0, param="x0"),
    "v": dict(window=1.0, param="v"),
    "eps": dict(window=1.0, param="eps"),
}


def run(name, settings):
    """Train one of them and measure its bound in parts: a row for the file."""
    out = Path("out") / ("head_" + name.replace(", ", "_").replace(" ", "_"))
    cfg = dit_embed.Config(steps=STEPS, eval_every=100, warmup=50, device="cpu", out=str(out),
                           **settings)
    model = dit_embed.train(cfg)
    x0 = dit_embed.get_eval_rows("val", cfg, 128)[0]
    with common.precision(torch.device("cpu"), cfg.dtype)[0]:
        bound, info = dit_embed.nelbo(model, x0, cfg, torch.Generator().manual_seed(0), 16)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    loss = [row["loss"] for row in rows if row["kind"] == "train"]
    return dict(name=name, **settings, loss=[round(v, 5) for v in loss[::5]],
                val=[(row["step"], row["nats_per_doc"]) for row in rows if row["kind"] == "val"],
                nats_per_story=bound.mean().item(), se=common.se(bound),
                **{key: info[key].mean().item() for key in ("prior", "diff", "recon")})


def draw(path, rows):
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
    figure.savefig(path)


def main():
    out = dict(command="python results/heads.py", steps=STEPS, seed=dit_embed.Config.seed,
               torch=torch.__version__, machine=common.machine(torch.device("cpu")),
               threads=torch.get_num_threads(), rows=[run(*pair) for pair in RUNS.items()])
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(out) + "\n")
    draw(target.with_suffix(".png"), out["rows"])
    for row in out["rows"]:
        print(f"{row['name']:20} loss {row['loss'][-1]:.3f}  <= {row['nats_per_story']:.1f} +- "
              f"{row['se']:.1f} nats/story")


if __name__ == "__main__":
    main()
