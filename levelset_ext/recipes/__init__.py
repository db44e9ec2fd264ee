"""Whole jobs: training loops with files, progress, checkpoints and resumption."""
