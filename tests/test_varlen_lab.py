"""lab/varlen_variants.py and lab/varlen_eval.py: what rows may hide, length heads, other ways to
sample, and what is said about lengths."""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import diffugpt_varlen as script
from lab import varlen_eval as suite
from lab import varlen_variants as lab
from tables import generator
from varlen_tables import EOS, MASK, PAD, Oracle, Script

T, ORACLE = 6, Oracle()
UNIFORM = torch.full((4,), 0.25)


def config(**changes):
    """Tokens 0 and 1, EOS 2, PAD 3, M 4; every row has a prompt."""
    return lab.Config(**(dict(vocab_size=3, eos=2, bos=2, seq_len=T, n_layer=1, n_head=2, n_embd=16,
                              rows="docs", p_prompt=1.0, p_crop=0.0,
                              attn_annealing_steps=1) | changes))


def rows(n, T=T, seed=0):
    """EOS-filled rows of 0 to T - 1 tokens."""
    g = generator(seed)
    x, length = torch.randint(2, (n, T), generator=g), torch.randint(T, (n, 1), generator=g)
    return torch.where(torch.arange(T) < length, x, EOS)


def network(cfg, seed=0):
    torch.manual_seed(seed)
    model, g = lab.Model(cfg), generator(seed)
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    return model


# ---- corrupt and loss ----------------------------------------------------------------------------
def test_without_options_it_is_the_script():
    cfg, x0 = config(p_prompt=0.5, p_crop=0.5), rows(64)
    for step in (0, 50, 1000):
        ours, theirs = (part(x0, cfg, generator(step), step) for part in
                        (lab.corrupt, script.corrupt))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs) if a is not None)
    model, ids = network(cfg), rows(5)
    canvas = torch.full((5, T), 3)
    assert torch.equal(model(ids), script.Model.forward(model, ids))
    assert torch.equal(lab.sample(model, canvas, cfg, generator())[0],
                       script.sample(model, canvas, cfg, generator())[0])


def test_rows_show_their_eos_or_nothing_behind_a_prompt():
    x = script.to_canvas(rows(4000, 24), cfg := config(seq_len=24, tail_share=0.5, eos_share=0.25))
    allowed, mask_all = lab.random_prompts(x, cfg, generator(1))
    used = allowed.any(1)
    shows_eos = ~allowed[x == EOS]
    assert shows_eos[used].double().mean() == pytest.approx(0.25, abs=0.03)
    assert mask_all.double().mean() == pytest.approx(0.75, abs=0.03)
    assert mask_all[shows_eos & used].all(), "nothing else is shown in these rows"


@pytest.mark.parametrize("share", [0.05, 0.4])
def test_so_many_masks_are_pads(share):
    """In the mean: a row keeps each PAD maskable with a probability that makes it so."""
    cfg = config(seq_len=24, p_prompt=0.0, pad_masked_perc=share)
    text = torch.where(torch.arange(24) < 8, 0, rows(6000, 12, seed=1).repeat(1, 2)[:, :24])
    text[:, 12:] = EOS
    x, xt, _, _ = lab.corrupt(text, cfg, generator(2), 9)
    is_mask = xt == MASK
    assert (x == PAD)[is_mask].double().mean() == pytest.approx(share, rel=0.15)


def test_shares_grow_with_the_step_alone():
    cfg = config(pad_masked_perc=0.5, pad_annealing_steps=10, tail_annealing_steps=4)
    grown = [lab.at_step(cfg, step) for step in (0, 3, 9, 99)]
    assert [some.pad_masked_perc for some in grown] == pytest.approx([0.05, 0.2, 0.5, 0.5])
    assert [some.tail_share for some in grown] == pytest.approx([0.125, 0.5, 0.5, 0.5])


def test_the_weight_of_pad_is_a_factor():
    x0, parts = rows(16), []
    for weight in (1.0, 0.1):
        x, _, w, _ = lab.corrupt(x0, config(pad_weight=weight), generator(), 9)
        parts.append(w)
    ratio = torch.where(x == PAD, 0.1, 1.0)
    assert torch.allclose(parts[1], parts[0] * ratio) and (parts[0][x == PAD] > 0).any()


def test_without_the_shift_the_output_at_a_token_predicts_it():
    cfg, x = config(shift=False), rows(3)
    model, causal = network(cfg), script.random_attention(T + 1, 0, "cpu")
    changed = x.clone()
    changed[:, 3] = 1 - changed[:, 3].clamp(max=1)
    differs = (model(x, None, causal) != model(changed, None, causal)).any(2).any(0)
    assert differs.tolist() == [False] * 3 + [True] * 3  # with the shift from position 4 on


