"""From a causal language model to the log-probability of a response.

`response_logprob` is the definition, in six lines. Everything after it computes the same number for many responses at once:
only the positions that predict a response token reach the head, in chunks, so that the (tokens × vocabulary) logits of a
batch never exist at once, and a prompt is computed once for all its responses. This file knows no data format and no loss.

    policy = ResponseLogProbs(model)           # any transformers causal language model
    policy.use_layout("packed")                # or "padded"; must match the batches
    logp = policy(batch)["logp"]               # (R,) fp32 sums in nats, one per response

Shape letters: B pairs · R responses (2B for pairs) · T tokens of a batch · N scored tokens · D hidden · V vocabulary · H heads.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint


def response_logprob(model: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """log π(response | prompt) = Σₜ log softmax(logitsₜ)[responseₜ], nats: the textbook, one response at a time."""
    ids = torch.tensor([prompt + response], device=model.device)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]  # the prompt's last position predicts the first token
    logp = logits.log_softmax(-1)
    return logp.gather(-1, ids[0, len(prompt) :, None]).sum()


# ---- the head, in chunks ---------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """The map from hidden states to logits: logits = softcap · tanh(scale · (hidden · weightᵀ + bias) / softcap)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None


def head_of(model: nn.Module) -> Head:
    """The head of a model, with its config's logit scale and soft-cap, under the names that model families have for them. One
    that does anything else is found out by comparing with `own_logprobs`, not guessed at here."""
    linear = model.get_output_embeddings()
    config = model.config.get_text_config()

    def named(*names: str) -> float | None:
        values = [getattr(config, name, None) for name in names]
        return next(filter(None, values), None)

    factor = named("logit_scale", "lm_head_multiplier", "output_multiplier") or 1.0
    divisor = named("logits_scaling", "logits_mup_width_multiplier") or 1.0
    softcap = named("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return Head(linear.weight, getattr(linear, "bias", None), factor / divisor, softcap)


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """(N, D) hidden states → (N, V) logits in at least fp32; the product itself runs in the dtype of `hidden`."""
    bias = None if head.bias is None else head.bias.to(hidden.dtype)
    logits = F.linear(hidden, head.weight.to(hidden.dtype), bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if head.scale != 1.0:
        logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in fp32 for bf16 factors too."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cpu":  # which has no such kernel: each product is rounded to bf16
        total.add_(a @ b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)  # torch ≥ 2.10


KEPT = 16  # parts of the vocabulary whose logits forward keeps for backward, which makes the others again


class _ChunkedLogProb(torch.autograd.Function):
    """log softmax(logits)[target] per token, from the logits of one part of the vocabulary after another: a part stays in the
    cache, and each row of the head's gradient is made once.

    With p = softmax(logits):  ∂logp/∂logits = onehot(target) − p. Through the soft-cap z = c·tanh(x/c) comes 1 − (z/c)².
    """

    @staticmethod
    def parts(head: Head, width: int, targets: Tensor):
        """Of each part its rows of the head, these, the place of each target among them, (N, 1), and whether it is there."""
        for start in range(0, len(head.weight), width):
            rows = slice(start, start + width)
            part = head._replace(weight=head.weight[rows], bias=None if head.bias is None else head.bias[rows])
            place = (targets - start)[:, None]
            inside = place.clamp(0, len(part.weight) - 1)
            yield rows, part, inside, place == inside

    @staticmethod
    def forward(ctx, hidden, weight, bias, scale, softcap, targets, width, log_sum_p_squared):
        ctx.kept = {}
        logp = total = squares = hidden.new_zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        highest = torch.full_like(logp, float("-inf"))  # logit so far; Σ exp(logit − highest), and of the squares of that
        for rows, part, place, there in _ChunkedLogProb.parts(Head(weight, bias, scale, softcap), width, targets):
            logits = logits_of(hidden, part)
            logp = logp + logits.gather(-1, place).mul_(there).squeeze(-1)
            if len(ctx.kept) < KEPT:
                ctx.kept[rows.start] = logits
            before = highest
            highest = highest.maximum(logits.amax(-1))
            weights = (logits - highest[:, None]).exp_()
            total = total * (before - highest).exp() + weights.sum(-1)
            if log_sum_p_squared is not None:
                squares = squares * (2 * (before - highest)).exp() + weights.square_().sum(-1)
        if log_sum_p_squared is not None:
            log_sum_p_squared.copy_(squares.log() - 2 * total.log())
        ctx.save_for_backward(hidden, weight, bias, targets, highest, total)
        ctx.how = (scale, softcap, width)
        return logp - highest - total.log()

    @staticmethod
    def backward(ctx, grad_logp):
        hidden, weight, bias, targets, highest, total = ctx.saved_tensors
        scale, softcap, width = ctx.how
        grad_logp = (grad_logp * scale)[:, None]
        grad_hidden = torch.zeros_like(hidden, dtype=total.dtype)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for rows, part, place, there in _ChunkedLogProb.parts(Head(weight, bias, scale, softcap), width, targets):
            logits = ctx.kept.pop(rows.start, None)
            if logits is None:
                logits = logits_of(hidden, part)
            grad = (logits - highest[:, None]).exp_().mul_(-grad_logp / total[:, None])
            grad.scatter_add_(-1, place, grad_logp * there)
            if softcap is not None:
                grad.addcmul_(grad, logits.square(), value=-1 / softcap**2)
            if bias is not None:
                grad_bias[rows] = grad.sum(0)
            grad = grad.to(hidden.dtype)
            _add_product(grad_hidden, grad, part.weight.to(hidden.dtype))
            _add_product(grad_weight[rows], grad.T, hidden)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias, None, None, None, None, None


def chunk_logits(device: str) -> int:
    """Logits that are kept at once: 128 MiB of them in fp32 on CPUs, 1 GiB elsewhere."""
    return 2**25 if device == "cpu" else 2**28


def token_logprobs(
    hidden: Tensor, head: Head, targets: Tensor, chunk: int | None = None, log_sum_p_squared: Tensor | None = None
) -> Tensor:
    """Log-probs of the tokens `targets` (N,), in nats, fp32 (fp64 for fp64 input), from the states (N, D) that predict them.

    chunk: logits that are kept at once, of which a part is made at a time; None picks `chunk_logits`.
    log_sum_p_squared: (N,) fp32, to be filled with log Σ_v p(v)², the log of a drawn token's expected probability.
    Gradients reach hidden, head.weight and head.bias.
    """
    kind = hidden.device.type
    width = (chunk or chunk_logits(kind)) // KEPT // max(1, len(hidden))
    width = max(1, width - width % 64 if width > 64 else width)  # in whole tiles of the products
    with torch.autocast(kind, enabled=False):
        return _ChunkedLogProb.apply(hidden, *head, targets, width, log_sum_p_squared)


def _kl_rows(hidden: Tensor, ref_hidden: Tensor, head: Head, ref_head: Head) -> Tensor:
    log_p = logits_of(hidden, head).log_softmax(-1)
    ref_log_p = logits_of(ref_hidden, ref_head).log_softmax(-1)
    return (ref_log_p.exp() * (ref_log_p - log_p)).sum(-1)


def token_kl(hidden: Tensor, ref_hidden: Tensor, head: Head, ref_head: Head, chunk: int | None = None) -> Tensor:
    """KL(π_ref ‖ π_θ) over the whole vocabulary at each position, the D of TDPO (Zeng et al. 2024, arXiv 2404.11999).

    D = Σ_v π_ref(v) (log π_ref(v) − log π_θ(v)), from two log-softmaxes in fp32; ∂D/∂logits = π_θ − π_ref. (N,) nats from
    the policy's and the reference's states (N, D), chunk by chunk, again in backward. No gradient reaches the reference.
    """
    ref_hidden = ref_hidden.detach()
    ref_head = ref_head._replace(weight=ref_head.weight.detach())
    kind = hidden.device.type
    rows = max(1, (chunk or chunk_logits(kind)) // len(head.weight) // 2)
    parts = []
    with torch.autocast(kind, enabled=False):
        for part, ref_part in zip(hidden.split(rows), ref_hidden.split(rows)):
            parts.append(checkpoint(_kl_rows, part, ref_part, head, ref_head, use_reentrant=False))
    return torch.cat(parts)


# ---- attention over packed pairs that share their prompt ---------------------------------------------------------------

Pairs = list[tuple[int, list[int]]]  # of a packed sequence: length of the prompt and of each response of every pair

QUERY_BLOCK = 128  # tokens attended at once


class _BlockwiseAttention(torch.autograd.Function):
    """softmax(s) · value, s = scaling · query · keyᵀ, soft-capped, + mask: one block of queries at a time, and only the keys
    that it sees. Backward makes the weights again, so that what is kept grows with the tokens, not with their square.

    (G, rows, d), (G, T, d), (G, T, d) → (G, rows, d) for G key heads; blocks: (rows of query, keys, mask) of each.
    With p = softmax(s):  ∂L/∂s = p ∘ (∂L/∂p − Σ p ∘ ∂L/∂p). Through the soft-cap c · tanh comes 1 − tanh².
    """

    @staticmethod
    def weights(query: Tensor, key: Tensor, mask: Tensor, scaling: float, softcap: float | None) -> tuple:
        if softcap is None:
            return torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scaling).softmax(-1), None
        capped = torch.tanh(query.bmm(key.transpose(1, 2)) * (scaling / softcap))
        return torch.add(mask, capped, alpha=softcap).softmax(-1), capped

    @staticmethod
    def forward(ctx, query, key, value, blocks, *how):
        out = value.new_empty(*query.shape[:2], value.shape[-1])
        for rows, keys, mask in blocks:
            weights, _ = _BlockwiseAttention.weights(query[:, rows], key[:, keys], mask, *how)
            out[:, rows] = weights.bmm(value[:, keys])
        ctx.save_for_backward(query, key, value)
        ctx.how = (blocks, *how)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value = ctx.saved_tensors
        blocks, scaling, softcap = ctx.how
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        for rows, keys, mask in blocks:
            weights, capped = _BlockwiseAttention.weights(query[:, rows], key[:, keys], mask, scaling, softcap)
            grad_value[:, keys] += weights.transpose(1, 2).bmm(grad_out[:, rows])
            grad = grad_out[:, rows].bmm(value[:, keys].transpose(1, 2))
            grad = torch._softmax_backward_data(grad, weights, -1, weights.dtype)
            if softcap is not None:
                grad.addcmul_(grad, capped.square_(), value=-1)
            grad_query[:, rows] = grad.bmm(key[:, keys])
            grad_key[:, keys] += grad.transpose(1, 2).bmm(query[:, rows])
        return grad_query.mul_(scaling), grad_key.mul_(scaling), grad_value, None, None, None


class PrefixSharedPairs:
    """Attention pair by pair: no mask of all pairs is kept. A class, as torch.compile makes constants of a list's numbers."""

    def __init__(self, pairs: Pairs):
        self.pairs = pairs
        self.blocks = {}  # of each kind of layer, made in the first of that kind

    @torch._disable_dynamo  # torch.compiler.disable, which would import the compiler here: two seconds of every start
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None):
        """(1, H, T, d), (1, G, T, d), (1, G, T, d) → (1, H, T, d); the H/G heads that share a key head become rows of it."""
        heads = query.shape[1] // key.shape[1]
        kind = (heads, value.dtype, value.device, window)
        if kind not in self.blocks:
            self.blocks[kind] = list(self._blocks(*kind))
        rows = query[0].unflatten(0, (-1, heads)).transpose(1, 2).flatten(1, 2)
        out = _BlockwiseAttention.apply(rows, key[0], value[0], self.blocks[kind], scaling, softcap)
        return out.unflatten(1, (-1, heads)).transpose(0, 1).flatten(1, 2).transpose(0, 1)[None]  # as the caller wants memory

    def _blocks(self, heads: int, dtype: torch.dtype, device: torch.device, window: int | None):
        """Each pair is one sequence under one mask. Of each block: its rows, the keys that any of them sees, their mask."""
        start = 0
        for pair in self.pairs:
            mask = pairs_mask([pair], dtype, device, window)[0, 0]
            own, low, high = seen_ranges([pair], window)
            for first in range(0, len(mask), QUERY_BLOCK):
                end = min(first + QUERY_BLOCK, len(mask))
                keys = np.union1d(np.arange(low[first:end].min(), high[first:end].max()), np.arange(own[first:end].min(), end))
                rows = slice(heads * (start + first), heads * (start + end))
                part = mask[first:end, to_device(torch.from_numpy(keys), device)].repeat_interleave(heads, dim=0)
                yield rows, slice(start, start + end) if len(keys) == end else torch.from_numpy(start + keys), part
            start += len(mask)


BLOCK = 128  # queries, and keys, that FlexAttention takes at once
FUSED = ("cuda",)  # devices on which it takes a whole packed sequence, forward and backward


def seen_ranges(pairs: Pairs, window: int | None = None, block: int | None = None) -> np.ndarray:
    """What each token of a packed sequence sees, (3, T) int32: own, low, high of the token at index q.

    It sees the keys own … q of its own prompt or response and low … high − 1 of the prompt before it (none if it is in a
    prompt). A window counts positions, not indices, and cuts both from below. With `block`, T is filled up to whole blocks by
    a prompt that is nobody's: at least two, as shorter sequences would get torch's decoding kernel, and a size of 1 a graph
    of its own.
    """
    if block is not None:
        tokens = sum(prompt + sum(responses) for prompt, responses in pairs)
        blocks = max(2, -(-tokens // block))
        pairs = [*pairs, (blocks * block - tokens, [])]
    ranges, lengths = [], []  # of each prompt and each response: own, low, high; its tokens
    start = 0
    for prompt, responses in pairs:
        prompt_start = start
        prompt_end = start + prompt
        ranges.append((prompt_start, prompt_start, prompt_start))
        lengths.append(prompt)
        start = prompt_end
        for response in responses:
            ranges.append((start, prompt_start, prompt_end))
            lengths.append(response)
            start += response
    own, low, high = np.array(ranges).repeat(lengths, axis=0).T
    if window is not None:
        index = np.arange(len(own))
        position = (high - low) + (index - own)
        low = np.clip(low + position - window + 1, low, high)
        own = np.maximum(own, index - window + 1)
    return np.stack([own, low, high]).astype(np.int32)


def _cells_before(edge: np.ndarray) -> np.ndarray:
    """(n, n): of T = BLOCK·n queries, how many cells (q, k) with k < edge[q] lie in query block i and key block j."""
    n = len(edge) // BLOCK
    query_block = np.arange(len(edge)) // BLOCK
    key_block = edge // BLOCK  # cut by the edge, 0 … n; those before it count wholly
    at = query_block * (n + 1) + key_block
    cut = np.bincount(at, edge % BLOCK, n * (n + 1)).reshape(n, n + 1)
    edges = np.bincount(at, minlength=n * (n + 1)).reshape(n, n + 1)
    edges_from_here_on = edges[:, ::-1].cumsum(axis=1)[:, ::-1]
    return cut[:, :n] + BLOCK * edges_from_here_on[:, 1:]


def _sent(array: np.ndarray, device) -> Tensor:
    """An int32 tensor on the device, of which no size is a constant to the compiler."""
    tensor = to_device(torch.from_numpy(array.astype(np.int32)), device)
    torch._dynamo.maybe_mark_dynamic(tensor, list(range(tensor.ndim)))
    return tensor


def pairs_mask(pairs: Pairs, dtype: torch.dtype, device, window: int | None = None) -> Tensor:
    """The same as an additive mask (1, 1, T, T), for one pair or models whose attention cannot be exchanged. O(T²) memory."""
    own, low, high = to_device(torch.from_numpy(seen_ranges(pairs, window)), device)[:, :, None]
    key = torch.arange(len(own), device=device)
    query = key[:, None]
    seen = ((own <= key) & (key <= query)) | ((low <= key) & (key < high))
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


class Blocks(NamedTuple):
    """What FlexAttention needs to know of a sequence of n blocks, for one window; nothing of it is a constant of the kernel.

    ranges: own, low, high of `seen_ranges`, (128·n,) each.
    lists: how many (n,) and which (n, n) key blocks each query block sees in part, then in full; and, for the backward pass,
        the same of the query blocks that see each key block.
    """

    ranges: tuple[Tensor, ...]
    lists: tuple[Tensor, ...]

    @classmethod
    def of(cls, pairs: Pairs, window: int | None, device) -> "Blocks":
        """Found on the host, so that no GPU is waited for, in O(T + n²) time and memory, never O(T²)."""
        own, low, high = seen_ranges(pairs, window, BLOCK)
        after = np.arange(1, len(own) + 1)  # the first key after the query's own
        seen_cells = _cells_before(after) - _cells_before(own) + _cells_before(high) - _cells_before(low)
        full = seen_cells == BLOCK**2
        part = (seen_cells > 0) & ~full
        lists = []
        for seen in (part, full, part.T, full.T):
            lists.append(seen.sum(axis=1))
            lists.append(np.argsort(~seen, axis=1, kind="stable"))  # those that are seen come first, in their order
        return cls(tuple(_sent(x, device) for x in (own, low, high)), tuple(_sent(x, device) for x in lists))

    def mask(self) -> BlockMask:
        def sees(batch, head, q, k):
            own, low, high = (x[q] for x in self.ranges)
            return ((own <= k) & (k <= q)) | ((low <= k) & (k < high))

        size = self.ranges[0].shape[0]
        lists = (x[None, None] for x in self.lists)  # the same for every batch and head
        return BlockMask((size, size), *lists, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees)


def to_device(tensor: Tensor, device) -> Tensor:
    """A copy of a tensor of the host that nobody waits for: while the host goes on, CUDA can read pinned memory only."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def compiled(function, dim: int, **how):
    """torch.compile(function, …) for packed sequences, given any `blocks` by name; in other tensors `dim` counts tokens.

    Only what differs between sequences is no constant of the graph, so there is one for all, and sizes that are equal by
    chance are not taken for the same. A soft-cap is a constant: as an input it would break the graph under grad.
    """
    torch._dynamo.config.specialize_float = True
    torch._dynamo.config.recompile_limit = 64  # a graph each for train and eval, of every model in this process
    fast = torch.compile(function, **how)

    def call(*args, blocks=None, **kwargs):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.ndim > dim:
                torch._dynamo.maybe_mark_dynamic(x, dim)
        return fast(*args, blocks=blocks, **kwargs)

    return call


def _flex(query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, blocks: Blocks) -> Tensor:
    """The whole sequence in one kernel that skips the blocks in which nothing is seen. (1, H, T, d)."""
    size = blocks.ranges[0].shape[0]  # said here, so that the compiler knows it and the kernel checks no bounds
    if not query.shape[2] == key.shape[2] == value.shape[2] == size or size % BLOCK:
        raise ValueError(f"a sequence of {query.shape[2]} tokens is not filled up to {size}, in blocks of {BLOCK}")

    def capped(score, batch, head, q, k):
        return softcap * torch.tanh(score / softcap)

    cap = None if softcap is None else capped
    return flex_attention(query, key, value, score_mod=cap, block_mask=blocks.mask(), scale=scaling, enable_gqa=True)


@functools.cache
def _compiled_flex():
    return compiled(_flex, dim=2, fullgraph=True)  # uncompiled, it would write out (T, T) scores; better an error


def prefix_shared_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, pairs=None, blocks=None,
    **kwargs
):  # fmt: skip
    """Attention over a packed sequence, in the form transformers' AttentionInterface calls: (1, H, T, d) → (1, T, H, d).

    A query sees the keys of its own pair that come earlier, in the prompt or in its own response. Given `pairs`, each pair
    is attended to on its own; given `blocks` {window: Blocks}, one kernel takes the whole sequence.
    """
    if pairs is None and blocks is None:
        raise ValueError('attention is set to packed sequences, but this batch is none; call use_layout("padded") first')
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("packed layout: attention sinks and position biases are not supported; use --layout padded")
    if blocks is not None and sliding_window not in blocks:
        raise ValueError(
            f"packed layout: the config knows no window of {sliding_window}, which a layer has; use --layout padded"
        )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    query = query.to(value.dtype)  # under autocast rotary embeddings leave them in fp32
    key = key.to(value.dtype)
    if blocks is not None:
        flex = _flex if torch.compiler.is_compiling() else _compiled_flex()
        out = flex(query, key, value, scaling, softcap, blocks=blocks[sliding_window])
    else:
        out = pairs.attend(query, key, value, scaling, sliding_window, softcap)
    return out.transpose(1, 2).contiguous(), None


@functools.cache
def packed_attention() -> str:
    """The name under which transformers knows `prefix_shared_attention`."""
    from transformers import AttentionInterface  # late, as it takes two seconds that `--help` need not wait

    AttentionInterface.register("prefix_shared", prefix_shared_attention)
    return "prefix_shared"


# ---- the policy ------------------------------------------------------------------------------------------------------


class ResponseLogProbs(nn.Module):
    """A causal language model that answers a batch with one summed log-prob per response instead of logits.

    reference: a second one, frozen, only for token KLs and for a reference that moves.
    chunk: see `token_logprobs`; the token KL, which has the logits of two models, takes half as many of each.
    """

    def __init__(self, model: nn.Module, reference: nn.Module | None = None, chunk: int | None = None):
        super().__init__()
        self.model = model
        self.reference = reference
        self.chunk = chunk
        self.layout = "padded"
        self.native_attention = model.config._attn_implementation

    def use_layout(self, layout: str) -> str:
        """Attention for "packed" or "padded" batches ("padded" is the models' own, which generation needs too).

        Policy and reference change together; returns the layout before.
        """
        before = self.layout
        self.layout = layout
        for model in (self.model, self.reference):
            if model is not None and model._can_set_attn_implementation():
                model.set_attn_implementation(packed_attention() if layout == "packed" else self.native_attention)
        return before

    def run_unsharded(self, function, *args, **kwargs):
        """function(model, …) as part of this module: where it is sharded, what only its forward gathers is whole meanwhile."""
        return function(self.model, *args, **kwargs)

    @staticmethod
    def states(model: nn.Module, batch) -> Tensor:
        """Hidden states at the scored positions, (N, D), in the dtype of matmuls: bf16 under autocast, else their own.

        `batch.pairs` is None for the padded layout: ids alone, as padding is on the right, where a causal position never looks.
        """
        ids = batch.input_ids
        kind = ids.device.type
        attention = {} if batch.pairs is None else {"position_ids": batch.position_ids}
        if batch.pairs is not None and not model._can_set_attn_implementation():
            attention["attention_mask"] = pairs_mask(batch.pairs, model.dtype, ids.device)
        elif batch.pairs is not None and kind in FUSED:
            windows = {None, getattr(model.config.get_text_config(), "sliding_window", None)}
            blocks = {window: Blocks.of(batch.pairs, window, ids.device) for window in windows}
            missing = len(blocks[None].ranges[0]) - ids.shape[1]
            ids = F.pad(ids, (0, missing))
            attention = {"position_ids": F.pad(batch.position_ids, (0, missing)), "blocks": blocks}
        elif batch.pairs is not None:
            attention["pairs"] = PrefixSharedPairs(batch.pairs)
        body = getattr(model, model.base_model_prefix, None) or model.model  # Llama-4's prefix names nothing that it has
        out = body(input_ids=ids, use_cache=False, **attention)
        hidden = out.last_hidden_state.flatten(0, 1)[batch.index]
        return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden

    def forward(self, batch, outputs: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Sums over each response, (R,), nats, fp32: "logp", the log-probs of its tokens; and what `outputs` names of

        kl                 Σ_t KL(π_ref ‖ π_θ) over the whole vocabulary
        prefix_logp        the log-probs of those tokens that `batch.in_prefix` marks
        log_sum_p_squared  Σ_t log Σ_v π_θ(v)², without gradient
        ref                "logp" under the reference, without gradient; with "prefix_logp", "ref_prefix_logp" too
        """
        per_token = {}
        if "kl" in outputs or "ref" in outputs:  # before the policy's pass, which keeps activations for backward
            with torch.no_grad():
                ref_hidden = self.states(self.reference, batch)
                ref_head = head_of(self.reference)
                if "ref" in outputs:
                    per_token["ref"] = token_logprobs(ref_hidden, ref_head, batch.targets, self.chunk)
        hidden = self.states(self.model, batch)
        head = head_of(self.model)
        if "kl" in outputs:
            per_token["kl"] = token_kl(hidden, ref_hidden, head, ref_head, self.chunk)
        log_sum_p_squared = None
        if "log_sum_p_squared" in outputs:
            log_sum_p_squared = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
            per_token["log_sum_p_squared"] = log_sum_p_squared
        logp = token_logprobs(hidden, head, batch.targets, self.chunk, log_sum_p_squared)  # last, as it keeps logits
        per_token["logp"] = logp
        if "prefix_logp" in outputs:
            per_token["prefix_logp"] = logp * batch.in_prefix
        if "prefix_logp" in outputs and "ref" in outputs:
            per_token["ref_prefix_logp"] = per_token["ref"] * batch.in_prefix
        zero = logp.new_zeros(batch.responses)
        return {name: zero.index_add(0, batch.response, values) for name, values in per_token.items()}


# ---- what a model says, and whether we score it right ------------------------------------------------------------------


@torch.no_grad()
def continuations(
    model: nn.Module, tokenizer, prompts: list[list[int]], max_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
    together: bool = False,
) -> tuple[list[list[int]], list[bool]]:  # fmt: skip
    """What the model answers to prompts of token ids, as one batch padded on the left, with its own attention: ids of at most
    `max_tokens` tokens, with the token that ended them, and whether each ended by itself.

    temperature: 0 is greedy; else sampled by torch's global generator, from the share `top_p` of the probability.
    together: the model is sharded over processes, which all take as many steps as the one that takes the most.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    stop = model.generation_config.eos_token_id or tokenizer.eos_token_id
    stops = stop if isinstance(stop, list) else [stop]
    width = max(len(prompt) for prompt in prompts)
    ids, mask = [], []
    for prompt in prompts:
        padding = width - len(prompt)
        ids.append([pad] * padding + prompt)
        mask.append([0] * padding + [1] * len(prompt))
    sampling = dict(do_sample=False, temperature=None, top_p=None, top_k=None)
    if temperature > 0:
        sampling = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    plain = dict(stop_strings=None, return_dict_in_generate=False)  # which a generation config may set otherwise
    out = model.generate(
        input_ids=torch.tensor(ids, device=model.device), attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max_tokens, eos_token_id=stop, pad_token_id=pad, synced_gpus=together, **sampling, **plain
    )  # fmt: skip
    answers, ended = [], []
    for generated in out[:, width:].tolist():
        length = 0
        while length < len(generated) and generated[length] not in stops:
            length += 1
        answers.append(generated[: length + 1])
        ended.append(length < len(generated))
    return answers, ended


def as_texts(tokenizer, answers: list[list[int]], ended: list[bool]) -> list[str]:
    """Answers of `continuations` without the token that ended them, special tokens and outer whitespace."""
    bare = [answer[: len(answer) - end] for answer, end in zip(answers, ended)]
    return [text.strip() for text in tokenizer.batch_decode(bare, skip_special_tokens=True)]


def completions(model: nn.Module, tokenizer, prompts: list[list[int]], *args, **how) -> tuple[list[str], list[bool]]:
    """`continuations` as texts."""
    answers, ended = continuations(model, tokenizer, prompts, *args, **how)
    return as_texts(tokenizer, answers, ended), ended


@torch.no_grad()
def own_logprobs(model: nn.Module, prompt: list[int], response: list[int]) -> tuple[Tensor, float]:
    """Log-probs of a response's tokens by the model's own logits, with nothing beside it: (n,) nats, fp32; and the spread of
    these logits over the vocabulary, their standard deviation, by which differences of an untrained model are measured."""
    ids = torch.tensor([prompt + response], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    logp = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
    return logp, logits.std(-1).mean().item()
