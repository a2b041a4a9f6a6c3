"""Log-probs: against slices, against torch's own softmax, against autograd, and packed against padded, on many model families.

Expected values are independent computations: a log-softmax over the full logits of each sequence on its own, in fp64 where
exactness is claimed. No number is copied from the code under test.
"""

import contextlib
import functools
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
import torch.nn.attention.flex_attention as flex
import will_it_fit
from test_distributed import ranks
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from torch.distributed.utils import _to_kwargs
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    FalconH1Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RecurrentGemmaConfig,
    xLSTMConfig,
)  # fmt: skip

import distributed as dist
import logprobs
import train
from data import Example, packed_batch, padded_batch
from logprobs import (  # fmt: skip
    Blocks,
    Head,
    PrefixSharedPairs,
    ResponseLogProbs,
    chunk_logits,
    completions,
    continuations,
    head_of,
    own_logprobs,
    response_logprob,
    token_kl,
    token_logprobs,
)
from losses import OBJECTIVES

V = 61
SIZE = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
NO_GROUPS = {k: v for k, v in SIZE.items() if k != "num_key_value_heads"}

MODELS = {
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True)),
    "llama, untied": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=False)),
    "mistral, window of 5": lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZE)),
    "qwen2, window in one layer": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE, head_dim=8)),
    "gemma2, soft-caps and alternating windows": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SIZE,
            head_dim=8,
            sliding_window=5,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        )
    ),
    "phi, bias on the head": lambda: PhiForCausalLM(PhiConfig(**SIZE)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NO_GROUPS)),
    "gpt2, learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ),
    "falcon, outside the attention registry": lambda: FalconForCausalLM(
        FalconConfig(**NO_GROUPS, alibi=False, bias=False, multi_query=True, attention_dropout=0.0, hidden_dropout=0.0)
    ),
    "cohere, logit scale": lambda: CohereForCausalLM(CohereConfig(**SIZE, logit_scale=0.3)),
    "granite, logits divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZE, logits_scaling=3.0, embedding_multiplier=2.0)),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param]()
    with torch.no_grad():
        for p in model.parameters():  # spread out: at initialisation logits are all but equal and nothing would be seen
            p.add_(0.2 * torch.randn_like(p))
    return model.train()


def examples(seed: int = 0, shapes=((7, 4, 9), (1, 1, 3), (12, 6, 2), (3, 8, 8))) -> list[Example]:
    g = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(3, V, (n,), generator=g).tolist()

    return [Example(ids(p), [ids(n) for n in responses]) for p, *responses in shapes]


def textbook(model, pairs) -> torch.Tensor:
    """The definition, one response at a time."""
    return torch.stack([response_logprob(model, e.prompt, r) for e in pairs for r in e.responses])


def test_the_definition_by_hand(model):
    """The product of the probabilities of the next token, each from a pass over what stands before it, in fp64."""
    model, prompt, response = model.double(), [5, 9, 4, 7], [11, 6, 3]
    product = 1.0
    for t, token in enumerate(response):
        logits = model(input_ids=torch.tensor([prompt + response[:t]]), use_cache=False).logits[0, -1]
        product = product * logits[token].exp() / logits.exp().sum()
    assert response_logprob(model, prompt, response).item() == pytest.approx(product.log().item(), rel=1e-9)


def gradients(policy, batches, weights) -> tuple[torch.Tensor, dict]:
    """Sums of all batches and the gradient of Σ weight · sum."""
    policy.zero_grad()
    sums = [policy(batch)["logp"] for batch in batches]
    (torch.cat(sums) * weights).sum().backward()
    return torch.cat(sums).detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def assert_same(a, b, rtol=1e-6):
    """Sums within rtol, and each parameter's gradient within rtol of the largest gradient of the whole model."""
    torch.testing.assert_close(a[0], b[0], rtol=rtol, atol=1e-5 * rtol / 1e-6)
    assert a[1].keys() == b[1].keys()
    largest = max(g.abs().max() for g in b[1].values())
    for name in a[1]:
        assert (a[1][name] - b[1][name]).abs().max() <= 2 * rtol * largest, name


# ---- families ----------------------------------------------------------------------------------------------------


def test_a_family_outside_the_attention_registry_is_among_them():
    """Such a model is given the pairs as a mask; which families are outside depends on the version of transformers."""
    outside = [name for name, build in MODELS.items() if not build()._can_set_attn_implementation()]
    assert outside == ["falcon, outside the attention registry"]


def test_both_layouts_equal_the_models_own_logits(model):
    pairs = examples()
    policy = ResponseLogProbs(model)
    expected = textbook(model, pairs).detach()
    for layout, make in (("padded", padded_batch), ("packed", packed_batch)):
        policy.use_layout(layout)
        logp = policy(make(pairs))["logp"]
        assert logp.dtype == torch.float32 and logp.shape == (8,)
        torch.testing.assert_close(logp, expected, rtol=2e-6, atol=2e-5)


def test_gradients_packed_equal_padded(model):
    pairs, weights = examples(), torch.linspace(-1, 2, 8)
    policy = ResponseLogProbs(model)
    policy.use_layout("padded")
    padded = gradients(policy, [padded_batch(pairs)], weights)
    policy.use_layout("packed")
    packed = gradients(policy, [packed_batch(pairs)], weights)
    assert_same(packed, padded)


