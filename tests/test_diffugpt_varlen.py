"""From GPT to diffusion: checkpoints, attention, corruption, bound, loss, the law of lengths,
reports, benchmarks and settings, against transformers, enumeration and Bayes' rule."""
import copy
import dataclasses
import inspect
import itertools
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

import common_v1 as common
import diffugpt_varlen as script
from common_v1 import UserError
from data.prepare import get_tokenizer
from tables import all_rows, chi_square, generator, mean_and_se

PLAIN = dict(crop=0.0, p_cond=0.0, p_tail=0.0, p_pin=0.0)  # the loss is the bound
HEADS = pytest.mark.parametrize("head", ["hazard", "pointer"])


def config(**changes):
    """Tokens 0 and 1, EOS 2, PAD 3, M 4, documents, rows of six; every mask and row alike."""
    return script.Config(**(dict(vocab_size=3, eos=2, bos=2, seq_len=6, n_layer=2, n_head=2,
                                 n_embd=16, rows="docs", lr=4e-3, warmup=10) | PLAIN | changes))


def network(cfg, seed=0, shake=0.3):
    """Weights far from their initial zeros, so that every path is alive."""
    torch.manual_seed(seed)
    model, g = script.Model(cfg), generator(seed)
    for p in model.parameters():
        p.data += shake * torch.randn(p.shape, generator=g)
    return model.requires_grad_(False)


def uniform(cfg):
    model = script.Model(cfg)
    model.transformer.wte.weight.data.zero_()
    return model


def documents(cfg, *sizes, seed=0):
    """EOS-filled rows of random text of these lengths; seq_len or more: no EOS."""
    x0 = torch.randint(cfg.eos, (len(sizes), cfg.seq_len), generator=generator(seed))
    return torch.where(torch.arange(cfg.seq_len) < torch.tensor(sizes)[:, None], x0, cfg.eos)


def share_is(hits, p, n, width=5):
    """Is a count of n independent trials what the probability p says, within so many sigma?"""
    return abs(float(hits) - n * p) <= width * math.sqrt(n * p * (1 - p)) + 1e-9


def near(values, truth, width=5):
    """Is the mean of independent draws (n,) the truth, within so many standard errors?"""
    values = values.double()
    return abs(values.mean().item() - truth) < width * values.std().item() / len(values) ** 0.5


class Spy(nn.Module):
    """A model that keeps what it was given."""

    def __init__(self, model):
        super().__init__()
        self.model, self.given = model, []

    def aligned(self, idx, seen=None):
        self.given.append((idx, seen))
        return self.model.aligned(idx, seen)

    def unembed(self, h):
        return self.model.unembed(h)

    def forward(self, idx, where=None, seen=None):
        h = self.aligned(idx, seen)
        return self.unembed(h if where is None else h[where])


class Oracle(nn.Module):
    """The perfect model of canvases (N, T) that come with probability p (N,): the exact marginals
    of every position given what is visible, by going through all canvases."""

    def __init__(self, canvases, p, outputs):
        super().__init__()
        self.canvases, self.p, self.outputs = canvases, p.double(), outputs
        self.nothing = nn.Parameter(torch.zeros(1))

    def aligned(self, idx, seen=None):
        known = self.canvases[:, :idx.shape[1]]
        fits = ((idx[:, None] == known) | (idx[:, None] == self.outputs)).all(2) * self.p
        fits = fits / fits.sum(1, keepdim=True).clamp(min=1e-30)
        each = F.one_hot(known, self.outputs).double()
        return (torch.einsum("bn,ntv->btv", fits, each) + 1e-30).log()

    def unembed(self, h):
        return h

    def forward(self, idx, where=None, seen=None):
        h = self.aligned(idx, seen)
        return h if where is None else h[where]


def language(seed=0, T=6):
    """All canvases of T over two letters: (N, T), and probabilities such that all lengths 0..T
    (T: no EOS inside) are equally likely and the letters tell a lot about the length."""
    rows, p = [], []
    g = generator(seed)
    for L in range(T + 1):
        text = all_rows(2, L) if L else torch.zeros(1, 0, dtype=torch.long)
        tail = torch.tensor([2] + [3] * (T - 1))[:T - L].expand(len(text), -1)
        rows.append(torch.cat((text, tail), 1))
        weight = torch.rand(len(text), generator=g).double() ** 3 + 0.01
        p.append(weight / weight.sum() / (T + 1))
    return torch.cat(rows), torch.cat(p)


def oracle(seed=0, T=6):
    return Oracle(*language(seed, T), outputs=4)


def length_of(canvases):
    return ((canvases == 2).cumsum(1) == 0).sum(1)


def true_law(rows, p, prompt):
    """P(L = 0 .. T | prompt) by counting the canvases that begin with it."""
    T, m = rows.shape[1], len(prompt)
    weight = p * (rows[:, :m] == prompt).all(1)
    return torch.zeros(T + 1, dtype=torch.float64).index_add(
        0, length_of(rows), weight) / weight.sum()


# ---- 1. checkpoints: transformers reads ours, we read theirs

V, T = 11, 9  # of the checkpoints below


def gpt_config(**changes):
    return config(**(dict(vocab_size=V, eos=10, bos=10, seq_len=T, n_embd=16) | changes))


def gpt2(rows=V, places=T + 3, seed=0):
    """A GPT2LMHeadModel of transformers, every parameter N(0, 0.3^2), all of them exact in fp16."""
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=rows, n_positions=places, n_embd=16, n_layer=2, n_head=2, bos_token_id=10,
        eos_token_id=10)).eval().requires_grad_(False)
    g = generator(seed)
    for p in model.parameters():
        p.copy_((0.3 * torch.randn(p.shape, generator=g)).half().float())
    return model


@pytest.fixture(scope="module")
def theirs():
    return gpt2()


def tensors_of(model):
    """The state dict without the copy of the tied head."""
    return {k: v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}


def write(folder, tensors, **card):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(card))
    return str(folder)


def says(model, ids, bos=10, causal=True):
    """Logits of transformers' model for [BOS, ids]: (B, 1 + T, rows)."""
    ids = torch.cat((ids.new_full((len(ids), 1), bos), ids), 1)
    n = ids.shape[1]
    everywhere = torch.ones(len(ids), 1, n, n, dtype=torch.bool)
    return model(ids, attention_mask=None if causal else everywhere).logits


TOY = SimpleNamespace(spec={}, fingerprint="0123", name="toy", vocab_size=V, eos=10, bos=10)


def saved(model, cfg, out, tokenizer=TOY):
    """A run folder as training leaves it."""
    with common.Run(cfg, out, training=False) as run:
        run.save(3, tokenizer, model, model, script.make_optimizers(model, cfg), generator())
    return str(out)


def with_data(monkeypatch, tokenizer=TOY, **splits):
    monkeypatch.setattr(script, "open_data", lambda folder: SimpleNamespace(
        tokenizer=tokenizer, **splits))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_our_network_is_the_gpt2_of_transformers(causal, shift):
    """(E2) Logits with the causal mask and without any are equal to 1e-5; column i is what their
    model says at the input before token i, or with no shift at token i."""
    model = gpt2(V + 2, T + 1)
    ours = script.Model(gpt_config(shift=shift), tensors_of(model))
    ids = torch.randint(V + 2, (5, T), generator=generator(1))
    got = ours(ids, seen=script.sees(T + 1, 0.0 if causal else 1.0))
    want = says(model, ids, causal=causal)[:, :-1] if shift else says(model, ids, causal=causal)[
        :, 1:]
    assert got.shape == (5, T, V + 1)  # PAD may be said, M never
    assert (got - want[..., :V + 1]).abs().max() <= 1e-5
    assert (got - ours(ids, seen=script.sees(T + 1, float(causal)))).abs().max() > 0.01
    where = torch.rand(5, T, generator=generator(2)) < 0.4
    assert torch.allclose(ours(ids, where, script.sees(T + 1, float(not causal))), got[where],
                          atol=1e-5)


@pytest.mark.parametrize("changes", [{}, dict(head="hazard"), dict(pipeline="arm")])
def test_transformers_loads_our_run_folder(changes, tmp_path, theirs):
    """GPT2LMHeadModel.from_pretrained gives our logits; a length head is left aside."""
    transformers = pytest.importorskip("transformers")
    cfg = gpt_config(**changes)
    ours = network(cfg)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(saved(ours, cfg, tmp_path)).eval()
    ids = torch.randint(V + 2, (5, T), generator=generator(1))
    with torch.no_grad():
        for causal in (True, False):
            want = says(loaded, ids, causal=causal)[:, :-1, :ours.outputs]
            got = ours(ids, seen=script.sees(T + 1, 0.0 if causal else 1.0))
            assert (got - want).abs().max() <= 1e-5
    assert loaded.config.bos_token_id == 10 and loaded.config.vocab_size == V + 2


def spellings(base):
    """The same GPT-2 as four programs write it."""
    bare = {k.removeprefix("transformer."): v for k, v in base.items()}
    hub = bare | {f"h.{i}.attn.{name}": torch.ones(1, 1, 4, 4).tril() for i in range(2)
                  for name in ("bias", "masked_bias")}
    diffugpt = {"embed_tokens.weight" if k == "wte.weight" else f"denoise_model.{k}": v.half()
                for k, v in bare.items()}
    head = {"lm_head.weight": diffugpt["embed_tokens.weight"].clone()}
    return dict(save_pretrained=base, hub=hub, diffugpt=diffugpt, tied=diffugpt | head)


def test_every_spelling_of_a_gpt2_gives_the_same_weights(tmp_path, theirs):
    """Names of save_pretrained, of the hub with its buffers, of DiffuGPT in half precision with
    and without a head, and the folder that save_pretrained itself writes."""
    base, states = tensors_of(theirs), []
    theirs.save_pretrained(tmp_path / "real")
    card = dict(n_head=2, activation_function="gelu_new")
    folders = {name: write(tmp_path / name, tensors, **card)
               for name, tensors in spellings(base).items()} | dict(real=tmp_path / "real")
    for name, folder in folders.items():
        weights, read = script.load_pretrained(str(folder))
        assert weights.keys() == base.keys() and read["n_head"] == 2, name
        assert all(torch.equal(weights[k], base[k]) and weights[k].dtype == torch.float32
                   for k in base), name
        cfg = gpt_config(init_from=str(folder), n_layer=script.Config.n_layer)
        states.append(script.Model(cfg, script.start(cfg, tmp_path)).state_dict())
        assert (cfg.n_layer, cfg.n_head, cfg.n_embd) == (2, 2, 16)
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[k], states[0][k]) for k in state)


def rename(tensors, old, new):
    return {k.replace(old, new): v for k, v in tensors.items()}


def drop(tensors, name):
    return {k: v for k, v in tensors.items() if k != f"transformer.{name}"}


def turned(tensors, name):
    return tensors | {f"transformer.{name}": tensors[f"transformer.{name}"].t()}


