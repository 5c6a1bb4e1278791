"""A small text, and processes that can be killed: shared by the tests of runs and faults."""
import importlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def small_text(path, n=200, seed=0):
    """Write n documents of one sentence to `path`."""
    draw = random.Random(seed)
    words = ["the cat|a dog|my friend|the old king", "saw|liked|found|lost",
             "a red ball|the house|some bread|a tall tree"]
    docs = [" ".join(draw.choice(part.split("|")) for part in words) + f" {i % 7} times."
            for i in range(n)]
    path.write_text("<|endoftext|>".join(docs))


def serve():
    """Fork a child for every job on stdin and print how it ended: what a fresh process would do,
    without importing everything again."""
    names = "ar mdlm dit_embed bit_diffusion sdd diffugpt_varlen".split()
    scripts = {name: importlib.import_module(name) for name in names}
    torch.set_num_threads(1)
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.zeros(2, 2)
    for optimizer in (scripts["ar"].fast.Muon([weight], 0.0), torch.optim.AdamW([weight])):
        optimizer.step()  # imports much of torch
    for job in map(json.loads, sys.stdin):
        for rank in range(job["world"]):
            child = os.fork()
            if child == 0:
                break
        if child == 0:
            code, script = 70, scripts[job["name"]]
            os.environ.update(job["env"], RANK=str(rank), WORLD_SIZE=str(job["world"]))
            try:
                for number, path in ((1, job["out"]), (2, job["err"])):
                    path += f".{rank}" if rank else ""
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                script.common.plot_loss = lambda *_: None
                if not job["argv"] or job["argv"][0] not in ("sample", "eval"):
                    script.common.show_samples = lambda *_: None
                globals()[job["fault"]](script.common, *job["how"])
                sys.argv = [f"{job['name']}.py", *job["argv"]]
                script.common.run_main(script.main)
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.setprofile(None)
                sys.stderr.flush()
                os._exit(code)
        print(*(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(job["world"])), flush=True)


def nothing(common):
    """No fault."""


def count_events(common, path):
    """Keep in a file how many calls and returns of functions the process has seen at its end."""
    seen, leave = itertools.count(), os._exit
    sys.setprofile(lambda *_: next(seen))
    os._exit = lambda code: (Path(path).write_text(str(next(seen))), leave(code))


def die_at_event(common, number):
    """SIGKILL at one of these calls or returns."""
    seen = itertools.count()
    sys.setprofile(lambda *_: next(seen) == number and os.kill(os.getpid(), signal.SIGKILL))


def die_while_replacing(common, number, where):
    """SIGKILL in the number-th common.replace: in the middle of the temporary file, before it gets
    its name, or right after."""
    honest, calls = common.replace, itertools.count(1)

    def replace(path, write):
        now = next(calls) == number

        def torn(file):
            write(file)
            if where == "middle":
                file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        honest(path, torn if now and where != "after" else write)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
    common.replace = replace


def small_files(common, size):
    """No file may grow beyond so many bytes, as on a full disk."""
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


class Fork:
    """fork(name, argv, fault, how...) -> exit code and stderr of a process of its own. Of `world`
    processes, as torchrun starts them: the worst exit code and stderr of the first."""

    def __init__(self, folder):
        env = {**os.environ, "OMP_NUM_THREADS": "1",
               "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        self.folder, self.server = folder, subprocess.Popen(
            [sys.executable, "-c", "import harness; harness.serve()"], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, name, argv, fault="nothing", *how, out=None, world=1, **env):
        job = dict(name=name, argv=[*map(str, argv)], fault=fault, how=how, world=world, env=env,
                   out=str(out or self.folder / "stdout"), err=str(self.folder / "stderr"))
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        codes = [int(code) for code in self.server.stdout.readline().split()]
        return max(codes, key=abs), (self.folder / "stderr").read_text()

    def close(self):
        self.server.stdin.close()
        assert self.server.wait(timeout=600) == 0
