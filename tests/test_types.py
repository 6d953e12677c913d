"""A type checker accepts what a reader writes by the example in main.py."""

import shutil
from pathlib import Path

from support.command import ROOT, run
from support.page import docstring_example

CACHE = str(ROOT / ".mypy_cache")  # .ci/run is faster with it


def test_the_example_has_no_error_of_types(tmp_path: Path) -> None:
    """main.py and init_db.py themselves are checked by mypy and pyright in .ci/run."""
    shutil.copy(ROOT / "main.py", tmp_path)
    (tmp_path / "notes.py").write_text(docstring_example())
    done = run("mypy", "--strict", "notes.py", folder=tmp_path, MYPY_CACHE_DIR=CACHE)
    assert done.returncode == 0, done.stdout + done.stderr
