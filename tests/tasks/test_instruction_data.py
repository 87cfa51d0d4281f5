"""Instruction data: prompts, labels, splits, columns, and what is refused in setup; on sums in words."""

import pytest
from causal_fits import attached, data_of, module_of, trainer_of, write_files
from datasets import Dataset
from tiny_causal import make_decoder, make_rows, make_tokenizer, save_decoder, write_rows

from dpp_lightning.tasks.causal_lm import InstructionDataModule
from dpp_lightning.tasks.causal_lm.prompts import PROMPTS, prompt_tokens, resolve_prompt
from dpp_lightning.tasks.causal_lm.source import Source


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("data"))


def test_the_papers_prompts():
    assert PROMPTS["metamath"].training.endswith("### Instruction:\n{question}\n\n### Response:")
    assert PROMPTS["metamath"].generation == PROMPTS["metamath"].training + " Let's think step by step."
    tokenizer = make_tokenizer()
    trained, generated = prompt_tokens(tokenizer, resolve_prompt("The answer: {question}"), ["What is {1}?"])
    assert tokenizer.decode(trained[0]) == tokenizer.decode(generated[0]) == "The answer: What is {1}?"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    assert tokenizer.decode(prompt_tokens(tokenizer, resolve_prompt("chat"), ["What"])[0][0]) == "What:"


@pytest.mark.parametrize("prompt", ["metamaht", "{}"])
def test_an_unknown_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match=r"expected one of metamath, alpaca, plain, chat"):
        InstructionDataModule(prompt=prompt)


def test_labels_are_the_answer_and_its_end_alone(base, files, tmp_path):
    module, data = attached(base, files, tmp_path)
    batch = next(iter(data.train_dataloader()))
    tokenizer = module.tokenizer
    for tokens, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        text = tokenizer.decode(tokens[mask.bool()])
        question, answer = text.split("\n", 1)
        assert tokenizer.decode(labels[labels != -100]) == answer
        assert answer.endswith("<end>")
        assert question.startswith("What is")
        assert tokens[mask == 0].eq(1).all()


def test_the_splits_are_disjoint_complete_and_of_the_split_seed(base, files, tmp_path):
    rows = make_rows(200)
    for i, row in enumerate(rows):
        row["answer"] = f"{i}\n{row['answer']}"
    numbered = {**files, "path": write_rows(tmp_path / "numbered.jsonl", rows)}
    cuts = []
    for settings in ({}, {"seed": 5}, {"split_seed": 1}, {"val_samples": 3}):
        data = attached(base, numbered, tmp_path, **settings)[1]
        cuts.append(
            {
                name: [int(a.split("\n")[0]) for a in data.texts[name]["answer"]]
                for name in ("train", "val", "calibration")
            }
        )
    assert sorted(row for rows in cuts[0].values() for row in rows) == list(range(200))
    assert {name: len(rows) for name, rows in cuts[0].items()} == {"train": 170, "val": 20, "calibration": 10}
    assert cuts[1] == cuts[0]
    assert cuts[2]["val"] != cuts[0]["val"]
    assert set(cuts[3]["val"]) < set(cuts[0]["val"])
    assert len(cuts[3]["val"]) == 3


def test_columns_are_found_and_a_parquet_file_will_do(base, files, tmp_path):
    rows = make_rows(40)
    Dataset.from_dict(
        {"query": [r["question"] for r in rows], "type": ["x"] * 40, "response": [r["answer"] for r in rows]}
    ).to_parquet(tmp_path / "a.parquet")
    data = attached(base, {**files, "path": str(tmp_path / "a.parquet")}, tmp_path)[1]
    assert data.texts["train"].column_names == ["question", "answer"]
    assert set(data.texts["train"]["question"]) <= {r["question"] for r in rows}


