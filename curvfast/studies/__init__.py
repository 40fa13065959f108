"""The paper's evidence, and what goes beyond it: one study a claim, measured on models made here.

``names`` says what there is, ``catalogue`` holds the studies, ``runs`` measures one over seeds.
"""
