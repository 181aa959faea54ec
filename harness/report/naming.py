"""A cell as a reader calls it, the same words in every list: its square, then what tells it from its neighbours."""

from dataclasses import dataclass

from harness.cell import SHARE_GPU

#: What a reader must know of such a cell's times.
ON_ONE_GPU = "all ranks on one GPU: for validation, not for speed"


@dataclass(frozen=True)
class Name:
    """`options`: the layout. `notes`: the other options that its id tells, as `name=value`, and its planted defect."""

    place: str
    model: str
    options: list[str]
    notes: list[str]


def name_of(
    cell_id: str,
    column: str,
    backend: str,
    hardware: str,
    model: str,
    tp: int,
    kvp: int,
    tpa: int | None,
    comm: str | None,
    interleave: int,
    fault: str | None,
) -> Name:
    """From a cell's id and fields, as the cell or a row of `harness.report.table` has them."""
    options = [f"TP {tp}"]
    if kvp != 1:
        options += [f"KVP {kvp}"] if tpa is None else [f"KVP {kvp}", f"TPA {tpa}"]
        options += [comm] if comm else []
        options += [f"interleave {interleave}"]
    # The first parts of an id are hardware, mode, backend, model and layout.
    notes = [
        ON_ONE_GPU if part == f"{SHARE_GPU}=True" else part
        for part in cell_id.split("/")[5:]
        if "=" in part and not part.startswith("fault=")
    ]
    notes += [f"planted defect: {fault}"] if fault else []
    return Name(place=f"{backend} · {column} · {hardware}", model=model, options=options, notes=notes)
