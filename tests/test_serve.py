"""The policy server from the outside: the demonstration's checkpoint, its command, a raw socket, LeRobot's asynchronous robot client."""
import asyncio, json, re, signal, socket, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import numpy as np
import pytest
import torch

pytest.importorskip('websockets'), pytest.importorskip('msgpack')
from websockets.exceptions import ConnectionClosed

from halo.evaluate import load_policy
from halo.serve import HaloEngine, LeRobotEngine, Limits, PolicyClient, PolicyServer, Refused, Session, Worker, key_map, make_engine, open_policy, packb, read_request, running, unpackb

root = Path(__file__).resolve().parent.parent
checkpoint = root/'checkpoints/flash_place/full'


@pytest.fixture(scope='module')
def engine():
    torch.set_num_threads(1)
    return HaloEngine(*open_policy(checkpoint))


def observation(number, **more):
    rng = np.random.default_rng(number)
    return dict(images={k: rng.integers(0, 256, (112, 112, 3), dtype=np.uint8) for k in ('primary', 'wrist')}, state=rng.normal(0, 0.1, 4).astype(np.float32), prompt='put the puck on the pad that flashed red') | more


def test_units_are_the_robots(engine):
    with running(PolicyServer(engine, port=0)) as address, PolicyClient(address) as c:
        answer = c.infer(observation(0, seed=1))
        assert answer['actions'].shape == (16, 4) and answer['actions'].dtype == np.float32 and answer['tick'] == 0
        assert set(answer['server_timing']) == {'decode_ms', 'wait_ms', 'infer_ms', 'total_ms'}
        s = Session(engine.memory(), seed=1, tick=0)
        r = read_request(observation(0), engine.contract, key_map(engine.contract))
        engine.remember(s.memory, 0, r)
        x = engine.policy.denoise(engine.observation(s, engine.prepare(r)), engine.noise(s))
        stats = next(step for step in engine.post.steps if hasattr(step, 'stats')).stats['action']
        assert np.allclose(answer['actions'], (x[0].detach() * torch.as_tensor(stats['std']) + torch.as_tensor(stats['mean'])).numpy(), atol=1e-5)


def test_the_flat_form_is_the_same(engine):
    m = observation(3)
    flat = {'observation/image': m['images']['primary'], 'observation/wrist_image': m['images']['wrist'], 'observation/state': m['state'], 'prompt': m['prompt'], 'seed': 4}
    with running(PolicyServer(engine, port=0)) as address, PolicyClient(address) as a, PolicyClient(address) as b:
        assert np.array_equal(a.infer(m | dict(seed=4))['actions'], b.infer(flat)['actions'])


def test_a_refused_message_changes_nothing(engine):
    bad = [observation(9, tick=0), observation(9, state=np.full(4, np.inf)), observation(9, reset=True, prompt='word ' * 150), dict(reset=True, frame_only=True, images={'wrist': observation(1)['images']['wrist']})]
    with running(PolicyServer(engine, port=0)) as address, PolicyClient(address) as a, PolicyClient(address) as b:
        got = []
        for c, hostile in ((a, []), (b, bad)):
            c.infer(observation(1, seed=2, tick=0)); c.frame(observation(2)['images'], 6)
            for m in hostile:
                with pytest.raises(RuntimeError, match='refused'): c.infer(m)
            got.append(c.infer(observation(3, tick=12))['actions'])
        assert np.array_equal(*got)


def test_a_reset_forgets(engine):
    with running(PolicyServer(engine, port=0)) as address, PolicyClient(address) as a, PolicyClient(address) as b:
        for t in range(3): a.infer(observation(t, tick=6 * t))
        late = a.infer(observation(7, tick=18, seed=5))['actions']
        again = a.infer(observation(7, reset=True, tick=18, seed=5))['actions']
        assert np.array_equal(again, b.infer(observation(7, tick=18, seed=5))['actions']) and not np.array_equal(again, late)


def test_the_episodes_of_a_client_do_not_depend_on_others(engine):
    def episodes(address):
        with PolicyClient(address) as c: return [c.infer(observation(k, reset=True))['actions'] for k in range(2)]
    with running(PolicyServer(engine, port=0, batch=2)) as address:
        first = episodes(address)
        with ThreadPoolExecutor(4) as pool: others = list(pool.map(lambda _: episodes(address), range(4)))
    assert all(np.array_equal(x, y) for o in others for x, y in zip(first, o)) and not np.array_equal(*first)


