"""A Trainer of transformers on several ranks, as torchrun starts it."""

from pathlib import Path

from tiny_hf import Texts, make_trainer, values_of

from dpp_lightning.callbacks import HFDeltaPruneCallback

METHODS = ["dare", "darex-q", "darex-learned", "wanda"]


def fit(folder, *, prunes=True):
    """What this rank has at the end: the callback's rows, the score of the trainer, and the weights."""
    trainer = make_trainer(
        Path(folder), train=Texts(320, 1), evaluated=Texts(97, 2), per_device_train_batch_size=16, max_steps=6
    )
    callback = HFDeltaPruneCallback(METHODS, 0.9, seeds=[0, 1], plot=True, resume=True)
    if prunes:
        callback.attach(trainer)
    trainer.train()
    rows = [(r.method, r.seed, r.q, r.score, r.num_bytes) for r in callback.results]
    return rows, trainer.evaluate()["eval_accuracy"], {n: t.numpy() for n, t in values_of(trainer.model).items()}
