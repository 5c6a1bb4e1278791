"""Faults: power cuts, full disks, dead workers, damaged files and mistakes cost no result and end
in one sentence. Tiny models on a tiny text."""
import dataclasses
import errno
import itertools
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
import traceback
import typing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bit_diffusion
import common_v1 as common
import diffugpt_varlen
import dit_embed
import sdd
from data import prepare

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {s.NAME: s for s in (dit_embed, bit_diffusion, sdd, diffugpt_varlen)}
each = pytest.mark.parametrize("name", SCRIPTS)
posix = pytest.mark.skipif(os.name == "nt", reason="processes and signals of POSIX")
TINY = ("--tokenizer byte --n-layer 1 --n-head 2 --n-embd 32 --seq-len 32 --batch-size 4 --steps 6 "
        "--warmup 2 --eval-every 3 --save-every 2 --device cpu --dtype float32").split()
STEPS = 6
CHECKPOINT = "config.json", "tokenizer.json", "model.safetensors", "state.pt"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two texts and their cache."""
    home = tmp_path_factory.mktemp("home")
    for seed, file in enumerate(("small.txt", "other.txt")):
        draw = random.Random(seed)
        docs = [" ".join(draw.choice("the a cat dog king saw liked lost red house tree".split())
                         for _ in range(25)) for _ in range(60)]
        (home / file).write_text("<|endoftext|>".join(docs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXT_DIFFUSION_CACHE", str(home / "cache"))
        for file in ("small.txt", "other.txt"):
            prepare.prepare(str(home / file), "byte", quiet=True)
        yield home


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli(name, *flags) -> exit code, stdout, stderr: the command line without a new process."""
    for script in SCRIPTS.values():
        monkeypatch.setattr(script, "grade", lambda *_, **__: None)
    monkeypatch.setattr(common, "plot_loss", lambda *_: None)

    def call(name, *argv):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            common.run_main(SCRIPTS[name].main)
        return stop.value.code or 0, *capsys.readouterr()
    return call


def line(home, name, out, *more, scratch=True):
    """The command line of a training."""
    own = ["--init-from", "scratch"] if name == "diffugpt_varlen" and scratch else []
    return ["--data", home / "small.txt", *TINY, *own, "--out", out, *more]


# ---- processes that can be killed ----------------------------------------------------------------

def serve():
    """Fork a child for every job on stdin and print how it ended: what a fresh process would do,
    without importing everything again."""
    torch.set_num_threads(1)
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.zeros(2, 2)
    for optimizer in (torch.optim.Muon([weight]), torch.optim.AdamW([weight])):
        optimizer.step()  # imports much of torch
    for job in map(json.loads, sys.stdin):
        child = os.fork()
        if child == 0:
            code = 70
            try:
                for number, path in ((1, job["out"]), (2, job["err"])):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                globals()[job["fault"]](*job["how"])
                common.plot_loss = SCRIPTS[job["name"]].grade = lambda *_, **__: None
                sys.argv = [f"{job['name']}.py", *job["argv"]]
                common.run_main(SCRIPTS[job["name"]].main)
            except SystemExit as stop:
                code = stop.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.setprofile(None)
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def nothing():
    """No fault."""


def count_events(path):
    """Keep in a file how many calls and returns of functions the process has seen at its end."""
    seen, leave = itertools.count(), os._exit
    sys.setprofile(lambda *_: next(seen))
    os._exit = lambda code: (Path(path).write_text(str(next(seen))), leave(code))


def die_at_event(number):
    """SIGKILL at one of these calls or returns."""
    seen = itertools.count()
    sys.setprofile(lambda *_: next(seen) == number and os.kill(os.getpid(), signal.SIGKILL))


