"""The autoregressive baseline: exact likelihood, sampler and infilling against enumeration."""
import math

import pytest
import torch

import ar
from tables import CausalTable, all_rows, chi_square, generator, row_counts

EOS = 2  # of the three-token tables; BOS is the same id, as in GPT-2


def config(**changes):
    return ar.Config(**(dict(vocab_size=3, seq_len=3, rows="stream", eos=EOS, bos=EOS) | changes))


def is_document(rows, eos=EOS):
    """Rows with nothing but EOS after the first EOS."""
    return torch.tensor([eos not in row or set(row[row.index(eos):]) == {eos}
                         for row in rows.tolist()])


def document_law(model, eos=EOS):
    """Probability of every EOS-filled row: all continuations of its first EOS put together."""
    rows, p = all_rows(model.V, model.T), model.p(eos)
    filled = rows.masked_fill(((rows == eos).cumsum(1) > 0), eos)
    code = (filled * model.V ** torch.arange(model.T - 1, -1, -1)).sum(1)
    return torch.zeros_like(p).index_add(0, code, p)


def tiny(seed=0, **changes):
    """A network with weights far from their initial zeros."""
    cfg = config(**(dict(vocab_size=5, seq_len=7, n_layer=2, n_head=2, n_embd=16) | changes))
    model, g = ar.Model(cfg), generator(seed)
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    return model.requires_grad_(False), cfg


# ---- likelihood


def test_nll_is_the_chain_rule():
    """(E1) (E2) against the enumerated joint; the probabilities of all rows sum to one."""
    model, rows = CausalTable(T=4), all_rows(3, 4)
    nll, _ = ar.nll(model, rows, config(seq_len=4))
    assert torch.allclose(nll, -model.p(EOS).log(), atol=1e-5)
    assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert ar.nelbo is ar.nll


def test_bos_is_the_first_input_and_never_charged():
    """(E2) another BOS changes the law of the first token, through the input only."""
    model, rows = CausalTable(), all_rows(3, 3)
    for bos in range(3):
        nll, _ = ar.nll(model, rows, config(bos=bos))
        assert torch.allclose(nll, -model.p(bos).log(), atol=1e-5)


def test_a_document_is_charged_up_to_its_first_eos():
    """(E1) the tail is certain, so it is free; the probabilities of all documents sum to one."""
    model, rows = CausalTable(T=4), all_rows(3, 4)
    nll, _ = ar.nll(model, rows, config(seq_len=4, rows="docs"))
    documents = is_document(rows)
    assert torch.allclose((-nll).exp()[documents], document_law(model)[documents], atol=1e-6)
    assert (-nll).exp()[documents].sum().item() == pytest.approx(1, abs=1e-5)


def test_charged_positions():
    x0 = torch.tensor([[0, 1, 2, 2, 2], [2, 2, 2, 2, 2], [0, 1, 0, 1, 0], [1, 0, 1, 0, 2]])
    want = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1] * 5, [1] * 5]).bool()
    assert torch.equal(ar.charged(x0, config(rows="docs")), want)
    assert ar.charged(x0, config(rows="stream")).all()


@pytest.mark.parametrize("rows", ["docs", "stream"])
def test_the_loss_is_nats_per_charged_token(rows):
    """(E3) all charged tokens alike, however the rows are grouped by length inside."""
    model, cfg = tiny(rows=rows, seq_len=7)
    x0 = torch.randint(5, (33, 7), generator=generator(1))
    x0 = x0.masked_fill((x0 == EOS).cumsum(1) > 0, EOS) if rows == "docs" else x0
    loss, info = ar.loss_fn(model, x0, cfg, None)
    logp = model(torch.cat((torch.full((33, 1), EOS), x0[:, :-1]), 1)).log_softmax(2)
    nll = -logp.gather(2, x0[..., None])[..., 0]
    ended = torch.cat((torch.zeros(33, 1), (x0 == EOS).cumsum(1)[:, :-1]), 1) > 0
    count = ~ended if rows == "docs" else torch.ones_like(ended)
    assert loss.item() == pytest.approx(nll[count].mean().item(), rel=1e-5)
    assert info["loss"] == loss
    total = ar.nll(model, x0, cfg)[0].sum() / count.sum()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("rows", ["docs", "stream"])
def test_uniform_logits_cost_ln_v_per_charged_token(rows):
    """(E1) (E3) the first loss of a new model is ln V."""
    cfg = config(vocab_size=7, seq_len=5, n_layer=1, n_head=1, n_embd=8, rows=rows)
    model, x0 = ar.Model(cfg), torch.randint(7, (150, 5), generator=generator(0))
    nll, _ = ar.nll(model, x0, cfg)
    assert torch.allclose(nll, ar.charged(x0, cfg).sum(1).double() * math.log(7), atol=1e-5)
    loss, _ = ar.loss_fn(model, x0, cfg, None)
    assert loss.item() == pytest.approx(math.log(7), abs=1e-6)


