"""From rows to batches: read → check → token ids → step plan → padded or packed microbatches.

A row of any accepted format becomes prompt messages and one or more responses (`Row`), then token ids (`Example`): the prompt
as the chat template renders it with the generation prompt, and for each response exactly the ids that generation would have
to produce after it, terminator included. What does not fit is dropped, counted and reported with its file and row number.

    python data.py show --model MODEL --dataset FILE -n 3       # look at rows as coloured tokens

Shape letters: B examples · R responses · T tokens of a batch · N scored tokens.
"""

import argparse
import gzip
import heapq
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")

PLAIN_TEMPLATE = (  # for tokenizers without a chat template; saved with the exported model, so that generation uses it too
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


class DataError(Exception):
    """Something about the data that its owner can mend; the message says what, where and how."""


class Row(NamedTuple):
    """One checked row: a prompt and the responses to compare ([chosen, rejected]) or to judge ([completion] and its label)."""

    prompt: list[dict]  # messages {role, content}
    responses: list[str]
    desirable: bool | None = None  # None for pairs


class Example(NamedTuple):
    """One row as token ids. Training scores the responses only."""

    prompt: list[int]
    responses: list[list[int]]
    desirable: bool | None = None
    where: str = ""  # file and row, for messages


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(dataset: str) -> Iterator[tuple[str, dict | Exception]]:
    """Yield (where, row) from a file, a folder of files, or a hub dataset; an unreadable row is yielded as its error.

    Args:
        dataset: a path ending in .json, .jsonl, either with .gz, or .parquet; a folder holding such files; or a hub name,
            optionally with a split, "org/name:split" (default train). A slice takes some of the rows: "pairs.jsonl[:1000]".
    Raises:
        DataError: nothing there, or a file that cannot be read at all.
    """
    name, cut = re.fullmatch(r"(.*?)(\[-?\d*:-?\d*\])?", dataset).groups()
    rows = _read_path(Path(name)) if Path(name).exists() else _read_hub(name)
    if cut is None:
        return rows
    first, last = (int(x) if x else None for x in cut[1:-1].split(":"))
    return iter(list(rows)[first:last])


def _read_path(path: Path) -> Iterator[tuple[str, dict | Exception]]:
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
        if not files:
            raise DataError(f"{path}: no data file in this folder; looked for {', '.join(SUFFIXES)}")
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise DataError(f"{file}: unknown kind of file; accepted are {', '.join(SUFFIXES)}")
        yield from _read_parquet(file) if file.suffix == ".parquet" else _read_json(file)


def _read_parquet(file: Path):
    from pyarrow import ArrowException, parquet

    try:
        batches = parquet.ParquetFile(file).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{file} row {number}", row
    except (OSError, ArrowException) as error:
        raise DataError(f"{file}: not a readable parquet file ({error})") from error


def _read_json(file: Path):
    lines = ".jsonl" in file.suffixes
    try:
        with gzip.open(file, "rt", encoding="utf-8-sig") if file.suffix == ".gz" else open(file, encoding="utf-8-sig") as f:
            if not lines:
                rows = json.load(f)
                if not isinstance(rows, list):
                    raise DataError(f"{file}: holds a JSON {type(rows).__name__}, not a list of rows")
                for number, row in enumerate(rows, 1):
                    yield f"{file} row {number}", row
                return
            for number, line in enumerate(f, 1):
                if line.strip():
                    try:
                        yield f"{file} row {number}", json.loads(line)
                    except ValueError as error:
                        yield f"{file} row {number}", DataError(f"not valid JSON ({error})")
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error


def _read_hub(name: str):
    from datasets import load_dataset

    if name.startswith((".", "/", "~")) or name.endswith(SUFFIXES):
        raise DataError(f"{name}: no such file or folder")
    path, _, split = name.partition(":")
    try:
        rows = load_dataset(path, split=split or "train")
    except Exception as error:  # the hub client raises many kinds; all mean that the name gives no rows
        raise DataError(f"{name}: no such file or folder, and not loadable from the hub ({str(error).splitlines()[0]})") from error
    for number, row in enumerate(rows, 1):
        yield f"{name} row {number}", row


# ---- checking: any format → Row --------------------------------------------------------------------------------------

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def _text(value, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} is {'missing' if value is None else 'a ' + type(value).__name__}, not text")
    if not value.strip():
        raise DataError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} is not valid unicode (a lone surrogate)") from None
    return value


