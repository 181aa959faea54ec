"""Imitates the endpoints of a server that the harness uses, and its ways to fail: `BEHAVIOUR PORT NAME`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import resource_tracker, shared_memory

BEHAVIOUR, PORT, NAME = sys.argv[1], int(sys.argv[2]), sys.argv[3]
KEY = os.environ.get("VLLM_API_KEY", "")
VOCAB = 64
COUNTED = [0, 7, 0]  # tokens generated, from the prefix cache, preemptions


def step(tokens: list[int], position: int) -> dict[int, float]:
    """Made-up top-20 logprobs that depend on all tokens so far."""
    first = (sum(tokens) + 7 * position) % VOCAB
    return {(first + rank) % VOCAB: -2.0 * rank or -0.2 for rank in range(20)}


def completion(rows: list[tuple[int, dict[int, float]]]) -> dict:
    logprobs = {
        "token_logprobs": [top[token] for token, top in rows],
        "top_logprobs": [{f"token_id:{t}": v for t, v in top.items()} for _, top in rows],
    }
    return {"choices": [{"token_ids": [token for token, _ in rows], "logprobs": logprobs}]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/metrics" and BEHAVIOUR != "counts-nothing":
            names = ("generation_tokens", "prefix_cache_hits", "num_preemptions")
            text = "".join(
                f'vllm:{name}_total{{engine="0"}} {value}.0\n' for name, value in zip(names, COUNTED, strict=True)
            )
            self.say_bytes(200, text.encode())
        elif self.allowed():
            self.say(200, {"data": [{"id": "somebody-else" if BEHAVIOUR == "wrong-model" else NAME}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        if BEHAVIOUR == "dies-answering" and len(body["prompt"]) > 1:
            print("ValueError: the engine fell over", flush=True)
            os._exit(3)
        if BEHAVIOUR == "lies":
            return self.say(503, {"error": "not really"})
        if BEHAVIOUR == "truncates" and len(body["prompt"]) > 1:
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
            return
        if BEHAVIOUR in ("hangs", "loses-worker") and len(body["prompt"]) > 1:
            print("asked", flush=True)
            if BEHAVIOUR == "loses-worker":
                WORKER.kill()
            time.sleep(600)
        if BEHAVIOUR == "slow":
            time.sleep(0.05)
        if BEHAVIOUR == "killed-answering" and len(body["prompt"]) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if BEHAVIOUR == "fills" and len(body["prompt"]) > 1:
            flood(int(os.environ.get("STUB_FLOOD", 2**30)))
        if BEHAVIOUR == "eats" and len(body["prompt"]) > 1:
            eat()
        if BEHAVIOUR == "http-500" and len(body["prompt"]) > 1:
            return self.say(500, {"error": "no"})
        forced = (body.get("vllm_xargs") or {}).get("helix_forced_tokens", [])
        if BEHAVIOUR == "ignores-forcing":
            forced = []
        tokens, rows = list(body["prompt"]), []
        for position in range(body["max_tokens"]):
            top = step(tokens, position)
            token = forced[position] if position < len(forced) else next(iter(top))
            rows.append((token, {token: top.get(token, -9.0), **top}))
            tokens.append(token)
        if BEHAVIOUR == "nan":
            rows = [(token, dict.fromkeys(top, float("nan"))) for token, top in rows]
        if body.get("stream"):
            return self.stream(rows)
        COUNTED[0] += len(rows)
        self.say(200, completion(rows))

    def stream(self, rows):
        """One event a token, until the client hangs up; `never-drops` counts all at once."""
        COUNTED[0] += len(rows) if BEHAVIOUR == "never-drops" else 0
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for row in rows:
            COUNTED[0] += 1
            try:
                self.wfile.write(f"data: {json.dumps(completion([row]))}\n\n".encode())
                self.wfile.flush()
                time.sleep(0.01)
            except (BrokenPipeError, ConnectionResetError):
                return
        self.wfile.write(b"data: [DONE]\n\n")

    def allowed(self) -> bool:
        if BEHAVIOUR != "open" and self.headers.get("Authorization") != f"Bearer {KEY}":
            self.say(401, {"error": "unauthorized"})
            return False
        return True

    def say(self, status: int, body: dict):
        self.say_bytes(status, json.dumps(body).encode())

    def say_bytes(self, status: int, data: bytes):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


WORKER: subprocess.Popen | None = None


def eat() -> None:
    """Take memory until the control group has none left."""
    held = []
    while True:
        held.append(b"x" * 2**24)


def flood(size: int) -> None:
    """Write that many bytes on standard output; what a full disk does not take is lost."""
    line = b"noise " * 10_000 + b"\n"
    for _ in range(size // len(line)):
        with contextlib.suppress(OSError):
            os.write(1, line)


def main():
    global WORKER
    print(f"stub {os.getpid()}\nstub starts {BEHAVIOUR}", flush=True)
    if BEHAVIOUR == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if BEHAVIOUR == "port-taken":
        sys.exit("OSError: [Errno 98] error while attempting to bind on address: address already in use")
    if BEHAVIOUR == "loses-worker":
        WORKER = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    if BEHAVIOUR == "floods":
        print("INFO: GPU KV cache size: 21,824 tokens, with room", flush=True)
        flood(int(os.environ.get("STUB_FLOOD", 2**30)))
    if BEHAVIOUR == "refused":
        print("Traceback (most recent call last):")
        sys.exit("helix_runtime.vllm_plugin.refusal.HelixRefusal: TP 4 % DCP 3 = 1: not 0")
    if BEHAVIOUR == "out-of-memory":
        sys.exit("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: Cannot allocate memory")
    if BEHAVIOUR == "says-much-and-dies":
        flood(2**23)
        print("ValueError: said at last", flush=True)
        os._exit(4)
    if BEHAVIOUR == "silent":
        time.sleep(600)
    if BEHAVIOUR in ("stubborn", "leaks", "leaks-and-dies"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        block = shared_memory.SharedMemory(create=True, size=4096)
        resource_tracker.unregister(block._name, "shared_memory")  # as a killed process leaves it
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        print(f"child {child.pid} shm {block.name}", flush=True)
        if BEHAVIOUR == "leaks-and-dies":
            os._exit(5)
    print("INFO: GPU KV cache size: 21,824 tokens, with room", flush=True)
    ThreadingHTTPServer.request_queue_size = 128  # dozens of prompts come at once
    ThreadingHTTPServer((os.environ.get("STUB_BIND", "127.0.0.1"), PORT), Handler).serve_forever()


main()
