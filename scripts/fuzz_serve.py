"""Attack a policy server: fuzzed messages, clients that vanish, and in the midst of it two
honest clients whose actions must stay the same bytes.

The honest clients (witnesses) play a fixed episode once undisturbed, then again and again
while the attack runs. Printed: what became of the messages, the server's memory, the
comparison.
Exit status 1 if the server is gone, an honest action differs, a message got no answer, or
memory grew beyond the bounds. Everything is bounded in count and time.

    python scripts/fuzz_serve.py --messages 10000 --clients 50
"""

import argparse
import collections
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.request import urlopen

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import connect

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
from halo.deploy.serve import PolicyClient, packb

# MB that the server may hold more after the attack, and at most during it
GROWTH, PEAK = 64, 256


class Honest:
    "A fixed episode of random pictures for a policy's metadata."

    def __init__(self, about, seed, steps=12):
        rng, cams = np.random.default_rng(seed), about['cameras']
        self.seed, self.steps = (
            seed,
            [
                dict(
                    images={
                        k: rng.integers(0, 256, c['shape'], dtype=np.uint8)
                        for k, c in cams.items()
                    },
                    state=rng.normal(0, 0.1, about['state']).astype(np.float32),
                    prompt='put the puck on the pad that flashed red',
                )
                for _ in range(steps)
            ],
        )

    def play(self, client):
        """All actions of the episode as bytes: a chunk at every second tick, the frame
        alone in between.
        """
        client.reset(self.seed)
        out = b''
        for t, m in enumerate(self.steps):
            if t % 2:
                client.frame({k: v for k, v in list(m['images'].items())[:1]}, t)
            else:
                out += client.infer(m | dict(tick=t))['actions'].tobytes()
        return out


def array(data, dtype, shape):
    return {b'__ndarray__': True, b'data': data, b'dtype': dtype, b'shape': shape}