def _messages(value, what: str) -> list[dict]:
    """A list of {role, content} (or ShareGPT's {from, value}) as messages with the usual role names; text is one user turn."""
    if isinstance(value, str):
        return [{"role": "user", "content": _text(value, what)}]
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{what} is {'missing' if value is None else 'neither text nor a non-empty list of messages'}")
    messages = []
    for i, m in enumerate(value, 1):
        if not isinstance(m, dict):
            raise DataError(f"{what} message {i} is a {type(m).__name__}, not {{role, content}}")
        role = m.get("role", m.get("from"))
        if not isinstance(role, str) or not role:
            raise DataError(f"{what} message {i} has no role")
        content = _text(m.get("content", m.get("value")), f"{what} message {i}")
        messages.append({"role": ROLES.get(role, role), "content": content})
    return messages


def _response(value, what: str) -> str:
    """A response given as text, as one assistant message, or as a list with one."""
    if isinstance(value, str):
        return _text(value, what)
    messages = _messages([value] if isinstance(value, dict) else value, what)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise DataError(f"{what} is not a single assistant message")
    return messages[0]["content"]


def _hh_messages(text: str, what: str) -> list[dict]:
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + _text(text, what).lstrip())
    if parts[0].strip() or len(parts) < 3:
        raise DataError(f'{what} is not a transcript of "\\n\\nHuman:" and "\\n\\nAssistant:" turns')
    return [
        {"role": "user" if who == "Human" else "assistant", "content": _text(said.strip(), f"{what} turn {i}")}
        for i, (who, said) in enumerate(zip(parts[1::2], parts[2::2]), 1)
    ]


def _implied(chosen: list[dict], rejected: list[dict]) -> Row:
    """Two whole conversations that differ in the last, assistant, turn only."""
    for what, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise DataError(f"{what} does not end with an assistant turn")
        if len(messages) < 2:
            raise DataError(f"{what} has no prompt before the response")
    if chosen[:-1] != rejected[:-1]:
        raise DataError("chosen and rejected answer different prompts")
    return Row(chosen[:-1], [chosen[-1]["content"], rejected[-1]["content"]])


def from_pair(row: dict) -> Row:
    """{prompt, chosen, rejected}: text, messages, or responses that repeat the whole conversation (UltraFeedback)."""
    sides = row.get("chosen"), row.get("rejected")
    if all(isinstance(s, (list, tuple)) and len(s) > 1 for s in sides):
        return _implied(_messages(sides[0], "chosen"), _messages(sides[1], "rejected"))
    return Row(_messages(row.get("prompt"), "prompt"), [_response(s, w) for s, w in zip(sides, ("chosen", "rejected"))])


def from_implied(row: dict) -> Row:
    """{chosen, rejected}: whole conversations, as messages or as Anthropic-HH transcripts."""
    read_one = _hh_messages if isinstance(row.get("chosen"), str) else _messages
    return _implied(*(read_one(row.get(side), side) for side in ("chosen", "rejected")))


def from_sharegpt(row: dict) -> Row:
    """{conversations, chosen, rejected} with {from, value} turns; an optional system text goes in front."""
    prompt = _messages(row.get("conversations"), "conversations")
    if row.get("system"):
        prompt = [{"role": "system", "content": _text(row["system"], "system")}] + prompt
    return Row(prompt, [_response(row.get(side), side) for side in ("chosen", "rejected")])


def _label(value) -> bool:
    if not isinstance(value, bool):
        raise DataError(f"label is {value!r}, not true or false")
    return value


def from_unpaired(row: dict) -> Row:
    """{prompt, completion, label}."""
    return Row(_messages(row.get("prompt"), "prompt"), [_response(row.get("completion"), "completion")], _label(row.get("label")))


