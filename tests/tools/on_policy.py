"""Preference pairs of a model's own answers: sample → score → pairs.

    python tests/tools/on_policy.py sample --model MODEL --prompts PROMPTS.jsonl --out sampled.jsonl -n 5
    python tests/tools/on_policy.py score  --responses sampled.jsonl --out scored.jsonl --reward_model REWARD_MODEL
    python tests/tools/on_policy.py pairs  --scored scored.jsonl --out pairs.jsonl --how best_worst

Every step reads and writes JSON lines, so another engine can take its place (tests/studies/README.md does it with vLLM):

    sample  {prompt} or any row with a prompt  → {id, prompt: [messages], responses: [text], strategies, unfinished, tokens,
                                                  …settings}
    score   {prompt, responses}                → the same with scores: [number]
    pairs   {prompt, responses, scores}        → {id, prompt, chosen, rejected, score_chosen, score_rejected}

A row's tools and chat_template_kwargs reach the chat template at each step and stand in its output.
"""

import contextlib
import datetime
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from data import Row, UserError, encode, say, setting  # noqa: E402
from logprobs import continuations  # noqa: E402

LONG = 2**31  # more tokens than any prompt: nothing is cut
FOR_THE_TEMPLATE = ("tools", "chat_template_kwargs")  # columns that are arguments of the chat template


def quiet(text: str) -> None: ...


# ---- prompts ---------------------------------------------------------------------------------------------------------


def prompts_of(source: str, columns: str = "") -> Iterator[tuple[str, dict, list[dict]]]:
    """(where, row with an id, prompt messages) of every usable row of all sources; what is left out is named on stderr."""
    renamed = data._renamed(columns)
    sources = data._sources(source)
    if any(weight != 1 for _, weight in sources):
        raise UserError(f"{source}: a weight (@) says how often to train on a row; here it has no meaning")
    used = 0
    left_out = 0
    for where, raw in itertools.chain.from_iterable(data.read(name) for name, _ in sources):
        try:
            row = with_columns(raw, renamed)
            asked = prompt_of(row, where)
        except UserError as error:
            left_out += 1
            if left_out <= 5:
                say(f"{where}: left out ({str(error).removeprefix(f'{where}: ')})")
            continue
        used += 1
        said = [asked.prompt, asked.template] if asked.template else asked.prompt
        key = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
        yield where, {**row, "id": key}, asked.prompt
    if left_out > 5:
        say(f"{source}: {left_out} rows left out in all")
    if not used:
        raise UserError(f"{source}: no row with a usable prompt")


def with_columns(raw, renamed: dict[str, str]) -> dict:
    if isinstance(raw, UserError):
        raise raw
    if not isinstance(raw, dict):
        raise UserError("the row is not an object with columns")
    return raw | {new: raw.get(old) for new, old in renamed.items()}


def prompt_of(row: dict, where: str) -> Row:
    """What a row asks: its prompt column (AlpacaEval's is instruction), Arena-Hard's one turn, or that of any pair format."""
    if data.prompt_columns(row):
        return asked_of(row, data.prompt_of(row))
    turns = row.get("turns")
    if turns is None:
        reader, _ = data.format_of(row, where)
        return reader(row)
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], dict):
        raise UserError("turns is not a list of one turn {content}")
    return asked_of(row, data._messages(turns[0].get("content"), "turns"))


def asked_of(row: dict, prompt: list[dict]) -> Row:
    """These messages with what other columns of the row say: a system text, arguments of the chat template."""
    return data._row(row, prompt, [])


def prompt_ids(tokenizer, asked: Row, template: dict | None = None) -> list[int]:
    """What a model is asked: the prompt's token ids, with the generation prompt, as training sees them.

    A special token that is spelled in it is a real one, as in every engine; training drops such a row. template: the run's
    arguments of the chat template.
    """
    whole = asked._replace(responses=[data.answer(data.MARK)])
    example, _ = encode(whole, tokenizer, LONG, LONG, control_tokens=True, template=template)
    return example.prompt


