"""lab/compare.py: one budget, the table, what is made again and what is not, and the film."""
import ast
import contextlib
import dataclasses
import importlib
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import common
import mdlm
from common import UserError
from data.units import tokens_of
from lab import by_steps, compare, film, methods
from lab.compare_page import insert, page as page_of, tables

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "results/compare.jsonl"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which(
    "google-chrome")


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


TOY = dict(run=dict(steps=8, eval_every=8, n_layer=1, n_head=1, n_embd=16, device="cpu",
                    num_steps=4), seeds=(1337,), test=16, draws=2, n=2, frontier=(2,), rounds=1)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A folder in which `python lab/compare.py --budget quick` has run, with toys: tiny networks,
    few documents of validation, no samples at the end of training."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compare.BUDGETS, "quick", TOY)
        for part in ("show_samples", "plot_loss"):
            patch.setattr(common, part, lambda *_: None)
        for name in compare.IDEAS:
            script = importlib.import_module(name)
            patch.setattr(script, "get_eval_rows", lambda split, cfg, n, rows=script.get_eval_rows:
                          rows(split, cfg, min(n, 16)))
        with contextlib.chdir(folder):
            compare.main(["--budget", "quick"])
        yield folder


@pytest.fixture
def results(quick):
    return read(quick / "out/compare/quick/compare.jsonl")


# ---- one budget ----------------------------------------------------------------------------------

@pytest.mark.parametrize("budget", compare.BUDGETS)
def test_every_method_sees_the_same_number_of_tokens(budget):
    for name in compare.IDEAS:
        cfg = compare.config(name, compare.settings(name, budget, 1))
        steps = cfg.steps + (cfg.parent_steps if hasattr(cfg, "parent_steps") else 0)
        tokens = steps * cfg.batch_size * cfg.grad_accum * cfg.seq_len
        assert tokens == compare.budget_tokens(budget)
        assert (cfg.data, cfg.tokenizer, cfg.rows) == ("tales", "bpe", "auto")


def test_the_standard_budget_is_the_default_run_of_every_script():
    for name in compare.IDEAS:
        run = compare.settings(name, "standard", 1337)
        assert not {k: v for k, v in run.items() if k != "out"
                    and getattr(importlib.import_module(name).Config, k) != v}


# ---- the quick comparison ------------------------------------------------------------------------

def test_a_comparison_has_a_row_for_each_run_and_baseline(results):
    assert [row["kind"] for row in results] == ["config"] + 4 * ["baseline"] + 6 * ["run"] + [
        "speed"]
    assert {"command", "tokens", "seeds", "torch", "machine", "dtype"} <= results[0].keys()
    base = {row["name"]: row["test"] for row in results if row["kind"] == "baseline"}
    assert base["uniform"]["nats_per_token"] == pytest.approx(math.log(2048))
    assert base["real"]["gap"] == 0 and base["real"]["nats_per_doc"] < base["3-gram"][
        "nats_per_doc"] < base["unigram"]["nats_per_doc"] < base["uniform"]["nats_per_doc"]
    for row, name in zip(results[5:11], compare.IDEAS):
        assert row["name"] == name and row["code"] == compare.code_of(name)
        assert row["command"].startswith(f"python {name}.py") and row["config"]["seed"] == 1337
        assert row["test"]["bound"] == ("exact" if name == "ar" else "upper")
        assert row["test"]["entropy_per_doc"] == base["real"]["nats_per_doc"]
        assert row["test"]["gap"] > 0 and 0 <= row["infill_accuracy"] <= 1
        assert row["ancestral"]["novelty"] == 1
        assert len(row["stories"]) == 2 and len(row["lengths"]) == compare.BUDGETS["quick"]["n"]


def test_the_pages_hold_every_method_and_say_what_kind_its_number_is(quick, results):
    folder, parts = quick / "out/compare/quick", tables(results)
    page = (folder / "compare.md").read_text("utf-8")
    for row in results[5:11]:
        sign = "=" if row["name"] == "ar" else "<="
        assert f"| {sign} {row['test']['nats_per_token']:.3f} |" in parts["methods"]
        assert f"| {sign} {row['test']['nats_per_doc']:.1f} ± " in page
        assert f"**`{row['name']}.py`** (seed 1337, NFE {row['default']['nfe']})" in page
    assert len({line.count("|") for line in parts["methods"].splitlines()}) == 1
    for name in re.findall(r"\]\((\w+\.png)\)", page):
        assert (folder / name).stat().st_size > 5000
    assert "†" not in parts["methods"]


