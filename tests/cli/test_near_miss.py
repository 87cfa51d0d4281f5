"""A refused command line or config is one line on stderr: what is wrong, where it stands, what was meant."""

import shlex
from argparse import ArgumentError
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from dpp_lightning.cli import main, packaged_configs
from dpp_lightning.cli.near_miss import explain
from dpp_lightning.tasks.common.lora import LoRA

QUICKSTART = "fit --config quickstart.yaml"
COLA = "fit --config bert_cola_adamr.yaml"
CALLBACK = "--trainer.callbacks+=DeltaPruneCallback"

# command line, what is refused, what was meant
OPTIONS = [
    # the command's own options
    ("fit --confg quickstart.yaml", "--confg is not an option", "--config"),
    (f"{QUICKSTART} --seed_everythin 1", "--seed_everythin is not an option", "--seed_everything"),
    (f"{QUICKSTART} --ckpt-path x.ckpt", "--ckpt-path is not an option", "--ckpt_path"),
    ("predict --config quickstart.yaml --outputs p.jsonl", "--outputs is not an option", "--output"),
    ("validate --config quickstart.yaml --detla d", "--detla is not an option", "--delta"),
    (f"{QUICKSTART} --modle.pretrained x", "--modle.pretrained is not an option", "--model.pretrained"),
    ("fit quickstart.yaml", "the argument quickstart.yaml is not expected", "--config quickstart.yaml"),
    # Lightning's Trainer
    (f"{QUICKSTART} --trainer.max_epoch 3", "--trainer.max_epoch is not an option", "--trainer.max_epochs"),
    (f"{QUICKSTART} --trainer.max-epochs=3", "--trainer.max-epochs is not an option", "--trainer.max_epochs"),
    (f"{QUICKSTART} --trainer.Precision 32", "--trainer.Precision is not an option", "--trainer.precision"),
    (f"{QUICKSTART} --trainer.precision bf16mixed", "--trainer.precision bf16mixed is not one of", "bf16-mixed"),
    # a class's settings, with and without init_args, at any depth
    (f"{QUICKSTART} --model.pretraned x", "--model.pretraned is not a setting of VisionModule", "--model.pretrained"),
    (f"{QUICKSTART} --model.init_args.pretraned x", "is not a setting of VisionModule", "--model.pretrained"),
    (f"{QUICKSTART} --model.optimizer.lrr 1", "is not a setting of AdamR", "--model.optimizer.lr"),
    (f"{QUICKSTART} --data.class 3", "is not a setting of DigitsDataModule", "--data.classes"),
    (f"{COLA} --model.lora.rank 8", "is not a setting of LoRA", None),
    (f"{COLA} --model.lora.target_module all-linear", "is not a setting of LoRA", "--model.lora.target_modules"),
    (f"{COLA} --data.batchsize 8", "is not a setting of GLUEDataModule", "--data.batch_size"),
    (f"{QUICKSTART} {CALLBACK} --trainer.callbacks.pruning_rates 0.5", "of DeltaPruneCallback", "pruning_rate"),
    (f"{QUICKSTART} --trainer.callbacks.methods dare", "of DeltaPruneCallback", "--trainer.callbacks.method"),
    (
        f"{QUICKSTART} --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.filenam x",
        "of ModelCheckpoint",
        "filename",
    ),
    (f"{QUICKSTART} --trainer.strategy FSDP2Strategy --trainer.strategy.time_out 1", "of FSDP2Strategy", "timeout"),
    # names of classes
    ("fit --model GLUEModul", "--model GLUEModul is not a known LightningModule", "GLUEModule"),
    ("fit --model gluemodule", "is not a known LightningModule", "GLUEModule"),
    (f"{QUICKSTART} --data DigitDataModule", "is not a known LightningDataModule", "DigitsDataModule"),
    (f"{QUICKSTART} --model.optimizer AdamRR", "is not a known Optimizer", "AdamR"),
    (f"{QUICKSTART} --model.scheduler linera", "is not one of linear, constant or a known LRScheduler", "linear"),
    (f"{QUICKSTART} --model.scheduler CosineAnealingLR", "a known LRScheduler", "CosineAnnealingLR"),
    (f"{QUICKSTART} --model.optimizer torch.optim.AdanW", "is not a known Optimizer", "AdamW"),
    (f"{QUICKSTART} --trainer.callbacks+=DeltaPruneCalback", "is not a known Callback", "DeltaPruneCallback"),
    (f"{QUICKSTART} --trainer.callbacks [EarlyStoping]", "EarlyStoping is not a known Callback", "EarlyStopping"),
    (f"{QUICKSTART} --trainer.logger CSVLoger", "is not a known Logger", "CSVLogger"),
    (f"{QUICKSTART} --trainer.strategy FSDP2Strateg", "FSDP2Strateg is not known", "FSDP2Strategy"),
    (f"{QUICKSTART} --trainer.strategy ddpp", "ddpp is not known", "ddp"),
    (f"{QUICKSTART} --model.help VisionModul", "is not a known LightningModule", "VisionModule"),
    (
        f"{QUICKSTART} --trainer.callbacks '[{{class_path: EarlyStoping}}]'",
        "--trainer.callbacks, line 1: trainer.callbacks[0]: EarlyStoping is not a known Callback",
        "EarlyStopping",
    ),
    (
        f"{QUICKSTART} --trainer.callbacks '[{{class_path: EarlyStopping, init_args: {{patience: 1, montor: x}}}}]'",
        "trainer.callbacks[0].montor is not a setting of EarlyStopping",
        "monitor",
    ),
    (  # the list takes the place of the config's, and the option means its last
        f"{COLA} --trainer.callbacks '[{{class_path: EarlyStopping, init_args: {{monitor: x}}}}]' "
        "--trainer.callbacks.patienc 3",
        "--trainer.callbacks.patienc is not a setting of EarlyStopping",
        "--trainer.callbacks.patience",
    ),
    # values
    (f"{QUICKSTART} --trainer.max_epochs three", "--trainer.max_epochs three is not a whole number or null", None),
    (f"{QUICKSTART} --trainer.max_epochs", "--trainer.max_epochs needs a value", None),
    (f"{QUICKSTART} --model.optimizer.lr high", "--model.optimizer.lr high is not a number", None),
    (
        f"{QUICKSTART} --model.optimizer AdamW --model.optimizer.lr high",
        "--model.optimizer.lr high is not a number",
        None,
    ),
    (f"{QUICKSTART} --data.classes [a]", "is not a list of whole numbers or null", None),
    (f"{QUICKSTART} --trainer.callbacks.mode maxi", "is not one of max, min", "max"),
    (f"{QUICKSTART} --trainer.max_epochs.x 3", "has no settings of its own", None),
    # nothing near: then where they are listed
    (f"{QUICKSTART} --model.image_size 3", "(dpp fit --model.help VisionModule lists them)", None),
    (f"{QUICKSTART} --xyz 3", "(dpp fit --help lists them)", None),
    # required settings
    ("fit --model VisionModule --data ImageDataModule", "--data.path is missing: ImageDataModule needs it", None),
    ("fit --model GLUEModule --data GLUEDataModule", "--model.task is missing: GLUEModule needs it", None),
    (f"{QUICKSTART} --trainer.logger CSVLogger", "--trainer.logger.save_dir is missing: CSVLogger needs it", None),
]

