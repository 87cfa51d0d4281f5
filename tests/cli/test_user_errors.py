"""What becomes one line on stderr, with which exit code, and what keeps its traceback."""

import errno

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from lightning.pytorch import Trainer

from dpp_lightning.callbacks import DeltaPruneCallback
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


@pytest.mark.parametrize("error", [ValueError("of another package"), KeyError("x"), RuntimeError("shapes")])
def test_a_bug_keeps_its_traceback(error):
    namespace = {"__name__": "elsewhere", "error": error}
    exec("def act():\n    raise error", namespace)
    with pytest.raises(type(error)):
        guarded("fit", namespace["act"])


def test_nothing_wrong_is_code_0():
    assert guarded("fit", lambda: None) == 0
