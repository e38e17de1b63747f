"""Activations by name: on other models, while it streams, and what is refused."""

import pytest
import torch

from halo.deploy.export import Layout, random_observation
from halo.method.config import preset
from halo.method.model import HaloModel
from halo.realtime.stream import Streamer
from halo.viz.patching import main
from halo.viz.watch import points, tokens_from, watch

LAYOUT = Layout(2, 56, ((56, 84), (56, 56)), 9)
KINDS = dict(
    no_salr=dict(salr__enabled=False),
    before_rope=dict(salr__keys='before_rope'),
    deep_state=dict(salr__state_encoder='transformer', salr__state_width=128),
)


def a_model(**how):
    torch.manual_seed(0)
    return HaloModel(preset('tiny').but(sampling__history_frames=4, **how)).eval()


@pytest.mark.parametrize('kind', KINDS)
@torch.inference_mode()
def test_two_ends_of_patching(kind):
    model = a_model(**KINDS[kind])
    a, b = (random_observation(model.cfg, LAYOUT, 4, seed=k) for k in range(2))
    b.state, b.text = a.state, a.text
    noise = torch.randn(1, model.cfg.chunk, model.cfg.max_action_dim)
    plans, caches = [], []
    for obs in (a, b):
        with watch(model) as cache:
            plans.append(model.sample(obs, noise))
        caches.append(cache)
    assert set(caches[0]) == set(points(model))
    assert len(caches[0].calls['block.0.expert.x']) == model.cfg.flow.steps
    assert caches[0]['block.0.expert.x'].shape[0] == model.cfg.flow.steps
    # the first hidden state of a makes a's plan out of b
    with watch(model, {'embed.x': caches[0]['embed.x']}):
        assert torch.equal(model.sample(b, noise), plans[0])
    # half of it makes neither
    half = tokens_from(caches[0]['embed.x'], slice(0, 9))
    with watch(model, {'embed.x': half}):
        between = model.sample(b, noise)
    # one patch for many names
    with watch(model, {'block.*.salr.?_u': torch.zeros_like}) as none:
        model.encode(a)
    assert not any(none[n].any() for n in none if n.endswith('_u'))
    assert not torch.equal(between, plans[0]) and not torch.equal(between, plans[1])


@torch.inference_mode()
def test_names_are_chosen_and_all_hooks_go():
    model = a_model()
    obs = random_observation(model.cfg, LAYOUT, 3)
    with watch(model, names=('block.*.salr.k_u',)) as cache:
        model.encode(obs)
    assert list(cache) == [f'block.{n}.salr.k_u' for n in range(len(model.blocks))]
    with pytest.raises(KeyError, match='was not noted'):
        cache['embed.x']
    with pytest.raises(ValueError, match='no activation'):
        with watch(model, {'block.9.vlm.k': torch.zeros(1)}):
            pass
    with pytest.raises(ValueError, match='was not computed inside'):
        with watch(model, {'embed.x': torch.zeros_like}):
            Streamer(model)
    with pytest.raises(ValueError, match='no tensor'):
        with watch(model, {'embed.x': lambda x: 3}):
            model.encode(obs)
    with pytest.raises(RuntimeError):
        with watch(model):
            raise RuntimeError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    want = model.encode(obs).cache[1][0]
    assert torch.allclose(Streamer(model).encode(obs).cache[1][0], want, atol=1e-5)


def test_the_command_refuses(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(['--episodes', '0'])
    assert '--episodes 0: give at least 1' in capsys.readouterr().err
    assert main(['--checkpoints', str(tmp_path)]) == 1
    assert 'is not a policy folder' in capsys.readouterr().err
