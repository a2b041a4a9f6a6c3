"""What is scored under every family's template, against texts written by hand from the families' own documentation.

A prompt's text is what transformers renders with the generation prompt, without data.py; its ids, and those of prompt and
response together, come from the raw tokenizer.
"""

import datetime
import re
from pathlib import Path

import chat_templates
import pytest
from chat_templates import CALL, DATE, KINDS, LONG, THINKING, THOUGHT, TOOL, row_of, tokenizer_of
from templates import FAMILIES, TERMINATOR

import data

AROUND = {  # what stands before and behind an answer's text, where it is not nothing and the terminator
    "llama2": (" ", " </s>"),
    "mistral-v3": (" ", "</s>"),
    "qwen3": ("<think>\n\n</think>\n\n", "<|im_end|>"),
    "qwen3.5": ("\n</think>\n\n", "<|im_end|>"),
    "glm4": ("\n", "<|user|>"),
    "gpt-oss": ("<|channel|>final<|message|>", "<|return|>"),
    "command-r7b": ("<|START_RESPONSE|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "none": (" ", "<|endoftext|>"),
}
ARGUMENTS = '{"a": 2, "b": 3}'
HERMES = f'<tool_call>\n{{"name": "add", "arguments": {ARGUMENTS}}}\n</tool_call><|im_end|>'
COHERE = f'<|START_ACTION|>[{{"name": "add", "arguments": {ARGUMENTS}}}]<|END_ACTION|><|END_OF_TURN_TOKEN|>'
GPT_OSS = f" to=functions.add<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>"
ANALYSIS = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
R7B_THOUGHT = "<|START_THINKING|>{}<|END_THINKING|>"
SCORED = {  # kind of row → family → what is scored of the chosen response, where it is not the answer's text and AROUND
    "no thinking": {"qwen3": "It is five.<|im_end|>", "qwen3.5": "It is five.<|im_end|>", "smollm3": "It is five.<|im_end|>"},
    "reasoning": {
        "qwen3": f"<think>\n{THINKING}It is five.<|im_end|>",
        "qwen3.5": f"{THINKING}It is five.<|im_end|>",
        "gpt-oss": ANALYSIS.format(THOUGHT) + "<|channel|>final<|message|>It is five.<|return|>",
    },
    "reasoning in the text": {
        "qwen3": f"<think>\n{THINKING}It is five.<|im_end|>",
        "qwen3.5": f"{THINKING}It is five.<|im_end|>",
    },
    "tool call": {
        "llama3.2": f'{{"name": "add", "parameters": {ARGUMENTS}}}<|eot_id|>',
        "mistral-v3": f'[TOOL_CALLS] [{{"name": "add", "arguments": {ARGUMENTS}, "id": "call00001"}}]</s>',
        "qwen2.5": HERMES,
        "qwen3": f"<think>\n\n</think>\n\n{HERMES}",
        "qwen3.5": f"\n</think>\n\n{HERMES}",
        "glm4": f"add\n{ARGUMENTS}<|observation|>",
        "gpt-oss": GPT_OSS,
        "command-r7b": R7B_THOUGHT.format("") + COHERE,
        "hermes": HERMES,
    },
    "tool call and text": {
        "qwen2.5": f"I add them.\n{HERMES}",
        "qwen3": f"<think>\n\n</think>\n\nI add them.\n{HERMES}",
        "qwen3.5": f"\n</think>\n\nI add them.\n{HERMES}",
        "glm4": f"\nI add them.<|assistant|>add\n{ARGUMENTS}<|observation|>",
        "gpt-oss": ANALYSIS.format("I add them.") + GPT_OSS,
        "command-r7b": R7B_THOUGHT.format("I add them.") + COHERE,
        "hermes": f"I add them.\n{HERMES}",
    },
}
REFUSES = "the chat template refuses this row "
DROPPED = "the chat template drops "
LOST = DROPPED + "or changes "
CALL_LOST = DROPPED + "(tools of the row|or changes tool_calls of the response)"
RESULT_LOST = DROPPED + "(tools of the row|or changes (tool_calls of prompt message 2|the text of prompt message 3 .tool.))"
DEVELOPER_LOST = LOST + "the text of prompt message 1 .developer."
CALLS_LOST = {*SCORED["tool call"]}.symmetric_difference(FAMILIES)  # nothing is written for a call
REFUSED = {  # kind of row → pattern of a family's name → words of the reason
    "system message": {"mistral": REFUSES + r"\(Conversation roles", "gemma2": REFUSES + r"\(System role not supported",
                       "mistral-v3": "renders the prompt differently once a response follows"},
    "developer message": {
        "llama2|gemma2|gemma3|mistral": REFUSES + r"\(Conversation roles", "mistral-v3": REFUSES + r"\(Only user and assistant",
        "phi3|phi4|deepseek-v3.1|r1-distill|smollm3|olmo2|zephyr|command-r.*": DEVELOPER_LOST,
    },
    "no thinking": {"(?!qwen3|smollm3).*": "knows no enable_thinking"},
    "reasoning": {"(?!qwen3|gpt-oss).*": LOST + "reasoning_content of the response"},
    "reasoning in the text": {"deepseek-v3.1|r1-distill": LOST + "the text of the response; give what is before </think> as"},
    "tool call": {"|".join(CALLS_LOST): CALL_LOST},
    "tool call and text": {"|".join(CALLS_LOST): CALL_LOST, "llama3.2|mistral-v3": LOST + "the text of the response"},
    "after a tool": {
        "llama2|mistral|gemma2|gemma3": REFUSES + r"\(Conversation roles",
        "(?!llama2|mistral|gemma).*": RESULT_LOST,
    },
}  # fmt: skip


def expected(name: str, kind: str) -> tuple[str, str]:
    """(what is scored, "") or ("", a pattern of the reason), by hand."""
    if name in SCORED.get(kind, {}):
        return SCORED[kind][name], ""
    shows_calls = kind != "after a tool" or name not in SCORED["tool call"]
    for families, words in REFUSED.get(kind, {}).items():
        if shows_calls and re.fullmatch(families, name):
            return "", words
    before, behind = AROUND.get(name, ("", TERMINATOR[name]))
    return before + KINDS[kind]["answers"][0]["content"] + behind, ""


class Day(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromisoformat(DATE)


@pytest.fixture(autouse=True)
def on_that_day(monkeypatch):
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Day)


def asked_by_the_template(tokenizer, name: str, kind: str) -> str:
    """The prompt as the template writes it with the generation prompt."""
    messages = KINDS[kind]["prompt"]
    if name == "parts":
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    more = dict(KINDS[kind].get("chat_template_kwargs", {}), tools=KINDS[kind].get("tools"))
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_scored_is_what_generation_sees_and_produces(name, kind):
    tokenizer = tokenizer_of(name)
    scored, reason = expected(name, kind)
    found = chat_templates.seen(name, kind)
    assert bool(found.refused) == bool(reason) and re.search(reason, found.refused), found
    if reason:
        return
    example, notes = data.encode(row_of(kind), tokenizer, LONG, LONG - 1, template={"strftime_now": DATE})
    asked = asked_by_the_template(tokenizer, name, kind)
    raw = tokenizer.backend_tokenizer.encode
    ids = example.prompt + example.responses[0]
    assert ids == raw(asked + scored, add_special_tokens=False).ids
    # the prompt is what generation is given, up to a last token that the tokenizer merges with what follows
    given = raw(asked, add_special_tokens=False).ids
    assert example.prompt in (given, given[:-1])
    assert tokenizer.decode(ids).startswith(tokenizer.decode(given))
    # the text stands whole and once, the terminator once and last
    text = KINDS[kind]["answers"][0]["content"]
    assert not text or tokenizer.decode(example.responses[0]).count(text.removeprefix("<think>\n")) == 1
    assert example.responses[0][-1] in {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for response in example.responses[1:] if "tool call" in kind else example.responses:
        assert response[-1] == tokenizer.convert_tokens_to_ids(TERMINATOR[name])
        assert response.count(response[-1]) == 1
    assert [note for note in notes if "reasoning" in note] == ["earlier reasoning cut by the template"] * (
        kind == "earlier reasoning"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_stops_at_the_terminator(name):
    tokenizer = tokenizer_of(name)
    assert data.terminator(tokenizer, {"strftime_now": DATE}) == tokenizer.convert_tokens_to_ids(TERMINATOR[name])


def test_the_listing_names_every_row(capsys):
    chat_templates.main(["--only", "glm4", "r1-distill"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "glm4: stops at <|user|>"
    assert "  answer                 … op><|user|>⏎What is two plus three?<|assistant|>▏⏎It is five.<|user|>" in lines
    assert sum(line.startswith("  reasoning in the text  refused: the chat template") for line in lines) == 1
    assert all(sum(line.startswith(f"  {kind:<22}") for line in lines) == 2 for kind in KINDS)


def test_the_tables_of_the_readme_are_what_is_printed():
    text = (Path(chat_templates.__file__).parent / "README.md").read_text()
    assert chat_templates.tables() in text


def test_the_call_is_one_that_every_template_may_show():
    assert CALL["function"]["name"] == TOOL["function"]["name"] and len(CALL["id"]) == 9
