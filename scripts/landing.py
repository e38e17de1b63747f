"""The site's first page: HALO at work as a short film, made from the shipped recordings,
and how to run it. Figures are read from checkpoints/flash_place/*/evaluation.json.

python scripts/landing.py FILM.webp STILL.webp      # only the pictures
"""

import hashlib
import html
import json
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
shipped, kept = root / 'checkpoints/flash_place', root / '.cache/landing'
# pixels: a scene, between the two, the line above, a frame of history
SIDE, GAP, HEAD, CELL = 336, 16, 34, 40
POLICIES = {
    'full': 'HALO',
    'no_history': 'HALO without history',
    'no_salr': 'HALO without SALR',
}
LOOKS = {
    'viz/03_masks': (
        'Masks',
        'what SALR lets the expert read, layer by layer, and what the state changes',
    ),
    'viz/04_attention': (
        'Attention',
        'where the expert looks, in the present views and into the past',
    ),
    'viz/05_denoising': (
        'Denoising',
        'sixteen noises on their way to a plan, and the error of each solver',
    ),
    'viz/06_rollouts': (
        'Rollouts',
        'episodes of two policies, side by side on one time line',
    ),
    'viz/07_sampling': (
        'Sampling',
        'which frames a tick reads, as how many tokens, and what of them is new work',
    ),
    'viz/08_flow': (
        'Flow',
        'particles from noise to eight answers, and the error of solver and network',
    ),
}


def fingerprint():
    "Of all that the film is made from."
    h = hashlib.sha256()
    for f in (
        Path(__file__),
        *(
            shipped / d / n
            for d, n in (
                ('recordings', 'full.safetensors'),
                ('recordings', 'no_history.safetensors'),
                ('full', 'config.json'),
                ('no_history', 'config.json'),
            )
        ),
    ):
        h.update(f.read_bytes())
    return h.hexdigest()[:16]


def verdict(rec, tick):
    """What has come of the episode at `tick`, and the colour to say it in; nothing while it
    is open.
    """
    if bool(rec.record['info.is_success'][tick]) or (rec.success and tick == len(rec) - 1):
        return rec.task.split('put the puck ')[-1], '#0a7d4f'
    return ('on another pad', '#b3400a') if rec.record['info.placed'][tick] >= 0 else None


