"""Where preference pairs come from, at equal cost: plain sampling, approaches (dts) and tree search, in a world of sums.

    python tests/studies/diversify.py --out runs/diversify                        # five worlds; an hour or so on two cores
    python tests/studies/diversify.py --out runs/quick --seeds 1 --prompts 256    # a quick look
    python tests/studies/diversify.py --out runs/diversify --resume               # goes on where a killed one stopped

After Dokmeci 2025 (temperature, chain of thought, tree search, DTS), at a size where every step can be checked. A prompt,
"3 plus 4 times 2", is worked out as it is spoken, from left to right: "3 + 4 = 7 ; 7 × 2 = 14 ; answer 14". A tiny Llama learns
from careless demonstrations; each strategy then samples from it until its *generated* tokens are spent, the same number for all
(prompts that are read cost nothing here; a search reads its prompt once more in each iteration). Each set gives pairs, on which
four objectives train the start, each at the best of three learning rates in a world of its own. A pair of whole answers is a
right one against a wrong one, one pair a prompt, as `on_policy.py pairs --how correct` takes them.

- plain: n answers to a prompt.
- dts: two approaches, n / 2 answers by each. A tiny model follows no instructions, so the two are words that it was taught: "by
  products" (7 × 3 = 21) and "by sums" (7 + 7 = 14 ; 14 + 7 = 21). Naming approaches costs nothing here, unlike below.
- mcts: the tree search below, a step ends at ";". Its pairs are whole answers, or steps.
- cot is not represented: all answers go step by step, as nobody could tell this model to.

The strategies by themselves, for any model and prompts, and training on pairs of steps:

    python tests/studies/diversify.py sample MODEL PROMPTS.jsonl sampled.jsonl --strategy plain,cot,dts
    python tests/studies/diversify.py sample MODEL PROMPTS.jsonl tree.jsonl --strategy mcts --rule rules.py:right
    python tests/studies/diversify.py steps MODEL tree.jsonl steps.jsonl --min_visits 2 --min_margin 0.5
    python tests/studies/diversify.py train --model MODEL --dataset steps.jsonl    # and any setting of train.py
"""

import functools
import itertools
import json
import math
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import numpy as np  # noqa: E402
import on_policy  # noqa: E402
import torch  # noqa: E402
import toy  # noqa: E402
from claims import verdict  # noqa: E402
from datasets import Dataset  # noqa: E402
from miniature import job_key, markdown, mean_and_error, pyplot, refuse_own_data, run_jobs  # noqa: E402
from on_policy import Sampling, prompt_ids, quiet, say  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from data import Example, Examples, Report, UserError, setting  # noqa: E402

PROG = "tests/studies/diversify.py"

# ---- strategies of sampling ------------------------------------------------------------------------------------------

STRATEGIES = ("plain", "cot", "dts", "mcts")
STEP_BY_STEP = "\n\nThink step by step, then give the final answer."
NAME_APPROACHES = "\n\nName {n} clearly different approaches to this, one per line, numbered. Do not carry them out yet."
BY_APPROACH = "\n\nAnswer by this approach: {approach}"


@dataclass
class Strategies(Sampling):
    """Sample n responses to every prompt by each strategy and add them to out, which is continued if it is there.

    Rows are those of on_policy.py; of a response that two strategies gave, `strategies` names the first. cot asks to think step
    by step. dts asks for n different approaches, then for an answer by each; the tokens of both count.

    mcts searches a tree of steps (text up to step_end): each iteration goes down it by W/N + c√(ln N_parent/N), samples n
    answers from there on and adds the first step of each, equal ones once; an answer's reward is 1 where the reward function
    gives above ½ (or true), else −1, also where it did not end. Rows then have `rewards` (null for what another strategy gave),
    `sampled` (answers) and `tree`. Published uses differ: the diversification paper's mcts is OptiLLM's, over whole turns of a
    dialogue, 22 generations for one answer; MCTS-DPO searches steps as here, but by PUCT, with the model's own evaluation.
    """

    strategy: str = setting(
        "plain",
        "plain, cot (think step by step), dts (n approaches, then an answer by each), mcts (a tree of steps, needs rule), or "
        "several with commas",
    )
    rule: str = setting("", "mcts: reward function, file.py:function of (row, response)")  # or the function itself
    iterations: int = setting(8, "mcts: steps of the tree from which n answers each are sampled")
    exploration: float = setting(1.4, "mcts: c, how much rarely visited steps are preferred")
    step_end: str = setting(r"\n", r"mcts: what ends a step, such as \n or ;")

    def names(self) -> list[str]:
        return [name.strip() for name in self.strategy.split(",")]

    def recorded(self) -> dict:
        recorded = super().recorded() | {"strategy": self.strategy}
        if self.rule:
            name = self.rule if isinstance(self.rule, str) else getattr(self.rule, "__qualname__", type(self.rule).__name__)
            recorded |= {"rule": name, "iterations": self.iterations}
            recorded |= {"exploration": self.exploration, "step_end": self.step_end}
        return recorded

    def asked(self, row: dict) -> int:
        return sum(row["sampled"] if name == "mcts" else self.n for name in self.names())


