"""One examination: look at this machine, meet, form the group, measure, meet again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from syncaccum.doctor.findings import Finding, ProblemError
from syncaccum.doctor.judgement import choose_backend, judge_arrivals, judge_duplicates, judge_facts, judge_silence
from syncaccum.doctor.machine import gather_facts
from syncaccum.doctor.measurement import measure
from syncaccum.doctor.rank import Rank, read_rank
from syncaccum.doctor.report import Report
from syncaccum.doctor.store import GRACE, PAUSE, open_store, within

_STOP = "stop"


class Examination:
    """Twice every rank tells rank 0 what it has, and rank 0 decides, through the store, which needs no process group.

    Rank 0 publishes its report before any rank leaves because of it: a launcher then ends all others.
    """

    def __init__(self, us: Rank, report: Report, publish: Callable[[Report], None]) -> None:
        self._us, self._report, self._publish = us, report, publish

    def run(self, factory: str | None) -> bool:
        """Whether there is no problem, the same on every rank; ProblemError without rank 0's decision. Collective."""
        us, timeout = self._us, self._report.timeout
        self._report.ranks = {us.rank: us}
        gather_facts(us)
        self._store = open_store(us, timeout)
        backend = self._agree("facts", timeout, GRACE)
        if backend == _STOP:
            return False
        measure(us, backend, self._store, timeout, factory)
        # A rank may fail at once where another waits to connect, and then for its commit.
        healthy = self._agree("measurements", timeout + GRACE, 2 * (timeout + GRACE)) != _STOP
        if healthy and dist.is_initialized():
            dist.destroy_process_group()
        return healthy

    def _agree(self, topic: str, patience: float, apart: float) -> str:
        """What rank 0 decides when it has heard all, or ``patience`` is over; it may come here later by ``apart``."""
        try:
            return within(patience + apart + 2 * GRACE, lambda: self._take_part(topic, patience, patience + apart))
        except (TimeoutError, RuntimeError) as error:
            why = str(error).partition("\n")[0]
            remedy = (
                "see what rank 0 prints: it is missing, died, or hangs; or it was given another MASTER_ADDR or "
                "MASTER_PORT than this rank"
            )
            raise ProblemError(f"rank 0 did not decide about the {topic}: {why}", remedy) from error

    def _take_part(self, topic: str, patience: float, longest: float) -> str:
        store, mine = self._store, f"{topic}/{self._us.rank}"
        store.set(f"{mine}/{store.add(mine, 1)}", json.dumps(asdict(self._us)))
        store.add(f"{topic}/told", 1)
        if self._us.rank == 0:
            return self._lead(topic, patience)
        store.wait([f"{topic}/decision"], timedelta(seconds=longest))
        decision = store.get(f"{topic}/decision").decode(errors="replace")
        store.add(f"{topic}/read", 1)
        return decision

    def _lead(self, topic: str, patience: float) -> str:
        store, ranks = self._store, range(self._us.size)
        self._await_count(f"{topic}/told", len(ranks), patience)
        heard = {rank: store.get(key) for rank in ranks if store.check([key := f"{topic}/{rank}/1"])}
        duplicates = [rank for rank in ranks if store.check([f"{topic}/{rank}/2"])]
        decision = self._judge(topic, heard, duplicates)
        store.set(f"{topic}/decision", decision)
        # Rank 0 may host the store: it must not leave before the others have read this.
        self._await_count(f"{topic}/read", store.add(f"{topic}/told", 0) - 1, GRACE)
        return decision

    def _await_count(self, key: str, count: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._store.add(key, 0) < count and time.monotonic() < end:
            time.sleep(PAUSE)

    def _judge(self, topic: str, heard: Mapping[int, bytes], duplicates: list[int]) -> str:
        report, us = self._report, self._us
        if topic == "measurements":
            report.add(judge_silence(heard, us.size))
        elif not duplicates:  # else others may be late: nobody waited for them
            report.add(judge_arrivals(heard, us.size, report.timeout))
        report.add(judge_duplicates(duplicates))
        for number, note in heard.items():
            try:
                report.ranks[number] = read_rank(number, note)
            except ValueError as error:
                what = f"the store has a note in this rank's place that is not this doctor's: {error}"
                remedy = "give the job a MASTER_PORT of its own, and every node the same version of syncaccum"
                report.add([Finding("problem", what, remedy, (number,))])
        ranks = report.ranks.values()
        report.add([*judge_facts(ranks), *(finding for rank in ranks for finding in rank.findings)])
        if us.launcher == "alone":
            report.add([Finding("note", "this process is alone", "to examine a job, start the doctor as the job")])
        if report.is_healthy:
            report.backend = choose_backend(ranks)
        if topic == "measurements" or not report.is_healthy:
            self._publish(report)
        return report.backend if report.is_healthy else _STOP
