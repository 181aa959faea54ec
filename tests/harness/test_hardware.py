"""Detection from what the drivers say, and what a host without a GPU is."""

import pytest

from harness import hardware
from harness.hardware import Device, choose, cpu, detect, family_of, parse_smi

GIB = 2**30
H200 = Device("NVIDIA H200", "9.0", 141 * GIB)
RTX = Device("NVIDIA RTX PRO 6000", "12.0", 96 * GIB)


@pytest.mark.parametrize(
    ("capability", "family"),
    [
        ("9.0", "hopper"),
        ("10.0", "blackwell"),
        ("10.3", "blackwell"),
        ("12.0", "blackwell-rtx"),
        ("8.0", "ampere"),
        ("8.9", "ada"),
        ("7.5", "sm75"),
    ],
)
def test_family_is_the_compute_capability(capability, family):
    assert family_of(capability) == family


def test_gpus_are_grouped_by_family():
    found = detect(lambda: [H200, RTX, H200], visible=None)
    assert [(device.family, device.count) for device in found] == [("hopper", 2), ("blackwell-rtx", 1)]
    assert found[0].memory_bytes == 141 * GIB
    assert "2 x NVIDIA H200, 141 GiB each" in str(found[0])


@pytest.mark.parametrize(("visible", "count"), [("0,2", 2), ("1", 1), ("0,7", 1), ("GPU-aa,GPU-bb", 2)])
def test_only_visible_gpus_count(visible, count):
    assert detect(lambda: [H200] * 4, visible=visible)[0].count == count


@pytest.mark.parametrize("visible", ["", "9"])
def test_no_visible_gpu_leaves_the_cpu(visible):
    assert [device.family for device in detect(lambda: [H200], visible=visible)] == ["cpu"]


def test_cpu_is_named_by_the_kernel(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU 9000\nprocessor\t: 1\nmodel name\t: Some CPU 9000\n")
    found = cpu(info)
    assert (found.family, found.name, found.compute_capability) == ("cpu", "Some CPU 9000", None)
    assert found.count >= 1
    assert found.memory_bytes > 2**20
    assert cpu(tmp_path / "absent").name == "unknown CPU"


def test_nvidia_smi_lines():
    text = "NVIDIA H200, 9.0, 143771\nNVIDIA RTX, Special, 12.0, 97887\nNo devices were found\nx, N/A, 12\n\n"
    assert parse_smi(text) == [
        Device("NVIDIA H200", "9.0", 143771 * 2**20),
        Device("NVIDIA RTX, Special", "12.0", 97887 * 2**20),
    ]


def test_nvidia_smi_is_asked_where_nvml_says_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "_query_nvml", list)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA B200, 10.0, 183359'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert hardware._query_nvml() or hardware._query_smi() == [Device("NVIDIA B200", "10.0", 183359 * 2**20)]


def test_a_broken_nvidia_smi_is_no_gpu(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert hardware._query_smi() == []


def test_choice_takes_what_is_there_and_marks_what_is_not():
    gpus = detect(lambda: [H200] * 8, visible=None)
    assert choose([], gpus) == gpus
    hopper, assumed, processor = choose(["hopper", "blackwell", "cpu", "hopper"], gpus)
    assert (hopper.count, hopper.detected) == (8, True)
    assert (assumed.family, assumed.detected) == ("blackwell", False)
    assert (processor.family, processor.detected) == ("cpu", True)
