"""What a comparison found: three tables, a page and five figures from its compare.jsonl.

    python lab/compare_page.py                              of results/, and tables of the READMEs
    python lab/compare_page.py --folder out/compare/quick
"""
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python lab/compare_page.py`
import common
from lab.figures import save
from lab.methods import COLORS, ENTROPY, IDEAS, code_of

METRICS = ("nfe", "gen_nll", "novelty", "length", "valid_stories", "valid_sentences", "consistent",
           "true_nll", "entropy", "distinct_2")
SIGN = dict(exact="=", upper="<=")
PARTS = dict(ancestral="T=1, one token per step", default="default sampler")


# ---- tables --------------------------------------------------------------------------------------

def means(rows):
    """Rows of one method, a row a seed -> what the tables show: means over seeds."""
    def mean(*path):
        found = []
        for row in rows:
            for key in path:
                row = row[key] if row is not None else None
            found += [row] if row is not None else []
        return sum(found) / len(found) if found else None
    first = rows[0]
    return dict(
        name=first["name"], seeds=len(rows), bound=first["test"]["bound"],
        test={k: mean("test", k) for k in first["test"] if k != "bound"},
        range=[f(row["test"]["nats_per_doc"] for row in rows) for f in (min, max)],
        **{part: {k: mean(part, k) for k in METRICS if k in first[part]} for part in PARTS
           if part in first},
        **{k: mean(k) for k in ("infill_accuracy", "parameters") if k in first})


def cell(value, digits=2):
    """A number for a table; what was not measured stays empty."""
    return "" if value is None else f"{value:.{digits}f}"


def stale(rows):
    """A mark for results that an earlier version of the script made."""
    return "†" if any(row["kind"] == "run" and row["code"] != code_of(row["name"])
                      for row in rows) else ""


def by_name(results):
    """The rows between the first and the last of a results file, name -> its rows."""
    groups = {}
    for row in results[1:-1]:
        groups.setdefault(row["name"], []).append(row)
    return groups


def markdown(head, lines):
    """A Markdown table."""
    names = head.split(" | ")
    return "\n".join("| " + " | ".join(line) + " |"
                     for line in [names, ["---"] * len(names), *lines])


def tables(results, root=""):
    """The rows of a results file -> {name: Markdown}: `methods`, `details`, `samples`. `root` leads
    from the page to the repository."""
    groups, speeds = by_name(results), results[-1]
    table, details, samples = [], [], []
    pages = sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb"))
    numbers = {page[3:]: page[:2] for page in pages}  # of a method; it may have a second part, 02b
    numbers["real"] = numbers.get("tales")
    for name, rows in groups.items():
        row, is_method = means(rows), name in IDEAS
        test, sign = row["test"], SIGN[row["bound"]]
        if "lengths" in rows[0] and not is_method:  # of many stories; the other metrics of n
            row["ancestral"]["length"] = np.mean(rows[0]["lengths"])
        best = row.get("default") or row.get("ancestral", {})
        label = f"`{name}.py`" if is_method else f"*{name}*"
        long = f"[{label}]({root}{name}.py)" if is_method else "*the corpus itself*" \
            if name == "real" else label
        size = str(len((ROOT / f"{name}.py").read_text("utf-8").splitlines())) if is_method else ""
        perplexity = f"{sign} {math.exp(test['nats_per_token']):.2f}"
        table.append([
            long + stale(rows), size, f"{sign} {test['nats_per_token']:.3f}", perplexity,
            *(cell(best.get(k)) for k in ("valid_stories", "valid_sentences", "consistent")),
            cell(best.get("length"), 0), cell(best.get("entropy")), cell(best.get("nfe"), 0),
            " ".join(f"[{page.split('_')[0]}]({root}notebooks/{page}.ipynb)" for page in pages
                     if page[:2] == numbers.get(name))])
        spread = f" ({row['range'][0]:.1f} to {row['range'][1]:.1f})" if row["seeds"] > 1 else ""
        details.append([
            label, str(row["seeds"]) if is_method else "",
            f"{sign} {test['nats_per_doc']:.1f} ± {test['se']:.1f}{spread}", perplexity,
            "" if name == "real" else f"{sign} {test['gap']:.1f} ± {test['gap_se']:.1f} "
            f"({test['gap'] / test['entropy_per_doc']:+.0%})",
            cell(row.get("infill_accuracy")), f"{row['parameters'] / 1e6:.2f}" if is_method else "",
            *(f"{1000 * speeds[part][name][k]:,.0f}" if is_method else ""
              for part in PARTS for k in (0, 1))])
        for part in PARTS:
            if part in row:
                how = "" if not is_method else "temperature 0.5" \
                    if (name, part) == ("ar", "default") else PARTS[part]
                one = row[part]
                samples.append([
                    label, how, cell(one.get("nfe"), 0), *(cell(one[k]) for k in (
                        "valid_stories", "valid_sentences", "consistent")),
                    cell(one["length"], 0), *(cell(one.get(k)) for k in (
                        "entropy", "distinct_2", "gen_nll", "novelty")),
                    cell(one["true_nll"], 1)])
    return dict(
        methods=markdown("script | lines | nats/token | perplexity | valid-story rate | "
                         "valid-sentence rate | consistency rate | tokens | entropy of tokens | "
                         "NFE | notebook", table),
        details=markdown("method | seeds | nats per story | perplexity | gap to entropy | "
                         "single-token "
                         "infilling accuracy | parameters, M | latency at batch 1, ms per story | "
                         f"at batch {speeds['n']} | default sampler: batch 1 | "
                         f"batch {speeds['n']}", details),
        samples=markdown("method | sampler | NFE | valid-story rate | valid-sentence rate | "
                         "consistency rate | tokens | entropy of tokens | distinct-2 | "
                         "generative NLL | novelty | true NLL of valid samples", samples))


def insert(page, parts):
    """Put texts between the markers `<!-- table: name -->` and `<!-- end -->` of a page."""
    for name, text in parts.items():
        begin = f"<!-- table: {name} -->\n"
        if begin in page:
            head, _, rest = page.partition(begin)
            page = f"{head}{begin}{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return page


def page(results):
    """compare.md: what made the results, the tables, the figures, two stories of each method."""
    made, parts, machines = results[0], tables(results), {}
    for row in results:
        if row["kind"] == "run":
            machines.setdefault(row["machine"], []).append(f"{row['name']} {row['seed']}")
    out = [f"# Six methods at one budget\n\nMade by `{made['command']}` from {made['tokens']:,} "
           f"tokens a run, seeds {', '.join(map(str, made['seeds']))}, torch {made['torch']}, "
           f"{made['dtype']}, {made['test']} test documents, {made['n']} "
           "samples a row. `=` is exact, `<=` an upper bound; ± is a standard error over "
           "documents, brackets are the least and most of the seeds. Latencies: "
           f"{results[-1]['machine']}, threads: {results[-1]['threads']}. Runs: "
           + "; ".join(f"{name} ({', '.join(runs)})" for name, runs in machines.items()) + ".",
           "## Likelihood", parts["details"],
           "![bound against tokens](compare_bound.png)", "## Samples", parts["samples"],
           "![quality against NFE](compare_quality.png)", "![metrics](compare_samples.png)",
           "![lengths](compare_length.png)", "![speed](compare_speed.png)",
           "## Two stories of each, as they came",
           "The first two samples of the first seed, of the default sampler (`ar.py` at "
           "temperature 0.5)."]
    for row in results[1:-1]:
        if row.get("stories") and row.get("seed", made["seeds"][0]) == made["seeds"][0]:
            label = f"`{row['name']}.py`" if row["name"] in IDEAS else row["name"]
            how = f" (seed {row['seed']}, NFE {row['default']['nfe']})" if "seed" in row else ""
            out += [f"**{label}**{how}"] + [f"> {' '.join(s.split())}" for s in row["stories"]]
    return "\n\n".join(out) + "\n"


# ---- figures -------------------------------------------------------------------------------------

def new_figure(columns, height=3.6):
    """A figure and its panels side by side."""
    figure = Figure(figsize=(9, height), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, panels


def plot_bound(runs, base):
    """Likelihood against tokens seen."""
    figure, (axes,) = new_figure(1, 4.6)
    for name, rows in runs.items():
        x = np.array([point[0] for point in rows[0]["curve"]][1:])
        x = (x + rows[0]["tokens"] - x[-1]) / 1e6  # those of a parent come before
        y = np.array([[point[1] for point in row["curve"]][1:] for row in rows])
        axes.plot(x, y.mean(0), marker="o", ms=3, color=COLORS[name],
                  label=f"{name}.py ({'exact' if name == 'ar' else 'bound'})")
        axes.fill_between(x, y.min(0), y.max(0), color=COLORS[name], alpha=0.2, lw=0)
    for name, style in (("unigram", ":"), ("3-gram", "-.")):
        axes.axhline(base[name]["test"]["nats_per_doc"], ls=style, color="gray",
                     label=f"{name} (test stories)")
    axes.axhline(base["real"]["test"]["nats_per_doc"], label="entropy", **ENTROPY)
    axes.set(xlabel="million tokens seen in training (diffugpt_varlen.py: after its parent)",
             ylabel="nats per story", yscale="log",
             title="128 validation stories, 8 draws of noise: mean and range of the seeds")
    low, high = axes.get_ylim()
    ticks = [t for t in (80, 100, 130, 170, 220, 300, 400, 600, 800) if low < t < high]
    axes.set_yticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.legend(fontsize=8, ncols=2)
    return figure


def plot_quality(runs, base):
    """Metrics of the default sampler against NFE, first seed."""
    figure, panels = new_figure(3)
    for axes, (metric, title) in zip(panels, (
            ("valid_sentences", "valid-sentence rate"), ("consistent", "consistency rate"),
            ("entropy", "entropy of tokens, nats"))):
        for name, (row, *_) in runs.items():
            points = sorted((p["nfe"], p[metric]) for p in [*row["frontier"], row["default"]])
            axes.plot(*zip(*points), marker="o", ms=4, color=COLORS[name], label=f"{name}.py")
        axes.axhline(base["real"]["ancestral"][metric], label="test stories", **ENTROPY)
        axes.set(xlabel="NFE", title=title, xscale="log")
        axes.set_xticks((4, 8, 16, 32, 64, 128), (4, 8, 16, 32, 64, 128))
        axes.minorticks_off()
    panels[2].legend(fontsize=7, loc="lower right")
    return figure


def bars(axes, parts, title):
    """A bar for each method and part, {part: {name: value}}; parts stand beside each other."""
    for k, values in enumerate(parts.values()):
        at = [i + (0.4 * k - 0.2 if len(parts) > 1 else 0) for i in range(len(values))]
        axes.bar(at, list(values.values()), 0.38 if len(parts) > 1 else 0.8, edgecolor="white",
                 hatch="//" if k else "", color=[COLORS[name] for name in values],
                 label=[*PARTS.values()][k])
    axes.set_xticks(range(len(values)), values, rotation=40, ha="right", fontsize=7)
    axes.set_title(title, fontsize=10)


def plot_samples(runs, base):
    """Three metrics of both samplers."""
    figure, panels = new_figure(3)
    kept = {name: means(rows) for name, rows in runs.items()}
    for axes, metric, title in zip(panels, ("valid_stories", "consistent", "true_nll"), (
            "valid-story rate", "consistency rate", "true NLL of valid samples, nats")):
        bars(axes, {part: {name: row[part][metric] or 0 for name, row in kept.items()}
                    for part in PARTS}, title)
        axes.axhline(base["real"]["ancestral"][metric], label="test stories", **ENTROPY)
    panels[0].legend(fontsize=7)
    return figure


def plot_length(runs, base):
    """Lengths of ancestral samples."""
    figure, (axes,) = new_figure(1)
    real = base["real"]["lengths"]
    lengths = {name: sum((row["lengths"] for row in rows), []) for name, rows in runs.items()}
    bins = np.arange(0, max(max(some) for some in (real, *lengths.values())) + 11, 10)
    axes.hist(real, bins, density=True, color="lightgray", label="validation stories")
    for name, some in lengths.items():
        axes.hist(some, bins, density=True, histtype="step", color=COLORS[name],
                  label=f"{name}.py")
    axes.set(xlabel="tokens of a story", ylabel="density",
             title="Lengths at T=1, one token per step")
    axes.legend(fontsize=7)
    return figure


def plot_speed(runs, speeds):
    """Training, and sampling at batch 1 and at a larger one."""
    figure, panels = new_figure(3)
    bars(panels[0], dict(train={name: speeds["train"][name] for name in runs}),
         "training, tokens a second, in turns")
    for k, n in enumerate((1, speeds["n"])):
        bars(panels[1 + k], {part: {name: speeds[part][name][k] for name in runs}
                             for part in PARTS}, f"seconds for a story, {n} at a time")
    panels[2].margins(y=0.25)  # room for the legend
    panels[2].legend(fontsize=7, loc="upper left")
    return figure


# ---- main ----------------------------------------------------------------------------------------

def publish(folder):
    """Write compare.md and the figures beside folder/compare.jsonl and, for results/, the tables of
    README.md and results/README.md; print the tables."""
    path = Path(folder) / "compare.jsonl"
    results = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    groups = by_name(results)
    runs = {name: rows for name, rows in groups.items() if name in IDEAS}
    base = {name: rows[0] for name, rows in groups.items() if name not in IDEAS}
    for name, figure in dict(
            bound=plot_bound(runs, base), quality=plot_quality(runs, base),
            samples=plot_samples(runs, base), length=plot_length(runs, base),
            speed=plot_speed(runs, results[-1])).items():
        save(figure, path.with_name(f"compare_{name}.png"))
    common.replace(path.with_name("compare.md"), lambda file: file.write(page(results).encode()))
    if path.resolve().parent == ROOT / "results":
        for readme, root in ((ROOT / "README.md", ""), (ROOT / "results/README.md", "../")):
            text = insert(readme.read_text("utf-8"), tables(results, root))
            common.replace(readme, lambda file: file.write(text.encode()))
    print("\n" + "\n\n".join(tables(results).values()) + f"\n\n{path}, compare.md, five figures")


@dataclass
class Options:
    folder: str = "results"  # where compare.jsonl is


def main(argv):
    publish(tyro.cli(Options, args=argv, description=__doc__).folder)


if __name__ == "__main__":
    common.run_main(main)
