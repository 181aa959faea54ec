"""Asks a server the workload over HTTP and writes down what it answered."""

import asyncio
import json
from collections.abc import Callable

import httpx

from harness.cell import Cell
from harness.counts import read_counts, running
from harness.server.log import Cause, Failure
from harness.server.process import ON_LOOPBACK, Server, ServerFailed
from harness.transcript import Answer, Counts, Prompt, Step, Transcript
from harness.workload import Workload

TOP_K = 20  # vLLM's default --max-logprobs
FORCED_KEY = "helix_forced_tokens"
_ID = "token_id:"


def answer_all(
    server: Server, cell: Cell, workload: Workload, dtype: str, follow: Transcript | None = None
) -> Transcript:
    """Ask every prompt of `workload`. `follow` imposes that transcript's tokens, position by position.

    A request that the living server refuses becomes an answer without steps; one that takes other tokens than the
    imposed ones, an answer that is not `forced`. Raises ServerFailed when the server dies, hangs or breaks an answer
    off, or the run is cancelled.
    """
    answers, counts = asyncio.run(_Asker(server, workload, follow).run())
    return Transcript(
        cell_id=cell.id,
        cell_key=cell.key,
        workload_key=workload.key,
        dtype=dtype,
        vocab_size=workload.vocab,
        top_k=TOP_K,
        answers=tuple(answers),
        counts=counts,
    )


class _Asker:
    def __init__(self, server: Server, workload: Workload, follow: Transcript | None):
        self.server = server
        self.workload = workload
        self.forced = {a.prompt: [step.token_id for step in a.steps] for a in follow.answers} if follow else None

    async def run(self) -> tuple[list[Answer], Counts | None]:
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=0)
        timeout = httpx.Timeout(self.server.limits.request, connect=10.0)
        async with httpx.AsyncClient(
            base_url=self.server.url, headers=self.server.headers, timeout=timeout, limits=limits, **ON_LOOPBACK
        ) as client:
            asking = asyncio.create_task(self._ask_in_order(client))
            watching = asyncio.create_task(_watch(self.server.check))
            try:
                await asyncio.wait({asking, watching}, return_when=asyncio.FIRST_COMPLETED)
                if watching.done():
                    watching.result()
                return asking.result()
            finally:
                for task in (asking, watching):
                    task.cancel()
                await asyncio.gather(asking, watching, return_exceptions=True)

    async def _ask_in_order(self, client: httpx.AsyncClient) -> tuple[list[Answer], Counts | None]:
        answers: list[Answer] = []
        before = read_counts(await self._metrics(client))
        for batch in _batches(self.workload.prompts):
            answers += await asyncio.gather(*(self._ask(client, prompt) for prompt in batch))
            if any(prompt.abort_after for prompt in batch):
                await self._until_idle(client)
        after = read_counts(await self._metrics(client))
        if before is None or after is None:
            return answers, None
        names = Counts.model_fields
        return answers, Counts(**{name: getattr(after, name) - getattr(before, name) for name in names})

    async def _metrics(self, client: httpx.AsyncClient) -> str:
        """The server's metrics, empty where it has none."""
        try:
            reply = await client.get("/metrics")
            return reply.text if reply.is_success else ""
        except httpx.TransportError:
            await _settle(self.server)
            return ""

    async def _until_idle(self, client: httpx.AsyncClient, seconds: float = 20.0) -> None:
        """Wait until the server runs nothing, so that what comes next finds the slots of dropped requests free."""
        for _ in range(int(seconds / 0.1)):
            if not running(await self._metrics(client)):
                return
            await asyncio.sleep(0.1)

    async def _ask(self, client: httpx.AsyncClient, prompt: Prompt) -> Answer:
        wanted = self.forced.get(prompt.name, []) if self.forced is not None else None
        body = {
            "model": self.server.launch.name,
            "prompt": list(prompt.token_ids),
            "max_tokens": prompt.max_tokens,
            "temperature": 0,
            "logprobs": TOP_K,
            "ignore_eos": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "add_special_tokens": False,
        }
        if wanted:
            body["vllm_xargs"] = {FORCED_KEY: wanted}
        try:
            if prompt.abort_after:
                steps = await _hang_up(client, {**body, "stream": True}, prompt.abort_after)
            else:
                reply = await client.post("/v1/completions", json=body)
                steps = read_steps(reply.json()) if reply.is_success else ()
        except httpx.TimeoutException:
            reason = f"no answer to prompt {prompt.name} within {self.server.limits.request:.0f} s"
            raise ServerFailed(Failure(cause=Cause.TIMEOUT, reason=reason)) from None
        except (httpx.TransportError, json.JSONDecodeError) as problem:
            await _settle(self.server)
            reason = f"the answer to prompt {prompt.name} broke off: {type(problem).__name__}: {problem}"
            raise ServerFailed(Failure(cause=Cause.BROKEN_ANSWER, reason=reason)) from problem
        except ValueError:
            await _settle(self.server)
            steps = ()
        # A server that takes other tokens was not forced: it is compared up to where it parts, and is unproven at best.
        followed = wanted is not None and [step.token_id for step in steps] == wanted[: len(steps)]
        return Answer(
            prompt=prompt.name,
            kind=prompt.kind,
            prompt_length=len(prompt.token_ids),
            batch=prompt.batch,
            forced=followed,
            steps=steps,
            asked=prompt.max_tokens,
            waived=prompt.max_tokens - prompt.abort_after if prompt.abort_after else 0,
        )


async def _hang_up(client: httpx.AsyncClient, body: dict, tokens: int) -> tuple[Step, ...]:
    """The first `tokens` steps of a streamed completion; then the connection is closed on the server."""
    steps: tuple[Step, ...] = ()
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        async for line in reply.aiter_lines():
            if len(steps) >= tokens or not reply.is_success or line == "data: [DONE]":
                break
            if line.startswith("data: "):
                steps += read_steps(json.loads(line.removeprefix("data: ")))
    return steps[:tokens]


def read_steps(reply: dict) -> tuple[Step, ...]:
    """The steps of a completion. ValueError when the reply is not of the documented form.

    The server adds the chosen token to the top k where it is not among them; here `top` is the top k alone.
    """
    try:
        choice = reply["choices"][0]
        logprobs = choice["logprobs"]
        rows = zip(choice["token_ids"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        return tuple(
            Step(token_id=token, logprob=logprob, top=_top({_id(text): value for text, value in top.items()}))
            for token, logprob, top in rows
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"not a completion with logprobs: {type(error).__name__}: {error}") from error


def _top(values: dict[int, float]) -> dict[int, float]:
    best = sorted(values.items(), key=lambda item: -item[1])
    return dict(best[:TOP_K])


def _id(text: str) -> int:
    if not text.startswith(_ID):
        raise ValueError(f"expected token ids, got {text!r}")
    return int(text.removeprefix(_ID))


def _batches(prompts: tuple[Prompt, ...]) -> list[list[Prompt]]:
    """Prompts in order; those that share a non-zero batch together, at the place of the first of them."""
    groups: dict[tuple[int, int], list[Prompt]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault((prompt.batch, 0 if prompt.batch else index), []).append(prompt)
    return list(groups.values())


async def _watch(check: Callable[[], None]) -> None:
    while True:
        check()
        await asyncio.sleep(0.2)


async def _settle(server: Server) -> None:
    """After a broken connection: wait for the death that probably caused it, so that it is reported as what it is."""
    for _ in range(int(server.settling / 0.1)):
        server.check()
        await asyncio.sleep(0.1)
