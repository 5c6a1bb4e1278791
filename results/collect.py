"""Keep the log of a run: `python results/collect.py out/mdlm results/mdlm.jsonl`.

The first line holds what made the numbers (command, config, seed, versions, hardware); then come
the evaluations and samples, and one training row in `every`.
"""
import json
import sys
from pathlib import Path


def collect(out, target, every=25):
    """Copy what made a run and its log into one small JSON-lines file."""
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] != "train" or row["step"] % every == 0]
    if (Path(out) / "config.json").exists():  # a script on common_v1.py: the log has no such row
        made = json.loads((Path(out) / "config.json").read_text())
        del made["config"]["data_dir"]  # a path of the machine it ran on
        rows.insert(0, dict(kind="config", **made))
    Path(target).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python results/collect.py RUN_FOLDER TARGET.jsonl")
    print(collect(*sys.argv[1:]), "rows")
