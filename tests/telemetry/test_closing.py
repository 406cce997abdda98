# SPDX-License-Identifier: Apache-2.0
"""The closing summary of runs without a report, and how ranks meet for it."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch.distributed as dist

from tests.integration.runs import launch, trained

pytest.importorskip("megatron.training")

from megatron_seqpar.integration import closing, meeting, run_facts, steps, utilization
from megatron_seqpar.integration.closing_text import flops_per_second, percent, summary
from megatron_seqpar.mfu import Peak


def test_an_orderly_exit_is_summed_up_once() -> None:
    run = trained(
        launch(
            *(2, "--sequence-parallel-size", "2", "--seqpar-schedule", "ring"),
            *("--train-iters", "6", "--exit-interval", "4"),
        )
    )
    assert set(run.losses) == {1, 2, 3, 4}
    assert "[seqpar] step" not in run.text
    assert run.text.count("run of 4 steps on 2 ranks (sequence 2, tensor 1") == 1
    for label, text in (
        ("step", r"[\d.]+ s, [\d,]+ tokens/s \(median of 2, from start to start\)"),
        ("MFU", r"[\d.]+% \(causal [\d.]+%\) of [\d.]+ .FLOP/s a rank, measured"),
        ("sent", r"[\d.]+ MiB a rank and step"),
        ("attention", r"[\d.]+ s computing, [\d.]+ s waiting a step"),
        ("peak memory", r"[\d,]+ MiB on the fullest rank \(resident\)"),
        ("telemetry", "absent: the run is on the CPU"),
    ):
        assert len(re.findall(rf"^  {label} +{text}$", run.text, re.MULTILINE)) == 1, label
    assert "no closing summary" not in run.text


def test_a_summary_that_fails_says_so_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also outside of Megatron's loop: here nothing that the summary reads is there."""
    monkeypatch.setattr(run_facts, "tokens_per_step", lambda: 8)
    step = steps.wrap_train_step(lambda: "stepped")

    def loop(model: object) -> str:
        return step() + " and trained"

    train = closing._Summaries().train(loop)
    assert train([object()]) == "stepped and trained"
    said = capsys.readouterr().out
    assert said.count("[seqpar] no closing summary: ") == 1
    assert "--seqpar-no-summary" in said
    assert steps._around["train_step"] == []


