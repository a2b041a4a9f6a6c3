"""Drop rows before a training: duplicates, pairs of two equal responses, contradictions, pairs whose scores are close.

    python tests/tools/clean.py pairs.jsonl clean.jsonl --duplicates --identical --conflicts --min-margin 0.5

IN is any source that train.py reads, several with commas; OUT is JSON lines, the rows as they stand, in their order. What is
no valid row in any format is dropped as well. `python data.py stats` counts beforehand what there is.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import MISSING, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data  # noqa: E402
from data import Row, UserError, setting  # noqa: E402


@dataclass
class Cleaning:
    """What to drop."""

    source: str = setting(MISSING, "sources of rows: files, folders, patterns, hub names, with commas between")
    out: str = setting(MISSING, "JSON lines to write")
    duplicates: bool = setting(False, "keep only the first of rows with the same texts")
    identical: bool = setting(False, "drop pairs whose responses are the same")
    conflicts: bool = setting(False, "drop rows that say the opposite of another row, both")
    min_margin: float = setting(0.0, "drop pairs whose scores differ by less; those without scores stay")
    format: str = setting("auto", "of the rows: auto (by the columns of the first), or a name, as for train.py")
    columns: str = setting("", "columns to rename while reading, new=old: prompt=question,chosen=good")


def clean(c: Cleaning) -> Counter:
    """Write the rows that stay; returns why the others were dropped, and how many."""
    if os.path.exists(c.out):
        raise UserError(f"{c.out}: is there already; choose another file, or delete it")
    rows, dropped = valid_rows(c)
    reasons = {}  # number of a row → the first reason to drop it
    if c.duplicates:
        reasons = dict.fromkeys(repeated(rows), "duplicates")
    for i in identical(rows) if c.identical else ():
        reasons.setdefault(i, "identical responses")
    for i in contradicted(rows) if c.conflicts else ():
        reasons.setdefault(i, "conflicts")
    for i in close(rows, c) if c.min_margin > 0 else ():
        reasons.setdefault(i, f"score margin below {c.min_margin:g}")
    dropped.update(reasons.values())
    kept = [raw for i, (raw, _) in enumerate(rows) if i not in reasons]
    if not kept:
        raise UserError(f"{c.source}: no row is left: {', '.join(f'{n} {reason}' for reason, n in dropped.most_common(5))}")
    part = Path(f"{c.out}.new")  # a killed run leaves no half of a file under the name that was asked for
    # a lone surrogate becomes its escape, which is JSON again; what JSON has no form for, such as a date, its text
    with open(part, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(raw, ensure_ascii=False, default=str) + "\n" for raw in kept)
    os.replace(part, c.out)
    print(f"{len(kept):,} of {len(kept) + dropped.total():,} rows in {c.out}")
    for reason, n in dropped.most_common():
        print(f"  dropped {n:,}: {reason}")
    return dropped


def valid_rows(c: Cleaning) -> tuple[list[tuple[dict, Row]], Counter]:
    """([(columns as they stand, what they mean)], why the others are dropped) of all sources."""
    renamed = data._renamed(c.columns)
    rows, dropped = [], Counter()
    for source, weight in data._sources(c.source):
        if weight != 1:
            raise UserError(f"{c.source}: a weight (@) says how often to train on a row; here it has no meaning")
        reader, _ = data.reader_of(source, data._rows(source), renamed, c.format)
        for _, raw in data.read(source):
            try:
                rows.append((raw, data.row_of(raw, reader, renamed)))
            except UserError as error:
                dropped[str(error)] += 1
    return rows, dropped


def said(row: Row) -> tuple:
    """Equal where two rows say the same."""
    return json.dumps([row.prompt, row.template]), tuple(map(json.dumps, row.responses)), row.desirable


def repeated(rows: list[tuple[dict, Row]]) -> list[int]:
    """Those that say the same as an earlier one."""
    seen, found = set(), []
    for i, (_, row) in enumerate(rows):
        if said(row) in seen:
            found.append(i)
        seen.add(said(row))
    return found


def identical(rows: list[tuple[dict, Row]]) -> list[int]:
    """Pairs of a response with itself."""
    return [i for i, (_, row) in enumerate(rows) if row.desirable is None and row.responses[0] == row.responses[1]]


def contradicted(rows: list[tuple[dict, Row]]) -> list[int]:
    """Those of which another one says the opposite: the pair the other way round, or the other label."""
    everything = {said(row) for _, row in rows}
    found = []
    for i, (_, row) in enumerate(rows):
        label = None if row.desirable is None else not row.desirable
        opposite = said(row._replace(responses=row.responses[::-1], desirable=label))
        if opposite != said(row) and opposite in everything:
            found.append(i)
    return found


def close(rows: list[tuple[dict, Row]], c: Cleaning) -> list[int]:
    """Those whose scores differ by too little; UserError where no row has any."""
    margins = [row.margin for _, row in rows]
    if all(margin is None for margin in margins):
        raise UserError(f"{c.source}: min_margin needs scores, and no row has any")
    return [i for i, margin in enumerate(margins) if margin is not None and margin < c.min_margin]


def main(argv: list[str] | None = None) -> Counter:
    return data.command_line(lambda argv: clean(data.parse(Cleaning, argv, "tests/tools/clean.py", __doc__)), argv)


if __name__ == "__main__":
    main()
