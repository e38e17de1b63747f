"""configs/launch/slurm_4x8.sh on a real Slurm: two virtual machines inside this one, each
with a name of its own. As root: python scripts/slurm_check.py [--time-limit]

A private cluster (munged, slurmctld, two slurmd; everything in a temporary folder, on
loopback) takes the shipped script with smaller numbers on sbatch's command line.
The job is warned with SIGUSR1 in the middle, must save, leave with 75, queue itself again
and go on; its losses must be those of torchrun without a stop. GPUs are names only:
training runs on the CPU.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT, HOSTS = ROOT / 'configs/launch/slurm_4x8.sh', ('n1', 'n2')
CONF = """
ClusterName=halo
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={at}/munge.socket,cred_expire=5
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool-%n
SlurmctldPidFile={at}/slurmctld.pid
SlurmdPidFile={at}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
NodeName=n1 NodeAddr=127.0.0.11 Port={ports[1]} CPUs=64 Gres=gpu:8
NodeName=n2 NodeAddr=127.0.0.12 Port={ports[2]} CPUs=64 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    "Why a private Slurm cannot be started here; '' if it can."
    absent = [
        c
        for c in ('munged', 'slurmctld', 'slurmd', 'sbatch', 'unshare')
        if not shutil.which(c, path=os.environ['PATH'] + ':/usr/sbin:/sbin')
    ]
    if absent:
        return (
            f"Slurm is not installed here ({', '.join(absent)} missing); on Debian or"
            " Ubuntu: apt-get install -y slurm-wlm munge"
        )
    if os.geteuid():
        return (
            "each virtual machine gets a name of its own, which takes root; run it with"
            " sudo"
        )
    tried = subprocess.run(
        ['unshare', '--uts', '--mount', 'true'], capture_output=True, text=True
    )
    return (
        f'no new name space for a virtual machine ({tried.stderr.strip()}); run it where'
        ' unshare is allowed'
        if tried.returncode
        else ''
    )


def free_ports(n: int) -> list[int]:
    socks = [socket.socket() for _ in range(n)]
    for s in socks:
        s.bind(('127.0.0.1', 0))
    out = [s.getsockname()[1] for s in socks]
    for s in socks:
        s.close()
    return out


def wait(what: str, test, seconds: float, every: float = 0.5):
    "`test()` once it is true. Raises `TimeoutError`."
    end = time.time() + seconds
    while not (found := test()):
        if time.time() > end:
            raise TimeoutError(f'{what}: not within {seconds:.0f} s')
        time.sleep(every)
    return found


