"""One examination from beginning to end: look at this machine, meet, judge, form the group, measure."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from syncaccum.doctor.bounded import within
from syncaccum.doctor.facts import Facts, gather_facts
from syncaccum.doctor.findings import Finding, ProblemError
from syncaccum.doctor.judgement import can_use_gpus, judge_facts, judge_forming, judge_measurements
from syncaccum.doctor.measurement import Measurement, measure, name_transport
from syncaccum.doctor.meeting import Meeting, open_meeting
from syncaccum.doctor.placement import guess, locate
from syncaccum.doctor.report import Report

_GRACE = 5.0
"""Seconds beyond a timeout, for rank 0, whose own is then over, to decide and the decision to arrive."""

_LAST = "measurements"
"""The topic after which all is said."""

Heard = Mapping[int, Any]
"""What ranks said, as JSON."""
Judge = Callable[[Heard, list[int]], list[Finding]]
"""From that and from the ranks that several processes have."""


class Examination:
    """What this rank knows so far, in ``report``; rank 0 comes to know all.

    Three times the ranks tell rank 0 what they have: facts before there is a group; whether the group could be
    formed; what they measured in it. Each time rank 0 decides whether all go on. It publishes its report before any
    rank leaves because of it: a launcher ends all ranks when the first fails.

    Args:
        timeout: seconds for the ranks to meet, and for each thing they do together.
        factory: ``package.module:function`` that builds the user's model, or None.
        publish: called once, on rank 0, with the report.
    """

    def __init__(self, timeout: float, factory: str | None, publish: Callable[[Report], None]) -> None:
        self._timeout = timeout
        self._factory = factory
        self.publish = publish
        self.placement = guess()
        self.report = Report(timeout=timeout, default_timeout=dist.default_pg_timeout.total_seconds())

    def run(self) -> bool:
        """Whether there is no problem; the same on every rank. Collective.

        Raises:
            ProblemError: this rank cannot go on, and has no decision of rank 0.
        """
        self.placement = locate()
        facts = gather_facts(self.placement)
        self.report.ranks = [facts]
        self.report.add(facts.findings)
        if self.placement.launcher == "alone":
            return self._run_alone()
        meeting = open_meeting(self.placement, self._timeout)
        on_gpus = self._agree(meeting, "facts", facts.to_json(), self._judge_facts, 0.0)
        if on_gpus is None:
            return False
        device = torch.device("cuda", self.placement.local_rank) if on_gpus else torch.device("cpu")
        self.report.transport = name_transport(self.placement, device)
        error = self._form_group(meeting, device)
        if self._agree(meeting, "forming", error, self._judge_forming, self._timeout + _GRACE) is None:
            return False
        measured = self._measure(device).to_json()
        if self._agree(meeting, _LAST, measured, self._judge_measurements, self._timeout + _GRACE) is None:
            return False
        dist.destroy_process_group()
        return True

    def _run_alone(self) -> bool:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.report.transport = name_transport(self.placement, device)
        measured = measure(self.placement, device, self._timeout, self._factory)
        self.report.add(self._judge_measurements({0: measured.to_json()}, []))
        self.report.add([Finding("note", "this process is alone", "to examine a job, start the doctor as the job")])
        self.publish(self.report)
        return self.report.is_healthy

    def _agree(self, meeting: Meeting, topic: str, ours: Any, judge: Judge, spread: float) -> bool | None:
        """Tell rank 0, and hear whether to go on: None is no, else whether on GPUs. Collective.

        Args:
            meeting: the ranks.
            topic: what it is about, one round for each.
            ours: what to tell.
            judge: rank 0's judgement of what it heard.
            spread: seconds by which the ranks may come apart here.

        Raises:
            ProblemError: rank 0 did not decide in time.
        """
        patience = max(self._timeout, spread)

        def decide() -> bool | None:
            meeting.tell(topic, ours)
            heard, duplicates = meeting.hear(topic, patience)
            self.report.add(judge(heard, duplicates))
            decision = can_use_gpus(self.report.ranks) if self.report.is_healthy else None
            last = decision is None or topic == _LAST
            if last:
                self.publish(self.report)
            meeting.decide(topic, decision)
            if last:
                meeting.await_notice(topic, len(heard) - 1)
            return decision

        def follow() -> bool | None:
            meeting.tell(topic, ours)
            decision: bool | None = meeting.await_decision(topic, patience + spread + _GRACE)
            return decision

        try:
            return within(patience + spread + 3 * _GRACE, decide if self.placement.rank == 0 else follow)
        except (TimeoutError, RuntimeError) as error:
            raise ProblemError(
                f"rank 0 did not decide about the {topic}: {str(error).splitlines()[0]}",
                "see what rank 0 prints: it is missing, died, or hangs; or it was given another MASTER_ADDR or "
                "MASTER_PORT than this rank",
            ) from error

    def _judge_facts(self, heard: Heard, duplicates: list[int]) -> list[Finding]:
        self.report.ranks = [Facts.from_json(heard[rank]) for rank in sorted(heard)]
        return judge_facts(self.report.ranks, self.placement.size, duplicates, self._timeout)

    def _judge_forming(self, heard: Heard, duplicates: list[int]) -> list[Finding]:
        return judge_forming(self.report.ranks, heard)

    def _judge_measurements(self, heard: Heard, duplicates: list[int]) -> list[Finding]:
        self.report.measurements = {rank: Measurement.from_json(heard[rank]) for rank in sorted(heard)}
        return judge_measurements(self.report.measurements, self.placement.size, self._factory)

    def _form_group(self, meeting: Meeting, device: torch.device) -> str:
        """The default process group, or why there is none."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
            # NCCL's watchdog otherwise ends the process when a peer hangs, before anything can be said about it.
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        try:
            within(
                self._timeout + _GRACE,  # gloo heeds no timeout where its peers cannot be reached
                lambda: dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                    store=dist.PrefixStore("group", meeting.store),
                    rank=self.placement.rank,
                    world_size=self.placement.size,
                    timeout=timedelta(seconds=self._timeout),
                ),
            )
        except (TimeoutError, RuntimeError) as error:
            return str(error).splitlines()[0] or type(error).__name__
        return ""

    def _measure(self, device: torch.device) -> Measurement:
        try:
            return measure(self.placement, device, self._timeout, self._factory)
        except RuntimeError as error:
            cause = error.__cause__ or error
            return Measurement(error=str(cause).splitlines()[0])
