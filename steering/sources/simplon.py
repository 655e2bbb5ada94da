"""Arms, triggers and disarms a Dectris detector through its REST interface, SIMPLON. Plain HTTP, no library."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Simplon:
    """A detector's control unit."""

    host: str
    """HOST or HOST:PORT."""
    version: str = "1.8.0"
    """Of the interface."""
    timeout_s: float | None = 30.0
    """Arming takes seconds. A trigger is waited for without a limit: it answers when the series is exposed."""

    def stream2(self) -> None:
        """Have the detector push its frames as CBOR, which is what stream2 is."""
        self._put(f"/stream/api/{self.version}/config/mode", "enabled")
        self._put(f"/stream/api/{self.version}/config/format", "cbor")

    def configure(self, **settings: float | int | str | bool) -> None:
        """Set detector parameters: ntrigger, nimages, count_time, frame_time, trigger_mode and the like."""
        for name, value in settings.items():
            self._put(f"/detector/api/{self.version}/config/{name}", value)

    def arm(self) -> int:
        """Arm; returns the id of the series that begins."""
        answer = self._put(f"/detector/api/{self.version}/command/arm")
        series = answer.get("sequence id")
        if not isinstance(series, int):
            raise OSError(f"{self.host}: found the answer {answer} to arm, expected a `sequence id`")
        return series

    def trigger(self) -> None:
        """Expose, in the trigger mode that is configured; returns when that is over, whenever that is."""
        replace(self, timeout_s=None)._put(f"/detector/api/{self.version}/command/trigger")

    def disarm(self) -> None:
        """End the series: the stream's end message follows."""
        self._put(f"/detector/api/{self.version}/command/disarm")

    def status(self) -> str:
        """The detector's state: idle, ready, acquire, error and others."""
        return str(self._request("GET", f"/detector/api/{self.version}/status/state").get("value"))

    def _put(self, path: str, value: float | str | None = None) -> dict[str, Any]:
        return self._request("PUT", path, None if value is None else json.dumps({"value": value}))

    def _request(self, method: str, path: str, body: str | None = None) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self.host, timeout=self.timeout_s)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise OSError(
                f"found no answer from the detector at {self.host} ({error}), expected its REST interface there"
            ) from error
        finally:
            connection.close()
        if answer.status != 200:
            said = content.decode(errors="replace")[:200]
            raise OSError(f"{method} {self.host}{path}: found the answer {answer.status} {said!r}, expected 200")
        try:
            found = json.loads(content) if content else {}
        except ValueError as error:
            raise OSError(f"{self.host}{path}: found an answer that is no JSON, expected one") from error
        return found if isinstance(found, dict) else {}
