"""Hostile text made plain, and counts. Apart from the report, whose libraries a harness that shows a line spares."""

import json
import re

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
#: What XML 1.0 forbids, what only a terminal should see, and the controls that reorder text for the reader.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
#: What is left of ASCII.
_USUAL = bytes([9, 10, *range(32, 127)])
_QUOTED = 24  # letters


def legal(text: str) -> str:
    """`text` with every control, bidi or unpaired character as U+FFFD: legal in HTML, XML 1.0 and UTF-8."""
    unusual = text.encode(errors="surrogatepass").translate(None, _USUAL)  # a third of the time of a search in it all
    return _CONTROL.sub("�", text) if _CONTROL.search(unusual.decode(errors="surrogatepass")) else text


def clean(text: str) -> str:
    """`text` as a reader wants a log: without terminal escapes, lines ended by `\\n`, and otherwise `legal`."""
    if text.isascii() and text.isprintable():
        return text
    return legal(_ANSI.sub("", text).replace("\r\n", "\n").replace("\r", "\n"))


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def quoted(text: str) -> str:
    """`text` in quotes, on one line and short: what a token says, its spaces and line ends to be seen."""
    short = text if len(text) <= _QUOTED else f"{text[: _QUOTED - 1]}…"
    return legal(json.dumps(short, ensure_ascii=False))
