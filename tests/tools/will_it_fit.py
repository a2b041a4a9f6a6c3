"""Will it fit? Memory per GPU, the largest token budget and the hours of one epoch, from a model's configuration alone.

    python tests/tools/will_it_fit.py --model gemma-2-9b --gpus 8 --gpu-memory 80
    python tests/tools/will_it_fit.py tests/published/gemma-2-9b-it-simpo.yaml

A settings file of train.py stands for its model and batch size.
One microbatch runs forward and backward on tensors without memory, attention and block masks as on a GPU, and the bytes alive
at most are counted. The share of the peak that a GPU reaches (--mfu) is an estimate.
"""

import argparse
import gc
import math
import sys
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import transformers  # noqa: E402
import yaml  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import data  # noqa: E402
from data import UserError  # noqa: E402
from distributed import decoder_blocks, shard  # noqa: E402
from logprobs import KEPT, Blocks, ResponseLogProbs, chunk_logits  # noqa: E402

USABLE = 0.92  # share of a GPU's memory; the rest is left to the allocator
BATCH_SIZE = 128  # pairs of an optimizer step, unless given

# ---- operations ------------------------------------------------------------------------------------------------------


def windows_of(config) -> list[int | None]:
    """The attention window of each layer, None where a layer sees everything."""
    layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return [window if "sliding" in kind else None for kind in kinds]


def seen_keys(first: int, count: int, window: int | None) -> int:
    """Keys that `count` causal queries at positions first, first + 1, … see in all: Σ min(position + 1, window)."""
    growing = count  # queries that see everything before them; each of the others sees a whole window
    if window is not None:
        growing = max(0, min(count, window - 1 - first))
    keys = growing * first + growing * (growing + 1) // 2
    if growing < count:
        keys += (count - growing) * window
    return keys


def model_flops(model: nn.Module, examples: Sequence[data.Example]) -> float:
    """Floating-point operations that one forward and backward over `examples` has to do, each prompt counted once.

    Body: 6 per weight and token. Head: 6·V·D per scored token. Attention: 12·heads·head_dim per layer and (query, key) pair
    that the mask lets through. What is done twice (checkpointing, the head's second pass, padding) is not counted.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight
    embeddings = {id(model.get_input_embeddings().weight), id(head)}
    body = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    tokens = sum(data.tokens_of(e) for e in examples)
    scored = sum(len(r) for e in examples for r in e.responses)
    attention = 0.0
    for window, layers in Counter(windows_of(config)).items():
        for e in examples:
            prompt = len(e.prompt)
            keys = seen_keys(0, prompt, window)
            for response in e.responses:
                keys += seen_keys(prompt, len(response), window)
            attention += 12.0 * width * layers * keys
    return 6.0 * body * tokens + 6.0 * head.numel() * scored + attention


# ---- bytes -----------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive, now and at most; on fake tensors nothing is really allocated."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            if id(storage) in given or storage in self.known:  # a view or an in-place result is no new memory
                continue
            self.known.add(storage)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, size: int) -> None:
        self.now -= size


class _FusedKernel(torch.autograd.Function):
    """The tensors that FlexAttention's kernel makes and keeps, without its work."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        log_z = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_z)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _, log_z = ctx.saved_tensors
        torch.empty_like(log_z)  # Σ out · grad of each query
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fused_trace(module, query, key, value, attention_mask, **kwargs):
    return _FusedKernel.apply(query, key, value).transpose(1, 2).contiguous(), None


