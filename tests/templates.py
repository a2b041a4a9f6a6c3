"""Tokenizers of the usual families in miniature: trained here on a few sentences, with each family's own special tokens and
a short but faithful copy of its chat template. No download."""

import functools
import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Hello there! The answer is four, and the question was: what is two plus two?",
    "user and assistant, system and model: You are a helpful assistant. Be brief.",
    "User: Assistant: System: Sky is blue. Grass is green. Water is wet; fire is hot.",
    "[INST] ask me [/INST] and I answer. <<SYS>> be kind <</SYS>> Good day to you, and good night.",
] * 4

ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}"
    "{% for m in turns %}" + ALTERNATE + "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}{% else %}"
    "{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}"
    "{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    + ALTERNATE
    + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    + ALTERNATE
    + "{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def chatml(default_system: str) -> str:
    return (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + default_system + "<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)

# family: (sentencepiece-like?, special tokens, bos, eos, pad, template)
FAMILIES = {
    "llama2": (True, ["<unk>", "<s>", "</s>"], "<s>", "</s>", None, LLAMA2),
    "llama3": (
        False,
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>", "<|end_of_text|>", None, LLAMA3,
    ),
    "mistral": (True, ["<unk>", "<s>", "</s>"], "<s>", "</s>", None, MISTRAL),
    "gemma2": (
        True, ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>", "<pad>", GEMMA2,
    ),
    "qwen2.5": (
        False, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", "<|endoftext|>",
        chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    ),
    "smollm2": (
        False, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_start|>", "<|im_end|>", "<|im_end|>",
        chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    ),
    "zephyr": (True, ["<unk>", "<s>", "</s>"], "<s>", "</s>", "</s>", ZEPHYR),
    "none": (False, ["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>", None, None),
}  # fmt: skip


def byte_level(special: list[str], sentences=SENTENCES, size: int = 420) -> Tokenizer:
    """GPT-2 style: bytes, words split off with their leading space."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        sentences, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return inner


def metaspace(special: list[str], sentences=SENTENCES, size: int = 520) -> Tokenizer:
    """sentencepiece style: spaces are ▁, one is put before the first word, unknown characters fall back to bytes."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    as_bytes = [f"<0x{b:02X}>" for b in range(256)]
    inner.train_from_iterator(
        sentences, trainers.BpeTrainer(vocab_size=size, special_tokens=special + as_bytes, show_progress=False)
    )
    state = json.loads(inner.to_str())  # the byte pieces are ordinary vocabulary, not special tokens
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in special]
    return Tokenizer.from_str(json.dumps(state))


@functools.cache
def family(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family; "none" comes as load_tokenizer would return it only after saving and loading."""
    sentencepiece, special, bos, eos, pad, template = FAMILIES[name]
    inner = (metaspace if sentencepiece else byte_level)(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer
