"""Reports: figures, and one self-contained HTML page of all results in a folder.

``folder`` finds what is there; ``results`` and ``saved`` turn it into blocks of ``document``;
``inline`` makes pictures of it that can be read on light and on dark; ``render`` fills the
templates.
"""
