"""Training at scale, each proof a command that prints its figures: python
tests/test_scale.py [--json FILE] all, or any of hsdp kill parts memory fsdp1 cli compiled
mixture_run lerobot_fsdp offload slurm.
"""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

if __name__ == '__main__':
    os.environ['OMP_NUM_THREADS'] = '1'
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from halo.method.config import preset
from halo.train.loop import make_policy, preprocess
from halo.train.scale import (
    OneDataset,
    ScaleConfig,
    allocator_peak,
    checkpoints,
    dry_run,
    flow_draws,
    launch_shape,
    main,
    make_optimizer,
    part_of,
    prepare_parts,
    read_config,
    read_rows,
    scale_step,
    scale_train,
    set_checkpointing,
)

ROOT = Path(__file__).resolve().parent.parent
LITTLE = dict(
    model=preset(
        'tiny',
        chunk=6,
        sampling__history_frames=2,
        sampling__history_stride=2,
        sampling__history_size=28,
        sampling__view_size=56,
        sampling__wrist_size=28,
    ),
    n_action_steps=4,
)
TINY = dict(preset='tiny')
ALL = (
    'hsdp',
    'kill',
    'parts',
    'memory',
    'fsdp1',
    'cli',
    'compiled',
    'mixture_run',
    'lerobot_fsdp',
    'offload',
    'slurm',
)


def record(folder, lengths=(40, 44, 38)):
    "A small LeRobot dataset of two cameras."
    import datasets
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    datasets.disable_progress_bars()
    shapes = {'observation.images.top': (56, 56), 'observation.images.wrist_cam': (28, 28)}
    feats = {
        k: dict(dtype='image', shape=(*s, 3), names=['height', 'width', 'channels'])
        for k, s in shapes.items()
    }
    feats |= {
        'observation.state': dict(dtype='float32', shape=(3,), names=None),
        'action': dict(dtype='float32', shape=(2,), names=None),
    }
    ds, rng = (
        LeRobotDataset.create('halo/scale', 10, feats, folder, use_videos=False),
        np.random.default_rng(0),
    )
    for e, length in enumerate(lengths):
        for t in range(length):
            frame = {
                k: rng.integers(0, 256, (*s, 3)).astype(np.uint8) for k, s in shapes.items()
            }
            ds.add_frame(
                frame
                | {
                    'observation.state': rng.standard_normal(3).astype(np.float32),
                    'action': np.float32([np.sin(t / 3), e]),
                    'task': f'task {e}',
                }
            )
        ds.save_episode()
    ds.finalize()
    return LeRobotDataset('halo/scale', folder)


def fresh(dataset, kw=LITTLE, meta=False):
    torch.manual_seed(0)
    return make_policy(dataset, meta, **kw)


def losses(out):
    return [r['loss'] for r in read_rows(out / 'metrics.jsonl')]


def work(rank, world, dataset, kw, out, rc, until, store):
    "One process of a run."
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, 'w')
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    if world > 1:
        dist.init_process_group(
            'gloo', store=dist.FileStore(store, world), rank=rank, world_size=world
        )
    policy, pre, post = fresh(dataset, kw, meta=rank > 0)
    scale_train(
        policy,
        pre,
        post,
        OneDataset(dataset, policy, dataset.root.parent / 'store'),
        out,
        rc,
        until,
        'cpu',
    )
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def start(world, dataset, kw, out, rc, until=None):
    "Processes of a run, forked (imports are done)."
    store, ctx = tempfile.mktemp(), mp.get_context('fork')
    procs = [
        ctx.Process(target=work, args=(r, world, dataset, kw, Path(out), rc, until, store))
        for r in range(world)
    ]
    for p in procs:
        p.start()
    return procs


def run(*args, **kw):
    for p in (procs := start(*args, **kw)):
        p.join()
    assert all(p.exitcode == 0 for p in procs), [p.exitcode for p in procs]


def data_in(root):
    dataset = record(root / 'data')
    OneDataset(dataset, fresh(dataset)[0], root / 'store')
    return dataset


# --- the proofs ---


def hsdp(root, kw=TINY, steps=30, bar=1e-4):
    """Four gloo processes on a 2 × 2 mesh against one process, and checkpoints carried
    across both ways.
    """
    dataset = record(root / 'data')
    OneDataset(dataset, fresh(dataset, kw)[0], root / 'store')
    one = ScaleConfig(
        steps=steps, micro=8, lr=3e-4, warmup=5, log_every=1, save_every=1000, ema=0.99
    )
    four = ScaleConfig(**(vars(one) | dict(micro=1, accumulate=2, replicate=2, shard=2)))
    half = steps // 2
    for name, parts in dict(
        one=[(1, one, None)],
        four=[(4, four, None)],
        four_then_one=[(4, four, half), (1, one, None)],
        one_then_four=[(1, one, half), (4, four, None)],
    ).items():
        for world, rc, until in parts:
            run(world, dataset, kw, root / name, rc, until)
    ref = losses(root / 'one')
    gap = {
        n: max(abs(a - b) for a, b in zip(ref, losses(root / n), strict=True))
        for n in ('four', 'four_then_one', 'one_then_four')
    }
    print(
        f'hsdp: {steps} steps, loss {ref[0]:.4f} -> {ref[-1]:.4f}; largest difference from'
        ' one process: ' + ', '.join(f'{n} {g:.1e}' for n, g in gap.items())
    )
    from safetensors.torch import load_file

    a, b = (load_file(str(root / n / 'policy/model.safetensors')) for n in ('one', 'four'))
    parts = checkpoints(root / 'four/checkpoints')[0].glob('shard*')
    print(
        'hsdp: final weights differ by at most'
        f' {max(float((a[k] - b[k]).abs().max()) for k in a):.1e}; files of four processes:'
        f' {sorted(f.name for f in parts)}'
    )
    assert a.keys() == b.keys() and max(gap.values()) < bar


