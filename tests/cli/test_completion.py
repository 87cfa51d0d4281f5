"""dpp completion: what bash completes with the script that is printed."""

import shutil
import subprocess

import pytest

from dpp_lightning.cli import main, packaged_configs
from dpp_lightning.cli.commands import COMMANDS
from dpp_lightning.methods.registry import METHODS

pytest.importorskip("shtab")


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """What bash offers for the words, the last of which is being typed."""
    script = tmp_path_factory.mktemp("completion") / "dpp"
    with pytest.MonkeyPatch.context() as patch, script.open("w") as file:
        patch.setattr("sys.stdout", file)
        assert main(["completion", "bash"]) == 0

    def offered(*words):
        typed = " ".join(f"'{word}'" for word in ("dpp", *words))
        program = (
            f"source {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; "
            "$(complete -p dpp | sed 's/.*-F \\([^ ]*\\).*/\\1/') dpp \"${COMP_WORDS[COMP_CWORD]}\" ''; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
        return done.stdout.split()

    return offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_commands_options_and_choices_are_completed(complete):
    assert complete("") == list(COMMANDS)
    assert complete("pru") == ["prune"]
    assert complete("prune", "--me") == ["--method", "--method_settings"]
    assert complete("prune", "--method", "") == list(METHODS)
    assert complete("plan", "--weights", "b") == ["bfloat16"]
    assert complete("fit", "--config", "bert_cola") == [
        n for n in packaged_configs.names() if n.startswith("bert_cola")
    ]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_further_shells_have_a_script(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "dpp" in capsys.readouterr().out


def test_a_missing_package_is_named_with_its_cure(monkeypatch, capsys):
    monkeypatch.setattr("jsonargparse._completions.find_spec", lambda name: None)
    assert main(["completion"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'dpp_lightning[completion]'" in error
    assert error.count("\n") == 1
