"""Plumbing of the four scripts that do not use common.py yet: it goes when they do."""
import contextlib
import dataclasses
import errno
import importlib.util
import io
import json
import math
import os
import re
import signal
import sys
import textwrap
import time
import typing
import uuid
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from common import machine, pick_device  # noqa: F401
from data.files import UserError, run_main  # noqa: F401
from data.tales import grade
from data.units import se, tokens_of  # noqa: F401

MASK_GLYPH = "░"


# ------------------------------------------------------------------------------- command line

def parse(Config, presets, argv, doc, default=None, read=None):
    """Command line -> Config. `--preset` chooses defaults, explicit flags win; --batch-size and
    --batch_size are the same flag. `default` (a Config, or None) is what flags are laid over.
    `read`, for scripts with --config FILE, gives the file's settings and a list of its faults."""
    pairs = list(zip(argv, argv[1:] + [""]))
    names, files = ([a.partition("=")[2] or b for a, b in pairs
                     if re.fullmatch(f"--{flag}(=.*)?", a)] for flag in ("preset", "config"))
    values, bad = read(files[-1]) if read and files else ({}, [])
    names = names or [values[k] for k in ("preset",) if k in values]
    if default and names and names[-1] != default.preset:
        raise UserError(f"--preset {names[-1]} is for a new run; this one has {default.preset}")
    if default is None:
        name = names[-1] if names else Config().preset
        if name not in presets:
            raise UserError(f"unknown preset '{name}': choose one of {', '.join(presets)}")
        default = Config(**presets[name])
    default = dataclasses.replace(default, **values)
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            cfg = tyro.cli(Config, args=argv, default=default, description=doc,
                           prog=Path(sys.argv[0]).name)
    except SystemExit as stop:
        if not stop.code:
            raise
        box = re.sub("[│╭╮╰╯]", " ", heard.getvalue()).strip().partition("\n")[2]  # below its title
        said = [" ".join(part.split()).removeprefix("Error parsing Config: ")
                for part in re.split("[─-]{4,}", box)]
        said = [part for part in said if part and not part.startswith(("Argument", "For full"))]
        raise UserError("; ".join(bad + said) + "; see --help") from None
    check(cfg, bad)
    return cfg


def check(cfg, bad=()):
    """Raise one UserError that lists every value of a Config that cannot work, `bad` among them."""
    least = dict(steps=1, batch_size=1, seq_len=2, n_layer=1, n_head=1, n_embd=1, grad_accum=1, n=1,
                 eval_every=1, save_every=1, warmup=0, docs=0, vocab_size=0, sampling_steps=0,
                 grad_clip=0, ema=0, lr=0, top_k=0, temperature=0, top_p=0, threshold=0, guidance=0,
                 block=0, length=0, remask_eta=0, eval_seeds=1, emb_dim=1, emb_norm=0, anchor=0,
                 selfcond=0, prefix=0, eta=0, lam_above=0, lam_below=0, k=1, swap=0)
    bad = [*bad]
    bad += [f"--{k.replace('_', '-')} is {getattr(cfg, k)}, it must be at least {v}"
            for k, v in least.items() if hasattr(cfg, k) and not getattr(cfg, k) >= v]
    bad += [f"--{k.replace('_', '-')} is {v}, it must be between -2^31 and 2^31"
            for k, v in vars(cfg).items() if isinstance(v, int) and abs(v) >= 2 ** 31]
    bad += [f"--{k.replace('_', '-')} is {getattr(cfg, k)}, it must be at most 1"
            for k in ("top_p", "threshold", "remask_eta", "selfcond", "prefix", "eta", "swap")
            if getattr(cfg, k, 0) > 1]
    if not getattr(cfg, "repetition_penalty", 1) > 0:
        bad.append(f"--repetition-penalty is {cfg.repetition_penalty}, it must be more than 0")
    if not cfg.ema < 1:
        bad.append(f"--ema is {cfg.ema}, it must be less than 1")
    if cfg.n_head and cfg.n_embd % (2 * cfg.n_head):
        bad.append(f"--n-embd {cfg.n_embd} must be a multiple of 2 x n_head = {2 * cfg.n_head}")
    if cfg.dtype not in ("auto", "float32", "bfloat16"):
        bad.append(f"--dtype is '{cfg.dtype}', choose auto, float32 or bfloat16")
    if cfg.rows not in ("auto", "docs", "stream"):
        bad.append(f"--rows is '{cfg.rows}', choose auto, docs or stream")
    for name in set(cfg.log.split(",")) - {""}:
        if name not in ("tensorboard", "wandb"):
            bad.append(f"--log knows tensorboard and wandb, not {name}")
        elif importlib.util.find_spec(name) is None:
            bad.append(f"--log {name} needs: pip install {name}")
    bad += cfg.problems() if hasattr(cfg, "problems") else []  # of this method
    if bad:
        raise UserError("; ".join(bad))


