"""Six ways to model text at one budget of tokens: train all, measure all, one table.

    python lab/compare.py --budget quick        a minute: does everything work? nothing is learnt
    python lab/compare.py --jobs 2              three seeds, 18 runs, hours
    python lab/compare.py --budget full         preset small, 10000 steps: for a GPU
    python lab/compare.py table                 tables, pages and figures anew from the results

Every method gets the same tokens of the same data, in its default configuration, and is measured on
the same test documents with the same positions scored. Nothing here is a model: each run is the
command of a script that stands in its row, and n-gram models, whose counts need no training, say
what is left to learn. An interrupted comparison goes on where it stopped; runs are kept in
out/compare/, and only those are made again whose script or settings have changed.
"""
import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python lab/compare.py`
import common
import fast
from common import UserError
from data.units import report, se, tokens_of
from lab import (bit_variants, compare_page, decoding, dit_variants, mdlm_eval, mdlm_variants,
                 sdd_variants)
from lab.ar_extra import infill_left
from lab.methods import (IDEAS, amp, ancestral, code_of, default_sampler, device_of, load,
                         loss, sample, script_of, with_steps)
from lab.metrics import load_judge, measure as measure_samples
from lab.ngram import NGram
from lab.speed import race, step

BUDGETS = dict(  # flags of every run; test documents, draws of noise a bound, samples, NFE of the
    quick=dict(  # few-step frontier, and rounds in which speed is measured
        run=dict(steps=16, eval_every=16, n_layer=1, n_head=2, n_embd=64, device="cpu",
                 num_steps=8), seeds=(1337,), test=16, draws=2, n=4, frontier=(4,), rounds=1),
    standard=dict(run=dict(steps=1600), seeds=(1337, 1338, 1339), test=256, draws=32, n=64,
                  frontier=(4, 8, 16, 32, 64), rounds=6),
    full=dict(run=dict(preset="small", steps=10000, batch_size=64, eval_every=500),
              seeds=(1337,), test=500, draws=32, n=64, frontier=(4, 8, 16, 32, 64), rounds=6),
)
STEPS_BOUND = dict(mdlm=(decoding.Config, mdlm_variants.Model, mdlm_eval.nelbo_steps), **{
    name: (lab.Config, lab.Model, lab.nelbo_steps) for name, lab in dict(
        dit_embed=dit_variants, bit_diffusion=bit_variants, sdd=sdd_variants).items()})


# ---- the runs ------------------------------------------------------------------------------------

def settings(name, budget, seed):
    """The flags of one run. A model adapted from a parent shares the budget with it, 5 to 11."""
    run = dict(BUDGETS[budget]["run"], seed=seed, out=f"out/compare/{budget}/{name}_{seed}")
    if name == "ar":  # one token a step
        run.pop("num_steps", None)
    if name == "diffugpt_varlen":
        run["parent_steps"] = run["steps"] * 5 // 16
        run["steps"] -= run["parent_steps"]
    return run


def config(name, run):
    """The Config that the command of a run makes."""
    script = script_of(name)
    return script.Config(**{**script.PRESETS[run.get("preset", "tiny")], **run})


def budget_tokens(budget):
    """Positions of rows that every run of a budget sees."""
    cfg = config("ar", settings("ar", budget, 0))
    return cfg.steps * cfg.batch_size * cfg.grad_accum * cfg.seq_len


def made_by(name, run):
    """What made a run: config, step, command, parameters, versions, hardware; else {}."""
    out = Path(run["out"])
    if not (out / "model.safetensors").exists():
        return {}
    with safe_open(out / "model.safetensors", "pt") as file:
        about = file.metadata()
    made = [row for row in common.read_log(out) if row["kind"] == "config"][0]
    return dict(made, config=json.loads(about["config"]), step=int(about["step"]))


def weights_of(out):
    """A fingerprint of the weights in a run folder, or None if there are none yet."""
    path = Path(out) / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None


def is_made(name, run):
    """Is the run's checkpoint there, complete, of these settings and of today's script?"""
    made, code = made_by(name, run), Path(f"{run['out']}.code")
    if not made or not code.exists() or code.read_text() != code_of(name):
        return False
    skip = ("resume", "data_dir", "vocab_size", "eos", "bos", "rows", "device")
    if any(made["config"].get(k) != v for k, v in dataclasses.asdict(config(name, run)).items()
           if k not in skip):
        return False
    return made["step"] == run["steps"] or "unfinished"


def train(name, run):
    """Run the script's own command in this process; a run that was interrupted goes on."""
    made, script = is_made(name, run), script_of(name)
    if made is True:
        return
    argv = [f"--{k.replace('_', '-')}={v}" for k, v in run.items()
            if getattr(script.Config, k) != v]
    argv += ["--resume"] if made else []
    print(f"\n$ python {name}.py {' '.join(argv)}", flush=True)
    before, sys.argv = sys.argv, [f"{name}.py", *argv]
    weights = Path(run["out"]) / "model.safetensors"
    old = weights.exists() and weights.stat().st_mtime_ns
    try:
        script.main(argv)
    finally:
        sys.argv = before
        if weights.exists() and weights.stat().st_mtime_ns != old:  # also of an interrupted run
            Path(f"{run['out']}.code").write_text(code_of(name))


# ---- measurements --------------------------------------------------------------------------------

def train_documents(data, cfg):
    """The training documents as a set of bytes of ids, to see what a model repeats."""
    ids, offsets, _ = data.train
    ids = np.asarray(ids).astype(np.int32)
    ends = offsets[1:] - (ids[offsets[1:] - 1] == cfg.eos)  # without their EOS
    return {ids[a:b].tobytes() for a, b in zip(offsets, ends)}


def share_new(rows, seen):
    """Share of rows (lists of ids) that are no training document."""
    return sum(np.array(row, np.int32).tobytes() not in seen for row in rows) / len(rows)


def grade_samples(x, cfg, data, judge, seen):
    """The metrics of the samples x (n, T); `novelty` is the share that is no training document."""
    rows = tokens_of(x, cfg)
    return dict(novelty=share_new(rows, seen), **measure_samples(x, cfg, data.tokenizer, judge))


def stories_of(x, cfg, data):
    """The first two samples as text."""
    return [data.tokenizer.decode(row) for row in tokens_of(x, cfg)[:2]]


def infill_accuracy(script, model, cfg, data, n):
    """Accuracy of filling one masked token of each of n test documents at temperature 0. ar.py sees
    the left side only, the others both."""
    x0, g = script.get_eval_rows(data.test, cfg, n)[0], torch.Generator().manual_seed(0)
    size = (x0 != cfg.eos).cumprod(1).sum(1).clamp(min=1)
    at = (torch.rand(len(x0), generator=g) * size).long()[:, None]
    if script.__name__ == "ar":
        said = torch.stack([infill_left(model, row[None], int(i), cfg).argmax(1)
                            for row, i in zip(x0.to(device_of(model)), at)]).cpu()
    else:
        greedy = dataclasses.replace(with_steps(script, ancestral(script, cfg), 16),
                                     temperature=0.0)
        canvas = x0.scatter(1, at, cfg.vocab_size)
        said = sample(script, model, greedy, len(x0), g, canvas)[0].cpu().gather(1, at)
    return (said == x0.gather(1, at)).float().mean().item()


@torch.no_grad()
def measure(name, budget, seed):
    """Everything that is measured of one run, as one row; kept beside the run."""
    run, plan = settings(name, budget, seed), BUDGETS[budget]
    kept = Path(f"{run['out']}.row.json")
    judging = settings("ar", budget, plan["seeds"][0])["out"]
    key = dict(code=code_of(name), test=plan["test"], draws=plan["draws"], n=plan["n"],
               frontier=[*plan["frontier"]], judge=weights_of(judging))
    if kept.exists():
        row = json.loads(kept.read_text())
        if row["key"] == key and is_made(name, run) is True:
            return row
    script, model, cfg, data = load(name, run["out"])
    made, log = made_by(name, run), common.read_log(run["out"])
    judge = load_judge(judging, device_of(model), data) if run["out"] != judging else None
    seen, step_tokens = train_documents(data, cfg), budget_tokens(budget) // plan["run"]["steps"]

    def draw(cfg):
        x, nfe = sample(script, model, cfg, plan["n"], torch.Generator().manual_seed(cfg.seed))
        return x, dict(nfe=nfe, temperature=cfg.temperature,
                       **grade_samples(x, cfg, data, judge, seen))

    row = dict(kind="run", name=name, seed=seed, key=key, code=key["code"],
               command=f"python {made['command']}", parameters=made["parameters"],
               config={k: v for k, v in made["config"].items() if k not in ("data_dir", "out")},
               **{k: made[k] for k in ("torch", "machine", "threads", "dtype")},
               tokens=budget_tokens(budget),
               train_seconds=[r for r in log if r["kind"] == "train"][-1]["seconds"],
               curve=[[r["step"] * step_tokens, r["nats_per_doc"], r["se"]] for r in log
                      if r["kind"] == "val"])
    with amp(model, cfg):
        more = {} if name == "ar" else dict(
            nelbo=functools.partial(script.nelbo, draws=plan["draws"]))
        row["test"] = script.evaluate(model, data, cfg, "test", plan["test"], **more)
        row["infill_accuracy"] = infill_accuracy(script, model, cfg, data, plan["n"] * 2)
        own, default = ancestral(script, cfg), default_sampler(script, cfg)
        x, row["ancestral"] = draw(own)
        row["lengths"] = [len(r) for r in tokens_of(x, own)]
        x, row["default"] = draw(default)
        row["stories"] = stories_of(x, default, data)
        row["frontier"], row["steps_bound"] = [], []
        for steps in plan["frontier"] if seed == plan["seeds"][0] and name != "ar" else ():
            row["frontier"].append(draw(with_steps(script, default, steps))[1])
            if name in STEPS_BOUND:
                Config, Model, nelbo_steps = STEPS_BOUND[name]
                x0, mine = script.get_eval_rows(data.test, cfg, plan["n"])[0], Config(**vars(own))
                same = Model(mine).to(device_of(model))
                same.load_state_dict(model.state_dict())
                nats = nelbo_steps(same, x0.to(device_of(model)), mine,
                                   torch.Generator().manual_seed(0), steps).cpu().double()
                row["steps_bound"].append([steps, nats.mean().item(), se(nats)])
    kept.write_text(json.dumps(row))
    print(f"{name} {seed}: test {report(row['test'])}", flush=True)
    return row


def speed(budget):
    """Training steps and samples of all methods in turn, so that what else the machine does meets
    all alike: medians as one row."""
    plan = BUDGETS[budget]
    n_batch = min(16, plan["n"])
    kept = Path(f"out/compare/{budget}/speed.json")
    key = {name: code_of(name) for name in IDEAS}
    if kept.exists() and json.loads(kept.read_text())["key"] == key:
        return json.loads(kept.read_text())

    def write(script, model, cfg, n):
        with amp(model, cfg), torch.no_grad():
            sample(script, model, cfg, n, torch.Generator().manual_seed(0))

    steps, samples = {}, {}
    for name in IDEAS:
        script, model, cfg, data = load(name, settings(name, budget, plan["seeds"][0])["out"])
        model.requires_grad_(True)  # autocast keeps its casts of such weights from call to call
        learner, g = script.Model(cfg).to(device_of(model)), torch.Generator().manual_seed(0)
        steps[name] = functools.partial(
            step, script, loss, cfg, learner, script.make_optimizers(learner, cfg), g,
            functools.partial(script.get_batch, data.train, cfg, g), amp(model, cfg))
        for n in (1, n_batch):
            for part, how in ("ancestral", ancestral), ("default", default_sampler):
                samples[part, name, n] = functools.partial(
                    write, script, model, how(script, cfg), n)
    took = race(steps, plan["rounds"], warm=1)
    times = race(samples, min(2, plan["rounds"]), warm=plan["rounds"] > 1)
    cfg = config("ar", settings("ar", budget, 0))
    row = dict(kind="speed", key=key, torch=torch.__version__,
               machine=fast.machine(device_of(model)), threads=torch.get_num_threads(), n=n_batch,
               train={name: cfg.batch_size * cfg.seq_len / took[name] for name in IDEAS},
               **{part: {name: [times[part, name, n] / n for n in (1, n_batch)]
                         for name in IDEAS} for part in ("ancestral", "default")})
    kept.write_text(json.dumps(row))
    return row


def baselines(budget):
    """Rows of what stands beside every model: the corpus itself, no model, counts of tokens and of
    three in a row. The counts see as many documents as a run."""
    kept = Path(f"out/compare/{budget}/baselines.json")
    plan = BUDGETS[budget]
    judging = settings("ar", budget, plan["seeds"][0])["out"]
    key = dict(test=plan["test"], n=plan["n"], judge=weights_of(judging),
               code=code_of("lab/compare") + code_of("lab/ngram"))
    if kept.exists() and json.loads(kept.read_text())[0]["key"] == key:
        return json.loads(kept.read_text())
    script, model, cfg, data = load("ar", judging)
    judge = model, cfg, data.tokenizer
    x0, true_nll = script.get_eval_rows(data.test, cfg, plan["test"])
    others, seen = script.get_eval_rows(data.val, cfg, 1000)[0], train_documents(data, cfg)
    size = np.array([len(r) + 1 for r in tokens_of(x0, cfg)])

    def row(name, idea, nats, x=None):
        nats = torch.as_tensor(nats).double()
        out = dict(kind="baseline", name=name, idea=idea, key=key, test=dict(
            bound="exact", rows=len(x0), nats_per_doc=nats.mean().item(), se=se(nats),
            entropy_per_doc=true_nll.mean().item(), gap=(nats - true_nll).mean().item(),
            gap_se=se(nats - true_nll), nats_per_token=nats.sum().item() / size.sum().item()))
        return out if x is None else out | dict(
            ancestral=grade_samples(x, cfg, data, judge, seen), stories=stories_of(x, cfg, data))

    num_rows = min(cfg.steps * cfg.batch_size * cfg.grad_accum, len(data.train[1]) - 1)
    rows = script.get_rows(data.train, cfg, np.arange(num_rows))
    out = [row("real", "its grammar, read as a probability", true_nll, x0[:plan["n"]]) | dict(
               lengths=[len(r) for r in tokens_of(others, cfg)]),
           row("uniform", "every token alike", size * math.log(cfg.vocab_size))]
    for name, order, idea in (("unigram", 1, "how often a token occurs"),
                              ("3-gram", 3, "the last two tokens, counted")):
        model = NGram(order, rows, others[:512], cfg)
        x = model.sample(plan["n"], cfg.seq_len, torch.Generator().manual_seed(cfg.seed))
        out.append(row(name, idea, model.nll(x0), x))
    kept.write_text(json.dumps(out))
    return out


# ---- main ----------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def folder_of(budget):
    """Where the results of a budget go: only the full-size tables belong to the repository."""
    return ROOT / "results" if budget == "standard" else Path(f"out/compare/{budget}")


def publish(budget, command):
    """Write compare.jsonl and everything that lab/compare_page.py makes of it."""
    plan = BUDGETS[budget]
    rows = [measure(name, budget, seed) for name in IDEAS for seed in plan["seeds"]
            if is_made(name, settings(name, budget, seed)) is True]
    made = dict(kind="config", command=command, budget=budget, tokens=budget_tokens(budget),
                seed=rows[0]["seed"], seeds=sorted({row["seed"] for row in rows}),
                config=plan["run"], test=plan["test"], n=plan["n"],
                **{k: rows[0][k] for k in ("torch", "machine", "threads", "dtype")})
    results = [made, *baselines(budget), *rows, speed(budget)]
    common.replace(folder_of(budget) / "compare.jsonl", lambda file: file.writelines(
        (json.dumps(row) + "\n").encode() for row in results))
    compare_page.publish(folder_of(budget))


def main(argv):
    parser = Parser(prog="compare.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="run", choices=("run", "table"))
    parser.add_argument("--budget", default="standard", choices=BUDGETS)
    parser.add_argument("--only", default=",".join(IDEAS), help="scripts to run (comma)")
    parser.add_argument("--seeds", default="", help="seeds to run (comma); the budget's own")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--stage", default="all", choices=("all", "train", "measure"),
                        help="train the runs, measure them, or both")
    args = parser.parse_args(argv)
    plan = BUDGETS[args.budget]
    names = args.only.split(",")
    if not set(names) <= IDEAS.keys():
        raise UserError(f"--only knows {', '.join(IDEAS)}, not '{args.only}'")
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds else plan["seeds"]
    except ValueError:
        raise UserError(f"--seeds is '{args.seeds}', give numbers: 1337,1338") from None
    if not set(seeds) <= set(plan["seeds"]):  # others would be trained and never shown
        raise UserError(f"--seeds is '{args.seeds}', this budget has "
                        f"{', '.join(map(str, plan['seeds']))}")
    folder_of(args.budget).mkdir(parents=True, exist_ok=True)
    if args.what == "table":
        if not (folder_of(args.budget) / "compare.jsonl").exists():
            raise UserError("no results: make them by `python lab/compare.py --budget "
                            f"{args.budget}`")
        return compare_page.publish(folder_of(args.budget))
    work = [(name, seed) for seed in seeds for name in names]
    for stage in ("train", "measure") if args.stage == "all" else (args.stage,):
        if args.jobs > 1:
            spread(stage, work, args)
        else:
            for name, seed in work:
                if stage == "train":
                    train(name, settings(name, args.budget, seed))
                else:
                    measure(name, args.budget, seed)
    if args.stage == "all":
        publish(args.budget, "python lab/compare.py " + " ".join(argv))


def spread(stage, work, args):
    """The same in several processes, each with its share of the cores."""
    env = os.environ | dict(OMP_NUM_THREADS=str(max(1, os.cpu_count() // args.jobs)))

    def one(job):
        name, seed = job
        return subprocess.run([sys.executable, str(Path(__file__)), "--budget", args.budget,
                               "--only", name, "--seeds", str(seed), "--stage", stage],
                              env=env).returncode
    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [job for job, code in zip(work, pool.map(one, work)) if code]
    if failed:
        raise UserError(f"{stage} of {', '.join(f'{n} {s}' for n, s in failed)} failed, see above; "
                        "the rest is kept, run the same command again")


if __name__ == "__main__":
    common.run_main(main)
