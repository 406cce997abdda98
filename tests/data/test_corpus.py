# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from typer.testing import CliRunner

from megatron_seqpar.commands.prepare_data import prepare_data
from megatron_seqpar.data import (
    Corpus,
    HuggingFace,
    JsonLines,
    prepare_corpus,
    tokenizer_arguments,
)
from megatron_seqpar.errors import SeqParError


def jsonl(path: Path, *texts: str) -> JsonLines:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return JsonLines(path)


def tokens(corpus: Corpus) -> list[list[int]]:
    dataset = IndexedDataset(corpus.data_path)
    starts = dataset.document_indices
    assert list(starts) == list(range(len(dataset) + 1))  # one sequence a document
    return [dataset[i].tolist() for i in range(len(dataset))]


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "partial" in path.name)


def test_tokens_are_bytes_and_zero_ends_a_document(tmp_path: Path) -> None:
    corpus = prepare_corpus(jsonl(tmp_path / "in.jsonl", "ab", "é\n"), tmp_path / "out" / "c")
    assert tokens(corpus) == [[97, 98, 0], [0xC3, 0xA9, 10, 0]]
    assert (corpus.documents, corpus.tokens, corpus.longest) == (2, 7, 4)
    assert corpus.data_path == str(tmp_path / "out" / "c_text_document")
    assert not corpus.reused
    assert not leftovers(tmp_path / "out")


def test_megatrons_tokenizer_agrees() -> None:
    from megatron.core.tokenizers import MegatronTokenizer

    arguments = tokenizer_arguments()
    values = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert values["--tokenizer-type"] == "NullTokenizer"
    tokenizer = MegatronTokenizer.from_pretrained(
        metadata_path={"library": "null-text"},
        vocab_size=int(values["--vocab-size"]),
        eod_id=int(values["--null-tokenizer-eod-id"]),
    )
    assert (tokenizer.vocab_size, tokenizer.eod) == (256, 0)


@pytest.mark.parametrize(
    ("release", "arguments"),
    [
        ("0.16.1", ["--vocab-size", "255"]),
        ("0.17.1", ["--vocab-size", "255"]),
        ("0.18.2", ["--vocab-size", "256", "--null-tokenizer-eod-id", "0"]),
        ("1.0.0rc1", ["--vocab-size", "256", "--null-tokenizer-eod-id", "0"]),
    ],
)
def test_arguments_for_a_release(
    release: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older ones put the end of documents on top of the vocabulary, and have no flag for it."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: release)
    assert tokenizer_arguments() == ["--tokenizer-type", "NullTokenizer", *arguments]


def test_an_unchanged_corpus_is_reused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", "ab")
    first = prepare_corpus(source, tmp_path / "c")
    stamp = Path(first.data_path + ".bin").stat().st_mtime_ns
    second = prepare_corpus(source, tmp_path / "c")
    assert second.reused
    assert second.tokens == first.tokens
    assert Path(first.data_path + ".bin").stat().st_mtime_ns == stamp
    assert not prepare_corpus(source, tmp_path / "c", fresh=True).reused


@pytest.mark.parametrize("damage", ["input", "truncated", "record", "missing index"])
def test_a_changed_corpus_is_written_again(tmp_path: Path, damage: str) -> None:
    corpus = prepare_corpus(jsonl(tmp_path / "in.jsonl", "ab"), tmp_path / "c")
    if damage == "input":
        jsonl(tmp_path / "in.jsonl", "abc")
    elif damage == "truncated":
        Path(corpus.data_path + ".bin").write_bytes(b"\0")
    elif damage == "record":
        Path(corpus.data_path + ".json").write_text("{", encoding="utf-8")
    else:
        Path(corpus.data_path + ".idx").unlink()
    again = prepare_corpus(JsonLines(tmp_path / "in.jsonl"), tmp_path / "c")
    assert not again.reused
    assert tokens(again) == [[97, 98, 99, 0] if damage == "input" else [97, 98, 0]]


def test_a_failure_leaves_the_old_corpus_and_nothing_else(tmp_path: Path) -> None:
    corpus = prepare_corpus(jsonl(tmp_path / "in.jsonl", "ab"), tmp_path / "c")
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\nbroken\n', encoding="utf-8")
    with pytest.raises(SeqParError, match="line 2"):
        prepare_corpus(JsonLines(tmp_path / "in.jsonl"), tmp_path / "c")
    assert tokens(corpus) == [[97, 98, 0]]
    assert not leftovers(tmp_path)


def test_empty_documents_and_nul_characters_are_counted(tmp_path: Path) -> None:
    corpus = prepare_corpus(jsonl(tmp_path / "in.jsonl", "a\0b", "", "\0"), tmp_path / "c")
    assert tokens(corpus) == [[97, 98, 0]]
    assert (corpus.documents, corpus.empty, corpus.dropped_nul) == (1, 2, 2)


def test_input_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SeqParError, match="holds no text"):
        prepare_corpus(jsonl(tmp_path / "in.jsonl", ""), tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_progress_ends_at_the_size(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = jsonl(tmp_path / "in.jsonl", "ab", "cd")
    prepare_corpus(source, tmp_path / "c", on_progress=lambda *at: seen.append(at))
    assert seen[-1] == (source.size, source.size)


def test_command(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(prepare_data)
    jsonl(tmp_path / "in.jsonl", "ab")
    options = ["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "c")]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0
    assert "1 documents, 3 tokens" in done.output
    assert "--null-tokenizer-eod-id 0" in done.output
    failed = CliRunner().invoke(app, [*options, "--json-key", "body"])
    assert failed.exit_code == 1
    assert "no key 'body'" in failed.output


def test_any_hugging_face_tokenizer(tmp_path: Path) -> None:
    """A tokenizer trained here, read back by Megatron's own class of that name."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    from megatron.core.tokenizers import MegatronTokenizer

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["the cat sat on the mat", "the hat of the cat, é", ""]
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    folder = tmp_path / "tokenizer"
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>"
    )
    whole.save_pretrained(folder)
    assert len(whole) > 256, "ids that no byte has"

    import typer

    app = typer.Typer()
    app.command()(prepare_data)
    source = jsonl(tmp_path / "in.jsonl", *texts)
    options = ["--input", str(source.path), "--output-prefix", str(tmp_path / "c")]
    done = CliRunner().invoke(app, [*options, "--tokenizer", str(folder)])
    assert done.exit_code == 0, done.output
    assert "2 documents" in done.output
    assert f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}" in done.output
    made = prepare_corpus(source, tmp_path / "c", tokens=HuggingFace(str(folder)))
    assert made.reused
    assert not prepare_corpus(source, tmp_path / "c").reused, "bytes are another corpus"
    corpus = prepare_corpus(source, tmp_path / "d", tokens=HuggingFace(str(folder)))
    theirs = MegatronTokenizer.from_pretrained(
        metadata_path={"library": "huggingface"}, tokenizer_path=str(folder)
    )
    expected = [[*theirs.tokenize(text), theirs.eod] for text in texts[:2]]
    assert tokens(corpus) == expected
    assert [ids[0] for ids in expected] == [0, 0]


def test_a_tokenizer_that_cannot_be_had(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(SeqParError, match=r"--tokenizer .*nothing-here: neither a model"):
        HuggingFace(str(tmp_path / "nothing-here"))
