"""Evaluation of language models: memorization, perplexity, and task scores."""

from curvfast.evals.lm_eval import harness_scores as harness_scores
