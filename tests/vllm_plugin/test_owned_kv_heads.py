"""Which KV heads the owned query heads read, by hand and against the definition."""

import pytest

pytest.importorskip("vllm", reason="needs vLLM: install the extra `cpu`")

from helix_runtime.vllm_plugin.owned_kv_heads import owned_kv_heads


@pytest.mark.parametrize(
    ("heads", "kv_heads", "kvp", "kvp_rank", "expected"),
    [
        (8, 2, 2, 0, slice(0, 1)),  # 4 query heads a KV head, 4 owned: one whole KV head each
        (8, 2, 2, 1, slice(1, 2)),
        (8, 2, 4, 1, slice(0, 1)),  # 2 owned: half of a KV head's queries
        (8, 2, 4, 2, slice(1, 2)),
        (16, 4, 2, 1, slice(2, 4)),  # 8 owned: two KV heads
        (6, 2, 3, 1, [0, 1]),  # 3 a KV head, 2 owned: heads 2 and 3 straddle
        (6, 2, 3, 2, [1, 1]),  # 2 owned and 3 a KV head do not align: gathered one by one on every rank
    ],
)
def test_by_hand(heads, kv_heads, kvp, kvp_rank, expected):
    assert owned_kv_heads(heads, kv_heads, kvp, kvp_rank) == expected


@pytest.mark.parametrize("kvp", [2, 3, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 6])
def test_every_owned_head_meets_its_kv_head(kvp, kv_heads, group):
    group *= kvp  # so that every rank owns a whole number of heads
    heads = kv_heads * group
    owned = heads // kvp
    for rank in range(kvp):
        found = owned_kv_heads(heads, kv_heads, kvp, rank)
        selected = list(range(kv_heads))[found] if isinstance(found, slice) else found
        # Inside attention the owned head j reads selected[j // (owned / len(selected))].
        assert owned % len(selected) == 0
        for j in range(owned):
            assert selected[j // (owned // len(selected))] == (rank * owned + j) // group
