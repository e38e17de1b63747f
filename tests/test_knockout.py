"""Knock-out of latent channels: exact against closing by hand, and it leaves no trace."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from halo.method.config import preset
from halo.method.model import HaloModel
from halo.method.salr import COMPRESSIONS, MASK_START
from halo.method.vlm import Observation, tiny_tokenizer
from halo.viz import knockout as k

SMALL = dict(sampling__history_frames=2, salr__closing=0.0)


def model(seed=0, **changes):
    "A tiny model whose gates are not all alike."
    torch.manual_seed(seed)
    m = HaloModel(preset('tiny').but(**SMALL, **changes)).eval()
    with torch.no_grad():
        for maps in k.latent_maps(m).values():
            for one in maps:
                one.mask += 0.01 * torch.randn_like(one.mask)
    return m


def observation(cfg, rows=2, seed=0):
    "Rows of random pixels, one of which lacks a frame and is padded."
    g = torch.Generator().manual_seed(seed)
    n, side = cfg.sampling.history_frames, cfg.sampling.history_size
    im = lambda *shape: torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    mask = torch.ones(rows, n, dtype=torch.bool)
    mask[1:, :1] = False
    t = tiny_tokenizer()(['open the drawer'] * rows, return_tensors='pt')
    return Observation(
        history=im(rows, n, 3, side, side),
        history_mask=mask,
        views=[im(rows, 3, 56, 56)],
        view_mask=torch.ones(rows, 1, dtype=torch.bool),
        text=t['input_ids'],
        text_mask=t['attention_mask'].bool(),
        state=torch.randn(rows, cfg.max_state_dim, generator=g),
    )


def masks(m):
    "Copies of all masks of a model."
    return [one.mask.detach().clone() for ms in k.latent_maps(m).values() for one in ms]


def noise_of(cfg, rows, seed=0):
    "The noise that `scenes` draws for its rows."
    g = torch.Generator().manual_seed(seed)
    shape = 1, cfg.chunk, cfg.max_action_dim
    return torch.cat([torch.randn(shape, generator=g) for _ in range(rows)])


VARIANTS = [dict(salr__compression=c) for c in COMPRESSIONS]
VARIANTS += [dict(salr__mask=m) for m in MASK_START]
VARIANTS += [
    dict(salr__keys='before_rope'),
    dict(salr__keys='before_rope', salr__compression='mlp_norm'),
    dict(salr__fused=False),
    dict(expert__state_token=False),
    dict(salr__state_encoder='transformer', salr__state_width=128),
]


@pytest.mark.parametrize('changes', VARIANTS, ids=str)
def test_an_effect_is_that_of_closing_by_hand(changes):
    m = model(**changes)
    obs, noise = observation(m.cfg), noise_of(m.cfg, 2)
    found = k.knockout(m, obs, steps=2, channels=3, rows=2)
    with torch.inference_mode():
        before = m.sample(obs, noise, steps=2)
    asked = 0
    for w, effects in found.items():
        for address in np.argwhere(np.isfinite(effects)):
            keep = {n: np.ones_like(x, bool) for n, x in found.items()}
            keep[w][tuple(address)] = False
            with k.closing(m, keep), torch.inference_mode():
                assert (k.says(m)[w] == 0).sum() == 1
                after = m.sample(obs, noise, steps=2)
            change = (after - before).square().mean((1, 2)).sqrt().mean().item()
            assert change > 0
            assert abs(change - effects[tuple(address)]) < 1e-2 * change + 2e-6
            asked += 1
    assert asked == 2 * len(m.blocks) * 3


def test_a_closed_channel_has_no_effect():
    m = model(salr__mask='hard_concrete', salr__compression='normalised')
    with torch.no_grad():
        m.blocks[1].rerep.v.mask[2, 0] = -1.0  # far below the gate's threshold
    said = k.says(m)
    shut = said['v'][1] == 0
    assert shut.sum() == shut[2, 0].size
    assert k.kept_share(m)['v'][1] == 1 - shut.mean()
    found = k.knockout(m, observation(m.cfg, 1), steps=1, channels=8)
    assert (found['v'][1][shut] == 0).all()
    left = np.isfinite(found['v'][1]) & ~shut
    assert 0 < left.sum() <= 8 and (found['v'][1][left] > 0).all()


def test_all_channels_of_a_map_are_asked_and_nan_means_not_asked():
    m = model()
    s = k.scenes(m, observation(m.cfg, 1), steps=1)[0]
    every = s.moved(0, 'k', torch.arange(12), rows=5)
    assert every.shape == (12,) and torch.isfinite(every).all()
    torch.testing.assert_close(every, s.moved(0, 'k', torch.arange(12)))
    found = k.knockout(m, observation(m.cfg, 1), steps=1, channels=2)
    assert all(np.isfinite(layer).sum() == 2 for x in found.values() for layer in x)
    again = k.knockout(m, observation(m.cfg, 1), steps=1, channels=2)
    assert all(np.array_equal(found[w], again[w], equal_nan=True) for w in 'kv')


@pytest.mark.parametrize('kind', MASK_START)
def test_masks_come_back(kind):
    m = model(salr__mask=kind)
    before = masks(m)
    nothing = {w: np.zeros_like(x, bool) for w, x in k.says(m).items()}
    with pytest.raises(KeyboardInterrupt), k.closing(m, nothing):
        assert all((x == 0).all() for x in k.says(m).values())
        raise KeyboardInterrupt
    assert all(torch.equal(a, b) for a, b in zip(before, masks(m)))
    k.prune_curve(m, observation(m.cfg, 1), shares=(0.5, 0.0), steps=1)
    assert all(torch.equal(a, b) for a, b in zip(before, masks(m)))
    with pytest.raises(ValueError, match='share=2'):
        k.prune_curve(m, observation(m.cfg, 1), shares=(0.5, 2), steps=1)
    assert all(torch.equal(a, b) for a, b in zip(before, masks(m)))


def test_the_curve_begins_at_the_policy_and_ends_blind():
    m = model()
    obs = observation(m.cfg, 1)
    effects = {w: np.random.default_rng(0).random(x.shape) for w, x in k.says(m).items()}
    found = k.prune_curve(m, obs, effects, shares=(1, 0.5, 0), steps=2)
    assert set(found) == {'mask', 'random', 'effect'}
    for errors in found.values():
        assert errors[0] < 1e-6 < errors[1]
    assert len({errors[2] for errors in found.values()}) == 1
    target = torch.zeros(1, m.cfg.chunk, m.cfg.max_action_dim)
    to_zero = k.prune_curve(m, obs, shares=(1,), steps=2, target=target)['mask'][0]
    plan = m.sample(obs, noise_of(m.cfg, 1), steps=2)
    assert abs(to_zero - plan.square().mean().sqrt().item()) < 1e-5


def test_ranks_average_ties():
    a = np.array([0, 0, 0, 1, 2, 2, 5.0])
    b = np.array([3, 1, 1, 4, 4, 9, 8.0])
    by_hand = np.corrcoef(rankdata(a), rankdata(b))[0, 1]
    assert abs(k.rank_correlation(a, b) - by_hand) < 1e-12
    assert rankdata(a).tolist() == [2, 2, 2, 4, 5.5, 5.5, 7]
    assert k.rank_correlation(a, -(a**3)) == pytest.approx(-1)
    assert np.isnan(k.rank_correlation(a, np.ones(7)))
    holes = np.where(np.arange(7) < 5, np.nan, b)
    assert np.isnan(k.rank_correlation(a, holes))
    with pytest.raises(ValueError, match='same channels'):
        k.rank_correlation(a, b[:3])


def test_faithfulness_of_all_and_of_the_open_ones():
    said = np.arange(24.0).reshape(1, 2, 3, 4)
    said[0, 0, 0] = 0
    effect = np.where(said > 0, 100 - said, 0)  # the open ones the wrong way round
    found = k.faithfulness(dict(k=said, v=said), dict(k=effect, v=said))
    assert found['k_open'] == pytest.approx([-1]) and found['v'] == pytest.approx([1])
    assert -1 < found['k'][0] < 0.5
    assert found['median_open'] == pytest.approx(0)
    closed = dict(k=said * 0, v=said * 0)
    assert np.isnan(k.faithfulness(closed, closed)['median'])


def test_what_largest_keeps():
    ranking = {'k': np.array([[[[3.0, 1, 2, 0]]], [[[0.0, 0, 0, 0]]]])}
    kept = k.largest(ranking, 0.5)['k']
    assert kept[0].ravel().tolist() == [True, False, True, False]
    assert kept[1].sum() == 2  # a tie keeps as many
    assert k.largest(ranking, 1)['k'].all() and not k.largest(ranking, 0)['k'].any()


def test_bad_input_is_named():
    m = model()
    with pytest.raises(ValueError, match='holds no observation'):
        k.knockout(m, [])
    with pytest.raises(ValueError, match='no latent channels'):
        k.latent_maps(HaloModel(preset('tiny').but(**SMALL, salr__enabled=False)).eval())
    with pytest.raises(ValueError, match='call .eval()'):
        k.says(model().train())
    other = {w: x[:, :1] > 0 for w, x in k.says(m).items()}
    before = masks(m)
    with pytest.raises(ValueError, match='for a mask of'), k.closing(m, other):
        raise AssertionError
    assert all(torch.equal(a, b) for a, b in zip(before, masks(m)))


@pytest.mark.parametrize(
    'wrong, said',
    [
        (['--observations', '0'], '--observations 0'),
        (['--channels', '4', '--write'], 'leave out --channels'),
    ],
)
def test_the_command_refuses(capsys, wrong, said):
    assert k.main(['--policy', 'checkpoints/flash_place/full', *wrong]) == 1
    assert said in capsys.readouterr().err


def test_the_command_refuses_a_policy_without_salr(capsys):
    assert k.main(['--policy', 'checkpoints/flash_place/no_salr']) == 1
    assert 'no latent channels' in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
    out = tmp_path / 'a.json'
    line = ['--policy', 'checkpoints/flash_place/full', '--observations', '1']
    assert k.main([*line, '--channels', '4', '--steps', '1', '--json', str(out)]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert 'median' in said and 'random' in said
    assert len(found['gate']['k']) == len(found['kept']['v']) == 4
    assert found['observations'] == 1 and 'effect' not in found['curve']


def test_kept_effects_are_tied_to_the_weights(tmp_path):
    (tmp_path / 'model.safetensors').write_bytes(b'one')
    effects = {w: np.full((1, 1, 1, 2), 2e-5, np.float32) for w in 'kv'}
    k.save_effects(tmp_path, effects, observations=3)
    again, about = k.load_effects(tmp_path)
    assert about['observations'] == 3
    assert np.allclose(again['k'], effects['k'], rtol=1e-3)
    (tmp_path / 'model.safetensors').write_bytes(b'two')
    with pytest.raises(ValueError, match='other weights'):
        k.load_effects(tmp_path)
    (tmp_path / k.KEPT).unlink()
    with pytest.raises(ValueError, match='holds no'):
        k.load_effects(tmp_path)


def test_what_ships_is_of_the_shipped_weights():
    from halo.sim.evaluate import load_policy
    from halo.viz.recording import shipped_folder

    folder = shipped_folder() / 'full'
    effects, _ = k.load_effects(folder)
    policy, _, _ = load_policy(folder)
    said = k.says(policy)
    assert all(effects[w].shape == said[w].shape for w in 'kv')
    assert all((effects[w][said[w] == 0] == 0).all() for w in 'kv')
    assert np.isfinite(k.faithfulness(said, effects)['median'])
