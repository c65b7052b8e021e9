"""One model on several ranks: what starts them, hands them their steps, and notices their end.

This process is rank 0: it has the scheduler, the API and the sampler, and its share of the model as
any other. The other ranks are processes that do nothing but run the plans they are sent, each with
its share of the weights (``model.local_shape``) and a pool of pages for its key/value heads; page
tables are the same on all.

* ``ranks``: their processes, seen from rank 0.
* ``watch``: whether they still get on.
* ``runner``: the runner of rank 0.
* ``rank``: the main module of the other processes.
* ``collectives``: what the model asks all ranks for in the middle of a step.
* ``messages``: what rank 0 and another rank say to each other.
"""
