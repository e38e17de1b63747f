"""The policy server from the outside: the demonstration's checkpoint, its command, a raw
socket, LeRobot's asynchronous robot client.
"""

import json
import logging
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import numpy as np
import pytest
import torch

pytest.importorskip('websockets'), pytest.importorskip('msgpack')
from websockets.exceptions import ConnectionClosed

from halo.deploy.serve import (
    HaloEngine,
    LeRobotEngine,
    Limits,
    PolicyClient,
    PolicyServer,
    Session,
    Worker,
    key_map,
    make_engine,
    open_policy,
    packb,
    read_request,
    running,
)
from halo.deploy.serve import main as serve_command
from halo.realtime.stream import Streamer

root = Path(__file__).resolve().parent.parent
checkpoint = root / 'checkpoints/flash_place/full'


@pytest.fixture(scope='module')
def engine():
    torch.set_num_threads(1)
    return HaloEngine(*open_policy(checkpoint))


def observation(number, **more):
    rng = np.random.default_rng(number)
    return (
        dict(
            images={
                k: rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)
                for k in ('primary', 'wrist')
            },
            state=rng.normal(0, 0.1, 4).astype(np.float32),
            prompt='put the puck on the pad that flashed red',
        )
        | more
    )


def test_units_are_the_robots(engine):
    with running(PolicyServer(engine, port=0)) as address, PolicyClient(address) as c:
        answer = c.infer(observation(0, seed=1))
        assert (
            answer['actions'].shape == (16, 4)
            and answer['actions'].dtype == np.float32
            and answer['tick'] == 0
        )
        assert set(answer['server_timing']) == {
            'decode_ms',
            'wait_ms',
            'infer_ms',
            'total_ms',
        }
        s = Session(engine.memory(), seed=1, tick=0)
        r = read_request(observation(0), engine.contract, key_map(engine.contract))
        engine.remember(s.memory, 0, r)
        x = engine.policy.denoise(engine.observation(s, engine.prepare(r)), engine.noise(s))
        stats = next(step for step in engine.post.steps if hasattr(step, 'stats')).stats[
            'action'
        ]
        assert np.allclose(
            answer['actions'],
            (
                x[0].detach() * torch.as_tensor(stats['std'])
                + torch.as_tensor(stats['mean'])
            ).numpy(),
            atol=1e-5,
        )


def test_the_flat_form_is_the_same(engine):
    m = observation(3)
    flat = {
        'observation/image': m['images']['primary'],
        'observation/wrist_image': m['images']['wrist'],
        'observation/state': m['state'],
        'prompt': m['prompt'],
        'seed': 4,
    }
    with (
        running(PolicyServer(engine, port=0)) as address,
        PolicyClient(address) as a,
        PolicyClient(address) as b,
    ):
        assert np.array_equal(
            a.infer(m | dict(seed=4))['actions'], b.infer(flat)['actions']
        )


def test_a_refused_message_changes_nothing(engine):
    bad = [
        observation(9, tick=0),
        observation(9, state=np.full(4, np.inf)),
        observation(9, reset=True, prompt='word ' * 150),
        dict(
            reset=True, frame_only=True, images={'wrist': observation(1)['images']['wrist']}
        ),
    ]
    with (
        running(PolicyServer(engine, port=0)) as address,
        PolicyClient(address) as a,
        PolicyClient(address) as b,
    ):
        got = []
        for c, hostile in ((a, []), (b, bad)):
            c.infer(observation(1, seed=2, tick=0))
            c.frame(observation(2)['images'], 6)
            for m in hostile:
                with pytest.raises(RuntimeError, match='refused'):
                    c.infer(m)
            got.append(c.infer(observation(3, tick=12))['actions'])
        assert np.array_equal(*got)


