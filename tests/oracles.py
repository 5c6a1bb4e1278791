"""What the tables of exact probabilities have in common: rows, joint distributions, quadrature, and
statistics of draws. Everything is float64 and shares no code with the scripts it checks.

`joint` (V^T,) holds the probabilities of all rows of T tokens, in the order of all_rows.
"""
import functools
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats


def all_rows(V, T):
    """Every row of T tokens: (V^T, T)."""
    return torch.tensor(list(itertools.product(range(V), repeat=T)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def dirichlet(V, T, seed=0, share=0.4):
    """A random joint distribution of rows: (V^T,)."""
    return torch.from_numpy(np.random.RandomState(seed).dirichlet(np.full(V ** T, share)))


def entropy(joint):
    return torch.special.entr(joint).sum().item()


def marginals(joint, V, T):
    """p(x_i = v): (T, V)."""
    return (joint[:, None, None] * F.one_hot(all_rows(V, T), V).double()).sum(0)


def independent_rows(joint, V, T):
    """The rows when each token is drawn from its marginal: (V^T,)."""
    return marginals(joint, V, T)[torch.arange(T), all_rows(V, T)].prod(1)


def conditional(joint, V, T, given):
    """p(the other tokens | those at the positions `given`) of every row: (V^T,)."""
    shown = all_rows(V, T)[:, given]
    return joint / ((shown[:, None] == shown).all(2).double() @ joint)


@functools.lru_cache
def hermite(nodes, dims=1):
    """Nodes (nodes^dims, dims) and weights of a standard normal expectation."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    x, w = torch.from_numpy(x), torch.from_numpy(w / w.sum())
    return torch.cartesian_prod(*dims * [x]).view(-1, dims), \
        torch.cartesian_prod(*dims * [w]).view(-1, dims).prod(1)


@functools.lru_cache
def legendre(nodes):
    """Nodes and weights of an integral over [0, 1], in pairs."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    return list(zip((x + 1) / 2, w / 2))


# ---- statistics


def chi_square(counts, p):
    """p-value of counts under the probabilities p; rare outcomes are put together."""
    counts, p = np.asarray(counts, float), np.asarray(p, float)
    assert abs(p.sum() - 1) < 1e-6
    expected = p / p.sum() * counts.sum()
    assert counts[expected < 1e-9].sum() == 0, "an impossible outcome was drawn"
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 1e-9
    return stats.chisquare(counts[keep], expected[keep] * (counts.sum() / expected.sum())).pvalue


def row_counts(x, V):
    """How often each row of `all_rows` occurs in samples x (n, T): (V^T,)."""
    place = V ** torch.arange(x.shape[1] - 1, -1, -1)
    return (x * place).sum(1).bincount(minlength=V ** x.shape[1])


def mean_and_se(draw, times):
    """Mean of draw(generator) over seeds, and its standard error."""
    values = np.array([draw(generator(seed)).item() for seed in range(times)])
    return values.mean(), values.std(ddof=1) / np.sqrt(times)


def close(draws, truth, width=4.5, slack=1e-6):
    """Is the mean of independent draws (n,) the truth, within so many standard errors?"""
    se = draws.double().std() / len(draws) ** 0.5
    return abs(draws.double().mean().item() - truth) < width * se.item() + slack


def row_by_row(draws, truth, times, slack=1e-6, width=4.5):
    """Are the means of `times` draws for every row in turn their truths, and is the mean of all?"""
    draws = draws.view(len(truth), times).double()
    off, se = draws.mean(1) - truth, draws.std(1) / times ** 0.5
    return (off.abs() < (width + 1) * se + slack).all() and \
        off.mean().abs() < width * se.square().sum().sqrt() / len(truth) + slack
