"""How good are the samples while a script trains? Runs of the comparison, watched.

    python lab/by_steps.py --seed 1339                 all six, as results/by_steps.jsonl
    python lab/by_steps.py --only mdlm,sdd

The run is that of `python lab/compare.py` with this seed and is kept for it. At every evaluation
the averaged model draws stories with the default sampler (ar.py at temperature 0.5), which are
graded. The learning rate falls to zero at the last step only, so a shorter run ends better than a
long one is after as many steps.
"""
import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python lab/by_steps.py`
import common
from lab import compare
from lab.methods import IDEAS, code_of, default_sampler, parse_options, sample, script_of
from lab.metrics import measure


@dataclass
class Options:
    only: str = ",".join(IDEAS)  # scripts to train (comma)
    seed: int = 1339
    budget: str = "standard"  # of lab/compare.py
    samples: int = 64


@contextlib.contextmanager
def watched(script, points, n):
    """Inside, every evaluation of the script appends the bound and the metrics of n samples."""
    evaluate = script.evaluate

    def both(model, data, cfg, *args, **more):
        row = evaluate(model, data, cfg, *args, **more)
        if getattr(cfg, "pipeline", "diffusion") == "diffusion":  # no parent
            x, _ = sample(script, model, default_sampler(script, cfg), n,
                          torch.Generator().manual_seed(cfg.seed))
            points.append(dict(step=min(len(points) * cfg.eval_every, cfg.steps),
                               nats_per_doc=row["nats_per_doc"],
                               **measure(x, cfg, data.tokenizer)))
        return row
    script.evaluate = both
    try:
        yield
    finally:
        script.evaluate = evaluate


def main(argv):
    opt = parse_options(Options, argv, __doc__)
    unknown = set(opt.only.split(",")) - set(IDEAS)
    if unknown or opt.budget not in compare.BUDGETS:
        raise common.UserError(f"--only takes {', '.join(IDEAS)}, --budget one of lab/compare.py")
    target = compare.folder_of(opt.budget) / "by_steps.jsonl"
    for name in opt.only.split(","):
        run, points = compare.settings(name, opt.budget, opt.seed), []
        if compare.is_made(name, run):
            raise common.UserError(f"{run['out']} is begun or complete: move it, or choose "
                                   "another --seed, to watch a whole training")
        with watched(script_of(name), points, opt.samples):
            compare.train(name, run)
        made = compare.made_by(name, run)
        cfg = compare.config(name, run)
        row = dict(name=name, seed=opt.seed, code=code_of(name), samples=opt.samples,
                   command=f"python {made['command']}",
                   config={k: v for k, v in made["config"].items() if k != "data_dir"},
                   **{k: made[k] for k in ("torch", "machine", "threads", "dtype")},
                   parent_steps=getattr(cfg, "parent_steps", 0), points=points)
        kept = target.read_text("utf-8").splitlines() if target.exists() else []
        kept = [line for line in kept if json.loads(line)["name"] != name]
        target.parent.mkdir(parents=True, exist_ok=True)
        common.replace(target, lambda file, lines=[*kept, json.dumps(row)]: file.writelines(
            (line + "\n").encode() for line in lines))
        print(f"{name}: {target}", flush=True)


if __name__ == "__main__":
    common.run_main(main)