def test_nll_does_not_depend_on_how_rows_are_batched():
    model, cfg = tiny(rows="docs")
    x0 = torch.randint(5, (130, 7), generator=generator(1))
    alone = torch.cat([ar.nll(model, x0[i:i + 1], cfg)[0] for i in (0, 63, 64, 129)])
    assert torch.allclose(ar.nll(model, x0, cfg)[0][[0, 63, 64, 129]], alone, atol=1e-5)


def test_no_logit_depends_on_the_future():
    """(E2) a change at position j moves no logit before j, and does move those from j on."""
    model, _ = tiny()
    x0 = torch.randint(5, (4, 7), generator=generator(2))
    logits = model(x0)
    for j in range(7):
        other = x0.clone()
        other[:, j] = (other[:, j] + 1) % 5
        moved = (model(other) - logits).abs().amax((0, 2)) > 1e-6
        assert not moved[:j].any() and moved[j:].all()


# ---- samples


@pytest.mark.parametrize("rows", ["docs", "stream"])
def test_samples_have_the_law_of_the_likelihood(rows):
    """(E4) chi-square of 60 000 rows; documents are filled with EOS after their first."""
    model = CausalTable(seed=3)
    x, info = ar.sample(model, config(rows=rows), 60_000, generator(1), cached=False)
    want = document_law(model) if rows == "docs" else model.p(EOS)
    assert chi_square(row_counts(x, 3), want) > 1e-3 and info["nfe"] == 3
    assert is_document(x[:2000]).all() == (rows == "docs")


def test_a_prompt_is_kept_and_continued():
    """(E4) given x_1 = 1 the rest has the conditional law."""
    model, want = CausalTable(seed=4), CausalTable(seed=4).p(EOS)
    want = want * (all_rows(3, 3)[:, 0] == 1)
    for prompt in (torch.tensor([1]), torch.ones(30_000, 1, dtype=torch.long)):
        x, info = ar.sample(model, config(), 30_000, generator(1), prompt, cached=False)
        assert (x[:, 0] == 1).all() and info["nfe"] == 2
        assert chi_square(row_counts(x, 3), want / want.sum()) > 1e-3


@pytest.mark.parametrize("rows", ["docs", "stream"])
@pytest.mark.parametrize("prompt", [None, [3], [3, 1, 0]])
def test_generation_with_and_without_a_cache_is_the_same(rows, prompt):
    """(E4) the same seed draws the same tokens, also when rows end and after a prompt."""
    model, cfg = tiny(rows=rows)
    prompt = None if prompt is None else torch.tensor(prompt)
    with_cache, a = ar.sample(model, cfg, 100, generator(1), prompt)
    without, b = ar.sample(model, cfg, 100, generator(1), prompt, cached=False)
    assert torch.equal(with_cache, without) and a == b
    assert len(with_cache.unique(dim=0)) > 10


@pytest.mark.parametrize("pieces", [[1] * 7, [3, 1, 1, 1, 1], [2, 3, 2], [7]])
def test_cached_logits_equal_full_logits(pieces):
    """(E4) keys and values of the past kept: one token at a time, or several."""
    model, _ = tiny()
    x0 = torch.randint(5, (3, 7), generator=generator(2))
    past = [[] for _ in model.blocks]
    parts = [model(part, past=past) for part in x0.split(pieces, 1)]
    assert torch.allclose(torch.cat(parts, 1), model(x0), atol=1e-5)
    assert past[0][0].shape[2] == 7


def test_sampling_stops_when_every_document_has_ended():
    """(E4) after its EOS a row is EOS; no network call is made for nothing."""
    model, trace = CausalTable(T=6), []
    for table in model.logits:
        table.data[:, EOS] = 8.0
    x, info = ar.sample(model, config(seq_len=6, rows="docs"), 8, generator(0), trace=trace,
                        cached=False)
    longest = int(((x != EOS).sum(1) + 1).max())
    assert info["nfe"] == len(trace) == longest < 6 and is_document(x).all()
    x, info = ar.sample(model, config(seq_len=6), 8, generator(0), cached=False)
    assert info["nfe"] == 6 and (x == EOS).sum() > 8  # running text goes on


def test_the_trace_shows_what_is_not_written_yet_as_minus_one():
    model, trace = CausalTable(T=4, seed=5), []
    x, _ = ar.sample(model, config(seq_len=4, rows="docs"), 50, generator(0), torch.tensor([1]),
                     trace, cached=False)
    assert torch.equal(trace[-1][1], x)
    for i, shown in trace:
        written = shown >= 0
        assert torch.equal(shown[written], x[written]) and written[:, :i].all()
        ended = (shown[:, :i] == EOS).any(1)
        assert torch.equal(written[:, i:], ended[:, None].expand(50, 4 - i))


