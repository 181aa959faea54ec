"""Who may try Helix in CUDA graphs, as far as that is known without a GPU."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="needs vLLM: install the extra `cpu`")

from helix_runtime.capabilities import plugin_refusal_on_cuda
from helix_runtime.vllm_plugin import cuda_combine, cuda_graphs, cuda_mla
from helix_runtime.vllm_plugin.options import HelixOptions
from helix_runtime.vllm_plugin.refusal import HelixRefusal


@pytest.fixture
def admit(monkeypatch):
    """`admit(cuda=True, eager=False, v2=True, **options)`: the check on a platform that says it is CUDA."""
    import vllm.platforms

    def admit(cuda=True, eager=False, v2=True, **options):
        monkeypatch.setattr(vllm.platforms, "current_platform", SimpleNamespace(is_cuda=lambda: cuda))
        config = SimpleNamespace(model_config=SimpleNamespace(enforce_eager=eager), use_v2_model_runner=v2)
        cuda_graphs.admit(config, HelixOptions(helix_mode=True, unproved_cuda_graphs=True, **options))

    return admit


def test_on_cuda_with_graphs_it_is_let_through(admit):
    admit()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"cuda": False}, "needs a CUDA device"),
        ({"share_gpu": True}, "cannot capture; drop one of them"),
        ({"eager": True}, "there are no CUDA graphs to try"),
        ({"v2": False}, "V2 model runner only, .*; unset VLLM_USE_V2_MODEL_RUNNER"),
    ],
)
def test_what_cannot_be_proved_is_refused(admit, asked, says):
    with pytest.raises(HelixRefusal, match=says):
        admit(**asked)


def test_the_option_lifts_the_refusal_of_graphs_and_no_other():
    refused = plugin_refusal_on_cuda("TRITON_MLA", True, eager=False)
    assert "unproved_cuda_graphs" in refused and "--attention-backend FLASH_ATTN_MLA, FLASHMLA " in refused
    assert plugin_refusal_on_cuda("TRITON_MLA", True, eager=False, unproved_cuda_graphs=True) is None
    assert plugin_refusal_on_cuda("TRITON_MLA", True, eager=False, graph_mode="NONE") is None
    assert "no cell has proved" in plugin_refusal_on_cuda("TRITON_ATTN", False, False, unproved_cuda_graphs=True)


def test_what_cells_have_judged_needs_no_option():
    for backend, mla in (
        ("FLASH_ATTN", False),
        ("FLASHINFER", False),
        ("FLASHMLA", True),
        ("FLASH_ATTN_MLA", True),
    ):
        for mode in (None, "PIECEWISE", "FULL_AND_PIECEWISE", "FULL"):
            assert plugin_refusal_on_cuda(backend, mla, eager=False, graph_mode=mode) is None
    other = plugin_refusal_on_cuda("FLASH_ATTN", False, eager=False, graph_mode="FULL_DECODE_ONLY")
    assert "mode FULL_DECODE_ONLY; allowed: PIECEWISE, FULL_AND_PIECEWISE, FULL" in other
    assert "no cell has proved Helix with TRITON_MLA inside" in plugin_refusal_on_cuda("TRITON_MLA", True, eager=False)


@pytest.mark.parametrize(
    ("mode", "graphs", "options", "refused"),
    [
        (None, None, {}, False),
        ("VLLM_COMPILE", "FULL", {}, False),
        ("NONE", "NONE", {}, False),  # no graphs at all
        ("NONE", None, {}, True),
        ("STOCK_TORCH_COMPILE", "FULL_AND_PIECEWISE", {}, True),
        ("NONE", None, {"unproved_cuda_graphs": True}, False),
    ],
)
def test_graphs_of_a_model_that_is_not_compiled_are_others_than_were_judged(mode, graphs, options, refused):
    from vllm.config.compilation import CompilationMode, CUDAGraphMode

    asked = SimpleNamespace(mode=mode and CompilationMode[mode], cudagraph_mode=graphs and CUDAGraphMode[graphs])
    config = SimpleNamespace(compilation_config=asked)
    if not refused:
        return cuda_graphs.compiled(config, HelixOptions(helix_mode=True, **options))
    with pytest.raises(HelixRefusal, match=f"compilation mode {mode}; allowed: VLLM_COMPILE"):
        cuda_graphs.compiled(config, HelixOptions(helix_mode=True, **options))


def test_on_cpu_the_gate_says_so(engine_config):
    with pytest.raises(HelixRefusal, match="unproved_cuda_graphs needs a CUDA device"):
        engine_config(
            helix={"helix_mode": True, "unproved_cuda_graphs": True},
            tensor_parallel_size=4,
            decode_context_parallel_size=2,
        )


def test_the_proof_names_the_direct_exchange_that_vllm_chooses(monkeypatch):
    """Asked for `a2a`, vLLM exchanges through symmetric memory where the GPUs of a group are on one host."""
    import functools

    from vllm.v1.attention.ops.dcp import MLADCPManager, dcp_a2a_lse_reduce

    amended = {}
    context = SimpleNamespace(combine_name="before", proof=SimpleNamespace(amend=amended.update))
    monkeypatch.setattr(cuda_mla, "current", lambda: context)
    cuda_mla._name_direct(functools.partial(dcp_a2a_lse_reduce, cp_group=None))
    assert context.combine_name == "before"
    manager = object.__new__(MLADCPManager)
    cuda_mla._name_direct(functools.partial(manager._direct_workspace_combine, None))
    assert context.combine_name.endswith("MLADCPManager._direct_workspace_combine")
    assert amended == {"combine_impl": context.combine_name}


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_lse_that_is_exchanged_is_packed_whatever_view_a_backend_returns(monkeypatch, tokens):
    """FLASH_ATTN_MLA returns [H, T] transposed: contiguous for torch where T is 1, but not for vLLM's kernel."""
    import torch

    context = SimpleNamespace(
        helix=True, armed=cuda_combine.NOTHING_ARMED, proof=SimpleNamespace(ran=lambda *_, **__: 0)
    )
    for module in (cuda_mla, cuda_combine):
        monkeypatch.setattr(module, "current", lambda: context)
    got = []
    init_combine = cuda_mla._init_combine(lambda self: lambda output, lse: got.append(lse))
    given = torch.arange(16.0 * tokens).view(16, tokens).transpose(0, 1)
    init_combine(None)(None, given)
    assert got[0].stride() == (16, 1) and torch.equal(got[0], given)


def test_vllms_mode_is_told_by_a_dotted_flag():
    """As the suites give it."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given = parser.parse_args(
        ["--compilation-config.cudagraph_mode", "FULL_DECODE_ONLY", "--max-cudagraph-capture-size", "16"]
    )
    assert EngineArgs.from_cli_args(given).compilation_config.cudagraph_mode.name == "FULL_DECODE_ONLY"