def die_while_replacing(number, where):
    """SIGKILL in the number-th common.replace: in the middle of the temporary file, before it gets
    its name, or right after."""
    honest, calls = common.replace, itertools.count(1)

    def replace(path, write):
        now = next(calls) == number

        def torn(temporary):
            write(temporary)
            if where == "middle":
                os.truncate(temporary, temporary.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        honest(path, torn if now and where != "after" else write)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
    common.replace = replace


def small_files(size):
    """No file may grow beyond so many bytes, as on a full disk."""
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.fixture(scope="module")
def fork(home):
    """fork(name, argv, fault, how...) -> exit code and stderr of a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1",
           "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    server = subprocess.Popen([sys.executable, "-c", "import test_faults; test_faults.serve()"],
                              env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(name, argv, fault="nothing", *how, out=home / "stdout"):
        job = dict(name=name, argv=[*map(str, argv)], fault=fault, how=how, out=str(out),
                   err=str(home / "stderr"))
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = server.stdout.readline()
        return int(code), (home / "stderr").read_text()
    yield call
    server.stdin.close()
    assert server.wait(timeout=600) == 0


@pytest.fixture(scope="module")
def straight(home, fork):
    """{name: folder of an undisturbed run, with the number of its events in events.txt}."""
    folder = home / "straight"
    for name in SCRIPTS:
        code, err = fork(name, line(home, name, folder / name), "count_events",
                         str(home / f"{name}.txt"))
        assert code == 0, err
    return folder


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
    """Losses, evaluations and weights of an undisturbed run, and nothing half-written."""
    assert losses(out) == losses(straight) and len(losses(out)) >= 4
    assert log(out, "val") == log(straight, "val")
    assert same(load_file(out / "model.safetensors"), load_file(straight / "model.safetensors"))
    assert same(state(out)["model"], state(straight)["model"])
    steps = [json.loads((f / "config.json").read_text())["run"]["step"] for f in (out, straight)]
    assert steps[0] == steps[1] == state(out)["step"]
    assert not [*out.glob("*.tmp")]


def one_sentence(code, err):
    """The one sentence that a fault ends in; the progress bar may stand before it."""
    assert code == 2 and "Traceback" not in err, (code, err)
    last = err.strip("\n").replace("\r", "\n").split("\n")[-1]
    assert last.startswith("error: ") and err.count("error: ") == 1 and "  " not in last, err
    return last


# ---- kill -9 -------------------------------------------------------------------------------------

def kills():
    """Twenty moments at which a run is killed, the same each time."""
    draw, moments = random.Random(20), []
    for name in SCRIPTS:  # 3 checkpoints, 5 files are replaced in each
        moments += [(name, "die_at_event", draw.uniform(0.3, 0.97)),
                    (name, "die_at_event", draw.uniform(0.6, 0.97)),
                    (name, "die_while_replacing", draw.randint(1, 15), draw.choice(
                        ["middle", "before", "after"]))]
    return moments + [("bit_diffusion", "die_while_replacing", 14, "middle"),
                      ("sdd", "die_while_replacing", 8, "after")]


@posix
@pytest.mark.parametrize("name, fault, when, where", [(*k, "")[:4] for k in kills()])
def test_a_run_that_is_killed_anywhere_loses_nothing(name, fault, when, where, home, fork, straight,
                                                     tmp_path):
    argv = line(home, name, tmp_path / "run")
    if fault == "die_at_event":
        how = [int(when * int((home / f"{name}.txt").read_text()))]
    else:
        how = [when, where]
    code, err = fork(name, argv, fault, *how)
    assert code == -signal.SIGKILL, err
    saved = (tmp_path / "run" / "state.pt").exists()
    code, err = fork(name, [*argv, *["--resume"] * saved])
    assert code == 0, err
    assert_as_if_undisturbed(tmp_path / "run", straight / name)


@posix
def test_a_run_killed_in_its_first_stage_goes_on_there(home, fork, straight, tmp_path):
    def argv(out):
        return line(home, "diffugpt_varlen", out, "--parent-steps", 4, scratch=False)
    assert fork("diffugpt_varlen", argv(tmp_path / "straight"))[0] == 0
    code, err = fork("diffugpt_varlen", argv(tmp_path / "run"), "die_while_replacing", 8, "middle")
    assert code == -signal.SIGKILL, err
    assert state(tmp_path / "run_parent")["step"] == 2 and not (tmp_path / "run").exists()
    code, err = fork("diffugpt_varlen", [*argv(tmp_path / "run"), "--resume"])
    assert code == 0, err
    for name in ("run", "run_parent"):
        assert_as_if_undisturbed(tmp_path / name, tmp_path / name.replace("run", "straight"))


@posix
def test_a_parent_with_a_flipped_bit_is_not_adapted(home, fork, tmp_path):
    argv = line(home, "diffugpt_varlen", tmp_path / "run", "--parent-steps", 2, scratch=False)
    assert fork("diffugpt_varlen", argv)[0] == 0
    path = tmp_path / "run_parent" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 16
    path.write_bytes(data)
    assert "its checksum is wrong" in one_sentence(*fork("diffugpt_varlen", argv))


@posix
def test_a_run_killed_twice_between_checkpoints_and_in_an_old_folder(home, fork, straight,
                                                                     tmp_path):
    """The log is cut back twice; what the folder held before, or no checkpoint, is no obstacle."""
    out = shutil.copytree(straight / "sdd", tmp_path / "run")
    argv = line(home, "sdd", out)
    code, err = fork("sdd", [*argv, "--seed", 1], "die_while_replacing", 3, "middle")
    assert code == -signal.SIGKILL and not (out / "state.pt").exists(), err
    code, err = fork("sdd", ["sample", "--out", out])  # old weights beside a new config.json
    assert "it is of another run than config.json" in one_sentence(code, err)
    for more, number, where in (([], 8, "after"), (["--resume"], 3, "before")):
        code, err = fork("sdd", [*argv, *more], "die_while_replacing", number, where)
        assert code == -signal.SIGKILL and (out / "state.pt").exists(), err
    code, err = fork("sdd", [*argv, "--resume"])
    assert code == 0, err
    assert_as_if_undisturbed(out, straight / "sdd")


# ---- full and read-only disks --------------------------------------------------------------------

@posix
@each
@pytest.mark.parametrize("file", ["log.jsonl", "model.safetensors", "state.pt"])
def test_a_full_disk_is_one_sentence_and_the_checkpoint_stays(name, file, home, fork, straight,
                                                              tmp_path):
    out = shutil.copytree(straight / name, tmp_path / "run")
    before = {file: (out / file).read_bytes() for file in CHECKPOINT}
    argv = ["--resume", "--steps", STEPS + 2, "--out", out]
    size = (out / file).stat().st_size - 1  # more than stderr, which is a file too
    said = one_sentence(*fork(name, argv, "small_files", size))
    assert f"cannot use {out / file} (" in said and "--out; what was saved before is kept" in said
    assert json.loads((out / "config.json").read_text())["run"]["step"] == STEPS
    for kept in {"state.pt", file} & before.keys():
        assert (out / kept).read_bytes() == before[kept]
    assert not [*out.glob("*.tmp")]
    code, err = fork(name, ["sample", "--n", 1, "--out", out])
    assert code == 0, err
    if file == "state.pt":
        code, err = fork(name, argv)
        assert code == 0 and len(losses(out)) == STEPS + 2, err
        assert losses(out)[:STEPS] == losses(straight / name)


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO"])
def test_what_the_system_refuses_is_named(number, home, tmp_path, cli, monkeypatch):
    def refuse(*_):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        code, _, err = cli("bit_diffusion", *line(home, "bit_diffusion", tmp_path / "run"))
    assert one_sentence(code, err).startswith(
        f"error: cannot use {tmp_path / 'run' / 'tokenizer.json'} "
        f"({os.strerror(getattr(errno, number))}): check its rights and the free space")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["log.jsonl"]


@posix
def test_data_that_do_not_fit_and_folders_that_are_none(home, fork, straight, tmp_path):
    (tmp_path / "text.txt").write_text((home / "small.txt").read_text() + " more" * 9)
    before = {*(home / "cache").iterdir()}
    argv = ["--data", tmp_path / "text.txt", *line(home, "bit_diffusion", tmp_path / "run")[2:]]
    code, err = fork("bit_diffusion", argv, "small_files", 1000)
    assert "cannot prepare" in one_sentence(code, err) and not (tmp_path / "run").exists()
    assert {*(home / "cache").iterdir()} == before
    for out in ("/dev/null", "/dev/null/run", *["/proc/run"] * Path("/proc/self").exists()):
        said = fork("bit_diffusion", line(home, "bit_diffusion", out))
        assert f"cannot write to {out} (" in one_sentence(*said)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@each
def test_output_that_nobody_can_take_is_one_sentence(name, fork, straight):
    code, err = fork(name, ["sample", "--n", 1, "--out", straight / name], out="/dev/full")
    assert "cannot use the output (No space left on device)" in one_sentence(code, err)


def test_a_full_memory_is_one_sentence(home, straight, cli, monkeypatch):
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")):
        def refuse(*_, **__):
            raise error
        monkeypatch.setattr(bit_diffusion, "sample", refuse)
        code, _, err = cli("bit_diffusion", "sample", "--out", straight / "bit_diffusion")
        assert "error: the memory is full: lower --batch-size" in one_sentence(code, err)


# ---- torchrun ------------------------------------------------------------------------------------

DIE = """
import os, signal, sys
sys.path.insert(0, {root!r})
import common_v1 as common, sdd
row = common.Run.train_row
def train_row(self, step, *args, **kw):
    row(self, step, *args, **kw)
    if step == 3 and self.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
common.Run.train_row = train_row
common.plot_loss = sdd.grade = lambda *_, **__: None
if __name__ == "__main__":
    common.run_main(sdd.main)
"""


@posix
def test_a_dead_worker_ends_the_job_which_goes_on_from_its_checkpoint(home, straight, tmp_path):
    out = tmp_path / "run"

    def torchrun(*argv):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
             "--max-restarts", "0", "--master-port", str(port), *map(str, argv)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=300)
    (tmp_path / "die.py").write_text(DIE.format(root=str(ROOT)))
    clock = time.time()
    done = torchrun(tmp_path / "die.py", *line(home, "sdd", out))
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr, done.stderr
    assert state(out)["step"] == 2 and time.time() - clock < 240
    (tmp_path / "die.py").write_text(DIE.format(root=str(ROOT)).replace("step == 3", "False"))
    done = torchrun(tmp_path / "die.py", *line(home, "sdd", out, "--resume"))
    assert done.returncode == 0, done.stderr
    one, two = ([row[1] for row in losses(folder)] for folder in (straight / "sdd", out))
    assert one == pytest.approx(two, abs=1e-4) and len(two) == STEPS
    one, two = (log(folder, "val")[-1]["nats_per_token"] for folder in (straight / "sdd", out))
    assert one == pytest.approx(two, abs=1e-4)


# ---- damaged files -------------------------------------------------------------------------------

WRONG = [None, "", "x", -1, 0, 10 ** 30, -10 ** 30, math.nan, math.inf, 1e308, 1.5, True, [], {}]
DATA = ["train.bin", "val.bin", "test.bin", "train.idx.npy", "val.idx.npy", "meta.json",
        "tokenizer.json"]
COMMANDS = dict(sample=["sample", "--n", 2], resume=["--resume", "--steps", STEPS + 1])


def damages():
    """(script, command, file, kind of damage, seed), more than a hundred."""
    draw, cases = random.Random(100), []
    for file in ("model.safetensors", "state.pt", "config.json", "tokenizer.json", "log.jsonl"):
        for kind in ("flip", "flip", "flip", "cut", "zeros", "zeros", "longer", "gone", "swap",
                     "field", "field", "field", "field"):
            if kind != "field" or "json" in file:
                both = [*COMMANDS] if file == "config.json" else ["resume"] if file in (
                    "state.pt", "log.jsonl") else ["sample"]
                cases += [(command, file, kind) for command in both]
    for file in DATA:
        for kind in ("flip", "cut", "zeros", "longer", "gone", "swap", "field"):
            cases += [("resume", file, kind)] if kind != "field" or "json" in file else []
    names = itertools.cycle(SCRIPTS)
    return [(next(names), *case, draw.randrange(10 ** 6)) for case in cases]


def damage(path, kind, seed, other):
    """Damage a file; `other` is the same file of another run, or of other data."""
    draw, data = random.Random(seed), bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    if kind == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "zeros":
        data[at:at + 64] = bytes(len(data[at:at + 64]))
    elif kind == "longer":
        data += draw.randbytes(100)
    elif kind == "swap":
        data = other.read_bytes()
    elif kind == "field":
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        row = draw.randrange(len(lines))
        made = part = json.loads(lines[row])
        while isinstance(part[key := draw.choice([*part])], dict) and part[key]:
            part = part[key]
        part[key] = draw.choice(WRONG)
        lines[row] = json.dumps(made)
        data = "\n".join(lines).encode()
    path.unlink()
    if kind != "gone":
        path.write_bytes(data)


@pytest.fixture(scope="module")
def right(home, fork, straight):
    """{(name, command): what it computes from files that are whole}, and runs with another seed."""
    results, others = {}, home / "others"
    for name in SCRIPTS:
        code, err = fork(name, line(home, name, others / name, "--seed", 1, "--steps", 2))
        assert code == 0, err
        for command, argv in COMMANDS.items():
            out = shutil.copytree(straight / name, home / "right" / command / name)
            code, err = fork(name, [*argv, "--out", out])
            assert code == 0, err
            results[name, command] = computed(out, command)
    return results, others


def computed(out, command):
    """All that a command has computed."""
    if command == "sample":
        return (out / "samples.txt").read_bytes()
    weights = {k: v.tolist() for k, v in load_file(out / "model.safetensors").items()}
    return losses(out), log(out, "val"), weights


@posix
@pytest.mark.parametrize("name, command, file, kind, seed", damages())
def test_a_damaged_file_is_noticed_or_makes_no_difference(name, command, file, kind, seed, home,
                                                          straight, right, cli, tmp_path,
                                                          monkeypatch):
    results, others = right
    out, script = shutil.copytree(straight / name, tmp_path / "run"), SCRIPTS[name]
    path, other = out / file, others / name / file
    if file in DATA and command == "resume":
        shutil.copytree(home / "cache", tmp_path / "cache")
        monkeypatch.setenv("TEXT_DIFFUSION_CACHE", str(tmp_path / "cache"))
        [path] = (tmp_path / "cache").glob(f"small-*/{file}")
        [other] = (tmp_path / "cache").glob(f"other-*/{file}")
    if file == "tokenizer.json":
        other = prepare.TALES_BPE
    damage(path, kind, seed, other)
    script.open_data.cache_clear()
    code, said, err = cli(name, *COMMANDS[command], "--out", out)
    script.open_data.cache_clear()
    if code:
        said = one_sentence(code, err)
        assert str(path.parent) in said or file == "config.json" and "it must be " in said
        assert command != "sample" or err.count("\n") == 1
        return
    assert "Traceback" not in err
    got, want = computed(out, command), results[name, command]
    if file == "config.json" and command == "sample" and "was edited after" in said:
        return  # sampling settings are the user's to edit, and the output says so
    if file == "log.jsonl" and kind == "gone":  # the past is missing, nothing of it is wrong
        got, want = ((a[-1:], b[-1:], c) for a, b, c in (got, want))
    assert got == want


@each
def test_a_config_that_was_edited_is_said_to_be_and_never_resumed(name, straight, cli, tmp_path):
    """Sampling takes its settings from there, so that they may be edited; --resume has flags."""
    out = shutil.copytree(straight / name, tmp_path / "run")
    made = json.loads((out / "config.json").read_text())
    made["config"] |= dict(lr=2 * made["config"]["lr"], temperature=0.9)
    (out / "config.json").write_text(json.dumps(made))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    code, _, err = cli(name, *COMMANDS["resume"], "--out", out)
    assert f"{out / 'config.json'} is not as the run wrote it: undo" in one_sentence(code, err)
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}
    code, said, _ = cli(name, *COMMANDS["sample"], "--out", out)
    assert code == 0 and f"note: {out / 'config.json'} was edited after the run wrote it" in said
    assert "was edited" not in cli(name, *COMMANDS["sample"], "--out", straight / name)[1]


@each
def test_a_stored_word_that_a_setting_does_not_know_is_refused(name, straight, cli, tmp_path):
    out = shutil.copytree(straight / name, tmp_path / "run")
    whole = json.loads((out / "config.json").read_text())
    for field in dataclasses.fields(SCRIPTS[name].Config):
        if typing.get_args(field.type):
            made = whole | dict(config=whole["config"] | {field.name: "x"})
            (out / "config.json").write_text(json.dumps(made))
            for command in COMMANDS.values():
                code, _, err = cli(name, *command, "--out", out)
                assert "is not a configuration of this script" in one_sentence(code, err)


def test_weights_of_other_tools_load_and_ours_load_elsewhere(straight, tmp_path, cli):
    """Without a checksum, or rewritten with the same tensors; one that is there is believed."""
    out = shutil.copytree(straight / "bit_diffusion", tmp_path / "run")
    path, sample = out / "model.safetensors", ("sample", "--n", 1, "--out", out)
    tensors = load_file(path)
    before = cli("bit_diffusion", *sample)
    assert before[0] == 0
    for metadata in (None, {"format": "pt"}):
        save_file(tensors, path, metadata)
        assert cli("bit_diffusion", *sample) == before
    save_file(tensors, path, {"sha256": common.checksum(tensors)})
    assert cli("bit_diffusion", *sample) == before
    for name in tensors:
        save_file(tensors | {name: tensors[name] + 1e-3}, path,
                  {"sha256": common.checksum(tensors)})
        code, _, err = cli("bit_diffusion", *sample)
        assert "its checksum is wrong" in one_sentence(code, err)


@posix
def test_a_checkpoint_without_checksums_goes_on(home, fork, straight, tmp_path):
    """As they were before there were any, also after a kill in the middle of the next one."""
    out = shutil.copytree(straight / "bit_diffusion", tmp_path / "run")
    made = json.loads((out / "config.json").read_text())
    del made["sha256"], made["run"]["id"], made["run"]["tokenizer_sha256"]
    (out / "config.json").write_text(json.dumps(made))
    torch.save({k: v for k, v in state(out).items() if k not in ("id", "log")}, out / "state.pt")
    save_file(load_file(out / "model.safetensors"), out / "model.safetensors")
    argv = ["--resume", "--steps", STEPS + 1, "--out", out]
    for how in (["die_while_replacing", 4, "before"], ["die_while_replacing", 5, "middle"], []):
        code, err = fork("bit_diffusion", argv, *how)
        assert code == (-signal.SIGKILL if how else 0), err
        assert fork("bit_diffusion", ["sample", "--n", 1, "--out", out])[0] == 0
    assert len(losses(out)) == STEPS + 1
    assert losses(out)[:STEPS] == losses(straight / "bit_diffusion")


# ---- mistakes ------------------------------------------------------------------------------------

@each
@pytest.mark.parametrize("argv, sentence", [
    ("--seed 1" + "0" * 30, "it must be between -2^31 and 2^31"),
    ("--resume --warmup 99999999999", "--warmup is 99999999999, it must be between"),
    ("--resume --lr -1", "--lr is -1.0, it must be at least 0"),
    ("sample --n 0", "--n is 0, it must be at least 1"),
    ("sample --temperature nan", "--temperature is nan, it must be at least 0"),
    ("sample --top-p 1.5", "--top-p is 1.5, it must be at most 1"),
    ("sample --seq-len 31", "was made with other settings: --seq-len 31 (stored: 32)"),
    ("eval --data no-such-file.txt", "neither a file or folder nor one of the names"),
], ids=lambda text: text[:24])
def test_a_mistake_with_a_finished_run_leaves_it_alone(name, argv, sentence, straight, cli):
    before = {p.name: p.read_bytes() for p in (straight / name).iterdir()}
    code, _, err = cli(name, *argv.split(), "--out", straight / name)
    assert sentence in one_sentence(code, err)
    assert before == {p.name: p.read_bytes() for p in (straight / name).iterdir()}


@pytest.mark.parametrize("name", [name for name in SCRIPTS])
@pytest.mark.parametrize("argv, sentence", [
    (["--infill", "no hole"], "--infill has no hole: write ___"),
    (["--infill", "a ___", "--prompt", "a"], "--prompt and --infill exclude each other"),
    (["--infill", "x" * 40 + "___"], "--infill has 41 tokens but a row has room for 31"),
    (["--infill", "a ___99"], "tokens but a row has room for 31")], ids=lambda x: str(x)[:12])
def test_what_cannot_be_filled_in_is_refused(name, argv, sentence, straight, cli):
    code, _, err = cli(name, "sample", *argv, "--out", straight / name)
    assert sentence in one_sentence(code, err)
