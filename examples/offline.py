"""The engine in this process, without a server: a batch, samples, a conversation, a stream."""

import sys

from sortserve import LLM, Budget, SamplingParams

MODEL = sys.argv[1] if len(sys.argv) > 1 else "sorted-smollm2-135m"
PROMPTS = ["The sea is", "Rain falls on", "At night the city"]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)

with LLM(MODEL) as llm:
    shallow, full = llm.exits.layers[0], llm.exits.full

    # One continuous batch; each prompt may have a depth of its own.
    budgets = [Budget(exit_layer=shallow), Budget(exit_layer=full), Budget(compute=0.9)]
    for result in llm.generate(PROMPTS, GREEDY, budget=budgets):
        print(f"{result.prompt!r} at {dict(result.outputs[0].tokens_by_exit)}: {result.text!r}")

    (result,) = llm.generate("Once upon a time", SamplingParams(seed=1, max_tokens=16), n=3)
    for sample in result.outputs:
        print(f"sample {sample.index}: {sample.text!r}")

    (result,) = llm.chat(QUESTION, GREEDY)
    print("answer:", result.text)

    for output in llm.stream(llm.chat_prompt(QUESTION), GREEDY):
        print(output.text, end="", flush=True)
    print()
