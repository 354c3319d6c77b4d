"""What the Trainer logs and evaluates because of ``EMACallback``."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import ProgressCallback


def put_first(trainer: Any, callback: Any) -> None:
    """Call a callback before all others of a Trainer, so that reporters get its metrics.

    Args:
        trainer: A weak reference to the Trainer, or None.
        callback: The callback.
    """
    there = None if trainer is None else trainer()
    if there is not None and callback in (callbacks := there.callback_handler.callbacks):
        callbacks.remove(callback)
        callbacks.insert(0, callback)


def evaluate_again(trainer: Any, loader: Any) -> None:
    """Evaluate on the weights that are in the model, and log what comes out.

    The loop alone, not ``Trainer.evaluate``: other callbacks see one evaluation, with the metrics
    of the EMA weights, and the best checkpoint is chosen by these.

    Args:
        trainer: A weak reference to the Trainer that has just evaluated, or None.
        loader: What it has evaluated on.
    """
    there = None if trainer is None else trainer()
    if there is None:
        return
    _close_progress(there)
    given = _arguments_of_evaluate()
    with _same_random_numbers():
        output = there.evaluation_loop(
            loader,
            description="Evaluation of the training weights",
            prediction_loss_only=True if there.compute_metrics is None else None,
            ignore_keys=given.get("ignore_keys"),
            metric_key_prefix=_prefix(given.get("metric_key_prefix", "eval")),
        )
    there.log(output.metrics)


def _prefix(own: str) -> str:
    """``eval_training`` for ``eval``, ``eval_training_name`` for the dataset of a name."""
    first, separator, name = own.partition("_")
    return f"{first}_training{separator}{name}"


def _arguments_of_evaluate() -> dict[str, Any]:
    """What ``Trainer.evaluate``, which is calling, was given: an event does not tell."""
    frame = sys._getframe(1)
    while frame is not None:
        if {"ignore_keys", "metric_key_prefix"} <= frame.f_locals.keys():
            return dict(frame.f_locals)
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def _close_progress(trainer: Any) -> None:
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback):
            callback.on_evaluate(trainer.args, trainer.state, trainer.control)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Leave no trace in the generators: a training goes on as if nothing had been evaluated."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
