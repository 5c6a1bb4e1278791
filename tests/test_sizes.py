"""How large files may be, how a script is laid out, and which way imports point."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = dict(common=340, fast=140, ar=375, mdlm=461, dit_embed=566, bit_diffusion=557, sdd=584,
               diffugpt_varlen=637)  # lines
SCRIPTS = [name for name in BUDGETS if name not in ("common", "fast")]
SECTIONS = ["config", "data", "model", "corrupt and loss", "sample", "train", "main"]
each = pytest.mark.parametrize("name", SCRIPTS)


def read(name):
    return (ROOT / f"{name}.py").read_text("utf-8")


def imports(path):
    """The first parts of everything that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def lab_imports(path):
    """The files of lab/ that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "lab":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("lab."):
            found.add(node.module.removeprefix("lab."))
    return found


@pytest.mark.parametrize("name", BUDGETS)
def test_a_file_keeps_its_budget_of_lines(name):
    assert len(read(name).splitlines()) <= BUDGETS[name]
    readme = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(readme) <= 150


def test_tests_are_not_longer_than_what_they_test():
    lines = {folder: sum(len(path.read_text("utf-8").splitlines())
                         for path in ROOT.glob(f"{folder}/*.py"))
             for folder in (".", "data", "lab", "tests")}
    assert lines.pop("tests") <= sum(lines.values()) and lines["."] <= 3660


def test_budgets_are_not_reached_by_squeezing():
    """Two blank lines between definitions, no two statements in a line."""
    for name in BUDGETS:
        lines = read(name).splitlines()
        for i, line in enumerate(lines):
            if re.match(r"(def|class|@)", line) and not lines[i - 1].startswith(("@", "#")):
                assert lines[i - 2:i] == ["", ""], f"{name}: {line}"
        for node in ast.walk(ast.parse(read(name))):
            body = [n.lineno for n in getattr(node, "body", []) if isinstance(n, ast.stmt)] \
                if isinstance(getattr(node, "body", None), list) else []
            assert len(set(body)) == len(body), f"{name}: two statements in a line of {body}"


@each
def test_seven_banners_in_order(name):
    found = re.findall(r"^# ---- (.*?) -+$", read(name), re.M)
    assert found == [f"{n}. {title}" for n, title in enumerate(SECTIONS, 1)]
    assert all(len(line) == 98 for line in read(name).splitlines() if line.startswith("# ----"))


@each
def test_docstring_and_config_are_short_and_every_field_is_used(name):
    tree = ast.parse(read(name))
    assert len(ast.get_docstring(tree).splitlines()) <= 35
    config = next(node for node in tree.body if getattr(node, "name", "") == "Config")
    fields = [node.target.id for node in config.body if isinstance(node, ast.AnnAssign)]
    assert len(fields) <= 45 and len(set(fields)) == len(fields)
    users = read(name) + read("common") + read("fast") + read("data/prepare")
    for field in set(fields) - {"trace"}:
        assert re.search(rf"cfg\.{field}\b|\"{field}\"", users), field


@each
def test_every_function_of_a_script_is_used_by_that_script(name):
    """By name, outside of its own definition."""
    tree = ast.parse(read(name))
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            rest = [n for other in tree.body if other is not node for n in ast.walk(other)]
            used = {n.id for n in rest if isinstance(n, ast.Name)}
            assert node.name in used, f"{name}.py never uses {node.name}"


def test_every_function_of_common_and_data_is_used_somewhere():
    texts = {path: path.read_text("utf-8") for path in [
        *ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("lab/*.py")]}
    for name in ("common", "fast", "data/files", "data/units", "data/prepare"):
        for node in ast.walk(ast.parse(read(name))):
            once = (getattr(node, "name", "") or "_")[0] == "_" or (
                node.name == "train_tales_tokenizer")
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not once:
                count = sum(len(re.findall(rf"\b{node.name}\b", text)) for text in texts.values())
                assert count >= 2, f"{name}.py: {node.name}"


def test_imports_point_one_way():
    """Scripts import common, fast and data; common imports fast, and both data. Only lab, tests and
    notebooks import lab; nothing in lab imports in a circle. results/ holds no code."""
    ours = {*BUDGETS, "data", "lab"}
    for name in SCRIPTS:
        assert imports(ROOT / f"{name}.py") & ours <= {"common", "data", "fast"}
    assert imports(ROOT / "fast.py") & ours == {"data"}
    assert imports(ROOT / "common.py") & ours == {"data", "fast"}
    for path in ROOT.glob("data/*.py"):
        assert imports(path) & ours <= {"data"}, path
    assert "lab" not in set().union(*map(imports, ROOT.glob("*.py")))
    assert {path.stem for path in ROOT.glob("*.py")} == set(BUDGETS)
    assert not [*ROOT.glob("results/*.py")]
    graph = {path.stem: lab_imports(path) for path in ROOT.glob("lab/*.py")}
    while graph:  # no circle: some file imports none of those that are left
        free = [name for name, needs in graph.items() if not needs & graph.keys()]
        assert free, graph
        graph = {name: needs for name, needs in graph.items() if name not in free}