def test_a_reset_forgets(engine):
    with (
        running(PolicyServer(engine, port=0)) as address,
        PolicyClient(address) as a,
        PolicyClient(address) as b,
    ):
        for t in range(3):
            a.infer(observation(t, tick=6 * t))
        late = a.infer(observation(7, tick=18, seed=5))['actions']
        again = a.infer(observation(7, reset=True, tick=18, seed=5))['actions']
        assert np.array_equal(
            again, b.infer(observation(7, tick=18, seed=5))['actions']
        ) and not np.array_equal(again, late)


def test_the_episodes_of_a_client_do_not_depend_on_others(engine):
    def episodes(address):
        with PolicyClient(address) as c:
            return [c.infer(observation(k, reset=True))['actions'] for k in range(2)]

    with running(PolicyServer(engine, port=0, batch=2)) as address:
        first = episodes(address)
        with ThreadPoolExecutor(4) as pool:
            others = list(pool.map(lambda _: episodes(address), range(4)))
    assert all(
        np.array_equal(x, y) for o in others for x, y in zip(first, o)
    ) and not np.array_equal(*first)


def test_limits(engine):
    limits = Limits(errors=3, idle=1.0, clients=2)
    with running(PolicyServer(engine, port=0, limits=limits)) as address:
        with PolicyClient(address) as c:
            for _ in range(3):
                with pytest.raises(RuntimeError):
                    c.ask([])
            with pytest.raises(ConnectionClosed, match='1008'):
                c.ask([])
        with PolicyClient(address) as c, PolicyClient(address):
            with pytest.raises(ConnectionError, match='503'):
                PolicyClient(address)
            with pytest.raises(ConnectionClosed, match='no message for 1 s'):
                c.ws.recv(timeout=5)
        health = json.loads(urlopen(f'http://{address}/healthz').read())
        assert health['status'] == 'ok' and health['refused'] == 3


def test_an_overloaded_server_says_so(engine):
    class Slow(HaloEngine):
        def act(self, session, batch):
            time.sleep(1.0)
            return super().act(session, batch)

    with (
        running(
            PolicyServer(
                Slow(engine.policy, engine.pre, engine.post),
                port=0,
                limits=Limits(wait=0.3),
            )
        ) as address,
        PolicyClient(address) as a,
        PolicyClient(address) as b,
    ):
        with ThreadPoolExecutor(2) as pool:
            for f in [pool.submit(c.infer, observation(1)) for c in (a, b)]:
                with pytest.raises(RuntimeError, match='overloaded'):
                    f.result()
        with pytest.raises(RuntimeError, match='still being answered|overloaded'):
            a.infer(observation(2))
        # whose pass is running when the server gives up is chance: that client is refused
        # until it ends
        for late in range(50):
            try:
                assert b.frame(observation(3)['images'])['ack']
                break
            except RuntimeError as e:
                assert 'still being answered' in str(e) and late < 49
                time.sleep(0.1)


def test_a_client_that_went_is_not_computed_for(engine):
    class Slow(HaloEngine):
        def act(self, session, batch):
            time.sleep(0.6)
            return super().act(session, batch)

    server = PolicyServer(Slow(engine.policy, engine.pre, engine.post), port=0)
    with (
        running(server) as address,
        PolicyClient(address) as a,
        PolicyClient(address) as b,
        PolicyClient(address) as c,
    ):
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(a.infer, observation(1))
            time.sleep(0.2)
            b.ws.send(packb(observation(2)))
            time.sleep(0.1)
            b.ws.socket.shutdown(socket.SHUT_RDWR)
            assert (
                c.infer(observation(3))['actions'].shape == first.result()['actions'].shape
            )
    assert server.worker.answered == 2


def test_a_device_may_be_named(engine):
    other = HaloEngine(*open_policy(checkpoint, 'cpu'))
    r = read_request(observation(0, seed=1), engine.contract, key_map(engine.contract))
    got = []
    for e in (engine, other):
        s = Session(e.memory(), seed=1, tick=0)
        e.remember(s.memory, 0, r)
        got.append(e.act(s, e.prepare(r)))
    assert np.array_equal(*got)


