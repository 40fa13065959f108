"""Measures of what a language model recites, how well it predicts, and what tasks it can do."""

from curvfast.evals.harness import harness_scores as harness_scores
