"""Text on its way into a page, an XML file or a shell: logs and model output are hostile until they passed here."""

import base64
import glob
import math
import re
import shlex
import zlib

from markupsafe import Markup, escape

from harness.plain import clean as clean
from harness.plain import legal
from harness.plain import plural as plural

_RESERVED = re.compile(r"[^A-Za-z0-9_.~/:@!,;$-]")


def fragment(**fields: str) -> str:
    """A URL fragment without `#`: `mode=helix&hardware=cpu`. The page's script and its element ids use the same."""
    return "&".join(f"{name}={_RESERVED.sub(_percent, legal(value))}" for name, value in fields.items())


def _percent(letter: re.Match) -> str:
    return "".join(f"%{byte:02X}" for byte in letter.group().encode())


def rerun(cell_id: str) -> str:
    """The line that runs just this cell again: safe to paste into a shell, and matching this cell only."""
    return f"./test_helix.sh --cell {shlex.quote(glob.escape(cell_id))}"


def packed(text: str) -> str:
    """`text` as base64 of raw deflate, which a browser's `DecompressionStream('deflate-raw')` opens."""
    squeeze = zlib.compressobj(4, zlib.DEFLATED, -15)
    return base64.b64encode(squeeze.compress(legal(text).encode()) + squeeze.flush()).decode()


def escaped(values: list[str]) -> list[str]:
    """Each value as HTML. One escape for all of them: large runs have millions."""
    joined = "\0".join(values)
    if joined.count("\0") >= max(1, len(values)):
        joined = "\0".join([value.replace("\0", "�") for value in values])
    return str(escape(joined)).split("\0") if values else []


def table_row(values: list[str]) -> Markup:
    """Cells of one table row, the first its header."""
    head, *rest = escaped(values or [""])
    return Markup(f'<th scope="row" class="n">{head}</th>' + "".join(f'<td class="n">{cell}</td>' for cell in rest))


def definitions(pairs: list[tuple[str, str]]) -> Markup:
    """The inside of a definition list, a `div` for each (name, value)."""
    told = escaped([text for pair in pairs for text in pair])
    lines = zip(told[::2], told[1::2], strict=True)
    return Markup("".join([f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in lines]))


def number(value: float) -> str:
    """A number for a reader: four significant digits, thousands grouped, `nan` and `inf` by name."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:.4g}"


def seconds(value: float) -> str:
    if not 60 <= value < 1e9:  # a NaN too is shown as it is
        return f"{value:.1f} s"
    return f"{int(value // 60)} min {int(value % 60)} s"
