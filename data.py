"""Preference data.

Rows → checks → token ids → step plan → padded or packed microbatches. A row of any accepted format becomes prompt
messages and one or more responses (`Row`), then token ids (`Example`): the prompt as the chat template renders it with the
generation prompt, and for each response exactly the ids that generation would have to produce after it, terminator included.
What does not fit is dropped, counted and reported with its file and row number.

    python data.py show  --model MODEL --dataset FILE -n 3      # rows in colour
    python data.py stats --model MODEL --dataset FILE           # lengths, length bias, duplicates, what is dropped and why

Shape letters: B examples · R responses · T tokens of a batch · N scored tokens.
"""

import argparse
import codecs
import contextlib
import datetime
import errno
import fcntl
import functools
import glob
import gzip
import hashlib
import heapq
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_log

from logprobs import to_device
from losses import did_you_mean

if TYPE_CHECKING:  # pyarrow, datasets and transformers' models are imported where they are used: --help comes at once
    from datasets import Dataset


class UserError(Exception):
    """A user error: what was wrong, where, what to do. Every command line prints it and ends with code 2."""


def refuse_unless_known(name: str, value: str, known: Iterable[str]) -> None:
    """UserError that names the setting, its value and what is accepted."""
    if value not in known:
        raise UserError(f"{name} is {value!r}; accepted are {', '.join(known)}{did_you_mean(value, known)}")


def device_named(name: str) -> torch.device:
    """ "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1" as a device; UserError where it is not here."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = ["cuda", *(f"cuda:{i}" for i in range(count))] if count else []
    apple = ["mps"] if torch.backends.mps.is_available() else []
    refuse_unless_known("device", name, ["auto", "cpu", *gpus, *apple])
    if name == "mps":
        say("device mps: nobody has tried this yet")
    return torch.device(("cuda" if count else "cpu") if name == "auto" else name)


def bf16_in_hardware(device: torch.device) -> bool:
    """Whether the device multiplies bf16 itself; where it is emulated, fp32 is many times faster."""
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


HUB_SECONDS = 5.0  # that the hub has for its first answer


@functools.cache
def reachable(name: str, kind: str = "model") -> None:
    """UserError within seconds where a name (of a "model" or "dataset") is neither a path nor on the hub nor in its cache.

    The hub is asked once; its own client would try for a minute. Where it does not answer, the process goes on offline.
    """
    from huggingface_hub import HfApi, constants, errors

    if os.path.exists(os.path.expanduser(name)):
        return
    absent = f"{name[:200]}: no such file or folder, and"
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=HUB_SECONDS)
    except (errors.RepositoryNotFoundError, errors.HFValidationError):  # the latter without asking: ./x, a/b/c
        raise UserError(f"{absent} no such {kind} on the hub (or a private one)") from None
    except errors.HfHubHTTPError:  # it is there and says something else, which the loader will report
        return
    except Exception:  # the HTTP client raises many kinds; all mean that there was no answer
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
        if not Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}").is_dir():
            raise UserError(f"{absent} the hub cannot be reached (offline?), nor is such a {kind} in its cache") from None


def setting(default, text: str, **more):
    """A field of a dataclass that is read from a command line; MISSING stands for one that must be given."""
    return field(default=default, metadata={"help": text.replace("%", "%%")} | more)


def checksum(file: Path) -> list[int]:
    """[bytes, CRC-32] of a file; a second or so for a GB."""
    crc = 0
    with open(file, "rb") as opened:
        while piece := opened.read(2**22):
            crc = zlib.crc32(piece, crc)
    return [file.stat().st_size, crc]


def brief(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Row(NamedTuple):
    """One checked row: a prompt and the responses to compare ([chosen, rejected]) or to judge ([completion] and its label)."""

    prompt: list[dict]  # messages {role, content, …}: whatever else a chat template may read, such as tool_calls, stays
    responses: list[dict]  # assistant messages
    desirable: bool | None = None  # None for pairs
    margin: float | None = None  # score of chosen less score of rejected, where the data has scores
    template: dict = {}  # the row's own arguments of `apply_chat_template`: tools, enable_thinking, …


def answer(text: str) -> dict:
    """A response that is only text."""
    return {"role": "assistant", "content": text}


class Example(NamedTuple):
    """One row as token ids. Training scores the responses only."""

    prompt: list[int]
    responses: list[list[int]]
    desirable: bool | None = None
    where: str = ""  # file and row, for messages
    margin: float | None = None  # score of chosen less score of rejected, where the data has scores
    asked: str = ""  # the beginning of the last user turn, for messages


# ---- reading ---------------------------------------------------------------------------------------------------------


SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
SAVED = "state.json"  # stands for the dataset that `save_to_disk` wrote into its folder
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")  # beside data
SPLITS = ("train", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")


def read(dataset: str) -> Iterator[tuple[str, dict | Exception]]:
    """Yield (where, row) from one source of rows; an unreadable row is yielded as its error.

    Args:
        dataset: a path ending in .json, .jsonl, either with .gz, or .parquet; a folder of such files, or one that
            `save_to_disk` wrote; a pattern, "data/*.jsonl"; either with ":split" behind it; or a hub name, "org/name",
            "org/name:split" or "org/name:config:split" (the split is train if not given). A slice takes some of the rows:
            "pairs.jsonl[:1000]".
    Raises:
        UserError: nothing there, files of several splits and none named, or a file that cannot be read at all.
    """
    return ((item["where"], _parsed(item["row"])) for item in _rows(dataset))


def _decoded(text: bytes):
    # bytes that are not UTF-8 become lone surrogates, which _text reports for the row that holds them
    return json.loads(text.decode("utf-8-sig", "surrogateescape"))


def _parsed(text: bytes) -> dict | UserError:
    try:
        return _decoded(text)
    except (ValueError, RecursionError) as error:
        return UserError(f"not valid JSON ({error})")


def _rows(dataset: str) -> Iterator[dict]:
    """The rows of a source as {"where": file and number, "row": its JSON}."""
    name, cut = _cut(dataset)
    rows = _numbered(name)
    if cut is None:
        return rows
    first, last = (int(x[:18]) if x else None for x in cut[1:-1].split(":"))  # no file has 10¹⁸ rows
    if min(first or 0, last or 0) < 0:
        return iter(list(rows)[first:last])
    return itertools.islice(rows, first, last)


def _cut(dataset: str) -> tuple[str, str | None]:
    return re.fullmatch(r"(.*?)(\[-?\d*:-?\d*\])?", dataset, re.DOTALL).groups()


def _numbered(name: str) -> Iterator[dict]:
    for source in _files(name) or [name]:
        number = 0
        try:
            for number, line in enumerate(_lines(source), 1):
                if line.strip():
                    yield {"where": f"{source} row {number}", "row": line}
        except UserError:
            raise
        except Exception as error:  # gzip, json, pyarrow and the hub's client raise many kinds
            after = f" after row {number}" if number else ""
            raise UserError(f"{source}: cannot be read{after} ({brief(error)})") from error


def _files(name: str) -> list[Path] | None:
    """The files that a name stands for, or None if it can only be a hub name. Hidden files of a folder are not data."""
    path = os.path.expanduser(name)
    split = None
    if os.path.isfile(path):
        return [Path(path)]
    if not os.path.isdir(path):
        path, split = re.fullmatch(r"(.*?)(?::([\w-]+))?", path, re.DOTALL).groups()
    pattern = os.path.join(glob.escape(path), "**") if os.path.isdir(path) else path
    if glob.has_magic(pattern):
        found = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
        found = [file for file in found if _is_data(file)]
        if not found:
            raise UserError(f"{name[:200]}: no data file there; looked for {', '.join(SUFFIXES)}")
        return _one_split(path, found, split)
    if name.startswith((".", "/", "~")) or path.endswith(SUFFIXES):
        raise UserError(f"{name[:200]}: no such file or folder")
    return None


def _is_data(file: Path) -> bool:
    if (file.parent / SAVED).is_file() and (file.parent / "dataset_info.json").is_file():
        return file.name == SAVED
    return file.name.endswith(SUFFIXES) and file.name not in DESCRIPTIONS


def _one_split(path: str, files: list[Path], split: str | None) -> list[Path]:
    """Those of a split, or all where they are of one; UserError that names the splits of a folder or pattern."""
    root = path if os.path.isdir(path) else os.path.dirname(re.split(r"[*?[]", path)[0]) or "."
    files_of = {}
    for file in files:
        files_of.setdefault(_split_said(os.path.relpath(file, root)), []).append(file)
    if split is None and len(files_of) == 1:
        return files
    if split not in files_of:
        there = ", ".join(f"{path[:200]}:{said} ({os.path.relpath(of[0], root)})" for said, of in list(files_of.items())[:6])
        wrong = "files of several splits, which are not trained on together" if split is None else f"no split {split!r}"
        raise UserError(f"{path[:200]}: {wrong}; give one of {there}")
    return files_of[split]


def _split_said(file: str) -> str:
    """The split that a file's name says, else the nearest folder's; without any, train.

    Shards are called SPLIT-00000-of-00004: test_prefs for "data/test_prefs-00000-of-00004.parquet".
    """
    for name in reversed(Path(file).parts):
        said = [word for word in re.findall("[a-z]+", name.lower()) if word in SPLITS]
        if said:
            shard = re.match(r"(.+)-\d+-of-\d+", name)
            return shard[1] if shard else said[0]
    return "train"


def _lines(source: Path | str) -> Iterator[bytes]:
    """The rows of a file or hub name as JSON; those of JSON lines as they stand, so that a bad one costs one row only."""
    from datasets import load_dataset, load_from_disk

    if isinstance(source, str):
        rows = _hub(source)
    elif source.name == SAVED:
        rows = load_from_disk(str(source.parent))
    elif source.suffix == ".parquet":
        rows = load_dataset("parquet", data_files=str(source), split="train", streaming=True)
    elif source.name.endswith(SUFFIXES):
        opened = gzip.open if source.suffix == ".gz" else open
        with opened(source, "rb") as lines:
            yield from _split(lines.read()) if ".json" in source.suffixes else lines
        return
    else:
        raise UserError(f"{source}: unknown kind of file; accepted are {', '.join(SUFFIXES)}")
    for row in rows:
        yield json.dumps(row, default=str).encode()


def _split(text: bytes) -> list[bytes]:
    """The rows of a .json file: of the list that it is, else its lines, as of JSON lines under another name."""
    if not text.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return text.split(b"\n")
    return [json.dumps(row).encode() for row in _decoded(text)]


@functools.lru_cache(maxsize=8)
def _hub(name: str) -> "Dataset":
    from datasets import config as settings
    from datasets import load_dataset
    from huggingface_hub import constants

    path, *rest = name.split(":")
    config = rest[0] if len(rest) == 2 else None
    split = rest[-1] if rest else ""
    reachable(path, "dataset")
    settings.HF_HUB_OFFLINE |= constants.HF_HUB_OFFLINE  # found out just now
    return load_dataset(path, config, split=split or "train")


def _sources(dataset: str) -> list[tuple[str, float]]:
    """ "a.jsonl, org/name:split@0.5" → [("a.jsonl", 1.0), ("org/name:split", 0.5)]."""
    sources = []
    for part in [dataset] if os.path.exists(dataset) else dataset.split(","):
        name, weight = re.fullmatch(r"(.*?)(?:@(\d+(?:\.\d+)?))?", part.strip(), re.DOTALL).groups()
        if not name or weight is not None and not 0 < float(weight) <= 1000:
            how = "sources with commas between, each with an optional weight above 0 and at most 1000: a.jsonl, b.jsonl@0.5"
            raise UserError(f"dataset is {dataset[:400]!r}: write {how}")
        sources.append((name, float(weight or 1)))
    return sources


# ---- checking: any format → Row --------------------------------------------------------------------------------------

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
ROLES |= {"function_call": "assistant", "observation": "tool", "function": "tool"}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
CALLS = ("tool_calls", "function_call")  # of a message that may be without text
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of it
SYSTEMS = ("system", "system_prompt")  # columns


def _text(value, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} is {'missing' if value is None else 'a ' + type(value).__name__}, not text")
    if not value.strip():
        raise UserError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} is not valid unicode (a lone surrogate, or bytes that are not UTF-8)") from None
    return value


KEY = r"""["'](?:role|from|content|value)["']\s*:"""
SPELLED = re.compile(  # messages as JSON, or as Python prints them
    rf"""\s*\[?\s*{{\s*(?={KEY}).*["'](role|from)["']\s*:\s*["']({"|".join((*KNOWN_ROLES, *ROLES))})["']""", re.DOTALL
)


def _plain_text(value: str, what: str) -> str:
    if SPELLED.match(value):
        raise UserError(f"{what} is a string that spells messages ({value[:20]!r} …); give the list itself, json.loads of it")
    return _text(value, what)


def _nested(value, kind: type, what: str):
    """A list of objects or an object, which may be spelled as JSON, as in tables of texts."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, kind) or kind is list and not all(isinstance(x, dict) for x in value):
        raise UserError(f"{what} is not {'a list of objects' if kind is list else 'an object'}, nor JSON that spells one")
    return _without_nulls(value)


def _without_nulls(value, depth: int = 0):
    """A nested value less the keys that are null: tables give every object the keys of all others."""
    if depth > 100:
        raise UserError("a message or its tools are nested deeper than 100 levels")
    if isinstance(value, dict):
        return {key: _without_nulls(x, depth + 1) for key, x in value.items() if x is not None}
    return [_without_nulls(x, depth + 1) for x in value] if isinstance(value, list) else value


def _refuse_media(found: Iterable[str], what: str) -> None:
    for name in found:
        if name.rstrip("s").removesuffix("_url") in ("image", "video", "audio"):
            raise UserError(f"{what} has {name}, and only texts are seen here")


def _joined_parts(parts: list, what: str) -> str:
    """A content that is a list of parts as one text."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        texts.append(part.get("text") if isinstance(part, dict) else part)
        if kind != "text" or not isinstance(texts[-1], str):
            raise UserError(f"{what} has a part of type {str(kind)[:40]}, and only texts are seen here")
    return "".join(texts)


def _message(value, what: str) -> dict:
    """{role, content} or ShareGPT's {from, value} with the usual role name; every other key that is not empty stays."""
    if not isinstance(value, dict):
        raise UserError(f"{what} is a {type(value).__name__}, not {{role, content}}")
    role = value.get("role", value.get("from"))
    if not isinstance(role, str) or not role:
        raise UserError(f"{what} has no role")
    if ROLES.get(role, role) not in KNOWN_ROLES:
        raise UserError(f"{what} has the unknown role {role[:40]!r}; known are {', '.join((*KNOWN_ROLES, *ROLES))}")
    more = {key: x for key, x in value.items() if key not in ("role", "from", "content", "value")}
    if more.get("tool_calls"):
        more["tool_calls"] = _nested(more["tool_calls"], list, f"{what}: tool_calls")
    more = {key: x for key, x in _without_nulls(more).items() if x not in ("", [], {})}
    _refuse_media(more, what)
    content = value.get("content", value.get("value"))
    if isinstance(content, list):
        content = _joined_parts(content, what)
    without_text = content is None or isinstance(content, str) and not content.strip()
    content = content or "" if without_text and more.keys() & CALLS else _text(content, what)
    return {"role": ROLES.get(role, role), "content": content, **more}


def _messages(value, what: str) -> list[dict]:
    """A list of messages; text is one user turn."""
    if isinstance(value, str):
        return [{"role": "user", "content": _plain_text(value, what)}]
    if not isinstance(value, (list, tuple)) or not value:
        raise UserError(f"{what} is {'missing' if value is None else 'neither text nor a non-empty list of messages'}")
    return [_message(message, f"{what} message {i}") for i, message in enumerate(value, 1)]


def _response(value, what: str) -> dict:
    """A response given as text, as one assistant message, or as a list with one."""
    if isinstance(value, str):
        return answer(_plain_text(value, what))
    messages = _messages([value] if isinstance(value, dict) else value, what)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise UserError(f"{what} is not a single assistant message")
    return messages[0]


PROMPTS = ("conversations", "prompt", "question", "instruction", "query", "input")  # columns that can be the prompt


def prompt_columns(row: dict) -> list[str]:
    """The columns that are the prompt of a row, mostly one; alpaca has an instruction and an input. [] where none can be it."""
    there = [name for name in PROMPTS if name in row]
    filled = [name for name in there if row[name] not in (None, "")] or there[:1]
    if filled == ["input"] and "instruction" in row:
        return ["instruction"]
    return filled[:1] if filled[:1] in (["conversations"], ["prompt"]) else filled


def prompt_of(row: dict) -> list[dict]:
    """The messages of a row's prompt column; an instruction and its input are joined by a blank line."""
    names = prompt_columns(row) or ["prompt"]
    if names == ["instruction", "input"]:
        return [{"role": "user", "content": "\n\n".join(_text(row[name], name) for name in names)}]
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)} could each be the prompt; name one: --columns prompt={names[0]}")
    return _messages(row.get(names[0]), names[0])


