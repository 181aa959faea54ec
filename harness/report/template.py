"""Jinja over our own files: autoescape on, one environment for all pages."""

import base64
import hashlib
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness.report import drawing
from harness.report.text import fragment, plural
from harness.verdict import TABLE

_HERE = Path(__file__).parent


@cache
def environment() -> Environment:
    """Jinja with autoescape on. What it renders goes through `text.legal` before it is written."""
    found = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals |= {
        "legend": TABLE,
        "fragment": fragment,
        "plural": plural,
        "verdict": drawing.verdict,
        "sprite": drawing.sprite(),
        "style": asset("style.css"),
    }
    found.filters["breakable"] = lambda name: Markup("_<wbr>").join(name.split("_"))
    return found


def asset(name: str) -> Markup:
    """One of our own files, to stand in the page as it is."""
    return Markup((_HERE / name).read_text())


def script_hash(script: str) -> str:
    """The Content-Security-Policy source that lets this one script run, and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
