"""The command line, runs and faults of the scripts on common.py: every flag, one sentence a
mistake, and nothing lost when a run is stopped, killed or out of disk. Tiny models, a tiny text."""
import dataclasses
import errno
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib import image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ar
import bit_diffusion
import common
import diffugpt_varlen
import dit_embed
import fast
import mdlm
import sdd
from data import files, prepare, units
from harness import ROOT, Fork, small_text

SCRIPTS = dict(ar=ar, mdlm=mdlm, dit_embed=dit_embed, bit_diffusion=bit_diffusion, sdd=sdd,
               diffugpt_varlen=diffugpt_varlen)
OWN = dict(diffugpt_varlen=dict(init_from="scratch"))  # its parent is a run of its own
each = pytest.mark.parametrize("name", SCRIPTS)
posix = pytest.mark.skipif(os.name == "nt", reason="processes and signals of POSIX")
FLAGS = ("--tokenizer byte --n-layer 1 --n-head 2 --n-embd 32 --seq-len 32 --batch-size 4 "
         "--steps 8 --warmup 2 --eval-every 2 --device cpu --dtype float32").split()
STEPS = 8
FILES = {"log.jsonl", "model.safetensors", "state.pt", "samples.txt", "loss.png"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two texts and their cache."""
    home = tmp_path_factory.mktemp("home")
    for seed, file in enumerate(("small.txt", "other.txt")):
        small_text(home / file, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXT_DIFFUSION_CACHE", str(home / "cache"))
        for file in ("small.txt", "other.txt"):
            prepare.prepare(str(home / file), "byte", quiet=True)
        yield home


@pytest.fixture(scope="module")
def fork(home):
    fork = Fork(home)
    yield fork
    fork.close()


@pytest.fixture(scope="module")
def straight(home, fork):
    """The folder of an undisturbed run of each script, in folders of their names."""
    for name, script in SCRIPTS.items():
        with pytest.MonkeyPatch.context() as patch:
            argv = [*map(str, line(name, home, home / name))]
            patch.setattr(sys, "argv", [f"{name}.py", *argv])
            script.main(argv)
        code, err = fork(name, line(name, home, home / "counted" / name), "count_events",
                         str(home / f"{name}.events"))
        assert code == 0, err
    return home


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli(name, *flags) -> exit code, stdout, stderr: the command line without a new process."""
    def call(name, *argv):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
        capsys.readouterr()
        try:
            common.run_main(SCRIPTS[name].main)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()
    return call


@pytest.fixture
def quick(monkeypatch):
    """Leave out what takes time and changes nothing: samples and the figure."""
    monkeypatch.setattr(common, "show_samples", lambda *_: None)
    monkeypatch.setattr(common, "plot_loss", lambda *_: None)


def line(name, home, out, *more):
    """The command line of a training."""
    own = [part for k, v in OWN.get(name, {}).items() for part in (f"--{k.replace('_', '-')}", v)]
    return ["--data", home / "small.txt", *FLAGS, *own, "--out", out, *more]


def config(name, home, out, **changes):
    flags = dict(zip(FLAGS[::2], FLAGS[1::2]))
    values = {k[2:].replace("-", "_"): int(v) if v.isdigit() else v for k, v in flags.items()}
    return SCRIPTS[name].Config(**{**values, **OWN.get(name, {}), "data": str(home / "small.txt"),
                                   "out": str(out), **changes})


def log(out, kind):
    return [row for row in common.read_log(out) if row["kind"] == kind]


def losses(out):
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in log(out, "train")]


def state(out):
    return torch.load(out / "state.pt", weights_only=True)


