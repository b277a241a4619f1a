"""Figures of a result file (extra `plot`): speed-up over peers, time against T, peak memory against T.

`pictures` says which figures a result gives, without drawing them, so that the tables can link to them and be
checked where matplotlib is missing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .ranking import EAGER, OURS, REFERENCE, Race, floor_ms, races, ratio, sweeps
from .results import DIRECTIONS, Result, Row

# Okabe and Ito's palette and three more, told apart by colour-blind readers; markers differ too. A peer that
# many ops have looks the same everywhere, others take what is left.
OUR_STYLES = {"triton": ("#0072b2", "o"), "torch": ("#56b4e9", "s")}
PEER_STYLES = {
    "flash-linear-attention": ("#d55e00", "^"),
    "transformers": ("#e69f00", "v"),
    "torch.compile": ("#009e73", "D"),
}
MORE_STYLES = (("#cc79a7", "P"), ("#5e3c99", "*"), ("#8c6d00", "X"), ("#000000", "p"), ("#b2182b", "h"))
EAGER_STYLE, REFERENCE_STYLE = ("#777777", "x"), ("#bbbbbb", "+")
Styles = dict[str, tuple[str, str]]
Lengths = dict[int, list[Race]]


@dataclass(frozen=True)
class Picture:
    """One figure to be: its op, its file, what it shows, and how it is drawn."""

    op: str
    file: str
    caption: str
    draw: Callable[[Path], None]


def pictures(result: Result, name: str) -> list[Picture]:
    """The figures of a result; `name` begins their file names."""
    where, found = result.environment.device_name, []
    by_op: dict[str, list[Race]] = {}
    for race in races(result.rows):
        if race.ours and (race.peers or race.eager):
            by_op.setdefault(race.op, []).append(race)
    for op, its in by_op.items():
        caption = f"{op}: how many times faster than each peer, on {where}"
        found.append(
            Picture(
                op, f"{name}_{op}_speedup.png", caption, partial(_speedup, its, _styles(result, op), caption)
            )
        )
    for (op, shape, dtype), lengths in sweeps(result.rows).items():
        styles = _styles(result, op)
        file = f"{name}_{op}_{shape.replace('T*', 'T')}_{dtype}"
        caption = f"{op}, {shape}, {dtype}: time against T, on {where}"
        found.append(
            Picture(op, f"{file}_time.png", caption, partial(_time, lengths, styles, result, caption))
        )
        if any(row.peak_bytes for at in lengths.values() for race in at for row in race.ranked):
            caption = f"{op}, {shape}, {dtype}: peak memory against T, on {where}"
            found.append(
                Picture(op, f"{file}_memory.png", caption, partial(_memory, lengths, styles, caption))
            )
    return found


def _speedup(its: list[Race], styles: Styles, title: str, path: Path) -> None:
    """Horizontal bars, one per peer, grouped by shape; a panel per direction."""
    plt = _pyplot()
    directions = _directions(its)
    panels = [[race for race in its if race.direction == d] for d in directions]
    lines = [[_bars(race) for race in panel] for panel in panels]
    tallest = max(sum(len(bars) + 0.8 for bars in panel) for panel in lines)
    figure, axes = _panels(plt, directions, 1.7 + 0.3 * tallest)
    for axis, panel, bars, direction in zip(axes, panels, lines, directions, strict=True):
        _draw_bars(axis, panel, bars, styles)
        axis.set(title=direction, xlabel="times faster than the peer (1: as fast; log axis)")
    used = {name for panel in lines for bars in panel for name, _ in bars}
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for n, (c, _) in styles.items() if n in used]
    names = [_label(n) for n in styles if n in used]
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    _finish(plt, figure, axes, title, path)


def _bars(race: Race) -> list[tuple[str, float]]:
    """Peer and speed-up over it, the closest peer first."""
    others = [*race.peers, *([race.eager] if race.eager else [])]
    return [(row.provider, ratio(row, race.ours) or 0.0) for row in others]


def _draw_bars(axis, panel: list[Race], lines: list[list[tuple[str, float]]], styles: Styles) -> None:
    y, ticks, most = 0.0, [], 1.0
    for bars in lines:
        ticks.append(y + (len(bars) - 1) / 2)
        for name, value in bars:
            axis.barh(
                y, value - 1, left=1, color=styles[name][0], height=0.8
            )  # from 1: faster right, slower left
            slower, text = value < 1, f"{value:.2f}" if value < 10 else f"{value:.0f}"
            place = {"xytext": (-4 if slower else 4, 0), "textcoords": "offset points", "va": "center"}
            axis.annotate(text, (value, y), ha="right" if slower else "left", fontsize=9, **place)
            y, most = y + 1, max(most, value, 1 / value)
        y += 0.8
    least = min([v for bars in lines for _, v in bars], default=1.0)
    axis.set_xscale("log")
    axis.set_xlim(min(0.8, least / 1.6), max(1.6, most * 1.8))
    _plain_ticks(axis.xaxis)
    axis.axvline(1, color="black", lw=0.8)
    axis.set_yticks(
        ticks, [f"{race.shape}\n{race.dtype}, {_label(race.ours.provider)}" for race in panel], fontsize=9
    )
    axis.set_ylim(y - 0.8, -0.8)  # the first on top


def _time(lengths: Lengths, styles: Styles, result: Result, title: str, path: Path) -> None:
    """Medians with their quantiles as bars, and the floor of this machine; a panel per direction."""

    def floors(direction: str) -> list[tuple[int, float]]:
        rows = {t: r for t, at in lengths.items() for r in _rows(at, direction)}
        points = [(t, floor_ms(row, result.roofline)) for t, row in rows.items()]
        return [(t, ms) for t, ms in points if ms]

    def draw(axis, direction: str) -> None:
        if points := floors(direction):
            axis.plot(
                *zip(*points, strict=True), color="black", ls="--", lw=1.2, label="floor of this machine"
            )

    _against_length(
        lengths, styles, title, path, "median time, ms (bars: 20 to 80 %)", lambda r: r.ms_p50, draw
    )


def _memory(lengths: Lengths, styles: Styles, title: str, path: Path) -> None:
    """Peak memory of each provider; a panel per direction."""
    _against_length(
        lengths, styles, title, path, "peak memory, MiB", lambda r: (r.peak_bytes or 0) / 2**20, None
    )


def _against_length(
    lengths: Lengths,
    styles: Styles,
    title: str,
    path: Path,
    what: str,
    value: Callable[[Row], float | None],
    below: Callable | None,
) -> None:
    plt = _pyplot()
    directions = _directions([race for at in lengths.values() for race in at])
    figure, axes = _panels(plt, directions, 5.2)
    for axis, direction in zip(axes, directions, strict=True):
        for name, (colour, marker) in styles.items():
            rows = {t: r for t, at in lengths.items() for r in _rows(at, direction) if r.provider == name}
            points = {t: value(r) for t, r in rows.items() if value(r)}
            if not points:
                continue
            heavy = {"lw": 2.4, "zorder": 3} if name in OURS else {"lw": 1.3}
            axis.plot(
                *zip(*points.items(), strict=True), color=colour, marker=marker, label=_label(name), **heavy
            )
            if below:
                ends = [(rows[t].ms_p20, rows[t].ms_p80) for t in points]
                axis.vlines(list(points), *zip(*ends, strict=True), color=colour, lw=4, alpha=0.35)
        if below:
            below(axis, direction)
        axis.set(title=direction, xscale="log", yscale="log", xlabel="T, tokens", ylabel=what)
        axis.set_xticks(list(lengths), [str(t) for t in lengths])
        axis.xaxis.minorticks_off()
        _plain_ticks(axis.yaxis)
        axis.grid(alpha=0.25)
    handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    _finish(plt, figure, axes, title, path)


def _directions(its: list[Race]) -> list[str]:
    return [d for d in DIRECTIONS if any(race.direction == d and race.ranked for race in its)]


def _panels(plt, directions: list[str], height: float):
    count = len(directions)
    figure, axes = plt.subplots(
        1, count, figsize=(3 + 5 * count, height), squeeze=False, layout="constrained"
    )
    return figure, axes[0]


def _plain_ticks(axis) -> None:
    """1, 2, 5 in every decade of a log axis, in plain numbers."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(
        _pyplot().matplotlib.ticker.LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,))
    )
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")


