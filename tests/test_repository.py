"""Promises that every file keeps: readable, importable, clean, and true to its equations."""
import ast
import builtins
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["ar", "mdlm", "dit_embed", "bit_diffusion", "sdd", "diffugpt_varlen"]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
CODE = sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
ME = Path(__file__)
each = pytest.mark.parametrize("name", SCRIPTS)
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def read(path):
    return path.read_text("utf-8")


def kept():
    """The files that git keeps or would add."""
    try:
        names = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT,
                               check=True, capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def section(name, first, last):
    """The syntax tree of the sections first..last - 1 of a script."""
    lines = read(ROOT / f"{name}.py").splitlines()
    at = [next(i for i, line in enumerate(lines) if re.match(rf"# (---- )?{n}\. ", line))
          for n in (first, last)]
    return ast.parse("\n".join(lines[at[0]:at[1]]))


def cells(path, kind):
    return [cell for cell in json.loads(read(path))["cells"] if cell["cell_type"] == kind]


# ---- the shape of the code -----------------------------------------------------------------------

@each
def test_sections_4_and_5_hold_the_method_and_nothing_else(name):
    """No input or output, logging, choice of device, autocast, classes or closures."""
    tree = section(name, 4, 6)
    words = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    words |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not words & {
        "print", "open", "input", "logging", "tqdm", "write", "read_text", "write_text", "Path",
        "os", "sys", "json", "time", "common", "run", "say", "autocast", "amp", "cuda", "compile",
        "is_available", "device_count", "environ"}
    assert not any(isinstance(n, (ast.ClassDef, ast.Import, ast.ImportFrom, ast.Global))
                   for n in ast.walk(tree))
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    inner = [n for f in functions for n in ast.walk(f) if isinstance(n, ast.FunctionDef)]
    assert len(inner) == len(functions), "a function inside a function"
    assert {"loss_fn", "sample"} <= {f.name for f in functions}


