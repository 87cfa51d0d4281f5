"""What becomes one line on stderr, with which exit code, and what keeps its traceback."""

import errno

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from lightning.pytorch import Trainer

from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.cli.command import FunctionCommand
from dpp_lightning.cli.user_errors import guarded


def raise_(error, cause=None):
    raise error from cause


@pytest.mark.parametrize(
    ("act", "line", "code"),
    [
        (lambda: raise_(OSError(errno.ENOSPC, "No space left on device")), "failed: [Errno 28] No space left on device", 1),
        (lambda: raise_(MemoryError()), "failed: there is not enough memory", 1),
        (lambda: raise_(OSError("We couldn't\nconnect"), LocalEntryNotFoundError("x")), "failed: We couldn't connect", 1),
        (lambda: raise_(OSError("x/y is not a valid model identifier")), "error: x/y is not a valid model identifier", 2),
        (lambda: raise_(FileNotFoundError("no file x")), "error: no file x", 2),
        (lambda: DeltaPruneCallback(pruning_rate=2.0), "error: DeltaPruneCallback: pruning_rate", 2),
        (lambda: Trainer(strategy="ddpp", logger=False), "error: You selected an invalid strategy name", 2),
        (lambda: raise_(ValueError("jsonargparse"), FileNotFoundError("no file y")), "error: no file y", 2),
    ],
)  # fmt: skip
def test_one_line_and_a_code(act, line, code, capsys):
    assert guarded("fit", act) == code
    error = capsys.readouterr().err
    assert error.startswith(f"dpp fit: {line}")
    assert error.count("\n") == 1


def run_function(act):
    """The exit code of a command made from a function."""

    def command() -> None:
        """Act."""
        act()

    return FunctionCommand(command, example="dpp command").run(["command"])


def raised_in(module, error, cause=None):
    """What raises an error in the code of a module, from a cause."""
    namespace = {"__name__": module, "error": error, "cause": cause}
    exec("def act():\n    raise error from cause", namespace)
    return namespace["act"]


@pytest.mark.parametrize(
    ("act", "code"),
    [
        (lambda: None, 0),
        (raised_in("dpp_lightning.pruning.plan", ValueError("rate")), 2),
        (raised_in("transformers.models.auto.configuration_auto", ValueError("no such type")), 2),
        (raised_in("x", FileNotFoundError("no such file")), 2),
        (raised_in("x", FileExistsError("in the way")), 2),
        (raised_in("x", PermissionError("may not")), 2),
        (raised_in("x", IsADirectoryError("a folder")), 2),
        (raised_in("x", FileNotFoundError("not cached; HF_HUB_OFFLINE"), LocalEntryNotFoundError("x")), 2),
        (raised_in("x", OSError("We could not connect"), LocalEntryNotFoundError("x")), 1),
        (raised_in("x", ConnectionError("no network")), 1),
        (raised_in("x", TimeoutError("slow")), 1),
        (raised_in("x", OSError(errno.ENOSPC, "full")), 1),
        (raised_in("x", OSError(errno.EIO, "disk")), 1),
        (raised_in("x", MemoryError("map")), 1),
        (raised_in("lightning.pytorch.loops.fit_loop", ValueError("val_check_interval")), 2),
        (raised_in("lightning.fabric.accelerators.cpu", TypeError("devices")), 2),
        (raised_in("lightning.pytorch.callbacks.early_stopping", RuntimeError("metric not available")), 2),
        (raised_in("lightning.pytorch.tuner.lr_finder", AttributeError("no learning rate")), 2),
        (raised_in("lightning.fabric.accelerators.xla", ModuleNotFoundError("torch_xla not met")), 2),
        (raised_in("transformers.utils.import_utils", ImportError("requires the SentencePiece library")), 2),
        (raised_in("elsewhere", ModuleNotFoundError("No module named 'x'")), ModuleNotFoundError),
        (raised_in("lightning.pytorch.trainer.call", TypeError("training_step() takes 2")), TypeError),
        (raised_in("elsewhere", ValueError("of another package")), ValueError),
        (raised_in("dpp_lightning.delta.folder", KeyError("x")), KeyError),
        (raised_in("torch.nn.modules", RuntimeError("shapes")), RuntimeError),
    ],
)
def test_commands_of_both_kinds_have_one_rule(act, code, capsys):
    """A code, or the error itself where it may be a bug."""
    for run in (lambda: guarded("fit", act), lambda: run_function(act)):
        if isinstance(code, int):
            assert run() == code
            assert capsys.readouterr().err.count("\n") == (code != 0)
        else:
            with pytest.raises(code):
                run()


def test_a_traceback_is_shown_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("DPP_TRACEBACK", "1")
    for run in (lambda act: guarded("fit", act), run_function):
        with pytest.raises(FileNotFoundError):
            run(raised_in("x", FileNotFoundError("no such file")))


def test_a_missing_package_among_the_faults_of_several_types_is_one_line(capsys):
    faults = (
        "Does not validate against any of the Union subtypes\nErrors:\n  - Problem with given class_path 'x':\n"
        "      Requirement 'bitsandbytes' not met. HINT: Try running `pip install -U 'bitsandbytes'`\n  - Expected a list"
    )
    assert guarded("fit", raised_in("jsonargparse._typehints", ValueError(faults))) == 2
    said = capsys.readouterr().err
    assert said.strip().endswith(
        "Requirement 'bitsandbytes' not met. HINT: Try running `pip install -U 'bitsandbytes'`"
    )
