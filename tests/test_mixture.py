"""Mixtures across modules: gradients of padding through the policy, processes and workers
that see one order, histories with a hop, statistics on disk, the configurations.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from halo.data.history import FrameStore, HistoryDataset
from halo.data.mixture import (
    ActionSpace,
    DatasetSpec,
    Member,
    Mixture,
    MixtureDataset,
    MixtureSampler,
    dataset_of,
    main,
    make_mixture_policy,
    mixture_loss,
    needed,
    record_clock,
    to_robot,
)
from halo.method.config import preset

IMG = 'observation.images.'
CONFIGS = sorted((Path(__file__).parent.parent / 'configs/mixtures').glob('*.yaml'))
CFG = preset(
    'tiny',
    max_state_dim=8,
    max_action_dim=10,
    chunk=6,
    flow__draws=1,
    sampling__history_frames=4,
    sampling__history_stride=2,
    sampling__history_size=28,
    sampling__view_size=56,
    sampling__wrist_size=28,
)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    from lerobot.configs.video import RGBEncoderConfig

    root, fast, rng = (
        tmp_path_factory.mktemp('mixture'),
        RGBEncoderConfig(vcodec='h264', preset='ultrafast'),
        np.random.default_rng(0),
    )
    hand = lambda n, g: np.concatenate(
        [0.02 * rng.standard_normal((n, 6)), rng.choice(g, (n, 1))], 1
    )
    record_clock(
        root / 'slow',
        5,
        (5, 4),
        {IMG + 'image_0': (60, 80)},
        5,
        hand(45, [0, 1]),
        'put it down',
        1,
        fast,
    )
    record_clock(
        root / 'mid',
        10,
        (4, 3.5),
        {IMG + 'image': (64, 64), IMG + 'eye': (32, 32)},
        8,
        hand(75, [-1, 1]),
        'open it',
        2,
        fast,
    )
    record_clock(
        root / 'quick',
        30,
        (2, 1.5),
        {IMG + 'head': (48, 80), IMG + 'hand': (32, 32)},
        6,
        10,
        'fold it',
        3,
        fast,
    )
    return root


MIXTURE = Mixture(
    'three',
    (
        DatasetSpec(
            'slow',
            {'primary': IMG + 'image_0'},
            0.6,
            ActionSpace('ee', 'delta', 'euler', 'open_high'),
        ),
        DatasetSpec(
            'mid',
            {'primary': IMG + 'image', 'wrist': IMG + 'eye'},
            0.3,
            ActionSpace('ee', 'delta', 'axis_angle', 'open_low', (-1.0, 1.0)),
            action_norm='mean_std',
        ),
        DatasetSpec(
            'quick',
            {'primary': IMG + 'head', 'wrist': IMG + 'hand'},
            0.1,
            ActionSpace('joint', 'absolute'),
            action_norm='min_max',
        ),
    ),
    balance='none',
)


@pytest.fixture(scope='module')
def data(root):
    return MixtureDataset(MIXTURE, CFG, root, seed=1, progress=False)


def ready(pre, batch):
    return pre(
        {
            k: v
            for k, v in batch.items()
            if k not in ('dataset_index', 'episode_index', 'frame_index')
        }
    )


@pytest.mark.parametrize('current', ['view', 'view_and_video'])
def test_padding_has_no_gradient(root, current):
    data = MixtureDataset(MIXTURE, CFG.but(sampling__current=current), root, progress=False)
    torch.manual_seed(0)
    policy, pre, _ = make_mixture_policy(data, n_action_steps=4, device='cpu')
    policy.eval()  # no gate is drawn
    sampler, seen = data.sampler(8), set()
    for _ in range(4):
        b = ready(pre, data.batch(next(sampler)))
        pad, noise, t = (
            b['action_is_pad'],
            torch.randn(8, CFG.chunk, CFG.max_action_dim),
            torch.rand(8),
        )
        b['action'] = b['action'].clone().requires_grad_()
        loss, _ = policy(b, noise=noise, time=t)
        loss.backward()
        assert (b['action'].grad[pad] == 0).all() and (b['action'].grad[~pad] != 0).all()
        for rubbish in (1e6, -7.0):
            assert torch.equal(
                policy(
                    {**b, 'action': torch.where(pad, rubbish, b['action'].detach())},
                    noise=noise,
                    time=t,
                )[0],
                loss,
            )
        seen |= set(pad.flatten(1).sum(1).tolist())
    assert len(seen) >= 3  # different sizes of padding were met
    policy.zero_grad()
    mixture_loss(policy, pre, data.batch([(0, 3, 0), (1, 4, 1)]), data.names)[0].backward()
    out = [
        p
        for n, p in policy.model.heads.named_parameters()
        if p.shape[:1] == (CFG.max_action_dim,) and p.grad is not None
    ]
    # no robot here has dimensions 7, 8, 9
    assert out and all((p.grad[7:] == 0).all() and (p.grad[:7] != 0).any() for p in out)


def test_alone_and_beside_others(data):
    torch.manual_seed(0)
    policy, pre, _ = make_mixture_policy(data, n_action_steps=4, device='cpu')
    policy.eval()
    picks, noise, t = (
        [(0, 20, 0), (1, 30, 1), (2, 50, 2), (1, 5, 3)],
        torch.randn(4, CFG.chunk, CFG.max_action_dim),
        torch.rand(4),
    )
    with torch.no_grad():
        together = policy(ready(pre, data.batch(picks)), 'none', noise.clone(), t)[0]
        alone = torch.cat(
            [
                policy(
                    ready(pre, data.batch([p])),
                    'none',
                    noise[i : i + 1].clone(),
                    t[i : i + 1],
                )[0]
                for i, p in enumerate(picks)
            ]
        )
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize('hop', [0, 2, 4])
def test_histories_equal_one_dataset(root, hop):
    cfg = CFG.but(sampling__history_hop=hop)
    one = HistoryDataset(
        root / 'mid', cfg, MIXTURE.datasets[1].roles, root / 'one', progress=False
    )
    many = Member(MIXTURE.datasets[1], cfg, root=root, progress=False)
    want, got = one.batch(range(75)), many.history(np.arange(75))
    assert torch.equal(want['observation.history'], got[0]) and torch.equal(
        want['observation.history_mask'], got[1]
    )


def test_numbers(data):
    # three frames before an episode's end; the last frame
    b = data.batch([(0, 22, 0), (2, 104, 1)])
    assert (~b['action_is_pad']).sum((1, 2)).tolist() == [3 * 7, 1 * 10]
    m = data.members[0]
    raw = to_robot(
        b['action'][0, 0, :7].numpy()
        * (m.stats['action']['q99'] - m.stats['action']['q01'])
        / 2
        + (m.stats['action']['q99'] + m.stats['action']['q01']) / 2,
        m.spec.action_space,
    )
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    assert (
        np.abs(raw - LeRobotDataset('local/slow', m.meta.root)[22]['action'].numpy()).max()
        < 1e-5
    )
    assert (
        b['observation.state'][0, 5:].abs().sum() == 0
        and data.members[1].stats['action']['max'][6] == 1
    )


@pytest.mark.parametrize(
    'weights', [[1.0, 1, 1], [0.97, 0.02, 0.01], [0.2, 0.3, 0.5], [5, 1e-1, 3]]
)
@pytest.mark.parametrize('seed', [0, 1, 2**40])
def test_proportions(weights, seed):
    s = MixtureSampler([45, 75, 105], weights, 400, seed)
    share = (
        np.bincount(np.array([p for k in range(50) for p in s.picks(k)])[:, 0], minlength=3)
        / 20_000
    )
    assert np.abs(share / s.weights - 1).max() < 0.02
    # as even after a million million draws
    far = dataset_of(np.arange(10**12, 10**12 + 20_000), s.weights, s.offset)
    assert np.abs(np.bincount(far, minlength=3) / 20_000 / s.weights - 1).max() < 0.02
    for r in range(4):  # every process has the mixture's proportions
        rank = MixtureSampler([45, 75, 105], weights, 400, seed, r, 4)
        mine = (
            np.bincount(
                np.array([p for _ in range(50) for p in next(rank)])[:, 0], minlength=3
            )
            / 5000
        )
        assert np.abs(mine - s.weights).max() < 0.01


def test_resume_anywhere():
    s = MixtureSampler([45, 75, 105], [0.6, 0.3, 0.1], 12, 5)
    all_ = [next(s) for _ in range(60)]
    for step in (0, 1, 17, 59):
        t = MixtureSampler([45, 75, 105], [0.6, 0.3, 0.1], 12, 5)
        t.load_state_dict(json.loads(json.dumps(s.state_dict(step))))
        assert [next(t) for _ in range(60 - step)] == all_[step:]
    for change, word in (
        (dict(batch=6), 'batch=6'),
        (dict(weights=[1, 1, 1]), 'weights'),
        (dict(lengths=[45, 75]), 'lengths'),
    ):
        with pytest.raises(ValueError, match=word):
            s.load_state_dict(s.state_dict() | change)


CHILD = '''
import sys, json, hashlib, torch
sys.path.insert(0, {tests!r})
from test_mixture import MIXTURE, CFG, replace, Augmentation, MixtureDataset, mixture_loader
from pathlib import Path
rank, world, step, out = map(int, sys.argv[1:5])
mixture = replace(MIXTURE, augment=Augmentation(.2, .2, .2, .2, .05))
data = MixtureDataset(mixture, CFG, {root!r}, seed=1, progress=False)
s = data.sampler(8, rank, world)
s.load_state_dict(s.state_dict(step))
keys = ('observation.history', 'observation.history_mask', 'observation.state')
keys += ('action', 'action_is_pad')
for b, _ in zip(mixture_loader(data, s, workers=2), range(out)):
    held = lambda i: b''.join(b[k][i].numpy().tobytes() for k in keys)
    rows = [hashlib.sha256(held(i)).hexdigest() for i in range(len(b['task']))]
    print(json.dumps(rows))
'''


@pytest.mark.slow
def test_processes(root):
    "Two processes with two workers each, started in the middle, see what one process sees."
    code = CHILD.format(tests=str(Path(__file__).parent), root=str(root))

    def run(rank, world, step, n):
        p = subprocess.Popen(
            [sys.executable, '-c', code, *map(str, (rank, world, step, n))],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return [json.loads(l) for l in p.communicate(timeout=300)[0].splitlines()]

    whole, parts = run(0, 1, 0, 6), [run(r, 2, 3, 3) for r in range(2)]
    assert len(whole) == 6 and [len(p) for p in parts] == [3, 3]
    for k in range(3):
        assert whole[3 + k][0::2] == parts[0][k] and whole[3 + k][1::2] == parts[1][k]


@pytest.mark.slow
def test_store_survives_sigkill(root, tmp_path):
    code = f"""
        import time, halo.data.history as d
        write = d.write_episode
        d.write_episode = lambda *a: (write(*a), time.sleep(.5))
        sizes, to = {{'{IMG}image': 28, '{IMG}eye': 28}}, {str(tmp_path / 's')!r}
        d.FrameStore.build({str(root / 'mid')!r}, sizes, to, workers=1, progress=False)
    """
    log, tries = tmp_path / 's.partial/done.txt', []
    for want in (1, 2):  # killed twice, later each time
        child = subprocess.Popen(
            [sys.executable, '-c', textwrap.dedent(code)],
            stderr=subprocess.DEVNULL,
            env=os.environ | {'OMP_NUM_THREADS': '1'},
        )
        end = time.time() + 120
        while (
            not (log.exists() and log.read_text().count('\n') >= want) and time.time() < end
        ):
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -9
        tries.append(log.read_text().count('\n'))
        assert not (tmp_path / 's').exists()
    assert tries[0] < tries[1] < 4
    sizes = {IMG + 'image': 28, IMG + 'eye': 28}
    a, b = (
        FrameStore.build(root / 'mid', sizes, tmp_path / 's', progress=False),
        FrameStore.build(root / 'mid', sizes, tmp_path / 't', progress=False),
    )
    assert all(np.array_equal(a.maps[c], b.maps[c]) for c in sizes)


def test_statistics_on_disk(root, tmp_path, data):
    folder = root / 'mid.statistics'
    file = next(folder.glob('*.json'))
    old = file.read_text()
    wrong = json.loads(old)
    wrong['action']['mean'][0] = 9.0
    try:
        file.write_text(json.dumps(wrong))
        with pytest.raises(
            ValueError,
            match=(
                r'action in dataset mid: dimension 0 has mean=9.* standard deviations away;'
                r' recompute'
            ),
        ):
            Member(MIXTURE.datasets[1], CFG, root=root, progress=False)
        Member(MIXTURE.datasets[1], CFG, root=root, recompute=True, progress=False)
        assert json.loads(file.read_text()) == json.loads(old)
        file.write_text('{')
        with pytest.raises(ValueError, match='delete it, it is computed again'):
            Member(MIXTURE.datasets[1], CFG, root=root, progress=False)
    finally:
        file.write_text(old)


def test_too_large_for_the_policy(root):
    with pytest.raises(
        ValueError,
        match=(
            'action of dataset quick has 10 dimensions, the policy takes 8; raise'
            ' max_action_dim'
        ),
    ):
        MixtureDataset(MIXTURE, CFG.but(max_action_dim=8), root, progress=False)
    with pytest.raises(
        ValueError, match='cannot be added up over time; set rotation: axis_angle'
    ):
        MixtureDataset(
            replace(MIXTURE, rotation='rot6d', actions='resampled'),
            CFG,
            root,
            progress=False,
        )


def test_every_rotation_form_trains(root):
    for form in ('axis_angle', 'rot6d', 'quaternion'):
        data = MixtureDataset(replace(MIXTURE, rotation=form), CFG, root, progress=False)
        b = data.batch([(0, 3, 0), (1, 3, 1)])
        width = {'axis_angle': 7, 'rot6d': 10, 'quaternion': 8}[form]
        assert (~b['action_is_pad'][:, 0]).sum(1).tolist() == [
            width,
            width,
        ] and torch.isfinite(b['action']).all()


@pytest.mark.parametrize('file', CONFIGS, ids=lambda f: f.stem)
def test_configurations(file):
    m = Mixture.load(file)
    assert m.name == file.stem and len({d.id for d in m.datasets}) == len(m.datasets)
    assert Mixture.load(file.stem) == m


def test_oxe_weights_are_the_published_ones():
    published = dict(
        fractal20220817_data=1.0,
        kuka=0.8341046294,
        bridge_orig=1.0,
        taco_play=2.0,
        jaco_play=1.0,
        berkeley_cable_routing=1.0,
        roboturk=2.0,
        viola=2.0,
        berkeley_autolab_ur5=2.0,
        toto=1.0,
        stanford_hydra_dataset=2.0,
        austin_buds_dataset=1.0,
        nyu_franka_play_dataset=3.0,
        furniture_bench_dataset=0.1,
        ucsd_kitchen_dataset=2.0,
        austin_sailor_dataset=1.0,
        austin_sirius_dataset=1.0,
        dlr_edan_shared_control=1.0,
        iamlab_cmu_pickup_insert=1.0,
        utaustin_mutex=1.0,
        berkeley_fanuc_manipulation=2.0,
        cmu_stretch=1.0,
        bc_z=0.2,
        fmb_dataset=1.0,
        dobbe=0.2,
    )
    assert {
        d.name.removesuffix('_lerobot'): d.weight for d in Mixture.load('oxe').datasets
    } == published


@pytest.mark.parametrize(
    'name', ['oxe', 'agibot', 'paper', 'libero', 'calvin', 'bridge', 'fractal']
)
def test_shipped_declarations_say_where_they_are_from(name, capsys):
    m = Mixture.load(name)
    assert m.sources and all('https://' in s for s in m.sources.values())
    for d in m.datasets:
        assert d.note or set(needed(d)) <= set(d.verified), (
            f'{d.name} says nothing of what is not verified'
        )
    assert main(['show', name]) == 0
    shown = capsys.readouterr().out
    for d in m.datasets:
        assert d.id in shown and (not d.note or d.note in shown)
    for k, s in m.sources.items():
        assert f'{k}: {s}' in shown


@pytest.mark.parametrize(
    'verified, words',
    [
        ('{colour: hub}', ['colour', 'cameras']),
        ('{gripper: hub card}', ['card', 'hub']),
        ('hub', ['verified', 'map', '{primary: observation.images.front}']),
    ],
)
def test_verified_is_checked(tmp_path, verified, words):
    (tmp_path / 'm.yaml').write_text(
        'name: m\nsources: {hub: "A page, https://example.org"}\ndatasets:\n  - id: a\n '
        f'   cameras: {{primary: observation.images.front}}\n    verified: {verified}\n'
    )
    with pytest.raises(ValueError) as e:
        Mixture.load(tmp_path / 'm.yaml')
    assert all(w in str(e.value) for w in words), e.value


# ---- mixtures that join others by name

KITCHEN = """sources: {hub: "a page, https://example.org/a"}
note: of a kitchen
datasets:
  - id: me/kitchen
    weight: 2
    cameras: {primary: observation.images.front}
    verified: {id: hub}
    note: where
  - {id: me/table, weight: 4, cameras: {primary: observation.images.front}}
