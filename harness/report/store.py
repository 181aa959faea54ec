"""Each run's cells as Parquet beside its ledger: for notebooks, and what DuckDB reads over many runs.

The file remembers the hash of the ledger that it was drawn from. Where that is another one, or the file is missing,
torn or of another version, it is drawn again: a history never tells what no ledger says.
"""

import hashlib
import io
import os
import tempfile
from functools import cache
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from harness import ledger
from harness.frozen import Frozen, content_hash
from harness.report.run import Run, load
from harness.report.table import COLUMNS, tabulate

NAME = "results.parquet"
SCHEMA = 1
_KEY = b"helix"


class Header(Frozen):
    """What a run's Parquet file says of the run as a whole, in its metadata under `helix`."""

    schema_version: int = SCHEMA
    ledger: str  # SHA-256 of the ledger, unpacked
    run: str
    started: str
    ended: str
    hardware: tuple[str, ...]
    unfinished: tuple[str, ...]


class Stored(Frozen):
    """One run that can be looked up: its folder, its Parquet file and the file's header."""

    folder: Path
    file: Path
    header: Header

    @property
    def name(self) -> str:
        """What people call it: its folder, which for committed evidence is not the run's own name."""
        return self.folder.name


@cache
def _database() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"threads": 2, "autoinstall_known_extensions": False})


def connect() -> duckdb.DuckDBPyConnection:
    """A connection of its own to this process's empty database: nothing is kept, and nothing is fetched."""
    return _database().cursor()


def parquet(run: Run, table: pd.DataFrame, digest: str) -> bytes:
    """`table` as a Parquet file whose metadata holds the `Header`."""
    header = Header(
        ledger=digest,
        run=run.name,
        started=run.started,
        ended=run.ended,
        hardware=run.hardware,
        unfinished=run.unfinished,
    )
    found = pa.Table.from_pandas(table, preserve_index=False)
    found = found.replace_schema_metadata({**(found.schema.metadata or {}), _KEY: header.model_dump_json().encode()})
    stream = io.BytesIO()
    pq.write_table(found, stream, compression="zstd")
    return stream.getvalue()


def digest_of(run_dir: Path) -> str:
    """SHA-256 of the run's ledger; of nothing where it cannot be read."""
    try:
        with ledger.opened(ledger.find(run_dir)) as lines:
            return hashlib.file_digest(lines, "sha256").hexdigest()
    except OSError:
        return hashlib.sha256(b"").hexdigest()


def stored(run_dir: Path) -> Stored:
    """The run's Parquet file, drawn anew where it does not fit the ledger. It lies beside the ledger if it can."""
    digest = digest_of(run_dir)
    spare = (
        Path(tempfile.gettempdir())
        / f"helix-history-{os.getuid()}"
        / f"{digest}-{content_hash(str(run_dir.resolve()))}.parquet"
    )
    for file in (run_dir / NAME, spare):
        header = _header(file)
        if header and header.ledger == digest:
            return Stored(folder=run_dir, file=file, header=header)
    run = load(run_dir)
    content = parquet(run, tabulate(run), digest)
    try:
        file = _write(run_dir / NAME, content)
    except OSError:  # somebody else's folder
        spare.parent.mkdir(mode=0o700, exist_ok=True)
        file = _write(spare, content)
    return Stored(folder=run_dir, file=file, header=_header(file))


def _header(file: Path) -> Header | None:
    """None where the file cannot be read or another version wrote it, with other columns."""
    try:
        with pq.ParquetFile(file) as found:
            names, metadata = set(found.schema_arrow.names), found.schema_arrow.metadata or {}
        header = Header.model_validate_json(metadata[_KEY])
    except (OSError, pa.ArrowException, KeyError, ValidationError):
        return None
    return header if header.schema_version == SCHEMA and names.issuperset(COLUMNS) else None


def _write(file: Path, content: bytes) -> Path:
    scratch = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    scratch.write_bytes(content)
    return scratch.replace(file)
