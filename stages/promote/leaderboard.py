"""The leaderboard: rows of cells out of `report.json`, shared by the terminal and Markdown. Light: plain Python.

Order: the champion, then candidates that keep every limit (smallest first), then the others (closest to the teacher
first), then the teacher, then rows that are no candidates. Columns of which nothing is known are left out; a cell
that is not known is a dash.
"""

from stages.formats.metrics import PRIMARY_METRIC, UNKNOWN, known_columns
from stages.formats.report import Report, ReportedCandidate

__all__ = ["CHAMPION_MARK", "leaderboard", "write_markdown"]

CHAMPION_MARK = "★"
NO_CANDIDATE = "reference"
"""In the last column of a row that is no candidate."""


def leaderboard(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return the headers and the rows of a report's table; the first cell of a row begins with the candidate's name."""
    candidates = sorted(report.candidates, key=lambda candidate: _rank(report, candidate))
    columns = known_columns(candidate.metrics for candidate in candidates)
    serving = any(candidate.served_by for candidate in candidates)
    rows = []
    for candidate in candidates:
        mark = f" {CHAMPION_MARK}" if candidate.name == report.verdict.champion else ""
        cells = [metric.cell(candidate.metrics) for metric in columns]
        served = [candidate.params.get("served_by", UNKNOWN)] if serving else []
        rows.append([candidate.name + mark, *cells, *served, _limits_kept(report, candidate.name)])
    names = ["served by"] if serving else []
    for row in report.references:
        cells = [metric.cell(row.metrics) for metric in columns]
        rows.append([f"({row.name})", *cells, *([UNKNOWN] if serving else []), NO_CANDIDATE])
    return ["candidate", *(metric.label for metric in columns), *names, "limits kept"], rows


def _rank(report: Report, candidate: ReportedCandidate) -> tuple[int, float, str]:
    name, metrics = candidate.name, candidate.metrics
    checks = report.verdict.checks.get(name)
    if name == report.verdict.champion:
        return 0, 0.0, name
    if checks is None:
        return 3, 0.0, name
    if checks and all(check.passed for check in checks) and name not in report.verdict.beaten_by:
        return 1, metrics["final/size_bytes"], name
    return 2, metrics[PRIMARY_METRIC], name


def _limits_kept(report: Report, name: str) -> str:
    checks = report.verdict.checks.get(name)
    if checks is None:
        return "teacher"
    if name in report.verdict.beaten_by:
        return "beaten"
    return f"{sum(check.passed for check in checks)} of {len(checks)}" if checks else "no limits"


def write_markdown(report: Report) -> str:
    """Return `leaderboard.md`: the verdict, warnings, the claim, the table, the limits, and what the figures mean."""
    headers, rows = leaderboard(report)
    verdict = report.verdict
    lines = [f"# {verdict.registered_name}: {verdict.outcome}", ""]
    lines += [f"- {reason}" for reason in verdict.reasons]
    lines += [f"- {claim.text}" for claim in verdict.claims]
    lines += [f"- **Warning**: {warning}" for warning in verdict.warnings]
    lines += ["", _row(headers), _row(["---", *["---:"] * (len(headers) - 1)])]
    lines += [_row([f"**{cell}**" for cell in row] if CHAMPION_MARK in row[0] else row) for row in rows]
    lines += ["", "![Quality against size](quality-size.png)", ""]
    if any(verdict.checks.values()):
        lines += ["## Limits", ""]
    for name, checks in verdict.checks.items():
        if checks:
            lines += [f"**{name}**", ""]
            lines += [f"- {'kept' if check.passed else '**not kept**'}: {check.text}" for check in checks]
            lines += [""]
    return "\n".join([*lines, *_serving(report), *_legend(report), ""])


def _serving(report: Report) -> list[str]:
    """Return who serves each candidate and why not, and how fast batches are, where that is known."""
    if not any(candidate.served_by for candidate in report.candidates):
        return []
    lines = ["## Who serves it", ""]
    for candidate in report.candidates:
        if candidate.served_by:
            lines += [f"**{candidate.name}**", ""]
            lines += [f"- {runtime}: {text}" for runtime, text in candidate.served_by.items()]
            batches = candidate.speed_by_batch.items()
            lines += [f"- {speed:,.0f} tokens/s with {size} sequences at once" for size, speed in batches]
            lines += [""]
    return lines


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _legend(report: Report) -> list[str]:
    lines = [
        "## What the figures mean",
        "",
        f"- Quality: {report.tokens:,} tokens of {report.documents:,} documents of the {report.split} split, worth "
        f"{report.effective_documents:.1f} documents of equal length, computed in {report.dtype}. "
        "KL in nats per token, from the teacher (or from the base that it was derived from) to the candidate.",
        "- Intervals: 95 %, over documents (random halves of them). A limit is kept if the unfavorable end keeps it, "
        "with "
        "Holm's correction for the number of candidates.",
        f"- A true difference of {report.minimum_detectable_nats:.2g} nats per token between any candidate and the "
        "teacher "
        "would be shown in 80 % of cases; smaller ones may stay unseen.",
        "- Size: bytes of the weights on disk; bits/weight: these over the architecture's parameters, of everything "
        "that "
        "is stored. x smaller: against the teacher in 16 bits a weight. MB: 10⁶ bytes.",
    ]
    if report.verdict.beaten_by:
        lines.append("- Beaten: another candidate is both smaller and closer to the teacher.")
    lines += [f"- ({row.name}): for reference, not a candidate: {row.text}." for row in report.references]
    reasons = {text for candidate in report.candidates for text in candidate.notes.values()}
    return lines + [f"- {UNKNOWN}: not measured ({reason})." for reason in sorted(reasons)]