# ---- length heads --------------------------------------------------------------------------------
@pytest.mark.parametrize("head", ["hazard", "pointer"])
def test_a_length_head_gives_a_distribution_and_learns_by_its_log(head):
    cfg = config(head=head, tail_share=1.0, batch_size=32)
    model, x0 = network(cfg), rows(32)
    m = torch.tensor([0, 2, 5]).repeat(3)
    h = model.hidden_states(x0[:9])
    p = lab.length_head_dist(model, h, m, cfg).exp()
    assert torch.allclose(p.sum(1), torch.ones(9), atol=1e-5)
    assert not p[torch.arange(T + 1) < m[:, None]].any()
    score = model.length_head(h)[4, :, 0]  # of m = 2, by hand
    if head == "hazard":
        stay = (1 - score[2:].sigmoid()).cumprod(0)
        truth = torch.cat((score[2:].sigmoid() * F.pad(stay[:-1], (1, 0), value=1.0), stay[-1:]))
    else:
        truth = torch.cat((score[2:], model.longer_than_canvas)).softmax(0)
    assert torch.allclose(p[4, 2:], truth, atol=1e-5)
    # the loss: cross-entropy and, of every row here, -log P(L)
    noisy = lab.corrupt(x0, cfg, generator(3), 9)
    extra = lab.loss_fn(model, *noisy) - script.loss_fn(model, *noisy)
    x, xt = noisy[:2]
    told = 0.0
    for i in range(32):
        prompt, L = int((xt[i] != MASK).cumprod(0).sum()), int(script.length_of(x[i, None], cfg))
        if prompt < T and prompt <= L and (xt[i, prompt:] == MASK).all():
            told -= lab.length_dist(model, x[i, None], torch.tensor([prompt]), cfg)[0, L] / 32
    assert extra.item() == pytest.approx(told.item(), rel=1e-4)


def test_a_frozen_network_trains_its_head_alone():
    cfg = config(head="hazard", freeze=True)
    model = network(cfg)
    lab.loss_fn(model, *lab.corrupt(rows(32), cfg, generator(), 9)).backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {
        "length_head"}


# ---- sample --------------------------------------------------------------------------------------
def test_a_repetition_penalty_changes_the_logits_of_what_the_row_shows():
    cfg = config(repetition_penalty=2.0)
    logits = torch.tensor([[1.0, -1.0, 0.5, 4.0]])
    model = lab.Penalized(Script(lambda idx, live: logits.expand(*idx.shape, 4)), cfg)
    idx = torch.tensor([[0, EOS, PAD], [1, 1, MASK], [0, 1, MASK]])
    seen = model(idx, idx == MASK)
    assert seen.tolist() == [[1.0, -2.0, 0.5, 4.0], [0.5, -2.0, 0.5, 4.0]]
    assert torch.equal(model(idx), logits.expand(3, 3, 4)), "lengths are predicted as they are"


def test_low_confidence_prefers_short_documents_even_of_a_perfect_network():
    """(V2) against the script's own order, whose law is the oracle's."""
    n, found = 4000, {}
    canvas = torch.full((n, T), 3)
    for low in (False, True):
        cfg = config(low_confidence=low, num_steps=0, temperature=1.0, length_mode="fixed")
        x, nfe = lab.sample(ORACLE, canvas, cfg, generator(5))
        assert nfe == T
        distance = 0.5 * (ORACLE.counts(x) / n - ORACLE.p).abs().sum().item()
        found[low] = distance, (x < EOS).sum(1).float().mean()
    assert found[False][0] < 0.06 and found[True][0] > 0.25
    assert found[True][1] < 0.8 * found[False][1]


@pytest.mark.parametrize("low", [False, True])
def test_a_continuation_has_no_more_than_so_many_tokens(low):
    cfg = config(max_new_tokens=2, low_confidence=low, temperature=1.0)
    canvas = torch.tensor([[1, 3, 3, 3, 3, 3]] * 50)
    text = Script(lambda idx, live: torch.tensor([5.0, 5.0, -9.0, -9.0]).expand(*idx.shape, 4))
    x, _ = lab.sample(text, canvas, cfg, generator())
    assert x.shape == (50, T) and (x[:, :3] < EOS).all() and (x[:, 3:] == EOS).all()


