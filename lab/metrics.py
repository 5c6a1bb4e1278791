"""What samples are worth as text: rates of the grammar on tales, generative NLL under a run of
ar.py, diversity.

    python lab/metrics.py --samples out/mdlm/samples.txt --judge out/ar
"""
import dataclasses
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python lab/metrics.py`
import ar
import common
from data.tales import grade
from data.units import entropy_of, sizes_of, tokens_of
from lab.methods import parse_options


def text_metrics(rows):
    """Lists of token ids -> their mean length, entropy of the pooled unigrams in nats, distinct-n
    (the share of n-grams that differ), repetition (the share of tokens that equal the one before).
    """
    out = dict(length=sum(map(len, rows)) / max(1, len(rows)), entropy=entropy_of(rows))
    for n in (1, 2, 3):
        grams = Counter(tuple(row[i:i + n]) for row in rows for i in range(len(row) - n + 1))
        out[f"distinct_{n}"] = len(grams) / max(1, grams.total())
    pairs = [a == b for row in rows for a, b in zip(row, row[1:])]
    return out | dict(repetition=sum(pairs) / max(1, len(pairs)))


def load_judge(out, device, data=None):
    """The run of ar.py in the folder `out` as (model, Config, tokenizer), or None if there is none.
    It must have the tokenizer of `data`; weights/ar, which no run stands for, is None without."""
    path = common.checkpoint_of(out)
    if not path.exists():
        return None
    cfg = common.load_config(ar.Config, out)
    try:
        model, stored = common.load_model(ar.Model, cfg, device, data)
    except common.UserError:
        if path.name == "model.safetensors":
            raise
        return None
    return model.requires_grad_(False), cfg, stored


def judge_of(run, out, data):
    """load_judge for an evaluation; says so if there is none."""
    judge = load_judge(out, run.device, data)
    if not judge:
        run.say(f"no generative NLL: {out} holds no run of ar.py with the tokenizer "
                f"{data.tokenizer.name} of these data (--judge)")
    return judge


def generative_nll(x, cfg, judge):
    """Nats per token of the rows x (n, T) under the judge. Repetition lowers it: read it beside the
    entropy."""
    model, theirs = judge[0], dataclasses.replace(judge[1], rows=cfg.rows)  # the same are scored
    rows, ended = tokens_of(x, cfg), x.clone()
    for row, tokens in zip(ended, rows):
        row[len(tokens):] = cfg.eos  # what follows the first EOS is not part of the text
    count = sum(sizes_of(x, cfg))
    return ar.nll(model, ended.to(model.head.weight.device), theirs).sum().item() / max(1, count)


def measure(x, cfg, tokenizer, judge=None):
    """All of it for the rows x (n, T), as a dictionary of numbers."""
    rows = tokens_of(x, cfg)
    out = grade(list(map(tokenizer.decode, rows))) if cfg.data == "tales" else {}
    if judge:
        out["gen_nll"] = generative_nll(x, cfg, judge)
    return out | text_metrics(rows)


@dataclass
class Options:
    samples: str = "out/mdlm/samples.txt"  # texts, with <|endoftext|> between two
    judge: str = "out/ar"  # the run of ar.py whose likelihood is the generative NLL


def main(argv):
    opt = parse_options(Options, argv, __doc__)
    try:
        whole = Path(opt.samples).read_text("utf-8")
    except UnicodeDecodeError:
        raise common.UserError(f"{opt.samples} is no text: choose a samples.txt") from None
    texts = whole.removesuffix("\n").split("\n<|endoftext|>\n")
    judge = load_judge(opt.judge, torch.device("cpu"))
    if not judge:
        raise common.UserError(f"no checkpoint in {opt.judge}: train ar.py, or choose another "
                               "--judge")
    _, cfg, tokenizer = judge
    cfg = dataclasses.replace(cfg, rows="docs")  # a text a row, whatever the judge was trained on
    rows = [tokenizer.encode(text) for text in texts]
    if cut := sum(len(row) > cfg.seq_len for row in rows):
        print(f"{cut} texts are cut to the {cfg.seq_len} tokens of the judge's rows")
    x = torch.tensor([(row + [cfg.eos] * cfg.seq_len)[:cfg.seq_len] for row in rows])
    found = measure(x, cfg, tokenizer, judge)
    print(f"{len(rows)} texts, " + ", ".join(
        f"{key} {value:.3g}" for key, value in found.items() if value is not None))


if __name__ == "__main__":
    common.run_main(main)
