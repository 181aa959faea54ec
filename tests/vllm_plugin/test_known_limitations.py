"""Every refusal on CPU that the committed suites declare, on the configuration that vLLM builds from its command."""

import pytest

from harness.hardware import Hardware
from harness.matrix import expand
from harness.models import ensure
from harness.suite import load_all
from harness.verdict import Verdict

pytest.importorskip("vllm", reason="needs vLLM: install the extra `cpu`")


def refused():
    here = Hardware(family="cpu", name="test", count=2, memory_bytes=2**33)
    return [item for item in expand(load_all(), [here]) if item.declared is Verdict.REJECTED and item.skip is None]


@pytest.mark.parametrize("item", refused(), ids=lambda item: item.cell.id)
def test_a_declared_refusal_comes_before_any_worker_with_its_text(item):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from helix_runtime.vllm_plugin import register
    from helix_runtime.vllm_plugin.refusal import HelixRefusal

    register()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = parser.parse_args(["--model", str(ensure(item.cell.model)), *item.cell.serve_args()])
    with pytest.raises(HelixRefusal) as refusal:
        AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    assert item.refusal in str(refusal.value)


def test_every_layout_rule_that_a_user_can_break_has_a_cell():
    """The others need an impossible size or name, which vLLM's own command line turns away, or a model that is none."""
    from helix_runtime.layout import RULES

    unreachable = {"positive-sizes", "known-names", "query-heads-divisible-by-kv-heads", "capability"}
    declared = " ".join(item.declared_why for item in refused())
    assert {rule.name for rule in RULES if f"[rule {rule.name}," not in declared} == unreachable


def test_every_unproved_feature_but_multimodal_input_has_a_cell():
    """No multimodal model is made on the spot."""
    from helix_runtime.vllm_plugin.features import UNPROVED

    texts = " ".join(item.refusal or "" for item in refused())
    assert [feature.name for feature in UNPROVED if feature.name.removeprefix("a ") not in texts] == [
        "multimodal input"
    ]