# ------------------------------------------------------------------------------------- devices

def cpu_has_bf16():
    """Does this CPU multiply bfloat16 in hardware? Elsewhere bfloat16 is slower than float32."""
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("amx_tile"))


def precision(device, dtype):
    """The autocast context for `dtype` ('auto': bfloat16 where the hardware multiplies it)."""
    if dtype == "auto":
        fast = (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
                or device.type == "cpu" and cpu_has_bf16())
        dtype = "bfloat16" if fast else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"), dtype


# --------------------------------------------------------------------------------- run folder

class Run:
    """A run folder with its log, progress bar, checkpoints and stop signals; `rank` and `world`
    under torchrun. Only rank 0 writes. Use as a context manager."""

    def __init__(self, cfg, out, training=True, log="log.jsonl"):
        self.cfg, self.out, self.training, self.log_name = cfg, Path(out), training, log
        self.id = uuid.uuid4().hex  # in all files of a checkpoint: none must be of another run
        self.saved = 0  # step of the checkpoint that is there
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(cfg.device)
        self.amp, self.dtype = precision(self.device, cfg.dtype)
        if self.world > 1 and cfg.batch_size * cfg.grad_accum % (self.world * cfg.grad_accum):
            raise UserError(f"--batch-size {cfg.batch_size} must be a multiple of the {self.world} "
                            "processes")
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.stop_signal, self.bar, self.sinks, self.shown = 0, None, [], {}
        self.clock, self.seconds, self.rate = time.time(), 0.0, 0.0
        if self.rank == 0:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                (self.out / ".writable").touch()
                (self.out / ".writable").unlink()
            except OSError as error:
                raise UserError(f"cannot write to {self.out} ({error.strerror}): choose another "
                                "folder with --out") from None

    def __enter__(self):
        if self.training:
            self.old = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.close()
        for s, handler in getattr(self, "old", {}).items():
            signal.signal(s, handler)
        if self.world > 1:
            dist.destroy_process_group()
        if self.rank == 0:
            with contextlib.suppress(OSError):
                self.out.rmdir()  # if it is empty: nothing came of this run

    def begin(self):
        """Open the logs, now that nothing is left to complain about; what an earlier run in this
        folder left to resume from is renamed, so that two runs never mix, and what it left
        half-written is removed."""
        self._open_sinks()
        if self.rank == 0:
            for left in self.out.glob("*.tmp"):
                left.unlink()
        if self.rank == 0 and not self.cfg.resume:
            for old in ("state.pt", "log.jsonl"):
                if (self.out / old).exists():
                    (self.out / old).replace(self.out / f"{old}.old")

    def _stop(self, number, _frame):
        if self.stop_signal:  # asked twice: the user means now
            raise KeyboardInterrupt
        self.stop_signal = number

    def stopping(self):
        """True once any process was asked to stop (SIGINT, SIGTERM)."""
        if self.world == 1:
            return bool(self.stop_signal)
        flag = torch.tensor(float(self.stop_signal), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        self.stop_signal = int(flag)
        return self.stop_signal > 0

    def _open_sinks(self):
        if self.rank == 0 and "tensorboard" in self.cfg.log.split(","):
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(str(self.out))
            self.sinks.append(lambda row: [writer.add_scalar(f"{row['kind']}/{k}", v, row["step"])
                                           for k, v in row.items() if isinstance(v, float)])
        if self.rank == 0 and "wandb" in self.cfg.log.split(","):
            import wandb
            wandb.init(project="text-diffusion", name=self.out.name, dir=str(self.out),
                       config=dataclasses.asdict(self.cfg))
            self.sinks.append(lambda row: wandb.log({f"{row['kind']}/{k}": v for k, v in row.items()
                                                     if isinstance(v, float)}, step=row["step"]))

    def say(self, text=""):
        """Print from rank 0 without breaking the progress bar."""
        if self.rank == 0:
            tqdm.write(str(text), file=sys.stdout)
            sys.stdout.flush()

    def log(self, kind, step, **row):
        """Append one JSON object to the log (and to TensorBoard / Weights & Biases)."""
        if self.rank:
            return
        row = dict(kind=kind, step=step, **row)
        path = self.out / self.log_name
        with naming(path), open(path, "a") as file:
            file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v
                                   for k, v in row.items()}) + "\n")
        for sink in self.sinks:
            sink(row)

    def read_log(self):
        """The rows of log.jsonl as dictionaries; a row that was cut off is left out."""
        path, rows = self.out / "log.jsonl", []
        for row in path.read_text(errors="replace").splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):
                row = json.loads(row)
                if isinstance(row, dict) and {"kind", "step"} <= row.keys():
                    rows.append(row)
        return rows

    def begin_eval(self):
        """Start eval.jsonl anew with a row that says what made the checkpoint and its figures."""
        (self.out / "eval.jsonl").unlink(missing_ok=True)
        made = json.loads((self.out / "config.json").read_text())
        made["config"] |= dataclasses.asdict(self.cfg)
        del made["config"]["data_dir"]  # a path of this machine
        self.log("config", made["run"]["step"], **made, eval=" ".join(sys.argv))

    def describe(self):
        """Where and how this run computes, in words."""
        return (f"{self.device.type} {self.dtype}, {self.world} process(es) x "
                f"{torch.get_num_threads()} threads, folder {self.out}")

    def average(self, model, loss):
        """Mean of the gradients and of `loss` over the torchrun processes (one flat all-reduce)."""
        if self.world == 1:
            return loss
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([grad.reshape(-1) for grad in grads] + [grads[0].new_tensor([loss])])
        dist.all_reduce(flat)
        flat /= self.world
        for grad, part in zip(grads, flat[:-1].split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))
        return flat[-1].item()

    def train_row(self, step, tokens, **figures):
        """Log one optimizer step of `tokens` tokens and move the progress bar. Time spent in
        evaluation is not counted."""
        now = time.time()
        self.seconds += now - self.clock
        self.rate = tokens / (now - self.clock) if not self.rate else \
            0.9 * self.rate + 0.1 * tokens / (now - self.clock)
        self.clock = now
        self.log("train", step, tokens=step * tokens, **figures, tok_s=self.rate,
                 seconds=self.seconds)
        self.shown |= dict(loss=figures["loss"], tok_s=self.rate)
        self.progress(step)

    def progress(self, step):
        """Move the progress bar (loss, last validation, tokens per second, time left)."""
        if self.rank == 0:
            if self.bar is None:
                self.bar = tqdm(total=self.cfg.steps, initial=step, unit="step", dynamic_ncols=True)
            self.bar.set_postfix({k: f"{v:.3f}" if v < 1000 else f"{v:,.0f}"
                                  for k, v in self.shown.items()}, refresh=False)
            self.bar.update(step - self.bar.n)

    def validate(self, step, evaluate):
        """Call evaluate() on rank 0, log and print what it returns."""
        if self.rank == 0:
            with self.amp:
                row = evaluate()
            seen = step * self.cfg.grad_accum * self.cfg.batch_size * self.cfg.seq_len
            self.log("val", step, tokens=seen, **row)
            self.say(f"step {step:5d}  {report(row)}")
            if "nats_per_token" in row:
                self.shown |= dict(val=row["nats_per_token"])
        self.clock = time.time()

    def resume(self, tokenizer, model, ema, optimizers, g):
        """Put the run folder's state back, drop what the log holds beyond it; returns the step.
        Nothing but what save() wrote is believed."""
        check_tokenizer(self.out, tokenizer)
        path = self.out / "state.pt"
        if not path.exists():
            raise UserError(f"--resume found no {path}: leave it out to start a new run")
        made = read_json(self.out / "config.json")
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            ours = made["run"].get("id")  # None: before there were any
            if state.get("id", ours) != ours:
                raise ValueError("it is of another run than config.json")
            for part, stored in zip([model, ema, *optimizers],
                                    [state["model"], state["ema"], *state["optimizers"]]):
                part.load_state_dict(stored)
            g.set_state(state["g"].cpu())
        except Exception as error:
            raise UserError(f"{path} does not fit this model ({last_line(error)}): it is broken or "
                            "was trained with other flags") from None
        self.id, self.saved = state.get("id", self.id), state["step"]
        if self.rank == 0:
            rows = [row for row in self.read_log() if 0 <= row["step"] < state["step"] or
                    row["kind"] == "train" and row["step"] == state["step"]]
            replace(self.out / "log.jsonl", lambda p: p.write_text(
                "".join(json.dumps(row) + "\n" for row in rows)))
            self.seconds = max([row.get("seconds", 0) for row in rows], default=0)
            if made["run"].get("step") != state["step"]:  # killed after state.pt was there
                made["run"]["step"] = state["step"]
                self.write_config(made)
        return state["step"]

    def save(self, step, tokenizer, model, ema, optimizers, g):
        """Write config.json, tokenizer.json, model.safetensors (the averaged weights, which are
        evaluated) and state.pt (all that --resume needs); each file is replaced whole or not at
        all. config.json names the new step only when the other files are there."""
        if self.rank:
            return
        facts = dict(id=self.id, command=" ".join(sys.argv), step=self.saved,
                     device=str(self.device), dtype=self.dtype, threads=torch.get_num_threads(),
                     processes=self.world, torch=torch.__version__, machine=machine(self.device),
                     parameters=sum(p.numel() for p in model.parameters()),
                     tokenizer=tokenizer.fingerprint)
        made = dict(getattr(ema, "card", {}), config=dataclasses.asdict(self.cfg), run=facts)
        replace(self.out / "tokenizer.json", lambda p: p.write_text(json.dumps(tokenizer.spec)))
        self.write_config(made)
        weights = ema.state_dict()
        replace(self.out / "model.safetensors", lambda p: save_file(
            weights, p, {"format": "pt", "id": self.id}))
        state = dict(step=step, model=model.state_dict(), ema=weights, g=g.get_state(), id=self.id,
                     optimizers=[optimizer.state_dict() for optimizer in optimizers])
        replace(self.out / "state.pt", lambda p: torch.save(state, p))
        self.saved = facts["step"] = step
        self.write_config(made)

    def write_config(self, made):
        """Write config.json."""
        replace(self.out / "config.json", lambda p: p.write_text(json.dumps(made, indent=1)))


