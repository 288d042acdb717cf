"""What counted bytes and a stated bandwidth say, without a GPU: a prediction, and labelled so."""

from __future__ import annotations

from typing import Any

from problems import Cell

from .cells import moved_bytes, to_layout

LAUNCH_SECONDS = 2.5e-6  # what one launch inside a graph costs
COPY_BYTES_PER_SECOND = 4.3e12  # an H200's device-to-device copy, read + written


def predict(cell: Cell) -> dict[str, Any]:
    """A cell's row: the bytes of its tier's passes at the copy's rate, and its launches."""
    import tfops_kernels

    shape, axis = to_layout(cell)
    plan = tfops_kernels.cuda_plan(
        shape,
        axis=axis,
        dtype=cell.dtype,
        backward=cell.what == "backward",
        residual=cell.variant == "add_relu",
        training=cell.what != "inference",
        activation=None if cell.variant == "plain" else "relu",
    )
    moved = moved_bytes(cell, plan.read_again)
    seconds = plan.launches * LAUNCH_SECONDS + moved / COPY_BYTES_PER_SECOND
    rate = cell.least_bytes / seconds
    return {
        **cell._asdict(),
        "tier": plan.tier,
        "launches": plan.launches,
        "waves": plan.waves,
        "policy_seconds": plan.nanoseconds / 1e9,
        "moved_bytes": moved,
        "least_bytes": cell.least_bytes,
        "seconds": seconds,
        "bytes_per_second": rate,
        "of_copy": rate / COPY_BYTES_PER_SECOND,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line for each cell. The last columns: waves of blocks, and the estimate that the policy chose by."""
    copy, launch = COPY_BYTES_PER_SECOND / 1e12, LAUNCH_SECONDS * 1e6
    names = ("network", "shape", "layout", "dtype", "variant", "pass", "us", "GB/s", "of copy", "tier")
    names += ("waves", "policy us")
    lines = [f"## PREDICTION, not measured: an H200 that copies {copy:.1f} TB/s, {launch} us a launch", ""]
    lines += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        values = [row["network"], "x".join(map(str, row["shape"])), row["layout"], row["dtype"], row["variant"]]
        values += [row["what"], f"{row['seconds'] * 1e6:.1f}", f"{row['bytes_per_second'] / 1e9:.0f}"]
        values += [f"{row['of_copy']:.2f}", row["tier"], str(row["waves"]), f"{row['policy_seconds'] * 1e6:.1f}"]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"
