"""EMA weights against training weights in a Lightning Trainer.

    python lightning_digits.py    # prints a table, draws lightning_digits.png

A small network learns scikit-learn's digits from 600 noisy images. The exit code is 0 if a resumed
run ends bit-equal. (A script named lightning.py would be imported in place of Lightning.)
"""

import argparse
import logging
import tempfile
import warnings

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from tqdm import tqdm

from ema_optim import compute_optimal_decay, warmup_decay
from ema_optim.integrations.lightning import EMAWeights


class Digits(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        # Noise from the step's number alone: Lightning's checkpoints hold no random state.
        noise = torch.randn(16, 64, generator=torch.Generator().manual_seed(self.global_step))
        return nn.functional.cross_entropy(self.net(batch[0] + 0.6 * noise), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", self.accuracy(batch))

    def accuracy(self, batch):
        return 100 * (self.net(batch[0]).argmax(dim=1) == batch[1]).double().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)


class Curve(pl.Callback):
    """Moves the bar, and notes both accuracies: after an epoch the training weights are in."""

    def __init__(self, batch, bar):
        self.batch, self.bar, self.rows = batch, bar, []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer, module):
        training = module.accuracy(self.batch).item()
        ema = trainer.callback_metrics["accuracy"].item()  # of the validation that has just been
        self.rows.append((trainer.current_epoch + 1, training, ema))
        self.bar.update()


def draw(rows, path):
    epochs, training, ema = zip(*rows, strict=True)
    axes = Figure(figsize=(6, 3.8), dpi=150, layout="constrained").subplots()
    for name, points, colour in (("EMA", ema, "#1d4ed8"), ("training", training, "#c2410c")):
        label = f"{name} weights: {points[-1]:.1f} %"
        axes.plot(epochs, points, color=colour, linewidth=2, label=label)
    axes.set_title("One run validated twice: digits, constant learning rate", fontsize=11)
    axes.legend(labelcolor="linecolor")
    axes.set(xlabel="epoch", ylabel="validation accuracy (%)")
    axes.grid(alpha=0.3)
    axes.figure.savefig(path, pil_kwargs={"optimize": True})


def main(folder, args):
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    parts = random_split(TensorDataset((images / 16).float(), labels), [600, 1197])
    training, validation = DataLoader(parts[0], 16, drop_last=True), DataLoader(parts[1], 1197)
    half = args.epochs // 2
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"accelerator": "cpu", "max_epochs": args.epochs}
    decay = warmup_decay(compute_optimal_decay(args.epochs * len(training)))
    runs = {None: Digits(), f"{folder}/epoch={half - 1}.ckpt": Digits()}
    curves = []
    with tqdm(total=2 * args.epochs - half, unit="epoch") as bar:
        for path, model in runs.items():  # the second goes on from the middle of the first
            saver = pl.callbacks.ModelCheckpoint(
                folder, "{epoch}", every_n_epochs=half, save_top_k=-1
            )
            curve = Curve(next(iter(validation)), bar)
            trainer = pl.Trainer(callbacks=[EMAWeights(decay), saver, curve], **options)
            trainer.fit(model, training, validation, ckpt_path=path)
            curves.append(curve.rows)
    for rows in curves:
        _, raw, ema = rows[-1]
        print(f"validation accuracy: EMA weights {ema:.2f} %, training weights {raw:.2f} %")
    draw(curves[0], args.output)
    print(f"validation curves: {args.output}")
    return all(map(torch.equal, *(model.parameters() for model in runs.values())))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30, help="an even number")
    parser.add_argument("--output", default="lightning_digits.png", help="path of the figure")
    args = parser.parse_args()
    logging.disable()
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message="the EMA still holds")  # after the first epochs
    torch.set_num_threads(1)  # the network is too small to share
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        raise SystemExit(not main(folder, args))
