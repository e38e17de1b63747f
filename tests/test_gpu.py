"""What only a GPU can tell: `make test-gpu`."""

from pathlib import Path

import pytest
import torch

from halo.method.config import SALRConfig, preset
from halo.method.salr import SALR, fp32_parameter_names
from halo.realtime.graph import GraphStreamer
from halo.realtime.stream import Streamer
from halo.studies.bench import build, episode, peak_bytes

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent
TINY = dict(
    sampling__history_stride=1, sampling__history_frames=16, sampling__history_hop=8
)
VARIANTS = {
    'as shipped': {},
    'no history': dict(sampling__history_frames=0, sampling__history_hop=0),
    'sliding': dict(sampling__history_hop=0),
    'no SALR': dict(salr__enabled=False),
    'odd vision MLP': dict(vision__mlp=300),
    'state transformer': dict(
        salr=SALRConfig(
            state_heads=4,
            state_encoder='transformer',
            state_width=128,
            compression='mlp_norm',
        )
    ),
}


def tick_by_tick(runner, model, ticks=40):
    """Largest difference of a runner's chunks from `HaloModel.sample`'s over an episode
    with hops.
    """
    noise = torch.randn(1, model.cfg.chunk, model.cfg.max_action_dim, device='cuda')
    worst = 0.0
    for obs in episode(model.cfg, range(ticks), size=112, device='cuda'):
        with torch.inference_mode():
            worst = max(
                worst, float((runner(obs, noise) - model.sample(obs, noise)).abs().max())
            )
    return worst


@pytest.mark.parametrize('name', VARIANTS)
def test_replayed_ticks_give_the_same_actions(name):
    "FP32: CUDA graphs over slots against the plain policy, hops included."
    model = build(preset('tiny', **(TINY | VARIANTS[name])), 'cuda')
    runner = GraphStreamer(model)
    worst = tick_by_tick(runner.sample, model)
    print(f'{name}: {worst:.1e}, {len(runner.programs)} graphs')
    assert worst < 1e-3


def test_compiled_expert_gives_the_same_actions():
    "Layers of the expert through torch.compile, inside the graph."
    model = build(preset('tiny', **TINY), 'cuda')
    runner = GraphStreamer(model, compiled=True)
    worst = tick_by_tick(runner.sample, model)
    print(f'compiled: {worst:.1e}')
    assert worst < 1e-3


def test_streaming_gives_the_same_actions():
    model = build(preset('tiny', **TINY), 'cuda')
    stream = Streamer(model)
    assert (
        tick_by_tick(lambda obs, noise: model.sample(stream.encode(obs), noise), model)
        < 1e-3
    )


@pytest.mark.parametrize('kind,bound', [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_fused_salr_is_the_literal_one_and_lighter(kind, bound):
    "Results, gradients and peak memory at the paper's shapes."
    torch.manual_seed(0)
    m = SALR(32, 8, 4, 2, 128).cuda()
    k, v = (
        torch.randn(1, 900, 4, 128, device='cuda', dtype=kind)
        .transpose(1, 2)
        .requires_grad_()
        for _ in 'kv'
    )
    state = torch.randn(1, 32, device='cuda')

    def both(fused):
        a, b = m(k, v, state, fused=fused)
        return (
            a,
            b,
            *torch.autograd.grad(
                a.float().square().mean() + b.float().square().mean(),
                [k, v, *m.parameters()],
            ),
        )

    for x, y in zip(both(True), both(False)):
        assert x.dtype == y.dtype and (x - y).abs().max() <= bound * (1 + y.abs().max())
    assert peak_bytes(lambda: both(False), 'cuda') > 3 * peak_bytes(
        lambda: both(True), 'cuda'
    )


def test_a_bf16_policy_learns_and_its_masks_stay_fp32():
    "A fixed batch, 30 steps of AdamW: the loss falls, every mask moves and is float32."
    model = build(
        preset(
            'tiny',
            dtype='bfloat16',
            sampling__history_frames=8,
            sampling__history_stride=1,
            sampling__history_hop=0,
        ),
        'cuda',
    ).train()
    cfg = model.cfg
    obs = next(episode(cfg, range(40, 41), size=112, device='cuda', batch=4))
    actions = torch.randn(4, cfg.chunk, cfg.max_action_dim, device='cuda')
    masks = {n: p for n, p in model.named_parameters() if n.endswith('.mask')}
    before = {n: p.detach().clone() for n, p in masks.items()}
    assert set(masks) <= set(fp32_parameter_names(model)) and all(
        p.dtype == torch.float32 for p in masks.values()
    )
    opt, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    torch.manual_seed(0)
    noise, t = (
        torch.randn(4 * cfg.flow.draws, cfg.chunk, cfg.max_action_dim, device='cuda'),
        torch.rand(4 * cfg.flow.draws, device='cuda'),
    )
    for _ in range(30):
        loss = model.loss(obs, actions, noise=noise, t=t)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    print(f'loss {losses[0]:.3f} -> {losses[-1]:.3f}')
    assert losses[-1] < 0.5 * losses[0] and all(
        (p - before[n]).abs().max() > 0 for n, p in masks.items()
    )


def test_the_shipped_policy_acts_as_on_a_cpu():
    "Its own recorded observations, FP32, eager and replayed."
    from halo.sim.evaluate import load_policy, observation_at
    from halo.viz.recording import Recording

    shipped = ROOT / 'checkpoints/flash_place/full'
    policy, pre, _ = load_policy(shipped)
    rec = Recording.load(shipped.parent / f'recordings/{shipped.name}.safetensors')
    model = policy.model.eval().cpu()
    c = model.cfg
    noise = torch.randn(
        1, c.chunk, c.max_action_dim, generator=torch.Generator().manual_seed(0)
    )
    ticks = range(0, len(rec.record['state']), 4)
    seen = [observation_at(policy, pre, rec.record, rec.task, k).to('cpu') for k in ticks]
    with torch.inference_mode():
        want = [model.sample(o, noise) for o in seen]
        model.cuda()
        runner = GraphStreamer(model)
        for o, w in zip(seen, want):
            o = o.to('cuda')
            assert (model.sample(o, noise.cuda()).cpu() - w).abs().max() < 1e-2 and (
                runner.sample(o, noise.cuda()).cpu() - w
            ).abs().max() < 1e-2
