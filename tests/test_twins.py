"""Scripts repeat shared functions word for word: a difference between two of them is a lesson."""
import ast
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALL = ["PRESETS", "get_rows", "get_batch", "get_eval_rows", "filter_logits", "categorical",
       "get_lr"]
OURS = ["rotate", "MLP", "make_optimizers"]  # not of a GPT-2 block
DIFFUSION = ["Attention", "evaluate", "main"]
OWN_TIMES = ["position_times", "reassign_times"]
NOISY = ["dit_embed", "bit_diffusion", "sdd"]
TWINS = [(key, "ar", name) for key in ALL for name in ["mdlm", *NOISY, "diffugpt_varlen"]]
TWINS += [(key, "ar", name) for key in OURS for name in ["mdlm", *NOISY]]
TWINS += [(key, "mdlm", "diffugpt_varlen") for key in ("top_positions", "ORDERS")]
TWINS += [(key, "mdlm", name) for key in DIFFUSION for name in NOISY]
TWINS += [(key, "dit_embed", name) for key in OWN_TIMES for name in ("bit_diffusion", "sdd")]
TWINS += [("Block", "mdlm", name) for name in ("bit_diffusion", "sdd")]


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


@pytest.mark.parametrize("key, one, other", TWINS)
def test_two_scripts_share_this_text(key, one, other):
    same = pieces(one)[key].replace("(E2)", "(E4)") if other == "sdd" else pieces(one)[key]
    assert changed(same, pieces(other)[key]) == []


@pytest.mark.parametrize("one, other", [("ar", "mdlm"), ("mdlm", "dit_embed"),
                                        ("mdlm", "bit_diffusion"), ("mdlm", "sdd"),
                                        ("mdlm", "diffugpt_varlen")])
def test_settings_differ_in_the_run_folder_the_method_and_sampling_alone(one, other):
    def fields(name):
        return re.split("    # sampling|    # method", pieces(name)["Config"])[0]
    mine, other_text = fields(one), fields(other)
    for key in ("steps", "lr"):  # those of the adaptation are others
        rows = [re.search(f"^    {key}: .*$", text, re.M)[0] for text in (mine, other_text)]
        other_text = other_text.replace(*rows[::-1])
    lines = changed(mine, other_text)
    assert [line[2:] for line in lines] == [
        f'    out: str = "out/{name}"  # run folder' for name in (one, other)]


def test_one_name_has_one_meaning():
    """A field that two scripts have has one help text, but for defaults and a count of steps."""
    found = {}
    for name in ("ar", "mdlm", *NOISY, "diffugpt_varlen"):
        for key, text in re.findall(r"^    (\w+): .*?  # (.*)$", pieces(name)["Config"], re.M):
            found.setdefault(key, set()).add(text)
    differ = {key for key, texts in found.items() if len(texts) > 1}
    assert differ <= {"steps", "num_steps", "order", "noise_window", "remask", "temperature", "bos",
                      "eos"}


@pytest.mark.parametrize("one, other, lines", [
    ("ar", "mdlm", ["xt, weight = corrupt(x0, cfg, g)",
                    "loss = loss_fn(model, x0[i], xt[i], weight[i])"]),
    ("mdlm", "dit_embed", ["lam, eps, weight = corrupt(x0, cfg, g)",
                           "loss = loss_fn(model, x0[i], lam[i], eps[i], weight[i])"]),
    ("mdlm", "bit_diffusion", ["bits, lam, weight = corrupt(x0, cfg, g)",
                               "loss = loss_fn(model, x0[i], bits[i], lam[i], weight[i])"]),
    ("mdlm", "sdd", ["prec, eps, weight = corrupt(x0, cfg, g)",
                     "loss = loss_fn(model, x0[i], prec[i], eps[i], weight[i])"]),
    ("mdlm", "diffugpt_varlen", [
        "init_model=init_model, make_optimizers=make_optimizers):",
        "model = init_model(cfg, Model, data, run.device)",
        "x, xt, weight, attention_mask = corrupt(x0, cfg, g, step)",
        "loss = loss_fn(model, x[i], xt[i], weight[i], attention_mask)",
        "run.log_step(step, x.numel(), total, grad_norm=norm, lr=get_lr(step - 1, cfg))",
        'if cfg.pipeline == "diffusion":',
        "common.show_samples(run, sample, ema, data.tokenizer, cfg, step)"])])
def test_training_differs_in_the_noise_and_the_loss_alone(one, other, lines):
    new = [line[2:].strip() for line in changed(pieces(one)["train"], pieces(other)["train"])
           if line[0] == "+"]
    head = "def train(cfg, Model=Model, corrupt=corrupt, loss_fn=loss_fn, nelbo=nelbo, "
    extra = {f"{head}sample=sample):", f"{head}sample=sample,",
             "run.validate(step, lambda: evaluate(ema, data, cfg, nelbo=nelbo))",
             "# one batch and its noise, shared out to micro-batches and processes"}
    assert [line for line in new if line not in extra] == lines
