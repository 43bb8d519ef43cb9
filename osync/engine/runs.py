"""Cuts text where llama.cpp's own cutter would end the process. Pure.

For byte-pair vocabularies llama.cpp first cuts a text with a regular expression. Where it has no code of its own
for it (deepseek, tekken, gpt-4o, bloom and others), std::regex goes one call deeper for each character of a match:
a run of 24,000 letters without a space overruns a stack of 8 MiB, and some expressions take quadratic time.
No expression matches across both a run of space and a run of anything else, so only long runs are cut.
"""

from __future__ import annotations

import re

MAX_RUN = 4096
"""Characters; a sixth of what a thread's stack of 8 MiB bears."""
_MARGIN = 40
"""Longer than the text of a special token such as <|im_end|>, which must not be cut."""
_LONG = re.compile(rf"\S{{{MAX_RUN + 1},}}|\s{{{MAX_RUN + 1},}}")
_MARK = re.compile(r"[<>\[\]|{}]")


def cut_runs(text: str) -> list[str]:
    """Return the text in pieces, most often one, none of which holds a run over MAX_RUN; joined they are the text."""
    if len(text) <= MAX_RUN:
        return [text]
    pieces: list[str] = []
    start = 0
    for run in _LONG.finditer(text):
        at = run.start()
        while run.end() - at > MAX_RUN:
            at = _place(text, at, at + MAX_RUN)
            pieces.append(text[start:at])
            start = at
    pieces.append(text[start:])
    return pieces


def _place(text: str, low: int, high: int) -> int:
    """Return the last place up to `high` that is surely not within a special token; `high` if there is none."""
    place = high
    while place - _MARGIN > low:
        marks = [mark.start() for mark in _MARK.finditer(text, place - _MARGIN, place + _MARGIN)]
        if not marks:
            return place
        place = marks[0] - _MARGIN
    return high
