"""These tests need frameworks whose torchvision imports beside its own torch alone: `make test-frameworks`.

`make test` collects none of them. In an environment with Lightning, those run whose framework is there.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec

_NEEDED = ("fastai", "lightning", "timm", "transformers")

if find_spec("lightning") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    collect_ignore = [f"test_{name}.py" for name in _NEEDED if find_spec(name) is None]
    if find_spec("fastai") is None or find_spec("transformers") is None:
        collect_ignore += ["test_examples.py", "test_page.py"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what these deprecated in each other since
        for name, module in {"fastai": "fastai.callback.training", "lightning": "lightning.pytorch"}.items():
            if find_spec(name) is not None:
                import_module(module)
