"""The house as the design says: who may import whom."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fastchat_qlora"
FLOORS = [
    {"errors", "signals", "text"},
    {
        *("deepspeed_config", "distributed", "flag_parsing", "fsdp_config", "number_checks", "pages", "path_checks"),
        "standard_output",
    },
    {"deepspeed_checks", "old_flags"},
    {"group_building", "json_settings"},
    {"argument_checks", "config_printing", "settings_file"},
    {"config_file"},
    {"argument_adaptation", "first_look"},
    {"arguments"},
    {"data", "model"},
    {"training"},
    {"commands"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(path: Path) -> set[str]:
    """Rooms of the package that a file imports, anywhere in it."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import hides the arrow"
            names = [node.module or ""]
            if node.module == "fastchat_qlora":  # a room, or a name of the package itself
                names += [f"{node.module}.{alias.name}" for alias in node.names if alias.name in FLOOR_OF]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("fastchat_qlora.")}
    return rooms


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        assert not imported_rooms(path)
        return
    for other in imported_rooms(path) - {room}:
        assert FLOOR_OF[other] < FLOOR_OF[room], f"{room} must not import {other}"


def test_data_and_model_are_seen() -> None:
    """The arrows above are drawn from real imports: training knows both rooms, and they do not know each other."""
    assert {"data", "model"} <= imported_rooms(PACKAGE / "training" / "run.py")
    for room, other in (("data", "model"), ("model", "data")):
        for path in (PACKAGE / room).glob("*.py"):
            assert other not in imported_rooms(path)
