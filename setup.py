"""The build step that lays notebooks, presets, bundled models and published figures into the wheel.

They stand once in git, in notebooks/ and data/, where a reader opens them; a wheel has copies in
tclib/assets. `tclib.support.places` finds either.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ASSETS = (
    *("notebooks/*.ipynb", "notebooks/presets/*", "data/demo/*/*", "data/paper/*.csv"),
    "data/paper/*.json",
    "data/reference/demo*/*/*",
)


class BuildWithAssets(build_py):
    """build_py, then the copies; an editable install reads the checkout and needs none."""

    def run(self) -> None:
        built = Path(self.build_lib) / "tclib"
        if not self.editable_mode:
            shutil.rmtree(built, ignore_errors=True)  # a wheel holds no file of an earlier build
        super().run()
        if not self.editable_mode:
            for source in self._assets():
                target = built / "assets" / source
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *map(str, self._assets())]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        if self.editable_mode:
            return super().get_outputs(include_bytecode)
        copies = [Path(self.build_lib) / "tclib" / "assets" / source for source in self._assets()]
        return [*super().get_outputs(include_bytecode), *map(str, copies)]

    @staticmethod
    def _assets() -> list[Path]:
        return [path for pattern in ASSETS for path in sorted(Path().glob(pattern))]


setup(cmdclass={"build_py": BuildWithAssets})
