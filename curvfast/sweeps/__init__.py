"""Sweeps: many edits of one model, each measured and undone, compared at equal cost."""
