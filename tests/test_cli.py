"""The command line: every flag, every command that is written down, one sentence a mistake."""
import contextlib
import dataclasses
import inspect
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

import ar
import common_v1 as common
import diffugpt_varlen
from harness import small_text

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [diffugpt_varlen]
both = pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.NAME)
TINY = ("--tokenizer byte --n-layer 1 --n-head 2 --n-embd 32 --seq-len 32 --batch-size 4 --steps 4 "
        "--warmup 1 --eval-every 2 --save-every 2 --device cpu --dtype float32").split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text, a cache, and a finished run of each script, each in a folder."""
    home = tmp_path_factory.mktemp("home")
    small_text(home / "small.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXT_DIFFUSION_CACHE", str(home / "cache"))
        for script in SCRIPTS:
            few = ["--parent-steps", "4"] if script is diffugpt_varlen else []
            patch.setattr(sys, "argv", [f"{script.NAME}.py", "--data", str(home / "small.txt"),
                                        *TINY, *few, "--out", str(home / script.NAME)])
            common.run_main(script.main)
        yield home


@pytest.fixture(scope="module")
def judge(home):
    """The folder of a run of ar.py on the same data."""
    flags = dict(zip(TINY[::2], TINY[1::2]))
    del flags["--save-every"]
    argv = ["--data", str(home / "small.txt"), *(part for pair in flags.items() for part in pair),
            "--out", str(home / "judge")]
    with contextlib.redirect_stdout(io.StringIO()):
        ar.main(argv)
    return home / "judge"


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli(script, *flags) -> exit code, stdout, stderr: the command line without a new process."""
    def call(script, *argv):
        monkeypatch.setattr(sys, "argv", [f"{script.NAME}.py", *map(str, argv)])
        capsys.readouterr()
        try:
            common.run_main(script.main)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()
    return call


def one_sentence(code, err):
    """The one sentence that a mistake ends in."""
    assert code == 2 and "Traceback" not in err, err
    *before, last = err.strip("\n").split("\n")
    assert all(line.startswith("training a BPE of") for line in before), err
    assert last.startswith("error: ") and "  " not in last and "\t" not in last, last
    return last


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# ---- flags ---------------------------------------------------------------------------------------

def fields(script):
    """{field: help text} from the trailing comments of Config."""
    source = inspect.getsource(script.Config)
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))


@both
@pytest.mark.parametrize("command", [[], ["sample"]], ids=["train", "sample"])
def test_help_shows_every_field_with_its_help_text(script, command, cli):
    code, out, err = cli(script, *command, "--help")
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", out).split())
    assert code == 0 and err == ""
    helps = fields(script)
    assert helps.keys() == {field.name for field in dataclasses.fields(script.Config)}
    for name, text in helps.items():
        assert f"--{name.replace('_', '-')} " in shown or f"--{name.replace('_', '-')}, " in shown
        assert " ".join(text.split()) in shown, name
    assert " ".join(script.__doc__.split()[:8]) in shown


# ---- train, sample, eval -------------------------------------------------------------------------

@both
def test_sample_follows_its_flags(script, home, cli):
    out = home / script.NAME
    (out / "trace.png").unlink(missing_ok=True)
    code, said, err = cli(script, "sample", "--out", out, "--prompt", "the cat", "--n", 3,
                          "--temperature", "0.7", "--top-k", 9, "--top-p", "0.9", "--trace")
    assert code == 0 and err == ""
    texts = (out / "samples.txt").read_text("utf-8").removesuffix("\n").split("\n<|endoftext|>\n")
    assert len(texts) == 3 and all(text.startswith("the cat") for text in texts)
    assert all(text in said for text in texts)
    assert common.MASK_GLYPH in said and (out / "trace.png").stat().st_size > 1000

    def drawn(*argv):
        assert cli(script, "sample", "--out", out, "--n", 2, *argv)[0] == 0
        return (out / "samples.txt").read_bytes()
    assert drawn("--temperature", 0) != drawn() != drawn("--top-k", 1)
    assert drawn() == drawn() != drawn("--seed", 3)


