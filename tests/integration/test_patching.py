# SPDX-License-Identifier: Apache-2.0
"""Applying and undoing a table of patch points."""

from __future__ import annotations

import sys
import types
import warnings

import pytest

from megatron_seqpar.integration.patching import (
    MARKER,
    MissingSymbolError,
    Patcher,
    PatchPoint,
    resolve,
)


@pytest.fixture
def library():
    """A module `seqpar_toy` with a function and a class, and an importer that copied by name."""
    toy, importer = types.ModuleType("seqpar_toy"), types.ModuleType("seqpar_toy_importer")

    class Model:
        def __init__(self):
            self.built_by = "stock"

        @classmethod
        def make(cls):
            return "stock"

    toy.function = lambda: "stock"
    toy.Model = Model
    importer.copied = toy.function
    sys.modules.update({"seqpar_toy": toy, "seqpar_toy_importer": importer})
    yield toy, importer
    del sys.modules["seqpar_toy"], sys.modules["seqpar_toy_importer"]


def point(symbol, **options):
    def build(original):
        return lambda *args: "ours"

    return PatchPoint(symbol, build, options.pop("versions", ("0.19",)), "a test", **options)


def test_function_and_its_copies_come_and_go(library):
    toy, importer = library
    stock = toy.function
    patcher = Patcher([point("seqpar_toy.function")], "0.19.2")
    patcher.apply()
    assert toy.function() == importer.copied() == "ours"
    assert getattr(toy.function, MARKER) is stock
    patcher.undo()
    assert toy.function is importer.copied is stock


def test_copy_made_while_patched_is_restored(library):
    toy, importer = library
    patcher = Patcher([point("seqpar_toy.function")], "0.19.2")
    patcher.apply()
    importer.late_copy = toy.function
    patcher.undo()
    assert importer.late_copy() == "stock"


def test_apply_and_undo_are_idempotent(library):
    toy, _ = library
    stock = toy.function
    patcher = Patcher([point("seqpar_toy.function")], "0.19.2")
    patcher.apply()
    patched = toy.function
    patcher.apply()
    Patcher([point("seqpar_toy.function")], "0.19.2").apply()
    assert toy.function is patched
    patcher.undo()
    patcher.undo()
    assert toy.function is stock


def test_class_attributes(library):
    toy, _ = library

    def build(original):
        def __init__(self):
            original(self)
            self.built_by += " and ours"

        return __init__

    init = PatchPoint("seqpar_toy.Model.__init__", build, ("0.19",), "a test")
    patcher = Patcher([init, point("seqpar_toy.Model.make")], "0.19.2")
    patcher.apply()
    assert toy.Model().built_by == "stock and ours"
    assert toy.Model.make() == "ours"
    patcher.undo()
    assert toy.Model().built_by == toy.Model.make() == "stock"


def test_missing_symbol_names_itself_and_the_nearest_version(library):
    toy, _ = library
    stock = toy.function
    points = [point("seqpar_toy.function"), point("seqpar_toy.gone")]
    with pytest.raises(MissingSymbolError, match=r"0\.19\.2 has no seqpar_toy\.gone.*0\.19"):
        Patcher(points, "0.19.2").apply()
    assert toy.function is stock


@pytest.mark.parametrize("symbol", ["seqpar_absent.part.function", "xml.absent.part.function"])
def test_optional_point_may_lack_its_module(library, symbol):
    """Also a part of a package that is there, as the training package of Megatron may be."""
    Patcher([point(symbol, optional=True)], "0.19.2").apply()
    with pytest.raises(MissingSymbolError, match=symbol):
        Patcher([point(symbol)], "0.19.2").apply()


def test_unknown_version_warns_once_and_uses_the_nearest(library):
    toy, _ = library
    points = [
        point("seqpar_toy.function", versions=("0.19",)),
        point("seqpar_toy.only_in_016", versions=("0.16",)),
    ]
    patcher = Patcher(points, "0.21.0")
    with pytest.warns(UserWarning, match=r"checked on megatron-core 0\.16, 0\.19; this is 0\.21"):
        patcher.apply()
    assert toy.function() == "ours"
    patcher.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patcher.apply()


def test_resolve_reports_a_module_that_fails_inside():
    with pytest.raises(ModuleNotFoundError, match="seqpar_nowhere"):
        resolve("seqpar_nowhere.attribute")
    assert resolve("types.ModuleType.__init__") == (types.ModuleType, "__init__")


def test_optional_point_whose_module_is_broken_is_an_error(library, tmp_path, monkeypatch):
    """Absent is fine; present but unable to import something of its own is not."""
    (tmp_path / "seqpar_broken.py").write_text("import seqpar_not_installed_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingSymbolError, match=r"seqpar_broken\.function"):
        Patcher([point("seqpar_broken.function", optional=True)], "0.19.2").apply()
