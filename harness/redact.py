"""Keeps secrets out of what the harness writes: by a variable's name, by option, and by the shapes of tokens."""

import os
import re
from typing import Any

#: Names of environment variables and options whose value is a secret.
NAME = re.compile(r"TOKEN(?!IZ|S\b|_ID)|SECRET|PASSW|CREDENTIAL|API_?KEY|_KEY$|^KEY", re.IGNORECASE)
HIDDEN = "***"

_SHAPES = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{16})\b")
_BEARER = re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/-]{8,}=*")
_ASSIGNED = re.compile(
    r"(?i)((?:\b[A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|API_KEY)|--?[a-z-]*(?:token|secret|password|api-key))=)[^\s\"',]+"
)
_SHORTEST = 8  # a shorter value would blot out ordinary words


def secret_values() -> tuple[str, ...]:
    """The values of this process's secret variables, the longest first."""
    found = {value for name, value in os.environ.items() if NAME.search(name) and len(value) >= _SHORTEST}
    return tuple(sorted(found, key=len, reverse=True))


def hide_secrets(text: str) -> str:
    """`text` without the values of secret environment variables, and without what looks like a token."""
    return _hide(text, secret_values())


def clean_of_secrets(value: Any) -> Any:
    """`value`, of JSON's kinds, with every text in it as `hide_secrets` leaves it."""
    return _walk(value, secret_values())


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
    return _ASSIGNED.sub(rf"\1{HIDDEN}", text)
