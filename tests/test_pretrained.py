"""lab/pretrained.py: we read GPT-2 and transformers reads ours, whatever is wrong is one sentence;
lab/benchmarks.py: items, shares and intervals, with models whose answers are known."""
import json
import math
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import common
import diffugpt_varlen as script
import fast
from common import UserError
from data.prepare import char_tokenizer, load_data
from harness import small_text
from lab import benchmarks, pretrained
from tables import generator

transformers = pytest.importorskip("transformers")
V, T = 11, 9
TOY = char_tokenizer(["abcdefghij"])  # EOS and BOS are 10


def config(**changes):
    return pretrained.Config(**(dict(vocab_size=V, eos=10, bos=10, seq_len=T, rows="docs",
                                     device="cpu", dtype="float32") | changes))


def shaken(model, seed=0):
    """Every parameter N(0, 0.3^2), exact in half precision: no path is dead."""
    g = generator(seed)
    for p in model.requires_grad_(False).parameters():
        p.copy_((0.3 * torch.randn(p.shape, generator=g)).half().float())
    return model.eval()


def gpt2(rows=V, positions=T + 3, width=16):
    """A GPT2LMHeadModel of transformers."""
    return shaken(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=rows, n_positions=positions, n_embd=width, n_layer=2, n_head=2)))


BASE = {k: v for k, v in gpt2().state_dict().items() if k != "lm_head.weight"}
BARE = {k.removeprefix("transformer."): v for k, v in BASE.items()}
TABLE = BARE["wte.weight"]