def test_order_split_chunk_and_checkpointing_change_nothing(model):
    pairs, weights = examples(), torch.linspace(-1, 2, 8)
    policy = ResponseLogProbs(model)
    policy.use_layout("packed")
    whole = gradients(policy, [packed_batch(pairs)], weights)

    order = [2, 0, 3, 1]
    columns = [2 * i + j for i in order for j in (0, 1)]
    shuffled = gradients(policy, [packed_batch([pairs[i] for i in order])], weights[columns])
    assert_same((shuffled[0][torch.tensor(columns).argsort()], shuffled[1]), whole)

    assert_same(gradients(policy, [packed_batch([e]) for e in pairs], weights), whole)
    for chunk in (1, 10_000, 100_000):
        policy.chunk = chunk
        assert_same(gradients(policy, [packed_batch(pairs)], weights), whole)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(gradients(policy, [packed_batch(pairs)], weights), whole)


def test_nothing_leaks_between_branches_or_pairs(model):
    """Change one token of a rejected response: no other log-prob of the sequence may change, not in the last bit."""
    pairs = examples()
    policy = ResponseLogProbs(model)
    policy.use_layout("packed")
    with torch.no_grad():
        before = policy(packed_batch(pairs))["logp"]
        for pair in range(len(pairs)):
            for side in (0, 1):
                changed = [Example(e.prompt, [list(r) for r in e.responses]) for e in pairs]
                token = changed[pair].responses[side]
                token[0] = 3 + (token[0] - 2) % (V - 3)
                after = policy(packed_batch(changed))["logp"]
                same = torch.ones(8, dtype=torch.bool)
                same[2 * pair + side] = False
                assert torch.equal(before[same], after[same])
                assert before[2 * pair + side] != after[2 * pair + side]


def test_own_logprobs_are_the_textbooks(model):
    """Token by token they add up to the definition; their spread is what the logits of every position have on average."""
    prompt, response = [3, 4, 5], [6, 7, 8, 9]
    logp, spread = own_logprobs(model, prompt, response)
    assert logp.shape == (4,)
    torch.testing.assert_close(logp.sum(), response_logprob(model, prompt, response).detach())
    logits = model(torch.tensor([prompt + response])).logits[0, 2:6].detach()
    assert spread == pytest.approx(sum(row.std().item() for row in logits) / 4)


OTHER_NAMES = {  # of what scales or caps logits, beside those among the families
    "falcon-h1": FalconH1Config(
        **SIZE, lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8
    ),
    "recurrent-gemma": RecurrentGemmaConfig(
        **SIZE, logits_soft_cap=0.5, lru_width=32, block_types=("recurrent", "attention")
    ),
    "xlstm": xLSTMConfig(
        vocab_size=V, hidden_size=32, embedding_dim=32, num_hidden_layers=2, num_blocks=2, num_heads=4, chunk_size=8,
        output_logit_soft_cap=0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_heads_are_known_by_other_names_too(name):
    """Hidden states → logits as the model itself makes them, with scales and caps that are far from nothing."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OTHER_NAMES[name]).eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
        own = model(ids, use_cache=False).logits[0]
        hidden = model.base_model(ids, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(logprobs.logits_of(hidden, head_of(model)), own, rtol=1e-5, atol=1e-5)
        bare = torch.nn.functional.linear(hidden, model.get_output_embeddings().weight)
    assert (bare - own).abs().max() > 0.5


def test_packed_attention_in_bf16_stays_near_fp32(model):
    """The matmul form of attention (used for bf16 on CPUs) against the fp32 model: bf16 keeps 8 bits, so a few per cent."""
    pairs = examples()
    policy = ResponseLogProbs(model)
    policy.use_layout("packed")
    exact = policy(packed_batch(pairs))["logp"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = policy(packed_batch(pairs))["logp"]
    lengths = packed_batch(pairs).lengths
    assert rough.dtype == torch.float32
    assert ((rough - exact).abs() / lengths).max() < 0.25


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3, 6])
def test_more_than_one_query_block(monkeypatch, window, softcap):
    """With blocks of 4 queries, of one prompt, of a prompt and a response, of two responses: values and gradients are those of
    all scores under what each token sees by definition, in fp64. Values are narrower than keys, as in DeepSeek's attention."""
    monkeypatch.setattr(logprobs, "QUERY_BLOCK", 4)
    g = torch.Generator().manual_seed(0)
    for pairs in ([(13, [])], [(5, [6, 3]), (1, [1, 1])], [(9, [2, 2, 7]), (0, [1]), (2, [12])]):
        size = sum(p + sum(rs) for p, rs in pairs)
        shapes = ((4, 8), (2, 8), (2, 5), (4, 5))
        query, key, value, pull = (torch.randn(1, h, size, d, generator=g, dtype=torch.float64) for h, d in shapes)
        leaves = [x.requires_grad_() for x in (query, key, value)]
        ours = PrefixSharedPairs(pairs).attend(query, key, value, 0.3, window, softcap)
        scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen_by_definition(pairs, window, size), float("-inf"))
        expected = scores.softmax(-1) @ value.repeat_interleave(2, 1)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
        for a, b in zip(*(torch.autograd.grad(out, leaves, pull) for out in (ours, expected))):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_what_pairs_see_by_hand():
    """prompt p0 p1, chosen c0, rejected r0 r1; then a pair of one token each. Rows see columns."""

    def seen(pairs, window=None):
        index = torch.arange(sum(prompt + sum(responses) for prompt, responses in pairs))
        return Blocks.of(pairs, window, "cpu").mask().mask_mod(None, None, index[:, None], index)

    assert seen([(2, [1, 2]), (1, [1, 1])]).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 0, 1],
    ]
    # a window of 2 counts positions: r0 (position 2) no longer sees p0 (0) but p1 (1), although c0 stands between them
    assert seen([(2, [1, 2])], 2)[3].tolist() == [False, True, False, True, False]


def test_importing_takes_no_compiler():
    """torch's compiler is two seconds of import, which every `--help` would wait for."""
    code = "import logprobs, sys; print('torch._dynamo' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(logprobs.__file__).parent)
    assert said.stdout == "False\n", said.stderr


# ---- the fused kernel, without a GPU ---------------------------------------------------------------------------------
#
# What a GPU runs is traced, differentiated and counted here; the machine code of its kernel is not.


@contextlib.contextmanager
def fused(monkeypatch):
    """The path of GPUs on this CPU: torch.compile gives every graph, with the number of its flex nodes, to the list yielded."""
    graphs = []

    def spy(graph, inputs):
        kernels = [node for node in graph.graph.nodes if "flex_attention" in str(node.target)]
        graphs.append(len(kernels))
        for size in (tensor.meta["example_value"].shape[2] for node in kernels for tensor in (node.args[0], node.args[2])):
            assert not isinstance(size, int) and statically_known_true(size % 128 == 0)  # dynamic, and no bounds to check
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    counters.clear()
    with monkeypatch.context() as patch:
        patch.setattr(flex, "_validate_device", lambda *_: None)  # which refuses a backward pass on CPUs
        patch.setattr(logprobs, "FUSED", ("cpu",))
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=spy))
        logprobs._compiled_flex.cache_clear()
        # torch's defaults, and put back afterwards
        with torch._dynamo.config.patch(specialize_float=False, recompile_limit=8):
            yield graphs
    logprobs._compiled_flex.cache_clear()
    torch._dynamo.reset()


def random_pairs(count: int, longest: int, seed: int = 0) -> list[list[tuple[int, list[int]]]]:
    """`count` times one to four prompts of one to three responses; the first is the single token of a rank without work."""
    g = torch.Generator().manual_seed(seed)

    def draw(high):
        return torch.randint(1, high + 1, (), generator=g).item()

    drawn = [[(draw(longest), [draw(longest) for _ in range(draw(3))]) for _ in range(draw(4))] for _ in range(count - 1)]
    return [[(0, [1])], *drawn]


def seen_by_definition(pairs, window: int | None, size: int) -> torch.Tensor:
    """(T, T) bool: same pair, not later, in the prompt or the own branch, fewer than `window` positions before. What is no
    token of a pair is a prompt of its own."""
    pair, branch, position = [], [], []
    for i, (p, rs) in enumerate([*pairs, (size - sum(p + sum(rs) for p, rs in pairs), [])]):
        for j, n in enumerate((p, *rs)):
            pair, branch, position = pair + [i] * n, branch + [j] * n, position + [(p if j else 0) + t for t in range(n)]
    pair, branch, position = (torch.tensor(x) for x in (pair, branch, position))
    seen = (pair[:, None] == pair).tril() & ((branch == 0) | (branch[:, None] == branch))
    return seen if window is None else seen & (position[:, None] - position < window)


@pytest.mark.parametrize("window", [None, 1, 5, 64, 200])
def test_blocks_equal_torchs_own(window):
    """Cell by cell the definition, and each list of blocks the one that create_block_mask finds from all T² cells."""
    for pairs in random_pairs(8, 250):
        blocks = Blocks.of(pairs, window, "cpu")
        size, index = len(blocks.ranges[0]), torch.arange(len(blocks.ranges[0]))
        seen = seen_by_definition(pairs, window, size)
        ours = blocks.mask()
        assert torch.equal(ours.mask_mod(None, None, index[:, None], index[None]), seen)
        theirs = flex.create_block_mask(lambda b, h, q, k, seen=seen: seen[q, k], None, None, size, size, device="cpu")
        assert ours.shape == theirs.shape and torch.equal(ours.to_dense(), theirs.to_dense())
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
            ours_of, theirs_of = (getattr(x, name.replace("num_blocks", "indices")) for x in (ours, theirs))
            assert torch.equal(ours_of, theirs_of) and ours_of.dtype == theirs_of.dtype == torch.int32, name


@pytest.mark.parametrize("window", [None, 4096])
def test_blocks_of_a_long_sequence_are_small(window):
    """16,000 tokens: 6 MB while they are made and half a MB to keep, where (T, T) cells alone are 256 MB."""
    pairs = [(300, [350, 350])] * 16
    tracemalloc.start()
    with will_it_fit.LiveBytes() as live:
        blocks = Blocks.of(pairs, window, "cpu")
    host = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert host + live.peak < 6e6
    assert sum(x.nbytes for x in tree_leaves(blocks)) < 0.5e6


