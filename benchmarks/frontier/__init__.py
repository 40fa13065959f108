"""Comparison of methods of forgetting at equal perplexity, on seen and unseen passages."""
