"""Runs over many processes: rehearsal on CPU, checkpoints, signals."""
