"""Answers to a benchmark's prompts, in the form that its official judge reads: AlpacaEval and Arena-Hard.

    python tests/tools/answers.py --model runs/mine/model --prompts alpaca_eval.json --out outputs.json --temperature 0.9
    python tests/tools/answers.py --model runs/mine/model --prompts question.jsonl --out mine.jsonl --style arena_hard

Rows keep their order; a prompt that is there twice has the same answer twice. Answers that reach max_new_tokens are kept as
far as they went and counted. A run that was killed goes on with the same command to what an unbroken one would have made.
"""

import hashlib
import json
import os
import sys
import time
from dataclasses import MISSING, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import on_policy  # noqa: E402
from on_policy import Sampling, prompts_of, say  # noqa: E402

import data  # noqa: E402
from data import UserError, setting  # noqa: E402

# Published decoding: initial model → style → (temperature, max_new_tokens), all with top_p 1. α-DPO paper, appendix B.1,
# "Decoding hyperparameters": those of SimPO, and its footnote 4 gives the folder of SimPO's released code (eval/) that has the
# numbers. That folder has none for Gemma-2 and none of its own for Llama-3-Instruct v0.2, so there is no such entry.
DECODING = {
    "mistral-7b-base": {"alpaca_eval": (0.7, 2048), "arena_hard": (0.0, 4096)},
    "mistral-7b-instruct": {"alpaca_eval": (0.5, 2048), "arena_hard": (0.0, 4096)},
    "llama-3-8b-base": {"alpaca_eval": (0.9, 4096), "arena_hard": (0.0, 4096)},
    "llama-3-8b-instruct": {"alpaca_eval": (0.9, 4096), "arena_hard": (0.0, 4096)},
}
GREEDY = (0.0, 2048)
STYLES = ("alpaca_eval", "arena_hard")


@dataclass
class Generation:
    """How to answer."""

    model: str = setting(MISSING, "folder or hub name of a causal language model, such as runs/mine/model")
    prompts: str = setting(MISSING, "AlpacaEval's JSON, Arena-Hard's question.jsonl, or any rows with a prompt")
    out: str = setting(MISSING, "file to write; a killed run goes on from OUT.part")
    style: str = setting("alpaca_eval", "format of out: alpaca_eval (a JSON list) or arena_hard (v0.1's answers, JSON lines)")
    name: str | None = setting(None, "what the judge calls the model (generator, model_id); without it, its folder's name")
    decoding: str | None = setting(None, f"published settings of an initial model: {', '.join(DECODING)}")
    temperature: float | None = setting(None, "of sampling, 0 is greedy; without it and decoding: 0")
    max_new_tokens: int | None = setting(None, "answers are cut there, and kept; without it and decoding: 2048")
    top_p: float = setting(1.0, "share of the probability that is sampled from")
    batch_size: int = setting(8, "prompts at a time; answers depend on it where temperature > 0")
    columns: str = setting("", "columns to rename, new=old: prompt=question")
    template_kwargs: str = setting("", 'more arguments of the chat template, as JSON: {"enable_thinking": false}')
    date: str = setting("", "YYYY-MM-DD, for chat templates that write the date; without it today, of a killed run its first")
    seed: int = setting(0, "of sampling")
    device: str = setting("auto", "cpu, cuda, or auto")
    trust_remote_code: bool = setting(False, "allow a model folder to bring Python code that is then run")


def generate(g: Generation) -> dict:
    """Answer every prompt once and write the answers as a judge reads them; returns their number and how many were cut."""
    how = decoding(g)
    out = Path(g.out)
    part = Path(f"{g.out}.part")
    if out.exists():
        raise UserError(f"out {out} is there already; choose another file, or delete it")
    rows = list(prompts_of(g.prompts, g.columns))
    name = name_of(g)
    there = f"; goes on from {part}" if part.exists() else ""
    say(f"{name}: {len(rows)} prompts, {', '.join(f'{k} {v:g}' for k, v in how.items())}, seed {g.seed}{there}")
    names = ("batch_size", "columns", "template_kwargs", "date", "seed", "device", "trust_remote_code")
    more = {name: getattr(g, name) for name in names}
    on_policy.sample(Sampling(g.model, g.prompts, str(part), n=1, keep_unfinished=True, **how, **more), rows)
    sampled = read_sampled(part)
    for where, row, _ in rows:
        if row["id"] not in sampled:
            raise UserError(f"{where}: its prompt cannot be asked (see above), and a judge needs an answer to every prompt")
    answers = [sampled[row["id"]]["responses"][0] for _, row, _ in rows]
    cut = sum(sampled[row["id"]]["unfinished"] for _, row, _ in rows)
    write_whole(out, in_style(g, rows, answers, name))
    part.unlink()
    advice = ": raise --max_new_tokens" if cut > 0.1 * len(answers) else ""
    cut_said = f"{cut} of them cut at {how['max_tokens']} tokens{advice}"
    say(f"{len(answers)} answers in {out}, {cut_said}, {answers.count('')} empty")
    return {"out": str(out), "answers": len(answers), "cut": cut}


