"""What the doctor has to say, as data; text and JSON are made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """How good a finding is. Only an error changes the exit status."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


_MARKS = {State.OK: "ok", State.NOTE: "-", State.WARNING: "warn", State.ERROR: "FAIL"}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        value: what was found.
        state: how good that is.
        advice: what to do about it.
        details: further lines for a reader.
        facts: the same for a program, JSON.
    """

    name: str
    value: str
    state: State = State.OK
    _: KW_ONLY
    advice: str = ""
    details: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "state": self.state.value}


@dataclass(frozen=True)
class Section:
    """Findings on one subject."""

    title: str
    findings: Sequence[Finding]

    def text(self) -> str:
        """For a reader: plain lines, without colours, so that a log can hold them."""
        width = max((len(finding.name) for finding in self.findings), default=0)
        lines = [self.title]
        for finding in self.findings:
            lines.append(f"  {_MARKS[finding.state]:<5} {finding.name:<{width}}  {finding.value}")
            lines += [f"  {'':<5} {'':<{width}}  {line}" for line in finding.details]
            if finding.advice:
                lines.append(f"  {'':<5} {'':<{width}}  -> {finding.advice}")
        return "\n".join(line.rstrip() for line in lines)


def count(sections: Iterable[Section], state: State) -> int:
    """How many findings are in a state."""
    return sum(finding.state is state for section in sections for finding in section.findings)
