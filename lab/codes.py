"""Does it matter which token gets which code? Small networks of lab/bit_variants.py for each head,
order of codes and seed, one budget for all. A token head sees the code only through the noise; a
bit head predicts tokens bit by bit, so that leading bits that many likely tokens share are easy.

    python lab/codes.py     writes results/codes.json and codes.png; goes on if stopped
"""
import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python lab/codes.py`
import bit_diffusion
import common
import fast
from data.prepare import load_data
from data.units import se
from lab import bit_variants
from lab.methods import keep, kept

SMALL = dict(steps=300, n_layer=2, n_embd=128, eval_every=300, device="cpu")
CODES, SEEDS = ("id", "random", "frequency", "semantic"), (0, 1, 2)
HEADS = {"token": {}, "bit": dict(head="bit"), "mixture of 32": dict(head="bit", num_mixture=32)}
CASES = [(head, code) for head in HEADS for code in (CODES if head != "mixture of 32" else ["id"])]
TARGET = ROOT / "results/codes.json"


def run(name, code, seed):
    """Train one of HEADS and measure its bound on 128 validation stories: a row for the file."""
    cfg = bit_variants.Config(out=f"out/codes_{name.replace(' ', '_')}_{code}_{seed}", code=code,
                              seed=seed, **HEADS[name], **SMALL)
    row, key, cfg.resume = kept(cfg, "bit_diffusion", "lab/bit_variants")
    if row:
        return row
    model = bit_diffusion.train(cfg, bit_variants.new_model, bit_variants.corrupt,
                                bit_variants.loss_fn, bit_variants.nelbo, bit_variants.sample)
    x0 = bit_diffusion.get_eval_rows(load_data(cfg).val, cfg, 128)[0]
    with common.Run(cfg).amp:
        nats = bit_variants.nelbo(model, x0, cfg, torch.Generator().manual_seed(0), 16)
    row = dict(name=name, head=cfg.head, num_mixture=cfg.num_mixture, code=code, seed=seed,
               nats_per_story=nats.mean().item(), se=se(nats))
    return keep(cfg, key, row)


def draw(rows):
    """The bound of each seed by code, a panel for each head that has all of them."""
    figure = Figure(figsize=(9, 3.2), dpi=100, layout="constrained")
    for axes, head in zip(figure.subplots(1, 2), HEADS):
        for k, code in enumerate(CODES):
            some = [row for row in rows if (row["name"], row["code"]) == (head, code)]
            nats = [row["nats_per_story"] for row in some]
            axes.errorbar([k + 0.15 * (i - 1) for i in range(len(some))], nats,
                          [row["se"] for row in some], fmt="o", ms=4, capsize=2)
            axes.plot([k - 0.3, k + 0.3], 2 * [sum(nats) / len(nats)], color="gray", lw=1)
        axes.set(title=f"head: {head}", xticks=range(len(CODES)), xticklabels=CODES)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("bound, nats per story (entropy 90)")
    figure.savefig(TARGET.with_suffix(".png"))


def main(argv):
    common.show_help(argv, __doc__)
    if argv:
        raise common.UserError(f"unknown arguments {' '.join(argv)}: give none")
    rows = [run(*case, seed) for seed in SEEDS for case in CASES]
    made = dict(command="python lab/codes.py", **SMALL, seed=SEEDS[0], seeds=SEEDS,
                torch=torch.__version__, machine=fast.machine(torch.device("cpu")),
                threads=torch.get_num_threads(), rows=rows)
    TARGET.write_text(json.dumps(made) + "\n")
    draw(rows)
    for head, code in CASES:
        nats = [row["nats_per_story"] for row in rows if (row["name"], row["code"]) == (head, code)]
        print(f"{head:14}{code:10} <= {sum(nats) / len(nats):6.1f} nats/story, seeds "
              + " ".join(f"{value:.1f}" for value in nats))


if __name__ == "__main__":
    common.run_main(main)
