"""What a conversion says that it has done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

_WORDS = {
    "add": "addition",
    "relu": "ReLU",
    "relu6": "ReLU6",
    "leaky_relu": "LeakyReLU",
    "silu": "SiLU",
    "hard_silu": "HardSiLU",
    "gelu": "GELU",
    "gelu_tanh": "GELU (tanh)",
    "elu": "ELU",
    "selu": "SELU",
}


class Report(NamedTuple):
    """What became of a batch norm."""

    name: str
    kinds: tuple[str, ...] = ()  # of what was folded in, or taken out
    names: tuple[str, ...] = ()  # of the layers and operations that do this
    why: str = ""  # it is alone, in words that batch norms have in common
    detail: str = ""
    kept: str = ""  # its class, if that is why it has been left as it was
    calls: tuple[Report, ...] = ()  # one for each call, if these differ; then there are no kinds of the batch norm
    unfolded: bool = False  # it was of the wanted class, but had something folded in
    into: str = ""  # the layer whose weights it has gone into

    @property
    def folds(self) -> bool:
        return bool(self.kinds or self.calls)


def merged(calls: list[Report]) -> Report:
    """The report on a batch norm, from one on each of its calls."""
    if len({call.kinds for call in calls}) > 1:
        return Report(calls[0].name, calls=tuple(calls))
    names = dict.fromkeys(name for call in calls for name in call.names)
    return calls[0]._replace(names=tuple(names))


def describe(name: str, to: str, reports: list[Report], each: bool) -> str:
    """What was done, in a line; and a line for each batch norm."""
    if unfolded := [report for report in reports if report.unfolded]:
        rest = [report for report in reports if not report.unfolded]
        line = f"{len(unfolded)} batch norm{'s' if len(unfolded) > 1 else ''} unfolded: {_count(unfolded, 'that had')}"
        line = f"{describe(name, to, rest, False)}; {line}" if rest else f"{name}: {line}"
        return _with_each(line, reports) if each else line
    done = [report for report in reports if not report.kept]
    kept = [report for report in reports if report.kept]
    if not reports:
        return f"{name}: there are no batch norms to replace"
    count = f"{len(done)} of {len(reports)}" if kept else str(len(done))
    line = f"{name}: {count} batch norm{'s' if len(reports) > 1 else ''} replaced"
    alone = [report for report in done if not report.folds]
    folded = [text] if (text := _count(done, "with" if to == "tfops" else "that had")) else []
    if alone and (folded or any(report.why for report in alone)):
        folded.append(f"{len(alone)} alone{_reasons(alone)}")
    line += f": {', '.join(folded)}" if folded else ""
    if kept:
        origin = "Keras'" if to == "tfops" else "tfops'"
        line += f"; left as they are, because their classes derive from {origin}: {_list(kept)}"
    return _with_each(line, reports) if each else line


def describe_merged(name: str, reports: list[Report], each: bool) -> str:
    """What went into weights, and what was kept, in a line; and a line for each batch norm."""
    if not reports:
        return f"{name}: there are no batch norms to fold"
    kept = [report for report in reports if not report.into]
    parts = [f"{len(reports) - len(kept)} folded into weights"] if len(kept) < len(reports) else []
    if kept:
        folded = _count(kept, "with")
        parts.append(f"{len(kept)} kept{_reasons(kept)}{': ' if folded else ''}{folded}")
    line = f"{name}: {len(reports)} batch norm{'s' if len(reports) > 1 else ''}: {', '.join(parts)}"
    return _with_each(line, reports, _tell_merged) if each else line


def _reasons(reports: list[Report]) -> str:
    """Why batch norms are alone, or were kept."""
    reasons = Counter(report.why for report in reports if report.why).most_common()
    text = reasons[0][0] if len(reasons) == 1 else "; ".join(f"{why}: {number}" for why, number in reasons)
    return f" ({text})" if text else ""


def _count(reports: list[Report], verb: str) -> str:
    """How many batch norms there are of each kind of fold."""
    kinds = Counter(_join(report.kinds) for report in reports if report.kinds)
    texts = [f"{number} {verb} {kind}" for kind, number in kinds.most_common()]
    differ = [_unlike(report) for report in reports if report.calls]
    return ", ".join(texts + [f"{number} {verb} {text}" for text, number in Counter(differ).most_common()])


def _unlike(report: Report) -> str:
    """What is folded into calls that differ."""
    kinds = Counter(_join(call.kinds) or "nothing" for call in report.calls)
    return " and ".join(f"{kind} in {number} of {len(report.calls)} calls" for kind, number in kinds.items())


def _with_each(line: str, reports: list[Report], tell: Callable[[Report], str] | None = None) -> str:
    width = max(len(report.name) for report in reports)
    return "\n".join([line, *(f"  {report.name:<{width}}  {(tell or _tell)(report)}" for report in reports)])


def _tell_merged(report: Report) -> str:
    if report.into:
        return f"folded into {report.into}"
    text = f"kept: {report.why}" + (f" ({report.detail})" if report.detail else "")
    return f"{text}; {_tell(report)}" if report.folds else text


def _tell(report: Report) -> str:
    if report.kept:
        return f"left as it is: a {report.kept}"
    if report.calls:
        return f"{len(report.calls)} calls: {'; '.join(map(_tell, report.calls))}"
    if report.kinds:
        return _join(report.kinds) + (f": {', '.join(report.names)}" if report.names else "")
    return "alone" + (f": {report.why}" if report.why else "") + (f" ({report.detail})" if report.detail else "")


def _join(kinds: Iterable[str]) -> str:
    parts = (kind.partition("(") for kind in kinds)  # a name, and parameters if there are any
    return " and ".join(_WORDS.get(name, name) + opening + rest for name, opening, rest in parts)


def _list(kept: list[Report]) -> str:
    names = [f"{report.name} ({report.kept})" for report in kept]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