def test_a_failing_policy_is_the_servers_secret(engine):
    class Broken(HaloEngine):
        def act(self, session, batch):
            raise OSError('/secret/path')

    class Wild(HaloEngine):
        def act(self, session, batch):
            return np.full((16, 4), np.nan, np.float32)

    for kind, words in ((Broken, 'the server failed'), (Wild, 'NaN')):
        with (
            running(
                PolicyServer(kind(engine.policy, engine.pre, engine.post), port=0)
            ) as address,
            PolicyClient(address) as c,
        ):
            with pytest.raises(RuntimeError, match=words) as e:
                c.infer(observation(1))
            assert 'secret' not in str(e.value)


def test_nobody_waits_for_a_client_that_does_not_read(engine):
    with (
        running(PolicyServer(engine, port=0, limits=Limits(send=1.0))) as address,
        PolicyClient(address) as c,
    ):
        host, port = address.split(':')
        with socket.create_connection((host, int(port))) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            s.sendall(
                f'GET / HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection:'
                ' Upgrade\r\nSec-WebSocket-Key:'
                ' AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n'.encode()
            )
            assert c.infer(observation(1))['actions'].shape == (16, 4)


def test_a_server_that_gets_ahead_answers_the_same(engine):
    "The past of a client is encoded while it executes; less is left for its observation."
    ask = [observation(k) for k in range(8)]

    def play(ahead):
        server, sessions = PolicyServer(engine, port=0, ahead=ahead), []
        note = server.worker.later
        server.worker.later = lambda s: sessions.append(s) or note(s)
        with running(server) as address, PolicyClient(address) as c:
            answers = []
            for k, m in enumerate(ask):
                answers.append(c.infer(m | dict(seed=3, tick=2 * k))['actions'])
                assert c.infer(
                    dict(images=m['images'], frame_only=True, tick=2 * k + 1)
                )['ack']
                end = time.monotonic() + 10
                while server.worker.known and time.monotonic() < end:
                    time.sleep(0.01)
                time.sleep(0.1)
            left = sessions[0].memory['streamer'].stats['computed']
        return np.stack(answers), left

    made, count = [], Streamer.prefill

    def counted(self, frames):
        made.append(count(self, frames))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Streamer, 'prefill', counted)
        plain = play(False)
        assert not made
        ahead = play(True)
    assert sum(made) > 0
    assert np.allclose(plain[0], ahead[0], atol=1e-5) and ahead[1] < plain[1]
    with pytest.raises(ValueError, match='ahead is not possible'):
        PolicyServer(engine, port=0, ahead=True, batch=2)


def test_batches_need_a_policy_that_can(engine):
    class Single(HaloEngine):
        def __init__(self, *args):
            super().__init__(*args)
            self.batches = False

    with pytest.raises(ValueError, match='batch size 2'):
        Worker(Single(engine.policy, engine.pre, engine.post), 2)


def test_diffusion_keeps_its_observations_apart():
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

    pytest.importorskip('diffusers')
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
    from lerobot.policies.factory import make_pre_post_processors

    torch.manual_seed(0)
    cfg = DiffusionConfig(
        device='cpu',
        horizon=8,
        n_action_steps=4,
        down_dims=(16, 32),
        num_inference_steps=2,
        pretrained_backbone_weights=None,
        crop_shape=None,
        n_groups=4,
        input_features={
            'observation.state': PolicyFeature(FeatureType.STATE, (4,)),
            'observation.images.primary': PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
        },
        output_features={'action': PolicyFeature(FeatureType.ACTION, (4,))},
    )
    stats = {
        k: dict(min=-torch.ones(4), max=torch.ones(4))
        for k in ('observation.state', 'action')
    } | {
        'observation.images.primary': dict(
            mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1)
        )
    }
    e = make_engine(
        DiffusionPolicy(cfg), *make_pre_post_processors(cfg, dataset_stats=stats)
    )
    assert isinstance(e, LeRobotEngine)
    asks = [
        [
            read_request(
                dict(
                    images={
                        'primary': (
                            np.random.default_rng([c, t]).integers(
                                0, 256, (64, 64, 3), dtype=np.uint8
                            )
                        )
                    },
                    state=np.full(4, 0.1 * t),
                    prompt='go',
                ),
                e.contract,
                key_map(e.contract),
            )
            for t in range(3)
        ]
        for c in range(2)
    ]

    def run(order):
        sessions, out, at = [Session(e.memory()) for _ in asks], {0: [], 1: []}, [0, 0]
        for c in order:
            sessions[c].tick = at[c]
            out[c].append(e.act(sessions[c], e.prepare(asks[c][at[c]])))
            at[c] += 1
        return out

    a, b = run([0, 0, 0, 1, 1, 1]), run([0, 1, 1, 0, 1, 0])
    assert all(np.array_equal(x, y) for c in a for x, y in zip(a[c], b[c])) and a[0][
        0
    ].shape == (4, 4)


