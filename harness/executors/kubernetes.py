"""A run as indexed Kubernetes Jobs: one Job a group of tasks, one completion index a cell."""

from pathlib import PurePosixPath

from harness.executors.tasks import Group
from harness.frozen import Frozen

#: GPU feature discovery's label that tells a node's GPUs apart: its family is one for both kinds of Blackwell.
NODE_LABELS = {
    "ampere": ("nvidia.com/gpu.family", "ampere"),
    "ada": ("nvidia.com/gpu.family", "ada-lovelace"),
    "hopper": ("nvidia.com/gpu.family", "hopper"),
    "blackwell": ("nvidia.com/gpu.compute.major", "10"),
    "blackwell-rtx": ("nvidia.com/gpu.compute.major", "12"),
}
_RUNS, _CELLS, _MODELS = PurePosixPath("/runs"), PurePosixPath("/cells"), PurePosixPath("/models")
#: Exit statuses of the harness that the same again would not change: a verdict that differs, bad usage.
_FINAL = [1, 2]


class KubernetesOptions(Frozen):
    """`image` holds this distribution with its requirements; `claim` is the volume claim that takes the ledgers.

    `models`: a claim with a hub cache, read only, "" for none. `select`: hardware -> `label=value` of its nodes.
    `mark` is this rendering's own: its pods find their own runs again, in a folder of that name, and no others.
    """

    mark: str
    image: str
    claim: str = "helix-runs"
    models: str = ""
    namespace: str = "default"
    at_once: int = 16
    deadline: int = 7200  # seconds for one cell
    select: tuple[tuple[str, str], ...] = ()
    arguments: tuple[str, ...] = ()


def manifests(group: Group, options: KubernetesOptions) -> list[dict]:
    """The list of the group's cells (a ConfigMap) and the Job that runs them."""
    name = f"helix-{group.name}-{options.mark}"
    meta = {"name": name, "namespace": options.namespace, "labels": {"app.kubernetes.io/name": "helix"}}
    cells = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": meta,
        "data": {"cells.txt": "".join(f"{cell}\n" for cell in group.cells)},
    }  # fmt: skip
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": meta,
        "spec": {
            "completionMode": "Indexed",
            "completions": len(group.cells),
            "parallelism": min(options.at_once, len(group.cells)),
            "backoffLimitPerIndex": 2,
            "maxFailedIndexes": len(group.cells),  # a failed cell is a row, and ends no other
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {
                        "action": "FailIndex",
                        "onExitCodes": {"containerName": "cell", "operator": "In", "values": _FINAL},
                    },
                ]
            },
            "template": {"metadata": {"labels": meta["labels"]}, "spec": _pod(group, options, name)},
        },
    }
    return [cells, job]


def _pod(group: Group, options: KubernetesOptions, name: str) -> dict:
    resources = {"cpu": str(max(group.cores, 1))}
    if group.gpus:
        resources["nvidia.com/gpu"] = str(group.gpus)
    if group.memory_bytes:
        resources["memory"] = f"{-(-group.memory_bytes // 2**20)}Mi"
    volumes = [
        {"name": "runs", "persistentVolumeClaim": {"claimName": options.claim}},
        {"name": "cells", "configMap": {"name": name}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},  # ranks of one server share memory
        {"name": "tmp", "emptyDir": {}},
    ]
    mounts = [
        {"name": "runs", "mountPath": str(_RUNS)},
        {"name": "cells", "mountPath": str(_CELLS), "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    env = [{"name": "HELIX_CACHE", "value": "/tmp/helix-models"}, {"name": "HOME", "value": "/tmp"}]
    if options.models:
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": options.models, "readOnly": True}})
        mounts.append({"name": "models", "mountPath": str(_MODELS), "readOnly": True})
        env.append({"name": "HF_HUB_CACHE", "value": str(_MODELS)})
    pod = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": options.deadline,
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001},
        "containers": [
            {
                "name": "cell",
                "image": options.image,
                "command": ["/bin/bash", "-euc", script(group, options), "cell"],
                "env": env,
                "resources": {"requests": resources, "limits": resources},
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    return {**pod, **({"nodeSelector": found} if (found := _selector(group, options)) else {})}


def _selector(group: Group, options: KubernetesOptions) -> dict[str, str]:
    if chosen := dict(options.select).get(group.hardware):
        label, _, value = chosen.partition("=")
        return {label: value}
    return {} if group.hardware == "cpu" else dict([NODE_LABELS[group.hardware]])


def script(group: Group, options: KubernetesOptions, runs: str = str(_RUNS), cells: str = str(_CELLS)) -> str:
    """What a pod runs for its index. A pod that follows one that was lost continues its run."""
    more = "".join(f" {word}" for word in options.arguments)
    return (
        f'cell=$(sed -n "$((JOB_COMPLETION_INDEX + 1))p" {cells}/cells.txt)\n'
        f"run={runs}/{options.mark}/{group.name}-$JOB_COMPLETION_INDEX\n"
        "if [ -s $run/ledger.ndjson ]; then exec python3 -m harness --resume $run; fi\n"
        f'exec python3 -m harness --cell "$cell" --run-dir $run{more}\n'
    )
