"""Titles of the studies, and the figures or tables of arXiv 2510.24256 that they replicate."""

from __future__ import annotations

NAMES: dict[str, tuple[str, str]] = {
    "figure2": ("components excited by what is known by heart, layer by layer", "Figure 2"),
    "figure3": ("what an edit takes of each ability, from recitation to logic", "Figure 3"),
    "figure4": ("flat activations of a task against what an edit takes of it", "Figure 4"),
    "table1": ("edits beside a rival that is told what to forget", "Table 1"),
    "table2": ("wrong labels that a vision transformer learnt by heart, forgotten", "Table 2"),
    "detector": ("memorized text told without labels, by its activations alone", ""),
    "spectra": ("how few directions hold the curvature, and how fast it falls off", ""),
    "inversion": ("whether what is memorized is sharp alone and flat for the population", ""),
    "dynamics": ("when memorization parts from the rest in the spectrum, over training", ""),
    "architectures": ("the edit on an LSTM and an MLP-Mixer, beside transformers", ""),
    "recovery": ("arithmetic taught again after an edit: what comes back with it", ""),
}
"""Title and source; the source is empty where a study goes beyond the paper."""
