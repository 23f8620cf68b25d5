"""The shape of the repository: who may import whom, what loads when, what stands where."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("apps", "kernels", "models")
TOP_LEVEL = {
    *("vidkv", "apps", "kernels", "models", "tests"),
    *("pyproject.toml", "constraints.txt", "Makefile", "LICENSE"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
}
HEAVY = ("accelerate", "av", "diffusers", "gradio", "transformers")


def sources(folder: str) -> list[Path]:
    """Python files of a top-level folder; the links inside `vidkv` lead to the other folders."""
    found = []
    for directory, names, files in os.walk(ROOT / folder):
        names[:] = [n for n in names if n != "__pycache__" and not Path(directory, n).is_symlink()]
        found += [Path(directory, name) for name in files if name.endswith(".py")]
    return sorted(found)


def module_name(path: Path) -> str:
    """`kernels/rope.py` is `vidkv.kernels.rope`; a package keeps its `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "vidkv" else ("vidkv", *parts))


def imports(source: str, module: str) -> Iterator[str]:
    """Everything that a module imports, at any depth, as absolute dotted names.

    `from a import b` counts as `a.b`: b may be a module, and a rule on `a` covers it either way.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def violation(folder: str, name: str) -> str | None:
    """Why a file of this folder must not import this name, or None."""
    if inside(name, LINKED):
        return "the folders are imported as vidkv.apps, vidkv.kernels, vidkv.models"
    if folder == "kernels":
        allowed = ("torch", "triton", "vidkv.kernels", *sys.stdlib_module_names)
        return None if inside(name, allowed) else "kernels know torch, triton and one another"
    if folder == "models":
        allowed = ("vidkv.models", "vidkv.errors")
        if inside(name, ("vidkv",)) and not inside(name, allowed):
            return "models know only vidkv.models and vidkv.errors of vidkv"
    if folder == "vidkv" and inside(name, ("vidkv.apps",)):
        return "the engine does not know the apps"
    return None


class TestImportDirection:
    @pytest.mark.parametrize("folder", ["kernels", "models", "vidkv", "apps"])
    def test_nobody_imports_upwards(self, folder: str) -> None:
        found = [
            f"{path.relative_to(ROOT)}: {name} ({reason})"
            for path in sources(folder)
            for name in imports(path.read_text(), module_name(path))
            if (reason := violation(folder, name))
        ]
        assert not found, "\n".join(found)

    @pytest.mark.parametrize("folder", ["kernels", "models", "vidkv", "apps"])
    def test_there_is_something_to_check(self, folder: str) -> None:
        assert sources(folder)

    @pytest.mark.parametrize(
        ("folder", "source"),
        [
            ("kernels", "import numpy"),
            ("kernels", "from vidkv import cache"),
            ("kernels", "from vidkv.models.wan import Wan"),
            ("kernels", "from ..cache import spec"),
            ("models", "import vidkv"),
            ("models", "def f():\n    from vidkv.cache.spec import CacheSpec"),
            ("models", "if TYPE_CHECKING:\n    import vidkv.kernels.rope as rope"),
            ("models", "from .. import rollout"),
            ("vidkv", "from vidkv.apps.cli import main"),
            ("vidkv", "from . import apps"),
            ("vidkv", "from models import wan"),
            ("apps", "import kernels"),
        ],
    )
    def test_the_rules_see_a_violation(self, folder: str, source: str) -> None:
        module = f"vidkv.{folder}.probe".replace("vidkv.vidkv", "vidkv")
        assert any(violation(folder, name) for name in imports(source, module))

    @pytest.mark.parametrize(
        ("folder", "source"),
        [
            ("kernels", "import math, torch\nimport triton.language as tl"),
            ("kernels", "from . import rope\nfrom vidkv.kernels.rope import rotate"),
            ("models", "import vidkv.models.wan\nfrom vidkv.errors import CheckpointError"),
            ("models", "from diffusers import ModelMixin\nfrom .registry import MODELS"),
            ("vidkv", "from vidkv.kernels import rope\nfrom vidkv import models"),
            ("apps", "from vidkv import rollout\nimport vidkv.models.wan"),
        ],
    )
    def test_the_rules_allow_the_rest(self, folder: str, source: str) -> None:
        module = f"vidkv.{folder}.probe".replace("vidkv.vidkv", "vidkv")
        assert not any(violation(folder, name) for name in imports(source, module))


class TestWhatLoadsWhen:
    @pytest.mark.parametrize("module", ["vidkv", "vidkv.cache", "vidkv.kernels.rope"])
    def test_the_core_is_light(self, module: str) -> None:
        assert not loaded_by(module) & set(HEAVY)

    def test_the_check_sees_a_heavy_import(self) -> None:
        assert "av" in loaded_by("av")


def loaded_by(module: str) -> set[str]:
    """Top-level modules present after a fresh interpreter has imported one module."""
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", code]
    return set(subprocess.check_output(command, cwd=ROOT, text=True).split())


class TestFolders:
    @pytest.mark.parametrize("folder", LINKED)
    def test_no_init_at_the_root_of_a_folder(self, folder: str) -> None:
        """With one, a checkout on sys.path hides Hugging Face's package named kernels."""
        assert not (ROOT / folder / "__init__.py").exists()

    @pytest.mark.parametrize("folder", LINKED)
    def test_links_are_whole_and_relative(self, folder: str) -> None:
        link = ROOT / "vidkv" / folder
        assert link.is_symlink()
        assert os.readlink(link) == f"../{folder}"
        assert link.resolve() == ROOT / folder

    def test_no_conftest_at_the_root(self) -> None:
        """It would put the checkout, and with it the three folders, on sys.path."""
        assert not (ROOT / "conftest.py").exists()

    def test_only_known_names_at_the_top(self) -> None:
        top = {name.split("/")[0] for name in repository_files()}
        assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL

    def test_links_are_stored_as_links(self) -> None:
        staged = git("ls-files", "--stage", *(f"vidkv/{folder}" for folder in LINKED))
        assert [line.split()[0] for line in staged.splitlines()] == ["120000"] * len(LINKED)


def repository_files() -> list[str]:
    """Files that are committed or would be."""
    return git("ls-files", "--cached", "--others", "--exclude-standard").splitlines()


def git(*arguments: str) -> str:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    # a hook that runs the tests exports where its own repository is
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    command = ["git", "-C", str(ROOT), "-c", "safe.directory=*", *arguments]
    try:
        return subprocess.check_output(command, text=True, env=environment)
    except FileNotFoundError:
        pytest.skip("git is not installed")
