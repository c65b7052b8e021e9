"""Rows of a data set on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module

from sortserve_trainer.data.rows import Row, columnar_row
from sortserve_trainer.data.source import bad_data

__all__ = ["is_hub_id", "read_hub_rows"]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_hub_id(reference: str) -> bool:
    """Whether this can be the id of a data set: ``NAME`` or ``ORG/NAME``."""
    return _HUB_ID.fullmatch(reference) is not None and not reference.startswith(".")


def read_hub_rows(reference: str, split: str) -> Iterator[Row]:
    """The rows of one split, downloaded to the hub's cache if they are not there.

    Raises:
        ConfigError: there is no such data set or split, or the hub cannot be reached.
    """
    try:
        datasets = import_module("datasets")  # large, and only in the extra [train]
    except ImportError as error:
        problem = "hub data sets need a package more: pip install 'sortserve[train]'"
        raise bad_data(reference, problem) from error
    try:
        dataset = datasets.load_dataset(reference, split=split)
    except Exception as error:  # datasets and the hub client raise many kinds
        reason = " ".join(str(error).split())[:300].rstrip(".")
        problem = f"no such file here, and as a hub data set it does not load: {reason}"
        raise bad_data(reference, problem) from error
    for index, fields in enumerate(dataset):
        yield columnar_row(f"{reference}, row {index} of {split}", dict(fields))
