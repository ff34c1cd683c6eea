"""Compare the times of methods. They take turns in one process, so that changes of the machine affect all of
them."""

import os
import statistics
import threading
import time

import pyro


class Method:
    """A method with its times and a separate param store. ``make()`` returns the function to be timed."""

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
    """Let threads on all cores wake each other for some time, so that all turns begin in the same state.

    A hypervisor may run the cores of a virtual machine on distant caches, where steps are slower, until a
    core wakes another. Waiting threads of torch do not sleep but those of other libraries do, so without this
    the time of a turn would depend on the method of the previous turn.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    wake = [threading.Semaphore(0) for _ in cores]
    end = time.perf_counter() + seconds

    def pass_on(i):
        os.sched_setaffinity(0, cores[i : i + 1])  # of this thread only
        now = 0.0
        while now < end:
            wake[i].acquire()
            wake[i - 1].release()
            now = time.perf_counter()

    threads = [threading.Thread(target=pass_on, args=(i,)) for i in range(len(cores))]
    for thread in threads:
        thread.start()
    wake[0].release()
    for thread in threads:
        thread.join()


def measure(makers, *, rounds, num_calls, warm_up=5, warm=1):
    """Seconds per call: a list over rounds for each method.

    :param makers: for each name the ``make`` of a :class:`Method`.
    :param warm_up: calls before the first round, which are not timed.
    :param warm: calls at the start of each turn, which are not timed.
    """
    methods = {name: Method(make) for name, make in makers.items()}
    for method in methods.values():
        method.take_turn(1, warm=warm_up, counts=False)
    for _ in range(rounds):
        for method in methods.values():
            method.take_turn(num_calls, warm=warm)
    return {name: method.times for name, method in methods.items()}


def print_table(title, columns, base):
    """Print a row for each method: the median and quartiles over rounds of time / time of ``base``, and the
    median time.

    :param columns: for each column the times of :func:`measure`.
    """
    names = list(dict.fromkeys(name for times in columns.values() for name in times))
    print(f"\n{title}: time / time of {base} (quartiles), time\n")
    print("| |" + "".join(f" {heading} |" for heading in columns))
    print("|---|" + "---|" * len(columns))
    for name in names:
        print(
            f"| {name} |" + "".join(f" {_cell(times, name, base)} |" for times in columns.values()),
            flush=True,
        )


def _cell(times, name, base):
    if name not in times:
        return ""
    ratios = [time / base_time for time, base_time in zip(times[name], times[base], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    seconds = statistics.median(times[name])
    unit = f"{seconds:.2f} s" if seconds > 0.1 else f"{1000 * seconds:.2f} ms"
    return f"**{middle:.2f}** ({low:.2f}–{high:.2f}), {unit}"
