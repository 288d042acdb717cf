"""Markdown from the results of a run, whole or in part."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from .calibrate import as_source
from .cells import cell_of
from .records import GOOD, OK, Records, first_line
from .runner import STEPS, USUAL

MOST_FAILURES = 40


def failures(records: Records) -> list[dict[str, Any]]:
    """The items that failed, crashed or hung."""
    found = []
    for step in STEPS:
        found += [r for r in records.ended(step.name).values() if r["status"] not in GOOD]
    return found


def summarize(records: Records, brief: bool = False) -> str:
    """All that is known so far; `brief`: without the long tables. A part that cannot be made says why."""
    makers = [_head, _steps, _failures, _sanitizers, _occupancy, _calibration]
    if not brief:
        makers += [_tiers, _against_peers, _compiled]
    parts = []
    for make in makers:
        try:
            parts.append(make(records))
        except Exception as problem:  # of records that are not as they should be, which must not hide the others
            parts.append(f"The part {make.__name__.strip('_')!r} could not be made: {first_line(problem)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(names: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    def line(values: Iterable[object]) -> str:
        return "| " + " | ".join(str(value).replace("|", "/").replace("\n", " ") for value in values) + " |"

    return "\n".join([line(names), "|" + "---|" * len(names), *map(line, rows)])


def _us(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.1f}"


def _copies(records: Records) -> list[dict[str, Any]]:
    found = [records.ended(step).get("copy", {}) for step in ("bench", "peers")]
    return [copy for copy in found if copy.get("copy_bytes_per_second")]


def _copy_rates(records: Records) -> list[float]:
    return [copy["copy_bytes_per_second"] for copy in _copies(records)]


def _head(records: Records) -> str:
    runs = [r for r in records.read() if r.get("event") == "run"]
    facts = records.ended("facts")
    machine, device = facts.get("machine", {}), facts.get("device", {}).get("device", {})
    nvidia_smi, arrays = facts.get("driver", {}).get("nvidia_smi") or {}, facts.get("arrays", {})
    lines = [f"# {arrays.get('gpu') or nvidia_smi.get('name') or 'A GPU'}"]
    if any(run.get("dry_run") for run in runs):
        lines += ["", "**A dry run: the GPU is simulated, and times are those of the simulation. They mean nothing.**"]
    about = []
    if runs:
        again = f", resumed {len(runs) - 1} times" if len(runs) > 1 else ""
        about.append(f"begun {runs[0]['date']}, {runs[0]['minutes']:g} minutes{again}")
    if build := machine.get("build"):
        about.append(f"built with CUDA {build['cuda_toolkit']} for {build['cuda_architectures']}")
    about += [f"{name} {version}" for name, version in machine.get("versions", {}).items() if version]
    about += [f"cuDNN {arrays['cudnn']}"] if arrays.get("cudnn") else []
    lines += ["", "; ".join(about)]
    lines += [f"- {name}: {value}" for name, value in {**nvidia_smi, **device}.items()]
    for copy in _copies(records):
        meanwhile = ", ".join(f"{name} {value}" for name, value in copy.get("at_work", {}).items())
        rate = f"{copy['copy_bytes_per_second'] / 1e12:.2f} TB/s"
        lines.append(f"- copy, read and written: {rate}" + (f"; meanwhile {meanwhile}" if meanwhile else ""))
    return "\n".join(lines)


def _steps(records: Records) -> str:
    rows = []
    for step in STEPS:
        last = records.events(step.name, "step")
        items = records.ended(step.name)
        if not last and not items:
            rows.append([step.name, step.what, "not reached", "", ""])
            continue
        counts = Counter(record["status"] for record in items.values())
        took = sum(event.get("took", 0) for event in last)
        status = last[-1]["status"] if last else "interrupted"
        rows.append([step.name, step.what, status, f"{took:.0f}", ", ".join(f"{n} {s}" for s, n in counts.items())])
    return "## Steps\n\n" + _table(("step", "what", "ended", "s", "items"), rows)


def _failures(records: Records) -> str:
    lines = []
    for step in STEPS:
        for last in records.events(step.name, "step")[-1:]:
            if last["status"] not in USUAL:
                lines.append(f"- {step.name}: **{last['status']}**: {last.get('said', '')[:300]}")
    found = failures(records)
    if not found and not lines:
        return ""
    for r in found[:MOST_FAILURES]:
        lines.append(f"- {r['step']}: {r['item']}: **{r['status']}**: {r.get('error', '')[:300]}")
    if len(found) > MOST_FAILURES:
        lines.append(f"- and {len(found) - MOST_FAILURES} more")
    return "## What failed\n\n" + "\n".join(line.replace("\n", " ") for line in lines)


def _sanitizers(records: Records) -> str:
    found = records.ended("sanitize")
    if not found:
        return ""
    rows = []
    for item, r in found.items():
        rows.append([item, r["status"], r.get("summary") or r.get("error", ""), r.get("checks", "")])
    return "## compute-sanitizer\n\n" + _table(("tool", "result", "it says", "comparisons"), rows)


def _occupancy(records: Records) -> str:
    found = {item: r["occupancy"] for item, r in records.ended("facts").items() if r.get("occupancy")}
    if not found:
        return ""
    sizes = sorted({size for occupancy in found.values() for size in occupancy["clusters"]}, key=int)
    rows = []
    for item, occupancy in found.items():
        row = [item.removeprefix("occupancy "), "CUDA" if occupancy["asked"] else "the table", occupancy["blocks"]]
        rows.append([*row, *(occupancy["clusters"].get(size, "") for size in sizes)])
    names = ("kernel", "by", "blocks", *(f"clusters of {size}" for size in sizes))
    return "## Blocks and clusters at once\n\n" + _table(names, rows)


def _plans(records: Records) -> dict[str, list[dict[str, Any]]]:
    """The measured plans of the most telling cells, by cell; without those that failed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records.ended("bench").values():
        if _is_measured(record):
            found.setdefault(record["cell"], []).append(record)
    return found


