"""Cells of CUDA backends without a GPU: vLLM's own classes and our hooks, with only compiled kernels replaced.

`emulated_ranks.py` runs each case as the ranks of a server would; here its answers are judged. What only a GPU can show
is left: the compiled kernels themselves, streams, and what Triton's compiler makes of the kernels that are interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="vLLM's kernels need Triton; not installed")
pytest.importorskip("vllm", reason="needs vLLM: install the extra `cpu`")

#: Largest difference from fp64, of the largest value: rounding to bf16 of queries' partials and of their merge.
ROUNDING = 0.012

GQA = {"model": "llama-k4-h128", "tp": 2, "kvp": 2, "helix": True, "comm": "a2a", "interleave": 16}
MLA = {"model": "deepseek-v2", "tp": 2, "kvp": 2, "helix": True, "comm": "a2a", "interleave": 64, "block": 64}
DCP = {"tp": 4, "helix": False}
RIGHT = [
    {**GQA, "backend": "FLASHINFER", "tp": 4},
    {**GQA, "backend": "FLASHINFER", "comm": "ag_rs", "interleave": 1},
    {**GQA, "backend": "FLASH_ATTN", "combine": "triton"},
    {**GQA, "backend": "FLASH_ATTN", "tp": 4, "overlap": 3},
    {**MLA, "backend": "FLASHMLA", "combine": "triton"},
    {**MLA, "backend": "FLASH_ATTN_MLA", "interleave": 1, "block": 16},
    {**MLA, "backend": "TRITON_MLA", "comm": "ag_rs"},
    {**MLA, "backend": "FLASHMLA", **DCP},
]
#: A fault, and the batches (`sequence_of_batches`) whose answers it must spoil: those that merge several shards.
WRONG = [
    ({**GQA, "backend": "FLASHINFER", "fault": "lse-base-2:prefill"}, {2, 3}),
    ({**GQA, "backend": "FLASH_ATTN", "fault": "drop-shard:decode"}, {4}),
    ({**MLA, "backend": "FLASHMLA", "fault": "lse-base-2"}, {2, 4}),
]
MORE = [
    {**kind, "backend": backend, "comm": comm, "interleave": interleave, "block": block}
    for kind, backends, block, interleaves in (
        ({**GQA, "tp": 4}, ("FLASHINFER", "FLASH_ATTN"), 16, (1, 16)),
        ({**GQA, **DCP, "model": "llama-k2-h128"}, ("FLASHINFER", "FLASH_ATTN"), 16, (1, 16)),
        ({**MLA, "tp": 4, "kvp": 4}, ("FLASHMLA", "FLASH_ATTN_MLA", "TRITON_MLA"), 64, (1, 64)),
        ({**MLA, **DCP}, ("FLASHMLA", "FLASH_ATTN_MLA", "TRITON_MLA"), 64, (64,)),
    )
    for backend in backends
    for interleave in interleaves
    for comm in ("a2a", "ag_rs")
] + [
    {**kind, "backend": backend, "combine": "triton"}
    for kind, backends in (({**GQA, "tp": 4}, ("FLASHINFER",)), (MLA, ("FLASH_ATTN_MLA", "TRITON_MLA")))
    for backend in backends
]


def name(case: dict) -> str:
    return "-".join(str(value) for value in case.values())


def answers(cases: list[dict], folder: Path) -> dict[str, dict]:
    """What the ranks of each case answered, by its name."""
    (folder / "cases.json").write_text(json.dumps(cases))
    root, worker = str(Path(__file__).parents[2]), Path(__file__).with_name("emulated_ranks.py")
    run = subprocess.run(
        [sys.executable, str(worker), str(folder), str(folder / "cases.json")], capture_output=True, text=True,
        timeout=1800, env=os.environ | {"PYTHONPATH": root, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(cases), run.stderr[-4000:]
    return dict(zip(map(name, cases), lines, strict=True))


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    return answers([*RIGHT, *(case for case, _ in WRONG)], tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("case", RIGHT, ids=name)
def test_every_batch_is_answered_as_by_full_attention_and_the_proof_holds(answered, case):
    found = answered[name(case)]
    assert found["failed"] is None, found["failed"]
    assert max(found["errors"]) < ROUNDING and found["proof"] is None, found
    upstream = {"a2a": "dcp_a2a_lse_reduce", "ag_rs": "cp_lse_ag_out_rs"}[case["comm"]]
    assert found["combine"].endswith(case.get("combine", upstream))


@pytest.mark.parametrize("case", RIGHT, ids=name)
def test_every_lse_is_merged_in_fp32(answered, case):
    """TRITON_MLA's own is rounded to the model's dtype, a multiple of the error of everything else."""
    assert answered[name(case)]["lse_dtypes"] == ["torch.float32"]


@pytest.mark.parametrize("case, spoilt", WRONG, ids=lambda part: name(part) if isinstance(part, dict) else "")
def test_a_fault_spoils_the_batches_that_it_is_armed_for_and_no_other(answered, case, spoilt):
    found = answered[name(case)]
    assert found["failed"] is None, found["failed"]
    assert {index for index, error in enumerate(found["errors"]) if error > ROUNDING} == spoilt, found["errors"]


@pytest.mark.nightly
def test_all_layouts_combines_and_interleaves(tmp_path):
    for case, found in zip(MORE, answers(MORE, tmp_path).values(), strict=True):
        assert found["failed"] is None, (name(case), found["failed"])
        assert max(found["errors"]) < ROUNDING and found["proof"] is None, (name(case), found)