@pytest.mark.parametrize("code", [0, 3])
def test_only_an_orderly_exit_is_summed_up(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = []
    monkeypatch.setattr(closing.Closing, "finish", lambda self: finished.append(self.label))

    def loop(model: object) -> None:
        raise SystemExit(code)

    with pytest.raises(SystemExit):
        closing._Summaries().train(loop)([object()])
    assert finished == ([] if code else ["closing 1"])


def test_training_without_steps_has_no_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert closing._Summaries().train(lambda model: 1)([object()]) == 1
    assert capsys.readouterr().out == ""


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Three threads as ranks, of which those are started that a test names."""
    store, local = dist.HashStore(), threading.local()
    monkeypatch.setattr(meeting, "_place", lambda: (local.rank, 3, store))

    def run(work: Any, *present: int) -> dict[int, Any]:
        found: dict[int, Any] = {}

        def on(rank: int) -> None:
            local.rank = rank
            found[rank] = work(rank)

        threads = [threading.Thread(target=on, args=(rank,)) for rank in present]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    return run


def test_ranks_meet(ranks: Any) -> None:
    assert ranks(lambda rank: meeting.together("a", 20), 0, 1, 2) == {0: True, 1: True, 2: True}
    assert ranks(lambda rank: meeting.together("b", 0.1), 0, 2) == {0: False, 2: False}


def test_rank_0_hears_who_comes_and_waits_no_longer(ranks: Any) -> None:
    def tell(label: str, patience: float) -> Any:
        return lambda rank: meeting.gather(label, {"rank": rank}, patience)

    told = [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert ranks(tell("a", 20), 2, 0, 1) == {0: told, 1: None, 2: None}
    ranks(tell("b", 0.1), 2)
    assert ranks(tell("b", 0.1), 0) == {0: [told[0], told[2]]}
    report = {
        "parallel": {"world": 3, "sequence": 1, "tensor": 1, "pipeline": 1, "data": 3},
        "model": {"sequence_length": None, "dtype": "bfloat16"},
        "device": {"name": "some GPU"},
        "ranks": [{"memory": "resident", "telemetry": {"absent": "no GPU"}}] * 2,
        "summary": {
            "steps": 9,
            "timed_steps": 7,
            "seconds_per_step": 0.5,
            "tokens_per_second": None,
            **utilization.Utilization(notes=("no weights",)).summary(
                run_facts.rates([0.5], [0]), [{"peak": None, "notes": ["no weights"]}] * 2, 3
            ),
            "bytes_sent_per_rank_and_step": None,
            "peak_memory_bytes": 2**30,
            "attention_compute_seconds_per_step": None,
        },
    }
    assert summary(report).splitlines()[1:] == [
        "run of 9 steps on 3 ranks (sequence 1, tensor 1, pipeline 1, data 3), bfloat16, some GPU; "
        "1 ranks did not tell theirs",
        "  step            0.500 s (median of 7)",
        "  MFU             unknown: no weights",
        "  peak memory     1,024 MiB on the fullest rank (resident)",
        "  telemetry       absent: no GPU",
    ]


def test_speed_of_steps_that_differ_is_that_of_all() -> None:
    assert run_facts.rates([1.0, 3.0, 2.0], [10, 10, 10]) == (3, 2.0, 5.0, 10)
    assert run_facts.rates([1.0, 3.0], [10, 30]) == (2, 2.0, 10.0, 20)
    assert run_facts.rates([1.0], [0]) == (1, 1.0, None, None)
    assert run_facts.rates([], []) == (0, None, None, None)


def test_ranks_with_different_peaks_share_their_mean() -> None:
    mine = utilization.Utilization(2.0, 1.0, Peak(100.0, "published", "here"))
    rates = run_facts.rates([2.0], [50])  # 25 tokens/s
    known = mine.as_record()
    slower = {**known, "peak": {**known["peak"], "value": 60.0}}
    both = mine.summary(rates, [known, slower], 2)
    assert (both["mfu"], both["causal_mfu"]) == (50 / 160, 25 / 160)
    assert (both["model_flops_per_step"], both["peak_flops_per_rank"]) == (100.0, 80.0)
    nobody = mine.summary(rates, [known, {"peak": None, "notes": ["peak: none is known"]}], 2)
    assert (nobody["mfu"], nobody["peak_basis"]) == (None, None)
    assert nobody["mfu_note"] == "peak: none is known"
    assert nobody["model_flops_per_step"] == 100.0


def test_what_the_formula_does_not_count_is_said() -> None:
    assert utilization._why_uncounted([object()], {}) == "object: only a GPTModel is counted"
    for flags, why in (
        ({"hybrid_layer_pattern": "M*M-"}, "--hybrid-layer-pattern M*M-: layers of hybrid"),
        ({"freeze_all_layers": True}, "--freeze-all-layers: what is not trained"),
    ):
        found = utilization._why_uncounted([object()], flags)
        assert found is not None
        assert found.startswith(why)
    model, why = utilization._model({"num_layers": 1})
    assert model is None
    assert "--hidden-size is not given" in str(why)


def test_a_peak_that_is_too_low_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_facts, "dtype_name", lambda: "bfloat16")
    assert utilization._why_peak_is_low({"fp8": None, "fp4": None}) is None
    note = "--fp8-format hybrid: the peak is that of bfloat16"
    assert utilization._why_peak_is_low({"fp8": "hybrid"}) == note


def test_numbers_for_people() -> None:
    assert [percent(share) for share in (0.4123, 0.0412, 0.00041)] == ["41.2%", "4.12%", "0.041%"]
    assert flops_per_second(989.4e12) == "989.4 TFLOP/s"
    assert flops_per_second(43.21e9) == "43.2 GFLOP/s"
