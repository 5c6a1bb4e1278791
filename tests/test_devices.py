"""Every loss, bound and sampler on a device that is not there: tensors that claim to be on a GPU or
on Apple silicon, hold their data on the CPU, and refuse what such a device refuses: tensors of
another device, the CPU's generator and, on Apple silicon, float64."""
import contextlib

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import ar
import bit_diffusion
import diffugpt_varlen
import dit_embed
import mdlm
import sdd
from lab import methods

aten = torch.ops.aten


class Elsewhere(torch.Tensor):
    """A tensor that says it is on `device`; its data are in .inner, on the CPU. To PyTorch it is
    on "meta", the one device that needs no driver."""

    @staticmethod
    def __new__(cls, inner, device):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="meta")

    def __init__(self, inner, device):
        self.inner, self.where = inner, device

    @property
    def device(self):
        return self.where

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the device")


class Generator(torch.Generator):
    """A generator that may be of a device that is not there."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        self.where = torch.device(device)


class Arrivals(TorchFunctionMode):
    """What is moved to or made on the device, which PyTorch would refuse here."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        where = args[1] if func is torch.Tensor.to and len(args) > 1 else kwargs.get("device")
        if isinstance(where, str):
            where = torch.device(where)
        if not isinstance(where, torch.device) or where.type != self.mode.device.type:
            return func(*args, **kwargs)
        if func is torch.Tensor.to:
            return args[0] if isinstance(args[0], Elsewhere) else self.mode.wrap(args[0])
        g = kwargs.get("generator")
        assert g is None or g.where == self.mode.device, f"{func} with the CPU's generator"
        return self.mode.wrap(func(*args, **kwargs | dict(device="cpu")))


class Device(TorchDispatchMode):
    """In this context `name` is a device."""

    def __init__(self, name):
        super().__init__()
        self.device, self.waits = torch.device(name), 0

    def wrap(self, x):
        assert self.device.type != "mps" or x.dtype != torch.float64, "float64"
        return Elsewhere(x, self.device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        away = [x for x in leaves if isinstance(x, Elsewhere)]
        target = torch.device(kwargs.get("device") or (self.device if away else "cpu"))
        target = self.device if target.type == "meta" else target
        moves = func in (aten._to_copy.default, aten.copy_.default)
        may_mix = moves or func in (aten.index.Tensor, aten.index_put_.default,
                                    aten.index_put.default)  # an index may be on the CPU
        here = [x for x in leaves if torch.is_tensor(x) and not isinstance(x, Elsewhere)]
        if away and not may_mix:
            assert all(x.dim() == 0 for x in here), f"{func} of tensors on two devices"
        if may_mix and not moves and not isinstance(args[0], Elsewhere):
            assert not away, f"{func} of a CPU tensor with an index or values elsewhere"
        if away:
            assert not [x for x in leaves if isinstance(x, torch.Generator)], f"{func} with g"
        inner = {id(x.inner): x for x in away}
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x,
                                (args, kwargs))
        out = func(*args, **kwargs)
        if target.type != self.device.type or moves and func is aten.copy_.default and not \
                isinstance(leaves[0], Elsewhere):
            return out
        return tree_map(lambda x: x if not torch.is_tensor(x) else inner[id(x)] if id(x) in inner
                        else self.wrap(x), out)


