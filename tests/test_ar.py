"""The autoregressive baseline: exact likelihood, sampler and infilling against enumeration."""
import math

import pytest
import torch

import ar
from lab import ar_extra
from tables import CausalTable, all_rows, chi_square, generator, row_counts

EOS = 2  # of the three-token tables; BOS is the same id, as in GPT-2


def config(**changes):
    return ar.Config(**(dict(vocab_size=3, seq_len=3, rows="stream", eos=EOS, bos=EOS) | changes))


def is_document(rows, eos=EOS):
    """Rows with nothing but EOS after the first EOS."""
    return torch.tensor([eos not in row or set(row[row.index(eos):]) == {eos}
                         for row in rows.tolist()])


def document_distribution(model, eos=EOS):
    """Probability of every EOS-filled row: all continuations of its first EOS put together."""
    rows, p = all_rows(model.V, model.T), model.p(eos)
    filled = rows.masked_fill(((rows == eos).cumsum(1) > 0), eos)
    code = (filled * model.V ** torch.arange(model.T - 1, -1, -1)).sum(1)
    return torch.zeros_like(p).index_add(0, code, p)


def canvas(n, cfg, prompt=()):
    """n rows of mask ids behind a prompt, (P,) or (n, P)."""
    x, prompt = torch.full((n, cfg.seq_len), cfg.vocab_size), torch.tensor(prompt).long()
    x[:, :prompt.shape[-1]] = prompt
    return x


def tiny(seed=0, **changes):
    """A network with weights far from their initial zeros."""
    cfg = config(**(dict(vocab_size=5, seq_len=7, n_layer=2, n_head=2, n_embd=16) | changes))
    model, g = ar.Model(cfg), generator(seed)
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    return model.requires_grad_(False), cfg


# ---- likelihood


def test_nll_is_the_chain_rule():
    """(E1) (E2) against the enumerated joint; the probabilities of all rows sum to one. BOS changes
    the distribution of the first token, through the input only; it is never scored."""
    model, rows = CausalTable(T=4), all_rows(3, 4)
    for bos in range(3):
        nll = ar.nll(model, rows, config(seq_len=4, bos=bos))
        assert torch.allclose(nll, -model.p(bos).log(), atol=1e-5)
        assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_a_document_is_scored_up_to_its_first_eos():
    """(E1) the tail is certain, so it is free; the probabilities of all documents sum to one."""
    model, rows = CausalTable(T=4), all_rows(3, 4)
    nll = ar.nll(model, rows, config(seq_len=4, rows="docs"))
    documents = is_document(rows)
    p = (-nll).exp()[documents]
    assert torch.allclose(p, document_distribution(model)[documents], atol=1e-6)
    assert p.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("rows", ["docs", "stream"])
def test_the_loss_is_nats_per_scored_token(rows):
    """(E3) all scored tokens alike, however the rows are grouped by length inside; a fresh network
    pays ln V each."""
    model, cfg = tiny(rows=rows, seq_len=7)
    x0 = torch.randint(5, (33, 7), generator=generator(1))
    x0 = x0.masked_fill((x0 == EOS).cumsum(1) > 0, EOS) if rows == "docs" else x0
    logp = model(torch.cat((torch.full((33, 1), EOS), x0[:, :-1]), 1)).log_softmax(2)
    nll = -logp.gather(2, x0[..., None])[..., 0]
    ended = torch.cat((torch.zeros(33, 1), (x0 == EOS).cumsum(1)[:, :-1]), 1) > 0
    count = ~ended if rows == "docs" else torch.ones_like(ended)
    loss = ar.loss_fn(model, x0, 1 / count.sum(), cfg)
    assert loss.item() == pytest.approx(nll[count].mean().item(), rel=1e-5)
    assert ar.nll(model, x0, cfg).sum().item() == pytest.approx(nll[count].sum().item(), rel=1e-5)
    loss = ar.loss_fn(ar.Model(cfg), x0, 1 / count.sum(), cfg)
    assert loss.item() == pytest.approx(math.log(5), abs=1e-6)