def _row(row: dict, prompt: list[dict], responses: list[dict], **more) -> Row:
    """A checked row of these messages, with what other columns say: a system text in front, and the template's arguments."""
    _refuse_media([name for name, x in row.items() if x], "the row")
    for name in SYSTEMS:
        if row.get(name) in (None, ""):
            continue
        message = {"role": "system", "content": _text(row[name], name)}
        if prompt[0]["role"] != "system":
            prompt = [message, *prompt]
        elif prompt[0] != message:
            raise UserError(f"the prompt begins with another system message than the column {name} has")
    if prompt[-1]["role"] == "assistant":
        raise UserError("the prompt ends with an assistant turn, so there is nothing to answer")
    template = _nested(row.get("chat_template_kwargs") or {}, dict, "chat_template_kwargs")
    tools = _nested(row.get("tools") or [], list, "tools")
    return Row(prompt, responses, template=template | ({"tools": tools} if tools else {}), **more)


def _hh_messages(text: str, what: str) -> list[dict]:
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + _text(text, what).lstrip())
    if parts[0].strip() or len(parts) < 3:
        raise UserError(f'{what} is not a transcript of "\\n\\nHuman:" and "\\n\\nAssistant:" turns')
    messages = []
    for who, said in zip(parts[1::2], parts[2::2]):
        content = _text(said.strip(), f"{what} turn {len(messages) + 1}")
        messages.append({"role": "user" if who == "Human" else "assistant", "content": content})
    return messages


def _last_turns(row: dict, chosen: list[dict], rejected: list[dict], **more) -> Row:
    """Two whole conversations that differ in the last, assistant, turn only."""
    for what, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise UserError(f"{what} does not end with an assistant turn")
        if len(messages) < 2:
            raise UserError(f"{what} has no prompt before the response")
    if chosen[:-1] != rejected[:-1]:
        raise UserError("chosen and rejected answer different prompts")
    return _row(row, chosen[:-1], [chosen[-1], rejected[-1]], **more)


