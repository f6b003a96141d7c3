"""One examination: look at this machine, meet, form the group, measure, meet again."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from syncaccum.doctor.judgement import BACKENDS, STOP, choose_backend, judge_arrivals, judge_facts
from syncaccum.doctor.launcher import GRACE, PAUSE, open_store, within
from syncaccum.doctor.machine import gather_facts
from syncaccum.doctor.measurement import measure
from syncaccum.doctor.rank import Finding, ProblemError, Rank, read_rank
from syncaccum.doctor.report import Report


class Examination:
    """Twice the ranks tell rank 0 what they have, and it decides. Through the store, which needs no process group."""

    def __init__(self, us: Rank, report: Report) -> None:
        self._us, self._report = us, report

    def run(self, factory: str | None) -> bool:
        """Whether there is no problem, the same on every rank; ProblemError without rank 0's decision. Collective."""
        us, timeout = self._us, self._report.timeout
        self._report.ranks = {us.rank: us}
        gather_facts(us)
        self._store = open_store(us, timeout)
        backend = self._agree("facts", timeout, GRACE)
        if backend == STOP:
            return False
        measure(us, backend, self._store, timeout, factory)
        # A rank may fail at once where another waits to connect, and then for its commit.
        healthy = self._agree("measurements", timeout + GRACE, 2 * (timeout + GRACE)) != STOP
        if healthy and dist.is_initialized():
            dist.destroy_process_group()
        return healthy

    def _agree(self, topic: str, patience: float, apart: float) -> str:
        """What rank 0 decides when it has heard all, or ``patience`` is over; it may come here later by ``apart``."""
        try:
            return within(patience + apart + 2 * GRACE, lambda: self._take_part(topic, patience, patience + apart))
        except (TimeoutError, RuntimeError) as error:
            why = str(error).partition("\n")[0]
            remedy = "see what rank 0 prints: it died, hangs, or has another MASTER_ADDR or MASTER_PORT than this rank"
            raise ProblemError(f"rank 0 did not decide about the {topic}: {why}", remedy) from error

    def _take_part(self, topic: str, patience: float, longest: float) -> str:
        store, mine = self._store, f"{topic}/{self._us.rank}"
        store.set(f"{mine}/{store.add(mine, 1)}", json.dumps(asdict(self._us)))
        store.add(f"{topic}/told", 1)
        if self._us.rank == 0:
            self._await_count(f"{topic}/told", self._us.size, patience)
            store.set(f"{topic}/decision", decision := self._decide(topic))
            # Rank 0 may host the store: it must not leave before the others have read this.
            self._await_count(f"{topic}/read", store.add(f"{topic}/told", 0) - 1, GRACE)
            return decision
        store.wait([f"{topic}/decision"], timedelta(seconds=longest))
        decision = store.get(f"{topic}/decision").decode(errors="replace")
        if decision not in (*BACKENDS, STOP):
            raise RuntimeError(f"another program wrote {decision!r:.60} in its place")
        store.add(f"{topic}/read", 1)
        return decision

    def _await_count(self, key: str, count: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._store.add(key, 0) < count and time.monotonic() < end:
            time.sleep(PAUSE)

    def _decide(self, topic: str) -> str:
        report, store, size = self._report, self._store, self._us.size
        heard = [rank for rank in range(size) if store.check([f"{topic}/{rank}/1"])]
        duplicates = [rank for rank in heard if store.check([f"{topic}/{rank}/2"])]
        report.add(judge_arrivals(heard, size, duplicates, report.timeout if topic == "facts" else None))
        for number in heard:
            try:
                report.ranks[number] = read_rank(number, store.get(f"{topic}/{number}/1"))
            except (ValueError, RecursionError) as error:
                what = f"the store has a note in this rank's place that is not this doctor's: {error}"
                remedy = "give the job a MASTER_PORT of its own, and every node the same version of syncaccum"
                report.add([Finding("problem", what, remedy, (number,))])
        ranks = report.ranks.values()
        report.add([*judge_facts(ranks), *(finding for rank in ranks for finding in rank.findings)])
        report.backend = choose_backend(ranks) if report.is_healthy else report.backend
        if topic == "measurements" or not report.is_healthy:  # before any rank leaves, and a launcher ends the others
            print(report.render(), flush=True)
        return report.backend if report.is_healthy else STOP