# -------------------------------------------------------------------------------- checkpoints

def replace(path, write):
    """write(temporary file), then rename it to `path`: an interrupted write leaves the old file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def naming(path):
    """Whatever cannot be written inside is an OSError that names `path`."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
    except SafetensorError as error:
        raise OSError(errno.EIO, last_line(error).split(": ")[-1], str(path)) from None
    except RuntimeError as error:
        if not re.search("inline_container|iostream", str(error)):  # torch.save's words
            raise
        raise OSError(errno.EIO, "not written whole", str(path)) from None


def last_line(error):
    """What an error of another library comes down to."""
    return textwrap.shorten((str(error).strip().splitlines() or [type(error).__name__])[-1], 160)


def load_config(Config, out):
    """out/config.json -> Config; a missing, broken or foreign file is a UserError."""
    path = Path(out) / "config.json"
    if not path.exists():
        raise UserError(f"no checkpoint in {out}: train first, or name its folder with --out")
    try:
        stored = json.loads(path.read_text())
        cfg = Config(**stored["config"])
        kinds = {f.name: (int, float) if f.type is float else type(f.default)
                 for f in dataclasses.fields(Config)}
        words = {f.name: typing.get_args(f.type) for f in dataclasses.fields(Config)}  # of Literals
        if not (isinstance(stored["run"]["tokenizer"], str) and
                all(isinstance(getattr(cfg, name), kind) for name, kind in kinds.items()) and
                all(getattr(cfg, name) in known for name, known in words.items() if known)):
            raise TypeError
        return cfg
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a configuration of this script: was it written by another "
                        "method or version?") from None


