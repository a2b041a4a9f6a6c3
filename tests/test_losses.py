"""The objectives from five sides: hand-worked values, finite differences, closed-form gradients, identities, extremes.

An objective has one `promise` here: its signature, the cases worked by hand (settings, losses, ∂L/∂(input) in closed form),
its reward and its loss at step zero. Everything that can be asked of all objectives is asked of every promise, so that a new
objective needs no other line. All of it in float64, except where the type is the point.

The three pairs, and what follows from them (n: tokens, a = s/n, u = s − s̄):

    pair   s_w  s_l   s̄_w   s̄_l  n_w n_l    u_w   u_l     Δ      a_w    a_l      d       Δ̃         D_l − D_w    m
     1     −12  −24   −14   −22   10  12     2    −2      4     −1.2   −2      0.8     11/30          1        2
     2     −30   −8   −27    −9   20   8    −3     1     −4     −1.5   −1     −0.5     −0.275        −1        0.5
     3      −9  −10   −9.5  −12    5   4    0.5    2     −1.5   −1.8   −2.5    0.7     −0.4          0.5      −1

Over the first min(n_w, n_l) = 10, 8, 4 tokens: s^k −12, −11, −7.5 and −19, −8, −10, so u^k = 2, 1, 1 and −0.5, 1, 2.

The four rows of the unpaired objectives: u = 2, −2, −3, 0.5; desirable, not, desirable, not; log-ratios of the
KL completions 3, −1, 2, 0 with mean 1.
"""

import ast
import doctest
import inspect
import math
import os
import re
import runpy
import statistics
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

import losses
from losses import OBJECTIVES

F64 = torch.float64
LOG2 = math.log(2)
PAIRS = {
    "logp_w": [-12.0, -30.0, -9.0], "logp_l": [-24.0, -8.0, -10.0],
    "ref_w": [-14.0, -27.0, -9.5], "ref_l": [-22.0, -9.0, -12.0],
    "old_w": [-13.0, -28.0, -9.25], "old_l": [-23.0, -8.5, -11.0],
    "len_w": [10, 20, 5], "len_l": [12, 8, 4],
    "kl_w": [0.5, 2.0, 0.25], "kl_l": [1.5, 1.0, 0.75],
    "margin": [2.0, 0.5, -1.0],
    "prefix_logp_w": [-12.0, -11.0, -7.5], "prefix_logp_l": [-19.0, -8.0, -10.0],
    "ref_prefix_logp_w": [-14.0, -12.0, -8.5], "ref_prefix_logp_l": [-18.5, -9.0, -12.0],
}  # fmt: skip
ROWS = {
    "logp": [-12.0, -24.0, -30.0, -9.0], "ref": [-14.0, -22.0, -27.0, -9.5], "desirable": [True, False, True, False],
    "logp_kl": [-20.0, -21.0, -22.0, -23.0], "ref_kl": [-23.0, -20.0, -24.0, -23.0],
}  # fmt: skip
# What the policy's weights reach.
POLICY = ("logp_w", "logp_l", "kl_w", "kl_l", "prefix_logp_w", "prefix_logp_l", "logp", "logp_kl")


def softplus(x):
    """−logσ(−x), by Python's own log and exp."""
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def bt(h):
    return [softplus(-x) for x in h]


def bernoulli_kl(a, b):
    """KL(σ(a) ‖ σ(b)) of two Bernoulli distributions."""
    return sum(p * math.log(p / q) for p, q in ((sigmoid(a), sigmoid(b)), (sigmoid(-a), sigmoid(-b))))


def z_scores(x):
    return [(v - statistics.fmean(x)) / statistics.pstdev(x) for v in x]


def gamma_by_bisection(r, gamma, tau):
    """γ-PO's margins from its optimality condition, without iterating the fixed point.

    With x = log Np the condition is x_i + (γ/τ) σ(γ e^{x_i} − r_i) = λ for one λ: increasing in x_i, so bisect for x_i;
    Σ e^{x_i} = N increases with λ, so bisect for λ.
    """
    c = gamma / tau

    def solve(f, low, high):
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if f(middle) < 0 else (low, middle)
        return low

    def np(level, ri):
        return math.exp(solve(lambda x: x + c * sigmoid(gamma * math.exp(x) - ri) - level, level - c, level))

    level = solve(lambda lam: sum(np(lam, ri) for ri in r) - len(r), -c, c + 1)
    return [gamma * np(level, ri) for ri in r]


# Derived columns of the docstring's table, by hand.
DELTA = [4.0, -4.0, -1.5]
AVERAGE_DELTA = [11 / 30, -0.275, -0.4]
A_W, A_L, D = [-1.2, -1.5, -1.8], [-2.0, -1.0, -2.5], [0.8, -0.5, 0.7]
U_W, U_L = [2.0, -3.0, 0.5], [-2.0, 1.0, 2.0]
REF_D = [-1.4 + 22 / 12, -1.35 + 9 / 8, -1.9 + 3.0]  # ā_w − ā_l


# --- closed forms: v holds the inputs as float64 tensors -------------------------------------------------------------

sig = torch.sigmoid


def pair(h, w=1.0, r=1.0, eps=0.0):
    """Gradients of the Bradley–Terry loss of h, with ∂h/∂s_w = w and ∂h/∂s_l = −r."""
    force = sig(h) - (1 - eps)
    return {"logp_w": force * w, "logp_l": -force * r}


def opposed(g):
    """∂L/∂s_w = g = −∂L/∂s_l."""
    return {"logp_w": g, "logp_l": -g}


def gap(v):
    return (v.logp_w - v.ref_w) - (v.logp_l - v.ref_l)


def average_gap(v):
    return (v.logp_w - v.ref_w) / v.len_w - (v.logp_l - v.ref_l) / v.len_l


def averages(v, beta):
    return beta * (v.logp_w / v.len_w - v.logp_l / v.len_l)


def per_token(h, v, beta, factor=1.0):
    """Bradley–Terry in averages: ∂h/∂s = ±β/n."""
    return pair(h, factor * beta / v.len_w, factor * beta / v.len_l)


def scores(x):
    """z-scores with the population standard deviation."""
    return (x - x.mean()) / ((x - x.mean()) ** 2).mean().sqrt()


def spread(x):
    return ((x - x.mean()) ** 2).mean().sqrt()


def exo_slope(v, eps):
    z = 0.1 * gap(v)
    return opposed(0.1 * sig(z) * sig(-z) * (z - math.log((1 - eps) / eps)))


def discopop_slope(v, beta, tau):
    h = beta * gap(v)
    m = sig(h / tau)
    # d/dh of (1−m)(−logσ(h)) + m e^{−h}, with dm/dh = m(1−m)/τ
    g = beta * (m * (1 - m) / tau * (torch.exp(-h) + torch.log(sig(h))) - (1 - m) * sig(-h) - m * torch.exp(-h))
    return opposed(g)


def ld_slope(v, beta, alpha):
    """ld_dpo: the force on a token of the first k, of which α acts through the whole sum."""
    prefix_gap = (v.prefix_logp_w - v.ref_prefix_logp_w) - (v.prefix_logp_l - v.ref_prefix_logp_l)
    force = -beta * sig(-beta * ((1 - alpha) * prefix_gap + alpha * gap(v)))
    return {
        "logp_w": alpha * force,
        "logp_l": -alpha * force,
        "prefix_logp_w": (1 - alpha) * force,
        "prefix_logp_l": (alpha - 1) * force,
    }


def focal_slope(v, beta, gamma):
    """d(−p^γ log p)/dp · dp/dh · β, with dp/dh = p(1 − p)."""
    p = sig(beta * gap(v))
    return opposed(-(gamma * p ** (gamma - 1) * torch.log(p) + p ** (gamma - 1)) * p * (1 - p) * beta)


def f_slope(v, g, slope):
    u_w, u_l = v.logp_w - v.ref_w, v.logp_l - v.ref_l
    return pair(0.1 * (g(u_w) - g(u_l)), 0.1 * slope(u_w), 0.1 * slope(u_l))


def orpo_slope(v, lam):
    p_w, p_l = torch.exp(v.logp_w / v.len_w), torch.exp(v.logp_l / v.len_l)
    o = torch.log(p_w / (1 - p_w) / (p_l / (1 - p_l)))
    return {
        "logp_w": -1 / v.len_w - lam / v.len_w * sig(-o) / (1 - p_w),
        "logp_l": lam / v.len_l * sig(-o) / (1 - p_l),
    }


def alphapo_slope(v, beta, gamma, alpha):
    a_w, a_l = v.logp_w / v.len_w, v.logp_l / v.len_l
    h = beta * ((1 - torch.exp(-alpha * a_w)) - (1 - torch.exp(-alpha * a_l))) / alpha - gamma
    return pair(h, beta * torch.exp(-alpha * a_w) / v.len_w, beta * torch.exp(-alpha * a_l) / v.len_l)


def alpha_slope(v, m, factor=1.0, gamma=4.0, alpha=0.5, beta=10.0):
    """α-DPO: σ(−h) at h = u − γ − αM*, times β/n, times what the missing stop-gradient leaves."""
    return per_token(averages(v, beta) - gamma - alpha * m, v, beta, factor)


def amapo_slope(v, beta, margin):
    return per_token(averages(v, beta) - tensor(margin, dtype=F64), v, beta)


def labelled(v, up, down):
    """−up on desirable rows, +down on the others."""
    return {"logp": torch.where(v.desirable, -up, down)}


class Case(NamedTuple):
    settings: dict
    expected: list
    gradient: object  # v → {input: ∂(Σ L)/∂input}; a policy input it does not name has gradient 0
    inputs: dict = {}  # in place of the common ones
    objective: str = ""


PROMISES = {}


def promise(signature, *cases, reward, step_zero=None, certain=None):
    """What holds of an objective.

    reward: that of its paper at the defaults, for s = −6, s̄ = −8, n = 4, so u = 2, u/n = 0.5, a = −1.5.
    step_zero: its loss where policy = reference, s = −10 and −20 on ten tokens each; None if it reads no reference.
    certain: the settings under which one that draws leaves nothing to chance.
    """
    name = signature.partition("(")[0]
    cases = [case._replace(objective=name) for case in cases]
    PROMISES[name] = SimpleNamespace(
        signature=signature, cases=cases, reward=reward, step_zero=step_zero, certain=certain or {}
    )


def weighted_simpo(log_w, v):
    w = torch.exp(tensor(log_w, dtype=F64))
    return {k: w * g for k, g in per_token(averages(v, 2.0) - 1.0, v, 2.0).items()}


SIMPO = bt([0.6, -2.0, 0.4])  # h = 2d − 1
RATIO = [10 * x for x in AVERAGE_DELTA]  # M = βΔ̃ at β = 10
POLICY_M, REFERENCE_M = [8.0, -5.0, 7.0], [10 * x for x in REF_D]
KL_M = [10.0, -10.0, 5.0]  # β(D_l − D_w)
SWAPPED = {"logp_w": PAIRS["logp_l"], "logp_l": PAIRS["logp_w"], "len_w": PAIRS["len_l"], "len_l": PAIRS["len_w"]}
# AMaPO: μ = (0.8 − 0.5 + 0.7)/3 = 1/3, and only pair 2 lies below it.
MU, S = 1 / 3, statistics.pstdev(D)
# Reference margins 8, −18, 10 against policy margins 12, −22, 1: by rank (−22, 1, 12) meets (−18, 8, 10).
CROSSED = {"ref_w": [-14.0, -27.0, -2.0]}


def alpha_h(m, gamma=4.0, alpha=0.5):
    """h = u − γ − αM with u = βd = 8, −5, 7."""
    return [u - gamma - alpha * x for u, x in zip(POLICY_M, m)]


