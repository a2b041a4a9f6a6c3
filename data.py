"""Preference data: reads pairs, then makes pairs.

Reading: rows → checks → token ids → step plan → padded or packed microbatches. A row of any accepted format becomes prompt
messages and one or more responses (`Row`), then token ids (`Example`): the prompt as the chat template renders it with the
generation prompt, and for each response exactly the ids that generation would have to produce after it, terminator included.
What does not fit is dropped, counted and reported with its file and row number.

Making: sample → score → pairs, of a model's own responses; and its answers to a benchmark's prompts, as outside judges read
them. `python data.py --help` lists the commands:

    python data.py show  --model MODEL --dataset FILE -n 3      # rows as coloured tokens
    python data.py stats --model MODEL --dataset FILE           # lengths, length bias, duplicates, what is dropped and why

Shape letters: B examples · R responses · T tokens of a batch · N scored tokens.
"""

import argparse
import functools
import glob
import gzip
import hashlib
import heapq
import importlib.util
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")

PLAIN_TEMPLATE = (  # for tokenizers without a chat template; saved with the exported model, so that generation uses it too
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


PRIVATE = re.compile("[\U000f0000-\U000ffffd]")
MARK = "\ue000"  # a private-use character: stands for a response to see what a template writes after it


class UserError(Exception):
    """Something its owner can mend: what was wrong, where, what to do. Every command line prints it and ends with code 2."""


def _brief(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Row(NamedTuple):
    """One checked row: a prompt and the responses to compare ([chosen, rejected]) or to judge ([completion] and its label)."""

    prompt: list[dict]  # messages {role, content}
    responses: list[str]
    desirable: bool | None = None  # None for pairs
    margin: float | None = None  # score of chosen less score of rejected, where the data has scores


class Example(NamedTuple):
    """One row as token ids. Training scores the responses only."""

    prompt: list[int]
    responses: list[list[int]]
    desirable: bool | None = None
    where: str = ""  # file and row, for messages


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(dataset: str) -> Iterator[tuple[str, dict | Exception]]:
    """Yield (where, row) from one source of rows; an unreadable row is yielded as its error.

    Args:
        dataset: a path ending in .json, .jsonl, either with .gz, or .parquet; a folder of such files; a pattern,
            "data/*.jsonl"; "-" for JSON lines on standard input; or a hub name, "org/name", "org/name:split" or
            "org/name:config:split" (the split is train if not given). A slice takes some of the rows: "pairs.jsonl[:1000]".
    Raises:
        UserError: nothing there, or a file that cannot be read at all.
    """
    name, cut = _cut(dataset)
    files = _files(name)
    rows = _read_hub(name) if files is None else itertools.chain.from_iterable(map(_read_file, files))
    if cut is None:
        return rows
    first, last = (int(x) if x else None for x in cut[1:-1].split(":"))
    if min(first or 0, last or 0) < 0:
        return iter(list(rows)[first:last])
    return itertools.islice(rows, first, last)


def _cut(dataset: str) -> tuple[str, str | None]:
    return re.fullmatch(r"(.*?)(\[-?\d*:-?\d*\])?", dataset, re.DOTALL).groups()


def _files(name: str) -> list[Path] | None:
    """The files that a name stands for, or None if it can only be a hub name."""
    path = Path(name).expanduser()
    try:
        if name == "-" or path.is_file():
            return [Path(name) if name == "-" else path]
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
            if not files:
                raise UserError(f"{path}: no data file in this folder; looked for {', '.join(SUFFIXES)}")
            return files
        if glob.has_magic(name):
            files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
            if not files:
                raise UserError(f"{name}: no file matches this pattern")
            return files
    except (OSError, ValueError) as error:  # a name that no file can have
        raise UserError(f"{name[:200]}: no such file or folder ({_brief(error)})") from error
    if name.startswith((".", "/", "~")) or name.endswith(SUFFIXES):
        raise UserError(f"{name}: no such file or folder")
    return None


def _read_file(file: Path) -> Iterator[tuple[str, dict | Exception]]:
    if str(file) != "-" and not file.name.endswith(SUFFIXES):
        raise UserError(f"{file}: unknown kind of file; accepted are {', '.join(SUFFIXES)}")
    return _read_parquet(file) if file.suffix == ".parquet" else _read_json(file)


def _read_parquet(file: Path):
    from pyarrow import ArrowException, parquet

    try:
        batches = parquet.ParquetFile(file).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{file} row {number}", row
    except (OSError, ValueError, ArrowException) as error:
        raise UserError(f"{file}: not a readable parquet file ({_brief(error)})") from error


def _open(file: Path):
    # bytes that are not UTF-8 become lone surrogates, which _text reports for the row that holds them
    how = dict(mode="rt", encoding="utf-8-sig", errors="surrogateescape")
    if str(file) == "-":
        return io.TextIOWrapper(sys.stdin.buffer, encoding=how["encoding"], errors=how["errors"])
    return gzip.open(file, **how) if file.suffix == ".gz" else open(file, **how)


def _read_json(file: Path):
    name, number = "standard input" if str(file) == "-" else str(file), 0
    try:
        with _open(file) as lines:
            if ".json" in file.suffixes:
                text = lines.read()
                try:
                    rows = json.loads(text)
                except json.JSONDecodeError as error:
                    if not error.msg.startswith("Extra data"):
                        raise
                    lines = io.StringIO(text)  # JSON lines under another name
                else:
                    if not isinstance(rows, list):
                        raise UserError(f"{name}: holds a JSON {type(rows).__name__}, not a list of rows")
                    yield from ((f"{name} row {number}", row) for number, row in enumerate(rows, 1))
                    return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield f"{name} row {number}", json.loads(line)
                    except (ValueError, RecursionError) as error:
                        yield f"{name} row {number}", UserError(f"not valid JSON ({error})")
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UserError(f"{name}: cannot be read{f' after row {number}' if number else ''} ({error})") from error


@functools.lru_cache(maxsize=8)
def _hub(name: str):
    from datasets import load_dataset

    path, *rest = name.split(":")
    config, split = ([None] + rest)[-2:] if rest else (None, "train")
    try:
        return load_dataset(path, config, split=split or "train")
    except Exception as error:  # the hub client raises many kinds; all mean that the name gives no rows
        raise UserError(f"{name}: no such file or folder, and not loadable from the hub ({_brief(error)})") from error


def _read_hub(name: str):
    for number, row in enumerate(_hub(name), 1):
        yield f"{name} row {number}", row


def _sources(dataset: str) -> list[tuple[str, float]]:
    """ "a.jsonl, org/name:split@0.5" → [("a.jsonl", 1.0), ("org/name:split", 0.5)]."""
    sources = []
    for part in [dataset] if os.path.exists(dataset) else dataset.split(","):
        name, weight = re.fullmatch(r"(.*?)(?:@(\d+(?:\.\d+)?))?", part.strip(), re.DOTALL).groups()
        if not name or weight is not None and float(weight) == 0:
            raise UserError(
                f"dataset is {dataset!r}: write sources with commas between, each with an optional weight above 0: "
                "a.jsonl, b.jsonl@0.5"
            )
        sources.append((name, float(weight or 1)))
    return sources


# ---- checking: any format → Row --------------------------------------------------------------------------------------

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
ROLES |= {"function_call": "assistant", "observation": "tool", "function": "tool"}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")


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


def _messages(value, what: str) -> list[dict]:
    """A list of {role, content} (or ShareGPT's {from, value}) as messages with the usual role names; text is one user turn."""
    if isinstance(value, str):
        return [{"role": "user", "content": _text(value, what)}]
    if not isinstance(value, (list, tuple)) or not value:
        raise UserError(f"{what} is {'missing' if value is None else 'neither text nor a non-empty list of messages'}")
    messages = []
    for i, m in enumerate(value, 1):
        if not isinstance(m, dict):
            raise UserError(f"{what} message {i} is a {type(m).__name__}, not {{role, content}}")
        role = m.get("role", m.get("from"))
        if not isinstance(role, str) or not role:
            raise UserError(f"{what} message {i} has no role")
        if ROLES.get(role, role) not in KNOWN_ROLES:
            raise UserError(
                f"{what} message {i} has the unknown role {role[:40]!r}; known are {', '.join((*KNOWN_ROLES, *ROLES))}"
            )
        content = _text(m.get("content", m.get("value")), f"{what} message {i}")
        messages.append({"role": ROLES.get(role, role), "content": content})
    return messages


def _response(value, what: str) -> str:
    """A response given as text, as one assistant message, or as a list with one."""
    if isinstance(value, str):
        return _text(value, what)
    messages = _messages([value] if isinstance(value, dict) else value, what)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise UserError(f"{what} is not a single assistant message")
    return messages[0]["content"]


def _row(prompt: list[dict], responses: list[str], **more) -> Row:
    if prompt[-1]["role"] == "assistant":
        raise UserError("the prompt ends with an assistant turn, so there is nothing to answer")
    return Row(prompt, responses, **more)


def _hh_messages(text: str, what: str) -> list[dict]:
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + _text(text, what).lstrip())
    if parts[0].strip() or len(parts) < 3:
        raise UserError(f'{what} is not a transcript of "\\n\\nHuman:" and "\\n\\nAssistant:" turns')
    return [
        {"role": "user" if who == "Human" else "assistant", "content": _text(said.strip(), f"{what} turn {i}")}
        for i, (who, said) in enumerate(zip(parts[1::2], parts[2::2]), 1)
    ]


def _last_turns(chosen: list[dict], rejected: list[dict], **more) -> Row:
    """Two whole conversations that differ in the last, assistant, turn only."""
    for what, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise UserError(f"{what} does not end with an assistant turn")
        if len(messages) < 2:
            raise UserError(f"{what} has no prompt before the response")
    if chosen[:-1] != rejected[:-1]:
        raise UserError("chosen and rejected answer different prompts")
    return _row(chosen[:-1], [chosen[-1]["content"], rejected[-1]["content"]], **more)


def _score(value, what: str) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer of hundreds of digits
        pass
    raise UserError(f"{what} is {str(value)[:40]!r}, not a finite number")


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
    sides, margin = [row.get("chosen"), row.get("rejected")], _margin(row)
    if all(isinstance(s, (list, tuple)) and len(s) > 1 for s in sides):
        sides, prompt = [_messages(s, w) for s, w in zip(sides, ("chosen", "rejected"))], row.get("prompt")
        if sides[0][0]["role"] == "assistant" or prompt is not None and not isinstance(prompt, str):
            prompt = _messages(prompt, "prompt")
            sides = [s if s[: len(prompt)] == prompt else prompt + s for s in sides]  # responses of several turns
        return _last_turns(*sides, margin=margin)
    prompt = _messages(row.get("prompt"), "prompt")
    return _row(prompt, [_response(s, w) for s, w in zip(sides, ("chosen", "rejected"))], margin=margin)


def from_hh(row: dict) -> Row:
    """{chosen, rejected}: Anthropic-HH transcripts of "Human:" and "Assistant:" turns that share all but the last."""
    return _last_turns(*(_hh_messages(row.get(side), side) for side in ("chosen", "rejected")))


def from_implied(row: dict) -> Row:
    """{chosen, rejected}: whole conversations as messages; or texts, whose common beginning, up to a space, is the prompt."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        for value, what in ((chosen, "chosen"), (rejected, "rejected")):
            if isinstance(value, str):
                raise UserError(f"{what} is text and the other side is not")
        return _last_turns(_messages(chosen, "chosen"), _messages(rejected, "rejected"), margin=_margin(row))
    shared = os.path.commonprefix([_text(chosen, "chosen"), _text(rejected, "rejected")])
    start = max((m.end() for m in re.finditer(r"\s+", shared)), default=0)
    if not shared[:start].strip():
        raise UserError("chosen and rejected do not begin with the same words, so there is no prompt")
    responses = [
        _text(chosen[start:], "what chosen adds to the prompt"),
        _text(rejected[start:], "what rejected adds to the prompt"),
    ]
    return _row([{"role": "user", "content": shared[:start].rstrip()}], responses, margin=_margin(row))


def from_sharegpt(row: dict) -> Row:
    """{conversations, chosen, rejected} with {from, value} turns; an optional system text goes in front."""
    prompt = _messages(row.get("conversations"), "conversations")
    if row.get("system") not in (None, ""):
        prompt = [{"role": "system", "content": _text(row["system"], "system")}] + prompt
    return _row(prompt, [_response(row.get(side), side) for side in ("chosen", "rejected")], margin=_margin(row))


def from_scored(row: dict) -> Row:
    """{prompt, responses, scores}, or SimPO's {prompt, all_generated_responses, all_rm_scores}: best against worst."""
    texts, scores = ("responses", "scores") if "responses" in row else ("all_generated_responses", "all_rm_scores")
    if not isinstance(row.get(texts), (list, tuple)) or len(row[texts]) < 2:
        raise UserError(f"{texts} is not a list of two or more responses")
    responses = [_response(r, f"{texts} {i}") for i, r in enumerate(row[texts], 1)]
    values = _scores(row.get(scores), scores, len(responses))
    best, worst = values.index(max(values)), values.index(min(values))
    if best == worst:
        raise UserError(TIE)
    prompt = _messages(row.get("prompt"), "prompt")
    return _row(prompt, [responses[best], responses[worst]], margin=values[best] - values[worst])


def _label(value) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"label is {str(value)[:40]!r}, not true or false")
    return value


