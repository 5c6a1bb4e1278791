"""Runs: what is in a run folder, and that stopping, crashing, sharing the work and resuming leave
the numbers as they were. Tiny models on a tiny text."""
import dataclasses
import json
import math
import os
import random
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
from safetensors.torch import load_file

import bit_diffusion
import common_v1 as common
import diffugpt_varlen
import dit_embed
import sdd

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [dit_embed, bit_diffusion, sdd, diffugpt_varlen]
both = pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.NAME)
FILES = {"config.json", "tokenizer.json", "log.jsonl", "model.safetensors", "state.pt",
         "samples.txt", "loss.png", "trace.png"}
TINY = dict(tokenizer="byte", n_layer=1, n_head=2, n_embd=32, seq_len=32, batch_size=4, steps=20,
            warmup=4, eval_every=10, save_every=5, device="cpu", dtype="float32")
OWN = {diffugpt_varlen: dict(init_from="scratch")}  # without its parent, which is a run of its own


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A small text file; everything prepared from it stays in its own cache."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("text")
    words = ["the cat|a dog|my friend|the old king", "saw|liked|found|lost",
             "a red ball|the house|some bread|a tall tree"]
    docs = [" ".join(draw.choice(part.split("|")) for part in words) + f" {i % 7} times."
            for i in range(300)]
    (folder / "small.txt").write_text("<|endoftext|>".join(docs))
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


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_in_the_terminal_saves_says_how_to_go_on_and_exits_with_130(text, tmp_path):
    out = tmp_path / "run"
    process = spawn(ROOT / "bit_diffusion.py", *flags(text, out, steps=10 ** 6, eval_every=10 ** 6))
    deadline = time.time() + 600
    while time.time() < deadline and process.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, err = process.communicate(timeout=600)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert said.splitlines()[-1] == f"stopped at step {state(out)['step']}; go on with --resume"


def test_a_stop_before_the_first_step_can_be_resumed_too(text, straight, quick, tmp_path,
                                                         monkeypatch):
    begin = common.Run.begin
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "begin", lambda run: (begin(run), signal.raise_signal(2)))
        with pytest.raises(SystemExit):
            bit_diffusion.train(config(bit_diffusion, text, tmp_path / "run"))
    assert state(tmp_path / "run")["step"] == 0
    bit_diffusion.main(["--resume", "--out", str(tmp_path / "run")])
    assert_as_if_undisturbed(tmp_path / "run", straight["bit_diffusion"][0])


