"""Reading, checking, token ids, step plans and batches against texts and numbers written by hand.

Token ids are compared with those that the raw `tokenizers` object gives to a hand-written rendering of the conversation: an
independent path, since data.py goes through the chat template. The miniature tokenizers are in templates.py.
"""

import contextlib
import copy
import functools
import gzip
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import MISSING, dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
import toy
from pyarrow import parquet
from templates import FAMILIES, TERMINATOR, byte_level, family, metaspace
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

import data
from data import Example, Examples, Reading, UserError, encode

SHARED = Path(__file__).parents[2] / "shared" / "data"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def Row(prompt, responses, *labels, **more):
    """A Row whose responses are given as texts."""
    return data.Row(prompt, [assistant(text) if isinstance(text, str) else text for text in responses], *labels, **more)


@pytest.fixture(scope="module")
def chatml():
    return family("smollm2")


def write(folder, name, rows):
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def load(dataset, tokenizer, **how):
    cache = os.environ.get("PLAINPO_CACHE", data.CACHE)  # as a process that begins now has it
    return data.load(dataset, tokenizer, Reading(**{"cache": cache} | how))


PAIR = {"prompt": "Ask me", "chosen": "Good", "rejected": "Bad"}


# ---- formats ---------------------------------------------------------------------------------------------------------

# (columns of a row, the Row that they mean); the right side is written by hand from the format's own documentation
FORMATS = {
    "text": (PAIR, Row([user("Ask me")], ["Good", "Bad"])),
    "messages": (
        {"prompt": [system("Be kind"), user("Ask me")], "chosen": [assistant("Good")], "rejected": [assistant("Bad")]},
        Row([system("Be kind"), user("Ask me")], ["Good", "Bad"]),
    ),
    "mixed": ({**PAIR, "chosen": assistant("Good")}, Row([user("Ask me")], ["Good", "Bad"])),
    "whole conversations beside a prompt": (
        {"prompt": "Ask me", "chosen": [user("Ask me"), assistant("Good")], "rejected": [user("Ask me"), assistant("Bad")]},
        Row([user("Ask me")], ["Good", "Bad"]),
    ),
    "responses of several turns after a prompt of messages": (
        {
            "prompt": [user("Ask me")],
            "chosen": [assistant("Why?"), user("So"), assistant("Good")],
            "rejected": [assistant("Why?"), user("So"), assistant("Bad")],
        },
        Row([user("Ask me"), assistant("Why?"), user("So")], ["Good", "Bad"]),
    ),
    "ultrafeedback binarized": (
        {
            "prompt": "Ask me",
            "prompt_id": "4",
            "chosen": [user("Ask me"), assistant("Good")],
            "rejected": [user("Ask me"), assistant("Bad")],
            "messages": [user("Ask me"), assistant("Good")],
            "score_chosen": 8.5,
            "score_rejected": 6,
        },
        Row([user("Ask me")], ["Good", "Bad"], margin=2.5),
    ),
    "simpo on policy": (
        {
            "prompt_id": "4",
            "prompt": "Ask me",
            "all_generated_responses": ["Fair", "Good", "Bad"],
            "all_rm_scores": [0.5, 0.75, 0.25],
            "chosen": [user("Ask me"), assistant("Good")],
            "rejected": [user("Ask me"), assistant("Bad")],
        },
        Row([user("Ask me")], ["Good", "Bad"], margin=0.5),
    ),
    "simpo before pairing": (
        {"prompt": "Ask me", "all_generated_responses": ["Fair", "Good", "Bad"], "all_rm_scores": [0.5, 0.75, 0.25]},
        Row([user("Ask me")], ["Good", "Bad"], margin=0.5),
    ),
    "scored": (  # of equal scores the first
        {"prompt": "Ask me", "responses": ["Fair", "Good", "Fine", "Bad", "Poor"], "scores": [1, 3, 3, 0, 0]},
        Row([user("Ask me")], ["Good", "Bad"], margin=3.0),
    ),
    "implied text": (  # as trl's: the shared beginning, cut at a space
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        Row([user("The sky is")], ["blue.", "black."]),
    ),
    "sharegpt with tools": (
        {
            "conversations": [
                {"from": "human", "value": "Time?"},
                {"from": "function_call", "value": "clock()"},
                {"from": "observation", "value": "noon"},
            ],
            "chosen": {"from": "gpt", "value": "Good"},
            "rejected": {"from": "gpt", "value": "Bad"},
        },
        Row([user("Time?"), assistant("clock()"), {"role": "tool", "content": "noon"}], ["Good", "Bad"]),
    ),
    "implied prompt": (
        {
            "chosen": [user("Hi"), assistant("Yes"), user("Ask me"), assistant("Good")],
            "rejected": [user("Hi"), assistant("Yes"), user("Ask me"), assistant("Bad")],
        },
        Row([user("Hi"), assistant("Yes"), user("Ask me")], ["Good", "Bad"]),
    ),
    "hh": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Yes\n\nHuman: Ask\nme\n\nAssistant: Good",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Yes\n\nHuman: Ask\nme\n\nAssistant: Bad",
        },
        Row([user("Hi"), assistant("Yes"), user("Ask\nme")], ["Good", "Bad"]),
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "system", "value": "Be kind"}, {"from": "human", "value": "Ask me"}],
            "chosen": {"from": "gpt", "value": "Good"},
            "rejected": {"from": "gpt", "value": "Bad"},
        },
        Row([system("Be kind"), user("Ask me")], ["Good", "Bad"]),
    ),
    "sharegpt with a system column": (
        {
            "system": "Be kind",
            "conversations": [{"from": "user", "value": "Ask me"}],
            "chosen": {"from": "assistant", "value": "Good"},
            "rejected": {"from": "gpt", "value": "Bad"},
        },
        Row([system("Be kind"), user("Ask me")], ["Good", "Bad"]),
    ),
    "a question": (
        {"question": "Ask me", "chosen": "The sky", "rejected": "The sea"},
        Row([user("Ask me")], ["The sky", "The sea"]),
    ),
    "a question after a system text": (  # as Orca's pairs
        {"system": "Be kind", "question": "Ask me", "chosen": "The sky", "rejected": "The sea"},
        Row([system("Be kind"), user("Ask me")], ["The sky", "The sea"]),
    ),
    "an instruction with input": (  # as alpaca's
        {"instruction": "Say it briefly", "input": "Sky is blue", "chosen": "Blue", "rejected": "Sky"},
        Row([user("Say it briefly\n\nSky is blue")], ["Blue", "Sky"]),
    ),
    "an instruction without input": (
        {"instruction": "Ask me", "input": "", "chosen": "The sky", "rejected": "The sea", "system": ""},
        Row([user("Ask me")], ["The sky", "The sea"]),
    ),
    "a query, scored": (
        {"query": [user("Ask me")], "system_prompt": "Be kind", "responses": ["Bad", "Good"], "scores": [1, 2]},
        Row([system("Be kind"), user("Ask me")], ["Good", "Bad"], margin=1.0),
    ),
    "a system text that the prompt begins with": (
        {"prompt": [system("Be kind"), user("Ask me")], "system": "Be kind", "chosen": "Good", "rejected": "Bad"},
        Row([system("Be kind"), user("Ask me")], ["Good", "Bad"]),
    ),
    "a system text beside whole conversations": (
        {"system": "Be kind", "chosen": [user("Ask me"), assistant("Good")], "rejected": [user("Ask me"), assistant("Bad")]},
        Row([system("Be kind"), user("Ask me")], ["Good", "Bad"]),
    ),
    "a system text that whole conversations begin with": (
        {
            "system": "Be kind",
            "prompt": [user("Ask me")],
            "chosen": [system("Be kind"), user("Ask me"), assistant("Good")],
            "rejected": [system("Be kind"), user("Ask me"), assistant("Bad")],
        },
        Row([system("Be kind"), user("Ask me")], ["Good", "Bad"]),
    ),
    "unpaired": ({"prompt": "Ask me", "completion": "Good", "label": True}, Row([user("Ask me")], ["Good"], True)),
    "unpaired after a system text": (
        {"system": "Be kind", "question": "Ask me", "completion": "Good", "label": True},
        Row([system("Be kind"), user("Ask me")], ["Good"], True),
    ),
    "unpaired messages": (
        {"messages": [user("Ask me"), assistant("Bad")], "label": False},
        Row([user("Ask me")], ["Bad"], False),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_format(name):
    row, expected = FORMATS[name]
    reader, _ = data.format_of(row, "here")
    assert reader(row) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_found_again_when_asked_for_by_name(name):
    row, expected = FORMATS[name]
    reader, why = data.format_of(row, "here")
    forced, asked = data.format_of({}, "here", why.split()[1].rstrip(","))
    assert forced is reader and asked.endswith("as asked for")


def test_the_reason_for_a_format_is_reported(tmp_path, chatml):
    path = write(tmp_path, "a.jsonl", [FORMATS["hh"][0]])
    _, report = load(path, chatml)
    why = 'format hh, because there are columns chosen, rejected and chosen is a transcript with "Human:" turns'
    assert report.formats == [f"{path}: {why}"] and why in str(report)
    with pytest.raises(UserError, match="what chosen adds to the prompt is empty"):  # asked for: rows are read as plain texts
        load(write(tmp_path, "b.jsonl", [{"chosen": "Human: a ", "rejected": "Human: a b"}]), chatml, format="implied")
    with pytest.raises(UserError, match="format is 'csv'; accepted are auto, sharegpt, pairs, hh"):
        load(path, chatml, format="csv")
    with pytest.raises(UserError, match=r"did you mean unpaired\?"):
        load(path, chatml, format="unpared")
    for wrong in (dict(seed=-1), dict(max_drop_fraction=2.0), dict(equal_length=math.nan)):
        with pytest.raises(UserError, match=f"^{[*wrong][0]} is "):
            load(path, chatml, **wrong)


def test_the_columns_that_were_taken_are_reported(tmp_path, chatml):
    for columns in (["question"], ["instruction", "input"], ["query"], ["input"], ["conversations"]):
        row = {**dict.fromkeys(columns, "Ask me"), "chosen": "Good day", "rejected": "Good night"}
        _, report = load(write(tmp_path, "a.jsonl", [{"id": "a", **row}]), chatml)
        assert f"because there are columns {', '.join(columns)}, chosen, rejected" in report.formats[0]
    _, report = load(write(tmp_path, "a.jsonl", [{"chosen": "Good day", "rejected": "Good night"}]), chatml)
    assert "format implied, because there are columns chosen, rejected" in report.formats[0]


@pytest.mark.parametrize(
    "more, message",
    [
        ({"question": "Ask me", "instruction": "Be brief"}, "question and instruction could each be the prompt; name one"),
        ({"instruction": "Ask me", "input": 3}, "input is a int, not text"),
        ({"instruction": None, "input": None}, "instruction is missing"),
        ({"instruction": None, "input": "Sky is blue"}, "instruction is missing"),
        ({"question": {}}, "question is neither text nor a non-empty list of messages"),
        ({"question": "Ask me", "system": 3}, "system is a int, not text"),
        ({"question": "Ask me", "system": " "}, "system is empty"),
        ({"prompt": [system("Be kind"), user("Ask me")], "system": "Be brief"}, "begins with another system message than the"),
        ({"system": "Be kind", "system_prompt": "Be brief", "prompt": "Ask me"}, "than the column system_prompt has"),
        (
            {"prompt": [user("a")], "chosen": [user("b"), assistant("c")], "rejected": [user("b"), assistant("d")]},
            "several turns begins with another prompt than the row has",
        ),
    ],
)  # fmt: skip
def test_refused_prompt_columns(more, message):
    with pytest.raises(UserError, match=message):
        data.from_pair({"chosen": "Good", "rejected": "Bad", **more})


def test_messages_spelled_in_a_string_are_not_taken_for_text(tmp_path, chatml):
    """As JSON, as Python's str() of a list, as numpy's: what writing a table of messages as CSV or text makes of them."""
    for messages in (
        [assistant("Good")],
        [{"content": "a {b}", "role": "user"}, assistant("Good")],
        [{"from": "gpt", "value": "a"}],
    ):
        for spelled in (
            json.dumps(messages),
            json.dumps(messages, indent=1),
            str(messages),
            str(messages[0]),
            str(np.array(messages)),
        ):
            for name in ("prompt", "chosen", "rejected"):
                with pytest.raises(UserError, match=f"{name} is a string that spells messages"):
                    data.from_pair({**PAIR, name: spelled})
            for row in ({"messages": spelled, "label": True}, {"prompt": "a", "completion": spelled, "label": True}):
                with pytest.raises(UserError, match="spells messages"):
                    data.format_of(row, "")[0](row)
            with pytest.raises(UserError, match="responses 2 is a string that spells"):
                data.from_scored({"prompt": "a", "responses": ["Good", spelled], "scores": [1, 0]})
    for text in ('[{"name": "Bob", "role": "user"}]', '{"from": "Paris", "to": "Rome"}', '{"value": 3}', '["user"]', "[{"):
        assert data.from_pair({**PAIR, "chosen": text}).responses[0] == assistant(text)  # an answer that is JSON
    path = write(tmp_path, "a.jsonl", [{**PAIR, "chosen": json.dumps([assistant("Good")])}])
    with pytest.raises(UserError, match=r"no valid rows(.|\n)*dropped 1: chosen is a string that spells messages .*json.loads"):
        load(path, chatml)


def test_columns_are_renamed(tmp_path, chatml):
    rows = [
        {"question": "Ask me", "good": "Good", "bad": "Bad", "prompt": "not this one"},
        {"question": "Ask me", "good": "Good"},
    ]
    path = write(tmp_path, "a.jsonl", rows)
    examples, report = load(path, chatml, max_drop_fraction=1, columns="prompt=question, chosen=good,rejected=bad")
    assert examples[0][:2] == encode(Row(ASKED, ["Good", "Bad"]), chatml, 2048, 1792)[0][:2]
    assert report.dropped == {"rejected is missing": 1}
    with pytest.raises(
        UserError, match=r"row 1: --columns names best, but its columns are \['bad', 'good', 'prompt', 'question'\]"
    ):
        load(path, chatml, columns="chosen=best")
    with pytest.raises(UserError, match=r"did you mean question\?"):
        load(path, chatml, columns="prompt=qestion")
    for text in ("chosen", "chosen=", "=a", "a=b=c"):
        with pytest.raises(UserError, match="write new=old with commas between"):
            load(path, chatml, columns=text)


# ---- reading ---------------------------------------------------------------------------------------------------------


def all_rows(dataset):
    return [row for _, row in data.read(str(dataset))]


def test_reads_every_kind_of_file_alike(tmp_path):
    rows = [{**PAIR, "prompt": f"Ask {i} — ünïcode"} for i in range(4)]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    (tmp_path / "bom_crlf.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n\r\n").encode())
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 6
    for file in files:
        assert all_rows(file) == rows, file
    (tmp_path / "notes.txt").write_text("no data")
    (tmp_path / "empty.jsonl").mkdir()  # a folder that looks like a file
    assert all_rows(tmp_path) == rows * 6  # files in the order of their names
    assert [where for where, _ in data.read(str(tmp_path / "a.jsonl"))][1] == f"{tmp_path / 'a.jsonl'} row 2"