def from_unpaired_messages(row: dict) -> Row:
    """{messages, label}: the last message, an assistant's, is judged."""
    messages = _messages(row.get("messages"), "messages")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError("messages do not end with an assistant turn after a prompt")
    return Row(messages[:-1], [messages[-1]["content"]], _label(row.get("label")))


FORMATS: list[tuple[tuple[str, ...], Callable[[dict], Row]]] = [  # the first whose columns are all there is taken
    (("conversations", "chosen", "rejected"), from_sharegpt),
    (("prompt", "chosen", "rejected"), from_pair),
    (("chosen", "rejected"), from_implied),
    (("prompt", "completion", "label"), from_unpaired),
    (("messages", "label"), from_unpaired_messages),
]


def format_of(columns: Iterable[str], where: str) -> Callable[[dict], Row]:
    """The reader for rows with these columns, or a DataError that says what was seen and what is accepted."""
    columns = set(columns)
    for needed, reader in FORMATS:
        if columns.issuperset(needed):
            return reader
    accepted = "; ".join("{" + ", ".join(needed) + "}" for needed, _ in FORMATS)
    raise DataError(f"{where}: unknown shape of dataset: its columns are {sorted(columns)}; accepted are {accepted}")


# ---- token ids -------------------------------------------------------------------------------------------------------


def load_tokenizer(model: str, trust_remote_code: bool = False):
    """The tokenizer of a folder or hub name; one without a chat template gets PLAIN_TEMPLATE."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds; all mean that there is no usable tokenizer
        raise DataError(f"{model}: no usable tokenizer there ({str(error).strip().splitlines()[0]})") from error
    if len(tokenizer) == 0:
        raise DataError(f"{model}: no usable tokenizer there (its vocabulary is empty)")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
        if tokenizer.bos_token is None:  # jinja would print "None"
            tokenizer.chat_template = PLAIN_TEMPLATE.replace("{{ bos_token }}", "")
    return tokenizer


def _ids(tokenizer, text: str) -> list[int]:
    # the template has already written BOS and every other special token, so none is added here
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _common(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def encode(row: Row, tokenizer, max_length: int, max_prompt_length: int) -> tuple[Example, list[str]]:
    """Row → token ids, by the common-prefix rule.

    prompt = ids of template(prompt, generation prompt); whole = ids of template(prompt + response), without the whitespace
    that a template writes after the terminator (generation has stopped by then). The response is `whole` minus the longest
    prefix that it shares with `prompt`; where the tokenizer merges across the boundary, the merged token is the response's
    and the stored prompt ends before it, for all responses of the row alike.

    Lengths: a prompt above `max_prompt_length` loses its oldest tokens; a response is then cut so that prompt + response ≤
    `max_length`, and a cut response has no terminator. Both cuts are named in the second value.

    Raises:
        DataError: the template refuses the row, or its prompt is not a prefix of the whole, or there is no room.
    """
    try:
        prompt_text = tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True)
        texts = []
        for response in row.responses:
            turn = {"role": "assistant", "content": response}
            text = tokenizer.apply_chat_template([*row.prompt, turn], tokenize=False)
            end = text.rfind(response.strip()) + len(response.strip())
            texts.append(text.rstrip() if text[end:].strip() else text)
    except Exception as error:  # templates raise what they like, most often jinja2's TemplateError
        raise DataError(f"the chat template refuses this row ({error})") from error
    prompt, wholes = _ids(tokenizer, prompt_text), [_ids(tokenizer, t) for t in texts]
    shared = min(_common(prompt, whole) for whole in wholes)
    if len(prompt) - shared > 8:
        raise DataError("the chat template renders the prompt differently once a response follows")
    if shared == 0:
        raise DataError("the prompt has no token from which the first response token could be predicted")
    prompt, responses, cuts = prompt[:shared], [whole[shared:] for whole in wholes], []
    if len(prompt) > max_prompt_length:
        prompt, cuts = prompt[-max_prompt_length:], ["prompt cut"]
    room = max_length - len(prompt)
    if room < 1 or not all(responses):
        raise DataError(f"no response token is left within max_length {max_length}")
    if any(len(r) > room for r in responses):
        responses, cuts = [r[:room] for r in responses], [*cuts, "response cut"]
    return Example(prompt, responses, row.desirable), cuts


class Report(NamedTuple):
    """What became of a dataset's rows."""

    rows: int
    kept: int
    dropped: dict[str, int]  # reason → rows
    first: list[str]  # the first few dropped rows, "file row n: reason"
    cut: dict[str, int]  # "prompt cut" / "response cut" → rows

    def __str__(self) -> str:
        lines = [f"{self.kept} of {self.rows} rows kept" + "".join(f", {n} {what}" for what, n in self.cut.items())]
        lines += [f"  dropped {n}: {reason}" for reason, n in self.dropped.items()]
        return "\n".join(lines + [f"    {line}" for line in self.first])