def write(folder, tensors=BASE, **card):
    """A checkpoint in a folder: its path."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(n_head=2) | card))
    return str(folder)


def loaded(tokenizer=TOY, **changes):
    cfg, data = config(**changes), SimpleNamespace(tokenizer=tokenizer)
    return pretrained.init_model(cfg, script.Model, data, "cpu")


@torch.no_grad()
def theirs(model, ids, causal, bos=10):
    """transformers' logits about the tokens ids (B, T): (B, T, rows)."""
    ids = F.pad(ids, (1, 0), value=bos)
    everywhere = torch.ones(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    return model(ids, attention_mask=None if causal else everywhere).logits[:, :-1]


@torch.no_grad()
def ours(model, ids, causal):
    return model(ids, None, script.random_attention(ids.shape[1] + 1, float(not causal), "cpu"))


def random_ids(rows=V):
    return torch.randint(rows, (5, T), generator=generator(1))


# ---- load and export -----------------------------------------------------------------------------
@pytest.mark.parametrize("causal", [True, False])
def test_our_network_is_the_gpt2_of_transformers(causal, tmp_path):
    """(E2) With the causal mask and with none; with PAD and M, and without; fewer positions."""
    for rows, card in ((V + 2, dict(pad_token_id=V, mask_token_id=V + 1)), (V, {})):
        model, ids = gpt2(rows), random_ids(rows)
        model_here = loaded(init_from=write(tmp_path / "a", model.state_dict(), **card))
        got, want = ours(model_here, ids, causal), theirs(model, ids, causal)[..., :V + 1]
        assert got.shape == (5, T, V + 1)
        assert (got[..., :rows] - want).abs().max() <= 1e-5
        assert (got - ours(model_here, ids, not causal)).abs().max() > 0.01


@pytest.mark.parametrize("pipeline", ["diffusion", "arm"])
def test_transformers_and_we_read_what_is_exported(pipeline, tmp_path):
    """The same logits there; the same weights again here, bit by bit; nothing is overwritten."""
    cfg = config(pipeline=pipeline, n_layer=2, n_head=4, n_embd=16, out=str(tmp_path / "run"))
    model, target, run = shaken(script.Model(cfg), 1), tmp_path / "deep/target", common.Run(cfg)
    run.out.mkdir()
    run.save(3, TOY, model, model, script.make_optimizers(model, cfg), generator())
    pretrained.main(["export", cfg.out, str(target)])
    there, info = transformers.GPT2LMHeadModel.from_pretrained(target, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (there.config.bos_token_id, there.config.vocab_size) == (10, V + 2)
    ids = random_ids(V + 2)
    for causal in (True, False):
        want = theirs(there.eval(), ids, causal)[..., :model.num_outputs]
        assert (ours(model, ids, causal) - want).abs().max() <= 1e-5
    again = loaded(pipeline=pipeline, init_from=str(target)).state_dict()
    want = model.state_dict()
    if pipeline == "arm":  # a parent knows no PAD and no M
        want["transformer.wte.weight"][V:] = want["transformer.wte.weight"][:V].mean(0)
    assert all(torch.equal(again[name], want[name]) for name in want.keys() | again.keys())
    ids, short = random_ids()[:, :5], loaded(pipeline=pipeline, init_from=str(target), seq_len=5)
    assert torch.equal(ours(short, ids, False), ours(model, ids, False))
    with pytest.raises(UserError, match="is not empty"):
        pretrained.main(["export", cfg.out, str(target)])
    with pytest.raises(UserError, match="of another tokenizer than the char"):
        loaded(char_tokenizer(["abcdefghiJ"]), init_from=str(target))


BUFFERS = {f"h.{i}.attn.{name}": torch.ones(1, 1, 4, 4).tril() for i in range(2)
           for name in ("bias", "masked_bias")}
DIFFUGPT = {"embed_tokens.weight" if k == "wte.weight" else f"denoise_model.{k}": v.half()
            for k, v in BARE.items()}
SPELLINGS = dict(transformers=BASE, hub=BARE | BUFFERS, diffugpt=DIFFUGPT, save_pretrained=None,
                 tied=DIFFUGPT | {"lm_head.weight": TABLE, "denoise_model.wte.weight": TABLE})


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_a_gpt2_gives_the_same_weights(name, tmp_path):
    """Names of transformers, of the hub with buffers, of DiffuGPT in half precision, also with a
    head, and the folder that save_pretrained writes."""
    if name == "save_pretrained":
        gpt2().save_pretrained(tmp_path)
    else:
        write(tmp_path, SPELLINGS[name], activation_function="gelu_new")
    state = loaded(init_from=str(tmp_path)).state_dict()
    assert state.keys() == BASE.keys() and {v.dtype for v in state.values()} == {torch.float32}
    for name, value in BASE.items():
        assert torch.equal(state[name][:len(value)], value[:len(state[name])]), name


def test_mask_and_pad_are_new_rows_of_the_embedding(tmp_path, monkeypatch):
    """PAD begins as the mean of all tokens, M too or as a copy of --mask-id, and then acts as that
    token did; DiffuGPT's own mask is known by its name; a foreign PAD is not taken for ours."""
    ids, mean, folder = random_ids(), TABLE.mean(0), write(tmp_path / "a", pad_token_id=10)
    fetch = SimpleNamespace(snapshot_download=lambda *_, **__: folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fetch)
    monkeypatch.setitem(pretrained.MASK_IDS, "diffugpt-s", 7)
    for init_from, mask_id, want in (
            (folder, None, mean), (folder, 4, TABLE[4]), (folder, 0, TABLE[0]),
            ("diffugpt-s", None, TABLE[7]), ("diffugpt-s", 2, TABLE[2]), ("gpt2-xl", None, mean),
            *((write(tmp_path / f"b{other}", pad_token_id=other), None, mean)
              for other in (-1, V, V + 7)),
            (write(tmp_path / "m", BASE | {"transformer.wte.weight": torch.cat((TABLE, TABLE[:1]))},
                   pad_token_id=V, mask_token_id=V), None, TABLE[0])):
        model = loaded(init_from=init_from, mask_id=mask_id)
        got = model.transformer.wte.weight
        assert got.shape == (V + 2, 16) and torch.equal(got[:V], TABLE)
        assert torch.equal(got[V], mean) and torch.equal(got[V + 1], want)
        if mask_id is not None:
            assert torch.equal(model(ids), model(ids.masked_fill(ids == mask_id, V + 1)))


def changed(old="", new="", drop=None, turn=None, **more):
    """BASE with a part of the names replaced, a tensor left out, transposed or added."""
    out = {k.replace(old, new): v.t() if k == f"transformer.{turn}" else v for k, v in BASE.items()
           if k != f"transformer.{drop}"}
    return out | {k.replace("__", "."): v for k, v in more.items()}


BROKEN = {  # what is wrong: tensors, config.json, settings, and what is said
    "a missing tensor": (changed(drop="h.1.mlp.c_fc.bias"), {}, {}, "h.1.mlp.c_fc.bias"),
    "a missing norm": (changed(drop="ln_f.weight"), {}, {}, "ln_f.weight"),
    "no positions": (changed(drop="wpe.weight"), {}, {}, "position embeddings"),
    "other names": (changed("attn.c_proj", "attn.out"), {}, {}, "attn.c_proj"),
    "an unknown tensor": (changed(h__0__extra=torch.ones(1)), {}, {}, "h.0.extra"),
    "almost a buffer": (changed(h__0__attn__a_bias=torch.ones(1)), {}, {}, "h.0.attn.a_bias"),
    "a transposed matrix": (changed(turn="h.0.mlp.c_fc.weight"), {}, {}, "h.0.mlp.c_fc.weight"),
    "a head": (changed(lm_head__weight=torch.ones(V, 16)), {}, {}, "a head of its own"),
    "no embedding": (changed("transformer.", "model."), {}, {}, "no token or position embeddings"),
    "another block": (changed("h.1.", "h.2."), {}, {}, "h.1."),
    "another activation": (BASE, dict(activation_function="relu"), {}, "activation_function"),
    "another epsilon": (BASE, dict(layer_norm_epsilon=1e-6), {}, "layer_norm_epsilon"),
    "a block that is missing": (BASE, dict(n_layer=3), {}, "the file is not whole"),
    "heads that do not fit": (BASE, dict(n_head=3), {}, "n_head 3"),
    "rows too long": (BASE, {}, dict(seq_len=T + 3), f"must be at most {T + 2}"),
    "fewer tokens": (BASE, {}, dict(vocab_size=V + 1), "choose the --tokenizer"),
    "more tokens": (BASE, {}, dict(vocab_size=V - 3), "choose the --tokenizer"),
    "another width": (BASE, {}, dict(n_embd=32), "leave --n-embd and --preset out"),
    "a mask that is no token": (BASE, {}, dict(mask_id=V), "--mask-id 11 is no token"),
    "a mask below zero": (BASE, {}, dict(mask_id=-1), "--mask-id -1 is no token"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_gpt2_ends_in_one_sentence(case, tmp_path):
    """Refused with what is wrong, never half loaded."""
    tensors, card, settings, fragment = BROKEN[case]
    folder = write(tmp_path / "them", tensors, **card)
    with pytest.raises(UserError, match=re.escape(fragment)) as error:
        loaded(init_from=folder, **settings)
    assert "\n" not in str(error.value) and "them" in str(error.value)


def test_what_is_missing_or_broken_ends_in_one_sentence(tmp_path, monkeypatch):
    """Unknown names, no network, no files, none that hold JSON and tensors, wrong commands."""
    def fetch(*_, **__):
        raise OSError("offline\nno route")
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=fetch))
    folders = [str(tmp_path / name) for name in ("empty", "cut", "list", "bytes")]
    for folder, card in zip(folders, (None, "{", "[]", "{}")):
        write(tmp_path / folder)
        (tmp_path / folder / "config.json").write_text(card or "")
    (tmp_path / "bytes/model.safetensors").write_bytes(b"nothing")
    (tmp_path / "empty/model.safetensors").unlink()
    for name, sentence in (
            ("gpt3", "no known checkpoint: choose gpt2, diffugpt-s"),
            ("gpt2-xl", "cannot fetch openai-community/gpt2-xl (offline no route)"),
            *((folder, f"no GPT-2 in {folder}") for folder in folders)):
        with pytest.raises(UserError, match=re.escape(sentence)):
            loaded(init_from=name)
    out, none = str(tmp_path / "run"), str(tmp_path / "none")
    for argv, sentence in ((["--init-from", "parent"], "parent is for diffugpt_varlen.py"),
                           (["export", "a"], "export needs two"), (["export", none, out], "train")):
        with pytest.raises(UserError, match=sentence):
            pretrained.main(argv)
    assert not (tmp_path / "run").exists()


def test_adamw_has_one_rate_and_muon_is_the_scripts():
    model = script.Model(config(n_embd=16))
    (one,), (muon, _) = (pretrained.make_optimizers(model, config(
        optimizer=name, weight_decay=0.3)) for name in ("adamw", "muon"))
    assert isinstance(one, torch.optim.AdamW) and isinstance(muon, fast.Muon)
    group, = one.param_groups
    assert len(group["params"]) == len([*model.parameters()])
    assert (group["scale"], group["betas"], group["weight_decay"]) == (1.0, (0.9, 0.999), 0.3)


# ---- a run ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Runs from a GPT-2 of bytes, `diffusion` and `arm`; the checkpoint itself is gone."""
    home = tmp_path_factory.mktemp("pretrained")
    small_text(home / "small.txt")
    write(home / "gpt2", gpt2(257, 40, 32).state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXT_DIFFUSION_CACHE", str(home / "cache"))
        for pipeline in ("diffusion", "arm"):
            pretrained.main(
                f"--init-from {home}/gpt2 --pipeline {pipeline} --out {home}/{pipeline} --data "
                f"{home}/small.txt --tokenizer byte --rows docs --seq-len 36 --batch-size 4 "
                "--steps 6 --warmup 1 --eval-every 3 --device cpu --dtype float32 --num-samples 2"
                .split())
        shutil.rmtree(home / "gpt2")
        yield home


def test_a_gpt2_is_adapted_and_its_run_needs_it_no_more(home, capsys):
    """Sizes come from the checkpoint; no parent is trained; training begins at the likelihood that
    transformers gives; sample, eval, --resume and export work when the checkpoint is gone."""
    cfg = common.load_config(pretrained.Config, home / "arm")
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.vocab_size) == (2, 2, 32, 257)
    x0 = script.get_eval_rows(load_data(cfg).val, cfg, 128)[0]
    logits = theirs(gpt2(257, 40, 32), x0, True, 256).transpose(1, 2)
    scored = (x0 == 256).cumsum(1) <= (x0 == 256).long()  # up to the first EOS
    nats = F.cross_entropy(logits, x0, reduction="none")[scored].mean().item()
    first, *_, last = [row for row in common.read_log(home / "arm") if row["kind"] == "val"]
    assert first["nats_per_token"] == pytest.approx(nats, rel=1e-5) and first["bound"] == "exact"
    assert last["nats_per_token"] < nats
    for out in (home / "arm", home / "diffusion"):
        for words in ("sample --prompt the", "eval", "--resume --steps 8"):
            pretrained.main([*words.split(), "--out", str(out)])
        shown = capsys.readouterr().out
        assert "nfe " in shown and "test: " in shown and "step     8" in shown
    with pytest.raises(UserError, match="leave out --n-layer: the checkpoint has 2"):
        pretrained.main(["sample", "--n-layer", "3", "--out", str(home / "arm")])
    pretrained.main(["export", str(home / "diffusion"), str(home / "export")])
    ours, exported = (load_file(home / name / "model.safetensors") for name in (
        "diffusion", "export"))
    assert all(torch.equal(ours[name], exported[name]) for name in ours.keys() | exported.keys())
    assert not list(home.glob("*_parent"))


# ---- benchmarks ----------------------------------------------------------------------------------
LETTERS = char_tokenizer([" abcdefghijklmnopqrstuvwxyz"])  # EOS is 27
SENTENCES = ["the cat sat on the mat", "a dog ran to the old barn", "my friend sang"]
GOOD = dict(cloze='{"prefix": "a", "target": "b"}',
            choice='{"prefix": "a", "choices": ["b", "c"], "gold": 1}',
            infill='{"prefix": "a", "middle": "b", "suffix": "c"}')


class Reader(nn.Module):
    """The perfect model of SENTENCES; `uniform`: one that knows nothing. `given`: what it saw."""

    def __init__(self, uniform=False):
        super().__init__()
        rows = [(LETTERS.encode(s) + [27] + 30 * [28])[:30] for s in SENTENCES]
        self.rows, self.given, self.uniform = torch.tensor(rows), [], uniform
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, idx, is_target, attention_mask=None):
        self.given.append(idx)
        rows = self.rows[:, :idx.shape[1]]
        fits = ((idx[:, None] == rows) | (idx[:, None] == 29)).all(2).float()
        p = torch.einsum("bn,ntv->btv", fits, F.one_hot(rows, 29).float())
        return ((p / fits.sum().clamp(min=1) + 1e-30).log() * (not self.uniform))[is_target]


def bench(items, model=None, **changes):
    cfg = config(**dict(vocab_size=28, eos=27, bos=27, seq_len=30) | changes)
    return benchmarks.evaluate(model or Reader(), items, cfg, LETTERS)


def cloze(text):
    return dict(zip(("prefix", "target"), text.rsplit(" ", 1)))


def test_wilson_intervals():
    """Against published values (Newcombe 1998, table I, method 3) and at the ends."""
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718), (20, 20, 0.8389, 1)):
        assert benchmarks.wilson(right, n) == pytest.approx([low, high], abs=1e-4)


