"""How long the phases of a run take, and what is left of it."""
import time


class ProgressTimer:
    """Measures the phases of a run; str() of it is "1.2 s/iteration, ETA 3 min".

    A phase without a finished step counts with its estimate. bar: a tqdm bar of iterations.
    """

    def __init__(self):
        self.total, self.estimate, self.done, self.spent = {}, {}, {}, {}
        self.bar = None
        self._last = time.perf_counter()

    def add_phase(self, phase, total, estimate):
        """Announce `total` steps of about `estimate` seconds each."""
        self.total[phase], self.estimate[phase] = total, estimate
        self.done[phase], self.spent[phase] = 0, 0.0
        self._last = time.perf_counter()

    def advance(self, phase, count):
        """`count` steps were made before the run was interrupted."""
        self.total[phase] -= count
        if self.bar is not None and phase == "iteration":
            self.bar.update(count)

    def step(self, phase):
        """A step has taken the time since the step before it."""
        now = time.perf_counter()
        self.done[phase] += 1
        self.spent[phase] += now - self._last
        self._last = now
        if self.bar is not None and phase == "iteration":
            self.bar.update()
            self.bar.set_postfix_str(f"ETA {format_duration(self.eta())}")

    def seconds(self, phase):
        """Seconds of one step: measured if one was made, else estimated."""
        return self.spent[phase] / self.done[phase] if self.done[phase] else self.estimate[phase]

    def eta(self):
        """Seconds to the end of the run."""
        return sum(max(self.total[p] - self.done[p], 0) * self.seconds(p) for p in self.total)

    def __str__(self):
        seconds = format_duration(self.seconds("iteration"))
        return f"{seconds}/iteration, ETA {format_duration(self.eta())}"


def format_duration(seconds):
    """'4.5 s', '12 min' or '3.4 h'."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
