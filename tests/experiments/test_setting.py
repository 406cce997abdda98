# SPDX-License-Identifier: Apache-2.0
"""Files of experiments: what is wrong with one is said by key and value."""

from pathlib import Path

import pytest

from megatron_seqpar.compare.config import CompareConfig
from megatron_seqpar.errors import SeqParError
from megatron_seqpar.experiments.run_file import kind_of, read_run
from megatron_seqpar.experiments.setting import read_setting
from megatron_seqpar.sweep.space import Space

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODEL = f"model: {CONFIGS / 'models' / 'quickstart.yaml'}\n"


@pytest.mark.parametrize("path", sorted((CONFIGS / "runs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_file_of_the_repository_is_read(path):
    kind = kind_of(path)
    assert path.stem.startswith(kind)
    if kind == "pretrain":
        assert read_run(path).model.is_file()
    else:
        assert read_setting(CompareConfig if kind == "compare" else Space, path).model.is_file()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seq-length: 8", "model: missing"),
        (MODEL, "seq-length: missing"),
        (MODEL + "seq-length: 8\nrank: 2", "rank: unknown key"),
        (MODEL + "seq-length: 8\nranks: 0", "ranks: 0"),
        (MODEL + "seq-length: 0", "seq-length"),
        (MODEL + "seq-length: 8\nrecompute: some", "recompute: 'some'"),
        (MODEL + "seq-length: 8\nways: [{tp: 2, spp: 2}]", "ways.0.spp: unknown key"),
        (MODEL + "seq-length: 8\nsteps: 1", "steps: 1"),
        ("model: no/such.yaml\nseq-length: 8", "model: no/such.yaml: no such file"),
        ("[1", "not valid YAML"),
        ("- 1", "lines are expected"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, says):
    path = tmp_path / "file.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SeqParError) as error:
        read_setting(CompareConfig, path)
    assert str(path) in str(error.value)
    assert says in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(SeqParError, match="No such file"):
        read_setting(Space, tmp_path / "none.yaml")


def test_paths_are_found_beside_the_file(tmp_path):
    (tmp_path / "m.yaml").write_text("num-layers: 1\n")
    (tmp_path / "c.yaml").write_text("model: m.yaml\nseq-length: [8, 16]\nenvironment: {A: 1}\n")
    setting = read_setting(CompareConfig, tmp_path / "c.yaml")
    assert setting.model == tmp_path / "m.yaml"
    assert setting.seq_length == (8, 16)
    assert setting.environment == {"A": "1"}


def test_memory_is_limited_on_a_cpu_alone(tmp_path):
    (tmp_path / "c.yaml").write_text(MODEL + "seq-length: 8\nmemory-limit-gib: 2\n")
    setting = read_setting(CompareConfig, tmp_path / "c.yaml")
    assert setting.limit_bytes(2, "cpu") == 2 << 30
    assert setting.limit_bytes(2, "cuda") == 0
    free = setting.model_copy(update={"memory_limit_gib": None})
    assert 0 < free.limit_bytes(4, "cpu") == pytest.approx(free.limit_bytes(2, "cpu") / 2, rel=1e-6)
