"""Commands made from functions: what is typed, what a file says, what the help shows, and what a near miss is told."""

import errno
import inspect
import os
import re
from argparse import ArgumentError
from dataclasses import replace
from functools import wraps
from pkgutil import resolve_name

import pytest
from tiny_glue import make_model

from dpp_lightning.cli import main
from dpp_lightning.cli.command import progress_bar
from dpp_lightning.cli.commands import COMMANDS
from dpp_lightning.cli.near_miss import explain

FUNCTIONS = {
    name: resolve_name(command.entry.removesuffix(".run"))
    for name, command in COMMANDS.items()
    if not command.takes_recipes
}
# Of every command: its arguments, and every option with another value than its default.
LINES = {
    "prune": "b f --output o --overwrite --dtype int8 --weights_only --method magnitude --pruning_rate 0.5 --seed 3 --q 0.25 "
    "--method_settings.budget model --settings c=1 --max_bytes 5kB --max_loss 0.5 --scope linear --include a.* b --exclude c --carry d e --outside revert --blocks g "
    "--calibration t.txt --calibration_samples 7 --device cuda --base_revision v1 --finetuned_revision 2 --prefix m.",
    "apply": "b d --output o --overwrite --max_shard_bytes 5 --task t --force --base_revision v1 --delta_revision v2",
    "export": "c --output o --overwrite --dtype float16 --max_shard_bytes 5 --config_from m --config_revision v "
    "--architecture A --prefix p. --base b --base_revision v1 --method magnitude --pruning_rate 0.5 --seed 3 --q 0.5 "
    "--method_settings.budget model --peft --lora_only --task t --force",
    "merge": "b d1 d2 --output o --overwrite --dense e --dtype bfloat16 --method ties --weights 0.5 w.json --tasks x y "
    "--scale 1.5 --trim_rate 0.25 --base_revision v1",
    "inspect": "b f --json --revision v --calibration t.txt --calibration_samples 7 --pruning_rate 0.5 --labels "
    "--can_retrain --base_revision v1 --finetuned_revision v2",
    "eval": "m --tasks t u --output o.json --overwrite --log_samples --delta d --task t --dtype float32 --device cpu "
    "--batch_size 2 --max_length 9 --include_path i --num_fewshot 1 --limit 3 --apply_chat_template",
    "serve": "b sst2=d --task text-generation --force --port 8001 --host 0.0.0.0 --memory 1GB --max_batch_size 2 "
    "--batch_timeout 0.5 --device cpu",
    "reproduce": "darex-table2 --base b --data glue=d --scale small --columns A B --rows C --training_seeds 1 2 --output o "
    "--precision bf16-mixed --download --dry_run",
    "push": "d me/delta --revision v --private --commit_message hello",
    "plan": "m --revision v --parameters 7e9 --blocks 2 --outside 3 --devices 1 2 --device_gib 80 --weights bfloat16 "
    "--compute float32 --pruning_rate 0.5",
    "configs": "quickstart --copy --output o",
    "completion": "zsh",
}


class Recorded:
    """A command whose function notes how it is called."""

    def __init__(self, name):
        self.calls = []
        function = FUNCTIONS[name].function

        @wraps(function)
        def record(**arguments):
            self.calls.append(arguments)

        self.name, self.command, self.signature = (
            name,
            replace(FUNCTIONS[name], function=record),
            inspect.signature(record),
        )

    def run(self, *words):
        return self.command.run([self.name, *words])


@pytest.fixture(params=FUNCTIONS)
def recorded(request):
    return Recorded(request.param)


# --- one command line, one file -------------------------------------------------------------------------------------


def test_a_printed_config_read_back_gives_the_same_run(recorded, tmp_path, capsys):
    words = LINES[recorded.name].split()
    assert recorded.run(*words) == 0
    capsys.readouterr()
    assert recorded.run(*words, "--print_config") == 0
    assert len(recorded.calls) == 1
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert recorded.run("--config", str(tmp_path / "run.yaml")) == 0
    typed, read = recorded.calls
    assert typed == read
    assert typed.keys() == recorded.signature.parameters.keys()
    defaults = {name: p.default for name, p in recorded.signature.parameters.items()}
    assert not [name for name, value in typed.items() if value == defaults[name]]  # or the test would not see it


def test_what_is_typed_wins_over_the_file(tmp_path):
    recorded = Recorded("prune")
    (tmp_path / "run.yaml").write_text("base: b\nfinetuned: f\noutput: o\nseed: 3\nweights_only: true\ncarry: [x]\n")
    words = ["c", "--config", str(tmp_path / "run.yaml"), "--seed", "4", "--no_weights_only", "--carry+", "y"]
    assert recorded.run(*words) == 0
    (call,) = recorded.calls
    expected = {"base": "c", "finetuned": "f", "output": "o", "seed": 4, "weights_only": False, "carry": ["x", "y"]}
    assert {name: call[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "items"),
    [
        (["--carry", "a"], ["a"]),
        (["--carry", "a.*", "b"], ["a.*", "b"]),
        (["--carry", "[a.*, b]"], ["a.*", "b"]),
        (["--carry", "[a.*,", "b]"], ["a.*", "b"]),
        (["--carry=[a, b]"], ["a", "b"]),
        (["--carry", "1", "null"], ["1", "null"]),
        (["--carry", "[ab]*.weight"], ["[ab]*.weight"]),
        (["--carry", "head.*", "--seed", "1"], ["head.*"]),
    ],
)
def test_a_list_is_typed_as_words_or_as_a_list(words, items):
    recorded = Recorded("prune")
    assert recorded.run("b", "f", "--output", "o", *words) == 0
    assert recorded.calls[0]["carry"] == items


