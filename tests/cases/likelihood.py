"""Cases of the likelihood family."""

from cases.case import Case


def likelihood_cases() -> list[Case]:
    return []
