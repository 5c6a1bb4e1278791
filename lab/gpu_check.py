"""Does everything run on a GPU, and how fast? One table, results/gpu.json. Not yet run on a GPU.

    python lab/gpu_check.py                            on a CUDA device
    python lab/gpu_check.py --text stories.txt         and mdlm.py --preset small for five minutes
    python lab/gpu_check.py --device cpu --tiny        the same on a CPU, of toy size

Each script trains at preset tiny (its loss and gradient of one batch must be those of a CPU), goes
on with --resume, samples, and at preset small takes the fastest batch that fits: tokens per second,
share of the GPU's bfloat16 peak (model FLOP utilisation), peak memory, eager, and compiled at that
batch. gpu.json is written after each script, so that a run that is cut short has what it measured.
"""
import copy
import dataclasses
import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python lab/gpu_check.py`
import ar
import common
import diffugpt_varlen
import fast
from data.files import read_log
from lab.methods import IDEAS, loss, script_of
from lab.speed import step

PEAK = {  # FLOP/s in bfloat16 without sparsity; the first name that fits counts
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12,
    "L40": 181e12, "4090": 165e12}
TOY = dict(rows="stream", seq_len=24, n_layer=1, n_head=2, n_embd=32, batch_size=4, warmup=2)


@dataclass
class Options:
    device: str = "cuda"
    tiny: bool = False  # toy sizes: to test this file
    only: str = ""  # scripts to check, as in "ar,mdlm"; all if it is empty
    text: str = ""  # a text file for the run of five minutes
    out: str = "out/gpu_check"  # folder of the runs


def parity(script, cfg, data, device):
    """Relative differences of loss and gradient norm between the device and the CPU, in float32, on
    one corrupted batch."""
    torch.manual_seed(0)
    here, found, g = script.Model(cfg), [], torch.Generator().manual_seed(0)
    for p in here.parameters():  # the heads begin at zero
        torch.nn.init.normal_(p, std=0.05)
    x0 = script.get_batch(data.train, cfg, g)
    parts = (x0, 0.01, cfg) if script is ar else script.corrupt(x0, cfg, g)
    parts = parts if script in (ar, diffugpt_varlen) else (x0, *parts)
    for where in ("cpu", device):
        model = copy.deepcopy(here).to(where)
        moved = (p.to(where) if torch.is_tensor(p) else p for p in parts)
        with torch.backends.cudnn.flags(allow_tf32=False):  # its convolutions round to 10 bits
            total = script.loss_fn(model, *moved)
            total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        found.append([total.item(), norm.item()])
    return [abs(b / a - 1) for a, b in zip(*found)]


def flags_of(name, opt):
    """The command line of a short training."""
    own = ["--init-from", "scratch"] if name == "diffugpt_varlen" else []
    small = [part for k, v in TOY.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    return [*own, *small * opt.tiny, "--device", opt.device, "--eval-every", "1000", "--out",
            f"{opt.out}/{name}"]


def runs(name, opt):
    """Train, go on with --resume, and sample, as the command line does: the first and last loss."""
    script, steps, flags = script_of(name), 3 if opt.tiny else 50, flags_of(name, opt)
    script.main([*flags, "--steps", str(steps)])
    script.main([*flags, "--resume", "--steps", str(steps + 2)])
    script.main(["sample", "--num-samples", "2", "--device", opt.device, "--out",
                 f"{opt.out}/{name}"])
    losses = [row["loss"] for row in read_log(f"{opt.out}/{name}") if row["kind"] == "train"]
    assert len(losses) == steps + 2
    return dict(first_loss=losses[0], last_loss=losses[-1])


def speed(script, opt, device, compiled=False, batches=(32, 64, 128, 256, 512, 1024)):
    """Tokens per second, FLOP per token and peak memory of preset small at the fastest batch."""
    own = dict(init_from="scratch") if script is diffugpt_varlen else {}
    size = TOY if opt.tiny else script.PRESETS["small"]
    cfg = script.Config(**size, **own, compile="yes" if compiled else "no")
    data, best = script.load_data(cfg, quiet=True), {}
    warm, rounds = (1, 2) if opt.tiny else (4, 10)
    for batch in batches:
        cfg = dataclasses.replace(cfg, batch_size=batch)
        g = torch.Generator().manual_seed(0)
        if device.type == "cuda":  # what the batch before held is not counted
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            model = script.Model(cfg).to(device)
            fast.speed_up(model, cfg, device)
            parts = (script, loss, cfg, model, script.make_optimizers(model, cfg), g,
                     lambda: script.get_batch(data.train, cfg, g),
                     torch.autocast(device.type, torch.bfloat16))
            for _ in range(warm):
                step(*parts)
            begun = time.perf_counter()
            for _ in range(rounds):
                step(*parts)
            rate = rounds * batch * cfg.seq_len / (time.perf_counter() - begun)
        except torch.OutOfMemoryError:
            break
        if rate > best.get("tokens_per_second", 0):
            best = dict(batch_size=batch, tokens_per_second=rate)
            if device.type == "cuda":
                best["gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
            if not compiled:  # which hides what is computed
                with FlopCounterMode(display=False) as counter:
                    step(*parts)
                best["flop_per_token"] = counter.get_total_flops() / (batch * cfg.seq_len)
    return best


def five_minutes(opt):
    """mdlm.py --preset small on a text, stopped after five minutes; prints two samples."""
    out = f"{opt.out}/text"
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.alarm(3 if opt.tiny else 300)
    try:
        script_of("mdlm").main(["--preset", "small", "--data", opt.text, "--device", opt.device,
                                "--batch-size", "256", "--steps", "1000000", "--out", out])
    except KeyboardInterrupt as stopped:
        print(stopped)
    script_of("mdlm").main(["sample", "--num-samples", "2", "--device", opt.device, "--out", out])
    return read_log(out)[-1]


def check(script, opt, device):
    """All of the above but the five minutes, for one script."""
    own = dict(init_from="scratch") if script is diffugpt_varlen else {}
    cfg = script.Config(batch_size=4, **own)
    data = script.load_data(cfg, quiet=True)
    row = dict(zip(("loss_differs", "gradient_differs"), parity(script, cfg, data, device)))
    row |= runs(script.__name__, opt)
    row["eager"] = speed(script, opt, device, **dict(batches=(2, 4)) if opt.tiny else {})
    if not opt.tiny and row["eager"]:
        row["compiled"] = speed(script, opt, device, True, (row["eager"]["batch_size"],))
    peak = next((v for k, v in PEAK.items() if k in fast.machine(device)), None)
    for found in (row["eager"], row.get("compiled")):
        if peak and found:
            flop = row["eager"]["flop_per_token"]
            found["utilisation"] = flop * found["tokens_per_second"] / peak
    return row


def table(rows):
    """A line for each script, eager and compiled."""
    lines = [f"{'':16}loss differs  gradient differs  loss 1 -> last   batch  tokens/s  peak  GiB"]
    for name, row in rows.items():
        for kind in [kind for kind in ("eager", "compiled") if row.get(kind)]:
            found = row[kind]
            lines.append(f"{name:16}{row['loss_differs']:12.1e}{row['gradient_differs']:18.1e}"
                         f"{row['first_loss']:10.3f} -> {row['last_loss']:.3f}"
                         f"{found['batch_size']:8}{found['tokens_per_second']:10,.0f}"
                         f"{found.get('utilisation', 0):6.0%}{found.get('gib', 0):5.1f}  {kind}")
    return "\n".join(lines)


def main(argv):
    opt = tyro.cli(Options, args=argv, description=__doc__)
    names = opt.only.split(",") if opt.only else [*IDEAS]
    if not set(names) <= set(IDEAS):
        raise common.UserError(f"--only {opt.only}: choose from {','.join(IDEAS)}")
    device = fast.pick_device(opt.device)
    made = dict(command="python lab/gpu_check.py " + " ".join(argv), seed=0,
                torch=torch.__version__, machine=fast.machine(device))
    target = Path(opt.out if opt.tiny else ROOT / "results") / "gpu.json"

    def keep(name, what):
        made[name] = what
        text = json.dumps(made, indent=1) + "\n"
        common.replace(target, lambda file: file.write(text.encode()))

    for name in names:
        keep(name, check(script_of(name), opt, device))
    if opt.text:
        keep("text", five_minutes(opt))
    print(table({name: made[name] for name in names}))
    wrong = [name for name in names if max(made[name][k] for k in (
        "loss_differs", "gradient_differs")) > 1e-3]
    if wrong:
        raise common.UserError(f"loss or gradient is another one on {device}: {', '.join(wrong)}")


if __name__ == "__main__":
    common.run_main(main)