def test_limits(engine):
    limits = Limits(errors=3, idle=1.0, clients=2)
    with running(PolicyServer(engine, port=0, limits=limits)) as address:
        with PolicyClient(address) as c:
            for _ in range(3):
                with pytest.raises(RuntimeError): c.ask([])
            with pytest.raises(ConnectionClosed, match='1008'): c.ask([])
        with PolicyClient(address) as c, PolicyClient(address):
            with pytest.raises(ConnectionError, match='503'): PolicyClient(address)
            with pytest.raises(ConnectionClosed, match='no message for 1 s'): c.ws.recv(timeout=5)
        health = json.loads(urlopen(f'http://{address}/healthz').read())
        assert health['status'] == 'ok' and health['refused'] == 3


def test_an_overloaded_server_says_so(engine):
    class Slow(HaloEngine):
        def act(self, session, batch): time.sleep(1.0); return super().act(session, batch)
    with running(PolicyServer(Slow(engine.policy, engine.pre, engine.post), port=0, limits=Limits(wait=0.3))) as address, PolicyClient(address) as a, PolicyClient(address) as b:
        with ThreadPoolExecutor(2) as pool:
            for f in [pool.submit(c.infer, observation(1)) for c in (a, b)]:
                with pytest.raises(RuntimeError, match='overloaded'): f.result()
        with pytest.raises(RuntimeError, match='still being answered|overloaded'): a.infer(observation(2))
        for late in range(50):   # whose pass is running when the server gives up is chance: that client is refused until it ends
            try: assert b.frame(observation(3)['images'])['ack']; break
            except RuntimeError as e: assert 'still being answered' in str(e) and late < 49; time.sleep(0.1)


def test_a_client_that_went_is_not_computed_for(engine):
    class Slow(HaloEngine):
        def act(self, session, batch): time.sleep(0.6); return super().act(session, batch)
    server = PolicyServer(Slow(engine.policy, engine.pre, engine.post), port=0)
    with running(server) as address, PolicyClient(address) as a, PolicyClient(address) as b, PolicyClient(address) as c:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(a.infer, observation(1))
            time.sleep(0.2)
            b.ws.send(packb(observation(2))); time.sleep(0.1); b.ws.socket.shutdown(socket.SHUT_RDWR)
            assert c.infer(observation(3))['actions'].shape == first.result()['actions'].shape
    assert server.worker.answered == 2


def test_a_device_may_be_named(engine):
    other = HaloEngine(*open_policy(checkpoint, 'cpu'))
    r = read_request(observation(0, seed=1), engine.contract, key_map(engine.contract))
    got = []
    for e in (engine, other):
        s = Session(e.memory(), seed=1, tick=0); e.remember(s.memory, 0, r); got.append(e.act(s, e.prepare(r)))
    assert np.array_equal(*got)


def test_a_failing_policy_is_the_servers_secret(engine):
    class Broken(HaloEngine):
        def act(self, session, batch): raise OSError('/secret/path')
    class Wild(HaloEngine):
        def act(self, session, batch): return np.full((16, 4), np.nan, np.float32)
    for kind, words in ((Broken, 'the server failed'), (Wild, 'NaN')):
        with running(PolicyServer(kind(engine.policy, engine.pre, engine.post), port=0)) as address, PolicyClient(address) as c:
            with pytest.raises(RuntimeError, match=words) as e: c.infer(observation(1))
            assert 'secret' not in str(e.value)


def test_nobody_waits_for_a_client_that_does_not_read(engine):
    with running(PolicyServer(engine, port=0, limits=Limits(send=1.0))) as address, PolicyClient(address) as c:
        host, port = address.split(':')
        with socket.create_connection((host, int(port))) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            s.sendall(f'GET / HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n'.encode())
            assert c.infer(observation(1))['actions'].shape == (16, 4)


def test_batches_need_a_policy_that_can(engine):
    class Single(HaloEngine):
        def __init__(self, *args): super().__init__(*args); self.batches = False
    with pytest.raises(ValueError, match='batch size 2'): Worker(Single(engine.policy, engine.pre, engine.post), 2)


def test_diffusion_keeps_its_observations_apart():
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    pytest.importorskip('diffusers')
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
    from lerobot.policies.factory import make_pre_post_processors
    torch.manual_seed(0)
    cfg = DiffusionConfig(device='cpu', horizon=8, n_action_steps=4, down_dims=(16, 32), num_inference_steps=2, pretrained_backbone_weights=None, crop_shape=None, n_groups=4,
                          input_features={'observation.state': PolicyFeature(FeatureType.STATE, (4,)), 'observation.images.primary': PolicyFeature(FeatureType.VISUAL, (3, 64, 64))},
                          output_features={'action': PolicyFeature(FeatureType.ACTION, (4,))})
    stats = {k: dict(min=-torch.ones(4), max=torch.ones(4)) for k in ('observation.state', 'action')} | {'observation.images.primary': dict(mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1))}
    e = make_engine(DiffusionPolicy(cfg), *make_pre_post_processors(cfg, dataset_stats=stats))
    assert isinstance(e, LeRobotEngine)
    asks = [[read_request(dict(images={'primary': np.random.default_rng([c, t]).integers(0, 256, (64, 64, 3), dtype=np.uint8)}, state=np.full(4, 0.1 * t), prompt='go'), e.contract, key_map(e.contract)) for t in range(3)] for c in range(2)]
    def run(order):
        sessions, out, at = [Session(e.memory()) for _ in asks], {0: [], 1: []}, [0, 0]
        for c in order:
            sessions[c].tick = at[c]; out[c].append(e.act(sessions[c], e.prepare(asks[c][at[c]]))); at[c] += 1
        return out
    a, b = run([0, 0, 0, 1, 1, 1]), run([0, 1, 1, 0, 1, 0])
    assert all(np.array_equal(x, y) for c in a for x, y in zip(a[c], b[c])) and a[0][0].shape == (4, 4)


