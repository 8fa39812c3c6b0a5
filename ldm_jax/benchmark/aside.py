"""The peer in a process of its own, which rests while we are measured: neither's threads nor memory disturb the other's."""
import contextlib
import functools
import multiprocessing
from typing import Any, Callable, Dict


def _serve(pipe: Any) -> None:
    """Answer ("training" or "sampling", arguments) by what there is to call, and a label by calling it."""
    from ldm_jax.benchmark import peer
    calls: Dict[str, Callable[[], Any]] = {}
    while True:
        message = pipe.recv()
        if message is None:
            return
        if isinstance(message, tuple):
            kind, arguments = message
            calls = getattr(peer, kind)(*arguments)
            pipe.send(list(calls))
        else:
            calls[message]()
            pipe.send(None)


class Peer:
    """`benchmark.peer` with the same two functions, at work in another process."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """End the process, and wait until it has."""
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._pipe.send(None)
        self._process.join()

    def _ask(self, message: Any) -> Any:
        self._pipe.send(message)
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("the peer's process has ended; its error stands above") from None

    def _calls(self, kind: str, *arguments: Any) -> Dict[str, Callable[[], Any]]:
        return {label: functools.partial(self._ask, label) for label in self._ask((kind, arguments))}

    def training(self, name: str, size: int, labels: Any) -> Dict[str, Callable[[], Any]]:
        """label -> one update."""
        return self._calls("training", name, size, labels)

    def sampling(self, name: str, count: int, guidance: float, steps: int, labels: Any) -> Dict[str, Callable[[], Any]]:
        """label -> pictures."""
        return self._calls("sampling", name, count, guidance, steps, labels)