def test_method_settings_are_numbers_where_they_read_as_numbers():
    for words in (
        ["--method_settings.a", "0.5", "--method_settings.rows", "x"],
        ["--method_settings", "{a: 0.5, rows: x}"],
    ):
        recorded = Recorded("prune")
        assert recorded.run("b", "f", "--output", "o", *words) == 0
        assert recorded.calls[0]["method_settings"] == {"a": 0.5, "rows": "x"}


def test_a_config_that_was_printed_writes_the_same_bytes(tmp_path, capsys):
    base, tuned = make_model(tmp_path / "base"), make_model(tmp_path / "tuned", seed=1)
    settings = [
        "--method",
        "magnitude",
        "--method_settings.budget",
        "model",
        "--pruning_rate",
        "0.5",
        "--exclude",
        "pooler.*",
    ]
    assert main(["prune", base, tuned, *settings, "--output", str(tmp_path / "typed")]) == 0
    capsys.readouterr()
    assert main(["prune", base, tuned, *settings, "--output", str(tmp_path / "read"), "--print_config"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert main(["prune", "--config", str(tmp_path / "run.yaml")]) == 0
    typed, read = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("typed", "read"))
    assert typed == read


# --- the help -------------------------------------------------------------------------------------------------------


def shown_default(parameter):
    if parameter.default is None:
        return "null"
    return str(list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default)


def test_the_help_shows_every_parameter_with_its_default(recorded, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    assert recorded.run("--help") == 0
    shown = capsys.readouterr().out
    blocks = re.split(r"\n  (?=\S)", shown)
    for name, parameter in recorded.signature.parameters.items():
        option = parameter.kind is parameter.KEYWORD_ONLY
        (block,) = [b for b in blocks if re.match(rf"{f'--{name}' if option else name.upper()}[ ,\n]", b)]
        text = " ".join(block.split())
        if parameter.default is parameter.empty:
            assert "(required, type: " in text
        else:
            assert f"default: {shown_default(parameter)})" in text
    assert all(f"\n{title}:\n" in shown for title in recorded.command.groups)
    assert f"example:\n  {recorded.command.example}\n" in shown


def test_the_example_of_the_help_is_a_command_line(recorded, capsys):
    words = recorded.command.example.partition(" > ")[0].split()
    assert words[:2] == ["dpp", recorded.name]
    assert recorded.run(*words[2:]) == 0
    assert capsys.readouterr().err == ""


# --- near misses, and what is missing or repeated -------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--base-revision", "--bace_revision", "--base_revison", "--base_revision_"])
def test_a_near_miss_of_an_option_is_told_in_a_line(option, capsys):
    recorded = Recorded("apply")
    assert recorded.run("b", "d", "--output", "o", option, "v") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dpp apply: error: {option} ")
    assert error.endswith("did you mean --base_revision?\n")
    assert error.count("\n") == 1
    assert not recorded.calls


def misspelled(name):
    return f"{name}{name[-1]}"


def test_every_option_misspelled_is_told_in_a_line(recorded):
    """Each option with its last letter doubled."""
    words, parser = LINES[recorded.name].split(), recorded.command.parser(recorded.name)
    for name, parameter in recorded.signature.parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            line = recorded.command.join_lists([*words, f"--{misspelled(name)}", "x"])
            with pytest.raises(ArgumentError) as refused:
                parser.parse_args(line)
            told = explain(refused.value, parser, line)
            assert f"--{misspelled(name)}" in told
            assert told.endswith(f"did you mean --{name}?")
            assert "\n" not in told


def test_a_misspelled_key_of_a_file_is_told_with_its_line(recorded, tmp_path, capsys):
    name = next(iter(recorded.signature.parameters))
    (tmp_path / "run.yaml").write_text(f"# a run\n{misspelled(name)}: x\n")
    assert recorded.run("--config", str(tmp_path / "run.yaml")) == 2
    error = capsys.readouterr().err
    assert "run.yaml, line 2" in error
    assert f"did you mean {name}?" in error
    assert error.count("\n") == 1
    assert not recorded.calls


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("prune b f", "--output is missing"),
        ("prune b --output o", "FINETUNED is missing"),
        ("merge b --output o", "DELTAS is missing"),
        ("apply b d e --output o", "the argument e is not expected"),
        ("prune b f --output o --method darex_q", "did you mean darex-q?"),
        ("prune b f --output o --scope linaer", "did you mean linear?"),
        ("prune b f --output o --seed one", "--seed one is not a whole number"),
        ("prune b f --output o --pruning_rate half", "--pruning_rate half is not a number"),
        ("prune b f --output o --seed 1 --seed 2", "--seed is given twice, 1 and 2: keep one"),
        ("prune b f --output o --carry", "--carry"),
        ("prune --config nowhere.yaml", "the config file 'nowhere.yaml' does not exist"),
        ("plan --weights bfloat61", "did you mean bfloat16?"),
        ("completion fish", "fish is not one of bash, zsh, tcsh"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(line, said, capsys):
    name, *words = line.split()
    recorded = Recorded(name)
    assert recorded.run(*words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith(f"dpp {name}: error: ")
    assert error.count("\n") == 1
    assert not recorded.calls


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("base: b\nbase: c\n", "run.yaml sets base twice, on lines 1 and 2"),
        ("seed: one\n", "run.yaml, line 1"),
        ("weights_only: 3\n", "run.yaml, line 1"),
        ("carry: [1\n", "is no YAML"),
        ("base: caf\u00e9\n", "run.yaml is no text in UTF-8: its byte 10 is 0xe9"),
    ],
)
def test_a_wrong_file_is_told_with_its_line(content, said, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(content, encoding="latin-1")
    recorded = Recorded("prune")
    assert recorded.run("b", "f", "--output", "o", "--config", str(tmp_path / "run.yaml")) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_near_miss_of_a_method_s_setting_is_told_in_a_line(tmp_path, capsys):
    words = ["--method", "magnitude", "--method_settings.budgte", "model", "--output", str(tmp_path / "o")]
    assert main(["prune", "b", "f", *words]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'budget'?" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("way", ["typed", "file"])
def test_a_tilde_is_the_home_directory_where_no_shell_has_seen_it(way, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("base: ~/b\ndeltas: [~/d, e]\noutput: ~/out\n")
    words = ["~/b", "~/d", "e", "--output=~/out"] if way == "typed" else ["--config", str(tmp_path / "c.yaml")]
    merge = Recorded("merge")
    assert merge.run(*words) == 0
    given = merge.calls[-1]
    assert (given["base"], given["output"]) == (f"{tmp_path}/b", f"{tmp_path}/out")
    assert given["deltas"] == [f"{tmp_path}/d", "e"]


# --- exit codes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (None, 0, ""),
        (FileNotFoundError("no such file"), 2, "dpp configs: error: no such file\n"),
        (FileExistsError("in the way"), 2, "dpp configs: error: in the way\n"),
        (
            OSError(errno.ENOSPC, "disk full"),
            1,
            "dpp configs: failed: [Errno 28] disk full\n",
        ),
        (MemoryError("no memory"), 1, "dpp configs: failed: no memory\n"),
        (KeyboardInterrupt(), 130, "\ndpp: stopped\n"),
    ],
)
def test_exit_codes(raised, code, said, monkeypatch, capsys):
    def act(name: str | None = None) -> None:
        """Act.

        Args:
            name: not used
        """
        if raised is not None:
            raise raised

    monkeypatch.setattr("dpp_lightning.cli.configs.COMMAND", replace(FUNCTIONS["configs"], function=act, groups={}))
    assert main(["configs"]) == code
    assert capsys.readouterr().err == said
    monkeypatch.setenv("DPP_TRACEBACK", "1")
    if isinstance(raised, Exception):
        with pytest.raises(type(raised)):
            main(["configs"])


def test_help_says_what_each_exit_code_means(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    section = shown[shown.index("exit codes:") :]
    assert re.findall(r"^  (\d+) ", section, re.MULTILINE) == ["0", "1", "2", "130", "143"]


def test_a_log_shows_once_a_minute_what_is_tried(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("dpp_lightning.cli.command.time.monotonic", lambda: now[0])
    with progress_bar("pruning") as progress:
        for step in range(130):
            now[0] += 1
            progress.stage(f"step {step}")
    lines = [line for line in capsys.readouterr().err.splitlines() if "━" not in line]
    assert [line for line in lines if "step" in line] == ["pruning: step 59", "pruning: step 119"]


# --- dpp configs --copy ---------------------------------------------------------------------------------------------


def test_a_recipe_is_copied_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "quickstart", "--copy"]) == 0
    assert "quickstart.yaml: change it, then dpp fit --config quickstart.yaml" in capsys.readouterr().err
    copied = (tmp_path / "quickstart.yaml").read_text()
    assert main(["configs", "quickstart"]) == 0
    assert capsys.readouterr().out == copied
    (tmp_path / "quickstart.yaml").write_text("mine")
    assert main(["configs", "quickstart.yaml", "--copy"]) == 2
    assert "quickstart.yaml exists and is not overwritten" in capsys.readouterr().err
    assert (tmp_path / "quickstart.yaml").read_text() == "mine"
    assert main(["configs", "quickstart", "--copy", "--output", "new/folder"]) == 0
    assert (tmp_path / "new/folder/quickstart.yaml").read_text() == copied
    assert main(["configs", "--copy"]) == 2
    assert sorted(os.listdir()) == ["new", "quickstart.yaml"]