def _is_measured(record: dict[str, Any]) -> bool:
    return record["status"] == OK and record.get("seconds", 0) > 0


def _label(plan: dict[str, Any]) -> str:
    return plan["tier"] + (f" of {plan['cluster']}" if plan["cluster"] else "")


def _tiers(records: Records) -> str:
    rows, ratios = [], []
    for cell, plans in _plans(records).items():
        chosen = min(plans, key=lambda plan: plan["reckoned"])
        best = min(plans, key=lambda plan: plan["seconds"])
        ratios.append(chosen["seconds"] / best["seconds"])
        each = [f"{_label(p)} {_us(p['seconds'])} ({_us(p['reckoned'])})" for p in plans]
        rows.append([cell, _label(chosen), _label(best), f"{ratios[-1]:.2f}", ", ".join(each)])
    if not rows:
        return ""
    names = ("cell", "the policy takes", "fastest", "ratio", "microseconds measured (reckoned)")
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    text = f"The policy's choice takes {mean:.3f} times as long as the fastest plan, in the geometric mean."
    return f"## Tiers\n\n{_table(names, rows)}\n\n{text}"


def _calibration(records: Records) -> str:
    found = records.ended("calibrate").get("fit", {})
    if "tuning" not in found:
        return ""
    lines = [
        "## Calibration",
        "",
        f"From {found['plans']} plans. Predicted over measured times are off by a factor of "
        f"{math.exp(found['error_before']):.2f} with the old constants and {math.exp(found['error_after']):.2f} with "
        f"new ones (root mean square of logarithms). Choices are slower than the fastest measured plan by "
        f"{found['regret_before']:.1%} with the old ones and by {found['regret_after']:.1%} with the new ones.",
        "",
        "```cpp",
        as_source(found["tuning"]),
        "```",
    ]
    rows = []
    for item, record in records.ended("recheck").items():
        if "new" in record and record["status"] == OK:
            old, new = record["old"], record["new"]
            ratio = f"{old['seconds'] / new['seconds']:.2f}"
            rows.append([item, _label(old), _us(old["seconds"]), _label(new), _us(new["seconds"]), ratio])
    if rows:
        names = ("cell", "old choice", "us", "new choice", "us", "faster by")
        lines += ["", "Measured again, where the new constants choose another plan:", "", _table(names, rows)]
    return "\n".join(lines)


def _times(records: Records) -> dict[str, dict[str, Any]]:
    """The policy's own choices, by cell."""
    found = {cell: min(plans, key=lambda plan: plan["reckoned"]) for cell, plans in _plans(records).items()}
    for item, record in records.ended("recheck").items():
        if "new" in record:
            found[item] = record["new"]
    found |= {item: record for item, record in records.ended("rest").items() if _is_measured(record)}
    return found


def _against_peers(records: Records) -> str:
    times, peers = _times(records), records.ended("peers")
    rates = _copy_rates(records)
    rows, ratios = [], []
    for name, record in times.items():
        cell = cell_of(name)
        rate = cell.least_bytes / record["seconds"]
        of_copy = f"{rate / statistics.fmean(rates):.2f}" if rates else ""
        row = [name, _label(record), _us(record["seconds"]), f"{rate / 1e9:.0f}", of_copy]
        theirs = {peer: time for peer, time in peers.get(name, {}).get("peers", {}).items() if time > 0}
        if theirs:
            best = min(theirs, key=theirs.__getitem__)
            ratios.append(theirs[best] / record["seconds"])
            row += [best, _us(theirs[best]), f"{ratios[-1]:.2f}"]
        else:
            row += ["", "", ""]
        rows.append(row)
    if not rows:
        return ""
    names = ("cell", "tier", "us", "GB/s on least bytes", "of copy", "best of PyTorch and cuDNN", "us", "ratio")
    text = f"## Times\n\n{_table(names, rows)}"
    if ratios:
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        below = sum(ratio < 1 for ratio in ratios)
        text += f"\n\nGeometric mean of the ratios {mean:.2f}, least {min(ratios):.2f}, "
        text += f"{below} of {len(ratios)} below 1."
    constants = Counter(r["constants"] for r in records.ended("rest").values() if "constants" in r)
    if constants:
        text += "\n\nConstants of the policy, beside the first cells: "
        text += ", ".join(f"{name} in {count} cells" for name, count in constants.items()) + "."
    return text


def _compiled(records: Records) -> str:
    times, rows = _times(records), []
    for item, record in records.ended("compile").items():
        for what in ("forward", "backward"):
            ours = times.get(f"{item} {what}")
            if what in record and ours:
                ratio = f"{record[what] / ours['seconds']:.2f}"
                rows.append([item, what, _us(ours["seconds"]), _us(record[what]), ratio])
    if not rows:
        return ""
    return "## torch.compile\n\n" + _table(("cell", "pass", "tfops, us", "torch.compile, us", "ratio"), rows)