def attention(q, k, v, attn_mask=None, is_causal=False):
    """What F.scaled_dot_product_attention computes, in operations of every device."""
    score = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    if is_causal:
        attn_mask = torch.ones(score.shape[2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        score = score.masked_fill(~attn_mask, -torch.inf)
    return score.softmax(-1).to(v.dtype) @ v


@pytest.fixture(params=["cuda", "mps"])
def device(request, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    with Device(request.param) as mode, Arrivals(mode), torch.no_grad():
        monkeypatch.setattr(torch, "Generator", Generator)
        yield mode


def moved(model, mode):
    """The model with its parameters and buffers on the device."""
    for part in model.modules():
        for name, p in [*part.named_parameters(recurse=False)]:
            setattr(part, name, nn.Parameter(mode.wrap(p.data), requires_grad=False))
        for name, p in [*part.named_buffers(recurse=False)]:
            part.register_buffer(name, mode.wrap(p))
    return model


CASES = [  # script, settings of its Config
    (ar, {}), *((mdlm, how) for how in ({}, dict(remask="none", order="margin"))),
    *((dit_embed, dict(order=order)) for order in ("maxprob", "random", "l2r")),
    *((bit_diffusion, how) for how in ({}, dict(order="random"))),
    *((sdd, how) for how in ({}, dict(sampler="ancestral", order="l2r", remask="none"),
                             dict(sampler="deterministic", order="random", remask="none"))),
    (diffugpt_varlen, dict(pipeline="arm")),
    *((diffugpt_varlen, dict(length_mode=mode)) for mode in (
        "fixed", "truncate", "quantile", "blockwise", "presampled"))]


@pytest.mark.parametrize("script, changes", CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_loss_bound_and_samples_stay_on_the_device(script, changes, device):
    with contextlib.suppress(AttributeError):
        changes = dict(num_steps=script.Config.num_steps and 5) | changes
    cfg = script.Config(**dict(vocab_size=12, seq_len=10, n_layer=1, n_head=2, n_embd=8,
                               rows="docs", eos=0) | changes)
    torch.manual_seed(0)
    model = moved(script.Model(cfg), device)
    x0 = torch.randint(12, (4, 10)).to(device.device)
    g = torch.Generator().manual_seed(0)
    loss = methods.loss(script, model, cfg, x0, g)
    assert loss.device.type == device.device.type and loss.isfinite()
    if script is ar:
        nats = ar.nll(model, x0, cfg)
    else:
        nats = script.nelbo(model, x0, cfg, g, 3)
        if changes.get("pipeline") != "arm":
            is_given = torch.zeros(4, 10, dtype=torch.bool).to(device.device)
            is_given[:, :3] = True
            script.nelbo(model, x0, cfg, g, 3, is_given)
    assert nats.device.type == "cpu" and nats.isfinite().all()
    canvas = torch.tensor([[3, 5] + 8 * [12]] * 4).to(device.device)
    x, nfe = script.sample(model, canvas, cfg, g)
    assert x.device.type == device.device.type and nfe > 0 and max(x.flatten().tolist()) < 12
    assert [row[:2] for row in x.tolist()] == 4 * [[3, 5]]


def test_the_device_refuses_what_a_device_refuses():
    with Device("mps") as mode, Arrivals(mode), torch.no_grad():
        x = mode.wrap(torch.ones(3))
        for wrong in (lambda: x + torch.ones(3), lambda: x.double(), lambda: torch.ones(3)[x > 0],
                      lambda: torch.rand(3, device="mps", generator=Generator())):
            with pytest.raises((AssertionError, RuntimeError)):
                wrong()
        assert (x + torch.ones(())).sum().item() == 6 and x.cpu().double().sum() == 3


class Waits(TorchDispatchMode):
    """Counts what makes a program wait for a GPU: numbers and sizes that depend on data."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        masks = tree_leaves(args[1]) if name.startswith(("index", "_index_put")) else []
        self.count += name.startswith(("_local_scalar", "nonzero", "masked_select", "_unique")) or \
            any(torch.is_tensor(x) and x.dtype == torch.bool for x in masks)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("script, most", [(ar, 3), (mdlm, 1), (dit_embed, 4), (bit_diffusion, 3),
                                          (sdd, 6), (diffugpt_varlen, 1)],
                         ids=lambda x: getattr(x, "__name__", ""))
def test_a_training_step_seldom_waits_for_the_device(script, most):
    """Loss, gradient and optimizers; the training loop waits once more, for loss and norm. Lengths
    of rows of ar.py are fetched with tolist, of which PyTorch tells nothing: one of its three."""
    cfg = script.Config(vocab_size=12, seq_len=10, n_layer=1, n_head=2, n_embd=8, rows="docs",
                        eos=0)
    torch.manual_seed(0)
    model, g = script.Model(cfg), torch.Generator().manual_seed(0)
    optimizers, x0 = script.make_optimizers(model, cfg), torch.randint(1, 12, (4, 10))
    parts = (x0, 0.1, cfg) if script is ar else script.corrupt(x0, cfg, g)
    parts = parts if script in (ar, diffugpt_varlen) else (x0, *parts)
    for _ in range(2):  # the first step makes the state of the optimizers
        with Waits() as waits:
            script.loss_fn(model, *parts).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert waits.count + (script is ar) == most
