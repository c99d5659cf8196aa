"""HTML pages, each in one file that needs no other and no network."""

from collections.abc import Iterable
from typing import Any

from fastchat_qlora import __version__
from fastchat_qlora.text import visible

PIECES = 64
"""Of a page that are handed over at once."""


def stream_page(name: str, **values: Any) -> Iterable[str]:
    """Fill in a template, piece by piece; every value is escaped but for what is marked as safe.

    Args:
        name: of a template in `templates/`.
        values: its variables. Its filter `visible` is text.visible, for what strangers have written.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("fastchat_qlora", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = visible
    stream = environment.get_template(f"{name}.html.jinja").stream(version=__version__, **values)
    stream.enable_buffering(PIECES)
    return stream
