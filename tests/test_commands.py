"""Every command that a README or a docstring shows is understood, and every file of lab/ is a
command that works on a checkpoint."""
import ast
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ar
import bit_diffusion
import common
import fast
import diffugpt_varlen
import dit_embed
import mdlm
import sdd
from data import prepare, tales
from harness import ROOT, small_text
from lab import decoding, metrics, sdd_variants

SCRIPTS = (ar, mdlm, dit_embed, bit_diffusion, sdd, diffugpt_varlen)
LAB = {path.stem: importlib.import_module(f"lab.{path.stem}") for path in ROOT.glob("lab/*.py")}
USAGE = {"NAME|PATH": "tales", "NAME": "tales", "T": "byte", "N": "300", "DIR": "cache",
         "auto|lines": "lines", "FILE": str(ROOT / "README.md"), "TEXT": "once upon a time"}
BEGIN = {  # what a command of lab/ calls once its arguments are understood
    **dict.fromkeys(("scaling", "heads", "codes", "leak", "candidates", "adaptation"),
                    ("run", "draw")),
    "compare": ("train", "measure", "publish", "spread"), "compare_page": ["publish"],
    "collect": ["collect"], "film": ["load"], "methods": ["load"], "metrics": ["load_judge"],
"ngram": ["load_data"], "pretrained": ["export"], "weights": ["ship", "write_page"],
    "results_page": ["tables"]}
STOPPED = ("scaling", "heads", "codes", "vocabulary", "leak", "candidates", "adaptation", "compare",
           "speed", "gpu_check", "pretrained")  # of these no feature is run here


def written_down():
    """Every command in a code block or table of a README, or in a docstring's indented lines."""
    lines = []
    for path in (ROOT / "README.md", ROOT / "lab/README.md", ROOT / "results/README.md"):
        text = path.read_text("utf-8")
        blocks = re.findall(r"```(?:sh|bash|shell)\n(.*?)```", text, re.S)
        lines += [re.split(r"\s+#", line)[0] for line in "".join(blocks).splitlines()]
        lines += [code for row in text.splitlines() if row.startswith("|")
                  for code in re.findall(r"`(python [^`]*)`", row)]
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("lab/*.py")]:
        doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        lines += [re.split(r"\s{2,}", line.strip())[0] for line in doc.splitlines()
                  if line.startswith("    ")]
    commands = [part.strip() for line in lines for part in line.split("&&")]
    return sorted({c for c in commands if re.match("python|torchrun|pip", c)})


class Enough(Exception):
    """The command line was understood."""


def stop(*_, **__):
    raise Enough


