"""The front under Ray Serve, which keeps several of it going on a cluster: `serve run deploy/ray_serve.yaml`.

That file names `application` and what it is given. Every replica is a front of its own, with its own view of the workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.engines.guard import MOST_AT_ONCE, App
from modekit.engines.run_front import FrontSettings, front_of
from modekit.errors import EngineError
from modekit.files.typed import shortened
from modekit.run import Run


class FrontArguments(FrontSettings):
    """What deploy/ray_serve.yaml says under `args`: all that `modekit front` takes, but for where it listens."""

    checkpoint: str
    trust_remote_code: bool = False

    def app(self) -> App:
        """The front as an ASGI application. Raises what `open_checkpoint` and `front_of` raise."""
        return front_of(open_checkpoint(Path(self.checkpoint)), self, run=Run(self.trust_remote_code)).app()


def application(said: Mapping[str, object]) -> object:
    """The front as Ray Serve wants it, to be made in each replica. Raises EngineError for arguments that are none."""
    serve: Any = import_module("ray.serve")
    try:
        arguments = FrontArguments.model_validate(said)
    except ValidationError as error:
        problem = error.errors()[0]
        raise EngineError(
            "an argument of the front is wrong",
            where=f"args: {'.'.join(map(str, problem['loc']))}",
            found=shortened(problem["msg"]),
            expected=", ".join(FrontArguments.model_fields),
            remedy="correct the file that `serve run` was given",
        ) from None

    def app() -> App:
        return arguments.app()

    # As many at once as the front's guard lets through; Ray's own limit of five would keep most of them waiting.
    front = serve.deployment(name="Front", num_replicas=2, max_ongoing_requests=MOST_AT_ONCE)
    return front(serve.ingress(app)()).bind()
