"""The objectives: one small pure function each, from summed log-probs to one loss per row.

Every function takes one-dimensional tensors, a number per pair or per completion, and returns the loss of each row; the
caller reduces (the trainer divides the sum by the rows of the whole optimizer batch). Sums run over response tokens.

    s_w, s_l   logp_w, logp_l   (B,)  summed log π_θ of the chosen / rejected response, nats
    s̄_w, s̄_l   ref_w, ref_l     (B,)  the same under the frozen reference, no gradient
    n_w, n_l   len_w, len_l     (B,)  response tokens scored, ≥ 1
    D_w, D_l   kl_w, kl_l       (B,)  Σ_t KL(π_ref ‖ π_θ) over the response's positions and the whole vocabulary, nats
    s^old      old_w, old_l     (B,)  summed log-probs under an earlier policy, no gradient
    s^k, s̄^k   prefix_logp_w, ref_prefix_logp_w, …  (B,)  s, s̄ over a response's first k = min(n_w, n_l) tokens alone
    m          margin           (B,)  score of the chosen less score of the rejected response, as the data has them
    s, s̄       logp, ref        (N,)  unpaired objectives: one row per completion
               desirable        (N,)  bool, its label
    s', s̄'     logp_kl, ref_kl  (N,)  unpaired: KL completions (another prompt's) under policy / reference, no gradient

    a = s/n   average log-prob per token         d = a_w − a_l       average margin
    u = s − s̄   log-ratio                        Δ = u_w − u_l       log-ratio margin
    Δ̃ = (u_w/n_w) − (u_l/n_l)   averaged Δ       h                   what the sigmoid sees
    σ  sigmoid     sg[·]  held constant in the gradient     B pairs, N completions
    ε  label_smoothing, the probability that a label is wrong          β beta, γ gamma, …  settings, named as they sound

A gradient g on a sum s is a gradient g on the log-prob of every token in it; averaging enters as the formulas' 1/n.
All Bradley–Terry losses share ∂L/∂h = −σ(−h), so only ∂h/∂s changes from one to the next. The examples share one worked pair:
s_w = −12 over 10 tokens, s_l = −24 over 12, reference −14 and −22; so a_w = −1.2, a_l = −2, d = 0.8, u_w = 2, u_l = −2, Δ = 4.
"""

import argparse
import ast
import difflib
import functools
import inspect
import math
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, tensor

OBJECTIVES: dict[str, Callable[..., Tensor]] = {}  # name → loss, in the order of this file


def objective(*, reward: Callable[..., Tensor], coupled: bool | str = False) -> Callable:
    """Puts a loss into OBJECTIVES, with its arguments checked (`check`) and with what a trainer asks of it as attributes.

    tensors    the names of its positional arguments
    settings   its hyper-parameters with their defaults, but for the `generator` of one that draws: `random`
    reward     the reward of its paper, (logp, ref, length, **settings other than the defaults) → (B,), under those settings
               that it names; average=False is the same reward at length 1
    coupled    whether the loss of a row depends on the other rows, so that it must see the whole optimizer batch:
               False, True, or the name of the setting that makes it so, by True or by None: "of this batch"
    """

    def register(loss):
        signature = inspect.signature(loss)

        @functools.wraps(loss)
        def checked(*args, **kwargs):
            return loss(**check(checked, signature.bind(*args, **kwargs).arguments))

        of_reward = inspect.signature(reward).parameters

        def reward_of(logp, ref, length, **given):
            given = checked.settings | given
            if given.get("average") is False:
                length = torch.ones_like(length)
            return reward(logp, ref, length, **{name: given[name] for name in given if name in of_reward})

        settings = {p.name: p.default for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
        checked.tensors = tuple(name for name in signature.parameters if name not in settings)
        checked.random = "generator" in settings
        checked.settings = {name: default for name, default in settings.items() if name != "generator"}
        checked.coupled = coupled
        checked.reward = reward_of
        OBJECTIVES[loss.__name__] = checked
        return checked

    return register


# Rewards: what the papers call the reward of a response, β included. Each takes the settings it names.


def log_ratio(logp: Tensor, ref: Tensor, length: Tensor, *, beta: float = 1.0) -> Tensor:
    return beta * (logp - ref)


def average_log_ratio(logp: Tensor, ref: Tensor, length: Tensor, *, beta: float = 1.0) -> Tensor:
    return beta * ((logp - ref) / length)


def sum_logp(logp: Tensor, ref: Tensor | None, length: Tensor, *, beta: float = 1.0) -> Tensor:
    return beta * logp


def average_logp(logp: Tensor, ref: Tensor | None, length: Tensor, *, beta: float = 1.0) -> Tensor:
    return beta * (logp / length)


def likelihood(logp: Tensor, ref: Tensor | None, length: Tensor) -> Tensor:
    return torch.exp(logp / length)


# ---- One response ----------------------------------------------------------------------------------------------------


@objective(reward=average_logp)
def sft(logp_w: Tensor, len_w: Tensor) -> Tensor:
    """Raises the likelihood of the chosen response and ignores the rejected one.

        L = −a_w = −s_w/n_w

    Args:
      logp_w: (B,) summed log-prob of the chosen response, nats.
      len_w: (B,) its number of tokens.

    Returns: (B,) nats per token.
    Gradient: ∂L/∂s_w = −1/n_w.

    Libraries often average over the tokens of a microbatch; we average per response, because then the gradient does not
    depend on how a batch is split. The likelihood terms of `cpo` and `orpo` are this one.

    >>> sft(tensor([-12.0]), tensor([10]))
    tensor([1.2000])
    """
    return -logp_w / len_w


# ---- Pairs, against a reference: the log-ratio is the reward ---------------------------------------------------------


def bradley_terry(h: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """−(1−ε) logσ(h) − ε logσ(−h): the label is wrong with probability ε. ∂/∂h = σ(h) − (1−ε)."""
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


@objective(reward=log_ratio)
def dpo(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """Rewards a chosen response that gained more probability over the reference than the rejected one did.

        L = −(1−ε) logσ(βΔ) − ε logσ(−βΔ)          Δ = (s_w − s̄_w) − (s_l − s̄_l)

    Args:
      logp_w, logp_l: (B,) summed log-probs of chosen and rejected under the policy, nats.
      ref_w, ref_l: (B,) the same under the reference.
      beta: β, the price of leaving the reference.
      label_smoothing: ε, the probability that a label is wrong (conservative DPO).

    Returns: (B,); log 2 where policy = reference.
    Gradient: ∂L/∂s_w = β[σ(βΔ) − (1−ε)] = −∂L/∂s_l. With ε > 0 the minimum is at βΔ = logit(1−ε); beyond it the
    gradient pushes the margin back.
    Search: β ∈ {0.01, 0.05, 0.1}; 0.01 was best in the SimPO suite.
    Reference: Rafailov et al., 2023, arXiv 2305.18290.

    >>> dpo(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]))  # −logσ(0.4)
    tensor([0.5130])
    """
    delta = (logp_w - ref_w) - (logp_l - ref_l)
    return bradley_terry(beta * delta, label_smoothing)


@objective(reward=average_log_ratio)
def dpo_norm(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, len_w: Tensor, len_l: Tensor,
    *, beta: float = 5.0, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """DPO per token: rewards the larger *average* gain over the reference, so that length buys no margin.

        L = −(1−ε) logσ(βΔ̃) − ε logσ(−βΔ̃)          Δ̃ = (s_w − s̄_w)/n_w − (s_l − s̄_l)/n_l

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      len_w, len_l: (B,) response tokens.
      beta: β; some fifty times DPO's, because Δ̃ is a difference of averages.
      label_smoothing: ε.

    Gradient: ∂L/∂s_w = (β/n_w)[σ(βΔ̃) − (1−ε)], ∂L/∂s_l = −(β/n_l)[σ(βΔ̃) − (1−ε)].
    Reference: Lambert et al., 2024, "Tülu 3", arXiv 2411.15124.

    >>> dpo_norm(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]), tensor([10]), tensor([12]))
    tensor([0.1483])
    """
    delta = (logp_w - ref_w) / len_w - (logp_l - ref_l) / len_l
    return bradley_terry(beta * delta, label_smoothing)


@objective(reward=log_ratio)
def robust_dpo(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.1
) -> Tensor:
    """DPO on labels flipped with a known probability: an unbiased estimate of the loss on clean labels.

        L = [−(1−ε) logσ(βΔ) + ε logσ(−βΔ)] / (1 − 2ε)

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      beta: β.
      label_smoothing: ε < ½, the flip probability. `dpo` with ε smooths the labels; this inverts the noise.

    Returns: (B,); unbounded below, since a flipped label counts negatively.
    Gradient: ∂L/∂s_w = −β[(1−ε)σ(−βΔ) + εσ(βΔ)]/(1 − 2ε) = −∂L/∂s_l.
    Reference: Chowdhury, Kini and Natarajan, 2024, arXiv 2403.00409.

    >>> robust_dpo(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]))
    tensor([0.4630])
    """
    h = beta * ((logp_w - ref_w) - (logp_l - ref_l))
    return (-(1 - label_smoothing) * F.logsigmoid(h) + label_smoothing * F.logsigmoid(-h)) / (1 - 2 * label_smoothing)


@objective(reward=average_log_ratio)
def ipo(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, len_w: Tensor, len_l: Tensor,
    *, tau: float = 0.1, average: bool = True,
) -> Tensor:  # fmt: skip
    """Regresses the log-ratio margin onto the finite target 1/(2τ), so that certain labels cannot drive it to infinity.

        L = (Δ̃ − 1/(2τ))²          average=False: Δ in place of Δ̃

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      len_w, len_l: (B,) response tokens, used when averaging.
      tau: τ; not comparable between the two readings, Δ is a sum over tokens and Δ̃ a mean.
      average: per-token averages instead of sums.

    Returns: (B,) nats²; (1/2τ)² where policy = reference.
    Gradient: ∂L/∂s_w = (2/n_w)(Δ̃ − 1/2τ), ∂L/∂s_l = −(2/n_l)(Δ̃ − 1/2τ); without 1/n on sums.
    Search: τ ∈ {0.01, 0.1, 0.5, 1}.
    Reference: Azar et al., 2023, arXiv 2310.12036.

    Paper: sums. Its authors told library maintainers that their results use averages; we average by default, because
    that is what the published numbers mean, and keep the sums as `average=False`.

    >>> ipo(*map(tensor, ([-12.0], [-24.0], [-14.0], [-22.0], [10], [12])))  # (11/30 − 5)²
    tensor([21.4678])
    """
    n_w, n_l = (len_w, len_l) if average else (1, 1)
    delta = (logp_w - ref_w) / n_w - (logp_l - ref_l) / n_l
    return (delta - 1 / (2 * tau)) ** 2


@objective(reward=log_ratio)
def rdpo(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, len_w: Tensor, len_l: Tensor,
    *, beta: float = 0.1, alpha: float = 0.01,
) -> Tensor:  # fmt: skip
    """DPO that takes out the credit a longer chosen response would earn by its length.

        L = −logσ(βΔ + α(n_w − n_l))

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      len_w, len_l: (B,) response tokens.
      beta: β.
      alpha: α, the price of a token.

    Gradient: ∂L/∂s_w = −βσ(−h) = −∂L/∂s_l; the length term only says how much margin is still missing.
    Search: β ∈ {0.01, 0.05, 0.1}, α ∈ {0.05, 0.1, 0.5, 1}.
    Reference: Park et al., 2024, arXiv 2403.19159.

    The sign: maximising E[r − α|y|] − β KL gives r = β log(π*/π_ref) + α|y| + const, hence plus. The α-DPO paper prints
    minus; its code and γ-PO's pass the batch size as both lengths, so that the term vanishes.

    >>> rdpo(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]), tensor([10]), tensor([12]))  # h = 0.38
    tensor([0.5211])
    """
    delta = (logp_w - ref_w) - (logp_l - ref_l)
    return bradley_terry(beta * delta + alpha * (len_w - len_l))


@objective(reward=log_ratio)
def dpop(logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float = 0.3, lam: float = 50.0) -> Tensor:
    """DPO-Positive: DPO whose margin pays λ for every nat that the chosen response falls below the reference.

        L = −logσ(β[Δ − λ max(0, −u_w)])

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      beta: β.
      lam: λ, nats of margin per nat lost; 0 is dpo.

    Returns: (B,); log 2 where policy = reference.
    Gradient: with k = 1[u_w < 0], ∂L/∂s_w = −β(1 + λk)σ(−h), ∂L/∂s_l = βσ(−h). It jumps by the factor 1 + λ = 51 at
    policy = reference, where training begins: there rounding decides which side of it a row is on.
    Published: β 0.3, λ 50; the authors found λ from 5 to 500 to make little difference.
    Reference: Pal et al., 2024, "Smaug", arXiv 2402.13228.

    Paper: its authors corrected the formula's brackets in July 2024; some libraries still add λ max(0, −u_w) outside the
    sigmoid. We: inside, times β, as the corrected formula.

    >>> dpop(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]))  # u_w = 2 pays nothing: −logσ(1.2)
    tensor([0.2633])
    """
    u_w, u_l = logp_w - ref_w, logp_l - ref_l
    return bradley_terry(beta * (u_w - u_l - lam * F.relu(-u_w)))


@objective(reward=log_ratio)
def dpo_shift(logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float = 0.1, lam: float = 0.95) -> Tensor:
    """DPO that counts the rejected response for less, so that pushing it down pays less than lifting the chosen one.

        L = −logσ(β(u_w − λu_l))

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      beta: β.
      lam: λ, the paper's f(λ); 1 is dpo. Smaller holds the chosen response up and costs margin.

    Gradient: ∂L/∂s_w = −βσ(−h), ∂L/∂s_l = λβσ(−h).
    Released outputs: λ 0.5–0.9999.
    Reference: Yang et al., 2025, arXiv 2502.07599.

    Code: λ fixed, or linear in the step between two values, up or down; here fixed.

    >>> dpo_shift(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]))  # h = 0.1·(2 + 1.9)
    tensor([0.5170])
    """
    return bradley_terry(beta * ((logp_w - ref_w) - lam * (logp_l - ref_l)))


@objective(reward=log_ratio)
def focal(logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float = 0.1, gamma: float = 0.05) -> Tensor:
    """FocalPO: DPO weighted by its own confidence, so that pairs ranked right count for more, pairs ranked wrong for less.

        L = −p^γ log p          p = σ(βΔ)

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      beta: β.
      gamma: γ, how fast doubtful pairs fade; 0 is dpo. (Vision's focal loss has (1 − p)^γ, which does the opposite.)

    Returns: (B,); 2^−γ log 2 where policy = reference.
    Gradient: ∂L/∂s_w = −βp^γ(1 + γ log p)σ(−βΔ) = −∂L/∂s_l. The weight p^γ is not held constant: below p = e^{−1/γ} the
    loss pushes the margin *down*. At γ = 0.05 this is out of reach (βΔ < −20); at γ = 1 it begins at βΔ = −0.54.
    Reference: Liu et al., 2025, arXiv 2501.06645; the formula as others have implemented it: the authors' repository has
    no code. The default γ is ours.

    >>> focal(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]))  # p = σ(0.4)
    tensor([0.5000])
    """
    log_p = F.logsigmoid(beta * ((logp_w - ref_w) - (logp_l - ref_l)))
    return -torch.exp(gamma * log_p) * log_p


@objective(reward=log_ratio)
def ld_dpo(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, prefix_logp_w: Tensor, prefix_logp_l: Tensor,
    ref_prefix_logp_w: Tensor, ref_prefix_logp_l: Tensor,
    *, beta: float = 0.1, alpha: float = 0.5,
) -> Tensor:  # fmt: skip
    """Length-desensitised DPO: what the longer response has beyond the length of the shorter one counts for less.

        L = −logσ(β(v_w − v_l))          v = u^k + α(u − u^k),  u^k = s^k − s̄^k

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      prefix_logp_w, prefix_logp_l, ref_prefix_logp_w, ref_prefix_logp_l: (B,) the same over the first k = min(n_w, n_l)
        tokens; of the shorter response these are all, so that there v = u.
      beta: β.
      alpha: α, weight of the tokens from k + 1 on; 1 is dpo, 0 ends both responses at k.

    Returns: (B,); log 2 where policy = reference.
    Gradient: with g = −βσ(−β(v_w − v_l)): ∂L/∂s_w = αg and ∂L/∂s^k_w = (1 − α)g, of the rejected response −g. So a token of the
    first k gets g, a later one αg.
    Reference: Liu et al., 2024, arXiv 2409.06411; trl's `ld_alpha`.

    α acts on policy and reference alike, as in trl; in libraries where it acts on the policy alone, the loss at the start is
    not log 2. The reported reward is dpo's, without α.

    >>> x = [tensor([v]) for v in (-12.0, -24.0, -14.0, -22.0, -12.0, -20.0, -14.0, -19.0)]  # v_w = 2, v_l = −1 − 0.5
    >>> ld_dpo(*x)
    tensor([0.5334])
    """
    v_w = (prefix_logp_w - ref_prefix_logp_w) + alpha * ((logp_w - prefix_logp_w) - (ref_w - ref_prefix_logp_w))
    v_l = (prefix_logp_l - ref_prefix_logp_l) + alpha * ((logp_l - prefix_logp_l) - (ref_l - ref_prefix_logp_l))
    return -F.logsigmoid(beta * (v_w - v_l))


@objective(reward=log_ratio)
def odpo(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, margin: Tensor, *, beta: float = 0.1, alpha: float = 1.0
) -> Tensor:
    """DPO with an offset: the further apart the scores of two responses are, the larger the margin that is asked for.

        L = −logσ(βΔ − α log m)

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      margin: (B,) score of the chosen less score of the rejected response, constant. A tie, or scores that say the opposite,
        have the offset −∞: such a pair costs nothing and trains nothing.
      beta: β.
      alpha: α, weight of the offset; 0 is dpo.

    Returns: (B,); log(1 + m^α) where policy = reference.
    Gradient: ∂L/∂s_w = −βσ(−h) = −∂L/∂s_l, h = βΔ − α log m.
    Reference: Amini et al., 2024, arXiv 2402.10571, its loss with f = log; released code, `odpo`.

    log m is below 0 for m < 1: the unit of the scores matters, and with small scores less is asked than dpo does. (The paper
    also tries other functions of m; its code has this one, and the log of the ratio of the scores.)

    >>> odpo(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]), tensor([2.0]))  # −logσ(0.4 − log 2)
    tensor([0.8504])
    """
    delta = (logp_w - ref_w) - (logp_l - ref_l)
    return -F.logsigmoid(beta * delta - torch.xlogy(alpha, margin.detach().clamp(min=0.0)))


def bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(σ(a) ‖ σ(b)) of two Bernoulli distributions. ∂/∂a = σ(a)σ(−a)(a − b), ∂/∂b = σ(b) − σ(a)."""
    one = torch.sigmoid(a) * (F.logsigmoid(a) - F.logsigmoid(b))
    zero = torch.sigmoid(-a) * (F.logsigmoid(-a) - F.logsigmoid(-b))
    return one + zero


@objective(reward=log_ratio)
def rpo_bwd(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, margin: Tensor, *, beta: float = 0.1, eta: float = 1.0
) -> Tensor:
    """Reward-aware: the policy's margin shall be the scores' margin, not as large as possible. Backward KL.

        L = KL(σ(t) ‖ σ(βΔ))          t = ηm, constant

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      margin: (B,) score of the chosen less score of the rejected response; of either sign.
      beta: β.
      eta: η, turns a unit of score into a unit of βΔ.

    Returns: (B,), 0 where βΔ = t.
    Gradient: ∂L/∂s_w = β(σ(βΔ) − σ(t)) = −∂L/∂s_l. This is conservative DPO, label_smoothing = σ(−t) for each pair.
    Reference: Sun et al., 2025, arXiv 2502.00203, RPO-bwd; NeMo's `rpo_bwd_kl`.

    Not the sum of dpo and a likelihood that goes by the same letters: that is "dpo + sft".

    >>> rpo_bwd(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]), tensor([2.0]))  # KL(σ(2) ‖ σ(0.4))
    tensor([0.1954])
    """
    delta = (logp_w - ref_w) - (logp_l - ref_l)
    return bernoulli_kl(eta * margin, beta * delta)


@objective(reward=log_ratio)
def rpo_fwd(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, margin: Tensor, *, beta: float = 0.1, eta: float = 1.0
) -> Tensor:
    """Reward-aware, forward KL: as `rpo_bwd`, but a margin that is far off is hardly corrected.

        L = KL(σ(βΔ) ‖ σ(t))          t = ηm, constant

    Args: as `rpo_bwd`.
    Returns: (B,), 0 where βΔ = t.
    Gradient: ∂L/∂s_w = βσ(βΔ)σ(−βΔ)(βΔ − t) = −∂L/∂s_l, which fades where the policy is sure, right or wrong. With t =
    log((1 − ε)/ε) for all pairs it is `exo`.
    Reference: Sun et al., 2025, arXiv 2502.00203, RPO-fwd; NeMo's `rpo_fwd_kl`.

    >>> rpo_fwd(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]), tensor([2.0]))  # KL(σ(0.4) ‖ σ(2))
    tensor([0.2560])
    """
    delta = (logp_w - ref_w) - (logp_l - ref_l)
    return bernoulli_kl(beta * delta, eta * margin)


@objective(reward=log_ratio)
def rpo_sq(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, margin: Tensor, *, beta: float = 0.1, eta: float = 1.0
) -> Tensor:
    """Reward-aware, squared distance: `ipo` on sums with a target of its own for each pair, the margin of its scores.

        L = (βΔ − t)²          t = ηm, constant

    Args: as `rpo_bwd`.
    Returns: (B,), 0 where βΔ = t.
    Gradient: ∂L/∂s_w = 2β(βΔ − t) = −∂L/∂s_l: a margin that is far off is corrected hardest, one beyond t is taken back.
    Reference: Sun et al., 2025, arXiv 2502.00203; NeMo's `rpo_sq`.

    >>> rpo_sq(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]), tensor([2.0]))  # (0.4 − 2)²
    tensor([2.5600])
    """
    delta = (logp_w - ref_w) - (logp_l - ref_l)
    return (beta * delta - eta * margin) ** 2


@objective(reward=log_ratio)
def rso_hinge(logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float = 0.05) -> Tensor:
    """DPO's margin under a hinge: pushes with constant force until βΔ reaches 1, and not beyond.

        L = max(0, 1 − βΔ)

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      beta: β; the hinge rests from Δ = 1/β on.

    Gradient: ∂L/∂s_w = −β·1[βΔ < 1] = −∂L/∂s_l.
    Reference: Liu et al., 2023, arXiv 2309.06657.

    >>> rso_hinge(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]))  # 1 − 0.05·4
    tensor([0.8000])
    """
    return F.relu(1 - beta * ((logp_w - ref_w) - (logp_l - ref_l)))


@objective(reward=log_ratio)
def exo(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float = 0.1, label_smoothing: float = 1e-3
) -> Tensor:
    """Reverse KL from the policy's preference to the label's: settles on the label instead of covering both.

        L = q[logσ(z) − log(1−ε)] + (1−q)[logσ(−z) − log ε]          q = σ(z), z = βΔ

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      beta: β.
      label_smoothing: ε > 0, without which the target has no finite KL.

    Returns: (B,) nats; 0 at z = logit(1−ε).
    Gradient: ∂L/∂s_w = βσ(z)σ(−z)[z − log((1−ε)/ε)] = −∂L/∂s_l; it fades for badly wrong pairs (z → −∞) too.
    Reference: Ji et al., 2024, arXiv 2402.00856.

    >>> exo(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]))
    tensor([2.0992])
    """
    if label_smoothing == 0:
        raise ValueError("exo: `label_smoothing` is 0; it must be above 0, since log 0 is not finite")
    z = beta * ((logp_w - ref_w) - (logp_l - ref_l))
    win, lose = math.log(1 - label_smoothing), math.log(label_smoothing)
    return torch.sigmoid(z) * (F.logsigmoid(z) - win) + torch.sigmoid(-z) * (F.logsigmoid(-z) - lose)


@objective(reward=log_ratio)
def nca(logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float = 0.01) -> Tensor:
    """Classifies each response against noise by itself, so that the chosen one's likelihood cannot sink along.

        L = −logσ(v_w) − ½ logσ(−v_w) − ½ logσ(−v_l)          v = βu

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      beta: β.

    Returns: (B,); 2 log 2 where policy = reference.
    Gradient: ∂L/∂s_w = β(1.5σ(v_w) − 1), ∂L/∂s_l = ½βσ(v_l); the chosen reward stops at v_w = log 2.
    Reference: Chen et al., 2024, arXiv 2402.05369.

    >>> nca(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]))
    tensor([1.3764])
    """
    v_w, v_l = beta * (logp_w - ref_w), beta * (logp_l - ref_l)
    return -F.logsigmoid(v_w) - 0.5 * F.logsigmoid(-v_w) - 0.5 * F.logsigmoid(-v_l)


@objective(reward=log_ratio, coupled="delta")
def bco_pair(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float = 0.1, delta: float | Tensor | None = 0.0
) -> Tensor:
    """A classifier whose logit is the reward, on pairs: chosen above δ, rejected below, each by itself.

        L = −logσ(βu_w − δ) − logσ(δ − βu_l)

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      beta: β.
      delta: δ in units of βu, e.g. a running mean; None means the mean of both rewards over this batch.

    Returns: (B,); 2 log 2 where policy = reference and δ = 0.
    Gradient: ∂L/∂s_w = −βσ(δ − βu_w), ∂L/∂s_l = βσ(βu_l − δ); none through δ.
    Reference: Jung et al., 2024, arXiv 2404.04656; the quality loss of MPO, Wang et al., 2024, arXiv 2411.10442.

    Papers (BCO, MPO): δ, a moving average of rewards. Code: MPO's authors, LLaMA-Factory, ms-swift and trl until February 2026
    the mean over all batches so far, trl since then and Liger 0. We: 0, or with None a mean that needs no memory.

    >>> bco_pair(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]))  # −2 logσ(0.2)
    tensor([1.1963])
    """
    r_w, r_l = beta * (logp_w - ref_w), beta * (logp_l - ref_l)
    delta = (r_w + r_l).detach().mean() / 2 if delta is None else delta
    return -F.logsigmoid(r_w - delta) - F.logsigmoid(delta - r_l)


@objective(reward=log_ratio)
def sppo(logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float = 1e-3) -> Tensor:
    """Self-play against the current policy: regresses each log-ratio onto its win probability, here a sure win or loss.

        L = (u_w − 1/(2β))² + (u_l + 1/(2β))²

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      beta: β (1/η in the paper); the targets are ±1/(2β).

    Returns: (B,) nats²; 1/(2β²) where policy = reference.
    Gradient: ∂L/∂s_w = 2(u_w − 1/2β), ∂L/∂s_l = 2(u_l + 1/2β).
    Reference: Wu et al., 2024, arXiv 2405.00675.

    The authors' code has ½ in front; we have not, as other libraries, so our gradient is twice theirs.

    >>> sppo(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]))  # 2·498²
    tensor([496008.])
    """
    return (logp_w - ref_w - 0.5 / beta) ** 2 + (logp_l - ref_l + 0.5 / beta) ** 2


@objective(reward=log_ratio)
def sppo_soft(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, margin: Tensor, *, beta: float = 1e-3, eta: float = 1.0
) -> Tensor:
    """`sppo` with the probability that the chosen response wins, as its scores have it, in place of certainty.

        L = (u_w − t)² + (u_l + t)²          t = (P − ½)/β,  P = σ(ηm)

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      margin: (B,) score of the chosen less score of the rejected response.
      beta: β (1/η in the paper).
      eta: η, turns a unit of score into a unit of log-odds; large is `sppo`.

    Returns: (B,) nats²; 2t² where policy = reference.
    Gradient: ∂L/∂s_w = 2(u_w − t), ∂L/∂s_l = 2(u_l + t).
    Reference: Wu et al., 2024, arXiv 2405.00675.

    Code: this is "sppo_single", with ½ in front; "sppo" takes each response's mean P against all five that were sampled.

    >>> sppo_soft(*map(tensor, ([-12.0], [-24.0], [-14.0], [-22.0], [2.0])), beta=0.1)  # t = 3.808, 2·(2 − 3.808)²
    tensor([6.5375])
    """
    target = (torch.sigmoid(eta * margin) - 0.5) / beta
    return (logp_w - ref_w - target) ** 2 + (logp_l - ref_l + target) ** 2


@objective(reward=log_ratio)
def apo_zero(logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float = 0.1) -> Tensor:
    """Anchors both responses at the reference: chosen up, rejected down. For chosen answers above the model's level.

        L = 1 − σ(βu_w) + σ(βu_l)

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      beta: β.

    Returns: (B,) in (0, 2); 1 where policy = reference.
    Gradient: ∂L/∂s_w = −βσ(βu_w)σ(−βu_w), ∂L/∂s_l = βσ(βu_l)σ(−βu_l).
    Reference: D'Oosterlinck et al., 2024, arXiv 2408.06266.

    >>> apo_zero(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]))  # 2σ(−0.2)
    tensor([0.9003])
    """
    return torch.sigmoid(-beta * (logp_w - ref_w)) + torch.sigmoid(beta * (logp_l - ref_l))


@objective(reward=log_ratio)
def apo_down(logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float = 0.1) -> Tensor:
    """Pushes both responses down, the rejected one more. For chosen answers below the model's level.

        L = σ(βu_w) + 1 − σ(βΔ)

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      beta: β.

    Returns: (B,) in (0, 2); 1 where policy = reference.
    Gradient: ∂L/∂s_w = βσ(βu_w)σ(−βu_w) − βσ(βΔ)σ(−βΔ), ∂L/∂s_l = βσ(βΔ)σ(−βΔ). At step 0 the first is exactly 0.
    Reference: D'Oosterlinck et al., 2024, arXiv 2408.06266.

    >>> apo_down(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]))  # σ(0.2) + σ(−0.4)
    tensor([0.9511])
    """
    u_w, u_l = logp_w - ref_w, logp_l - ref_l
    return torch.sigmoid(beta * u_w) + torch.sigmoid(-beta * (u_w - u_l))


@objective(reward=log_ratio)
def discopop(logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float = 0.05, tau: float = 0.05) -> Tensor:
    """Found by a language model's search: logistic for wrong pairs, exponential for right ones, blended by σ(h/τ).

        L = (1 − m)(−logσ(h)) + m e^{−h}          m = σ(h/τ), h = βΔ

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      beta: β.
      tau: τ, the width of the blend in units of h.

    Gradient: ∂L/∂s_w = β[(m'/τ)(e^{−h} + logσ(h)) − (1−m)σ(−h) − m e^{−h}] = −∂L/∂s_l, with m' = m(1−m). At h = 0 it is
    positive, +β(¼(1 − log 2)/τ − ¾): there the loss pushes the margin *down*.
    Reference: Lu et al., 2024, arXiv 2406.08414.

    >>> discopop(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]))
    tensor([0.8148])
    """
    h = beta * ((logp_w - ref_w) - (logp_l - ref_l))
    m_exp = capped_exp(F.logsigmoid(h / tau) - h)  # m e^{−h}: apart, the factors are 0 and infinity for badly wrong pairs
    return -torch.sigmoid(-h / tau) * F.logsigmoid(h) + m_exp


def f_prime(u: Tensor, divergence: str, coef: float) -> Tensor:
    """f′ of the ratio eᵘ for an f-divergence, less a constant that no margin sees; `f_dpo` lists the four."""
    slope = one_of("divergence", divergence, {
        "reverse_kl": lambda u: u,
        "forward_kl": lambda u: -capped_exp(-u),
        "js": F.logsigmoid,
        "alpha": lambda u: capped_exp((coef - 1) * u) / (coef - 1),
    })  # fmt: skip
    return slope(u)


def f_ratio(
    logp: Tensor, ref: Tensor, length: Tensor, *, beta: float = 1.0, divergence: str = "reverse_kl", coef: float = 0.5
) -> Tensor:
    return beta * f_prime(logp - ref, divergence, coef)


@objective(reward=f_ratio)
def f_dpo(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor,
    *, beta: float = 0.1, divergence: str = "reverse_kl", coef: float = 0.5,
) -> Tensor:  # fmt: skip
    """DPO with another divergence as the leash to the reference; the reward is f'(π/π_ref) instead of its logarithm.

        L = −logσ(β(g(u_w) − g(u_l)))
        reverse_kl  g = u  (dpo)          forward_kl  g = −e^{−u}
        js          g = logσ(u)           alpha       g = e^{(c−1)u}/(c−1)

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      beta: β.
      divergence: "reverse_kl", "forward_kl", "js" or "alpha".
      coef: c ≠ 1, for "alpha": c → 1 is reverse_kl, c = 0 is forward_kl. It is trl's
        f_alpha_divergence_coef, where 1 stands for reverse_kl; the paper's α is 1 − c.

    Gradient: ∂L/∂s_w = −βσ(−h)g'(u_w), ∂L/∂s_l = βσ(−h)g'(u_l); g' = 1, e^{−u}, σ(−u), e^{(c−1)u}. Exponents are capped
    at 40, beyond which the gradient is 0.
    Reference: Wang et al., 2023, arXiv 2309.16240.

    >>> f_dpo(tensor([-12.0]), tensor([-24.0]), tensor([-14.0]), tensor([-22.0]), divergence="js")  # h = 0.2
    tensor([0.5981])
    """
    g_w, g_l = f_prime(logp_w - ref_w, divergence, coef), f_prime(logp_l - ref_l, divergence, coef)
    return bradley_terry(beta * (g_w - g_l))


@objective(reward=log_ratio)
def tdpo1(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, kl_w: Tensor, kl_l: Tensor, *, beta: float = 0.1
) -> Tensor:
    """DPO derived per token, which leaves a difference of sequential KLs in the margin.

        L = −logσ(β[Δ − (D_l − D_w)])

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      kl_w, kl_l: (B,) summed forward KL(π_ref ‖ π_θ) along each response, nats, with gradient.
      beta: β.

    Gradient: ∂L/∂s_w = −βσ(−h) = −∂L/∂s_l, ∂L/∂D_l = βσ(−h) = −∂L/∂D_w; ∂D/∂logits = π_θ − π_ref at each position.
    Reference: Zeng et al., 2024, arXiv 2404.11999.

    >>> tdpo1(*map(tensor, ([-12.0], [-24.0], [-14.0], [-22.0], [0.5], [1.5])))  # D_l − D_w = 1, h = 0.3
    tensor([0.5544])
    """
    delta = (logp_w - ref_w) - (logp_l - ref_l)
    return bradley_terry(beta * (delta - (kl_l - kl_w)))


@objective(reward=log_ratio)
def tdpo2(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, kl_w: Tensor, kl_l: Tensor,
    *, beta: float = 0.1, alpha: float = 0.5,
) -> Tensor:  # fmt: skip
    """TDPO with the KL term scaled and held constant on the chosen side, so that it reins in the rejected one only.

        L = −logσ(β[Δ − α(D_l − sg[D_w])])

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      kl_w, kl_l: (B,) summed forward KL(π_ref ‖ π_θ) along each response, nats.
      beta: β.
      alpha: α, the weight of the KL term.

    Gradient: ∂L/∂s_w = −βσ(−h) = −∂L/∂s_l, ∂L/∂D_l = αβσ(−h), ∂L/∂D_w = 0.
    Reference: Zeng et al., 2024, arXiv 2404.11999.

    >>> tdpo2(*map(tensor, ([-12.0], [-24.0], [-14.0], [-22.0], [0.5], [1.5])))  # h = 0.1·(4 − 0.5)
    tensor([0.5334])
    """
    delta = (logp_w - ref_w) - (logp_l - ref_l)
    return bradley_terry(beta * (delta - alpha * (kl_l - kl_w.detach())))


@objective(reward=log_ratio, coupled=True)
def beta_dpo(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor,
    *, beta: float = 0.1, a: float = 0.6, keep: float = 0.8, mean: float | Tensor | None = None,
    std: float | Tensor | None = None, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """DPO that draws the rows near the typical margin and moves β with the batch: informative pairs get a larger β.

        k = max(1, ⌊ρB⌋) rows drawn without replacement, with weights exp(−½((Δ−m)/v)²)
        β_b = max(1e-3, β[1 + a(mean of Δ over the drawn rows − m)]),  L = −(B/k) logσ(sg[β_b] Δ) if drawn, else 0

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      beta: β, the base.
      a: how strongly β follows the margin.
      keep: ρ, the share of rows drawn.
      mean, std: m, v: a running estimate in units of Δ; None means of this batch. v = 0 draws uniformly.
      generator: source of the draw; seed it alike on every rank. None is torch's global CPU generator.

    Returns: (B,); the factor B/k makes the caller's mean over B rows the mean over the drawn ones.
    Gradient: ∂L/∂s_w = −(B/k) β_b σ(−β_bΔ) = −∂L/∂s_l on drawn rows, 0 elsewhere.
    Reference: Wu et al., 2024, arXiv 2407.08639.

    Code: m, v are moving averages (0.9) over microbatches that start at 0 without bias correction, v of the sample
    standard deviation. We: the whole optimizer batch and the population's, unless they are given.

    The draw is the top k of −½((Δ−m)/v)² plus Gumbel noise: the same law, and far rows may have weight 0 in floating
    point, which multinomial sampling refuses.

    >>> beta_dpo(*map(tensor, ([-12.0, -20.0], [-24.0, -20.0], [-14.0, -20.0], [-22.0, -20.0])), a=0.0, keep=1.0)
    tensor([0.5130, 0.6931])
    """
    delta = (logp_w - ref_w) - (logp_l - ref_l)
    mean, std = moments(delta, mean, std)
    k = max(1, math.floor(keep * len(delta) + 1e-9))  # 1e-9: 0.29·100 is 28.999999999999996
    uniform = torch.rand(len(delta), generator=generator, device=generator.device if generator else None)
    gumbel = -torch.log(-torch.log(uniform)).to(delta)
    drawn = (gumbel - 0.5 * standardize(delta.detach(), mean, std) ** 2).topk(k).indices
    beta_b = (beta * (1 + a * (delta.detach()[drawn].mean() - mean))).clamp(min=1e-3)
    scale = torch.zeros_like(delta).index_fill(0, drawn, len(delta) / k)
    return scale * bradley_terry(beta_b * delta)


@objective(reward=log_ratio, coupled=True)
def aot(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float = 0.01, label_smoothing: float = 0.0
) -> Tensor:
    """Alignment by optimal transport: the policy's *distribution* of margins should dominate the reference's.

        L_i = −(1−ε) logσ(βδ_i) − ε logσ(−βδ_i)
        δ_i = (s_w − s_l)_i − the reference margin s̄_w − s̄_l of the same rank in the batch

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      beta, label_smoothing: β, ε.

    Returns: (B,), in the order of the pairs; sorting only decides which reference margin a pair is compared with.
    Gradient: ∂L/∂s_w = β[σ(βδ) − (1−ε)] = −∂L/∂s_l.
    Reference: Melnyk et al., 2024, arXiv 2406.05882.

    >>> aot(*map(tensor, ([-12.0, -20.0], [-24.0, -20.0], [-14.0, -20.0], [-22.0, -20.0])))  # 12 − 8, 0 − 0
    tensor([0.6733, 0.6931])
    """
    policy, reference = logp_w - logp_l, ref_w - ref_l
    return bradley_terry(beta * (policy - quantile_matched(reference, policy)), label_smoothing)


@objective(reward=log_ratio, coupled=True)
def aot_unpaired(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float = 0.01, label_smoothing: float = 0.0
) -> Tensor:
    """Alignment by optimal transport without pairs: chosen log-ratios, sorted, should exceed rejected ones, sorted.

        L_i = −(1−ε) logσ(βδ_i) − ε logσ(−βδ_i)
        δ_i = (u_w)_i − the u_l of the same rank in the batch

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats; w and l rows need not belong
        to one prompt.
      beta, label_smoothing: β, ε.

    Returns: (B,), in the order of the chosen responses.
    Gradient: ∂L/∂s_w = β[σ(βδ) − (1−ε)], and the opposite on the s_l it was matched with.
    Reference: Melnyk et al., 2024, arXiv 2406.05882.

    >>> aot_unpaired(*map(tensor, ([-12.0, -20.0], [-24.0, -20.0], [-14.0, -20.0], [-22.0, -20.0])))  # 2 − 0, 0 − (−2)
    tensor([0.6832, 0.6832])
    """
    u_w, u_l = logp_w - ref_w, logp_l - ref_l
    return bradley_terry(beta * (u_w - quantile_matched(u_l, u_w)), label_smoothing)


# ---- Pairs, without a reference: the policy's own log-prob is the reward ---------------------------------------------


@objective(reward=sum_logp)
def cpo(logp_w: Tensor, logp_l: Tensor, len_w: Tensor, *, beta: float = 0.1, lam: float = 1.0) -> Tensor:
    """DPO with a uniform reference, held up by the likelihood of the chosen response.

        L = −logσ(β(s_w − s_l)) − λ s_w/n_w

    Args:
      logp_w, logp_l: (B,) summed log-probs, nats.
      len_w: (B,) tokens of the chosen response; the likelihood term is an average, the preference term a sum.
      beta: β.
      lam: λ, weight of the likelihood term.

    Gradient: ∂L/∂s_w = −βσ(−β(s_w − s_l)) − λ/n_w, ∂L/∂s_l = βσ(−β(s_w − s_l)).
    Search: β ∈ {0.01, 0.05, 0.1}, λ = 1.
    Reference: Xu et al., 2024, arXiv 2401.08417.

    >>> cpo(tensor([-12.0]), tensor([-24.0]), tensor([10]))  # −logσ(1.2) + 1.2
    tensor([1.4633])
    """
    return bradley_terry(beta * (logp_w - logp_l)) - lam * logp_w / len_w


@objective(reward=sum_logp)
def slic(logp_w: Tensor, logp_l: Tensor, *, delta: float = 1.0, lam: float = 0.1) -> Tensor:
    """Calibrates sequence likelihood: a hinge on the summed log-prob margin plus the likelihood of the chosen response.

        L = max(0, δ − s_w + s_l) − λ s_w

    Args:
      logp_w, logp_l: (B,) summed log-probs, nats.
      delta: δ, the margin in nats at which the hinge rests.
      lam: λ, weight of the likelihood term (a sum, so long responses weigh more).

    Returns: (B,) nats.
    Gradient: with k = 1[δ − s_w + s_l > 0], ∂L/∂s_w = −k − λ, ∂L/∂s_l = k.
    Reference: Zhao et al., 2023, arXiv 2305.10425.

    >>> slic(tensor([-12.0]), tensor([-24.0]))  # the hinge rests; 0.1·12
    tensor([1.2000])
    """
    return F.relu(delta - logp_w + logp_l) - lam * logp_w


@objective(reward=average_logp)
def rrhf(logp_w: Tensor, logp_l: Tensor, len_w: Tensor, len_l: Tensor, *, lam: float = 1.0) -> Tensor:
    """Ranks by average log-prob without a margin, plus the likelihood of the chosen response (the two-response form).

        L = max(0, a_l − a_w) − λ s_w

    Args:
      logp_w, logp_l: (B,) summed log-probs, nats.
      len_w, len_l: (B,) response tokens.
      lam: λ, weight of the likelihood term (a sum).

    Returns: (B,) nats.
    Gradient: with k = 1[a_l > a_w], ∂L/∂s_w = −k/n_w − λ, ∂L/∂s_l = k/n_l.
    Reference: Yuan et al., 2023, arXiv 2304.05302.

    >>> rrhf(tensor([-12.0]), tensor([-24.0]), tensor([10]), tensor([12]))  # ranked right: 0 + 12
    tensor([12.])
    """
    return F.relu(logp_l / len_l - logp_w / len_w) - lam * logp_w


@objective(reward=average_logp)
def orpo(logp_w: Tensor, logp_l: Tensor, len_w: Tensor, len_l: Tensor, *, lam: float = 0.1) -> Tensor:
    """Fine-tuning and preference in one: the likelihood of the chosen response and the odds ratio of the two.

        L = −a_w − λ logσ(o)          o = log odds(e^{a_w}) − log odds(e^{a_l}),  log odds(eᵃ) = a − log(1 − eᵃ)

    Args:
      logp_w, logp_l: (B,) summed log-probs, nats.
      len_w, len_l: (B,) response tokens.
      lam: λ, weight of the odds-ratio term (trl calls it beta).

    Gradient: ∂L/∂s_w = −1/n_w − (λ/n_w)σ(−o)/(1 − e^{a_w}), ∂L/∂s_l = (λ/n_l)σ(−o)/(1 − e^{a_l}); for a > −1e-6 the
    clamp of `log1mexp` leaves 1 in place of 1/(1 − eᵃ).
    Search: λ ∈ {0.1, 0.5, 1, 2}.
    Reference: Hong, Lee and Thorne, 2024, arXiv 2403.07691.

    The authors' code takes the likelihood over prompt and response by default, trl always; we over the response, as the
    formula. The authors' a_w, a_l are averages over n + 1 positions: the mask reaches into the padding after the response.

    >>> orpo(tensor([-12.0]), tensor([-24.0]), tensor([10]), tensor([12]))
    tensor([1.2310])
    """
    a_w, a_l = logp_w / len_w, logp_l / len_l
    odds_ratio = (a_w - a_l) - (log1mexp(a_w) - log1mexp(a_l))
    return -a_w + lam * bradley_terry(odds_ratio)


@objective(reward=average_logp)
def simpo(
    logp_w: Tensor, logp_l: Tensor, len_w: Tensor, len_l: Tensor,
    *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0, average: bool = True,
) -> Tensor:  # fmt: skip
    """Rewards the average log-prob, the quantity that decoding maximises, and asks for a fixed margin.

        L = −(1−ε) logσ(h) − ε logσ(−h)          h = βd − γ

    Args:
      logp_w, logp_l: (B,) summed log-probs, nats.
      len_w, len_l: (B,) response tokens.
      beta: β.
      gamma: γ, the target margin inside the sigmoid, as in the paper; the released configs' `gamma_beta_ratio` is γ/β.
      label_smoothing: ε.
      average: False drops the length normalisation: sums in place of averages.

    Gradient: ∂L/∂s_w = (β/n_w)[σ(h) − (1−ε)], ∂L/∂s_l = −(β/n_l)[σ(h) − (1−ε)]; without 1/n on sums.
    Search: β ∈ {2, 4, 6, 8}, γ ∈ {0.3, 0.5, 1, 1.2, 1.4, 1.6}; 2.5–10 for instruct models.
    Reference: Meng, Xia and Chen, 2024, arXiv 2405.14734; eq. 5 of arXiv 2410.10148.

    >>> simpo(tensor([-12.0]), tensor([-24.0]), tensor([10]), tensor([12]))  # −logσ(2·0.8 − 1)
    tensor([0.4375])
    """
    n_w, n_l = (len_w, len_l) if average else (1, 1)
    return bradley_terry(beta * (logp_w / n_w - logp_l / n_l) - gamma, label_smoothing)


@objective(reward=average_logp)
def repo(logp_w: Tensor, logp_l: Tensor, len_w: Tensor, len_l: Tensor, *, gamma: float = 0.5) -> Tensor:
    """SimPO under a ReLU: pairs with enough average margin are dropped, all others weigh the same. No β.

        L = max(0, γ − d)

    Args:
      logp_w, logp_l: (B,) summed log-probs, nats.
      len_w, len_l: (B,) response tokens.
      gamma: γ, the margin to reach, nats per token (SimPO's γ/β).

    Returns: (B,) nats per token.
    Gradient: with k = 1[d < γ], ∂L/∂s_w = −k/n_w, ∂L/∂s_l = k/n_l: the limit β → ∞ of SimPO's, divided by β.
    Reference: Wu et al., 2025, arXiv 2503.07426.

    >>> repo(tensor([-12.0]), tensor([-24.0]), tensor([10]), tensor([12]), gamma=1.0)  # 1 − 0.8
    tensor([0.2000])
    """
    return F.relu(gamma - (logp_w / len_w - logp_l / len_l))


@objective(reward=likelihood)
def simper(logp_w: Tensor, logp_l: Tensor, len_w: Tensor, len_l: Tensor) -> Tensor:
    """Maximises the inverse perplexity of the chosen response and minimises that of the rejected one. Nothing to tune.

        L = −e^{a_w} + e^{a_l}

    Args:
      logp_w, logp_l: (B,) summed log-probs, nats.
      len_w, len_l: (B,) response tokens.

    Returns: (B,) in (−1, 1).
    Gradient: ∂L/∂s_w = −e^{a_w}/n_w, ∂L/∂s_l = e^{a_l}/n_l. An untrained model has a ≈ −log V and hardly any gradient:
    start from a fine-tuned one.
    Reference: Xiao et al., 2025, arXiv 2502.00883.

    >>> simper(tensor([-12.0]), tensor([-24.0]), tensor([10]), tensor([12]))  # −e^−1.2 + e^−2
    tensor([-0.1659])
    """
    return -torch.exp(logp_w / len_w) + torch.exp(logp_l / len_l)


def curved(a: Tensor, beta: float, alpha: float) -> Tensor:
    """β(1 − e^{−αa})/α, the reward of `alphapo`, and βa at α = 0. By expm1: a power would lose the digits of a small α."""
    return -beta * torch.expm1((-alpha * a).clamp(max=40.0)) / alpha if alpha else beta * a


def curved_logp(logp: Tensor, ref: Tensor | None, length: Tensor, *, beta: float = 1.0, alpha: float = 0.25) -> Tensor:
    return curved(logp / length, beta, alpha)


@objective(reward=curved_logp)
def alphapo(
    logp_w: Tensor, logp_l: Tensor, len_w: Tensor, len_l: Tensor, *, beta: float = 2.5, gamma: float = 0.25, alpha: float = 0.25
) -> Tensor:
    """SimPO with a curved reward: α > 0 rewards getting out of low likelihood more than climbing in high likelihood.

        L = −logσ(r_w − r_l − γ)          r = β(1 − e^{−αa})/α,  α = 0: r = βa

    Args:
      logp_w, logp_l: (B,) summed log-probs, nats.
      len_w, len_l: (B,) response tokens.
      beta: β.
      gamma: γ, the target margin inside the sigmoid.
      alpha: α, the curvature; 0 is SimPO.

    Gradient: ∂L/∂s_w = −(β/n_w)e^{−αa_w}σ(−h), ∂L/∂s_l = (β/n_l)e^{−αa_l}σ(−h). The exponent −αa is capped at 40,
    beyond which the gradient is 0.
    Reference: Gupta et al., 2025, arXiv 2501.03884.

    >>> alphapo(tensor([-12.0]), tensor([-24.0]), tensor([10]), tensor([12]))
    tensor([0.0627])
    """
    return bradley_terry(curved(logp_w / len_w, beta, alpha) - curved(logp_l / len_l, beta, alpha) - gamma)


# ---- Pairs, with a margin of their own -------------------------------------------------------------------------------


@objective(reward=average_logp, coupled=True)
def alpha_dpo(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, len_w: Tensor, len_l: Tensor,
    *, beta: float = 10.0, gamma: float = 4.0, alpha: float = 0.5, margin: str = "ratio", normalize: bool = True,
    stop_gradient: bool = True, average: bool = True, mean: float | Tensor | None = None,
    std: float | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """SimPO whose target margin follows the pair: more is asked where the policy already left the reference further.

        L = −logσ(u − sg[γ + αM*])          u = βd,  M = β·Δ̃,  M* = (M − μ)/σ_M

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      len_w, len_l: (B,) response tokens.
      beta, gamma, alpha: β, γ, α in the paper's units.
      margin: where M comes from, the implicit reference model of Table 2: "ratio" U(π_θ/π_ref)^α; "policy" Uπ_θ^α,
        M = βd; "reference" Uπ_ref^α, M = β(ā_w − ā_l); "inverse_reference" U(1/π_ref)^α, minus that; "sums" M = βΔ.
      normalize: False uses M itself ("w/o normalization").
      stop_gradient: False lets the gradient through M but not through μ and σ_M ("w/o sg").
      average: False drops the length normalisation from u and M alike (Appendix B.2).
      mean, std: μ, σ_M in units of M; None means of this batch, population standard deviation.

    Gradient: ∂L/∂s_w = −(β/n_w)σ(−h), ∂L/∂s_l = (β/n_l)σ(−h). With stop_gradient=False and a margin that holds the
    policy both get the factor 1 − α/σ_M (1 − α without normalisation): for α > σ_M training runs backwards.
    Search: β ∈ {2.5, 10}, γ/β ∈ {0.1, 0.3, 0.5}, α/β ∈ {0.01, 0.05, 0.1, 0.2}.
    Reference: Wu et al., 2024, arXiv 2410.10148, eqs. 8–12 and Table 2.

    Paper (eqs. 10–12): M on sums beside u on averages; μ, σ_M over the training set.
    Code: both on averages (`ln: true`); μ, σ_M moving averages (0.9) over microbatches that start at 0, of the sample, so that
    step 1, where all M are 0, is 0/0; γ, α multiplied by β (its "γ 0.4, α 0.05" at β = 10 is 4 and 0.5); reward βa − α(a − ā).
    We: as the code, "sums" as eq. 12; μ, σ_M of the whole optimizer batch, however it is split; M* = 0 where all M are equal.

    >>> pairs = [[-12.0, -20.0], [-24.0, -20.0], [-14.0, -20.0], [-22.0, -20.0], [10, 10], [12, 10]]
    >>> alpha_dpo(*map(tensor, pairs))  # M* = 1, −1: h = 8 − 4.5, 0 − 3.5
    tensor([0.0298, 3.5298])
    """
    n_w, n_l = (len_w, len_l) if average else (1, 1)
    u = beta * (logp_w / n_w - logp_l / n_l)
    ref = beta * (ref_w / n_w - ref_l / n_l)
    sums = beta * ((logp_w - ref_w) - (logp_l - ref_l))
    margins = {"ratio": u - ref, "policy": u, "reference": ref, "inverse_reference": -ref, "sums": sums}
    m = one_of("margin", margin, margins)
    m = m.detach() if stop_gradient else m
    m = standardize(m, *moments(m, mean, std)) if normalize else m
    return bradley_terry(u - gamma - alpha * m)


@objective(reward=average_logp, coupled=True)
def alpha_dpo_kl(
    logp_w: Tensor, logp_l: Tensor, len_w: Tensor, len_l: Tensor, kl_w: Tensor, kl_l: Tensor,
    *, beta: float = 10.0, gamma: float = 4.0, alpha: float = 0.5, mean: float | Tensor | None = None,
    std: float | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """α-DPO with TDPO's difference of sequential KLs as the margin: token-level where α-DPO is sequence-level.

        L = −logσ(βd − sg[γ + αδ*])          δ = β(D_l − D_w),  δ* = (δ − μ)/σ_δ

    Args:
      logp_w, logp_l: (B,) summed log-probs, nats.
      len_w, len_l: (B,) response tokens.
      kl_w, kl_l: (B,) summed forward KL(π_ref ‖ π_θ) along each response, nats; no gradient flows into them.
      beta, gamma, alpha: β, γ, α in the paper's units.
      mean, std: μ, σ_δ in units of δ; None means of this batch.

    Gradient: ∂L/∂s_w = −(β/n_w)σ(−h), ∂L/∂s_l = (β/n_l)σ(−h), ∂L/∂D = 0.
    Reference: Wu et al., 2024, arXiv 2410.10148, eq. 18 and Table 6.

    Paper: δ ≈ M by D ≈ −u (Lemma 4.3; its appendix writes D ≈ +u and then loses the sign). We take δ as eq. 18 has it,
    sums over positions.

    >>> pairs = [[-12.0, -20.0], [-24.0, -20.0], [10, 10], [12, 10], [0.5, 0.0], [1.5, 0.0]]
    >>> alpha_dpo_kl(*map(tensor, pairs))  # δ* = 1, −1
    tensor([0.0298, 3.5298])
    """
    m = beta * (kl_l - kl_w).detach()
    m = standardize(m, *moments(m, mean, std))
    return bradley_terry(beta * (logp_w / len_w - logp_l / len_l) - gamma - alpha * m)


@objective(reward=average_logp, coupled="self_normalize")
def online_simpo(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, old_w: Tensor, old_l: Tensor, len_w: Tensor,
    len_l: Tensor,
    *, beta: float = 2.0, gamma: float = 1.0, corrected: bool = True, clip: float = 5.0, self_normalize: bool = False,
) -> Tensor:  # fmt: skip
    """SimPO as if the pairs had been sampled from an earlier policy: each pair weighted by how likely it finds them.

        L = sg[w] · (−logσ(βd − γ))
        corrected: log w = (s^old_w − s̄_w) − (s^old_l − s̄_l)          else: log w = (s^old_w − s̄_w) + (s^old_l − s̄_l)

    Args:
      logp_w, logp_l: (B,) summed log-probs under the policy, nats.
      ref_w, ref_l: (B,) under the policy that sampled the pairs.
      old_w, old_l: (B,) under the earlier policy.
      len_w, len_l: (B,) response tokens.
      beta, gamma: β, γ of SimPO.
      corrected: eq. 16, which divides by the rejected ratio; False is plain importance sampling, eq. 15.
      clip: |log w| ≤ clip, in nats. A sum over hundreds of tokens makes w 0 or infinity; math.inf for none.
      self_normalize: divide w by its mean over the batch.

    Gradient: ∂L/∂s_w = −w(β/n_w)σ(−h), ∂L/∂s_l = w(β/n_l)σ(−h).
    Reference: Wu et al., 2024, arXiv 2410.10148, eqs. 13–16.

    Paper: a yardstick for α-DPO's theory (Lemma 4.2), not an experiment; clip and self_normalize are ours.

    >>> online_simpo(*map(tensor, ([-12.0], [-24.0], [-14.0], [-22.0], [-13.5], [-22.5], [10], [12])))  # e¹ · simpo
    tensor([1.1892])
    """
    ratio_w, ratio_l = (old_w - ref_w).detach(), (old_l - ref_l).detach()
    log_weight = (ratio_w - ratio_l if corrected else ratio_w + ratio_l).clamp(-clip, clip)
    weight = log_weight.softmax(0) * len(log_weight) if self_normalize else log_weight.exp()
    return weight * bradley_terry(beta * (logp_w / len_w - logp_l / len_l) - gamma)


def gamma_margins(r: Tensor, gamma: float, tau: float) -> Tensor:
    """γ-PO's margins: γ_i = γ₀Np_i with p on the simplex minimising τ Σ p log(Np) + (1/N) Σ −logσ(r_i − γ_i).

    The objective is convex; at its one minimum x_i + (γ₀/τ) σ(γ_i − r_i) is the same for all rows, x = log Np. Newton's
    method in x: each step goes as far along its direction as is best of 1, ½, …, 2⁻¹¹, the last two go all of it.

    Authors: 20 exponentiated-gradient steps of min(0.5/τ, 1), which leave about 1e-6 at the published settings and swing for
    γ₀ = 4, τ ≤ 2. We: exact to rounding for any γ₀ and τ. Their released SimPO and DPO forms solve for a microbatch together
    with a random sample of earlier r from a queue, 256 in all, so that there the γ_i of a batch do not have the mean γ₀.

    >>> gamma_margins(tensor([0.0, 8.0]), gamma=4.0, tau=10.0)
    tensor([3.2671, 4.7329])
    """
    parts = 0.5 ** torch.arange(12, device=r.device)[:, None]  # of a step
    x = torch.zeros_like(r)
    for step in range(20):
        missed = torch.sigmoid(gamma * x.exp() - r)
        slope = x + gamma / tau * missed
        curvature = 1 + gamma / tau * gamma * x.exp() * missed * (1 - missed)
        weight = x.exp() / curvature
        level = (weight * slope).sum() / weight.sum()  # where the slopes shall meet: so the sum of p stays
        tried = x + parts * (level - slope) / curvature
        tried = tried - tried.logsumexp(1, keepdim=True) + math.log(len(r))
        cost = (tau * tried * tried.exp() - F.logsigmoid(r - gamma * tried.exp())).mean(1)
        best = cost.argmin(0, keepdim=True)
        x = tried[best][0] if step < 18 else tried[0]
    return gamma * x.exp()


@objective(reward=log_ratio, coupled=True)
def gamma_dpo(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float = 0.1, gamma: float = 1.0, tau: float = 10.0
) -> Tensor:
    """DPO with γ-PO's margins, centred: confident pairs are asked for more, doubtful ones for less.

        L = −logσ(r − sg[γ_i − γ₀])          r = βΔ, γ_i from `gamma_margins`

    Args:
      logp_w, logp_l, ref_w, ref_l: (B,) summed log-probs under policy and reference, nats.
      beta: β.
      gamma: γ₀, the mean of the γ_i.
      tau: τ; large keeps all γ_i near γ₀, and τ → ∞ is dpo.

    Gradient: ∂L/∂s_w = −βσ(−h) = −∂L/∂s_l.
    Reference: Sun et al., 2025, "γ-PO", arXiv 2506.03690.

    >>> gamma_dpo(*map(tensor, ([-12.0, -20.0], [-24.0, -20.0], [-14.0, -20.0], [-22.0, -20.0])))  # γ_i − 1 = ±0.004
    tensor([0.5147, 0.6911])
    """
    r = beta * ((logp_w - ref_w) - (logp_l - ref_l))
    return bradley_terry(r - (gamma_margins(r.detach(), gamma, tau) - gamma))


@objective(reward=average_logp, coupled=True)
def gamma_simpo(
    logp_w: Tensor, logp_l: Tensor, len_w: Tensor, len_l: Tensor, *, beta: float = 10.0, gamma: float = 4.0, tau: float = 10.0
) -> Tensor:
    """SimPO with γ-PO's margins: the mean margin stays γ₀, confident pairs are asked for more, doubtful ones for less.

        L = −logσ(r − sg[γ_i])          r = βd, γ_i from `gamma_margins`

    Args:
      logp_w, logp_l: (B,) summed log-probs, nats.
      len_w, len_l: (B,) response tokens.
      beta: β.
      gamma: γ₀, the mean of the γ_i.
      tau: τ; large keeps all γ_i near γ₀, and τ → ∞ is simpo.

    Gradient: ∂L/∂s_w = −(β/n_w)σ(−h), ∂L/∂s_l = (β/n_l)σ(−h).
    Published: β 2.5–10, γ₀ 0.375–5, τ 3–20.
    Reference: Sun et al., 2025, "γ-PO", arXiv 2506.03690.

    >>> gamma_simpo(*map(tensor, ([-12.0, -20.0], [-24.0, -20.0], [10, 10], [12, 10])))  # γ_i = 4.733, 3.267
    tensor([0.0374, 3.3045])
    """
    r = beta * (logp_w / len_w - logp_l / len_l)
    return bradley_terry(r - gamma_margins(r.detach(), gamma, tau))


@objective(reward=average_logp, coupled=True)
def amapo(logp_w: Tensor, logp_l: Tensor, len_w: Tensor, len_l: Tensor, *, beta: float = 2.5, paper: bool = False) -> Tensor:
    """SimPO that adds a margin to the pairs below the batch's mean and none to those above.

        L = −logσ(βd − sg[m])          code: m = β exp(((μ − d)/s)·μ) where d < μ, else 0

    Args:
      logp_w, logp_l: (B,) summed log-probs, nats.
      len_w, len_l: (B,) response tokens.
      beta: β.
      paper: the formula of the text, in units of r = βd: m = exp(e), e = ((μ_r − r)/s_r)·μ_r = β((μ − d)/s)μ, where
        e > 0, else 0.

    Gradient: ∂L/∂s_w = −(β/n_w)σ(−h), ∂L/∂s_l = (β/n_l)σ(−h).
    Published: β 2–3.
    Reference: Deng et al., 2025, arXiv 2511.09385.

    Paper: β inside the exponent; code: in front of it, and the rows by d < μ. The two put the margin on opposite pairs
    when μ < 0. We: the code's, because the results come from it, but μ, s of the whole optimizer batch and the population,
    not of the ranks' microbatches and the sample. s = 0 gives no margin, and the exponent is capped at 20.

    >>> amapo(*map(tensor, ([-12.0, -20.0], [-24.0, -20.0], [10, 10], [12, 10])))  # μ = s = 0.4, m = 0, 2.5 e^0.4
    tensor([0.1269, 3.7533])
    """
    d = logp_w / len_w - logp_l / len_l
    r = beta * d.detach() if paper else d.detach()
    mean, std = moments(r)
    z = standardize(r, mean, std)
    exponent = (-z * mean).clamp(max=20.0)
    m = torch.where(exponent > 0, exponent.exp(), 0.0) if paper else torch.where(z < 0, beta * exponent.exp(), 0.0)
    return bradley_terry(beta * d - m)


# ---- Unpaired: one row per completion, and a label -------------------------------------------------------------------


@objective(reward=log_ratio, coupled=True)
def kto(
    logp: Tensor, ref: Tensor, desirable: Tensor, logp_kl: Tensor, ref_kl: Tensor,
    *, beta: float = 0.1, lambda_d: float = 1.0, lambda_u: float = 1.0,
) -> Tensor:  # fmt: skip
    """Values a completion's log-ratio like a human values gains and losses, measured from an estimate of the policy's KL.

        z = sg[max(0, mean(s' − s̄'))],  v = β(s − s̄ − z)
        L = λ_d(1 − σ(v)) if desirable, λ_u(1 − σ(−v)) if not

    Args:
      logp, ref: (N,) summed log-probs of the completions under policy and reference, nats.
      desirable: (N,) bool.
      logp_kl, ref_kl: (N,) the same for prompts paired with *another* prompt's completion; they only estimate z.
      beta: β.
      lambda_d, lambda_u: weights of desirable and undesirable rows; balance them when the labels are not balanced.

    Returns: (N,) in (0, λ).
    Gradient: ∂L/∂s = −λ_d βσ(v)σ(−v) if desirable, +λ_u βσ(v)σ(−v) if not; none through z.
    Search: β ∈ {0.01, 0.05, 0.1}.
    Reference: Ethayarajh et al., 2024, arXiv 2402.01306.

    "kto_pair" of older code (matched pairs, gradient through z) is another loss.

    >>> kto(*map(tensor, ([-12.0, -24.0], [-14.0, -22.0], [True, False], [-30.0, -28.0], [-31.0, -29.0])))  # z = 1
    tensor([0.4750, 0.4256])
    """
    z = (logp_kl - ref_kl).mean().clamp(min=0).detach()
    v = beta * (logp - ref - z)
    return torch.where(desirable, lambda_d * torch.sigmoid(-v), lambda_u * torch.sigmoid(v))


@objective(reward=log_ratio, coupled=True)
def bco(logp: Tensor, ref: Tensor, desirable: Tensor, *, beta: float = 0.1, delta: float | Tensor | None = None) -> Tensor:
    """A classifier whose logit is the reward, shifted by the mean reward so that the shift need not be learned.

        L = −logσ(r − δ) if desirable, −logσ(δ − r) if not          r = β(s − s̄)

    Args:
      logp, ref: (N,) summed log-probs under policy and reference, nats.
      desirable: (N,) bool.
      beta: β.
      delta: δ in units of r, e.g. a running mean; None means the mean of r over this batch.

    Gradient: ∂L/∂s = −βσ(−(r − δ)) if desirable, +βσ(r − δ) if not; none through δ.
    Reference: Jung et al., 2024, arXiv 2404.04656.

    >>> bco(tensor([-12.0, -24.0]), tensor([-14.0, -22.0]), tensor([True, False]))  # r = 0.2, −0.2, δ = 0
    tensor([0.5981, 0.5981])
    """
    r = beta * (logp - ref)
    delta = r.detach().mean() if delta is None else delta
    return bradley_terry(torch.where(desirable, r - delta, delta - r))


@objective(reward=log_ratio)
def apo_zero_unpaired(logp: Tensor, ref: Tensor, desirable: Tensor, *, beta: float = 0.1) -> Tensor:
    """`apo_zero` on single completions: desirable ones up, undesirable ones down, both anchored at the reference.

        L = 1 − σ(βu) if desirable, σ(βu) if not          u = s − s̄

    Args:
      logp, ref: (N,) summed log-probs under policy and reference, nats.
      desirable: (N,) bool.
      beta: β.

    Returns: (N,) in (0, 1); ½ where policy = reference.
    Gradient: ∂L/∂s = −βσ(βu)σ(−βu) if desirable, the opposite if not.
    Reference: D'Oosterlinck et al., 2024, arXiv 2408.06266, eq. 7; for single completions in trl's KTO trainer.

    It is `kto` with z = 0 and λ = 1, so no row sees another. A pair as two rows gives the two terms of `apo_zero`.

    >>> apo_zero_unpaired(tensor([-12.0, -24.0]), tensor([-14.0, -22.0]), tensor([True, False]))  # σ(−0.2) both
    tensor([0.4502, 0.4502])
    """
    u = logp - ref
    return torch.sigmoid(beta * torch.where(desirable, -u, u))


def tempered_log_ratio(logp: Tensor, ref: Tensor, length: Tensor, *, beta: float = 1.0, temperature: float = 1.0) -> Tensor:
    return beta * (logp - ref) / temperature


@objective(reward=tempered_log_ratio, coupled=True)
def uapo(
    logp: Tensor, ref: Tensor, desirable: Tensor,
    *, beta: float = 0.1, anchor: float | Tensor | None = None, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """RECONSTRUCTED. Compares each completion with a utility anchor instead of with a partner.

        L = −logσ(r − b) if desirable, −logσ(b − r) if not          r = β(s − s̄)/T

    Args:
      logp, ref: (N,) summed log-probs under policy and reference, nats. Reference-free: pass s/n as logp and 0 as ref.
      desirable: (N,) bool.
      beta: β.
      anchor: b in units of r; None means the mean of r over this batch, held constant.
      temperature: T, the uncertainty: larger trusts the labels less.

    Gradient: ∂L/∂s = −(β/T)σ(−(r − b)) if desirable, +(β/T)σ(r − b) if not; none through b.
    Reference: Wang et al., 2025, arXiv 2509.10515.

    Public text fixes only this much: an anchor, on the authors' page a *learnable* one, each response compared with it,
    unpaired data allowed. Ours is the batch's mean, a constant; that and T are our own; at T = 1 the result is `bco`.

    >>> uapo(*map(tensor, ([-12.0, -24.0], [-14.0, -22.0], [True, False])), anchor=0.1)  # −logσ(0.1), −logσ(0.3)
    tensor([0.6444, 0.5544])
    """
    r = beta * (logp - ref) / temperature
    anchor = r.detach().mean() if anchor is None else anchor
    return bradley_terry(torch.where(desirable, r - anchor, anchor - r))


# ---- Primitives ------------------------------------------------------------------------------------------------------


def log1mexp(a: Tensor) -> Tensor:
    """log(1 − eᵃ) for a ≤ 0, kept finite by a ≤ −1e-6. ∂/∂a = −eᵃ/(1 − eᵃ), 0 beyond the clamp."""
    # Each branch gets arguments it can handle: `where` multiplies the unused gradient by 0, and 0 · inf is NaN.
    near = torch.log(-torch.expm1(a.clamp(max=-1e-6)))
    far = torch.log1p(-torch.exp(a.clamp(max=-math.log(2))))
    return torch.where(a > -math.log(2), near, far)


def capped_exp(x: Tensor) -> Tensor:
    """eˣ with x ≤ 40: e⁴⁰ ≈ 2e17 is no loss anyone trains on, and its square still fits fp32. Gradient 0 beyond."""
    return torch.exp(x.clamp(max=40.0))


def moments(x: Tensor, mean: float | Tensor | None = None, std: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of x, held constant; `mean=`/`std=` (numbers or tensors) replace them.

    A spread that rounding alone explains is 0: the mean of equal numbers can miss them by one unit in the last place.
    """
    if mean is None:
        mean = x.mean()
    if std is None:
        std = x.std(correction=0)
        std = torch.where(std > 8 * torch.finfo(x.dtype).eps * x.abs().max(), std, 0.0)
    # new_full, not a copy from the host, so that a number costs no wait on an accelerator.
    return tuple(m.detach() if isinstance(m, Tensor) else x.new_full((), m) for m in (mean, std))


def wpo_weight(logp: Tensor, log_sum_p_squared: Tensor, length: Tensor) -> Tensor:
    """WPO: how far the responses of a row are the policy's own, a weight for the row's loss under any objective.

        w = min(1, Π e^{ā}),  ā = (1/n) Σ_t [log π(y_t) − log Σ_v π(v)²]

    Args: logp, log_sum_p_squared, length: (B, k) of a row's k responses: Σ_t log π(y_t), Σ_t log Σ_v π(v)², tokens.
    Returns: (B,), held constant in the gradient.
    Reference: Zhou et al., 2024, arXiv 2406.11827, eq. 2; with the bound 1, which trl's `use_weighting` once had and 1.16.0
    has not. open-instruct's "wpo" leaves out Σ_v π(v)².

    Σ_v π(v)² is the probability that a sampled token has on average, so a response that was sampled has e^ā about 1 and one
    that the policy would hardly say has e^ā near 0.

    >>> wpo_weight(tensor([[-12.0, -24.0]]), tensor([[-8.0, -18.0]]), tensor([[10, 12]]))  # e^(−0.4 − 0.5)
    tensor([0.4066])
    """
    return torch.exp(((logp - log_sum_p_squared) / length).sum(-1)).clamp(max=1.0).detach()


def standardize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x − mean)/std, and 0 where std is 0 (one row, or all rows equal)."""
    return torch.where(std > 0, (x - mean) / torch.where(std > 0, std, 1.0), 0.0)


def quantile_matched(y: Tensor, x: Tensor) -> Tensor:
    """y reordered so that its k-th smallest value stands in the row where x has its k-th smallest."""
    return y.sort(stable=True).values[x.argsort(stable=True).argsort()]


def one_of(name: str, value: str, choices: dict[str, object]) -> object:
    """choices[value], or a ValueError that lists what `name` may be."""
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(map(repr, choices))}")
    return choices[value]


# ---- At a call: the one place where arguments are looked at. The mathematics does not need it. -----------------------

LIMITS = {
    "beta": ("above 0", lambda v: v > 0),
    "tau": ("above 0", lambda v: v > 0),
    "temperature": ("above 0", lambda v: v > 0),
    "label_smoothing": ("in [0, 0.5): at one half a label says nothing", lambda v: 0 <= v < 0.5),
    "keep": ("in (0, 1], the share of the rows that is used", lambda v: 0 < v <= 1),
    "clip": ("at least 0 (math.inf for none)", lambda v: v >= 0),
    "coef": ('other than 1, whose limit is divergence="reverse_kl"', lambda v: v != 1),
}


def check(loss: Callable[..., Tensor], given: dict) -> dict:
    """The arguments `given` to a loss in fp32 or, where a log-prob is float64, in float64. Raises ValueError that names the
    function and the argument."""
    rows = {name: x for name, x in given.items() if name in loss.tensors}
    first, like = next(iter(rows.items()))

    def refuse(name, problem):
        raise ValueError(f"{loss.__name__}: `{name}` {problem}")

    for name, x in rows.items():
        if not isinstance(x, Tensor):
            refuse(name, f"is a {type(x).__name__}, not a tensor; pass one number per row, shape (B,)")
        one_row = x.dim() == 0 and is_transformed(x)  # vmap over the rows
        if x.dim() != 1 and not one_row or x.numel() == 0:
            refuse(name, f"has shape {tuple(x.shape)}; pass one number per row, shape (B,) with B at least 1")
        if x.shape != like.shape:
            refuse(name, f"has {len(x)} rows but `{first}` has {len(like)}; pass the same rows in the same order")
        if x.device != like.device:
            refuse(name, f"is on {x.device} but `{first}` is on {like.device}; move them to one device")
        if name == "desirable" and x.dtype != torch.bool:
            refuse(name, f"has dtype {x.dtype}; pass torch.bool, True for a desirable completion")
        if name != "desirable" and not (x.is_floating_point() or name.startswith("len_") and x.dtype != torch.bool):
            refuse(name, f"has dtype {x.dtype}; log-probs and margins are floating point and lengths are numbers")
        if name.startswith("len_") and may_be_looked_at(x) and not (x >= 1).all():
            refuse(name, f"holds {x.min().item():g}; lengths count tokens and are at least 1: drop the row")
    for name in given.keys() & LIMITS.keys():
        requirement, holds = LIMITS[name]
        if not holds(given[name]):
            refuse(name, f"is {given[name]}; it must be {requirement}")

    log_probs = [x.dtype for name, x in rows.items() if not name.startswith(("len_", "margin", "desirable"))]
    dtype = functools.reduce(torch.promote_types, log_probs, torch.float32)
    return given | {name: x if x.dtype == torch.bool else x.to(dtype) for name, x in rows.items()}


def is_transformed(x: Tensor) -> bool:
    """Whether torch.vmap or torch.func.grad is at work on x, so that it need not have one value to look at."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x)


