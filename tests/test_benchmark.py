"""The benchmark runs and prints each row of the table that README.md shows."""

import re

from support.command import ROOT, run

README = (ROOT / "README.md").read_text()
ROW = re.compile(r"^\| (.+?) \| [\d.]+ (?:/s|ms|MiB) \|.* [\d.]+ \|$", re.MULTILINE)


def test_the_benchmark_prints_the_rows_of_the_page() -> None:
    """Whether the figures are good is for a quiet machine to say."""
    measured = run("python", "tests/benchmark.py", "--quick")
    assert measured.returncode == 0, measured.stderr
    assert len(ROW.findall(measured.stdout)) == 5
    assert ROW.findall(README) == ROW.findall(measured.stdout)
