"""The tables of results/README.md are those of the files beside it, which say what made them."""
import json
import operator
import re
from pathlib import Path

import pytest
import tyro

from lab import results_page
from lab.compare_page import insert
from lab.methods import IDEAS, ancestral, script_of
from lab.results_page import log_of, of_kind

ROOT = Path(__file__).parent.parent
EVALS = sorted((ROOT / "results").glob("*_eval*.jsonl"))
RUNS = sorted({*(ROOT / "results").glob("*.jsonl")} - {
    *EVALS, ROOT / "results/compare.jsonl", ROOT / "results/by_steps.jsonl"})
PAGE = (ROOT / "results/README.md").read_text("utf-8")
NAME = operator.attrgetter("stem")


def load(name):
    return json.loads((ROOT / f"results/{name}.json").read_text("utf-8"))


def test_every_table_of_the_page_is_made_from_its_file():
    """`python lab/results_page.py` would change nothing; all tables and all files are shown."""
    tables = results_page.tables()
    assert insert(PAGE, tables) == PAGE
    shown = set(re.findall(r"<!-- table: (\w+) -->", PAGE))
    assert shown == tables.keys() | {"methods", "details", "samples"}
    for path in (ROOT / "results").glob("*.*"):
        assert path.name == "README.md" or f"]({path.name})" in PAGE or path.suffix == ".png"


def test_numbers_of_tables_by_hand():
    rows = [dict(valid_stories=0.1, length=90.4), dict(valid_stories=0.4, length=100.0)]
    assert results_page.metrics_of(rows) == ["0.25", "", "", "95", "", ""]
    assert results_page.spread("<=", [3.0, 1.0, 2.6]) == "<= 2.2 (1.0 to 3.0)"
    last = of_kind(log_of("mdlm"), "val")[-1]
    sign, row = dict(exact="=", upper="<=")[last["bound"]], results_page.runs().splitlines()
    line, = [line for line in row if "](mdlm.jsonl)" in line]
    assert f"| {sign} {last['nats_per_doc']:.1f} ± {last['se']:.1f} |" in line and "<=" in line


@pytest.mark.parametrize("path", RUNS, ids=NAME)
def test_a_log_is_that_of_a_finished_run(path):
    made, last = (of_kind(log_of(path.stem), kind)[-1] for kind in ("config", "val"))
    assert made.keys() >= {"command", "device", "dtype", "tokenizer"}
    assert made["config"]["steps"] == last["step"] and made["config"]["seed"] == 1337
    assert path.stem.startswith("real_") or last["gap"] > 0 and path.stem in results_page.RUNS


@pytest.mark.parametrize("path", EVALS, ids=NAME)
def test_an_evaluation_has_all_its_seeds(path):
    log = log_of(path.stem)
    made, key = log[0], "length_mode" if "varlen" in path.stem else "order" \
        if "mdlm" in path.stem else "sampler"
    seeds = made["options"]["seeds"] if "options" in made else made["config"]["eval_seeds"]
    groups = {}
    for row in of_kind(log, "samples"):
        groups.setdefault((row[key], row["num_steps"]), []).append(row["seed"])
    assert len({value for value, _ in groups}) >= 2
    assert all(len(set(group)) == len(group) == seeds for group in groups.values())


def test_parts_add_up_and_ratios_are_those_of_the_times():
    for row in load("heads")["rows"]:
        assert row["nats_per_story"] == pytest.approx(
            row["prior"] + row["diffusion"] + row["reconstruction"], rel=1e-4)
    base = load("vocabulary")["cases"]["mdlm.py"]
    for case in load("vocabulary")["cases"].values():
        assert case["times_as_fast"] == pytest.approx(base["seconds"] / case["seconds"])
        assert case["share_of_memory"] == pytest.approx(case["mib"] / base["mib"])
    for name in ("codes", "adaptation"):
        made = load(name)
        assert {row["seed"] for row in made["rows"]} == set(made["seeds"])


def test_tables_of_speed_do_without_what_this_machine_has_not_measured():
    made = {k: v for k, v in load("speed").items() if "bfloat16_" not in k and "quality" not in k}
    assert "bfloat16" not in results_page.speed_train(made)
    assert "bfloat16: tokens/s" in results_page.speed_train(load("speed"))
    assert "ar.py" not in results_page.speed_quality(made)


def test_the_tokenizer_of_the_results_is_the_one_in_the_repository():
    from data.prepare import load_tokenizer
    stored = load_tokenizer(ROOT / "data" / "tales_bpe.json").fingerprint
    made = [row for path in RUNS for row in of_kind(log_of(path.stem), "config")
            if row["config"]["data"] == "tales"]
    assert {row["tokenizer"] for row in made} == {stored}


def test_the_page_has_the_options_of_the_sampler_that_the_bound_is_about():
    """`T=1, one token per step` of the tables is what a reader gets by these options."""
    found = re.findall(r"^\| (`\w+\.py`.*?) \| `(--.*--temperature 1.*)` \|$", PAGE, re.M)
    scripts = [(name, flags.split()) for names, flags in found
               for name in re.findall(r"(\w+)\.py", names)]
    assert sorted(name for name, _ in scripts) == sorted({*IDEAS} - {"ar"})
    for name, flags in scripts:
        script = script_of(name)
        cfg = script.Config()
        assert tyro.cli(script.Config, args=flags) == ancestral(script, cfg) != cfg
