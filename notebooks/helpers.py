"""What the notebooks share: pictures, colours, the line of the entropy, stored results, films.

A notebook begins by looking for the repository and then imports this file; `setup()` is its first
call. Nothing here belongs to a method.
"""
import html
import io
import json
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a CPU is enough, and the outputs are alike everywhere
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch
from IPython import get_ipython
from IPython.display import HTML

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common
from lab import methods, results_page

of_kind = results_page.of_kind  # rows of a log of one kind: config, train, val, samples
COLORS = methods.COLORS  # of the six methods, in every figure
ENTROPY = methods.ENTROPY["color"]  # of the entropy and of real text


def setup(seed=0):
    """Seed, threads, no gradients until a training wants them, the style of the figures. A figure
    is stored in few colours, a quarter of the bytes."""
    torch.manual_seed(seed)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    torch.set_grad_enabled(False)
    plt.rcParams.update({"figure.dpi": 80, "font.size": 9, "figure.constrained_layout.use": True,
                         "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True,
                         "legend.frameon": False})
    if shell := get_ipython():
        plt.close(plt.figure())  # starts the inline backend, which sets a formatter of its own
        shell.display_formatter.formatters["image/png"].for_type(plt.Figure, small_png)


def small_png(figure, colors=128):
    """A figure as PNG of at most so many colours."""
    figure.canvas.draw()
    image = PIL.Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    image.quantize(colors, dither=0).save(png := io.BytesIO(), "PNG")
    return png.getvalue()


def entropy_line(axes, value, label="entropy", **kw):
    """A dashed horizontal line at the entropy, or at the value of real text."""
    return axes.axhline(value, label=label, **methods.ENTROPY, **kw)


def rng(seed):
    """A random number generator of its own."""
    return torch.Generator().manual_seed(seed)


def forward_grid(texts, colors, times, wrong=None, forward="forward: noise", size=7.5):
    """The forward process as a grid: positions across, times down, the reverse arrow beside it.
    texts, colors, wrong (its texts are red): rows of cells; \\n begins another line of a cell."""
    rows, columns = len(texts), len(texts[0])
    _, axes = plt.subplots(figsize=(10.5, 0.8 + 0.45 * rows))
    for k, i in np.ndindex(rows, columns):
        axes.add_patch(plt.Rectangle((i, k), 1, 1, ec="0.7", lw=0.6, fc=colors[k][i]))
        axes.text(i + 0.5, k + 0.5, texts[k][i], ha="center", va="center", fontsize=size,
                  color="tab:red" if wrong is not None and wrong[k][i] else "black",
                  parse_math=False)
    for x, (begin, end), label in ((-0.02 * columns, (0, rows), forward),
                                   (1.02 * columns, (rows, 0), "reverse: sampling")):
        axes.annotate("", (x, end), (x, begin), arrowprops=dict(arrowstyle="-|>", lw=1.5))
        axes.text(x + 0.03 * columns * (1 if x > 0 else -1), rows / 2, label, rotation=90,
                  ha="center", va="center")
    axes.set(xlim=(-0.07 * columns, 1.07 * columns), ylim=(rows, 0), xlabel="position",
             ylabel="time t", xticks=np.arange(columns) + 0.5, xticklabels=range(1, columns + 1),
             yticks=np.arange(rows) + 0.5, yticklabels=[f"{t:.2f}" for t in times])
    axes.grid(False)


# ---- stored results ------------------------------------------------------------------------------
def stored(name):
    """A file of results/: the rows of a .jsonl as a list, or what is in a .json."""
    text = (ROOT / "results" / name).read_text("utf-8")
    return [*map(json.loads, text.splitlines())] if name.endswith(".jsonl") else json.loads(text)


