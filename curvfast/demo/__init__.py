"""The paper's experiments in small, on real text."""
