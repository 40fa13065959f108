"""Edits of weights: projections onto the eigenpairs that are kept."""

from curvfast.editing.edit import edit as edit
from curvfast.editing.edit import edited as edited
from curvfast.editing.edit import restore as restore