promise(
    "sft(logp_w, len_w)",
    Case({}, [1.2, 1.5, 1.8], lambda v: {"logp_w": -1 / v.len_w}),
    reward=-1.5,
)
promise(
    "dpo(logp_w, logp_l, ref_w, ref_l, *, beta=0.1, label_smoothing=0.0)",
    # h = βΔ = 0.4, −0.4, −0.15
    Case({}, bt([0.4, -0.4, -0.15]), lambda v: pair(0.1 * gap(v), 0.1, 0.1)),
    Case(
        {"label_smoothing": 0.1},
        [0.9 * softplus(-h) + 0.1 * softplus(h) for h in (0.4, -0.4, -0.15)],
        lambda v: pair(0.1 * gap(v), 0.1, 0.1, eps=0.1),
    ),
    reward=0.1 * 2.0,
    step_zero=LOG2,
)
promise(
    "dpo_norm(logp_w, logp_l, ref_w, ref_l, len_w, len_l, *, beta=5.0, label_smoothing=0.0)",
    # h = 5Δ̃
    Case({}, bt([11 / 6, -1.375, -2.0]), lambda v: per_token(5 * average_gap(v), v, 5.0)),
    reward=5.0 * 0.5,
    step_zero=LOG2,
)
promise(
    "robust_dpo(logp_w, logp_l, ref_w, ref_l, *, beta=0.1, label_smoothing=0.1)",
    Case(
        {},
        [(0.9 * softplus(-h) - 0.1 * softplus(h)) / 0.8 for h in (0.4, -0.4, -0.15)],
        lambda v: opposed(-0.1 * (0.9 * sig(-0.1 * gap(v)) + 0.1 * sig(0.1 * gap(v))) / 0.8),
    ),
    reward=0.1 * 2.0,
    step_zero=LOG2,
)
promise(
    "ipo(logp_w, logp_l, ref_w, ref_l, len_w, len_l, *, tau=0.1, average=True)",
    # (Δ̃ − 5)²
    Case(
        {},
        [(139 / 30) ** 2, 5.275**2, 5.4**2],
        lambda v: {"logp_w": 2 / v.len_w * (average_gap(v) - 5), "logp_l": -2 / v.len_l * (average_gap(v) - 5)},
    ),
    # (4 − 5)², (−4 − 5)², (−1.5 − 5)²
    Case({"average": False}, [1.0, 81.0, 42.25], lambda v: opposed(2 * (gap(v) - 5))),
    reward=0.5,
    step_zero=25.0,
)
promise(
    "rdpo(logp_w, logp_l, ref_w, ref_l, len_w, len_l, *, beta=0.1, alpha=0.01)",
    # n_w − n_l = −2, 12, 1: h = 0.4 − 0.02, −0.4 + 0.12, −0.15 + 0.01
    Case(
        {},
        bt([0.38, -0.28, -0.14]),
        lambda v: pair(0.1 * gap(v) + 0.01 * (v.len_w - v.len_l), 0.1, 0.1),
    ),
    reward=0.1 * 2.0,
    step_zero=LOG2,
)
promise(
    "dpop(logp_w, logp_l, ref_w, ref_l, *, beta=0.3, lam=50.0)",
    # u_w = 2, −3, 0.5: only pair 2 pays, 50 · 3
    Case(
        {},
        bt([1.2, 0.3 * -154, -0.45]),
        lambda v: pair(tensor([1.2, -46.2, -0.45], dtype=F64), 0.3 * tensor([1.0, 51.0, 1.0], dtype=F64), 0.3),
    ),
    # β = 0.1, λ = 2: Δ − 6 = −10
    Case(
        {"beta": 0.1, "lam": 2.0},
        bt([0.4, -1.0, -0.15]),
        lambda v: pair(tensor([0.4, -1.0, -0.15], dtype=F64), tensor([0.1, 0.3, 0.1], dtype=F64), 0.1),
    ),
    reward=0.3 * 2.0,
    step_zero=LOG2,
)
promise(
    "dpo_shift(logp_w, logp_l, ref_w, ref_l, *, beta=0.1, lam=0.95)",
    # u_w − 0.95u_l = 2 + 1.9, −3 − 0.95, 0.5 − 1.9
    Case({}, bt([0.39, -0.395, -0.14]), lambda v: pair(tensor([0.39, -0.395, -0.14], dtype=F64), 0.1, 0.095)),
    Case({"lam": 0.5}, bt([0.3, -0.35, -0.05]), lambda v: pair(tensor([0.3, -0.35, -0.05], dtype=F64), 0.1, 0.05)),
    reward=0.1 * 2.0,
    step_zero=LOG2,
)
promise(
    "focal(logp_w, logp_l, ref_w, ref_l, *, beta=0.1, gamma=0.05)",
    *(
        Case(
            given,
            [sigmoid(beta * x) ** gamma * softplus(-beta * x) for x in DELTA],
            lambda v, beta=beta, gamma=gamma: focal_slope(v, beta, gamma),
        )
        for given, beta, gamma in (({}, 0.1, 0.05), ({"beta": 1.0, "gamma": 2.0}, 1.0, 2.0))
    ),
    reward=0.1 * 2.0,
    step_zero=LOG2 * 0.5**0.05,
)
promise(
    "ld_dpo(logp_w, logp_l, ref_w, ref_l, prefix_logp_w, prefix_logp_l, ref_prefix_logp_w, ref_prefix_logp_l, "
    "*, beta=0.1, alpha=0.5)",
    # v = u^k + ½(u − u^k) = 2, −1, 0.75 and −1.25, 1, 2
    Case({}, bt([0.325, -0.2, -0.125]), lambda v: ld_slope(v, 0.1, 0.5)),
    # β = 1, α = ¼: v = 2, 0, 0.875 and −0.875, 1, 2
    Case({"beta": 1.0, "alpha": 0.25}, bt([2.875, -1.0, -1.125]), lambda v: ld_slope(v, 1.0, 0.25)),
    reward=0.1 * 2.0,
    step_zero=LOG2,
)
promise(
    "odpo(logp_w, logp_l, ref_w, ref_l, margin, *, beta=0.1, alpha=1.0)",
    # log m = log 2, −log 2; the scores of pair 3 say the opposite of its order, so nothing is asked of it
    Case(
        {},
        [*bt([0.4 - LOG2, -0.4 + LOG2]), 0.0],
        lambda v: pair(tensor([0.4 - LOG2, -0.4 + LOG2, math.inf], dtype=F64), 0.1, 0.1),
    ),
    Case(
        {"beta": 0.5, "alpha": 2.0},
        [*bt([2 - 2 * LOG2, -2 + 2 * LOG2]), 0.0],
        lambda v: pair(tensor([2 - 2 * LOG2, -2 + 2 * LOG2, math.inf], dtype=F64), 0.5, 0.5),
    ),
    reward=0.1 * 2.0,
    step_zero=math.log(3),  # log(1 + m)
)
promise(
    "rpo_bwd(logp_w, logp_l, ref_w, ref_l, margin, *, beta=0.1, eta=1.0)",
    Case(
        {},
        [bernoulli_kl(t, h) for t, h in zip([2.0, 0.5, -1.0], [0.4, -0.4, -0.15])],
        lambda v: opposed(0.1 * (sig(0.1 * gap(v)) - sig(v.margin))),
    ),
    # β = 0.5, η = 3: βΔ = 2, −2, −0.75 against t = 6, 1.5, −3
    Case(
        {"beta": 0.5, "eta": 3.0},
        [bernoulli_kl(t, h) for t, h in zip([6.0, 1.5, -3.0], [2.0, -2.0, -0.75])],
        lambda v: opposed(0.5 * (sig(0.5 * gap(v)) - sig(3 * v.margin))),
    ),
    reward=0.1 * 2.0,
    step_zero=LOG2 + sum(q * math.log(q) for q in (sigmoid(2), sigmoid(-2))),  # entropy of ½ less σ(2)'s
)
promise(
    "rpo_fwd(logp_w, logp_l, ref_w, ref_l, margin, *, beta=0.1, eta=1.0)",
    Case(
        {},
        [bernoulli_kl(h, t) for t, h in zip([2.0, 0.5, -1.0], [0.4, -0.4, -0.15])],
        lambda v: opposed(0.1 * sig(0.1 * gap(v)) * sig(-0.1 * gap(v)) * (0.1 * gap(v) - v.margin)),
    ),
    Case(
        {"beta": 0.5, "eta": 3.0},
        [bernoulli_kl(h, t) for t, h in zip([6.0, 1.5, -3.0], [2.0, -2.0, -0.75])],
        lambda v: opposed(0.5 * sig(0.5 * gap(v)) * sig(-0.5 * gap(v)) * (0.5 * gap(v) - 3 * v.margin)),
    ),
    reward=0.1 * 2.0,
    step_zero=-0.5 * math.log(4 * sigmoid(2) * sigmoid(-2)),
)
promise(
    "rpo_sq(logp_w, logp_l, ref_w, ref_l, margin, *, beta=0.1, eta=1.0)",
    # (0.4 − 2)², (−0.4 − 0.5)², (−0.15 + 1)²
    Case({}, [2.56, 0.81, 0.7225], lambda v: opposed(0.2 * (0.1 * gap(v) - v.margin))),
    # β = 0.5, η = 3: (2 − 6)², (−2 − 1.5)², (−0.75 + 3)²
    Case({"beta": 0.5, "eta": 3.0}, [16.0, 12.25, 5.0625], lambda v: opposed(0.5 * gap(v) - 3 * v.margin)),
    reward=0.1 * 2.0,
    step_zero=4.0,  # m²
)
promise(
    "rso_hinge(logp_w, logp_l, ref_w, ref_l, *, beta=0.05)",
    Case({}, [0.8, 1.2, 1.075], lambda v: opposed(tensor(-0.05))),
    # β = 1: pair 1 has Δ = 4 and rests
    Case({"beta": 1.0}, [0.0, 5.0, 2.5], lambda v: opposed(tensor([0.0, -1.0, -1.0]))),
    reward=0.05 * 2.0,
    step_zero=1.0,
)
promise(
    "exo(logp_w, logp_l, ref_w, ref_l, *, beta=0.1, label_smoothing=1e-3)",
    # KL of Bernoulli(q), q = σ(z), from Bernoulli(1 − ε)
    Case(
        {},
        [q * math.log(q / 0.999) + (1 - q) * math.log((1 - q) / 0.001) for q in map(sigmoid, (0.4, -0.4, -0.15))],
        lambda v: exo_slope(v, 1e-3),
    ),
    reward=0.1 * 2.0,
    step_zero=0.5 * math.log(0.25 / (0.999 * 0.001)),
)
promise(
    "nca(logp_w, logp_l, ref_w, ref_l, *, beta=0.01)",
    # v = u at β = 1
    Case(
        {"beta": 1.0},
        [softplus(-w) + 0.5 * softplus(w) + 0.5 * softplus(r) for w, r in zip(U_W, U_L)],
        lambda v: {"logp_w": 1.5 * sig(v.logp_w - v.ref_w) - 1, "logp_l": 0.5 * sig(v.logp_l - v.ref_l)},
    ),
    Case(
        {},
        [softplus(-w / 100) + 0.5 * softplus(w / 100) + 0.5 * softplus(r / 100) for w, r in zip(U_W, U_L)],
        lambda v: {
            "logp_w": 0.01 * (1.5 * sig(0.01 * (v.logp_w - v.ref_w)) - 1),
            "logp_l": 0.005 * sig(0.01 * (v.logp_l - v.ref_l)),
        },
    ),
    reward=0.01 * 2.0,
    step_zero=2 * LOG2,
)
promise(
    "bco_pair(logp_w, logp_l, ref_w, ref_l, *, beta=0.1, delta=0.0)",
    # The mean of the six u is ½/6 = 1/12.
    *(
        Case(
            given,
            [softplus(delta - beta * w) + softplus(beta * r - delta) for w, r in zip(U_W, U_L)],
            lambda v, beta=beta, delta=delta: {
                "logp_w": beta * (sig(beta * (v.logp_w - v.ref_w) - delta) - 1),
                "logp_l": beta * sig(beta * (v.logp_l - v.ref_l) - delta),
            },
        )
        for given, beta, delta in (
            ({}, 0.1, 0.0),
            ({"beta": 1.0}, 1.0, 0.0),
            ({"delta": 0.3}, 0.1, 0.3),
            ({"delta": None}, 0.1, 0.1 / 12),
        )
    ),
    reward=0.1 * 2.0,
    step_zero=2 * LOG2,
)
promise(
    "sppo(logp_w, logp_l, ref_w, ref_l, *, beta=1e-3)",
    # 1/(2β) = 5: (2−5)² + (−2+5)², (−3−5)² + (1+5)², (0.5−5)² + (2+5)²
    Case(
        {"beta": 0.1},
        [18.0, 100.0, 69.25],
        lambda v: {"logp_w": 2 * (v.logp_w - v.ref_w - 5), "logp_l": 2 * (v.logp_l - v.ref_l + 5)},
    ),
    reward=1e-3 * 2.0,
    step_zero=5e5,
)
promise(
    "sppo_soft(logp_w, logp_l, ref_w, ref_l, margin, *, beta=1e-3, eta=1.0)",
    # η = log 3, β = 0.1: P = 9/10, √3/(1 + √3), 1/4, so t = 4, 1.34, −2.5
    Case(
        {"beta": 0.1, "eta": math.log(3)},
        [(w - t) ** 2 + (r + t) ** 2 for w, r, t in zip(U_W, U_L, (4.0, 10 * 3**0.5 / (1 + 3**0.5) - 5, -2.5))],
        lambda v: {
            "logp_w": 2 * (v.logp_w - v.ref_w - tensor([4.0, 10 * 3**0.5 / (1 + 3**0.5) - 5, -2.5], dtype=F64)),
            "logp_l": 2 * (v.logp_l - v.ref_l + tensor([4.0, 10 * 3**0.5 / (1 + 3**0.5) - 5, -2.5], dtype=F64)),
        },
    ),
    reward=1e-3 * 2.0,
    step_zero=2 * (1000 * (sigmoid(2.0) - 0.5)) ** 2,
)
promise(
    "apo_zero(logp_w, logp_l, ref_w, ref_l, *, beta=0.1)",
    Case(
        {},
        [1 - sigmoid(0.1 * w) + sigmoid(0.1 * r) for w, r in zip(U_W, U_L)],
        lambda v: {
            "logp_w": -0.1 * sig(0.1 * (v.logp_w - v.ref_w)) * (1 - sig(0.1 * (v.logp_w - v.ref_w))),
            "logp_l": 0.1 * sig(0.1 * (v.logp_l - v.ref_l)) * (1 - sig(0.1 * (v.logp_l - v.ref_l))),
        },
    ),
    reward=0.1 * 2.0,
    step_zero=1.0,
)
promise(
    "apo_down(logp_w, logp_l, ref_w, ref_l, *, beta=0.1)",
    Case(
        {},
        [sigmoid(0.1 * w) + 1 - sigmoid(0.1 * (w - r)) for w, r in zip(U_W, U_L)],
        lambda v: {
            "logp_w": 0.1 * sig(0.1 * (v.logp_w - v.ref_w)) * (1 - sig(0.1 * (v.logp_w - v.ref_w)))
            - 0.1 * sig(0.1 * gap(v)) * (1 - sig(0.1 * gap(v))),
            "logp_l": 0.1 * sig(0.1 * gap(v)) * (1 - sig(0.1 * gap(v))),
        },
    ),
    reward=0.1 * 2.0,
    step_zero=1.0,
)
promise(
    "discopop(logp_w, logp_l, ref_w, ref_l, *, beta=0.05, tau=0.05)",
    # h = 0.05Δ = 0.2, −0.2, −0.075 and h/τ = 4, −4, −1.5
    Case(
        {},
        [(1 - sigmoid(m)) * softplus(-h) + sigmoid(m) * math.exp(-h) for h, m in ((0.2, 4), (-0.2, -4), (-0.075, -1.5))],
        lambda v: discopop_slope(v, 0.05, 0.05),
    ),
    Case(
        {"beta": 1.0, "tau": 2.0},
        [(1 - sigmoid(h / 2)) * softplus(-h) + sigmoid(h / 2) * math.exp(-h) for h in DELTA],
        lambda v: discopop_slope(v, 1.0, 2.0),
    ),
    reward=0.05 * 2.0,
    step_zero=(LOG2 + 1) / 2,
)
promise(
    "f_dpo(logp_w, logp_l, ref_w, ref_l, *, beta=0.1, divergence='reverse_kl', coef=0.5)",
    Case({}, bt([0.4, -0.4, -0.15]), lambda v: pair(0.1 * gap(v), 0.1, 0.1)),
    Case(
        {"divergence": "forward_kl"},
        bt([0.1 * (math.exp(-r) - math.exp(-w)) for w, r in zip(U_W, U_L)]),
        lambda v: f_slope(v, lambda u: -torch.exp(-u), lambda u: torch.exp(-u)),
    ),
    Case(
        {"divergence": "js"},
        bt([0.1 * (softplus(-r) - softplus(-w)) for w, r in zip(U_W, U_L)]),
        lambda v: f_slope(v, lambda u: torch.log(sig(u)), lambda u: 1 - sig(u)),
    ),
    # c = ½: g = −2e^{−u/2}
    Case(
        {"divergence": "alpha"},
        bt([0.2 * (math.exp(-r / 2) - math.exp(-w / 2)) for w, r in zip(U_W, U_L)]),
        lambda v: f_slope(v, lambda u: -2 * torch.exp(-u / 2), lambda u: torch.exp(-u / 2)),
    ),
    # c = 2: g = e^u
    Case(
        {"divergence": "alpha", "coef": 2.0},
        bt([0.1 * (math.exp(w) - math.exp(r)) for w, r in zip(U_W, U_L)]),
        lambda v: f_slope(v, torch.exp, torch.exp),
    ),
    reward=0.1 * 2.0,
    step_zero=LOG2,
)
promise(
    "tdpo1(logp_w, logp_l, ref_w, ref_l, kl_w, kl_l, *, beta=0.1)",
    # Δ − (D_l − D_w) = 3, −3, −2
    Case(
        {},
        bt([0.3, -0.3, -0.2]),
        lambda v: (
            pair(0.1 * (gap(v) - v.kl_l + v.kl_w), 0.1, 0.1)
            | {
                "kl_l": 0.1 * sig(-0.1 * (gap(v) - v.kl_l + v.kl_w)),
                "kl_w": -0.1 * sig(-0.1 * (gap(v) - v.kl_l + v.kl_w)),
            }
        ),
    ),
    reward=0.1 * 2.0,
    step_zero=LOG2,
)
promise(
    "tdpo2(logp_w, logp_l, ref_w, ref_l, kl_w, kl_l, *, beta=0.1, alpha=0.5)",
    # Δ − ½(D_l − D_w) = 3.5, −3.5, −1.75
    Case(
        {},
        bt([0.35, -0.35, -0.175]),
        lambda v: (
            pair(0.1 * (gap(v) - 0.5 * (v.kl_l - v.kl_w)), 0.1, 0.1)
            | {"kl_l": 0.05 * sig(-0.1 * (gap(v) - 0.5 * (v.kl_l - v.kl_w)))}
        ),
    ),
    reward=0.1 * 2.0,
    step_zero=LOG2,
)
promise(
    "beta_dpo(logp_w, logp_l, ref_w, ref_l, *, beta=0.1, a=0.6, keep=0.8, mean=None, std=None, generator=None)",
    # All rows drawn: their mean is m, so β_b = β
    Case({"keep": 1.0}, bt([0.4, -0.4, -0.15]), lambda v: pair(0.1 * gap(v), 0.1, 0.1)),
    # mean Δ = −0.5, m = 0.5: β_b = 0.1(1 − 0.6) = 0.04
    Case(
        {"keep": 1.0, "mean": 0.5, "std": 2.0},
        bt([0.16, -0.16, -0.06]),
        lambda v: pair(0.04 * gap(v), 0.04, 0.04),
    ),
    # m = 5: 1 − 0.6 · 5.5 < 0, so β_b stops at 0.001
    Case(
        {"keep": 1.0, "mean": 5.0},
        bt([0.004, -0.004, -0.0015]),
        lambda v: pair(0.001 * gap(v), 0.001, 0.001),
    ),
    reward=0.1 * 2.0,
    step_zero=LOG2,
    certain={"keep": 1.0},
)
promise(
    "aot(logp_w, logp_l, ref_w, ref_l, *, beta=0.01, label_smoothing=0.0)",
    # δ = 12 − 10, −22 + 18, 1 − 8
    Case(
        {"beta": 0.1},
        bt([0.2, -0.4, -0.7]),
        lambda v: pair(tensor([0.2, -0.4, -0.7], dtype=F64), 0.1, 0.1),
        CROSSED,
    ),
    Case(
        {"beta": 0.1, "label_smoothing": 0.2},
        [0.8 * softplus(-h) + 0.2 * softplus(h) for h in (0.2, -0.4, -0.7)],
        lambda v: pair(tensor([0.2, -0.4, -0.7], dtype=F64), 0.1, 0.1, eps=0.2),
        CROSSED,
    ),
    reward=0.01 * 2.0,
    step_zero=LOG2,
)
promise(
    "aot_unpaired(logp_w, logp_l, ref_w, ref_l, *, beta=0.01, label_smoothing=0.0)",
    # u_w = 2, −3, 0.5 meets u_l = −2, 1, 2 by rank: (2, 2), (−3, −2), (0.5, 1); so s_l of pairs 1, 2, 3 is matched with
    # s_w of pairs 2, 3, 1
    Case(
        {"beta": 0.1},
        bt([0.0, -0.1, -0.05]),
        lambda v: {
            "logp_w": -0.1 * tensor([sigmoid(0), sigmoid(0.1), sigmoid(0.05)], dtype=F64),
            "logp_l": 0.1 * tensor([sigmoid(0.1), sigmoid(0.05), sigmoid(0)], dtype=F64),
        },
    ),
    reward=0.01 * 2.0,
    step_zero=LOG2,
)
promise(
    "cpo(logp_w, logp_l, len_w, *, beta=0.1, lam=1.0)",
    # s_w − s_l = 12, −22, 1
    Case(
        {},
        [softplus(-1.2) + 1.2, softplus(2.2) + 1.5, softplus(-0.1) + 1.8],
        lambda v: {
            "logp_w": -0.1 * sig(-0.1 * (v.logp_w - v.logp_l)) - 1 / v.len_w,
            "logp_l": 0.1 * sig(-0.1 * (v.logp_w - v.logp_l)),
        },
    ),
    reward=0.1 * -6.0,
)
promise(
    "slic(logp_w, logp_l, *, delta=1.0, lam=0.1)",
    # δ − (s_w − s_l) = −10, 24, 1, plus 0.1 · 12, 30, 9
    Case(
        {"delta": 2.0},
        [1.2, 27.0, 1.9],
        lambda v: {"logp_w": tensor([-0.1, -1.1, -1.1]), "logp_l": tensor([0.0, 1.0, 1.0])},
    ),
    reward=-6.0,
)
promise(
    "rrhf(logp_w, logp_l, len_w, len_l, *, lam=1.0)",
    # −d = −0.8, 0.5, −0.7, plus 12, 30, 9
    Case(
        {},
        [12.0, 30.5, 9.0],
        lambda v: {"logp_w": tensor([-1.0, -1.05, -1.0]), "logp_l": tensor([0.0, 0.125, 0.0])},
    ),
    reward=-1.5,
)
promise(
    "orpo(logp_w, logp_l, len_w, len_l, *, lam=0.1)",
    Case(
        {},
        [
            -w + 0.1 * softplus(math.log(math.exp(r) / (1 - math.exp(r))) - math.log(math.exp(w) / (1 - math.exp(w))))
            for w, r in zip(A_W, A_L)
        ],
        lambda v: orpo_slope(v, 0.1),
    ),
    reward=-1.5,
)
promise(
    "simpo(logp_w, logp_l, len_w, len_l, *, beta=2.0, gamma=1.0, label_smoothing=0.0, average=True)",
    Case({}, SIMPO, lambda v: per_token(averages(v, 2.0) - 1.0, v, 2.0)),
    Case(
        {"label_smoothing": 0.1},
        [0.9 * softplus(-h) + 0.1 * softplus(h) for h in (0.6, -2.0, 0.4)],
        lambda v: pair(averages(v, 2.0) - 1.0, 2 / v.len_w, 2 / v.len_l, eps=0.1),
    ),
    # 0.1 · (12, −22, 1) − 1
    Case(
        {"average": False, "beta": 0.1},
        bt([0.2, -3.2, -0.9]),
        lambda v: pair(0.1 * (v.logp_w - v.logp_l) - 1, 0.1, 0.1),
    ),
    reward=2.0 * -1.5,
)
promise(
    "repo(logp_w, logp_l, len_w, len_l, *, gamma=0.5)",
    # γ − d, pairs 1 and 3 rest
    Case({}, [0.0, 1.0, 0.0], lambda v: {"logp_w": tensor([0, -0.05, 0]), "logp_l": tensor([0, 0.125, 0])}),
    Case({"gamma": 1.0}, [0.2, 1.5, 0.3], lambda v: {"logp_w": -1 / v.len_w, "logp_l": 1 / v.len_l}),
    reward=-1.5,
)
promise(
    "simper(logp_w, logp_l, len_w, len_l)",
    Case(
        {},
        [math.exp(r) - math.exp(w) for w, r in zip(A_W, A_L)],
        lambda v: {
            "logp_w": -torch.exp(v.logp_w / v.len_w) / v.len_w,
            "logp_l": torch.exp(v.logp_l / v.len_l) / v.len_l,
        },
    ),
    reward=math.exp(-1.5),
)
promise(
    "alphapo(logp_w, logp_l, len_w, len_l, *, beta=2.5, gamma=0.25, alpha=0.25)",
    # r = 10(1 − e^{−a/4}), so r_w − r_l = 10(e^{−a_l/4} − e^{−a_w/4})
    Case(
        {},
        bt([10 * (math.exp(-r / 4) - math.exp(-w / 4)) - 0.25 for w, r in zip(A_W, A_L)]),
        lambda v: alphapo_slope(v, 2.5, 0.25, 0.25),
    ),
    Case(
        {"alpha": -1.0},
        bt([2.5 * (math.exp(w) - math.exp(r)) - 0.25 for w, r in zip(A_W, A_L)]),
        lambda v: alphapo_slope(v, 2.5, 0.25, -1.0),
    ),
    reward=10 * (1 - math.exp(0.375)),
)
promise(
    "alpha_dpo(logp_w, logp_l, ref_w, ref_l, len_w, len_l, *, "
    "beta=10.0, gamma=4.0, alpha=0.5, margin='ratio', normalize=True, stop_gradient=True, average=True, mean=None, std=None)",
    # α-DPO and each line of the paper's Table 2
    Case({}, bt(alpha_h(z_scores(RATIO))), lambda v: alpha_slope(v, scores(average_gap(v)))),
    Case({"alpha": 0.0}, bt([4.0, -9.0, 3.0]), lambda v: alpha_slope(v, 0, alpha=0)),
    Case(
        {"gamma": 0.0},
        bt(alpha_h(z_scores(RATIO), gamma=0)),
        lambda v: alpha_slope(v, scores(average_gap(v)), gamma=0),
    ),
    Case({"normalize": False}, bt(alpha_h(RATIO)), lambda v: alpha_slope(v, 10 * average_gap(v))),
    Case(
        {"stop_gradient": False},
        bt(alpha_h(z_scores(RATIO))),
        lambda v: alpha_slope(v, scores(average_gap(v)), factor=1 - 0.5 / spread(10 * average_gap(v))),
    ),
    Case(
        {"stop_gradient": False, "normalize": False},
        bt(alpha_h(RATIO)),
        lambda v: alpha_slope(v, 10 * average_gap(v), factor=0.5),
    ),
    Case(
        {"margin": "policy"},
        bt(alpha_h(z_scores(POLICY_M))),
        lambda v: alpha_slope(v, scores(averages(v, 1.0))),
    ),
    Case(
        {"margin": "policy", "stop_gradient": False},
        bt(alpha_h(z_scores(POLICY_M))),
        lambda v: alpha_slope(v, scores(averages(v, 1.0)), factor=1 - 0.5 / spread(averages(v, 10.0))),
    ),
    Case(
        {"margin": "reference"},
        bt(alpha_h(z_scores(REFERENCE_M))),
        lambda v: alpha_slope(v, scores(v.ref_w / v.len_w - v.ref_l / v.len_l)),
    ),
    Case(
        {"margin": "inverse_reference"},
        bt(alpha_h([-x for x in z_scores(REFERENCE_M)])),
        lambda v: alpha_slope(v, -scores(v.ref_w / v.len_w - v.ref_l / v.len_l)),
    ),
    # Eq. 12 as it is printed: M = 10Δ beside u = 10d
    Case({"margin": "sums"}, bt(alpha_h(z_scores(DELTA))), lambda v: alpha_slope(v, scores(gap(v)))),
    # Sums everywhere, β = 0.1: u = 1.2, −2.2, 0.1 and M = 0.1Δ
    Case(
        {"average": False, "beta": 0.1, "gamma": 1.0},
        bt([u - 1 - 0.5 * m for u, m in zip((1.2, -2.2, 0.1), z_scores(DELTA))]),
        lambda v: pair(0.1 * (v.logp_w - v.logp_l) - 1 - 0.5 * scores(gap(v)), 0.1, 0.1),
    ),
    # M = 10Δ̃ with μ = 1, σ = 2 from outside
    Case(
        {"mean": 1.0, "std": 2.0},
        bt(alpha_h([(m - 1) / 2 for m in RATIO])),
        lambda v: alpha_slope(v, (10 * average_gap(v) - 1) / 2),
    ),
    reward=10.0 * -1.5,
    step_zero=softplus(-6),
)
promise(
    "alpha_dpo_kl(logp_w, logp_l, len_w, len_l, kl_w, kl_l, *, beta=10.0, gamma=4.0, alpha=0.5, mean=None, std=None)",
    Case({}, bt(alpha_h(z_scores(KL_M))), lambda v: alpha_slope(v, scores(v.kl_l - v.kl_w))),
    Case(
        {"mean": tensor(0.0), "std": tensor(10.0)},
        bt(alpha_h([1.0, -1.0, 0.5])),
        lambda v: alpha_slope(v, v.kl_l - v.kl_w),
    ),
    reward=10.0 * -1.5,
    step_zero=softplus(-6),
)
promise(
    "online_simpo(logp_w, logp_l, ref_w, ref_l, old_w, old_l, len_w, len_l, *, "
    "beta=2.0, gamma=1.0, corrected=True, clip=5.0, self_normalize=False)",
    # s_old − s̄ = 1, −1, 0.25 chosen and −1, 0.5, 1 rejected
    Case(
        {},
        [math.exp(w) * x for w, x in zip((2, -1.5, -0.75), SIMPO)],
        lambda v: weighted_simpo([2, -1.5, -0.75], v),
    ),
    Case(
        {"corrected": False},
        [math.exp(w) * x for w, x in zip((0, -0.5, 1.25), SIMPO)],
        lambda v: weighted_simpo([0, -0.5, 1.25], v),
    ),
    Case(
        {"clip": 1.0},
        [math.exp(w) * x for w, x in zip((1, -1, -0.75), SIMPO)],
        lambda v: weighted_simpo([1, -1, -0.75], v),
    ),
    Case(
        {"self_normalize": True},
        [3 * math.exp(w) / (math.exp(2) + math.exp(-1.5) + math.exp(-0.75)) * x for w, x in zip((2, -1.5, -0.75), SIMPO)],
        lambda v: {
            k: 3 * g / (math.exp(2) + math.exp(-1.5) + math.exp(-0.75)) for k, g in weighted_simpo([2, -1.5, -0.75], v).items()
        },
    ),
    reward=2.0 * -1.5,
    step_zero=softplus(-1),
)
promise(
    "gamma_dpo(logp_w, logp_l, ref_w, ref_l, *, beta=0.1, gamma=1.0, tau=10.0)",
    # r = βΔ = 0.4, −0.4, −0.15 and γ₀ = 1
    Case(
        {},
        bt([r - g + 1 for r, g in zip((0.4, -0.4, -0.15), gamma_by_bisection((0.4, -0.4, -0.15), 1.0, 10.0))]),
        lambda v: pair(0.1 * gap(v) + 1 - tensor(gamma_by_bisection((0.4, -0.4, -0.15), 1.0, 10.0), dtype=F64), 0.1, 0.1),
    ),
    reward=0.1 * 2.0,
    step_zero=LOG2,
)
promise(
    "gamma_simpo(logp_w, logp_l, len_w, len_l, *, beta=10.0, gamma=4.0, tau=10.0)",
    # r = βd = 8, −5, 7 and γ₀ = 4
    Case(
        {},
        bt([r - g for r, g in zip(POLICY_M, gamma_by_bisection(POLICY_M, 4.0, 10.0))]),
        lambda v: per_token(averages(v, 10.0) - tensor(gamma_by_bisection(POLICY_M, 4.0, 10.0), dtype=F64), v, 10.0),
    ),
    reward=10.0 * -1.5,
)
promise(
    "amapo(logp_w, logp_l, len_w, len_l, *, beta=2.5, paper=False)",
    # code: margin 2.5 exp(((μ + 0.5)/s)μ) on pair 2; βd = 2, −1.25, 1.75
    Case(
        {},
        bt([2.0, -1.25 - 2.5 * math.exp((MU + 0.5) / S * MU), 1.75]),
        lambda v: amapo_slope(v, 2.5, [0, 2.5 * math.exp((MU + 0.5) / S * MU), 0]),
    ),
    # text: β inside the exponent
    Case(
        {"paper": True},
        bt([2.0, -1.25 - math.exp(2.5 * (MU + 0.5) / S * MU), 1.75]),
        lambda v: amapo_slope(v, 2.5, [0, math.exp(2.5 * (MU + 0.5) / S * MU), 0]),
    ),
    # Chosen and rejected exchanged: d = −0.8, 0.5, −0.7, μ = −1/3. Code: pairs 1 and 3; text: pair 2.
    Case(
        {},
        bt([-2 - 2.5 * math.exp((-MU + 0.8) / S * -MU), 1.25, -1.75 - 2.5 * math.exp((-MU + 0.7) / S * -MU)]),
        lambda v: amapo_slope(v, 2.5, [2.5 * math.exp((-MU + 0.8) / S * -MU), 0, 2.5 * math.exp((-MU + 0.7) / S * -MU)]),
        SWAPPED,
    ),
    Case(
        {"paper": True},
        bt([-2.0, 1.25 - math.exp(2.5 * (-MU - 0.5) / S * -MU), -1.75]),
        lambda v: amapo_slope(v, 2.5, [0, math.exp(2.5 * (-MU - 0.5) / S * -MU), 0]),
        SWAPPED,
    ),
    reward=2.5 * -1.5,
)
promise(
    "kto(logp, ref, desirable, logp_kl, ref_kl, *, beta=0.1, lambda_d=1.0, lambda_u=1.0)",
    # z = 1: v = 0.1(u − 1) = 0.1, −0.3, −0.4, −0.05
    Case(
        {"lambda_d": 1.5, "lambda_u": 0.5},
        [1.5 * (1 - sigmoid(0.1)), 0.5 * (1 - sigmoid(0.3)), 1.5 * (1 - sigmoid(-0.4)), 0.5 * (1 - sigmoid(0.05))],
        lambda v: labelled(
            v,
            0.15 * sig(0.1 * (v.logp - v.ref - 1)) * sig(-0.1 * (v.logp - v.ref - 1)),
            0.05 * sig(0.1 * (v.logp - v.ref - 1)) * sig(-0.1 * (v.logp - v.ref - 1)),
        ),
    ),
    # Mean log-ratio of the KL completions −1: z = 0
    Case(
        {},
        [1 - sigmoid(0.2), 1 - sigmoid(0.2), 1 - sigmoid(-0.3), 1 - sigmoid(-0.05)],
        lambda v: labelled(v, *2 * [0.1 * sig(0.1 * (v.logp - v.ref)) * sig(-0.1 * (v.logp - v.ref))]),
        {"ref_kl": [-19.0, -20.0, -21.0, -22.0]},
    ),
    reward=0.1 * 2.0,
    step_zero=0.5,
)
promise(
    "bco(logp, ref, desirable, *, beta=0.1, delta=None)",
    # r = 0.2, −0.2, −0.3, 0.05, mean −0.0625
    Case(
        {},
        [softplus(-0.2625), softplus(-0.1375), softplus(0.2375), softplus(0.1125)],
        lambda v: labelled(v, 0.1 * sig(-0.1 * (v.logp - v.ref) - 0.0625), 0.1 * sig(0.1 * (v.logp - v.ref) + 0.0625)),
    ),
    Case(
        {"delta": 0.1},
        [softplus(-0.1), softplus(-0.3), softplus(0.4), softplus(-0.05)],
        lambda v: labelled(v, 0.1 * sig(0.1 - 0.1 * (v.logp - v.ref)), 0.1 * sig(0.1 * (v.logp - v.ref) - 0.1)),
    ),
    reward=0.1 * 2.0,
    step_zero=LOG2,
)
promise(
    "apo_zero_unpaired(logp, ref, desirable, *, beta=0.1)",
    # βu = 0.2, −0.2, −0.3, 0.05; desirable, not, desirable, not
    Case(
        {},
        [1 - sigmoid(0.2), sigmoid(-0.2), 1 - sigmoid(-0.3), sigmoid(0.05)],
        lambda v: labelled(v, *2 * [0.1 * sig(0.1 * (v.logp - v.ref)) * (1 - sig(0.1 * (v.logp - v.ref)))]),
    ),
    reward=0.1 * 2.0,
    step_zero=0.5,
)
promise(
    "uapo(logp, ref, desirable, *, beta=0.1, anchor=None, temperature=1.0)",
    # T = 2: r = 0.1, −0.1, −0.15, 0.025, mean −0.03125
    Case(
        {"temperature": 2.0},
        [softplus(-0.13125), softplus(-0.06875), softplus(0.11875), softplus(0.05625)],
        lambda v: labelled(v, 0.05 * sig(-0.05 * (v.logp - v.ref) - 0.03125), 0.05 * sig(0.05 * (v.logp - v.ref) + 0.03125)),
    ),
    Case(
        {"anchor": 0.1},
        [softplus(-0.1), softplus(-0.3), softplus(0.4), softplus(-0.05)],
        lambda v: labelled(v, 0.1 * sig(0.1 - 0.1 * (v.logp - v.ref)), 0.1 * sig(0.1 * (v.logp - v.ref) - 0.1)),
    ),
    reward=0.1 * 2.0,
    step_zero=LOG2,
)

