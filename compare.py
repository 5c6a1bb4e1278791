"""Six ways to model text at one budget of tokens: one table, and what its numbers may say.

    python compare.py --budget quick        a minute: does everything work? nothing is learnt
    python compare.py --jobs 2              the README's table: 18 runs, hours on 2 CPU cores
    python compare.py --budget full         preset small, 10000 steps: for a GPU
    python compare.py table                 tables, pages and figures anew from the results
    python compare.py film                  the six methods write a story each, side by side

Every method gets the same tokens of the same data, in its default configuration, and is measured on
the same test documents with the same positions scored. Nothing here is a model: each run is the
command of a script that stands in its row, and n-gram models, whose counts need no training, say
what is left to learn. An interrupted comparison goes on where it stopped; runs are kept in
out/compare/, and only those are made again whose script or settings have changed.
"""
import argparse
import ast
import dataclasses
import functools
import hashlib
import importlib
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

import common
import common_v1
from common import UserError
from data.prepare import load_data
from data.units import report, se, tokens_of
from lab import bit_variants, decoding, dit_variants, mdlm_eval, mdlm_variants, sdd_variants
from lab.ar_extra import infill_left
from lab.metrics import load_judge, measure as measure_samples

ROOT = Path(__file__).parent
IDEAS = {  # in the order of the tables
    "ar": "predict each token from the ones before it",
    "mdlm": "mask tokens at random, predict the masked ones",
    "dit_embed": "add Gaussian noise to embeddings, predict the tokens",
    "bit_diffusion": "flip bits of token codes, predict the tokens",
    "sdd": "show k weighted candidates a position, predict tokens",
    "diffugpt_varlen": "adapt a causal GPT to diffusion, predict length",
}
SMALL = ("ar", "mdlm", "dit_embed", "bit_diffusion", "sdd")  # diffugpt_varlen: on common_v1.py
BUDGETS = dict(  # settings of every run; test documents, samples, NFE of the few-step frontier
    quick=dict(run=dict(steps=16, eval_every=16, n_layer=1, n_head=2, n_embd=64, device="cpu",
                        sampling_steps=8), seeds=(1337,), test=16, n=4, frontier=(4,)),
    standard=dict(run=dict(steps=1600), seeds=(1337, 1338, 1339), test=256, n=64,
                  frontier=(4, 8, 16, 32, 64)),
    full=dict(run=dict(preset="small", steps=10000, batch_size=64, eval_every=500),
              seeds=(1337,), test=500, n=64, frontier=(4, 8, 16, 32, 64)),
)
METRICS = ("valid_stories", "prefix", "valid_sentences", "consistent", "true_nll", "entropy",
           "distinct_2", "repetition")
SIGN = dict(exact="=", upper="<=")
STEPS_BOUND = dict(mdlm=(decoding.Config, mdlm_variants.Model, mdlm_eval.nelbo_steps), **{
    name: (lab.Config, lab.Model, lab.nelbo_steps) for name, lab in dict(
        dit_embed=dit_variants, bit_diffusion=bit_variants, sdd=sdd_variants).items()})


# -------------------------------------------------------------------------------------- the runs

def settings(name, budget, seed):
    """The flags of one run. A model adapted from a parent shares the budget with it, 5 to 11."""
    run = dict(BUDGETS[budget]["run"], seed=seed, out=f"out/compare/{budget}/{name}_{seed}")
    steps = run.pop("sampling_steps", None)
    if steps and name != "ar":
        run["num_steps" if name in SMALL else "sampling_steps"] = steps
    if name == "diffugpt_varlen":
        run["parent_steps"] = run["steps"] * 5 // 16
        run["steps"] -= run["parent_steps"]
    return run


def config(name, run):
    """The Config that the command of a run makes."""
    script = importlib.import_module(name)
    return script.Config(**{**script.PRESETS[run.get("preset", "tiny")], **run})


