"""Try the service on a throw-away PostgreSQL: python3 tests/try_it.py [--port 8001]

Nothing has to be installed before, and nothing is left behind but .venv with the packages.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
OLDEST = (3, 11)  # the oldest version of Python that will do


def install() -> None:
    """Make .venv, if there is none, and install what is missing in it."""
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    packages = ["-r", ROOT / "tests" / "try_it.txt"]
    pip = [PYTHON, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, *packages], check=True)


if __name__ == "__main__":
    if sys.version_info < OLDEST:
        sys.exit(
            "error: this needs Python 3.11 or newer, not " + sys.version.split()[0]
        )
    if Path(sys.prefix) != VENV or find_spec("psutil") is None:
        print("Installing the packages into .venv, which takes about half a minute ...")
        try:
            install()
        except subprocess.CalledProcessError:
            sys.exit("error: the packages could not be installed, see above")
        except KeyboardInterrupt:
            sys.exit(130)
        sys.stdout.flush()
        os.execv(PYTHON, [PYTHON, __file__, *sys.argv[1:]])  # the same, by that Python
    sys.dont_write_bytecode = True
    from support.try_out import main

    main()