def read_json(path):
    """The dictionary that a JSON file holds, empty if the file is missing or broken."""
    with contextlib.suppress(OSError, ValueError):
        made = json.loads(Path(path).read_text())
        return made if isinstance(made, dict) else {}
    return {}


def load_weights(model, out):
    """Copy out/model.safetensors into `model`; a broken or foreign file is a UserError."""
    path, made = Path(out) / "model.safetensors", read_json(Path(out) / "config.json")
    facts = made.get("run", {})
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        if "id" in about and about["id"] != facts.get("id", about["id"]):
            raise SafetensorError("it is of another run than config.json")
        model.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: train first, or name the folder with --out") from None
    except (SafetensorError, RuntimeError, OSError) as error:
        raise UserError(f"{path} does not fit this model ({last_line(error)}): it is broken or was "
                        "trained with other flags") from None


def check_tokenizer(out, tokenizer):
    """Raise a UserError unless the data's tokenizer is the one the checkpoint was trained with."""
    stored = json.loads((Path(out) / "config.json").read_text())["run"]["tokenizer"]
    if stored != tokenizer.fingerprint:
        raise UserError(f"the checkpoint in {out} was trained with another tokenizer ({stored}) "
                        f"than the data's {tokenizer.name} ({tokenizer.fingerprint}): use the data "
                        "and --tokenizer it was trained with, or another --out")