def name_of(g: Generation) -> str:
    """What the judge calls the model; an exported model is RUN/model, where the run's name says more."""
    folder = Path(g.model).resolve()
    return g.name or (folder.parent.name if folder.name == "model" else Path(g.model).name)


def decoding(g: Generation) -> dict:
    """How to sample: as published, and over that what was asked for."""
    data.refuse_unless_known("style", g.style, STYLES)
    if g.decoding is not None:
        data.refuse_unless_known("decoding", g.decoding, DECODING)
    temperature, tokens = GREEDY if g.decoding is None else DECODING[g.decoding][g.style]
    if g.temperature is not None:
        temperature = g.temperature
    if g.max_new_tokens is not None:
        tokens = g.max_new_tokens
    on_policy.check_decoding(temperature, g.top_p, max_new_tokens=tokens, batch_size=g.batch_size)
    return dict(temperature=temperature, top_p=g.top_p, max_tokens=tokens)


def read_sampled(part: Path) -> dict[str, dict]:
    """What `on_policy.sample` has written, by the prompts' ids."""
    rows = [json.loads(line) for line in part.read_text(encoding="utf-8").split("\n") if line]
    return {row["id"]: row for row in rows}


def in_style(g: Generation, rows: list[tuple[str, dict, list[dict]]], answers: list[str], name: str) -> str:
    """The text of the file that the judge reads."""
    if g.style == "alpaca_eval":
        outputs = [alpaca_eval(row, prompt, answer, name) for (_, row, prompt), answer in zip(rows, answers)]
        return json.dumps(outputs, ensure_ascii=False, indent=2, default=str) + "\n"
    tokenizer = data.load_tokenizer(g.model, g.trust_remote_code)
    text = ""
    for (_, row, _), answer in zip(rows, answers):
        text += json.dumps(arena_hard(row, answer, name, tokenizer), ensure_ascii=False, default=str) + "\n"
    return text


def alpaca_eval(row: dict, prompt: list[dict], answer: str, name: str) -> dict:
    """One output as AlpacaEval reads it; a conversation becomes an instruction of several paragraphs."""
    output = {"instruction": "\n\n".join(m["content"] for m in prompt), "output": answer, "generator": name}
    if "dataset" in row:
        output["dataset"] = row["dataset"]
    return output


def arena_hard(row: dict, answer: str, name: str, tokenizer) -> dict:
    """One answer as Arena-Hard v0.1 reads it; token_len in tokens of the model's own tokenizer (its authors count GPT's)."""
    question = row.get("question_id", row["id"])
    turn = {"content": answer, "token_len": len(tokenizer(answer, add_special_tokens=False)["input_ids"])}
    unique = hashlib.sha256(json.dumps([name, question, answer]).encode()).hexdigest()[:22]
    choices = [{"index": 0, "turns": [turn]}]
    return {"question_id": question, "answer_id": unique, "model_id": name, "choices": choices, "tstamp": time.time()}


def write_whole(out: Path, text: str) -> None:
    """At once: a kill leaves no half of a file."""
    new = Path(f"{out}.new")
    new.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(new, out)


def main(argv: list[str] | None = None) -> dict:
    """The command line as a function. A user error ends with a message and exit code 2."""

    def work(argv: list[str]) -> dict:
        return generate(data.parse(Generation, argv, "tests/tools/answers.py", __doc__))

    return data.command_line(work, argv, stopped=on_policy.RESUMED)


if __name__ == "__main__":
    main()
