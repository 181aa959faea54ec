"""Several attempts at one cell -> one verdict. A retry is for infrastructure only and never hides a comparison."""

from collections import Counter
from collections.abc import Sequence

from harness.observe import Observation
from harness.server.log import Cause, Failure
from harness.verdict import Verdict

#: How often a cell is started again after infrastructure failed it.
RETRIES = 1

#: Causes that come from the host and may be gone a moment later. Not among them: a refusal, a missing model and memory
#: (which is leased): the same again.
_PASSING = (Cause.PORT_IN_USE, Cause.KILLED, Cause.NCCL, Cause.DAEMON)
_PASSING_AT_START = (Cause.TIMEOUT,)
#: How a server ends that has been up and was asked, where the end may be its own doing: it crashed, hung or broke off.
_OWN_DEATH = (Cause.OTHER, Cause.TIMEOUT, Cause.BROKEN_ANSWER, Cause.ILLEGAL_ACCESS, Cause.NCCL)


def worth_again(failure: Failure | None, started: bool, compared: bool = False) -> bool:
    """Whether an attempt that ended so is made again. `started`: its server had been ready. `compared`: its baseline
    answered all, so that a death while answering is looked at twice."""
    if failure is None:
        return False
    if failure.cause in _PASSING or (not started and failure.cause in _PASSING_AT_START):
        return True
    return compared and died_answering(failure, started)


def died_answering(failure: Failure | None, started: bool) -> bool:
    """Whether a server that was up ended while it was asked, and not by what its host did to it."""
    return failure is not None and started and failure.cause in _OWN_DEATH


def settle(
    judged: Sequence[tuple[Verdict, str]], lost: Sequence[str], last: Observation, deaths: int = 0
) -> Observation:
    """The verdict of a cell from its attempts: those that were judged, what the others were lost to, and the last one.

    Judged attempts that disagree are `flaky`, however the last one ended. `deaths`: of those that were lost, how many
    died while answering what the cell's baseline had answered on the same host. Once may be the host's doing; twice,
    with nothing judged between, is the cell's: `fail`.
    """
    if deaths > RETRIES and not judged and last.verdict is Verdict.ERROR:
        told = f"{last.reason}; so it did {deaths} times, where its baseline answered all"
        return last._replace(verdict=Verdict.FAIL, reason=told)
    counts = Counter(verdict for verdict, _ in judged)
    if len(counts) > 1 or Verdict.FLAKY in counts:
        told = " and ".join(f"{number} x {verdict}" for verdict, number in counts.items() if verdict != Verdict.FLAKY)
        first = {verdict: reason for verdict, reason in reversed(judged)}
        reasons = "; ".join(f"{verdict}: {reason}" for verdict, reason in first.items())
        return last._replace(verdict=Verdict.FLAKY, reason=f"attempts disagree ({told or 'before'}): {reasons}")
    if not lost:
        return last
    if last.verdict is Verdict.ERROR:
        before = lost[:-1]
        return last._replace(reason=f"{last.reason}; so did {len(before)} before" if before else last.reason)
    return last._replace(reason=f"{last.reason}; an attempt before was lost to infrastructure: {lost[0]}")
