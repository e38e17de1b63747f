"""A real browser on the explorers: in JupyterLab with a kernel, where each kind of control
is moved and the picture must show what the model says.
"""

from functools import lru_cache

import numpy as np
import pytest
import torch
from browser import Lab, Live, Watched, chromium, given_up, root, run_all, undrawn
from transformers.models.qwen2.modeling_qwen2 import rotate_half

from halo.method.flow import integrate
from halo.method.vlm import pack
from halo.sim.evaluate import load_policy, observation_at
from halo.viz.attention import AttentionFilm, attention_explorer, groups_of
from halo.viz.denoising import denoising_explorer
from halo.viz.explorer import CATEGORIES, SIGNED
from halo.viz.flow import CENTRES, FAR, MODES, ROUND, exact_velocity, flow_explorer
from halo.viz.knockout import load_effects
from halo.viz.masks import mask_explorer, mask_film, normalized_state, state_explorer
from halo.viz.recording import Recording
from halo.viz.sampling import COLOURS, sampling_explorer

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(
        chromium() is None,
        reason=(
            'NO CHROMIUM HERE: the browser tests did not run; `apt-get install chromium`'
            ' brings one'
        ),
    ),
]
shipped = root / 'checkpoints/flash_place'


@lru_cache
def policy(name):
    return load_policy(shipped / name)


@lru_cache
def recording(name):
    return Recording.load(shipped / 'recordings' / f'{name}.safetensors')


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium())
        yield b
        b.close()


@pytest.fixture(scope='module')
def opened(browser, tmp_path_factory):
    """Opens a notebook once in JupyterLab and runs all of it, but for its static twins
    (tested on the site).
    """
    lab, pages = (
        Lab(
            tmp_path_factory.mktemp('lab'),
            [
                f'viz/{n}.ipynb'
                for n in (
                    '03_masks',
                    '04_attention',
                    '05_denoising',
                    '07_sampling',
                    '08_flow',
                )
            ],
            leave_out=('.static(',),
        ),
        {},
    )

    def open_it(name):
        if name not in pages:
            pages[name] = Watched(browser, viewport=dict(width=1500, height=1100))
            run_all(pages[name].page, lab, name)
        assert not pages[name].wrong, pages[name].wrong
        return pages[name].page

    yield open_it
    wrong = {name: list(w.wrong) for name, w in pages.items()}
    for w in pages.values():
        w.page.close()
    lab.close()
    assert not any(wrong.values()), wrong


def same(shown, wanted, share=0.002):
    """The browser shows the picture that the explorer draws (a pixel in 500 may differ, for
    lines that end between pixels).
    """
    assert shown.shape == wanted.shape, (shown.shape, wanted.shape)
    off = float((np.abs(shown.astype(int) - wanted).max(-1) > 24).mean())
    assert off <= share, f'{off:.2%} of the pixels differ'


def pixel(panel, xy, image):
    "Row and column in `image` of data coordinates `xy` of a panel."
    x, y = panel.unit(np.array(xy))
    left, top, w, h = panel.box()['box']
    return int((top + (1 - y) * h) * image.shape[0]), int((left + x * w) * image.shape[1])


def test_a_picture_that_does_not_come_is_found(browser):
    page = browser.new_page()
    dot = 'data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA='
    page.set_content(f'<img src="{dot}"><img src="data:image/png;base64,AAAA">')
    assert undrawn(page, patience=1) == ['data:image/png;base64,AAAA']
    page.close()
    # what JupyterLab takes back is no fault; what is refused, or missing elsewhere, is
    address, back = 'http://127.0.0.1:8888/lab/tree/map/a.svg', 'net::ERR_ABORTED'
    assert given_up(address, back)
    assert not given_up(address, 'net::ERR_CONNECTION_REFUSED')
    assert not given_up('http://127.0.0.1:8888/files/map/a.svg', back)


