"""Comparisons: other ways to choose what of a weight to keep, edited by the same code."""
