"""The tables of results/README.md, made anew from the files beside it.

    python lab/results_page.py

Those of the comparison come from `python lab/compare.py table`.
"""
import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python lab/results_page.py`
import common
from lab.compare_page import SIGN, cell, insert, markdown

RESULTS = ROOT / "results"
RUNS = ("ar ar_10000 mdlm mdlm_10000 dit_embed dit_embed_10000 bit_diffusion bit_diffusion_10000 "
        "sdd sdd_10000 diffugpt_varlen diffugpt_varlen_10000").split()
SAMPLES = dict(  # file: (the setting of a row, which rows are shown)
    mdlm_eval=("order", [("maxprob", (8, 16, 32, 64, 160)), ("random", (32, 160)),
                         ("margin", (32,)), ("entropy", (32,))]),
    mdlm_eval_plain=("order", [("random", (16, 32, 160)), ("maxprob", (32, 160))]),
    dit_embed_eval=("sampler", [("token", (16, 32, 64, 160)), ("ancestral", (16, 32, 160)),
                                ("ddim", (16, 32, 160))]),
    bit_diffusion_eval=("sampler", [("token", (8, 16, 32, 64, 160)),
                                    ("bit", (8, 16, 32, 64, 160))]),
    sdd_eval=("sampler", [("token", (16, 32, 64, 160)), ("ancestral", (16, 32, 160)),
                          ("deterministic", (16, 32, 160))]))
METRICS = dict(valid_stories="valid-story rate", valid_sentences="valid-sentence rate",
               consistent="consistency rate", length="tokens", entropy="entropy of tokens",
               gen_nll="generative NLL")


def log_of(name):
    """The rows of a .jsonl."""
    return [json.loads(line) for line in
            (RESULTS / f"{name}.jsonl").read_text("utf-8").splitlines()]


def of_kind(rows, kind):
    """The rows of a log of one kind: config, train, val, samples."""
    return [row for row in rows if row["kind"] == kind]


def mean(rows, key):
    """The mean over rows; None where it was not measured."""
    found = [row[key] for row in rows if row.get(key) is not None]
    return sum(found) / len(found) if found else None


def spread(sign, nats):
    """Mean (least to most) of several seeds."""
    return f"{sign} {mean([dict(v=v) for v in nats], 'v'):.1f} ({min(nats):.1f} to {max(nats):.1f})"


def metrics_of(rows):
    """The cells of METRICS, means over rows."""
    return [cell(mean(rows, key), 0 if key == "length" else 2) for key in METRICS]


def steps_of(config):
    """The optimizer steps of a run, those of a parent before a +."""
    parent = config.get("init_from") == "parent"
    return f"{config['parent_steps']} + {config['steps']}" if parent else str(config["steps"])


def runs():
    """Single runs: the last evaluation and the samples at the end."""
    lines = []
    for name in RUNS:
        if not (RESULTS / f"{name}.jsonl").exists():
            continue
        log = log_of(name)
        made, last, sample = (of_kind(log, kind)[-1] for kind in ("config", "val", "samples"))
        sign, steps = SIGN[last["bound"]], steps_of(made["config"])
        command = re.sub(r" --out[= ]out/(compare|long)/\S+", "", made["command"])
        lines.append([
            f"`python {command}`", steps,
            f"{sign} {last['nats_per_doc']:.1f} ± {last['se']:.1f}",
            f"{sign} {last['gap']:.1f} ± {last['gap_se']:.1f}",
            f"{sign} {last['nats_per_token']:.3f}",
            f"{sign} {math.exp(last['nats_per_token']):.2f}",
            *metrics_of([sample])[:5], f"[{name}.jsonl]({name}.jsonl)"])
    return markdown(" | ".join([
        "command", "steps", "nats per story", "gap to entropy", "nats/token", "perplexity",
        *list(METRICS.values())[:5], "file"]), lines)


def real_text():
    """Counts and runs on real text: the last evaluation and, as ar.py overfits, the best."""
    def row(data, what, steps, last, best, path):
        sign = SIGN[last["bound"]]
        return [data, what, steps,
                f"{sign} {last['nats_per_token']:.3f} ± {last['nats_per_token_se']:.3f}", best,
                f"{sign} {math.exp(last['nats_per_token']):.2f}",
                f"{sign} {last['bits_per_byte']:.3f}", f"[{path.name}]({path.name})"]

    lines = []
    for counts in sorted(RESULTS.glob("real_*_ngrams.json")):
        data = counts.stem.split("_")[1]
        for order, last in json.loads(counts.read_text("utf-8"))["orders"].items():
            name = "unigram" if order == "1" else f"{order}-gram"
            lines.append(row(data, f"*{name}*", "", last, "", counts))
        for path in sorted(RESULTS.glob(f"real_{data}_*.jsonl")):
            log = log_of(path.stem)
            made, vals = of_kind(log, "config")[-1], of_kind(log, "val")
            best = min(vals, key=lambda row: row["nats_per_token"])
            lines.append(row(data, f"`{made['command'].split()[0]}`", steps_of(made["config"]),
                             vals[-1], f"{best['nats_per_token']:.3f} ({best['step']})", path))
    return markdown("text | model | steps | nats/token | best (step) | perplexity | bits/byte | "
                    "file", lines)


def samples(name):
    """Samples of a checkpoint against NFE, means over seeds; real text and ar.py for comparison."""
    key, shown = SAMPLES[name]
    log, lines = log_of(name), []
    for value, steps in shown:
        for num_steps in steps:
            some = [row for row in of_kind(log, "samples")
                    if (row[key], row["num_steps"]) == (value, num_steps)]
            lines.append([value, f"{mean(some, 'nfe'):.0f}", *metrics_of(some)])
    lines.append(["*test stories*", "", *metrics_of(of_kind(log, "real"))])
    return markdown(" | ".join([key, "NFE", *METRICS.values()]), lines)


def lengths(name):
    """What the length modes of diffugpt_varlen.py cost and give."""
    groups, lines = {}, []
    for row in of_kind(log_of(name), "samples"):
        groups.setdefault((row["length_mode"], row["tokens_per_step"]), []).append(row)
    for (mode, k), some in groups.items():
        cost = mean(some, "processed_per_sample")
        share = cost / mean(groups["fixed", k], "processed_per_sample")
        lines.append([mode, str(k), f"{cost:,.0f}", f"{share:.2f}", *metrics_of(some)])
    return markdown(" | ".join([
        "length mode", "tokens per step", "tokens processed per story",
        "relative to fixed length", *METRICS.values()]), lines)


def steps():
    """The bound of samplers with few steps."""
    sizes, lines = (4, 8, 16, 32, 64, 160), []
    for script in ("mdlm", "dit_embed", "bit_diffusion", "sdd"):
        rows = {(row.get("sampler", "ancestral"), row["num_steps"]): row
                for row in of_kind(log_of(f"{script}_eval"), "steps")}
        for sampler in dict.fromkeys(key[0] for key in rows):
            lines.append([f"`{script}.py`", sampler, *(
                f"<= {rows[sampler, n]['nats_per_row']:.0f} ± {rows[sampler, n]['se']:.0f}"
                if (sampler, n) in rows else "" for n in sizes)])
    return markdown(" | ".join(["script", "sampler", *(f"{n} steps" for n in sizes)]), lines)


def length_table():
    """What is known of the length at the first network evaluation."""
    names = dict(model="the model", training="training lengths alone")
    return markdown("distribution | quantile | length, nats | coverage | looseness", [
        [names[row["of"]], f"{row['quantile']:g}", f"{row['nats']:.2f} ± {row['nats_se']:.2f}",
         f"{row['coverage']:.2f}", f"{row['looseness']:.1f}"]
        for row in of_kind(log_of("diffugpt_varlen_eval"), "length")
        if row["quantile"] in (0.5, 0.9, 0.99)])


def heads(made):
    """Training loss and bound of each prediction type."""
    return markdown("prediction | loss at the first step | at the last step | bound, nats per "
                    "story", [[row["name"], f"{row['loss'][0]:.2f}", f"{row['loss'][-1]:.2f}",
                               f"<= {row['nats_per_story']:.0f} ± {row['se']:.0f}"]
                              for row in made["rows"]])


def codes(made):
    """Mean and range over seeds for each order of the codes."""
    orders, lines = ("id", "random", "frequency", "semantic"), []
    for head in dict.fromkeys(row["name"] for row in made["rows"]):
        nats = [[row["nats_per_story"] for row in made["rows"]
                 if (row["name"], row["code"]) == (head, order)] for order in orders]
        lines.append([head, *(spread("<=", some) if some else "" for some in nats)])
    return markdown(" | ".join(["head", *orders]), lines)


def vocabulary(made):
    """What GPT-2's vocabulary costs, relative to mdlm.py in one run."""
    return markdown("script or head | parameters | times as fast | share of its memory", [
        [name, f"{case['parameters'] / 1e6:.2f}M", f"{case['times_as_fast']:.2f}",
         f"{case['share_of_memory']:.2f}"] for name, case in made["cases"].items()])


def candidates(made):
    """One choice of sdd.py changed at a time."""
    return markdown("choice | steps | nats per story", [
        [f"`{row['name']}`" if row["name"][0] == "-" else row["name"], str(row["steps"]),
         f"{SIGN[row['bound']]} {row['nats_per_story']:.1f} ± {row['se']:.1f}"]
        for row in made["rows"]])


def leak(made):
    """The original process: shares near the noisy end; samples of 16 steps at temperature 1."""
    lines, keys = [], ("valid_sentences", "entropy", "distinct_2")
    for row in made["rows"]:
        shares = [row.get("accuracy"), row.get("copy"),
                  *(row["truth_among"][key][-1] for key in ("training", "sampling"))]
        sample, = [s for s in row["samples"] if (s["steps"], s["temperature"]) == (16, 1.0)]
        lines.append([row["name"], *(cell(share, 3) for share in shares),
                      *(f"{sample[key]:.2f}" for key in keys)])
    lines.append(["*validation stories*", "", "", "", "",
                  *(f"{made['real'][key]:.2f}" for key in keys)])
    return markdown("process | accuracy | copy baseline | truth in training | in sampling | "
                    "valid-sentence rate | entropy of tokens | distinct-2", lines)


def adaptation(made):
    """One part of the recipe of diffugpt_varlen.py changed at a time, three seeds."""
    lines = []
    for name in dict.fromkeys(row["name"] for row in made["rows"]):
        some = [row for row in made["rows"] if row["name"] == name]
        size = [row["length"] for row in some]
        lines.append([name, spread("<=", [row["nats_per_story"] for row in some]),
                      f"{mean(size, 'nats'):.2f}", f"{mean(size, 'pad_recall'):.2f}"])
    nats = made["rows"][0]["training_length"]["nats"]
    lines.append(["*training lengths alone*", "", f"{nats:.2f}", ""])
    return markdown("case | bound, nats per story | length, nats | PAD recall", lines)


def scaling(made):
    """Nats per story by width and steps."""
    found = {(row["name"], row["n_embd"], row["steps"]): row for row in made["rows"]}
    steps = sorted({key[2] for key in found})
    return markdown(" | ".join(["script", "width", *(f"{n} steps" for n in steps)]), [
        [f"`{name}.py`", str(width), *(
            f"{SIGN[row['bound']]} {row['nats_per_story']:.1f} ± {row['se']:.1f}"
            for row in (found[name, width, n] for n in steps))]
        for name, width in dict.fromkeys(key[:2] for key in sorted(found))])


def speed_train(made):
    """Training steps beside nanoGPT's, one thread."""
    lines, kinds = [], [kind for kind in ("float32", "bfloat16") if f"train_{kind}_1" in made]
    for name in made["train_float32_1"]:
        label = {"reference": "nanoGPT's step", "ar_compiled": "`ar.py --compile yes`",
                 "mdlm_compiled": "`mdlm.py --compile yes`"}.get(name, f"`{name}.py`")
        start = made.get(f"start_{name}")
        parts = [made[f"train_{kind}_1"][name] for kind in kinds]
        lines.append([label, *(text for part in parts for text in (
            f"{part['tokens_per_cpu_second']:,.0f}", f"{part['ratio']:.2f}")),
            f"{made[f'memory_{name}']['mib']:,.0f}" if start else "",
            f"{start['first_step']:.1f}" if start else ""])
    columns = " | ".join(f"{kind}: tokens/s | ratio" for kind in kinds)
    return markdown(f"script | {columns} | MiB | first step, s", lines)


def speed_sample(made):
    """Time of samples relative to ar.py with its cache."""
    names = [key.split("_1_")[0].removeprefix("sample_") for key in made
             if key.startswith("sample_") and key.endswith("_1_default")]
    return markdown("script | T=1, one token per step: batch 1 | batch 16 | default "
                    "sampler: batch 1 | batch 16", [
                        [f"`{name}.py`", *(
                            f"{made[f'sample_{name}_{n}_{how}']['times_ar_cached']:.1f}"
                            for how in ("ancestral", "default") for n in (1, 16))]
                        for name in names])


def speed_quality(made):
    """What is learned in equal times."""
    lines = []
    for name, label, sign in (("ar", "`ar.py`", "="), ("reference", "nanoGPT's step", "="),
                              ("mdlm", "`mdlm.py`", "<="), (
            "mdlm_adamw", "`mdlm.py`, AdamW, no convolutions", "<=")):
        after = [made.get(f"quality_{name}_{seconds}") for seconds in (120, 300)]
        if None in after:  # not measured yet
            continue
        lines.append([label, f"{after[0]['rate']:g}", *(
            f"{sign} {row['nats_per_doc']:.1f} ({row['steps']})" for row in after)])
    return markdown("what | learning rate | 2 minutes | 5 minutes", lines)


def tables():
    """{name: Markdown} of all files that are there."""
    parts = dict(runs=runs(), real_text=real_text(), steps=steps(), lengths=length_table())
    for name in SAMPLES:
        parts[name] = samples(name)
    for name in ("diffugpt_varlen_eval", "diffugpt_varlen_eval_plain"):
        parts[name] = lengths(name)
    for make in (heads, codes, vocabulary, candidates, leak, adaptation, scaling):
        name = make.__name__
        parts[name] = make(json.loads((RESULTS / f"{name}.json").read_text("utf-8")))
    made = json.loads((RESULTS / "speed.json").read_text("utf-8"))
    return parts | dict(speed_train=speed_train(made), speed_sample=speed_sample(made),
                        speed_quality=speed_quality(made))


def main(argv):
    common.show_help(argv, __doc__)
    if argv:
        raise common.UserError("usage: python lab/results_page.py")
    path = RESULTS / "README.md"
    text = insert(path.read_text("utf-8"), tables())
    common.replace(path, lambda file: file.write(text.encode()))
    print(path)


if __name__ == "__main__":
    common.run_main(main)
