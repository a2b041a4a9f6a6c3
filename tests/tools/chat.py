"""Talk to a model in the terminal: its answer appears as it is made, and it is told the whole conversation each time.

    python tests/tools/chat.py runs/mine/model
    echo "name two metals" | python tests/tools/chat.py runs/toy/model        # one answer, and the end

An empty line, Ctrl-D or Ctrl-C ends the conversation. Tokens are chosen as the model's generation_config.json says, which is
greedy for most models; --temperature overrides it. Answers go to stdout, everything else to stderr.
"""

import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import on_policy  # noqa: E402
import torch  # noqa: E402
from transformers import TextStreamer  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from data import UserError, setting  # noqa: E402


@dataclass
class Chat:
    """Whom to talk to."""

    model: str = setting(MISSING, "folder or hub name of a causal language model, such as runs/mine/model")
    temperature: float | None = setting(None, "of sampling, 0 is greedy; without it as generation_config.json says")


class Streamer(TextStreamer):
    """Prints an answer as it comes; what would steer the terminal is spelled out."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(data.visible(text), stream_end)


def typed() -> Iterator[str]:
    """The user's messages: what a pipe holds is one; in a terminal each line is, until an empty one or Ctrl-D."""
    sys.stdin.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        yield from filter(None, [sys.stdin.read().strip()])
        return
    import readline  # noqa: F401  (gives input() arrow keys and a history)

    try:
        while text := input("> ").strip():
            yield text
    except EOFError:
        print()


def chat(c: Chat) -> None:
    """Answer one message after the other; UserError for what is no model, and for a conversation that is too long for it."""
    if c.temperature is not None and c.temperature != 0 and c.temperature < 0.001:
        raise UserError(f"temperature is {c.temperature:g}; it is at least 0.001, or 0 (greedy)")
    tokenizer = data.load_tokenizer(c.model)
    model = on_policy.load_model(c.model, "CausalLM", data.device_named("auto"))
    train.stop_at_terminator(model, tokenizer, {}, data.say)
    config = model.generation_config
    config.update(num_beams=1, stop_strings=None, return_dict_in_generate=False)
    if c.temperature is not None:
        config.update(do_sample=c.temperature > 0, temperature=c.temperature or None)
    how = f"temperature {config.temperature or 1:g}" if config.do_sample else "greedy"
    data.say(f"{c.model} on {model.device}, {how}; an empty line, Ctrl-D or Ctrl-C ends the conversation")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", 2048)
    messages = []
    for text in typed():
        messages.append({"role": "user", "content": text})
        ids = data._ids(tokenizer, data._render(tokenizer, messages, generation_prompt=True))
        room = context - len(ids)
        if room < 1:
            raise UserError(f"the conversation has {len(ids)} tokens and the model's context {context}; begin a new one")
        prompt = torch.tensor([ids], device=model.device)
        streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        how = dict(max_new_tokens=min(1024, room), streamer=streamer)
        answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)[0, len(ids) :]
        messages.append(data.answer(tokenizer.decode(answer, skip_special_tokens=True).strip()))


def main(argv: list[str] | None = None) -> None:
    """The command line as a function. A user error ends with a message and exit code 2."""

    def work(argv: list[str]) -> None:
        chat(data.parse(Chat, argv, "tests/tools/chat.py", __doc__))

    data.command_line(work, argv, stopped="")


if __name__ == "__main__":
    main()