@pytest.mark.parametrize("softcaps", [(None, 50.0), pytest.param((50.0, 30.0), marks=pytest.mark.slow)])
def test_one_graph_serves_all_sequences(monkeypatch, softcaps):
    """Twelve of them, one token first, with and without a window: per soft-cap a graph to train, one to evaluate, no break.

    The first one is as long as a head is wide, and has as many blocks as groups: equal by chance is not equal.
    """
    with fused(monkeypatch) as graphs:
        for softcap in softcaps:
            for pairs in random_pairs(12, 50):
                for window in (None, 64):
                    blocks = Blocks.of(pairs, window, "cpu")
                    for train_mode in (True, False):
                        query, key, value = (torch.randn(1, h, len(blocks.ranges[0]), 256) for h in (4, 2, 2))
                        with torch.set_grad_enabled(train_mode):
                            query.requires_grad_(train_mode)
                            out, _ = logprobs.prefix_shared_attention(
                                None, query, key, value, None, 0.3, window, softcap, blocks={window: blocks}
                            )
                        if train_mode:
                            out.sum().backward()
        assert graphs == [1, 1] * len(softcaps) and not counters["graph_break"]


def scored(policy, packs) -> list:
    """(sums, the same without gradient, {parameter: gradient of a weighted sum}) of each sequence."""
    results = []
    for pack in packs:
        batch = packed_batch(pack)
        with torch.no_grad():
            evaluated = policy(batch)["logp"]
        sums, grads = gradients(policy, [batch], torch.linspace(-1, 2, batch.responses))
        results.append((sums, evaluated, grads))
    return results


PACKS = [[], *([e] for e in examples()), examples(), examples(1, [(20, 9, 9)] * 9)]  # of 1 to 342 tokens: two and three blocks


@pytest.mark.parametrize("name, compiling, kinds", [
    ("llama, tied", False, 1), ("mistral, window of 5", False, 1), ("gemma2, soft-caps and alternating windows", False, 1),
    ("gemma2, soft-caps and alternating windows", True, 2),
    pytest.param("gpt2, learned positions", True, 1, marks=pytest.mark.slow),
    pytest.param("qwen2, window in one layer", True, 2, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_fused_kernel_scores_as_pair_by_pair(monkeypatch, name, compiling, kinds):
    """FlexAttention over the filled-up sequence against pair by pair, values and gradients, the decoder blocks compiled or not.

    A graph to train and one to evaluate for each kind of layer, with the kernel in it; the kernel alone has one kind.
    """
    torch.manual_seed(0)
    policy = ResponseLogProbs(MODELS[name]().train())
    for p in policy.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    policy.use_layout("packed")
    expected = scored(policy, PACKS)
    with fused(monkeypatch) as graphs:
        dist.shard(policy, checkpointing=compiling, compiling=compiling)
        ours = scored(policy, PACKS)
        assert graphs == [1, 1] * kinds and not counters["graph_break"]
        policy.use_layout("padded")
        policy.model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False)
        policy(padded_batch(PACKS[1]))["logp"].sum().backward()
        assert len(graphs) == 2 * kinds  # what is not packed stays eager
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a[1], b[1], rtol=3e-6, atol=3e-5)
        assert_same((a[0], a[2]), (b[0], b[2]), rtol=3e-6)


@pytest.mark.parametrize("name, backend", [
    ("llama, tied", "eager"), pytest.param("llama, tied", "inductor", marks=pytest.mark.slow),
    pytest.param("gemma2, soft-caps and alternating windows", "eager", marks=pytest.mark.slow),
])  # fmt: skip
def test_compiled_blocks_score_as_they_do_uncompiled(monkeypatch, name, backend):
    """Decoder blocks compiled around attention pair by pair: values and gradients, and no graph of its own for a sequence."""
    graphs = []

    def spy(graph, inputs):
        graphs.append(graph)
        return lookup_backend(backend)(graph, inputs)

    torch.manual_seed(0)
    policy = ResponseLogProbs(MODELS[name]().train())
    policy.use_layout("packed")
    packs = [[Example(list(range(3, 3 + p)), [[5] * n for n in rs]) for p, rs in pairs] for pairs in random_pairs(9, 12)[1:]]
    expected = scored(policy, packs)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=spy))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(specialize_float=False, recompile_limit=8):
        dist.shard(policy, checkpointing=True, compiling=True)
        few = scored(policy, packs[:3])
        made = len(graphs)
        ours = few + scored(policy, packs[3:])
    torch._dynamo.reset()
    assert len(graphs) == made > 0
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a[1], b[1], rtol=3e-6, atol=3e-5)
        assert_same((a[0], a[2]), (b[0], b[2]), rtol=3e-6)


