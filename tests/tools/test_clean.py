"""What is dropped, by hand; rows that stay are written as they stand."""

import json

import pytest
from clean import Cleaning, clean, main

from data import UserError

PAIR = {"prompt": "Ask me", "chosen": "Good", "rejected": "Bad"}
ROWS = [
    PAIR,
    {**PAIR, "id": 1},  # the same again
    {"prompt": "Ask me", "chosen": "Bad", "rejected": "Good"},  # the opposite of both
    {"prompt": "Ask me", "chosen": "Good", "rejected": "Good"},
    {"prompt": "Ask him", "chosen": "Bad", "rejected": "Good"},  # another prompt: no conflict
    {"prompt": "Ask her", "chosen": "", "rejected": "Good"},  # no valid row
]


@pytest.fixture
def cleaned(tmp_path):
    """A function of rows and switches: (numbers of the rows that stay, why the others were dropped)."""

    def run(rows, **switches):
        source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        out.unlink(missing_ok=True)
        dropped = clean(Cleaning(str(source), str(out), **switches))
        kept = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert [row for row in rows if row in kept] == kept  # as they stand, in their order
        return [rows.index(row) + 1 for row in kept], dict(dropped)

    return run


@pytest.mark.parametrize("switches, kept", [
    ({}, [1, 2, 3, 4, 5]), ({"duplicates": True}, [1, 3, 4, 5]), ({"identical": True}, [1, 2, 3, 5]),
    ({"conflicts": True}, [4, 5]), ({"duplicates": True, "identical": True, "conflicts": True}, [5]),
])  # fmt: skip
def test_each_switch_by_hand(cleaned, switches, kept):
    assert cleaned(ROWS, **switches)[0] == kept


def test_every_dropped_row_is_counted_once_by_its_first_reason(cleaned):
    _, dropped = cleaned(ROWS, duplicates=True, identical=True, conflicts=True)
    assert dropped == {"chosen is empty": 1, "duplicates": 1, "identical responses": 1, "conflicts": 2}


def test_rows_with_a_label(cleaned):
    row = {"prompt": "Ask me", "completion": "Good", "label": True}
    rows = [row, {**row, "id": 1}, {**row, "label": False}, {**row, "completion": "Bad", "label": False}]
    assert cleaned(rows, duplicates=True)[0] == [1, 3, 4]
    assert cleaned(rows, conflicts=True)[0] == [4]


def test_minimum_margin(cleaned):
    rows = [{**PAIR, "score_chosen": c, "score_rejected": 1} for c in (1, 1.5, 2, None)]
    assert cleaned(rows, min_margin=0.5) == ([2, 3, 4], {"score margin below 0.5": 1})  # a row without scores stays
    with pytest.raises(UserError, match="min_margin needs scores, and no row has any"):
        cleaned([PAIR], min_margin=0.5)


def test_all_texts_and_columns_stay_as_they_are(tmp_path, capsys):
    rows = [{"question": "ünï — 日\n", "good": "a\u2028b", "bad": "\t", "more": {"a": [1, None, 2.5]}}]
    rows.append({**rows[0], "bad": "c"})
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(lines) + "{half a line\n", encoding="utf-8")
    columns = "prompt=question,chosen=good,rejected=bad"
    main([str(tmp_path / "a.jsonl"), str(tmp_path / "out.jsonl"), "--columns", columns])
    assert (tmp_path / "out.jsonl").read_bytes() == lines[1].encode()
    said = capsys.readouterr().out
    assert (
        f"1 of 3 rows in {tmp_path}/out.jsonl" in said and "dropped 1: rejected is empty" in said and "not valid JSON" in said
    )


def test_what_is_refused(tmp_path, capsys):
    source, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({**PAIR, "rejected": "Good"}) + "\n")
    for argv, said in (
        ([source, source], "is there already; choose another file"),
        ([f"{source}@2", out], "a weight (@)"),
        ([source, out, "--identical"], "no row is left: 1 identical responses"),
        ([tmp_path / "b.jsonl", out], "b.jsonl: no such file"),
        ([source, tmp_path / "none" / "out.jsonl"], "none/out.jsonl.new: No such file or directory"),
        ([source, out, "--duplicate"], "did you mean duplicates?"),
        ([source], "out"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in argv])
        assert stop.value.code == 2 and said in capsys.readouterr().err
    assert not out.exists()
