"""From a causal GPT to a diffusion model that decides its own length.

Method: DiffuGPT (Gong et al. 2024, arXiv 2410.17891): masked diffusion from the weights of a GPT.

    python diffugpt_varlen.py       5 minutes, 2 CPU cores: <= 1.95 nats/token (entropy 0.91)
    python diffugpt_varlen.py sample --prompt "Once upon a time" --n 3 --trace
    python diffugpt_varlen.py eval  bound, lengths, samples of every canvas [--bench cloze:FILE]
    python diffugpt_varlen.py --init-from gpt2 --tokenizer gpt2 --data fineweb --optimizer adamw

Equations. x = text, EOS, PAD, PAD ...; L the position of EOS; M the mask; i a position of a row.
    (E1)  NELBO = sum_{n=1..T} (1/n) E_{|A|=n} sum_{i in A} -log p(x_i | x_t) >= -log p(x_0)
    (E2)  p(x_i | x_t) = softmax(W h_{i-1}): the shift of the parent is kept, BOS stands before x_1
    (E3)  nothing written yet: p_i(EOS) = P(L = i), p_i(PAD) = P(L < i); the length is known at once
    (E4)  hazard P(L = i | L >= i) = p_i(EOS) / (1 - p_i(PAD)), the law of L is their product
    (E5)  EOS is the likeliest token at L only if P(L = i) > max_v p_i(v): rarely, even if perfect
    (E6)  if rows are cut at lengths that do not depend on the text, p(x_i | visible) does not
          depend on the cut: canvases may be cut, extended and shrunk, the law stays the same
    (E7)  shrink: what follows the first visible EOS or PAD is PAD and need not be computed
    (E8)  annealing: position i looks at j > i with probability r, which rises from 0 to 1

Shapes: B batch, T tokens, V vocabulary (PAD is id V, M id V + 1), C width, H heads, D = C / H.
Units: nats. Every position of a row is charged, PAD too: nobody is told the length.

Differs from the paper: the loss is the bound per token (theirs is twice that, as they divide by the
number of masks); masks in exact numbers, no cut-off of t; M and PAD are new rows of the embedding
and M is never predicted; prompts, hidden tails and cut rows in training, for lengths (E3) (E6).
Differs from ar.py: a GPT-2 block under the names that transformers gives its tensors, so that its
weights can be loaded and ours can be loaded there; diffusion in place of, or after, the chain rule.
"""
import copy
import dataclasses
import functools
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

import common_v1 as common
from common_v1 import UserError
from data.prepare import load_tokenizer, open_split, prepare, verify

NAME, BOUND = "diffugpt_varlen", "upper"

# ----------------------------------------------------------------------------------------------
# 1. config
# ----------------------------------------------------------------------------------------------


@dataclass
class Config:
    data: str = "tales"  # tales, tinystories, wikitext2, openwebtext, fineweb, or a file or folder
    tokenizer: str = "bpe"  # bpe (trained on the data), gpt2, byte, hf:NAME
    vocab_size: int = 0  # tokens to predict; 0 = the tokenizer's own size (bpe: 2048)
    docs: int = 0  # use at most this many documents; 0 = all
    rows: str = "auto"  # docs: a document a row, EOS-filled; stream: windows; auto: docs for tales
    preset: str = "tiny"  # tiny 4x192, small 8x512, medium 12x768
    seed: int = 1337  # weights, batches and noise
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # auto, float32, bfloat16 (autocast)
    steps: int = 1100  # optimizer steps
    batch_size: int = 16  # rows per micro-batch, over all processes
    seq_len: int = 160  # tokens per row
    n_layer: int = 4  # blocks
    n_head: int = 4  # heads
    n_embd: int = 192  # width
    lr: float = 6e-3  # peak learning rate
    warmup: int = 50  # steps of linear warm-up; then cosine to zero
    grad_clip: float = 1.0  # largest gradient norm; 0 = off
    grad_accum: int = 1  # micro-batches per step
    ema: float = 0.99  # averaging of the weights that are evaluated; 0 = off
    eval_every: int = 200  # steps between evaluations
    save_every: int = 500  # steps between checkpoints
    out: str = ""  # run folder; empty = out/<script>
    resume: bool = False  # continue the run in the run folder
    compile: bool = False  # torch.compile: half a minute first, then faster
    log: str = ""  # tensorboard, wandb or both (comma)
    # sampling
    n: int = 4  # samples
    prompt: str = ""  # text that every sample begins with
    temperature: float = 1.0  # below 1: safer, less diverse; 0: the likeliest token
    top_k: int = 0  # keep the k likeliest tokens; 0 = all
    top_p: float = 1.0  # keep the likeliest tokens that hold this much probability
    trace: bool = False  # show the sampling trajectory
    # method
    config: str = ""  # JSON file of settings, // comments allowed; flags win over it
    pipeline: Literal["diffusion", "arm"] = "diffusion"  # arm: causal, next token
    init_from: str = "parent"  # parent, scratch, gpt2[-medium|-large|-xl], diffugpt-s|-m, a folder
    parent: str = ""  # folder of the causal parent; empty = <out>_parent, trained if missing
    parent_steps: int = 500  # optimizer steps of that training
    shift: bool = True  # the output before a position predicts it (E2), as in the parent
    attn_ratio: float = 1.0  # share of later positions that attention sees (E8)
    attn_annealing_steps: int = 100  # steps in which that rises from 0
    mask_id: int = -1  # token whose vector the mask starts from; -1 = the checkpoint's, or the mean
    pad_masked_perc: float = -1.0  # share of PAD among masks; -1 = natural, else PADs are shown
    pad_annealing_steps: int = 0  # steps in which that share rises from 0
    pad_weight: float = 1.0  # weight of PAD in the loss; 1 = the bound
    p_cond: float = 0.1  # share of rows that begin with a prompt, never masked
    p_tail: float = 0.1  # share of rows with a prompt and everything after it masked
    tail_annealing_steps: int = 0  # steps in which that share rises from 0
    p_pin: float = 0.0  # share of rows like these that show where the EOS stands
    crop: float = 0.25  # share of batches cut at a random length (E6)
    head: Literal["marginal", "hazard", "pointer"] = "marginal"  # what tells the length
    freeze: bool = False  # train that head only
    optimizer: Literal["muon", "adamw"] = "muon"  # adamw: one rate for all, for large checkpoints
    beta1: float = 0.9  # of adamw
    beta2: float = 0.999  # of adamw
    weight_decay: float = 0.01  # of adamw
    div_factor: float = 50.0  # warm-up begins at lr / div_factor
    final_div_factor: float = 1e4  # and the cosine ends at that / final_div_factor
    canvas: Literal["full", "eos", "law", "block", "pin"] = "eos"  # what is computed, see sample
    q: float = 0.9  # canvas law: long enough with this probability
    block: int = 32  # canvases law and block: tokens that one extension adds
    max_new_tokens: int = 0  # longest continuation; 0 = to the end of the row
    order: Literal["random", "l2r", "maxprob", "margin", "entropy", "sampled"] = "random"  # see 5.
    quota: Literal["even", "ancestral"] = "even"  # tokens a call: always as many, or by chance
    sampling_steps: int = 0  # calls for max_new_tokens; 0 = one token a call
    repetition_penalty: float = 1.0  # divides the logits of tokens already in the row
    infill: str = ""  # "Once ___ a ___3 who": holes of one and three tokens, then the end
    prompt_tokens: int = 32  # eval: given tokens of the documents whose length is predicted
    judge: str = "out/ar"  # eval: the run of ar.py that judges samples
    eval_canvases: str = "full,eos,law,block,pin"  # eval: canvases to compare
    eval_k: str = "1,2,4,8"  # eval: tokens a call to compare
    eval_seeds: int = 1  # eval: repetitions of every sampling setting
    bench: str = ""  # eval: cloze:FILE, choice:FILE or infill:FILE (JSON lines; cloze also text)
    bench_n: int = 200  # eval: items of it
    # filled in from the data
    eos: int = -1  # end of document; also BOS where the tokenizer has no other
    bos: int = -1  # first input
    data_dir: str = ""  # where the prepared data are
    def problems(self):
        """Every setting that cannot work, as a list of sentences."""
        shares = ("attn_ratio", "pad_weight", "p_cond", "p_tail", "p_pin", "crop", "q")
        bad = [f"--{k.replace('_', '-')} is {getattr(self, k)}, it must be 0 to 1" for k in shares
               if not 0 <= getattr(self, k) <= 1]
        rules = [
            (self.p_cond + self.p_tail + self.p_pin > 1, "--p-cond, --p-tail and --p-pin are "
             "shares of all rows: together they are more than 1"),
            (not self.pad_masked_perc < 1, f"--pad-masked-perc is {self.pad_masked_perc}, it must "
             "be below 1 (-1 = natural)"),
            (self.rows == "stream" and max(self.p_tail, self.p_pin, self.pad_masked_perc) > 0 and
             (self.p_tail, self.p_pin, self.pad_masked_perc) != (Config.p_tail, 0.0, -1.0),
             "--p-tail, --p-pin and --pad-masked-perc are about documents: add --rows docs"),
            (self.pipeline == "arm" and self.init_from == "parent", "--pipeline arm is the parent: "
             "add --init-from scratch, or a checkpoint"),
            (self.pipeline == "arm" and self.pad_masked_perc >= 0, "--pipeline arm masks nothing: "
             "leave --pad-masked-perc out"),
            (self.freeze and self.head == "marginal", "--freeze trains the length head alone: add "
             "--head hazard or pointer"),
            (not 0 < self.q < 1, f"--q is {self.q}, it must be between 0 and 1"),
            (self.block < 1, f"--block is {self.block}, it must be at least 1"),
            (self.max_new_tokens > self.seq_len, f"--max-new-tokens {self.max_new_tokens} is more "
             f"than a row, {self.seq_len}"),
            (self.quota == "ancestral" and not self.sampling_steps, "--quota ancestral needs "
             "--sampling-steps"),
            (self.quota == "ancestral" and self.canvas in ("law", "block"), "--quota ancestral "
             "plans for the whole canvas: use --canvas full, eos or pin"),
            (self.bench and self.bench.partition(":")[0] not in ("cloze", "choice", "infill"),
             f"--bench is '{self.bench}': write cloze:FILE, choice:FILE or infill:FILE"),
            (min(self.div_factor, self.final_div_factor) < 1, "--div-factor and --final-div-factor "
             "must be at least 1"),
            (not 0 <= self.beta1 < 1 or not 0 <= self.beta2 < 1, "--beta1 and --beta2 must be at "
             "least 0 and below 1"),
            (self.weight_decay < 0, "--weight-decay must be at least 0"),
        ]
        for k in ("attn_annealing_steps", "pad_annealing_steps", "tail_annealing_steps",
                  "prompt_tokens", "bench_n", "parent_steps"):
            rules += [(getattr(self, k) < 0, f"--{k.replace('_', '-')} must be at least 0")]
        for name in self.eval_canvases.split(","):
            rules += [(name not in ("full", "eos", "law", "block", "pin"),
                       f"--eval-canvases knows full, eos, law, block, pin, not '{name}'")]
        for k in self.eval_k.split(","):
            rules += [(not k.isdigit() or k == "0", f"--eval-k is a list like 1,2,4, not '{k}'")]
        return bad + [sentence for wrong, sentence in rules if wrong]


