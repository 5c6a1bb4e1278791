"""The numbers of results/README.md are those of the files beside it, which say what made them."""
import json
import operator
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EVALS = sorted((ROOT / "results").glob("*_eval*.jsonl"))
FILES = sorted({*(ROOT / "results").glob("*.jsonl")} - {*EVALS, ROOT / "results/compare.jsonl"})
PAGE = (ROOT / "results/README.md").read_text("utf-8")
NAME, SIGN = operator.attrgetter("stem"), dict(exact="=", upper="<=")


def rows(path, kind):
    made = map(json.loads, path.read_text("utf-8").splitlines())
    return [row for row in made if row["kind"] == kind]


def load(name):
    return json.loads((ROOT / f"results/{name}.json").read_text("utf-8"))


def mean(some, key):
    return sum(row[key] for row in some) / len(some)


def num_seeds(made):
    """How often each setting was sampled; a file of an earlier day says it in its config."""
    return made["options"]["seeds"] if "options" in made else made["config"]["eval_seeds"]


def spread(nats):
    return f"<= {sum(nats) / len(nats):.1f} ({min(nats):.1f} to {max(nats):.1f})"


@pytest.mark.parametrize("path", FILES, ids=NAME)
def test_the_page_shows_the_last_evaluation_of_a_run(path):
    """`| ... | nats per story | gap | nats/token | valid sentences | consistency | file |`"""
    made, last, sample = (rows(path, kind)[-1] for kind in ("config", "val", "samples"))
    assert made.get("run", made).keys() >= {"device", "dtype", "tokenizer"}
    assert made["config"]["steps"] == last["step"]
    assert "data_dir" not in made["config"] and made["config"]["seed"] == 1337
    line, = [li for li in PAGE.splitlines() if f"]({path.name})" in li and li[0] == "|"]
    sign, share = SIGN[last["bound"]], last["gap"] / last["entropy_per_doc"]
    assert (f"| {sign} {last['nats_per_doc']:.1f} ± {last['se']:.1f} | {sign} {last['gap']:.1f} ± "
            f"{last['gap_se']:.1f} ({share:+.1%}) | {sign} {last['nats_per_token']:.3f} | "
            f"{sample['valid_sentences']:.2f} | {sample['consistent']:.2f} |") in line


@pytest.mark.parametrize("path", [p for p in EVALS if "varlen" not in p.name], ids=NAME)
def test_the_page_shows_the_samples_of_an_evaluation(path):
    """`| order or sampler | NFE | metrics ... | file |`, means over seeds."""
    made, = rows(path, "config")
    script = path.stem.split("_eval")[0].removesuffix("_10000")
    assert "data_dir" not in made["config"]
    samples, shown, key = rows(path, "samples"), 0, "order" if script == "mdlm" else "sampler"
    seeds = len({row["seed"] for row in samples})
    assert len({row[key] for row in samples}) >= 2 and seeds == num_seeds(made)
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if not line.startswith("|") or f"]({path.name})" not in cells[-1]:
            continue
        some = [row for row in samples
                if (row[key], row["num_steps"]) == (cells[0], int(cells[1]))]
        assert len(some) == seeds and cells[2:7] == [f"{mean(some, k):.2f}" for k in (
            "valid_stories", "valid_sentences", "consistent", "entropy", "gen_nll")]
        shown += 1
    assert shown >= 3


def heads(made):
    """`| prediction | first loss | last loss | bound |` of one budget."""
    for row in made["rows"]:
        assert row["nats_per_story"] == pytest.approx(
            row["prior"] + row["diffusion"] + row["reconstruction"], rel=1e-4)
        yield (f"| {row['name']} | {row['loss'][0]:.2f} | {row['loss'][-1]:.2f} | <= "
               f"{row['nats_per_story']:.0f} ± {row['se']:.0f} |")


def codes(made):
    """A column for each order: mean (least to most) of three seeds."""
    for head in ("token", "bit"):
        nats = {code: [row["nats_per_story"] for row in made["rows"]
                       if (row["head"], row["num_mixture"], row["code"]) == (head, 1, code)]
                for code in ("id", "random", "frequency", "semantic")}
        assert {len(n) for n in nats.values()} == {3}
        yield f"| {head} | {' | '.join(map(spread, nats.values()))} |"


def vocabulary(made):
    """`| case | parameters | times as fast | share of memory |` against mdlm.py in one run."""
    base = made["cases"]["mdlm.py"]
    for name, case in made["cases"].items():
        assert case["times_as_fast"] == pytest.approx(base["seconds"] / case["seconds"])
        assert case["share_of_memory"] == pytest.approx(case["mib"] / base["mib"])
        yield (f"| {name} | {case['parameters'] / 1e6:.2f}M | {case['times_as_fast']:.2f} | "
               f"{case['share_of_memory']:.2f} |")


def candidates(made):
    """`| choice | steps | nats per story |`: one budget; one row as long as full attention."""
    for row in made["rows"]:
        name = f"`{row['name']}`" if row["name"][0] == "-" else row["name"]
        yield (f"| {name} | {row['steps']} | {SIGN[row['bound']]} {row['nats_per_story']:.1f} ± "
               f"{row['se']:.1f} |")


