"""The EMA update alone, relative to one ``_foreach_lerp_`` on lists that are ready."""

import report
from averages import BASE, UPDATES
from harness import race_updates
from shapes import describe
from timing import quartiles, ratios

TEXT = (
    "Median [quartiles] of the time per update; the first row is 1. Every row has averaged at "
    "every timed call (checked)."
)


def run(bench):
    columns = {describe(name, bench.quick): _column(bench, name) for name in bench.models}
    header, rows = report.by_row("update alone", columns)
    yield report.table("EMA update", TEXT, header, rows)


def _column(bench, name):
    return ratio_cells(race_updates(bench, name, bench.model(name), UPDATES))


def ratio_cells(results, base=BASE):
    """Cells for the times of all groups of rows; the base's says what 1 is."""
    cells = {base: ""}
    for times in results:
        cells |= {name: report.ratio(value) for name, value in ratios(times, base).items()}
    together = [taken for times in results for taken in times[base]]
    return cells | {base: f"1 ({report.milliseconds(quartiles(together)[0])})"}
