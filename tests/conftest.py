"""Hides the GPU, and gives each of several workers a folder that they share, and one thread."""
import os
import shutil
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""     # the tests are of fp32 on a CPU
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure(config):
    import helpers

    config.test_folder = helpers.SHARED     # the workers inherit it
    if not WORKER and getattr(config.option, "numprocesses", None):
        for name in helpers.processes.LAUNCHER_VARIABLES:      # each worker is a world of its own
            os.environ.pop(name, None)


def pytest_unconfigure(config):
    if not WORKER:
        shutil.rmtree(config.test_folder, ignore_errors=True)