every_case = pytest.mark.parametrize(
    "case",
    [case for promised in PROMISES.values() for case in promised.cases],
    ids=lambda c: "-".join([c.objective, *(f"{k}={v}" for k, v in c.settings.items()), *c.inputs]),
)
every_objective = pytest.mark.parametrize("name", [name for name in OBJECTIVES if name in PROMISES])


# --- helpers ---------------------------------------------------------------------------------------------------------


def tensors(name, inputs=None, dtype=F64, device="cpu"):
    """The inputs an objective asks for, as leaves; the policy's require gradients."""
    given = PAIRS | ROWS | (inputs or {})
    made = {}
    for k in OBJECTIVES[name].tensors:
        kind = torch.bool if k == "desirable" else torch.int64 if k.startswith("len_") else dtype
        made[k] = tensor(given[k], dtype=kind, device=device).requires_grad_(k in POLICY)
    return made


def run(case, dtype=F64):
    return at(case.objective, case.inputs, dtype, **case.settings)


def at(name, inputs=None, dtype=F64, **settings):
    """The inputs of an objective, the common ones but for those given, and its loss."""
    inputs = tensors(name, inputs, dtype)
    return inputs, OBJECTIVES[name](**inputs, **settings)


def gradients(inputs, loss):
    """∂(Σ loss)/∂input for every policy input; 0 where the loss does not reach it."""
    leaves = {k: x for k, x in inputs.items() if x.requires_grad}
    slopes = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
    return {k: torch.zeros_like(x) if g is None else g for (k, x), g in zip(leaves.items(), slopes)}


