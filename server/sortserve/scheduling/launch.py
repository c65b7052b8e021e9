"""A plan that has been launched, and the sequences that it is about (no torch)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from sortserve.core.plan import RowPlan, StepPlan
from sortserve.core.sequence import Sequence, Status

__all__ = ["Launch", "News"]


@dataclass(frozen=True, eq=False)
class Launch:
    """A plan that has been launched. Until it has landed, its sequences may go other ways."""

    plan: StepPlan
    sequences: Mapping[str, Sequence]
    """Of the plan's rows, by request. Ids may come again; a sequence does not."""
    num_preemptions: Mapping[str, int]
    """How often each had lost its pages by then."""

    @classmethod
    def of(cls, plan: StepPlan, sequences: Mapping[str, Sequence]) -> Launch:
        """A plan that is launched now."""
        return cls(plan, sequences, {id_: s.num_preemptions for id_, s in sequences.items()})

    def live(self, rows: Iterable[RowPlan]) -> Iterator[tuple[RowPlan, Sequence]]:
        """Those of some of its rows whose sequences have not ended since."""
        for row in rows:
            sequence = self.sequences[row.request_id]
            if sequence.status is not Status.FINISHED:
                yield row, sequence

    def has_pages_of(self, sequence: Sequence) -> bool:
        """Whether a sequence still runs on the pages that its row writes to."""
        return (
            sequence.status is Status.RUNNING
            and sequence.num_preemptions == self.num_preemptions[sequence.request_id]
        )


@dataclass
class News:
    """What has happened since the last plan: the next one carries it."""

    num_preemptions: int = 0
    exit_changes: list[tuple[int, int, str]] = field(default_factory=list)
    policy_failed: bool = False

    def give_to(self, plan: StepPlan) -> StepPlan:
        """The plan with all of it; nothing is left."""
        plan = replace(
            plan,
            num_preemptions=self.num_preemptions,
            exit_changes=tuple(self.exit_changes),
            policy_failed=self.policy_failed,
        )
        self.num_preemptions, self.exit_changes, self.policy_failed = 0, [], False
        return plan

    def take_from(self, plan: StepPlan) -> None:
        """A plan that carried it has given nothing: the next one carries it as well."""
        self.num_preemptions += plan.num_preemptions
        self.exit_changes[:0] = plan.exit_changes
        self.policy_failed |= plan.policy_failed
