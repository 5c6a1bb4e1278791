"""Measure speed, all six scripts against each other and a nanoGPT-style step, in one run.

    python lab/speed.py                  everything, 20 minutes: writes results/speed.json
    python lab/speed.py train sample     only these parts
    python lab/speed.py quality          what is learned in equal times, 40 minutes

Parts: memory (peak of training), start (--help and the first step), train (against the step of
`Reference`, on one thread and on two, in float32 and, where the hardware multiplies it, bfloat16;
eager and compiled), sample (few steps and one token a step, against ar.py with its cache) and, only
if it is named, quality (nats per story after 2 and 5 minutes of CPU time, one thread: ar.py and
mdlm.py against AdamW at the best of four rates, on nanoGPT's network and on that of mdlm.py
without convolutions). Whatever is compared takes turns, call by call, and medians are kept: a noisy
machine slows all alike.
"""
import copy
import functools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python lab/speed.py`
import ar
import common
import diffugpt_varlen
import fast
import mdlm
from lab import decoding, mdlm_variants, methods
from lab.methods import IDEAS, ancestral, default_sampler, device_of, script_of

TARGET = ROOT / "results/speed.json"
SCRIPTS = {name: script_of(name) for name in IDEAS}
AUTO = fast.pick_dtype("auto", torch.device("cpu"))
AMP = torch.autocast("cpu", torch.bfloat16, enabled=AUTO == "bfloat16")
ONE = "ancestral"  # temperature 1, one token a step
PLAIN = dict(order="random", num_steps=160, temperature=1.0, remask="none", length_first=False)
MDLM = {  # settings of lab/decoding.py that are timed besides the two of mdlm.py
    "maxprob_32": dict(PLAIN, order="maxprob", num_steps=32),
    "random_32": dict(PLAIN, num_steps=32),
    "random_16": dict(PLAIN, num_steps=16),
    "blocks_of_32": dict(PLAIN, order="maxprob", block=32),
    "blocks_of_32_dual_cache": dict(PLAIN, order="maxprob", block=32, cache="dual"),
    "ancestral_1000": dict(PLAIN, num_steps=1000, ancestral=True),
}


def race(works, rounds, warm, clock=None):
    """Median seconds of `works`, name -> function, called in turn; `warm` rounds do not count."""
    clock = clock or time.perf_counter
    times = {name: [] for name in works}
    for _ in range(warm + rounds):
        for name, work in works.items():
            start = clock()
            work()
            times[name].append(clock() - start)
    return {name: statistics.median(several[warm:]) for name, several in times.items()}


def build(script, dtype="auto", compile="no"):
    """The default Config of a script, a new network, its optimizers, a generator, and a function
    that draws a batch."""
    g = torch.Generator().manual_seed(0)
    own = dict(init_from="scratch") if script is diffugpt_varlen else {}
    cfg = script.Config(dtype=dtype, compile=compile, **own)
    batch = functools.partial(script.get_batch, script.load_data(cfg).train, cfg, g)
    torch.manual_seed(0)
    model = script.Model(cfg)
    fast.speed_up(model, cfg, torch.device("cpu"))
    return cfg, model, script.make_optimizers(model, cfg), g, batch


def step(script, loss_fn, cfg, model, optimizers, g, batch, amp=AMP):
    """One optimizer step: data, loss, backward, clipping, both optimizers."""
    with amp:
        loss = loss_fn(script, model, cfg, batch().to(device_of(model)), g)
    loss.item()  # a GPU is waited for
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


class Block(nn.Module):
    """A block of nanoGPT: LayerNorm, fused causal attention, GELU."""

    def __init__(self, C, n_head):
        super().__init__()
        self.n_head, self.ln_1, self.ln_2 = n_head, nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc, self.out = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.out(F.gelu(self.fc(self.ln_2(x))))


class Reference(nn.Module):
    """The network of nanoGPT (github.com/karpathy/nanoGPT) at the size of the scripts': learned
    positions, logits at every position, head and embedding one matrix of deviation 0.02."""

    def __init__(self, V=2048, T=160, n_layer=4, n_head=4, C=192):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks = nn.ModuleList(Block(C, n_head) for _ in range(n_layer))
        self.ln = nn.LayerNorm(C)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                last = name.endswith(("proj.weight", "out.weight"))
                nn.init.normal_(p, std=0.02 / ((2 * n_layer) ** 0.5 if last else 1))

    def forward(self, x, target):
        x = self.wte(x) + self.wpe.weight[:x.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def reference_step(amp):
    """A function that trains Reference for a step, with AdamW, on the batches of ar.py."""
    cfg, _, _, _, batch = build(ar, "float32")
    model = Reference(cfg.vocab_size, cfg.seq_len)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step():
        x = batch()
        inputs = torch.cat((torch.full_like(x[:, :1], cfg.bos), x[:, :-1]), 1)
        with amp:
            loss = model(inputs, x)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def train():
    """Positions of rows per second of CPU time, and those of the reference are 1."""
    out, before = {}, torch.get_num_threads()
    for dtype in dict.fromkeys(("float32", AUTO)):
        amp = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
        works = {"reference": reference_step(amp)}
        for name, script in SCRIPTS.items():
            for compile in ("no", "yes") if name in ("ar", "mdlm") else ("no",):
                works[name + "_compiled" * (compile == "yes")] = functools.partial(
                    step, script, methods.loss, *build(script, dtype, compile), amp)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.compiler.reset()  # what was compiled for other numbers of threads
            took = race(works, 9, 3, time.process_time)
            out[f"train_{dtype}_{threads}"] = {name: dict(
                tokens_per_cpu_second=16 * 160 / seconds, ratio=took["reference"] / seconds)
                for name, seconds in took.items()}
    torch.set_num_threads(before)
    return out


def sample():
    """Seconds for 1 and 16 rows of 160 tokens by new networks. Rows are windows, of which none
    ends early (nor does a canvas of diffugpt_varlen.py)."""
    fixed, out = dict(vocab_size=2048, eos=0, rows="stream"), {}
    first = {name: dict(bos=0) if hasattr(script.Config, "bos") else {}
             for name, script in SCRIPTS.items()}
    default = {name: script.Config(**fixed, **first[name])
               for name, script in SCRIPTS.items()}
    networks = {name: script.Model(default[name]) for name, script in SCRIPTS.items()}
    plans = {(name, ONE): ancestral(SCRIPTS[name], cfg) for name, cfg in default.items()}
    plans |= {(name, "default"): default_sampler(SCRIPTS[name], cfg)
              for name, cfg in default.items() if name != "ar"}
    lab_model = mdlm_variants.Model(decoding.Config(**fixed))
    for n in (1, 16):
        nfe, canvas = {}, torch.full((n, 160), 2048)

        def draw(key, cfg):
            g = torch.Generator().manual_seed(0)
            with AMP:
                _, nfe[key] = methods.sample(SCRIPTS[key[0]], networks[key[0]], cfg, n, g)

        def decode(how):
            with AMP:
                cfg = decoding.Config(**fixed, **MDLM[how])
                _, nfe["mdlm", how] = decoding.decode(lab_model, canvas, cfg,
                                                      torch.Generator().manual_seed(0))

        def uncached():
            """ar.sample that sends the whole past through the network for each token."""
            x, cfg = torch.full((n, 161), 0), plans["ar", ONE]
            with AMP, torch.no_grad():
                for i in range(160):
                    logits = networks["ar"](x[:, :i + 1])[:, -1].float()
                    x[:, i + 1] = ar.categorical(ar.filter_logits(logits, cfg),
                                                 torch.Generator().manual_seed(i))

        works = {key: functools.partial(draw, key, cfg) for key, cfg in plans.items()}
        works |= {("mdlm", how): functools.partial(decode, how) for how in MDLM}
        works["uncached"] = uncached
        took = race(works, 2, warm=n == 1)
        cached = took["ar", ONE]
        out[f"sample_ar_{n}"] = dict(cached=cached, uncached=took["uncached"],
                                     ratio=took["uncached"] / cached)
        out |= {f"sample_{name}_{n}_{how}": dict(
            seconds=took[key], nfe=nfe[key], times_ar_cached=took[key] / cached)
            for key in works if isinstance(key, tuple) and key[0] != "ar"
            for name, how in [key]}
    return out


def five_steps(name):
    """MiB that this process held at most, before and after five optimizer steps."""
    import resource  # not on Windows
    script, made = SCRIPTS[name], build(SCRIPTS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5):
        step(script, methods.loss, *made)
    return [before / 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]


def memory():
    """Peak memory of training, each script in a new process. Comes first: Linux counts what the
    process that starts another one holds."""
    out = {}
    for name in SCRIPTS:
        code = f"from lab import speed; print(speed.five_steps('{name}'))"
        said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)
        before, peak = json.loads(said.splitlines()[-1])
        out[f"memory_{name}"] = dict(mib=peak, mib_before=before)
    return out


def first_step(name):
    """Seconds from the start of a process to its first evaluation (128 validation stories) and to
    the first optimizer step, which comes after it. Data are prepared already."""
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/said", "w+") as said:
        command = f"{name}.py --steps 1 --eval-every 1000 --out {folder}/run" + (
            " --init-from scratch" if name == "diffugpt_varlen" else "")
        log, seen, begun = Path(folder) / "run/log.jsonl", {}, time.perf_counter()
        process = subprocess.Popen([sys.executable, *command.split()], cwd=ROOT, stdout=said,
                                   stderr=said)
        while "train" not in seen:
            for kind in ("val", "train"):
                if log.exists() and f'"kind": "{kind}"' in log.read_text():
                    seen.setdefault(kind, time.perf_counter() - begun)
            if process.poll():
                sys.exit(f"{command}: {Path(said.name).read_text()}")
            time.sleep(0.005)
        process.kill()  # it would go on to evaluate and to draw samples
        process.wait()
    return dict(first_evaluation=seen["val"], first_step=seen["train"])


def start():
    """Seconds of `python X.py --help`, and to the first step of `python X.py`."""
    out = {}
    for name, script in SCRIPTS.items():
        build(script)
        ask = [sys.executable, f"{name}.py", "--help"]
        helped = race({"help": lambda: subprocess.check_output(ask, cwd=ROOT)}, 3, 0)
        out[f"start_{name}"] = helped | first_step(name)
    return out


class Plain(mdlm.Model):
    """The network of mdlm.py without its convolutions."""

    def __init__(self, cfg):
        super().__init__(cfg)
        for block in self.blocks:
            block.conv, block.convolve = None, lambda x: x


def adamw(model, rate):
    """The optimizer of nanoGPT: matrices and embeddings decay."""
    groups = [[p for p in model.parameters() if (p.dim() > 1) == many] for many in (True, False)]
    return [torch.optim.AdamW([dict(params=part, weight_decay=decay, scale=1.0)
                               for part, decay in zip(groups, (0.1, 0.0)) if part],
                              rate, betas=(0.9, 0.99), fused=True)]


def learn(seconds, model, optimizers, rate, loss_fn, batch):
    """Train for so many seconds of CPU time; returns the average of the weights and the steps.
    After 50 steps of warm-up the rate falls along a cosine of the time to zero."""
    ema, begun, step = copy.deepcopy(model).requires_grad_(False), time.process_time(), 0
    while (done := (time.process_time() - begun) / seconds) < 1:
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = (rate * group["scale"] * min(1, (step + 1) / 50) *
                           0.5 * (1 + math.cos(math.pi * done)))
        with AMP:
            loss = loss_fn(model, batch())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        new = [p.detach() for p in model.parameters()]
        torch._foreach_lerp_([*ema.parameters()], new, 1 - min(0.99, (1 + step) / (10 + step)))
    return ema, step


def reference_nll(model, x, cfg, mean=True):
    """Nats per scored token of Reference, or their sum."""
    inputs = torch.cat((torch.full_like(x[:, :1], cfg.bos), x[:, :-1]), 1)
    scored = ar.is_scored(x, cfg)
    loss = model(inputs, x.masked_fill(~scored, -100))
    return loss if mean else loss * scored.sum()


def quality(times=(120, 300), rates=(1e-3, 2e-3, 4e-3, 8e-3), names=None):
    """Nats per story of 128 validation stories after so many seconds, at each rate that was tried;
    after the second time only at the best of the first. `names`: only these rivals."""
    out, before = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    rivals = dict(ar=(ar, ar.Model), reference=(ar, Reference),
                  mdlm=(mdlm, mdlm.Model), mdlm_adamw=(mdlm, Plain))
    for name, (script, Model) in rivals.items():
        if names and name not in names:
            continue
        own = Model is script.Model
        tried = (script.Config.lr,) if own else rates
        for seconds in times:
            found = {}
            for rate in tried:
                cfg, model, optimizers, g, batch = build(script)
                if not own:
                    torch.manual_seed(0)
                    model = (Model(cfg.vocab_size, cfg.seq_len) if Model is Reference else
                             Model(cfg))
                    optimizers = adamw(model, rate)
                loss_fn = (functools.partial(reference_nll, cfg=cfg) if Model is Reference else
                           lambda model, x: methods.loss(script, model, cfg, x, g))
                ema, steps = learn(seconds, model, optimizers, rate, loss_fn, batch)
                x, _ = script.get_eval_rows(script.load_data(cfg).val, cfg, 128)
                with AMP, torch.no_grad():
                    nats = (float(reference_nll(ema, x, cfg, mean=False)) / len(x)
                            if Model is Reference else
                            script.evaluate(ema, script.load_data(cfg), cfg)["nats_per_doc"])
                found[rate] = dict(rate=rate, steps=steps, nats_per_doc=nats)
                print(name, seconds, found[rate], flush=True)
            best = min(found, key=lambda rate: found[rate]["nats_per_doc"])
            out[f"quality_{name}_{seconds}"] = found[best] | dict(tried=[*found.values()])
            tried = (best,)
    torch.set_num_threads(before)
    return out


PARTS = dict(memory=memory, start=start, train=train, sample=sample, quality=quality)


def main(argv):
    """Measure all parts, or those that are named, write speed.json and print it."""
    common.show_help(argv, __doc__)
    if not set(argv) <= set(PARTS):
        raise common.UserError(f"parts are {', '.join(PARTS)}, not {' '.join(argv)}")
    about = dict(command=" ".join(["python lab/speed.py", *argv]), seed=0, torch=torch.__version__,
                 machine=fast.machine(torch.device("cpu")), threads=torch.get_num_threads(),
                 bfloat16=AUTO == "bfloat16")
    old = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    out = old if argv else about | {k: v for k, v in old.items() if "quality" in k}
    for name, part in PARTS.items():
        if name in argv or not argv and name != "quality":
            begun = time.perf_counter()
            out |= part()
            if argv:  # another machine or time than that of the other parts
                out[f"made_{name}"] = about
            out[f"seconds_{name}"] = time.perf_counter() - begun
    text = json.dumps(out, indent=1)
    TARGET.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    common.run_main(main)
