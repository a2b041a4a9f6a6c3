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
    """The head of a transformers model, with its config's logit scale (Cohere multiplies, Granite divides) and soft-cap.

    A model that does anything else between hidden state and logits is found out by `check_head`, not guessed at here.
    """
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(linear.weight, getattr(linear, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


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


class _ChunkedLogProb(torch.autograd.Function):
    """log softmax(logits)[target] per token; logits are made chunk by chunk and made again in backward, but for the last ones.

    With p = softmax(logits):  ∂logp/∂logits = onehot(target) − p. Through the soft-cap z = c·tanh(x/c) comes 1 − (z/c)².
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap, chunk, power):
        logp = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        head, logits = Head(weight.to(hidden.dtype), bias, scale, softcap), None  # cast once per batch, not once per chunk
        for i in reversed(range(0, len(hidden), chunk)):
            rows = slice(i, i + chunk)
            del logits  # before those of the next chunk are made
            logits = logits_of(hidden[rows], head)
            each = logits.log_softmax(-1)
            logp[rows] = each.gather(-1, targets[rows, None]).squeeze(-1)
            if power is not None:
                power[rows] = each.mul_(2).logsumexp(-1)
            del each
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.how, ctx.logits = (scale, softcap, chunk), logits  # backward comes next, and begins with these
        return logp

    @staticmethod
    def backward(ctx, grad_logp):
        hidden, weight, bias, targets = ctx.saved_tensors
        (scale, softcap, chunk), logits, ctx.logits = ctx.how, ctx.logits, None
        head, factors = Head(weight.to(hidden.dtype), bias, scale, softcap), (grad_logp * scale)[:, None]
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for i in range(0, len(hidden), chunk):
            rows = slice(i, i + chunk)
            logits = logits_of(hidden[rows], head) if logits is None else logits
            grad = logits.softmax(-1).mul_(-factors[rows]).scatter_add_(-1, targets[rows, None], factors[rows])
            if softcap is not None:
                grad.addcmul_(grad, logits.square_(), value=-1 / softcap**2)
            logits = None
            if grad_bias is not None:
                grad_bias += grad.sum(0).to(bias.dtype)
            grad = grad.to(hidden.dtype)
            grad_hidden[rows] = grad @ head.weight
            if grad_weight is not None:
                _add_product(grad_weight, grad.T, hidden[rows])
            del grad  # before the logits of the next chunk are made
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def chunk_rows(vocabulary: int, device: str) -> int:
    """Tokens whose logits exist at once: 128 MiB of them in fp32 on CPUs; 1 GiB elsewhere, in whole tiles of 128 tokens."""
    return max(1, 2**25 // vocabulary) if device == "cpu" else max(128, 2**28 // vocabulary // 128 * 128)


def _as_computed(hidden: Tensor) -> Tensor:
    """`hidden` in the dtype that matmuls use here: bf16 under autocast, else its own."""
    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


def token_logprobs(
    hidden: Tensor, head: Head, targets: Tensor, chunk: int | None = None, power: Tensor | None = None
) -> Tensor:
    """Log-probability of each target token.

    Args:
        hidden: (N, D) states at the positions that predict the targets.
        head: the output layer.
        targets: (N,) token ids.
        chunk: tokens whose logits exist at once; None picks `chunk_rows`.
        power: (N,) fp32, to be filled with log Σ_v p(v)², the log of the probability that a token drawn there has on average.
    Returns:
        (N,) log-probs in nats, fp32 (fp64 for fp64 input). Gradients reach hidden, head.weight and head.bias.
    """
    hidden, kind = _as_computed(hidden), hidden.device.type
    chunk = chunk or chunk_rows(len(head.weight), kind)
    with torch.autocast(kind, enabled=False):
        return _ChunkedLogProb.apply(hidden, head.weight, head.bias, targets, head.scale, head.softcap, chunk, power)


def _kl_rows(hidden: Tensor, ref_hidden: Tensor, head: Head, ref_head: Head) -> Tensor:
    logp, ref = logits_of(hidden, head).log_softmax(-1), logits_of(ref_hidden, ref_head).log_softmax(-1)
    return (ref.exp() * (ref - logp)).sum(-1)


def token_kl(hidden: Tensor, ref_hidden: Tensor, head: Head, ref_head: Head, chunk: int | None = None) -> Tensor:
    """KL(π_ref ‖ π_θ) over the whole vocabulary at each position, the D of TDPO (Zeng et al. 2024, arXiv 2404.11999).

    D = Σ_v π_ref(v) (log π_ref(v) − log π_θ(v)), from two log-softmaxes in fp32; ∂D/∂logits = π_θ − π_ref.

    Args:
        hidden, ref_hidden: (N, D) policy and reference states at the same positions; no gradient reaches the reference.
        head, ref_head: their output layers.
        chunk: positions whose logits exist at once; each chunk is computed again in backward.
    Returns:
        (N,) nats, fp32 (fp64 for fp64 input).
    """
    hidden, ref_hidden = _as_computed(hidden), _as_computed(ref_hidden.detach())
    rows = chunk or chunk_rows(2 * len(head.weight), hidden.device.type)
    ref_head = Head(ref_head.weight.detach(), *ref_head[1:])
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [
            checkpoint(_kl_rows, h, r, head, ref_head, use_reentrant=False)
            for h, r in zip(hidden.split(rows), ref_hidden.split(rows))
        ]
    return torch.cat(parts)


# ---- attention over packed trees -------------------------------------------------------------------------------------


QUERY_BLOCK = 256  # queries attended at once in the matmul form; keys later than the block are skipped


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None) -> Tensor:
    """Attention of the last q of k tokens of one sequence over all k: token i sees j with i − window < j ≤ i.

    (1, H, q, d), (1, G, k, d), (1, G, k, d) → (1, H, q, d), with H a multiple of G (grouped queries).
    torch's fused kernel where it is the faster one; written out as matmuls for the soft-cap, and for bf16 on CPUs, where the
    fused backward takes twice as long up to some 400 tokens.
    """
    heads, groups, q, k = query.shape[1], key.shape[1], query.shape[2], key.shape[2]
    if window is not None and window >= k:
        window = None
    by_hand = softcap is not None or (query.dtype == torch.bfloat16 and query.device.type == "cpu")
    if by_hand and q > QUERY_BLOCK:
        ends = range(k - q + QUERY_BLOCK, k + QUERY_BLOCK, QUERY_BLOCK)
        blocks = zip(query.split(QUERY_BLOCK, dim=2), ends)
        return torch.cat([_attend(b, key[:, :, :end], value[:, :, :end], scaling, window, softcap) for b, end in blocks], dim=2)
    causal = q == k and window is None
    mask = None if causal and not by_hand else torch.ones(q, k, dtype=torch.bool, device=query.device).tril(k - q)
    if window is not None:
        mask = mask.triu(k - q - window + 1)
    if not by_hand:
        how = dict(is_causal=mask is None, scale=scaling, enable_gqa=heads > groups)
        return F.scaled_dot_product_attention(query, key, value, mask, **how)
    logits = (query.reshape(groups, -1, query.shape[3]) @ key[0].transpose(1, 2)).view(heads, q, k).float() * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1).to(value.dtype)
    return (weights.view(groups, -1, k) @ value[0]).view(1, heads, q, -1)


class Segments:
    """(prompt, [response, …]) lengths of a pack's pairs. A class, as torch.compile would make constants of a list's numbers."""

    def __init__(self, tree: list[tuple[int, list[int]]]):
        self.tree = tree

    @torch.compiler.disable
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None):
        """Each pair on its own, so that no (T × T) mask exists: prompt + first response is an ordinary causal sequence, each
        further response attends to the prompt's keys followed by its own. (1, H, T, d)."""
        sizes = [n for prompt, (first, *others) in self.tree for n in (prompt + first, *others)]
        pieces = zip(*(x.split(sizes, dim=2) for x in (query, key, value)))  # split, as its backward is one concatenation
        out = []
        for prompt, (_, *others) in self.tree:
            q, trunk_k, trunk_v = next(pieces)
            out.append(_attend(q, trunk_k, trunk_v, scaling, window, softcap))
            for _ in others:
                q, k, v = next(pieces)
                k, v = torch.cat([trunk_k[:, :, :prompt], k], dim=2), torch.cat([trunk_v[:, :, :prompt], v], dim=2)
                out.append(_attend(q, k, v, scaling, window, softcap))
        return torch.cat(out, dim=2)


BLOCK = 128  # queries, and keys, that FlexAttention takes at once
FUSED = ("cuda",)  # devices on which it takes a whole pack, forward and backward


def seen_ranges(tree: list[tuple[int, list[int]]], window: int | None = None, block: int | None = None) -> np.ndarray:
    """What each token of a packed tree sees, (3, T) int32: own, low, high of the token at index q.

    It sees the keys own … q of its own branch and low … high − 1 of the prompt before it (none if it is in a prompt). A window
    counts positions, not indices, and cuts both from below. With `block`, T is filled up to whole blocks by a prompt that is
    nobody's: at least two, as shorter packs would get torch's decoding kernel, and a size of 1 a graph of its own.
    """
    total = sum(p + sum(rs) for p, rs in tree)
    pairs = [*tree, (max(2, -(-total // block)) * block - total if block else 0, [])]
    sizes, lengths = (np.array(x) for x in ([p + sum(rs) for p, rs in pairs], [n for p, rs in pairs for n in (p, *rs)]))
    start, own = ((x.cumsum() - x).repeat(x) for x in (sizes, lengths))
    high = start + np.array([p if j else 0 for p, rs in pairs for j in range(len(rs) + 1)]).repeat(lengths)
    low, index = start, np.arange(len(start))
    if window is not None:
        low = np.clip(high + index - own - window + 1, start, high)  # its position is high − start + index − own
        own = np.maximum(own, index - window + 1)
    return np.stack([own, low, high]).astype(np.int32)


def _sees(ranges, q: Tensor, k: Tensor) -> Tensor:
    own, low, high = (x[q] for x in ranges)
    return (own <= k) & (k <= q) | (low <= k) & (k < high)


def tree_mask(tree: list[tuple[int, list[int]]], dtype: torch.dtype, device) -> Tensor:
    """The same as an additive mask (1, 1, T, T), for models whose attention is not exchangeable. O(T²) memory."""
    ranges = to_device(torch.from_numpy(seen_ranges(tree)), device)
    index = torch.arange(ranges.shape[1], device=device)
    seen = _sees(ranges, index[:, None], index[None, :])
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


class Blocks(NamedTuple):
    """What FlexAttention needs to know of a pack of n blocks, for one window; nothing of it is a constant of the kernel.

    ranges: own, low, high of `seen_ranges`, (128·n,) each.
    lists: how many (n,) and which (n, n) key blocks each query block sees in part, then in full; and, for the backward pass,
        the same of the query blocks that see each key block.
    """

    ranges: tuple[Tensor, ...]
    lists: tuple[Tensor, ...]

    @classmethod
    def of(cls, tree: list[tuple[int, list[int]]], window: int | None, device) -> "Blocks":
        """Found on the host, so that no GPU is waited for, in O(T + n²) time and memory, never O(T²)."""
        own, low, high = ranges = seen_ranges(tree, window, BLOCK)
        index, n = np.arange(len(own)), len(own) // BLOCK
        # keys before x: x % BLOCK in the block of x, BLOCK in each before it. Summed over the queries of a block, and from the
        # right over key blocks j (column j + 1), the four edges count the seen cells of each block
        edges, signs = np.stack([index + 1, own, high, low]), np.array([[1], [-1], [1], [-1]])
        at, rest = index // BLOCK * (n + 2) + edges // BLOCK, edges % BLOCK
        counted = np.concatenate([signs * rest, signs * (BLOCK - rest)]).ravel()
        cells = np.bincount(np.concatenate([at + 1, at]).ravel(), counted, n * (n + 2)).reshape(n, n + 2)
        cells = cells[:, ::-1].cumsum(1)[:, n:0:-1]
        part, full = (cells > 0) & (cells < BLOCK**2), cells == BLOCK**2
        lists = [x for s in (part, full, part.T, full.T) for x in (s.sum(1), np.argsort(~s, axis=1, kind="stable"))]
        send = lambda x: to_device(torch.from_numpy(x.astype(np.int32)), device)  # noqa: E731
        blocks = cls(tuple(map(send, ranges)), tuple(map(send, lists)))
        for x in tree_leaves(blocks):
            torch._dynamo.maybe_mark_dynamic(x, list(range(x.ndim)))
        return blocks

    def mask(self) -> BlockMask:
        size, sees = self.ranges[0].shape[0], lambda b, h, q, k: _sees(self.ranges, q, k)
        return BlockMask((size, size), *(x[None, None] for x in self.lists), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees)


def to_device(tensor: Tensor, device) -> Tensor:
    """A copy of a tensor of the host that nobody waits for: while the host goes on, CUDA can read pinned memory only."""
    tensor = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


def compiled(function, dim: int, **how):
    """torch.compile(function, …) for packs, given any `blocks` by name; dimension `dim` of its other tensors counts tokens.

    Only what differs between packs is no constant of the graph, so there is one for all, and sizes that are equal by chance
    are not taken for the same. A soft-cap is a constant: as an input it would break the graph under grad.
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
    """The whole pack in one kernel that skips the blocks in which nothing is seen. (1, H, T, d)."""
    size = blocks.ranges[0].shape[0]  # said here, so that the compiler knows it and the kernel checks no bounds
    if not query.shape[2] == key.shape[2] == value.shape[2] == size or size % BLOCK:
        raise ValueError(f"a pack of {query.shape[2]} tokens is not filled up to {size}, in blocks of {BLOCK}")
    cap = None if softcap is None else lambda score, b, h, q, k: softcap * torch.tanh(score / softcap)
    return flex_attention(query, key, value, score_mod=cap, block_mask=blocks.mask(), scale=scaling, enable_gqa=True)


@functools.cache
def _compiled_flex():
    return compiled(_flex, dim=2, fullgraph=True)  # uncompiled, it would write out (T, T) scores; better an error


def tree_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, segments=None, blocks=None,
    **kwargs
):  # fmt: skip
    """Attention over a packed tree, in the form transformers' AttentionInterface calls: (1, H, T, d) → (1, T, H, d).

    A query sees the keys of its own pair that come earlier, in the prompt or in its own response. Given `segments`, each pair
    is attended to on its own; given `blocks` {window: Blocks}, one kernel takes the whole pack.
    """
    if segments is None and blocks is None:
        raise ValueError('attention is set to packed trees, but this batch has none; call use_layout("padded") first')
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("packed layout: attention sinks and position biases are not supported; use --layout padded")
    if blocks is not None and sliding_window not in blocks:
        raise ValueError(
            f"packed layout: the config knows no window of {sliding_window}, which a layer has; use --layout padded"
        )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary embeddings leave them in fp32
    if blocks is not None:
        flex = _flex if torch.compiler.is_compiling() else _compiled_flex()
        out = flex(query, key, value, scaling, softcap, blocks=blocks[sliding_window])
    else:
        out = segments.attend(query, key, value, scaling, sliding_window, softcap)
    return out.transpose(1, 2).contiguous(), None


@functools.cache
def packed_attention() -> str:
    """The name under which transformers knows `tree_attention`."""
    from transformers import AttentionInterface  # late, as it takes two seconds that `--help` need not wait

    AttentionInterface.register("packed_tree", tree_attention)
    return "packed_tree"


# ---- the policy ------------------------------------------------------------------------------------------------------


HEADS = {"logp": "head", "ref": "ref_head"}  # a sum and what it is called over the first tokens alone


class ResponseLogProbs(nn.Module):
    """A causal language model that answers a batch with one summed log-prob per response instead of logits.

    Args:
        model: a transformers causal language model.
        reference: a second one, frozen, only for token KLs and for a reference that moves.
        chunk: see `token_logprobs`; the token KL, which has the logits of two models, takes half.
    """

    def __init__(self, model: nn.Module, reference: nn.Module | None = None, chunk: int | None = None):
        super().__init__()
        self.model, self.reference, self.chunk = model, reference, chunk
        self.layout, self.native_attention = "padded", model.config._attn_implementation

    def use_layout(self, layout: str) -> str:
        """Attention for "packed" or "padded" batches ("padded" is the models' own, which generation needs too).

        Policy and reference change together; returns the layout before.
        """
        before, self.layout = self.layout, layout
        for model in filter(None, (self.model, self.reference)):
            if model._can_set_attn_implementation():
                model.set_attn_implementation(packed_attention() if layout == "packed" else self.native_attention)
        return before

    def within(self, function, *args, **kwargs):
        """function(model, …) as part of this module: where it is sharded, what only its forward gathers is whole meanwhile."""
        return function(self.model, *args, **kwargs)

    @staticmethod
    def states(model: nn.Module, batch) -> Tensor:
        """Hidden states at the scored positions, (N, D). `batch.tree` is None for the padded layout."""
        ids, positions, tree, extra = batch.input_ids, batch.position_ids, batch.tree, {}
        if tree is not None and not model._can_set_attn_implementation():
            extra = {"attention_mask": tree_mask(tree, model.dtype, ids.device)}
        elif tree is not None and ids.device.type in FUSED:
            windows = {None, getattr(model.config.get_text_config(), "sliding_window", None)}
            extra = {"blocks": {window: Blocks.of(tree, window, ids.device) for window in windows}}
            ids, positions = (F.pad(x, (0, len(extra["blocks"][None].ranges[0]) - x.shape[1])) for x in (ids, positions))
        elif tree is not None:
            extra = {"segments": Segments(tree)}
        # no padding mask: padding is on the right, where a causal position never looks
        out = model.base_model(input_ids=ids, position_ids=positions, use_cache=False, **extra)
        return out.last_hidden_state.flatten(0, 1)[batch.index]

    def forward(self, batch, also: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Sums over each response, (R,), nats, fp32: "logp", the log-probs of its tokens; and what `also` names of

        kl      Σ_t KL(π_ref ‖ π_θ) over the whole vocabulary
        head    the log-probs of those tokens that `batch.head` marks
        power   Σ_t log Σ_v π_θ(v)², without gradient
        ref     "logp" under the reference, without gradient; with "head", "ref_head" too
        """
        each = {}
        if {"kl", "ref"} & set(also):  # before the policy's pass, which keeps activations for backward
            with torch.no_grad():
                ref_hidden, ref_head = self.states(self.reference, batch), head_of(self.reference)
                if "ref" in also:
                    each["ref"] = token_logprobs(ref_hidden, ref_head, batch.targets, self.chunk)
        hidden, head = self.states(self.model, batch), head_of(self.model)
        if "kl" in also:
            each["kl"] = token_kl(hidden, ref_hidden, head, ref_head, self.chunk and max(1, self.chunk // 2))
        if "power" in also:
            wide = torch.promote_types(hidden.dtype, torch.float32)
            each["power"] = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        each["logp"] = token_logprobs(hidden, head, batch.targets, self.chunk, each.get("power"))  # last, as it keeps logits
        if "head" in also:
            each |= {HEADS[name]: x * batch.head for name, x in each.items() if name in HEADS}
        zero = each["logp"].new_zeros(batch.responses)
        return {name: zero.index_add(0, batch.response, values) for name, values in each.items()}


# ---- what a model says, and whether we score it right ------------------------------------------------------------------


@torch.no_grad()
def continuations(
    model: nn.Module, tokenizer, prompts: list[list[int]], max_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
    together: bool = False,
) -> tuple[list[list[int]], list[bool]]:  # fmt: skip
    """What the model answers to each prompt, all as one batch, with its own attention.

    Args:
        prompts: token ids; shorter ones are padded on the left.
        max_tokens: longer answers are cut there.
        together: the model is cut over processes, which all take as many steps as the one that takes the most.
        temperature: 0 is greedy; else sampled by torch's global generator, from the share `top_p` of the probability.
    Returns:
        the answers' token ids, with the token that ended them, and whether each ended by itself.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    stop = model.generation_config.eos_token_id or tokenizer.eos_token_id
    width, was_training = max(map(len, prompts)), model.training
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    how = dict(do_sample=False, temperature=None, top_p=None, top_k=None)
    if temperature > 0:
        how = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    model.train(False)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, eos_token_id=stop, pad_token_id=pad,
        synced_gpus=together, **how
    )  # fmt: skip
    model.train(was_training)
    stops, answers = set(stop) if isinstance(stop, list) else {stop}, out[:, width:].tolist()
    ends = [next((i + 1 for i, token in enumerate(answer) if token in stops), None) for answer in answers]
    return [answer[:end] for answer, end in zip(answers, ends)], [end is not None for end in ends]


def as_texts(tokenizer, answers: list[list[int]], ended: list[bool]) -> list[str]:
    """Answers of `continuations` without the token that ended them, special tokens and outer whitespace."""
    bare = [answer[: len(answer) - end] for answer, end in zip(answers, ended)]
    return [text.strip() for text in tokenizer.batch_decode(bare, skip_special_tokens=True)]


def completions(model: nn.Module, tokenizer, prompts: list[list[int]], *args, **how) -> tuple[list[str], list[bool]]:
    """`continuations` as texts."""
    answers, ended = continuations(model, tokenizer, prompts, *args, **how)
    return as_texts(tokenizer, answers, ended), ended


@torch.no_grad()
def check_head(model: nn.Module, input_ids: Tensor, tolerance: float) -> float:
    """Largest difference between the model's own log-softmax and ours on `input_ids` (1, T); ValueError above `tolerance`."""
    own = model(input_ids=input_ids, use_cache=False).logits[0].float().log_softmax(-1)
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[0]
    ours = logits_of(_as_computed(hidden), head_of(model)).log_softmax(-1)
    worst = (own - ours).abs().max().item()
    if not worst <= tolerance:
        raise ValueError(
            f"{type(model).__name__}: our log-probs differ from the model's own by {worst:.3g} nats (bound {tolerance:g}); "
            "its head does more than weight, bias, logit scale and soft-cap, so plainpo cannot train it"
        )
    return worst