def test_only_an_untrained_policy_says_so(engine):
    assert (
        PolicyServer(engine, untrained=True).metadata()['weights'] == 'random'
        and 'weights' not in PolicyServer(engine).metadata()
    )


@pytest.mark.slow
def test_the_command(tmp_path):
    (tmp_path / 'token').write_text('hush\n')
    process = subprocess.Popen(
        [
            sys.executable,
            '-m',
            'halo.deploy.serve',
            '--policy',
            str(checkpoint),
            '--port',
            '0',
            '--threads',
            '1',
            '--token-file',
            str(tmp_path / 'token'),
        ],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        address = re.search(r'ws://(127\.0\.0\.1:\d+)', process.stdout.readline())[1]
        with pytest.raises(ConnectionError, match='401'):
            PolicyClient(address)
        with PolicyClient(address, token='hush') as c:
            assert (
                c.metadata['policy'] == 'halo'
                and c.metadata['history']['frames'] == 8
                and c.metadata['cameras']['primary']['shape'] == [112, 112, 3]
            )
            assert c.infer(observation(1))['actions'].shape == (16, 4)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionClosed, match='stopping'):
                c.ws.recv(timeout=10)
        assert process.wait(20) == 0 and process.stdout.read().strip() == 'stopped'
    finally:
        process.kill() if process.poll() is None else None


class FakeRobot:
    "A LeRobot robot of four joints and two cameras that keeps what it was told."

    observation_features = {f'j{k}.pos': float for k in range(4)} | {
        k: (112, 112, 3) for k in ('primary', 'wrist')
    }
    action_features = {f'j{k}.pos': float for k in range(4)}

    def __init__(self):
        self.sent, self.seen, self.rng = [], 0, np.random.default_rng(0)

    def connect(self):
        pass

    def disconnect(self):
        pass

    def send_action(self, action):
        self.sent.append(action)
        return action

    def get_observation(self):
        self.seen += 1
        return {f'j{k}.pos': 0.1 * k for k in range(4)} | {
            k: self.rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)
            for k in ('primary', 'wrist')
        }


