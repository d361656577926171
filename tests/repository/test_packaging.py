"""What pyproject.toml declares is what the package imports, from a lower bound on that .ci/run tests."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

import pytest

from lightning_modules.cli.errors import CONFIG_FOLDERS
from tests.paths import ROOT, module_at

#: Imported beside the library that brings it and whose releases it has to fit.
COMES_WITH = {
    "huggingface-hub": "transformers",
    "tokenizers": "transformers",
    "markupsafe": "jinja2",
    "tqdm": "lightning",
}


def imported() -> set[str]:
    """Distributions that the package and its scripts import, anywhere in a file."""
    files = [*ROOT.glob("acckv/**/*.py"), *ROOT.glob("lightning_modules/**/*.py"), *ROOT.glob("*.py")]
    modules = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.partition(".")[0])
    modules -= {*sys.stdlib_module_names, "acckv", "lightning_modules"}
    names = packages_distributions()
    return {re.sub("[-_.]+", "-", names[module][0]).lower() for module in modules if module in names}


def test_dependencies_are_those_that_are_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[\[>]", requirement)[0] for requirement in project["dependencies"]}
    optional = {re.split(r"[\[>]", name)[0] for names in project["optional-dependencies"].values() for name in names}
    used = {COMES_WITH.get(name, name) for name in imported()}
    assert used - optional == declared


def test_the_wheel_brings_the_configs_to_where_they_are_looked_for() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert ROOT / wheel["force-include"]["configs"] in CONFIG_FOLDERS
    assert ROOT / "configs" in CONFIG_FOLDERS and (ROOT / "configs" / "calib.yaml").is_file()


@pytest.fixture(scope="module")
def constraints() -> ModuleType:
    return module_at(".ci/oldest.py")


def test_the_oldest_releases_are_the_lower_bounds(constraints: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "pyproject.toml"
    head = '[project]\noptional-dependencies = {test = ["pytest>=8", "av>=14"]}\n'
    file.write_text(head + 'dependencies = ["av>=14", "transformers>=5.24,<6", "jsonargparse[signatures]>=4.49"]\n')
    assert constraints.oldest(file) == ["av==14", "jsonargparse==4.49", "pytest==8", "transformers==5.24"]
    file.write_text(head + 'dependencies = ["rich"]\n')
    with pytest.raises(SystemExit, match="rich has no lower bound"):
        constraints.oldest(file)
    assert len(constraints.oldest(ROOT / "pyproject.toml")) >= 20