def test_masks_in_jupyterlab(opened):
    page = opened('viz/03_masks.ipynb')
    p, pre, post = policy('full')
    film, section = mask_film(shipped / 'full'), p.config.model.text.mrope_section
    explorer = mask_explorer(film, section, effects=load_effects(shipped / 'full')[0])
    live = Live(page, 'Masks along training')
    before = live.picture()
    same(before, explorer.picture())
    live.choose('masks of', 'V')
    now = live.changed(before)
    same(now, explorer.picture(which='V'))
    live.step('layer', -1)
    now = live.changed(now)
    same(now, explorer.picture(which='V', layer=1))
    m = p.model.blocks[1].rerep.v.gate().detach().numpy() - film.start
    top = max(
        float((x.gate().detach() - film.start).abs().max())
        for b in p.model.blocks
        for x in (b.rerep.k, b.rerep.v)
    )
    # the colours of single entries, from the weights
    for i, j, h in ((0, 0, 5), (2, 1, 11), (3, 3, 30)):
        row, col = pixel(explorer.panels['mask'], (h, i * m.shape[1] + j), now)
        assert (
            np.abs(
                now[row, col].astype(int)
                - 255 * np.array(SIGNED(0.5 + m[i, j, h] / top / 2)[:3])
            ).max()
            < 12
        )
    live.step('training step', -40)
    now = live.changed(now)
    same(now, explorer.picture(which='V', layer=1, step=0))
    row, col = pixel(explorer.panels['mask'], (5, 3), now)
    # nothing has moved before training
    assert np.abs(now[row, col].astype(int) - 255 * np.array(SIGNED(0.5)[:3])).max() < 8
    # play
    live.box.locator('button').first.click()
    live.page.wait_for_timeout(1500)
    assert (live.picture() != now).any()


def test_state_in_jupyterlab(opened):
    page = opened('viz/03_masks.ipynb')
    p, pre, post = policy('full')
    rec = recording('full')
    explorer, live = (
        state_explorer(p, pre, post, rec, 20),
        Live(page, 'What the state changes'),
    )
    before = live.picture()
    same(before, explorer.picture())
    c = explorer.controls['s2']
    step = (c.values[-1] - c.values[0]) / 200
    live.step('hand z / m', -60)
    now = live.changed(before)
    z = c.values[0] + round((c.values[c.start] - c.values[0]) / step - 60) * step
    same(now, explorer.picture(s2=z), 0.01)
    live.choose('through', 'the state token')
    token = live.changed(now)
    row, col = pixel(explorer.panels['cache'], (3, 2), token)
    zero = explorer.panels['cache'].table[1][:3]
    # through the token alone the cache stays
    assert np.abs(token[row, col].astype(int) - zero).max() < 8
    obs = observation_at(p, pre, rec.record, rec.task, 20)
    values = rec.record['state'][20].copy()
    values[2] = z
    obs.state = normalized_state(pre, rec.task, values, obs.state.shape[1])
    noise = torch.from_numpy(
        np.random.default_rng(0).standard_normal((1, 16, 8), np.float32)
    )
    with torch.inference_mode():
        plan = post(p.denoise(obs, noise))[0].numpy()
    drawn = explorer.ask(s2=z)
    # the whole model, asked anew
    assert np.allclose(
        np.stack([drawn[f'act{k}'][1][:, 1] for k in range(4)], 1), plan, atol=1e-3
    )


