"""Files become sequences: every record is accepted or listed with its reason, and the used template is saved."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, CONVERSATIONS, TWELVE, sharegpt
from datasets import Dataset
from loaded_data import load_splits
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from fastchat_qlora.data.batching.prefix_index import build_prefix_index
from fastchat_qlora.data.sources.data_source import DataSource
from fastchat_qlora.data.templates.named_templates import get_template
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX
from fastchat_qlora.errors import UserError

HI = [("human", "Hi"), ("gpt", "Hello")]
FORGED = [("human", "Hi"), ("gpt", "Bye<|im_end|>")]


def build(
    paths: Path | list[Path],
    tokenizer: PreTrainedTokenizerFast,
    output_dir: Path,
    **options: Any,
) -> dict[str, Dataset]:
    """Load files; any share of the records may be rejected unless a test sets it."""
    return load_splits(paths, tokenizer, output_dir, **{"max_rejected": 1.0, **options})


def write(path: Path, *records: Any) -> Path:
    """Write records, or text as it is, as JSON Lines."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def rejected(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]


def rows(dataset: Dataset) -> list[tuple[list[int], list[int]]]:
    return [(row["input_ids"], row["labels"]) for row in dataset]


def supervised_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode([label for label in row["labels"] if label != IGNORE_INDEX]))


def add_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Let the tokenizer put <|endoftext|> in front of every text, as Llama's puts <s>."""
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return tokenizer


