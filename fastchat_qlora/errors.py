"""The two ways in which a run ends early, by who can fix it."""

from collections.abc import Sequence


class UserError(Exception):
    """A mistake found before weights are loaded: one `error:` line, exit code 2."""


class RunError(Exception):
    """A failure of a run that must not continue or cannot be trusted: one `error:` line, exit code 1."""


class AgreedError(RunError):
    """A RunError that every process of the run raises alike; the first one reports it."""


def raise_errors(errors: Sequence[str]) -> None:
    """Raise all errors as one UserError, if there are any."""
    if errors:
        listed = "; ".join(f"({i}) {error}" for i, error in enumerate(errors, 1))
        raise UserError(errors[0] if len(errors) == 1 else f"{len(errors)} problems: {listed}")