BAD = dict(cloze=['{"prefix": "a"}', "word", '{"prefix": ', '{"prefix": "a", "target": " "}'],
           infill=["[1]", "the text", GOOD["cloze"], GOOD["infill"].replace('"b"', "3")],
           choice=[GOOD["choice"].replace(*pair) for pair in (
               ("1", "2"), ("1", "-1"), ("1", '"b"'), ("1", "null"), ('["b", "c"]', "3"),
               ('["b", "c"]', '"bc"'), ('["b", "c"]', "[]"), ('"b"', "3"))])


@pytest.mark.parametrize("kind", GOOD)
def test_items_are_read_and_a_line_that_is_none_is_named(kind, tmp_path):
    """JSON lines, blank lines aside, at most `limit` (0: all); for cloze also a text."""
    path, good, item = tmp_path / "items", GOOD[kind], json.loads(GOOD[kind])
    path.write_text(f'{good[:-1]}, "id": 7}}\n\n{good}\n{good}\n')
    assert benchmarks.read_items(kind, path, 0) == 3 * [item]
    assert benchmarks.read_items(kind, path, 2) == 2 * [item]
    for line in BAD[kind]:
        path.write_text(f"{good}\n{line}\n")
        with pytest.raises(UserError, match=f"item 2 is no {kind} item: it needs prefix"):
            benchmarks.read_items(kind, path, 0)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no items"):
        benchmarks.read_items(kind, path, 0)
    path.write_text('the cat sat on the mat\n"Go," he said .\n')
    if kind == "cloze":
        assert benchmarks.read_items(kind, path, 0) == [
            cloze("the cat sat on the mat"), dict(prefix='"Go," he said', target=".")]


