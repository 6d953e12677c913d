"""Type checkers accept the service, and what a reader writes by the example in main.py."""

import shutil
from pathlib import Path

import pytest
from support.command import ROOT, run
from support.page import docstring_example


@pytest.mark.parametrize(
    "checker", [("mypy", "--strict"), ("pyright", "--pythonpath")], ids=["mypy", "pyright"]
)  # fmt: skip
def test_no_error_of_types(checker: tuple[str, str], tmp_path: Path) -> None:
    for name in ("main.py", "init_db.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "notes.py").write_text(docstring_example())
    files = ("main.py", "init_db.py", "notes.py")
    if checker[0] == "pyright":
        python = run("python", "-c", "import sys; print(sys.executable)").stdout.strip()
        checker = (*checker, python)
    done = run(*checker, *files, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
