"""The benchmark runs, and prints every figure that README.md shows."""

import re

from harness import run


def test_the_benchmark_prints_every_figure() -> None:
    """Whether they are good is for a quiet machine to say."""
    measured = run("python", "tests/benchmark.py", "--quick", "--uvloop")
    assert measured.returncode == 0, measured.stderr
    rows = re.findall(
        r"^\| (.+?) \| (\d[\d.]*) ?(?:s|/s|ms|MB) \|", measured.stdout, re.MULTILINE
    )
    assert [name for name, _ in rows] == [
        "Start-up, to the first answer",
        "Logins",
        "Logins at twice the capacity",
        "Token checks, 16 clients",
        "Token checks with uvloop and httptools",
        "A check during logins, median",
        "A check during logins, 99 %",
        "A check during logins, slowest",
        "Memory after 4,000 requests",
    ]
    assert all(float(figure) > 0 for _, figure in rows)
