"""The pictures of the README that need no training run, and a table of the objectives on one worked pair.

    python tests/studies/pictures.py pair [PICTURE.png]           a pair of the toy task as one packed sequence, and its mask
    python tests/studies/pictures.py objectives [PICTURE.png]     loss and gradient of the objectives against the margin
    python tests/studies/pictures.py --table                      both at the pair that the examples of losses.py share

The pictures need matplotlib.
"""

import argparse
import io
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from logprobs import PrefixSharedPairs  # noqa: E402
from losses import OBJECTIVES  # noqa: E402


def write(figure, path: str) -> None:
    """As a PNG of 64 colours, which takes a third of the bytes."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)


# ---- one pair, packed ------------------------------------------------------------------------------------------------

PAIR = 692  # row of the toy task's pairs.jsonl: short, and its responses differ in length
COLOURS = {"prompt": "#d5d9de", "chosen": "#8ec9e8", "rejected": "#f7bd85", "padding": "#ffffff"}


def attention(pairs: list[tuple[int, list[int]]]) -> Tensor:
    """(T, T) bool: which tokens have weight where the trainer's attention runs on equal logits. Row: who looks."""
    tokens = sum(prompt + sum(responses) for prompt, responses in pairs)
    equal = torch.zeros(1, 1, tokens, tokens)
    weights = PrefixSharedPairs(pairs).attend(equal, equal, torch.eye(tokens)[None, None], 1.0, None, None)
    return weights[0, 0] > 0