def test_lerobots_asynchronous_robot_client(engine, monkeypatch, tmp_path):
    """The history holds a frame of every control tick although inference is asked for only
    now and then; actions are executed in order, each once.
    """
    pytest.importorskip('grpc')
    monkeypatch.chdir(tmp_path)  # LeRobot's client writes logs/ where it stands
    import lerobot.async_inference.robot_client as upstream

    from halo.deploy.serve import async_client_class

    monkeypatch.setattr(upstream, 'make_robot_from_config', lambda config: FakeRobot())
    watched = []

    class Watched(HaloEngine):
        def act(self, session, batch):
            watched.append((session.tick, sorted(session.memory['history'].rows[0])))
            return super().act(session, batch)

    with running(
        PolicyServer(Watched(engine.policy, engine.pre, engine.post), port=0)
    ) as address:
        config = SimpleNamespace(
            robot=None,
            server_address=address,
            policy_type='halo',
            pretrained_name_or_path='',
            actions_per_chunk=12,
            policy_device='cpu',
            client_device='cpu',
            environment_dt=1 / 20,
            chunk_size_threshold=0.5,
            fps=20,
            aggregate_fn=lambda old, new: new,
            task='put the puck on the pad that flashed red',
        )
        client = async_client_class()(config)
        assert client.start()
        threads = [
            threading.Thread(target=client.receive_actions, daemon=True),
            threading.Thread(target=client.control_loop, args=(config.task,), daemon=True),
        ]
        for t in threads:
            t.start()
        end = time.monotonic() + 15
        while len(client.robot.sent) < 30 and time.monotonic() < end:
            time.sleep(0.05)
        client.shutdown_event.set()
        for t in threads:
            t.join(5)
        client.stop()
    assert len(client.robot.sent) >= 30 and not any(t.is_alive() for t in threads)
    asked = [t for t, _ in watched]
    assert (
        asked[0] == 0 and asked == sorted(asked) and len(asked) < len(client.robot.sent) / 2
    )
    # every control tick is there
    for tick, held in watched[1:]:
        assert held == list(range(tick + 1))


# How many actions of an answer are executed (the policy's n_action_steps is 2)


def test_the_policys_own_number_of_actions_is_the_default(engine):
    with running(PolicyServer(engine, port=0)) as address, PolicyClient(address) as c:
        answers = [c.infer(observation(k)) for k in range(3)]
        assert [a['tick'] for a in answers] == [0, 2, 4]
        assert {a['execute'] for a in answers} == {2} and c.metadata['execute'] == 2
        assert c.frame(observation(4)['images'])['tick'] == 5
        assert c.infer(observation(5))['tick'] == 6
        assert c.infer(observation(6, tick=9))['tick'] == 9  # who names ticks is believed
    with (
        running(PolicyServer(engine, port=0, execute=4)) as address,
        PolicyClient(address) as c,
    ):
        assert [c.infer(observation(k))['tick'] for k in range(2)] == [0, 4]
    for wrong in (0, 17):
        with pytest.raises(ValueError, match=f'execute={wrong} .* chunk of 16'):
            PolicyServer(engine, execute=wrong)


def test_our_players_execute_what_the_answer_says(engine):
    from halo.benchmarks.suite import ServedPolicy
    from halo.benchmarks.thin import Player

    m = observation(0)
    with (
        running(PolicyServer(engine, port=0)) as address,
        PolicyClient(address) as a,
        PolicyClient(address) as b,
    ):
        served, thin = ServedPolicy(a), Player(b)
        served.reset(1), thin.reset(1)
        first = served.act(dict(pixels=m['images'], agent_pos=m['state']), m['prompt'])
        assert np.array_equal(first, thin.act(m['images'], m['state'], m['prompt']))
        assert len(served.queue) == len(thin.queue) == 1
        assert served.describe()['executed_actions'] == 2


# Where an episode begins


@pytest.fixture(scope='module')
def episode():
    """The 18 observations of a recorded episode of the demonstration: pictures, state and
    prompt only.
    """
    from halo.viz.recording import Recording

    rec = Recording.load(root / 'checkpoints/flash_place/recordings/full.safetensors')
    return [
        dict(
            images={k: rec.record[f'frames.{k}'][t] for k in ('primary', 'wrist')},
            state=rec.record['state'][t].astype(np.float32),
            prompt=rec.task,
        )
        for t in range(0, len(rec), 2)
    ]


@pytest.fixture(scope='module')
def quick(engine):
    "The shipped policy's engine, without its model's work."

    class Quick(HaloEngine):
        def act(self, session, batch):
            return np.zeros((16, 4), np.float32)

    return Quick(engine.policy, engine.pre, engine.post)


def play(c, episode, **first):
    return [c.infer(m | (first if k == 0 else {})) for k, m in enumerate(episode)]