def load(
    dataset: str, tokenizer, max_length: int = 2048, max_prompt_length: int | None = None, max_drop_fraction: float = 0.1
) -> tuple[list[Example], Report]:
    """Read, check and tokenise a dataset. Order is kept; the report says what was dropped and why.

    Args:
        max_length: tokens of prompt + response. max_prompt_length: None means seven eighths of it.
        max_drop_fraction: more dropped rows than this share is an error.
    Raises:
        DataError: unreadable source, unknown columns, no valid rows, or too many dropped.
    """
    max_prompt_length = max_prompt_length or max_length * 7 // 8
    rows = iter(read(dataset))
    return _encode_all(rows, dataset, tokenizer, max_length, max_prompt_length, max_drop_fraction)


def _encode_all(rows, dataset, tokenizer, max_length, max_prompt_length, max_drop_fraction):
    examples, total, dropped, first, cut, reader = [], 0, Counter(), [], Counter(), None
    for where, raw in tqdm(rows, desc="tokenise", unit=" rows", leave=False, disable=not sys.stderr.isatty()):
        total += 1
        try:
            if isinstance(raw, Exception):
                raise raw
            if not isinstance(raw, dict):
                raise DataError(f"the row is a {type(raw).__name__}, not an object with columns")
            reader = reader or format_of(raw, where)
        except DataError as error:
            if isinstance(raw, dict):
                raise
            dropped[str(error)] += 1
            first.append(f"{where}: {error}")
            continue
        try:
            example, cuts = encode(reader(raw), tokenizer, max_length, max_prompt_length)
            examples.append(example._replace(where=where))
            cut.update(cuts)
        except DataError as error:
            dropped[str(error)] += 1
            first.append(f"{where}: {error}")
    report = Report(total, len(examples), dict(dropped.most_common()), first[:5], dict(cut))
    if not examples:
        raise DataError(f"{dataset}: no valid rows\n{report}")
    if total - len(examples) > max_drop_fraction * total:
        raise DataError(f"{dataset}: more than {max_drop_fraction:.0%} of the rows were dropped (--max_drop_fraction)\n{report}")
    return examples, report


# ---- step plan and microbatches --------------------------------------------------------------------------------------


