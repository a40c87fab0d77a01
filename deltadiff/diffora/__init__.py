"""DiffoRA: find out which modules are worth a low-rank pair, then train those.

stage 1   `Search` puts a pair and a gate on every candidate; `search` trains both in turn
between   `GateMatrix.discretise` keeps the largest gates of each layer
stage 2   `apply_` gives the selected modules pairs of their own, the others shared ones
"""

from .bilevel import Search
from .gates import Candidates, GateMatrix, Selection, find_candidates, random_selection
from .rounds import Split, search, split
from .sharing import apply_, selection_of

__all__ = [
    "Candidates",
    "GateMatrix",
    "Search",
    "Selection",
    "Split",
    "apply_",
    "find_candidates",
    "random_selection",
    "search",
    "selection_of",
    "split",
]
