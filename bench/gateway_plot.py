"""What `gateway.py` measured as a picture: a panel for each figure, a bar for each gateway. Plain SVG, pure."""

from html import escape

from gateway_measure import Samples
from gateway_report import added, clean_streams, of
from sdk_report import median

_WIDTH, _BAR, _NAMES, _PANEL = 720, 20, 110, 34
_COLOURS = {"ours": "#d9480f", "ours-unix": "#f08c00", "direct": "#adb5bd"}


def panels(samples: Samples, names: list[str]) -> dict[str, dict[str, float]]:
    """Title: name: value. What was not measured has no panel."""
    found: dict[str, dict[str, float]] = {}
    gateways = [name for name in names if name != "direct"]
    rounds = samples.speed
    if rounds:
        if "direct" in names:
            found["added p50, one client, ms"] = {n: median(rounds, added(n, "whole, 1", "p50_ms")) for n in gateways}
            found["added to the first event of a stream, p50, ms"] = {
                name: median(rounds, added(name, "first event", "first_p50_ms")) for name in gateways
            }
        found["requests/s, 16 clients"] = {n: median(rounds, of(n, "whole, 16", "rate")) for n in gateways}
        found["CPU us a request, 16 clients"] = {n: median(rounds, of(n, "whole, 16", "cpu_us")) for n in gateways}
        found["stream events/s, 16 streams"] = {
            n: median(rounds, of(n, "streams, 16", "tokens_rate")) for n in gateways
        }
    if samples.paced:
        found["clean streams at 50 events/s each"] = {name: clean_streams(each) for name, each in samples.paced.items()}
    if samples.memory:
        found["RSS, MiB"] = {name: seen[-1]["rss_kib"] / 1024 for name, seen in samples.memory.items()}
    return found


def plot(samples: Samples, names: list[str]) -> str:
    lines, top = [], 0
    for title, values in panels(samples, names).items():
        lines.append(f'<text x="0" y="{top + 20}" font-weight="bold">{escape(title)}</text>')
        top += _PANEL
        most = max([*values.values(), 1e-9])
        for name, value in values.items():
            width = max(1.0, value / most * (_WIDTH - _NAMES - 90))
            fill = _COLOURS.get(name, "#4c6ef5")
            lines += [
                f'<text x="{_NAMES - 8}" y="{top + 14}" text-anchor="end">{escape(name)}</text>',
                f'<rect x="{_NAMES}" y="{top + 2}" width="{width:.1f}" height="{_BAR - 5}" fill="{fill}"/>',
                f'<text x="{_NAMES + width + 6:.1f}" y="{top + 14}">{_shown(value)}</text>',
            ]
            top += _BAR
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top + 10}" font-family="sans-serif"'
    return "\n".join([f'{head} font-size="13">', '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>\n"])


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
