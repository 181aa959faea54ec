"""Variables of the harness's own environment that change how a server computes."""

from collections.abc import Mapping

from harness.redact import is_secret

#: These reach a server in a container; all others stay outside.
PASSED = ("VLLM_", "HELIX_", "NCCL_", "TORCHDYNAMO_", "OMP_", "HF_HUB_OFFLINE", "FLASHINFER_")
#: These reach a server that is a process, as everything that is no secret does.
_OF_A_PROCESS = ("TORCH_", "PYTORCH_", "CUBLAS_", "TRITON_")
#: Of this host, of the harness or of its tests.
HERE_ONLY = (
    "HELIX_CACHE", "HELIX_LEASES", "HELIX_VENV", "HELIX_EXTRA", "HELIX_NEED_DOCKER", "HELIX_TEST_DOCKER",
    "VLLM_NO_USAGE_STATS",
)  # fmt: skip


def passed(environment: Mapping[str, str]) -> dict[str, str]:
    """What of `environment` a container is given."""
    return _chosen(environment, PASSED)


def computing(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """What of `environment` an answer may depend on, sorted by name; never a secret."""
    return tuple(sorted(_chosen(environment, (*PASSED, *_OF_A_PROCESS)).items()))


def _chosen(environment: Mapping[str, str], prefixes: tuple[str, ...]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(prefixes) and name not in HERE_ONLY and not is_secret(name, value)
    }
