"""What was measured as a picture: throughput against latency, the chosen point marked. SVG, written by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from statistics import median

from octoai.optimizer.outcome import Outcome
from octoai.optimizer.space import Candidate

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 760, 480, 70, 60, 50, 30
_Point = tuple[Candidate, float, float]


def plotted(outcome: Outcome) -> str:
    """A document. Points carry the candidate's description, shown where the pointer rests on them."""
    points = _points(outcome)
    right = 1.1 * max((x for _, x, _ in points), default=1.0)
    top = 1.1 * max((y for _, _, y in points), default=1.0)
    body = [*_axes(right, top), *_marks(points, outcome.best, right, top)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
            'font-size="12">',
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
            f'<text x="{_LEFT}" y="24" font-size="15">chosen: {escape(str(outcome.best))}</text>',
            *body,
            "</svg>\n",
        ]
    )


def _points(outcome: Outcome) -> Sequence[_Point]:
    """Every candidate that was measured, with its median seconds to a first token and tokens a second."""
    measured: dict[Candidate, list[tuple[float, float]]] = {}
    for trial in outcome.trials:
        if trial.speed is not None:
            figures = trial.speed.first_token_seconds, trial.speed.joint_rate
            measured.setdefault(trial.candidate, []).append(figures)
    return [(each, *(median(values) for values in zip(*found, strict=True))) for each, found in measured.items()]


def _axes(right: float, top: float) -> Iterator[str]:
    for step in range(6):
        x, y = _place(right * step / 5, top * step / 5, right, top)
        yield f'<line x1="{x:.0f}" y1="{_TOP}" x2="{x:.0f}" y2="{_HEIGHT - _BOTTOM}" stroke="#ddd"/>'
        yield f'<line x1="{_LEFT}" y1="{y:.0f}" x2="{_WIDTH - _RIGHT}" y2="{y:.0f}" stroke="#ddd"/>'
        below = _HEIGHT - _BOTTOM + 18
        yield f'<text x="{x:.0f}" y="{below}" text-anchor="middle">{right * step / 5:.2g}</text>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.0f}" text-anchor="end">{top * step / 5:.3g}</text>'
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    title = "seconds to the first token of a prompt of 600"
    yield f'<text x="{middle:.0f}" y="{_HEIGHT - 14}" text-anchor="middle">{title}</text>'
    turned = f'transform="rotate(-90 18 {_HEIGHT / 2:.0f})"'
    yield f'<text x="18" y="{_HEIGHT / 2:.0f}" text-anchor="middle" {turned}>tokens/s of eight requests at once</text>'


def _marks(points: Sequence[_Point], chosen: Candidate, right: float, top: float) -> Iterator[str]:
    for candidate, seconds, rate in points:
        x, y = _place(seconds, rate, right, top)
        style = 'r="8" fill="#d4380d"' if candidate == chosen else 'r="5" fill="#5b8ff9" fill-opacity="0.7"'
        title = f"{candidate}: {seconds:.2f} s, {rate:.0f} tokens/s"
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" {style}><title>{escape(title)}</title></circle>'


def _place(x: float, y: float, right: float, top: float) -> tuple[float, float]:
    """From the figures to the picture, whose y grows downwards."""
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    return _LEFT + width * x / right, _HEIGHT - _BOTTOM - height * y / top