class Fuzz:
    "Hostile messages, each drawn from a seed."

    def __init__(self, about, seed):
        self.rng, self.np, self.about = (
            random.Random(seed),
            np.random.default_rng(seed),
            about,
        )
        self.good = Honest(about, seed, 4).steps
        self.kinds = [
            getattr(type(self), n) for n in sorted(vars(type(self))) if n.startswith('do_')
        ]

    def draw(self):
        "(kind, message): bytes, or a text."
        kind = self.rng.choice(self.kinds)
        return kind.__name__[3:], kind(self)

    def valid(self):
        return dict(self.rng.choice(self.good))

    def junk(self):
        r = self.rng
        return r.choice(
            [
                None,
                True,
                -1,
                2**63,
                1e308,
                float('nan'),
                '',
                'x' * 3000,
                b'',
                b'\xff' * 50,
                [],
                {},
                [[]],
                {'a': {}},
                [1, 'a', None],
                np.zeros(0),
                np.zeros((2, 0, 3), np.uint8),
                np.float64('inf'),
                np.zeros((1, 1, 1, 1, 1)),
                np.full(4, np.nan),
                np.ones((9, 9, 3)),
                np.ones(3, bool),
                msgpack.Timestamp(1, 1),
                msgpack.ExtType(5, b'abc'),
            ]
        )

    def do_truncated(self):
        data = packb(self.valid())
        return data[: self.rng.randrange(len(data))]

    def do_noise(self):
        return self.rng.randbytes(self.rng.randrange(400))

    def do_bit_flips(self):
        data = bytearray(packb(self.valid()))
        for _ in range(self.rng.randrange(1, 30)):
            data[
                self.rng.randrange(min(len(data), self.rng.choice([60, 400, len(data)])))
            ] ^= 1 << self.rng.randrange(8)
        return bytes(data)

    def do_wrong_type(self):
        m = self.valid()
        m[
            self.rng.choice(
                [
                    'images',
                    'state',
                    'prompt',
                    'tick',
                    'reset',
                    'frame_only',
                    'seed',
                    'history',
                    'history_ticks',
                ]
            )
        ] = self.junk()
        return packb(m)

    def do_wrong_image(self):
        return packb(
            self.valid()
            | dict(images={self.rng.choice(list(self.about['cameras'])): self.junk()})
        )

    def do_camera_name(self):
        return packb(
            self.valid()
            | dict(
                images={
                    self.rng.choice(
                        [
                            'left',
                            '',
                            'primary ',
                            'PRIMARY',
                            '../primary',
                            '__class__',
                            'x' * 2000,
                            'é\u202e',
                        ]
                    ): np.zeros((112, 112, 3), np.uint8)
                }
            )
        )

    def do_huge_shape(self):
        shape = self.rng.choice(
            [
                [1 << 40],
                [1 << 20, 1 << 20, 3],
                [0, 1 << 62],
                [-1],
                [2**63, 2],
                [1] * 64,
                [3, 112.0, 112],
                'abc',
                None,
                [1 << 24] * 5,
                {},
            ]
        )
        return packb(
            self.valid()
            | dict(
                images={
                    list(self.about['cameras'])[0]: array(
                        b'\0' * self.rng.randrange(100), '|u1', shape
                    )
                }
            )
        )

    def do_dtype(self):
        return packb(
            self.valid()
            | dict(
                state=array(
                    self.rng.randbytes(32),
                    self.rng.choice(
                        [
                            '|O',
                            'O',
                            '|V8',
                            '<U9',
                            '|S4',
                            '<M8[s]',
                            '<c16',
                            'f4,f4',
                            '(2,)f4',
                            ('f4', 'i4'),
                            '',
                            'object',
                            None,
                            7,
                            '>f8',
                            '<b8',
                            'x' * 99,
                        ]
                    ),
                    [4],
                )
            )
        )

    def do_not_finite(self):
        x = self.np.normal(size=self.about['state']).astype(np.float32)
        x[self.rng.randrange(len(x))] = self.rng.choice([np.nan, np.inf, -np.inf])
        return packb(self.valid() | dict(state=x))

    def do_size(self):
        h, w, c = (self.rng.choice([0, 1, 3, 4, 111, 113, 300]) for _ in range(3))
        return packb(
            self.valid()
            | dict(images={list(self.about['cameras'])[0]: np.zeros((h, w, c), np.uint8)})
        )

    def do_nesting(self):
        n = self.rng.choice([10, 500, 1023, 5000, 200000])
        return self.rng.choice([b'\x91', b'\x81\xa1a', b'\x92\x80']) * n + b'\xc0'

    def do_bomb(self):
        return self.rng.choice(
            [
                b'\xdd\x00\x00\x04\x00' + b'\x80' * 1024,
                b'\xdc\x04\x00' * 900,
                b'\x9f' * 100 + b'\x80' * 100000,
                b'\xdc\x01\x00' + (b'\xdc\x04\x00' + b'\xc0' * 1024) * 256,
            ]
        )

    def do_claims(self):
        return (
            self.rng.choice([b'\xdd', b'\xdf', b'\xc6', b'\xdb', b'\xc9'])
            + self.rng.randbytes(4)
            + self.rng.randbytes(self.rng.randrange(50))
        )

    def do_order(self):
        return packb(
            self.valid()
            | self.rng.choice(
                [
                    dict(tick=0),
                    dict(tick=2**53),
                    dict(tick=2**60),
                    dict(tick=self.rng.randrange(10**6)),
                    dict(seed=2**70 % 2**64),
                    dict(tick=-5),
                    dict(reset=True, tick=3, frame_only=True),
                ]
            )
        )

    def do_history(self):
        k = self.rng.choice([0, 1, 5])
        frames = np.zeros(
            (k, *self.about['cameras'][list(self.about['cameras'])[0]]['shape']), np.uint8
        )
        return packb(
            self.valid()
            | dict(
                reset=True,
                tick=9,
                history=frames,
                history_ticks=self.rng.choice(
                    [
                        [1] * k,
                        list(range(k + 1)),
                        list(range(k))[::-1],
                        'ab',
                        [1 << 60] * k,
                        np.arange(k),
                        list(range(20, 20 + k)),
                        [None] * k,
                    ]
                ),
            )
        )

    def do_prompt(self):
        return packb(
            self.valid()
            | dict(
                prompt=self.rng.choice(
                    [
                        '',
                        ' ',
                        '\0' * 50,
                        'a ' * 490,
                        '\U0001f916' * 200,
                        'x' * 1001,
                        '<|endoftext|>' * 20,
                        '\u202e' * 9,
                        b'bytes',
                    ]
                )
            )
        )

    def do_utf8(self):
        return b'\x81\xa6prompt\xa4' + self.rng.choice(
            [b'\xff\xfe\xfd\xfc', b'\xed\xa0\x80a', b'\xc0\x80ab']
        )

    def do_text(self):
        return self.rng.choice(['hello', '', '{"prompt": "x"}', 'x' * 100000])

    def do_keys(self):
        return packb(
            self.rng.choice(
                [
                    {1: 2},
                    {None: 1},
                    {'__class__': 1},
                    {b'__ndarray__': True},
                    {b'__npgeneric__': True, b'data': [1], b'dtype': '<f4'},
                    [],
                    7,
                    None,
                    'a',
                    self.valid() | {'extra': 1},
                    {'images': {b'__ndarray__': True}},
                ]
            )
        )


