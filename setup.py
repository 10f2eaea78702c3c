"""The one step of the build that pyproject.toml cannot say: the type stubs are made from tinymia.py.

Type checkers look for a file py.typed in a package to see that it has types, and a single module cannot hold one. The
stub package tinymia-stubs stands for it: it is tinymia.py once more, under the name __init__.pyi. It is copied when a
wheel is made, so that the repository holds no second copy and no link, which Windows and zip downloads do not keep.
"""
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithStubs(build_py):
    """Copy what is installed, and the stubs."""

    def run(self) -> None:
        """Copy the files; in a wheel, the engine once more as stubs."""
        super().run()
        if not self.editable_mode:
            Path(self.build_lib, "tinymia-stubs").mkdir(parents=True, exist_ok=True)
            self.copy_file("tinymia.py", str(Path(self.build_lib, "tinymia-stubs", "__init__.pyi")))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """The files that are copied, with the stubs."""
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib, "tinymia-stubs", "__init__.pyi"))]


setup(cmdclass={"build_py": WithStubs})