# a config, the line and what is refused on it, what was meant
CONFIGS = [
    ("trainer: {max_epoch: 3}", "line 1: trainer.max_epoch is not a setting", "max_epochs"),
    ("modle:\n  class_path: GLUEModule\n  init_args: {task: cola}", "line 2: modle is not a setting", "model"),
    (
        "model:\n  class_path: GLUEModule\n  init_args:\n    task: cola\n    pretraned: x",
        "line 5: model.pretraned is not a setting of GLUEModule",
        "pretrained",
    ),
    (  # the class may stand behind its settings
        "model:\n  init_args:\n    task: cola\n    pretraned: x\n  class_path: GLUEModule",
        "line 4: model.pretraned is not a setting of GLUEModule",
        "pretrained",
    ),
    (
        "model:\n  class_path: GLUEModule\n  init_args: {task: cola, optimizer: {class_path: AdamR, init_args: {lrr: 1}}}",
        "line 3: model.optimizer.lrr is not a setting of AdamR",
        "lr",
    ),
    ("model: {class_path: GLUEModul}", "line 1: model: GLUEModul is not a known LightningModule", "GLUEModule"),
    ("model: GLUEModul", "line 1: model: GLUEModul is not a known LightningModule", "GLUEModule"),
    (
        "trainer:\n  callbacks:\n    - class_path: ModelCheckpoint\n    - class_path: DeltaPruneCallback\n"
        "      init_args:\n        pruning_rates: [0.9]",
        "line 6: trainer.callbacks[1].pruning_rates is not a setting of DeltaPruneCallback",
        "pruning_rate",
    ),
    (
        "trainer:\n  callbacks:\n    - class_path: DeltaPruneCalback",
        "line 3: trainer.callbacks[0]: DeltaPruneCalback is not a known Callback",
        "DeltaPruneCallback",
    ),
    ("trainer: {max_epochs: three}", "line 1: trainer.max_epochs: three is not a whole number or null", None),
    ("trainer: {max_epochs: 3, devices: 1,\n  max_epochs: 4}", "trainer.max_epochs twice, on lines 1 and 2", None),
    ("trainer:\n\tmax_epochs: 3", "line 2 is no YAML", None),
]


