"""JUnit XML, in the strict shape that CI systems' schemas share."""

import xml.etree.ElementTree as ET
from itertools import groupby

from harness.report.run import Run
from harness.report.square import column_of
from harness.report.text import clean, rerun
from harness.result import CellResult
from harness.verdict import TABLE, Effect

#: A part in the exit status -> the element that says so.
_ELEMENT = {Effect.DIFFERS: "failure", Effect.INFRASTRUCTURE: "error", Effect.NEUTRAL: "skipped"}
_NO_TIME = "1970-01-01T00:00:00"


def junit_xml(run: Run) -> str:
    """One suite for each hardware, one case a cell; differing is a failure, infrastructure an error, not run a skip."""
    root = ET.Element("testsuites")
    ranked = sorted(run.results, key=lambda result: result.cell.hardware)
    for number, (hardware, members) in enumerate(groupby(ranked, key=lambda result: result.cell.hardware)):
        results = list(members)
        effects = [result.effect for result in results]
        suite = ET.SubElement(
            root,
            "testsuite",
            id=str(number),
            package="helix",
            name=clean(f"helix.{hardware}"),
            timestamp=_timestamp(run.started),
            hostname="localhost",
            tests=str(len(results)),
            failures=str(effects.count(Effect.DIFFERS)),
            errors=str(effects.count(Effect.INFRASTRUCTURE)),
            skipped=str(effects.count(Effect.NEUTRAL)),
            time=f"{sum(_time(result) for result in results):.3f}",
        )
        properties = ET.SubElement(suite, "properties")
        for name, value in (("run", run.name), ("hardware", hardware)):
            ET.SubElement(properties, "property", name=name, value=clean(value))
        for result in results:
            suite.append(_case(result))
        ET.SubElement(suite, "system-out")
        ET.SubElement(suite, "system-err").text = "\n".join(run.left_out) if number == 0 else ""
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _case(result: CellResult) -> ET.Element:
    cell = result.cell
    classname = clean(f"helix.{cell.hardware}.{column_of(cell)}.{cell.backend}".replace(" ", "-"))
    case = ET.Element("testcase", name=clean(cell.id), classname=classname, time=f"{_time(result):.3f}")
    element = _ELEMENT.get(result.effect)
    if element:
        said = ET.SubElement(case, element, message=clean(f"{result.verdict}: {result.reason}"))
        if element != "skipped":
            said.set("type", str(result.verdict))
            said.text = clean(
                f"{TABLE[result.verdict].sentence}\ndeclared {result.declared}: {result.declared_why}\n"
                f"run again: {rerun(cell.id)}\n\n{result.log_tail}"
            )
    return case


def _time(result: CellResult) -> float:
    total = sum(phase.seconds for phase in result.phases)
    return total if 0 <= total < 1e9 else 0.0


def _timestamp(text: str) -> str:
    """`YYYY-MM-DDThh:mm:ss`, without a zone, as the schema wants it."""
    head = text[:19]
    digits = all(
        letter.isascii() and letter.isdigit() for index, letter in enumerate(head) if _NO_TIME[index].isdigit()
    )
    marks = all(letter == _NO_TIME[index] for index, letter in enumerate(head) if not _NO_TIME[index].isdigit())
    return head if len(head) == 19 and digits and marks else _NO_TIME
