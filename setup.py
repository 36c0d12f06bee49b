"""What pyproject.toml cannot say: a wheel has the shipped model inside, so that it works anywhere."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

NAME = "inception_ser_final"


class WithModel(build_py):
    """Copies the files of the shipped bundle, but not the network that the first use exports (`model.onnx`)."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "pipeline", "shipped", NAME)
            self.mkpath(str(target))
            for file in Path("models", NAME).iterdir():
                if file.is_file() and file.suffix != ".onnx":
                    self.copy_file(str(file), str(target / file.name))


setup(cmdclass={"build_py": WithModel})