PRESETS = dict(tiny={}, small=dict(n_layer=8, n_head=8, n_embd=512, seq_len=256, lr=2e-3),
               medium=dict(n_layer=12, n_head=12, n_embd=768, seq_len=512, lr=1e-3))
SHAPE = ("vocab_size", "seq_len", "n_layer", "n_head", "n_embd", "rows")  # fixed by a checkpoint
METHOD = ("pipeline", "shift", "head")  # and these: a checkpoint fixes them too
FAST = dict(order="maxprob", sampling_steps=80, temperature=0.5)  # sample and eval, see LOG.md
OTHER_NAMES = dict(  # of settings in a --config file
    context_length="seq_len", max_lr="lr", n_steps="steps", memmap_path="data", save_dir="out",
    accumulate_grad="grad_accum", val_check_interval="eval_every", resume_training="resume",
    n_samples="n", user_prompt="prompt", diffusion_steps="sampling_steps",
    denoising_strategy="order")
SET_HERE = dict(  # what such files say and what it is here
    padded_dataset=lambda v, c: dict(rows="docs" if v else "stream"),
    do_sample=lambda v, c: {} if v else dict(temperature=0.0),
    betas=lambda v, c: dict(beta1=float(v[0]), beta2=float(v[1])),
    warmup_pct=lambda v, c: dict(warmup=round(v * c.get("steps", c.get("n_steps", Config.steps)))),
    use_eos_head=lambda v, c: dict(head="hazard") if v else {},
    use_pad_head=lambda v, c: dict(head="hazard") if v else {},
    wandb=lambda v, c: dict(log="wandb") if v else {})
NOT_HERE = dict(
    eos_token_id="it comes from the tokenizer", pad_token_id="PAD is a row of its own",
    n_epochs="give steps", val_test_perc="data/prepare.py splits by hash",
    enable_checkpointing="every run keeps its checkpoint", project_name="give save_dir",
    run_name="give save_dir")


def fast(cfg):
    """cfg with FAST wherever it has the defaults: how samples are drawn unless told otherwise."""
    return dataclasses.replace(cfg, **{
        k: v for k, v in FAST.items() if getattr(cfg, k) == getattr(Config, k)})


def read_config(path):
    """A JSON file of settings, // and /* */ comments allowed -> (dict for Config, list of every
    problem: unknown names, wrong types). Its names are those of Config, or OTHER_NAMES."""
    try:
        text = Path(path).read_text("utf-8")
        text = re.sub(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', lambda m: m[1] or " ", text,
                      flags=re.S)
        text = re.sub(r'("(?:\\.|[^"\\])*")|,(?=\s*[}\]])', lambda m: m[1] or "", text)
        given = json.loads(text)
        assert isinstance(given, dict)
    except OSError as error:
        raise UserError(f"cannot read --config {path} ({error.strerror})") from None
    except (ValueError, AssertionError) as error:
        raise UserError(f"--config {path} is no JSON object ({common.last_line(error)})") from None
    kinds, values, bad = {f.name: f.type for f in dataclasses.fields(Config)}, {}, []
    for name, value in given.items():
        try:
            found = SET_HERE[name](value, given) if name in SET_HERE else {
                OTHER_NAMES.get(name, name): value}
        except (TypeError, ValueError, IndexError):
            bad.append(f"{name} is {value!r}, which cannot be read")
            continue
        for key, v in found.items():
            kind = kinds.get(key)
            if kind is float and type(v) is int:
                v = float(v)
            if kind is None:
                bad.append(f"'{name}' is no setting" + (
                    f" here: {NOT_HERE[name]}" if name in NOT_HERE else ""))
            elif get_args(kind) and v not in get_args(kind):
                bad.append(f"{name} is {v!r}, choose one of {', '.join(get_args(kind))}")
            elif not get_args(kind) and type(v) is not kind:
                bad.append(f"{name} is {v!r}, it must be a {kind.__name__}")
            else:
                values[key] = v
    return values, bad


# ----------------------------------------------------------------------------------------------
# 2. data
# ----------------------------------------------------------------------------------------------


@functools.lru_cache
def open_data(folder):
    """A prepared folder: .train .val .test = (ids memmap, offsets, log p or None), .tokenizer."""
    verify(folder)
    return SimpleNamespace(tokenizer=load_tokenizer(folder),
                           **{s: open_split(folder, s) for s in ("train", "val", "test")})


def fill_in(cfg, rank=0):
    """Prepare the data if needed and write what they fix (vocabulary, rows) into cfg."""
    cfg.data_dir = str(prepare(cfg.data, cfg.tokenizer, cfg.vocab_size, cfg.docs, quiet=rank > 0))
    tokenizer = open_data(cfg.data_dir).tokenizer
    cfg.vocab_size, cfg.eos, cfg.bos = tokenizer.vocab_size, tokenizer.eos, tokenizer.bos
    if cfg.rows == "auto":
        cfg.rows = "docs" if cfg.data == "tales" else "stream"
    ids = open_data(cfg.data_dir).train[0]
    if cfg.rows == "stream" and len(ids) <= cfg.seq_len:
        raise UserError(f"the training split has {len(ids)} tokens, fewer than --seq-len "
                        f"{cfg.seq_len}: use a smaller --seq-len or more text")
    return cfg


def take(split, cfg, index):
    """Rows `index` of a split: documents, EOS-filled and cut at seq_len, or windows.  # (B, T)"""
    ids, offsets, _ = getattr(open_data(cfg.data_dir), split)
    column = np.arange(cfg.seq_len)
    index = np.asarray(index)
    if cfg.rows == "stream":
        return torch.from_numpy(ids[index[:, None] + column].astype(np.int64))
    start, end = offsets[index], offsets[index + 1]
    where = start[:, None] + column
    rows = ids[np.minimum(where, len(ids) - 1)].astype(np.int64)
    return torch.from_numpy(np.where(where < end[:, None], rows, cfg.eos))


def get_batch(split, cfg, g):
    """The rows of one optimizer step, drawn at random: (grad_accum * batch_size, T) int64."""
    ids, offsets, _ = getattr(open_data(cfg.data_dir), split)
    many = len(offsets) - 1 if cfg.rows == "docs" else len(ids) - cfg.seq_len + 1
    return take(split, cfg, torch.randint(many, (cfg.grad_accum * cfg.batch_size,), generator=g))


def get_eval_rows(split, cfg, n):
    """The first n documents (or n evenly spaced windows) of a split and, where it is known, the
    true -log p of each document in nats: (n, T), (n,) or None."""
    ids, offsets, logp = getattr(open_data(cfg.data_dir), split)
    if cfg.rows == "stream":
        last = len(ids) - cfg.seq_len
        if last < 0:
            raise UserError(f"the {split} split has {len(ids)} tokens, fewer than --seq-len")
        return take(split, cfg, np.linspace(0, last, min(n, last + 1)).astype(int)), None
    n = min(n, len(offsets) - 1)
    whole = np.diff(offsets[:n + 1]).max() <= cfg.seq_len  # a cut document has no known floor
    floor = torch.from_numpy(-np.asarray(logp[:n])) if logp is not None and whole else None
    return take(split, cfg, np.arange(n)), floor


HUB = {"gpt2": "openai-community/gpt2", "diffugpt-s": "diffusionfamily/diffugpt-s",
       "diffugpt-m": "diffusionfamily/diffugpt-m",
       **{f"gpt2-{size}": f"openai-community/gpt2-{size}" for size in ("medium", "large", "xl")}}
MASK_IDS = {"diffugpt-s": 10541, "diffugpt-m": 50257}  # their masks, in the paper's repository