def test_nll_does_not_depend_on_how_rows_are_batched():
    model, cfg = tiny(rows="docs")
    x0 = torch.randint(5, (130, 7), generator=generator(1))
    alone = torch.cat([ar.nll(model, x0[i:i + 1], cfg) for i in (0, 63, 64, 129)])
    assert torch.allclose(ar.nll(model, x0, cfg)[[0, 63, 64, 129]], alone, atol=1e-5)


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
def test_samples_have_the_distribution_of_the_likelihood(rows):
    """(E4) chi-square of 60 000 rows; documents are filled with EOS after their first."""
    model, cfg = CausalTable(seed=3), config(rows=rows)
    x, nfe = ar.sample(model, canvas(60_000, cfg), cfg, generator(1))
    want = document_distribution(model) if rows == "docs" else model.p(EOS)
    assert chi_square(row_counts(x, 3), want) > 1e-3 and nfe == 3
    assert is_document(x[:2000]).all() == (rows == "docs")


def test_a_prompt_is_kept_and_continued():
    """(E4) given x_1 the rest has its conditional distribution, whatever other rows begin with."""
    model, want = CausalTable(seed=4), CausalTable(seed=4).p(EOS)
    x, nfe = ar.sample(model, canvas(60_000, config(), [[0], [1]] * 30_000), config(), generator(1))
    assert nfe == 2
    for first in (0, 1):
        given = want * (all_rows(3, 3)[:, 0] == first)
        assert (x[first::2, 0] == first).all()
        assert chi_square(row_counts(x[first::2], 3), given / given.sum()) > 1e-3


def uncached(model, x, cfg, g):
    """ar.sample without its cache: every call reads BOS and all tokens so far."""
    x = torch.cat((torch.full_like(x[:, :1], cfg.bos), x), 1)
    for i in range(int((x[0] < cfg.vocab_size).sum()), x.shape[1]):
        ended = (x[:, 1:i] == cfg.eos).any(1) & (cfg.rows == "docs")
        new = ar.categorical(ar.filter_logits(model(x[:, :i])[:, -1], cfg), g)
        x[:, i] = new.masked_fill(ended, cfg.eos)
    return x[:, 1:]


@pytest.mark.parametrize("rows", ["docs", "stream"])
@pytest.mark.parametrize("prompt", [[], [3], [3, 1, 0]])
def test_generation_with_and_without_a_cache_is_the_same(rows, prompt):
    """(E4) the same seed draws the same tokens, also when rows end and after a prompt."""
    model, cfg = tiny(rows=rows)
    x, _ = ar.sample(model, canvas(100, cfg, prompt), cfg, generator(1))
    assert torch.equal(x, uncached(model, canvas(100, cfg, prompt), cfg, generator(1)))
    assert len(x.unique(dim=0)) > 10 and ((x == EOS).any(1) & (x != EOS).any(1)).any()


def test_sampling_stops_when_every_document_has_ended():
    """(E4) after its EOS a row is EOS; no network evaluation is made for nothing."""
    model = CausalTable(T=6)
    for table in model.logits:
        table.data[:, EOS] = 2.0
    cfg = config(seq_len=6, rows="docs")
    x, nfe = ar.sample(model, canvas(8, cfg), cfg, generator(0))
    assert nfe == ((x != EOS).sum(1) + 1).max() and 1 < nfe < 6 and is_document(x).all()
    x, nfe = ar.sample(model, canvas(8, cfg), config(seq_len=6), generator(0))
    assert nfe == 6 and not is_document(x).any()  # running text goes on


def test_on_step_sees_the_canvas_after_each_network_evaluation():
    model, cfg, frames = CausalTable(T=4, seed=5), config(seq_len=4, rows="docs"), []
    start = canvas(50, cfg, [1])
    x, nfe = ar.sample(model, start, cfg, generator(0),
                       on_step=lambda k, x: frames.append((k, x.clone())))
    assert [k for k, _ in frames] == list(range(1, nfe + 1)) and nfe == 3
    for k, shown in frames:
        assert torch.equal(shown[:, :1 + k], x[:, :1 + k]) and (shown[:, 1 + k:] == 3).all()
    assert torch.equal(start, canvas(50, cfg, [1]))  # the caller's canvas is as it was
    assert torch.equal(ar.sample(model, x, cfg, generator(0))[0], x)  # no mask, nothing to do


