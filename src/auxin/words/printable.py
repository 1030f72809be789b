"""Text from anywhere, as far as pages, pictures and terminals can show it."""

import re

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Control characters but for tab and line ends, halves of pairs, and what is no character. XML 1.0 (section 2.2) has no
form for most of them, UTF-8 none for halves, and a terminal obeys some."""


def printable(text: str) -> str:
    """`text` with a replacement character (U+FFFD) for each character that can't be shown."""
    return _UNPRINTABLE.sub("\ufffd", text)
