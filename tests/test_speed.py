"""What lab/speed.py compares are the same losses of the same networks."""
import contextlib
import json

import pytest
import torch

import common
from lab import methods, speed

SMALL = dict(vocab_size=30, eos=0, rows="docs", seq_len=12, n_layer=1, n_head=2, n_embd=16)


def small(script):
    torch.manual_seed(0)
    cfg = script.Config(**SMALL, **(dict(bos=0) if hasattr(script.Config, "bos") else {}))
    model = script.Model(cfg)
    for p in model.parameters():  # not uniform
        torch.nn.init.normal_(p, std=0.3)
    return cfg, model, torch.randint(30, (8, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", speed.SCRIPTS)
def test_plain_training_has_the_same_loss_and_gradient(name):
    script, found = speed.SCRIPTS[name], []
    cfg, model, x0 = small(script)
    forward, inside = script.Model.forward, script.Attention.forward
    loss_fn = speed.plain_ar if name == "ar" else methods.loss
    for loss, context in ((methods.loss, contextlib.nullcontext()),
                          (loss_fn, speed.plainly(script))):
        with context:
            loss(script, model, cfg, x0, torch.Generator().manual_seed(2)).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    assert found[0].norm() > 0.01
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
    assert (script.Model.forward, script.Attention.forward) == (forward, inside)


def test_a_softmax_over_clean_positions_changes_nothing_but_time():
    script, asked = speed.dit_embed, []
    cfg, model, x0 = small(script)
    high, low = model.high, model.low
    lam = torch.tensor([high, (high + low) / 2, low]).repeat(8, 4)
    self_likelihood = script.Model.self_likelihood
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.Model, "self_likelihood", lambda *inputs: (
            asked.append(inputs[2].numel()), self_likelihood(*inputs))[1])
        before = model.high
        with speed.softmax_everywhere(model):
            model(script.q_sample(model.embeddings()[x0], lam, torch.zeros(8, 12, 16)), lam)
        model(script.q_sample(model.embeddings()[x0], lam, torch.zeros(8, 12, 16)), lam)
    assert model.high == before and asked[:2] == [64, 0] and asked[3:5] == [32, 32]


def test_a_race_calls_in_turn_and_leaves_out_the_first_rounds(monkeypatch):
    order, clock = [], iter(range(100))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    took = speed.race(dict(a=lambda: order.append("a"), b=lambda: order.append("b")), 2, 1)
    assert order == list("ababab") and took == dict(a=1, b=1)


def test_parts_that_are_named_leave_the_others_as_they_were(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "TARGET", tmp_path / "speed.json")
    monkeypatch.setattr(speed, "PARTS", dict(a=lambda: dict(x=1), b=lambda: dict(y=next(count))))
    count = iter(range(9))
    speed.main([])
    speed.main(["b"])
    made = json.loads((tmp_path / "speed.json").read_text())
    assert (made["x"], made["y"], made["redone"]) == (1, 1, ["b"])
    with pytest.raises(common.UserError, match="not c"):
        speed.main(["c"])
