"""How many workers a cluster has room for, and shares that Ray does not give out; without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mi2rage_engines.errors import InputError
from mi2rage_rt.ray_cluster import PoolOptions, room
from mi2rage_rt.worker_pool import WorkerPool


@pytest.mark.parametrize(
    ("has", "cpus", "gpus", "expected"),
    [
        ({"CPU": 2}, 0.1, 0, 20),
        ({"CPU": 64, "GPU": 1}, 1, 0.2, 5),
        ({"CPU": 64, "GPU": 1}, 1, 0.1, 10),
        ({"CPU": 64, "GPU": 2}, 1, 0.05, 40),
        ({"CPU": 64, "GPU": 2}, 1, 0.3, 6),  # three a GPU: none is on two
        ({"CPU": 3, "GPU": 8}, 1, 1, 3),
        ({"CPU": 64, "GPU": 8}, 1, 3, 2),
        ({"CPU": 1}, 4, 0, 1),
    ],
)
def test_the_room_of_a_cluster(has: dict[str, float], cpus: float, gpus: float, expected: int) -> None:
    ray = SimpleNamespace(cluster_resources=lambda: has)
    assert room(PoolOptions(cpus_per_worker=cpus), ray, gpus) == expected


@pytest.mark.parametrize("wrong", [{"gpus_per_worker": 1.5}, {"gpus_per_worker": 1e-5}, {"cpus_per_worker": 1e-5},
                                   {"cpus_per_worker": float("nan")}])  # fmt: skip
def test_shares_that_ray_does_not_give_out(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="per worker: came"):
        PoolOptions(**wrong)  # type: ignore[arg-type]


class Call:
    """A method of an actor."""

    def __init__(self, actor: Actor, name: str) -> None:
        self.remote = lambda *arguments: actor.called(name, arguments)


class Actor:
    """A worker of a made-up Ray; a call of one that is dead fails."""

    def __init__(self, ray: Ray) -> None:
        self.ray, self.dead = ray, False
        self.start, self.run, self.ping = (Call(self, name) for name in ("start", "run", "ping"))

    def called(self, name: str, arguments: tuple[Any, ...]) -> object:
        reference = object()
        if name == "run" and arguments[1] in self.ray.killers:
            self.ray.killers.remove(arguments[1])
            for actor in self.ray.actors:  # its machine goes, and all that are on it
                actor.dead = True
        self.ray.results[reference] = (self, arguments[0](None, *arguments[1:]) if name == "run" else None)
        return reference


class Ray:
    """As much of Ray as the pool uses."""

    class exceptions:  # noqa: N801
        RayError = type("RayError", (Exception,), {})
        RayTaskError = type("RayTaskError", (Exception,), {})

    def __init__(self) -> None:
        self.actors: list[Actor] = []
        self.results: dict[object, tuple[Actor, Any]] = {}
        self.killers: list[str] = []
        self.starts_fast = True

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **_: Any) -> Any:
        def made(*_: Any) -> Actor:
            self.actors.append(Actor(self))
            return self.actors[-1]

        return lambda _: SimpleNamespace(remote=made)

    def wait(self, references: list[object], **_: Any) -> tuple[list[object], list[object]]:
        # The pool names workers that start last.
        ordered = references[::-1] if self.starts_fast else references
        return ordered[:1], ordered[1:]

    def get(self, reference: object) -> Any:
        actor, result = self.results.pop(reference)
        if actor.dead:
            raise self.exceptions.RayError
        return result

    def kill(self, actor: Actor) -> None:
        actor.dead = True

    def shutdown(self) -> None: ...


def test_an_item_is_not_lost_to_idle_workers_whose_machine_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray()
    monkeypatch.setattr("mi2rage_rt.worker_pool.connected", lambda options: ray)
    monkeypatch.setattr("mi2rage_rt.worker_pool.gpus_each", lambda options, ray: 0.0)
    with WorkerPool(PoolOptions(workers=5), lambda: None) as pool:
        assert [done.result for done in pool.done(list("abcde"), lambda held, item: item)] != []
        ray.killers.append("last")
        ray.starts_fast = False  # a machine that takes the place of another is there later
        (done,) = pool.done(["last"], lambda held, item: f"{item} made")
    assert (done.result, done.lost) == ("last made", False)