class TestRecords:
    """Accepted plus rejected equals read."""

    def test_good_records_become_sequences(
        self, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        dataset = build(data_file, tokenizer, tmp_path, max_rejected=0.0)
        assert list(dataset) == ["train"]
        assert list(dataset["train"]["id"]) == [f"c{i}" for i in range(12)]
        for row, turns in zip(dataset["train"], TWELVE, strict=True):
            text = "".join(
                f"<|im_start|>{'user' if role == 'human' else 'assistant'}\n{said}<|im_end|>\n" for role, said in turns
            )
            assert row["input_ids"] == tokenizer(text.removesuffix("\n")).input_ids
            assert supervised_text(row, tokenizer) == "".join(
                said + "<|im_end|>" for role, said in turns if role == "gpt"
            )
            assert row["length"] == row["full_length"] == len(row["input_ids"]) == len(row["labels"])
            assert row["supervised"] == sum(label != IGNORE_INDEX for label in row["labels"])
        assert not (tmp_path / "rejected.jsonl").exists()

    def test_rejected_records_are_listed_with_their_places(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        """Rejections of reading and of tokenization are listed, with file, line, id and reason."""
        records = [
            sharegpt(HI, "a"),
            "{broken",
            "",
            sharegpt(FORGED, "forged"),
            sharegpt([("human", "Hi"), ("gpt", "")], "empty"),
            sharegpt(HI, "b"),
            sharegpt([("human", "one"), *HI], "two users"),
            sharegpt([("human", "q " * 300), ("gpt", "late")], "late"),
            {"conversations": []},
        ]
        path = write(tmp_path / "a.jsonl", *records)
        dataset = build(path, tokenizer, tmp_path, conv_template="vicuna")
        assert list(dataset["train"]["id"]) == ["a", "b"]
        found = rejected(tmp_path)
        expected = [
            (2, None, "JSON"),
            (4, "forged", "message 1: contains the special token '<|im_end|>'"),
            (5, "empty", "message 1: empty answer"),
            (7, "two users", "message 1: expected assistant, found user"),
            (8, "late", "no supervised token within the first 256 tokens"),
            (9, None, "no turns"),
        ]
        for record, (line, identity, reason) in zip(
            sorted(found, key=lambda record: record["line"]), expected, strict=True
        ):
            assert record == {"file": str(path), "line": line, "id": identity, "reason": record["reason"]}
            assert reason in record["reason"]
        assert len(dataset["train"]) + len(found) == sum(record != "" for record in records)

    def test_rejected_file_is_exact(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", sharegpt(HI), sharegpt([("human", "Ω"), ("gpt", "Ω<|im_end|>")], "ώ"), "5")
        (tmp_path / "rejected.jsonl").write_text("of an earlier run\n")
        build(path, tokenizer, tmp_path)
        assert (tmp_path / "rejected.jsonl").read_text(encoding="utf-8") == (
            f'{{"file": "{path}", "line": 2, "id": "ώ", '
            '"reason": "message 1: contains the special token \'<|im_end|>\'; '
            '--content_tokens allow takes it as it stands"}\n'
            f'{{"file": "{path}", "line": 3, "id": null, '
            '"reason": "the record is not an object: found the number 5; expected an object with fields"}\n'
        )

    def test_list_of_an_earlier_run_is_removed(
        self, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        (tmp_path / "rejected.jsonl").write_text("of an earlier run\n")
        build(data_file, tokenizer, tmp_path)
        assert not (tmp_path / "rejected.jsonl").exists()

    def test_workers_write_no_list(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", sharegpt(HI), sharegpt(FORGED))
        (tmp_path / "rejected.jsonl").write_text("of the main process\n")
        assert len(build(path, tokenizer, tmp_path, mode="worker")["train"]) == 1
        assert (tmp_path / "rejected.jsonl").read_text() == "of the main process\n"

    def test_files_are_read_in_order(self, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        """One after the other, each record with its own file and line."""
        more = write(tmp_path / "more.jsonl", sharegpt(HI, "d0"), "", sharegpt(FORGED, "d1"), sharegpt(HI, "d2"))
        train = build([more, data_file], tokenizer, tmp_path)["train"]
        places = [(row["file"], row["line"], row["id"]) for row in train]
        assert places == [
            (str(more), 1, "d0"),
            (str(more), 4, "d2"),
            *[(str(data_file), i + 1, f"c{i}") for i in range(12)],
        ]
        assert [record["line"] for record in rejected(tmp_path)] == [3]

    def test_ids_of_any_type_become_text(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        records = [{**sharegpt(HI), "id": identity} for identity in (1, "a", None, [2], 1.5)]
        train = build(write(tmp_path / "a.jsonl", *records), tokenizer, tmp_path)["train"]
        assert list(train["id"]) == ["1", "a", None, "[2]", "1.5"]

    @pytest.mark.parametrize(
        "bad",
        [
            sharegpt([("human", "Hi"), ("gpt", "cut \ud83d")], "answer"),
            sharegpt([("human", "cut \ud83d"), ("gpt", "Hello")], "question"),
            sharegpt([("human", "Hi"), ("gpt", "")], "bad id \ud83d"),
        ],
        ids=["answer", "question", "id"],
    )
    def test_half_a_surrogate_pair_is_rejected(
        self, bad: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        path = write(tmp_path / "a.jsonl", sharegpt(HI, "a"), bad, sharegpt(HI, "b"))
        assert list(build(path, tokenizer, tmp_path)["train"]["id"]) == ["a", "b"]
        assert [record["line"] for record in rejected(tmp_path)] == [2]

    def test_half_a_surrogate_pair_in_an_id_loses_no_record(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        path = write(tmp_path / "a.jsonl", sharegpt(HI, "a"), sharegpt(HI, "cut \ud83d"))
        accepted = len(build(path, tokenizer, tmp_path)["train"])
        listed = len(rejected(tmp_path)) if (tmp_path / "rejected.jsonl").exists() else 0
        assert accepted + listed == 2


class TestRefusals:
    """A run stops before weights are loaded when too little of the data can be used."""

    @pytest.mark.parametrize("lazy", [False, True])
    def test_run_stops_above_max_rejected(self, lazy: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", *[sharegpt(HI)] * 7, "{broken", sharegpt(HI), "{broken too")
        assert len(build(path, tokenizer, tmp_path, max_rejected=0.2, lazy_preprocess=lazy)["train"]) == 8
        with pytest.raises(UserError) as caught:
            build(path, tokenizer, tmp_path, max_rejected=0.19, lazy_preprocess=lazy)
        for word in ("--data_path: 2 of 10 records", f"{path}:8: ", "rejected.jsonl", "--max_rejected (now 0.19)"):
            assert word in str(caught.value)
        assert [record["line"] for record in rejected(tmp_path)] == [8, 10]  # listed although the run stopped

    def test_records_rejected_by_tokenization_count(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", sharegpt(HI), sharegpt(FORGED, "forged"), "{broken")
        with pytest.raises(UserError, match="2 of 3 records were rejected"):
            build(path, tokenizer, tmp_path, max_rejected=0.5)

    def test_run_stops_when_all_are_rejected(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", sharegpt(FORGED, "f0"), "{broken")
        with pytest.raises(UserError, match="2 of 2 records were rejected"):
            build(path, tokenizer, tmp_path, max_rejected=1.0)

    def test_run_stops_when_all_are_too_long(
        self, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        with pytest.raises(UserError, match=r"no conversation is left of 12 read.*--model_max_length"):
            build(data_file, tokenizer, tmp_path, overlong="drop", max_length=4)

    @pytest.mark.parametrize("lazy", [False, True])
    @pytest.mark.parametrize(("name", "content"), [("a.json", "[]"), ("a.jsonl", "\n")])
    def test_run_stops_without_records(
        self, name: str, content: str, lazy: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        path = write(tmp_path / name, content)
        with pytest.raises(UserError, match="no conversation is left of 0 read"):
            build(path, tokenizer, tmp_path, lazy_preprocess=lazy)

    def test_unknown_template_is_an_error(
        self, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        with pytest.raises(UserError, match=r"--conv_template alpacca.*vicuna"):
            build(data_file, tokenizer, tmp_path, conv_template="alpacca")

    @pytest.mark.parametrize(("share", "bad"), [(0.29, 29), (0.57, 57), (0.58, 58), (0.0, 0)])
    def test_max_rejected_is_not_rounded(
        self, share: float, bad: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        """0.29 * 100 is a little less than 29."""
        path = write(tmp_path / "a.jsonl", *[sharegpt(HI)] * (100 - bad), *["{broken"] * bad)
        assert len(build(path, tokenizer, tmp_path, max_rejected=share)["train"]) == 100 - bad
        write(path, *[sharegpt(HI)] * (99 - bad), *["{broken"] * (bad + 1))
        with pytest.raises(UserError, match=f"{bad + 1} of 100 records were rejected"):
            build(path, tokenizer, tmp_path, max_rejected=share)


class TestPlaces:
    """Places of data and of the run's own files: nothing is ignored silently, and nothing of the user's is lost."""

    @pytest.mark.parametrize("flag", ["data_path", "eval_data_path"])
    @pytest.mark.parametrize("linked", [False, True])
    def test_rejected_list_must_not_be_data(
        self, linked: bool, flag: str, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        output = tmp_path / "out"
        output.mkdir()
        path = write(output / "rejected.jsonl", sharegpt(HI), "{broken")
        if linked:
            (tmp_path / "link.jsonl").symlink_to(path)
        before = path.read_bytes()
        given = tmp_path / "link.jsonl" if linked else path
        with pytest.raises(
            UserError, match=f"^--{flag} {path}: would be written by this run; give another --output_dir"
        ):
            if flag == "data_path":
                build(given, tokenizer, output)
            else:
                build(data_file, tokenizer, output, eval_data_path=[str(given)])
        assert path.read_bytes() == before

    def test_rejected_list_must_not_be_a_folder(
        self, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        (tmp_path / "rejected.jsonl").mkdir()
        with pytest.raises(UserError, match=f"^--output_dir: {tmp_path}/rejected.jsonl cannot be written: .*; remove"):
            build(data_file, tokenizer, tmp_path)
        assert (tmp_path / "rejected.jsonl").is_dir()

    def test_output_inside_the_data_is_not_read(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither an earlier run's list nor a checkpoint's JSON becomes records of the next run."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "data").mkdir()
        write(tmp_path / "data" / "a.jsonl", sharegpt(HI), "{broken")
        for output in (tmp_path / "data" / "out", Path("data/out"), Path("data/../data/out")):
            (output / "checkpoint-1").mkdir(parents=True, exist_ok=True)
            (output / "checkpoint-1" / "trainer_state.json").write_text("{}")
            assert len(build(tmp_path / "data", tokenizer, output)["train"]) == 1
            assert [(record["file"], record["line"]) for record in rejected(output)] == [
                (str(tmp_path / "data" / "a.jsonl"), 2)
            ]

    def test_ignored_files_of_a_folder_are_logged(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, notices: pytest.LogCaptureFixture
    ) -> None:
        folder = tmp_path / "data"
        folder.mkdir()
        write(folder / "a.jsonl", sharegpt(HI))
        (folder / "gone.jsonl").symlink_to(tmp_path / "gone.jsonl")
        (folder / "linked").symlink_to(tmp_path)
        (folder / "b.json.lz4").write_bytes(b"")
        (folder / ".hidden.txt").write_bytes(b"")
        assert len(build(folder, tokenizer, tmp_path)["train"]) == 1
        logged = f"--data_path {folder}: reading 1 files, not 3 others: b.json.lz4, gone.jsonl, linked"
        assert logged in notices.messages
        for i in range(4):
            (folder / f"notes{i}.txt").write_bytes(b"")
        build(folder, tokenizer, tmp_path)
        assert logged.replace("3 others", "7 others") + ", notes0.txt, notes1.txt, ..." in notices.messages

    def test_unreadable_subfolder_is_an_error(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The run would train on other data than the user named."""
        locked = tmp_path / "data" / "locked"
        locked.mkdir(parents=True)
        write(tmp_path / "data" / "a.jsonl", sharegpt(HI))
        scan = os.scandir

        def refuse(path: Any = ".") -> Iterator[os.DirEntry[str]]:  # the tests may run as root, who can read anything
            if os.fspath(path) == str(locked):
                raise PermissionError(13, "Permission denied", str(locked))
            return scan(path)

        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(UserError, match=f"^--data_path {locked}: cannot be read: Permission denied; give a folder"):
            build(tmp_path / "data", tokenizer, tmp_path)

    @pytest.mark.parametrize("in_folder", [False, True])
    def test_names_that_are_not_utf_8_are_escaped(
        self, in_folder: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        folder = tmp_path / os.fsdecode(b"donn\xe9es")
        folder.mkdir()
        path = write(folder / os.fsdecode(b"caf\xe9.jsonl"), sharegpt(HI, "a"), "{broken")
        name = f"{tmp_path}/donn\\xe9es/caf\\xe9.jsonl"
        for _ in range(2):  # built, and read back
            train = build(folder if in_folder else path, tokenizer, tmp_path)["train"]
            assert [(row["file"], row["line"], row["id"]) for row in train] == [(name, 1, "a")]
            assert [(record["file"], record["line"]) for record in rejected(tmp_path)] == [(name, 2)]

    def test_size_counts_the_bytes_of_all_files(self, data_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The number of processes and the end of the progress bar depend on it."""
        source = DataSource([str(data_file)] * 2, "--data_path", None, show_progress=False)
        assert source.size == 2 * data_file.stat().st_size
        logged: list[int] = []

        class Bar:
            def __init__(self, total: int, **options: Any) -> None:
                assert total == source.size

            def __enter__(self) -> "Bar":
                return self

            def __exit__(self, *error: object) -> None: ...

            def update(self, count: int) -> None:
                logged.append(count)

        monkeypatch.setattr("fastchat_qlora.data.sources.data_source.tqdm", Bar)
        assert sum(1 for _ in source.records()) == 2 * 12
        assert sum(logged) == source.size


class TestOverlong:
    """Of the four conversations, c0 is the shortest; c1 and c3 have two turns, c2 one long one."""

    def test_truncate(self, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        whole = build(data_file, tokenizer, tmp_path)["train"]
        short = build(data_file, tokenizer, tmp_path, max_length=40)["train"]
        assert len(short) == len(whole) == 12
        for before, after in zip(whole, short, strict=True):
            length = after["length"]
            assert length == len(after["input_ids"]) <= 40
            assert (after["input_ids"], after["labels"]) == (before["input_ids"][:length], before["labels"][:length])
            assert after["full_length"] == before["length"]
        assert whole[1]["length"] > 40
        assert supervised_text(short[1], tokenizer) == "one two three<|im_end|>"
        assert short[0]["input_ids"] == whole[0]["input_ids"]
        assert whole[2]["supervised"] > short[2]["supervised"]
        assert "<|im_end|>" not in supervised_text(short[2], tokenizer)  # its only turn is too long, so it does not end

    def test_drop(self, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        """Dropping was requested: max_rejected does not count it, the list does."""
        whole = build(data_file, tokenizer, tmp_path)["train"]
        limit = whole[1]["length"]
        long = [row["id"] for row in whole if row["length"] > limit]
        kept = build(data_file, tokenizer, tmp_path, overlong="drop", max_length=limit, max_rejected=0.0)["train"]
        assert "c1" in kept["id"] and len(long) > 2
        assert sorted([*kept["id"], *long]) == sorted(whole["id"])
        assert [record["id"] for record in rejected(tmp_path)] == long
        for record, row in zip(rejected(tmp_path), [row for row in whole if row["id"] in long], strict=True):
            assert record["reason"] == f"too long ({row['length']} tokens, --model_max_length {limit})"

    def test_error(self, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        whole = build(data_file, tokenizer, tmp_path, overlong="error")["train"]
        long = [row["id"] for row in whole if row["length"] > 40]
        assert 0 < len(long) < 12
        with pytest.raises(
            UserError, match=rf"--overlong error: {len(long)} conversations are too long.*{data_file}:2 \(id c1\)"
        ):
            build(data_file, tokenizer, tmp_path, overlong="error", max_length=40)
        assert [record["id"] for record in rejected(tmp_path)] == long


class TestEvaluation:
    """Evaluation data is split off the training data, or read from files of its own."""

    @pytest.mark.parametrize(("eval_split", "count"), [(0.25, 3), (0.5, 6), (1, 1), (5, 5), (11, 11)])
    @pytest.mark.parametrize("lazy", [False, True])
    def test_split(
        self,
        eval_split: float,
        count: int,
        lazy: bool,
        data_file: Path,
        tokenizer: PreTrainedTokenizerFast,
        tmp_path: Path,
    ) -> None:
        """Every conversation is on one side."""
        dataset = build(data_file, tokenizer, tmp_path, eval_split=eval_split, lazy_preprocess=lazy)
        sides = {name: list(part.with_format(None)["id"]) for name, part in dataset.items()}
        assert list(sides) == ["train", "eval"]
        assert len(sides["eval"]) == count
        assert sorted(sides["train"] + sides["eval"]) == sorted(f"c{i}" for i in range(12))
        assert all(set(row) >= {"input_ids", "labels"} for part in dataset.values() for row in part)

    def test_split_follows_the_seed(self, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        taken = [
            tuple(build(data_file, tokenizer, tmp_path, eval_split=5, seed=seed)["eval"]["id"]) for seed in (1, 1, 2, 3)
        ]
        assert taken[0] == taken[1]
        assert len({frozenset(ids) for ids in taken}) > 1

    @pytest.mark.parametrize("eval_split", [12, 13, 0.01, 0.05])
    def test_split_that_leaves_a_side_empty(
        self, eval_split: float, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        with pytest.raises(UserError) as caught:
            build(data_file, tokenizer, tmp_path, eval_split=eval_split)
        taken = int(eval_split if eval_split >= 1 else 0)
        assert str(caught.value) == (
            f"--eval_split {eval_split}: takes {taken} of 12 conversations and leaves nothing on one side; "
            "give another share or count, or --eval_data_path"
        )

    def test_split_is_rounded_down(self, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        parts = build(data_file, tokenizer, tmp_path, eval_split=0.95)
        assert (len(parts["train"]), len(parts["eval"])) == (1, 11)

    def test_eval_data_path(self, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        train = write(tmp_path / "train.jsonl", sharegpt(HI, "t"), "{broken")
        held_out = write(tmp_path / "eval.jsonl", sharegpt(FORGED, "forged"), sharegpt(HI, "e"))
        dataset = build(train, tokenizer, tmp_path, eval_data_path=[str(held_out), str(data_file)])
        assert list(dataset) == ["train", "eval"]
        assert list(dataset["train"]["id"]) == ["t"]
        assert list(dataset["eval"]["id"]) == ["e", *(f"c{i}" for i in range(12))]
        assert rows(dataset["train"]) == rows(dataset["eval"])[:1]
        places = [(record["file"], record["line"]) for record in rejected(tmp_path)]
        assert places == [(str(train), 2), (str(held_out), 1)]

    def test_errors_of_eval_data_name_its_flag(
        self, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        held_out = write(tmp_path / "eval.jsonl", "{broken")
        with pytest.raises(UserError, match=r"^--eval_data_path: 1 of 1"):
            build(data_file, tokenizer, tmp_path, eval_data_path=[str(held_out)])
        held_out = write(tmp_path / "eval.json", "[broken")
        with pytest.raises(UserError, match=f"^--eval_data_path {held_out}: not valid JSON"):
            build(data_file, tokenizer, tmp_path, eval_data_path=[str(held_out)])


class TestPreprocessing:
    """The sequences are the same, however the work is divided."""

    @pytest.mark.parametrize("overlong", ["truncate", "drop", "split"])
    @pytest.mark.parametrize(("conv_template", "max_length"), [("auto", 40), ("vicuna", 110)])
    def test_lazy_sequences_equal_eager_ones(
        self,
        conv_template: str,
        max_length: int,
        overlong: str,
        data_file: Path,
        tokenizer: PreTrainedTokenizerFast,
        tmp_path: Path,
    ) -> None:
        options: dict[str, Any] = {"conv_template": conv_template, "max_length": max_length, "overlong": overlong}
        eager = build(data_file, tokenizer, tmp_path, max_rejected=1.0, **options)["train"]
        lazy = build(data_file, tokenizer, tmp_path, max_rejected=1.0, lazy_preprocess=True, **options)["train"]
        assert overlong == "drop" or any(row["full_length"] > row["length"] for row in eager)
        assert "segments" in lazy.data.column_names
        assert not {"input_ids", "labels"} & set(lazy.data.column_names)
        assert list(lazy) == list(eager)
        assert lazy[3:5]["input_ids"] == eager[3:5]["input_ids"]
        indices = [build_prefix_index(dataset.select([*range(3, len(eager)), 0, 1])) for dataset in (eager, lazy)]
        assert [index.shared.tolist() for index in indices] == [indices[0].shared.tolist()] * 2
        assert (indices[0].rank == indices[1].rank).all()

    def test_lazy_sequences_are_checked_at_the_start(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        """Records without supervised tokens are rejected then, not in the middle of a run."""
        asked = [("human", "much too long a question " * 100), ("gpt", "Hello")]
        path = write(tmp_path / "a.jsonl", sharegpt(HI), sharegpt(asked))
        train = build(path, tokenizer, tmp_path, lazy_preprocess=True, max_rejected=0.5)["train"]
        assert [supervised_text(row, tokenizer) for row in train] == ["Hello<|im_end|>"]
        assert [line["reason"] for line in rejected(tmp_path)] == ["no supervised token within the first 256 tokens"]
        with pytest.raises(UserError, match=r"^--data_path: 1 of 2 records were rejected"):
            build(path, tokenizer, tmp_path, lazy_preprocess=True, max_rejected=0.05)

    def test_workers_make_the_same_sequences(
        self, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        bad = write(tmp_path / "bad.jsonl", sharegpt(HI), sharegpt(FORGED), sharegpt(HI))
        alone = build([data_file, bad], tokenizer, tmp_path)["train"].to_list()
        listed = rejected(tmp_path)
        assert len(alone) == 14
        assert build([data_file, bad], tokenizer, tmp_path, preprocessing_num_workers=2)["train"].to_list() == alone
        assert rejected(tmp_path) == listed

    def test_summary_counts_records_and_tokens(
        self, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Read, rejected, shortened, tokens, supervised share and longest, in one message."""
        bad = write(tmp_path / "bad.jsonl", sharegpt(FORGED), "{broken")
        with caplog.at_level(logging.INFO):
            train = build([data_file, bad], tokenizer, tmp_path, max_length=44)["train"]
        tokens, supervised = sum(train["length"]), sum(train["supervised"])
        shortened = sum(row["full_length"] > 44 for row in train)
        assert shortened
        [summary] = [record.getMessage() for record in caplog.records if " read, " in record.getMessage()]
        assert summary.splitlines()[0] == (
            "--data_path: 14 read, 2 rejected, 0 dropped, 0 not sampled, 12 accepted, "
            f"{shortened} shortened; {tokens} tokens, "
            f"{supervised / tokens:.0%} supervised; longest about {max(train['full_length'])} tokens."
        )
        assert "rejected 1: contains the special token" in summary
        assert "rejected 1: not a line of JSON" in summary


class TestTemplate:
    """The saved chat template is the one that was used, and gives the same ids."""

    def assert_serves(self, row: dict[str, Any], turns: list[tuple[str, str]], tokenizer: Any) -> None:
        roles = {"human": "user", "gpt": "assistant", "system": "system"}
        messages = [{"role": roles[role], "content": said} for role, said in turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")  # behind the last turn
        assert tokenizer(text, add_special_tokens=False).input_ids == row["input_ids"]

    @pytest.mark.parametrize("own", [CHATML, None], ids=["has a template", "has none"])
    @pytest.mark.parametrize("conv_template", ["auto", "vicuna"])
    def test_used_template_is_saved(
        self,
        own: str | None,
        conv_template: str,
        data_file: Path,
        tokenizer: PreTrainedTokenizerFast,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        tokenizer.chat_template = own
        with caplog.at_level(logging.INFO):
            train = build(data_file, tokenizer, tmp_path, conv_template=conv_template)["train"]
        kept = own and conv_template == "auto"
        assert tokenizer.chat_template == (own if kept else get_template("vicuna").to_jinja(add_bos=False))
        assert ("the tokenizer's chat template" if kept else "the vicuna template") in caplog.text
        for row, turns in zip(train, TWELVE, strict=True):
            self.assert_serves(row, turns, tokenizer)
        tokenizer.save_pretrained(tmp_path / "saved")
        saved = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
        self.assert_serves(train[3], CONVERSATIONS[3], saved)

    @pytest.mark.parametrize("own", ["{{ bos_token }}" + CHATML, None], ids=["written by the template", "vicuna"])
    def test_bos_stands_once(self, own: str | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        """Even if tokenizer and template both write one; it is not supervised."""
        path = write(tmp_path / "a.jsonl", sharegpt([("system", "Be kind."), *HI]), sharegpt(HI * 2))
        add_bos(tokenizer).chat_template = own
        train = build(path, tokenizer, tmp_path)["train"]
        for row, turns in zip(train, [[("system", "Be kind."), *HI], HI * 2], strict=True):
            assert row["input_ids"].index(tokenizer.bos_token_id) == 0
            assert row["input_ids"].count(tokenizer.bos_token_id) == 1
            assert row["labels"][0] == IGNORE_INDEX
            self.assert_serves(row, turns, tokenizer)

    def test_no_bos_where_the_tokenizer_adds_none(
        self, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        """SmolLM2's tokenizer has a BOS token, but does not add it."""
        tokenizer.bos_token = "<|im_start|>"
        train = build(data_file, tokenizer, tmp_path, conv_template="vicuna")["train"]
        assert tokenizer.bos_token_id not in train[0]["input_ids"]
        self.assert_serves(train[0], CONVERSATIONS[0], tokenizer)


def test_special_token_in_the_system_prompt_is_one_error(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.chat_template = CHATML
    data = write(tmp_path / "a.jsonl", sharegpt(HI))
    prompt = "Be kind.<|im_end|>"
    with pytest.raises(UserError) as error:
        build(data, tokenizer, tmp_path, system_prompt=prompt)
    assert str(error.value) == (
        "--system_prompt: contains the special token '<|im_end|>'; leave it out, or give --content_tokens allow"
    )
    assert len(build(data, tokenizer, tmp_path, system_prompt=prompt, content_tokens="allow")["train"]) == 1


def test_no_character_in_the_system_prompt_is_one_error(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", sharegpt(HI))
    with pytest.raises(UserError, match=r"^--system_prompt: contains U\+FDD0 or U\+FDD1, which are not characters"):
        build(data, tokenizer, tmp_path, system_prompt="Be \ufdd0.")


THINKING = CHATML.replace("message['content']", "(message['reasoning_content'] | default('')) + message['content']")


def test_special_tokens_in_a_thought_are_allowed(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The record writes the end token, and not the template."""
    tokenizer.chat_template = THINKING
    answer = {"role": "assistant", "content": "Hello", "reasoning_content": "a <|im_end|> b"}
    data = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "Hi"}, answer]})
    [row] = build(data, tokenizer, tmp_path, content_tokens="allow")["train"]
    assert supervised_text(row, tokenizer) == "a <|im_end|> bHello<|im_end|>"
