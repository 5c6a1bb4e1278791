"""notebooks/helpers.py: what the notebooks share."""
import html
import importlib.util
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import PIL.Image
import pytest
import torch

PATH = Path(__file__).resolve().parents[1] / "notebooks/helpers.py"
SPEC = importlib.util.spec_from_file_location("helpers", PATH)
helpers = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(helpers)


def words(ids):
    return " ".join("?" if i > 3 else ("<b>", "a", "it's", "\"")[i] for i in ids)


TOKENIZER = SimpleNamespace(decode=words, decode_masked=words)


def test_a_film_shows_every_frame_and_is_safe_in_a_page():
    """Text is escaped, changed tokens are marked, a document ends before its EOS, and the slider's
    data are those of the frames."""
    cfg = SimpleNamespace(vocab_size=4, eos=3, rows="docs")
    frames = [(0, [4, 4, 4]), (2, [1, 4, 4]), (3, [1, 0, 3])]
    page = helpers.film(frames, cfg, TOKENIZER, "<t>").data
    frames = json.loads(html.unescape(re.search(r"const f = (\[\[.*?\]\])\[this", page)[1]))
    assert frames == [[0, "░░░░░░"], [2, "<mark>a</mark>░░░░"],
                      [3, "a<mark>&lt;b&gt;</mark>"]]
    assert "&lt;t&gt;" in page and "<b>t" not in page and page.count("<script") == 0


def test_every_second_frame_and_the_last_are_filmed():
    cfg = SimpleNamespace(vocab_size=4, eos=3, rows="docs")
    page = helpers.film([(k, [1] * k + [4]) for k in range(6)], cfg, TOKENIZER, "t", every=2).data
    frames = json.loads(html.unescape(re.search(r"const f = (\[\[.*?\]\])\[this", page)[1]))
    assert [nfe for nfe, _ in frames] == [1, 3, 5] and 'max="2"' in page


def test_the_forward_process_is_a_grid_of_texts():
    helpers.forward_grid([["a", "b"], ["$x", "M"]], [["white", "0.5"]] * 2, [0.0, 1.0],
                         [[False, False], [True, False]])
    axes = plt.gca()
    cells = {text.get_text(): text.get_color() for text in axes.texts}
    assert cells["$x"] == "tab:red" and cells["M"] == "black" and "reverse: sampling" in cells
    assert len(axes.patches) == 4 and axes.get_ylim() == (2, 0)
    plt.close()


def test_figures_are_small_and_the_entropy_has_one_colour():
    figure, axes = plt.subplots()
    line = helpers.entropy_line(axes, 1.5)
    assert line.get_color() == helpers.ENTROPY and line.get_linestyle() == "--"
    image = PIL.Image.open(io.BytesIO(helpers.small_png(figure, 8)))
    assert len(image.getcolors()) <= 8
    plt.close(figure)


def test_long_text_is_wrapped_and_cut(capsys):
    helpers.show("x", [1] * 300, TOKENIZER, lines=2, width=30)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("     x  a a") and lines[-1].endswith(" ...")
    assert max(map(len, lines)) <= 38 and len(lines) <= 3


def test_stored_rows_are_grouped():
    rows = helpers.stored("ar.jsonl")
    groups = helpers.group_by(helpers.of_kind(rows, "val"), "kind", "step")
    assert sum(map(len, groups.values())) == len(helpers.of_kind(rows, "val"))
    assert all(key[0] == "val" and len(group) == 1 for key, group in groups.items())
    assert isinstance(helpers.stored("leak.json"), dict)


def test_training_is_plotted_from_the_stored_rows():
    plt.close("all")
    helpers.plot_training("mdlm", "diffugpt_varlen")
    rows = {row["name"]: row for row in helpers.stored("by_steps.jsonl")}
    bound, valid, entropy = plt.gcf().axes
    one, parent, line = (some.get_xydata() for some in bound.lines)
    assert one.tolist() == [[p["step"], p["nats_per_doc"]] for p in rows["mdlm"]["points"][1:]]
    assert parent[0, 0] == 200 + 500 and 85 < line[0, 1] < one[:, 1].min()
    assert valid.lines[0].get_ydata()[-1] == rows["mdlm"]["points"][-1]["valid_sentences"]
    assert entropy.lines[2].get_color() == helpers.ENTROPY


@pytest.mark.parametrize("name", ["ar", "mdlm"])
def test_a_trajectory_of_shipped_weights_ends_with_text(name):
    script, model, cfg, tokenizer = helpers.shipped(name)
    cfg.num_steps, canvas = 3, torch.tensor([tokenizer.encode("Once") + [cfg.vocab_size] * 9])
    frames = helpers.trajectory(script, model, cfg, canvas=canvas)
    assert frames[0] == (0, canvas[0].tolist())
    assert all(token < cfg.vocab_size for token in frames[-1][1])
    assert frames[-1] != frames[-2] and tokenizer.decode(frames[-1][1]).startswith("Once")
    assert not any(p.requires_grad for p in model.parameters())
