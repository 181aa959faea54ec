"""`python -m harness images build|list|prune`: the images that containers run, built by BuildKit, keyed by content."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from harness.frozen import Frozen, content_hash
from harness.redact import hide_secrets
from harness.resume import code_key
from harness.server.containers import NoDocker, connect
from harness.suite import CHECKOUT, ROOT

KINDS = ("cpu", "cuda")
#: `cuda` has none: its base is named by digest, so that the same image is built everywhere.
BASES = {"cpu": "python:3.11-slim-bookworm"}
VLLM = "0.32.0"
#: Labels of every image that is ours: what it is built from, the code in it, which of KINDS.
KEY, CODE, KIND = "helix.key", "helix.code", "helix.kind"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
#: Settings of pip's that reach a build: where packages are found.
_PIP = ("PIP_NO_INDEX", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")


class ImageError(Exception):
    """An image cannot be built; the text says why and what can be done."""


class Plan(Frozen):
    """All that an image is built from. `base_digest`: of a local base, "" for one that is pulled by its name."""

    kind: str
    base: str
    base_digest: str
    vllm: str
    dockerfile: str
    code: str
    arguments: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        return content_hash(self.model_dump(mode="json"))


class Built(Frozen):
    """An image that is there. `digest` is its id; `code` is of the sources in it (`harness.resume.code_key`)."""

    kind: str
    digest: str
    key: str
    code: str
    vllm: str
    version: str
    commit: str
    created: str
    megabytes: int


def built(client) -> list[Built]:
    """Our images, the newest first."""
    found = []
    for image in client.images.list(filters={"label": KEY}):
        labels = image.labels
        found.append(
            Built(
                kind=labels.get(KIND, ""), digest=image.id, key=labels[KEY], code=labels.get(CODE, ""),
                vllm=labels.get("helix.vllm", ""), version=labels.get("org.opencontainers.image.version", ""),
                commit=labels.get("org.opencontainers.image.revision", ""), created=image.attrs["Created"],
                megabytes=image.attrs["Size"] // 10**6,
            )
        )  # fmt: skip
    return sorted(found, key=lambda image: image.created, reverse=True)


def current(client) -> dict[str, Built]:
    """The newest image of each kind that holds this very code."""
    code = code_key()
    return {image.kind: image for image in reversed(built(client)) if image.code == code}


def make_plan(client, kind: str, base: str | None, vllm: str = VLLM, arguments: Sequence[tuple[str, str]] = ()) -> Plan:
    """What an image of `kind` would be built from now. ImageError for a base that is not fixed."""
    from docker.errors import ImageNotFound

    base = base or BASES.get(kind, "")
    try:
        local = client.images.get(base).id if base else ""
    except ImageNotFound:
        local = ""
    if kind == "cuda" and not local and "@sha256:" not in base:
        raise ImageError(
            "the CUDA base is named by digest: --base vllm/vllm-openai@sha256:…; the digest of a release: "
            f"docker buildx imagetools inspect vllm/vllm-openai:v{vllm}"
        )
    if not CHECKOUT:
        raise ImageError("images are built from a checkout, and this is an installed distribution")
    dockerfile = (ROOT / "images" / kind / "Dockerfile").read_text()
    return Plan(
        kind=kind, base=base, base_digest=local, vllm=vllm, dockerfile=dockerfile, code=code_key(),
        arguments=tuple(sorted(arguments)),
    )  # fmt: skip


def build(client, plan: Plan, say=print, pip: Mapping[str, str] | None = None) -> Built:
    """The image of `plan`: the one that is there, else built now. ImageError when the build fails.

    `pip`: where pip finds packages, by the names of its environment variables (`PIP_INDEX_URL`). Such a URL may hold a
    password, so it goes in as a secret file: not in the image, its history or a command line. Nor is it in the key.
    """
    if found := next((image for image in built(client) if image.key == plan.key), None):
        say(f"unchanged: helix-{plan.kind}:{plan.key} {found.digest[:19]}")
        return found
    docker = docker_cli()
    with tempfile.TemporaryDirectory(prefix="helix-image-") as scratch:
        context, secrets = Path(scratch) / "context", Path(scratch)  # the build sees the context only
        context.mkdir()
        wheel = make_wheel(context)
        (context / "Dockerfile").write_text(plan.dockerfile)
        given = {
            "BASE": plan.base, "VLLM_VERSION": plan.vllm, "WHEEL": wheel.name, "COMMIT": commit(),
            "VERSION": metadata.version("helix-parallel"), **dict(plan.arguments),
        }  # fmt: skip
        labels = {KEY: plan.key, CODE: plan.code, KIND: plan.kind}
        command = [docker, "build", "--progress=plain", "--tag", f"helix-{plan.kind}:{plan.key}"]
        command += [word for name, value in given.items() for word in ("--build-arg", f"{name}={value}")]
        command += [word for name, value in labels.items() for word in ("--label", f"{name}={value}")]
        command += ["--secret", f"id=ca,src={_CERTIFICATES}"] if _CERTIFICATES.is_file() else []
        command += ["--load"] if has_buildx(docker) else []  # into the daemon, whatever builder is chosen
        if pip:
            command += ["--secret", f"id=pip,src={_pip_file(pip, secrets)}"]
        say(f"building helix-{plan.kind}:{plan.key} from {plan.base}")
        environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
        done = subprocess.run([*command, str(context)], env=environment, capture_output=True, text=True)
        if done.returncode:
            last = hide_secrets("\n".join((done.stderr or done.stdout).splitlines()[-25:]))
            raise ImageError(f"docker build ended with {done.returncode}:\n{last}")
    if made := next((image for image in built(client) if image.key == plan.key), None):
        return made
    raise ImageError(
        f"{docker} built helix-{plan.kind}:{plan.key}, but not into the daemon that answers here; let both use the "
        "same one: docker context use default, or set DOCKER_HOST"
    )


def _pip_file(pip: Mapping[str, str], folder: Path) -> Path:
    """A configuration file of pip's with these settings, for its maker's eyes only."""
    path = folder / "pip.conf"
    lines = [f"{name.removeprefix('PIP_').lower().replace('_', '-')} = {value}" for name, value in sorted(pip.items())]
    path.touch(mode=0o600)
    path.write_text("\n".join(["[global]", *lines, ""]))
    return path


def make_wheel(folder: Path) -> Path:
    """Our wheel, built in `folder` from a copy of the sources, so that the checkout stays as it is."""
    with tempfile.TemporaryDirectory(prefix="helix-wheel-") as scratch:
        for name in ("pyproject.toml", "README.md"):
            shutil.copy2(ROOT / name, scratch)
        for name in ("harness", "helix_runtime"):
            shutil.copytree(ROOT / name, Path(scratch) / name, ignore=shutil.ignore_patterns("__pycache__"))
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
        done = subprocess.run([*command, scratch], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ImageError(f"the wheel was not built:\n{done.stderr[-2000:]}")
    return wheels[0]


def docker_cli() -> str:
    """A `docker` on PATH that builds with BuildKit: with the buildx plugin, or an older one that has it inside."""
    found = []
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        path = Path(folder) / "docker"
        if not os.access(path, os.X_OK) or str(path) in found:
            continue
        found.append(str(path))
        if has_buildx(str(path)):
            return str(path)
        told = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        if (version := re.search(r"version (\d+)", told)) and 18 <= int(version[1]) < 23:
            return str(path)
    raise ImageError(f"no docker here builds with BuildKit (looked at: {', '.join(found) or 'none'}); install buildx")


def has_buildx(docker: str) -> bool:
    return subprocess.run([docker, "buildx", "version"], capture_output=True).returncode == 0


def prune(client, keep: set[str], say=print) -> int:
    """Remove our images but for those with a key in `keep` and those that a container uses; returns how many."""
    from docker.errors import APIError

    removed = 0
    for image in built(client):
        if image.key in keep:
            continue
        try:
            client.images.remove(image.digest, force=False)
            removed += 1
            say(f"removed helix-{image.kind}:{image.key}")
        except APIError as problem:
            say(f"kept helix-{image.kind}:{image.key}: {problem.explanation}")
    return removed


def commit() -> str:
    """This checkout's commit, with `-dirty` where files differ from it; "" outside of git."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--match", "no-tag"]
    done = subprocess.run(asked, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def main(arguments: Sequence[str]) -> int:
    """`python -m harness images`. Exit status 2 for bad usage, 3 when Docker or a build failed."""
    parser = argparse.ArgumentParser(prog="python -m harness images", description=__doc__.partition(":")[2])
    actions = parser.add_subparsers(dest="action", required=True)
    making = actions.add_parser("build", help="build what changed")
    making.add_argument("kind", choices=KINDS)
    making.add_argument("--base", help=f"base image; default for cpu: {BASES['cpu']}; for cuda: by digest")
    making.add_argument("--vllm", default=VLLM, help=f"its version (default {VLLM})")
    making.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="for the Dockerfile")
    actions.add_parser("list", help="what is there")
    pruning = actions.add_parser("prune", help="remove images of other code")
    pruning.add_argument("--all", action="store_true", help="… and of this code")
    options = parser.parse_args(list(arguments))
    try:
        client = connect()
        if options.action == "build":
            given = dict(word.partition("=")[::2] for word in options.build_arg)
            pip = {name: value for name, value in (os.environ | given).items() if name in _PIP}
            given = {name: value for name, value in given.items() if name not in _PIP}
            plan = make_plan(client, options.kind, options.base, options.vllm, tuple(given.items()))
            made = build(client, plan, pip=pip)
            print(_line(made))
        elif options.action == "list":
            images = built(client)
            print("\n".join(map(_line, images)) or "no images; build one: python -m harness images build cpu")
        else:
            prune(client, set() if options.all else {image.key for image in current(client).values()})
        return 0
    except (NoDocker, ImageError) as problem:
        print(f"images: {problem}", file=sys.stderr)
        return 3


def _line(image: Built) -> str:
    return (
        f"helix-{image.kind}:{image.key}  {image.digest[:19]}  vLLM {image.vllm}  {image.version}  "
        f"commit {image.commit[:12] or 'unknown'}  {image.created[:19]}  {image.megabytes} MB"
        + ("  this code" if image.code == code_key() else "")
    )