def test_a_second_ctrl_c_stops_at_once(text, quick, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 3, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    monkeypatch.setattr(sys, "argv", ["bit_diffusion.py", *flags(text, tmp_path / "run")])
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
        common.run_main(bit_diffusion.main)
    assert stop.type is SystemExit and stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


def test_a_finished_run_can_be_given_more_steps(text, straight, quick, tmp_path):
    out = shutil.copytree(straight["sdd"][0], tmp_path / "run")
    sdd.main(["--resume", "--steps", "24", "--out", str(out)])
    assert losses(out)[:20] == losses(straight["sdd"][0])
    assert [row["step"] for row in log(out, "train")] == list(range(1, 25))
    assert [row["step"] for row in log(out, "val")] == [0, 10, 20, 24]


def test_a_new_run_in_an_old_folder_starts_afresh_and_keeps_the_old_log(text, straight, quick,
                                                                        tmp_path):
    out = shutil.copytree(straight["bit_diffusion"][0], tmp_path / "run")
    bit_diffusion.train(config(bit_diffusion, text, out, steps=3, seed=1))
    assert [row["step"] for row in log(out, "train")] == [1, 2, 3]
    assert len((out / "log.jsonl.old").read_text().splitlines()) > 20


def test_a_new_run_that_cannot_start_leaves_the_old_one_as_it_was(text, straight, tmp_path):
    out = shutil.copytree(straight["bit_diffusion"][0], tmp_path / "run")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(common.UserError):
        bit_diffusion.train(config(bit_diffusion, tmp_path / "no such file.txt", out))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


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
    assert all(p.isfinite().all() for p in load_file(tmp_path / "run/model.safetensors").values())


def test_a_huge_learning_rate_ends_in_one_sentence(text, quick, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["sdd.py", *flags(text, out, lr="1e30", grad_clip=0)])
    with pytest.raises(SystemExit) as stop:
        common.run_main(sdd.main)
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: the loss is ") and line.count("error") == 1


def test_replace_leaves_the_old_file_when_writing_fails(tmp_path):
    (tmp_path / "file").write_text("old")

    def half(path):
        path.write_text("ne")
        raise OSError("disk full")
    with pytest.raises(OSError):
        common.replace(tmp_path / "file", half)
    assert (tmp_path / "file").read_text() == "old"


def test_a_crash_in_the_middle_of_a_checkpoint_leaves_the_one_before(text, straight, quick,
                                                                     tmp_path, monkeypatch):
    out, honest = tmp_path / "run", torch.save

    def crash(stored, path):
        honest(stored, path)
        if stored["step"] == 10:
            path.write_bytes(path.read_bytes()[:1000])
            raise MemoryError
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", crash)
        with pytest.raises(MemoryError):
            bit_diffusion.train(config(bit_diffusion, text, out))
    assert state(out)["step"] == 5
    bit_diffusion.main(["--resume", "--out", str(out)])
    assert_as_if_undisturbed(out, straight["bit_diffusion"][0])


# ---- what a run leaves ---------------------------------------------------------------------------

@both
def test_a_run_leaves_the_documented_files(script, straight):
    out = straight[script.NAME][0]
    assert {p.name for p in out.iterdir()} == FILES
    for name in ("loss.png", "trace.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        pixels = image.imread(out / name)
        assert min(pixels.shape[:2]) > 300 and pixels.std() > 0.01  # something is drawn
    assert len((out / "samples.txt").read_text("utf-8").split("\n<|endoftext|>\n")) == 64
    stored = json.loads((out / "config.json").read_text())
    assert {"command", "step", "device", "dtype", "threads", "processes", "torch", "machine",
            "parameters", "tokenizer"} <= stored["run"].keys()
    assert stored["config"]["seed"] == 1337 and stored["config"]["vocab_size"] == 257


@both
def test_the_log_has_the_documented_fields(script, straight):
    out, _, cfg = straight[script.NAME]
    for row in log(out, "train"):
        assert row.keys() == {"kind", "step", "tokens", "loss", "lr", "grad_norm", "tok_s",
                              "seconds"}
        assert row["tokens"] == row["step"] * cfg.batch_size * cfg.seq_len
    seconds = [row["seconds"] for row in log(out, "train")]
    assert seconds == sorted(seconds) and seconds[0] > 0
    for row in log(out, "val"):
        assert row.keys() == {"kind", "step", "tokens", "bound", "rows", "nats_per_token",
                              "nats_per_token_se", "bits_per_byte"}
        assert row["tokens"] == row["step"] * cfg.batch_size * cfg.seq_len
        assert row["bound"] == "upper"
        assert math.isclose(row["bits_per_byte"], row["nats_per_token"] / math.log(2) *
                            row["rows"] * cfg.seq_len / size_in_bytes(script, cfg), rel_tol=1e-5)
    assert [row["step"] for row in log(out, "val")] == [0, 10, 20]
    [row] = log(out, "samples")
    assert {"step", "n", "sampling_steps", "nfe", "seconds", "distinct_2", "entropy"} <= row.keys()


def size_in_bytes(script, cfg):
    """Bytes of the text of the rows that evaluate() looks at."""
    rows = script.get_eval_rows("val", cfg, 128)[0]
    tokenizer = script.open_data(cfg.data_dir).tokenizer
    return sum(len(tokenizer.decode(row).encode()) for row in rows)


def test_on_documents_the_log_has_nats_per_document_and_on_tales_the_distance_to_the_floor(
        text, quick, tmp_path):
    bit_diffusion.train(config(bit_diffusion, text, tmp_path / "docs", rows="docs", seq_len=64,
                               steps=1))
    row = log(tmp_path / "docs", "val")[-1]
    assert {"nats_per_doc", "se"} <= row.keys() and not {"floor_per_doc", "gap"} & row.keys()
    bit_diffusion.train(config(bit_diffusion, "tales", tmp_path / "tales", tokenizer="bpe", docs=60,
                               seq_len=160, steps=1))
    row = log(tmp_path / "tales", "val")[-1]
    assert math.isclose(row["gap"], row["nats_per_doc"] - row["floor_per_doc"], abs_tol=1e-5)
    assert 30 < row["floor_per_doc"] < row["nats_per_doc"] and row["gap_se"] > 0


@both
def test_the_progress_and_both_likelihood_units_are_printed_at_every_evaluation(
        script, text, quick, tmp_path, capsys):
    script.train(config(script, text, tmp_path / "run"))
    out, err = capsys.readouterr()
    sign = "<="
    shown = [line for line in out.splitlines() if line.startswith("step ")]
    assert len(shown) == 3
    assert all(f"{sign} " in line and "nats/token" in line and "bits/byte" in line
               for line in shown)
    assert "uniform 5.549, unigram " in out
    assert "20/20" in err and "loss=" in err and "val=" in err and "tok_s=" in err


# ---- averaged weights ----------------------------------------------------------------------------

@both
def test_the_averaged_weights_are_what_is_saved_returned_and_evaluated(script, straight):
    out, model, cfg = straight[script.NAME]
    saved = load_file(out / "model.safetensors")
    assert same(saved, state(out)["ema"]) and same(saved, dict(model.state_dict()))
    assert not same(saved, state(out)["model"])
    row = script.evaluate(model, cfg)
    assert math.isclose(row["nats_per_token"], log(out, "val")[-1]["nats_per_token"], abs_tol=1e-6)


def test_the_average_follows_its_formula_and_ema_0_is_the_raw_model(text, quick, tmp_path,
                                                                    monkeypatch):
    seen, save = [], common.Run.save

    def keep(run, step, tokenizer, model, ema, *rest):
        seen.append([m.head.weight.detach().clone() for m in (model, ema)])
        save(run, step, tokenizer, model, ema, *rest)
    monkeypatch.setattr(common.Run, "save", keep)
    bit_diffusion.train(config(bit_diffusion, text, tmp_path / "run", steps=6, save_every=1,
                               ema=0.3))
    average = torch.zeros_like(seen[0][0])  # the head starts at zero
    for step, (raw, ema) in enumerate(seen, 1):
        keep = min(0.3, (1 + step) / (10 + step))
        average = keep * average + (1 - keep) * raw
        torch.testing.assert_close(ema, average)
    bit_diffusion.train(config(bit_diffusion, text, tmp_path / "raw", steps=3, ema=0))
    assert same(load_file(tmp_path / "raw/model.safetensors"), state(tmp_path / "raw")["model"])


# ---- sharing the work ----------------------------------------------------------------------------

@pytest.mark.parametrize("script, changes", [
    (dit_embed, {}), (dit_embed, dict(loss="vlb"))], ids=["dit_embed", "vlb"])
def test_two_micro_batches_of_four_are_one_batch_of_eight(script, changes, text, quick, tmp_path):
    for name, size in dict(one=dict(batch_size=8), two=dict(batch_size=4, grad_accum=2)).items():
        script.train(config(script, text, tmp_path / name, lr=1e-3, **changes, **size))
    one, two = ([row[1] for row in losses(tmp_path / name)] for name in ("one", "two"))
    rough = changes.get("loss") == "vlb"  # its weights reach the hundreds
    assert one == pytest.approx(two, abs=5e-4 if rough else 1e-5)
    first, *_, last = log(tmp_path / "two", "val")  # and something is learnt
    assert last["nats_per_token"] < first["nats_per_token"] - (0.05 if rough else 0.3)


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
    one, two = ([row[1] for row in losses(out)] for out in (straight[script.NAME][0],
                                                            tmp_path / "run"))
    assert one == pytest.approx(two, abs=1e-4)
    last = [log(out, "val")[-1]["nats_per_token"] for out in (straight[script.NAME][0],
                                                              tmp_path / "run")]
    assert last[0] == pytest.approx(last[1], abs=1e-4)
    assert {p.name for p in (tmp_path / "run").iterdir()} == FILES
    assert done.stdout.count("step    20") == 1  # one process talks
    [folder] = [p for p in (tmp_path / "cache").iterdir() if not p.name.startswith(".")]


def test_averaging_leaves_out_weights_that_have_no_gradient(monkeypatch):
    model = torch.nn.ModuleDict(dict(used=torch.nn.Linear(2, 1), idle=torch.nn.Linear(2, 1)))
    model["used"](torch.ones(1, 2)).sum().backward()
    monkeypatch.setattr(common.dist, "all_reduce", lambda flat: flat.mul_(3))  # 2 ranks: 1 + 2
    loss = common.Run.average(SimpleNamespace(world=2), model, 4.0)
    assert loss == 6 and torch.equal(model["used"].weight.grad, torch.full((1, 2), 1.5))
    assert model["idle"].weight.grad is None


def test_a_batch_that_the_processes_cannot_share_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(common.UserError, match="--batch-size 4 must be a multiple of the 3 proces"):
        bit_diffusion.train(config(bit_diffusion, text, tmp_path / "run"))


# ---- speed and loggers ---------------------------------------------------------------------------

def test_tensorboard_and_wandb_receive_every_number_of_the_log(text, quick, tmp_path, monkeypatch):
    heard = []
    board = SimpleNamespace(SummaryWriter=lambda folder: SimpleNamespace(
        add_scalar=lambda name, value, step: heard.append((name, value, step))))
    bias = SimpleNamespace(init=lambda **kw: heard.append(kw["config"]["seed"]),
                           log=lambda row, step: heard.extend((*kv, step) for kv in row.items()))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", bias)
    cfg = config(bit_diffusion, text, tmp_path / "run", steps=2, log="tensorboard,wandb")
    bit_diffusion.train(dataclasses.replace(cfg))
    first = log(tmp_path / "run", "train")[0]["loss"]
    said = [round(item[1], 6) for item in heard if item != 1337 and item[::2] == ("train/loss", 1)]
    assert 1337 in heard and said == [first, first]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_named_with_its_pip_command(name, tmp_path, monkeypatch,
                                                                      capsys):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", ["bit_diffusion.py", "--log", name, "--out",
                                      str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        common.run_main(bit_diffusion.main)
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err == f"error: --log {name} needs: pip install {name}\n"


@pytest.mark.parametrize("hardware", [True, False])
def test_bfloat16_is_the_default_where_the_hardware_multiplies_it(hardware, monkeypatch):
    monkeypatch.setattr(common, "cpu_has_bf16", lambda: hardware)
    cpu, x = torch.device("cpu"), torch.ones(2, 2)
    for asked, got in dict(auto="bfloat16" if hardware else "float32", float32="float32",
                           bfloat16="bfloat16").items():
        amp, name = common.precision(cpu, asked)
        with amp:
            assert name == got and (x @ x).dtype == getattr(torch, got)


def test_a_device_is_found_and_every_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert common.pick_device("auto").type == "mps" and common.pick_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert common.pick_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert common.pick_device("auto") == torch.device("cuda:1")


# ---- metrics and film ----------------------------------------------------------------------------

def test_text_metrics_count_what_they_say():
    marks = common.text_metrics([[1, 1, 2], [1, 2]])
    assert marks["distinct_1"] == 2 / 5 and marks["distinct_2"] == 2 / 3  # 11 12 12
    assert marks["distinct_3"] == 1 and marks["repetition"] == 1 / 3
    assert marks["entropy"] == pytest.approx(-0.6 * math.log(0.6) - 0.4 * math.log(0.4))
    assert set(common.text_metrics([[], []]).values()) == {0}
    assert common.se(torch.tensor([1.0, 3.0])) == 1 and common.se(torch.ones(1)) == 0


LETTERS = SimpleNamespace(vocab_size=26, decode=lambda ids: "".join(chr(97 + i) for i in ids))


def test_the_film_shows_first_and_last_frame_and_a_block_for_every_hole():
    film = [(k, [26] * (20 - k) + list(range(k))) for k in range(21)]
    shown = common.filmstrip(film, LETTERS).splitlines()
    assert len(shown) == 6
    assert shown[0] == f"    0  {common.MASK_GLYPH * 20}"
    assert shown[-1] == "   20  abcdefghijklmnopqrst"
    assert common.show_ids([26, 0, -1, 1], LETTERS) == "{0}a{0}b".format(common.MASK_GLYPH)
    assert common.filmstrip(film[:1], LETTERS) == shown[0]


@pytest.mark.filterwarnings("error")
def test_a_trace_of_any_text_can_be_drawn(tmp_path):
    """Formulas, letters the font does not have, control characters."""
    words = ["$\\frac$", "\u6771\u4eac", "\x07", "_^{", ""]
    tokenizer = SimpleNamespace(vocab_size=5, decode=lambda ids: "".join(words[i] for i in ids))
    film = [(0, [5] * 5), (1, [0, 5, 2, 5, 4]), (2, [0, 1, 2, 3, 4])]
    common.plot_trace(tmp_path / "trace.png", film, tokenizer, SimpleNamespace(eos=4))
    assert image.imread(tmp_path / "trace.png").std() > 0.01
