"""Tables and a plot of accuracy.py's rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

QUANTITIES = ("y", "mean", "variance", "dx", "dscale", "doffset")
NAMES = {
    "tfops": "tfops",
    "tf": "TensorFlow's fused op",
    "tf_jit": "the same, jit_compile",
    "keras": "Keras' layer",
    "keras_jit": "the same, jit_compile",
    "torch": "PyTorch",
}
_UNITS = {
    "y": "y, in |scale| + |offset| + 1",
    "mean": "mean, in deviations",
    "variance": "variance, relative",
    "dx": "dx, in |scale| / std x mean of |dy|",
    "dscale": "dscale, in the sum of |dy| (1 + |xhat|)",
    "doffset": "doffset, in the sum of |dy|",
}

Row = dict[str, Any]


def _bound_table(rows: list[Row]) -> list[str]:
    """The largest error of tfops as a part of its bound, by type, and where."""
    lines = ["| device | dtype | " + " | ".join(QUANTITIES) + " |", "|---|---|" + "---|" * len(QUANTITIES)]
    for device in dict.fromkeys(row["device"] for row in rows):
        for dtype in dict.fromkeys(row["dtype"] for row in rows):
            mine = [r for r in rows if (r["device"], r["dtype"], r["peer"]) == (device, dtype, "tfops")]
            if not mine:
                continue
            cells = []
            for name in QUANTITIES:
                worst = max(mine, key=lambda row, name=name: row["of_bound"][name])
                cells.append(f"{worst['of_bound'][name]:.2g} ({worst['case']})")
            lines.append(f"| {device} | {dtype} | " + " | ".join(cells) + " |")
    return lines


def _error_table(rows: list[Row]) -> list[str]:
    peers = [peer for peer in NAMES if any(row["peer"] == peer for row in rows)]
    header = [f"{NAMES[peer]}" if not peer.endswith("_jit") else f"{peer[:-4]}, jit_compile" for peer in peers]
    lines = ["| layout | case | " + " | ".join(header) + " |", "|---|---|" + "---|" * len(peers)]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        e = row["errors"]
        text = " ".join("." if e[name] == 0 else f"{e[name]:.0e}" for name in ("y", "variance", "dx"))
        cells.setdefault((row["layout"], row["case"]), {})[row["peer"]] = text
    for (layout, case), by_peer in cells.items():
        lines.append(f"| {layout} | {case} | " + " | ".join(by_peer.get(peer, "") for peer in peers) + " |")
    return lines


def _fused_table(rows: list[Row]) -> list[str]:
    peers = [peer for peer in NAMES if any(row["peer"] == peer for row in rows)]
    header = [NAMES[peer] if not peer.endswith("_jit") else f"{peer[:-4]}, jit_compile" for peer in peers]
    lines = ["| device | dtype | followed by | " + " | ".join(header) + " |", "|---|---|---|" + "---|" * len(peers)]
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        text = " ".join(f"{row['errors'][name]:.0e}" for name in ("dscale", "doffset"))
        followed_by = {"fused, relu": "ReLU", "fused, add_relu": "addition, ReLU"}[row["case"]]
        cells.setdefault((row["device"], row["dtype"], followed_by), {})[row["peer"]] = text
    for key, by_peer in sorted(cells.items()):
        lines.append(f"| {' | '.join(key)} | " + " | ".join(by_peer.get(peer, "") for peer in peers) + " |")
    return lines


def markdown(rows: list[Row]) -> str:
    fused = [row for row in rows if row["case"].startswith("fused")]
    rows = [row for row in rows if not row["case"].startswith("fused")]
    peers, kinds = list(NAMES), ["ratio", "constant", "outliers", "small", "large", "many"]

    def order(row: Row) -> tuple:
        kind = kinds.index(row["case"].split()[0].rstrip(","))
        return row["device"], row["dtype"], row["layout"] != "NHWC", kind, row["case"], peers.index(row["peer"])

    rows = sorted(rows, key=order)
    lines = [
        "# Accuracy",
        "",
        "Made by `benchmarks/accuracy.py`, which says what the cases are; all of the errors are in `accuracy.json`.",
        "",
        "## tfops: the largest error, 1 being the bound",
        "",
        *_bound_table(rows),
    ]
    if fused:
        lines += [
            "",
            "## 16-bit types, with ReLU: the largest error of dscale and doffset",
            "",
            "Relative to the largest of all channels, with 64x56x56x24 normal numbers (`accuracy_fused.py`). tfops has "
            "the addition and ReLU in the op. The others round what they add to 16 bits, and the sum: near 0 ReLU gets "
            "whole elements wrong.",
            "",
            *_fused_table(fused),
        ]
    for device in dict.fromkeys(row["device"] for row in rows):
        for dtype in dict.fromkeys(row["dtype"] for row in rows):
            some = [row for row in rows if (row["device"], row["dtype"]) == (device, dtype)]
            if some:
                title = f"## {dtype}, {device}: the largest error of y, variance and dx"
                lines += ["", title, "", "A point is no error at all, inf one of NaN or Inf.", "", *_error_table(some)]
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Errors over |mean| / std, float32, channels last."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "tfops", "svg.fonttype": "none"})
    from matplotlib import pyplot

    rows = [row for row in rows if row["ratio"] and row["dtype"] == "float32" and row["layout"] == "NHWC"]
    rows = [row for row in rows if row["case"].startswith("ratio")]
    if not rows:
        return
    device = rows[0]["device"]
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6.2), sharex=True, layout="constrained")
    styles = {
        "tfops": ("tab:red", "-", "o", 2.0),
        "tf": ("tab:blue", "-", "s", 1.0),
        "tf_jit": ("tab:blue", ":", "s", 1.0),
        "keras": ("tab:green", "-", "^", 1.0),
        "keras_jit": ("tab:green", ":", "^", 1.0),
        "torch": ("tab:gray", "-", "D", 1.0),
    }
    for name, axis in zip(QUANTITIES, axes.flat, strict=True):
        for peer, (color, line, marker, width) in styles.items():
            mine = sorted((r for r in rows if r["peer"] == peer and r["device"] == device), key=lambda r: r["ratio"])
            label = NAMES[peer] if not peer.endswith("_jit") else f"{NAMES[peer[:-4]]}, jit_compile"
            ratios, values = [r["ratio"] for r in mine], [r["errors"][name] for r in mine]
            values = [max(min(value, 1e3), 1e-9) for value in values]
            axis.loglog(ratios, values, line, c=color, marker=marker, ms=4, lw=width, label=label)
        axis.set_title(_UNITS[name], fontsize=9)
        axis.grid(alpha=0.3)
    tfops = sorted((r for r in rows if r["peer"] == "tfops" and r["device"] == device), key=lambda r: r["ratio"])
    for name, axis in zip(QUANTITIES, axes.flat, strict=True):
        ratios, bounds = [r["ratio"] for r in tfops], [r["bound"][name] for r in tfops]
        axis.loglog(ratios, bounds, "--", c="tab:red", lw=0.8, label="tfops' bound")
        axis.minorticks_off()
    for axis in axes[1]:
        axis.set_xlabel("|mean| / standard deviation")
    figure.suptitle(f"Largest error in float32, training, {device.upper()}", fontsize=11)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