@pytest.mark.parametrize("order", ["maxprob", "random"])
def test_a_perfect_model_gets_every_item_right(order):
    """And nothing where the item says otherwise. All that sampling is set to changes nothing: one
    token per evaluation, four for " mat" and six for a free word."""
    row = bench([cloze("the cat sat"), *map(cloze, SENTENCES[1:])], order=order)
    assert (row["oracle"], row["free"], row["num_items"], row["order"]) == (1, 1, 3, order)
    assert row["free_interval"] == benchmarks.wilson(3, 3)
    row = bench([dict(cloze(s), choices=["hat", s.rsplit(" ", 1)[1], "xylophone"], gold=1)
                 for s in SENTENCES], order=order)
    assert (row["per_token"], row["sum"]) == (1, 1)
    row = bench([dict(zip(("prefix", "middle", "suffix"), s.split(" ", 2))) for s in SENTENCES],
                order=order)
    assert row["oracle"] == 1 and "free" not in row
    row = bench([cloze("the cat sat on the hat"), cloze(SENTENCES[0])], model := Reader(),
                order=order, num_steps=5, length_mode="presampled")
    assert row["oracle"] == row["free"] == 0.5 and len(model.given) == 2 * (4 + 6)


def test_an_option_is_not_favoured_for_its_length(monkeypatch):
    """A uniform model pays log 29 per token in every draw; a costlier token loses per token,
    however short its option; options of one length are scored under the same masks."""
    real, paid, sizes, model = script.nelbo_per_token, [], [], Reader(uniform=True)

    def listen(model, x, cfg, g, K, is_given):
        sizes.append(int((~is_given).sum()))
        paid.append(real(model, x, cfg, g, K, is_given).sum().item() / sizes[-1])
        return torch.zeros(x.shape).masked_fill(~is_given, 1 + (9 - sizes[-1]) / 99)
    monkeypatch.setattr(script, "nelbo_per_token", listen)
    row = bench([dict(prefix="the cat", choices=["a", "ab", "abcdefgh", "efg", "abc"], gold=2)],
                model)
    assert sizes == [2, 3, 9, 4, 4] and paid == pytest.approx(5 * [math.log(29)], abs=1e-5)
    assert row["per_token"] == 1 and row["sum"] == 0
    masks = [idx == 29 for idx in model.given]
    assert all(mask.any() for mask in masks) and len(masks) == 4 + 6 + 18 + 8 + 8
    assert all(torch.equal(a, b) for a, b in zip(masks[28:36], masks[36:]))