def refused(command, capsys):
    """The one line that a command line is refused with, and nothing is built."""
    assert main(shlex.split(command)) == 2
    line, newline, rest = capsys.readouterr().err.partition("\n")
    assert (newline, rest) == ("\n", "")
    assert "NestedArg" not in line
    return line.removeprefix(f"dpp {command.split()[0]}: error: ")


@pytest.fixture(autouse=True)
def _nothing_is_built(monkeypatch):
    monkeypatch.setattr("dpp_lightning.cli.lightning.DPPCLI.instantiate_classes", None)


@pytest.mark.parametrize(("command", "wrong", "meant"), OPTIONS)
def test_option(command, wrong, meant, capsys):
    line = refused(command, capsys)
    assert wrong in line
    assert ("did you mean" in line) == (meant is not None)
    assert meant is None or line.endswith((f" {meant}?", f".{meant}?"))


@pytest.mark.parametrize(("text", "wrong", "meant"), CONFIGS)
def test_config_file(text, wrong, meant, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text)
    line = refused("fit --config mine.yaml", capsys)
    assert line.startswith("mine.yaml")
    assert wrong in line
    assert line.endswith(f"did you mean {meant}?") or (meant is None and "did you mean" not in line)


def test_all_faults_are_in_the_line_each_once(capsys):
    line = refused(f"{QUICKSTART} --trainer.max_epoch 3 --modle.a 1 --modle.b 2 --data.class 3", capsys)
    assert line.count("did you mean") == 3
    assert line.count("modle") == 1


def test_settings_that_are_right_are_never_called_wrong(capsys):
    """The fault is one misspelled key behind settings of every kind that classes take."""
    right = [
        "--model.model_kwargs.anything 3",  # keys of the user's choice
        "--model.optimizer torch.optim.SGD --model.optimizer.momentum 0.9",  # another class than the config's
        "--data.classes [5,6]",
        "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor val_score",
        "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.monitor val_score",
        "--trainer.logger.class_path CSVLogger --trainer.logger.save_dir logs",
        "--trainer.devices 2 --trainer.limit_train_batches 0.5 --trainer.max_time 00:01:00:00",
        "--seed_everything=3",
    ]
    line = refused(f"{QUICKSTART} {' '.join(right)} --trainer.max_epoch 3", capsys)
    assert line == "--trainer.max_epoch is not an option: did you mean --trainer.max_epochs?"


@pytest.mark.parametrize("name", packaged_configs.names())
def test_nothing_in_a_packaged_config_is_called_wrong(name, capsys):
    line = refused(f"{QUICKSTART} --config {name} --trainer.max_epoch 3", capsys)
    assert line == "--trainer.max_epoch is not an option: did you mean --trainer.max_epochs?"


# --- a parser made from a function's signature ------------------------------------------------------------------------


def prune(base: str, finetuned: str, method: str = "dare", pruning_rate: float = 0.9, lora: LoRA | None = None):
    """A command of two arguments and some options."""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("a b --methd dare", "--methd is not an option: did you mean --method?"),
        ("a b --pruning-rate 0.5", "--pruning-rate is not an option: did you mean --pruning_rate?"),
        ("a b --pruning_rate x", "--pruning_rate x is not a number"),
        ("a b c", "the argument c is not expected (dpp prune --help lists the options)"),
        ("a", "finetuned is missing: dpp prune needs it"),
        ("a b --lora.r x", "--lora.r x is not a whole number"),
        ("--config mine.yaml", "mine.yaml, line 2: metod is not a setting: did you mean method?"),
    ],
)
def test_parser_of_a_function(words, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("{base: a, finetuned: b,\n metod: dare}")
    parser = ArgumentParser("dpp prune", exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(prune, as_positional=True)
    with pytest.raises(ArgumentError) as error:
        parser.parse_args(words.split())
    assert explain(error.value, parser, words.split()) == line


def test_an_unknown_fault_is_the_parsers_own_message_in_one_line():
    message = 'Parser key "a":\n  Does not validate\n  Errors:\n    - Expected a path\n    - Expected a number\n'
    assert explain(message, ArgumentParser("dpp x"), []) == "a: Expected a path"
