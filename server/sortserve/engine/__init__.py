"""Schedule, launch, commit: what turns requests into tokens.

What two threads touch, and what makes it safe:

* the worker's state, and the requests that have yet to be answered: the lock of ``Ledger``;
* the inbox: a ``SimpleQueue``;
* what the event loop sees of the engine (``EngineStats``, the cost model): frozen values, replaced
  as a whole;
* what the engine still needs to do, as the desk sees it: the desk's lock;
* places in the queue: the lock of ``QueueLimits``;
* the learned lengths of answers: one frozen value in ``LengthEstimator``;
* how far the engine has come (``Engine.num_calls``): an integer that one thread writes;
* a plan on the thread of steps, if there is one: it has page tables of its own, and reads of a
  request's tokens only as many as the plan says (``SamplingRow.at``);
* a stream's outputs: its own event loop alone, reached through ``call_soon_threadsafe``;
* metrics and logs: their libraries' locks. The tokenizer: see ``sortserve.text.tokenizer``.

``tests/server/unit/test_threads.py`` races each of them.
"""