def test_the_parent_chooses_by_the_likelihood_of_the_option_alone():
    """--pipeline arm: -log p(option | prefix), by the chain rule; the prefix is not counted."""
    sizes, choices = dict(pipeline="arm", n_embd=16, n_head=2, n_layer=1), ["sat", "on", "ran", "b"]
    model = shaken(script.Model(config(vocab_size=28, bos=27, seq_len=30, **sizes)))
    for prefix in ("the cat", "a", "my friend sang"):
        costs = []
        for choice in choices:
            ids = torch.tensor([LETTERS.encode(f"{prefix} {choice}")])
            logp = ours(model, ids, True).log_softmax(2).gather(2, ids[..., None])
            costs.append(-logp[0, len(prefix):].mean().item())
        for gold in range(4):
            row = bench([dict(prefix=prefix, choices=choices, gold=gold)], model, **sizes)
            assert row["per_token"] == (costs[gold] == min(costs))


def test_benchmarks_of_a_run(home, capsys, tmp_path):
    """Printed and appended to benchmarks.jsonl; what cannot work is one sentence."""
    for name, kinds in (("arm", ["cloze", "choice"]), ("diffusion", [*GOOD])):
        for kind in kinds:
            (tmp_path / "items").write_text(3 * f"{GOOD[kind]}\n")
            benchmarks.main(f"{kind}:{tmp_path}/items --out {home}/{name} --num-items 2".split())
        rows = [*map(json.loads, (home / name / "benchmarks.jsonl").read_text().splitlines())]
        assert [(row["benchmark"], row["num_items"]) for row in rows] == [(k, 2) for k in kinds]
    shown = capsys.readouterr().out
    assert re.search(r"infill oracle: \d\.\d{3} of 2, 95 %: 0\.\d{3} to \d\.\d{3}", shown)
    for words, sentence in (
            ("lambada", "write cloze:FILE"), ("cloze:", "write cloze:FILE"),
            ("cloze:x --num-items -1", "at least 0"), ("cloze:none", "cannot read"),
            ("infill:x", "causal and cannot infill")):
        with pytest.raises(UserError, match=sentence):
            benchmarks.main(f"{words} --out {home}/arm".split())
