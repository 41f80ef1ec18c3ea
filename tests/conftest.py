"""Hides the GPU, and builds the little world of the tests once, also when several workers run them."""
import os
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""                  # the tests are of fp32 on a CPU, also where there is a GPU
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
