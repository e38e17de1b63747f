"""Streaming: what a caller, a mask or a compiler could break; the benches that time it."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from halo.method.config import preset
from halo.method.expert import attend_few, grouped_attention
from halo.method.model import HaloModel
from halo.realtime.graph import GraphStreamer, padded_mlp
from halo.realtime.stream import Denoiser, Streamer
from halo.studies.bench import build, episode, parser

TINY = dict(sampling__history_stride=1, sampling__history_frames=8, sampling__history_hop=4)


def worst(runner, model, ticks=20):
    noise, out = torch.randn(1, model.cfg.chunk, model.cfg.max_action_dim), 0.0
    for obs in episode(model.cfg, range(ticks), size=56):
        with torch.inference_mode():
            out = max(
                out, float((runner(obs, noise) - model.sample(obs, noise)).abs().max())
            )
    return out


@pytest.mark.parametrize('how', ['stream', 'graph'])
def test_a_caller_may_reuse_its_frame_buffer(how):
    """The window is a view of one buffer that the caller overwrites at every tick: the same
    actions as with fresh tensors.
    """
    model = build(preset('tiny', **TINY), 'cpu')
    s = Streamer(model)
    side = model.cfg.sampling.history_size
    buffer = torch.zeros(1, 8, 3, side, side, dtype=torch.uint8)
    runner = (
        GraphStreamer(model).sample
        if how == 'graph'
        else lambda obs, noise: model.sample(s.encode(obs), noise)
    )

    def reusing(obs, noise):
        window = buffer[:, : obs.history.shape[1]]
        window.copy_(obs.history)
        obs.history = window
        return runner(obs, noise)

    assert worst(reusing, model, 24) < 1e-5


def test_products_are_attention():
    """Few rows as products against SDPA: no mask, a boolean one, an additive one, one row
    for all.
    """
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 5, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    see = torch.rand(2, 1, 5, 9) < 0.7
    see[..., 0] = True
    row = see[:, :, :1]
    for mask in (
        None,
        see,
        torch.zeros(see.shape).masked_fill(~see, -torch.inf),
        row,
        torch.zeros(row.shape).masked_fill(~row, -torch.inf),
    ):
        want = grouped_attention(None, q, k, v, mask)[0]
        wide = (
            None
            if mask is None
            else (
                mask.expand(-1, -1, 15, -1)
                if mask.shape[2] == 1
                else mask.repeat(1, 1, 3, 1)
            )
        )
        assert torch.allclose(
            attend_few(q.reshape(2, 2, 15, 16), k, v, wide, 0.25)
            .view(2, 6, 5, 16)
            .transpose(1, 2),
            want,
            atol=1e-5,
        )
        assert torch.allclose(
            F.scaled_dot_product_attention(
                q, *(x.repeat_interleave(3, 1) for x in (k, v)), attn_mask=mask
            ).transpose(1, 2),
            want,
            atol=1e-5,
        )


def test_denoising_behind_padding_ignores_the_room_behind_it():
    "A masked denoiser's keys are padded to a multiple of 8; what stands there is nobody's."
    model = build(preset('tiny', **TINY), 'cpu')
    obs = next(episode(model.cfg, range(9, 10), size=56))
    noise = torch.randn(1, model.cfg.chunk, model.cfg.max_action_dim)
    with torch.inference_mode():
        prefix = model.encode(obs)
        masked, plain = (
            Denoiser(model, prefix, whole=False),
            Denoiser(model, prefix, whole=True),
        )
        assert (
            all(b.k.shape[2] % 8 == 0 for b in masked.buffers)
            and (model.integrate(masked, noise) - model.integrate(plain, noise)).abs().max()
            < 1e-5
        )
        end = masked.buffers[0].at + model.cfg.chunk
        for b in masked.buffers:
            b.k[:, :, end:], b.v[:, :, end:] = 1e3, 1e3
        assert (
            masked.buffers[0].k.shape[2] > end
            and (model.integrate(masked, noise) - model.integrate(plain, noise)).abs().max()
            < 1e-5
        )


def test_padded_vision_mlps_change_nothing_and_stay_in_the_program():
    model = build(preset('tiny', **TINY, vision__mlp=300), 'cpu')
    runner = GraphStreamer(model)
    mlps = [b.mlp for b in model.embed.visual.blocks]
    runner.mlps = {k: padded_mlp(m) for k, m in enumerate(mlps)}
    assert (
        worst(runner.sample, model) < 1e-5
        and [b.mlp for b in model.embed.visual.blocks] == mlps
        and all(m.gate_proj.out_features == 300 for m in mlps)
    )


def test_padded_mlps_follow_the_weights():
    """Weights that changed in place (training goes on, a checkpoint is loaded) are used
    from the next episode on, in the same memory.
    """
    model = build(preset('tiny', **TINY, vision__mlp=300), 'cpu')
    runner = GraphStreamer(model)
    blocks = model.embed.visual.blocks
    with torch.inference_mode():
        runner.mlps = {k: padded_mlp(b.mlp) for k, b in enumerate(blocks)}
    at = [p.data_ptr() for m in runner.mlps.values() for p in m.parameters()]
    with torch.no_grad():
        for p in blocks.parameters():
            p.add_(0.05 * torch.randn_like(p))
    assert worst(runner.sample, model, 2) > 1e-3
    runner.reset()
    assert worst(runner.sample, model) < 1e-5 and at == [
        p.data_ptr() for m in runner.mlps.values() for p in m.parameters()
    ]


@pytest.mark.slow
def test_compiled_layers_give_the_same_actions():
    """torch.compile on a CPU: vision, VLM and expert layers, one compilation for all of a
    kind.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(preset('tiny', **TINY), 'cpu')
    runner = GraphStreamer(model, compiled=True)
    assert worst(runner.sample, model, 14) < 1e-4 and torch._dynamo.utils.counters['stats'][
        'unique_graphs'
    ] <= 3 * len(runner.programs)


