"""Tokenizers of the usual families in miniature: trained here on a few sentences, with the special and the merely added tokens
of each, and its chat template after the structure of the public one, in our words and short. No download.

What a template does at an answer is meant to be faithful: what stands before and behind its text, what is cut, what is refused.
Long instructions (how to call a tool) are shortened. `strftime_now`, `enable_thinking`, `tools` … are as in the originals.
"""

import functools
import json
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Hello there! The answer is four, and the question was: what is two plus two?",
    "user and assistant, system and model: You are a helpful assistant. Be brief.",
    "User: Assistant: System: Sky is blue. Grass is green. Water is wet; fire is hot.",
    "[INST] ask me [/INST] and I answer. <<SYS>> be kind <</SYS>> Good day to you, and good night.",
] * 4


ALTERNATE = """
    {% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
      {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}"""
SYSTEM_APART = """
    {% if messages[0]['role'] == 'system' %}{% set system, turns = messages[0]['content'], messages[1:] %}
    {% else %}{% set system, turns = DEFAULT, messages %}{% endif %}"""
HERMES_TOOLS = r"""
    {{ '# Tools\n\nYou may call one or more functions.\n\n<tools>' }}
    {% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}
    {{ '\n</tools>\n\nFor each call return <tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>' }}"""
HERMES_CALLS = r"""
    {% for call in m['tool_calls'] %}
      {% set call = call['function'] %}
      {{ '<tool_call>\n{"name": "' + call['name'] + '", "arguments": ' + call['arguments'] | tojson + '}\n</tool_call>' }}
      {{ '' if loop.last else '\n' }}
    {% endfor %}"""
HERMES_RESULT = r"""
    {{ '<|im_start|>user' if loop.previtem['role'] != 'tool' else '' }}
    {{ '\n<tool_response>\n' + m['content'] + '\n</tool_response>' }}
    {{ '<|im_end|>\n' if loop.last or loop.nextitem['role'] != 'tool' else '' }}"""


def lines(text: str, system: str = "") -> str:
    """A template without the line breaks and the indents that it is written with.

    @NAME stands for one of the pieces above; system: what SYSTEM_APART takes where there is no system message.
    """
    for name in ("ALTERNATE", "SYSTEM_APART", "HERMES_TOOLS", "HERMES_CALLS", "HERMES_RESULT"):
        text = text.replace(f"@{name}", globals()[name])
    return "".join(line.strip() for line in text.replace("DEFAULT", system).splitlines())


LLAMA2 = lines(
    r"""
    @SYSTEM_APART
    {% for m in turns %} @ALTERNATE
      {% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] if loop.first and system else m['content'] %}
      {% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
      {% elif m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
    {% endfor %}""",
    system="false",
)
LLAMA3_TURNS = lines(r"""
    {{ bos_token }}
    {% for m in messages %}
      {{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}
    {% endfor %}""")