def may_be_looked_at(x: Tensor) -> bool:
    """Not where x has no value yet (torch.compile, vmap) or the host would wait for it (an accelerator)."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed(x)


# ---- What a trainer asks for and calls: a loss with its settings, or a weighted sum of such --------------------------


class Term(NamedTuple):
    """A summand: weight · loss, with the settings that are given for it; as text, with its defaults too."""

    weight: float
    name: str  # in OBJECTIVES, or file.py:function
    loss: Callable[..., Tensor]
    given: dict

    def __str__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in (self.loss.settings | self.given).items() if v != math.inf)
        return f"{self.name}({settings})"

    @property
    def coupled(self) -> bool:
        switch = self.loss.coupled
        value = (self.loss.settings | self.given)[switch] if isinstance(switch, str) else switch
        return value is True or value is None


class Objective:
    """Σ weight · loss, row by row; mostly of one term with weight 1. It needs what any of its terms needs."""

    def __init__(self, terms: list[Term]) -> None:
        tensors = {}
        for term in terms:
            tensors |= dict.fromkeys(term.loss.tensors)
        self.terms = terms
        self.name = " + ".join(term.name for term in terms)
        self.tensors = tuple(tensors)  # the names of what it is called with
        self.outputs = tuple(name for name in ("kl", "prefix_logp") if self.needs(name))  # of the policy, besides log-probs
        self.unpaired = "desirable" in tensors
        self.responses = 2 if "logp_l" in tensors else 1  # of an example that are scored; 1 also if chosen ones only
        self.coupled = any(term.coupled for term in terms)  # do rows depend on each other, must it see the whole batch?

    def __str__(self) -> str:
        """The call, or the sum of the calls. `parse_objective` understands it again."""
        if len(self.terms) == 1 and self.terms[0].weight == 1:
            return str(self.terms[0])
        return " + ".join(f"{term.weight!r}*{term}" for term in self.terms)

    def needs(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.tensors)

    def reward(self, logp: Tensor, ref: Tensor | None, length: Tensor) -> Tensor:
        """That of the first term's paper, without the weight."""
        first = self.terms[0]
        return first.loss.reward(logp, ref, length, **first.given)

    def __call__(self, tensors: dict[str, Tensor], seed: list[int]) -> Tensor:
        """Loss per row (B,). Functions that draw at random get a generator that depends on `seed` alone."""
        number = sum(x * 1_000_003**i for i, x in enumerate(seed)) % 2**63
        generator = torch.Generator().manual_seed(number)
        losses = []
        for term in self.terms:
            arguments = [tensors[name] for name in term.loss.tensors]
            random = {"generator": generator} if term.loss.random else {}
            losses.append(term.weight * term.loss(*arguments, **term.given, **random))
        return sum(losses[1:], start=losses[0])

    def row_losses(self, outputs: dict[str, Tensor], inputs: dict[str, Tensor], seed: list[int]) -> Tensor:
        """Loss per row, of n examples with k responses each: (n,) for pairs, (n·k,) for unpaired objectives.

        Args:
          outputs: of the policy's pass, (n, k) each: "logp", what `outputs` names, and for WPO "log_sum_p_squared", with
            which each row's loss is multiplied by its `wpo_weight`.
          inputs: what is known before the policy is asked: "len", "ref", "ref_prefix_logp", "label" (bool: chosen or
            desirable) (n, k), "margin" (n,), "logp_kl", "ref_kl" (n·k,); those that the objective needs.
          seed: see `__call__`.
        """
        old = outputs["logp"].detach()  # under the policy as it is at the start of the step
        columns = {}  # of "logp": logp (n·k,), and logp_w and logp_l (n,), its first and last column
        for name, x in (inputs | outputs | {"old": old}).items():
            columns[name] = x.flatten()
            if x.dim() == 2:
                columns[f"{name}_w"] = x[:, 0]
                columns[f"{name}_l"] = x[:, -1]
        columns["desirable"] = columns.get("label")
        loss = self(columns, seed)
        if "log_sum_p_squared" not in outputs:
            return loss
        sizes = (-1, 1) if self.unpaired else outputs["logp"].shape  # responses of a row: one, or both of its pair
        logp, log_sum_p_squared = outputs["logp"].detach(), outputs["log_sum_p_squared"].detach()
        return loss * wpo_weight(logp.reshape(sizes), log_sum_p_squared.reshape(sizes), inputs["len"].reshape(sizes))

    def loss_and_grad(
        self, outputs: dict[str, Tensor], inputs: dict[str, Tensor], seed: list[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`row_losses`, and the gradient of their sum with respect to each of the outputs that reach the weights, (n, k)."""
        leaves = {name: outputs[name].detach().requires_grad_() for name in ("logp", *self.outputs)}
        if len(outputs["logp"]) == 0:  # a rank without rows in this microbatch
            return outputs["logp"].detach().flatten(), {name: x.detach() for name, x in leaves.items()}
        loss = self.row_losses(outputs | leaves, inputs, seed)
        grads = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        return loss.detach(), dict(zip(leaves, grads))


# ---- An objective from text ------------------------------------------------------------------------------------------


def parse_objective(text: str) -> Objective:
    """'simpo(beta=2.5)', 'simpo', a sum such as '0.8*dpo(beta=0.1) + 0.2*bco_pair + sft', and in place of each name that of
    a function in one's own file, 'mine.py:mine(beta=2.0)'. Only names, constants, + and * are understood; nothing is run but
    a file that is named. Raises ValueError that says what is wrong."""
    pieces = re.split(r"([\s()*+]+)", text.strip())
    quoted = "".join(repr(piece) if ".py:" in piece else piece for piece in pieces)
    try:
        calls = parse_terms(ast.parse(quoted, mode="eval").body)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        why = f" ({error.msg.partition(';')[0]})" if isinstance(error, SyntaxError) else ""
        how = 'write it as a call with named constants, "simpo(beta=2.5, gamma=0.5)", or as a sum of such, "dpo + 0.5*sft"'
        raise ValueError(f"objective is {text[:80]!r}{why}; {how}") from None
    objective = Objective([named_term(*call) for call in calls])
    unpaired = [term.name for term in objective.terms if "desirable" in term.loss.tensors]
    paired = [term.name for term in objective.terms if "desirable" not in term.loss.tensors]
    if unpaired and paired:
        kinds = f"{', '.join(unpaired)} takes single completions, {', '.join(paired)} pairs"
        raise ValueError(f"objective: {kinds}; a sum takes one or the other")
    return objective


def parse_terms(node: ast.expr, weight: float = 1.0) -> list[tuple[float, str, dict]]:
    """'2*a(x=1) + b' → weight, name and settings of each term. ValueError, or SyntaxError with a reason, for anything but
    sums, products with a number, and calls with named constants."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return parse_terms(node.left, weight) + parse_terms(node.right, weight)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        number, rest = node.left, node.right
        if not isinstance(number, ast.Constant) or isinstance(number.value, str):
            number, rest = node.right, node.left
        factor = ast.literal_eval(number)
        if type(factor) not in (int, float) or not 0 < factor < 1e300 or not 0 < weight * factor < 1e300:
            raise SyntaxError("a weight is a finite number above 0")
        return parse_terms(rest, weight * factor)
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    name = getattr(call.func, "id", None) or getattr(call.func, "value", None)  # of a name, or of a quoted file.py:function
    if not isinstance(name, str) or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    if len(given) < len(call.keywords):
        raise SyntaxError("an argument is there twice")
    return [(weight, name, given)]


def named_term(weight: float, name: str, given: dict) -> Term:
    """The function of that name with settings that it has, of the right kind."""
    loss = load_loss(name) if ".py:" in name else OBJECTIVES.get(name)
    if loss is None:
        raise ValueError(f"unknown objective {name[:80]!r}{did_you_mean(name, OBJECTIVES)}; known are {', '.join(OBJECTIVES)}")
    signature = f"its signature is {name}({', '.join(f'{key}={value!r}' for key, value in loss.settings.items())})"
    for key, value in given.items():
        if key not in loss.settings:
            raise ValueError(f"objective {name} has no argument {key[:80]!r}{did_you_mean(key, loss.settings)}; {signature}")
        default = loss.settings[key]
        if isinstance(default, (bool, str)):
            fits = isinstance(value, type(default))
        else:
            fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
        of_this_batch = value is None and key == loss.coupled
        if not fits and not of_this_batch and value is not default:
            raise ValueError(f"objective {name}: {key}={str(value)[:80]} is of the wrong kind or size; {signature}")
    return Term(weight, name, loss, given)


def load_loss(name: str) -> Callable[..., Tensor]:
    """The objective "file.py:function" of a user's own file, which is run; ValueError that says what is wrong with it."""
    file, _, function = name.rpartition(":")
    here = dict(OBJECTIVES)
    try:
        defined = runpy.run_path(os.path.expanduser(file))
    except OSError as error:
        raise ValueError(f"objective {name}: {file} cannot be read ({error.strerror})") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"objective {name}: {file} cannot be run ({described(error)})") from error
    finally:
        OBJECTIVES.clear()
        OBJECTIVES.update(here)  # a name of this file keeps its meaning
    registered = {key: value for key, value in defined.items() if hasattr(value, "tensors")}
    if function not in registered:
        guess = did_you_mean(function, registered)
        how = "`from losses import average_logp, objective` and write @objective(reward=average_logp) above it"
        raise ValueError(f"objective {name}: {function} is not registered in {file}{guess}; {how}")
    loss = registered[function]
    for tensor_name in loss.tensors:
        if not any(tensor_name in other.tensors for other in here.values()):
            raise ValueError(f"objective {name}: no trainer has `{tensor_name}`; losses.py begins with the names there are")
    return loss


def try_objective(objective: Objective) -> None:
    """Call it once on small numbers, so that a value out of range, or a mistake in a function of one's own, is found before
    anything is loaded; ValueError that says which."""
    tensors = dict.fromkeys(objective.tensors, tensor([-3.0, -4.0])) | {"desirable": tensor([True, False])}
    tensors |= {name: tensor([4, 5]) for name in ("len_w", "len_l")}
    for term in objective.terms:
        try:
            loss = Objective([term])(tensors, seed=[0])
        except Exception as error:
            why = error if isinstance(error, ValueError) else described(error)
            raise ValueError(f"objective {objective}: {why}") from error
        if not isinstance(loss, Tensor) or loss.shape != (2,):
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"objective {objective}: {term.name} returns {got}; return one loss per row, shape (B,)")


