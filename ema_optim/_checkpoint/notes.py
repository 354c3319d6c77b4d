"""What a checkpoint says of itself in the text of a group's ``ema_format``.

    "float24; without=0,3-7; model=float32*12:0123456789abcdef"

First the storage format; then ``key=value`` parts, of which unknown ones are ignored. A text, since
a distributed checkpoint makes keys of a dict's entries, and a key that an older file lacks would
keep it from loading. The parts:

    without   positions in the group of the parameters that have no EMA, or "none"
    model     a fingerprint of what the model held of those that have one
    law       the decays of all windows, see ``windows``

A file without parts is an older one, of which neither is known.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Notes:
    """The parts of one group's text; None for what is not known."""

    format: str | None = None
    without: frozenset[int] | None = None
    model: str | None = None
    law: str | None = None

    def text(self) -> str:
        """What is written into a checkpoint."""
        parts = [self.format or "default"]
        if self.without is not None:
            parts.append(f"without={_ranges(self.without) or 'none'}")
        if self.model:
            parts.append(f"model={self.model}")
        if self.law:
            parts.append(f"law={self.law}")
        return "; ".join(parts)


def parse(value: object, label: str) -> Notes:
    """The inverse of ``Notes.text``, of what an older version has written too."""
    if value is None:
        return Notes()
    if not isinstance(value, str):
        raise TypeError(f"ema_format of {label} must be a text, got {value!r}: it is damaged")
    format, *parts = value.split("; ")
    known = dict(part.split("=", 1) for part in parts if "=" in part)
    without = known.get("without")
    try:
        listed = None if without is None else _positions(without)
    except ValueError:
        raise ValueError(
            f"ema_format of {label} must list positions like 0,3-7, got {value!r}: it is damaged"
        ) from None
    return Notes(format, listed, known.get("model"), known.get("law"))


def _ranges(positions: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for position in sorted(positions):
        if runs and runs[-1][1] == position - 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _positions(text: str) -> frozenset[int]:
    found: set[int] = set()
    for run in text.split(",") if text != "none" else ():
        first, _, last = run.partition("-")
        # A range of a damaged file may be absurdly long.
        found.update(range(int(first), min(int(last or first), int(first) + 2**20) + 1))
    return frozenset(found)
