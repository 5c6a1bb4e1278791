"""lab/ngram.py: counts, weights, likelihoods and samples of n-gram models."""
import collections
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness import small_text
from lab import ngram
from lab.ngram import NGram


def toy(order, V=5, N=60, T=12, seed=0, kind="docs"):
    """A model of random rows, documents that end with their first 0 or windows, and the rows."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, V, (2 * N, T)) * (rng.random((2 * N, T)) < 0.9)
    if kind == "docs":
        rows = np.where((rows == 0).cumsum(1) > 0, 0, rows)
    cfg = SimpleNamespace(vocab_size=V, eos=0, rows=kind)
    return NGram(order, rows[:N], rows[N:], cfg), rows[:N], rows[N:]


def by_hand(model, rows, order, row, V, kind):
    """-log p of one row by dictionaries of tuples."""
    def grams(r):
        ends = kind == "docs" and 0 in r
        text = [V] * (order - 1) + list(r[:list(r).index(0) + 1 if ends else len(r)])
        return [[tuple(text[i - j + 1:i + 1]) for j in range(1, order + 1)]
                for i in range(order - 1, len(text))]
    counts, nats = collections.Counter(g for r in rows for some in grams(r) for g in some), 0
    for some in grams(row):
        p = [1 / V]
        for gram in some:
            total = sum(counts[(*gram[:-1], v)] for v in range(V))
            p.append(counts[gram] / total if total else p[-1])
        nats -= math.log(sum(w * q for w, q in zip(model.weights, p)))
    return nats


@pytest.mark.parametrize("kind", ("docs", "stream"))
@pytest.mark.parametrize("order", (1, 2, 3))
def test_ngrams_are_those_counted_by_hand_and_normalized(order, kind):
    """After every context, seen or not, BOS included: nothing is lost to smoothing."""
    model, rows, others = toy(order, kind=kind)
    expected = [by_hand(model, rows, order, row, 5, kind) for row in others[:20]]
    assert model.nll(others[:20]) == pytest.approx(np.array(expected), rel=1e-9)
    for context in itertools.product(range(6), repeat=order - 1):
        context = np.array(context, int).reshape(1, -1).repeat(5, 0)
        p = model.parts(context, np.arange(5)) @ model.weights
        assert p.sum() == pytest.approx(1) and (p > 0).all()


def test_the_weights_of_an_ngram_are_those_of_most_likelihood():
    model, _, others = toy(3)
    best, rng = model.nll(others).sum(), np.random.default_rng(0)
    for _ in range(30):
        model.weights = rng.dirichlet(np.ones(4))
        assert model.nll(others).sum() > best - 0.05


def test_an_order_whose_ngrams_are_no_64_bit_numbers_is_refused():
    cfg = SimpleNamespace(vocab_size=2048, eos=0, rows="stream")
    with pytest.raises(ngram.common.UserError, match="order 6 is too high for 2048 tokens"):
        NGram(6, np.ones((2, 8), int), np.ones((2, 8), int), cfg)


def test_the_rows_of_a_script_are_evaluated_and_written(tmp_path, monkeypatch, capsys):
    """With --split val: those that a script validates on; the others fit the weights."""
    monkeypatch.setenv("TEXT_DIFFUSION_CACHE", str(tmp_path / "cache"))
    small_text(tmp_path / "text.txt", n=4000)
    out, found = tmp_path / "counts.json", {}
    for split in ("val", "test"):
        ngram.main(["--data", str(tmp_path / "text.txt"), "--tokenizer", "byte", "--orders", "2",
                    "--split", split, "--rows", "4", "--out", str(out)])
        made = json.loads(out.read_text())
        found[split] = made["orders"]["2"]["nats_per_token"]
        assert f"= {found[split]:.3f} nats/token" in capsys.readouterr().out
        assert made["orders"]["2"]["rows"] == 4 and made["config"]["split"] == split
    cfg = ngram.ar.Config(data=str(tmp_path / "text.txt"), tokenizer="byte")
    data = ngram.load_data(cfg)
    ids, offsets, _ = data.train
    rows = ngram.ar.get_rows(data.train, cfg, np.arange(0, len(ids) - cfg.seq_len + 1, cfg.seq_len))
    x0, others = (ngram.ar.get_eval_rows(split, cfg, n)[0]
                  for split, n in ((data.val, 4), (data.test, 512)))
    nats = NGram(2, rows, others, cfg).nll(x0).sum() / x0.numel()
    assert found["val"] == pytest.approx(nats) and found["val"] != found["test"]


def test_lines_and_rows_of_another_length_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TEXT_DIFFUSION_CACHE", str(tmp_path / "cache"))
    (tmp_path / "names.txt").write_text("".join(f"{a}{b}n{c}\n" for a in "abcdefgh"
                                                for b in "aeiou" for c in "aeiou") * 9)
    ngram.main(["--data", str(tmp_path / "names.txt"), "--lines", "--tokenizer", "char", "--orders",
                "2", "--seq-len", "24", "--rows", "5", "--out", str(tmp_path / "made.json")])
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["config"]["lines"] and 0 < made["orders"]["2"]["nats_per_token"] < 2


def test_samples_of_an_ngram_obey_it():
    model, *_ = toy(2)
    x = model.sample(6000, 2, torch.Generator().manual_seed(0))
    p = model.parts(np.full((5, 1), 5), np.arange(5)) @ model.weights
    counts = np.bincount(x[:, 0], minlength=5)
    assert abs(counts / 6000 - p).max() < 5 * (p * (1 - p) / 6000).max() ** 0.5
    after = x[x[:, 0] == 3][:, 1]
    p = model.parts(np.full((5, 1), 3), np.arange(5)) @ model.weights
    error = abs(np.bincount(after, minlength=5) / len(after) - p).max()
    assert error < 5 * (0.25 / len(after)) ** 0.5
