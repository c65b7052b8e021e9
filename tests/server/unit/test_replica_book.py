"""What a router keeps of its replicas: the last report, and what no report knows."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sortserve.core.budget import Budget
from sortserve.replicas.bands import LEAST_NUM, Pace
from sortserve.replicas.book import TRANSIT_S, ReplicaBook
from sortserve.replicas.choice import RoutedRequest, Sent
from sortserve.replicas.load import EngineLoad, ExitLoad

EXITS = (ExitLoad(exit_layer=2, score=1.0, compute=1.0),)
TIMED = (ExitLoad(exit_layer=2, score=1.0, compute=1.0, step_ms=5.0, row_ms=1.0),)


def load_at(time_s: float) -> EngineLoad:
    return EngineLoad(time_s=time_s, exits=EXITS)


def sent_at(sent_s: float) -> Sent:
    request = RoutedRequest(arrival_s=sent_s, num_prompt_tokens=1, num_output_tokens=1)
    return Sent(request=request, exit_layer=2, sent_s=sent_s)


def test_a_request_counts_until_a_report_knows_it() -> None:
    book = ReplicaBook()
    book.send("a", "r", sent_at(1.0))

    book.report("a", load_at(0.9), 0.9)
    [before] = book.candidates("a", now=2.0)
    book.report("a", load_at(1.5), 1.5)
    [after] = book.candidates("a", now=2.0)

    assert (len(before.sent), len(after.sent)) == (1, 0)
    assert (before.num_ongoing, after.num_ongoing) == (1, 1)
    assert after.age_s == 0.5


def test_a_report_made_as_a_request_was_sent_may_not_know_it() -> None:
    book = ReplicaBook()
    book.send("a", "r", sent_at(1.0))
    book.report("a", load_at(1.0), 1.0 + TRANSIT_S / 2)

    assert len(book.candidates("a", now=2.0)[0].sent) == 1


def test_a_report_that_was_overtaken_changes_nothing() -> None:
    book = ReplicaBook()
    newer = load_at(2.0)
    book.report("a", newer, 2.0)
    book.report("a", load_at(1.0), 1.0)

    assert book.candidates("a", now=2.0)[0].load is newer


def test_a_request_that_is_over_counts_nowhere() -> None:
    book = ReplicaBook()
    book.send("a", "r", sent_at(1.0))
    book.end("a", "r")
    book.end("a", "r")
    book.end("b", "r")

    [known] = book.candidates("a", now=2.0)
    assert (known.sent, known.num_ongoing) == ((), 0)


def test_what_is_sent_is_remembered_as_hurried_as_it_is() -> None:
    """Once, wherever it goes then."""
    book, budget = ReplicaBook(), Budget(latency_ms=100)
    request = RoutedRequest(arrival_s=1.0, num_prompt_tokens=1, num_output_tokens=9, budget=budget)
    sent = Sent(request=request, exit_layer=2, sent_s=1.0)
    book.report("a", EngineLoad(time_s=0.5, exits=TIMED), 0.5)
    for i in range(LEAST_NUM - 1):
        book.send("a", str(i), sent)
        book.send("b", str(i), sent, is_again=True)
    patient = Pace(hurry=0.001, work_s=1.0)

    before = book.mix.place(patient)
    book.send("b", "last", sent)

    assert (before, book.mix.place(patient)) == (None, 1.0)


def test_of_a_replica_that_is_gone_nothing_is_kept() -> None:
    book = ReplicaBook()
    book.send("a", "r", sent_at(1.0))
    book.report("a", load_at(0.5), 0.5)
    book.forget("a")

    [known] = book.candidates("a", now=2.0)
    assert (known.load, known.num_ongoing) == (None, 0)


class Books(RuleBasedStateMachine):
    """Sends, ends, reports and losses in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.book, self.now, self.live = ReplicaBook(), 0.0, dict[str, str]()

    @rule(replica=st.sampled_from("ab"), gap=st.floats(0.0, 0.1))
    def send(self, replica: str, gap: float) -> None:
        self.now += gap
        name = f"r{len(self.live)}"
        self.live[name] = replica
        self.book.send(replica, name, sent_at(self.now))

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.live:
            name = data.draw(st.sampled_from(sorted(self.live)))
            self.book.end(self.live[name], name)

    @rule(replica=st.sampled_from("ab"), age=st.floats(0.0, 0.2))
    def report(self, replica: str, age: float) -> None:
        self.book.report(replica, load_at(self.now - age), self.now - age)

    @rule(replica=st.sampled_from("ab"))
    def forget(self, replica: str) -> None:
        self.book.forget(replica)

    @invariant()
    def holds(self) -> None:
        self.book.check_invariants()


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=30, stateful_step_count=20)
