"""Comparisons: other ways to make a model forget, behind one call and with one report.

``Rival(...).forget(model, memorized, clean)``: see :class:`curvfast.baselines.rival.Rival`.
"""
