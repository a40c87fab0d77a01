"""DiffoRA: find out which modules are worth a low-rank pair of their own, then train those.

stage 1   `Search` (bilevel.py) puts a pair and a gate on every candidate; `search` (rounds.py)
          trains both in turn
between   `GateMatrix.discretise` (gates.py) selects the modules with the largest gates of each
          layer; `plot_gates` (heat_map.py) draws them
stage 2   `apply_` (sharing.py) gives the selected modules pairs of their own, and the others
          shared ones

Users and other rooms import the names below; `plot_gates`, which needs matplotlib, from its file.
"""

from .bilevel import Search
from .candidates import Candidates, find_candidates
from .data_split import Split, split
from .gates import GateMatrix, Selection, random_selection
from .gram import compare_grams, gram
from .rounds import search
from .sharing import apply_, selection_of

__all__ = [
    "Candidates",
    "GateMatrix",
    "Search",
    "Selection",
    "Split",
    "apply_",
    "compare_grams",
    "find_candidates",
    "gram",
    "random_selection",
    "search",
    "selection_of",
    "split",
]
