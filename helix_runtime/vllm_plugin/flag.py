"""The flag `--helix-mode`, folded into `additional_config`.

Why: users know vLLM's command line; a plugin has no flags of its own. `additional_config` reaches every worker and is
part of vLLM's config hash.
Hook: `EngineArgs.add_cli_args` (runs after plugins are loaded) and `EngineArgs.from_cli_args` (drops unknown fields).
Upstream: none; a plugin point for flags does not exist in 0.32.
Remove when: vLLM has Helix mode or lets plugins add arguments.
"""

from helix_runtime.vllm_plugin.compat import patch
from helix_runtime.vllm_plugin.options import helix_options

_HELP = (
    "Helix parallelism: attention heads sharded TPA = TP / DCP ways, KV cache sharded DCP ways, partial results "
    'exchanged by All-to-All. Same as --additional-config \'{"helix": {"helix_mode": true}}\'.'
)


def install() -> None:
    patch("vllm.engine.arg_utils:EngineArgs.add_cli_args", _add_cli_args)
    patch("vllm.engine.arg_utils:EngineArgs.from_cli_args", _from_cli_args)


def _add_cli_args(original):
    def add_cli_args(parser):
        parser = original(parser)
        parser.add_argument_group("Helix").add_argument("--helix-mode", action="store_true", help=_HELP)
        return parser

    return add_cli_args


def _from_cli_args(original):
    def from_cli_args(cls, args):
        engine_args = original(cls, args)
        # Callers that build a Namespace by hand, without our argument, mean "not asked for".
        if vars(args).get("helix_mode"):
            given = dict(engine_args.additional_config or {})
            helix_options(given)  # refuses what is no mapping of options
            engine_args.additional_config = {**given, "helix": {**given.get("helix", {}), "helix_mode": True}}
        return engine_args

    return from_cli_args
