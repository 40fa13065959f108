"""Ways to forget, compared at the perplexity they cost, on passages named to them and on others."""