def step_plan(examples: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Indices of the examples of each optimizer step of an epoch: perm(seed, epoch) cut into pieces of `batch_size`.

    A pure function, so a resumed run needs no loader state. The last step takes what is left.
    """
    order = np.random.default_rng([seed, epoch]).permutation(examples)
    return [order[i : i + batch_size] for i in range(0, examples, batch_size)]


def split_held_out(examples: list, held_out: int, seed: int) -> tuple[list, list]:
    """(train, held out): `held_out` examples drawn with the seed, both parts in the order of the file."""
    chosen = set(np.random.default_rng([seed, 2**31]).permutation(len(examples))[:held_out].tolist())
    return [e for i, e in enumerate(examples) if i not in chosen], [e for i, e in enumerate(examples) if i in chosen]


def tokens_of(example: Example) -> int:
    """Tokens of a packed example: its prompt once and every response."""
    return len(example.prompt) + sum(map(len, example.responses))


def split_by_tokens(sizes: list[int], budget: int, ranks: int = 1) -> list[list[int]]:
    """Split items into groups of at most `budget` tokens, as equal as a greedy pass makes them.

    Longest first, each into the lightest group. The number of groups is a multiple of `ranks` (rank r takes groups r::ranks);
    some groups may be empty. An item above the budget gets a group of its own. Nothing is dropped or repeated.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    count = -(-max(1, -(-sum(sizes) // budget)) // ranks) * ranks
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
}
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
ASKS = ("name", "list", "write")
IDLE = ("well", "so", "maybe", "sure", "really")
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words.split()}


def world_tokenizer():
    """A word-level tokenizer with a chat template for the embedded world: one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<user>", "<assistant>", "<end>"]
    words = [*special, *ASKS, *NUMBERS, *KINDS, *KIND_OF, *IDLE, ",", "and"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<end>", pad_token="<end>", additional_special_tokens=special[1:3]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% if m['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def world_prompt(rng: np.random.Generator) -> str:
    return f"{rng.choice(ASKS)} {rng.choice(list(NUMBERS))} {rng.choice(list(KINDS))}"


def world_demonstration(prompt: str, rng: np.random.Generator) -> str:
    """What a careless person would answer: idle words, then items of which some are wrong, repeated, missing or too many."""
    _, number, kind = prompt.split()
    own, count = KINDS[kind].split(), NUMBERS[number] + rng.choice([-1, 0, 0, 0, 1, 2])
    start = rng.integers(len(own))
    items = [own[(start + i) % len(own)] for i in range(count)]  # the customary order, from anywhere
    for i in range(len(items)):
        if rng.random() < 0.1:
            items[i] = rng.choice(list(KIND_OF))
        elif i and rng.random() < 0.1:
            items[i] = items[i - 1]
    idle = [rng.choice(IDLE) for _ in range(rng.integers(0, 3))]
    return " ".join([*idle, " , ".join(items)])


def world_quality(prompt: str, response: str) -> float:
    """True quality of a response, at most 1: the share of the asked items given, less ½ share per wrong, repeated or surplus
    item and 0.1 per idle word."""
    _, number, kind = prompt.split()
    n, items = NUMBERS[number], [w for w in response.split() if w in KIND_OF]
    right = min(n, len({w for w in items if KIND_OF[w] == kind}))
    idle = sum(w in IDLE for w in response.split())
    return right / n - 0.5 * (len(items) - right) / n - 0.1 * idle


def tiny_world(seed: int = 0, demonstrations: int = 4096, pairs: int = 3272) -> tuple:
    """(tokenizer, demonstration rows, preference rows): data in the same form as real data, with a known true quality.

    A pair is two demonstrations of one prompt, the truly better one chosen; ties are drawn again.
    """
    rng = np.random.default_rng(seed)
    user = lambda prompt: [{"role": "user", "content": prompt}]  # noqa: E731
    shown = []
    for _ in range(demonstrations):
        prompt = world_prompt(rng)
        shown.append(Row(user(prompt), [world_demonstration(prompt, rng)]))
    compared = []
    while len(compared) < pairs:
        prompt = world_prompt(rng)
        a, b = world_demonstration(prompt, rng), world_demonstration(prompt, rng)
        better, worse = world_quality(prompt, a), world_quality(prompt, b)
        if better != worse:
            compared.append(Row(user(prompt), [a, b] if better > worse else [b, a]))
    return world_tokenizer(), shown, compared


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Look at preference data as the trainer sees it.")
    commands = parser.add_subparsers(dest="command", required=True)
    cmd = commands.add_parser("show", help="print rows as coloured tokens: prompt dim, scored response bright")
    cmd.add_argument("--model", required=True, help="folder or hub name whose tokenizer and chat template to use")
    cmd.add_argument("--dataset", required=True, help="file, folder or hub name; a slice may follow: pairs.jsonl[10:20]")
    cmd.add_argument("-n", type=int, default=3, help="rows to print")
    cmd.add_argument("--max_length", "--max-length", type=int, default=2048)
    cmd.add_argument("--max_prompt_length", "--max-prompt-length", type=int, default=None)
    args = parser.parse_args(argv)
    tokenizer = load_tokenizer(args.model)
    examples, report = load(args.dataset, tokenizer, args.max_length, args.max_prompt_length, max_drop_fraction=1.0)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ or "FORCE_COLOR" in os.environ
    print("\n\n".join(show(e, tokenizer, colour) for e in examples[: args.n]))
    print(f"\n{report}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.exit(0)
