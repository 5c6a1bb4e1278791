"""The cost of GPT-2's 50257 tokens: training steps (loss, gradients, clipping, both optimizers) of
16 rows of 160 random tokens with a softmax over all tokens, mdlm.py and bit_diffusion.py, and with
the bit head of lab/bit_variants.py, of which input and output know bits only. A process for each
case, in turns; speed is the median over turns, memory the largest resident size less that before
the model was made.

    python lab/vocabulary.py        writes results/vocabulary.json
"""
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python lab/vocabulary.py`
import bit_diffusion
import common
import fast
import mdlm
from lab import bit_variants

CASES = {
    "mdlm.py": (mdlm, mdlm, {}),
    "token head": (bit_diffusion, bit_diffusion, {}),
    "bit head, mixture of 32": (bit_diffusion, bit_variants,
                              dict(head="bit", num_mixture=32, input="byte")),
    "bit head": (bit_diffusion, bit_variants, dict(head="bit", input="byte")),
}
TURNS, STEPS, BF16 = 3, 8, torch.autocast("cpu", torch.bfloat16)
TARGET = ROOT / "results/vocabulary.json"


def resident():
    """Largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name):
    """One process: seconds of a step, memory, parameters."""
    script, variant, settings = CASES[name]
    cfg = variant.Config(vocab_size=50257, eos=50256, rows="stream", **settings)
    torch.manual_seed(0)
    before, g, times = resident(), torch.Generator().manual_seed(0), []
    model = variant.Model(cfg)
    optimizers = script.make_optimizers(model, cfg)
    for _ in range(STEPS + 2):
        x0 = torch.randint(50257, (cfg.batch_size, cfg.seq_len), generator=g)
        start = time.perf_counter()
        with BF16:
            loss = variant.loss_fn(model, x0, *variant.corrupt(x0, cfg, g))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return dict(seconds=statistics.median(times[2:]), mib=resident() - before,
                parameters=sum(p.numel() for p in model.parameters()))


def main(argv):
    common.show_help(argv, __doc__)
    if argv:
        if argv[0] not in CASES:
            raise common.UserError(f"unknown case {argv[0]}: choose {', '.join(CASES)}, or none")
        return print(json.dumps(measure(argv[0])))
    turns = {name: [] for name in CASES}
    for _ in range(TURNS):
        for name, rows in turns.items():
            done = subprocess.run([sys.executable, __file__, name], check=True, text=True,
                                  stdout=subprocess.PIPE)
            rows.append(json.loads(done.stdout))
    cases = {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
             for name, rows in turns.items()}
    for case in cases.values():
        case["tokens_per_second"] = 16 * 160 / case["seconds"]
        case["times_as_fast"] = cases["mdlm.py"]["seconds"] / case["seconds"]
        case["share_of_memory"] = case["mib"] / cases["mdlm.py"]["mib"]
    made = dict(command="python lab/vocabulary.py", vocab_size=50257, rows=16, seq_len=160,
                seed=0, turns=TURNS, steps=STEPS, torch=torch.__version__,
                machine=fast.machine(torch.device("cpu")), threads=torch.get_num_threads(),
                cases=cases)
    TARGET.write_text(json.dumps(made, indent=1) + "\n")
    for name, case in cases.items():
        print(f"{name:24} {case['tokens_per_second']:8,.0f} tokens/s, {case['times_as_fast']:.2f} "
              f"times mdlm.py; {case['mib']:6.0f} MiB, {case['share_of_memory']:.2f} of mdlm.py; "
              f"{case['parameters'] / 1e6:.2f}M parameters")


if __name__ == "__main__":
    common.run_main(main)
