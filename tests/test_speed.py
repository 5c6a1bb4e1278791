"""lab/speed.py: the reference step, and how it is measured."""
import json
import math

import pytest
import torch

import ar
import common
from lab import speed

def test_the_reference_is_a_causal_network_that_begins_at_ln_V():
    torch.manual_seed(0)
    model, x = speed.Reference(30, 12, 2, 2, 16), torch.randint(30, (4, 12))
    model.requires_grad_(False)
    assert model(x, x).item() == pytest.approx(math.log(30), abs=0.05)
    for p in model.parameters():  # not uniform
        torch.nn.init.normal_(p, std=0.3)
    target = torch.full_like(x, -100)  # is ignored
    target[:, 5] = x[:, 5]
    other = torch.cat((x[:, :6], 29 - x[:, 6:]), 1)
    assert model(x, target).item() == pytest.approx(model(other, target).item(), abs=1e-5)
    other[:, 4] = (other[:, 4] + 1) % 30
    assert abs(model(x, target) - model(other, target)) > 1e-3


def test_a_step_of_the_reference_learns(monkeypatch):
    monkeypatch.setattr(speed, "build", lambda script, dtype: (
        ar.Config(vocab_size=30, seq_len=12), 0, 0, 0, lambda: torch.full((4, 12), 7)))
    losses, forward = [], speed.Reference.forward
    monkeypatch.setattr(speed.Reference, "forward", lambda *parts: (
        losses.append(forward(*parts)), losses[-1])[1])
    step = speed.reference_step(torch.autocast("cpu", enabled=False))
    for _ in range(20):
        step()
    assert losses[-1] < 0.5 * losses[0]


def test_a_race_calls_in_turn_and_leaves_out_the_first_rounds(monkeypatch):
    order, clock = [], iter(range(100))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    took = speed.race(dict(a=lambda: order.append("a"), b=lambda: order.append("b")), 2, 1)
    assert order == list("ababab") and took == dict(a=1, b=1)


def test_parts_that_are_named_leave_the_others_as_they_were(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "TARGET", tmp_path / "speed.json")
    monkeypatch.setattr(speed, "PARTS", dict(a=lambda: dict(x=1), b=lambda: dict(y=next(count))))
    count = iter(range(9))
    speed.TARGET.write_text(json.dumps(dict(quality_ar_120=7, made_quality=8, z=9)))
    speed.main([])
    made = json.loads((tmp_path / "speed.json").read_text())  # what takes longest is kept
    assert (made["quality_ar_120"], made["made_quality"], "z" in made) == (7, 8, False)
    speed.main(["b"])
    made = json.loads((tmp_path / "speed.json").read_text())
    assert (made["x"], made["y"], made["command"]) == (1, 1, "python lab/speed.py")
    assert made["made_b"]["command"] == "python lab/speed.py b" and "made_a" not in made
    with pytest.raises(common.UserError, match="not c"):
        speed.main(["c"])
