"""How long a run takes, and what is left of it."""
import time


class ProgressTimer:
    """How long the phases of a run take and what is left; str() of it is "1.2 s/iteration, ETA 3 min".

    `expect` announces a phase; `lap` ends one. A phase that never ended counts with its estimate.
    """

    def __init__(self):
        self.total, self.estimate, self.done, self.spent = {}, {}, {}, {}
        self.bar = None  # a tqdm bar of iterations
        self._last = time.perf_counter()

    def add_phase(self, phase, total, estimate):
        """`total` phases of that name will follow, of `estimate` seconds each. Starts the first lap."""
        self.total[phase], self.estimate[phase] = total, estimate
        self.done[phase], self.spent[phase] = 0, 0.0
        self._last = time.perf_counter()

    def advance(self, phase, count=1):
        """`count` phases of that name were done by an earlier part of the run."""
        self.total[phase] -= count
        if self.bar is not None and phase == "iteration":
            self.bar.update(count)

    def step(self, phase):
        """The time since the last lap was one phase of that name."""
        now = time.perf_counter()
        self.done[phase] += 1
        self.spent[phase] += now - self._last
        self._last = now
        if self.bar is not None and phase == "iteration":
            self.bar.update()
            self.bar.set_postfix_str(f"ETA {duration(self.eta())}")

    def seconds(self, phase):
        """Seconds of one such phase: measured if one has ended, else estimated."""
        return self.spent[phase] / self.done[phase] if self.done[phase] else self.estimate[phase]

    def eta(self):
        """Seconds to the end of the run."""
        return sum(max(self.total[p] - self.done[p], 0) * self.seconds(p) for p in self.total)

    def __str__(self):
        return f"{duration(self.seconds('iteration'))}/iteration, ETA {duration(self.eta())}"


def duration(seconds):
    """'4.5 s', '12 min' or '3.4 h'."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