def described(error: BaseException) -> str:
    """NameError: name 'x' is not defined, line 3 of mine.py"""
    if isinstance(error, SyntaxError):  # says where by itself
        return f"{type(error).__name__}: {error}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error}, line {frame.lineno} of {Path(frame.filename).name}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean simpo?" where a known name is close to the word, else ""."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word[:80].lower(), by_lower, 1)
    return f"; did you mean {by_lower[near[0]]}?" if near else ""


# ---- python losses.py: the list. python losses.py simpo: a function to paste -----------------------------------------


def listing() -> str:
    """Each objective in four lines: its name, what it does, what it needs besides log-probs, its settings with defaults."""
    lines = []
    for name, loss in OBJECTIVES.items():
        needs = [tensor_name for tensor_name in loss.tensors if tensor_name not in ("logp_w", "logp_l", "logp")]
        if loss.coupled:
            needs.append("the whole batch" if loss.coupled is True else f"the whole batch (see {loss.coupled})")
        settings = [f"{key}={value!r}" for key, value in loss.settings.items()]
        about = loss.__doc__.splitlines()[0]
        lines += [name, f"    {about}", f"    needs {', '.join(needs) or 'log-probs only'}"]
        lines += [f"    settings {', '.join(settings) or '–'}"]
    return "\n".join(lines)


