"""What `check` found: a row for each comparison, and the table of them."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Row:
    """One derivative of a function by one of its inputs, against what it should be.

    Attributes:
        kind: "gradient", "forward mode", "gradient of gradient" (and so on for higher orders), or "output" for what is
            wrong with the function's values.
        input: The path of the input, such as `inputs[0]['x']`, or the name of the variable.
        mode: "training" or "inference" where a Keras layer was called in both, else "".
        dtype: That of the input.
        error: The largest |analytic - numerical|, or where all are far within the tolerance, that of the one that is
            nearest to it.
        tolerance: The largest error allowed there.
        largest: The largest |numerical|: what the error is to be compared with.
        place: The element that has this error, such as `inputs[0]['x'][2, 3]`.
        analytic: The derivative there, according to TensorFlow.
        numerical: The difference quotient there. In a type narrower than float64, the derivative in float64.
        compared: How many elements and random directions were compared.
        left_out: How many were not, because the function has a kink there.
        note: What else is to be known; why the derivative is wrong, if it is.
        ok: Whether it is right.
    """

    kind: str
    input: str = ""
    mode: str = ""
    dtype: str = ""
    error: float = math.nan
    tolerance: float = math.nan
    largest: float = math.nan
    place: str = ""
    analytic: float = math.nan
    numerical: float = math.nan
    compared: int = 0
    left_out: int = 0
    note: str = ""
    ok: bool = True

    def __str__(self) -> str:
        """A sentence."""
        subject = " ".join(
            filter(None, [self.kind, self.input and f"by {self.input}", self.dtype and f"({self.dtype})"])
        )
        mode = f" in {self.mode}" if self.mode else ""
        values = f"{self.place} has {self.analytic:.6g}, and should have {self.numerical:.6g}" if self.place else ""
        told = "; ".join(filter(None, [values, self.note]))
        return f"{'ok' if self.ok else 'FAILED'}: {subject}{mode}: {told}"


@dataclasses.dataclass(frozen=True)
class Report:
    """All comparisons of a function. It is true if all are right, and its text is a table.

    Attributes:
        function: The name of the function.
        rows: The comparisons.
    """

    function: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether every derivative is right."""
        return all(row.ok for row in self.rows)

    def __bool__(self) -> bool:
        return self.ok

    def raise_if_failed(self) -> None:
        """Raises AssertionError, with the table, unless every derivative is right."""
        if not self.ok:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        header = ("derivative", "input", "mode", "dtype", "error", "tolerance", "largest", "compared", "")
        cells = [header, *map(_cells, self.rows)]
        shown = [i for i in range(len(header)) if i != 2 or any(row.mode for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in shown]
        lines = ["  ".join(line[i].ljust(width) for i, width in zip(shown, widths, strict=True)) for line in cells]
        failures = [str(row) for row in self.rows if not row.ok]
        count = f"{len(self.rows) - len(failures)} of {len(self.rows)} derivatives of {self.function} are right"
        return "\n".join([*(line.rstrip() for line in lines), "", *failures, count])


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float) -> str:
        return "" if math.isnan(value) else f"{value:.1e}"

    left_out = f" of {row.compared + row.left_out}" if row.left_out else ""
    verdict = ("ok" if row.ok else "FAILED") + (f": {row.note}" if row.note else "")
    numbers = number(row.error), number(row.tolerance), number(row.largest)
    return row.kind, row.input, row.mode, row.dtype, *numbers, f"{row.compared}{left_out}", verdict
