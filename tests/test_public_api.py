"""The names of the package: sorted, complete, importable, and free until used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import vidkv

ROOT = Path(vidkv.__file__).resolve().parents[1]


class TestNames:
    def test_sorted_and_unique(self) -> None:
        assert vidkv.__all__ == sorted(set(vidkv.__all__))

    @pytest.mark.parametrize("name", vidkv.__all__)
    def test_importable(self, name: str) -> None:
        namespace: dict[str, object] = {}
        exec(f"from vidkv import {name}", namespace)
        assert namespace[name] is getattr(vidkv, name)

    @pytest.mark.parametrize("name", [n for n in vidkv.__all__ if n != "__version__"])
    def test_live_where_they_are_defined(self, name: str) -> None:
        """A type, not a re-export of a re-export; its module says its name."""
        thing = getattr(vidkv, name)
        home = vidkv._HOMES[name]
        assert thing.__name__ == name
        assert thing.__module__.startswith(home)
        assert getattr(importlib.import_module(home), name) is thing
        assert thing.__doc__

    def test_complete(self) -> None:
        """The table of homes, the list of names and what type checkers see are one."""
        assert set(vidkv.__all__) == {*vidkv._HOMES, "__version__"}
        assert dir(vidkv) == vidkv.__all__
        tree = ast.parse(Path(vidkv.__file__).read_text())
        (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
        typed = {
            (alias.name, node.module)
            for node in block.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert typed == set(vidkv._HOMES.items())

    def test_unknown_names(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'KVCash'"):
            vidkv.KVCash  # noqa: B018

    @pytest.mark.parametrize("package", ["vidkv.cache", "vidkv.cache.formats", "vidkv.cache.policies"])
    def test_packages_below(self, package: str) -> None:
        module = importlib.import_module(package)
        assert all(hasattr(module, name) for name in module.__all__)
        assert len(set(module.__all__)) == len(module.__all__)


class TestErrors:
    def test_drawn_as_they_are(self) -> None:
        """The tree in the module's docstring is the tree of the classes."""
        from vidkv import errors

        drawn: dict[str, str] = {}
        above: list[str] = []
        for line in (errors.__doc__ or "").splitlines():
            if not any(mark in line for mark in ("VidkvError", "├", "└")):
                continue
            name = line.strip("│├└─ ").split()[0]
            depth = line.index(name) // 4 - 1
            above[depth:] = [name]
            drawn[name] = above[depth - 1] if depth else "Exception"
        classes = {n: c for n, c in vars(errors).items() if isinstance(c, type)}
        assert drawn == {name: cls.__bases__[0].__name__ for name, cls in classes.items()}


class TestCost:
    @pytest.mark.parametrize(
        ("statement", "forbidden"),
        [
            ("import vidkv", {"torch", "diffusers", "transformers", "numpy", "pydantic"}),
            ("from vidkv import VidkvError", {"torch", "diffusers", "transformers"}),
            ("from vidkv import CacheSpec, KVCache", {"diffusers", "transformers", "accelerate", "av"}),
            ("from vidkv import FlowSchedule, PromptSchedule", {"diffusers", "transformers", "accelerate"}),
        ],
    )
    def test_of_an_import(self, statement: str, forbidden: set[str]) -> None:
        code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
        loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
        assert "vidkv" in loaded
        assert not forbidden & set(loaded)
