import pytest

from helix_runtime.vllm_plugin.options import HelixOptions, helix_options
from helix_runtime.vllm_plugin.refusal import HelixRefusal


def test_absent_key_means_not_asked_for():
    assert helix_options({}) is None
    assert helix_options({"gdn_prefill_backend": "x"}) is None
    assert helix_options(None) is None


def test_options_are_read():
    given = {"helix": {"helix_mode": True, "proof_dir": "/tmp/x"}}
    assert helix_options(given) == HelixOptions(helix_mode=True, proof_dir="/tmp/x")
    assert helix_options({"helix": {}}) == HelixOptions(helix_mode=False)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"helix_mod": True}, "helix_mod"),
        ({"helix_mode": "yes"}, "'yes'"),
        ({"helix_mode": 1}, "is 1"),
        ({"proof_dir": 3}, "is 3"),
        (True, "must be a mapping"),
    ],
)
def test_mistakes_name_the_option_and_the_allowed_ones(given, named):
    with pytest.raises(HelixRefusal) as refusal:
        helix_options({"helix": given})
    assert named in str(refusal.value)
    assert "allowed: helix_mode (bool), allow_gqa_tpa1 (bool), share_gpu (bool)" in str(refusal.value)
