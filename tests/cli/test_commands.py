"""The console command where nothing heavy is asked for: help, the list of configs, names and their nearest."""

import subprocess
import sys

import pytest
import yaml

from dpp_lightning._version import __version__
from dpp_lightning.cli import packaged_configs
from dpp_lightning.cli.commands import COMMANDS, main

HEAVY = ("torch", "transformers", "lightning", "numpy", "huggingface_hub")
PARSERS = ("jsonargparse", "yaml")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- light commands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "heavy"),
    [
        (["--help"], 0, (*HEAVY, *PARSERS)),
        (["--version"], 0, (*HEAVY, *PARSERS)),
        (["configs"], 0, HEAVY),
        (["configs", "quickstart"], 0, HEAVY),
        (["configs", "--help"], 0, HEAVY),
        (["plan"], 0, HEAVY),
        ([], 2, (*HEAVY, *PARSERS)),
        (["fti"], 2, (*HEAVY, *PARSERS)),
        (["fit", "--config", "bert_cola_adamrr.yaml"], 2, (*HEAVY, *PARSERS)),
    ],
)
def test_light_commands_import_nothing_heavy(arguments, code, heavy, here):
    program = (
        "import sys; from dpp_lightning.cli import main; code = main(sys.argv[1:]); "
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.splitlines()[-1] == "[]"


def test_importing_the_package_imports_nothing_heavy():
    program = f"import sys, dpp_lightning; print([name for name in {(*HEAVY, *PARSERS)} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"


def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "dpp_lightning", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"dpp {__version__}\n")


def test_a_reader_that_leaves_early_sees_no_traceback():
    command = f"{sys.executable} -m dpp_lightning configs | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize(("typed", "meant"), [("fti", "fit"), ("valdate", "validate"), ("config", "configs")])
def test_unknown_command_suggests_the_nearest(typed, meant, capsys):
    assert main([typed]) == 2
    error = capsys.readouterr().err
    assert f"did you mean {meant}?" in error
    assert error.count("\n") == 1


def test_option_before_the_command_says_where_it_belongs(capsys):
    assert main(["--config", "quickstart.yaml", "fit"]) == 2
    assert "a command comes before --config" in capsys.readouterr().err


def test_configs_lists_each_with_its_first_comment_line(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == packaged_configs.names()
    assert all(
        line.endswith(packaged_configs.title(name)) for line, name in zip(lines, packaged_configs.names(), strict=True)
    )


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_configs_prints_one_that_yaml_reads_back(name, capsys):
    assert main(["configs", name]) == 0
    assert "model" in yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments",
    [
        ["configs", "bert_cola_adamrr.yaml"],
        ["fit", "-c", "bert_cola_adamrr.yaml"],
        ["fit", "--config=bert_cola_adamrr"],
    ],
)
def test_wrong_config_name_suggests_the_nearest_in_one_line(arguments, here, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "did you mean bert_cola_adamr.yaml?" in error
    assert error.count("\n") == 1


# --- which config a name means --------------------------------------------------------------------------------------


def test_local_file_wins_over_the_packaged_one(here):
    packaged = str(packaged_configs.path("quickstart.yaml"))
    assert packaged_configs.resolve("quickstart.yaml") == packaged_configs.resolve("quickstart") == packaged
    (here / "quickstart").mkdir()  # a folder of that name is no config
    assert packaged_configs.resolve("quickstart") == packaged
    (here / "quickstart.yaml").write_text("trainer: {max_epochs: 1}")
    assert packaged_configs.resolve("quickstart.yaml") == "quickstart.yaml"


@pytest.mark.parametrize(
    "value", ["{trainer: {max_epochs: 1}}", "trainer:\n  max_epochs: 1", "s3://bucket/config.yaml"]
)
def test_inline_configs_and_addresses_pass_unchanged(value, here):
    assert packaged_configs.resolve_arguments(["fit", "--config", value, f"-c={value}"]) == [
        "fit",
        "--config",
        value,
        f"-c={value}",
    ]


def test_missing_path_is_named(here):
    with pytest.raises(packaged_configs.UsageError, match=r"nope\.yaml' does not exist"):
        packaged_configs.resolve("runs/nope.yaml")