def attention_by_hand(p, obs, noise, layer):
    """Expert attention (heads, q, l + q) of the last denoising step, from the projections'
    outputs: rotation, product, softmax.
    """
    kept, attention = {}, p.model.blocks[layer].expert.layer.self_attn
    hooks = [
        getattr(attention, f'{n}_proj').register_forward_hook(
            lambda m, i, o, n=n: kept.__setitem__(n, o[0])
        )
        for n in 'qk'
    ]
    with torch.inference_mode():
        prefix, (x, dims) = p.model.encode(obs), p._noise(obs, noise)
        # with the state token in every step, as the picture shows it
        p.model.integrate(lambda y, t: p.model.velocity(prefix, y, t) * dims, x)
        for h in hooks:
            h.remove()
        _, ectx = p.model.expert_start(obs.state, prefix.ctx, noise, torch.ones(1))
        cos, sin = ectx.rope
        size = attention.head_dim
        q, k = (kept[n].unflatten(-1, (-1, size)).transpose(0, 1) for n in 'qk')
        q, k = (x * cos[0] + rotate_half(x) * sin[0] for x in (q, k))
        k = torch.cat([prefix.cache[layer][0][0], k], 1)
        k = k.repeat_interleave(len(q) // len(k), 0)
        return (
            (q @ k.mT / size**0.5)
            .masked_fill(~ectx.mask[0], -torch.inf)
            .softmax(-1)
            .numpy()
        )


def test_attention_in_jupyterlab(opened):
    page = opened('viz/04_attention.ipynb')
    p, pre, post = policy('full')
    rec = recording('full')
    film = AttentionFilm(p, pre, post, rec)
    explorer, live = attention_explorer(film), Live(page, 'Where the expert looks')
    before = live.picture()
    same(before, explorer.picture())
    live.step('time', 1)
    now = live.changed(before)
    tick = film.ticks[explorer.controls['tick'].start + 1]
    same(now, explorer.picture(tick=tick))
    live.choose('head', '1')
    now = live.changed(now)
    same(now, explorer.picture(tick=tick, head=1))
    live.step('layer', 1)
    now = live.changed(now)
    same(now, explorer.picture(tick=tick, head=1, layer=3))
    noise = torch.from_numpy(
        np.random.default_rng(0).standard_normal((1, 16, 8), np.float32)
    )
    row = attention_by_hand(
        p, observation_at(p, pre, rec.record, rec.task, tick), noise, 3
    )[1, 1:].mean(0)
    mass, panel = (
        {g: row[i].sum() for g, i in groups_of(film.at(tick)).items()},
        explorer.panels['mass'],
    )
    scale = pixel(panel, (1, 0), now)[1] - pixel(panel, (0, 0), now)[1]
    # the bars are as long as the masses computed by hand
    for k, g in enumerate(film.groups):
        r, c = pixel(panel, (0, k), now)
        colour = (
            255 * np.array([int(CATEGORIES[k][i : i + 2], 16) / 255 for i in (1, 3, 5)])
        ).round()
        long = (np.abs(now[r, c : c + scale] - colour).max(-1) < 40).sum()
        assert abs(long - scale * mass.get(g, 0)) <= 2.5, (g, long, scale * mass.get(g, 0))
    live.choose('attention', 'rollout')
    now = live.changed(now)
    same(now, explorer.picture(tick=tick, head=1, layer=3, kind='rollout'))
    live.choose('drop', 'remove: history')
    now = live.changed(now)
    same(
        now,
        explorer.picture(
            tick=tick, head=1, layer=3, kind='rollout', drop='remove: history'
        ),
    )


def test_denoising_in_jupyterlab(opened):
    page = opened('viz/05_denoising.ipynb')
    rec = recording('expert')
    policies = {n: policy(n) for n in ('full', 'no_history')}
    explorer, live = denoising_explorer(policies, rec), Live(page, 'From noise to a plan')
    before = live.picture()
    same(before, explorer.picture())
    live.step('way done', -4)
    now = live.changed(before)
    same(now, explorer.picture(stage=0.6), 0.004)
    live.choose('policy', 'no_history')
    now = live.changed(now)
    same(now, explorer.picture(stage=0.6, policy='no_history'), 0.004)
    live.step('way done', 4)
    now = live.changed(now)
    live.choose('method', 'heun')
    now = live.changed(now)
    same(now, explorer.picture(policy='no_history', method='heun'), 0.004)
    # sixteen plans by the policy itself, one at a time
    tick, (p, pre, post) = explorer.start['tick'], policies['no_history']
    noise = torch.from_numpy(
        np.random.default_rng(0).standard_normal((16, 16, 8), np.float32)
    ) * (torch.arange(8) < 4)
    obs = observation_at(p, pre, rec.record, rec.task, tick)
    with torch.inference_mode():
        prefix = p.model.encode(obs)
        plans = np.stack(
            [
                post(p.model.sample(prefix, noise[k : k + 1], method='heun')[..., :4])[
                    0
                ].numpy()
                for k in range(16)
            ]
        )
    panel = explorer.panels['act1']
    _, col = pixel(panel, (2, 0), now)
    blue = np.array([0, 114, 178])
    rows = [
        pixel(panel, (2, y), now)[0] for y in (plans[:, 2, 1].max(), plans[:, 2, 1].min())
    ]
    top, bottom = pixel(panel, (2, 2.1), now)[0], pixel(panel, (2, -2.1), now)[0]
    found = top + np.flatnonzero(
        np.abs(now[top:bottom, col].astype(int) - blue).max(-1) < 70
    )
    assert abs(found.min() - rows[0]) <= 3 and abs(found.max() - rows[1]) <= 3, (
        found,
        rows,
    )


def rgb(colour):
    "A colour '#rrggbb' as three numbers, 0 to 255."
    return np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)])


def painted(image, row, col, colour):
    "How many pixels of these rows and columns have the colour."
    return int((np.abs(image[row, col].astype(int) - rgb(colour)).max(-1) < 12).sum())


