"""The results of a run: a file with a line of JSON for each thing that became known, written when it did.

A step consists of items: tests, say, or problems to be timed. Each leaves a line when it begins and one when it has
ended, so that after a crash it is known which item was at fault, and a restarted step goes on with the next.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OK, FAILED = "ok", "failed"
NOT_RUN = "not run"  # for a reason that is no fault of the kernels
GOOD = (OK, NOT_RUN)
CRASHED, HUNG = "crashed", "hung"  # of an item: the step's process ended, or had to be ended, while it ran
EXIT_FAILED = 74  # the step is through, and some items failed
EXIT_UNFINISHED = 75  # its time was up before its last item; it can go on
EXIT_BROKEN = 76  # the GPU answers this process no longer, a new one may go on


class Records:
    """The file of results in a folder."""

    def __init__(self, folder: Path):
        self.path = folder / "results.jsonl"
        self.path.touch()

    def write(self, **fields: Any) -> None:
        """Appends a line. If the last line was cut off, by a process that was ended, this one begins a new one."""
        line = json.dumps(fields) + "\n"
        with open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())

    def read(self) -> list[dict[str, Any]]:
        """All lines but those that were cut off."""
        lines = self.path.read_text().splitlines()
        records = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
        return records

    def ended(self, step: str) -> dict[str, dict[str, Any]]:
        """The results of a step's items, by their names."""
        items = [r for r in self.read() if r.get("step") == step and "item" in r and "status" in r]
        return {record["item"]: record for record in items}

    def begun(self, step: str) -> str | None:
        """The item that the step's last process began, and did not end."""
        item = None
        for record in self.read():
            if record.get("step") == step:
                item = record["item"] if record.get("event") == "begin" else None
        return item

    def events(self, step: str, event: str) -> list[dict[str, Any]]:
        return [r for r in self.read() if r.get("step") == step and r.get("event") == event]


def first_line(problem: BaseException) -> str:
    text = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {text[0] if text else ''}"[:500]


def run_items(
    records: Records,
    step: str,
    items: Iterable[tuple[str, Callable[[], dict[str, Any]]]],
    end: float,
    is_sound: Callable[[], bool] = lambda: True,
) -> int:
    """Runs the items that have no result yet, until time.monotonic() is `end`; returns the process' exit status.

    An item is a name, and a function that returns the fields of its result. What it raises is its result, too. After
    that, `is_sound` says whether this process can go on: an access out of bounds on a GPU leaves a process none.
    """
    ended = records.ended(step)
    status = EXIT_FAILED if any(record["status"] not in GOOD for record in ended.values()) else 0
    for item, run in items:
        if item in ended:
            continue
        if time.monotonic() >= end:
            return EXIT_UNFINISHED
        records.write(step=step, item=item, event="begin")
        start = time.monotonic()
        try:
            result = {"status": OK, **run()}
        except Exception as problem:
            result = {"status": FAILED, "error": first_line(problem)}
        took = round(time.monotonic() - start, 4)
        records.write(step=step, item=item, event="end", **result, took=took)
        if result["status"] not in GOOD:
            status = EXIT_FAILED
            if not is_sound():
                return EXIT_BROKEN
    return status
