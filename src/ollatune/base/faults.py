"""Named points where tests can make a process fail. Without OLLATUNE_FAULT in the environment they do nothing.

`OLLATUNE_FAULT="train.step:kill@3,train.loss:nan@5"` kills the process the third time `train.step` is reached, and
makes the fifth `train.loss` report NaN. Actions: kill, terminate, interrupt, nan, spike, oom, enospc.
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass


@dataclass
class _Fault:
    action: str
    at: int
    seen: int = 0


def _parse(text: str) -> dict[str, list[_Fault]]:
    faults: dict[str, list[_Fault]] = {}
    for item in filter(None, text.split(",")):
        point, _, rest = item.partition(":")
        action, _, count = rest.partition("@")
        faults.setdefault(point, []).append(_Fault(action, int(count or 1)))
    return faults


_FAULTS = _parse(os.environ.get("OLLATUNE_FAULT", ""))


def fault_point(name: str) -> bool:
    """True when a `nan` or `spike` fault is due here: the caller spoils its numbers.

    Other due faults kill the process, send a signal or raise.
    """
    due = []
    for fault in _FAULTS.get(name, ()):
        fault.seen += 1
        if fault.seen == fault.at:
            due.append(fault)
    for fault in due:
        if fault.action in ("nan", "spike"):
            return True
        if fault.action == "oom":
            raise MemoryError("injected: out of memory")
        if fault.action == "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        signals = {"terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
        os.kill(os.getpid(), signals.get(fault.action, getattr(signal, "SIGKILL", signal.SIGTERM)))
    return False
