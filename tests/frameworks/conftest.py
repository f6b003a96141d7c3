"""These tests need timm and fastai, whose torchvision imports beside its own torch alone: `make test-frameworks`."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec

if find_spec("timm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fastai, as it is imported, about what torch and pandas deprecated since
        import_module("fastai.callback.training")
