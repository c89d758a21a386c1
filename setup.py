"""What pyproject.toml cannot say: recipes and tools lie beside the package in a clone, and inside it in a wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# Of tools/, what users need; the others measure and build this repository.
TOOLS = (
    "compare_runs",
    "convert_checkpoint",
    "demo",
    "doctor",
    "fsck",
    "inspect_checkpoint",
    "look",
    "plan",
    "plot_run",
    "prepare_data",
    "report",
    "search",
    "sweep",
    "train_tokenizer",
)
SHIPPED = [
    "requirements.txt",
    "configs/**/*.py",
    *(f"tools/{name}.py" for name in TOOLS),
    "tools/demo_page/*",
]


class BuildWithShipped(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # a clone has them already
            return
        for path in [path for pattern in SHIPPED for path in Path().glob(pattern)]:
            target = Path(self.build_lib) / "jaxlm" / "shipped" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


setup(cmdclass={"build_py": BuildWithShipped})