BROKEN = {  # what is done to (tensors, card, settings) and what is said
    "a missing tensor": (lambda t, c: (drop(t, "h.1.mlp.c_fc.bias"), c), {}, "h.1.mlp.c_fc.bias"),
    "a missing norm": (lambda t, c: (drop(t, "ln_f.weight"), c), {}, "ln_f.weight"),
    "no positions": (lambda t, c: (drop(t, "wpe.weight"), c), {}, "position embeddings"),
    "other names": (lambda t, c: (rename(t, "attn.c_proj", "attn.out"), c), {}, "attn.c_proj"),
    "an unknown tensor": (lambda t, c: (t | {"transformer.h.0.extra": torch.ones(1)}, c), {},
                          "h.0.extra"),
    "a transposed matrix": (lambda t, c: (turned(t, "h.0.mlp.c_proj.weight"), c), {},
                            "h.0.mlp.c_proj.weight"),
    "a head of its own": (lambda t, c: (t | {"lm_head.weight": torch.ones(V, 16)}, c), {},
                          "a head of its own"),
    "no embedding but a head": (lambda t, c: (rename(t, "transformer.", "model.") | {
        "lm_head.weight": torch.ones(V, 16)}, c), {}, ""),
    "another activation": (lambda t, c: (t, c | dict(activation_function="relu")), {},
                           "activation_function"),
    "another epsilon": (lambda t, c: (t, c | dict(layer_norm_epsilon=1e-6)), {}, "epsilon"),
    "rows too long": (lambda t, c: (t, c), dict(seq_len=T + 3), f"must be at most {T + 2}"),
    "another vocabulary": (lambda t, c: (t, c), dict(vocab_size=V + 1), "--tokenizer"),
    "too many tokens": (lambda t, c: (t, c), dict(vocab_size=V - 3), "--tokenizer"),
    "another width": (lambda t, c: (t, c), dict(n_embd=32), "leave --n-embd out"),
    "a mask that is no token": (lambda t, c: (t, c), dict(mask_id=V), "--mask-id"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_gpt2_ends_in_one_sentence(case, tmp_path, theirs):
    """A wrong file is refused with a UserError that names what is wrong, never half loaded."""
    change, settings, fragment = BROKEN[case]
    tensors, card = change(tensors_of(theirs), dict(n_head=2))
    folder = write(tmp_path / "them", tensors, **card)
    cfg = gpt_config(**(dict(init_from=folder) | settings))
    with pytest.raises(UserError) as error:
        script.Model(cfg, script.start(cfg, tmp_path))
    said = str(error.value)
    assert fragment in said and "\n" not in said and ("them" in said or "--mask-id" in said)


def test_a_folder_that_is_missing_or_broken_ends_in_one_sentence(tmp_path, monkeypatch):
    """Unknown names, no parent, no network, no files, files that are no JSON and no tensors."""
    def said(name, **changes):
        cfg = gpt_config(**(dict(init_from=str(name)) | changes))
        with pytest.raises(UserError) as error:
            script.start(cfg, tmp_path / "run")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no known checkpoint" in said("gpt3") and "diffugpt-s" in said("gpt3")
    assert "no known checkpoint" in said(tmp_path.name)
    assert "run_parent" in said("parent") and "elsewhere" in said("parent", parent="elsewhere")
    assert "model.safetensors" in said(tmp_path)
    folder = tmp_path / "broken"
    write(folder, {"wte.weight": torch.ones(2, 2)})
    (folder / "config.json").write_text("{")
    assert "config.json" in said(folder)
    (folder / "config.json").write_text("[]")
    assert "config.json" in said(folder)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"nothing")
    assert "save_pretrained" in said(folder)

    def fetch(*_, **__):
        raise OSError("offline\nno route")
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=fetch))
    assert "cannot fetch openai-community/gpt2-xl (no route)" in said("gpt2-xl")


def test_a_checkpoint_of_another_tokenizer_is_refused(tmp_path, monkeypatch):
    """Our folders say which tokenizer made them; the same one is let through."""
    cfg = gpt_config()
    folder = saved(network(cfg), cfg, tmp_path / "run")
    with_data(monkeypatch)
    assert script.start(gpt_config(init_from=folder), tmp_path)
    with_data(monkeypatch, SimpleNamespace(fingerprint="4567", name="other"))
    with pytest.raises(UserError, match="another tokenizer"):
        script.start(gpt_config(init_from=folder), tmp_path)


def test_mask_and_pad_are_new_rows_of_the_embedding(tmp_path, theirs, monkeypatch):
    """PAD starts as the mean of all tokens, the mask too or as a copy of --mask-id; DiffuGPT's own
    mask is known by its name; a PAD that another program calls so is not taken for ours."""
    base = tensors_of(theirs)
    table = base["transformer.wte.weight"]
    folder = write(tmp_path / "diffugpt-s", base, n_head=2, pad_token_id=10)

    def rows(**changes):
        cfg = gpt_config(**(dict(init_from=folder) | changes))
        return script.start(cfg, tmp_path)["transformer.wte.weight"]

    for mask_id, want in ((-1, table.mean(0)), (4, table[4]), (0, table[0])):
        got = rows(mask_id=mask_id)
        assert got.shape == (V + 2, 16) and torch.equal(got[:V], table)
        assert torch.equal(got[V], table.mean(0)) and torch.equal(got[V + 1], want)
    for other in (-1, V, V + 7):  # no row of theirs
        path = write(tmp_path / "other", base, n_head=2, pad_token_id=other)
        assert torch.equal(rows(init_from=path)[V], table.mean(0))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(script.MASK_IDS, "diffugpt-s", 7)
    assert torch.equal(rows(init_from="diffugpt-s")[V + 1], table[7])
    assert torch.equal(rows(init_from="diffugpt-s", mask_id=2)[V + 1], table[2])
    assert script.MASK_IDS["diffugpt-m"] == 50257


def test_a_copied_mask_row_acts_as_the_token_did(tmp_path, theirs):
    """What the network says with the new mask is what it said with the old id, bit by bit."""
    folder = write(tmp_path / "them", tensors_of(theirs), n_head=2)
    cfg = gpt_config(init_from=folder, mask_id=4)
    model = script.Model(cfg, script.start(cfg, tmp_path))
    ids = torch.randint(V, (6, T), generator=generator(1))
    ids[:, ::2] = 4
    assert torch.equal(model(ids), model(ids.masked_fill(ids == 4, V + 1)))


def test_growing_keeps_the_logits_of_the_old_tokens(tmp_path, theirs):
    """Two more rows and fewer positions change nothing that the GPT said, causal and not."""
    folder = write(tmp_path / "them", tensors_of(theirs), n_head=2)
    cfg = gpt_config(init_from=folder)
    model = script.Model(cfg, script.start(cfg, tmp_path))
    ids = torch.randint(V, (6, T), generator=generator(1))
    for causal in (True, False):
        got = model(ids, seen=script.sees(T + 1, float(not causal)))
        want = says(theirs, ids, causal=causal)[:, :-1]
        assert got.shape[2] == V + 1 and (got[..., :V] - want).abs().max() <= 1e-5


@pytest.mark.parametrize("head", ["marginal", "hazard", "pointer"])
def test_a_run_folder_gives_every_bit_back(head, tmp_path, monkeypatch):
    """By the Config and load_weights, and as the beginning of another run, where PAD and the mask
    keep their vectors; rows may be shorter there."""
    cfg = gpt_config(head=head)
    model = network(cfg)
    folder = saved(model, cfg, tmp_path / "run")
    stored = common.load_config(script.Config, folder)
    again = script.Model(stored)
    common.load_weights(again, folder)
    with_data(monkeypatch)
    cfg2 = gpt_config(head=head, init_from=folder)
    other = script.Model(cfg2, script.start(cfg2, tmp_path))
    want = model.state_dict()
    assert stored == cfg and ("length_bias" in want) == (head != "marginal")
    for state in (again.state_dict(), other.state_dict()):
        assert state.keys() == want.keys() and all(torch.equal(state[k], want[k]) for k in want)
    short = gpt_config(head=head, init_from=folder, seq_len=5)
    ids = torch.randint(V + 2, (3, 5), generator=generator(1))
    assert torch.equal(script.Model(short, script.start(short, tmp_path))(ids), model(ids))


def test_a_parent_becomes_a_diffusion_model(tmp_path, monkeypatch):
    """An arm run has untrained rows for PAD and the mask: they begin as the mean; a new length head
    begins at zero; --resume and scratch load nothing."""
    arm = gpt_config(pipeline="arm")
    parent = network(arm)
    folder = saved(parent, arm, tmp_path / "run_parent")
    with_data(monkeypatch)
    cfg = gpt_config(init_from="parent", head="hazard")
    weights = script.start(cfg, tmp_path / "run")
    table = parent.transformer.wte.weight
    assert torch.equal(weights["transformer.wte.weight"],
                       torch.cat((table[:V], table[:V].mean(0).expand(2, -1))))
    model = script.Model(cfg, weights)
    assert (model.length_head.weight == 0).all() and model.outputs == V + 1
    assert torch.equal(model.blocks[1].mlp.c_fc.weight, parent.blocks[1].mlp.c_fc.weight)
    named = gpt_config(init_from="parent", parent=folder)
    assert torch.equal(script.start(named, "x")["transformer.wpe.weight"],
                       parent.transformer.wpe.weight)
    for other in (gpt_config(init_from="scratch"), gpt_config(init_from="parent", resume=True)):
        assert script.start(other, "nowhere") is None


def test_museum_a_load_that_is_not_strict(tmp_path):
    """strict=False leaves a network random without a word (audited): here a tensor that is
    missing, renamed or of another shape stops, also in a run folder of ours."""
    cfg = gpt_config()
    state = network(cfg).state_dict()
    name = "transformer.h.1.attn.c_attn.weight"
    for tensors in ({k: v for k, v in state.items() if k != name}, rename(state, "ln_1", "ln"),
                    state | {name: state[name].t()}, state | {"extra": torch.ones(1)}):
        folder = write(tmp_path / "run", tensors)
        with pytest.raises(UserError, match="does not fit this model"):
            common.load_weights(script.Model(cfg), folder)
    for tensors in (rename(state, "ln_1", "ln"), {name: state[name].t()}):
        with pytest.raises(RuntimeError):
            script.Model(cfg, tensors)


# ---- 2. who sees whom


def test_a_share_of_the_future_is_open():
    """(E8) 0 is the causal mask, 1 no mask; between, later positions are open with probability r,
    earlier ones always; one matrix for all rows, drawn anew each time."""
    n = 60
    assert script.sees(n, 1.0) is None
    assert torch.equal(script.sees(n, 0.0), torch.ones(n, n).tril().bool())
    upper, g = torch.ones(n, n).triu(1).bool(), generator(0)
    for r in (0.05, 0.3, 0.5, 0.95):
        drawn = torch.stack([script.sees(n, r, g) for _ in range(20)])
        assert drawn.shape == (20, n, n) and drawn[:, ~upper].all()
        assert share_is(drawn[:, upper].sum(), r, 20 * int(upper.sum()))
        assert not torch.equal(drawn[0], drawn[1])
        per_place = drawn[:, upper].float().mean(0)  # no place is favoured
        assert (per_place - r).abs().max() < 5.5 * math.sqrt(r * (1 - r) / 20) + 0.05
    assert torch.equal(script.sees(n, 0.5, generator(1)), script.sees(n, 0.5, generator(1)))


@pytest.mark.parametrize("shift", [True, False])
def test_attention_at_ratio_0_and_1(shift):
    """(E8) At 0 another token j changes what is said of later tokens only (with the shift: not of
    j itself); at 1 of all."""
    cfg = config(vocab_size=20, eos=19, bos=19, seq_len=8, shift=shift)
    model, ids = network(cfg), torch.randint(19, (1, 8), generator=generator(1))
    for j in range(8):
        other = ids.clone()
        other[0, j] = (ids[0, j] + 1) % 19
        change = [(model(ids, seen=script.sees(9, r)) - model(other, seen=script.sees(9, r)))[
            0].abs().amax(1) for r in (0.0, 1.0)]
        first = j + 1 if shift else j
        assert (change[0][:first] == 0).all() and (change[0][first:] > 1e-4).all()
        assert (change[1] > 1e-4).all()


def test_the_loss_draws_one_mask_and_the_bound_none():
    """(E8) loss_fn gives the network one (1 + T, 1 + T) matrix of the Config's ratio; nelbo and
    length_law look everywhere, whatever the ratio."""
    cfg = config(attn_ratio=0.4, crop=1.0)
    model = Spy(network(cfg))
    x0 = documents(cfg, 3, 6, 0, 5)
    shares = []
    for seed in range(200):
        script.loss_fn(model, x0, cfg, generator(seed))
        idx, seen = model.given[-1]
        n = idx.shape[1] + 1
        assert seen.shape == (n, n) and seen[torch.ones(n, n).tril().bool()].all()
        shares.append(seen[torch.ones(n, n).triu(1).bool()].float())
    assert len({len(s) for s in shares}) > 1  # cut rows have a mask of their size
    shares = torch.cat(shares)
    assert share_is(shares.sum(), 0.4, len(shares))
    model.given.clear()
    script.nelbo(model, x0, cfg, generator(0))
    script.length_law(model, x0, torch.zeros(4, dtype=torch.long), cfg)
    assert len(model.given) == 9 and all(seen is None for _, seen in model.given)


# ---- 3. bound and loss


def costs(model, x, cfg):
    """All patterns of masks (2^T, T) of one canvas x (T,), and -log p of what each one hides."""
    patterns = all_rows(2, len(x)).bool()
    xt = x.expand(len(patterns), -1).masked_fill(patterns, cfg.vocab_size + 1)
    logp = model(xt).double().log_softmax(2)
    ce = -logp.gather(2, x.expand(len(patterns), -1)[..., None])[..., 0]
    return patterns, ce * patterns


def enumerated(model, x, cfg, frozen=None):
    """sum_n (1/n) E_{|A| = n} of the cost at each position: (T,), nothing of it at the frozen."""
    patterns, ce = costs(model, x, cfg)
    frozen = torch.zeros(len(x), dtype=torch.bool) if frozen is None else frozen
    allowed, size = ~(patterns & frozen).any(1), patterns.sum(1)
    return sum(ce[allowed & (size == n)].mean(0) / n for n in range(1, int((~frozen).sum()) + 1))


def any_order(model, x, cfg, frozen=None):
    """-log of the probability that revealing one random position at a time writes x: all orders."""
    patterns, ce = costs(model, x, cfg)
    place = 2 ** torch.arange(len(x) - 1, -1, -1)
    free = [i for i in range(len(x)) if frozen is None or not frozen[i]]
    total, orders = 0.0, list(itertools.permutations(free))
    for order in orders:
        hidden, nats = {*free}, 0.0
        for i in order:
            nats += ce[sum(place[j] for j in hidden), i]
            hidden.remove(i)
        total += math.exp(-nats) / len(orders)
    return -math.log(total)


ROWS = {"text, EOS, PAD": [0, 1, 1, 2, 2], "no EOS": [0, 1, 1, 0, 1], "nothing": [2, 2, 2, 2, 2]}


def parts_of(nats, x, cfg):
    return torch.stack([nats[(x != cfg.eos) & (x != cfg.vocab_size)].sum(), nats[
        x == cfg.eos].sum(), nats[x == cfg.vocab_size].sum()])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("K", [2, 5])
def test_the_bound_is_the_sum_over_all_masks(row, K):
    """(E1) Mean of nelbo = sum_n (1/n) E_{|A|=n} of the costs, as a whole and for text, EOS and
    PAD; it is above the exact likelihood in random order, by the enumeration of all orders."""
    cfg = config(seq_len=5)
    model, x0 = network(cfg, shake=0.8), torch.tensor([ROWS[row]])
    x = script.canvas_of(x0, cfg)[0]
    want = enumerated(model, x, cfg)
    nats, info = script.nelbo(model, x0.expand(3000, -1), cfg, generator(K), K)
    assert nats.shape == (3000,) and info["forwards"] == K
    assert near(nats, want.sum().item())
    for got, truth in zip(info["parts"].T, parts_of(want, x, cfg)):
        assert near(got, truth.item()) or got.abs().max() == truth == 0
    assert torch.allclose(info["parts"].sum(1), nats)
    assert want.sum() > any_order(model, x, cfg) + 1e-3


@pytest.mark.parametrize("frozen", [[1, 0, 0, 0, 0], [0, 1, 0, 1, 0], [1, 1, 1, 1, 0]])
def test_the_bound_of_the_rest_given_some_tokens(frozen):
    """(E1) With frozen tokens nelbo is the same sum over the masks of the others: never hidden,
    never charged; with one token left it is exact."""
    cfg = config(seq_len=5)
    model, x0 = network(cfg, shake=0.8), torch.tensor([[0, 1, 1, 2, 2]])
    x, frozen = script.canvas_of(x0, cfg)[0], torch.tensor(frozen).bool()
    want = enumerated(model, x, cfg, frozen)
    spy = Spy(model)
    nats, info = script.nelbo(spy, x0.expand(3000, -1), cfg, generator(1), 3,
                              frozen.expand(3000, -1))
    assert all((idx[:, frozen] == x[frozen]).all() for idx, _ in spy.given)
    if frozen.sum() == 4:
        assert torch.allclose(nats, want.sum(), atol=1e-5)
    else:
        assert near(nats, want.sum().item())
    assert want.sum() >= any_order(model, x, cfg, frozen) - 1e-6
    none, _ = script.nelbo(model, x0, cfg, generator(1), 3, torch.ones(1, 5).bool())
    assert none.item() == 0


def test_the_bound_of_a_perfect_model_is_the_likelihood():
    """(E1) All orders of the chain rule of one law agree, so the bound is tight: -log p(x0)."""
    cfg, model = config(), oracle()
    rows, p = language()
    for k in (0, 5, 40, 90):
        x = rows[k].masked_fill(rows[k] == 3, 2)  # EOS-filled
        nats, _ = script.nelbo(model, x.expand(2000, -1), cfg, generator(k), 6)
        assert near(nats, -p[k].log().item(), width=6)