@each
def test_sections_3_to_5_use_torch_and_the_standard_library_alone(name):
    """Every name is defined there, or is torch, nn, F, math or SimpleNamespace, or a builtin."""
    tree = section(name, 3, 6)
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    made = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)
            and not isinstance(n.ctx, ast.Load)}
    made |= {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    made |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    assert used - made - set(dir(builtins)) <= {"torch", "nn", "F", "math", "SimpleNamespace"}


def test_common_is_plumbing_only():
    """No modules, losses, schedules, samplers, optimizers, learning rates or training loops."""
    tree = ast.parse(read(ROOT / "common.py"))
    imported = {alias.name for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))
                for alias in n.names} | {n.module for n in ast.walk(tree)
                                         if isinstance(n, ast.ImportFrom)}
    assert not imported & {"torch.nn", "torch.nn.functional", "torch.optim", "nn", "optim"}
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not used & {"nn", "backward", "zero_grad", "step", "softmax", "log_softmax",
                       "cross_entropy", "multinomial", "rand", "randn", "randint", "randperm",
                       "lerp_", "Module", "forward", "clip_grad_norm_", "sigmoid"}
    defined = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    lesson = {n.name for name in SCRIPTS for n in ast.parse(read(ROOT / f"{name}.py")).body
              if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    assert not defined & lesson
    assert not [n for n in defined if re.search("loss_fn|schedule|corrupt|optimizer|_lr|ema", n)]


def test_importing_writes_prints_and_parses_nothing(tmp_path):
    """Also where fcntl does not exist, as on Windows."""
    modules = [*SCRIPTS, "common", "data.prepare", "data.tales", "lab.compare"]
    code = ("import sys; sys.modules['fcntl'] = None; sys.dont_write_bytecode = True; "
            f"sys.path.insert(0, {str(ROOT)!r}); import torch; state = torch.get_rng_state(); "
            f"import {', '.join(modules)}; assert torch.equal(state, torch.get_rng_state())")
    before = {p: p.stat().st_mtime_ns for p in kept()}
    done = subprocess.run([sys.executable, "-W", "ignore:only soft file lock", "-c", code,
                           "--no-such-flag"], cwd=tmp_path, text=True, capture_output=True,
                          timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
    assert before == {p: p.stat().st_mtime_ns for p in before if p.exists()}


@pytest.mark.parametrize("path", [p for p in CODE if p.parent != ROOT / "tests"],
                         ids=lambda p: p.name)
def test_every_public_function_and_class_says_what_it_does(path):
    """A one-line function may speak for itself; so may parts of a model."""
    for node in ast.parse(read(path)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_":
            short = node.end_lineno - node.lineno < 3 or node.name in (
                "main", "Config", "Options", "Attention", "MLP", "Block", "Parser", "Source")
            assert short or ast.get_docstring(node), f"{path.name}: {node.name}"
    assert ast.get_docstring(ast.parse(read(path)))


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.name)
def test_lines_have_at_most_100_columns(path):
    lines = read(path).splitlines()
    assert not [n for n, line in enumerate(lines, 1) if len(line) > 100]
    assert not [n for n, line in enumerate(lines, 1) if line != line.rstrip() or "\t" in line]


# ---- equations -----------------------------------------------------------------------------------

def tags(text):
    return set(re.findall(r"\((E\d+)\)", text))


@each
def test_equations_stand_in_the_docstring_and_on_the_lines_that_compute_them(name):
    """Each tag is defined once in the docstring, in order, and marks a line of code, or stands in
    the docstring of a function that computes an equal form."""
    text = read(ROOT / f"{name}.py")
    doc = ast.get_docstring(ast.parse(text))
    defined = re.findall(r"^ +\((E\d+)\) ", doc, re.M)
    assert defined == [f"E{n}" for n in range(1, len(defined) + 1)] and len(defined) >= 3
    body = text[re.search(r"^# (---- )?1\. config", text, re.M).start():]
    marked = {tag for line in body.splitlines() for tag in tags(line)
              if re.search(r"\S.*  # .*\(E\d+\)", line)
              and not re.fullmatch(r"    \w+: .*", line.split("  # ")[0])}
    marked |= {tag for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
               for tag in tags(ast.get_docstring(node) or "")}
    assert marked == set(defined), f"marked {sorted(marked)}, defined {defined}"
    assert tags(text) == set(defined)


@each
def test_every_equation_has_a_test(name):
    """Its tag stands in the docstring of a test of that script."""
    files = sorted((ROOT / "tests").glob(f"test_{name}*.py"))
    docs = [ast.get_docstring(n) or "" for path in files for n in ast.walk(ast.parse(read(path)))
            if isinstance(n, ast.FunctionDef) and n.name.startswith("test")]
    assert tags("\n".join(docs)) == tags(ast.get_docstring(ast.parse(read(ROOT / f"{name}.py"))))


@each
def test_every_equation_stands_in_the_notebook(name):
    own, = [p for p in NOTEBOOKS if re.fullmatch(rf"\d\d_{name}", p.stem)]
    parts = [p for p in NOTEBOOKS if p.stem[:2] == own.stem[:2]]  # 02 has a second part
    text = "\n".join("".join(cell["source"]) for p in parts for cell in cells(p, "markdown"))
    text = re.sub(r"\\tag\{(E\d+)\}|\\text\{\((E\d+)\)\}", r"(\1\2)", text)
    assert tags(text) == tags(ast.get_docstring(ast.parse(read(ROOT / f"{name}.py"))))


# ---- notebooks -----------------------------------------------------------------------------------

@every_notebook
def test_a_notebook_is_kept_as_it_ran(path):
    """Outputs kept, executed from top to bottom, no errors or warnings in them, not too large."""
    code = [cell for cell in cells(path, "code") if "".join(cell["source"]).strip()]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert len(outputs) >= 3
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert path.stat().st_size <= 500_000


@every_notebook
def test_a_notebook_has_short_cells_and_no_shell(path):
    assert len(cells(path, "code")) <= 60
    for cell in cells(path, "code"):
        source = "".join(cell["source"])
        assert sum(bool(line.strip()) for line in source.splitlines()) <= 15, source
        assert not re.search(r"^\s*[%!]", source, re.M), source


@every_notebook
def test_no_line_inside_a_paragraph_begins_a_list(path):
    """Markdown makes a list of a line "+ b" or "1) b", although the line before is text."""
    for cell in cells(path, "markdown"):
        text = re.sub(r"```.*?```", "", "".join(cell["source"]), flags=re.S)
        assert not re.search(r"^(?![-+*] |\d+[.)] |\s|$).+\n([-+*]|1[.)]) ", text, re.M), text


def test_the_first_cell_of_a_notebook_finds_the_repository(tmp_path):
    """Started in the repository, in notebooks/, or anywhere, if Jupyter names the notebook."""
    first, = {"".join(cells(path, "code")[0]["source"]) for path in NOTEBOOKS}  # all the same
    own = {k: v for k, v in os.environ.items() if k not in ("JPY_SESSION_NAME", "PYTHONPATH")}
    places = [(ROOT, {}), (ROOT / "notebooks", {}), (tmp_path, {}),
              (tmp_path, dict(JPY_SESSION_NAME=str(NOTEBOOKS[0])))]
    found = [subprocess.run([sys.executable, "-c", first + "\nprint(ROOT)"], cwd=place, text=True,
                            capture_output=True, env=own | more) for place, more in places]
    assert [done.stdout.strip() for done in found] == [str(ROOT), str(ROOT), "", str(ROOT)]
    assert "The repository is not here: start Jupyter inside it" in found[2].stderr


# ---- hygiene -------------------------------------------------------------------------------------

def test_no_file_is_large_and_nothing_made_by_a_run_is_kept():
    for path in kept():
        if path.parent == ROOT / "weights":  # tests/test_weights.py knows their sizes
            continue
        assert path.stat().st_size <= 1_000_000, path
        assert path.suffix not in (".pyc", ".pt", ".safetensors", ".bin", ".npy", ".tmp"), path
        assert not {"__pycache__", "out", "cache", ".venv"} & set(path.relative_to(ROOT).parts)


def texts():
    """(path, text) of every kept text file but this one; of notebooks without their pictures."""
    for path in kept():
        if path != ME and path.suffix not in (".png", ".gif", ".safetensors"):
            text = read(path)
            yield path, re.sub(r'"image/png": ?"[^"]*"', "", text)


@pytest.mark.parametrize("what", [
    r"(?<![\w./~-])/(?:work|root|home|Users|mnt|opt)/[\w.]", r"(?<![\w./~-])/tmp/[\w.]",
    r"(?i)index-url|pypi\.|/simple/|artifactory|://[^/\s]*@|\.internal\b",
    r"\b(?!127\.)\d+\.\d+\.\d+\.\d+:\d"], ids=["place", "tmp", "registry", "host"])
def test_no_file_names_a_place_on_somebodys_machine_or_a_private_host(what):
    for path, text in texts():
        if path.parent != ROOT / "tests" or "/tmp/" not in what:
            assert not (found := re.search(what, text)), f"{path.name}: {found}"


def test_requirements_are_pinned_and_complete():
    lines = [line for line in read(ROOT / "requirements.txt").splitlines()
             if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    named = {line.split("==")[0] for line in lines}
    ours = {p.stem for p in CODE} | {"data", "lab", *sys.stdlib_module_names}
    optional = {"tensorboard", "wandb"}
    comes_with = {"tiktoken_ext": "tiktoken", "requests": "tiktoken", "pyarrow": "datasets",
                  "huggingface_hub": "datasets", "nbformat": "nbconvert",
                  "pandas": "datasets", "PIL": "matplotlib", "IPython": "ipykernel"}
    for path in CODE:
        for node in ast.walk(ast.parse(read(path))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {n.split(".")[0] for n in names} - ours - optional:
                assert comes_with.get(name, name) in named, f"{path.name} imports {name}"


@every_notebook
def test_the_contents_of_a_notebook_lead_to_its_headings(path):
    """As Jupyter makes the address of a heading: its text, with - for each space."""
    text = "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    headings = {title.replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_git_ignores_what_runs_make():
    ignored = read(ROOT / ".gitignore").split()
    assert {"out/", "data/cache/", "__pycache__/", ".pytest_cache/"} <= set(ignored)


@pytest.mark.parametrize("path", sorted([*ROOT.glob("results/*.json"),
                                         *ROOT.glob("results/*.jsonl")]), ids=lambda p: p.name)
def test_a_committed_result_says_how_it_was_made(path):
    """Command, config, seed, versions and hardware in its first line."""
    made = json.loads(read(path).splitlines()[0] if path.suffix == ".jsonl" else read(path))
    facts = {**made, **made.get("run", {}), **made.get("config", {})}
    assert all(facts.get(key) for key in ("command", "torch", "machine", "threads"))
    assert isinstance(facts["seed"], int) and ("config" in made or path.suffix == ".json")
    script = next(word for word in facts["command"].split() if word.endswith(".py"))
    assert (ROOT / script).exists()


def test_the_readme_is_finished():
    readme = read(ROOT / "README.md")
    assert not (left := re.search(r"\b(TODO|FILM|TABLE|RESULTS|ENTROPY|\w+_(?:MINUTES|RESULT))\b",
                                  readme)), f"placeholder {left}"
    for name in SCRIPTS:
        assert f"{name}.py" in readme


@pytest.mark.parametrize("page", ["README.md", "LOG.md", *(
    f"{folder}/README.md" for folder in ("lab", "results", "weights"))])
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^):]+)\)", read(ROOT / page)):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            heads = re.findall(r"^##+ (.*)", read(path), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")
                              for head in heads}, target


def test_the_ci_entry_runs_what_the_readme_says():
    command = "python -m pytest"
    assert command in read(ROOT / ".ci/run") and command in read(ROOT / "README.md")
    assert importlib.util.find_spec("nbval") is None or "--nbval-lax" in read(ROOT / "pytest.ini")
