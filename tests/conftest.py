"""Hides the GPU from the tests, and gives each of several workers one thread."""
import os
import shutil
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""     # the tests are of fp32 on a CPU
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def pytest_configure(config):
    import helpers  # makes the folder that the workers inherit

    config.test_folder = helpers.SHARED


def pytest_unconfigure(config):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(config.test_folder, ignore_errors=True)
