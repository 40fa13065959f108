"""Sweeps: one model edited many ways, each measured and undone, compared at equal cost."""