def group_by(rows, *keys):
    """Rows by the values of these keys: {values: [rows]}."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def shipped(name):
    """(script, model, Config, tokenizer) of weights/NAME.safetensors."""
    script = methods.script_of(name)
    cfg = common.load_config(script.Config, ROOT / "weights" / name)
    model, tokenizer = common.load_model(script.Model, cfg, torch.device("cpu"))
    return script, model.requires_grad_(False), cfg, tokenizer


def plot_training(*names):
    """Bound and samples against training steps, as `lab/by_steps.py` found them: three panels."""
    runs = {row["name"]: row for row in stored("by_steps.jsonl")}
    base = {row["name"]: row for row in of_kind(stored("compare.jsonl"), "baseline")}["real"]
    _, panels = plt.subplots(1, 3, figsize=(10, 3))
    for axes, key, title, real in zip(
            panels, ("nats_per_doc", "valid_sentences", "entropy"),
            ("bound, nats per story", "valid-sentence rate", "entropy of tokens, nats"),
            (base["test"]["entropy_per_doc"], 1.0, base["ancestral"]["entropy"])):
        for name in names:
            points = [(p["step"] + runs[name]["parent_steps"], p[key])
                      for p in runs[name]["points"] if p["step"]]
            axes.plot(*zip(*points), marker="o", ms=3, color=COLORS[name], label=f"{name}.py")
        entropy_line(axes, real, "entropy; real stories")
        axes.set(xlabel="training steps", title=title)
    panels[0].set(yscale="log")
    low, high = panels[0].get_ylim()
    panels[0].set_yticks(y := [y for y in (100, 150, 200, 300, 400) if low < y < high], y)
    panels[0].minorticks_off()
    panels[1].set(ylim=(-0.02, 1.05))
    panels[0].figure.legend(*panels[0].get_legend_handles_labels(), ncol=7, fontsize=8,
                            loc="outside lower center")


# ---- text and films ------------------------------------------------------------------------------
def show(label, ids, tokenizer, lines=3, width=92):
    """Print ids as text, a block for each masked token, cut after so many lines."""
    text = tokenizer.decode_masked([int(i) for i in ids])
    text = text if len(text) <= (width - 6) * lines else text[:(width - 6) * lines] + " ..."
    rows, size = [""], width - 9  # longer words, such as blocks alone, are broken
    for word in (w[i:i + size] for w in text.split(" ") for i in range(0, max(1, len(w)), size)):
        if rows[-1] and len(rows[-1]) + len(word) >= width:
            rows.append("")
        rows[-1] += f" {word}" if rows[-1] else word
    print(f"{label:>6}  " + "\n        ".join(rows))


def trajectory(script, model, cfg, seed=0, canvas=None):
    """One sample as it takes shape: frames (NFE, ids); in the first nothing is generated."""
    start = [cfg.vocab_size] * cfg.seq_len if canvas is None else canvas[0].tolist()
    frames = [(0, start)]
    with methods.amp(model, cfg):
        methods.sample(script, model, cfg, 1, rng(seed), canvas, frames)
    return frames[:-1] if frames[-1] == frames[-2] else frames


FILM = """<div style="font-family: sans-serif; max-width: 60em">
<b>{title}</b><br><input type="range" min="0" max="{last}" value="{last}" style="width: 22em"
oninput="const f = {frames}[this.value]; const d = this.parentNode; d.querySelector('i').textContent
= f[0]; d.querySelector('pre').innerHTML = f[1]"> NFE <i>{nfe}</i>
<pre style="white-space: pre-wrap; word-break: normal; line-height: 1.5; min-height: 9em"
>{text}</pre></div>"""


def film(frames, cfg, tokenizer, title, every=1):
    """A film that needs no other file: a slider over every n-th of the frames (NFE, ids), the last
    one included. Tokens that changed since the frame before are marked; text behind the first EOS
    is left out."""
    shots, before = [], None
    for nfe, ids in frames[::-every][::-1]:
        parts = []
        for i, token in enumerate(ids):
            if token == cfg.eos and cfg.rows == "docs":
                break
            text = html.escape(tokenizer.decode([token])) if token < cfg.vocab_size else "░░"
            new = before is not None and [token] != before[i:i + 1]  # rows may grow
            parts.append(f"<mark>{text}</mark>" if new and text.strip() else text)
        shots.append([nfe, "".join(parts)])
        before = ids
    code = html.escape(json.dumps(shots, ensure_ascii=False), quote=True)
    return HTML(FILM.format(title=html.escape(title), last=len(shots) - 1, frames=code,
                            nfe=shots[-1][0], text=shots[-1][1]))