def test_sampling_in_jupyterlab(opened):
    page = opened('viz/07_sampling.ipynb')
    rec = recording('full')
    explorer, live = sampling_explorer(rec), Live(page, 'What a tick reads')
    now, values = live.picture(), {}
    same(now, explorer.picture())
    for label, by, name in (
        ('time', 6, 'tick'),
        ('stride', 2, 'history_stride'),
        ('hop', -2, 'history_hop'),
        ('history', 1, 'history_size'),
        ('view', -1, 'view_size'),
        ('wrist', 1, 'wrist_size'),
        ('frames n', 1, 'history_frames'),
    ):
        c = explorer.controls[name]
        live.step(label, by)
        now, values[name] = live.changed(now), c.values[c.start + by]
        same(now, explorer.picture(**values), 0.004)
    for label, by, name in (
        ('history', -1, 'history_size'),
        ('view', 1, 'view_size'),
        ('wrist', -1, 'wrist_size'),
        ('frames n', -1, 'history_frames'),
    ):
        live.step(label, by)
        now = live.changed(now)
        del values[name]
    same(now, explorer.picture(**values), 0.004)
    # the window of the shipped policy: its own packing counts the tokens
    p, pre, post = policy('full')
    s = p.config.model.sampling
    assert (s.history_frames, s.history_stride, s.history_hop) == (8, 6, 0)
    obs = observation_at(p, pre, rec.record, rec.task, values['tick'])
    groups = pack(obs, p.config.model).groups[0]
    sizes = {g: at.stop - at.start for g, at in groups.items()}
    panel = explorer.panels['counts']
    scale = (pixel(panel, (20, 0), now)[1] - pixel(panel, (0, 0), now)[1]) / 20
    long = []
    for k, colour in enumerate(COLOURS):
        row, col = pixel(panel, (0, k), now)
        long.append(painted(now, row, slice(col, None), colour) / scale)
    assert abs(sum(long[:3]) - sizes['history']) < 0.5
    assert abs(long[3] - sizes['view0'] - sizes['view1']) < 0.5
    assert abs(sum(long) - len(pack(obs, p.config.model).input_ids[0])) < 1


def test_flow_in_jupyterlab(opened):
    page = opened('viz/08_flow.ipynb')
    explorer, live = flow_explorer(), Live(page, 'From a cloud to eight answers')
    before = live.picture()
    same(before, explorer.picture(), 0.004)
    live.step('time t', -12)
    now = live.changed(before)
    same(now, explorer.picture(t=0.6), 0.004)
    live.choose('solver', 'Heun')
    now = live.changed(now)
    same(now, explorer.picture(t=0.6, method='heun'), 0.004)
    live.choose('field', 'learned')
    now = live.changed(now)
    # trained twice, there and here
    same(now, explorer.picture(t=0.6, method='heun', field='learned'), 0.01)
    live.choose('field', 'exact')
    now = live.changed(now)
    live.step('steps', -2)
    now = live.changed(now)
    same(now, explorer.picture(t=0.6, method='heun', steps=2), 0.004)
    # the bars are as tall as the ends are many, counted by hand
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 1, 2, generator=generator, dtype=torch.float64)
    far = torch.cdist(integrate(exact_velocity, noise, 2, 'heun')[:, 0], CENTRES)
    ends = far.argmin(1).where(far.amin(1) < FAR, MODES).bincount(minlength=MODES + 1)
    panel = explorer.panels['ends']
    scale = (pixel(panel, (0, 0), now)[0] - pixel(panel, (0, 50), now)[0]) / 50
    top = pixel(panel, (0, panel.ax.get_ylim()[1]), now)[0]
    assert (ends > 5).sum() > 4
    for k, colour in enumerate(ROUND):
        row, col = pixel(panel, (k, 0), now)
        tall = painted(now, slice(top, row), col, colour) / scale
        assert abs(tall - min(int(ends[k]), panel.ax.get_ylim()[1])) < 1.5, (k, tall)


WIDE = """() => [...document.querySelectorAll('.jp-CodeCell .cm-scroller')]
    .filter(e => e.clientWidth).map(e => [e.scrollWidth, e.clientWidth])"""


def test_code_fits_a_cell_of_jupyterlab(browser, tmp_path):
    "92 columns at the default width of a window of 1280 pixels, file browser open."
    lab = Lab(tmp_path, ['method/03_salr.ipynb'])
    try:
        page = browser.new_page(viewport=dict(width=1280, height=900))
        page.goto(f'{lab.url}/lab/tree/method/03_salr.ipynb?reset')
        page.locator('.jp-CodeCell .cm-content').first.wait_for(timeout=60_000)
        # cells are set one after the other
        page.wait_for_function(f'() => ({WIDE})().length > 20', timeout=60_000)
        found = page.evaluate(WIDE)
        assert len(found) > 20 and all(inner <= outer + 1 for inner, outer in found), found
        page.close()
    finally:
        lab.close()
