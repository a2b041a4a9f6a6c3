"""Every causal language model of the installed transformers, tiny, through the project's own start: is its log-prob right?

    python tests/studies/architectures.py                            # all, a process each; the table goes to standard output
    python tests/studies/architectures.py --only llama gpt_oss mamba

A configuration of transformers' own is shrunk by the names of its fields: a layer of each kind, width 32, 96 tokens, window 8,
random weights large enough that attention matters. The model is saved, and then taken where a user's goes: `train.prepare` with
--layout auto on pairs of 5 to 74 tokens, so within and beyond the window. Log-probs of all responses and the gradient of
a weighted sum of them, in the layout that was chosen and, where that is the packed one, in the padded one too, are
compared with `logprobs.response_logprob` on the model as transformers loads it, one row at a time; then comes one step.

    packed       equal in both layouts: log-probs per token to 5e-6 nats, gradients to 5e-5 of their largest entry
    padded       equal in the padded layout, which was chosen, and why
    refused      before training, in which words
    too strict   refused, though the padded layout is equal and the model sees no later token
    wrong        not equal, or a traceback, a crash, a hang; or transformers cannot score a row with it, or sees later tokens
                 in doing so, and it is not refused
    not built    transformers itself cannot build the model, save and load it

Exit code 1 if any is wrong.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import random
import re
import resource
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

import processes  # noqa: E402, I001
import torch  # noqa: E402
import toy  # noqa: E402
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from logprobs import ResponseLogProbs, response_logprob  # noqa: E402

LOGP_BOUND = 5e-6  # nats per token
GRADIENT_BOUND = 5e-5  # of the largest entry
SECONDS = 600.0  # for one model
MEMORY = 16 * 2**30  # bytes of address space, for one model
RESULTS = ("packed", "padded", "refused", "too strict", "wrong", "not built")
WORDS = ((1, 1, 2), (1, 2, 1), (2, 4, 3), (5, 9, 2), (9, 3, 16), (17, 8, 5), (24, 30, 26), (40, 22, 31))  # prompt, responses

SIZES = {  # of fields by name; one that is 0 stays 0
    96: "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input audio_vocab_size vocab_offset "
    "ngram_vocab_size_base encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size num_centroids",
    256: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions max_source_positions "
    "context_length num_position_embeddings original_max_position_embeddings",
    64: "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim d_ff dim_ff dff n_inner ffn_hidden_size d_inner "
    "intermediate_size_mlp dense_intermediate_size feed_forward_size mlp_dim codebook_size mamba_d_ssm",
    32: "hidden_size d_model n_embd embed_dim embedding_size word_embed_proj_dim emb_dim embedding_dim input_embedding_size "
    "output_embedding_size attention_hidden_size hidden_size_global lru_width router_hidden_size backbone_hidden_size "
    "input_size adapter_out_dim vision_output_dim out_hidden_size pronunciation_embed_dim shape_embed_dim "
    "hidden_size_per_layer_input ple_embed_dim adapter_in_dim downsample_hidden_size adapter_input_size conv_output_size "
    "projector_input_dim projector_output_dim base_channels output_channels num_filters upsample_groups codebook_dim "
    "vector_quantization_hidden_dimension ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels "
    "image_size crop_size",
    16: "index_n_heads moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
    "shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank kv_lora_rank "
    "o_lora_rank qk_head_dim laurel_rank attention_head_dim adapter_rank hc_lowrank loop_gate_rank gated_norm_rank "
    "attention_head_size kv_channels prompt_mid_dim mamba_d_head mamba_head_dim mamba_headdim",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim linear_key_head_dim linear_value_head_dim "
    "linear_head_dim swa_head_dim d_kv dim_head d_head d_rel sliding_window attention_window_size window_size "
    "sliding_window_size local_attention attention_chunk_size keep_window_size local_attention_window_len mamba_d_state "
    "state_size ssm_state_size rotary_dim mamba_chunk_size chunk_size index_topk time_step_rank mamba_dt_rank block_size "
    "feature_size index_block_size prompt_length",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "swa_num_attention_heads linear_num_value_heads linear_num_heads num_encoder_attention_heads "
    "num_decoder_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num "
    "patch_size mamba_n_heads mamba_num_heads",
    2: "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok "
    "num_experts_per_token moe_k moe_topk moe_top_k num_query_groups mamba_expand expand encoder_layers "
    "num_encoder_layers num_decoder_layers num_lstm_layers n_layers_per_attn_res_block depth "
    "num_blocks o_groups conf_num_hidden_layers index_topk_blocks adapter_merge_size",
    1: "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group first_k_dense_replace "
    "num_dense_layers n_groups mamba_n_groups mamba_ngroups",
}  # fmt: skip
SIZE = {name: size for size, names in SIZES.items() for name in names.split()}
REQUIRED = ("head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "sliding_window")  # where None, too
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
WINDOW = dict(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
OVERRIDES = {  # by a configuration's model_type: what the names of its fields do not tell
    "bamba": dict(num_hidden_layers=2, attn_layer_indices=[1]),
    "cohere_compass_text": WINDOW | dict(rope_parameters={"sliding_attention": ROPE, "full_attention": ROPE}),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0)),
    "dory": dict(num_hidden_layers=6, n_input_layers=2, n_recurrent_layers=2, n_output_layers=2, 
        layer_types=["sliding_attention", "full_attention"] * 3),
    "dots1": WINDOW | dict(n_shared_experts=1),
    "dots3_note_text": dict(swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=16, swa_kv_lora_rank=16,
        swa_head_dim=16, swa_qk_nope_head_dim=8, swa_v_head_dim=8),
    "gemma3n_text": dict(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.9, 0.9, 0.0, 0.0], intermediate_size=[64] * 4),
    "gemma4_text": dict(global_head_dim=16),
    "gemma4_unified_text": dict(global_head_dim=16),
    "granitemoehybrid": dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]),
    "jamba": dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1),
    "laguna": WINDOW | dict(mlp_layer_types=["dense", "sparse"], num_attention_heads_per_layer=[4, 8]),
    "lfm2": dict(num_hidden_layers=2, layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(num_hidden_layers=2, layer_types=["conv", "full_attention"]),
    "mamba2": dict(head_dim=16),
    "qwen4_exp_text": dict(indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8,
        indexer_compress_ratio=4, output_gate_type="sigmoid"),
    "mellum": WINDOW | dict(mlp_layer_types=["sparse"] * 2),
    "minicpm3": dict(dim_model_base=32),  # of which the scale of the logits is made
    "qwen2_moe": dict(sliding_window=8),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "reformer": dict(local_attn_chunk_length=8, lsh_attn_chunk_length=8, attn_layers=["local", "lsh"],
        axial_pos_shape=[16, 16], axial_pos_embds_dim=[16, 16]),
    "xlm": dict(causal=True),
    "xlstm": dict(hidden_size=128, embedding_dim=128),  # heads are rounded up to 64
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2, attention_hidden_size=64),
    "zamba2": dict(num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2, attention_hidden_size=64,
        mamba_headdim=8, hybrid_layer_ids=[1, 3]),
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip


def tiny_config(kind: type):
    """A configuration of the class, with a layer of each kind that the class's default has, at least two and at most four."""
    overrides = OVERRIDES.get(kind.model_type, {})
    default = kind()
    fields = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    small = {}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            small[name] = tiny_config(type(value))
        elif name.endswith("token_id") and isinstance(value, int):
            small[name] = 3  # the tokenizer's <end>
        elif name.endswith("token_index") and isinstance(value, int):
            small[name] = 95
        elif name in SIZE and ((type(value) is int and value > 0) or (value is None and name in REQUIRED)):
            small[name] = SIZE[name]
    if fields.get("kv_lora_rank"):
        small["num_key_value_heads"] = SIZE["num_attention_heads"]
    if "is_decoder" in fields:
        small["is_decoder"] = True
    for name in LAYERS:
        if isinstance(fields.get(name), int):
            small |= some_layers(name, fields)
            break
    if fields.get("use_sliding_window") is False and set(small.get("layer_types", ())) == {"full_attention"}:
        small |= dict(use_sliding_window=True, layer_types=["full_attention", "sliding_attention"])
    return kind(**{**small, **overrides})


