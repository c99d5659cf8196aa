"""The peers' environments, created once, of pinned requirements, with venv and pip; and this program's own commits."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent / "requirements"


def prepare_environment(name: str, folder: Path) -> str:
    """Return the interpreter of a peer's environment, which is created if its requirements have changed.

    Args:
        name: of the requirements: NAME.txt, and NAME-no-deps.txt, if it exists, installed without dependencies.
        folder: in which the environment is, under its name.
    """
    place = folder / name
    files = [path for path in (REQUIREMENTS / f"{name}.txt", REQUIREMENTS / f"{name}-no-deps.txt") if path.is_file()]
    wanted = "".join(path.read_text(encoding="utf-8") for path in files)
    made_of = place / "requirements.txt"
    python = str(place / "bin" / "python")
    if made_of.is_file() and made_of.read_text(encoding="utf-8") == wanted:
        return python
    print(f"Creating the environment {place}; this takes some minutes.", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    for path in files:
        flags = ["--no-deps"] if path.name.endswith("-no-deps.txt") else []
        subprocess.run([python, "-I", "-m", "pip", "install", "--quiet", *flags, "-r", str(path)], check=True)
    made_of.write_text(wanted, encoding="utf-8")
    return python


def prepare_commit(repository: Path, commit: str, folder: Path) -> str:
    """Write a commit's files and the packages that only earlier commits need, once; return its PYTHONPATH."""
    place = folder / f"before-{commit}"
    packages = place / "packages"
    if not packages.is_dir():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        archive = folder / f"before-{commit}.tar"
        subprocess.run(["git", "-C", str(repository), "archive", "-o", str(archive), commit], check=True)
        subprocess.run(["tar", "xf", str(archive), "-C", str(place)], check=True)
        archive.unlink()
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
        subprocess.run([*pip, "-r", str(REQUIREMENTS / "before-no-deps.txt")], check=True)
    return f"{place}{os.pathsep}{packages}"
