"""One command for a machine with an NVIDIA card: build, test, check and time the CUDA kernels on it (run.py).

The parent process (run, steps, build, checks, environment, record, judge, report, picture) needs Python alone: it starts
each step as a child, within a time, and writes the record after every result. The children (small_part, measure, with
timing and plan) import torch and the package that was just built.
"""
