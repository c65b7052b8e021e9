"""The engine in this process: prompts in, results in their order, no server.

from sortserve import LLM, Budget, SamplingParams

with LLM("sorted-smollm2-135m") as llm:
    results = llm.generate(["The sea is", "Rain is"], budget=Budget(exit_layer=18))
    print([result.text for result in results])

It is the engine that ``sortserve serve`` runs, with the same answers for the same seeds, and needs
none of the server's libraries.
"""

from sortserve.llm.llm import LLM
from sortserve.llm.results import Completion, Result

__all__ = ["LLM", "Completion", "Result"]
