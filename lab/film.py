"""A film of the six methods: a story of each, side by side, as they write it.

    python lab/film.py                                  of the runs in out/: out/film.html
    python lab/film.py --out my/runs --page film.html   of my/runs/ar, my/runs/mdlm and so on
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python lab/film.py`
import common
from lab.methods import IDEAS, amp, default_sampler, load, sample


def shoot(runs, note):
    """One story of each of the runs, name -> folder, as the film's data: frames [nfe, {position:
    text}] of changes; null is a position that is not decided, "" one behind the end."""
    methods = []
    for name, out in runs.items():
        script, model, cfg, data = load(name, out)
        if name != "ar":
            cfg = default_sampler(script, cfg)
        frames, now, seen = [], {}, [(0, [-1] * cfg.seq_len)]
        with amp(model, cfg):
            sample(script, model, cfg, 1, torch.Generator().manual_seed(cfg.seed), frames=seen)
        for nfe, ids in seen:
            texts = {i: None if not 0 <= t < cfg.vocab_size else "" if t == cfg.eos else
                     data.tokenizer.decode([t]) for i, t in enumerate(ids)}
            frames.append([nfe, {i: t for i, t in texts.items() if now.get(i) != t}])
            now = texts
        methods.append(dict(
            name=f"{name}.py", idea=IDEAS[name], nfe=nfe, length=cfg.seq_len, frames=frames,
            settings=f"NFE {nfe}, temperature {cfg.temperature:g}"))
    return dict(title="Six ways to write a story", note=note, methods=methods)


def moments(film, width=100, count=5):
    """The film as text: all methods after the same share of their steps, a line each."""
    blocks = []
    for k in range(1, count + 1):
        lines = [f"after {100 * k // count} % of the steps"]
        for method in film["methods"]:
            now = [None] * method["length"]
            for nfe, changes in method["frames"]:
                if nfe <= method["nfe"] * k / count:
                    for i, text in changes.items():
                        now[i] = text
            line = " ".join("".join("░" if t is None else t for t in now).split())
            line = line if len(line) <= width - 20 else line[:width - 24] + " ..."
            lines.append(f"{method['name']:>19} {line}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def make_film(runs, note, path):
    """Print the film of the runs, name -> folder, and write one file that any browser plays."""
    film = shoot(runs, note)
    page = Path(__file__).with_name("film_template.html").read_text("utf-8")
    data = json.dumps(film, ensure_ascii=False).replace("<", "\\u003c")
    common.replace(path, lambda file: file.write(page.replace("/*FILM*/null", data).encode()))
    print(f"{moments(film)}\n\n{path}: open it in a browser")


@dataclass
class Options:
    out: str = "out"  # folder that holds runs named after their scripts
    page: str = "out/film.html"  # the film


def main(argv):
    opt = tyro.cli(Options, args=argv, description=__doc__)
    runs = {name: Path(opt.out) / name for name in IDEAS}
    runs = {name: out for name, out in runs.items() if common.checkpoint_of(out).exists()}
    if not runs:
        raise common.UserError(f"no run of {', '.join(IDEAS)} in {opt.out}: train one, or choose "
                               "another --out")
    make_film(runs, f"The first sample of each run in {opt.out}.", Path(opt.page))


if __name__ == "__main__":
    common.run_main(main)