def load_pretrained(name):
    """Weights of a GPT-2 from a folder or the hub, of GPT-2, DiffuGPT or ours: ({tensor: value}
    under the names of GPT2LMHeadModel, the settings of its config.json). UserError if it is none.
    Conv1D keeps (in, out) like the file, so nothing is transposed, and nothing forgotten."""
    folder = Path(name)
    if not folder.is_dir():
        if name not in HUB and "/" not in name:
            raise UserError(f"--init-from '{name}' is no folder and no known checkpoint: choose "
                            f"scratch, parent, {', '.join(HUB)}, or a folder")
        try:
            from huggingface_hub import snapshot_download
            folder = Path(snapshot_download(HUB.get(name, name), allow_patterns=[
                "config.json", "model.safetensors"]))
        except Exception as error:
            raise UserError(f"cannot fetch {HUB.get(name, name)} ({common.last_line(error)}): "
                            "fetch its config.json and model.safetensors where there is a network "
                            "and name their folder") from None
    try:
        card = json.loads((folder / "config.json").read_text())
        if not isinstance(card, dict):
            raise ValueError("config.json is no JSON object")
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"no GPT-2 in {folder} ({common.last_line(error)}): it needs config.json "
                        "and model.safetensors, as save_pretrained writes them") from None
    if (card.get("activation_function", "gelu_new"), card.get("layer_norm_epsilon", 1e-5)) != (
            "gelu_new", 1e-5):
        raise UserError(f"{folder} is not a GPT-2: its activation_function or layer_norm_epsilon "
                        "is another")
    weights = {}
    for key, value in tensors.items():
        for prefix in ("transformer.", "denoise_model."):
            key = key.removeprefix(prefix)
        if key == "lm_head.weight" or key.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the tied copy; buffers (with the dot: c_attn.bias is a weight)
        if key == "embed_tokens.weight":
            key = "wte.weight"
        weights[key if key.startswith("length_") else f"transformer.{key}"] = value.float()
    head, table = tensors.get("lm_head.weight"), weights.get("transformer.wte.weight")
    if head is not None and table is not None and not torch.equal(head.float(), table):
        raise UserError(f"{folder} has a head of its own: only tied weights can be loaded")
    return weights, card


def start(cfg, out):
    """The weights that a new run begins from, for Model, or None (scratch, --resume). Writes the
    checkpoint's n_layer, n_head, n_embd into cfg. Rows of the embedding: V tokens, PAD, M."""
    if cfg.init_from == "scratch" or cfg.resume:
        return None
    name = cfg.init_from if cfg.init_from != "parent" else cfg.parent or f"{out}_parent"
    if cfg.init_from == "parent" and not (Path(name) / "model.safetensors").exists():
        raise UserError(f"no parent in {name}: `python {NAME}.py` trains it first, or give "
                        "--init-from scratch")
    weights, card = load_pretrained(name)
    table, places = (weights.get(f"transformer.{k}.weight") for k in ("wte", "wpe"))
    if table is None or places is None:
        raise UserError(f"{name} is not a GPT-2: it has no token or position embeddings")
    if "run" in card:  # ours
        common.check_tokenizer(name, open_data(cfg.data_dir).tokenizer)
    V, new = cfg.vocab_size, len(table)
    if new < V or new > V + 2:
        raise UserError(f"{name} has {new} tokens, the data's tokenizer {V}: choose the "
                        "--tokenizer it was trained with (gpt2 for GPT-2)")
    if len(places) <= cfg.seq_len:
        raise UserError(f"{name} has {len(places)} positions, one for BOS: --seq-len must be at "
                        f"most {len(places) - 1}")
    width = table.shape[1]
    shape = dict(n_embd=width, n_head=card.get("n_head", width // 64), n_layer=len(
        {key.split(".")[2] for key in weights if key.startswith("transformer.h.")}))
    if card.get("n_layer", shape["n_layer"]) != shape["n_layer"]:
        raise UserError(f"{name} has {shape['n_layer']} blocks, its config.json says "
                        f"{card['n_layer']}: the file is not whole")
    for key, value in shape.items():
        if getattr(cfg, key) not in (value, getattr(Config, key)):
            raise UserError(f"{name} has {key} {value}: leave --{key.replace('_', '-')} out")
        setattr(cfg, key, value)
    ids = dict(pad=card.get("pad_token_id"), mask=card.get("mask_token_id", MASK_IDS.get(name)))
    if cfg.mask_id >= 0:
        ids["mask"] = cfg.mask_id
    if ids["mask"] is not None and not 0 <= ids["mask"] < new:
        raise UserError(f"--mask-id {ids['mask']} is not a token of {name}: choose 0..{new - 1}")
    if ids["pad"] is not None and not V <= ids["pad"] < new:
        ids["pad"] = None  # a token that others use for padding is not a PAD that ends documents
    rows = [table[:V]] + [table[i, None] if i is not None else table[:V].mean(0, keepdim=True)
                          for i in (ids["pad"], ids["mask"])]
    weights["transformer.wte.weight"] = torch.cat(rows)  # (V + 2, C)
    weights["transformer.wpe.weight"] = places[:cfg.seq_len + 1].clone()
    with torch.device("meta"):
        wanted = {k: v.shape for k, v in Model(cfg).state_dict().items()}
    weights = {k: v for k, v in weights.items() if k in wanted or not k.startswith("length_")}
    wrong = [k for k in wanted.keys() | weights.keys() if not k.startswith("length_") and (
        k not in wanted or k not in weights or wanted[k] != weights[k].shape)]
    if wrong:
        raise UserError(f"{name} does not fit a GPT-2 of {cfg.n_layer} blocks and width {width}: "
                        f"missing, unknown or of another shape are {', '.join(sorted(wrong)[:3])}")
    return weights


# ----------------------------------------------------------------------------------------------
# 3. model
# ----------------------------------------------------------------------------------------------


def attend(q, k, v, seen=None):
    """Softmax attention: (B, H, Tq, D), (B, H, Tk, D) twice -> (B, H, Tq, D). The boolean `seen`
    broadcasts to (B, H, Tq, Tk) and says who looks where; None: everywhere. Written out on CPUs,
    where PyTorch's fused kernel is 4x slower in bfloat16 (backward pass, 2.13)."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5  # (B, H, Tq, Tk)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


class Conv1D(nn.Module):
    """GPT-2's linear layer: x W + b with W (in, out), transposed with respect to nn.Linear."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(s)) for s in ((n_in, n_out), (n_out,)))

    def forward(self, x):
        return F.linear(x, self.weight.t(), self.bias)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.c_attn = Conv1D(cfg.n_embd, 3 * cfg.n_embd)
        self.c_proj = Conv1D(cfg.n_embd, cfg.n_embd)

    def forward(self, x, seen, past=None):
        """past: None, or this layer's [k, v], which is extended in place by the new positions."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if past is not None:
            past[:] = k, v = [torch.cat(pair, 2) for pair in zip(past, (k, v))] if past else [k, v]
        y = attend(q, k, v, seen)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.c_fc = Conv1D(cfg.n_embd, 4 * cfg.n_embd)
        self.c_proj = Conv1D(4 * cfg.n_embd, cfg.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(cfg.n_embd), Attention(cfg)
        self.ln_2, self.mlp = nn.LayerNorm(cfg.n_embd), MLP(cfg)

    def forward(self, x, seen, past=None):
        x = x + self.attn(self.ln_1(x), seen, past)
        return x + self.mlp(self.ln_2(x))


class Model(nn.Module):
    """GPT-2: ids (B, T) in 0..V + 1 -> logits (B, T, outputs), or (n, outputs) for a boolean
    `where` (B, T) of n positions. BOS is put before and the outputs are shifted here (E2) and
    nowhere else, so that column i is always about token i. Outputs: V tokens and, in documents of
    the diffusion pipeline, PAD; never M. `weights`: what start() found, or None."""

    def __init__(self, cfg, weights=None):
        super().__init__()
        V, self.bos, self.shift = cfg.vocab_size, cfg.bos, cfg.shift or cfg.pipeline == "arm"
        self.outputs = V + (cfg.rows == "docs" and cfg.pipeline == "diffusion")
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(V + 2, cfg.n_embd), wpe=nn.Embedding(cfg.seq_len + 1, cfg.n_embd),
            h=nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer)), ln_f=nn.LayerNorm(cfg.n_embd)))
        if cfg.head != "marginal":
            self.length_head = nn.Linear(cfg.n_embd, 1)
            self.length_bias = nn.Parameter(torch.empty(1))  # pointer: longer than the canvas
        init_weights(self)
        if weights:
            self.load_state_dict({**self.state_dict(), **weights})  # a length head may be new
        # config.json for other programs that read GPT-2s
        self.card = dict(
            model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=V + 2,
            n_positions=cfg.seq_len + 1, n_embd=cfg.n_embd, n_layer=cfg.n_layer,
            n_head=cfg.n_head, activation_function="gelu_new", layer_norm_epsilon=1e-5,
            tie_word_embeddings=True, bos_token_id=cfg.bos, eos_token_id=cfg.eos)
        if cfg.pipeline == "diffusion":
            self.card |= dict(pad_token_id=V, mask_token_id=V + 1)

    @property
    def blocks(self):
        return self.transformer.h

    def trunk(self, idx, seen=None, past=None):
        """Hidden states of [BOS, idx], (B, 1 + T, C). `seen`: see attend, about 1 + T positions.
        `past`: None, or a list of n_layer lists for generation (empty at first); a continuation
        has no BOS."""
        begin = past[0][0].shape[2] if past and past[0] else 0
        if not begin:
            idx = torch.cat((idx.new_full((len(idx), 1), self.bos), idx), 1)
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[begin:begin + idx.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x, seen, past[i] if past is not None else None)
        return self.transformer.ln_f(x)

    def unembed(self, h):
        """Hidden states (..., C) -> logits (..., outputs), by the tied embedding."""
        return F.linear(h, self.transformer.wte.weight[:self.outputs])

    def aligned(self, idx, seen=None):
        """Hidden states (B, T, C); the i-th is what predicts token i."""
        h = self.trunk(idx, seen)
        return h[:, :-1] if self.shift else h[:, 1:]  # (E2)

    def forward(self, idx, where=None, seen=None):
        h = self.aligned(idx, seen)
        return self.unembed(h if where is None else h[where])


def init_weights(model):
    """Normal(0, 0.02); residual outputs, head and biases zero, so the model starts uniform."""
    for name, p in model.named_parameters():
        if name.endswith(("proj.weight", "head.weight", "bias")):
            nn.init.zeros_(p)
        elif p.dim() > 1:
            nn.init.normal_(p, std=0.02)


# ----------------------------------------------------------------------------------------------
# 4. corrupt and loss
# ----------------------------------------------------------------------------------------------


def canvas_of(x0, cfg):
    """EOS-filled rows (B, T) -> canvases: what follows the first EOS of a document becomes PAD."""
    if cfg.rows != "docs":
        return x0
    is_eos = x0 == cfg.eos
    return x0.masked_fill(is_eos.cumsum(1) - is_eos.long() > 0, cfg.vocab_size)


def sees(T, ratio, g=None):
    """Who looks at whom, (T, T) bool, or None for everybody: a position at itself and those before
    it, and at each later one with probability `ratio`; one draw for all rows, heads and layers
    (Gong et al. 2024, section 3.2). 0 is the causal mask of the parent."""
    if ratio >= 1:
        return None
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    return causal | (torch.rand(T, T, generator=g) < ratio) if ratio > 0 else causal  # (E8)


def corrupt(x, cfg, g):
    """Mask canvases x (B, T): xt, is_mask and maskable (whether a position may be masked), (B, T),
    and the level t (B,) = masked / maskable. Levels are on a comb over the batch, subsets of a size
    all alike. Kinds of rows: any; cond and tail with a prompt; tail rows hide all the rest, pin
    rows all but the EOS. A prompt's length must not tell where its row ends: it is drawn from 1 to
    T / 2 whatever the row, and a row that is shorter than its prompt is left out."""
    (B, T), V = x.shape, cfg.vocab_size
    # 1. a level for each row, a kind, a prompt
    t = 1 - (torch.arange(B) / B + torch.rand(1, generator=g)) % 1  # in (0, 1]
    kind, u = torch.rand(2, B, 1, generator=g)
    pin, tail = kind < cfg.p_pin, kind < cfg.p_pin + cfg.p_tail
    given = kind < cfg.p_pin + cfg.p_tail + cfg.p_cond
    is_end = (x == V).cpu() | (x == cfg.eos).cpu() & (cfg.rows == "docs")
    length = (is_end.cumsum(1) == 0).sum(1, keepdim=True)  # T if the document was cut
    m = torch.where(given, (u * (T // 2)).ceil().long(), 0)  # (B, 1)
    maskable = (torch.arange(T) >= m) & (m <= length) & ~(pin & (x == cfg.eos).cpu())
    # 2. unless their share is natural, most PADs are shown: a row keeps n_pad s.t. s is masked
    if cfg.pad_masked_perc >= 0 and cfg.rows == "docs":
        is_pad = maskable & (x == V).cpu()
        n_pad, n_text = is_pad.sum(1, keepdim=True), (maskable & ~is_pad).sum(1, keepdim=True)
        keep = cfg.pad_masked_perc / (1 - cfg.pad_masked_perc) * n_text / n_pad.clamp(min=1)
        maskable &= ~is_pad | (torch.rand(B, T, generator=g) < keep)
    # 3. mask exactly n positions of each row
    N = maskable.sum(1)
    n = torch.where(tail[:, 0], N, (t * N).ceil().long())
    score = torch.rand(B, T, generator=g).masked_fill(~maskable, 2.0)
    is_mask = score.argsort(1).argsort(1) < n[:, None]
    level = n / N.clamp(min=1)
    is_mask, maskable = is_mask.to(x.device), maskable.to(x.device)
    return x.masked_fill(is_mask, V + 1), is_mask, maskable, level


# The arm pipeline corrupts nothing: its inputs are the clean tokens, shifted by one.


def charged(x0, cfg):
    """Which positions cost something: up to and including the first EOS of a document row (the
    tail is certain), every position of a window.  # (B, T) bool"""
    if cfg.rows != "docs":
        return torch.ones_like(x0, dtype=torch.bool)
    is_eos = x0 == cfg.eos
    return is_eos.cumsum(1) - is_eos.long() == 0