@pytest.mark.parametrize("rows", ["docs", "stream"])
def test_a_model_that_knows_nothing_pays_for_every_position_alike(rows):
    """(E1) Uniform logits cost T ln(outputs), in every draw, PAD among the outputs of documents;
    and T ln V or less in the arm pipeline, where what follows the EOS is free."""
    cfg = config(rows=rows)
    x0, outputs = documents(cfg, 0, 2, 5, 6), 4 if rows == "docs" else 3
    nats, _ = script.nelbo(uniform(cfg), x0, cfg, generator(0), 3)
    assert torch.allclose(nats, torch.full_like(nats, 6 * math.log(outputs)))
    for seed in range(5):
        loss, _ = script.loss_fn(uniform(cfg), x0, cfg, generator(seed))
        assert loss.item() == pytest.approx(math.log(outputs), abs=1e-5)
    arm = dataclasses.replace(cfg, pipeline="arm")
    nats, _ = script.nelbo(uniform(arm), x0, arm, generator(0))
    count = torch.tensor([1, 3, 6, 6] if rows == "docs" else [6, 6, 6, 6])
    assert torch.allclose(nats, count.double() * math.log(3), atol=1e-5)
    loss, _ = script.loss_fn(uniform(arm), x0, arm, generator(0))
    assert loss.item() == pytest.approx(math.log(3), abs=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
def test_the_loss_is_the_bound_per_position(weight):
    """(E1) Without prompts and cuts its expectation is nelbo / T, for text, EOS and PAD too; with a
    weight for PAD, the weighted costs over the weights."""
    cfg = config(seq_len=5, pad_weight=weight)
    model, kinds = network(cfg, shake=0.8), torch.tensor(list(ROWS.values()))
    x0 = kinds.repeat(50, 1)
    exact = torch.stack([enumerated(model, x, cfg) for x in script.canvas_of(kinds, cfg)])
    parts = torch.stack([parts_of(nats, x, cfg) for nats, x in
                         zip(exact, script.canvas_of(kinds, cfg))]).mean(0)
    parts[2] *= weight
    pads = (script.canvas_of(kinds, cfg) == 3).sum().item()
    want = 3 * parts.sum() / (15 - pads + weight * pads)
    draws = [script.loss_fn(model, x0, cfg, generator(seed)) for seed in range(60)]
    assert near(torch.stack([loss for loss, _ in draws]), want.item())
    for name, truth in zip(("text", "eos", "pad"), parts.tolist()):
        got = torch.tensor([info[name] for _, info in draws])
        assert near(got, truth) or truth == got.abs().max() == 0
    info = draws[0][1]
    total = 3 * sum(info.values()) / (15 - (1 - weight) * pads)
    assert draws[0][0].item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("changes", [
    dict(p_cond=0.3, p_tail=0.3, p_pin=0.2), dict(pad_masked_perc=0.2, p_cond=0.5), dict(crop=1.0),
    dict(pad_weight=0.2, p_tail=0.5, crop=0.5), dict(head="hazard", p_tail=0.5),
    dict(head="pointer", p_tail=0.6, freeze=True), dict(attn_ratio=0.5), dict(pipeline="arm")])
def test_equal_shares_of_a_batch_average_to_its_loss_and_gradient(changes):
    """The noise is drawn for the whole batch, the weights count the whole batch."""
    cfg = config(**changes)
    model = network(cfg).requires_grad_(True)
    x0 = documents(cfg, *range(7), *range(5))

    def run(slices):
        model.zero_grad()
        losses = []
        for rows in slices:
            loss, _ = script.loss_fn(model, x0, cfg, generator(4), rows)
            (loss / len(slices)).backward()
            losses.append(loss.item())
        return sum(losses) / len(losses), {name: p.grad.clone() for name, p in
                                           model.named_parameters() if p.grad is not None}

    whole, gradients = run([slice(None)])
    assert math.isfinite(whole) and gradients
    for size in (6, 4, 1):
        loss, parts = run([slice(i, i + size) for i in range(0, 12, size)])
        assert loss == pytest.approx(whole, rel=1e-5)
        for name, a in gradients.items():
            assert torch.allclose(a, parts[name], atol=1e-5 * max(1.0, a.abs().max().item()))


def test_a_cut_only_cuts():
    """The network sees the first n tokens of the canvases, n from T // 3 + 1 to T and all alike,
    whatever stands there; without cuts always all; rows of a batch share their cut."""
    cfg = config(seq_len=12, crop=1.0)
    model, x0 = Spy(network(cfg)), documents(cfg, 3, 9, 12, 0)
    x, widths = script.canvas_of(x0, cfg), []
    for seed in range(300):
        script.loss_fn(model, x0, cfg, generator(seed))
        xt = model.given[-1][0]
        n = xt.shape[1]
        assert ((xt == x[:, :n]) | (xt == 4)).all()
        widths.append(n)
    counts = torch.tensor(widths).bincount(minlength=13)
    assert counts[:5].sum() == 0 and chi_square(counts[5:], torch.ones(8) / 8) > 1e-3
    some = dataclasses.replace(cfg, crop=0.25)
    for seed in range(300):
        script.loss_fn(model, x0, some, generator(seed))
    whole = sum(idx.shape[1] == 12 for idx, _ in model.given[300:])
    assert share_is(whole, 0.75 + 0.25 / 8, 300)


def test_the_causal_likelihood_is_exact_and_free_after_the_eos():
    """The arm pipeline pays for the text and its first EOS: probabilities of all documents sum to
    one, and the loss is the mean over the charged positions."""
    cfg = config(pipeline="arm", seq_len=4)
    model, rows = network(cfg, shake=0.8), all_rows(3, 4)
    nats, info = script.nelbo(model, rows, cfg, generator(0))
    first = ((rows == 2).cumsum(1) == 0).sum(1)
    ours = ((rows == 2) | (torch.arange(4) <= first[:, None])).all(1)  # EOS-filled
    assert info == dict(forwards=1) and ours.sum() == 1 + 2 + 4 + 8 + 16
    assert (-nats[ours]).exp().sum().item() == pytest.approx(1, abs=1e-5)
    tail = (rows[:, 0] == 2).nonzero()[:, 0]
    assert torch.allclose(nats[tail], nats[tail[0]].expand(len(tail)))
    x0 = rows[ours]
    loss, _ = script.loss_fn(model, x0, cfg, generator(0))
    charged = (first[ours] + 1).clamp(max=4).sum()
    assert loss.item() == pytest.approx((nats[ours].sum() / charged).item(), rel=1e-5)


# ---- 4. what diffusion begins with


@pytest.mark.parametrize("rows", ["docs", "stream"])
def test_the_adaptation_starts_at_the_causal_model(rows):
    """(E2) Ratio 0, position i and all later ones masked: log p(x_i) without PAD is the parent's,
    with the same weights."""
    arm = config(vocab_size=20, eos=19, bos=19, seq_len=8, pipeline="arm", rows=rows)
    parent = network(arm)
    child = script.Model(dataclasses.replace(arm, pipeline="diffusion"), parent.state_dict())
    x0 = documents(arm, 0, 3, 7, 8)
    nats, x = script.token_nll(parent, x0, arm), script.canvas_of(x0, arm)
    for i in range(8):
        xt = x.masked_fill(torch.arange(8) >= i, 21)
        logp = child(xt, seen=script.sees(9, 0.0))[:, i, :20].log_softmax(1)
        got = -logp.gather(1, x0[:, i, None])[:, 0]
        paid = script.charged(x0, arm)[:, i]
        assert (got - nats[:, i])[paid].abs().max() <= 1e-5 if paid.any() else True
        assert (nats[:, i][~paid] == 0).all()
    assert script.charged(x0, arm).sum(1).tolist() == ([1, 4, 8, 8] if rows == "docs" else 4 * [8])


def clock(cfg, text, first):
    """A network of no blocks that says the j-th token of `text` at its input first + j, BOS being
    input 0, and knows nothing elsewhere."""
    model = script.Model(dataclasses.replace(cfg, n_layer=0)).requires_grad_(False)
    wte, wpe = model.transformer.wte.weight, model.transformer.wpe.weight
    wte.zero_()
    wpe.zero_()
    wte[:model.outputs, :model.outputs] = torch.eye(model.outputs)
    model.transformer.ln_f.weight.fill_(20.0)
    for j, token in enumerate(text):
        if first + j < len(wpe):
            wpe[first + j, token] = 1000.0
    return model


@pytest.mark.parametrize("shift", [True, False])
def test_museum_a_shift_too_few_or_too_many(shift):
    """(E2) A network that says token i right before it costs nothing under the shift and more than
    a nat without, and the other way round; one place further (the audited double shift: once in the
    data, once in the loss) is wrong in the loss, the bound and the law of lengths alike."""
    cfg = config(vocab_size=8, eos=7, bos=7, seq_len=7, shift=shift)
    text = [0, 3, 1, 5, 2, 7]  # EOS at 5, then PAD
    x0 = torch.tensor([text + [7]])
    for first in range(3):
        model = clock(cfg, text + [8], first)
        loss, _ = script.loss_fn(model, x0, cfg, generator(0))
        nats, _ = script.nelbo(model, x0, cfg, generator(0), 7)
        logp = script.length_law(model, x0, torch.tensor([2]), cfg)[0]
        right = first == (0 if shift else 1)
        assert (loss.item() < 0.01) == right and (loss.item() > 1) == (not right)
        assert (nats.item() < 0.01) == right and (nats.item() > 7) == (not right)
        assert (logp[5].exp() > 0.99).item() == right
    arm = dataclasses.replace(cfg, pipeline="arm")  # always shifted
    paid = [script.token_nll(clock(arm, text, first), x0, arm).sum().item() for first in range(3)]
    assert paid[0] < 0.01 and min(paid[1:]) > 6


# ---- 5. corruption


WIDE = dict(vocab_size=50, eos=49, bos=49)


def corrupted(x0, cfg, seed=0):
    x = script.canvas_of(x0, cfg)
    xt, is_mask, maskable, t = script.corrupt(x, cfg, generator(seed))
    assert torch.equal(xt, torch.where(is_mask, cfg.vocab_size + 1, x))
    assert not (is_mask & ~maskable).any() and xt.dtype == x.dtype
    assert torch.allclose(t, is_mask.sum(1) / maskable.sum(1).clamp(min=1))
    return x, is_mask, maskable, t


def test_what_follows_the_first_eos_is_pad():
    """canvas_of turns EOS-filled rows into text, one EOS, PADs; windows of a stream stay."""
    cfg = config()
    x0 = torch.tensor([[2, 2, 2, 2, 2, 2], [0, 1, 2, 2, 2, 2], [0, 1, 0, 1, 0, 2], 6 * [1]])
    want = [[2, 3, 3, 3, 3, 3], [0, 1, 2, 3, 3, 3], [0, 1, 0, 1, 0, 2], 6 * [1]]
    before = x0.clone()
    assert script.canvas_of(x0, cfg).tolist() == want and torch.equal(x0, before)
    assert script.lengths(script.canvas_of(x0, cfg), cfg).tolist() == [0, 2, 5, 6]
    assert torch.equal(script.canvas_of(x0, dataclasses.replace(cfg, rows="stream")), x0)


def test_plain_rows_hide_every_number_of_positions_alike():
    """Levels are on a comb, sizes uniform over 1..T whatever the row, subsets of a size all alike;
    PADs and EOS are hidden as often as text."""
    cfg = config()
    x0 = documents(cfg, 2, 6, 0, 5).repeat(3000, 1)
    x, is_mask, maskable, t = corrupted(x0, cfg)
    n = is_mask.sum(1)
    assert maskable.all()
    for kind in range(4):
        assert chi_square(n[kind::4].bincount(minlength=7)[1:], torch.ones(6) / 6) > 1e-3
    assert (n.bincount(minlength=7)[1:] - 2000).abs().max() <= 1  # the comb
    code = (is_mask[n == 3] * 2 ** torch.arange(6)).sum(1).bincount(minlength=64)
    assert chi_square(code[code > 0], torch.ones(20) / 20) > 1e-3
    assert (is_mask.float().mean(0) - 3.5 / 6).abs().max() < 5 * 0.5 / len(x0) ** 0.5


KINDS = dict(p_cond=0.3, p_tail=0.25, p_pin=0.2)


def test_rows_come_in_four_kinds():
    """Prompts are clean in cond, tail and pin rows; tail rows hide all else, pin rows all but the
    EOS; shares are those of the Config within five sigma; prompts have 1 to min(L, T / 2) tokens,
    each number alike, and never hold the EOS."""
    cfg, B, L = config(**WIDE, seq_len=16, **KINDS), 8000, 8
    x, is_mask, maskable, t = corrupted(documents(cfg, *[L] * B), cfg)
    given, pin = ~maskable[:, 0], ~maskable[:, L]
    assert share_is(given.sum(), 0.75, B) and share_is(pin.sum(), 0.2, B)
    m = (~maskable[:, :L]).cumprod(1).sum(1)
    assert (m[~given] == 0).all() and m.max() == L
    assert chi_square(m[given].bincount(minlength=L + 1)[1:], torch.ones(L) / L) > 1e-3
    want = (torch.arange(16) >= m[:, None]) & ~(pin[:, None] & (torch.arange(16) == L))
    assert torch.equal(maskable, want)
    assert (is_mask[pin] == maskable[pin]).all() and (t[pin] == 1).all()
    whole = (is_mask == maskable).all(1) & given & ~pin  # tail rows, and cond rows by chance
    chance = sum(1 / (16 - k) for k in range(1, L + 1)) / L
    assert share_is(whole.sum(), 0.25 + 0.3 * chance, B)
    n = is_mask.sum(1)[given & ~pin & (m == 4)]
    assert share_is((n < 12).sum(), 11 / 12 * 0.3 / 0.55, len(n))  # cond rows hide 1..N alike


@pytest.mark.parametrize("L", [0, 1, 7, 8, 12, 15, 16])
def test_prompts_end_before_the_document_and_the_middle(L):
    """Where the end is hidden the prompt has 1 to min(L, T / 2) tokens and all else is hidden; an
    empty document has none; one without EOS up to T / 2."""
    cfg = config(**WIDE, seq_len=16, p_tail=1.0)
    x, is_mask, maskable, t = corrupted(documents(cfg, *[L] * 1500), cfg)
    hidden = is_mask[:, min(L, 15)]
    m = (~is_mask).cumprod(1).sum(1)[hidden]
    longest = min(L, 8)
    assert set(m.tolist()) <= {0} if L == 0 else set(m.tolist()) == set(range(1, longest + 1))
    assert torch.equal(is_mask[hidden], torch.arange(16) >= m[:, None]) and (t[hidden] == 1).all()
    assert hidden.all() or L < 8  # there is room for every prompt


def test_museum_only_pads_were_masked():
    """The audited mask was inverted: ~(ids != pad) may be hidden. Here the text is, and a position
    is charged only if it is hidden: a network that is wrong about visible tokens costs nothing."""
    cfg = config(**WIDE, seq_len=16)
    x, is_mask, maskable, t = corrupted(documents(cfg, *[9] * 500), cfg)
    text = x < 49
    assert maskable[text].all() and 0.4 < is_mask[text].float().mean() < 0.7
    assert (x[is_mask] < 49).any() and (x[is_mask] == 50).any()
    cfg, row = config(seq_len=5), torch.tensor([[0, 1, 1, 2, 2]])
    wrong = clock(cfg, [0, 0, 1, 0, 0], 0)
    shown = torch.tensor([[False, True, False, True, True]])  # it is wrong there
    for seed in range(10):
        assert script.nelbo(wrong, row, cfg, generator(seed), 3, shown)[0].item() < 0.01
        assert script.nelbo(wrong, row, cfg, generator(seed), 3, ~shown)[0].item() > 1


def test_museum_the_reciprocal_of_a_reciprocal():
    """The audited weight was 1 / (1 / t) = t. With 1 / t a row of one mask pays T times its cost,
    so that uniform logits cost the same at every level; with t they would not."""
    cfg = config(seq_len=20)
    x0, model = documents(cfg, 20), uniform(config(seq_len=20))
    losses, levels = [], []
    for seed in range(40):
        losses.append(script.loss_fn(model, x0, cfg, generator(seed))[0].item())
        levels.append(corrupted_level(x0, cfg, seed))
    assert max(losses) - min(losses) < 1e-5 and max(levels) - min(levels) > 0.8
    assert losses[0] == pytest.approx(math.log(4), abs=1e-5)


def corrupted_level(x0, cfg, seed):
    g = generator(seed)
    torch.rand(2, generator=g)  # the cut
    return script.corrupt(script.canvas_of(x0, cfg), cfg, g)[3].item()


def test_museum_a_real_token_that_equals_the_mask(tmp_path, theirs):
    """Masks recognised by their id (audited in DiffuGPT) would charge real text that holds token
    --mask-id; ours is a row of its own, so such tokens stay visible and free."""
    folder = write(tmp_path / "them", tensors_of(theirs), n_head=2)
    cfg = gpt_config(init_from=folder, mask_id=4, rows="stream")
    model = script.Model(cfg, script.start(cfg, tmp_path)).requires_grad_(False)
    x0 = torch.tensor([[4, 4, 1, 4, 4, 2, 4, 4, 4]])
    frozen = x0 == 4
    spy = Spy(model)
    many = (part.expand(2000, -1) for part in (x0, frozen))
    nats, _ = script.nelbo(spy, next(many), cfg, generator(0), 2, next(many))
    assert near(nats, enumerated(model, x0[0], cfg, frozen[0]).sum().item())
    assert all((idx[:, frozen[0]] == 4).all() for idx, _ in spy.given)
    x, is_mask, maskable, t = corrupted(x0.expand(400, -1), cfg)
    assert maskable.all() and not is_mask[:, 0].all() and is_mask[:, 0].any()


@pytest.mark.parametrize("s", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("kind", ["tail", "any"])
def test_the_share_of_pads_among_the_masks(s, kind):
    """With pad_masked_perc s, the PADs are s of what is hidden within five sigma, the others are
    shown; the level counts what may be hidden only."""
    cfg = config(**WIDE, seq_len=40, pad_masked_perc=s, p_tail=float(kind == "tail"))
    B, L = 3000, 24
    x, is_mask, maskable, t = corrupted(documents(cfg, *[L] * B), cfg)
    pad = x == 50
    text = (maskable & ~pad).sum(1).double()
    keep = s / (1 - s) * text / pad.sum(1)
    pads = (maskable & pad).sum(1)
    sigma = (pad.sum(1) * keep * (1 - keep)).sum().sqrt()
    assert abs((pads - keep * pad.sum(1)).sum()) <= 5 * sigma
    got = (is_mask & pad).sum() / is_mask.sum()
    assert abs(got - s) <= 5 * math.sqrt(s * (1 - s) / is_mask.sum()) + 1e-9
    assert (t == 1).all() if kind == "tail" else 0.45 < t.mean() < 0.6
    full = documents(cfg, 39, 40, 38)  # no PAD or one: nothing to divide by
    _, _, maskable, _ = corrupted(full, cfg)
    assert maskable[:2].all() if kind == "any" else True


def test_natural_pads():
    """At -1 every PAD may be hidden and their share among masks is their share of the canvas."""
    cfg = config(**WIDE, seq_len=40)
    x, is_mask, maskable, t = corrupted(documents(cfg, *[11] * 2000), cfg)
    got, want = (x[is_mask] == 50).double().mean().item(), 28 / 40
    assert maskable.all()
    assert abs(got - want) < 5 * math.sqrt(want * (1 - want) / is_mask.sum().item())


@pytest.mark.parametrize("head", ["marginal", "hazard", "pointer"])
@pytest.mark.parametrize("changes", [
    KINDS, {}, dict(p_pin=1.0), dict(p_tail=1.0), dict(crop=1.0, p_cond=1.0),
    dict(pad_masked_perc=0.1, p_tail=0.5), dict(pad_masked_perc=0.0), dict(pad_weight=0.0)])
def test_rows_without_eos_or_without_text_give_finite_losses(head, changes):
    """Empty documents, those that fill the canvas with and without their EOS, in every setting:
    loss and gradient are finite, whatever is hidden."""
    cfg = config(head=head, **changes)
    model = network(cfg).requires_grad_(True)
    x0 = documents(cfg, 0, 1, 4, 5, 6, 6)
    for seed in range(30):
        loss, info = script.loss_fn(model, x0, cfg, generator(seed))
        assert math.isfinite(loss.item()) and all(map(math.isfinite, info.values())), seed
        loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("head", ["marginal", "hazard"])
def test_a_batch_of_which_nothing_can_be_hidden_costs_nothing(head):
    """Two empty documents that should begin with a prompt: the loss is finite, its gradient too."""
    cfg = config(head=head, p_tail=1.0, pad_weight=0.5)
    model = network(cfg).requires_grad_(True)
    for seed in range(5):
        loss, _ = script.loss_fn(model, documents(cfg, 0, 0), cfg, generator(seed))
        loss.backward()
        assert math.isfinite(loss.item())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_ramps_depend_on_the_step_alone():
    """min(1, (step + 1) / steps) times its end for attention, tails and PADs; 0 steps: at once;
    natural PADs stay natural; the arm pipeline knows none."""
    cfg = config(attn_ratio=0.8, attn_annealing_steps=10, p_tail=0.3, tail_annealing_steps=4,
                 pad_masked_perc=0.2, pad_annealing_steps=5, pad_weight=0.7)
    for step in (0, 1, 3, 4, 9, 10, 1000):
        now = script.at_step(cfg, step)
        want = dict(attn_ratio=0.8 * min(1, (step + 1) / 10), p_tail=0.3 * min(1, (step + 1) / 4),
                    pad_masked_perc=0.2 * min(1, (step + 1) / 5))
        assert {k: getattr(now, k) for k in want} == pytest.approx(want)
        assert dataclasses.replace(now, **{k: getattr(cfg, k) for k in want}) == cfg
    assert cfg.attn_ratio == 0.8  # the Config itself, that of evaluation, is as it was
    at_once = config(attn_annealing_steps=0, p_tail=0.3, pad_masked_perc=0.1)
    assert script.at_step(at_once, 0) == at_once
    natural = config(pad_annealing_steps=9, attn_annealing_steps=0)
    assert script.at_step(natural, 0).pad_masked_perc == -1
    arm = dataclasses.replace(cfg, pipeline="arm")
    assert script.at_step(arm, 0) == arm


# ---- 6. the law of lengths


def test_a_perfect_model_tells_the_length_at_once():
    """(E3) Nothing written: p_i(EOS) = P(L = i), p_i(PAD) = P(L < i), after every prompt too."""
    rows, p = language()
    model = oracle()
    for prompt in ([], [0], [1], [0, 1], [1, 1, 0]):
        prompt = torch.tensor(prompt, dtype=torch.long)
        m = len(prompt)
        marginals = model(torch.cat((prompt, torch.full((6 - m,), 4)))[None])[0].exp()
        law = true_law(rows, p, prompt)
        assert torch.allclose(marginals[m:, 2], law[m:6], atol=1e-8)
        assert torch.allclose(marginals[m:, 3], law.cumsum(0)[m - 1:5] if m else
                              F.pad(law.cumsum(0)[:5], (1, 0)), atol=1e-8)


def test_hazards_give_the_law_of_lengths():
    """(E4) p(EOS) / (1 - p(PAD)) is P(L = i | L >= i): length_law equals P(L | prompt) to 1e-6,
    sums to one, knows that a prompt is not the end and puts what is longer in column T."""
    rows, p = language()
    cfg, model = config(), oracle()
    x, m, want = [], [], []
    for row, size in ((0, 0), (40, 1), (80, 2), (100, 3), (126, 4), (126, 6), (63, 1)):
        prompt = rows[row, :size]
        assert (prompt < 2).all()
        x.append(torch.cat((prompt, torch.full((6 - size,), 1))))  # the rest is not looked at
        m.append(size)
        want.append(true_law(rows, p, prompt))
    x, m, want = torch.stack(x), torch.tensor(m), torch.stack(want)
    got = script.length_law(model, x, m, cfg)
    assert got.shape == (7, 7) and not torch.equal(want[1], want[2])
    assert torch.allclose(got.double().exp(), want, atol=1e-6)
    assert torch.allclose(got.double().exp().sum(1), torch.ones(7).double(), atol=1e-6)
    assert all((got[k, :m[k]] == -torch.inf).all() for k in range(7))
    assert got[5, 6].item() == pytest.approx(0, abs=1e-6)  # the prompt fills the canvas
    changed = torch.where(torch.arange(6) < m[:, None], x, 0)
    assert torch.equal(script.length_law(model, changed, m, cfg), got)


def test_the_product_of_complements_is_not_the_law():
    """(E4) Negative control: prod (1 - p_i(EOS)), without PAD, leaves much more to what is longer
    and is no law of L."""
    rows, p = language()
    marginals = oracle()(torch.full((1, 6), 4))[0].exp()
    survive = (1 - marginals[:, 2]).cumprod(0)
    naive = F.pad(survive, (1, 0))[:6] * marginals[:, 2]
    law = true_law(rows, p, torch.zeros(0, dtype=torch.long))
    assert survive[-1] > law[6] + 0.2 and (naive - law[:6]).abs().max() > 0.05


def test_a_law_without_pads_is_that_of_windows():
    """(E4) In a stream there is no PAD to leave out: the hazard is p(EOS) itself."""
    cfg = config(rows="stream")
    model = network(cfg)
    x, m = torch.zeros(2, 6, dtype=torch.long), torch.tensor([0, 2])
    got = script.length_law(model, x, m, cfg).exp()
    for row in range(2):
        h = model(x[row:row + 1].masked_fill(torch.arange(6) >= m[row], 4))[0].softmax(1)[:, 2]
        left = 1.0
        for i in range(6):
            want = left * h[i] if i >= m[row] else torch.tensor(0.0)
            assert got[row, i].item() == pytest.approx(want.item(), abs=1e-5)
            left -= want
        assert got[row, 6].item() == pytest.approx(left.item(), abs=1e-5)


def brute_law(score, longer, m, head):
    """log P(L) from scores (T,) by multiplying probabilities, in a loop."""
    p, left = [], torch.ones((), dtype=score.dtype)
    if head == "pointer":
        every = torch.cat((score[m:].exp(), longer.exp()))
        return torch.cat((torch.full((m,), -torch.inf), (every / every.sum()).log()))
    for i, s in enumerate(score):
        h = 1 / (1 + (-s).exp()) if i >= m else torch.zeros(())
        p.append(left * h)
        left = left * (1 - h)
    return torch.stack([*p, left]).log()


@HEADS
def test_the_law_of_a_length_head(head):
    """(E4) Hazard and pointer heads give a law that sums to one and starts behind the prompt; its
    values and gradients are those of a loop; no EOS on the canvas costs -log(1 - CDF)."""
    cfg, g = config(head=head), generator(0)
    model = script.Model(cfg)
    for part in (model.length_head.weight, model.length_head.bias, model.length_bias):
        part.data = torch.randn(part.shape, generator=g)
    h, m = torch.randn(5, 6, 16, generator=g), torch.tensor([0, 1, 3, 5, 6])
    L = torch.tensor([2, 6, 3, 5, 6])
    logp = script.law_of_head(model, h, m, cfg)
    assert logp.shape == (5, 7) and logp.dtype == torch.float32
    assert torch.allclose(logp.exp().sum(1), torch.ones(5), atol=1e-6)
    cdf = logp.exp()[:, :6].sum(1)
    assert torch.allclose(logp[:, 6].exp(), 1 - cdf, atol=1e-6)
    parts = [model.length_head.weight, model.length_head.bias] + (
        [model.length_bias] if head == "pointer" else [])
    got = torch.autograd.grad(-logp.gather(1, L[:, None]).sum(), parts)
    brute = [brute_law(model.length_head(h[k])[:, 0], model.length_bias, int(m[k]), head)
             for k in range(5)]
    for k in range(5):
        assert torch.allclose(logp[k], brute[k], atol=1e-5)
    want = torch.autograd.grad(-sum(brute[k][L[k]] for k in range(5)), parts)
    for a, b in zip(got, want):
        assert a.isfinite().all() and torch.allclose(a, b, atol=1e-4) and b.abs().max() > 0.01


@HEADS
def test_length_law_reads_the_head(head):
    """What length_law says with a head is law_of_head of the states before the hidden tokens."""
    cfg = config(head=head)
    model, m = network(cfg), torch.tensor([0, 2, 4])
    x = documents(cfg, 5, 5, 5)
    hidden = x.masked_fill(torch.arange(6) >= m[:, None], 4)
    want = script.law_of_head(model, model.trunk(hidden)[:, :-1], m, cfg)
    got = script.length_law(model, x, m, cfg)
    assert torch.allclose(got, want) and got.exp().sum(1).allclose(torch.ones(3))
    plain = script.length_law(model, x, m, dataclasses.replace(cfg, head="marginal"))
    assert not torch.allclose(got[0], plain[0], atol=1e-2)


@HEADS
def test_the_head_learns_from_rows_that_hide_all_behind_their_prompt(head):
    """The loss grows by -log P(L) of exactly these rows, the longer ones by -log P(longer), over
    the batch; pin rows, which show the EOS, teach nothing."""
    cfg = config(head=head, p_tail=0.5, p_pin=0.3)
    model, x0 = network(cfg), documents(cfg, 0, 1, 2, 3, 4, 5, 6, 6, 3, 2)
    x, L = script.canvas_of(x0, cfg), torch.tensor([0, 1, 2, 3, 4, 5, 6, 6, 3, 2])
    plain, seen = dataclasses.replace(cfg, head="marginal"), 0
    for seed in range(20):
        g = generator(seed)
        torch.rand(2, generator=g)
        xt, is_mask, _, _ = script.corrupt(x, cfg, g)
        want = 0.0
        for k in range(10):
            m = int((xt[k] != 4).float().cumprod(0).sum())
            if (xt[k, m:] == 4).all() and m <= L[k]:
                h = model.trunk(xt[k:k + 1])[:, :-1]
                want -= script.law_of_head(model, h, torch.tensor([m]), cfg)[0, L[k]].item() / 10
                seen += 1
        both = script.loss_fn(model, x0, cfg, generator(seed))[0].item()
        base = script.loss_fn(model, x0, plain, generator(seed))[0].item()
        assert both - base == pytest.approx(want, abs=1e-4)
        alone = script.loss_fn(model, x0, dataclasses.replace(cfg, freeze=True), generator(seed))
        assert alone[0].item() == pytest.approx(want, abs=1e-4)
    assert 60 < seen < 160


@HEADS
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_frozen_trunk_does_not_move(head, optimizer):
    """freeze trains the head and nothing else, weight decay included."""
    cfg = config(head=head, freeze=True, optimizer=optimizer, p_tail=0.8, weight_decay=0.1)
    model = network(cfg).requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    optimizers = script.make_optimizers(model, cfg)
    for seed in range(3):
        script.loss_fn(model, documents(cfg, 1, 2, 3, 6), cfg, generator(seed))[0].backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"length_head.weight", "length_head.bias"} | (
        {"length_bias"} if head == "pointer" else set())


class Told(Oracle):
    """A perfect model with one more number: what the logit of the EOS at place 2 gains."""

    def aligned(self, idx, seen=None):
        gain = F.one_hot(torch.tensor(2), idx.shape[1])[:, None] * F.one_hot(
            torch.tensor(2), self.outputs)
        return super().aligned(idx, seen) + self.nothing * gain


@pytest.mark.parametrize("crop", [0.0, 1.0])
def test_prompts_do_not_tell_the_length(crop):
    """(E3) Training with prompts has its minimum at the true law: at the perfect model of documents
    of 2 or 8 letters the mean gradient of the logit of EOS is zero. It is not if prompts of
    1..min(L, T / 2) tokens count alike: a short document then owns more of the short prompts."""
    cfg = config(seq_len=12, p_tail=1.0, crop=crop)
    x0 = documents(cfg, 2, 8).masked_fill(documents(cfg, 2, 8) < 2, 0)
    model = Told(script.canvas_of(x0, cfg), torch.ones(2) / 2, outputs=4)
    gradients = []
    for seed in range(60):
        loss, _ = script.loss_fn(model, x0.repeat(50, 1), cfg, generator(seed))
        gradients.append(torch.autograd.grad(loss, model.nothing)[0])
    assert near(torch.cat(gradients), 0.0)


def patched_rows(monkeypatch, rows, sizes=()):
    """get_eval_rows gives these EOS-filled rows; the training documents have these lengths."""
    monkeypatch.setattr(script, "get_eval_rows", lambda split, cfg, n: (rows[:n], None))
    offsets = np.concatenate(([0], np.cumsum(np.array(sizes, dtype=np.int64) + 1)))
    with_data(monkeypatch, train=(None, offsets, None))


def test_eos_never_wins_though_the_law_is_exact(monkeypatch):
    """(E5) With seven lengths equally likely a perfect model never says EOS at its place before it
    sees text, though its law costs exactly the entropy ln 7; (E3) makes no gap; PADs that are
    visible give the place away."""
    rows, p = language()
    cfg = config(prompt_tokens=0)
    pick = torch.multinomial(p, 700, True, generator=generator(3))
    patched_rows(monkeypatch, rows[pick].masked_fill(rows[pick] == 3, 2), range(7))
    out = script.length_report(oracle(), cfg, n=700)
    law = out[0][1]
    assert law["nats"] == pytest.approx(math.log(7), abs=1e-5) and law["of"] == "law"
    assert law["coherence_gap"] < 1e-6 and 0 < law["pad_recall"] < 1
    assert out[1][1]["nats"] == pytest.approx(math.log(7), abs=1e-5)  # one document of each length
    eos = {(row["revealed"], row["pads"]): row for kind, row in out if kind == "eos"}
    assert len({share for share, _ in eos}) >= 5 and eos[0.0, False]["token"] == 0
    at = oracle()(torch.full((1, 6), 4))[0]
    assert not (at.argmax(1) == 2).any()
    assert eos[0.75, True]["position"] > eos[0.75, False]["position"]
    assert eos[1.0, True]["position"] == 1 and eos[1.0, True]["token"] > 0.9  # a leak
    one = Oracle(rows[20:21], torch.ones(1), outputs=4)
    patched_rows(monkeypatch, rows[20:21].masked_fill(rows[20:21] == 3, 2), range(7))
    assert script.length_report(one, cfg, n=1)[2][1]["token"] == 1  # it wins where L is sure


def test_prompts_of_a_report(monkeypatch):
    """m is prompt_tokens, or all of a shorter document, never its EOS; L is T where it was cut."""
    cfg = config(prompt_tokens=3)
    patched_rows(monkeypatch, documents(cfg, 0, 2, 3, 5, 6))
    x, m, L = script.prompts("val", cfg, 5)
    assert m.tolist() == [0, 2, 3, 3, 3] and L.tolist() == [0, 2, 3, 5, 6]
    assert torch.equal(x, script.canvas_of(documents(cfg, 0, 2, 3, 5, 6), cfg))


# ---- 7. reports and benchmarks


def test_a_law_is_judged_by_hand():
    """Nats, coverage, looseness and distance of hand-made laws over 0..4 and longer."""
    sure = torch.eye(6)[[2, 4, 5]].log()
    got = script.judge_law(sure, torch.tensor([2, 4, 5]), config(q=0.9))
    assert got == dict(nats=0, nats_se=0, coverage=1, looseness=0, distance=0)
    wrong = script.judge_law(sure.clamp(min=-20), torch.tensor([3, 4, 5]), config(q=0.9))
    assert (wrong["coverage"], wrong["looseness"]) == pytest.approx((2 / 3, -1 / 3))
    assert wrong["distance"] == pytest.approx(1 / 3) and wrong["nats"] == pytest.approx(20 / 3)
    p = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.1, 0.1], dtype=torch.float64).log().repeat(2, 1)
    L = torch.tensor([1, 4])
    for q, canvas in ((0.1, 0), (0.3, 1), (0.31, 2), (0.6, 2), (0.8, 3), (0.9, 4), (0.95, 5)):
        got = script.judge_law(p, L, config(q=q + 1e-10))
        assert got["coverage"] == ((canvas >= 1) + (canvas >= 4)) / 2
        assert got["looseness"] == pytest.approx(canvas - 2.5)
        assert got["distance"] == pytest.approx((1 + 2) / 2)  # the median is 2
        assert got["nats"] == pytest.approx(-(math.log(0.2) + math.log(0.1)) / 2)
    assert got["nats_se"] == pytest.approx(math.log(2) / 2)