def sample(s: Strategies, say: Callable[[str], None] = quiet) -> None:
    """Sample responses by one or several strategies, see Strategies."""
    for name in s.names():
        data.refuse_unless_known("strategy", name, STRATEGIES)
    on_policy.check_decoding(s.temperature, s.top_p, iterations=s.iterations)
    if "mcts" in s.names() and not s.rule:
        raise UserError(f"strategy {s.strategy} needs a reward function: give --rule file.py:function")
    if s.rule and "mcts" not in s.names():
        raise UserError(f"strategy {s.strategy} has none for --rule, which only mcts uses")
    if not 0 <= s.exploration < math.inf or not s.step_end:
        raise UserError(f"exploration is {s.exploration:g} and step_end {s.step_end!r}; at least 0, and some text")
    scores_of = on_policy.by_reward_function(s.rule) if s.rule else None
    on_policy.sample(s, say=say, respond=functools.partial(respond, scores_of=scores_of))


def respond(model, tokenizer, rows: list[dict], s: Strategies, seed: int, scores_of: Callable | None) -> list[dict]:
    """What all strategies together give for each row."""
    of_row = [[] for _ in rows]
    for name in s.names():
        if name == "plain":
            found = on_policy.plain_responses(model, tokenizer, rows, s, seed)
        elif name == "cot":
            asked = [with_more(row, STEP_BY_STEP) for row in rows]
            found = on_policy.plain_responses(model, tokenizer, asked, s, seed)
        elif name == "dts":
            found = by_approaches(model, tokenizer, rows, s, seed)
        else:
            found = by_search(model, tokenizer, rows, s, seed + 2**31, scores_of)  # other draws than plain's
        for parts, part in zip(of_row, found):
            parts.append((name, part))
    return [merged(parts) for parts in of_row]


def merged(parts: list[tuple[str, dict]]) -> dict:
    """What several strategies gave for one row: every response once, as the first one gave it; counts are added up."""
    kept = {}
    row = {"responses": [], "strategies": [], "unfinished": 0, "tokens": 0}
    for name, part in parts:
        rewards = part.get("rewards", [None] * len(part["responses"]))
        for text, reward in zip(part["responses"], rewards):
            kept.setdefault(text, (name, reward))
        row["unfinished"] += part["unfinished"]
        row["tokens"] += part["tokens"]
        if name == "mcts":
            row |= {"rewards": [], "sampled": part["sampled"], "tree": part["tree"]}
    row["responses"] = list(kept)
    row["strategies"] = [name for name, _ in kept.values()]
    if "rewards" in row:
        row["rewards"] = [reward for _, reward in kept.values()]
    return row


def with_more(row: dict, addition: str) -> dict:
    *before, last = row["prompt"]
    return {**row, "prompt": [*before, {**last, "content": last["content"] + addition}]}


def by_approaches(model, tokenizer, rows: list[dict], s: Strategies, seed: int) -> list[dict]:
    """dts: each row's approaches, then an answer by each; where there are too few, the rest is sampled plainly."""
    asked = [with_more(row, NAME_APPROACHES.format(n=s.n)) for row in rows]
    plans, _, tokens = on_policy.answer(model, tokenizer, asked, s, seed)
    questions = []
    for row, plan in zip(rows, plans):
        approaches = re.findall(r"^\s*\d+[.):]\s*(.+)$", plan, re.MULTILINE)[: s.n]
        questions += [with_more(row, BY_APPROACH.format(approach=approach)) for approach in approaches]
        questions += [row] * (s.n - len(approaches))
    found = on_policy.draw(model, tokenizer, questions, s, seed + 1, "dts")
    for part, spent in zip(found, tokens):
        part["tokens"] += spent
    return found


# ---- tree search -----------------------------------------------------------------------------------------------------


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


@dataclass
class Tree:
    """The search for answers to one prompt, and what its answers came to."""

    prompt: list[int]  # token ids
    reward: Callable[[str], int]  # of an answer's text: 1 or −1
    root: Step = field(default_factory=lambda: Step([]))
    kept: dict[str, int] = field(default_factory=dict)  # answer → reward
    unfinished: int = 0
    tokens: int = 0
    sampled: int = 0


def upper_bound(step: Step, c: float) -> float:
    return step.w / step.n + c * math.sqrt(math.log(step.parent.n) / step.n)


def leaf_below(step: Step, c: float) -> Step:
    """Down from a step, always to the child of the highest `upper_bound`; none is unvisited, as each is made by an answer."""
    while step.children:
        step = max(step.children.values(), key=functools.partial(upper_bound, c=c))
    return step


def back_up(step: Step | None, reward: float) -> None:
    while step is not None:
        step.n += 1
        step.w += reward
        step = step.parent


def step_length(leaf: Step, whole: list[int], text_of: Callable[[list[int]], str], step_end: str) -> int:
    """Tokens of an answer up to the first after which what follows the leaf's text, less leading whitespace, has step_end in
    it; one more than all where none has."""
    for length in range(len(leaf.ids) + 1, len(whole) + 1):
        text = text_of(whole[:length])[len(leaf.text) :]
        if step_end in text.lstrip():
            return length
    return len(whole) + 1