def same(a, b):
    """Two state dictionaries, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def assert_as_if_undisturbed(out, other):
    """Losses, evaluations and weights of the undisturbed run, and nothing half-written."""
    assert losses(out) == losses(other) and len(losses(out)) >= STEPS
    assert log(out, "val") == log(other, "val")
    assert same(load_file(out / "model.safetensors"), load_file(other / "model.safetensors"))
    assert all(same(a, b) for a, b in zip(state(out)["parts"][:2], state(other)["parts"][:2]))
    assert not [*out.glob("*.tmp")]


def one_sentence(code, err):
    """The one sentence that a mistake ends in; progress and notes may stand before it."""
    assert code == 2 and "Traceback" not in err, (code, err)
    last = err.strip("\n").replace("\r", "\n").split("\n")[-1]
    assert last.startswith("error: ") and err.count("error: ") == 1 and "  " not in last, err
    return last


# ---- flags ---------------------------------------------------------------------------------------

@each
def test_help_shows_every_field_with_its_help_text(name, straight, cli):
    for argv in (["--help"], ["sample", "--out", straight / name, "--help"]):
        code, out, err = cli(name, *argv)
        shown = " ".join(re.sub("[│╭╮╰╯─]", " ", out).split())
        assert code == 0 and err == "" and " ".join(SCRIPTS[name].__doc__.split()[:8]) in shown
        for field in dataclasses.fields(SCRIPTS[name].Config):
            assert re.search(rf"--{field.name.replace('_', '-')}[ ,]", shown), field.name
        source = inspect.getsource(SCRIPTS[name].Config)
        for text in re.findall(r"^    \w+: .*?  # (.*)$", source, re.M):
            assert " ".join(text.split()) in shown


@each
def test_presets_choose_defaults_and_flags_win_in_both_spellings(name):
    script = SCRIPTS[name]

    def parse(text):
        return common.parse(script.Config, script.PRESETS, text.split())[1]
    assert parse("") == parse("--preset tiny") == script.Config()
    small = parse("--preset small")
    assert {**script.PRESETS["small"], "preset": "small"}.items() <= vars(small).items()
    assert parse("--preset=small") == small and small.n_layer == 8
    assert parse("--seed 0 --num-samples 1").seed == 0
    for text in ("--preset small --n-layer 3", "--n_layer 3 --preset small", "train --preset=small "
                 "--n_layer=3"):
        assert parse(text) == dataclasses.replace(small, n_layer=3)
    for field in dataclasses.fields(script.Config):
        value = field.default
        if field.name == "resume":  # needs a checkpoint
            continue
        if field.type is bool:
            argv, wanted = f"--{field.name}", True
        elif field.type in (int, float):
            wanted = value + 1 if value != 0.99 and (
                field.name not in ("top_p", "noise_window", "p_prompt", "p_crop", "length_quantile")
            ) else 0.5
            wanted = 200 if field.name == "n_embd" else 2 if field.name == "n_head" else wanted
            argv = f"--{field.name.replace('_', '-')} {wanted}"
        else:
            argv, wanted = f"--{field.name} {value}" if value else "", value
        assert getattr(parse(argv), field.name) == wanted


# ---- sample and eval -----------------------------------------------------------------------------

@each
def test_sample_follows_its_flags(name, straight, cli):
    out = straight / name
    code, said, err = cli(name, "sample", "--out", out, "--prompt", "the cat", "--num-samples", 3,
                          "--temperature", "0.7", "--top-k", 9, "--top-p", "0.9", "--trace")
    assert code == 0 and err == "" and "░" in said and "num_samples 3, nfe " in said
    texts = (out / "samples.txt").read_text("utf-8").removesuffix("\n").split("\n<|endoftext|>\n")
    assert len(texts) == 3 and all(text.startswith("the cat") and text in said for text in texts)

    def drawn(*argv):
        assert cli(name, "sample", "--out", out, "--num-samples", 2, *argv)[0] == 0
        return (out / "samples.txt").read_bytes()
    greedy = drawn("--temperature", 0)  # with own noisy input, --top-k 1 still listens to it
    assert (greedy == drawn("--top-k", 1)) or name not in ("ar", "mdlm", "diffugpt_varlen")
    assert greedy != drawn("--temperature", 1) != drawn("--top-k", 1)
    hot = ("--temperature", 1)
    assert drawn(*hot) == drawn(*hot) != drawn(*hot, "--seed", 3)


@pytest.mark.parametrize("name", ["mdlm", "diffugpt_varlen"])
def test_num_steps_is_the_number_of_network_evaluations(name, straight, cli):
    _, said, _ = cli(name, "sample", "--out", straight / name, "--num-steps", 4, "--trace")
    assert re.findall(r"^ +(\d+)  ", said, re.M) == ["1", "2", "3", "4"] and "nfe 4," in said


@each
def test_eval_prints_the_test_likelihood_and_samples(name, straight, cli):
    before = contents(straight / name)
    code, said, err = cli(name, "eval", "--out", straight / name)
    sign = "=" if name == "ar" else "<="
    assert code == 0 and err == ""
    assert re.search(rf"test: {sign} \d\.\d+ nats/token \(perplexity \d", said) and "nfe" in said
    after = contents(straight / name)
    assert {k for k in before if before[k] != after[k]} <= {"samples.txt"}


@pytest.mark.parametrize("name", ["mdlm", "diffugpt_varlen"])
def test_infilling_keeps_the_given_text(name, straight, cli):
    out = straight / name
    code, _, err = cli(name, "sample", "--out", out, "--infill", "the ___3 saw a___4",
                       "--num-samples", 2)
    assert code == 0, err
    for text in (out / "samples.txt").read_bytes().split(b"\n<|endoftext|>\n"):
        assert text.startswith(b"the") and b" saw a" in text


class Letters:
    """A tokenizer whose tokens are letters: 'a' is 0, 'z' 25, ' ' 26."""
    encode_infill = prepare.Tokenizer.encode_infill

    def encode(self, text):
        return ["abcdefghijklmnopqrstuvwxyz ".index(c) for c in text]


@pytest.mark.parametrize("infill, rows, want", [
    ("a ___ c", "docs", "a# c.........."), ("a ___3 c", "docs", "a### c........"),
    ("___ c", "docs", "# c..........."), ("a  ___b ___2c", "docs", "a#b##c........"),
    ("ab ___", "docs", "ab############"), ("ab ___2", "docs", "ab##.........."),
    ("a ___10 c", "docs", "a########## c."), ("a ___3 c", "stream", "a### c"),
    ("a ___", "stream", "a#############"), ("", "docs", "##############")])
def test_a_text_with_holes_becomes_a_canvas(infill, rows, want):
    """A hole takes the spaces before it; a number is its size; a text that ends in ___ is open."""
    cfg = SimpleNamespace(vocab_size=30, seq_len=14, eos=29, rows=rows, prompt="", infill=infill)
    canvas = common.encode_canvas(Letters(), cfg, 5)
    assert canvas.shape == (5, len(want)) and torch.equal(canvas[0], canvas[4])
    assert "".join("abcdefghijklmnopqrstuvwxyz ??.#"[i] for i in canvas[0].tolist()) == want


# ---- mistakes ------------------------------------------------------------------------------------

@each
@pytest.mark.parametrize("flags, sentence", [
    ("--no-such-flag", "Unrecognized options: --no-such-flag"),
    ("--bach-size 3", "Perhaps you meant: --batch-size"), ("--n 3", "--n"),
    ("--sampling-steps 3", "Unrecognized options: --sampling-steps"),
    ("frobnicate", "unknown command 'frobnicate': choose train, sample or eval"),
    ("--steps abc", "invalid literal"), ("--steps", "Missing value for argument '--steps'"),
    ("--preset huge", "huge"), ("--device tpu", "tpu"), ("--rows x", "docs"),
    ("--dtype half", "half"), ("--log y", "tensorboard"), ("--split x", "lines"),
    ("--batch-size 0", "--batch-size is 0, it must be at least 1"),
    ("--warmup 0", "--warmup is 0, it must be at least 1"),
    ("--lr nan", "--lr is nan, it must be at least 0"),
    ("--temperature 1e-40", "--temperature must be 0 or at least 1e-6"),
    ("--out .", "must be a folder of its own"),
    ("--prompt " + "x" * 40, "has 40 tokens, a row has"),
    ("--top-p 1.5", "--top-p 1.5 must be at most 1"), ("--ema 1", "--ema 1.0 must be less than 1"),
    ("--seed 1" + "0" * 30, "less than 2^31"), ("--top-k -1", "--top-k is -1"),
    ("--batch-size 0 --seq-len 0 --n-embd 30 --lr -1", "--seq-len is 0, it must be at least 1 and "
     "less than 2^31; --batch-size is 0"),
    ("--n-embd 30", "--n-embd 30 must be a multiple of 2 x n_head = 4"),
    ("--tokenizer words", "unknown tokenizer 'words': choose bpe, gpt2, byte, char or hf:NAME"),
    ("--vocab-size 300 --tokenizer byte", "--vocab-size 300 does not suit the tokenizer byte"),
    ("--data no-such-file.txt", "neither a file or folder nor one of the names tales"),
    ("--data {empty}", "is empty: give a source that has text"),
    ("--data {latin}", "is not UTF-8 at byte 1: convert it"),
    ("--data {short}", "than --seq-len 32: use a smaller --seq-len, more text"),
    ("--data {short} --seq-len 8", "the val split has 6 tokens, fewer than --seq-len"),
    ("--data tales --split lines", "--split lines is for .txt files"),
], ids=lambda text: text[:24])
def test_a_mistake_is_one_sentence_exit_code_2_and_no_folder(name, flags, sentence, home, cli,
                                                             tmp_path):
    texts = {key: tmp_path / f"{key}.txt" for key in ("empty", "latin", "short")}
    texts["empty"].write_text("")
    texts["latin"].write_bytes("d\u00e9j\u00e0 vu. ".encode("latin1") * 50)
    texts["short"].write_text("<|endoftext|>".join(["one two", "three four", "five six", "seven"]))
    flags, out = flags.format(**texts).split(), tmp_path / "run"
    argv = flags if flags[0] == "frobnicate" else [*line(name, home, out), *flags]
    code, _, err = cli(name, *argv)
    assert sentence in one_sentence(code, err) and not out.exists()


@each
@pytest.mark.parametrize("flags, sentence", [
    ("sample --prompt " + "x" * 40, "the given text has 40 tokens, a row has room for 31"),
    ("sample --n-layer 2", "leave out --n-layer: the checkpoint has 1"),
    ("eval --seq-len 16", "leave out --seq-len: the checkpoint has 32"),
    ("--resume --n-embd 64 --rows docs",
     "leave out --rows: the checkpoint has stream; leave out --n-embd: the checkpoint has 32"),
    ("--resume --preset small", "leave out --preset: the checkpoint has tiny"),
    ("eval --tokenizer char --vocab-size 0", "the checkpoint has 257"),
    ("sample --num-samples 0", "--num-samples is 0, it must be at least 1"),
    ("sample --temperature nan", "--temperature is nan, it must be at least 0"),
    ("eval --data no-such-file.txt", "neither a file or folder nor one of the names"),
    ("sample --prompt a --infill a___", "begin --infill with that"),
    ("sample --infill x", "--infill needs a hole, ___"),
    ("sample --infill ___99", "has 99 tokens, a row has room for 31"),
    ("sample --infill ___" + "9" * 5000, "tokens, a row has room for 31"),
    ("sample --eos 9", "leave out --eos: the checkpoint has 256"),
    ("sample --prompt caf\udce9", "set a UTF-8 terminal"),
], ids=lambda text: text[:24])
def test_a_mistake_with_a_finished_run_leaves_it_alone(name, flags, sentence, straight, cli):
    before = contents(straight / name)
    code, _, err = cli(name, *flags.split(), "--out", straight / name)
    if name == "ar" and "--infill" in flags:  # it has no such flag
        sentence = "infill"
    assert sentence in one_sentence(code, err) and contents(straight / name) == before


@pytest.mark.parametrize("name, flags, sentence", [
    *((name, f"--noise-window {w}", "--noise-window must be in [0.001, 1]")
      for name in ("dit_embed", "bit_diffusion", "sdd") for w in (0, 1e-8, 1.5)),
    *(("dit_embed", f"--logsnr-above {a} --logsnr-below {b}", "must be in (0, 40]")
      for a, b in ((0, 0), (100, 3))),
    ("dit_embed", "sample --emb-dim 8", "leave out --emb-dim: the checkpoint has 16"),
    ("dit_embed", "--resume --logsnr-above 2", "leave out --logsnr-above: the checkpoint has 3.0"),
    ("sdd", "sample --order random", "--remask conf needs --order maxprob: add --remask none"),
    ("diffugpt_varlen", "--resume --pipeline arm", "--pipeline: the checkpoint has diffusion"),
    ("sdd", "--k 0", "--k is 0, it must be at least 1")])
def test_settings_of_one_method_that_cannot_work_are_refused(name, flags, sentence, straight, cli):
    before = contents(straight / name)
    code, _, err = cli(name, *flags.split(), "--out", straight / name)
    assert sentence in one_sentence(code, err) and contents(straight / name) == before


def halve(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@each
@pytest.mark.parametrize("file, damage, command", [
    ("model.safetensors", halve, "sample"), ("model.safetensors", Path.unlink, "eval"),
    ("model.safetensors", lambda p: p.write_bytes(b"nonsense"), "--resume"),
    ("state.pt", halve, "--resume"), ("state.pt", lambda p: p.write_bytes(b"nonsense"), "--resume"),
    ("state.pt", Path.unlink, "--resume")], ids=lambda x: x if isinstance(x, str) else "")
def test_a_damaged_checkpoint_is_named_and_left_as_it_is(name, file, damage, command, straight, cli,
                                                         tmp_path):
    out = shutil.copytree(straight / name, tmp_path / "run")
    damage(out / file)
    before = contents(out)
    code, _, err = cli(name, command, "--out", out)
    assert f"{out / file} is missing, broken or of other settings" in one_sentence(code, err)
    assert contents(out) == before


@each
def test_a_checkpoint_of_another_script_or_data_is_refused(name, straight, cli, tmp_path):
    other = "mdlm" if name != "mdlm" else "ar"
    for command in ("sample", "eval", "--resume"):
        code, _, err = cli(name, command, "--out", straight / other)
        assert "of other settings: train first" in one_sentence(code, err)
        code, _, err = cli(name, command, "--out", tmp_path / "none")
        assert f"{tmp_path / 'none' / 'model.safetensors'} is missing" in one_sentence(code, err)
    assert not (tmp_path / "none").exists()
    stored = prepare.load_tokenizer
    with pytest.MonkeyPatch.context() as patch:  # data whose tokenizer numbers the bytes otherwise
        patch.setattr(prepare, "load_tokenizer", lambda folder: prepare.Tokenizer(
            stored(folder).spec | dict(name="other")))
        for command in ("eval", "--resume"):
            code, _, err = cli(name, command, "--out", straight / name)
            assert "another tokenizer than the other of these data" in one_sentence(code, err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has cuda")
def test_a_device_that_is_not_there_is_refused(home, cli, tmp_path):
    code, _, err = cli("ar", *line("ar", home, tmp_path / "run", "--device", "cuda"))
    assert "there is no cuda device here: choose --device cpu or auto" in one_sentence(code, err)


# ---- the run folder ------------------------------------------------------------------------------

@each
def test_a_new_run_moves_an_older_one_aside(name, home, straight, quick, cli, tmp_path):
    out = shutil.copytree(straight / name, tmp_path / "run")
    before = contents(out)
    for k in (1, 2):
        code, said, err = cli(name, *line(name, home, out, "--steps", 1, "--seed", k))
        assert code == 0 and f"{out} held an older run, which is in {out}.{k} now" in said, err
    assert contents(tmp_path / "run.1") == before and len(losses(tmp_path / "run.2")) == 1


@each
def test_a_folder_that_holds_other_things_is_refused(name, home, cli, tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    assert cli(name, *line(name, home, out, "--steps", "x"))[0] == 2
    (out / "chapter.tex").write_text("mine")
    code, _, err = cli(name, *line(name, home, out))
    assert f"{out} holds other things than a run: choose another --out" in one_sentence(code, err)
    code, _, err = cli(name, *line(name, home, out / "chapter.tex"))
    assert f"cannot use {out / 'chapter.tex'} (Not a directory)" in one_sentence(code, err)
    code, _, err = cli(name, *line(name, home, out / "chapter.tex" / "run"))
    assert "cannot use " in one_sentence(code, err)
    assert {k for k in contents(out) if k[0] != "."} == {"chapter.tex"}


@posix
def test_a_second_process_in_the_same_folder_is_one_sentence(home, cli, tmp_path):
    out = tmp_path / "run"
    with subprocess.Popen([sys.executable, ROOT / "ar.py", *map(str, line(
            "ar", home, out, "--steps", 10 ** 6, "--eval-every", 50))], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=listen) as first:
        wait_for(out / "model.safetensors", first)
        code, _, err = cli("ar", *line("ar", home, out))
        assert f"another process uses {out}: choose another --out" in one_sentence(code, err)
        assert cli("ar", "sample", "--out", out, "--num-samples", 1)[0] == 0  # this is allowed
        first.send_signal(signal.SIGINT)
        said, err = first.communicate(timeout=600)
    assert first.returncode == 130 and "Traceback" not in err, err
    step = state(out)["step"]
    assert err.splitlines()[-1] == f"stopped at step {step}; go on with --resume"
    assert "\r" not in said + err  # the output is no terminal: whole lines only


def listen():
    """In a child: Ctrl-C works, also where the tests run in the background and ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for(path, process, seconds=300):
    deadline = time.time() + seconds
    while time.time() < deadline and process.poll() is None and not path.exists():
        time.sleep(0.05)
    assert path.exists(), process.poll()