def _score(value, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise UserError(f"{what} is {str(value)[:40]!r}, not a finite number")
    return float(value)


def _scores(value, what: str, count: int | None = None) -> list[float]:
    if not isinstance(value, (list, tuple)) or len(value) < 2 or count not in (None, len(value)):
        raise UserError(f"{what} is not a list of {count or 'two or more'} numbers")
    return [_score(v, what) for v in value]


def _margin(row: dict) -> float | None:
    """How much better the chosen response was scored, if the row says so."""
    if row.get("score_chosen") is not None and row.get("score_rejected") is not None:
        return _score(row["score_chosen"], "score_chosen") - _score(row["score_rejected"], "score_rejected")
    if row.get("all_rm_scores") is not None:
        scores = _scores(row["all_rm_scores"], "all_rm_scores")
        return max(scores) - min(scores)
    return None


def from_pair(row: dict) -> Row:
    """{prompt, chosen, rejected}: text or messages; responses may repeat the whole conversation (UltraFeedback, SimPO's sets).

    Scores, if there, give the margin: {score_chosen, score_rejected}, or {all_rm_scores} of which these are best and worst.
    """
    margin = _margin(row)
    chosen = row.get("chosen")
    rejected = row.get("rejected")
    if not all(isinstance(value, (list, tuple)) and len(value) > 1 for value in (chosen, rejected)):
        prompt = prompt_of(row)
        return _row(row, prompt, [_response(chosen, "chosen"), _response(rejected, "rejected")], margin=margin)
    chosen = _messages(chosen, "chosen")
    rejected = _messages(rejected, "rejected")
    asked = [row[name] for name in prompt_columns(row)]
    if chosen[0]["role"] == "assistant" or not all(value is None or isinstance(value, str) for value in asked):
        prompt = prompt_of(row)
        chosen = _after(prompt, chosen)
        rejected = _after(prompt, rejected)
    return _last_turns(row, chosen, rejected, margin=margin)


def _after(prompt: list[dict], messages: list[dict]) -> list[dict]:
    """The whole conversation of a response of several turns, which repeats the prompt or goes on from it."""
    without_system = messages[1:] if messages[0]["role"] == "system" else messages
    if prompt in (messages[: len(prompt)], without_system[: len(prompt)]):
        return messages
    if messages[0]["role"] in ("system", prompt[-1]["role"]):
        raise UserError("a response of several turns begins with another prompt than the row has")
    return prompt + messages


def from_hh(row: dict) -> Row:
    """{chosen, rejected}: Anthropic-HH transcripts of "Human:" and "Assistant:" turns that share all but the last."""
    return _last_turns(row, _hh_messages(row.get("chosen"), "chosen"), _hh_messages(row.get("rejected"), "rejected"))


def from_implied(row: dict) -> Row:
    """{chosen, rejected}: whole conversations as messages; or texts, whose common beginning, up to a space, is the prompt."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, (list, tuple)) and isinstance(rejected, (list, tuple)):
        return _last_turns(row, _messages(chosen, "chosen"), _messages(rejected, "rejected"), margin=_margin(row))
    shared = os.path.commonprefix([_text(chosen, "chosen"), _text(rejected, "rejected")])
    start = max((m.end() for m in re.finditer(r"\s+", shared)), default=0)
    if not shared[:start].strip():
        raise UserError("chosen and rejected do not begin with the same words, so there is no prompt")
    sides = (chosen, "chosen"), (rejected, "rejected")
    responses = [answer(_text(text[start:], f"what {side} adds to the prompt")) for text, side in sides]
    return _row(row, [{"role": "user", "content": shared[:start].rstrip()}], responses, margin=_margin(row))


def from_scored(row: dict) -> Row:
    """{prompt, responses, scores}, or SimPO's {prompt, all_generated_responses, all_rm_scores}: best against worst."""
    texts = "responses" if "responses" in row else "all_generated_responses"
    scores = "scores" if "responses" in row else "all_rm_scores"
    if not isinstance(row.get(texts), (list, tuple)) or len(row[texts]) < 2:
        raise UserError(f"{texts} is not a list of two or more responses")
    responses = [_response(r, f"{texts} {i}") for i, r in enumerate(row[texts], 1)]
    values = _scores(row.get(scores), scores, len(responses))
    best = values.index(max(values))
    worst = values.index(min(values))
    if best == worst:
        raise UserError(TIE)
    return _row(row, prompt_of(row), [responses[best], responses[worst]], margin=values[best] - values[worst])


def _label(value, what: str = "label") -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{what} is {str(value)[:40]!r}, not true or false")
    return value


def from_unpaired(row: dict) -> Row:
    """{prompt, completion, label}."""
    prompt = prompt_of(row)
    completion = _response(row.get("completion"), "completion")
    return _row(row, prompt, [completion], desirable=_label(row.get("label")))


def from_unpaired_messages(row: dict) -> Row:
    """{messages, label}: the last message, an assistant's, is judged."""
    messages = _messages(row.get("messages"), "messages")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError("messages do not end with an assistant turn after a prompt")
    return _row(row, messages[:-1], messages[-1:], desirable=_label(row.get("label")))


TIE = "a tie: every response has the same score"
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict], Row]]] = {  # the first that fits the first row is taken
    "sharegpt": (("conversations", "chosen", "rejected"), from_pair),
    "pairs": (("prompt", "chosen", "rejected"), from_pair),
    "hh": (("chosen", "rejected"), from_hh),
    "implied": (("chosen", "rejected"), from_implied),
    "scored": (("prompt", "responses", "scores"), from_scored),
    "on_policy": (("prompt", "all_generated_responses", "all_rm_scores"), from_scored),
    "unpaired": (("prompt", "completion", "label"), from_unpaired),
    "unpaired_messages": (("messages", "label"), from_unpaired_messages),
}


def format_of(row: dict, where: str, name: str = "auto") -> tuple[Callable[[dict], Row], str]:
    """(reader, why it was taken) for a dataset that begins with this row, or a UserError that says what is accepted."""
    if name != "auto":
        refuse_unless_known("format", name, ["auto", *FORMATS])
        return FORMATS[name][1], f"format {name}, as asked for"
    asked = prompt_columns(row)
    is_transcript = str(row.get("chosen")).lstrip().startswith(("Human:", "Assistant:"))
    for found, (needed, reader) in FORMATS.items():
        columns = [*(asked or needed[:1]), *needed[1:]] if needed[0] == "prompt" else needed
        if set(columns) <= set(row) and (found != "hh" or is_transcript):
            transcript = ' and chosen is a transcript with "Human:" turns' if found == "hh" else ""
            return reader, f"format {found}, because there are columns {', '.join(columns)}{transcript}"
    accepted = "; ".join(f"{found} {{{', '.join(needed)}}}" for found, (needed, _) in FORMATS.items())
    accepted += f", where {', '.join(PROMPTS[2:])} can stand for prompt (--columns renames)"
    raise UserError(f"{where}: unknown shape of dataset: its columns are {sorted(map(str, row))}; accepted are {accepted}")


# ---- token ids -------------------------------------------------------------------------------------------------------


