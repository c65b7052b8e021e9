"""From files and hub data sets to packed batches of token ids.

    source = parse_source("train.jsonl:0.5")
    examples = load_examples(source, tokenizer, max_length=512, train_on_prompts=False)
    train, held_out = split_held_out(examples, share=0.01, seed=0)
    mixture = Mixture([(source, train)], pack_length=2048, seed=0, num_epochs=3)
    batch = collate([mixture[0]])

``rows`` reads files, ``hub`` the hub; ``forms`` knows the forms of a row, ``chat_format`` how a
conversation reads as text and which part of it is answer, ``loading`` makes examples of them, and
``prepared`` keeps them on disk.
"""

from sortserve_trainer.data.examples import Example, split_held_out
from sortserve_trainer.data.loading import load_examples
from sortserve_trainer.data.mixture import Mixture
from sortserve_trainer.data.packing import IGNORED, Pack, collate, pack_examples
from sortserve_trainer.data.prepared import PreparedData
from sortserve_trainer.data.source import DataSource, file_digest, parse_source

__all__ = [
    "IGNORED",
    "DataSource",
    "Example",
    "Mixture",
    "Pack",
    "PreparedData",
    "collate",
    "file_digest",
    "load_examples",
    "pack_examples",
    "parse_source",
    "split_held_out",
]
