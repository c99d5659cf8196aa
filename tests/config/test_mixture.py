"""An entry of data is a path with settings, on a command line and in a configuration file."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastchat_qlora.config.mixture import DataEntry, name_entries, parse_entry
from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.errors import UserError

NEEDED = ["--model_name_or_path", "org/model", "--output_dir", "out"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with data files, one of which has # in its name."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b#share=0.5", "c#1.jsonl"):
        Path(name).write_text("{}")


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("a.jsonl", DataEntry("a.jsonl")),
        ("a.jsonl#max_samples=10", DataEntry("a.jsonl", max_samples=10)),
        ("a.jsonl#share=0.25,repeat=2", DataEntry("a.jsonl", share=0.25, repeat=2)),
        ("a.jsonl#max_samples=1e3,share=1", DataEntry("a.jsonl", max_samples=1000)),
        ("org/name:train#repeat=1.5", DataEntry("org/name:train", repeat=1.5)),
        ("b#share=0.5", DataEntry("b#share=0.5")),
        ("b#share=0.5#share=0.1", DataEntry("b#share=0.5", share=0.1)),
        ("c#1.jsonl", DataEntry("c#1.jsonl")),
        ("c#1.jsonl#max_samples=2", DataEntry("c#1.jsonl", max_samples=2)),
        ("d#2.jsonl", DataEntry("d#2.jsonl")),
    ],
)
def test_entry_is_a_path_and_settings(text: str, entry: DataEntry) -> None:
    """What exists under the whole text has no settings."""
    assert parse_entry(text) == entry


@given(
    st.one_of(st.none(), st.integers(1, 10**12)),
    st.floats(1e-9, 1.0).map(lambda value: float(f"{value:.15g}")),
    st.floats(1.0, 1000.0).map(lambda value: float(f"{value:.15g}")),
)
def test_entry_reads_back_as_it_is_written(max_samples: int | None, share: float, repeat: float) -> None:
    entry = DataEntry("a.jsonl", max_samples, share, repeat)
    assert parse_entry(str(entry)) == entry


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("max_samples=0", "max_samples=0: must be a whole number of at least 1"),
        ("max_samples=2.5", "max_samples=2.5: must be a whole number"),
        ("share=0", "share=0: must be above 0 and at most 1"),
        ("share=1.5", "share=1.5: must be above 0 and at most 1"),
        ("share=nan", "share=nan: must be above 0"),
        ("repeat=0.5", "repeat=0.5: must be at least 1 and at most 1000; for a part of it give share"),
        ("repeat=x", "repeat=x: must be at least 1"),
        ("share=0.5,share=0.5", "share is given twice; drop one"),
        ("weight=2", "unknown setting 'weight'; known are max_samples, share, repeat, as in a.jsonl#max_samples=1000"),
        ("max_samples", "max_samples=: must be a whole number"),
        ("share=0.5&repeat=2", "share=0.5&repeat=2: must be above 0"),
        ("share=0.5#repeat=2", "settings stand behind a path and one #, with commas between them; write a.jsonl#sha"),
    ],
)
@pytest.mark.parametrize("flag", ["data_path", "eval_data_path"])
def test_wrong_setting_is_an_error(flag: str, setting: str, reason: str) -> None:
    others = ["--data_path", "a.jsonl"] if flag == "eval_data_path" else []
    with pytest.raises(UserError) as error:
        parse_args([*NEEDED, *others, f"--{flag}", f"a.jsonl#{setting}"])
    assert str(error.value).startswith(f"--{flag} a.jsonl#{setting}: {reason}")


def test_settings_without_a_path_are_an_error() -> None:
    with pytest.raises(UserError, match="--data_path #repeat=2: settings stand behind a path and one #"):
        parse_args([*NEEDED, "--data_path", "#repeat=2"])


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_configuration_file_has_objects(name: str) -> None:
    entries = '[a.jsonl, {path: a.jsonl, max_samples: 10, repeat: 2.5}, {path: "c#1.jsonl", share: 1}]'
    lines = f"data_path: {entries}\neval_data_path: {{path: a.jsonl, share: 0.3}}\n"
    if name.endswith("json"):
        lines = (
            '{"data_path": ["a.jsonl", {"path": "a.jsonl", "max_samples": 10, "repeat": 2.5}, {"path": "c#1.jsonl"}], '
            '"eval_data_path": {"path": "a.jsonl", "share": 0.3}}'
        )
    Path(name).write_text(lines)
    data = parse_args([name, *NEEDED]).data
    assert data.data_path == ["a.jsonl", "a.jsonl#max_samples=10,repeat=2.5", "c#1.jsonl"]
    assert data.eval_data_path == ["a.jsonl#share=0.3"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (
            "{max_samples: 3}",
            "data_path: an entry must have its path as text, as in {path: a",
        ),
        ("{path: 3}", "data_path: an entry must have its path as text"),
        ("{path: a.jsonl, share: 2}", "data_path: share=2: must be above 0"),
        ("{path: a.jsonl, share: true}", "data_path: share=True: must be above 0"),
        ("{path: a.jsonl, fraction: 0.5}", "data_path: unknown setting 'fraction'; known are"),
    ],
)
def test_wrong_object_is_an_error(entry: str, reason: str) -> None:
    Path("run.yaml").write_text(f"seed: 1\ndata_path: [{entry}]")
    with pytest.raises(UserError) as error:
        parse_args(["run.yaml", *NEEDED])
    assert str(error.value).startswith(f"run.yaml: line 2: {reason}")


def test_printed_configuration_reads_back(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*NEEDED, "--data_path", "a.jsonl#share=0.5,repeat=2", "c#1.jsonl"]
    with pytest.raises(SystemExit):
        parse_args([*argv, "--print_config"])
    Path("run.yaml").write_text(capsys.readouterr().out)
    assert parse_args(["run.yaml", "--output_dir", "out"]).data.data_path == argv[-2:]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a.jsonl", "org/name:train"], ["a", "name-train"]),
        (["x/train.jsonl.gz", "y/train.jsonl", "y/eval.json"], ["x-train", "y-train", "eval"]),
        (["/long/way/to/a.json", "/long/way/to/a.jsonl", "b"], ["a", "a-2", "b"]),
        (["folder/", "folder", "."], ["folder", "folder-2", "data"]),
    ],
)
def test_names_are_short_and_different(paths: list[str], names: list[str]) -> None:
    assert name_entries(paths) == names


@given(st.lists(st.text(alphabet="ab/.: #", min_size=1, max_size=8), min_size=1, max_size=6))
def test_names_are_always_different(paths: list[str]) -> None:
    names = name_entries(paths)
    assert len(set(names)) == len(names) == len(paths) and all(names)
