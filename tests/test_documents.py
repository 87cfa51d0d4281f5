"""The pages keep their word: links lead somewhere, Python runs, command lines parse, README.md stays short."""

import ast
import importlib
import re
import shlex
from contextlib import ExitStack
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from parse_only import Parsed, ParseOnly

from dpp_lightning.analysis.theory import LARGE_DELTA, recommend
from dpp_lightning.cli import packaged_configs
from dpp_lightning.cli.commands import COMMANDS
from dpp_lightning.cli.exit_codes import MEANINGS
from dpp_lightning.cli.sweep import SweepCLI
from dpp_lightning.methods import METHODS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = {
    "README.md",
    "CHANGELOG.md",
    "dpp_lightning/README.md",
    "dpp_lightning/tasks/README.md",
    "callbacks/README.md",
    "configs/README.md",
    "configs/papers/README.md",
    "tests/README.md",
    "tests/benchmarks/README.md",
    ".github/CONTRIBUTING.md",
    ".github/SECURITY.md",
}
COMMANDS_FOR_USERS = ("pip install -e . && dpp fit --config quickstart.yaml", "pip install -e '.[dev]' && pytest")
LIGHTNING = ("fit", "validate", "test", "predict", "sweep")


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def prose(page):
    """The page without its code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE))


def anchors(page):
    """What a heading is called in an address: lower case, words joined by hyphens, numbered where it comes again."""
    names: list[str] = []
    without_code = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ (.*)$", without_code, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        names.append(slug if slug not in names else f"{slug}-{names.count(slug)}")
    return names


def links(page):
    return re.findall(r"\]\(([^()\s]+)\)", prose(page))


def files(suffix):
    """Paths of the project's own files of a suffix."""
    folders = ("dpp_lightning", "callbacks", "configs", "tests", ".github")
    paths = [*ROOT.glob(f"*{suffix}"), *(path for folder in folders for path in (ROOT / folder).rglob(f"*{suffix}"))]
    return {path.relative_to(ROOT).as_posix() for path in paths if "fixtures" not in path.parts}


def test_these_are_all_the_pages():
    assert files(".md") == PAGES


@pytest.mark.parametrize("page", sorted(PAGES))
def test_files_and_tests_that_a_page_names_are_there(page):
    modules = files(".py")
    source = "".join(text_of(path) for path in modules if path.startswith("tests/"))
    for name in re.findall(r"`([\w/.]+\.py)`", text_of(page)):
        assert any(f"/{path}".endswith(f"/{name}") for path in modules), name
    for name in re.findall(r"`(test_\w+)`", text_of(page)):
        assert f"def {name}(" in source, name


@pytest.mark.parametrize("page", sorted(PAGES))
def test_relative_links_and_anchors_lead_somewhere(page):
    dead = []
    for link in links(page):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.resolve().relative_to(ROOT))):
            dead.append(link)
    assert dead == []