def code_of(name):
    """A fingerprint of a script that its comments, its docstrings and its last section, the command
    line, do not change."""
    tree = ast.parse((ROOT / f"{name}.py").read_text("utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(
                body[0].value, ast.Constant):
            body[0].value.value = ""
    tree.body = [node for node in tree.body if getattr(node, "name", "") != "main"]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def made_by(name, run):
    """What made a run: config, step, command, parameters, versions, hardware; else {}."""
    out = Path(run["out"])
    if name not in SMALL:
        path = out / "config.json"
        made = json.loads(path.read_text()) if path.exists() else {}
        return made and dict(made["run"], config=made["config"])
    if not (out / "model.safetensors").exists():
        return {}
    with safe_open(out / "model.safetensors", "pt") as file:
        about = file.metadata()
    made = [row for row in common.read_log(out) if row["kind"] == "config"][0]
    return dict(made, config=json.loads(about["config"]), step=int(about["step"]))


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
    made = is_made(name, run)
    if made is True:
        return
    argv = [f"--{k.replace('_', '-')}={v}" for k, v in run.items()
            if getattr(importlib.import_module(name).Config, k) != v]
    argv += ["--resume"] if made else []
    print(f"\n$ python {name}.py {' '.join(argv)}", flush=True)
    before, sys.argv = sys.argv, [f"{name}.py", *argv]
    weights = Path(run["out"]) / "model.safetensors"
    old = weights.exists() and weights.stat().st_mtime_ns
    try:
        importlib.import_module(name).main(argv)
    finally:
        sys.argv = before
        if weights.exists() and weights.stat().st_mtime_ns != old:  # also of an interrupted run
            Path(f"{run['out']}.code").write_text(code_of(name))


# ------------------------------------------------------------- one way to call all six

def load(name, run):
    """(script, model, Config, data) of a finished run."""
    script, out = importlib.import_module(name), Path(run["out"])
    if name in SMALL:
        cfg = common.load_config(script.Config, out)
        data, device = load_data(cfg), common.pick_device(cfg.device)
        return script, common.load_model(script.Model, cfg, device, data)[0], cfg, data
    cfg = script.fill_in(common_v1.load_config(script.Config, out))
    model = script.Model(cfg).to(common.pick_device(cfg.device)).requires_grad_(False)
    common_v1.load_weights(model, out)
    return script, model, cfg, script.open_data(cfg.data_dir)


def is_small(script):
    """Is it on common.py?"""
    return script.__name__ in SMALL


def amp(model, cfg):
    """The autocast context of a run."""
    device = next(model.parameters()).device
    return torch.autocast(device.type, torch.bfloat16,
                          common.pick_dtype(cfg.dtype, device) == "bfloat16")


def eval_rows(script, cfg, data, split, n):
    return script.get_eval_rows(getattr(data, split) if is_small(script) else split, cfg, n)


def sample(script, model, cfg, n, g, canvas=None, frames=None):
    """n samples, or canvas (n, T) denoised: ids (n, T) and the NFE. `frames`, a list, gets (nfe,
    ids) after each step."""
    device = next(model.parameters()).device
    if not is_small(script):
        trace = None if frames is None else []
        given = {} if canvas is None else dict(start=canvas.to(device))
        x, info = script.sample(model, cfg, n, g, trace=trace, **given)
        if frames is not None:
            frames += [(nfe, ids[0].tolist()) for nfe, ids, *_ in trace]
        return x, info["nfe"]
    canvas = torch.full((n, cfg.seq_len), cfg.vocab_size) if canvas is None else canvas
    seen = [] if frames is None else frames
    x, nfe = script.sample(model, canvas.to(device), cfg, g,
                           on_step=lambda nfe, x: seen.append((nfe, x[0].tolist())))
    seen.append((nfe, x[0].tolist()))
    return x, nfe


def loss(script, model, cfg, x0, g):
    """The training loss of the rows x0 (B, T)."""
    if not is_small(script):
        return script.loss_fn(model, x0, cfg, g)[0]
    noise = (1 / script.is_scored(x0, cfg).sum(), cfg) if script.__name__ == "ar" else \
        script.corrupt(x0, cfg, g)
    return script.loss_fn(model, x0, *noise)


def evaluate(script, model, cfg, data, n):
    """The likelihood of n test documents, as a row with the names of data/units.py."""
    if is_small(script):
        return script.evaluate(model, data, cfg, "test", n)
    row = script.evaluate(model, cfg, "test", n)
    return {"entropy_per_doc" if k == "floor_per_doc" else k: v for k, v in row.items()}


def ancestral(script, cfg):
    """cfg with the sampler that the likelihood is about: temperature 1, one token a step."""
    own = dict(order="random", num_steps=0, temperature=1.0, remask="none", sampler="token")
    return dataclasses.replace(cfg, **{k: v for k, v in own.items() if hasattr(cfg, k)}) \
        if is_small(script) and script.__name__ != "ar" else cfg


def default_sampler(script, cfg):
    """cfg as `sample` draws; ar.py gets the temperature of most others."""
    if script.__name__ == "ar":
        return dataclasses.replace(cfg, temperature=0.5)
    return cfg if is_small(script) else script.fast(cfg)


def with_steps(script, cfg, steps):
    """cfg with so many steps."""
    return dataclasses.replace(cfg, **{"num_steps" if is_small(script) else "sampling_steps":
                                       steps})


# ---------------------------------------------------------------------------------- measurements

def draw(script, model, cfg, data, n, judge, seen):
    """n samples under cfg and their metrics; `novelty` is the share that is no training document.
    Returns a row, the ids (lists) and the texts."""
    x, nfe = sample(script, model, cfg, n, torch.Generator().manual_seed(cfg.seed))
    rows = tokens_of(x, cfg)
    row = dict(nfe=nfe, temperature=cfg.temperature, length=sum(map(len, rows)) / n,
               novelty=share_new(rows, seen), **measure_samples(x, cfg, data.tokenizer, judge))
    return row, rows, [data.tokenizer.decode(r) for r in rows]


def infill_accuracy(script, model, cfg, data, n):
    """Accuracy of filling one masked token of each of n test documents at temperature 0. ar.py sees
    the left side only, the others both."""
    x0, g = eval_rows(script, cfg, data, "test", n)[0], torch.Generator().manual_seed(0)
    size = (x0 != cfg.eos).cumprod(1).sum(1).clamp(min=1)
    at = (torch.rand(len(x0), generator=g) * size).long()
    truth = x0.gather(1, at[:, None])[:, 0]
    if script.__name__ == "ar":
        said = torch.stack([infill_left(model, row[None], int(i), cfg)[0].argmax()
                            for row, i in zip(x0.to(next(model.parameters()).device), at)]).cpu()
    else:
        greedy = dataclasses.replace(with_steps(script, ancestral(script, cfg), 16),
                                     temperature=0.0)
        canvas = x0.scatter(1, at[:, None], cfg.vocab_size)
        said = sample(script, model, greedy, len(x0), g, canvas)[0].cpu().gather(
            1, at[:, None])[:, 0]
    return (said == truth).float().mean().item()


def train_documents(data, cfg):
    """The training documents as a set of bytes of ids, to see what a model repeats."""
    ids, offsets, _ = data.train
    ids = np.asarray(ids).astype(np.int32)
    ends = offsets[1:] - (ids[offsets[1:] - 1] == cfg.eos)  # without their EOS
    return {ids[a:b].tobytes() for a, b in zip(offsets, ends)}


def share_new(rows, seen):
    """Share of rows (lists of ids) that are no training document."""
    return sum(np.array(row, np.int32).tobytes() not in seen for row in rows) / len(rows)


@torch.no_grad()
def measure(name, budget, seed):
    """Everything that is measured of one run, as one row; kept beside the run."""
    run, plan = settings(name, budget, seed), BUDGETS[budget]
    kept = Path(f"{run['out']}.row.json")
    key = dict(code=code_of(name), test=plan["test"], n=plan["n"], frontier=plan["frontier"])
    if kept.exists():
        row = json.loads(kept.read_text())
        if row["key"] == json.loads(json.dumps(key)) and is_made(name, run) is True:
            return row
    script, model, cfg, data = load(name, run)
    made, log = made_by(name, run), common.read_log(run["out"])
    steps = [row for row in log if row["kind"] == "train"]
    first = settings("ar", budget, plan["seeds"][0])
    judge = None if (name, run["out"]) == ("ar", first["out"]) else load_judge(
        first["out"], next(model.parameters()).device, data)
    seen, step_tokens = train_documents(data, cfg), budget_tokens(budget) // (
        BUDGETS[budget]["run"]["steps"])
    row = dict(kind="run", name=name, seed=seed, key=key, code=key["code"],
               command=f"python {made['command']}", parameters=made["parameters"],
               config={k: v for k, v in made["config"].items() if k not in ("data_dir", "out")},
               **{k: made[k] for k in ("torch", "machine", "threads", "dtype")},
               tokens=budget_tokens(budget), train_seconds=steps[-1]["seconds"])
    row["curve"] = [[r["step"] * step_tokens, r["nats_per_doc"], r["se"]] for r in log
                    if r["kind"] == "val"]
    with amp(model, cfg):
        row["test"] = evaluate(script, model, cfg, data, plan["test"])
        row["infill_accuracy"] = infill_accuracy(script, model, cfg, data, plan["n"] * 2)
        own = ancestral(script, cfg)
        row["ancestral"], rows, _ = draw(script, model, own, data, plan["n"], judge, seen)
        row["lengths"] = [len(r) for r in rows]
        default = default_sampler(script, cfg)
        row["default"], _, stories = draw(script, model, default, data, plan["n"], judge, seen)
        row["stories"] = stories[:2]
        row["frontier"], row["steps_bound"] = [], []
        for steps in plan["frontier"] if seed == plan["seeds"][0] and name != "ar" else ():
            some = with_steps(script, default, steps)
            row["frontier"].append(draw(script, model, some, data, plan["n"], judge, seen)[0])
            if name in STEPS_BOUND:
                Config, Model, nelbo_steps = STEPS_BOUND[name]
                x0 = eval_rows(script, cfg, data, "test", plan["n"])[0]
                x0, mine = x0.to(next(model.parameters()).device), Config(**vars(own))
                same = Model(mine).to(x0.device)
                same.load_state_dict(model.state_dict())
                nats = nelbo_steps(same, x0, mine, torch.Generator().manual_seed(0), steps)
                nats = nats.cpu().double()
                row["steps_bound"].append([steps, nats.mean().item(), se(nats)])
    kept.write_text(json.dumps(row))
    print(f"{name} {seed}: test {report(row['test'])}", flush=True)
    return row


