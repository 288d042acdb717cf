"""What cpu.py makes of its medians: bytes a second, ratios, geometric means beside their aims, a table and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from problems import BYTES, Cell

PEERS = {
    "tf_onednn": "TensorFlow",
    "tf_eigen": "TensorFlow, oneDNN off",
    "keras": "Keras",
    "keras_jit": "Keras, jit",
    "torch": "PyTorch",
}
PASSES = {
    "forward": "forward",
    "backward": "backward",
    "inference": "inference",
    "forward_backward": "forward + backward",
}
NOISE = 0.95  # a ratio not below this counts as no loss
DISTURBED = 0.05  # cores that other programs and the machine's host kept busy meanwhile
OF_COPY = 0.85  # the aim for tensors larger than the last-level cache

Row = dict[str, Any]


class Aim(NamedTuple):
    """A geometric mean of ratios over forward + backward of some problems."""

    text: str
    peer: str
    aim: float | None  # None: only to be shown
    rows: Callable[[Row], bool]


def _vectors(row: Row) -> bool:
    return row["shape"][-1] % 16 == 0


def _fused(dtypes: tuple[str, ...], whole: bool | None) -> Callable[[Row], bool]:
    def plain(row: Row) -> bool:
        return row["variant"] == "plain" and row["dtype"] in dtypes and whole in (None, _vectors(row))

    return plain


def _aims() -> Iterator[Aim]:
    wide = ("float32", "bfloat16")
    for peer, name, aims in (
        ("tf_onednn", "TensorFlow's fused op", (1.5, 3.0, 4.0, 2.0)),
        ("tf_eigen", "the same, oneDNN off", (None,) * 4),
    ):
        yield Aim(f"{name}: float32 and bfloat16, C % 16 == 0", peer, aims[0], _fused(wide, True))
        yield Aim(f"{name}: float32 and bfloat16, other C", peer, aims[1], _fused(wide, False))
        yield Aim(f"{name}: float16", peer, aims[2], _fused(("float16",), None))
        yield Aim(f"{name}, + ReLU", peer, None, lambda row: row["variant"] == "relu")
        yield Aim(f"{name}, + add + ReLU", peer, aims[3], lambda row: row["variant"] == "add_relu")
    yield Aim("Keras' layer in tf.function", "keras", 4.0, lambda row: True)
    yield Aim("Keras' layer, jit_compile=True", "keras_jit", 4.0, lambda row: True)
    yield Aim("PyTorch", "torch", 1.5, lambda row: True)


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def cell_of(row: Row, what: str) -> Cell:
    return Cell(row["network"], tuple(row["shape"]), row["layout"], row["dtype"], row["variant"], what)


def derive(report: dict[str, Any]) -> None:
    """Adds to a report what follows from its times: memory's rates, and each pass' rate, regime and ratios."""
    for rate in ("copy_bytes_per_second", "read_bytes_per_second"):
        rates = [row[rate] for row in report["rows"] if rate in row]
        report[rate] = statistics.median(rates) if rates else None
    cache = report["last_level_cache_bytes"]
    for row in report["rows"]:
        copy, read = (row.get(rate, report[rate]) for rate in ("copy_bytes_per_second", "read_bytes_per_second"))
        for what, measured in row["passes"].items():
            cell = cell_of(row, what)
            peers = measured["peers"]
            ours = peers["tfops"]["us"][1]
            measured["gb_per_second"] = round(cell.streamed_bytes / ours / 1e3, 2)
            # cached: all that the pass touches fits the last-level cache; streamed: x alone does not.
            footprint = cell.least_bytes if what != "forward_backward" else cell._replace(what="backward").least_bytes
            measured["regime"] = "cached" if footprint <= cache else "streamed" if cell.tensor_bytes > cache else ""
            measured["of_copy"] = round(cell.streamed_bytes / ours * 1e6 / copy, 3)
            # What is written is copied from as much that is read; the rest is read alone.
            copied = 2 * cell.written_bytes
            if read:
                seconds = copied / copy + max(cell.streamed_bytes - copied, 0) / read
                measured["of_memory"] = round(seconds / ours * 1e6, 3)
            measured["ratios"] = {
                peer: round(value["us"][1] / ours, 3) for peer, value in peers.items() if peer != "tfops"
            }
            measured["best_peer"] = min(measured["ratios"], key=measured["ratios"].get, default=None)


def title(row: Row, what: str) -> str:
    shape = "x".join(map(str, row["shape"]))
    return f"{row['network']} {shape} {row['layout']} {row['dtype']} {row['variant']} {PASSES[what]}"


def markdown_table(names: list[str], lines: Iterable[Iterable[str]]) -> list[str]:
    body = ["| " + " | ".join(line) + " |" for line in lines]
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names), *body, ""]


def _mean_over(rows: list[Row], aim: Aim) -> tuple[float | None, int]:
    ratios = [
        row["passes"]["forward_backward"]["ratios"][aim.peer]
        for row in rows
        if aim.rows(row) and aim.peer in row["passes"].get("forward_backward", {}).get("ratios", {})
    ]
    return (geometric_mean(ratios) if ratios else None), len(ratios)


def summary(report: dict[str, Any]) -> list[str]:
    """Lines of Markdown: means and aims, cells that lose, cells below their share of the copy."""
    rows = report["rows"]
    lines = ["Forward + backward, time of the peer / time of tfops, geometric mean over problems:", ""]
    body = []
    for aim in _aims():
        means = []
        for layout in ("NHWC", "NCHW"):
            mean, count = _mean_over([row for row in rows if row["layout"] == layout], aim)
            means.append((mean, count))
        if all(mean is None for mean, _ in means):
            continue
        reached = all(mean >= aim.aim for mean, _ in means if mean is not None) if aim.aim else None
        body.append(
            [aim.text]
            + ["" if mean is None else f"{mean:.2f} ({count})" for mean, count in means]
            + [f"{aim.aim:g}" if aim.aim else "", {True: "yes", False: "**no**", None: ""}[reached]]
        )
    lines += markdown_table(["against", "channels last (problems)", "NCHW (problems)", "aim", "reached"], body)

    cells = [(row, what, measured) for row in rows for what, measured in row["passes"].items() if measured["ratios"]]
    losses = []
    for row, what, measured in cells:
        best = measured["best_peer"]
        if measured["ratios"][best] < NOISE:
            losses.append(
                (measured["ratios"][best], f"{title(row, what)}: {measured['ratios'][best]:.2f}, {PEERS[best]}")
            )
    lines += [f"Cells below {NOISE} of the best peer: {len(losses)} of {len(cells)}.", ""]
    lines += [f"- {text}" for _, text in sorted(losses)] + [""] * bool(losses)

    lines += streamed_passes(rows)
    disturbed = sum(row["others"] > DISTURBED for row in rows)
    if disturbed:
        lines += [
            "",
            f"While {disturbed} of {len(rows)} problems were timed, other programs had more than {DISTURBED} cores.",
        ]
    absent = sorted({(peer, row["dtype"], reason) for row in rows for peer, reason in row["absent"].items()})
    if absent:
        lines += ["", "Absent:", "", *(f"- {PEERS[peer]}, {dtype}: {reason}" for peer, dtype, reason in absent), ""]
    return lines


def streamed_passes(rows: list[Row]) -> list[str]:
    """Lines of Markdown: how near passes over large tensors come to what memory gives, and which do not."""
    streamed = [
        (measured["of_copy"], what, title(row, what), measured)
        for row in rows
        for what, measured in row["passes"].items()
        if measured["regime"] == "streamed" and what != "forward_backward"
    ]
    if not streamed:
        return []
    body = []
    for what in dict.fromkeys(what for _, what, _, _ in streamed):
        shares = [[m[of] for _, w, _, m in streamed if w == what and of in m] for of in ("of_copy", "of_memory")]
        body.append([PASSES[what], str(len(shares[0]))])
        body[-1] += [f"{f(share):.2f}" if share else "" for share in shares for f in (statistics.median, min)]
    names = ["pass", "number", "of the copy's rate", "at least", "of what memory takes", "at least"]
    lines = ["Tensors larger than the last-level cache, in the median:", "", *markdown_table(names, body)]
    lines += [
        "The copy was measured beside each problem. What memory takes is the copy's time for as many bytes as are "
        "written, and as many that are read, and that of reading for the others.",
        "",
    ]
    below = sorted(cell for cell in streamed if cell[0] < OF_COPY)
    lines += [f"Below {OF_COPY} of the copy: {len(below)} of {len(streamed)}.", ""]
    for share, _, name, measured in below:
        lines.append(f"- {name}: {share:.2f}" + (f", {measured['of_memory']:.2f}" if "of_memory" in measured else ""))
    return lines + [""] * bool(below)


def heading(report: dict[str, Any]) -> str:
    return f"{report['cpu']}, {report['threads']} threads, {report['instruction_set']}, {report['date']}"


def text(report: dict[str, Any]) -> str:
    """The report as Markdown: what ran where, summary, a line for each problem."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    read = f", reading {report['read_bytes_per_second'] / 1e9:.1f} GB/s" if report["read_bytes_per_second"] else ""
    lines = [
        f"## {heading(report)}",
        "",
        f"{versions}. Streaming copy {report['copy_bytes_per_second'] / 1e9:.1f} GB/s (read + written){read}, "
        f"last-level cache {report['last_level_cache_bytes'] / 2**20:.0f} MiB.",
        "",
        *summary(report),
        "Milliseconds of tfops; GB/s on the least passes, and as a fraction of the copy where x exceeds the last-level "
        "cache; time of the best peer / time of tfops.",
        "",
    ]
    passes = [what for what in PASSES if any(what in row["passes"] for row in report["rows"])]
    names = ["network", "shape", "layout", "dtype", "variant"]
    for what in passes:
        names += [f"{PASSES[what]}, ms", "GB/s", "best peer"]
    body = []
    for row in report["rows"]:
        line = [row["network"], "x".join(map(str, row["shape"])), row["layout"], row["dtype"], row["variant"]]
        for what in passes:
            measured = row["passes"].get(what)
            if not measured:
                line += [""] * 3
                continue
            share = {"streamed": f" ({measured['of_copy']:.2f})", "cached": " cached", "": ""}[measured["regime"]]
            best = measured["best_peer"]
            line += [
                f"{measured['peers']['tfops']['us'][1] / 1e3:.3g}",
                f"{measured['gb_per_second']:.0f}{share}",
                f"{measured['ratios'][best]:.2f} {PEERS[best]}" if best else "",
            ]
        body.append(line)
    return "\n".join([*lines, *markdown_table(names, body)])


