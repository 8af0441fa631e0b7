"""Plots: the files are pictures with named axes."""

from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from elastic_lm.report import plots

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures in the order in which they are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def remember(self: Figure, *args, **kwargs) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


def test_quality_speed(tmp_path: Path, drawn: list[Figure]) -> None:
    points = [plots.SpeedPoint(0.9, 2.0, "90 %", 0.1), plots.SpeedPoint(0.99, 1.2, "99 %")]
    plots.quality_speed({"calibrated": points, "one threshold": points[:1]}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:8] == PNG
    axes = drawn[0].axes[0]
    assert axes.get_xlabel() == "agreement with the full model (%)"
    assert axes.get_ylabel() == "speed-up against full depth"
    assert [text.get_text() for text in axes.texts] == ["90 %", "99 %", "90 %"]
    assert axes.get_legend() is not None
    # The vertical axis comes first in the title, as in "y against x".
    assert axes.get_title().index("speed-up") < axes.get_title().index("agreement")
    bars = next(c for c in axes.containers if isinstance(c, ErrorbarContainer))
    (segment, *_) = bars.lines[2][0].get_segments()
    assert segment[:, 1].tolist() == pytest.approx([1.9, 2.1])


def test_labels_lie_inside_and_over_nothing(tmp_path: Path, drawn: list[Figure]) -> None:
    near = [(0.950, 1.136), (0.955, 1.138), (0.960, 1.125), (0.99, 1.01), (0.995, 0.99), (0.9, 1.4)]
    points = [plots.SpeedPoint(a, s, f"target {100 * a:g} %\n9.1 layers", 0.02) for a, s in near]
    plots.quality_speed({"exits": points}, tmp_path / "curve.png", measured_on="a model, a CPU of 2 cores")
    axes = drawn[0].axes[0]
    assert drawn[0].get_suptitle() == "Early exits: speed-up against agreement"
    assert axes.get_title() == "a model, a CPU of 2 cores"

    canvas = FigureCanvasAgg(drawn[0])
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in axes.texts]
    inside = axes.get_window_extent(canvas.get_renderer())
    assert len(boxes) == len(points)
    for i, box in enumerate(boxes):
        assert inside.contains(*box.min)
        assert inside.contains(*box.max)
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        for point in points:
            assert not box.contains(*axes.transData.transform((100 * point.agreement, point.speedup)))


def test_exit_depths(tmp_path: Path, drawn: list[Figure]) -> None:
    plots.exit_depths({3: 30, 6: 10}, 12, tmp_path / "depths.png")
    assert (tmp_path / "depths.png").read_bytes()[:8] == PNG
    axes = drawn[0].axes[0]
    assert [bar.get_height() for bar in axes.patches] == [75.0, 25.0, 0.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["3", "6", "12"]
    with pytest.raises(ValueError, match="no tokens to draw"):
        plots.exit_depths({}, 12, tmp_path / "none.png")


def test_a_crash_leaves_the_old_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "depths.png"
    plots.exit_depths({3: 30}, 12, image)
    whole = image.read_bytes()

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            plots.exit_depths({6: 10}, 12, image)
    assert image.read_bytes() == whole

    plots.exit_depths({6: 10}, 12, tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"depths.png", "other.png"}
