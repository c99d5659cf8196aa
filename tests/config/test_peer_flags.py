"""Names and values of other programs are answered with what they are here."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fastchat_qlora.config.flag_parsing import FlagParser, find_unknown_flags, list_known_flags, read_peer_table
from fastchat_qlora.config.legacy_flags import LEGACY_FLAGS
from fastchat_qlora.config.parser import build_parser, parse_args
from fastchat_qlora.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ["--model_name_or_path=m", "--data_path=d", "--output_dir=o"]
TABLE = read_peer_table()
PEERS = ("LLaMA-Factory", "TRL", "axolotl", "ms-swift", "Unsloth", "torchtune")
ALL = [(peer, name) for peer, entry in TABLE["peers"].items() for name in entry["flags"]]


@pytest.fixture(scope="module")
def parser() -> FlagParser:
    return build_parser()


def is_accepted(name: str, parser: FlagParser) -> bool:
    return f"--{name}" in list_known_flags(parser) or f"--{name}" in LEGACY_FLAGS


def get_named_flags(given: Any) -> list[str]:
    """Return the flags that an entry of the table names, with their values."""
    words = given if isinstance(given, str) else given[0]
    return [f"--{word}".replace("=", " ") for word in words.split()]


def get_error(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_args(argv)
    return str(caught.value)


@pytest.mark.parametrize("peer", PEERS)
def test_the_table_has_the_thirty_commonest_names_of_each_program(peer: str, parser: FlagParser) -> None:
    entry = TABLE["peers"][peer]
    common = entry["common"].split()
    assert len({*common}) == len(common) >= 30
    assert [name for name in common if not is_accepted(name, parser) and name not in entry["flags"]] == []
    assert entry["version"] and entry["read"] and entry["counted"]


def test_flags_of_the_table_exist_and_take_their_values(parser: FlagParser) -> None:
    """Names that are flags here too must not be in the table: they are never unknown."""
    for peer, name in ALL:
        given = TABLE["peers"][peer]["flags"][name]
        assert not is_accepted(name, parser), (peer, name)
        assert isinstance(given, str) or (len(given) == 2 and given[1]), (peer, name)
        for flag in get_named_flags(given):
            assert flag.split()[0] in list_known_flags(parser), (peer, name)
            if " " in flag:
                assert parser.parse_known_args([*NEEDED, *flag.split()])[1] == [], (peer, name)


@pytest.mark.parametrize("in_file", [False, True], ids=["flags", "yaml"])
@pytest.mark.parametrize("peer", PEERS)
def test_each_common_name_is_answered_with_ours(peer: str, in_file: bool, parser: FlagParser, tmp_path: Path) -> None:
    """Each is accepted as it is, or its answer names the program, and the flags or why there is none."""
    entry = TABLE["peers"][peer]
    names = [name for name in entry["common"].split() if not is_accepted(name, parser)]
    if in_file:
        (tmp_path / "run.yaml").write_text("".join(f"{name}: 1\n" for name in names), encoding="utf-8")
        errors = re.split(r"; \(\d+\) |\(1\) ", get_error(str(tmp_path / "run.yaml")))[1:]
    else:
        errors = find_unknown_flags([f"--{name}" for name in names], parser)
    assert len(errors) == len(names) >= 10
    for name, error in zip(names, errors, strict=True):
        assert f"unknown {'key ' if in_file else 'flag --'}{name}: " in error
        assert re.search(rf"{peer}'s?\b.* name; (use|drop it:) ", error)
        for flag in get_named_flags(entry["flags"][name]):
            assert (flag[2:].replace(" ", ": ") if in_file else flag) in error


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--lora_rank 8", "unknown flag --lora_rank: LLaMA-Factory's, ms-swift's and torchtune's name; use --lora_r"),
        ("--revision main", "unknown flag --revision: transformers' and Unsloth's name; use --model_revision"),
        (
            "--early-stopping-patience 3",
            "unknown flag --early-stopping-patience: axolotl's name; drop it: early stopping is not supported; the "
            "best checkpoint stays with load_best_model_at_end and evaluations",
        ),
        ("--quantization_bit=4", "LLaMA-Factory's name; use --q_lora True, --load_in_8bit True (4 bits or 8)"),
        (
            "batch_size=4",
            "unexpected value 'batch_size=4': axolotl's name; use --gradient_accumulation_steps (the product of micro "
            "batch, accumulation and devices); Unsloth's and torchtune's name; use --per_device_train_batch_size",
        ),
        ("lora_r=4", "unexpected value 'lora_r=4': a flag has two dashes; write --lora_r=4"),
        ("-r 4", "unknown flag -r: PEFT's and Unsloth's name; use --lora_r"),
        ("--lr 1e-4", "unknown flag --lr: torchtune's name; use --learning_rate"),
    ],
)
def test_name_of_another_program_is_explained(flags: str, error: str, required: list[str]) -> None:
    assert get_error(*required, *flags.split()).endswith(error)


def test_names_in_place_of_the_required_ones_are_explained_too() -> None:
    error = get_error("--model", "org/m", "--dataset", "d.json", "--output_dir", "o")
    assert re.match(
        r"3 problems: \(1\) unknown flag --model: .* name; use --model_name_or_path; \(2\) unknown flag --dataset: .* "
        r"name; use --data_path .*; \(3\) the following arguments are required: ",
        error,
    )


@pytest.mark.parametrize(
    ("flags", "yaml", "error"),
    [
        ("--flash_attn fa2", "flash_attn: fa2", "LLaMA-Factory's value; use --attn_implementation flash_attention_2"),
        ("--gradient-checkpointing=unsloth", "gradient_checkpointing: unsloth", "Unsloth's value; drop the flag"),
        ("--bf16 auto", "bf16: auto", "axolotl's value; give True if the device has bf16, else False"),
        (
            "--init_lora_weights False",
            "init_lora_weights: false",
            "PEFT's value for a random lora_B, with which training would not start from the base model; choose "
            "gaussian or orthogonal, or drop the flag",
        ),
        *(
            (f"--init_lora_weights {name}", f"init_lora_weights: {name}", "; choose default, gaussian or orthogonal")
            for name in ("pissa", "olora", "eva", "loftq", "corda", "lora_ga", "mica")
        ),
    ],
)
def test_value_of_another_program_is_explained_once(
    flags: str, yaml: str, error: str, required: list[str], tmp_path: Path
) -> None:
    flag, value = flags.replace("=", " ").replace("--gradient-c", "--gradient_c").split()
    found = get_error(*required, *flags.split(), "--lora_r", "x")
    assert found.startswith(f"2 problems: (1) {flag} {value}: ") and error in found and "(2) --lora_r" in found
    (tmp_path / "run.yaml").write_text(yaml, encoding="utf-8")
    found = get_error(str(tmp_path / "run.yaml"), *required)
    assert re.match(rf".*run.yaml: line 1: {flag} {value}: ", found, re.IGNORECASE) and error in found


SPELLINGS = [
    ("q_proj,v_proj", ["q_proj", "v_proj"]),
    ("q_proj, v_proj", ["q_proj", "v_proj"]),
    ('["q_proj","v_proj"]', ["q_proj", "v_proj"]),
    ("['q_proj','v_proj']", ["q_proj", "v_proj"]),
    ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
    ("q_proj v_proj", ["q_proj", "v_proj"]),
    ("self_attn.q_proj", ["self_attn.q_proj"]),
    (r".*\.(q|v)_proj", [r".*\.(q|v)_proj"]),
    (r"model\.layers\.\d{1,2}\.self_attn\.[qv]_proj", [r"model\.layers\.\d{1,2}\.self_attn\.[qv]_proj"]),
    ('[".*_proj"]', [".*_proj"]),
    ("['.*_proj']", [".*_proj"]),
    ('["layers.[qv]{1,2}_proj"]', ["layers.[qv]{1,2}_proj"]),
    *((word, ["all-linear"]) for word in ("all", "All", "ALL_LINEAR", "all-linear", "[all]")),
]


@pytest.mark.parametrize(("words", "names"), SPELLINGS, ids=[words for words, _ in SPELLINGS])
def test_names_of_modules_are_understood_in_every_spelling(
    words: str, names: list[str], required: list[str], tmp_path: Path
) -> None:
    assert parse_args([*required, "--lora_target_modules", *words.split()]).lora.lora_target_modules == names
    (tmp_path / "run.json").write_text(json.dumps({"lora_target_modules": words}), encoding="utf-8")
    (tmp_path / "run.yaml").write_text(f"lora_target_modules: {json.dumps(words)}", encoding="utf-8")
    for file in ("run.json", "run.yaml"):
        assert parse_args([str(tmp_path / file), *required]).lora.lora_target_modules == names


@pytest.mark.parametrize("flag", ["lora_exclude_modules", "lora_target_parameters", "modules_to_save"])
def test_names_of_the_other_flags_are_separated_too(flag: str, required: list[str], tmp_path: Path) -> None:
    assert getattr(parse_args([*required, f"--{flag}", "a.b,c"]).lora, flag) == ["a.b", "c"]
    assert getattr(parse_args([*required, f"--{flag}", "all"]).lora, flag) == ["all"]
    (tmp_path / "run.yaml").write_text(f"{flag}: [a.b, c]", encoding="utf-8")
    assert getattr(parse_args([str(tmp_path / "run.yaml"), *required]).lora, flag) == ["a.b", "c"]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--lora_target_modules .*q_proj v_proj", ": a regular expression must be the only value; join several by |"),
        (
            "--lora_target_modules *_proj",
            ": is not a regular expression: nothing to repeat at position 0; write .*_proj",
        ),
        ("--lora_exclude_modules (q", ": is not a regular expression: missing ), unterminated subpattern at "),
        ("--modules_to_save .*head", ": must be names or ends of names, as PEFT has it; list them"),
        ("--lora_target_parameters .*head", ": must be names or ends of names, as PEFT has it; list them"),
        ("--lora_target_modules all,q_proj", "all-linear: already means every linear layer; drop the other names"),
        ("--lora_exclude_modules=", " '': an empty name matches nothing"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(flags: str, error: str, required: list[str]) -> None:
    assert error in get_error(*required, *flags.split())


@pytest.mark.parametrize("value", ["True", "true"])
def test_true_is_the_default_initialization(value: str, required: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"init_lora_weights: {value}\n", encoding="utf-8")
    for argv in ([*required, "--init_lora_weights", value], [str(tmp_path / "run.yaml"), *required]):
        assert parse_args(argv).lora.init_lora_weights == "default"


def test_groups_of_a_file_are_explained_setting_by_setting(tmp_path: Path) -> None:
    lines = ["model:", "  _component_: x.y", "  lora_rank: 8", "lora: {lora_r: 4, lora_rnk: 4}", "tokenizer: {path: x}"]
    (tmp_path / "run.yaml").write_text("\n".join(lines), encoding="utf-8")
    errors = re.split(r"; \(\d+\) |\(1\) ", get_error(str(tmp_path / "run.yaml")))[1:]
    assert [error.partition("run.yaml: ")[2] for error in errors] == [
        "line 1: unknown key model._component_: torchtune's name; drop it: what it stands for is chosen by flags",
        "line 1: unknown key model.lora_rank: torchtune's name; use lora_r",
        "line 4: unknown key lora.lora_r: settings are not grouped; put lora_r on the top level",
        "line 4: unknown key lora.lora_rnk: did you mean lora_r?",
        "line 5: unknown key tokenizer.path: torchtune's name; drop it: the tokenizer is that of the base model; copy "
        "another one into its folder",
    ]


def test_the_page_has_the_table() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    from peer_table import PAGE, build_page

    page = PAGE.read_text(encoding="utf-8")
    assert page == build_page(page), "run python scripts/peer_table.py and commit docs/migration.md"


def test_the_table_is_read_for_mistakes_only(required: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read_peer_table.cache_clear()
    monkeypatch.setattr("fastchat_qlora.config.flag_parsing.PEER_TABLE", Path("/nowhere"))
    try:
        assert parse_args([*required, "--lora_r", "4"]).lora.lora_r == 4
    finally:
        read_peer_table.cache_clear()
