"""The axis `vllm_version`: old releases, stock, with their known defects declared."""

import pytest

from harness.cell import Cell, Mode
from harness.hardware import Hardware
from harness.matrix import expand, installed_vllm, skip_reason
from harness.runner import run
from harness.server.launch import make_launch
from harness.suite import Group, Suite, load_all
from harness.verdict import Verdict
from harness.workload import workload_of
from harness.yaml_file import SuiteError
from helix_runtime.capabilities import declare

HOPPER = Hardware(family="hopper", name="H200", count=8, memory_bytes=2**37, compute_capability="9.0")
OLD = Cell(
    mode=Mode.STANDARD_DCP, backend="FLASHINFER", hardware="hopper", model="Qwen/Qwen3-30B-A3B", tp=8, kvp=2,
    comm="ag_rs", vllm_version="0.29.0",
)  # fmt: skip


def test_the_matrix_tells_versions_apart():
    plan = expand(load_all(["version-sweep"]), [HOPPER])
    dcp = {
        item.cell.vllm_version: item.declared
        for item in plan
        if item.cell.mode is Mode.STANDARD_DCP and item.cell.hardware == "hopper" and item.cell.interleave == 16
    }
    assert {version: str(verdict) for version, verdict in dcp.items()} == {
        "0.28.0": "xfail", "0.29.0": "xfail", "0.30.0": "pass", "0.31.0": "pass", "0.32.0": "pass",
        "nightly": "pass",
    }  # fmt: skip
    for item in plan:
        if item.baseline:
            assert item.baseline.vllm_version == item.cell.vllm_version
        if item.cell.baseline and not item.baseline:
            assert item.declared is Verdict.PASS


def test_a_prefix_hit_has_cells_of_its_own_that_are_wrong_in_0_28_alone():
    plan = expand(load_all(["version-sweep"]), [HOPPER])
    hits = {item.cell.vllm_version: item for item in plan if item.cell.backend == "CUTLASS_MLA" and item.baseline}
    assert {version: str(item.declared) for version, item in hits.items()} == {
        "0.28.0": "xfail", "0.29.0": "pass", "0.30.0": "pass", "0.31.0": "pass", "0.32.0": "pass", "nightly": "pass",
    }  # fmt: skip
    for item in hits.values():
        assert ("no-enable-prefix-caching", True) in item.baseline.serve and item.baseline.tp == 1
        assert "no-enable-prefix-caching" not in dict(item.cell.serve)
        repeated = [prompt for prompt in workload_of(item.cell, 512, 4096).prompts if prompt.kind == "repeat"]
        assert (
            len(repeated) == 1 and len(repeated[0].token_ids) > 128
        )  # more than a block of the backend: a prefix hits


def test_a_backend_that_a_release_does_not_have_in_the_table_is_said_so():
    group = {"name": "g", "mode": "standard-tp", "backend": "TRITON_MLA", "hardware": "hopper", "layout": {"tp": 2}}
    group |= {"model": "recipe:deepseek-v2", "vllm_version": "0.28.0"}
    suite = Suite(schema=1, name="s", description="d", groups=(Group(**group),))
    with pytest.raises(SuiteError, match="'g': unknown attention backend 'TRITON_MLA'; valid: FLASHINFER, CUTLASS_MLA"):
        expand([suite], [HOPPER])


def test_a_release_that_is_not_here_is_a_skip_that_says_so(monkeypatch):
    assert "needs vLLM 0.29.0; this environment has" in skip_reason(OLD, [HOPPER])
    monkeypatch.setattr("harness.matrix.installed_vllm", lambda: "0.29.0")
    assert skip_reason(OLD, [HOPPER]) is None
    assert installed_vllm() == "0.32.0"


def test_a_development_build_is_the_nightly_one(monkeypatch):
    installed_vllm.cache_clear()
    monkeypatch.setattr("harness.matrix.metadata.version", lambda name: "0.33.0rc2.dev159+g0123abc")
    assert installed_vllm() == "nightly"
    assert skip_reason(OLD.model_copy(update={"vllm_version": "nightly"}), [HOPPER]) is None
    assert "needs vLLM 0.29.0; this environment has nightly" in skip_reason(OLD, [HOPPER])
    installed_vllm.cache_clear()


def test_a_nightly_build_is_declared_as_the_last_release_in_standard_modes_only():
    for mode in ("standard-tp", "standard-dcp"):
        for backend in ("FLASH_ATTN", "FLASHINFER", "FLASHMLA"):
            last, now = (declare(backend, "hopper", mode, version) for version in ("0.32.0", "nightly"))
            assert now.support is last.support and now.reason == f"as in vLLM 0.32.0: {last.reason}"
    assert declare("FLASH_ATTN", "hopper", "helix-gqa", "nightly").reason.endswith("is not in the table of nightly")


def test_the_version_is_in_the_name_where_it_is_not_the_usual_one():
    assert OLD.id.endswith("/vllm=0.29.0")
    assert "vllm=" not in OLD.model_copy(update={"vllm_version": "0.32.0"}).id


def test_an_old_release_is_started_without_a_hook_of_ours(tmp_path):
    launch = make_launch(OLD, tmp_path, 21000)
    assert "--logits-processors" not in launch.argv and "--additional-config" not in launch.argv
    assert dict(launch.env)["VLLM_PLUGINS"] == "" and launch.proof_dir is None
    usual = make_launch(OLD.model_copy(update={"vllm_version": "0.32.0"}), tmp_path, 21000)
    assert "--logits-processors" in usual.argv and "VLLM_PLUGINS" not in dict(usual.env)


def test_old_releases_are_for_standard_modes():
    with pytest.raises(ValueError, match="'vllm_version' goes with a standard mode"):
        Group(
            name="g", mode="helix-gqa", backend="FLASH_ATTN", hardware="hopper", model="recipe:llama-k4",
            layout={"tp": 4, "dcp": 2}, vllm_version="0.29.0",
        )  # fmt: skip


def test_an_old_release_that_answers_wrong_is_the_known_limitation(tmp_path):
    from test_runner import Table, good, planned, transcript

    old = OLD.model_copy(update={"model": "recipe:llama-k4"})
    base = old.model_copy(update={"mode": Mode.STANDARD_TP, "kvp": 1, "comm": None})
    wrong = good(old, transcript=transcript(old, shift=0.9), proofs=())
    plan = [planned(base, baseline=None), planned(old, Verdict.XFAIL, baseline=base)]
    table = Table(answers={old.key: wrong})
    found = run(plan, run_dir=tmp_path, progress=lambda line: None, executor=table, localise=False)
    assert [str(result.verdict) for result in found] == ["pass", "xfail"]
    assert [follows for _, follows, _ in table.ran] == [False, False]  # it chose freely
