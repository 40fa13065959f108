"""Experiments in small on what an edit removes: images with wrong labels, tasks, passages."""
