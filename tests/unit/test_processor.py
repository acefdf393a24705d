"""Names and instruction sets of processors, as Linux lists them on different machines."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from ollatune.base import processor

X86 = (
    "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu sse2 avx512_bf16\nvmx flags\t: ept\n\n"
    "processor\t: 1\nmodel name\t: other\nflags\t\t: fpu\n"
)
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd bf16\nCPU part\t: 0xd40\n"


def cpuinfo(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "cpuinfo").write_text(text)
    monkeypatch.setattr(processor, "_CPUINFO", folder / "cpuinfo")


def test_the_first_core_of_an_x86_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo(X86, tmp_path, monkeypatch)
    assert processor.processor_flags() == "fpu sse2 avx512_bf16"
    assert processor.processor_name() == "AMD EPYC"


def test_arm_has_features_and_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo(ARM, tmp_path, monkeypatch)
    assert processor.processor_flags() == "fp asimd bf16"
    assert processor.processor_name() == (platform.processor() or platform.machine())


def test_other_systems_have_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "none")
    assert processor.processor_flags() == ""
    assert processor.processor_name() == (platform.processor() or platform.machine())