def next_step(leaf: Step, new: list[int], ended: bool, text_of: Callable[[list[int]], str], s: Strategies) -> Step:
    """The child of a leaf that an answer, leaf.ids + new, goes through, made if it is not there; the leaf itself for an answer
    that was cut off within its next step."""
    whole = leaf.ids + new
    length = step_length(leaf, whole, text_of, s.step_end.replace(r"\n", "\n"))
    if length > len(whole) and not ended or min(length, len(whole)) >= s.max_tokens:
        return leaf
    ids = whole[:length]
    ended = ended and length >= len(whole)
    text = text_of(ids)
    if ended:
        text = text.rstrip()
    return leaf.children.setdefault((text, ended), Step(ids, text, leaf, ended))


def nodes(root: Step) -> list[dict]:
    """A tree as rows, breadth first: the parent's place, the step's text and token ids, N, Q = W/N, whether the answer ends
    with it."""
    rows = []
    waiting = deque([(None, root)])
    while waiting:
        parent, step = waiting.popleft()
        before = step.parent or root
        new = {"step": step.text[len(before.text) :], "ids": step.ids[len(before.ids) :]}
        waiting.extend((len(rows), child) for child in step.children.values())
        rows.append({"parent": parent, **new, "N": step.n, "Q": step.w / step.n, "ended": step.ended})
    return rows


def search(trees: list[Tree], s: Strategies, go_on: Callable, text_of: Callable) -> None:
    """Monte-Carlo tree search over steps, all prompts together: one batch of n answers for each in every iteration.

    Args:
        go_on: (token ids, max_tokens) → token ids of what follows each, and whether it ended.
        text_of: token ids of an answer → its text.
    An answer that has ended and is chosen again backs up its reward once more; nothing is sampled for it.
    """
    for _ in range(s.iterations):
        gone_on_from = []  # n times each tree and its leaf
        for tree in trees:
            leaf = leaf_below(tree.root, s.exploration)
            if leaf.ended:
                back_up(leaf, leaf.w / leaf.n)
            else:
                gone_on_from += [(tree, leaf)] * s.n
        if not gone_on_from:
            continue
        room = s.max_tokens - min(len(leaf.ids) for _, leaf in gone_on_from)
        answers, ends = go_on([tree.prompt + leaf.ids for tree, leaf in gone_on_from], room)
        for (tree, leaf), new, ended in zip(gone_on_from, answers, ends):
            take_in(tree, leaf, new, ended, s, text_of)


def take_in(tree: Tree, leaf: Step, new: list[int], ended: bool, s: Strategies, text_of: Callable) -> None:
    """Add an answer, leaf.ids + new, to its tree."""
    tree.sampled += 1
    tree.tokens += len(new) + ended
    whole = leaf.ids + new
    ended = ended and len(whole) < s.max_tokens  # others in the batch may have had more room
    text = text_of(whole).strip()
    reward = tree.reward(text) if ended and text else -1
    back_up(next_step(leaf, new, ended, text_of, s), reward)
    tree.unfinished += not ended
    if s.keep_unfinished or text and ended:
        tree.kept.setdefault(text, reward)


def by_search(model, tokenizer, rows: list[dict], s: Strategies, seed: int, scores_of: Callable) -> list[dict]:
    """mcts: `search` with a model."""
    torch.manual_seed(seed)

    def reward(text: str, row: dict) -> int:
        where = f"{s.prompts}, prompt {row['id']}"
        (score,) = on_policy.checked_scores(scores_of, row, row["prompt"], [text], s.rule, where)
        return 1 if score > 0.5 else -1

    def go_on(ids: list[list[int]], max_tokens: int) -> tuple[list[list[int]], list[bool]]:
        return on_policy.continue_ids(model, tokenizer, ids, s, max_tokens)

    def text_of(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True).lstrip()

    template = data.template_arguments(s)
    ids = [prompt_ids(tokenizer, on_policy.asked_of(row, row["prompt"]), template) for row in rows]
    trees = [Tree(of_row, functools.partial(reward, row=row)) for of_row, row in zip(ids, rows)]
    search(trees, s, go_on, text_of)
    found = []
    for tree in trees:
        counts = {"unfinished": tree.unfinished, "tokens": tree.tokens, "sampled": tree.sampled}
        answers = {"responses": list(tree.kept), "rewards": list(tree.kept.values())}
        found.append({**answers, **counts, "tree": nodes(tree.root)})
    return found


# ---- pairs of steps, as token ids ------------------------------------------------------------------------------------


@dataclass
class Steps:
    """Make pairs of next steps of the same answer, of the trees that `sample --strategy mcts` has written.

    Of the steps that follow the same beginning, the one of the highest mean reward Q against that of the lowest. They are token
    ids as they were sampled: prompt and beginning, then each step, with the terminator where the answer ends with it.
    """

    model: str = setting(MISSING, "folder or hub name whose tokenizer the ids are of")
    sampled: str = setting(MISSING, "sources of rows with a prompt and a tree")
    out: str = setting(MISSING, "JSON lines to write, for `train`")
    min_margin: float = setting(0.0, "least difference of mean rewards of a pair")
    min_visits: int = setting(2, "visits (N) of each of the two steps, at least")


