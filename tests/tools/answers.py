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
from on_policy import Sampling, prompts_of, sample  # noqa: E402

import data  # noqa: E402
from data import UserError, load_tokenizer, refuse_unless_known, setting  # noqa: E402

# Published decoding: start → style → (temperature, max_new_tokens), all with top_p 1. α-DPO paper, appendix B.1, "Decoding
# hyperparameters": those of SimPO, and its footnote 4 gives the folder of SimPO's released code (eval/) that has the numbers.
# That folder has none for Gemma-2 and none of its own for Llama-3-Instruct v0.2, so there is no such entry.
DECODING = {
    "mistral-7b-base": {"alpaca_eval": (0.7, 2048), "arena_hard": (0.0, 4096)},
    "mistral-7b-instruct": {"alpaca_eval": (0.5, 2048), "arena_hard": (0.0, 4096)},
    "llama-3-8b-base": {"alpaca_eval": (0.9, 4096), "arena_hard": (0.0, 4096)},
    "llama-3-8b-instruct": {"alpaca_eval": (0.9, 4096), "arena_hard": (0.0, 4096)},
}
STYLES = ("alpaca_eval", "arena_hard")


@dataclass
class Generation:
    """How to answer."""

    model: str = setting(MISSING, "folder or hub name of a causal language model, such as runs/mine/model")
    prompts: str = setting(MISSING, "AlpacaEval's JSON, Arena-Hard's question.jsonl, or any rows with a prompt")
    out: str = setting(MISSING, "file to write; a killed run goes on from OUT.part")
    style: str = setting("alpaca_eval", "format of out: alpaca_eval (a JSON list) or arena_hard (v0.1's answers, JSON lines)")
    name: str | None = setting(None, "what the judge calls the model (generator, model_id); without it, its folder's name")
    decoding: str | None = setting(None, f"published settings of a start: {', '.join(DECODING)}")
    temperature: float | None = setting(None, "of sampling, 0 is greedy; without it and decoding: 0")
    max_new_tokens: int | None = setting(None, "answers are cut there, and kept; without it and decoding: 2048")
    top_p: float = setting(1.0, "share of the probability that is sampled from")
    batch_size: int = setting(8, "prompts at a time; answers depend on it where temperature > 0")
    columns: str = setting("", "columns to rename, new=old: prompt=question")
    seed: int = setting(0, "of sampling")
    device: str = setting("auto", "cpu, cuda, or auto")


def generate(g: Generation) -> dict:
    """Answers as a judge reads them, see Generation; returns their number and how many were cut."""
    how, out, part, whole = decoding(g), Path(g.out), Path(f"{g.out}.part"), Path(f"{g.out}.new")
    if out.exists():
        raise UserError(f"out {out} is there already; choose another file, or delete it")
    rows = list(prompts_of(g.prompts, g.columns))
    folder = Path(g.model).resolve()  # an exported model is RUN/model: the run's name says more
    name = g.name or (folder.parent.name if folder.name == "model" else Path(g.model).name)
    there = f"; goes on from {part}" if part.exists() else ""
    on_policy._say(f"{name}: {len(rows)} prompts, {', '.join(f'{k} {v:g}' for k, v in how.items())}, seed {g.seed}{there}")
    more = dict(batch_size=g.batch_size, columns=g.columns, seed=g.seed, device=g.device)
    sample(Sampling(g.model, g.prompts, str(part), n=1, keep_unfinished=True, **how, **more), rows)
    sampled = {row["id"]: row for row in map(json.loads, part.read_text(encoding="utf-8").split("\n")[:-1])}
    answers = [sampled[row["id"]]["responses"][0] for _, row, _ in rows]
    cut = sum(sampled[row["id"]]["unfinished"] for _, row, _ in rows)
    if g.style == "alpaca_eval":
        text = json.dumps([alpaca_eval(*x, name) for x in zip(rows, answers)], ensure_ascii=False, indent=2, default=str) + "\n"
    else:
        tokenizer = load_tokenizer(g.model)
        lines = (json.dumps(arena_hard(*x, name, tokenizer), ensure_ascii=False, default=str) for x in zip(rows, answers))
        text = "".join(f"{line}\n" for line in lines)
    whole.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(whole, out)
    part.unlink()
    advice = ": raise --max_new_tokens" if cut > 0.1 * len(answers) else ""
    what_was_cut = f"{cut} of them cut at {how['max_tokens']} tokens{advice}"
    on_policy._say(f"{len(answers)} answers in {out}, {what_was_cut}, {answers.count('')} empty")
    return {"out": str(out), "answers": len(answers), "cut": cut}


def decoding(g: Generation) -> dict:
    """How to sample: as published, and over that what was asked for."""
    refuse_unless_known("style", g.style, STYLES)
    if g.decoding is not None:
        refuse_unless_known("decoding", g.decoding, DECODING)
    temperature, tokens = (0.0, 2048) if g.decoding is None else DECODING[g.decoding][g.style]
    temperature = temperature if g.temperature is None else g.temperature
    tokens = tokens if g.max_new_tokens is None else g.max_new_tokens
    on_policy._check_decoding(temperature, g.top_p, max_new_tokens=tokens, batch_size=g.batch_size)
    return dict(temperature=temperature, top_p=g.top_p, max_tokens=tokens)


def alpaca_eval(row: tuple[str, dict, list[dict]], answer: str, name: str) -> dict:
    """One output as AlpacaEval reads it; a conversation becomes an instruction of several paragraphs."""
    _, given, prompt = row
    instruction = "\n\n".join(m["content"] for m in prompt)
    return {"instruction": instruction, "output": answer, "generator": name} | {k: given[k] for k in ("dataset",) if k in given}


def arena_hard(row: tuple[str, dict, list[dict]], answer: str, name: str, tokenizer) -> dict:
    """One answer as Arena-Hard v0.1 reads it; token_len in tokens of the model's own tokenizer (its authors count GPT's)."""
    _, given, _ = row
    question = given.get("question_id", given["id"])
    turn = {"content": answer, "token_len": len(tokenizer(answer, add_special_tokens=False)["input_ids"])}
    unique = hashlib.sha256(json.dumps([name, question, answer]).encode()).hexdigest()[:22]
    choices = [{"index": 0, "turns": [turn]}]
    return {"question_id": question, "answer_id": unique, "model_id": name, "choices": choices, "tstamp": time.time()}


def main(argv: list[str] | None = None) -> dict:
    """The command line as a function. A user error ends with a message and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    return on_policy.command_line(lambda argv: generate(data.parse(Generation, argv, "tests/tools/answers.py", __doc__)), argv)


if __name__ == "__main__":
    main()
