"""Masks that can close, rows of one length, FiLM: the forms that a policy can be given."""

import copy
import json

import pytest
import torch

from halo.method.config import preset
from halo.method.model import HaloModel, parameter_table
from halo.method.salr import SALR, HeadConverter, chance_open, drawn_gate, hard_gate
from halo.method.vlm import Observation

GATES = dict(salr__mask='hard_concrete', salr__compression='normalised', salr__closing=0.5)


def small(**changes):
    return preset('tiny').but(
        text__layers=2, sampling__history_frames=0, chunk=4, flow__draws=2, **changes
    )


def observation(b=2):
    picture = torch.randint(0, 256, (b, 3, 56, 56), dtype=torch.uint8)
    return Observation(
        history=torch.zeros(b, 0, 3, 56, 56, dtype=torch.uint8),
        history_mask=torch.zeros(b, 0, dtype=torch.bool),
        views=[picture],
        view_mask=torch.ones(b, 1, dtype=torch.bool),
        text=torch.full((b, 3), 7),
        text_mask=torch.ones(b, 3, dtype=torch.bool),
        state=torch.randn(b, 8),
    )


def some(cfg, b=2):
    torch.manual_seed(1)
    r = cfg.flow.draws
    shape = cfg.chunk, cfg.max_action_dim
    return dict(
        actions=torch.randn(b, *shape),
        noise=torch.randn(b * r, *shape),
        t=torch.rand(b * r),
    )


@pytest.mark.parametrize('fused', [True, False])
def test_rows_have_one_length_and_only_the_mask_decides(fused):
    torch.manual_seed(0)
    layer = SALR(5, 3, 2, 1, 8, 'normalised')
    k, v, s = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 5)
    rows = layer.k.matrix().norm(dim=1)
    torch.testing.assert_close(rows, torch.full_like(rows, (8 / 48) ** 0.5))
    before = layer(k, v, s, fused)[0]
    with torch.no_grad():  # longer rows change nothing, a larger mask does
        layer.k.weight *= 3
        torch.testing.assert_close(layer(k, v, s, fused)[0], before)
        layer.k.mask *= 3
        torch.testing.assert_close(layer(k, v, s, fused)[0], 3 * before)


def test_a_gate_closes_exactly_and_is_drawn_in_training_only():
    torch.manual_seed(0)
    layer = SALR(5, 3, 2, 1, 8, 'normalised', 'hard_concrete')
    k, v, s = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 5)
    assert not torch.equal(layer(k, v, s)[0], layer(k, v, s)[0])
    layer.eval()
    assert torch.equal(layer(k, v, s)[0], layer(k, v, s)[0])
    torch.testing.assert_close(layer.k.gate(), torch.full((3, 2, 8), 0.95))
    assert layer.k.kept() == 1
    with torch.no_grad():
        layer.k.mask[0] = -1
    assert (layer.k.gate()[0] == 0).all() and layer.k.kept() == pytest.approx(2 / 3)
    assert layer.k.open_share() < 0.7 < layer.v.open_share()


def test_chance_open_counts_the_draws():
    torch.manual_seed(0)
    logit = torch.linspace(-5, 5, 11)
    share = (drawn_gate(logit.expand(50_000, -1)) > 0).float().mean(0)
    torch.testing.assert_close(share, chance_open(logit), atol=0.01, rtol=0)
    assert hard_gate(torch.tensor(-20.0)) == 0 and hard_gate(torch.tensor(20.0)) == 1


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_price_closes_gates_and_belongs_to_training(dtype):
    torch.manual_seed(0)
    m = HaloModel(small(**GATES, dtype=dtype))
    obs, given = observation(), some(m.cfg)
    torch.manual_seed(2)
    flow, share = m.losses(obs, **given)
    torch.manual_seed(2)
    loss = m.loss(obs, **given)
    torch.testing.assert_close(loss, flow + 0.5 * share)
    share.backward(retain_graph=True)
    for b in m.blocks:
        assert (b.rerep.k.mask.grad > 0).all()  # the price alone pushes all towards closed
    m.eval()
    assert m.price == 0 and torch.equal(m.loss(obs, **given), m.losses(obs, **given)[0])


