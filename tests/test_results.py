"""The numbers of the README are those of results/, and those say what made them."""
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EVALS = sorted((ROOT / "results").glob("*_eval*.jsonl"))
FILES = sorted({*(ROOT / "results").glob("*.jsonl")} - {*EVALS, ROOT / "results/compare.jsonl"})
README = (ROOT / "README.md").read_text("utf-8")


def rows(path, kind):
    return [row for row in map(json.loads, path.read_text("utf-8").splitlines())
            if row["kind"] == kind]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_result_says_what_made_it(path):
    made, = rows(path, "config")
    assert {"command", "step", "device", "dtype", "threads", "torch", "machine",
            "tokenizer"} <= made["run"].keys()
    assert made["config"]["steps"] == made["run"]["step"] == rows(path, "val")[-1]["step"]
    assert "data_dir" not in made["config"] and made["config"]["seed"] == 1337


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_readme_shows_the_last_evaluation_of_a_result(path):
    last, sign = rows(path, "val")[-1], {"exact": "=", "upper": "<="}
    line, = [li for li in README.splitlines() if f"results/{path.name})" in li and li[0] == "|"]
    assert f"| {sign[last['bound']]} {last['nats_per_doc']:.1f} ± {last['se']:.1f} |" in line
    share = last["gap"] / last["floor_per_doc"]
    assert f"{last['gap']:.1f} ± {last['gap_se']:.1f} ({share:+.1%})" in line
    assert f"{sign[last['bound']]} {last['nats_per_token']:.3f} |" in README
    sample = rows(path, "samples")[-1]
    assert f"| {sample['known']:.2f} | {sample['agree']:.2f} |" in line


@pytest.mark.parametrize("path", [p for p in EVALS if "varlen" not in p.stem],
                         ids=lambda p: p.stem)
def test_the_readme_shows_the_samples_of_an_evaluation(path):
    """`| order or sampler | calls | valid | known | agree | entropy | judge | file |`, means over
    seeds."""
    made, = rows(path, "config")
    script = path.stem.split("_eval")[0].removesuffix("_10000")
    assert made["eval"].startswith(f"{script}.py eval") and "data_dir" not in made["config"]
    samples, shown, key = rows(path, "samples"), 0, dict(mdlm="order").get(script, "sampler")
    assert len({row[key] for row in samples}) >= 2
    seeds = {row["seed"] for row in samples}
    assert len(seeds) == made["config"]["eval_seeds"]
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if not line.startswith("|") or f"results/{path.name})" not in cells[-1]:
            continue
        some = [row for row in samples
                if (row[key], row["sampling_steps"]) == (cells[0], int(cells[1]))]
        means = [sum(row[key] for row in some) / len(some)
                 for key in ("valid", "known", "agree", "entropy", "judge")]
        assert cells[2:7] == [f"{mean:.2f}" for mean in means] and len(some) == len(seeds)
        shown += 1
    assert shown >= 3


def test_the_readme_shows_what_each_head_of_dit_embed_learnt():
    """`| head | first loss | last loss | bound |` of one budget; the loss that falls most is not
    the bound that falls most."""
    made = json.loads((ROOT / "results/heads.json").read_text("utf-8"))
    assert {"command", "steps", "seed", "torch", "machine", "threads"} <= made.keys()
    for row in made["rows"]:
        assert row["nats_per_story"] == pytest.approx(
            row["prior"] + row["diff"] + row["recon"], rel=1e-4)
        assert (f"| {row['name']} | {row['loss'][0]:.2f} | {row['loss'][-1]:.2f} | <= "
                f"{row['nats_per_story']:.0f} ± {row['se']:.0f} |") in README