def memory(pid):
    "Resident megabytes now and at most, of a process."
    text = Path(f'/proc/{pid}/status').read_text()
    return tuple(
        int(re.search(rf'{k}:\s+(\d+)', text)[1]) / 1024 for k in ('VmRSS', 'VmHWM')
    )


def attack(address, about, seed, count, tally, failures, until):
    """Send `count` fuzzed messages, one after the other; every one must get an answer or an
    end of the connection with a reason.
    """
    fuzz, ws = Fuzz(about, seed), None
    for k in range(count):
        if time.monotonic() > until:
            failures.append(f'attacker {seed} ran out of time after {k} messages')
            return
        kind, data = (
            ('oversized', b'\0' * (about['limits']['message'] + 1))
            if k % 500 == 499
            else fuzz.draw()
        )
        try:
            if ws is None:
                ws = connect(
                    f'ws://{address}',
                    compression=None,
                    max_size=None,
                    ping_interval=None,
                    proxy=None,
                    close_timeout=1,
                ).__enter__()
                ws.recv(timeout=60)
            ws.send(data)
            answer = ws.recv(timeout=60)
            if isinstance(answer, str) and not answer.startswith('refused: '):
                failures.append(f'{kind}: {answer}')
            tally[kind, 'refused' if isinstance(answer, str) else 'answered'] += 1
        except ConnectionClosed as e:
            tally[kind, f'closed {e.rcvd.code if e.rcvd else "without reason"}'] += 1
            ws = None
        except (TimeoutError, OSError, WebSocketException) as e:
            failures.append(f'{kind}: {e!r}')
            ws = None
    if ws:
        ws.close()


def vanish(address, about, seed, rounds, tally, failures, until):
    "Connect and leave in the rudest moments."
    rng, host, port = random.Random(seed), *address.split(':')
    good = Honest(about, seed, 3).steps
    for k in range(rounds):
        if time.monotonic() > until:
            failures.append(f'vanishing client {seed} ran out of time')
            return
        how = rng.choice(
            [
                'raw',
                'half handshake',
                'at once',
                'after request',
                'mid message',
                'fragment',
                'no reading',
                'proper',
            ]
        )
        try:
            if how in ('raw', 'half handshake'):
                with socket.create_connection((host, int(port)), 10) as s:
                    s.sendall(
                        rng.randbytes(200)
                        if how == 'raw'
                        else b'GET / HTTP/1.1\r\nHost: x\r\nUpgr'
                    )
                    time.sleep(rng.random())
            else:
                ws = connect(
                    f'ws://{address}',
                    compression=None,
                    max_size=None,
                    ping_interval=None,
                    proxy=None,
                    close_timeout=1,
                ).__enter__()
                if how != 'at once':
                    ws.recv(timeout=60)
                    if how == 'mid message':
                        ws.socket.sendall(b'\x82\xfe\xff\xff\0\0\0\0' + b'abc')
                    elif how == 'fragment':
                        ws.socket.sendall(b'\x02\x83\0\0\0\0abc')
                    else:
                        for m in good[: rng.randrange(1, 3)]:
                            ws.send(packb(m))
                        if how == 'proper':
                            ws.recv(timeout=60)
                        elif how == 'no reading':
                            time.sleep(rng.random() / 2)
                if how == 'proper':
                    ws.close()
                else:
                    ws.socket.shutdown(socket.SHUT_RDWR)
                    ws.socket.close()
            tally['vanished', how] += 1
        except (OSError, WebSocketException, TimeoutError) as e:
            tally['vanished', f'{how}: {type(e).__name__}'] += 1


def witness(address, episode, want, results, over, until):
    "Play the episode until the attack is over; each time the same bytes."
    try:
        with PolicyClient(address, timeout=120) as c:
            while not over.is_set() and time.monotonic() < until:
                results.append(episode.play(c) == want)
    except Exception as e:
        results.append(f'{type(e).__name__}: {e}')


def start_server(args):
    command = [
        sys.executable,
        '-m',
        'halo.deploy.serve',
        '--policy',
        args.policy,
        '--port',
        '0',
        '--threads',
        '1',
        '--clients',
        str(args.clients * 2 + 20),
        '--batch',
        str(args.batch),
    ]
    process = subprocess.Popen(
        command,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=args.log.open('w') if args.log else subprocess.DEVNULL,
        text=True,
    )
    found = re.search(r'ws://([\d.]+:\d+)', process.stdout.readline())
    if not found:
        raise SystemExit('the server did not start: ' + ' '.join(command))
    return process, found[1]


