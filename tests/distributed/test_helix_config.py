"""Layouts, capabilities and shapes: needs no GPU, no torch and no vLLM."""

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from layout_strategies import requests

from helix_runtime import capabilities
from helix_runtime.capabilities import HARDWARE, MODES, ORIGINAL, ROWS, SUPPORTED_VLLM, Support, declare
from helix_runtime.layout import RULES, Layout, LayoutError, legal_layouts, resolve_layout
from helix_runtime.shapes import ModelShape, known_shapes, load_shape

NEMOTRON = "nvidia/Llama-3.1-Nemotron-Nano-8B-v1"
V2_LITE = "deepseek-ai/DeepSeek-V2-Lite-Chat"


def refusal(*args, **kwargs) -> LayoutError:
    with pytest.raises(LayoutError) as caught:
        resolve_layout(*args, **kwargs)
    return caught.value


def flags(error: LayoutError) -> list[str]:
    return [" ".join(layout.to_args()) for layout in error.legal]


#: (rule, arguments of resolve_layout, what its text quotes)
REFUSED = [
    ("positive-sizes", (0, 1, 32, 8, False, False), "tensor_parallel_size"),
    ("positive-sizes", (8, -2, 32, 8, False, True), "-2"),
    ("positive-sizes", (True, 1, 32, 8, False, False), "True"),
    ("positive-sizes", (8, 2, 32, None, False, True), "num_kv_heads"),
    ("positive-sizes", (8, 2.0, 32, 8, False, True), "2.0"),
    ("query-heads-divisible-by-kv-heads", (2, 1, 30, 8, False, False), "30 query heads cannot share 8"),
    ("tp-divisible-by-dcp", (8, 3, 32, 8, False, True), "TP=8 is not divisible by DCP=3"),
    ("tp-divisible-by-dcp", (4, 8, 32, 8, True, False), "TP=4 is not divisible by DCP=8"),
    ("helix-needs-dcp", (8, 1, 32, 8, False, True), "DCP > 1"),
    ("helix-needs-dcp", (1, 1, 16, 1, True, True), "DCP > 1"),
    ("helix-mla-needs-tpa-1", (8, 4, 16, 1, True, True), "TPA=2 and would keep TP / DCP = 2 copies"),
    (
        "tpa-at-most-kv-heads",
        (16, 2, 32, 4, False, True),
        "TPA=8 exceeds the model's 4 KV heads (TP=16, DCP=2)",
    ),
    ("tpa-at-most-kv-heads", (4, 2, 16, 1, False, True), "one KV head can only have TPA=1"),
    ("kv-heads-divisible-by-tpa", (8, 2, 48, 6, False, True), "6 KV heads are not divisible by TPA=4"),
    ("query-heads-divisible-by-tpa", (8, 2, 6, 6, False, True), "6 query heads are not divisible by TPA=4"),
    ("query-heads-divisible-by-tp", (6, 3, 32, 8, False, True), "32 query heads are not divisible by TP=6"),
    ("query-heads-divisible-by-tp", (3, 1, 16, 1, True, False), "16 query heads are not divisible by TP=3"),
    ("gqa-tpa-1", (4, 4, 32, 8, False, True), "documented limit of the original design; allow_gqa_tpa1"),
    ("gqa-tpa-1", (4, 4, 32, 1, False, True), "one KV head can only have TPA=1"),
    ("tp-above-kv-heads", (8, 2, 32, 8, False, False), "TP=8 leaves no copy of the 8 KV heads"),
    ("dcp-at-most-kv-copies", (8, 4, 32, 4, False, False), "DCP=4 exceeds 8 / 4 = 2"),
    ("query-group-divisible-by-dcp", (6, 2, 6, 2, False, False), "3 query heads per KV head, DCP=2"),
    ("tp-fits-kv-heads", (6, 1, 12, 4, False, False), "TP=6 and 4 KV heads"),
    ("kv-copies-divisible-by-dcp", (12, 4, 24, 2, False, False), "two different KV heads"),
]