def source_of(names: list[str]) -> str:
    """A program of their own for objectives: the imports and functions that they use, and they, without the decorator."""
    text = Path(__file__).read_text(encoding="utf-8")
    defined = {}  # name → the statement of this file that gives it its meaning
    for statement in ast.parse(text).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            defined |= {alias.asname or alias.name: statement for alias in statement.names}
        elif isinstance(statement, ast.FunctionDef):
            statement.decorator_list = []
            defined[statement.name] = statement
    used = set()
    names = list(names)
    while names:
        statement = defined.get(names.pop())
        if statement is not None and statement not in used:
            used.add(statement)
            names += [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]
    source = ""
    for statement in sorted(used, key=lambda statement: statement.lineno):
        if isinstance(statement, ast.FunctionDef):
            source += "\n\n"
        source += ast.get_source_segment(text, statement).replace("  # fmt: skip", "") + "\n"
    return source


def main() -> None:
    parser = argparse.ArgumentParser(description="List the objectives; or print those named, ready to be pasted.")
    parser.add_argument("name", nargs="*")
    names = parser.parse_args().name
    for name in names:
        if name not in OBJECTIVES:
            parser.error(f"unknown objective {name!r}{did_you_mean(name, OBJECTIVES)} (without a name, all are listed)")
    sys.stdout.reconfigure(errors="replace")  # where a terminal lacks these letters
    try:
        print(source_of(names) if names else listing(), flush=True)
    except BrokenPipeError:  # a reader that has seen enough is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
