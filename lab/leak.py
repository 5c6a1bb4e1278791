"""Why the original process of lab/sdd_variants.py writes one text: trains it and ours at one budget
(300 steps of 16 rows), measures what the original reports (accuracy), a copy baseline, where the
truth is among the candidates, and samples. It answers the three questions that the original leaves
open: do temperature or more steps repair its samples, does size, does another noise?

    python lab/leak.py           writes results/leak.json and leak.png; goes on if stopped
    python lab/leak.py draw      only the figure

A run of ar.py in out/ar gives the generative NLL.
"""
import dataclasses
import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python lab/leak.py`
import common
import fast
import sdd
from data.prepare import load_data
from data.units import tokens_of
from lab import sdd_variants
from lab.methods import keep, kept
from lab.metrics import load_judge, measure
from lab.sdd_variants import Config

BUDGET = dict(steps=300, eval_every=300, seed=1337, device="cpu")
SMALL = dict(n_layer=2, n_head=2, n_embd=96)
CASES = {  # name: what is changed
    "original, swap 0.95": dict(process="original"),
    "original, swap 0": dict(process="original", swap=0.0),
    "original, swap 0.95, 2x96": dict(process="original", **SMALL),
    "ours": {},
    "ours, 2x96": SMALL,
}
SETTINGS = [(16, 0.3), (16, 0.7), (16, 1.0), (32, 0.7)]  # steps, temperature
TARGET, N = ROOT / "results/leak.json", 32


def truth_among(model, cfg, x0, g):
    """Share of noisy positions whose truth is among the candidates when 1/16, 3/16 ... 15/16 of the
    path are ahead: in training the truth of x0 (B, T), in sampling what the position becomes."""
    some = dataclasses.replace(cfg, order="random", sampler="token", temperature=1.0, num_steps=16,
                               remask="none", length_first=False)
    x, frames = sdd_variants.candidate_trace(model, torch.full_like(x0, cfg.vocab_size), some, g)
    times, trained, sampled = [(2 * k + 1) / 16 for k in range(8)], [], []

    def share(ids, x, prec):
        hit = (ids == x[..., None]).any(2)
        return hit[prec].double().mean().item()
    for t in times:
        _, level, drawn, _ = frames[round((1 - t) * 16)]
        if cfg.process == "original":
            ids = sdd_variants.original_state(x0, torch.full((len(x0), 1), t), cfg, g)[0]
            is_noisy = was_noisy = torch.ones_like(x0) > 0
        else:
            prec, _ = sdd.noise_levels(t, sdd.position_times(x0.shape, cfg, g), cfg)
            z = sdd_variants.draw_z(x0, prec, cfg.vocab_size, g)
            ids, _ = sdd.input_state(x0, prec, z, cfg.k)
            is_noisy, was_noisy = sdd.between(prec), sdd.between(level)
        trained.append(share(ids, x0, is_noisy))
        sampled.append(share(drawn, x, was_noisy))
    return dict(t=times, training=trained, sampling=sampled)


def run(name, changed, data, judge):
    """Train one of them, measure and sample it: a row for the file."""
    cfg = Config(out="out/leak_" + "".join(c if c.isalnum() else "_" for c in name), **BUDGET,
                 **changed)
    row, key, cfg.resume = kept(cfg, "sdd", "lab/sdd_variants")
    if row:
        return row
    model, row = sdd.train(cfg, *sdd_variants.PARTS), dict(name=name, changed=changed, samples=[])
    x0, g = sdd.get_eval_rows(data.val, cfg, N)[0], torch.Generator().manual_seed(0)
    with common.Run(cfg).amp:
        if cfg.process == "original":
            row |= sdd_variants.copy_baseline(model, data, cfg)
        else:
            row |= sdd.evaluate(model, data, cfg, nelbo=sdd_variants.nelbo)
        row = {k: v for k, v in row.items() if k in (
            "name", "changed", "samples", "accuracy", "copy", "among", "accuracy_at", "copy_at",
            "among_at", "nats_per_doc", "se")}
        row["truth_among"] = truth_among(model, cfg, x0, g)
        for steps, temperature in SETTINGS:
            some = dataclasses.replace(cfg, num_steps=steps, temperature=temperature,
                                       sampler="token")
            x, _ = sdd_variants.sample(model, torch.full_like(x0, cfg.vocab_size), some,
                                       torch.Generator().manual_seed(cfg.seed))
            text = data.tokenizer.decode(tokens_of(x, cfg)[0])[:300]
            row["samples"].append(dict(steps=steps, temperature=temperature, text=text,
                                       **measure(x, cfg, data.tokenizer, judge)))
    return keep(cfg, key, row)


def draw(made):
    """Left: what the original reports, by noise. Right: truth among the candidates."""
    rows = {row["name"]: row for row in made["rows"]}
    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, color in (("original, swap 0.95", "tab:red"), ("original, swap 0", "tab:purple")):
        t = [(k + 0.5) / len(rows[name]["copy_at"]) for k in range(len(rows[name]["copy_at"]))]
        left.plot(t, rows[name]["accuracy_at"], color=color, label=f"{name}: network")
        left.plot(t, rows[name]["copy_at"], color=color, ls=":", label=f"{name}: copy baseline")
    for name, color in (("original, swap 0.95", "tab:red"), ("ours", "tab:blue")):
        line = rows[name]["truth_among"]
        right.plot(line["t"], line["training"], color=color, label=f"{name}: training")
        right.plot(line["t"], line["sampling"], color=color, ls="--", label=f"{name}: sampling")
    left.set(xlabel="noise t", ylabel="share of positions", title="accuracy and copying",
             ylim=(0, 1.05))
    right.set(xlabel="share of the path that is ahead", title="truth among the k candidates")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7.5)
    figure.savefig(TARGET.with_suffix(".png"))


def main(argv):
    common.show_help(argv, __doc__)
    if argv == ["draw"]:
        return draw(json.loads(TARGET.read_text()))
    if argv:
        raise common.UserError(f"unknown arguments {' '.join(argv)}: give none, or draw")
    # no samples, and no evaluations on the way
    common.show_samples = common.plot_loss = common.Run.validate = lambda *_: None
    cfg = Config(device="cpu")
    data = load_data(cfg)
    judge = load_judge("out/ar", torch.device("cpu"), data)
    rows = [run(name, changed, data, judge) for name, changed in CASES.items()]
    x0 = sdd.get_eval_rows(data.val, cfg, N)[0]
    made = dict(command="python lab/leak.py", **BUDGET, num_samples=N, torch=torch.__version__,
                machine=fast.machine(torch.device("cpu")), threads=torch.get_num_threads(),
                real=measure(x0, cfg, data.tokenizer, judge), rows=rows)
    TARGET.write_text(json.dumps(made) + "\n")
    draw(made)
    for row in rows:
        print(row["name"], {k: round(row[k], 3) for k in ("accuracy", "copy", "among",
                                                          "nats_per_doc") if k in row})


if __name__ == "__main__":
    common.run_main(main)
