"""Many requests to a few endpoints at a time, whatever the endpoints do: bounded, shared out, limited, tried again.

The requests run in one thread with an event loop of its own, which lives as long as the iterator that `stream` returns.
They are taken from their iterable in the caller's thread, a bounded number ahead of the answers.

An answer that fails is tried again after a pause drawn evenly from 0 to a limit that doubles ("full jitter": Brooker
2015, "Exponential Backoff And Jitter", AWS Architecture Blog). An endpoint that fails several times in a row, or whose
connection breaks, is set aside and only asked for its list of models, in growing intervals, until it answers again and
still serves the same; requests wait meanwhile and lose no tries. An endpoint that says 429 gets fewer requests at a
time, and slowly more again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx

from distill.http_client import CONNECT, Call, Client
from distill.http_errors import Again, failed, shown, words
from recipes.errors import EngineError

PATIENCE = 300.0  # seconds for which all endpoints may be gone; at least what one answer may take
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds: limits of the pause before a request's next try
ASIDE_AFTER = 4  # failures in a row
FIRST_ASIDE, LONGEST_ASIDE = 1.0, 30.0  # seconds until an endpoint that was set aside is asked again


@dataclass
class Endpoint:
    """One server, as a stream sees it.

    Attributes:
        lane: makes a client for one connection.
        idle: clients that nobody uses now.
        limit: requests at a time, at most; a fraction counts once it makes a whole.
        held_until: in the loop's time; no requests before.
        failures: in a row.
        reason: of the last failure.
    """

    url: str
    lane: Callable[[], httpx.AsyncClient]
    limit: float
    idle: list[httpx.AsyncClient] = field(default_factory=list)
    busy: int = 0
    answers: int = 0
    failures: int = 0
    setbacks: int = 0
    aside: bool = False
    held_until: float = 0.0
    slowed_at: float = 0.0
    reason: str = ""

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client of its own for one request: httpx's pool looks at all its connections at every request, which took
        most of the time with hundreds of them."""
        http = self.idle.pop() if self.idle else self.lane()
        try:
            yield http
        finally:
            self.idle.append(http)


@dataclass
class Job:
    """A call on its way.

    Attributes:
        tries: that failed and count.
        last: the endpoint of the last try, and how many answers it had given then.
    """

    number: int
    call: Call
    tries: int = 0
    last: Endpoint | None = None
    answers: int = 0


def stream(client: Client, calls: Iterable[Call], ordered: bool = False) -> Iterator[tuple[Call, Any]]:
    """Calls and their results, as they come or in the order of the calls. Closing it gives up what is under way.

    Raises:
        EngineError: an endpoint refused a call, a call failed too often, or no endpoint answers any more. What was
            given out before stays valid.
    """
    ahead = 2 * client.parallel * len(client.urls)
    numbered = enumerate(calls)
    asked: dict[int, Call] = {}  # and not given out
    done: dict[int, Any] = {}
    following, more = 0, True
    run = _Run(client)
    run.start()
    client.streams.add(run.give_up)
    try:
        while True:
            while more and len(asked) < ahead:
                if (item := next(numbered, None)) is None:
                    more = False
                else:
                    asked[item[0]] = item[1]
                    run.submit(Job(*item))
            if not asked:
                return
            number, result = run.results.get()
            if isinstance(result, BaseException):
                raise result
            done[number] = result
            if not ordered:
                following = number
            while following in done:
                yield asked.pop(following), done.pop(following)
                following += 1
    finally:
        client.streams.discard(run.give_up)
        run.stop()