def from_unpaired(row: dict) -> Row:
    """{prompt, completion, label}."""
    prompt, completion = _messages(row.get("prompt"), "prompt"), _response(row.get("completion"), "completion")
    return _row(prompt, [completion], desirable=_label(row.get("label")))


def from_unpaired_messages(row: dict) -> Row:
    """{messages, label}: the last message, an assistant's, is judged."""
    messages = _messages(row.get("messages"), "messages")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError("messages do not end with an assistant turn after a prompt")
    return _row(messages[:-1], [messages[-1]["content"]], desirable=_label(row.get("label")))


def _is_hh(row: dict) -> bool:
    return isinstance(row["chosen"], str) and row["chosen"].lstrip().startswith(("Human:", "Assistant:"))


TIE = "a tie: every response has the same score"
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict], Row]]] = {  # the first that fits the first row is taken
    "sharegpt": (("conversations", "chosen", "rejected"), from_sharegpt),
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
    accepted = "; ".join(f"{name} {{{', '.join(needed)}}}" for name, (needed, _) in FORMATS.items())
    if name != "auto":
        if name not in FORMATS:
            raise UserError(f"format is {name!r}; accepted are auto, {', '.join(FORMATS)}")
        return FORMATS[name][1], f"format {name}, as asked for"
    for found, (needed, reader) in FORMATS.items():
        if set(needed) <= set(row) and (found != "hh" or _is_hh(row)):
            why = f"format {found}, because there are columns {', '.join(needed)}"
            return reader, why + (' and chosen is a transcript with "Human:" turns' if found == "hh" else "")
    columns = sorted(map(str, row))
    raise UserError(
        f"{where}: unknown shape of dataset: its columns are {columns}; accepted are {accepted} (--columns renames)"
    )


# ---- token ids -------------------------------------------------------------------------------------------------------


def load_tokenizer(model: str, trust_remote_code: bool = False):
    """The tokenizer of a folder or hub name; one without a chat template gets PLAIN_TEMPLATE."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds; all mean that there is no usable tokenizer
        raise UserError(f"{model}: no usable tokenizer there ({_brief(error)})") from error
    if len(tokenizer) == 0:
        raise UserError(f"{model}: no usable tokenizer there (its vocabulary is empty)")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
        if tokenizer.bos_token is None:  # jinja would print "None"
            tokenizer.chat_template = PLAIN_TEMPLATE.replace("{{ bos_token }}", "")
    return tokenizer


def _render(tokenizer, messages: list[dict], generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    except Exception as error:  # templates raise what they like, most often jinja2's TemplateError
        raise UserError(f"the chat template refuses this row ({_brief(error)})") from error


def _ids(tokenizer, text: str) -> list[int]:
    # the template has already written BOS and every other special token, so none is added here
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _any_of(words) -> re.Pattern:
    # the longest first; of no words, a pattern that never matches
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")


@functools.lru_cache(maxsize=4)
def _special(tokenizer) -> tuple[dict[str, str], re.Pattern]:
    """(special token → a private-use character, pattern that finds special tokens)."""
    special = sorted(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
    return {token: chr(0xF0000 + i) for i, token in enumerate(special)}, _any_of(special)


@functools.lru_cache(maxsize=4)
def _stand_ins(tokenizer) -> tuple[Callable[[str], str], Tokenizer | None]:
    """For text that spells a special token: (exchange of each with its private-use character and back, reader of the latter).

    The reader is a copy of the tokenizer in which every special token goes by its private-use character, so that its old name
    is ordinary text. None where no such copy can be made.
    """
    names, _ = _special(tokenizer)
    swap = names | {char: token for token, char in names.items()}
    exchange = functools.partial(_any_of(swap).sub, lambda match: swap[match[0]])
    if not getattr(tokenizer, "is_fast", False):
        return exchange, None
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model, vocab = state["model"], state["model"]["vocab"]
    by_name = isinstance(vocab, dict)
    model["vocab"] = {names.get(k, k): v for k, v in vocab.items()} if by_name else [[names.get(k, k), v] for k, v in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    state["post_processor"] = None
    try:
        return exchange, Tokenizer.from_str(json.dumps(state))
    except Exception:  # a vocabulary that builds its special tokens from ordinary pieces
        return exchange, None


def _texts(row: Row) -> list[str]:
    return [m["content"] for m in row.prompt] + row.responses


def _common(a: list[int], b: list[int]) -> int:
    """How many ids two lists share at the beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def encode(
    row: Row, tokenizer, max_length: int, max_prompt_length: int, control_tokens: bool = False
) -> tuple[Example, list[str]]:
    """Row → token ids, by the common-prefix rule.

    prompt = ids of template(prompt, generation prompt); whole = ids of template(prompt + response), without the whitespace
    that a template writes after the terminator (generation has stopped by then). The response is `whole` minus the longest
    prefix that it shares with `prompt`; where the tokenizer merges across the boundary, the merged token is the response's
    and the stored prompt ends before it, for all responses of the row alike.

    A special token that is spelled in a message ("<|im_end|>" typed by a user) is encoded as the text it is and cannot end
    a turn, unless `control_tokens`.

    Lengths: a prompt above `max_prompt_length` loses its oldest tokens; a response is then cut so that prompt + response ≤
    `max_length`, and a cut response has no terminator. Both cuts are named in the second value.

    Raises:
        UserError: the template refuses the row, or its prompt is not a prefix of the whole, or there is no room.
    """
    ids, cuts = functools.partial(_ids, tokenizer), []
    if not control_tokens and any(map(_special(tokenizer)[1].search, _texts(row))):
        exchange, reader = _stand_ins(tokenizer)
        if reader is None or any(PRIVATE.search(x) for x in _texts(row)):
            raise UserError("it spells a special token, which cannot be told from a real one here")
        ids = lambda text: reader.encode(exchange(text), add_special_tokens=False).ids  # noqa: E731
        prompt = [{**m, "content": exchange(m["content"])} for m in row.prompt]
        row = row._replace(prompt=prompt, responses=list(map(exchange, row.responses)))
        cuts.append("with a special token as plain text")
    prompt_text, wholes = _render(tokenizer, row.prompt, generation_prompt=True), []
    after = _render(tokenizer, [*row.prompt, {"role": "assistant", "content": MARK}]).rpartition(MARK)[2]
    for response in row.responses:
        text = _render(tokenizer, [*row.prompt, {"role": "assistant", "content": response}])
        if not text.startswith(prompt_text.rstrip()):
            raise UserError("the chat template renders the prompt differently once a response follows")
        if after.strip() and text.endswith(after):
            text = text[: len(text) - len(after) + len(after.rstrip())]
        wholes.append(ids(text))
    prompt = ids(prompt_text)
    shared = min(_common(prompt, whole) for whole in wholes)
    if shared == 0:
        raise UserError("the prompt has no token from which the first response token could be predicted")
    prompt, responses = prompt[:shared], [whole[shared:] for whole in wholes]
    if len(prompt) > max_prompt_length:
        prompt, cuts = prompt[-max_prompt_length:], [*cuts, "prompt cut"]
    room = max_length - len(prompt)
    if room < 1 or not all(responses):
        raise UserError(f"no response token is left within max_length {max_length}")
    if any(len(r) > room for r in responses):
        responses, cuts = [r[:room] for r in responses], [*cuts, "response cut"]
    return Example(prompt, responses, row.desirable), cuts


def encode_simpo(row: Row, tokenizer, max_length: int, max_prompt_length: int) -> tuple[Example, list[str]]:
    """Row → token ids as the released SimPO code builds them, to reproduce published numbers; our own rule is `encode`.

    The prompt is rendered without the generation prompt and the assistant's turn alone, less a BOS text, so the assistant's
    header is scored as part of the response. A template that speaks of "system" gets an empty system turn if there is none. A
    BOS id goes in front and an EOS id at the end where they are missing. If prompt + longest response > max_length, the prompt
    keeps its last max_prompt_length tokens (published: 1800 of 2048); if that is not enough, both responses are cut to
    max_length − max_prompt_length tokens, however short the prompt is. (For Mistral the code also replaces the chat template;
    give the tokenizer that template.)
    """
    prompt, bos, eos = row.prompt, tokenizer.bos_token, tokenizer.eos_token_id
    if prompt[0]["role"] != "system" and re.search(r"system|<\|im_start\|>", tokenizer.chat_template):
        prompt = [{"role": "system", "content": ""}, *prompt]
    prompt_text, wholes = _render(tokenizer, prompt), []
    for response in row.responses:
        text = _render(tokenizer, [{"role": "assistant", "content": response}])
        wholes.append(_ids(tokenizer, prompt_text + (text.removeprefix(bos) if bos else text)))
    ids = _ids(tokenizer, prompt_text)
    shared = min(_common(ids, whole) for whole in wholes)
    prompt, responses, cuts = ids[:shared], [whole[shared:] for whole in wholes], []
    if bos and prompt[:1] != [tokenizer.bos_token_id]:
        prompt = [tokenizer.bos_token_id, *prompt]
    responses = [r if eos is None or r[-1:] == [eos] else [*r, eos] for r in responses]
    longest = max(map(len, responses))
    if len(prompt) + longest > max_length:
        if len(prompt) > max_prompt_length:
            prompt, cuts = prompt[-max_prompt_length:], ["prompt cut"]
        if len(prompt) + longest > max_length:
            responses, cuts = [r[: max_length - max_prompt_length] for r in responses], [*cuts, "response cut"]
    if not prompt or not all(responses):
        raise UserError(f"no response token is left within max_length {max_length}")
    return Example(prompt, responses, row.desirable), cuts


def to_equal_length(example: Example, fraction: float = 1.0, seed: int = 0) -> Example:
    """POET: both responses cut to the length of the shorter one, which keeps its terminator (Xiao 2025, arXiv 2506.09457).

    Done after every other cut, to this share of the pairs: which ones is decided by the seed and the token ids alone.
    """
    shortest = min(map(len, example.responses))
    if fraction < 1 and random.Random(f"{seed} {example.prompt} {example.responses}").random() >= fraction:
        return example
    return example._replace(responses=[r[:shortest] for r in example.responses])


# ---- a dataset -------------------------------------------------------------------------------------------------------


class Report(NamedTuple):
    """What became of a dataset's rows."""

    rows: int
    kept: int
    dropped: dict[str, int]  # reason → rows
    first: list[str]  # the first few dropped rows, "file row n: reason"
    cut: dict[str, int]  # "prompt cut" / "response cut" / … → rows
    formats: list[str]  # per source: name, format and the reason for it
    quality: dict[str, int]  # "duplicates" / "identical responses" / "conflicts" → rows, dropped or not

    def __str__(self) -> str:
        lines = [f"{self.kept} of {self.rows} rows kept" + "".join(f", {n} {what}" for what, n in self.cut.items())]
        lines += [f"  {line}" for line in self.formats]
        lines += [f"  {n} {what}" for what, n in self.quality.items() if n]
        lines += [f"  dropped {n}: {reason}" for reason, n in self.dropped.items()]
        return "\n".join(lines + [f"    {line}" for line in self.first])


class Examples(Sequence):
    """Examples of a large dataset, kept on disk and memory-mapped: an item is read when it is asked for."""

    def __init__(self, table, rows: np.ndarray, change: Callable[[Example], Example] | None = None):
        self.table, self.rows, self.change = table, rows, change

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Examples(self.table, self.rows[i], self.change)
        example = _example(self.table[int(self.rows[i])])
        return self.change(example) if self.change else example


def _example(item: dict) -> Example:
    return Example(item["prompt"], item["responses"], item["desirable"], item["where"])


def mapped(examples: Sequence, change: Callable[[Example], Example]) -> Sequence:
    """`change` applied to every example: now for a list, on access for Examples."""
    if isinstance(examples, Examples):
        return Examples(examples.table, examples.rows, change)
    return [change(e) for e in examples]


def load(
    dataset: str,
    tokenizer,
    max_length: int = 2048,
    max_prompt_length: int | None = None,
    max_drop_fraction: float = 0.1,
    *,
    format: str = "auto",
    columns: str = "",
    compat: str | None = None,
    control_tokens: bool = False,
    equal_length: float = 0.0,
    drop_duplicates: bool = False,
    drop_identical: bool = False,
    drop_conflicts: bool = False,
    min_score_margin: float = 0.0,
    seed: int = 0,
) -> tuple[Sequence[Example], Report]:
    """Read, check and tokenise a dataset. Order is kept; the report says what was dropped and why.

    A source of PARALLEL_FROM rows or more is tokenised by all cores and kept, memory-mapped, in the cache folder
    ($PLAINPO_CACHE, else ~/.cache/plainpo) under a hash of everything it depends on.

    Args:
        dataset: one or several sources (see `read`) with commas between. "@w" after a source takes it w times: 2 repeats every
            row, 0.5 takes a random half.
        max_length: tokens of prompt + response. max_prompt_length: None means seven eighths of it (compat "simpo": 1800/2048).
        max_drop_fraction: more invalid rows than this share is an error. Ties and rows that the switches below drop are valid.
        format: a key of FORMATS, or "auto": by the columns of the source's first row.
        columns: "prompt=question, chosen=good": new=old names, applied before anything else.
        compat: "simpo" tokenises by `encode_simpo`.
        control_tokens: special tokens spelled in messages become real ones.
        equal_length: share of the pairs whose responses are cut to the same length (POET).
        drop_duplicates: of rows with the same texts, only the first is kept. drop_identical: pairs of equal responses go.
        drop_conflicts: rows that say the opposite of another row go, both. All three are counted in the report anyway.
        min_score_margin: pairs whose scores differ by less go.
    Returns:
        the examples, a list or Examples, and the Report.
    Raises:
        UserError: unreadable source, unknown columns, no valid rows, too many dropped, or a setting that does not fit.
    """
    if compat not in (None, "", "simpo"):
        raise UserError(f"compat is {compat!r}; accepted is simpo")
    if not 0 <= equal_length <= 1:
        raise UserError(f"equal_length is {equal_length}; it is a share between 0 and 1")
    if max_prompt_length is None:
        max_prompt_length = max_length * (225 if compat else 224) // 256  # released SimPO: 1800 of 2048; else seven eighths
    if not 1 <= max_prompt_length < max_length:
        raise UserError(
            f"max_length {max_length} with max_prompt_length {max_prompt_length} leaves no room for a prompt and a response"
        )
    lengths = dict(max_length=max_length, max_prompt_length=max_prompt_length)
    own = functools.partial(encode, **lengths, control_tokens=control_tokens)
    rule = functools.partial(encode_simpo, **lengths) if compat else own
    job = functools.partial(
        _outcome, tokenizer=tokenizer, rule=rule, renamed=_renamed(columns), equal_length=equal_length, seed=seed
    )
    tables, formats, weights = [], [], []
    for source, weight in _sources(dataset):
        table, why = _outcomes(source, job, format)
        tables.append(table)
        formats.append(f"{source}{f' × {weight:g}' if weight != 1 else ''}: {why}")
        weights += [weight] * len(table)
    table = tables[0] if len(tables) == 1 else _concatenated(tables)
    where, problems, margins = (list(_column(table, name)) for name in ("where", "dropped", "margin"))
    total, invalid = len(problems), sum(p not in (None, TIE) for p in problems)
    quality = _quality(_column(table, "keys"), problems)
    switches = {"duplicates": drop_duplicates, "identical responses": drop_identical, "conflicts": drop_conflicts}
    for name, rows in quality.items():
        for i in rows if switches[name] else []:
            problems[i] = problems[i] or f"{name} (drop_{name.split()[0]})"
    if min_score_margin > 0:
        if all(m is None for m in margins):
            raise UserError(f"{dataset}: min_score_margin needs scores, and no row has any")
        for i, margin in enumerate(margins):
            if margin is not None and margin < min_score_margin:
                problems[i] = problems[i] or f"score margin below {min_score_margin:g}"
    kept = [i for i, problem in enumerate(problems) if problem is None]
    dropped = Counter(p for p in problems if p is not None)
    first = [f"{w}: {p}" for w, p in zip(where, problems) if p is not None][:5]
    cut = Counter(itertools.chain.from_iterable(_column(table, "cuts")))
    counts = {name: len(rows) for name, rows in quality.items()}
    report = Report(total, len(kept), dict(dropped.most_common()), first, dict(cut), formats, counts)
    if not kept:
        raise UserError(f"{dataset}: no valid rows\n{report}")
    if invalid > max_drop_fraction * total:
        raise UserError(
            f"{dataset}: more than {max_drop_fraction:.0%} of the rows were dropped as invalid (--max_drop_fraction)\n{report}"
        )
    rows = kept if set(weights) == {1} else _weighted(kept, weights, seed)
    if not isinstance(table, list):
        return Examples(table, np.array(rows)), report
    made = {i: _example(table[i]) for i in rows}  # repeats of a row are one object, by which split_held_out knows them
    return [made[i] for i in rows], report


def _renamed(columns: str) -> dict[str, str]:
    pairs = [[side.strip() for side in part.split("=")] for part in columns.split(",") if part.strip()]
    if not all(len(p) == 2 and all(p) for p in pairs):
        raise UserError(f"columns is {columns!r}: write new=old with commas between, such as prompt=question,chosen=good")
    return dict(pairs)


def _outcome(item, reader, tokenizer, rule, renamed, equal_length, seed) -> dict:
    """What becomes of one row: its token ids, or the reason for which it is dropped; a line of SCHEMA."""
    where, raw = item
    found = dict.fromkeys(SCHEMA.names) | {"where": where, "cuts": [], "keys": []}
    try:
        if isinstance(raw, Exception):
            raise raw
        if not isinstance(raw, dict):
            raise UserError(f"the row is a {type(raw).__name__}, not an object with columns")
        row = reader(raw | {new: raw.get(old) for new, old in renamed.items()})
        example, cuts = rule(row, tokenizer)
        equal = to_equal_length(example, equal_length, seed) if equal_length else example
    except UserError as error:
        return found | {"dropped": str(error)}
    keys = [json.dumps(row.prompt), *row.responses, *([] if row.desirable is None else [LABELS[row.desirable]])]
    return found | {
        "prompt": example.prompt,
        "responses": equal.responses,
        "desirable": row.desirable,
        "margin": row.margin,
        "cuts": cuts + ["made equally long"] * (equal != example),
        "keys": [_key(k) for k in keys],
    }


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


IDS = pa.list_(pa.int32())
SCHEMA = pa.schema({
    "where": pa.string(), "prompt": IDS, "responses": pa.list_(IDS), "desirable": pa.bool_(), "margin": pa.float64(),
    "dropped": pa.string(), "cuts": pa.list_(pa.string()), "keys": pa.list_(pa.int64()),
})  # fmt: skip
LABELS = {True: "desirable", False: "undesirable"}  # in the place of a second response
PARALLEL_FROM = 20_000  # rows


def _outcomes(source: str, job: Callable, format: str) -> tuple[Sequence[dict], str]:
    """The outcomes of all rows of a source, in order, a list or a memory-mapped table; and the reason for the format."""
    rows = read(source)
    head = list(itertools.islice(rows, PARALLEL_FROM))
    renamed = job.keywords["renamed"]
    where, first = next(((w, raw) for w, raw in head if isinstance(raw, dict)), (source, None))
    reader, why = None, "no row"
    if first is not None:
        if missing := [old for old in renamed.values() if old not in first]:
            raise UserError(f"{where}: --columns names {', '.join(missing)}, but its columns are {sorted(map(str, first))}")
        reader, why = format_of(first | {new: first[old] for new, old in renamed.items()}, where, format)
    job = functools.partial(job, reader=reader)
    show = dict(desc="tokenise", unit=" rows", leave=False, disable=not sys.stderr.isatty())
    if len(head) < PARALLEL_FROM:
        return [job(item) for item in tqdm(head, **show)], why
    return _cached(tqdm(itertools.chain(head, rows), **show), job, _cache_file(source, job)), why


def _cache_file(source: str, job: Callable) -> Path:
    """Where a large source's table is kept, by everything that it depends on: source, tokenizer, settings, this file."""
    name, _ = _cut(source)
    files, tokenizer = _files(name), job.keywords["tokenizer"]
    if files is None:
        origin = [_hub(name)._fingerprint]
    else:
        origin = [os.urandom(8) if name == "-" else (str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    spelling = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
    settings = {k: v for k, v in job.keywords.items() if k not in ("tokenizer", "rule", "reader")}
    rule = (job.keywords["rule"].func.__name__, job.keywords["rule"].keywords, job.keywords["reader"].__name__)
    key = repr((source, origin, spelling, tokenizer.chat_template, settings, rule, Path(__file__).read_text()))
    folder = Path(os.environ.get("PLAINPO_CACHE", "~/.cache/plainpo")).expanduser()
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.arrow"


def _start_worker(job: Callable) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a trainer's handler, inherited, would keep the pool from ending it
    _work.job = job


def _work(item) -> dict:
    return _work.job(item)


def _cached(rows: Iterator, job: Callable, file: Path):
    """The table of `file`, written first by all cores if it is not there; of several processes one writes and the rest wait."""
    from datasets import Dataset
    from filelock import FileLock

    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.exists():
            unfinished = file.with_suffix(".unfinished")
            with (
                multiprocessing.Pool(initializer=_start_worker, initargs=(job,)) as pool,
                pa.OSFile(str(unfinished), "wb") as sink,
                pa.ipc.new_stream(sink, SCHEMA) as writer,
            ):
                while part := list(itertools.islice(rows, PARALLEL_FROM)):
                    writer.write_batch(pa.RecordBatch.from_pylist(pool.map(_work, part, chunksize=256), SCHEMA))
            unfinished.replace(file)
    return Dataset.from_file(str(file))


def _column(table: Sequence[dict], name: str) -> list:
    return [line[name] for line in table] if isinstance(table, list) else table.data.column(name).to_pylist()


def _concatenated(tables: list[Sequence[dict]]) -> Sequence[dict]:
    if all(isinstance(t, list) for t in tables):
        return list(itertools.chain(*tables))
    from datasets import Dataset, concatenate_datasets

    return concatenate_datasets([Dataset(pa.Table.from_pylist(t, SCHEMA)) if isinstance(t, list) else t for t in tables])


def _quality(keys: list[list[int]], problems: list[str | None]) -> dict[str, list[int]]:
    """Valid rows that say the same as an earlier one, compare a response with itself, or say the opposite of another row."""
    valid = [(i, tuple(k)) for i, (k, problem) in enumerate(zip(keys, problems)) if problem is None]
    said, seen = {k for _, k in valid}, set()
    opposite_label = {_key(LABELS[True]): _key(LABELS[False]), _key(LABELS[False]): _key(LABELS[True])}
    found = {"duplicates": [], "identical responses": [], "conflicts": []}
    for i, (prompt, first, second) in valid:
        unpaired = second in opposite_label
        opposite = (prompt, first, opposite_label[second]) if unpaired else (prompt, second, first)
        if (prompt, first, second) in seen:
            found["duplicates"].append(i)
        if not unpaired and first == second:
            found["identical responses"].append(i)
        elif opposite in said:
            found["conflicts"].append(i)
        seen.add((prompt, first, second))
    return found


def _weighted(rows: list[int], weights: list[float], seed: int) -> list[int]:
    """Every row as often as its weight says; the fraction is a chance, drawn with the seed."""
    chance = np.random.default_rng([seed, 2**31 + 1]).random(len(rows))
    return [i for i, c in zip(rows, chance) for _ in range(int(weights[i]) + (c < weights[i] % 1))]


# ---- step plan and microbatches --------------------------------------------------------------------------------------


def step_plan(examples: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Indices of the examples of each optimizer step of an epoch: perm(seed, epoch) cut into pieces of `batch_size`.

    A pure function, so a resumed run needs no loader state. The last step takes what is left.
    """
    order = np.random.default_rng([seed, epoch]).permutation(examples)
    return [order[i : i + batch_size] for i in range(0, examples, batch_size)]


def split_held_out(examples: Sequence, held_out: int, seed: int) -> tuple[Sequence, Sequence]:
    """(train, held out): `held_out` examples drawn with the seed, both parts in their order.

    A row that is there several times (a source with a weight) is held out once and then not trained on.
    """
    lazy = isinstance(examples, Examples)
    same, drawn, held = examples.rows.tolist() if lazy else list(map(id, examples)), set(), []
    for i in np.random.default_rng([seed, 2**31]).permutation(len(examples)).tolist():
        if len(held) < held_out and same[i] not in drawn:
            drawn.add(same[i])
            held.append(i)
    parts = [i for i in range(len(same)) if same[i] not in drawn], sorted(held)
    if lazy:
        return tuple(Examples(examples.table, examples.rows[part], examples.change) for part in parts)
    return tuple([examples[i] for i in part] for part in parts)


def tokens_of(example: Example) -> int:
    """Tokens of a packed example: its prompt once and every response."""
    return len(example.prompt) + sum(map(len, example.responses))


def split_by_tokens(sizes: list[int], budget: int, ranks: int = 1) -> list[list[int]]:
    """Split items into groups of at most `budget` tokens, as equal as a greedy pass makes them.

    Longest first, each into the lightest group. The number of groups is a multiple of `ranks` (rank r takes groups r::ranks);
    some groups may be empty. An item above the budget gets a group of its own. Nothing is dropped or repeated.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    count = max(1, min(len(sizes), -(-sum(sizes) // budget)))
    count = -(-count // ranks) * ranks
    while True:
        heap, groups, load = [(0, g) for g in range(count)], [[] for _ in range(count)], [0] * count
        for i in order:
            weight, g = heapq.heappop(heap)
            groups[g].append(i)
            load[g] = weight + sizes[i]
            heapq.heappush(heap, (load[g], g))
        if all(weight <= budget or len(group) == 1 for weight, group in zip(load, groups)):
            return groups
        count += ranks


class Batch(NamedTuple):
    """One microbatch, ready for logprobs.ResponseLogProbs."""

    input_ids: Tensor  # (rows, T)
    position_ids: Tensor  # (rows, T)
    index: Tensor  # (N,) flat positions, in rows × T, that predict a response token
    targets: Tensor  # (N,) that token
    response: Tensor  # (N,) the response it belongs to, 0 … R−1: example by example, chosen before rejected
    lengths: Tensor  # (R,) scored tokens
    responses: int  # R
    tree: list[tuple[int, list[int]]] | None  # packed: (prompt length, response lengths) per example

    def to(self, device) -> "Batch":
        return self._replace(**{k: v.to(device, non_blocking=True) for k, v in self._asdict().items() if isinstance(v, Tensor)})


def _batch(ids, positions, index, targets, response, lengths, tree) -> Batch:
    as_tensor = lambda x: torch.from_numpy(np.concatenate(x)) if x else torch.zeros(0, dtype=torch.long)  # noqa: E731
    lengths = torch.tensor(lengths, dtype=torch.long)
    return Batch(ids, positions, as_tensor(index), as_tensor(targets), as_tensor(response), lengths, len(lengths), tree)


def padded_batch(examples: list[Example]) -> Batch:
    """The textbook layout: a row prompt + response per response, padded on the right."""
    rows = [(e.prompt, r) for e in examples for r in e.responses]
    width = max((len(p) + len(r) for p, r in rows), default=1)
    ids = np.zeros((max(1, len(rows)), width), dtype=np.int64)
    index, targets, response = [], [], []
    for i, (p, r) in enumerate(rows):
        ids[i, : len(p) + len(r)] = p + r
        index.append(i * width + len(p) - 1 + np.arange(len(r)))  # the prompt's last position predicts the first token
        targets.append(np.array(r))
        response.append(np.full(len(r), i))
    positions = torch.arange(width).expand(len(ids), width)
    return _batch(torch.from_numpy(ids), positions, index, targets, response, [len(r) for _, r in rows], None)


def packed_batch(examples: list[Example]) -> Batch:
    """One row of tokens: prompt₁ chosen₁ rejected₁ prompt₂ …; each response's positions go on from the end of its prompt."""
    ids, positions, index, targets, response, lengths, tree, start = [], [], [], [], [], [], [], 0
    for e in examples:
        ids.append(np.array(e.prompt))
        positions.append(np.arange(len(e.prompt)))
        last, at = start + len(e.prompt) - 1, start + len(e.prompt)
        for r in e.responses:
            ids.append(np.array(r))
            positions.append(len(e.prompt) + np.arange(len(r)))
            index.append(np.concatenate([[last], np.arange(at, at + len(r) - 1)]))
            targets.append(np.array(r))
            response.append(np.full(len(r), len(lengths)))
            lengths.append(len(r))
            at += len(r)
        tree.append((len(e.prompt), [len(r) for r in e.responses]))
        start = at
    if not examples:  # a rank without work still takes part in every collective: one token, nothing scored
        ids, positions, tree = [np.zeros(1, dtype=np.int64)], [np.zeros(1, dtype=np.int64)], [(0, [1])]
    row = lambda x: torch.from_numpy(np.concatenate(x))[None]  # noqa: E731
    return _batch(row(ids), row(positions), index, targets, response, lengths, tree)


LAYOUTS = {"packed": packed_batch, "padded": padded_batch}


# ---- the embedded world ----------------------------------------------------------------------------------------------

KINDS = {
    "animals": "cat dog cow horse goat sheep pig duck",
    "fruits": "apple pear plum lemon peach mango cherry fig",
    "colors": "red blue green white black brown pink gray",
    "tools": "hammer saw drill wrench file axe rake shovel",
    "metals": "iron gold tin zinc lead silver copper nickel",
    "trees": "oak pine elm ash birch maple cedar willow",
    "foods": "bread rice soup cheese pasta salad cake stew",
    "clothes": "hat coat shirt scarf glove boot belt sock",
}
NUMBERS = {"two": 2, "three": 3, "four": 4}
ASKS = ("name", "list", "write", "give", "say", "show")
IDLE = ("well", "so", "maybe", "sure", "really")
HELD_OUT_PROMPTS = 512  # the first of an order: never demonstrated, never in a pair
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words.split()}


def world_tokenizer():
    """A word-level tokenizer with a chat template for the embedded world: one token a word."""
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<user>", "<assistant>", "<end>"]
    words = [*special, *ASKS, *NUMBERS, *KINDS, *KIND_OF, *IDLE, "and"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<end>", pad_token="<end>", additional_special_tokens=special[1:3]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} "
        "{% if m['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def world_prompts(seed: int = 0) -> list[str]:
    """All 3,168 prompts, "name three fruits" or "list two metals and four tools", each once, in an order of the seed's."""
    single = [f"{number} {kind}" for number in NUMBERS for kind in KINDS]
    double = [f"{a} and {b}" for a, b in itertools.product(single, single) if a.split()[1] != b.split()[1]]
    prompts = [f"{ask} {what}" for ask in ASKS for what in single + double]
    return [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))]


def _wanted(prompt: str) -> dict[str, int]:
    """ "list two metals and four tools" → {"metals": 2, "tools": 4}."""
    words = prompt.split()
    return {kind: NUMBERS[number] for number, kind in zip(words[1::3], words[2::3])}


def world_demonstration(prompt: str, rng: np.random.Generator) -> str:
    """What a careless person would answer: idle words, then items of which some are wrong, repeated, missing or too many."""
    parts = []
    for kind, number in _wanted(prompt).items():
        own, start = KINDS[kind].split(), rng.integers(8)
        items = [own[(start + i) % 8] for i in range(number + rng.choice([-1, 0, 0, 0, 1, 2]))]  # the customary order
        for i in range(len(items)):
            if rng.random() < 0.1:
                items[i] = rng.choice(list(KIND_OF))
            elif i and rng.random() < 0.1:
                items[i] = items[i - 1]
        parts.append(" ".join(items))
    idle = [rng.choice(IDLE) for _ in range(rng.integers(0, 3))]
    return " ".join([*idle, " and ".join(parts)])


def world_quality(prompt: str, response: str) -> float:
    """True quality of a response, at most 1: the share of the asked items given, less ½ share per wrong, repeated or surplus
    item and 0.1 per idle word."""
    words = response.split()
    items, idle = [w for w in words if w in KIND_OF], sum(w in IDLE for w in words)
    n = sum(_wanted(prompt).values())
    right = sum(min(number, len({w for w in items if KIND_OF[w] == kind})) for kind, number in _wanted(prompt).items())
    return right / n - 0.5 * (len(items) - right) / n - 0.1 * idle


def world_repetition(response: str) -> float:
    """Share of the items that were named before in the same response."""
    items = [w for w in response.split() if w in KIND_OF]
    return 1 - len(set(items)) / len(items) if items else 0.0


class Annotator(NamedTuple):
    """Prefers by true quality, as far as it can see: a score is quality + noise · N(0, 1) + length_bias · words.

    The noise of a (prompt, response) is drawn from seed and texts, so a response scored twice has one score.
    """

    noise: float = 0.0
    length_bias: float = 0.0
    seed: int = 0

    def __call__(self, row: dict, response: str) -> float:
        prompt = row["prompt"][-1]["content"]
        drawn = random.Random(f"{self.seed} {prompt} {response}").gauss(0.0, self.noise)
        return world_quality(prompt, response) + drawn + self.length_bias * len(response.split())


def tiny_world(seed: int = 0, demonstrations: int = 4096, pairs: int = 0) -> tuple:
    """(tokenizer, demonstration rows, preference rows): data in the same form as real data, with a known true quality.

    A pair is two demonstrations of one prompt, the truly better one chosen; ties are drawn again.
    """
    rng, prompts = np.random.default_rng(seed), world_prompts(seed)[HELD_OUT_PROMPTS:]
    user = lambda prompt: [{"role": "user", "content": prompt}]  # noqa: E731
    shown = []
    for prompt in rng.choice(prompts, demonstrations):
        shown.append(Row(user(str(prompt)), [world_demonstration(prompt, rng)]))
    compared = []
    while len(compared) < pairs:
        prompt = str(rng.choice(prompts))
        a, b = world_demonstration(prompt, rng), world_demonstration(prompt, rng)
        better, worse = world_quality(prompt, a), world_quality(prompt, b)
        if better != worse:
            compared.append(Row(user(prompt), [a, b] if better > worse else [b, a]))
    return world_tokenizer(), shown, compared


# ---- making pairs on policy: sample → score → pairs ------------------------------------------------------------------
#
# Every step reads and writes JSON lines, so another engine can take its place:
#   sample  {prompt} or any row with a prompt  → {id, prompt: [messages], responses: [text], strategies, unfinished, …settings}
#   score   {prompt, responses}                → the same with scores: [number]
#   pairs   {prompt, responses, scores}        → {id, prompt, chosen, rejected, score_chosen, score_rejected}


def _prompt(row: dict, where: str) -> list[dict]:
    """The prompt of a row: a prompt column, AlpacaEval's instruction, Arena-Hard's one turn, or that of any pair format."""
    turns = row.get("turns")
    if "prompt" in row or "instruction" in row:
        return _row(_messages(row.get("prompt", row.get("instruction")), "prompt"), []).prompt
    if turns is None:
        return format_of(row, where)[0](row).prompt
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], dict):
        raise UserError("turns is not a list of one turn {content}")
    return _messages(turns[0].get("content"), "turns")


def prompts_of(source: str, columns: str = "") -> Iterator[tuple[str, dict, list[dict]]]:
    """(where, row with an id, prompt messages) of every usable row of all sources; what is left out is named on stderr."""
    renamed, used, left_out = _renamed(columns), 0, 0
    if any(weight != 1 for _, weight in _sources(source)):
        raise UserError(f"{source}: a weight (@) says how often to train on a row; here it has no meaning")
    for where, raw in itertools.chain.from_iterable(read(name) for name, _ in _sources(source)):
        try:
            if not isinstance(raw, dict):
                raise raw if isinstance(raw, UserError) else UserError("the row is not an object with columns")
            row = raw | {new: raw.get(old) for new, old in renamed.items()}
            prompt = _prompt(row, where)
        except UserError as error:
            left_out += 1
            if left_out <= 5:
                print(f"{where}: left out ({str(error).removeprefix(f'{where}: ')})", file=sys.stderr)
            continue
        used += 1
        yield where, {**row, "id": hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:16]}, prompt
    if left_out > 5:
        print(f"{source}: {left_out} rows left out in all", file=sys.stderr)
    if not used:
        raise UserError(f"{source}: no row with a usable prompt")


def _resumed(source: str, out: str) -> list[dict]:
    """The rows of an unfinished output; a line cut short by a kill is taken off."""
    path = Path(out)
    _keep_apart(source, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        rows = [json.loads(line) for line in complete.split("\n") if line]
        if not all(isinstance(row["id"], str) and isinstance(row["responses"], list) for row in rows):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out}: not the output of an earlier run of this command, so it cannot be continued") from error
    if complete != text:
        path.write_text(complete, encoding="utf-8")
    return rows


def _keep_apart(source: str, out: str) -> None:
    if any(os.path.exists(name) and os.path.exists(out) and os.path.samefile(name, out) for name, _ in _sources(source)):
        raise UserError(f"{out}: is read and written at once; give another --out")


def _write(out: str, rows: list[dict]) -> None:
    with open(out, "a", encoding="utf-8") as f:
        f.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _load_model(name: str, auto, device: str):
    try:
        model, found = auto.from_pretrained(name, dtype="auto", use_safetensors=True, output_loading_info=True)
    except Exception as error:  # transformers raises many kinds; all mean that there is no such model
        raise UserError(
            f"{name}: no loadable {auto.__name__.removeprefix('AutoModelFor')} model there ({_brief(error)})"
        ) from error
    if found["missing_keys"]:  # transformers would fill them with noise
        raise UserError(f"{name}: is another kind of model, it lacks {', '.join(sorted(found['missing_keys'])[:3])}")
    device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).train(False)


@torch.no_grad()
def _answers(model, tokenizer, prompts: list[list[dict]], temperature, top_p, max_tokens, seed, cut: list[int]) -> list[str]:
    """One answer to each prompt, sampled (temperature 0: greedy); the places of those that did not end within max_tokens are
    added to `cut`."""
    ids = [encode(Row(p, [MARK]), tokenizer, 2**31, 2**31)[0].prompt for p in prompts]
    width = max(map(len, ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    inputs = torch.tensor([[pad] * (width - len(x)) + x for x in ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in ids], device=model.device)
    stop = model.generation_config.eos_token_id or tokenizer.eos_token_id
    if stop is None:
        raise UserError("the model has no token that ends a response (eos_token_id of its generation config)")
    how = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0) if temperature > 0 else dict(do_sample=False)
    torch.manual_seed(seed)
    out = model.generate(
        input_ids=inputs, attention_mask=mask, max_new_tokens=max_tokens, eos_token_id=stop, pad_token_id=pad, **how
    )
    stops = {stop} if isinstance(stop, int) else set(stop)
    ended = [bool(stops & set(answer)) for answer in out[:, width:].tolist()]
    texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    cut += [i for i, done in enumerate(ended) if not done]
    return [text.strip() for text in texts]


STEP_BY_STEP = "\n\nThink step by step, then give the final answer."
APPROACHES = "\n\nName {n} clearly different approaches to this, one per line, numbered. Do not carry them out yet."
BY_APPROACH = "\n\nAnswer by this approach: {approach}"


def _with(prompt: list[dict], addition: str) -> list[dict]:
    return [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + addition}]


def _asked(strategy: str, prompts: list[list[dict]], n: int, answer: Callable) -> list[list[dict]]:
    """The n questions that a strategy puts for each prompt, prompt by prompt; `answer` is asked for approaches first by dts."""
    if strategy == "plain":
        return [p for p in prompts for _ in range(n)]
    if strategy == "cot":
        return [_with(p, STEP_BY_STEP) for p in prompts for _ in range(n)]
    plans = answer([_with(p, APPROACHES.format(n=n)) for p in prompts], cut=[])
    found = [re.findall(r"^\s*\d+[.):]\s*(.+)$", plan, re.MULTILINE)[:n] for plan in plans]
    lists = [names + [None] * (n - len(names)) for names in found]  # too few approaches: the rest is sampled plainly
    return [_with(p, BY_APPROACH.format(approach=a)) if a else p for p, names in zip(prompts, lists) for a in names]


def sample(
    model: str,
    prompts: str,
    out: str,
    *,
    n: int = 5,
    strategy: str = "plain",
    temperature: float = 0.8,
    top_p: float = 0.95,
    max_tokens: int = 512,
    batch_size: int = 8,
    columns: str = "",
    seed: int = 0,
    device: str = "auto",
    keep_unfinished: bool = False,
) -> None:
    """Sample n responses to every prompt and add them to `out`, which is continued if it is there.

    strategy: "plain"; "cot" asks for thinking step by step; "dts" first asks for n different approaches and then for an answer
    by each; several with commas between give n responses each. The prompt that is written is the one that was given. Equal
    responses are kept once; one that did not end within max_tokens is counted and left out, since no terminator followed it,
    unless `keep_unfinished`, which keeps empty ones too, as a judge needs them.
    Prompts go in fixed batches with a seed of their own, so a continued run writes what an unbroken one would have written.
    """
    strategies = [name.strip() for name in strategy.split(",")]
    if not set(strategies) <= {"plain", "cot", "dts"}:
        raise UserError(f"strategy is {strategy!r}; accepted are plain, cot, dts, or several with commas between")
    if n < 1 or batch_size < 1 or max_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise UserError("n, batch_size and max_tokens are at least 1, temperature at least 0, top_p above 0 and at most 1")
    how = dict(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
    made = dict(model=model, strategy=strategy, n=n, batch_size=batch_size, **how, seed=seed)
    done = {row["id"]: row for row in _resumed(prompts, out)}
    for row in done.values():
        if other := [f"{k} {row[k]}, now {v}" for k, v in made.items() if row.get(k, v) != v]:
            raise UserError(f"{out}: was begun with {'; '.join(other)}; give the same settings or another --out")
    rows = list({row["id"]: prompt for _, row, prompt in prompts_of(prompts, columns)}.items())
    from transformers import AutoModelForCausalLM

    tokenizer, policy = load_tokenizer(model), _load_model(model, AutoModelForCausalLM, device)
    answer = functools.partial(_answers, policy, tokenizer, **how)
    for start in tqdm(range(0, len(rows), batch_size), desc="sample", unit=" batches", disable=not sys.stderr.isatty()):
        part = rows[start : start + batch_size]
        if all(key in done for key, _ in part):
            continue
        ended, unfinished = [{} for _ in part], Counter()  # per prompt: response → the strategy that gave it first
        for name in strategies:
            asked = _asked(name, [prompt for _, prompt in part], n, functools.partial(answer, seed=seed + start))
            cut = []
            for i, text in enumerate(answer(asked, seed=seed + start + 1, cut=cut)):
                if keep_unfinished or text and i not in cut:
                    ended[i // n].setdefault(text, name)
            unfinished.update(i // n for i in cut)
        lines = [
            {"id": key, "prompt": prompt, "responses": list(by), "strategies": list(by.values()), "unfinished": unfinished[i]}
            for i, ((key, prompt), by) in enumerate(zip(part, ended))
            if key not in done
        ]
        _write(out, [line | made for line in lines])


def _rule(name: str) -> Callable[[dict, str], float]:
    """ "file.py:function" or "module:function" → that function of (row, response)."""
    place, _, function = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return getattr(module, function)
    except (ImportError, OSError, AttributeError, ValueError, SyntaxError) as error:
        raise UserError(f"rule is {name!r}, which is no file.py:function or module:function ({_brief(error)})") from error


def _judge(name: str, device: str, batch_size: int) -> Callable[[dict, list[dict], list[str]], list[float]]:
    """A reward model as a function of (row, prompt, responses); responses go padded on the right, batch_size at a time."""
    from transformers import AutoModelForSequenceClassification

    tokenizer, judge = load_tokenizer(name), _load_model(name, AutoModelForSequenceClassification, device)
    if judge.config.num_labels != 1:
        raise UserError(f"{name}: gives {judge.config.num_labels} numbers per text; a reward model gives one")
    config = judge.config.get_text_config()
    own = config.pad_token_id

    @torch.no_grad()
    def grade(row, prompt, texts):
        coded = [encode(Row(prompt, [text]), tokenizer, 2**31, 2**31)[0] for text in texts]
        ids, found = [e.prompt + e.responses[0] for e in coded], []
        if own is None:  # transformers looks for the last token that is no padding, so padding must be an id not in use
            config.pad_token_id = next(i for i in range(config.vocab_size) if not any(i in x for x in ids))
        for start in range(0, len(ids), batch_size):
            part = ids[start : start + batch_size]
            width = max(map(len, part))
            inputs = torch.tensor([x + [config.pad_token_id] * (width - len(x)) for x in part], device=judge.device)
            mask = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in part], device=judge.device)
            found += judge(input_ids=inputs, attention_mask=mask).logits[:, 0].tolist()
        return found

    return grade


def score(
    responses: str, out: str, *, reward_model: str = "", rule: str | Callable = "", batch_size: int = 8, device: str = "auto"
) -> None:
    """Add `scores` to rows of {prompt, responses} and write them to `out`, which is continued if it is there.

    reward_model: a transformers sequence-classification model with one output; it reads prompt and response through its own
    chat template. rule: a Python function of (row, response), or its name, that gives a number, or true and false.
    """
    if bool(reward_model) == bool(rule) or batch_size < 1:
        raise UserError("score needs either reward_model or rule, and a batch_size of at least 1")
    key = lambda row: json.dumps([row["id"], row["responses"]])  # noqa: E731
    done = set(map(key, _resumed(responses, out)))
    if rule:
        function = _rule(rule) if isinstance(rule, str) else rule
        grade = lambda row, prompt, texts: [float(function(row, text)) for text in texts]  # noqa: E731
    else:
        grade = _judge(reward_model, device, batch_size)
    for where, row, prompt in tqdm(prompts_of(responses), desc="score", unit=" rows", disable=not sys.stderr.isatty()):
        if not isinstance(row.get("responses"), list) or not all(isinstance(x, str) for x in row["responses"]):
            raise UserError(f"{where}: responses is not a list of texts")
        if key(row) in done:
            continue
        try:
            scores = [_score(x, "a score") for x in grade(row, prompt, row["responses"])]
        except Exception as error:  # a rule is anybody's code
            why = f"{type(error).__name__}: {_brief(error)}"
            raise UserError(f"{where}: {rule or reward_model} cannot score it ({why})") from error
        _write(out, [{**row, "scores": scores}])


def pairs(scored: str, out: str, *, how: str = "best_worst", min_margin: float = 0.0, seed: int = 0) -> Counter:
    """Turn rows of {prompt, responses, scores} into preference pairs; returns how many prompts gave a pair, or why not.

    Responses of several rows with the same prompt are taken together.
    how: "best_worst"; "random", two responses of different score; "correct", a random response with a score above ½ against a
    random one with at most ½. min_margin: the least difference of scores of a pair.
    """
    if how not in ("best_worst", "random", "correct"):
        raise UserError(f"how is {how!r}; accepted are best_worst, random, correct")
    _keep_apart(scored, out)
    counts, lines, prompts = Counter(), [], {}
    for _, row, prompt in prompts_of(scored):
        texts, values = row.get("responses"), row.get("scores")
        try:
            if not isinstance(texts, list) or not isinstance(values, list) or len(texts) != len(values):
                raise UserError("responses and scores are not two lists of the same length")
            texts = [_text(x, f"responses {i}") for i, x in enumerate(texts, 1)]
            found = dict(zip(texts, [_score(x, "scores") for x in values]))
        except UserError as error:
            counts[str(error)] += 1
            continue
        prompts.setdefault(row["id"], (prompt, {}))[1].update(found)
    for key, (prompt, scores) in prompts.items():
        rng, order = random.Random(f"{seed} {key}"), sorted(scores, key=lambda text: -scores[text])
        found = [(a, b) for a, b in itertools.combinations(order, 2) if scores[a] - scores[b] >= min_margin]
        found = [(a, b) for a, b in found if scores[a] > scores[b] and (how != "correct" or scores[a] > 0.5 >= scores[b])]
        if how == "best_worst":
            found = [(a, b) for a, b in found if scores[a] == scores[order[0]] and scores[b] == scores[order[-1]]][:1]
        few, alike = "fewer than two responses", f"no two responses that differ as asked ({how}, min_margin {min_margin:g})"
        counts["pairs" if found else few if len(order) < 2 else alike] += 1
        if found:
            a, b = rng.choice(found)
            answers = {"chosen": a, "rejected": b, "score_chosen": scores[a], "score_rejected": scores[b]}
            lines.append({"id": key, "prompt": prompt, **answers})
    if not lines:
        raise UserError(f"{scored}: gives no pair: {'; '.join(f'{n} {why}' for why, n in counts.items())}")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text("", encoding="utf-8")
    _write(out, lines)
    return counts


# ---- looking at data -------------------------------------------------------------------------------------------------

SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
COLOURS = {"prompt": "2", "chosen": "1;32", "rejected": "1;31", "completion": "1;36"}


def show(example: Example, tokenizer, colour: bool = True) -> str:
    """An example as text: every token followed by its id in small digits; the prompt dim, what is scored bright."""

    def piece(ids: list[int], part: str) -> str:
        text = "".join(f"{tokenizer.decode([i])}{str(i).translate(SUBSCRIPT)}" for i in ids)
        return f"\x1b[{COLOURS[part]}m{text}\x1b[0m" if colour else text

    parts = ["chosen", "rejected"] if example.desirable is None else ["completion"]
    lines = [f"── {example.where}", f"prompt ({len(example.prompt)} tokens, not scored)", piece(example.prompt, "prompt")]
    for part, ids in zip(parts, example.responses):
        label = "" if example.desirable is None else f", label {str(example.desirable).lower()}"
        lines += [f"{part} ({len(ids)} tokens, scored{label})", piece(ids, part)]
    return "\n".join(lines)


def stats(examples: Sequence[Example], report: Report) -> str:
    """Lengths in tokens with a histogram, length bias, and the report, as text."""
    names = ["prompt", "completion"] if examples[0].desirable is not None else ["prompt", "chosen", "rejected"]
    sizes = np.array([[len(e.prompt), *map(len, e.responses)] for e in examples])
    lines = [str(report), "", f"{'tokens':<12}{'mean':>8}{'p50':>8}{'p90':>8}{'p99':>8}{'max':>8}{'sum':>12}"]
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
    else:
        lines.append(f"\n{np.mean([e.desirable for e in examples]):.1%} of the rows are desirable")
    return "\n".join(lines)


LOAD_HELP = {
    "max_length": (int, "tokens of prompt + response; a longer response is cut"),
    "max_prompt_length": (int, "longer prompts lose their oldest tokens; without it 7/8 of max_length, with compat 1800/2048"),
    "format": (str, f"auto, or one of {', '.join(FORMATS)}"),
    "columns": (str, "columns to rename, new=old: prompt=question,chosen=good"),
    "compat": (str, "simpo: tokenise and cut as the released SimPO code does"),
    "control_tokens": (bool, "special tokens spelled in messages become real ones"),
    "equal_length": (float, "share of the pairs whose responses are cut to the same length (POET)"),
    "drop_duplicates": (bool, "keep only the first of rows with the same texts"),
    "drop_identical": (bool, "drop pairs whose responses are the same"),
    "drop_conflicts": (bool, "drop rows that say the opposite of another row"),
    "min_score_margin": (float, "drop pairs whose scores differ by less"),
    "seed": (int, "for everything random"),
}


def _add_options(command: argparse.ArgumentParser, options: dict[str, tuple], defaults: Callable) -> None:
    """`--name` and `--na-me` for keyword arguments of the function `defaults`, with its default values."""
    for name, (kind, text) in options.items():
        default = inspect.signature(defaults).parameters[name].default
        dashes = "-" if len(name) == 1 else "--"
        how = dict(action="store_true") if kind is bool else dict(type=kind, default=default)
        command.add_argument(
            *dict.fromkeys((f"{dashes}{name}", f"{dashes}{name.replace('_', '-')}")), help=f"{text} ({default})", **how
        )


SAMPLE_HELP = {
    "n": (int, "responses per prompt"),
    "strategy": (str, "plain, cot (think step by step), dts (n approaches, then an answer by each), or several with commas"),
    "temperature": (float, "of sampling; 0 is greedy"),
    "top_p": (float, "share of the probability that is sampled from"),
    "max_tokens": (int, "longer responses are left out"),
    "batch_size": (int, "prompts at a time"),
    "columns": (str, "columns to rename, new=old"),
    "seed": (int, "for everything random"),
    "device": (str, "cpu, cuda or auto"),
}
SCORE_HELP = {
    "reward_model": (str, "folder or hub name of a sequence-classification model"),
    "rule": (str, "file.py:function or module:function; called with (row, response), returns a number"),
    "batch_size": (int, "responses at a time"),
    "device": (str, "cpu, cuda or auto"),
}
PAIRS_HELP = {
    "how": (str, "best_worst, random (two of different score) or correct (above ½ against at most ½)"),
    "min_margin": (float, "least difference of scores"),
    "seed": (int, "for everything random"),
}
STEPS = {  # command → (function, what it needs, its options, help)
    "sample": (sample, ("model", "prompts", "out"), SAMPLE_HELP, "sample responses to prompts"),
    "score": (score, ("responses", "out"), SCORE_HELP, "score responses by a reward model or a rule"),
    "pairs": (pairs, ("scored", "out"), PAIRS_HELP, "make preference pairs of scored responses"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Look at preference data as the trainer sees it, and make it on policy.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("show", "print rows as coloured tokens: prompt dim, scored response bright"),
        ("stats", "print lengths with a histogram, length bias, duplicates, conflicts, what is cut or dropped and why"),
    ):
        cmd = commands.add_parser(name, help=text)
        cmd.add_argument("--model", required=True, help="folder or hub name whose tokenizer and chat template to use")
        cmd.add_argument("--dataset", required=True, help="sources: files, folders, patterns, -, hub names; see the README")
        if name == "show":
            cmd.add_argument("-n", type=int, default=3, help="rows to print (3)")
        _add_options(cmd, LOAD_HELP, load)
    for name, (function, needed, options, text) in STEPS.items():
        cmd = commands.add_parser(name, help=text)
        for argument in needed:
            cmd.add_argument(
                f"--{argument}", required=True, help="JSON lines to write" if argument == "out" else "what to read"
            )
        _add_options(cmd, options, function)
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line as a function. What the user can mend ends with a message and exit code 2."""
    args = _parser().parse_args(argv)
    try:
        if args.command in STEPS:
            function, needed, options, _ = STEPS[args.command]
            counts = function(**{name: getattr(args, name) for name in (*needed, *options)})
            return print("\n".join(f"{n} {what}" for what, n in counts.items())) if counts else None
        tokenizer = load_tokenizer(args.model)
        settings = {name: getattr(args, name) for name in LOAD_HELP}
        examples, report = load(args.dataset, tokenizer, max_drop_fraction=1.0, **settings)
        if args.command == "stats":
            return print(stats(examples, report))
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ or "FORCE_COLOR" in os.environ
        print("\n\n".join(show(examples[i], tokenizer, colour) for i in range(min(args.n, len(examples)))))
        print(f"\n{report}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a place that cannot be written, a full disk
        print(f"error: {error.filename or args.command}: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