def one_microbatch(
    config, pairs: int, lengths: tuple, dtype: torch.dtype, checkpointing: bool, reference: bool = False, gpu: bool = True
) -> dict:
    """What forward and backward of `pairs` pairs of (prompt, chosen, rejected) tokens take, computed on tensors without memory.

    Args:
        reference: also the token KL to a second model.
        gpu: as on one: attention in the fused kernel, its block masks, the head in larger chunks, of which the first pair fills
            those that are kept and two more; each gradient is freed at once. Else as on this CPU, gradients kept.
    Returns:
        peak: bytes at most alive besides the weights.
        flops: those of `model_flops`: nothing that is done twice.
        parameters, root, block: numbers of all, of those outside the decoder blocks, and of one block.
    """
    prompt, *responses = lengths
    example = data.Example([0] * prompt, [[0] * n for n in responses])
    examples = [example] * pairs
    batch = data.packed_batch(examples)
    chunk = None
    masks = 0
    if gpu:
        transformers.AttentionInterface.register("fused_trace", _fused_trace)
        text = config.get_text_config()
        chunk = chunk_logits("cuda")
        for window in {*windows_of(text), None}:
            masks += sum(x.nbytes for x in tree_leaves(Blocks.of(batch.pairs, window, "cpu")))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        frozen = None
        if reference:
            frozen = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
        policy = ResponseLogProbs(model, frozen, chunk)
        policy.use_layout("packed")
        if gpu:
            for part in filter(None, (model, frozen)):
                part.set_attn_implementation("fused_trace")
        policy = shard(policy, checkpointing=checkpointing)
        tensors = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in batch._asdict().items() if isinstance(v, Tensor)}
        full = (chunk or 0) * (KEPT + 2) // KEPT // config.get_text_config().vocab_size  # two more are alive at once
        missing = max(0, full - sum(responses))
        for name in ("index", "targets", "response", "in_prefix"):
            tensors[name] = nn.functional.pad(tensors[name], (0, missing))

        def after_gradient(p: nn.Parameter) -> None:
            if gpu:
                p.grad = None
            gc.collect()  # dispatch modes tie recomputed tensors into cycles, which a run without them does not

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(after_gradient)
        gc.collect()
        gc.freeze()  # so that collecting looks at what is new only
        with LiveBytes() as live:
            outputs = policy(batch._replace(**tensors), ("kl",) if reference else ())
            sum(x.sum() for x in outputs.values()).backward()
        gc.unfreeze()
    blocks = decoder_blocks(model)
    parameters = sum(p.numel() for p in model.parameters())
    layered = sum(p.numel() for p in nn.ModuleList(blocks).parameters())
    return {
        "peak": live.peak + masks,
        "flops": model_flops(model, examples),
        "parameters": parameters,
        "root": parameters - layered,
        "block": layered // max(1, len(blocks)),
    }


# ---- the answer ------------------------------------------------------------------------------------------------------

BODY = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
SHAPES = {  # published sizes, so that a plan needs no download
    "gemma-2-9b": ("gemma2", dict(hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
                   num_key_value_heads=8, head_dim=256, vocab_size=256000)),
    "llama-3-8b": ("llama", BODY | {"vocab_size": 128256}),
    "mistral-7b": ("mistral", BODY | {"vocab_size": 32000}),
}  # fmt: skip


def config_of(model: str):
    """The configuration of a name in SHAPES, a config.json, a folder that holds one, or a hub name."""
    if model in SHAPES:
        kind, sizes = SHAPES[model]
        return transformers.AutoConfig.for_model(kind, **sizes)
    data.reachable(model)
    try:
        return transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{model}: no configuration there ({reason}); known shapes are {', '.join(SHAPES)}") from error