def test_a_calibrated_law_covers_as_often_as_it_says():
    """Documents drawn from the law itself are held with probability q, or as its steps allow."""
    rows, p = language()
    law = torch.zeros(7, dtype=torch.float64).index_add(0, length_of(rows), p)
    L = torch.multinomial(law, 4000, True, generator=generator(0))
    for q, reached in ((0.5, 4 / 7), (0.7, 5 / 7), (0.9, 1.0)):
        got = script.judge_law(law.log().expand(4000, -1), L, config(q=q))
        assert share_is(round(got["coverage"] * 4000), reached, 4000)
        assert abs(got["nats"] - math.log(7)) < 1e-9


def test_the_lengths_of_the_training_documents(monkeypatch):
    """known_law counts documents by their length without EOS, and one more of each; cut ones are
    longer; a prompt of m tokens leaves L >= m."""
    cfg = config()
    patched_rows(monkeypatch, documents(cfg, 1), [0, 2, 2, 2, 5, 6, 9, 40])
    count = torch.tensor([2.0, 1, 4, 1, 1, 2, 4])
    got = script.known_law(cfg, torch.tensor([0, 2, 6]))
    assert torch.allclose(got[0].exp(), count / 15)
    assert torch.allclose(got[1].exp(), torch.cat((torch.zeros(2), count[2:] / 12)))
    assert torch.allclose(got[2].exp(), torch.eye(7)[6])


