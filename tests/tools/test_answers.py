"""Answers for outside judges: against transformers alone, in the judges' forms, and again after a kill."""

import json
from pathlib import Path

import answers
import on_policy
import pytest
import torch
import toy
from transformers import LlamaConfig, LlamaForCausalLM

import data


def user(text):
    return {"role": "user", "content": text}


QUESTIONS = [f"name {n} {kind}" for n in ("two", "three") for kind in ("fruits", "tools", "metals")]
QUESTIONS += QUESTIONS[:1]  # six different prompts of the world, and the first of them again


@pytest.fixture(scope="module")
def speaker(tmp_path_factory) -> Path:
    """A model with weights so large that its greedy answers differ from prompt to prompt, and that ends some of them."""
    folder = tmp_path_factory.mktemp("speaker") / "run-7" / "model"
    tokenizer = toy.word_tokenizer()
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=True)
    config = LlamaConfig(vocab_size=len(tokenizer), **small, eos_token_id=3, pad_token_id=3, bos_token_id=None)
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def spoken(folder: Path, question: str, tokens: int) -> tuple[str, int, bool]:
    """(text, its tokens, whether it ended) by transformers alone, one prompt at a time."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), data.load_tokenizer(str(folder))
    text = tokenizer.apply_chat_template([user(question)], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=3, eos_token_id=3)[0, ids.shape[1] :]
    text = tokenizer.decode(out, skip_special_tokens=True).strip()
    return text, len(tokenizer(text, add_special_tokens=False)["input_ids"]), 3 in out.tolist()


def answers_of(model: Path, prompts: Path, out: Path, **more) -> dict:
    values = dict(model=model, prompts=prompts, out=out, device="cpu", max_new_tokens=6, batch_size=2) | more
    return answers.main([*(x for k, v in values.items() for x in (f"--{k.replace('_', '-')}", str(v)))])


def test_alpaca_eval_outputs(speaker, tmp_path, capsys):
    """Greedy answers, cut ones too, in the order of the prompts, under AlpacaEval's keys; a dataset is passed on."""
    rows = [{"instruction": q, "dataset": f"set {i}", "output": "the reference's"} for i, q in enumerate(QUESTIONS)]
    del rows[1]["dataset"]
    rows[2] = {"prompt": [{"role": "user", "content": QUESTIONS[2]}]}
    (tmp_path / "p.json").write_text(json.dumps(rows))
    done = answers_of(speaker, tmp_path / "p.json", tmp_path / "new" / "outputs.json")
    found, hand = json.loads((tmp_path / "new" / "outputs.json").read_text()), [spoken(speaker, q, 6) for q in QUESTIONS]
    keys = ["instruction", "output", "generator"]
    assert [list(x) for x in found[:3]] == [[*keys, "dataset"], keys, keys]
    assert [x["instruction"] for x in found] == QUESTIONS and [x["output"] for x in found] == [text for text, _, _ in hand]
    assert len({x["output"] for x in found}) > 3 and found[0] == {**found[6], "dataset": "set 0"}
    assert {x["generator"] for x in found} == {"run-7"} and found[6]["dataset"] == "set 6"
    assert done["answers"] == 7 and done["cut"] == sum(not ended for _, _, ended in hand) > 0
    assert f"{done['cut']} of them cut at 6 tokens" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["outputs.json"]


def test_arena_hard_answers(speaker, tmp_path):
    rows = [{"question_id": f"id{i}", "category": "hard", "turns": [{"content": q}]} for i, q in enumerate(QUESTIONS)]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers_of(speaker, tmp_path / "question.jsonl", tmp_path / "mine.jsonl", style="arena_hard", name="mine")
    found = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert [x["question_id"] for x in found] == [f"id{i}" for i in range(7)]
    for answer, question in zip(found, QUESTIONS):
        text, tokens, _ = spoken(speaker, question, 6)
        assert list(answer) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert answer["choices"] == [{"index": 0, "turns": [{"content": text, "token_len": tokens}]}]
        assert answer["model_id"] == "mine" and isinstance(answer["tstamp"], float)
    assert len({x["answer_id"] for x in found}) == 7


def test_a_killed_generation_goes_on(speaker, tmp_path, monkeypatch, capsys):
    """Sampled; killed in the third batch. Other settings are not mixed in."""
    (tmp_path / "p.json").write_text(json.dumps([{"instruction": q} for q in QUESTIONS]))
    how = dict(temperature=1.0, seed=4)
    answers_of(speaker, tmp_path / "p.json", tmp_path / "whole.json", **how)
    real, calls = on_policy.answer, []

    def killed(*a, **k):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*a, **k)

    monkeypatch.setattr(on_policy, "answer", killed)
    with pytest.raises(SystemExit) as stop:
        answers_of(speaker, tmp_path / "p.json", tmp_path / "cut.json", **how)
    assert stop.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    assert len((tmp_path / "cut.json.part").read_text().splitlines()) == 4 and not (tmp_path / "cut.json").exists()
    with pytest.raises(SystemExit):
        answers_of(speaker, tmp_path / "p.json", tmp_path / "cut.json", **how | dict(temperature=0.5))
    assert "was begun with temperature 1.0, now 0.5" in capsys.readouterr().err
    answers_of(speaker, tmp_path / "p.json", tmp_path / "cut.json", **how)
    assert len(calls) == 3 + 1  # the last of three batches: six different prompts
    assert (tmp_path / "cut.json").read_text() == (tmp_path / "whole.json").read_text()
    assert len(json.loads((tmp_path / "whole.json").read_text())) == 7


