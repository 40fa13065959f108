"""Studies: the paper's figures and tables, and claims beyond it, on models trained here.

``names`` lists the studies, ``catalogue`` holds them, ``runs`` measures one over seeds.
"""
