"""Preference pairs of a model's own answers: sample → score → pairs.

    python tests/tools/on_policy.py sample --model MODEL --prompts PROMPTS.jsonl --out sampled.jsonl -n 5
    python tests/tools/on_policy.py score  --responses sampled.jsonl --out scored.jsonl --reward_model REWARD_MODEL
    python tests/tools/on_policy.py pairs  --scored scored.jsonl --out pairs.jsonl --how best_worst

Every step reads and writes JSON lines, so another engine can take its place:

    sample  {prompt} or any row with a prompt  → {id, prompt: [messages], responses: [text], strategies, unfinished, tokens,
                                                  …settings}, and of mcts: rewards, sampled, tree
    score   {prompt, responses}                → the same with scores: [number]
    pairs   {prompt, responses, scores}        → {id, prompt, chosen, rejected, score_chosen, score_rejected}
    pairs --how step      {prompt, tree}       → the same with chosen_ends, rejected_ends
"""

import bisect
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
from data import (  # noqa: E402
    FORMATS,
    MARK,
    Row,
    UserError,
    _brief,
    _label,
    _messages,
    _renamed,
    _row,
    _say,
    _score,
    _sources,
    _text,
    bf16_in_hardware,
    device_named,
    encode,
    format_of,
    load_tokenizer,
    progress,
    read,
    refuse_unless_known,
    setting,
)
from logprobs import continuations  # noqa: E402


@dataclass
class Sampling:
    """Sample n responses to every prompt and add them to out, which is continued if it is there.

    The prompt that is written is the one that was given; beside it stand the row's own texts and numbers that no format reads,
    such as a right answer. Equal responses are kept once; one that did not end within max_tokens is counted and left out, since
    no terminator followed it. `tokens` counts all that were generated for a prompt, whatever became of them. Prompts go in
    fixed batches with a seed of their own, so a continued run writes what an unbroken one would have written.

    mcts searches a tree of steps (text up to step_end): each iteration goes down it by W/N + c√(ln N_parent/N), samples n
    answers from there on and adds the first step of each, equal ones once; an answer's reward is 1 where the rule gives above
    ½ (or true), else −1, also where it did not end. Published uses differ: the diversification paper's mcts is OptiLLM's, over
    whole turns of a dialogue, 22 generations for one answer; MCTS-DPO searches steps as here, but by PUCT, with the model's
    own evaluation.
    """

    model: str = setting(MISSING, "folder or hub name of a causal language model")
    prompts: str = setting(MISSING, "sources of rows with a prompt")
    out: str = setting(MISSING, "JSON lines to write")
    n: int = setting(5, "responses per prompt and strategy", aliases="-n")
    strategy: str = setting(
        "plain",
        "plain, cot (think step by step), dts (n approaches, then an answer by each), mcts (a tree of steps, needs rule), or "
        "several with commas",
    )
    rule: str = setting("", "mcts: file.py:function of (row, response); a number, or true and false")  # or the function itself
    iterations: int = setting(8, "mcts: steps of the tree from which n answers each are sampled")
    exploration: float = setting(1.4, "mcts: c, how much rarely visited steps are preferred")
    step_end: str = setting(r"\n", r"mcts: what ends a step, such as \n or ;")
    temperature: float = setting(0.8, "of sampling; 0 is greedy")
    top_p: float = setting(0.95, "share of the probability that is sampled from")
    max_tokens: int = setting(512, "longer responses are left out")
    batch_size: int = setting(8, "prompts at a time")
    columns: str = setting("", "columns to rename, new=old")
    seed: int = setting(0, "for everything random")
    device: str = setting("auto", "cpu, cuda or auto")
    keep_unfinished: bool = setting(False, "keep unfinished responses, and empty ones, as a judge needs them")


@dataclass
class Scoring:
    """Add scores to rows of {prompt, responses} and write them to out, which is continued if it is there.

    By a reward model, which reads prompt and response through its own chat template, or by a rule, a Python function of
    (row, response) that gives a number, or true and false.
    """

    responses: str = setting(MISSING, "sources of rows with a prompt and responses")
    out: str = setting(MISSING, "JSON lines to write")
    reward_model: str = setting("", "folder or hub name of a sequence-classification model with one output")
    rule: str = setting("", "file.py:function or module:function")  # in Python also the function itself
    batch_size: int = setting(8, "responses at a time")
    device: str = setting("auto", "cpu, cuda or auto")