@pytest.fixture(scope="module")
def lengths(home):
    """A run of diffugpt_varlen.py on documents, whose lengths differ, and what it said."""
    out, few = home / "lengths", ["--rows", "docs", "--seq-len", "48", "--parent-steps", "2"]
    docs = [("the cat " if i % 3 else "a dog ") * (1 + i % 4) + f"{i} times." for i in range(200)]
    (home / "docs.txt").write_text("<|endoftext|>".join(docs))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", ["diffugpt_varlen.py", "--data", str(home / "docs.txt"), *TINY,
                                    *few, "--out", str(out)])
        common.run_main(diffugpt_varlen.main)
    return out, said.getvalue()


def test_the_default_run_of_diffugpt_varlen_has_three_stages(lengths, home, cli, tmp_path):
    """Parent, adaptation, lengths and samples; the parent is made once and gone on with."""
    out, said = lengths
    at = [said.rindex(part) for part in (
        "stage 1 of 3", "step     2  = ", "stage 2 of 3", "step     4  <= ", "stage 3 of 3",
        "length from the first call", "64 samples in")]
    assert at == sorted(at)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["of"] for row in rows if row["kind"] == "length"] == ["law", "known"]
    val = [row for row in rows if row["kind"] == "val"][-1]
    assert val["text"] + val["eos"] + val["pad"] == pytest.approx(val["nats_per_doc"], abs=1e-4)
    train = ["--data", home / "docs.txt", *TINY, *"--rows docs --seq-len 48".split()]
    run, parent = tmp_path / "run", tmp_path / "run_parent"
    shutil.copytree(home / "lengths_parent", parent)
    before = contents(parent)
    code, said, err = cli(diffugpt_varlen, *train, "--parent-steps", 2, "--out", run)
    assert code == 0 and "already" in said and contents(parent) == before, err
    code, said, err = cli(diffugpt_varlen, *train, "--parent-steps", 3, "--out", run)
    assert code == 0 and "step     3  = " in said and contents(parent) != before, err
    for flags, sentence in ((["--parent", tmp_path / "none"], "no parent in"), (
            ["--init-from", tmp_path], "it needs config.json and model.safetensors"), (
            ["--init-from", "gpt3"], "is no folder and no known checkpoint"), (
            ["--init-from", parent, "--n-layer", 2], "has n_layer 1: leave --n-layer out"), (
            ["--init-from", parent, "--seq-len", 64], "has 49 positions, one for BOS")):
        code, _, err = cli(diffugpt_varlen, *train, "--out", tmp_path / "other", *flags)
        assert sentence in one_sentence(code, err) and not (tmp_path / "other").exists()


def test_a_run_stopped_in_its_first_stage_goes_on_there(lengths, home, cli, tmp_path):
    run = tmp_path / "run"
    parent = shutil.copytree(home / "lengths_parent", tmp_path / "run_parent")
    code, said, err = cli(diffugpt_varlen, "--data", home / "docs.txt", *TINY, "--rows", "docs",
                          "--seq-len", 48, "--parent-steps", 2, "--out", run, "--resume")
    assert code == 0 and "already" in said and (run / "model.safetensors").exists(), err
    assert parent.exists()


def test_eval_of_diffugpt_varlen_writes_its_own_rows_and_two_figures(lengths, home, cli, tmp_path):
    out = shutil.copytree(lengths[0], tmp_path / "run")
    before = (out / "log.jsonl").read_text()
    code, said, err = cli(diffugpt_varlen, "eval", "--out", out, "--judge", tmp_path,
                          "--eval-canvases", "full,eos,law", "--eval-k", "1,4")
    assert code == 0 and err == ""
    rows = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    kinds = [row["kind"] for row in rows]
    assert kinds == (["config", "test"] + 14 * ["length"] + 10 * ["eos"] + ["real"] +
                     6 * ["samples"])
    samples = rows[-6:]
    assert [(r["canvas"], r["k"]) for r in samples] == [
        (canvas, k) for canvas in ("full", "eos", "law") for k in (1, 4)]
    assert all(r["forwarded"] >= r["useful"] for r in samples)
    assert samples[0]["forwarded"] >= samples[2]["forwarded"]  # a canvas that shrinks
    for name in ("quality.png", "length.png"):
        assert (out / name).stat().st_size > 1000
    assert (out / "log.jsonl").read_text() == before
    wrong = cli(diffugpt_varlen, "eval", "--eval-canvases", "best")
    assert "not 'best'" in one_sentence(*wrong[::2])
    wrong = cli(diffugpt_varlen, "eval", "--eval-k", "2,x")
    assert "a list like 1,2,4, not 'x'" in one_sentence(*wrong[::2])


