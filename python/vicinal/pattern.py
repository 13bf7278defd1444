"""The pairwise facts of a plan: one text for Python numbers, tensors and Triton. The C++ twin is
csrc/pattern.h.

Operators only: Triton re-binds these functions as jitted ones.
"""


def bias_index(q_code, k_code):
    """Index into a head's row of the bias table: the sum of the two slots' codes."""
    return q_code + k_code


def crosses(q_region, k_region):
    """True where a pair of slots lies in different shift regions."""
    return q_region != k_region


def visible(first, last, coord, guard):
    """True where every field of coord lies between those of first and last; guard: the bit above each
    field."""
    return (((coord | guard) - first) & ((last | guard) - coord) & guard) == guard