LLAMA3_HEADER = r"{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
LLAMA3 = LLAMA3_TURNS + "{% if add_generation_prompt %}" + LLAMA3_HEADER + "{% endif %}"
LLAMA3_FIRST = LLAMA3_TURNS + LLAMA3_HEADER  # as it was released: whether asked for or not
LLAMA32 = lines(
    r"""
    {{ bos_token }}
    {% set date_string = date_string if date_string is defined else strftime_now('%d %b %Y') %}
    @SYSTEM_APART
    {% set head = '<|start_header_id|>%s<|end_header_id|>\n\n' %}
    {{ head % 'system' + ('Environment: ipython\n' if tools else '') }}
    {{ 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' + system | trim + '<|eot_id|>' }}
    {% for m in turns %}
      {% if m['tool_calls'] %}
        {% if m['tool_calls'][1] %}{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}
        {% set call = m['tool_calls'][0]['function'] %}
        {{ head % 'assistant' + '{"name": "' + call['name'] + '", "parameters": ' + call['arguments'] | tojson + '}' }}
        {{ '<|eot_id|>' }}
      {% elif m['role'] == 'tool' %}
        {{ head % 'ipython' + m['content'] | tojson + '<|eot_id|>' }}
      {% else %}
        {{ head % m['role'] + ('You may call ' + tools | tojson + '\n\n' if loop.first and tools else '') }}
        {{ m['content'] | trim + '<|eot_id|>' }}
      {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ head % 'assistant' }}{% endif %}""",
    system="''",
)
MISTRAL = lines(
    r"""
    {{ bos_token }}
    {% for m in messages %} @ALTERNATE
      {% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
      {% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}
      {% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
    {% endfor %}"""
)
MISTRAL_V3 = lines(  # the system text stands in a prompt, and no longer where an answer follows
    r"""
    @SYSTEM_APART
    {% set last_user = (turns | selectattr('role', 'equalto', 'user') | list)[-1] %}
    {{ bos_token }}
    {% for m in turns %}
      {% if m['role'] == 'user' %}
        {% if tools and m == last_user %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
        {{ '[INST] ' + (system + '\n\n' if system and loop.last else '') + m['content'] + '[/INST]' }}
      {% elif m['tool_calls'] %}
        {{ '[TOOL_CALLS] [' }}
        {% for call in m['tool_calls'] %}
          {% if call['id'] is undefined or call['id'] | length != 9 %}
            {{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
          {% endif %}
          {{ (call['function'] | tojson)[:-1] + ', "id": "' + call['id'] + '"}' + ('' if loop.last else ', ') }}
        {% endfor %}
        {{ ']' + eos_token }}
      {% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}
      {% elif m['role'] == 'tool' %}
        {{ '[TOOL_RESULTS] {"content": ' + m['content'] + ', "call_id": "' + m['tool_call_id'] + '"}[/TOOL_RESULTS]' }}
      {% else %}{{ raise_exception('Only user and assistant roles are supported, with an initial system message!') }}{% endif %}
    {% endfor %}""",
    system="''",
)
GEMMA2 = lines(
    r"""
    {{ bos_token }}
    {% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
    {% for m in messages %} @ALTERNATE
      {% set role = 'model' if m['role'] == 'assistant' else m['role'] %}
      {{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
)
GEMMA3 = lines(
    r"""
    {{ bos_token }}
    @SYSTEM_APART
    {% set system = system if system is string else system[0]['text'] %}
    {% for m in turns %} @ALTERNATE
      {{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}
      {{ system + '\n\n' if loop.first and system else '' }}
      {% if m['content'] is string %}{{ m['content'] | trim }}
      {% else %}
        {% for part in m['content'] %}{{ '<start_of_image>' if part['type'] == 'image' else part['text'] | trim }}{% endfor %}
      {% endif %}
      {{ '<end_of_turn>\n' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
    system="''",
)


def chatml(default_system: str) -> str:
    return (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + default_system + "<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


QWEN25 = lines(
    r"""
    @SYSTEM_APART
    {{ '<|im_start|>system\n' + system }}
    {% if tools %}{{ '\n\n' }} @HERMES_TOOLS{% endif %}
    {{ '<|im_end|>\n' }}
    {% for m in turns %}
      {% if m['role'] == 'tool' %} @HERMES_RESULT
      {% else %}
        {{ '<|im_start|>' + m['role'] + ('\n' + m['content'] if m['content'] else '') }}
        {{ '\n' if m['tool_calls'] else '' }} @HERMES_CALLS
        {{ '<|im_end|>\n' }}
      {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    system="'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.'",
)
QWEN3_TURNS = lines(  # reasoning stays in turns behind the last user's only, and there the last answer gets an empty one
    r"""
    @SYSTEM_APART
    {% if system or tools %}
      {{ '<|im_start|>system\n' + system + ('\n\n' if system and tools else '') }}
      {% if tools %} @HERMES_TOOLS{% endif %}
      {{ '<|im_end|>\n' }}
    {% endif %}
    {% set asked = namespace(last=0) %}
    {% for m in turns %}{% if m['role'] == 'user' %}{% set asked.last = loop.index0 %}{% endif %}{% endfor %}
    {% for m in turns %}
      {% if m['role'] == 'tool' %} @HERMES_RESULT
      {% elif m['role'] == 'assistant' %}
        {% set text, thought = m['content'], '' %}
        {% if m['reasoning_content'] is string %}{% set thought = m['reasoning_content'] %}
        {% elif '</think>' in text %}
          {% set thought = text.split('</think>')[0].split('<think>')[-1] %}
          {% set text = text.split('</think>')[-1].lstrip('\n') %}
        {% endif %}
        {{ '<|im_start|>assistant\n' }}
        {% if loop.index0 > asked.last and (loop.last or thought) %}
          {{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}
        {% else %}{{ text }}{% endif %}
        {{ '\n' if text and m['tool_calls'] else '' }} @HERMES_CALLS
        {{ '<|im_end|>\n' }}
      {% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}
    {% endfor %}""",
    system="''",
)
QWEN3 = QWEN3_TURNS + lines(r"""
    {% if add_generation_prompt %}
      {{ '<|im_start|>assistant\n' }}
      {% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
    {% endif %}""")
QWEN35 = QWEN3_TURNS + lines(r"""
    {% if add_generation_prompt %}
      {{ '<|im_start|>assistant\n' }}
      {{ '<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false else '<think>\n' }}
    {% endif %}""")
PHI3 = lines(r"""
    {% for m in messages %}
      {% if m['role'] in ['system', 'user', 'assistant'] %}
        {{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}
      {% endif %}
    {% endfor %}
    {{ '<|assistant|>\n' if add_generation_prompt else eos_token }}""")
PHI4 = lines(r"""
    {% for m in messages %}
      {% if m['role'] in ['system', 'user', 'assistant'] %}
        {{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}
      {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}""")
GLM4 = lines(r"""
    {{ '[gMASK]<sop>' }}
    {% if tools %}{{ '<|system|>\n# Tools\n' + tools | tojson }}{% endif %}
    {% for m in messages %}
      {% set role = 'observation' if m['role'] == 'tool' else m['role'] %}
      {% if m['content'] %}{{ '<|' + role + '|>\n' + m['content'] }}{% endif %}
      {% for call in m['tool_calls'] %}
        {{ '<|assistant|>' + call['function']['name'] + '\n' + call['function']['arguments'] | tojson }}
      {% endfor %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}""")
DEEPSEEK_V31 = lines(  # after a tool's output the answer goes on without a header
    r"""
    {{ bos_token }}
    {% set after = namespace(user=false) %}
    {% for m in messages %}
      {% if m['role'] == 'system' %}{{ m['content'] }}
      {% elif m['role'] == 'user' %}{% set after.user = true %}{{ '<｜User｜>' + m['content'] }}
      {% elif m['role'] == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' }}
      {% elif m['role'] == 'assistant' %}
        {{ '<｜Assistant｜></think>' if after.user else '' }}
        {{ m['content'].split('</think>', 1)[1] if '</think>' in m['content'] else m['content'] }}
        {% for call in m['tool_calls'] %}
          {{ '<｜tool▁calls▁begin｜>' if loop.first else '' }}{{ '<｜tool▁call▁begin｜>' + call['function']['name'] }}
          {{ '<｜tool▁sep｜>' + call['function']['arguments'] | tojson + '<｜tool▁call▁end｜>' }}
          {{ '<｜tool▁calls▁end｜>' if loop.last else '' }}
        {% endfor %}
        {% set after.user = false %}
        {{ eos_token }}
      {% endif %}
    {% endfor %}
    {% if add_generation_prompt and after.user %}{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{% endif %}"""
)
R1_DISTILL = lines(r"""
    {{ bos_token }}
    {% for m in messages %}
      {% if m['role'] == 'system' %}{{ m['content'] }}
      {% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}
      {% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}""")
GPT_OSS = lines(r"""
    {% if messages[0]['role'] in ['system', 'developer'] %}{% set rules, turns = messages[0]['content'], messages[1:] %}
    {% else %}{% set rules, turns = '', messages %}{% endif %}
    {{ '<|start|>system<|message|>You are ChatGPT.\nCurrent date: ' + strftime_now('%Y-%m-%d') + '\n\nReasoning: ' }}
    {{ (reasoning_effort if reasoning_effort is defined else 'medium') + '\n\n# Valid channels: analysis, commentary, final.' }}
    {{ '<|end|>' }}
    {% if rules or tools %}
      {{ '<|start|>developer<|message|>' + ('# Instructions\n\n' + rules + '\n\n' if rules else '') }}
      {{ '# Tools\n\n' + tools | tojson if tools else '' }}{{ '<|end|>' }}
    {% endif %}
    {% set called = namespace(name='') %}
    {% for m in turns %}
      {% if m['role'] == 'user' %}{{ '<|start|>user<|message|>' + m['content'] + '<|end|>' }}
      {% elif m['role'] == 'tool' %}
        {{ '<|start|>functions.' + called.name + ' to=assistant<|channel|>commentary<|message|>' + m['content'] | tojson }}
        {{ '<|end|>' }}
      {% elif m['tool_calls'] %}
        {% set called.name = m['tool_calls'][0]['function']['name'] %}
        {% if m['content'] %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m['content'] + '<|end|>' }}{% endif %}
        {{ '<|start|>assistant to=functions.' + called.name + '<|channel|>commentary json<|message|>' }}
        {{ m['tool_calls'][0]['function']['arguments'] | tojson + '<|call|>' }}
      {% elif loop.last and not add_generation_prompt %}
        {% if m['thinking'] %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m['thinking'] + '<|end|>' }}{% endif %}
        {{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] + '<|return|>' }}
      {% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] + '<|end|>' }}{% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}""")
SMOLLM3 = lines(
    r"""
    @SYSTEM_APART
    {% set think = enable_thinking is not defined or enable_thinking %}
    {{ '<|im_start|>system\n## Metadata\n\nToday Date: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: ' }}
    {{ ('/think' if think else '/no_think') + '\n\n## Custom Instructions\n\n' + system + '\n\n' }}
    {{ '### Tools\n\n' + xml_tools | tojson if xml_tools else '' }}{{ '<|im_end|>\n' }}
    {% set empty = '' if think else '<think>\n\n</think>\n' %}
    {% for m in turns %}
      {% set content = m['content'] if m['content'] is string else '' %}
      {% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' + empty + content.lstrip('\n') + '<|im_end|>\n' }}
      {% elif m['role'] in ['user', 'tool'] %}{{ '<|im_start|>user\n' + content + '<|im_end|>\n' }}{% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + empty }}{% endif %}""",
    system="'You are a helpful AI assistant named SmolLM, trained by Hugging Face.'",
)
OLMO2 = lines(r"""
    {{ bos_token }}
    {% for m in messages %}
      {% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] + eos_token + ('' if loop.last else '\n') }}
      {% elif m['role'] in ['system', 'user'] %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}
      {% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
    {% endfor %}""")
GRANITE = lines(  # calls of tools are not written
    r"""
    @SYSTEM_APART
    {% set head = '<|start_of_role|>%s<|end_of_role|>' %}
    {{ head % 'system' + system + '<|end_of_text|>\n' }}
    {% if tools %}{{ head % 'tools' + tools | tojson + '<|end_of_text|>\n' }}{% endif %}
    {% for m in turns %}{{ head % m['role'] + m['content'] + '<|end_of_text|>\n' }}{% endfor %}
    {% if add_generation_prompt %}{{ head % 'assistant' }}{% endif %}""",
    system=r"'Today\'s Date: ' + strftime_now('%B %d, %Y') + '.\nYou are Granite, developed by IBM.'",
)
COMMAND_R = lines(r"""
    {{ bos_token }}
    {% set names = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'} %}
    {% set head = '<|START_OF_TURN_TOKEN|><|%s_TOKEN|>' %}
    {% for m in messages %}
      {% if m['role'] in names %}{{ head % names[m['role']] + m['content'] | trim + '<|END_OF_TURN_TOKEN|>' }}{% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ head % 'CHATBOT' }}{% endif %}""")
COMMAND_R7B = lines(  # an answer stands between markers of its own, inside the turn
    r"""
    @SYSTEM_APART
    {% set turn, end = '<|START_OF_TURN_TOKEN|>', '<|END_OF_TURN_TOKEN|>' %}
    {{ bos_token + turn + '<|SYSTEM_TOKEN|># System Preamble\n' + system + ('\n\n' + tools | tojson if tools else '') + end }}
    {% for m in turns %}
      {% if m['role'] == 'user' %}{{ turn + '<|USER_TOKEN|>' + m['content'] + end }}
      {% elif m['role'] == 'tool' %}
        {{ turn + '<|SYSTEM_TOKEN|><|START_TOOL_RESULT|>' + m['content'] + '<|END_TOOL_RESULT|>' + end }}
      {% elif m['tool_calls'] %}
        {{ turn + '<|CHATBOT_TOKEN|><|START_THINKING|>' + m['content'] + '<|END_THINKING|>' }}
        {{ '<|START_ACTION|>' + m['tool_calls'] | map(attribute='function') | list | tojson + '<|END_ACTION|>' + end }}
      {% elif m['role'] == 'assistant' %}
        {{ turn + '<|CHATBOT_TOKEN|><|START_RESPONSE|>' + m['content'] + '<|END_RESPONSE|>' + end }}
      {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ turn + '<|CHATBOT_TOKEN|>' }}{% endif %}""",
    system="'You are Command.'",
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
HERMES = {  # two templates: the second is for rows with tools
    "default": chatml("You are a helpful assistant."),
    "tool_use": lines(
        r"""
        {{ '<|im_start|>system\n' }} @HERMES_TOOLS{{ '<|im_end|>\n' }}
        {% for m in messages %}
          {% if m['role'] == 'tool' %} @HERMES_RESULT
          {% else %}
            {{ '<|im_start|>' + m['role'] + '\n' + m['content'] + ('\n' if m['content'] and m['tool_calls'] else '') }}
            @HERMES_CALLS
            {{ '<|im_end|>\n' }}
          {% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
    ),
}
PARTS = lines(r"""
    {% for m in messages %}
      {{ '<|im_start|>' + m['role'] + '\n' }}
      {% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}
      {{ '<end_of_utterance>\n' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""")


class Family(NamedTuple):
    sentencepiece: bool
    special: list[str]
    bos: str | None
    eos: str | None
    pad: str | None
    template: str | dict[str, str] | None
    terminator: str | None  # of an ordinary answer, after the family's own documentation
    added: tuple[str, ...] = ()  # tokens that are not special: decoding shows them, a user may write them
    strips: tuple[str, ...] = ()  # special tokens that swallow the white space behind them


LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
GEMMA_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"]
MISTRAL_TOKENS = ["[INST]", "[/INST]", "[TOOL_CALLS]"]
MISTRAL_TOKENS += ["[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = ("<think>", "</think>")
CALL = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
PHI3_ROLES = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
GLM_TOKENS = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
DEEPSEEK_TOKENS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
DEEPSEEK_ADDED = (
    *("<｜User｜>", "<｜Assistant｜>", *THINK, "<｜tool▁sep｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
)
HARMONY_TOKENS = ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>",
                  "<|message|>", "<|call|>"]  # fmt: skip
COHERE_TOKENS = ["<PAD>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>",
                 "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"]  # fmt: skip
COHERE_MARKS = [f"<|{end}_{what}|>" for what in ("RESPONSE", "THINKING", "ACTION", "TOOL_RESULT") for end in ("START", "END")]

FAMILIES = {
    "llama2": Family(True, ["<unk>", "<s>", "</s>"], "<s>", "</s>", None, LLAMA2, "</s>"),
    "llama3": Family(False, LLAMA3_TOKENS, "<|begin_of_text|>", "<|end_of_text|>", None, LLAMA3, "<|eot_id|>"),
    "llama3-first": Family(False, LLAMA3_TOKENS, "<|begin_of_text|>", "<|end_of_text|>", None, LLAMA3_FIRST, "<|eot_id|>"),
    "llama3.2": Family(False, LLAMA3_TOKENS, "<|begin_of_text|>", "<|eot_id|>", None, LLAMA32, "<|eot_id|>"),
    "mistral": Family(True, ["<unk>", "<s>", "</s>"], "<s>", "</s>", None, MISTRAL, "</s>"),
    "mistral-v3": Family(True, ["<unk>", "<s>", "</s>", *MISTRAL_TOKENS], "<s>", "</s>", None, MISTRAL_V3, "</s>"),
    "gemma2": Family(True, GEMMA_TOKENS[:-1], "<bos>", "<eos>", "<pad>", GEMMA2, "<end_of_turn>"),
    "gemma3": Family(True, GEMMA_TOKENS, "<bos>", "<eos>", "<pad>", GEMMA3, "<end_of_turn>"),
    "qwen2.5": Family(False, CHATML_TOKENS, None, "<|im_end|>", "<|endoftext|>", QWEN25, "<|im_end|>", CALL),
    "qwen3": Family(False, CHATML_TOKENS, None, "<|im_end|>", "<|endoftext|>", QWEN3, "<|im_end|>", CALL + THINK),
    "qwen3.5": Family(False, CHATML_TOKENS, None, "<|im_end|>", "<|endoftext|>", QWEN35, "<|im_end|>", CALL + THINK),
    "phi3": Family(True, ["<unk>", "<s>", "<|endoftext|>", *PHI3_ROLES], "<s>", "<|endoftext|>", "<|endoftext|>", PHI3,
                   "<|end|>", strips=PHI3_ROLES),
    "phi4": Family(False, [*CHATML_TOKENS, "<|im_sep|>"], "<|endoftext|>", "<|im_end|>", "<|endoftext|>", PHI4, "<|im_end|>"),
    "glm4": Family(False, GLM_TOKENS, None, "<|endoftext|>", "<|endoftext|>", GLM4, "<|user|>"),
    "deepseek-v3.1": Family(False, DEEPSEEK_TOKENS, *DEEPSEEK_TOKENS, DEEPSEEK_V31, DEEPSEEK_TOKENS[1], DEEPSEEK_ADDED),
    "r1-distill": Family(False, DEEPSEEK_TOKENS, *DEEPSEEK_TOKENS, R1_DISTILL, DEEPSEEK_TOKENS[1], DEEPSEEK_ADDED),
    "gpt-oss": Family(False, HARMONY_TOKENS, "<|startoftext|>", "<|return|>", "<|endoftext|>", GPT_OSS, "<|return|>"),
    "smollm2": Family(
        False, CHATML_TOKENS, "<|im_start|>", "<|im_end|>", "<|im_end|>",
        chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"), "<|im_end|>",
    ),
    "smollm3": Family(False, ["<|begin_of_text|>", "<|end_of_text|>", *CHATML_TOKENS[1:]], None, "<|im_end|>", "<|im_end|>",
                      SMOLLM3, "<|im_end|>", THINK),
    "olmo2": Family(False, ["<|endoftext|>", "<|pad|>"], "<|endoftext|>", "<|endoftext|>", "<|pad|>", OLMO2, "<|endoftext|>"),
    "granite": Family(False, ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"], *["<|end_of_text|>"] * 3, GRANITE,
                      "<|end_of_text|>"),
    "command-r": Family(False, COHERE_TOKENS, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<PAD>", COMMAND_R,
                        "<|END_OF_TURN_TOKEN|>"),
    "command-r7b": Family(False, COHERE_TOKENS + COHERE_MARKS, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<PAD>", COMMAND_R7B,
                          "<|END_OF_TURN_TOKEN|>"),
    "zephyr": Family(True, ["<unk>", "<s>", "</s>"], "<s>", "</s>", "</s>", ZEPHYR, "</s>"),
    "hermes": Family(False, CHATML_TOKENS, "<|im_start|>", "<|im_end|>", "<|endoftext|>", HERMES, "<|im_end|>", CALL),
    "parts": Family(False, ["<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<image>"], None, "<end_of_utterance>",
                    "<|endoftext|>", PARTS, "<end_of_utterance>"),
    "none": Family(False, ["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>", None, None, "<|endoftext|>"),
}  # fmt: skip
TERMINATOR = {name: family.terminator for name, family in FAMILIES.items()}


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
    of = FAMILIES[name]
    inner = (metaspace if of.sentencepiece else byte_level)(of.special)
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False, rstrip=True) for token in of.strips])
    inner.add_tokens([AddedToken(token, special=False, normalized=False) for token in of.added])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=of.bos, eos_token=of.eos, pad_token=of.pad)
    tokenizer.chat_template = of.template
    return tokenizer