def test_recomputed_layers_see_the_same_draw():
    "Checkpointing runs a block twice: with another draw its gradients would be wrong."
    torch.manual_seed(0)
    plain = HaloModel(small(**GATES))
    again = copy.deepcopy(plain)
    again.cfg = plain.cfg.but(checkpointing=True)
    obs, given = observation(), some(plain.cfg)
    for m in (plain, again):
        torch.manual_seed(3)
        m.train().loss(obs, **given).backward()
    for (name, p), q in zip(plain.named_parameters(), again.parameters()):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_the_price_is_paid_where_losses_are_added_up_by_value(tmp_path):
    "The loop for many processes adds squared errors itself; the price once got lost there."
    from types import SimpleNamespace

    from halo.train.scale import sample_losses, scale_step

    torch.manual_seed(0)
    m = HaloModel(small(**GATES)).train()
    obs, given = observation(), some(m.cfg)
    policy = SimpleNamespace(
        model=m,
        config=SimpleNamespace(model=m.cfg),
        observation=lambda batch: obs,
        parameters=m.parameters,
    )
    batch = dict(action=given['actions'])
    optimizer = torch.optim.SGD(m.parameters(), lr=0.0)
    seen = []
    torch.manual_seed(2)
    total, _ = scale_step(
        policy,
        [batch],
        [(given['noise'], given['t'])],
        optimizer,
        1.0,
        lambda square, mask, batch: seen.append(sample_losses(square, mask).mean()),
    )
    share = torch.stack([b.rerep.open_share() for b in m.blocks]).mean()
    torch.testing.assert_close(total, seen[0] + 0.5 * share.detach())


def test_film_sees_the_state_and_the_converter_does_not():
    torch.manual_seed(0)
    k, v, s = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 5)
    plain, film = HeadConverter(2, 1, 8), HeadConverter(2, 1, 8, state_dim_in=5)
    assert torch.equal(plain(k, v, s)[0], plain(k, v, -s)[0])
    assert not torch.allclose(film(k, v, s)[0], film(k, v, -s)[0])
    film.v.load_state_dict(plain.v.state_dict())
    film.k.load_state_dict(plain.k.state_dict())
    torch.testing.assert_close(film(k, v, 0 * s), plain(k, v))  # scales are 1 there
    assert all(p.dtype == torch.float32 for p in film.bfloat16().parameters())


def test_a_model_of_each_form_trains_and_is_counted():
    forms = (
        dict(salr__enabled=False, salr__converter='film', salr__converter_hidden=40),
        dict(salr__enabled=False, salr__converter_hidden=40),
        GATES,
    )
    for changes in forms:
        cfg = small(**changes)
        m, table = HaloModel(cfg), parameter_table(cfg)
        assert table['total_kept'] == sum(p.numel() for p in m.parameters())
        m.loss(observation(), **some(cfg)).backward()
        still = [n for n, p in m.named_parameters() if '.rerep.' in n and p.grad is None]
        assert not still, still


def test_what_cannot_be_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match='salr.closing=-1.0 is too small'):
        preset('tiny', salr__closing=-1.0)
    with pytest.raises(ValueError, match="salr.converter='lora'"):
        preset('tiny', salr__converter='lora')
    with pytest.raises(ValueError, match='mask_init=1.0: a hard_concrete gate'):
        SALR(5, 3, 2, 1, 8, 'linear', 'hard_concrete', mask_init=1.0)


def test_a_policy_saved_before_these_choices_keeps_its_own():
    "Its config has no such fields; it must go on computing what it computed."
    import draccus
    from draccus.parsers.decoding import decode_dataclass

    from halo.method.config import ModelConfig

    saved = draccus.encode(preset('paper').but(vlm_id=''))
    for new in ('closing', 'converter', 'converter_hidden'):
        del saved['salr'][new]
    read = decode_dataclass(ModelConfig, json.loads(json.dumps(saved)))
    assert read.salr.closing == 0 and read.salr.converter == 'mlp'
    assert read == preset('paper').but(vlm_id='')


@pytest.mark.parametrize('changes', [dict(salr__enabled=False), dict(salr__mask='real')])
def test_what_cannot_close_pays_nothing(changes):
    assert HaloModel(preset('tiny', **changes)).train().price == 0
    assert HaloModel(preset('tiny')).train().price > 0