def check_same(cfg, stored, names, what):
    """Raise a UserError that lists the fields of `names` in which two Configs differ."""
    differ = [f"--{k.replace('_', '-')} {getattr(cfg, k)} (stored: {getattr(stored, k)})"
              for k in names if getattr(cfg, k) != getattr(stored, k)]
    if differ:
        raise UserError(f"{what} was made with other settings: {', '.join(differ)}")


# ------------------------------------------------------------------------ reports and metrics

def report(row):
    """One evaluation as one readable line; `=` is exact, `<=` an upper bound. What has no
    likelihood, bound "none", shows its plain figures."""
    if row["bound"] == "none":
        return figures({k: v for k, v in row.items() if isinstance(v, float)})
    sign = "=" if row["bound"] == "exact" else "<="
    text = (f"{sign} {row['nats_per_token']:.3f} nats/token  "
            f"{sign} {row['bits_per_byte']:.3f} bits/byte")
    if "nats_per_doc" in row:
        text = f"{sign} {row['nats_per_doc']:.1f} +- {row['se']:.1f} nats/document  " + text
    if "gap" in row:
        text += (f"  | entropy {row['floor_per_doc']:.1f}, gap {sign} {row['gap']:.1f} +- "
                 f"{row['gap_se']:.1f} ({row['gap'] / row['floor_per_doc']:+.1%})")
    return text


def encode_prompt(tokenizer, cfg):
    """--prompt -> ids (P,); a prompt that fills the row is a UserError."""
    ids, room = tokenizer.encode(cfg.prompt), getattr(cfg, "length", 0) or cfg.seq_len
    if len(ids) >= room:
        raise UserError(f"the prompt has {len(ids)} tokens but a row has room for {room - 1}: "
                        "shorten --prompt")
    return torch.tensor(ids, dtype=torch.long)


def encode_infill(tokenizer, cfg):
    """--infill -> ids (n, T), T <= seq_len, with id vocab_size where a token is wanted. `___` is
    one token, `___5` five; the spaces before it belong to it. Where the text ends in ___ the rest
    of the row is wanted; else the document ends there. A UserError if it does not fit."""
    if cfg.prompt:
        raise UserError("--prompt and --infill exclude each other: begin --infill with the prompt")
    parts = re.split(r" *___(\d*)", cfg.infill)
    if len(parts) == 1:
        raise UserError("--infill has no hole: write ___ where one token is wanted, ___5 for five")
    ids = tokenizer.encode(parts[0])
    for count, text in zip(parts[1::2], parts[2::2]):
        ids += int(count or 1) * [cfg.vocab_size] + tokenizer.encode(text)
    if len(ids) >= cfg.seq_len:
        raise UserError(f"--infill has {len(ids)} tokens but a row has room for {cfg.seq_len - 1}: "
                        "shorten it")
    if parts[-1] == "" and parts[-2] == "":
        ids += [cfg.vocab_size] * (cfg.seq_len - len(ids))
    elif cfg.rows == "docs":
        ids += [cfg.eos] * (cfg.seq_len - len(ids))
    return torch.tensor([ids] * cfg.n)


def show_samples(run, cfg, tokenizer, step, x, trace, info, seconds=None):
    """Print samples x (n, T) and, if there is a trace, its film; write samples.txt and trace.png.
    With `seconds` the samples are a measurement: graded and logged, and only two are printed."""
    rows = tokens_of(x, cfg)
    texts = [tokenizer.decode(row) for row in rows]
    if trace:
        film = [(label, ids[0].tolist()) for label, ids, *_ in trace]
        plot_trace(run.out / "trace.png", film, tokenizer, cfg)
        run.say("\n" + filmstrip(film, tokenizer) + "\n")
        if len(trace[0]) > 2 and not seconds:
            run.say(settling(trace, tokenizer) + "\n")
    replace(run.out / "samples.txt",
            lambda p: p.write_text("\n<|endoftext|>\n".join(texts) + "\n", encoding="utf-8"))
    for text in texts[:2] if seconds else texts:
        run.say(text + "\n")
    if seconds:
        marks = measure(x, cfg, tokenizer)
        steps = getattr(cfg, "sampling_steps", 0) or cfg.seq_len
        run.log("samples", step, n=len(texts), sampling_steps=steps, seconds=seconds, **info,
                **marks)
        run.say(f"{len(texts)} samples in {seconds:.1f} s: {figures(info | marks)}")