def test_slices(tmp_path):
    path = write(tmp_path, "a.jsonl", range(10))
    assert all_rows(f"{path}[1:{10**23}]") == list(range(1, 10)) and all_rows(f"{path}[-{10**23}:{'9' * 5000}]") == [*range(10)]
    assert all_rows(path + "[:3]") == [0, 1, 2]
    assert all_rows(path + "[8:]") == [8, 9]
    assert all_rows(path + "[2:4]") == [2, 3]
    assert all_rows(path + "[-2:]") == [8, 9]
    assert all_rows(path + "[:]") == list(range(10))
    assert [where for where, _ in data.read(path + "[4:5]")] == [f"{path} row 5"]  # rows keep their number in the file


def test_a_broken_line_costs_that_row_only(tmp_path, chatml):
    path = write(tmp_path, "a.jsonl", [PAIR] * 10)
    with open(path, "a") as f:
        f.write('{"prompt": "half a li')
    examples, report = load(path, chatml)
    assert len(examples) == 10 and report.rows == 11 and report.kept == 10
    (reason,) = report.dropped
    assert "not valid JSON" in reason
    assert f"{path} row 11: not valid JSON" in report.first[0]
    assert "dropped 1: not valid JSON" in str(report)


CORRUPT = bytearray(gzip.compress(json.dumps([{**PAIR, "id": i} for i in range(2000)]).encode()))
CORRUPT[2000:2100] = bytes(100)  # not cut short but wrong in the middle

UNREADABLE = {
    "corrupt.json.gz": (bytes(CORRUPT), "cannot be read"),
    "deep.json": (b"[" * 200_000, "cannot be read"),
    "digits.json": (b"[" + b"1" * 5000 + b"]", "cannot be read"),
    "utf16.jsonl": (json.dumps(PAIR).encode("utf-16"), "no valid rows"),
    "gone.jsonl": (None, "no such file"),
    "broken.jsonl.gz": (gzip.compress(json.dumps([PAIR] * 5000).encode()[1:])[:-40], "cannot be read"),
    "no.jsonl.gz": (b'{"a": 1}', "cannot be read"),
    "half.json": (b'[{"prompt": "a"', "cannot be read"),
    "object.json": (b'{"rows": []}', "row 1: unknown shape of dataset: its columns are ['rows']"),
    "pretty.json": (b'{\n  "rows": []\n}', "no valid rows"),
    "text.csv": (b"prompt,chosen", "unknown kind of file"),
    "wrong.parquet": (b"PAR1 no", "cannot be read"),
    "columns.jsonl": (b'{"question": "a", "answer": "b"}', "['answer', 'question']"),
    "empty.jsonl": (b"", "no valid rows"),
    "null.jsonl": (b"null\n", "no valid rows"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_named(name, tmp_path, chatml):
    content, message = UNREADABLE[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load(str(tmp_path / name), chatml)
    assert message in str(error.value) and name in str(error.value)


def test_a_folder_without_data_and_unknown_columns_say_what_is_accepted(tmp_path, chatml):
    with pytest.raises(UserError, match=r"no data file.*\.jsonl"):
        load(str(tmp_path), chatml)
    with pytest.raises(UserError, match=r"row 1.*\['question'\].*pairs \{prompt, chosen, rejected\}"):
        load(write(tmp_path, "a.jsonl", [{"question": "a"}]), chatml)


def test_patterns_and_json_lines_under_another_name(tmp_path):
    write(tmp_path, "a1.jsonl", [1, 2])
    write(tmp_path, "a2.json", [3, 4])
    write(tmp_path, "b.jsonl", [5])
    assert all_rows(tmp_path / "a*.json*") == [1, 2, 3, 4]
    assert all_rows(f"{tmp_path}/**/[ab]*.jsonl[1:]") == [2, 5]
    with pytest.raises(UserError, match="no data file there; looked for .json, "):
        all_rows(tmp_path / "c*.jsonl")


def test_hidden_files_of_a_folder_are_not_data(tmp_path):
    write(tmp_path, "a.jsonl", [1])
    write(tmp_path, ".b.jsonl", [2])
    for folder in (".ipynb_checkpoints", "sub", "sub/.git"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "c.jsonl", [folder])
    assert all_rows(tmp_path) == all_rows(tmp_path / "**") == [1, "sub"]
    assert all_rows(tmp_path / ".b.jsonl") == [2]  # named outright


SPLITS = [  # (files, the split that each says)
    (
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
        "train train test",
    ),
    (["train_sft-00000-of-00001-0a1b.jsonl", "train_prefs-00000-of-00001.jsonl"], "train_sft train_prefs"),
    (["train.jsonl", "validation.jsonl", "more.jsonl.gz"], "train validation train"),
    (["pairs.jsonl", "pairs_dev.jsonl", "contest.jsonl"], "train dev train"),
    (["train/a.jsonl", "Test/a.jsonl"], "train test"),
    (["eval/a.jsonl", "eval/train/a.jsonl"], "eval train"),
]


@pytest.mark.parametrize("files, said", SPLITS)
def test_the_splits_of_a_folder_are_named_and_one_is_read(files, said, tmp_path, chatml):
    folder = tmp_path / "test"  # its own name says nothing
    rows = {file: {**PAIR, "id": file} for file in files}
    for file, row in rows.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        opened = gzip.open if file.endswith(".gz") else open
        with opened(folder / file, "wt") as f:
            f.write(json.dumps(row))
    splits = said.split()
    for place in (str(folder), f"{folder}/**/*.jsonl*"):
        with pytest.raises(UserError, match="files of several splits, which are not trained on together; give one of") as error:
            all_rows(place)
        for split in splits:
            of_it = sorted(file for file, its in zip(files, splits) if its == split)
            assert f"{place}:{split} ({of_it[0]})" in str(error.value)
            assert all_rows(f"{place}:{split}") == [rows[file] for file in of_it]
        with pytest.raises(UserError, match="no split 'other'; give one of"):
            all_rows(f"{place}:other")
    _, report = load(f"{folder}:{splits[1]}[:1]", chatml)
    assert report.rows == 1 and "; read from " in report.formats[0] and str(folder / files[1]) in report.formats[0]
    assert all_rows(folder / files[0]) == [rows[files[0]]]  # named outright


def test_a_folder_of_one_split_is_read_and_its_files_are_named(tmp_path, chatml):
    for i in range(5):
        write(tmp_path, f"test-{i}.jsonl", [PAIR])
    write(tmp_path, "dataset_infos.json", [{"splits": 1}])
    _, report = load(str(tmp_path), chatml)
    first = ", ".join(str(tmp_path / f"test-{i}.jsonl") for i in range(3))
    assert report.kept == 5 and report.formats[0].endswith(f"; read from {first} and 2 more")


def test_what_save_to_disk_wrote(tmp_path, chatml, monkeypatch):
    import datasets

    datasets.disable_progress_bars()
    rows = [{**PAIR, "id": i} for i in range(5)]
    made = datasets.Dataset.from_list(rows)
    made.select([4, 0]).save_to_disk(tmp_path / "one")
    made.save_to_disk(tmp_path / "shards", num_shards=2)
    datasets.DatasetDict(train=made).save_to_disk(tmp_path / "dict")
    datasets.DatasetDict(train=made, test=made.select([1])).save_to_disk(tmp_path / "dicts")
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(b"what a map left behind")
    assert all_rows(tmp_path / "one") == [rows[4], rows[0]] and all_rows(f"{tmp_path}/one[1:]") == [rows[0]]
    assert all_rows(tmp_path / "shards") == all_rows(tmp_path / "dict") == all_rows(f"{tmp_path}/dicts:train") == rows
    assert all_rows(f"{tmp_path}/dicts:test") == all_rows(tmp_path / "dicts" / "test") == [rows[1]]
    with pytest.raises(
        UserError, match=r"several splits, .*dicts:test \(test/state.json\), .*dicts:train \(train/state.json\)"
    ):
        all_rows(tmp_path / "dicts")
    _, report = load(str(tmp_path / "dict"), chatml)
    assert report.kept == 5 and report.formats[0].endswith(f"; read from {tmp_path / 'dict' / 'train' / 'state.json'}")
    key = data._cache_key(str(tmp_path / "one"), chatml, Reading())
    made.select([3]).save_to_disk(tmp_path / "one")
    assert data._cache_key(str(tmp_path / "one"), chatml, Reading()) != key and all_rows(tmp_path / "one") == [rows[3]]
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"broken")
    with pytest.raises(UserError, match="one/state.json: cannot be read"):
        all_rows(tmp_path / "one")


def test_standard_input_is_no_source():
    with pytest.raises(UserError, match="^-: no such file or folder"):
        all_rows("-")


def test_pairs_and_single_completions_do_not_mix(tmp_path, chatml):
    a = write(tmp_path, "a.jsonl", [{**PAIR, "chosen": ""}, PAIR])
    b = write(tmp_path, "b.jsonl", [{"prompt": "A", "completion": "B", "label": True}])
    for both in (f"{a},{b}", f"{b}, {a}"):
        with pytest.raises(UserError, match="a.jsonl row 2 is a pair, .*b.jsonl row 1 a single completion with a label"):
            load(both, chatml, max_drop_fraction=1)


def test_several_sources_with_weights(tmp_path, chatml):
    a = write(tmp_path, "a.jsonl", [{**PAIR, "prompt": f"Ask {i}"} for i in range(3)])
    b = write(tmp_path, "b.jsonl", [{**PAIR, "prompt": f"Beg {i}"} for i in range(200)])
    examples, report = load(f"{a}, {b}[:2]", chatml)
    assert [e.where for e in examples] == [f"{a} row 1", f"{a} row 2", f"{a} row 3", f"{b} row 1", f"{b} row 2"]
    assert [line.split(": ")[0] for line in report.formats] == [a, f"{b}[:2]"]
    examples, report = load(f"{a}@2,{b}@0.5", chatml, seed=1)
    counts = [sum(e.where == f"{x} row {i}" for e in examples) for x, n in ((a, 3), (b, 200)) for i in range(1, n + 1)]
    assert counts[:3] == [2, 2, 2] and set(counts[3:]) == {0, 1}
    assert 70 < sum(counts[3:]) < 130  # 100 ± 7 expected
    assert report.rows == report.kept == 203 and f"{a} × 2: format pairs" in str(report)
    again, other = (list(load(f"{a}@2,{b}@0.5", chatml, seed=seed)[0]) for seed in (1, 2))
    assert again == list(examples) != other
    for seed in range(5):  # a repeated row is on one side only
        train, held_out = data.split_held_out(load(f"{a}@3", chatml)[0], 1, seed)
        assert len(held_out) == 1 and len(train) == 6 and held_out[0].where not in [e.where for e in train]
    with pytest.raises(UserError, match="no row is left by the weights"):
        load(f"{a}@0.000001", chatml)
    for wrong in ("", f"{a},", f"{a}@0", f"{a}@100000000", f"{a}@{'9' * 400}"):
        with pytest.raises(UserError, match="dataset is"):
            load(wrong, chatml)


def test_hub_names(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        if args[0] == "org/none":
            raise FileNotFoundError("")  # an error without any text
        return [{"a": i} for i in range(5)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(data, "reachable", lambda name, kind: None)
    data._hub.cache_clear()
    assert [w for w, _ in data.read("org/name")][4] == "org/name row 5"
    assert all_rows("org/name:test[:2]") == [{"a": 0}, {"a": 1}]
    assert all_rows("org/name:small:dev") == [{"a": i} for i in range(5)]
    assert asked == [
        (("org/name", None), {"split": "train"}),
        (("org/name", None), {"split": "test"}),
        (("org/name", "small"), {"split": "dev"}),
    ]
    with pytest.raises(UserError, match="org/none: cannot be read"):
        all_rows("org/none")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine that says for every name what `hub.status` is, and an empty cache; `hub.asked` are the paths."""
    from huggingface_hub import constants

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked += [self.path] if self.path.endswith("/org/x") else []
            if server.slow:
                time.sleep(1.0)
            self.send_response(server.status)
            self.send_header("X-Error-Code", "RepoNotFound" if server.status == 404 else "")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.asked, server.status, server.slow = [], 404, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    data.reachable.cache_clear()
    yield server
    data.reachable.cache_clear()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["./x", "/x/y", "runs/x/model", "a b", "", "x" * 300, "a--b"])
def test_what_cannot_be_a_hub_name_is_refused_without_asking(name, hub):
    with pytest.raises(UserError, match=f"^{name[:200]}: no such file or folder, and no such model"):
        data.reachable(name)
    assert hub.asked == []


def test_the_hub_is_asked_once(hub, tmp_path):
    for kind in ("model", "dataset"):
        with pytest.raises(UserError, match=f"^org/x: no such file or folder, and no such {kind} on the hub"):
            data.reachable("org/x", kind)
    assert hub.asked == ["/api/models/org/x", "/api/datasets/org/x"]
    for hub.status in (500, 429):  # it is there: what it has to say, the loader will say
        data.reachable.cache_clear()
        data.reachable("org/x")
        data.reachable("org/x")
    data.reachable(str(tmp_path))
    assert len(hub.asked) == 4


def test_offline_is_found_at_once_and_what_is_cached_goes_on(hub, tmp_path, monkeypatch):
    """A hub that does not answer in time: one attempt, then none; of two names one is in the cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(data, "HUB_SECONDS", 0.1)
    hub.slow = True
    with pytest.raises(UserError, match=r"org/x: no such file or folder, and the hub cannot be reached \(offline\?\), nor is"):
        data.reachable("org/x")
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"
    for folder in ("models--org--y", "datasets--org--y"):
        (tmp_path / "hub" / folder).mkdir(parents=True)
    data.reachable("org/y"), data.reachable("org/y", "dataset")
    for read in (lambda: data.load_tokenizer("org/z"), lambda: all_rows("org/none:train")):
        with pytest.raises(UserError, match="cannot be reached"):
            read()
    assert len(hub.asked) == 1


# ---- rows that are dropped, counted and reported ---------------------------------------------------------------------


def test_report_counts_and_the_limit_on_drops(tmp_path, chatml):
    rows = [PAIR] * 7 + [{**PAIR, "chosen": ""}] * 2 + [{**PAIR, "rejected": None}]
    path = write(tmp_path, "a.jsonl", rows)
    examples, report = load(path, chatml, max_drop_fraction=0.3)  # 3 of 10 is not more than 30 %
    assert len(examples) == report.kept == 7 and report.rows == 10
    assert report.dropped == {"chosen is empty": 2, "rejected is missing": 1}
    assert report.first == [
        f"{path} row 8: chosen is empty",
        f"{path} row 9: chosen is empty",
        f"{path} row 10: rejected is missing",
    ]
    assert [e.where for e in examples] == [f"{path} row {i}" for i in range(1, 8)]
    with pytest.raises(UserError, match=r"more than 29% of the rows were dropped as invalid(.|\n)*row 8: chosen is empty"):
        load(path, chatml, max_drop_fraction=0.29)


REFUSED = [
    ({"prompt": "Ask me", "chosen": "Good"}, "rejected is missing"),
    ({"prompt": 3, "chosen": "Good", "rejected": "Bad"}, "prompt is neither text nor"),
    ({"prompt": "  \n", "chosen": "Good", "rejected": "Bad"}, "prompt is empty"),
    ({"prompt": "Ask me", "chosen": 4, "rejected": "Bad"}, "chosen is"),
    ({"prompt": "Ask me", "chosen": "\ud800", "rejected": "Bad"}, "lone surrogate"),
    ({"prompt": [], "chosen": "Good", "rejected": "Bad"}, "prompt is"),
    ({"prompt": ["Ask me"], "chosen": "Good", "rejected": "Bad"}, "prompt message 1 is a str"),
    ({"prompt": [{"content": "Ask me"}], "chosen": "Good", "rejected": "Bad"}, "prompt message 1 has no role"),
    ({"prompt": [user(None)], "chosen": "Good", "rejected": "Bad"}, "prompt message 1 is missing"),
    ({"prompt": "Ask me", "chosen": [user("Good")], "rejected": "Bad"}, "chosen is not a single assistant message"),
    (
        {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("other"), assistant("c")]},
        "chosen and rejected answer different prompts",
    ),
]


@pytest.mark.parametrize("row, message", REFUSED)
def test_refused_rows(row, message):
    with pytest.raises(UserError, match=message):
        data.from_pair(row)


SCORED = {"prompt": "Ask me", "responses": ["Good", "Bad"], "scores": [1, 0]}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scores": [1, 1]}, "a tie"),
        ({"scores": [1, math.nan]}, "scores is 'nan', not a finite number"),
        ({"scores": [1, 10**400]}, "not a finite number"),
        ({"scores": [1, True]}, "not a finite number"),
        ({"scores": [1, "2"]}, "not a finite number"),
        ({"scores": [1, 2, 3]}, "not a list of 2 numbers"),
        ({"scores": [1], "responses": ["Good"]}, "responses is not a list of two or more"),
        ({"scores": [1, 0], "responses": []}, "responses is not a list of two or more"),
        ({"scores": None}, "not a list of 2 numbers"),
        ({"responses": "Good"}, "responses is not a list"),
        ({"responses": ["Good", ""]}, "responses 2 is empty"),
    ],
)
def test_refused_scores(change, message):
    with pytest.raises(UserError, match=message):
        data.from_scored({**SCORED, **change})


def test_refused_margins_roles_and_prompts():
    with pytest.raises(UserError, match="score_chosen is 'nan'"):
        data.from_pair({**PAIR, "score_chosen": math.nan, "score_rejected": 1})
    with pytest.raises(UserError, match="message 1 has the unknown role 'narrator'; known are system"):
        data.from_pair({**PAIR, "prompt": [{"role": "narrator", "content": "a"}]})
    with pytest.raises(UserError, match="the prompt ends with an assistant turn"):
        data.from_pair({**PAIR, "prompt": [user("a"), assistant("b")]})
    with pytest.raises(UserError, match="do not begin with the same words"):
        data.from_implied({"chosen": "one two", "rejected": "three two"})
    with pytest.raises(UserError, match="chosen is a list, not text"):
        data.from_implied({"chosen": [user("a"), assistant("b")], "rejected": "a b"})


def test_ties_are_dropped_and_counted_but_are_not_invalid(tmp_path, chatml):
    path = write(tmp_path, "a.jsonl", [SCORED, {**SCORED, "scores": [2, 2]}, {**SCORED, "scores": [3, 3]}])
    examples, report = load(path, chatml, max_drop_fraction=0)
    assert len(examples) == 1 and report.dropped == {data.TIE: 2}


def test_refused_transcripts_and_labels():
    with pytest.raises(UserError, match="not a transcript"):
        data.from_hh({"chosen": "Good", "rejected": "Bad"})
    with pytest.raises(UserError, match="no prompt before the response"):
        data.from_hh({"chosen": "\n\nAssistant: Good", "rejected": "\n\nAssistant: Bad"})
    with pytest.raises(UserError, match="does not end with an assistant turn"):
        data.from_hh({"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi"})
    for label in (1, "true", None):
        with pytest.raises(UserError, match="not true or false"):
            data.from_unpaired({"prompt": "Ask me", "completion": "Good", "label": label})
    with pytest.raises(UserError, match="do not end with an assistant turn"):
        data.from_unpaired_messages({"messages": [user("Ask me")], "label": True})


# ---- fuzz: used correctly or reported, never a traceback, never silently wrong ---------------------------------------

WRONG = [
    None, True, 3, 2.5, math.nan, "", " \n", [], {}, [[]], [{}], [None], ["a", None], [[["a"]]], "\ud800",
    {"role": "user"}, {"role": "narrator", "content": "a"}, {"role": "user", "content": ["a", 3]}, {"content": "a"},
]  # fmt: skip


def mutants(value, path=()):
    """Every way to put one wrong value somewhere into a row, or to leave out a key: (path, mutant)."""
    for wrong in WRONG:
        yield path, wrong
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        if isinstance(value, dict):
            yield (*path, key), {k: v for k, v in value.items() if k != key}
        for deeper, mutant in mutants(value[key], (*path, key)):
            copy = dict(value) if isinstance(value, dict) else list(value)
            copy[key] = mutant
            yield deeper, copy


@pytest.mark.parametrize("name", FORMATS)
def test_wrong_values_anywhere(name, tmp_path, chatml):
    row, _ = FORMATS[name]
    # other numbers in the place of scores, another label or end and no system text are right values; they are tested elsewhere
    free = ("scores", "all_rm_scores", "label", "system", "system_prompt", "input", "chosen_ends", "rejected_ends")
    rows = [row] + [m for path, m in mutants(row) if not path or path[0] not in free]
    if "input" in row:  # which alone is a prompt, too
        rows = [m for m in rows if not isinstance(m, dict) or len(m) < 2 or "instruction" in m]
    path = write(tmp_path, "a.jsonl", rows)
    examples, report = load(path, chatml, max_drop_fraction=1)
    assert report.kept + sum(report.dropped.values()) == report.rows == len(rows) > 50
    alike = dict(where="", margin=None)  # another score is another margin
    assert all(e._replace(**alike) == examples[0]._replace(**alike) for e in examples)
    assert all(line.startswith(f"{path} row ") for line in report.first)
    assert len(examples) < len(rows) / 2


def test_damaged_files(tmp_path, chatml):
    rng = random.Random(0)
    text = "".join(json.dumps(row) + "\n" for row, _ in FORMATS.values()).encode()
    for i, content in enumerate([text, gzip.compress(text)] * 60):
        content = bytearray(content)
        for _ in range(rng.choice([1, 3, 20])):
            at = rng.randrange(len(content))
            content[at : at + rng.choice([0, 1, 1, 30])] = rng.choice([b"", b"\0", b"\xff", b'"', b"{", b"\n", b"\r", b"[[["])
        file = tmp_path / f"a.jsonl{'.gz' if i % 2 else ''}"
        file.write_bytes(content)
        try:
            examples, report = load(str(file), chatml, max_drop_fraction=1)
            assert report.kept + sum(report.dropped.values()) == report.rows >= len(examples) == report.kept
        except UserError as error:
            assert file.name in str(error)


def test_brackets_as_deep_as_can_just_be_read(tmp_path, chatml):
    """What one step of the way can still read and another cannot costs its row only."""
    deep = [json.dumps(PAIR)[:-1] + ', "more": ' + "[" * n + "]" * n + "}" for n in range(800, 1010)]
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(PAIR), *deep]))
    examples, report = load(str(tmp_path / "a.jsonl"), chatml, max_drop_fraction=1)
    assert report.rows == 211 and len(examples) > 1 and all("recursion depth" in reason for reason in report.dropped)


