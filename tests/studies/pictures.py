"""The pictures of the README that need no training run.

    python tests/studies/pictures.py objectives [PICTURE.png]     loss and gradient of the objectives against the margin

Needs matplotlib.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from losses import OBJECTIVES  # noqa: E402

BETA = {"beta": 1.0}
# Panel → its curves: an objective and its settings.
FAMILIES = {
    "log-ratio, logistic": [
        ("dpo", BETA), ("dpo", BETA | {"label_smoothing": 0.1}), ("robust_dpo", BETA | {"label_smoothing": 0.1}),
        ("exo", BETA | {"label_smoothing": 0.1}), ("nca", BETA), ("discopop", BETA | {"tau": 0.5}),
        ("focal", BETA | {"gamma": 1.0}),
    ],
    "log-ratio, other": [
        ("ipo", {"tau": 0.5}), ("sppo", {"beta": 0.5}), ("rso_hinge", BETA), ("apo_zero", BETA), ("apo_down", BETA),
        ("rpo_bwd", BETA), ("rpo_fwd", BETA),
    ],
    "divergence (f_dpo)": [
        ("f_dpo", BETA | {"divergence": kind}) for kind in ("reverse_kl", "forward_kl", "js", "alpha")
    ],
    "no reference": [
        ("simpo", BETA), ("repo", {"gamma": 1.0}), ("alphapo", BETA | {"gamma": 1.0}),
        ("cpo", BETA), ("orpo", {"lam": 1.0}), ("simper", {}),
        ("slic", {}), ("rrhf", {}),
    ],
    "own margins": [
        ("simpo", BETA), ("alpha_dpo", BETA | {"gamma": 1.0}), ("gamma_simpo", BETA | {"gamma": 1.0, "tau": 0.5}),
        ("amapo", BETA), ("online_simpo", BETA), ("odpo", BETA),
    ],
    "unpaired": [(name, BETA | {"desirable": label}) for name in ("kto", "bco") for label in (True, False)],
}  # fmt: skip
LETTERS = {"label_smoothing": "ε", "tau": "τ", "gamma": "γ", "lam": "λ"}


def curve(loss: Callable[..., Tensor], margin: Tensor, **settings) -> tuple[Tensor, Tensor]:
    """Loss and −∂L/∂s_w along the margin, one token per response: a_w, a_l = −2 ± margin/2, the reference at −2.

    The drawn margins are the batch of a batch-coupled objective; the chosen response was scored 2 higher. Unpaired: `margin`
    is the log-ratio of one completion, `desirable=` its label.
    """
    level, ones = torch.full_like(margin, -2.0), torch.ones_like(margin)
    chosen, rejected = (level + margin / 2).requires_grad_(), level - margin / 2
    if "logp" in loss.tensors:
        chosen = (level + margin).requires_grad_()
    inputs = {"logp": chosen, "logp_w": chosen, "logp_l": rejected, "old_w": chosen, "old_l": rejected}
    inputs |= {"len_w": ones, "len_l": ones, "margin": 2 * ones}
    inputs["desirable"] = torch.full_like(margin, settings.pop("desirable", True)).bool()
    values = loss(*(inputs.get(name, level) for name in loss.tensors), **settings)
    (slope,) = torch.autograd.grad(values.sum(), chosen)
    return values.detach(), -slope


def label(name: str, settings: dict) -> str:
    """dpo ε=0.1, f_dpo js, kto undesirable."""
    words = [f"{LETTERS[k]}={v}" if k in LETTERS else str(v) for k, v in settings.items() if k not in ("beta", "desirable")]
    if "desirable" in settings:
        words.append("desirable" if settings["desirable"] else "undesirable")
    return " ".join([name, *words])


def objectives(path: str) -> None:
    """Draw loss (above) and gradient weight (below) against the margin, family by family, mostly at β = 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    margin = torch.linspace(-3.5, 3.5, 281)
    figure, axes = plt.subplots(4, 3, figsize=(12, 13.5), layout="constrained", height_ratios=(1, 0.9, 1, 0.9))
    for i, (title, members) in enumerate(FAMILIES.items()):
        above, below = axes[2 * (i // 3) : 2 * (i // 3) + 2, i % 3]
        for name, settings in members:
            values, push = curve(OBJECTIVES[name], margin, **settings)
            above.plot(margin, values)
            below.plot(margin, push, label=label(name, settings))
        above.set(title=title, ylim=(-1.2, 5.2), ylabel="" if i % 3 else "loss")
        below.set(ylim=(-1.3, 2.6), ylabel="" if i % 3 else "push on s_w:  −∂L/∂s_w")
        below.set_xlabel("log-ratio u" if title == "unpaired" else "margin")
        below.legend(fontsize=8.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        for axis in (above, below):
            axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
            axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["objectives"])
    parser.add_argument("picture", nargs="?", default=".github/objectives.png")
    args = parser.parse_args(argv)
    try:
        objectives(args.picture)
    except ImportError:
        sys.exit("The pictures need matplotlib: pip install matplotlib")
    print(args.picture)


if __name__ == "__main__":
    main()
