"""The weights that the repository ships: what they are worth, and who uses them when."""
import dataclasses
import hashlib
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import common
import mdlm
from data.prepare import load_data
from lab import methods, weights

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "weights").glob("*.safetensors"))
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
PAGE = (ROOT / "weights/README.md").read_text("utf-8")


def row_of(path, table):
    """The cells of a file in the first or second table of the page."""
    rows = re.findall(rf"^\| \[{path.name}\].*$", PAGE, re.M)
    return [cell.strip() for cell in rows[table].split("|")[2:-1]]


def test_every_script_has_weights():
    assert [path.stem for path in FILES] == sorted(methods.IDEAS)


@each
def test_the_page_is_that_of_the_files(path):
    """Command, step, bounds and sha256; the files are no larger than they need to be."""
    command, steps, size, nats, perplexity, per_story, first = row_of(path, 0)
    with safe_open(path, "pt") as file:
        about = file.metadata()
        made = json.loads(about["made"])
        assert {str(file.get_tensor(key).dtype) for key in file.keys()} == {"torch.bfloat16"}
    assert command == f"`python {made['command']}`" and steps.split("+ ")[-1] == about["step"]
    assert (" + " in steps) == (path.stem == "diffugpt_varlen")
    assert json.loads(about["config"])["out"] == f"out/{path.stem}"
    for said, n in ((nats, 500), (first, 32)):
        bound = made[f"bound_{n}"]
        assert bound["rows"] == n
        assert said.split()[1] == f"{bound['nats_per_token']:.3f}"
        assert said.split()[0] == dict(exact="=", upper="<=")[bound["bound"]]
    assert float(perplexity.split()[1]) == pytest.approx(math.exp(float(nats.split()[1])), rel=3e-3)
    assert per_story.split()[1] == f"{made['bound_500']['nats_per_doc']:.1f}"
    assert hashlib.sha256(path.read_bytes()).hexdigest() in row_of(path, 1)[1]
    assert path.stat().st_size < 2.2e6 * float(size) + 2e5


@each
def test_shipped_weights_sample_and_have_the_bound_that_is_stated(path, tmp_path, monkeypatch,
                                                                  capsys):
    """Before there is a run, `sample` says what it uses and leaves no folder behind; the bound of
    the first 32 test stories is that of the page, also where the dtype is another."""
    monkeypatch.chdir(tmp_path)
    script = methods.script_of(path.stem)
    script.main(["sample", "--num-samples", "1", "--seed", "1"])
    said = capsys.readouterr().out
    assert said.startswith(f"no run in out/{path.stem}: using weights/{path.name}, trained for ")
    assert "valid_sentences" in said and not (tmp_path / "out").exists()
    cfg = common.load_config(script.Config, f"out/{path.stem}")
    about = dict(config=json.dumps(dataclasses.asdict(cfg)))
    again = weights.bound_of(path.stem, load_file(path), about, 32)
    stated = float(row_of(path, 0)[-1].split()[1])
    assert again["nats_per_token"] == pytest.approx(stated, rel=0.003)


def test_a_run_comes_first_and_resume_wants_one(tmp_path, monkeypatch):
    """A folder out/NAME is used, and refused if it is broken; other folders and --resume never
    mean the shipped weights."""
    monkeypatch.chdir(tmp_path)
    assert common.checkpoint_of("out/mdlm") == ROOT / "weights/mdlm.safetensors"
    assert common.checkpoint_of(Path("out") / "mdlm") == ROOT / "weights/mdlm.safetensors"
    assert common.checkpoint_of("weights/mdlm") == ROOT / "weights/mdlm.safetensors"
    for out in ("out/mine", "weights/mine", "mdlm", tmp_path / "out/mdlm",
                tmp_path / "weights/mdlm"):
        assert common.checkpoint_of(out) == Path(out) / "model.safetensors"
    with pytest.raises(common.UserError, match="out/mdlm/model.safetensors is missing"):
        mdlm.main(["--resume"])
    (tmp_path / "out/mdlm").mkdir(parents=True)
    assert common.checkpoint_of("out/mdlm") == Path("out/mdlm/model.safetensors")
    assert common.checkpoint_of(ROOT / "weights/mdlm") == ROOT / "weights/mdlm.safetensors"
    with pytest.raises(common.UserError, match="out/mdlm/model.safetensors is missing"):
        mdlm.main(["sample"])


def test_lab_writes_beside_and_not_into_weights(tmp_path, monkeypatch):
    """An evaluation of shipped weights has a folder of its own; a run keeps its own."""
    monkeypatch.chdir(tmp_path)
    run = common.Run(mdlm.Config())
    assert methods.results_folder(run) == Path("out/mdlm_weights")
    assert (tmp_path / "out/mdlm_weights").is_dir()
    (tmp_path / "out/mdlm").mkdir()
    assert methods.results_folder(run) == Path("out/mdlm")


def test_a_run_is_shipped(tmp_path, monkeypatch, capsys):
    """bfloat16, default folder, what made it; a run on other data, or no run, is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "weights")
    monkeypatch.setattr(weights, "bound_of", lambda name, weights, about, n: dict(
        bound="upper", rows=n, nats_per_token=1.0, nats_per_doc=100.0, se=2.0,
        entropy_per_doc=90.0))
    monkeypatch.setattr(common, "show_samples", lambda *a: None)

    def load_few(cfg, quiet=False):  # without making the whole corpus
        data = load_data(few := dataclasses.replace(cfg, max_docs=60), quiet)
        cfg.vocab_size, cfg.rows, cfg.eos = few.vocab_size, few.rows, few.eos
        return data
    monkeypatch.setattr(mdlm, "load_data", load_few)
    for argv in ["--out", "out/a"], ["--out", "out/b", "--max-docs", "60"]:
        monkeypatch.setattr(sys, "argv", ["mdlm.py", *argv])
        mdlm.main([*argv, "--steps=2", "--n-layer=1", "--n-embd=16", "--n-head=2"])
    weights.main(["out/a"])
    ours = load_file(tmp_path / "weights/mdlm.safetensors")
    theirs = load_file(tmp_path / "out/a/model.safetensors")
    assert all(torch.equal(ours[key], theirs[key].bfloat16()) for key in theirs | ours)
    page = (tmp_path / "weights/README.md").read_text("utf-8")
    assert "`python mdlm.py --out out/a`" in page
    assert "<= 1.000 | <= 2.72 | <= 100.0 ± 2.0 | <= 1.000" in page
    assert "is 0.900 nats per token" in " ".join(page.split())
    shutil.rmtree(tmp_path / "weights")
    for out, words in ("out/b", "other data"), ("out/c", "no run of"):
        with pytest.raises(common.UserError, match=words):
            weights.main([out])
    assert not (tmp_path / "weights").exists()
