"""What ar.py leaves out: a repetition penalty, and filling a gap from the left or by Bayes' rule.

    python lab/ar_extra.py sample --prompt "Once upon a time" --repetition-penalty 1.2
    python lab/ar_extra.py eval --num-samples 8     accuracy of filling one gap, left and Bayes
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python lab/ar_extra.py`
import ar
import common
from data.prepare import load_data
from data.units import tokens_of


@dataclass
class Config(ar.Config):
    repetition_penalty: float = 1.0  # divides the logits of tokens that are already in the row

    def problems(self):
        return [] if self.repetition_penalty else ["--repetition-penalty must be more than 0"]


class Penalized:
    """ar.Model that makes the tokens of its input less likely: positive logits are divided by the
    penalty, negative ones multiplied (Keskar et al. 2019)."""

    def __init__(self, model, cfg, n):
        self.model, self.blocks, self.penalty = model, model.blocks, cfg.repetition_penalty
        self.used = torch.zeros(n, cfg.vocab_size, dtype=torch.bool)

    def __call__(self, idx, kv_cache):
        bos = int(not kv_cache[0])  # the first input begins with BOS, which is no token of the row
        logits = self.model(idx, kv_cache=kv_cache)
        self.used = self.used.to(idx.device).scatter(1, idx[:, bos:], True)
        last = logits[:, -1]
        lower = torch.where(last > 0, last / self.penalty, last * self.penalty)
        return torch.where(self.used, lower, last)[:, None]


def sample(model, x, cfg, g, on_step=lambda nfe, x: None):
    """As ar.sample, with --repetition-penalty."""
    if cfg.repetition_penalty != 1:
        model = Penalized(model, cfg, len(x))
    return ar.sample(model, x, cfg, g, on_step)


@torch.no_grad()
def infill_left(model, x0, i, cfg):
    """log p(x_i | x_<i) over the vocabulary: what a causal model knows of a gap at position i of x0
    (B, T) without its right side. (B, V)"""
    inputs = torch.cat((torch.full_like(x0[:, :1], cfg.bos), x0[:, :i]), 1)
    return model(inputs)[:, -1].float().log_softmax(1)


@torch.no_grad()
def infill_exact(model, x0, i, cfg, chunk=256):
    """log p(x_i | all other tokens) of one row x0 (T,) by Bayes' rule over the V fillings of
    position i: the exact single-token infilling of a causal model, at V evaluations. (V,)"""
    rows = x0.repeat(cfg.vocab_size, 1)
    rows[:, i] = torch.arange(cfg.vocab_size, device=x0.device)
    cost = [ar.token_nll(model, part, cfg).cpu().double().sum(1) for part in rows.split(chunk)]
    after_end = (~ar.is_scored(rows, cfg) & (rows != cfg.eos)).any(1).cpu()  # text after its EOS
    return (-torch.cat(cost)).masked_fill(after_end, -torch.inf).log_softmax(0)


def main(argv):
    command, cfg = common.parse(Config, ar.PRESETS, argv)
    if command != "eval":
        return ar.main(argv, Config, sample)
    run, data = common.Run(cfg), load_data(cfg)
    model, _ = common.load_model(ar.Model, cfg, run.device, data)
    x0, _ = ar.get_eval_rows(data.test, cfg, cfg.num_samples)
    g, right = torch.Generator().manual_seed(cfg.seed), []
    for row, tokens in zip(x0.to(run.device), tokens_of(x0, cfg)):
        i = int(torch.randint(max(1, len(tokens)), (), generator=g))
        with run.amp:
            said = (infill_left(model, row[None], i, cfg)[0], infill_exact(model, row, i, cfg))
        right.append([(logp.argmax() == row[i].cpu()).item() for logp in (said[0].cpu(), said[1])])
    left, exact = torch.tensor(right).double().mean(0).tolist()
    run.say(f"single-token infilling accuracy of {len(right)} test rows: from the left {left:.3f}, "
            f"by Bayes' rule over {cfg.vocab_size} fillings {exact:.3f}")


if __name__ == "__main__":
    common.run_main(main)