def test_only_an_untrained_policy_says_so(engine):
    assert PolicyServer(engine, untrained=True).metadata()['weights'] == 'random' and 'weights' not in PolicyServer(engine).metadata()


def test_the_command(tmp_path):
    (tmp_path/'token').write_text('hush\n')
    process = subprocess.Popen([sys.executable, '-m', 'halo.serve', '--policy', str(checkpoint), '--port', '0', '--threads', '1', '--token-file', str(tmp_path/'token')], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address = re.search(r'ws://(127\.0\.0\.1:\d+)', process.stdout.readline())[1]
        with pytest.raises(ConnectionError, match='401'): PolicyClient(address)
        with PolicyClient(address, token='hush') as c:
            assert c.metadata['policy'] == 'halo' and c.metadata['history']['frames'] == 8 and c.metadata['cameras']['primary']['shape'] == [112, 112, 3]
            assert c.infer(observation(1))['actions'].shape == (16, 4)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionClosed, match='stopping'): c.ws.recv(timeout=10)
        assert process.wait(20) == 0 and process.stdout.read().strip() == 'stopped'
    finally: process.kill() if process.poll() is None else None


class FakeRobot:
    "A LeRobot robot of four joints and two cameras that keeps what it was told."
    observation_features = {f'j{k}.pos': float for k in range(4)} | {k: (112, 112, 3) for k in ('primary', 'wrist')}
    action_features = {f'j{k}.pos': float for k in range(4)}
    def __init__(self): self.sent, self.seen, self.rng = [], 0, np.random.default_rng(0)
    def connect(self): pass
    def disconnect(self): pass
    def send_action(self, action): self.sent.append(action); return action
    def get_observation(self):
        self.seen += 1
        return {f'j{k}.pos': 0.1 * k for k in range(4)} | {k: self.rng.integers(0, 256, (112, 112, 3), dtype=np.uint8) for k in ('primary', 'wrist')}


def test_lerobots_asynchronous_robot_client(engine, monkeypatch, tmp_path):
    "The history holds a frame of every control tick although inference is asked for only now and then; actions are executed in order, each once."
    pytest.importorskip('grpc')
    monkeypatch.chdir(tmp_path)   # LeRobot's client writes logs/ where it stands
    import lerobot.async_inference.robot_client as upstream
    from halo.serve import async_client_class
    monkeypatch.setattr(upstream, 'make_robot_from_config', lambda config: FakeRobot())
    watched = []
    class Watched(HaloEngine):
        def act(self, session, batch): watched.append((session.tick, sorted(session.memory['history'].rows[0]))); return super().act(session, batch)
    with running(PolicyServer(Watched(engine.policy, engine.pre, engine.post), port=0)) as address:
        config = SimpleNamespace(robot=None, server_address=address, policy_type='halo', pretrained_name_or_path='', actions_per_chunk=12, policy_device='cpu', client_device='cpu', environment_dt=1 / 20,
                                 chunk_size_threshold=0.5, fps=20, aggregate_fn=lambda old, new: new, task='put the puck on the pad that flashed red')
        client = async_client_class()(config)
        assert client.start()
        threads = [threading.Thread(target=client.receive_actions, daemon=True), threading.Thread(target=client.control_loop, args=(config.task,), daemon=True)]
        for t in threads: t.start()
        end = time.monotonic() + 15
        while len(client.robot.sent) < 30 and time.monotonic() < end: time.sleep(0.05)
        client.shutdown_event.set()
        for t in threads: t.join(5)
        client.stop()
    assert len(client.robot.sent) >= 30 and not any(t.is_alive() for t in threads)
    asked = [t for t, _ in watched]
    assert asked[0] == 0 and asked == sorted(asked) and len(asked) < len(client.robot.sent) / 2
    for tick, held in watched[1:]: assert held == list(range(tick + 1))   # every control tick is there
