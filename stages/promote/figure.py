"""Draw quality against size: each candidate's KL to the teacher over its megabytes, the Pareto line, the champion.

Labels are placed greedily where they cover neither a point nor another label. Colors are Okabe and Ito's, which color-
blind readers can distinguish; shapes differ as well. Needs no display.
"""

import io
import math
from collections.abc import Sequence
from itertools import cycle, product
from typing import Any

from stages.candidates import NOT_DERIVED
from stages.formats.report import Report, ReportedCandidate

__all__ = ["draw_quality_against_size", "find_pareto"]

BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#E69F00", "#009E73", "#666666"
PURPLE, SKY, VERMILION = "#CC79A7", "#56B4E9", "#D55E00"
SERIES = ((BLUE, "o"), (ORANGE, "s"), (PURPLE, "^"), (SKY, "D"), (VERMILION, "v"))
"""Color and marker of each kind of candidate, those that were derived from no other one first."""
RADII_POINTS = (9, 16, 26, 40, 58, 80, 105)
"""How far from its point a label may stand; the nearest free place wins, and far ones get a thin line."""
ANGLES_DEGREES = (0, 180, 30, -30, 150, -150, 60, -60, 120, -120, 90, -90)
"""In which direction, best first."""


def find_pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other beats in both coordinates (smaller is better), by the first."""
    order = sorted(range(len(points)), key=lambda index: points[index])
    best, kept = float("inf"), []
    for index in order:
        if points[index][1] < best:
            best = points[index][1]
            kept.append(index)
    return kept


def draw_quality_against_size(report: Report) -> bytes:
    """Return the figure of a report as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    teacher = report.reference
    shown = [c for c in report.candidates if c.name != teacher]
    points = [(c.metrics["final/size_bytes"] / 1e6, c.metrics["final/kl_to_teacher"]) for c in shown]
    _draw_points(axes, report, shown, points)
    _set_scales(axes, [c.metrics["final/size_bytes"] / 1e6 for c in report.candidates], [y for _, y in points])
    for candidate in report.candidates:
        if candidate.name == teacher:
            size = candidate.metrics["final/size_bytes"] / 1e6
            axes.axvline(size, color=GRAY, linestyle=":", linewidth=1, label=f"teacher, {size:.3g} MB (KL 0)")
    axes.set_xlabel("weights on disk, MB")
    axes.set_ylabel("KL(teacher ‖ candidate), nats per token")
    axes.set_title(f"{report.verdict.registered_name}: quality against size (lower left is better)", fontsize=11)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if report.candidates:
        figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    _place_labels(figure, axes, [c.name for c in shown], points, report.verdict.champion)
    sink = io.BytesIO()
    # Without the program's version and date equal reports give equal bytes.
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def _draw_points(
    axes: Any, report: Report, shown: Sequence[ReportedCandidate], points: Sequence[tuple[float, float]]
) -> None:
    """Draw one series for each kind of candidate, the champion's ring, intervals, and the Pareto line."""
    pareto = [points[index] for index in find_pareto(points)]
    if len(pareto) > 1:
        axes.plot(*zip(*pareto, strict=True), color=GRAY, linewidth=1, linestyle="--", zorder=1, label="Pareto line")
    kinds = dict.fromkeys([NOT_DERIVED, *(candidate.kind for candidate in shown)])
    for kind, (color, marker) in zip(kinds, cycle(SERIES), strict=False):
        own = [i for i, candidate in enumerate(shown) if candidate.kind == kind]
        if not own:
            continue
        xs, ys = zip(*(points[i] for i in own), strict=True)
        lows, highs = zip(*(shown[i].intervals["final/kl_to_teacher"] for i in own), strict=True)
        errors = [
            [max(0.0, y - low) for y, low in zip(ys, lows, strict=True)],
            [max(0.0, high - y) for y, high in zip(ys, highs, strict=True)],
        ]
        axes.errorbar(xs, ys, yerr=errors, fmt="none", ecolor=color, elinewidth=1, alpha=0.6, zorder=2)
        label = "student" if kind == NOT_DERIVED else kind
        axes.scatter(xs, ys, s=44, color=color, marker=marker, edgecolors="white", zorder=3, label=label)
    champion = [points[i] for i, c in enumerate(shown) if c.name == report.verdict.champion]
    if champion:
        ring = {"facecolors": "none", "edgecolors": GREEN, "linewidths": 2.2}
        axes.scatter(*zip(*champion, strict=True), s=190, zorder=4, label="champion", **ring)


def _set_scales(axes: Any, sizes: Sequence[float], divergences: Sequence[float]) -> None:
    """Use a logarithmic axis where values span more than a factor of 5, with plain numbers at its ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    for values, axis, set_scale in ((sizes, axes.xaxis, axes.set_xscale), (divergences, axes.yaxis, axes.set_yscale)):
        if values and min(values) > 0 and max(values) > 5 * min(values):
            set_scale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_formatter(NullFormatter())
        else:
            axis.set_major_locator(MaxNLocator(6))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.margins(0.18)


def _place_labels(
    figure: Any, axes: Any, names: Sequence[str], points: Sequence[tuple[float, float]], champion: str | None
) -> None:
    """Write each name beside its point, where it covers no point and no other name, inside of the axes."""
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    pixels = axes.transData.transform(points) if points else []
    taken: list[Any] = []
    for name, point in sorted(zip(names, points, strict=True), key=lambda pair: (pair[0] != champion, -pair[1][1])):
        best: tuple[int, Any, Any] | None = None
        radii = RADII_POINTS[1:] if name == champion else RADII_POINTS  # clear of its ring
        for radius, angle in product(radii, ANGLES_DEGREES):
            label, box = _write_label(axes, name, point, radius=radius, angle=angle, bold=name == champion)
            cost = 3 * sum(box.overlaps(other) for other in taken)
            cost += sum(box.padded(5).contains(x, y) for x, y in pixels)
            cost += 2 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, label, box)
            else:
                label.remove()
            if cost == 0:
                break
        assert best is not None
        taken.append(best[2])


def _write_label(axes: Any, name: str, point: tuple[float, float], *, radius: float, angle: float, bold: bool) -> Any:
    """Write a name at a distance from its point; return the label and the box of its text in pixels."""
    from matplotlib.text import Text

    dx, dy = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
    label = axes.annotate(
        name,
        point,
        xytext=(dx, dy),
        textcoords="offset points",
        ha="center" if abs(dx) < 1 else "left" if dx > 0 else "right",
        va="center" if abs(dy) < 1 else "bottom" if dy > 0 else "top",
        fontsize=8,
        fontweight="bold" if bold else "normal",
        arrowprops={"arrowstyle": "-", "color": GRAY, "linewidth": 0.6} if radius > RADII_POINTS[1] else None,
    )
    label.set_in_layout(False)
    label.update_positions(axes.figure.canvas.get_renderer())
    return label, Text.get_window_extent(label)  # an annotation's own extent would count its line as well