@pytest.mark.parametrize("flags", [
    "--head hazard --p-tail 0.5", "--head pointer --freeze --init-from scratch",
    "--pad-masked-perc 0.1 --pad-annealing-steps 2 --pad-weight 0.5 --p-pin 0.2",
    "--init-from scratch --no-shift --rows stream", "--pipeline arm --init-from scratch",
    "--init-from scratch --optimizer adamw --lr 1e-3 --tail-annealing-steps 3"])
def test_every_variant_of_diffugpt_varlen_trains_samples_and_evaluates(flags, lengths, home, cli,
                                                                       tmp_path):
    out, docs = tmp_path / "run", ["--rows", "docs", "--seq-len", "48"]
    parent = [] if "init-from" in flags else ["--parent", home / "lengths_parent"]
    for command in (["train"],
                    "sample --prompt a --canvas pin --repetition-penalty 1.2".split(),
                    ["sample", "--canvas", "block", "--block", "7", "--max-new-tokens", "20"],
                    ["eval", "--judge", tmp_path, "--eval-canvases", "law", "--eval-k", "8"]):
        train = [] if command != ["train"] else ["--data", home / "docs.txt", *TINY, *docs, *parent,
                                                 *flags.split()]
        code, said, err = cli(diffugpt_varlen, *command, *train, "--out", out)
        assert code == 0, err
    assert "= " in said


def test_benchmarks_are_scored_with_intervals(lengths, cli, tmp_path):
    out, items = lengths[0], tmp_path / "items.jsonl"
    for kind, item in dict(
            cloze=dict(prefix="the cat saw a", target="dog"),
            choice=dict(prefix="the cat", choices=["saw", "found it"], gold=1),
            infill=dict(prefix="the", middle="cat", suffix="saw")).items():
        items.write_text(json.dumps(item) + "\n" + json.dumps(item) + "\n")
        code, said, err = cli(diffugpt_varlen, "eval", "--out", out, "--bench", f"{kind}:{items}")
        assert code == 0, err
        row = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()][-1]
        name = dict(cloze="oracle", choice="per_token", infill="oracle")[kind]
        low, high = row[f"{name}_interval"]
        assert row["n"] == 2 and 0 <= low <= row[name] <= high <= 1 and "items.jsonl" in said
    items.write_text('{"prefix": "the cat", "target": 7}\n')
    code, _, err = cli(diffugpt_varlen, "eval", "--out", out, "--bench", f"cloze:{items}")
    assert "line 1 is no cloze item" in one_sentence(code, err)
    items.write_text('{"prefix": "the cat"}\n')
    for bench, sentence in ((f"cloze:{items}", "line 1 is no cloze item: it needs prefix, target"),
                            ("cloze:nowhere.txt", "cannot read --bench nowhere.txt"),
                            ("quiz:a", "write cloze:FILE")):
        code, _, err = cli(diffugpt_varlen, "eval", "--out", out, "--bench", bench)
        assert sentence in one_sentence(code, err)


def test_a_configuration_file_and_all_its_faults_at_once(home, cli, tmp_path):
    file, train = tmp_path / "config.json", ("--data", home / "small.txt", *TINY)
    file.write_text("""{ // what an earlier program called its settings
        "pipeline": "arm", "init_from": "scratch", "max_lr": 1e-3, /* peak */
        "context_length": 40, "betas": [0.9, 0.95], "user_prompt": "a // b", "do_sample": false,
    }""")
    code, _, err = cli(diffugpt_varlen, *train, "--config", file, "--seq-len", 24, "--out",
                       tmp_path / "run")
    assert code == 0, err
    stored = common.load_config(diffugpt_varlen.Config, tmp_path / "run")
    assert (stored.lr, stored.beta2, stored.temperature, stored.prompt, stored.seq_len) == (
        1e-3, 0.95, 0.0, "a // b", 24)
    file.write_text('{"n_layr": 2, "canvas": "long", "n_epochs": 3, "lr": "high", "q": 1.5, '
                    '"p_cond": 0.9, "p_tail": 0.9, "head": "marginal", "freeze": true}')
    code, _, err = cli(diffugpt_varlen, "--config", file, "--out", tmp_path / "other")
    said = one_sentence(code, err)
    for part in ("'n_layr' is no setting", "canvas is 'long', choose one of full, eos, law",
                 "'n_epochs' is no setting here: give steps", "lr is 'high', it must be a float",
                 "--q is 1.5", "together they are more than 1", "--freeze trains the length head"):
        assert part in said
    for text, sentence in (("[1]", "is no JSON object"), ("{", "is no JSON object")):
        file.write_text(text)
        code, _, err = cli(diffugpt_varlen, "--config", file)
        assert sentence in one_sentence(code, err)
    code, _, err = cli(diffugpt_varlen, "--config", tmp_path / "none.json")
    assert "cannot read --config" in one_sentence(code, err)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.NAME)
