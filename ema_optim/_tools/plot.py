"""Curves of a run: what was evaluated on the EMA weights beside the training weights."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Curve = dict[int, float]  # by step

_EMA, _TRAINING, _LOSS, _OTHER = "#1d4ed8", "#c2410c", "#6b7280", "#374151"
_EVALUATIONS = ("eval_", "val_", "valid_", "validation_", "test_")
_COSTS = ("runtime", "samples_per_second", "steps_per_second", "preparation_time")
_LOSSES = ("loss", "train_loss")
_HEALTH = ("ema_distance", "ema_decay")


def plot(source: Path, output: Path) -> list[str]:
    """Draw the curves in a log to a PNG file.

    Args:
        source: ``trainer_state.json``, a folder that holds one, or a TensorBoard folder.
        output: The file to write.

    Returns:
        What was drawn, panel by panel.

    Raises:
        FileNotFoundError, ValueError: There is no log, no numbers in it, or more than one run.
        ImportError: matplotlib is missing, or tensorboard where it is needed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('plot needs matplotlib: pip install "ema_optim[demo]"') from None
    curves = read(source)
    panels = panels_of(curves)
    if not panels:
        raise ValueError(f"{source} must hold losses or metrics by step, got {sorted(curves)[:8]}")
    with matplotlib.rc_context(dict(matplotlib.rcParamsDefault)):  # not a user's dark style, say
        columns = 1 if len(panels) < 4 else 2
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(6.4 * columns, 2.9 * rows + 0.3), dpi=150, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flat
        steps = [step for lines in panels.values() for name, *_ in lines for step in curves[name]]
        for axis, (title, lines) in zip(axes, panels.items(), strict=False):
            _draw(axis, title, lines, curves)
            axis.set_xlim(min(steps) - 0.02 * max(steps), 1.02 * max(steps))
        for axis in list(axes)[len(panels) :]:
            axis.remove()
        figure.savefig(output, facecolor="white")
    return list(panels)


def read(source: Path) -> dict[str, Curve]:
    """Every number of a log by step, under the Trainer's names (``eval_loss``, ``loss``)."""
    if not source.exists():
        raise FileNotFoundError(f"{source} must be a log's file or folder, got nothing there")
    state = source / "trainer_state.json" if source.is_dir() else source
    return _of_trainer(state) if state.is_file() else _of_tensorboard(source)


def panels_of(curves: Mapping[str, Curve]) -> dict[str, list[tuple[str, str, str]]]:
    """What is drawn: by title the lines, each a curve's name, its label and its colour."""
    panels = {}
    for name in sorted(curves, key=lambda name: (not name.endswith("loss"), name)):
        kind = next((kind for kind in _EVALUATIONS if name.startswith(kind)), None)
        if kind is None or name.startswith(f"{kind}training_") or name.endswith(_COSTS):
            continue
        other = f"{kind}training_{name.removeprefix(kind)}"
        panels[name] = [(name, name, _EMA)]
        if other in curves:
            panels[name] = [(other, "training weights", _TRAINING), (name, "EMA weights", _EMA)]
    loss = next((name for name in _LOSSES if len(curves.get(name, ())) > 1), None)
    if loss is not None:
        of_loss = [title for title in panels if title.endswith("_loss")] or [loss]
        panels[of_loss[0]] = [(loss, "loss of the steps", _LOSS), *panels.get(of_loss[0], [])]
    return panels | {name: [(name, name, _OTHER)] for name in _HEALTH if name in curves}


def _draw(
    axis: Any, title: str, lines: Sequence[tuple[str, str, str]], curves: Mapping[str, Curve]
) -> None:
    for name, label, colour in lines:
        steps, values = zip(*sorted(curves[name].items()), strict=True)
        marker = "o" if len(steps) < 30 and colour != _LOSS else ""
        width = 1.0 if colour == _LOSS else 2.0
        text = f"{label}: {values[-1]:.4g}"
        axis.plot(
            steps, values, color=colour, linewidth=width, marker=marker, markersize=4, label=text
        )
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("optimizer step")
    axis.grid(alpha=0.3)
    axis.legend(title="last value", labelcolor="linecolor", fontsize=9, title_fontsize=9)


def _of_trainer(path: Path) -> dict[str, Curve]:
    try:
        history = json.loads(path.read_text())["log_history"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} must be the trainer_state.json of a checkpoint, got no log_history in it"
        ) from None
    curves: dict[str, Curve] = {}
    for entry in history:
        for name, value in entry.items():
            if name not in ("step", "epoch") and isinstance(value, (int, float)):
                curves.setdefault(name, {})[entry["step"]] = value
    return curves


def _of_tensorboard(folder: Path) -> dict[str, Curve]:
    runs = sorted({path.parent for path in folder.rglob("*tfevents*")}) if folder.is_dir() else []
    if len(runs) != 1:
        shown = [str(run) for run in runs[:4]]
        raise ValueError(
            f"{folder} must be a trainer_state.json or a TensorBoard folder of one run, got "
            f"{shown or 'no event files'}: pass the one that is meant"
        )
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise ImportError("a TensorBoard folder needs tensorboard: pip install it") from None
    events = EventAccumulator(str(runs[0]), size_guidance={"scalars": 0}).Reload()
    return {
        tag.removeprefix("train/").replace("/", "_"): {e.step: e.value for e in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }
