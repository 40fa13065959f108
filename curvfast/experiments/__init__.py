"""Experiments in small on what an edit removes: the demo, the lab, and the paper's studies."""
