"""Several GLUE tasks at once: unlabelled batches for adaptation, labelled ones for scores."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from dpp_lightning.tasks.common.data import module_attribute
from dpp_lightning.tasks.glue.data import GLUEDataModule
from dpp_lightning.tasks.glue.task_table import glue_task


class GLUEMixDataModule(LightningDataModule):
    """A :class:`GLUEDataModule` for each task of a merge. Training batches are task to a batch without labels.

    Args:
        tasks: names of GLUE tasks; by default those of the module it is used with.
        path: hub id or local folder, as for GLUEDataModule.
        tokenizer: hub id or local folder; by default the module's ``pretrained``.
        unlabelled: split whose texts the merge adapts to: ``val`` (a tenth of train, which fine-tuning held out), or
            ``test`` as AdaMerging was published, where the same samples are scored afterwards.
        batch_size: samples of each task in a training batch.
        eval_batch_size, max_length, val_fraction, calibration_fraction, split_seed, num_workers: as GLUEDataModule's;
            take those of the fine-tuning, so that the splits are the same.

    Raises:
        ValueError: no tasks, an unknown one; in ``setup`` as GLUEDataModule.
    """

    def __init__(
        self,
        tasks: Sequence[str] | None = None,
        path: str = "nyu-mll/glue",
        tokenizer: str | None = None,
        unlabelled: Literal["val", "test"] = "val",
        batch_size: int = 16,
        eval_batch_size: int = 64,
        max_length: int = 128,
        val_fraction: float = 0.1,
        calibration_fraction: float = 0.05,
        split_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for task in tasks or ():
            glue_task(task)
        self.tasks, self.path, self.tokenizer, self.unlabelled = tasks, path, tokenizer, unlabelled
        self.batch_size = batch_size
        self._settings: dict[str, Any] = {
            "eval_batch_size": eval_batch_size,
            "max_length": max_length,
            "val_fraction": val_fraction,
            "calibration_fraction": calibration_fraction,
            "split_seed": split_seed,
            "num_workers": num_workers,
        }
        self._data: dict[str, GLUEDataModule] = {}

    def prepare_data(self) -> None:
        """Download data and tokenizer, where they are not local, in one process."""
        for data in self._modules().values():
            data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Load and cut every task's data."""
        self._data = self._data or self._modules()
        for data in self._data.values():
            data.setup()

    def train_dataloader(self) -> Mapping[str, DataLoader[Any]]:
        """Shuffled batches of every task, without labels; smaller data sets start again until the largest ends."""
        return {task: data.unlabelled_dataloader(self.unlabelled, self.batch_size) for task, data in self._data.items()}

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """The calibration split of every task, in the order of the tasks."""
        return [data.calibration_dataloader() for data in self._data.values()]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """GLUE's validation split of every task, in the order of the tasks; of MNLI the matched one."""
        loaders = [data.test_dataloader() for data in self._data.values()]
        return [loader[0] if isinstance(loader, list) else loader for loader in loaders]

    def _modules(self) -> dict[str, GLUEDataModule]:
        tokenizer = self.tokenizer or module_attribute(self.trainer, "pretrained")
        tasks = self.tasks or module_attribute(self.trainer, "tasks")
        if not tasks or tokenizer is None:
            raise ValueError(
                "GLUEMixDataModule needs tasks=[...] and tokenizer=..., as the module it is used with has no 'tasks' "
                "and 'pretrained'"
            )
        return {task: GLUEDataModule(task, self.path, tokenizer=tokenizer, **self._settings) for task in tasks}