def test_a_folder_in_the_hubs_layout_will_do(base, tmp_path):
    for split, count in (("train", 40), ("test", 7)):
        (tmp_path / "set" / "main").mkdir(parents=True, exist_ok=True)
        Dataset.from_list(make_rows(count)).to_parquet(tmp_path / "set" / "main" / f"{split}-00000-of-00001.parquet")
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n  - split: test\n    path: main/test-*\n---\n"
    (tmp_path / "set" / "README.md").write_text(card)
    data = attached(base, {"path": str(tmp_path / "set")}, tmp_path, test_samples=5)[1]
    assert (len(data.splits["train"]), len(data.splits["test"])) == (34, 5)


def broken(**changes):
    rows = make_rows(40)
    rows[17] = {**rows[17], **changes}
    return rows


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"text": "a"}], {}, r"found the columns \['text'\], expected one of question, query.*data\.question_column"),
        (make_rows(40), {"question_column": "ask"}, r"expected 'ask'"),
        (broken(answer=" "), {}, r"row 17 has the answer ' '"),
        (broken(question=None), {}, r"row 17 has the question None"),
        (
            broken(answer="1+1=2"),
            {"val_fraction": 0.9, "calibration_fraction": 0.0},
            r"no final answer behind #### or The answer is",
        ),
        (
            broken(question="What is " + "1+" * 20),
            {"val_fraction": 0.0, "calibration_fraction": 0.0},
            r"1 of 40 training samples have more than 32.*too_long: drop",
        ),
        (make_rows(40), {"max_length": 65}, r"max_length is 65, but the model takes 2 to 64"),
        (make_rows(10), {"val_fraction": 0.6, "calibration_fraction": 0.39}, r"too few"),
        (make_rows(40), {"test_path": "nowhere.jsonl"}, r"nowhere\.jsonl: no such file"),
        (make_rows(40), {"prompt": "chat"}, r"no chat template"),
    ],
)
def test_what_is_wrong_is_said_in_setup(base, files, tmp_path, rows, settings, message):
    faulty = {**files, "path": write_rows(tmp_path / "rows.jsonl", rows)}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        attached(base, faulty, tmp_path, **settings)


def test_prompts_that_leave_no_room_for_an_answer_are_refused(base, files, tmp_path):
    with pytest.raises(ValueError, match=r"tokens and max_new_tokens is 60, but the model takes 64 together"):
        trainer_of(tmp_path).validate(module_of(base, max_new_tokens=60), data_of(files))


def test_samples_that_are_too_long_are_left_out_on_request(base, files, tmp_path):
    with_long = {**files, "path": write_rows(tmp_path / "rows.jsonl", broken(question="What is " + "1+" * 20))}
    data = attached(base, with_long, tmp_path, val_fraction=0.0, calibration_fraction=0.0, too_long="drop")[1]
    assert len(data.splits["train"]) == 39
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match="calibration_fraction"):
        data.calibration_dataloader()


def test_a_tokenizer_without_padding_will_do_and_one_without_an_end_will_not(files, tmp_path):
    make_decoder().save_pretrained(tmp_path / "base")
    make_tokenizer(pad=None).save_pretrained(tmp_path / "base")
    module = module_of(str(tmp_path / "base"))
    scores = trainer_of(tmp_path).validate(module, data_of(files), verbose=False)[0]
    reference = module_of(save_decoder(tmp_path / "padded"))
    assert scores == pytest.approx(trainer_of(tmp_path).validate(reference, data_of(files), verbose=False)[0])
    module.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        trainer_of(tmp_path).validate(module, data_of(files), verbose=False)


def test_a_test_source_of_several_splits_without_test_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", make_rows(20))
    where = str(tmp_path / "data")
    data = InstructionDataModule(path=where, test_path=where, prompt="plain", tokenizer=save_decoder(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"splits \['train', 'validation'\] and no 'test' among them: give the file"):
        data.setup("fit")


def test_a_file_is_the_test_split_where_the_word_is_in_its_name(tmp_path):
    for name, split in (("latest", "train"), ("gsm8k_test", "test"), ("contest-2", "train"), ("test", "test")):
        write_rows(tmp_path / f"{name}.jsonl", make_rows(5))
        assert list(Source(str(tmp_path / f"{name}.jsonl")).load()) == [split], name
