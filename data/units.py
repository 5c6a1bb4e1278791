"""From the nats of rows to the units that are reported: per token, per document, bits per byte."""
import itertools
import math
from collections import Counter

import torch


def tokens_of(x, cfg):
    """Rows (B, T) -> lists of ids; a document ends before its first EOS."""
    rows = x.tolist()
    return [r[:r.index(cfg.eos)] if cfg.rows == "docs" and cfg.eos in r else r for r in rows]


def sizes_of(x, cfg):
    """How many tokens each row of x (B, T) is scored for, its first EOS among them: a list."""
    return [min(len(ids) + (cfg.rows == "docs"), x.shape[1]) for ids in tokens_of(x, cfg)]


def entropy_of(rows):
    """Entropy in nats of the tokens of all rows (lists of ids) together: how varied they are."""
    counts = Counter(itertools.chain(*rows))
    total = max(1, counts.total())
    return -sum(n / total * math.log(n / total) for n in counts.values())


def se(values):
    """Standard error of the mean of a tensor (n,)."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else 0.0


def likelihood(nats, x0, true_nll, tokenizer, cfg, bound):
    """nats (B,) of the rows x0 (B, T) -> a row of the log: nats per token and per document, bits
    per byte, and the gap to `true_nll` (B,) where that is known, paired row by row. `bound` says
    what the nats are: "exact", or "upper" for an upper bound. se: standard errors; nats per token
    are a ratio of two sums, so theirs is that of nats - ratio x tokens."""
    sizes, nats = torch.tensor(sizes_of(x0, cfg)), nats.cpu().double()
    count = sizes.sum().item()
    size = sum(len(tokenizer.decode_bytes(ids)) for ids in tokens_of(x0, cfg))
    ratio = nats.sum().item() / count
    row = dict(bound=bound, rows=len(x0), nats_per_token=ratio,
               nats_per_token_se=se(nats - ratio * sizes) * len(x0) / count,
               bits_per_byte=nats.sum().item() / math.log(2) / max(1, size))
    if cfg.rows == "docs":
        row |= dict(nats_per_doc=nats.mean().item(), se=se(nats))
    if true_nll is not None:
        row |= dict(entropy_per_doc=true_nll.mean().item(), gap=(nats - true_nll).mean().item(),
                    gap_se=se(nats - true_nll))
    return row


def report(row):
    """A likelihood as one line; = is exact, <= an upper bound."""
    sign = "=" if row["bound"] == "exact" else "<="
    perplexity = math.exp(min(row["nats_per_token"], 99))
    text = (f"{sign} {row['nats_per_token']:.3f} nats/token (perplexity {perplexity:.2f}, "
            f"{row['bits_per_byte']:.3f} bits/byte)")
    if "nats_per_doc" in row:
        text += f", {sign} {row['nats_per_doc']:.1f} +- {row['se']:.1f} nats/document"
    if "gap" in row:
        text += (f" = entropy {row['entropy_per_doc']:.1f} + gap {row['gap']:.1f} +- "
                 f"{row['gap_se']:.1f}")
    return text
