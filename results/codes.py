"""Does it matter which token gets which code? `python results/codes.py` trains small networks of
bit_diffusion.py for every order of codes, head and seed, and writes results/codes.json, codes.png.

A token head sees the code only through the noise; a bit head has to say tokens bit by bit, so that
leading bits that many likely tokens share are easy. One budget for all.
"""
import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import bit_diffusion
import common_v1 as common

SMALL = dict(steps=300, n_layer=2, n_embd=128, eval_every=300, device="cpu")
CODES = ("id", "random", "frequency", "semantic")
HEADS = {"token": dict(head="token"), "bit": dict(head="bit", parts=1)}
SEEDS = (0, 1, 2)


def run(name, code, seed):
    """Train one of them and measure its bound on 128 validation stories: a row for the file."""
    settings = dict(SMALL, code=code, seed=seed, **HEADS[name])
    out = Path("out") / f"codes_{name.replace(', ', '_').replace(' ', '_')}_{code}_{seed}"
    if (out / "bound.json").exists():  # an interrupted comparison goes on
        return json.loads((out / "bound.json").read_text())
    cfg = bit_diffusion.Config(out=str(out), **settings)
    model = bit_diffusion.train(cfg)
    x0 = bit_diffusion.get_eval_rows("val", cfg, 128)[0]
    with common.precision(torch.device("cpu"), cfg.dtype)[0]:
        bound, _ = bit_diffusion.nelbo(model, x0, cfg, torch.Generator().manual_seed(0), 16)
    row = dict(name=name, head=cfg.head, parts=cfg.parts, code=code, seed=seed,
               nats_per_story=bound.mean().item(), se=common.se(bound))
    (out / "bound.json").write_text(json.dumps(row))
    return row


def draw(path, rows):
    """The bound of every seed by code, a panel for each head."""
    figure = Figure(figsize=(9, 3.2), dpi=100, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(HEADS)), HEADS):
        for k, code in enumerate(CODES):
            some = [row for row in rows if (row["name"], row["code"]) == (name, code)]
            nats = [row["nats_per_story"] for row in some]
            axes.errorbar([k + 0.15 * (i - 1) for i in range(len(some))], nats,
                          [row["se"] for row in some], fmt="o", ms=4, capsize=2)
            axes.plot([k - 0.3, k + 0.3], 2 * [sum(nats) / len(nats)], color="gray", lw=1)
        axes.set(title=f"head: {name}", xticks=range(len(CODES)), xticklabels=CODES)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("bound, nats per story (entropy 90)")
    figure.savefig(path)


def main():
    bit_diffusion.grade = lambda *a, **k: None  # samples are not needed here
    out = dict(command="python results/codes.py", **SMALL, seed=SEEDS[0], seeds=SEEDS,
               torch=torch.__version__, machine=common.machine(torch.device("cpu")),
               threads=torch.get_num_threads(),
               rows=[run(*case) for case in ((name, code, seed) for seed in SEEDS
                                             for name in HEADS for code in CODES)])
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(out) + "\n")
    draw(target.with_suffix(".png"), out["rows"])
    for name in HEADS:
        for code in CODES:
            nats = [row["nats_per_story"] for row in out["rows"]
                    if (row["name"], row["code"]) == (name, code)]
            print(f"{name:14} {code:10} <= {sum(nats) / len(nats):6.1f} nats/story, seeds "
                  + " ".join(f"{value:.1f}" for value in nats))


if __name__ == "__main__":
    main()