@contextmanager
def held(recorded, monkeypatch):
    """Everything detached inside keeps the value it had the first time: sg[·] as finite differences must see it."""
    first, calls, detach = not recorded, iter(list(recorded)), torch.Tensor.detach

    def stand_in(x):
        if first:
            recorded.append(detach(x).clone())
            return recorded[-1]
        return next(calls)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "detach", stand_in)
        yield


def value(name, *args, **settings):
    """An objective of plain numbers, in float64; lists become rows."""
    made = [
        tensor(a) if isinstance(a[0], bool) else tensor(a, dtype=F64) for a in (a if isinstance(a, list) else [a] for a in args)
    ]
    return OBJECTIVES[name](*made, **settings)


def random_pairs(name, rows=16, seed=0):
    """Plausible random inputs for a paired objective, in float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(mean, std):
        return mean + std * torch.randn(rows, generator=g, dtype=F64)

    lengths = {k: torch.randint(5, 60, (rows,), generator=g) for k in ("len_w", "len_l")}
    sums = {f"logp_{x}": -lengths[f"len_{x}"] * normal(1.0, 0.2).abs() for x in "wl"}
    refs = {f"ref_{x}": sums[f"logp_{x}"] + normal(0, 3) for x in "wl"}
    olds = {f"old_{x}": sums[f"logp_{x}"] + normal(0, 1) for x in "wl"}
    kls = {f"kl_{x}": normal(2, 1).abs() for x in "wl"}
    prefixes = {f"prefix_logp_{x}": sums[f"logp_{x}"] * 0.7 for x in "wl"}
    prefixes |= {f"ref_prefix_logp_{x}": refs[f"ref_{x}"] * 0.6 for x in "wl"}
    pool = lengths | sums | refs | olds | kls | prefixes | {"margin": normal(1, 1)}
    return {k: pool[k] for k in OBJECTIVES[name].tensors}


def call(name, inputs, **settings):
    """The objective on those of the inputs that it asks for."""
    return OBJECTIVES[name](**{k: inputs[k] for k in OBJECTIVES[name].tensors}, **settings)


# --- the registry ----------------------------------------------------------------------------------------------------


def what_to_promise(name):
    """Why an objective without a promise fails, and what its own would look like."""
    signature = inspect.signature(OBJECTIVES[name])
    bare = inspect.Signature([p.replace(annotation=p.empty) for p in signature.parameters.values()])
    policy = [k for k in OBJECTIVES[name].tensors if k in POLICY]
    rows = ROWS["logp"] if "logp" in OBJECTIVES[name].tensors else PAIRS["logp_w"]
    return f"""{name} has no case in tests/test_losses.py, so nothing of it is tested. Put one where it stands in losses.py:

promise(
    "{name}{bare}",
    # settings, the loss of each of the {len(rows)} rows above by hand, and ∂(Σ L)/∂(input) as formulas of the inputs v
    Case({{}}, [{", ".join("0.0" for _ in rows)}], lambda v: {{{", ".join(f'"{k}": 0 * v.{k}' for k in policy)}}}),
    reward=0.0,  # for s = −6, s̄ = −8, n = 4 at the defaults
    step_zero=None,  # or the loss where policy = reference, if it reads one
)
"""


def test_every_objective_has_its_promise_and_keeps_its_name():
    for name in OBJECTIVES:
        if name not in PROMISES:
            pytest.fail(what_to_promise(name), pytrace=False)
    assert list(PROMISES) == list(OBJECTIVES)
    assert all(f.__name__ == name and getattr(losses, name) is f for name, f in OBJECTIVES.items())


def test_an_objective_without_a_promise_is_told_one(monkeypatch):
    """One message, whose example is complete: once its numbers are filled in, it is a promise and the registry is whole."""
    monkeypatch.setattr(sys.modules[__name__], "OBJECTIVES", dict(OBJECTIVES))
    monkeypatch.setattr(losses, "OBJECTIVES", OBJECTIVES)

    @losses.objective(reward=losses.sum_logp)
    def mine(logp_w: torch.Tensor, logp_l: torch.Tensor, *, beta: float = 2.0) -> torch.Tensor:
        return beta * (logp_l - logp_w)

    monkeypatch.setattr(losses, "mine", mine, raising=False)
    with pytest.raises(pytest.fail.Exception) as failed:
        test_every_objective_has_its_promise_and_keeps_its_name()
    said = str(failed.value)
    assert "mine has no case in tests/test_losses.py" in said
    example = said[said.index("promise(") :].replace("[0.0, 0.0, 0.0]", "[-24.0, 44.0, -2.0]")
    example = example.replace("0 * v.logp_w", "-2.0").replace("0 * v.logp_l", "2.0").replace("reward=0.0", "reward=-12.0")
    monkeypatch.setattr(sys.modules[__name__], "PROMISES", dict(PROMISES))
    exec(example, globals())
    test_every_objective_has_its_promise_and_keeps_its_name()
    test_signature_is_the_promised_one("mine")
    test_value_by_hand(PROMISES["mine"].cases[0])
    test_gradient_in_closed_form(PROMISES["mine"].cases[0])
    test_reward_is_the_promised_one("mine")


@every_objective
def test_signature_is_the_promised_one(name):
    """Names, order and defaults are what callers rely on; the types stand in losses.py only, but for every argument."""

    def parsed(signature):
        return ast.dump(ast.parse(f"def {signature}: ...").body[0].args)

    signature = inspect.signature(OBJECTIVES[name])
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert parsed(f"{name}{inspect.Signature(bare)}") == parsed(PROMISES[name].signature)
    assert all(p.annotation is torch.Tensor for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY)
    assert signature.return_annotation is torch.Tensor


def test_every_public_function_says_its_types():
    for function in vars(losses).values():
        if inspect.isfunction(function) and function.__module__ == "losses":
            signature = inspect.signature(function)
            assert signature.return_annotation is not signature.empty, function
            assert all(p.annotation is not p.empty for p in signature.parameters.values()), function


@every_objective
def test_attributes_say_what_the_signature_says(name):
    """Read off the promised signature by Python's parser: positional names, then keywords and their values."""
    loss, arguments = OBJECTIVES[name], ast.parse(f"def {PROMISES[name].signature}: ...").body[0].args
    settings = {a.arg: ast.literal_eval(v) for a, v in zip(arguments.kwonlyargs, arguments.kw_defaults)}
    assert loss.tensors == tuple(a.arg for a in arguments.args)
    assert loss.random == ("generator" in settings)
    assert loss.settings == {k: v for k, v in settings.items() if k != "generator"}


def test_registering_is_one_decorator(monkeypatch):
    """A loss made outside: in OBJECTIVES, checked, described, and itself again when unwrapped."""
    monkeypatch.setattr(losses, "OBJECTIVES", {})

    @losses.objective(reward=losses.average_logp, coupled="centred")
    def hinge(logp_w, len_w, *, beta=2.0, centred=False, generator=None):
        return torch.relu(1 - beta * logp_w / len_w)

    assert losses.OBJECTIVES == {"hinge": hinge}
    assert hinge.tensors == ("logp_w", "len_w") and hinge.settings == {"beta": 2.0, "centred": False}
    assert hinge.random and hinge.coupled == "centred"
    assert_close(hinge(tensor([-6.0]), tensor([4])), tensor([4.0]))
    assert_close(hinge.reward(tensor([-6.0]), None, tensor([4])), tensor([-3.0]))
    assert_close(hinge.reward(tensor([-6.0]), None, tensor([4]), beta=4.0), tensor([-6.0]))
    with pytest.raises(ValueError, match="hinge: `beta`"):
        hinge(tensor([-6.0]), tensor([4]), beta=0.0)


# --- 1. values -------------------------------------------------------------------------------------------------------


@every_case
def test_value_by_hand(case):
    _, loss = run(case)
    assert_close(loss, tensor(case.expected, dtype=F64), rtol=1e-11, atol=1e-13)


def test_docstring_examples():
    assert all(">>> " in f.__doc__ for f in OBJECTIVES.values())
    result = doctest.testmod(losses)
    assert result.attempted >= len(OBJECTIVES) and result.failed == 0


# --- 2. finite differences -------------------------------------------------------------------------------------------


@every_case
def test_gradient_is_the_finite_difference(case, monkeypatch):
    """Central differences in float64, with everything under sg[·] held at its value."""
    inputs, loss = run(case)
    leaves = {k: x for k, x in inputs.items() if x.requires_grad}
    recorded = []

    def frozen(*values):
        with held(recorded, monkeypatch):
            return OBJECTIVES[case.objective](**inputs | dict(zip(leaves, values)), **case.settings)

    first = frozen(*leaves.values())
    assert torch.equal(first, loss)
    assert torch.autograd.gradcheck(frozen, tuple(leaves.values()), atol=1e-7, rtol=1e-5)
    assert_close(gradients(inputs, first), gradients(inputs, loss))


# --- 3. closed forms -------------------------------------------------------------------------------------------------


@every_case
def test_gradient_in_closed_form(case):
    inputs, loss = run(case)
    plain = {k: x.detach() if k == "desirable" else x.detach().to(F64) for k, x in inputs.items()}
    expected = case.gradient(SimpleNamespace(**plain))
    for k, slope in gradients(inputs, loss).items():
        wanted = torch.as_tensor(expected.get(k, 0.0), dtype=F64).expand_as(slope)
        assert_close(slope, wanted, rtol=1e-6, atol=1e-10, msg=lambda m, k=k: f"∂L/∂{k}: {m}")


def test_conservative_dpo_turns_at_the_logit_of_its_confidence():
    """ε = 0.1: the minimum is at βΔ = log 9; the push changes sign there."""
    turn = math.log(9)
    inputs = {"logp_w": [turn - 0.1, turn, turn + 0.1], "logp_l": [0.0] * 3, "ref_w": [0.0] * 3, "ref_l": [0.0] * 3}
    push = gradients(*at("dpo", inputs, label_smoothing=0.1, beta=1.0))["logp_w"]
    assert push[0] < -1e-3 and abs(push[1]) < 1e-12 and push[2] > 1e-3


ALL_EQUAL = {k: [-5.0] for k in ("logp_w", "logp_l", "ref_w", "ref_l")}


def test_apo_down_starts_with_the_chosen_response_at_rest():
    push = gradients(*at("apo_down", ALL_EQUAL))
    assert push["logp_w"].item() == 0 and push["logp_l"].item() == pytest.approx(0.025)


def test_discopop_pushes_a_zero_margin_down():
    """∂L/∂h at 0 is ¼(1 − log 2)/τ − ¾ > 0."""
    push = gradients(*at("discopop", ALL_EQUAL))["logp_w"].item()
    assert push == pytest.approx(0.05 * (0.25 * (1 - LOG2) / 0.05 - 0.75)) and push > 0


# --- 4. identities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, settings",
    [
        ("robust_dpo", {"label_smoothing": 0.0}), ("f_dpo", {}), ("beta_dpo", {"a": 0.0, "keep": 1.0}),
        ("rdpo", {"alpha": 0.0}), ("tdpo2", {"alpha": 0.0}), ("dpop", {"lam": 0.0}), ("dpo_shift", {"lam": 1.0}),
        ("focal", {"gamma": 0.0}), ("odpo", {"alpha": 0.0}), ("ld_dpo", {"alpha": 1.0}),
    ],
)  # fmt: skip
def test_is_dpo(name, settings):
    inputs = random_pairs("dpo") | random_pairs(name)
    assert_close(call(name, inputs, beta=0.1, **settings), call("dpo", inputs, beta=0.1))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_optimal_transport_of_one_pair_is_dpo(name):
    for seed in range(5):
        inputs = random_pairs("dpo", rows=1, seed=seed)
        assert_close(call(name, inputs, beta=0.1), call("dpo", inputs, beta=0.1))


def test_optimal_transport_compares_sorted_values():
    """The multiset of losses is that of the two sorted lists, whatever the order of the rows."""
    x = random_pairs("dpo")
    policy, reference = x["logp_w"] - x["logp_l"], x["ref_w"] - x["ref_l"]
    plain = -torch.log(sig(0.1 * (policy.sort().values - reference.sort().values)))
    assert_close(call("aot", x, beta=0.1).sort().values, plain.sort().values)
    u_w, u_l = x["logp_w"] - x["ref_w"], x["logp_l"] - x["ref_l"]
    plain = -torch.log(sig(0.1 * (u_w.sort().values - u_l.sort().values)))
    assert_close(call("aot_unpaired", x, beta=0.1).sort().values, plain.sort().values)


@pytest.mark.parametrize(
    "name, settings, rtol",
    [
        ("alpha_dpo", {"alpha": 0.0}, 1e-12), ("gamma_simpo", {"tau": 1e9}, 1e-7), ("alphapo", {"alpha": 0.0}, 1e-12),
        ("alphapo", {"alpha": 1e-7}, 1e-5), ("alphapo", {"alpha": -1e-7}, 1e-5),
    ],
)  # fmt: skip
def test_is_simpo(name, settings, rtol):
    inputs = random_pairs("simpo") | random_pairs(name)
    expected = call("simpo", inputs, beta=3.0, gamma=0.7)
    assert_close(call(name, inputs, beta=3.0, gamma=0.7, **settings), expected, rtol=rtol, atol=1e-9)


def test_alphapo_keeps_its_digits_for_a_small_bend():
    """In fp32, e^{−αa}/α would lose them to the 1/α that cancels between chosen and rejected; expm1 has none."""
    a_w, a_l, one = tensor([-0.5]), tensor([-1.5]), tensor([1])
    expected = tensor([softplus(-(2.5 - 0.25))])
    assert_close(losses.alphapo(a_w, a_l, one, one, alpha=1e-5), expected, rtol=1e-4, atol=0)


def test_alpha_dpo_without_lengths_is_simpo_without_lengths():
    x = random_pairs("alpha_dpo")
    settings = {"beta": 0.2, "gamma": 0.7, "average": False}
    assert_close(call("alpha_dpo", x, alpha=0.0, **settings), call("simpo", x, **settings))


@pytest.mark.parametrize("settings", [{}, {"self_normalize": True}, {"corrected": False}, {"clip": 0.0}])
def test_online_simpo_of_the_sampling_policy_is_simpo(settings):
    x = random_pairs("online_simpo")
    if "clip" not in settings:  # no width for the weights: w = 1 whatever the earlier policy
        x |= {"old_w": x["ref_w"], "old_l": x["ref_l"]}
    assert_close(call("online_simpo", x, **settings), call("simpo", x))


def test_online_simpo_with_the_policy_as_its_own_past_gets_no_gradient_through_the_weight():
    x = tensors("online_simpo")
    x |= {"old_w": x["logp_w"], "old_l": x["logp_l"]}
    loss = call("online_simpo", x, clip=math.inf)
    log_w = [u - v for u, v in zip(U_W, U_L)]
    expected = weighted_simpo(log_w, SimpleNamespace(**{k: v.detach().to(F64) for k, v in x.items()}))
    assert_close(gradients({k: x[k] for k in ("logp_w", "logp_l")}, loss), expected)


def test_simpo_on_equal_lengths_is_dpo_without_reference():
    x = random_pairs("dpo") | {"len_w": torch.full((16,), 7), "len_l": torch.full((16,), 7)}
    x |= {"ref_w": torch.zeros(16, dtype=F64), "ref_l": torch.zeros(16, dtype=F64)}
    assert_close(call("simpo", x, beta=2.0, gamma=0.0), call("dpo", x, beta=2 / 7))


def test_cpo_without_likelihood_is_dpo_without_reference():
    x = random_pairs("cpo")
    zero = {"ref_w": torch.zeros(16, dtype=F64), "ref_l": torch.zeros(16, dtype=F64)}
    assert_close(call("cpo", x, lam=0.0), call("dpo", x | zero))
    assert_close(call("cpo", x, lam=1.0) - call("cpo", x, lam=0.0), call("sft", x))


def test_repo_is_the_hard_limit_of_simpo():
    x = random_pairs("simpo")
    assert_close(call("repo", x, gamma=0.3), call("simpo", x, beta=1e5, gamma=0.3e5) / 1e5, rtol=0, atol=1e-5)


