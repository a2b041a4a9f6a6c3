"""Train every objective for a few steps and print a table: on the toy task, or on a real model and real data.

    python tests/studies/every_objective.py --out runs/every                           # 30 steps each on the toy task
    python tests/studies/every_objective.py --out runs/every-real --steps 5 --model MODEL --pairs PAIRS.jsonl --rows ROWS.jsonl

Pairs are used for paired objectives, rows (labelled completions) for unpaired ones. The same learning rate for all, so this
shows that each one trains and in which direction; it is no comparison of methods. Exit code 1 if anything is not finite.
"""

import argparse
import contextlib
import io
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import data  # noqa: E402
import train  # noqa: E402
from losses import OBJECTIVES  # noqa: E402


def row_of(name: str, summary: dict, lines: list[dict]) -> tuple[str, bool]:
    """A row of the table, and whether every recorded number is finite. Only `sft` has no rewards to compare."""
    losses = [line["loss"] for line in lines if "loss" in line]
    cells = [f"`{name}`", f"{losses[0]:.4f}", f"{losses[-1]:.4f}"]
    for key, form in (("eval_reward_accuracy", ".3f"), ("eval_reward_margin", ".4g")):
        cells += [format(numbers[key], form) if key in numbers else "–" for numbers in (summary["before"], summary["after"])]
    finite = all(math.isfinite(value) for line in lines for value in line.values() if isinstance(value, float))
    return f"| {' | '.join(cells)} |" + ("" if finite else " NOT FINITE"), finite


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--model")
    parser.add_argument("--pairs")
    parser.add_argument("--rows")
    parser.add_argument("--only", nargs="*", default=list(OBJECTIVES))
    args, more = parser.parse_known_args(argv)
    head = ["objective", "first loss", "last loss", "held-out accuracy before", "after", "held-out margin before", "after"]
    table, all_finite = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"], True
    for name in data.progress(args.only, "objectives", "objectives"):
        source, out = [], args.out / name
        if args.model:
            unpaired = train.parse_objective(name).unpaired
            source = ["--model", args.model, "--dataset", args.rows if unpaired and args.rows else args.pairs]
        length = ["--max-steps", str(args.steps), "--samples", "0"]
        noise = io.StringIO()
        try:
            with contextlib.redirect_stderr(noise):
                summary = train.main([*source, "--objective", name, *length, "--out", str(out), *more])
        except SystemExit:
            sys.exit(f"{name}: {noise.getvalue()}")
        row, finite = row_of(name, summary, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
        table.append(row)
        all_finite &= finite
    text = "\n".join(table) + "\n"
    (args.out / "table.md").write_text(text)
    print(text)
    return 0 if all_finite else 1


if __name__ == "__main__":
    sys.exit(main())