def some_layers(name: str, fields: dict) -> dict:
    """The number of layers, and every list of one value a layer, cut down to the first layer of each kind."""
    number = fields[name]
    lists = {key: value for key, value in fields.items() if isinstance(value, list) and len(value) == number}
    first = {}
    for layer in range(number):
        first.setdefault(str([values[layer] for values in lists.values()]), layer)
    layers = list(first.values())[:4]
    layers += [layer for layer in range(number) if layer not in layers][: max(0, 2 - len(layers))]
    layers.sort()
    return {name: len(layers), **{key: [values[layer] for layer in layers] for key, values in lists.items()}}


def build(name: str, folder: Path):
    """Save a tiny model of the name, with the toy task's tokenizer, and pairs of random words; it is loaded again."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(CONFIG_MAPPING[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter[0].numel() ** -0.5)  # so that a product is about as large as what goes in
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))  # biases, too
    model.generation_config.eos_token_id = 3
    model.save_pretrained(folder / "model")
    tokenizer = toy.word_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    draw = random.Random(0)
    with open(folder / "pairs.jsonl", "w") as file:
        for lengths in WORDS:
            texts = [" ".join(draw.choices(toy.WORDS, k=length)) for length in lengths]
            file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts))) + "\n")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = False
    return model, tokenizer


def numbers(model, logps) -> tuple:
    """The log-probs of all responses, and the gradient of a weighted sum of them, {name of a parameter: tensor}."""
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (logps * weights).sum().backward()
    return logps.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def by_definition(model, examples) -> tuple:
    logps = [response_logprob(model, e.prompt, response) for e in examples for response in e.responses]
    return numbers(model, torch.stack(logps))


def in_layout(policy, examples, layout: str) -> tuple:
    policy.use_layout(layout)
    return numbers(policy.model, policy(data.LAYOUTS[layout](examples))["logp"])


def difference(ours: tuple, right: tuple, examples) -> str:
    """By how much they differ where that is above the bounds, else ""."""
    tokens = torch.tensor([len(response) for e in examples for response in e.responses])
    logp = ((ours[0] - right[0]).abs() / tokens).max().item()
    largest = max(gradient.abs().max().item() for gradient in right[1].values())
    gradient = 0.0
    for name in ours[1].keys() | right[1].keys():
        apart = ours[1].get(name, 0.0) - right[1].get(name, 0.0)
        gradient = max(gradient, apart.abs().max().item() / largest)
    if not right[0].isfinite().all():
        return "log-probs are not finite"
    if logp <= LOGP_BOUND and gradient <= GRADIENT_BOUND:
        return ""
    return f"log-probs differ by {logp:.2g} nats per token, gradients by {gradient:.2g} of the largest entry"


def sees_later_tokens(model, example) -> bool:
    """Whether the logits of a position depend on what follows it."""
    ids = torch.tensor([example.prompt + example.responses[0]])
    half = ids.shape[1] // 2
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, :half]
        alone = model(input_ids=ids[:, :half]).logits
    return not torch.allclose(whole, alone, atol=1e-3)


def judge(name: str, folder: Path) -> tuple[str, str]:
    """(result, why) of one model."""
    how = dict(model=str(folder / "model"), dataset=str(folder / "pairs.jsonl"), out=str(folder / "out"), objective="dpo")
    how |= dict(layout="auto", dtype="fp32", device="cpu", batch_size=4, eval_size=2, samples=1, sample_tokens=4)
    s = train.Settings(**how, cache=str(folder / "cache"), lr=1e-3)
    try:
        model, tokenizer = build(name, folder)
    except Exception as error:  # of any kind, as in what follows: it is what is looked for
        return "not built", one_line(error)
    examples = list(data.load(s.dataset, tokenizer, s)[0])
    assert [len(e.prompt) - 2 for e in examples] == [words for words, *_ in WORDS]
    right = None
    undefined = "sees later tokens"
    with contextlib.suppress(Exception):
        if not sees_later_tokens(model, examples[-1]):
            undefined = "cannot be scored row by row"
            right = by_definition(model, examples)
    said = io.StringIO()
    try:
        # a type of model may want a class of tokenizer that cannot read this one's words
        with contextlib.redirect_stderr(said), mock.patch.object(data, "load_tokenizer", lambda *_: tokenizer):
            run = prepare(s)
            wrong = wrong_numbers(run, examples, right) if right else undefined
            loss = train.train_step(run, run.plan[0])["loss"]
    except data.UserError as error:
        with contextlib.suppress(Exception):
            if right and not difference(in_layout(ResponseLogProbs(model), examples, "padded"), right, examples):
                return "too strict", one_line(error)
        return "refused", one_line(error)
    except Exception as error:
        return "wrong", f"traceback: {one_line(error)}"
    if not wrong and not abs(loss - math.log(2)) < 1e-5:
        wrong = f"the first loss of dpo is {loss:.6f}, not log 2"
    if wrong:
        return "wrong", wrong
    reason = re.search(r"^layout: padded, (.*); checked", said.getvalue(), re.MULTILINE)
    reasons = [reason[1]] if reason else []
    if not run.s.samples:
        reasons.append("with --samples 0, as it cannot answer")
    return run.layout, "; ".join(reasons)


def prepare(s: train.Settings) -> train.Run:
    """`train.prepare`, without sample answers where it says that the model can give none."""
    try:
        return train.prepare(s)
    except data.UserError as error:
        if "--samples 0" not in str(error):
            raise
    return train.prepare(dataclasses.replace(s, samples=0, out=f"{s.out}-unanswered"))


def wrong_numbers(run: train.Run, examples: list, right: tuple) -> str:
    """What is wrong with a run's log-probs and gradients, in its layout and padded; "" where nothing is."""
    for layout in dict.fromkeys((run.layout, "padded")):
        apart = difference(in_layout(run.policy, examples, layout), right, examples)
        if apart:
            return f"{layout}: {apart}"
    run.policy.use_layout(run.layout)
    run.policy.zero_grad()
    return ""


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, data.UserError) else f"{type(error).__name__}: {text[:160]}"


