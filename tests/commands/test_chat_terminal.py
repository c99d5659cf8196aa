"""A conversation in a real terminal."""

import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from saved_adapters import save_adapter
from terminal import ask, start
from transformers import GenerationConfig


@pytest.fixture(scope="module")
def child(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pexpect.spawn]:
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(folder, model_folder, {})
    GenerationConfig(eos_token_id=[2]).save_pretrained(folder)
    started = start(folder, "--max_new_tokens", "400")
    yield started
    started.close(force=True)


def test_conversation_in_a_terminal(child: pexpect.spawn) -> None:
    """In one terminal, from the first question to Ctrl-D."""
    # An answer is shown piece by piece, not at once at the end.
    child.sendline("Count.")
    times = [time.monotonic()]
    while not child.expect_exact([pexpect.TIMEOUT, "\r\n> "], timeout=0.05):
        times.append(time.monotonic())
        if len(times) == 4:
            break
    streamed = str(child.before)
    assert len(times) == 4, "it was still generating after 0.15 seconds"
    assert len(streamed.removeprefix("Count.").strip()) > 20, "and had shown a part of the answer"
    # Ctrl-C stops the answer and not the program.
    child.sendintr()
    child.expect_exact("(stopped)")
    child.expect_exact("\r\n> ")
    # The stopped answer is part of the conversation, until it is reset.
    after = ask(child, "/base Who are you?")
    assert "is reset" in ask(child, "/reset")
    fresh = ask(child, "/base Who are you?")
    assert after and fresh and after != fresh
    # /base compares: the same question, another answer.
    trained = ask(child, "Who are you?")
    assert trained and ask(child, "/base") == fresh != trained
    # Ctrl-C at the prompt shows how to leave, an empty line asks nothing, Ctrl-D leaves.
    child.sendintr()
    child.expect_exact("/quit or Ctrl-D leaves.")
    child.expect_exact("> ")
    child.sendline("")
    child.expect_exact("> ")
    assert child.before == ""
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert (child.exitstatus, child.signalstatus) == (0, None)