def panel(rec, name, label, tick, font, small):
    """One policy at `tick`: the scene with the plan in force, and below it the frames of
    the past that it reads.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    from halo.method.sampling import history_ticks
    from halo.viz.denoising import hand_paths
    from halo.viz.recording import project
    from halo.viz.rollouts import plan_at

    tick = min(tick, len(rec) - 1)
    image = Image.new('RGB', (SIDE, HEAD + SIDE + 8 + CELL), '#14181d')
    draw = ImageDraw.Draw(image)
    draw.text((10, HEAD / 2), label, 'white', font, 'lm')
    draw.text((SIDE - 10, HEAD / 2), f'{rec.seconds(tick):.1f} s', '#c8ccd1', small, 'rm')
    image.paste(
        Image.fromarray(rec.record['scene'][tick]).resize(
            (SIDE, SIDE), Image.Resampling.LANCZOS
        ),
        (0, HEAD),
    )
    plan, said = plan_at(rec, tick), verdict(rec, tick)
    if plan is not None and not said:
        way = project(
            hand_paths(
                rec.record['state'][plan[0]][:3].astype(float), plan[1].astype(float)
            ),
            rec.record['camera.primary'],
            (SIDE, SIDE),
        )
        way = [tuple(p) for p in way + (0, HEAD) if np.isfinite(p).all() and p[1] > HEAD]
        for color, width in (('white', 7), ('#0072B2', 4)):
            if len(way) > 1:
                draw.line(way, color, width, 'curve')
    if said:
        w = draw.textlength(said[0], small) + 20
        draw.rounded_rectangle((10, HEAD + SIDE - 40, 10 + w, HEAD + SIDE - 12), 6, said[1])
        draw.text((20, HEAD + SIDE - 26), said[0], 'white', small, 'lm')
    s = json.loads((shipped / name / 'config.json').read_text())['model']['sampling']
    past = (
        history_ticks(tick, s['history_frames'], s['history_stride'])
        if s['history_frames']
        else []
    )
    if not s['history_frames']:
        draw.text(
            (10, HEAD + SIDE + 8 + CELL / 2),
            'reads the present alone',
            '#c8ccd1',
            small,
            'lm',
        )
    for k in range(s['history_frames']):
        x, y, t = (
            k * (CELL + 2),
            HEAD + SIDE + 8,
            (
                past[k - s['history_frames'] + len(past)]
                if k >= s['history_frames'] - len(past)
                else None
            ),
        )
        if t is None:
            draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), outline='#3a424b')
        else:
            image.paste(
                Image.fromarray(rec.record['frames.primary'][t]).resize(
                    (CELL, CELL), Image.Resampling.LANCZOS
                ),
                (x, y),
            )
    return image


def film(to, still):
    """Write the film (animated WebP, at the speed of the recording, the end held) and its
    last frame. The same seed under two policies.
    """
    from matplotlib.font_manager import findfont
    from PIL import Image, ImageFont

    from halo.viz.recording import Recording

    recs = {
        n: Recording.load(shipped / 'recordings' / f'{n}.safetensors')
        for n in ('full', 'no_history')
    }
    font, small = (
        ImageFont.truetype(findfont(f'DejaVu Sans:{w}'), size)
        for w, size in (('bold', 16), ('regular', 14))
    )
    # the last of the two to be decided
    end = max(next(t for t in range(len(r)) if verdict(r, t)) for r in recs.values())
    frames = []
    for tick in range(end + 1):
        sheet = Image.new('RGB', (2 * SIDE + GAP, HEAD + SIDE + 8 + CELL), '#14181d')
        for k, (n, r) in enumerate(recs.items()):
            sheet.paste(panel(r, n, POLICIES[n], tick, font, small), (k * (SIDE + GAP), 0))
        frames.append(sheet)
    step = round(1000 / next(iter(recs.values())).fps)
    frames[0].save(
        to,
        'WEBP',
        save_all=True,
        append_images=frames[1:],
        duration=[step] * end + [3000],
        loop=0,
        quality=72,
        method=3,
    )
    frames[-1].save(still, 'WEBP', quality=80)


def pictures():
    "The film and its last frame, from the cache where they are there for these recordings."
    kept.mkdir(parents=True, exist_ok=True)
    made = [kept / f'{fingerprint()}{kind}.webp' for kind in ('', '-still')]
    if not all(m.exists() for m in made):
        part = [m.with_suffix('.part') for m in made]
        film(*part)
        for p, m in zip(part, made):
            p.replace(m)
        for old in kept.glob('*.webp'):
            if old not in made:
                old.unlink()
    return made


def rates():
    """Rows of (policy, successes, n, rate, low, high) from the evaluations beside the
    checkpoints.
    """
    found = {
        n: json.loads((shipped / n / 'evaluation.json').read_text())['success']
        for n in POLICIES
    }
    return [
        (POLICIES[n], s['successes'], s['n'], s['rate'], s['lo'], s['hi'])
        for n, s in found.items()
    ]


def seeded():
    "The seed and the instruction of the film."
    from safetensors import safe_open

    with safe_open(str(shipped / 'recordings/full.safetensors'), 'numpy') as f:
        about = json.loads(f.metadata()['recording'])
    return about['seed'], about['task']


def tick_map(workbook, live):
    "The map of a control tick, which every chapter carries too, and the way into the book."
    if '00_a_tick' not in live:
        return ''
    return f'''<h2 class="halo-h2" id="tick">One control tick</h2>
<a class="halo-map" href="{workbook}/00_a_tick.html"><img src="{workbook}/map/whole.svg"
width="976" height="185" alt="A control tick: scene, sampling, VLM, SALR, expert, flow,
command; the state goes to SALR and to the expert as well"></a>
<p class="halo-note">The same map opens every chapter that belongs to a stage, with the
stage lit. <a href="{workbook}/00_a_tick.html">The first chapter</a> goes
along it once, from the cameras to the motors.</p>'''


def markup(workbook='nbs', live=()):
    "The first page's HTML; `live`: the notebooks that exist."
    seed, task = seeded()

    def bar(name, k, n, rate, lo, hi):
        return (
            f'<div class="halo-rate"><span>{html.escape(name)}</span><span class="halo-bar"'
            f' role="img" aria-label="{rate:.0%}, 95 % interval {lo:.0%} to {hi:.0%}"><i'
            f' style="width:{100 * rate:.1f}%"></i><b'
            f' style="left:{100 * lo:.1f}%;width:{100 * (hi - lo):.1f}%"></b></span>'
            f'<span><strong>{k} / {n}</strong></span></div>'
        )

    cards = ''.join(
        '<a class="halo-card"'
        f' href="{workbook}/{page}.html"><strong>{title}</strong><span>{says}</span></a>'
        for page, (title, says) in LOOKS.items()
        if page in live
    )
    return f'''<div class="halo-hero">
<div class="halo-say">
<h1 class="halo-h1">HALO</h1>
<p class="halo-lead">A robot policy that remembers. It reads seconds of video history
through Qwen2.5-VL, lets the robot’s state choose what to read from the VLM’s cache, and
decodes its actions by flow matching.</p>
<p>This is the first open implementation: a workbook whose notebooks are the source of a
library, and a policy for LeRobot (<code>--policy.type=halo</code>).</p>
<pre class="halo-run"><code><b>make demo</b>   <i># record, roll out, report</i>
<b>make test</b>   <i># every notebook and test</i></code></pre>
<p class="halo-go"><a class="btn btn-primary" href="{workbook}/index.html">Open the
workbook</a> <a class="btn btn-outline-primary" href="{workbook}/viz/06_rollouts.html">Scrub
this episode</a> <a class="btn btn-outline-primary"
href="{workbook}/deploy/06_live.html">Change its past</a></p>
</div>
<figure class="halo-film">
<picture><source media="(prefers-reduced-motion: reduce)" srcset="still.webp"><img
src="film.webp" width="{2 * SIDE + GAP}" height="{HEAD + SIDE + 8 + CELL}" alt="The same
episode under two policies. The one with history puts the puck on the pad that had flashed
in the named colour, the one without history on another."></picture>
<figcaption>“{html.escape(task)}”: three pads flash for 0.8 s, then all are grey. The
trained <code>tiny</code> policies on seed {seed}, in real time, each with its plan in blue;
below, the past that it reads.</figcaption>
</figure>
</div>
{tick_map(workbook, live)}
<h2 class="halo-h2" id="rates">Successes on unseen seeds</h2>
<div class="halo-rates">{''.join(bar(*r) for r in rates())}</div>
<p class="halo-note">Thin line: Wilson’s 95 % interval. A policy without history can only
guess one pad of three. SALR makes no measurable difference in this task: the state is not
what is hidden.</p>
<h2 class="halo-h2" id="inside">See inside</h2>
<p>Each page holds an explorer that moves here, without a kernel; in JupyterLab the same
explorer asks the live model. In <a href="{workbook}/deploy/06_live.html">one page</a> the
policy itself runs in your browser.</p>
<div class="halo-cards">{cards}</div>'''


def write(folder, live=()):
    "Write the page (a Quarto document) and its pictures into `folder`."
    for source, name in zip(pictures(), ('film.webp', 'still.webp')):
        (folder / name).write_bytes(source.read_bytes())
    front = (
        '---\npagetitle: HALO\ndescription: A vision-language-action policy with history,'
        ' as a workbook\npage-layout: full\ntoc: false\nsidebar: false\npage-navigation:'
        ' false\n---\n\n'
    )
    (folder / 'index.qmd').write_text(
        f'{front}```{{=html}}\n{markup(live=live)}\n```\n', encoding='utf-8'
    )


if __name__ == '__main__':
    film(*map(Path, sys.argv[1:3]))
