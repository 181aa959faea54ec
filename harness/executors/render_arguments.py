"""The command line of `python -m harness render`, and all that can be said of it before anything is written."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from harness.ledger import find
from harness.suite import CHECKOUT, ROOT, Family
from helix_runtime.capability_rows import DEFAULT_VLLM

#: Options of one form, and what the others are told of it.
_ONLY = {"slurm": ("runs", "partition", "account"), "kubernetes": ("claim", "models", "namespace")}
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_DNS_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DNS_NAME = rf"(?=.{{1,253}}$){_DNS_LABEL}(\.{_DNS_LABEL})*"
_WORD = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"  # of a label, and its value
_NODE_LABEL = rf"((?=[^/]{{1,253}}/){_DNS_LABEL}(\.{_DNS_LABEL})*/)?{_WORD}=({_WORD})?"
#: What an `#SBATCH` line or a container's mounts take for something else.
_NOT_IN_A_PATH = re.compile(r"""[\s%,:"'\\]""")


def _like(pattern: str, allowed: str) -> Callable[[str], str]:
    def checked(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"'{text}'; allowed: {allowed}")
        return text

    return checked


def _positive(text: str) -> int:
    return int(_like(r"0*[1-9][0-9]{0,8}", "a whole number from 1 on")(text))


def _bytes(text: str) -> int:
    _like(r"[1-9][0-9]{0,6}[MGT]", "a whole number with M, G or T, such as 64G")(text)
    return int(text[:-1]) * 2 ** {"M": 20, "G": 30, "T": 40}[text[-1]]


def _families(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in Family.__args__]:
        raise argparse.ArgumentTypeError(f"'{unknown[0]}'; allowed: {', '.join(Family.__args__)}, separated by commas")
    return names


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or name not in Family.__args__ or not value:
        known = ", ".join(Family.__args__)
        raise argparse.ArgumentTypeError(f"'{text}'; allowed: HARDWARE=VALUE, hardware one of {known}")
    return name, value


def parser(description: str) -> argparse.ArgumentParser:
    """Values that are wrong whatever the form are refused here, others by `problem_of`."""
    it = argparse.ArgumentParser(prog="python -m harness render", description=description, allow_abbrev=False)
    claim = _like(_DNS_NAME, "the name of a volume claim: a-z, 0-9, '-' and '.'")
    add = it.add_argument
    add("form", choices=("slurm", "kubernetes"))
    add("--into", type=Path, required=True, metavar="DIR", help="new folder for what is written")
    add("--suite", action="append", default=[], metavar="NAME", help="repeatable; default: all suites")
    add("--cell", action="append", default=[], metavar="GLOB", help="cells whose id matches; repeatable")
    add("--hardware", type=_families, default=[], metavar="LIST", help="default: this host's")
    add("-v", "--verbose", action="store_true", help="name all cells that are left out, not three for each reason")
    add("--share-gpu", action="store_true", help="all ranks of a GPU cell on one GPU")
    add(
        "--image", type=_like(r"\S+", "the name of an image, without white space"),
        help="container image; Slurm: by pyxis/enroot, without one on the node",
    )  # fmt: skip
    add(
        "--vllm", type=_like(r"[0-9]+\.[0-9]+\.[0-9]+|nightly", "a release such as 0.31.0, or nightly"),
        default=DEFAULT_VLLM, metavar="VERSION",
        help=f"of the image or the node's environment (default {DEFAULT_VLLM}); cells of others are left out",
    )  # fmt: skip
    add(
        "--at-once", type=_positive, default=16, metavar="N",
        help="cells at the same time of each script or Job, not of all together (default 16)",
    )  # fmt: skip
    add("--gpus-per-node", type=_positive, default=8, metavar="N", help="default 8")
    add("--cores", type=_positive, default=16, metavar="N", help="cores of a node (default 16)")
    add(
        "--memory", type=_bytes, default=0, metavar="SIZE",
        help="host memory of each task, such as 64G (default: what CPU ranks need; beside GPUs none is asked for)",
    )  # fmt: skip
    time = _like(r"(?=.*[1-9])[0-9]{1,4}:[0-5][0-9]:[0-5][0-9]", "HH:MM:SS, more than none")
    add("--time", type=time, default="02:00:00", metavar="HH:MM:SS", help="limit for one cell")
    add(
        "--select", type=_pair, action="append", default=[], metavar="HARDWARE=…",
        help="Slurm: the feature of its nodes (hopper=h200); Kubernetes: their label (hopper=gpu/type=h200)",
    )  # fmt: skip
    add("--runs", type=Path, metavar="DIR", help="Slurm: shared folder for ledgers (default DIR/runs)")
    names = _like(rf"{_NAME}(,{_NAME})*", "a name, or several separated by commas")
    add("--partition", type=names, help="Slurm")
    add("--account", type=_like(_NAME, "a name: letters, digits, '_', '.' and '-'"), help="Slurm")
    add("--claim", type=claim, help="Kubernetes: volume claim for ledgers (default helix-runs)")
    add("--models", type=claim, metavar="CLAIM", help="Kubernetes: volume claim with a hub cache")
    namespace = _like(_DNS_LABEL, "at most 63 of a-z, 0-9 and '-', the first and the last no '-'")
    add("--namespace", type=namespace, help="Kubernetes (default: default)")
    return it