class TestPublishedUsage:
    def test_nemotron_tp8_dcp2_interleave_16(self):
        model = load_shape(NEMOTRON)
        layout = resolve_layout(
            8, 2, helix_mode=True, attention_backend="FLASH_ATTN", interleave_size=16, **model.layout_arguments()
        )
        assert (layout.mode, layout.tp, layout.kvp, layout.tpa) == ("helix-gqa", 8, 2, 4)
        assert layout.to_args() == (
            "--tensor-parallel-size", "8", "--decode-context-parallel-size", "2", "--helix-mode",
            "--attention-backend", "FLASH_ATTN", "--cp-kv-cache-interleave-size", "16",
        )  # fmt: skip
        # 2 KV heads x K and V x 128 x 2 bytes / 2 shards = 512 bytes a layer, 32 layers.
        assert layout.kv_bytes_per_token_layer == 512
        assert layout.kv_bytes_per_token == 16384
        assert layout.kv_capacity_factor == 1

    def test_deepseek_v2_lite_tp8_dcp8_interleave_64(self):
        model = load_shape(V2_LITE)
        layout = resolve_layout(8, 8, helix_mode=True, interleave_size=64, block_size=64, **model.layout_arguments())
        assert (layout.mode, layout.tpa) == ("helix-mla", 1)
        # One latent of 576 x 2 bytes / 8 shards = 144 bytes a layer, 27 layers.
        assert layout.kv_bytes_per_token_layer == 144
        assert layout.kv_bytes_per_token == 3888
        assert layout.kv_capacity_factor == 8
        assert layout.to_args()[-2:] == ("--cp-kv-cache-interleave-size", "64")


