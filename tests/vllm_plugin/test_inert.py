"""A vLLM with the plugin installed but not asked for is stock vLLM."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="needs vLLM: install the extra `cpu`")

SCRIPT = """
import inspect, json, sys
from vllm.engine.arg_utils import EngineArgs
from helix_runtime.vllm_plugin import compat
from helix_runtime.vllm_plugin.architectures import GQA

config = EngineArgs(model=sys.argv[1], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, seed=0,
                    max_model_len=1024, tensor_parallel_size=2).create_engine_config()
patched = [row.target for row in (*compat.SURFACE, *GQA.values()) if compat._is_patched(
    inspect.unwrap(compat.resolve(row.target)[2], stop=compat._is_patched))]
print(json.dumps({"patched": patched, "hash": config.compute_hash(), "additional": config.additional_config,
                  "config": str(config)}))
"""


def on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def observe(folder: str, plugins: str | None) -> dict:
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    environment.pop("VLLM_PLUGINS", None)
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    done = subprocess.run([sys.executable, "-c", SCRIPT, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_plugin_that_is_not_asked_for_changes_nothing_but_its_doors(model_folder):
    folder = model_folder()
    stock, ours = observe(folder, ""), observe(folder, None)
    assert stock["patched"] == []
    assert sorted(ours["patched"]) == [
        "vllm.config.vllm:VllmConfig.try_verify_and_update_config",
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "vllm.engine.arg_utils:EngineArgs.from_cli_args",
        *(["vllm.platforms.cpu:CpuPlatform.check_and_update_config"] if on_cpu() else []),
        "vllm.v1.worker.worker_base:WorkerBase.__init__",
    ]
    assert ours["hash"] == stock["hash"]
    assert ours["additional"] == stock["additional"] == {}
    assert ours["config"] == stock["config"]