@posix
def test_ctrl_c_while_the_data_are_prepared_stops_within_two_seconds(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TEXT_DIFFUSION_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen([sys.executable, ROOT / "mdlm.py", "--out", str(tmp_path / "run")],
                          env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          preexec_fn=listen) as process:
        wait_for(tmp_path / "cache", process)
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        clock = time.time()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and time.time() - clock < 2
    assert err.splitlines()[-1] == "interrupted" and not (tmp_path / "run").exists()


def test_a_new_run_that_cannot_start_leaves_the_old_one_as_it_was(home, straight, tmp_path):
    out = shutil.copytree(straight / "ar", tmp_path / "run")
    before = contents(out)
    with pytest.raises(common.UserError):
        ar.train(config("ar", home, out, data="no such file.txt"))
    assert contents(out) == before and not (tmp_path / "run.1").exists()


@each
def test_a_run_leaves_the_documented_files_and_rows(name, straight):
    out = straight / name
    assert {p.name for p in out.iterdir()} == FILES
    pixels = image.imread(out / "loss.png")
    assert min(pixels.shape[:2]) > 300 and pixels.std() > 0.01  # something is drawn
    [made] = log(out, "config")
    assert {"command", "config", "torch", "machine", "device", "dtype", "threads", "processes",
            "parameters", "tokenizer"} <= made.keys() and made["config"]["seed"] == 1337
    for row in log(out, "train"):
        assert row.keys() == {"kind", "step", "tokens", "loss", "lr", "grad_norm", "tok_s",
                              "seconds"}
        most = row["step"] * 4 * 32  # diffugpt_varlen.py crops some batches to a third at least
        assert most / 3 < row["tokens"] <= most and (row["tokens"] == most or "varlen" in name)
    seconds = [row["seconds"] for row in log(out, "train")]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert [row["step"] for row in log(out, "val")] == [0, 2, 4, 6, 8]
    assert {row["bound"] for row in log(out, "val")} == {"exact" if name == "ar" else "upper"}
    [row] = log(out, "samples")
    assert row["num_samples"] == 64 and row["seconds"] > 0 and "valid_stories" not in row


@each
def test_on_tales_the_gap_to_the_entropy_and_the_rates_of_samples_are_logged(name, cli, tmp_path,
                                                                             monkeypatch):
    canvas, out = common.encode_canvas, tmp_path / "run"
    monkeypatch.setattr(common, "encode_canvas", lambda tok, cfg, n: canvas(tok, cfg, n // 8))
    monkeypatch.setattr(common, "plot_loss", lambda *_: None)
    code, said, err = cli(name, *line(name, out, out)[2:], "--tokenizer", "bpe", "--max-docs", 60,
                          "--seq-len", 160, "--steps", 2,
                          *(["--num-steps", 4] if name != "ar" else []))
    assert code == 0 and "the unigram entropy, " in said and "+ gap " in said, err
    row, [sample] = log(out, "val")[-1], log(out, "samples")
    assert row["gap"] == pytest.approx(row["nats_per_doc"] - row["entropy_per_doc"], abs=1e-4)
    assert 30 < row["entropy_per_doc"] < row["nats_per_doc"] and row["gap_se"] > 0
    assert {"valid_stories", "valid_sentences"} <= sample.keys() and sample["num_samples"] == 8


def test_a_likelihood_in_all_units_by_hand():
    """Two documents of 3 and 1 tokens and their EOS, EOS-filled rows of 4."""
    cfg = SimpleNamespace(rows="docs", eos=0)
    tokenizer = SimpleNamespace(decode_bytes=lambda ids: b"xy" * len(ids))
    row = units.likelihood(torch.tensor([6.0, 3.0]), torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0]]),
                           torch.tensor([5.0, 1.0]), tokenizer, cfg, "upper")
    assert row["nats_per_token"] == 9 / 6 and row["nats_per_doc"] == 4.5 and row["gap"] == 1.5
    assert row["bits_per_byte"] == pytest.approx(9 / math.log(2) / 8)
    assert row["se"] == pytest.approx(1.5) and row["gap_se"] == pytest.approx(0.5)
    assert row["entropy_per_doc"] == 3
    assert units.report(row) == (
        "<= 1.500 nats/token (perplexity 4.48, 1.623 bits/byte), <= 4.5 +- 1.5 nats/document = "
        "entropy 3.0 + gap 1.5 +- 0.5")
    cfg.rows = "stream"
    row = units.likelihood(torch.tensor([6.0, 3.0]), torch.ones(2, 4).long(), None, tokenizer, cfg,
                           "exact")
    assert row["nats_per_token"] == 9 / 8 and not {"gap", "nats_per_doc"} & row.keys()
    assert units.se(torch.tensor([1.0, 3.0])) == 1 and units.se(torch.ones(1)) == 0


def test_the_error_of_nats_per_token_is_that_of_a_ratio():
    """0 if every token costs the same, however long the rows; else as over many draws of rows."""
    g, cfg = torch.Generator().manual_seed(0), SimpleNamespace(rows="docs", eos=0)
    tokenizer = SimpleNamespace(decode_bytes=bytes)
    full = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])  # the first row has no EOS
    assert units.sizes_of(full, cfg) == [3, 2, 3]
    length = torch.randint(2, 40, (4000,), generator=g)
    x0 = (torch.arange(40) < length[:, None]).long()  # tokens 1, then EOS
    size = (length + 1).clamp(max=40)
    row = units.likelihood(0.7 * size, x0, None, tokenizer, cfg, "exact")
    assert row["nats_per_token"] == pytest.approx(0.7) and row["nats_per_token_se"] < 1e-6
    nats = 0.7 * size + torch.randn(4000, generator=g)
    some = [units.likelihood(nats[i], x0[i], None, tokenizer, cfg, "exact")
            for i in torch.arange(4000).split(40)]  # 100 times 40 rows
    spread = torch.tensor([row["nats_per_token"] for row in some]).std().item()
    mean = sum(row["nats_per_token_se"] for row in some) / len(some)
    assert mean == pytest.approx(spread, rel=0.25)