def test_a_comparison_that_is_there_is_not_made_again(quick, monkeypatch):
    def never(*_):
        raise AssertionError("trained again")
    before = (quick / "out/compare/quick/compare.jsonl").read_text()
    monkeypatch.chdir(quick)
    for name in compare.IDEAS:
        monkeypatch.setattr(importlib.import_module(name), "main", never)
    compare.main(["--budget", "quick"])
    assert (quick / "out/compare/quick/compare.jsonl").read_text() == before
    with monkeypatch.context() as patch:  # another judge: its likelihoods are others
        patch.setattr(compare, "weights_of", lambda out: "other")
        patch.setattr(compare, "load", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compare.main(["--budget", "quick"])
    monkeypatch.setattr(compare, "code_of", lambda name: "other")  # another version of the scripts
    with pytest.raises(AssertionError, match="trained again"):
        compare.main(["--budget", "quick", "--only", "mdlm"])


def test_a_row_is_kept_only_for_the_same_script_and_settings(tmp_path, monkeypatch):
    cfg = mdlm.Config(out=str(tmp_path / "out/x"))
    row, key, resume = methods.kept(cfg, "mdlm")
    assert (row, resume) == (None, False)
    (tmp_path / "out/x").mkdir()
    (tmp_path / "out/x/state.pt").touch()  # interrupted
    assert methods.kept(cfg, "mdlm") == (None, key, True)
    assert methods.keep(cfg, key, dict(a=1)) == dict(a=1) == methods.kept(cfg, "mdlm")[0]
    assert methods.kept(dataclasses.replace(cfg, lr=0.5), "mdlm")[::2] == (None, False)
    methods.keep(cfg, key, dict(a=1))
    monkeypatch.setattr(methods, "code_of", lambda name: "other")
    assert methods.kept(cfg, "mdlm")[::2] == (None, False)


def test_an_interrupted_run_is_resumed_to_the_same_numbers(quick, monkeypatch):
    monkeypatch.chdir(quick)
    run = compare.settings("ar", "quick", 1337)
    out, stop = Path(run["out"]), common.Run.stopping
    weights = load_file(out / "model.safetensors")
    shutil.move(out, "kept")
    monkeypatch.setattr(common.Run, "stopping", lambda self: (
        len(common.read_log(self.out)) > 5 or stop(self)))
    with pytest.raises(KeyboardInterrupt):
        compare.train("ar", run)
    assert compare.is_made("ar", run) == "unfinished"
    monkeypatch.setattr(common.Run, "stopping", stop)
    compare.train("ar", run)
    assert compare.is_made("ar", run) is True
    again = load_file(out / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    shutil.rmtree(out)
    shutil.move("kept", out)


def test_results_of_an_earlier_version_are_marked(results):
    results[6]["code"] = "0"
    table = tables(results)["methods"]
    assert "[`mdlm.py`](mdlm.py)† |" in table and table.count("†") == 1


def test_seeds_are_averaged_and_their_range_is_shown(results):
    other = json.loads(json.dumps(results[6]))
    other["test"]["nats_per_doc"] += 8
    parts = tables([*results[:7], other, *results[7:]])
    nats = results[6]["test"]["nats_per_doc"]
    assert f"<= {nats + 4:.1f} ± " in parts["details"]
    assert f"({nats:.1f} to {nats + 8:.1f})" in parts["details"]


def test_a_text_goes_between_its_markers_and_nowhere_else():
    page = ("a\n<!-- table: methods -->\nold\n<!-- end -->\nb\n"
            "<!-- table: x -->\ny\n<!-- end -->\n")
    new = insert(page, dict(methods="1\n2", other="3"))
    assert new == page.replace("old", "1\n2") == insert(new, dict(methods="1\n2"))


# ---- single measurements -------------------------------------------------------------------------

def test_the_token_to_fill_is_really_masked():
    """One word, never the end; the accuracy is that of the guess."""
    x0, seen = torch.tensor([[1, 2, 3, 0, 0]] * 40), []
    Cfg = dataclasses.make_dataclass("Cfg", [
        ("guess", int), ("eos", int, 0), ("vocab_size", int, 9), ("order", str, ""),
        ("temperature", float, 1.0), ("remask", str, ""), ("num_steps", int, 0)])

    def fill(model, canvas, cfg, g):
        seen.append(canvas)
        return canvas.masked_fill(canvas == 9, cfg.guess), 1
    fake = SimpleNamespace(__name__="mdlm", get_eval_rows=lambda *_: (x0, None), sample=fill)
    for guess in (2, 7):
        data = SimpleNamespace(test=None)
        share = compare.infill_accuracy(fake, torch.nn.Linear(1, 1), Cfg(guess), data, 40)
        at = (seen[-1] == 9)
        assert at.sum(1).eq(1).all() and not at[:, 3:].any()
        assert share == pytest.approx((x0[at] == guess).float().mean().item())


def test_new_documents_are_told_from_training_documents():
    import ar
    cfg = ar.Config()
    data = ar.load_data(cfg)
    seen = compare.train_documents(data, cfg)
    rows = tokens_of(ar.get_rows(data.train, cfg, np.arange(20)), cfg)
    assert compare.share_new(rows, seen) == 0
    assert compare.share_new([rows[0], rows[1][:-1], []], seen) == pytest.approx(2 / 3)


# ---- mistakes ------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, said", [
    (["--only", "mdlm,gpt"], "gpt"), (["--seeds", "1,x"], "1,x"),
    (["--seeds", "1337,5"], "1337,5"), (["--budget", "huge"], "huge"),
    (["shoot"], "shoot"),
    (["table", "--budget", "quick"], "--budget quick"), (["--jobs", "two"], "two")])
