"""Runs: what is in a run folder, and that stopping, crashing, sharing the work and resuming leave
the numbers as they were. Tiny models on a tiny text."""
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common_v1 as common
import diffugpt_varlen
from harness import small_text

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [diffugpt_varlen]
both = pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.NAME)
FILES = {"config.json", "tokenizer.json", "log.jsonl", "model.safetensors", "state.pt",
         "samples.txt", "loss.png", "trace.png"}
TINY = dict(tokenizer="byte", n_layer=1, n_head=2, n_embd=32, seq_len=32, batch_size=4, steps=20,
            warmup=4, eval_every=10, save_every=5, device="cpu", dtype="float32")
OWN = {diffugpt_varlen: dict(init_from="scratch")}  # without its parent, which is a run of its own


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A small text file; everything prepared from it stays in its own cache."""
    folder = tmp_path_factory.mktemp("text")
    small_text(folder / "small.txt", 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXT_DIFFUSION_CACHE", str(folder / "cache"))
        yield folder / "small.txt"


@pytest.fixture
def quick(monkeypatch):
    """Leave out what takes time and changes nothing: graded samples and figures."""
    for script in SCRIPTS:
        monkeypatch.setattr(script, "grade", lambda *a, **k: None)
    monkeypatch.setattr(common, "plot_loss", lambda *a: None)


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """{name: (folder, averaged model, config)} of one undisturbed run of each script."""
    runs = {}
    for script in SCRIPTS:
        out = tmp_path_factory.mktemp("straight") / script.NAME
        cfg = config(script, text, out)
        runs[script.NAME] = out, script.train(cfg), cfg
    return runs


def config(script, text, out, **changes):
    return script.Config(**{**TINY, **OWN.get(script, {}), "data": str(text), "out": str(out),
                            **changes})


def flags(text, out, script=None, **changes):
    """The command line of config()."""
    values = {**TINY, **OWN.get(script, {}), "data": text, "out": out, **changes}
    return [part for k, v in values.items() for part in (f"--{k.replace('_', '-')}", str(v))]


def log(out, kind):
    return [row for row in map(json.loads, (out / "log.jsonl").read_text().splitlines())
            if row["kind"] == kind]


def losses(out):
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in log(out, "train")]


def state(out):
    return torch.load(out / "state.pt", weights_only=True)


def same(a, b):
    """Two state dictionaries, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_as_if_undisturbed(out, straight):
    """Losses, evaluations and weights, as if the run had never been stopped; no row twice."""
    assert losses(out) == losses(straight)
    assert [row["step"] for row in log(out, "train")] == list(range(1, 21))
    for a, b in zip(log(out, "val"), log(straight, "val"), strict=True):
        assert a == b
    assert same(load_file(out / "model.safetensors"), load_file(straight / "model.safetensors"))
    assert same(state(out)["model"], state(straight)["model"])


def at_step(monkeypatch, step, act):
    """Do something right after a step is logged."""
    row = common.Run.train_row

    def train_row(self, now, *args, **kw):
        row(self, now, *args, **kw)
        if now == step:
            act()
    monkeypatch.setattr(common.Run, "train_row", train_row)


# ---- stopping and resuming -----------------------------------------------------------------------

@both
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_stopped_run_goes_on_bit_for_bit(script, number, text, straight, quick, tmp_path, capsys,
                                           monkeypatch):
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 8, lambda: signal.raise_signal(number))
        with pytest.raises(SystemExit) as stop:
            script.train(config(script, text, tmp_path / "run"))
    assert stop.value.code == 128 + number
    assert capsys.readouterr().out.splitlines()[-1] == "stopped at step 8; go on with --resume"
    assert state(tmp_path / "run")["step"] == 8
    assert signal.getsignal(number) == handler
    script.main(["--resume", "--out", str(tmp_path / "run")])
    assert_as_if_undisturbed(tmp_path / "run", straight[script.NAME][0])


KILL = """
import os, signal, sys
import common_v1 as common, {name}
row = common.Run.train_row
def train_row(self, step, *args, **kw):
    row(self, step, *args, **kw)
    if step == 13:
        os.kill(os.getpid(), signal.SIGKILL)
common.Run.train_row = train_row
common.run_main({name}.main)
"""


def spawn(*command, **kw):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@both
def test_a_killed_run_goes_on_from_its_checkpoint(script, text, straight, quick, tmp_path):
    out = tmp_path / "run"
    process = spawn("-c", KILL.format(name=script.NAME), *flags(text, out, script))
    _, err = process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL, err
    assert [row["step"] for row in log(out, "train")] == list(range(1, 14))
    assert state(out)["step"] == 10
    with open(out / "log.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # and the disk was full
    script.main(["--resume", "--out", str(out)])
    assert_as_if_undisturbed(out, straight[script.NAME][0])


# ---- losses that are not numbers, and crashes ----------------------------------------------------

@both
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(
        script, what, text, straight, quick, tmp_path, monkeypatch):
    honest, calls = script.loss_fn, []

    def spoilt(model, *args):
        loss, info = honest(model, *args)
        calls.append(loss.item())
        if len(calls) == 8:  # the root has slope inf at 0: the value stays, the gradient is nan
            zero = 0 * next(model.parameters()).sum()
            loss = loss + (zero.sqrt() if what == "gradient" else math.nan)
        return loss, info
    monkeypatch.setattr(script, "loss_fn", spoilt)
    with pytest.raises(common.UserError, match="at step 7: lower --lr; the last good checkpoint"):
        script.train(config(script, text, tmp_path / "run", save_every=1))
    assert losses(tmp_path / "run") == losses(straight[script.NAME][0])[:7]
    saved = state(tmp_path / "run")
    assert saved["step"] == 7
    assert all(p.isfinite().all() for p in saved["model"].values())


# ---- sharing the work ----------------------------------------------------------------------------

@both
def test_two_processes_give_the_losses_of_one(script, text, straight, tmp_path):
    """Both have to prepare the data at once: their cache is empty."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = dict(os.environ, OMP_NUM_THREADS="1", TEXT_DIFFUSION_CACHE=str(tmp_path / "cache"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
         str(port), ROOT / f"{script.NAME}.py", *flags(text, tmp_path / "run", script)],
        env=env, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    folders = straight[script.NAME][0], tmp_path / "run"
    one, two = ([row[1] for row in losses(out)] for out in folders)
    assert one == pytest.approx(two, abs=1e-4)
    last = [log(out, "val")[-1]["nats_per_token"] for out in folders]
    assert last[0] == pytest.approx(last[1], abs=1e-4)
    assert {p.name for p in (tmp_path / "run").iterdir()} == FILES
    assert done.stdout.count("step    20") == 1  # one process talks
    [folder] = [p for p in (tmp_path / "cache").iterdir() if not p.name.startswith(".")]