def test_sample_fills_holes_and_keeps_the_rest(script, home, cli):
    out = home / script.NAME
    code, _, _ = cli(script, "sample", "--out", out, "--infill", "the ___3 saw a___4", "--n", 2)
    texts = (out / "samples.txt").read_bytes().split(b"\n<|endoftext|>\n")
    assert code == 0 and len(texts) == 2
    for text in texts:
        assert text.startswith(b"the") and b" saw a" in text
    for flags, sentence in (("--infill", "no hole"), "--infill has no hole"), (
            ("--infill", "a ___ b", "--prompt", "x"), "exclude each other"), (
            ("--infill", 40 * "x" + "___"), "row has room for 31"):
        code, _, err = cli(script, "sample", "--out", out, *flags)
        assert sentence in one_sentence(code, err)


@pytest.mark.parametrize("script, change", [
    (diffugpt_varlen, dict(order="l2r", sampling_steps=3))],
    ids=lambda p: getattr(p, "NAME", ""))
def test_sample_is_fast_unless_told_otherwise(script, change, home, cli, tmp_path):
    """FAST holds for sample where neither the run nor the command line says something else."""
    out = shutil.copytree(home / script.NAME, tmp_path / "run")
    other = [part for k, v in change.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    seen = []

    def spy(model, cfg, *rest):
        seen.append(cfg)
        return sample(model, cfg, *rest)
    sample = script.sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "sample", spy)
        cli(script, "sample", "--out", out)
        cli(script, "sample", "--out", out, *other)
        stored = json.loads((out / "config.json").read_text())
        stored["config"]["temperature"] = 0.9
        (out / "config.json").write_text(json.dumps(stored))
        cli(script, "sample", "--out", out)
    fast, told, run = ({k: getattr(cfg, k) for k in script.FAST} for cfg in seen)
    assert fast == script.FAST and run == script.FAST | dict(temperature=0.9)
    assert told == script.FAST | change
    assert all(getattr(script.Config(), k) != v for k, v in script.FAST.items())


# ---- mistakes ------------------------------------------------------------------------------------

@both
@pytest.mark.parametrize("line, sentence", [
    ("--no-such-flag", "Unrecognized options: --no-such-flag"),
    ("frobnicate", "unknown command 'frobnicate': choose train, sample or eval"),
    ("--preset huge", "unknown preset 'huge': choose one of tiny, small, medium"),
    ("--lr nan", "--lr is nan, it must be at least 0"),
    ("--batch-size 0 --seq-len 1 --dtype half --n-embd 30 --top-p 2 --ema 1 --rows x --log y",
     "--seq-len is 1, it must be at least 2; --batch-size is 0, it must be at least 1"),
    ("--tokenizer words", "unknown tokenizer 'words': choose bpe, gpt2, byte, char or hf:NAME"),
    ("--data no-such-file.txt", "neither a file or folder nor one of the names tales"),
    ("--data {empty}", "is empty: give a source that has text"),
    ("--data {short}", "tokens, fewer than --seq-len 32: use a smaller --seq-len or more text"),
    ("--data {short} --seq-len 8", "the val split has 6 tokens, fewer than --seq-len"),
], ids=lambda text: text[:24])
def test_a_mistake_is_one_sentence_exit_code_2_and_no_folder(script, line, sentence, home, cli,
                                                             tmp_path):
    files = {name: tmp_path / f"{name}.txt" for name in ("empty", "short")}
    files["empty"].write_text("")
    files["short"].write_text("<|endoftext|>".join(["one two", "three four", "five six", "seven"]))
    line = line.format(**files).split()
    out = tmp_path / "run"
    argv = line if line[0] == "frobnicate" else ["--data", home / "small.txt", *TINY, *line]
    code, _, err = cli(script, *argv, *([] if line == ["--steps"] else ["--out", out]))
    said = one_sentence(code, err)
    assert not out.exists()
    for part in sentence.split("; "):
        assert part in said