def test_a_prompt_that_fills_the_row_is_refused():
    with pytest.raises(ValueError, match="3 tokens"):
        ar.sample(CausalTable(), config(), 2, generator(0), torch.tensor([0, 1, 0]))


def test_temperature_zero_follows_the_likeliest_token():
    """(E4) greedy decoding; the prompt takes part."""
    model, cfg = tiny(temperature=0)
    x, _ = ar.sample(model, cfg, 4, generator(0), torch.tensor([[0], [1], [3], [4]]))
    logits = model(torch.cat((torch.full((4, 1), EOS), x[:, :-1]), 1))
    assert torch.equal(x[:, 1:], logits.argmax(2)[:, 1:]) and x[:, 0].tolist() == [0, 1, 3, 4]


def test_the_repetition_penalty_divides_the_logits_of_what_the_row_already_holds():
    """(E4) positive logits are divided, negative ones multiplied; enumerated law, prompt too."""
    model, rows, penalty = CausalTable(seed=6, scale=2.0), all_rows(3, 3), 3.0
    want = torch.ones(27, dtype=torch.float64)
    inputs = torch.cat((torch.full((27, 1), EOS), rows[:, :-1]), 1)
    logits = model(inputs).detach()
    for b, row in enumerate(rows.tolist()):
        for j in range(3):
            new = [z if v not in row[:j] else z / penalty if z > 0 else z * penalty
                   for v, z in enumerate(logits[b, j].tolist())]
            want[b] *= torch.tensor(new).softmax(0)[row[j]]
    cfg = config(repetition_penalty=penalty)
    x, _ = ar.sample(model, cfg, 60_000, generator(1), cached=False)
    assert chi_square(row_counts(x, 3), want) > 1e-3
    assert chi_square(row_counts(x, 3), model.p(EOS)) < 1e-6
    want = want * (rows[:, 0] == 1)
    x, _ = ar.sample(model, cfg, 30_000, generator(1), torch.tensor([1]), cached=False)
    assert chi_square(row_counts(x, 3), want / want.sum()) > 1e-3


def test_sampling_repeats_with_the_same_generator():
    model, cfg = tiny()
    rows = [ar.sample(model, cfg, 20, generator(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


# ---- infilling


def test_infilling_from_the_left_ignores_the_right():
    """(E2) log p(x_i | x_<i) by summing the enumerated joint over everything right of i."""
    model, x0 = CausalTable(T=4, seed=7), torch.tensor([[1, 0, 1, 0], [0, 0, 2, 1]])
    rows, p = all_rows(3, 4), model.p(EOS)
    for i in range(4):
        got = ar.infill_left(model, x0, i, config(seq_len=4))
        for b in range(2):
            same = (rows[:, :i] == x0[b, :i]).all(1)
            want = torch.stack([p[same & (rows[:, i] == v)].sum() for v in range(3)])
            want = want / p[same].sum()
            assert torch.allclose(got[b].exp().double(), want, atol=1e-6)


@pytest.mark.parametrize("rows", ["docs", "stream"])
def test_infilling_by_bayes_is_the_enumerated_posterior(rows):
    """(E5) p(x_i | all others); in documents a word cannot follow an EOS, nor an EOS precede a
    word."""
    model, every = CausalTable(T=4, seed=8), all_rows(3, 4)
    joint, cfg = model.p(EOS), config(seq_len=4, rows=rows)
    if rows == "docs":
        joint = document_law(model)
    checked = 0
    for x0 in every[joint > 0]:
        for i in range(4):
            others = torch.arange(4) != i
            same = (every[:, others] == x0[others]).all(1)
            posterior = torch.zeros(3, dtype=torch.float64)
            posterior.index_add_(0, every[same, i], joint[same])
            got = ar.infill_exact(model, x0, i, cfg, chunk=2).exp()
            assert torch.allclose(got, posterior / posterior.sum(), atol=1e-6)
            checked += 1
    assert checked == 4 * (joint > 0).sum()


def test_infilling_by_bayes_with_a_network():
    """(E5) against the likelihoods of all 5^4 rows."""
    model, cfg = tiny(seq_len=4)
    rows = all_rows(5, 4)
    p = (-ar.nll(model, rows, cfg)[0]).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    x0 = torch.tensor([4, 0, 3, 1])
    for i in range(4):
        others = torch.arange(4) != i
        same = (rows[:, others] == x0[others]).all(1)
        got = ar.infill_exact(model, x0, i, cfg)
        assert torch.allclose(got.exp(), p[same] / p[same].sum(), atol=1e-6)
        assert i == 3 or (got - ar.infill_left(model, x0[None], i, cfg)[0]).abs().max() > 1e-3
