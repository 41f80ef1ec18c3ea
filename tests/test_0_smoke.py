"""test_smoke.py as users run it. First in the order of the files: it takes longest."""
import sys

from helpers import script


def test_smoke():
    done = script(sys.executable, "test_smoke.py", env=dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stdout + done.stderr
