"""Measures of what a language model recites and of how well it predicts."""
