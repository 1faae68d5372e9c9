"""Puts configs/ into wheels as moma_jax/configs, so that recipes have names wherever the package is installed."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithRecipes(build_py):
    """The package's modules, and the recipes beside them; an editable install finds these where they are."""

    def run(self):
        super().run()
        for path in () if self.editable_mode else Path("configs").rglob("*.py"):
            target = Path(self.build_lib, "moma_jax", path)
            self.mkpath(str(target.parent))
            self.copy_file(str(path), str(target))


setup(cmdclass={"build_py": WithRecipes})
