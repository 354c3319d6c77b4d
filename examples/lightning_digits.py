"""EMA weights against training weights in a Lightning Trainer: python lightning_digits.py

A small network learns scikit-learn's digits from 600 noisy images. The exit code is 0 if a resumed
run ends bit-equal. (A script named lightning.py would be imported in place of Lightning.)
"""

import logging
import tempfile
import warnings

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

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
        self.log("accuracy", 100 * (self.net(batch[0]).argmax(dim=1) == batch[1]).double().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)


def main(folder):
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    parts = random_split(TensorDataset((images / 16).float(), labels), [600, 1197])
    training, validation = DataLoader(parts[0], 16, drop_last=True), DataLoader(parts[1], 1197)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"accelerator": "cpu", "max_epochs": 30, "check_val_every_n_epoch": 15}
    runs = {None: Digits(), f"{folder}/epoch=14.ckpt": Digits()}
    for path, model in runs.items():  # the second goes on from the middle of the first
        saver = pl.callbacks.ModelCheckpoint(folder, "{epoch}", every_n_epochs=15, save_top_k=-1)
        trainer = pl.Trainer(callbacks=[EMAWeights("auto"), saver], **options)
        trainer.fit(model, training, validation, ckpt_path=path)
        ema = trainer.validate(model, validation, verbose=False)[0]["accuracy"]
        raw = pl.Trainer(**options).validate(model, validation, verbose=False)[0]["accuracy"]
        print(f"validation accuracy: EMA weights {ema:.2f} %, training weights {raw:.2f} %")
    return all(map(torch.equal, *(model.parameters() for model in runs.values())))


if __name__ == "__main__":
    logging.disable()
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)  # the network is too small to share
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        raise SystemExit(not main(folder))