def test_help_needs_no_checkpoint_and_a_run_no_terminal(cli, tmp_path, monkeypatch):
    code, said, _ = cli("mdlm", "sample", "--out", tmp_path / "none", "--help")
    assert code == 0 and "--num-samples" in said
    monkeypatch.setattr(sys, "stdout", None)  # >&-
    common.run_main(lambda argv: print("nobody reads this"))


def test_a_trace_without_a_step_is_empty(capsys, tmp_path):
    """A drawn length may be that of the prompt."""
    cfg = mdlm.Config(trace=True, num_samples=1, prompt="a b", out=str(tmp_path / "none"),
                      vocab_size=257, data="x")
    common.show_samples(common.Run(cfg), lambda model, x, cfg, g, on_step: (x.clamp(max=98), 1),
                        None, prepare.get_tokenizer("byte"), cfg)
    assert "a b" in capsys.readouterr().out


def test_lines_of_a_trace_differ_on_the_screen(capsys, tmp_path):
    """Forty more tokens behind the 92 that are shown make no new line; the last counts all NFE."""
    cfg = mdlm.Config(trace=True, num_samples=1, out=str(tmp_path / "none"), vocab_size=257,
                      data="x")

    def sample(model, x, cfg, g, on_step):
        x = x.fill_(ord("a"))
        for nfe in range(1, 133):
            x[0, :nfe] = ord("b")
            on_step(nfe, x)
        return x, nfe
    common.show_samples(common.Run(cfg), sample, None, prepare.get_tokenizer("byte"), cfg)
    lines = re.findall(r"^ +(\d+)  (\w{92}) [.]{3}$", capsys.readouterr().out, re.M)
    assert len({text for _, text in lines}) == len(lines) == 6 and lines[-1] == ("132", "b" * 92)


def test_a_log_that_somebody_edited_is_read_as_far_as_it_makes_sense(straight, tmp_path):
    shutil.copy(straight / "ar/log.jsonl", tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "train", "step": "9", "loss": 1}\n{"kind": "train", "step": 9}\n[]\n')
    assert [row["step"] for row in common.read_log(tmp_path)][-2:] == [STEPS, 9]
    common.plot_loss(tmp_path)
    assert (tmp_path / "loss.png").exists()


# ---- stopping and resuming -----------------------------------------------------------------------

def test_a_resumed_run_says_that_its_data_have_changed(home, quick, cli, tmp_path):
    small_text(tmp_path / "text.txt", n=150)
    flags = ["--data", tmp_path / "text.txt", "--out", tmp_path / "run"]
    assert cli("ar", *line("ar", home, tmp_path / "run", *flags))[0] == 0
    code, said, _ = cli("ar", "--resume", "--out", tmp_path / "run", "--steps", STEPS + 1,
                        "--batch-size", 2)
    assert code == 0 and "the data have changed" not in said
    assert log(tmp_path / "run", "train")[-1]["tokens"] == (4 * STEPS + 2) * 32  # all of them
    small_text(tmp_path / "text.txt", n=160)
    code, said, _ = cli("ar", "--resume", "--out", tmp_path / "run", "--steps", STEPS + 2)
    assert code == 0 and "the data have changed: val may hold what was trained on" in said