def test_wilson_intervals():
    """Against published values (Newcombe 1998, table I, method 3) and at the ends."""
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert script.wilson(right, n) == pytest.approx([low, high], abs=1e-4)
    assert script.wilson(20, 20) == pytest.approx([1 - 0.1611, 1.0], abs=1e-4)


def test_rouge_by_hand():
    """F1 of words, pairs and the longest common subsequence; repeated words count once each."""
    assert script.rouge("the cat sat", "the cat sat") == [1, 1, 1]
    assert script.rouge("a b", "c d") == script.rouge("", "a") == script.rouge("", "") == [0, 0, 0]
    assert script.rouge("the cat sat on", "on the cat lay") == pytest.approx([3 / 4, 1 / 3, 2 / 4])
    assert script.rouge("the the the", "the dog") == pytest.approx([2 / 5, 0, 2 / 5])
    assert script.rouge("a b c d", "a x b y c") == pytest.approx([6 / 9, 0, 6 / 9])


GOOD = dict(cloze='{"prefix": "a", "target": "b", "id": 7}',
            choice='{"prefix": "a", "choices": ["b", "c"], "gold": 1}',
            infill='{"prefix": "a", "middle": "b", "suffix": "c"}')


def test_items_of_a_benchmark(tmp_path):
    """JSON lines of each kind, blank lines aside, at most `limit` (0: all); a text is a cloze whose
    targets are the last words."""
    path = tmp_path / "items"
    for kind, line in GOOD.items():
        path.write_text(f"{line}\n\n{line}\n{line}\n")
        wanted = json.loads(line)
        wanted.pop("id", None)
        assert script.read_items(kind, path, 0) == 3 * [wanted]
        assert script.read_items(kind, path, 2) == 2 * [wanted]
    path.write_text('the cat sat on the mat\n"Go," he said .\n')
    assert script.read_items("cloze", path, 0) == [
        dict(prefix="the cat sat on the", target="mat"), dict(prefix='"Go," he said', target=".")]