PLAIN_TEMPLATE = (  # for tokenizers without a chat template; saved with the exported model, so that generation uses it too
    "{{ bos_token or '' }}{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


MARK = "\ue000"  # private-use characters stand for texts, to see what a template writes around them: for an answer,
NEXT = "\ue001"  # for the turn behind it,
FIRST = 0xF0000  # and from here on for all that the messages of a row say
LABELS = {"role", "name", "id", "tool_call_id"}  # keys of a message that need not be shown
NO_ENDING = "without an ending (the chat template writes none)"


def load_tokenizer(model: str, trust_remote_code: bool = False):
    """The tokenizer of a folder or hub name; one without a chat template gets PLAIN_TEMPLATE."""
    from transformers import AutoTokenizer

    reachable(model)
    if os.path.isfile(model):
        raise UserError(f"{model}: is a file; give the folder of the model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds; all mean that there is no usable tokenizer
        raise UserError(f"{model}: no usable tokenizer there ({brief(error)})") from error
    if len(tokenizer) == 0:
        raise UserError(f"{model}: no usable tokenizer there (its vocabulary is empty)")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def _render(tokenizer, messages: list[dict], template: dict | None = None, generation_prompt: bool = False) -> str:
    """A conversation as the chat template writes it with these arguments, of which strftime_now is the date that it is told."""
    arguments = dict(template or {})
    date = arguments.pop("strftime_now", "")
    how = {"add_generation_prompt": generation_prompt, "tokenize": False}
    try:
        jinja = tokenizer.get_chat_template(None, arguments.get("tools"))
        if _wants_parts(tokenizer, jinja):
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        text = tokenizer.apply_chat_template(messages, chat_template=_dated(jinja, date), **how, **arguments)
        text.encode()  # a lone surrogate in a tool or an argument
    except Exception as error:  # templates raise what they like, most often jinja2's TemplateError
        raise UserError(f"the chat template refuses this row ({brief(error)})") from error
    return text


@functools.lru_cache(maxsize=64)
def _wants_parts(tokenizer, jinja: str) -> bool:
    """Whether a chat template shows a text only where it is given as a list of parts."""

    def shows(content) -> bool:
        turn = [{"role": "user", "content": content}]
        try:
            return MARK in tokenizer.apply_chat_template(turn, chat_template=jinja, tokenize=False)
        except Exception:
            return False

    return not shows(MARK) and shows([{"type": "text", "text": MARK}])


def asks_for_date(tokenizer) -> bool:
    """Whether the chat template writes the date, so that token ids would change from day to day."""
    return "strftime_now" in str(tokenizer.chat_template)


@functools.lru_cache(maxsize=64)
def _dated(jinja: str, date: str) -> str:
    """A chat template with a date (YYYY-MM-DD) in the place of today's."""
    if not date:
        return jinja
    day = datetime.datetime.fromisoformat(date)
    call = r"strftime_now\(\s*(['\"])(.*?)\1\s*\)"
    jinja = re.sub(call, lambda match: match[1] + day.strftime(match[2]) + match[1], jinja)
    if re.search(r"strftime_now\s*\(", jinja):
        raise ValueError("it hands strftime_now something else than a text, so its date cannot be fixed")
    return jinja


def _ids(tokenizer, text: str) -> list[int]:
    # the template has already written BOS and every other special token, so none is added here
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@functools.lru_cache(maxsize=4)
def _special(tokenizer) -> tuple[set[int], re.Pattern]:
    """The ids of the special tokens, and what finds them in a text; the unknown token stands for text and is none of them."""
    names = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    names.pop(tokenizer.unk_token_id, None)
    longest_first = sorted(names.values(), key=len, reverse=True)
    return set(names), re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) is nowhere


def _controls(tokenizer, ids: list[int]) -> list[int]:
    """The special tokens among ids, in order."""
    special, _ = _special(tokenizer)
    return [i for i in ids if i in special]


def _said(message: dict) -> dict:
    """What of a message has to be shown."""
    return {key: x for key, x in message.items() if key not in LABELS and not isinstance(x, (int, float))}


def _replaced(value, replace: Callable):
    """A nested value with each text and whole number replaced, save types and ids; also in arguments spelled as JSON."""
    if isinstance(value, list):
        return [_replaced(x, replace) for x in value]
    if isinstance(value, dict):
        new = {key: x if key in ("type", "id", "arguments") else _replaced(x, replace) for key, x in value.items()}
        if "arguments" in value:
            try:
                new["arguments"] = json.dumps(_replaced(json.loads(value["arguments"]), replace), ensure_ascii=False)
            except (TypeError, ValueError, RecursionError):
                new["arguments"] = _replaced(value["arguments"], replace)
        return new
    is_said = isinstance(value, (str, int)) and not isinstance(value, bool)
    return replace(value) if is_said else value


def _skeleton(tokenizer, prompt: list[dict], response: dict, template: dict) -> str:
    """A conversation as JSON, with a mark for each text and number, without the special tokens that are still spelled."""
    _, special = _special(tokenizer)
    numbers = itertools.count()

    def mark(value):
        number = next(numbers)
        if isinstance(value, int):
            return 10**9 + number
        return chr(FIRST + number % 65_000) if value.strip() else value

    turns = [message | _replaced(_said(message), mark) for message in (*prompt, response)]
    text = json.dumps([turns, template], ensure_ascii=False)
    while special.search(text):  # what is left may spell another one
        text = special.sub("", text)
    return text


@functools.lru_cache(maxsize=1024)
def _frame(tokenizer, chat_template: str, skeleton: str) -> tuple[str, str, list[int]]:
    """What a chat template writes around the texts of a conversation; UserError if it leaves out any.

    Returns: what follows an answer that is the last message; what the response ends with (see `_ending`); the special tokens of
    the whole up to there.
    """
    (*prompt, response), template = json.loads(skeleton)
    render = functools.partial(_render, tokenizer, template=template)
    asked = render(prompt, generation_prompt=True)
    whole = render([*prompt, response])
    _loses_reasoning(prompt, asked)
    _refuse_lost(response, asked, whole)
    answered = render([*prompt, answer(MARK)])
    _refuse_lost(answer(MARK), asked, answered)
    after = answered.rpartition(MARK)[2]
    last, turns = MARK, [answer(MARK), {"role": "user", "content": NEXT}]
    if "tool_calls" in response:  # a tool speaks next
        last, turns = whole.removesuffix(after), [response, {"role": "tool", "content": NEXT}]
        turns[1]["tool_call_id"] = response["tool_calls"][0].get("id")
    between = None
    with contextlib.suppress(UserError):
        before_next = render([*prompt, *turns]).rpartition(NEXT)[0]
        if last in before_next:
            between = before_next.rpartition(last)[2]
    ending = _ending(tokenizer, after, between)
    return after, ending, _controls(tokenizer, _ids(tokenizer, _ended(tokenizer, whole, after, ending)))


def _ending(tokenizer, after: str, between: str | None) -> str:
    """What a response ends with: the first special token behind it, and what the template writes before that.

    after: what the template writes behind the last message. between: what it writes from there to the text of a further turn;
    None if it refuses one. The token is looked for in `between`, since some templates write more behind the last message
    (Phi-3: <|endoftext|>, Llama-3's first release: the next header) and some nothing (GLM: the next header ends a turn).
    Two exceptions: an EOS token at once behind the last message (gpt-oss: <|return|>, but <|end|> between turns), and one that
    is the second token between turns (Cohere).
    """
    _, special = _special(tokenizer)
    eos = tokenizer.eos_token
    first = special.search(after)
    if between is not None and not (first and first[0] == eos):
        after = between
        first = re.search(re.escape(eos), between) if eos and eos in between else special.search(between)
    return after[: first.end()] if first else ""


def _ended(tokenizer, whole: str, after: str, ending: str) -> str:
    """The rendering of a prompt and a response up to and with the terminator."""
    if whole.endswith(after):
        return whole.removesuffix(after) + ending
    whole = whole.rstrip()
    if not re.search(f"({_special(tokenizer)[1].pattern})$", whole):  # else a tool call: <|call|>, <|eom_id|>
        raise UserError("the chat template ends this response otherwise than an answer, and not with a special token")
    return whole


def terminator(tokenizer, template: dict | None = None) -> int | None:
    """The id of the token that ends an answer to a user, where generation has to stop; None if the template writes none.

    template: the run's arguments of `apply_chat_template`, see `template_arguments`.
    """
    skeleton = _skeleton(tokenizer, [{"role": "user", "content": MARK}], answer(MARK), template or {})
    _, ending, _ = _frame(tokenizer, str(tokenizer.chat_template), skeleton)
    return _controls(tokenizer, _ids(tokenizer, ending))[-1] if ending else None


def encode(
    row: Row, tokenizer, max_length: int, max_prompt_length: int, control_tokens: bool = False, template: dict | None = None
) -> tuple[Example, list[str]]:
    """Row → token ids, by the common-prefix rule.

    prompt = ids of template(prompt, generation prompt); whole = ids of template(prompt + response) up to and with the
    terminator (see `_ending`), since generation has stopped by then. The response is `whole` minus the longest prefix that it
    shares with `prompt`; where the tokenizer merges across the boundary, the merged token is the response's and the stored
    prompt ends before it, for all responses of the row alike.

    Texts: all must stand in the rendering as they are, tools and tool calls too. Only the reasoning of earlier turns may be
    missing, which the second value names.

    Special tokens: those among the ids must be the ones that the template writes itself around other texts. A row that spells
    another ("<|im_end|>" typed by a user), in whatever way, is refused, unless `control_tokens`.

    Lengths: a prompt above `max_prompt_length` loses its oldest tokens; a response is then cut so that prompt + response ≤
    `max_length`, and a cut response has no terminator. Both cuts are named in the second value.

    Args:
        template: the run's arguments of `apply_chat_template`, see `template_arguments`; the row's own win.
    Raises:
        UserError: the template refuses the row, does not show something of it, or renders both responses alike; its prompt is
            not a prefix of the whole; a special token is spelled; or there is no room.
    """
    template = {**(template or {}), **row.template}
    render = functools.partial(_render, tokenizer, template=template)
    asked = render(row.prompt, generation_prompt=True)
    wholes = []
    for response in row.responses:
        skeleton = _skeleton(tokenizer, row.prompt, response, template)
        after, ending, controls = _frame(tokenizer, str(tokenizer.chat_template), skeleton)
        text = _ended(tokenizer, render([*row.prompt, response]), after, ending)
        whole = _ids(tokenizer, text)
        if not control_tokens:
            _refuse_spelled(tokenizer, whole, controls)
        _refuse_lost(response, asked, text)
        if not text.startswith(asked.rstrip()):
            raise UserError("the chat template renders the prompt differently once a response follows")
        wholes.append(whole)
    if wholes[0] == wholes[-1] and row.responses[0] != row.responses[-1]:
        raise UserError("the chat template renders both responses alike")
    cuts = ["earlier reasoning cut by the template"] if _loses_reasoning(row.prompt, asked) else []
    if "tools" in row.template and asked == render(row.prompt, template={**template, "tools": None}, generation_prompt=True):
        raise UserError("the chat template drops tools of the row")
    prompt = _ids(tokenizer, asked)
    shared = len(os.path.commonprefix([prompt, *wholes]))
    if shared == 0:
        raise UserError("the prompt has no token from which the first response token could be predicted")
    prompt = prompt[:shared]
    responses = [whole[shared:] for whole in wholes]
    if not all(_controls(tokenizer, response[-1:]) for response in responses):
        cuts.append(NO_ENDING)
    if len(prompt) > max_prompt_length:
        prompt = prompt[-max_prompt_length:]
        cuts.append("prompt cut")
    room = max_length - len(prompt)
    if room < 1 or not all(responses):
        raise UserError(f"no response token is left within max_length {max_length}")
    if any(len(r) > room for r in responses):
        responses = [r[:room] for r in responses]
        cuts.append("response cut")
    return Example(prompt, responses, row.desirable), cuts


def _refuse_spelled(tokenizer, ids: list[int], own: list[int]) -> None:
    """UserError unless the special tokens among ids are those that the template writes itself, whatever way others came in."""
    found = _controls(tokenizer, ids)
    spelled = Counter(found) - Counter(own)
    if spelled:
        token = tokenizer.convert_ids_to_tokens(min(spelled))
        raise UserError(f"its texts spell the special token {token} (--control_tokens takes it as a real one)")
    if found != own:
        raise UserError("the chat template writes other special tokens around these texts than around others")


def _refuse_lost(response: dict, asked: str, whole: str) -> None:
    """UserError unless all that a response says stands in the rendering, and not only in what is asked."""
    for _, what, said in _lost([response], whole, asked):
        hint = "; give what is before </think> as reasoning_content, or use a template that keeps it" * ("</think>" in said)
        raise UserError(f"the chat template drops or changes {what} of the response{hint}")


def _loses_reasoning(prompt: list[dict], asked: str) -> bool:
    """Whether the template cuts reasoning of earlier turns, as many do; UserError if it loses another text or a call."""
    cut = False
    for i, what, said in _lost(prompt, asked):
        thought, thinks, rest = said.rpartition("</think>")
        if what == "the text" and thinks and prompt[i]["role"] == "assistant" and rest.strip() in asked:
            cut = cut or thought.replace("<think>", "").strip() not in asked
        elif what in ("the text", *CALLS):
            raise UserError(f"the chat template drops or changes {what} of prompt message {i + 1} ({prompt[i]['role']})")
        cut = cut or what in REASONING
    return cut


def _lost(messages: list[dict], text: str, beside: str = "") -> list[tuple[int, str, str]]:
    """(index of a message, "the text" or a key, what it says) that a text says less often; without those in `beside`."""
    said = []
    for i, message in enumerate(messages):
        for key, value in _said(message).items():
            what = "the text" if key == "content" else key
            texts = []
            _replaced(value, texts.append)
            said += [(i, what, str(x).strip()) for x in texts]
    often = Counter((what, x) for _, what, x in said)
    text, beside = _bare(text), _bare(beside)
    return [(i, what, x) for i, what, x in said if text.count(_bare(x)) - beside.count(_bare(x)) < often[what, x]]


def _bare(text: str) -> str:
    """A text as it is alike written out, spelled as JSON, or spelled twice: as JSON without backslashes."""
    return json.dumps(text)[1:-1].replace("\\", "")


def to_equal_length(example: Example, fraction: float = 1.0, seed: int = 0) -> Example:
    """POET: both responses cut to the length of the shorter one, which keeps its terminator (Xiao 2025, arXiv 2506.09457).

    Done after every other cut, to this share of the pairs: which ones is decided by the seed and the token ids alone.
    """
    shortest = min(map(len, example.responses))
    if fraction < 1 and random.Random(f"{seed} {example.prompt} {example.responses}").random() >= fraction:
        return example
    return example._replace(responses=[r[:shortest] for r in example.responses])


# ---- a dataset -------------------------------------------------------------------------------------------------------


PROMPT_SHARE = 7 / 8  # of max_length, where max_prompt_length is not given
CACHE = os.environ.get("PLAINPO_CACHE", "~/.cache/plainpo")


@dataclass
class Reading:
    """How rows become examples; the trainer's settings inherit these."""

    max_length: int = setting(2048, "tokens of prompt + response; a longer response is cut")
    max_prompt_length: int | None = setting(None, "longer prompts lose their oldest tokens; without it 7/8 of max_length")
    format: str = setting("auto", f"of the rows: auto (by the columns of the first), or one of {', '.join(FORMATS)}")
    columns: str = setting("", "columns to rename, new=old, before anything else: prompt=question,chosen=good")
    template_kwargs: str = setting("", 'more arguments of the chat template, as JSON: {"enable_thinking": false}')
    date: str = setting("", "YYYY-MM-DD, for chat templates that write the date; without it today, of a resumed run its first")
    control_tokens: bool = setting(False, "special tokens spelled in texts are real ones; without it such rows are dropped")
    equal_length: float = setting(0.0, "share of the pairs whose responses are cut to the same length (POET)")
    max_drop_fraction: float = setting(0.1, "more invalid rows than this share is an error; ties are valid")
    cache: str = setting(CACHE, "folder for token ids of large data and reference log-probs, found again by a hash")
    seed: int = setting(0, "for everything random")


def template_arguments(how: Reading) -> dict:
    """The run's arguments of `apply_chat_template`; strftime_now among them is the date that a template is told."""
    arguments = _nested(how.template_kwargs or {}, dict, "template_kwargs")
    return arguments | ({"strftime_now": how.date} if how.date else {})


PARALLEL_FROM = 20_000  # rows


class Report(NamedTuple):
    """What became of a dataset's rows."""

    rows: int
    kept: int
    dropped: dict[str, int]  # reason → rows
    first: list[str]  # the first few dropped rows, "file row n: reason"
    cut: dict[str, int]  # "prompt cut" / "response cut" / … → rows
    formats: list[str]  # per source: name, format and the reason for it

    def __str__(self) -> str:
        lines = [f"{self.kept} of {self.rows} rows kept" + "".join(f", {n} {what}" for what, n in self.cut.items())]
        lines += [f"  {line}" for line in self.formats]
        lines += [f"  dropped {n}: {reason}" for reason, n in self.dropped.items()]
        return "\n".join(lines + [f"    {line}" for line in self.first])


class Examples(Sequence):
    """The examples of a dataset, each made when it is asked for.

    The dataset is in memory or a memory-mapped file. `rows` are its rows that are examples here, in order; one that is there
    several times (a source with a weight) is the same row.
    """

    def __init__(self, dataset: "Dataset", rows: np.ndarray, changes: tuple[Callable[[Example], Example], ...] = ()):
        self.dataset, self.rows, self.changes = dataset, rows, changes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, (slice, list)):
            return Examples(self.dataset, self.rows[i], self.changes)
        example = Example(**self.dataset[int(self.rows[i])])
        for change in self.changes:
            example = change(example)
        return example

    def mapped(self, change: Callable[[Example], Example]) -> "Examples":
        """The same examples, each changed when it is asked for."""
        return Examples(self.dataset, self.rows, (*self.changes, change))


