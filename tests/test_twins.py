"""Every script repeats the shared text of ar.py word for word, but for differences listed here."""
import ast
import difflib
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BANNERS = ["config", "data", "model", "corrupt and loss", "sample", "train", "main"]

# top-level names whose text differs from ar.py's, and why
ALLOWED = {"mdlm": {
    "docstring": "another method",
    "NAME, BOUND": "its name; its likelihood is an upper bound",
    "Config": "the method block; an unknown schedule is refused at once",
    "Block": "adaLN, one of the ways to tell the network the mask rate",
    "Model": "one more embedding for the mask, the mask rate as an input, attention both ways",
    "loss_fn": "the method",
    "nelbo": "a bound that has to be estimated",
    "sample": "the method",
    "grade": "samples as the `sample` command draws them",
    "main": "log-linear is explained, eval measures more, sample fills holes",
}, "dit_embed": {
    "docstring": "another method",
    "NAME, BOUND": "its name; its likelihood is an upper bound",
    "Config": "the method block; combinations that cannot work are refused at once",
    "Block": "adaLN tells the network the noise level; normalisation before or after",
    "Model": "noisy vectors as input, evidence, noise levels, attention both ways",
    "loss_fn": "the method",
    "nelbo": "a bound that has to be estimated",
    "sample": "the method",
    "grade": "samples as the `sample` command draws them",
    "main": "eval measures more, sample fills holes",
}, "bit_diffusion": {
    "docstring": "another method",
    "NAME, BOUND": "its name; its likelihood is an upper bound",
    "Config": "the method block; combinations that cannot work are refused at once",
    "Model": "noisy codes as input, two heads, evidence, attention both ways",
    "loss_fn": "the method",
    "nelbo": "a bound that has to be estimated",
    "sample": "the method",
    "grade": "samples as the `sample` command draws them",
    "train": "the codes are dealt out to the tokens before the network is made",
    "main": "eval measures more, sample fills holes",
}, "sdd": {
    "docstring": "another method",
    "NAME, BOUND": "its name; its likelihood is an upper bound",
    "Config": "the method block; combinations that cannot work are refused at once",
    "attend": "candidates weigh as much as they are likely",
    "Attention": "candidates weigh as much as they are likely",
    "Block": "candidates weigh as much as they are likely",
    "Model": "candidates as input, one vector a position or all of them, attention both ways",
    "loss_fn": "the method",
    "nelbo": "a bound that has to be estimated",
    "sample": "the method",
    "evaluate": "the original process has no likelihood, only a leak to measure",
    "grade": "samples as the `sample` command draws them",
    "train": "the number of candidates may change on the way",
    "main": "eval measures more, sample fills holes",
}, "diffugpt_varlen": {
    "docstring": "another method",
    "NAME, BOUND": "its name; its likelihood is an upper bound",
    "Config": "the method block; it lists what cannot work",
    "attend": "attention between causal and full",
    "Attention": "GPT-2's, to hold its weights",
    "MLP": "GPT-2's, to hold its weights",
    "Block": "GPT-2's, to hold its weights",
    "Model": "GPT-2's, to hold its weights; rows for PAD and the mask, one shift",
    "token_nll": "the same, of a model that puts BOS before its input itself",
    "loss_fn": "the method",
    "nelbo": "a bound that has to be estimated",
    "sample": "the method",
    "get_lr": "begins and ends where its configuration files say",
    "make_optimizers": "a tied head, and AdamW for large checkpoints",
    "evaluate": "the causal parent is exact; what text, EOS and PAD cost",
    "grade": "predicts lengths first; samples as the `sample` command draws them",
    "train": "begins from other weights, and attention opens on the way",
    "main": "trains the parent first, eval measures more, sample fills holes",
}}
# top-level names of ar.py that a script does without, and why
GONE = {"mdlm": {
    "charged": "every position of a row is charged",
    "token_nll": "takes a left-to-right factorisation",
    "nll": "the exact likelihood is out of reach; `exact` computes it for short rows",
    "infill_left": "the method looks both ways anyway",
    "infill_exact": "infilling is what the method does",
}, "dit_embed": {
    "charged": "every position of a row is charged",
    "token_nll": "takes a left-to-right factorisation",
    "nll": "the exact likelihood is out of reach",
    "infill_left": "the method looks both ways anyway",
    "infill_exact": "infilling is what the method does",
}, "bit_diffusion": {
    "charged": "every position of a row is charged",
    "token_nll": "takes a left-to-right factorisation",
    "nll": "the exact likelihood is out of reach",
    "infill_left": "the method looks both ways anyway",
    "infill_exact": "infilling is what the method does",
}, "sdd": {
    "charged": "every position of a row is charged",
    "token_nll": "takes a left-to-right factorisation",
    "nll": "the exact likelihood is out of reach",
    "infill_left": "the method looks both ways anyway",
    "infill_exact": "infilling is what the method does",
}, "diffugpt_varlen": {
    "rotary": "GPT-2 learns a vector for each position",
    "rotate": "GPT-2 learns a vector for each position",
    "nll": "the exact likelihood is out of reach; that of the parent is its nelbo",
    "infill_left": "the method looks both ways anyway",
    "infill_exact": "infilling is what the method does",
}}
# top-level names that a script adds, and why
NEW = {"mdlm": {
    "Literal": "choices of the method block",
    "SCHEDULES": "mask rates (E1)",
    "get_schedule": "mask rates (E1)",
    "draw_t": "times for the loss (E3)",
    "corrupt": "masks (E1)",
    "corrupt_count": "masks in a given number (E4)",
    "masked_ce": "the cross-entropies (E2)",
    "nelbo_steps": "the bound of few steps (E5)",
    "exact": "bound and likelihood of a short row by enumeration (E4)",
    "FAST": "the sampler of the command line",
    "fast": "settings of fast sampling where nothing else was asked for",
    "NOTE": "which log-linear is meant",
    "chain_nll": "the likelihood of one fixed order (E4)",
    "CERTAINTY": "orders of revealing",
    "binomial": "draws for the plan (E6)",
    "plan": "how many positions each call reveals and hides (E6) (E9)",
    "predict": "guidance (E8) and caches",
    "best": "the positions of highest score",
    "end_documents": "what follows an EOS is known",
    "reveal": "one call of the sampler (E7)",
    "holes": "what eval hides for infilling",
    "evaluate_all": "masked accuracy, infilling, few-step samples",
}, "dit_embed": {
    "Literal": "choices of the method block",
    "METHOD": "what a checkpoint fixes besides",
    "FAST": "the sampler of the command line",
    "fast": "settings of fast sampling where nothing else was asked for",
    "ends": "the range of noise levels",
    "match": "evidence (E3) and mixtures (E10) in float32",
    "modulate": "scale and shift of adaLN",
    "SCHEDULES": "noise levels (E1)",
    "log_snr": "noise levels (E1)",
    "clocks": "every position's own time (E2)",
    "levels": "every position's own time (E2)",
    "noised": "noise (E1)",
    "estimate": "what an answer means (E4) (E5)",
    "predict": "self-conditioning",
    "rounding_nll": "a decoder without a network (E3)",
    "prior_kl": "the bound's first part (E6)",
    "bridge": "a step (E8)",
    "nelbo_steps": "the bound of few steps (E7) (E10)",
    "deal": "clocks by certainty",
    "aim": "what a step goes for (E10)",
    "holes": "what eval hides for infilling",
    "best_token": "accuracy",
    "evaluate_all": "accuracy, infilling, few-step samples",
}, "bit_diffusion": {
    "Literal": "choices of the method block",
    "METHOD": "what a checkpoint fixes besides",
    "FAST": "the sampler of the command line",
    "fast": "settings of fast sampling where nothing else was asked for",
    "order_tokens": "which token gets which code",
    "code_book": "codes (E1)",
    "number": "codes back to numbers",
    "ids_of": "codes back to tokens",
    "update": "evidence (E3) (E4)",
    "SURE": "the log-odds of a clean bit",
    "SCHEDULES": "agreements (E1)",
    "clocks": "every position's own time (E2)",
    "levels": "every position's own time (E2)",
    "noised": "noise (E1)",
    "mixture": "the parts of a bit head's answer",
    "bit_logits": "from tokens to bits (E5)",
    "cross_entropy": "the loss of both heads",
    "best_token": "certainty of positions, accuracy",
    "density": "the bound (E8)",
    "flip": "a step (E6)",
    "nelbo_steps": "the bound of few steps (E9)",
    "deal": "clocks by certainty",
    "aim": "what a step goes for (E7)",
    "holes": "what eval hides for infilling",
    "evaluate_all": "accuracy, infilling, few-step samples",
}, "sdd": {
    "Literal": "choices of the method block",
    "METHOD": "what a checkpoint fixes besides",
    "FAST": "the sampler of the command line",
    "fast": "settings of fast sampling where nothing else was asked for",
    "CAP": "the largest logit of the network",
    "SURE": "the precision of a clean position",
    "SCHEDULES": "precisions (E5)",
    "clocks": "every position's own time (E5)",
    "levels": "every position's own time (E5)",
    "evidence": "what is measured (E1)",
    "sparse": "candidates (E3)",
    "own_evidence": "evidence (E6)",
    "states": "what the network sees (E3)",
    "observe": "evidence of a batch (E1)",
    "predict": "the network's answer and own evidence (E6)",
    "distance": "the bound (E4)",
    "original": "the process that leaks",
    "nelbo_steps": "the bound of few steps (E8)",
    "deal": "clocks by certainty",
    "move": "a step (E7) (E9)",
    "frame": "the film of candidates",
    "sample_original": "the original's sampler",
    "at_step": "k may change in training",
    "leak": "what the original reports",
    "holes": "what eval hides for infilling",
    "candidates": "where the truth is among the candidates",
    "evaluate_all": "bounds, truth among candidates, few-step samples",
    "measure_bounds": "what only a method with a likelihood has",
}, "diffugpt_varlen": {
    "json": "configuration files",
    "re": "configuration files",
    "Path": "configuration files and checkpoints",
    "Literal": "choices of the method block",
    "get_args": "choices in configuration files",
    "SafetensorError": "checkpoints of others",
    "load_file": "checkpoints of others",
    "METHOD": "what a checkpoint fixes besides",
    "FAST": "the sampler of the command line",
    "fast": "settings of fast sampling where nothing else was asked for",
    "OTHER_NAMES": "configuration files",
    "SET_HERE": "configuration files",
    "NOT_HERE": "configuration files",
    "read_config": "configuration files",
    "HUB": "checkpoints of others",
    "MASK_IDS": "checkpoints of others",
    "load_pretrained": "checkpoints of others",
    "start": "what a run begins from",
    "Conv1D": "GPT-2's linear layer",
    "canvas_of": "PAD behind the EOS",
    "sees": "attention between causal and full (E8)",
    "corrupt": "masks (E1)",
    "law": "the law of lengths (E4)",
    "law_of_head": "the law of lengths from a head of its own (E4)",
    "length_law": "the law of lengths at the first call (E3)",
    "lengths": "where documents end",
    "CERTAINTY": "orders of revealing",
    "best": "the positions of highest score",
    "penalize": "the repetition penalty",
    "draw": "tokens for chosen positions",
    "predict": "canvases of different lengths (E7)",
    "sample_ar": "the parent's sampler",
    "at_step": "every ramp",
    "prompts": "documents whose length is predicted",
    "known_law": "the baseline of lengths",
    "judge_law": "what a law of lengths is worth",
    "first_look": "lengths at the first call (E3)",
    "length_report": "lengths at the first call (E5)",
    "say_lengths": "the same in two lines",
    "evaluate_all": "lengths, canvases, benchmarks",
    "wilson": "intervals of shares",
    "rouge": "infilling",
    "read_items": "benchmarks",
    "bench": "benchmarks",
    "parent_of": "stage 1",
    "have_parent": "stage 1",
}}
# fields of the shared blocks of Config with another default, and why
DEFAULTS = {"mdlm": {}, "dit_embed": {}, "bit_diffusion": {}, "sdd": {}, "diffugpt_varlen": {
    "steps": "500 steps of the parent come before"}}
