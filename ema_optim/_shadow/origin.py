"""Where the averages of a run come from, for files that belong to one run."""

from dataclasses import dataclass, field


@dataclass(eq=False)
class Origin:
    """The birth of the averages, or the last load; a new object for each.

    Attributes:
        step: The clock of the checkpoint that was loaded; None where none was.
        files: Those that were written since.
    """

    step: int | None = None
    files: set[str] = field(default_factory=set)

    @classmethod
    def at(cls, step: int) -> "Origin":
        """That of a checkpoint; one that has counted no step says nothing of a run."""
        return cls(step or None)
