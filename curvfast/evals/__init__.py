"""Evaluation of language models: memorization, perplexity, and task scores."""

from curvfast.evals.harness import harness_scores as harness_scores