def test_the_readme_shows_what_the_order_of_codes_is_worth():
    """`| head | mean (least to most) of three seeds | ...`, a column for each order."""
    made = json.loads((ROOT / "results/codes.json").read_text("utf-8"))
    assert {"command", "steps", "n_layer", "n_embd", "torch", "machine", "threads"} <= made.keys()
    for head in ("token", "bit"):
        shown = f"| {head} |"
        for code in ("id", "random", "frequency", "semantic"):
            nats = [row["nats_per_story"] for row in made["rows"]
                    if (row["head"], row["parts"], row["code"]) == (head, 1, code)]
            assert len(nats) == 3
            shown += f" <= {sum(nats) / 3:.1f} ({min(nats):.1f} to {max(nats):.1f}) |"
        assert shown in README


def test_the_readme_shows_what_the_vocabulary_of_gpt2_costs():
    """`| case | parameters | times as fast | share of memory |` against mdlm.py in one run."""
    made = json.loads((ROOT / "results/vocabulary.json").read_text("utf-8"))
    assert {"command", "vocab_size", "torch", "machine", "threads", "cases"} <= made.keys()
    base = made["cases"]["mdlm.py"]
    for name, case in made["cases"].items():
        assert case["times_as_fast"] == pytest.approx(base["seconds"] / case["seconds"])
        assert case["share_of_memory"] == pytest.approx(case["mib"] / base["mib"])
        assert (f"| {name} | {case['parameters'] / 1e6:.2f}M | {case['times_as_fast']:.2f} | "
                f"{case['share_of_memory']:.2f} |") in README


def test_the_readme_shows_what_each_choice_of_sdd_is_worth():
    """`| choice | steps | nats per story |`: one budget; one row as long as full attention."""
    made = json.loads((ROOT / "results/candidates.json").read_text("utf-8"))
    assert {"command", "config", "seed", "torch", "machine", "threads"} <= made.keys()
    for row in made["rows"]:
        name = f"`{row['name']}`" if row["name"][0] == "-" else row["name"]
        sign = {"exact": "=", "upper": "<="}[row["bound"]]
        assert (f"| {name} | {row['steps']} | {sign} {row['nats_per_story']:.1f} ± "
                f"{row['se']:.1f} |") in README


def test_the_readme_shows_the_leak_of_the_original_process():
    """`| case | accuracy | copy | truth among candidates in training | in sampling | known |
    entropy |`: shares near the noisy end; samples of 16 calls at temperature 0.7."""
    made = json.loads((ROOT / "results/leak.json").read_text("utf-8"))
    assert {"command", "seed", "torch", "machine", "threads"} <= made.keys()
    for row in made["rows"]:
        figures = [row.get("accuracy"), row.get("copy"), row["truth_among"]["training"][-1],
                   row["truth_among"]["sampling"][-1]]
        sample, = [s for s in row["samples"] if (s["steps"], s["temperature"]) == (16, 0.7)]
        shown = [row["name"], *("" if f is None else f"{f:.3f}" for f in figures),
                 f"{sample['known']:.2f}", f"{sample['entropy']:.2f}"]
        assert "| " + " | ".join(shown).replace("|  |", "| |") + " |" in README.replace("|  |",
                                                                                       "| |")


@pytest.mark.parametrize("path", [p for p in EVALS if "varlen" in p.stem], ids=lambda p: p.stem)
def test_the_readme_shows_what_canvases_cost_and_give(path):
    """`| canvas | k | tokens through the network per token of text | of full | valid | known |
    entropy | judge |`, means over seeds."""
    made, = rows(path, "config")
    assert made["eval"].startswith("diffugpt_varlen.py eval") and "data_dir" not in made["config"]
    samples, shown = rows(path, "samples"), 0
    mean = {}
    for canvas, k in {(row["canvas"], row["k"]) for row in samples}:
        some = [row for row in samples if (row["canvas"], row["k"]) == (canvas, k)]
        assert len(some) == made["config"]["eval_seeds"] >= 2
        mean[canvas, k] = {key: sum(row[key] for row in some) / len(some) for key in (
            "per_token", "valid", "known", "entropy", "judge")}
    for (canvas, k), row in mean.items():
        share = row["per_token"] / mean["full", k]["per_token"]
        line = (f"| {canvas} | {k} | {row['per_token']:.1f} | {share:.2f} | {row['valid']:.2f} | "
                f"{row['known']:.2f} | {row['entropy']:.2f} | {row['judge']:.2f} |")
        shown += line in README
    assert shown == len(mean) >= 10