def test_mistakes_are_told_in_one_sentence(argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        compare.main(argv)
    assert "\n" not in str(error.value)


# ---- the film ------------------------------------------------------------------------------------

def test_the_film_ends_with_the_stories_that_are_sampled(quick, monkeypatch, capsys):
    monkeypatch.chdir(quick)
    runs = {name: compare.settings(name, "quick", 1337)["out"] for name in compare.IDEAS}
    film.make_film(runs, "quick runs", Path("film.html"))
    shown = capsys.readouterr().out
    page = Path("film.html").read_text("utf-8")
    story, prompt, gaps = json.loads(re.search(r"const film = (.*);\n", page)[1])["scenes"]
    names = [f"{name}.py" for name in compare.IDEAS]
    assert [card["name"] for card in story["cards"]] == names
    assert [card["name"] for card in gaps["cards"]] == names[1:]
    for card in prompt["cards"]:  # what is given stands there from the first frame to the last
        text = "".join(t or "" for t in card["frames"][0][1].values())
        assert text == film.SCENES["prompt"][1]["prompt"]
        given = [i for i, t in card["frames"][0][1].items() if t]
        assert not any(i in changes for _, changes in card["frames"][1:] for i in given)
    for method, name in zip(story["cards"], compare.IDEAS):
        script, model, cfg, data = methods.load(name, compare.settings(
            name, "quick", 1337)["out"])
        cfg = cfg if name == "ar" else methods.default_sampler(script, cfg)
        with methods.amp(model, cfg):
            x, nfe = methods.sample(script, model, cfg, 1,
                                    torch.Generator().manual_seed(cfg.seed))
        now = {}
        for _, changes in method["frames"]:
            now |= changes
        ids, = tokens_of(x, cfg)
        assert "".join(now[str(i)] for i in range(len(ids))) == "".join(
            data.tokenizer.decode([t]) for t in ids)
        assert now[str(len(now) - 1)] in ("", data.tokenizer.decode([x[0, -1].item()]))
        assert method["nfe"] == nfe and f"{name}.py" in shown
    assert "after 20 % of the steps" in shown and "after 100 % of the steps" in shown


PAGES = [ROOT / "lab/film_template.html", ROOT / "results/film.html"]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_a_film_needs_no_other_file(path):
    page = path.read_text("utf-8")
    page = page.replace('<link rel="icon" href="data:,">', "")  # asks for no icon
    assert not re.search(r"https?:|<link|@import|\bsrc=|url\(|fetch\(|XMLHttp", page)
    assert path.stat().st_size < 500_000


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_a_browser_shows_the_last_frame_of_the_film(tmp_path):
    """The committed film in headless Chromium, at its end: every story stands on the page."""
    page = PAGES[1].read_text("utf-8")
    shown = json.loads(re.search(r"const film = (.*);\n", page)[1])
    dom = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path}", "--virtual-time-budget=2000",
         "--dump-dom", f"{PAGES[1].as_uri()}?t=1"], capture_output=True, text=True, timeout=120)
    body = re.sub(r"<script.*?</script>", "", dom.stdout, flags=re.S)
    text = " ".join(re.sub(r"<[^>]*>", "", body).replace("&amp;", "&").split())
    for method in shown["scenes"][0]["cards"]:
        now = {}
        for _, changes in method["frames"]:
            now |= changes
        story = "".join(now[str(i)] or "" for i in range(method["length"]))
        assert " ".join(story.split()) in text and method["name"] in text