def kill(root, kills=20, steps=120, seed=0):
    "SIGKILL at random moments, half of them while a checkpoint is being written."
    dataset, rng = data_in(root), random.Random(seed)
    rc = ScaleConfig(
        steps=steps,
        micro=2,
        accumulate=2,
        lr=1e-3,
        warmup=5,
        log_every=1,
        save_every=2,
        ema=0.9,
    )
    run(1, dataset, LITTLE, root / 'whole', rc)
    n, saving, out = 0, 0, root / 'killed'

    def begun(t0):
        try:
            return [
                f for f in (out / 'checkpoints').glob('*.tmp') if f.stat().st_mtime > t0
            ]
        except FileNotFoundError:
            return []

    def saved(t0):
        try:
            return [f for f in checkpoints(out / 'checkpoints') if f.stat().st_mtime > t0]
        except FileNotFoundError:
            return []

    while n < kills:
        t0 = time.time()
        (p,) = start(1, dataset, LITTLE, out, rc)
        # half of them get as far as a checkpoint of their own, however slow the machine
        if n % 4 > 1:
            while p.is_alive() and not saved(t0):
                time.sleep(0.001)
            t0 = time.time()
        if n % 2:  # wait for a save to begin, then a random part of it
            while p.is_alive() and not begun(t0):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.08))
        else:
            p.join(rng.uniform(0, 0.2) if n % 4 > 1 else rng.uniform(0.1, 2.5))
        if not p.is_alive():
            break
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        n += 1
        saving += bool(begun(t0))
    run(1, dataset, LITTLE, out, rc)
    a, b = losses(root / 'whole'), losses(out)
    starts = [
        r['step'] for r in read_rows(out / 'events.jsonl') if r['event'].startswith('start')
    ]
    print(
        f'kill: {n} kills, {saving} of them left a half-written checkpoint; starts at steps'
        f' {starts}; final loss {b[-1]!r} against {a[-1]!r} uninterrupted;'
        f' {sum(x != y for x, y in zip(a, b))} of {len(a)} losses differ'
    )
    assert n >= kills and saving and a == b and len(set(starts)) > 5


def little_small(depth, checkpointing):
    """`small` with `depth` layers, a full observation, and a step's forward and backward
    pass with gradients allocated before.
    """
    from halo.method.model import HaloModel
    from halo.method.vlm import Observation

    cfg = preset('small', text__layers=depth, checkpointing=checkpointing)
    torch.manual_seed(0)
    m = HaloModel(cfg).train()
    s = cfg.sampling
    if checkpointing:
        m.embed.visual.gradient_checkpointing_enable(dict(use_reentrant=False))
    obs = Observation(
        torch.randint(
            0,
            256,
            (1, s.history_frames, 3, s.history_size, s.history_size),
            dtype=torch.uint8,
        ),
        torch.ones(1, s.history_frames, dtype=torch.bool),
        [torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)],
        torch.ones(1, 1, dtype=torch.bool),
        torch.full((1, 8), 100),
        torch.ones(1, 8, dtype=torch.bool),
        torch.randn(1, cfg.max_state_dim),
    )
    actions = torch.randn(1, cfg.chunk, cfg.max_action_dim)
    for p in m.parameters():
        p.grad = torch.zeros_like(p)
    kept = {}
    # torch keeps the generator's state too
    m.blocks[0].register_forward_pre_hook(
        lambda mod, a: kept.update(
            bytes=sum(x.nbytes for x in (a[0], a[2])) + torch.get_rng_state().nbytes
        )
    )
    return (lambda: m.loss(obs, actions).backward()), kept


def memory():
    """Peak bytes that the CPU allocator hands out during one forward and backward pass;
    weights, gradients and inputs exist before and are not counted.
    """
    peak = {}
    for on, depths in ((False, (4, 8, 12)), (True, (4, 8, 12, 52, 60, 68))):
        for d in depths:
            step, kept = little_small(d, on)
            step()
            peak[on, d] = allocator_peak(step)
            del step
        print(
            f"memory: {'with' if on else 'without'} checkpointing: "
            + ', '.join(f'{d} layers {peak[on, d] / 1e6:.3f} MB' for d in depths),
            flush=True,
        )
    slope, ratio = (peak[True, 68] - peak[True, 60]) / 8, peak[False, 8] / peak[True, 8]
    print(
        f"memory: predicted {kept['bytes'] / 1e6:.3f} MB per layer (what enters a block,"
        f" and the generator's state), measured {slope / 1e6:.3f} from 60 to 68 layers (few"
        " layers: one block of the vision tower is the peak); small (8 layers):"
        f" {ratio:.2f} times less"
    )
    assert abs(slope / kept['bytes'] - 1) < 0.01 and ratio >= 2.5


def parts(root, steps=3):
    "Exactly the declared parameters change."
    dataset = record(root / 'data', (12, 14))
    cases = dict(
        all=ScaleConfig(),
        expert_salr=ScaleConfig(freeze=('vision', 'embedding', 'vlm')),
        tower_frozen=ScaleConfig(freeze=('vision',)),
        vlm_only=ScaleConfig(freeze=('vision', 'embedding', 'expert', 'salr')),
    )
    import importlib.util

    if importlib.util.find_spec('peft'):
        cases |= dict(
            lora_vlm=ScaleConfig(freeze=('vision', 'embedding'), lora_rank=4),
            lora_all=ScaleConfig(
                freeze=('embedding',), lora_rank=2, lora_parts=('vision', 'vlm', 'expert')
            ),
        )
    for name, rc in cases.items():
        policy, pre, _ = fresh(dataset)
        counts = prepare_parts(policy, rc)
        policy.train()
        data = OneDataset(dataset, policy, root / 'store')
        before, optimizer = (
            {n: p.detach().clone() for n, p in policy.named_parameters()},
            make_optimizer(policy, rc),
        )
        for g in optimizer.param_groups:
            g['lr'] = 1e-2
        for k in range(steps):
            scale_step(
                policy,
                [preprocess(pre, data.batch([3 * k, 3 * k + 1]))],
                [flow_draws(policy.config.model, 0, k, range(2))],
                optimizer,
                1.0,
            )
        moved = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
        declared = {
            n
            for n, p in policy.named_parameters()
            if (
                '.lora_' in n
                if rc.lora_rank and part_of(n) in rc.lora_parts
                else part_of(n) not in rc.freeze
            )
        }
        numbers = sum(before[n].numel() for n in declared)
        print(
            f"parts: {name:13s} declared {len(declared):3d} tensors, {numbers:8d} numbers;"
            f" changed {len(moved):3d} tensors, {sum(before[n].numel() for n in moved):8d}"
            f" numbers; by part { ({k: v[0] for k, v in counts.items() if v[0]}) }"
        )
        assert moved == declared and sum(a for a, _ in counts.values()) == numbers


