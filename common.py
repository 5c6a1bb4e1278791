"""What all scripts share and no method needs: command line, run folder, checkpoints, samples."""
import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

from data.files import UserError, read_log, replace, run_main, show_help, usable  # noqa: F401
from data.prepare import Tokenizer, refuse_unknown
from data.tales import grade
from data.units import entropy_of, report, tokens_of
from fast import machine, pick_device, pick_dtype

ROOT = Path(__file__).resolve().parent
for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(name, "256")  # else oneDNN keeps 1024 kernels for bfloat16: 4 GB
CHECKPOINT_KEYS = ("preset", "vocab_size", "seq_len", "rows", "n_layer", "n_head", "n_embd", "eos",
                   "bos")


# ---- command line ------------------------------------------------------------------------------
def parse(Config, presets, argv):
    """Command line -> (command, Config). Flags change the defaults of --preset in a new run, and
    the settings of the checkpoint in --out for sample, eval and --resume."""
    command, argv = (argv[0], argv[1:]) if argv and argv[0][:1] != "-" else ("train", argv)
    if command not in ("train", "sample", "eval"):
        raise UserError(f"unknown command '{command}': choose train, sample or eval")
    # --out and --preset are needed before all flags are parsed
    flags = dict(itertools.pairwise(part for word in argv for part in word.split("=", 1)))
    stored = (command != "train" or "--resume" in argv) and not {"-h", "--help"} & {*argv}
    default = Config(**presets.get(flags.get("--preset", Config.preset), {}))
    if stored:
        default = load_config(Config, flags.get("--out", Config.out),
                              reads_data=command != "sample" and "--data" not in flags,
                              resume=command == "train")
    try:
        with contextlib.redirect_stderr(io.StringIO()) as heard:
            cfg = tyro.cli(Config, args=argv, default=default,
                           description=sys.modules[Config.__module__].__doc__)
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        said = re.sub("[│╭╮╰╯─]+|-{3,}", " ", heard.getvalue())
        raise UserError(" ".join(said.split())) from None
    check(cfg, default if stored else cfg)
    return command, cfg


def check(cfg, stored):
    """One UserError about all values that cannot work: an int must be at least 1 (0 where that is
    the default, num_steps, seed), a float at least 0, and the fixed fields as in `stored`."""
    bad = cfg.problems() if hasattr(cfg, "problems") else []
    keys = CHECKPOINT_KEYS + getattr(cfg, "checkpoint_keys", ())
    for field in dataclasses.fields(cfg):
        value, flag = getattr(cfg, field.name), f"--{field.name.replace('_', '-')}"
        least = int(field.type is int and field.default and flag not in ("--num-steps", "--seed"))
        if field.type in (int, float) and not least <= value < 2 ** 31:  # nan is refused, too
            bad.append(f"{flag} is {value}, it must be at least {least} and less than 2^31")
        if field.name in keys and value != getattr(stored, field.name):
            bad.append(f"leave out {flag}: the checkpoint has {getattr(stored, field.name)}")
    n = 2 * max(1, cfg.n_head)
    rules = {f"--out {cfg.out} must be a folder of its own, as out/ar": bool(Path(cfg.out).name),
             f"--n-embd {cfg.n_embd} must be a multiple of 2 x n_head = {n}": cfg.n_embd % n == 0,
             f"--top-p {cfg.top_p} must be at most 1": cfg.top_p <= 1,
             f"--ema {cfg.ema} must be less than 1": cfg.ema < 1,
             "--temperature must be 0 or at least 1e-6": not 0 < cfg.temperature < 1e-6}
    if bad := bad + [sentence for sentence, holds in rules.items() if not holds]:
        raise UserError("; ".join(bad))


