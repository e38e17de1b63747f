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
    "Counters that a test moves: seconds, and cores used by all and by this process."
    now = dict(at=0.0, all=0.0, own=0.0)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(C.time, 'monotonic', lambda: now['at'])
    monkeypatch.setattr(C.Work, 'now', classmethod(lambda cls, cores: cls(**now)))
    monkeypatch.setattr(C, 'own_cores', lambda: [0, 1, 2, 3])
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
    clock(3, others=2.2, own=1)
    assert '2 threads now' in c.look() and torch.get_num_threads() == 2
    clock(3, others=2.2, own=2)  # what it does itself is nobody else's
    assert c.look() == '' and torch.get_num_threads() == 2
    clock(3, others=0.1, own=2)
    assert 'slower' not in c.look() and torch.get_num_threads() == 4


@pytest.mark.parametrize('why', ['asked', 'one'])
def test_threads_that_were_set_stay(clock, monkeypatch, why):
    if why == 'asked':
        monkeypatch.setenv('OMP_NUM_THREADS', '4')
    else:
        torch.set_num_threads(1)
    before, c = torch.get_num_threads(), C.Cores(every=0.5)
    clock(3, others=4, own=0)
    assert c.look() == '' and torch.get_num_threads() == before


def test_the_kernel_counts_the_work_of_others():
    "A process that does nothing but look at the clock is work of others; one's own is not."
    before, cores = C.Work.now(C.own_cores()), C.own_cores()
    busy = 'import time; e = time.time() + 2\nwhile time.time() < e: pass'
    with subprocess.Popen([sys.executable, '-c', busy]) as other:
        other.wait()
    used = before.others(C.Work.now(cores))
    assert 0.4 < used <= len(cores) + 0.1
    before, end = C.Work.now(cores), time.monotonic() + 1
    while time.monotonic() < end:
        pass
    after = C.Work.now(cores)
    assert 0.4 < after.own - before.own < 1.2
    assert set(cores) <= set(range(os.cpu_count()))
