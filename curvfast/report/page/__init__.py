"""One page of HTML that holds everything of a folder of results, and asks for nothing else.

``folder`` finds what is there; ``experiments``, ``saved`` and ``log`` turn it into blocks of
``document``; ``inline`` makes pictures of it that can be read on light and on dark; ``render``
fills the templates.
"""