def test_a_text_of_a_megabyte_is_cut(tmp_path, chatml):
    rows = [{**PAIR, "chosen": "Good day. " * 100_000}, {**PAIR, "prompt": "Ask me. " * 3_000}]
    examples, report = load(write(tmp_path, "a.jsonl", rows), chatml)
    assert report.cut == {"response cut": 1, "prompt cut": 1}
    assert len(examples[0].prompt) + len(examples[0].responses[0]) == 2048 and len(examples[1].prompt) == 1792


# ---- token ids: truth at the boundary --------------------------------------------------------------------------------

QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
SMOL = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
BEGIN, L3_SYSTEM = "<|begin_of_text|>", HEAD.format("system")
ASK, THEN = "<|im_start|>user\nAsk me<|im_end|>\n", "<|im_start|>assistant\n"
L3_USER, L3_ASSISTANT = "<|begin_of_text|>" + HEAD.format("user"), HEAD.format("assistant")
ASKED, SYSTEM = [user("Ask me")], [system("Be kind"), user("Ask me")]
TURNS, SPACES = [user("Ask me"), assistant("Yes"), user("Why")], [user("Ask me ")]

# (family, prompt messages, response) → the prompt and the response as texts, written by hand from each family's documentation
RENDERED = [
    ("llama2", ASKED, "Good day", "<s>[INST] Ask me [/INST]", " Good day </s>"),
    ("llama2", SYSTEM, "Good day", "<s>[INST] <<SYS>>\nBe kind\n<</SYS>>\n\nAsk me [/INST]", " Good day </s>"),
    ("llama2", TURNS, "Good day", "<s>[INST] Ask me [/INST] Yes </s><s>[INST] Why [/INST]", " Good day </s>"),
    ("llama2", SPACES, " Good day", "<s>[INST] Ask me [/INST]", " Good day </s>"),
    ("llama3", ASKED, "Good day", f"{L3_USER}Ask me<|eot_id|>{L3_ASSISTANT}", "Good day<|eot_id|>"),
    ("llama3", SYSTEM, "Good day",
     f"{BEGIN}{L3_SYSTEM}Be kind<|eot_id|>{HEAD.format('user')}Ask me<|eot_id|>{L3_ASSISTANT}", "Good day<|eot_id|>"),
    ("llama3", TURNS, "Good day",
     f"{L3_USER}Ask me<|eot_id|>{L3_ASSISTANT}Yes<|eot_id|>{HEAD.format('user')}Why<|eot_id|>{L3_ASSISTANT}",
     "Good day<|eot_id|>"),
    ("llama3", SPACES, " Good day", f"{L3_USER}Ask me<|eot_id|>{L3_ASSISTANT}", "Good day<|eot_id|>"),
    ("mistral", ASKED, "Good day", "<s>[INST] Ask me [/INST]", "Good day</s>"),
    ("mistral", TURNS, "Good day", "<s>[INST] Ask me [/INST]Yes</s>[INST] Why [/INST]", "Good day</s>"),
    ("mistral", SPACES, " Good day", "<s>[INST] Ask me  [/INST]", " Good day</s>"),
    ("gemma2", ASKED, "Good day",
     "<bos><start_of_turn>user\nAsk me<end_of_turn>\n<start_of_turn>model\n", "Good day<end_of_turn>"),
    ("gemma2", TURNS, "Good day",
     "<bos><start_of_turn>user\nAsk me<end_of_turn>\n<start_of_turn>model\nYes<end_of_turn>\n"
     "<start_of_turn>user\nWhy<end_of_turn>\n<start_of_turn>model\n", "Good day<end_of_turn>"),
    ("gemma2", SPACES, " Good day",
     "<bos><start_of_turn>user\nAsk me<end_of_turn>\n<start_of_turn>model\n", "Good day<end_of_turn>"),
    ("qwen2.5", ASKED, "Good day", f"{QWEN}<|im_start|>user\nAsk me<|im_end|>\n<|im_start|>assistant\n", "Good day<|im_end|>"),
    ("qwen2.5", SYSTEM, "Good day",
     f"<|im_start|>system\nBe kind<|im_end|>\n{ASK}{THEN}", "Good day<|im_end|>"),
    ("smollm2", ASKED, "Good day", f"{SMOL}<|im_start|>user\nAsk me<|im_end|>\n<|im_start|>assistant\n", "Good day<|im_end|>"),
    ("smollm2", TURNS, "Good day",
     f"{SMOL}<|im_start|>user\nAsk me<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
     "<|im_start|>user\nWhy<|im_end|>\n<|im_start|>assistant\n", "Good day<|im_end|>"),
    ("smollm2", SPACES, " Good day ", f"{SMOL}<|im_start|>user\nAsk me <|im_end|>\n{THEN}", " Good day <|im_end|>"),
    ("zephyr", ASKED, "Good day", "<|user|>\nAsk me</s>\n<|assistant|>\n", "Good day</s>"),
    ("zephyr", SYSTEM, "Good day", "<|system|>\nBe kind</s>\n<|user|>\nAsk me</s>\n<|assistant|>\n", "Good day</s>"),
    ("zephyr", TURNS, "Good day",
     "<|user|>\nAsk me</s>\n<|assistant|>\nYes</s>\n<|user|>\nWhy</s>\n<|assistant|>\n", "Good day</s>"),
    ("zephyr", SPACES, " Good day", "<|user|>\nAsk me </s>\n<|assistant|>\n", " Good day</s>"),
    ("none", ASKED, "Good day", "<|endoftext|>User: Ask me\n\nAssistant:", " Good day<|endoftext|>"),
    ("none", SYSTEM, "Good day", "<|endoftext|>System: Be kind\n\nUser: Ask me\n\nAssistant:", " Good day<|endoftext|>"),
    ("none", TURNS, "Good day",
     "<|endoftext|>User: Ask me\n\nAssistant: Yes<|endoftext|>\n\nUser: Why\n\nAssistant:", " Good day<|endoftext|>"),
]  # fmt: skip


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Every family; the one without a template goes through load_tokenizer, which gives it the plain form."""
    folder = tmp_path_factory.mktemp("none")
    family("none").save_pretrained(folder)
    return {name: family(name) for name in FAMILIES} | {"none": data.load_tokenizer(str(folder))}


def raw_ids(tokenizer, text):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name, prompt, response, prompt_text, response_text", RENDERED)
def test_ids_are_those_of_the_rendering_written_by_hand(families, name, prompt, response, prompt_text, response_text):
    tokenizer = families[name]
    example, cuts = encode(Row(prompt, [response, "Yes"]), tokenizer, 1000, 900)
    chosen, rejected = example.responses
    assert cuts == []
    assert example.prompt == raw_ids(tokenizer, prompt_text)
    assert example.prompt + chosen == raw_ids(tokenizer, prompt_text + response_text)
    for ids in (chosen, rejected):  # one terminator, and nothing after it is scored
        assert ids.count(tokenizer.convert_tokens_to_ids(TERMINATOR[name])) == 1
        assert ids[-1] == tokenizer.convert_tokens_to_ids(TERMINATOR[name])
    # BOS where the rendering has it: once, but Llama-2 begins each exchange with it, the ChatML families and Zephyr write none,
    # in SmolLM2 BOS is <|im_start|>, and without a template BOS and EOS are the same token here
    if name in ("llama3", "mistral", "gemma2") or (name == "llama2" and prompt is not TURNS):
        assert example.prompt[0] == tokenizer.bos_token_id
        assert (example.prompt + chosen).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_template_that_refuses_drops_the_row_with_its_words(families, name):
    with pytest.raises(
        UserError, match="the chat template refuses this row .*(Conversation roles must|System role not|Only user and)"
    ):
        encode(Row(SYSTEM, ["Good", "Bad"]), families[name], 1000, 900)


def tokenizer_with(template, inner):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


COLON = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}:{% else %}</s>{% endif %}{% endfor %}"


def test_a_merge_across_the_boundary_belongs_to_the_response():
    # one merge, ":" + "b": the prompt "qx:" is q x : alone, but q x :b </s> with the chosen response, q x : c </s> otherwise
    names = ["</s>", "q", "x", ":", "b", "c", ":b"]
    tokenizer = tokenizer_with(COLON, Tokenizer(models.BPE({t: i for i, t in enumerate(names)}, [(":", "b")])))
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    example, _ = encode(Row([user("qx")], ["b", "c"]), tokenizer, 100, 90)
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in (example.prompt, *example.responses)]
    assert tokens == [["q", "x"], [":b", "</s>"], [":", "c", "</s>"]]
    example, _ = encode(Row([user("qx")], ["c", "c"]), tokenizer, 100, 90)
    assert tokenizer.convert_ids_to_tokens(example.prompt) == ["q", "x", ":"]  # no merge, nothing is given up


def test_a_merge_of_a_real_family(families):
    # Mistral writes the response right behind [/INST]; here the pieces "]Good" of the corpus make the two one token
    inner = metaspace(["<unk>", "<s>", "</s>"], ["[INST] a [/INST]Good"] * 50)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = families["mistral"].chat_template
    example, _ = encode(Row([user("a")], ["Good", "go"]), tokenizer, 100, 90)
    merged = raw_ids(tokenizer, "<s>[INST] a [/INST]Good</s>")
    plain = raw_ids(tokenizer, "<s>[INST] a [/INST]go</s>")
    assert example.prompt + example.responses[0] == merged and example.prompt + example.responses[1] == plain
    assert tokenizer.convert_ids_to_tokens(example.responses[0]) == ["▁[/INST]Good", "</s>"]
    assert tokenizer.decode(example.prompt) == "<s>[INST] a"


def test_a_template_that_rewrites_the_prompt_is_refused():
    rewritten = "{% if messages | length > 1 %}now {% endif %}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    tokenizer = tokenizer_with(rewritten, byte_level(["</s>"]))
    with pytest.raises(UserError, match="renders the prompt differently|no token from which"):
        encode(Row([user("Hello there, what is two plus two?")], ["Good"]), tokenizer, 100, 90)


def test_nothing_before_the_response_is_refused():
    names = ["</s>", "q", "b", "qb"]  # the whole prompt is merged into the response's first token
    tokenizer = tokenizer_with(COLON.replace(":", ""), Tokenizer(models.BPE({t: i for i, t in enumerate(names)}, [("q", "b")])))
    with pytest.raises(UserError, match="no token from which the first response token could be predicted"):
        encode(Row([user("q")], ["b"]), tokenizer, 100, 90)


@pytest.mark.parametrize("response", ["Good", "Good\n", "|>", "im_end", "\n", "m", "", "<|im_end"])
def test_whitespace_after_the_terminator_is_never_scored(chatml, response):
    example, _ = encode(Row(ASKED, [response]), chatml, 1000, 900)
    assert chatml.decode(example.responses[0]) == response + "<|im_end|>"


def test_load_tokenizer_names_a_folder_without_one(tmp_path):
    with pytest.raises(UserError, match="no usable tokenizer there"):
        data.load_tokenizer(str(tmp_path))


def test_the_plain_form_without_bos(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=byte_level(["</s>"]), eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = data.load_tokenizer(str(tmp_path))
    example, _ = encode(Row(ASKED, ["Good"]), tokenizer, 100, 90)
    assert tokenizer.decode(example.prompt) == "User: Ask me\n\nAssistant:"
    assert tokenizer.decode(example.responses[0]) == " Good</s>"


# ---- lengths ---------------------------------------------------------------------------------------------------------


def test_truncation_by_hand(chatml):
    both = Row(ASKED, ["Good day to you", "Yes"])
    whole, _ = encode(both, chatml, 1000, 900)
    prompt, (chosen, rejected) = whole.prompt, whole.responses
    assert len(chosen) > len(rejected) > 2
    cut, cuts = encode(both, chatml, len(prompt) + len(chosen), 900)
    assert (cut, cuts) == (whole, [])  # exactly full: nothing is cut
    cut, cuts = encode(both, chatml, 10 + 2, 10)
    assert cut.prompt == prompt[-10:] and cut.responses == [chosen[:2], rejected[:2]]
    assert cuts == ["prompt cut", "response cut"]
    cut, cuts = encode(both, chatml, len(prompt) + len(chosen) - 1, 900)
    assert cut.responses == [chosen[:-1], rejected] and cuts == ["response cut"]  # no terminator on the cut one
    with pytest.raises(UserError, match="no response token is left within max_length 10"):
        encode(both, chatml, 10, 10)


def test_cuts_are_counted(tmp_path, chatml):
    _, report = load(write(tmp_path, "a.jsonl", [PAIR, {**PAIR, "chosen": "Good " * 50}]), chatml, max_length=80)
    assert report.cut == {"response cut": 1} and "1 response cut" in str(report)


# ---- special tokens spelled in messages ------------------------------------------------------------------------------


SPELLED = r"its texts spell the special token {} \(--control_tokens takes it as a real one\)"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("place", ["prompt", "response"])
def test_a_row_that_spells_a_special_token_is_refused_with_its_name(families, name, place):
    tokenizer, end = families[name], TERMINATOR[name]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.unk_token_id}
    clean, _ = encode(Row([user("Ask me")], ["Good day", "Yes"]), tokenizer, 1000, 900)
    attack = f"Ask me{end}\n{end} Good {tokenizer.bos_token or FAMILIES[name].special[0]}day"
    row = Row([user(attack)], ["Good day", "Yes"]) if place == "prompt" else Row([user("Ask me")], ["Good day", attack])
    with pytest.raises(UserError, match=SPELLED.format("(" + "|".join(map(re.escape, tokenizer.all_special_tokens)) + "|.*)")):
        encode(row, tokenizer, 1000, 900)
    example, cuts = encode(row, tokenizer, 1000, 900, control_tokens=True)  # asked for, they are real ones
    counts = [sum(i in special for i in e.prompt + e.responses[1]) for e in (clean, example)]
    assert counts[1] == counts[0] + 3 and cuts == []


@pytest.mark.parametrize("name", FAMILIES)
def test_ordinary_texts_are_not_taken_for_special_tokens(families, name):
    tokenizer = families[name]
    for text in (
        "two  spaces\n\nünï ☃ 中 <a|b>",
        "<|im_",
        "im_end|>",
        "[INST]"[name == "mistral-v3" :],
        "<s",
        "\ue000 \U000f0000",
    ):
        assert encode(Row([user(f"Ask {text} me")], [f"Good {text}", text]), tokenizer, 1000, 900)[0].responses
    if "<unk>" in tokenizer.get_vocab():  # it stands for text
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.unk_token = "<unk>"
        assert encode(Row([user("Ask <unk> me")], ["Good", "<unk>"]), tokenizer, 1000, 900)[0].responses


def test_rows_that_spell_special_tokens_are_counted_by_token(tmp_path, chatml):
    texts = ["Good", "<|im_end|>", "a <|im_end|> b", "<|endoftext|>", "<|im_start|><|im_end|>"]
    path = write(tmp_path, "a.jsonl", [{**PAIR, "chosen": text} for text in texts])
    examples, report = load(path, chatml, max_drop_fraction=0.8)
    reasons = {reason.split("special token ")[1].split()[0]: n for reason, n in report.dropped.items()}
    assert len(examples) == 1 and reasons == {"<|im_end|>": 2, "<|endoftext|>": 1, "<|im_start|>": 1}
    assert report.first[0].startswith(f"{path} row 2: its texts spell the special token <|im_end|>")
    with pytest.raises(UserError, match="more than 10% of the rows were dropped as invalid"):
        load(path, chatml)
    examples, report = load(path, chatml, control_tokens=True)
    assert report.dropped == {} and chatml.decode(examples[1].responses[0]) == "<|im_end|><|im_end|>"


def test_a_template_that_leaves_out_its_own_special_tokens_is_refused(chatml):
    for token, said in (("<|im_end|>", "ends this response otherwise"), ("<|im_start|>", "writes other special tokens around")):
        tokenizer = copy.deepcopy(chatml)
        its_own = f"{{{{ '' if 'x' in m['content'] else '{token}' }}}}"
        tokenizer.chat_template = JOINING.replace(token, its_own, 1)
        assert encode(Row([user("a")], ["b"]), tokenizer, 512, 448)
        with pytest.raises(UserError, match=said):
            encode(Row([user("a")], ["x"]), tokenizer, 512, 448)


JOINING = (  # lets messages touch, and deletes a character
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>{{ m['content'] }}<|im_end|>{% else %}"
    "{{ m['content'] | replace('~', '') }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


@pytest.mark.parametrize("pieces, control", [
    (["hi <|im_", "end|> there"], True), (["hi <|im~_end|> there"], True), (["<|im_start|> and <|im_", "end|>"], True),
    (["hi <|im_end|> there"], True), (["hi <|im", "end|> there"], False), (["hi <|im_end| > there"], False),
])  # fmt: skip
def test_special_tokens_that_the_template_makes_of_pieces(families, pieces, control):
    """Harmless messages of which the rendered text has an <|im_end|>: refused; as near, but none: encoded."""
    tokenizer = copy.deepcopy(families["smollm2"])
    tokenizer.chat_template = JOINING
    row = Row([{"role": "user", "content": piece} for piece in pieces], ["yes", "no"])
    if control:
        with pytest.raises(UserError, match=SPELLED.format(r"<\|im_(start|end)\|>")):
            encode(row, tokenizer, 512, 448)
        if "~" in pieces[0]:  # the template deletes it, and that is changing a text
            with pytest.raises(UserError, match=r"changes the text of prompt message 1 \(user\)"):
                encode(row, tokenizer, 512, 448, control_tokens=True)
        else:
            assert encode(row, tokenizer, 512, 448, control_tokens=True)[0].responses
    else:
        example, _ = encode(row, tokenizer, 512, 448)
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in example.prompt


# ---- what else than text a row has, and what a template does with it --------------------------------------------------


def tool(name="add", **more):
    properties = {"a": {"type": "number"}, "b": {"type": "number"}}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}, **more}}


def calls(*arguments, name="add"):
    return [{"type": "function", "function": {"name": name, "arguments": given}} for given in arguments]


def said(text="", **more):
    return {"role": "assistant", "content": text, **more}


TWO_AND_TWO = calls({"a": 2, "b": 2})
TOOL_ROW = {"tools": [tool()], "prompt": [user("Add")], "chosen": said("", tool_calls=TWO_AND_TWO), "rejected": said("Five")}
RESULT_ROW = {
    "tools": [tool()],
    "prompt": [user("Add"), said("I do", tool_calls=TWO_AND_TWO), {"role": "tool", "name": "add", "content": '4, "four"'}],
    "chosen": "It is four",
    "rejected": "No",
}


def test_messages_keep_their_keys():
    """Nulls and empty values, which tables add to every object, are left out at any depth."""
    filled = {"prompt": [{**user("Add"), "tool_calls": None, "name": "Ada"}], "chosen_ends": None}
    filled["chosen"] = {**said(None), "tool_calls": calls({"a": 2, "unit": None}), "reasoning_content": "", "audio": None}
    filled["rejected"] = [{"from": "gpt", "value": "Five", "thinking": "hm", "weight": 0.5}]
    filled["tools"] = [tool(strict=None)]
    filled["chat_template_kwargs"] = {"enable_thinking": False, "builtin_tools": None}
    row = data.from_pair(filled)
    assert row.prompt == [{**user("Add"), "name": "Ada"}]
    assert row.responses == [said("", tool_calls=calls({"a": 2})), said("Five", thinking="hm", weight=0.5)]
    assert row.template == {"enable_thinking": False, "tools": [tool()]}
    assert data.from_pair(PAIR).template == data.from_pair({**PAIR, "tools": [], "chat_template_kwargs": None}).template == {}


def test_what_tables_spell_as_json_is_read():
    spelled = {**TOOL_ROW, "tools": json.dumps(TOOL_ROW["tools"]), "chat_template_kwargs": '{"enable_thinking": false}'}
    spelled["chosen"] = said("", tool_calls=json.dumps(TWO_AND_TWO))
    row = data.from_pair(spelled)
    assert row.responses == data.from_pair(TOOL_ROW).responses and row.template == {"enable_thinking": False, "tools": [tool()]}
    arguments = '{"a": 2}'
    kept = data.from_pair({**TOOL_ROW, "chosen": said("", tool_calls=calls(arguments))}).responses[0]["tool_calls"]
    assert kept[0]["function"]["arguments"] == arguments  # templates differ in what they want


def test_parts_that_are_texts_are_joined():
    parts = [{"type": "text", "text": "Ask "}, "me", {"type": "text", "text": "!", "image": None}]
    assert (
        data.from_pair({**PAIR, "prompt": [user(parts)], "chosen": said(parts)})[:2]
        == Row([user("Ask me!")], ["Ask me!", "Bad"])[:2]
    )


deep = functools.reduce(lambda inner, _: {"a": inner}, range(500), {})
NO_TEXT = [
    ({"images": ["cat.png"]}, "the row has images, and only texts are seen here"),
    ({"video": {"path": "cat.mp4"}}, "the row has video, and only"),
    ({"prompt": [{**user("Look"), "images": ["cat.png"]}]}, "prompt message 1 has images, and only"),
    (
        {"prompt": [user([{"type": "image"}, {"type": "text", "text": "Look"}])]},
        "prompt message 1 has a part of type image, and",
    ),
    ({"prompt": [user([{"type": "image_url", "image_url": {"url": "u"}}])]}, "prompt message 1 has a part of type image_url"),
    ({"chosen": said([{"type": "text"}])}, "chosen message 1 has a part of type text, and only"),
    ({"chosen": said("")}, "chosen message 1 is empty"),
    ({"chosen": said("", tool_calls=[])}, "chosen message 1 is empty"),
    ({"chosen": said("", tool_calls="add")}, "chosen message 1: tool_calls is not a list of objects, nor JSON"),
    ({"chosen": said("", tool_calls=["add"])}, "tool_calls is not a list of objects"),
    ({"tools": "add"}, "tools is not a list of objects, nor JSON that spells one"),
    ({"tools": {"name": "add"}}, "tools is not a list of objects"),
    ({"chat_template_kwargs": [1]}, "chat_template_kwargs is not an object"),
    ({"chat_template_kwargs": {"a": deep}}, "nested deeper than 100"),
    ({"chosen": said("Good", more=deep)}, "nested deeper than 100"),
]


@pytest.mark.parametrize("change, message", NO_TEXT)
def test_what_is_no_text_is_refused_by_name(change, message):
    assert data.from_pair({**PAIR, "images": [], "video": None})
    with pytest.raises(UserError, match=message):
        data.from_pair({**PAIR, **change})


def encoded(row, tokenizer, **more):
    return encode(data.from_pair(row), tokenizer, 4000, 3500, **more)


def texts(row, tokenizer, **more):
    """(prompt, chosen, rejected) as texts, what is cut."""
    example, cuts = encoded(row, tokenizer, **more)
    return [tokenizer.decode(ids) for ids in (example.prompt, *example.responses)], cuts


HERMES = (  # the texts around the tools, written by hand
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n"
    "# Tools\n\nYou may call one or more functions.\n\n<tools>\n{}\n</tools>\n\nFor each call return <tool_call>\n"
    '{{"name": <name>, "arguments": <object>}}\n</tool_call><|im_end|>\n<|im_start|>user\nAdd<|im_end|>\n'
)
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'


def test_tools_and_their_calls_by_hand():
    tokenizer = family("qwen2.5")
    (prompt, chosen, rejected), cuts = texts(TOOL_ROW, tokenizer)
    begin = HERMES.format(json.dumps(tool()))
    assert prompt + chosen == f"{begin}<|im_start|>assistant\n{CALLED}<|im_end|>"
    assert prompt + rejected == f"{begin}<|im_start|>assistant\nFive<|im_end|>" and cuts == []
    (prompt, chosen, _), _ = texts(RESULT_ROW, tokenizer)
    result = '<|im_start|>user\n<tool_response>\n4, "four"\n</tool_response><|im_end|>\n'
    assert prompt == f"{begin}<|im_start|>assistant\nI do\n{CALLED}<|im_end|>\n{result}<|im_start|>assistant\n"
    assert chosen == "It is four<|im_end|>"
    both = {**TOOL_ROW, "chosen": said("I add", tool_calls=TWO_AND_TWO), "rejected": said("I add")}
    assert texts(both, tokenizer)[0][1:] == [f"I add\n{CALLED}<|im_end|>", "I add<|im_end|>"]  # not the same ids


# (family, what stands behind the arguments of a call, its terminator, that of an answer)
@pytest.mark.parametrize(
    "name, closing, call, answer",
    [
        ("gpt-oss", "", "<|call|>", "<|return|>"),
        ("glm4", "", "<|observation|>", "<|user|>"),
        ("llama3.2", "}", "<|eot_id|>", "<|eot_id|>"),
        ("qwen3", "}\n</tool_call>", "<|im_end|>", "<|im_end|>"),
        ("hermes", "}\n</tool_call>", "<|im_end|>", "<|im_end|>"),
    ],
)
def test_what_a_call_and_an_answer_end_with(name, closing, call, answer):
    day = {"strftime_now": "2024-03-01"}
    (_, chosen, rejected), cuts = texts(TOOL_ROW, family(name), template=day)
    assert chosen.endswith('{"a": 2, "b": 2}' + closing + call) and chosen.count(call) == 1
    assert rejected.endswith("Five" + answer) and rejected.count(answer) == 1 and cuts == []
    called = [user("Add"), said("", tool_calls=TWO_AND_TWO), RESULT_ROW["prompt"][2]]
    (prompt, chosen, _), _ = texts({**RESULT_ROW, "prompt": called}, family(name), template=day)
    assert "four" in prompt and chosen.endswith("It is four" + answer)


SPECIAL = ["</s>", "<|im_start|>", "<|im_end|>"]


def turns(text="m.content", after="<|im_end|>\n", prompted="<|im_start|>assistant\n", otherwise=""):
    """A template: what it shows of a message, what it writes behind it, for a generation prompt and otherwise."""
    last = "{% if add_generation_prompt %}" + prompted + "{% else %}" + otherwise + "{% endif %}"
    return "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ " + text + " }}" + after + "{% endfor %}" + last


# structures that public templates have: (template, what ends an answer; "" where nothing does)
ENDINGS = {
    "at once": (turns(), "<|im_end|>"),
    "EOS behind the last message too": (turns(otherwise="{{ eos_token }}"), "<|im_end|>"),
    "EOS in the place of the last token": (
        turns(after="{{ eos_token if loop.last and m.role == 'assistant' else '<|im_end|>' }}"), "</s>"
    ),
    "the next header, whether asked for or not": (turns(otherwise="<|im_start|>assistant\n"), "<|im_end|>"),
    "the next header only": (turns(after=""), "<|im_start|>"),
    "two tokens, the second is EOS": (turns(after="<|im_end|>{{ eos_token }}\n"), "<|im_end|></s>"),
    "a space before it": (turns(after=" {{ eos_token }}"), " </s>"),
    "no further turn": (turns(after="<|im_end|>{% if loop.index > 2 %}{{ raise_exception('no') }}{% endif %}"), "<|im_end|>"),
    "nothing": (turns(after="\n\n", prompted="assistant\n").replace("<|im_start|>", ""), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDINGS)
def test_an_answer_ends_once_and_nothing_follows(name):
    template, ending = ENDINGS[name]
    tokenizer = tokenizer_with(template, byte_level(SPECIAL))
    (prompt, chosen, rejected), cuts = texts(PAIR, tokenizer)
    assert [chosen.lstrip(), rejected.lstrip()] == ["Good" + ending, "Bad" + ending]
    assert cuts == ([] if ending else [data.NO_ENDING])
    last = raw_ids(tokenizer, ending)[-1:]
    assert data.terminator(tokenizer) == (last[0] if ending else None)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_terminator_of_a_family(families, name):
    assert data.terminator(families[name]) == families[name].convert_tokens_to_ids(TERMINATOR[name])


def test_no_ending_is_said(tmp_path, capsys):
    template, _ = ENDINGS["nothing"]
    tokenizer = tokenizer_with(template, byte_level(["</s>"]))
    examples, report = load(write(tmp_path, "a.jsonl", [PAIR] * 3), tokenizer)
    assert report.cut == {data.NO_ENDING: 3} and "3 of 3 rows kept, 3 without an ending" in str(report)
    assert "→ no ending is taught: let the chat template write a token" in data.stats(examples, report)
    assert "tokens, scored, no terminator)" in data.show(examples[0], tokenizer, colour=False)


def test_reasoning_reaches_the_ids_and_an_empty_block_belongs_to_the_prompt_where_it_is_asked_for():
    tokenizer, begin = family("qwen3"), f"{ASK}{THEN}"
    reasoned = {
        "prompt": "Ask me",
        "chosen": said("Good", reasoning_content="Why not"),
        "rejected": said("Bad", reasoning_content="No"),
    }
    (prompt, chosen, rejected), cuts = texts(reasoned, tokenizer)
    assert (prompt, cuts) == (begin, []) and chosen == "<think>\nWhy not\n</think>\n\nGood<|im_end|>"
    assert rejected == "<think>\nNo\n</think>\n\nBad<|im_end|>"
    assert texts(PAIR, tokenizer)[0] == [begin, "<think>\n\n</think>\n\nGood<|im_end|>", "<think>\n\n</think>\n\nBad<|im_end|>"]
    without = [begin + "<think>\n\n</think>\n\n", "Good<|im_end|>", "Bad<|im_end|>"]
    assert texts({**PAIR, "chat_template_kwargs": {"enable_thinking": False}}, tokenizer)[0] == without
    assert texts(PAIR, tokenizer, template={"enable_thinking": False})[0] == without
    own_wins = {**PAIR, "chat_template_kwargs": {"enable_thinking": True}}
    assert texts(own_wins, tokenizer, template={"enable_thinking": False}) == texts(PAIR, tokenizer)


def test_reasoning_of_earlier_turns_may_be_cut_and_is_counted(tmp_path):
    tokenizer = family("qwen3")
    for earlier in (said("Yes", reasoning_content="Let me see"), said("<think>\nLet me see\n</think>\n\nYes")):
        row = {**PAIR, "prompt": [user("Hi"), earlier, user("So")]}
        (prompt, _, _), cuts = texts(row, tokenizer)
        assert "Let me see" not in prompt and "assistant\nYes<|im_end|>" in prompt
        assert cuts == ["earlier reasoning cut by the template"]
        _, report = load(write(tmp_path, "a.jsonl", [row, PAIR]), tokenizer)
        assert report.cut == {"earlier reasoning cut by the template": 1}
    (prompt, _, _), cuts = texts(row, family("smollm2"))
    assert "<think>\nLet me see\n</think>\n\nYes" in prompt and cuts == []  # this one leaves it in
    called = said("<think>Let me see</think>I do", tool_calls=TWO_AND_TWO)
    (prompt, _, _), cuts = texts({**RESULT_ROW, "prompt": [user("Add"), called, RESULT_ROW["prompt"][2]]}, tokenizer)
    assert "<think>\nLet me see\n</think>\n\nI do\n<tool_call>" in prompt and cuts == []  # with line breaks around it


ROLES = "m.content if m.role in ['user', 'assistant'] else ''"
ONCE = "m.content if m.content not in messages[:loop.index0] | map(attribute='content') else ''"
WITH_NAMES = turns("m.content ~ m.tool_calls | map(attribute='function.name') | join")
WITH_CALLS = turns("m.content ~ (m.tool_calls | tojson if m.tool_calls else '')")
OLD_CALL = {"name": "add", "arguments": '{"a": "two"}'}
# (template, row, what is said of it)
LOST = {
    "capitals": (turns("m.content | upper"), PAIR | {"prompt": "ASK"}, "drops or changes the text of the response$"),
    "capitals for answers": (turns("m.content | upper if m.role == 'assistant' else m.content"),
                             PAIR | {"prompt": "Good or Bad"},  # in which they stand as they are
                             "drops or changes the text of the response$"),
    "the first words only": (turns("m.content[:3]"), PAIR | {"prompt": "Ask"}, "drops or changes the text of the response$"),
    "up to </think>": (turns("m.content.split('</think>')[-1]"), PAIR | {"chosen": "<think>Hm</think>Good"},
                       "drops or changes the text of the response; give what is before </think> as reasoning_content"),
    "capitals for users": (turns("m.content if m.role == 'assistant' else m.content | upper"), PAIR,
                           r"drops or changes the text of prompt message 1 \(user\)"),
    "no developer": (turns(ROLES), PAIR | {"prompt": [{"role": "developer", "content": "a"}, user("Ask me")]},
                     r"drops or changes the text of prompt message 1 \(developer\)"),  # there is an "a" in every rendering
    "no system": (turns(ROLES), PAIR | {"system": "Be kind"}, r"drops or changes the text of prompt message 1 \(system\)"),
    "each text once": (turns(ONCE), PAIR | {"prompt": [user("Ask me"), said("Yes"), user("Ask me")]},
                       r"drops or changes the text of prompt message 1 \(user\)"),
    "more than earlier reasoning": (
        turns("m.content[:3]"), PAIR | {"prompt": [user("Ask"), said("<think>Hm</think>Fine"), user("Ask")], "chosen": "Yes"},
        r"drops or changes the text of prompt message 2 \(assistant\)",
    ),
    "tools": (WITH_CALLS, TOOL_ROW, "drops tools of the row"),
    "calls": (turns(), TOOL_ROW, "drops or changes tool_calls of the response"),
    "calls whose words stand in the text": (turns(), PAIR | {"chosen": said("add 2 and 2", tool_calls=TWO_AND_TWO)},
                                            "drops or changes tool_calls of the response"),
    "arguments": (WITH_NAMES, TOOL_ROW, "drops or changes tool_calls of the response"),
    "earlier calls": (turns(), RESULT_ROW, r"drops or changes tool_calls of prompt message 2 \(assistant\)"),
    "old calls": (turns(), PAIR | {"chosen": said("", function_call=OLD_CALL)}, "drops or changes function_call of the"),
    "reasoning": (turns(), PAIR | {"chosen": said("Good", reasoning_content="Hm")}, "drops or changes reasoning_content of"),
    "thinking": (turns(), PAIR | {"chosen": said("Good", thinking="Hm")}, "drops or changes thinking of the response"),
    "capitals for reasoning": (turns("m.content ~ (m.thinking or '') | upper"), PAIR | {"chosen": said("Good", thinking="Hm")},
                               "drops or changes thinking of the response"),
    "another key": (turns(), PAIR | {"chosen": said("Good", plan=["Hm"])}, "drops or changes plan of the response"),
    "text beside a call": (
        turns("m.tool_calls | tojson if m.tool_calls else m.content"), PAIR | {"chosen": said("I add", tool_calls=TWO_AND_TWO)},
        "drops or changes the text of the response",
    ),
    "a call in other words": (turns(), PAIR | {"chosen": said("I add 2 and 2", tool_calls=TWO_AND_TWO)},
                              "drops or changes tool_calls of the response"),
    "earlier calls in other words": (turns(), RESULT_ROW | {"tools": None, "prompt": [
        user("Add"), said("I add 2 and 2", tool_calls=TWO_AND_TWO), {"role": "tool", "content": "4"}]},
        "drops or changes tool_calls of prompt message 2"),
    "reasoning in other words": (turns(), PAIR | {"chosen": said("Good day", thinking="Good")}, "drops or changes thinking of"),
    "the difference": (turns("m.content | trim"), PAIR | {"rejected": "Good "}, "renders both responses alike"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_what_a_template_drops_or_changes_is_refused(name):
    template, row, message = LOST[name]
    tokenizer = tokenizer_with(template, byte_level(SPECIAL))
    with pytest.raises(UserError, match=f"^the chat template {message}"):
        encoded(row, tokenizer)


def test_what_need_not_be_shown():
    tokenizer = tokenizer_with(WITH_CALLS, byte_level(SPECIAL))
    labels = {"name": "Ada", "id": "x1", "weight": 0.5, "train": True}
    (prompt, chosen, _), _ = texts(
        {**PAIR, "prompt": [{**user("Ask me"), "stamp": "noon"}], "chosen": said("Good", **labels)}, tokenizer
    )
    assert chosen == "Good<|im_end|>" and "noon" not in prompt
    identical = encoded({**PAIR, "rejected": "Good"}, tokenizer)[0]
    assert identical.responses[0] == identical.responses[1]  # counted by `quality`
    for arguments in ({"a": 'say "no"\n', "n": 12}, '{"a": "say \\"no\\"\\n", "n": 12}'):  # shown as JSON, or as JSON in JSON
        (_, chosen, _), _ = texts({**PAIR, "chosen": said("", tool_calls=calls(arguments, "{}"))}, tokenizer)
        assert "say" in chosen and chosen.count("add") == 2


def test_special_tokens_spelled_elsewhere_than_in_texts():
    tokenizer = family("qwen2.5")
    for row in (
        {**TOOL_ROW, "tools": [tool(description="<|im_end|>")]}, {**TOOL_ROW, "tools": [tool("<|im_<|im_end|>end|>")]},
        {**TOOL_ROW, "chosen": said("", tool_calls=calls({"a": "<|im_end|>"}))},
        {**TOOL_ROW, "rejected": said("Five", tool_calls=calls('{"<|im_end|>": 2}'))},
    ):  # fmt: skip
        with pytest.raises(UserError, match=SPELLED.format(r"<\|im_end\|>")):
            encoded(row, tokenizer)
        assert encoded(row, tokenizer, control_tokens=True)
    reasoned = {**PAIR, "chosen": said("Good", reasoning_content="<|im_end|>")}
    with pytest.raises(UserError, match=SPELLED.format(r"<\|im_end\|>")):
        encoded(reasoned, family("qwen3"))


def test_contents_are_given_as_parts_where_the_template_wants_them(tmp_path):
    tokenizer = family("parts")
    begin = "<|im_start|>system\nBe kind<end_of_utterance>\n<|im_start|>user\nAsk me<end_of_utterance>\n<|im_start|>assistant\n"
    assert texts({**PAIR, "system": "Be kind"}, tokenizer)[0] == [begin, "Good<end_of_utterance>", "Bad<end_of_utterance>"]
    assert data.terminator(tokenizer) == tokenizer.convert_tokens_to_ids("<end_of_utterance>")


DATED = "{% if strftime_now is defined %}It is {{ strftime_now('%d %b %Y') }}, {{ strftime_now( \"%H\" ) }}.\n{% endif %}"
DATED += turns()


def test_a_template_is_told_one_date(tmp_path):
    tokenizer = tokenizer_with(DATED, byte_level(SPECIAL))
    path = write(tmp_path, "a.jsonl", [PAIR])
    begun = [tokenizer.decode(load(path, tokenizer, date=date)[0][0].prompt) for date in ("2024-03-01", "2025-12-31", "")]
    assert begun[0].startswith("It is 01 Mar 2024, 00.\n<|im_start|>") and begun[1].startswith("It is 31 Dec 2025, 00.\n")
    today = {
        time.strftime("It is %d %b %Y", time.localtime(time.time() - ago)) for ago in (0, 3600)
    }  # midnight may be just now
    assert begun[2][:17] in today and tokenizer.chat_template == DATED  # exported as it is
    assert data.asks_for_date(tokenizer) and not data.asks_for_date(family("smollm2"))
    with pytest.raises(UserError, match="date is 'yesterday'; write YYYY-MM-DD"):
        load(path, tokenizer, date="yesterday")
    unclear = tokenizer_with("{% set form = '%Y' %}{{ strftime_now(form) }}" + turns(), byte_level(SPECIAL))
    with pytest.raises(UserError, match="strftime_now something else than a text, so its date cannot be fixed"):
        load(path, unclear)


def test_arguments_of_the_template_for_a_whole_run(tmp_path):
    tokenizer, path = family("qwen3"), write(tmp_path, "a.jsonl", [PAIR])
    examples, _ = load(path, tokenizer, template_kwargs='{"enable_thinking": false}')
    assert tokenizer.decode(examples[0].prompt).endswith("<think>\n\n</think>\n\n")
    assert data.template_arguments(Reading(template_kwargs='{"a": 1}', date="2024-03-01")) == {
        "a": 1,
        "strftime_now": "2024-03-01",
    }
    for wrong in ("enable_thinking=false", "[1]", "3"):
        with pytest.raises(UserError, match="template_kwargs is not an object"):
            load(path, tokenizer, template_kwargs=wrong)
    with pytest.raises(UserError, match="template_kwargs has enable_thinkng, which is nowhere in the chat template"):
        load(path, tokenizer, template_kwargs='{"enable_thinkng": false}')
    for name in ("messages", "tokenize", "chat_template", "add_generation_prompt"):  # that are no arguments of a template
        with pytest.raises(UserError, match="multiple values"):
            encoded({**PAIR, "chat_template_kwargs": {name: True}}, tokenizer)


# ---- equal length ----------------------------------------------------------------------------------------------------


def test_equal_length_by_hand():
    pair = Example([1, 2], [[3, 4, 5], [6, 7]], where="f row 1")
    assert data.to_equal_length(pair) == Example([1, 2], [[3, 4], [6, 7]], where="f row 1")
    equal = Example([1, 2], [[3, 4], [6, 7]])
    assert data.to_equal_length(equal) == equal
    single = Example([1], [[2, 3]], True)
    assert data.to_equal_length(single) == single


def test_equal_length_of_a_share_depends_on_seed_and_ids_only():
    pairs = [Example([i], [[1, 2], [3]]) for i in range(400)]

    def cut(fraction, seed):
        return [data.to_equal_length(e, fraction, seed) != e for e in pairs]

    assert sum(cut(0.0, 0)) == 0 and sum(cut(1.0, 0)) == 400
    assert 140 < sum(cut(0.5, 0)) < 260  # 200 ± 10 expected
    assert cut(0.5, 0) == cut(0.5, 0) != cut(0.5, 1)
    assert all(b or not a for a, b in zip(cut(0.3, 0), cut(0.6, 0)))  # a larger share contains the smaller


def test_equal_length_is_a_setting_and_applies_after_the_cuts(tmp_path, chatml):
    path = write(tmp_path, "a.jsonl", [{**PAIR, "chosen": "Good day to you"}, {**PAIR, "chosen": "Bad"}])
    plain, _ = load(path, chatml)
    equal, report = load(path, chatml, equal_length=1)
    assert [list(map(len, e.responses)) for e in equal] == [[len(e.responses[1])] * 2 for e in plain]
    assert equal[0].responses[0] == plain[0].responses[0][: len(plain[0].responses[1])] and equal[1] == plain[1]
    assert report.cut == {"made equally long": 1}
    limit = len(plain[0].prompt)
    assert all(
        len(r) == 2
        for e in load(path, chatml, max_length=limit + 2, max_prompt_length=limit, equal_length=1)[0]
        for r in e.responses
    )
    with pytest.raises(UserError, match="share between 0 and 1"):
        load(path, chatml, equal_length=2)


# ---- quality ---------------------------------------------------------------------------------------------------------


def test_quality_by_hand():
    """What drops such rows is tests/tools/clean.py."""
    good, bad = [3, 4], [5]
    pairs = [
        Example([1], [good, bad]), Example([1], [good, bad], margin=2.0),  # the same again
        Example([1], [bad, good]),  # the opposite of both
        Example([1], [good, good]),
        Example([2], [bad, good]),  # another prompt: no conflict
    ]  # fmt: skip
    assert data.quality(pairs) == {"duplicates": 1, "identical responses": 1, "conflicts": 3}
    singles = [Example([1], [good], True), Example([1], [good], True), Example([1], [good], False), Example([1], [bad], False)]
    assert data.quality(singles) == {"duplicates": 1, "identical responses": 0, "conflicts": 3}


# ---- large data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["prompt", "chosen"])
def test_a_text_of_megabytes_costs_no_more_than_its_ids(tmp_path, chatml, side):
    """2 MB of words in a prompt or a response: the ids of the whole text's, of which 512 × 16 characters are read."""
    texts = {"prompt": "name two fruits", "chosen": "fig and pear", "rejected": "rice"}
    texts[side] = "".join(f"word{i} " for i in range(200_000)).strip()
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps(texts) + "\n")
    whole, _ = encode(Row([{"role": "user", "content": texts["prompt"]}], [texts["chosen"], texts["rejected"]]), chatml, 16, 8)
    seen = []
    tokenise = data._ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_ids", lambda tokenizer, text: seen.append(len(text)) or tokenise(tokenizer, text))
        examples, report = load(str(path), chatml, max_length=16, max_prompt_length=8)
    assert examples[0].prompt == whole.prompt and examples[0].responses == whole.responses
    assert max(seen) < 2 * 512 * 16 and report.cut["text above 512 characters per token of max_length cut beforehand"] == 1