# ---- run folder and checkpoints ----------------------------------------------------------------
class Run:
    """A run folder with its log, progress bar and checkpoints, of one process or, under torchrun,
    of several; only rank 0 writes. Training enters it as a context, which locks the folder."""

    def __init__(self, cfg):
        self.cfg, self.out, self.stopped = cfg, Path(cfg.out), False
        self.seconds, self.tokens = 0.0, 0  # of training until now
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device, self.writers, self.exits = pick_device(cfg.device), [], contextlib.ExitStack()
        self.dtype = pick_dtype(cfg.dtype, self.device)
        self.amp = torch.autocast(self.device.type, torch.bfloat16, self.dtype == "bfloat16")
        if cfg.batch_size < self.world:
            raise UserError(f"--batch-size must be at least {self.world}, a row for each process")

    def __enter__(self):
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self.exits.callback(dist.destroy_process_group)
        if self.rank == 0:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.out.with_name(f".{self.out.name}.lock"), blocking=False)
            try:  # two runs must not write into one folder
                self.exits.enter_context(lock)
            except Timeout:
                raise UserError(f"another process uses {self.out}: choose another --out") from None
            is_run = not self.out.exists() or (self.out / "log.jsonl").exists()
            if not is_run and any(self.out.iterdir()):
                raise UserError(f"{self.out} holds other things than a run: choose another --out")
        return self

    def __exit__(self, *_):
        self.exits.close()

    def begin(self, step, model, data):
        """Training starts at `step`. A new run moves an older one aside; a resumed one drops the
        rows of the log that it will write again. From here on Ctrl-C saves before it stops."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self.exits.callback(signal.signal, number, signal.signal(number, self.stop))
        self.clock = time.perf_counter()
        encode_canvas(data.tokenizer, self.cfg, 1)  # a wrong prompt should not cost a training
        if self.rank:
            return
        for package in ("tensorboard", "wandb"):
            if package in self.cfg.log and not importlib.util.find_spec(package):
                raise UserError(f"--log {self.cfg.log} needs `pip install {package}`")
        if self.cfg.resume:
            rows = [row for row in read_log(self.out) if row["step"] < step or
                    row["kind"] == "train" and row["step"] == step]
            self.seconds, self.tokens = (max((row.get(key, 0) for row in rows), default=0)
                                         for key in ("seconds", "tokens"))
            if any(row.get("data", data.fingerprint) != data.fingerprint for row in rows):
                self.say("the data have changed: val may hold what was trained on before")
            replace(self.out / "log.jsonl", lambda file: file.writelines(
                (json.dumps(row) + "\n").encode() for row in rows))
        elif (self.out / "log.jsonl").exists():
            k = next(k for k in itertools.count(1) if not Path(f"{self.out}.{k}").exists())
            self.out.rename(f"{self.out}.{k}")
            self.say(f"{self.out} held an older run, which is in {self.out}.{k} now")
        self.out.mkdir(exist_ok=True)
        if "tensorboard" in self.cfg.log:
            from torch.utils.tensorboard import SummaryWriter
            self.writers.append(SummaryWriter(str(self.out)).add_scalar)
        if "wandb" in self.cfg.log:
            import wandb
            wandb.init(project="text-diffusion", name=self.out.name, config=vars(self.cfg))
            self.writers.append(lambda key, value, step: wandb.log({key: value}, step))
        size = sum(p.numel() for p in model.parameters())
        self.log("config", step, command=" ".join(sys.argv), config=dataclasses.asdict(self.cfg),
                 parameters=size, tokenizer=data.tokenizer.fingerprint, data=data.fingerprint,
                 torch=torch.__version__, machine=machine(self.device), device=str(self.device),
                 processes=self.world, dtype=self.dtype, threads=torch.get_num_threads())
        self.say(f"{size / 1e6:.2f}M parameters, {self.device} {self.dtype}, {self.out}; to beat: "
                 f"the unigram entropy, {data.unigram_entropy:.3f} nats/token")
        self.bar = self.exits.enter_context(tqdm(  # disable=None: only on a terminal
            total=self.cfg.steps, initial=step, unit="step", dynamic_ncols=True, disable=None))

    def stop(self, number, frame):
        """Ctrl-C: the training loop finishes its step and saves. A second one stops at once."""
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def stopping(self):
        """Was any of the processes asked to stop?"""
        if self.world == 1:
            return self.stopped
        asked = torch.tensor(float(self.stopped), device=self.device)
        self.all_reduce([asked])
        return asked.item() > 0

    def all_reduce(self, tensors):
        """Add up each tensor over all processes, in place."""
        if self.world > 1:
            flat = torch.cat([x.reshape(-1) for x in tensors])
            dist.all_reduce(flat)
            for x, part in zip(tensors, flat.split([x.numel() for x in tensors])):
                x.copy_(part.view_as(x))

    def say(self, text):
        """Print without breaking the progress bar; what could command a terminal becomes ?."""
        if self.rank == 0:
            tqdm.write(re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f]", "?", text), file=sys.stdout)

    def log(self, kind, step, **row):
        """Append a row to log.jsonl and send its floats to --log."""
        if self.rank == 0:
            row = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(dict(kind=kind, step=step, **row)) + "\n")
            values = {f"{kind}/{k}": v for k, v in row.items() if isinstance(v, float)}
            for write, (key, value) in itertools.product(self.writers, values.items()):
                write(key, value, step)

    def log_step(self, step, batch_tokens, loss, **row):
        """Log an optimizer step and all tokens until it; seconds are those of training alone."""
        took, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        self.seconds += took
        speed = batch_tokens / took
        self.tokens += batch_tokens
        self.log("train", step, tokens=self.tokens, loss=loss, **row, tok_s=speed,
                 seconds=self.seconds)
        if self.rank == 0:
            text = f"loss {loss:.3f}, {speed:,.0f} tokens/s"
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
            if self.bar.disable and self.seconds // 60 > (self.seconds - took) // 60:
                self.say(f"step {step:5} of {self.cfg.steps}: {text}")  # a line a minute

    def validate(self, step, evaluate):
        """Log and print what evaluate() returns."""
        if self.rank == 0:
            with self.amp:
                row = evaluate()
            self.log("val", step, **row)
            self.say(f"step {step:5}: {report(row)}")
        self.clock = time.perf_counter()

    def save(self, step, tokenizer, model, ema, optimizers, g):
        """model.safetensors: the averaged weights, the Config and the tokenizer, all that sampling
        needs. state.pt: all that --resume needs."""
        if self.rank == 0:
            about = dict(config=json.dumps(dataclasses.asdict(self.cfg)), step=str(step),
                         tokenizer=json.dumps(tokenizer.spec))
            replace(self.out / "model.safetensors",
                    lambda file: file.write(save(ema.state_dict(), about)))
            state = dict(step=step, tokenizer=tokenizer.fingerprint, g=g.get_state(),
                         parts=[part.state_dict() for part in (model, ema, *optimizers)])
            replace(self.out / "state.pt", lambda file: torch.save(state, file))
        self.clock = time.perf_counter()

    def resume(self, tokenizer, model, ema, optimizers, g):
        """Put back what save() wrote; returns the step."""
        with usable(self.out / "state.pt") as path:
            state = torch.load(path, map_location="cpu", weights_only=True)  # parts move later
            if state["tokenizer"] != tokenizer.fingerprint:
                raise ValueError(f"another tokenizer than the {tokenizer.name} of these data")
            for part, stored in zip((model, ema, *optimizers), state["parts"]):
                part.load_state_dict(stored)
            g.set_state(state["g"].cpu())
        return state["step"]


def checkpoint_of(out):
    """The weights in the run folder `out`; those that the repository ships for weights/NAME and, as
    long as there is no such folder, for out/NAME."""
    out, shipped = Path(out), ROOT / "weights" / f"{Path(out).name}.safetensors"
    untrained = out.parent == Path("out") and not out.exists()
    asked = out.parent in (Path("weights"), shipped.parent)
    return shipped if shipped.exists() and (untrained or asked) else out / "model.safetensors"


def load_config(Config, out, reads_data=False, resume=False):
    """The Config of the checkpoint in the folder `out`. With reads_data its data must have been
    prepared here before: a downloaded checkpoint must not choose what is read."""
    path = Path(out) / "model.safetensors" if resume else checkpoint_of(out)
    with usable(path), safe_open(path, "pt") as file:
        cfg = Config(**{**json.loads(file.metadata()["config"]), "out": str(out)})
    if reads_data:
        refuse_unknown(cfg.data, cfg.tokenizer)
    return cfg


def load_model(Model, cfg, device, data=None):
    """The checkpoint in cfg.out: (model, tokenizer). The tokenizer of `data` must be the same."""
    with usable(checkpoint_of(cfg.out)) as path, safe_open(path, "pt") as file:
        if path.name != "model.safetensors" and Path(cfg.out).parent == Path("out"):
            print(f"no run in {cfg.out}: using weights/{path.name}, trained for "
                  f"{file.metadata()['step']} steps")
        stored = Tokenizer(json.loads(file.metadata()["tokenizer"]))
        if data and data.tokenizer.fingerprint != stored.fingerprint:
            raise ValueError(f"another tokenizer than the {data.tokenizer.name} of these data")
        if cfg.n_layer > len(file.keys()):
            raise ValueError(f"{cfg.n_layer} layers, {len(file.keys())} tensors")
        with torch.device("meta"):  # sizes are compared before memory is taken
            Model(cfg).load_state_dict({name: torch.empty(file.get_slice(name).get_shape())
                                        for name in file.keys()})
        model = Model(cfg).to(device)
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    return model, stored


# ---- samples -----------------------------------------------------------------------------------
def encode_canvas(tokenizer, cfg, n):
    """--prompt or --infill -> rows (n, T) with mask ids V where tokens are wanted: behind a prompt
    or at each ___ (___5: five tokens); a ___ at the end reaches to the end of the row."""
    infill, M = getattr(cfg, "infill", ""), cfg.vocab_size
    ids = tokenizer.encode_infill(infill, M) if infill else tokenizer.encode(cfg.prompt)
    if infill and (cfg.prompt or M not in ids):
        raise UserError("--infill needs a hole, ___, and no --prompt: begin --infill with that")
    if len(ids) >= cfg.seq_len:
        raise UserError(f"the given text has {len(ids)} tokens, a row has room for "
                        f"{cfg.seq_len - 1}: shorten it")
    tail = M if not infill or infill.endswith("___") else cfg.eos
    size = cfg.seq_len if cfg.rows == "docs" or tail == M else len(ids)
    return torch.tensor([ids + [tail] * (size - len(ids))] * n)


def show_samples(run, sample, model, tokenizer, cfg, step=None):
    """Draw and print the samples that cfg asks for, with --trace also the trajectory of the first.
    At the end of training (`step`): draw 64, log their grades on tales, print two."""
    frames, g, start = [], torch.Generator().manual_seed(cfg.seed), time.time()
    canvas = encode_canvas(tokenizer, cfg, cfg.num_samples if step is None else 64).to(run.device)
    with run.amp:
        x, nfe = sample(model, canvas, cfg, g,
                        on_step=lambda nfe, x: cfg.trace and frames.append((nfe, x[0].tolist())))
    lines = [(nfe, " ".join(tokenizer.decode_masked(ids).split())) for nfe, ids in frames]
    lines = [[*same][-1] for _, same in itertools.groupby(lines, lambda line: line[1][:92])]
    for k in sorted({round(k * (len(lines) - 1) / 5) for k in range(6)} if lines else []):
        run.say("{:5}  {:.92}".format(*lines[k]) + " ..." * (len(lines[k][1]) > 92))
    rows = tokens_of(x, cfg)
    texts = [tokenizer.decode(ids) for ids in rows]
    about = dict(num_samples=len(rows), nfe=nfe, seconds=time.time() - start,
                 length=sum(map(len, rows)) / len(rows), entropy=entropy_of(rows))
    if cfg.data == "tales":
        about |= {k: v for k, v in grade(texts).items() if k not in ("prefix", "true_nll")}
    run.say("\n\n".join(["", *texts[:None if step is None else 2], ""]) +
            ", ".join(f"{k} {v:.3g}" for k, v in about.items()).replace("entropy", "token entropy"))
    if step is not None:
        run.log("samples", step, **about)
    if run.out.exists():  # not if the weights are the shipped ones
        replace(run.out / "samples.txt",
                lambda file: file.write(("\n<|endoftext|>\n".join(texts) + "\n").encode()))


def plot_loss(out):
    """loss.png: training loss and validation against the step."""
    from matplotlib.figure import Figure
    axes = (figure := Figure(layout="constrained")).subplots()
    for kind, key in (("train", "loss"), ("val", "nats_per_token")):
        rows = [row for row in read_log(out) if row["kind"] == kind and key in row]
        axes.plot([row["step"] for row in rows], [row[key] for row in rows], label=f"{kind} {key}")
    axes.set(xlabel="step", ylabel="nats (unit of the loss: see loss_fn)", yscale="log")
    axes.legend()
    replace(Path(out) / "loss.png", lambda file: figure.savefig(file))
