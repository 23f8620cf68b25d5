"""What pyproject.toml promises is what stands in the folders."""

from __future__ import annotations

import ast
import os
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
# for people who read the repository, not for the program
NOT_INSTALLED = ("apps/assets", "apps/examples")


def files(folder: Path) -> list[Path]:
    """Files of a folder, without following links and without caches."""
    found = []
    for directory, names, entries in os.walk(folder):
        names[:] = [n for n in names if n != "__pycache__" and not Path(directory, n).is_symlink()]
        found += [Path(directory, e) for e in entries if not Path(directory, e).is_symlink()]
    return sorted(found)


def folder_of(package: str) -> Path:
    """Where the files of a package stand, by its longest prefix in package-dir."""
    directories: dict[str, str] = SETUPTOOLS["package-dir"]
    prefix = max((p for p in directories if f"{package}.".startswith(f"{p}.")), key=len)
    return ROOT.joinpath(directories[prefix], *package.removeprefix(prefix).split(".")[1:])


FOLDERS = {folder_of(package): package for package in SETUPTOOLS["packages"]}


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_declared_packages_exist(package: str) -> None:
    assert folder_of(package).is_dir()


@pytest.mark.parametrize("root", ["vidkv", "apps", "kernels", "models"])
def test_folders_with_modules_are_declared(root: str) -> None:
    # examples are run from a checkout, not imported from an installation
    folders = {path.parent for path in files(ROOT / root) if path.suffix == ".py"} - {ROOT / "apps/examples"}
    assert {str(f.relative_to(ROOT)) for f in folders - FOLDERS.keys()} == set()


@pytest.mark.parametrize("root", ["vidkv", "apps", "kernels", "models"])
def test_every_data_file_is_packaged(root: str) -> None:
    packaged = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in folder_of(package).glob(pattern)
    }
    missing = [
        str(path.relative_to(ROOT))
        for path in files(ROOT / root)
        if path.suffix not in (".py", ".pyc") and path not in packaged
    ]
    assert [name for name in missing if not name.startswith(NOT_INSTALLED)] == []


def test_declared_packages_are_sorted_and_unique() -> None:
    assert SETUPTOOLS["packages"] == sorted(set(SETUPTOOLS["packages"]))


def test_the_version_can_be_read_without_importing() -> None:
    """Building the wheel must not need torch."""
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "vidkv.__version__"}
    tree = ast.parse((ROOT / "vidkv" / "__init__.py").read_text())
    values = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and [ast.unparse(target) for target in node.targets] == ["__version__"]
    ]
    assert len(values) == 1 and isinstance(values[0], str)


def test_the_console_script_exists() -> None:
    module, function = PROJECT["project"]["scripts"]["vidkv"].split(":")
    package, _, name = module.rpartition(".")
    tree = ast.parse((folder_of(package) / f"{name}.py").read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_constraints_lie_inside_the_declared_ranges() -> None:
    declared = {r.name: r for r in map(Requirement, PROJECT["project"]["dependencies"])}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert {pin.name for pin in pins} == {"torch", "triton"}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert declared[pin.name].specifier.contains(specifier.version)


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "Makefile", ".ci/run"])
def test_no_package_index_is_named(name: str) -> None:
    """Where packages come from is the user's setting, not the project's."""
    text = (ROOT / name).read_text()
    for option in ("index-url", "find-links", "://"):
        assert option not in text


def test_the_ci_script_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
