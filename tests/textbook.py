"""Preference optimisation on one screen: `python tests/textbook.py` trains the toy task's model with SimPO.

Of two responses to a prompt somebody has chosen one; it is to become likelier than the other. train.py follows this file.
"""

import json
import math

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer


def token_ids(tokenizer, row):
    """The prompt, up to where the model begins to answer, and both responses, up to the token with which it stops."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    ids = [prompt]
    for response in (row["chosen"], row["rejected"]):
        answer = {"role": "assistant", "content": response}
        whole = tokenizer.apply_chat_template([*row["prompt"], answer], return_dict=False)
        while whole[-1] != tokenizer.eos_token_id:  # what some templates write behind it, such as a line break
            whole.pop()
        ids.append(whole[len(prompt) :])
    return ids


def logp(model, prompt, response):
    """log π(response | prompt), nats: the sum over its tokens, each given all tokens before it."""
    ids = torch.tensor([prompt + response])
    log_probs = model(ids).logits[0].log_softmax(-1)  # (tokens, vocabulary): of what comes next
    of_response = log_probs[len(prompt) - 1 : -1]  # the prompt's last token predicts the first
    return of_response.gather(-1, ids[0, len(prompt) :, None]).sum()


def dpo(logp_w, logp_l, ref_w, ref_l, len_w, len_l, beta=0.1):
    """Reward of a response: β log(π / π_ref), its gain in log-prob. w: chosen, l: rejected."""
    margin = beta * (logp_w - ref_w) - beta * (logp_l - ref_l)
    return -logsigmoid(margin), margin  # σ(margin): the probability that w wins (Bradley, Terry)


def simpo(logp_w, logp_l, ref_w, ref_l, len_w, len_l, beta=2.0, gamma=1.0):
    """Reward: β times the average log-prob of a token. No reference; w has to be ahead by γ."""
    margin = beta * logp_w / len_w - beta * logp_l / len_l
    return -logsigmoid(margin - gamma), margin


def train(model, reference, batches, objective, peak_lr):
    """A step for each batch of (prompt, chosen, rejected); reference: a copy of the initial model."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    warmup = max(1, round(0.1 * len(batches)))
    for step, batch in enumerate(batches):
        mean_loss, mean_margin = 0.0, 0.0
        for prompt, chosen, rejected in batch:
            logp_w = logp(model, prompt, chosen)
            logp_l = logp(model, prompt, rejected)
            with torch.no_grad():  # it does not learn
                ref_w = logp(reference, prompt, chosen)
                ref_l = logp(reference, prompt, rejected)
            loss, margin = objective(logp_w, logp_l, ref_w, ref_l, len(chosen), len(rejected))
            (loss / len(batch)).backward()  # gradients add up: to that of the mean loss
            mean_loss += loss.item() / len(batch)
            mean_margin += margin.item() / len(batch)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # clipped
        if step < warmup:
            lr = peak_lr * (step + 1) / warmup  # small steps first
        else:
            lr = peak_lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (len(batches) - warmup)))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        yield mean_loss, mean_margin, norm.item()


if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained("tests/toy/model")
    model, reference = (AutoModelForCausalLM.from_pretrained("tests/toy/model") for _ in range(2))
    pairs = [token_ids(tokenizer, json.loads(line)) for line in open("tests/toy/pairs.jsonl")]
    batches = [pairs[i : i + 32] for i in range(0, len(pairs), 32)]
    for step, (loss, margin, _) in enumerate(train(model, reference, batches, simpo, peak_lr=2e-4), 1):
        print(f"step {step} of {len(batches)}: loss {loss:.4f}, margin {margin:.4f}", flush=True)