# ---- files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def continued(source: str, out: str) -> Iterator[list[dict]]:
    """The rows of an unfinished output, to which nobody else may add meanwhile; a line cut short by a kill is taken off."""
    check_out(source, out)
    if os.path.exists(out) and not os.path.isfile(out):
        raise UserError(f"{out}: is no file that could be continued")
    with open(out, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another run is writing it; wait for its end, or give another --out") from None
        except OSError as error:  # some network file systems have no locks
            say(f"warning: {out} cannot be locked ({error}); let one run at a time write there")
        try:
            yield whole_lines(out)
        finally:
            if os.path.exists(out) and os.path.getsize(out) == 0:
                os.remove(out)


def whole_lines(out: str) -> list[dict]:
    """The rows of an output; what a kill left of a last line is cut off, where it stands."""
    content = Path(out).read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    try:
        rows = [json.loads(line) for line in complete.decode().split("\n") if line]
        if not all(isinstance(row["id"], str) and isinstance(row["responses"], list) for row in rows):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out}: not the output of an earlier run of this command, so it cannot be continued") from error
    if complete != content:
        os.truncate(out, len(complete))
    return rows


def check_out(source: str, out: str) -> None:
    """Make the folder of a file to write; one that is also read, or cannot be written, is refused now and not after hours."""
    path = Path(out)
    for name, _ in data._sources(source):
        if os.path.exists(name) and os.path.exists(out) and os.path.samefile(name, out):
            raise UserError(f"{out}: is read and written at once; give another --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch()
            path.unlink()
        elif path.is_dir():
            raise UserError(f"{out}: cannot be written (a folder)")
        elif not os.access(path, os.W_OK):
            raise UserError(f"{out}: cannot be written (not permitted)")
    except OSError as error:
        raise UserError(f"{out[:200]}: cannot be written ({error.strerror})") from error


def write(out: str, rows: list[dict], mode: str = "a") -> None:
    # a lone surrogate becomes its escape, which is JSON again; what JSON has no form for, such as a date, its text
    with open(out, mode, encoding="utf-8", errors="backslashreplace") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


# ---- sample ----------------------------------------------------------------------------------------------------------


@dataclass
class Sampling:
    """Sample n responses to every prompt and add them to out, which is continued if it is there.

    The prompt that is written is the one that was given; beside it stand the row's own texts and numbers that no format reads,
    such as a right answer. Equal responses are kept once; one that did not end within max_tokens is counted and left out, since
    no terminator followed it. `tokens` counts all that were generated for a prompt, whatever became of them. Prompts go in
    fixed batches with a seed of their own, so a continued run writes what an unbroken one would have written.
    """

    model: str = setting(MISSING, "folder or hub name of a causal language model")
    prompts: str = setting(MISSING, "sources of rows with a prompt")
    out: str = setting(MISSING, "JSON lines to write")
    n: int = setting(5, "responses per prompt", aliases="-n")
    temperature: float = setting(0.8, "of sampling; 0 is greedy")
    top_p: float = setting(0.95, "share of the probability that is sampled from")
    max_tokens: int = setting(512, "longer responses are left out")
    batch_size: int = setting(8, "prompts at a time")
    columns: str = setting("", "columns to rename, new=old")
    template_kwargs: str = setting("", 'more arguments of the chat template, as JSON: {"enable_thinking": false}')
    date: str = setting("", "YYYY-MM-DD, for chat templates that write the date; without it today, of what goes on its first")
    seed: int = setting(0, "for everything random")
    device: str = setting("auto", "cpu, cuda or auto")
    keep_unfinished: bool = setting(False, "keep unfinished responses, and empty ones, as a judge needs them")
    trust_remote_code: bool = setting(False, "allow a model folder to bring Python code that is then run")

    def recorded(self) -> dict:
        """What every row says of how it was made; a run that goes on must say the same."""
        names = ("n", "batch_size", "temperature", "top_p", "max_tokens", "template_kwargs", "date", "seed")
        return {"model": self.model, "strategy": "plain"} | {name: getattr(self, name) for name in names}

    def asked(self, row: dict) -> int:
        """How many responses were asked for in a row of the output."""
        return self.n


def sample(
    s: Sampling, prompts: Iterable | None = None, say: Callable[[str], None] = quiet, respond: Callable | None = None
) -> None:
    """Sample responses to prompts, see Sampling.

    Args:
        prompts: what `prompts_of` gives, if it is not to be read from s.prompts.
        respond: (model, tokenizer, rows, s, seed) → for each row {responses, strategies, unfinished, tokens, …}; without it
            `plain_responses`.
    Raises:
        UserError: a setting that does not fit, an output of other settings, or no response that was kept.
    """
    check_decoding(s.temperature, s.top_p, n=s.n, batch_size=s.batch_size, max_tokens=s.max_tokens)
    device = data.device_named(s.device)
    with continued(s.prompts, s.out) as there:
        add_samples(s, there, device, prompts, say, respond or plain_responses)


def add_samples(s: Sampling, there: list[dict], device: torch.device, prompts, say: Callable, respond: Callable) -> None:
    """Add to the output, which holds some rows, those that are missing."""
    done = {row["id"]: row for row in there}
    s = replace(s, date=s.date or next((row["date"] for row in there if row.get("date")), ""))
    for row in there:
        refuse_other_settings(row, s.recorded(), s.out)
    tokenizer = data.load_tokenizer(s.model, s.trust_remote_code)
    if data.asks_for_date(tokenizer):
        s = replace(s, date=s.date or datetime.date.today().isoformat())
    recorded = s.recorded()
    template = data.template_arguments(s)
    rows = answerable(prompts_of(s.prompts, s.columns) if prompts is None else prompts, tokenizer, template)
    how = f"temperature {s.temperature:g}, top_p {s.top_p:g}, at most {s.max_tokens} tokens"
    already = f"; {sum(row['id'] in done for row in rows)} are in {s.out} already" if done else ""
    strategy = recorded["strategy"]
    say(f"sample: {s.model} on {device}, {len(rows):,} prompts, {s.n} responses each ({strategy}), {how}{already}")
    model = speaker(s, tokenizer, template, device)
    for start in data.progress(range(0, len(rows), s.batch_size), "sample", "batches"):
        part = rows[start : start + s.batch_size]
        if all(row["id"] in done for row in part):
            continue
        found = respond(model, tokenizer, part, s, s.seed + start)
        lines = []
        for row, made in zip(part, found):
            if row["id"] not in done:
                done[row["id"]] = {**passed_on(row), "id": row["id"], "prompt": row["prompt"], **made, **recorded}
                lines.append(done[row["id"]])
        write(s.out, lines)
    say(summary([done[row["id"]] for row in rows], s))


def check_decoding(temperature: float, top_p: float, **counts: int) -> None:
    fits = temperature == 0 or 0.001 <= temperature < math.inf
    if not fits or not 0 < top_p <= 1 or min(counts.values()) < 1:
        least = f"{', '.join(counts)} are at least 1"
        raise UserError(f"temperature is at least 0.001, or 0 (greedy), top_p above 0 and at most 1, {least}")


def refuse_other_settings(row: dict, recorded: dict, out: str) -> None:
    other = [f"{name} {row[name]}, now {value}" for name, value in recorded.items() if row.get(name, value) != value]
    if other:
        raise UserError(f"{out}: was begun with {'; '.join(other)}; give the same settings or another --out")


def answerable(prompts: Iterable[tuple[str, dict, list[dict]]], tokenizer, template: dict) -> list[dict]:
    """Rows with their prompt as messages; of several with the same prompt the last one, in the place of the first.

    A prompt that does not become token ids, as where the chat template refuses it, is left out; the first is named on stderr.
    """
    rows = {}
    refused = []
    for where, row, prompt in prompts:
        try:
            prompt_ids(tokenizer, asked_of(row, prompt), template)
        except UserError as error:
            refused.append(f"{where}: {error}")
            continue
        rows[row["id"]] = {**row, "prompt": prompt}
    if refused and not rows:
        raise UserError(refused[0])
    if refused:
        say(f"{len(refused)} prompts left out; the first is {refused[0]}")
    return list(rows.values())


def passed_on(row: dict) -> dict:
    """The texts and numbers of a row that no format and no later step reads, such as the right answer for a reward function;
    and what the chat template reads."""
    read = {"rewards", "sampled", "tree"}  # what a search writes
    for columns, _ in data.FORMATS.values():
        read.update(columns)
    passed = {name: value for name, value in row.items() if isinstance(value, (str, int, float)) and name not in read}
    return passed | for_the_template(row)


def for_the_template(row: dict) -> dict:
    """The columns of a row that are arguments of the chat template."""
    return {name: row[name] for name in FOR_THE_TEMPLATE if row.get(name)}


def load_model(name: str, kind: str, device: torch.device, trust_remote_code: bool = False):
    """In the dtype that it was saved in; one in bf16, on a CPU that only emulates it, in fp32."""
    import transformers

    try:
        auto = getattr(transformers, f"AutoModelFor{kind}")
        how = dict(dtype="auto", use_safetensors=True, output_loading_info=True, trust_remote_code=trust_remote_code)
        model, info = auto.from_pretrained(name, **how)
    except Exception as error:  # transformers raises many kinds; all mean that there is no such model
        raise UserError(f"{name}: no loadable {kind} model there ({data.brief(error)})") from error
    if info["missing_keys"]:  # transformers would fill them with noise
        raise UserError(f"{name}: is another kind of model, it lacks {', '.join(sorted(info['missing_keys'])[:3])}")
    if device.type == "cpu" and model.dtype == torch.bfloat16 and not data.bf16_in_hardware(device):
        model = model.float()
    return model.to(device).train(False)


def speaker(s: Sampling, tokenizer, template: dict, device: torch.device):
    """The model to sample from, which stops where the chat template ends a response, too."""
    model = load_model(s.model, "CausalLM", device, s.trust_remote_code)
    train.stop_at_terminator(model, tokenizer, template, say)
    return model


def continue_ids(model, tokenizer, ids: list[list[int]], s: Sampling, max_tokens: int) -> tuple[list[list[int]], list[bool]]:
    """Token ids that follow each, without the terminator, and whether one came."""
    if model.generation_config.eos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError("the model has no token that ends a response (eos_token_id of its generation config)")
    try:
        answers, ended = continuations(model, tokenizer, ids, max_tokens, s.temperature, s.top_p)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise UserError(f"{s.model}: its probabilities are not finite numbers; are its weights?") from error
    bare = [answer[:-1] if end else answer for answer, end in zip(answers, ended)]
    return bare, ended


def answer(model, tokenizer, rows: list[dict], s: Sampling, seed: int) -> tuple[list[str], list[bool], list[int]]:
    """One answer to the prompt of each row, whether it ended within max_tokens, and its tokens with the terminator."""
    template = data.template_arguments(s)
    ids = [prompt_ids(tokenizer, asked_of(row, row["prompt"]), template) for row in rows]
    torch.manual_seed(seed)
    answers, ended = continue_ids(model, tokenizer, ids, s, s.max_tokens)
    texts = [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
    tokens = [len(ids) + end for ids, end in zip(answers, ended)]
    return texts, ended, tokens


def draw(model, tokenizer, questions: list[dict], s: Sampling, seed: int, strategy: str) -> list[dict]:
    """What is answered to n questions for each row, which come row by row, as rows with a prompt each: its different responses,
    in order; the strategy of each; how many did not end; and all tokens."""
    texts, ended, tokens = answer(model, tokenizer, questions, s, seed)
    found = []
    for start in range(0, len(questions), s.n):
        of_row = slice(start, start + s.n)
        kept = {}
        for text, complete in zip(texts[of_row], ended[of_row]):
            if s.keep_unfinished or text and complete:
                kept[text] = strategy
        counts = {"unfinished": ended[of_row].count(False), "tokens": sum(tokens[of_row])}
        found.append({"responses": list(kept), "strategies": list(kept.values()), **counts})
    return found


def plain_responses(model, tokenizer, rows: list[dict], s: Sampling, seed: int) -> list[dict]:
    questions = []
    for row in rows:
        questions += [row] * s.n
    return draw(model, tokenizer, questions, s, seed + 1, "plain")


def summary(rows: list[dict], s: Sampling) -> str:
    """What became of the responses that were asked for; UserError where not one was kept."""
    asked = sum(s.asked(row) for row in rows)
    kept = sum(len(row["responses"]) for row in rows)
    unfinished = sum(row.get("unfinished", 0) for row in rows)
    same = asked - kept - (0 if s.keep_unfinished else unfinished)
    text = f"{len(rows):,} prompts, {kept:,} responses kept"
    if unfinished:
        text += f"; {unfinished:,} of {asked:,} responses did not end within {s.max_tokens} tokens"
        if not s.keep_unfinished and unfinished >= 0.1 * asked:
            text += ": raise --max_tokens"
    if same:
        text += f"; {same:,} were equal to another one or empty"
    if not kept:
        os.remove(s.out)  # so that the same --out can be tried again with other settings
        raise UserError(f"{s.out}: not written, nothing to keep: {text}")
    if all("tokens" in row for row in rows):  # and none of an older version
        text += f"; {sum(row['tokens'] for row in rows):,} tokens generated"
    return f"{text}; all in {s.out}"


# ---- score -----------------------------------------------------------------------------------------------------------


@dataclass
class Scoring:
    """Add scores to rows of {prompt, responses} and write them to out, which is continued if it is there.

    By a reward model, which reads prompt and response through its own chat template, or by a reward function, a Python function
    of (row, response) that gives a number, or true and false.
    """

    responses: str = setting(MISSING, "sources of rows with a prompt and responses")
    out: str = setting(MISSING, "JSON lines to write")
    reward_model: str = setting("", "folder or hub name of a sequence-classification model with one output")
    rule: str = setting("", "reward function: file.py:function or module:function")  # in Python also the function itself
    batch_size: int = setting(8, "responses at a time")
    device: str = setting("auto", "cpu, cuda or auto")
    trust_remote_code: bool = setting(False, "allow a model folder to bring Python code that is then run")


def score(s: Scoring, say: Callable[[str], None] = quiet) -> None:
    """Score responses by a reward model or a reward function: see Scoring."""
    if bool(s.reward_model) == bool(s.rule) or s.batch_size < 1:
        raise UserError("score needs either reward_model or rule, and a batch_size of at least 1")
    device = data.device_named(s.device)
    with continued(s.responses, s.out) as there:
        add_scores(s, there, device, say)


def add_scores(s: Scoring, there: list[dict], device: torch.device, say: Callable) -> None:
    """Add to the output, which holds some rows, those that are missing."""
    done = {responses_key(row): row.get("scores") for row in there}
    if None in done.values():
        raise UserError(f"{s.out}: holds rows without scores, so it cannot be continued; give another --out")
    rows = rows_to_score(s.responses)
    already = f"; {sum(responses_key(row) in done for _, row, _ in rows):,} are in {s.out} already" if done else ""
    by = f"{s.reward_model} on {device}" if s.reward_model else s.rule
    say(f"score: {by}, {len(rows):,} rows{already}")
    if s.reward_model:
        scores_of = by_reward_model(s.reward_model, device, s.batch_size, s.trust_remote_code)
    else:
        scores_of = by_reward_function(s.rule)
    scores = []
    for where, row, prompt in data.progress(rows, "score", "rows"):
        key = responses_key(row)
        if key not in done:
            done[key] = checked_scores(scores_of, row, prompt, row["responses"], s.reward_model or s.rule, where)
            write(s.out, [{**row, "scores": done[key]}])
        scores.append(done[key])
    every = np.concatenate(scores)
    alike = sum(len(set(of_row)) < 2 for of_row in scores)
    spread = f"mean {every.mean():.4g}, standard deviation {every.std():.4g}, {every.min():.4g} to {every.max():.4g}"
    say(f"{len(rows):,} rows, {len(every):,} scores: {spread}; {alike:,} rows have no two different scores, so no pair")


def responses_key(row: dict) -> str:
    return json.dumps([row["id"], row["responses"]])


def rows_to_score(source: str) -> list[tuple[str, dict, list[dict]]]:
    rows = list(prompts_of(source))
    for where, row, _ in rows:
        if not isinstance(row.get("responses"), list) or not all(isinstance(x, str) for x in row["responses"]):
            raise UserError(f"{where}: responses is not a list of texts")
    if not any(row["responses"] for _, row, _ in rows):
        raise UserError(f"{source}: {len(rows):,} rows without any response: nothing to score")
    return rows


def checked_scores(scores_of: Callable, row: dict, prompt: list[dict], texts: list[str], name, where: str) -> list[float]:
    """The scores that a reward function or model gives; UserError for whatever else becomes of it."""
    try:
        with contextlib.chdir("."):  # we are back afterwards, wherever it went
            return [data._score(x, "a score") for x in scores_of(row, prompt, texts)]
    except (Exception, SystemExit) as error:  # a reward function is anybody's code
        raise UserError(f"{where}: {name} cannot score it ({type(error).__name__}: {data.brief(error)})") from error


def by_reward_function(rule: str | Callable[[dict, str], float]) -> Callable[[dict, list[dict], list[str]], list[float]]:
    """A function of (row, prompt, responses)."""
    function = reward_function(rule) if isinstance(rule, str) else rule

    def scores(row: dict, prompt: list[dict], texts: list[str]) -> list[float]:
        return [float(function(row, text)) for text in texts]

    return scores


def reward_function(name: str) -> Callable[[dict, str], float]:
    """ "file.py:function" or "module:function" → that function of (row, response)."""
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(spec)
            with contextlib.chdir("."):
                spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        function = getattr(module, attribute)
    except (Exception, SystemExit) as error:  # anybody's code, which may end in any way
        why = f"{type(error).__name__}: {data.brief(error)}"
        raise UserError(f"rule is {name!r}, which is no file.py:function or module:function ({why})") from error
    if not callable(function):
        raise UserError(f"rule is {name!r}, which is a {type(function).__name__} and no function of (row, response)")
    return function


def by_reward_model(
    name: str, device: torch.device, batch_size: int, trust_remote_code: bool
) -> Callable[[dict, list[dict], list[str]], list[float]]:
    """A function of (row, prompt, responses); responses go padded on the right, batch_size at a time."""
    tokenizer = data.load_tokenizer(name, trust_remote_code)
    model = load_model(name, "SequenceClassification", device, trust_remote_code)
    if model.config.num_labels != 1:
        raise UserError(f"{name}: gives {model.config.num_labels} numbers per text; a reward model gives one")
    config = model.config.get_text_config()
    own_pad = config.pad_token_id

    @torch.no_grad()
    def scores(row: dict, prompt: list[dict], texts: list[str]) -> list[float]:
        ids = []
        for text in texts:
            whole = asked_of(row, prompt)._replace(responses=[data.answer(text)])
            example, _ = encode(whole, tokenizer, LONG, LONG, control_tokens=True)
            ids.append(example.prompt + example.responses[0])
        if own_pad is None:  # transformers looks for the last token that is no padding, so padding must be an id not in use
            used = set(itertools.chain.from_iterable(ids))
            config.pad_token_id = next(i for i in range(config.vocab_size) if i not in used)
        values = []
        for start in range(0, len(ids), batch_size):
            inputs, mask = padded(ids[start : start + batch_size], config.pad_token_id)
            logits = model(input_ids=inputs.to(model.device), attention_mask=mask.to(model.device)).logits
            values += logits[:, 0].tolist()
        return values

    return scores


def padded(ids: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, mask of the real ones), both (rows, longest)."""
    width = max(map(len, ids))
    inputs = [row + [pad] * (width - len(row)) for row in ids]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in ids]
    return torch.tensor(inputs), torch.tensor(mask)


# ---- pairs -----------------------------------------------------------------------------------------------------------


@dataclass
class Pairing:
    """Make preference pairs of scored responses; responses of several rows with the same prompt are taken together."""

    scored: str = setting(MISSING, "sources of rows with a prompt, responses and scores")
    out: str = setting(MISSING, "JSON lines to write")
    how: str = setting(
        "best_worst",
        "best_worst, random (two of different score) or correct (a random one above ½ against one at most ½)",
    )
    min_margin: float = setting(0.0, "least difference of scores of a pair")
    seed: int = setting(0, "for everything random")


def pairs(s: Pairing, say: Callable[[str], None] = quiet) -> Counter:
    """Make preference pairs, see Pairing; returns how many prompts gave a pair, or why not."""
    data.refuse_unless_known("how", s.how, ["best_worst", "random", "correct"])
    check_pairs_out(s.scored, s.out)
    say(f"pairs: {s.how}, scores at least {s.min_margin:g} apart, seed {s.seed}, of {s.scored}")
    prompts, counts = scores_by_prompt(s.scored)
    lines = []
    for key, (row, prompt, scores) in prompts.items():
        couples = comparable(scores, s)
        if couples:
            counts["pairs"] += 1
            chosen, rejected = random.Random(f"{s.seed} {key}").choice(couples)
            line = {"id": key, "prompt": prompt, **for_the_template(row), "chosen": chosen, "rejected": rejected}
            lines.append(line | {"score_chosen": scores[chosen], "score_rejected": scores[rejected]})
        elif len(scores) < 2:
            counts["fewer than two responses"] += 1
        else:
            counts[f"no two responses that differ as asked ({s.how}, min_margin {s.min_margin:g})"] += 1
    write_pairs(s.scored, s.out, lines, counts)
    longer = sum(len(line["chosen"]) > len(line["rejected"]) for line in lines) / len(lines)
    say(f"{len(lines):,} pairs in {s.out}: mean margin {mean_margin(lines):.4g}, chosen longer in {longer:.0%}")
    for what, n in counts.items():
        if what != "pairs":
            say(f"  {n:,} without: {what}")
    return counts


def scores_by_prompt(source: str) -> tuple[dict[str, tuple[dict, list[dict], dict[str, float]]], Counter]:
    """({id: (the first row, prompt, {response: score})} of all rows with the same prompt together, {reason: rows without
    scores})."""
    prompts = {}
    counts = Counter()
    for _, row, prompt in prompts_of(source):
        try:
            scores = scores_of_row(row)
        except UserError as error:
            counts[str(error)] += 1
            continue
        *_, together = prompts.setdefault(row["id"], (row, prompt, {}))
        together.update(scores)
    return prompts, counts


def scores_of_row(row: dict) -> dict[str, float]:
    """The responses of a row and the score of each, or the reward that a search gave it."""
    texts = row.get("responses")
    values = row.get("scores", row.get("rewards"))
    if not isinstance(texts, list) or not isinstance(values, list) or len(texts) != len(values):
        raise UserError("responses and scores are not two lists of the same length")
    texts = [data._text(x, f"responses {i}") for i, x in enumerate(texts, 1)]
    values = [data._score(x, "scores") for x in values]
    return dict(zip(texts, values))


def comparable(scores: dict[str, float], s: Pairing) -> list[tuple[str, str]]:
    """The pairs of responses, the better one first, that may be taken."""
    order = sorted(scores, key=lambda text: -scores[text])
    couples = []
    for a, b in itertools.combinations(order, 2):
        if scores[a] > scores[b] and scores[a] - scores[b] >= s.min_margin:
            couples.append((a, b))
    if s.how == "correct":
        return [(a, b) for a, b in couples if scores[a] > 0.5 >= scores[b]]
    if s.how == "best_worst":
        return [(a, b) for a, b in couples if scores[a] == scores[order[0]] and scores[b] == scores[order[-1]]][:1]
    return couples


def check_pairs_out(source: str, out: str) -> None:
    check_out(source, out)
    if Path(out).exists() and not are_pairs(Path(out)):
        raise UserError(f"{out}: is there, and not as pairs of this command; give another --out")


def are_pairs(file: Path) -> bool:
    """Whether a file is empty or holds pairs of this command, by its first line; such a one may be made again."""
    try:
        with open(file, encoding="utf-8") as lines:
            first = lines.readline()
        return not first or {"id", "score_chosen", "score_rejected"} <= json.loads(first).keys()
    except (ValueError, AttributeError):
        return False


def write_pairs(source: str, out: str, lines: list[dict], counts: Counter) -> None:
    """All pairs at once, in the place of earlier ones; UserError where there is none."""
    if not lines:
        why = "; ".join(f"{n} {why}" for why, n in counts.items())
        raise UserError(f"{source}: gives no pair: {why}. Lower --min_margin, or sample more responses to each prompt")
    part = f"{out}.{os.getpid()}.new"
    write(part, lines, "w")
    os.replace(part, out)


def mean_margin(lines: list[dict]) -> float:
    return sum(line["score_chosen"] - line["score_rejected"] for line in lines) / len(lines)


# ---- the command line ------------------------------------------------------------------------------------------------

COMMANDS = {
    "sample": (Sampling, functools.partial(sample, say=say)),
    "score": (Scoring, functools.partial(score, say=say)),
    "pairs": (Pairing, functools.partial(pairs, say=say)),
}
RESUMED = "stopped; nothing is lost, the same command goes on from here"


def main(argv: list[str] | None = None):
    """The command line as a function. A user error ends with a message and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    work = functools.partial(data.commands, prog="tests/tools/on_policy.py", text=__doc__, table=COMMANDS)
    return data.command_line(work, argv, stopped="stopped" if argv[:1] == ["pairs"] else RESUMED)


if __name__ == "__main__":
    main()