def fsdp1_work(rank, world, root, batch, noise, t, store, q):
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', store=dist.FileStore(store, world), rank=rank, world_size=world
    )
    policy, *_ = fresh(root)
    policy.train()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=1,
        auto_wrap_policy='transformer_based_wrap',
        transformer_cls_names_to_wrap=policy._fsdp_wrap_modules,
    )
    plugin.set_auto_wrap_policy(policy)
    wrapped = FSDP(
        policy,
        auto_wrap_policy=plugin.auto_wrap_policy,
        use_orig_params=True,
        device_id=torch.device('cpu'),
    )
    o = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    out = []
    for _ in range(3):
        loss, _ = wrapped(batch, noise=noise.clone(), time=t)
        loss.backward()
        o.step()
        o.zero_grad()
        out.append(float(loss.detach()))
    if rank == 0:
        q.put((out, sum(isinstance(m, FSDP) for m in wrapped.modules())))
    dist.barrier()
    dist.destroy_process_group()


def fsdp1(root):
    "LeRobot's way: FSDP1 with the classes that the policy names, against one process."
    dataset = record(root / 'data', (12, 14))
    policy, pre, _ = fresh(dataset)
    policy.train()
    batch = preprocess(pre, OneDataset(dataset, policy, root / 'store').batch(range(4)))
    noise, t = flow_draws(policy.config.model, 0, 0, range(4))
    o, ref = torch.optim.AdamW(policy.parameters(), lr=1e-3), []
    for _ in range(3):
        loss, _ = policy(batch, noise=noise.clone(), time=t)
        loss.backward()
        o.step()
        o.zero_grad()
        ref.append(float(loss.detach()))
    ctx, store = mp.get_context('fork'), tempfile.mktemp()
    q = ctx.Queue()
    procs = [
        ctx.Process(target=fsdp1_work, args=(r, 2, dataset, batch, noise, t, store, q))
        for r in range(2)
    ]
    for p in procs:
        p.start()
    out, units = q.get(timeout=120)
    for p in procs:
        p.join()
    want = 1 + len(policy.model.blocks) + len(policy.model.embed.visual.blocks)
    print(
        f'fsdp1: {units} units (root, {len(policy.model.blocks)} blocks,'
        f' {len(policy.model.embed.visual.blocks)} vision blocks); losses {out} against'
        f' {ref}'
    )
    assert units == want and np.allclose(out, ref, atol=1e-4)


def torchrun(n, file, *args):
    return [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc-per-node',
        str(n),
        '-m',
        'halo.train.scale',
        str(file),
        '--device',
        'cpu',
        *args,
    ]