@each
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_stopped_run_goes_on_bit_for_bit(name, number, home, straight, quick, cli, tmp_path,
                                           monkeypatch):
    handler, honest = signal.getsignal(number), common.Run.log_step

    def log_step(self, step, *args, **kw):
        honest(self, step, *args, **kw)
        if step == 5:
            signal.raise_signal(number)
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log_step", log_step)
        code, _, err = cli(name, *line(name, home, tmp_path / "run"))
    assert code == 130 and err.splitlines()[-1] == "stopped at step 5; go on with --resume"
    assert state(tmp_path / "run")["step"] == 5 and signal.getsignal(number) == handler
    code, _, err = cli(name, "--resume", "--out", tmp_path / "run")
    assert code == 0, err
    assert_as_if_undisturbed(tmp_path / "run", straight / name)
    code, _, err = cli(name, "--resume", "--steps", STEPS + 2, "--out", tmp_path / "run")
    assert code == 0 and [row[0] for row in losses(tmp_path / "run")] == [*range(1, STEPS + 3)]


def test_a_second_ctrl_c_stops_at_once(home, quick, cli, tmp_path, monkeypatch):
    honest = common.Run.log_step
    monkeypatch.setattr(common.Run, "log_step", lambda self, *args, **kw: (
        honest(self, *args, **kw), [signal.raise_signal(signal.SIGINT) for _ in range(2)]))
    code, _, err = cli("ar", *line("ar", home, tmp_path / "run"))
    assert code == 130 and err.splitlines()[-1] == "interrupted"


def kills():
    """Moments at which a run is killed, the same each time; 4 checkpoints of 2 files."""
    draw, moments = random.Random(20), []
    for name in SCRIPTS:
        moments += [(name, "die_at_event", draw.uniform(0.3, 0.97), "") for _ in range(4)]
        moments += [(name, "die_while_replacing", draw.randint(1, 8), where)
                    for where in ("middle", "before", "after")]
    return moments


@posix
@pytest.mark.parametrize("name, fault, when, where", kills())
def test_a_run_that_is_killed_anywhere_loses_nothing(name, fault, when, where, home, fork, straight,
                                                     tmp_path):
    out, how = tmp_path / "run", [when, where]
    if fault == "die_at_event":
        how = [int(when * int((home / f"{name}.events").read_text()))]
    code, err = fork(name, line(name, home, out), fault, *how)
    assert code == -signal.SIGKILL, err
    if (out / "log.jsonl").exists():
        with open(out / "log.jsonl", "a") as file:
            file.write('{"kind": "train", "st')  # cut off
    saved = (out / "state.pt").exists()
    code, err = fork(name, line(name, home, out, *["--resume"] * saved))
    assert code == 0, err
    assert_as_if_undisturbed(out, straight / name)


@posix
@pytest.mark.parametrize("when, where", [(1, "middle"), (2, "after"), (4, "before"), (6, "middle")])
def test_a_run_of_two_stages_that_is_killed_goes_on_where_it_was(when, where, home, fork, tmp_path):
    """The parent saves twice and the run three times, two files each: the same command, or --resume
    where the run itself has begun, ends with the weights of one that is left alone."""
    name, files = "diffugpt_varlen", ["alone", "killed", "killed_parent"]
    two = "--init-from parent --parent-steps 3 --steps 5".split()
    assert fork(name, line(name, home, tmp_path / "alone", *two))[0] == 0
    argv = line(name, home, tmp_path / "killed", *two)
    code, err = fork(name, argv, "die_while_replacing", when, where)
    assert code == -signal.SIGKILL, err
    assert (tmp_path / "killed").exists() == (when > 4)
    saved = (tmp_path / "killed/state.pt").exists()
    code, err = fork(name, argv + ["--resume"] * saved)
    assert code == 0, err
    one, two, parent = (load_file(tmp_path / file / "model.safetensors") for file in files)
    assert same(one, two) and not same(two, parent)


# ---- full disks, full memory, other accidents ----------------------------------------------------

@posix
@each
@pytest.mark.parametrize("file", ["log.jsonl", "model.safetensors", "state.pt"])
def test_a_full_disk_is_one_sentence_and_the_checkpoint_stays(name, file, fork, straight, tmp_path):
    out = shutil.copytree(straight / name, tmp_path / "run")
    before = contents(out)
    argv = ["--resume", "--steps", STEPS + 2, "--out", out]
    said = one_sentence(*fork(name, argv, "small_files", (out / file).stat().st_size - 1))
    assert "cannot use " in said and "what was saved before is kept" in said
    assert file == "log.jsonl" or f"cannot use {out / file} (" in said
    assert (out / "state.pt").read_bytes() == before["state.pt"] and not [*out.glob("*.tmp")]
    assert fork(name, ["sample", "--num-samples", 1, "--out", out])[0] == 0
    code, err = fork(name, argv)
    assert code == 0 and len(losses(out)) == STEPS + 2, err
    assert losses(out)[:STEPS] == losses(straight / name)


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO"])
def test_what_the_system_refuses_is_named(number, home, quick, tmp_path, cli, monkeypatch):
    def refuse(*_):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        code, _, err = cli("ar", *line("ar", home, tmp_path / "run"))
    assert one_sentence(code, err).startswith(
        f"error: cannot use {tmp_path / 'run' / 'model.safetensors'} "
        f"({os.strerror(getattr(errno, number))}): check its rights and the free space")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["log.jsonl"]


def test_replace_leaves_the_old_file_when_writing_fails(tmp_path):
    (tmp_path / "file").write_text("old")
    for error in (OSError(28, "No space left"), RuntimeError("[enforce fail at inline_container]")):
        def half(file):
            file.write(b"ne")
            raise error
        with pytest.raises(OSError, match=str(tmp_path / "file")):
            files.replace(tmp_path / "file", half)
        assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_replace_writes_through_no_link(tmp_path):
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "file.tmp").symlink_to(tmp_path / "mine")
    files.replace(tmp_path / "file", lambda file: file.write(b"new"))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict(mine="kept", file="new")


def test_printed_text_commands_no_terminal(capsys):
    common.Run(SCRIPTS["ar"].Config(device="cpu")).say("a\x1b]0;b\x07\nc\td\x9b")
    assert capsys.readouterr().out == "a?]0;b?\nc\td?\n"


