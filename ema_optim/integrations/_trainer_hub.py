"""Which weights the Trainer pushes to the Hub, and what is said of those in its folders."""

from collections.abc import Callable
from typing import Any

from transformers.trainer_utils import HubStrategy

from .._warnings import warn
from . import _pretrained

_PUSHES = "ema_optim_pushes"  # the attribute of a Trainer that is made to push the EMA weights


def check_strategy(args: Any) -> None:
    """Raise ValueError where whole checkpoints are pushed, to be resumed from."""
    if HubStrategy(args.hub_strategy) in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            "hub_weights='ema' must go with hub_strategy 'every_save' or 'end', got "
            f"{args.hub_strategy!r}, which pushes whole checkpoints (the EMA is in them)"
        )


def push_ema(trainer: Any, swapped: Callable[[], Any], save: Callable[[], None]) -> None:
    """Have a Trainer push EMA weights: there is no event before it collects the files.

    Args:
        trainer: The Trainer.
        swapped: Makes a context in which the EMA weights are in the model.
        save: Writes the EMA weights beside the checkpoint that was just written.
    """
    is_new = not hasattr(trainer, _PUSHES)
    setattr(trainer, _PUSHES, (swapped, save))  # of this training
    if not is_new:
        return
    from_checkpoint, to_hub = trainer._push_from_checkpoint, trainer.push_to_hub

    def push_from_checkpoint(folder: str) -> None:
        getattr(trainer, _PUSHES)[1]()
        from_checkpoint(_pretrained.ema_folder(trainer.model, folder))

    def push_to_hub(*args: Any, **kwargs: Any) -> Any:
        with getattr(trainer, _PUSHES)[0]():
            return to_hub(*args, **kwargs)

    trainer._push_from_checkpoint, trainer.push_to_hub = push_from_checkpoint, push_to_hub


def warn_of_folders(args: Any, hub_weights: str, saves: bool) -> None:
    """Say which weights lie where metrics of the EMA weights are read."""
    places = []
    if args.metric_for_best_model is not None:
        where = "in its folder ema" if saves else "in its optimizer.pt (export_ema)"
        places.append(
            "trainer.state.best_model_checkpoint, whose best_metric is that of the EMA weights "
            f"{where}"
        )
    if args.push_to_hub and hub_weights == "training":
        places.append("what is pushed to the Hub (hub_weights='ema' changes that)")
    if places:
        places_told = ", and in ".join(places)
        warn(f"the model files hold the training weights in {places_told}", once="folders")