@pytest.mark.parametrize("compiling", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_fused_kernel_through_fsdp(monkeypatch, compiling):
    """Batch and blocks pass FSDP's hooks, which cast and move what a forward is given; two ranks, checkpointed."""
    build = MODELS["gemma2, soft-caps and alternating windows"]
    torch.manual_seed(0)
    alone = ResponseLogProbs(build())
    alone.use_layout("packed")
    weights, expected = alone.state_dict(), scored(alone, PACKS)

    def one_rank():
        with fused(monkeypatch) as graphs:
            policy = ResponseLogProbs(build())
            policy.load_state_dict(weights)
            dist.shard(policy, checkpointing=True, compiling=compiling)
            policy.use_layout("packed")
            found = scored(policy, PACKS)
            whole = [(a, b, {n: dist._whole(g).numpy() / 2 for n, g in grads.items()}) for a, b, grads in found]
            return graphs, dict(counters["graph_break"]), [(a.numpy(), b.numpy(), grads) for a, b, grads in whole]

    for graphs, breaks, ours in ranks(2, one_rank):
        assert graphs == [1, 1] * (1 + compiling) and not breaks
        for (a, b, grads), (c, d, wanted) in zip(ours, expected):
            torch.testing.assert_close(torch.from_numpy(a), c, rtol=3e-6, atol=3e-5)
            torch.testing.assert_close(torch.from_numpy(b), d, rtol=3e-6, atol=3e-5)
            largest = max(g.abs().max().item() for g in wanted.values())
            assert all((torch.from_numpy(grads[n]) - g).abs().max() <= 6e-6 * largest for n, g in wanted.items())


def test_batches_pass_the_way_to_fsdps_device():
    """With GPUs, FSDP's root moves whatever it is given to its device first, lists and tuples inside included."""
    batch = packed_batch(examples())
    (moved,), _ = _to_kwargs((batch,), {}, torch.device("meta"), False)
    (moved,) = moved
    assert type(moved) is type(batch) and moved.pairs == batch.pairs and moved.responses == batch.responses
    assert all(x.is_meta and x.shape == y.shape for x, y in zip(moved, batch) if isinstance(x, torch.Tensor))


def test_a_window_that_the_config_does_not_name_is_refused():
    q = torch.zeros(1, 1, 256, 4)
    with pytest.raises(ValueError, match="no window of 7.*--layout padded"):
        logprobs.prefix_shared_attention(
            None, q, q, q, None, sliding_window=7, blocks={None: Blocks.of([(1, [1])], None, "cpu")}
        )


def dense_attention(query, key, value, scaling, softcap, blocks) -> torch.Tensor:
    """The kernel's result from all T² scores, in plain operations, which any device and any dispatch mode understand."""
    size, repeats = query.shape[2], query.shape[1] // key.shape[1]
    assert size % 128 == 0 and size >= 256  # below 128 torch would pick its decoding kernel
    index = torch.arange(size, device=query.device)
    hidden = ~blocks.mask().mask_mod(None, None, index[:, None], index[None])
    scores = query @ key.repeat_interleave(repeats, 1).transpose(2, 3) * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value.repeat_interleave(repeats, 1)


class NoWaiting(TorchDispatchMode):
    """Refuses operations for which the host of a GPU would have to wait: values read, sizes that depend on values, tensors of
    the host among those of the device, copies that block."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = str(function), kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = [t.device.type == self.device for t in tensors]
        words = ("_local_scalar_dense", "nonzero", "repeat_interleave.Tensor", "masked_select", "unique", "aten.equal")
        assert not any(there) or not any(word in name for word in words), f"{name} waits for its value"
        if name.startswith("aten._to_copy") and kwargs.get("device") is not None:
            assert all(there) or kwargs.get("non_blocking"), f"{name} waits for its copy"
        else:
            assert not any(there) or all(t or not x.ndim for t, x in zip(there, tensors)), f"{name} takes a tensor of the host"
        return function(*args, **kwargs)


@pytest.mark.parametrize("name", ["llama, tied", "gemma2, soft-caps and alternating windows", "gpt2, learned positions"])
@pytest.mark.parametrize("outputs", [(), ("kl", "prefix_logp", "log_sum_p_squared", "ref")])
def test_scoring_a_microbatch_never_waits(monkeypatch, name, outputs):
    torch.manual_seed(0)
    policy = ResponseLogProbs(MODELS[name](), MODELS[name]())
    policy.use_layout("packed")
    batch, weights = packed_batch(examples()), torch.linspace(-1, 2, 8)
    expected = gradients(policy, [batch], weights)
    monkeypatch.setattr(logprobs, "FUSED", ("cpu",))
    monkeypatch.setattr(logprobs, "_compiled_flex", lambda: dense_attention)
    with NoWaiting("cpu"):
        sum(x.sum() for x in policy(batch, outputs).values()).backward()
    assert_same(gradients(policy, [batch], weights), expected, rtol=3e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_on_another_device_than_the_hosts(monkeypatch, objective):
    """The trainer's own accumulation with all on "meta", which has no values to wait for, in one and several batches."""
    monkeypatch.setattr(logprobs, "FUSED", ("meta",))
    monkeypatch.setattr(logprobs, "_compiled_flex", lambda: dense_attention)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no such device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    chosen = train.parse_objective(objective)
    k = 1 if chosen.unpaired else chosen.responses
    config = LlamaConfig(**{**SIZE, "num_hidden_layers": 1})  # of a whole model the test above this one sees the rest
    with torch.device("meta"):
        reference = LlamaForCausalLM(config) if chosen.needs("kl_w") else None
        policy = ResponseLogProbs(LlamaForCausalLM(config), reference)
    policy.use_layout("packed")
    rows = [e._replace(responses=e.responses[:k], desirable=i % 2 == 0 if chosen.unpaired else None, margin=1.0)
            for i, e in enumerate(examples())]  # fmt: skip
    zeros = torch.zeros(len(rows), k, device="meta")
    plan = [list(range(len(rows)))]

    def stop(*_):
        raise InterruptedError  # before the update, which begins with reading the numbers

    monkeypatch.setattr(dist, "clip_gradients", stop)
    random = chosen.terms[0].loss.random  # what is drawn comes from the host
    waiting = contextlib.nullcontext() if random else NoWaiting("meta")
    for budget, batches in ((40, 2), (10**6, 1)):
        s = train.Settings(dtype="fp32", tokens_per_microbatch=budget)
        run = train.Run(s, chosen, torch.device("meta"), None, policy, rows, [], plan=plan)
        run.ref = {"ref": zeros, "ref_prefix_logp": zeros} if chosen.needs("ref") else {}
        run.ref_kl = [zeros.flatten()] if chosen.needs("ref_kl") else None
        made = run.microbatches(rows)
        assert len(made) == batches and all(b.targets.is_meta for _, b in made)
        with waiting, pytest.raises(InterruptedError):
            train.train_step(run, plan[0])
        assert all(p.grad.shape == p.shape for p in policy.model.parameters())


def test_batches_for_cuda_are_pinned_first(monkeypatch):
    """A copy from memory that is not pinned waits for all work that the GPU was given before."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pin") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: calls.append((*a, k)) or self)
    packed_batch(examples()).to(torch.device("cuda"))
    assert calls == ["pin", (torch.device("cuda"), {"non_blocking": True})] * 7


def test_chunks_are_larger_on_gpus():
    """128 MiB of fp32 logits on CPUs, 1 GiB elsewhere."""
    assert 4 * chunk_logits("cpu") == 2**27 and 4 * chunk_logits("cuda") == 2**30


def test_a_plan_counts_the_kept_logits_of_a_gpu(monkeypatch):
    """The first pair pays for all logits that are kept, fp32 at least; after it every further pair costs the same, within the
    tile of 64 columns to which the parts of the vocabulary are rounded."""
    config, peaks = LlamaConfig(**{**SIZE, "vocab_size": 80_000, "num_hidden_layers": 1}), {}
    for rows in (256, 512):
        monkeypatch.setattr(will_it_fit, "chunk_logits", lambda device, rows=rows: 80_000 * rows)
        peaks[rows] = [will_it_fit.one_microbatch(config, n, (20, 9, 9), torch.bfloat16, True)["peak"] for n in (1, 2, 3)]
    for rows, each in peaks.items():
        assert max(each) - min(each) < 4 * 18 * 64 * (rows + 72)
    assert peaks[512][0] - peaks[256][0] >= 4 * 256 * 80_000


def test_a_plan_counts_no_scores_of_a_gpu():
    """The fused kernel keeps a number per query and no score: four times the tokens take four times the bytes, with a soft-cap
    and a window too. On a CPU the soft-cap's scores are written out."""
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = Gemma2Config(**sizes, head_dim=16, vocab_size=128, sliding_window=64)
    peaks = {gpu: [will_it_fit.one_microbatch(config, 1, (n, n, n), torch.bfloat16, False, gpu=gpu)["peak"]
                   for n in (512, 2048)]
             for gpu in (True, False)}  # fmt: skip
    assert peaks[True][1] < 4.2 * peaks[True][0] and peaks[False][1] > 8 * peaks[False][0]


def test_weight_gradients_are_added_up_in_fp32_without_a_rounded_product():
    """Off the CPU a bf16 product goes into the fp32 sum in one kernel; "meta" has no values, but the same calls."""
    total, names = torch.zeros(5, 4, device="meta"), []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **kwargs or {})

    a, b = (torch.zeros(n, m, device="meta", dtype=torch.bfloat16) for n, m in ((5, 3), (3, 4)))
    with Names():
        logprobs._add_product(total, a, b)
    assert names == ["aten.addmm.dtype_out"]