def test_the_template_of_a_run_and_its_terminator(speaker, tmp_path, capsys):
    """Arguments of the chat template change what is asked, and so the answers; they end where the template ends a response."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(speaker), toy.word_tokenizer()
    tokenizer.chat_template = "{% if style is defined %}{{ style }} {% endif %}" + tokenizer.chat_template
    model.generation_config.eos_token_id = 1
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "p.json").write_text(json.dumps([{"instruction": q} for q in QUESTIONS[:6]]))
    texts = {}
    for kwargs in ("", '{"style": "three"}'):
        out = tmp_path / f"o{len(kwargs)}.json"
        done = answers_of(tmp_path / "m", tmp_path / "p.json", out, template_kwargs=kwargs, max_new_tokens=40)
        texts[kwargs] = [x["output"] for x in json.loads(out.read_text())]
        assert "the chat template ends a response with <end> (3)" in capsys.readouterr().err
    hand = [spoken(speaker, q, 40) for q in QUESTIONS[:6]]
    assert texts[""] == [text for text, _, _ in hand] and done["cut"] < 6
    assert any(ended for *_, ended in hand) and texts[""] != texts['{"style": "three"}']


def test_published_decoding():
    """What the released configurations say; what is asked for goes over it, and without either it is greedy."""

    def of(**more):
        return tuple(answers.decoding(answers.Generation("m", "p", "o", **more)).values())

    assert of(decoding="llama-3-8b-instruct") == (0.9, 1.0, 4096)
    assert of(decoding="mistral-7b-instruct") == (0.5, 1.0, 2048)
    assert {of(decoding=start, style="arena_hard") for start in answers.DECODING} == {(0.0, 1.0, 4096)}
    assert of(decoding="mistral-7b-base", temperature=0.0, max_new_tokens=9) == (0.0, 1.0, 9)
    assert of() == (0.0, 1.0, 2048)


@pytest.mark.parametrize(
    "more, said",
    [
        (dict(style="mt_bench"), ["style is 'mt_bench'", "alpaca_eval, arena_hard"]),
        (dict(decoding="gemma"), ["decoding is 'gemma'", "mistral-7b-instruct"]),
        (dict(temperature=-1), ["temperature is at least 0"]),
        (dict(temperature=1e-300), ["or 0 (greedy)"]),
        (dict(temperature="nan"), ["temperature", "nan", "finite"]),
        (dict(temperature="hot"), ["invalid float value: 'hot'"]),
        (dict(max_new_tokens=0), ["max_new_tokens"]),
        (dict(device="abacus"), ["device is 'abacus'", "auto, cpu"]),
        (dict(prompts="nowhere.json"), ["nowhere.json", "no such file"]),
        (dict(prompts="EMPTY"), ["no row with a usable prompt"]),
        (dict(model="/nowhere/model"), ["/nowhere/model"]),
        (dict(out="EMPTY"), ["there already"]),
        (dict(out="/dev/null/outputs.json"), ["cannot be written"]),
        (dict(temprature=1), ["unknown setting --temprature 1", "--help"]),
    ],
)
def test_answers_say_what_is_wrong(speaker, tmp_path, capsys, more, said):
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "p.json").write_text('[{"instruction": "list two tools"}]')
    more = {k: tmp_path / "empty.json" if v == "EMPTY" else v for k, v in more.items()}
    with pytest.raises(SystemExit) as stop:
        answers_of(**dict(model=speaker, prompts=tmp_path / "p.json", out=tmp_path / "o.json") | more)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error and all(part in error for part in said)
    assert not (tmp_path / "o.json").exists()


def test_a_prompt_that_cannot_be_asked_is_an_error(speaker, tmp_path, capsys, monkeypatch):
    """A judge needs an answer to every prompt."""
    real = on_policy.prompt_ids

    def prompt_ids(tokenizer, asked, template):
        if asked.prompt[0]["content"] == QUESTIONS[1]:
            raise data.UserError("the chat template refuses this row")
        return real(tokenizer, asked, template)

    monkeypatch.setattr(on_policy, "prompt_ids", prompt_ids)
    (tmp_path / "p.json").write_text(json.dumps([{"instruction": q} for q in QUESTIONS]))
    with pytest.raises(SystemExit) as stop:
        answers_of(speaker, tmp_path / "p.json", tmp_path / "o.json")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "p.json row 2: its prompt cannot be asked" in said and "refuses this row" in said
    assert not (tmp_path / "o.json").exists()


def test_answers_help(capsys):
    with pytest.raises(SystemExit) as stop:
        answers.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "official judge" in said and "--decoding" in said and "llama-3-8b-instruct" in said