def test_forward_kl_is_the_alpha_divergence_at_zero_and_reverse_kl_its_limit():
    x = random_pairs("f_dpo")
    forward = call("f_dpo", x, divergence="forward_kl")
    assert_close(call("f_dpo", x, divergence="alpha", coef=0.0), forward)
    near = call("f_dpo", x, divergence="alpha", coef=1 + 1e-7)
    assert_close(near, call("dpo", x), rtol=1e-4, atol=1e-6)


def test_robust_dpo_is_unbiased():
    """Flipping a label with probability ε, the expected robust loss is the clean loss."""
    x = random_pairs("dpo")
    flipped = {"logp_w": x["logp_l"], "logp_l": x["logp_w"], "ref_w": x["ref_l"], "ref_l": x["ref_w"]}
    mean = 0.8 * call("robust_dpo", x, label_smoothing=0.2) + 0.2 * call("robust_dpo", flipped, label_smoothing=0.2)
    assert_close(mean, call("dpo", x))


def test_exo_vanishes_at_its_target():
    assert abs(value("exo", math.log(9), 0.0, 0.0, 0.0, beta=1.0, label_smoothing=0.1).item()) < 1e-12


def test_reward_aware_losses_of_one_target_are_label_smoothing_and_exo():
    """All pairs with t = log((1 − ε)/ε): backward is conservative DPO less the label's entropy, forward is exo."""
    eps, entropy = 0.1, -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))
    x = random_pairs("rpo_bwd") | {"margin": torch.full((16,), math.log(9.0) / 3, dtype=F64)}
    assert_close(call("rpo_bwd", x, beta=0.3, eta=3.0) + entropy, call("dpo", x, beta=0.3, label_smoothing=eps))
    assert_close(call("rpo_fwd", x, beta=0.3, eta=3.0), call("exo", x, beta=0.3, label_smoothing=eps))


def test_squared_reward_distance_of_one_target_is_ipo_on_sums():
    """(βΔ − ηm)² = β²(Δ − 1/2τ)² where ηm = β/2τ."""
    x = random_pairs("rpo_sq") | {"margin": torch.full((16,), 0.3 / (2 * 0.2) / 3.0, dtype=F64)}
    lengths = {"len_w": torch.ones(16), "len_l": torch.ones(16)}
    assert_close(call("rpo_sq", x, beta=0.3, eta=3.0), 0.3**2 * call("ipo", x | lengths, tau=0.2, average=False))


def test_sppo_of_a_sure_win_is_sppo_and_of_an_even_chance_asks_for_nothing():
    x = random_pairs("sppo_soft")
    sure = x | {"margin": torch.ones(16, dtype=F64)}
    assert_close(call("sppo_soft", sure, beta=0.1, eta=100.0), call("sppo", x, beta=0.1))
    even = x | {"margin": torch.zeros(16, dtype=F64)}
    assert_close(call("sppo_soft", even), (x["logp_w"] - x["ref_w"]) ** 2 + (x["logp_l"] - x["ref_l"]) ** 2)


def test_ld_dpo_without_the_rest_is_dpo_of_the_first_tokens():
    """α = 0 scores both responses up to the same length: POET's cut, made in the loss."""
    x = random_pairs("ld_dpo")
    first = {f"logp_{side}": x[f"prefix_logp_{side}"] for side in "wl"}
    first |= {f"ref_{side}": x[f"ref_prefix_logp_{side}"] for side in "wl"}
    assert_close(call("ld_dpo", x, alpha=0.0), call("dpo", first))


def test_wpo_weight_by_hand():
    """Two tokens at probability ½ of (½, ½), where Σp² = ½: weight 1. One at ⅛ where Σp² = ½: ¼. Above 1 it is 1."""
    half, eighth = math.log(0.5), math.log(0.125)
    logp, power = tensor([[2 * half, eighth], [2 * half, half]]), tensor([[2 * half, half], [8 * half, half]])
    weight = losses.wpo_weight(logp.requires_grad_(), power, tensor([[2, 1]] * 2))
    assert not weight.requires_grad and weight.tolist() == pytest.approx([0.25, 1.0])


def test_bco_of_a_pair_and_nca():
    """bco at δ = 0 is −logσ(v_w) and −logσ(−v_l); nca halves it and adds half of −logσ(v_w) − logσ(−v_w)."""
    x = random_pairs("nca")
    yes, no = torch.ones(16, dtype=torch.bool), torch.zeros(16, dtype=torch.bool)
    chosen, rejected = (
        {"logp": x["logp_w"], "ref": x["ref_w"]},
        {"logp": x["logp_l"], "ref": x["ref_l"]},
    )
    b_w = call("bco", chosen | {"desirable": yes}, delta=0.0)
    b_l = call("bco", rejected | {"desirable": no}, delta=0.0)
    assert_close(b_w, -torch.log(sig(0.1 * (x["logp_w"] - x["ref_w"]))))
    assert_close(b_l, -torch.log(sig(-0.1 * (x["logp_l"] - x["ref_l"]))))
    turned = call("bco", chosen | {"desirable": no}, delta=0.0)
    assert_close(call("nca", x, beta=0.1), (b_w + b_l) / 2 + (b_w + turned) / 2)


@pytest.mark.parametrize("delta", [0.0, 0.3, None])
def test_bco_pair_is_bco_of_its_two_rows(delta):
    """Without a shift, with a given one, and with the mean reward of all of them."""
    x = random_pairs("bco_pair")
    label = torch.arange(32) < 16
    rows = {"logp": torch.cat([x["logp_w"], x["logp_l"]]), "ref": torch.cat([x["ref_w"], x["ref_l"]]), "desirable": label}
    of_rows = call("bco", rows, delta=delta)
    assert_close(call("bco_pair", x, delta=delta), of_rows[:16] + of_rows[16:])


def test_apo_zero_unpaired_is_half_a_pair_and_kto_without_its_kl_estimate():
    x, rows = random_pairs("apo_zero"), tensors("apo_zero_unpaired")
    yes, no = torch.ones(16, dtype=torch.bool), torch.zeros(16, dtype=torch.bool)
    both = call("apo_zero_unpaired", {"logp": x["logp_w"], "ref": x["ref_w"], "desirable": yes})
    both = both + call("apo_zero_unpaired", {"logp": x["logp_l"], "ref": x["ref_l"], "desirable": no})
    assert_close(both, call("apo_zero", x))
    still = {"logp_kl": torch.zeros(4, dtype=F64), "ref_kl": torch.zeros(4, dtype=F64)}
    assert_close(call("apo_zero_unpaired", rows), call("kto", rows | still))


def test_focal_turns_where_its_docstring_says():
    """γ = 1: the push changes sign at p = 1/e, βΔ = −log(e − 1) = −0.54."""
    turn = -math.log(math.e - 1)
    inputs = {"logp_w": [turn - 0.1, turn, turn + 0.1], **{k: [0.0] * 3 for k in ("logp_l", "ref_w", "ref_l")}}
    push = gradients(*at("focal", inputs, beta=1.0, gamma=1.0))["logp_w"]
    assert push[0] > 1e-3 and abs(push[1]) < 1e-12 and push[2] < -1e-3


def test_dpop_jumps_where_training_begins():
    """From just above the reference to just below it the push on the chosen response grows by the factor 1 + λ = 51."""
    push = gradients(*at("dpop", {"logp_w": [1e-9, 0.0, -1e-9], **{k: [0.0] * 3 for k in ("logp_l", "ref_w", "ref_l")}}))
    above, on, below = push["logp_w"].tolist()
    assert on == pytest.approx(above) and below / above == pytest.approx(51)


def test_scores_that_have_a_gradient_get_none_from_odpo():
    """Its offset is a constant; at a tie the slope of log m would be 0 · ∞."""
    inputs = tensors("odpo", {"margin": [2.0, 0.0, -1.0]})
    inputs["margin"].requires_grad_()
    assert gradients(inputs, OBJECTIVES["odpo"](**inputs))["margin"].tolist() == [0.0, 0.0, 0.0]


def test_uapo_is_bco_at_temperature_one():
    rows = tensors("uapo")
    assert_close(call("uapo", rows), call("bco", rows))
    assert_close(call("uapo", rows, beta=0.1, temperature=4.0), call("bco", rows, beta=0.025))


def test_kto_values_a_gain_like_the_opposite_loss():
    """Desirable at v is undesirable at −v; with z = 1 the mirror of u is 2 − u."""
    label = [True, True, False]
    x = value("kto", [3.0, -1.0, 2.5], [0.0] * 3, label, [1.0] * 3, [0.0] * 3)
    mirrored = value("kto", [-1.0, 3.0, -0.5], [0.0] * 3, [not y for y in label], [1.0] * 3, [0.0] * 3)
    assert_close(x, mirrored)


def test_kto_measures_from_the_kl_estimate_but_never_from_below_zero():
    args = [2.0, -1.0], [0.0, 0.0], [True, False]
    at = {z: value("kto", *args, [z + 1, z - 1], [0.0, 0.0]) for z in (-3.0, 0.0, 3.0)}
    assert_close(at[-3.0], at[0.0])
    assert_close(at[3.0], value("kto", [-1.0, -4.0], *args[1:], [0.0, 0.0], [0.0, 0.0]))


