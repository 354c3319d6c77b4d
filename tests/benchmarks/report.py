"""Markdown tables and the conditions that belong to them."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from shapes import describe

PEERS = ("ema-pytorch", "torch-ema", "diffusers", "lightning", "timm")


def table(title, text, header, rows):
    lines = [f"### {title}", "", text, ""]
    lines += [_line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    lines += [_line(row) for row in rows]
    return "\n".join([*lines, ""])


def by_row(first, columns):
    """Header and rows of a table given as ``{column: {row: cell}}``, in order of appearance."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [[name, *(column.get(name, "") for column in columns.values())] for name in names]
    return [first, *columns], rows


def ratio(quartiles):
    median, low, high = quartiles
    return f"{median:.2f} [{low:.2f}..{high:.2f}]"


def percent(quartiles):
    median, low, high = (100 * value for value in quartiles)
    return f"{median:+.0f} % [{low:+.0f}..{high:+.0f}]"


def mib(size):
    return f"{size / 2**20:.1f} MiB" if size else "0"


def milliseconds(seconds):
    return f"{seconds * 1e3:.2f} ms"


def conditions(bench, malloc):
    lines = [
        f"torch {torch.__version__}, Python {platform.python_version()}, {_peer_versions()}",
        f"{_device_name(bench.device)}, {torch.get_num_threads()} thread(s), {malloc}",
        f"seed {bench.seed}, {bench.warmup} warm-up rounds, then {_rounds(bench)}",
        f"load average {os.getloadavg()[0]:.1f} at the end",
        *(describe(name, bench.quick) for name in bench.models),
    ]
    if bench.quick:
        lines.append("QUICK MODE: cut-down models and 3 rounds; nothing here is a measurement")
    lines += [f"note: {note}" for note in bench.notes]
    return "\n".join(["### Conditions", "", *(f"- {line}" for line in lines), ""])


def _rounds(bench):
    return ", ".join(f"{bench.rounds_of(name)} ({name})" for name in bench.models)


def _line(cells):
    return f"| {' | '.join(map(str, cells))} |"


def _peer_versions():
    return ", ".join(f"{name} {_version(name)}" for name in ("ema_optim", *PEERS))


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def _device_name(device):
    return torch.cuda.get_device_name() if device == "cuda" else _cpu_name()


def _cpu_name():
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0].partition(":")[2].strip()
    return platform.machine()