@each
def test_a_strangers_checkpoint_takes_no_memory_and_chooses_no_data(name, straight, home, cli,
                                                                    tmp_path, monkeypatch):
    out = shutil.copytree(straight / name, tmp_path / "run")
    with safe_open(out / "model.safetensors", "pt") as file:
        about = file.metadata()
    weights = load_file(out / "model.safetensors")
    for changes, command, sentence in [
            (dict(n_embd=2 ** 22), "sample", "size mismatch"),  # terabytes
            (dict(n_layer=2 ** 30), "sample", "1073741824 layers"),
            (dict(vocab_size=2 ** 30), "sample", "size mismatch"),
            (dict(data=str(home / "secret")), "eval", "name the data with --data to read them"),
            (dict(data="https://x.y/z"), "--resume", "name the data with --data to read them"),
            (dict(tokenizer="hf:x/y"), "eval", "name the data with --data to read them"),
            (dict(out=str(home / "elsewhere")), "sample", None)]:
        stored = dict(about, config=json.dumps(json.loads(about["config"]) | changes))
        save_file(weights, out / "model.safetensors", stored)
        code, said, err = cli(name, command, "--out", out)
        assert sentence is None and code == 0 or sentence in one_sentence(code, err)
    assert not (home / "elsewhere").exists()
    code, _, err = cli(name, "eval", "--data", home / "small.txt", "--out", out)
    assert code == 0, err  # what is named is read
    monkeypatch.setenv("TEXT_DIFFUSION_CACHE", str(tmp_path / "cache"))  # never prepared here
    assert "name the data with --data" in one_sentence(*cli(name, "eval", "--out", out)[::2])


def test_the_state_of_a_run_is_loaded_to_the_cpu(straight, cli, monkeypatch, tmp_path):
    """There AdamW's step stays: on a GPU it would be waited for at every step."""
    shutil.copytree(straight / "ar", tmp_path / "ar")
    load, seen = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *args, **how: seen.append(how) or load(*args, **how))
    assert cli("ar", "--resume", "--out", tmp_path / "ar")[0] == 0
    assert [how["map_location"] for how in seen] == ["cpu"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@each
def test_output_that_nobody_can_take_is_one_sentence(name, fork, straight):
    code, err = fork(name, ["sample", "--num-samples", 1, "--out", straight / name],
                     out="/dev/full")
    assert "cannot use the output (No space left on device)" in one_sentence(code, err)


@posix
def test_a_reader_that_closes_early_and_a_terminal_without_our_letters(straight, home):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONIOENCODING="ascii")
    process = subprocess.Popen(
        [sys.executable, ROOT / "ar.py", "sample", "--num-samples", "3000", "--out",
         straight / "ar", "--trace"], env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)
    assert "?" in process.stdout.readline()
    process.stdout.close()  # as head does
    assert process.stderr.read() == "" and process.wait(timeout=600) == 1


def test_a_full_memory_is_one_sentence_and_other_errors_keep_their_traceback(straight, cli,
                                                                             monkeypatch):
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
                  RuntimeError("a fault of ours")):
        def refuse(*_, **__):
            raise error
        monkeypatch.setattr(common, "encode_canvas", refuse)
        if "ours" in str(error):
            with pytest.raises(RuntimeError):
                cli("ar", "sample", "--out", straight / "ar")
        else:
            code, _, err = cli("ar", "sample", "--out", straight / "ar")
            assert "the memory is full: lower --batch-size" in one_sentence(code, err)


@each
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_never_reaches_the_weights(
        name, what, home, straight, quick, tmp_path, monkeypatch):
    script, calls = SCRIPTS[name], []
    honest = script.loss_fn

    def spoilt(model, *args):
        loss = honest(model, *args)
        calls.append(loss.item())
        if len(calls) == 6:  # the root has slope inf at 0: the value stays, the gradient is nan
            zero = 0 * next(model.parameters()).sum()
            loss = loss + (zero.sqrt() if what == "gradient" else math.nan)
        return loss
    if name == "ar":
        monkeypatch.setattr(script, "loss_fn", spoilt)
    with pytest.raises(common.UserError, match="at step 5: lower --lr"):
        script.train(config(name, home, tmp_path / "run"),
                     **({} if name == "ar" else dict(loss_fn=spoilt)))
    assert losses(tmp_path / "run") == losses(straight / name)[:5]
    saved = state(tmp_path / "run")
    assert saved["step"] == 4 and all(p.isfinite().all() for p in saved["parts"][0].values())


# ---- averaged weights, shared work, precision, loggers -------------------------------------------

def test_the_average_follows_its_formula_and_ema_0_is_the_raw_model(home, quick, tmp_path,
                                                                    monkeypatch):
    seen, honest = [], common.Run.save

    def keep(run, step, tokenizer, model, ema, *rest):
        seen.append([m.head.weight.detach().clone() for m in (model, ema)])
        honest(run, step, tokenizer, model, ema, *rest)
    monkeypatch.setattr(common.Run, "save", keep)
    model = ar.train(config("ar", home, tmp_path / "run", steps=6, eval_every=1, ema=0.3))
    average = torch.zeros_like(seen[0][0])  # the head starts at zero
    for step, (raw, ema) in enumerate(seen, 1):
        share = min(0.3, (1 + step) / (10 + step))
        average = share * average + (1 - share) * raw
        torch.testing.assert_close(ema, average)
    saved = load_file(tmp_path / "run/model.safetensors")
    assert same(saved, dict(model.state_dict()))
    assert same(saved, state(tmp_path / "run")["parts"][1])
    ar.train(config("ar", home, tmp_path / "raw", steps=3, ema=0.0))
    assert same(*state(tmp_path / "raw")["parts"][:2])


@each
@pytest.mark.parametrize("rows", ["stream", "docs"])
def test_two_micro_batches_of_four_are_one_batch_of_eight(name, rows, home, quick, tmp_path):
    for folder, sizes in dict(one=dict(batch_size=8), two=dict(batch_size=4, grad_accum=2)).items():
        SCRIPTS[name].train(config(name, home, tmp_path / folder, rows=rows, lr=1e-3, **sizes))
    one, two = ([row[1] for row in losses(tmp_path / folder)] for folder in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-5)
    first, *_, last = log(tmp_path / "two", "val")  # and something is learnt
    assert last["nats_per_token"] < first["nats_per_token"] - 0.1


@posix
@each
def test_two_processes_give_the_losses_of_one(name, home, fork, straight, tmp_path):
    """Both have to prepare the data at once: their cache is empty. One script is started by
    torchrun itself, a second time if gloo's own thread aborted, as it does now and then
    (github.com/pytorch/gloo/issues/514)."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    argv = [*map(str, line(name, home, tmp_path / "run"))]
    env = dict(TEXT_DIFFUSION_CACHE=str(tmp_path / "cache"))
    if name == "mdlm":
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc-per-node", "2", ROOT / "mdlm.py", *argv], text=True,
                capture_output=True, env=dict(os.environ, OMP_NUM_THREADS="1", **env), timeout=600)
            if "SIGABRT" not in done.stderr:
                break
        assert done.returncode == 0, done.stderr
        said = done.stdout
    else:
        code, err = fork(name, argv, world=2, MASTER_ADDR="localhost", MASTER_PORT=port, **env)
        assert code == 0, err[-2000:]
        said = (home / "stdout").read_text()
    folders = straight / name, tmp_path / "run"
    one, two = ([row[1] for row in losses(out)] for out in folders)
    assert one == pytest.approx(two, abs=1e-4) and len(two) == STEPS
    one, two = (log(out, "val")[-1]["nats_per_token"] for out in folders)
    assert one == pytest.approx(two, abs=1e-4)
    assert {p.name for p in (tmp_path / "run").iterdir()} == FILES - (
        set() if name == "mdlm" else {"samples.txt", "loss.png"})  # fork leaves them out
    assert said.count("step     8: ") == 1  # one process talks


def test_fewer_rows_than_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(common.UserError, match="--batch-size must be at least 5"):
        common.Run(ar.Config(batch_size=4))


def test_a_compiled_model_has_the_losses_of_a_plain_one(home, straight, quick, tmp_path,
                                                        monkeypatch):
    AOT = "aot_eager"  # all but the C++ compiler
    compiled, compile_ = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda block: (compiled.append(block), compile_(block, backend=AOT)))
    mdlm.train(config("mdlm", home, tmp_path / "run", compile="yes", eval_every=8))
    fast, plain = ([row[1] for row in losses(out)] for out in (tmp_path / "run",
                                                               straight / "mdlm"))
    assert compiled and fast == pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize("compile, steps, compiler, device, compiled", [
    ("yes", 1, "g++", "cpu", True), ("no", 5000, "g++", "cpu", False),
    ("auto", 5000, "g++", "cpu", True), ("auto", 4999, "g++", "cpu", False),
    ("auto", 5000, None, "cpu", False), ("auto", 5000, "clang++", "cuda", True),
    ("auto", 5000, "g++", "mps", False)])
def test_long_runs_are_compiled_where_a_compiler_is(compile, steps, compiler, device, compiled,
                                                    monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name if name == compiler else None)
    cfg = ar.Config(compile=compile, steps=steps, vocab_size=5, n_layer=1)
    model = ar.Model(cfg)
    fast.speed_up(model, cfg, torch.device(device))
    assert (model.blocks[0]._compiled_call_impl is not None) == compiled
    assert (type(model.norm) is fast.FastRMSNorm) == (device == "cpu" and not compiled)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(common.UserError, match="--compile yes needs a C.. compiler"):
        fast.speed_up(model, ar.Config(compile="yes"), torch.device("cpu"))


def test_tensorboard_and_wandb_receive_every_number_of_the_log(home, quick, tmp_path, monkeypatch):
    heard = []
    board = SimpleNamespace(SummaryWriter=lambda folder: SimpleNamespace(
        add_scalar=lambda name, value, step: heard.append((name, value, step))))
    bias = SimpleNamespace(__spec__=1, init=lambda **kw: heard.append(kw["config"]["seed"]),
                           log=lambda row, step: heard.extend((*kv, step) for kv in row.items()))
    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace(__spec__=1))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", bias)
    ar.train(config("ar", home, tmp_path / "run", steps=2, log="tensorboard,wandb"))
    first = log(tmp_path / "run", "train")[0]["loss"]
    said = [item[1] for item in heard if item != 1337 and item[::2] == ("train/loss", 1)]
    assert 1337 in heard and said == [first, first]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_named_with_its_pip_command(name, home, cli, tmp_path,
                                                                      monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text("older\n")  # stays where it is
    code, _, err = cli("ar", *line("ar", home, tmp_path / "run", "--log", name))
    assert f"--log {name} needs `pip install {name}`" in one_sentence(code, err)
    assert (tmp_path / "run/log.jsonl").read_text() == "older\n" and not [*tmp_path.glob("*.1")]


@pytest.mark.parametrize("hardware", [True, False])
def test_bfloat16_is_the_default_where_the_hardware_multiplies_it(hardware, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(amx_bf16=hardware))
    for asked, got in dict(auto="bfloat16" if hardware else "float32", float32="float32",
                           bfloat16="bfloat16").items():
        run, x = common.Run(ar.Config(device="cpu", dtype=asked)), torch.ones(2, 2)
        with run.amp:
            assert run.dtype == got and (x @ x).dtype == getattr(torch, got)


def test_a_device_is_found_and_every_process_has_its_own_gpu(monkeypatch):
    asked, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda n, device: (asked.append(device), zeros(n))[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    fast.pick_device("auto"), fast.pick_device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fast.pick_device("auto")
    monkeypatch.setenv("LOCAL_RANK", "1")
    fast.pick_device("auto")
    assert asked == ["mps", "cpu", "cuda:0", "cuda:1"]


def test_a_cpu_keeps_few_kernels(tmp_path):
    """1024 kernels, one for each number of masked tokens, were 4 GB; who sets a limit keeps it."""
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    code = f"import os, torch, common; print(*(os.environ[name] for name in {names}))"
    for given, shown in ({}, "256 256"), ({names[1]: "7"}, "256 7"):
        env = {k: v for k, v in os.environ.items() if k not in names} | given
        done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, text=True,
                              capture_output=True, timeout=60)
        assert done.stdout.split() == shown.split(), done.stderr
