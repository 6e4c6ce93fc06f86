"""A measurement in parts: the file of results, what it has of this run already, and when this part of it ends."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

PARTS = ("transfers", "latencies", "stopped")
Line = dict[str, Any]


class Progress:
    """Lines of `path` by their part, and those that were found since. Nothing new begins `most` seconds from now."""

    def __init__(self, path: Path | None = None, *, resumes: bool = False, most: float = float("inf")) -> None:
        self._path = path
        self._until = time.monotonic() + most
        known = json.loads(path.read_text()) if resumes and path is not None and path.exists() else {}
        self._done: dict[str, list[Line]] = {part: known.get(part, []) for part in PARTS}
        self.found: dict[str, list[Line]] = {part: [] for part in PARTS}
        self.stopped = False  # before all was measured

    def over(self) -> bool:
        """Whether nothing new may begin. To be asked only where there is more to measure."""
        self.stopped = self.stopped or time.monotonic() > self._until
        return self.stopped

    def done(self, part: str) -> list[Line]:
        """Lines that are known, and need not be measured again."""
        return self._done[part]

    def save(self, seed: int) -> None:
        """Add to what the file has."""
        if self._path is None or not any(self.found.values()):
            return
        known = json.loads(self._path.read_text()) if self._path.exists() else {"seeds": []}
        if seed not in known["seeds"]:
            known["seeds"].append(seed)
        for part, lines in self.found.items():
            known.setdefault(part, []).extend(lines)
        parts = []
        for part, lines in known.items():
            results = ",\n".join(map(json.dumps, lines))  # one on a line
            parts.append(f"{json.dumps(part)}: [\n{results}\n]")
        new = self._path.with_suffix(".new")
        new.write_text("{\n" + ",\n".join(parts) + "\n}\n")
        new.replace(self._path)
