"""Whether the kernel killed a process of a server for want of memory: its control group counts that, else the host."""

from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


class MemoryKills:
    """Kills from the first look on. `look` now and then while process `pid` lives: its group cannot be read later."""

    def __init__(self, pid: int, proc: Path = PROC, groups: Path = GROUPS):
        self.pid = pid
        self.proc = proc
        self.groups = groups
        self.file: Path | None = None
        self._before = 0
        self._host_before = _count(proc / "vmstat") or 0
        self.look()

    def look(self) -> None:
        """Note in which group the process is; one that changes its group is counted from there on.

        Not one that seems to go back to the root: so the kernel shows a process that is ending.
        """
        file = _counter(self.proc / str(self.pid) / "cgroup", self.groups, self.file is None)
        if file is not None and file != self.file and (count := _count(file)) is not None:
            self.file, self._before = file, count

    def told(self) -> str:
        """What happened, as one line of the log; "" where no process was killed.

        A group of its own is believed alone: what else was killed on this host is no concern of this server.
        """
        if self.file is not None and (count := _count(self.file)) is not None:
            own = "out of memory: the kernel killed a process of this server's control group"
            return own if count > self._before else ""
        host = "out of memory: the kernel killed a process of this host meanwhile"
        return host if (_count(self.proc / "vmstat") or 0) > self._host_before else ""


def _counter(told: Path, groups: Path, root: bool) -> Path | None:
    """The file in which the memory group of a process counts its kills, of either version of control groups.

    None where it cannot be told, and for the root group unless `root`.
    """
    try:
        lines = [line.split(":", 2) for line in told.read_text().splitlines()]
    except OSError:
        return None
    old = next((group.strip("/") for _, controllers, group in lines if "memory" in controllers.split(",")), None)
    group = old if old is not None else next((group.strip("/") for number, _, group in lines if number == "0"), None)
    if group is None or not (group or root):
        return None
    return groups / "memory" / group / "memory.oom_control" if old is not None else groups / group / "memory.events"


def _count(file: Path) -> int | None:
    """The field `oom_kill` of `file`; None without one."""
    try:
        fields = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return None
    return next((int(field[1]) for field in fields if field and field[0] == "oom_kill"), None)
