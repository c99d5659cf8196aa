"""Where commands print their tables to."""

from rich.console import Console


class Screen(Console):
    """A console that tells its caller when nobody reads any more, where rich would end the program by itself."""

    def on_broken_pipe(self) -> None:
        """For `standard_output` to handle.

        Raises:
            BrokenPipeError: always.
        """
        raise BrokenPipeError
