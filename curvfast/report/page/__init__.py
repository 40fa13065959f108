"""One self-contained HTML page of all results in a folder.

``folder`` finds the results; ``experiments``, ``saved`` and ``log`` convert them to blocks of
``document``; ``inline`` makes SVG drawings for light and dark mode; ``render`` fills the templates.
"""
