import inspect

import pytest

from isthmus import diagnostics, objectives
from isthmus.objectives import schedules

FUNCTIONS = [
    function
    for module in (objectives, schedules, diagnostics)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if not name.startswith("_") and function.__module__.startswith(("isthmus.objectives", "isthmus.diagnostics"))
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_function_has_equation_arguments_and_example(function):
    for section in ("Args:", "Returns:", "Example:", ">>>"):
        assert section in function.__doc__
    described = function.__doc__.split("Args:")[1].split("Returns:")[0]
    for argument in inspect.signature(function).parameters:
        assert argument in described, argument
