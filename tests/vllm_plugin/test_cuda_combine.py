"""What surrounds the combine of a CUDA backend: nothing without a fault, the defect with one. No GPU is needed."""

import functools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: install the extra `cpu`")

from helix_runtime.proof import ProofWriter
from helix_runtime.vllm_plugin import cuda_combine
from helix_runtime.vllm_plugin.cuda_combine import combined, fault_problem
from helix_runtime.vllm_plugin.faults import NOTHING_ARMED, make_fault

OUTPUT, LSE = torch.randn(3, 4, 8), torch.randn(3, 4)


def combine(output, lse, group, return_lse=False, is_lse_base_on_e=True):
    told = torch.full_like(lse, float(is_lse_base_on_e))
    return (output, lse, told) if return_lse else output


@pytest.fixture
def arm(monkeypatch):
    def arm(spec: str | None):
        layout = SimpleNamespace(query_heads_computed=lambda rank: range(4))
        context = SimpleNamespace(
            armed=make_fault(spec) if spec else NOTHING_ARMED, proof=ProofWriter(None, 0), kvp_rank=1, rank=1,
            layout=layout, kvp=2,
        )  # fmt: skip
        monkeypatch.setattr(cuda_combine, "current", lambda: context)

    return arm


def test_without_a_fault_the_combine_gets_what_it_got(arm):
    arm(None)
    given = []
    combined("decode", lambda *partial, **how: given.append((partial, how)), OUTPUT, LSE, "group", seq_lens=None)
    (((output, lse, group), how),) = given
    assert output is OUTPUT and lse is LSE and group == "group" and how == {"seq_lens": None}


@pytest.mark.parametrize("told", [True, False])
def test_the_other_base_is_the_other_of_what_the_backend_says(arm, told):
    """FLASH_ATTN says nothing and means e; FLASHINFER's combine is a partial that says 2."""
    arm("lse-base-2")
    function = combine if told else functools.partial(combine, is_lse_base_on_e=False)
    *_, base = combined("decode", function, OUTPUT, LSE, "group", return_lse=True)
    assert bool(base.unique().item()) is not told


def test_a_restriction_holds_here_too(arm):
    arm("lse-base-2:prefill")
    assert combined("decode", combine, OUTPUT, LSE, "group", return_lse=True)[2].all()
    assert not combined("prefill", combine, OUTPUT, LSE, "group", return_lse=True)[2].any()


def test_what_is_sent_and_what_comes_out_can_be_wrong(arm):
    arm("lse-of-next-head")
    assert torch.equal(combined("decode", combine, OUTPUT, LSE, "g", return_lse=True)[1], LSE.roll(-1, 1))
    arm("head-off-by-one")
    assert torch.equal(combined("decode", combine, OUTPUT, LSE, "g"), OUTPUT.roll(1, 1))


def test_faults_of_the_cpu_backends_are_refused_by_name():
    assert fault_problem("lse-base-2:decode") is None and fault_problem("lse-of-next-head:head=3") is None
    assert "lives in the CPU backends; on CUDA: " in fault_problem("swap-chunks")
    assert "allowed: batch, single, decode" in fault_problem("lse-of-next-head:layer=1")


def test_in_cuda_graphs_a_fault_cannot_choose_its_steps():
    assert fault_problem("lse-base-2", captured=True) is None
    assert fault_problem("lse-of-next-head:rank=1,head=3", captured=True) is None
    refusal = fault_problem("lse-base-2:decode", captured=True)
    assert refusal == "fault lse-base-2 cannot be restricted to decode in CUDA graphs; allowed: rank, head"
