"""Scripted faults: what happens to the next requests for a path instead of, or during, the right answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "status",  # answer `status` with `body` and `headers`
    "delay",  # wait `seconds`, then answer as usual
    "cut_request",  # read `fraction` of the body, then close the connection
    "cut_response",  # send the head and `after` events (or bytes), then close the connection
    "end_early",  # send `after` events and end the stream properly
    "error_event",  # send `after` events, then {"error": body}
    "garbage",  # 200 with `body` as it is
    "silence",  # send the head and `after` events, then nothing for `seconds`
    "drip",  # answer as usual, byte by byte with `seconds` between
]


@dataclass
class Fault:
    """One fault for the first `times` requests whose path begins with `path` (and whose method is `method`)."""

    path: str
    kind: Kind
    method: str = ""
    times: int = 1
    status: int = 500
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    fraction: float = 0.5
    after: int = 0

    def applies(self, method: str, path: str) -> bool:
        return self.times > 0 and path.startswith(self.path) and self.method in ("", method)
