"""Measure speed as ratios in one run: `python results/speed.py` writes results/speed.json.

Training steps of ar.py and mdlm.py against the same networks trained the plain way (float32, fused
attention, logits at every position, no trimming); their share of the machine's bfloat16 matrix
products; generation with and without the cache of keys and values; 1000-step masked diffusion.
"""
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import ar
import common
import mdlm

BF16 = torch.autocast("cpu", torch.bfloat16)
FP32 = torch.autocast("cpu", enabled=False)
MDLM = {  # settings of mdlm.sample that are timed
    "one_token_a_call": dict(order="random", quota="one"),
    "maxprob_32": dict(order="maxprob", quota="even", sampling_steps=32),
    "random_32": dict(order="random", quota="even", sampling_steps=32),
    "random_16": dict(order="random", quota="even", sampling_steps=16),
    "blocks_of_32": dict(order="maxprob", quota="even", block=32),
    "blocks_of_32_dual_cache": dict(order="maxprob", quota="even", block=32, cache="dual"),
    "ancestral_1000": dict(order="random", quota="binomial", sampling_steps=1000),
}


def seconds(work, repeats=7):
    """Median seconds of work(), after two calls that do not count."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def plain_attend(q, k, v, causal):
    """PyTorch's fused attention, as on a GPU."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def plain_ar(model, x0, cfg, g):
    """ar.loss_fn the plain way: whole rows, logits everywhere."""
    inputs = torch.cat((torch.full_like(x0[:, :1], cfg.bos), x0[:, :-1]), 1)
    ce = F.cross_entropy(model(inputs).flatten(0, 1), x0.flatten(), reduction="none")
    return ce[ar.charged(x0, cfg).flatten()].mean(), {}


def plain_mdlm(model, x0, cfg, g):
    """mdlm.loss_fn the plain way: logits everywhere."""
    n = torch.arange(1, len(x0) + 1) * cfg.seq_len // len(x0)
    xt, is_mask = mdlm.corrupt_count(x0, n, cfg, g)
    ce = F.cross_entropy(model(xt, n / cfg.seq_len).flatten(0, 1), x0.flatten(), reduction="none")
    return ((ce.view_as(x0) * is_mask).sum(1) / n).mean(), {}


def train_speed(script, plain):
    """Positions of rows per second: as the script trains, and plainly; share of the peak."""
    cfg = script.fill_in(script.Config())
    torch.manual_seed(0)
    model = script.Model(cfg)
    optimizers = script.make_optimizers(model, cfg)
    g = torch.Generator().manual_seed(0)
    fused = script.attend

    def step(loss_fn, amp):
        with amp:
            loss = loss_fn(model, script.get_batch("train", cfg, g), cfg, g)[0]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    rows = cfg.batch_size * cfg.seq_len
    fast = rows / seconds(lambda: step(script.loss_fn, BF16), 15)
    script.attend = plain_attend
    half = rows / seconds(lambda: step(plain, BF16), 15)
    slow = rows / seconds(lambda: step(plain, FP32), 15)
    script.attend = fused
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    charged, computed = 0.5, 1.0  # shares of a row that meet the head, and the trunk
    if script is ar:
        length = ar.charged(script.get_batch("train", cfg, g), cfg).sum(1).sort().values
        charged = length.float().mean().item() / cfg.seq_len
        computed = sum(h.max().item() for h in length.chunk(2)) / 2 / cfg.seq_len
    flops = 6 * matrices * computed + 6 * model.head.weight.numel() * charged \
        + 12 * cfg.n_layer * cfg.seq_len * cfg.n_embd * computed ** 2
    return dict(tokens_per_second=fast, plain_float32=slow, plain_bfloat16=half, ratio=fast / slow,
                gflops=fast * flops / 1e9)


def main():
    """Measure everything, write speed.json and print it."""
    device = torch.device("cpu")
    a = torch.randn(2048, 2048, dtype=torch.bfloat16)
    out = dict(command="python results/speed.py", seed=0, torch=torch.__version__,
               machine=common.machine(device), threads=torch.get_num_threads(),
               bfloat16=common.cpu_has_bf16())
    out["peak_gflops"] = 2 * 2048 ** 3 / seconds(lambda: a @ a, 20) / 1e9
    for script, plain in ((ar, plain_ar), (mdlm, plain_mdlm)):
        row = out[f"train_{script.NAME}"] = train_speed(script, plain)
        row["share_of_peak"] = row["gflops"] / out["peak_gflops"]
    cfg = ar.Config(vocab_size=2048, bos=0, eos=0, rows="stream")  # stream: no row ends early
    model = ar.Model(cfg)
    with BF16:
        for n in (1, 16):
            g = torch.Generator().manual_seed(0)
            cached = seconds(lambda: ar.sample(model, cfg, n, g), 3)
            uncached = seconds(lambda: ar.sample(model, cfg, n, g, cached=False), 3)
            out[f"sample_ar_{n}"] = dict(cached=cached, uncached=uncached, ratio=uncached / cached)
        for n, name, settings in [(n, *pair) for n in (1, 16) for pair in MDLM.items()]:
            plan = mdlm.Config(vocab_size=2048, rows="stream", **settings)
            network, info = mdlm.Model(plan), {}
            took = seconds(lambda: info.update(mdlm.sample(network, plan, n, g)[1]), 3)
            out[f"sample_mdlm_{n}_{name}"] = dict(
                seconds=took, **info, times_ar_cached=took / out[f"sample_ar_{n}"]["cached"])
    text = json.dumps(out, indent=1)
    Path(__file__).with_suffix(".json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