# ---- what is said about lengths ------------------------------------------------------------------
def test_the_parts_of_the_bound_add_up_to_it():
    cfg, x0 = config(), rows(7)
    model = network(cfg).requires_grad_(False)
    parts = suite.nelbo_parts(model, x0, cfg, generator(), 3)
    assert torch.allclose(parts.sum(1), script.nelbo(model, x0, cfg, generator(), 3))
    x = script.to_canvas(x0, cfg)
    whole = script.nelbo_per_token(model, x0, cfg, generator(), 3)
    assert torch.allclose(parts[:, 1], whole[x == EOS])


def test_length_metrics_of_a_distribution_that_is_known():
    p = torch.tensor([[0.0, 0.5, 0.25, 0.25, 0.0]] * 3)
    row = suite.length_metrics(p.log(), torch.tensor([1, 2, 3]), 0.7)
    assert row["nats"] == pytest.approx((math.log(2) + 2 * math.log(4)) / 3)
    assert row["coverage"] == pytest.approx(2 / 3)  # the canvas ends at 2
    assert row["looseness"] == pytest.approx((1 + 0 - 1) / 3)
    assert row["distance"] == pytest.approx((0 + 1 + 2) / 3)


def test_training_lengths_are_counted():
    split = None, torch.tensor([0, 3, 6, 8, 30]).numpy(), None  # lengths 2, 2, 1, 21 without EOS
    logp = suite.training_length_dist(split, config(), torch.tensor([0, 2]))
    assert torch.allclose(logp[0].exp(), torch.tensor([1, 2, 3, 1, 1, 1, 2]) / 11)
    assert torch.allclose(logp[1].exp(), torch.tensor([0, 0, 3, 1, 1, 1, 2]) / 8)


def test_the_report_of_a_perfect_network(monkeypatch):
    """Its nats are the entropy of the length, its p(PAD) grows by what p(EOS) was (E4), and the
    visible PADs betray the end."""
    n = 3000
    x0 = ORACLE.filled()[torch.multinomial(ORACLE.p, n, True, generator=generator(3))]
    monkeypatch.setattr(script, "get_eval_rows", lambda *_: (x0, None))
    data = type("", (), dict(val=None, train=(None, torch.arange(0, 9, 2).numpy(), None)))
    cfg = config()
    ORACLE.transformer = network(cfg).transformer  # says on which device it is
    found = suite.length_report(ORACLE, data, cfg, n=n, prompt_tokens=0)
    length = found[0][1]
    truth = ORACLE.length_dist()
    entropy = -(truth * truth.log()).sum().item()
    assert length["nats"] == pytest.approx(entropy, abs=5 * length["nats_se"])
    assert length["coherence_gap"] < 1e-5 and found[1][1]["of"] == "training"
    eos = {(row["pads"], row["revealed"]): row for kind, row in found if kind == "eos"}
    assert eos[True, 1.0]["position"] > 0.99 and eos[False, 0.0]["position"] < 0.7


def test_what_samples_cost_is_counted():
    cfg = config(length_mode="fixed", num_steps=0, order="l2r", temperature=1.0)
    x, cost = suite.sample_and_count(ORACLE, cfg, 8, 1, "cpu")
    assert cost["nfe"] == T and cost["tokens_processed"] == 8 * T * (T + 1)
    assert cost["processed_per_sample"] == T * (T + 1)
    assert cost["contradictions"] == 0, "the oracle never writes behind an end"
    tokens = torch.tensor([0, 0, EOS, 0, 0, 0])
    text = Script(lambda idx, live: 99.0 * F.one_hot(tokens, 4).expand(len(idx), -1, -1))
    assert suite.sample_and_count(text, cfg, 8, 1, "cpu")[1]["contradictions"] == 1
    for head in ("marginal", "hazard"):  # the evaluation that gives the length counts
        cfg = config(length_mode="presampled", num_steps=1, head=head)
        _, cost = suite.sample_and_count(network(cfg), cfg, 8, 1, "cpu")
        assert cost["nfe"] == 2 and 8 * (T + 1) < cost["tokens_processed"] <= 16 * (T + 1)


@pytest.mark.parametrize("changed,said", [
    (dict(pad_masked_perc=0.0), "--pad-masked-perc"), (dict(freeze=True), "--freeze"),
    (dict(tail_share=0.7, eos_share=0.7), "--tail-share"),
    (dict(repetition_penalty=0.0), "--repetition-penalty")])
def test_settings_that_cannot_work_are_refused(changed, said):
    assert any(said in sentence for sentence in dataclasses.replace(config(), **changed).problems())