@pytest.mark.parametrize("kind, line", [
    ("cloze", '{"prefix": "a"}'), ("cloze", "word"), ("cloze", '{"prefix": '),
    ("choice", '{"prefix": "a", "choices": ["b"], "gold": 1}'), ("infill", "[1]"),
    ("choice", '{"prefix": "a", "choices": ["b"], "gold": "b"}'), ("infill", "the text"),
    ("choice", '{"prefix": "a", "choices": 3, "gold": 0}'), ("infill", GOOD["cloze"])])
def test_a_line_that_is_no_item_is_named(kind, line, tmp_path):
    """One sentence with the number of the line and what it needs."""
    path = tmp_path / "items"
    path.write_text(f"{GOOD[kind]}\n{line}\n")
    with pytest.raises(UserError, match="line 2 is no " + kind) as error:
        script.read_items(kind, path, 0)
    assert "\n" not in str(error.value)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no items"):
        script.read_items(kind, path, 0)
    with pytest.raises(UserError, match="cannot read"):
        script.read_items(kind, tmp_path / "none", 0)


LETTERS = " abcdefghijklmnopqrstuvwxyz"


class Letters:
    """A tokenizer of letters and the space; EOS is 27."""
    vocab_size, eos = 28, 27

    def encode(self, text):
        return [LETTERS.index(c) for c in text]

    def decode(self, ids):
        return "".join(LETTERS[i] for i in ids if i < 27)


SENTENCES = ["the cat sat on the mat", "a dog ran to the old barn", "my friend sang"]


def reader(cfg):
    """The perfect model of three sentences."""
    rows = [Letters().encode(s) + [27] + (cfg.seq_len - len(s) - 1) * [28] for s in SENTENCES]
    return Oracle(torch.tensor(rows), torch.ones(3) / 3, outputs=29)


def bench_config(**changes):
    return config(vocab_size=28, eos=27, bos=27, seq_len=30, order="maxprob", bench_n=50, **changes)


@pytest.mark.parametrize("order", ["maxprob", "random"])
def test_a_perfect_model_gets_every_item_right(order, tmp_path):
    """cloze with and without the number of tokens, choices of different lengths, infilling: all
    right, with Wilson's interval, in the file's name and number of items."""
    items = dict(
        cloze=[dict(prefix="the cat", target="sat")] + [  # six tokens say more than its target
            dict(prefix=s.rsplit(" ", 1)[0], target=s.rsplit(" ", 1)[1]) for s in SENTENCES[1:]],
        choice=[dict(prefix=s.rsplit(" ", 1)[0], choices=["hat", s.rsplit(" ", 1)[1], "xylophone"],
                     gold=1) for s in SENTENCES],
        infill=[dict(prefix=s.split(" ", 1)[0], middle=s.split(" ")[1],
                     suffix=s.split(" ", 2)[2]) for s in SENTENCES])
    for kind, lines in items.items():
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        cfg = bench_config(bench=f"{kind}:{path}")
        cfg.order = order
        row = script.bench(reader(cfg), cfg, Letters())
        names = dict(cloze=["oracle", "free"], choice=["per_token", "sum"],
                     infill=["oracle", "rouge_1", "rouge_2", "rouge_l"])[kind]
        assert (row["bench"], row["file"], row["n"]) == (kind, path.name, 3)
        assert {k for k in row if k not in ("bench", "file", "n") and "_interval" not in k} == set(
            names)
        assert row[names[0]] == row[names[1]] == 1
        assert row[f"{names[0]}_interval"] == pytest.approx(script.wilson(3, 3))


@pytest.mark.parametrize("quota", ["even", "ancestral"])
def test_a_benchmark_writes_one_token_a_call(quota, tmp_path):
    """Whatever quota, steps and canvas samples have: a call for each hole of the oracle's word, and
    one for each of the six that are free."""
    path = tmp_path / "items"
    path.write_text(SENTENCES[0])
    cfg = bench_config(bench=f"cloze:{path}", quota=quota, sampling_steps=5, canvas="pin",
                       max_new_tokens=2)
    model = Spy(reader(cfg))
    script.bench(model, cfg, Letters())
    assert len(model.given) == 4 + 6


def test_a_model_that_is_wrong_gets_nothing_right(tmp_path):
    """The same items, with another last word, are all wrong; one right of two is a half."""
    path = tmp_path / "items"
    path.write_text("\n".join(s.rsplit(" ", 1)[0] + " zebra" for s in SENTENCES))
    cfg = bench_config(bench=f"cloze:{path}")
    row = script.bench(reader(cfg), cfg, Letters())
    assert row["oracle"] == row["free"] == 0
    path.write_text("the cat sat on the mat\nthe cat sat on the hat")
    assert script.bench(reader(cfg), cfg, Letters())["oracle"] == 0.5


def test_an_option_is_not_favoured_for_its_length(tmp_path, monkeypatch):
    """Equal costs per token are equal, exactly so for a uniform model and every draw (no draw hides
    nothing); a dearer token loses per token, however short its option."""
    path = tmp_path / "items"
    lines = [dict(prefix="the cat", choices=["a", "ab", "abcdefgh", "abcd"], gold=2)] * 2
    path.write_text("\n".join(map(json.dumps, lines)))
    cfg, paid = bench_config(bench=f"choice:{path}"), []
    real = script.nelbo

    def listen(model, x, cfg, g, K, frozen):
        nats, info = real(model, x, cfg, g, K, frozen)
        paid.append((nats.item() / (~frozen).sum().item(), (~frozen).sum().item()))
        return nats, info

    monkeypatch.setattr(script, "nelbo", listen)
    script.bench(uniform(cfg), cfg, Letters())
    assert [size for _, size in paid] == [2, 3, 9, 5] * 2
    assert all(cost == pytest.approx(math.log(29), abs=1e-5) for cost, _ in paid)

    price = {2: 1.02, 3: 1.01, 9: 1.0, 5: 1.03}

    def scripted(model, x, cfg, g, K, frozen):
        n = (~frozen).sum().item()
        return torch.tensor([n * price[n]]), {}

    monkeypatch.setattr(script, "nelbo", scripted)
    row = script.bench(uniform(cfg), cfg, Letters())
    assert row["per_token"] == 1 and row["sum"] == 0


def test_options_of_one_length_share_their_masks(tmp_path, monkeypatch):
    """All options of an item are scored under the same draws, so that equal options cost the same
    to the last bit."""
    path = tmp_path / "items"
    path.write_text(json.dumps(dict(prefix="the cat", choices=["sat", "sat", "ran"], gold=0)))
    cfg, masks = bench_config(bench=f"choice:{path}"), []
    model = Spy(network(cfg))
    script.bench(model, cfg, Letters())
    for idx, _ in model.given:
        masks.append(idx == 29)
    per = len(masks) // 3
    assert per == 8 and all(mask.any() for mask in masks)
    for a, b, c in zip(masks[:per], masks[per:2 * per], masks[2 * per:]):
        assert torch.equal(a, b) and torch.equal(a, c)


# ---- 8. settings


def parsed(path, *flags):
    return common.parse(script.Config, script.PRESETS, ["--config", str(path), *flags], "",
                        read=script.read_config)


COMMENTED = r"""
// a file of settings
{
    "pipeline": "diffusion",   // or arm
    "init_from": "gpt2", /* a checkpoint,
                            of many lines */
    "context_length": 256,
    "max_lr": 3e-4, "betas": [0.9, 0.95], "warmup_pct": 0.05, "n_steps": 2000,
    "user_prompt": "see http://a.b/*c*/ // \"x\", ok",
    "mask_id": 10541,
    "pad_weight": 1,
}
"""


def test_a_file_of_settings_with_comments(tmp_path):
    """// and /* */ comments and a trailing comma are skipped, not those inside of strings."""
    path = tmp_path / "settings.json"
    path.write_text(COMMENTED)
    values, bad = script.read_config(path)
    assert bad == [] and values == dict(
        pipeline="diffusion", init_from="gpt2", seq_len=256, lr=3e-4, beta1=0.9, beta2=0.95,
        warmup=100, steps=2000, prompt='see http://a.b/*c*/ // "x", ok', mask_id=10541,
        pad_weight=1.0)
    assert type(values["pad_weight"]) is float
    assert parsed(path) == dataclasses.replace(script.Config(), config=str(path), **values)


def test_a_comma_in_a_string_is_no_trailing_comma(tmp_path):
    """Text such as "a,] b" comes through as it is."""
    path = tmp_path / "settings.json"
    path.write_text('{"prompt": "a,] b, }", "infill": "x ,\\n } ___",\n}')
    assert script.read_config(path) == (dict(prompt="a,] b, }", infill="x ,\n } ___"), [])


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    """Also a preset that the file itself names."""
    path = tmp_path / "settings.json"
    path.write_text('{"preset": "small", "n_steps": 7, "max_lr": 0.5, "shift": false}')
    cfg = parsed(path, "--steps", "9")
    assert (cfg.steps, cfg.lr, cfg.shift, cfg.n_embd, cfg.preset) == (9, 0.5, False, 512, "small")
    assert parsed(path, "--shift", "--preset", "medium").shift
    assert parsed(path, "--preset", "medium").n_embd == 768
    stored = dataclasses.replace(cfg, n_head=4)
    again = common.parse(script.Config, script.PRESETS, [f"--config={path}", "--lr", "0.1"], "",
                         default=stored, read=script.read_config)
    assert (again.lr, again.steps, again.n_head) == (0.1, 7, 4)


OTHERS = dict(
    context_length=(64, dict(seq_len=64)), max_lr=(0.1, dict(lr=0.1)), n_steps=(5, dict(steps=5)),
    memmap_path=("x.txt", dict(data="x.txt")), save_dir=("here", dict(out="here")),
    accumulate_grad=(3, dict(grad_accum=3)), val_check_interval=(9, dict(eval_every=9)),
    resume_training=(True, dict(resume=True)), n_samples=(2, dict(n=2)),
    user_prompt=("Once", dict(prompt="Once")), diffusion_steps=(8, dict(sampling_steps=8)),
    denoising_strategy=("entropy", dict(order="entropy")),
    padded_dataset=(True, dict(rows="docs")), do_sample=(False, dict(temperature=0.0)),
    betas=([0.8, 0.9], dict(beta1=0.8, beta2=0.9)), warmup_pct=(0.1, dict(warmup=110)),
    use_eos_head=(True, dict(head="hazard")), use_pad_head=(True, dict(head="hazard")),
    wandb=(True, dict(log="wandb")))