def judge_alone(name: str) -> tuple[str, str]:
    """`judge` in a process of its own, with limits of time and memory."""
    with tempfile.TemporaryDirectory() as folder:
        done = processes.run([__file__, "--judge", name], Path(folder), SECONDS)
    if done.code == 0:
        return tuple(json.loads(done.out.splitlines()[-1]))
    if done.code is None:
        return "wrong", f"not done after {SECONDS:g} s"
    last = (done.err.strip().splitlines() or [""])[-1]
    return "wrong", f"exit code {done.code}: {last}"


def table(verdicts: dict[str, tuple[str, str]]) -> str:
    """Markdown: names by result and reason, with "…" for what differs between the reasons of similar models."""
    groups = {}
    for name, (result, why) in verdicts.items():
        kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
        why = re.sub(r"\d+(\.\d+)?(e-?\d+)?(?= nats|\)| of the largest)", "…", why.replace(kind, "…"))
        why = re.sub(r"/\S*/", "", why).replace("|", "\\|")  # folders, too
        groups.setdefault((result, why), []).append(name)
    lines = ["| result | why | models | |", "|---|---|---|---|"]
    for result, why in sorted(groups, key=lambda group: (RESULTS.index(group[0]), -len(groups[group]))):
        names = groups[result, why]
        lines.append(f"| {result} | {why} | {len(names)} | {', '.join(names)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, tuple[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--judge", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.judge:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        print(json.dumps(judge(options.judge, Path.cwd())))
        return {}
    processes.preload()
    names = options.only or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    verdicts = {}
    for number, name in enumerate(names, 1):
        verdicts[name] = judge_alone(name)
        print(f"{number}/{len(names)} {name}: {' – '.join(filter(None, verdicts[name]))}", file=sys.stderr, flush=True)
    counts = {result: sum(verdict[0] == result for verdict in verdicts.values()) for result in RESULTS}
    print(table(verdicts))
    print(f"\n{len(names)} models: {', '.join(f'{count} {result}' for result, count in counts.items())}")
    return verdicts


if __name__ == "__main__":
    sys.exit(any(result == "wrong" for result, _ in main().values()))
