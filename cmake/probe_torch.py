"""Print version;cuda;directory of the installed torch, without importing it (which takes seconds).

An isolated build hides the environment's packages from sys.path, but sysconfig still knows where they live.
"""

import pathlib
import runpy
import sys
import sysconfig

places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
for place in places:
    root = pathlib.Path(place or ".") / "torch"
    if (root / "version.py").is_file():
        facts = runpy.run_path(str(root / "version.py"))
        print(facts["__version__"], facts["cuda"] or "none", root.resolve(), sep=";")
        sys.exit(0)
sys.exit(f"no torch in {places}")
