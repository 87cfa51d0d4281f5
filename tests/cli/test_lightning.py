"""fit and validate through LightningCLI: configs and overrides, checkpoints, signals, errors, several ranks."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch.utils.data import DataLoader, TensorDataset

from dpp_lightning.cli import main

QUIET = [f"--trainer.{option}=false" for option in ("enable_progress_bar", "enable_model_summary", "logger")]


class Toy(LightningModule):
    """Two weights, four batches an epoch; at step ``stop_at`` it sends itself ``stop_with``."""

    def __init__(
        self,
        scale: float = 1.0,
        stop_at: int = -1,
        stop_with: int = signal.SIGINT.value,
        optimizer: OptimizerCallable = torch.optim.SGD,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.scale, self.stop_at, self.stop_with, self.optimizer = scale, stop_at, stop_with, optimizer
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        if self.global_step == self.stop_at:
            signal.raise_signal(self.stop_with)
        return self.scale * self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_score", self.scale)
        self.log("val_weight", self.layer.weight.sum())

    def configure_optimizers(self):
        return self.optimizer(self.parameters())

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)

    val_dataloader = train_dataloader


TOY = ["--model", f"{__name__}.Toy", "--model.optimizer=SGD", "--model.optimizer.lr=0.1", *QUIET]


@pytest.fixture(autouse=True)
def _interruptible():
    """SIGINT raises KeyboardInterrupt, also where a shell started the tests in its background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def signals():
    """Lightning leaves SIGINT ignored after a graceful stop: put the handlers back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def composed(capsys, *arguments):
    """What the parser makes of a command line, as a dict."""
    assert main([*arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


# --- LightningCLI ---------------------------------------------------------------------------------------------------


def test_several_configs_compose_and_flags_override(here, capsys):
    Path("a.yaml").write_text(f"{{model: {{class_path: {__name__}.Toy, init_args: {{scale: 2, stop_at: 7}}}}}}")
    Path("b.yaml").write_text("{model: {init_args: {scale: 3}}, trainer: {max_epochs: 5, max_steps: 9}}")
    cfg = composed(capsys, "fit", "-c", "a.yaml", "--config", "b.yaml", "--model.stop_at", "8", "--trainer.max_steps=4")
    assert cfg["model"]["init_args"] | {"optimizer": None} == {
        "scale": 3.0,
        "stop_at": 8,
        "stop_with": 2,
        "optimizer": None,
    }
    assert (cfg["trainer"]["max_epochs"], cfg["trainer"]["max_steps"]) == (5, 4)


def test_packaged_config_takes_overrides_in_subclass_mode(here, capsys):
    cfg = composed(
        capsys, "fit", "--config", "bert_cola_adamr", "--model.pretrained=./encoder", "--data.path", "./glue"
    )
    assert cfg["model"]["class_path"] == "dpp_lightning.tasks.GLUEModule"
    assert cfg["model"]["init_args"]["pretrained"] == "./encoder"
    assert cfg["data"]["init_args"]["path"] == "./glue"


def test_fit_then_validate_from_the_checkpoint(here, capsys):
    root = "--trainer.default_root_dir=runs"
    assert main(["fit", *TOY, root, "--trainer.max_epochs=1", "--model.scale=2"]) == 0
    (checkpoint,) = here.glob("runs/**/*.ckpt")
    weights = torch.load(checkpoint, weights_only=True)  # hyper-parameters of LightningCLI load under torch's default
    assert weights["hyper_parameters"]["scale"] == 2

    # the checkpoint gives the weights; the command line, not the checkpoint, gives the settings
    assert main(["validate", *TOY, root, "--ckpt_path", str(checkpoint), "--model.scale=5"]) == 0
    table = capsys.readouterr().out
    trained = weights["state_dict"]["layer.weight"].sum().item()
    assert f"{trained:.4f}"[:6] in table
    assert "5.0" in table

    # the config of the fit survives its validation, and replays
    fitted = yaml.safe_load((here / "runs/config.yaml").read_text())
    assert fitted["model"]["init_args"]["scale"] == 2
    assert fitted["seed_everything"] == 0
    assert (here / "runs/config_validate.yaml").exists()
    assert main(["fit", "--config", "runs/config.yaml", "--trainer.default_root_dir=again"]) == 0
    (replayed,) = here.glob("again/**/*.ckpt")
    again = torch.load(replayed, weights_only=True)["state_dict"]
    assert torch.equal(again["layer.weight"], weights["state_dict"]["layer.weight"])


def test_second_fit_into_the_same_folder_is_not_refused(here):
    command = ["fit", *TOY, "--trainer.max_steps=1", "--trainer.enable_checkpointing=false"]
    assert main(command) == 0
    assert main([*command, "--model.scale=3"]) == 0
    assert yaml.safe_load((here / "config.yaml").read_text())["model"]["init_args"]["scale"] == 3


LAST = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.dirpath=run", "--trainer.callbacks.filename=last"]


def test_fit_says_where_its_checkpoint_is_and_the_command_it_prints_works(here, capsys):
    assert main(["fit", *TOY, *LAST, "--trainer.max_epochs=1"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2] == "The checkpoint is run/last.ckpt"
    command = shlex.split(lines[-1].removeprefix("To score it: "))
    assert command[:2] == ["dpp", "validate"]  # there is no test_step
    assert main(command[1:]) == 0


def test_a_second_fit_keeps_the_first_ones_checkpoint_and_says_so(here, capsys):
    command = ["fit", *TOY, *LAST, "--trainer.max_epochs=1"]
    assert main(command) == 0
    assert "earlier fit" not in capsys.readouterr().err
    first = (here / "run/last.ckpt").read_bytes()
    assert main(command) == 0
    error = capsys.readouterr().err
    assert "dpp fit: run/last.ckpt is of an earlier fit and is kept" in error
    assert "The checkpoint is run/last-v1.ckpt" in error
    assert (here / "run/last.ckpt").read_bytes() == first
    assert main([*command[:-1], "--trainer.max_epochs=2", "--ckpt_path=run/last.ckpt"]) == 0  # resumed: the same file
    error = capsys.readouterr().err
    assert "earlier fit" not in error
    assert "The checkpoint is run/last.ckpt" in error


def test_a_fit_without_checkpoints_names_none(here, capsys):
    assert main(["fit", *TOY, "--trainer.max_epochs=1", "--trainer.enable_checkpointing=false"]) == 0
    assert "checkpoint" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "sweep"])
def test_help_names_traceback_class_help_and_exit_codes(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    for example in (f"DPP_TRACEBACK=1 dpp {command}", f"dpp {command} --model.help GLUEModule", "  130  "):
        assert example in text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_stopped_fit_says_how_to_resume(number, code, here, signals, capsys):
    command = ["fit", *TOY, "--trainer.max_epochs=3", f"--model.stop_with={number.value}"]
    assert main([*command, "--model.stop_at=6"]) == code
    (checkpoint,) = here.glob("**/*.ckpt")
    assert f"--ckpt_path {checkpoint}" in capsys.readouterr().err

    # stopped again before the next one is written: still the same
    assert main([*command, "--ckpt_path", str(checkpoint), "--model.stop_at=5"]) == code
    assert f"--ckpt_path {checkpoint}" in capsys.readouterr().err

    assert main([*command, "--ckpt_path", str(checkpoint)]) == 0
    assert {torch.load(path, weights_only=True)["global_step"] for path in here.glob("**/*.ckpt")} >= {12}


def test_fit_stopped_while_saving_names_the_checkpoint_before(here, signals, capsys, monkeypatch):
    def stop_in_the_second(trainer, path, *arguments):
        if trainer.current_epoch == 1:
            signal.raise_signal(signal.SIGINT)
        save(trainer, path, *arguments)

    save = Trainer.save_checkpoint
    monkeypatch.setattr(Trainer, "save_checkpoint", stop_in_the_second)
    assert main(["fit", *TOY, "--trainer.max_epochs=3"]) == 130
    (checkpoint,) = here.glob("**/*.ckpt")
    assert f"--ckpt_path {checkpoint}" in capsys.readouterr().err


def test_fit_stopped_before_any_checkpoint_says_so(here, signals, capsys):
    assert main(["fit", *TOY, "--model.stop_at=1"]) == 130
    assert "No checkpoint had been written" in capsys.readouterr().err


# --- errors ---------------------------------------------------------------------------------------------------------


def test_our_refusal_is_one_block(here, capsys):
    assert main(["fit", *TOY, "--trainer.callbacks=DeltaPruneCallback", "--trainer.callbacks.pruning_rate=1.5"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dpp fit: error: ")
    assert "1.5" in error
    assert error.count("\n") == 1


def test_lightnings_refusal_of_a_setting_is_one_block(here, capsys):
    assert main(["fit", *TOY, "--trainer.limit_train_batches=1.5"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dpp fit: error: ")
    assert "1.5" in error


PRUNING = "{class_path: DeltaPruneCallback, init_args: {method: %s, output_dir: %s}}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", *TOY, "--ckpt_path=nope.ckpt"], "there is no checkpoint 'nope.ckpt' (--ckpt_path); beside it are last.ckpt"),
        (["fit", *TOY, "--ckpt_path", "lst.ckpt"], "did you mean last.ckpt?"),
        (["validate", *TOY, "--ckpt_path=best"], "give the file itself"),
        (["fit", *TOY, "--trainer.max_epochs", "1", "--trainer.max_epochs=2"], "--trainer.max_epochs is given twice, 1 and 2"),
        (["fit", *TOY, "--model.scale=1", "--model.init_args.scale=2"], "--model.init_args.scale is given twice"),
        (["fit", *TOY, "--model", "VisionModule"], "--model is given twice"),
        (["fit"], "give a config, --config NAME (dpp configs lists them), or --model CLASS"),
        (["test", "--trainer.devices=1"], "give a config, --config NAME (dpp configs lists them), or --model CLASS"),
        (["fit", "--model=VisionModule"], "--data is missing: VisionModule loads no data itself"),
        (["test", *TOY], "--data is missing: Toy loads no data itself"),
        (["fit", *TOY, "--trainer.callbacks=[DeltaPruneCallback, DeltaPruneCallback]"], "lists DeltaPruneCallback twice"),
        (["fit", *TOY, f"--trainer.callbacks=[{PRUNING % ('dp', 'x')}, {PRUNING % ('dare', 'x')}]"], "write into one folder"),
        (["fit", *TOY, "--trainer.accelerator=gpuu"], "gpuu"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line_before_a_model_is_built(arguments, said, here, capsys, monkeypatch):
    monkeypatch.setattr(Toy, "configure_optimizers", None)
    (here / "last.ckpt").touch()
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Seed set" not in line]
    assert line.startswith(f"dpp {arguments[0]}: error: ")
    assert said in line


@pytest.mark.parametrize(("one", "other"), [("x", "./x"), ("x/", "y/../x"), ("link", "x"), ("~/x", "x")])
def test_one_folder_in_two_spellings_is_one(one, other, here, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    (here / "x").mkdir()
    (here / "y").mkdir()
    (here / "link").symlink_to("x")
    callbacks = f"[{PRUNING % ('dp', one)}, {PRUNING % ('dare', other)}, {PRUNING % ('dppa', 'z')}]"
    assert main(["fit", *TOY, f"--trainer.callbacks={callbacks}"]) == 2
    assert "lists 3 DeltaPruneCallbacks that write into one folder" in capsys.readouterr().err


def test_two_prunings_into_two_folders_are_taken(here, capsys):
    callbacks = f"[{PRUNING % ('dp', 'x')}, {PRUNING % ('dare', 'y')}]"
    assert len(composed(capsys, "fit", *TOY, f"--trainer.callbacks={callbacks}")["trainer"]["callbacks"]) == 2


def test_last_is_refused_where_there_is_none_but_not_for_a_fit(here, capsys):
    assert main(["validate", *TOY, "--ckpt_path=last"]) == 2
    assert "no last.ckpt" in capsys.readouterr().err
    assert main(["fit", *TOY, "--ckpt_path=last", "--trainer.max_epochs=1"]) == 0


def test_options_may_follow_each_appended_callback(here, capsys):
    appended = [f"--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.filename={name}".split() for name in "ab"]
    callbacks = composed(capsys, "fit", *TOY, *appended[0], *appended[1])["trainer"]["callbacks"]
    assert [callback["init_args"]["filename"] for callback in callbacks] == ["a", "b"]


def test_traceback_on_request(here, monkeypatch):
    monkeypatch.setenv("DPP_TRACEBACK", "1")
    with pytest.raises(MisconfigurationException, match=r"1\.5"):
        main(["fit", *TOY, "--trainer.limit_train_batches=1.5"])


def test_an_error_that_is_not_ours_keeps_its_traceback(here):
    wrong = [argument.replace("lr=0.1", "lr=-1") for argument in TOY]
    with pytest.raises(ValueError, match="Invalid learning rate"):
        main(["fit", *wrong])


# --- whole runs -----------------------------------------------------------------------------------------------------


def launch(here, *command):
    """Run a command in ``here`` with this module importable and one thread a process."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    env = {name: value for name, value in env.items() if name not in ("PL_GLOBAL_SEED", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, timeout=300)


TWO_RANKS = ["fit", *TOY, "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
TWO_RANKS += ["--trainer.devices=2", "--trainer.strategy=ddp"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "launcher",
    [
        [str(Path(sys.executable).with_name("dpp"))],
        [sys.executable, "-m", "dpp_lightning"],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dpp_lightning"],
    ],
    ids=["console script", "python -m", "torchrun"],
)
def test_two_ranks(launcher, here):
    done = launch(here, *launcher, *TWO_RANKS)
    assert done.returncode == 0, done.stderr
    (checkpoint,) = here.glob("**/*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2  # four batches, two ranks


@pytest.mark.slow
def test_quickstart_in_its_own_process(here):
    done = launch(
        here, sys.executable, "-m", "dpp_lightning", "fit", "--config", "quickstart.yaml", "--trainer.max_epochs=1"
    )
    assert done.returncode == 0, done.stderr
