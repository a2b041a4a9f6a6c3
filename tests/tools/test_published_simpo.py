"""Token ids of the released SimPO code, against renderings written by hand; and that a training is on them."""

import copy
import json
from pathlib import Path

import processes
import published_simpo
import pytest
from published_simpo import encode
from templates import family
from transformers import LlamaConfig, LlamaForCausalLM

import data
import train
from data import Reading, Row, answer

SMOL = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
L3_USER, L3_ASSISTANT = "<|begin_of_text|>" + HEAD.format("user"), HEAD.format("assistant")
ASKED = [{"role": "user", "content": "Ask me"}]
SYSTEM = [{"role": "system", "content": "Be kind"}, *ASKED]
PAIR = {"prompt": "Ask me", "chosen": "Good", "rejected": "Bad"}


@pytest.fixture(autouse=True)
def put_back(monkeypatch):
    """What the program replaces is as it was after each test."""
    for name in ("encode", "PROMPT_SHARE"):
        monkeypatch.setattr(data, name, getattr(data, name))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The family without a template, as load_tokenizer gives it."""
    folder = tmp_path_factory.mktemp("none")
    family("none").save_pretrained(folder)
    return data.load_tokenizer(str(folder))


def raw_ids(tokenizer, text):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def write(folder, name, rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# (family, messages, response) → prompt and response texts by hand: no generation prompt, the assistant's header scored, an
# empty system turn where the template speaks of "system", BOS in front and EOS at the end where they are missing
RENDERED = [
    ("llama3", ASKED, "Good day", f"{L3_USER}Ask me<|eot_id|>", f"{L3_ASSISTANT}Good day<|eot_id|><|end_of_text|>"),
    ("zephyr", ASKED, "Good day", "<s><|system|>\n</s>\n<|user|>\nAsk me</s>\n", "<|assistant|>\nGood day</s>\n</s>"),
    ("zephyr", SYSTEM, "Good day", "<s><|system|>\nBe kind</s>\n<|user|>\nAsk me</s>\n", "<|assistant|>\nGood day</s>\n</s>"),
    (
        "smollm2",
        ASKED,
        "Good day",
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nAsk me<|im_end|>\n",
        # the template writes its default system turn before a lone assistant turn, and its first token is taken for BOS
        SMOL.removeprefix("<|im_start|>") + "<|im_start|>assistant\nGood day<|im_end|>\n<|im_end|>",
    ),
    ("none", ASKED, "Good day", "<|endoftext|>User: Ask me\n\n", "Assistant: Good day<|endoftext|>\n\n<|endoftext|>"),
]


@pytest.mark.parametrize("name, prompt, response, prompt_text, response_text", RENDERED)
def test_token_by_token(plain, name, prompt, response, prompt_text, response_text):
    tokenizer = plain if name == "none" else family(name)

    def ids(text):
        if name == "zephyr" and text.startswith("<s>"):  # put in front of the ids: the text after it is the first word for ▁
            return [tokenizer.bos_token_id, *raw_ids(tokenizer, text.removeprefix("<s>"))]
        return raw_ids(tokenizer, text)

    example, cuts = encode(Row(prompt, [answer(response), answer("Yes")]), tokenizer, 1000, 900)
    assert example.prompt == ids(prompt_text) and cuts == []
    assert example.prompt + example.responses[0] == ids(prompt_text + response_text)


def test_truncation_by_hand():
    tokenizer = family("llama3")
    both = Row(ASKED, [answer("Good day to you"), answer("Yes")])
    prompt, (chosen, rejected) = encode(both, tokenizer, 1000, 900)[0][:2]
    p, n = len(prompt), len(chosen)
    assert n > len(rejected) > 6 and p > 4
    assert encode(both, tokenizer, p + n, 3)[0][:2] == (prompt, [chosen, rejected])  # it just fits
    # too long by one: the prompt is cut to its last p − 1 tokens, which suffices
    found, cuts = encode(both, tokenizer, p + n - 1, p - 1)
    assert found[:2] == (prompt[1:], [chosen, rejected]) and cuts == ["prompt cut"]
    # cut to 3, still too long by one: both responses are cut to max_length − 3
    found, cuts = encode(both, tokenizer, 3 + n - 1, 3)
    assert found[:2] == (prompt[-3:], [chosen[: n - 1], rejected]) and cuts == ["prompt cut", "response cut"]
    # a prompt shorter than its limit stays, and the responses get max_length − limit all the same
    found, cuts = encode(both, tokenizer, p + 7, p + 4)
    assert found[:2] == (prompt, [chosen[:3], rejected[:3]]) and cuts == ["response cut"]


# the templates that the released Mistral and Gemma configurations bring along, as they render a prompt and a lone answer
JOINED = (  # a system turn becomes the beginning of the first user turn
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = m['content'] %}"
    "{% else %}{% set content = (ns.system + '\n\n' + m['content'] if ns.system else m['content']) | trim %}"
)
RELEASED = {
    "mistral": JOINED + "{% if m['role'] == 'user' %}[INST] {{ content }} [/INST]"
    "{% else %}{{ ' ' + content + ' ' + eos_token }}{% endif %}{% set ns.system = '' %}{% endif %}{% endfor %}",
    "gemma2": "{{ bos_token }}" + JOINED + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' }}"
    "{{ content + '<end_of_turn>\n' }}{% set ns.system = '' %}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize(
    "name, prompt, prompt_text, response_text",
    [
        ("mistral", ASKED, "<s>[INST] Ask me [/INST]", " Good day </s>"),
        ("mistral", SYSTEM, "<s>[INST] Be kind\n\nAsk me [/INST]", " Good day </s>"),
        ("gemma2", ASKED, "<bos><start_of_turn>user\nAsk me<end_of_turn>\n",
         "<start_of_turn>model\nGood day<end_of_turn>\n<eos>"),
    ],
)  # fmt: skip
def test_with_the_released_templates(name, prompt, prompt_text, response_text):
    tokenizer = copy.deepcopy(family(name))
    tokenizer.chat_template = RELEASED[name]
    example, _ = encode(Row(prompt, [answer("Good day"), answer("Yes")]), tokenizer, 1000, 900)
    bos = [tokenizer.bos_token_id]  # put in front of the ids, or written by the template: one either way

    def ids(text):
        return bos + raw_ids(tokenizer, text.removeprefix(tokenizer.bos_token))

    assert example.prompt == ids(prompt_text)
    assert example.prompt + example.responses[0] == ids(prompt_text + response_text)


def test_special_tokens_in_texts_are_real_ones():
    example, _ = encode(Row(ASKED, [answer("Good<|eot_id|>")]), family("llama3"), 1000, 900)
    assert example.responses[0].count(family("llama3").convert_tokens_to_ids("<|eot_id|>")) == 2


def test_a_dataset_keeps_1800_of_2048_prompt_tokens(tmp_path, monkeypatch):
    """Through data.load, as the program's main sets it up; in this process, and by all cores with a cache."""
    monkeypatch.setattr(train, "main", lambda argv: argv)
    cache = str(tmp_path / "cache")
    tokenizer = family("llama3")
    path = write(tmp_path, "a.jsonl", [{"prompt": "x " * 3000, "chosen": "y " * 500, "rejected": "Bad"}] * 3)
    ours = [list(data.load(path, tokenizer, Reading(cache=cache))[0])]
    monkeypatch.setattr(data, "PARALLEL_FROM", 2)
    ours.append(list(data.load(path, tokenizer, Reading(cache=cache))[0]))
    assert ours[0] == ours[1] and len(ours[0][0].prompt) == 1792  # seven eighths
    assert published_simpo.main(["settings.yaml", "--lr", "1"]) == ["settings.yaml", "--lr", "1"]
    whole = raw_ids(tokenizer, f"{L3_USER}{('x ' * 3000).strip()}<|eot_id|>")
    answer = raw_ids(tokenizer, L3_ASSISTANT + ("y " * 500).strip())
    assert len(whole) > 1800 and len(answer) > 248
    for rows in (2, 20_000):
        monkeypatch.setattr(data, "PARALLEL_FROM", rows)
        examples, report = data.load(path, tokenizer, Reading(cache=cache))
        assert examples[0].prompt == whole[-1800:] and examples[0].responses[0] == answer[:248]
        assert report.cut == {"prompt cut": 3, "response cut": 3}
    assert len(data.load(path, tokenizer, Reading(max_prompt_length=700, cache=cache))[0][0].prompt) == 700


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = family("llama3")
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer))
    LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=0, eos_token_id=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_run_by_a_settings_file(model, tmp_path, monkeypatch):
    """As train.py, with its options; what is trained on are the released code's ids."""
    pairs = write(tmp_path, "a.jsonl", [{**PAIR, "prompt": f"Ask {i}"} for i in range(8)])
    settings = write(tmp_path, "s.json", [])
    Path(settings).write_text(json.dumps({"model": str(model), "dataset": pairs, "eval_size": 0, "max_steps": 1, "samples": 0}))
    trained = []
    of_program = train.prepare

    def prepare(s):
        run = of_program(s)
        trained.extend(run.train)
        return run

    monkeypatch.setattr(train, "prepare", prepare)
    summary = published_simpo.main([settings, "--out", str(tmp_path / "run"), "--batch-size", "4", "--dtype", "fp32"])
    assert (tmp_path / "run" / "model" / "model.safetensors").exists() and summary
    tokenizer = family("llama3")
    expected = [raw_ids(tokenizer, f"{L3_USER}Ask {i}<|eot_id|>") for i in range(8)]
    assert [e.prompt for e in trained] == expected
    assert trained[0].responses[0] == raw_ids(tokenizer, L3_ASSISTANT + "Good<|eot_id|><|end_of_text|>")


def test_show_on_the_command_line(model, tmp_path):
    command = [published_simpo.__file__, "show", str(model), write(tmp_path, "a.jsonl", [PAIR]), "--ids"]
    done = processes.run(command, tmp_path)
    assert done.code == 0 and done.out.count("<|start_header_id|>") == 3 and done.err == ""
