"""Cases of the pairwise family."""

from cases.case import Case


def pairwise_cases() -> list[Case]:
    return []
