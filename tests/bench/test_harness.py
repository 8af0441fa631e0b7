"""Sides take turns, medians decide, and the report has the promised shape."""

import json
import pathlib
import sys
import types
from collections.abc import Iterator

import pytest

from elastic_lm.bench import report, timing
from elastic_lm.cli import main as cli


def test_interleave_alternates_after_one_warm_up() -> None:
    calls: list[str] = []
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = timing.interleave(sides, rounds=3)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert {name: len(x) for name, x in seconds.items()} == {"a": 3, "b": 3}


def test_medians_wait_for_devices() -> None:
    waited: list[str] = []

    class Computing:
        """An array that is still being computed."""

        def block_until_ready(self) -> None:
            waited.append("until ready")

    timing.medians({"one": lambda: [Computing(), Computing()]}, rounds=3)
    assert len(waited) == 2 * (1 + 3)  # once to warm up


def test_rounds_are_checked() -> None:
    with pytest.raises(ValueError, match="rounds=0"):
        timing.interleave({}, rounds=0)


def test_bandwidth_is_plausible() -> None:
    assert 1e7 < timing.matvec_bandwidth(megabytes=8, repeats=2) < 1e13


def test_report(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    fake = types.ModuleType("elastic_lm.bench.fake")
    fake.__dict__["rows"] = lambda options: iter(
        [
            report.Measurement.of("fake/one", 3.0, 4.0),
            report.Measurement("fake/two", 1.0, 1.0, 1.0, "two of three"),
        ]
    )
    monkeypatch.setitem(sys.modules, "elastic_lm.bench.fake", fake)
    monkeypatch.setattr(report, "names", lambda: ["fake"])
    seen: list[list[str]] = []
    result = report.run(
        "fake", report.Options(tiny=True), lambda so_far: seen.append([row["name"] for row in so_far["rows"]])
    )
    assert seen == [["fake/one"], ["fake/one", "fake/two"]]
    report.save(result, tmp_path / "deep" / "out.json")
    saved = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert saved["rows"][0] == {"name": "fake/one", "measured": 3.0, "ideal": 4.0, "ratio": 0.75}
    assert {"hardware", "versions"} <= set(saved)
    assert saved["versions"]["jax"]
    assert saved["hardware"]["cores"] >= 1
    assert saved["rows"][1]["note"] == "two of three"
    assert "fake/one" in report.table(result)
    assert report.table(result).endswith("\nfake/two: two of three")


def test_unknown_benchmark() -> None:
    with pytest.raises(ValueError, match="benchmark 'nope' does not exist"):
        report.run("nope", report.Options())


def test_rows_stay_where_a_later_one_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(options: report.Options) -> Iterator[report.Measurement]:
        yield report.Measurement.of("fake/one", 3.0, 4.0)
        if options.seed:
            raise ValueError("the second row cannot be measured")

    fake = types.ModuleType("elastic_lm.bench.fake")
    fake.__dict__["rows"] = rows
    monkeypatch.setitem(sys.modules, "elastic_lm.bench.fake", fake)
    monkeypatch.setattr(report, "names", lambda: ["fake"])
    file = tmp_path / "out.json"
    own = tmp_path / "out.json.partial"
    own.write_text("the user's")
    assert cli.main(["bench", "fake", "--json", str(file)]) == 0
    whole = file.read_text()
    assert {*tmp_path.iterdir()} == {file, own}
    assert cli.main(["bench", "fake", "--seed", "1", "--json", str(file)]) == 2
    assert file.read_text() == whole, "what was there before stays"
    [partial] = {*tmp_path.iterdir()} - {file, own}
    assert [row["name"] for row in json.loads(partial.read_text())["rows"]] == ["fake/one"]
    said = capsys.readouterr().err
    assert f"the rows before are in {partial}" in said
    assert "the second row cannot be measured" in said
    assert own.read_text() == "the user's"
    assert cli.main(["bench", "fake", "--json", str(file)]) == 0
    assert not partial.exists()
