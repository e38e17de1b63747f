"""The report: one file, nothing outside it, and honest numbers."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from halo.sim.evaluate import EvalResult, wilson
from halo.studies.report import (
    INK,
    OUTCOMES,
    figure_denoising,
    figure_filmstrip,
    figure_loss,
    figure_success,
    films,
    first_section,
    hand_paths,
    outcome,
    page,
    player,
    read_log,
    running_mean,
    svg,
)

VOID = {'meta', 'input', 'img', 'br', 'image', 'link'}


class Balanced(HTMLParser):
    "Fails on a tag that is closed in the wrong place."

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, tag


def result(wins, n=6, films=2):
    rng = np.random.default_rng(0)
    episodes = [
        dict(
            seed=s,
            success=s < wins,
            ticks=10 + s,
            task=f'put it on <{"ab"[s % 2]}> & "stay"',
            placed=1 if s < wins else s % 3 - 1,
            target=1,
            inference_ms=5.0,
        )
        for s in range(n)
    ]
    records = {
        s: dict(scene=rng.integers(0, 255, (10 + s, 64, 64, 3), np.uint8))
        for s in range(films)
    }
    return EvalResult(episodes, dict(fps=10, env={}), records=records)


@pytest.fixture(scope='module')
def results():
    return dict(full=result(5), no_history=result(2), no_salr=result(4))


def test_outcomes_cover_every_episode(results):
    for r in results.values():
        assert {outcome(e) for e in r.episodes} <= set(OUTCOMES)
    assert outcome(dict(success=False)) == 'not placed'


def test_page_is_whole_and_alone(results):
    image = np.zeros((64, 64, 3), np.uint8)
    text = page(
        'a title',
        first_section(results)
        + films(results, [0, 1], 10)
        + player({'full': np.random.rand(5, 3, 7, 2) * 64}, image),
    )
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text) and not re.findall(
        r'url\((?!#)[^)]*\)', text
    )
    assert text.count('<video') == 6 and '<a>' not in text  # instructions are escaped


def test_page_holds_the_numbers(results):
    text, (lo, hi) = first_section(results), wilson(5, 6)
    assert '5 of 6' in text and f'{100 * lo:.1f}' in text and f'{100 * hi:.1f}' in text


def test_svg_takes_its_ink_from_the_page(results):
    for fig in (
        figure_success(results),
        figure_loss({'full': [dict(step=s, loss=1 / s) for s in range(1, 9)]}),
        figure_filmstrip(results['full'].records[0], 10, 3),
    ):
        text = svg(fig, 'a "label"')
        assert text.startswith('<svg') and INK not in text and 'var(--ink)' in text


def test_axes_are_named(results):
    for fig in (
        figure_success(results),
        figure_loss({'full': [dict(step=1, loss=1.0), dict(step=2, loss=0.5)]}),
    ):
        for ax in fig.axes:
            assert ax.get_xlabel()


def test_denoising_figure_names_both_ends():
    fig = figure_denoising(
        {
            'full': np.random.rand(11, 2, 5, 2) * 64,
            'no_salr': np.random.rand(11, 2, 5, 2) * 64,
        },
        np.zeros((64, 64, 3), np.uint8),
    )
    titles = [ax.get_title() for ax in fig.axes]
    assert (
        titles[0] == 't = 1.0 (noise)'
        and titles[5] == 't = 0.0 (plan)'
        and len(titles) == 12
    )


def test_hand_paths_clip_actions_as_the_environment_does():
    assert np.allclose(
        hand_paths(np.zeros(3), np.full((2, 4), 9.0)),
        hand_paths(np.zeros(3), np.ones((2, 4))),
    )


def test_a_missing_log_is_no_error(tmp_path):
    assert read_log(tmp_path) == [] and len(running_mean(np.array([1.0]))) == 1