@dataclass
class Pairing:
    """Make preference pairs of scored responses; responses of several rows with the same prompt are taken together."""

    scored: str = setting(MISSING, "sources of rows with a prompt, responses and scores")
    out: str = setting(MISSING, "JSON lines to write")
    how: str = setting(
        "best_worst",
        "best_worst, random (two of different score), correct (a random one above ½ against one at most ½) or step (of mcts: "
        "next steps of the same answer, highest against lowest mean reward; needs no scores)",
    )
    min_margin: float = setting(0.0, "least difference of scores, or of mean rewards, of a pair")
    min_visits: int = setting(2, "step: visits (N) of each of the two steps, at least")
    seed: int = setting(0, "for everything random")


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
    _writable(out)
    if not path.exists():
        return []
    if not path.is_file():
        raise UserError(f"{out}: is no file that could be continued")
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


def _writable(out: str) -> None:
    """Make the folder of a file to write; a file that cannot be written is refused now and not after hours."""
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch()
            path.unlink()
        elif not os.access(path, os.W_OK) or path.is_dir():
            raise UserError(f"{out}: cannot be written ({'a folder' if path.is_dir() else 'not permitted'})")
    except OSError as error:
        raise UserError(f"{out[:200]}: cannot be written ({error.strerror})") from error


def _keep_apart(source: str, out: str) -> None:
    if any(os.path.exists(name) and os.path.exists(out) and os.path.samefile(name, out) for name, _ in _sources(source)):
        raise UserError(f"{out}: is read and written at once; give another --out")