def storm(address, about, args, tally, failures, until):
    "All attackers at once; a list of started threads."
    share = [
        args.messages // args.attackers + (k < args.messages % args.attackers)
        for k in range(args.attackers)
    ]
    jobs = [(attack, k, n) for k, n in enumerate(share)] + [
        (vanish, 1000 + k, args.rounds) for k in range(args.clients)
    ]
    threads = [
        threading.Thread(
            target=fn, args=(address, about, seed, n, tally, failures, until), daemon=True
        )
        for fn, seed, n in jobs
    ]
    for t in threads:
        t.start()
    return threads


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--policy', default='checkpoints/flash_place/full')
    p.add_argument('--messages', type=int, default=10000)
    p.add_argument(
        '--clients', type=int, default=50, help='clients that vanish, all at the same time'
    )
    p.add_argument('--rounds', type=int, default=4, help='connections of each of them')
    p.add_argument(
        '--attackers',
        type=int,
        default=4,
        help='connections that share the fuzzed messages',
    )
    p.add_argument('--batch', type=int, default=1)
    p.add_argument('--limit', type=float, default=400, help='seconds for all of it')
    p.add_argument('--log', type=Path, help='the server\'s log')
    p.add_argument('--json', type=Path)
    args = p.parse_args()
    until, tally, failures, over = (
        time.monotonic() + args.limit,
        collections.Counter(),
        [],
        threading.Event(),
    )
    process, address = start_server(args)
    try:
        with PolicyClient(address) as c:
            about = c.metadata
            episodes = [Honest(about, 70 + k) for k in range(2)]
            want = [e.play(c) for e in episodes]
        before, began = memory(process.pid), time.monotonic()
        results = [[] for _ in episodes]
        watching = [
            threading.Thread(
                target=witness, args=(address, e, w, r, over, until), daemon=True
            )
            for e, w, r in zip(episodes, want, results)
        ]
        for t in watching:
            t.start()
        threads, marks = storm(address, about, args, tally, failures, until), []
        while any(t.is_alive() for t in threads) and time.monotonic() < until + 70:
            time.sleep(1)
            marks.append(round(memory(process.pid)[0]))
        over.set()
        for t in watching:
            t.join(130)
        seconds, after, alive = (
            time.monotonic() - began,
            memory(process.pid),
            process.poll() is None,
        )
        time.sleep(1)
        health = json.loads(urlopen(f'http://{address}/healthz', timeout=20).read())
        with PolicyClient(address) as c:
            again = [e.play(c) for e in episodes] == want
    finally:
        process.terminate()
        status = process.wait(60)
    kinds = collections.defaultdict(dict)
    for (kind, fate), n in sorted(tally.items()):
        kinds[kind][fate] = n
    for kind, fates in kinds.items():
        print(f'{kind:12}', ', '.join(f'{n} {fate}' for fate, n in fates.items()))
    sent = sum(n for (kind, _), n in tally.items() if kind != 'vanished')
    same = [sum(r is True for r in rs) for rs in results]
    ok = dict(
        server_up=alive and status == 0,
        all_messages_answered=sent == args.messages and not failures,
        witnesses_identical=again
        and all(same)
        and all(r is True for rs in results for r in rs),
        memory_growth=after[0] - before[0] < GROWTH,
        memory_peak=after[1] - before[1] < PEAK,
        sessions_freed=health['clients'] <= 1,
    )
    print(
        f"{sent} fuzzed messages and {sum(kinds['vanished'].values())} vanishing"
        f" connections of {args.clients} clients in {seconds:.0f} s"
    )
    print(
        f"witness episodes during the attack: {same} of {[len(rs) for rs in results]}"
        " bit-identical to the undisturbed run; after it:"
        f" {'identical' if again else 'DIFFERENT'}"
    )
    print(
        f'server memory (RSS): {before[0]:.0f} MB before, {after[0]:.0f} MB after (growth'
        f' {after[0] - before[0]:+.0f}, bound {GROWTH}), peak {after[1]:.0f} MB (bound'
        f' +{PEAK}); each tenth: {marks[:: max(1, len(marks) // 10)]}'
    )
    print('health:', health)
    for f in [*failures, *(r for rs in results for r in rs if r is not True)][:10]:
        print('FAILURE', f)
    print('bars:', ', '.join(f"{k} {'ok' if v else 'FAILED'}" for k, v in ok.items()))
    if args.json:
        args.json.write_text(
            json.dumps(
                dict(
                    bars=ok,
                    sent=sent,
                    seconds=seconds,
                    tally={k: dict(v) for k, v in kinds.items()},
                    rss_mb=dict(before=before, after=after, marks=marks),
                    witnesses=same,
                    health=health,
                ),
                indent=1,
            )
        )
    sys.exit(not all(ok.values()))


if __name__ == '__main__':
    main()
