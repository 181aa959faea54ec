"""Detection from what the drivers say, and what a host without a GPU is."""

import sys
from types import SimpleNamespace

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


class StubNvml:
    """Some GPUs, with NVML's answer about each pair; an answer of None raises."""

    NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK, NVML_P2P_STATUS_UNKNOWN = 2, 0, 6
    NVMLError = RuntimeError

    def __init__(self, count, answer):
        self.count, self.answer = count, answer

    def nvmlInit(self): ...

    def nvmlShutdown(self): ...

    def nvmlDeviceGetCount(self):
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index):
        return SimpleNamespace(index=index)

    def nvmlDeviceGetName(self, handle):
        return b"NVIDIA H200"

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return 9, 0

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=141 * GIB)

    def nvmlDeviceGetP2PStatus(self, one, other, what):
        assert what == self.NVML_P2P_CAPS_INDEX_NVLINK
        assert one.index != other.index
        status = self.answer(one.index, other.index)
        if status is None:
            raise self.NVMLError("Not Supported")
        return status


def by_twos(one, other):  # bridges between 0 and 1, and 2 and 3; NOT_SUPPORTED elsewhere
    return 0 if one // 2 == other // 2 else 5


@pytest.mark.parametrize(
    ("count", "answer", "visible", "nvlinks", "words"),
    [
        (4, lambda *_: 0, None, ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)), "NVLink between all)"),
        (4, by_twos, None, ((0, 1), (2, 3)), "NVLink only between 0-1, 2-3)"),
        (4, by_twos, "2,3", ((2, 3),), "NVLink between all)"),
        (4, by_twos, "1,2", (), "no NVLink)"),
        (4, by_twos, "GPU-aa,GPU-bb", None, "NVLink unknown)"),
        (2, lambda *_: None, None, None, "NVLink unknown)"),
        (2, lambda *_: 6, None, None, "NVLink unknown)"),
        (1, lambda *_: None, None, (), "compute capability 9.0)"),
    ],
)
def test_pairs_that_nvlink_joins(monkeypatch, count, answer, visible, nvlinks, words):
    monkeypatch.setitem(sys.modules, "pynvml", StubNvml(count, answer))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (found,) = detect(hardware._query_nvml, visible)
    assert found.nvlinks == nvlinks
    assert str(found).endswith(words)


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
