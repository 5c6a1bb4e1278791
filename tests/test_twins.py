"""Scripts repeat shared functions word for word: a difference between two of them is a lesson."""
import ast
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ["PRESETS", "get_rows", "get_batch", "get_eval_rows", "rotate", "MLP", "filter_logits",
          "categorical", "get_lr", "make_optimizers"]  # of ar.py and mdlm.py
OLD = ["dit_embed", "bit_diffusion", "sdd", "diffugpt_varlen"]  # until they follow ar.py
OLD_SHARED = ["PRESETS", "SHAPE", "open_data", "fill_in", "take", "get_batch", "get_eval_rows",
              "init_weights", "filter_logits", "categorical", "unigram_nll"]


def pieces(name):
    """{top-level name: its source, with decorators} of a script."""
    text = (ROOT / f"{name}.py").read_text("utf-8")
    found = {}
    for node in ast.parse(text).body:
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        source = "\n".join(text.splitlines()[start - 1:node.end_lineno])
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = source
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = source
    return found


def changed(a, b):
    """The lines of b that differ from a, and of a from b."""
    return [line for line in difflib.ndiff(a.splitlines(), b.splitlines()) if line[0] in "+-"]


@pytest.mark.parametrize("key", SHARED)
def test_ar_and_mdlm_share_this_text(key):
    assert changed(pieces("ar")[key], pieces("mdlm")[key]) == []


def test_their_settings_differ_in_the_run_folder_and_in_sampling_alone():
    def fields(name, until):
        return [line for line in pieces(name)["Config"].split(until)[0].splitlines()]
    lines = changed(*("\n".join(fields(name, "    # sampling")) for name in ("ar", "mdlm")))
    assert [line[2:] for line in lines] == [
        f'    out: str = "out/{name}"  # run folder' for name in ("ar", "mdlm")]
    ar, mdlm = ({m[1]: m[2] for m in re.finditer(r"    (\w+): (.*)", pieces(name)["Config"])}
                for name in ("ar", "mdlm"))
    assert mdlm.keys() - ar.keys() == {"infill", "num_steps", "order", "remask"}
    assert ar.keys() - mdlm.keys() == {"bos"}
    assert {k for k in ar.keys() & mdlm.keys() if ar[k] != mdlm[k]} == {"out", "temperature"}


def test_their_training_differs_in_the_noise_and_the_loss_alone():
    lines = changed(pieces("ar")["train"], pieces("mdlm")["train"])
    assert [line[2:].strip() for line in lines if line[0] == "+"] == [
        "def train(cfg, Model=Model, corrupt=corrupt, sample=sample):",
        "# one batch and its noise, shared out to micro-batches and processes",
        "xt, weight = corrupt(x0, cfg, g)",
        "loss = loss_fn(model, x0[i], xt[i], weight[i])"]


@pytest.mark.parametrize("name", OLD[1:])
def test_the_other_scripts_share_their_plumbing(name):
    first, other = pieces(OLD[0]), pieces(name)
    assert [key for key in OLD_SHARED if first[key] != other[key]] == []


@pytest.mark.parametrize("key", ["clocks", "deal", "holes"])
def test_what_the_noisy_input_scripts_share_has_the_same_text(key):
    assert pieces("dit_embed")[key] == pieces("bit_diffusion")[key]
