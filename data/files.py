"""Mistakes that become one sentence, and files that are written whole or not at all."""
import contextlib
import errno
import json
import os
import re
import sys
import textwrap
from pathlib import Path


class UserError(Exception):
    """A mistake the user can repair. One sentence: what is wrong and what to do."""


def run_main(main):
    """Call main(argv). A UserError, a file that cannot be used and a full memory are one sentence
    on stderr and exit code 2, Ctrl-C is exit code 130; what is a fault of ours keeps its traceback.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by the shell
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that cannot show a letter shows "?"
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main(sys.argv[1:])
        return sys.stdout.flush()
    except KeyboardInterrupt as stop:
        print(stop if stop.args else "interrupted", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        text = error
    except OSError as error:
        if not error.filename:  # the output itself: nothing more must be written to it at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader of our output has seen enough (head)
            sys.exit(1)
        text = (f"cannot use {error.filename or 'the output'} ({error.strerror or error}): check "
                "its rights and the free space, or choose another folder with --out; what was "
                "saved before is kept")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(
                "out of memory|can't allocate memory", str(error)):
            raise
        text = ("the memory is full: lower --batch-size (and raise --grad-accum), --seq-len or "
                "--num-samples")
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def show_help(argv, doc):
    """Print the docstring of a command that has no options, if --help asks for it, and end."""
    if {"-h", "--help"} & {*argv}:
        print(doc)
        raise SystemExit(0)


def replace(path, write):
    """write(temporary file), sync it, rename it to `path`: a crash or a full disk in between
    leaves the old file whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a crash; "x": never through somebody's link
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save has its own words for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(getattr(error, "errno", errno.EIO), getattr(
            error, "strerror", "it was not written whole"), str(path)) from None


@contextlib.contextmanager
def usable(path):
    """Turn every error inside the block into a UserError that names the file `path`."""
    try:
        yield path
    except Exception as error:  # torch and safetensors have many ways to say it
        raise UserError(f"{path} is missing, broken or of other settings: train first, or choose "
                        f"another --out ({textwrap.shorten(str(error), 160)})") from None


def read_log(out):
    """The rows of the log.jsonl in folder `out`; a line that a crash has cut off is left out."""
    path, rows = Path(out) / "log.jsonl", []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "kind" in row and
            isinstance(row.get("step"), int)]
