"""What every request needs, kept by the application."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from serve.access import Meter
from serve.asks import Models
from serve.problems import ServiceError
from serve.settings import Settings


@dataclass(frozen=True)
class Service:
    """All that a request needs: models, what is allowed, where figures go, the longest window, the key's hash."""

    models: Models
    settings: Settings
    meter: Meter
    window_s: float
    key_digest: str | None = None

    def check_room(self) -> None:
        """Raise the ``ServiceError`` of a full queue when those of all models are: no body need be read for nothing."""
        full = None
        for name in self.models.names:
            try:
                return self.models.check_room(name)
            except ServiceError as error:
                full = error
        assert full is not None, "a service has models"
        raise full

    def model(self, name: str | None) -> str:
        """The model called ``name``, by default the first.

        Raises:
            ServiceError: there is none.
        """
        names = self.models.names
        if name is not None and name not in names:
            raise ServiceError("unknown_model", f"no model of this name; there are {', '.join(names)}")
        return name or names[0]


def service_of(request: Request) -> Service:
    """The service that a request was sent to."""
    service: Service = request.app.state.service
    return service
