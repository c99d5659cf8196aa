"""The two ways a run ends early, told apart by who can mend it."""


class UserError(Exception):
    """A mistake found before weights are loaded: one `error:` line, exit code 2."""


class RunError(Exception):
    """A run that must not go on or cannot be trusted: one `error:` line, exit code 1."""


class AgreedError(RunError):
    """A RunError that every process of the run raises alike: the first one tells it."""
