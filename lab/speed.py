"""Measure speed, as ratios in one run: what all six scripts gain, and what they cost.

    python lab/speed.py                  everything, seven minutes: writes results/speed.json
    python lab/speed.py train sample     only these parts

Parts: memory (peak of training), start (--help and the first step), train (against the same network
trained plainly: fused attention, logits at every position, float32 or bfloat16; share of the
machine's bfloat16 matrix products; loading of data) and sample (few steps and one token a step,
against ar.py with its cache). Whatever is compared
takes turns, call by call, and medians are kept: a noisy machine slows all alike.
"""
import contextlib
import functools
import inspect
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python lab/speed.py`
import ar
import common
import diffugpt_varlen
import dit_embed
from lab import decoding, mdlm_variants, methods
from lab.methods import IDEAS, ancestral, default_sampler, device_of, script_of

TARGET = ROOT / "results/speed.json"
SCRIPTS = {name: script_of(name) for name in IDEAS}
BF16 = torch.autocast("cpu", torch.bfloat16)
FP32 = torch.autocast("cpu", enabled=False)
ONE = "ancestral"  # temperature 1, one token a step
PLAIN = dict(order="random", num_steps=160, temperature=1.0, remask="none")
MDLM = {  # settings of lab/decoding.py that are timed besides the two of mdlm.py
    "maxprob_32": dict(PLAIN, order="maxprob", num_steps=32),
    "random_32": dict(PLAIN, num_steps=32),
    "random_16": dict(PLAIN, num_steps=16),
    "blocks_of_32": dict(PLAIN, order="maxprob", block=32),
    "blocks_of_32_dual_cache": dict(PLAIN, order="maxprob", block=32, cache="dual"),
    "ancestral_1000": dict(PLAIN, num_steps=1000, ancestral=True),
}


def race(works, rounds, warm):
    """Median seconds of `works`, name -> function, called in turn; `warm` rounds do not count."""
    times = {name: [] for name in works}
    for _ in range(warm + rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(several[warm:]) for name, several in times.items()}


def build(script):
    """The default Config of a script, a new network, its optimizers, a generator, and a function
    that draws a batch."""
    g = torch.Generator().manual_seed(0)
    cfg = script.Config(**(dict(init_from="scratch") if script is diffugpt_varlen else {}))
    batch = functools.partial(script.get_batch, script.load_data(cfg).train, cfg, g)
    torch.manual_seed(0)
    model = script.Model(cfg)
    return cfg, model, script.make_optimizers(model, cfg), g, batch


def step(script, loss_fn, cfg, model, optimizers, g, batch, amp=BF16):
    """One optimizer step: data, loss, backward, both optimizers."""
    with amp:
        loss = loss_fn(script, model, cfg, batch().to(device_of(model)), g)
    loss.item()  # a GPU is waited for
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def plain_attention(self, x, positions, kv_cache=None):
    """Attention.forward with PyTorch's fused attention."""
    B, T, C = x.shape
    q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
    q, k = (ar.rotate(F.layer_norm(y, y.shape[3:]), positions) for y in (q, k))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=isinstance(self, ar.Attention))
    return self.proj(y.transpose(1, 2).reshape(B, T, C))


def plain_gpt2_attention(self, x, attention_mask):
    """The same for diffugpt_varlen.py."""
    B, T, C = x.shape
    q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, attention_mask)
    return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def plain_ar(script, model, cfg, x0, g):
    """The loss of ar.py the plain way: whole rows, logits everywhere."""
    inputs = torch.cat((torch.full_like(x0[:, :1], cfg.bos), x0[:, :-1]), 1)
    ce = F.cross_entropy(model(inputs).flatten(0, 1), x0.flatten(), reduction="none")
    return ce[ar.is_scored(x0, cfg).flatten()].mean()


@contextlib.contextmanager
def plainly(script):
    """In this context the network of a script has fused attention and computes logits everywhere;
    the loss takes those that it scores."""
    forward = script.Model.forward
    names = list(inspect.signature(forward).parameters)[1:]

    def everywhere(self, *inputs, **named):
        given = dict(zip(names, inputs)) | named
        target = given.pop("is_target", None)
        logits = forward(self, **given)
        return logits if target is None else logits[target]

    attention = plain_gpt2_attention if script is diffugpt_varlen else plain_attention
    with mock.patch.object(script.Model, "forward", everywhere), \
            mock.patch.object(script.Attention, "forward", attention):
        yield


@contextlib.contextmanager
def softmax_everywhere(model):
    """In this context a network of dit_embed.py takes no position for clean: all but pure noise go
    through the softmax over the vocabulary, as at first."""
    kept, model.high = model.high, model.high + 1
    yield
    model.high = kept


def train():
    """Positions of rows per second of training, as the script does it and plainly; of loading."""
    out, matrix = {}, torch.randn(2048, 2048, dtype=torch.bfloat16)
    for name, script in SCRIPTS.items():
        made = cfg, model, *_, batch = build(script)

        def take(context=contextlib.nullcontext(), loss_fn=methods.loss, amp=BF16):
            with context:
                step(script, loss_fn, *made, amp)

        plain = plain_ar if script is ar else methods.loss
        works = dict(script=take, data=batch,
                     plain_bfloat16=lambda: take(plainly(script), plain),
                     plain_float32=lambda: take(plainly(script), plain, FP32),
                     peak=lambda: matrix @ matrix)
        if script is dit_embed:
            works["before"] = lambda: take(softmax_everywhere(model))
        took = race(works, 11, warm=2)
        with FlopCounterMode(display=False) as counter:  # matrix products and convolutions
            for _ in range(4):  # sizes are random
                take()
        rows, gflop = cfg.batch_size * cfg.seq_len, counter.get_total_flops() / 4e9
        speed = {key: rows / took[key] for key in ("plain_float32", "plain_bfloat16", "script")}
        row = out[f"train_{name}"] = dict(
            tokens_per_second=speed.pop("script"), **speed, gflop=gflop,
            ratio=took["plain_float32"] / took["script"],
            ratio_bfloat16=took["plain_bfloat16"] / took["script"],
            gflops=gflop / took["script"], peak_gflops=2 * 2.048 ** 3 / took["peak"])
        row["share_of_peak"] = row["gflops"] / row["peak_gflops"]
        out[f"data_{name}"] = dict(tokens_per_second=rows / took["data"],
                                   share_of_step=took["data"] / took["script"])
        if script is dit_embed:
            out["clean_train"] = dict(before=took["before"], after=took["script"],
                                        ratio=took["before"] / took["script"])
    out["peak_gflops"] = statistics.median(out[f"train_{name}"]["peak_gflops"] for name in SCRIPTS)
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
    default_dit = plans["dit_embed", "default"]
    for n in (1, 16):
        nfe, canvas = {}, torch.full((n, 160), 2048)

        def draw(key, cfg, context=contextlib.nullcontext()):
            g = torch.Generator().manual_seed(0)
            with BF16, context:
                _, nfe[key] = methods.sample(SCRIPTS[key[0]], networks[key[0]], cfg, n, g)

        def decode(how):
            with BF16:
                cfg = decoding.Config(**fixed, **MDLM[how])
                _, nfe["mdlm", how] = decoding.decode(lab_model, canvas, cfg,
                                                      torch.Generator().manual_seed(0))

        def uncached():
            """ar.sample that sends the whole past through the network for each token."""
            x, cfg = torch.full((n, 161), 0), plans["ar", ONE]
            with BF16, torch.no_grad():
                for i in range(160):
                    logits = networks["ar"](x[:, :i + 1])[:, -1].float()
                    x[:, i + 1] = ar.categorical(ar.filter_logits(logits, cfg),
                                                 torch.Generator().manual_seed(i))

        works = {key: functools.partial(draw, key, cfg) for key, cfg in plans.items()}
        works |= {("mdlm", how): functools.partial(decode, how) for how in MDLM}
        works["uncached"] = uncached
        works["before"] = lambda: draw(("dit_embed", ""), default_dit,
                                       softmax_everywhere(networks["dit_embed"]))
        took = race(works, 2, warm=n == 1)
        cached = took["ar", ONE]
        out[f"sample_ar_{n}"] = dict(cached=cached, uncached=took["uncached"],
                                     ratio=took["uncached"] / cached)
        out |= {f"sample_{name}_{n}_{how}": dict(
            seconds=took[key], nfe=nfe[key], times_ar_cached=took[key] / cached)
            for key in works if isinstance(key, tuple) and key[0] != "ar"
            for name, how in [key]}
        after = took["dit_embed", "default"]
        out[f"clean_sample_{n}"] = dict(before=took["before"], after=after,
                                          ratio=took["before"] / after)
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


PARTS = dict(memory=memory, start=start, train=train, sample=sample)


def main(argv):
    """Measure all parts, or those that are named, write speed.json and print it."""
    common.show_help(argv, __doc__)
    if not set(argv) <= set(PARTS):
        raise common.UserError(f"parts are {', '.join(PARTS)}, not {' '.join(argv)}")
    out = json.loads(TARGET.read_text()) if argv else {}
    out |= dict(command="python lab/speed.py", seed=0, torch=torch.__version__,
                machine=common.machine(torch.device("cpu")), threads=torch.get_num_threads(),
                bfloat16=common.pick_dtype("auto", torch.device("cpu")) == "bfloat16",
                redone=sorted({*out.get("redone", []), *argv}))
    for name, part in PARTS.items():
        if not argv or name in argv:
            begun = time.perf_counter()
            out |= part()
            out[f"seconds_{name}"] = time.perf_counter() - begun
    text = json.dumps(out, indent=1)
    TARGET.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    common.run_main(main)