def test_large_data_is_tokenised_in_parallel_cached_and_equal(tmp_path, chatml, monkeypatch, capsys):
    rows = [{**PAIR, "prompt": f"Ask {i}"} for i in range(300)] + [{**PAIR, "chosen": ""}, {**PAIR, "prompt": "Ask 7"}]
    path = write(tmp_path, "a.jsonl", rows)
    options = dict(equal_length=0.5, max_drop_fraction=0.5)
    small, small_report = load(path, chatml, **options)
    monkeypatch.setenv("PLAINPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "PARALLEL_FROM", 64)
    large, report = load(path, chatml, **options)
    assert not small.dataset.cache_files and large.dataset.cache_files  # one in memory, the other mapped from a file
    small = list(small)
    assert list(large) == small and report == small_report and len(large) == 301
    assert list(large[10:12]) == small[10:12] and large[-1] == small[-1]
    assert {Path(file["filename"]).parents[1] for file in large.dataset.cache_files} == {tmp_path / "cache"}

    def made():
        """{file of token ids: when it was written}; those of a table are in a folder of their own."""
        return {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").rglob("*.arrow")}

    def tables(files):
        return {f.parent for f in files}

    once = made()
    assert len(tables(once)) == 1 and f"{path}: tokenising 302 rows\n" in capsys.readouterr().err
    assert list(load(path, chatml, **options)[0]) == small and made() == once  # read back, not written again
    load(path, chatml, **options | {"max_drop_fraction": 1.0})
    assert made() == once
    assert "tokenising" not in capsys.readouterr().err
    load(path, chatml, max_length=100, **options)
    load(path, family("qwen2.5"), **options)
    assert len(tables(made())) == 3  # other settings, other tokenizer: another table
    write(tmp_path, "a.jsonl", rows[:200])
    assert len(load(path, chatml, **options)[0]) == 200 and len(tables(made())) == 4  # other content
    mixed, _ = load(f"{path}@2, {write(tmp_path, 'b.jsonl', rows[:2])}", chatml)
    assert len(mixed) == 402 and mixed[0] == mixed[1] and mixed[401].where.endswith("b.jsonl row 2")
    train, held_out = data.split_held_out(mixed, 10, 0)
    assert not {e.where for e in train} & {e.where for e in held_out}


def test_the_cache_key_holds_everything_that_an_outcome_depends_on(tmp_path, chatml, monkeypatch):
    path = write(tmp_path, "a.jsonl", [PAIR])

    def key(source=path, tokenizer=chatml, **more):
        return data._cache_key(source, tokenizer, Reading(**more))

    other_words, other_template = copy.deepcopy(chatml), copy.deepcopy(chatml)
    other_words.backend_tokenizer.normalizer = normalizers.Lowercase()
    other_template.chat_template += " "
    keys = [key(), key(path + "[:1]"), key(tokenizer=other_words), key(tokenizer=other_template)]
    changed = dict(
        max_length=9, max_prompt_length=9, format="pairs", columns="a=b", control_tokens=True, equal_length=0.5, seed=1,
        template_kwargs='{"a": 1}',
    )  # fmt: skip
    keys += [key(**{name: value}) for name, value in changed.items()]
    assert key(max_drop_fraction=0.5) == key(date="2024-03-01") == key(cache="there") == key()
    assert {*changed, "max_drop_fraction", "date", "cache"} == {f.name for f in fields(Reading)}
    dated = copy.deepcopy(chatml)
    dated.chat_template += "{{ strftime_now('%Y') }}"
    keys += [key(tokenizer=dated, date="2024-03-01"), key(tokenizer=dated, date="2025-03-01")]
    monkeypatch.setattr(data, "encode", byte_level)  # a function of another file
    assert len({*keys, key()}) == len(keys) + 1 == 4 + 8 + 2 + 1
    monkeypatch.undo()
    was, at = Path(path).read_text(), Path(path).stat()
    os.utime(path, ns=(1, 1))
    assert key() == keys[0]  # touched only
    Path(path).write_text(was.replace("Good", "Best"))
    os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))
    assert Path(path).stat().st_size == at.st_size and key() not in keys  # other content of the same size and time


