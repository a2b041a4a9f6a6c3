"""The study of all architectures: a few of each result, models broken on purpose, and (slow) all of them."""

import architectures
import pytest
from architectures import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, judge
from processes import Done

import logprobs
import train
from data import Example


@pytest.mark.parametrize(
    "name, result, words",
    [
        ("llama", "packed", ""),
        ("qwen2", "packed", ""),
        ("gemma2", "packed", ""),  # windows and soft-caps
        ("gpt_neo", "padded", "as packed it fails"),  # windows and positions of its own
        ("gpt_oss", "padded", "attention sinks"),
        ("doge", "padded", "log-probs differ from the model's own"),  # attends by other kernels where gradients are kept
        ("mamba", "padded", "log-probs differ from the model's own"),
        ("bert", "refused", "its log-probs differ from the model's own"),  # a head with a layer of its own
        ("cpmant", "refused", "CpmAntForCausalLM cannot be trained"),  # sees later tokens
        ("gemma4_unified_assistant", "refused", "inputs_embeds"),  # reads no token ids without another model
        ("musicgen", "not built", "MusicgenConfig"),
    ],
)
def test_one_of_each_kind(tmp_path, name, result, words):
    found, why = judge(name, tmp_path)
    assert found == result and words in why


def test_an_encoder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(architectures.OVERRIDES, "bert-generation", {"is_decoder": False})
    result, why = judge("bert-generation", tmp_path)
    assert result == "refused" and "BertGenerationDecoder cannot be trained" in why


def test_an_encoder_is_refused_where_all_rows_have_one_length(tmp_path, monkeypatch):
    monkeypatch.setitem(architectures.OVERRIDES, "bert-generation", {"is_decoder": False})
    model, _ = architectures.build("bert-generation", tmp_path)
    rows = {}
    train.survey([Example([1, 4, 5, 2], [[6, 7, 8, 3], [9, 7, 6, 3]])], rows)
    with pytest.raises(train.UserError, match="it sees padding"):
        train.choose_layout(model, rows, "auto")


attend = logprobs.PrefixSharedPairs.attend


def everything_before(pairs, query, key, value, scaling, window, softcap):
    """Attention that takes a pack for one long sequence."""
    return attend(logprobs.PrefixSharedPairs([(query.shape[2], [])]), query, key, value, scaling, window, softcap)


def test_attention_that_ignores_the_pairs_is_wrong_where_the_start_does_not_see_it(tmp_path, monkeypatch):
    monkeypatch.setattr(logprobs.PrefixSharedPairs, "attend", everything_before)
    monkeypatch.setattr(train, "choose_layout", lambda *_: "packed")
    result, why = judge("llama", tmp_path)
    assert result == "wrong" and why.startswith("packed: log-probs differ by 1.")


def test_attention_that_ignores_the_pairs_is_found_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(logprobs.PrefixSharedPairs, "attend", everything_before)
    result, why = judge("llama", tmp_path)
    assert result == "padded" and "as packed its log-probs differ" in why


def test_a_gradient_that_is_a_thousandth_too_large_is_wrong(tmp_path, monkeypatch):
    backward = logprobs._ChunkedLogProb.backward
    monkeypatch.setattr(logprobs._ChunkedLogProb, "backward", staticmethod(lambda ctx, grad: backward(ctx, 1.001 * grad)))
    result, why = judge("llama", tmp_path)
    assert result == "wrong" and why.endswith("gradients by 0.001 of the largest entry")


def test_a_traceback_is_wrong_and_a_refusal_without_reason_too_strict(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("on purpose")

    def refuse(*_):
        raise train.UserError("no")

    for number, (choice, expected) in enumerate(
        [(fail, ("wrong", "traceback: RuntimeError: on purpose")), (refuse, ("too strict", "no"))]
    ):
        monkeypatch.setattr(train, "choose_layout", choice)
        (tmp_path / str(number)).mkdir()
        assert judge("llama", tmp_path / str(number)) == expected


def test_a_tiny_model_has_a_layer_of_each_kind_and_a_small_window():
    for name in ("gemma3_text", "qwen3_next", "llama4_text", "recurrent_gemma", "laguna", "lfm2"):
        kind = architectures.CONFIG_MAPPING[name]
        config = architectures.tiny_config(kind)
        assert 2 <= config.num_hidden_layers <= 4 and set(config.layer_types) >= set(kind().layer_types)
        windows = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size", "attention_window_size")]
        assert set(windows) - {None} <= {8} and config.hidden_size == 32 and config.vocab_size == 96
    shortest, longest = (extreme(prompt + max(pair) for prompt, *pair in architectures.WORDS) for extreme in (min, max))
    assert shortest + 3 < 8 < longest  # the template's two tokens and the end


@pytest.mark.parametrize("code, expected", [(None, "not done after 600 s"), (-9, "exit code -9: killed"), (0, "a reason")])
def test_a_process_that_hangs_or_crashes_ends_its_model_only(monkeypatch, code, expected):
    monkeypatch.setattr(
        architectures.processes, "run", lambda *_: Done(code, 'said\n["wrong", "a reason"]\n', "trace\nkilled\n")
    )
    assert architectures.judge_alone("llama") == ("wrong", expected)


def test_the_table_groups_models_by_result_and_reason(capsys, monkeypatch):
    reasons = {"llama": ("packed", ""), "mamba": ("padded", "MambaForCausalLM differs by 0.17 nats (bound 1e-4)")}
    reasons |= {
        "rwkv": ("padded", "RwkvForCausalLM differs by 2 nats (bound 1e-4)"),
        "gpt2": ("packed", ""),
        "opt": ("wrong", "x|y"),
    }
    monkeypatch.setattr(architectures, "judge_alone", reasons.get)
    assert architectures.main(["--only", *reasons]) == reasons
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:5] == [
        "| packed |  | 2 | llama, gpt2 |",
        "| padded | … differs by … nats (bound …) | 2 | mamba, rwkv |",
        "| wrong | x\\|y | 1 | opt |",
    ]
    assert lines[-1] == "5 models: 2 packed, 2 padded, 0 refused, 0 too strict, 1 wrong, 0 not built"


@pytest.mark.slow
def test_nothing_is_wrong():
    verdicts = architectures.main([])
    results = [result for result, _ in verdicts.values()]
    assert list(verdicts) == list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) and len(verdicts) > 100
    assert results.count("wrong") == results.count("too strict") == 0 and results.count("packed") > 77