def test_every_page_can_be_reached_from_the_readme():
    reached, new = set(), {"README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        for link in links(page):
            target = ((ROOT / page).parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.is_relative_to(ROOT):
                new |= {target.relative_to(ROOT).as_posix()} - reached
    assert reached | {"CHANGELOG.md"} == PAGES


@pytest.mark.parametrize("page", sorted(page for page in PAGES if blocks(page, "python")))
def test_python_blocks_run_in_order_in_one_folder(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(METHODS, "_rows", dict(METHODS))  # what a page registers is gone afterwards
    names: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)
    assert capsys.readouterr().out
    if page == "README.md":
        assert len(list((tmp_path / "deltas").glob("darex-q-*"))) == 2


def command_lines():
    """(page, words) of every ``dpp`` command in a ``bash`` block, from the command's name on."""
    for page in sorted(PAGES):
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(re.split(r" [>|] ", line)[0], comments=True)
                for index, word in enumerate(words):
                    if word == "dpp" or words[index - 1 : index + 1] == ["-m", "dpp_lightning"]:
                        yield page, words[index + 1 :]


LINES = sorted({tuple(words) for _, words in command_lines()})


def test_there_are_command_lines_of_every_command():
    assert {words[0] for words in LINES} == set(COMMANDS)


@pytest.mark.parametrize("words", [w for w in LINES if w[0] not in LIGHTNING], ids=" ".join)
def test_command_lines_on_files_parse(words):
    command = resolve_name(COMMANDS[words[0]].entry.removesuffix(".run"))
    command.parser(words[0]).parse_args(command.join_lists(words[1:]))


class ParseOnlySweep(SweepCLI):
    """The sweep, stopped behind its parser."""

    before_instantiate_classes = ParseOnly.before_instantiate_classes


@pytest.mark.parametrize("words", [w for w in LINES if w[0] in LIGHTNING], ids=" ".join)
def test_command_lines_of_lightning_parse(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--ckpt_path" in words:
        checkpoint = Path(words[words.index("--ckpt_path") + 1])
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": {}}, checkpoint)
    command, *arguments = packaged_configs.resolve_arguments(words)
    with pytest.raises((Parsed, SystemExit)) as stopped, ExitStack() as stack:  # the latter after help and print_config
        ParseOnlySweep(arguments, stack) if command == "sweep" else ParseOnly([command, *arguments])
    assert isinstance(stopped.value, Parsed) or not stopped.value.code


def test_readme_is_short():
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 100


def test_the_two_commands_are_there_and_ci_runs_the_second():
    for command in COMMANDS_FOR_USERS:
        assert command in text_of("README.md")
    assert COMMANDS_FOR_USERS[1] in text_of(".ci/run")


def test_the_readme_recommends_what_dpp_inspect_recommends():
    advice = re.findall(r"^\d\. (.*)$", text_of("README.md").split("## Which method?")[1].split("##")[0], re.MULTILINE)
    small, large = LARGE_DELTA / 10, LARGE_DELTA * 2
    expected = [
        recommend(small, can_retrain=True),
        recommend(small),
        recommend(small, labels=True),
        recommend(large, labels=True),
        recommend(large),
        recommend(large, inputs=False),
    ]
    assert len(advice) == len(expected)
    for line, recommendation in zip(advice, expected, strict=True):
        assert f"`{recommendation.method}`" in line
        assert (recommendation.optimizer or "") in line
    assert [expected[1].objective, expected[2].objective] == ["output change", "metric"]
    assert "change of the output" in advice[1]
    assert "metric" in advice[2]
    assert all(f"{LARGE_DELTA:g}" in line for line in (advice[1], advice[3]))


def test_every_method_has_its_line_in_the_table_with_its_settings():
    table = text_of("dpp_lightning/README.md").split("\n## Methods")[1].split("\n## ")[0]
    for name, method in METHODS.items():
        (row,) = (line for line in table.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1])
        shown = row.split("|")[5] if r"\|" not in row else row
        for setting, choices in method.settings.items():
            assert f"`{setting}`" in shown or "as `dp`" in shown, (name, setting)
            assert all(f"`{choice}`" in shown for choice in choices) or "as `dp`" in shown, (name, choices)


def test_every_recipe_and_exit_code_has_its_row():
    page = text_of("configs/README.md")
    for name in packaged_configs.names():
        assert f"`{name.removesuffix('.yaml')}`" in page
    for code, meaning in MEANINGS.items():
        assert f"| {code} | {meaning} |" in page


@pytest.mark.parametrize("script", sorted((ROOT / "tests/benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_have_a_place_on_their_page_and_import_what_is_there(script):
    assert f"`{script.name}`" in text_of("tests/benchmarks/README.md")
    source = script.read_text(encoding="utf-8")
    ast.parse(source)
    for module, names in re.findall(r"from (dpp_lightning[\w.]*) import ([\w, ]+)", source):  # also in texts that run
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip()), (module, name)
