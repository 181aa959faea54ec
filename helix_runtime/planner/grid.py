"""Layouts and batches as arrays, so that thousands are costed at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from helix_runtime.capabilities import STANDARD_DCP
from helix_runtime.layout import Layout

#: How partials are merged: not at all, packed All-to-All, AllGather + ReduceScatter.
NONE, A2A, AG_RS = 0, 1, 2
#: vLLM's names of the two, as `--dcp-comm-backend` takes them.
MERGES = {"a2a": A2A, "ag_rs": AG_RS}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One entry a (layout, batch). `batch` is of one server. All arrays have the same length.

    `tpa`, `kvp`: shards of the heads and of the sequence. `query`: shards of the query projection; `output`: of
    `o_proj`. `ffn`: ranks that share a dense FFN or one expert; `experts`: groups that hold whole experts (EP).
    `stages`: pipeline stages. `gathers`: queries are gathered within the KVP group. `merge`: NONE, A2A or AG_RS.
    `overlap`: HOP-B, the exchange of one request beside the attention of the next.
    """

    tpa: np.ndarray
    kvp: np.ndarray
    query: np.ndarray
    output: np.ndarray
    ffn: np.ndarray
    experts: np.ndarray
    stages: np.ndarray
    batch: np.ndarray
    gathers: np.ndarray
    merge: np.ndarray
    overlap: np.ndarray

    @property
    def ranks(self) -> np.ndarray:
        """GPUs of one server."""
        return self.stages * np.maximum(self.tpa * self.kvp, self.ffn * self.experts)

    def __len__(self) -> int:
        return len(self.batch)

    @classmethod
    def of(cls, rows: Iterable[dict[str, object]]) -> "Grid":
        """From one dict of fields a row."""
        listed = list(rows)
        return cls(**{field.name: np.array([row[field.name] for row in listed]) for field in fields(cls)})

    def times(self, batches: Sequence[int]) -> "Grid":
        """Every entry with every batch: entry-major."""
        columns = {field.name: np.repeat(getattr(self, field.name), len(batches)) for field in fields(self)}
        columns["batch"] = np.tile(np.asarray(batches), len(self))
        return Grid(**columns)


def entry(layout: Layout, q_replicate: bool = False, batch: int = 1, merge: int | None = None) -> dict[str, object]:
    """A legal layout of vLLM as one row of a Grid.

    Standard DCP projects its own heads and gathers the queries of its group; so does MLA under Helix unless the query
    projection is replicated. Helix GQA projects what it computes. Helix merges by one packed All-to-All, standard DCP
    by AllGather + ReduceScatter, which are their defaults; `merge` says otherwise.
    """
    shared = layout.kvp > 1
    if merge is None:
        merge = A2A if layout.helix_mode else AG_RS
    gathers = shared and (layout.mode == STANDARD_DCP or layout.use_mla) and not q_replicate
    return {
        "tpa": layout.tpa,
        "kvp": layout.kvp,
        "query": layout.tp if gathers or not shared else layout.tpa,
        "output": layout.tp,
        "ffn": layout.tp,
        "experts": 1,
        "stages": 1,
        "batch": batch,
        "gathers": gathers,
        "merge": merge if shared else NONE,
        "overlap": False,
    }