def test_the_readme_shows_what_the_parts_of_the_adaptation_are_worth():
    """`| case | bound: mean (least to most) | length, nats | PADs said at the first call |`, three
    seeds each."""
    made = json.loads((ROOT / "results/adaptation.json").read_text("utf-8"))
    assert {"command", "config", "seed", "torch", "machine", "threads"} <= made.keys()
    names = dict.fromkeys(row["name"] for row in made["rows"])
    for name in names:
        some = [row for row in made["rows"] if row["name"] == name]
        assert [row["seed"] for row in some] == made["seeds"] and len(some) == 3
        nats = [row["nats_per_story"] for row in some]
        length, pads = (sum(row["length"][key] for row in some) / 3
                        for key in ("nats", "pad_recall"))
        assert (f"| {name} | <= {sum(nats) / 3:.1f} ({min(nats):.1f} to {max(nats):.1f}) | "
                f"{length:.2f} | {pads:.2f} |") in README


def test_the_tokenizer_of_the_results_is_the_one_in_the_repository():
    from data.prepare import load_tokenizer
    stored = load_tokenizer(ROOT / "data" / "tales_bpe.json").fingerprint
    assert {rows(path, "config")[0]["run"]["tokenizer"] for path in FILES} == {stored}


def test_the_line_counts_of_the_readme_are_those_of_the_scripts():
    for name, count in re.findall(r"^\| \[`(\w+\.py)`\]\(\1\) \| (\d+) \|", README, re.M):
        assert len((ROOT / name).read_text("utf-8").splitlines()) == int(count)


def test_the_readme_shows_what_training_and_sampling_cost():
    """`| script | tokens/s | times plain float32 | plain bfloat16 | share of peak | MiB | --help |
    first step |` and `| script | one token a call, 1 row | 16 | FAST, 1 row | 16 |` times ar.py."""
    made = json.loads((ROOT / "results/speed.json").read_text("utf-8"))
    assert {"command", "seed", "torch", "machine", "threads"} <= made.keys()
    for name in ("ar", "mdlm", "dit_embed", "bit_diffusion", "sdd", "diffugpt_varlen"):
        row, start = made[f"train_{name}"], made[f"start_{name}"]
        assert (f"| `{name}.py` | {row['tokens_per_second']:,.0f} | {row['ratio']:.1f} | "
                f"{row['ratio_bfloat16']:.1f} | {row['share_of_peak']:.0%} | "
                f"{made[f'memory_{name}']['mib']:,.0f} | {start['help']:.1f} | "
                f"{start['first_step']:.1f} |") in README
        if name != "ar":
            shown = [made[f"sample_{name}_{n}_{how}"]["times_ar_cached"]
                     for how in ("one_token_a_call", "fast") for n in (1, 16)]
            assert f"| `{name}.py` | " + " | ".join(f"{v:.1f}" for v in shown) + " |" in README


def test_the_readme_shows_the_scaling_of_width_and_steps():
    """`| script | width | 200 steps | 800 steps |`, in nats per story."""
    made = json.loads((ROOT / "results/scaling.json").read_text("utf-8"))
    assert {"command", "seed", "torch", "machine", "threads"} <= made.keys()
    rows = {(row["name"], row["n_embd"], row["steps"]): row for row in made["rows"]}
    for name, width in {key[:2] for key in rows}:
        cells = [f"{ {'exact': '=', 'upper': '<='}[row['bound']]} {row['nats_per_story']:.1f} ± "
                 f"{row['se']:.1f}" for row in (rows[name, width, s] for s in (200, 800))]
        assert f"| `{name}.py` | {width} | {cells[0]} | {cells[1]} |" in README
