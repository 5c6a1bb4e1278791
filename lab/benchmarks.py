"""Benchmarks of a run of diffugpt_varlen.py or lab/pretrained.py: shares of items that it gets
right, with 95 % intervals, printed and appended to benchmarks.jsonl in the run folder. FILE holds
an item a line, as JSON; of cloze it may be a text, whose last words are the targets (LAMBADA).

    python lab/benchmarks.py cloze:FILE --out out/diffugpt_varlen
    python lab/benchmarks.py choice:FILE --num-items 0
    python lab/benchmarks.py infill:FILE

    cloze   {"prefix", "target"}: the last word. oracle: its number of tokens is given, as in Gong
            et al. (arXiv 2410.17891); free: the first word of six tokens counts
    choice  {"prefix", "choices", "gold"}: the option of the smallest bound per token, and in sum;
            gold counts from 0. Options of as many tokens are scored under the same masks
    infill  {"prefix", "middle", "suffix"}: the middle, its number of tokens given
"""
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python lab/benchmarks.py`
import common
import diffugpt_varlen as script
from common import UserError
from lab.methods import parse_options, results_folder
from lab.pretrained import Config

KEYS = dict(cloze=("prefix", "target"), choice=("prefix", "choices", "gold"),
            infill=("prefix", "middle", "suffix"))


@dataclass
class Options:
    benchmark: tyro.conf.Positional[str]  # cloze:FILE, choice:FILE or infill:FILE
    out: str = "out/diffugpt_varlen"  # run folder
    num_items: int = 200  # use at most this many items; 0 = all


def wilson(right, n):
    """95 % interval of a share, right of n (Wilson 1927): [low, high]."""
    p, z = right / n, 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, middle - half) / (1 + z * z / n), min(1.0, (middle + half) / (1 + z * z / n))]


def read_item(kind, line):
    """A line -> the item, {key: value}; ValueError, KeyError or TypeError if it is none."""
    if kind == "cloze" and not line.startswith("{"):
        return dict(zip(KEYS[kind], line.strip().rsplit(" ", 1), strict=True))
    item = {key: json.loads(line)[key] for key in KEYS[kind]}
    choices = item.get("choices", [])
    texts = [value for key, value in item.items() if key not in ("choices", "gold")] + choices
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise TypeError
    if kind == "choice" and item["gold"] not in range(len(choices)):
        raise ValueError
    return item


def read_items(kind, path, limit):
    """The first `limit` items of a file, or all for 0."""
    try:
        lines = [line for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): name a text file of items") from None
    if not lines:
        raise UserError(f"{path} holds no items")
    items = []
    try:
        items += (read_item(kind, line) for line in lines[:limit or None])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}, item {len(items) + 1} is no {kind} item: it needs "
                        f"{', '.join(KEYS[kind])}") from None
    return items


def choose(model, item, cfg, tokenizer, device):
    """Is the gold option of a choice the one of the smallest nats? {per_token, sum: bool}."""
    T, costs = cfg.seq_len, []
    for choice in item["choices"]:
        answer = tokenizer.encode(" " + choice.strip())[:T // 2]
        prefix = tokenizer.encode(item["prefix"].rstrip())[-(T - len(answer)):]
        x = torch.tensor([prefix + answer], device=device)
        is_given = torch.arange(x.shape[1], device=device)[None] < len(prefix)
        g = torch.Generator().manual_seed(cfg.seed)  # the same masks for every option
        nats = script.nelbo_per_token(model, x, cfg, g, 2 * len(answer), is_given)
        nats = nats[0, len(prefix):]  # the causal parent scores the prefix, too
        costs.append((nats.mean().item(), nats.sum().item()))
    return {name: cost.index(min(cost)) == item["gold"]
            for name, cost in zip(("per_token", "sum"), zip(*costs))}


def write(model, before, count, after, cfg, tokenizer, device):
    """What the sampler writes into `count` positions between ids: text."""
    before = before[-(cfg.seq_len - count - len(after)):]
    canvas = torch.tensor([before + [cfg.vocab_size] * count + after], device=device)
    x, _ = script.sample(model, canvas, cfg, torch.Generator().manual_seed(cfg.seed))
    return tokenizer.decode(x[0, len(before):len(before) + count].tolist()).strip()


def fill(model, item, cfg, tokenizer, device):
    """Is the missing part of a cloze or infill item written as it is? {oracle, free: bool}."""
    most, truth = cfg.seq_len // 3, item.get("target", item.get("middle")).strip()
    before = tokenizer.encode(item["prefix"].rstrip())
    after = tokenizer.encode(" " + item["suffix"].strip())[:most] if "suffix" in item else []
    size = min(len(tokenizer.encode(" " + truth)), most)
    row = dict(oracle=write(model, before, size, after, cfg, tokenizer, device) == truth)
    if "target" in item:
        words = write(model, before, min(6, most), [], cfg, tokenizer, device).split()
        row["free"] = words[:1] == [truth]
    return row


@torch.no_grad()
def evaluate(model, items, cfg, tokenizer):
    """Shares right and their intervals, a row of the log. One canvas of a fixed length, one token
    per step; order and temperature are the run's."""
    cfg = dataclasses.replace(cfg, length_mode="fixed", num_steps=0)
    device = next(model.parameters()).device
    answers = [(choose if "choices" in item else fill)(model, item, cfg, tokenizer, device)
               for item in tqdm(items, disable=None)]
    row = dict(num_items=len(items), order=cfg.order, temperature=cfg.temperature, seed=cfg.seed)
    for name in answers[0]:
        right = sum(answer[name] for answer in answers)
        row |= {name: right / len(items), f"{name}_interval": wilson(right, len(items))}
    return row


def main(argv):
    opt = parse_options(Options, argv, __doc__)
    kind, _, path = opt.benchmark.partition(":")
    if kind not in KEYS or not path:
        raise UserError(f"{opt.benchmark} cannot be: write cloze:FILE, choice:FILE or infill:FILE")
    cfg = common.load_config(Config, opt.out)
    run = common.Run(cfg)
    run.out = results_folder(run)
    if kind == "infill" and cfg.pipeline == "arm":
        raise UserError(f"{opt.out} is causal and cannot infill: use cloze or choice")
    items = read_items(kind, path, opt.num_items)
    model, tokenizer = common.load_model(script.Model, cfg, run.device)
    with run.amp:
        row = dict(benchmark=kind, file=Path(path).name) | evaluate(model, items, cfg, tokenizer)
    with open(run.out / "benchmarks.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    for name in [key for key in row if f"{key}_interval" in row]:
        low, high = row[f"{name}_interval"]
        run.say(f"{kind} {name}: {row[name]:.3f} of {len(items)}, 95 %: {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    common.run_main(main)
