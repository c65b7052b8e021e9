"""The Triton backend in its place: started as a server starts it, and in the steps of a GPU.

Interpreted. A GPU runs its decode steps as graphs over tensors of fixed sizes, samples on the
device and plans one step ahead; here all three do the same with the kernels, but for the recording.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sortserve.core.budget import Budget
from sortserve.core.sampling_params import SamplingParams
from sortserve.engine.assemble import make_engine
from sortserve.engine.engine import Engine, EngineConfig
from sortserve.engine.runner import ModelRunner
from sortserve.engine.sampling.sampler import Sampler
from sortserve.llm.llm import LLM
from support.interpreter import interpreted, patience
from support.model_laws import GREEDY, SEEDED, assert_offline
from support.recorded_graphs import RerunMaker
from support.scripted import Collected, FakeClock, add, collect, go_shallower, make_request, run
from support.serving import Served, serve
from support.tiny_models import make_tiny_checkpoint

pytestmark = [interpreted, patience]

EXITS = (1, 2, 3)
SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PROMPT = list(range(40, 57))


@pytest.fixture(name="path", scope="module")
def _path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "qwen3"
    kinds = {1: "norm", 2: "mlp"}
    return make_tiny_checkpoint(folder, "qwen3-untied", exits=EXITS, exit_kinds=kinds, **SIZES)


def engine_as_on_a_gpu(served: Served, *, overlap: bool) -> Engine:
    runner = ModelRunner(
        served.decoder,
        num_pages=300,
        block_size=4,
        sampler=Sampler(batched=True),
        graph_maker=RerunMaker(),
        max_num_seqs=5,
    )
    config = EngineConfig(
        max_model_len=64, max_num_seqs=5, seed=0, policy="fair", async_scheduling=overlap
    )
    return make_engine(runner, served.checkpoint, served.tokenizer, config, clock=FakeClock())


@pytest.mark.parametrize("overlap", [False, True], ids=["one by one", "overlapping"])
def test_laws_1_2_and_15_padded_rows_of_fixed_tensors_change_no_token(
    path: Path, overlap: bool
) -> None:
    """Five rows of all depths: segments of 5, 3 and 1 rows, in buckets of 5, 4 and 1."""
    served = serve(path, backend="triton")
    assert served.decoder.backend.supports_graphs
    engine = engine_as_on_a_gpu(served, overlap=overlap)
    requests = [
        (PROMPT[: 3 + 3 * i], exit_layer, (GREEDY, SEEDED)[i % 2])
        for i, exit_layer in enumerate((1, 3, 2, 1, 2))
    ]
    for i, (prompt, exit_layer, sampling) in enumerate(requests):
        add(engine, make_request(str(i), prompt, max_tokens=4, **sampling), exit_layer)

    results = run(engine)

    for i, (prompt, exit_layer, sampling) in enumerate(requests):
        assert_offline(served, prompt, [exit_layer] * 4, sampling, results[str(i)].token_ids)


def test_law_7_a_row_that_goes_shallower_becomes_padding_in_the_segments_above(
    path: Path,
) -> None:
    served = serve(path, backend="triton")
    engine = engine_as_on_a_gpu(served, overlap=False)
    add(engine, make_request("deep", PROMPT[:9], max_tokens=5, **SEEDED), 3)
    add(engine, make_request("r", PROMPT, max_tokens=5, **GREEDY), 3)
    results: dict[str, Collected] = {}
    for _ in range(2):
        collect(engine.step(), results)
    done = len(results["r"].token_ids)

    go_shallower(engine, "r", 1)
    while engine.has_work:
        collect(engine.step(), results)

    exits = [3] * done + [1] * (5 - done)
    assert_offline(served, PROMPT, exits, GREEDY, results["r"].token_ids)
    assert_offline(served, PROMPT[:9], [3] * 5, SEEDED, results["deep"].token_ids)


@pytest.mark.parametrize(
    "options",
    [{"require_backend": "triton"}, {"backend": "triton", "quantize": "int8"}],
    ids=["required", "int8"],
)
def test_it_passes_its_check_at_the_start_and_answers_as_the_reference(
    path: Path, options: dict[str, Any]
) -> None:
    """What a server does when it starts: check, choose, allocate."""
    answers = []
    sampling = [SamplingParams(max_tokens=3, ignore_eos=True, **s) for s in (GREEDY, SEEDED)]
    budgets = [Budget(exit_layer=3), Budget(exit_layer=1)]
    reference = {**options, "backend": "reference", "require_backend": None}
    for chosen in (options, reference):
        with LLM(path, dtype="float32", device="cpu", max_num_seqs=2, **chosen) as llm:
            parts = llm._running().parts
            assert parts.failed_backends == ()
            assert parts.decoder.backend.name == ("triton" if chosen is options else "reference")
            results = llm.generate([PROMPT, PROMPT[:5]], sampling, budget=budgets)
            answers.append([result.outputs[0].token_ids for result in results])
    assert answers[0] == answers[1]