# ---- the head ----------------------------------------------------------------------------------------------------

HEADS = {
    "plain": {}, "bias": {"bias": True}, "scale": {"scale": 0.4}, "soft-cap": {"softcap": 2.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 3.0},
}  # fmt: skip


def a_head(dtype, n=11, d=6, v=19, bias=False, **extra):
    g = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    hidden, weight = rand(n, d), rand(v, d)
    return hidden, Head(weight, rand(v) if bias else None, **extra), torch.randint(0, v, (n,), generator=g)


def naive(hidden, head, targets):
    logits = hidden @ head.weight.T
    logits = (logits if head.bias is None else logits + head.bias) * head.scale
    logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(-1)[torch.arange(len(targets)), targets]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("chunk", [1, 16 * 11 * 5, None])  # one column of the vocabulary at a time, five, all
def test_chunked_head_equals_the_naive_one(name, dtype, bound, chunk):
    hidden, head, targets = a_head(dtype, **HEADS[name])
    inputs = [x for x in (hidden, head.weight, head.bias) if x is not None]
    weights = torch.linspace(-1, 2, len(targets), dtype=dtype)
    results = []
    for logp in (token_logprobs(hidden, head, targets, chunk), naive(hidden, head, targets)):
        results.append((logp, *torch.autograd.grad((logp * weights).sum(), inputs)))
    for ours, expected in zip(*results):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, expected, rtol=bound, atol=bound)