def token_nll(model, x0, cfg):
    """The parent's -log p(x_i | x_<i) at the charged positions, zero elsewhere: (B, T), exact."""
    where, seen = charged(x0, cfg), sees(x0.shape[1] + 1, 0).to(x0.device)
    nll = torch.zeros(x0.shape, device=x0.device)
    nll[where] = F.cross_entropy(model(x0, where, seen).float(), x0[where], reduction="none")
    return nll


def law(hazard, stay, m):
    """log P(L = i) for i = 0 .. T - 1, and of "longer" in column T: (B, T + 1), from the logs of
    P(L = i | L >= i) and its complement, both (B, T); a prompt of m (B,) tokens is not the end."""
    before = torch.arange(hazard.shape[1], device=hazard.device) < m[:, None]
    hazard, stay = hazard.masked_fill(before, -torch.inf), stay.masked_fill(before, 0.0)
    survive = F.pad(stay.cumsum(1), (1, 0))  # log P(L >= i)
    return survive + F.pad(hazard, (0, 1))  # (E4)


def law_of_head(model, h, m, cfg):
    """The law of L that the length head reads from aligned hidden states h (B, T, C). hazard: how
    likely a document that has come so far ends here; pointer: a softmax over the positions."""
    score = model.length_head(h).float()[..., 0]  # (B, T)
    if cfg.head == "hazard":
        return law(F.logsigmoid(score), F.logsigmoid(-score), m)
    before = torch.arange(score.shape[1], device=score.device) < m[:, None]
    longer = model.length_bias.float().expand(len(score), 1)
    return torch.cat((score.masked_fill(before, -torch.inf), longer), 1).log_softmax(1)


@torch.no_grad()
def length_law(model, x, m, cfg):
    """log P(L) after prompts of m (B,) tokens, in one call: x (B, T), of which only the first m of
    each row are used -> (B, T + 1), column T = longer than the canvas."""
    T = x.shape[1]
    hidden = torch.arange(T, device=x.device) >= m[:, None]
    h = model.aligned(x.masked_fill(hidden, cfg.vocab_size + 1))
    if cfg.head != "marginal":
        return law_of_head(model, h, m, cfg)
    logits = model.unembed(h).float()
    # among what is not PAD, EOS has the probability p(EOS) / (1 - p(PAD))
    hazard = logits[..., :cfg.vocab_size].log_softmax(2)[..., cfg.eos]  # (E3)
    stay = torch.log1p(-hazard.exp().clamp(max=1 - 1e-7))
    return law(hazard, stay, m)


def lengths(x, cfg):
    """Position of the EOS of canvases x (B, T), T where there is none.  # (B,)"""
    return ((x == cfg.eos).cumsum(1) == 0).sum(1)


