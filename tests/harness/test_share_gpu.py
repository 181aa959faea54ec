"""`--share-gpu`: the same cells with all ranks on one GPU."""

import json

import pytest

from harness.cell import Cell, Mode
from harness.hardware import Hardware
from harness.matrix import baseline_of, expand, on_one_gpu, skip_reason
from harness.server.launch import make_launch
from harness.suite import load_all

ONE_HOPPER = [Hardware(family="hopper", name="H200", count=1, memory_bytes=140 * 2**30, compute_capability="9.0")]


@pytest.fixture
def cell() -> Cell:
    return Cell(
        mode=Mode.HELIX_GQA,
        backend="FLASH_ATTN",
        hardware="hopper",
        model="recipe:llama-k4-h128",
        tp=4,
        kvp=2,
        comm="a2a",
    )


def test_four_ranks_need_four_gpus_or_the_option(cell):
    assert "needs 4 hopper GPUs; this host has 1 (--share-gpu" in skip_reason(cell, ONE_HOPPER)
    assert skip_reason(on_one_gpu(cell), ONE_HOPPER) is None


def test_a_shared_cell_is_eager_and_says_so_in_its_id_and_command(cell):
    shared = on_one_gpu(cell.model_copy(update={"serve": (("dtype", "bfloat16"),)}))
    assert shared.id.endswith("/share_gpu=True")
    assert shared.serve == (("dtype", "bfloat16"), ("enforce-eager", True))
    assert json.loads(shared.serve_args()[-1]) == {"helix": {"share_gpu": True}}
    assert "--distributed-executor-backend mp" in " ".join(shared.serve_args())  # else vLLM looks for a Ray cluster
    assert on_one_gpu(shared) == shared
    assert shared.key != cell.key


def test_options_keep_their_places_so_that_stock_references_are_the_same_cells(cell):
    apart = cell.model_copy(update={"serve": (("enforce-eager", True), ("seed", 1)), "workload": "standard@4"})
    shared = on_one_gpu(apart)
    assert shared.serve == apart.serve
    assert baseline_of(baseline_of(shared)).key == baseline_of(baseline_of(apart)).key


def test_cpu_cells_and_single_ranks_stay_as_they_are(cell):
    for other in (cell.model_copy(update={"hardware": "cpu"}), cell.model_copy(update={"tp": 1, "kvp": 1})):
        assert on_one_gpu(other) is other


def test_a_cell_about_cuda_graphs_shares_no_gpu(cell):
    """Collectives through host memory cannot be captured: it stays as it is, and is skipped for want of GPUs."""
    graphs = cell.model_copy(update={"serve": (("compilation-config.cudagraph_mode", "FULL"),)})
    assert on_one_gpu(graphs) is graphs
    assert "needs 4 hopper GPUs; this host has 1" in skip_reason(graphs, ONE_HOPPER)


def test_the_baseline_shares_too_and_is_compared_with_a_stock_single_rank(cell):
    base = baseline_of(on_one_gpu(cell.model_copy(update={"helix": (("allow_gqa_tpa1", True),)})))
    assert base.mode is Mode.STANDARD_TP
    assert base.helix == (("share_gpu", True),)
    reference = baseline_of(base)
    assert (reference.tp, reference.helix) == (1, ())


def test_only_a_sharing_baseline_loads_the_plugin(cell, tmp_path):
    def plugins(of: Cell) -> str | None:
        return dict(make_launch(of, tmp_path, 8000).env).get("VLLM_PLUGINS")

    assert plugins(baseline_of(cell)) == ""
    assert plugins(baseline_of(on_one_gpu(cell))) != ""


def test_standard_dcp_proves_its_path_on_a_gpu_as_well(cell, tmp_path):
    argv = make_launch(cell.model_copy(update={"mode": Mode.STANDARD_DCP}), tmp_path, 8000).argv
    given = json.loads(argv[argv.index("--additional-config") + 1])
    assert given == {"helix": {"proof_dir": str(tmp_path / "proof")}}


def test_a_whole_plan_shares_and_nothing_of_it_is_short_of_gpus():
    plan = expand(load_all(["helix-gqa", "standard-dcp"]), ONE_HOPPER, share_gpu=True)
    here = [item for item in plan if item.cell.hardware == "hopper"]
    assert here
    assert not [item.skip for item in here if item.skip and "GPUs" in item.skip]
    assert all(dict(item.cell.helix).get("share_gpu") for item in here if item.cell.tp > 1)
    assert not any(dict(item.cell.helix).get("share_gpu") for item in plan if item.cell.hardware == "cpu")
