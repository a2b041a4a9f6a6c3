"""The report of a GPU, made without one on tiny shapes: what it measures, and what it says of a part that fails."""

import argparse

import gpu
import pytest


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("cap", [None, 50.0])
def test_the_kernels_row(window, cap):
    """FlexAttention over a filled-up sequence gives what attention pair by pair gives, in fp32 here; a wrong window is seen."""
    row = gpu.kernel(16, window, cap)
    assert float(row["output"]) < 1e-5 and row["∂key"] == "–" and row["window"] == (window or "–")


def test_a_wrong_mask_is_seen(monkeypatch):
    seen = gpu.logprobs.seen_ranges
    monkeypatch.setattr(
        gpu.logprobs, "seen_ranges", lambda pairs, window, block=None: seen(pairs, 3 if block else window, block)
    )
    assert float(gpu.kernel(16, 4, None)["output"]) > 1e-2


@pytest.mark.parametrize("name", gpu.SIZES)
def test_a_step_of_each_size(name):
    """52 tokens are two pairs of 12 + 6 + 8; the layouts agree in fp32; the plan counts 18 bytes per weight and more."""
    row = gpu.step(name, 60, checkpointing=True, compiling=False, steps=1, tflops=1.0)
    assert row["model"] == name and row["tokens"] == 52 and float(row["layouts apart, nats per token"]) < 1e-4
    assert row["tokens/s"] > 0 and row["plan, GiB"] > 0


def test_the_report_goes_on_where_a_part_fails(monkeypatch):
    def part(name, *args):
        if name == "going_on":
            return [{"run": "resumed", "apart": "0.0e+00"}]
        return "RuntimeError: no kernel image" if name == "kernels" else {"model": args[0], "checkpointing": args[2]}

    monkeypatch.setattr(gpu, "in_a_process", part)
    text = gpu.report(argparse.Namespace(sizes=["1B Llama"], tokens=60, steps=1, tflops=1.0))
    assert text.startswith("# No GPU") and "- kernels : RuntimeError: no kernel image" in text
    assert text.count("| 1B Llama | True |") == 2 and "| resumed | 0.0e+00 |" in text


def test_a_part_in_a_process_of_its_own(warm):
    assert gpu.in_a_process("step", "nothing", 60, True, False, 1, 1.0) == "KeyError: 'nothing'"
