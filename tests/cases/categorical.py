"""Cases of the categorical family."""

from cases.case import Case


def categorical_cases() -> list[Case]:
    return []
