"""--state belief: candidates are the top of what the network believed in an earlier call (E3)."""
import math

import pytest
import torch

import sdd
from tables import generator

V, T = 5, 4


def config(**changes):
    return sdd.Config(**(dict(vocab_size=V, seq_len=T, n_layer=1, n_head=2, n_embd=16, k=2,
                              window=0.5, state="belief", eos=0, bos=0) | changes))


def network(cfg, size=0.3):
    torch.manual_seed(0)
    model, g = sdd.Model(cfg), generator(1)
    for p in model.parameters():
        p.data += size * torch.randn(p.shape, generator=g)
    return model.requires_grad_(False)


class Spy(torch.nn.Module):
    """Remembers what a network was shown."""

    def __init__(self, model):
        super().__init__()
        self.model, self.shown = model, []

    def forward(self, ids, logp, where=None, blur=None):
        self.shown.append((ids.clone(), logp.clone(), where.clone()))
        return self.model(ids, logp, where, blur)


def drawn(seed=3):
    """Tokens and precisions of all three kinds, and evidence of those in between."""
    x0 = torch.randint(V, (6, T), generator=generator(seed))
    s = torch.tensor([[0.0, 3.0, sdd.SURE, 9.0]]).expand(6, T)
    return x0, s, sdd.observe(x0, s, V, generator(seed + 1))


def test_candidates_are_the_top_of_the_first_answer_and_the_evidence():
    """(E3) The first call sees the top k of own evidence, the second that of softmax(net + z); what
    is settled or unknown looks the same in both."""
    cfg, (x0, s, z) = config(), drawn()
    spy = Spy(network(cfg))
    logits, own = sdd.predict(spy, x0, s, z, s < sdd.SURE, cfg)
    (ids_a, logp_a, where), (ids_b, logp_b, _) = spy.shown
    between = (s > 0) & (s < sdd.SURE)
    assert torch.equal(where, between)
    assert torch.equal(ids_a[between], z.topk(2).indices)
    net = spy.model(ids_a, logp_a, between)
    belief = (net + z).log_softmax(1)
    assert torch.equal(ids_b[between], belief.topk(2).indices)
    assert torch.allclose(logp_b[between][:, :2], belief.topk(2).values, atol=1e-5)
    assert torch.allclose(logp_b[between].exp().sum(1), torch.ones(len(z)), atol=1e-5)
    assert torch.equal(ids_a[~between], ids_b[~between])
    assert torch.equal(logp_a[~between], logp_b[~between])
    assert not torch.equal(ids_a[between], ids_b[between])  # or nothing was tested
    last = spy.model(ids_b, logp_b, s < sdd.SURE)
    assert torch.allclose(logits - own, last, atol=1e-5)
    assert torch.equal(own[between[s < sdd.SURE]], z)  # (E6) evidence counts once


def test_an_earlier_answer_saves_the_first_call():
    cfg, (x0, s, z) = config(), drawn()
    spy, between = Spy(network(cfg)), (s > 0) & (s < sdd.SURE)
    past = torch.randn(len(z), V, generator=generator(9))
    sdd.predict(spy, x0, s, z, s < sdd.SURE, cfg, None, past)
    (ids, _, _), = spy.shown
    assert torch.equal(ids[between], (past + z).topk(2).indices)


def test_sampling_uses_the_answers_of_the_step_before():
    """One call a step; open positions hold the top of the last answer and all evidence so far."""
    cfg = config(sampling_steps=6, clock="random")
    spy, trace = Spy(network(cfg)), []
    x, info = sdd.sample(spy, cfg, 50, generator(0), trace=trace)
    assert info["nfe"] == 6 == len(spy.shown) and x.max() < V
    seen = 0
    for _, _, s, ids, logp in trace[1:-1]:
        between = (s > 0) & (s < sdd.SURE)
        seen += between.sum().item()
        assert torch.allclose(logp[between].exp().sum(1), torch.ones(between.sum()), atol=1e-4)
    assert seen > 50
    for k, (ids, logp, _) in enumerate(spy.shown):
        where = (trace[k][2] > 0) & (trace[k][2] < sdd.SURE)
        assert torch.equal(ids[where], trace[k][3][where])  # the film shows what the network saw


@pytest.mark.parametrize("mixture", [None, True])
def test_the_bound_of_any_network_stays_above_the_entropy(mixture):
    """(E4) (E8) The belief is made of evidence alone, no truth leaks: a random network on tokens
    that are independent and uniform pays more than T ln V."""
    cfg = config()
    model, x0 = network(cfg), torch.randint(V, (4000, T), generator=generator(5))
    if mixture:
        bound = sdd.nelbo_steps(model, x0, cfg, generator(6), 8)
    else:
        bound, _ = sdd.nelbo(model, x0, cfg, generator(6), 16)
    se = bound.std() / len(bound) ** 0.5
    assert bound.mean() > T * math.log(V) + 4 * se


def test_a_fresh_network_believes_its_evidence():
    """Where the network says nothing both kinds of candidates are the same, and so is the bound."""
    x0 = torch.randint(V, (300, T), generator=generator(5))
    bounds = []
    for state in ("belief", "evidence"):
        cfg = config(state=state)
        torch.manual_seed(0)
        bounds.append(sdd.nelbo(sdd.Model(cfg), x0, cfg, generator(6), 4)[0])
    assert torch.allclose(*bounds)


def test_gradients_flow_through_the_second_call_only():
    cfg, (x0, s, z) = config(), drawn()
    model = network(cfg).requires_grad_()
    logits, _ = sdd.predict(model, x0, s, z, s < sdd.SURE, cfg)
    logits.sum().backward()
    got = model.head.weight.grad.clone()
    model.zero_grad()
    with torch.no_grad():
        between = (s > 0) & (s < sdd.SURE)
        past = model(*sdd.states(x0, s, z, 2, V), between)
    sdd.predict(model, x0, s, z, s < sdd.SURE, cfg, None, past)[0].sum().backward()
    assert torch.allclose(got, model.head.weight.grad, atol=1e-6) and got.abs().sum() > 0