def quiet(cmd, **kw):
    "Run a command without its output; on failure that is the error."
    done = subprocess.run(
        [str(c) for c in cmd], capture_output=True, text=True, cwd=ROOT, **kw
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def kill_at(cmd, metrics, rows):
    """SIGKILL for a command and its children once `metrics` has `rows` rows; returns how
    many it has in the end.
    """
    p = subprocess.Popen(
        cmd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=ROOT,
    )
    while len(read_rows(metrics)) < rows and p.poll() is None:
        time.sleep(0.02)
    assert p.poll() is None, 'it ended before it could be killed'
    # each in a session of its own
    workers = [
        int(x) for x in Path(f'/proc/{p.pid}/task/{p.pid}/children').read_text().split()
    ]
    for pid in (p.pid, *workers):
        os.kill(pid, signal.SIGKILL)
    p.wait()
    time.sleep(1)
    return len(read_rows(metrics))


def cli(root):
    "The command: dry run, torchrun of two processes killed and resumed, export on one."
    import yaml

    record(root / 'data', (20, 24))
    conf = dict(
        data=dict(root=str(root / 'data'), repo_id='halo/scale', store=str(root / 'store')),
        policy=dict(
            preset='tiny',
            history_frames=2,
            history_stride=2,
            chunk_size=6,
            n_action_steps=4,
        ),
        batch=8,
        out=str(root / 'run'),
        run=dict(
            steps=30,
            micro=2,
            accumulate=2,
            replicate=1,
            shard=2,
            lr='1e-3',
            warmup=2,
            log_every=1,
            save_every=1,
        ),
    )
    (root / 'run.yaml').write_text(yaml.safe_dump(conf))
    assert (
        main([str(root / 'run.yaml'), '--dry-run', '--processes', '2']) == 0
        and main([str(root / 'run.yaml'), '--dry-run', '--processes', '3']) == 1
    )
    cmd = torchrun(2, root / 'run.yaml')
    at = kill_at(cmd, root / 'run/metrics.jsonl', 5)
    quiet(cmd)
    steps = [r['step'] for r in read_rows(root / 'run/metrics.jsonl')]
    print(
        'cli: killed at step',
        at,
        'of 30;',
        [r['event'].split(':')[0] for r in read_rows(root / 'run/events.jsonl')],
        f'; rows {steps[0]} to {steps[-1]}, {len(steps)} of them',
    )
    assert steps == list(range(1, 31))
    assert (
        main([str(root / 'run.yaml'), '--export', str(root / 'out'), '--device', 'cpu'])
        == 0
    )
    from safetensors.torch import load_file

    a, b = (
        load_file(str(root / 'out/model.safetensors')),
        load_file(str(root / 'run/policy/model.safetensors')),
    )
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    print('cli: exported on one process: equal to what two wrote')


ROBOTS = """
datasets:
  - id: slow
    weight: 0.5
    cameras: {primary: observation.images.image_0}
    action_space: {frame: ee, control: delta, rotation: euler, gripper: open_high}
  - id: mid
    weight: 0.3
    cameras: {primary: observation.images.image, wrist: observation.images.eye}
    action_space: {frame: joint}
    action_norm: mean_std
  - id: quick
    weight: 0.2
    cameras:
      primary: observation.images.head
      secondary: observation.images.side
      wrist: observation.images.hand
    action_space: {frame: joint}
    action_norm: min_max
balance: none
"""


def record_robots(root):
    """Three datasets: 5, 10 and 30 fps; one, two and three cameras; states of 5, 8 and 6
    numbers, actions of 7, 6 and 8.
    """
    from halo.data.mixture import RGBEncoderConfig, record_clock

    fast, cam, rng = (
        RGBEncoderConfig(vcodec='h264', preset='ultrafast'),
        'observation.images.',
        np.random.default_rng(0),
    )
    arm = np.concatenate(
        [0.02 * rng.standard_normal((45, 6)), rng.choice([0, 1], (45, 1))], 1
    )
    record_clock(
        root / 'slow',
        5,
        (5, 4),
        {cam + 'image_0': (60, 80)},
        5,
        arm,
        'put it down',
        1,
        fast,
    )
    record_clock(
        root / 'mid',
        10,
        (4, 3.5),
        {cam + 'image': (64, 64), cam + 'eye': (32, 32)},
        8,
        6,
        'open it',
        2,
        fast,
    )
    record_clock(
        root / 'quick',
        30,
        (2, 1.5),
        {cam + 'head': (48, 80), cam + 'side': (60, 60), cam + 'hand': (32, 32)},
        6,
        8,
        'fold it',
        3,
        fast,
    )


def shrunk(file, root, **run):
    "A shipped run file, its sizes made small: everything else is as it says."
    import importlib.util

    import yaml

    c = yaml.safe_load((ROOT / 'configs/launch' / file).read_text())
    c |= dict(
        policy=dict(
            preset='tiny',
            history_frames=3,
            history_stride=2,
            chunk_size=6,
            n_action_steps=4,
        ),
        out=str(root / 'run'),
        batch=8,
    )
    c['run'] |= dict(micro=1, accumulate=2, warmup=3, log_every=1) | run
    if not importlib.util.find_spec('tensorboard'):
        c['run']['loggers'] = []
    return c


def chunks_for(folder, data):
    """What a policy folder, opened as LeRobot opens it, predicts for a frame of each
    dataset: {name: (b, s, d)} in the mixture's numbers, and in the robot's own.
    """
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    from halo.data.mixture import robot_policy

    policy = get_policy_class('halo').from_pretrained(folder).eval()
    pre, post = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    out = {}
    for k, m in enumerate(data.members):
        batch = preprocess(
            pre, {n: v for n, v in data.batch([(k, 20, 0)]).items() if n != 'dataset_index'}
        )
        policy.reset()
        common = policy.predict_action_chunk(
            {n: v for n, v in batch.items() if n != 'action'}
        )
        robot, rpre, rpost = robot_policy(policy, m, data.slots, n_action_steps=4)
        raw = {
            c: torch.rand(3, *m.meta.features[c]['shape'][:2])
            for c in m.spec.cameras.values()
        } | {'observation.state': torch.from_numpy(m.state[20]), 'task': m.tasks[0]}
        out[m.spec.name] = common, rpost(robot.predict_action_chunk(rpre(raw)))
    return out


def mixture_run(root, steps=18):
    """configs/launch/pretrain.yaml with small sizes on a mixture of three unlike datasets,
    four processes on a 2 × 2 mesh, killed once; its policy is opened, and fine-tuned on one
    robot.
    """
    import yaml
    from safetensors.torch import load_file

    from halo.data.mixture import Mixture, MixtureDataset

    record_robots(root)
    (root / 'robots.yaml').write_text(ROBOTS)
    c = shrunk(
        'pretrain.yaml', root, steps=steps, replicate=2, shard=2, save_every=3
    ) | dict(
        data=dict(
            mixture=str(root / 'robots.yaml'), root=str(root), store=str(root / 'frames')
        )
    )
    (root / 'whole.yaml').write_text(yaml.safe_dump(c | dict(out=str(root / 'whole'))))
    (root / 'run.yaml').write_text(yaml.safe_dump(c))
    (root / 'launch.yaml').write_text(
        (ROOT / 'configs/launch/accelerate_1gpu.yaml')
        .read_text()
        .replace('num_processes: 1', 'num_processes: 4')
    )
    said = quiet(
        [
            sys.executable,
            '-m',
            'halo.train.scale',
            root / 'run.yaml',
            '--dry-run',
            '--launch',
            root / 'launch.yaml',
        ]
    )
    print(
        'mixture_run: dry run: '
        + '; '.join(' '.join(l.split()) for l in said.splitlines()).replace(str(root), '…')
    )
    assert not (root / 'frames').exists(), 'a dry run built a frame store'
    cmd = torchrun(4, root / 'run.yaml')
    at = kill_at(cmd, root / 'run/metrics.jsonl', steps // 2)
    quiet(cmd)
    quiet(torchrun(4, root / 'whole.yaml'))
    a, b = (read_rows(root / n / 'metrics.jsonl') for n in ('run', 'whole'))
    starts = [
        r['step']
        for r in read_rows(root / 'run/events.jsonl')
        if r['event'].startswith('start')
    ]
    seen = {
        n: [r['loss_dataset'][n] for r in a if n in r['loss_dataset']]
        for n in ('slow', 'mid', 'quick')
    }
    losses = lambda row: (row['loss'], row['loss_dataset'])
    differ = sum(losses(x) != losses(y) for x, y in zip(a, b))
    print(
        f"mixture_run: {c['run']['dtype']}, {c['run']['replicate']} copies ×"
        f" {c['run']['shard']} shards; killed at step {at}, starts at steps {starts}; loss"
        f" {a[0]['loss']:.4f} -> {a[-1]['loss']:.4f};"
        f" {differ} of {len(a)} rows differ from a run that was not killed"
    )
    print(
        'mixture_run: loss of each dataset (rows, mean of the first and last 5): '
        + ', '.join(
            f'{n} ({len(v)}, {np.mean(v[:5]):.3f} -> {np.mean(v[-5:]):.3f})'
            for n, v in seen.items()
        )
    )
    assert (
        len(a) == len(b) == steps
        and starts[1] > 0
        and [r['loss'] for r in a] == [r['loss'] for r in b]
        and [r['loss_dataset'] for r in a] == [r['loss_dataset'] for r in b]
        and all(len(v) > steps / 2 for v in seen.values())
    )
    wa, wb = (
        load_file(str(root / n / 'policy/model.safetensors')) for n in ('run', 'whole')
    )
    assert all(torch.equal(wa[k], wb[k]) for k in wb)
    data = MixtureDataset(
        Mixture.load(root / 'robots.yaml'),
        preset_of(root / 'run/policy'),
        root,
        root / 'frames',
        progress=False,
    )
    got = chunks_for(root / 'run/policy', data)
    print(
        'mixture_run: chunks of the policy folder: '
        + ', '.join(
            f"{n} {tuple(x.shape)}, the robot's {tuple(y.shape)}"
            for n, (x, y) in got.items()
        )
    )
    assert all(
        torch.isfinite(x).all() and torch.isfinite(y).all() for x, y in got.values()
    ) and [y.shape[-1] for _, y in got.values()] == [7, 6, 8]
    finetunes(root, wa)


def preset_of(folder):
    from halo.policy.modeling_halo import HaloPolicy

    return HaloPolicy.from_pretrained(folder).config.model


def finetunes(root, before, steps=6):
    """From the mixture's policy: adapters on one robot (finetune_1gpu.yaml), and the expert
    alone on the mixture; what is frozen must be the mixture's, number by number.
    """
    import yaml
    from safetensors.torch import load_file

    one = shrunk(
        'finetune_1gpu.yaml', root, steps=steps, lora_rank=4, lora_alpha=8, save_every=5
    ) | dict(
        batch=2,
        data=dict(
            root=str(root / 'mid'), repo_id='local/mid', store=str(root / 'mid_frames')
        ),
    )
    all_ = shrunk(
        'pretrain.yaml',
        root,
        steps=steps,
        replicate=1,
        shard=1,
        freeze=['vision', 'embedding', 'vlm', 'salr'],
        ema=0.0,
    ) | dict(
        batch=2,
        data=dict(
            mixture=str(root / 'robots.yaml'), root=str(root), store=str(root / 'frames')
        ),
    )
    for name, c in dict(one=one, mixture=all_).items():
        file = root / f'finetune_{name}.yaml'
        file.write_text(
            yaml.safe_dump(
                c
                | dict(
                    init_from=str(root / 'run/policy'), out=str(root / f'finetuned_{name}')
                )
            )
        )
        bad = lambda *sets: [
            (n, text) for n, ok, text in dry_run(file, sets, processes=1) if not ok
        ]
        assert (
            not bad()
            and 'neither a policy folder' in bad('init_from=nowhere/at/all')[0][1]
            and 'belongs to another model' in bad('policy.preset=small')[0][1]
        )
        quiet([sys.executable, '-m', 'halo.train.scale', file, '--device', 'cpu'])
        after, rows = (
            load_file(str(root / f'finetuned_{name}/policy/model.safetensors')),
            read_rows(root / f'finetuned_{name}/metrics.jsonl'),
        )
        moved = {
            p: [not torch.equal(after[k], before[k]) for k in before if part_of(k) == p]
            for p in ('vision', 'embedding', 'vlm', 'expert', 'salr')
        }
        print(
            f"mixture_run: fine-tuned on {name}: loss {rows[0]['loss']:.4f} ->"
            f" {rows[-1]['loss']:.4f}; tensors that differ from the mixture's policy: "
            + ', '.join(f'{p} {sum(v)} of {len(v)}' for p, v in moved.items())
        )
        assert (
            after.keys() == before.keys()
            and not any(any(moved[p]) for p in set(c['run']['freeze']))
            and any(moved['expert'])
        )
    assert preset_of(root / 'finetuned_one/policy').chunk == 6


def placed(rank, world, dataset, rc, store, q):
    "Losses, norms and where things lie, of a few steps of one process."
    from torch.distributed.tensor import DTensor

    from halo.train.scale import EMA, live_tensors, local, spread_model

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    if world > 1:
        dist.init_process_group(
            'gloo', store=dist.FileStore(store, world), rank=rank, world_size=world
        )
    policy, pre, _ = fresh(dataset, meta=rank > 0)
    prepare_parts(policy, rc)
    torch.manual_seed(0)
    spread_model(policy.model, rc, rank, world, torch.device('cpu'))
    policy.train()
    o, data, out = (
        make_optimizer(policy, rc),
        OneDataset(dataset, policy, dataset.root.parent / 'store'),
        [],
    )
    for k in range(4):
        loss, norm = scale_step(
            policy,
            [
                preprocess(
                    pre,
                    data.batch(
                        range(k * 8 + rank * 8 // world, k * 8 + (rank + 1) * 8 // world)
                    ),
                )
            ],
            [
                flow_draws(
                    policy.config.model,
                    0,
                    k,
                    range(rank * 8 // world, (rank + 1) * 8 // world),
                )
            ],
            o,
            1.0,
        )
        out.append((float(loss), float(norm)))
    if rank == 0:
        q.put(
            (
                out,
                {
                    (
                        type(p).__name__ if not isinstance(p, DTensor) else 'DTensor',
                        str(local(p).device),
                    )
                    for p in policy.parameters()
                },
                {
                    str(local(v).device)
                    for v in live_tensors(policy.model, o, EMA(policy.model, 0.9)).values()
                },
            )
        )
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def offload(root):
    """run.offload: weights, moments and averages in host memory.

    On a CPU the arithmetic must not change by a bit: one and two processes, everything
    trained, and the one-card recipe.
    """
    dataset = data_in(root)
    recipes = dict(
        all=ScaleConfig(lr=1e-3),
        bf16=ScaleConfig(lr=1e-3, dtype='bfloat16'),
        card=ScaleConfig(
            lr=1e-3, dtype='bfloat16', freeze=('vision', 'embedding'), lora_rank=4
        ),
    )
    ctx = mp.get_context('fork')
    for name, rc in recipes.items():
        for world in (1, 2):
            got = {}
            for on in (False, True):
                store, q = tempfile.mktemp(), ctx.Queue()
                procs = [
                    ctx.Process(
                        target=placed,
                        args=(r, world, dataset, replace(rc, offload=on), store, q),
                    )
                    for r in range(world)
                ]
                for p in procs:
                    p.start()
                while q.empty() and all(p.exitcode in (None, 0) for p in procs):
                    time.sleep(0.1)
                got[on] = q.get(timeout=5)
                for p in procs:
                    p.join()
                assert all(p.exitcode == 0 for p in procs)
            print(
                f"offload: {name}, {world} process{'es' * (world > 1)}: losses and norms"
                f" {[tuple(round(x, 4) for x in r) for r in got[True][0]]},"
                f" {sum(a != b for a, b in zip(got[False][0], got[True][0]))} of"
                f" {len(got[True][0])} differ from those without; parameters"
                f" {sorted(got[True][1])}, state on {sorted(got[True][2])}",
                flush=True,
            )
            assert (
                got[False][0] == got[True][0]
                and got[True][1] == {('DTensor', 'cpu')}
                and got[True][2] == {'cpu'}
            )


ON_CPU = """
# lerobot-train whose losses are noted. accelerate leaves FSDP to accelerators
# (AcceleratorState never makes FSDP of MULTI_CPU, and names the device cpu:0, which FSDP1
# calls another one than cpu): three assignments lift that.
# torch's FSDP1 moves what it gathers for a checkpoint "to the CPU". On a CPU that copies
# nothing: weights are then read from memory that was freed (SIGSEGV), and both moments are
# views of one buffer that is filled twice; here they are copied. The rest is theirs.
# Noise depends on the sample, so that one process and two draw the same.
import json, os, sys, torch
import lerobot.scripts.lerobot_train as t
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, _optim_utils as optim
from torch.distributed.fsdp._flat_param import FlatParamHandle
from lerobot.utils.import_utils import register_third_party_plugins
from halo.policy.modeling_halo import HaloPolicy
from halo.train.scale import flow_draws
acc = Accelerator(step_scheduler_with_optimizer=False, cpu=True)
before = str(acc.distributed_type)
if os.environ.get('ACCELERATE_USE_FSDP') == 'true':
    for s in (AcceleratorState, PartialState):
        s._shared_state['distributed_type'] = DistributedType.FSDP
        s._shared_state['device'] = torch.device('cpu')
    AcceleratorState._shared_state['fsdp_plugin'] = FullyShardedDataParallelPlugin()
forward, update = HaloPolicy.forward, t.update_policy
move, unflatten = FlatParamHandle.flat_param_to, optim._unflatten_orig_param_states
def copied(self, *a, **k):
    self.flat_param.data = self.flat_param.clone()
    return move(self, *a, **k)
def owned(info, states, name, shard, save, offload):
    unflatten(info, states, name, shard, save, offload)
    for s in states.values() if save else (): s[name] = s[name].clone()
def draws(self, batch, reduction='mean', noise=None, time=None):
    drawn = flow_draws(self.config.model, 0, 0, batch['index'].flatten().tolist())
    return forward(self, batch, reduction, *drawn)
def noted(metrics, policy, *a, **k):
    out = update(metrics, policy, *a, **k)
    row = dict(loss=metrics.loss.val, norm=metrics.grad_norm.val, accelerate=before)
    row['units'] = sum(isinstance(m, FSDP) for m in policy.modules())
    with open(f"{os.environ['NOTES']}-{acc.process_index}.jsonl", 'a') as f:
        f.write(json.dumps(row) + '\\n')
    return out
HaloPolicy.forward, t.update_policy = draws, noted
FlatParamHandle.flat_param_to, optim._unflatten_orig_param_states = copied, owned
register_third_party_plugins()
t.train(accelerator=acc)
"""


def lerobot_fsdp(root, steps=6):
    """lerobot-train under accelerate launch with FSDP, two CPU processes: losses,
    checkpoint and --resume against one process; and what accelerate does with FSDP on a CPU
    by itself.
    """
    from safetensors.torch import load_file

    from halo.policy.modeling_halo import HaloPolicy

    record(root / 'data', (20, 24))
    (root / 'on_cpu.py').write_text(ON_CPU)
    (root / 'probe.py').write_text(
        'from accelerate import Accelerator; print(f"accelerate:'
        ' {Accelerator(cpu=True).distributed_type}\\n", end="", flush=True)'
    )
    shipped = (ROOT / 'configs/launch/lerobot_fsdp_8gpu.yaml').read_text()
    cpu = (
        shipped.replace('num_processes: 8', 'num_processes: 2')
        .replace('mixed_precision: bf16', "mixed_precision: 'no'")
        .replace('use_cpu: false', 'use_cpu: true')
    )
    unsynced = cpu.replace(
        'fsdp_sync_module_states: true', 'fsdp_sync_module_states: false'
    )
    for name, text in dict(
        shipped=cpu, fsdp1=unsynced, fsdp2=cpu.replace('fsdp_version: 1', 'fsdp_version: 2')
    ).items():
        (root / f'{name}.yaml').write_text(text)
    port = iter(range(29600 + os.getpid() % 300, 30000))
    launch = lambda name, *args: [
        sys.executable,
        '-m',
        'accelerate.commands.launch',
        '--main_process_port',
        next(port),
        '--config_file',
        root / f'{name}.yaml',
        *args,
    ]
    env = os.environ | dict(
        PYTHONPATH=str(ROOT),
        HF_HUB_OFFLINE='1',
        WANDB_MODE='disabled',
        OMP_NUM_THREADS='1',
        MASTER_ADDR='127.0.0.1',
    )
    for name in ('shipped', 'fsdp1', 'fsdp2'):
        done = subprocess.run(
            [str(x) for x in launch(name, root / 'probe.py')],
            capture_output=True,
            text=True,
            env=env,
            cwd=ROOT,
        )
        said = [
            l
            for l in (done.stdout + done.stderr).splitlines()
            if l.startswith(('accelerate: ', 'RuntimeError', 'ValueError'))
        ]
        print(
            f'lerobot_fsdp: {name}: {said[0] if said else done.stderr[-500:]}', flush=True
        )
    # one action, so that none is padded: LeRobot's loss is the mean over a process's
    # values, and two means of unlike counts are not one
    args = lambda out, batch: [
        '--policy.type=halo',
        '--policy.device=cpu',
        '--policy.history_frames=2',
        '--policy.history_stride=2',
        '--policy.chunk_size=1',
        '--policy.n_action_steps=1',
        '--dataset.repo_id=halo/scale',
        f'--dataset.root={root}/data',
        f'--output_dir={root}/{out}',
        f'--steps={steps}',
        f'--batch_size={batch}',
        '--num_workers=0',
        f'--save_freq={steps // 2}',
        '--log_freq=1',
        '--wandb.enable=false',
        '--seed=1',
    ]
    notes = lambda name: env | dict(NOTES=str(root / name))
    rows = lambda name, n: [read_rows(root / f'{name}-{r}.jsonl') for r in range(n)]
    mean = lambda rs: [
        float(np.mean([r['loss'] for r in step])) for step in zip(*rs, strict=True)
    ]
    quiet([sys.executable, root / 'on_cpu.py', *args('one', 4)], env=notes('one'))
    quiet(launch('fsdp1', root / 'on_cpu.py', *args('two', 2)), env=notes('two'))
    weights = lambda out, step: load_file(
        str(root / out / f'checkpoints/{step:06d}/pretrained_model/model.safetensors')
    )
    one, two, last = mean(rows('one', 1)), mean(rows('two', 2)), weights('two', steps)
    gap = max(float((weights('one', steps)[k] - v).abs().max()) for k, v in last.items())
    loaded = HaloPolicy.from_pretrained(
        root / f'two/checkpoints/{steps:06d}/pretrained_model'
    ).state_dict()
    assert (
        all(torch.equal(loaded[k], v) for k, v in last.items())
        and loaded.keys() == last.keys()
    )
    units = {r['units'] for rs in rows('two', 2) for r in rs}
    print(
        f"lerobot_fsdp: {units.pop()} units on each of two processes (accelerate alone:"
        f" {rows('two', 2)[0][0]['accelerate']}); loss {one[0]:.4f} -> {one[-1]:.4f},"
        " largest difference from one process"
        f" {max(abs(a - b) for a, b in zip(one, two)):.1e}, of the saved weights {gap:.1e};"
        " the checkpoint opens in one process",
        flush=True,
    )
    shutil.rmtree(root / f'two/checkpoints/{steps:06d}')
    quiet(
        launch(
            'fsdp1',
            root / 'on_cpu.py',
            f'--config_path={root}/two/checkpoints/{steps // 2:06d}'
            '/pretrained_model/train_config.json',
            '--resume=true',
        ),
        env=notes('again'),
    )
    again, end = mean(rows('again', 2)), weights('two', steps)
    print(
        f'lerobot_fsdp: --resume=true from step {steps // 2}: losses'
        f' {[round(x, 4) for x in again]}, largest difference from the run that was not'
        ' stopped'
        f' {max(abs(a - b) for a, b in zip(again, two[steps // 2 :], strict=True)):.1e};'
        f' {sum(not torch.equal(end[k], last[k]) for k in last)} of {len(last)} tensors'
        ' differ'
    )
    assert (
        max(abs(a - b) for a, b in zip(one, two)) < 1e-4
        and gap < 1e-3
        and max(abs(a - b) for a, b in zip(again, two[steps // 2 :])) < 1e-6
        and all(torch.allclose(end[k], last[k], atol=1e-6) for k in last)
    )
    assert not units and rows('two', 2)[0][0]['units'] == 1 + 4 + 3


def slurm(root):
    """The shipped Slurm script on a private Slurm of two virtual machines
    (scripts/slurm_check.py).
    """
    sys.path.insert(0, str(ROOT / 'scripts'))
    from slurm_check import check, missing

    if why := missing():
        raise RuntimeError(why)
    check(root)


def compiled(root):
    "torch.compile on every block: the same losses; seconds per step."
    dataset, out = record(root / 'data', (24, 26)), {}
    for on in (False, True):
        policy, pre, _ = fresh(dataset, TINY)
        policy.train()
        rc = ScaleConfig(compile=on)
        prepare_parts(policy, rc)
        set_checkpointing(policy, False)
        if on:
            [b.compile() for b in policy.model.blocks]
        o, data = make_optimizer(policy, rc), OneDataset(dataset, policy, root / 'store')
        out[on], took = [], []
        for k in range(6):
            batch, t0 = preprocess(pre, data.batch(range(4))), time.time()
            out[on].append(
                float(
                    scale_step(
                        policy,
                        [batch],
                        [flow_draws(policy.config.model, 0, k, range(4))],
                        o,
                        1.0,
                    )[0]
                )
            )
            took.append(time.time() - t0)
        print(
            f"compiled: {'compiled' if on else 'eager'}: first step {took[0]:.1f} s, later"
            f" {np.median(took[2:]):.3f} s"
        )
    print(
        f'compiled: largest difference of {len(out[True])} losses'
        f' {max(abs(a - b) for a, b in zip(out[True], out[False])):.1e}'
    )
    assert np.allclose(out[True], out[False], atol=1e-3)


# --- pytest ---


@pytest.mark.parametrize(
    'file,shape',
    [
        ('accelerate_1gpu.yaml', (1, 1)),
        ('accelerate_8gpu.yaml', (1, 8)),
        ('accelerate_4x8.yaml', (4, 8)),
        ('lerobot_fsdp_8gpu.yaml', (1, 8)),
        ('slurm_4x8.sh', (4, 8)),
    ],
)
def test_launch_files(file, shape):
    assert launch_shape(ROOT / 'configs/launch' / file) == shape


BASE = ('base_24gb', 'base_48gb', 'base_80gb')


@pytest.mark.parametrize(
    'file,world',
    [
        ('pretrain.yaml', 32),
        ('finetune_8gpu.yaml', 8),
        *((f'{name}.yaml', 1) for name in ('finetune_1gpu', *BASE)),
    ],
)
def test_run_files(file, world):
    from halo.train.scale import global_batch, mesh_shape

    c = read_config(ROOT / 'configs/launch' / file)
    mesh_shape(c['run'], world)
    assert c['batch'] == global_batch(c['run'], world)


def test_slurm_script_parses():
    subprocess.run(['bash', '-n', str(ROOT / 'configs/launch/slurm_4x8.sh')], check=True)


def test_lerobot_wraps_what_the_policy_names():
    import yaml

    from halo.policy.modeling_halo import HaloPolicy

    named = yaml.safe_load((ROOT / 'configs/launch/lerobot_fsdp_8gpu.yaml').read_text())[
        'fsdp_config'
    ]['fsdp_transformer_layer_cls_to_wrap'].split(',')
    assert named == HaloPolicy._fsdp_wrap_modules == HaloPolicy._no_split_modules


def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from halo.train.scale import Log

    log = Log(tmp_path, 0, ('tensorboard',))
    log.row(step=1, loss=2.0, loss_dim={'0': 1.0})
    log.close()
    assert read_rows(tmp_path / 'metrics.jsonl') == [
        dict(step=1, loss=2.0, loss_dim={'0': 1.0})
    ] and list((tmp_path / 'tensorboard').glob('events*'))


def job(name):
    subprocess.run(
        [sys.executable, __file__, name],
        check=True,
        cwd=ROOT,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
    )


def test_a_row_says_what_share_of_the_time_no_batch_was_there(tmp_path, monkeypatch):
    dataset = data_in(tmp_path)
    rc = ScaleConfig(steps=4, micro=2, warmup=1, log_every=1, save_every=100)
    share, batch = {}, OneDataset.batch
    for name, pause in dict(quick=0.0, slow=1.5).items():
        slowly = lambda self, picks, s=pause: time.sleep(s) or batch(self, picks)
        monkeypatch.setattr(OneDataset, 'batch', slowly)
        run(1, dataset, LITTLE, tmp_path / name, rc)
        rows = read_rows(tmp_path / name / 'metrics.jsonl')
        share[name] = [r['waited'] for r in rows]
    assert all(0 <= x <= 1 for x in share['quick'] + share['slow'])
    assert min(share['slow']) > 0.4 and share['quick'][-1] < 0.4


def test_parts(tmp_path):
    parts(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('name', [n for n in ALL if n not in ('parts', 'slurm')])
def test_proof(name):
    job(name)


@pytest.mark.slow
def test_slurm():
    sys.path.insert(0, str(ROOT / 'scripts'))
    from slurm_check import missing

    if why := missing():
        pytest.skip(why)
    job('slurm')


class Said(io.TextIOBase):
    "Standard output that is also kept."

    def __init__(self):
        self.text = ''

    def write(self, x):
        self.text += x
        return sys.__stdout__.write(x)

    def flush(self):
        sys.__stdout__.flush()


def prove(name) -> list[str]:
    "Run a proof in a folder of its own; what it printed."
    place, t0, said = Path(tempfile.mkdtemp()), time.time(), Said()
    try:
        with redirect_stdout(said):
            memory() if name == 'memory' else globals()[name](place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(f'{name}: {time.time() - t0:.0f} s', flush=True)
    return [
        l
        for l in said.text.replace(str(place), '…').splitlines()
        if l.startswith(f'{name}: ')
    ]


if __name__ == '__main__':
    import logging
    import warnings

    warnings.filterwarnings('ignore')
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    names, out = sys.argv[1:], None
    if '--json' in names:
        k = names.index('--json')
        out = Path(names[k + 1])
        del names[k : k + 2]
    for name in ALL if names == ['all'] else names:
        try:
            found = prove(name)
        except Exception as e:
            if names != ['all']:
                raise
            import traceback

            traceback.print_exc()
            print(f'{name}: FAILED {type(e).__name__}: {e}', flush=True)
        else:
            if out:
                out.write_text(
                    json.dumps(
                        (json.loads(out.read_text()) if out.exists() else {})
                        | {name: found},
                        indent=1,
                        ensure_ascii=False,
                    )
                    + '\n'
                )