OTHERS = list(ALLOWED)
each = pytest.mark.parametrize("name", OTHERS)


def lines(name):
    return (ROOT / f"{name}.py").read_text("utf-8").splitlines()


def pieces(name):
    """{top-level name: its source, with decorators}, the docstring and imports among them."""
    text = "\n".join(lines(name))
    found = {}
    for node in ast.parse(text).body:
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        source = "\n".join(lines(name)[start - 1:node.end_lineno])
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [ast.unparse(node.targets[0]).strip("()")]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.If):
            names = ["the last two lines"]
        else:
            assert isinstance(node, ast.Expr) and not found, f"{name}.py runs code: {source}"
            names = ["docstring"]
        assert not set(names) & found.keys(), f"{names} twice in {name}.py"
        found |= dict.fromkeys(names, source)
    return found


def fields(name):
    """[[(field, type, default, help text), ...], ...]: the blocks of Config, by their comments."""
    config = pieces(name)["Config"].splitlines()
    blocks = {"shared": []}
    for line in config:
        if comment := re.fullmatch("    # (.*)", line):
            blocks[comment[1]] = []
        elif field := re.fullmatch(r"    (\w+): (.*?) = (.*?)  # (.*)", line):
            blocks[list(blocks)[-1]].append(field.groups())
        else:
            assert not line or line.startswith(("@", "class", "    def", "        "))
    return blocks


