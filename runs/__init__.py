"""Keeps a run safe: checkpoints, locks, saving, learning curves."""