"""
BENCH = """sources: {hub: "another, https://example.org/b"}
datasets:
  - id: me/bench
    cameras: {primary: observation.images.top}
    verified: {id: hub}
"""
JOINED = """name: both
include:
  - {file: parts/kitchen.yaml, weight: 0.5, change: {table: {weight: 6, name: desk}}}
  - parts/bench.yaml
datasets:
  - {id: me/own, weight: 0.1, cameras: {primary: observation.images.front}}
"""
WRITTEN = """name: both
sources:
  hub: a page, https://example.org/a
  bench:hub: another, https://example.org/b
note: "kitchen: of a kitchen"
datasets:
  - id: me/kitchen
    weight: 1
    cameras: {primary: observation.images.front}
    verified: {id: hub}
    note: where
  - {id: me/table, name: desk, weight: 3, cameras: {primary: observation.images.front}}
  - id: me/bench
    cameras: {primary: observation.images.top}
    verified: {id: bench:hub}
  - {id: me/own, weight: 0.1, cameras: {primary: observation.images.front}}
"""


@pytest.fixture
def folder(tmp_path):
    "A folder with two mixtures below it, and one beside them that joins them."
    (tmp_path / 'parts').mkdir()
    (tmp_path / 'parts/kitchen.yaml').write_text(KITCHEN)
    (tmp_path / 'parts/bench.yaml').write_text(BENCH)
    (tmp_path / 'both.yaml').write_text(JOINED)
    return tmp_path


def load(folder, text):
    (folder / 'm.yaml').write_text(text)
    return Mixture.load(folder / 'm.yaml')


def test_joined_by_name_is_written_out(folder, monkeypatch):
    want = load(folder, WRITTEN)
    assert Mixture.load(folder / 'both.yaml') == want
    # seen from the file, not from the working directory; absolute paths as well
    for where in ('/', folder / 'parts'):
        monkeypatch.chdir(where)
        assert Mixture.load(folder / 'both.yaml') == want
    monkeypatch.chdir(folder)
    assert Mixture.load('both.yaml') == want
    whole = JOINED.replace('parts/', f'{folder}/parts/')
    assert load(folder, whole) == want
    # a file that includes a file; scales multiply
    deep = load(folder, 'include: [{file: both.yaml, weight: 3}]')
    assert [d.weight for d in deep.datasets] == pytest.approx(
        [3 * d.weight for d in want.datasets]
    )
    assert deep.sources == want.sources and deep.name == 'm'


def test_draws_of_a_joined_mixture(root, tmp_path):
    """The fingerprint and the shares of the draws are those of the mixture written out."""
    spec = (
        'datasets:\n  - {{id: {}, weight: {}, cameras: {{primary: ' + IMG + '{}}},'
        ' state_norm: mean_std, action_norm: mean_std}}\n'
    )
    slow, mid = spec.format('slow', 3, 'image_0'), spec.format('mid', 2, 'image')
    (tmp_path / 'slow.yaml').write_text(slow)
    (tmp_path / 'mid.yaml').write_text(mid)
    joined = load(tmp_path, 'include: [slow, {file: mid, weight: 0.25}]')
    whole = load(tmp_path, slow + mid.replace('weight: 2', 'weight: 0.5').split('\n', 1)[1])
    a, b = (MixtureDataset(m, CFG, root, seed=1, progress=False) for m in (joined, whole))
    assert joined == whole and a.fingerprint == b.fingerprint
    shares = np.array([3 * len(a.members[0]), 0.5 * len(a.members[1])])
    assert np.allclose(a.weights, shares / shares.sum())


def test_shipped_mixtures_are_joined_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    want = Mixture.load('bridge').datasets + Mixture.load('agibot').datasets
    plain = 'include: [{}]\naugment: {{crop: 0.1}}'  # theirs differ
    for names in ('bridge, agibot', 'bridge.yaml, configs/mixtures/agibot.yaml'):
        assert load(tmp_path, plain.format(names)).datasets[0] == want[0]
    # a file of that name beside it comes first
    (tmp_path / 'agibot.yaml').write_text(BENCH)
    assert load(tmp_path, plain.format('bridge, agibot')).datasets[1].id == 'me/bench'


def test_the_papers_mixture_in_a_wheel(tmp_path, monkeypatch):
    "Joined from the package's own files, where there is no clone."
    import shutil

    from halo.data import files

    want = Mixture.load('paper')
    shutil.copytree(CONFIGS[0].parent, tmp_path / 'halo/shipped/configs/mixtures')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    monkeypatch.setattr(files, 'CLONE', None)
    monkeypatch.setattr(files, 'PACKAGE', tmp_path / 'halo')
    assert Mixture.load('configs/mixtures/paper.yaml') == Mixture.load('paper') == want
    one = load(tmp_path / 'elsewhere', 'include: [agibot]')
    assert one.datasets[0].id == want.datasets[-1].id


def test_the_papers_mixture():
    "Every dataset and weight of oxe.yaml, and AgiBot World's; nothing written twice."
    import yaml

    paper, oxe, agibot = map(Mixture.load, ('paper', 'oxe', 'agibot'))
    assert paper.datasets[:-1] == oxe.datasets and paper.augment == oxe.augment
    names = {'hub': 'agibot:hub'}
    renamed = {
        k: ' '.join(names.get(s, s) for s in v.split())
        for k, v in agibot.datasets[0].verified.items()
    }
    assert paper.datasets[-1] == replace(agibot.datasets[0], weight=0.05, verified=renamed)
    said = yaml.safe_load(next(f for f in CONFIGS if f.stem == 'paper').read_text())
    assert set(said) == {'include', 'note'}
    for m in (oxe, agibot):
        assert set(m.sources.values()) <= set(paper.sources.values())
        assert m.note in paper.note


NONE = KITCHEN + 'balance: none\n'


@pytest.mark.parametrize(
    'text, words',
    [
        ('include: parts/kitchen.yaml', ['m.yaml: include=', 'must be a list']),
        ('include: [{weight: 2}]', ['m.yaml: include[0]', 'file']),
        ('include: [3]', ['m.yaml: include[0]', 'file, weight, change']),
        ('inlcude: [x]', ['m.yaml: inlcude', "did you mean 'include'"]),
        (
            'include: [parts/kichen.yaml]',
            ["m.yaml: include[0].file='parts/kichen.yaml'", 'as seen from m.yaml'],
        ),
        ('include: [{file: parts/kitchen, wieght: 2}]', ["did you mean 'weight'"]),
        ('include: [{file: parts/kitchen, weight: 0}]', ['include[0]', 'must be positive']),
        ('include: [{file: parts/kitchen, weight: much}]', ['must be a number']),
        ('include: [{file: parts/kitchen, change: [x]}]', ['change', 'map of names']),
        (
            'include: [{file: parts/kitchen, change: {kichen: {weight: 2}}}]',
            ["m.yaml: include[0].change='kichen'", "'kitchen', 'table'"],
        ),
        (
            'include: [{file: parts/kitchen, change: {table: 2}}]',
            ['m.yaml: include[0].change.table=2', 'must hold fields'],
        ),
        (
            'include: [{file: parts/kitchen, change: {table: {wieght: 2}}}]',
            ['m.yaml: include[0].change.table.wieght', "did you mean 'weight'"],
        ),
        (
            'include: [parts/kitchen, parts/bench, parts/kitchen]',
            ['include[2] (kitchen.yaml)', "'kitchen'", 'include[0] (kitchen', 'rename'],
        ),
        (
            'include: [parts/kitchen]\n' + BENCH.replace('bench', 'table'),
            ['m.yaml: datasets', "'table'", 'include[0] (kitchen.yaml)', 'table_2'],
        ),
        ('include: [m.yaml]', ['include[0].file', 'm.yaml -> m.yaml', 'remove it']),
        ('include: [round.yaml]', ['m.yaml -> round.yaml -> m.yaml', 'remove it']),
        ('include: [wrong.yaml]', ['wrong.yaml: datasets[0].id=3 must be a text']),
        ('include: [none.yaml, parts/bench]', ['balance', 'none none, bench frames']),
        ('balance: none\ninclude: [parts/bench]', ['m.yaml: balance', 'bench frames']),
        ('include: [parts/kitchen, native]', ['m.yaml: actions', 'kitchen and native']),
    ],
)
def test_what_cannot_be_joined_is_refused(folder, capsys, text, words):
    (folder / 'round.yaml').write_text('include: [m.yaml]')
    (folder / 'wrong.yaml').write_text(BENCH.replace('me/bench', '3'))
    (folder / 'none.yaml').write_text(NONE)
    (folder / 'native.yaml').write_text(BENCH + 'actions: resampled\n')
    (folder / 'm.yaml').write_text(text)
    assert main(['show', str(folder / 'm.yaml')]) == 1
    said = capsys.readouterr().out.strip()
    assert '\n' not in said and all(w in said for w in words), said


def test_what_holds_for_all_can_be_said(folder):
    (folder / 'native.yaml').write_text(BENCH + 'actions: resampled\n')
    both = 'include: [parts/kitchen, native]\nactions: '
    assert load(folder, both + 'native').actions == 'native'
    assert load(folder, 'include: [native]').actions == 'resampled'


def test_sources_that_cannot_be_told_apart(folder):
    (folder / 'bench.yaml').write_text(
        BENCH.replace('another', 'a third').replace('me/bench', 'me/third')
    )
    with pytest.raises(ValueError, match="source 'hub' clashes .* rename it in its file"):
        load(folder, 'include: [parts/kitchen, parts/bench, bench]')


def test_check_of_what_is_not_there_is_one_line(tmp_path, capsys):
    assert (
        main(['check', 'libero', '--root', str(tmp_path), '--quiet', '--preset', 'tiny'])
        == 1
    )
    out = ''.join(capsys.readouterr()).strip().splitlines()
    assert len(out) == 1 and Mixture.load('libero').datasets[0].id in out[0], out


def test_template_is_short():
    lines = [
        l
        for l in next(f for f in CONFIGS if f.stem == 'own_robot').read_text().splitlines()
        if l.split('#')[0].strip()
    ]
    assert len(lines) <= 10


@pytest.mark.parametrize(
    'slots',
    [
        ('primary',),
        ('primary', 'wrist'),
        ('primary', 'secondary', 'wrist_left'),
        ('primary', 'wrist', 'wrist_2'),
        ('wrist', 'secondary', 'primary'),
    ],
)
def test_the_robots_policy_reads_the_mixtures_sizes(tmp_path, slots):
    """Whatever a camera is called, its slot is its role: in the mixture's store, in its
    policy, and in the policy of one robot made from it.
    """
    from lerobot.configs.video import RGBEncoderConfig

    from halo.data.mixture import robot_policy

    names = [IMG + n for n in ('wrist_front', 'front_wrist', 'primary_hand')][: len(slots)]
    rng, fast = (
        np.random.default_rng(0),
        RGBEncoderConfig(vcodec='h264', preset='ultrafast'),
    )
    record_clock(
        tmp_path / 'd',
        10,
        (2.0,),
        {c: (60, 84) for c in names},
        3,
        np.concatenate(
            [0.02 * rng.standard_normal((20, 6)), rng.choice([0, 1], (20, 1))], 1
        ),
        'fold it',
        0,
        fast,
    )
    spec = DatasetSpec(
        str(tmp_path / 'd'),
        dict(zip(slots, names)),
        action_space=ActionSpace('ee', 'delta', 'euler', 'open_high'),
        state_norm='mean_std',
        action_norm='mean_std',
    )
    data = MixtureDataset(Mixture('one', (spec,)), CFG, progress=False)
    with torch.device('meta'):
        policy, pre, _ = make_mixture_policy(data, n_action_steps=4, device='cpu')
    robot, pre_robot, _ = robot_policy(
        policy, data.members[0], data.slots, n_action_steps=4, device='cpu'
    )
    assert (
        robot.config.roles
        == spec.roles
        == {spec.cameras[s]: s.split('_')[0] for s in data.slots}
        and list(spec.roles.values())[0] == 'primary'
    )
    mixed = policy.observation(ready(pre, data.batch([(0, 15, 0)])))
    one = HistoryDataset(
        tmp_path / 'd',
        CFG.but(sampling__fps=10.0),
        robot.config.roles,
        tmp_path / 'one',
        progress=False,
    ).batch([15])
    alone = robot.observation(
        pre_robot(
            {k: v for k, v in one.items() if k not in ('episode_index', 'frame_index')}
        )
    )
    assert (
        len(mixed.views) == len(slots)
        and all(torch.equal(a, b) for a, b in zip(mixed.views, alone.views))
        and torch.equal(mixed.history, alone.history)
    )
    assert [max(v.shape[-2:]) for v in mixed.views] == [
        28 if s.startswith('wrist') else 56 for s in data.slots
    ]


@pytest.mark.parametrize(
    'cameras, words',
    [
        (
            {'primary': 'a', 'primary_2': 'b'},
            "camera slot 'primary_2' would be a second primary view; call it 'secondary_2'",
        ),
        ({'primary': 'a', 'wrist': 'a'}, "camera 'a' stands in 2 slots; give it one"),
    ],
)
def test_slots_that_cannot_be_roles(cameras, words):
    with pytest.raises(ValueError, match=words):
        DatasetSpec('d', cameras)