def test_every_script_is_compared():
    """A script is a file with the seven banners; each has to be listed above."""
    scripts = [p.stem for p in ROOT.glob("*.py") if "\n# 1. config\n" in p.read_text("utf-8")]
    assert sorted(scripts) == sorted(["ar", *OTHERS])


@each
def test_shared_names_have_the_same_text(name):
    ar, other = pieces("ar"), pieces(name)
    for key in ar.keys() & other.keys() - ALLOWED[name].keys():
        change = difflib.unified_diff(ar[key].splitlines(), other[key].splitlines(), lineterm="")
        assert ar[key] == other[key], f"{key} differs:\n" + "\n".join(change)


@pytest.mark.parametrize("key", ["clocks", "deal", "holes"])
def test_what_the_noisy_input_scripts_share_has_the_same_text(key):
    """Every position's own time, and what eval hides."""
    assert pieces("dit_embed")[key] == pieces("bit_diffusion")[key]


@pytest.mark.parametrize("key", ["CERTAINTY", "best"])
def test_what_the_masked_scripts_share_has_the_same_text(key):
    """Which positions are revealed first."""
    assert pieces("mdlm")[key] == pieces("diffugpt_varlen")[key]


@each
def test_every_listed_difference_still_exists(name):
    ar, other = pieces("ar"), pieces(name)
    for key, reason in ALLOWED[name].items():
        assert ar[key] != other[key], f"{key} is the same now: strike it off ALLOWED ({reason})"