class _Run:
    """One stream: its thread, its loop, its connections."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self.loop = asyncio.new_event_loop()
        self.pending: asyncio.Queue[Job] = asyncio.Queue()
        self.changed, self.stopped = asyncio.Event(), asyncio.Event()
        self.endpoints: list[Endpoint] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.dark_since: float | None = None
        self.thread = threading.Thread(target=self._work, name="teacher-http", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def submit(self, job: Job) -> None:
        if job.call.body is None:
            self.results.put((job.number, None))
        else:
            self.loop.call_soon_threadsafe(self.pending.put_nowait, job)

    def give_up(self) -> None:
        self.results.put((-1, EngineError("the teacher was closed while it was asked")))

    def stop(self) -> None:
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.stopped.set)
            self.thread.join(CONNECT)  # at most; a name look-up cannot be cancelled, and the thread is a daemon

    def _work(self) -> None:
        try:
            self.loop.run_until_complete(self._main())
        except BaseException as error:  # or the stream would wait for ever
            self.results.put((-1, error))
        finally:
            self.loop.close()

    async def _main(self) -> None:
        client = self.client
        limits, trust = httpx.Limits(max_connections=1), httpx.create_ssl_context()
        for url in client.urls:
            lane = partial(httpx.AsyncClient, **client.settings(url), limits=limits, verify=trust)
            self.endpoints.append(Endpoint(url, lane, client.parallel))
        self._spawn(self._dispatch())
        await self.stopped.wait()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for endpoint in self.endpoints:
            for http in endpoint.idle:
                await http.aclose()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the rest; its error is the stream's."""

        def ended(task: asyncio.Task[None]) -> None:
            self.tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                self.results.put((-1, error))

        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(ended)

    async def _dispatch(self) -> None:
        """Hand out jobs, one after the other, as limits and endpoints allow."""
        while True:
            job = await self.pending.get()
            for bucket, amount in ((self.client.requests, 1), (self.client.tokens, job.call.tokens)):
                if bucket is not None:
                    while (pause := bucket.wait(amount)) > 0:
                        await asyncio.sleep(pause)
                    bucket.take(amount)
            endpoint = await self._free(job)
            endpoint.busy += 1
            self._spawn(self._attempt(endpoint, job))

    async def _free(self, job: Job) -> Endpoint:
        """The endpoint with the least load that takes requests; not the one that just failed, if there is another."""
        while True:
            now = self.loop.time()
            well = [e for e in self.endpoints if not e.aside and e.busy < max(1, int(e.limit))]
            if ready := [e for e in well if e.held_until <= now]:
                return min(ready, key=lambda e: (e is job.last, e.busy / e.limit, e.answers))
            self.changed.clear()
            pause = min((e.held_until - now for e in well), default=None)
            with contextlib.suppress(TimeoutError):  # then an endpoint wants requests again
                await asyncio.wait_for(self.changed.wait(), pause)

    async def _attempt(self, endpoint: Endpoint, job: Job) -> None:
        """One try: its result, or another try after a pause, or the end of the stream."""
        try:
            result = await self._send(endpoint, job.call)
        except Again as again:
            pause = self._setback(endpoint, job, again)
        else:
            endpoint.answers += 1
            endpoint.failures = endpoint.setbacks = 0
            endpoint.limit = min(self.client.parallel, endpoint.limit + 1 / endpoint.limit)
            if self.client.tokens is not None and job.call.used is not None:
                self.client.tokens.take(job.call.used(result) - job.call.tokens)  # mostly gives some back
            self.results.put((job.number, result))
            return
        finally:
            endpoint.busy -= 1
            self.changed.set()
        await asyncio.sleep(pause)
        self.pending.put_nowait(job)

    def _setback(self, endpoint: Endpoint, job: Job, again: Again) -> float:
        """Note a failed try. Returns the pause before the next.

        Raises:
            EngineError: there is none.
        """
        now = self.loop.time()
        if again.hold is not None:
            endpoint.held_until = max(endpoint.held_until, now + again.hold)
        if again.busy and now - endpoint.slowed_at > 1:
            endpoint.limit, endpoint.slowed_at = max(1.0, endpoint.limit * 0.7), now
        if again.endpoint_ill:
            endpoint.failures += 1
            endpoint.reason = again.reason
            if (again.lost or endpoint.failures >= ASIDE_AFTER) and not endpoint.aside:
                self._set_aside(endpoint)
        gets_on = again.busy and job.last is endpoint and endpoint.answers > job.answers  # then it is only slow
        job.last, job.answers = endpoint, endpoint.answers
        job.tries += not gets_on
        if job.tries > self.client.retries:
            raise EngineError(
                f"does not answer request {job.call.key} in {job.tries} tries, the last time: {again.reason}",
                shown(endpoint.url),
                "see the server's log, and run the stage again: what was answered is kept",
            )
        return random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(job.tries, 16)))

    async def _send(self, endpoint: Endpoint, call: Call) -> Any:
        """
        Raises:
            Again: it failed, or gave no answer. EngineError: it was refused, or the server is another one than before.
        """
        client, sent, started = self.client, self.client.body(call), self.loop.time()
        content = json.dumps(sent).encode()  # ASCII: a lone surrogate passes too
        try:
            async with asyncio.timeout(client.seconds):
                url, headers = endpoint.url + call.path, {"Content-Type": "application/json"}
                async with endpoint.connection() as http:
                    response = await http.post(url, content=content, headers=headers, timeout=self._timeout)
        except TimeoutError:
            raise Again(f"no answer in {client.seconds:g} seconds", endpoint_ill=True) from None
        except httpx.HTTPError as error:
            raise Again(client.why(error), endpoint_ill=True, lost=True) from None
        if response.status_code != 200:
            text = response.text
            if client.adapts(response.status_code, text, sent) and client.body(call) != sent:
                return await self._send(endpoint, call)
            raise failed(
                response.status_code,
                response.headers,
                text,
                url=endpoint.url,
                key=client.key,
                request=call.key,
                prompts=client.prompts,
            )
        try:
            reply = response.json()
        except ValueError:
            raise Again("its reply is no JSON", endpoint_ill=True) from None
        if not isinstance(reply, dict):
            raise Again("its reply is no JSON object", endpoint_ill=True)
        if reply.get("error"):  # some gateways say so with status 200
            raise Again(f"its reply is an error ({words(response.text, client.key)})", endpoint_ill=True)
        client.watch(endpoint.url, reply)
        return call.read(reply, self.loop.time() - started)

    @property
    def _timeout(self) -> httpx.Timeout:
        """Only for the connection: the whole answer has a limit of its own."""
        return httpx.Timeout(None, connect=min(CONNECT, self.client.seconds))

    def _set_aside(self, endpoint: Endpoint) -> None:
        endpoint.aside = True
        if all(e.aside for e in self.endpoints) and self.dark_since is None:
            self.dark_since = self.loop.time()
        self._spawn(self._revive(endpoint))

    async def _revive(self, endpoint: Endpoint) -> None:
        """Ask an endpoint that is set aside, in growing intervals, until it answers.

        Raises:
            EngineError: all endpoints are gone for too long, or it came back as another.
        """
        patience, noted = max(PATIENCE, self.client.seconds), False
        while True:
            if endpoint.failures >= ASIDE_AFTER:  # else a connection broke, which is looked into at once
                if not noted:
                    self.client.notes.append(f"{shown(endpoint.url)}: set aside ({endpoint.reason})")
                    noted = True
                pause = min(LONGEST_ASIDE, FIRST_ASIDE * 2 ** min(endpoint.setbacks, 16))
                await asyncio.sleep(random.uniform(pause / 2, pause))
                endpoint.setbacks += 1
            try:
                async with endpoint.connection() as http:
                    if self.client.told(endpoint.url, await http.get(endpoint.url + "/models")):
                        break
            except httpx.HTTPError as error:
                endpoint.reason = self.client.why(error)
            endpoint.failures = max(endpoint.failures, ASIDE_AFTER)
            if self.dark_since is not None and self.loop.time() - self.dark_since > patience:
                reasons = "; ".join(f"{shown(e.url)}: {e.reason}" for e in self.endpoints)
                raise EngineError(
                    f"no teacher has answered for {patience:g} seconds ({reasons})",
                    None,
                    "start the server again, and run the stage again: what was answered is kept",
                )
        endpoint.aside, self.dark_since = False, None
        endpoint.failures = min(endpoint.failures, ASIDE_AFTER - 1)  # one more sets it aside again, an answer clears it
        if noted:
            self.client.notes.append(f"{shown(endpoint.url)}: back")
        self.changed.set()