# With γ = 0 and the pair exchanged, h changes its sign, so the loss grows by h.
SWAPS = [
    ("dpo", {}), ("dpo_norm", {}), ("rdpo", {}), ("f_dpo", {}), ("f_dpo", {"divergence": "forward_kl"}),
    ("f_dpo", {"divergence": "js"}), ("f_dpo", {"divergence": "alpha"}), ("tdpo1", {}),
    ("aot", {}), ("aot_unpaired", {}), ("simpo", {"gamma": 0.0}),
    ("alphapo", {"gamma": 0.0}), ("alpha_dpo", {"gamma": 0.0, "beta": 1.0}),
    ("alpha_dpo", {"gamma": 0.0, "beta": 1.0, "margin": "reference"}), ("alpha_dpo_kl", {"gamma": 0.0, "beta": 1.0}),
    ("cpo", {"lam": 0.0}), ("online_simpo", {"gamma": 0.0, "clip": 0.0}), ("beta_dpo", {"a": 0.0, "keep": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize("name, settings", SWAPS)
def test_exchanging_chosen_and_rejected_turns_the_sign(name, settings):
    x = random_pairs(name, rows=8) | {"len_l": random_pairs("simpo", rows=8)["len_l"]}
    swapped = {k[:-1] + ("l" if k.endswith("w") else "w"): v for k, v in x.items()}
    loss, back = call(name, x, **settings), call(name, swapped, **settings)
    h = -torch.log(torch.expm1(loss))  # L = log(1 + e^{−h})
    # aot_unpaired gives the rows of the other list, so compare as a set there and row by row elsewhere
    order = torch.sort if name == "aot_unpaired" else lambda v: SimpleNamespace(values=v)
    assert_close(order(back).values, order(loss + h).values, rtol=1e-9, atol=1e-9)


@every_objective
def test_rows_follow_a_permutation_of_the_batch(name):
    """Shuffling the rows shuffles the losses: coupling runs through the batch's statistics, not through its order."""
    inputs = {k: x.detach() for k, x in tensors(name).items()}
    settings = PROMISES[name].certain
    order = torch.randperm(len(inputs[next(iter(inputs))]), generator=torch.Generator().manual_seed(1))
    shuffled = OBJECTIVES[name](**{k: x[order] for k, x in inputs.items()}, **settings)
    assert_close(shuffled, OBJECTIVES[name](**inputs, **settings)[order])


# --- the α-DPO paper's claims ----------------------------------------------------------------------------------------


def test_uniform_reference_is_what_theorem_3_1_says_and_no_more():
    """DPO against U(y) = V^{−n} is SimPO on sums with γ = −β(n_w − n_l) log V: a margin of its own for each pair.

    The theorem calls γ a constant. That holds where n_w − n_l is the same for all pairs; for equal lengths γ is 0 and
    the loss is DPO without reference. The per-token form (eq. 7) is then a second change, not a consequence.
    """
    log_v = math.log(50)
    x = {k: v.to(F64) for k, v in random_pairs("dpo_norm").items()}
    uniform = x | {"ref_w": -x["len_w"] * log_v, "ref_l": -x["len_l"] * log_v}
    loss = call("dpo", uniform, beta=0.1)
    gamma = -0.1 * (x["len_w"] - x["len_l"]) * log_v
    assert gamma.unique().numel() > 5  # no constant here
    for i in range(len(loss)):
        row = {k: v[i : i + 1] for k, v in x.items()}
        assert_close(loss[i : i + 1], call("simpo", row, beta=0.1, gamma=gamma[i].item(), average=False))
    equal = uniform | {"ref_w": uniform["ref_l"]}
    zero = {"ref_w": torch.zeros(16, dtype=F64), "ref_l": torch.zeros(16, dtype=F64)}
    assert_close(call("dpo", equal, beta=0.1), call("dpo", x | zero, beta=0.1))


def lemma_terms(a, b, alpha):
    """Per pair: α-DPO, online SimPO and the lemma's correction, from the library, at A = a and log-ratio margin B = b.

    One token per response and β = 1, γ = 0, so that A = s_w − s_l and B = Δ; the earlier policy is the proof's
    log π_old = log π_ref + α log(π_θ/π_ref), so that log w = αB. The margin is not normalised, as in the proof.
    """
    a, b = (torch.as_tensor(x, dtype=F64) for x in (a, b))
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    x = {"logp_w": a / 2, "logp_l": -a / 2, "ref_w": a / 2 - b / 2, "ref_l": b / 2 - a / 2, "len_w": one, "len_l": one}
    x |= {f"old_{k}": x[f"ref_{k}"] + alpha * (x[f"logp_{k}"] - x[f"ref_{k}"]) for k in "wl"}
    ours = call("alpha_dpo", x, beta=1.0, gamma=0.0, alpha=alpha, normalize=False)
    online = call("online_simpo", x, beta=1.0, gamma=0.0, clip=math.inf)
    correction = alpha * b * (torch.nn.functional.logsigmoid(a) - sig(a) + 1)
    return ours, online, correction + zero


GRID = torch.cartesian_prod(torch.linspace(-6, 6, 25, dtype=F64), torch.linspace(-6, 6, 24, dtype=F64)).T


def test_lemma_4_2_is_exact_to_first_order():
    """α-DPO = online SimPO + correction + O(α²): halving α quarters what is left, and its second-order coefficient is
    ½B²[σ(A)σ(−A) + logσ(A)] ≤ 0, which is what makes the lemma an inequality (the paper's proof stops at ≈)."""
    a, b = GRID
    rest = {}
    for alpha in (1e-2, 5e-3, 2.5e-3):
        ours, online, correction = lemma_terms(a, b, alpha)
        rest[alpha] = ours - online - correction
        quadratic = 0.5 * b**2 * (sig(a) * sig(-a) + torch.nn.functional.logsigmoid(a))
        assert (quadratic < 0).all()
        assert_close(rest[alpha] / alpha**2, quadratic, rtol=0, atol=alpha * 250)
    ratio = rest[5e-3].abs().sum() / rest[2.5e-3].abs().sum()
    assert 3.9 < ratio < 4.1


def test_lemma_4_2_holds_with_its_correction_for_every_alpha():
    """L_α ≤ L_online + αB(logσ(A) − σ(A) + 1), pair by pair and for large α too, under the proof's assumptions (log w
    = αB, margin not normalised). With x = αB the difference has its only maximum, 0, at x = 0."""
    for alpha in (1e-3, 0.05, 0.5, 1.0, 3.0):
        ours, online, correction = lemma_terms(*GRID, alpha)
        assert (ours <= online + correction + 1e-9).all()


def test_lemma_4_2_gives_no_lower_bound_without_its_correction():
    """logσ(A) − σ(A) + 1 is never positive, so the correction has the sign of −B: α-DPO lies below online SimPO where
    B > 0, and above it where B < 0 and α is small. "Lower bound" is true of pairs that the policy already prefers."""
    ours, online, _ = lemma_terms(*GRID, 1e-3)
    b = GRID[1]
    assert (ours < online)[b > 0].all()
    assert (ours > online)[(b < 0) & (GRID[0] < 4)].all()


def test_alpha_dpo_does_not_see_the_scale_or_the_origin_of_its_margin():
    """M* is a z-score: shifting every M (a longer lead of all chosen responses in the reference) or scaling it changes
    no loss."""
    x = random_pairs("alpha_dpo") | {"len_w": torch.full((16,), 10), "len_l": torch.full((16,), 10)}
    base = call("alpha_dpo", x)
    assert_close(call("alpha_dpo", x | {"ref_w": x["ref_w"] + 3.0}), base)
    u_w, u_l = x["logp_w"] - x["ref_w"], x["logp_l"] - x["ref_l"]
    assert_close(call("alpha_dpo", x | {"ref_w": x["logp_w"] - 5 * u_w, "ref_l": x["logp_l"] - 5 * u_l}), base)
    assert not torch.allclose(call("alpha_dpo", x | {"ref_w": x["ref_w"] + 3.0}, normalize=False), base)


def test_alpha_dpo_at_step_zero_is_simpo():
    """Policy = reference: all M are 0, so M* = 0; without normalisation M = 0 as well."""
    x = random_pairs("alpha_dpo")
    x |= {"ref_w": x["logp_w"], "ref_l": x["logp_l"]}
    for normalize in (True, False):
        assert_close(call("alpha_dpo", x, normalize=normalize), call("simpo", x, beta=10.0, gamma=4.0))


def test_alpha_dpo_asks_more_of_pairs_that_left_the_reference_further():
    x = random_pairs("alpha_dpo")
    h = -torch.log(torch.expm1(call("alpha_dpo", x, beta=1.0, gamma=1.0)))
    target = (x["logp_w"] / x["len_w"] - x["logp_l"] / x["len_l"]) - h
    m = (x["logp_w"] - x["ref_w"]) / x["len_w"] - (x["logp_l"] - x["ref_l"]) / x["len_l"]
    assert (target[m.argsort()].diff() > 0).all()
    assert target.mean().item() == pytest.approx(1.0) and target.std(correction=0).item() == pytest.approx(0.5)


def test_without_stop_gradient_a_small_spread_turns_alpha_dpo_around():
    """The factor 1 − α/σ_M is negative for σ_M < α: chosen responses are pushed down (Table 2's "w/o sg")."""
    for spread_of_m, sign in ((2.0, -1), (0.1, 1)):
        push = gradients(*at("alpha_dpo", stop_gradient=False, mean=0.0, std=spread_of_m))["logp_w"]
        assert (push.sign() == sign).all()


def test_tables_reference_margins_are_opposites_and_ratio_is_their_difference():
    """Without normalisation: h of "ratio" = h of "policy" + h of "inverse_reference" − (u − γ)."""
    x = random_pairs("alpha_dpo")
    kinds = "ratio", "policy", "reference", "inverse_reference"
    h = {k: -torch.log(torch.expm1(call("alpha_dpo", x, beta=1.0, gamma=0.0, margin=k, normalize=False))) for k in kinds}
    u = x["logp_w"] / x["len_w"] - x["logp_l"] / x["len_l"]
    assert_close(h["reference"] + h["inverse_reference"], 2 * u)
    assert_close(h["ratio"] + u, h["policy"] + h["inverse_reference"])


# --- γ-PO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma, tau", [(4.0, 10.0), (1.0, 10.0), (4.0, 20.0), (0.375, 10.0), (1.0, 1.0), (0.5, 0.25)])
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_gamma_margins_are_the_fixed_point(gamma, tau, rows):
    r = torch.randn(rows, generator=torch.Generator().manual_seed(rows), dtype=F64) * 4
    margins = losses.gamma_margins(r, gamma, tau)
    p = torch.softmax(-(gamma / tau) * sig(margins - r), 0)
    assert_close(margins, gamma * rows * p, rtol=1e-8, atol=0)
    assert margins.mean().item() == pytest.approx(gamma, rel=1e-12)
    ratio = margins / gamma
    assert ratio.max() <= math.exp(gamma / tau) and ratio.min() >= math.exp(-gamma / tau)
    assert (margins[r.argsort()].diff() > 0).all()
    assert_close(margins, tensor(gamma_by_bisection(r.tolist(), gamma, tau), dtype=F64), rtol=1e-8, atol=0)


def test_gamma_margins_minimise_their_objective():
    """No move on the simplex lowers τ Σ p log(Np) + (1/N) Σ −logσ(r − γNp)."""
    r = tensor([3.0, -2.0, 0.5, 6.0], dtype=F64)

    def objective(p):
        return 10 * (p * torch.log(4 * p)).sum() - torch.log(sig(r - 4 * 4 * p)).mean()

    p = losses.gamma_margins(r, 4.0, 10.0) / 16
    best = objective(p)
    for i in range(4):
        for j in range(4):
            step = torch.zeros(4, dtype=F64)
            step[i] += 1e-3
            step[j] -= 1e-3
            assert objective(p + step) >= best - 1e-13


def authors_margins(r, gamma, tau):
    """20 exponentiated-gradient steps of min(0.5/τ, 1) from the uniform p, as the authors' code takes them."""
    step, x = min(0.5 / tau, 1.0), torch.zeros_like(r)
    for _ in range(20):
        x = (1 - step * tau) * x - step * gamma * sig(gamma * x.exp() - r)
        x = x - torch.logsumexp(x, 0) + math.log(len(r))
    return gamma * x.exp()


@pytest.mark.parametrize("gamma, tau", [(4.0, 2.0), (4.0, 1.0), (4.0, 0.5), (1.0, 0.1), (30.0, 3.0)])
@pytest.mark.parametrize("rows, spread", [(2, 5.0), (32, 5.0), (32, 30.0), (128, 1.0)])
def test_gamma_margins_are_exact_far_from_the_published_settings(gamma, tau, rows, spread):
    r = torch.randn(rows, generator=torch.Generator().manual_seed(1), dtype=F64) * spread
    exact = tensor(gamma_by_bisection(r.tolist(), gamma, tau), dtype=F64)
    assert (losses.gamma_margins(r, gamma, tau) - exact).abs().max() < 1e-11 * gamma
    assert (losses.gamma_margins(r.float(), gamma, tau) - exact).abs().max() < 1e-4 * gamma


@pytest.mark.parametrize("tau", [2.0, 1.0, 0.5])
def test_authors_steps_swing_where_a_step_of_one_half_overshoots(tau):
    r = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=F64) * 5
    exact = tensor(gamma_by_bisection(r.tolist(), 4.0, tau), dtype=F64)
    assert (authors_margins(r, 4.0, tau) - exact).abs().max() > 0.3 * 4.0


def test_authors_twenty_steps_are_a_millionth_off_at_the_published_settings():
    r = torch.linspace(-8, 8, 64, dtype=F64)
    exact = tensor(gamma_by_bisection(r.tolist(), 4.0, 10.0), dtype=F64)
    assert 1e-9 < (authors_margins(r, 4.0, 10.0) - exact).abs().max() < 1e-5
    assert (losses.gamma_margins(r, 4.0, 10.0) - exact).abs().max() < 1e-13


def test_gamma_margins_become_uniform_for_large_tau():
    r = tensor([-5.0, 0.0, 5.0], dtype=F64)
    assert_close(losses.gamma_margins(r, 4.0, 1e9), torch.full((3,), 4.0, dtype=F64), rtol=1e-8, atol=0)
    assert_close(losses.gamma_margins(r, 0.0, 1.0), torch.zeros(3, dtype=F64))


# --- β-DPO -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, keep, kept", [(10, 0.8, 8), (9, 0.8, 7), (1, 0.8, 1), (3, 0.1, 1), (100, 0.29, 29)])
def test_beta_dpo_averages_over_the_rows_it_draws(rows, keep, kept):
    """⌊ρB⌋ rows, at least one, are left; the mean over all B is the mean over them of −logσ(β_bΔ)."""
    x = random_pairs("beta_dpo", rows=rows)
    loss = call("beta_dpo", x, keep=keep, generator=torch.Generator().manual_seed(3))
    drawn = loss != 0
    assert drawn.sum() == kept
    delta = (x["logp_w"] - x["ref_w"]) - (x["logp_l"] - x["ref_l"])
    beta_b = max(1e-3, 0.1 * (1 + 0.6 * (delta[drawn].mean() - delta.mean()).item()))
    assert_close(loss.mean(), -torch.log(sig(beta_b * delta[drawn])).mean())


def test_beta_dpo_draws_with_its_weights_and_its_generator():
    """One of three rows with z = 0, 1, 2 (mean, std given): shares exp(−z²/2) = 1, 0.607, 0.135 of their sum 1.742.

    4000 draws: the standard error of a share is below 0.008.
    """
    x = {k: torch.zeros(3, dtype=F64) for k in ("logp_w", "logp_l", "ref_w", "ref_l")}
    x["logp_w"] += tensor([1.0, 2.0, 3.0])
    g = torch.Generator().manual_seed(0)
    counts = torch.zeros(3)
    for _ in range(4000):
        counts += call("beta_dpo", x, keep=0.4, mean=1.0, std=1.0, generator=g) != 0
    weights = torch.exp(-0.5 * tensor([0.0, 1.0, 4.0]))
    assert_close(counts / 4000, weights / weights.sum(), rtol=0, atol=0.035)
    again = [call("beta_dpo", x, generator=torch.Generator().manual_seed(s)) for s in (5, 5)]
    assert torch.equal(*again)


def test_beta_dpo_draws_rows_that_are_too_far_for_a_weight():
    """exp(−½·400²) is 0 in floating point; the row is still drawn when nothing else is left."""
    x = {k: torch.zeros(2, dtype=F64) for k in ("logp_w", "logp_l", "ref_w", "ref_l")}
    x["logp_w"] += tensor([400.0, 401.0])
    loss = call("beta_dpo", x, keep=1.0, mean=0.0, std=1.0)
    assert (loss >= 0).all() and torch.isfinite(loss).all()
    assert (call("beta_dpo", x, keep=0.5, a=-1e-3, mean=0.0, std=1.0, beta=1e-3) != 0).sum() == 1


def test_beta_dpo_with_equal_margins_draws_uniformly():
    x = {k: torch.zeros(4, dtype=F64) for k in ("logp_w", "logp_l", "ref_w", "ref_l")}
    g = torch.Generator().manual_seed(0)
    counts = sum((call("beta_dpo", x, keep=0.5, generator=g) != 0).float() for _ in range(2000))
    assert_close(counts / 2000, torch.full((4,), 0.5), rtol=0, atol=0.05)


# --- coupling --------------------------------------------------------------------------------------------------------


def row_zero_sees_the_others(name, **settings):
    """Does changing every other row (sums and KLs, in several ways) change the loss of row 0?"""
    inputs, random = {k: x.detach() for k, x in tensors(name).items()}, OBJECTIVES[name].random
    moved = []
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        changed = dict(inputs)
        for k, x in inputs.items():
            if x.dtype == F64:
                shift = torch.randn(len(x), generator=g, dtype=F64) * 20
                shift[0] = 0
                changed[k] = x + shift
        before, after = (
            OBJECTIVES[name](**x, **settings, **({"generator": torch.Generator().manual_seed(7)} if random else {}))[0]
            for x in (inputs, changed)
        )
        moved.append(after != before)
    return any(moved)


@every_objective
def test_coupling_is_declared_as_it_is(name):
    coupled = OBJECTIVES[name].coupled
    assert row_zero_sees_the_others(name) == (coupled is True)
    if isinstance(coupled, str):  # a switch, or a number in whose place None is the mean of the batch
        assert row_zero_sees_the_others(name, **{coupled: True if OBJECTIVES[name].settings[coupled] is False else None})


@pytest.mark.parametrize(
    "name, settings",
    [
        ("alpha_dpo", {"mean": 0.0, "std": 1.0}), ("alpha_dpo", {"normalize": False}),
        ("alpha_dpo_kl", {"mean": 0.0, "std": 1.0}), ("bco", {"delta": 0.0}), ("uapo", {"anchor": 0.0}),
    ],
)  # fmt: skip
def test_given_statistics_uncouple_the_rows(name, settings):
    assert not row_zero_sees_the_others(name, **settings)


# --- rewards ---------------------------------------------------------------------------------------------------------


def reward(name, logp=-6.0, ref=-8.0, length=4, **settings):
    """One reward in float64, by default of the response that the promises speak of; lists become rows."""
    rows = [tensor(x if isinstance(x, list) else [x], dtype=F64) for x in (logp, ref, length)]
    return OBJECTIVES[name].reward(*rows, **settings)


@every_objective
def test_reward_is_the_promised_one(name):
    assert reward(name).item() == pytest.approx(PROMISES[name].reward, rel=1e-12)


@every_objective
def test_reward_scales_with_its_beta_and_reads_no_other_reference(name):
    loss = OBJECTIVES[name]
    if "beta" in loss.settings:
        assert_close(reward(name, beta=0.3), reward(name) * (0.3 / loss.settings["beta"]))
    if not {"ref", "ref_w"} & {*loss.tensors}:
        assert torch.equal(
            loss.reward(tensor([-6.0]), None, tensor([4])), loss.reward(tensor([-6.0]), tensor([-8.0]), tensor([4]))
        )


@pytest.mark.parametrize("name, expected", [("simpo", 2.0 * -6.0), ("ipo", 2.0), ("alpha_dpo", 10.0 * -6.0)])
def test_reward_without_lengths_is_that_of_the_sum(name, expected):
    assert reward(name, average=False).item() == expected
    assert reward(name, average=True) == reward(name)


@pytest.mark.parametrize(
    "name, settings, gamma",
    [
        ("dpo", {}, 0.0),
        ("dpo_norm", {"beta": 2.0}, 0.0),
        *(
            ("f_dpo", {"divergence": d, "coef": c}, 0.0)
            for d in ("reverse_kl", "forward_kl", "js", "alpha")
            for c in (0.5, -1.0)
        ),
        ("cpo", {"lam": 0.0}, 0.0),
        ("simpo", {"beta": 3.0}, 1.0),
        ("simpo", {"beta": 0.1, "average": False}, 1.0),
        ("alphapo", {}, 0.25),
        ("alphapo", {"alpha": -1.0, "beta": 0.5}, 0.25),
        ("alphapo", {"alpha": 0.0}, 0.25),
    ],
)
def test_loss_compares_the_rewards(name, settings, gamma):
    """L = −logσ(r_w − r_l − γ), with the settings of the loss."""
    x = random_pairs("alpha_dpo")
    r_w, r_l = (OBJECTIVES[name].reward(x[f"logp_{k}"], x[f"ref_{k}"], x[f"len_{k}"], **settings) for k in "wl")
    assert_close(call(name, x, **settings), torch.logaddexp(torch.zeros(()), -(r_w - r_l - gamma)))


def test_uapo_compares_its_reward_with_the_anchor():
    """L = −logσ(±(r − b)), with the temperature in r."""
    rows, how = tensors("uapo"), {"beta": 0.3, "anchor": 0.1, "temperature": 4.0}
    r = OBJECTIVES["uapo"].reward(rows["logp"], rows["ref"], torch.ones_like(rows["ref"]), **how)
    margin = torch.where(rows["desirable"], r - 0.1, 0.1 - r)
    assert_close(call("uapo", rows, **how), torch.logaddexp(torch.zeros(()), -margin))


# The generators of Wang et al., Table 1: f(x), convex, f(1) = 0. Theirs and ours: α = 1 − c.
DIVERGENCES = {
    "reverse_kl": lambda x, c: x * torch.log(x),
    "forward_kl": lambda x, c: -torch.log(x),
    "js": lambda x, c: x * torch.log(x) - (x + 1) * torch.log((x + 1) / 2),
    "alpha": lambda x, c: (x**c - c * x - (1 - c)) / ((1 - c) * -c),
}


@pytest.mark.parametrize("coef", [0.5, 2.0, -1.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_f_dpo_reward_is_the_slope_of_its_divergence(divergence, coef):
    """r = βf′(π/π_ref) by autograd of f, but for a constant: 1, 0, log 2 and 1/(1 − c), which no margin sees."""
    u = torch.linspace(-3, 3, 13, dtype=F64)
    ratio = torch.exp(u).requires_grad_()
    (slope,) = torch.autograd.grad(DIVERGENCES[divergence](ratio, coef).sum(), ratio)
    constant = {"reverse_kl": 1.0, "forward_kl": 0.0, "js": LOG2, "alpha": 1 / (1 - coef)}[divergence]
    settings = {"beta": 0.3, "divergence": divergence, "coef": coef}
    assert_close(reward("f_dpo", (u - 8).tolist(), [-8.0] * 13, [4.0] * 13, **settings), 0.3 * (slope - constant))


@pytest.mark.parametrize("alpha", [0.25, 2.0, -1.0, 0.0])
def test_alphapo_reward_is_zero_at_certainty_and_rises_by_the_power_of_the_likelihood(alpha):
    """∂r/∂a = βe^{−αa}, the likelihood per token to the power −α, and r = 0 at a = 0: together they are the reward."""
    logp = tensor([-6.0, -1.0, -30.0], dtype=F64, requires_grad=True)
    r = OBJECTIVES["alphapo"].reward(logp, None, torch.full((3,), 4), beta=3.0, alpha=alpha)
    (slope,) = torch.autograd.grad(r.sum(), logp)
    assert_close(slope, 3.0 * torch.exp(-alpha * logp.detach() / 4) / 4)
    assert reward("alphapo", 0.0, alpha=alpha).item() == 0


# --- 5. extremes -----------------------------------------------------------------------------------------------------


def everywhere(s_w, s_l, ref_w=-50.0, ref_l=-50.0, n_w=10, n_l=10, kl=0.0, old=None):
    return {
        "logp_w": s_w, "logp_l": s_l, "ref_w": ref_w, "ref_l": ref_l, "len_w": n_w, "len_l": n_l,
        "kl_w": kl, "kl_l": kl, "old_w": ref_w if old is None else old, "old_l": ref_l,
        "prefix_logp_w": s_w / 2, "prefix_logp_l": s_l / 2, "ref_prefix_logp_w": ref_w / 2, "ref_prefix_logp_l": ref_l / 2,
        "logp": s_w, "ref": ref_w, "logp_kl": s_l, "ref_kl": ref_l, "desirable": True, "margin": 2.0,
    }  # fmt: skip


ORDINARY = everywhere(-12.0, -24.0, -14.0, -22.0, kl=0.5)
EXTREMES = {
    "certain": [everywhere(0.0, 0.0)],
    "nearly certain": [everywhere(-1e-9, -1e-7), everywhere(-1e-3, 0.0)],
    "certain beside ordinary": [everywhere(0.0, -20.0), ORDINARY, everywhere(-20.0, 0.0)],
    "200 nats per token": [everywhere(-2000.0, -2000.0), everywhere(-2000.0, -1.0), everywhere(-1.0, -2000.0)],
    "margin of 1e4, right": [everywhere(-1.0, -10001.0, -1.0, -1.0)],
    "margin of 1e4, wrong": [everywhere(-10001.0, -1.0, -1.0, -1.0)],
    "margin of 1e4, one token": [everywhere(-1e4, 0.0, 0.0, 0.0, 1, 1), everywhere(0.0, -1e4, 0.0, 0.0, 1, 1)],
    "reference 1e4 away": [everywhere(-10.0, -12.0, -1e4, -1.0), everywhere(-10.0, -12.0, -1.0, -1e4)],
    "earlier policy 1e4 away": [everywhere(-10.0, -12.0, old=1e4), everywhere(-10.0, -12.0, old=-1e4)],
    "1e4 beside ordinary": [everywhere(-1e4, 0.0, n_w=7), ORDINARY, ORDINARY],
    "one token": [everywhere(-0.5, -3.0, -1.0, -1.0, 1, 1)],
    "identical responses": [everywhere(-33.3, -33.3, -31.1, -31.1)] * 3,
    "one pair": [ORDINARY],
    "all margins equal": [everywhere(-0.1 * 7, -0.3 * 7, -0.7, -0.9, 7, 7, 0.3)] * 3,
    "policy = reference": [everywhere(-12.3, -24.7, -12.3, -24.7), everywhere(-9.9, -3.1, -9.9, -3.1)],
    "large KL": [ORDINARY | {"kl_w": 1e4, "kl_l": 0.0}, ORDINARY | {"kl_w": 0.0, "kl_l": 1e4}],
    "scores far apart, tied, opposite": [ORDINARY | {"margin": m} for m in (1e4, 1e-30, 0.0, -1e4)],
    "one label": [ORDINARY | {"desirable": False}] * 2,
    "both labels": [ORDINARY, ORDINARY | {"desirable": False}],
}


def columns(rows):
    return {k: [row[k] for row in rows] for k in rows[0]}


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_are_finite(case, dtype):
    for what, rows in EXTREMES.items():
        for label in (True, False):
            inputs = columns(rows if label else [row | {"desirable": False} for row in rows])
            inputs, loss = run(case._replace(inputs=inputs), dtype)
            assert loss.dtype == torch.float32 and torch.isfinite(loss).all(), (what, loss)
            for k, g in gradients(inputs, loss).items():
                assert torch.isfinite(g).all(), (what, k, g)


@every_objective
def test_step_zero(name):
    """Policy = reference. exo: KL of Bernoulli(½) from Bernoulli(0.999); α-DPO: h = 10 · 1 − 4; online SimPO: h = 2 · 1 − 1."""
    promised = PROMISES[name]
    assert (promised.step_zero is None) == (not {"ref", "ref_w", "kl_w"} & {*OBJECTIVES[name].tensors})
    if promised.step_zero is not None:
        _, loss = at(name, columns([everywhere(-10.0, -20.0, -10.0, -20.0)] * 2), **promised.certain)
        assert_close(loss, torch.full((2,), promised.step_zero, dtype=F64))


def test_large_margins_cost_what_they_should():
    """No clamp shows where none is needed: a right margin of 1e4 costs 0, a wrong one h exactly."""
    right, wrong = [1e4], [-1e4]
    zero = [0.0]
    assert value("dpo", right, zero, zero, zero).item() == 0
    assert value("dpo", wrong, zero, zero, zero).item() == pytest.approx(1000.0)
    assert value("rdpo", wrong, zero, zero, zero, [10.0], [10.0]).item() == pytest.approx(1000.0)
    assert value("simpo", wrong, zero, [1.0], [1.0]).item() == pytest.approx(20001.0)
    assert value("discopop", wrong, zero, zero, zero).item() == pytest.approx(500.0)
    assert value("discopop", right, zero, zero, zero).item() == pytest.approx(0.0, abs=1e-200)
    assert value("exo", wrong, zero, zero, zero).item() == pytest.approx(-math.log(1e-3), rel=1e-6)


@pytest.mark.parametrize("a", [-1e-5, -1e-3, -0.1, -math.log(2), -0.7, -3.0, -50.0, -200.0])
def test_log1mexp(a):
    """Against the series log(1 − e^a) = −Σ e^{ka}/k where it converges fast, and log(−a) + a/2 + a²/24 near 0."""
    x = tensor(a, dtype=F64, requires_grad=True)
    y = losses.log1mexp(x)
    if a < -0.05:
        expected = -sum(math.exp(k * a) / k for k in range(1, 800))
    else:
        expected = math.log(-a) + a / 2 + a * a / 24
    assert y.item() == pytest.approx(expected, rel=1e-9, abs=1e-300)
    (slope,) = torch.autograd.grad(y, x)
    assert slope.item() == pytest.approx(1 / (1 - math.exp(-a)) if a > -100 else 0.0, rel=1e-6, abs=1e-21)


def test_log1mexp_is_finite_at_zero():
    x = tensor([0.0, -1e-30, 1e-9], requires_grad=True)
    y = losses.log1mexp(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(y).all() and torch.equal(slope, torch.zeros(3))


def test_equal_numbers_have_no_spread():
    """The fp32 mean of equal numbers can miss them by a rounding; z-scores must not blow that up to ±1."""
    for n in range(1, 40):
        x = torch.full((n,), 0.3) * torch.full((n,), 1.1)
        mean, std = losses.moments(x)
        assert std == 0 and torch.equal(losses.standardize(x, mean, std), torch.zeros(n))
    x = tensor([1.0, 1.001])
    assert_close(losses.standardize(x, *losses.moments(x)), tensor([-1.0, 1.0]), rtol=1e-3, atol=0)


# --- types, devices, arguments ---------------------------------------------------------------------------------------


@every_objective
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(name, dtype):
    settings = PROMISES[name].certain
    half = {k: x.detach() for k, x in tensors(name, dtype=dtype).items()}
    single = {k: x.float() if x.dtype == dtype else x for k, x in half.items()}
    loss = OBJECTIVES[name](**half, **settings)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, OBJECTIVES[name](**single, **settings))


@every_objective
def test_float64_stays_and_one_loss_comes_back_per_row(name):
    inputs = tensors(name)
    loss = OBJECTIVES[name](**inputs)
    assert loss.dtype == F64 and loss.shape == next(iter(inputs.values())).shape


@every_objective
def test_no_value_is_read_from_an_accelerator(name):
    """On the meta device there are no values: any look at one, which on a GPU would wait for it, raises."""
    inputs = tensors(name, device="meta")
    loss = OBJECTIVES[name](**inputs)
    loss.sum().backward()
    assert loss.device.type == "meta" and loss.shape == next(iter(inputs.values())).shape


@pytest.mark.parametrize("name, what", [("simpo", "len_w"), ("odpo", "margin")])
def test_counts_and_scores_in_float64_promote_no_log_probs(name, what):
    half = {k: x.detach() for k, x in tensors(name, dtype=torch.bfloat16).items()}
    wide = half | {what: half[what].double()}
    assert OBJECTIVES[name](**wide).dtype == torch.float32
    assert torch.equal(OBJECTIVES[name](**wide), OBJECTIVES[name](**half))


def broken(name, **changes):
    """A call with some arguments replaced, and the message of the ValueError it raises."""
    with pytest.raises(ValueError) as caught:
        OBJECTIVES[name](**{k: x.detach() for k, x in tensors(name).items()} | changes)
    return str(caught.value)


@pytest.mark.parametrize(
    "name, argument, bad, said",
    [
        ("dpo", "ref_w", torch.zeros(2, dtype=F64), "2 rows"),
        ("dpo", "ref_l", torch.zeros(3, 1, dtype=F64), "(3, 1)"),
        ("dpo", "logp_w", tensor(-3.0), "()"),
        ("dpo", "logp_w", torch.zeros(0), "(0,)"),
        ("dpo", "logp_l", [-1.0, -2.0, -3.0], "list"),
        ("dpo", "ref_w", torch.zeros(3, device="meta"), "meta"),
        ("dpo", "logp_l", torch.zeros(3, dtype=torch.int64), "int64"),
        ("simpo", "len_w", tensor([3, 0, 2]), "0"),
        ("simpo", "len_l", tensor([3.0, 0.5, 2.0]), "0.5"),
        ("simpo", "len_l", tensor([3.0, math.nan, 2.0]), "nan"),
        ("simpo", "len_l", tensor([True, True, True]), "bool"),
        ("odpo", "margin", tensor([1, 2, 3]), "int64"),
        ("rpo_bwd", "margin", torch.ones(2), "2 rows"),
        ("kto", "desirable", tensor([1, 0, 1, 0]), "bool"),
        ("bco", "desirable", tensor([1.0, 0.0, 1.0, 0.0]), "bool"),
        ("kto", "logp_kl", torch.zeros(3, dtype=F64), "3 rows"),
        ("kto", "ref_kl", torch.zeros(5, dtype=F64), "5 rows"),
        ("dpo", "beta", 0.0, "above 0"),
        ("simpo", "beta", -1.0, "above 0"),
        ("ipo", "tau", 0.0, "above 0"),
        ("gamma_simpo", "tau", 0.0, "above 0"),
        ("discopop", "tau", -0.1, "above 0"),
        ("uapo", "temperature", 0.0, "above 0"),
        ("robust_dpo", "label_smoothing", 0.5, "[0, 0.5)"),
        ("dpo", "label_smoothing", -0.1, "[0, 0.5)"),
        ("exo", "label_smoothing", 0.0, "above 0"),
        ("beta_dpo", "keep", 0.0, "(0, 1]"),
        ("beta_dpo", "keep", 1.1, "(0, 1]"),
        ("online_simpo", "clip", -1.0, "at least 0"),
        ("f_dpo", "coef", 1.0, "reverse_kl"),
        ("f_dpo", "divergence", "kl", "'reverse_kl', 'forward_kl', 'js', 'alpha'"),
        ("alpha_dpo", "margin", "ref", "'ratio', 'policy', 'reference', 'inverse_reference', 'sums'"),
    ],
)
def test_a_bad_argument_is_named(name, argument, bad, said):
    message = broken(name, **{argument: bad})
    assert f"`{argument}`" in message and said in message


def test_the_message_names_the_function():
    assert broken("simpo", beta=0.0).startswith("simpo: ")
    assert broken("rrhf", len_w=tensor([0, 1, 1])).startswith("rrhf: ")


def test_a_forgotten_argument_is_a_type_error():
    with pytest.raises(TypeError, match="ref_l"):
        losses.dpo(tensor([-1.0]), tensor([-2.0]), tensor([-1.0]))


# --- torch's transforms ----------------------------------------------------------------------------------------------


def positional(function, inputs, settings):
    """function with its tensors as positional arguments, in the order of `inputs`."""
    return lambda *columns: function(**dict(zip(inputs, columns)), **settings)


# beta_dpo draws from the global generator here: torch.compile traces no torch.Generator argument, decorator or not.
@every_objective
def test_compiles_as_one_graph(name):
    """torch.compile(fullgraph=True) of the decorated function: no look at a value breaks the graph; the values are eager's."""
    inputs, settings = {k: x.detach() for k, x in tensors(name).items()}, PROMISES[name].certain
    torch.compiler.reset()
    compiled = torch.compile(OBJECTIVES[name], backend="eager", fullgraph=True)
    assert_close(compiled(**inputs, **settings), OBJECTIVES[name](**inputs, **settings))


@every_objective
def test_under_func_grad_and_vmap_it_is_the_bare_function(name):
    """grad of the sum; vmap over batches, (3, B) in place of (B,), also of the lengths; and both, one in the other."""
    settings, inputs = PROMISES[name].certain, tensors(name)
    expected = gradients(inputs, OBJECTIVES[name](**inputs, **settings))
    argnums = tuple(i for i, k in enumerate(inputs) if k in POLICY)
    loss = positional(OBJECTIVES[name], inputs, settings)
    slopes = torch.func.grad(lambda *v: loss(*v).sum(), argnums=argnums)(*(x.detach() for x in inputs.values()))
    for slope, wanted in zip(slopes, expected.values()):
        assert_close(slope, wanted)
    stacked = [torch.stack([x.detach(), x.detach().flip(0), x.detach()]) for x in inputs.values()]
    bare = positional(inspect.unwrap(OBJECTIVES[name]), inputs, settings)
    mapped = torch.vmap(loss, randomness="same")(*stacked)
    assert_close(mapped, torch.vmap(bare, randomness="same")(*[x if x.dtype == torch.bool else x.double() for x in stacked]))
    assert_close(mapped[1], loss(*(x[1] for x in stacked)))
    first = next(i for i, k in enumerate(inputs) if k in POLICY)
    slopes = torch.vmap(torch.func.grad(lambda *v: loss(*v).sum(), argnums=first), randomness="same")(*stacked)
    assert_close(slopes[0], next(iter(expected.values())))


@pytest.mark.parametrize("name", [name for name in PROMISES if OBJECTIVES[name].coupled is not True])
def test_vmap_over_the_rows_is_the_batch(name):
    """Losses whose rows do not see each other, a row at a time; and the gradient of each."""
    inputs = tensors(name)
    columns = [x.detach() for x in inputs.values()]
    loss = positional(OBJECTIVES[name], inputs, {})
    assert_close(torch.vmap(loss)(*columns), loss(*columns))
    first = next(i for i, k in enumerate(inputs) if k in POLICY)
    expected = gradients(inputs, OBJECTIVES[name](**inputs))
    assert_close(torch.vmap(torch.func.grad(loss, argnums=first))(*columns), next(iter(expected.values())))


def test_a_length_below_1_is_still_refused_where_it_can_be_seen():
    inputs = {k: x.detach() for k, x in tensors("simpo").items()} | {"len_w": tensor([3, 0, 2])}
    with pytest.raises(ValueError, match="`len_w` holds 0"):
        OBJECTIVES["simpo"](**inputs)
    with pytest.raises(ValueError, match="`logp_w` has shape"):
        torch.vmap(OBJECTIVES["dpo"])(*[torch.zeros(2, 3, 4)] * 4)
    assert losses.may_be_looked_at(tensor(1)) and not losses.may_be_looked_at(tensor(1, device="meta"))


# --- an objective as a trainer has it --------------------------------------------------------------------------------


def of_trainer(objective, rows=3, k=2, dtype=F64):
    """Random outputs of a policy's pass, and what is known beforehand."""
    g = torch.Generator().manual_seed(rows)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    outputs = {name: -normal(rows, k).abs() * 9 for name in ("logp", *objective.outputs)}
    inputs = {
        "len": torch.randint(3, 9, (rows, k), generator=g), "ref": -normal(rows, k).abs() * 9,
        "ref_prefix_logp": -normal(rows, k).abs() * 4, "label": torch.tensor([[True, False][:k]] * rows).view(rows, k),
        "margin": normal(rows), "logp_kl": normal(rows * k), "ref_kl": normal(rows * k),
    }  # fmt: skip
    return outputs, inputs


@every_objective
def test_loss_and_grad_is_the_function_of_columns(name):
    """Against the registered function on columns made by hand, differentiated as a whole by autograd."""
    objective = losses.parse_objective(name)
    outputs, inputs = of_trainer(objective, k=1 if name == "sft" else 2)
    loss, grads = objective.loss_and_grad(outputs, inputs, [5, 2])
    leaves = {k: x.clone().requires_grad_() for k, x in outputs.items()}
    columns = {"old_w": outputs["logp"][:, 0], "old_l": outputs["logp"][:, -1], "margin": inputs["margin"]}
    columns |= {"desirable": inputs["label"].reshape(-1), "logp_kl": inputs["logp_kl"], "ref_kl": inputs["ref_kl"]}
    for k, x in (inputs | leaves).items():
        if x.dim() == 2:
            columns |= {k: x.reshape(-1), f"{k}_w": x[:, 0], f"{k}_l": x[:, -1]}
    drawn = {"generator": torch.Generator().manual_seed(5 + 2 * 1_000_003)} if OBJECTIVES[name].random else {}
    expected = OBJECTIVES[name](*(columns[k] for k in OBJECTIVES[name].tensors), **drawn)
    slopes = torch.autograd.grad(expected.sum(), list(leaves.values()), materialize_grads=True, allow_unused=True)
    assert torch.equal(loss, expected) and not loss.requires_grad and loss.shape == (6 if objective.unpaired else 3,)
    assert list(grads) == list(leaves) and {*objective.outputs} == {*grads} - {"logp"}
    for k, slope in zip(leaves, slopes):
        assert torch.equal(grads[k], slope) and grads[k].shape == outputs[k].shape, k
    assert torch.equal(objective.row_losses(outputs, inputs, [5, 2]), expected)


@every_objective
def test_a_batch_without_rows_has_no_loss_and_no_gradient(name):
    objective = losses.parse_objective(name)
    outputs, inputs = of_trainer(objective, rows=0)
    loss, grads = objective.loss_and_grad(outputs, inputs, [0])
    assert loss.shape == (0,) and {k: x.shape for k, x in grads.items()} == {k: (0, 2) for k in outputs}


@pytest.mark.parametrize("text", ["dpo", "kto", "sft", "0.5*simpo + tdpo1"])
def test_log_sum_p_squared_weighs_the_rows(text):
    """WPO: e^{mean of log π − log Σπ²}, at most 1, of both responses of a pair and of each completion; it is a constant."""
    objective = losses.parse_objective(text)
    outputs, inputs = of_trainer(objective, k=1 if text == "sft" else 2)
    weighed = {**outputs, "log_sum_p_squared": outputs["logp"] + 2.0 * tensor([[1.0], [-9.0], [0.1]], dtype=F64)}
    average = (weighed["logp"] - weighed["log_sum_p_squared"]) / inputs["len"]
    exponent = average.flatten() if objective.unpaired else average.sum(1)
    weight = torch.tensor([min(1.0, math.exp(x)) for x in exponent.tolist()], dtype=F64)
    plain_loss, plain_grads = objective.loss_and_grad(outputs, inputs, [0])
    loss, grads = objective.loss_and_grad(weighed, inputs, [0])
    assert 0 < weight.min() < 1 == weight.max()
    assert_close(loss, weight * plain_loss)
    for k in plain_grads:
        assert_close(grads[k], plain_grads[k] * (weight.view(3, 2) if objective.unpaired else weight[:, None]))


@pytest.mark.parametrize("text, given", [
    ("simpo", {}), ("simpo()", {}), (" simpo( beta = 2.5,gamma=-1 ) ", {"beta": 2.5, "gamma": -1}),
    ("alpha_dpo(margin='policy', normalize=False, mean=None)", {"margin": "policy", "normalize": False, "mean": None}),
])  # fmt: skip
def test_objective_is_written_as_a_call(text, given):
    (term,) = losses.parse_objective(text).terms
    assert term.given == given and term.weight == 1


def test_what_an_objective_needs_is_read_off_its_signature():
    parsed = losses.parse_objective
    assert not parsed("simpo").needs("ref") and parsed("dpo").needs("ref") and parsed("tdpo1").needs("kl_")
    assert parsed("tdpo1").outputs == ("kl",) and parsed("ld_dpo").outputs == ("prefix_logp",) and parsed("dpo").outputs == ()
    assert parsed("sft").responses == 1 and parsed("simpo").responses == 2 and parsed("kto").unpaired
    assert not parsed("online_simpo").coupled and parsed("online_simpo(self_normalize=True)").coupled
    assert not parsed("bco_pair(delta=1.0)").coupled and parsed("bco_pair(delta=None)").coupled
    assert all(parsed(name).coupled == (loss.coupled is True) for name, loss in OBJECTIVES.items())
    assert str(parsed("repo(gamma=0.25)")) == "repo(gamma=0.25)" and parsed("simpo").name == "simpo"


MPO = "0.8*dpo(beta=0.1) + 0.2*bco_pair(beta=0.1, delta=None) + 1.0*sft()"


def on_three_pairs(text):
    """Loss per row of an objective in float64, and its gradient with respect to s_w and s_l."""
    x = {k: tensor(v, dtype=F64) for k, v in PAIRS.items()}
    s_w, s_l = x["logp_w"].requires_grad_(), x["logp_l"].requires_grad_()
    loss = losses.parse_objective(text)(x, seed=[0])
    return loss, *torch.autograd.grad(loss.sum(), [s_w, s_l], materialize_grads=True, allow_unused=True)


def test_a_sum_of_objectives_by_hand():
    """MPO: 0.8 of −logσ(0.1Δ), 0.2 of −logσ(0.1u_w − δ) − logσ(δ − 0.1u_l), δ the mean of the six 0.1u, and −a_w; each slope
    in closed form."""
    rows, delta = list(zip(U_W, U_L, DELTA, A_W, PAIRS["len_w"])), 0.1 / 12
    loss = [
        0.8 * softplus(-0.1 * d) + 0.2 * (softplus(delta - 0.1 * w) + softplus(0.1 * r - delta)) - a for w, r, d, a, _ in rows
    ]
    up = [-0.08 * sigmoid(-0.1 * d) - 0.02 * sigmoid(delta - 0.1 * w) - 1 / n for w, _, d, _, n in rows]
    down = [0.08 * sigmoid(-0.1 * d) + 0.02 * sigmoid(0.1 * r - delta) for _, r, d, _, _ in rows]
    for got, expected in zip(on_three_pairs(MPO), (loss, up, down)):
        assert_close(got, tensor(expected, dtype=F64))


@pytest.mark.parametrize("text, same", [
    ("cpo(beta=0.1, lam=0.0) + 0.3*sft", "cpo(beta=0.1, lam=0.3)"), ("0.25*dpo + dpo*0.75", "dpo"),
    ("0.5 * (dpo(beta=0.2) + 2*sft) + 0.5*dpo(beta=0.2)", "dpo(beta=0.2) + sft"), ("1*simper", "simper"),
    ("2*apo_zero(beta=0.3) + 3*apo_down", "3*apo_down + 2*apo_zero(beta=0.3)"),
])  # fmt: skip
def test_sums_that_are_equal(text, same):
    for got, expected in zip(on_three_pairs(text), on_three_pairs(same)):
        assert_close(got, expected)


def test_cal_dpo_is_a_sum():
    """Its authors' code: −logσ(Δ) + ½[(u_w − 1/2β)² + (u_l + 1/2β)²], here at β = 0.1."""
    expected = [softplus(-d) + 0.5 * ((w - 5) ** 2 + (r + 5) ** 2) for w, r, d in zip(U_W, U_L, DELTA)]
    assert_close(on_three_pairs("dpo(beta=1.0) + 0.5*sppo(beta=0.1)")[0], tensor(expected, dtype=F64))


def test_what_a_sum_needs_is_the_union():
    total = losses.parse_objective
    assert (
        set(total(MPO).tensors) == {"logp_w", "logp_l", "ref_w", "ref_l", "len_w"} and total(MPO).name == "dpo + bco_pair + sft"
    )
    assert total("sft + simpo").responses == 2 and not total("sft + simpo").needs("ref") and total(MPO).coupled
    assert total("dpo + tdpo1").needs("kl_") and total("dpo + alpha_dpo").coupled and total("kto + 0.5*bco").unpaired
    assert total("tdpo1 + ld_dpo").outputs == ("kl", "prefix_logp")
    assert total("simpo + online_simpo(self_normalize=True)").coupled and not total("simpo + online_simpo").coupled
    reward = total("0.5*simpo(beta=3.0) + dpo").reward(tensor([-6.0]), tensor([-8.0]), tensor([4]))
    assert reward.tolist() == [-4.5]  # the first term's, βa, without its weight


def test_a_sum_is_printed_with_all_its_settings_and_read_again():
    dpo = "dpo(beta=0.1, label_smoothing=0.0)"
    beta_dpo = "0.1*beta_dpo(beta=0.2, a=0.6, keep=0.8, mean=None, std=None)"
    for text, whole in (
        ("0.8*dpo + 0.2*bco_pair(beta=0.1) + sft", f"0.8*{dpo} + 0.2*bco_pair(beta=0.1, delta=0.0) + 1.0*sft()"),
        ("1e-05*dpo() + 0.1*beta_dpo(beta=0.2, mean=None)", f"1e-05*{dpo} + {beta_dpo}"),
        ("2.0*simper()", "2.0*simper()"),
        ("dpo+2*(simper + sft())", f"1.0*{dpo} + 2.0*simper() + 2.0*sft()"),
    ):
        assert str(losses.parse_objective(text)) == whole == str(losses.parse_objective(whole))


def test_a_default_without_end_is_left_out(tmp_path):
    """math.inf has no form that --objective could read."""
    (tmp_path / "mine.py").write_text(
        "import math\nfrom losses import objective, sum_logp\n\n@objective(reward=sum_logp)\n"
        "def mine(logp_w, logp_l, *, beta=1.0, clip=math.inf):\n    return (logp_l - logp_w).clamp(max=clip) * beta\n"
    )
    name = f"{tmp_path}/mine.py:mine"
    assert str(losses.parse_objective(name)) == f"{name}(beta=1.0)"


def test_terms_that_draw_share_a_generator_and_its_seed():
    x = random_pairs("beta_dpo")
    one = losses.parse_objective("beta_dpo")
    assert torch.equal(one(x, [1, 2]), one(x, [1, 2])) and not torch.equal(one(x, [1, 2]), one(x, [1, 3]))
    g = torch.Generator().manual_seed(1 + 2 * 1_000_003)
    expected = call("beta_dpo", x, generator=g) + 0.5 * call("beta_dpo", x, generator=g)
    assert_close(losses.parse_objective("beta_dpo + dpo*1e-9 + 0.5*beta_dpo")(x, [1, 2]), expected, rtol=0, atol=1e-8)


# --- objectives in a file of one's own -------------------------------------------------------------------------------

OWN = """
from losses import average_logp, bradley_terry, objective

@objective(reward=average_logp)
def mine(logp_w, logp_l, len_w, len_l, *, beta=2.0, gamma=0.0):
    return bradley_terry(beta * (logp_w / len_w - logp_l / len_l) - gamma)

@objective(reward=average_logp)
def simpo(logp_w, logp_l):
    return logp_l - logp_w

def helper(logp_w):
    return logp_w

@objective(reward=average_logp)
def mean(logp_w, logp_l):
    return (logp_l - logp_w).mean()

@objective(reward=average_logp)
def slip(logp_w, logp_l):
    return logp_x

@objective(reward=average_logp)
def foreign(logp_w, score_w):
    return logp_w
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder to work in, with files of a user's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub-folder").mkdir()
    (tmp_path / "sub-folder" / "my-losses.py").write_text(OWN)
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "raises.py").write_text("x = 1\nx.y\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)\n")
    return tmp_path


@pytest.mark.parametrize("text, same", [
    ("mine.py:mine(beta=3.0, gamma=1)", "simpo(beta=3.0, gamma=1.0)"), ("sub-folder/my-losses.py:mine", "simpo(gamma=0.0)"),
    ("0.5*mine.py:mine(gamma=1.0) + sft*2", "0.5*simpo + 2*sft"), ("mine.py:mine*0.5", "0.5*simpo(gamma=0.0)"),
    ("0.5*(mine.py:mine + sft)", "0.5*simpo(gamma=0.0) + 0.5*sft"),
    ("mine.py:simpo + simpo", "mine.py:simpo() + simpo()"),  # names of losses.py keep their meaning
])  # fmt: skip
def test_an_objective_of_ones_own(own, text, same):
    before = dict(OBJECTIVES)
    objective = losses.parse_objective(text)
    losses.try_objective(objective)
    for got, expected in zip(on_three_pairs(text), on_three_pairs(same)):
        assert_close(got, expected)
    assert str(losses.parse_objective(str(objective))) == str(objective) and objective.terms[0].name in text
    assert OBJECTIVES == before


def test_an_objective_of_ones_own_is_found_from_the_home_folder(own, monkeypatch):
    monkeypatch.setenv("HOME", str(own))
    objective = losses.parse_objective("~/mine.py:mine")
    assert objective.terms[0].loss.settings == {"beta": 2.0, "gamma": 0.0} and not objective.coupled
    assert objective.reward(tensor([-6.0]), None, tensor([4])).tolist() == [-3.0]


@pytest.mark.parametrize("text, said", [
    ("nowhere.py:mine", ["nowhere.py cannot be read (No such file or directory)"]),
    ("broken.py:f", ["broken.py cannot be run (SyntaxError", "broken.py, line 2"]),
    ("raises.py:f", ["raises.py cannot be run (AttributeError", "line 2 of raises.py"]),
    ("exits.py:f", ["exits.py cannot be run (SystemExit: 3, line 1 of exits.py)"]),
    ("mine.py:mime", ["mime is not registered in mine.py; did you mean mine?"]),
    ("mine.py:__name__", ["__name__ is not registered"]),
    ("mine.py:helper", ["helper is not registered", "from losses import average_logp, objective", "@objective(reward=average"]),
    ("mine.py:foreign", ["no trainer has `score_w`"]),
    ("mine.py:mine(bta=1.0)", ["has no argument 'bta'; did you mean beta?", "mine.py:mine(beta=2.0, gamma=0.0)"]),
    ("mine.py:mine(beta=-1.0)", ["mine: `beta` is -1.0; it must be above 0"]),
    ("mine.py:mean", ["mine.py:mean returns ()", "one loss per row, shape (B,)"]),
    ("sft + mine.py:mean", ["mine.py:mean returns ()"]),
    ("mine.py:slip", ["NameError: name 'logp_x' is not defined, line 21 of mine.py"]),
    ("mine.py:mine + kto", ["kto takes single completions, mine.py:mine pairs"]),
    ("mine.py:mine*mine.py:mine", ["a weight is a finite number above 0"]),
    ("mine.py", ["write it as a call"]), ("mine:mine", ["write it as a call"]),
])  # fmt: skip
def test_what_is_wrong_with_an_objective_of_ones_own(own, text, said):
    with pytest.raises(ValueError) as caught:
        losses.try_objective(losses.parse_objective(text))
    for part in said:
        assert part in str(caught.value)


# --- python losses.py ------------------------------------------------------------------------------------------------


def printed(capsys, monkeypatch, *names):
    monkeypatch.setattr(sys, "argv", ["losses.py", *names])
    losses.main()
    return capsys.readouterr().out


def test_list_says_what_each_objective_does_needs_and_has_for_settings(capsys, monkeypatch):
    lines = printed(capsys, monkeypatch).splitlines()
    blocks = {}
    for line in lines:
        if not line.startswith(" "):
            name = line
            blocks[name] = ""
        else:
            blocks[name] += " " + " ".join(line.split())
    assert list(blocks) == list(OBJECTIVES)
    for name, loss in OBJECTIVES.items():
        about, _, needs = blocks[name].partition(" needs ")
        needs, _, settings = needs.partition(" settings ")
        assert about.split() == loss.__doc__.splitlines()[0].split()
        assert all(k in needs.split(", ") for k in loss.tensors if not k.startswith("logp") or k == "logp_kl")
        assert settings == (", ".join(f"{k}={v!r}" for k, v in loss.settings.items()) or "–")
    assert " needs log-probs only " in blocks["slic"] and " needs len_w, len_l, the whole batch settings " in blocks["amapo"]
    assert "the whole batch (see self_normalize)" in blocks["online_simpo"] and "batch" not in blocks["dpo"]


@every_objective
def test_what_is_printed_of_an_objective_runs_in_an_empty_file(capsys, monkeypatch, name):
    """Only torch and the standard library are imported, no decorator is left, the values are those of the registry."""
    source = printed(capsys, monkeypatch, name)
    assert "@" not in source and "import losses" not in source and "from losses" not in source and "fmt: skip" not in source
    alone = {}
    exec(source, alone)
    inputs, settings = {k: x.detach() for k, x in tensors(name).items()}, PROMISES[name].certain
    assert_close(alone[name](**inputs, **settings), OBJECTIVES[name](**inputs, **settings))
    examples = doctest.DocTestFinder().find(alone[name], name, module=False, globs=alone)
    assert sum(len(example.examples) for example in examples) and doctest.DocTestRunner().run(examples[0]).failed == 0


def test_what_is_printed_holds_nothing_else(capsys, monkeypatch):
    source = printed(capsys, monkeypatch, "simpo")
    assert re.findall(r"^(?:def (\w+)|(import .*|from .*))", source, re.M) == [
        ("", "import torch.nn.functional as F"), ("", "from torch import Tensor, tensor"), ("bradley_terry", ""), ("simpo", ""),
    ]  # fmt: skip
    both = printed(capsys, monkeypatch, "simpo", "dpo")
    assert re.findall(r"^def (\w+)", both, re.M) == ["bradley_terry", "dpo", "simpo"]


def test_an_unknown_name_is_an_error_for_people(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        printed(capsys, monkeypatch, "simppo")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "unknown objective 'simppo'; did you mean simpo?" in said


def test_the_list_in_a_pipe_whose_reader_is_gone(tmp_path, monkeypatch):
    """From another folder, in a terminal of ASCII: no error, neither now nor when Python writes out what is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["losses.py"])
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="ascii") as output:
        monkeypatch.setattr(sys, "stdout", output)
        losses.main()


def test_script_prints_the_list(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["losses.py"])
    runpy.run_path(losses.__file__, run_name="__main__")
    assert capsys.readouterr().out == losses.listing() + "\n"
