"""Threads follow the cores that other processes leave free."""

import os
import subprocess
import sys
import time

import pytest
import torch

from halo.train import cores as C


@pytest.fixture
def clock(monkeypatch):
    "Counters that a test moves: seconds, and cores used by others and by this process."
    now = dict(at=0.0, all=0.0, own=0.0)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(C.time, 'monotonic', lambda: now['at'])
    monkeypatch.setattr(C.Work, 'now', classmethod(lambda cls, cores: cls(**now)))
    monkeypatch.setattr(C, 'own_cores', lambda: [0, 1, 2, 3])
    monkeypatch.setattr(C, 'quota', lambda: 100)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)

    def pass_by(seconds, others, own):
        now['at'] += seconds
        now['all'] += seconds * (others + own)
        now['own'] += seconds * own

    yield pass_by
    torch.set_num_threads(threads)


def test_a_second_run_gets_its_share_and_gives_it_back(clock):
    c = C.Cores(every=2.0)
    clock(1.9, others=4, own=0)
    assert c.look() == '' and torch.get_num_threads() == 4  # not yet
    clock(0.2, others=4, own=0)
    said = c.look()
    assert torch.get_num_threads() == 1 and '1 threads now, 4 before' in said
    assert 'use 4.0 of 4 cores' in said and 'slower' in said
    for _ in range(c.patience - 1):
        clock(3, others=0.2, own=1)  # the others have ended
        assert c.look() == '' and torch.get_num_threads() == 1
    clock(3, others=0.2, own=1)
    said = c.look()
    assert 'slower' not in said and torch.get_num_threads() == 4
    clock(3, others=0.2, own=4)  # what it does itself is nobody else's
    assert c.look() == '' and torch.get_num_threads() == 4


def test_afterwards_torch_has_the_threads_that_it_had(clock):
    "A run that was beside another leaves nothing behind for the next one."
    for _ in range(2):
        with C.Cores(every=1.0) as c:
            assert c.most == 4 and not c.held
            clock(2, others=4, own=0)
            assert c.look() and torch.get_num_threads() == 1
        assert torch.get_num_threads() == 4


def test_a_wrong_guess_is_not_made_again_soon(clock):
    "Two runs that both take the core that they both saw idle do not go on for ever."
    c, changes = C.Cores(every=1.0), 0
    for _ in range(200):
        mine = torch.get_num_threads()
        other = 3 if mine == 4 else mine  # a run that does as this one does
        busy = min(1, 3 / (mine + other))
        clock(2, others=1 + other * busy, own=mine * busy)  # a third keeps one core
        changes += bool(c.look())
    assert 2 <= changes <= 12


def test_a_containers_quota_counts(clock, monkeypatch, tmp_path):
    monkeypatch.setattr(C, 'quota', lambda: 2)
    c = C.Cores(every=1.0)
    clock(2, others=0, own=2)
    assert c.look() and torch.get_num_threads() == 2


@pytest.mark.parametrize(
    'text,cores', [('200000 100000', 2), ('50000 100000', 1), ('max 100000', 1 << 30)]
)
def test_a_quota_is_read(monkeypatch, tmp_path, text, cores):
    file = tmp_path / 'cpu.max'
    file.write_text(text + '\n')
    monkeypatch.setattr(C, '_QUOTA', file)
    assert C.quota() == cores
    monkeypatch.setattr(C, '_QUOTA', tmp_path / 'none')
    assert C.quota() == 1 << 30


def test_threads_that_were_asked_for_stay(clock, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '4')
    with C.Cores(every=0.5) as c:
        clock(3, others=4, own=0)
        assert c.look() == '' and torch.get_num_threads() == 4


BUSY = 'import time; e = time.time() + 2.5\nwhile time.time() < e: pass'


def test_the_kernel_counts_the_work_of_others():
    "Of a process that is not ours; what ours does, and what it began, is its own."
    cores = C.own_cores()
    begin = 'import subprocess, sys; subprocess.Popen([sys.executable, "-c", sys.argv[1]])'
    subprocess.run([sys.executable, '-c', begin, BUSY], check=True)
    before = C.Work.now(cores)
    time.sleep(1.5)
    others, own = before.used(C.Work.now(cores))
    assert 0.3 < others <= len(cores) + 0.1 and own < 0.3
    time.sleep(1.5)
    with subprocess.Popen([sys.executable, '-c', BUSY]) as child:
        before = C.Work.now(cores)
        time.sleep(1.5)
        assert 0.3 < before.used(C.Work.now(cores))[1] < 1.3
        child.wait()
    assert set(cores) <= set(range(os.cpu_count()))
