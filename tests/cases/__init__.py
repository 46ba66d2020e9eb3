"""One case for each way of calling a public op: small inputs, options, and the reference it must equal.

The generic tests (test_every_op.py) run over all of them; what is particular to a family stands in tests/ops/.
"""

from cases.adam import adam_cases
from cases.assignment import assignment_cases
from cases.bayes import bayes_cases
from cases.case import Case, as_tuple
from cases.categorical import categorical_cases
from cases.codebook import codebook_cases
from cases.gaussian import gaussian_cases
from cases.likelihood import likelihood_cases
from cases.pairwise import pairwise_cases
from cases.residual import residual_cases
from cases.scalar import scalar_cases
from cases.selection import selection_cases
from cases.sparse import sparse_cases
from cases.topk import topk_cases

__all__ = ["CASES", "Case", "as_tuple"]

CASES = (
    gaussian_cases()
    + likelihood_cases()
    + pairwise_cases()
    + categorical_cases()
    + codebook_cases()
    + assignment_cases()
    + residual_cases()
    + scalar_cases()
    + topk_cases()
    + selection_cases()
    + sparse_cases()
    + adam_cases()
    + bayes_cases()
)
