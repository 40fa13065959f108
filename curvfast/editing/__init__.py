"""Edits of weights: projections onto the eigenpairs that are kept."""