def leak(made):
    """Shares near the noisy end; samples of 16 steps at temperature 0.7."""
    for row in made["rows"]:
        figures = [row.get("accuracy"), row.get("copy"),
                   *(row["truth_among"][key][-1] for key in ("training", "sampling"))]
        sample, = [s for s in row["samples"] if (s["steps"], s["temperature"]) == (16, 0.7)]
        shown = [row["name"], *("" if f is None else f"{f:.3f}" for f in figures),
                 f"{sample['valid_sentences']:.2f}", f"{sample['entropy']:.2f}"]
        yield f"| {' | '.join(shown)} |"


def adaptation(made):
    """`| case | bound: mean (least to most) | length, nats | PAD recall |`, three seeds each."""
    for name in dict.fromkeys(row["name"] for row in made["rows"]):
        some = [row for row in made["rows"] if row["name"] == name]
        assert [row["seed"] for row in some] == made["seeds"] and len(some) == 3
        lengths = [row["length"] for row in some]
        yield (f"| {name} | {spread([row['nats_per_story'] for row in some])} | "
               f"{mean(lengths, 'nats'):.2f} | {mean(lengths, 'pad_recall'):.2f} |")


def speed(made):
    """Two tables: training, and samples relative to ar.py (ancestral and default, batch 1, 16)."""
    float32, bfloat16 = made["train_float32_1"], made.get("train_bfloat16_1", {})
    for name, row in float32.items():
        label = {"reference": "nanoGPT's step", "ar_compiled": "`ar.py --compile`",
                 "mdlm_compiled": "`mdlm.py --compile`"}.get(name, f"`{name}.py`")
        line = f"| {label} | {row['tokens_per_cpu_second']:,.0f} | {row['ratio']:.2f} | "
        line += f"{bfloat16[name]['tokens_per_cpu_second']:,.0f} | {bfloat16[name]['ratio']:.2f} |"
        if f"start_{name}" in made:
            start = made[f"start_{name}"]
            line += f" {made[f'memory_{name}']['mib']:,.0f} | {start['first_step']:.1f} |"
        yield line
        if f"sample_{name}_1_default" in made:
            shown = [made[f"sample_{name}_{n}_{how}"]["times_ar_cached"]
                     for how in ("ancestral", "default") for n in (1, 16)]
            yield f"| `{name}.py` | " + " | ".join(f"{v:.1f}" for v in shown) + " |"
    for name, label, sign in (("ar", "`ar.py`", "="), ("reference", "nanoGPT's step", "="),
                              ("mdlm", "`mdlm.py`", "<="), (
            "mdlm_adamw", "`mdlm.py`, AdamW, no convolutions", "<=")):
        after = [made[f"quality_{name}_{seconds}"] for seconds in (120, 300)]
        yield f"| {label} | {after[0]['rate']:g} | " + " | ".join(
            f"{sign} {row['nats_per_doc']:.1f} ({row['steps']})" for row in after) + " |"


def scaling(made):
    """`| script | width | 200 steps | 800 steps |`, in nats per story."""
    found = {(row["name"], row["n_embd"], row["steps"]): row for row in made["rows"]}
    for name, width in {key[:2] for key in found}:
        cells = [f"{SIGN[row['bound']]} {row['nats_per_story']:.1f} ± {row['se']:.1f}"
                 for row in (found[name, width, steps] for steps in (200, 800))]
        yield f"| `{name}.py` | {width} | {cells[0]} | {cells[1]} |"


@pytest.mark.parametrize("lines", [heads, codes, vocabulary, candidates, leak, adaptation, speed,
                                   scaling], ids=operator.attrgetter("__name__"))
def test_the_page_shows_every_row_of_a_file(lines):
    """The lines of the table that belong to results/NAME.json."""
    for line in lines(load(lines.__name__)):
        assert line in PAGE


@pytest.mark.parametrize("path", [p for p in EVALS if "varlen" in p.name], ids=NAME)
def test_the_page_shows_what_length_modes_cost_and_give(path):
    """`| length mode | tokens per step | cost per output token | relative to fixed | metrics |`."""
    made, = rows(path, "config")
    assert "data_dir" not in made["config"]
    groups = {}
    for row in rows(path, "samples"):
        groups.setdefault((row["length_mode"], row["tokens_per_step"]), []).append(row)
    for (mode, k), some in groups.items():
        assert len(some) == num_seeds(made) >= 2
        cost = mean(some, "processed_per_token")
        metrics = " | ".join(f"{mean(some, key):.2f}" for key in (
            "valid_stories", "valid_sentences", "entropy", "gen_nll"))
        share = cost / mean(groups["fixed", k], "processed_per_token")
        assert f"| {mode} | {k} | {cost:.1f} | {share:.2f} | {metrics} |" in PAGE
    assert len(groups) >= 10


def test_the_tokenizer_of_the_results_is_the_one_in_the_repository():
    from data.prepare import load_tokenizer
    stored = load_tokenizer(ROOT / "data" / "tales_bpe.json").fingerprint
    made = [row for path in FILES for row in rows(path, "config")]
    assert {row.get("run", row)["tokenizer"] for row in made} == {stored}