def load(dataset: str, tokenizer, how: Reading | None = None) -> tuple[Examples, Report]:
    """Read, check and tokenise a dataset. Order is kept; the report says what was dropped and why.

    A source of PARALLEL_FROM rows or more is tokenised by all cores and kept, memory-mapped, in the cache folder, under a hash
    of everything it depends on.

    Args:
        dataset: one or several sources (see `read`) with commas between. "@w" after a source takes it w times: 2 repeats every
            row, 0.5 takes a random half.
        how: a Reading, or settings that inherit it.
    Raises:
        UserError: unreadable source, unknown columns, no valid rows, too many dropped, or a setting that does not fit.
    """
    from datasets import concatenate_datasets, disable_progress_bars

    if not is_watched():
        disable_progress_bars()
    how = _completed(how or Reading())
    for name in template_arguments(how).keys() - {"strftime_now"}:
        if name not in str(tokenizer.chat_template):
            raise UserError(f"template_kwargs has {name}, which is nowhere in the chat template")
    parts, formats, weights = [], [], []
    for source, weight in _sources(dataset):
        part, why = _outcomes(source, tokenizer, how)
        parts.append(part)
        times = f" × {weight:g}" if weight != 1 else ""
        formats.append(f"{source}{times}: {why}{_read_from(source)}")
        weights += [weight] * len(part)
    outcomes = concatenate_datasets(parts)
    report = _report(outcomes, formats)
    if report.kept == 0:
        raise UserError(f"{dataset}: no valid rows\n{report}")
    invalid = report.rows - report.kept - report.dropped.get(TIE, 0)
    if invalid > how.max_drop_fraction * report.rows:
        share = f"{how.max_drop_fraction:.0%}"
        raise UserError(f"{dataset}: more than {share} of the rows were dropped as invalid (--max_drop_fraction)\n{report}")
    rows = [i for i, problem in enumerate(outcomes["dropped"][:]) if problem is None]
    _refuse_mixture(outcomes, rows)
    rows = _weighted(rows, weights, how.seed)
    if not rows:
        raise UserError(f"{dataset}: no row is left by the weights (@)\n{report}")
    return Examples(outcomes.select_columns(list(Example._fields)), np.array(rows)), report


def _read_from(source: str) -> str:
    """The files that a folder or pattern stands for, for the report."""
    name, _ = _cut(source)
    files = list(map(str, _files(name) or []))
    if not files or files == [os.path.expanduser(name)]:
        return ""
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"; read from {', '.join(files[:3])}{more}"


def _completed(how: Reading) -> Reading:
    """The reading options alone, checked, with the prompt's length limit filled in."""
    for name in ("equal_length", "max_drop_fraction"):
        if not 0 <= getattr(how, name) <= 1:
            raise UserError(f"{name} is {getattr(how, name)}; it is a share between 0 and 1")
    if how.seed < 0:
        raise UserError(f"seed is {how.seed}; it must not be negative")
    date = how.date or datetime.date.today().isoformat()
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        raise UserError(f"date is {date[:40]!r}; write YYYY-MM-DD")
    longest = how.max_prompt_length
    if longest is None:
        longest = int(how.max_length * PROMPT_SHARE)
    if not 1 <= longest < how.max_length:
        limits = f"max_length {how.max_length} with max_prompt_length {longest}"
        raise UserError(f"{limits} leaves no room for a prompt and a response; raise the former or lower the latter")
    return Reading(**{f.name: getattr(how, f.name) for f in fields(Reading)} | {"max_prompt_length": longest, "date": date})


