"""Every policy by its name: what ``--policy`` chooses from."""

from __future__ import annotations

from sortserve.core.choices import chosen
from sortserve.scheduling.policies.deadline import DEADLINE
from sortserve.scheduling.policies.fair import FAIR
from sortserve.scheduling.policies.lockstep import LOCKSTEP
from sortserve.scheduling.policy import Policy

__all__ = ["DEFAULT_POLICY", "POLICIES", "get_policy"]

POLICIES: dict[str, Policy] = {policy.name: policy for policy in (DEADLINE, FAIR, LOCKSTEP)}

DEFAULT_POLICY = DEADLINE.name


def get_policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ConfigError: there is none.
    """
    return chosen(POLICIES, name, "policy")