def test_other_names_of_settings(tmp_path):
    """Every name that such files use is translated, or refused with what takes its place."""
    assert OTHERS.keys() == script.OTHER_NAMES.keys() | script.SET_HERE.keys()
    path = tmp_path / "settings.json"
    for name, (value, want) in OTHERS.items():
        path.write_text(json.dumps({name: value}))
        assert script.read_config(path) == (want, []), name
    for name, value, want in (("padded_dataset", False, dict(rows="stream")), ("wandb", False, {}),
                              ("do_sample", True, {}), ("use_eos_head", False, {})):
        path.write_text(json.dumps({name: value}))
        assert script.read_config(path) == (want, []), name
    for name, advice in script.NOT_HERE.items():
        path.write_text(json.dumps({name: 1}))
        assert script.read_config(path) == ({}, [f"'{name}' is no setting here: {advice}"])


@pytest.mark.parametrize("name, value, fragment", [
    ("steps", "many", "must be a int"), ("steps", 2.5, "must be a int"), ("lr", "x", "float"),
    ("shift", 1, "bool"), ("steps", True, "int"), ("data", 3, "str"), ("lr", None, "float"),
    ("order", "best", "random, l2r"), ("frobnicate", 1, "no setting"), ("betas", 0.9, "betas"),
    ("betas", [0.9], "betas"), ("warmup_pct", "x", "warmup_pct"), ("n_steps", "many", "n_steps")])
def test_a_wrong_value_in_the_file_is_named(name, value, fragment, tmp_path):
    """Each in one phrase with the name that the file uses."""
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({name: value}))
    values, bad = script.read_config(path)
    assert values == {} and len(bad) == 1 and fragment in bad[0] and name in bad[0]
    assert ("no setting" in bad[0]) == (name == "frobnicate")


@pytest.mark.parametrize("text", ["[1]", "{", "7", "", '{"a" 1}'])
def test_a_file_that_is_no_json_object(text, tmp_path):
    """Refused in one sentence, as is one that is not there."""
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(UserError, match="is no JSON object"):
        script.read_config(path)
    with pytest.raises(UserError, match="cannot read --config"):
        script.read_config(tmp_path / "none.json")


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli(*flags) -> exit code, stdout, stderr: the command line without a new process."""
    def call(*argv):
        monkeypatch.setattr(sys, "argv", [f"{script.NAME}.py", *map(str, argv)])
        capsys.readouterr()
        try:
            common.run_main(script.main)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()
    return call


SIX = dict(pipeline="gpt", n_steps="many", q=1.5, block=0, frobnicate=1, n_epochs=3, batch_size=0,
           p_tail=0.9, p_cond=0.9)


def test_all_faults_of_a_file_are_told_at_once(tmp_path, cli):
    """Unknown names, wrong types, impossible values and those of flags: one sentence, exit code 2,
    and no folder is made."""
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(SIX))
    out = tmp_path / "run"
    code, said, err = cli("--config", path, "--out", out, "--div-factor", "0.5")
    assert code == 2 and said == "" and err.count("\n") == 1 and err.startswith("error: ")
    for fragment in ("pipeline is 'gpt'", "n_steps is 'many'", "--q is 1.5", "--block is 0",
                     "'frobnicate' is no setting", "'n_epochs' is no setting here: give steps",
                     "--batch-size is 0", "together they are more than 1", "--div-factor"):
        assert fragment in err, fragment
    assert not out.exists()
    code, _, err = cli("--config", path, "--no-such-flag")
    assert code == 2 and err.count("\n") == 1 and "no-such-flag" in err and "frobnicate" in err


WRONG = [  # settings that cannot work and what is said of them
    (dict(attn_ratio=1.5), "--attn-ratio is 1.5"), (dict(pad_weight=-1.0), "--pad-weight is -1"),
    (dict(p_cond=1.5), "--p-cond is 1.5"), (dict(p_tail=-0.1), "--p-tail is -0.1"),
    (dict(p_pin=2.0), "--p-pin is 2"), (dict(crop=1.1), "--crop is 1.1"),
    (dict(q=1.5), "--q is 1.5, it must be 0 to 1"), (dict(q=float("nan")), "nan, it must be 0"),
    (dict(p_cond=0.5, p_tail=0.5, p_pin=0.1), "more than 1"),
    (dict(pad_masked_perc=1.0), "must be below 1"), (dict(p_pin=0.1, rows="stream"), "--rows docs"),
    (dict(pad_masked_perc=0.1, rows="stream"), "--rows docs"),
    (dict(p_tail=0.5, rows="stream"), "--rows docs"),
    (dict(pipeline="arm"), "add --init-from scratch"),
    (dict(pipeline="arm", init_from="gpt2", pad_masked_perc=0.1), "leave --pad-masked-perc out"),
    (dict(freeze=True), "--head hazard or pointer"), (dict(q=0.0), "must be between 0 and 1"),
    (dict(q=1.0), "must be between 0 and 1"), (dict(block=0), "--block is 0"),
    (dict(max_new_tokens=161), "--max-new-tokens 161 is more than a row, 160"),
    (dict(quota="ancestral"), "needs --sampling-steps"),
    (dict(quota="ancestral", sampling_steps=8, canvas="law"), "use --canvas full, eos or pin"),
    (dict(quota="ancestral", sampling_steps=8, canvas="block"), "use --canvas full, eos or pin"),
    (dict(bench="lambada"), "--bench is 'lambada'"), (dict(div_factor=0.5), "--div-factor"),
    (dict(final_div_factor=0.5), "--final-div-factor"), (dict(beta1=1.0), "--beta1"),
    (dict(beta2=-0.1), "--beta2"), (dict(weight_decay=-1.0), "--weight-decay"),
    *((dict([(name, -1)]), f"--{name.replace('_', '-')} must be at least 0") for name in (
        "attn_annealing_steps", "pad_annealing_steps", "tail_annealing_steps", "prompt_tokens",
        "bench_n", "parent_steps")),
    (dict(eval_canvases="full,round"), "not 'round'")]


@pytest.mark.parametrize("changes, fragment", WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_settings_that_cannot_work(changes, fragment):
    """Each rule has a sentence, which names the flag; other rules stay silent unless they are about
    the same value, and the command line reports it."""
    cfg = script.Config(**changes)
    said = cfg.problems()
    assert sum(fragment in sentence for sentence in said) == 1 and len(said) <= 2
    with pytest.raises(UserError) as error:
        common.check(cfg)
    assert fragment in str(error.value)


def test_every_rule_is_broken_once_and_the_defaults_break_none():
    """The list above goes through all rules of Config.problems; defaults, presets and what they
    exclude pass."""
    source = inspect.getsource(script.Config.problems)
    rules = source.count("\n            (") + 2  # shares, and two loops at the end
    said = {s for changes, _ in WRONG for s in script.Config(**changes).problems()}
    assert len({s.split(" is ")[0] for s in said}) >= rules - 1
    for preset in script.PRESETS.values():
        assert script.Config(**preset).problems() == []
    for fine in (dict(pad_masked_perc=0.0), dict(rows="stream"), dict(p_cond=0.5, p_tail=0.5),
                 dict(rows="stream", p_tail=0.0), dict(quota="ancestral", sampling_steps=8),
                 dict(freeze=True, head="pointer"), dict(pipeline="arm", init_from="scratch"),
                 dict(bench="infill:x"), dict(sampling_steps=80, max_new_tokens=20)):
        assert script.Config(**fine).problems() == [], fine


@pytest.mark.parametrize("flags", [[], ["--max-new-tokens", "5"], ["--sampling-steps", "3"]])
def test_sample_runs_on_short_rows(flags, tmp_path, cli):
    """The sampler's own defaults never contradict a short row or --max-new-tokens, which the user
    did not ask for."""
    tokenizer = get_tokenizer("byte")
    cfg = config(vocab_size=257, eos=256, bos=256, seq_len=16, tokenizer="byte", device="cpu",
                 dtype="float32")
    out = saved(network(cfg), cfg, tmp_path / "run", tokenizer)
    code, said, err = cli("sample", "--out", out, "--n", 2, "--prompt", "ab", *flags)
    assert (code, err) == (0, "") and (tmp_path / "run" / "samples.txt").exists()


# ---- 9. learning rate and optimizers


def test_the_learning_rate_in_closed_form():
    """From lr / div_factor straight to lr at the end of the warm-up, then half a cosine that ends
    at lr / (div_factor final_div_factor)."""
    cfg = config(lr=0.5, warmup=10, steps=110, div_factor=25.0, final_div_factor=100.0)
    last = 0.5 / 2500
    rates = [script.get_lr(step, cfg) for step in range(111)]
    assert rates[0] == pytest.approx(0.02 + 0.048) and rates[9] == pytest.approx(0.5)
    assert rates[4] == pytest.approx(0.02 + 0.48 * 0.5) and rates[10] == pytest.approx(0.5)
    assert rates[60] == pytest.approx((0.5 + last) / 2)
    assert rates[109] == pytest.approx(last + (0.5 - last) * math.sin(math.pi / 200) ** 2)
    assert rates[110] == pytest.approx(last)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    none = config(lr=0.5, warmup=0, steps=1)
    assert script.get_lr(0, none) == pytest.approx(0.5)


@pytest.mark.parametrize("head", ["marginal", "pointer"])
def test_every_parameter_has_one_optimizer(head):
    """Muon gets the matrices of the blocks and those alone, AdamW embeddings apart from the rest;
    or one AdamW with one rate and the Config's betas and decay for all."""
    cfg = config(head=head, beta1=0.8, beta2=0.99, weight_decay=0.3)
    model = script.Model(cfg)
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adam = script.make_optimizers(model, cfg)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adam, torch.optim.AdamW)
    groups = [[names[id(p)] for p in group["params"]] for each in (muon, adam)
              for group in each.param_groups]
    assert sorted(sum(groups, [])) == sorted(names.values())
    assert sorted(groups[0]) == sorted(f"transformer.h.{i}.{name}.weight" for i in range(2) for name
                                       in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
    assert sorted(groups[1]) == ["transformer.wpe.weight", "transformer.wte.weight"]
    assert ("length_head.weight" in groups[2]) == (head == "pointer")
    assert muon.param_groups[0]["scale"] == 1 and len(groups) == 3
    assert all(group["weight_decay"] == 0 and group["scale"] > 0 for group in adam.param_groups)
    one, = script.make_optimizers(model, dataclasses.replace(cfg, optimizer="adamw"))
    group, = one.param_groups
    assert isinstance(one, torch.optim.AdamW) and len(group["params"]) == len(names)
    assert (group["scale"], group["betas"], group["weight_decay"]) == (1.0, (0.8, 0.99), 0.3)


def test_one_step_of_training_moves_every_parameter_that_is_used():
    """The loss of documents of all kinds reaches blocks, norms, embeddings and the head."""
    cfg = config(head="pointer", p_tail=0.9, attn_ratio=0.5)
    model = network(cfg).requires_grad_(True)
    sum(script.loss_fn(model, documents(cfg, 1, 3, 4, 6), cfg, generator(seed))[0]
        for seed in range(3)).backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == set()


def test_mean_and_se_of_the_loss_do_not_depend_on_the_batch():
    """A comb of levels over one row and over many have the same mean."""
    cfg = config(seq_len=5)
    model, x0 = network(cfg, shake=0.8), documents(cfg, 3)
    one, se = mean_and_se(lambda g: script.loss_fn(model, x0, cfg, g)[0], 400)
    many, se2 = mean_and_se(lambda g: script.loss_fn(model, x0.repeat(40, 1), cfg, g)[0], 30)
    assert abs(one - many) < 5 * math.hypot(se, se2) and se2 < se
