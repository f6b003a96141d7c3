"""These tests need frameworks whose torchvision imports beside its own torch alone: `make test-frameworks`.

`make test` collects none of them. In an environment with Lightning, those run whose framework is there.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec

_NEEDED = ("fastai", "ignite", "lightning", "mmengine", "ray", "timm", "transformers")

if find_spec("lightning") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    collect_ignore = [f"test_{name}.py" for name in _NEEDED if find_spec(name) is None]
    if len(collect_ignore) > 0:
        collect_ignore += ["test_examples.py", "test_page.py", "test_zoo.py"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what these deprecated in each other since
        for module in ("fastai.callback.training", "ignite.engine", "lightning.pytorch", "mmengine.runner"):
            if find_spec(module.partition(".")[0]) is not None:
                import_module(module)