def pair(path: str) -> None:
    """Draw a pair's packed sequence: what each position predicts above it, what it sees below it, the padded batch beside."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests/toy/model")
    example = data.load(str(ROOT / "tests/toy/pairs.jsonl"), tokenizer, data.Reading())[0][PAIR]
    packed, padded = data.packed_batch([example]), data.padded_batch([example])
    words = tokenizer.convert_ids_to_tokens(packed.input_ids[0])
    targets = tokenizer.convert_ids_to_tokens(packed.targets)
    prompt, (chosen, rejected) = len(example.prompt), packed.lengths.tolist()
    parts = ["prompt"] * prompt + ["chosen"] * chosen + ["rejected"] * rejected

    figure = Figure(figsize=(7.5, 6.7))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(-5.8, 30.1), ylim=(28.4, -3.4), aspect="equal")
    axis.set_axis_off()

    def note(x: float, y: float, text: str, align: str = "center", rotation: int = 0) -> None:
        axis.text(x, y, text, ha=align, va="center", rotation=rotation, fontsize=9.5)

    def cell(x: float, y: float, part: str, word: str = "", width: float = 1, height: float = 1) -> None:
        axis.add_patch(Rectangle((x, y), width, height, facecolor=COLOURS[part], edgecolor="0.45", linewidth=0.6))
        note(x + width / 2, y + height / 2, word, rotation=90)

    note(-0.3, -0.3, "scored: the next\nresponse token", "right")
    for at, word, response in zip(packed.index.tolist(), targets, packed.response.tolist()):
        cell(at, -0.2 if response else -3, ("chosen", "rejected")[response], word, height=2.7)
    note(-0.3, 5.2, f"packed:\n{len(words)} tokens", "right")
    note(-0.3, 8.1, "positions", "right")
    for at, (word, part, position) in enumerate(zip(words, parts, packed.position_ids[0].tolist())):
        cell(at, 3, part, word, height=4.4)
        note(at + 0.5, 8.1, str(position))
        note(-0.3, 9.5 + at, word, "right")
    for looks, at in attention(packed.pairs).nonzero().tolist():
        cell(at, 9 + looks, parts[at])
    axis.add_patch(Rectangle((0, 9), len(words), len(words), fill=False, edgecolor="0.45", linewidth=0.6))
    note(len(words) - 0.4, 10.8, "a row for each token:\nwhat it attends to", "right")
    for part in ("prompt", "chosen", "rejected"):
        note(parts.index(part) + parts.count(part) / 2, 9.7 + len(words), part)

    rows, width = padded.input_ids.shape
    for row, part in enumerate(("chosen", "rejected")):
        row_parts = ["prompt"] * prompt + [part] * parts.count(part)
        for at, word in enumerate(tokenizer.convert_ids_to_tokens(padded.input_ids[row])):
            word_part = row_parts[at] if at < len(row_parts) else "padding"
            cell(19 + 0.77 * at, 14 + 5 * row, word_part, word if at < len(row_parts) else "padding", 0.77, 4.4)
    note(19, 12.7, f"padded: {rows} × {width} = {rows * width} tokens", "left")
    write(figure, path)


# ---- the objectives --------------------------------------------------------------------------------------------------

# Panel → what looks odd in it; its curves, each an objective and its settings.
FAMILIES = {
    "logistic, of the log-ratio margin": (
        "focal lowers margins below −0.54, discopop (defaults) those near 0; with ε, dpo and exo turn back at 2.2.",
        "dpo β=1, dpo β=1 ε=0.1, robust_dpo β=1 ε=0.1, exo β=1 ε=0.1, focal β=1 γ=1, discopop β=0.05 τ=0.05"),
    "each response against the reference": (
        "dpop's kink: left of 0 the chosen response became less likely. apo_down never pushes it up, nca up to 1.4.",
        "nca β=1, bco_pair β=1, apo_zero β=1, apo_down β=1, dpop β=1 λ=1, dpo_shift β=1 λ=0.5"),
    "towards a target": (
        "Beyond the target (rpo: 2, as scored) they push back; rso_hinge only stops. rpo_fwd gives up on wrong pairs.",
        "ipo τ=0.5, sppo β=0.5, sppo_soft β=0.5, rpo_sq β=1, rpo_bwd β=1, rpo_fwd β=1, rso_hinge β=1"),
    "other divergences": (
        "The divergence decides how hard a wrong pair's chosen response is pushed: forward KL most, js least.",
        "f_dpo β=1 f=reverse_kl, f_dpo β=1 f=forward_kl, f_dpo β=1 f=js, f_dpo β=1 f=alpha"),
    "without a reference": (
        "repo stops at γ. simper takes probabilities, not logarithms: a loss below 0, and a push that grows.",
        "simpo β=1 γ=1, repo γ=1, alphapo β=1 γ=1, simper"),
    "without a reference, plus a likelihood": (
        "The likelihood term pushes on where margins are wide. Kinks: the hinges end, slic's at δ, rrhf's at 0.",
        "cpo β=1 λ=1, orpo λ=1, slic δ=1 λ=0.1, rrhf λ=1"),
    "a margin or weight for each pair": (
        "online_simpo's weight grows with the margin, so does its loss. amapo jumps at the batch's mean margin, here 0.",
        "alpha_dpo β=1 γ=1, gamma_simpo β=1 γ=1 τ=0.5, amapo β=1, online_simpo β=1 γ=1, odpo β=1"),
    "unpaired": (
        "Label 1 is desirable, 0 is not. kto gives up on what is badly wrong, bco pushes it hardest.",
        "kto β=1 label=1, kto β=1 label=0, bco β=1 label=1, bco β=1 label=0"),
}  # fmt: skip
LETTERS = {"β": "beta", "γ": "gamma", "δ": "delta", "ε": "label_smoothing", "λ": "lam", "τ": "tau"}
LETTERS |= {"f": "divergence", "label": "desirable"}


def settings_of(words: list[str]) -> dict[str, float | str]:
    """["β=1", "f=js"] → {"beta": 1.0, "divergence": "js"}."""
    settings = {}
    for letter, value in (word.split("=") for word in words):
        settings[LETTERS[letter]] = value if letter == "f" else float(value)
    return settings


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


def objectives(path: str) -> None:
    """Draw the loss (above) and the push on the chosen response, −∂L/∂s_w (below), against the margin, family by family."""
    from matplotlib.figure import Figure

    margin = torch.linspace(-3.5, 3.5, 281)
    figure = Figure(figsize=(8.2, 16), layout="constrained")
    for part, (title, (odd, members)) in zip(figure.subfigures(4, 2).flat, FAMILIES.items()):
        above, below = part.subplots(2, 1, sharex=True)
        for member in members.split(", "):
            name, *words = member.split()
            values, push = curve(OBJECTIVES[name], margin, **settings_of(words))
            above.plot(margin, values, label=member)
            below.plot(margin, push)
        part.suptitle(title, fontsize=11, weight="bold")
        above.set_title(textwrap.fill(odd, 56), fontsize=8.5, loc="left")
        above.set(ylim=(-1, 4.2), ylabel="loss")
        below.set(ylim=(-1.2, 2.2), ylabel="push, per nat")
        below.set_xlabel("log-ratio u, nats" if title == "unpaired" else "margin, nats")
        part.legend(fontsize=8.5, frameon=False, loc="outside lower center", ncols=2, handlelength=1.2, columnspacing=1)
        for axis in (above, below):
            axis.grid(color="0.9")
    write(figure, path)


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
    parser.add_argument("what", nargs="?", choices=["pair", "objectives"])
    parser.add_argument("picture", nargs="?", help="file to write; without it .github/pair.png or .github/objectives.png")
    parser.add_argument("--table", action="store_true", help="print the table instead")
    args = parser.parse_args(argv)
    if args.table:
        width = min(128, max(80, shutil.get_terminal_size((128, 24)).columns))
        print(textwrap.fill(ABOUT, width), table(width), sep="\n\n")
        return
    if args.what is None:
        parser.error("say pair, objectives, or --table")
    picture = args.picture or f".github/{args.what}.png"
    try:
        {"pair": pair, "objectives": objectives}[args.what](picture)
    except ImportError:
        sys.exit("The pictures need matplotlib: pip install matplotlib")
    print(picture)


if __name__ == "__main__":
    main()
