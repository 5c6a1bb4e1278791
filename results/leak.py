"""Why the original process of sdd.py cannot generate: `python results/leak.py` trains it and ours
at one budget (300 steps of 16 rows), measures what the original reports (accuracy), a copy
baseline, where the truth is among the candidates, and samples: results/leak.json and leak.png.

Answers the three questions that the original leaves open: do temperature or more steps repair its
samples, does size, does another noise? A run of ar.py in out/ar judges. An interrupted run goes on.
"""
import dataclasses
import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import common_v1 as common
import sdd

BUDGET = dict(steps=300, eval_every=300, seed=1337, device="cpu")
SIZES = {"2x96": dict(n_layer=2, n_head=2, n_embd=96), "4x192": {}}
ORIGINAL = dict(process="original")
CASES = {  # name: what is changed
    "original, swap 0.95": ORIGINAL,
    "original, swap 0": dict(ORIGINAL, swap=0.0),
    **{f"original, swap 0.95, {size}": dict(ORIGINAL, **flags)
       for size, flags in SIZES.items() if flags},
    "evidence": {},
    **{f"evidence, {size}": flags for size, flags in SIZES.items() if flags},
}
SETTINGS = [(16, 0.3), (16, 0.7), (16, 1.0), (32, 0.7)]  # steps, temperature
TARGET = Path(__file__).with_suffix(".json")
N = 32


def among(model, cfg, x0, g):
    """Share of open positions whose truth is among the candidates when 1/16, 3/16 ... 15/16 of the
    path are ahead: in training the truth of x0 (B, T), in sampling what the position becomes."""
    times, trained, drawn, trace = [(2 * k + 1) / 16 for k in range(8)], [], [], []
    x, _ = sdd.sample(model, dataclasses.replace(cfg, sampling_steps=16), len(x0), g, trace=trace)
    for t in times:
        here = torch.full((len(x0), 1), t)
        if cfg.process == "original":
            ids, s = sdd.original(x0, here, cfg, g)[0], torch.ones(x0.shape)
        else:
            s, _ = sdd.levels(here, sdd.clocks(x0.shape, cfg, g), cfg)
            z = sdd.observe(x0, s, cfg.vocab_size, g)
            ids, _ = sdd.states(x0, s, z, cfg.k, cfg.vocab_size)
        open_ = (s > 0) & (s < sdd.SURE)
        trained.append((ids == x0[..., None]).any(2)[open_].double().mean().item())
        _, _, s, ids, _ = trace[round((1 - t) * 16)]
        open_ = (s > 0) & (s < sdd.SURE) if cfg.process == "evidence" else s >= 0
        drawn.append((ids == x[..., None]).any(2)[open_].double().mean().item())
    return dict(t=times, training=trained, sampling=drawn)


def run(name, changed, judge):
    """Train one of them, measure and sample it: a row for the file."""
    out = Path("out") / ("leak_" + "".join(c if c.isalnum() else "_" for c in name))
    if (out / "row.json").exists():
        return json.loads((out / "row.json").read_text())
    cfg = sdd.Config(out=str(out), **BUDGET, **changed, resume=(out / "state.pt").exists())
    model, tokenizer = sdd.train(cfg), sdd.open_data(cfg.data_dir).tokenizer
    x0, row = sdd.get_eval_rows("val", cfg, N)[0], dict(name=name, changed=changed, samples=[])
    with common.precision(torch.device("cpu"), cfg.dtype)[0]:
        row |= {k: v for k, v in sdd.evaluate(model, cfg).items()
                if k in ("accuracy", "copy", "among", "accuracy_at", "copy_at", "among_at",
                         "nats_per_doc", "se")}
        g = torch.Generator().manual_seed(0)
        row["truth_among"] = among(model, cfg, x0, g)
        for steps, temperature in SETTINGS:
            some = dataclasses.replace(cfg, sampling_steps=steps, temperature=temperature)
            if cfg.process == "evidence":
                some.clock = sdd.FAST["clock"]
            x, _ = sdd.sample(model, some, N, torch.Generator().manual_seed(cfg.seed))
            text = tokenizer.decode(common.tokens_of(x, cfg)[0])[:300]
            row["samples"].append(dict(steps=steps, temperature=temperature, text=text,
                                       **common.measure(x, cfg, tokenizer, judge)))
    (out / "row.json").write_text(json.dumps(row))
    return row


def draw(made):
    """Left: what the original reports, by noise. Right: truth among the candidates."""
    rows = {row["name"]: row for row in made["rows"]}
    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, color in (("original, swap 0.95", "tab:red"), ("original, swap 0", "tab:purple")):
        t = [(k + 0.5) / len(rows[name]["copy_at"]) for k in range(len(rows[name]["copy_at"]))]
        left.plot(t, rows[name]["accuracy_at"], color=color, label=f"{name}: network")
        left.plot(t, rows[name]["copy_at"], color=color, ls=":", label=f"{name}: copy")
    for name, color in (("original, swap 0.95", "tab:red"), ("evidence", "tab:blue")):
        where = rows[name]["truth_among"]
        right.plot(where["t"], where["training"], color=color, label=f"{name}: training")
        right.plot(where["t"], where["sampling"], color=color, ls="--", label=f"{name}: sampling")
    left.set(xlabel="noise t", ylabel="share of positions", title="accuracy and copying",
             ylim=(0, 1.05))
    right.set(xlabel="share of the path that is ahead", title="truth among the k candidates")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7.5)
    figure.savefig(TARGET.with_suffix(".png"))


def main():
    if sys.argv[1:] == ["draw"]:
        return draw(json.loads(TARGET.read_text()))
    sdd.grade = common.plot_loss = lambda *a, **k: None
    common.Run.validate = lambda *a, **k: None
    cfg = sdd.fill_in(sdd.Config())
    tokenizer = sdd.open_data(cfg.data_dir).tokenizer
    with common.Run(cfg, "out/leak", False) as made:
        judge = common.load_judge(cfg.judge, tokenizer, made)
    rows = [run(name, changed, judge) for name, changed in CASES.items()]
    x0 = sdd.get_eval_rows("val", cfg, N)[0]
    made = dict(command="python results/leak.py", **BUDGET, n=N, torch=torch.__version__,
                machine=common.machine(torch.device("cpu")), threads=torch.get_num_threads(),
                real=common.measure(x0, cfg, tokenizer, judge), rows=rows)
    TARGET.write_text(json.dumps(made) + "\n")
    draw(made)
    for row in rows:
        print(row["name"], {k: round(row[k], 3) for k in ("accuracy", "copy", "among",
                                                          "nats_per_doc") if k in row})
        for some in row["samples"]:
            print("   ", common.figures({k: v for k, v in some.items() if k != "text"}))


if __name__ == "__main__":
    main()