# ---- what is committed ---------------------------------------------------------------------------

def test_a_fingerprint_is_the_same_in_every_version_of_python():
    """ast.dump has type_params since 3.12, and no empty lists since 3.13."""
    x = ["Name", ["id", "x"], ["ctx", ["Load"]]]
    assert methods.plain(ast.parse("def f(x):\n    return x, None, 0, f'{x}'")) == [
        "Module", ["body", [[
            "FunctionDef", ["name", "f"],
            ["args", ["arguments", ["args", [["arg", ["arg", "x"]]]]]],
            ["body", [["Return", ["value", ["Tuple", ["elts", [
                x, ["Constant"], ["Constant", ["value", 0]],
                ["JoinedStr", ["values", [["FormattedValue", ["value", x], ["conversion", -1]]]]]
            ]], ["ctx", ["Load"]]]]]]]]]]]


def test_the_pages_equal_the_committed_comparison():
    results = read(KEPT)
    for page, root in ((ROOT / "README.md", ""), (ROOT / "results/README.md", "../")):
        text = page.read_text("utf-8")
        assert "<!-- table: methods -->" in text and insert(text, tables(results, root)) == text
    assert (ROOT / "results/compare.md").read_text("utf-8") == page_of(results)
    runs = [row for row in results if row["kind"] == "run"]
    assert {row["name"] for row in runs} == set(compare.IDEAS)
    for row in runs:
        assert {"command", "config", "seed", "torch", "machine", "threads", "dtype"} <= row.keys()
        assert "data_dir" not in row["config"] and row["tokens"] == results[0]["tokens"]


def test_samples_are_graded_at_every_evaluation_of_a_watched_script(monkeypatch):
    """The step of each, the last one too; nothing for a parent; the script is put back."""
    drawn = []
    monkeypatch.setattr(by_steps, "sample", lambda script, model, cfg, n, g: (drawn.append(n), 1))
    monkeypatch.setattr(by_steps, "measure", lambda x, cfg, tokenizer: dict(entropy=len(drawn)))
    script = SimpleNamespace(evaluate=lambda model, data, cfg: dict(nats_per_doc=7.0, se=1.0),
                             __name__="mdlm")
    cfg, plain, points = mdlm.Config(steps=5, eval_every=2), script.evaluate, []
    parent = SimpleNamespace(pipeline="arm")
    with by_steps.watched(script, points, 3):
        assert script.evaluate(None, None, parent) == dict(nats_per_doc=7.0, se=1.0)
        for _ in range(4):
            script.evaluate(None, SimpleNamespace(tokenizer=None), cfg)
    assert [p["step"] for p in points] == [0, 2, 4, 5] and drawn == [3] * 4
    assert points[1] == dict(step=2, nats_per_doc=7.0, entropy=2) and script.evaluate is plain
