"""The two ways in which a run ends early, by who can fix it."""


class UserError(Exception):
    """A mistake found before weights are loaded: one `error:` line, exit code 2."""


class RunError(Exception):
    """A failure of a run that must not continue or cannot be trusted: one `error:` line, exit code 1."""


class AgreedError(RunError):
    """A RunError that every process of the run raises alike; the first one reports it."""
