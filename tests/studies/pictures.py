"""The pictures of the README that need no training run, and a table of the objectives on one worked pair.

    python tests/studies/pictures.py objectives [PICTURE.png]     loss and gradient of the objectives against the margin
    python tests/studies/pictures.py --table                      both at the pair that the examples of losses.py share

The pictures need matplotlib.
"""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, tensor

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


# ---- the table ---------------------------------------------------------------------------------------------------------

# Two pairs, chosen and rejected; the second has no margin, so that batch statistics are not empty.
PAIRS = {
    "logp_w": [-12.0, -20.0], "logp_l": [-24.0, -20.0], "ref_w": [-14.0, -20.0], "ref_l": [-22.0, -20.0],
    "len_w": [10, 10], "len_l": [12, 10], "kl_w": [0.5, 0.0], "kl_l": [1.5, 0.0],
    "old_w": [-13.5, -20.0], "old_l": [-22.5, -20.0], "margin": [2.0, 1.0],
    "prefix_logp_w": [-12.0, -20.0], "prefix_logp_l": [-20.0, -20.0],
    "ref_prefix_logp_w": [-14.0, -20.0], "ref_prefix_logp_l": [-19.0, -20.0],
}  # fmt: skip
# The first pair as two rows, and two KL completions.
ROWS = {"logp": [-12.0, -24.0], "ref": [-14.0, -22.0], "logp_kl": [-30.0, -28.0], "ref_kl": [-31.0, -29.0]}


def table(width: int = 128) -> str:
    """One line per objective: what it asks for, loss and gradient of the first worked row, settings with defaults.

    width: of the lines, in characters; at least 80.
    """
    head = f"{'objective':<13} {'needs':<19} {'loss':>11} {'gradient':>8}  settings with defaults"
    lines = [head, "─" * width]
    for name, loss in OBJECTIVES.items():
        inputs = {k: tensor([True, False]) if k == "desirable" else tensor((PAIRS | ROWS)[k]) for k in loss.tensors}
        draw = {"generator": torch.Generator().manual_seed(1)} if loss.random else {}
        policy = inputs[loss.tensors[0]].requires_grad_()
        values = loss(**inputs, **draw)
        (slope,) = torch.autograd.grad(values.sum(), policy)
        kinds = {k.partition("_")[0] for k in loss.tensors}
        needs = [kind for kind in ("ref", "kl", "prefix", "old", "len", "margin") if kind in kinds]
        needs += ["rows"] * ("desirable" in kinds) + {True: ["batch"], False: []}.get(loss.coupled, ["(batch)"])
        settings = textwrap.wrap(
            " ".join(f"{k}={v}" for k, v in loss.settings.items()) or "–", width - 56, break_long_words=False
        )
        start = f"{f'{name:<13} ' + (' '.join(needs) or '–'):<33} {values[0].item():>11.4f} {slope[0].item() + 0.0:>8.4f}  "
        lines += [start + settings[0]] + [" " * len(start) + line for line in settings[1:]]
    return "\n".join(lines)


ABOUT = (
    "Worked pair: s_w = −12 over 10 tokens, s_l = −24 over 12, reference −14 and −22, KL 0.5 and 1.5, earlier policy −13.5 "
    "and −22.5, scores 2 apart. Losses that need the batch see a second pair, of no margin (−20 over 10 tokens, KL 0). "
    "Rows: this pair as two rows, log-ratio of the KL completions 1. Loss of row 1; gradient ∂L/∂s_w, ∂L/∂s of the sum. "
    "(batch): under one setting only."
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["objectives"])
    parser.add_argument("picture", nargs="?", default=".github/objectives.png")
    parser.add_argument("--table", action="store_true", help="print the table instead")
    args = parser.parse_args(argv)
    if args.table:
        width = min(128, max(80, shutil.get_terminal_size((128, 24)).columns))
        print(textwrap.fill(ABOUT, width), table(width), sep="\n\n")
        return
    if args.what is None:
        parser.error("say objectives, or --table")
    try:
        objectives(args.picture)
    except ImportError:
        sys.exit("The pictures need matplotlib: pip install matplotlib")
    print(args.picture)


if __name__ == "__main__":
    main()
