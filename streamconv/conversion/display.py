"""A progress bar for notebooks and programs of one's own: tqdm's, fed by a conversion's events."""

from __future__ import annotations

from typing import Any

from streamconv.options import Event, Notice, Phase


class ProgressBar:
    """Shows a conversion as tqdm does, as a widget in notebooks: give it as ``on_event``.

    ``settings`` go to tqdm. After the conversion :meth:`close` leaves the bar as it is.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = {"unit": "B", "unit_scale": True, **settings}
        self._bar: Any = None

    def __call__(self, event: Event) -> None:
        """Show an event."""
        from tqdm.auto import tqdm

        if self._bar is None:
            self._bar = tqdm(**self._settings)
        if isinstance(event, Notice):
            self._bar.write(f"notice: {event.text}")
        elif isinstance(event, Phase):
            self._bar.set_description(event.name)
            if event.name == "publish":
                self.close()
        else:
            self._bar.total = event.total_bytes
            self._bar.update(event.done_bytes - self._bar.n)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
