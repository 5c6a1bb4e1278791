"""A film of the six methods, side by side as they write: a story, a story behind a prompt, gaps.

    python lab/film.py                                  of the runs in out/: out/film.html
    python lab/film.py --out my/runs --page film.html   of my/runs/ar, my/runs/mdlm and so on
    python lab/film.py --out weights --page results/film.html      of the shipped weights
"""
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python lab/film.py`
import common
from lab.methods import IDEAS, amp, default_sampler, load, sample


SCENES = dict(  # name: (title, the given text)
    story=("A story", {}),
    prompt=("Behind a prompt", dict(prompt="Once upon a time, there was a shy rabbit named Fern.")),
    infill=("Filling gaps", dict(infill="Long ago, there was a ___ girl named ___. She liked "
                                        "___3, but ___8 One summer, ___ walked to the ___ and ___"))
)


def shoot(name, out, given):
    """A sample of a run around the given text, as a card of the film: frames [nfe, {position:
    text}] of changes; null is a position that is not decided, "" one behind the end."""
    script, model, cfg, data = load(name, out)
    cfg = dataclasses.replace(cfg if name == "ar" else default_sampler(script, cfg), **given)
    canvas = common.encode_canvas(data.tokenizer, cfg, 1)
    frames, now, seen = [], {}, [(0, canvas[0].tolist())]
    with amp(model, cfg):
        sample(script, model, cfg, 1, torch.Generator().manual_seed(cfg.seed), canvas, seen)
    for nfe, ids in seen:
        texts = {i: None if not 0 <= t < cfg.vocab_size else "" if t == cfg.eos else
                 data.tokenizer.decode([t]) for i, t in enumerate(ids)}
        frames.append([nfe, {i: t for i, t in texts.items() if now.get(i) != t}])
        now = texts
    return dict(name=f"{name}.py", idea=IDEAS[name], nfe=nfe, length=cfg.seq_len, frames=frames,
                settings=f"NFE {nfe}, temperature {cfg.temperature:g}")


def moments(cards, width=100, count=5):
    """The cards of a scene as text: all after the same share of their steps, a line each."""
    blocks = []
    for k in range(1, count + 1):
        lines = [f"after {100 * k // count} % of the steps"]
        for card in cards:
            now = [None] * card["length"]
            for nfe, changes in card["frames"]:
                if nfe <= card["nfe"] * k / count:
                    for i, text in changes.items():
                        now[i] = text
            line = " ".join("".join("░" if t is None else t for t in now).split())
            line = line if len(line) <= width - 20 else line[:width - 24] + " ..."
            lines.append(f"{card['name']:>19} {line}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def make_film(runs, note, path):
    """Print the film of the runs, name -> folder, and write one file that any browser plays. ar.py
    sees only what is left of a gap and has no card in the scene of the gaps."""
    scenes = []
    for title, given in SCENES.values():
        cards = []
        for name, out in runs.items():
            try:
                cards += [shoot(name, out, given)] if name != "ar" or "infill" not in given else []
            except common.UserError as error:  # short rows have no room for the given text
                print(f"'{title}' goes without {name}.py: {error}")
        scenes += [dict(title=title, cards=cards)] if cards else []
    film = dict(title="Six ways to write a story", note=note, scenes=scenes)
    page = Path(__file__).with_name("film_template.html").read_text("utf-8")
    data = json.dumps(film, ensure_ascii=False).replace("<", "\\u003c")
    common.replace(path, lambda file: file.write(page.replace("/*FILM*/null", data).encode()))
    print(f"{moments(scenes[0]['cards'])}\n\n{path}: open it in a browser")


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
    make_film(runs, f"The first sample of each run in {opt.out}/.", Path(opt.page))


if __name__ == "__main__":
    common.run_main(main)
