"""The processes below one, and the processor time that processes have had, from Linux's /proc."""

from contextlib import suppress
from pathlib import Path


def below(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found += [int(entry.name), *below(int(entry.name))]
            except OSError:
                continue
    return found


def cpu_s(pid: int) -> float:
    """Of its threads that live, to the microsecond: /proc/PID/stat counts in hundredths of a second."""
    spent = 0
    for each in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):  # it has just ended
            spent += int(each.read_text().split()[0])
    return spent / 1e9