def figures(row):
    """A dictionary of figures as text."""
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
                     for k, v in row.items() if v is not None)


def measure(x, cfg, tokenizer, judge=None):
    """What rows x (n, T) are worth as text: the grammar's marks on tales, the judge's nats a token
    (a proxy: read it beside the entropy, which repetition lowers), diversity."""
    rows = tokens_of(x, cfg)
    marks = judge_tales(map(tokenizer.decode, rows)) if cfg.data == "tales" else {}
    if judge:
        script, model, theirs = judge
        ended = x.cpu().clone()
        for row, tokens in zip(ended, rows):
            row[len(tokens):] = cfg.eos  # what follows the first EOS is not part of the text
        nats = script.nll(model, ended.to(next(model.parameters()).device), theirs).sum().item()
        count = sum(map(len, rows)) + (len(rows) if cfg.rows == "docs" else 0)
        marks |= dict(judge=nats / max(1, count))
    return marks | text_metrics(rows)


def load_judge(out, tokenizer, run):
    """The run of ar.py in folder `out` as (its script, model, Config), or None if there is none."""
    if not (Path(out) / "model.safetensors").exists():
        run.say(f"no judge in {out}: train ar.py, or name its folder with --judge")
        return None
    import ar
    import common
    cfg = common.load_config(ar.Config, out)
    model, stored = common.load_model(ar.Model, cfg, run.device)
    if stored.fingerprint != tokenizer.fingerprint:
        raise UserError(f"the run in {out} has another tokenizer: choose another --judge")
    return ar, model, cfg


def text_metrics(rows):
    """rows: lists of token ids -> distinct-n (share of n-grams that are different), entropy of the
    pooled unigrams in nats, repetition (share of tokens equal to the one before)."""
    out = {}
    for n in (1, 2, 3):
        grams = Counter(tuple(row[i:i + n]) for row in rows for i in range(len(row) - n + 1))
        out[f"distinct_{n}"] = len(grams) / max(1, grams.total())
        if n == 1:
            total = max(1, grams.total())
            out["entropy"] = -sum(c / total * math.log(c / total) for c in grams.values())
    pairs = [a == b for row in rows for a, b in zip(row, row[1:])]
    return out | dict(repetition=sum(pairs) / max(1, len(pairs)))


def judge_tales(texts):
    """data.tales.grade under the names that the four scripts still use."""
    rates = grade(texts)
    return dict(valid=rates["valid_stories"], prefix=rates["prefix"],
                known=rates["valid_sentences"], agree=rates["consistent"],
                nll_valid=rates["true_nll"])


def show_ids(ids, tokenizer):
    """Token ids -> one line of text in which every unwritten or masked position is a block."""
    text, run = "", []
    for i in list(ids) + [None]:
        if i is not None and 0 <= i < tokenizer.vocab_size:
            run.append(i)
            continue
        text += tokenizer.decode(run) + (MASK_GLYPH if i is not None else "")
        run = []
    return " ".join(text.split())


def filmstrip(film, tokenizer, frames=6, width=96, lines=3):
    """A sampling trajectory as text. film: list of (label, ids (T,)); masked ids lie outside the
    vocabulary."""
    picks = sorted({round(i * (len(film) - 1) / max(1, frames - 1)) for i in range(frames)})
    rows = []
    for i in picks:
        cut = textwrap.wrap(show_ids(film[i][1], tokenizer), width) or [""]
        for j, line in enumerate(cut[:lines]):
            more = " ..." if j == lines - 1 and len(cut) > lines else ""
            rows.append(f"{film[i][0] if j == 0 else '':>5}  {line}{more}")
    return "\n".join(rows)


# ------------------------------------------------------------------------------------ figures