@pytest.fixture
def idle(monkeypatch, tmp_path):
    """Every command stops where its work would begin; the folder holds samples and a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/mdlm").mkdir(parents=True)
    for name, text in ("samples.txt", "a"), ("model.safetensors", ""):
        (tmp_path / "out/mdlm" / name).write_text(text)
    monkeypatch.setattr(common, "load_config", lambda Config, out, **_: Config())
    monkeypatch.setattr(common, "Run", stop)
    monkeypatch.setattr(fast, "pick_device", stop)
    for script in SCRIPTS:
        monkeypatch.setattr(script, "train", stop)
    for part in ("show_samples", "plot_loss"):  # some commands switch them off
        monkeypatch.setattr(common, part, getattr(common, part))
    for name, parts in BEGIN.items():
        for part in parts:
            monkeypatch.setattr(LAB[name], part, stop)
    monkeypatch.setattr(LAB["speed"], "PARTS", dict.fromkeys(LAB["speed"].PARTS, stop))
    monkeypatch.setattr(LAB["vocabulary"].subprocess, "run", stop)
    monkeypatch.setattr(prepare, "prepare", stop)
    for name in ("stories", "entropy", "Tales"):
        monkeypatch.setattr(tales, name, stop)


@pytest.mark.parametrize("command", written_down())
def test_every_command_that_is_written_down_is_understood(command, idle, monkeypatch):
    words = shlex.split(command)
    if words[0] == "torchrun":
        assert words[1] == "--nproc-per-node"
        words[:3] = ["python"]
    if command in ("pip install -r requirements.txt", "python -m pytest"):
        return
    path, *argv = [USAGE.get(word.strip("[]"), word.strip("[]")) for word in words[1:]]
    monkeypatch.setattr(sys, "argv", [path, *argv])
    with pytest.raises(Enough):
        importlib.import_module(path.removesuffix(".py").replace("/", ".")).main(argv)


def test_there_are_commands_to_check_and_each_lab_file_has_one():
    found = written_down()
    for name in (*(f"{script.__name__}.py" for script in SCRIPTS), "data/prepare.py",
                 *(f"lab/{name}.py" for name in LAB)):
        assert any(name in command for command in found), name
    for path in ROOT.glob("lab/*.py"):
        assert f"`{path.name}`" in (ROOT / "lab/README.md").read_text("utf-8"), path


@pytest.mark.parametrize("name", LAB)
def test_lab_files_explain_themselves(name, capsys):
    with pytest.raises(SystemExit) as stop:
        LAB[name].main(["--help"])
    assert stop.value.code == 0 and LAB[name].__doc__.split("\n")[0][:70] in capsys.readouterr().out


@pytest.mark.parametrize("how", [["lab/{}.py"], ["-m", "lab.{}"]], ids=["path", "module"])
def test_lab_files_start_by_path_and_as_modules(how):
    for name in ("compare", "varlen_eval"):  # those that import most
        done = subprocess.run([sys.executable, *(part.format(name) for part in how), "--help"],
                              cwd=ROOT, text=True, capture_output=True, timeout=120)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert LAB[name].__doc__.split("\n")[0] in done.stdout


MISTAKES = [(f"lab.{name}", "--nonsense") for name in LAB] + [
    (f"lab.{name}", "--out nothing") for name in (
        "mdlm_eval", "varlen_eval", "figures", "film", "methods")] + [
    (f"lab.{name}", flags) for name, flags in (
    ("noise_eval", "--script sdd --out nothing"), ("noise_eval", "--script x"), ("speed", "x"),
    ("benchmarks", "cloze:nothing --out nothing"), ("metrics", "--samples nothing"),
    ("collect", "nothing"), ("compare", "--budget x"), ("compare", "--seeds x"), ("leak", "x"),
    ("compare_page", "nothing"), ("pretrained", "export a"), ("gpu_check", "--device x"),
    ("gpu_check", "--device cpu --only x"),
    ("ar_extra", "eval --out nothing"), ("decoding", "sample --out nothing"))] + [
    ("data.prepare", flags) for flags in (
        "--nonsense", "nothing.txt", "tales --tokenizer x", "tales --vocab-size 1",
        "tales --max-docs x", "tales --max-docs -1", "nothing/", "nobody/nothing",
        "tales --tokenizer byte --vocab-size 300", "tales --split x", "tales --split lines",
        "tales --tokenizer hf:nothing.json", ". --tokenizer gpt2 --vocab-size 9999999")]


@pytest.mark.parametrize("module, flags", MISTAKES)
def test_a_mistake_in_lab_or_prepare_is_told(module, flags, monkeypatch, capsys, tmp_path):
    """Exit code 2, the word that is wrong, no traceback and nothing left. Those of the scripts are
    in test_common.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *flags.split()])
    with pytest.raises(SystemExit) as stop:
        common.run_main(importlib.import_module(module).main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and 20 < len(said) < 2000 and "Traceback" not in said
    assert not [*tmp_path.rglob("*.*")]


# ---- lab commands on tiny checkpoints ------------------------------------------------------------

FLAGS = ("--tokenizer byte --n-layer 1 --n-head 2 --n-embd 32 --seq-len 64 --batch-size 4 "
         "--steps 4 --warmup 1 --eval-every 4 --device cpu --dtype float32").split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Runs of all scripts on documents of a small text."""
    home = tmp_path_factory.mktemp("lab") / "out"
    home.mkdir()
    small_text(home / "small.txt")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setenv("TEXT_DIFFUSION_CACHE", str(home / "cache"))
        for script in SCRIPTS:
            script.main(["--data", str(home / "small.txt"), "--rows", "docs", *FLAGS, "--out",
                         str(home / script.__name__), *(
                             ["--parent-steps", "2"] if script is diffugpt_varlen else [])])
        yield home


def said(name, capsys, *argv):
    """What a file of lab/ prints."""
    capsys.readouterr()
    LAB[name].main([*map(str, argv)])
    return capsys.readouterr().out


FEATURES = re.findall(r"`(python [^`]*)`", (ROOT / "lab/README.md").read_text("utf-8").partition(
    "## Feature and command")[2])
SIZES = dict(mdlm_eval="--steps 4 --orders random", noise_eval="--steps 4",
             varlen_eval="--tokens-per-step 16 --modes truncate")  # of the suites


@pytest.mark.parametrize("command", [c for c in FEATURES if not re.search("|".join(
    ["gpt2|FILE|TARGET|data/|resume|cuda|wandb", *(f"lab/{name}.py" for name in STOPPED)]), c)])
def test_every_feature_works_at_tiny_size(command, home, capsys, monkeypatch, tmp_path):
    """The commands of the tables in lab/README.md, but those that train many networks or need
    data, a GPU or the internet, which other tests cover."""
    monkeypatch.chdir(home.parent)
    path, *argv = shlex.split(command.removeprefix("python "))
    name = Path(path).stem
    if name in SIZES:
        argv += [*SIZES[name].split(), "--num-samples", "4", "--rows", "8"]
    elif argv[:1] in (["sample"], ["eval"]):
        argv += ["--num-samples", "2"]
    elif "variants" in name or "/" not in path:  # train
        argv = ["--num-steps", "8", *argv, "--data", str(home / "small.txt"), *FLAGS,
                "--dtype", "bfloat16"] + (
            [] if "--out" in argv else ["--out", str(tmp_path / "run")]) + (
            ["--parent-steps", "2"] if "varlen" in name else [])
    importlib.import_module(path.removesuffix(".py").replace("/", ".")).main(argv)
    assert re.search("nfe|nats|png|html|gen_nll|accuracy", capsys.readouterr().out)


@pytest.mark.parametrize("flags, nfe", [
    ("--sampler threshold --threshold 0.0001 --remask none", 1),
    ("--prompt the --guidance 1 --num-steps 8", 18), ("--length 80 --block 8 --num-steps 20", 20)])
def test_decoding_is_by_these_decoders(flags, nfe, home, capsys):
    shown = said("decoding", capsys, "sample", "--out", home / "mdlm", *flags.split())
    assert f"nfe {nfe}," in shown


@pytest.mark.parametrize("flags, sentence", [
    ("--cache dual --guidance 1", "--cache keeps no keys for the second evaluation"),
    ("--sampler threshold", "--sampler threshold does not remask: add --remask none"),
    ("--threshold 2", "--threshold is 2.0, more than 1"),
    ("--sampling-schedule loglinear", "schedule 'loglinear' is ambiguous"),
    ("--sampling-schedule sigmoid", "choose linear, cosine, log-linear, mdlm-loglinear, maskgit")])
def test_decoders_that_cannot_work_are_refused(flags, sentence, home):
    with pytest.raises(common.UserError, match=re.escape(sentence)):
        decoding.main(["sample", "--out", str(home / "mdlm"), *flags.split()])


def test_the_suite_writes_its_rows_and_figures(home, capsys):
    out = home / "mdlm"
    shown = said("mdlm_eval", capsys, "--out", out, "--judge", home / "ar", "--orders", "random",
                 "margin", "--steps", 4, 8, "--num-samples", 8, "--rows", 20, "--temperature", 1,
                 "--remask", "none")
    rows = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == (
        ["config", "baseline", "test"] + 2 * ["steps"] + 4 * ["accuracy"] + 3 * ["infill"] +
        ["real"] + 4 * ["samples"])
    assert f"test: <= {rows[2]['nats_per_token']:.3f} nats/token" in shown
    assert [(r["order"], r["num_steps"], r["nfe"]) for r in rows[-4:]] == [
        (order, n, n + 1) for order in ("random", "margin") for n in (4, 8)]
    assert all(r["gen_nll"] > 0 and r["temperature"] == 1 and r["remask"] == "none"
               for r in rows[-4:]) and rows[0]["config"]["steps"] == 4
    for name in ("integrand.png", "quality.png"):
        assert (out / name).stat().st_size > 5000
    assert "no generative NLL" in said(
        "mdlm_eval", capsys, "--out", out, "--judge", home / "none", "--orders", "l2r",
        "--steps", 4, "--num-samples", 4, "--rows", 20)


def test_a_judge_of_another_tokenizer_is_refused_at_once_and_the_shipped_one_left_out(
        home, capsys, monkeypatch):
    monkeypatch.chdir(home.parent.parent)  # without a folder out/ar: weights/ar would judge
    flags = ["--out", home / "mdlm", "--orders", "l2r", "--steps", 4, "--num-samples", 4, "--rows",
             8]
    assert "no generative NLL: out/ar holds no run" in said("mdlm_eval", capsys, *flags)
    small_text(home / "other.txt", seed=1)
    with contextlib.redirect_stdout(io.StringIO()):
        ar.main(["--data", str(home / "other.txt"), *FLAGS, "--tokenizer", "char", "--out",
                 str(home / "other")])
    with pytest.raises(common.UserError, match="another tokenizer"):
        said("mdlm_eval", capsys, *flags, "--judge", home / "other")


def test_text_metrics_are_of_the_texts_whatever_the_judge_read(home, capsys, tmp_path):
    """A judge of windows scores no filling; what is longer than its rows is cut, and that is said;
    what is no text is refused."""
    with contextlib.redirect_stdout(io.StringIO()):
        ar.main(["--data", str(home / "small.txt"), "--rows", "stream", *FLAGS, "--out",
                 str(home / "windows")])
    path, long = tmp_path / "texts", "ab" * 40
    path.write_text(f"the cat\n<|endoftext|>\na dog.\n<|endoftext|>\n{long}\n")
    model, cfg, tok = metrics.load_judge(home / "windows", torch.device("cpu"))
    ids = [tok.encode(text)[:64] for text in ("the cat", "a dog.", long)]
    x = torch.tensor([(row + [cfg.eos] * 64)[:64] for row in ids])
    nll = ar.nll(model, x, ar.Config(**{**vars(cfg), "rows": "docs"})).sum() / (8 + 7 + 64)
    shown = said("metrics", capsys, "--samples", path, "--judge", home / "windows")
    assert f"gen_nll {nll:.3g}, length {77 / 3:.3g}," in shown and "1 texts are cut to" in shown
    path.write_bytes(bytes(range(256)))
    with pytest.raises(common.UserError, match="is no text"):
        said("metrics", capsys, "--samples", path, "--judge", home / "windows")


@pytest.mark.parametrize("name, flags, sentence", [
    ("mdlm_eval", "--rows 0", "--rows is 0, it must be at least 1"),
    ("mdlm_eval", "--steps 4 0", "--steps is 0"), ("mdlm_eval", "--seeds 0", "--seeds is 0"),
    ("mdlm_eval", "--temperature -1", "--temperature is -1.0, it must be at least 0"),
    ("mdlm_eval", "--temperature nan", "--temperature is nan"),
    ("mdlm_eval", "--top-p 2", "--top-p is 2.0, more than 1"),
    ("noise_eval", "--num-samples 0", "--num-samples is 0"),
    ("varlen_eval", "--tokens-per-step 0", "--tokens-per-step is 0"),
    ("methods", "--rows 0", "--rows is 0"), ("ngram", "--orders 0", "--orders is 0"),
    ("benchmarks", "cloze:x --num-items -1", "--num-items is -1, it must be at least 0")])
def test_numbers_that_cannot_work_are_refused(name, flags, sentence, home):
    with pytest.raises(common.UserError, match=re.escape(sentence)):
        LAB[name].main([*flags.split(), *["--out", str(home / "mdlm")] * (name != "ngram")])


def test_the_original_process_shows_a_leak_and_no_likelihood(home, capsys, tmp_path):
    shown = said("sdd_variants", capsys, "--data", home / "small.txt", *FLAGS, "--process",
                 "original", "--out", tmp_path / "run")
    rows = [row for row in common.read_log(tmp_path / "run") if row["kind"] == "val"]
    assert "copy" in shown and not any("nats" in key for row in rows for key in row)
    with pytest.raises(common.UserError):
        sdd_variants.main(["sample", "--out", str(tmp_path / "run"), "--prompt", "a"])
    said("noise_eval", capsys, "--out", tmp_path / "run", "--steps", 4, "--num-samples", 2)
    rows = [json.loads(line) for line in (tmp_path / "run/eval.jsonl").read_text().splitlines()]
    assert [row["sampler"] for row in rows if row["kind"] == "samples"] == ["token"]


@pytest.mark.parametrize("name, flags, sentence", [
    ("dit_variants", "--prediction-type eps --loss ce", "--prediction-type"),
    ("dit_variants", "--prediction-type x0 --rounding-weight 0", "embeddings are the same"),
    ("dit_variants", "--eta 2", "--eta is 2.0"),
    ("dit_variants", "--eta 0.5", "add that"),
    ("dit_variants", "--clamp-to-embedding", "--sampler token draws tokens"),
    ("dit_variants", "--prediction-type v --top-k 3", "--prediction-type v has none"),
    ("sdd_variants", "--process original --top-p 0.5", "leave --top-k and --top-p out"),
    ("varlen_variants", "--max-new-tokens 3 --infill a___", "leave --infill out"),
    ("ar_extra", "--repetition-penalty 0", "must be more than 0"),
    ("bit_variants", "--num-mixture 2", "--head bit"),
    ("bit_variants", "--head bit --num-mixture 3", "must be a power of 2"),
    ("bit_variants", "--head bit --top-k 5", "--top-k and --top-p"),
    ("sdd_variants", "--curriculum 1,two", "not '1,two'"),
    ("sdd_variants", "--swap 2", "--swap is 2.0"),
    ("sdd_variants", "--candidates posterior --add-likelihood state", "would count twice"),
    *((name, "--prefix 2", "--prefix is 2.0")
      for name in ("dit_variants", "bit_variants", "sdd_variants"))])
def test_variants_that_cannot_work_are_refused(name, flags, sentence, home, tmp_path):
    with pytest.raises(common.UserError, match=re.escape(sentence)):
        LAB[name].main(["--data", str(home / "small.txt"), *FLAGS, *flags.split(), "--out",
                        str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_figures_metrics_and_what_ar_leaves_out(home, capsys):
    assert "trajectory.png" in said("figures", capsys, "--out", home / "mdlm")
    assert (home / "mdlm/trajectory.png").stat().st_size > 5000
    shown = said("metrics", capsys, "--samples", home / "mdlm/samples.txt", "--judge", home / "ar")
    assert "gen_nll " in shown and "distinct_2 " in shown
    with pytest.raises(common.UserError, match="train ar.py"):
        metrics.main(["--samples", str(home / "mdlm/samples.txt"), "--judge", str(home / "none")])
    assert "num_samples 2" in said("ar_extra", capsys, "sample", "--out", home / "ar",
                                   "--num-samples", 2, "--repetition-penalty", 1.5)
    assert "by Bayes' rule over 257 fillings" in said("ar_extra", capsys, "eval", "--out",
                                                      home / "ar", "--num-samples", 2)


def test_runs_are_listed_filmed_and_kept(home, capsys):
    shown = said("methods", capsys, "--out", home, "--rows", 8)
    assert [f"{script.__name__}.py" in shown for script in SCRIPTS] == 6 * [True]
    assert "ar.py: = " in shown and "mdlm.py: <= " in shown
    assert "after 100 % of the steps" in said("film", capsys, "--out", home, "--page",
                                              home / "film.html")
    assert (home / "film.html").stat().st_size > 10_000
    assert "rows" in said("collect", capsys, home / "mdlm", home / "kept.jsonl")
    assert str(home) not in (home / "kept.jsonl").read_text()  # no path of a machine
    kept = [json.loads(line) for line in (home / "kept.jsonl").read_text().splitlines()]
    assert (kept[0]["kind"], kept[0]["config"]["out"]) == ("config", "mdlm")
    assert not [row for row in kept if row["kind"] == "train"]
    for name, argv in (("methods", ["--out", "nowhere"]), ("film", ["--out", "nowhere"]),
                       ("collect", ["nowhere", str(home / "none.jsonl")]), ("collect", ["one"])):
        with pytest.raises(common.UserError):
            LAB[name].main(argv)


CACHE = os.environ.get("TEXT_DIFFUSION_CACHE", str(ROOT / "data/cache"))  # not that of `home`


def test_the_check_of_a_gpu_on_a_cpu(capsys, monkeypatch, tmp_path):
    """All that it does but compiling; that a batch that does not fit ends the search, and that
    another loss on the device is said."""
    monkeypatch.setenv("TEXT_DIFFUSION_CACHE", CACHE)
    for part in ("show_samples", "plot_loss"):
        monkeypatch.setattr(common, part, lambda *_: None)
    found = said("gpu_check", capsys, "--device", "cpu", "--tiny", "--out", tmp_path)
    made = json.loads((tmp_path / "gpu.json").read_text())
    for script in SCRIPTS:
        row = made[script.__name__]
        assert row["loss_differs"] == 0 and row["last_loss"] < 8 and row["eager"]["batch_size"] in (
            2, 4) and row["eager"]["flop_per_token"] > 1e5 and script.__name__ in found
    check = LAB["gpu_check"]

    def step(script, loss, cfg, *_):
        if cfg.batch_size > 3:
            raise torch.OutOfMemoryError
    with monkeypatch.context() as patch:
        patch.setattr(check, "step", step)
        assert check.speed(mdlm, check.Options("cpu", True), torch.device("cpu"), False,
                           (2, 3, 4, 1))["batch_size"] in (2, 3)
    monkeypatch.setattr(check, "runs", lambda *_: dict(first_loss=1.0, last_loss=1.0))
    monkeypatch.setattr(check, "speed", lambda *_, **more: made["ar"]["eager"])
    monkeypatch.setattr(check, "parity", lambda script, *_: (2e-3 * (script is mdlm), 0.0))
    with pytest.raises(common.UserError, match="another one on cpu: mdlm$"):
        check.main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--only", "ar,mdlm"])


def test_text_metrics_count_what_they_say():
    row = metrics.text_metrics([[1, 1, 2], [1, 2]])
    assert row["distinct_1"] == 2 / 5 and row["distinct_2"] == 2 / 3  # 11 12 12
    assert row["distinct_3"] == 1 and row["repetition"] == 1 / 3
    assert row["entropy"] == pytest.approx(0.6730116670092563)
    assert set(metrics.text_metrics([[], []]).values()) == {0}