def speed(budget, repeats=7):
    """Training steps and samples of all methods in turn, so that what else the machine does meets
    all alike: medians as one row."""
    plan, work, times = BUDGETS[budget], {}, {}
    n_batch = min(16, plan["n"])
    kept = Path(f"out/compare/{budget}/speed.json")
    key = {name: code_of(name) for name in IDEAS}
    if kept.exists() and json.loads(kept.read_text())["key"] == key:
        return json.loads(kept.read_text())
    repeats = repeats if plan["test"] > 100 else 3

    def step(script, model, cfg, data, optimizers, g):
        x0 = script.get_batch(data.train if is_small(script) else "train", cfg, g)
        with amp(model, cfg):
            nats = loss(script, model, cfg, x0.to(next(model.parameters()).device), g)
        nats.item()  # a GPU is waited for
        nats.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def write(script, model, cfg, n):
        with amp(model, cfg), torch.no_grad():
            sample(script, model, cfg, n, torch.Generator().manual_seed(0))

    for name in IDEAS:
        script, model, cfg, data = load(name, settings(name, budget, plan["seeds"][0]))
        model.requires_grad_(True)  # autocast keeps its casts of such weights from call to call
        learner = script.Model(cfg).to(next(model.parameters()).device)
        work[name, "train"] = functools.partial(
            step, script, learner, cfg, data, script.make_optimizers(learner, cfg),
            torch.Generator().manual_seed(0))
        for n in (1, n_batch):
            work[name, f"ancestral_{n}"] = functools.partial(
                write, script, model, ancestral(script, cfg), n)
            work[name, f"default_{n}"] = functools.partial(
                write, script, model, default_sampler(script, cfg), n)
    for k in range(repeats):
        for job, call in work.items():
            if job[1] == "train" or k < 3:
                clock = time.perf_counter()
                call()
                times.setdefault(job, []).append(time.perf_counter() - clock)
    took = {job: sorted(t[1:])[(len(t) - 1) // 2] for job, t in times.items()}  # not the first
    cfg = config("ar", settings("ar", budget, 0))
    row = dict(kind="speed", key=key, threads=torch.get_num_threads(), n=n_batch,
               train={name: cfg.batch_size * cfg.seq_len / took[name, "train"] for name in IDEAS},
               **{part: {name: [took[name, f"{part}_{n}"] / n for n in (1, n_batch)]
                         for name in IDEAS} for part in ("ancestral", "default")})
    kept.write_text(json.dumps(row))
    return row


def budget_tokens(budget):
    """Positions of rows that every run of a budget sees."""
    cfg = config("ar", settings("ar", budget, 0))
    return cfg.steps * cfg.batch_size * cfg.grad_accum * cfg.seq_len


# ------------------------------------------------------------------------------ what needs no net

class NGram:
    """Interpolated n-gram model of rows (N, T) of documents: p(x | c) = sum_j w_j p_j, where p_0 is
    uniform, p_j counts the last j - 1 tokens' successors, and is p_{j-1} where those tokens were
    never seen; the weights w_j maximize the likelihood of other rows (EM). Exact likelihoods."""

    def __init__(self, order, rows, others, cfg):
        self.order, self.V, self.eos = order, cfg.vocab_size, cfg.eos
        self.grams, self.weights = [], np.full(order + 1, 1 / (order + 1))
        context, token = self.split(rows)
        for j in range(1, order + 1):
            before = self.pack(context[:, order - j:])
            self.grams.append([np.unique(before * self.V + token, return_counts=True),
                               np.unique(before, return_counts=True)])
        parts = self.parts(*self.split(others))
        for _ in range(200):
            share = parts * self.weights
            self.weights = (share / share.sum(1, keepdims=True)).mean(0)

    def split(self, rows):
        """Scored tokens of rows, and before each the order - 1 tokens seen; V stands for BOS."""
        rows = np.asarray(rows)
        scored = (rows == self.eos).cumsum(1) - (rows == self.eos) == 0  # the first EOS too
        wide = np.pad(rows, ((0, 0), (self.order - 1, 0)), constant_values=self.V)
        context = np.stack([wide[:, j:j + rows.shape[1]] for j in range(self.order - 1)] +
                           [np.zeros_like(rows)], -1)
        return context[scored][:, :-1], rows[scored]

    def pack(self, context):
        """Contexts (n, j - 1) as one number each."""
        out = np.zeros(len(context), np.int64)
        for column in context.T[-(self.order - 1):] if context.shape[1] else ():
            out = out * (self.V + 1) + column
        return out

    def parts(self, context, token):
        """p_0 ... p_order of tokens (n,) after contexts (n, order - 1): (n, order + 1)."""
        def count(table, keys):
            at = np.searchsorted(table[0], keys).clip(max=len(table[0]) - 1)
            return np.where(table[0][at] == keys, table[1][at], 0)
        out = [np.full(len(token), 1 / self.V)]
        for j, (grams, contexts) in enumerate(self.grams, 1):
            before = self.pack(context[:, self.order - j:])
            total = count(contexts, before)
            p = count(grams, before * self.V + token) / np.maximum(total, 1)
            out.append(np.where(total > 0, p, out[-1]))
        return np.stack(out, 1)

    def nll(self, rows):
        """Exact nats per row: (N,)."""
        rows = np.asarray(rows)
        context, token = self.split(rows)
        nats = -np.log(self.parts(context, token) @ self.weights)
        scored = (rows == self.eos).cumsum(1) - (rows == self.eos) == 0
        return np.bincount(np.nonzero(scored)[0], nats, len(rows))

    def sample(self, n, T, g):
        """n rows of at most T tokens, EOS-filled: (n, T)."""
        x = np.full((n, T + self.order - 1), self.V)
        for i in range(self.order - 1, T + self.order - 1):
            context = np.repeat(x[:, i - self.order + 1:i], self.V, 0)
            p = self.parts(context, np.tile(np.arange(self.V), n)) @ self.weights
            x[:, i] = torch.multinomial(torch.from_numpy(p).view(n, -1), 1, generator=g)[:, 0]
        x = torch.from_numpy(x[:, self.order - 1:])
        return x.masked_fill((x == self.eos).cumsum(1) > 0, self.eos)


def baselines(budget):
    """Rows of what stands beside every model: the corpus itself, no model, counts of tokens and of
    three in a row. The counts see as many documents as a run."""
    kept = Path(f"out/compare/{budget}/baselines.json")
    plan, first = BUDGETS[budget], settings("ar", budget, BUDGETS[budget]["seeds"][0])
    key = dict(test=plan["test"], n=plan["n"], code=code_of("compare"))
    if kept.exists() and json.loads(kept.read_text())[0]["key"] == key:
        return json.loads(kept.read_text())
    script, model, cfg, data = load("ar", first)
    judge = model, cfg, data.tokenizer
    x0, true_nll = script.get_eval_rows(data.test, cfg, plan["test"])
    lengths = [len(r) for r in tokens_of(script.get_eval_rows(data.val, cfg, 1000)[0], cfg)]
    size = np.array([len(r) + 1 for r in tokens_of(x0, cfg)])
    seen = train_documents(data, cfg)

    def row(name, idea, nats, x):
        nats = torch.as_tensor(nats).double()
        out = dict(kind="baseline", name=name, idea=idea, key=key, lengths=lengths, test=dict(
            bound="exact", rows=len(x0), nats_per_doc=nats.mean().item(), se=se(nats),
            entropy_per_doc=true_nll.mean().item(), gap=(nats - true_nll).mean().item(),
            gap_se=se(nats - true_nll), nats_per_token=nats.sum().item() / size.sum().item()))
        if x is not None:
            rows = tokens_of(x, cfg)
            out["ancestral"] = dict(measure_samples(x, cfg, data.tokenizer, judge),
                                    novelty=share_new(rows, seen),
                                    length=sum(map(len, rows)) / len(rows))
            out["stories"] = [data.tokenizer.decode(r) for r in rows[:2]]
        return out

    num_rows = min(cfg.steps * cfg.batch_size * cfg.grad_accum, len(data.train[1]) - 1)
    rows = script.get_rows(data.train, cfg, np.arange(num_rows))
    others = script.get_eval_rows(data.val, cfg, 512)[0]
    out = [row("real", "its grammar, read as a probability", true_nll, x0[:plan["n"]]),
           row("uniform", "every token alike", size * math.log(cfg.vocab_size), None)]
    for name, order, idea in (("unigram", 1, "how often a token occurs"),
                              ("3-gram", 3, "the last two tokens, counted")):
        model = NGram(order, rows, others, cfg)
        x = model.sample(plan["n"], cfg.seq_len, torch.Generator().manual_seed(cfg.seed))
        out.append(row(name, idea, model.nll(x0), x))
    kept.write_text(json.dumps(out))
    return out


# ------------------------------------------------------------------------------- tables and pages

def means(rows):
    """Rows of one method, a row a seed -> what the tables show: means over seeds."""
    def mean(*path):
        found = []
        for row in rows:
            for key in path:
                row = row[key] if row is not None else None
            found += [row] if row is not None else []
        return sum(found) / len(found) if found else None
    first = rows[0]
    parts = [part for part in ("ancestral", "default") if part in first]
    metrics = ("nfe", "gen_nll", "novelty", "length", *METRICS)
    return dict(
        name=first["name"], seeds=len(rows), bound=first["test"]["bound"],
        test={k: mean("test", k) for k in first["test"] if k != "bound"},
        range=[f(row["test"]["nats_per_doc"] for row in rows) for f in (min, max)],
        **{part: {k: mean(part, k) for k in metrics if k in first[part]} for part in parts},
        **{k: mean(k) for k in ("infill_accuracy", "train_seconds", "parameters") if k in first})


def cell(value, digits=2):
    """A number for a table; what was not measured stays empty."""
    return "" if value is None else f"{value:.{digits}f}"


def text_of(path):
    return path.read_text("utf-8") if path.exists() else ""


def stale(rows):
    """A mark for results that an earlier version of the script made."""
    runs = [row for row in rows if row["kind"] == "run"]
    return "†" if any(row["code"] != code_of(row["name"]) for row in runs) else ""


def tables(results, root=""):
    """The rows of a results file -> {name: Markdown}: `table`, `details`, `samples`. `root` leads
    from the page to the repository."""
    groups = {}
    for row in results[1:-1]:
        groups.setdefault(row["name"], []).append(row)
    speeds, n = results[-1], results[-1]["n"]
    all_means = {name: means(rows) for name, rows in groups.items()}
    lines = []
    notebooks = {p.stem[3:]: p.stem for p in (ROOT / "notebooks").glob("*.ipynb")}
    notebooks["real"] = notebooks.get("tales", "00_tales")
    for name, row in all_means.items():
        best, page = row.get("default") or row.get("ancestral") or {}, notebooks.get(name)
        label = {"real": "*the corpus itself*"}.get(name, f"*{name}*")
        if name in IDEAS:
            label = f"[`{name}.py`]({root}{name}.py)"
        idea = IDEAS.get(name, groups[name][0].get("idea"))
        count = str(len(text_of(ROOT / f"{name}.py").splitlines())) if name in IDEAS else ""
        lines.append([label + stale(groups[name]), count, idea if name in IDEAS else f"*{idea}*",
                      {"exact": "exact", "upper": "upper bound"}[row["bound"]],
                      f"{SIGN[row['bound']]} {row['test']['nats_per_token']:.3f}",
                      cell(best.get("valid_stories")), cell(best.get("valid_sentences")),
                      cell(row.get("default", {}).get("nfe"), 0),
                      f"[{page[:2]}]({root}notebooks/{page}.ipynb)" if page else ""])
    table = markdown("script | lines | idea | likelihood | nats/token on tales | "
                     "valid-story rate | valid-sentence rate | NFE | notebook", lines)
    lines = []
    for name, row in all_means.items():
        test, sign = row["test"], SIGN[row["bound"]]
        label = f"`{name}.py`" if name in IDEAS else f"*{name}*"
        spread = f" ({row['range'][0]:.1f} to {row['range'][1]:.1f})" if row["seeds"] > 1 else ""
        lines.append([
            label, str(row["seeds"]) if name in IDEAS else "",
            f"{sign} {test['nats_per_doc']:.1f} ± {test['se']:.1f}{spread}",
            "" if name == "real" else f"{sign} {test['gap']:.1f} ± {test['gap_se']:.1f} "
            f"({test['gap'] / test['entropy_per_doc']:+.0%})",
            cell(row.get("infill_accuracy")),
            cell(row.get("parameters") and row["parameters"] / 1e6),
            *([f"{1000 * speeds[p][name][k]:,.0f}" for p in ("ancestral", "default")
               for k in (0, 1)] if name in IDEAS else [""] * 4)])
    details = markdown(
        "method | seeds | nats per story | gap to entropy | single-token infilling accuracy | "
        f"parameters, M | latency at batch 1, ms per story | at batch {n} | "
        f"default sampler: batch 1 | batch {n}", lines)
    lines = []
    for name, row in all_means.items():
        for part in ("ancestral", "default"):
            best = row.get(part)
            if best:
                label = f"`{name}.py`" if name in IDEAS else f"*{name}*"
                how = ("temperature 0.5" if name == "ar" else "default sampler") \
                    if part == "default" else "T=1, one token per step (ancestral)" \
                    if name in IDEAS else ""
                lines.append([label, how, cell(best.get("nfe"), 0), *(cell(best.get(k)) for k in (
                    "valid_stories", "valid_sentences", "consistent")),
                    cell(best.get("true_nll"), 1), *(cell(best.get(k)) for k in (
                        "entropy", "distinct_2", "gen_nll", "novelty")),
                    cell(best.get("length"), 0)])
    samples = markdown("method | sampler | NFE | valid-story rate | valid-sentence rate | "
                       "consistency rate | true NLL of valid samples | entropy | distinct-2 | "
                       "generative NLL | novelty | tokens", lines)
    return dict(table=table, details=details, samples=samples)


def markdown(head, lines):
    """A Markdown table."""
    names = head.split(" | ")
    return "\n".join("| " + " | ".join(line) + " |"
                     for line in [names, ["---"] * len(names), *lines])


def insert(page, parts):
    """Put texts between the markers `<!-- compare: name -->` and `<!-- end -->` of a page."""
    for name, text in parts.items():
        begin = f"<!-- compare: {name} -->\n"
        if begin in page:
            head, _, rest = page.partition(begin)
            page = f"{head}{begin}{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return page


def page(results):
    """compare.md: what made the results, the tables, the figures, two stories of each method."""
    made, parts = results[0], tables(results)
    out = [f"# Six methods at one budget\n\nMade by `{made['command']}` from {made['tokens']:,} "
           f"tokens a run, seeds {', '.join(map(str, made['seeds']))}, torch {made['torch']}, "
           f"{made['machine']}, {made['dtype']}, {made['test']} test documents, {made['n']} "
           "samples a row. `=` is exact, `<=` an upper bound; ± is a standard error over "
           "documents, brackets are the least and most of the seeds.",
           "## Likelihood", parts["details"],
           "![bound against tokens](compare_bound.png)", "## Samples", parts["samples"],
           "![quality against NFE](compare_quality.png)", "![metrics](compare_samples.png)",
           "![lengths](compare_length.png)", "![speed](compare_speed.png)",
           "## Two stories of each, as they came",
           "The first two samples of the first seed, of the default sampler (`ar.py` at "
           "temperature 0.5)."]
    for row in results[1:-1]:
        if row.get("stories") and row.get("seed", made["seeds"][0]) == made["seeds"][0]:
            label = f"`{row['name']}.py`" if row["name"] in IDEAS else row["name"]
            how = f" (seed {row['seed']}, NFE {row['default']['nfe']})" if "seed" in row else ""
            out += [f"**{label}**{how}"] + [f"> {' '.join(s.split())}" for s in row["stories"]]
    return "\n\n".join(out) + "\n"


# ---------------------------------------------------------------------------------------- figures

def new_figure(columns, height=3.6, width=9):
    """A figure and its panels side by side."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def draw_figures(results, folder):
    """The five figures of a results file."""
    runs = {}
    for row in results[1:-1]:
        if row["kind"] == "run":
            runs.setdefault(row["name"], []).append(row)
    base = {row["name"]: row for row in results[1:-1] if row["kind"] == "baseline"}
    real, color = base["real"], {name: f"C{i}" for i, name in enumerate(IDEAS)}
    label = {name: f"{name}.py ({'exact' if name == 'ar' else 'bound'})" for name in IDEAS}

    figure, (axes,) = new_figure(1, 4.6)
    for name, rows in runs.items():
        x = np.array([point[0] for point in rows[0]["curve"]][1:])
        x += rows[0]["tokens"] - x[-1]  # those of a parent come before
        y = np.array([[point[1] for point in row["curve"]][1:] for row in rows])
        axes.plot(x, y.mean(0), marker="o", ms=3, color=color[name], label=label[name])
        axes.fill_between(x, y.min(0), y.max(0), color=color[name], alpha=0.2, lw=0)
    for name, style in (("unigram", ":"), ("3-gram", "-.")):
        axes.axhline(base[name]["test"]["nats_per_doc"], ls=style, color="gray", label=name)
    axes.axhline(real["test"]["nats_per_doc"], ls="--", color="black", label="true entropy")
    axes.set(xlabel="tokens seen in training", ylabel="nats per story", yscale="log",
             title="Likelihood against tokens: mean and range of the seeds")
    low, high = axes.get_ylim()
    ticks = [t for t in (80, 100, 130, 170, 220, 300, 400, 600, 800) if low < t < high]
    axes.set_yticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    save(figure, folder / "compare_bound.png")

    figure, panels = new_figure(3)
    for axes, (metric, title) in zip(panels, (
            ("valid_stories", "valid-story rate"), ("valid_sentences", "valid-sentence rate"),
            ("entropy", "entropy of words, nats"))):
        for name, (row, *_) in runs.items():
            points = sorted((p["nfe"], p[metric]) for p in [*row["frontier"], row["default"]])
            axes.plot(*zip(*points), marker="o", ms=4, color=color[name], label=f"{name}.py")
        axes.axhline(real["ancestral"][metric], ls="--", color="black", label="test stories")
        axes.set(xlabel="NFE", title=title, xscale="log")
        axes.set_xticks((4, 8, 16, 32, 64, 128), (4, 8, 16, 32, 64, 128))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    save(figure, folder / "compare_quality.png")

    figure, panels = new_figure(3)
    kept = {name: means(rows) for name, rows in runs.items()}
    for axes, metric, title in zip(panels, ("valid_stories", "consistent", "true_nll"), (
            "valid-story rate", "consistency rate", "true NLL of valid samples, nats")):
        for part, shift, hatch in (("ancestral", -0.2, ""), ("default", 0.2, "//")):
            axes.bar([i + shift for i in range(len(kept))],
                     [row[part].get(metric) or 0 for row in kept.values()], 0.38, hatch=hatch,
                     color=[color[name] for name in kept], edgecolor="white",
                     label="T=1, ancestral" if part == "ancestral" else "default sampler")
        axes.axhline(real["ancestral"][metric], ls="--", color="black", label="test stories")
        axes.set_xticks(range(len(kept)), kept, rotation=40, ha="right", fontsize=7)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3, axis="y")
    panels[0].legend(fontsize=7)
    save(figure, folder / "compare_samples.png")

    figure, (axes,) = new_figure(1)
    bins = np.arange(0, max(real["lengths"]) + 11, 10)
    axes.hist(real["lengths"], bins, density=True, color="lightgray", label="validation stories")
    for name, rows in runs.items():
        axes.hist(sum((row["lengths"] for row in rows), []), bins, density=True, histtype="step",
                  color=color[name], label=f"{name}.py")
    axes.set(xlabel="tokens of a story", ylabel="density", title="Lengths at T=1, ancestral")
    axes.legend(fontsize=7)
    save(figure, folder / "compare_length.png")

    figure, panels = new_figure(3)
    at, speeds = range(len(kept)), results[-1]
    panels[0].bar(at, [speeds["train"][name] for name in kept], color=[color[n] for n in kept])
    panels[0].set_title("training, tokens a second, in turns", fontsize=10)
    for k, (axes, n) in enumerate(zip(panels[1:], (1, speeds["n"]))):
        for part, shift, hatch in (("ancestral", -0.2, ""), ("default", 0.2, "//")):
            axes.bar([i + shift for i in at], [speeds[part][name][k] for name in kept], 0.38,
                     hatch=hatch, color=[color[name] for name in kept], edgecolor="white",
                     label="T=1, ancestral" if part == "ancestral" else "default sampler")
        axes.set_title(f"seconds for a story, {n} at a time", fontsize=10)
    panels[2].legend(fontsize=7, loc="upper left")
    for axes in panels:
        axes.set_xticks(at, kept, rotation=40, ha="right", fontsize=7)
        axes.grid(alpha=0.3, axis="y")
    save(figure, folder / "compare_speed.png")


def save(figure, path):
    """Write a figure as PNG, whole or not at all."""
    common.replace(path, lambda file: figure.savefig(file, format="png"))


# ------------------------------------------------------------------------------------------- film

def shoot(budget):
    """One story of each method, as the film's data: frames [calls, {position: text}] of changes;
    null is a position that is not decided, "" one behind the end."""
    seed, out = BUDGETS[budget]["seeds"][0], []
    for name, idea in IDEAS.items():
        run = settings(name, budget, seed)
        if is_made(name, run) is not True:
            raise UserError(f"no run of {name}.py to film: `python compare.py --budget {budget}` "
                            "first")
        script, model, cfg, data = load(name, run)
        if name != "ar":
            cfg = default_sampler(script, cfg)
        frames, now, seen = [], {}, []
        with amp(model, cfg):
            sample(script, model, cfg, 1, torch.Generator().manual_seed(cfg.seed), frames=seen)
        for nfe, ids in [(0, [-1] * cfg.seq_len), *seen]:
            texts = {i: None if not 0 <= t < cfg.vocab_size else "" if t == cfg.eos else
                     data.tokenizer.decode([t]) for i, t in enumerate(ids)}
            frames.append([nfe, {i: t for i, t in texts.items() if now.get(i) != t}])
            now = texts
        told = f"NFE {frames[-1][0]}, temperature {cfg.temperature:g}"
        out.append(dict(name=f"{name}.py", idea=idea, settings=told, calls=frames[-1][0],
                        length=cfg.seq_len, frames=frames))
    steps = BUDGETS[budget]["run"]["steps"]
    return dict(title="Six ways to write a story", methods=out,
                note=f"The first sample of each after {steps} steps, seed {seed}.")


def moments(film, width=100, count=5):
    """The film as text: all methods after the same share of their steps, a line each."""
    blocks = []
    for k in range(1, count + 1):
        lines = [f"after {100 * k // count} % of the steps"]
        for method in film["methods"]:
            now = [None] * method["length"]
            for call, changes in method["frames"]:
                if call <= method["calls"] * k / count:
                    for i, text in changes.items():
                        now[int(i)] = text
            line = " ".join("".join("░" if t is None else t for t in now).split())
            line = line if len(line) <= width - 20 else line[:width - 24] + " ..."
            lines.append(f"{method['name']:>19} {line}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def make_film(budget, folder):
    """Print the film and write film.html, one file that any browser plays."""
    film = shoot(budget)
    page = (ROOT / "results/film_template.html").read_text("utf-8")
    data = json.dumps(film, ensure_ascii=False).replace("<", "\\u003c")
    common.replace(folder / "film.html", lambda file: file.write(
        page.replace("/*FILM*/null", data).encode()))
    print(moments(film))
    print(f"\n{folder / 'film.html'}: open it in a browser")


# ------------------------------------------------------------------------------------------- main

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def folder_of(budget):
    """Where the results of a budget go: only the full-size tables belong to the repository."""
    return ROOT / "results" if budget == "standard" else Path(f"out/compare/{budget}")


def publish(budget, command):
    """Write compare.jsonl, compare.md, the figures and, for the standard budget, the tables of
    README.md and results/README.md."""
    plan, folder = BUDGETS[budget], folder_of(budget)
    if command == "table":
        path = folder / "compare.jsonl"
        if not path.exists():
            raise UserError(f"no {path}: `python compare.py --budget {budget}` makes it")
        results = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    else:
        rows = [measure(name, budget, seed) for name in IDEAS for seed in plan["seeds"]
                if is_made(name, settings(name, budget, seed)) is True]
        made = dict(kind="config", command=command, budget=budget, tokens=budget_tokens(budget),
                    seed=rows[0]["seed"], seeds=sorted({row["seed"] for row in rows}),
                    config=plan["run"], test=plan["test"], n=plan["n"],
                    **{k: rows[0][k] for k in ("torch", "machine", "threads", "dtype")})
        results = [made, *baselines(budget), *rows, speed(budget)]
        common.replace(folder / "compare.jsonl", lambda file: file.writelines(
            (json.dumps(row) + "\n").encode() for row in results))
    draw_figures(results, folder)
    common.replace(folder / "compare.md", lambda file: file.write(page(results).encode()))
    parts = tables(results)
    for readme, root in ((ROOT / "README.md", ""), (ROOT / "results/README.md", "../")):
        if budget == "standard":
            text = insert(readme.read_text("utf-8"), tables(results, root))
            common.replace(readme, lambda file: file.write(text.encode()))
    print(f"\n{parts['table']}\n\n{parts['details']}\n\n{parts['samples']}\n\n"
          f"{folder}: compare.jsonl, compare.md and five figures")


def main(argv):
    parser = Parser(prog="compare.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="run", choices=("run", "table", "film"))
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
    if args.what == "film":
        return make_film(args.budget, folder_of(args.budget))
    if args.what == "table":
        return publish(args.budget, "table")
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
        publish(args.budget, "python compare.py " + " ".join(argv))


def spread(stage, work, args):
    """The same in several processes, each with its share of the cores."""
    env = os.environ | dict(OMP_NUM_THREADS=str(max(1, os.cpu_count() // args.jobs)))

    def one(job):
        name, seed = job
        return subprocess.run([sys.executable, str(ROOT / "compare.py"), "--budget", args.budget,
                               "--only", name, "--seeds", str(seed), "--stage", stage],
                              env=env).returncode
    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [job for job, code in zip(work, pool.map(one, work)) if code]
    if failed:
        raise UserError(f"{stage} of {', '.join(f'{n} {s}' for n, s in failed)} failed, see above; "
                        "the rest is kept, run the same command again")


if __name__ == "__main__":
    common.run_main(main)
