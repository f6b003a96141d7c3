"""train.py where a package is missing: python -m tests.launch.without_package PACKAGE [OPTIONS]."""

from __future__ import annotations

import sys

from launch.train import main

if __name__ == "__main__":
    package, *options = sys.argv[1:]
    # What is imported already, or imported it, is imported anew.
    for name in list(sys.modules):
        if name.split(".")[0] in (package, "launch") or name.startswith("torch.utils.tensorboard"):
            del sys.modules[name]
    sys.modules[package] = None  # Python takes None for a module that is not there
    main(options)
