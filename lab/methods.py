"""The six methods: how to load, sample and measure any of them by the same calls.

    python lab/methods.py                            likelihood and a sample of every run in out/
    python lab/methods.py --out my/runs --rows 500   of my/runs/ar, my/runs/mdlm and so on
"""
import ast
import dataclasses
import functools
import hashlib
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python lab/methods.py`
import common
import fast
from data.units import report, tokens_of

IDEAS = {  # in the order of the tables
    "ar": "predict each token from the ones before it",
    "mdlm": "mask tokens at random, predict the masked ones",
    "dit_embed": "add Gaussian noise to embeddings, predict the tokens",
    "bit_diffusion": "flip bits of token codes, predict the tokens",
    "sdd": "show k weighted candidates a position, predict tokens",
    "diffugpt_varlen": "adapt a causal GPT to diffusion, predict length",
}


COLORS = dict(zip(IDEAS, ("tab:gray", "tab:blue", "tab:orange", "tab:red", "tab:purple",
                          "tab:brown")))
ENTROPY = dict(ls="--", color="tab:green")  # of the line that shows entropy or real text


# ---- command line --------------------------------------------------------------------------------
MAY_BE_0 = ("seed", "prompt_tokens", "num_items")


def parse_options(Options, argv, doc):
    """The command line of a file of lab/. One UserError about all numbers that cannot work: an int
    must be at least 1 (0 if it is in MAY_BE_0 or 0 by default), a float at least 0."""
    opt, bad = tyro.cli(Options, args=argv, description=doc), []
    for field in dataclasses.fields(opt):
        value, flag = getattr(opt, field.name), f"--{field.name.replace('_', '-')}"
        values = [v for v in (value if isinstance(value, tuple) else (value,))
                  if isinstance(v, (int, float)) and not isinstance(v, bool)]
        least = int(all(isinstance(v, int) for v in values) and field.default != 0 and
                    field.name not in MAY_BE_0)
        bad += [f"{flag} is {v}, it must be at least {least}" for v in values if not v >= least]
        if field.name == "top_p":
            bad += [f"{flag} is {v}, more than 1" for v in values if v > 1]
    if bad:
        raise common.UserError("; ".join(bad))
    return opt


# ---- one way to call all six ---------------------------------------------------------------------

def script_of(name):
    """The module of a method."""
    return importlib.import_module(name)


def plain(node):
    """A syntax tree as nested lists without what is empty: versions of Python add such fields."""
    if isinstance(node, ast.AST):
        fields = [[key, plain(value)] for key, value in ast.iter_fields(node)
                  if value is not None and value != []]
        return [type(node).__name__, *fields]
    return [plain(part) for part in node] if isinstance(node, list) else node


@functools.cache
def code_of(name):
    """A fingerprint of a script that its comments, its docstrings, its last section, the command
    line, and the version of Python do not change."""
    tree = ast.parse((ROOT / f"{name}.py").read_text("utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(
                body[0].value, ast.Constant):
            body[0].value.value = ""
    tree.body = [node for node in tree.body if getattr(node, "name", "") != "main"]
    return hashlib.sha256(repr(plain(tree)).encode()).hexdigest()[:16]


def kept(cfg, *names):
    """The row that keep() wrote for the run of cfg, or None if there is none or the scripts `names`
    or cfg were others, the key of such a row, and whether to go on with an interrupted run."""
    path = Path(f"{cfg.out}.json")
    key = dict(code={name: code_of(name) for name in names}, config=dataclasses.asdict(cfg))
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if found.get("key") != json.loads(json.dumps(key)):
        found = dict(row=keep(cfg, key, None))
    return found["row"], key, "key" in found and (Path(cfg.out) / "state.pt").exists()


def keep(cfg, key, row):
    """Write the row of a run beside its folder; returns the row."""
    path = Path(f"{cfg.out}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(key=key, row=row)))
    return row


def load(name, out):
    """(script, model, Config, data) of the run in the folder `out`."""
    script = script_of(name)
    cfg = common.load_config(script.Config, out, reads_data=True)
    data = script.load_data(cfg)
    model = common.load_model(script.Model, cfg, fast.pick_device(cfg.device), data)[0]
    return script, model.requires_grad_(False), cfg, data


def results_folder(run):
    """Where to write what is measured of a run: its folder, or, for the shipped weights/NAME, the
    folder out/NAME_weights, which is made."""
    if run.out.exists():
        return run.out
    folder = Path("out") / f"{run.out.name}_weights"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def device_of(model):
    return next(model.parameters()).device


def amp(model, cfg):
    """The autocast context of a run."""
    device = device_of(model)
    return torch.autocast(device.type, torch.bfloat16,
                          fast.pick_dtype(cfg.dtype, device) == "bfloat16")


def loss(script, model, cfg, x0, g):
    """The training loss of the rows x0 (B, T)."""
    if script.__name__ == "ar":
        return script.loss_fn(model, x0, 1 / script.is_scored(x0, cfg).sum(), cfg)
    noise = script.corrupt(x0, cfg, g)  # of diffugpt_varlen.py with the canvas
    return script.loss_fn(model, *(noise if script.__name__ == "diffugpt_varlen" else (x0, *noise)))


def sample(script, model, cfg, n, g, canvas=None, frames=None):
    """n samples, or canvas (n, T) denoised: ids (n, T) and the NFE. `frames`, a list, gets (nfe,
    ids) of the first row after each step."""
    if canvas is None:
        canvas = torch.full((n, cfg.seq_len), cfg.vocab_size)
    watch = {} if frames is None else dict(
        on_step=lambda nfe, x: frames.append((nfe, x[0].tolist())))
    x, nfe = script.sample(model, canvas.to(device_of(model)), cfg, g, **watch)
    if frames is not None:
        frames.append((nfe, x[0].tolist()))
    return x, nfe


def ancestral(script, cfg):
    """cfg with the sampler that the likelihood is about: temperature 1, one token a step."""
    own = dict(order="random", num_steps=0, temperature=1.0, remask="none", sampler="token",
               length_first=False, length_mode="fixed")
    return dataclasses.replace(cfg, **{k: v for k, v in own.items() if hasattr(cfg, k)}) \
        if script.__name__ != "ar" else cfg


def default_sampler(script, cfg):
    """cfg as `sample` draws; ar.py gets the temperature of most others."""
    return dataclasses.replace(cfg, temperature=0.5) if script.__name__ == "ar" else cfg


def with_steps(script, cfg, steps):
    """cfg with so many steps."""
    return dataclasses.replace(cfg, num_steps=steps)


@dataclass
class Options:
    out: str = "out"  # folder that holds runs named after their scripts
    rows: int = 128  # test rows of the likelihood


@torch.no_grad()
def main(argv):
    opt = parse_options(Options, argv, __doc__)
    names = [name for name in IDEAS if common.checkpoint_of(Path(opt.out) / name).exists()]
    if not names:
        raise common.UserError(f"no run of {', '.join(IDEAS)} in {opt.out}: train one, or choose "
                               "another --out")
    for name in names:
        script, model, cfg, data = load(name, Path(opt.out) / name)
        cfg = default_sampler(script, cfg)
        with amp(model, cfg):
            row = script.evaluate(model, data, cfg, "test", opt.rows)
            x, nfe = sample(script, model, cfg, 1, torch.Generator().manual_seed(cfg.seed))
        text = data.tokenizer.decode(tokens_of(x, cfg)[0])
        print(f"{name}.py: {report(row)}\nNFE {nfe}, temperature {cfg.temperature:g}: "
              f"{' '.join(text.split())}\n")


if __name__ == "__main__":
    common.run_main(main)
