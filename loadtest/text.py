"""Prompt text that every machine has: slices of the Python standard library's own source.

Code for coding, docstrings for everything else. The same generator state and the same Python give
the same text. Nothing is stored in the project.
"""

from __future__ import annotations

import re
import sysconfig
from functools import cache
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np

Style: TypeAlias = Literal["code", "prose"]

CHARS_PER_TOKEN: Final = 3.3
_CODE_CLASSES: Final = frozenset({"coding"})
_FILE_CHARS: Final = range(8_000, 120_000)  # neither stubs nor tables
_DOCSTRING: Final = re.compile(r'^[ ]*r?"""(?=\S)(.*?)"""', re.DOTALL | re.MULTILINE)
_PROSE_CHARS: Final = 120  # shorter docstrings are labels


def style_of(slo_class: str) -> Style:
    """Code for coding classes, prose for the rest."""
    return "code" if slo_class in _CODE_CLASSES else "prose"


def prompt(
    rng: np.random.Generator, approx_tokens: int, style: Style = "prose", chars_per_token: float = CHARS_PER_TOKEN
) -> str:
    """About `approx_tokens` tokens of real text from a random line on; at least one character."""
    length = max(1, round(approx_tokens * chars_per_token))
    source = corpus(style)
    start = source.find("\n", int(rng.integers(0, len(source)))) + 1
    found = source[start : start + length]
    while len(found) < length:  # past the end it goes on from the beginning
        found += source[: length - len(found)]
    return found


@cache
def corpus(style: Style) -> str:
    """All the text of one style, in the order of the file names."""
    files = [path.read_text("utf-8", "replace") for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    code = [text for text in files if len(text) in _FILE_CHARS]
    if style == "code":
        return "\n".join(code)
    docstrings = (found.strip() for text in code for found in _DOCSTRING.findall(text))
    return "\n\n".join(text for text in docstrings if len(text) >= _PROSE_CHARS) + "\n"
