"""Device and number format; compiled blocks or a faster RMSNorm, which compute the same in less
time; Muon, the optimizer of the matrices."""
import contextlib
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.nn as nn

from data.files import UserError


def pick_device(name):
    """auto: cuda, mps or cpu, the first that is there."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    index = f":{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else ""
    try:
        return torch.zeros(1, device=name + index).device
    except (RuntimeError, AssertionError):
        raise UserError(f"there is no {name} device here: choose --device cpu or auto") from None


def pick_dtype(name, device):
    """auto: bfloat16 where the hardware multiplies it, else float32."""
    cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    is_fast = (cpu.get("avx512_bf16") or cpu.get("amx_bf16") or cpu.get("amx_tile") or
               device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    return name if name != "auto" else "bfloat16" if is_fast else "float32"


def machine(device):
    """The name of the GPU or CPU, for the log."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, TypeError):
        return re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return sys.platform


class NormFunction(torch.autograd.Function):
    """F.rms_norm of x (..., C) with gains w (C,), in half the time of PyTorch's on CPUs."""

    @staticmethod
    def forward(ctx, x, w, eps):
        scale = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / len(w) + eps).rsqrt()
        ctx.save_for_backward(x, w, scale)
        return (x * scale).mul_(w)

    @staticmethod
    def backward(ctx, grad):
        x, w, scale = ctx.saved_tensors
        y = x * scale
        dw = grad * y
        dx = torch.addcmul(grad * w, y, (dw @ w)[..., None] / len(w), value=-1).mul_(scale)
        return dx, dw.flatten(0, -2).sum(0), None


class FastRMSNorm(nn.RMSNorm):
    """nn.RMSNorm with NormFunction."""

    def forward(self, x):
        return NormFunction.apply(x, self.weight, self.eps or torch.finfo(x.dtype).eps)


def speed_up(model, cfg, device):
    """Compile the blocks for --compile yes and, with a C++ compiler, for auto in long runs; not the
    head, whose input has another length at every step. Else, on CPUs, use a faster RMSNorm."""
    able = device.type != "mps" and any(map(shutil.which, ("g++", "clang++", "cl")))
    if cfg.compile == "yes" and device.type == "cpu" and not able:
        raise UserError("--compile yes needs a C++ compiler (g++, clang++ or cl): install one")
    if cfg.compile == "yes" or cfg.compile == "auto" and able and cfg.steps >= 5000:
        torch._dynamo.config.suppress_errors = cfg.compile == "auto"  # what fails runs uncompiled
        warnings.filterwarnings("ignore", ".*code generation for complex operators")  # rotate()
        for block in model.blocks:
            block.compile()
    elif device.type == "cpu":
        for module in model.modules():
            if type(module) is nn.RMSNorm:
                module.__class__ = FastRMSNorm


NEWTON_SCHULZ = ((8.3434, -24.2028, 17.595), (4.0709, -2.9692, 0.547), (3.6778, -2.6964, 0.5166),
                 (2.782, -2.0749, 0.4635))


def orthogonalize(G):
    """Matrices G (N, m, n), m <= n, with singular values of about 1: those above 0.002 of the norm
    become 0.66 to 1.32 (Newton-Schulz as in Jordan et al. 2024; each step's odd polynomial is the
    closest to 1 on the interval the one before leaves, as in Amsel et al. 2025)."""
    X = G / G.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if X.dtype == torch.float32:  # cheaper: all factors P (N, m, m) first; bfloat16 is too coarse
        for i, (a, b, c) in enumerate(NEWTON_SCHULZ):
            A = P @ A @ P if i else X @ X.mT
            P = torch.baddbmm(A, A, A, beta=b, alpha=c)
            P.diagonal(dim1=1, dim2=2).add_(a)
            Q = P @ Q if i else P
        return Q @ X
    for a, b, c in NEWTON_SCHULZ:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024), as torch.optim.Muon with match_rms_adamw: momentum, then an
    orthogonalised update; the matrices of one shape together, in `dtype` (as --dtype)."""

    def __init__(self, params, lr, dtype="auto", momentum=0.95, weight_decay=0.05):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(tuple(sorted(p.shape)), []).append(p)
            for several in shapes.values():
                for p in several:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                grads = [p.grad for p in several]
                momentum = [self.state[p]["momentum"] for p in several]
                torch._foreach_lerp_(momentum, grads, 1 - group["momentum"])
                G = torch._foreach_lerp(grads, momentum, group["momentum"])  # Nesterov's
                dtype = getattr(torch, pick_dtype(self.dtype, several[0].device))
                X = torch.stack([g.mT if g.shape[0] > g.shape[1] else g for g in G]).to(dtype)
                n = 4 if X.device.type == "cpu" else len(X)  # few fit into its cache
                X = torch.cat([orthogonalize(x) for x in X.split(n)]).to(several[0].dtype)
                torch._foreach_mul_(several, 1 - group["lr"] * group["weight_decay"])
                rate = 0.2 * max(several[0].shape) ** 0.5  # an RMS like that of AdamW's updates
                X = [x.mT if p.shape[0] > p.shape[1] else x for p, x in zip(several, X)]
                torch._foreach_add_(several, X, alpha=-group["lr"] * rate)