def settings_of(file: str) -> dict:
    """What a settings file of train.py says of "model" and "batch_size"; a name that begins with a known shape's means that."""
    try:
        settings = yaml.safe_load(Path(file).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: no settings file there ({str(error).splitlines()[0]})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{file}: a settings file is a list of lines `name: value`")
    for shape in SHAPES:
        if Path(file).name.startswith(shape):
            settings["model"] = shape
    return settings


def check(args: argparse.Namespace) -> None:
    """UserError for numbers that cannot be meant."""
    if len(args.lengths) != 3 or min(args.lengths) < 1:
        raise UserError(f"lengths are {args.lengths}; write those of prompt, chosen and rejected, such as 300 350 350")
    for name in ("gpus", "gpu_memory", "rows", "batch_size", "mfu", "tflops"):
        value = getattr(args, name)
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            raise UserError(f"{name} is {value}; it must be a number above 0")


def plan(args: argparse.Namespace) -> str:
    """Memory per GPU, the largest token budget and the time of one epoch, as text."""
    settings = settings_of(args.settings) if args.settings else {}
    if args.batch_size is None:
        args.batch_size = settings.get("batch_size", BATCH_SIZE)
    model = args.model or settings.get("model")
    if not model:
        raise UserError("there is no model; give --model or a settings file that names one")
    check(args)
    config = config_of(str(model))
    lines = []
    for checkpointing in (True, False):
        one = one_microbatch(config, 1, args.lengths, torch.bfloat16, checkpointing, args.reference)
        three = one_microbatch(config, 3, args.lengths, torch.bfloat16, checkpointing, args.reference)
        lines.append(f"{'with' if checkpointing else 'without'} --gradient-checkpointing, per GPU:")
        lines += fit(one, (three["peak"] - one["peak"]) / 2, args)
    flops = (three["flops"] - one["flops"]) / 2 * args.rows
    if args.reference:
        flops *= 4 / 3  # its forward; a forward is a third of the whole
    hours = flops / (args.gpus * args.tflops * 1e12 * args.mfu) / 3600
    rows = f"{args.rows} pairs of {' + '.join(map(str, args.lengths))} tokens"
    head = f"{one['parameters'] / 1e9:.2f} B parameters; {rows}; {args.gpus} GPUs of {args.gpu_memory:g} GB"
    tail = [
        f"one epoch: {flops:.3g} flops (nothing counted twice), {hours:.2f} h, {hours * args.gpus:.1f} GPU-hours at "
        f"{args.mfu:.0%} of {args.tflops:g} Tflop/s",
        "Bytes are counted on tensors without memory, the share of the peak is an estimate; measure both with "
        "python tests/studies/benchmark.py --gpu",
    ]
    return "\n".join([head, *lines, *tail])


def fit(one: dict, per_pair: float, args: argparse.Namespace) -> list[str]:
    """What a GPU holds with one pair in a microbatch, a line each, and how many pairs fit.

    Args:
        one: `one_microbatch` of one pair.
        per_pair: bytes of each further one.
    """
    size, root, block = one["parameters"], one["root"], one["block"]
    own = -(-size // args.gpus)  # parameters of which a GPU owns the fp32 weight and moments
    if args.gpus > 1:
        gathered = 2 * (root + 2 * block)
        gathered_gradients = 4 * root + 6 * block
        whole_gradients = 4 * size  # of several microbatches: reduced after the last
    else:
        gathered = 2 * size
        gathered_gradients = 0
        whole_gradients = 0
    parts = {
        "fp32 weights": 4 * own,
        "Adam moments": 8 * own,
        "gradients, reduced": 4 * own,
        "gathered 16-bit weights (root, two blocks)": gathered,
        "gathered gradients (root in fp32, one block)": gathered_gradients,
        "first pair: activations and head chunk": one["peak"],
    }
    if args.reference:
        parts["reference, fp32"] = 4 * own
        parts["reference, gathered 16-bit weights"] = gathered
    parts["sum"] = sum(parts.values())
    parts["each further pair"] = per_pair
    lines = [f"  {name:<48}{value / 2**30:9.2f} GiB" for name, value in parts.items()]
    free = USABLE * args.gpu_memory * 1e9 - parts["sum"]
    pairs_once = 1 + int(free // per_pair)  # in a step of one microbatch
    if pairs_once >= -(-args.batch_size // args.gpus):
        budget = pairs_once * sum(args.lengths)
        return [*lines, f"  fits: a step of {args.batch_size} pairs is one microbatch; --tokens-per-microbatch up to {budget}"]
    pairs = 1 + int((free - whole_gradients) // per_pair)
    if pairs < 1:
        return [*lines, "  does not fit"]
    more = f"  fits, with {whole_gradients / 2**30:.2f} GiB more for gradients that stay whole between microbatches:"
    return [*lines, more, f"  --tokens-per-microbatch up to {pairs * sum(args.lengths)}"]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="?", help="a settings file of train.py: its model and batch size, unless given")
    parser.add_argument("--model", help=f"config.json, folder, hub name, or a shape: {', '.join(SHAPES)}")
    parser.add_argument("--reference", action="store_true", help="with the sharded second model of token-KL objectives")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs that the model is sharded over (8)")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GB (10⁹ bytes) of one GPU; 8 in 100 are not used (80)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[300, 350, 350], help="tokens of prompt, chosen, rejected")
    parser.add_argument("--rows", type=int, default=60_000, help="pairs of one epoch (60000)")
    parser.add_argument("--batch-size", type=int, help=f"pairs of one optimizer step, all GPUs together ({BATCH_SIZE})")
    parser.add_argument("--mfu", type=float, default=0.25, help="share of the peak that is reached: an estimate (0.25)")
    parser.add_argument("--tflops", type=float, default=989.0, help="dense bf16 peak of one GPU (989: an H100 or H200)")
    data.command_line(lambda argv: print(plan(parser.parse_args(argv))), argv)


if __name__ == "__main__":
    main()