def test_temperature_zero_follows_the_likeliest_token():
    """(E4) greedy decoding; the prompt takes part."""
    model, cfg = tiny(temperature=0)
    x, _ = ar.sample(model, canvas(4, cfg, [[0], [1], [3], [4]]), cfg, generator(0))
    logits = model(torch.cat((torch.full((4, 1), EOS), x[:, :-1]), 1))
    assert torch.equal(x[:, 1:], logits.argmax(2)[:, 1:]) and x[:, 0].tolist() == [0, 1, 3, 4]


def test_the_repetition_penalty_divides_the_logits_of_what_the_row_already_holds():
    """Positive logits are divided, negative ones multiplied; against enumeration, prompt too."""
    model, rows, penalty = CausalTable(seed=6, scale=2.0), all_rows(3, 3), 3.0
    want = torch.ones(27, dtype=torch.float64)
    logits = model(torch.cat((torch.full((27, 1), EOS), rows[:, :-1]), 1)).detach()
    for b, row in enumerate(rows.tolist()):
        for j in range(3):
            new = [z if v not in row[:j] else z / penalty if z > 0 else z * penalty
                   for v, z in enumerate(logits[b, j].tolist())]
            want[b] *= torch.tensor(new).softmax(0)[row[j]]
    cfg = ar_extra.Config(**vars(config()), repetition_penalty=penalty)
    x, _ = ar_extra.sample(model, canvas(60_000, cfg), cfg, generator(1))
    assert chi_square(row_counts(x, 3), want) > 1e-3
    assert chi_square(row_counts(x, 3), model.p(EOS)) < 1e-6
    want = want * (rows[:, 0] == 1)
    x, _ = ar_extra.sample(model, canvas(30_000, cfg, [1]), cfg, generator(1))
    assert chi_square(row_counts(x, 3), want / want.sum()) > 1e-3


# ---- infilling


def test_infilling_from_the_left_ignores_the_right():
    """(E2) log p(x_i | x_<i) by summing the enumerated joint over everything right of i."""
    model, x0 = CausalTable(T=4, seed=7), torch.tensor([[1, 0, 1, 0], [0, 0, 2, 1]])
    rows, p = all_rows(3, 4), model.p(EOS)
    for i in range(4):
        got = ar_extra.infill_left(model, x0, i, config(seq_len=4))
        for b in range(2):
            same = (rows[:, :i] == x0[b, :i]).all(1)
            want = torch.stack([p[same & (rows[:, i] == v)].sum() for v in range(3)])
            assert torch.allclose(got[b].exp().double(), want / want.sum(), atol=1e-6)


@pytest.mark.parametrize("rows", ["docs", "stream"])
def test_infilling_by_bayes_is_the_enumerated_posterior(rows):
    """p(x_i | all others); in documents a word cannot follow an EOS, nor an EOS precede a
    word."""
    model, every = CausalTable(T=4, seed=8), all_rows(3, 4)
    joint = document_distribution(model) if rows == "docs" else model.p(EOS)
    cfg = config(seq_len=4, rows=rows)
    for x0 in every[joint > 0]:
        for i in range(4):
            others = torch.arange(4) != i
            same = (every[:, others] == x0[others]).all(1)
            posterior = torch.zeros(3).double().index_add(0, every[same, i], joint[same])
            got = ar_extra.infill_exact(model, x0, i, cfg, chunk=2).exp()
            assert torch.allclose(got, posterior / posterior.sum(), atol=1e-6)
            left = ar_extra.infill_left(model, x0[None], i, cfg)[0].exp()
            assert i == 3 or not torch.allclose(got, left.double(), atol=1e-3)