def test_chunked_head_by_finite_differences():
    hidden, head, targets = a_head(torch.float64, bias=True, scale=1.3, softcap=2.0)
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logprobs(h, Head(w, b, 1.3, 2.0), targets, 4), (hidden, head.weight, head.bias)
    )


@pytest.mark.parametrize("chunk", [1, 4 * 2 * 19, None])  # one row at a time, four, all
def test_token_kl_and_its_gradient(chunk):
    """Against the naive sum over the vocabulary in fp64; and ∂D/∂logits = π_θ − π_ref through the chain rule by hand."""
    hidden, head, _ = a_head(torch.float64)
    ref_hidden, ref_head = hidden.detach() + 0.3, Head(head.weight.detach() * 0.9)
    kl = token_kl(hidden, ref_hidden, head, ref_head, chunk)
    p, q = (hidden @ head.weight.T).softmax(-1), (ref_hidden @ ref_head.weight.T).softmax(-1)
    torch.testing.assert_close(kl, (q * (q.log() - p.log())).sum(-1), rtol=1e-10, atol=1e-12)
    assert (kl >= 0).all()
    d_hidden, d_weight = torch.autograd.grad(kl.sum(), (hidden, head.weight))
    torch.testing.assert_close(d_hidden, (p - q) @ head.weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(d_weight, (p - q).T @ hidden, rtol=1e-9, atol=1e-12)


def test_token_kl_of_a_model_to_itself_is_zero():
    hidden, head, _ = a_head(torch.float32)
    assert token_kl(hidden, hidden, head, head).abs().max() < 1e-6


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_second_backward_is_the_first(softcap):
    """The logits that forward kept are used up by the first one, and made again for the next."""
    hidden, head, targets = a_head(torch.float64)
    leaves = [hidden.requires_grad_(), head.weight]
    logp = token_logprobs(hidden, Head(head.weight, softcap=softcap), targets, 4).sum()
    first, second = (torch.autograd.grad(logp, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_no_tensor_of_tokens_times_vocabulary_outlives_its_chunk():
    """Count the live bytes of every tensor that torch makes: with 64 rows a chunk the peak is a few chunks, not the batch."""
    n, d, v, chunk = 512, 8, 4000, 64
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    targets = torch.randint(0, v, (n,))

    def peak(compute):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
            compute().sum().backward()
        changes = [e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = highest = 0
        for change in changes:
            live += change
            highest = max(highest, live)
        return highest

    full = 4 * n * v
    assert peak(lambda: token_logprobs(hidden, Head(weight), targets, chunk)) < 0.3 * full  # two chunks of eight and dW
    assert peak(lambda: token_logprobs(hidden, Head(weight, softcap=3.0), targets, chunk)) < 0.45 * full  # three and dW
    assert peak(lambda: naive(hidden, Head(weight), targets)) > 1.5 * full


# ---- the policy --------------------------------------------------------------------------------------------------


def test_sums_with_kl_and_reference():
    """Policy = reference gives KL 0; another reference gives the KL of each sequence on its own, summed over the response."""
    torch.manual_seed(0)
    model, other = LlamaForCausalLM(LlamaConfig(**SIZE)), LlamaForCausalLM(LlamaConfig(**SIZE))
    pairs = examples()
    policy = ResponseLogProbs(model, reference=other)
    policy.use_layout("packed")
    kl = policy(packed_batch(pairs), ("kl",))["kl"]
    policy.use_layout("padded")  # the models' own attention again
    expected = []
    for e in pairs:
        for r in e.responses:
            ids = torch.tensor([e.prompt + r])
            p, q = (m(input_ids=ids).logits[0].double().softmax(-1) for m in (model, other))
            expected.append((q * (q.log() - p.log())).sum(-1)[len(e.prompt) - 1 : -1].sum())
    torch.testing.assert_close(kl.double(), torch.stack(expected), rtol=1e-4, atol=1e-6)
    policy.use_layout("packed")
    kl.sum().backward()
    assert all(p.grad is None for p in other.parameters())
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_sums_besides_the_log_probs():
    """Prefix sums, log Σ p² and the reference's sums of each sequence on its own, from its fp64 softmax; where gradients go."""
    torch.manual_seed(0)
    model, other = LlamaForCausalLM(LlamaConfig(**SIZE)), LlamaForCausalLM(LlamaConfig(**SIZE))
    policy, expected = ResponseLogProbs(model, reference=other, chunk=5), {}
    for e in (pairs := examples()):
        shortest = min(map(len, e.responses))
        for r in e.responses:
            for name, m in (("", model), ("ref_", other)):
                p = m(input_ids=torch.tensor([e.prompt + r])).logits[0, len(e.prompt) - 1 : -1].double().softmax(-1)
                each = p.gather(-1, torch.tensor(r)[:, None]).log().squeeze(-1)
                expected.setdefault(name + "prefix_logp", []).append(each[:shortest].sum())
                expected.setdefault(name or "logp", []).append(each.sum())
                expected.setdefault(name + "log_sum_p_squared", []).append((p**2).sum(-1).log().sum())
    expected["ref"] = expected.pop("ref_")
    for layout, make in (("packed", packed_batch), ("padded", padded_batch)):
        policy.use_layout(layout)
        sums = policy(make(pairs), ("prefix_logp", "log_sum_p_squared", "ref"))
        assert set(sums) == {"logp", "prefix_logp", "log_sum_p_squared", "ref", "ref_prefix_logp"}
        for name, x in sums.items():
            torch.testing.assert_close(x.double(), torch.stack(expected[name]).detach(), rtol=1e-5, atol=1e-5)
            assert x.requires_grad == (name in ("logp", "prefix_logp"))
    sums["prefix_logp"].sum().backward()
    textbook = torch.autograd.grad(torch.stack(expected["prefix_logp"]).sum(), model.lm_head.weight)[0]
    torch.testing.assert_close(model.lm_head.weight.grad, textbook, rtol=1e-4, atol=1e-5)


def test_an_empty_batch_gives_exact_zero_gradients():
    torch.manual_seed(0)
    policy = ResponseLogProbs(LlamaForCausalLM(LlamaConfig(**SIZE)))
    for layout, make in (("packed", packed_batch), ("padded", padded_batch)):
        policy.use_layout(layout)
        sums = policy(make([]), ("prefix_logp", "log_sum_p_squared"))
        assert all(x.shape == (0,) for x in sums.values())
        logp = sums["logp"]
        logp.sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


def test_packed_attention_of_a_padded_batch_says_what_to_do():
    policy = ResponseLogProbs(LlamaForCausalLM(LlamaConfig(**SIZE)))
    policy.use_layout("packed")
    with pytest.raises(ValueError, match='use_layout\\("padded"\\)'):
        policy.model(input_ids=torch.tensor([[3, 4]]))


def test_head_of_reads_bias_scale_and_soft_cap():
    assert head_of(MODELS["phi, bias on the head"]()).bias is not None
    assert head_of(MODELS["cohere, logit scale"]()).scale == 0.3
    assert head_of(MODELS["granite, logits divided"]()).scale == pytest.approx(1 / 3)
    assert head_of(MODELS["gemma2, soft-caps and alternating windows"]()).softcap == 3.0


def test_attention_sinks_are_refused():
    with pytest.raises(ValueError, match="--layout padded"):
        logprobs.prefix_shared_attention(
            None, *(torch.zeros(1, 1, 2, 4) for _ in range(3)), None, pairs=PrefixSharedPairs([(1, [1])]), s_aux=torch.zeros(1)
        )


class Letters:
    """A stand-in for a tokenizer: token i is the i-th letter, 2 ends a response and is special."""

    pad_token_id, eos_token_id = None, 2

    def batch_decode(self, ids, skip_special_tokens):
        return ["".join(chr(ord("a") + i) for i in row if i != 2) for row in ids]


def test_greedy_completions_are_the_likeliest_tokens_one_by_one():
    """Prompts of different lengths in one batch answer as each alone does: argmax, appended, until token 2 or the limit."""
    torch.manual_seed(4)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZE, "pad_token_id": None, "vocab_size": 8})).train()
    for p in model.parameters():
        p.data.mul_(12.0)
    prompts, expected, ids = [[3, 4, 5], [6], [7, 3], [4], [5, 5]], [], []
    for prompt in prompts:
        answer = []
        while len(answer) < 6 and 2 not in answer:
            answer.append(model(input_ids=torch.tensor([prompt + answer])).logits[0, -1].argmax().item())
        expected.append(("".join(chr(ord("a") + i) for i in answer if i != 2), 2 in answer))
        ids.append((answer, 2 in answer))
    assert {ended for _, ended in expected} == {True, False}
    assert list(zip(*completions(model, Letters(), prompts, 6))) == expected and model.training
    assert list(zip(*continuations(model, Letters(), prompts, 6))) == ids  # with the token that ended them
    model.generation_config.stop_strings = ["a"]  # what a file may ask of generation: neither an error nor another answer
    model.generation_config.return_dict_in_generate = True
    assert list(zip(*continuations(model, Letters(), prompts, 6))) == ids


def test_sampled_completions_follow_the_models_distribution():
    """2,000 draws of one token against softmax(logits / temperature), within four standard errors."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZE, "vocab_size": 8}))
    for p in model.parameters():
        p.data.mul_(8.0)
    expected = (model(input_ids=torch.tensor([[3, 4]])).logits[0, -1] / 1.5).softmax(-1)
    torch.manual_seed(1)
    texts, _ = completions(model, Letters(), [[3, 4]] * 2000, 1, temperature=1.5)
    share = torch.tensor([texts.count(chr(ord("a") + i) if i != 2 else "") / 2000 for i in range(8)])
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / 2000).sqrt() + 1e-9).all()
    assert (
        completions(model, Letters(), [[3, 4]], 1, temperature=1.5, top_p=1e-6)[0]
        == completions(model, Letters(), [[3, 4]], 1)[0]
    )