def settling(trace, tokenizer, positions=6, frames=5, width=100):
    """How the candidates of some positions of the first sample settle, as text: a block for each of
    the positions that took the most calls, a line for each of some of those calls. trace: tuples
    (call, ids, s, candidates (n, T, K), logp (n, T, K + 1))."""
    busy = sum(((s[0] > 0) & (logp[0, :, 0] < 0)).long() for _, _, s, _, logp in trace)
    text = []
    for i in sorted(busy.argsort(descending=True, stable=True)[:positions].tolist()):
        steps = [f for f in trace if f[2][0, i] > 0 and f[4][0, i, 0] < 0]
        picks = sorted({round(j * (len(steps) - 1) / max(1, frames - 1)) for j in range(frames)})
        end = tokenizer.decode([trace[-1][3][0, i, 0].item()]).strip()
        text.append(f"position {i}, at last '{end}'")
        for call, _, _, ids, logp in (steps[j] for j in picks if steps):
            shown = " ".join(f"{p:.2f} {tokenizer.decode([token]).strip() or '_'} " for token, p in
                             zip(ids[0, i].tolist(), logp[0, i, :-1].exp().tolist()) if p >= 0.005)
            text.append(f"{call:>5}  {shown or 'nothing above 0.005'}"[:width])
    return "\n".join(text)


def _axes(width, height, panels=1, sharex=True):
    from matplotlib.figure import Figure  # without pyplot: a notebook keeps its own settings
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    return figure, figure.subplots(panels, 1, sharex=sharex)


def plot_loss(path, rows):
    """loss.png: validated likelihood with the entropy as a line; below it the training loss, which
    may be averaged over other positions and is not to be compared with the entropy."""
    figure, (top, bottom) = _axes(7, 6, 2)
    train = [row for row in rows if row["kind"] == "train"]
    val = [row for row in rows if row["kind"] == "val"]
    if val[-1]["bound"] == "none":  # no likelihood: the shares that were measured instead
        for name in (k for k, v in val[-1].items() if isinstance(v, float)):
            top.plot([r["step"] for r in val], [r[name] for r in val], marker="o", ms=4, label=name)
        top.set(ylabel="share of positions", ylim=(0, 1.05), title=path.parent.name)
    else:
        kind = "exact" if val[-1]["bound"] == "exact" else "upper bound"
        top.errorbar([r["step"] for r in val], [r["nats_per_token"] for r in val],
                     [2 * r["nats_per_token_se"] for r in val], marker="o", ms=4, capsize=2,
                     label=f"validation ({kind}), 2 SE")
        top.set(ylabel="nats per token", yscale="log", title=path.parent.name)
    if "floor_per_doc" in val[-1]:
        floor = val[-1]["nats_per_token"] * val[-1]["floor_per_doc"] / val[-1]["nats_per_doc"]
        top.axhline(floor, ls="--", color="tab:green", label=f"entropy {floor:.3f}")
    bottom.plot([r["step"] for r in train], [r["loss"] for r in train], lw=0.6, color="tab:gray",
                label="training loss")
    bottom.set(xlabel="step", ylabel="nats per position in the loss",
               yscale="log" if any(row["loss"] > 0 for row in train) else "linear")
    for axes in (top, bottom):
        if axes.get_yscale() == "log":
            low, high = axes.get_ylim()
            ticks = [t for t in (0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16) if low < t < high]
            axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
            axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    replace(path, lambda p: figure.savefig(p, format="png"))


def plot_noise(path, lam, alone, info, schedules, cfg, what="tokens", axis="log-SNR of a position"):
    """noise.png: where on the axis of noise levels tokens, or bits, are lost. Top: what is left to
    know of a token by own evidence alone, `alone` in nats at `lam`. Middle: what the model pays
    there, its area is DIFF (info of nelbo: lam, cost). Bottom: when each schedule {name: lam (n,)}
    is where."""
    figure, (top, middle, bottom) = _axes(7, 7, 3)
    low, high = lam[0], lam[-1]
    cell = ((info["lam"] - low) / (high - low) * 40).floor().clamp(0, 39)
    bins = [(low + (k + 0.5) / 40 * (high - low), info["cost"][cell == k]) for k in range(40)
            if (cell == k).any()]
    x, y = zip(*((at, cost.mean().item()) for at, cost in bins))
    area = sum(y) * (high - low) / 40
    top.plot(lam, alone, color="gray", label="-log p of an isolated token")
    middle.plot(x, y, color="tab:blue", marker="o", ms=3,
                label=f"the model's cost in context; area {area:.2f} = DIFF per position")
    middle.fill_between(x, y, alpha=0.2)
    top.set(ylabel="nats", ylim=(0, None), title=f"{path.parent.name}: where {what} are lost")
    middle.set(ylabel="nats per unit", ylim=(0, None))
    for name, curve in schedules.items():
        bottom.plot(curve, [k / (len(curve) - 1) for k in range(len(curve))], label=name,
                    lw=2.5 if name == cfg.schedule else 1)
    bottom.set(xlabel=f"{axis} (clean on the right)", ylabel="its own time")
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    replace(path, lambda p: figure.savefig(p, format="png"))


