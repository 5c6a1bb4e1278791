"""Make weights/NAME.safetensors: what `python NAME.py sample` and `eval` use before there is a run.

    python lab/weights.py out/mdlm out/ar          the averaged weights of these runs, in bfloat16
    python lab/weights.py                          weights/README.md anew

Each file holds Config, tokenizer and step, as the checkpoint of a run does, and what made it. The
bounds on the page are those of the file itself: all 500 test stories and, for a quick check, 32.
"""
import json
import math
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python lab/weights.py`
import common
from data.prepare import load_data, sha_of
from lab.compare_page import SIGN
from lab.methods import IDEAS, amp, script_of
from lab.results_page import steps_of

FOLDER = ROOT / "weights"
PAGE = """# Weights

One trained checkpoint of each script, its averaged weights in bfloat16. Where no run is in
`out/NAME`, `python NAME.py sample`, `python NAME.py eval` and the commands of
[lab/](../lab/README.md) use `weights/NAME.safetensors` and say so; `--out weights/NAME` asks for it
by name. The file holds Config, tokenizer and step as well. It is not enough to go on training; that
takes the `state.pt` of a run. `python lab/weights.py RUN` makes a file and this page.

The numbers are of 500 test stories with these weights (one seed): `=` is exact, `<=` an upper bound
(8 draws of noise), ± one standard error over stories. The entropy of these stories is {entropy:.3f}
nats per token, {per_story:.1f} per story. The last column is the bound of the first 32, nats per
token; a test computes it again.

| file | made by | steps | parameters, M | nats/token | perplexity | nats per story | first 32 |
|---|---|---|---|---|---|---|---|
{rows}

| file | hardware and versions | sha256 |
|---|---|---|
{hashes}
"""


def bound_of(name, weights, about, n):
    """The bound of the first n test stories by a state dict, as a row of the log."""
    script = script_of(name)
    cfg = script.Config(**json.loads(about["config"]))
    cfg.max_docs = 10 * n  # a tenth of them is the test split: the same stories, made faster
    data = load_data(cfg)
    model = script.Model(cfg)
    model.load_state_dict(weights)
    with torch.no_grad(), amp(model, cfg):
        return script.evaluate(model, data, cfg, "test", n)


def ship(out):
    """Write the weights of the run in the folder `out`."""
    made = [row for row in common.read_log(out) if row["kind"] == "config"]
    name = Path(made[0]["command"].split()[0]).stem if made else None
    if name not in IDEAS:
        raise common.UserError(f"no run of {', '.join(IDEAS)} in {out}")
    with common.usable(Path(out) / "model.safetensors") as path, safe_open(path, "pt") as file:
        about = file.metadata()
        weights = {key: file.get_tensor(key).bfloat16() for key in file.keys()}
    default = vars(script_of(name).Config())
    config = json.loads(about["config"]) | {key: default[key] for key in ("out", "resume", "log")}
    about["config"] = json.dumps(config)
    if config["data"] != "tales" or config["max_docs"]:
        raise common.UserError(f"{out} was trained on other data than all of tales")
    keys = ("command", "parameters", "torch", "machine", "dtype", "threads")
    bounds = {f"bound_{n}": bound_of(name, weights, about, n) for n in (500, 32)}
    about["made"] = json.dumps({key: made[0][key] for key in keys} | bounds)
    FOLDER.mkdir(exist_ok=True)
    common.replace(FOLDER / f"{name}.safetensors", lambda file: file.write(save(weights, about)))


def write_page():
    """weights/README.md, from what the files say of themselves."""
    rows, hashes, entropy, per_story = [], [], 0.0, 0.0
    for path in [FOLDER / f"{name}.safetensors" for name in IDEAS]:
        if not path.exists():
            continue
        with safe_open(path, "pt") as file:
            made, config = (json.loads(file.metadata()[key]) for key in ("made", "config"))
        bounds = [made["bound_500"], made["bound_32"]]
        sign, per_story = SIGN[bounds[0]["bound"]], bounds[0]["entropy_per_doc"]
        entropy = per_story / (bounds[0]["nats_per_doc"] / bounds[0]["nats_per_token"])
        said = [f"{sign} {bound['nats_per_token']:.3f}" for bound in bounds]
        said[1:1] = [f"{sign} {math.exp(bounds[0]['nats_per_token']):.2f}",
                     f"{sign} {bounds[0]['nats_per_doc']:.1f} ± {bounds[0]['se']:.1f}"]
        link = f"[{path.name}]({path.name})"
        rows.append(f"| {link} | `python {made['command']}` | {steps_of(config)} | "
                    f"{made['parameters'] / 1e6:.2f} | {' | '.join(said)} |")
        hashes.append(f"| {link} | {made['machine']}, {made['threads']} thread, "
                      f"{made['dtype']}, PyTorch {made['torch']} | `{sha_of(path)}` |")
    text = PAGE.format(entropy=entropy, per_story=per_story, rows="\n".join(rows),
                       hashes="\n".join(hashes))
    common.replace(FOLDER / "README.md", lambda file: file.write(text.encode()))


def main(argv):
    common.show_help(argv, __doc__)
    for out in argv:
        ship(out)
        print(out, flush=True)
    write_page()


if __name__ == "__main__":
    common.run_main(main)