def problem_of(options: argparse.Namespace) -> str:
    """What is wrong with these arguments for this form, with what is allowed; "" for nothing."""
    for form, names in _ONLY.items():
        if form != options.form and (given := [f"--{name}" for name in names if getattr(options, name) is not None]):
            return f"{', '.join(given)}: of `render {form}` only; leave it out of `render {options.form}`"
    if options.form == "slurm" and not options.image and options.vllm != DEFAULT_VLLM:
        return (
            f"--vllm {options.vllm}: without --image tasks run ./test_helix.sh, which installs vLLM {DEFAULT_VLLM}. "
            f"Add --image docker://… with vLLM {options.vllm} and the harness's requirements"
        )
    if options.form == "slurm" and not options.image and not CHECKOUT:
        return "--image is needed: this is an installed distribution, and ./test_helix.sh is in a checkout"
    if options.form == "kubernetes" and not options.image:
        return "--image is needed: pods run in it. Add --image REGISTRY/IMAGE"
    if options.form == "kubernetes" and "://" in options.image:
        return f"--image {options.image}: Kubernetes takes no scheme; write {options.image.partition('://')[2]}"
    pattern, allowed = {
        "slurm": (_NAME, "the name of one feature of the nodes, such as hopper=h200"),
        "kubernetes": (_NODE_LABEL, "LABEL=VALUE of the nodes, such as hopper=gpu/type=h200"),
    }[options.form]
    families = [family for family, _ in options.select]
    for family, value in options.select:
        if not re.fullmatch(pattern, value):
            return f"--select {family}={value}: '{value}' is not for {options.form}; allowed: {allowed}"
        if families.count(family) > 1:
            return f"--select {family}=… is given {families.count(family)} times; allowed: once for each hardware"
    return ""


def problem_of_folders(form: str, folder: Path, runs: Path | None) -> str:
    """Why `folder` (`--into`) or `runs` cannot take a rendering, "" where they can. Raises OSError as the disk does."""
    for path in (folder, runs):
        if path and path.exists() and not path.is_dir():
            return f"{path} is no folder; name a new one"
    if folder.exists() and any(folder.iterdir()):
        return f"--into {folder} is there and not empty; name a new folder"
    if runs and find(runs / "plan").is_file():
        return (
            f"--runs {runs} holds the plan of another rendering ({find(runs / 'plan')}); name a new folder, so that "
            "`merge` tells the two apart"
        )
    if form == "slurm" and (
        odd := [path for path in (folder, runs, ROOT) if path and _NOT_IN_A_PATH.search(str(path))]
    ):
        return (
            f"{odd[0]}: Slurm's options and mounts take no white space, quotes, %, comma or colon; name another folder"
        )
    return ""
