"""How long the next call waits for the steps of other sessions. No torch, no threads, no clock.

A call takes little longer for many sessions than for one, so it pays to wait for those whose next
steps are about to come. Each session has a rhythm: so long after its answer its next step is here,
when the answer has travelled, a token was chosen, and the step has travelled back. A `BatchWindow`
learns it, and how the time of a call grows with the steps in it. From both follows for whom to
wait: as many steps per second as possible, counted from now to the end of the call. Who is late is
not waited for until he comes again, and a session that is alone never waits.

In a crowd over several servers nobody's rhythm is exact, as each step may have waited at the server
before. But steps that shared a call there come one after another: while they keep coming, the next
one is waited for, for a twentieth of a call. A call that began without it would leave it behind for
good: two groups of sessions that came apart stay apart, and each has calls of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from swarm_notebook.server.engine.scheduling.scheduler import Kind, Task

# No call waits longer: beyond it nothing was gained by what was measured, whatever is predicted.
GATHER_SECONDS = 0.02
# A call that took so many times longer than expected counts as so many times.
_OUTLIER = 1.5
# A session that has sent nothing for so long is forgotten.
FORGET_SECONDS = 2.0
# A thread that waits shorter does nothing but look at the clock.
_MOMENT = 2e-4
# While steps keep coming, the next one is waited for so long, as a part of a call. 32 sessions over
# two cards, simulated (`tests/unit/server/engine/scheduling/test_chain.py`), had 583 tokens per
# second, and 508 without; as many with all from 0.03 to 0.1, and two sessions less with more.
_FLOWING = 0.05
# Into so many groups a crowd is cut at most: in simulated crowds of 2 to 64 sessions, calls had
# about a fourth of them at least.
_GROUPS = 4
# Waiting has to gain so much, as predictions are not exact.
_WORTH = 1.05
# The newest value's weight in running means: as in TCP's estimate of a round trip (RFC 6298), an
# eighth for what is expected, a quarter for how far it was off; and how much of that may be
# added before somebody is late.
_NEWEST, _NEWEST_DEVIATION, _LATE = 0.125, 0.25, 4.0


@dataclass(slots=True)
class _Rhythm:
    """When a session's next step comes after its answer, in seconds.

    Attributes:
        answered: when its last answer was ready; None while a step waits or runs.
        pause: from there to its next step; None before the first one has come.
        deviation: how far pauses are from it.
        seen: when it last did anything.
    """

    seen: float
    answered: float | None = None
    pause: float | None = None
    deviation: float = 0.0

    def came(self, now: float) -> None:
        self.seen = now
        if self.answered is None:
            return
        pause, self.answered = now - self.answered, None
        if self.pause is None or pause > FORGET_SECONDS:
            self.pause, self.deviation = pause, pause / 2
            return
        off = pause - self.pause
        self.deviation += _NEWEST_DEVIATION * (abs(off) - self.deviation)
        self.pause += _NEWEST * off

    def expected(self, now: float) -> float | None:
        """In how many seconds its next step comes; None if it may be long."""
        if self.answered is None or self.pause is None:
            return None
        if now >= self.answered + self.pause + _LATE * self.deviation:
            return None
        return max(self.answered + self.pause + self.deviation - now, 0.0)

    def may_come(self, now: float, soon: float) -> bool:
        """Whether its next step may come any time now, or ``soon``, be it early or late."""
        if self.answered is None or self.pause is None:
            return False
        return abs(now - self.answered - self.pause) < _LATE * self.deviation + soon


class _CallTime:
    """How long a call takes: some time, and some more for each step in it."""

    def __init__(self) -> None:
        self._weight = self._n = self._s = self._nn = self._ns = 0.0

    def ran(self, steps: int, seconds: float) -> None:
        if self._weight:
            # One that waited for something else, such as a graph to be captured, says little.
            seconds = min(seconds, _OUTLIER * self.of(steps))
        keep = 1 - _NEWEST
        self._weight = keep * self._weight + _NEWEST
        self._n = keep * self._n + _NEWEST * steps
        self._s = keep * self._s + _NEWEST * seconds
        self._nn = keep * self._nn + _NEWEST * steps * steps
        self._ns = keep * self._ns + _NEWEST * steps * seconds

    def of(self, steps: int) -> float:
        """Seconds of a call with so many steps (a line through those that ran: least squares)."""
        if not self._weight:
            return 0.0
        n, s = self._n / self._weight, self._s / self._weight
        spread = self._nn / self._weight - n * n
        slope = (self._ns / self._weight - n * s) / spread if spread > 1e-2 else 0.0
        # More steps take no less time, and no more than if each had its own call.
        slope = min(max(slope, 0.0), s / n)
        return s + slope * (steps - n)

    @property
    def usual(self) -> float:
        """How many steps a call has."""
        return self._n / self._weight if self._weight else 1.0


class BatchWindow:
    """Learns when steps come, and says how long the next call should wait for them.

    Attributes:
        awaited: for how many more steps it was to wait, when it was asked last.
    """

    awaited: int

    def __init__(self) -> None:
        self.awaited = 0
        self._rhythms: dict[Hashable, _Rhythm] = {}
        self._call = _CallTime()
        self._newest = 0.0  # when the last step came

    def came(self, task: Task, now: float) -> None:
        """A step has arrived."""
        if task.kind is Kind.STEP and task.group is not None:
            self._rhythms.setdefault(task.session, _Rhythm(now)).came(now)
            self._newest = max(self._newest, now)

    def ran(self, tasks: Iterable[Task], seconds: float, now: float) -> None:
        """A call for steps has just run."""
        count = 0
        for task in tasks:
            count += 1
            if (rhythm := self._rhythms.get(task.session)) is not None:
                rhythm.answered = rhythm.seen = now
        self._call.ran(count, seconds)
        gone = [
            session
            for session, rhythm in self._rhythms.items()
            if rhythm.seen < now - FORGET_SECONDS
        ]
        for session in gone:
            del self._rhythms[session]

    def patience(self, waiting: int, now: float) -> float:
        """Seconds to wait for more than the ``waiting`` steps that could share a call."""
        if not waiting:
            return 0.0
        room = max(self._largest() - waiting, 0)
        found = (rhythm.expected(now) for rhythm in self._rhythms.values())
        coming = sorted(seconds for seconds in found if seconds is not None)
        del coming[room:]
        best, patience = _WORTH * waiting / max(self._call.of(waiting), 1e-9), 0.0
        for count, seconds in enumerate(coming, waiting + 1):
            if seconds > GATHER_SECONDS:
                break
            rate = count / max(seconds + self._call.of(count), 1e-9)
            if rate > best:
                # At least a moment: who is expected right now is not here yet.
                best, patience = rate, max(seconds, _MOMENT)
                self.awaited = count - waiting
        moment = self._flows_for(waiting, now)
        if moment > max(patience, _MOMENT):
            more = sum(rhythm.may_come(now, moment) for rhythm in self._rhythms.values())
            if more := min(more, room):
                self.awaited, patience = more, moment
        return patience

    def _flows_for(self, waiting: int, now: float) -> float:
        """Seconds within which the next step must be here, or steps do not keep coming."""
        call = self._call.of(waiting)
        # One more step is worth a wait of what it saves, shared by those that wait.
        saved = call - waiting * (self._call.of(waiting + 1) - call)
        return self._newest + min(_FLOWING * call, saved / waiting) - now

    def _largest(self) -> int:
        """How many steps a call is to have at most, for as many per second as possible.

        Sessions that share each call wait for one another, and nothing is computed until the last
        is back. In two groups one is read and answered while the other computes. So it goes by what
        takes longer: the calls of all groups, or a group's call and its way back; that way is
        longer the more are answered at once, as one thread reads and answers all.
        """
        pauses = [rhythm.pause for rhythm in self._rhythms.values() if rhythm.pause is not None]
        pauses = [pause for pause in pauses if pause <= GATHER_SECONDS]
        sessions, best, largest = len(pauses), 0.0, len(self._rhythms)
        for groups in range(1, min(sessions, _GROUPS) + 1):
            each = -(-sessions // groups)
            answered_at_once = min(max(self._call.usual, 1.0), sessions)
            longer = (max(pauses) - min(pauses)) * each / answered_at_once
            call = self._call.of(each)
            rate = sessions / max(groups * call, call + min(pauses) + longer, 1e-9)
            if rate > _WORTH * best:
                best, largest = rate, each
        return largest
