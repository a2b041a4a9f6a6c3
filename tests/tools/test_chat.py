"""A chat against transformers' own generate: what is streamed, what a later turn is told, and how it ends."""

import io
import sys

import chat
import pytest
import torch
import toy
from transformers import AutoModelForCausalLM

import data

MODEL = toy.FOLDER / "model"
FIRST, SECOND = "name two metals", "list three fruits and two tools"
ENDS = "an empty line, Ctrl-D or Ctrl-C ends the conversation"


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def give(monkeypatch, text: str, kind: type = io.TextIOWrapper) -> None:
    """Let this be what comes from a pipe, or what is typed, up to Ctrl-D."""
    monkeypatch.setattr(sys, "stdin", kind(io.BytesIO(text.encode())))


def greedy(*messages: dict) -> str:
    """The greedy answer to a conversation, by transformers alone."""
    tokenizer = data.load_tokenizer(str(MODEL))
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = AutoModelForCausalLM.from_pretrained(MODEL).generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=3)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def test_a_piped_prompt_gets_the_greedy_answer_and_nothing_else(monkeypatch, capsys):
    give(monkeypatch, f"{FIRST}\n")
    chat.main([str(MODEL)])
    said = capsys.readouterr()
    assert said.out == greedy(user(FIRST)) + "\n"
    assert said.err == f"{MODEL} on cpu, greedy; {ENDS}\n"


@pytest.mark.parametrize("end", ["", "\nnever read\n"], ids=["Ctrl-D", "an empty line"])
def test_a_conversation_is_told_whole_each_time(monkeypatch, capsys, end):
    """The second answer is greedy after the first turn and its answer, and is another one than without them."""
    one = greedy(user(FIRST))
    two = greedy(user(FIRST), data.answer(one), user(SECOND))
    assert two != greedy(user(SECOND))
    give(monkeypatch, f"{FIRST}\n{SECOND}\n{end}", Terminal)
    chat.main([str(MODEL)])
    assert capsys.readouterr().out.rstrip() == f"> {one}\n> {two}\n>"


def test_sampled_answers_differ_and_temperature_0_is_greedy(monkeypatch, capsys):
    torch.manual_seed(0)
    answers = {}
    for temperature in ("2", "0"):
        give(monkeypatch, SECOND)
        chat.main([str(MODEL), "--temperature", temperature])
        said = capsys.readouterr()
        answers[temperature] = said.out.rstrip()
        assert ("temperature 2" in said.err) == (temperature == "2")
    assert answers["0"] == greedy(user(SECOND)) != answers["2"]


def test_what_a_model_says_does_not_steer_the_terminal(capsys):
    chat.Streamer(data.load_tokenizer(str(MODEL))).on_finalized_text("a\x1b[2Jb\nc")
    assert capsys.readouterr().out == "a\\x1b[2Jb\nc"


@pytest.mark.parametrize("options, message", [
    (["{}/nothing"], "no such file or folder"),
    (["{}"], "no usable tokenizer there"),
    ([str(MODEL), "--temperature", "-1"], "temperature is -1; it is at least 0.001, or 0 (greedy)"),
    ([str(MODEL)], "the conversation has 203 tokens and the model's context 128; begin a new one"),
])  # fmt: skip
def test_user_errors_are_one_message_with_code_2(monkeypatch, tmp_path, capsys, options, message):
    """203 tokens: <user>, 201 words and <assistant>; the template's blanks are none."""
    give(monkeypatch, "pear " * 201)
    with pytest.raises(SystemExit) as end:
        chat.main([option.format(tmp_path) for option in options])
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == ""
    assert message in said.err.splitlines()[-1]
