"""OpenVINO GenAI under our load, in process: its package has no server.

Runs with the Python of OpenVINO's own environment and imports nothing of ours. Each line of
standard input is a load, each line of standard output what its clients saw. A client's next request
is added as soon as its last one is answered. What an HTTP server does beside (HTTP, JSON, text) is
left out, which favours OpenVINO.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from typing import Any

FIRST_TOKEN_ID = 100


class Load:
    """Closed-loop clients over one pipeline."""

    def __init__(self, pipeline: Any, modules: Any, wanted: dict[str, Any]) -> None:
        self._pipeline = pipeline
        self._genai, self._openvino, self._numpy = modules
        self._wanted = wanted
        self._rng = random.Random(wanted["seed"])
        self._running: dict[int, tuple[Any, dict[str, Any]]] = {}
        self.records: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Sends all requests and steps until all are answered or the time is up."""
        started_s, cpu_s = time.perf_counter(), time.process_time()
        end_s = started_s + self._wanted["max_seconds"]
        for _ in range(min(self._wanted["num_clients"], self._wanted["num_requests"])):
            self._add()
        while self._running and time.perf_counter() < end_s:
            self._pipeline.step()
            self._collect()
        ended_s = time.perf_counter()
        self._cut()
        return {
            "records": self.records,
            "started_s": started_s,
            "ended_s": ended_s,
            "cpu_s": 0.0,
            "process_cpu_s": time.process_time() - cpu_s,
        }

    def _add(self) -> None:
        wanted, number = self._wanted, len(self.records)
        vocabulary = range(FIRST_TOKEN_ID, wanted["vocab_size"])
        ids = self._rng.choices(vocabulary, k=wanted["prompt_tokens"])
        config = self._genai.GenerationConfig()
        config.max_new_tokens = wanted["output_tokens"]
        config.ignore_eos = True
        config.do_sample = False
        now_s = time.perf_counter()
        record: dict[str, Any] = {
            "exit_layer": None,
            "due_s": now_s,
            "sent_s": now_s,
            "chunk_times_s": [],
            "num_prompt_tokens": len(ids),
            "num_output_tokens": 0,
            "status": 200,
        }
        prompt = self._openvino.Tensor(self._numpy.array([ids], dtype=self._numpy.int64))
        handle = self._pipeline.add_request(number, prompt, config)
        self._running[number] = handle, record
        self.records.append(record)

    def _collect(self) -> None:
        now_s = time.perf_counter()
        for number, (handle, record) in list(self._running.items()):
            while handle.can_read():
                for output in handle.read().values():
                    record["num_output_tokens"] += len(output.generated_ids)
                    record["chunk_times_s"].append(now_s)
            if record["num_output_tokens"] >= self._wanted["output_tokens"]:
                record["answered_s"] = now_s
                del self._running[number]
                if len(self.records) < self._wanted["num_requests"]:
                    self._add()

    def _cut(self) -> None:
        for handle, record in self._running.values():
            record["cut"] = True
            handle.stop()
        self._running.clear()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()


def main() -> None:
    """Loads the model, says so, and carries out one load for each line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--cache-gib", type=int, default=1)
    parser.add_argument("--max-batched-tokens", type=int, default=1024)
    parser.add_argument("--properties", type=json.loads, default={})
    arguments = parser.parse_args()
    import numpy
    import openvino  # type: ignore[import-not-found]
    import openvino_genai  # type: ignore[import-not-found]

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = arguments.cache_gib
    scheduler.max_num_batched_tokens = arguments.max_batched_tokens
    properties = {"INFERENCE_NUM_THREADS": arguments.num_threads} | arguments.properties
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        arguments.model, scheduler, "CPU", properties
    )
    print(json.dumps({"ready": openvino_genai.__version__}), flush=True)
    for line in sys.stdin:
        load = Load(pipeline, (openvino_genai, openvino, numpy), json.loads(line))
        print(json.dumps(load.run()), flush=True)


if __name__ == "__main__":
    main()
