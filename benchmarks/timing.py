"""How ways of doing the same are compared: in turns, in one process, so that a slow minute is slow for all."""

import os
import statistics
import threading
import time

import pyro


class Way:
    """One way to do something, called again and again: ``make()`` returns the call. It has a param store of its own."""

    def __init__(self, make):
        self.store = {"params": {}, "constraints": {}}
        self.times = []
        with pyro.get_param_store().scope(self.store):
            self.call = make()

    def take_turn(self, num_calls, *, warm=1, counts=True):
        gather_cores()
        with pyro.get_param_store().scope(self.store):
            for _ in range(warm):
                self.call()
            start = time.perf_counter()
            for _ in range(num_calls):
                self.call()
        if counts:
            self.times.append((time.perf_counter() - start) / num_calls)


def gather_cores(seconds=0.5):
    """Let threads on all cores wake one another for a while, for each turn to begin alike. A hypervisor may leave the cores of
    a virtual machine on caches far apart, where steps are slower, until one core wakes another. Threads of torch that wait do
    not sleep, those of other libraries do: who went before would decide how fast the next one is."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    turns = [threading.Semaphore(0) for _ in cores]
    end = time.perf_counter() + seconds

    def pass_on(i):
        os.sched_setaffinity(0, cores[i : i + 1])  # of this thread alone
        now = 0.0
        while now < end:
            turns[i].acquire()
            turns[i - 1].release()
            now = time.perf_counter()

    threads = [threading.Thread(target=pass_on, args=(i,)) for i in range(len(cores))]
    for thread in threads:
        thread.start()
    turns[0].release()
    for thread in threads:
        thread.join()


def measure(makers, *, rounds, num_calls, warm_up=5, warm=1):
    """Seconds of one call, by way and round. The first round warms up and does not count."""
    ways = {name: Way(make) for name, make in makers.items()}
    for way in ways.values():
        way.take_turn(1, warm=warm_up, counts=False)
    for _ in range(rounds):
        for way in ways.values():
            way.take_turn(num_calls, warm=warm)
    return {name: way.times for name, way in ways.items()}


def print_table(title, columns, base):
    """A row for each way: time / time of ``base``, the median over rounds of paired times with quartiles, and the time.

    :param columns: for each heading the times of :func:`measure`.
    """
    names = list(dict.fromkeys(name for times in columns.values() for name in times))
    print(f"\n{title}: time / time of {base} (quartiles), time\n")
    print("| |" + "".join(f" {heading} |" for heading in columns))
    print("|---|" + "---|" * len(columns))
    for name in names:
        print(f"| {name} |" + "".join(f" {_cell(times, name, base)} |" for times in columns.values()), flush=True)


def _cell(times, name, base):
    if name not in times:
        return ""
    ratios = [own / other for own, other in zip(times[name], times[base], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    seconds = statistics.median(times[name])
    unit = f"{seconds:.2f} s" if seconds > 0.1 else f"{1000 * seconds:.2f} ms"
    return f"**{middle:.2f}** ({low:.2f}–{high:.2f}), {unit}"