def plot(report: dict[str, Any], out: Path) -> str | None:
    """Writes out.svg and out.png: channels-last problems, a dot each, and means. Returns why not, if it cannot."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "tfops"  # the same file for the same numbers
    from matplotlib import pyplot

    titles = {"plain": "batch norm", "add_relu": "batch norm + add + ReLU"}
    rows = [row for row in report["rows"] if row["layout"] == "NHWC" and row["variant"] in titles]
    if not rows:
        return "no plot: it shows channels-last data, plain and add_relu"
    variants = {variant: title for variant, title in titles.items() if any(row["variant"] == variant for row in rows)}
    dtypes = sorted({row["dtype"] for row in rows}, key=list(BYTES).index)
    figure, axes = pyplot.subplots(
        len(variants),
        len(PASSES),
        figsize=(16, 1 + 3.5 * len(variants)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    colors = dict(zip(PEERS, ("#e69f00", "#b8860b", "#0072b2", "#56b4e9", "#d55e00"), strict=True))
    for line, (variant, variant_title) in zip(axes, variants.items(), strict=True):
        for axis, (what, pass_title) in zip(line, PASSES.items(), strict=True):
            axis.axhline(1, color="black", linewidth=1)
            axis.set_yscale("log")
            axis.grid(axis="y", which="both", color="#e8e8e8")
            axis.set_axisbelow(True)
            axis.set_title(f"{variant_title}, {pass_title}", fontsize=10)
            axis.set_xticks(range(len(dtypes)), dtypes)
            for i, dtype in enumerate(dtypes):
                for j, peer in enumerate(PEERS):
                    ratios = [
                        row["passes"][what]["ratios"][peer]
                        for row in rows
                        if (row["dtype"], row["variant"]) == (dtype, variant)
                        and peer in row["passes"].get(what, {}).get("ratios", {})
                    ]
                    if ratios:
                        x = i + (j - (len(PEERS) - 1) / 2) * 0.16
                        axis.plot([x] * len(ratios), ratios, "o", color=colors[peer], markersize=3, alpha=0.45, mew=0)
                        axis.plot(x, geometric_mean(ratios), "_", color=colors[peer], markersize=13, mew=3)
    for axis in axes[:, 0]:
        axis.set_ylabel("time of the peer / time of tfops")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    handles = [pyplot.Line2D([], [], color=colors[peer], marker="o", linestyle="") for peer in PEERS]
    figure.legend(handles, PEERS.values(), loc="outside lower center", ncols=len(PEERS), frameon=False)
    figure.suptitle(
        f"{report['cpu']}, {report['threads']} threads: channels last, a dot a problem, bars geometric means"
    )
    figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(out.with_suffix(".png"), dpi=110)
    pyplot.close(figure)
    return None
