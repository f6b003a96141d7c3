"""What hatchling runs when the package is installed from source: compile the passes, if there is a compiler."""

from __future__ import annotations

import runpy
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompilePasses(BuildHookInterface[Any]):  # type: ignore[misc, unused-ignore] # hatchling need not be there
    """Puts the libraries into the wheel, or beside the source in an editable install. No compiler is no error."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        here = Path(self.root) / "syncaccum/layer/kernels"
        # The image's first layer has this file, and no source yet.
        if not (here / "passes.cpp").exists():
            return
        try:
            # By path: importing the package would import torch.
            built = runpy.run_path(str(here / "build.py"))["build"]()
        except OSError as error:
            self.app.display_warning(f"without compiled passes: no C++ compiler ({error})")
            return
        except subprocess.CalledProcessError as error:
            self.app.display_warning(f"without compiled passes: {error}\n{error.stderr}")
            return
        build_data["artifacts"] += [str(path.relative_to(self.root)) for path in built]
        build_data["pure_python"] = False
        # Any Python may load them, but not any machine.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
