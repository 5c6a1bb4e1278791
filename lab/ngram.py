"""How far counting gets: exact likelihoods and samples of n-gram models, which need no network.

    python lab/ngram.py                             orders 1 to 4 of tales
    python lab/ngram.py --documents 4000 --orders 3
    python lab/ngram.py --data my/texts --vocab-size 1024 --split val --rows 128

With --split val, the likelihood is that of the validation rows that the scripts use while they
train, and the weights of the orders are fitted to the test rows.
"""
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python lab/ngram.py`
import ar
import common
from data.prepare import load_data
from data.units import likelihood, report, tokens_of
from lab.methods import parse_options


class NGram:
    """Interpolated n-gram model of rows (N, T) of documents: p(x | c) = sum_j w_j p_j, where p_0 is
    uniform, p_j counts the last j - 1 tokens' successors, and is p_{j-1} where those tokens were
    never seen; the weights w_j maximize the likelihood of other rows (EM). Exact likelihoods."""

    def __init__(self, order, rows, others, cfg):
        self.order, self.V, self.eos, self.cfg = order, cfg.vocab_size, cfg.eos, cfg
        if (self.V + 1) ** order >= 2 ** 63:  # pack() makes one number of an n-gram
            raise common.UserError(f"order {order} is too high for {self.V} tokens")
        self.grams, self.weights = [], np.full(order + 1, 1 / (order + 1))
        context, token, _ = self.split(rows)
        for j in range(1, order + 1):
            before = self.pack(context[:, order - j:])
            self.grams.append([np.unique(before * self.V + token, return_counts=True),
                               np.unique(before, return_counts=True)])
        parts = self.parts(*self.split(others)[:2])
        for _ in range(200):
            share = parts * self.weights
            self.weights = (share / share.sum(1, keepdims=True)).mean(0)

    def split(self, rows):
        """Scored tokens of rows, before each the order - 1 tokens seen, where V stands for BOS:
        context (n, order - 1), token (n,), the row of each (n,)."""
        rows = np.asarray(rows)
        scored = ar.is_scored(torch.from_numpy(rows), self.cfg).numpy()  # the first EOS too
        wide = np.pad(rows, ((0, 0), (self.order - 1, 0)), constant_values=self.V)
        context = np.stack([wide[:, j:j + rows.shape[1]] for j in range(self.order)], -1)
        return context[scored][:, :-1], rows[scored], np.nonzero(scored)[0]

    def pack(self, context):
        """Contexts (n, j - 1) as one number each."""
        out = np.zeros(len(context), np.int64)
        for column in context.T:
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
        context, token, row = self.split(rows)
        return np.bincount(row, -np.log(self.parts(context, token) @ self.weights), len(rows))

    def sample(self, n, T, g):
        """n rows of at most T tokens, EOS-filled: (n, T)."""
        x = np.full((n, T + self.order - 1), self.V)
        for i in range(self.order - 1, T + self.order - 1):
            context = np.repeat(x[:, i - self.order + 1:i], self.V, 0)
            p = self.parts(context, np.tile(np.arange(self.V), n)) @ self.weights
            x[:, i] = torch.multinomial(torch.from_numpy(p).view(n, -1), 1, generator=g)[:, 0]
        x = torch.from_numpy(x[:, self.order - 1:])
        ended = (x == self.eos).cumsum(1) > 0
        return x.masked_fill(ended, self.eos) if self.cfg.rows == "docs" else x


@dataclass
class Options:
    orders: tuple[int, ...] = (1, 2, 3, 4)  # a model of order n sees n - 1 tokens
    documents: int = 25600  # of training that are counted; of running text, rows of seq_len tokens
    data: str = "tales"  # as --data of the scripts, so for the next two
    tokenizer: str = "bpe"
    vocab_size: int = 0
    lines: bool = False  # each line of a text file is a document (--split lines of the scripts)
    seq_len: int = 160  # tokens per row, that of the run to compare with
    split: Literal["test", "val"] = "test"  # what is evaluated; the other one fits the weights
    rows: int = 512  # how many documents or windows of it
    seed: int = 1337  # of the sample
    out: str = ""  # a .json to write the likelihoods to


def main(argv):
    opt = parse_options(Options, argv, __doc__)
    cfg = ar.Config(data=opt.data, tokenizer=opt.tokenizer, vocab_size=opt.vocab_size,
                    seq_len=opt.seq_len, split="lines" if opt.lines else "auto")
    data = load_data(cfg)
    ids, offsets, _ = data.train
    index = np.arange(len(offsets) - 1) if cfg.rows == "docs" else np.arange(
        0, len(ids) - cfg.seq_len + 1, cfg.seq_len)
    rows = ar.get_rows(data.train, cfg, index[:opt.documents])
    other = data.val if opt.split == "test" else data.test
    others = ar.get_eval_rows(other, cfg, 512)[0]
    x0, true_nll = ar.get_eval_rows(getattr(data, opt.split), cfg, opt.rows)
    made = dict(command="python lab/ngram.py " + " ".join(argv), config=dataclasses.asdict(opt),
                torch=torch.__version__, machine=common.machine(torch.device("cpu")),
                threads=torch.get_num_threads(), orders={})
    for order in opt.orders:
        model = NGram(order, rows, others, cfg)
        nats = torch.from_numpy(model.nll(x0))
        row = likelihood(nats, x0, true_nll, data.tokenizer, cfg, "exact")
        made["orders"][order] = row
        x = model.sample(1, cfg.seq_len, torch.Generator().manual_seed(opt.seed))
        text = data.tokenizer.decode(tokens_of(x, cfg)[0])
        print(f"order {order}: {report(row)}\n{' '.join(text.split())}\n")
    if opt.out:
        common.replace(Path(opt.out), lambda file: file.write(
            (json.dumps(made, indent=1) + "\n").encode()))


if __name__ == "__main__":
    common.run_main(main)
