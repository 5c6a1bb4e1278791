"""Keep the log of a run as a small file.

    python lab/collect.py out/mdlm results/mdlm.jsonl

The first line holds what made the numbers (command, config, seed, versions, hardware); then come
the evaluations with the tokens seen and samples, and one training row in 25. Of absolute paths the
last name is kept.
"""
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python lab/collect.py`
import common


def collect(out, target, every=25):
    """Copy what made a run and its log into one small JSON-lines file."""
    rows = [row for row in common.read_log(out)
            if row["kind"] != "train" or row["step"] % every == 0]
    if not rows:
        raise common.UserError(f"no log of a run in {out}")
    cfg = next(row for row in rows if row["kind"] == "config")["config"]
    for row in rows:
        if row["kind"] == "val":
            row["tokens"] = row["step"] * cfg["batch_size"] * cfg["grad_accum"] * cfg["seq_len"]
    text = re.sub(r'(?<=[" =])/[^ "]*/', "", "".join(json.dumps(row) + "\n" for row in rows))
    common.replace(Path(target), lambda file: file.write(text.encode()))
    return len(rows)


def main(argv):
    common.show_help(argv, __doc__)
    if len(argv) != 2 or argv[0].startswith("-"):
        raise common.UserError("usage: python lab/collect.py RUN_FOLDER TARGET.jsonl")
    print(collect(*argv), "rows")


if __name__ == "__main__":
    common.run_main(main)