def test_the_listed_benches_are_what_the_notebook_reads():
    """Every command of scripts/bench_gpu.py and scripts/bench_cpu.sh is one that `halo
    bench` takes, and the kept files hold nothing that they would not write.
    """
    root = Path(__file__).resolve().parent.parent
    sys.path.insert(0, str(root / 'scripts'))
    import bench_gpu

    written = dict(
        cpu=re.findall(r'^bench (.+)$', (root / 'scripts/bench_cpu.sh').read_text(), re.M),
        h200=bench_gpu.RUNS.values(),
    )
    for file, lines in written.items():
        args = [parser().parse_args(shlex.split(line)) for line in lines]
        assert set(json.loads((root / f'bench/{file}.json').read_text())) <= {
            a.name or a.what for a in args
        }, file


def test_a_policy_that_gets_ahead_plans_the_same():
    "Chunks are equal with the past encoded between decisions, and less is left for them."
    from halo.data.files import shipped
    from halo.sim.evaluate import load_policy

    policy, pre, _ = load_policy(shipped('checkpoints/flash_place/full'))
    g = torch.Generator().manual_seed(0)

    def seen():
        picture = lambda side: torch.rand(1, 3, side, side, generator=g)
        names = {k: picture(112) for k in ('primary', 'wrist')}
        seen = {f'observation.images.{k}': v for k, v in names.items()}
        state = torch.randn(1, 4, generator=g) * 0.1
        return seen | {'observation.state': state, 'task': ['put the puck on the red pad']}

    batches, noise = [seen() for _ in range(20)], torch.randn(1, 16, 8, generator=g)

    def play(ahead):
        policy.reset()
        chunks, early = [], 0
        for tick, batch in enumerate(batches):
            batch = pre(dict(batch))
            if tick % 4 == 0:
                chunks.append(policy.predict_action_chunk(batch, noise, tick=tick))
            else:
                policy.observe(batch, tick)
            if ahead:
                early += policy.prefill(tick + 4 - tick % 4)
        return torch.cat(chunks), policy._streamer.stats, early

    plain, ahead = play(False), play(True)
    assert torch.allclose(plain[0], ahead[0], atol=1e-5) and ahead[2] > 0
    assert ahead[1]['ahead'] == ahead[2]
    assert ahead[1]['computed'] < plain[1]['computed']
    policy.reset()
    assert policy.prefill(4) == 0  # nothing was seen
    for streams in (False, True):
        policy.reset()
        for tick in range(7):
            policy.observe(pre(dict(batches[tick])), tick)
        policy.config.stream = streams
        assert (policy.prefill(12) > 0) == streams


def test_positions_that_depend_on_the_whole_row_are_not_streamed():
    cfg = preset('tiny', sampling__positions='installed').without_weights()
    with pytest.raises(ValueError, match="positions='installed'"):
        Streamer(HaloModel(cfg))


def test_the_loop_gets_ahead_while_it_waits():
    "Frames that come too early for an inference are kept and encoded for the next one."
    from halo.deploy.control import ControlLoop

    told = []

    class Policy:
        config = None

        def observe(self, batch, tick):
            told.append(('observe', tick))

        def prefill(self, tick):
            told.append(('prefill', tick))
            return 1

        def predict_action_chunk(self, batch, noise, tick):
            told.append(('infer', tick))
            return torch.zeros(1, 8, 2)

    loop = ControlLoop(
        Policy(), lambda x: x, dict, lambda a: None, fps=10, late='repeat', every=4
    )
    last = -loop.every
    for tick in range(6):
        loop.waiting.append((tick, {}))
        loop.news.set()
        seen, due = loop.waiting_since(last)
        assert due == (tick in (0, 4)) and not loop.waiting
        last = loop.infer_on(seen) if due else loop.get_ahead(seen, last) or last
    want = [('infer', 0)]
    for tick in (1, 2, 3):
        want += [('observe', tick), ('prefill', 4)]
    assert told == [*want, ('infer', 4), ('observe', 5), ('prefill', 8)]
    assert len(loop.budget.ms['ahead']) == 4 and len(loop.budget.ms['inference']) == 2
