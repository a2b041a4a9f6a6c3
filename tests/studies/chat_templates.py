"""What is scored under the chat templates of some twenty families (tests/templates.py), and what is refused with which words.

    python tests/studies/chat_templates.py                     # for every family and kind of row: end of prompt, scored text
    python tests/studies/chat_templates.py --only qwen3 glm4
    python tests/studies/chat_templates.py --table             # the tables of tests/studies/README.md, as markdown

▏ is where the prompt ends and scoring begins; the last token of what is scored is where generation stops. ⏎ is a line break.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from templates import FAMILIES, family  # noqa: E402

import data  # noqa: E402

DATE = "2026-01-31"
LONG = 10_000


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds two numbers",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
RESULT = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "5"}
ASKED = [user("What is two plus three?")]
ANSWERS = [assistant("It is five."), assistant("Sky is blue.")]
THOUGHT = "Two and three make five."
THINKING = f"{THOUGHT}\n</think>\n\n"
EARLIER = [user("Who are you?"), assistant("A helper.", reasoning_content="They ask me."), *ASKED]

KINDS = {  # kind of row: a pair as `data` reads it
    "answer": {"prompt": ASKED, "answers": ANSWERS},
    "system message": {"prompt": [{"role": "system", "content": "Be kind."}, *ASKED], "answers": ANSWERS},
    "developer message": {"prompt": [{"role": "developer", "content": "Be kind."}, *ASKED], "answers": ANSWERS},
    "earlier reasoning": {"prompt": EARLIER, "answers": ANSWERS},
    "no thinking": {"prompt": ASKED, "answers": ANSWERS, "chat_template_kwargs": {"enable_thinking": False}},
    "reasoning": {"prompt": ASKED, "answers": [assistant("It is five.", reasoning_content=THOUGHT), ANSWERS[1]]},
    "reasoning in the text": {"prompt": ASKED, "answers": [assistant(f"<think>\n{THINKING}It is five."), ANSWERS[1]]},
    "tool call": {"prompt": ASKED, "answers": [assistant("", tool_calls=[CALL]), ANSWERS[1]], "tools": [TOOL]},
    "tool call and text": {
        "prompt": ASKED, "answers": [assistant("I add them.", tool_calls=[CALL]), assistant("I add them.")], "tools": [TOOL],
    },
    "after a tool": {"prompt": [*ASKED, assistant("", tool_calls=[CALL]), RESULT], "answers": ANSWERS, "tools": [TOOL]},
}  # fmt: skip


class Seen(NamedTuple):
    """A row under a template, as texts: where its prompt ends and what is scored; or why it is refused."""

    prompt: str = ""
    scored: str = ""
    notes: tuple[str, ...] = ()  # what the report would count
    refused: str = ""


def tokenizer_of(name: str):
    """A family's tokenizer as `data.load_tokenizer` gives it."""
    tokenizer = family(name)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = data.PLAIN_TEMPLATE
    return tokenizer


def row_of(kind: str) -> data.Row:
    columns = dict(KINDS[kind])
    chosen, rejected = columns.pop("answers")
    return data.from_pair(columns | {"chosen": [chosen], "rejected": [rejected]})


def seen(name: str, kind: str) -> Seen:
    """What is scored of the chosen response; a row's switch that is nowhere in its template changes nothing."""
    tokenizer = tokenizer_of(name)
    if kind == "no thinking" and "enable_thinking" not in str(tokenizer.chat_template):
        return Seen(refused="not refused: the template knows no enable_thinking")
    try:
        example, notes = data.encode(row_of(kind), tokenizer, LONG, LONG - 1, template={"strftime_now": DATE})
    except data.UserError as error:
        return Seen(refused=str(error))
    prompt = tokenizer.decode(example.prompt)
    whole = tokenizer.decode(example.prompt + example.responses[0])  # a response on its own would lose a leading space
    return Seen(prompt, whole.removeprefix(prompt), tuple(notes))


def shown(text: str) -> str:
    return text.replace("\n", "⏎")


def listing(names: list[str]) -> str:
    lines = []
    for name in names:
        tokenizer = tokenizer_of(name)
        stop = data.terminator(tokenizer, {"strftime_now": DATE})
        lines.append(f"{name}: stops at {tokenizer.convert_ids_to_tokens(stop) if stop is not None else 'nothing'}")
        for kind in KINDS:
            found = seen(name, kind)
            what = f"refused: {found.refused}" if found.refused else f"… {shown(found.prompt[-48:])}▏{shown(found.scored)}"
            lines += [f"  {kind:<22} {what}", *(f"{'':<25}({note})" for note in found.notes)]
    return "\n".join(lines)


def code(text: str) -> str:
    return f"`{shown(text)}`".replace("|", "\\|")  # a bar would end the cell


def tables() -> str:
    """Two tables and a list: an answer under every family; other kinds of rows, with "=" where what stands around the text is
    as for an answer, and a number where the row is refused; the reasons by number."""
    found = {name: {kind: seen(name, kind) for kind in KINDS} for name in FAMILIES}
    reasons: list[str] = []

    def cell(of: dict[str, Seen], kind: str) -> str:
        row, text = of[kind], KINDS[kind]["answers"][0]["content"]
        if row.refused:
            if row.refused not in reasons:
                reasons.append(row.refused)
            return str(reasons.index(row.refused) + 1)
        answer = of["answer"].scored.replace("It is five.", text) if text else ""
        scored = "=" if row.scored == answer else code(row.scored.replace('{"a": 2, "b": 3}', "{…}"))
        return scored + " (cut)" * ("earlier reasoning cut by the template" in row.notes)

    lines = ["| family | the prompt ends | scored |", "|---|---|---|"]
    for name, of in found.items():
        lines.append(f"| {name} | {code('…' + of['answer'].prompt[-34:])} | {code(of['answer'].scored)} |")
    more = [kind for kind in KINDS if kind != "answer"]
    lines += ["", f"| families | {' | '.join(more)} |", "|---" * (len(more) + 1) + "|"]
    alike: dict[str, list[str]] = {}
    for name, of in found.items():
        alike.setdefault(" | ".join(cell(of, kind) for kind in more), []).append(name)
    lines += [f"| {', '.join(names)} | {cells} |" for cells, names in alike.items()]
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(FAMILIES), choices=FAMILIES, metavar="FAMILY")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(argv)
    print(tables() if args.table else listing(args.only))


if __name__ == "__main__":
    main()