def warned(answers):
    return [k for k, a in enumerate(answers) if 'warning' in a]


def test_a_beginning_that_nobody_told_is_noticed_once(quick, episode, caplog):
    caplog.set_level(logging.WARNING, 'halo.deploy.serve')
    n = len(episode)
    with running(PolicyServer(quick, port=0)) as address, PolicyClient(address) as c:
        answers = play(c, episode * 3)
        told = c.metadata.get('episode', {}).get('start', '')
    assert warned(answers) == [n] and 'new_episode' not in answers[n]
    assert 'reset: true' in told
    text = answers[n]['warning']
    assert (
        'picture and state jumped' in text
        and 'reset: true' in text
        and f'tick {2 * n} ' in text
    )
    assert answers[-1]['tick'] == 2 * (3 * n - 1)  # it was only said, nothing was forgotten
    logged = [r.getMessage() for r in caplog.records]
    # the server's log and the client's
    assert len(logged) == 2 and all(text in m for m in logged)


def test_who_tells_the_beginning_is_not_warned(quick, episode):
    with running(PolicyServer(quick, port=0)) as address, PolicyClient(address) as c:
        assert not warned(play(c, episode, reset=True) + play(c, episode, reset=True))
        c.reset()
        other = [
            m | dict(prompt='put the puck on the pad that flashed red')
            for m in episode[5:9]
        ]
        assert not warned(play(c, episode[:5] + other))  # a new instruction half-way
        assert not warned(play(c, episode, reset=True, tick=7))
    with (
        running(PolicyServer(quick, port=0, new_episode='ignore')) as address,
        PolicyClient(address) as c,
    ):
        assert not warned(play(c, episode * 2))


def test_the_server_may_begin_an_episode_itself(engine, quick, episode):
    n = len(episode)
    with (
        running(PolicyServer(quick, port=0, new_episode='reset')) as address,
        PolicyClient(address) as c,
    ):
        begun = play(c, episode * 3)
    assert [k for k, a in enumerate(begun) if a.get('new_episode')] == [n, 2 * n]
    assert warned(begun) == [n] and 'began it by itself' in begun[n]['warning']
    last, first = episode[-8:], episode[:2]
    with running(PolicyServer(engine, port=0)) as address, PolicyClient(address) as c:
        told = play(c, last) + play(c, first, reset=True)
    with (
        running(PolicyServer(engine, port=0, new_episode='reset')) as address,
        PolicyClient(address) as c,
    ):
        begun = play(c, last + first)
    assert begun[8]['new_episode'] and warned(begun) == [8]
    assert all(
        np.array_equal(a['actions'], b['actions']) and a['tick'] == b['tick']
        for a, b in zip(told, begun)
    )


def test_frames_in_between_hide_no_beginning(quick, episode):
    "The picture jumps at a frame, the state at the observation after it."
    with running(PolicyServer(quick, port=0)) as address, PolicyClient(address) as c:
        assert not warned(play(c, episode))
        c.frame(dict(primary=episode[0]['images']['primary']))
        assert warned([c.infer(episode[0])]) == [0]


def test_another_instruction_and_an_endless_episode_are_signs_too(quick, episode):
    other = 'put the puck on the pad that flashed blue'
    with (
        running(PolicyServer(quick, port=0, new_episode='reset')) as address,
        PolicyClient(address) as c,
    ):
        answers = play(c, episode[:3] + [m | dict(prompt=other) for m in episode[3:5]])
        # not sure: no reset
        assert (
            warned(answers) == [3]
            and other in answers[3]['warning']
            and answers[3]['tick'] == 6
        )
    with (
        running(PolicyServer(quick, port=0, episode_ticks=10)) as address,
        PolicyClient(address) as c,
    ):
        answers = play(c, episode[:9])
        assert (
            warned(answers) == [6]
            and '12 ticks by now, more than 10' in answers[6]['warning']
        )
    # 5 times the mean of the 400 episodes it was trained on
    assert PolicyServer(quick).signs.longest == 202


