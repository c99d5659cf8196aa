"""HTML pages, each in one file that needs no other file and no network."""

from collections.abc import Iterator
from functools import cache
from typing import Any

from fastchat_qlora import __version__
from fastchat_qlora.utils.text import escape_control

BUFFERED_PIECES = 64  # of a page, written at once


def stream_page(package: str, name: str, **values: Any) -> Iterator[str]:
    """Yield a rendered template piece by piece; every value is escaped unless it is marked as safe.

    Args:
        package: the package whose folder `templates` holds the template; it can extend those of this package.
        name: name of the template without its suffixes.
        values: variables of the template. Its filter `visible` is escape_control, for untrusted text.
    """
    stream: Any = _get_environment(package).get_template(f"{name}.html.jinja").stream(version=__version__, **values)
    stream.enable_buffering(BUFFERED_PIECES)
    yield from stream


@cache  # it keeps the compiled templates: a run writes its page many times
def _get_environment(package: str) -> Any:
    from jinja2 import ChoiceLoader, Environment, PackageLoader

    loader = ChoiceLoader([PackageLoader(package), PackageLoader(__package__)])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = escape_control
    return environment