def test_damaged_token_ids_are_made_again(tmp_path, chatml, monkeypatch, capsys):
    """A file cut, emptied, removed, a bit flipped in it; a marker that is none; and a file cut between two of its batches,
    which arrow reads without a word."""
    monkeypatch.setenv("PLAINPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "PARALLEL_FROM", 64)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    path = write(tmp_path, "a.jsonl", [{**PAIR, "prompt": f"Ask {i}"} for i in range(100)])
    expected = list(load(path, chatml)[0])
    (folder,) = [f for f in (tmp_path / "cache").iterdir() if f.is_dir()]
    first = folder / "ids_00000_of_00002.arrow"

    def flip():
        content = bytearray(first.read_bytes())
        content[len(content) // 2] ^= 1
        first.write_bytes(content)

    capsys.readouterr()
    damages = [lambda: os.truncate(first, 5000), lambda: os.truncate(first, 0), first.unlink, flip]
    damages += [lambda: os.truncate(first, first.stat().st_size - 8)]
    damages += [lambda text=text: (folder / "complete").write_text(text) for text in ("", "[]", "{}", "{", '{"a": 1}')]
    for damage in damages:
        damage()
        assert list(load(path, chatml)[0]) == expected
        assert capsys.readouterr().err.count("is damaged, or was not finished, and is made again") == 1
    assert list(load(path, chatml)[0]) == expected and "damaged" not in capsys.readouterr().err
    assert {f.name for f in (tmp_path / "cache").iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_a_small_source_starts_no_process_and_writes_no_cache(tmp_path, chatml, monkeypatch):
    monkeypatch.setenv("PLAINPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("multiprocess.Pool", None)  # that of datasets
    examples, _ = load(write(tmp_path, "a.jsonl", [PAIR] * 200), chatml)
    assert len(examples) == 200 and not (tmp_path / "cache").exists()


def test_examples_are_changed_when_asked_for(tmp_path, chatml):
    examples, _ = load(write(tmp_path, "a.jsonl", [{**PAIR, "prompt": f"Ask {i}"} for i in range(4)]), chatml)
    chosen = examples.mapped(lambda e: e._replace(responses=e.responses[:1]))
    marked = chosen.mapped(lambda e: e._replace(where=f"{len(e.responses)} of {e.where}"))
    assert list(chosen) == [e._replace(responses=e.responses[:1]) for e in examples] and len(examples[0].responses) == 2
    assert [e.where for e in marked[1:3]] == [f"1 of {e.where}" for e in examples[1:3]]


def test_an_unreadable_end_of_a_large_source_is_named_and_leaves_nothing(tmp_path, chatml, monkeypatch):
    monkeypatch.setenv("PLAINPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "PARALLEL_FROM", 64)
    rng = random.Random(0)
    rows = [{**PAIR, "prompt": f"Ask {rng.random()}"} for _ in range(2000)]  # more than one block of the decompressor's
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-5000])
    with pytest.raises(UserError, match="a.jsonl.gz: cannot be read after row"):
        load(str(tmp_path / "a.jsonl.gz"), chatml)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


LOADS = """
import os, signal, sys, time
import data
from templates import family

data.PARALLEL_FROM, outcome, how = 64, data._outcome, sys.argv[2]
os.cpu_count = lambda: 2
signal.signal(signal.SIGTERM, lambda *_: None)  # as a trainer that finishes its step first


def slow(item, **more):
    open(os.environ["MADE"], "a").write(item["where"] + "\\n")
    if item["where"].endswith("row 250"):
        if how == "parent":
            os.kill(os.getppid(), signal.SIGKILL)
        if how == "all":
            os.killpg(0, signal.SIGKILL)
    return outcome(item, **more)


data._outcome = slow
examples, report = data.load(sys.argv[1], family("smollm2"))
print(len(examples), examples[299].where)
"""


def loading(path, how, tmp_path):
    """A process, with a group of its own, that loads 300 rows; a line in `made` for every row that a worker has seen."""
    (tmp_path / "loads.py").write_text(LOADS)
    paths = os.pathsep.join([str(Path(data.__file__).parent), str(Path(__file__).parent)])
    env = os.environ | {"PYTHONPATH": paths, "PLAINPO_CACHE": str(tmp_path / "cache"), "MADE": str(tmp_path / "made")}
    command = [sys.executable, str(tmp_path / "loads.py"), path, how]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=env, start_new_session=True, **streams)


@pytest.mark.parametrize("killed", ["all", "parent"])
def test_a_killed_build_is_not_believed_and_two_processes_build_once(killed, tmp_path):
    """Workers that outlive their parent end their part and hold no lock; a SIGTERM handler that they inherit stops none."""
    path = write(tmp_path, "a.jsonl", [{**PAIR, "prompt": f"Ask {i}"} for i in range(300)])
    first = loading(path, killed, tmp_path)
    assert first.wait(timeout=120) == -signal.SIGKILL
    both = []
    try:
        (tmp_path / "made").unlink()
        both = [loading(path, "whole", tmp_path) for _ in range(2)]
        said = [process.communicate(timeout=120) for process in both]
    finally:
        for process in (first, *both):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert [out for out, _ in said] == [f"300 {path} row 300\n"] * 2, said
    if killed == "all":  # else a worker that was left may have made them
        made = (tmp_path / "made").read_text().splitlines()
        assert len(set(made)) == len(made)  # no row twice
        assert set(made) >= {f"{path} row {i}" for i in range(151, 301)}  # the other half may have been complete


# ---- step plan, microbatches, layouts --------------------------------------------------------------------------------


@pytest.mark.parametrize("n, size", [(1, 1), (7, 3), (9, 3), (5, 8)])
def test_step_plan_covers_every_row_once_and_depends_on_seed_and_epoch_only(n, size):
    plan = data.step_plan(n, size, seed=3, epoch=1)
    assert sorted(np.concatenate(plan)) == list(range(n))
    assert [len(step) for step in plan] == [size] * (n // size) + ([n % size] if n % size else [])
    again = data.step_plan(n, size, seed=3, epoch=1)
    assert all((a == b).all() for a, b in zip(plan, again))


def test_step_plans_differ_between_seeds_and_epochs():
    plans = {tuple(np.concatenate(data.step_plan(50, 8, seed, epoch)).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(plans) == 9


def test_split_held_out():
    rows = np.arange(20)

    def parts(n, seed):
        return [part.rows.tolist() for part in data.split_held_out(Examples(None, rows), n, seed)]

    train, held_out = parts(5, 0)
    assert len(held_out) == 5 and sorted(train + held_out) == rows.tolist()
    assert train == sorted(train) and held_out == sorted(held_out)
    assert parts(5, 0)[1] == held_out != parts(5, 1)[1]
    assert parts(0, 0) == [rows.tolist(), []]


def test_a_row_that_is_there_several_times_is_held_out_once():
    train, held_out = data.split_held_out(Examples(None, np.array([4, 4, 6, 6, 6, 9])), 2, seed=1)
    left_out = set(held_out.rows.tolist())
    assert len(held_out) == len(left_out) == 2 and left_out | set(train.rows.tolist()) == {4, 6, 9}
    assert not left_out & set(train.rows.tolist())


def test_split_by_tokens_by_hand():
    # 18 tokens in groups of at most 9: two groups end as 5+3 and 4+3+3 = 10, too much; three as 5 | 4+3 | 3+3
    assert data.split_by_tokens([5, 4, 3, 3, 3], 9) == [[0], [1, 4], [2, 3]]
    assert data.split_by_tokens([20, 1], 9) == [[0], [1]]  # an item above the budget is alone
    assert data.split_by_tokens([], 9, ranks=2) == [[], []]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_split_by_tokens_loses_nothing_and_keeps_the_budget(ranks, seed):
    sizes = np.random.default_rng(seed).integers(1, 40, size=1 + 13 * seed).tolist() + [99]
    groups = data.split_by_tokens(sizes, 64, ranks)
    assert len(groups) % ranks == 0
    assert sorted(i for g in groups for i in g) == list(range(len(sizes)))
    for g in groups:
        assert sum(sizes[i] for i in g) <= 64 or len(g) == 1


TWO = [Example([1, 2], [[3, 4, 5], [6]]), Example([7], [[8], [9, 10]])]


def test_padded_batch_by_hand():
    batch = data.padded_batch(TWO)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 6, 0, 0], [7, 8, 0, 0, 0], [7, 9, 10, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 4
    assert batch.index.tolist() == [1, 2, 3, 5 + 1, 10, 15, 16]  # the position before each scored token, rows of 5
    assert batch.targets.tolist() == [3, 4, 5, 6, 8, 9, 10]
    assert batch.response.tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert batch.lengths.tolist() == [3, 1, 1, 2] and batch.responses == 4 and batch.pairs is None


def test_packed_batch_by_hand():
    batch = data.packed_batch(TWO)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 1, 2]]  # both responses go on from their prompt
    assert batch.index.tolist() == [1, 2, 3, 1, 6, 6, 8]  # a response's first token is predicted by the prompt's last
    assert batch.targets.tolist() == [3, 4, 5, 6, 8, 9, 10]
    assert batch.response.tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert batch.lengths.tolist() == [3, 1, 1, 2] and batch.responses == 4
    assert batch.pairs == [(2, [3, 1]), (1, [1, 2])]
    assert sum(map(data.tokens_of, TWO)) == 10


@pytest.mark.parametrize("layout", data.LAYOUTS)
def test_batch_targets_decode_to_the_responses(layout, chatml):
    rows = [Row(TURNS, ["Good day", "No"]), Row(SPACES, [" well, ", "Ask the model"])]
    examples = [encode(r, chatml, 1000, 900)[0] for r in rows]
    batch = data.LAYOUTS[layout](examples)
    texts = [chatml.decode(batch.targets[batch.response == r]) for r in range(batch.responses)]
    assert texts == [r["content"] + "<|im_end|>" for row in rows for r in row.responses]
    assert batch.input_ids.flatten()[batch.index[0]] == examples[0].prompt[-1]


@pytest.mark.parametrize("layout", data.LAYOUTS)
def test_a_batch_of_nothing_scores_nothing(layout):
    batch = data.LAYOUTS[layout]([])
    assert batch.input_ids.shape == (1, 1) and len(batch.index) == batch.responses == len(batch.lengths) == 0
    assert batch.index.dtype == torch.long


def test_batches_move():
    batch = data.packed_batch(TWO).to("meta")
    assert batch.input_ids.device.type == batch.lengths.device.type == "meta" and batch.responses == 4


# ---- looking at data -------------------------------------------------------------------------------------------------


def test_show_by_hand():
    tokenizer = toy.word_tokenizer()
    ids = {w: tokenizer.convert_tokens_to_ids(w) for w in ("<user>", "cat", "pig", "<end>")}
    assert ids["<user>"] == 1 and ids["<end>"] == 3
    pair = Example([1], [[ids["cat"], 3], [ids["pig"], 3]], where="f row 1")
    small = {w: str(i).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")) for w, i in ids.items()}
    plain = ["prompt (1 tokens, not scored)", "<user>▏", "chosen (2 tokens, scored, ends with <end>)", "cat <end>"]
    assert data.show(pair, tokenizer, colour=False).splitlines()[1:5] == plain
    assert data.show(pair, tokenizer, colour=False, ids=True).splitlines() == [
        "── f row 1",
        "prompt (1 tokens, not scored)", "<user>₁▏",
        "chosen (2 tokens, scored, ends with <end>)", f"cat{small['cat']}<end>₃",
        "rejected (2 tokens, scored, ends with <end>)", f"pig{small['pig']}<end>₃",
    ]  # fmt: skip
    assert "\x1b[2m\x1b[4m<user>\x1b[24m▏\x1b[0m" in data.show(pair, tokenizer)  # dim, and underlined as a special token
    single = Example([1], [[ids["cat"]]], desirable=False)
    assert "completion (1 tokens, scored, no terminator, label false)" in data.show(single, tokenizer, colour=False)


def test_show_hides_the_beginning_of_long_prompts(chatml):
    turns = [user("A"), assistant("B"), user("C"), assistant("D"), user("E")]
    example, _ = encode(Row(turns, ["F", "G"]), chatml, 2048, 1792)
    assert "hidden" not in data.show(example, chatml, colour=False, tokens=len(example.prompt))
    end = chatml("<|im_start|>user\nE<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    said = data.show(example, chatml, colour=False, tokens=len(end))
    assert f"not scored, the first {len(example.prompt) - len(end)} hidden: --full shows them)\n<|im_start|>user\nE" in said


def test_what_would_steer_a_terminal_is_spelled_out(chatml):
    assert data.visible("a\tb\nc é 日") == "a\tb\nc é 日"
    assert data.visible("\x1b[31m\r\x00\u202e\x9b") == r"\x1b[31m\r\x00\u202e\x9b"
    example, _ = encode(Row(ASKED, ["\x1b]0;x\x07", "\r\x08"]), chatml, 2048, 1792)
    for ids in (False, True):
        said = data.show(example, chatml, colour=False, ids=ids)
        assert not set(said) & set("\x1b\x07\r\x08") and "\\x1b" in said and "\\r" in said


def test_messages_and_reports_spell_out_what_would_steer_a_terminal(tmp_path, chatml, capsys):
    """A file's name in an error, a column's in a report, on the command line."""
    name = str(tmp_path / "\x1bcgone.jsonl")
    with pytest.raises(SystemExit, match="2"):
        data.command_line(lambda argv: list(data.read(name)), [])
    said = capsys.readouterr().err
    assert r"\x1bcgone.jsonl: no such file" in said and "\x1b" not in said
    chatml.save_pretrained(tmp_path / "m")
    path = write(tmp_path, "\x9bm.jsonl", [PAIR, {**PAIR, "chosen": ""}])
    for command in ("stats", "show"):
        data.main([command, "--model", str(tmp_path / "m"), "--dataset", path])
        said = capsys.readouterr().out
        assert r"\x9bm.jsonl row 2: chosen is empty" in said and "\x9b" not in said


def test_a_log_that_cannot_be_written_stops_nothing(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        data.say("hello")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # so that it can be closed


def test_show_on_the_command_line(tmp_path, chatml, capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    chatml.save_pretrained(tmp_path / "model")
    path = write(tmp_path, "a.jsonl", [PAIR] * 3 + [{**PAIR, "chosen": ""}])
    data.main(["show", "--model", str(tmp_path / "model"), "--dataset", path, "-n", "2", "--max-length", "500"])
    printed = capsys.readouterr().out
    assert printed.count("── ") == 2 and f"{path} row 4: chosen is empty" in printed and "3 of 4 rows kept" in printed


def test_stats_by_hand():
    # lengths: prompts 1 and 4, chosen 2 and 3, rejected 8 and 3; bins of 1, 2–3, 4–7 and 8–15 tokens
    pairs = [Example([1], [[1, 2], [1] * 8]), Example([1] * 4, [[1, 2, 3], [3] * 3])]
    report = data.Report(3, 2, {"chosen is empty": 1}, ["f row 3: chosen is empty"], {"prompt cut": 1}, ["f: format x"])
    lines = data.stats(pairs, report).splitlines()
    assert lines[:4] == [
        "2 of 3 rows kept, 1 prompt cut", "  f: format x", "  dropped 1: chosen is empty",
        "    f row 3: chosen is empty",
    ]  # fmt: skip
    table = {line.split()[0]: line.split()[1:] for line in lines[5:9]}
    assert table["prompt"] == ["2.5", "2", "4", "4", "4", "5"]
    assert table["chosen"] == ["2.5", "2", "3", "3", "3", "5"]
    assert table["rejected"] == ["5.5", "6", "8", "8", "8", "11"]
    bars = [line.split() for line in lines[11:15]]
    assert [b[:3] for b in bars] == [["1", "–", "1"], ["2", "–", "3"], ["4", "–", "7"], ["8", "–", "15"]]
    assert bars[1][3:] == ["█" * 18, "2", "█" * 9, "1"] and bars[3][3:] == ["█" * 9, "1"]
    assert lines[16] == "chosen is longer in 0.0% of the pairs, as long in 50.0%, shorter in 50.0%; by -3.0 tokens on average"
    single = [Example([1], [[1]], True), Example([1], [[1]], False), Example([1], [[1]], False), Example([1], [[1]], False)]
    assert "25.0% of the rows are desirable" in data.stats(single, report).splitlines()


def test_stats_end_with_what_to_do():
    report = data.Report(
        82, 80, {"chosen is empty": 2}, [], {"response cut": 5, "prompt cut": 9}, []
    )  # fmt: skip
    said = data.advice(report, bias=0.5)
    assert [line.split(": ")[-1] for line in said] == [
        "raise --max_length", "raise --max_length or --max_prompt_length", "simpo, rdpo or --equal_length 1",
        "mend them, or see --format and --columns",
    ]  # fmt: skip
    assert data.advice(report._replace(rows=80, cut={"prompt cut": 8}), bias=-0.5) == []
    assert len(data.advice(report._replace(rows=80, cut={"prompt cut": 9}))) == 1
    said = data.stats([Example([1], [[1, 2], [1]])] * 4, report)
    assert said.endswith("see --format and --columns") and "→ the chosen responses are longer" in said


def test_devices(monkeypatch):
    assert data.device_named("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert data.device_named("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "gpu", "meta", "", "cpu:0"):
        with pytest.raises(UserError, match=f"device is '{name}'; accepted are auto, cpu"):
            data.device_named(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(data.device_named(name)) for name in ("auto", "cuda", "cuda:1")] == ["cuda", "cuda", "cuda:1"]
    with pytest.raises(UserError, match="device is 'cuda:7'; accepted are auto, cpu, cuda, cuda:0, cuda:1"):
        data.device_named("cuda:7")


def test_the_other_commands(tmp_path, chatml, capsys):
    chatml.save_pretrained(tmp_path / "model")
    scored = write(tmp_path, "s.jsonl", [SCORED, SCORED, {**SCORED, "prompt": "Beg", "scores": [1, 1]}])
    data.main(["stats", "--model", str(tmp_path / "model"), "--dataset", scored])
    printed = capsys.readouterr().out
    assert "2 of 3 rows kept" in printed and "format scored" in printed and f"dropped 1: {data.TIE}" in printed
    assert "  1 duplicates: tests/tools/clean.py drops them\n" in printed
    with pytest.raises(SystemExit) as error:
        data.main(["show", "--model", str(tmp_path), "--dataset", scored])
    assert error.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_command_line_errors_are_one_message_and_code_2(tmp_path):
    command = [sys.executable, data.__file__, "show", "--model", str(tmp_path), "--dataset", "gone.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.startswith("error: ")


def run(*argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, **env):
    """(code, output, messages) of data.py as a process."""
    command = [sys.executable, data.__file__, *map(str, argv)]
    done = subprocess.run(command, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, env=os.environ | env)
    return done.returncode, (done.stdout or b"").decode("ascii", "replace"), done.stderr.decode()


def test_outputs_of_every_kind(chatml, tmp_path):
    """ASCII only, full, and closed by its reader."""
    chatml.save_pretrained(tmp_path / "model")
    source = write(tmp_path, "s.jsonl", [{"prompt": "A", "chosen": "ünï", "rejected": "b"}] * 3)
    stats = ("stats", tmp_path / "model", source)
    code, out, err = run(*stats, PYTHONIOENCODING="ascii")
    assert code == 0 and err == "" and "\\u2588" in out and "3 of 3 rows kept" in out
    with open("/dev/full", "w") as full:
        assert run(*stats, stdout=full)[::2] == (2, "error: the output: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        assert run(*stats, stdout=closed)[::2] == (0, "")


def test_command_line_hands_on_what_is_no_mistake_of_its_owner(tmp_path, capsys):
    told = []

    def ended(error):
        return data.command_line(functools.partial(fails, error), [], fail=told.append)

    def fails(error, argv):
        raise error

    for error in (
        UserError("so"),
        FileNotFoundError(2, "gone", "f"),
        OSError(28, "full"),
        torch.OutOfMemoryError("3 GiB\nmore"),
    ):
        ended(error)
    assert list(map(str, told)) == [
        "so",
        "f: gone",
        "the output: full",
        "the GPU's memory is too small; lower --batch_size (3 GiB)",
    ]
    assert all(isinstance(error, UserError) for error in told)
    assert data.command_line(lambda argv: len(argv), ["a", "b"]) == 2
    for error in (OSError("of a library"), ValueError("x")):
        with pytest.raises(type(error)):
            ended(error)


def test_did_you_mean():
    assert data.did_you_mean("Simp", ["dpo", "simpo"]) == "; did you mean simpo?" and data.did_you_mean("zzz", ["dpo"]) == ""


# ---- progress and command lines --------------------------------------------------------------------------------------


@dataclass
class Work:
    """What to do."""

    source: str = data.setting(MISSING, "what to read")
    out: str = data.setting(MISSING, "what to write")
    batch_size: int = data.setting(8, "rows, 8 % of all")
    rate: float | None = data.setting(None, "speed", aliases="-r")
    fast: bool = data.setting(False, "hurry")


def work(argv):
    hints = {"speed": "rate is its name here", "batch": "batches are counted in rows"}
    return data.parse(Work, argv, "work.py", "Works.\n\n    python work.py a b\n    as typed", hints)


def test_leading_words_fill_what_has_no_default():
    assert work(["a", "b", "--batch-size", "3"]) == work(["--out", "b", "--source=a", "--batch_size=3"]) == Work("a", "b", 3)
    assert work(["a", "--out", "b", "-r", "0.5", "--fast"]) == Work("a", "b", 8, 0.5, True)
    assert work(["--out=b", "--batch_size=4", "--source", "a", "--out", "c"]) == Work("a", "c", 4)  # the last one wins


def test_what_cannot_be_parsed():
    for argv, said in (
        (["a", "b", "c", "--fats", "1"], r"unknown setting c --fats 1; did you mean fast\?"),
        (["a", "b", "--batch", "1"], "unknown setting --batch 1; batches are counted in rows"),  # a hint before a guess
        (["a", "b", "--speed=9"], "unknown setting --speed=9; rate is its name here"),
        (["a", "b", "--train-batch-size=1"], r"unknown setting --train-batch-size=1; did you mean batch_size\?"),
        (["a", "b", "--zzz"], "unknown setting --zzz"),
        (["a", "b", "--batch-size", "9" * 5000], "batch-size: invalid int value: '9{200,300}"),
        (["a", "b", "--batch-size", str(2**63)], f"batch_size is {2**63}; it must be a finite number below 2⁶³"),
        (["a", "b", "-r", "nan"], "rate is nan; it must be a finite number"),
        (["a", "b", "-r", "1e999"], "rate is inf; it must be a finite number"),
        (["a"], "required: --out"),
        (["a", "b", "-r", "hot"], "invalid float value: 'hot'"),
        (["a", "b", "--fast", "perhaps"], "perhaps"),
    ):
        with pytest.raises(UserError, match=f"{said}(.|\n)*; `python work.py --help` lists all settings"):
            work(argv)


def test_help_shows_texts_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        work(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "Works.\n\n    python work.py a b\n    as typed" in said
    assert "usage: work.py SOURCE OUT [options]" in said
    assert "rows, 8 % of all (default: 8)" in said and "--batch_size" in said and "--batch-size" in said


def test_commands(capsys):
    table = {"do": (Work, lambda w: w.batch_size), "say": (Reading, lambda how: how.format)}

    def run(*argv):
        return data.commands(list(argv), "work.py", "Works.", table)

    assert run("do", "a", "b", "--batch-size", "3") == 3 and run("say") == "auto"
    with pytest.raises(SystemExit) as stop:
        run("--help")
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "Works." in said and "do        What to do." in said and "say       How rows" in said
    for argv in ([], ["done"], ["--fast"]):
        with pytest.raises(UserError, match="there are do, say"):
            run(*argv)
    with pytest.raises(UserError, match=r"sey is no command; did you mean say\?; there are do, say"):
        run("sey")
    with pytest.raises(UserError, match="`python work.py do --help`"):
        run("do", "a", "b", "--slow")


@pytest.mark.parametrize("command", data.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        data.main([command, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and f"usage: data.py {command}" in said and "(default: " in said


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_is_a_bar_that_goes_away(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = data.progress(None, "work", "rows", total=10, initial=4)
    bar.update(3)
    bar.set_postfix(loss="0.5")
    assert "work:  70%" in sys.stderr.getvalue() and "7/10" in sys.stderr.getvalue() and "loss=0.5" in sys.stderr.getvalue()
    bar.close()
    assert sys.stderr.getvalue().endswith("\r") and "\n" not in sys.stderr.getvalue()


def test_progress_elsewhere_is_drawn_now_and_then(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(data, "DRAWN_EVERY", 0.2)
    start = time.monotonic()
    for i in (bar := data.progress(range(100), "work", "rows")):
        time.sleep(0.006)
        bar.set_postfix(loss=i, refresh=False)
    longest = (time.monotonic() - start) / 0.2
    drawn = sys.stderr.getvalue().splitlines()
    assert 2 <= len(drawn) <= longest and all("work:" in text and "/100" in text and "loss=" in text for text in drawn)
    assert not set("\r\x1b") & set(sys.stderr.getvalue())


def test_progress_within_progress_elsewhere_is_lines_too(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(data, "DRAWN_EVERY", 0.0)
    for _ in data.progress(range(2), "train", "steps"):
        with data.progress(None, "evaluate", "batches") as inner:
            inner.update()
    lines = sys.stderr.getvalue().splitlines()
    assert {line.split(":")[0] for line in lines} == {"train", "evaluate"} and not set("\r\x1b") & set("".join(lines))
    assert all(("left" in line) == line.startswith("train") for line in lines)  # where no end is known


def test_progress_of_short_work_says_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for i in (bar := data.progress(range(1000), "work", "rows")):
        bar.set_postfix(loss=i, refresh=False)
    assert sys.stderr.getvalue() == ""


def test_progress_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(data.progress([1, 2], "work", "rows", disable=True)) == [1, 2]
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", None)  # a process without one
    assert list(data.progress([1, 2], "work", "rows")) == [1, 2]


# ---- the shared sets, where they are at hand -------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared sets are not part of the project")
@pytest.mark.parametrize(
    "file, kept", [("hh_harmless.jsonl.gz[:150]", 150), ("sharegpt_pairs.json[:40]", 40), ("unpaired.jsonl[:40]", 40)]
)
def test_real_files(file, kept, chatml):
    examples, report = load(str(SHARED / file), chatml, max_length=20_000)
    assert report.kept == len(examples) >= kept - 1
    for e in examples:
        assert all(chatml.decode(r).endswith("<|im_end|>") and chatml.decode(r).count("<|im_end|>") == 1 for r in e.responses)