def test_a_refused_message_takes_no_warning_with_it(quick, episode):
    with running(PolicyServer(quick, port=0)) as address, PolicyClient(address) as c:
        play(c, episode)
        with pytest.raises(RuntimeError, match='refused'):
            c.infer(episode[0] | dict(prompt='word ' * 150))
        assert warned([c.infer(episode[0])]) == [0]


def test_a_robot_that_stood_still_may_start_quickly(quick, episode):
    still = [
        episode[0] | dict(state=episode[0]['state'] + np.float32(1e-5 * (k % 3)))
        for k in range(12)
    ]
    with running(PolicyServer(quick, port=0)) as address, PolicyClient(address) as c:
        assert not warned(play(c, still + episode))


@pytest.mark.sim
@pytest.mark.slow
def test_episodes_over_a_real_connection(tmp_path):
    command = [
        sys.executable,
        'scripts/episode_check.py',
        '--episodes',
        '4',
        '--more',
        '4',
        '--json',
        str(tmp_path / 'e.json'),
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(json.loads((tmp_path / 'e.json').read_text())['bars'].values())


# Messages as large as the policy's pictures


@pytest.fixture(scope='module')
def wide():
    "An untrained policy with four cameras of 1280×720."
    from lerobot.configs import FeatureType, PolicyFeature

    from halo.policy.configuration_halo import HaloConfig
    from halo.policy.modeling_halo import HaloPolicy
    from halo.policy.processor_halo import make_halo_pre_post_processors

    cameras = {
        f'observation.images.{k}': PolicyFeature(FeatureType.VISUAL, (3, 720, 1280))
        for k in ('primary', 'left', 'right', 'wrist')
    }
    config = HaloConfig(
        preset='tiny',
        device='cpu',
        chunk_size=4,
        n_action_steps=4,
        history_frames=2,
        history_stride=2,
        denoising_steps=1,
        input_features=cameras
        | {'observation.state': PolicyFeature(FeatureType.STATE, (4,))},
        output_features={'action': PolicyFeature(FeatureType.ACTION, (4,))},
    )
    stats = {
        k: dict(mean=torch.zeros(4), std=torch.ones(4))
        for k in ('observation.state', 'action')
    }
    return HaloEngine(
        HaloPolicy(config).eval(), *make_halo_pre_post_processors(config, stats)
    )


def wide_message(shape=(720, 1280, 3), **more):
    return (
        dict(
            images={
                k: np.zeros(shape, np.uint8) for k in ('primary', 'left', 'right', 'wrist')
            },
            state=np.zeros(4),
            prompt='go',
        )
        | more
    )


def test_an_observation_fits_whatever_its_cameras(wide):
    with running(PolicyServer(wide, port=0)) as address, PolicyClient(address) as c:
        assert c.infer(wide_message())['actions'].shape == (4, 4)
        past = np.zeros((3, 720, 1280, 3), np.uint8)
        assert c.infer(wide_message(history=past, history_ticks=[1, 2, 3]))['tick'] == 4
        assert c.metadata['limits']['message'] > 7 * 720 * 1280 * 3


def test_pictures_of_any_size_have_a_generous_limit(wide):
    resizing = HaloEngine(wide.policy, wide.pre, wide.post, resize=True)
    with running(PolicyServer(resizing, port=0)) as address, PolicyClient(address) as c:
        assert c.infer(wide_message((1080, 1920, 3)))['actions'].shape == (4, 4)


def test_a_limit_that_holds_no_observation_is_refused(wide):
    with pytest.raises(
        ValueError,
        match=(
            r'8 MiB cannot hold one observation .*primary 720×1280.* --message-mb to 11 or'
            r' more'
        ),
    ):
        PolicyServer(wide, limits=Limits(message=8 << 20))
    assert PolicyServer(wide, limits=Limits(message=11 << 20)).limits.message == 11 << 20


# The command's mistakes: one line and exit status 1


@pytest.fixture
def folders(tmp_path):
    """Folders that are no policy: empty, without weights, of an unknown kind, not JSON,
    with torn weights.
    """
    made = {
        name: tmp_path / name
        for name in ('empty', 'bare', 'unknown', 'text', 'list', 'torn')
    }
    for f in made.values():
        f.mkdir()
    (made['unknown'] / 'config.json').write_text('{"type": "clairvoyance"}')
    (made['text'] / 'config.json').write_text('policy')
    (made['list'] / 'config.json').write_text('[1]')
    for f in checkpoint.iterdir():
        if f.suffix in ('.json', '.safetensors'):
            shutil.copy(f, made['torn'] / f.name)
    (made['torn'] / 'model.safetensors').write_bytes(b'torn')
    made['bare'] = root / 'checkpoints/baselines/act'
    return {k: str(v) for k, v in made.items()} | dict(none=str(tmp_path / 'none'))


def test_the_command_fails_in_one_line(folders, tmp_path, capsys):
    from halo.cli import main as halo

    (tmp_path / 'blank').write_text('\n')
    (tmp_path / 'two').write_text('one\ntwo\n')
    good = ['--policy', str(checkpoint)]
    with socket.create_server(('127.0.0.1', 0)) as taken:
        busy = str(taken.getsockname()[1])
        cases = [
            (['--policy', folders[k]], words)
            for k, words in dict(
                none='config.json is missing',
                empty='config.json is missing',
                bare='model.safetensors is missing',
                unknown='clairvoyance',
                text='does not describe a policy',
                list='does not describe a policy',
                torn='torn',
            ).items()
        ]
        cases += [
            (good + more.split(), words)
            for more, words in {
                f'--port {busy}': f'cannot listen on 127.0.0.1:{busy}',
                '--port 80000': '--port 80000',
                '--port -1': '--port -1',
                '--host 203.0.113.7': 'cannot listen on 203.0.113.7',
                '--host no.such.host.invalid': 'cannot listen on no.such',
                '--batch 0': '--batch 0',
                '--threads 0': '--threads 0',
                '--threads -2': '--threads -2',
                '--execute 0': '--execute 0',
                '--execute 99': 'chunk of 16',
                '--clients 0': '--clients 0',
                '--idle -1': '--idle -1',
                '--wait nan': '--wait nan',
                '--seed -1': '--seed -1',
                '--message-mb 0': '--message-mb 0',
                '--message-mb 0.1': 'cannot hold one observation',
                '--device abacus': '--device abacus',
                '--device meta': '--device meta',
                '--key a=b': "key map 'a=b'",
                '--episode-ticks 0': '--episode-ticks 0',
                f'--token-file {tmp_path}': 'cannot be read',
                f'--token-file {tmp_path}/none': 'cannot be read',
                f'--token-file {tmp_path}/blank': 'is empty',
                f'--token-file {tmp_path}/two': 'more than one token',
            }.items()
        ]
        for argv, words in cases:
            argv = argv if '--port' in argv else [*argv, '--port', '0']
            assert halo(['serve', *argv]) == 1, argv
            err = capsys.readouterr().err
            assert (
                err.startswith('halo serve: ') and words in err and err.count('\n') == 1
            ), (argv, err)


@pytest.mark.slow
def test_the_command_fails_in_one_line_as_a_process():
    with socket.create_server(('127.0.0.1', 0)) as taken:
        command = [
            sys.executable,
            '-m',
            'halo.deploy.serve',
            '--policy',
            str(checkpoint),
            '--port',
            str(taken.getsockname()[1]),
        ]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert (
        done.stderr.startswith('halo serve: cannot listen on 127.0.0.1')
        and done.stderr.count('\n') == 1
    )


def test_help_says_how_an_episode_begins(capsys):
    with pytest.raises(SystemExit):
        serve_command(['--help'])
    text = capsys.readouterr().out
    assert 'reset: true' in text and '"execute"' in text and '--new-episode' in text