def _write(out: str, rows: list[dict], mode: str = "a") -> None:
    # a lone surrogate becomes its escape, which is JSON again; what JSON has no form for, such as a date, its text
    with open(out, mode, encoding="utf-8", errors="backslashreplace") as f:
        f.write("".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def _quiet(text: str) -> None: ...


def _load_model(name: str, kind: str, device: torch.device):
    """In the dtype that it was saved in; one in bf16, on a CPU that only emulates it, in fp32."""
    import transformers

    try:
        auto = getattr(transformers, f"AutoModelFor{kind}")
        model, info = auto.from_pretrained(name, dtype="auto", use_safetensors=True, output_loading_info=True)
    except Exception as error:  # transformers raises many kinds; all mean that there is no such model
        raise UserError(f"{name}: no loadable {kind} model there ({_brief(error)})") from error
    if info["missing_keys"]:  # transformers would fill them with noise
        raise UserError(f"{name}: is another kind of model, it lacks {', '.join(sorted(info['missing_keys'])[:3])}")
    if device.type == "cpu" and model.dtype == torch.bfloat16 and not bf16_in_hardware(device):
        model = model.float()
    return model.to(device).train(False)


def _continued(model, tokenizer, ids: list[list[int]], s: Sampling, max_tokens: int) -> tuple[list[list[int]], list[bool]]:
    """Token ids that follow each, without the terminator, and whether one came."""
    if not (model.generation_config.eos_token_id or tokenizer.eos_token_id):
        raise UserError("the model has no token that ends a response (eos_token_id of its generation config)")
    try:
        answers, ended = continuations(model, tokenizer, ids, max_tokens, s.temperature, s.top_p)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise UserError(f"{s.model}: its probabilities are not finite numbers; are its weights?") from error
    return [answer[: len(answer) - end] for answer, end in zip(answers, ended)], ended


def _asked(tokenizer, prompt: list[dict]) -> list[int]:
    return encode(Row(prompt, [MARK]), tokenizer, 2**31, 2**31)[0].prompt


def _answers(model, tokenizer, prompts: list[list[dict]], s: Sampling, seed: int) -> tuple[list[str], list[bool], list[int]]:
    """One answer to each prompt, whether it ended within max_tokens, and its tokens with the terminator."""
    ids = [_asked(tokenizer, p) for p in prompts]
    torch.manual_seed(seed)
    answers, ended = _continued(model, tokenizer, ids, s, s.max_tokens)
    texts = [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
    return texts, ended, [len(a) + e for a, e in zip(answers, ended)]


STRATEGIES = ("plain", "cot", "dts", "mcts")
STEP_BY_STEP = "\n\nThink step by step, then give the final answer."
APPROACHES = "\n\nName {n} clearly different approaches to this, one per line, numbered. Do not carry them out yet."
BY_APPROACH = "\n\nAnswer by this approach: {approach}"


def _with(prompt: list[dict], addition: str) -> list[dict]:
    return [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + addition}]


def _questions(
    strategy: str, prompts: list[list[dict]], n: int, answer: Callable
) -> tuple[list[list[dict]], list[int]]:  # fmt: skip
    """The n questions that a strategy puts for each prompt, prompt by prompt, and the tokens that finding them took, for each
    prompt: dts asks `answer` for approaches first."""
    if strategy == "plain":
        return [p for p in prompts for _ in range(n)], [0] * len(prompts)
    if strategy == "cot":
        return [_with(p, STEP_BY_STEP) for p in prompts for _ in range(n)], [0] * len(prompts)
    plans, _, tokens = answer([_with(p, APPROACHES.format(n=n)) for p in prompts])
    questions = []
    for prompt, plan in zip(prompts, plans):
        approaches = re.findall(r"^\s*\d+[.):]\s*(.+)$", plan, re.MULTILINE)[:n]
        questions += [_with(prompt, BY_APPROACH.format(approach=a)) for a in approaches]
        questions += [prompt] * (n - len(approaches))  # too few approaches: the rest is sampled plainly
    return questions, tokens


@dataclass
class Step:
    """A node of a search tree: an answer up to the end of a step, and what became of the answers that went through it."""

    ids: list[int]  # of the answer from its beginning
    text: str = ""  # of these
    parent: "Step | None" = None
    ended: bool = False  # whether the answer ends here
    n: int = 0  # visits: answers through it, and repeats of one that ended with it
    w: float = 0.0  # sum of their rewards
    children: dict[tuple[str, bool], "Step"] = field(default_factory=dict)  # by text and ended


def _ucb(step: Step, c: float) -> float:
    return step.w / step.n + c * math.sqrt(math.log(step.parent.n) / step.n)


def _leaf(step: Step, c: float) -> Step:
    """Down from a step, always to the child of the highest `_ucb`; none is unvisited, as each is made by an answer."""
    while step.children:
        step = max(step.children.values(), key=functools.partial(_ucb, c=c))
    return step


def _back_up(step: Step | None, reward: float) -> None:
    while step is not None:
        step.n += 1
        step.w += reward
        step = step.parent


def _next_step(leaf: Step, new: list[int], ended: bool, text_of: Callable[[list[int]], str], s: Sampling) -> Step:
    """The child of a leaf that an answer, leaf.ids + new, goes through, made if it is not there; the leaf itself for an answer
    that was cut off within its next step.

    A step is whole tokens: up to the first after which its text, less leading whitespace, has step_end in it.
    """
    whole, start, end = leaf.ids + new, len(leaf.ids), s.step_end.replace(r"\n", "\n")
    has_end = lambda i: end in text_of(whole[:i])[len(leaf.text) :].lstrip()  # noqa: E731
    cut = start + 1 + bisect.bisect_left(range(start + 1, len(whole) + 1), True, key=has_end)
    if cut > len(whole) and not ended or min(cut, len(whole)) >= s.max_tokens:
        return leaf
    ids, ended = whole[:cut], ended and cut >= len(whole)
    text = text_of(ids).rstrip() if ended else text_of(ids)
    return leaf.children.setdefault((text, ended), Step(ids, text, leaf, ended))


def _nodes(root: Step) -> list[dict]:
    """A tree as rows, breadth first: the parent's place, the step's text, N, Q = W/N, whether the answer ends with it."""
    steps = [root]
    for step in steps:  # which grows meanwhile
        steps += step.children.values()
    place = {id(step): i for i, step in enumerate(steps)}
    before = [x.parent or root for x in steps]
    return [
        {"parent": place.get(id(x.parent)), "step": x.text[len(p.text) :], "N": x.n, "Q": x.w / x.n, "ended": x.ended}
        for x, p in zip(steps, before)
    ]


def _search(prompts: list[list[int]], rewards: list[Callable], s: Sampling, go_on: Callable, text_of: Callable) -> list[dict]:
    """Monte-Carlo tree search over steps, all prompts together: one batch of n answers for each in every iteration.

    Args:
        rewards: for each prompt, a function of an answer's text that gives 1 or −1.
        go_on: (token ids, max_tokens) → token ids of what follows each, and whether it ended.
        text_of: token ids of an answer → its text.
    Returns:
        for each prompt: kept {text: reward}, unfinished, tokens, sampled, tree.
    An answer that has ended and is chosen again backs up its reward once more; nothing is sampled for it.
    """
    roots, kept = [Step([]) for _ in prompts], [{} for _ in prompts]
    counts = [Counter(unfinished=0, tokens=0, sampled=0) for _ in prompts]
    for _ in range(s.iterations):
        leaves = [_leaf(root, s.exploration) for root in roots]
        for leaf in leaves:
            if leaf.ended:
                _back_up(leaf, leaf.w / leaf.n)
        asked = [i for i, leaf in enumerate(leaves) if not leaf.ended for _ in range(s.n)]
        if not asked:
            continue
        room = s.max_tokens - min(len(leaves[i].ids) for i in asked)
        for i, new, ended in zip(asked, *go_on([prompts[i] + leaves[i].ids for i in asked], room)):
            text, counted = text_of(leaves[i].ids + new).strip(), len(new) + ended
            ended = ended and len(leaves[i].ids + new) < s.max_tokens  # others in the batch may have had more room
            reward = rewards[i](text) if ended and text else -1
            _back_up(_next_step(leaves[i], new, ended, text_of, s), reward)
            counts[i].update(unfinished=not ended, tokens=counted, sampled=1)
            if s.keep_unfinished or text and ended:
                kept[i].setdefault(text, reward)
    return [{"kept": k, **count, "tree": _nodes(root)} for k, count, root in zip(kept, counts, roots)]


def _mcts(model, tokenizer, rule: Callable, rows: list[dict], s: Sampling, seed: int) -> list[dict]:
    """`_search` with a model, for rows with their prompts."""
    torch.manual_seed(seed)

    def reward(row: dict, text: str) -> int:
        (value,) = _judged(lambda: [float(rule(row, text))], s.rule, f"{s.prompts}, prompt {row['id']}")
        return 1 if value > 0.5 else -1

    rewards = [functools.partial(reward, row) for row in rows]
    go_on = lambda ids, max_tokens: _continued(model, tokenizer, ids, s, max_tokens)  # noqa: E731
    text_of = lambda ids: tokenizer.decode(ids, skip_special_tokens=True).lstrip()  # noqa: E731
    return _search([_asked(tokenizer, row["prompt"]) for row in rows], rewards, s, go_on, text_of)


def _check_decoding(temperature: float, top_p: float, **counts: int) -> None:
    if min(counts.values()) < 1 or not (temperature == 0 or 0.001 <= temperature < math.inf) or not 0 < top_p <= 1:
        least = f"{', '.join(counts)} are at least 1"
        raise UserError(f"temperature is at least 0.001, or 0 (greedy), top_p above 0 and at most 1, {least}")


def sample(s: Sampling, prompts: Iterable | None = None, say: Callable[[str], None] = _quiet) -> None:
    """Sample responses to prompts (those of `prompts_of`, if not given): see Sampling."""
    strategies = [name.strip() for name in s.strategy.split(",")]
    for name in strategies:
        refuse_unless_known("strategy", name, STRATEGIES)
    counts = dict(n=s.n, batch_size=s.batch_size, max_tokens=s.max_tokens, iterations=s.iterations)
    _check_decoding(s.temperature, s.top_p, **counts)
    names = ["model", "strategy", "n", "batch_size", "temperature", "top_p", "max_tokens", "seed"]
    rule = _rule_of_search(s, strategies)
    device = device_named(s.device)
    made = {name: getattr(s, name) for name in names}
    if rule:
        made |= {"rule": s.rule if isinstance(s.rule, str) else getattr(rule, "__qualname__", type(rule).__name__)}
        made |= {name: getattr(s, name) for name in ("iterations", "exploration", "step_end")}
    done = {row["id"]: row for row in _resumed(s.prompts, s.out)}
    for row in done.values():
        if other := [f"{k} {row[k]}, now {v}" for k, v in made.items() if row.get(k, v) != v]:
            raise UserError(f"{s.out}: was begun with {'; '.join(other)}; give the same settings or another --out")
    given = prompts_of(s.prompts, s.columns) if prompts is None else prompts
    rows = {row["id"]: {**row, "prompt": prompt} for _, row, prompt in given}
    prompts = [(key, row["prompt"]) for key, row in rows.items()]
    how = f"temperature {s.temperature:g}, top_p {s.top_p:g}, at most {s.max_tokens} tokens"
    there = f"; {sum(key in done for key, _ in prompts)} are in {s.out} already" if done else ""
    say(f"sample: {s.model} on {device}, {len(prompts):,} prompts, {s.n} responses each ({s.strategy}), {how}{there}")
    tokenizer, model = load_tokenizer(s.model), _load_model(s.model, "CausalLM", device)
    for start in progress(range(0, len(prompts), s.batch_size), "sample", "batches"):
        part = prompts[start : start + s.batch_size]
        if all(key in done for key, _ in part):
            continue
        answer = functools.partial(_answers, model, tokenizer, s=s)
        search = functools.partial(_mcts, model, tokenizer, rule, [rows[key] for key, _ in part], s)
        responses = _responses([prompt for _, prompt in part], strategies, s, answer, search, s.seed + start)
        lines = [
            {**_aside(rows[key]), "id": key, "prompt": prompt, **of_it, **made} for (key, prompt), of_it in zip(part, responses)
        ]
        _write(s.out, [line for line in lines if line["id"] not in done])
        done |= {line["id"]: line for line in lines if line["id"] not in done}
    others = s.n * (len(strategies) - ("mcts" in strategies))
    rows = [done[key] for key, _ in prompts]
    say(_sampled(rows, s, sum(others + row.get("sampled", 0) for row in rows)))


def _aside(row: dict) -> dict:
    """The texts and numbers of a row that no format and no later step reads, such as the right answer for a rule."""
    read = {name for needed, _ in FORMATS.values() for name in needed} | {"rewards", "sampled", "tree"}
    return {name: value for name, value in row.items() if isinstance(value, (str, int, float)) and name not in read}


def _rule_of_search(s: Sampling, strategies: list[str]) -> Callable[[dict, str], float] | None:
    """The rule of mcts, with its settings checked; None for other strategies."""
    if ("mcts" in strategies) != bool(s.rule):
        what = "needs a rule: give --rule file.py:function" if not s.rule else "has none for --rule, which only mcts uses"
        raise UserError(f"strategy {s.strategy} {what}")
    if not s.rule:
        return None
    if not 0 <= s.exploration < math.inf or not s.step_end:
        raise UserError(f"exploration is {s.exploration:g} and step_end {s.step_end!r}; at least 0, and some text")
    return _rule(s.rule) if isinstance(s.rule, str) else s.rule


def _sampled(rows: list[dict], s: Sampling, asked: int) -> str:
    """What became of the responses that were asked for; UserError where not one was kept."""
    kept, unfinished = sum(len(row["responses"]) for row in rows), sum(row["unfinished"] for row in rows)
    text = f"{len(rows):,} prompts, {kept:,} responses kept"
    if unfinished:
        advice = "" if s.keep_unfinished or unfinished < 0.1 * asked else ": raise --max_tokens"
        text += f"; {unfinished:,} of {asked:,} responses did not end within {s.max_tokens} tokens{advice}"
    if same := asked - kept - (0 if s.keep_unfinished else unfinished):
        text += f"; {same:,} were equal to another one or empty"
    if not kept:
        os.remove(s.out)  # so that the same --out can be tried again with other settings
        raise UserError(f"{s.out}: not written, nothing to keep: {text}")
    if all("tokens" in row for row in rows):  # and none of an older version
        text += f"; {sum(row['tokens'] for row in rows):,} tokens generated"
    return f"{text}; all in {s.out}"


def _responses(prompts: list, strategies: list[str], s: Sampling, answer: Callable, search: Callable, seed: int) -> list[dict]:
    """For each prompt its different responses, the strategy that gave each first, how many did not end, and all tokens; of
    mcts, whose draws are not plain's once more, the rewards (null for what another strategy gave), how many it sampled and its
    tree."""
    kept = [{} for _ in prompts]  # response → (strategy, reward)
    rows = [{"responses": [], "strategies": [], "unfinished": 0, "tokens": 0} for _ in prompts]
    for strategy in strategies:
        if strategy == "mcts":
            for row, by, found in zip(rows, kept, search(seed + 2**31)):
                for text, reward in found["kept"].items():
                    by.setdefault(text, (strategy, reward))
                row["unfinished"] += found["unfinished"]
                row["tokens"] += found["tokens"]
                row |= {"rewards": [], "sampled": found["sampled"], "tree": found["tree"]}
            continue
        questions, tokens = _questions(strategy, prompts, s.n, functools.partial(answer, seed=seed))
        for row, count in zip(rows, tokens):
            row["tokens"] += count
        for i, (text, complete, count) in enumerate(zip(*answer(questions, seed=seed + 1))):
            row = rows[i // s.n]
            row["unfinished"] += not complete
            row["tokens"] += count
            if s.keep_unfinished or text and complete:
                kept[i // s.n].setdefault(text, (strategy, None))
    for row, by in zip(rows, kept):
        row |= {"responses": list(by), "strategies": [strategy for strategy, _ in by.values()]}
        if "tree" in row:
            row["rewards"] = [reward for _, reward in by.values()]
    return rows


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
        rule = getattr(module, function)
    except (Exception, SystemExit) as error:  # anybody's code, which may end in any way
        why = f"{type(error).__name__}: {_brief(error)}"
        raise UserError(f"rule is {name!r}, which is no file.py:function or module:function ({why})") from error
    if not callable(rule):
        raise UserError(f"rule is {name!r}, which is a {type(rule).__name__} and no function of (row, response)")
    return rule


def _judged(values: Callable[[], list[float]], name, where: str) -> list[float]:
    """The scores that a rule or a model gives, checked; UserError for whatever else becomes of it."""
    try:
        return [_score(x, "a score") for x in values()]
    except (Exception, SystemExit) as error:  # a rule is anybody's code
        raise UserError(f"{where}: {name} cannot score it ({type(error).__name__}: {_brief(error)})") from error


def _by_reward_model(name: str, device: torch.device, batch_size: int) -> Callable[[dict, list[dict], list[str]], list[float]]:
    """A function of (row, prompt, responses); responses go padded on the right, batch_size at a time."""
    tokenizer, model = load_tokenizer(name), _load_model(name, "SequenceClassification", device)
    if model.config.num_labels != 1:
        raise UserError(f"{name}: gives {model.config.num_labels} numbers per text; a reward model gives one")
    config = model.config.get_text_config()
    own = config.pad_token_id

    @torch.no_grad()
    def scores(row, prompt, texts):
        coded = [encode(Row(prompt, [text]), tokenizer, 2**31, 2**31)[0] for text in texts]
        ids, values = [e.prompt + e.responses[0] for e in coded], []
        if own is None:  # transformers looks for the last token that is no padding, so padding must be an id not in use
            config.pad_token_id = next(i for i in range(config.vocab_size) if not any(i in x for x in ids))
        for start in range(0, len(ids), batch_size):
            part = ids[start : start + batch_size]
            width = max(map(len, part))
            inputs = torch.tensor([x + [config.pad_token_id] * (width - len(x)) for x in part], device=model.device)
            mask = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in part], device=model.device)
            values += model(input_ids=inputs, attention_mask=mask).logits[:, 0].tolist()
        return values

    return scores


def score(s: Scoring, say: Callable[[str], None] = _quiet) -> None:
    """Score responses by a reward model or a rule: see Scoring."""
    if bool(s.reward_model) == bool(s.rule) or s.batch_size < 1:
        raise UserError("score needs either reward_model or rule, and a batch_size of at least 1")
    device, key = device_named(s.device), lambda row: json.dumps([row["id"], row["responses"]])  # noqa: E731
    done = {key(row): row.get("scores") for row in _resumed(s.responses, s.out)}
    if None in done.values():
        raise UserError(f"{s.out}: holds rows without scores, so it cannot be continued; give another --out")
    rows = list(prompts_of(s.responses))
    for where, row, _ in rows:
        if not isinstance(row.get("responses"), list) or not all(isinstance(x, str) for x in row["responses"]):
            raise UserError(f"{where}: responses is not a list of texts")
    if not any(row["responses"] for _, row, _ in rows):
        raise UserError(f"{s.responses}: {len(rows):,} rows without any response: nothing to score")
    there = f"; {sum(key(row) in done for _, row, _ in rows):,} are in {s.out} already" if done else ""
    say(f"score: {s.reward_model or s.rule}{f' on {device}' * bool(s.reward_model)}, {len(rows):,} rows{there}")
    if s.rule:
        rule = _rule(s.rule) if isinstance(s.rule, str) else s.rule
        scores_of = lambda row, prompt, texts: [float(rule(row, text)) for text in texts]  # noqa: E731
    else:
        scores_of = _by_reward_model(s.reward_model, device, s.batch_size)
    for where, row, prompt in progress(rows, "score", "rows"):
        if key(row) in done:
            continue
        scores = _judged(functools.partial(scores_of, row, prompt, row["responses"]), s.rule or s.reward_model, where)
        _write(s.out, [{**row, "scores": scores}])
        done[key(row)] = scores
    scores = [done[key(row)] for _, row, _ in rows]
    every = np.array([x for of_row in scores for x in of_row])
    alike = sum(len(set(of_row)) < 2 for of_row in scores)
    spread = f"mean {every.mean():.4g}, standard deviation {every.std():.4g}, {every.min():.4g} to {every.max():.4g}"
    say(f"{len(rows):,} rows, {len(every):,} scores: {spread}; {alike:,} rows have no two different scores, so no pair")


def _scored(row: dict) -> dict[str, float]:
    """The responses of a row and the score of each, or the reward that a search gave it."""
    texts, values = row.get("responses"), row.get("scores", row.get("rewards"))
    if not isinstance(texts, list) or not isinstance(values, list) or len(texts) != len(values):
        raise UserError("responses and scores are not two lists of the same length")
    texts = [_text(x, f"responses {i}") for i, x in enumerate(texts, 1)]
    return dict(zip(texts, [_score(x, "scores") for x in values]))


def _comparable(scores: dict[str, float], s: Pairing) -> list[tuple[str, str]]:
    """The pairs of responses, the better one first, that may be taken."""
    order = sorted(scores, key=lambda text: -scores[text])
    couples = [(a, b) for a, b in itertools.combinations(order, 2) if scores[a] > scores[b]]
    couples = [(a, b) for a, b in couples if scores[a] - scores[b] >= s.min_margin]
    if s.how == "correct":
        return [(a, b) for a, b in couples if scores[a] > 0.5 >= scores[b]]
    if s.how == "best_worst":
        return [(a, b) for a, b in couples if scores[a] == scores[order[0]] and scores[b] == scores[order[-1]]][:1]
    return couples


def _step_pairs(row: dict, prompt: list[dict], s: Pairing) -> list[dict]:
    """Of each step's next steps that were visited often enough, the one of highest Q against that of lowest: rows of a pair."""
    begun, following, lines = [], {}, []
    try:
        for node in row.get("tree"):
            at = node["parent"]
            begun.append("" if at is None else begun[at] + node["step"])
            if at is not None and node["N"] >= s.min_visits and node["step"].strip():
                following.setdefault(at, []).append((_score(node["Q"], "Q"), node["step"], _label(node["ended"], "ended")))
    except (TypeError, KeyError, IndexError, AttributeError):
        raise UserError("no tree of steps: sample with --strategy mcts") from None
    for at, steps in following.items():
        (high, a, a_ends), (low, b, b_ends) = max(steps), min(steps)
        if high > low and high - low >= s.min_margin:
            turn = [{"role": "assistant", "content": begun[at]}] if begun[at] else []
            sides = {"chosen": a, "rejected": b, "chosen_ends": a_ends, "rejected_ends": b_ends}
            lines.append({"id": row["id"], "prompt": prompt + turn, **sides, "score_chosen": high, "score_rejected": low})
    return lines


def _are_pairs(file: Path) -> bool:
    """Whether a file is empty or what `pairs` has written, by its first line; such a one may be made again."""
    try:
        with open(file, encoding="utf-8") as lines:
            first = lines.readline()
        return not first or {"id", "score_chosen", "score_rejected"} <= json.loads(first).keys()
    except (ValueError, AttributeError):
        return False


def pairs(s: Pairing, say: Callable[[str], None] = _quiet) -> Counter:
    """Make preference pairs, see Pairing; returns how many prompts gave a pair, or why not."""
    refuse_unless_known("how", s.how, ["best_worst", "random", "correct", "step"])
    if s.min_visits < 1:
        raise UserError(f"min_visits is {s.min_visits}; it is at least 1")
    _keep_apart(s.scored, s.out)
    _writable(s.out)
    if Path(s.out).exists() and not _are_pairs(Path(s.out)):
        raise UserError(f"{s.out}: is there, and not as pairs of this command; give another --out")
    counts, lines, prompts = Counter(), [], {}
    say(f"pairs: {s.how}, scores at least {s.min_margin:g} apart, seed {s.seed}, of {s.scored}")
    for _, row, prompt in prompts_of(s.scored):
        try:
            if s.how == "step":
                found = _step_pairs(row, prompt, s)
                counts["pairs" if found else f"no two next steps that differ as asked (min_margin {s.min_margin:g})"] += 1
                lines += found
                continue
            scores = _scored(row)
        except UserError as error:
            counts[str(error)] += 1
            continue
        prompts.setdefault(row["id"], (prompt, {}))[1].update(scores)
    for key, (prompt, scores) in prompts.items():
        couples = _comparable(scores, s)
        if couples:
            counts["pairs"] += 1
            a, b = random.Random(f"{s.seed} {key}").choice(couples)
            answers = {"chosen": a, "rejected": b, "score_chosen": scores[a], "score_rejected": scores[b]}
            lines.append({"id": key, "prompt": prompt, **answers})
        elif len(scores) < 2:
            counts["fewer than two responses"] += 1
        else:
            counts[f"no two responses that differ as asked ({s.how}, min_margin {s.min_margin:g})"] += 1
    if not lines:
        why = "; ".join(f"{n} {why}" for why, n in counts.items())
        raise UserError(f"{s.scored}: gives no pair: {why}. Lower --min_margin, or sample more responses to each prompt")
    _write(part := f"{s.out}.new", lines, "w")
    os.replace(part, s.out)
    margins = [line["score_chosen"] - line["score_rejected"] for line in lines]
    longer = sum(len(line["chosen"]) > len(line["rejected"]) for line in lines) / len(lines)
    say(f"{len(lines):,} pairs in {s.out}: mean margin {sum(margins) / len(margins):.4g}, chosen longer in {longer:.0%}")
    for what, n in counts.items():
        if what != "pairs":
            say(f"  {n:,} without: {what}")
    return counts


# ---- the command line ------------------------------------------------------------------------------------------------

COMMANDS = {
    "sample": (Sampling, functools.partial(sample, say=_say)),
    "score": (Scoring, functools.partial(score, say=_say)),
    "pairs": (Pairing, functools.partial(pairs, say=_say)),
}
RESUMED = "stopped; nothing is lost, the same command goes on from here"


def command_line(work: Callable[[list[str]], object], argv: list[str], stopped: str = RESUMED):
    """`data.command_line` without what transformers says while it loads."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()  # a table of missing weights, where one message follows
    return data.command_line(work, argv, stopped=stopped)


def main(argv: list[str] | None = None):
    """The command line as a function. A user error ends with a message and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    run = functools.partial(data.commands, prog="tests/tools/on_policy.py", text=__doc__, table=COMMANDS)
    return command_line(run, argv, "stopped" if argv[:1] == ["pairs"] else RESUMED)


if __name__ == "__main__":
    main()
