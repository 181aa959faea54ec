"""What can be known of the benchmarks without a GPU: the pages agree with the results, the sizes are right."""

import pytest

pytest.importorskip("triton", reason="the benchmarks import our kernels")

from benchmarks import tables
from benchmarks.models import Gemm, Layout, Transfer, step_of, token_bytes, weight_bytes
from benchmarks.records import Record, Results
from benchmarks.step import link_us
from helix_runtime.shapes import load_shape

LLAMA = load_shape("meta-llama/Llama-3.1-405B-Instruct")
R1 = load_shape("deepseek-ai/DeepSeek-R1")


@pytest.mark.parametrize("path", tables.FILES, ids=lambda path: path.name)
def test_the_tables_of_a_page_are_those_of_its_results(path):
    assert tables.filled(path.read_text()) == path.read_text(), "run python -m benchmarks.tables"


def test_a_rank_of_helix_projects_its_groups_queries_and_one_kv_head():
    """128 heads over TPA 8: 16 of them and 1 of 8 KV heads, 18 rows of 128; it owns 4 heads after the exchange."""
    step = step_of(LLAMA, Layout("helix", 32, 4), 8, 1 << 20)
    assert step.gemms[:2] == (Gemm("qkv", 8, 16384, 18 * 128), Gemm("o_proj", 8, 4 * 128, 16384))
    assert (step.attention.q_heads, step.attention.kv_heads, step.attention.tokens) == (16, 1, 1 << 18)
    assert step.exchange == (4, 8, 4, 128)
    # three peers get 8 tokens x 4 heads of 128 bf16 and an fp32 lse
    assert step.transfers[0] == Transfer("all-to-all", 4, 3 * 8 * 4 * (256 + 4))


def test_standard_dcp_projects_its_own_heads_and_gathers_queries():
    step = step_of(LLAMA, Layout("standard-dcp", 32, 4), 8, 1 << 20)
    assert step.gemms[0].n == (4 + 2) * 128 and step.attention.q_heads == 16
    assert step.transfers[0] == Transfer("all-gather", 4, 2 * 8 * 4 * 128)


def test_cache_and_weights_of_a_rank():
    assert token_bytes(LLAMA, Layout("standard-tp", 32)) == 126 * 512
    assert token_bytes(R1, Layout("helix", 32, 32)) == 61 * 1152 / 32
    # The whole of Llama-405B is 810 GB in bf16; KV projections are repeated four times on 32 ranks.
    assert 32 * weight_bytes(LLAMA, Layout("standard-tp", 32)) == pytest.approx(
        812e9 + 24 * 2 * 126 * 2 * 128 * 16384, rel=0.01
    )


def test_the_link_model_by_hand():
    """262,144 bytes among 32: 2 * 31 / 32 of them over 450 GB/s is 1.129 µs, after 2.6 + 5 * 1.1 µs."""
    assert link_us(Transfer("all-reduce", 32, 262144)) == pytest.approx(8.1 + 1.1287, abs=1e-3)


def test_results_survive_the_file(tmp_path):
    results = Results("attention", "command", "GPU", {"torch": "2"}, tmp_path / "r.json")
    fast = Record("attention/A", {"page": 16}, 10, 20, 1.0, 0.9, 1.1, {"case": "c", "of_read": 0.5})
    slow = Record("attention/A", {"page": 64}, 10, 20, 2.0, 1.9, 2.1, {"case": "c"})
    results.records += [slow, fast]
    results.failed("x", ValueError("bad\nmore"))
    results.write()
    read = Results.read(results.path)
    assert read.records == [fast, slow]  # the best first: what the planner reads
    assert read.failures == [{"what": "x", "error": "ValueError: bad"}]
