# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from megatron_seqpar.data import JsonLines, StandardLibrary
from megatron_seqpar.errors import SeqParError


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library: three modules, two packages, and things to leave out."""
    files = {
        "abc.py": "a",
        "_aix.py": "b",
        "zipapp.py": "z",
        "json/__init__.py": "init",
        "json/encoder.py": "enc",
        "json/decoder.py": "dec",
        "json/tool/__init__.py": "tool",
        "json/tests/__init__.py": "left out",
        "email/__init__.py": "mail é",
        "site-packages/other/__init__.py": "left out",
        "test/__init__.py": "left out",
        "config-3.12/__init__.py": "left out",
        "nopackage/data.txt": "left out",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def test_one_document_a_package_in_reading_order(library: Path) -> None:
    documents = {d.name: d.text for d in StandardLibrary(library).documents()}
    assert list(documents) == ["modules a", "modules z", "email", "json"]
    assert documents["json"] == (
        "# file: json/__init__.py\ninit\n# file: json/decoder.py\ndec\n"
        "# file: json/encoder.py\nenc\n# file: json/tool/__init__.py\ntool\n"
    )
    assert documents["modules a"] == "# file: _aix.py\nb\n# file: abc.py\na\n"


def test_positions_reach_the_size(library: Path) -> None:
    source = StandardLibrary(library)
    positions = [document.position for document in source.documents()]
    assert positions == sorted(positions)
    assert positions[-1] == source.size


def test_fingerprint_changes_with_the_files(library: Path) -> None:
    before = StandardLibrary(library).fingerprint()
    assert StandardLibrary(library).fingerprint() == before
    (library / "abc.py").write_text("longer", encoding="utf-8")
    assert StandardLibrary(library).fingerprint() != before


def test_a_file_that_is_not_utf8_is_read_as_far_as_it_goes(library: Path) -> None:
    (library / "abc.py").write_bytes(b"caf\xe9 = 1")
    documents = {d.name: d.text for d in StandardLibrary(library).documents()}
    assert "caf = 1" in documents["modules a"]


def test_the_running_library_has_long_documents() -> None:
    source = StandardLibrary()
    documents = {d.name: len(d.text) for d in source.documents()}
    assert documents["asyncio"] > 300_000
    assert sum(length > 8192 for length in documents.values()) > 30
    assert not {"test", "site-packages"} & set(documents)


def test_an_empty_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SeqParError, match="--input"):
        StandardLibrary(tmp_path)


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


def test_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", '{"text": "one"}', "", '{"text": "two é", "id": 2}')
    documents = list(JsonLines(path).documents())
    assert [d.text for d in documents] == ["one", "two é"]
    assert documents[-1].position == path.stat().st_size


def test_another_key(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", json.dumps({"body": "b", "text": "t"}))
    assert [d.text for d in JsonLines(path, "body").documents()] == ["b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "not valid JSON"),
        ('["text"]', "list where an object is expected"),
        ('{"body": "x"}', r"no key 'text'; the keys are \['body'\]"),
        ('{"text": 3}', "is a int, not a string"),
        ('{"text": null}', "is a NoneType, not a string"),
        (b'{"text": "\xff"}', "not UTF-8"),
    ],
    ids=["json", "list", "key", "number", "null", "utf8"],
)
def test_bad_lines_are_named(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = write(tmp_path / "x.jsonl", '{"text": "fine"}', "", line)
    with pytest.raises(SeqParError, match=rf"x\.jsonl, line 3: .*{message}"):
        list(JsonLines(path).documents())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SeqParError, match=r"--input .*none\.jsonl: no such file"):
        JsonLines(tmp_path / "none.jsonl")
