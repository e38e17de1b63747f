"""Draw the map of a control tick, once for each stage lit: nbs/map/STAGE.svg.

python scripts/tick_map.py            # writes what differs
python scripts/tick_map.py --check    # exit status 1 if something is out of date
"""

import argparse
import sys
from html import escape
from pathlib import Path

root = Path(__file__).resolve().parent.parent
INK, PALE, LINE, LIT = '#22313f', '#eef2f6', '#9fb0c0', '#E69F00'
WIDTH, HEIGHT, TOP = 112, 58, 62

# stage: what stands in its box, and what comes out of it
STAGES = dict(
    scene=('Scene', 'cameras, state', 'frames'),
    sampling=('Sampling', 'which past frames', 'pixels'),
    vlm=('VLM', 'tokens, causal', 'K, V'),
    salr=('SALR', 'the state re-reads', 'K_u, V_u'),
    expert=('Expert', 'reads the cache', 'velocity'),
    flow=('Flow', 'noise to a plan', 'chunk'),
    command=('Command', 'units, queue', 'motors'),
)
GAP = 26
TOTAL = len(STAGES) * (WIDTH + GAP) + 10


def box(k, stage, lit):
    "The box of the k-th stage and the arrow that leaves it."
    title, says, out = STAGES[stage]
    x, middle = 10 + k * (WIDTH + GAP), TOP + HEIGHT / 2
    on = stage in lit
    fill, edge, weight = (LIT, INK, 700) if on else (PALE, LINE, 600)
    text = lambda dy, size, words, bold=400: (
        f'<text x="{x + WIDTH / 2}" y="{TOP + dy}" font-size="{size}"'
        f' font-weight="{bold}">{escape(words)}</text>'
    )
    arrow = (
        f'<path d="M{x + WIDTH + 2} {middle}h{GAP - 5}" stroke="{INK}"'
        ' marker-end="url(#a)"/>'
        if k < len(STAGES) - 1
        else ''
    )
    flows = text(HEIGHT + 18, 11, out)
    return (
        f'<rect x="{x}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{fill}"'
        f' stroke="{edge}"/>{text(25, 15, title, weight)}{text(44, 11, says)}{flows}{arrow}'
    )


def wire(to):
    "The state's way from the scene to a later stage, above the boxes."
    names = list(STAGES)
    x = lambda stage: 10 + names.index(stage) * (WIDTH + GAP) + WIDTH / 2
    return (
        f'<path d="M{x("scene")} {TOP - 2}V34H{x(to)}V{TOP - 5}" fill="none"'
        ' marker-end="url(#a)"/>'
    )


def back():
    "Measured frames come back: the next tick."
    names = list(STAGES)
    x = lambda stage: 10 + names.index(stage) * (WIDTH + GAP) + WIDTH / 2
    low = TOP + HEIGHT + 30
    return (
        f'<path d="M{x("command")} {low}V{low + 12}H{x("scene")}V{low}" fill="none"'
        f' stroke-dasharray="4 4" marker-end="url(#a)"/>'
        f'<text x="{TOTAL / 2}" y="{low + 27}" font-size="11">the arm moves; the next tick'
        ' sees it</text>'
    )


def drawing(*lit):
    "The map as SVG with some stages lit, on a white card that can be read in the dark."
    boxes = ''.join(box(k, stage, lit) for k, stage in enumerate(STAGES))
    says = 'A control tick: ' + ', '.join(t for t, _, _ in STAGES.values())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {TOTAL} 185" role="img"'
        f' width="{TOTAL}" font-family="DejaVu Sans, Verdana, sans-serif" fill="{INK}"'
        f' text-anchor="middle"><title>{escape(says)}</title>'
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"'
        f' markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{INK}"'
        ' stroke="none"/></marker></defs>'
        f'<rect width="{TOTAL}" height="185" rx="10" fill="#fff"/>'
        f'<g stroke="{INK}" stroke-width="1.4"><g stroke-width="1">{wire("salr")}'
        f'{wire("expert")}{back()}</g></g>'
        f'<text x="{TOTAL / 2 - 60}" y="26" font-size="11">state</text>{boxes}</svg>\n'
    ).replace('<text', '<text stroke="none"')


def made():
    "Path and text of every drawing."
    folder = root / 'nbs/map'
    yield folder / 'whole.svg', drawing()
    for stage in STAGES:
        yield folder / f'{stage}.svg', drawing(stage)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='only compare')
    args = parser.parse_args()
    stale = [
        (path, text)
        for path, text in made()
        if not path.exists() or path.read_text('utf-8') != text
    ]
    if args.check and stale:
        sys.exit(f'{stale[0][0].relative_to(root)} is old: run python scripts/tick_map.py')
    for path, text in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