def loss_fn(model, x0, cfg, g, rows=slice(None)):
    """Training loss of the batch x0 (B, T), a scalar to differentiate, and info. The noise is drawn
    for the whole batch; then only `rows` of it are worked on, weighted so that the mean over equal
    shares is the batch's loss. With crop and all p_ zero and natural PADs it is the NELBO per
    position. Nats of text, EOS and PAD are in info: a mean of all three hides each."""
    if cfg.pipeline == "arm":
        n = charged(x0, cfg).sum()
        loss = token_nll(model, x0[rows], cfg).sum() / n * (len(x0) / len(x0[rows]))
        return loss, dict(loss=loss.detach())
    (B, T), V = x0.shape, cfg.vocab_size
    # 1. a canvas, sometimes cut where chance will have it
    x = canvas_of(x0, cfg)
    cut, size = torch.rand(2, generator=g)
    if cut < cfg.crop:
        x = x[:, :T // 3 + int(size * (T - T // 3)) + 1]  # (E6)
    # 2. corrupt
    xt, is_mask, maskable, t = corrupt(x, cfg, g)
    weight = torch.where(x == V, cfg.pad_weight, 1.0)  # (B, T)
    total = (weight * maskable).sum()
    seen = sees(x.shape[1] + 1, cfg.attn_ratio, g)
    # 3. predict, at the masks only
    x, xt, is_mask, weight, t = (part[rows] for part in (x, xt, is_mask, weight, t))
    h = model.aligned(xt, None if seen is None else seen.to(x.device))
    if cfg.freeze:
        h = h.detach()
    ce = torch.zeros(x.shape, device=x.device)
    ce[is_mask] = F.cross_entropy(model.unembed(h[is_mask]).float(), x[is_mask], reduction="none")
    # 4. weigh by 1 / t
    part = weight * ce / t.clamp(min=1e-9).to(x.device)[:, None]
    loss = part.sum() / total.clamp(min=1e-9)  # (E1)
    # 5. rows that hide everything after their prompt teach the length head
    if cfg.head != "marginal":
        m = (~is_mask).cumprod(1).sum(1)
        L = lengths(x, cfg)
        whole = (m + is_mask.sum(1) == x.shape[1]) & (m <= L)
        told = law_of_head(model, h[whole], m[whole], cfg).gather(1, L[whole, None])
        loss = (0.0 if cfg.freeze else loss) - told.sum() / B
    end = (x == cfg.eos) & (cfg.rows == "docs")
    info = {name: part[which].sum().item() / B for name, which in dict(
        text=~end & (x != V), eos=end, pad=x == V).items()}
    return loss * (B / len(x)), info


@torch.no_grad()
def nelbo(model, x0, cfg, g, K=8, frozen=None):
    """Upper bound on -log p(x0) in nats per row, (B,), unbiased, and info: `parts` (B, 3), for
    text, EOS and PAD. K forwards a row with n masks each, n on a comb over 1..T with one random
    offset per row. The boolean `frozen` (B, T) names tokens that are given: the bound is then on
    -log p(others | given). The arm pipeline's likelihood is exact."""
    if cfg.pipeline == "arm":
        nats = [token_nll(model, part, cfg).cpu().double() for part in x0.split(64)]
        return torch.cat(nats).sum(1), dict(forwards=1)
    x, (B, T), V = canvas_of(x0, cfg), x0.shape, cfg.vocab_size
    frozen = torch.zeros_like(x, dtype=torch.bool) if frozen is None else frozen
    N, u = (~frozen).sum(1).cpu(), torch.rand(B, generator=g)
    end = (x == cfg.eos) & (cfg.rows == "docs")
    kinds = torch.stack((~end & (x != V), end, x == V), 2).double().cpu()  # (B, T, 3)
    parts = torch.zeros(B, 3, dtype=torch.float64)
    for k in range(K):
        n = torch.minimum(1 + ((k + u) / K * N).floor().long(), N)
        score = torch.rand(B, T, generator=g).to(x.device).masked_fill(frozen, 2.0)
        is_mask = score.argsort(1).argsort(1) < n.to(x.device)[:, None]
        xt, ce = x.masked_fill(is_mask, V + 1), torch.zeros(B, T, device=x.device)
        for i in torch.arange(B).split(64):
            where = is_mask[i]
            ce[i] = torch.zeros(where.shape, device=x.device).masked_scatter(
                where, F.cross_entropy(model(xt[i], where).float(), x[i][where],
                                       reduction="none"))
        share = (N / n.clamp(min=1) / K)[:, None, None]
        parts += (share * ce.cpu().double()[..., None] * kinds).sum(1)  # (E1)
    return parts.sum(1), dict(forwards=K, parts=parts)


# ----------------------------------------------------------------------------------------------
# 5. sample
# ----------------------------------------------------------------------------------------------


def filter_logits(logits, cfg):
    """Temperature, then top-k, then top-p: logits (n, V) -> float logits with -inf at what is cut.
    Top-k keeps ties; top-p keeps the smallest set that holds top_p, at least one token."""
    logits = logits.float()
    if cfg.temperature == 0:
        return torch.full_like(logits, -torch.inf).scatter(1, logits.argmax(1, True), 0.0)
    logits = logits / cfg.temperature
    if 0 < cfg.top_k < logits.shape[1]:
        least = logits.topk(cfg.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if cfg.top_p < 1:
        value, index = logits.sort(descending=True)
        p = value.softmax(1)
        cut = p.cumsum(1) - p >= cfg.top_p  # the mass before a token already suffices
        cut[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(1, index, cut), -torch.inf)
    return logits


def categorical(logits, g):
    """One draw per row of logits (n, V) -> (n,), by inverting the cumulative distribution in
    float64: float32 noise would cut off the tail (Zheng et al. 2024, section 5)."""
    p = (logits.cpu() if logits.device.type == "mps" else logits).double().softmax(1)
    u = torch.rand(len(p), 1, generator=g, dtype=torch.float64).to(p.device)
    cumulative = p.cumsum(1)
    u = u * cumulative[:, -1:]
    return (cumulative <= u).sum(1).clamp(max=p.shape[1] - 1).to(logits.device)


CERTAINTY = {  # order: how certain a position is, from its log p (n, V); the most certain go first
    "maxprob": lambda logp: logp.amax(1),
    "margin": lambda logp: -logp.topk(2).values.exp().diff(dim=1)[:, 0],
    "entropy": lambda logp: (logp.exp() * logp).nan_to_num(0).sum(1),  # 0 log 0 = 0
}


def best(score, among, count, g):
    """The count (n,) positions of highest score among the allowed, chance breaks ties: (n, T)."""
    mixed = torch.rand(score.shape, generator=g).to(score.device).argsort(1)
    score = score.masked_fill(~among, -torch.inf).gather(1, mixed)
    rank = mixed.gather(1, score.argsort(dim=1, descending=True, stable=True)).argsort(1)
    return among & (rank < count[:, None])


def penalize(logits, seen, cfg):
    """Repetition penalty (Keskar et al. 2019, section 4.1): logits (n, V) of tokens seen (n, V) in
    the row are divided by it, or multiplied if negative. EOS and PAD have to come up once."""
    seen = seen.clone()
    seen[:, cfg.eos] = False
    seen[:, cfg.vocab_size:] = False
    less = torch.where(logits > 0, logits / cfg.repetition_penalty,
                       logits * cfg.repetition_penalty)
    return torch.where(seen, less, logits)


def predict(model, x, where, end):
    """Logits at the positions `where` of canvases x (n, T), of which row r has end[r] positions:
    (count, outputs), and how many tokens went through the network. Rows of similar length go
    together, and no further than the longest of them: this is where a short canvas saves."""
    number = where.flatten().cumsum(0).view(where.shape) - 1  # which of the count
    logits, tokens = None, 0
    for rows in end.argsort().chunk(4 if len(end) > 1 and end.min() < end.max() else 1):
        width = int(end[rows].max())
        at = where[rows, :width]
        live = torch.arange(-1, width, device=x.device) < end[rows, None]  # with BOS
        seen = None if live.all() else live[:, None, None]
        said = model(x[rows, :width], at, seen).float()
        if logits is None:
            logits = said.new_empty(int(where.sum()), said.shape[1])
        logits[number[rows, :width][at]] = said
        tokens += len(rows) * (width + 1)
    return logits, tokens


def draw(logits, where, xt, tied, cfg, g):
    """A token for every position `where` of the rows xt (n, T), from logits (count, outputs). Rows
    whose end is known, `tied` (n,), have no EOS or PAD before it."""
    owner, V = where.nonzero()[:, 0], cfg.vocab_size
    if logits.shape[1] > V:
        logits = logits.clone()
        logits[tied[owner], cfg.eos] = logits[tied[owner], V] = -torch.inf
    if cfg.repetition_penalty != 1:
        used = torch.zeros(len(xt), V + 2, device=xt.device).scatter(1, xt, 1.0).bool()
        logits = penalize(logits, used[owner, :logits.shape[1]], cfg)
    return categorical(filter_logits(logits, cfg), g)


@torch.no_grad()
def sample_ar(model, cfg, n, g, prompt=None, trace=None):
    """The parent's samples, left to right with the keys and values of the past: see sample."""
    device = next(model.parameters()).device
    x = torch.full((n, cfg.seq_len), cfg.eos, device=device)
    P = 0 if prompt is None else prompt.shape[-1]
    if P >= cfg.seq_len:
        raise ValueError(f"the prompt has {P} tokens, a row has room for {cfg.seq_len - 1}")
    room = min(cfg.seq_len, P + (cfg.max_new_tokens or cfg.seq_len))
    if P:
        x[:, :P] = prompt
    past, ended = [[] for _ in model.blocks], torch.zeros(n, dtype=torch.bool, device=device)
    new, i = x[:, :P], P - 1
    for i in range(P, room):
        seen = sees(P + 1, 0).to(device) if i == P else None
        logits = model.unembed(model.trunk(new, seen, past)[:, -1])[:, :cfg.vocab_size]
        if cfg.repetition_penalty != 1:
            used = torch.zeros(logits.shape, device=device).scatter(1, x[:, :i], 1.0).bool()
            logits = penalize(logits, used, cfg)
        drawn = categorical(filter_logits(logits, cfg), g)
        x[:, i] = drawn.masked_fill(ended, cfg.eos)
        ended |= (x[:, i] == cfg.eos) & (cfg.rows == "docs")
        new = x[:, i:i + 1]
        if trace is not None:
            shown = x.clone()
            shown[~ended, i + 1:] = -1
            trace.append((i + 1, shown.cpu()))
        if ended.all():
            break
    return x if cfg.rows == "docs" else x[:, :room], dict(nfe=i + 1 - P, forwarded=n * (i + 1))


@torch.no_grad()
def sample(model, cfg, n, g, prompt=None, trace=None, start=None):
    """n rows of T = seq_len ids, (n, T), EOS-filled, and info: nfe = network calls, forwarded =
    tokens that went through the network (BOS too), contradictions = share of rows that wrote text
    behind their end. `prompt` (P,) or (n, P) ids begin every row; or `start` (n, T') holds the id V
    where tokens are wanted, and all else is kept. `trace`, a list, receives (call, ids) pairs.

    Canvases, all of one law (E6): full computes the whole row to the end; eos stops behind the
    first EOS or PAD; law begins with the length that holds L with probability q and grows; block
    with one block and grows; pin draws L first and writes its EOS.
    Orders choose positions by the distribution (random, l2r, maxprob, margin, entropy); "sampled"
    (Gong et al., Nie et al. 2025) looks at the drawn tokens first and so prefers EOS: a wrong law
    even of a perfect network."""
    if cfg.pipeline == "arm":
        return sample_ar(model, cfg, n, g, prompt, trace)
    device, V, M = next(model.parameters()).device, cfg.vocab_size, cfg.vocab_size + 1
    docs, calls, tokens = cfg.rows == "docs", 0, 0
    # 1. what is given stays; from position m to `limit` tokens are wanted
    if start is None:
        start = torch.full((n, cfg.seq_len), V, device=device)
        if prompt is not None and prompt.numel():
            if prompt.shape[-1] >= cfg.seq_len:
                raise ValueError(f"the prompt has {prompt.shape[-1]} tokens, a row has room for "
                                 f"{cfg.seq_len - 1}")
            start[:, :prompt.shape[-1]] = prompt
    T, column = start.shape[1], torch.arange(start.shape[1], device=device)
    is_mask = start == V
    m = (~is_mask).cumprod(1).sum(1)
    x = canvas_of(start.masked_fill(is_mask, M), cfg)
    last = ((start != V) * (column + 1)).amax(1)  # behind what is given
    limit = torch.maximum((m + (cfg.max_new_tokens or T)).clamp(max=T), last)
    tied = docs & (x == cfg.eos).any(1)  # the end is given
    late = torch.zeros_like(tied)  # the end is known to lie behind the canvas
    # 2. the first canvas: `end` positions of each row
    end = limit.clone()
    if docs and cfg.canvas in ("law", "pin") and not tied.any():
        p = length_law(model, x, last, cfg).double().exp()  # (n, T + 1)
        calls, tokens = 1, n * (T + 1)
        if cfg.canvas == "law":
            end = torch.minimum((p.cumsum(1) < cfg.q).sum(1) + 1, limit)
        else:
            L = categorical(p.log(), g)
            late, tied = L >= limit, torch.ones_like(tied)
            x[~late, L[~late]] = cfg.eos
            end = torch.minimum(L + 1, limit)
    elif cfg.canvas == "block":
        end = torch.where(tied, limit, torch.minimum(m + cfg.block, limit))
    if cfg.canvas != "full":
        end = torch.where(tied, torch.minimum(lengths(x, cfg) + 1, end), torch.maximum(end, last))
    inside = column < end[:, None]
    is_mask &= inside & (x == M)
    x = x.masked_fill(~inside, V)
    k = -(-int((limit - m).max()) // cfg.sampling_steps) if cfg.sampling_steps else 1
    wrong = torch.zeros(len(x), dtype=torch.bool, device=device)
    step = 0
    while True:
        if trace is not None:
            shown = torch.where(x == M, -1, x.masked_fill(x == V, cfg.eos))
            trace.append((calls, shown.cpu()))
        # 3. a canvas that is written without an end grows
        stop = ((x == cfg.eos) | (x == V)) & (column < end[:, None]) & docs  # EOS or PAD
        grow = ~is_mask.any(1) & ~stop.any(1) & (end < limit)
        longer = torch.where(grow, torch.minimum(end + cfg.block, limit), end)
        fresh = (column >= end[:, None]) & (column < longer[:, None])
        x, is_mask, end = x.masked_fill(fresh, M), is_mask | fresh, longer
        rows = is_mask.any(1).nonzero()[:, 0]
        if not len(rows):
            break
        # 4. choose positions: blindly, or by what the network says of all
        xt, todo, size = x[rows], is_mask[rows], end[rows]
        count, score = torch.full_like(rows, k), torch.zeros(todo.shape, device=device)
        blind = cfg.order in ("random", "l2r")
        if cfg.order == "l2r":
            score = -column.expand_as(todo).float()
        if not blind:
            logits, passed = predict(model, xt, todo, size)
            logp = logits.log_softmax(1)
            if cfg.order == "sampled":
                drawn = draw(logits, todo, xt, tied[rows], cfg, g)
                score[todo] = logp.gather(1, drawn[:, None])[:, 0]
            else:
                score[todo] = CERTAINTY[cfg.order](logp)
        # text at its last position says that a document is longer than the canvas: it goes first
        score = score.masked_fill(late[rows, None] & (column == size[:, None] - 1), torch.inf)
        if cfg.quota == "ancestral":
            chance = torch.rand(todo.shape, generator=g) * max(1, cfg.sampling_steps - step) < 1
            count = (chance.to(device) & todo).sum(1)
        chosen = best(score, todo, count, g)
        # 5. draw their tokens
        if blind:
            logits, passed = predict(model, xt, chosen, size)
        else:
            logits = logits[chosen[todo]]
        if cfg.order == "sampled":
            drawn = drawn[chosen[todo]]
        else:
            drawn = draw(logits, chosen, xt, tied[rows], cfg, g)
        xt[chosen] = drawn
        x[rows] = xt
        is_mask[rows] = todo & ~chosen
        calls, tokens, step = calls + 1, tokens + passed, step + 1
        # 6. shrink
        stop = ((x == cfg.eos) | (x == V)) & (column < end[:, None]) & docs
        first = (stop.cumsum(1) == 0).sum(1)  # T if there is none
        text = (x != M) & (x != cfg.eos) & (x != V)
        wrong |= (text & (column > first[:, None])).any(1)
        if cfg.canvas != "full":
            end = torch.minimum(end, first + 1)
            over = column >= end[:, None]
            x, is_mask = x.masked_fill(over, V), is_mask & ~over  # (E7)
    # 7. a document ends at its first EOS or PAD
    if docs:
        x = x.masked_fill(((x == cfg.eos) | (x == V)).cumsum(1) > 0, cfg.eos)
    x = x if docs else x[:, :int(limit.max())]
    return x, dict(nfe=calls, forwarded=tokens, contradictions=wrong.float().mean().item())


# ----------------------------------------------------------------------------------------------
# 6. train
# ----------------------------------------------------------------------------------------------


def get_lr(step, cfg):
    """Learning rate of a step: linear warm-up from lr / div_factor, then a cosine to that over
    final_div_factor."""
    first = cfg.lr / cfg.div_factor
    last = first / cfg.final_div_factor
    if step < cfg.warmup:
        return first + (cfg.lr - first) * (step + 1) / cfg.warmup
    done = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return last + (cfg.lr - last) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizers(model, cfg):
    """Muon for the matrices inside the blocks, AdamW for the rest. A group's rate is `scale` times
    the scheduled one: gains and biases want three times as much, the embedding, which is the head
    too, no more than the rest (see LOG.md). Or, for large checkpoints, AdamW with one rate for
    all, as in Gong et al. 2024 (appendix B)."""
    if cfg.optimizer == "adamw":
        return [torch.optim.AdamW([dict(params=list(model.parameters()), scale=1.0)], cfg.lr,
                                  betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay)]
    hidden = [p for p in model.blocks.parameters() if p.dim() == 2]
    embed = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    apart = set(map(id, [*hidden, *embed]))
    rest = [p for p in model.parameters() if id(p) not in apart]
    return [torch.optim.Muon([dict(params=hidden, scale=1.0)], cfg.lr, weight_decay=0.05,
                             adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([dict(params=embed, scale=1.0), dict(params=rest, scale=3.0)],
                              cfg.lr, betas=(0.9, 0.98), weight_decay=0.0)]


def at_step(cfg, step):
    """The Config of an optimizer step: every ramp depends on the step and on nothing else, so a
    resumed run goes on where it was, and evaluation never sees one."""
    if cfg.pipeline == "arm":
        return cfg
    rise = {"attn_ratio": cfg.attn_annealing_steps, "p_tail": cfg.tail_annealing_steps,
            "pad_masked_perc": cfg.pad_annealing_steps}
    return dataclasses.replace(cfg, **{
        name: getattr(cfg, name) * min(1.0, (step + 1) / steps)
        for name, steps in rise.items() if steps and getattr(cfg, name) > 0})


@torch.no_grad()
def evaluate(model, cfg, split="val", n=128):
    """Likelihood of the first n rows of a split: nats per document and per token, bits per byte,
    and the paired gap to the true entropy where that is known. Plain numbers for the log."""
    x0, floor = get_eval_rows(split, cfg, n)
    device = next(model.parameters()).device
    nats, info = nelbo(model, x0.to(device), cfg, torch.Generator().manual_seed(0))
    nats, tokens = nats.cpu().double(), common.tokens_of(x0, cfg)
    size = sum(len(open_data(cfg.data_dir).tokenizer.decode(t).encode()) for t in tokens)
    count = sum(map(len, tokens)) + (len(x0) if cfg.rows == "docs" else 0)  # EOS is a token too
    row = dict(bound="exact" if cfg.pipeline == "arm" else BOUND, rows=len(x0),
               nats_per_token=nats.sum().item() / count,
               nats_per_token_se=common.se(nats) * len(x0) / count,
               bits_per_byte=nats.sum().item() / math.log(2) / max(1, size))
    if cfg.rows == "docs":
        row |= dict(nats_per_doc=nats.mean().item(), se=common.se(nats))
        if "parts" in info:  # their sum
            row |= dict(zip(("text", "eos", "pad"), info["parts"].mean(0).tolist()))
    if floor is not None:
        row |= dict(floor_per_doc=floor.mean().item(), gap=(nats - floor).mean().item(),
                    gap_se=common.se(nats - floor))
    return row


def unigram_nll(cfg):
    """Nats per position of a unigram model (add-one counts of 4000 training rows) on validation
    rows: what a model that ignores all context pays."""
    many = dataclasses.replace(cfg, batch_size=4000, grad_accum=1)
    counts = get_batch("train", many, torch.Generator().manual_seed(0)).flatten().bincount(
        minlength=cfg.vocab_size) + 1.0
    return -(counts / counts.sum()).log()[get_eval_rows("val", cfg, 500)[0]].mean().item()


def prompts(split, cfg, n):
    """The first n documents of a split as canvases x (n, T), the length m (n,) of their prompts
    (cfg.prompt_tokens, or all but the EOS of shorter documents) and L (n,), T where cut."""
    x = canvas_of(get_eval_rows(split, cfg, n)[0], cfg)
    L = lengths(x, cfg)
    return x, L.clamp(max=cfg.prompt_tokens), L


def known_law(cfg, m):
    """What the lengths of the training documents alone say, given L >= m: log P(L) as length_law
    gives it (len(m), T + 1), from their counts and one more."""
    T = cfg.seq_len
    size = torch.from_numpy(np.diff(open_data(cfg.data_dir).train[1])).long() - 1  # without EOS
    counts = size.clamp(max=T).bincount(minlength=T + 1)[:T + 1] + 1.0
    ended = torch.arange(T + 1) < m[:, None]
    return counts.log().expand(len(m), -1).masked_fill(ended, -torch.inf).log_softmax(1)


def judge_law(logp, L, cfg):
    """What a law of lengths (n, T + 1) is worth where L (n,) came: nats; and of the shortest canvas
    that holds L with probability q by it: how often it does (coverage), how many tokens it is too
    long (looseness); the mean distance of its median."""
    T, p = logp.shape[1] - 1, logp.double().exp().cumsum(1)
    canvas, median = ((p < q - 1e-9).sum(1).clamp(max=T) for q in (cfg.q, 0.5))
    nats = -logp.double().gather(1, L[:, None])[:, 0]
    return dict(nats=nats.mean().item(), nats_se=common.se(nats),
                coverage=(L <= canvas).double().mean().item(),
                looseness=(canvas - L).double().mean().item(),
                distance=(median - L).double().abs().mean().item())


@torch.no_grad()
def first_look(model, xt, cfg):
    """What one call says of canvases xt (n, T): log p(EOS), log p(PAD) and the likeliest id of each
    position, all (n, T)."""
    looks = []
    for part in xt.split(32):
        logits = model(part).float()  # (32, T, V + 1)
        ends = logits[..., [cfg.eos, cfg.vocab_size]] - logits.logsumexp(2, keepdim=True)
        looks.append((ends[..., 0].cpu(), ends[..., 1].cpu(), logits.argmax(2).cpu()))
    return [torch.cat(part) for part in zip(*looks)]


@torch.no_grad()
def length_report(model, cfg, split="val", n=128, levels=None):
    """The length at the first call, of the first n documents of a split: rows for the log. `law` is
    the model's, `known` that of the training lengths alone, both given the prompt's length; a row
    for each of them and each probability q in `levels` (cfg.q alone). Then
    how often the EOS is found by the share of text revealed, without and with the PADs: `position`
    it is likelier at L than elsewhere, `token` it is the likeliest token at L."""
    device, g = next(model.parameters()).device, torch.Generator().manual_seed(0)
    x, m, L = prompts(split, cfg, n)
    logp = torch.cat([length_law(model, x[i].to(device), m[i].to(device), cfg).cpu()
                      for i in torch.arange(len(x)).split(32)])
    rows = [("length", dict(of=name, q=q, rows=len(x), **judge_law(
        law_, L, dataclasses.replace(cfg, q=q)))) for q in levels or (cfg.q,)
        for name, law_ in dict(law=logp, known=known_law(cfg, m)).items()]
    V, column, whole = cfg.vocab_size, torch.arange(x.shape[1]), L < x.shape[1]
    x, m, L = x[whole], m[whole], L[whole]  # documents that end on their canvas
    for pads in (False, True) if len(x) else ():
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            show = torch.rand(x.shape, generator=g) < share
            show &= (x != cfg.eos) & ((x != V) | pads)
            hidden = (column >= m[:, None]) & ~show
            eos, pad, top = first_look(model, x.masked_fill(hidden, V + 1).to(device), cfg)
            best_ = eos.masked_fill(~hidden, -torch.inf).argmax(1)
            token = top.gather(1, L[:, None]) == cfg.eos  # (E5)
            rows.append(("eos", dict(revealed=share, pads=pads, token=token.double().mean().item(),
                                     position=(best_ == L).double().mean().item())))
            if share == 0 and not pads:  # p(PAD) grows by what p(EOS) was
                jump = pad.exp()[:, 1:] - pad.exp()[:, :-1] - eos.exp()[:, :-1]  # (E3)
                found = ((top == V) & (x == V)).sum() / (x == V).sum().clamp(min=1)
                rows[0][1].update(pad_recall=found.item(), coherence_gap=jump[
                    (column >= m[:, None])[:, 1:]].abs().mean().item())
    return rows


def say_lengths(run, rows, q):
    """length_report in two lines."""
    law_, known = (row for kind, row in rows if kind == "length" and row["q"] == q)
    run.say(f"length from the first call: {law_['nats']:.2f} +- {law_['nats_se']:.2f} nats "
            f"(training lengths alone: {known['nats']:.2f}); a canvas of probability {law_['q']:g} "
            f"holds {law_['coverage']:.0%} of documents and is {law_['looseness']:.0f} tokens too "
            f"long (alone: {known['coverage']:.0%}, {known['looseness']:.0f})")
    eos = [row for kind, row in rows if kind == "eos" and not row["pads"]]
    if eos:
        run.say("the EOS is found, by the share of text revealed: " + ", ".join(
            f"{row['revealed']:.0%} {row['position']:.2f}" for row in eos))


def grade(run, model, cfg, step, n=64):
    """Predict lengths, draw n samples from the model, and let the run judge, log and show them."""
    if cfg.init_from == "parent":
        run.say("\nstage 3 of 3: lengths and samples")
    if cfg.pipeline == "diffusion" and cfg.rows == "docs":
        with run.amp:
            rows = length_report(model, cfg)
        for kind, row in rows:
            run.log(kind, step, **row)
        say_lengths(run, rows, cfg.q)
    cfg = fast(cfg)
    trace, clock = [], time.time()
    with run.amp:
        x, info = sample(model, cfg, n, torch.Generator().manual_seed(cfg.seed), trace=trace)
    common.show_samples(run, cfg, open_data(cfg.data_dir).tokenizer, step, x, trace, info,
                        time.time() - clock)


@torch.no_grad()
def evaluate_all(run, model, cfg, n=64):
    """The eval command: bound, lengths, samples on every canvas several numbers of tokens a call,
    a benchmark if asked for, as rows of eval.jsonl and two figures."""
    run.begin_eval()
    tokenizer = open_data(cfg.data_dir).tokenizer
    # 1. a benchmark, if it is asked for, and nothing else
    if cfg.bench:
        row = bench(model, cfg, tokenizer)
        run.log("bench", -1, **row)
        return run.say(f"{cfg.bench}: {common.figures(row)}")
    # 2. the bound
    row = evaluate(model, cfg, "test", 500)
    run.log("test", -1, **row)
    run.say(f"test, {row['rows']} rows: {common.report(row)}")
    # 3. lengths
    docs = cfg.rows == "docs" and cfg.pipeline == "diffusion"
    if docs:
        levels = sorted({0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, cfg.q})
        rows = length_report(model, cfg, "test", 256, levels)
        for kind, row in rows:
            run.log(kind, -1, **row)
        say_lengths(run, rows, cfg.q)
        common.plot_lengths(run.out / "length.png", rows)
    # 4. samples that continue prompts of test documents
    judge = common.load_judge(cfg.judge, tokenizer, run)
    x0 = get_eval_rows("test", cfg, n)[0]
    real = common.measure(x0, cfg, tokenizer, judge)
    run.log("real", -1, n=len(x0), **real)
    run.say(f"test documents: {common.figures(real)}")
    rows, canvases = [], cfg.eval_canvases.split(",") if docs else ["full"]
    for canvas in canvases if cfg.pipeline == "diffusion" else []:
        for k in map(int, cfg.eval_k.split(",")):
            for seed in range(cfg.eval_seeds):
                some = dataclasses.replace(cfg, canvas=canvas,
                                           sampling_steps=-(-cfg.seq_len // k))
                clock = time.time()
                x, info = sample(model, some, n, torch.Generator().manual_seed(cfg.seed + seed))
                seconds, useful = time.time() - clock, sum(map(len, common.tokens_of(x, cfg)))
                row = dict(canvas=canvas, sampling_steps=some.sampling_steps, k=k, seed=cfg.seed +
                           seed, n=n, order=cfg.order, temperature=cfg.temperature, **info,
                           useful=useful, per_token=info["forwarded"] / max(1, useful),
                           seconds=seconds, tok_s=useful / seconds,
                           **common.measure(x, cfg, tokenizer, judge))
                run.log("samples", -1, **row)
                rows.append(row)
            shown = ("k", "per_token", "tok_s", "contradictions", "valid", "known", "judge",
                     "entropy")
            run.say(f"{canvas:6} " + common.figures({k: row[k] for k in shown if k in row}))
    if rows:
        common.plot_quality(run.out / "quality.png", rows, real, "canvas", "per_token",
                            "tokens through the network per token of text")


def wilson(right, n):
    """95 % interval of a share, right of n (Wilson 1927): (low, high)."""
    p, z = right / n, 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, middle - half) / (1 + z * z / n), min(1.0, (middle + half) / (1 + z * z / n))]


def rouge(guess, truth):
    """F1 of common words, common pairs of words and the longest common subsequence (Lin 2004)."""
    a, b, out = guess.split(), truth.split(), []
    for size in (1, 2):
        x, y = ([tuple(w[i:i + size]) for i in range(len(w) - size + 1)] for w in (a, b))
        same = sum(min(x.count(gram), y.count(gram)) for gram in set(x))
        out.append(2 * same / max(1, len(x) + len(y)))
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, word in enumerate(a):
        for j, other in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if word == other else max(
                table[i][j + 1], table[i + 1][j])
    return [*out, 2 * table[-1][-1] / max(1, len(a) + len(b))]


def read_items(kind, path, limit):
    """Items of a benchmark, dictionaries of str: cloze prefix, target; choice prefix, choices,
    gold; infill prefix, middle, suffix. JSON lines, or for cloze a text: a passage a line, the last
    word is the target (LAMBADA)."""
    keys = dict(cloze=("prefix", "target"), choice=("prefix", "choices", "gold"),
                infill=("prefix", "middle", "suffix"))[kind]
    try:
        lines = [line for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --bench {path} ({common.last_line(error)})") from None
    items = []
    for number, line in enumerate(lines[:limit or None], 1):
        try:
            if kind == "cloze" and not line.startswith("{"):
                items.append(dict(zip(keys, line.strip().rsplit(" ", 1), strict=True)))
            else:
                items.append({key: json.loads(line)[key] for key in keys})
                texts = [text for key, value in items[-1].items() if key != "gold" for text in (
                    value if key == "choices" else [value])]
                if not all(isinstance(text, str) and text.strip() for text in texts):
                    raise TypeError
                if kind == "choice":
                    items[-1]["choices"][items[-1]["gold"]]
        except (ValueError, KeyError, TypeError, IndexError):
            raise UserError(f"{path}, line {number} is no {kind} item: it needs "
                            f"{', '.join(keys)}") from None
    if not items:
        raise UserError(f"{path} holds no items")
    return items


@torch.no_grad()
def bench(model, cfg, tokenizer):
    """Benchmarks: shares right with intervals. cloze: the last word, once with its number of tokens
    given (oracle, as in Gong et al.), once free: six masks, and the first word counts. choice: the
    option with the lowest bound per token (and in sum), all options under masks of the same draws.
    infill: the middle with its number of tokens given, exact and ROUGE-1, -2, -L."""
    kind, _, path = cfg.bench.partition(":")
    device, T, V = next(model.parameters()).device, cfg.seq_len, cfg.vocab_size
    cfg = dataclasses.replace(cfg, canvas="full", max_new_tokens=0, sampling_steps=0, quota="even")
    items, right = read_items(kind, path, cfg.bench_n), {}
    for number, item in enumerate(items):
        g = torch.Generator().manual_seed(cfg.seed)  # the same draws for every item and option
        if kind == "choice":
            costs = []
            for choice in item["choices"]:
                answer = tokenizer.encode(" " + choice.strip())[:T // 2]
                given = tokenizer.encode(item["prefix"].rstrip())[-(T - len(answer)):]
                x = torch.tensor([given + answer], device=device)
                frozen = torch.arange(x.shape[1], device=device)[None] < len(given)
                nats = nelbo(model, x, dataclasses.replace(cfg, rows="stream"), g.manual_seed(
                    cfg.seed), 2 * len(answer), frozen)[0].item()
                costs.append((nats / len(answer), nats))
            for name, i in (("per_token", 0), ("sum", 1)):
                best_ = min(range(len(costs)), key=lambda c: costs[c][i])
                right.setdefault(name, []).append(best_ == item["gold"])
            continue
        if kind == "cloze":
            before, truth, after = item["prefix"].rstrip(), item["target"].strip(), []
        else:
            before, truth = item["prefix"].rstrip(), item["middle"].strip()
            after = tokenizer.encode(" " + item["suffix"].strip())[:T // 3]
        size = len(tokenizer.encode(" " + truth))
        for name, holes in dict(oracle=size, **({"free": 6} if kind == "cloze" else {})).items():
            holes = min(holes, T // 3)
            ids = tokenizer.encode(before)[-(T - holes - len(after)):] + [V] * holes
            start = torch.tensor([ids + after], device=device)
            x, _ = sample(model, cfg, 1, g, start=start)
            said = tokenizer.decode(x[0, len(ids) - holes:len(ids)].tolist()).strip()
            if name == "free":
                said = (said.split() or [""])[0]
            right.setdefault(name, []).append(said == truth)
            if kind == "infill":
                for key, value in zip(("rouge_1", "rouge_2", "rouge_l"), rouge(said, truth)):
                    right.setdefault(key, []).append(value)
    row = dict(bench=kind, file=Path(path).name, n=len(items))
    for name, values in right.items():
        row[name] = sum(values) / len(values)
        if not name.startswith("rouge"):
            row[f"{name}_interval"] = wilson(sum(values), len(values))
    return row


def train(cfg):
    """Train as the Config says; returns the averaged model. Everything it makes is in the run
    folder: config, log, checkpoint, samples, figures."""
    with common.Run(cfg, cfg.out or f"out/{NAME}") as run:
        fill_in(cfg, run.rank)
        torch.manual_seed(cfg.seed)
        model = Model(cfg, start(cfg, run.out)).to(run.device)
        ema = copy.deepcopy(model).requires_grad_(False)  # what is evaluated and sampled from
        optimizers = make_optimizers(model, cfg)
        g = torch.Generator().manual_seed(cfg.seed)
        tokenizer, step = open_data(cfg.data_dir).tokenizer, 0
        if cfg.resume:
            stored = common.load_config(Config, run.out)
            common.check_same(cfg, stored, SHAPE, f"the run in {run.out}")
            step = run.resume(tokenizer, model, ema, optimizers, g)
        if cfg.compile:  # the blocks only: what is around them changes shape at every step
            for block in model.blocks:
                block.compile()
        size = sum(p.numel() for p in model.parameters())
        run.say(f"{NAME}.py: {size / 1e6:.2f}M parameters, vocabulary {cfg.vocab_size}, rows of "
                f"{cfg.seq_len} ({cfg.rows}), {run.describe()}")
        run.say(f"without a model: uniform {math.log(cfg.vocab_size):.3f}, unigram "
                f"{unigram_nll(cfg):.3f} nats per position of a row")
        share = cfg.batch_size // run.world  # rows of one process in one micro-batch
        run.begin()

        while step < cfg.steps and not run.stopping():
            if step % cfg.eval_every == 0:
                run.validate(step, lambda: evaluate(ema, cfg))
            for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
                group["lr"] = get_lr(step, cfg) * group["scale"]
            # one batch and one noise for the whole step, shared out to micro-batches and processes
            x0, noise, total = get_batch("train", cfg, g).to(run.device), g.get_state(), 0.0
            for i in range(run.rank, cfg.grad_accum * run.world, run.world):
                g.set_state(noise)
                with run.amp:
                    rows = slice(i * share, (i + 1) * share)
                    loss, info = loss_fn(model, x0, at_step(cfg, step), g, rows)
                (loss / cfg.grad_accum).backward()
                total += loss.item() / cfg.grad_accum
            total = run.average(model, total)
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf).item()
            if not math.isfinite(total + norm):
                raise UserError(f"the loss is {total} and its gradient {norm} at step {step}: "
                                f"lower --lr; the last good checkpoint is kept in {run.out}")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            for p, q in zip(ema.parameters(), model.parameters()):  # warms up: early weights fade
                p.lerp_(q.detach(), 1 - min(cfg.ema, (1 + step) / (10 + step)))
            run.train_row(step, x0.numel(), loss=total, lr=get_lr(step - 1, cfg),
                          grad_norm=norm)
            if step % cfg.save_every == 0 or step == cfg.steps:
                run.save(step, tokenizer, model, ema, optimizers, g)

        if run.stop_signal:
            run.save(step, tokenizer, model, ema, optimizers, g)
            run.say(f"stopped at step {step}; go on with --resume")
            raise SystemExit(128 + run.stop_signal)
        run.validate(step, lambda: evaluate(ema, cfg))
        if run.rank == 0:
            grade(run, ema, cfg, step)
            common.plot_loss(run.out / "loss.png", run.read_log())
            run.say(f"{run.out}: {', '.join(sorted(p.name for p in run.out.iterdir()))}")
    return ema


# ----------------------------------------------------------------------------------------------
# 7. main
# ----------------------------------------------------------------------------------------------


def parent_of(cfg):
    """The Config of the parent's training."""
    return dataclasses.replace(
        cfg, pipeline="arm", init_from="scratch", steps=cfg.parent_steps, head="marginal",
        freeze=False, out=cfg.parent or f"{cfg.out or f'out/{NAME}'}_parent", resume=False)


def have_parent(cfg):
    """Stage 1: train the causal parent, go on with one that was interrupted, or say that it is
    there already, made by the same settings."""
    if cfg.init_from != "parent" or cfg.parent:
        return
    names, mine = [field.name for field in dataclasses.fields(Config)], parent_of(cfg)
    matter = set(names[:names.index("n")]) - {"out", "resume", "log", "compile"} | {
        "optimizer", "beta1", "beta2", "weight_decay", "div_factor", "final_div_factor"}
    folder, made = Path(mine.out), 0
    with common.Run(cfg, cfg.out or f"out/{NAME}", training=False):
        pass  # stage 2 will be able to write
    with common.Run(mine, folder, training=False) as run:
        run.say(f"stage 1 of 3: a causal parent, {mine.steps} steps")
        fill_in(mine, run.rank)
        if (folder / "state.pt").exists() and (folder / "config.json").exists():
            theirs = common.load_config(Config, folder)
            made = json.loads((folder / "config.json").read_text())["run"]["step"]
            mine.resume = all(getattr(theirs, k) == getattr(mine, k) for k in matter)
    if mine.resume and made == mine.steps:
        run.say(f"it is in {folder} already")
    else:
        train(mine)
    run.say(f"\nstage 2 of 3: the parent becomes a diffusion model, {cfg.steps} steps")


def main(argv):
    """train (default), sample or eval."""
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "train"
    if command not in ("train", "sample", "eval"):
        raise UserError(f"unknown command '{command}': choose train, sample or eval")
    cfg = common.parse(Config, PRESETS, argv, __doc__, read=read_config)
    out = cfg.out or f"out/{NAME}"
    if cfg.resume and not (Path(out) / "config.json").exists():  # stopped in stage 1?
        cfg.resume = not (Path(parent_of(cfg).out) / "state.pt").exists()
    if command == "train" and not cfg.resume:
        have_parent(cfg)
        return train(cfg) and None
    stored = common.load_config(Config, out)  # flags are laid over what the run was made with
    if command != "train":
        stored = fast(stored)
    cfg = common.parse(Config, PRESETS, argv, __doc__, default=stored, read=read_config)
    if command == "train":
        return train(cfg) and None
    common.check_same(cfg, stored, SHAPE + METHOD, f"the checkpoint in {out}")
    with common.Run(cfg, out, False, "eval.jsonl" if command == "eval" else "log.jsonl") as run:
        model, tokenizer = Model(cfg).to(run.device), load_tokenizer(out)
        common.load_weights(model, out)
        if command == "eval":
            fill_in(cfg)
            common.check_tokenizer(out, open_data(cfg.data_dir).tokenizer)
            with run.amp:
                return evaluate_all(run, model, cfg)
        prompt = common.encode_prompt(tokenizer, cfg).to(run.device)
        start_ = common.encode_infill(tokenizer, cfg).to(run.device) if cfg.infill else None
        trace, g = [] if cfg.trace else None, torch.Generator().manual_seed(cfg.seed)
        with run.amp:
            x, info = sample(model, cfg, cfg.n, g, prompt, trace, start_)
        common.show_samples(run, cfg, tokenizer, -1, x, trace, info)


if __name__ == "__main__":
    common.run_main(main)