def _rows(at: list[Race], direction: str) -> list[Row]:
    return [row for race in at if race.direction == direction for row in race.ranked]


def _styles(result: Result, op: str) -> Styles:
    """Colour and marker of every provider of an op that came out right somewhere, ours first."""
    names = sorted({row.provider for row in result.rows if row.status == "ok" and row.op == op})
    known = {**OUR_STYLES, **PEER_STYLES}
    styles = {n: style for n, style in known.items() if n in names}
    rest = [n for n in names if n not in (*known, *EAGER, REFERENCE)]
    styles |= {n: MORE_STYLES[i % len(MORE_STYLES)] for i, n in enumerate(rest)}
    styles |= {n: EAGER_STYLE for n in EAGER if n in names}
    return styles | ({REFERENCE: REFERENCE_STYLE} if REFERENCE in names else {})


def _label(provider: str) -> str:
    return f"ours, {provider}" if provider in (*OURS, REFERENCE) else provider


def _pyplot():
    try:
        import matplotlib

        matplotlib.use("Agg")  # writes files and needs no screen
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"report: expected matplotlib to be installed, got: {error}. "
            'Install the extra it belongs to: `pip install "prism-kernels[plot]"`.'
        ) from error
    return plt


def _finish(plt, figure, axes, title: str, path: Path) -> None:
    figure.suptitle(title)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})  # without versions: bytes that repeat
    plt.close(figure)
