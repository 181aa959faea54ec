"""What a run that was cut off has already shown: which of its results still hold, and with what they can be compared.

A result holds while nothing changed that could change it; all of that is in its `fingerprint`.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from harness.cell import Cell
from harness.frozen import Frozen, content_hash
from harness.matrix import PlannedCell
from harness.models.recipe import PREFIX, find
from harness.result import CellResult
from harness.transcript import Transcript
from harness.verdict import Verdict

PACKAGES = Path(__file__).resolve().parent.parent
#: Draws what is there and changes no verdict.
_NOT_JUDGING = ("harness/report/", "harness/schemas/")
#: Verdicts that say something of the cell; two attempts of which these differ disagree.
JUDGED = (Verdict.PASS, Verdict.FAIL, Verdict.XFAIL, Verdict.XPASS, Verdict.REJECTED, Verdict.UNPROVEN, Verdict.FLAKY)


class Setting(Frozen):
    """What all cells of a run share and answers depend on. `image`: the container image's digest, "" in processes.

    `environment`: the variables of this environment that change how servers compute.
    """

    versions: tuple[tuple[str, str], ...]
    hardware: tuple[str, ...]
    runtime: str = "process"
    image: str = ""
    code: str = ""
    environment: tuple[tuple[str, str], ...] = ()

    @cached_property
    def key(self) -> str:
        return content_hash(self.model_dump(mode="json"))


class Kept(NamedTuple):
    """What a resumed run starts with, by cell key. `judged`: verdicts of earlier attempts that still count."""

    results: dict[str, CellResult]
    references: dict[str, Transcript]
    judged: dict[str, list[tuple[Verdict, str]]]


NOTHING = Kept({}, {}, {})


def fingerprint(item: PlannedCell, setting: Setting) -> str:
    """Content hash of everything that can change the verdict of `item`: its arguments and prompts, its model, what the
    suite expects of it, what it is compared with, versions, our own code, the image and the hardware."""
    declared = [item.declared, item.refusal, item.baseline.key if item.baseline else None]
    declared += [item.bench.model_dump(mode="json")] if item.bench else []
    return content_hash([item.cell.key, model_key(item.cell.model), declared, setting.key])


@cache
def model_key(model: str) -> str:
    """The content of a recipe's model; the commit of a hub model in the local cache, or nothing where there is none."""
    if model.startswith(PREFIX):
        return find(model).key
    folder = Path(model)
    if folder.is_dir():
        config = folder / "config.json"
        return content_hash(config.read_text()) if config.is_file() else ""
    root = os.environ.get("HF_HUB_CACHE") or f"{os.environ.get('HF_HOME') or Path.home() / '.cache/huggingface'}/hub"
    ref = Path(root) / f"models--{model.replace('/', '--')}" / "refs" / "main"
    return ref.read_text().strip() if ref.is_file() else ""


def code_key(root: Path = PACKAGES) -> str:
    """SHA-256 of our own code as it lies there, the report's left out; first 16 hex digits."""
    digest = hashlib.sha256()
    for package in ("harness", "helix_runtime"):
        for path in sorted((root / package).rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.suffix in (".py", ".json") and not name.startswith(_NOT_JUDGING):
                digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def keep(events: Sequence[dict], plan: Iterable[PlannedCell], setting: Setting, folders: Mapping[str, Path]) -> Kept:
    """The results among `events` that still hold for `plan`. `folders`: each cell's folder, by key.

    Errors and skips are not kept. A baseline is kept only with its transcript, whole and unchanged on disk; a cell only
    if its baseline is.
    """
    last: dict[str, tuple[str, dict]] = {}
    attempts: dict[str, list[dict]] = defaultdict(list)
    for event in events:
        if event["event"] == "result" and isinstance(event.get("result"), dict):
            last[str(event.get("key"))] = (str(event.get("key")), event["result"])
        elif event["event"] == "attempt":
            attempts[str(event.get("key"))].append(event)
    kept = Kept({}, {}, {})
    for item in plan:
        cell, key = item.cell, fingerprint(item, setting)
        kept.judged[cell.key] = _judged(attempts.get(key, []))
        if item.skip is not None or key not in last:
            continue
        if item.baseline is not None and item.baseline.key not in kept.references:
            continue
        result = _result(last[key][1])
        if result is None or result.verdict in (Verdict.ERROR, Verdict.SKIP) or result.cell != cell:
            continue
        if cell.baseline and result.verdict is Verdict.PASS:
            transcript = saved(folders[cell.key], cell, result.transcript_digest)
            if transcript is None:
                continue
            kept.references[cell.key] = transcript
        kept.results[cell.key] = result
    return kept


def saved(folder: Path, cell: Cell, digest: str | None, name: str = "transcript.json") -> Transcript | None:
    """The transcript that `cell` left in `folder`; None when it is missing, damaged or (with `digest`) another one."""
    try:
        found = Transcript.load(folder / name)
    except (OSError, ValueError):
        return None
    same = found.cell_key == cell.key and (digest is None or found.digest() == digest)
    return found if same else None


def _judged(attempts: list[dict]) -> list[tuple[Verdict, str]]:
    words = {str(verdict): verdict for verdict in JUDGED}
    found = [(words.get(str(event.get("verdict"))), str(event.get("reason", ""))) for event in attempts]
    return [(verdict, reason) for verdict, reason in found if verdict is not None]


def _result(record: dict) -> CellResult | None:
    try:
        return CellResult.model_validate(record)
    except ValidationError:
        return None
