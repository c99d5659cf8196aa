"""Small stand-ins with the real classes: a tokenizer trained in-process, a two-layer model, a few conversations."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may use a hub; read when huggingface_hub is imported
# Models of two layers gain nothing from a second thread. Threads wait for each other in a loop, which takes fifty times
# as long beside a busy test worker; so the quickstart's model has one too. Read when torch is imported, here and in the
# programs that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("playground/benchmark", "tests/support", "tests/models")]
from fault_table import how_many as how_many
from fault_table import in_the_project as in_the_project
from fault_table import pytest_runtest_logreport as pytest_runtest_logreport
from fault_table import pytest_sessionfinish as pytest_sessionfinish
from fault_table import pytest_testnodedown as pytest_testnodedown
from fault_table import tally as tally
from launching import free_port
from stand_in import CHATML as CHATML
from stand_in import SMALL, make_model, make_tokenizer

CONVERSATIONS = [
    [("human", "Who are you?"), ("gpt", "I'm Pellico.")],
    [("human", "Count."), ("gpt", "one two three"), ("human", "And then?"), ("gpt", "four five six")],
    [("human", "Say it in Greek, please"), ("gpt", "Γειά σου, κόσμε 🙂")],
    [("human", "hi"), ("gpt", "Hello, how are you today?"), ("human", "fine"), ("gpt", "Good to hear.")],
]

TWELVE = [[("human", first[1] + "!" * i), *rest] for i in range(3) for first, *rest in CONVERSATIONS]


def sharegpt(turns: list[tuple[str, str]], identity: str = "c") -> dict:
    """A ShareGPT record from (role, text) pairs."""
    return {"id": identity, "conversations": [{"from": role, "value": value} for role, value in turns]}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest test, so that no worker is left with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_quickstart.py")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a byte-level BPE tokenizer with ChatML tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    """A fresh copy of the tokenizer, for tests that change it."""
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def model_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Llama of two layers with that tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, SMALL)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Twelve different conversations as a ShareGPT array."""
    path = tmp_path / "conversations.json"
    records = [sharegpt(turns, f"c{i}") for i, turns in enumerate(TWELVE)]
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty conversations of the dummy data."""
    records = json.loads((ROOT / "data" / "dummy_conversation.json").read_text(encoding="utf-8"))
    path = tmp_path_factory.mktemp("data") / "conversations.json"
    path.write_text(json.dumps(records[:30]), encoding="utf-8")
    return path


@pytest.fixture
def required(model_folder: Path, data_file: Path, tmp_path: Path) -> list[str]:
    """Return the three required flags."""
    output_dir = str(tmp_path / "output")
    return ["--model_name_or_path", str(model_folder), "--data_path", str(data_file), "--output_dir", output_dir]


@pytest.fixture
def port() -> int:
    """Return a free port for a rendezvous."""
    return free_port()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tokenized data of each test in a folder of its own."""
    monkeypatch.setattr("fastchat_qlora.data.tokenization.cache.HF_HOME", str(tmp_path_factory.mktemp("hf_home")))


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """Set environment and log as for plain `python`, and restore them after the test."""
    package = logging.getLogger("fastchat_qlora")
    log = (package.handlers, package.propagate, package.level)
    saved = dict(os.environ)
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(saved)
    package.handlers, package.propagate = log[:2]
    package.setLevel(log[2])


@pytest.fixture
def notices(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Return the log of the package, also after a command line has given it a handler of its own."""
    package = logging.getLogger("fastchat_qlora")
    monkeypatch.setattr(package, "propagate", True)
    monkeypatch.setattr(package, "handlers", [])
    caplog.set_level(logging.INFO, logger="fastchat_qlora")
    return caplog