@each
def test_names_that_only_one_file_has_are_listed(name):
    ar, other = pieces("ar").keys(), pieces(name).keys()
    assert ar - other == GONE[name].keys()
    assert other - ar == NEW[name].keys()
    assert all(len(why) > 5 for table in (ALLOWED, GONE, NEW) for why in table[name].values())


@each
def test_the_shared_names_are_the_plumbing_of_the_lesson(name):
    """What notebooks and the reader of a diff rely on to be the same."""
    same = pieces(name).keys() - ALLOWED[name].keys() - NEW[name].keys()
    if name == "sdd":  # keys have weights, and one of its processes has no likelihood
        same |= {"attend", "Attention", "evaluate"}
    if name == "diffugpt_varlen":  # GPT-2's block, a parent, lengths
        same |= {"rotary", "rotate", "attend", "Attention", "MLP", "get_lr", "make_optimizers",
                 "evaluate"}
    assert same >= {
        "PRESETS", "SHAPE", "open_data", "fill_in", "take", "get_batch", "get_eval_rows", "rotary",
        "rotate", "attend", "Attention", "MLP", "init_weights", "filter_logits", "categorical",
        "get_lr", "make_optimizers", "evaluate", "unigram_nll", "the last two lines"}


@each
def test_the_training_loop_is_the_same_but_for_the_line_that_makes_the_model(name):
    ar, other = (pieces(n)["train"].splitlines() for n in ("ar", name))
    changed = [line for line in difflib.ndiff(ar, other) if line[0] in "+-"]
    if name in ("sdd", "diffugpt_varlen"):  # a line for the Config of a step moves its neighbour
        changed = [line for line in changed if "loss_fn" not in line and "rows = slice" not in line]
        assert not [line for line in changed if line[0] == "-" and "= Model(cfg" not in line]
    assert all("model = Model(cfg" in line for line in changed) and len(changed) in (0, 2)


@each
def test_the_shared_flags_have_the_same_meaning_type_default_and_help(name):
    ar, other = fields("ar"), fields(name)
    assert list(ar) == list(other) == ["shared", "sampling", "method", "filled in from the data"]
    for block in set(ar) - {"method"}:
        assert [f[0] for f in ar[block]] == [f[0] for f in other[block]]
        for mine, theirs in zip(ar[block], other[block]):
            changed = mine[0] in DEFAULTS[name]
            assert mine[:2] == theirs[:2] and mine[3] == theirs[3]
            assert (mine[2] != theirs[2]) == changed, f"default of --{mine[0]}"
    ours = dict.fromkeys("data tokenizer rows preset seed device dtype steps batch_size seq_len "
                         "n_layer n_head n_embd lr warmup grad_clip grad_accum ema eval_every "
                         "save_every out resume compile log".split())
    assert ours.keys() <= {f[0] for f in ar["shared"]}


@each
def test_a_method_flag_never_shadows_a_shared_one(name):
    for script in ("ar", name):
        names = [f[0] for block in fields(script).values() for f in block]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["ar", *OTHERS])
def test_seven_banners_in_order(name):
    text = lines(name)
    rule = "# " + "-" * 94
    found = [i for i, line in enumerate(text) if re.fullmatch(r"# \d\. .*", line)]
    assert [text[i] for i in found] == [f"# {n}. {title}" for n, title in enumerate(BANNERS, 1)]
    assert all(text[i - 1] == text[i + 1] == rule for i in found)
    assert sum(line == rule for line in text) == 14


@each
def test_most_of_ar_is_in_the_other_script_too(name):
    ar, other = (Counter(line for line in lines(n) if line.strip()) for n in ("ar", name))
    share = (ar & other).total() / ar.total()
    print(f"{share:.0%} of the lines of ar.py are in {name}.py")
    assert share >= 0.6