def _renamed(columns: str) -> dict[str, str]:
    pairs = [[side.strip() for side in part.split("=")] for part in columns.split(",") if part.strip()]
    if not all(len(p) == 2 and all(p) for p in pairs):
        raise UserError(f"columns is {columns!r}: write new=old with commas between, such as prompt=question,chosen=good")
    return dict(pairs)


def _outcomes(source: str, tokenizer, how: Reading) -> tuple["Dataset", str]:
    """What becomes of each row of a source, in order, as `_outcome` says it; and the reason for the format."""
    from datasets import Dataset, Features, List, Value, concatenate_datasets
    from datasets.exceptions import DatasetGenerationError

    renamed = _renamed(how.columns)
    rows = _rows(source)
    head = list(itertools.islice(rows, PARALLEL_FROM))
    reader, why = reader_of(source, head, renamed, how.format)
    outcome = functools.partial(_outcome, reader=reader, encode=encode, renamed=renamed, tokenizer=tokenizer, how=how)
    text, ids = Value("string"), List(Value("int32"))
    columns = {"where": text, "prompt": ids, "responses": List(ids), "desirable": Value("bool"), "margin": Value("float64")}
    columns |= {"asked": text, "dropped": text, "cuts": List(text)}
    made = dict(features=Features(columns), remove_columns="row", desc="tokenise")
    if len(head) < PARALLEL_FROM:
        return Dataset.from_list(head).map(outcome, new_fingerprint="small", **made), why  # or all arguments would be hashed
    folder = Path(how.cache).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / _cache_key(source, tokenizer, how)
    with open(f"{kept}.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # of several processes one makes them, the rest wait; no worker inherits this lock
        if not _is_whole(kept):
            shutil.rmtree(kept, ignore_errors=True)
            all_rows = functools.partial(itertools.chain, head, rows)
            try:
                whole = Dataset.from_generator(all_rows, cache_dir=str(kept / "rows"), fingerprint="rows")
            except DatasetGenerationError as error:
                raise error.__cause__ or error from None
            if not is_watched():  # no bar is drawn, and it may take minutes
                say(f"{source}: tokenising {len(whole)} rows")
            whole.map(outcome, num_proc=os.cpu_count(), cache_file_name=str(kept / "ids.arrow"), new_fingerprint="ids", **made)
            shutil.rmtree(kept / "rows")
            sums = {file.name: checksum(file) for file in kept.glob("*.arrow")}
            (kept / "complete").write_text(json.dumps(sums))  # last: without it, or with half of it, the folder is made again
        parts = [Dataset.from_file(str(file)) for file in sorted(kept.glob("*.arrow"))]
    return concatenate_datasets(parts), why


def _is_whole(kept: Path) -> bool:
    """Whether a folder of token ids is as it was made; one that is not is named."""
    try:
        sums = json.loads((kept / "complete").read_text())
        whole = bool(sums) and all(checksum(kept / name) == listed for name, listed in sums.items())
    except (OSError, ValueError, AttributeError):
        whole = False
    if not whole and kept.exists():
        say(f"{kept} is damaged, or was not finished, and is made again")
    return whole


def reader_of(source: str, rows: Iterable[dict], renamed: dict[str, str], name: str) -> tuple[Callable[[dict], Row], str]:
    """(reader, why it was taken) for a source, by the first of its `_rows` that is one."""
    found = ((item["where"], _parsed(item["row"])) for item in rows)
    where, first = next(((where, row) for where, row in found if isinstance(row, dict)), (source, None))
    if first is None:
        raise UserError(f"{source}: no valid rows, not one is an object with columns")
    missing = [old for old in renamed.values() if old not in first]
    if missing:
        columns = sorted(map(str, first))
        guess = did_you_mean(missing[0], columns)
        raise UserError(f"{where}: --columns names {', '.join(missing)}, but its columns are {columns}{guess}")
    return format_of(first | {new: first[old] for new, old in renamed.items()}, where, name)


def row_of(raw, reader: Callable[[dict], Row], renamed: dict[str, str]) -> Row:
    """One row as it was read → checked; UserError for what is none."""
    if isinstance(raw, UserError):
        raise raw
    if not isinstance(raw, dict):
        raise UserError(f"the row is a {type(raw).__name__}, not an object with columns")
    return reader(raw | {new: raw.get(old) for new, old in renamed.items()})


CHARACTERS = 512  # so many no token stands for
ASKED = 200  # characters of a user turn that messages show


def _within_reach(row: Row, most: int) -> Row:
    """The row with `most` characters of each text, those that can come to be ids: the last of a prompt's, the first of a
    response's. A tokenizer takes a hundred times the text in memory."""
    prompt = [message | {"content": message["content"][-most:]} for message in row.prompt]
    responses = [response | {"content": response["content"][:most]} for response in row.responses]
    return row._replace(prompt=prompt, responses=responses)


def _outcome(item: dict, reader: Callable, encode: Callable, renamed: dict[str, str], tokenizer, how: Reading) -> dict:
    """What becomes of one row of `_rows`: its token ids, or the reason for which it is dropped."""
    found = {"prompt": None, "responses": None, "desirable": None, "margin": None, "asked": "", "dropped": None, "cuts": []}
    try:
        row = row_of(_parsed(item["row"]), reader, renamed)
        short = _within_reach(row, CHARACTERS * how.max_length)
        limits = how.max_length, how.max_prompt_length
        example, cuts = encode(short, tokenizer, *limits, how.control_tokens, template_arguments(how))
    except UserError as error:
        return found | {"dropped": str(error)}
    if short != row:
        cuts = [*cuts, f"text above {CHARACTERS} characters per token of max_length cut beforehand"]
    equal = to_equal_length(example, how.equal_length, how.seed) if how.equal_length else example
    if equal != example:
        cuts = [*cuts, "made equally long"]
    found |= {"prompt": example.prompt, "responses": equal.responses, "desirable": row.desirable}
    asked = [message["content"] for message in row.prompt if message["role"] == "user"]
    return found | {"margin": row.margin, "asked": "".join(asked[-1:])[:ASKED], "cuts": cuts}


def _cache_key(source: str, tokenizer, how: Reading) -> str:
    """A hash of everything that the rows of a source, and what becomes of them, depend on; files by what is in them."""
    name, _ = _cut(source)
    files = _files(name)
    state = _hub(name)._fingerprint if files is None else [(str(file.resolve()), checksum(file)) for file in files]
    spelling = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
    settings = asdict(how)
    del settings["max_drop_fraction"], settings["cache"]  # which choose nothing
    if not asks_for_date(tokenizer):
        del settings["date"]
    code = [Path(file).read_text() for file in (__file__, inspect.getsourcefile(encode))]  # encode may be another program's
    parts = (source, state, spelling, tokenizer.chat_template, settings, code)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _report(outcomes: "Dataset", formats: list[str]) -> Report:
    problems = outcomes["dropped"][:]
    dropped = [(where, problem) for where, problem in zip(outcomes["where"][:], problems) if problem is not None]
    reasons = Counter(problem for _, problem in dropped)
    first = [f"{where}: {problem}" for where, problem in dropped[:5]]
    cut = Counter(itertools.chain.from_iterable(outcomes["cuts"][:]))
    return Report(len(problems), len(problems) - len(dropped), dict(reasons.most_common()), first, dict(cut), formats)


def _refuse_mixture(outcomes: "Dataset", rows: list[int]) -> None:
    """UserError where some of these rows are pairs and others single completions."""
    labels = outcomes["desirable"][:]
    pairs = [i for i in rows if labels[i] is None]
    singles = [i for i in rows if labels[i] is not None]
    if pairs and singles:
        pair, single = outcomes[pairs[0]]["where"], outcomes[singles[0]]["where"]
        raise UserError(f"{pair} is a pair, {single} a single completion with a label: give one kind at a time")


def _weighted(rows: list[int], weights: list[float], seed: int) -> list[int]:
    """Every row as often as its weight says; the fraction is a chance, drawn with the seed."""
    chance = np.random.default_rng([seed, 2**31 + 1]).random(len(rows))
    taken = []
    for i, c in zip(rows, chance):
        taken += [i] * (int(weights[i]) + (c < weights[i] % 1))
    return taken


def split_held_out(examples: Examples, n: int, seed: int) -> tuple[Examples, Examples]:
    """(train, held out): n examples drawn with the seed, both parts in their order.

    A row that is there several times is held out once and then not trained on.
    """
    drawn, held_out = set(), []
    for i in np.random.default_rng([seed, 2**31]).permutation(len(examples)).tolist():
        row = int(examples.rows[i])
        if len(held_out) < n and row not in drawn:
            drawn.add(row)
            held_out.append(i)
    trained = [i for i, row in enumerate(examples.rows.tolist()) if row not in drawn]
    return examples[trained], examples[sorted(held_out)]


# ---- step plan and microbatches --------------------------------------------------------------------------------------


def step_plan(examples: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Indices of the examples of each optimizer step of an epoch: perm(seed, epoch) cut into pieces of `batch_size`.

    A pure function, so a resumed run needs no loader state. The last step takes what is left.
    """
    order = np.random.default_rng([seed, epoch]).permutation(examples)
    return [order[i : i + batch_size] for i in range(0, examples, batch_size)]


def tokens_of(example: Example) -> int:
    """Tokens of a packed example: its prompt once and every response."""
    return len(example.prompt) + sum(map(len, example.responses))


def split_by_tokens(sizes: list[int], budget: int, ranks: int = 1) -> list[list[int]]:
    """Split items into groups of at most `budget` tokens, as equal as a greedy pass makes them.

    Longest first, each into the lightest group. The number of groups is a multiple of `ranks` (rank r takes groups r::ranks);
    some groups may be empty. An item above the budget gets a group of its own. Nothing is dropped or repeated.
    """
    fewest = -(-sum(sizes) // budget)  # rounded up
    count = max(1, min(len(sizes), fewest))
    count = -(-count // ranks) * ranks
    while True:
        groups = _longest_into_lightest(sizes, count)
        if all(len(group) == 1 or sum(sizes[i] for i in group) <= budget for group in groups):
            return groups
        count += ranks


def _longest_into_lightest(sizes: list[int], count: int) -> list[list[int]]:
    groups = [[] for _ in range(count)]
    lightest = [(0, g) for g in range(count)]  # a heap of (tokens, group)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        tokens, g = heapq.heappop(lightest)
        groups[g].append(i)
        heapq.heappush(lightest, (tokens + sizes[i], g))
    return groups


class Batch(NamedTuple):
    """One microbatch, ready for logprobs.ResponseLogProbs."""

    input_ids: Tensor  # (rows, T)
    position_ids: Tensor  # (rows, T)
    index: Tensor  # (N,) flat positions, in rows × T, that predict a response token
    targets: Tensor  # (N,) that token
    response: Tensor  # (N,) the response it belongs to, 0 … R−1: example by example, chosen before rejected
    in_prefix: Tensor  # (N,) bool: the first k tokens of a response, k the length of its example's shortest
    lengths: Tensor  # (R,) scored tokens
    responses: int  # R
    pairs: list[tuple[int, list[int]]] | None  # packed: (prompt length, response lengths) per example

    def to(self, device) -> "Batch":
        tensors = {name: x for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**{name: to_device(x, device) for name, x in tensors.items()})


def _joined(arrays: list[np.ndarray], dtype=np.int64) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *arrays]))


def _batch(examples: list[Example], ids: Tensor, positions: Tensor, index: list[np.ndarray], pairs: list | None) -> Batch:
    targets, response, in_prefix, lengths = [], [], [], []  # an entry per response
    for example in examples:
        shortest = min(len(tokens) for tokens in example.responses)
        for tokens in example.responses:
            targets.append(np.array(tokens))
            response.append(np.full(len(tokens), len(lengths)))
            in_prefix.append(np.arange(len(tokens)) < shortest)
            lengths.append(len(tokens))
    return Batch(
        input_ids=ids,
        position_ids=positions,
        index=_joined(index),
        targets=_joined(targets),
        response=_joined(response),
        in_prefix=_joined(in_prefix, bool),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        responses=len(lengths),
        pairs=pairs,
    )


def padded_batch(examples: list[Example]) -> Batch:
    """The textbook layout: a row prompt + response per response, padded on the right."""
    rows = [(e.prompt, r) for e in examples for r in e.responses]
    width = max((len(prompt) + len(response) for prompt, response in rows), default=1)
    ids = np.zeros((max(1, len(rows)), width), dtype=np.int64)
    index = []
    for i, (prompt, response) in enumerate(rows):
        ids[i, : len(prompt) + len(response)] = prompt + response
        first = i * width + len(prompt) - 1  # the prompt's last position predicts the first token
        index.append(first + np.arange(len(response)))
    positions = torch.arange(width).expand(len(ids), width)
    return _batch(examples, torch.from_numpy(ids), positions, index, None)


def packed_batch(examples: list[Example]) -> Batch:
    """One row of tokens: prompt₁ chosen₁ rejected₁ prompt₂ …; each response's positions go on from the end of its prompt."""
    ids, positions, index, pairs = [], [], [], []
    start = 0
    for example in examples:
        prompt = len(example.prompt)
        ids.append(np.array(example.prompt))
        positions.append(np.arange(prompt))
        start += prompt
        last_of_prompt = start - 1
        for response in example.responses:
            ids.append(np.array(response))
            positions.append(prompt + np.arange(len(response)))
            index.append(np.array([last_of_prompt, *range(start, start + len(response) - 1)]))
            start += len(response)
        pairs.append((prompt, [len(response) for response in example.responses]))
    if not examples:  # a rank without work still takes part in every collective: one token, nothing scored
        ids = [np.zeros(1, dtype=np.int64)]
        positions = [np.zeros(1, dtype=np.int64)]
        pairs = [(0, [1])]
    return _batch(examples, _joined(ids)[None], _joined(positions)[None], index, pairs)


LAYOUTS = {"packed": packed_batch, "padded": padded_batch}


# ---- looking at data -------------------------------------------------------------------------------------------------

SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
COLOURS = {"prompt": "2", "chosen": "1;32", "rejected": "1;31", "completion": "1;36"}
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")  # not tab and newline
SHOWN_TOKENS = 300  # of a prompt


def visible(text: str) -> str:
    """Text of a stranger for a terminal: what would steer it (escapes, carriage returns, bidi marks) is spelled out."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def show(example: Example, tokenizer, colour: bool = True, ids: bool = False, tokens: int = SHOWN_TOKENS) -> str:
    """An example as text, its prompt dim and up to the bar, what is scored bright, special tokens underlined.

    ids: every token is followed by its id in small digits. tokens: of a longer prompt so many are shown, the last ones.
    """
    special, spelled = _special(tokenizer)

    def piece(part: str, numbers: list[int], bar: str = "") -> str:
        if ids:
            text = "".join(f"{visible(tokenizer.decode([i]))}{str(i).translate(SUBSCRIPT)}" for i in numbers)
        else:
            text = visible(tokenizer.decode(numbers, clean_up_tokenization_spaces=False))
        ended = text.rstrip("\n")
        text = ended + "\\n" * (len(text) - len(ended)) + bar  # a last line break would not be seen
        if not colour:
            return text
        underlined = spelled.sub(lambda match: f"\x1b[4m{match[0]}\x1b[24m", text)
        return f"\x1b[{COLOURS[part]}m{underlined}\x1b[0m"

    parts, prompt = ["chosen", "rejected"] if example.desirable is None else ["completion"], example.prompt
    end = prompt[-tokens:]
    hidden = f", the first {len(prompt) - len(end)} hidden: --full shows them" if len(end) < len(prompt) else ""
    lines = [f"── {visible(example.where)}", f"prompt ({len(prompt)} tokens, not scored{hidden})", piece("prompt", end, "▏")]
    for part, response in zip(parts, example.responses):
        label = "" if example.desirable is None else f", label {str(example.desirable).lower()}"
        last = tokenizer.convert_ids_to_tokens(response[-1])
        ending = f"ends with {last}" if response[-1] in special else "no terminator"
        lines += [f"{part} ({len(response)} tokens, scored, {ending}{label})", piece(part, response)]
    return "\n".join(lines)


def quality(examples: Sequence[Example]) -> dict[str, int]:
    """How many say the same as an earlier one, compare a response with itself, or say the opposite of another one."""
    said = Counter()
    for e in examples:
        said[tuple(e.prompt), tuple(map(tuple, e.responses)), e.desirable] += 1
    identical, conflicts = 0, 0
    for (prompt, responses, label), n in said.items():
        opposite = (prompt, responses[::-1], label if label is None else not label)
        if label is None and responses[0] == responses[1]:
            identical += n
        elif opposite in said:
            conflicts += n
    return {"duplicates": len(examples) - len(said), "identical responses": identical, "conflicts": conflicts}


def stats(examples: Sequence[Example], report: Report) -> str:
    """The report, lengths in tokens with a histogram, length bias, and what to do about what was found, as text."""
    names = ["prompt", "completion"] if examples[0].desirable is not None else ["prompt", "chosen", "rejected"]
    sizes = np.array([[len(e.prompt), *map(len, e.responses)] for e in examples])
    lines = [str(report)]
    lines += [f"  {n} {what}: tests/tools/clean.py drops them" for what, n in quality(examples).items() if n]
    lines += ["", f"{'tokens':<12}{'mean':>8}{'p50':>8}{'p90':>8}{'p99':>8}{'max':>8}{'sum':>12}"]
    for name, size in zip(names, sizes.T):
        quantiles = "".join(f"{q:>8.0f}" for q in np.percentile(size, [50, 90, 99, 100]))
        lines.append(f"{name:<12}{size.mean():>8.1f}{quantiles}{size.sum():>12}")
    bins = np.floor(np.log2(sizes)).astype(int)  # bin k holds lengths of 2ᵏ … 2ᵏ⁺¹ − 1 tokens
    counts = np.array([np.bincount(column, minlength=bins.max() + 1) for column in bins.T])
    lines += ["", " " * 16 + "".join(f"{name:<26}" for name in names)]
    for k in range(bins.min(), bins.max() + 1):
        bars = "".join(f"{'█' * math.ceil(18 * n / counts.max())} {n or ''}".ljust(26) for n in counts[:, k])
        lines.append(f"{2**k:>6} –{2 ** (k + 1) - 1:>6}  {bars}".rstrip())
    if len(names) == 3:
        longer = sizes[:, 1] - sizes[:, 2]
        shares = [(longer > 0).mean(), (longer == 0).mean(), (longer < 0).mean()]
        lines.append("\nchosen is longer in {:.1%} of the pairs, as long in {:.1%}, shorter in {:.1%}; ".format(*shares))
        lines[-1] += f"by {longer.mean():+.1f} tokens on average"
        bias = shares[0] - shares[2]
    else:
        lines.append(f"\n{np.mean([e.desirable for e in examples]):.1%} of the rows are desirable")
        bias = 0.0
    return "\n".join([*lines, *(f"→ {text}" for text in advice(report, bias))])


def advice(report: Report, bias: float = 0.0) -> list[str]:
    """What to do about what was found; bias: share of pairs whose chosen response is the longer one, less the opposite."""
    found = []
    if report.cut.get(NO_ENDING):
        found.append("no ending is taught: let the chat template write a token after an answer, such as {{ eos_token }}")
    cut_off = report.cut.get("response cut", 0)
    if cut_off > 0.01 * report.kept:
        found.append(f"{cut_off} rows have a cut response, which teaches no ending: raise --max_length")
    no_beginning = report.cut.get("prompt cut", 0)
    if no_beginning > 0.1 * report.kept:
        found.append(f"{no_beginning} prompts have lost their beginning: raise --max_length or --max_prompt_length")
    if bias > 0.2:
        found.append("the chosen responses are longer, which sums of log-probs reward: simpo, rdpo or --equal_length 1")
    dropped = report.rows - report.kept
    if dropped > 0.01 * report.rows:
        found.append(f"{dropped} rows are dropped for the reasons above: mend them, or see --format and --columns")
    return found


@dataclass(kw_only=True)
class Counting(Reading):
    """Print lengths with a histogram, length bias, duplicates, conflicts, what is cut or dropped and why."""

    model: str = setting(MISSING, "folder or hub name whose tokenizer and chat template to use")
    dataset: str = setting(MISSING, "sources: files, folders, patterns, hub names; see tests/studies/README.md")
    max_drop_fraction: float = setting(1.0, "more invalid rows than this share is an error")
    trust_remote_code: bool = setting(False, "run the code that a model's folder brings")


@dataclass(kw_only=True)
class Showing(Counting):
    """Print rows in colour: prompt dim, scored response bright."""

    n: int = setting(3, "rows to print", aliases="-n")
    ids: bool = setting(False, "also the id of every token")
    full: bool = setting(False, f"whole prompts; without it their last {SHOWN_TOKENS} tokens")


def print_stats(s: Counting) -> None:
    print(visible(stats(*load(s.dataset, load_tokenizer(s.model, s.trust_remote_code), s))))


def print_rows(s: Showing) -> None:
    tokenizer = load_tokenizer(s.model, s.trust_remote_code)
    examples, report = load(s.dataset, tokenizer, s)
    colour = sys.stdout is not None and sys.stdout.isatty() and "NO_COLOR" not in os.environ or "FORCE_COLOR" in os.environ
    tokens = sys.maxsize if s.full else SHOWN_TOKENS
    print("\n\n".join(show(example, tokenizer, colour, s.ids, tokens) for example in examples[: s.n]))
    print(visible("\n".join(["", str(report), *(f"→ {text}" for text in advice(report))])))


# ---- progress and command lines, of every file -----------------------------------------------------------------------


def is_watched() -> bool:
    """Whether messages go to a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


DRAWN_EVERY = 10.0  # seconds, where nobody watches


def progress(
    items: Iterable | None, what: str, unit: str, total: int | None = None, initial: int = 0, disable: bool = False
) -> tqdm:
    """`items` with a bar; where nobody watches a line every ten seconds, so none for what takes less.

    It is tqdm's object: `set_postfix(…, refresh=False)` adds numbers, and without items `update` counts.
    """
    how = dict(unit=f" {unit}", initial=initial, disable=disable or sys.stderr is None, leave=False, dynamic_ncols=True)
    if not is_watched():
        done = "{n_fmt}/{total_fmt} [{elapsed}, {remaining} left" if total or items is not None else "{n_fmt} [{elapsed}"
        line = f"{{desc}}: {done}, {{rate_fmt}}{{postfix}}]"
        how |= {"mininterval": DRAWN_EVERY, "miniters": 1, "delay": DRAWN_EVERY, "bar_format": line, "file": Lines(sys.stderr)}
    return tqdm(items, what, total, **how)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The defaults, and descriptions as they are written."""


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message[:300]}; `python {self.prog} --help` lists all settings")


def parse(kind: type, argv: list[str], prog: str, text: str, hints: dict[str, str] | None = None):
    """Command line → an instance of the dataclass `kind`; what comes later wins.

    Leading bare words fill, in order, the fields that have no default. `--a-b` and `--a_b` are the same. A setting that is not
    there is a UserError with the sentence that `hints` has for its name, else with the nearest name. ~/ is the home folder.
    """
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))[: len(needed)]
    argv = [f"--{name}={word}" for name, word in zip(needed, words)] + argv[len(words) :]
    usage = " ".join([prog, *map(str.upper, needed), "[options]"])
    parser = _Parser(kind, prog=prog, usage=usage, description=text, formatter_class=_Help, allow_abbrev=False)
    settings, unknown = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, return_remaining_strings=True)
    if unknown:
        option = next((word for word in unknown if word.startswith("-")), "")
        name = option.lstrip("-").partition("=")[0].replace("-", "_")
        hint = (hints or {}).get(name)
        guess = f"; {hint}" if hint else did_you_mean(name, [f.name for f in fields(kind)])
        parser.error(f"unknown setting {' '.join(unknown)[:200]}{guess}")
    for name, value in vars(settings).items():
        try:
            os.fsencode(str(value).encode().decode())
        except UnicodeEncodeError:  # it came as other bytes, or is more than LC_ALL=C can name
            parser.error(f"{name} is {value!r}, which is no text in UTF-8 and {sys.getfilesystemencoding()}; rename it")
        if isinstance(value, (str, Path)) and str(value).startswith("~/") and value != getattr(kind, name, None):
            setattr(settings, name, type(value)(os.path.expanduser(value)))
        if isinstance(value, (int, float)) and not abs(value) < 2**63:  # nan, inf, and what no integer tensor holds
            parser.error(f"{name} is {str(value)[:40]}; it must be a finite number below 2⁶³")
    return settings


def commands(argv: list[str], prog: str, text: str, table: dict[str, tuple[type, Callable]]):
    """Run the command that argv begins with: its function gets an instance of its dataclass, whose docstring is its help."""
    if argv[:1] in (["-h"], ["--help"]):
        print(f"usage: {prog} COMMAND [options]\n\n{text.strip()}\n")
        for name, (kind, _) in table.items():
            print(f"  {name:<10}{inspect.getdoc(kind).splitlines()[0]}")
        print(f"\n`python {prog} COMMAND --help` lists the options of a command.")
        raise SystemExit(0)
    if not argv or argv[0] not in table:
        what = f"{argv[0]} is no command{did_you_mean(argv[0], table)}" if argv else "a command is missing"
        raise UserError(f"{what}; there are {', '.join(table)}, which `python {prog} --help` explains")
    kind, function = table[argv[0]]
    return function(parse(kind, argv[1:], f"{prog} {argv[0]}", inspect.getdoc(kind)))


def say(text: str) -> None:
    """A message on standard error, the one way for all of them: what would steer a terminal is spelled out, a bar is left
    whole, and a log that cannot be written stops nothing."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # the last: a signal came while another was being printed
        if is_watched():
            tqdm.write(visible(text), file=sys.stderr)
        else:
            print(visible(text), file=sys.stderr, flush=True)


def fail(error: Exception) -> None:
    """Print one message and end with code 2."""
    say(f"error: {error}")
    raise SystemExit(2)


class Log:
    """A stream that nothing depends on: what cannot be written, for want of a reader or of room on a disk, is lost."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()


class Lines(Log):
    """A stream for a bar that nobody watches: each drawing is a line, and nothing is wiped."""

    def write(self, text: str) -> int:
        drawn = text.replace("\x1b[A", "").strip()  # without the moves between bars
        return super().write(drawn + "\n" if drawn else "")


def command_line(
    work: Callable[[list[str]], object],
    argv: list[str] | None = None,
    fail: Callable[[Exception], None] = fail,
    stopped: str = "stopped",
    logs: tuple[str, ...] = ("stderr",),
):
    """work(argv) as a command line; returns what it returns.

    A user error, an OSError of the system (such as a full disk) or the end of the GPU's memory goes to `fail` as a UserError;
    `distributed.fail` is the one of several ranks. Ctrl-C prints `stopped`, code 130. Output that nobody reads any more
    (`| head`) ends the work quietly; of the streams that are `logs` the work does not depend. Characters that the output's
    encoding lacks are written as escapes.
    """
    transformers_log.disable_progress_bar()
    transformers_log.set_verbosity_error()  # a table of weights that do not fit, where one message follows
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # and not None, or what a notebook puts there
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, Log(stream) if name in logs else stream)
    try:
        try:
            return work(sys.argv[1:] if argv is None else argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # what cannot be written is found here and not on the way out
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        say(stopped)
        raise SystemExit(130) from None
    except torch.OutOfMemoryError as error:
        fail(UserError(f"the GPU's memory is too small; lower --batch_size ({brief(error)})"))
    except OSError as error:
        if error.errno is None:  # of a library
            raise
        if error.filename is None:  # most likely the output: the interpreter would try to write it once more
            with contextlib.suppress(OSError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE or "stdout" in logs:
            fail(UserError(f"{str(error.filename or 'the output')[:200]}: {error.strerror}"))


def main(argv: list[str] | None = None):
    """The command line as a function. A user error ends with a message and exit code 2."""
    return command_line(lambda argv: commands(argv, "data.py", __doc__, COMMANDS), argv)


COMMANDS = {
    "show": (Showing, print_rows),
    "stats": (Counting, print_stats),
}

if __name__ == "__main__":
    main()