class TestRankMaps:
    def test_helix_gqa_tp8_dcp2(self):
        layout = resolve_layout(8, 2, 32, 4, False, True)
        assert [layout.tpa_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert [layout.kvp_rank(rank) for rank in range(8)] == [0, 1, 0, 1, 0, 1, 0, 1]
        assert layout.kvp_groups == ((0, 1), (2, 3), (4, 5), (6, 7))
        assert layout.tpa_groups == ((0, 2, 4, 6), (1, 3, 5, 7))
        assert layout.query_heads_computed(3) == range(8, 16)
        assert layout.query_heads_projected(3) == range(8, 16)
        assert layout.query_heads_owned(3) == range(12, 16)
        assert layout.kv_heads(3) == range(1, 2)
        assert layout.duplication == 1

    def test_helix_gqa_keeps_several_kv_heads_on_a_rank(self):
        layout = resolve_layout(6, 3, 24, 6, False, True)
        assert layout.tpa == 2
        assert layout.kv_heads(2) == range(0, 3)
        assert layout.kv_heads(3) == range(3, 6)
        assert layout.query_heads_computed(5) == range(12, 24)
        assert layout.query_heads_owned(5) == range(20, 24)

    def test_standard_dcp_gathers_the_heads_of_one_kv_head(self):
        layout = resolve_layout(8, 2, 16, 2, False, False)
        assert layout.mode == "standard-dcp"
        assert layout.query_heads_projected(5) == range(10, 12)
        assert layout.query_heads_computed(5) == range(8, 12)  # ranks 4 and 5, 2 heads each
        assert [layout.kv_heads(rank).start for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
        assert layout.duplication == 2  # 4 copies in standard TP, split between 2
        assert layout.kv_capacity_factor == 2

    @pytest.mark.parametrize(
        ("tp", "kv_heads", "first", "last", "copies"),
        [(4, 8, range(0, 2), range(6, 8), 1), (8, 8, range(0, 1), range(7, 8), 1), (8, 2, range(0, 1), range(1, 2), 4)],
    )
    def test_standard_tp(self, tp, kv_heads, first, last, copies):
        layout = resolve_layout(tp, 1, 32, kv_heads, False, False)
        assert (layout.mode, layout.tpa, layout.kv_capacity_factor) == ("standard-tp", tp, 1)
        assert (layout.kv_heads(0), layout.kv_heads(tp - 1), layout.duplication) == (first, last, copies)

    def test_standard_dcp_for_mla_with_dcp_below_tp(self):
        layout = resolve_layout(8, 2, 16, 16, True, False, num_layers=1)
        assert (layout.mode, layout.duplication, layout.kv_capacity_factor) == ("standard-dcp", 4, 2)
        assert layout.kv_heads(7) == range(0, 1)
        assert layout.kv_bytes_per_token == 576 * 2 / 2

    @pytest.mark.parametrize("rank", [-1, 8])
    def test_a_rank_outside_the_group_is_an_error(self, rank):
        with pytest.raises(ValueError, match="ranks 0 to 7"):
            resolve_layout(8, 2, 32, 4, False, True).query_heads_owned(rank)


class TestWhatItBuys:
    @pytest.mark.parametrize(
        ("tp", "dcp", "kv_heads", "factor"), [(8, 4, 4, 2), (16, 4, 4, 4), (4, 2, 4, 1), (4, 2, 8, 1), (16, 8, 2, 8)]
    )
    def test_helix_gqa_capacity_is_max_1_tp_over_k(self, tp, dcp, kv_heads, factor):
        helix = resolve_layout(tp, dcp, 64, kv_heads, False, True, head_size=128)
        standard = resolve_layout(tp, 1, 64, kv_heads, False, False, head_size=128)
        assert helix.kv_capacity_factor == factor
        assert standard.kv_bytes_per_token_layer / helix.kv_bytes_per_token_layer == factor

    def test_it_says_when_nothing_is_bought(self):
        assert "buys no KV capacity" in resolve_layout(4, 2, 16, 4, False, True).notes[0]
        assert "grows 2x" in resolve_layout(8, 2, 32, 4, False, True).notes[0]

    def test_it_says_when_stock_dcp_caches_the_same(self):
        assert any("stock DCP" in note for note in resolve_layout(8, 2, 32, 4, False, True).notes)
        assert not any("stock DCP" in note for note in resolve_layout(8, 4, 32, 4, False, True).notes)

    def test_fp4_bytes(self):
        layout = resolve_layout(8, 1, 128, 8, False, False, head_size=128, kv_dtype_bytes=0.5, num_layers=126)
        assert layout.kv_bytes_per_token == 126 * 2 * 128 * 0.5

    def test_without_head_size_there_are_no_bytes(self):
        assert resolve_layout(8, 1, 128, 8, False, False, num_layers=2).kv_bytes_per_token is None


class TestRefusals:
    @pytest.mark.parametrize(("rule", "args", "quoted"), REFUSED)
    def test_rule_and_numbers(self, rule, args, quoted):
        error = refusal(*args)
        assert error.rule == rule
        assert quoted in str(error)
        assert isinstance(error, ValueError)

    def test_every_rule_has_been_seen(self):
        """`REFUSED` and the tests below leave no rule out; two rules never share a name."""
        seen = {rule for rule, _, _ in REFUSED}
        names = [rule.name for rule in RULES]
        assert len(names) == len(set(names))
        assert set(names) - seen == {"known-names", "interleave-divides-block", "capability"}

    def test_nearest_layouts_are_flags(self):
        error = refusal(16, 2, 32, 4, False, True)
        assert flags(error) == [
            "--tensor-parallel-size 16 --decode-context-parallel-size 4 --helix-mode",
            "--tensor-parallel-size 16 --decode-context-parallel-size 8 --helix-mode",
            "--tensor-parallel-size 8 --decode-context-parallel-size 2 --helix-mode",
            "--tensor-parallel-size 16 --decode-context-parallel-size 2",  # legal as standard DCP
        ]
        assert f"legal here: {flags(error)[0]} (TPA=4), " in str(error)

    def test_mla_with_smaller_dcp_names_helix_and_standard_dcp(self):
        error = refusal(8, 4, 16, None, True, True)
        assert flags(error)[0] == "--tensor-parallel-size 8 --decode-context-parallel-size 8 --helix-mode"
        assert flags(error)[-1] == "--tensor-parallel-size 8 --decode-context-parallel-size 4"

    def test_one_kv_head_is_offered_the_switch(self):
        error = refusal(4, 2, 16, 1, False, True)
        assert error.legal[0].tpa == 1
        assert error.legal[0].allow_gqa_tpa1
        assert error.legal[0].to_args()[-2:] == ("--additional-config", '{"helix": {"allow_gqa_tpa1": true}}')

    def test_the_switch_allows_tpa_1(self):
        layout = resolve_layout(4, 4, 16, 1, False, True, allow_gqa_tpa1=True)
        assert (layout.tpa, layout.kv_capacity_factor) == (1, 4)
        assert any("TPA=1" in note for note in layout.notes)

    def test_interleave_must_divide_the_block(self):
        error = refusal(8, 2, 32, 8, False, True, interleave_size=24, block_size=16)
        assert error.rule == "interleave-divides-block"
        assert "24 does not divide the block size 16" in str(error)
        assert (error.legal[0].tp, error.legal[0].kvp, error.legal[0].interleave_size) == (8, 2, 16)

    def test_interleave_does_not_matter_without_context_parallelism(self):
        assert resolve_layout(8, 1, 32, 8, False, False, interleave_size=24, block_size=16).mode == "standard-tp"

    def test_a_model_that_cannot_be_has_no_legal_layout(self):
        error = refusal(2, 1, 30, 8, False, False)
        assert error.legal == ()
        assert "no layout of this model is legal" in str(error)


class TestCapabilityRefusals:
    def test_row_and_source_are_quoted(self):
        error = refusal(8, 8, 16, 1, True, True, "CUTLASS_MLA", "hopper")
        assert error.rule == "capability"
        row = declare("CUTLASS_MLA", "hopper", "helix-mla")
        assert row.reason in str(error)
        assert "v1/attention/backends/mla/cutlass_mla.py" in str(error)
        assert error.legal[0].attention_backend == "FLASH_ATTN_MLA"
        assert (error.legal[0].tp, error.legal[0].kvp) == (8, 8)

    def test_backend_for_the_other_kind_of_model(self):
        assert "FLASHMLA serves MLA models" in str(refusal(8, 2, 32, 8, False, True, "FLASHMLA"))
        assert "FLASH_ATTN serves GQA models" in str(refusal(8, 1, 32, 8, True, False, "FLASH_ATTN"))

    def test_without_hardware_a_backend_is_refused_only_if_no_hardware_will_do(self):
        assert resolve_layout(8, 8, 16, 1, True, True, "CUTLASS_MLA").mode == "helix-mla"
        assert "returns no LSE" in str(refusal(8, 2, 32, 8, False, True, "TRITON_ATTN"))

    def test_hardware_alone(self):
        assert resolve_layout(4, 2, 16, 4, False, True, hardware="cpu").mode == "helix-gqa"
        assert resolve_layout(8, 8, 16, 1, True, True, hardware="cpu").mode == "helix-mla"
        error = refusal(8, 8, 16, 1, True, True, hardware="ampere")
        assert "TRITON_MLA" in str(error)
        assert "helix-mla" not in {layout.mode for layout in error.legal}

    def test_a_known_limitation_resolves_and_says_so(self):
        layout = resolve_layout(8, 2, 32, 8, False, True, "FLASHINFER", "hopper", vllm_version="helix-original")
        assert any(note.startswith("known limitation: ") and "root cause" in note for note in layout.notes)

    def test_unknown_names_list_the_valid_ones(self):
        error = refusal(4, 2, 16, 4, False, True, "FLASH")
        assert error.rule == "known-names"
        assert "valid: FLASH_ATTN, FLASHINFER," in str(error)
        assert "it covers: helix-original" in str(refusal(4, 2, 16, 4, False, True, vllm_version="0.14.0"))
        assert "hopper, blackwell, blackwell-rtx, cpu" in str(refusal(4, 2, 16, 4, False, True, hardware="turing"))

    def test_cpu_layouts_carry_no_backend_flag(self):
        layout = resolve_layout(4, 2, 16, 4, False, True, "HELIX_CPU", "cpu")
        assert "--attention-backend" not in layout.to_args()


class TestLegalLayouts:
    def test_llama_8b_on_8_gpus(self):
        layouts = legal_layouts(32, 8, False, 8, helix_mode=True)
        assert [(layout.tp, layout.kvp) for layout in layouts] == [(4, 2), (8, 2), (8, 4)]

    def test_both_kinds_with_the_switch(self):
        layouts = legal_layouts(4, 1, False, 2, allow_gqa_tpa1=True)
        assert [(layout.mode, layout.tp, layout.kvp) for layout in layouts] == [
            ("standard-tp", 1, 1), ("standard-tp", 2, 1), ("standard-dcp", 2, 2), ("helix-gqa", 2, 2),
        ]  # fmt: skip

    def test_mla(self):
        layouts = legal_layouts(16, None, True, 4, hardware="hopper")
        assert [(layout.mode, layout.tp, layout.kvp) for layout in layouts if layout.tp == 4] == [
            ("standard-tp", 4, 1), ("standard-dcp", 4, 2), ("standard-dcp", 4, 4), ("helix-mla", 4, 4),
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("rule", "model", "options"),
        [
            ("query-heads-divisible-by-kv-heads", (30, 8, False), {}),
            ("positive-sizes", (0, 8, False), {}),
            ("known-names", (32, 8, False), {"hardware": "turing"}),
        ],
    )
    def test_a_wrong_model_or_option_is_an_error_not_an_empty_list(self, rule, model, options):
        with pytest.raises(LayoutError) as caught:
            legal_layouts(*model, 8, **options)
        assert caught.value.rule == rule

    def test_a_limit_of_the_hardware_leaves_layouts_out(self):
        modes = {layout.mode for layout in legal_layouts(16, None, True, 8, hardware="ampere")}
        assert modes == {"standard-tp", "standard-dcp"}
        assert "helix-mla" in {layout.mode for layout in legal_layouts(16, None, True, 8, hardware="cpu")}


class TestLayoutProperties:
    @settings(max_examples=300, deadline=None)
    @given(requests())
    def test_legal_layouts_are_consistent_and_refusals_helpful(self, request):
        outcome = request.resolve()
        if isinstance(outcome, LayoutError):
            assert outcome.rule in {rule.name for rule in RULES}
            for layout in outcome.legal:
                assert self.again(layout) == layout
                self.check(layout)
        else:
            assert self.again(outcome) == outcome
            self.check(outcome)

    @pytest.mark.parametrize("kv_heads", [1, 2, 4, 6, 8])
    @pytest.mark.parametrize("group", [1, 4, 6])
    def test_every_legal_layout_up_to_24_gpus(self, kv_heads, group):
        layouts = legal_layouts(kv_heads * group, kv_heads, False, 24, allow_gqa_tpa1=True)
        assert layouts
        for layout in layouts:
            self.check(layout)

    def again(self, layout: Layout) -> Layout:
        return resolve_layout(
            layout.tp,
            layout.kvp,
            layout.num_query_heads,
            layout.num_kv_heads,
            layout.use_mla,
            layout.helix_mode,
            layout.attention_backend,
            layout.hardware,
            interleave_size=layout.interleave_size,
            block_size=layout.block_size,
            allow_gqa_tpa1=layout.allow_gqa_tpa1,
            head_size=layout.head_size,
        )

    def check(self, layout: Layout) -> None:
        ranks = range(layout.tp)
        for groups, size in ((layout.kvp_groups, layout.kvp), (layout.tpa_groups, layout.tpa)):
            assert sorted(rank for group in groups for rank in group) == list(ranks)
            assert {len(group) for group in groups} == {size}
        for group in layout.kvp_groups:
            assert len({layout.query_heads_computed(rank) for rank in group}) == 1
            assert len({layout.kv_heads(rank) for rank in group}) == 1
            assert [layout.kvp_rank(rank) for rank in group] == list(range(layout.kvp))
        for group in layout.tpa_groups:
            assert len({layout.kvp_rank(rank) for rank in group}) == 1
            computed = [head for rank in group for head in layout.query_heads_computed(rank)]
            assert computed == list(range(layout.num_query_heads))
        owned = [head for rank in ranks for head in layout.query_heads_owned(rank)]
        assert owned == list(range(layout.num_query_heads))
        heads_per_kv_head = layout.num_query_heads // layout.num_kv_heads
        copies = dict.fromkeys(range(layout.num_kv_heads), 0)
        for rank in ranks:
            assert set(layout.query_heads_owned(rank)) <= set(layout.query_heads_computed(rank))
            # A rank caches exactly the KV heads that its query heads read.
            assert {head // heads_per_kv_head for head in layout.query_heads_computed(rank)} == set(
                layout.kv_heads(rank)
            )
            for head in layout.kv_heads(rank):
                copies[head] += 1
        # Each KV head is on as many ranks as there are shards of the sequence, times its copies.
        assert set(copies.values()) == {layout.kvp * layout.duplication}
        assert layout.kv_capacity_factor >= 1


class TestCapabilities:
    def published(self, backend, hardware):
        modes = ("standard-tp", "standard-dcp", "helix-mla" if "MLA" in backend else "helix-gqa")
        return "".join(
            {"supported": "✓", "known-limitation": "⊘", "unsupported": "✗"}[
                declare(backend, hardware, mode, ORIGINAL).support
            ]
            for mode in modes
        )

    @pytest.mark.parametrize(
        ("backend", "hopper", "blackwell"),
        [
            ("FLASH_ATTN", "✓✓✓", "✓✓✓"),
            ("FLASHINFER", "✓✓⊘", "✓✓⊘"),
            ("FLASHMLA", "✓✓✓", "✗✗✗"),
            ("CUTLASS_MLA", "✓✓✓", "✓✓✓"),
            ("FLASHINFER_MLA", "✓✗✗", "✓✗✗"),
        ],
    )
    def test_the_original_table_as_published(self, backend, hopper, blackwell):
        assert (self.published(backend, "hopper"), self.published(backend, "blackwell")) == (hopper, blackwell)

    def test_the_original_default_on_blackwell(self):
        for mode in ("standard-dcp", "helix-mla"):
            assert capabilities.default_backend("blackwell", mode, ORIGINAL, use_mla=True) == "CUTLASS_MLA"
        assert not declare("FLASHINFER_MLA", "blackwell", "standard-dcp", ORIGINAL).lse

    @pytest.mark.parametrize(
        ("backend", "families"),
        [
            ("FLASH_ATTN_MLA", ("hopper",)),
            ("FLASHMLA", ("hopper",)),
            ("CUTLASS_MLA", ("blackwell",)),
            ("FLASHINFER_MLA", ("blackwell",)),
            ("TRITON_MLA", ("hopper", "blackwell", "blackwell-rtx")),
        ],
    )
    def test_helix_mla_on_0_32(self, backend, families):
        supported = [
            family for family in HARDWARE if declare(backend, family, "helix-mla").support is Support.SUPPORTED
        ]
        assert tuple(supported) == families
        assert declare(backend, families[0], "helix-mla").lse_base == "e"

    def test_dense_flashmla_on_blackwell_names_both_declarations(self):
        reason = declare("FLASHMLA", "blackwell", "helix-mla").reason
        assert "9.x and 10.x" in reason
        assert "is_flashmla_dense_supported" in reason

    def test_flashinfer_gqa_is_base_2_and_a_known_limitation_before_0_30(self):
        row = declare("FLASHINFER", "hopper", "helix-gqa")
        assert (row.support, row.lse, row.lse_base) == (Support.SUPPORTED, True, "2")
        assert declare("FLASHINFER", "hopper", "standard-dcp").support is Support.SUPPORTED
        assert declare("FLASHINFER", "hopper", "standard-dcp", "0.29.1").support is Support.KNOWN_LIMITATION

    def test_cpu_backends(self):
        support = {
            (name, mode): declare(name, "cpu", mode).support
            for name in ("CPU_ATTN", "HELIX_CPU", "HELIX_CPU_MLA")
            for mode in MODES
        }
        assert [key for key, value in support.items() if value is Support.SUPPORTED] == [
            ("CPU_ATTN", "standard-tp"), ("HELIX_CPU", "standard-dcp"), ("HELIX_CPU", "helix-gqa"),
            ("HELIX_CPU_MLA", "standard-dcp"), ("HELIX_CPU_MLA", "helix-mla"),
        ]  # fmt: skip
        assert declare("HELIX_CPU", "cpu", "helix-gqa").lse_base == "e"
        assert not declare("CPU_ATTN", "cpu", "standard-dcp").lse

    @pytest.mark.parametrize(
        ("hardware", "mode", "mla", "backend"),
        [
            ("hopper", "standard-dcp", False, "FLASH_ATTN"),
            ("hopper", "helix-mla", True, "FLASH_ATTN_MLA"),
            ("blackwell", "helix-gqa", False, "FLASHINFER"),
            ("blackwell", "helix-mla", True, "FLASHINFER_MLA"),
            ("blackwell-rtx", "helix-mla", True, "TRITON_MLA"),
            ("cpu", "standard-tp", False, "CPU_ATTN"),
            ("cpu", "helix-gqa", False, "HELIX_CPU"),
            ("cpu", "standard-dcp", True, "HELIX_CPU_MLA"),
            ("ampere", "helix-gqa", False, None),
        ],
    )
    def test_what_runs_when_no_backend_is_named(self, hardware, mode, mla, backend):
        assert capabilities.default_backend(hardware, mode, use_mla=mla) == backend

    def test_one_row_for_each_square_of_the_supported_version(self):
        for version in SUPPORTED_VLLM:
            squares = [(row.backend, row.hardware, row.mode) for row in ROWS if row.covers(version)]
            assert len(squares) == len(set(squares))
            assert len(squares) == len(capabilities.backends(vllm_version=version)) * len(HARDWARE) * len(MODES)
        assert all(row.declared.reason and row.declared.source for row in ROWS)

    def test_no_partial_results_without_lse(self):
        for row in ROWS:
            if row.mode != "standard-tp" and row.declared.support is not Support.UNSUPPORTED:
                assert row.declared.lse, row

    def test_backends_of_a_host(self):
        assert capabilities.backends("cpu") == ("CPU_ATTN", "CPU_MLA", "AMX_MLA", "HELIX_CPU", "HELIX_CPU_MLA")
        assert capabilities.backends("hopper", mla=True) == ("FLASH_ATTN_MLA", "FLASHMLA", "TRITON_MLA")

    @pytest.mark.parametrize(
        ("capability", "family"),
        [((8, 0), "ampere"), ((8, 6), "ampere"), ((8, 9), "ada"), ((9, 0), "hopper"), ((10, 3), "blackwell"),
         ((12, 0), "blackwell-rtx")],
    )  # fmt: skip
    def test_hardware_family(self, capability, family):
        assert capabilities.hardware_family(*capability) == family

    @pytest.mark.parametrize("capability", [(7, 5), (11, 0)])
    def test_unknown_compute_capability(self, capability):
        with pytest.raises(ValueError, match=r"hopper \(9.x\)"):
            capabilities.hardware_family(*capability)

    def test_versions(self):
        assert capabilities.check_version("0.32.0+cpu") == "0.32.0"
        for version in ("0.14.0", "0.33.0", "0.32.0rc1", "main"):
            with pytest.raises(ValueError, match="it covers: helix-original"):
                declare("FLASH_ATTN", "hopper", "standard-tp", version)

    @pytest.mark.parametrize(
        ("square", "valid"),
        [
            (("FLASH", "hopper", "helix-gqa"), "FLASH_ATTN, FLASHINFER"),
            (("FLASH_ATTN", "sm90", "helix-gqa"), "hopper, blackwell"),
            (("FLASH_ATTN", "hopper", "helix"), "helix-gqa, helix-mla"),
        ],
    )
    def test_unknown_names(self, square, valid):
        with pytest.raises(ValueError, match=valid):
            declare(*square)


class TestShapes:
    @pytest.mark.parametrize(
        ("name", "heads", "kv_heads", "head_size", "layers", "hidden", "use_mla"),
        [
            (NEMOTRON, 32, 8, 128, 32, 4096, False),
            ("meta-llama/Llama-3.1-8B-Instruct", 32, 8, 128, 32, 4096, False),
            ("meta-llama/Llama-3.1-70B-Instruct", 64, 8, 128, 80, 8192, False),
            ("meta-llama/Llama-3.1-405B-Instruct", 128, 8, 128, 126, 16384, False),
            ("Qwen/Qwen3-8B", 32, 8, 128, 36, 4096, False),
            ("Qwen/Qwen3-30B-A3B", 32, 4, 128, 48, 2048, False),
            (V2_LITE, 16, 1, 576, 27, 2048, True),
            ("deepseek-ai/DeepSeek-V3", 128, 1, 576, 61, 7168, True),
            ("deepseek-ai/DeepSeek-R1", 128, 1, 576, 61, 7168, True),
        ],
    )
    def test_committed_shapes(self, name, heads, kv_heads, head_size, layers, hidden, use_mla):
        shape = load_shape(name)
        assert (shape.num_query_heads, shape.num_kv_heads, shape.head_size) == (heads, kv_heads, head_size)
        assert (shape.num_layers, shape.hidden_size, shape.use_mla, shape.name) == (layers, hidden, use_mla, name)
        assert name in known_shapes()

    def test_experts_and_latent(self):
        lite = load_shape(V2_LITE)
        assert (lite.mla.kv_lora_rank, lite.mla.qk_rope_head_dim, lite.mla.q_lora_rank) == (512, 64, None)
        assert (lite.moe.routed, lite.moe.per_token, lite.moe.shared, lite.moe.first_dense_layers) == (64, 6, 2, 1)
        assert load_shape("Qwen/Qwen3-30B-A3B").moe.routed == 128
        assert load_shape("Qwen/Qwen3-8B").moe is None

    def test_defaults_of_older_configs(self):
        config = {
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 10,
            "max_position_embeddings": 32,
        }  # fmt: skip
        shape = ModelShape.from_config(config, "tiny")
        assert (shape.num_kv_heads, shape.head_size, shape.tie_word_embeddings) == (4, 16, False)

    def test_a_folder_and_a_file(self, tmp_path):
        config = {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 10,
            "max_position_embeddings": 32, "head_dim": 32,
        }  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert load_shape(tmp_path).num_kv_heads == 2
        assert dataclasses.replace(load_shape(tmp_path / "config.json"), name="") == dataclasses.replace(
            load_shape(tmp_path), name=""
        )

    def test_what_cannot_be_read_says_so(self, tmp_path):
        with pytest.raises(ValueError, match=f"known: .*{V2_LITE}"):
            load_shape("deepseek-ai/DeepSeek-V9")
        with pytest.raises(ValueError, match="model_type 'mamba'"):
            ModelShape.from_config({"model_type": "mamba"}, "m")
        with pytest.raises(ValueError, match="has no field 'num_attention_heads'"):
            ModelShape.from_config({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "m")


def test_needs_neither_torch_nor_vllm():
    """In a fresh interpreter in which importing either would fail."""
    program = """
import sys
sys.modules["torch"] = sys.modules["vllm"] = None  # importing them raises ImportError
from helix_runtime import capabilities, layout, shapes
model = shapes.load_shape("nvidia/Llama-3.1-Nemotron-Nano-8B-v1")
print(layout.resolve_layout(8, 2, helix_mode=True, hardware="hopper", **model.layout_arguments()).tpa)
assert not any(name.split(".")[0] in ("torch", "vllm", "numpy") for name, module in sys.modules.items() if module)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr
