"""Whether bfloat16 is fast: asked of the machine, by its flags, and in one place."""

import pytest
import torch

from sparseprune import hardware


@pytest.mark.parametrize(
    ("text", "fast"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags: fpu amx_bf16 amx_tile\n", True),
        ("processor: 0\nFeatures\t: fp asimd bf16\n", True),
        ("flags: fpu avx2 avx512f\n", False),
        ("", False),
    ],
)
def test_a_cpu_is_asked_for_its_instructions(text, fast, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "cpuinfo")
    assert hardware.fast_bfloat16(torch.device("cpu")) is fast


def test_what_says_nothing_is_not_fast(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "nowhere")
    assert not hardware.fast_bfloat16(torch.device("cpu"))
    assert not hardware.fast_bfloat16(torch.device("meta"))


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_is_asked_for_its_capability(capability, fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert hardware.fast_bfloat16(torch.device("cuda", 0)) is fast


def test_a_forced_instruction_set_changes_nothing(monkeypatch):
    before = hardware.fast_bfloat16(torch.device("cpu"))
    monkeypatch.setenv("SPARSEPRUNE_ISA", "scalar")
    assert hardware.fast_bfloat16(torch.device("cpu")) is before
