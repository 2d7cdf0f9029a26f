"""What every handler is given: the services of one platform."""

from __future__ import annotations

from dataclasses import dataclass

from anser.config import Config, Loaded
from anser.ports import Clock
from anser.services.contribution import Contribution
from anser.services.fleet import Fleet
from anser.services.gateway import Gateway
from anser.services.hub import Hub
from anser.services.ledger import Ledger
from anser.services.members import Members

__all__ = ["Services"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The use cases that the dialects call; one set for each running platform."""

    loaded: Loaded
    clock: Clock
    members: Members
    contribution: Contribution
    fleet: Fleet
    gateway: Gateway
    ledger: Ledger
    hub: Hub

    @property
    def config(self) -> Config:
        """The settings in force."""
        return self.loaded.config
