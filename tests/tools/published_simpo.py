"""Train on token ids as the released SimPO code builds them, to reproduce published numbers; otherwise as train.py.

    python tests/tools/published_simpo.py tests/published/gemma-2-9b-it-simpo.yaml --lr 5e-7
    torchrun --nproc-per-node 8 tests/tools/published_simpo.py tests/published/gemma-2-9b-it-simpo.yaml
    python tests/tools/published_simpo.py show --model MODEL --dataset FILE       # such rows; `stats` too

Options and files are those of train.py, and of data.py's commands. Without --max_prompt_length, prompts are cut to 1800 of 2048
tokens. A run goes on (--resume) by this command only. For Mistral and Gemma the released code also replaces the chat template:
give the tokenizer the one of the released configuration.
"""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data  # noqa: E402
import train  # noqa: E402
from data import Example, Row, UserError  # noqa: E402


def encode(
    row: Row, tokenizer, max_length: int, max_prompt_length: int, control_tokens: bool = False, template: dict | None = None
) -> tuple[Example, list[str]]:
    """Row → token ids; the place of `data.encode`.

    The prompt is rendered without the generation prompt and the assistant's turn alone, less a BOS text, so the assistant's
    header is scored as part of the response. A template that speaks of "system" gets an empty system turn if there is none. A
    BOS id goes in front and an EOS id at the end where they are missing. If prompt + longest response > max_length, the prompt
    keeps its last max_prompt_length tokens (published: 1800 of 2048); if that is not enough, both responses are cut to
    max_length − max_prompt_length tokens, however short the prompt is. Special tokens spelled in texts are always real ones.
    """
    messages = row.prompt
    if messages[0]["role"] != "system" and re.search(r"system|<\|im_start\|>", tokenizer.chat_template):
        messages = [{"role": "system", "content": ""}, *messages]
    template = {**(template or {}), **row.template}
    prompt_text = data._render(tokenizer, messages, template)
    wholes = []
    for response in row.responses:
        text = data._render(tokenizer, [response], template)
        if tokenizer.bos_token:
            text = text.removeprefix(tokenizer.bos_token)
        wholes.append(data._ids(tokenizer, prompt_text + text))
    ids = data._ids(tokenizer, prompt_text)
    shared = len(os.path.commonprefix([ids, *wholes]))
    prompt = with_bos(ids[:shared], tokenizer)
    responses = [with_eos(whole[shared:], tokenizer) for whole in wholes]
    prompt, responses, cuts = truncated(prompt, responses, max_length, max_prompt_length)
    if not prompt or not all(responses):
        raise UserError(f"no response token is left within max_length {max_length}")
    return Example(prompt, responses, row.desirable), cuts


def with_bos(prompt: list[int], tokenizer) -> list[int]:
    if not tokenizer.bos_token or prompt[:1] == [tokenizer.bos_token_id]:
        return prompt
    return [tokenizer.bos_token_id, *prompt]


def with_eos(response: list[int], tokenizer) -> list[int]:
    if tokenizer.eos_token_id is None or response[-1:] == [tokenizer.eos_token_id]:
        return response
    return [*response, tokenizer.eos_token_id]


def truncated(
    prompt: list[int], responses: list[list[int]], max_length: int, max_prompt_length: int
) -> tuple[list[int], list[list[int]], list[str]]:
    """Prompt and responses after the cuts, and which these were."""
    cuts = []
    longest = max(map(len, responses))
    if len(prompt) + longest > max_length and len(prompt) > max_prompt_length:
        prompt = prompt[-max_prompt_length:]
        cuts.append("prompt cut")
    if len(prompt) + longest > max_length:
        responses = [r[: max_length - max_prompt_length] for r in responses]
        cuts.append("response cut")
    return prompt, responses, cuts


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    data.encode = encode
    data.PROMPT_SHARE = 1800 / 2048
    program = data if argv[:1] in (["show"], ["stats"]) else train
    return program.main(argv)


if __name__ == "__main__":
    main()
