"""Keeps secrets out of what the harness writes: by a variable's name, by option, and by the shapes of tokens."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

#: Names of environment variables and options whose value is a secret.
NAME = re.compile(r"TOKEN(?!IZ|S\b|_ID)|SECRET|PASSW|CREDENTIAL|API_?KEY|_KEY$|^KEY|_PAT$|AUTH(?!OR)", re.IGNORECASE)
HIDDEN = "***"

# What is searched may be hostile: each pattern begins with fixed letters, and looks no further without them.
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|glpat-[A-Za-z0-9_-]{16,}|xox[abprs]-[A-Za-z0-9-]{10,}|AKIA[A-Z0-9]{16})"
)
_BEARER = re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/-]{8,}=*")
_ASSIGNED = re.compile(r"(?i)((?:TOKEN|SECRET|PASSWORD|PASSWD|API[_-]?KEY|_PAT)=)[^\s\"',]+")
#: `scheme://user:password@host`: the password, and what stands before it.
_IN_URL = re.compile(r"(://[^\s:/@]{0,200}:)([^\s/@]{1,500})(?=@)")
_PIECE, _OVERLAP = 2**20, 2**12  # bytes of a file that are looked at together
_SHORTEST = 8  # a shorter value would blot out ordinary words


def is_secret(name: str, value: str) -> bool:
    """Whether an environment variable holds a secret: by its name, or as a URL with a password in it."""
    return bool(NAME.search(name) or _IN_URL.search(value))


def secret_values() -> tuple[str, ...]:
    """The values of this process's secret variables, and the passwords in its URLs; the longest first."""
    found = {value for name, value in os.environ.items() if NAME.search(name)}
    found |= {match[2] for value in os.environ.values() for match in _IN_URL.finditer(value)}
    return tuple(sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True))


def hide_secrets(text: str) -> str:
    """`text` without the values of secret environment variables, and without what looks like a token."""
    return _hide(text, secret_values())


def clean_of_secrets(value: Any) -> Any:
    """`value`, of JSON's kinds, with every text in it as `hide_secrets` leaves it."""
    return _walk(value, secret_values())


def hide_in_file(path: Path, more: Iterable[str] = ()) -> None:
    """Blot out, in place, secrets in a file that others wrote, and the values `more`: each byte of them becomes `*`.

    The file keeps its length and its holes. Nothing is done where it cannot be read or written.
    """
    known = [value.encode() for value in (*secret_values(), *more) if len(value) >= _SHORTEST]
    with contextlib.suppress(OSError), path.open("r+b") as file:
        for start, end in _extents(file.fileno()):
            data = os.pread(file.fileno(), end - start, start)
            clean = data
            for value in known:
                clean = clean.replace(value, b"*" * len(value))
            text = clean.decode("latin-1")  # a character is a byte
            text = _SHAPES.sub(lambda match: "*" * len(match[0]), text)
            for pattern in (_BEARER, _ASSIGNED, _IN_URL):
                text = pattern.sub(lambda match: match[1] + "*" * (len(match[0]) - len(match[1])), text)
            if (clean := text.encode("latin-1")) != data:
                os.pwrite(file.fileno(), clean, start)


def _extents(descriptor: int) -> Iterator[tuple[int, int]]:
    """(start, end) of pieces of what a file holds between its holes. They overlap, so that no secret lies in two."""
    end = 0
    size = os.fstat(descriptor).st_size
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:  # only a hole is left
            return
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        for at in range(start, end, _PIECE):
            yield at, min(at + _PIECE + _OVERLAP, end)


def _walk(value: Any, known: tuple[str, ...]) -> Any:
    if isinstance(value, str):
        return _hide(value, known)
    if isinstance(value, dict):
        return {key: _walk(item, known) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(item, known) for item in value]
    return value


def _hide(text: str, known: tuple[str, ...]) -> str:
    for value in known:
        text = text.replace(value, HIDDEN)
    if len(text) < _SHORTEST:
        return text
    text = _BEARER.sub(rf"\1{HIDDEN}", _SHAPES.sub(HIDDEN, text))
    text = _IN_URL.sub(rf"\1{HIDDEN}", text)
    return _ASSIGNED.sub(rf"\1{HIDDEN}", text)