class Cluster:
    "A Slurm of two virtual machines while it is entered; `call` runs its commands."

    def __init__(self, at: Path):
        self.at, self.procs = at, []

    def start(self, name: str, *command) -> None:
        log = open(self.at / f'{name}.log', 'w')
        self.procs.append(
            (
                name,
                subprocess.Popen(
                    [str(c) for c in command],
                    stdout=log,
                    stderr=log,
                    env=self.env,
                    cwd=self.at,
                    start_new_session=True,
                ),
            )
        )

    def call(self, *command) -> str:
        done = subprocess.run(
            [str(c) for c in command],
            capture_output=True,
            text=True,
            env=self.env,
            cwd=ROOT,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
        return done.stdout.strip()

    def __enter__(self):
        # munge wants a way in for everybody
        at = self.at
        (at / 'state').mkdir(parents=True)
        [d.chmod(0o755) for d in (at, at.parent)]
        ports = free_ports(4)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        self.env = {
            k: v for k, v in os.environ.items() if not k.startswith('SLURM_')
        } | dict(
            PATH=path,
            SLURM_CONF=f'{at}/slurm.conf',
            PYTHONPATH=str(ROOT),
            MASTER_PORT=str(ports[3]),
            OMP_NUM_THREADS='1',
        )
        (at / 'slurm.conf').write_text(
            CONF.format(at=at, ports=ports, user=os.environ.get('USER') or 'root')
        )
        for k in range(8):
            (at / f'gpu{k}').touch()
        (at / 'gres.conf').write_text(f'Name=gpu File={at}/gpu[0-7]\n')
        (at / 'hosts').write_text(
            '127.0.0.1 localhost\n'
            + ''.join(f'127.0.0.{11 + k} {h}\n' for k, h in enumerate(HOSTS))
        )
        key = at / 'munge.key'
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.start(
            'munged',
            'munged',
            '-F',
            *(
                f'--{k}={at}/munge.{v}'
                for k, v in (
                    ('key-file', 'key'),
                    ('socket', 'socket'),
                    ('pid-file', 'pid'),
                    ('log-file', 'log'),
                    ('seed-file', 'seed'),
                )
            ),
        )
        try:
            wait('munged', (at / 'munge.socket').exists, 20)
            self.start('slurmctld', 'slurmctld', '-D')
            for h in HOSTS:
                self.start(
                    f'slurmd-{h}',
                    'unshare',
                    '--uts',
                    '--mount',
                    'bash',
                    '-c',
                    f'mount --bind {at}/hosts /etc/hosts && hostname {h} && exec slurmd -D'
                    f' -N {h}',
                )
            wait(
                'two idle machines',
                lambda: (
                    subprocess.run(
                        ['sinfo', '-h', '-N', '-o', '%T'],
                        capture_output=True,
                        text=True,
                        env=self.env,
                    ).stdout.split()
                    == ['idle'] * 2
                ),
                60,
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *a):
        jobs = subprocess.run(
            ['squeue', '-h', '-o', '%A'], capture_output=True, text=True, env=self.env
        ).stdout.split()
        if jobs:
            subprocess.run(
                ['scancel', '--full', '--signal=KILL', *jobs],
                capture_output=True,
                env=self.env,
            )
            subprocess.run(['scancel', *jobs], capture_output=True, env=self.env)
            end = time.time() + 40
            while (
                time.time() < end
                and subprocess.run(
                    ['squeue', '-h'], capture_output=True, text=True, env=self.env
                ).stdout.strip()
            ):
                time.sleep(1)
        # the machines first, then the controller, then munge
        for _, p in reversed(self.procs):
            p.terminate()
            try:
                p.wait(15)
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()

    def job(self, number: str) -> dict:
        "What `scontrol show job` says."
        return dict(
            x.split('=', 1)
            for x in self.call('scontrol', 'show', 'job', '-o', number).split()
            if '=' in x
        )


def check(place: Path, steps: int = 24, time_limit: bool = False) -> dict:
    "The proof; returns what was measured."
    import yaml

    sys.path.insert(0, str(ROOT / 'tests'))
    import torch
    from safetensors.torch import load_file
    from test_scale import quiet, record, torchrun

    from halo.train.scale import read_rows

    record(place / 'data', (20, 24))
    # only a warning saves before the end
    conf = dict(
        data=dict(
            root=str(place / 'data'), repo_id='halo/scale', store=str(place / 'store')
        ),
        policy=dict(
            preset='tiny',
            history_frames=2,
            history_stride=2,
            chunk_size=6,
            n_action_steps=4,
        ),
        batch=8,
        run=dict(
            steps=steps,
            micro=1,
            accumulate=2,
            replicate=2,
            shard=2,
            lr=1e-3,
            warmup=2,
            ema=0.9,
            log_every=1,
            save_every=10 * steps,
        ),
    )
    for name in ('slurm', 'torchrun'):
        (place / f'{name}.yaml').write_text(
            yaml.safe_dump(conf | dict(out=str(place / name)))
        )
    rows, events = (
        lambda: read_rows(place / 'slurm/metrics.jsonl'),
        lambda: [r['event'] for r in read_rows(place / 'slurm/events.jsonl')],
    )
    with Cluster(place / 'cluster') as c:
        print(
            'slurm:',
            c.call('sbatch', '--version'),
            '|',
            ', '.join(c.call('sinfo', '-h', '-N', '-o', '%N %c CPUs %G').splitlines()),
            flush=True,
        )
        smaller = [
            '--nodes=2',
            '--ntasks-per-node=2',
            '--gpus-per-node=2',
            *(['--time=3', '--signal=USR1@60'] if time_limit else []),
        ]
        job = c.call(
            'sbatch',
            '--parsable',
            f'--output={place}/job.log',
            *smaller,
            SCRIPT,
            place / 'slurm.yaml',
            '--device',
            'cpu',
        )
        if not time_limit:
            wait('a third of the steps', lambda: len(rows()) >= steps // 3, 1800)
            c.call('scancel', '--signal=USR1', job)
        wait(
            'a saved stop', lambda: any('asked to stop; saved' in e for e in events()), 1800
        )
        wait('queued again', lambda: c.job(job).get('Restarts') == '1', 60)
        stopped = [e for e in events() if 'asked' in e][0]
        wait(
            'the end of the job',
            lambda: (
                c.job(job)['JobState']
                not in ('PENDING', 'RUNNING', 'COMPLETING', 'CONFIGURING')
            ),
            3600,
            1,
        )
        state = c.job(job)
    log = (place / 'job.log').read_text()
    left = log.count('exit code 75') and sorted(
        {l.split()[2].rstrip(':') for l in log.splitlines() if 'exit code 75' in l}
    )
    print(
        f"slurm: job {job}: {stopped}; left with 75 on {left}; restarts"
        f" {state['Restarts']}, {state['JobState']}, exit code {state['ExitCode']}; starts:"
        f" {[e.split(':')[0] for e in events() if e.startswith('start')]}",
        flush=True,
    )
    quiet(torchrun(4, place / 'torchrun.yaml'), env=c.env)
    a, b = (read_rows(place / n / 'metrics.jsonl') for n in ('slurm', 'torchrun'))
    wa, wb = (
        load_file(str(place / n / 'policy/model.safetensors'))
        for n in ('slurm', 'torchrun')
    )
    differ = sum(x['loss'] != y['loss'] for x, y in zip(a, b))
    weights = sum(not torch.equal(wa[k], wb[k]) for k in wb)
    print(
        f"slurm: loss {a[0]['loss']:.4f} -> {a[-1]['loss']:.4f}; {differ} of {len(a)}"
        f" losses and {weights} of {len(wb)} weights differ from torchrun's {len(b)} steps"
        " without a stop"
    )
    assert (
        state['JobState'] == 'COMPLETED'
        and int(state['Restarts']) >= 1
        and left == list(HOSTS)
        and len(a) == len(b) == steps
        and not differ
        and not weights
        and wa.keys() == wb.keys()
    )
    return dict(
        steps=steps,
        restarts=int(state['Restarts']),
        stopped=stopped,
        differing_losses=differ,
        differing_weights=weights,
    )


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--steps', type=int, default=24)
    p.add_argument(
        '--time-limit',
        action='store_true',
        help=(
            'let the warning come from the end of a three-minute allocation, as in earnest'
        ),
    )
    p.add_argument('--keep', action='store_true', help='leave the folder')
    a = p.parse_args()
    if why := missing():
        print(why)
        return 1
    place = Path(tempfile.mkdtemp(prefix='halo-slurm-'))
    try:
        check(place, a.steps, a.time_limit)
    except (TimeoutError, RuntimeError, AssertionError) as e:
        print(f'slurm: FAILED {type(e).__name__}: {e}')
        for f in (place / 'job.log', *sorted((place / 'cluster').glob('*.log'))):
            if f.exists():
                print(f'--- {f.name}\n' + '\n'.join(f.read_text().splitlines()[-15:]))
        return 1
    finally:
        a.keep and print(place) or shutil.rmtree(place, ignore_errors=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