class NextStep(NamedTuple):
    """A node, in the order in which two are compared."""

    q: float
    text: str
    ended: bool
    ids: list[int]


def steps(s: Steps, say: Callable[[str], None] = quiet) -> Counter:
    """Make pairs of steps, see Steps; returns how many prompts gave pairs, or why not."""
    if s.min_visits < 1:
        raise UserError(f"min_visits is {s.min_visits}; it is at least 1")
    on_policy.check_pairs_out(s.sampled, s.out)
    tokenizer = data.load_tokenizer(s.model)
    counts = Counter()
    lines = []
    for _, row, prompt in on_policy.prompts_of(s.sampled):
        try:
            found = step_pairs({**row, "prompt": prompt}, tokenizer, s)
        except UserError as error:
            counts[str(error)] += 1
            continue
        counts["pairs" if found else f"no two next steps that differ as asked (min_margin {s.min_margin:g})"] += 1
        lines += found
    on_policy.write_pairs(s.sampled, s.out, lines, counts)
    say(f"{len(lines):,} pairs of steps in {s.out}: mean margin {on_policy.mean_margin(lines):.4g}")
    for what, n in counts.items():
        if what != "pairs":
            say(f"  {n:,} without: {what}")
    return counts


def step_pairs(row: dict, tokenizer, s: Steps) -> list[dict]:
    """The pairs of one tree."""
    begun, following = beginnings(row.get("tree"), s.min_visits)
    how = data.Reading(template_kwargs=row.get("template_kwargs", ""), date=row.get("date", ""))  # as it was sampled
    whole = on_policy.asked_of(row, row["prompt"])._replace(responses=[data.answer(data.MARK)])
    asked, _ = data.encode(whole, tokenizer, on_policy.LONG, on_policy.LONG, template=data.template_arguments(how))
    terminator = asked.responses[0][-1:]
    pairs = []
    for at, next_steps in following.items():
        chosen = max(next_steps)
        rejected = min(next_steps)
        if chosen.q > rejected.q and chosen.q - rejected.q >= s.min_margin:
            text, ids = begun[at]
            pair = {"id": row["id"], "prompt": row["prompt"], "begun": text, "prompt_ids": asked.prompt + ids}
            for side, step in (("chosen", chosen), ("rejected", rejected)):
                pair[f"{side}_step"] = step.text
                pair[f"{side}_ids"] = step.ids + terminator * step.ended
                pair[f"score_{side}"] = step.q
            pairs.append(pair)
    return pairs


def beginnings(tree: list[dict], min_visits: int) -> tuple[list[tuple[str, list[int]]], dict[int, list[NextStep]]]:
    """(answer up to each node, text and token ids; {place of a node: its next steps that were visited often enough})."""
    begun = []
    following = {}
    try:
        for node in tree:
            at = node["parent"]
            if at is None:
                begun.append(("", []))
                continue
            text, ids = begun[at]
            begun.append((text + node["step"], ids + node["ids"]))
            if node["N"] >= min_visits and node["step"].strip():
                step = NextStep(data._score(node["Q"], "Q"), node["step"], data._label(node["ended"], "ended"), node["ids"])
                following.setdefault(at, []).append(step)
    except (TypeError, KeyError, IndexError, AttributeError):
        raise UserError("no tree of steps: sample with --strategy mcts") from None
    return begun, following


def load_steps(dataset: str, tokenizer, how: data.Reading) -> tuple[Examples, Report]:
    """In the place of `data.load`: the examples of a file that `steps` has written, which are token ids already."""
    examples = []
    for where, row in data.read(dataset):
        if not isinstance(row, dict) or not {"prompt_ids", "chosen_ids", "rejected_ids"} <= row.keys():
            raise UserError(f"{where}: not a pair of steps; `python {PROG} steps` makes them")
        responses = [row["chosen_ids"], row["rejected_ids"]]
        longest = len(row["prompt_ids"]) + max(map(len, responses))
        if longest > how.max_length:
            raise UserError(f"{where}: {longest} tokens, above max_length {how.max_length}; steps are not cut")
        margin = row["score_chosen"] - row["score_rejected"]
        examples.append(Example(row["prompt_ids"], responses, where=where, margin=margin)._asdict())
    n = len(examples)
    if not n:
        raise UserError(f"{dataset}: no pairs of steps")
    report = Report(n, n, dropped={}, first=[], cut={}, formats=[f"{dataset}: steps as token ids"])
    return Examples(Dataset.from_list(examples), np.arange(n)), report


def train_on_steps(s: train.Settings) -> dict:
    """`train.train`, whose dataset is a file that `steps` has written."""
    with mock.patch.object(data, "load", load_steps):
        return train.train(s)


# ---- the world of sums -----------------------------------------------------------------------------------------------

SIGNS, APPROACHES, LARGEST, HELD_OUT = {"plus": "+", "minus": "−", "times": "×"}, ("products", "sums"), 99, 512
CARELESS = 0.15  # of the demonstrated steps are wrong
WORDS = (*map(str, range(LARGEST + 1)), *SIGNS, *SIGNS.values(), "by", *APPROACHES, "=", ";", "answer")


def apply(a: int, word: str, b: int) -> int:
    return {"plus": a + b, "minus": a - b, "times": a * b}[word]


def problem(prompt: str) -> tuple[int, list[tuple[str, int]]]:
    """ "3 plus 4 times 2", with or without "by sums", → 3, [("plus", 4), ("times", 2)]."""
    first, *rest = prompt.partition(" by ")[0].split()
    return int(first), list(zip(rest[::2], map(int, rest[1::2])))


def values(prompt: str) -> list[int]:
    """What is known after each operation; the last is the answer."""
    first, operations = problem(prompt)
    return list(itertools.accumulate(operations, lambda a, o: apply(a, *o), initial=first))


def problems(seed: int, count: int) -> list[str]:
    """Different prompts of two to four operations, all of whose results are within 0 … 99."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < count:
        words = [str(rng.integers(1, 10))]
        for _ in range(rng.integers(2, 5)):
            word = str(rng.choice(list(SIGNS)))
            words += [word, str(rng.integers(2, 4) if word == "times" else rng.integers(1, 10))]
        if all(0 <= x <= LARGEST for x in values(" ".join(words))):
            found[" ".join(words)] = None
    return list(found)


def demonstration(prompt: str, approach: str, rng: np.random.Generator, careless: float = CARELESS) -> str:
    """The steps of a careless person, who goes on from a wrong result as if it were right."""

    def step(a: int, word: str, b: int) -> int:
        result = apply(a, word, b) + (rng.choice([-10, -2, -1, 1, 2, 10]) if rng.random() < careless else 0)
        steps.append(f"{a} {SIGNS[word]} {b} = {min(max(result, 0), LARGEST)}")
        return int(min(max(result, 0), LARGEST))

    (now, operations), steps = problem(prompt), []
    for word, b in operations:
        if word == "times" and approach == "sums":
            term = now
            for _ in range(b - 1):
                now = step(now, "plus", term)
        else:
            now = step(now, word, b)
    return " ; ".join([*steps, f"answer {now}"])


def first_error(prompt: str, text: str) -> int | None:
    """The index of the first wrong step of an answer, or of its beginning; None where all is right so far.

    Right is what follows from the right steps before: the next operation, a product also as sums, and at the end the answer.
    """
    now, operations = problem(prompt)
    term, more = 0, 0  # a product that is being summed up, and the sums that are missing
    for i, step in enumerate(filter(None, (" ".join(part.split()) for part in text.split(";")))):
        word, b = operations[0] if operations else ("", 0)
        if more and step == f"{now} + {term} = {now + term}":
            now, more = now + term, more - 1
        elif more or now is None:
            return i
        elif not operations and step == f"answer {now}":
            now = None  # nothing may follow
        elif word == "times" and step == f"{now} + {now} = {2 * now}":
            now, term, more, operations = 2 * now, now, b - 2, operations[1:]
        elif word and step == f"{now} {SIGNS[word]} {b} = {apply(now, word, b)}":
            now, operations = apply(now, word, b), operations[1:]
        else:
            return i
    return None


def right(row: dict, text: str) -> bool:
    """The reward function: whether the answer is the right one, whatever the steps."""
    return text.split()[-2:] == ["answer", str(values(row["prompt"][-1]["content"])[-1])]


# ---- sets of pairs ---------------------------------------------------------------------------------------------------

DRAWN = 4  # answers to a prompt, or at a step of the tree
ITERATIONS = 6
SETS = ("plain", "dts", "mcts", "mcts, steps")
HOW = dict(temperature=1.0, top_p=1.0, max_tokens=64, batch_size=128, device="cpu")


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def place(job: dict) -> Path:
    """The folder of a world, of everything that it depends on."""
    name = "-".join(str(job[key]) for key in ("seed", "prompts", "demonstrations", "steps"))
    return Path(job["cache"]).expanduser() / f"sums-2-{torch.__version__}-{name}"


def build_world(job: dict) -> dict:
    """A world of sums, kept in its folder: the start, what each strategy sampled, pairs; and what was measured of them."""
    folder = place(job)
    if not (folder / "measured.json").exists():
        part = folder.with_name(f"{folder.name}.part")  # with_suffix would cut the name at the dot of a version
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        measured = make_world(part, job)
        train.write_whole(part / "measured.json", json.dumps(measured))
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    return {"job": job, **json.loads((folder / "measured.json").read_text())}


def make_world(folder: Path, job: dict) -> dict:
    seed, tokenizer = job["seed"], toy.word_tokenizer(WORDS)
    rng, prompts = np.random.default_rng(seed), problems(seed, HELD_OUT + job["prompts"] + 4096)
    held_out, asked, shown = prompts[:HELD_OUT], prompts[HELD_OUT:-4096], prompts[-4096:]
    rows = []
    for prompt in rng.choice(shown, job["demonstrations"]):
        approach = str(rng.choice(APPROACHES, p=[0.8, 0.2]))
        named = f"{prompt} by {approach}" if rng.random() < 0.4 else str(prompt)
        rows.append(data.Row([{"role": "user", "content": named}], [data.answer(demonstration(prompt, approach, rng))]))
    toy.initial_model(rows, tokenizer, seed, job["steps"]).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, some in (("held_out", held_out), ("asked", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in some))
    sampled = {name: sampled_by(folder, name, seed) for name in ("plain", "dts", "mcts")}
    budget = min(sum(row["tokens"] for row in rows) for rows in sampled.values())
    measured = {f"start {k}": x for k, x in accuracy(folder / "model", folder).items()} | {"budget": budget}
    for name in SETS:
        rows = within(sampled[name.partition(",")[0]], budget)
        pairs = pairs_of(rows, folder / f"pairs {name}.jsonl", "steps" in name)
        measured |= {f"{name}/{k}": x for k, x in measure(rows, pairs).items()}
    return measured


def sampled_by(folder: Path, name: str, seed: int) -> list[dict]:
    """The rows of a strategy; dts puts together what was sampled by each approach."""

    def drawn(strategy: str, n: int, prompts: Path, **more) -> list[dict]:
        out = folder / f"sampled {prompts.stem} {strategy}.jsonl"
        how = HOW | dict(n=n, strategy=strategy, seed=seed) | more
        sample(Strategies(str(folder / "model"), str(prompts), str(out), **how))
        return read(out)

    if name == "mcts":
        return drawn("mcts", DRAWN, folder / "asked.jsonl", rule=right, iterations=ITERATIONS, step_end=";")
    if name == "plain":
        return drawn("plain", DRAWN, folder / "asked.jsonl")
    by = []
    for approach in APPROACHES:
        file = folder / f"asked by {approach}.jsonl"
        file.write_text(
            "".join(json.dumps({"prompt": f"{r['prompt']} by {approach}"}) + "\n" for r in read(folder / "asked.jsonl"))
        )
        by.append(drawn("plain", DRAWN // 2, file))
    return [together(rows) for rows in zip(*by, strict=True)]


def together(rows: Iterable[dict]) -> dict:
    """Rows of one problem by several approaches as one row of the problem itself."""
    first, *_ = rows = list(rows)
    prompt = first["prompt"][-1]["content"].partition(" by ")[0]
    responses = dict.fromkeys(text for row in rows for text in row["responses"])
    tokens = sum(row["tokens"] for row in rows)
    return {"prompt": [{"role": "user", "content": prompt}], "responses": list(responses), "tokens": tokens}


def within(rows: list[dict], budget: int) -> list[dict]:
    """The first rows, as many as their tokens leave within the budget."""
    spent = itertools.accumulate(row["tokens"] for row in rows)
    return [row for row, tokens in zip(rows, spent) if tokens <= budget]


def pairs_of(rows: list[dict], file: Path, by_steps: bool) -> list[dict]:
    """A right answer against a wrong one for each prompt; or all pairs of next steps half a reward apart, after two visits."""
    with tempfile.TemporaryDirectory() as scratch:
        taken, scored = Path(scratch) / "taken.jsonl", Path(scratch) / "scored.jsonl"
        taken.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if by_steps:
            steps(Steps(rows[0]["model"], str(taken), str(file), min_margin=0.5, min_visits=2))
        else:
            on_policy.score(on_policy.Scoring(str(taken), str(scored), rule=right))
            on_policy.pairs(on_policy.Pairing(str(scored), str(file), how="correct"))
    return read(file)


def measure(rows: list[dict], pairs: list[dict]) -> dict:
    """Cost and diversity of a set. Of a search also how well Q tells prefixes that are still right from others.

    first_error: share of pairs whose rejected response has the first error itself, as what comes before it is right.
    """
    texts = [(row, text) for row in rows for text in row["responses"]]
    tokens = sum(row["tokens"] for row in rows)
    found = {"prompts": len(rows), "tokens": tokens, "pairs": len(pairs), "cost": tokens / len(pairs)}
    found |= {"distinct": len(texts) / len(rows), "right": sum(right(*x) for x in texts) / len(texts)}
    if "begun" in pairs[0]:
        wrong, good = [], []
        for p in pairs:
            ask = p["prompt"][-1]["content"]
            right_so_far = first_error(ask, p["begun"]) is None
            wrong.append(right_so_far and first_error(ask, p["begun"] + p["rejected_step"]) is not None)
            good.append(first_error(ask, p["begun"] + p["chosen_step"]) is None)
        found |= {"first_error": sum(wrong) / len(pairs), "chosen_right": sum(good) / len(pairs)}
    if "tree" in rows[0]:
        found["auc"] = auc(*zip(*(x for row in rows for x in judged(row))))
    return found


def judged(row: dict) -> list[tuple[float, bool]]:
    """Q of every step of a tree, and whether the answer is right up to there."""
    ask, texts, found = row["prompt"][-1]["content"], [], []
    for node in row["tree"]:
        texts.append("" if node["parent"] is None else texts[node["parent"]] + node["step"])
        if node["parent"] is not None:
            found.append((node["Q"], first_error(ask, texts[-1]) is None))
    return found


def auc(scores: Iterable[float], label: Iterable[bool]) -> float:
    """Probability that one with the label has the higher score, ties ½."""
    x, y = np.array(scores), np.array(label)
    values, at, count = np.unique(x, return_inverse=True, return_counts=True)
    rank = count.cumsum() - (count - 1) / 2  # of equal scores the mean of their places
    hits = y.sum()
    return float((rank[at][y].sum() - hits * (hits + 1) / 2) / (hits * (~y).sum()))


# ---- one run ---------------------------------------------------------------------------------------------------------

OBJECTIVES = {  # call, learning rates to try
    "sft": ("sft", (1.5e-4, 5e-4, 1.5e-3)),
    "orpo": ("orpo(lam=1.0)", (1e-4, 3e-4, 1e-3)),
    "dpo": ("dpo(beta=0.5)", (3e-5, 1e-4, 3e-4)),
    "simpo": ("simpo(beta=2.0, gamma=1.0)", (1e-5, 3e-5, 1e-4)),
}
TUNING_SEED, DRAWS = 100, 2


def accuracy(model: Path, folder: Path) -> dict[str, float]:
    """Share of right answers to held-out prompts: drawn at temperature 1, and greedy."""
    found = {"accuracy": [], "greedy": []}
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(DRAWS + 1):
            out = f"{scratch}/{i}.jsonl"
            how = HOW | dict(n=1, batch_size=HELD_OUT, temperature=float(i < DRAWS), seed=i, keep_unfinished=True)
            on_policy.sample(Sampling(str(model), str(folder / "held_out.jsonl"), out, **how))
            found["accuracy" if i < DRAWS else "greedy"] += [right(r, (r["responses"] or [""])[0]) for r in read(Path(out))]
    return {name: sum(hits) / len(hits) for name, hits in found.items()}


def experiment(job: dict) -> dict:
    """The start trained on a set of its world, and what it then answers; or why the run ended early."""
    folder = place(job)
    with tempfile.TemporaryDirectory() as scratch:
        s = train.Settings(
            model=str(folder / "model"), dataset=str(folder / f"pairs {job['set']}.jsonl"), objective=job["objective"],
            lr=job["lr"], seed=job["seed"], cache=job["cache"], out=f"{scratch}/run", batch_size=16, epochs=2, eval_size=0,
            samples=0, max_length=128, layout="padded", dtype="fp32", tokens_per_microbatch=4096,
        )  # fmt: skip
        try:
            seconds = (train_on_steps if "steps" in job["set"] else train.train)(s)["seconds"]
        except UserError as error:
            return {"job": job, "error": str(error)}
        return {"job": job, **accuracy(Path(scratch) / "run" / "model", folder), "seconds": seconds}


# ---- the study -------------------------------------------------------------------------------------------------------


@dataclass
class Study(train.Settings):
    seeds: int = setting(5, "worlds that the tables are of")
    prompts: int = setting(1024, "prompts that plain sampling answers; its tokens are what every strategy may spend")
    demonstrations: int = setting(8192, "careless solutions that the start learns from")
    supervised_steps: int = setting(1000, "steps of 64 demonstrations in which it does")


def study(s: Study) -> dict:
    if min(s.seeds, s.prompts, s.demonstrations, s.supervised_steps) < 1:
        raise UserError("seeds, prompts, demonstrations and supervised_steps are at least 1")
    refuse_own_data(s)
    started, out = time.perf_counter(), train.prepare_out(s)
    train.write_whole(out / train.MARKER, json.dumps({"plainpo": {"study": "diversify"}}))
    train.write_whole(out / "settings.json", json.dumps(asdict(s), indent=2) + "\n")
    common = dict(prompts=s.prompts, demonstrations=s.demonstrations, steps=s.supervised_steps, cache=s.cache)

    def do(jobs: list[dict], work: Callable) -> list[dict]:
        return run_jobs(jobs, out / "runs.jsonl", work)

    worlds = do([common | {"seed": seed} for seed in (*range(s.seeds), TUNING_SEED)], build_world)[: s.seeds]
    tried = {
        (name, objective): [common | {"set": name, "objective": call, "lr": lr, "seed": TUNING_SEED} for lr in rates]
        for name in SETS for objective, (call, rates) in OBJECTIVES.items()
    }  # fmt: skip
    done = {job_key(r["job"]): r for r in do([job for jobs in tried.values() for job in jobs], experiment)}
    best = {key: max(jobs, key=lambda job: done[job_key(job)].get("accuracy", 0.0)) for key, jobs in tried.items()}
    results = iter(do([job | {"seed": seed} for job in best.values() for seed in range(s.seeds)], experiment))
    runs = {key: [next(results) for _ in range(s.seeds)] for key in best}
    text = report(worlds, runs, best)
    (out / "diversify.md").write_text(text)
    print(text)
    draw(worlds, runs, out / "diversify.png")
    train.say(f"{time.perf_counter() - started:.0f} s; everything is in {out}")
    return {"out": str(out), "worlds": worlds, "runs": runs}


MEASURES = {  # of a set → title, decimals, factor
    "prompts": ("prompts", 0, 1), "pairs": ("pairs", 0, 1), "cost": ("tokens per pair", 0, 1),
    "distinct": ("different answers per prompt", 2, 1), "right": ("right of them, %", 1, 100),
    "first_error": ("rejected is the first error, %", 1, 100), "chosen_right": ("chosen right so far, %", 1, 100),
    "auc": ("AUC of Q against right so far", 3, 1),
}  # fmt: skip


def cell(results: list[dict], name: str, digits: int, factor: float = 1) -> str:
    """ "61.2 ± 0.8"; a dash where a run ended early or the measure has no meaning; of one world no error."""
    mean, error = (factor * x for x in mean_and_error(results, name))
    return "–" if mean != mean else f"{mean:.{digits}f}" + f" ± {error:.{digits}f}" * (len(results) > 1)


def gap(runs: list[dict], plain: list[dict]) -> str:
    """Points of accuracy ahead of plain sampling, world by world, and whether that is more than two standard errors."""
    ahead = [{"ahead": a.get("accuracy", np.nan) - b.get("accuracy", np.nan)} for a, b in zip(runs, plain)]
    mean, error = (100 * x for x in mean_and_error(ahead, "ahead"))
    return f"{mean:+.1f}" + f" ± {error:.1f}, {verdict(mean, error)}" * (len(runs) > 1)


def report(worlds: list[dict], runs: dict, best: dict) -> str:
    """The sets, and the accuracy after training with the lead over plain sampling ("holds": above two standard errors)."""
    sets = [["set", *(title for title, *_ in MEASURES.values())], ["---"] * (1 + len(MEASURES))]
    sets += [[name, *(cell(worlds, f"{name}/{m}", d, f) for m, (_, d, f) in MEASURES.items())] for name in SETS]
    start = [["start", "–", *(cell(worlds, f"start {m}", 1, 100) for m in ("accuracy", "greedy")), "–"]]
    lines = [["set", "objective, lr", "accuracy, %", "greedy, %", "ahead of plain"], ["---"] * 5, *start]
    for (name, objective), found in runs.items():
        lead = "–" if name == "plain" else gap(found, runs["plain", objective])
        shown = [cell(found, m, 1, 100) for m in ("accuracy", "greedy")]
        lines.append([name, f"{objective}, {best[name, objective]['lr']:g}", *shown, lead])
    cost = [cell([{"x": w[f"{name}/cost"] / w["plain/cost"]} for w in worlds], "x", 2) for name in SETS]
    said = "; ".join(f"{name} {x}" for name, x in zip(SETS, cost))
    spent = cell(worlds, "budget", 0)
    edges = [f"{n}: {o}" for (n, o), job in best.items() if job["lr"] in (min(OBJECTIVES[o][1]), max(OBJECTIVES[o][1]))]
    at_edge = f"The learning rate is at an edge of the grid for {len(edges)} of {len(best)}: {'; '.join(edges) or 'none'}."
    cost_said = f"Tokens generated for each set: {spent}. Tokens per pair, plain = 1: {said}."
    return f"{markdown(sets)}\n{cost_said}\n\n{markdown(lines)}\n{at_edge}\n"


def draw(worlds: list[dict], runs: dict, file: Path) -> None:
    """Held-out accuracy against what a pair costs: a colour and a name for each set, a mark for each objective."""
    plt = pyplot()
    if plt is None:
        return
    figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    start = 100 * mean_and_error(worlds, "start accuracy")[0]
    axis.axhline(start, color="0.6", lw=1)
    axis.set(xscale="log", xlabel="generated tokens per pair", ylabel="right held-out answers at temperature 1, %")
    for i, name in enumerate(SETS):
        cost, _ = mean_and_error(worlds, f"{name}/cost")
        top = start
        for j, (objective, marker) in enumerate(zip(OBJECTIVES, "osD^")):
            height, error = (100 * x for x in mean_and_error(runs[name, objective], "accuracy"))
            axis.errorbar(cost * 1.02 ** (j - 1.5), height, error, fmt=marker, color=f"C{i}", capsize=2)
            top = max(top, height + error)
        axis.annotate(name, (cost, top), xytext=(0, 6), textcoords="offset points", ha="center", color=f"C{i}")
    for objective, marker in zip(OBJECTIVES, "osD^"):
        axis.plot([], [], marker, color="gray", label=objective)
    axis.margins(0.12)
    above = dict(xycoords=("axes fraction", "data"), xytext=(-4, 3), textcoords="offset points", ha="right", color="0.4")
    axis.annotate("start", (1, start), **above)
    low, high = axis.get_xlim()
    ticks = [x for x in (20, 50, 100, 150, 200, 300, 400, 500, 1000, 2000) if low <= x <= high]
    axis.set_xticks(ticks, [str(x) for x in ticks], minor=False)
    axis.set_xticks([], minor=True)
    axis.legend()
    axis.grid(alpha=0.25)
    figure.savefig(file, dpi=110)
    plt.close(figure)


COMMANDS = {
    "sample": (Strategies, functools.partial(sample, say=say)),
    "steps": (Steps, functools.partial(steps, say=say)),
}


def main(argv: list[str] | None = None):
    """The command line as a function. A user error ends with a message and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        return train.main(argv[1:], lambda argv: train_on_steps(train.parse_settings(argv)))
    if argv and argv[0] in COMMANDS:
        work = functools.partial(data.commands, prog=PROG, text=__doc__, table=COMMANDS)
        return data.command_line(work, argv, stopped=on_policy.RESUMED if argv[0] == "sample" else "stopped")
    return train.main(argv, lambda argv: study(train.parse_settings(argv, Study, PROG, __doc__)))


if __name__ == "__main__":
    main()