def plot_quality(path, rows, real, key="order", cost="nfe", what="network calls"):
    """quality.png: quality and diversity of samples against their `cost`, a line per `key` (mean
    and range over seeds); dashed: real documents. rows: `samples` rows of the log."""
    names = {"valid": "share valid", "known": "share of known sentences",
             "judge": "nats/token, by ar.py", "entropy": "unigram entropy, nats"}
    names = {name: label for name, label in names.items() if rows[0].get(name) is not None}
    figure, panels = _axes(7, 2.3 * len(names), len(names))
    panels = panels if len(names) > 1 else [panels]
    for axes, (name, label) in zip(panels, names.items()):
        for line in dict.fromkeys(row[key] for row in rows):
            points = {}
            for row in (row for row in rows if row[key] == line):
                points.setdefault(row["sampling_steps"], []).append((row[cost], row[name]))
            x = [sum(n for n, _ in p) / len(p) for p in points.values()]
            y = [[v for _, v in p] for p in points.values()]
            drawn, = axes.plot(x, [sum(v) / len(v) for v in y], marker="o", ms=4, label=line)
            axes.fill_between(x, list(map(min, y)), list(map(max, y)), alpha=0.2,
                              color=drawn.get_color(), lw=0)
        axes.axhline(real[name], ls="--", color="gray", label="real text")
        axes.set(ylabel=label, xscale="log")
        if cost != "nfe":  # not the same for all lines
            x = [2 ** n for n in range(20) if min(r[cost] for r in rows) <= 2 ** n
                 <= max(r[cost] for r in rows)]
        axes.set_xticks(x, [f"{n:.0f}" for n in x])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8, ncols=3)
    panels[0].set_title(f"{path.parent.name}: what samples cost")
    panels[-1].set_xlabel(what)
    replace(path, lambda p: figure.savefig(p, format="png"))


def plot_lengths(path, rows):
    """length.png. Top: how much too long a canvas is against how often it holds the document, of
    the model and of the training lengths alone. Bottom: how often the EOS is found, by the share
    of text revealed, with and without visible PADs. rows: (kind, row) of length_report."""
    figure, (top, bottom) = _axes(7, 6, 2, sharex=False)
    names = dict(law="model, from its first call", known="training lengths alone")
    for name, label in names.items():
        part = [row for kind, row in rows if kind == "length" and row["of"] == name]
        top.plot([r["coverage"] for r in part], [r["looseness"] for r in part], marker="o", ms=4,
                 label=label)
    top.set(xlabel="share of documents that fit their canvas", ylabel="tokens too long, mean")
    for pads in (False, True):
        part = [row for kind, row in rows if kind == "eos" and row["pads"] == pads]
        bottom.plot([r["revealed"] for r in part], [r["position"] for r in part], marker="o", ms=4,
                    ls="--" if pads else "-", label="PADs visible too: a leak" if pads else
                    "only text visible")
    bottom.set(xlabel="share revealed", ylabel="EOS is found", ylim=(-0.02, 1.02))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    replace(path, lambda p: figure.savefig(p, format="png"))


def plot_trace(path, film, tokenizer, cfg):
    """trace.png: when each position of one sample was written (left) and what it says (right)."""
    figure, axes = _axes(9, 4.6)
    last = film[-1][1]
    written = [next((k for k, (_, ids) in enumerate(film) if ids[i] == last[i] and 0 <= ids[i]
                     < tokenizer.vocab_size), len(film)) for i in range(len(last))]
    inside = [i for i, t in enumerate(last) if t != cfg.eos]
    axes.scatter(range(len(last)), written, s=9, color="lightgray", label="end of document")
    axes.scatter(inside, [written[i] for i in inside], s=12, c=[written[i] for i in inside],
                 cmap="viridis")
    for i in inside[::max(1, len(inside) // 45)]:
        axes.annotate(tokenizer.decode([last[i]]).strip(), (i, written[i]), fontsize=6.5,
                      rotation=45, xytext=(1, 2), textcoords="offset points", parse_math=False)
    axes.set(xlabel="position in the row", ylabel="step at which it was written",
             title="one sample: every position when it was written")
    axes.margins(x=0.02, y=0.12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that the font does not have
        replace(path, lambda p: figure.savefig(p, format="png"))
